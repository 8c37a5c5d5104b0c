"""Residual add and norm in one pass over memory, forward and backward, in Triton.

    total = x + residual,   normed = (total - mean) / sqrt(var + eps) * weight + bias

over the last axis of `x [..., C]`. An RMS norm takes zero for the mean, and the mean square for the
variance. Statistics and arithmetic are in float32 whatever the dtype. Backward, for gradients g of
`normed` and t of `total`, with y the normalised total, and no mean(g weight) for RMS:

    dx = dresidual = t + (g weight - mean(g weight) - y mean(g weight y)) / sqrt(var + eps)

Weight and bias gradients are summed in float32 by a fixed set of programs, then over programs:
no atomics, so two runs agree bit for bit. Importing this module imports triton.

Source: LayerNorm, arXiv 1607.06450; RMSNorm, arXiv 1910.07467.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from zeroi2v_kernels import bounds, proof
from zeroi2v_kernels.device import ceil_div, on_device, operator, packed
from zeroi2v_kernels.dot import INTERPRET
from zeroi2v_kernels.launch import Launcher

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARPS = 4
SUMMER_WARPS = 8  # of programs that sum weight gradients
TILE_ROWS = 2  # of a program's tile
_SUMMERS = 4 if INTERPRET else 512  # how many of those


def add_norm_reference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    centres: bool = True,
) -> tuple[Tensor, Tensor]:
    """The definition of the op, in plain PyTorch. Arguments and result as in `add_norm`."""
    total = x if residual is None else x + residual
    wide = torch.promote_types(x.dtype, torch.float32)
    normed = total.to(wide)
    if centres:
        normed = normed - normed.mean(-1, keepdim=True)
    normed = normed * (normed.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (normed * weight.to(wide) + bias.to(wide)).to(x.dtype), total


def add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    centres: bool = True,
) -> tuple[Tensor, Tensor]:
    """`(normed, total)` of `x [..., C]` and `residual` of its shape and dtype, or None.

    `weight` and `bias` are `[C]`, of any floating dtype. `centres` is true for a layer norm, false
    for an RMS norm. Without a residual `total` is `x`.
    Raises ValueError for a shape, dtype or device that does not fit.
    """
    if residual is not None and (residual.shape, residual.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"residual must be {list(x.shape)} of {x.dtype}: "
            f"got {list(residual.shape)} of {residual.dtype}"
        )
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != x.shape[-1:]:
            raise ValueError(f"{name} must be [{x.shape[-1]}]: got {list(tensor.shape)}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16: got {x.dtype}")
    if not (x.is_cuda or INTERPRET):
        raise ValueError(f"x must be on a CUDA device: got {x.device}")
    normed, total, _, _ = norm_forward(x, residual, weight, bias, eps, centres, x.dtype)
    return normed, x if residual is None else total


@triton.jit(do_not_specialize=["num_rows"])
def _norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, normed_ptr, total_ptr, mean_ptr, rstd_ptr,
    num_rows, eps,
    C: tl.constexpr, HAS_RESIDUAL: tl.constexpr, CENTRES: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_C)
    mask = (rows[:, None] < num_rows) & (columns[None, :] < C)
    offsets = rows[:, None] * C + columns[None, :]
    total = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_C]
    if HAS_RESIDUAL:
        total += tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offsets, rounded, mask=mask)
        total = rounded.to(tl.float32)  # what is normalised is what goes on
    mean = tl.sum(total, 1) / C if CENTRES else tl.zeros((ROWS,), tl.float32)
    centred = tl.where(mask, total - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    tl.store(normed_ptr + offsets, normed.to(normed_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + rows, mean, mask=rows < num_rows)
    tl.store(rstd_ptr + rows, rstd, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_bwd_kernel(
    grad_ptr, total_grad_ptr, total_ptr, mean_ptr, rstd_ptr, weight_ptr,
    out_ptr, weight_sums_ptr, bias_sums_ptr, num_rows,
    C: tl.constexpr, HAS_TOTAL_GRAD: tl.constexpr, CENTRES: tl.constexpr, SUMS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + columns, mask=columns < C, other=0.0).to(tl.float32)[None, :]
    if SUMS:
        weight_sum = tl.zeros((BLOCK_C,), tl.float32)
        bias_sum = tl.zeros((BLOCK_C,), tl.float32)
    first = tl.program_id(0).to(tl.int64) * ROWS
    for start in tl.range(first, num_rows, tl.num_programs(0) * ROWS):
        rows = start + tl.arange(0, ROWS)
        mask = (rows[:, None] < num_rows) & (columns[None, :] < C)
        offsets = rows[:, None] * C + columns[None, :]
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_C]
        total = tl.load(total_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < num_rows, other=0.0)
        rstd = tl.load(rstd_ptr + rows, mask=rows < num_rows, other=0.0)
        y = tl.where(mask, (total - mean[:, None]) * rstd[:, None], 0.0)
        scaled = grad * weight
        dx = scaled - y * (tl.sum(scaled * y, 1) / C)[:, None]
        if CENTRES:
            dx -= (tl.sum(scaled, 1) / C)[:, None]
        dx *= rstd[:, None]
        if HAS_TOTAL_GRAD:
            dx += tl.load(total_grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + offsets, dx.to(out_ptr.dtype.element_ty), mask=mask)
        if SUMS:
            weight_sum += tl.sum(grad * y, 0)
            bias_sum += tl.sum(grad, 0)
    if SUMS:
        sums = tl.program_id(0) * C + columns
        tl.store(weight_sums_ptr + sums, weight_sum, mask=columns < C)
        tl.store(bias_sums_ptr + sums, bias_sum, mask=columns < C)


@operator("zeroi2v::norm_forward")
def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    centres: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`normed` in `dtype`, `total` in the residual's (empty without one), and float32 statistics.

    These are mean and 1 / deviation, `[...]`. `x` and `residual` may differ in dtype.
    """
    outputs = _outputs(x, residual, dtype)
    dtypes = (x.dtype, None if residual is None else residual.dtype, weight.dtype, bias.dtype)
    rest = (centres, dtype, x.shape[-1])
    key = ("norm", x.device, *dtypes, *rest)
    if not proof.trusted(key, x.device, lambda: _forward_trial(*dtypes, *rest)):
        return _plain(x, residual, weight, bias, eps, centres, dtype)
    _run_forward(x, residual, weight, bias, eps, centres, *outputs)
    return outputs


