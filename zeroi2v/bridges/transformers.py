"""Hugging Face transformers: CLIP, MetaCLIP 2, SigLIP (2), ViT, DINOv2, DINOv3 and AIMv2.

Each model with or without a head. Queries, keys and values are three layers there and one here.
`config.json` beside the weights is read whole. A bare file shows which family it is of; what that
does not settle is asked for.
"""

from __future__ import annotations

import math
import re
from typing import Any

import torch
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
from zeroi2v.bridges.tensors import BLOCK, assemble
from zeroi2v.bridges.transformers_families import FAMILIES, Family

_PREFIXES = ("vision_model.", "", "vit.", "dinov2.", "dinov2_with_registers.", "dinov3_vit.")
_PATCH = [
    f"embeddings.{name}.weight"
    for name in (
        "patch_embedding",
        "patch_embeddings.projection",
        "patch_embeddings",
        "patch_embed",
    )
]
_POSITIONS = ("embeddings.position_embedding.weight", "embeddings.position_embeddings")
_TOKENS = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.cls_token": "class_embedding",
    "embeddings.register_tokens": "register_tokens",
    "head.probe": "pool.latent",
    "head.cls_token": "pool.latent",
    "head.attention.in_proj_weight": "pool.in_proj_weight",
    "head.attention.in_proj_bias": "pool.in_proj_bias",
}
_STEM = {
    "embeddings.patch_embedding": "conv1",
    "embeddings.patch_embeddings.projection": "conv1",
    "embeddings.patch_embeddings": "conv1",
    "embeddings.patch_embed": "conv1",
    "embeddings.rms_norm": "ln_patch",
    "pre_layrnorm": "ln_pre",
    **dict.fromkeys(("post_layernorm", "layernorm", "norm", "rms_norm"), "ln_post"),
    "head.k_proj": "pool.k",
    "head.v_proj": "pool.v",
    "head.attention.out_proj": "pool.out_proj",
    "head.output_proj": "pool.out_proj",
    "head.layernorm": "pool.ln",
    "head.mlp.fc1": "pool.mlp.c_fc",
    "head.mlp.fc2": "pool.mlp.c_proj",
}
# The parts of a block: there are several names for each, and older files have others than new ones.
_PARTS = {
    **dict.fromkeys(("layer_norm1", "norm1", "layernorm_before", "rms_norm1"), "ln_1"),
    **dict.fromkeys(("layer_norm2", "norm2", "layernorm_after", "rms_norm2"), "ln_2"),
    **{f"{a}.{x}_proj": f"attn.{x}" for a in ("attention", "self_attn") for x in "qkv"},
    **{f"attention.attention.{x}": f"attn.{x[0]}" for x in ("query", "key", "value")},
    **dict.fromkeys(
        ("attention.output.dense", "attention.o_proj", "attention.out_proj", "self_attn.out_proj"),
        "attn.out_proj",
    ),
    **dict.fromkeys(("intermediate.dense", "mlp.fc1", "mlp.weights_in"), "mlp.c_fc"),
    **dict.fromkeys(("mlp.gate_proj", "ffn.gate_proj"), "mlp.gate"),
    **dict.fromkeys(("mlp.up_proj", "ffn.up_proj"), "mlp.value"),
    **dict.fromkeys(
        ("output.dense", "mlp.fc2", "mlp.weights_out", "mlp.down_proj", "ffn.down_proj"),
        "mlp.c_proj",
    ),
}
_SCALES = {"layer_scale1.lambda1": "ls_1", "layer_scale2.lambda1": "ls_2"}
_BLOCK_NAME = re.compile(
    r"(?:encoder\.layers|encoder\.layer|model\.layer|layers|layer)\.(\d+)\.(.+)"
)
_LEFT_OUT = r"pooler\..*|classifier\..*|embeddings\.(mask_token|position_ids)|visual_projection\..*"

