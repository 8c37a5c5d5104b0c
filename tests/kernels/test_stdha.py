"""Head-shifted attention against its definition, in float64."""

import pytest
import torch
from attention import packed_attention
from rounding import assert_within_budget
from zeroi2v_kernels import stdha_matmul
from zeroi2v_kernels.stdha import (
    shift_heads,
    shift_heads_backward,
    source_frames,
    stdha,
    stdha_matmul_op,
    stdha_reference,
    stdha_split,
)

from zeroi2v.config import RECIPES

OFFSETS = sorted({r.model.head_offsets for r in RECIPES.values()}, key=lambda o: (len(o), o))
CASES = [
    *((frames, offsets) for offsets in OFFSETS for frames in (1, 3, 8)),
    *((frames, (9, -9, 1, -1)) for frames in (1, 5, 8, 9, 10)),  # beyond T
    *((5, (offset,) * 4) for offset in (-2, 0, 3)),  # all equal
]


def random_qkv(frames, heads, tokens=5, dim=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, frames, tokens, 3, heads, dim, generator=generator, dtype=dtype)


def loop(qkv, offsets):
    """The formula once more, one query frame and head at a time."""
    out = torch.full_like(qkv[:, :, :, 0], float("nan"))
    for t in range(qkv.shape[1]):
        for h, offset in enumerate(offsets):
            s = t + offset
            s = s if 0 <= s < qkv.shape[1] else t
            query, key, value = qkv[:, t, :, 0, h], qkv[:, s, :, 1, h], qkv[:, s, :, 2, h]
            weights = (query @ key.mT / qkv.shape[-1] ** 0.5).softmax(-1)
            out[:, t, :, h] = weights @ value
    return out


@pytest.mark.parametrize("frames, offsets", CASES)
def test_backends_of_the_cpu_compute_the_formula_and_its_gradient(frames, offsets):
    qkv = random_qkv(frames, len(offsets)).requires_grad_()
    expected = loop(qkv, offsets)
    weight = torch.randn_like(expected)
    (gradient,) = torch.autograd.grad(expected, qkv, weight)
    for backend in ("reference", "matmul", "sdpa"):
        out = stdha(qkv, offsets, backend=backend)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        (got,) = torch.autograd.grad(out, qkv, weight)
        torch.testing.assert_close(got, gradient, rtol=1e-10, atol=1e-12)


def test_scale_replaces_the_default_scale():
    qkv = random_qkv(3, 2)
    for backend in ("reference", "matmul", "sdpa"):
        default = stdha(qkv, (0, 1), backend=backend)
        same = stdha(qkv, (0, 1), scale=4**-0.5, backend=backend)
        torch.testing.assert_close(default, same, rtol=0, atol=0)
        assert not torch.allclose(default, stdha(qkv, (0, 1), scale=2.0, backend=backend))


def test_zero_offsets_are_plain_attention():
    qkv = random_qkv(4, 3)
    query, key, value = qkv.flatten(0, 1).permute(2, 0, 3, 1, 4)
    plain = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    out = stdha(qkv, (0, 0, 0))
    torch.testing.assert_close(out, plain.transpose(1, 2).unflatten(0, (2, 4)))


def test_heads_are_independent():
    qkv = random_qkv(6, 4)
    offsets = (-1, 1, -2, 0)
    whole = stdha(qkv, offsets)
    for head in range(4):
        alone = stdha(qkv[:, :, :, :, head : head + 1], offsets[head : head + 1])
        torch.testing.assert_close(whole[:, :, :, head : head + 1], alone, rtol=1e-12, atol=1e-12)


def test_edge_frames_read_themselves():
    assert source_frames(4, 1) == [1, 2, 3, 3]
    assert source_frames(4, -2) == [0, 1, 0, 1]
    assert source_frames(2, 5) == [0, 1]


def test_input_is_left_untouched_without_autograd_and_overwritten_only_on_request():
    qkv = random_qkv(4, 2)
    before = qkv.clone()
    with torch.no_grad():
        out = stdha(qkv, (-1, 1))
    assert torch.equal(qkv, before)
    query, key_value = qkv[:, :, :, 0], qkv[:, :, :, 1:]
    alone = stdha_split(query[:, :, :1], key_value, (-1, 1), backend="matmul")
    torch.testing.assert_close(alone, out[:, :, :1], rtol=1e-12, atol=1e-12)
    assert torch.equal(qkv, before)
    assert torch.equal(stdha_split(query, key_value, (-1, 1), overwrite=True), out)


