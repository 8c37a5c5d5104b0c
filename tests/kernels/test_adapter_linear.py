"""The arithmetic of an adapter and a frozen linear layer: gradients, merging, dropout, kernels."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from rounding import assert_within_budget
from torch.utils.flop_counter import FlopCounterMode
from triton_ops import DEVICE, poisoned
from zeroi2v_kernels import choice
from zeroi2v_kernels.adapter_linear import (
    Adapter,
    Dropout,
    adapt,
    adapt_grad,
    adapter_reference,
    dropout_mask,
    merge,
    merged_after_grad,
    parameter_grads,
)

WIDTH, RANK, ROWS, SCALE = 32, 16, 20, 0.5
PLACES = ("alone", "after a layer", "merged into the layer before")


@pytest.fixture
def on_kernels(monkeypatch):
    """The GPU's path, in Triton's interpreter."""
    monkeypatch.setattr(choice, "uses_kernels", lambda x: True)


@pytest.fixture
def kernels():
    return pytest.importorskip("zeroi2v_kernels.adapter_linear_triton", reason="needs triton")


def make(rows=ROWS, dtype=torch.float64, in_features=WIDTH, out_features=WIDTH):
    """x and the four tensors of an adapter after it; weight and bias of a frozen layer."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, size=1.0):
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    frozen = [draw(out_features, in_features, size=in_features**-0.5), draw(out_features)]
    adapter = [draw(RANK, WIDTH, size=WIDTH**-0.5), draw(RANK)]
    adapter += [draw(WIDTH, RANK, size=RANK**-0.5), draw(WIDTH)]
    trained = [t.to(DEVICE, dtype).requires_grad_() for t in (draw(rows, in_features), *adapter)]
    return trained, [t.to(DEVICE, dtype) for t in frozen]


class Adapted(torch.autograd.Function):
    """An adapter at one of `PLACES`, forward and backward by the parts that are tested."""

    @staticmethod
    def forward(ctx, place, frozen, drop, scale, x, *tensors):
        adapter = Adapter(*tensors, scale)
        ctx.given, ctx.x = (place, frozen, drop, adapter), x
        if place == PLACES[2]:
            return F.linear(x, *merge(*frozen, adapter, after=True))
        out, ctx.d = adapt(x if place == PLACES[0] else F.linear(x, *frozen), adapter, drop)
        return out

    @staticmethod
    def backward(ctx, grad):
        place, frozen, drop, adapter = ctx.given
        grad = grad.contiguous()
        if place == PLACES[2]:
            x_grad, grads = merged_after_grad(grad, ctx.x, *frozen, adapter)
        else:
            linear = None if place == PLACES[0] else frozen
            x_grad, d_grad, sums = adapt_grad(grad, adapter, drop)
            grads = parameter_grads(grad, ctx.x, ctx.d, d_grad, sums, adapter.scale, linear)
            x_grad = x_grad if linear is None else x_grad @ frozen[0]
        return *[None] * 4, x_grad, *(g.to(w.dtype) for g, w in zip(grads, adapter, strict=False))


