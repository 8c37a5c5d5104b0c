"""Bias and activation in one pass over memory, forward and backward, in Triton.

    out = act(x + bias)     quick_gelu: act(u) = u sigmoid(1.702 u)
                            gelu:       act(u) = u (1 + erf(u / sqrt 2)) / 2
                            gelu_tanh:  act(u) = u (1 + tanh(sqrt(2 / pi) (u + 0.044715 u^3))) / 2
                            swiglu:     act(u, v) = u sigmoid(u) v, for x of gates u, then values v

Written in PyTorch, QuickGELU reads and writes its operand seven times. The backward pass computes
act'(x + bias) again from x. Arithmetic is in float32. Importing this module imports triton.

Source: QuickGELU is CLIP's (arXiv 2103.00020, its released model.py); GELU, arXiv 1606.08415;
SwiGLU, arXiv 2002.05202.
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
from zeroi2v_kernels.activation_reference import activate, activate_grad
from zeroi2v_kernels.device import ceil_div, on_device, operator, packed
from zeroi2v_kernels.dot import INTERPRET
from zeroi2v_kernels.launch import Launcher

KINDS = ("quick_gelu", "gelu", "gelu_tanh", "swiglu")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = (4, 1024)  # rows and columns of a program's tile
WARPS = 8


def bias_activation_reference(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The definition of the op, in plain PyTorch. Arguments and result as in `bias_activation`."""
    return activate(x if bias is None else x + bias, kind)


