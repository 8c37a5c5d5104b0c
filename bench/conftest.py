"""How benches run: `pytest bench` checks each once, `pytest bench --benchmark` also times it.

Only cases that add something are run, the others too with `--all`. A bench checks its contestants
before it times them, in rounds in which all take turns. Figures go to
`bench/results/<machine>.json`, and to pytest-benchmark if that is installed.
"""

from __future__ import annotations

import gc
import json
import os
import shlex
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from interpreter import make_quick

from bench import machine, measure
from bench.contest import hand_over, interleave, rates, ratio_of, reached, show, warm_up

if not torch.cuda.is_available():  # kernels run in Triton's interpreter; it reads this at import
    os.environ.setdefault("TRITON_INTERPRET", "1")
    make_quick()

SECONDS = {"cpu": 60.0, "cuda": 4.0}
TIMEOUT = {"cpu": 3600, "cuda": 180}
"""Of a bench, in seconds; `bench_training_block.py` on a CPU has more."""
RESULTS = Path(__file__).with_name("results")
TAKEN = {"bench", "commit", "command", "date", "took", "rows"}
"""Names of what is stored with every bench."""
OPTIONAL = (
    "av deepspeed nvidia transformers timm open_clip torchvision torchcodec decord flash_attn "
    "onnx onnxscript onnxruntime matplotlib tensorboard"
).split()
"""Modules without which a bench is skipped."""


def pytest_addoption(parser):
    group = parser.getgroup("zeroi2v benches")
    group.addoption("--benchmark", action="store_true", help="time the benches, not only check")
    group.addoption("--all", action="store_true", help="run also the cases that tell little new")
    group.addoption("--rounds", type=int, help="timed rounds of each bench; default: what fits")
    group.addoption(
        "--seconds",
        type=float,
        default=SECONDS[machine.device()],
        help="time to fill with rounds; default: 60, on a GPU 4",
    )
    group.addoption("--results", type=Path, default=RESULTS, help="folder of the figures")


def pytest_collection_modifyitems(config, items):
    """Leaves out what tells little new, and puts data last: DALI's threads would end a capture."""
    items.sort(key=lambda item: item.path.name == "bench_data.py")
    if not config.getoption("--all"):
        rest = [item for item in items if item.get_closest_marker("rest")]
        items[:] = [item for item in items if item not in rest]
        config.hook.pytest_deselected(items=rest)
    if config.getoption("--benchmark") and config.pluginmanager.hasplugin("timeout"):
        for item in items:
            item.add_marker(pytest.mark.timeout(TIMEOUT[machine.device()]))


@pytest.fixture(autouse=True)
def freed():
    """Gives back a GPU's memory, graphs' too, before the next bench asks for it."""
    yield
    if machine.device() == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def skipping(what: str):
    """Turns a missing optional module into a skip of `what` that names it."""
    try:
        yield
    except (ModuleNotFoundError, pytest.Module.CollectError) as error:
        missing = error if isinstance(error, ModuleNotFoundError) else error.__cause__
        name = getattr(missing, "name", None) or ""
        if name.split(".")[0] in OPTIONAL:
            pytest.skip(f"{what}: {name} is not installed", allow_module_level=True)
        raise


class BenchModule(pytest.Module):
    """A file of benches, skipped as a whole if it imports an optional module that is not there."""

    def collect(self):
        with skipping(self.path.name):
            return list(super().collect())


def pytest_pycollect_makemodule(module_path, parent):
    return BenchModule.from_parent(parent, path=module_path)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item):
    with skipping(item.name):
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    with skipping(item.name):
        return (yield)


if "pytest_benchmark.plugin" not in sys.modules:

    @pytest.fixture
    def benchmark():
        """In place of pytest-benchmark's, which is not there."""


@pytest.fixture(scope="session")
def timed(request) -> bool:
    """Whether benches are timed; if not, small shapes are enough to check them."""
    return request.config.getoption("--benchmark")


@pytest.fixture(scope="session")
def device() -> str:
    """Where benches run: `cuda` if there is a GPU, else `cpu`."""
    return machine.device()


@pytest.fixture(scope="session")
def case(request, timed, device):
    """The models of the shape that `bench.cases.shapes` asks for; the last one's are freed."""
    from bench.cases import build

    return build(*request.param, timed, device)


@pytest.fixture(scope="session")
def setting(request) -> dict:
    """Machine card with ceilings, commit and command: measured before anything else is timed."""
    ceilings = machine.ceilings(min(2.0, request.config.getoption("--seconds") / 10))
    card = machine.machine_card() | {"ceilings": ceilings}
    command = "pytest " + shlex.join(sys.argv[1:])
    return dict(machine=card, commit=machine.commit(), command=command)


