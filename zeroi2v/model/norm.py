"""The norm of a block: layer norm, or RMS norm, with arithmetic in float32 at least."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zeroi2v_kernels import choice

from zeroi2v.config import ModelConfig


class Norm(nn.LayerNorm):
    """`config.norm` with statistics and arithmetic in float32 at least, whatever the input's dtype.

    PyTorch's kernels do so in registers for half precision, input and output staying narrow; only
    under autocast, which widens both, is the output cast back. On CUDA one kernel of ours also
    makes the sum that is normalised. An RMS norm has a bias too, zeros where it comes from others.

    Source: layer norm, arXiv 1607.06450; RMS norm, arXiv 1910.07467.
    """

    def __init__(self, width: int, config: ModelConfig):
        super().__init__(width, eps=config.norm_eps)
        self.centres = config.norm == "layer"

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C]`, same dtype."""
        if choice.uses_kernels(x):
            from zeroi2v_kernels.norm import add_norm

            return add_norm(x, None, self.weight, self.bias, self.eps, self.centres)[0]
        if self.centres:
            return super().forward(x).to(x.dtype)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        weight, bias = self.weight.to(wide.dtype), self.bias.to(wide.dtype)
        return (F.rms_norm(wide, x.shape[-1:], weight, self.eps) + bias).to(x.dtype)

    def of_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `x + added`, and that sum; on CUDA in one pass."""
        if choice.uses_kernels(x) and added.dtype == x.dtype:
            from zeroi2v_kernels.norm import add_norm

            return add_norm(added, x, self.weight, self.bias, self.eps, self.centres)
        total = x + added
        return self(total), total

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.centres else ", rms")
