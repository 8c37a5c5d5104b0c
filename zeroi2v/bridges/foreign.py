"""What every bridge hands over, and the arithmetic that several of them share.

A bridge turns a foreign file's tensors into CLIP's visual names and says what the file records of
the model. Nothing is guessed: what a format does not say goes into `missing`, and is asked for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
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


def read_keys(
    config: dict[str, Any],
    where: str,
    handled: dict[str, Any],
    fixed: dict[str, tuple] | None = None,
    harmless: Iterable[str] = (),
) -> dict[str, Any]:
    """The `handled` settings of a foreign config; every other key must be known not to matter.

    The rule of all bridges: a key is read, or may have only the values that a VideoViT computes,
    or is listed as harmless (it changes nothing but training, text, labels or book-keeping). Any
    other key is refused, since a setting that nobody has looked at may make another model.

    Args:
        config: the settings as the foreign library wrote them.
        where: file and section, for messages.
        handled: keys that the caller reads, each with the library's value where it is left out.
        fixed: keys that change the result, each with the values that are supported.
        harmless: keys that do not change what the tower computes in inference.

    Raises ValueError that names the key, its value and what is supported.
    """
    if not isinstance(config, dict):
        raise ValueError(f"{where} must be a mapping: got {config!r}")
    fixed = fixed or {}
    for key, value in config.items():
        if key in handled or key in harmless:
            continue
        if key not in fixed:
            raise ValueError(
                f"{where}: {key} = {value!r} is not known, and may change the result; known are "
                f"{', '.join(sorted({*handled, *fixed}))}"
            )
        if value not in fixed[key]:
            raise ValueError(
                f"{where}: {key} = {value!r} is not supported: it must be "
                f"{' or '.join(map(repr, fixed[key]))}"
            )
    told = {key: config.get(key, default) for key, default in handled.items()}
    for key, value in told.items():
        for keys, is_right, rule in _VALUES:
            if key in keys and key in config and not is_right(value):
                raise ValueError(f"{where}: {key} = {value!r} must be {rule}")
    return told


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _are_numbers(value: Any, above: float = -math.inf) -> bool:
    is_list = isinstance(value, list | tuple) and len(value) == 3
    return value is None or (is_list and all(_is_number(x) and x > above for x in value))


# What the values of settings must be, whatever library they are of.
_VALUES: tuple[tuple[frozenset[str], Callable[[Any], bool], str], ...] = (
    (
        frozenset(
            "num_heads num_attention_heads head_width hidden_size intermediate_size "
            "num_hidden_layers width layers embed_dim depth".split()
        ),
        _is_size,
        "a positive integer",
    ),
    (
        frozenset(("layer_norm_eps", "eps", "mlp_ratio")),
        lambda value: _is_number(value) and value > 0,
        "a positive number",
    ),
    (frozenset(("mean", "image_mean")), _are_numbers, "three numbers"),
    (
        frozenset(("std", "image_std")),
        lambda value: _are_numbers(value, above=0),
        "three positive numbers",
    ),
    (
        frozenset(("input_size",)),
        lambda value: _are_numbers(value, above=0),
        "channels, height and width",
    ),
    (
        frozenset(("act_layer", "hidden_act", "architecture")),
        lambda value: value is None or isinstance(value, str),
        "a name",
    ),
    (frozenset(("quick_gelu",)), lambda value: isinstance(value, bool), "true or false"),
    (
        frozenset(("model_args", "pretrained_cfg", "norm_kwargs")),
        lambda value: value is None or isinstance(value, dict),
        "a mapping",
    ),
    (
        frozenset(("vision_config", "vision_cfg", "model_cfg", "preprocess_cfg")),
        lambda value: isinstance(value, dict),
        "a mapping",
    ),
)


def check_weights(told: dict[str, Any], known: dict[str, Any], where: str) -> None:
    """Raises ValueError where a config (by its own keys) and the weights disagree.

    Sizes may be numbers or pairs of equal numbers. `mlp_ratio` counts as whole channels.
    """
    for key, value in told.items():
        same = [known[key]] * len(value) if isinstance(value, list | tuple) else known[key]
        if key == "mlp_ratio" and isinstance(value, int | float):
            width = known["width"]
            value, same = int(width * value), round(width * known[key])
        if list(value) != same if isinstance(value, tuple) else value != same:
            raise ValueError(
                f"{where}: its config says {key} {told[key]}, its weights {known[key]}"
            )


def take_pixels(foreign: Foreign, pixels: dict[str, Any]) -> None:
    """Takes over mean and std, and reports the rest of a foreign preprocessing."""
    for name in ("mean", "std"):
        if (value := pixels.pop(name, None)) is not None:
            foreign.known[f"preprocess.{name}"] = [255 * number for number in value]
    if rest := ", ".join(f"{key} {value}" for key, value in pixels.items() if value is not None):
        foreign.notes.append(f"preprocessing for images, not taken over: {rest}")


def fill_biases(foreign: Foreign) -> None:
    """Gives linear layers of the blocks that have no bias one of zeros: the same result."""
    tensors, filled = foreign.tensors, set()
    for i in range(foreign.known["depth"]):
        for part in ("attn.in_proj_", "attn.out_proj.", "mlp.c_fc.", "mlp.c_proj."):
            name = f"{BLOCK.format(i)}{part}"
            if f"{name}weight" in tensors and f"{name}bias" not in tensors:
                tensors[f"{name}bias"] = torch.zeros(len(tensors[f"{name}weight"]))
                filled.add(part.rstrip("_."))
    for part in sorted(filled):
        foreign.notes.append(f"{part} has no bias: zeros")


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
    """Makes norms with our epsilon compute what they did with `epsilon`.

    norm(x; e) = norm(s x; s^2 e), so all that is added to the residual stream is multiplied by
    s = sqrt(ours / epsilon): the embeddings, the norm before the blocks if there is one, and every
    block's two projections. Raises ValueError if `epsilon` is not positive.
    """
    if not isinstance(epsilon, float) or not 0 < epsilon < 1:
        raise ValueError(f"epsilon of layer norms must be in (0, 1): got {epsilon!r}")
    if epsilon == NORM_EPSILON:
        return
    scale = (NORM_EPSILON / epsilon) ** 0.5
    names = ["conv1.weight", "class_embedding", "positional_embedding"]
    names += [name for name in ("ln_pre.weight", "ln_pre.bias") if name in tensors]
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
