"""Mixup and cutmix: each pair of neighbouring clips in a batch becomes two mixtures.

Mixup (arXiv 1710.09412) blends them, cutmix (arXiv 1905.04899) swaps a rectangle, the same in all
frames; their classes are mixed in the same shares. A pair's draw comes from (seed, epoch, place
in the epoch's order), so it does not depend on processes, accumulation or workers.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

from zeroi2v.data.augment import AugmentConfig


def mix(
    video: torch.Tensor,
    label: torch.Tensor,
    augment: AugmentConfig,
    key: tuple[int, int],
    position: int,
    num_classes: int,
) -> torch.Tensor:
    """Mixes `video` [B, ..., H, W] in place; returns class probabilities, float32 [B, num_classes].

    `key` is (seed, epoch), `position` the first clip's place in the epoch's order; B is even.
    """
    share = torch.ones(len(video))
    height, width = video.shape[-2:]
    for row in range(0, len(video), 2):
        # Draws of single clips have a third number of 1 or more.
        rng = np.random.default_rng((*key, 0, 1 + (position + row) // 2))
        one, other = video[row], video[row + 1]
        if augment.cutmix and (not augment.mixup or rng.random() < 0.5):
            top, left, bottom, right = draw_box(rng, height, width, augment.cutmix)
            here = (..., slice(top, bottom), slice(left, right))
            one[here], other[here] = other[here].clone(), one[here].clone()
            share[row : row + 2] = 1 - (bottom - top) * (right - left) / (height * width)
        else:
            share[row : row + 2] = rng.beta(augment.mixup, augment.mixup)
            weight = float(share[row])
            video[row], video[row + 1] = one.lerp(other, 1 - weight), other.lerp(one, 1 - weight)
    mine = F.one_hot(label, num_classes).float()
    theirs = mine.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    return share[:, None] * mine + (1 - share[:, None]) * theirs


def draw_box(rng, height: int, width: int, alpha: float) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of a rectangle with a centre anywhere, cut off at the border.

    Before that it has the frame's shape and a share of 1 - Beta(alpha, alpha) of its area.
    """
    side = math.sqrt(1 - rng.beta(alpha, alpha))
    edges = []
    for size in (height, width):
        middle, half = rng.integers(size), int(size * side) // 2
        edges.append((max(middle - half, 0), min(middle + half, size)))
    (top, bottom), (left, right) = edges
    return int(top), int(left), int(bottom), int(right)
