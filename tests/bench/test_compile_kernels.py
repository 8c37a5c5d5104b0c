"""Shipped Triton kernels compile well for each architecture, though no GPU is here.

In a process of its own, as this one interprets kernels. The stored table was written by this Triton
from this code, so one case of every kernel is compiled anew, for the architectures in turns; under
another Triton every case for one of the architectures, in turns; with ZEROI2V_COMPILE_ALL=1 for all
of them, which takes some minutes.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs triton")
compile_kernels = pytest.importorskip("bench.compile_kernels")
machine_code = pytest.importorskip("bench.machine_code")

ROOT = Path(__file__).parents[2]
RUN = """
import json, sys
from bench import compile_kernels
table, wrong = compile_kernels.run(json.loads(sys.argv[2]))
open(sys.argv[1], "w").write(table)
sys.exit("\\n".join(wrong) or None)
"""


def one_of_each_kernel() -> list[tuple[int, int]]:
    """Every kernel once, each for the architecture after that of the one before."""
    having: dict[int, list[int]] = {}
    for arch, index in compile_kernels.one_of_each():
        having.setdefault(index, []).append(arch)
    return [(archs[i % len(archs)], index) for i, (index, archs) in enumerate(having.items())]


@pytest.mark.timeout(900)
def test_kernels_compile_without_spills_within_memory_for_tensor_cores(tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    table = tmp_path / "kernels.md"
    stored = compile_kernels.TABLE.read_text().splitlines()
    same_triton = f"by Triton {triton.__version__} " in stored[1]
    chosen = one_of_each_kernel() if same_triton else compile_kernels.sample()
    if os.environ.get("ZEROI2V_COMPILE_ALL"):
        chosen = compile_kernels.everything()
    command = [sys.executable, "-c", RUN, str(table), json.dumps(chosen)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    if same_triton:
        fresh = table.read_text().splitlines()
        assert len(fresh) > 15 and set(fresh) <= set(stored), "run python -m bench.compile_kernels"


def test_the_table_holds_every_kernel_and_configuration_for_every_architecture():
    rows = [row.split(" | ")[:2] for row in compile_kernels.TABLE.read_text().splitlines()]
    stored = [
        (name.removeprefix("| "), arch) for name, arch, *_ in (r for r in rows if len(r) == 2)
    ]
    shipped = [
        (case.name, str(arch))
        for arch in compile_kernels.ARCHITECTURES
        for case in compile_kernels.cases(arch)
    ]
    assert stored[1:] == shipped and len(set(shipped)) == len(shipped)
    assert f"from code {compile_kernels.source_hash()};" in compile_kernels.TABLE.read_text()
    chosen = compile_kernels.sample()
    assert {index for _, index in chosen} == {index for _, index in compile_kernels.everything()}


def test_the_hash_follows_the_code_of_kernels_and_their_cases_alone(tmp_path, monkeypatch):
    folder = Path(compile_kernels.zeroi2v_kernels.__file__).parent
    for path in folder.glob("*.py"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(compile_kernels.zeroi2v_kernels, "__file__", str(tmp_path / "__init__.py"))
    before = compile_kernels.source_hash()
    text = (folder / "norm.py").read_text()
    for old, new, changes in (
        ("    columns = tl.arange", "    # A comment.\n    columns = tl.arange", False),
        ("WARPS = 4", "WARPS = 4\nUNUSED = 1", False),
        ("mean = tl.sum(total, 1) / C", "mean = tl.sum(total, 1) / (C + 1)", True),
    ):
        assert old in text
        (tmp_path / "norm.py").write_text(text.replace(old, new))
        assert (compile_kernels.source_hash() != before) == changes
    (tmp_path / "norm.py").write_text(text)
    cases = compile_kernels.cases
    monkeypatch.setattr(compile_kernels, "cases", lambda arch: cases(arch)[1:])
    assert compile_kernels.source_hash() != before


def test_cases_cover_every_launch_table_head_width_and_dtype():
    from zeroi2v_kernels import stdha_launch
    from zeroi2v_kernels.device import TRITON_DTYPES, TRITON_WIDTHS

    for arch in compile_kernels.ARCHITECTURES:
        names = {case.name for case in compile_kernels.cases(arch)}
        for width in TRITON_WIDTHS:
            for dtype in TRITON_DTYPES:
                tail = f"D={width} {stdha_launch.ELEMENTS[dtype]}"
                for kernel in ("forward_streamed", "backward_query", "backward_key_value"):
                    assert f"stdha {kernel} M=577 N=577 {tail}" in names
        launches = {case.options["num_warps"] for case in compile_kernels.cases(arch)}
        assert launches == {4, 8, 16}


def test_every_fault_is_named():
    case = compile_kernels.Case("a", None, {}, {}, {}, tensor_cores=True)
    good = dict(
        registers=128,
        spills=0,
        shared=60.0,
        columns=0,
        programs=3,
        tensor_core={80: 0, 90: 9, 100: 0},
        wide_loads=4,
        unwritten_reads=[],
    )
    assert compile_kernels.faults(case, 90, good) == []
    for change, fault in (
        (dict(spills=2), "2 spills"),
        (dict(registers=4), "4 registers: a stub, it did not fit"),
        (dict(shared=228.0), "228 KiB shared"),
        (dict(columns=640), "640 tensor memory columns"),
        (dict(wide_loads=0), "no 16-byte loads"),
        (dict(unwritten_reads=["26f0 UIADD3 reads UR38"]), "26f0 UIADD3 reads UR38"),
        (dict(tensor_core={80: 1, 90: 9, 100: 0}), "tensor cores of [80, 90]"),
        (dict(tensor_core={80: 0, 90: 0, 100: 0}), "tensor cores of []"),
    ):
        assert compile_kernels.faults(case, 90, good | change) == [fault]


LOOP = """
.text._kernel:
        /*0000*/                   ULDC.64 UR4, c[0x0][0x210] ;
        /*0010*/                   UMOV UR8, URZ ;
        /*0020*/               @P1 BRA `(.L_x_1) ;
{before}
.L_x_0:
        /*0040*/                   UIADD3 UR18, UP1, UR38, 0x40, URZ ;
        /*0050*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0060*/                   UMOV UR38, UR8 ;
        /*0070*/               @P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0080*/                   EXIT ;
        /*0090*/                   UMOV UR9, UR77 ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
"""


def test_a_register_whose_only_write_is_at_the_end_of_the_loop_is_named():
    faulty = LOOP.format(before="        /*0030*/                   NOP ;")
    assert machine_code.unwritten_reads(faulty) == ["0040 UIADD3 reads UR38"]
    written = LOOP.format(before="        /*0030*/                   UMOV UR38, 0x1 ;")
    assert machine_code.unwritten_reads(written) == []


@pytest.mark.parametrize(
    "instruction, named",
    [
        ("HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24", "UR9, UR10, UR11"),
        ("HGMMA.64x64x16.F32.BF16 R24, R4, gdesc[UR8].tnspB, R24", "UR10, UR11"),
        ("UTCHMMA gdesc[UR8], gdesc[UR4], tmem[UR4], tmem[UR8], idesc[UR5], UPT", "UR9"),
        ("STG.E.128 desc[UR8][R2.64], R8", "UR9"),
        ("UISETP.NE.AND UP0, UPT, UR20, URZ, UPT", "UR20"),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR20+0x10], R3", "UR20"),
        ("UIMAD.WIDE.U32 UR20, UR4, 0x3, URZ", ""),
    ],
)
def test_operands_are_read_in_their_full_width(instruction, named):
    text = LOOP.format(before=f"        /*0030*/                   {instruction} ;\n        "
                       "/*0038*/                   UMOV UR38, UR8 ;")  # fmt: skip
    opcode = instruction.split()[0]
    expected = [f"0030 {opcode} reads {named}"] if named else []
    assert machine_code.unwritten_reads(text) == expected
