"""Turn foreign models into a native folder, and MMAction2 configs into ours.

    python -m zeroi2v.convert SOURCE --out FOLDER [--recipe NAME] [key=value …]
    python -m zeroi2v.convert CONFIG.py --out CONFIG.yaml

SOURCE is a file or folder of OpenAI's CLIP, open_clip, transformers or timm, or a checkpoint of
the ZeroI2V authors; which one is told by its content. An image model becomes a backbone to train
from, or with --recipe the untrained video model of that recipe. `key=value` sets a field of
`ModelConfig`, for what the file does not say: `activation=gelu`, `num_heads=16`, `image_size=336`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from zeroi2v.bridges import authors, open_clip, openai, timm, transformers
from zeroi2v.bridges.foreign import Foreign, resize_positions
from zeroi2v.bridges.reader import Source, read_source
from zeroi2v.checkpoint import CONFIG, check_output_folder, check_state, save
from zeroi2v.cli import run
from zeroi2v.config import ModelConfig, recipe, unknown_name
from zeroi2v.model import VideoViT

_BRIDGES = (authors, openai, open_clip, transformers, timm)

# What a recipe and a file must agree on; all else may come from either, the file first.
_ARCHITECTURE = ("width", "depth", "num_heads", "patch_size", "image_size", "mlp_ratio")
_SETTLED = (*_ARCHITECTURE, "num_frames", "num_classes", "head_offsets", "activation")
_SETTLED += ("adapter.scale", "adapter.ratio")

# What anyone may choose, whatever the file says: none of it changes what the weights compute.
_FREE = ("preprocess.", "labels", "head_dropout", "adapter.dropout")


def load_foreign(path: str | Path, recipe: str | None = None, **overrides: Any) -> VideoViT:
    """A foreign model as a `VideoViT` in float32, on the CPU, in eval mode.

    An image model without `recipe` becomes the same model on each frame: zero offsets, no
    adapters, one frame, and a new head of zeros. Positional embeddings are resized (bicubic) if
    `image_size` is given and differs.

    Args:
        path: file or folder; the format is told by the content, and nothing in it is executed.
        recipe: published recipe to take from what the file does not say.
        overrides: fields of `ModelConfig`; nested ones as mappings or with dots in the name. One
            that contradicts the file is an error, but for `image_size`, preprocessing, labels
            and dropouts.

    Raises:
        OSError: no such file.
        ValueError: damaged, of no known format, not finite, contradictory, or silent on something
            that changes the result (heads, activation, offsets, scale), which the message names.
    """
    return _convert(read_source(path), recipe, overrides)[0]


def load_image(path: str | Path, config: ModelConfig) -> tuple[VideoViT, list[str]]:
    """A foreign image model with the heads and activation of `config`, and what was done to it.

    Raises as `load_foreign`, also if the file says otherwise than `config`.
    """
    given = {name: getattr(config, name) for name in ("num_heads", "activation")}
    model, foreign = _convert(read_source(path), None, given)
    return model, [f"format {foreign.format}", *foreign.notes]


def _convert(
    source: Source, recipe_name: str | None, overrides: dict[str, Any]
) -> tuple[VideoViT, Foreign]:
    if source.configs.get(CONFIG, {}).get("format") == "zeroi2v":
        raise ValueError(f"{source.path.parent} is a native model: there is nothing to convert")
    foreign = next((f for bridge in _BRIDGES if (f := bridge.convert(source))), None)
    if foreign is None:
        raise ValueError(
            f"{source.path} is of no known format: none of OpenAI CLIP, open_clip, transformers "
            f"CLIP, timm ViT, ZeroI2V; it holds {', '.join(list(source.tensors)[:3])}"
        )
    for name, tensor in foreign.tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source.path}: {name} must be finite: it holds inf or nan")
    config = _settle(foreign, str(source.path), recipe_name, _flat(overrides))
    if foreign.finish is not None:
        foreign.finish(config)
    state = {name: tensor.float() for name, tensor in foreign.tensors.items()}
    old, name = state["positional_embedding"], "positional_embedding"
    state[name] = resize_positions(old, config.grid)
    if len(state[name]) != len(old):
        foreign.notes.append(
            f"positional embedding resized from {foreign.known['image_size']} "
            f"to {config.image_size} pixels"
        )
    return _build(config, state, foreign, str(source.path)), foreign


def _settle(
    foreign: Foreign, where: str, recipe_name: str | None, overrides: dict[str, Any]
) -> ModelConfig:
    """The whole config, from the file, the overrides and the recipe; asks for what none says."""
    told = foreign.assumed | foreign.known
    base = None if recipe_name is None else _flat(recipe(recipe_name).model.to_dict())
    for key, value in overrides.items():
        bound = key in foreign.known and key != "image_size" and not key.startswith(_FREE)
        if bound and _plain(foreign.known[key]) != _plain(value):
            raise ValueError(f"{key} must be {foreign.known[key]}, as in {where}: got {value}")
        if key in ("activation", "num_heads") and key not in foreign.known:
            usual = foreign.assumed.get(key, value)
            against = "" if usual == value else f", against the convention of {usual}"
            foreign.notes.append(f"{key} {value} as given, which the file does not tell{against}")
    if "num_heads" in foreign.assumed and "num_heads" not in overrides:
        foreign.notes.append("heads by the convention of 64 channels each")
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
        if key not in overrides and (base is None or key in ("activation", "adapter"))
    }
    if asked:
        wants = "; ".join(f"{key}=… ({hint})" for key, hint in asked.items())
        raise ValueError(f"{where} ({foreign.format}) does not say all: give {wants}")
    if base is None:
        base = _flat(ModelConfig(num_frames=1, num_classes=1, adapter=None).to_dict())
        base["head_offsets"] = (0,) * int((told | overrides)["num_heads"])
    for key, value in (told | overrides).items():
        if key == "adapter":
            base = {k: v for k, v in base.items() if not k.startswith("adapter.")}
        elif key.startswith("adapter."):
            base.pop("adapter", None)
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


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(value):
            value = dataclasses.asdict(value)
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


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


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`["num_heads=12", "adapter.scale=0.5"]` as a mapping; values are YAML. Raises ValueError."""
    known = list(_flat(ModelConfig().to_dict())) + ["adapter"]
    overrides = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise ValueError(f"override must read key=value: got {word!r}")
        if key not in known:
            raise ValueError(unknown_name("config key", key, known))
        try:
            overrides[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"override must have a YAML value: got {word!r}") from None
    return overrides


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m zeroi2v.convert",
        description="Turn a model of OpenAI CLIP, open_clip, transformers, timm or the ZeroI2V "
        "authors into a native folder, or an MMAction2 config (.py) into ours (.yaml).",
    )
    parser.add_argument("source", help="weights file or folder, or an MMAction2 config")
    parser.add_argument("--out", required=True, help="folder for the model, or .yaml file")
    parser.add_argument("--recipe", help="published recipe, for what the file does not say")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="field of the config")
    args = parser.parse_intermixed_args(argv)

    if args.source.endswith(".py"):
        from zeroi2v.bridges.mmaction import convert_config

        if args.recipe or args.overrides:
            raise ValueError("--recipe and key=value are for weights: a config is taken as it is")
        for note in convert_config(args.source, args.out):
            print(f"note         {note}")
        print(f"written      {args.out}")
        return
    out = check_output_folder(args.out)
    overrides = parse_overrides(args.overrides)
    model, foreign = _convert(read_source(args.source), args.recipe, overrides)
    config = model.config
    if "head.weight" not in foreign.tensors:
        foreign.notes.append("temporal embedding and head are new: zeros, to be trained")
    print(f"format       {foreign.format}")
    print(
        f"model        width {config.width}, depth {config.depth}, {config.num_heads} heads, patch "
        f"{config.patch_size}, {config.image_size} px, {config.activation}"
    )
    print(f"video        {config.num_frames} frames, offsets {list(config.head_offsets)}")
    for note in foreign.notes:
        print(f"note         {note}")
    origin = {"source": args.source, "format": foreign.format, "notes": foreign.notes}
    save(model, out, {"conversion.json": json.dumps(origin, indent=2)})
    print(f"written      {out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    sys.exit(run(main))
