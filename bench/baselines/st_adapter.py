"""ST-Adapter: a frozen image ViT with a convolution over time before each attention: a rival.

    patches += up(conv(down(patches)))      then the block as it was

`down` leads to 384 channels whatever the width; `conv` is depthwise, 3 x 1 x 1 over (T, h, w). CLS
passes by. The convolution joins frames, so none of it can be merged.

Source: ST-Adapter (arXiv 2206.13559), section 3.3; written anew.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from bench.baselines.blocks import with_blocks
from zeroi2v.model.vit import Block, VideoViT

RANK = 384


def st_adapter(image: VideoViT) -> VideoViT:
    """`image`, a model of zero offsets without adapters, with ST-Adapters. Shares its weights."""
    return with_blocks(image, lambda block: STAdapterBlock(block, image.config.width))


class STAdapterBlock(nn.Module):
    """`block` behind an ST-Adapter."""

    def __init__(self, block: Block, width: int):
        super().__init__()
        self.block = block
        self.down = nn.Linear(width, RANK)
        # 3 x 1 x 1 over (T, h, w) is 3 x 1 over (T, h * w), which runs faster.
        self.conv = nn.Conv2d(RANK, RANK, (3, 1), padding=(1, 0), groups=RANK)
        self.up = nn.Linear(RANK, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor, cls_only: bool = False) -> Tensor:
        """`x [B, T, N, C]` -> `[B, T, N, C]`, or `[B, T, 1, C]` for the CLS token alone."""
        cls, patches = x[:, :, :1], x[:, :, 1:]
        inner = rearrange(self.down(patches), "b t n r -> b r t n")
        inner = rearrange(self.conv(inner), "b r t n -> b t n r")
        return self.block(torch.cat([cls, patches + self.up(inner)], dim=2), cls_only)
