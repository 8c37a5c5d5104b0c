"""timm's `VisionTransformer` and `Eva`: ViTs of ImageNet-21k, CLIP, SigLIP, DINO, PE, EVA-02, AIM.

`config.json` of a folder from the hub names the architecture (`timm_names.py`), whose settings
`model_args` replace; both are read whole. A bare file shows which parts a model has, but neither
heads nor activation nor rotary positions: what its family always has is taken, the rest asked for.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

from torch import Tensor

from zeroi2v.bridges.foreign import (
    Foreign,
    assume_heads,
    check_weights,
    know_rotary,
    pool_tokens,
    read_keys,
    take_pixels,
)
from zeroi2v.bridges.lora import melt
from zeroi2v.bridges.reader import Source
from zeroi2v.bridges.tensors import BLOCK, assemble, turn_pairs
from zeroi2v.bridges.timm_names import settings

_STEM = {
    "patch_embed.proj": "conv1",
    "patch_embed.norm": "ln_patch",
    "norm_pre": "ln_pre",
    "norm": "ln_post",
    "attn_pool.q": "pool.q",
    "attn_pool.kv": "pool.key_value",
    "attn_pool.proj": "pool.out_proj",
    "attn_pool.norm": "pool.ln",
    "attn_pool.mlp.fc1": "pool.mlp.c_fc",
    "attn_pool.mlp.fc2": "pool.mlp.c_proj",
}
_PARTS = {
    "norm1": "ln_1",
    "attn.q_proj": "attn.q",
    "attn.k_proj": "attn.k",
    "attn.v_proj": "attn.v",
    "attn.norm": "attn.ln",
    "attn.proj": "attn.out_proj",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc1_g": "mlp.gate",
    "mlp.fc1_x": "mlp.value",
    "mlp.norm": "mlp.ln",
    "mlp.fc2": "mlp.c_proj",
}
# Names that do not end in `weight` or `bias` there or here.
_WHOLE = {
    "attn.qkv.weight": "attn.in_proj_weight",
    "attn.qkv.bias": "attn.in_proj_bias",
    "attn.q_bias": "attn.q.bias",
    "attn.v_bias": "attn.v.bias",
    "ls1.gamma": "ls_1",
    "ls2.gamma": "ls_2",
    "gamma_1": "ls_1",
    "gamma_2": "ls_2",
}
_TOKENS = {"cls_token": "class_embedding", "reg_token": "register_tokens"}
_TOKENS |= {"attn_pool.latent": "pool.latent"}
_LEFT_OUT = ("head.weight", "head.bias")

# config.json together with its `pretrained_cfg`.
_HARMLESS = """num_classes num_features label_names label_descriptions labels label_offset tag
custom_load test_input_size min_input_size fixed_input_size pool_size test_pool_size first_conv
classifier license description origin_url paper_name paper_ids notes url file hf_hub_id
hf_hub_filename source test_crop_pct""".split()
_PIXELS = dict.fromkeys(("mean", "std", "interpolation", "crop_pct", "crop_mode"))

# `model_args` of either class: those that the weights show, by our name or as a part that there is
# or is not; those with values that a VideoViT computes; and those of training alone.
_SIZES = {"img_size": "image_size", "patch_size": "patch_size", "embed_dim": "width"}
_SIZES |= {"depth": "depth", "mlp_ratio": "mlp_ratio"}
_FIXED_ARGS = {
    "in_chans": (3,),
    "qk_norm": (False,),
    "pos_embed": ("learn",),
    "final_norm": (True,),
    "embed_norm_layer": (None, "rmsnorm"),
    "attn_layer": (None, "attn"),
    "attn_type": ("eva", "rope"),
    "num_kv_heads": (None,),
    "attn_only_layer_scale": (False,),
    "use_post_norm": (False,),
    "use_post_transformer_norm": (None, True),
    "rope_mrope_section": (None,),
}
_HARMLESS_ARGS = """num_classes drop_rate pos_drop_rate patch_drop_rate proj_drop_rate
attn_drop_rate drop_path_rate weight_init fix_init dynamic_img_size dynamic_img_pad head_init_scale
rope_shift_coords rope_jitter_coords rope_rescale_coords swiglu_align_to attn_pool_mlp_ratio
""".split()

# What a ViT may have that changes its result and has no place in a VideoViT.
_REFUSED = {
    "dist_token": "a distillation token, which VideoViT does not have",
    "rope.freqs": "learned rotary frequencies (mixed), which VideoViT does not have",
    "attn_pool.pos_embed": "positions in its attention pooling, which VideoViT does not have",
    "blocks.0.attn.rel_pos": "relative positions, which VideoViT does not have",
    "shared_rel_pos.": "relative positions, which VideoViT does not have",
    "blocks.0.attn.q_norm": "norms of queries and keys (qk_norm), which VideoViT does not have",
    "blocks.0.attn.gate": "a gate after attention, which VideoViT does not have",
    "fc_norm.": "a norm after the mean of the tokens, which VideoViT does not have",
}


def convert(source: Source) -> Foreign | None:
    """The image tower, or None if `source` is not of this layout. Raises ValueError if unfit."""
    theirs, where = source.tensors, str(source.path)
    if "patch_embed.proj.weight" not in theirs or "blocks.0.norm1.weight" not in theirs:
        return None
    for name, reason in _REFUSED.items():
        if any(other.startswith(name) for other in theirs):
            raise ValueError(f"{where} has {reason}")
    tensors = {}
    for name, tensor in theirs.items():
        if (ours := rename(name)) is not None:
            tensors[ours] = tensor.flatten(0, -2) if ours == "register_tokens" else tensor
        elif name != "pos_embed" and name not in _LEFT_OUT:
            raise ValueError(f"{where}: {name} has no place in a VideoViT")
    if "class_embedding" in tensors:
        tensors["class_embedding"] = tensors["class_embedding"].flatten()
    learned, has_rows = theirs.get("pos_embed"), 0
    if learned is not None:
        learned = learned.flatten(0, -2)
        if math.isqrt(len(learned)) ** 2 != len(learned):  # with rows for class and registers
            has_rows = ("cls_token" in theirs) + len(tensors.get("register_tokens", ()))
    notes = melt(source, tensors, rename)
    norm = "layer" if "blocks.0.norm1.bias" in theirs else "rms"
    foreign = assemble("timm ViT", tensors, where, learned, has_rows, norm)
    foreign.notes += notes
    if any(name in theirs for name in _LEFT_OUT):
        foreign.notes.append("its image head is left out")
    if config := source.configs.get("config.json"):
        _read_config(foreign, config, source)
    else:
        _know_family(foreign, theirs, where)
    return foreign


def rename(name: str) -> str | None:
    """A tensor's name in ours, or that of the part it is put together to; None if it has none."""
    if name in _TOKENS:
        return _TOKENS[name]
    if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
        block, name = BLOCK.format(match[1]), match[2]
        if name in _WHOLE:
            return block + _WHOLE[name]
        part, _, kind = name.rpartition(".")
        known = part in _PARTS and kind in ("weight", "bias")
        return f"{block}{_PARTS[part]}.{kind}" if known else None
    part, _, kind = name.rpartition(".")
    return f"{_STEM[part]}.{kind}" if part in _STEM and kind in ("weight", "bias") else None


