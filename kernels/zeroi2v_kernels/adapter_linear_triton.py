"""Triton kernels of the linear adapter: the fused bottleneck, forward and backward, and dropout.

    mid = mask * (first_scale * x FIRST + first_bias)                     [n, R]
    out = x + residual + scale * (mid SECOND + second_bias)               [n, C]

Forward: FIRST = D^T, SECOND = U^T. Backward, with the output's gradient as x: FIRST = U,
SECOND = D. The middle stays in registers, as at most two tiles that are powers of 2 wide; x is
read twice, the second time from the cache. A mask is a pure function of seed, place, row and column
(Philox with 7 rounds), so that nothing is stored. Importing this module imports triton.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zeroi2v_kernels import bounds, proof
from zeroi2v_kernels.device import arch as arch_of
from zeroi2v_kernels.device import on_device, packed
from zeroi2v_kernels.dot import INTERPRET, _dot


class Launch(NamedTuple):
    """Tile sizes in rows, input channels and output channels; warps, stages of the loads ahead."""

    block_m: int
    block_k: int
    block_n: int
    warps: int
    stages: int


# By compute capability and the largest rank; bench/compile_kernels.py compiles every entry.
# Each program reads both weights, so many rows spare traffic; at rank 256 they would spill.
LAUNCH = {
    80: {192: Launch(128, 32, 32, 8, 2), 256: Launch(64, 32, 32, 8, 2)},
    90: {192: Launch(128, 64, 32, 8, 2), 256: Launch(64, 64, 64, 8, 2)},
    100: {192: Launch(128, 64, 64, 8, 2), 256: Launch(64, 64, 64, 8, 2)},
}
DROPOUT_BLOCK = (16, 256)
# What stands for all that is used: channels, rank, dtype; and
# whether backward, dropout in 2^-16, dtype of the residual.
SHAPES = [(768, 192, "bf16"), (1024, 256, "bf16"), (768, 192, "fp16"), (192, 48, "bf16")]
KINDS = [
    *((False, 0, None), (False, 0, "same"), (False, 6554, None), (False, 6554, "same")),
    *((False, 6554, "fp32"), (True, 0, None), (True, 6554, None)),
]


@triton.jit
def _keep(seed, rows, columns, PLACE: tl.constexpr, DROPPED: tl.constexpr):
    """0 or 1 / (1 - p) for p = DROPPED / 2^16, at rows [ROWS] and columns [COLUMNS]."""
    row = rows[:, None] + columns[None, :] * 0
    column = rows[:, None] * 0 + columns[None, :]
    bits, _, _, _ = tl.philox(
        seed, row.to(tl.uint32), column.to(tl.uint32), row.to(tl.uint32) * 0 + PLACE,
        row.to(tl.uint32) * 0, 7,
    )  # fmt: skip
    return tl.where((bits >> 16) >= DROPPED, 65536 / (65536 - DROPPED), 0.0)


@triton.jit(do_not_specialize=["num_rows"])
def _dropout_kernel(
    x_ptr, seed_ptr, out_ptr, num_rows,
    R: tl.constexpr, PLACE: tl.constexpr, DROPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask = (rows[:, None] < num_rows) & (columns[None, :] < R)
    offsets = rows[:, None].to(tl.int64) * R + columns[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    out = x * _keep(tl.load(seed_ptr), rows, columns, PLACE, DROPPED)
    tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_first(ptr, k, start, SIZE: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
                BACKWARD: tl.constexpr):  # fmt: skip
    """FIRST at channels k and the middle's columns start ... start + SIZE: [BLOCK_K, SIZE]."""
    r = start + tl.arange(0, SIZE)
    if BACKWARD:  # U [C, R]
        return tl.load(
            ptr + k[:, None] * R + r[None, :], mask=(k[:, None] < C) & (r[None, :] < R), other=0.0
        )
    down = tl.load(  # D [R, C]
        ptr + r[:, None] * C + k[None, :], mask=(k[None, :] < C) & (r[:, None] < R), other=0.0
    )
    return tl.trans(down)


@triton.jit
def _load_second(ptr, start, n, SIZE: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
                 BACKWARD: tl.constexpr):  # fmt: skip
    """SECOND at the middle's columns start ... start + SIZE and channels n: [SIZE, BLOCK_N]."""
    r = start + tl.arange(0, SIZE)
    if BACKWARD:  # D [R, C]
        return tl.load(
            ptr + r[:, None] * C + n[None, :], mask=(r[:, None] < R) & (n[None, :] < C), other=0.0
        )
    up = tl.load(  # U [C, R]
        ptr + n[:, None] * R + r[None, :], mask=(r[None, :] < R) & (n[:, None] < C), other=0.0
    )
    return tl.trans(up)


