"""A frozen linear layer with its linear adapter, at the four places of a block, ViT-B/16 and L/14.

Contestants: `modules`, the two layers one after the other as PyTorch has them, left to autograd,
and `adapter_linear`; with dropout and without, where it merges the adapter into the layer if that
pays. `linear alone` is the layer that the adapter melts into: what inference pays. `forward` runs
without autograd; `forward+backward` includes the gradients of the input and of the adapter. Before
any is timed, values and gradients must be as exact as the definition's in the same dtype, judged in
float64; with dropout for the mask that its seed gives.

On a GPU: `pytest bench/bench_adapter_linear.py --benchmark`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from zeroi2v_kernels.adapter_linear import (
    Adapter,
    Dropout,
    adapter_linear,
    adapter_linear_reference,
    dropout_mask,
)

from bench.cases import DTYPES, REST

PLACES = {  # features in and out in widths, whether the adapter comes after
    "before qkv": (1, 3, False),
    "after proj": (1, 1, True),
    "before fc1": (1, 4, False),
    "after fc2": (4, 1, True),
}
WIDTHS = {"B/16": 768, "L/14": 1024}
ROWS = {"cpu": 8 * 197, "cuda": 64 * 8 * 197}
"""Tokens: of one clip of 8 frames, or of a batch of 64."""
LINEAR, MODULES, OURS = "linear alone", "modules", "adapter_linear"
DROPOUT_AND_DIRECTION = [
    (0.0, "forward"),
    pytest.param(0.0, "forward+backward", marks=REST),
    pytest.param(0.1, "forward", marks=REST),
    (0.1, "forward+backward"),
]


@pytest.mark.parametrize("dropout, direction", DROPOUT_AND_DIRECTION)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("model", WIDTHS)
def bench_adapter_linear(model, place, dtype, dropout, direction, compare, timed, device):
    width, rows = (WIDTHS[model], ROWS[device]) if timed else (64, 600)
    into, out_of, after = PLACES[place]
    into, out_of, rank = into * width, out_of * width, width // 4
    backward = direction == "forward+backward"
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(shape, device=device) * shape[-1] ** -0.5
        return drawn.to(getattr(torch, dtype))

    x, weight, bias = draw(rows, into) * into**0.5, draw(out_of, into), draw(out_of)
    parts = [draw(rank, width), draw(rank), draw(width, rank), draw(width)]
    seed = torch.tensor(7, device=device)
    mask = dropout_mask(x.new_empty(rows, rank), Dropout(dropout, seed)) if dropout else None

    def modules(x: Tensor, *parts: Tensor) -> Tensor:
        down, down_bias, up, up_bias = parts

        def adapt(h: Tensor) -> Tensor:
            d = F.dropout(F.linear(h, down, down_bias), dropout)
            return torch.add(h, F.linear(d, up, up_bias), alpha=0.5)

        return adapt(F.linear(x, weight, bias)) if after else F.linear(adapt(x), weight, bias)

    def ours(x: Tensor, *parts: Tensor) -> Tensor:
        drawn = dict(dropout=dropout, seed=seed if dropout else None)
        return adapter_linear(x, weight, bias, Adapter(*parts, 0.5), after, **drawn)

    def reference(x: Tensor, *parts: Tensor) -> Tensor:
        layer = (t.to(x.dtype) for t in (weight, bias))
        kept = None if mask is None else mask[: len(x)].to(x.dtype)
        return adapter_linear_reference(x, *layer, Adapter(*parts, 0.5), after, kept)

    def check(name, outputs):
        if name == OURS or (name == MODULES and not dropout):  # what autograd drops is its own
            few = [x, *parts]
            exact = run(reference, [t.double() for t in few], backward)
            for actual, same, truth in zip(
                outputs, run(reference, few, backward), exact, strict=True
            ):
                error, allowed = ((t - truth).abs().max() for t in (actual, same))
                limit = allowed + torch.finfo(x.dtype).eps * truth.abs().max()
                assert error <= 2 * limit, f"{name}: error {error:.2e}, allowed {2 * limit:.2e}"

    layers = {MODULES: modules, OURS: ours}
    contestants = {LINEAR: partial(run, lambda x: F.linear(x, weight, bias), [x], backward)}
    contestants |= {name: partial(run, f, [x, *parts], backward) for name, f in layers.items()}
    layer, adapter = 2 * rows * into * out_of, 4 * rows * width * rank
    flops = dict.fromkeys(layers, (2 if backward else 1) * layer + (3 if backward else 1) * adapter)
    compare(
        contestants,
        MODULES,
        check=check,
        memory=True,
        rounds=3 if device == "cpu" else None,
        model=model,
        place=place,
        tokens=rows,
        dtype=dtype,
        dropout=dropout,
        direction=direction,
        # as the two layers need them: the frozen one has no gradient of its weight
        flops={LINEAR: (2 if backward else 1) * layer} | flops,
        # input, weight and output once, backward also with the gradients of input and output
        bytes=(rows * (into + out_of) * (3 if backward else 1) + into * out_of) * x.itemsize,
        goals={f"{OURS} / {MODULES}": 1.0},
    )


def run(function: Callable[..., Tensor], tensors: list[Tensor], backward: bool) -> list[Tensor]:
    """The output, and with `backward` the gradients of all tensors for one equal to it."""
    if not backward:
        with torch.no_grad():
            return [function(*tensors)]
    tensors = [t.detach().requires_grad_() for t in tensors]
    out = function(*tensors)
    return [out.detach(), *torch.autograd.grad(out, tensors, torch.ones_like(out))]
