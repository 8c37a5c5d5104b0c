"""The shapes, dtypes and models that benches share.

A case marked `REST` adds little to the others and is run only with `--all`. bfloat16 stands for
float16 too, and on a GPU nobody runs these models in float32.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from bench import machine
from zeroi2v import RECIPES, VideoViT, merge
from zeroi2v.config import ModelConfig
from zeroi2v.reparam import seeded_clips

WHERE = machine.device()
REST = pytest.mark.rest
RECIPE = {
    ("B/16", 8): "vit_b16_k400_8x16",
    ("L/14", 8): "vit_l14_k400_8x16",
    ("L/14", 32): "vit_l14_k400_32x4",
}
LIMITS = {"float32": 1e-5, "bfloat16": 0.05, "float16": 0.01}
"""Relative error that any contestant may have. A kernel that errs is off by far more."""


def parameters(values, essential) -> list:
    """Parameters of a bench; those that are not `essential` are run only with `--all`."""
    return [pytest.param(v, marks=() if v in essential else REST) for v in values]


DTYPES = parameters(machine.DTYPES[WHERE], ["bfloat16"])


def shapes(*wanted: tuple[str, int]):
    """Runs a bench on the `Case` of each of these shapes, all by default, as its argument `case`.

    Benches of one shape follow one another, in whatever file they are: it is built once.
    """
    names = {"argnames": "case", "ids": lambda shape: f"{shape[0]}-{shape[1]}"}
    return pytest.mark.parametrize(argvalues=wanted or RECIPE, indirect=True, **names)


class Case(NamedTuple):
    """The models of one shape in float32, and what they give in float64, on one device."""

    model: str
    frames: int
    adapted: VideoViT
    merged: VideoViT
    image: VideoViT
    clips: Tensor
    logits: Tensor
    """Of the adapted model for the first clip, `[1, num_classes]`."""
    features: Tensor
    """Of the image model for the frames of the first clip, `[T, C]`."""

    def models(self, dtype: str) -> list[VideoViT]:
        """Adapted, merged and image model, copied to a dtype."""
        models = (self.adapted, self.merged, self.image)
        return [copy.deepcopy(m).to(getattr(torch, dtype)) for m in models]

    def video(self, dtype: str) -> Tensor:
        """The first clip."""
        return self.clips[:1].to(getattr(torch, dtype))


@torch.no_grad()
def build(model: str, frames: int, timed: bool, device: str) -> Case:
    """The models of a recipe; small ones for a check, one clip for the largest."""
    config = RECIPES[RECIPE[model, frames]].model
    if not timed:
        small = dict(width=16 * config.num_heads, depth=2, image_size=4 * config.patch_size)
        config = dataclasses.replace(config, **small)
    adapted = adapted_model(config, device)
    merged = merge(adapted)
    with torch.device("meta"):
        offsets = (0,) * config.num_heads
        image = VideoViT(dataclasses.replace(merged.config, head_offsets=offsets)).eval()
    no_time = torch.zeros_like(merged.temporal_embedding)  # the image model knows none
    image.load_state_dict(merged.state_dict() | {"temporal_embedding": no_time}, assign=True)
    clips = seeded_clips(adapted, count=max(1, 16 // frames if timed else 2)).to(device)
    video = clips[:1].double()
    logits = copy.deepcopy(adapted).double()(video)
    features = copy.deepcopy(image).double().features(video)[0]
    return Case(model, frames, adapted, merged, image, clips, logits, features)


def adapted_model(config: ModelConfig, device: str) -> VideoViT:
    """A random model on `device`, in eval mode, without zeros even in its adapters."""
    torch.manual_seed(0)
    with torch.device(device):
        model = VideoViT(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "up.weight", "temporal_embedding")):
            torch.nn.init.normal_(parameter, std=0.02)
    return model