def _plain(x, residual, weight, bias, eps, centres, dtype) -> tuple[Tensor, ...]:
    """`norm_forward` in PyTorch, in float32."""
    total = x if residual is None else (x.float() + residual.float()).to(residual.dtype)
    wide = total.float()
    mean = wide.mean(-1) if centres else wide.new_zeros(wide.shape[:-1])
    centred = wide - mean[..., None]
    rstd = (centred.square().mean(-1) + eps).rsqrt()
    normed = centred * rstd[..., None] * weight.float() + bias.float()
    total = x.new_empty(0) if residual is None else total.contiguous()
    return normed.to(dtype).contiguous(), total, mean, rstd


def _run_forward(x, residual, weight, bias, eps, centres, normed, total, mean, rstd) -> None:
    num_rows = mean.numel()
    if num_rows:
        residual_dtype = None if residual is None else residual.dtype
        dtypes = (residual_dtype, weight.dtype, bias.dtype, normed.dtype)
        key = (x.device, x.shape[-1], centres, x.dtype, *dtypes)
        launch = _forward_launcher(_norm_fwd_kernel, *key)
        with on_device(x):
            launch(
                (ceil_div(num_rows, TILE_ROWS),),
                x_ptr=packed(x),
                residual_ptr=packed(residual),
                weight_ptr=packed(weight),
                bias_ptr=packed(bias),
                normed_ptr=normed,
                total_ptr=total,
                mean_ptr=mean,
                rstd_ptr=rstd,
                num_rows=num_rows,
                eps=eps,
            )


@functools.cache
def _forward_launcher(kernel, device, columns, centres, x_dtype, residual_dtype, *_) -> Launcher:
    constants = dict(C=columns, HAS_RESIDUAL=residual_dtype is not None, CENTRES=centres)
    constants |= dict(ROWS=TILE_ROWS, BLOCK_C=triton.next_power_of_2(columns))
    return Launcher(kernel, constants, num_warps=WARPS)


