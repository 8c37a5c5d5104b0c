"""Triton kernels of the linear adapter: dropout of the bottleneck, and the way up from it.

    mid = mask * mid                                                      [n, R]
    out = x + residual + scale * (mid WEIGHT + bias)                      [n, C]

Forward: WEIGHT = U^T. Backward: x is the output's gradient, WEIGHT = D, without bias or residual.
cuBLAS computes the way down, x D^T or x U. One kernel for both ways saved a sixth of the bytes but
took longer: it keeps the middle in registers, so few rows are in flight.

A program of `_up_kernel` keeps its columns of WEIGHT and goes down the rows; programs of the same
rows run side by side, so that the middle comes from the cache. Each of these C / BLOCK_N programs
would draw the mask anew. A pass of its own draws it once, over what is in the cache too.

The mask is a pure function of seed, place, row and column (Philox with 7 rounds, whose four words
decide on 8 columns), so that nothing is stored. Both kernels sum rows for the gradients of biases,
in float32, by program: no atomics. Importing this module imports triton.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from zeroi2v_kernels import bounds, proof
from zeroi2v_kernels.device import HALF, TRITON_DTYPES, ceil_div, on_device, packed
from zeroi2v_kernels.device import arch as arch_of
from zeroi2v_kernels.dot import INTERPRET, _dot
from zeroi2v_kernels.launch import Launcher


class Launch(NamedTuple):
    """Tile sizes in rows and output channels; programs in all; warps, stages of the loads ahead."""

    block_m: int
    block_n: int
    programs: int
    warps: int
    stages: int


# By compute capability. bench/compile_kernels.py compiles every entry. Run on a device: that of 9.0
# on an H200 (driver 580, Triton 3.6.0), for 256 and 192 columns in bfloat16, within its bounds and
# twice the same bits; no other of 14 settings timed there was faster in all cases, in some by up to
# 13 %. Those of 8.0 and 10.0 have been compiled only.
LAUNCH = {
    80: Launch(64, 64, 216, 4, 2),
    90: Launch(64, 128, 264, 4, 1),
    100: Launch(64, 64, 444, 4, 1),
}
DROPOUT_BLOCK = (64, 64)
# What stands for all that is used: channels, rank, dtype; whether backward, dtype of the residual.
SHAPES = [(768, 192, "bf16"), (1024, 256, "bf16"), (768, 192, "fp16"), (192, 48, "bf16")]
KINDS = [(False, None), (False, "same"), (False, "fp32"), (True, None)]


@triton.jit
def _keep(seed, rows, start, PLACE: tl.constexpr, DROPPED: tl.constexpr, COLUMNS: tl.constexpr):
    """0 or 1 / (1 - p) for p = DROPPED / 2^16, at rows [ROWS] and COLUMNS columns from `start`."""
    eights = start // 8 + tl.arange(0, COLUMNS // 8)
    row = (rows[:, None] + eights[None, :] * 0).to(tl.uint32)
    eight = (rows[:, None] * 0 + eights[None, :]).to(tl.uint32)
    a, b, c, d = tl.philox(seed, row, eight, row * 0 + PLACE, row * 0, 7)
    words = tl.join(tl.join(a, c), tl.join(b, d))
    numbers = tl.join(words & 0xFFFF, words >> 16).reshape(rows.shape[0], COLUMNS)
    return tl.where(numbers >= DROPPED, 65536 / (65536 - DROPPED), 0.0)


@triton.jit(do_not_specialize=["num_rows"])
def _dropout_kernel(
    x_ptr, seed_ptr, out_ptr, sums_ptr, num_rows,
    R: tl.constexpr, PLACE: tl.constexpr, DROPPED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * BLOCK_R
    r = start + tl.arange(0, BLOCK_R)
    mask = (rows[:, None] < num_rows) & (r[None, :] < R)
    offsets = rows[:, None].to(tl.int64) * R + r[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    x *= _keep(tl.load(seed_ptr), rows, start, PLACE, DROPPED, BLOCK_R)
    out = x.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offsets, out, mask=mask)
    tl.store(sums_ptr + tl.program_id(0) * R + r, tl.sum(out.to(tl.float32), 0), mask=r < R)


@triton.jit
def _load_weight(ptr, start, n, SIZE: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
                 BACKWARD: tl.constexpr):  # fmt: skip
    """WEIGHT at the middle's columns start ... start + SIZE and channels n: [SIZE, BLOCK_N]."""
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
def _load_middle(ptr, start, rows, num_rows, SIZE: tl.constexpr, R: tl.constexpr):
    """The middle at those rows and its columns start ... start + SIZE: [BLOCK_M, SIZE]."""
    r = start + tl.arange(0, SIZE)
    mask = (rows[:, None] < num_rows) & (r[None, :] < R)
    return tl.load(ptr + rows[:, None].to(tl.int64) * R + r[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_rows"])
def _up_kernel(
    x_ptr, middle_ptr, weight_ptr, bias_ptr, residual_ptr, out_ptr, sums_ptr, num_rows, scale,
    C: tl.constexpr, R: tl.constexpr, SIZE_A: tl.constexpr, SIZE_B: tl.constexpr,
    BACKWARD: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_a = _load_weight(weight_ptr, 0, n, SIZE_A, C, R, BACKWARD)
    if SIZE_B:
        weight_b = _load_weight(weight_ptr, SIZE_A, n, SIZE_B, C, R, BACKWARD)
    if BACKWARD:
        sums = tl.zeros((BLOCK_N,), tl.float32)
    else:
        bias = tl.load(bias_ptr + n, mask=n < C, other=0.0).to(tl.float32)
    step = tl.num_programs(1) * BLOCK_M
    for first in tl.range(tl.program_id(1) * BLOCK_M, num_rows, step):
        rows = first + tl.arange(0, BLOCK_M)
        mask = (rows[:, None] < num_rows) & (n[None, :] < C)
        offsets = rows[:, None].to(tl.int64) * C + n[None, :]
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0)  # on their way during the product
        if HAS_RESIDUAL:
            residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0)
        branch = _dot(_load_middle(middle_ptr, 0, rows, num_rows, SIZE_A, R), weight_a)
        if SIZE_B:
            branch += _dot(_load_middle(middle_ptr, SIZE_A, rows, num_rows, SIZE_B, R), weight_b)
        if not BACKWARD:
            branch += bias[None, :]
        out = x.to(tl.float32) + scale * branch
        if HAS_RESIDUAL:
            out += residual.to(tl.float32)
        if BACKWARD:
            sums += tl.sum(x.to(tl.float32), 0)
        tl.store(out_ptr + offsets, out.to(out_ptr.dtype.element_ty), mask=mask)
    if BACKWARD:
        tl.store(sums_ptr + tl.program_id(1) * C + n, sums, mask=n < C)


def add_up(
    x: Tensor,
    middle: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The way up of an adapter, forward (with a `bias`) or backward (without).

    Args:
        x: `[n, C]`; backward, the gradient of the adapter's output.
        middle: `[n, R]`.
        weight: forward U `[C, R]`, backward D `[R, C]`.
        bias: of U, `[C]`.
        scale: the adapter's factor; backward 1, as the middle's gradient holds it.
        residual: `[n, C]`, added to the output, which takes its dtype.

    Returns:
        out `[n, C]`; backward, sums of x by program, float32 `[programs, C]`, else None.
    """
    (num_rows, width), launch = x.shape, LAUNCH[arch_of(x.device)]
    columns, tiles = ceil_div(width, launch.block_n), ceil_div(num_rows, launch.block_m)
    programs = min(tiles, max(1, launch.programs // columns))
    out = x.new_empty(x.shape, dtype=(x if residual is None else residual).dtype)
    sums = x.new_empty(programs, width, dtype=torch.float32) if bias is None else None
    _run_up(x, middle, weight, bias, scale, residual, out, sums, programs)
    return out, sums


def _run_up(x, middle, weight, bias, scale, residual, out, sums, programs) -> None:
    _check_device(x)
    if programs:
        launch, width = LAUNCH[arch_of(x.device)], x.shape[1]
        dtypes = (x.dtype, None if residual is None else residual.dtype)
        key = (x.device, launch, width, middle.shape[1], bias is None, *dtypes)
        run = _up_launcher(_up_kernel, *key)
        with on_device(x):
            run(
                (ceil_div(width, launch.block_n), programs),
                x_ptr=packed(x),
                middle_ptr=packed(middle),
                weight_ptr=packed(weight),
                bias_ptr=packed(bias),
                residual_ptr=packed(residual),
                out_ptr=out,
                sums_ptr=sums,
                num_rows=x.shape[0],
                scale=scale,
            )


@functools.cache
def _up_launcher(kernel, device, launch, width, rank, backward, dtype, residual_dtype) -> Launcher:
    has_residual = residual_dtype is not None
    constants, options = plan_up(width, rank, backward, has_residual, arch_of(device))
    return Launcher(kernel, constants, **options)


def dropout(x: Tensor, dropped: int, seed: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """The dropout of `x [n, R]`, which may be written over; and its sums by program.

    Args:
        x: `[n, R]`.
        dropped: the probability in 2^-16.
        seed: one int64.
        place: which of the dropouts of this seed.

    Returns:
        `[n, R]`; and float32 `[programs, R]`.
    """
    _check_device(x)
    key = ("dropout", x.device, x.dtype, x.shape[1], dropped, place)
    if not proof.trusted(
        key, x.device, lambda: _dropout_trial(x.dtype, x.shape[1], dropped, place)
    ):
        out = (x.float() * mask(*x.shape, dropped, seed, place)).to(x.dtype)
        return out, out.float().sum(0, keepdim=True)
    out = packed(x)
    sums = _sums_of_dropout(x)
    _run_dropout(out, dropped, seed, place, out, sums)
    return out, sums


def _sums_of_dropout(x: Tensor) -> Tensor:
    programs = ceil_div(x.shape[0], DROPOUT_BLOCK[0])
    return x.new_empty(programs, x.shape[1], dtype=torch.float32)


def _run_dropout(x, dropped, seed, place, out, sums) -> None:
    num_rows, rank = x.shape
    if num_rows:
        run = _dropout_launcher(_dropout_kernel, x.device, x.dtype, rank, place, dropped)
        grid = tuple(ceil_div(n, b) for n, b in zip(x.shape, DROPOUT_BLOCK, strict=True))
        with on_device(x):
            run(grid, x_ptr=x, seed_ptr=seed, out_ptr=out, sums_ptr=sums, num_rows=num_rows)


@functools.cache
def _dropout_launcher(kernel, device, dtype, rank, place, dropped) -> Launcher:
    tile = dict(zip(("BLOCK_M", "BLOCK_R"), DROPOUT_BLOCK, strict=True))
    return Launcher(kernel, dict(R=rank, PLACE=place, DROPPED=dropped) | tile)


def mask(num_rows: int, rank: int, dropped: int, seed: Tensor, place: int) -> Tensor:
    """What `_keep` draws, in PyTorch: 0 or 1 / (1 - p), float32 `[n, R]`, on the seed's device.

    Source: Philox, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
    """
    low = 2**32 - 1
    shape = (num_rows, ceil_div(rank, 8))
    rows, eights = (torch.arange(n, device=seed.device) for n in shape)
    a, b = rows[:, None].expand(shape), eights.expand(shape)
    c, d = torch.full_like(a, place), torch.zeros_like(a)
    key, other_key = seed & low, (seed >> 32) & low
    for _ in range(7):
        (high_a, low_a), (high_c, low_c) = _product(a, 0xD2511F53), _product(c, 0xCD9E8D57)
        a, b, c, d = high_c ^ b ^ key, low_c, high_a ^ d ^ other_key, low_a
        key, other_key = (key + 0x9E3779B9) & low, (other_key + 0xBB67AE85) & low
    words = torch.stack((a, b, c, d), -1)
    numbers = torch.stack((words & 0xFFFF, words >> 16), -1).flatten(1)[:, :rank]
    return (numbers >= dropped) * (65536 / (65536 - dropped))


def _product(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a product of two unsigned numbers of 32 bits, kept in int64."""
    by_low, by_high = x * (factor & 0xFFFF), x * (factor >> 16)  # below 2^48
    middle = (by_low >> 16) + by_high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (by_low & 0xFFFF)


def takes(x: Tensor, rank: int, backward: bool, residual: Tensor | None = None) -> bool:
    """Whether `add_up` takes rows like those of x, of a bottleneck of that rank.

    In float32 or with a wider bottleneck a program's weights would take too much memory.
    """
    if x.dtype not in HALF or rank > 256 or rank % 16:
        return False
    shape = (x.dtype, x.shape[1], rank, backward, None if residual is None else residual.dtype)
    return proof.trusted(("up", x.device, *shape), x.device, lambda: _up_trial(x.device, *shape))


def _up_trial(device, dtype, width, rank, backward, residual_dtype) -> proof.Configuration:
    """The configuration of `_up_kernel`."""
    plan = plan_up(width, rank, backward, residual_dtype is not None, arch_of(device))
    name = f"adapter {'backward' if backward else 'forward'} C={width} R={rank} {dtype}"
    name += f" residual {residual_dtype}" * (residual_dtype is not None)

    def trial(generator: torch.Generator) -> proof.Trial:
        rows = 2 * plan[0]["BLOCK_M"] + 9  # three tiles for two programs
        x = proof.draw(generator, (rows, width), dtype)
        middle = proof.draw(generator, (rows, rank), dtype)
        shape = (rank, width) if backward else (width, rank)
        weight = proof.draw(generator, shape, dtype) * rank**-0.5
        bias = None if backward else proof.draw(generator, (width,), dtype)
        residual = residual_dtype and proof.draw(generator, (rows, width), residual_dtype)
        inputs = (x, middle, weight, bias, 0.5, residual)

        def run(out, *sums):
            parts = torch.full((2, width), float("nan"), device=device) if backward else None
            _run_up(*inputs, out, parts, 2)
            for whole in sums:
                whole.copy_(parts.sum(0))

        outputs = [x.new_empty(x.shape, dtype=residual_dtype or dtype)]
        outputs += [x.new_empty(width, dtype=torch.float32)] * backward
        return proof.Trial(outputs, run, bounds.add_up(*inputs))

    settings = (tuple(plan[0].items()), tuple(plan[1].items()))
    return proof.Configuration(name.replace("torch.", ""), settings, trial)


def _dropout_trial(dtype, rank, dropped, place) -> proof.Configuration:
    """The configuration of `_dropout_kernel`."""

    def trial(generator: torch.Generator) -> proof.Trial:
        rows = DROPOUT_BLOCK[0] + 9
        x = proof.draw(generator, (rows, rank), dtype)
        seed = torch.tensor(0x123456789ABCDEF, device=x.device)

        def run(out, sums):
            parts = torch.full_like(_sums_of_dropout(x), float("nan"))
            _run_dropout(x, dropped, seed, place, out, parts)
            sums.copy_(parts.sum(0))

        kept = mask(rows, rank, dropped, seed, place).double()
        outputs = [torch.empty_like(x), x.new_empty(rank, dtype=torch.float32)]
        return proof.Trial(outputs, run, bounds.dropout(x, kept))

    name = f"adapter dropout R={rank} {dtype} dropout {dropped} place {place}"
    return proof.Configuration(name.replace("torch.", ""), DROPOUT_BLOCK, trial)


def shipped(device: torch.device) -> Iterator[proof.Configuration]:
    """What `shipped.prove_shipped` proves of adapters."""
    for width, rank, element in SHAPES:
        dtype = torch.bfloat16 if element == "bf16" else torch.float16
        for backward, residual in KINDS:
            stream = {None: None, "same": dtype, "fp32": torch.float32}[residual]
            yield _up_trial(device, dtype, width, rank, backward, stream)
    for dtype in TRITON_DTYPES:
        yield _dropout_trial(dtype, 192, 6554, 0)


def plan_up(width, rank, backward, has_residual, arch) -> tuple[dict, dict]:
    """Constants and options of `_up_kernel`."""
    launch = LAUNCH[arch]
    size_a = max(16, 1 << (rank.bit_length() - 1))
    size_b = max(16, triton.next_power_of_2(rank - size_a)) if rank > size_a else 0
    constants = dict(
        C=width, R=rank, SIZE_A=size_a, SIZE_B=size_b, BACKWARD=backward,
        HAS_RESIDUAL=has_residual, BLOCK_M=launch.block_m, BLOCK_N=launch.block_n,
    )  # fmt: skip
    return constants, dict(num_warps=launch.warps, num_stages=launch.stages)


def _check_device(x: Tensor) -> None:
    if not (x.is_cuda or INTERPRET):
        raise ValueError(f"x must be on a CUDA device: got {x.device}")
