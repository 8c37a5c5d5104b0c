"""Linear layers of the blocks in int8, for inference on CPUs.

A weight `[out, in]` is kept as integers from -63 to 63 with one float32 scale for each row. The
input gets one scale for each token when it is multiplied:

    out = (x_8 w_8^T) * x_scale * w_scale + bias        x_8 = x * c / x_scale, rounded

`c [in]` are factors of the input's channels, whose inverses are in the weight. They are powers of
two, so they change nothing but what is rounded: large channels of the input would else leave few
steps for the others (SmoothQuant, arXiv 2211.10438, with the exponent 1/2).

Seven bits of the weights, as processors without VNNI add two products of 8 bits in 16: with larger
weights they would be cut off without a word. Sums are exact, in int32.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from zeroi2v_kernels.choice import has_int8_products
from zeroi2v_kernels.quantize_reference import SMALLEST

LARGEST = 63
"""Magnitude of the largest weight."""
LARGEST_INPUT = 127
_ZERO = 128
"""What stands for 0 in the input: PyTorch's product of unsigned numbers is the faster one."""
_ROWS = 128
"""Rows rounded at a time, which stay in a core's cache between the passes over them."""


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    channels: Tensor,
    bias: Tensor | None,
    packed: Tensor | None = None,
) -> Tensor:
    """`x W^T + b` with both factors in int8, in the dtype of `x`.

    Args:
        x: `[..., in]`, any floating dtype; each row is scaled by itself.
        weight: int8 `[out, in]`, at most 63 in magnitude.
        scale: float32 `[out]`, of the rows of `weight`.
        channels: float32 `[in]`, factors of the channels of `x`.
        bias: `[out]`, or None.
        packed: `weight` as `pack` lays it out, for PyTorch's int8 product; None: float64 gives the
            same sums, slowly.
    Raises:
        ValueError: gradients are wanted, which rounding has none of.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("a model with int8 weights has no gradients: use torch.no_grad()")
    values, factors = round_rows(x.flatten(0, -2), channels)
    if packed is None:
        sums = (values.double() - _ZERO) @ weight.double().t()
        out = sums.float().mul_(scale)
    else:
        none = _zeros(len(scale))
        out = torch.ops.onednn.qlinear_pointwise(
            values, 1.0, _ZERO, packed, scale, none, None, 1.0, 0, torch.float32, "none", [], ""
        )
    out = out.mul_(factors) if bias is None else torch.addcmul(bias.float(), out, factors)
    return out.to(x.dtype).unflatten(0, x.shape[:-1])


def round_rows(x: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of `x * channels [n, in]` as uint8 `[n, in]` around 128, and float32 scales `[n, 1]`."""
    values = torch.empty_like(x, dtype=torch.uint8)
    scales = torch.empty_like(x[:, :1], dtype=torch.float32)
    parts = (tensor.split(_ROWS) for tensor in (x, values, scales))
    for rows, value, scale in zip(*parts, strict=True):
        rows = rows.float() * channels
        scale.copy_(rows.abs().amax(-1, keepdim=True) / LARGEST_INPUT).clamp_min_(SMALLEST)
        # Half a step more, as the cast cuts fractions off.
        value.copy_(rows.mul_(scale.reciprocal()).add_(_ZERO + 0.5))
    return values, scales


def round_weight(weight: Tensor, channels: Tensor) -> tuple[Tensor, Tensor]:
    """`weight [out, in]` for inputs multiplied by `channels`: int8, and float32 scales `[out]`."""
    weight = weight.float() / channels
    scale = (weight.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(SMALLEST)
    return (weight / scale).round().to(torch.int8), scale.squeeze(-1)


def channel_factors(largest: Tensor, weight: Tensor) -> Tensor:
    """Powers of two that make channels of inputs and of weights about as large, float32 `[in]`.

    `largest [in]` are the largest magnitudes that inputs have had.
    """
    ratio = weight.float().abs().amax(0) / largest.float()
    ratio = torch.where(ratio.isfinite() & (ratio > 0), ratio, 1.0)
    return torch.exp2((ratio.log2() / 2).round())


def pack(weight: Tensor) -> Tensor | None:
    """`weight` as PyTorch's int8 product on this machine wants it; None if there is none."""
    if not weight.is_cpu or torch.compiler.is_compiling() or not has_int8_products():
        return None
    return torch.ops.onednn.qlinear_prepack(weight.contiguous(), None)


@functools.cache
def _zeros(count: int) -> Tensor:
    return torch.zeros(count, dtype=torch.int64)
