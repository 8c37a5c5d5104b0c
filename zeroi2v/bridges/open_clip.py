"""open_clip: a folder with `open_clip_config.json`, or a bare file of weights (.pt, safetensors).

The weights have OpenAI's names. A bare file does not tell the activation: OpenAI's own, DFN's and
MetaCLIP's use QuickGELU, those of LAION and DataComp GELU. Other image towers are models of timm
(`visual.trunk`), read by its bridge: SigLIP, EVA-02, PE.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from zeroi2v.bridges import timm
from zeroi2v.bridges.foreign import (
    Foreign,
    assume_heads,
    check_weights,
    read_keys,
    take_pixels,
)
from zeroi2v.bridges.reader import Source
from zeroi2v.bridges.tensors import BLOCK, assemble

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
# The same for a tower of timm's: what it is, and what reads the tokens.
_TOWER = {"timm_model_name": None, "timm_pool": "avg", "image_size": 224}
_TOWER_HARMLESS = """timm_model_pretrained timm_proj timm_proj_bias timm_drop timm_drop_path
patch_dropout output_tokens""".split()
_PIXELS = dict.fromkeys(("mean", "std", "size", "interpolation", "resize_mode", "fill_color"))


def convert(source: Source) -> Foreign | None:
    """The visual tower, or None if `source` is not of this layout. Raises ValueError if unfit."""
    tensors, where = source.tensors, str(source.path)
    if any(name.startswith("visual.trunk.") for name in tensors):
        return _convert_trunk(source)
    if "visual.conv1.weight" in tensors:
        tensors = {n[len("visual.") :]: t for n, t in tensors.items() if n.startswith("visual.")}
    elif "conv1.weight" not in tensors or BLOCK.format(0) + "ln_1.weight" not in tensors:
        return None
    tensors = {name.replace(".gamma", ""): t for name, t in tensors.items() if name != "proj"}
    if any(name.startswith("attn_pool.") for name in tensors):
        raise ValueError(
            f"{where} pools its tokens by attention in a way of its own (CoCa), which VideoViT "
            "does not have"
        )
    scaled = f"{BLOCK.format(0)}ls_1" in tensors
    for name in ("class_embedding", "positional_embedding"):
        if name not in tensors:
            raise ValueError(f"{where} lacks {name}, which CLIP's vision model has")
    learned = tensors.pop("positional_embedding")
    foreign = assemble("open_clip", tensors, where, learned, has_rows=1, all_biases=True)
    foreign.known["pooling"] = "class"
    config = source.configs.get("open_clip_config.json")
    if config is None:
        assume_heads(foreign)
        foreign.missing["activation"] = "gelu for LAION and DataComp, quick_gelu for OpenAI and DFN"
        foreign.assumed["norm_eps"] = 1e-5
    else:
        _read_config(foreign, config, source, scaled)
    return foreign


def _convert_trunk(source: Source) -> Foreign:
    """An image tower of timm's; what projects its features to those of text is left out."""
    tensors = {
        name.removeprefix("visual.trunk."): tensor
        for name, tensor in source.tensors.items()
        if name.startswith("visual.trunk.")
    }
    config = source.configs.get("open_clip_config.json")
    trunk = replace(source, tensors=tensors, configs={})
    if config is None:
        foreign = timm.convert(trunk)
    else:
        model, pixels, where = _read_top(config, source)
        handled = {"vision_cfg": {}}
        vision = read_keys(model, where, handled, harmless=[*_TOP, "quick_gelu"])["vision_cfg"]
        place = f"{where}, vision_cfg"
        told = read_keys(vision, place, _TOWER, harmless=_TOWER_HARMLESS)
        pool = {"global_pool": told["timm_pool"]}
        settings = {"architecture": told["timm_model_name"], "model_args": pool}
        settings |= {"input_size": [3, told["image_size"], told["image_size"]]}
        foreign = timm.convert(replace(trunk, configs={"config.json": settings}))
        if foreign is not None:
            take_pixels(foreign, pixels)
    if foreign is None:
        raise ValueError(f"{source.path}: its image tower (visual.trunk) is no ViT of timm's")
    foreign.format = f"open_clip, {foreign.format}"
    if any(name.startswith("visual.head.") for name in source.tensors):
        foreign.notes.append("its projection to text is left out")
    return foreign


def _read_top(config: dict[str, Any], source: Source) -> tuple[dict, dict, str]:
    """The settings of the model and of its preprocessing, and where they are."""
    where = f"{source.path.parent / 'open_clip_config.json'}"
    whole = {"model_cfg": {}, "preprocess_cfg": {}}
    told = (
        read_keys(config, where, whole) if "model_cfg" in config else whole | {"model_cfg": config}
    )
    pixels = f"{where}, preprocess_cfg"
    return (
        told["model_cfg"],
        read_keys(told["preprocess_cfg"], pixels, _PIXELS, {"mode": ("RGB",)}),
        where,
    )


def _read_config(foreign: Foreign, config: dict[str, Any], source: Source, scaled: bool) -> None:
    known = foreign.known
    model, pixels, where = _read_top(config, source)
    handled = {"vision_cfg": {}, "quick_gelu": False}
    model = read_keys(model, where, handled, harmless=_TOP)
    place = f"{where}, vision_cfg"
    vision = read_keys(model["vision_cfg"], place, _HANDLED, _FIXED, _HARMLESS)
    sizes = {{"layers": "depth"}.get(key, key): vision[key] for key in _SIZES}
    check_weights(sizes, known, where)
    if (vision["ls_init_value"] is not None) != scaled:
        raise ValueError(
            f"{place}: ls_init_value = {vision['ls_init_value']!r}, but its weights "
            f"{'have' if scaled else 'lack'} LayerScale"
        )
    norms = read_keys(vision["norm_kwargs"] or {}, f"{place}.norm_kwargs", {"eps": 1e-5})
    known["norm_eps"] = norms["eps"]
    known["num_heads"] = known["width"] // vision["head_width"]
    known["activation"] = "quick_gelu" if model["quick_gelu"] else "gelu"
    take_pixels(foreign, pixels)
