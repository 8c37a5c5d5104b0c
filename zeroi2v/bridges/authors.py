"""The ZeroI2V authors' checkpoints (.pth of MMEngine), of all their backbone classes.

`ViT_Zero_CLIP`, `ViT_Zero_CLIP_ablation`, `ViT_Zero_CLIP_long` (adapters) and `ViT_Zero_CLIP_eval`
(merged). Offsets, heads and adapter scale are in no tensor: they are read from the config text in
the checkpoint, or asked for. Their own merge script forgets some of them without a word; here
every one is either taken over or its absence is an error.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from zeroi2v.bridges.foreign import Foreign
from zeroi2v.bridges.mmconfig import find, parse_config
from zeroi2v.bridges.reader import Source
from zeroi2v.bridges.tensors import BLOCK, describe_clip

ADAPTERS = {
    "T_Adapter_in": "attn.in_adapter",
    "S_Adapter": "attn.out_adapter",
    "MLP_Adapter": "mlp.in_adapter",
    "MLP_Adapter_out": "mlp.out_adapter",
}
_SPLIT = ("T_Adapter_in_q", "T_Adapter_in_k", "T_Adapter_in_v")
_LINEAR = {"D_fc1": "down", "D_fc2": "up"}
_ADAPTER_NAME = re.compile(r"(transformer\.resblocks\.\d+\.)(\w*Adapter\w*)\.(D_fc[12])\.(\w+)")
CLASSES = ("ViT_Zero_CLIP", "ViT_Zero_CLIP_ablation", "ViT_Zero_CLIP_long", "ViT_Zero_CLIP_eval")


def convert(source: Source) -> Foreign | None:
    """The whole model, or None if `source` is not theirs. Raises ValueError if it is unfit."""
    if "backbone.conv1.weight" not in source.tensors:
        return None
    where = str(source.path)
    tensors, adapters = _rename(source)
    used = _uniform(adapters, where)
    foreign = Foreign(format="ZeroI2V, the authors' checkpoint", tensors=tensors, fresh=())
    foreign.known = describe_clip(tensors, where) | {"activation": "quick_gelu", "adapt_from": 0}
    for name, field in (("temporal_embedding", "num_frames"), ("head.weight", "num_classes")):
        if name not in tensors:
            raise ValueError(f"{where} lacks {name}: it is no trained video model")
        foreign.known[field] = len(tensors[name])
    if source.text is None:
        foreign.missing["num_heads"] = "the checkpoint carries no config; width / 64 for CLIP"
        foreign.missing["head_offsets"] = "stdha_cfg of its training config"
        foreign.missing["preprocess.sampling"] = "dense or uniform, as in its training config"
        if used:
            foreign.missing["adapter.scale"] = "adapter_scale of its training config"
    else:
        config = parse_config(source.text, f"config in {where}")
        told = model_fields(config, f"config in {where}")
        for name in told.keys() & foreign.known.keys():
            if told[name] != foreign.known[name]:
                raise ValueError(
                    f"config in {where} says {name} {told[name]}, its weights {foreign.known[name]}"
                )
        foreign.known |= told
        _check_adapters(config, used, f"config in {where}")
    if used:
        ranks = {len(t) for n, t in adapters.items() if n.endswith("D_fc1.weight")}
        if len(ranks) != 1:
            raise ValueError(f"{where}: adapters must have one rank: got {sorted(ranks)}")
        foreign.known["adapter.ratio"] = ranks.pop() / foreign.known["width"]
        _place_adapters(foreign, adapters, used, where)
    elif "adapter.scale" in foreign.known:
        for name in [n for n in foreign.known if n.startswith("adapter.")]:
            del foreign.known[name]
        foreign.missing["adapter"] = (
            "its config trains adapters and it holds none; if they were merged, say adapter=null"
        )
    else:
        foreign.known["adapter"] = None
    return foreign


def _rename(source: Source) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's tensors in CLIP's names, and those of the adapters in the authors'."""
    tensors, adapters = {}, {}
    for name, tensor in source.tensors.items():
        part, _, rest = name.partition(".")
        if part == "backbone" and _ADAPTER_NAME.fullmatch(rest):
            adapters[rest] = tensor
        elif part == "backbone":
            tensors[rest] = tensor
        elif name in ("cls_head.fc_cls.weight", "cls_head.fc_cls.bias"):
            tensors[name.replace("cls_head.fc_cls", "head")] = tensor
        elif part != "data_preprocessor":
            raise ValueError(f"{source.path}: {name} has no place in a ZeroI2V model")
    time = tensors.get("temporal_embedding")
    if time is not None:
        if time.ndim != 3 or len(time) != 1:
            raise ValueError(
                f"{source.path}: temporal_embedding must be [1, T, C]: got {list(time.shape)}"
            )
        tensors["temporal_embedding"] = time[0]
    return tensors, adapters


