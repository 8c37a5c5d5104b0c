"""Hugging Face transformers: `CLIPModel`, `CLIPVisionModel`, with or without projection.

Queries, keys and values are three layers there and one here. `config.json` beside the weights
tells heads and activation; a bare file does not.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from zeroi2v.bridges.foreign import BLOCK, Foreign, assume_heads, describe
from zeroi2v.bridges.reader import Source

_STEM = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding.weight": "conv1.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "pre_layrnorm.weight": "ln_pre.weight",
    "pre_layrnorm.bias": "ln_pre.bias",
    "post_layernorm.weight": "ln_post.weight",
    "post_layernorm.bias": "ln_post.bias",
}
_PARTS = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_BLOCK_NAME = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def convert(source: Source) -> Foreign | None:
    """The vision model, or None if `source` is not of this layout. Raises ValueError if unfit."""
    prefix = next(
        (
            p
            for p in ("vision_model.", "")
            if f"{p}embeddings.patch_embedding.weight" in source.tensors
        ),
        None,
    )
    if prefix is None:
        return None
    theirs = {
        name.removeprefix(prefix): tensor
        for name, tensor in source.tensors.items()
        if name.startswith(prefix)
    }
    if "embeddings.class_embedding" not in theirs:
        raise ValueError(
            f"{source.path} has no class token (SigLIP pools its tokens by attention): "
            "VideoViT reads the class token"
        )
    for name in ("embeddings.position_ids", "visual_projection.weight"):
        theirs.pop(name, None)
    foreign = Foreign(format="transformers CLIP", tensors=_rename(theirs, source))
    foreign.known = describe(foreign.tensors, str(source.path))
    config = source.configs.get("config.json")
    if config is None:
        assume_heads(foreign)
        foreign.missing["activation"] = "hidden_act in the model's config.json"
    else:
        _read_config(foreign, config, source)
    return foreign


def _rename(theirs: dict[str, torch.Tensor], source: Source) -> dict[str, torch.Tensor]:
    tensors, split = {}, {}
    for name, tensor in theirs.items():
        match = _BLOCK_NAME.fullmatch(name)
        if name in _STEM:
            tensors[_STEM[name]] = tensor
        elif match and match[2] in _PARTS:
            tensors[f"{BLOCK.format(match[1])}{_PARTS[match[2]]}.{match[3]}"] = tensor
        elif match and match[2] in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
            place = f"{BLOCK.format(match[1])}attn.in_proj_{match[3]}"
            split.setdefault(place, {})[match[2].removeprefix("self_attn.")[0]] = tensor
        else:
            raise ValueError(f"{source.path}: {name} has no place in a CLIP vision model")
    for name, parts in split.items():
        if len(parts) != 3:
            raise ValueError(
                f"{source.path}: {name} needs query, key and value: got {sorted(parts)}"
            )
        tensors[name] = torch.cat([parts[letter] for letter in "qkv"])
    return tensors


def _read_config(foreign: Foreign, config: dict[str, Any], source: Source) -> None:
    vision = config.get("vision_config", config)
    # Values that transformers leaves out of the file are those of ViT-B/32.
    told = {
        "width": vision.get("hidden_size", 768),
        "depth": vision.get("num_hidden_layers", 12),
        "patch_size": vision.get("patch_size", 32),
        "image_size": vision.get("image_size", 224),
    }
    for name, value in told.items():
        if value != foreign.known[name]:
            raise ValueError(
                f"{source.path}: its config says {name} {value}, its weights {foreign.known[name]}"
            )
    if vision.get("layer_norm_eps", 1e-5) != 1e-5:
        raise ValueError(
            f"{source.path}: layer_norm_eps must be 1e-05: got {vision['layer_norm_eps']}"
        )
    activation = vision.get("hidden_act", "quick_gelu")
    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"{source.path}: hidden_act must be quick_gelu or gelu: got {activation}")
    foreign.known["activation"] = activation
    foreign.known["num_heads"] = vision.get("num_attention_heads", 12)
    pixels = source.configs.get("preprocessor_config.json", {})
    for theirs, name in (("image_mean", "mean"), ("image_std", "std")):
        if theirs in pixels:
            foreign.known[f"preprocess.{name}"] = [255 * value for value in pixels[theirs]]
