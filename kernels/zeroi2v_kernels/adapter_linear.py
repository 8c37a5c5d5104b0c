"""The arithmetic of a frozen linear layer with a linear adapter before or after it, for training.

    before:  out = linear(adapter(x))         linear(x) = x W^T + b
    after:   out = adapter(linear(x))         adapter(x) = x + s (d U^T + b_up)
                                              d = mask * (x D^T + b_down)

The mask is 0 or 1 / (1 - p), drawn from a seed and never stored. W and b have no gradient. For an
adapter's input x, gradient g of its output, and R the rank:

    dd = mask * s (g U),   dx = g + dd D                                            `adapt_grad`
    dU = s g^T d,  db_up = s sum g,  dD = dd^T x,  db_down = sum dd            `parameter_grads`

What is exact and cheapest depends on the place, in MACs per token forward and backward, of width^2
with R = width / 4 (in brackets what the two layers one after the other take):

    before qkv   7.5            7.25 merged on the fly
    after proj   3.5            3.0 merged; and p = linear(x) need not be kept,
                                since dd^T p = (dd^T x) W^T + sum(dd) b^T
    before fc1   9.5            9.25 merged
    after fc2    9.5            p is kept, a quarter as wide as x

Merging costs 2 R in out or 4 R in out MACs whatever the number of tokens, so it pays from
2 out_features tokens on, and is valid only without dropout: then the forward runs on W' while the
gradients keep to the bottleneck. W' is formed in float32.

On a GPU the way up, x + s (d U^T + b_up) or g + dd D, is one Triton kernel, which gives the sums
of g besides; the dropout is another, which gives those of dd (`adapter_linear_triton.py`).

Source: ZeroI2V (arXiv 2310.01324), section 3.3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroi2v_kernels import choice
from zeroi2v_kernels.device import packed


class Adapter(NamedTuple):
    """Weights of a linear adapter, and its factor."""

    down: Tensor
    """D `[R, C]`."""
    down_bias: Tensor
    up: Tensor
    """U `[C, R]`."""
    up_bias: Tensor
    scale: float


class Dropout(NamedTuple):
    """A dropout that can be drawn again."""

    probability: float = 0.0
    """Is rounded to a multiple of 2^-16."""
    seed: Tensor | None = None
    """One int64; None for probability 0."""
    place: int = 0
    """Which of the dropouts of this seed: each draws its own numbers."""

    @property
    def dropped(self) -> int:
        """The probability in 2^-16."""
        return round(self.probability * 2**16)


def adapter_reference(x: Tensor, adapter: Adapter, mask: Tensor | None = None) -> Tensor:
    """The definition of an adapter, in plain PyTorch, for a dropout mask `[..., R]` or None."""
    d = F.linear(x, adapter.down, adapter.down_bias)
    if mask is not None:
        d = d * mask
    return x + adapter.scale * F.linear(d, adapter.up, adapter.up_bias)


def merge(weight: Tensor, bias: Tensor, adapter: Adapter, after: bool) -> tuple[Tensor, Tensor]:
    """Weight and bias of layer and adapter as one layer, formed in float32 at least."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    w, b, down, down_bias, up, up_bias = (t.to(wide) for t in (weight, bias, *adapter[:4]))
    s = adapter.scale
    if after:
        merged = torch.addmm(w, up, down.mm(w), alpha=s)
        shift = b + s * (up.mv(down.mv(b) + down_bias) + up_bias)
    else:
        through = w.mm(up)
        merged = torch.addmm(w, through, down, alpha=s)
        shift = b + s * (through.mv(down_bias) + w.mv(up_bias))
    return merged.to(weight.dtype), shift.to(bias.dtype)


def bottleneck(x: Tensor, adapter: Adapter, dropout: Dropout) -> Tensor:
    """d `[n, R]` of the adapter's input `x [n, C]`."""
    return _drop(torch.addmm(adapter.down_bias, x, adapter.down.t()), dropout)[0]


def adapt(
    x: Tensor,
    adapter: Adapter,
    dropout: Dropout,
    residual: Tensor | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor]:
    """adapter(x) + residual for `x [n, C]`, and d `[n, R]`.

    `overwrite` allows the result to take the place of x. A residual keeps its dtype.
    """
    in_kernel = choice.uses_kernels(x) and _triton().takes(
        x, adapter.down.shape[0], False, residual
    )
    if in_kernel:
        x = packed(x)
    d = bottleneck(x, adapter, dropout)
    if in_kernel:
        up = (adapter.up, adapter.up_bias, adapter.scale)
        return _triton().add_up(x, d, *up, residual)[0], d
    if overwrite:
        out = x.addmm_(d, adapter.up.t(), alpha=adapter.scale)
    else:
        out = torch.addmm(x, d, adapter.up.t(), alpha=adapter.scale)
    out.add_(adapter.up_bias, alpha=adapter.scale)
    if residual is not None:
        out = out.add_(residual) if out.dtype == residual.dtype else out + residual
    return out, d