def _forward_trial(x_dtype, residual_dtype, weight_dtype, bias_dtype, centres, dtype, columns):
    """The configuration of `_norm_fwd_kernel` for tensors of such dtypes."""
    name = f"{'layer' if centres else 'RMS'} norm forward C={columns} {x_dtype} "
    name += f"weights {weight_dtype} {bias_dtype} {dtype}"
    name += f" residual {residual_dtype}" * bool(residual_dtype)

    def trial(generator: torch.Generator) -> proof.Trial:
        x = 3 * proof.draw(generator, (7, columns), x_dtype) + 1
        residual = residual_dtype and proof.draw(generator, (7, columns), residual_dtype)
        weight = proof.draw(generator, (columns,), weight_dtype)
        bias = proof.draw(generator, (columns,), bias_dtype)
        normed, total, mean, rstd = _outputs(x, residual, dtype)
        totals = [] if residual is None else [total]

        def run(normed, *outputs):
            *sums, mean, rstd = outputs
            outputs = (normed, *(sums or [total]), mean, rstd)
            _run_forward(x, residual, weight, bias, 1e-5, centres, *outputs)

        truths = bounds.norm(x, residual, weight, bias, 1e-5, dtype, centres)
        return proof.Trial([normed, *totals, mean, rstd], run, truths)

    return proof.Configuration(name.replace("torch.", ""), (TILE_ROWS, WARPS), trial)


