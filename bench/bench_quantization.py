"""Merged models with 8-bit weights beside the same with wide ones.

On a GPU with float8 units, float8 beside bfloat16, as CUDA graphs. On a CPU whose int8 products are
exact, int8 beside float32. Before anything is timed, the model must pass `verify`.
"""

from __future__ import annotations

import pytest
import torch
from zeroi2v_kernels import choice

from bench.cases import LIMITS, shapes
from zeroi2v import verify
from zeroi2v.model.quantization import FP8, INT8, quantized
from zeroi2v.reparam import QUANTIZED_CAP, seeded_clips

WIDE = "merged"
BATCH = 16
"""Clips of a run on a GPU: float8 pays where products are large."""


@shapes()
@torch.no_grad()
def bench_quantization(case, compare, timed, device):
    on_gpu = device == "cuda"
    format, dtype = (FP8, "bfloat16") if on_gpu else (INT8, "float32")
    has_units = choice.has_fp8_units(torch.device(device)) if on_gpu else choice.has_int8_products()
    if timed and not has_units:
        pytest.skip(f"has no {format.title} products here")
    _, merged, _ = case.models(dtype)
    made = quantized(case.merged, format, seeded_clips(case.merged, 1).to(device))
    report = verify(case.merged, made, case.clips)
    assert report.passed, str(report)
    video = case.video(dtype).expand(BATCH if timed and on_gpu else 1, -1, -1, -1, -1).contiguous()
    narrow = f"merged, {format.title}"
    limits, errors = {WIDE: LIMITS[dtype], narrow: QUANTIZED_CAP}, {}

    def check(name, output):
        errors[name] = ((output[:1].double() - case.logits).norm() / case.logits.norm()).item()
        assert errors[name] <= limits[name], f"{name} has a relative error of {errors[name]:.2e}"

    compare(
        {WIDE: lambda: merged(video), narrow: lambda: made(video)},
        baseline=WIDE,
        check=check,
        graph=on_gpu,
        memory=on_gpu,
        model=case.model,
        frames=case.frames,
        batch=len(video),
        clips=len(video),
        dtype=dtype,
        error=errors,
        agreement={WIDE: 1.0, narrow: report.top1_agreement},
    )
