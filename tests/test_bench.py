"""The bench harness: what is wrong is never timed, and what is timed says how and where."""

import json
import re
import subprocess
import sys
from itertools import count
from pathlib import Path

import pytest
import torch

from bench import compare_commits, machine, measure

ROOT = Path(__file__).parents[1]

BENCH = """
import torch

def bench_product(compare, store):
    a = torch.ones(64, 64)
    def check(name, output):
        assert (output == 64).all(), f"{name} is wrong"
    compare(
        {"plain": lambda: a @ a, "ours": lambda: a @ a + ERROR}, "plain", check=check, memory=True,
        absent={"theirs": "theirs is not installed"},
        clips=2, dtype=torch.float32, flops=2 * 64**3, parameters={"plain": 1, "ours": 2},
    )

def bench_facts(store):
    store({"a case": {"flops": 3}}, frames=8)
"""


def run_bench(folder: Path, error: int, *options: str) -> tuple[str, dict | None]:
    """Runs `BENCH` with `error` added to our result; returns the output and the stored figures."""
    (folder / "bench_toy.py").write_text(BENCH.replace("ERROR", str(error)))
    fixed = ["-p", "bench.conftest", "-c", "pyproject.toml", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *fixed, "--results", str(folder), str(folder)]
    done = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    paths = list(folder.glob("*-*.json"))
    assert done.returncode == (1 if error else 0), done.stdout + done.stderr
    return done.stdout, json.loads(paths[0].read_text()) if paths else None


@pytest.fixture(scope="module")
def timed_run(tmp_path_factory):
    """Output, figures and pytest-benchmark's own file of one timed run."""
    folder = tmp_path_factory.mktemp("timed")
    options = ["--benchmark", "--rounds", "4", "--seconds", "0.1"]
    options += ["--benchmark-columns=median,rounds", "--benchmark-json", str(folder / "theirs")]
    output, figures = run_bench(folder, 0, *options)
    return output, figures, json.loads((folder / "theirs").read_text())


def test_timed_rows_hold_ratios_rates_and_memory_with_machine_commit_and_command(timed_run):
    _, figures, _ = timed_run
    bench, card = figures["benches"]["bench_product"], figures["machine"]
    assert bench["baseline"] == "plain" and bench["rounds"] == 4 and bench["bench"] == "toy"
    assert bench["threads"] == card["threads"] and bench["device"] == machine.device()
    assert bench["commit"].startswith(machine.commit().strip("+"))
    assert bench["command"].startswith("pytest ")
    plain, ours = bench["rows"]["plain"], bench["rows"]["ours"]
    assert plain["ratio"] == 1 and plain["ratio_quartiles"] == [1, 1]
    size = 64 * 64 * 4
    assert plain["peak_bytes"] == size and 2 * size <= ours["peak_bytes"] < 2 * size + 64
    low, high = ours["ratio_quartiles"]
    assert 0 < low <= ours["ratio"] <= high
    assert ours["parameters"] == 2 and "parameters" not in bench
    assert ours["clips_per_s"] == pytest.approx(2 / ours["seconds"])
    rate = 2 * 64**3 / ours["seconds"]
    assert ours["flops_of_ceiling"] == pytest.approx(rate / card["ceilings"]["float32"])
    assert bench["rows"]["theirs"] == {"absent": "theirs is not installed"}
    assert figures["benches"]["bench_facts"]["rows"] == {"a case": {"flops": 3}}
    assert card["packages"]["torch"] == torch.__version__ and card["name"]


def test_options_of_pytest_benchmark_work(timed_run):
    output, _, theirs = timed_run
    assert "benchmark 'bench_product': 2 tests" in output
    assert re.search(r"Name .*Median +Rounds", output)
    assert [row["name"] for row in theirs["benchmarks"]] == ["plain", "ours"]
    for row in theirs["benchmarks"]:
        assert row["stats"]["rounds"] == 4 and row["group"] == "bench_product"
        assert row["extra_info"]["seconds"] == pytest.approx(row["stats"]["median"])
        assert {"flops", "peak_bytes", "commit", "machine", "threads"} <= set(row["extra_info"])