def _know_family(foreign: Foreign, theirs: dict[str, Tensor], where: str) -> None:
    """What a file without a config leaves open, as far as its parts show which family it is."""
    known, block = foreign.known, "blocks.0."
    is_dinov3 = "pos_embed" not in theirs and "reg_token" in theirs and f"{block}gamma_1" in theirs
    is_pe = known["ln_pre"] and known.get("pooling") == "attention"
    is_eva02 = known["norm_attended"] and known["norm_hidden"]
    of_eva = any(f"{block}{part}" in theirs for part in ("gamma_1", "attn.q_bias"))
    if "pos_embed" not in theirs:
        _ask_size(foreign)
    known["norm_eps"] = 1e-5 if known["norm"] == "rms" or known["ln_pre"] or is_dinov3 else 1e-6
    if is_dinov3:
        _turn(foreign, settings("vit_base_patch16_dinov3")[1], where)
        pool_tokens(foreign, None)
    elif is_pe:
        grid = known["image_size"] // known["patch_size"]
        offset = float(known["class_token"])
        pe = settings("vit_pe_core_base_patch16_224")[1]
        _turn(foreign, pe | {"ref_feat_shape": grid, "rope_grid_offset": offset}, where)
        known["pool_heads"] = pe["attn_pool_num_heads"]
    elif is_eva02:
        _turn(foreign, settings("eva02_base_patch16_clip_224")[1], where)
        pool_tokens(foreign, "class")
    elif of_eva or "pos_embed" not in theirs:
        raise ValueError(
            f"{where} may have rotary positions, which are in no tensor: it needs its config.json"
        )
    else:
        pool_tokens(foreign, "class")
    assume_heads(foreign, 128 if known["norm_patches"] else 64, pools_alike=not is_pe)  # 128: AIMv2
    if "activation" not in known and (is_dinov3 or is_pe):
        known["activation"] = "gelu"
    elif "activation" not in known:
        foreign.missing["activation"] = (
            "gelu, but quick_gelu if named so, gelu_tanh in some SigLIPs"
        )


