"""The pass of `rotary.py` over queries and keys, in place, in Triton. Importing it imports triton.

One program turns some pairs of some tokens: it reads both channels of a pair, and writes both.
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
from zeroi2v_kernels.device import TRITON_DTYPES, ceil_div, on_device, packed
from zeroi2v_kernels.launch import Launcher

BLOCK = (4, 512)  # tokens and pairs of a program's tile
WARPS = 4


def turn_in_place(x: Tensor, table: Tensor, parts: int, back: bool) -> bool:
    """`rotary.turn_` on CUDA; false, with nothing done, where the kernel has failed its proof.

    A view whose elements do not lie one after another is copied, turned and copied back.
    """
    key = ("rotary", x.dtype, *x.shape[2:], table.shape[1], parts)
    if not proof.trusted((*key, x.device), x.device, lambda: _configuration(*key[1:])):
        return False
    dense = packed(x)
    _run(dense, packed(table.float()), parts, back)
    if dense is not x:
        x.copy_(dense)
    return True


@triton.jit(do_not_specialize=["num_rows"])
def _turn_kernel(
    x_ptr, table_ptr, num_rows,
    TOKENS: tl.constexpr, PLACES: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr,
    PAIRS: tl.constexpr, BACK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_PAIRS: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(PAIRS, BLOCK_PAIRS)
    program = tl.program_id(0)
    rows = (program // blocks).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    pairs = program % blocks * BLOCK_PAIRS + tl.arange(0, BLOCK_PAIRS)[None, :]
    mask = (rows < num_rows) & (pairs < PAIRS)
    frames, places = rows // PLACES, rows % PLACES
    heads, channels = pairs // HALF, pairs % HALF
    token = frames * TOKENS + (TOKENS - PLACES) + places
    offsets = token * WIDTH + heads * (2 * HALF) + channels  # [BLOCK_ROWS, BLOCK_PAIRS]
    angles = places * HALF + channels
    cosine = tl.load(table_ptr + angles, mask=mask, other=0.0)
    sine = tl.load(table_ptr + PLACES * HALF + angles, mask=mask, other=0.0)
    sine = -sine if BACK else sine
    first = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    kind = x_ptr.dtype.element_ty
    tl.store(x_ptr + offsets, (first * cosine - second * sine).to(kind), mask=mask)
    tl.store(x_ptr + offsets + HALF, (second * cosine + first * sine).to(kind), mask=mask)


def _run(x: Tensor, table: Tensor, parts: int, back: bool) -> None:
    clips, frames, *sizes = x.shape
    places, half = table.shape[1:]
    num_rows, pairs = clips * frames * places, parts * x.shape[4] * half
    if num_rows:
        launch = _launcher(x.device, x.dtype, *sizes, places, parts, back)
        with on_device(x):
            launch(
                (ceil_div(num_rows, BLOCK[0]) * ceil_div(pairs, BLOCK[1]),),
                x_ptr=x,
                table_ptr=table,
                num_rows=num_rows,
            )


@functools.cache
def _launcher(device, dtype, tokens, kinds, heads, width, places, parts, back) -> Launcher:
    constants = dict(TOKENS=tokens, PLACES=places, WIDTH=kinds * heads * width, HALF=width // 2)
    constants |= dict(PAIRS=parts * heads * width // 2, BACK=back)
    constants |= dict(BLOCK_ROWS=BLOCK[0], BLOCK_PAIRS=BLOCK[1])
    return Launcher(_turn_kernel, constants, num_warps=WARPS)


def _configuration(dtype, tokens, kinds, heads, width, places, parts) -> proof.Configuration:
    """Both ways, for tensors of such a dtype and sizes."""
    name = f"rotary N={tokens} P={places} K={kinds} parts={parts} H={heads} D={width} {dtype}"

    def trial(generator: torch.Generator) -> proof.Trial:
        x = proof.draw(generator, (1, 2, tokens, kinds, heads, width), dtype)
        angles = 30 * proof.draw(generator, (places, width // 2), torch.float32)
        table = torch.stack([angles.cos(), angles.sin()])

        def run(*outs):
            for out, back in zip(outs, (False, True), strict=True):
                out.copy_(x)
                _run(out, table, parts, back)

        truths = [bounds.rotated(x, table, parts, back) for back in (False, True)]
        return proof.Trial([torch.empty_like(x) for _ in truths], run, truths)

    return proof.Configuration(name.replace("torch.", ""), (BLOCK, WARPS), trial)


def shipped(device: torch.device) -> Iterator[proof.Configuration]:
    """What `shipped.prove_shipped` proves of rotary positions: DINOv3's and PE's sizes."""
    for (tokens, heads), dtype in product([(201, 12), (197, 12), (577, 16)], TRITON_DTYPES):
        places = 576 if tokens == 577 else 196
        yield _configuration(dtype, tokens, 3, heads, 64, places, 2)
