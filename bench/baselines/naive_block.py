"""A block as papers write it, left to autograd: oracle of tests, foil of benches."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from zeroi2v_kernels.stdha import stdha

from zeroi2v.model.norm import Norm
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

    def norm(layer: Norm, h: Tensor) -> Tensor:
        if layer.centres:
            return torch.nn.LayerNorm.forward(layer, h).to(h.dtype)
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        normed = F.rms_norm(wide, h.shape[-1:], layer.weight.to(wide.dtype), layer.eps)
        return (normed + layer.bias.to(wide.dtype)).to(h.dtype)

    h = adapt(0, attn.in_adapter, norm(block.ln_1, x))
    qkv = F.linear(h, attn.in_proj_weight, attn.in_proj_bias)
    qkv = qkv.unflatten(-1, (3, attn.num_heads, -1))
    if attn.rotary:
        qkv = turned(qkv, attn.rotary.table(qkv.dtype))
    out = stdha(qkv, attn.head_offsets, backend="sdpa").flatten(-2)
    if cls_only:
        x, out = x[:, :, :1], out[:, :, :1]
    out = norm(attn.ln, out) if attn.ln else out
    x = x + adapt(1, attn.out_adapter, attn.out_proj(out))
    h = F.linear(adapt(2, mlp.in_adapter, norm(block.ln_2, x)), mlp.c_fc.weight, mlp.c_fc.bias)
    if mlp.activation == "swiglu":
        gate, h = h.chunk(2, -1)
        h = gate * torch.sigmoid(gate) * h
    elif mlp.activation == "quick_gelu":
        h = h * torch.sigmoid(1.702 * h)
    else:
        h = F.gelu(h, approximate="tanh" if mlp.activation == "gelu_tanh" else "none")
    h = norm(mlp.ln, h) if mlp.ln else h
    return x + adapt(3, mlp.out_adapter, F.linear(h, mlp.c_proj.weight, mlp.c_proj.bias))


def turned(qkv: Tensor, table: Tensor) -> Tensor:
    """`qkv [B, T, N, 3, H, D]` with queries and keys of the last P tokens turned by `table`."""
    prefix = qkv.shape[2] - table.shape[1]
    cosines, sines = torch.cat([table, table], -1)[:, :, None]  # [P, 1, D] each
    parts = []
    for x in qkv.unbind(3)[:2]:
        first, second = x[:, :, prefix:].chunk(2, -1)
        rest = torch.cat([-second, first], -1)
        rotated = (x[:, :, prefix:] * cosines + rest * sines).to(x.dtype)
        parts.append(torch.cat([x[:, :, :prefix], rotated], 2))
    return torch.stack([*parts, qkv[:, :, :, 2]], 3)
