"""The host's part of a pass on a GPU, op by op: the merged model beside transformers' CLIP, and a
training step by the training block beside plain autograd.

With a small batch the GPU waits for the host, so this is the time of such a pass. It is measured
without a GPU (`bench/host.py`), in a process of its own: times are of 12 blocks; only their ratio
means something.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from bench.host import CONFIG, MERGED, NAIVE, PASSES, SAVE, TRANSFORMERS, WATCHED

LAUNCHES = 2 + 4 * CONFIG.depth
"""Kernels of ours in a pass: two norms, attention and activation of each block; two norms more."""


@pytest.fixture(scope="module")
def host():
    """A function that makes the other process run what has that name, and returns its answer."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    with subprocess.Popen(
        [sys.executable, "-m", "bench.host"], env=environment, cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == f"launches {LAUNCHES}\n"

        def run(name: str) -> str:
            print(name, file=process.stdin, flush=True)
            return process.stdout.readline()

        yield run
        process.stdin.close()


def bench_host(host, compare):
    race(host, compare, (TRANSFORMERS, MERGED, WATCHED), f"{MERGED} / {TRANSFORMERS}")


def bench_host_training(host, compare):
    race(host, compare, (NAIVE, SAVE), f"{SAVE} / {NAIVE}")


def race(host: Callable[[str], str], compare, names: tuple[str, ...], goal: str) -> None:
    def check(name: str, answer: str) -> None:
        assert answer == "done\n", name

    compare(
        {name: partial(host, name) for name in names},
        baseline=names[0],
        check=check,
        device="cpu",
        rounds=60,
        model=f"{CONFIG.depth} blocks",
        passes=PASSES,
        goals={goal: 1.0},
    )
