"""Zero cost: the merged video model beside the plain image model, on the same frames.

Contestants, all with the same weights: CLIP's image tower as transformers, timm and open_clip run
it; the same as ours (zero offsets), which like all of ours computes only CLS in its last block; the
adapted model; the merged one; and the merged one run the authors' way (`baselines/authors_shift`).
Before any is timed, each must give the outputs of the model in float64, and the merged one pass
`verify`.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bench.baselines.authors_shift import AuthorsViT
from bench.baselines.image_models import IMAGE_MODELS, pooled
from bench.flops import counted, formula
from bench.machine import DTYPES
from zeroi2v import RECIPES, VideoViT, merge, verify
from zeroi2v.config import AdapterConfig, ModelConfig
from zeroi2v.reparam import seeded_clips

RECIPE = {
    ("B/16", 8): "vit_b16_k400_8x16",
    ("L/14", 8): "vit_l14_k400_8x16",
    ("L/14", 32): "vit_l14_k400_32x4",
}
TRANSFORMERS, IMAGE = "transformers CLIP", "plain image ViT"
AUTHORS, AUTHORS_FUSED = "authors' way", "authors' way, fused attention"
LEFT_OUT = {"timm ViT", "open_clip ViT", AUTHORS_FUSED}
"""Of 32 frames on a CPU."""
GOALS = {
    "B/16": {f"merged / {TRANSFORMERS}": 0.94, f"merged / {AUTHORS}": 0.88},
    "L/14": {f"merged / {TRANSFORMERS}": 0.97, f"merged / {AUTHORS}": 0.88},
}
"""Ratios of time on a CPU."""
LIMITS = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}
"""Relative error that any contestant may have. A kernel that errs is off by far more."""
ROUNDS = {("B/16", 8): 7, ("L/14", 8): 3, ("L/14", 32): 2}
"""On a CPU; on a GPU as many as fit."""
BATCHES = {"cpu": {("B/16", 8): (2, 4), ("L/14", 8): (2,)}, "cuda": (4, 16, 64)}
"""Clips in a run, beside the single clip that latency is measured with."""

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(*case, dtype) for case in RECIPE for dtype in DTYPES[WHERE]]


def batches() -> list:
    """Model, frames, dtype and batch of each case of the throughput bench."""
    sizes = BATCHES[WHERE]
    return [
        (*case, batch)
        for case in CASES
        for batch in (sizes.get(case[:2], ()) if WHERE == "cpu" else sizes)
    ]


@pytest.mark.parametrize("model, frames, dtype", CASES)
@torch.no_grad()
def bench_zero_cost(model, frames, dtype, compare, timed, device, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # float32 means float32
    case = build(model, frames, timed)
    adapted, merged, image = case.models(dtype, device)
    report = verify(adapted, merged, case.clips)
    assert report.passed, str(report)
    video = case.clips[:1].to(device, getattr(torch, dtype))
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
        errors[name] = ((output.cpu().double() - truth).norm() / truth.norm()).item()
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


@pytest.mark.parametrize("model, frames, dtype, batch", batches())
@torch.no_grad()
def bench_zero_cost_throughput(model, frames, dtype, batch, compare, timed, device):
    case = build(model, frames, timed)
    adapted, merged, image = case.models(dtype, device)
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
        model=model,
        frames=frames,
        batch=batch,
        clips=batch,
        dtype=dtype,
        flops={name: batch * flops_by_formula(name, config) for name in contestants},
    )


class Case(NamedTuple):
    """The models of one shape in float32, and what they give in float64, on the CPU."""

    adapted: VideoViT
    merged: VideoViT
    image: VideoViT
    clips: Tensor
    logits: Tensor
    """Of the adapted model for the first clip, `[1, num_classes]`."""
    features: Tensor
    """Of the image model for the frames of the first clip, `[T, C]`."""

    def models(self, dtype: str, device: str) -> list[VideoViT]:
        """Adapted, merged and image model, copied to a device and a dtype."""
        models = (self.adapted, self.merged, self.image)
        return [copy.deepcopy(m).to(device, getattr(torch, dtype)) for m in models]


@lru_cache(maxsize=1)  # dtypes and batches of a shape come one after the other
def build(model: str, frames: int, timed: bool) -> Case:
    """The models of a recipe; small ones suffice to check, one clip does for the largest."""
    torch.manual_seed(0)
    config = RECIPES[RECIPE[model, frames]].model
    if not timed:
        small = dict(width=16 * config.num_heads, depth=2, image_size=4 * config.patch_size)
        config = dataclasses.replace(config, **small)
    adapted = VideoViT(config).eval()
    for parameter in adapted.parameters():
        if parameter.abs().max() == 0:  # a fresh adapter does nothing: give it something to merge
            torch.nn.init.normal_(parameter, std=0.02)
    merged = merge(adapted)
    with torch.device("meta"):
        offsets = (0,) * config.num_heads
        image = VideoViT(dataclasses.replace(merged.config, head_offsets=offsets)).eval()
    no_time = torch.zeros_like(merged.temporal_embedding)  # the image model knows none
    image.load_state_dict(merged.state_dict() | {"temporal_embedding": no_time}, assign=True)
    clips = seeded_clips(adapted, count=max(1, 16 // frames if timed else 2))
    video = clips[:1].double()
    logits = copy.deepcopy(adapted).double()(video)
    features = copy.deepcopy(image).double().features(video)[0]
    return Case(adapted, merged, image, clips, logits, features)


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
    """Operations that PyTorch is asked for, without their being done."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return counted(contestant)
