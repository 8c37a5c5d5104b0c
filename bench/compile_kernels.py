"""What each Triton kernel compiles to on GPUs that are not here: registers, memory, instructions.

    python -m bench.compile_kernels       check every kernel, write docs/benchmarks/kernels.md

Cross-compilation needs no GPU. Triton enforces no limit then, so `faults` does: a program that
spills, takes more shared or tensor memory than there is, leaves the tensor cores idle or reads a
register that nothing has written (`machine_code.py`) is named.
Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import triton
import zeroi2v_kernels
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.compile_cases import Case, cases
from bench.machine_code import listing, unwritten_reads

ARCHITECTURES = (80, 90, 100)
SHARED_LIMIT = {80: 163, 90: 227, 100: 227}  # KiB a program may use
SHARED_OF_SM = {80: 164, 90: 228, 100: 228}  # KiB, of which each program takes 1 more
THREADS_OF_SM = 2048
TENSOR_COLUMNS = 512  # of an SM's tensor memory, on 10.0
TENSOR_CORES = {80: "HMMA.", 90: "HGMMA.", 100: "UTCHMMA"}  # instruction of each generation
TABLE = Path(__file__).parents[1] / "docs" / "benchmarks" / "kernels.md"
TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def everything() -> list[tuple[int, int]]:
    """(architecture, index of the case) of all there is to compile."""
    return [(arch, index) for arch in ARCHITECTURES for index in range(len(cases(arch)))]


def sample() -> list[tuple[int, int]]:
    """Each case for one of its architectures, in turns that do not follow those of the kernels."""
    having: dict[int, list[int]] = {}
    for arch, index in everything():
        having.setdefault(index, []).append(arch)
    return sorted(
        (archs[(index + index // len(archs)) % len(archs)], index)
        for index, archs in having.items()
    )


def one_of_each() -> list[tuple[int, int]]:
    """The last case of every kernel on every architecture."""
    last = {}
    for arch, index in everything():
        last[arch, cases(arch)[index].kernel.__name__] = arch, index
    return list(last.values())


def source_hash() -> str:
    """Of all that the table depends on but Triton: the kernels' code and the cases.

    Comments and docstrings are left out.
    """
    digest = hashlib.sha256()
    for path in sorted(Path(zeroi2v_kernels.__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            decorators = ast.unparse(getattr(node, "decorator_list", []))
            if isinstance(node, ast.FunctionDef) and "triton.jit" in decorators:
                if ast.get_docstring(node) is not None:
                    del node.body[0]
                digest.update(ast.unparse(node).encode())
    for arch in ARCHITECTURES:
        for case in cases(arch):
            values = (case.name, case.types, case.constants, case.options)
            digest.update(json.dumps(values, default=str).encode())
    return digest.hexdigest()[:16]


def measure(case: Case, arch: int) -> dict:
    """Compiles `case`; returns its registers, memory (KiB shared), and counts of instructions."""
    kernel, constants = case.kernel, case.constants
    names = kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    aligned = [
        (i,)
        for i, name in enumerate(names)
        if name not in constants and (name.endswith("_ptr") or name.startswith("stride_"))
    ]
    source = ASTSource(
        kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {index: [["tt.divisibility", 16]] for index in aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        command = [str(TOOL), "--dump-resource-usage", str(binary)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        code = listing(binary)
    registers = int(re.search(r"REG:(\d+)", usage)[1])
    shared = compiled.metadata.shared / 1024
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    threads = 32 * case.options["num_warps"]
    limits = [
        65536 // (-(-registers // 8) * 8 * threads),
        int(SHARED_OF_SM[arch] // (shared + 1)),
        THREADS_OF_SM // threads,
    ]
    if columns:
        limits.append(TENSOR_COLUMNS // columns)
    return dict(
        registers=registers,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=shared,
        columns=columns,
        programs=min(limits),
        tensor_core={arch: code.count(name) for arch, name in TENSOR_CORES.items()},
        wide_loads=len(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*128", code)),
        unwritten_reads=unwritten_reads(code),
    )


def faults(case: Case, arch: int, got: dict) -> list[str]:
    """What is wrong with a compiled kernel, in words; empty if nothing is."""
    used = {a for a, count in got["tensor_core"].items() if count}
    found = {
        f"{got['spills']} spills": got["spills"],
        f"{got['registers']} registers: a stub, it did not fit": got["registers"] <= 16,
        f"{got['shared']:.0f} KiB shared": got["shared"] > SHARED_LIMIT[arch],
        f"{got['columns']} tensor memory columns": got["columns"] > TENSOR_COLUMNS,
        "no 16-byte loads": not got["wide_loads"],
        f"tensor cores of {sorted(used)}": case.tensor_cores and used != {arch},
    }
    return [*(fault for fault, is_there in found.items() if is_there), *got["unwritten_reads"]]


def judge(chosen: tuple[int, int]) -> tuple[str, list[str]]:
    """A row of the table, and what is wrong with that kernel."""
    arch, index = chosen
    case = cases(arch)[index]
    got = measure(case, arch)
    row = (
        f"| {case.name} | {arch} | {case.options['num_warps']} | {got['registers']} "
        f"| {got['shared']:.1f} | {got['columns']} | {got['programs']} |"
    )
    return row, [f"{case.name} sm_{arch}: {fault}" for fault in faults(case, arch, got)]


def run(chosen: Sequence[tuple[int, int]]) -> tuple[str, list[str]]:
    """The table of the kernels that are chosen, and what is wrong with them."""
    lines = [
        "Registers, shared memory and programs per SM of every shipped kernel and configuration.",
        f"Cross-compiled by Triton {triton.__version__} from code {source_hash()}; written by "
        "`python -m bench.compile_kernels`.",
        "",
        "| kernel | sm | warps | registers | shared KiB | tensor columns | programs/SM |",
        "|---|---|---|---|---|---|---|",
    ]
    wrong = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for row, found in pool.map(judge, chosen):
            print(row, flush=True)
            lines.append(row)
            wrong += found
    return "\n".join(lines) + "\n", wrong


def main() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: unset TRITON_INTERPRET: what is interpreted is not compiled")
    table, wrong = run(everything())
    if wrong:
        sys.exit("\n".join(wrong))
    TABLE.parent.mkdir(exist_ok=True)
    temporary = TABLE.with_suffix(".tmp")
    temporary.write_text(table)
    temporary.replace(TABLE)


if __name__ == "__main__":
    main()
