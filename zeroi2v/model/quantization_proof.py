"""What rounding to 8 bits may cost a model: the limits that `zeroi2v.reparam` holds it to."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from zeroi2v_kernels.quantize_reference import LARGEST, UNIT

from zeroi2v.model import int8
from zeroi2v.model.quantization import CHANNELS, FP8, SCALE, places, readers
from zeroi2v.model.vit import VideoViT

_SLACK = 1 + 2.0**-16
"""For the rounding of scales and of merged weights to float32."""


def with_noise(plain: VideoViT, made: VideoViT, seed: int) -> VideoViT:
    """A copy of `plain` in float32 that errs as rounding does in `made`, in both factors.

    Each number that is rounded there is off by a random part, of either sign, of what rounding may
    cost it: in float8 `UNIT` of itself, which rounding errs by less than, 0.7 times as much in the
    root mean square; in int8 half a step of its row, by which rounding errs just as much.
    """
    model = copy.deepcopy(plain).float()
    generator = torch.Generator(model.head.weight.device).manual_seed(seed)

    def off(x: Tensor, channels: Tensor | None, largest: int) -> Tensor:
        draw = 2 * torch.rand(x.shape, generator=generator, device=x.device) - 1
        if channels is None:
            return x * (1 + UNIT * draw)
        half = (x * channels).abs().amax(-1, keepdim=True) / largest / 2
        return x + half * draw / channels

    for block, other in zip(model.transformer.resblocks, made.transformer.resblocks, strict=True):
        held = [getattr(module, name + CHANNELS) for module, name in places(other)]
        for (module, name), reader, channels in zip(
            places(block), readers(block), held, strict=True
        ):
            weight = getattr(module, name)
            inverse = None if channels is None else 1 / channels
            weight.data = off(weight.data, inverse, int8.LARGEST)

            def before(_module: nn.Module, args: tuple, channels=channels) -> tuple:
                return off(args[0], channels, int8.LARGEST_INPUT), *args[1:]

            reader.register_forward_pre_hook(before)
    return model


def weight_errors(plain: VideoViT, made: VideoViT) -> list[float]:
    """For each block the largest error of a weight, in units of what rounding may cost it.

    By the scale that its own row should have, from its largest magnitude: in float8 `UNIT` of the
    weight, or where it is small half a step of the smallest numbers; in int8 half a step.
    """
    found = []
    for one, other in zip(plain.transformer.resblocks, made.transformer.resblocks, strict=True):
        errors = []
        for (module, name), (held, _) in zip(places(one), places(other), strict=True):
            truth = getattr(module, name).detach().float()
            value = getattr(held, name).float() * getattr(held, name + SCALE)[:, None]
            if made.quantization is FP8:
                step = truth.abs().amax(-1, keepdim=True) / LARGEST * 2.0**-10
                most = torch.maximum(UNIT * truth.abs(), step)
            else:
                truth = truth / getattr(held, name + CHANNELS)
                most = truth.abs().amax(-1, keepdim=True) / int8.LARGEST / 2
            smallest = torch.finfo(torch.float32).smallest_normal
            errors.append(((value - truth).abs() / (most * _SLACK).clamp_min(smallest)).max())
        found.append(torch.stack(errors).max().item())
    return found


def decided(logits: Tensor, error: float) -> float:
    """The fraction of rows of `logits` whose best class no relative error of that size can change.

    An error of norm e moves the difference of two logits by sqrt(2) e at most.
    """
    best = logits.topk(min(2, logits.shape[-1])).values
    margin = best[:, 0] - best[:, -1]
    return (margin > 2**0.5 * error * logits.norm(dim=-1)).double().mean().item()