def judge(place, dtype, dropout=0.0, scale=SCALE, rows=ROWS):
    """Value and all gradients against float64, in the budget of plain PyTorch."""
    trained, frozen = make(rows, dtype)
    drop, mask = Dropout(), None
    if dropout:
        drop = Dropout(dropout, torch.tensor(7, device=DEVICE))
        mask = dropout_mask(trained[0].new_empty(rows, RANK), drop)

    def ours(*tensors):
        return Adapted.apply(place, frozen, drop, scale, *tensors)

    def reference(x, *adapter):
        if place != PLACES[0]:
            x = F.linear(x, *(t.to(x.dtype) for t in frozen))
        drawn = None if mask is None else mask.to(x.dtype)
        return adapter_reference(x, Adapter(*adapter, scale), drawn)

    if dtype != torch.float64:
        assert_within_budget(ours, reference, trained)
        return
    values = []
    for function in (ours, reference):
        out = function(*trained)
        weight = torch.linspace(-1, 1, out.numel(), dtype=dtype, device=DEVICE).view(out.shape)
        values.append([out, *torch.autograd.grad(out, trained, weight)])
    for actual, expected in zip(*values, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * expected.abs().max()


@pytest.mark.parametrize("place, dropout", [*product(PLACES, (0.0,)), *product(PLACES[:2], (0.4,))])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradients_at_every_place(place, dropout, dtype):
    judge(place, dtype, dropout)


@pytest.mark.parametrize("place", PLACES)
def test_scale_one_is_no_special_case(place):
    judge(place, torch.float64, dropout=0.4 if place != PLACES[2] else 0.0, scale=1.0)


@pytest.mark.parametrize("place", PLACES[:2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_are_as_exact(on_kernels, place, dtype):
    with poisoned():
        judge(place, dtype, dropout=0.4, rows=140)


@pytest.mark.parametrize("rank", [16, 48, 192, 256])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_way_up_in_a_kernel_equals_a_product_and_sums(kernels, monkeypatch, rank, dropout):
    """Ranks of one and two tiles; 140 rows, which two programs take in three turns; 80 channels."""
    launch = {arch: x._replace(programs=2) for arch, x in kernels.LAUNCH.items()}
    monkeypatch.setattr(kernels, "LAUNCH", launch)
    generator = torch.Generator().manual_seed(0)
    shapes = ((140, 80), (140, 80), (rank, 80), (rank,), (80, rank), (80,))
    tensors = [torch.randn(s, generator=generator).bfloat16().to(DEVICE) for s in shapes]
    x, residual, adapter = tensors[0], tensors[1].float(), Adapter(*tensors[2:], 0.5)
    drop = Dropout(dropout, torch.tensor(3, device=DEVICE) if dropout else None, place=2)
    monkeypatch.setattr(choice, "uses_kernels", lambda x: True)

    def compute():
        *grads, sums = adapt_grad(x, adapter, drop)
        return [*adapt(x, adapter, drop, residual), *grads, *sums]

    with poisoned():
        in_kernel, again = compute(), compute()
    assert all(torch.equal(*two) for two in zip(in_kernel, again, strict=True))
    monkeypatch.setattr(kernels, "takes", lambda *_: False)
    for actual, expected in zip(in_kernel, compute(), strict=True):
        assert actual.dtype == expected.dtype and actual.shape == expected.shape
        assert (actual - expected).float().norm() <= 0.01 * expected.float().norm()
        if dropout and actual.shape == (140, rank):  # d and dd lose the same elements
            assert torch.equal(actual == 0, expected == 0)


def test_no_rows_give_sums_of_zero(on_kernels):
    (x, *adapter), _ = make(0, torch.bfloat16)
    drop = Dropout(0.4, torch.tensor(3, device=DEVICE))
    x_grad, d_grad, sums = adapt_grad(x.detach(), Adapter(*adapter, 0.5), drop)
    assert x_grad.shape == (0, 32) and d_grad.shape == (0, 16)
    assert [s.tolist() for s in sums] == [[0.0] * 16, [0.0] * 32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("rank", [20, 192])
def test_dropout_applies_its_mask_and_sums_what_it_gives(kernels, rank, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, rank, generator=generator).to(DEVICE, dtype)
    drawn = 2**15, torch.tensor(2**40 + 5, device=DEVICE), 3  # a mask of 0 and 2: exact
    mask = kernels.mask(*x.shape, *drawn)
    with poisoned():
        out, sums = kernels.dropout(x.clone(), *drawn)
    assert torch.equal(out, (x.float() * mask).to(dtype)) and out.dtype == dtype
    expected = out.double().sum(0)
    assert (sums.double().sum(0) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("in_kernels", [False, True])
def test_dropout_depends_on_seed_and_place_alone(monkeypatch, in_kernels):
    monkeypatch.setattr(choice, "uses_kernels", lambda x: in_kernels)
    like = torch.empty(400, 48, device=DEVICE)
    drawn = [(5, 0), (5, 0), (5, 1), (6, 0)] + [(5 + 2**40, 0)] * in_kernels
    draws = [
        dropout_mask(like, Dropout(0.25, torch.tensor(seed, device=DEVICE), place))
        for seed, place in drawn
    ]
    assert torch.equal(draws[0], draws[1])
    for other in draws[2:]:
        agreement = (draws[0] == other).double().mean().item()
        assert agreement == pytest.approx(0.75**2 + 0.25**2, abs=0.02)
    for mask in draws:
        assert mask.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
        assert mask.mean().item() == pytest.approx(1, abs=0.02)
        assert mask.mean(0).max() < 1.15 and mask.mean(1).max() <= 1 / 0.75  # no stripes


def test_decisions_of_one_draw_are_independent(kernels):
    seed, rows = torch.tensor(5, device=DEVICE), 20_000
    kept = kernels.mask(rows, 16, 2**14, seed, 0) != 0
    assert (kept.double().mean(0) - 0.75).abs().max() <= 4 * (0.1875 / rows) ** 0.5
    off = torch.corrcoef(kept.double().t()) - torch.eye(16, device=DEVICE)
    assert off.abs().max() <= 4.5 * rows**-0.5


def test_philox_gives_the_published_numbers(kernels):
    """8 columns share the words of Philox4x32 with 7 rounds of (row, column // 8, place)."""
    seed, place, dropped = 0x1234567890ABCDEF, 3, 2**15
    ones = torch.ones(5, 20, device=DEVICE)
    mask, _ = kernels.dropout(ones, dropped, torch.tensor(seed, device=DEVICE), place)
    for row, column in product(range(5), range(20)):
        word = philox(row, column // 8, place, 0, seed)[column % 8 // 2]
        number = word >> 16 if column % 2 else word & 0xFFFF
        assert (mask[row, column] != 0) == (number >= dropped)


def philox(c0, c1, c2, c3, seed, rounds=7) -> tuple[int, int, int, int]:
    """Philox4x32 (Salmon et al., SC 2011)."""
    k0, k1, low = seed & 0xFFFFFFFF, seed >> 32, 0xFFFFFFFF
    for _ in range(rounds):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & low, (a >> 32) ^ c3 ^ k1, a & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


@pytest.mark.parametrize("after", [False, True])
def test_merging_is_exact_and_formed_in_float32(after):
    sides = dict(in_features=48) if after else dict(out_features=96)
    trained, frozen = make(**sides)
    x, adapter = trained[0], Adapter(*trained[1:], SCALE)
    weight, bias = merge(*frozen, adapter, after)
    if after:
        expected = adapter_reference(F.linear(x, *frozen), adapter)
    else:
        expected = F.linear(adapter_reference(x, adapter), *frozen)
    torch.testing.assert_close(F.linear(x, weight, bias), expected, rtol=1e-10, atol=1e-10)
    low = [t.detach().bfloat16() for t in (*frozen, *adapter[:4])]
    wide = [t.double() for t in low]
    rounded = merge(*low[:2], Adapter(*low[2:], SCALE), after)
    exact = merge(*wide[:2], Adapter(*wide[2:], SCALE), after)
    for ours, truth in zip(rounded, exact, strict=True):  # rounded once, to bfloat16's 8 bits
        assert ((ours.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-6).all()


def test_merging_pays_where_it_takes_fewer_operations():
    """After the projection, of width to width: merged, of the layer's input alone."""
    drop = Dropout()
    for rows in (20, 100, 300):
        trained, frozen = make(rows)
        x, *tensors = (t.detach() for t in trained)
        adapter, grad, counted = Adapter(*tensors, SCALE), torch.ones_like(x), []
        for merged in (False, True):
            with FlopCounterMode(display=False) as counter:
                if merged:
                    F.linear(x, *merge(*frozen, adapter, after=True))
                    merged_after_grad(grad, x, *frozen, adapter)
                else:
                    _, d = adapt(F.linear(x, *frozen), adapter, drop)
                    x_grad, d_grad, sums = adapt_grad(grad, adapter, drop)
                    parameter_grads(grad, x, d, d_grad, sums, SCALE, frozen)
                    x_grad @ frozen[0]
            counted.append(counter.get_total_flops())
        assert (counted[1] < counted[0]) == choice.merging_pays(rows, frozen[0]), rows
    assert not choice.merging_pays(300, torch.empty(32, 128))  # after fc2 it never does
