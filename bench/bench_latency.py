"""The time to an answer: one clip, from an idle host and GPU until the logits are in host memory.

`bench_zero_cost` measures CUDA graphs; here models are called as a user calls them, so that the
host's time counts: CLIP's image tower in transformers, the merged model, and the same after
`accelerate()`. Also the merged model in one graph, which checks nothing before it is replayed. On a
CPU the host does the work itself, and there is nothing to wait for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench import measure
from bench.baselines.image_models import IMAGE_MODELS, pooled
from bench.cases import LIMITS, shapes

DTYPE = "bfloat16"
TRANSFORMERS, ACCELERATED, GRAPH = "transformers CLIP", "merged, accelerated", "merged, in a graph"


@shapes(("B/16", 8), ("L/14", 8))
@torch.no_grad()
def bench_latency(case, compare, device):
    if device != "cuda":
        pytest.skip("needs CUDA: on a CPU no host waits")
    _, merged, image = case.models(DTYPE)
    video, accelerated = case.video(DTYPE), copy.deepcopy(merged).accelerate(1)
    graph = measure.captured(lambda: merged(video), torch.cuda.graph_pool_handle())
    contestants, absent = {}, {}
    try:
        theirs = IMAGE_MODELS[TRANSFORMERS](image)
        frames = video.transpose(1, 2).flatten(0, 1).contiguous()
        contestants[TRANSFORMERS] = answer(lambda: pooled(theirs(frames)))
    except ImportError as error:
        absent[TRANSFORMERS] = f"{error.name or error} is not installed"
    contestants |= {
        "merged": answer(lambda: merged(video)),
        ACCELERATED: answer(lambda: accelerated(video)),
        GRAPH: answer(graph),
    }
    expected, errors = merged(video).cpu(), {}

    def check(name, output):
        if name != TRANSFORMERS:
            assert torch.equal(output, expected), f"{name} has other bits"
        truth = (case.features if name == TRANSFORMERS else case.logits).cpu()
        errors[name] = ((output.double() - truth).norm() / truth.norm()).item()
        assert errors[name] <= LIMITS[DTYPE], f"{name} has a relative error of {errors[name]:.2e}"

    compare(
        contestants,
        baseline=next(iter(contestants)),
        check=check,
        absent=absent,
        against={ACCELERATED: GRAPH},
        model=case.model,
        frames=case.frames,
        batch=1,
        clips=1,
        dtype=DTYPE,
        error=errors,
    )


def answer(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run` from the moment the GPU is idle until its result, on the CPU, is there."""

    def timed() -> Tensor:
        torch.cuda.synchronize()  # else flushing the cache would hide the host's first steps
        return run().cpu()

    return timed