@pytest.mark.parametrize("offsets", [(-1, 1, 0), (2, -3, 7)])
def test_shift_heads_is_a_well_formed_operator(offsets):
    key_value = random_qkv(4, 3)[:, :, :, 1:].requires_grad_()  # strided, as cut out of qkv
    torch.library.opcheck(shift_heads.op, (key_value, list(offsets)))
    torch.library.opcheck(shift_heads_backward.op, (key_value.detach(), list(offsets)))


def test_matmul_is_a_well_formed_operator():
    qkv = random_qkv(3, 2)
    tensors = [x.requires_grad_() for x in (qkv[:, :, :2, 0], qkv[:, :, :, 1:])]
    torch.library.opcheck(stdha_matmul_op.op, (*tensors, [-1, 1], 0.5))


def test_rounded_scores_do_not_harm_what_matmul_gives():
    """In bfloat16 scores of up to 100 are off by 1/4 or less, and a weight by a quarter."""
    qkv, offsets = random_qkv(3, 2, tokens=65, dim=64), (-1, 1)
    qkv[:, :, :, 0] *= 25
    qkv = qkv.bfloat16()
    exact = qkv.double().requires_grad_()
    expected = stdha_reference(exact, offsets)
    weight = torch.randn_like(expected).bfloat16()
    (gradient,) = torch.autograd.grad(expected, exact, weight.double())
    narrow = qkv.clone().requires_grad_()
    out = stdha(narrow, offsets, backend="matmul")
    (got,) = torch.autograd.grad(out, narrow, weight)
    rounding = stdha_reference(qkv, offsets).double() - expected
    assert rounding.norm() > 0.01 * expected.norm()
    assert (out.double() - expected).norm() < 0.004 * expected.norm()
    assert (got.double() - gradient).norm() < 0.01 * gradient.norm()


def test_wrong_arguments_are_refused():
    qkv = random_qkv(2, 4)
    with pytest.raises(ValueError, match="head_offsets needs one entry per head: got 3 for 4"):
        stdha(qkv, (0, 0, 0))
    with pytest.raises(ValueError, match=r"qkv must be \[B, T, N, 3, H, D\]: got \[2, 5"):
        stdha(qkv[0], (0,) * 4)
    with pytest.raises(ValueError, match=r"qkv must be floating point: got torch.int64"):
        stdha(qkv.long(), (0,) * 4)
    with pytest.raises(ValueError, match="backend must be one of triton, .* or None: got 'x'"):
        stdha(qkv, (0,) * 4, backend="x")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["sdpa", "matmul", "reference"])
def test_backends_of_the_cpu_err_by_rounding_alone(backend, dtype):
    qkv, offsets = random_qkv(4, 3, tokens=70, dim=16).to(dtype), (1, -1, 0)
    assert_within_budget(
        lambda x: stdha(x, offsets, backend=backend), lambda x: packed_attention(x, offsets), [qkv]
    )


def test_the_definition_of_the_budgets_is_the_op_s():
    qkv, offsets = random_qkv(4, 3).requires_grad_(), (1, -1, 0)
    expected, out = stdha_reference(qkv, offsets, 0.3), packed_attention(qkv, offsets, 0.3)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(out)
    gradients = [torch.autograd.grad(x, qkv, weight)[0] for x in (out, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_matmul_computes_in_its_own_dtype_under_autocast(monkeypatch):
    """On CUDA autocast makes softmax float32, to which half-precision gradients do not fit."""
    seen, product = [], stdha_matmul._product

    def recorded(*args):
        seen.append(torch.is_autocast_enabled("cpu"))
        return product(*args)

    monkeypatch.setattr(stdha_matmul, "_product", recorded)
    qkv = random_qkv(2, 2).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        stdha(qkv, (1, 0), backend="matmul").float().sum().backward()
    assert seen and not any(seen) and qkv.grad.dtype == qkv.dtype
