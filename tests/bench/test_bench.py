"""The bench harness: what is wrong is never timed, and what is timed says how and where."""

import json
import os
import re
import sys
from itertools import count
from pathlib import Path

import forked
import pytest
import torch

from bench import compare_commits, machine, measure, report, tables

ROOT = Path(__file__).parents[2]

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
        goals={"ours / plain": 9, "theirs / plain": 1, "peak of ours / plain": 2},
    )

def bench_facts(store):
    store({"a case": {"flops": 3}}, frames=8)
"""


def run_bench(folder: Path, error: int, *options: str) -> tuple[str, dict | None]:
    """Runs `BENCH` with `error` added to our result; returns the output and the stored figures."""
    (folder / "bench_toy.py").write_text(BENCH.replace("ERROR", str(error)))
    fixed = ["-p", "bench.conftest", "-c", "pyproject.toml", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *fixed, "--results", str(folder), str(folder)]
    # pytest-benchmark times nothing where tests share the machine, which this run does not know of.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = forked.run([*command, *options], cwd=ROOT, env=env)
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
    peak = ours["peak_bytes"] / plain["peak_bytes"]
    assert bench["goals"] == {
        "ours / plain": {"goal": 9, "ratio": ours["ratio"], "ratio_quartiles": [low, high]},
        "theirs / plain": {"goal": 1},
        "peak of ours / plain": {"goal": 2, "ratio": peak, "ratio_quartiles": [peak, peak]},
    }
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


def test_benches_run_without_optional_packages_and_skip_what_needs_them(tmp_path):
    options = ["-p", "no:benchmark", "-p", "no:timeout", "--benchmark", "--seconds", "0.1"]
    earlier = {"machine": {}, "benches": {"bench_earlier": {"rows": {}}}}
    (tmp_path / f"{machine.machine_card()['slug']}.json").write_text(json.dumps(earlier))
    for name, place in (("file", ""), ("bench", "def bench_missing():\n    ")):
        lack = f"{place}raise ModuleNotFoundError('no av', name='av.video')\n"
        (tmp_path / f"bench_lacking_{name}.py").write_text(lack)
    output, figures = run_bench(tmp_path, 0, *options, "-rs")
    for what in ("bench_lacking_file.py", "bench_missing"):
        assert f"{what}: av.video is not installed" in output
    assert "seconds" in figures["benches"]["bench_product"]["rows"]["ours"]
    assert "bench_earlier" in figures["benches"]  # what other runs measured stays


BROKEN = """
from importlib import import_module