def test_wrong_contestant_fails_the_bench_and_leaves_no_figures(tmp_path):
    for options in ([], ["--benchmark", "--seconds", "0.1"]):
        output, figures = run_bench(tmp_path, 1, "-k", "product", *options)
        assert "ours is wrong" in output and "1 failed" in output
        assert figures is None


def test_benches_are_timed_where_pytest_benchmark_is_not_installed(tmp_path):
    options = ["-p", "no:benchmark", "-p", "no:timeout", "--benchmark", "--seconds", "0.1"]
    earlier = {"machine": {}, "benches": {"bench_earlier": {"rows": {}}}}
    (tmp_path / f"{machine.machine_card()['slug']}.json").write_text(json.dumps(earlier))
    _, figures = run_bench(tmp_path, 0, *options)
    assert "seconds" in figures["benches"]["bench_product"]["rows"]["ours"]
    assert "bench_earlier" in figures["benches"]  # what other runs measured stays


def test_contestants_take_turns_and_a_ratio_is_of_one_round():
    order, clock = [], count()
    contestants = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = measure.interleave(contestants, "cpu", rounds=3, timer=lambda: next(clock))
    assert "".join(order) == "abcbcacab"
    assert seconds == {name: [1, 1, 1] for name in "abc"}
    row = measure.summary([2.0, 20.0, 3.0], [1.0, 10.0, 1.0])  # the second round was disturbed
    assert row["ratio"] == 2 and row["ratio_quartiles"] == [2, 3] and row["seconds"] == 3


def test_rounds_fill_the_budget_within_bounds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def rounds(seconds: float, budget: float) -> int:
        def run():
            now[0] += seconds

        return len(measure.interleave({"a": run}, "cpu", budget=budget)["a"])

    assert rounds(1, budget=8) == 8
    assert rounds(100, budget=8) == 3
    assert rounds(0.001, budget=8) == 15


def test_peak_memory_counts_what_is_held_at_once():
    def run():
        a = torch.ones(1000)
        b = a + 1
        del a
        return b + torch.ones(500).sum()

    _, peak = measure.run_counting_memory(run, "cpu")
    assert 8000 <= peak <= 8000 + 1024


def test_ceilings_of_this_machine_are_measured(monkeypatch):
    monkeypatch.setattr(machine, "MATRIX", {"cpu": 256, "cuda": 1024})
    monkeypatch.setattr(machine, "COPY_BYTES", 2**24)
    found = machine.ceilings(0.05)
    assert set(found) == {*machine.DTYPES[machine.device()], "copy"}
    assert all(1e8 < value < 1e17 for value in found.values())


def test_comparison_shows_the_ratio_of_each_pair_of_runs():
    key, new = ("bench_a", "ours"), ("bench_b", "new")
    lines = compare_commits.table([{key: 1.0}, {key: 4.0}], [{key: 2.0, new: 1.0}, {key: 2.0}])
    assert lines[1].split() == "bench_a, ours 2500.00 2000.00 1.250 [0.500, 2.000]".split()
    assert "only in now" in lines[2]


def test_comparison_names_a_commit_that_does_not_exist(capsys):
    assert compare_commits.main(["no-such-commit"]) == 2
    assert "BASE must name a commit: got 'no-such-commit'" in capsys.readouterr().err


def test_comparison_runs_the_library_of_the_commit_and_removes_its_worktree():
    if not machine.commit():
        pytest.skip("no Git checkout")
    with compare_commits.worktree("HEAD") as root:
        compare_commits.check_import(root)
        assert (root / "bench" / "conftest.py").is_file()
        (root / "zeroi2v").rename(root / "moved")
        with pytest.raises(ValueError, match="must be imported from"):
            compare_commits.check_import(root)
    assert not root.exists() and str(root) not in compare_commits._git("worktree", "list").stdout