def _outputs(x, residual, dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed = x.new_empty(x.shape, dtype=dtype)
    total = x.new_empty(0) if residual is None else residual.new_empty(x.shape)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return normed, total, mean, rstd


@norm_forward.op.register_fake
def _(x, residual, weight, bias, eps, centres, dtype):
    return _outputs(x, residual, dtype)


@operator("zeroi2v::norm_backward")
def norm_backward(
    grad: Tensor,
    total_grad: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    centres: bool,
    sums: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of the sum, and if `sums` is set, in float32, those of weight and bias."""
    dtypes = [None if t is None else t.dtype for t in (grad, total_grad, total, weight)]
    rest = (centres, sums, total.shape[-1])
    key = ("norm gradient", total.device, *dtypes, *rest)
    if not proof.trusted(key, total.device, lambda: _backward_trial(*dtypes, *rest)):
        return _plain_gradients(grad, total_grad, total, mean, rstd, weight, centres, sums)
    outputs = _gradients(total, sums)
    _run_backward(grad, total_grad, total, mean, rstd, weight, centres, sums, *outputs)
    return outputs[0], outputs[1].sum(0), outputs[2].sum(0)


def _gradients(total: Tensor, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel writes: of the sum, and of weight and bias by program."""
    out = torch.empty_like(total, memory_format=torch.contiguous_format)
    columns = total.shape[-1]
    tiles = ceil_div(total.numel() // max(columns, 1), TILE_ROWS)
    shape = (min(tiles, _SUMMERS) if sums else 0, columns)
    return out, *(total.new_empty(shape, dtype=torch.float32) for _ in range(2))


def _run_backward(
    grad, total_grad, total, mean, rstd, weight, centres, sums, out, weight_sums, bias_sums
) -> None:
    num_rows = mean.numel()
    if num_rows:
        passed_dtype = None if total_grad is None else total_grad.dtype
        dtypes = (passed_dtype, grad.dtype, total.dtype, weight.dtype)
        key = (total.device, total.shape[-1], centres, sums, *dtypes)
        launch = _backward_launcher(_norm_bwd_kernel, *key)
        with on_device(total):
            launch(
                (weight_sums.shape[0] if sums else ceil_div(num_rows, TILE_ROWS),),
                grad_ptr=packed(grad),
                total_grad_ptr=packed(total_grad),
                total_ptr=packed(total),
                mean_ptr=packed(mean),
                rstd_ptr=packed(rstd),
                weight_ptr=packed(weight),
                out_ptr=out,
                weight_sums_ptr=weight_sums,
                bias_sums_ptr=bias_sums,
                num_rows=num_rows,
            )


@functools.cache
def _backward_launcher(kernel, device, columns, centres, sums, passed_dtype, *dtypes) -> Launcher:
    constants = dict(C=columns, HAS_TOTAL_GRAD=passed_dtype is not None, CENTRES=centres, SUMS=sums)
    constants |= dict(ROWS=TILE_ROWS, BLOCK_C=triton.next_power_of_2(columns))
    return Launcher(kernel, constants, num_warps=SUMMER_WARPS if sums else WARPS)


def _backward_trial(grad_dtype, passed_dtype, dtype, weight_dtype, centres, sums, columns):
    """The configuration of `_norm_bwd_kernel` for tensors of such dtypes."""
    name = f"{'layer' if centres else 'RMS'} norm backward C={columns} {grad_dtype} of {dtype} "
    name += f"weights {weight_dtype}"
    name += f" passed {passed_dtype}" * bool(passed_dtype) + " sums" * sums

    def trial(generator: torch.Generator) -> proof.Trial:
        rows = 2 * _SUMMERS * TILE_ROWS + 1 if sums else 7  # the programs that sum go round
        total = 3 * proof.draw(generator, (rows, columns), dtype) + 1
        grad = proof.draw(generator, (rows, columns), grad_dtype)
        passed = passed_dtype and proof.draw(generator, (rows, columns), passed_dtype)
        weight = proof.draw(generator, (columns,), weight_dtype)
        wide = total.float()
        mean = wide.mean(-1) if centres else wide.new_zeros(rows)
        rstd = ((wide - mean[:, None]).square().mean(-1) + 1e-5).rsqrt()
        inputs = (grad, passed, total, mean, rstd, weight, centres)
        out, *by_program = _gradients(total, sums)

        def run(out, *summed):
            parts = [torch.full_like(x, float("nan")) for x in by_program]
            _run_backward(*inputs, sums, out, *parts)
            for whole, part in zip(summed, parts, strict=False):
                whole.copy_(part.sum(0))

        wanted = [x.new_empty(columns) for x in by_program] if sums else []
        truths = bounds.norm_gradient(*inputs)[: 1 + len(wanted)]
        return proof.Trial([out, *wanted], run, list(truths))

    settings = (TILE_ROWS, _SUMMERS, SUMMER_WARPS if sums else WARPS)
    return proof.Configuration(name.replace("torch.", ""), settings, trial)


def _plain_gradients(grad, total_grad, total, mean, rstd, weight, centres, sums):
    """`norm_backward` in PyTorch, in float32."""
    y = (total.float() - mean[..., None]) * rstd[..., None]
    scaled = grad.float() * weight.float()
    out = scaled - y * (scaled * y).mean(-1, keepdim=True)
    if centres:
        out = out - scaled.mean(-1, keepdim=True)
    out = out * rstd[..., None]
    if total_grad is not None:
        out = out + total_grad.float()
    columns = total.shape[-1]
    if sums:
        dweight, dbias = (x.reshape(-1, columns).sum(0) for x in (grad.float() * y, grad.float()))
    else:
        dweight, dbias = (out.new_zeros(columns) for _ in range(2))
    return out.to(total.dtype).contiguous(), dweight, dbias


@norm_backward.op.register_fake
def _(grad, total_grad, total, mean, rstd, weight, centres, sums):
    width = total.shape[-1]
    of_weights = (grad.new_empty(width, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(total, memory_format=torch.contiguous_format), *of_weights


def _save(ctx, inputs, output):
    x, residual, weight, _, _, ctx.centres, _ = inputs
    _, total, mean, rstd = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, inputs[3].dtype
    ctx.has_residual = residual is not None
    ctx.save_for_backward(x if residual is None else total, mean, rstd, weight)


def _backward(ctx, grad, total_grad, *_):
    total, mean, rstd, weight = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(total)
    if not ctx.has_residual:
        total_grad = None
    sums = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    rest = (weight, ctx.centres, sums)
    out, dweight, dbias = norm_backward(grad, total_grad, total, mean, rstd, *rest)
    return (
        out.to(ctx.x_dtype),
        out if ctx.has_residual else None,
        dweight.to(weight.dtype) if ctx.needs_input_grad[2] else None,
        dbias.to(ctx.bias_dtype) if ctx.needs_input_grad[3] else None,
        None,
        None,
        None,
    )


norm_forward.op.register_autograd(_backward, setup_context=_save)


def shipped(device: torch.device) -> Iterator[proof.Configuration]:
    """What `shipped.prove_shipped` proves of norms."""
    streams = [(dtype, dtype) for dtype in _DTYPES] + [(torch.bfloat16, torch.float32)]
    kinds = [(True, 768), (True, 1024), (False, 1024)]  # RMS is AIMv2's
    for (centres, columns), (dtype, stream), is_sum in product(kinds, streams, (False, True)):
        residual = stream if is_sum else None
        x_dtype = dtype if is_sum else stream
        weights = (torch.float32, torch.float32)
        yield _forward_trial(x_dtype, residual, *weights, centres, dtype, columns)
        yield _backward_trial(dtype, residual, stream, torch.float32, centres, is_sum, columns)