@pytest.fixture
def store(request, timed):
    """A function `store(rows=None, **facts)` that keeps figures of a bench under its name.

    `rows` maps names (of models, cases) to figures. Nothing is kept without `--benchmark`.
    """
    start = time.perf_counter()

    def keep(rows: dict[str, dict] | None = None, **facts) -> None:
        if not timed:
            return
        setting = request.getfixturevalue("setting")
        folder = request.config.getoption("--results")
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{setting['machine']['slug']}.json"
        results = json.loads(path.read_text()) if path.exists() else {"benches": {}}
        results["machine"] = setting["machine"]
        results["benches"][request.node.name] = dict(
            bench=request.path.stem.removeprefix("bench_"),
            commit=setting["commit"],
            command=setting["command"],
            date=datetime.now(timezone.utc).date().isoformat(),
            took=round(time.perf_counter() - start, 1),
            **dict(threads=torch.get_num_threads()) | facts,
            rows=rows or {},
        )
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(results, indent=1, default=str) + "\n")
        temporary.replace(path)

    return keep


@pytest.fixture
def compare(request, benchmark, store, timed):
    """A function that checks contestants and times them in interleaved rounds.

    compare(contestants, baseline, check=None, absent=None, device=None, graph=False, memory=False,
            energy=False, rounds=None, against=None, goals=None, **facts) -> rows by name, or None
            without `--benchmark`

    contestants: functions without arguments, by name; `baseline` is one of the names.
    check: called with name and output of each before any is timed; raises if it is wrong.
    absent: reasons, by name, why a contestant is not here: kept as empty rows.
    device: `cpu` for what uses no GPU though there is one.
    graph: on a GPU, replay each as a CUDA graph; what can't be captured runs as it is, with a note.
    memory, energy: measure peak bytes above what is held before; joules, where a GPU counts them.
    rounds: how many, more if they are short; by default as many as fit.
    against: of contestants, by name, another that they are compared with beside the baseline.
    goals: of pairs of contestants, "this / that", the most that the ratio of their times should be;
        of "peak of this / that", of their peak bytes.
    facts: kept with the figures. A dict by contestants' names makes a column, the rest describe the
        bench. Of `flops`, `bytes` (moved) and `clips` in one run, rates follow; with `dtype` as in
        "bfloat16" also shares of the machine's ceilings.

    Facts that the report knows: `model` ("B/16"), `frames`, `batch`, `dtype`; of each contestant
    `parameters`, `flops` (counted), `flops_by_formula`, `error` (relative, to float64), `agreement`
    (of top-1), published `top1` (%) and `gmacs` (all views) with their `source`.

    A row has `seconds`, `ratio` to the baseline within a round, the quartiles of both, and those.
    """

    def run(
        contestants: dict[str, Callable],
        baseline: str,
        check: Callable[[str, Any], None] | None = None,
        absent: dict[str, str] | None = None,
        device: str | None = None,
        graph: bool = False,
        memory: bool = False,
        energy: bool = False,
        rounds: int | None = None,
        against: dict[str, str] | None = None,
        goals: dict[str, float] | None = None,
        **facts,
    ) -> dict | None:
        if baseline not in contestants:
            raise ValueError(f"baseline must be one of {list(contestants)}: got {baseline!r}")
        if taken := facts.keys() & TAKEN:
            raise ValueError(f"facts must not be called {sorted(TAKEN)}: got {sorted(taken)}")
        device = device or machine.device()
        timing = timed
        if benchmark is not None:
            benchmark._mode = "compare(...)"  # else it warns that nothing used it
            timing = timed and benchmark.enabled
        rows: dict[str, dict] = {name: {} for name in contestants}
        graph = graph and device == "cuda"
        contestants = warm_up(contestants, rows, check, device, graph, memory and timing)
        if not timing:
            return None
        setting = request.getfixturevalue("setting")
        seconds = interleave(request.config, benchmark, contestants, device, rounds)
        for key in [k for k, v in facts.items() if isinstance(v, dict) and set(v) <= set(rows)]:
            for name, value in facts.pop(key).items():
                rows[name][key] = value
        for name, row in rows.items():
            row |= measure.summary(seconds[name], seconds[baseline])
            row |= rates({**facts, **row}, setting["machine"]["ceilings"])
            if energy and device == "cuda" and (joules := measure.joules(contestants[name])):
                row["joules"] = joules
        for name, other in (against or {}).items():
            rows[name]["against"] = dict(name=other, **ratio_of(seconds, name, other))
        if goals:
            facts["goals"] = {pair: dict(goal=goal) for pair, goal in goals.items()}
            for pair, goal in facts["goals"].items():
                goal |= reached(pair, seconds, rows)
        facts = dict(threads=torch.get_num_threads()) | facts
        facts |= dict(baseline=baseline, rounds=len(seconds[baseline]), device=device)
        if benchmark is not None:
            hand_over(benchmark, request.node, contestants, seconds, rows, facts | setting)
        rows |= {name: {"absent": reason} for name, reason in (absent or {}).items()}
        store(rows, **facts)
        show(request, baseline, rows, facts)
        return rows

    return run
