"""Bias and activation in Triton against PyTorch: values and every gradient, poisoned outputs."""

import pytest
import torch
from covering import pairwise
from rounding import assert_within_budget
from triton_ops import DEVICE, DTYPES, poisoned
from zeroi2v_kernels.activation import (
    KINDS,
    activation_backward,
    activation_forward,
    bias_activation,
    bias_activation_reference,
)
from zeroi2v_kernels.activation_reference import activate, activate_grad

SHAPES = [(1, 16), (5, 48), (3, 7, 1040), (2, 3, 5, 96), (9, 2048)]


def inputs(shape, dtype, has_bias, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 3 * torch.randn(shape, generator=generator, dtype=torch.float64)
    bias = torch.randn(shape[-1], generator=generator, dtype=torch.float64) if has_bias else None
    return [t if t is None else t.to(DEVICE, dtype).requires_grad_() for t in (x, bias)]


@pytest.mark.parametrize(*pairwise(kind=KINDS, has_bias=(False, True), shape=SHAPES, dtype=DTYPES))
def test_value_and_gradients_are_as_exact_as_pytorch_s(kind, has_bias, shape, dtype):
    tensors = inputs(shape, dtype, has_bias)
    with poisoned():
        assert_within_budget(
            lambda x, bias: bias_activation(x, bias, kind),
            lambda x, bias: bias_activation_reference(x, bias, kind),
            tensors,
        )


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_written_out_is_that_of_autograd(kind):
    x, _ = inputs((5, 48), torch.float64, False)
    out = activate(x, kind)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    (expected,) = torch.autograd.grad(out, x, grad.to(x.device))
    actual = activate_grad(grad.to(x.device, copy=True), x.detach(), kind)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-14)


def test_strided_input_is_read_right():
    x = inputs((12, 32), torch.float32, False)[0].detach()[::3, ::2]
    expected = bias_activation_reference(x, None, "gelu")
    torch.testing.assert_close(bias_activation(x, None, "gelu"), expected)


def test_large_values_neither_overflow_nor_turn_into_nan():
    x = torch.tensor([[-1e4, -100.0, -0.0, 0.0, 100.0, 1e4] * 4], device=DEVICE).requires_grad_()
    for kind in KINDS:
        if kind == "swiglu":  # a gate beside a value of one
            out = bias_activation(torch.cat([x, torch.ones_like(x)], -1), None, kind)
        else:
            out = bias_activation(x, None, kind)
        torch.testing.assert_close(out, x.clamp(min=0), rtol=0, atol=1e-6)
        (grad,) = torch.autograd.grad(out.sum(), x)
        assert grad.isfinite().all()


def test_no_rows_are_no_trouble():
    assert bias_activation(torch.empty(0, 16, device=DEVICE)).shape == (0, 16)


def test_two_runs_are_bit_equal():
    x, bias = inputs((7, 1040), torch.bfloat16, True)
    assert torch.equal(bias_activation(x, bias), bias_activation(x, bias))


@pytest.mark.parametrize("kind", ["gelu", "swiglu"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_is_a_well_formed_operator(kind, has_bias):
    x, bias = inputs((3, 32), torch.float32, has_bias)
    torch.library.opcheck(activation_forward.op, (x, bias, kind))
    bias = bias if bias is None else bias.detach()
    grad = bias_activation(x.detach(), bias, kind)
    torch.library.opcheck(activation_backward.op, (grad, x.detach(), bias, kind))


def test_wrong_arguments_are_refused():
    x = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="kind must be one of quick_gelu, gelu, .*: got 'relu'"):
        bias_activation(x, None, "relu")
    with pytest.raises(ValueError, match=r"bias must be \[16\]: got \[2\]"):
        bias_activation(x, torch.zeros(2))
    with pytest.raises(ValueError, match=r"x must be float32, bfloat16 or float16: got torch.fl"):
        bias_activation(x.double())
    with pytest.raises(ValueError, match="gates and values for swiglu: got 15 channels"):
        bias_activation(x[:, :15], None, "swiglu")
