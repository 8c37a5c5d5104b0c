"""The doctor names what is broken and what is missing, and survives what it examines."""

import asyncio
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from zeroi2v import doctor, probes
from zeroi2v.doctor import PACKAGES, Check, is_installed, render, run_probe
from zeroi2v.probes import FRAMES, shared_memory

DEADLY = {
    "raises": ("raise RuntimeError('operator nms does not exist')", "operator nms does not exist"),
    "crashes": ("import ctypes; ctypes.string_at(0)", "died by signal 11"),
    "hangs": ("import time; time.sleep(99)", "did not end within 1 s"),
}


@pytest.mark.parametrize("kind", DEADLY)
def test_package_that_fails_to_import_is_broken(kind, tmp_path, monkeypatch):
    source, told = DEADLY[kind]
    (tmp_path / "jinja2.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    (check,) = asyncio.run(run_probe("import:jinja2", "packages", 1 if kind == "hangs" else 30))
    assert (check.name, check.status) == ("jinja2", "broken")
    assert told in check.detail
    assert "pip install --force-reinstall 'jinja2>=3'" in check.fix


def test_decoder_with_wrong_pixels_is_broken(monkeypatch):
    monkeypatch.setitem(FRAMES, "vp8", FRAMES["vp8"])
    (check,) = probes.probe_codec("vp8")
    assert check.status == "ok"
    import numpy as np

    honest = np.frombuffer
    monkeypatch.setattr(np, "frombuffer", lambda *args: 255 - honest(*args))
    (check,) = probes.probe_codec("vp8")
    assert check.status == "broken" and "wrong pixels" in check.detail


def test_missing_package_is_told_with_the_line_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert not is_installed("onnx")
    optional, needed = doctor._not_installed("onnx"), doctor._not_installed("torch")
    assert optional[2:] == ("missing", "only for export to ONNX", "pip install 'onnx>=1.18'")
    assert needed[2:] == ("broken", "not installed, and everything needs it", PIP_TORCH)


PIP_TORCH = "pip install 'torch>=2.11'"


def test_packages_are_those_of_the_installation():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    asked = set(project["dependencies"])
    assert asked == {name for name, needed_for in PACKAGES.values() if not needed_for}
    groups = project["optional-dependencies"].values()
    extras = {requirement.split(";")[0] for group in groups for requirement in group}
    assert {name for name, needed_for in PACKAGES.values() if needed_for} <= extras


def test_small_shared_memory_is_told_with_its_remedy(monkeypatch):
    docker = SimpleNamespace(f_bavail=64, f_blocks=64, f_frsize=2**20)
    monkeypatch.setattr(os, "statvfs", lambda path: docker)
    check = list(shared_memory())[1]
    assert check.status == "missing" and "64 MiB" in check.detail and "--shm-size" in check.fix


def test_failing_proof_of_a_kernel_is_broken(monkeypatch):
    import torch

    verdicts = [
        SimpleNamespace(name="stdha", passed=False, message="dq is wrong"),
        SimpleNamespace(name="norm", passed=True, message=""),
    ]
    proof = SimpleNamespace(prove_shipped=lambda device, processes: iter(verdicts))
    monkeypatch.setitem(sys.modules, "zeroi2v_kernels.shipped", proof)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    bad, good = probes.probe_kernels()
    assert (bad.status, bad.detail) == ("broken", "stdha: dq is wrong")
    assert (good.status, good.detail) == ("ok", "1 proofs passed")


@pytest.mark.parametrize("status, code", [("ok", 0), ("missing", 0), ("absent", 0), ("broken", 1)])
def test_only_what_is_broken_fails(status, code, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "examine", lambda: [Check("GPU", "CUDA", status, "as it is")])
    try:
        doctor.main(["--json"])
        ended = 0
    except SystemExit as end:
        ended = end.code
    report = json.loads(capsys.readouterr().out)
    assert ended == code and report["works"] == (code == 0)
    keys = {"group", "name", "status", "detail", "fix"}
    assert [set(check) for check in report["checks"]] == [keys]


def test_report_without_any_package_is_one_screen():
    report = render([doctor._not_installed(module) for module in PACKAGES])
    assert len(report.splitlines()) <= 45
