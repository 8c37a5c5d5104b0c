"""Zero cost: the merged video model beside the plain image model, on the same frames.

Contestants, all with the same weights: CLIP's image tower as transformers, timm and open_clip run
it; the same as ours (zero offsets), which like all of ours computes only CLS in its last block; the
adapted model; the merged one; and the merged one run the authors' way (`baselines/authors_shift`).
Before any is timed, each must give the outputs of the model in float64, and the merged one pass
`verify`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench import machine
from bench.baselines.authors_shift import AuthorsViT
from bench.baselines.image_models import IMAGE_MODELS, pooled
from bench.cases import DTYPES, LIMITS, RECIPE, WHERE, shapes
from bench.flops import counted, formula
from zeroi2v import VideoViT, verify
from zeroi2v.config import AdapterConfig, ModelConfig
from zeroi2v.reparam import seeded_clips

TRANSFORMERS, IMAGE = "transformers CLIP", "plain image ViT"
AUTHORS, AUTHORS_FUSED = "authors' way", "authors' way, fused attention"
LEFT_OUT = {"timm ViT", "open_clip ViT", AUTHORS_FUSED}
"""Of 32 frames on a CPU."""
GOALS = {
    "B/16": {f"merged / {TRANSFORMERS}": 0.94, f"merged / {AUTHORS}": 0.88},
    "L/14": {f"merged / {TRANSFORMERS}": 0.97, f"merged / {AUTHORS}": 0.88},
}
"""Ratios of time on a CPU."""
ROUNDS = {("B/16", 8): 7, ("L/14", 8): 3, ("L/14", 32): 2}
"""On a CPU; on a GPU as many as fit."""
BATCHES = {"cpu": (2, 4), "cuda": (4, 16, 64)}[WHERE]
"""Clips in a run, beside the single clip that latency is measured with."""


@pytest.mark.parametrize("dtype", DTYPES if WHERE == "cuda" else machine.DTYPES[WHERE])
@shapes()
@torch.no_grad()
def bench_zero_cost(case, dtype, compare, timed, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # float32 means float32
    model, frames = case.model, case.frames
    adapted, merged, image = case.models(dtype)
    report = verify(adapted, merged, case.clips)
    assert report.passed, str(report)
    video = case.video(dtype)
    models, contestants, absent = line_up(adapted, merged, image, video)
    if timed and device == "cpu" and frames == 32:
        for name in LEFT_OUT & contestants.keys():
            del contestants[name], models[name]
            absent[name] = "left out on a CPU, where each run takes half a minute"
    flops = {name: counted_on_fakes(contestant) for name, contestant in contestants.items()}
    by_formula = {name: flops_by_formula(name, case.merged.config) for name in contestants}
    assert flops == by_formula
    errors = {}

    def check(name, output):
        truth = case.logits if output.shape == case.logits.shape else case.features
        errors[name] = ((output.double() - truth).norm() / truth.norm()).item()
        assert errors[name] <= LIMITS[dtype], f"{name} has a relative error of {errors[name]:.2e}"

    baseline = next(iter(contestants))
    compare(
        contestants,
        baseline,
        check=check,
        absent=absent,
        graph=True,
        memory=True,
        energy=True,
        rounds=ROUNDS[model, frames] if device == "cpu" else None,
        against={"merged": AUTHORS},
        model=model,
        frames=frames,
        batch=1,
        clips=1,
        dtype=dtype,
        parameters={n: sum(p.numel() for p in m.parameters()) for n, m in models.items()},
        flops=flops,
        flops_by_formula=by_formula,
        error=errors,
        agreement={"merged": report.top1_agreement},
        agreement_clips=report.clips,
        merge_error=report.rel,
        merge_error_limit=report.rel_limit,
        goals=GOALS[model],
    )


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", DTYPES)
@shapes(*(shape for shape in RECIPE if WHERE == "cuda" or shape[1] == 8))
@torch.no_grad()
def bench_zero_cost_throughput(case, dtype, batch, compare, device):
    need_memory(forward_bytes(case.merged.config, batch, getattr(torch, dtype)), device)
    adapted, merged, image = case.models(dtype)
    video = seeded_clips(adapted, count=batch).to(device, getattr(torch, dtype))
    _, contestants, absent = line_up(adapted, merged, image, video)
    baseline = next(iter(contestants))
    contestants = {name: contestants[name] for name in dict.fromkeys((baseline, IMAGE, "merged"))}
    last = merged(video[-1:])

    def check(name, output):
        if name == "merged":
            error = ((output[-1:] - last).norm() / last.norm()).item()
            assert error <= LIMITS[dtype], f"clip {batch} of {batch} has an error of {error:.2e}"

    config = case.merged.config
    compare(
        contestants,
        baseline,
        check=check,
        absent={name: reason for name, reason in absent.items() if name == TRANSFORMERS},
        graph=True,
        memory=True,
        rounds=3 if device == "cpu" else None,
        model=case.model,
        frames=case.frames,
        batch=batch,
        clips=batch,
        dtype=dtype,
        flops={name: batch * flops_by_formula(name, config) for name in contestants},
    )


def forward_bytes(config: ModelConfig, batch: int, dtype: torch.dtype) -> int:
    """Peak bytes of a forward pass of `batch` clips above weights and pixels, estimated. Other
    libraries' image models reach it in an MLP: the block's input, the attention's result, their sum
    and its norm; the hidden layer, and two results of an unfused activation.
    """
    tokens = batch * config.num_frames * config.num_tokens
    return round(tokens * config.width * (4 + 3 * config.mlp_ratio) * dtype.itemsize)


def need_memory(wanted: int, device: str) -> None:
    """Skips a bench that a GPU has no memory for."""
    if device == "cuda":
        cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        free = torch.cuda.mem_get_info()[0] + cached
        if wanted > free:
            pytest.skip(f"needs about {wanted / 1e9:.1f} GB of GPU memory: {free / 1e9:.1f} free")


def line_up(
    adapted: VideoViT, merged: VideoViT, image: VideoViT, video: Tensor
) -> tuple[dict[str, nn.Module], dict[str, Callable], dict[str, str]]:
    """Models and their runs by name, and why others are absent; the first is the baseline."""
    frames = video.transpose(1, 2).flatten(0, 1).contiguous()
    models, contestants, absent = {}, {}, {}
    for name, make in IMAGE_MODELS.items():
        try:
            models[name] = make(image)
        except ImportError as error:
            absent[name] = f"{error.name or error} is not installed"
            continue
        contestants[name] = lambda theirs=models[name]: pooled(theirs(frames))
    models |= {IMAGE: image, "adapted": adapted, "merged": merged}
    models |= {AUTHORS: AuthorsViT(merged, fused=False), AUTHORS_FUSED: AuthorsViT(merged, True)}
    contestants[IMAGE] = lambda: image.features(video).flatten(0, 1)
    for name in ("adapted", "merged", AUTHORS, AUTHORS_FUSED):
        contestants[name] = lambda model=models[name]: model(video)
    return models, contestants, absent


def flops_by_formula(name: str, merged: ModelConfig) -> int:
    """Operations of a contestant on one clip. Image models have no head."""
    head = 2 * merged.width * merged.num_classes
    if name == "adapted":
        return formula(dataclasses.replace(merged, adapter=AdapterConfig()))
    if name in IMAGE_MODELS:
        return formula(merged, cls_only=False) - head
    if name in (AUTHORS, AUTHORS_FUSED):
        return formula(merged, cls_only=False)
    return formula(merged) - (head if name == IMAGE else 0)


def counted_on_fakes(contestant: Callable) -> int:
    """Counts the operations that PyTorch is asked for, without doing them."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return counted(contestant)