@triton.jit
def _finish(acc, rows, start, bias_ptr, seed_ptr, mid_ptr, num_rows, first_scale,
            SIZE: tl.constexpr, R: tl.constexpr, BACKWARD: tl.constexpr, PLACE: tl.constexpr,
            DROPPED: tl.constexpr, KEEP_MID: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """The middle's columns start ... start + SIZE, rounded, and stored if it is to be kept."""
    r = start + tl.arange(0, SIZE)
    acc *= first_scale
    if not BACKWARD:
        acc += tl.load(bias_ptr + r, mask=r < R, other=0.0).to(tl.float32)[None, :]
    if DROPPED:
        acc *= _keep(tl.load(seed_ptr), rows, r, PLACE, DROPPED)
    mid = acc.to(DTYPE)
    if KEEP_MID:
        pointers = mid_ptr + rows[:, None].to(tl.int64) * R + r[None, :]
        tl.store(pointers, mid, mask=(rows[:, None] < num_rows) & (r[None, :] < R))
    return mid


@triton.jit(do_not_specialize=["num_rows"])
def _bottleneck_kernel(
    x_ptr, first_ptr, first_bias_ptr, second_ptr, second_bias_ptr, residual_ptr, seed_ptr,
    out_ptr, mid_ptr, num_rows, first_scale, scale,
    C: tl.constexpr, R: tl.constexpr, SIZE_A: tl.constexpr, SIZE_B: tl.constexpr,
    BACKWARD: tl.constexpr, HAS_RESIDUAL: tl.constexpr, KEEP_MID: tl.constexpr,
    PLACE: tl.constexpr, DROPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = rows[:, None] < num_rows
    x_ptr += rows[:, None].to(tl.int64) * C
    out_ptr += rows[:, None].to(tl.int64) * C

    acc_a = tl.zeros((BLOCK_M, SIZE_A), tl.float32)
    if SIZE_B:
        acc_b = tl.zeros((BLOCK_M, SIZE_B), tl.float32)
    for first in tl.range(0, C, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + k[None, :], mask=inside & (k[None, :] < C), other=0.0)
        acc_a += _dot(x, _load_first(first_ptr, k, 0, SIZE_A, C, R, BACKWARD))
        if SIZE_B:
            acc_b += _dot(x, _load_first(first_ptr, k, SIZE_A, SIZE_B, C, R, BACKWARD))
    mid_a = _finish(
        acc_a, rows, 0, first_bias_ptr, seed_ptr, mid_ptr, num_rows, first_scale,
        SIZE_A, R, BACKWARD, PLACE, DROPPED, KEEP_MID, DTYPE,
    )  # fmt: skip
    if SIZE_B:
        mid_b = _finish(
            acc_b, rows, SIZE_A, first_bias_ptr, seed_ptr, mid_ptr, num_rows, first_scale,
            SIZE_B, R, BACKWARD, PLACE, DROPPED, KEEP_MID, DTYPE,
        )  # fmt: skip

    for first in tl.range(0, C, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        mask = inside & (n[None, :] < C)
        branch = _dot(mid_a, _load_second(second_ptr, 0, n, SIZE_A, C, R, BACKWARD))
        if SIZE_B:
            branch += _dot(mid_b, _load_second(second_ptr, SIZE_A, n, SIZE_B, C, R, BACKWARD))
        if not BACKWARD:
            branch += tl.load(second_bias_ptr + n, mask=n < C, other=0.0).to(tl.float32)[None, :]
        out = tl.load(x_ptr + n[None, :], mask=mask, other=0.0).to(tl.float32) + scale * branch
        if HAS_RESIDUAL:
            row_offsets = rows[:, None].to(tl.int64) * C
            residual = tl.load(residual_ptr + row_offsets + n[None, :], mask=mask, other=0.0)
            out += residual.to(tl.float32)
        tl.store(out_ptr + n[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


def fused_bottleneck(
    x: Tensor,
    first: Tensor,
    second: Tensor,
    biases: tuple[Tensor, Tensor] | None,
    scale: float,
    dropped: int,
    seed: Tensor | None,
    place: int,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """An adapter forward (with `biases`) or backward (without): out `[n, C]`, middle `[n, R]`.

    Args:
        x: `[n, C]`; backward, the gradient of the adapter's output.
        first, second: forward D `[R, C]` and U `[C, R]`, backward U and D.
        biases: of D and U.
        scale: the adapter's factor.
        dropped: probability of the dropout, in 2^-16.
        seed: one int64; None without dropout.
        place: which of the dropouts of this seed.
        residual: added to the output, which takes its dtype.
    """
    rank = second.shape[0] if biases is None else first.shape[0]
    out = x.new_empty(x.shape, dtype=(x if residual is None else residual).dtype)
    middle = x.new_empty(x.shape[0], rank)
    drop = (dropped, seed, place)
    _run_bottleneck(x, first, second, biases, scale, *drop, residual, out, middle)
    return out, middle


def _run_bottleneck(
    x, first, second, biases, scale, dropped, seed, place, residual, out, middle
) -> None:
    _check_device(x)
    (num_rows, width), rank, backward = x.shape, middle.shape[1], biases is None
    constants, options = plan_bottleneck(
        width, rank, backward, residual is not None, place, dropped, arch_of(x.device)
    )
    first_bias, second_bias = (None, None) if backward else biases
    if num_rows:
        with on_device(x):
            _bottleneck_kernel[(triton.cdiv(num_rows, constants["BLOCK_M"]),)](
                x_ptr=packed(x),
                first_ptr=packed(first),
                first_bias_ptr=packed(first_bias),
                second_ptr=packed(second),
                second_bias_ptr=packed(second_bias),
                residual_ptr=packed(residual),
                seed_ptr=seed,
                out_ptr=out,
                mid_ptr=middle,
                num_rows=num_rows,
                first_scale=scale if backward else 1.0,
                scale=1.0 if backward else scale,
                **constants,
                **options,
            )


def dropout(x: Tensor, dropped: int, seed: Tensor, place: int) -> Tensor:
    """The same dropout on `x [n, R]` alone."""
    _check_device(x)
    key = ("dropout", x.device, x.dtype, x.shape[1], dropped, place)
    if not proof.trusted(
        key, x.device, lambda: _dropout_trial(x.dtype, x.shape[1], dropped, place)
    ):
        return (x.float() * mask(*x.shape, dropped, seed, place)).to(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run_dropout(x, dropped, seed, place, out)
    return out


def _run_dropout(x: Tensor, dropped: int, seed: Tensor, place: int, out: Tensor) -> None:
    num_rows, rank = x.shape
    if num_rows:
        grid = tuple(triton.cdiv(n, b) for n, b in zip(x.shape, DROPOUT_BLOCK, strict=True))
        with on_device(x):
            tile = dict(zip(("BLOCK_M", "BLOCK_R"), DROPOUT_BLOCK, strict=True))
            constants = dict(R=rank, PLACE=place, DROPPED=dropped) | tile
            _dropout_kernel[grid](
                x_ptr=packed(x), seed_ptr=seed, out_ptr=out, num_rows=num_rows, **constants
            )


def mask(num_rows: int, rank: int, dropped: int, seed: Tensor, place: int) -> Tensor:
    """What `_keep` draws, in PyTorch: 0 or 1 / (1 - p), float32 `[n, R]`, on the seed's device.

    Source: Philox, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    low = 2**32 - 1
    rows, columns = (torch.arange(n, device=seed.device) for n in (num_rows, rank))
    shape = (num_rows, rank)
    a, b = rows[:, None].expand(shape), columns.expand(shape)
    c, d = torch.full_like(a, place), torch.zeros_like(a)
    key, other_key = seed & low, (seed >> 32) & low
    for _ in range(7):
        (high_a, low_a), (high_c, low_c) = _product(a, 0xD2511F53), _product(c, 0xCD9E8D57)
        a, b, c, d = high_c ^ b ^ key, low_c, high_a ^ d ^ other_key, low_a
        key, other_key = (key + 0x9E3779B9) & low, (other_key + 0xBB67AE85) & low
    return ((a >> 16) >= dropped) * (65536 / (65536 - dropped))


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of two unsigned numbers of 32 bits, kept in int64."""
    by_low, by_high = x * (factor & 0xFFFF), x * (factor >> 16)  # below 2^48
    middle = (by_low >> 16) + by_high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (by_low & 0xFFFF)


def takes(
    x: Tensor,
    rank: int,
    backward: bool,
    dropped: int,
    place: int,
    residual: Tensor | None = None,
) -> bool:
    """Whether the fused kernel takes rows like those of x, of a bottleneck of that rank.

    It wins by what it does not write; float32 and wide bottlenecks would not stay in registers.
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or rank > 256 or rank % 16:
        return False
    shape = (x.dtype, x.shape[1], rank, backward, dropped, place)
    shape += (None if residual is None else residual.dtype,)
    key = ("bottleneck", x.device, *shape)
    return proof.trusted(key, x.device, lambda: _bottleneck_trial(x.device, *shape))


def _bottleneck_trial(device, dtype, width, rank, backward, dropped, place, residual_dtype):
    """The configuration of `_bottleneck_kernel`."""
    has_residual = residual_dtype is not None
    plan = plan_bottleneck(width, rank, backward, has_residual, place, dropped, arch_of(device))
    name = f"adapter {'backward' if backward else 'forward'} C={width} R={rank} {dtype}"
    name += f" dropout {dropped} place {place}" * bool(dropped)
    name += f" residual {residual_dtype}" * has_residual

    def trial(generator: torch.Generator) -> proof.Trial:
        rows = plan[0]["BLOCK_M"] + 9
        x = proof.draw(generator, (rows, width), dtype)
        down = proof.draw(generator, (rank, width), dtype) * width**-0.5
        up = proof.draw(generator, (width, rank), dtype) * rank**-0.5
        biases = tuple(proof.draw(generator, (n,), dtype) for n in (rank, width))
        residual = residual_dtype and proof.draw(generator, (rows, width), residual_dtype)
        seed = torch.tensor(0x123456789ABCDEF, device=x.device) if dropped else None
        weights = (up, down, None) if backward else (down, up, biases)
        kept = mask(rows, rank, dropped, seed, place) if dropped else None
        out = x.new_empty(x.shape, dtype=residual_dtype or dtype)
        return proof.Trial(
            [out, x.new_empty(rows, rank)],
            lambda *outputs: _run_bottleneck(
                x, *weights, 0.5, dropped, seed, place, residual, *outputs
            ),
            list(bounds.bottleneck(x, *weights, 0.5, kept, residual)),
        )

    settings = (tuple(plan[0].items()), tuple(plan[1].items()))
    return proof.Configuration(name.replace("torch.", ""), settings, trial)


def _dropout_trial(dtype, rank, dropped, place) -> proof.Configuration:
    """The configuration of `_dropout_kernel`."""

    def trial(generator: torch.Generator) -> proof.Trial:
        x = proof.draw(generator, (37, rank), dtype)
        seed = torch.tensor(0x123456789ABCDEF, device=x.device)
        return proof.Trial(
            [torch.empty_like(x)],
            lambda out: _run_dropout(x, dropped, seed, place, out),
            [bounds.scaled(x, mask(37, rank, dropped, seed, place).double())],
        )

    name = f"adapter dropout R={rank} {dtype} dropout {dropped} place {place}"
    return proof.Configuration(name.replace("torch.", ""), DROPOUT_BLOCK, trial)


def shipped(device: torch.device) -> Iterator[proof.Configuration]:
    """What `shipped.prove_shipped` proves of adapters."""
    for width, rank, element in SHAPES:
        dtype = torch.bfloat16 if element == "bf16" else torch.float16
        for backward, dropped, residual in KINDS:
            stream = {None: None, "same": dtype, "fp32": torch.float32}[residual]
            yield _bottleneck_trial(device, dtype, width, rank, backward, dropped, 0, stream)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield _dropout_trial(dtype, 192, 6554, 0)


def plan_bottleneck(width, rank, backward, has_residual, place, dropped, arch):
    """Constants and options of `_bottleneck_kernel`."""
    launch = LAUNCH[arch][192 if rank <= 192 else 256]
    size_a = max(16, 1 << (rank.bit_length() - 1))
    size_b = max(16, triton.next_power_of_2(rank - size_a)) if rank > size_a else 0
    constants = dict(
        C=width, R=rank, SIZE_A=size_a, SIZE_B=size_b, BACKWARD=backward,
        HAS_RESIDUAL=has_residual, KEEP_MID=True, PLACE=place, DROPPED=dropped,
        BLOCK_M=launch.block_m, BLOCK_K=launch.block_k, BLOCK_N=launch.block_n,
    )  # fmt: skip
    return constants, dict(num_warps=launch.warps, num_stages=launch.stages)


def _check_device(x: Tensor) -> None:
    if not (x.is_cuda or INTERPRET):
        raise ValueError(f"x must be on a CUDA device: got {x.device}")
