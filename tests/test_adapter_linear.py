"""A frozen linear layer with its adapter: gradients against float64, dropout, its kernels."""

from itertools import product

import pytest
import torch
from rounding import assert_within_budget
from torch.utils.flop_counter import FlopCounterMode
from triton_ops import DEVICE, poisoned
from zeroi2v_kernels import choice
from zeroi2v_kernels.adapter_linear import (
    Adapter,
    Dropout,
    adapt,
    adapt_grad,
    adapter_linear,
    adapter_linear_backward,
    adapter_linear_forward,
    adapter_linear_reference,
    dropout_mask,
    merge,
)

# The four places of a block of width 32: features in and out, whether the adapter comes after.
PLACES = {
    "before qkv": (32, 96, False),
    "after proj": (32, 32, True),
    "before fc1": (32, 128, False),
    "after fc2": (128, 32, True),
}
FEW, MANY = 20, 300  # rows; from many on merging pays


@pytest.fixture
def on_kernels(monkeypatch):
    """The GPU's path, in Triton's interpreter."""
    monkeypatch.setattr(choice, "uses_kernels", lambda x: True)


@pytest.fixture
def kernels():
    return pytest.importorskip("zeroi2v_kernels.adapter_linear_triton", reason="needs triton")


def make(place, rows, dtype=torch.float64, rank=16, scale=0.5, seed=0):
    """x, weight, bias and the four tensors of the adapter."""
    in_features, out_features, after = PLACES[place]
    width = out_features if after else in_features
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, size=1.0):
        return size * torch.randn(shape, generator=generator, dtype=torch.float64)

    frozen = [draw(out_features, in_features, size=in_features**-0.5), draw(out_features)]
    adapter = [draw(rank, width, size=width**-0.5), draw(rank)]
    adapter += [draw(width, rank, size=rank**-0.5), draw(width)]
    x = draw(rows, in_features)
    trained = [t.to(DEVICE, dtype).requires_grad_() for t in (x, *adapter)]
    return trained, [t.to(DEVICE, dtype) for t in frozen]


def judge(place, rows, dtype, dropout=0.0, scale=0.5):
    """Value and all gradients against float64, in the budget of plain PyTorch."""
    trained, frozen = make(place, rows, dtype)
    after, seed = PLACES[place][2], torch.tensor(7, device=DEVICE)
    mask = None
    if dropout:
        like = trained[0].new_empty(rows, trained[1].shape[0])
        mask = dropout_mask(like, Dropout(dropout, seed))

    def ours(x, *adapter):
        parts = Adapter(*adapter, scale)
        return adapter_linear(x, *frozen, parts, after, dropout, seed if dropout else None)

    def reference(x, *adapter):
        weight, bias = (t.to(x.dtype) for t in frozen)
        drawn = None if mask is None else mask.to(x.dtype)
        return adapter_linear_reference(x, weight, bias, Adapter(*adapter, scale), after, drawn)

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


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rows, dropout", [(FEW, 0.0), (MANY, 0.0), (FEW, 0.4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_value_and_gradients_at_every_place(place, rows, dropout, dtype):
    judge(place, rows, dtype, dropout)


