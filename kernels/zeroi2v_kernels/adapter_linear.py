"""A frozen linear layer with a linear adapter before or after it, for training.

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
from zeroi2v_kernels.device import packed, without_autocast


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


def adapter_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    adapter: Adapter,
    after: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """The definition of the op, in plain PyTorch, for a dropout mask `[..., R]` or None."""
    if not after:
        x = _reference(x, adapter, mask)
    x = F.linear(x, weight, bias)
    return _reference(x, adapter, mask) if after else x


def _reference(x: Tensor, adapter: Adapter, mask: Tensor | None) -> Tensor:
    d = F.linear(x, adapter.down, adapter.down_bias)
    if mask is not None:
        d = d * mask
    return x + adapter.scale * F.linear(d, adapter.up, adapter.up_bias)


def adapter_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    adapter: Adapter,
    after: bool = False,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """The frozen linear layer with the adapter before it, or `after` it.

    Args:
        x: `[..., in]`.
        weight, bias: `[out, in]`, `[out]`; without gradient.
        adapter: of `in` channels, or of `out` if it comes after.
        dropout: probability of zeroing an element of the bottleneck.
        seed: of the dropout, one int64 on the device of `x`; None draws it.

    Returns:
        `[..., out]`. All tensors are of one dtype and device; autocast casts them to its own.

    Raises:
        ValueError: a shape or dtype that does not fit, or a weight that requires a gradient.
    """
    if not x.is_meta and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (t.to(dtype) for t in (x, weight, bias))
        adapter = Adapter(*(t.to(dtype) for t in adapter[:4]), adapter.scale)
    if weight.ndim != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"weight must be [out, {x.shape[-1]}]: got {list(weight.shape)}")
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}]: got {list(bias.shape)}")
    width, rank = weight.shape[0 if after else 1], adapter.down.shape[0]
    shapes = dict(down=(rank, width), down_bias=(rank,), up=(width, rank), up_bias=(width,))
    for name, shape in shapes.items():
        tensor = getattr(adapter, name)
        if tensor.shape != shape:
            raise ValueError(f"adapter.{name} must be {list(shape)}: got {list(tensor.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.requires_grad:
            raise ValueError(f"{name} must be frozen: got one that requires a gradient")
    for tensor in (weight, bias, *adapter[:4]):
        if tensor.dtype != x.dtype:
            raise ValueError(f"weights must be {x.dtype} like x: got {tensor.dtype}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1): got {dropout}")
    if dropout and seed is None:
        seed = torch.randint(2**62, (), device=x.device)
    rows = x.reshape(-1, x.shape[-1])
    merged = dropout == 0 and choice.merging_pays(rows.shape[0], weight)
    out = adapter_linear_forward(
        rows, weight, bias, list(adapter[:4]), seed, adapter.scale, after, dropout, merged
    )[0]
    return out.view(*x.shape[:-1], -1)


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


@torch.library.custom_op("zeroi2v::adapter_linear_forward", mutates_args=())
@without_autocast
def adapter_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    adapter: Sequence[Tensor],
    seed: Tensor | None,
    scale: float,
    after: bool,
    dropout: float,
    merged: bool,
) -> list[Tensor]:
    """out `[n, out]` for `x [n, in]`, and what backward needs besides: d and p, as `_kept` says."""
    parts, drop = Adapter(*adapter, scale), Dropout(dropout, seed)
    if merged:
        weight, bias = merge(weight, bias, parts, after)
        return [torch.addmm(bias, x, weight.t())]
    if after:
        p = torch.addmm(bias, x, weight.t())
        keeps_p = _keeps_output(weight)
        out, d = adapt(p, parts, drop, overwrite=not keeps_p)
        return [out, d, p] if keeps_p else [out, d]
    adapted, d = adapt(x, parts, drop)
    return [torch.addmm(bias, adapted, weight.t()), d]


def _keeps_output(weight: Tensor) -> bool:
    """Whether a layer's output is kept for the adapter behind it rather than its input."""
    return weight.shape[1] > weight.shape[0]


@torch.library.custom_op("zeroi2v::adapter_linear_backward", mutates_args=())
@without_autocast
def adapter_linear_backward(
    grad: Tensor,
    source: Tensor,
    d: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    adapter: Sequence[Tensor],
    seed: Tensor | None,
    scale: float,
    after: bool,
    dropout: float,
) -> list[Tensor]:
    """Gradients of x and of the adapter's weights; `source` is x, or p if that is what is kept."""
    parts, drop = Adapter(*adapter, scale), Dropout(dropout, seed)
    if after and d is None:
        x_grad, grads = merged_after_grad(grad, source, weight, bias, parts)
    elif after:
        through = None if _keeps_output(weight) else (weight, bias)
        p_grad, d_grad, sums = adapt_grad(grad, parts, drop)
        grads = parameter_grads(grad, source, d, d_grad, sums, scale, through)
        x_grad = p_grad.mm(weight)
    else:
        if d is None:
            d = bottleneck(source, parts, drop)
        grad = grad.mm(weight)
        x_grad, d_grad, sums = adapt_grad(grad, parts, drop)
        grads = parameter_grads(grad, source, d, d_grad, sums, scale)
    return [x_grad, *(g.to(w.dtype) for g, w in zip(grads, adapter, strict=True))]


@adapter_linear_forward.register_fake
def _(x, weight, bias, adapter, seed, scale, after, dropout, merged):
    out = x.new_empty(x.shape[0], weight.shape[0])
    if merged:
        return [out]
    d = x.new_empty(x.shape[0], adapter[0].shape[0])
    return [out, d, torch.empty_like(out)] if after and _keeps_output(weight) else [out, d]


@adapter_linear_backward.register_fake
def _(grad, source, d, weight, bias, adapter, seed, scale, after, dropout):
    return [
        grad.new_empty(grad.shape[0], weight.shape[1]),
        *(w.new_empty(w.shape) for w in adapter),
    ]


def _save(ctx, inputs, output):
    x, weight, bias, adapter, seed, ctx.scale, ctx.after, ctx.dropout, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    d = output[1] if len(output) > 1 else None
    source = output[2] if len(output) > 2 else x
    ctx.save_for_backward(source, d, weight, bias, seed, *adapter)


def _backward(ctx, grads):
    source, d, weight, bias, seed, *adapter = ctx.saved_tensors
    x_grad, *adapter_grads = adapter_linear_backward(
        grads[0].contiguous(), source, d, weight, bias, adapter, seed,
        ctx.scale, ctx.after, ctx.dropout,
    )  # fmt: skip
    return x_grad, None, None, adapter_grads, *[None] * 5


adapter_linear_forward.register_autograd(_backward, setup_context=_save)
