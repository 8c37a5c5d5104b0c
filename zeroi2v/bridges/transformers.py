"""Hugging Face transformers: `CLIPModel`, `CLIPVisionModel`, with or without projection.

Queries, keys and values are three layers there and one here. `config.json` beside the weights
gives heads and activation; a bare file does not.
"""

from __future__ import annotations

import re
from typing import Any

import torch

from zeroi2v.bridges.foreign import (
    BLOCK,
    Foreign,
    assume_heads,
    check_weights,
    describe,
    fold_norm_epsilon,
    read_keys,
    take_pixels,
)
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


# `vision_config`; values that transformers leaves out of the file are those of ViT-B/32.
_SIZES = {
    "hidden_size": ("width", 768),
    "num_hidden_layers": ("depth", 12),
    "patch_size": ("patch_size", 32),
    "image_size": ("image_size", 224),
}
_HANDLED = {key: default for key, (_, default) in _SIZES.items()}
_HANDLED |= {"intermediate_size": 3072, "num_attention_heads": 12}
_HANDLED |= {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_FIXED: dict[str, tuple] = {
    "num_channels": (3,),
    "model_type": ("clip", "clip_vision_model"),
    "pruned_heads": ({}, None),
}
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
use_return_dict""".split()

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
    where, known = str(source.path.parent / "config.json"), foreign.known
    if "vision_config" in config:
        sections = {"vision_config": {}, "vision_config_dict": None}
        told = read_keys(config, where, sections, _FIXED, _HARMLESS)
        config, legacy = told["vision_config"], told["vision_config_dict"]
        where += ", vision_config"
    else:
        legacy = None
    vision = read_keys(config, where, _HANDLED, _FIXED, _HARMLESS)
    if legacy and read_keys(legacy, f"{where}_dict", _HANDLED, _FIXED, _HARMLESS) != vision:
        raise ValueError(f"{where}_dict = {legacy} must say the same as vision_config")
    known_sizes = {ours: vision[theirs] for theirs, (ours, _) in _SIZES.items()}
    ratio = vision["intermediate_size"] / vision["hidden_size"]
    check_weights(known_sizes, known, where)
    if ratio != known["mlp_ratio"]:
        raise ValueError(
            f"{where}: intermediate_size = {vision['intermediate_size']}, its weights have "
            f"{round(known['mlp_ratio'] * known['width'])}"
        )
    activation = vision["hidden_act"]
    if activation not in ("quick_gelu", "gelu"):
        raise ValueError(f"{where}: hidden_act must be quick_gelu or gelu: got {activation}")
    fold_norm_epsilon(foreign.tensors, known["depth"], vision["layer_norm_eps"])
    known["activation"], known["num_heads"] = activation, vision["num_attention_heads"]
    pixels = source.configs.get("preprocessor_config.json")
    if pixels is None:
        pixels = source.configs.get("processor_config.json", {}).get("image_processor", {})
    where = f"{source.path.parent}, preprocessing"
    pixels = read_keys(pixels, where, _PIXELS, _FIXED_PIXELS, _HARMLESS_PIXELS)
    pixels["mean"], pixels["std"] = pixels.pop("image_mean"), pixels.pop("image_std")
    take_pixels(foreign, pixels)
