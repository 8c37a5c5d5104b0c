"""Linear layers give the same product whoever computes it."""

import pytest
import torch
import torch.nn.functional as F
from models import randomize
from rounding import excesses
from zeroi2v_kernels import choice
from zeroi2v_kernels.choice import on_onednn

from zeroi2v.model import linear as module
from zeroi2v.model.linear import Linear, ScaledLinear, linear


@pytest.mark.parametrize("rows", [(1,), (2, 3, 17), (2, 5, 1)])
@pytest.mark.parametrize("sizes", [(48, 192), (192, 48), (64, 1), (768, 768)])
def test_linear_on_onednn_is_as_exact_as_pytorchs(rows, sizes):
    torch.manual_seed(0)
    layer = randomize(Linear(*sizes))
    wide = torch.randn(*rows[:-1], rows[-1] + 2, sizes[0])
    x = wide[..., : rows[-1], :]  # as the last block takes CLS out of its tokens
    with torch.no_grad():
        assert on_onednn(x)
        out = layer(x)
    assert out.is_contiguous()
    assert excesses([out], F.linear, [x, layer.weight, layer.bias]) < [1]


@pytest.mark.parametrize("sizes", [(16, 64), (64, 16)])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.702, 1.702), (1 / 1.702, 1.0)])
def test_factors_are_applied_on_either_way(sizes, scales):
    layer = randomize(ScaledLinear(*sizes))
    x = torch.randn(2, 5, sizes[0])
    before = x.clone()
    expected = scales[0] * (x @ layer.weight.T) + scales[1] * layer.bias
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(layer(x, *scales), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_many_rows_are_multiplied_a_part_at_a_time(monkeypatch, dtype):
    layer = randomize(ScaledLinear(16, 64)).to(dtype)
    x = torch.randn(2, 19, 16, dtype=dtype)[:, 1:]
    limit = dict(rtol=2 * torch.finfo(dtype).eps, atol=8 * torch.finfo(dtype).eps)
    with torch.no_grad():
        whole = [layer(x), layer(x, 1.702, 1.702), layer(x, 0.5, 1.0)]
        monkeypatch.setattr(module, "MANY", 35)
        monkeypatch.setattr(module, "ROWS", 5)  # 36 rows: seven parts and a last one
        seen = []
        count = lambda rows: seen.append(len(rows)) or rows  # noqa: E731
        assert torch.equal(module._in_parts(count, x), x) and seen == [5] * 7 + [1]
        for scales, expected in zip([(), (1.702, 1.702), (0.5, 1.0)], whole, strict=True):
            torch.testing.assert_close(layer(x, *scales), expected, **limit)
    assert module._in_parts(count, x) is x  # with autograd it is one product


def test_only_inference_in_float32_on_the_cpu_goes_to_onednn():
    x = torch.randn(3, 8)
    assert not on_onednn(x)
    with torch.no_grad():
        assert on_onednn(x)
        assert not any(on_onednn(x.to(t)) for t in (torch.float64, torch.bfloat16))
        assert not on_onednn(x.to("meta"))
        with torch.autocast("cpu", torch.bfloat16):
            assert linear(x, torch.randn(4, 8), torch.randn(4)).dtype == torch.bfloat16


def test_a_build_of_pytorch_without_the_operator_computes_as_ever(monkeypatch):
    monkeypatch.setattr(choice, "ONEDNN_LINEAR", None)
    x, weight, bias = torch.randn(3, 8), torch.randn(4, 8), torch.randn(4)
    with torch.no_grad():
        assert torch.equal(linear(x, weight, bias), F.linear(x, weight, bias))
