"""What every bridge hands over, and the arithmetic that several of them share.

A bridge turns a foreign file's tensors into CLIP's visual names and says what the file tells about
the model. Nothing is guessed: what a format does not say goes into `missing`, and is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroi2v.config import ModelConfig

BLOCK = "transformer.resblocks.{}."
NORM_EPSILON = 1e-5
"""Added to the variance by every layer norm of CLIP, and so of `VideoViT`."""
_BOTH = ("weight", "bias")

# Widths at which every published CLIP and ViT has heads of 64 channels. Larger ones differ
# (ViT-H 80, ViT-g 88, ViT-G 104), and weights alone do not tell.
_HEADS_OF_64 = 1024


@dataclass(kw_only=True, slots=True)
class Foreign:
    """A foreign model in CLIP's visual names."""

    format: str
    """What was recognised, in words."""
    tensors: dict[str, Tensor]
    """The backbone, and, if the file has them, `temporal_embedding`, `head.*` and adapters."""
    known: dict[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` that the file decides; those of adapter and preprocess dotted."""
    assumed: dict[str, Any] = field(default_factory=dict)
    """Fields by a convention of the format, which an override may replace."""
    missing: dict[str, str] = field(default_factory=dict)
    """Fields the file leaves open and that change the result, each with where to find it."""
    fresh: tuple[str, ...] = ("temporal_embedding", "head.", "_adapter.")
    """Parts of names whose tensors may be absent: they start as an untrained model's do."""
    finish: Callable[[ModelConfig], None] | None = None
    """What can be done to the tensors only once the whole config is settled."""
    notes: list[str] = field(default_factory=list)
    """What was done to the weights, or left out."""


def describe(tensors: dict[str, Tensor], where: str) -> dict[str, Any]:
    """Width, depth, patch, resolution and MLP ratio of a tower in CLIP's visual names.

    Raises ValueError if a tensor is missing or two of them contradict each other.
    """
    for name in ("conv1.weight", "class_embedding", "positional_embedding"):
        if name not in tensors:
            raise ValueError(f"{where} lacks {name}: it is not a ViT with a class token")
    conv, positions = tensors["conv1.weight"], tensors["positional_embedding"]
    if conv.ndim != 4 or conv.shape[1] != 3 or conv.shape[2] != conv.shape[3]:
        raise ValueError(f"{where}: conv1.weight must be [C, 3, P, P]: got {list(conv.shape)}")
    width, patch = conv.shape[0], conv.shape[2]
    grid = round((len(positions) - 1) ** 0.5)
    if positions.ndim != 2 or grid < 1 or grid * grid + 1 != len(positions):
        raise ValueError(
            f"{where}: positional_embedding must be [1 + a square, C]: got {list(positions.shape)}"
        )
    blocks = {int(m[1]) for n in tensors if (m := re.match(r"transformer\.resblocks\.(\d+)\.", n))}
    if not blocks or blocks != set(range(len(blocks))):
        raise ValueError(f"{where}: blocks must be numbered from 0 on: got {sorted(blocks)[:20]}")
    hidden = BLOCK.format(0) + "mlp.c_fc.weight"
    back = hidden.replace("c_fc", "c_proj")
    for name in (hidden, back):
        if name not in tensors or tensors[name].ndim != 2:
            raise ValueError(f"{where} lacks {name}, or it is no matrix")
    if len(tensors[hidden]) != tensors[back].shape[1]:
        raise ValueError(f"{where} has a gated MLP (SwiGLU), which VideoViT does not have")
    return {
        "width": width,
        "patch_size": patch,
        "image_size": grid * patch,
        "depth": len(blocks),
        "mlp_ratio": len(tensors[hidden]) / width,
    }


def assume_heads(foreign: Foreign) -> None:
    """Settles `num_heads`, which no tensor shows, by the convention of 64 channels, or asks."""
    width = foreign.known["width"]
    if width <= _HEADS_OF_64 and width % 64 == 0:
        foreign.assumed["num_heads"] = width // 64
    else:
        foreign.missing["num_heads"] = "in the model's description; weights do not tell"


def fold_layer_scale(tensors: dict[str, Tensor], gamma: str, weight: str, bias: str) -> bool:
    """Multiplies LayerScale's `gamma` into the projection before it, if there is one."""
    if gamma not in tensors:
        return False
    scale = tensors.pop(gamma).double()
    tensors[weight] = (scale[:, None] * tensors[weight].double()).float()
    tensors[bias] = (scale * tensors[bias].double()).float()
    return True


def fold_norm_epsilon(tensors: dict[str, Tensor], depth: int, epsilon: float) -> None:
    """Makes norms with our epsilon compute what they did with `epsilon`; for towers without ln_pre.

    norm(x; e) = norm(s x; s^2 e), so all that is added to the residual stream is multiplied by
    s = sqrt(ours / epsilon): the embeddings and every block's two projections.
    """
    scale = (NORM_EPSILON / epsilon) ** 0.5
    names = ["conv1.weight", "class_embedding", "positional_embedding"]
    for block in (BLOCK.format(i) for i in range(depth)):
        names += [f"{block}{p}.{k}" for p in ("attn.out_proj", "mlp.c_proj") for k in _BOTH]
    for name in names:
        tensors[name] = (scale * tensors[name].double()).float()


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Positional embedding `[1 + g*g, C]` at another grid, bicubic; the class token's is kept."""
    old = round((len(positions) - 1) ** 0.5)
    if old == grid:
        return positions
    plane = positions[1:].float().T.reshape(1, -1, old, old)
    plane = F.interpolate(plane, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
    patches = plane.reshape(plane.shape[1], -1).T
    return torch.cat([positions[:1].float(), patches])
