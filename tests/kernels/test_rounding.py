"""The budgets of rounding: right whoever multiplies, and far below any wrong tile."""

import pytest
import torch
from attention import attention, packed_attention
from covering import pairwise
from rounding import assert_within_budget, excesses, values
from zeroi2v_kernels.stdha import stdha

OFFSETS = (1, 0)


def draw(tokens: int, dtype: torch.dtype, width: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, 2, tokens, 3, 2, width, generator=generator).to(dtype)


def excess_of(function, x: torch.Tensor) -> list[float]:
    """Of the output and of the gradient, beside those of the definition."""
    return excesses(values(function, [x]), lambda x: packed_attention(x, OFFSETS), [x])


def without_last_keys(qkv):
    """The last 16 keys are never multiplied."""
    return attention(qkv[:, :, :, 0], qkv[:, :, :-16, 1:], OFFSETS)


def last_tile_reads_its_own_frame(qkv):
    """The last 16 queries forget the offset."""
    shifted, own = packed_attention(qkv, OFFSETS), packed_attention(qkv, (0, 0))
    return torch.cat([shifted[:, :, :-16], own[:, :, -16:]], 2)


def tile_given_twice(qkv):
    """The second 16 rows are the first ones."""
    out = packed_attention(qkv, OFFSETS)
    return torch.cat([out[:, :, :16], out[:, :, :16], out[:, :, 32:]], 2)


class _GradientWithoutLastKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv):
        return qkv.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[:, :, -16:, 1:] = 0
        return grad


def unwritten_gradient(qkv):
    """The last 16 keys and values get no gradient."""
    return packed_attention(_GradientWithoutLastKeys.apply(qkv), OFFSETS)


@pytest.mark.parametrize(
    *pairwise(
        fault=(
            without_last_keys, last_tile_reads_its_own_frame, tile_given_twice, unwritten_gradient,
        ),
        tokens=(33, 197),
        dtype=(torch.float32, torch.bfloat16, torch.float16),
    )
)  # fmt: skip
def test_a_wrong_tile_exceeds_its_budget_by_far(fault, tokens, dtype):
    assert max(excess_of(fault, draw(tokens, dtype))) > 20


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("bits", [10, 7])  # TensorFloat-32, bfloat16
def test_products_of_rounded_operands_are_no_float32(bits, width):
    def rounded(x):
        step = 2.0**-bits
        _, exponent = torch.frexp(x.detach())
        grid = torch.ldexp(torch.full_like(x, step), exponent - 1)
        return x + (torch.round(x.detach() / grid) * grid - x.detach())

    x = draw(50, torch.float32, width)
    found = excess_of(lambda x: packed_attention(rounded(x), OFFSETS), x)
    assert min(found) > 4 * 2 ** (10 - bits)


def test_one_nan_exceeds_every_budget():
    x = draw(33, torch.float32)
    out, gradient = values(lambda x: packed_attention(x, OFFSETS), [x])
    out[0, 1, 5, 0, 7] = torch.nan
    found = excesses([out, gradient], lambda x: packed_attention(x, OFFSETS), [x])
    assert found[0] == torch.inf and found[1] < 1


def test_sums_in_any_order_are_within_their_budget():
    """Terms one after the other, backwards, and by halves, as libraries add them."""

    def one_by_one(x, weight, step):
        products = (x[:, None] * weight).unbind(-1)[::step]
        total = products[0]
        for product in products[1:]:
            total = total + product
        return total

    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(20, 1000, generator=generator) for _ in range(2))
    for terms in (x, x.abs()):  # that cancel, and that don't
        for step in (1, -1):
            assert_within_budget(
                lambda x, w, step=step: one_by_one(x, w, step),
                lambda x, w: x @ w.T,
                [terms, weight],
            )
        assert_within_budget(
            lambda x, w: x[:, ::2] @ w[:, ::2].T + x[:, 1::2] @ w[:, 1::2].T,
            lambda x, w: x @ w.T,
            [terms, weight],
        )


def test_an_operation_without_a_known_rounding_is_named():
    with pytest.raises(NotImplementedError, match=r"does not know how aten.tan.default rounds"):
        excesses([torch.ones(2)] * 2, torch.tan, [torch.ones(2)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_kernel_that_leaves_a_tile_out_is_caught(monkeypatch, dtype):
    """The forward kernels themselves, with the last tile of keys taken from them."""
    launch = pytest.importorskip("zeroi2v_kernels.stdha_launch", reason="needs triton")
    if not (torch.cuda.is_available() or launch.INTERPRET):
        pytest.skip("needs Triton's interpreter")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = draw(70, dtype).to(device)
    assert max(excess_of(lambda x: stdha(x, OFFSETS, backend="triton"), x)) <= 1
    segments = launch.segments
    monkeypatch.setattr(launch, "_launches", launch._launches.__wrapped__)  # nothing remembered
    monkeypatch.setattr(launch, "segments", lambda n: segments(n)[:-1])
    monkeypatch.setattr(launch, "_tail", lambda n, block: 0)
    assert max(excess_of(lambda x: stdha(x, OFFSETS, backend="triton"), x)) > 20
