"""Head-shifted attention alone: our kernels and backends beside attention without offsets.

All get the same packed `qkv [B, T, N, 3, H, D]`. Without offsets, as in an image model: PyTorch's
attention with its own choice, flash and cuDNN. With them: our backends; keys and values of all
heads cloned, shifted and given to PyTorch's flash attention; and FlexAttention, to which a clip is
one sequence with a block mask. `forward` runs without autograd; `forward+backward` includes the
gradient of qkv. Before any is timed, the first clip's output and gradient must be as exact as the
definition's in the same dtype, judged in float64.

On a GPU all of it runs, and the kernels of CUDA are what is timed:
`pytest bench/bench_stdha.py --benchmark`. Out-of-bounds accesses and races, on small shapes, are
found by `python -m bench.check_gpu --sanitizer`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache, partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from zeroi2v_kernels.stdha import source_frames, stdha, stdha_reference
from zeroi2v_kernels.stdha_flash import flash_attention

from bench.cases import DTYPES, REST
from zeroi2v import RECIPES

CASES = [  # recipe, tokens of a frame (577: 336 pixels)
    ("vit_b16_k400_8x16", 197),
    pytest.param("vit_b16_ssv2_16", 197, marks=REST),
    pytest.param("vit_b16_ucf101_32", 197, marks=REST),
    ("vit_l14_k400_8x16", 257),
    ("vit_l14_k400_32x4", 257),
    pytest.param("vit_l14_ssv2_32", 257, marks=REST),
    ("vit_l14_k400_8x16", 577),
]
CLIPS = {"cpu": 1, "cuda": 8}
ON_GPU, IN_HALF = "runs on CUDA alone", "takes half precision alone"
PLAIN, FLASH_PLAIN, CUDNN_PLAIN = "no offsets", "no offsets, flash", "no offsets, cuDNN"
GOALS = {
    direction: {f"triton / {plain}": goal for plain in (FLASH_PLAIN, CUDNN_PLAIN)}
    for direction, goal in (("forward", 1.0), ("forward+backward", 1.1))
}
"""Ratios of time on a GPU in half precision."""


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe, tokens", CASES)
def bench_stdha(recipe, tokens, dtype, direction, compare, timed, device):
    config = RECIPES[recipe].model
    clips, frames, heads, width = CLIPS[device], config.num_frames, config.num_heads, 64
    if not timed:  # enough to check
        clips, frames, tokens, width = 1, 3, 5, 16
    torch.manual_seed(0)
    qkv = torch.randn(clips, frames, tokens, 3, heads, width, device=device)
    qkv = qkv.to(getattr(torch, dtype))
    weight = torch.randn(qkv.shape[:3] + qkv.shape[4:], device=device).to(qkv.dtype)
    backward = direction == "forward+backward"
    functions, absent = line_up(qkv, config.head_offsets, backward, timed)
    contestants = {
        name: partial(value_and_gradient, function, qkv, weight) if backward
        else partial(value, function, qkv)
        for name, function in functions.items()
    }  # fmt: skip

    @cache
    def judge(offsets):
        """Output and gradient of the first clip by the definition: in this dtype, in float64."""
        reference = partial(stdha_reference, head_offsets=offsets)
        wide = (qkv[:1].double(), weight[:1].double())
        return [value_and_gradient(reference, *x) for x in ((qkv[:1], weight[:1]), wide)]

    def check(name, outputs):
        same, truth = judge((0,) * heads if name.startswith(PLAIN) else config.head_offsets)
        eps = torch.finfo(qkv.dtype).eps
        for actual, expected, exact in zip(outputs, same, truth, strict=False):
            error, allowed = ((x[:1] - exact).abs().max() for x in (actual, expected))
            assert error <= 2 * (allowed + eps * exact.abs().max()), f"{name}: error {error:.2e}"

    products = 14 if backward else 4  # of 2 N^2 D operations: 2 forward, 5 backward
    compare(
        contestants,
        PLAIN,
        check=check,
        absent=absent,
        memory=True,
        rounds=3 if device == "cpu" else None,
        model=recipe,
        frames=frames,
        batch=clips,
        dtype=dtype,
        direction=direction,
        tokens=tokens,
        head_offsets=list(config.head_offsets),
        flops=products * clips * frames * heads * tokens**2 * width,
        # qkv and the output; backward also reads them, the output's gradient, and writes qkv's
        bytes=(12 if backward else 4) * clips * frames * tokens * heads * width * qkv.itemsize,
        goals=GOALS[direction] if device == "cuda" and dtype != "float32" else {},
    )


def value(function: Callable[[Tensor], Tensor], qkv: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [function(qkv)]


def value_and_gradient(
    function: Callable[[Tensor], Tensor], qkv: Tensor, weight: Tensor
) -> list[Tensor]:
    qkv = qkv.detach().requires_grad_()
    out = function(qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, weight)]


def line_up(
    qkv: Tensor, offsets: tuple[int, ...], backward: bool, timed: bool
) -> tuple[dict[str, Callable[[Tensor], Tensor]], dict[str, str]]:
    """Contestants by name, and why others are absent; the first is the baseline."""
    none = (0,) * len(offsets)
    ours = {
        name: partial(stdha, head_offsets=offsets, backend=name)
        for name in ("sdpa", "matmul", "triton")
    }
    functions = {PLAIN: partial(stdha, head_offsets=none, backend="sdpa"), "sdpa": ours["sdpa"]}
    absent = {}
    if qkv.is_cuda:
        absent["matmul"] = "goes frame by frame for the sake of a CPU's cache"
    else:
        functions["matmul"] = ours["matmul"]
    functions["reference"] = partial(stdha_reference, head_offsets=offsets)
    half = qkv.dtype != torch.float32
    if qkv.is_cuda or not timed:  # in Triton's interpreter, whose time says nothing
        functions["triton"] = ours["triton"]
    else:
        absent["triton"] = ON_GPU
    if qkv.is_cuda if timed else not backward:
        functions["FlexAttention"] = flex(qkv, offsets, compiled=timed)
    else:
        absent["FlexAttention"] = "is timed on CUDA alone, and differentiated only compiled"
    for name, backend, function in (
        (FLASH_PLAIN, SDPBackend.FLASH_ATTENTION, functions[PLAIN]),
        (CUDNN_PLAIN, SDPBackend.CUDNN_ATTENTION, functions[PLAIN]),
        ("clone + shift + flash", SDPBackend.FLASH_ATTENTION, clone_and_shift(offsets)),
    ):
        if not qkv.is_cuda or not half:
            absent[name] = IN_HALF if qkv.is_cuda else ON_GPU
            continue
        functions[name] = partial(only, backend, function)
    if qkv.is_cuda and half:
        try:
            flash_attention(qkv.device)
            functions["flash"] = partial(stdha, head_offsets=offsets, backend="flash")
        except ValueError as error:
            absent["flash"] = str(error)
    else:
        absent["flash"] = IN_HALF if qkv.is_cuda else ON_GPU
    return functions, absent


def only(backend: SDPBackend, function: Callable[[Tensor], Tensor], qkv: Tensor) -> Tensor:
    """`function(qkv)` with PyTorch's attention bound to one of its backends."""
    with sdpa_kernel(backend):
        return function(qkv)


