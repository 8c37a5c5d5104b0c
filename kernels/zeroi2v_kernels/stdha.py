"""Spatial-temporal dual-headed attention (STDHA): attention whose heads may read another frame.

Head `h` of frame `t` attends to the keys and values of frame

    s(t, h) = t + head_offsets[h]   if that frame exists, else t,

while queries stay where they are; a head of offset 0 is an ordinary spatial head:

    out[t, n, h] = sum_m softmax_m(scale * <query[t, n, h], key[s, m, h]>) value[s, m, h]

Layout: packed `qkv [B, T, N, 3, H, D]`, as one linear layer produces it, so that nothing is
rearranged before attention. Edge frames fall back to themselves, so the frame gather is no
permutation: its adjoint, used in the backward pass, sums over the zero, one or two frames that read
a frame.

On a GPU the Triton kernels of `stdha_triton.py` read the shifted keys and values where they lie.
On the CPU PyTorch's attention is called once over all heads, after moving the keys and values of
the shifted heads alone: 1.04x its time without shifts where the packed tensor may be overwritten,
1.11x where it may not. A call per group of heads (1.14x) and gathering keys and values of all heads
by frame index (1.5x) are slower. In bfloat16, on a processor whose products of it are faster than
that attention, the matrix products of `stdha_matmul.py` take 0.6x its time, shifts included.

Source: ZeroI2V (arXiv 2310.01324), section 3.2.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroi2v_kernels import choice, stdha_matmul
from zeroi2v_kernels.device import HALF, TRITON_DTYPES, TRITON_WIDTHS, operator
from zeroi2v_kernels.stdha_flash import attend_grouped, flash_attention

BACKENDS = ("triton", "flash", "matmul", "sdpa", "reference")

log = logging.getLogger(__name__)


def stdha_reference(qkv: Tensor, head_offsets: Sequence[int], scale: float | None = None) -> Tensor:
    """The definition of the op, in plain PyTorch. Arguments and result as in `stdha`."""
    num_frames, head_dim = qkv.shape[1], qkv.shape[-1]
    query, key, value = qkv.unbind(3)  # [B, T, N, H, D]
    sources = [source_frames(num_frames, offset) for offset in head_offsets]
    key, value = (
        torch.stack([x[:, frames, :, h] for h, frames in enumerate(sources)], dim=3)
        for x in (key, value)
    )
    scale = head_dim**-0.5 if scale is None else scale
    scores = torch.einsum("b t n h d, b t m h d -> b t h n m", query, key) * scale
    return torch.einsum("b t h n m, b t m h d -> b t n h d", scores.softmax(-1), value)


def source_frames(num_frames: int, offset: int) -> list[int]:
    """For each of `num_frames` frames, the frame whose keys a head of `offset` reads."""
    return [t + offset if 0 <= t + offset < num_frames else t for t in range(num_frames)]


def stdha(
    qkv: Tensor,
    head_offsets: Sequence[int],
    scale: float | None = None,
    backend: str | None = None,
    overwrite: bool = False,
    num_frames: int | None = None,
) -> Tensor:
    """Attention within each frame, the keys and values of head h coming from `head_offsets[h]` on.

    Under autocast queries, keys and values are cast to its dtype, as PyTorch's attention does.

    Args:
        qkv: packed queries, keys and values, `[B, T, N, 3, H, D]`, floating point; or, with
            `num_frames`, `[B*T, N, 3, H, D]`, as an image model has them.
        head_offsets: H ints, in frames.
        scale: positive factor on the scores; `D ** -0.5` by default.
        backend: what computes it, without fallback; None takes that of `choose_backend`.
            `triton`: the kernels of this package; float32, bfloat16 or float16, D 16, 32, 64 or
                128, on a CUDA device or in Triton's interpreter. A view whose rows do not start at
                multiples of 16 elements is copied first. Proven before it is used (`proof.py`): a
                wrong kernel is an error if named, and is replaced by `matmul` if chosen by None.
            `flash`: flash-attn 2, 3 or 4, one call per group of heads; half precision, CUDA.
            `matmul`: matrix products, one frame at a time.
            `sdpa`: PyTorch's fused attention, after moving the keys of the shifted heads.
            `reference`: the definition.
        overwrite: allow `qkv` to be modified, which saves `sdpa` a copy; only without autograd.
        num_frames: T, for a `qkv` whose clips and frames are one axis.

    Returns:
        `[B, T, N, H, D]`, or `[B*T, N, H, D]` with `num_frames`; dtype and device of `qkv`.

    Raises:
        ValueError: a shape, dtype or backend that does not fit, or a package that is missing.
        RuntimeError: the kernels of backend `triton`, asked for by name, are wrong on this device.

    Source: ZeroI2V (arXiv 2310.01324), section 3.2.
    """
    if num_frames is not None:
        if qkv.ndim != 5 or num_frames < 1 or qkv.shape[0] % num_frames:
            raise ValueError(f"qkv must be [B*{num_frames}, N, 3, H, D]: got {list(qkv.shape)}")
        clips = qkv.unflatten(0, (-1, num_frames))
        return stdha(clips, head_offsets, scale, backend, overwrite).flatten(0, 1)
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be [B, T, N, 3, H, D]: got {list(qkv.shape)}")
    (qkv,) = _autocast(qkv)
    named = backend is not None
    scale, backend = _check(qkv, "qkv", head_offsets, scale, backend)
    if backend == "triton":
        return stdha_op(qkv, list(head_offsets), scale, named)[0]
    if backend == "reference":
        return stdha_reference(qkv, head_offsets, scale)
    query, key_value = qkv.split((1, 2), dim=3)
    return _attend(query.squeeze(3), key_value, head_offsets, scale, backend, overwrite)


def stdha_split(
    query: Tensor,
    key_value: Tensor,
    head_offsets: Sequence[int],
    scale: float | None = None,
    overwrite: bool = False,
    backend: str | None = None,
) -> Tensor:
    """`stdha` for queries kept apart from keys and values, so that only some tokens may ask.

    Args:
        query: `[B, T, M, H, D]`; M is 1 where only the CLS token's result is needed.
        key_value: `[B, T, N, 2, H, D]`.
        head_offsets, scale, backend: as in `stdha`.
        overwrite: allow `key_value` to be modified, which saves a copy; only without autograd.

    Returns:
        `[B, T, M, H, D]`.

    Raises:
        ValueError: as `stdha`.
    """
    if query.ndim != 5:
        raise ValueError(f"query must be [B, T, M, H, D]: got {list(query.shape)}")
    clips, frames, _, *heads = query.shape
    shape = key_value.shape
    if key_value.ndim != 6 or (*shape[:2], *shape[3:]) != (clips, frames, 2, *heads):
        raise ValueError(f"key_value must be [B, T, N, 2, H, D] like query: got {list(shape)}")
    query, key_value = _autocast(query, key_value)
    if (key_value.dtype, key_value.device) != (query.dtype, query.device):
        raise ValueError(
            f"key_value must be {query.dtype} on {query.device} like query: "
            f"got {key_value.dtype} on {key_value.device}"
        )
    named = backend is not None
    scale, backend = _check(query, "query", head_offsets, scale, backend)
    if backend == "triton":
        return stdha_split_op(query, key_value, list(head_offsets), scale, named)[0]
    return _attend(query, key_value, head_offsets, scale, backend, overwrite)


def _autocast(*tensors: Tensor) -> list[Tensor]:
    """In the dtype of autocast, where it is on; float64 stays, as in PyTorch."""
    kind = tensors[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [x.to(dtype) if x.dtype in TRITON_DTYPES else x for x in tensors]


def _attend(
    query: Tensor,
    key_value: Tensor,
    head_offsets: Sequence[int],
    scale: float,
    backend: str,
    overwrite: bool,
) -> Tensor:
    """Arguments and result as in `stdha_split`, for backends other than `triton`."""
    if backend == "flash":
        attend = functools.partial(flash_attention(query.device), softmax_scale=scale)
        return attend_grouped(query, key_value, head_offsets, attend)
    if backend == "matmul":
        return stdha_matmul_op(query, key_value, list(head_offsets), scale)
    if overwrite:
        _move_heads_(key_value, key_value, tuple(head_offsets))
    elif any(head_offsets):
        key_value = shift_heads(key_value, list(head_offsets))
    if backend == "reference":
        key, value = key_value.unbind(3)
        scores = torch.einsum("b t n h d, b t m h d -> b t h n m", query, key) * scale
        return torch.einsum("b t h n m, b t m h d -> b t n h d", scores.softmax(-1), value)
    frames = query.shape[:2]
    query = query.flatten(0, 1).transpose(1, 2)  # [B*T, H, M, D]
    key, value = key_value.flatten(0, 1).permute(2, 0, 3, 1, 4)  # [B*T, H, N, D] each
    out = F.scaled_dot_product_attention(query, key, value, scale=scale)
    return out.transpose(1, 2).unflatten(0, frames)


@operator("zeroi2v::stdha")
def stdha_op(
    qkv: Tensor, head_offsets: list[int], scale: float, named: bool = False
) -> tuple[Tensor, Tensor]:
    """The Triton forward: out `[B, T, N, H, D]` and lse `[B, T, H, N]`, of which see the kernels.

    Only `out` has a gradient. `named` as in `stdha_launch.forward`.
    """
    from zeroi2v_kernels import stdha_launch

    return stdha_launch.forward(qkv[:, :, :, 0], qkv[:, :, :, 1:], head_offsets, scale, named)


@operator("zeroi2v::stdha_backward")
def stdha_backward_op(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    head_offsets: list[int],
    scale: float,
    named: bool = False,
) -> Tensor:
    """The Triton backward: the gradient of `qkv`, packed like it."""
    from zeroi2v_kernels import stdha_launch

    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    (query, key_value), (dquery, dkey_value) = (
        (x[:, :, :, 0], x[:, :, :, 1:]) for x in (qkv, dqkv)
    )
    gradients = (dquery, dkey_value)
    inputs = (grad, query, key_value, out, lse)
    stdha_launch.backward(*inputs, *gradients, head_offsets, scale, named)
    return dqkv


@operator("zeroi2v::stdha_split")
def stdha_split_op(
    query: Tensor, key_value: Tensor, head_offsets: list[int], scale: float, named: bool = False
) -> tuple[Tensor, Tensor]:
    """As `stdha_op`, for query `[B, T, M, H, D]` and key_value `[B, T, N, 2, H, D]`."""
    from zeroi2v_kernels import stdha_launch

    return stdha_launch.forward(query, key_value, head_offsets, scale, named)


@operator("zeroi2v::stdha_split_backward")
def stdha_split_backward_op(
    grad: Tensor,
    query: Tensor,
    key_value: Tensor,
    out: Tensor,
    lse: Tensor,
    head_offsets: list[int],
    scale: float,
    named: bool = False,
) -> tuple[Tensor, Tensor]:
    """The gradients of `query` and `key_value`."""
    from zeroi2v_kernels import stdha_launch

    gradients = tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key_value)
    )
    inputs = (grad, query, key_value, out, lse)
    stdha_launch.backward(*inputs, *gradients, head_offsets, scale, named)
    return gradients


@operator("zeroi2v::stdha_matmul")
def stdha_matmul_op(
    query: Tensor, key_value: Tensor, head_offsets: list[int], scale: float
) -> Tensor:
    """Backend `matmul`: `[B, T, M, H, D]`; arguments as in `stdha_split`."""
    return stdha_matmul.forward(query, key_value, head_offsets, scale)


@operator("zeroi2v::stdha_matmul_backward")
def stdha_matmul_backward_op(
    grad: Tensor, query: Tensor, key_value: Tensor, head_offsets: list[int], scale: float
) -> tuple[Tensor, Tensor]:
    """The gradients of `query` and `key_value`."""
    gradients = tuple(_fake_gradient(x) for x in (query, key_value))
    stdha_matmul.backward(grad, query, key_value, *gradients, head_offsets, scale)
    return gradients


def _fake_forward(query: Tensor) -> tuple[Tensor, Tensor]:
    clips, frames, queries, heads, _ = query.shape
    lse = query.new_empty(clips, frames, heads, queries, dtype=torch.float32)
    return query.new_empty(query.shape), lse


def _fake_gradient(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx, inputs, output):
    *tensors, ctx.head_offsets, ctx.scale, ctx.named = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, *output)


def _save_inputs(ctx, inputs, output):
    *tensors, ctx.head_offsets, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _stdha_backward(ctx, grad, _):
    settings = (ctx.head_offsets, ctx.scale, ctx.named)
    return stdha_backward_op(grad, *ctx.saved_tensors, *settings), None, None, None


def _stdha_split_backward(ctx, grad, _):
    settings = (ctx.head_offsets, ctx.scale, ctx.named)
    return *stdha_split_backward_op(grad, *ctx.saved_tensors, *settings), None, None, None


def _stdha_matmul_backward(ctx, grad):
    gradients = stdha_matmul_backward_op(grad, *ctx.saved_tensors, ctx.head_offsets, ctx.scale)
    return *gradients, None, None


stdha_op.op.register_fake(lambda qkv, *_: _fake_forward(qkv[:, :, :, 0]))
stdha_split_op.op.register_fake(lambda query, *_: _fake_forward(query))
stdha_backward_op.op.register_fake(lambda grad, qkv, *_: _fake_gradient(qkv))
stdha_split_backward_op.op.register_fake(
    lambda grad, query, key_value, *_: (_fake_gradient(query), _fake_gradient(key_value))
)
stdha_matmul_op.op.register_fake(lambda query, *_: query.new_empty(query.shape))
stdha_matmul_backward_op.op.register_fake(
    lambda grad, query, key_value, *_: (_fake_gradient(query), _fake_gradient(key_value))
)
stdha_op.op.register_autograd(_stdha_backward, setup_context=_save)
stdha_split_op.op.register_autograd(_stdha_split_backward, setup_context=_save)
stdha_matmul_op.op.register_autograd(_stdha_matmul_backward, setup_context=_save_inputs)


@operator("zeroi2v::shift_heads")
def shift_heads(key_value: Tensor, head_offsets: list[int]) -> Tensor:
    """Copy of `key_value [B, T, N, 2, H, D]` in which head h of frame t is that of s(t, h)."""
    out = key_value.clone(memory_format=torch.contiguous_format)
    _move_heads_(out, key_value, tuple(head_offsets))
    return out


@shift_heads.op.register_fake
def _(key_value, head_offsets):
    return torch.empty_like(key_value, memory_format=torch.contiguous_format)


@operator("zeroi2v::shift_heads_backward")
def shift_heads_backward(grad: Tensor, head_offsets: list[int]) -> Tensor:
    """Adjoint of `shift_heads`: frame s collects the gradients of all frames that read it."""
    num_frames = grad.shape[1]
    out = grad.clone(memory_format=torch.contiguous_format)
    for head, offset in enumerate(head_offsets):
        step = abs(offset)
        if not 0 < step < num_frames:
            continue
        given, collected = grad[:, :, :, :, head], out[:, :, :, :, head]
        if offset > 0:
            collected[:, :step] = 0  # nobody reads them, unless they are edge frames too
            collected[:, step:] = given[:, :-step]
            collected[:, -step:] += given[:, -step:]
        else:
            collected[:, -step:] = 0
            collected[:, :-step] = given[:, step:]
            collected[:, :step] += given[:, :step]
    return out


@shift_heads_backward.op.register_fake
def _(grad, head_offsets):
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _save_offsets(ctx, inputs, output):
    ctx.head_offsets = inputs[1]


def _backward(ctx, grad):
    return shift_heads_backward(grad, ctx.head_offsets), None


shift_heads.op.register_autograd(_backward, setup_context=_save_offsets)


def _move_heads_(out: Tensor, key_value: Tensor, head_offsets: tuple[int, ...]) -> None:
    """Writes the shifted heads of `key_value` into `out`, which may be the same tensor."""
    num_frames = key_value.shape[1]
    for head, offset in enumerate(head_offsets):
        step = abs(offset)
        if not 0 < step < num_frames:
            continue  # spatial head, or every frame falls back to itself
        source, target = key_value[:, :, :, :, head], out[:, :, :, :, head]
        source, target = (
            (source[:, step:], target[:, :-step])
            if offset > 0
            else (source[:, :-step], target[:, step:])
        )
        target.copy_(source.clone() if out is key_value else source)


def _check(
    x: Tensor, name: str, head_offsets: Sequence[int], scale: float | None, backend: str | None
) -> tuple[float, str]:
    """The scale and the backend to use; raises ValueError if anything does not fit."""
    heads, width = x.shape[-2:]
    if len(head_offsets) != heads:
        raise ValueError(
            f"head_offsets needs one entry per head: got {len(head_offsets)} for {heads} heads"
        )
    scale = width**-0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale must be positive: got {scale}")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point: got {x.dtype}")
    if backend is None:
        backend = choice.choose_backend(x)
        if not torch.compiler.is_compiling():
            _announce(backend, x.device.type)
    elif backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None: got {backend!r}")
    elif backend == "triton":
        if not choice.HAS_TRITON:
            raise ValueError("backend 'triton' needs the package triton: pip install triton")
        if x.dtype not in TRITON_DTYPES:
            raise ValueError(f"backend 'triton' needs float32 or half precision: got {x.dtype}")
        if width not in TRITON_WIDTHS:
            raise ValueError(f"backend 'triton' needs heads of {TRITON_WIDTHS}: got {width}")
    elif backend == "flash" and not (x.is_cuda and x.dtype in HALF):
        raise ValueError(
            f"backend 'flash' needs half precision on CUDA: got {x.dtype} on {x.device}"
        )
    return scale, backend


@functools.cache
def _announce(backend: str, device_type: str) -> None:
    log.info("attention on %s: backend %s", device_type, backend)
