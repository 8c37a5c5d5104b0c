"""What rounding to float8 may cost a model: the limits that `zeroi2v.reparam` holds it to."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from zeroi2v_kernels.quantize_reference import LARGEST, UNIT

from zeroi2v.model.fp8 import SCALE, places
from zeroi2v.model.vit import VideoViT

_SLACK = 1 + 2.0**-16
"""For the rounding of scales and of merged weights to float32."""


def with_noise(plain: VideoViT, seed: int) -> VideoViT:
    """A copy in float32 that errs as much as rounding to e4m3 may, in both factors of each product.

    Each number that fp8 rounds is off by a random part of `UNIT` of itself, the most that rounding
    a normal number is off by, of either sign. Rounding itself errs by less, 0.7 times as much in
    the root mean square, as few numbers are that far from the nearest e4m3 number.
    """
    model = copy.deepcopy(plain).float()
    generator = torch.Generator(model.head.weight.device).manual_seed(seed)

    def off(x: Tensor) -> Tensor:
        draw = torch.rand(x.shape, generator=generator, device=x.device)
        return x * (1 + UNIT * (2 * draw - 1))

    def before(_module: nn.Module, args: tuple) -> tuple:
        return off(args[0]), *args[1:]

    for block in model.transformer.resblocks:
        for module, name in places(block):
            weight = getattr(module, name)
            weight.data = off(weight.data)
        for layer in (block.attn, block.attn.out_proj, block.mlp, block.mlp.c_proj):
            layer.register_forward_pre_hook(before)
    return model


def weight_errors(plain: VideoViT, made: VideoViT) -> list[float]:
    """For each block the largest error of a weight, in units of what rounding may cost it.

    That is `UNIT` of the weight, or where it is small half a step of the smallest e4m3 numbers, by
    the scale that its own row should have: its largest magnitude / 448.
    """
    found = []
    for one, other in zip(plain.transformer.resblocks, made.transformer.resblocks, strict=True):
        errors = []
        for (module, name), (held, _) in zip(places(one), places(other), strict=True):
            truth = getattr(module, name).detach().float()
            value = getattr(held, name).float() * getattr(held, name + SCALE)[:, None]
            step = truth.abs().amax(-1, keepdim=True) / LARGEST * 2.0**-10
            most = torch.maximum(UNIT * truth.abs(), step) * _SLACK
            smallest = torch.finfo(torch.float32).smallest_normal
            errors.append(((value - truth).abs() / most.clamp_min(smallest)).max())
        found.append(torch.stack(errors).max().item())
    return found


def decided(logits: Tensor, error: float) -> float:
    """The fraction of rows of `logits` whose best class no relative error of that size can change.

    An error of norm e moves the difference of two logits by sqrt(2) e at most.
    """
    best = logits.topk(min(2, logits.shape[-1])).values
    margin = best[:, 0] - best[:, -1]
    return (margin > 2**0.5 * error * logits.norm(dim=-1)).double().mean().item()
