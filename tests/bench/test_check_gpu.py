"""`make check-gpu`: each step ends in a line, whatever it does, and results outlive a kill."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import forked
import pytest

from bench import check_gpu
from bench.check_gpu import STEPS, Step, check, main
from zeroi2v import doctor
from zeroi2v.probes import FRAMES

PASSES = "print('3 passed in 0.1s')"


def step(name: str, code: str, limit: float = 30, **more) -> Step:
    return Step(name, ("-c", code), limit, dry=True, **more)


def test_every_way_to_end_has_its_line_and_the_next_step_goes_on(tmp_path):
    steps = (
        step("passes", PASSES),
        step("fails", "print('test_x: 0.3 > 0.1'); print('1 failed, 2 passed in 0.1s'); exit(1)"),
        step("hangs", "import time; print('begun', flush=True); time.sleep(600)", limit=1),
        step("crashes", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        step("does nothing", "pass"),
        step("finds nothing", "print('no tests ran in 0.01s'); exit(5)"),
        step("skips", "print('SKIPPED [1] x.py:1: no such package'); print('1 skipped in 0.1s')"),
        step("lacks", PASSES, needs=("no_such_package", "no.such.part")),
        step("passes again", PASSES),
    )
    begun = time.monotonic()
    outcomes = {o.name: (o.status, o.said) for o in check(steps, tmp_path, 60)}
    assert time.monotonic() - begun < 30
    assert outcomes == {
        "passes": ("passed", "3 passed in 0.1s"),
        "fails": ("failed", "1 failed, 2 passed in 0.1s"),
        "hangs": ("failed", "took longer than its limit of 1 s"),
        "crashes": ("failed", "was killed by SIGSEGV"),
        "does nothing": ("failed", "ended with status 0 without a word"),
        "finds nothing": ("failed", "no tests ran in 0.01s"),
        "skips": ("skipped", "no such package"),
        "lacks": ("skipped", "not installed: no_such_package, no.such.part"),
        "passes again": ("passed", "3 passed in 0.1s"),
    }
    report = json.loads((tmp_path / "check_gpu.json").read_text())
    assert [s["name"] for s in report["steps"]] == [s.name for s in steps]
    assert report["commit"] and "0.3 > 0.1" in str(report["steps"][1]["lines"])
    assert "begun" in (tmp_path / "check_hangs.log").read_text()


def test_children_of_a_step_end_with_it(tmp_path):
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)"
    )
    (outcome,) = check((step("parent", code, limit=2),), tmp_path, 60)
    child = outcome.lines[0]
    for _ in range(100):
        with open(f"/proc/{child}/stat") if _alive(child) else open("/dev/null") as file:
            if file.read().split(") ")[-1][:1] in ("", "Z"):
                return
        time.sleep(0.05)
    raise AssertionError("its child lives on")


def test_checks_run_side_by_side_and_figures_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(check_gpu, "_CORES", 8)
    beside = "import time; from pathlib import Path; Path('{0}').touch()\n"
    beside += "while not Path('{1}').exists(): time.sleep(0.02)\n" + PASSES
    one, other, figures = (tmp_path / name for name in ("one", "other", "figures"))
    code = f"import pathlib; pathlib.Path({str(figures)!r}).touch(); time.sleep(1); " + PASSES
    steps = (
        step("times", "import time; " + code, figures=True),
        step("waits for the other", beside.format(one, other)),
        step("waits for the one", beside.format(other, one)),
    )
    outcomes = check(steps, tmp_path, 60)
    first = [next(outcomes), next(outcomes)]
    assert not figures.exists() and {o.status for o in first} == {"passed"}
    assert next(outcomes).name == "times"
    report = json.loads((tmp_path / "check_gpu.json").read_text())
    assert [s["name"] for s in report["steps"]] == [s.name for s in steps]


def test_whoever_stops_it_stops_all_that_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(check_gpu, "_CORES", 8)
    steps = (step("passes", PASSES), step("hangs", "import time; time.sleep(600)", limit=600))
    outcomes = check(steps, tmp_path, 60)
    assert next(outcomes).name == "passes"
    begun = time.monotonic()
    outcomes.close()
    assert not check_gpu._RUNNING or time.sleep(1) or not check_gpu._RUNNING
    assert time.monotonic() - begun < 20


def _alive(pid: str) -> bool:
    return subprocess.run(["kill", "-0", pid], capture_output=True).returncode == 0


def test_results_are_there_after_each_step_and_no_step_begins_too_late(tmp_path):
    steps = (step("first", "import time; time.sleep(1); " + PASSES), step("second", PASSES))
    outcomes = check(steps, tmp_path, 0.5)
    next(outcomes)
    report = json.loads((tmp_path / "check_gpu.json").read_text())
    assert [s["status"] for s in report["steps"]] == ["passed"]  # a kill here would lose nothing
    late = next(outcomes)
    assert (late.status, late.said) == ("skipped", "no time left of 0.00833333 minutes")


def test_steps_are_in_the_order_of_their_worth():
    names = [s.name for s in STEPS]
    assert names[:7] == [
        "doctor", "kernels", "model", "training block", "families", "data", "training",
    ]  # fmt: skip
    figures = [s.figures for s in STEPS]
    assert figures == sorted(figures) and sum(figures) == 6
    assert names[-6:] == [
        "latency", "zero cost L/14", "zero cost B/16", "training step", "attention", "decoding",
    ]  # fmt: skip


COLLECT = """
import json, sys, pytest
for name, words in json.loads(sys.argv[1]):
    status = pytest.main(["--collect-only", "-q", *words])
    print("STATUS", int(status), name)
