"""timm's `VisionTransformer`: ViTs of CLIP, ImageNet-21k and DINO, with LayerScale or without.

`config.json` of a folder from the hub names the architecture; a bare file does not tell the
activation. Of timm's models with a class token, those with a norm before the blocks (CLIP) add
1e-5 to the variance in a norm, those without one 1e-6.
"""

from __future__ import annotations

import re

import torch

from zeroi2v.bridges.foreign import (
    BLOCK,
    Foreign,
    assume_heads,
    describe,
    fold_layer_scale,
    fold_norm_epsilon,
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
    tensors, folded = foreign.tensors, False
    for place in (BLOCK.format(i) for i in range(foreign.known["depth"])):
        for gamma, to in (("ls_1", "attn.out_proj"), ("ls_2", "mlp.c_proj")):
            names = (f"{place}{gamma}", f"{place}{to}.weight", f"{place}{to}.bias")
            folded |= fold_layer_scale(tensors, *names)
    if folded:
        foreign.notes.append("LayerScale merged into the projections")
    foreign.known["ln_pre"] = "norm_pre.weight" in theirs
    if not foreign.known["ln_pre"]:
        fold_norm_epsilon(tensors, foreign.known["depth"], _EPSILON)
        foreign.notes.append("no norm before the blocks; their epsilon of 1e-6 is in the weights")
    if any(name.startswith("head.") for name in theirs):
        foreign.notes.append("its image head is left out")
    assume_heads(foreign)
    config = source.configs.get("config.json", {})
    if isinstance(name := config.get("architecture"), str):
        foreign.known["activation"] = "quick_gelu" if "quickgelu" in name else "gelu"
        if "_clip_" in name and not foreign.known["ln_pre"]:
            raise ValueError(f"{where} lacks norm_pre, which its architecture {name} has")
    else:
        foreign.missing["activation"] = "gelu, but for timm's models named quickgelu"
    pixels = config.get("pretrained_cfg", {})
    for name in ("mean", "std"):
        if name in pixels:
            foreign.known[f"preprocess.{name}"] = [255 * value for value in pixels[name]]
    return foreign


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
