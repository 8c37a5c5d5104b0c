"""The true result of each kernel, in float64, and how far rounding may move it.

Inputs are exact, so an error comes from three places, to first order and element by element:

    sums of n terms in float32 err by at most n 2^-24 times the sum of |terms|;
    what is rounded to a narrow dtype between two products errs by u = eps / 2 of itself, or of
    the smallest normal number, and what it is multiplied with carries that on;
    a result errs by u of itself when it is stored.

`_MARGIN` times that is the limit, for terms of second order and fast exponentials. A tile that is
missing, masked wrongly or read from another place is off by far more: see the tests of `proof.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zeroi2v_kernels.quantize_reference import LARGEST, SMALLEST, UNIT

Bounded = tuple[Tensor, Tensor]
"""A true value and the largest error allowed, element by element, both float64."""

_U32 = 2.0**-24
_MARGIN = 2.0


def _rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error of rounding x to `dtype`."""
    info = torch.finfo(dtype)
    return info.eps / 2 * (x.abs() + info.smallest_normal)


def _stored(truth: Tensor, error: Tensor, dtype: torch.dtype) -> Bounded:
    return truth, _MARGIN * (error + _rounded(truth, dtype))


def attention(
    query: Tensor,
    key_value: Tensor,
    grad: Tensor,
    head_offsets: Sequence[int],
    scale: float,
) -> tuple[Bounded, Bounded, Bounded]:
    """Of the output `[B, T, M, H, D]` and the gradients of query and key_value.

    Arguments as in `stdha_launch.backward`. Written head by head, to need little memory.
    """
    dtype, frames = query.dtype, query.shape[1]
    q, kv, g = (x.double() for x in (query, key_value, grad))
    steps = 2 * max(q.shape[2], kv.shape[2]) + q.shape[-1] + 16  # the longest sum: two readers
    out, dq, dkv = (torch.zeros_like(x) for x in (q, q, kv))
    out_error, dq_error, dkv_error = (torch.zeros_like(x) for x in (q, q, kv))
    for h, offset in enumerate(head_offsets):
        here = torch.arange(frames, device=q.device)
        source = torch.where((here + offset >= 0) & (here + offset < frames), here + offset, here)
        k, v = kv[:, source, :, 0, h], kv[:, source, :, 1, h]
        qh, gh = q[:, :, :, h], g[:, :, :, h]
        p = (scale * qh @ k.mT).softmax(-1)
        # an exponential's relative error is its argument's error
        relative = _U32 * steps * (1 + scale * (qh.abs() @ k.abs().mT).amax())
        p_error = _rounded(p, dtype) + relative * p
        out[:, :, :, h] = o = p @ v
        out_error[:, :, :, h] = p_error @ v.abs()
        o_error = out_error[:, :, :, h] + _rounded(o, dtype)
        delta = (o * gh).sum(-1, keepdim=True)
        delta_error = (o_error * gh.abs()).sum(-1, keepdim=True)
        dp, dp_sum = gh @ v.mT, gh.abs() @ v.abs().mT
        ds = p * (dp - delta)
        ds_error = relative * ds.abs() + p * (delta_error + _U32 * steps * dp_sum)
        ds_error += _rounded(ds, dtype)
        dq[:, :, :, h] = scale * ds @ k
        dq_error[:, :, :, h] = scale * ds_error @ k.abs()
        for part, value, error in (
            (0, scale * ds.mT @ qh, scale * ds_error.mT @ qh.abs()),
            (1, p.mT @ gh, p_error.mT @ gh.abs()),
        ):
            dkv[:, :, :, part, h].index_add_(1, source, value)
            dkv_error[:, :, :, part, h].index_add_(1, source, error)
    return (
        _stored(out, out_error, dtype),
        _stored(dq, dq_error, dtype),
        _stored(dkv, dkv_error, dtype),
    )


def add_up(
    x: Tensor,
    middle: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    residual: Tensor | None,
) -> list[Bounded]:
    """Of out and, without a bias, the sums of x; arguments as in `adapter_linear_triton.add_up`."""
    wide, mid, up = x.double(), middle.double(), weight.double()
    up = up if bias is None else up.t()  # backward D [R, C], forward U [C, R]
    branch, branch_sum = mid @ up, mid.abs() @ up.abs()
    if bias is not None:
        branch, branch_sum = branch + bias.double(), branch_sum + bias.double().abs()
    out, out_sum = wide + scale * branch, wide.abs() + scale * branch_sum
    if residual is not None:
        out, out_sum = out + residual.double(), out_sum + residual.double().abs()
    error = _U32 * (mid.shape[1] + 4) * out_sum
    bounded = [_stored(out, error, (x if residual is None else residual).dtype)]
    return bounded if bias is not None else [*bounded, _summed(wide, torch.zeros_like(wide))]


def dropout(x: Tensor, mask: Tensor) -> list[Bounded]:
    """Of `x * mask` in the dtype of x, and of the sums of its rows."""
    out = x.double() * mask
    error = 2 * _U32 * out.abs()
    return [_stored(out, error, x.dtype), _summed(out, error + _rounded(out, x.dtype))]


def _summed(x: Tensor, error: Tensor) -> Bounded:
    """Of the sum of the rows `x [n, C]`, in float32."""
    error = error + _U32 * x.shape[0] * x.abs()
    return _stored(x.sum(0), error.sum(0), torch.float32)