"""


@pytest.mark.timeout(300)
def test_every_selection_of_tests_finds_some():
    """A word that no test has would make a step fail where the time is dear."""
    selections = [
        (chosen.name, [word for word in chosen.command[2:] if word not in ("-q", "-rA")])
        for chosen in (*STEPS, *check_gpu.SANITIZER[: len(check_gpu.SANITIZER) // 2])
        if chosen.command[1] == "pytest"
    ]  # the sanitizer's second tool runs the tests of the first
    command = [sys.executable, "-c", COLLECT, json.dumps(selections)]
    done = forked.run(command, cwd=check_gpu.ROOT)
    found = [line for line in done.stdout.splitlines() if line.startswith("STATUS")]
    assert found == [f"STATUS 0 {name}" for name, _ in selections], done.stdout + done.stderr


@pytest.fixture
def forked_steps(monkeypatch):
    """Its processes are forked, not started: they import nothing."""
    stand_in = SimpleNamespace(**vars(subprocess) | {"Popen": forked.Popen})
    monkeypatch.setattr(check_gpu, "subprocess", stand_in)


@pytest.mark.timeout(900)
@pytest.mark.usefixtures("forked_steps")
def test_dry_form_goes_through_all_steps(tmp_path, capsys, monkeypatch):
    status = main(["--dry", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "check_gpu.json").read_text())
    statuses = {s["name"]: s["status"] for s in report["steps"]}
    assert list(statuses) == [s.name for s in STEPS]
    ran = {name for name, state in statuses.items() if state == "passed"}
    assert status == 0 and ran == {"doctor", "model", "data"}, out
    assert {s["said"] for s in report["steps"] if s["status"] == "skipped"} == {"needs CUDA"}
    assert "left out, for they need CUDA: CUDA graph" in str(report)
    assert out.splitlines()[-1].startswith("3 passed, 0 failed, 14 skipped: ")

    found = json.loads((tmp_path / "check_doctor.log").read_text())["checks"]
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Check(**row) for row in found])
    doctor.main([])
    screen = capsys.readouterr().out
    assert all(codec in screen for codec in FRAMES)
    screen = screen.splitlines()
    assert len(screen) <= 45 and max(map(len, screen)) <= 80 and "broken" not in screen[-1]


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        main(["--only", "doctor"])
    assert error.value.code == 2 and "a CUDA device is needed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--dry", "--only", "nothing"])
    assert "--only must name steps: got nothing" in capsys.readouterr().err