def _read_config(foreign: Foreign, config: dict[str, Any], source: Source) -> None:
    """Settles what `config.json` says."""
    where, theirs, known = f"{source.path.parent / 'config.json'}", source.tensors, foreign.known
    pretrained = read_keys(config, where, {"pretrained_cfg": None}, harmless=config)
    pretrained = pretrained["pretrained_cfg"] or {}
    flat = {**pretrained, **{k: v for k, v in config.items() if k != "pretrained_cfg"}}
    handled = dict.fromkeys(("architecture", "model_args", "input_size", "global_pool", *_PIXELS))
    told = read_keys(flat, where, handled, harmless=_HARMLESS)
    name, given = told["architecture"], told["model_args"] or {}
    if (found := settings(str(name))) is None:
        raise ValueError(
            f"{where}: architecture = {name!r} is not supported: its settings are not known here; "
            "convert its weights file alone if it is a plain ViT"
        )
    is_eva, defaults = found
    parts = _parts(theirs, known)
    handled = dict.fromkeys((*parts, *_SIZES))
    handled |= {key: value for key, value in defaults.items() if key != "norm_eps"}
    args = read_keys(given, f"{where}, model_args", handled, _FIXED_ARGS, _HARMLESS_ARGS)
    _check_sizes(foreign, given, told["input_size"], "pos_embed" in theirs, where)
    shown = {key: args[key] for key in ("pre_norm", "use_pre_transformer_norm") if key in defaults}
    shown |= {key: value for key, value in given.items() if key in parts}
    for key, value in shown.items():
        if _amount(key, value) != parts[key]:
            raise ValueError(
                f"{where}: {key} = {value!r}, but its weights "
                f"{'have' if parts[key] else 'lack'} what it stands for"
            )
    known["norm_eps"] = 1e-6 if "norm_layer" in given else defaults["norm_eps"]
    known["num_heads"] = args["num_heads"]
    _read_activation(foreign, args.get("act_layer"), is_eva, where)
    _read_pooling(foreign, args, told["global_pool"], is_eva, where)
    if args.get("use_rot_pos_emb"):
        _turn(foreign, args, where)
    take_pixels(foreign, {key: told[key] for key in _PIXELS})


