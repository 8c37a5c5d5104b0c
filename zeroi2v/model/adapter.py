"""The linear adapter, and how it is merged into the frozen linear layer beside it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from zeroi2v.config import AdapterConfig
from zeroi2v.model.linear import Linear


class LinearAdapter(nn.Module):
    """A(x) = x + scale * (up(dropout(down(x)))), with no non-linearity, so that it can be merged.

    `up` starts at zero, so a fresh adapter is the identity.

    Args:
        width: channels C of its input and output.
        rank: width R of the bottleneck.
        config: scale and dropout.

    Source: ZeroI2V (arXiv 2310.01324), section 3.3.
    """

    def __init__(self, width: int, rank: int, config: AdapterConfig):
        super().__init__()
        self.scale = config.scale
        self.down = Linear(width, rank)
        self.dropout = nn.Dropout(config.dropout)
        self.up = Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C]`."""
        return torch.add(x, self.up(self.dropout(self.down(x))), alpha=self.scale)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def merge_before(weight: Tensor, bias: Tensor, adapter: LinearAdapter) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of `x -> linear(adapter(x))`.

    W' = W (I + s U D),  b' = b + W s (U b_down + b_up), for weight `[out, C]` and bias `[out]`.
    """
    weight, bias = weight.double(), bias.double()
    low_rank, shift = _branch(adapter)
    return weight + weight @ low_rank, bias + weight @ shift


def merge_after(weight: Tensor, bias: Tensor, adapter: LinearAdapter) -> tuple[Tensor, Tensor]:
    """Weight and bias, in float64, of `x -> adapter(linear(x))`.

    W' = (I + s U D) W,  b' = (I + s U D) b + s (U b_down + b_up), for weight `[C, in]`, bias `[C]`.
    """
    weight, bias = weight.double(), bias.double()
    low_rank, shift = _branch(adapter)
    return weight + low_rank @ weight, bias + low_rank @ bias + shift


def _branch(adapter: LinearAdapter) -> tuple[Tensor, Tensor]:
    """The adapter's branch as one linear map in float64: s U D `[C, C]`, s (U b_down + b_up)."""
    up, down = adapter.up, adapter.down
    low_rank = adapter.scale * (up.weight.double() @ down.weight.double())
    shift = adapter.scale * (up.weight.double() @ down.bias.double() + up.bias.double())
    return low_rank, shift
