"""Rotary positions: pairs of a head's channels turned by the angle of the token's place.

    out[p] = x[p] cos - x[p + D/2] sin,   out[p + D/2] = x[p + D/2] cos + x[p] sin,   p < D/2

for the last P tokens of a frame; the tokens before them stay. Arithmetic is in float32 at least,
and the result is cast. The adjoint is a turn by minus the angle.

The rotation is a pass of its own over queries and keys, in place where that is allowed: PyTorch's
attention and our kernels then read them as they always do.

Source: RoFormer (arXiv 2104.09864).
"""

from __future__ import annotations

import torch
from torch import Tensor

from zeroi2v_kernels import choice
from zeroi2v_kernels.device import operator


def rotated(x: Tensor, table: Tensor, parts: int, overwrite: bool = False) -> Tensor:
    """`x [B, T, N, K, H, D]` with the first `parts` of K turned, at its last P tokens.

    Args:
        x: queries, keys and values, or some of these; floating point.
        table: cosines and sines, `[2, P, D/2]`, float32 or float64; P at most N.
        parts: how many of K are turned.
        overwrite: allow `x` to be modified and returned; only without autograd.

    Raises:
        ValueError: a shape that does not fit.
    """
    if x.ndim != 6 or not 1 <= parts <= x.shape[3]:
        raise ValueError(f"x must be [B, T, N, K, H, D], K at least {parts}: got {list(x.shape)}")
    if table.ndim != 3 or table.shape[1] > x.shape[2] or table.shape[2] * 2 != x.shape[-1]:
        raise ValueError(
            f"table must be [2, P, {x.shape[-1] // 2}] for at most {x.shape[2]} places: "
            f"got {list(table.shape)}"
        )
    if overwrite:
        turn_(x, table, parts)
        return x
    return _rotated(x, table, parts, False)


def turn_(x: Tensor, table: Tensor, parts: int, back: bool = False) -> None:
    """Turns the first `parts` of `x [B, T, N, K, H, D]` in place; `back` by minus the angles."""
    if choice.uses_kernels(x):
        from zeroi2v_kernels.rotary_triton import turn_in_place

        if turn_in_place(x, table, parts, back):
            return
    cosines, sines = table[:, :, None, None]  # [P, 1, 1, D/2] each
    sines = -sines if back else sines
    for clip in x[:, :, x.shape[2] - table.shape[1] :, :parts]:  # one by one: it stays in cache
        first, second = clip.chunk(2, dim=-1)
        turned = first * cosines - second * sines, second * cosines + first * sines
        first.copy_(turned[0])
        second.copy_(turned[1])


@operator("zeroi2v::rotated")
def _rotated(x: Tensor, table: Tensor, parts: int, back: bool) -> Tensor:
    """A copy of x, turned."""
    out = x.clone(memory_format=torch.contiguous_format)
    turn_(out, table, parts, back)
    return out


@_rotated.op.register_fake
def _(x, table, parts, back):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    _, table, ctx.parts, ctx.back = inputs
    ctx.save_for_backward(table)


def _backward(ctx, grad):
    (table,) = ctx.saved_tensors
    return _rotated(grad, table, ctx.parts, not ctx.back), None, None, None


_rotated.op.register_autograd(_backward, setup_context=_save)
