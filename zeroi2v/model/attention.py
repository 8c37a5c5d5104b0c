"""The attention module of a block: CLIP's multi-head attention with per-head frame offsets."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zeroi2v_kernels.stdha import BACKENDS, stdha, stdha_split

from zeroi2v.config import ModelConfig
from zeroi2v.model.adapter import LinearAdapter
from zeroi2v.model.linear import Linear, linear


class STDHA(nn.Module):
    """Self-attention within frames; head h reads keys and values `head_offsets[h]` frames on.

    Parameters carry the names of `nn.MultiheadAttention`, as CLIP's do. With adapters the input
    passes `in_adapter` before the projection to queries, keys and values, and the output
    `out_adapter` after the output projection. `backend` says what computes the attention, as in
    `zeroi2v_kernels.stdha`; `set_backend` sets it for a whole model.

    Source: ZeroI2V (arXiv 2310.01324), section 3.2.
    """

    backend: str | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.head_offsets = config.head_offsets
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = Linear(width, width)
        if config.adapter:
            self.in_adapter = LinearAdapter(width, config.adapter_rank, config.adapter)
            self.out_adapter = LinearAdapter(width, config.adapter_rank, config.adapter)
        else:
            self.in_adapter = self.out_adapter = nn.Identity()

    def forward(self, x: Tensor, cls_only: bool = False) -> Tensor:
        """`x [B, T, N, C]` -> `[B, T, N, C]`, or `[B, T, 1, C]` for the CLS token alone."""
        x = self.in_adapter(x)
        # Without autograd nobody else holds the projection's output: heads may move inside it.
        choice = dict(backend=self.backend, overwrite=not torch.is_grad_enabled())
        if cls_only:
            width = x.shape[-1]
            sizes = (width, 2 * width)
            weights, biases = self.in_proj_weight.split(sizes), self.in_proj_bias.split(sizes)
            query = linear(x[:, :, :1], weights[0], biases[0])
            key_value = linear(x, weights[1], biases[1])
            query = query.unflatten(-1, (self.num_heads, -1))
            key_value = key_value.unflatten(-1, (2, self.num_heads, -1))
            out = stdha_split(query, key_value, self.head_offsets, **choice)
        else:
            qkv = linear(x, self.in_proj_weight, self.in_proj_bias)
            qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
            out = stdha(qkv, self.head_offsets, **choice)
        return self.out_adapter(self.out_proj(out.flatten(-2)))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_offsets={self.head_offsets}"


def set_backend(model: nn.Module, backend: str | None) -> None:
    """Has `backend` compute all attention of `model`; None leaves the choice to the device.

    Raises ValueError for an unknown name; what it can not run it refuses when it is run.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None: got {backend!r}")
    for module in model.modules():
        if isinstance(module, STDHA):
            module.backend = backend
