"""open_clip: a folder with `open_clip_config.json`, or a bare file of weights (.pt, safetensors).

The weights have OpenAI's names. A bare file does not tell the activation: OpenAI's own, DFN's and
MetaCLIP's use QuickGELU, those of LAION and DataComp GELU.
"""

from __future__ import annotations

from typing import Any

from zeroi2v.bridges.foreign import (
    BLOCK,
    NORM_EPSILON,
    Foreign,
    assume_heads,
    check_weights,
    describe,
    fold_layer_scale,
    fold_norm_epsilon,
    read_keys,
    take_pixels,
)
from zeroi2v.bridges.reader import Source

_TOP = """embed_dim text_cfg multimodal_cfg custom_text init_logit_scale init_logit_bias
nonscalar_logit_scale output_dict cast_dtype""".split()  # text, loss and precision

# `vision_cfg`, with open_clip's values for what is left out.
_SIZES = {"layers": 12, "width": 768, "patch_size": 16, "image_size": 224, "mlp_ratio": 4.0}
_HANDLED = {**_SIZES, "head_width": 64, "norm_kwargs": None, "ls_init_value": None}
_FIXED: dict[str, tuple] = {
    "pool_type": ("tok",),
    "pos_embed_type": ("learnable",),
    "attentional_pool": (False,),
    "no_ln_pre": (False,),
    "final_ln_after_pool": (False,),
    "act_kwargs": (None, {}),
    "block_type": (None, "default"),
    "timm_model_name": (None, ""),
}
_FIXED |= dict.fromkeys(
    "qk_norm scaled_cosine_attn scale_heads scale_attn_inner scale_attn scale_fc".split(), (False,)
)
# Training, more outputs, and settings of a pooler or a timm tower that is not there.
_HARMLESS = """patch_dropout output_tokens attn_pooler_queries attn_pooler_heads
timm_model_pretrained timm_pool timm_proj timm_proj_bias timm_drop timm_drop_path""".split()
_PIXELS = dict.fromkeys(("mean", "std", "size", "interpolation", "resize_mode", "fill_color"))


def convert(source: Source) -> Foreign | None:
    """The visual tower, or None if `source` is not of this layout. Raises ValueError if unfit."""
    tensors = source.tensors
    if any(name.startswith("visual.trunk.") for name in tensors):
        raise ValueError(
            f"{source.path} contains an image tower of timm inside open_clip (visual.trunk): "
            "convert timm's own weights of that tower"
        )
    if "visual.conv1.weight" in tensors:
        tensors = {n[len("visual.") :]: t for n, t in tensors.items() if n.startswith("visual.")}
    elif "conv1.weight" not in tensors or BLOCK.format(0) + "ln_1.weight" not in tensors:
        return None
    tensors = {name: tensor for name, tensor in tensors.items() if name != "proj"}
    if any(name.startswith("attn_pool.") for name in tensors):
        raise ValueError(
            f"{source.path} pools its tokens by attention (CoCa, SigLIP), not by a class token: "
            "VideoViT reads the class token"
        )
    foreign = Foreign(format="open_clip", tensors=tensors)
    foreign.known = describe(tensors, str(source.path))
    place = BLOCK.format("{}")
    folded = [
        fold_layer_scale(
            tensors, f"{block}{gamma}.gamma", f"{block}{to}.weight", f"{block}{to}.bias"
        )
        for block in (place.format(i) for i in range(foreign.known["depth"]))
        for gamma, to in (("ls_1", "attn.out_proj"), ("ls_2", "mlp.c_proj"))
    ]
    if any(folded):
        foreign.notes.append("LayerScale merged into the projections")
    config = source.configs.get("open_clip_config.json")
    if config is None:
        assume_heads(foreign)
        foreign.missing["activation"] = "gelu for LAION and DataComp, quick_gelu for OpenAI and DFN"
    else:
        _read_config(foreign, config, source, any(folded))
    return foreign


def _read_config(foreign: Foreign, config: dict[str, Any], source: Source, scaled: bool) -> None:
    where, known = f"{source.path.parent / 'open_clip_config.json'}", foreign.known
    whole = {"model_cfg": {}, "preprocess_cfg": {}}
    told = (
        read_keys(config, where, whole) if "model_cfg" in config else whole | {"model_cfg": config}
    )
    handled = {"vision_cfg": {}, "quick_gelu": False}
    model = read_keys(told["model_cfg"], where, handled, harmless=_TOP)
    place = f"{where}, vision_cfg"
    vision = read_keys(model["vision_cfg"], place, _HANDLED, _FIXED, _HARMLESS)
    sizes = {{"layers": "depth"}.get(key, key): vision[key] for key in _SIZES}
    check_weights(sizes, known, where)
    if (vision["ls_init_value"] is not None) != scaled:
        raise ValueError(
            f"{place}: ls_init_value = {vision['ls_init_value']!r}, but its weights "
            f"{'have' if scaled else 'lack'} LayerScale"
        )
    norms = read_keys(vision["norm_kwargs"] or {}, f"{place}.norm_kwargs", {"eps": NORM_EPSILON})
    fold_norm_epsilon(foreign.tensors, known["depth"], norms["eps"])
    known["num_heads"] = known["width"] // vision["head_width"]
    known["activation"] = "quick_gelu" if model["quick_gelu"] else "gelu"
    pixels = read_keys(
        told["preprocess_cfg"], f"{where}, preprocess_cfg", _PIXELS, {"mode": ("RGB",)}
    )
    take_pixels(foreign, pixels)
