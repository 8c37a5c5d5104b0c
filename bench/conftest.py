"""How benches run: `pytest bench` checks each once, `pytest bench --benchmark` also times it.

A bench proves its contestants equal before it times them, all in the same rounds, so that a noisy
machine slows them alike; what it reports are ratios within a round, their median and spread.
Figures go to `bench/results/<machine>.json`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).with_name("results")


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="time the benches, not only check")
    parser.addoption("--rounds", type=int, default=15, help="timed rounds of each bench")


@pytest.fixture
def compare(request):
    """A function `compare(contestants, baseline, **facts)` that times them in interleaved rounds.

    `contestants` maps names to functions without arguments, `baseline` names one of them. Returns
    median seconds and median ratio to the baseline by name, or None without `--benchmark`; prints
    and stores them with `facts`.
    """

    def run(contestants: dict[str, Callable], baseline: str, **facts) -> dict | None:
        if not request.config.getoption("--benchmark"):
            return None
        rounds = request.config.getoption("--rounds")
        seconds = interleave(contestants, rounds)
        rows = {name: summary(times, seconds[baseline]) for name, times in seconds.items()}
        store(request.node.name, dict(baseline=baseline, rounds=rounds, rows=rows, **facts))
        with request.config.pluginmanager.get_plugin(
            "capturemanager"
        ).global_and_fixture_disabled():
            print(f"\n{request.node.name}, {rounds} rounds")
            for name, row in rows.items():
                low, high = row["ratio_quartiles"]
                print(
                    f"  {name:<24} {1e3 * row['seconds']:9.1f} ms   "
                    f"{row['ratio']:.3f} x {baseline}  [{low:.3f}, {high:.3f}]"
                )
        return rows

    return run


def interleave(contestants: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; the order rotates, after one warm-up round."""
    names = list(contestants)
    seconds = {name: [] for name in names}
    for round_index in range(rounds + 1):
        shift = round_index % len(names)
        for name in names[shift:] + names[:shift]:
            start = time.perf_counter()
            contestants[name]()
            if round_index:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(times: list[float], baseline: list[float]) -> dict:
    """Median seconds; median and quartiles of the ratio to the baseline of the same round."""
    ratios = sorted(a / b for a, b in zip(times, baseline, strict=True))
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return dict(
        seconds=statistics.median(times),
        ratio=statistics.median(ratios),
        ratio_quartiles=[low, high],
    )


def store(name: str, row: dict) -> None:
    """Adds one bench's figures to this machine's results file, with commit and command."""
    card = machine_card()
    path = RESULTS / f"{card['slug']}.json"
    results = json.loads(path.read_text()) if path.exists() else {"benches": {}}
    results["machine"] = card
    row |= dict(commit=commit(), command="pytest " + " ".join(sys.argv[1:]))
    results["benches"][name] = row
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(results, indent=2) + "\n")
    temporary.replace(path)


def machine_card() -> dict:
    """What the figures were measured on."""
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
    else:
        found = re.search(r"model name\s*: (.*)", cpu_info())
        name = found.group(1) if found else platform.processor()
    slug = re.sub(r"[^a-z0-9]+", "-", f"{name} {os.cpu_count()} cores".lower()).strip("-")
    return dict(
        name=name,
        slug=slug,
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        isa=torch.backends.cpu.get_cpu_capability(),
        torch=torch.__version__,
        python=platform.python_version(),
    )


def cpu_info() -> str:
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else ""


def commit() -> str:
    """The checked-out commit, marked if the tree differs from it; empty outside a checkout."""
    command = ["git", "-C", str(RESULTS), "describe", "--always", "--dirty", "--abbrev=12"]
    result = subprocess.run(command, capture_output=True, text=True)
    return result.stdout.strip()
