"""The host's part of a forward pass on a GPU, op by op: the merged model beside transformers' CLIP.

Where a batch is small the GPU waits for the host, so this is what such a pass takes. It is measured
without a GPU (`bench/host.py`), in a process of its own: times are of 12 blocks and say nothing in
themselves, their ratio does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from bench.host import CONFIG, MERGED, PASSES, TRANSFORMERS, WATCHED

LAUNCHES = 2 + 4 * CONFIG.depth
"""Kernels of ours in a pass: two norms, attention and activation of each block; two norms more."""


def bench_host(compare):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    with subprocess.Popen(
        [sys.executable, "-m", "bench.host"], env=environment, cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout.readline() == f"launches {LAUNCHES}\n"

        def run(name: str) -> str:
            print(name, file=process.stdin, flush=True)
            return process.stdout.readline()

        compare(
            {name: lambda name=name: run(name) for name in (TRANSFORMERS, MERGED, WATCHED)},
            baseline=TRANSFORMERS,
            check=lambda name, answer: _assert_done(name, answer),
            device="cpu",
            rounds=60,
            model=f"{CONFIG.depth} blocks",
            passes=PASSES,
            goals={f"{MERGED} / {TRANSFORMERS}": 1.0},
        )
        process.stdin.close()


def _assert_done(name: str, answer: str) -> None:
    assert answer == "done\n", name
