"""Linear layers, on the CPU multiplied by whatever is fastest there.

PyTorch multiplies float32 matrices with MKL, which leaves half of an AMD processor's width unused
(100 of 215 GFLOP/s a core on an EPYC of the fifth generation). oneDNN, which PyTorch carries along
and takes for half precision and convolutions, uses it all, so inference in float32 goes there.
The results are those of float32 either way.

oneDNN in turn is up to twice as slow where the number of rows is large and a multiple of a prime
above 256, as it is with 257 tokens a frame. So many rows are multiplied a part at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zeroi2v_kernels.choice import ONEDNN_LINEAR, on_onednn

from zeroi2v.model.quantization import QuantizedWeights

MANY, ROWS = 8192, 512
"""Rows, on a CPU and for inference, above which `ROWS` of them are multiplied at a time."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x W^T + b` for `x [..., in]`, `weight [out, in]` and `bias [out]` -> `[..., out]`."""
    if not x.is_cpu:
        return F.linear(x, weight, bias)
    if on_onednn(x):
        return _in_parts(lambda rows: ONEDNN_LINEAR(rows, weight, bias, "none", [], ""), x)
    return _in_parts(lambda rows: F.linear(rows, weight, bias), x)


def _in_parts(product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`product(x)` for `x [..., in]`, of a part of the rows at a time if they are many."""
    # A program that is traced must not depend on the number of rows: it is asked last.
    traced = torch.compiler.is_compiling() or torch.is_grad_enabled()
    if traced or not x.is_cpu or (num_rows := x.shape[:-1].numel()) <= MANY:
        return product(x)
    out = None
    for i, rows in enumerate(x.reshape(num_rows, -1).split(ROWS)):
        part = product(rows)
        out = part.new_empty(num_rows, part.shape[-1]) if out is None else out
        out[i * ROWS : i * ROWS + len(rows)] = part
    return out.view(*x.shape[:-1], -1)


class Linear(QuantizedWeights, nn.Linear):
    """`nn.Linear`, computed by `linear`, or by `quantization.py` if its weight has 8 bits."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features)
        self.reserve_names("weight")

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`."""
        if self.weight_scale is not None:
            return self.product("weight", x, self.bias)
        return linear(x, self.weight, self.bias)

    def without_bias(self, x: Tensor) -> Tensor:
        """`x W^T`, whose bias is added elsewhere."""
        if self.weight_scale is not None:
            return self.product("weight", x, None)
        return linear(x, self.weight)


class ScaledLinear(Linear):
    """A linear layer with factors that the matrix product applies for free, or nearly so."""

    def forward(self, x: Tensor, input_scale: float = 1.0, bias_scale: float = 1.0) -> Tensor:
        """`input_scale * x W^T + bias_scale * b` for `x [..., in]`."""
        if self.weight_scale is not None:
            return self.product("weight", x, bias_scale * self.bias.float(), factor=input_scale)
        return scaled_linear(x, self.weight, self.bias, input_scale, bias_scale)


def scaled_linear(
    x: Tensor, weight: Tensor, bias: Tensor, input_scale: float = 1.0, bias_scale: float = 1.0
) -> Tensor:
    """`input_scale * x W^T + bias_scale * b` for `x [..., in]`, `weight [out, in]`."""
    if input_scale == bias_scale == 1:
        return linear(x, weight, bias)
    if on_onednn(x):  # whose product takes no factors: scale the smaller of input and output
        if weight.shape[1] < weight.shape[0]:
            return linear(x * input_scale, weight, bias * bias_scale)
        return linear(x, weight, bias * (bias_scale / input_scale)).mul_(input_scale)
    scales = dict(beta=bias_scale, alpha=input_scale)
    out = _in_parts(lambda rows: torch.addmm(bias, rows, weight.t(), **scales), x.flatten(0, -2))
    return out.unflatten(0, x.shape[:-1])