def bias_activation(x: Tensor, bias: Tensor | None = None, kind: str = "quick_gelu") -> Tensor:
    """`act(x + bias)` of `x [..., C]` and `bias [C]`, in the dtype of `x`; for swiglu `[..., C/2]`.

    Raises ValueError for a shape, dtype, device or kind that does not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}: got {kind!r}")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias must be [{x.shape[-1]}]: got {list(bias.shape)}")
    if kind == "swiglu" and x.shape[-1] % 2:
        raise ValueError(f"x must have gates and values for swiglu: got {x.shape[-1]} channels")
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be float32, bfloat16 or float16: got {x.dtype}")
    if not (x.is_cuda or INTERPRET):
        raise ValueError(f"x must be on a CUDA device: got {x.device}")
    return activation_forward(x, bias, kind)


@triton.jit
def _tile(COLUMNS, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Row and column numbers of this program's tile: [BLOCK_ROWS, 1], [1, BLOCK_COLUMNS]."""
    blocks = tl.cdiv(COLUMNS, BLOCK_COLUMNS)
    program = tl.program_id(0)
    rows = (program // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    columns = program % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    return rows[:, None], columns[None, :]


@triton.jit
def _sigmoid_and_slope(u, KIND: tl.constexpr):
    """Factor s of act(u) = u s, and act'(u), for a tile u of float32."""
    if KIND == "gelu":
        s = 0.5 + 0.5 * tl.erf(u * 0.7071067811865476)
        slope = s + u * 0.3989422804014327 * tl.exp(-0.5 * u * u)
    elif KIND == "gelu_tanh":  # (1 + tanh z) / 2 is sigmoid(2 z)
        z = 1.5957691216057308 * u * (1 + 0.044715 * u * u)
        s = tl.sigmoid(z)
        # 1 - s would lose its digits where it is multiplied by a large factor.
        slope = s + s * tl.sigmoid(-z) * 1.5957691216057308 * u * (1 + 0.134145 * u * u)
    else:
        factor = 1.702 if KIND == "quick_gelu" else 1.0
        s = tl.sigmoid(factor * u)
        slope = s * (1 + factor * u * (1 - s))
    return s, slope


@triton.jit(do_not_specialize=["num_rows"])
def _activation_fwd_kernel(
    x_ptr, bias_ptr, out_ptr, num_rows,
    COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, KIND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns = _tile(COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    inside = columns < COLUMNS
    mask = (rows < num_rows) & inside
    PARTS: tl.constexpr = 2 if KIND == "swiglu" else 1
    offsets = rows * (PARTS * COLUMNS) + columns
    u = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    s, _ = _sigmoid_and_slope(u, KIND)
    out = u * s
    if KIND == "swiglu":
        v = tl.load(x_ptr + offsets + COLUMNS, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            v += tl.load(bias_ptr + COLUMNS + columns, mask=inside, other=0.0).to(tl.float32)
        out *= v
    tl.store(out_ptr + rows * COLUMNS + columns, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _activation_bwd_kernel(
    grad_ptr, x_ptr, bias_ptr, out_ptr, num_rows,
    COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr, KIND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    rows, columns = _tile(COLUMNS, BLOCK_ROWS, BLOCK_COLUMNS)
    inside = columns < COLUMNS
    mask = (rows < num_rows) & inside
    PARTS: tl.constexpr = 2 if KIND == "swiglu" else 1
    offsets = rows * (PARTS * COLUMNS) + columns
    u = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + rows * COLUMNS + columns, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    s, slope = _sigmoid_and_slope(u, KIND)
    if KIND == "swiglu":
        v = tl.load(x_ptr + offsets + COLUMNS, mask=mask, other=0.0).to(tl.float32)
        if HAS_BIAS:
            v += tl.load(bias_ptr + COLUMNS + columns, mask=inside, other=0.0).to(tl.float32)
        of_v = (grad * u * s).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offsets + COLUMNS, of_v, mask=mask)
        grad *= v
    tl.store(out_ptr + offsets, (grad * slope).to(out_ptr.dtype.element_ty), mask=mask)


def _run(
    x: Tensor, bias: Tensor | None, kind: str, out: Tensor, grad: Tensor | None = None
) -> None:
    """Writes the activation of `x + bias` to `out`, or with `grad` the gradient of x."""
    kernel = _activation_fwd_kernel if grad is None else _activation_bwd_kernel
    columns = x.shape[-1] // _parts(kind)
    num_rows = x.numel() // max(x.shape[-1], 1)
    if num_rows and columns:
        key = (x.device, x.dtype, None if bias is None else bias.dtype, columns, kind)
        launch = _launcher(kernel, *key)
        with on_device(x):
            launch(
                (ceil_div(num_rows, BLOCK[0]) * ceil_div(columns, BLOCK[1]),),
                **({} if grad is None else dict(grad_ptr=packed(grad))),
                x_ptr=packed(x),
                bias_ptr=packed(bias),
                out_ptr=out,
                num_rows=num_rows,
            )


def _parts(kind: str) -> int:
    """How many times as wide the input is as the output."""
    return 2 if kind == "swiglu" else 1


@functools.cache
def _launcher(kernel, device, dtype, bias_dtype, columns, kind) -> Launcher:
    constants = dict(COLUMNS=columns, HAS_BIAS=bias_dtype is not None, KIND=kind)
    constants |= dict(BLOCK_ROWS=BLOCK[0], BLOCK_COLUMNS=BLOCK[1])
    return Launcher(kernel, constants, num_warps=WARPS)


def _trusted(kernel, x: Tensor, bias: Tensor | None, kind: str) -> bool:
    dtypes = (x.dtype, None if bias is None else bias.dtype)
    key = (kernel, x.device, *dtypes, x.shape[-1], kind)
    return proof.trusted(key, x.device, lambda: _configuration(kernel, *dtypes, x.shape[-1], kind))


def _configuration(kernel, dtype, bias_dtype, columns: int, kind: str) -> proof.Configuration:
    direction = "forward" if kernel is _activation_fwd_kernel else "backward"
    name = f"{kind} {direction} C={columns} {dtype}" + f" bias {bias_dtype}" * bool(bias_dtype)

    def trial(generator: torch.Generator) -> proof.Trial:
        x = 3 * proof.draw(generator, (9, columns), dtype)
        grad = 3 * proof.draw(generator, (9, columns // _parts(kind)), dtype)
        bias = bias_dtype and proof.draw(generator, (columns,), bias_dtype)
        grads = [] if direction == "forward" else [grad]
        return proof.Trial(
            [torch.empty_like(grad if direction == "forward" else x)],
            lambda out: _run(x, bias, kind, out, *grads),
            [bounds.activation(x, bias, kind, *grads)],
        )

    return proof.Configuration(name.replace("torch.", ""), (BLOCK, WARPS), trial)


@operator("zeroi2v::activation_forward")
def activation_forward(x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """`bias_activation` without its checks."""
    if not _trusted(_activation_fwd_kernel, x, bias, kind):
        wide = None if bias is None else bias.float()
        return bias_activation_reference(x.float(), wide, kind).to(x.dtype).contiguous()
    out = _fake_forward(x, bias, kind)
    _run(x, bias, kind, out)
    return out


@activation_forward.op.register_fake
def _fake_forward(x, bias, kind):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // _parts(kind))


@operator("zeroi2v::activation_backward")
def activation_backward(grad: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """Gradient of x for that of the output."""
    if not _trusted(_activation_bwd_kernel, x, bias, kind):
        return _plain_gradient(grad, x, bias, kind)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run(x, bias, kind, out, grad.to(x.dtype))
    return out


def _plain_gradient(grad: Tensor, x: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """`activation_backward` in PyTorch, in float32."""
    u = x.float() if bias is None else x.float() + bias.float()
    out = activate_grad(grad.to(torch.float32, copy=True), u, kind)
    return out.to(x.dtype).contiguous()


@activation_backward.op.register_fake
def _(grad, x, bias, kind):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    x, bias, ctx.kind = inputs
    ctx.save_for_backward(x, bias)


def _backward(ctx, grad):
    x, bias = ctx.saved_tensors
    x_grad = activation_backward(grad, x, bias, ctx.kind)
    bias_grad = None
    if ctx.needs_input_grad[1]:
        bias_grad = x_grad.flatten(0, -2).sum(0, dtype=torch.float32).to(bias.dtype)
    return x_grad, bias_grad, None


activation_forward.op.register_autograd(_backward, setup_context=_save)


def shipped(device: torch.device) -> Iterator[proof.Configuration]:
    """What `shipped.prove_shipped` proves of activations."""
    kernels = (_activation_fwd_kernel, _activation_bwd_kernel)
    for kernel, kind, has_bias, dtype in product(kernels, KINDS, (False, True), _DTYPES):
        yield _configuration(kernel, dtype, dtype if has_bias else None, 3072, kind)
