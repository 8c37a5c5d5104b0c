"""Merged models in float8 beside the same in bfloat16, as CUDA graphs.

Only GPUs with float8 units are timed. Before that, and elsewhere on small models, the model in
float8 must pass `verify`.
"""

from __future__ import annotations

import pytest
import torch
from zeroi2v_kernels import choice

from bench.cases import LIMITS, shapes
from zeroi2v import verify
from zeroi2v.model.fp8 import quantized
from zeroi2v.reparam import FP8_CAP

WIDE, FP8 = "merged", "merged, fp8"
BATCH = 16
"""Clips of a run on a GPU: float8 pays where products are large."""


@shapes()
@torch.no_grad()
def bench_fp8(case, compare, timed, device):
    if timed and not choice.has_fp8_units(torch.device(device)):
        pytest.skip("needs a GPU with float8 units")
    _, merged, _ = case.models("bfloat16")
    made = quantized(case.merged)
    report = verify(case.merged, made, case.clips)
    assert report.passed, str(report)
    video = case.video("bfloat16").expand(BATCH if timed else 1, -1, -1, -1, -1).contiguous()
    limits, errors = {WIDE: LIMITS["bfloat16"], FP8: FP8_CAP}, {}

    def check(name, output):
        errors[name] = ((output[:1].double() - case.logits).norm() / case.logits.norm()).item()
        assert errors[name] <= limits[name], f"{name} has a relative error of {errors[name]:.2e}"

    compare(
        {WIDE: lambda: merged(video), FP8: lambda: made(video)},
        baseline=WIDE,
        check=check,
        graph=True,
        memory=True,
        model=case.model,
        frames=case.frames,
        batch=len(video),
        clips=len(video),
        dtype="bfloat16",
        error=errors,
        agreement={WIDE: 1.0, FP8: report.top1_agreement},
    )