op = import_module("zeroi2v_kernels.stdha")
right = op._move_heads_
op._move_heads_ = lambda out, x, offsets: right(out, x, tuple(-offset for offset in offsets))
"""


def test_attention_that_looks_the_wrong_way_fails_the_bench(tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    command = "-m pytest bench/bench_zero_cost.py::bench_zero_cost[B/16-8-float32] -q"
    env = os.environ | {"PYTHONPATH": path}
    done = forked.run([sys.executable, *command.split(), "-p", "broken"], cwd=ROOT, env=env)
    assert "1 failed" in done.stdout and "has a relative error of" in done.stdout, done.stdout


def test_contestants_take_turns_and_a_ratio_is_of_one_round():
    order, clock = [], count()
    contestants = {name: lambda name=name: order.append(name) for name in "abc"}
    turns = dict(rounds=3, exact=True, timer=lambda: next(clock))
    seconds = measure.interleave(contestants, "cpu", **turns)
    assert "".join(order) == "abcbcacab"
    assert seconds == {name: [1, 1, 1] for name in "abc"}
    row = measure.summary([2.0, 20.0, 3.0], [1.0, 10.0, 1.0])  # the second round was disturbed
    assert row["ratio"] == 2 and row["ratio_quartiles"] == [2, 3] and row["seconds"] == 3
    assert measure.summary([2.0, 4.0], [1.0, 1.0])["ratio_quartiles"] == [2, 4]


def test_rounds_fill_the_budget_within_bounds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def rounds(seconds: float, budget: float, **wanted) -> int:
        def run():
            now[0] += seconds

        return len(measure.interleave({"a": run}, "cpu", budget=budget, **wanted)["a"])

    assert rounds(1, budget=8) == 8
    assert rounds(100, budget=8) == 3
    assert rounds(0.125, budget=8) == 15
    assert rounds(0.0078125, budget=8) == 128  # one second of short runs
    assert rounds(2, budget=8, rounds=5) == 5
    assert rounds(0.0078125, budget=8, rounds=5) == 128
    assert rounds(0.0078125, budget=8, rounds=5, exact=True) == 5


def test_a_gpu_does_not_wait_for_long_rounds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def rounds(seconds: float, **wanted) -> int:
        monkeypatch.setattr(measure, "seconds_of", lambda *_: now.__setitem__(0, now[0] + seconds))
        return len(measure.interleave({"a": None}, "cuda", budget=4, **wanted)["a"])

    assert rounds(2) == 5  # the fewest, though they take more than the budget
    assert rounds(10) == 2 and rounds(1000) == 1
    assert rounds(10, rounds=5, exact=True) == 5


def test_cases_that_tell_little_new_are_run_only_on_request(tmp_path):
    (tmp_path / "bench_rest.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('case', ['told', pytest.param('more', marks=pytest.mark.rest)])\n"
        "def bench_one(case):\n    pass\n"
    )
    for options, expected in (((), ["told"]), (("--all",), ["told", "more"])):
        output, _ = run_bench(tmp_path, 0, *options, "-k", "bench_one", "-v")
        assert re.findall(r"bench_one\[(\w+)\]", output) == expected


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


def made_up(seconds: float = 2.0) -> dict:
    """Results of a CPU that measured one case of zero cost."""
    rows = {
        name: dict(
            seconds=seconds * factor, ratio=factor, ratio_quartiles=[factor, factor], error=2e-7,
            parameters=86e6, flops=2.8e11, clips_per_s=1 / factor / seconds,
        )
        for name, factor in {
            "transformers CLIP": 1.0, "plain image ViT": 0.9, "adapted": 1.2, "merged": 0.925,
            "authors' way": 1.1,
        }.items()
    }  # fmt: skip
    rows["merged"]["against"] = dict(name="authors' way", ratio=0.84, ratio_quartiles=[0.8, 0.9])
    bench = dict(
        bench="zero_cost", commit="0123456789ab", command="pytest bench --benchmark", rows=rows,
        date="2026-01-01", model="B/16", frames=8, batch=1, dtype="float32", rounds=7, threads=2,
        took=60, baseline="transformers CLIP",
        goals={
            "merged / transformers CLIP": {"goal": 0.94, **rows["merged"]},
            "merged / authors' way": {"goal": 0.8, **rows["merged"]["against"]},
            "merged / a model that is not here": {"goal": 0.5},
        },
    )  # fmt: skip
    card = dict(kind="CPU", name="Some CPU", slug="some-cpu", cores=2, threads=2, isa="AVX2")
    card |= dict(packages={"torch": "9.9"}, ceilings={"float32": 2e11, "copy": 5e10})
    return {"machine": card, "benches": {"bench_zero_cost[B/16-8-float32]": bench}}


def test_summary_shows_machine_commit_and_command_and_has_no_empty_row():
    part = tables.summary([made_up()], set(), "benchmarks")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines()]
    assert "Measured by run 1: commit 0123456789ab, `pytest bench --benchmark`." in part
    measured = "1,850.0|0.93 [0.93, 0.93]|0.84 [0.80, 0.90]|1.30|2.0e-07".split("|")
    assert ["Some CPU, 2 cores, AVX2", "B/16, 8", "float32", *measured, "1"] in rows
    assert "Not measured: B/16, 8 bfloat16 on Some CPU, 2 cores, AVX2; L/14, 8 float32 on" in part
    assert "Not measured on Some CPU, 2 cores, AVX2." in part
    assert not [row for row in rows if row[:1] == ["Some CPU, 2 cores, AVX2"] and not any(row[3:])]
    assert ["B/16, 8", "86.0 M, 86.0 M", "422", "420", "420", "1"] in rows
    page = tables.page(made_up())
    for told in ("Some CPU", "9.9", "0.20 TFLOP/s", "50.0 GB/s", "0123456789ab", "took 60 s"):
        assert told in page
    for pair, told in {
        "transformers CLIP": "at most 0.94; it is 0.93 [0.93, 0.93]: met.",
        "authors' way": "at most 0.8; it is 0.84 [0.80, 0.90]: missed.",
    }.items():
        assert f"Goal: merged / {pair} {told}" in page
    assert "not here" not in page


def test_report_is_stale_once_a_figure_changes(tmp_path):
    target, path = tmp_path / "summary.md", tmp_path / "some-cpu.json"
    pages = tmp_path / "summary"
    pages.mkdir()
    target.write_text(f"Before.\n{report.BEGIN}\n{report.END}\nAfter.\n")

    def write(results: dict) -> None:
        path.write_text(json.dumps(results))
        assert report.draw(results, pages) == ["some-cpu-latency.png", "some-cpu-scaling.png"]
        for file, text in report.render(target, tmp_path).items():
            file.write_text(text, encoding="utf-8")

    def at_two_sizes(*args: float) -> dict:
        results = made_up(*args)
        (bench,) = results["benches"].values()
        results["benches"]["bench_zero_cost_throughput[B/16-8-2-float32]"] = bench | {"batch": 2}
        return results

    assert report.draw(made_up(), pages) == ["some-cpu-latency.png"]  # one size makes no line
    write(at_two_sizes())
    assert report.stale(target, tmp_path) == []
    text = target.read_text(encoding="utf-8")
    assert text.startswith("Before.\n") and text.endswith("After.\n")
    assert "(summary/some-cpu-latency.png)" in text
    for name in ("latency", "scaling"):
        assert (pages / f"some-cpu-{name}.png").read_bytes().startswith(b"\x89PNG")
    path.write_text(json.dumps(at_two_sizes(3.0)))
    stale = {"summary.md", "some-cpu.md", "some-cpu-latency.png", "some-cpu-scaling.png"}
    assert set(report.stale(target, tmp_path)) == stale
    write(at_two_sizes(3.0))
    assert report.stale(target, tmp_path) == []


def test_report_refuses_a_page_without_its_markers(tmp_path):
    (tmp_path / "summary.md").write_text("nothing")
    with pytest.raises(ValueError, match="summary.md must hold the lines"):
        report.render(tmp_path / "summary.md", tmp_path)


def test_docs_hold_what_the_results_say():
    assert report.stale() == [], "run `python -m bench.report`"
