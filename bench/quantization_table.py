"""What 8-bit weights cost in accuracy, in Markdown: `python -m bench.quantization_table`.

    python -m bench.quantization_table [RECIPE …]                   random weights, with outliers
    python -m bench.quantization_table --model FOLDER --list FILE   a merged model on its videos

Models of random weights have their recipe's width, at most 12 blocks and 8 frames, and 2 x 2
patches a frame: whole ones take minutes each. They have outliers that change nothing but what is
rounded (`with_outliers`). Clips are seeded noise. All is computed on the CPU: for float8 the
reference, which is what float8 units compute but for the order of sums.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
from pathlib import Path

import torch

from bench.cases import adapted_model
from bench.tables import table
from zeroi2v import RECIPES, VideoViT, verify
from zeroi2v.data.annotations import read_list
from zeroi2v.data.views import ViewLoader
from zeroi2v.inference import metrics, predict_views
from zeroi2v.model.quantization import FP8, INT8, quantized
from zeroi2v.reparam import relative_error, seeded_clips
from zeroi2v.storage.checkpoint import load, model_folder

CLIPS, DEPTH, FRAMES, GRID = 2, 12, 8, 2
RANDOM = ("recipe", "bf16", "fp8", "limit", "same class", "int8", "limit", "same class")
TRAINED = ("weights", "bytes", "top-1", "same class")


@torch.no_grad()
def with_outliers(model: VideoViT, factor: float = 64.0) -> VideoViT:
    """`model`, without adapters, itself: it computes the same with outliers, as large models have.

    Three channels of what a norm gives are `factor` times as large, and what reads them is as many
    times smaller; so are three of the values that attention mixes; and all queries, with the keys.
    """
    width = model.config.width
    channels = [1, width // 2, width - 2]
    for block in model.transformer.resblocks:
        attn = block.attn
        for norm, weight in (
            (block.ln_1, attn.in_proj_weight),
            (block.ln_2, block.mlp.c_fc.weight),
        ):
            for gain in (norm.weight, norm.bias):
                gain[channels] *= factor
            weight[:, channels] /= factor
        query, key, value = (slice(i * width, (i + 1) * width) for i in range(3))
        for projection in (attn.in_proj_weight, attn.in_proj_bias):
            projection[query] *= factor
            projection[key] /= factor
            if attn.ln is None:
                projection[value][channels] *= factor
        if attn.ln is None:
            attn.out_proj.weight[:, channels] /= factor
    return model


def random_row(name: str) -> list[str]:
    """Relative errors of the logits to float64, and their limits."""
    config = RECIPES[name].model
    small = dict(depth=DEPTH, num_frames=FRAMES, image_size=GRID * config.patch_size)
    config = dataclasses.replace(config, **small, adapter=None)
    model = with_outliers(adapted_model(config, "cpu"))
    clips, others = seeded_clips(model, 2 * CLIPS).split(CLIPS)
    reports = [verify(model, quantized(model, kind, others), clips) for kind in (FP8, INT8)]
    with torch.no_grad():
        exact = model(clips)
        half = model.bfloat16()(clips)
    cells = [shown(relative_error(half, exact))]
    for report in reports:
        if not report.passed:
            raise ValueError(f"{name} must pass: {report}")
        cells += [shown(report.rel), shown(report.rel_limit)]
        cells.append(f"{round(CLIPS * report.top1_agreement)} of {CLIPS}")
    return [name, *cells]


def trained_rows(folder: str, source: str) -> list[list[str]]:
    """Of a merged model: as it is, in bfloat16 and in 8 bits, on all views of the list's videos."""
    model = load(model_folder(folder))
    config, root = model.config, Path(source).parent
    samples = read_list(source, root, config.num_classes, config.labels)
    loader = ViewLoader(samples, config, batch_size=8, test=True)
    seen = next(loader.epoch()).video[:, 0]
    models = {
        "as trained": model,
        "bf16": copy.deepcopy(model).bfloat16(),
        "fp8": quantized(model),
        "int8": quantized(model, INT8, seen),
    }
    rows, exact = [], None
    for name, one in models.items():
        index, probs = predict_views(one, loader, "cpu")
        exact = probs if exact is None else exact
        same = (probs.argmax(-1) == exact.argmax(-1)).double().mean().item()
        top1 = metrics(probs, torch.tensor([sample.label for sample in samples])[index])["top1"]
        size = sum(t.numel() * t.element_size() for t in one.state_dict().values())
        rows.append([name, f"{size:,}", f"{top1:.2f} %", f"{100 * same:.2f} %"])
    return rows


def shown(number: float) -> str:
    return f"{number:.1e}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", metavar="RECIPE", help="default: all")
    parser.add_argument("--model", help="folder of a merged model, in place of random weights")
    parser.add_argument("--list", help="its videos with classes, beside the list")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.list is None):
        parser.error("--model and --list must be given together")
    if args.model:
        print(table(TRAINED, trained_rows(args.model, args.list)))
        return
    names = args.recipes or list(RECIPES)
    if unknown := set(names) - set(RECIPES):
        parser.error(f"unknown recipe {min(unknown)!r}: known: {', '.join(RECIPES)}")
    print(table(RANDOM, [random_row(name) for name in names]))


if __name__ == "__main__":
    main()
