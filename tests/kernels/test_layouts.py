"""Wherever the elements of a tensor lie in memory, every operator reads the same numbers."""

import pytest
import torch
from triton_ops import DEVICE, poisoned

pytest.importorskip("triton", reason="needs triton")
from zeroi2v_kernels import choice
from zeroi2v_kernels.activation import bias_activation
from zeroi2v_kernels.adapter_linear import Adapter, Dropout, adapt, adapt_grad
from zeroi2v_kernels.adapter_linear_triton import dropout
from zeroi2v_kernels.norm import add_norm
from zeroi2v_kernels.stdha import stdha, stdha_split


def turned(x: torch.Tensor) -> torch.Tensor:
    """Its last axis is not the innermost one."""
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def every_second(x: torch.Tensor) -> torch.Tensor:
    """Its elements are apart from each other."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"), dtype=x.dtype, device=DEVICE)
    wide[..., ::2] = x
    return wide[..., ::2]


def cut_out(x: torch.Tensor) -> torch.Tensor:
    """A part of wider rows, from the second element on: no address of a row is even."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype, device=DEVICE)
    wide[..., 1:-2] = x
    return wide[..., 1:-2]


def shifted(x: torch.Tensor) -> torch.Tensor:
    """Contiguous, but it begins at an odd element."""
    flat = torch.full((x.numel() + 1,), float("nan"), dtype=x.dtype, device=DEVICE)
    flat[1:] = x.flatten()
    return flat[1:].view(x.shape)


def spread(x: torch.Tensor) -> torch.Tensor:
    """One row stands for all."""
    return x[:1].expand(x.shape)


LAYOUTS = (turned, every_second, cut_out, shifted, spread)
ADAPTER = ((16, 80), (16,), (80, 16), (80,))


def seed() -> torch.Tensor:
    return torch.tensor(3, device=DEVICE)


OPERATORS = {  # the operator, shapes of its tensors, whether they have gradients
    "stdha": (lambda x: stdha(x, (1, 0), backend="triton"), [(1, 2, 9, 3, 2, 64)], True),
    "stdha_split": (
        lambda q, kv: stdha_split(q, kv, (1, 0), backend="triton"),
        [(1, 2, 3, 2, 64), (1, 2, 9, 2, 2, 64)],
        True,
    ),
    "matmul": (lambda x: stdha(x, (1, 0), backend="matmul"), [(1, 2, 9, 3, 2, 64)], True),
    "adapter": (
        lambda x, r, *a: adapt(x, Adapter(*a, 0.5), Dropout(0.4, seed(), 1), r)[0],
        [(140, 80), (140, 80), *ADAPTER],
        False,
    ),
    "adapter's gradient": (
        lambda x, *a: torch.cat(adapt_grad(x, Adapter(*a, 0.5), Dropout(0.4, seed(), 1))[:2], 1),
        [(140, 80), *ADAPTER],
        False,
    ),
    "dropout": (lambda x: dropout(x, 2**15, seed(), 0)[0], [(140, 80)], False),
    "activation": (lambda x, b: bias_activation(x, b, "quick_gelu"), [(9, 200), (200,)], True),
    "norm": (
        lambda x, r, w, b: torch.cat(add_norm(x, r, w, b)),
        [(9, 48), (9, 48), (48,), (48,)],
        True,
    ),
}


def outputs(function, tensors, weight_layout, has_gradient) -> list[torch.Tensor]:
    """The output, and every gradient, for an output gradient of that layout."""
    tensors = [x.detach().requires_grad_(has_gradient) for x in tensors]
    out = function(*tensors)
    if not has_gradient:
        return [out]
    weight = torch.linspace(-1, 1, out.numel(), device=DEVICE).view(out.shape).to(out.dtype)
    wanted = [x for x in tensors if x.requires_grad]
    gradients = torch.autograd.grad(out, wanted, weight_layout(weight), allow_unused=True)
    return [out.detach(), *(x for x in gradients if x is not None)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("name", OPERATORS)
def test_layout_of_inputs_and_gradients_changes_nothing(name, layout, monkeypatch):
    monkeypatch.setattr(choice, "uses_kernels", lambda x: True)
    function, shapes, has_gradient = OPERATORS[name]
    generator = torch.Generator().manual_seed(0)
    plain = [torch.randn(s, generator=generator).to(DEVICE, torch.bfloat16) for s in shapes]
    if layout is spread:
        plain = [x[:1].expand(x.shape).clone() for x in plain]
    laid_out = [layout(x.clone()) for x in plain]  # some operators write over their arguments
    assert all(torch.equal(a, b) for a, b in zip(plain, laid_out, strict=True))
    # the gradient of a spread output is another one, so it is not spread
    given = turned if layout is spread else layout
    with poisoned():
        expected = outputs(function, plain, lambda x: x, has_gradient)
        got = outputs(function, laid_out, given, has_gradient)
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.isfinite().all()
        size = other.float().abs().max()
        assert (one.float() - other.float()).abs().max() <= 0.01 * size
