"""A block as the paper and CLIP write it, with autograd: oracle of tests, baseline of benches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from zeroi2v_kernels.stdha import stdha

from zeroi2v.model.vit import Block


def naive_block(
    block: Block, x: Tensor, cls_only: bool = False, masks: list[Tensor] | None = None
) -> Tensor:
    """`block(x, cls_only)` in plain operations; the other tokens are dropped after attention.

    Keys and values are cloned, shifted and given to PyTorch's attention.

    `masks` are the dropout masks of the four bottlenecks, in their shapes; None draws them as
    `nn.Dropout` does.
    """
    attn, mlp = block.attn, block.mlp

    def adapt(place: int, adapter, h: Tensor) -> Tensor:
        if isinstance(adapter, torch.nn.Identity):
            return h
        d = adapter.down(h)
        d = adapter.dropout(d) if masks is None else d * masks[place]
        return h + adapter.scale * adapter.up(d)

    def norm(layer: torch.nn.LayerNorm, h: Tensor) -> Tensor:
        return torch.nn.LayerNorm.forward(layer, h).to(h.dtype)

    h = adapt(0, attn.in_adapter, norm(block.ln_1, x))
    qkv = F.linear(h, attn.in_proj_weight, attn.in_proj_bias)
    out = stdha(qkv.unflatten(-1, (3, attn.num_heads, -1)), attn.head_offsets, backend="sdpa")
    out = out.flatten(-2)
    if cls_only:
        x, out = x[:, :, :1], out[:, :, :1]
    x = x + adapt(1, attn.out_adapter, attn.out_proj(out))
    h = F.linear(adapt(2, mlp.in_adapter, norm(block.ln_2, x)), mlp.c_fc.weight, mlp.c_fc.bias)
    h = h * torch.sigmoid(1.702 * h) if mlp.activation == "quick_gelu" else F.gelu(h)
    h = F.linear(h, mlp.c_proj.weight, mlp.c_proj.bias)
    return x + adapt(3, mlp.out_adapter, h)
