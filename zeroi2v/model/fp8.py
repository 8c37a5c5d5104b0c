"""Linear layers of the blocks in float8 (e4m3), for inference.

A weight `[out, in]` is kept as e4m3 values with one float32 scale for each row, and the input gets
one scale for each token when it is multiplied:

    out = (x_8 w_8^T) * x_scale * w_scale + bias       x_8 = x / x_scale, rounded, as w_8

The scale of a row is its largest magnitude / 448, the largest e4m3 number. Products of two e4m3
numbers are exact in float32, in which they are summed.

Where there are no float8 units the same is computed in float32, from the same rounded factors.

Source: FP8 formats for deep learning (arXiv 2209.05433).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from zeroi2v_kernels import choice
from zeroi2v_kernels.quantize import quantize_rows

WIDE = torch.bfloat16
"""The dtype of all else in a model with float8 weights, and of what float8 units give."""


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
