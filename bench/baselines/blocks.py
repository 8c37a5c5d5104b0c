"""An image model with the blocks of a rival method, on the same weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from zeroi2v.model.vit import Block, VideoViT


def with_blocks(image: VideoViT, make: Callable[[Block], nn.Module]) -> VideoViT:
    """`image`, of zero offsets without adapters, with `make(block)` in place of each block.

    Weights are shared with `image`; new ones get its device and dtype.
    """
    model = copy.deepcopy(image, {id(p): p for p in image.parameters()})
    weight = image.head.weight
    with weight.device:
        blocks = [make(block) for block in model.transformer.resblocks]
    model.transformer.resblocks = nn.ModuleList(blocks)
    return model.to(weight.dtype).eval()
