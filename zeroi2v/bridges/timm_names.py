"""What the names of timm's architectures stand for, as far as the weights do not show it.

timm keeps an architecture's settings in its code, and a folder's `config.json` gives its name. A
name that is not in this table is refused. Two classes: `VisionTransformer` and `Eva`.
"""

from __future__ import annotations

import re
from typing import Any

# The classes' arguments, with timm's values where an architecture gives none; `norm_eps` is of
# their `norm_layer`, a function.
VIT: dict[str, Any] = {
    "num_heads": 12,
    "act_layer": "gelu",
    "norm_eps": 1e-6,
    "pre_norm": False,
    "global_pool": "token",
    "fc_norm": None,
    "pool_include_prefix": False,
}
EVA: dict[str, Any] = {
    "num_heads": 12,
    "norm_eps": 1e-6,
    "use_pre_transformer_norm": False,
    "global_pool": "avg",
    "use_fc_norm": None,
    "attn_pool_num_heads": None,
    "use_rot_pos_emb": False,
    "rope_type": "cat",
    "rope_temperature": 10000.0,
    "rope_grid_offset": 0.0,
    "rope_grid_indexing": "ij",
    "rope_rotate_half": False,
    "ref_feat_shape": None,
}

# Heads by the size in a name, with `_plus` if that is in it; where a family has others, it says so.
_HEADS = dict(tiny=3, xsmall=4, small=6, small_plus=6, medium=8, betwixt=10, base=12, base_plus=14)
_HEADS |= dict(large=16, huge=16, huge_plus=20, giant=16, gigantic=16, giantopt=16)
_HEADS |= dict(so150m=14, so400m=16)

_ANY = r"(tiny|xsmall|small|medium|betwixt|base|large|huge|giant|gigantic|so150m|so400m)"
_CLIP = {"pre_norm": True, "norm_eps": 1e-5}
_MAP, _MEAN = {"global_pool": "map"}, {"global_pool": "avg", "fc_norm": False}
_GATED = {"act_layer": "silu"}
_EVA02 = {"use_rot_pos_emb": True, "ref_feat_shape": 16, "global_pool": "token"}
_DINOV3 = {"norm_eps": 1e-5, "use_fc_norm": False, "use_rot_pos_emb": True, "rope_type": "dinov3"}
_DINOV3 |= {"rope_temperature": 100.0, "rope_rotate_half": True}
_PE = {"norm_eps": 1e-5, "use_pre_transformer_norm": True, "use_rot_pos_emb": True, **_MAP}
_PE |= {"rope_grid_indexing": "xy", "attn_pool_num_heads": 8}
_TANH_SIZES = r"(base_patch32|so400m_patch16|giantopt_patch16|large_patch16(?=\w+_512))"
_SIGLIP_SIZES = r"(base_patch16|so400m_patch14|large_patch16)"

# The first pattern that fits a whole name decides.
_FAMILIES: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    (rf"(vit|deit|deit3)_{_ANY}_patch\d+(_plus)?_\d+(_miil)?", VIT, {}),
    (rf"flexivit_{_ANY}", VIT, {}),
    (rf"vit_{_ANY}_patch\d+(_plus)?_clip_\d+", VIT, _CLIP),
    (rf"vit_{_ANY}_patch\d+_clip_quickgelu_\d+", VIT, {**_CLIP, "act_layer": "quick_gelu"}),
    (r"vit_giant_patch14(_reg4)?_dinov2", VIT, {"num_heads": 24, **_GATED}),
    (rf"vit_{_ANY}_patch14(_reg4)?_dinov2", VIT, {}),
    (rf"vit_{_TANH_SIZES}_siglip_\d+", VIT, {**_MAP, "act_layer": "gelu_tanh"}),
    (rf"vit_{_TANH_SIZES}_siglip_gap_\d+", VIT, {**_MEAN, "act_layer": "gelu_tanh"}),
    (rf"vit_{_SIGLIP_SIZES}_siglip_\d+", VIT, _MAP),
    (rf"vit_{_SIGLIP_SIZES}_siglip_gap_\d+", VIT, _MEAN),
    (r"vit_base_patch16_gap_\d+", VIT, {**_MEAN, "num_heads": 16}),
    (rf"vit_{_ANY}_patch\d+_gap_\d+", VIT, _MEAN),
    (r"vit_so150m_patch16_reg4_gap_\d+", VIT, _MEAN),
    *(
        (rf"aimv2_{size}_patch14_\d+", VIT, {**_MEAN, **_GATED, "norm_eps": 1e-5, "num_heads": n})
        for size, n in (("large", 8), ("huge", 12), ("1b", 16), ("3b", 24))
    ),
    (r"eva_giant_patch14_\d+", EVA, {}),
    (r"eva_giant_patch14_clip_\d+", EVA, {"global_pool": "token"}),
    (r"eva02_(base|large)_patch\d+_clip_\d+", EVA, _EVA02),
    (r"vit_7b_patch16_dinov3", EVA, {**_DINOV3, "num_heads": 32}),
    (rf"vit_{_ANY}(_plus)?_patch16_dinov3(_qkvb)?", EVA, _DINOV3),
    (r"vit_pe_core_gigantic_patch14_448", EVA, {**_PE, "ref_feat_shape": 32}),
    (r"vit_pe_core_base_patch16_224", EVA, {**_PE, "ref_feat_shape": 14, "rope_grid_offset": 1.0}),
    (
        r"vit_pe_core_(tiny_patch16_384|small_patch16_384|large_patch14_336)",
        EVA,
        {**_PE, "ref_feat_shape": 24, "rope_grid_offset": 1.0},
    ),
)


def settings(architecture: str) -> tuple[bool, dict[str, Any]] | None:
    """Whether `architecture` is an `Eva`, and the arguments of its class; None if not known."""
    for pattern, base, changes in _FAMILIES:
        if re.fullmatch(pattern, architecture):
            size = re.search(rf"_({'|'.join(_HEADS)})(?=_|$)", architecture)
            plus = "_plus" if "_plus" in architecture else ""
            heads = {"num_heads": _HEADS[size[1] + plus]} if size else {}
            return base is EVA, {**base, **heads, **changes}
    return None
