"""`quantize_rows` in one pass over memory, in Triton; importing this module imports triton."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from itertools import product

import torch
import triton
import triton.language as tl
from torch import Tensor

from zeroi2v_kernels import bounds, choice, proof
from zeroi2v_kernels.device import HALF, ceil_div, on_device, operator, packed
from zeroi2v_kernels.dot import _INTERPRET
from zeroi2v_kernels.launch import Launcher
from zeroi2v_kernels.quantize_reference import E4M3, quantize_rows_reference

WARPS = 4
TILE_ROWS = 2  # of a program's tile
WIDTHS = (768, 1024, 3072, 4096)
"""Of what the blocks of usual models multiply."""


@triton.jit
def _to_e4m3(x):
    """float32 to the nearest e4m3 number; |x| is 448 at most, but for rounding, or nan."""
    if _INTERPRET:  # which neither carries from mantissa to exponent nor knows nan
        bits = x.to(tl.int32, bitcast=True)
        normal = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        small = (x + 24576.0) - 24576.0  # numbers from 2^14 on are 2^-9 apart, as the smallest are
        rounded = tl.where(tl.abs(x) < 0.015625, small, normal.to(tl.float32, bitcast=True))
        nan = tl.full(x.shape, 0x7FF00000, tl.int32).to(tl.float32, bitcast=True)
        x = tl.where(x == x, rounded, nan)
    return x.to(tl.float8e4nv)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_kernel(
    x_ptr, out_ptr, scale_ptr, num_rows,
    C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_C)
    mask = (rows[:, None] < num_rows) & (columns[None, :] < C)
    offsets = rows[:, None] * C + columns[None, :]
    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_C]
    peak = tl.max(tl.abs(x), 1)  # without nan, which stays in the values
    scale = tl.maximum(tl.div_rn(peak, 448.0), 1.1754943508222875e-38)
    values = x * tl.div_rn(1.0, scale)[:, None]
    tl.store(out_ptr + offsets, _to_e4m3(values), mask=mask)
    tl.store(scale_ptr + rows, scale, mask=rows < num_rows)


@operator("zeroi2v::quantize_rows")
def quantize_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of float32, bfloat16 or float16 on CUDA."""
    columns = x.shape[-1]
    key = ("quantize", x.device, x.dtype, columns)
    if not proof.trusted(key, x.device, lambda: _configuration(x.dtype, columns)):
        return quantize_rows_reference(x)
    values, scale = _fake(x)
    _run(x, values, scale)
    return values, scale


@quantize_forward.op.register_fake
def _fake(x):
    values = torch.empty_like(x, dtype=E4M3, memory_format=torch.contiguous_format)
    return values, x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)


def _run(x: Tensor, values: Tensor, scale: Tensor) -> None:
    num_rows = scale.numel()
    if num_rows:
        launch = _launcher(_quantize_kernel, x.device, x.dtype, x.shape[-1])
        with on_device(x):
            launch(
                (ceil_div(num_rows, TILE_ROWS),),
                x_ptr=packed(x), out_ptr=values, scale_ptr=scale, num_rows=num_rows,
            )  # fmt: skip


def constants_of(columns: int) -> dict[str, int]:
    """The constants of the kernel for rows of so many columns."""
    return dict(C=columns, ROWS=TILE_ROWS, BLOCK_C=triton.next_power_of_2(columns))


@functools.cache
def _launcher(kernel, device, dtype, columns) -> Launcher:
    return Launcher(kernel, constants_of(columns), num_warps=WARPS)


def _configuration(dtype: torch.dtype, columns: int) -> proof.Configuration:
    def trial(generator: torch.Generator) -> proof.Trial:
        x = proof.draw(generator, (9, columns), torch.float32)
        x[:, 3] *= 100  # an outlier, and rows of other sizes
        x = (x * proof.draw(generator, (9, 1), torch.float32)).to(dtype)
        return proof.Trial([*_fake(x)], lambda *outputs: _run(x, *outputs), bounds.quantized(x))

    name = f"quantize rows C={columns} {dtype}".replace("torch.", "")
    return proof.Configuration(name, (TILE_ROWS, WARPS), trial)


def shipped(device: torch.device) -> Iterator[proof.Configuration]:
    """What `shipped.prove_shipped` proves; nothing on a GPU without float8 units."""
    if device.type != "cuda" or choice.has_fp8_units(device):
        for dtype, columns in product((torch.float32, *HALF), WIDTHS):
            yield _configuration(dtype, columns)
