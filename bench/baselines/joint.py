"""Joint space-time attention: every token attends to all tokens of all frames: a rival.

No parameter more than the image ViT; the attention's cost grows with T * T.

Source: TimeSformer (arXiv 2102.05095), "joint space-time attention"; ViViT (arXiv 2103.15691),
model 1; written anew.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from bench.baselines.blocks import with_blocks
from zeroi2v.model.vit import Block, VideoViT


def joint(image: VideoViT) -> VideoViT:
    """`image`, a model of zero offsets without adapters, with joint attention. Shares weights."""
    return with_blocks(image, JointBlock)


class JointBlock(nn.Module):
    """`block` whose attention spans all frames."""

    def __init__(self, block: Block):
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, cls_only: bool = False) -> Tensor:
        """`x [B, T, N, C]` -> `[B, T, N, C]`, or `[B, T, 1, C]` for the CLS tokens alone."""
        block, asking = self.block, x[:, :, :1] if cls_only else x
        x = asking + self._attend(asking, x)
        return x + block.mlp(block.ln_2(x))

    def _attend(self, asking: Tensor, x: Tensor) -> Tensor:
        """Attention of the tokens `asking [B, T, M, C]` over all of `x [B, T, N, C]`."""
        attn, ln_1 = self.block.attn, self.block.ln_1
        sizes = (x.shape[-1], 2 * x.shape[-1])
        weights, biases = attn.in_proj_weight.split(sizes), attn.in_proj_bias.split(sizes)
        query = F.linear(ln_1(asking), weights[0], biases[0])
        key, value = F.linear(ln_1(x), weights[1], biases[1]).chunk(2, dim=-1)
        query, key, value = (
            part.flatten(1, 2).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
            for part in (query, key, value)
        )  # [B, H, T * M or T * N, D]
        out = F.scaled_dot_product_attention(query, key, value)
        return attn.out_proj(out.transpose(1, 2).reshape(asking.shape))