def adapt_grad(
    grad: Tensor, adapter: Adapter, dropout: Dropout
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """dx `[n, C]` and dd `[n, R]` for the gradient of the adapter's output.

    Then the sums of the rows of dd and of that gradient, `[R]` and `[C]`, in float32 at least.
    """
    in_kernel = choice.uses_kernels(grad) and _triton().takes(grad, adapter.down.shape[0], True)
    if in_kernel:
        grad = packed(grad)  # with beta 0 the first argument below counts for nothing
        d_grad = torch.addmm(adapter.down_bias, grad, adapter.up, beta=0, alpha=adapter.scale)
    else:
        d_grad = grad.mm(adapter.up)
        if adapter.scale != 1:
            d_grad *= adapter.scale
    d_grad, d_summands = _drop(d_grad, dropout)
    if in_kernel:
        x_grad, summands = _triton().add_up(grad, d_grad, adapter.down, None, 1.0)
    else:
        x_grad, summands = torch.addmm(grad, d_grad, adapter.down), grad
    return x_grad, d_grad, (_sum(d_summands), _sum(summands))


def parameter_grads(
    grad: Tensor,
    x: Tensor,
    d: Tensor,
    d_grad: Tensor,
    sums: tuple[Tensor, Tensor],
    scale: float,
    linear: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `down`, its bias, `up` and its bias; of biases in float32 at least.

    Args:
        grad: of the adapter's output, `[n, C]`.
        x: the adapter's input; or with `linear`, weight and bias, that layer's input.
        d: the bottleneck `[n, R]`.
        d_grad, sums: dd, and the sums of dd and of `grad`, as `adapt_grad` gives them.
        scale: the adapter's factor.
    """
    down_grad, (down_bias_grad, up_bias_grad) = d_grad.t().mm(x), sums
    if linear is not None:
        weight, bias = linear
        down_grad = down_grad.mm(weight.t()).addr_(down_bias_grad.to(bias.dtype), bias)
    up_grad = grad.t().mm(d)
    if scale != 1:
        up_grad *= scale
        up_bias_grad = up_bias_grad * scale
    return down_grad, down_bias_grad, up_grad, up_bias_grad


def merged_after_grad(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, adapter: Adapter
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Gradients of x and of the adapter's weights, for an adapter merged into the layer before it.

    Nothing but the layer's input x is needed: d = x (D W)^T + D b + b_down.
    """
    down_bias = torch.addmv(adapter.down_bias, adapter.down, bias)
    d = torch.addmm(down_bias, x, adapter.down.mm(weight).t())
    d_grad = grad.mm(adapter.up).mul_(adapter.scale)
    sums = (_sum(d_grad), _sum(grad))
    grads = parameter_grads(grad, x, d, d_grad, sums, adapter.scale, (weight, bias))
    return grad.mm(merge(weight, bias, adapter, after=True)[0]), grads


def dropout_mask(like: Tensor, dropout: Dropout) -> Tensor:
    """0 or 1 / (1 - p), in shape `[n, R]`, dtype and device of `like`.

    Each 16 bits make a decision: on the CPU of 64-bit random numbers, on a GPU of Philox's words.
    """
    if choice.uses_kernels(like):
        return _triton().dropout(torch.ones_like(like), *_drawn(dropout))[0]
    generator = torch.Generator(like.device).manual_seed(int(dropout.seed) + dropout.place)
    words = torch.empty((like.numel() + 3) // 4, dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)
    numbers = words.view(torch.int16)[: like.numel()].view(like.shape)
    kept = numbers >= dropout.dropped - 2**15
    return kept.to(like.dtype).mul_(2**16 / (2**16 - dropout.dropped))


def _triton():
    """The kernels, whose import imports triton."""
    from zeroi2v_kernels import adapter_linear_triton

    return adapter_linear_triton


def _drawn(dropout: Dropout) -> tuple[int, Tensor | None, int]:
    return dropout.dropped, dropout.seed, dropout.place


def _drop(d: Tensor, dropout: Dropout) -> tuple[Tensor, Tensor]:
    """Applies the mask, where d may be written over; then d again, or fewer rows of its sum."""
    if dropout.probability and choice.uses_kernels(d):
        return _triton().dropout(d, *_drawn(dropout))
    if dropout.probability:
        d = d.mul_(dropout_mask(d, dropout))
    return d, d


def _sum(x: Tensor) -> Tensor:
    """Sum of the rows, in float32 at least."""
    return x.sum(0, dtype=torch.promote_types(x.dtype, torch.float32))