def _parts(theirs: dict[str, Tensor], known: dict[str, Any]) -> dict[str, Any]:
    """What the weights show of `model_args`: how many of a part there are, or whether any."""
    block = "blocks.0."
    biases = ("attn.qkv.bias", "attn.q_bias", "attn.q_proj.bias")
    parts = {
        "class_token": known["class_token"],
        "init_values": f"{block}ls1.gamma" in theirs or f"{block}gamma_1" in theirs,
        "qkv_bias": any(block + name in theirs for name in biases),
        "qkv_fused": f"{block}attn.qkv.weight" in theirs,
        "proj_bias": f"{block}attn.proj.bias" in theirs,
        "swiglu_mlp": known.get("activation") == "swiglu",
        "use_abs_pos_emb": "pos_embed" in theirs,
        "norm_layer": "layernorm" if known["norm"] == "layer" else "rmsnorm",
    }
    parts |= dict.fromkeys(("reg_tokens", "num_reg_tokens"), known["num_registers"])
    parts |= dict.fromkeys(("pre_norm", "use_pre_transformer_norm"), known["ln_pre"])
    parts |= dict.fromkeys(("scale_attn_norm", "scale_attn_inner"), known["norm_attended"])
    parts |= dict.fromkeys(("scale_mlp_norm", "scale_mlp"), known["norm_hidden"])
    if "pos_embed" in theirs:
        patches = (known["image_size"] // known["patch_size"]) ** 2
        parts["no_embed_class"] = theirs["pos_embed"].flatten(0, -2).shape[0] == patches
    return parts


def _amount(key: str, value: Any) -> Any:
    """A value of `model_args` in the terms of `_parts`."""
    if key in ("reg_tokens", "num_reg_tokens"):
        return value or 0
    if key == "norm_layer":
        return value or "layernorm"
    return value is not None if key == "init_values" else bool(value)


def _check_sizes(
    foreign: Foreign, given: dict[str, Any], size: Any, has_positions: bool, where: str
) -> None:
    """Raises ValueError where the config's sizes are not those of the weights.

    Without positions in the weights the image's size is the config's.
    """
    known = foreign.known
    channels, *sides = (3,) if size is None else size
    if channels != 3:
        raise ValueError(f"{where}: input_size = {size} must have 3 channels")
    told = {ours: given[theirs] for theirs, ours in _SIZES.items() if theirs in given}
    if not has_positions:
        side = told.get("image_size", sides or None)
        if side is None:
            _ask_size(foreign)
        else:
            known["image_size"] = side[0] if isinstance(side, list) else side
    if known.get("activation") == "swiglu":
        told.pop("mlp_ratio", None)  # of other widths, by the class
    check_weights(told, known, where)
    if sides and (has_positions or "img_size" not in given):
        check_weights({"image_size": sides}, known, where)


def _ask_size(foreign: Foreign) -> None:
    del foreign.known["image_size"]
    foreign.missing["image_size"] = "the weights hold no positions"


def _read_activation(foreign: Foreign, name: str | None, is_eva: bool, where: str) -> None:
    gated = foreign.known.get("activation") == "swiglu"
    if is_eva:
        name = "silu" if gated else "gelu"
    names = ("silu",) if gated else ("gelu", "gelu_tanh", "quick_gelu")
    name = name or "gelu"
    if name not in names:
        raise ValueError(
            f"{where}, model_args: act_layer = {name!r} is not supported: it must be "
            f"{' or '.join(map(repr, names))}"
        )
    foreign.known["activation"] = "swiglu" if gated else name


def _read_pooling(
    foreign: Foreign, args: dict[str, Any], at_top: str | None, is_eva: bool, where: str
) -> None:
    known, pool = foreign.known, args["global_pool"]
    if at_top and pool and at_top != pool:
        raise ValueError(f"{where}: global_pool = {at_top!r}, but its model has {pool!r}")
    if pool not in ("", "token", "avg", "map"):
        raise ValueError(f"{where}: global_pool = {pool!r} is not supported")
    after = args["use_fc_norm" if is_eva else "fc_norm"]
    if after or (after is None and pool == "avg"):
        raise ValueError(
            f"{where}: global_pool = {pool!r} with a norm after it (fc_norm) is not supported"
        )
    if (pool == "map") != (known.get("pooling") == "attention"):
        has = "lack" if pool == "map" else "have"
        raise ValueError(f"{where}: global_pool = {pool!r}, but its weights {has} attn_pool")
    reads_all = is_eva or not (known["class_token"] or known["num_registers"])
    if pool == "map" and not (reads_all or args["pool_include_prefix"]):
        raise ValueError(
            f"{where}: pool_include_prefix = False is not supported: the attention that pools "
            "must read all tokens"
        )
    if pool != "map" and args.get("pool_include_prefix"):
        raise ValueError(f"{where}: pool_include_prefix = True is not supported")
    if pool == "token" and not known["class_token"]:
        raise ValueError(f"{where}: global_pool = 'token', but its weights lack cls_token")
    pool_tokens(foreign, "mean" if pool == "avg" else "class")
    if pool == "map":
        known["pool_heads"] = args.get("attn_pool_num_heads") or args["num_heads"]


def _turn(foreign: Foreign, args: dict[str, Any], where: str) -> None:
    """Rotary positions by the arguments of `Eva`."""
    kind, offset = args["rope_type"], float(args["rope_grid_offset"])
    if kind == "dinov3":
        rotary = dict(span=4 * math.pi, start=-2 * math.pi, offset=0.5 + offset)
    elif kind == "cat" and args["ref_feat_shape"] is not None:
        shape = args["ref_feat_shape"]
        sides = shape if isinstance(shape, list) else [shape]
        if len(set(sides)) != 1:
            raise ValueError(f"{where}: ref_feat_shape = {shape} must be square")
        rotary = dict(span=float(sides[0]), start=0.0, offset=offset)
    else:
        name = "ref_feat_shape" if kind == "cat" else "rope_type"
        raise ValueError(f"{where}: {name} = {args[name]!r} is not supported")
    know_rotary(foreign, base=float(args["rope_temperature"]), **rotary)
    foreign.finish = partial(
        turn_pairs,
        foreign,
        interleaved=not args["rope_rotate_half"],
        columns_first=args["rope_grid_indexing"] == "xy",
    )
