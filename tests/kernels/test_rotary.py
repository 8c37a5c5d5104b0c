"""Rotary positions against complex multiplication: values, gradients, both ways."""

import pytest
import torch
from rounding import assert_within_budget
from triton_ops import DEVICE, DTYPES
from zeroi2v_kernels import proof, rotary, rotary_triton
from zeroi2v_kernels.rotary import _rotated, rotated, turn_

SHAPES = [(1, 1, 1, 2, 1, 4), (2, 3, 6, 3, 2, 8), (1, 2, 21, 3, 3, 64), (1, 1, 5, 2, 2, 72)]


def inputs(shape, dtype=torch.float32, prefix=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(DEVICE, dtype)
    places = max(1, shape[2] - prefix)
    angles = 20 * torch.randn(places, shape[-1] // 2, generator=generator)
    return x, torch.stack([angles.cos(), angles.sin()]).to(DEVICE)


def reference(x, table, parts):
    """Pairs as complex numbers, multiplied by e^(i angle)."""
    pairs = torch.complex(*x[:, :, x.shape[2] - table.shape[1] :, :parts].chunk(2, -1))
    turned = pairs * torch.complex(*table.to(x.dtype))[:, None, None]
    out = x.clone()
    turned = torch.cat([turned.real, turned.imag], -1)
    out[:, :, x.shape[2] - table.shape[1] :, :parts] = turned
    return out


@pytest.fixture(params=["pytorch", "triton"])
def backend(request, monkeypatch):
    """Which of the two computes."""
    on_kernels = request.param == "triton"
    monkeypatch.setattr(rotary.choice, "uses_kernels", lambda x: on_kernels)
    return request.param


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_pairs_are_multiplied_as_complex_numbers(backend, shape, parts, prefix):
    x, table = inputs(shape, prefix=prefix)
    expected = reference(x.double(), table.double(), parts)
    torch.testing.assert_close(rotated(x, table, parts).double(), expected, rtol=0, atol=2e-6)
    again = x.clone()
    assert rotated(again, table, parts, overwrite=True) is again
    assert torch.equal(again, rotated(x, table, parts))
    turn_(again, table, parts, back=True)
    torch.testing.assert_close(again, x, rtol=0, atol=4e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_value_and_gradient_are_as_exact_as_pytorch_s(backend, dtype):
    x, table = inputs((2, 2, 7, 3, 2, 16), dtype)
    x.requires_grad_()

    def plain(x):
        kept, turning = x[:, :, :1], x[:, :, 1:]
        first, second = turning[:, :, :, :2].chunk(2, -1)
        c, s = table.to(torch.promote_types(x.dtype, torch.float32))[:, :, None, None]
        turned = torch.cat([first * c - second * s, second * c + first * s], -1).to(x.dtype)
        return torch.cat([kept, torch.cat([turned, turning[:, :, :, 2:]], 3)], 2)

    assert_within_budget(lambda x: rotated(x, table, 2), plain, [x])


def test_a_strided_view_is_turned_where_it_lies(backend):
    wide, table = inputs((2, 2, 7, 3, 2, 32))
    view = wide[..., ::2]
    expected = rotated(view.clone(), table[..., :8], 2)
    turn_(view, table[..., :8], 2)
    assert torch.equal(view, expected)


def test_float64_keeps_its_digits():
    x, table = inputs((1, 2, 6, 3, 2, 8), torch.float64)
    table = table.double()
    torch.testing.assert_close(rotated(x, table, 2), reference(x, table, 2), rtol=0, atol=1e-14)


def test_is_a_well_formed_operator(backend):
    x, table = inputs((1, 2, 5, 3, 2, 8))
    torch.library.opcheck(_rotated.op, (x.requires_grad_(), table, 2, False))


def test_the_kernel_proves_itself_and_a_wrong_one_gives_way(monkeypatch, tmp_path):
    monkeypatch.setattr(proof, "INTERPRETED", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rotary.choice, "uses_kernels", lambda x: True)
    x, table = inputs((1, 2, 6, 3, 2, 8))
    expected = reference(x.double(), table.double(), 2)
    assert rotary_triton.turn_in_place(x.clone(), table, 2, False)
    run = rotary_triton._run
    wrong = lambda x, table, parts, back: run(x, table, parts, not back)  # noqa: E731
    monkeypatch.setattr(rotary_triton, "_run", wrong)
    x2, table2 = inputs((1, 2, 8, 3, 2, 8))
    assert not rotary_triton.turn_in_place(x2.clone(), table2, 2, False)
    out = rotated(x2, table2, 2)
    torch.testing.assert_close(
        out.double(), reference(x2.double(), table2.double(), 2), rtol=0, atol=2e-6
    )
    assert expected.isfinite().all()


def test_wrong_arguments_are_refused():
    x, table = inputs((1, 2, 5, 3, 2, 8))
    with pytest.raises(ValueError, match=r"x must be \[B, T, N, K, H, D\], K at least 4: got"):
        rotated(x, table, 4)
    with pytest.raises(ValueError, match=r"table must be \[2, P, 4\] for at most 5 places: got"):
        rotated(x, table[..., :2], 2)
