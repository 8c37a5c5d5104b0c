"""Linear layers of the blocks in float8 (e4m3), for inference.

A weight `[out, in]` is kept as e4m3 values with one float32 scale for each row, and the input gets
one scale for each token when it is multiplied:

    out = (x_8 w_8^T) * x_scale * w_scale + bias       x_8 = x / x_scale, rounded, as w_8

The scale of a row is its largest magnitude / 448, the largest e4m3 number. Products of two e4m3
numbers are exact in float32, in which they are summed.

Where there are no float8 units the same is computed in float32, from the same rounded factors. That
is slow, so there `load` gives the model `widened`.

Source: FP8 formats for deep learning (arXiv 2209.05433).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zeroi2v_kernels import choice
from zeroi2v_kernels.quantize import quantize_rows
from zeroi2v_kernels.quantize_reference import E4M3

if TYPE_CHECKING:
    from zeroi2v.model.vit import Block, VideoViT

WIDE = torch.bfloat16
"""The dtype of all else in a model with float8 weights, and of what float8 units give."""
SCALE = "_scale"
"""What is added to the name of a weight for that of its scales."""
MULTIPLE = 16
"""What both sides of a weight must be a multiple of, for float8 units."""


def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """`x W^T + b` with both factors in e4m3, in the dtype of `x`.

    Args:
        x: `[..., in]`, any floating dtype; each row is scaled by itself.
        weight: e4m3 `[out, in]`.
        scale: float32 `[out]`, of the rows of `weight`.
        bias: `[out]`, or None.
    Raises:
        ValueError: gradients are wanted, which rounding has none of.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("a model with float8 weights has no gradients: use torch.no_grad()")
    values, factors = quantize_rows(x.flatten(0, -2))
    if choice.on_fp8_units(x):
        bias = None if bias is None else bias.to(WIDE)
        scales = dict(scale_a=factors, scale_b=scale[None], bias=bias, out_dtype=WIDE)
        out = torch._scaled_mm(values, weight.t(), **scales)
    else:
        with torch.autocast(x.device.type, enabled=False):
            out = F.linear(values.float(), weight.float()) * factors * scale
        out = out if bias is None else out + bias.float()
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


class FP8Weights(nn.Module):
    """A module whose e4m3 weights, and their scales (`*_scale`), are moved but never cast.

    So `.to(dtype)` and the like change the other parts of a model alone.
    """

    def _apply(self, function, recurse=True):
        scales = [buffer for name, buffer in self._buffers.items() if name.endswith(SCALE)]

        def uncast(tensor: Tensor) -> Tensor:
            out = function(tensor)
            fixed = tensor.dtype == E4M3 or any(tensor is scale for scale in scales)
            return tensor.to(out.device) if fixed and out.dtype != tensor.dtype else out

        return super()._apply(uncast, recurse)


def places(block: Block) -> Iterator[tuple[FP8Weights, str]]:
    """Each module of a block with a weight that is kept in e4m3, and the weight's name."""
    yield block.attn, "in_proj_weight"
    for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
        yield layer, "weight"


def reserve(model: VideoViT) -> VideoViT:
    """`model` itself, its blocks with room for e4m3 weights, and without gradients.

    Raises ValueError for adapters, and for layers of a width that is no multiple of 16.
    """
    if model.config.adapter is not None:
        raise ValueError("model must be merged for float8 weights: it has adapters")
    for name in ("width", "hidden"):
        if (width := getattr(model.config, name)) % MULTIPLE:
            raise ValueError(f"{name} must be a multiple of {MULTIPLE} for float8: got {width}")
    for block in model.transformer.resblocks:
        for module, name in places(block):
            weight = getattr(module, name).detach()
            setattr(module, name, nn.Parameter(torch.empty_like(weight, dtype=E4M3), False))
            setattr(module, name + SCALE, torch.empty_like(weight[:, 0], dtype=torch.float32))
    return model.requires_grad_(False)


def quantized(model: VideoViT) -> VideoViT:
    """A copy of `model` with e4m3 weights in its blocks, and all else in bfloat16; in eval mode.

    Args:
        model: merged or plain, of any dtype; left untouched.
    Raises:
        ValueError: `model` has adapters or float8 weights, weights that are not finite, or layers
            of a width that is no multiple of 16.
    """
    if model.fp8:
        raise ValueError("model must have wide weights: got one with float8 weights")
    with torch.device("meta"):
        made = reserve(type(model)(model.config))
    names, state = made.state_dict().keys(), {}
    for name, tensor in model.state_dict().items():
        if name + SCALE in names:
            if not tensor.isfinite().all():
                raise ValueError(f"{name} must be finite: it contains inf or nan")
            state[name], scale = quantize_rows(tensor)
            state[name + SCALE] = scale.squeeze(-1)
        else:
            state[name] = tensor.to(WIDE, copy=True)
    return _filled(made, state, model)


def widened(model: VideoViT) -> VideoViT:
    """A copy of a model with float8 weights that has these as numbers of its own dtype.

    It is a plain model in eval mode, which no longer rounds what the weights are multiplied with.
    """
    with torch.device("meta"):
        made = type(model)(model.config)
    held, dtype = model.state_dict(), model.head.weight.dtype
    state = {}
    for name in made.state_dict():
        scale = held.get(name + SCALE)
        tensor = held[name] if scale is None else held[name].float() * scale[:, None]
        state[name] = tensor.to(dtype, copy=True)
    return _filled(made, state, model)


def _filled(made: VideoViT, state: dict[str, Tensor], source: VideoViT) -> VideoViT:
    made.load_state_dict(state, assign=True)
    made.origins = dict(source.origins)
    return made.eval()
