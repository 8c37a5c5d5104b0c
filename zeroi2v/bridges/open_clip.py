"""open_clip: a folder with `open_clip_config.json`, or a bare file of weights (.pt, safetensors).

The weights have OpenAI's names. A bare file does not tell the activation: OpenAI's own, DFN's and
MetaCLIP's use QuickGELU, those of LAION and DataComp GELU.
"""

from __future__ import annotations

from zeroi2v.bridges.foreign import BLOCK, Foreign, assume_heads, describe, fold_layer_scale
from zeroi2v.bridges.reader import Source

# Settings of a vision tower that change nothing here, and values that others must have.
_HARMLESS = {"image_size", "layers", "width", "patch_size", "head_width", "mlp_ratio"}
_HARMLESS |= {"patch_dropout", "output_tokens", "ls_init_value", "timm_drop", "timm_drop_path"}
_REQUIRED = {"pool_type": "tok", "pos_embed_type": "learnable", "act_kwargs": None}


def convert(source: Source) -> Foreign | None:
    """The visual tower, or None if `source` is not of this layout. Raises ValueError if unfit."""
    tensors = source.tensors
    if any(name.startswith("visual.trunk.") for name in tensors):
        raise ValueError(
            f"{source.path} holds an image tower of timm inside open_clip (visual.trunk): "
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
        _read_config(foreign, config, source)
    return foreign


def _read_config(foreign: Foreign, config: dict, source: Source) -> None:
    model = config.get("model_cfg", config)
    vision = model.get("vision_cfg", {})
    for key, value in vision.items():
        allowed = key in _HARMLESS or value in (False, None, _REQUIRED.get(key))
        if not allowed:
            raise ValueError(f"{source.path}: vision_cfg.{key} = {value!r} is not supported")
    for key, name in (("layers", "depth"), ("width", "width"), ("patch_size", "patch_size")):
        if vision.get(key, foreign.known[name]) != foreign.known[name]:
            raise ValueError(
                f"{source.path}: its config says {key} {vision[key]}, "
                f"its weights {foreign.known[name]}"
            )
    if vision.get("image_size", foreign.known["image_size"]) != foreign.known["image_size"]:
        raise ValueError(
            f"{source.path}: its config says image_size {vision['image_size']}, its positional "
            f"embedding is for {foreign.known['image_size']}"
        )
    foreign.known["num_heads"] = foreign.known["width"] // vision.get("head_width", 64)
    foreign.known["activation"] = "quick_gelu" if model.get("quick_gelu") else "gelu"
    pixels = config.get("preprocess_cfg", {})
    for name in ("mean", "std"):
        if name in pixels:
            foreign.known[f"preprocess.{name}"] = [255 * value for value in pixels[name]]
