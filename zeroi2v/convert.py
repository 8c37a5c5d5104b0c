"""Turn foreign models into a native folder, and MMAction2 configs into ours.

    python -m zeroi2v.convert SOURCE --out FOLDER [--recipe NAME] [key=value …]
    python -m zeroi2v.convert CONFIG.py --out CONFIG.yaml

SOURCE is a file or folder of OpenAI's CLIP, open_clip, transformers or timm, or a checkpoint of
the ZeroI2V authors; its content shows which, and which family: CLIP, DINOv2, DINOv3, SigLIP, PE,
EVA02-CLIP, AIMv2, a plain ViT. A LoRA adapter of peft beside the weights is melted in. An image
model becomes a backbone to train from, or with --recipe the untrained video model of that recipe.
`key=value` sets a field of `ModelConfig`, for what the file does not say or for a video model
without a recipe: `activation=gelu`, `num_heads=16`, `image_size=336`, `head_offsets=auto`.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import yaml

from zeroi2v.bridges.load import convert
from zeroi2v.bridges.reader import read_source
from zeroi2v.cli import run
from zeroi2v.config import ModelConfig, flat, unknown_name
from zeroi2v.storage.checkpoint import check_output_folder, save


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`["num_heads=12", "adapter.scale=0.5"]` as a mapping; values are YAML. Raises ValueError."""
    known = list(flat(ModelConfig().to_dict())) + ["adapter"]
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
    model, foreign = convert(read_source(args.source), args.recipe, overrides)
    config = model.config
    if "head.weight" not in foreign.tensors:
        foreign.notes.append("temporal embedding and head are new: zeros, to be trained")
    print(f"format       {foreign.format}")
    print(
        f"model        width {config.width}, depth {config.depth}, {config.num_heads} heads, patch "
        f"{config.patch_size}, {config.image_size} px, {config.activation}"
    )
    positions = "" if config.rotary is None else ", rotary positions"
    print(
        f"tokens       {config.num_tokens} a frame, {config.num_registers} of them registers"
        f"{positions}; pooling {config.pooling}; {config.norm} norm, eps {config.norm_eps}"
    )
    print(f"video        {config.num_frames} frames, offsets {list(config.head_offsets)}")
    for note in foreign.notes:
        print(f"note         {note}")
    origin = {"source": args.source, "format": foreign.format, "notes": foreign.notes}
    save(model, out, {"conversion.json": json.dumps(origin, indent=2)})
    print(f"written      {out}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    sys.exit(run(main))
