"""Foreign models by way of their bridges: as a `VideoViT`, or as the backbone of one."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zeroi2v.bridges import authors, open_clip, openai, timm, transformers
from zeroi2v.bridges.foreign import Foreign
from zeroi2v.bridges.reader import Source, read_source
from zeroi2v.bridges.tensors import resize_positions
from zeroi2v.config import ModelConfig, flat, recipe
from zeroi2v.model.vit import VideoViT
from zeroi2v.storage.checkpoint import CONFIG, WEIGHTS, check_state, is_native, load

_BRIDGES = (authors, openai, open_clip, transformers, timm)

# What a recipe and a file must agree on; all else may come from either, the file first.
_ARCHITECTURE = ("width", "depth", "num_heads", "patch_size", "image_size", "mlp_ratio")
_SETTLED = (*_ARCHITECTURE, "num_frames", "num_classes", "head_offsets", "activation")
_SETTLED += ("adapter.scale", "adapter.ratio")

# What is asked for even with a recipe: it is CLIP's there, and the file is of another family.
_ASKED = ("activation", "norm_eps", "pooling", "pool_heads", "adapter")

# Fields that a backbone need not have as the model does, or that its weights' shapes show; all
# others say what it computes.
_OWN = {"image_size", "num_frames", "num_classes", "head_offsets", "adapter", "mlp_ratio"}
_OWN |= {"adapt_from", "head_dropout", "preprocess", "labels", "pool_mlp_ratio"}

# What anyone may choose, whatever the file says: none of it changes what the weights compute.
_FREE = ("preprocess.", "labels", "head_dropout", "adapter.dropout")


def load_foreign(path: str | Path, recipe: str | None = None, **overrides: Any) -> VideoViT:
    """A foreign model as a `VideoViT` in float32, on the CPU, in eval mode.

    An image model without `recipe` becomes the same model on each frame: zero offsets, no
    adapters, one frame, and a new head of zeros. Positional embeddings are resized (bicubic) if
    `image_size` is given and differs.

    Args:
        path: file or folder; its content shows the format, and nothing in it is executed.
        recipe: published recipe to take from what the file does not say.
        overrides: fields of `ModelConfig`; nested ones as mappings or with dots in the name. One
            that contradicts the file is an error, except `image_size`, preprocessing, labels
            and dropouts.

    Raises:
        OSError: no such file.
        ValueError: damaged, of no known format, not finite, contradictory, or silent on something
            that changes the result (heads, activation, offsets, scale), which the message names.
    """
    return convert(read_source(path), recipe, overrides)[0]


def load_image(path: str | Path, config: ModelConfig) -> tuple[VideoViT, list[str]]:
    """A foreign image model, and what was done to it; `config` settles what the file leaves open.

    Raises as `load_foreign`.
    """
    source = read_source(path)
    foreign, model = _recognise(source), flat(config.to_dict())
    names = {*foreign.missing, *foreign.assumed, *foreign.free}
    names = {name for name in names if name.partition(".")[0] not in _OWN}
    if "image_size" in foreign.missing:
        names.add("image_size")
    image = _convert(foreign, str(source.path), None, {name: model[name] for name in names})
    return image, [f"format {foreign.format}", *foreign.notes]


def load_backbone(model: VideoViT, path: str | Path) -> list[str]:
    """Fills the image backbone of `model` from any weights we can read; the rest keeps its values.

    From a trained model that is not merged, adapters and `temporal_embedding` are taken over as
    well, and the classifier if it has the same classes: training goes on from there.

    Args:
        model: any `VideoViT`. Its config settles what a bare file of weights does not say, such
            as heads and activation.
        path: a native folder, or a file or folder of a foreign format, as for `load_foreign`.
            Positional embeddings are resized to the model's resolution.
    Returns:
        What was read and what was done to it, one line each.
    Raises:
        OSError: no such file.
        ValueError: unreadable, not finite, or other than the model's config says.
    """
    path, ours = Path(path), model.config
    if path.name == WEIGHTS:
        path = path.parent
    folders = [path, path / "best", path / "last"]  # of a model, of a run
    if (folder := next(filter(is_native, folders), None)) is not None:
        image, notes = load(folder, widen=False), []
        if (held := image.quantization) is not None:
            rule = f"must have wide weights to be trained: its blocks have {held.title}"
            raise ValueError(f"backbone {path} {rule}")
    else:
        image, notes = load_image(path, ours)
    is_trained, kept = image.config.adapter is not None, ("temporal_embedding", "head.")
    theirs, mine = _image_fields(image.config), _image_fields(ours)
    if is_trained:
        for name in ("num_frames", "head_offsets", "adapter", "adapt_from"):
            theirs[name], mine[name] = getattr(image.config, name), getattr(ours, name)
        if ours.adapter is not None:
            theirs["adapter"] = replace(theirs["adapter"], dropout=ours.adapter.dropout)
        same = "num_classes", "labels"
        same = all(getattr(image.config, name) == getattr(ours, name) for name in same)
        kept = () if same else ("head.",)
        notes.append(
            "a trained model: its adapters, its temporal embedding and "
            + ("its classifier go on" if same else "not its classifier, of other classes, go on")
        )
    for name in mine:
        if theirs[name] != mine[name]:
            hint = "; merge it first, to train new adapters on it" if is_trained else ""
            raise ValueError(
                f"backbone {path} has {name} {theirs[name]!r}, the model {mine[name]!r}{hint}"
            )
    state = {n: t for n, t in image.state_dict().items() if not n.startswith(kept)}
    if image.config.image_size != ours.image_size:
        name = "positional_embedding"
        state[name] = resize_positions(state[name], ours.grid, ours.num_prefix)
        notes.append(f"positional embedding resized from {image.config.image_size} pixels")
    own = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(kept) and (is_trained or "_adapter." not in name)
    }
    check_state(state, own, f"backbone {path}")
    model.load_state_dict(state, strict=False)
    return notes


def _image_fields(config: ModelConfig) -> dict[str, Any]:
    """What an image backbone computes: two configs that agree in it can share weights."""
    told = {"num_heads": config.num_heads}
    told |= {f.name: getattr(config, f.name) for f in fields(config) if f.name not in _OWN}
    if config.pooling != "attention":
        del told["pool_heads"]
    return told


def convert(
    source: Source, recipe_name: str | None, overrides: dict[str, Any]
) -> tuple[VideoViT, Foreign]:
    """`load_foreign` of what was read, with what the file told. Raises as that."""
    foreign = _recognise(source)
    return _convert(foreign, str(source.path), recipe_name, flat(overrides)), foreign


def _recognise(source: Source) -> Foreign:
    if source.configs.get(CONFIG, {}).get("format") == "zeroi2v":
        raise ValueError(f"{source.path.parent} is a native model: there is nothing to convert")
    readings = ((bridge, bridge.convert(source)) for bridge in _BRIDGES)
    bridge, foreign = next((found for found in readings if found[1]), (None, None))
    if foreign is None:
        raise ValueError(
            f"{source.path} is of no known format: none of OpenAI CLIP, open_clip, transformers, "
            f"timm ViT, ZeroI2V; it contains {', '.join(list(source.tensors)[:3])}"
        )
    if source.adapter is not None and bridge not in (transformers, timm):
        raise ValueError(
            f"{source.path.parent} holds a LoRA adapter for {foreign.format}: only for "
            "models of transformers and timm is it known where that belongs"
        )
    for name, tensor in foreign.tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source.path}: {name} must be finite: it contains inf or nan")
    return foreign


def _convert(
    foreign: Foreign, where: str, recipe_name: str | None, overrides: dict[str, Any]
) -> VideoViT:
    config = _settle(foreign, where, recipe_name, overrides)
    if foreign.finish is not None:
        foreign.finish(config)
    state = {name: tensor.float() for name, tensor in foreign.tensors.items()}
    old, name = state["positional_embedding"], "positional_embedding"
    state[name] = resize_positions(old, config.grid, config.num_prefix)
    if len(state[name]) != len(old) > config.num_prefix + 1:
        foreign.notes.append(
            f"positional embedding resized from {foreign.known['image_size']} "
            f"to {config.image_size} pixels"
        )
    return _build(config, state, foreign, where)


def _settle(
    foreign: Foreign, where: str, recipe_name: str | None, overrides: dict[str, Any]
) -> ModelConfig:
    """The whole config, from the file, the overrides and the recipe; asks for what none says."""
    told = foreign.assumed | foreign.known
    if recipe_name is None:  # a recipe has its own way of resizing
        told |= foreign.resizing
    base = None if recipe_name is None else flat(recipe(recipe_name).model.to_dict())
    for key, value in overrides.items():
        bound = key in foreign.known and key not in foreign.free and not key.startswith(_FREE)
        if bound and _plain(foreign.known[key]) != _plain(value):
            raise ValueError(f"{key} must be {foreign.known[key]}, as in {where}: got {value}")
        if key in foreign.missing or key in foreign.assumed:
            usual = foreign.assumed.get(key, value)
            against = "" if usual == value else f", against the convention of {usual}"
            foreign.notes.append(f"{key} {value} as given, which the file does not tell{against}")
        elif key in foreign.free and key != "image_size" and value != foreign.known[key]:
            foreign.notes.append(f"{key} {value} as given, where the file has {foreign.known[key]}")
    if "num_heads" in foreign.assumed and "num_heads" not in overrides:
        channels = foreign.known["width"] // foreign.assumed["num_heads"]
        foreign.notes.append(f"heads by the convention of {channels} channels each")
    for key in _SETTLED if base is not None else ():
        both = key in told and key in base and key not in overrides
        if both and _plain(base[key]) != _plain(told[key]):
            raise ValueError(
                f"recipe {recipe_name} has {key} {base[key]}, {where} has {told[key]}: "
                f"say {key}=… if that is meant"
            )
    asked = {
        key: hint
        for key, hint in foreign.missing.items()
        if key not in overrides and (base is None or key in _ASKED)
    }
    if asked:
        wants = "; ".join(f"{key}=… ({hint})" for key, hint in asked.items())
        raise ValueError(f"{where} ({foreign.format}) does not say all: give {wants}")
    if base is None:
        base = flat(ModelConfig(num_frames=1, num_classes=1, adapter=None).to_dict())
        base["head_offsets"] = (0,) * int((told | overrides)["num_heads"])
    size = base["image_size"]
    if (told | overrides).get("image_size", size) != size:
        base |= {"preprocess.val_short_side": None, "preprocess.test_short_side": None}
    for key, value in (told | overrides).items():  # a section replaces its absence, and none it
        base = {k: v for k, v in base.items() if not k.startswith(f"{key}.")}
        base.pop(key.rpartition(".")[0], None)
        base[key] = value
    return ModelConfig.from_dict(_nested(base))


def _build(config: ModelConfig, state: dict[str, Tensor], foreign: Foreign, where: str) -> VideoViT:
    with torch.device("meta"):
        model = VideoViT(config)
    model.to_empty(device="cpu")
    expected = dict(model.state_dict())
    fresh = [n for n in expected if n not in state and any(part in n for part in foreign.fresh)]
    check_state(state, {n: t for n, t in expected.items() if n not in fresh}, where)
    model.load_state_dict(state, strict=False)
    generator, bound = torch.Generator().manual_seed(0), config.width**-0.5
    for name in fresh:  # adapters as `nn.Linear` and `LinearAdapter` begin, all else zeros
        if ".down." in name:
            torch.nn.init.uniform_(expected[name], -bound, bound, generator=generator)
        else:
            torch.nn.init.zeros_(expected[name])
    return model.eval()


def _nested(values: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *above, last = key.split(".")
        place = nested
        for part in above:
            place = place.setdefault(part, {})
        place[last] = value
    return nested


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return round(value, 9) if isinstance(value, float) else value
