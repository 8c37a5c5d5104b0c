"""LoRA adapters of peft beside an image model: melted into its weights before all else.

    W' = W + scale * B A,   scale = alpha / r, or alpha / sqrt(r) with rsLoRA

`adapter_config.json` is read whole. What the adapter trained beside its low-rank matrices (biases,
whole modules) replaces what the model had.

Source: LoRA (arXiv 2106.09685), as peft writes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

from zeroi2v.bridges.foreign import read_keys
from zeroi2v.bridges.reader import ADAPTER_CONFIG, Source

_HANDLED = {"r": 8, "lora_alpha": 8, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
_FIXED = {
    "peft_type": ("LORA",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    # Others change the model's own weights when training begins.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
    "loftq_config": ({}, None),
}
_FIXED |= dict.fromkeys(
    """alora_invocation_tokens arrow_config kasa_config layer_replication lora_ga_config
    megatron_config monteclora_config target_parameters trainable_token_indices use_bdlora
    velora_config corda_config""".split(),
    (None,),
)
# Which modules it has, which its tensors show; training; and book-keeping.
_HARMLESS = """target_modules exclude_modules modules_to_save layers_to_transform layers_pattern
lora_dropout bias inference_mode task_type auto_mapping base_model_name_or_path revision
peft_version eva_config qalora_group_size megatron_core ensure_weight_tying""".split()
_ELSEWHERE = r"(classifier|head|pooler|text_model|text_projection|logit_scale|logit_bias)\b"
_LOW_RANK = re.compile(r"(.+)\.lora_([AB])\.weight")


def melt(
    source: Source, tensors: dict[str, Tensor], rename: Callable[[str], str | None]
) -> list[str]:
    """Melts the adapter of `source` into `tensors`, if it has one, in float64.

    Args:
        source: with the adapter's tensors and config.
        tensors: of the image model, renamed by its bridge; weights are replaced.
        rename: the bridge's name for a tensor, or None.

    Returns what was done, a line each. Raises ValueError for an adapter of another kind or shape.
    """
    if source.adapter is None:
        return []
    where = str(source.path.parent / ADAPTER_CONFIG)
    told = read_keys(source.configs.get(ADAPTER_CONFIG, {}), where, _HANDLED, _FIXED, _HARMLESS)
    pairs: dict[str, dict[str, Tensor]] = {}
    replaced, left_out = 0, False
    for name, tensor in source.adapter.items():
        name = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if re.match(_ELSEWHERE, name):
            left_out = True
        elif re.search(r"\.(original_module|modules_to_save)\.", name):
            continue  # there is another copy of it
        elif match := _LOW_RANK.fullmatch(name):
            pairs.setdefault(match[1], {})[match[2]] = tensor
        elif (ours := rename(name)) is not None and ours in tensors and "lora_" not in name:
            if tensors[ours].numel() != tensor.numel():
                raise ValueError(
                    f"{where}: {name} must be {list(tensors[ours].shape)}: got {list(tensor.shape)}"
                )
            tensors[ours] = tensor.reshape(tensors[ours].shape)
            replaced += 1
        else:
            raise ValueError(f"{where}: {name} has no place in the model beside it")
    for module, pair in pairs.items():
        _add(module, pair, tensors, rename, told, where)
    notes = [f"a LoRA adapter is melted into {len(pairs)} layers"]
    if replaced:
        notes.append(f"{replaced} tensors that were trained with it replace the model's own")
    if left_out:
        notes.append("what it has for the image head or for text is left out")
    return notes


def _add(
    module: str,
    pair: dict[str, Tensor],
    tensors: dict[str, Tensor],
    rename: Callable[[str], str | None],
    told: dict[str, Any],
    where: str,
) -> None:
    ours = rename(f"{module}.weight")
    if ours is None or ours not in tensors:
        raise ValueError(f"{where}: {module} is no layer of the model beside it")
    if set(pair) != {"A", "B"}:
        raise ValueError(f"{where}: {module} lacks lora_{({'A', 'B'} - set(pair)).pop()}.weight")
    down, up, weight = pair["A"].double(), pair["B"].double(), tensors[ours].double()
    rank = _matched(told["rank_pattern"], module, told["r"])
    if down.ndim != 2 or len(down) != rank or up.shape != (len(weight), rank):
        raise ValueError(
            f"{where}: {module} must be of rank {rank} beside {list(weight.shape)}: got "
            f"{list(down.shape)} and {list(up.shape)}"
        )
    if weight.shape != (len(up), down.shape[1]):
        raise ValueError(
            f"{where}: {module} must be beside a matrix {[len(up), down.shape[1]]}: got "
            f"{list(weight.shape)}"
        )
    alpha = _matched(told["alpha_pattern"], module, told["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if told["use_rslora"] else rank)
    tensors[ours] = (weight + scale * up @ down).float()


def _matched(patterns: dict[str, Any], module: str, usual: float) -> float:
    """The value of the first pattern that a module's name ends with, as in peft."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), usual)