def _uniform(adapters: dict[str, Tensor], where: str) -> set[str]:
    """The adapters of every block, by the authors' names; all blocks must have the same."""
    blocks: dict[str, set[str]] = {}
    for name in adapters:
        match = _ADAPTER_NAME.fullmatch(name)
        blocks.setdefault(match[1], set()).add(match[2])
    if not blocks:
        return set()
    used = set.union(*blocks.values())
    if any(kinds != used for kinds in blocks.values()):
        raise ValueError(f"{where}: blocks must have the same adapters: it is merged in part")
    if unknown := used - set(ADAPTERS) - set(_SPLIT):
        raise ValueError(f"{where}: adapter {sorted(unknown)[0]} is not known")
    return used


def _check_adapters(config: dict[str, Any], used: set[str], where: str) -> None:
    """Raises ValueError unless the adapters are those that the config builds, or none at all."""
    if find(config, "model.backbone.type", where) == "ViT_Zero_CLIP_eval" or not used:
        expected: set[str] = set()
    else:
        count = find(config, "model.backbone.num_tadapter", where, 1)
        split = find(config, "model.backbone.attn_adapter_type", where, "share") == "qkv"
        expected = {"MLP_Adapter", *(_SPLIT if split else ("T_Adapter_in",))}
        expected |= {"MLP_Adapter_out"} if count == 2 else set()
        expected |= {"S_Adapter"} if count != -1 else set()
    if used != expected:
        raise ValueError(
            f"{where} asks for adapters {sorted(expected)}, the weights have {sorted(used)}"
        )


def _place_adapters(foreign: Foreign, adapters: dict[str, Tensor], used: set[str], where) -> None:
    depth = foreign.known["depth"]
    if {n.split(".")[2] for n in adapters} != {str(i) for i in range(depth)}:
        raise ValueError(f"{where}: adapters must be in all {depth} blocks: it is merged in part")
    for name, tensor in adapters.items():
        block, kind, linear, rest = _ADAPTER_NAME.fullmatch(name).groups()
        if kind in ADAPTERS:
            foreign.tensors[f"{block}{ADAPTERS[kind]}.{_LINEAR[linear]}.{rest}"] = tensor
    absent = {place for kind, place in ADAPTERS.items() if kind not in used}
    foreign.fresh = tuple(f".{place}." for place in sorted(absent))
    if set(_SPLIT) <= used:
        foreign.finish = lambda config: _merge_split(foreign, adapters, config.adapter.scale)
    for place in sorted(absent):
        foreign.notes.append(f"{place}: not in the checkpoint, added as the identity")


def _merge_split(foreign: Foreign, adapters: dict[str, Tensor], scale: float) -> None:
    """Merges one adapter each before queries, keys and values, which VideoViT has no place for."""
    for i in range(foreign.known["depth"]):
        place = BLOCK.format(i)
        weight, bias = f"{place}attn.in_proj_weight", f"{place}attn.in_proj_bias"
        weights, biases = [], []
        for kind, w, b in zip(
            _SPLIT,
            foreign.tensors[weight].double().chunk(3),
            foreign.tensors[bias].double().chunk(3),
            strict=True,
        ):
            part = {
                n: adapters[f"{place}{kind}.{n}"].double()
                for n in ("D_fc1.weight", "D_fc1.bias", "D_fc2.weight", "D_fc2.bias")
            }
            shift = part["D_fc2.weight"] @ part["D_fc1.bias"] + part["D_fc2.bias"]
            weights.append(w + scale * (w @ part["D_fc2.weight"]) @ part["D_fc1.weight"])
            biases.append(b + scale * (w @ shift))
        foreign.tensors[weight], foreign.tensors[bias] = (
            torch.cat(weights).float(),
            torch.cat(biases).float(),
        )
    foreign.notes.append("adapters of queries, keys and values merged into the projection")