def clone_and_shift(offsets: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Copies keys and values of all heads and overwrites the shifted ones, as the authors do."""

    def run(qkv: Tensor) -> Tensor:
        query, key, value = qkv.unbind(3)
        moved = []
        for x in (key, value):
            out = x.clone()
            for head, offset in enumerate(offsets):
                step = abs(offset)
                if 0 < step < x.shape[1]:
                    to, source = slice(None, -step), slice(step, None)
                    to, source = (to, source) if offset > 0 else (source, to)
                    out[:, to, :, head] = x[:, source, :, head]
            moved.append(out)
        heads = (x.flatten(0, 1).transpose(1, 2) for x in (query, *moved))
        out = torch.nn.functional.scaled_dot_product_attention(*heads)
        return out.transpose(1, 2).unflatten(0, qkv.shape[:2])

    return run


def flex(qkv: Tensor, offsets: tuple[int, ...], compiled: bool) -> Callable[[Tensor], Tensor]:
    """A clip as one sequence of T*N tokens; a query sees the keys of its head's frame."""
    frames, tokens = qkv.shape[1:3]
    mask = block_mask(frames, tokens, offsets, qkv.device)
    attend = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def run(qkv: Tensor) -> Tensor:
        query, key, value = qkv.flatten(1, 2).permute(2, 0, 3, 1, 4)  # [B, H, T*N, D]
        out = attend(query, key, value, block_mask=mask)
        return out.transpose(1, 2).unflatten(1, (frames, tokens))

    return run


@lru_cache(maxsize=1)  # dtypes and directions of a shape come one after the other
def block_mask(
    frames: int, tokens: int, offsets: tuple[int, ...], device: torch.device
) -> BlockMask:
    """Which keys a query sees; for a new shape, FlexAttention is compiled anew."""
    torch.compiler.reset()  # eight compiled variants of a function are kept, later ones run eagerly
    sources = torch.tensor([source_frames(frames, o) for o in offsets], device=device)
    length = frames * tokens
    return create_block_mask(
        lambda clip, head, query, key: sources[head, query // tokens] == key // tokens,
        None, len(offsets), length, length, device=device,
    )  # fmt: skip
