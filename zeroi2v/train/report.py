"""`report.html`: what a run was, what came of it, and how to go on; one file that opens offline.

    zeroi2v report RUN                      (again, or for a run that was stopped)
    zeroi2v report RUN RUN … --out FILE     (one page that compares them: `compare.py`)

A run writes it at its end. It is made from the files of the run folder alone; only the films of
single videos, and what its model answers for them, need the videos. Beside it go `plots/*.png` and
`per_class.csv`.
"""

from __future__ import annotations

import argparse
import base64
import csv
import io
import json
import shlex
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from zeroi2v.cli import run
from zeroi2v.config import RECIPES, ModelConfig
from zeroi2v.data.pipeline import AugmentConfig
from zeroi2v.drawing.figures import draw_confusion
from zeroi2v.files import check_writable, write_whole
from zeroi2v.model.vit import VideoViT
from zeroi2v.storage.checkpoint import read_config
from zeroi2v.storage.model_card import adapted_blocks, published_recipe
from zeroi2v.train.compare import compare
from zeroi2v.train.config import RunConfig, load_config
from zeroi2v.train.log import PLOTS, draw_plots, read_log
from zeroi2v.train.samples import films, look

SHOWN = 10
"""Classes in each of the tables of the best and of the worst."""


def write_report(folder: Path) -> None:
    """Draws `plots/`, writes `per_class.csv` and `report.html` of run `folder`.

    The accuracy of the classes is that of `best/`, or where there is none, of the last validation.
    Raises OSError or ValueError if `folder` is no run folder.
    """
    config = load_config(folder / "config.yaml")
    log = read_log(folder)
    if not log:
        raise ValueError(f"run folder must hold a step in log.jsonl: got none in {folder}")
    saved = folder / "last"
    model = read_config(saved) if saved.is_dir() else config.model.video
    draw_plots(folder)
    figures = _figures(folder)
    classes: list[dict[str, Any]] = []
    if figures is not None:
        classes = per_class(figures["confusion"], model.labels)
        write_whole(folder / "per_class.csv", as_csv(classes))
        draw_confusion(folder / "plots" / "confusion.png", figures["confusion"], model.labels)
    bad_files = folder / "bad_files.txt"
    drawn = [name for name, _, curves in PLOTS if any(k in line for k, _ in curves for line in log)]
    text = render(
        "report.html.jinja",
        name=folder.resolve().name,
        **_result(config, model, log, figures),
        **_videos(folder, config, model),
        facts=_facts(config, model, log),
        plots=[
            {"title": title, "data": _data_uri(folder / "plots" / f"{name}.png")}
            for name, title, _ in PLOTS
            if name in drawn
        ],
        classes=[row for row in classes if row["videos"]],
        unseen=[row["name"] for row in classes if not row["videos"]],
        shown=SHOWN,
        confusion=_data_uri(folder / "plots" / "confusion.png") if classes else None,
        bad_files=bad_files.read_text(encoding="utf-8").splitlines() if bad_files.exists() else [],
        commands=_commands(folder, config, model),
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
    )
    write_whole(folder / "report.html", text)


def render(template: str, **values: Any) -> str:
    """A template of this folder with its values filled in."""
    import jinja2

    pages = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
    )
    return pages.get_template(template).render(**values)


def per_class(confusion: list[list[int]], labels: tuple[str, ...]) -> list[dict[str, Any]]:
    """One row per class, from the most accurate down, classes without a video last.

    `confusion` is as from `zeroi2v.inference.metrics`. A row contains `index`, `name`, `videos`,
    `right`, `accuracy` in percent, and the class it is most often `taken_for`, `taken_count` times.
    """
    names = labels or tuple(str(i) for i in range(len(confusion)))
    rows = []
    for index, counts in enumerate(confusion):
        wrong = [0 if other == index else count for other, count in enumerate(counts)]
        most, videos = max(wrong), sum(counts)
        rows.append(
            {
                "index": index,
                "name": names[index],
                "videos": videos,
                "right": counts[index],
                "accuracy": 100 * counts[index] / max(1, videos),
                "taken_for": names[wrong.index(most)] if most else "",
                "taken_count": most,
            }
        )
    return sorted(rows, key=lambda row: (-bool(row["videos"]), -row["accuracy"], row["index"]))


