"""Residual add and LayerNorm in Triton against PyTorch: values, every gradient, statistics."""

import pytest
import torch
from covering import pairwise
from rounding import assert_within_budget
from triton_ops import DEVICE, DTYPES, poisoned
from zeroi2v_kernels.norm import (
    add_norm,
    add_norm_reference,
    norm_backward,
    norm_forward,
)

SHAPES = [(1, 16), (5, 48), (2, 3, 768), (2, 5, 3, 96), (21, 64)]


def inputs(shape, dtype, has_residual, seed=0, weight_dtype=None):
    generator = torch.Generator().manual_seed(seed)
    x, residual = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = 1 + 0.3 * torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    bias = torch.randn(shape[-1], generator=generator, dtype=torch.float64)
    tensors = [x.to(dtype), residual.to(dtype) if has_residual else None]
    tensors += [t.to(weight_dtype or dtype) for t in (weight, bias)]
    return [t if t is None else t.to(DEVICE).requires_grad_() for t in tensors]


@pytest.mark.parametrize(
    *pairwise(centres=(True, False), has_residual=(False, True), shape=SHAPES, dtype=DTYPES)
)
def test_values_and_gradients_are_as_exact_as_pytorch_s(centres, has_residual, shape, dtype):
    rest = (1e-5, centres)
    with poisoned():
        tensors = inputs(shape, dtype, has_residual)
        assert_within_budget(
            lambda *x: add_norm(*x, *rest), lambda *x: add_norm_reference(*x, *rest), tensors
        )


def test_reference_is_the_norm_of_pytorch():
    x, _, weight, bias = inputs((5, 48), torch.float64, False)
    for eps in (1e-5, 0.1):
        ours = add_norm_reference(x, None, weight, bias, eps)[0]
        torch.testing.assert_close(ours, torch.layer_norm(x, (48,), weight, bias, eps))
        ours = add_norm_reference(x, None, weight, bias, eps, False)[0]
        theirs = torch.nn.functional.rms_norm(x, (48,), weight, eps) + bias
        torch.testing.assert_close(ours, theirs)


def test_weights_may_stay_in_float32():
    x, residual, weight, bias = inputs((3, 64), torch.bfloat16, True, weight_dtype=torch.float32)
    normed, total = add_norm(x, residual, weight, bias)
    assert normed.dtype == total.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(normed.float().sum(), weight)
    assert grad.dtype == torch.float32
    expected, _ = add_norm_reference(x, residual, weight, bias)
    torch.testing.assert_close(normed, expected, rtol=0.02, atol=0.02)


def test_statistics_are_float32_and_survive_a_large_mean():
    generator = torch.Generator().manual_seed(0)
    x = (300 + torch.randn(5, 64, generator=generator)).bfloat16().to(DEVICE)
    one, zero = torch.ones(64, device=DEVICE), torch.zeros(64, device=DEVICE)
    truth = torch.nn.functional.layer_norm(x.double(), (64,), eps=1e-5)
    normed, _ = add_norm(x, None, one, zero)
    assert (normed.double() - truth).abs().max() <= 2**-8 * truth.abs().max()


def test_what_is_normalised_is_the_sum_as_it_is_stored():
    x, residual, weight, bias = inputs((4, 32), torch.bfloat16, True)
    normed, total = add_norm(x, residual, weight, bias)
    # One place in bfloat16's 8: Triton's interpreter cuts where a GPU rounds.
    torch.testing.assert_close(total, x + residual, rtol=2**-7, atol=0)
    assert torch.equal(normed, add_norm(total, None, weight, bias)[0])


def test_a_gradient_of_the_sum_alone_passes_through():
    x, residual, weight, bias = inputs((4, 32), torch.float32, True)
    _, total = add_norm(x, residual, weight, bias)
    for grad in torch.autograd.grad(total, (x, residual), torch.ones_like(total)):
        assert torch.equal(grad, torch.ones_like(total))


def test_strided_input_is_read_right():
    x, _, weight, bias = inputs((8, 32), torch.float32, False)
    x = x.detach()[::2]
    expected, _ = add_norm_reference(x, None, weight, bias)
    torch.testing.assert_close(add_norm(x, None, weight, bias)[0], expected)


def test_no_rows_are_no_trouble():
    x, weight = torch.empty(0, 16, device=DEVICE), torch.ones(16, device=DEVICE)
    assert add_norm(x, None, weight, weight)[0].numel() == 0


def test_two_runs_are_bit_equal():
    tensors = inputs((21, 96), torch.bfloat16, True)
    runs = []
    for _ in range(2):
        normed, _ = add_norm(*tensors)
        runs.append([normed, *torch.autograd.grad(normed.float().square().sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("centres", [True, False])
@pytest.mark.parametrize("has_residual", [False, True])
def test_is_a_well_formed_operator(centres, has_residual):
    tensors = inputs((3, 32), torch.float32, has_residual)
    torch.library.opcheck(norm_forward.op, (*tensors, 1e-5, centres, torch.float32))
    with torch.no_grad():
        normed, total, mean, rstd = norm_forward(*tensors, 1e-5, centres, torch.float32)
        total = total if has_residual else tensors[0].detach()
        args = (normed, total, total, mean, rstd, tensors[2].detach(), centres, has_residual)
        torch.library.opcheck(norm_backward.op, args)


def test_wrong_arguments_are_refused():
    x, weight = torch.zeros(2, 16), torch.zeros(16)
    with pytest.raises(ValueError, match=r"weight must be \[16\]: got \[2\]"):
        add_norm(x, None, torch.zeros(2), weight)
    with pytest.raises(ValueError, match=r"residual must be \[2, 16\] of torch.float32: got \[3"):
        add_norm(x, torch.zeros(3, 16), weight, weight)
    with pytest.raises(ValueError, match=r"x must be float32, bfloat16 or float16: got torch.fl"):
        add_norm(x.double(), None, weight, weight)
