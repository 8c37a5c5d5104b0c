"""What rounding may cost an op: budgets from the terms of its sums, the same on any machine.

The op's definition runs in float64 several times. In each run every operation gets noise of the
size that rounding has in the dtype of the op, uniform between minus and plus

    eps |result|                      for a result that is stored in that dtype
    sqrt(n) eps32 sum |terms|         for a sum of n terms, which is accumulated in float32

Autograd's backward passes through the same operations, so that gradients have budgets as well. What
the noise does to an output or a gradient, row by row, is what rounding may do to it: an op may err
by twice as much. No other implementation takes part, so nothing depends on which instructions
a processor has, or in which order a library adds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._decomp import get_decompositions
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
RUNS = 8
MARGIN = 2.0


def _var_mean(x: Tensor, dim: list[int], unbiased: bool = True, keepdim: bool = False):
    mean = x.mean(dim, keepdim=True)
    count = x.numel() // mean.numel()
    variance = (x - mean).square().sum(dim, keepdim=keepdim) / (count - unbiased)
    return variance, mean if keepdim else mean.squeeze(dim)


# Operations made of several that round.
COMPOSITE = get_decompositions(
    [
        aten.addmm, aten._softmax, aten._softmax_backward_data, aten.native_layer_norm,
        aten.native_layer_norm_backward,
    ]
) | {
    aten.var_mean.dim: _var_mean,
    aten.sigmoid_backward.default: lambda grad, y: grad * (y * (1 - y)),
}  # fmt: skip
SUMS = {aten.mm, aten.bmm, aten.sum, aten.mean}
ROUNDED = SUMS | {
    aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.exp, aten.sigmoid, aten.rsqrt,
    aten.square, aten.pow, aten.gelu, aten.gelu_backward, aten.silu, aten.silu_backward,
}  # fmt: skip
EXACT = {
    aten.clone, aten._to_copy, aten.detach, aten.stack, aten.cat, aten.index, aten._unsafe_view,
    aten.amax, aten.neg, aten.abs, aten.zeros, aten.zeros_like, aten.ones_like, aten.new_zeros,
    aten.new_empty_strided, aten.copy_, aten.zero_, aten.fill_, aten.select_backward,
    aten.slice_backward, aten.index_put, aten.randn, aten.promote_types,
}  # fmt: skip


class _Noise(TorchDispatchMode):
    """Within, operations on float64 tensors round as in `dtype`."""

    def __init__(self, dtype: torch.dtype, seed: int):
        super().__init__()
        self.eps, self.generator = torch.finfo(dtype).eps, torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in COMPOSITE:
            with self:
                return COMPOSITE[func](*args, **kwargs)
        out, name = func(*args, **kwargs), func.overloadpacket
        if func.is_view or name in EXACT:
            return out
        if name not in ROUNDED or func._schema.is_mutable:
            raise NotImplementedError(f"tests/helpers/rounding.py does not know how {func} rounds")
        size = self.eps * out.abs()
        if name in SUMS:
            terms = args[0].shape[-1] if len(args) > 1 and isinstance(args[1], Tensor) else (
                args[0].numel() // max(1, out.numel())
            )  # fmt: skip
            sizes = [arg.abs() if isinstance(arg, Tensor) else arg for arg in args]
            eps = torch.finfo(torch.float32).eps
            size = size + math.sqrt(terms) * eps * func(*sizes, **kwargs)
        draw = torch.rand(out.shape, generator=self.generator, dtype=out.dtype)
        return out + size * (2 * draw.to(out.device) - 1)


def values(function: Callable, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Outputs of `function`, then every gradient, for the same random weights in any dtype."""
    inputs = [t if t is None else t.detach().requires_grad_() for t in tensors]
    outs = function(*inputs)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(out.shape, generator=generator, dtype=torch.bfloat16).to(out) for out in outs
    ]
    inputs = [t for t in inputs if t is not None]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, weights)]


def excesses(
    actual: Sequence[Tensor],
    reference: Callable,
    tensors: Sequence[Tensor | None],
    dtype: torch.dtype | None = None,
) -> list[float]:
    """By how much each of `values` exceeds its budget: at most 1 within it, infinite for NaN.

    Args:
        actual: outputs and gradients, as `values` gives them, or outputs alone.
        reference: the definition, which runs in float64 on `tensors` widened.
        tensors: the inputs, as the op got them.
        dtype: in which the op computes, that of the first input unless told.
    """
    wide = [t if t is None else t.detach().double() for t in tensors]
    dtype = dtype or next(t.dtype for t in tensors if t is not None)
    truths = values(reference, wide)
    squares = [torch.zeros_like(_rows(truth)[:, 0]) for truth in truths]
    for run in range(RUNS):
        with _Noise(dtype, run):
            noisy = values(reference, wide)
        for square, value, truth in zip(squares, noisy, truths, strict=True):
            square += _rows(value - truth).square().mean(1) / RUNS
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    found = []
    for value, truth, square in zip(actual, truths, squares, strict=False):
        assert value.shape == truth.shape, f"{list(value.shape)} for {list(truth.shape)}"
        error = _rows(value.double() - truth).square().mean(1).sqrt()
        excess = error / (MARGIN * (square.sqrt() + tiny))
        found.append(excess.nan_to_num(math.inf, math.inf).max().item() if len(excess) else 0.0)
    return found


def assert_within_budget(
    op: Callable, reference: Callable, tensors: Sequence[Tensor | None]
) -> None:
    """Outputs and every gradient of `op` are those of `reference`, but for rounding."""
    actual = values(op, tensors)
    inputs = [t for t in tensors if t is not None]
    dtypes = [t.dtype for t in actual[-len(inputs) :]]
    assert dtypes == [t.dtype for t in inputs]
    found = excesses(actual, reference, tensors)
    assert max(found) <= 1, f"times the budget: {[f'{excess:.3g}' for excess in found]}"


def _rows(x: Tensor) -> Tensor:
    """`[rows, C]`; tensors of few columns are one row, since a row is judged by its mean square."""
    return x.flatten(0, -2) if x.ndim > 1 and x.shape[-1] >= 16 else x.reshape(1, -1)