def model_fields(config: dict[str, Any], where: str) -> dict[str, Any]:
    """What a training config of theirs says about the model, as fields of `ModelConfig`.

    Raises ValueError for another backbone, and for settings whose model is not a ZeroI2V model.
    """

    def get(name: str, default: Any = ...) -> Any:
        return find(config, f"model.{name}", where, default)

    kind = get("backbone.type")
    if kind not in CLASSES:
        raise ValueError(f"{where}: backbone must be one of {', '.join(CLASSES)}: got {kind}")
    for name, allowed in (
        ("backbone.adapter_type", ("linear", "rep")),
        ("backbone.attn_adapter_type", ("share", "qkv")),
        ("backbone.stdha_cfg.shift_pattern", ("kv",)),
        ("backbone.stdha_cfg.ops_type", ("stdha",)),
        ("backbone.stdha_cfg.divide_head", (False,)),
        ("backbone.final_ta_cfg.use_it", (False,)),
        ("cls_head.type", ("I3DHead",)),
        ("cls_head.spatial_type", ("avg",)),
    ):
        if (value := get(name, None)) is not None and value not in allowed:
            raise ValueError(
                f"{where}: {name} must be {' or '.join(map(repr, allowed))}: got {value!r}"
            )
    heads, width = get("backbone.heads"), get("backbone.width")
    fields = {
        "image_size": get("backbone.input_resolution"),
        "patch_size": get("backbone.patch_size"),
        "num_frames": get("backbone.num_frames"),
        "width": width,
        "depth": get("backbone.layers"),
        "num_heads": heads,
        "num_classes": get("cls_head.num_classes"),
        "head_dropout": get("cls_head.dropout_ratio", 0.5),
        "head_offsets": offsets(kind, get("backbone.stdha_cfg", None), width, heads, where),
    }
    if kind != "ViT_Zero_CLIP_eval":
        scale = get("backbone.adapter_scale", 0.5)
        if isinstance(scale, str):
            raise ValueError(f"{where}: adapter_scale must be a number: got {scale!r}")
        fields["adapter.scale"] = float(scale)
        fields["adapter.dropout"] = float(get("backbone.dropout_rate", 0.1))
        fields["adapter.ratio"] = float(get("backbone.mlp_ratio", 0.25))
    return fields | _preprocessing(config, where)


def offsets(kind: str, stdha: dict | None, width: int, heads: int, where: str) -> tuple[int, ...]:
    """Each head's frame offset, from a class's `stdha_cfg`, which counts channels as width / div.

    The first fold of channels reads the frame before, the second the one after, and so on. Raises
    ValueError if a fold is not made of whole heads, or if a merged model comes without settings.
    """
    if kind == "ViT_Zero_CLIP_eval" and (stdha is None or "shift_div" not in stdha):
        raise ValueError(
            f"{where}: a merged model needs its stdha_cfg with shift_div: without it every head "
            "reads other frames than it was trained to"
        )
    stdha = stdha or {}
    if kind == "ViT_Zero_CLIP_long":
        first, second = stdha.get("shift1_div", 12), stdha.get("shift2_div", -1)
        folds = [(first, -1), (first, 1), (second, -2), (second, 2)]
        for step in (3, 4):
            div = stdha.get(f"shift{step}_div", -1)
            folds += [(div, -step)] + [(div, step)] * bool(stdha.get(f"shift{step}_right", False))
    else:
        stride, div = stdha.get("shift_stride", 1), stdha.get("shift_div", 12)
        long = stdha.get("long_shift_div", -1)
        folds = [(div, -stride), (div, stride), (long, -2)]
        if kind != "ViT_Zero_CLIP" and stdha.get("long_shift_right", False):
            folds.append((long, 2))
    head_dim = width // heads
    out: list[int] = []
    for div, offset in folds:
        if not isinstance(div, int):
            raise ValueError(f"{where}: stdha_cfg must hold whole numbers: got {div!r}")
        if div <= 0:
            continue
        channels = width // div
        if channels % head_dim or not channels:
            raise ValueError(
                f"{where}: stdha_cfg shifts {channels} channels, which are no whole heads of "
                f"{head_dim}"
            )
        out += [offset] * (channels // head_dim)
    if len(out) > heads:
        raise ValueError(f"{where}: stdha_cfg shifts {len(out)} heads: there are {heads}")
    return (*out, *[0] * (heads - len(out)))


def _preprocessing(config: dict[str, Any], where: str) -> dict[str, Any]:
    """Sampling, views and pixel scale, as far as the config says."""
    fields: dict[str, Any] = {}
    for name in ("mean", "std"):
        if (value := find(config, f"model.data_preprocessor.{name}", where, None)) is not None:
            fields[f"preprocess.{name}"] = list(value)
    steps = {}
    pipeline = find(config, "test_pipeline", where, None)
    for step in pipeline if isinstance(pipeline, list) else []:
        if isinstance(step, dict) and isinstance(step.get("type"), str):
            steps[step["type"]] = step
    if "SampleFrames" in steps:
        fields["preprocess.sampling"] = "dense"
        fields["preprocess.interval"] = steps["SampleFrames"].get("frame_interval", 1)
    elif "UniformSample" in steps:
        fields["preprocess.sampling"] = "uniform"
        fields["preprocess.interval"] = 1
    else:
        return fields
    clips = (steps.get("SampleFrames") or steps["UniformSample"]).get("num_clips", 1)
    fields["preprocess.test_views"] = [clips, 3 if "ThreeCrop" in steps else 1]
    resize = steps.get("Resize", {})
    if "interpolation" in resize:
        fields["preprocess.interpolation"] = resize["interpolation"]
    scale = resize.get("scale")
    if isinstance(scale, tuple | list) and len(scale) == 2 and scale[0] == -1:
        fields["preprocess.test_short_side"] = scale[1]
    return fields