@pytest.mark.parametrize("place", PLACES)
def test_scale_one_is_no_special_case(place):
    judge(place, FEW, torch.float64, dropout=0.4, scale=1.0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kernels_are_as_exact(on_kernels, place, dtype):
    with poisoned():
        judge(place, 140, dtype, dropout=0.4)


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
    (x, *adapter), _ = make("before qkv", 0, torch.bfloat16)
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


def test_merging_is_exact_and_formed_in_float32():
    for place, (_, _, after) in PLACES.items():
        trained, frozen = make(place, FEW)
        x, adapter = trained[0], Adapter(*trained[1:], 0.5)
        weight, bias = merge(*frozen, adapter, after)
        expected = adapter_linear_reference(x, *frozen, adapter, after)
        torch.testing.assert_close(x @ weight.T + bias, expected, rtol=1e-10, atol=1e-10)
        low = [t.detach().bfloat16() for t in (*frozen, *adapter[:4])]
        wide = [t.double() for t in low]
        rounded = merge(*low[:2], Adapter(*low[2:], 0.5), after)
        exact = merge(*wide[:2], Adapter(*wide[2:], 0.5), after)
        for ours, truth in zip(rounded, exact, strict=True):  # rounded once, to bfloat16's 8 bits
            assert ((ours.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-6).all()


def test_merging_happens_where_it_saves_work_and_only_without_dropout():
    counted = {}
    for place, (_, _, after) in PLACES.items():
        (x, *adapter), frozen = make(place, MANY)
        tensors = (x.detach(), *frozen, [t.detach() for t in adapter])
        for merged in (False, True):
            with FlopCounterMode(display=False) as counter:  # it can't look into operators
                forward, backward = adapter_linear_forward, adapter_linear_backward
                out, *kept = forward._init_fn(*tensors, None, 0.5, after, 0.0, merged)
                d, source = (*kept, None, None)[:2]
                source = tensors[0] if source is None else source
                backward._init_fn(out, source, d, *tensors[1:], None, 0.5, after, 0.0)
            counted[merged] = counter.get_total_flops()
        assert choice.merging_pays(MANY, frozen[0]) == (place != "after fc2")
        assert (counted[True] < counted[False]) == choice.merging_pays(MANY, frozen[0])
        assert not choice.merging_pays(FEW, frozen[0])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("rows", [FEW, MANY])
def test_autocast_computes_in_its_dtype_and_gives_gradients_in_the_weights_own(place, rows):
    trained, frozen = make(place, rows, torch.float32)
    values = []
    for autocast in (False, True):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            out = adapter_linear(trained[0], *frozen, Adapter(*trained[1:], 0.5), PLACES[place][2])
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        values.append([out, *torch.autograd.grad(out.float().square().sum(), trained)])
    for expected, actual in zip(*values, strict=True):
        assert (actual - expected).norm() <= 0.03 * expected.norm()
    assert all(t.dtype == torch.float32 for t in values[1][1:])


def test_merging_under_autocast_is_formed_in_float32_too():
    trained, frozen = make("before qkv", MANY, torch.float32)
    low = [t.detach().bfloat16() for t in (trained[0], *frozen, *trained[1:])]
    x, weight, bias, *adapter = low
    expected = adapter_linear(x, weight, bias, Adapter(*adapter, 0.5))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(adapter_linear(x, weight, bias, Adapter(*adapter, 0.5)), expected)


def test_an_adapter_is_not_merged_where_there_is_dropout():
    (x, *adapter), frozen = make("before qkv", MANY)
    outs = [adapter_linear(x, *frozen, Adapter(*adapter, 0.5), dropout=0.4) for _ in range(2)]
    assert not torch.equal(*outs)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("merged", [False, True])
def test_is_a_well_formed_operator(place, merged):
    (x, *adapter), frozen = make(place, 3, torch.float32)
    seed = None if merged else torch.tensor(3, device=DEVICE)
    dropout = 0.0 if merged else 0.4
    args = (x, *frozen, adapter, seed, 0.5, PLACES[place][2], dropout, merged)
    torch.library.opcheck(adapter_linear_forward, args)
    with torch.no_grad():
        adapter = [t.detach() for t in adapter]
        out, *kept = adapter_linear_forward(*args[:3], adapter, *args[4:])
        d, source = (*kept, None, None)[:2]
        source = x.detach() if source is None else source
        args = (out, source, d, *frozen, adapter, seed, 0.5, PLACES[place][2], dropout)
        torch.library.opcheck(adapter_linear_backward, args)


def test_leading_axes_are_kept():
    (x, *adapter), frozen = make("before qkv", 12)
    adapter = Adapter(*adapter, 0.5)
    out = adapter_linear(x.view(3, 4, -1), *frozen, adapter)
    assert torch.equal(out.flatten(0, 1), adapter_linear(x, *frozen, adapter))


def test_wrong_arguments_are_refused():
    (x, *adapter), (weight, bias) = make("before qkv", 2)
    adapter = Adapter(*adapter, 0.5)
    with pytest.raises(ValueError, match=r"weight must be \[out, 32\]: got \[96, 31\]"):
        adapter_linear(x, weight[:, 1:], bias, adapter)
    with pytest.raises(ValueError, match=r"bias must be \[96\]: got \[95\]"):
        adapter_linear(x, weight, bias[1:], adapter)
    with pytest.raises(ValueError, match=r"adapter.up must be \[96, 16\]: got \[32, 16\]"):
        adapter_linear(x, weight, bias, adapter._replace(down=torch.zeros(16, 96)), after=True)
    with pytest.raises(ValueError, match="weight must be frozen: got one that requires a grad"):
        adapter_linear(x, weight.clone().requires_grad_(), bias, adapter)
    with pytest.raises(ValueError, match=r"weights must be torch.float64 like x: got torch.float3"):
        adapter_linear(x, weight.float(), bias, adapter)
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\): got 1"):
        adapter_linear(x, weight, bias, adapter, dropout=1)
