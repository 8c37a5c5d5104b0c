"""Uniform registers that a compiled kernel may read before anything has written them.

A compiler can be wrong: ptxas 12.8 sets the address of a matrix product at the end of a loop and
reads it at the start, so that the first turn uses whatever the register held. `unwritten_reads`
finds that in the listing of a cubin, by a forward analysis over its instructions: a register counts
as written if every path from the entry writes it. A write under a predicate counts as one, and of a
width that is not known only the first register is taken to be read, so what is named is a fault.
Only uniform registers are looked at (UR0, UR1, ...), which hold addresses and descriptors.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import triton

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
_FUNCTION = re.compile(r"^\.text\.\w+:$", re.MULTILINE)
_LABEL = re.compile(r"^(\.L\w+):")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+)\s*(.*?)\s*;")
_REGISTER = re.compile(r"(\w*)\[UR(\d+)|\bUR(\d+)\b")  # of `desc[UR4]`, what is before the bracket
_JUMPS = ("BRA", "JMP", "EXIT", "RET")
# Their first operand is read, though it is a uniform register.
_NO_RESULT = ("UISETP", "UFSETP", "UPLOP3", "UTM", "UBLK", "UTCBAR", "UTCHMMA", "USETMAXREG")


class Instruction(NamedTuple):
    """One line of a listing."""

    address: str
    predicate: str | None
    opcode: str
    operands: str


def listing(cubin: Path) -> str:
    """The instructions and labels of a cubin, as nvdisasm prints them."""
    command = [str(TOOL), "-c", str(cubin)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def unwritten_reads(text: str) -> list[str]:
    """Reads of uniform registers that some path has not written, one description each."""
    return [found for body in _FUNCTION.split(text)[1:] for found in _check(body)]


def _check(body: str) -> list[str]:
    code, labels = [], {}
    for line in body.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            code.append(Instruction(*instruction.groups()))
    effects = [_effects(instruction) for instruction in code]
    unwritten: dict[int, set[int]] = {}  # before each instruction, on some path
    todo = [(0, set().union(*(reads for reads, _ in effects)))]
    while todo:
        index, state = todo.pop()
        known = unwritten.get(index)
        if index == len(code) or (known is not None and state <= known):
            continue
        unwritten[index] = state | (known or set())
        after = unwritten[index] - effects[index][1]
        todo += [(follower, after) for follower in _followers(code, index, labels)]
    return [
        f"{code[index].address} {code[index].opcode} reads UR{', UR'.join(map(str, missing))}"
        for index, state in sorted(unwritten.items())
        if (missing := sorted(effects[index][0] & state))
    ]


def _followers(code: list[Instruction], index: int, labels: dict[str, int]) -> list[int]:
    """Where control may go after an instruction."""
    _, predicate, opcode, operands = code[index]
    name = opcode.split(".")[0]
    target = re.search(r"`\((\.L\w+)\)", operands) if name in ("BRA", "JMP", "CALL") else None
    followers = [labels[target[1]]] if target and target[1] in labels else []
    always = predicate is None and not re.match(r"!?U?P\d", operands)
    return followers if name in _JUMPS and always else [*followers, index + 1]


def _effects(instruction: Instruction) -> tuple[set[int], set[int]]:
    """Numbers of the uniform registers that an instruction reads, and of those it writes."""
    parts = instruction.opcode.split(".")
    name, operands = parts[0], re.split(r",\s*", instruction.operands)
    first = next((i for i, x in enumerate(operands) if not re.fullmatch(r"U?P[T\d]", x)), 0)
    writes: set[int] = set()
    result = re.fullmatch(r"UR(\d+)", operands[first])
    if result and not name.startswith(_NO_RESULT):
        size = 4 if "128" in parts else 2 if {"64", "WIDE"} & set(parts) else 1
        writes = _span(int(result[1]), size)
        del operands[first]
    reads: set[int] = set()
    for kind, inside, alone in _REGISTER.findall(", ".join(operands)):
        number = int(inside or alone)
        if kind == "gdesc" and name.endswith("GMMA") and not name.startswith("UTC"):
            # Descriptors of both factors, or if the first lies in registers the second's alone.
            by_register = not operands[1].startswith("gdesc")
            reads |= _span(number + 2, 2) if by_register else _span(number, 4)
        elif kind in ("desc", "gdesc") or (alone and name.startswith("U") and "64" in parts):
            reads |= _span(number, 2)
        else:
            reads.add(number)
    return reads, writes


def _span(first: int, size: int) -> set[int]:
    return set(range(first, first + size))
