"""What every bridge hands over, and how foreign configs are read.

A bridge turns a foreign file's tensors into CLIP's visual names (`tensors.py`) and says what the
file records of the model. Nothing is guessed: what a format does not say goes into `missing`, and
is asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from zeroi2v.config import ModelConfig

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
    free: tuple[str, ...] = ("image_size",)
    """Known fields that an override may replace: the weights serve other values as well."""
    resizing: dict[str, Any] = field(default_factory=dict)
    """How it resized images, in fields of `ModelConfig`; for models without a recipe."""
    notes: list[str] = field(default_factory=list)
    """What was done to the weights, or left out."""


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


def _are_sizes(value: Any) -> bool:
    sides = value if isinstance(value, list | tuple) else [value]
    return bool(sides) and all(map(_is_size, sides))


def _are_numbers(value: Any, above: float = -math.inf) -> bool:
    is_list = isinstance(value, list | tuple) and len(value) == 3
    return value is None or (is_list and all(_is_number(x) and x > above for x in value))


# What the values of settings must be, whatever library they are of.
_VALUES: tuple[tuple[frozenset[str], Callable[[Any], bool], str], ...] = (
    (
        frozenset(
            "num_heads num_attention_heads head_width hidden_size intermediate_size "
            "num_hidden_layers width layers embed_dim depth r".split()
        ),
        _is_size,
        "a positive integer",
    ),
    (
        frozenset("layer_norm_eps rms_norm_eps eps mlp_ratio rope_theta rope_temperature".split()),
        lambda value: _is_number(value) and value > 0,
        "a positive number",
    ),
    (frozenset(("rope_grid_offset", "lora_alpha")), _is_number, "a number"),
    (
        frozenset(("ref_feat_shape", "image_size", "img_size")),
        lambda value: value is None or _are_sizes(value),
        "a positive integer, or two",
    ),
    (
        frozenset(("attn_pool_num_heads", "resample")),
        lambda value: value is None or isinstance(value, int),
        "an integer",
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
        frozenset(("act_layer", "hidden_act", "architecture", "timm_model_name")),
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
        frozenset(
            "vision_config vision_cfg model_cfg preprocess_cfg rank_pattern alpha_pattern".split()
        ),
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
    """Takes over mean, std and interpolation, and reports the rest of a foreign preprocessing.

    All of these libraries resize images with PIL or as PIL does, which averages pixels.
    """
    for name in ("mean", "std"):
        if (value := pixels.pop(name, None)) is not None:
            foreign.known[f"preprocess.{name}"] = [255 * number for number in value]
    if pixels.get("interpolation") in ("bilinear", "bicubic"):
        foreign.resizing["preprocess.interpolation"] = pixels.pop("interpolation")
        foreign.resizing["preprocess.antialias"] = True
    if rest := ", ".join(f"{key} {value}" for key, value in pixels.items() if value is not None):
        foreign.notes.append(f"preprocessing for images, not taken over: {rest}")


def assume_heads(foreign: Foreign, head_dim: int = 64, pools_alike: bool = True) -> None:
    """Settles `num_heads`, which no tensor shows, by the convention of `head_dim`, or asks.

    Attention pooling has as many heads, if it `pools_alike`.
    """
    width, names = foreign.known["width"], ["num_heads"]
    if pools_alike and foreign.known.get("pooling") == "attention":
        names.append("pool_heads")
    for name in names:
        if width % head_dim == 0 and (head_dim != 64 or width <= _HEADS_OF_64):
            foreign.assumed[name] = width // head_dim
        else:
            foreign.missing[name] = "in the model's description; weights do not tell"


def pool_tokens(foreign: Foreign, pooling: str | None) -> None:
    """Settles what stands for a frame, unless the tensors do: None leaves it open.

    With a class token either may be chosen instead, for both are made of the same tokens.
    """
    known = foreign.known
    if "pooling" in known:
        return
    if not known["class_token"]:
        known["pooling"] = "mean"
    elif pooling is None:
        foreign.missing["pooling"] = "class or mean"
    else:
        known["pooling"] = pooling
        foreign.free += ("pooling",)


def know_rotary(foreign: Foreign, **fields: float) -> None:
    """Settles rotary positions, by the fields of `RotaryConfig`."""
    del foreign.known["rotary"]
    foreign.known |= {f"rotary.{name}": value for name, value in fields.items()}