def as_csv(rows: list[dict[str, Any]]) -> str:
    """`per_class`'s rows as CSV with a header line."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "accuracy": f"{row['accuracy']:.2f}"} for row in rows)
    return text.getvalue()


def _figures(folder: Path) -> dict[str, Any] | None:
    """What validation found for `best/`, else for the last model; None if it was never done."""
    for path in (folder / "best" / "eval.json", folder / "eval.json"):
        if path.exists():
            return json.loads(path.read_text(encoding="utf-8"))
    return None


def _result(
    config: RunConfig, model: ModelConfig, log: list[dict[str, Any]], figures: dict[str, Any] | None
) -> dict[str, Any]:
    """The sentences and figures at the top of the report."""
    last = next(line for line in reversed(log) if "loss" in line)
    done = last["epoch"] >= config.optim.epochs
    seconds = sum(line.get("seconds", 0.0) for line in log)
    took = timedelta(seconds=round(seconds))
    status = (
        f"{'Finished' if done else 'Not finished'}: {last['step']} steps, "
        f"{last['epoch']:g} of {config.optim.epochs} epochs, {took} of training."
    )
    speeds = sorted(line["clips_per_s"] for line in log if "clips_per_s" in line)
    speed = {"value": f"{speeds[len(speeds) // 2]:.1f}", "label": "clips trained on per second"}
    if figures is None:
        loss = {"value": f"{last['loss']:.3f}", "label": "loss at the last step"}
        return {
            "status": status,
            "headline": f"loss {last['loss']:.3f}",
            "tiles": [loss, speed],
            "result": "There was no validation, so no accuracy is known.",
            "measured": "",
        }
    measured = f"by the model of step {figures['step']}, on {figures['n']} validation videos"
    chance = 100 / model.num_classes
    tiles = [{"value": f"{figures['top1']:.2f} %", "label": "top-1: the right class is first"}]
    if figures["top5"] is not None:
        label = "top-5: it is among the first five"
        tiles.append({"value": f"{figures['top5']:.2f} %", "label": label})
    label = "top-1 averaged over classes"
    tiles.append({"value": f"{figures['mean_class']:.2f} %", "label": label})
    tiles.append({"value": f"{chance:.2g} %", "label": "what guessing would reach"})
    recipe = published_recipe(model)
    published = RECIPES[recipe].top1 if recipe else None
    views = "{} clips x {} crops".format(*model.preprocess.test_views)
    result = (
        f"Accuracy is measured {measured}: one clip from each video, its centre. The test, by "
        f"the first command below, averages over {views}."
    )
    if published is not None:
        result += f" Published for this recipe, in that test: {published} %."
    return {
        "status": status,
        "headline": f"{figures['top1']:.2f} % top-1",
        "tiles": [*tiles, speed],
        "result": result,
        "measured": measured,
    }


def _videos(folder: Path, config: RunConfig, model: ModelConfig) -> dict[str, Any]:
    """What the model answers for single videos; why there is none, if they are gone."""
    try:
        found, shared = look(folder, config)
    except (ValueError, OSError) as error:
        return {"losses": [], "films": [], "shared": 0, "not_looked": str(error)}
    names = model.labels or tuple(str(i) for i in range(model.num_classes))
    losses = [
        {
            "name": name,
            "loss": f"{found[part].loss:.3f}",
            "top1": f"{found[part].top1:.0f} %",
            "videos": f"{len(found[part].samples)} of {found[part].total}",
        }
        for part, name in (("train", "training videos"), ("val", "validation videos"))
        if part in found
    ]
    if "val" not in found:
        return {"losses": losses, "films": [], "shared": 0, "not_looked": ""}
    train, val = found["train"], found["val"]
    gap, right = val.loss - train.loss, f"{val.top1 - train.top1:+.0f} points"
    losses.append({"name": "gap", "loss": f"{gap:+.3f}", "top1": right, "videos": ""})
    return {"losses": losses, "films": films(val, names), "shared": shared, "not_looked": ""}


def _facts(config: RunConfig, model: ModelConfig, log: list[dict[str, Any]]) -> dict[str, str]:
    """What the run was made of, for a reader who has not seen its config."""
    with torch.device("meta"):
        parameters = list(VideoViT(model).freeze().parameters())
    total = sum(p.numel() for p in parameters)
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    pixels, optim, augment = model.preprocess, config.optim, config.augment
    sampling = f"{pixels.interval} apart" if pixels.sampling == "dense" else "spread over the video"
    shifted = [f"{offset:+d}" for offset in model.head_offsets if offset]
    last = next(line for line in reversed(log) if "loss" in line)
    epoch = ""
    if last["epoch"] >= 1:
        epoch = f"; an epoch is {round(last['step'] / last['epoch']) * optim.batch_size:,} clips"
    facts = {
        "recipe": config.model.recipe or published_recipe(model) or "none of the published ones",
        "image model": f"ViT of width {model.width}, {model.depth} blocks, {model.num_heads} "
        f"heads; frozen weights from {config.model.backbone or 'NOWHERE: they are random'}",
        "input": f"{model.num_frames} frames of {model.image_size} x {model.image_size} pixels, "
        f"{sampling}",
        "heads that read another frame": f"{len(shifted)} of {model.num_heads} in each adapted "
        f"block, by {', '.join(shifted)} frames" if shifted else "none",
        "adapted blocks": adapted_blocks(model),
        "trained parameters": f"{trained:,} of {total:,} ({100 * trained / total:.1f} %)",
        "training videos": f"{config.data.train_list}{epoch}"
        + (f", {config.data.shots} videos of each class" if config.data.shots else "")
        + (f", {config.data.clips_per_video} clips of each" if config.data.clips_per_video else ""),
        "validation videos": str(config.data.val_list or "none"),
        "classes": f"{model.num_classes}",
        "optimizer": f"AdamW, learning rate {optim.lr:g}, weight decay {optim.weight_decay:g}, "
        f"{optim.batch_size} clips a step",
        "augmentation": "none" if augment is None else _augmentation(augment),
        "arithmetic": f"{optim.precision}, ZeRO stage {optim.zero_stage}, memory policy "
        f"{optim.memory}",
    }  # fmt: skip
    return facts


def _augmentation(augment: AugmentConfig) -> str:
    parts = []
    if augment.crop_scale != (1.0, 1.0):
        parts.append("random crops of {:g} to {:g} of the area".format(*augment.crop_scale))
    if augment.flip:
        parts.append(f"mirrored with probability {augment.flip:g}")
    if augment.rand_augment_ops:
        strength = augment.rand_augment_magnitude
        parts.append(f"RandAugment ({augment.rand_augment_ops} operations, strength {strength})")
    if augment.erasing:
        parts.append(f"a part erased with probability {augment.erasing:g}")
    parts += [name for name in ("mixup", "cutmix") if getattr(augment, name)]
    return ", ".join(parts) or "none"


def _commands(folder: Path, config: RunConfig, model: ModelConfig) -> list[str]:
    """What to type next, as it would have to be typed."""
    data, where = config.data, shlex.quote(str(folder))
    root = data.val_root or data.root
    words = ["--list", data.val_list] if data.val_list else ["--list", "LIST"]
    words += ["--root", root] if root else []
    listed = shlex.join(words)
    merged = shlex.quote(str(folder / "merged"))
    lines = [
        "# accuracy as it is published: several clips and crops of each video",
        f"python -m zeroi2v.evaluate {where} {listed}",
        "# merge the adapters into the weights: same answers, the image model's size and speed",
        f"python -m zeroi2v.reparam {where} --out {merged}" if model.adapter else None,
        "# classify videos, with the merged model or with this one",
        f"python -m zeroi2v.predict {merged if model.adapter else where} VIDEO",
        "# see where its heads look",
        f"python -m zeroi2v.visualize {where} VIDEO",
    ]
    return [line for line in lines if line]


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def main(argv: list[str]) -> None:
    """Writes the report of a run again, or a page that compares several."""
    parser = argparse.ArgumentParser(
        prog="python -m zeroi2v.train.report",
        description="Writes the report of a run again, or one page that compares several runs.",
    )
    parser.add_argument("folder", nargs="+", type=Path, help="run folder; of several, a comparison")
    parser.add_argument("--out", type=Path, help="page of a comparison (comparison.html)")
    args = parser.parse_args(argv)
    if len(args.folder) > 1:
        out = check_writable(args.out or Path("comparison.html"), "--out")
        compare(args.folder, out, render)
        print(f"written      {out}")
        return
    (folder,) = args.folder
    if args.out is not None:
        raise ValueError(f"--out must be left out for one run, whose folder it is: got {args.out}")
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder} is no run folder: no config.yaml in it")
    write_report(folder)
    print(f"written      {folder / 'report.html'}")


if __name__ == "__main__":
    sys.exit(run(main))