# Settings that say which layers of a block have biases.
_BIASES = {
    "qkv_bias": ("attn.q", "attn.k", "attn.v"),
    "query_bias": ("attn.q",),
    "key_bias": ("attn.k",),
    "value_bias": ("attn.v",),
    "proj_bias": ("attn.out_proj",),
    "mlp_bias": ("mlp.c_fc",),
}
_BIASED = ("attn.q", "attn.k", "attn.v", "attn.out_proj", "mlp.c_fc", "mlp.gate")
_ACTIVATIONS = {"quick_gelu": "quick_gelu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
_SIZES = {
    "hidden_size": "width",
    "num_hidden_layers": "depth",
    "patch_size": "patch_size",
    "image_size": "image_size",
}
_FIXED: dict[str, tuple] = {"num_channels": (3,), "pruned_heads": ({}, None)}
# Of the text tower, the loss, training, or of every config: how to load, to return, to generate.
_HARMLESS = """attention_dropout dropout initializer_range initializer_factor projection_dim
text_config text_config_dict logit_scale_init_value architectures auto_map dtype torch_dtype
transformers_version attn_implementation _attn_implementation _attn_implementation_autoset
_name_or_path _commit_hash _diffusers_version add_cross_attention bad_words_ids
begin_suppress_tokens bos_token_id chunk_size_feed_forward cross_attention_hidden_size
decoder_start_token_id diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length
min_length no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
tie_word_embeddings tokenizer_class top_k top_p torchscript typical_p use_bfloat16
use_return_dict attention_probs_dropout_prob hidden_dropout_prob drop_path_rate
layerscale_value use_mask_token encoder_stride pooler_act pooler_output_size pos_embed_shift
pos_embed_jitter pos_embed_rescale apply_layernorm reshape_hidden_states out_features out_indices
stage_names max_logit_scale text_model_type vision_model_type""".split()


# preprocessor_config.json
_PIXELS = dict.fromkeys(
    """image_mean image_std size crop_size resample do_resize do_center_crop
    default_to_square""".split()
)
_FIXED_PIXELS: dict[str, tuple] = {
    "do_normalize": (True, None),
    "do_rescale": (True, None),
    "rescale_factor": (1 / 255, None),
    "do_pad": (False, None),
}
_HARMLESS_PIXELS = """image_processor_type feature_extractor_type processor_class do_convert_rgb
_valid_processor_keys data_format input_data_format return_tensors device disable_grouping
image_seq_length pad_size""".split()
_RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers


def convert(source: Source) -> Foreign | None:
    """The vision model, or None if `source` is not of this layout. Raises ValueError if unfit."""
    where = str(source.path)
    prefix = next(
        (p for p in _PREFIXES if any(p + stem in source.tensors for stem in _PATCH)), None
    )
    if prefix is None:
        return None
    theirs = {
        name.removeprefix(prefix): tensor
        for name, tensor in source.tensors.items()
        if name.startswith(prefix)
    }
    marked = (f for f in FAMILIES if any(re.fullmatch(f.mark, name) for name in theirs))
    if (family := next(marked, None)) is None:
        return None
    tensors = {}
    for name, tensor in theirs.items():
        if (ours := rename(name)) is not None:
            tensors[ours] = tensor
        elif not re.fullmatch(_LEFT_OUT, name) and name not in _POSITIONS:
            raise ValueError(f"{where}: {name} has no place in a {family.name} vision model")
    notes = melt(source, tensors, _rename_whole)
    _arrange(tensors)
    biased = {part for part in _BIASED if f"{BLOCK.format(0)}{part}.bias" in tensors}
    learned = next((theirs[name] for name in _POSITIONS if name in theirs), None)
    if learned is not None:
        learned = learned.flatten(0, -2)
    norm = "rms" if family.name == "AIMv2" else "layer"
    has_rows = int("class_embedding" in tensors and learned is not None)
    foreign = assemble(
        f"transformers {family.name}", tensors, where, learned, has_rows, norm, family.all_biases
    )
    foreign.notes += notes
    pool_tokens(foreign, "class")
    if any(re.fullmatch(r"pooler\..*", name) for name in theirs):
        foreign.notes.append("its pooler (a layer and tanh) is left out")
    if any(name.startswith("classifier.") for name in source.tensors):
        foreign.notes.append("its image head is left out")
    config = source.configs.get("config.json")
    if config is not None:
        _read_config(foreign, family, biased, config, source)
    else:
        foreign.missing |= family.asks
        for name in family.asks:
            foreign.known.pop(name, None)
        foreign.known = family.bare | foreign.known
        assume_heads(foreign, family.head_dim)
        _turn(foreign, family, family.handled)
    return foreign


def rename(name: str) -> str | None:
    """A tensor's name in ours, or that of the part it is put together to; None if it has none."""
    if name in _TOKENS:
        return _TOKENS[name]
    block, parts = "", _STEM
    if match := _BLOCK_NAME.fullmatch(name):
        block, name, parts = BLOCK.format(match[1]), match[2], _PARTS
    if block and name in _SCALES:
        return block + _SCALES[name]
    part, _, kind = name.rpartition(".")
    return f"{block}{parts[part]}.{kind}" if part in parts and kind in ("weight", "bias") else None


def _rename_whole(name: str) -> str | None:
    """`rename` for a name with what the whole model puts before those of the vision model."""
    prefix = next((p for p in _PREFIXES if p and name.startswith(p)), "")
    return rename(name.removeprefix(prefix))


def _arrange(tensors: dict[str, Tensor]) -> None:
    """What is left to do after renaming, for `assemble`."""
    for name in ("class_embedding", "register_tokens"):
        if name in tensors:
            width = tensors[name].shape[-1]
            tensors[name] = tensors[name].reshape(-1, width)
    if "class_embedding" in tensors:
        tensors["class_embedding"] = tensors["class_embedding"][0]
    if not len(tensors.get("register_tokens", (0,))):
        del tensors["register_tokens"]
    if f"{BLOCK.format(0)}mlp.gate.weight" not in tensors:  # DINOv3 calls it so without a gate
        for name in [name for name in tensors if ".mlp.value." in name]:
            tensors[name.replace(".mlp.value.", ".mlp.c_fc.")] = tensors.pop(name)
    for kind in ("weight", "bias"):
        if (packed := tensors.pop(f"pool.in_proj_{kind}", None)) is not None:
            size = len(packed) // 3
            tensors[f"pool.q.{kind}"], tensors[f"pool.key_value.{kind}"] = packed.split(
                (size, 2 * size)
            )
        parts = [tensors.pop(f"pool.{part}.{kind}", None) for part in "kv"]
        if parts[0] is not None and parts[1] is not None:
            tensors[f"pool.key_value.{kind}"] = torch.cat(parts)
    if "pool.latent" in tensors and "pool.ln.weight" not in tensors:
        # AIMv2's pooling ends with its projection: an MLP of one channel that adds zero.
        width = tensors["pool.latent"].numel()
        tensors["pool.ln.weight"] = torch.ones(width)
        tensors["pool.mlp.c_fc.weight"] = torch.zeros(2, width)
        tensors["pool.mlp.c_proj.weight"] = torch.zeros(width, 1)


def _turn(foreign: Foreign, family: Family, told: dict[str, Any]) -> None:
    if "rope_theta" in family.handled:
        place = dict(span=4 * math.pi, start=-2 * math.pi, offset=0.5)
        know_rotary(foreign, base=float(told["rope_theta"]), **place)


def _read_config(
    foreign: Foreign, family: Family, biased: set[str], config: dict[str, Any], source: Source
) -> None:
    where, known = str(source.path.parent / "config.json"), foreign.known
    fixed = _FIXED | {"model_type": family.kinds} | family.fixed
    legacy = None
    if "vision_config" in config:
        sections = {"vision_config": {}, "vision_config_dict": None}
        told = read_keys(config, where, sections, fixed, _HARMLESS)
        config, legacy = told["vision_config"], told["vision_config_dict"]
        where += ", vision_config"
    vision = read_keys(config, where, family.handled, fixed, _HARMLESS)
    if legacy and read_keys(legacy, f"{where}_dict", family.handled, fixed, _HARMLESS) != vision:
        raise ValueError(f"{where}_dict = {legacy} must say the same as vision_config")
    sizes = {ours: vision[theirs] for theirs, ours in _SIZES.items()}
    if known["rotary"] is None and "rope_theta" in vision:  # no positions in the weights
        size = sizes["image_size"]
        known["image_size"] = size[0] if isinstance(size, list) else size
    check_weights(sizes, known, where)
    _check_parts(known, vision, biased, where)
    _check_hidden(known, vision, where)
    known["activation"] = _activation(known, vision, where)
    known["norm_eps"] = vision["rms_norm_eps" if known["norm"] == "rms" else "layer_norm_eps"]
    known["num_heads"] = vision["num_attention_heads"]
    if known["pooling"] == "attention":
        known["pool_heads"] = known["num_heads"]
    _turn(foreign, family, vision)
    pixels = source.configs.get("preprocessor_config.json")
    if pixels is None:
        pixels = source.configs.get("processor_config.json", {}).get("image_processor", {})
    where = f"{source.path.parent}, preprocessing"
    pixels = read_keys(pixels, where, _PIXELS, _FIXED_PIXELS, _HARMLESS_PIXELS)
    pixels["mean"], pixels["std"] = pixels.pop("image_mean"), pixels.pop("image_std")
    if pixels["resample"] in _RESAMPLING:
        pixels["interpolation"] = _RESAMPLING[pixels.pop("resample")]
    take_pixels(foreign, pixels)


def _check_hidden(known: dict[str, Any], vision: dict[str, Any], where: str) -> None:
    """Raises ValueError unless the MLP is as wide as the config says."""
    hidden, key = round(known["mlp_ratio"] * known["width"]), "intermediate_size"
    if "mlp_ratio" in vision:  # DINOv2, whose SwiGLU has two thirds of it, in steps of 8
        key, told = "mlp_ratio", int(vision["hidden_size"] * vision["mlp_ratio"])
        told = (int(told * 2 / 3) + 7) // 8 * 8 if vision["use_swiglu_ffn"] else told
    else:
        told = vision[key]
    if told != hidden:
        raise ValueError(f"{where}: {key} = {vision[key]}, its weights have {hidden}")


def _check_parts(
    known: dict[str, Any], vision: dict[str, Any], biased: set[str], where: str
) -> None:
    """Raises ValueError unless the weights have just the parts that the config says."""
    has = {}
    for key, parts in _BIASES.items():
        some = [part in biased for part in parts]
        has[key] = some[0] if len(set(some)) == 1 else "some"
    has |= dict.fromkeys(("use_gated_mlp", "use_swiglu_ffn"), known.get("activation") == "swiglu")
    has |= dict.fromkeys(("vision_use_head", "use_head"), known["pooling"] == "attention")
    has["num_register_tokens"] = known["num_registers"]
    if known.get("activation") == "swiglu":
        has["mlp_bias"] = "mlp.gate" in biased
    for key in has.keys() & vision.keys():
        if vision[key] != has[key]:
            raise ValueError(f"{where}: {key} = {vision[key]}, but its weights say {has[key]}")


def _activation(known: dict[str, Any], vision: dict[str, Any], where: str) -> str:
    name = vision["hidden_act"]
    gated = known.get("activation") == "swiglu"
    if gated and "use_swiglu_ffn" in vision:  # DINOv2's is SwiGLU whatever it says
        return "swiglu"
    known_names = {"silu": "swiglu"} if gated else _ACTIVATIONS
    if name not in known_names:
        raise ValueError(f"{where}: hidden_act must be {' or '.join(known_names)}: got {name}")
    return known_names[name]