def activation(
    x: Tensor, bias: Tensor | None, kind: str, grad: Tensor | None = None
) -> Bounded:  # fmt: skip
    """Of `act(x + bias)`, or of the gradient of x for that of it."""
    u = x.double() if bias is None else x.double() + bias.double()
    u, v = u.chunk(2, -1) if kind == "swiglu" else (u, None)
    if kind in ("quick_gelu", "swiglu"):
        factor = 1.702 if kind == "quick_gelu" else 1.0
        s = torch.sigmoid(factor * u)
        value, slope = u * s, s * (1 + factor * u * (1 - s))
    elif kind == "gelu_tanh":
        root = (2 / torch.pi) ** 0.5
        t = torch.tanh(root * (u + 0.044715 * u**3))
        s = 0.5 + 0.5 * t
        value, slope = u * s, s + 0.5 * u * (1 - t * t) * root * (1 + 3 * 0.044715 * u * u)
    else:
        s = 0.5 + 0.5 * torch.erf(u * 0.5**0.5)
        value, slope = u * s, s + u * torch.exp(-0.5 * u * u) * (2 * torch.pi) ** -0.5
    error = 16 * _U32 * (1 + u * u)  # of functions whose argument u is rounded
    g = None if grad is None else grad.double()
    if v is not None:  # a product with another rounded sum
        other = 4 * _U32 * (1 + v.abs())
        if g is None:
            return _stored(value * v, error * v.abs() + value.abs() * other, x.dtype)
        of_u, of_v = g * slope * v, g * value
        u_error = g.abs() * (error * v.abs() + slope.abs() * other)
        errors = torch.cat([u_error, g.abs() * error], -1)
        return _stored(torch.cat([of_u, of_v], -1), errors, x.dtype)
    if g is None:
        return _stored(value, error, x.dtype)
    return _stored(g * slope, g.abs() * error, x.dtype)


def rotated(x: Tensor, table: Tensor, parts: int, back: bool) -> Bounded:
    """Of `rotary.turn_`."""
    cosines, sines = table.double()[:, :, None, None]
    out, error = x.double(), torch.zeros_like(x, dtype=torch.float64)
    at = (..., slice(x.shape[2] - table.shape[1], None), slice(parts), slice(None), slice(None))
    first, second = out[at].chunk(2, -1)
    sines = -sines if back else sines
    turned = torch.cat([first * cosines - second * sines, second * cosines + first * sines], -1)
    c, s = cosines.abs(), sines.abs()
    terms = [first.abs() * c + second.abs() * s, second.abs() * c + first.abs() * s]
    out[at] = turned
    error[at] = 3 * _U32 * torch.cat(terms, -1)
    return _stored(out, error, x.dtype)


def quantized(x: Tensor) -> list[Bounded]:
    """Of the values and scales of `quantize_rows`: half a step of e4m3 numbers."""
    scale = (x.double().abs().amax(-1, keepdim=True) / LARGEST).clamp_min(SMALLEST)
    values = x.double() / scale
    steps = torch.maximum(UNIT * values.abs(), torch.full_like(values, UNIT * 2.0**-6))
    return [(values, (1 + 8 * _U32) * steps), (scale, _MARGIN * _U32 * scale)]


def norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    centres: bool = True,
) -> list[Bounded]:
    """Of normed and, for a residual, total; then of mean and 1 / deviation."""
    total = x.double() if residual is None else x.double() + residual.double()
    moved = torch.zeros_like(total)
    if residual is not None:  # a sum next to a half may be rounded to the other side
        moved = 2 * _rounded(total, residual.dtype)
        total = total.to(residual.dtype).double()
    steps, size = (total.shape[-1] + 8) * _U32, total.abs()
    mean = total.mean(-1, keepdim=True) * centres
    centred = total - mean
    rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    mean_error = moved.mean(-1, keepdim=True) + steps * size.mean(-1, keepdim=True)
    centred_error = moved + mean_error + _U32 * size
    relative = (centred.abs() * centred_error).mean(-1, keepdim=True) * rstd.square() + steps
    w, b = weight.double(), bias.double()
    normed = centred * rstd * w + b
    error = w.abs() * rstd * (centred_error + relative * centred.abs()) + 4 * _U32 * b.abs()
    sums = [] if residual is None else [(total, _MARGIN * moved)]
    statistics = [(mean, mean_error), (rstd, relative * rstd)]
    return [
        _stored(normed, error, dtype),
        *sums,
        *(_stored(t.squeeze(-1), e.squeeze(-1), torch.float32) for t, e in statistics),
    ]


def norm_gradient(
    grad: Tensor,
    total_grad: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    centres: bool = True,
) -> tuple[Bounded, Bounded, Bounded]:
    """Of the gradients of the sum, of the weight and of the bias."""
    g, r = grad.double(), rstd.double()[..., None]
    y = (total.double() - mean.double()[..., None]) * r
    y_error = 4 * _U32 * (total.double().abs() + mean.double()[..., None].abs()) * r
    scaled = g * weight.double()
    along = (scaled * y).mean(-1, keepdim=True)
    along_sum = (scaled * y).abs().mean(-1, keepdim=True)
    along_error = (scaled.abs() * y_error).mean(-1, keepdim=True)
    out = r * (scaled - scaled.mean(-1, keepdim=True) * centres - y * along)
    terms = scaled.abs() + scaled.abs().mean(-1, keepdim=True) + y.abs() * along_sum
    error = r * (y_error * along_sum + y.abs() * along_error)
    error += r * _U32 * (g.shape[-1] + 8) * terms
    if total_grad is not None:
        out = out + total_grad.double()
        error += _U32 * total_grad.double().abs()
    rows = g.flatten(0, -2).shape[0] + 8
    sums = ((g * y, g.abs() * y_error + rows * _U32 * (g * y).abs()), (g, rows * _U32 * g.abs()))
    return _stored(out, error, total.dtype), *(
        _stored(t.flatten(0, -2).sum(0), e.flatten(0, -2).sum(0), torch.float32) for t, e in sums
    )
