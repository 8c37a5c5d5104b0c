"""The model card: the `README.md` of a model folder."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from zeroi2v.config import RECIPES, ModelConfig
from zeroi2v.model.quantization import Format

# JSON files that may lie beside a model and say where it is from; the card says what is in them.
ORIGINS = ("training.json", "conversion.json", "merge_report.json", "eval.json")

_FREE = {"image_size", "adapter", "head_dropout", "preprocess", "labels"}
"""Fields in which a model may differ from a recipe and be called by its name."""


def model_card(
    config: ModelConfig, files: dict[str, str], quantization: Format | None = None
) -> str:
    """Markdown with the hub's header, for a model of `config` with `files` (name -> text) beside.

    `quantization` is that of its blocks. Raises ValueError if one of `ORIGINS` is not
    JSON.
    """
    pixels = config.preprocess
    sampling = f"dense, every {pixels.interval} frames" if pixels.sampling == "dense" else "uniform"
    recipe = published_recipe(config)
    header = {
        "library_name": "zeroi2v",
        "pipeline_tag": "video-classification",
        "tags": ["video-classification", "vision-transformer", "zeroi2v"],
    }
    rows = {
        "model": f"ViT: width {config.width}, depth {config.depth}, {config.num_heads} heads, "
        f"patch {config.patch_size}, {config.num_registers} registers, "
        f"{'rotary' if config.rotary else 'added'} positions, {config.activation}, "
        f"pooling {config.pooling}",
        "input": f"{config.num_frames} frames of {config.image_size} px, sampled {sampling}",
        "pixels": f"RGB in 0..255, resized {pixels.interpolation}"
        + (", antialiased" if pixels.antialias else " without antialiasing")
        + f", mean {_rounded(pixels.mean)}, std {_rounded(pixels.std)}",
        "test views": f"{pixels.test_views[0]} clips x {pixels.test_views[1]} crops, short side "
        f"{pixels.test_short_side} px",
        "classes": f"{config.num_classes}" + (", names in config.json" if config.labels else ""),
        "frame offset of each head": list(config.head_offsets),
        "adapted blocks": adapted_blocks(config),
        "weights": ("adapted, not merged yet" if config.adapter else "merged or plain: no adapters")
        + (f"; {quantization.name} in the blocks, a scale for each row" if quantization else ""),
        "recipe": f"as published: {recipe}" if recipe else "none of the published ones",
    }
    rows |= _origins({name: _parsed(name, files[name]) for name in ORIGINS if name in files})
    lines = [
        "---",
        *(
            f"{key}: {json.dumps(value) if key == 'tags' else value}"
            for key, value in header.items()
        ),
        "---",
        f"# Video classifier of {config.num_classes} classes",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {str(value).replace('|', '/')} |" for key, value in rows.items()),
        "",
        "```python",
        "from zeroi2v import VideoViT",
        'model = VideoViT.from_pretrained("this/folder")',
        "```",
        "",
        "Or classify a file: `python -m zeroi2v.predict this/folder video.mp4`. Method: ZeroI2V",
        "([arXiv 2310.01324](https://arxiv.org/abs/2310.01324)).",
    ]
    return "\n".join(lines)


def adapted_blocks(config: ModelConfig) -> str:
    """Which blocks have adapters and shifted heads, or had before they were merged."""
    first, last = config.adapt_from, config.depth - 1
    return f"{first} to {last}, after those of the image model" if first else f"all {last + 1}"


def _parsed(name: str, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be a JSON object: got {type(values).__name__}")
    return values


def published_recipe(config: ModelConfig) -> str | None:
    """The published recipe that has this architecture, sampling and adapters, if one has."""
    settled = {field.name for field in fields(ModelConfig)} - _FREE
    for name, recipe in RECIPES.items():
        other = recipe.model
        same = all(getattr(config, key) == getattr(other, key) for key in settled)
        if same and config.adapter is not None:
            same = config.adapter.scale == other.adapter.scale
        if same and config.preprocess.sampling == other.preprocess.sampling:
            return name
    return None


def _origins(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for key, value in found.get("training.json", {}).items():
        rows[f"training: {key}"] = value
    if "format" in (conversion := found.get("conversion.json", {})):
        rows["converted from"] = "; ".join([conversion["format"], *conversion.get("notes", [])])
    for check in found.get("merge_report.json", {}).get("checks", []):
        verdict = "passed" if check["passed"] else "FAILED"
        rows[f"merge, {check['dtype']}"] = (
            f"{verdict}: relative error {check['rel']:.1e} to the adapted model, "
            f"top-1 agreement {check['top1_agreement']:.0%}, {check['clips']} clips"
        )
    if figures := found.get("eval.json"):
        for key, name in (("top1", "top-1"), ("top5", "top-5"), ("mean_class", "mean class")):
            if figures.get(key) is not None:
                rows[name] = f"{figures[key]:.2f} % of {figures.get('n', '?')} videos"
    return rows


def _rounded(values: tuple[float, ...]) -> list[float]:
    return [round(value, 3) for value in values]
