"""timm's `VisionTransformer`: ViTs of CLIP, ImageNet-21k and DINO, with LayerScale or without.

`config.json` of a folder from the hub names the architecture, whose settings `model_args` replace;
both are read whole. A bare file records neither heads nor activation. Of timm's models with a class
token, those with a norm before the blocks (CLIP) add 1e-5 to the variance in a norm, those without
one 1e-6.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from zeroi2v.bridges.foreign import (
    BLOCK,
    NORM_EPSILON,
    Foreign,
    assume_heads,
    check_weights,
    describe,
    fill_biases,
    fold_layer_scale,
    fold_norm_epsilon,
    read_keys,
    take_pixels,
)
from zeroi2v.bridges.reader import Source

_STEM = {
    "patch_embed.proj.weight": "conv1.weight",
    "norm_pre.weight": "ln_pre.weight",
    "norm_pre.bias": "ln_pre.bias",
    "norm.weight": "ln_post.weight",
    "norm.bias": "ln_post.bias",
}
_PARTS = {
    "norm1.weight": "ln_1.weight",
    "norm1.bias": "ln_1.bias",
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.proj.weight": "attn.out_proj.weight",
    "attn.proj.bias": "attn.out_proj.bias",
    "norm2.weight": "ln_2.weight",
    "norm2.bias": "ln_2.bias",
    "mlp.fc1.weight": "mlp.c_fc.weight",
    "mlp.fc1.bias": "mlp.c_fc.bias",
    "mlp.fc2.weight": "mlp.c_proj.weight",
    "mlp.fc2.bias": "mlp.c_proj.bias",
    "ls1.gamma": "ls_1",
    "ls2.gamma": "ls_2",
}
_EPSILON = 1e-6
# Heads by the size in an architecture's name, which `model_args` may replace.
_HEADS = dict(tiny=3, xsmall=4, small=6, medium=8, betwixt=10, base=12, base_plus=14)
_HEADS |= dict(large=16, huge=16, giant=16, gigantic=16)
# Architectures whose other settings are those of `VisionTransformer`, except the marks of CLIP.
_ARCHITECTURE = re.compile(
    r"(?:vit|deit|deit3|flexivit)_(?P<size>[a-z]+)(?:_patch\d+(?P<plus>_plus)?"
    r"(?P<clip>_clip(?P<quick>_quickgelu)?)?_(?:\d+(?:_miil)?|dinov2))?"
)

# config.json together with its `pretrained_cfg`.
_FIXED = {"global_pool": ("token", "")}
_HARMLESS = """num_classes num_features label_names label_descriptions labels label_offset tag
custom_load test_input_size min_input_size fixed_input_size pool_size test_pool_size first_conv
classifier license description origin_url paper_name paper_ids notes url file hf_hub_id
hf_hub_filename source test_crop_pct""".split()
_PIXELS = dict.fromkeys(("mean", "std", "interpolation", "crop_pct", "crop_mode"))

# `model_args`, the arguments of `VisionTransformer`.
_FIXED_ARGS = {
    "global_pool": ("token", ""),
    "class_token": (True,),
    "in_chans": (3,),
    "qk_norm": (False,),
    "scale_attn_norm": (False,),
    "scale_mlp_norm": (False,),
    "pos_embed": ("learn",),
    "reg_tokens": (0,),
    "final_norm": (True,),
    "fc_norm": (False, None),
    "pool_include_prefix": (False,),
    "embed_norm_layer": (None,),
    "norm_layer": (None, "layernorm"),
}
_HARMLESS_ARGS = """num_classes drop_rate pos_drop_rate patch_drop_rate proj_drop_rate
attn_drop_rate drop_path_rate weight_init fix_init dynamic_img_size dynamic_img_pad""".split()
_ACTIVATIONS = {None: "gelu", "gelu": "gelu", "quick_gelu": "quick_gelu"}
_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(.+)")

# What a ViT may have that changes its result and has no place in a VideoViT.
_REFUSED = {
    "reg_token": "register tokens, which VideoViT does not have",
    "attn_pool.": "attention pooling (SigLIP): VideoViT reads the class token",
    "fc_norm.": "average pooling: VideoViT reads the class token",
    "dist_token": "a distillation token, which VideoViT does not have",
}


def convert(source: Source) -> Foreign | None:
    """The image tower, or None if `source` is not of this layout. Raises ValueError if unfit."""
    theirs, where = source.tensors, str(source.path)
    if "patch_embed.proj.weight" not in theirs or "blocks.0.norm1.weight" not in theirs:
        return None
    for name, reason in _REFUSED.items():
        if any(other.startswith(name) for other in theirs):
            raise ValueError(f"{where} has {reason}")
    if "cls_token" not in theirs:
        raise ValueError(f"{where} has no class token: VideoViT reads the class token")
    foreign = Foreign(format="timm ViT", tensors=_rename(theirs, where))
    foreign.known = describe(foreign.tensors, where)
    fill_biases(foreign)
    tensors, folded = foreign.tensors, False
    for place in (BLOCK.format(i) for i in range(foreign.known["depth"])):
        for gamma, to in (("ls_1", "attn.out_proj"), ("ls_2", "mlp.c_proj")):
            names = (f"{place}{gamma}", f"{place}{to}.weight", f"{place}{to}.bias")
            folded |= fold_layer_scale(tensors, *names)
    if folded:
        foreign.notes.append("LayerScale merged into the projections")
    foreign.known["ln_pre"] = "norm_pre.weight" in theirs
    if any(name.startswith("head.") for name in theirs):
        foreign.notes.append("its image head is left out")
    if config := source.configs.get("config.json"):
        epsilon = _read_config(foreign, config, source)
    else:
        epsilon = NORM_EPSILON if foreign.known["ln_pre"] else _EPSILON
        assume_heads(foreign)
        foreign.missing["activation"] = "gelu, except for timm's models named quickgelu"
    if epsilon != NORM_EPSILON:
        fold_norm_epsilon(tensors, foreign.known["depth"], epsilon)
        foreign.notes.append(f"the norms' epsilon of {epsilon} is in the weights")
    return foreign


def _read_config(foreign: Foreign, config: dict[str, Any], source: Source) -> float:
    """Settles what `config.json` says, and returns the epsilon of the norms."""
    where, theirs = f"{source.path.parent / 'config.json'}", source.tensors
    pretrained = read_keys(config, where, {"pretrained_cfg": None}, harmless=config)
    pretrained = pretrained["pretrained_cfg"] or {}
    flat = {**pretrained, **{k: v for k, v in config.items() if k != "pretrained_cfg"}}
    handled = {"architecture": None, "model_args": None, "input_size": None, **_PIXELS}
    told = read_keys(flat, where, handled, _FIXED, _HARMLESS)
    name, given = told["architecture"], told["model_args"] or {}
    match = _ARCHITECTURE.fullmatch(str(name))
    size = match and match["size"] + (match["plus"] or "")
    if size not in _HEADS:
        raise ValueError(
            f"{where}: architecture = {name!r} is not supported: it must be a plain vit, deit, "
            "deit3 or flexivit of timm's; convert its weights file alone if it is one"
        )
    known, clip = foreign.known, bool(match["clip"])
    present = {
        "pre_norm": known["ln_pre"],
        "init_values": "blocks.0.ls1.gamma" in theirs,
        "qkv_bias": "blocks.0.attn.qkv.bias" in theirs,
        "proj_bias": "blocks.0.attn.proj.bias" in theirs,
        "no_embed_class": len(theirs["pos_embed"][0])
        == (known["image_size"] // known["patch_size"]) ** 2,
    }
    names = {"img_size": "image_size", "patch_size": "patch_size", "embed_dim": "width"}
    names |= {"depth": "depth", "mlp_ratio": "mlp_ratio"}
    handled = dict.fromkeys((*present, *names), None)
    handled |= {"num_heads": _HEADS[size], "act_layer": "quick_gelu" if match["quick"] else "gelu"}
    args = read_keys(given, f"{where}, model_args", handled, _FIXED_ARGS, _HARMLESS_ARGS)
    check_weights({o: args[t] for t, o in names.items() if t in given}, known, where)
    if told["input_size"] is not None:
        channels, *sides = told["input_size"]
        if channels != 3:
            raise ValueError(f"{where}: input_size = {told['input_size']} must have 3 channels")
        check_weights({"image_size": sides}, known, where)
    for key, value in {"pre_norm": clip, **{k: given[k] for k in present if k in given}}.items():
        if bool(value) != present[key]:
            raise ValueError(
                f"{where}: {key} = {value!r}, but its weights "
                f"{'have' if present[key] else 'lack'} what it stands for"
            )
    if args["act_layer"] not in _ACTIVATIONS:
        raise ValueError(
            f"{where}, model_args: act_layer = {args['act_layer']!r} is not supported: it must be "
            "'gelu' or 'quick_gelu'"
        )
    known["activation"] = _ACTIVATIONS[args["act_layer"]]
    known["num_heads"] = args["num_heads"]
    take_pixels(foreign, {key: told[key] for key in _PIXELS})
    return NORM_EPSILON if clip and "norm_layer" not in given else _EPSILON


def _rename(theirs: dict[str, torch.Tensor], where: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, tensor in theirs.items():
        match = _BLOCK_NAME.fullmatch(name)
        if name in _STEM:
            tensors[_STEM[name]] = tensor
        elif match and match[2] in _PARTS:
            tensors[BLOCK.format(match[1]) + _PARTS[match[2]]] = tensor
        elif name not in (
            "cls_token",
            "pos_embed",
            "patch_embed.proj.bias",
            "head.weight",
            "head.bias",
        ):
            raise ValueError(f"{where}: {name} has no place in a VideoViT")
    positions = theirs["pos_embed"][0].float().clone()
    tensors["class_embedding"] = theirs["cls_token"].flatten()
    if round(len(positions) ** 0.5) ** 2 == len(positions):  # none for the class token
        positions = torch.cat([positions.new_zeros(1, positions.shape[1]), positions])
    if (bias := theirs.get("patch_embed.proj.bias")) is not None:
        positions[1:] += bias  # of the patches' projection; CLIP's has none
    tensors["positional_embedding"] = positions
    return tensors
