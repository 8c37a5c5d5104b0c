"""AIM: a frozen image ViT with a second, temporal attention and non-linear adapters: a rival.

    x += T_A(attention over T of LN1 x)         the weights of the spatial attention, once more
    x += S_A(attention over N of LN1 x)         S_A(z) = z + bottleneck(z); T_A has no skip
    x += MLP(LN2 x) + 0.5 * bottleneck(LN2 x)

A bottleneck is down to a quarter of the width, GELU, up. Because of the GELU none can be merged.

Source: AIM (arXiv 2302.03024), section 3; written anew.
"""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from bench.baselines.blocks import with_blocks
from zeroi2v.model.vit import Block, VideoViT

MLP_SCALE = 0.5


def aim(image: VideoViT) -> VideoViT:
    """`image`, a model of zero offsets without adapters, with AIM's blocks. Shares its weights."""
    return with_blocks(image, lambda block: AIMBlock(block, image.config.width))


class AIMBlock(nn.Module):
    """`block` with AIM's attention and adapters around its weights."""

    def __init__(self, block: Block, width: int):
        super().__init__()
        self.block = block
        self.temporal_adapter, self.spatial_adapter, self.mlp_adapter = (
            Bottleneck(width, width // 4) for _ in range(3)
        )

    def forward(self, x: Tensor, cls_only: bool = False) -> Tensor:
        """`x [B, T, N, C]` -> `[B, T, N, C]`, or `[B, T, 1, C]` for the CLS token alone."""
        block = self.block
        tracks = rearrange(block.ln_1(x), "b t n c -> b n t c")
        moved = self.temporal_adapter(block.attn(tracks))
        x = x + rearrange(moved, "b n t c -> b t n c")
        attended = block.attn(block.ln_1(x), cls_only)
        x = (x[:, :, :1] if cls_only else x) + attended + self.spatial_adapter(attended)
        normed = block.ln_2(x)
        return x + block.mlp(normed) + MLP_SCALE * self.mlp_adapter(normed)


class Bottleneck(nn.Module):
    """up(GELU(down(x))), zero when fresh."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., C]` -> `[..., C]`."""
        return self.up(F.gelu(self.down(x)))
