"""The demo's results as a table, plots and claims: `demo/report/`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from moving_shapes import DIRECTIONS

from zeroi2v.data.decode import read_frames
from zeroi2v.drawing.figures import draw_confusion, headless_pyplot, save_figure
from zeroi2v.train.log import read_log

NAMES = {
    "chance": "chance",
    "head": "frozen image model, trained head (4 epochs)",
    "no_offsets": "adapters, all offsets 0 (12 epochs)",
    "stdha": "STDHA: adapters and shifted heads (26 epochs)",
    "merged": "STDHA, merged",
}
CHANCE = 100 / len(DIRECTIONS)
ARROWS = {"left": "←", "right": "→", "up": "↑", "down": "↓"}
COLOURS = {
    "chance": "lightgray",
    "head": "tab:orange",
    "no_offsets": "tab:gray",
    "stdha": "tab:blue",
    "merged": "tab:blue",
}


def table(figures: dict[str, Any]) -> str:
    """The results as a Markdown table."""
    speed, rel = figures["speed"], figures["merge_rel"]
    rows = [("", "top-1 on direction"), ("---", "---:")]
    rows += [(name, f"{accuracy(figures, key):.1f} %") for key, name in NAMES.items()]
    rows += [
        ("", ""),
        ("same class before and after merging", f"{figures['agreement']:.1f} %"),
        ("merge's relative error, fp32", f"{rel['float32']:.1e}"),
        ("merge's relative error, fp64", f"{rel['float64']:.1e}"),
        ("merged model, ms a clip", f"{speed['merged']:.2f}"),
        ("plain image ViT on the same frames, ms", f"{speed['image']:.2f}"),
        ("merged / plain", f"{speed['ratio']:.2f}"),
    ]
    width = max(len(row[0]) for row in rows)
    return "\n".join(f"| {left:<{width}} | {right:>18} |" for left, right in rows)


def speed_note(figures: dict[str, Any]) -> str:
    """What the ratio of the two times means, as lines of text."""
    cores, ratio = len(os.sched_getaffinity(0)), figures["speed"]["ratio"]
    return f"""\
Both times are medians of interleaved rounds on {cores} CPU cores. "merged / plain" is {ratio:.2f}:
both models do the same arithmetic, but the merged one also copies the keys and values that its
shifted heads read from other frames. Here every head is shifted and only 16 wide, so the copies are
a visible share of the time. A merged ViT-B/16 is as fast as its image model, within 2 %
(docs/benchmarks/amd-epyc-2-cores-avx512.md)."""


def accuracy(figures: dict[str, Any], key: str) -> float:
    return CHANCE if key == "chance" else figures[key]


def claims(figures: dict[str, Any]) -> dict[str, bool]:
    """What the demo sets out to show, and whether it does."""
    return {
        "STDHA recognises the direction: at least 95 %": figures["stdha"] >= 95,
        "without offsets it can't: below 40 %": figures["no_offsets"] < 40,
        "merging changes no prediction": figures["agreement"] == 100,
        "merging is exact: relative error at most 1e-5 in fp32": (
            figures["merge_rel"]["float32"] <= 1e-5
        ),
    }


def write(demo: Path, figures: dict[str, Any]) -> dict[str, bool]:
    """Writes `report.md`, its plots and `figures.json` to `demo/report/`; returns the claims."""
    folder = demo / "report"
    folder.mkdir(exist_ok=True)
    draw_frames(folder / "frames.png", demo / "videos")
    draw_accuracy(folder / "accuracy.png", figures)
    draw_curves(folder / "curves.png", demo / "runs")
    merged = json.loads((demo / "eval" / "merged.json").read_text(encoding="utf-8"))
    draw_confusion(folder / "confusion.png", merged["confusion"], tuple(merged["labels"]))
    results = claims(figures)
    verdicts = "\n".join(f"- {'yes' if ok else '**NO**'}: {text}" for text, ok in results.items())
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(
        f"""# Which way does the shape move?

A shape moves left, right, up or down at constant speed and comes back on the other side. It
starts anywhere, so no single frame shows the direction. An image model, trained to name the shape
in single frames ({figures["shape_top1"]:.1f} % right), is frozen and adapted to these videos.

![Frames of one video of each class](frames.png)

## Results

{table(figures)}

All accuracies are measured on the same {merged["n"]} validation videos by the same command, with
3 clips a video. {speed_note(figures)}

![Accuracy](accuracy.png)
![Training](curves.png)
![Confusion matrix of the merged model](confusion.png)

## Claims

{verdicts}

## One file

```
{figures["prediction"].rstrip()}
```

Where the heads of the merged model look in that file. Two of the four read the frame before, two
the frame after: the patches they look at are where the shape was, and where it will be.

![One query frame, with arrows to the frames that are read](heads/layer0_frame3.png)
![All query frames](heads/layer0.png)

The same as a film: `heads/layer0.mp4`.

{figures["seconds"]:.0f} s in all. The commands are in `demo/logs/`, the runs in `demo/runs/`,
each with a report of its own, such as `demo/runs/stdha/report.html`.
""",
        encoding="utf-8",
    )
    return results


def draw_frames(path: Path, videos: Path, count: int = 8) -> None:
    """Draws every third frame of the first validation video of each class as one row."""
    pyplot = headless_pyplot()
    lines = [line.split() for line in (videos / "val.txt").read_text().splitlines()]
    figure, axes = pyplot.subplots(
        len(DIRECTIONS), count, figsize=(count + 0.8, len(DIRECTIONS) + 0.4), layout="constrained"
    )
    for label, name in enumerate(DIRECTIONS):
        video = next(file for file, number in lines if int(number) == label)
        frames = read_frames(videos / video, lambda total: 3 * np.arange(count) % total)
        for column, image in enumerate(frames):
            cell = axes[label, column]
            cell.imshow(image, interpolation="nearest")
            cell.set(xticks=[], yticks=[])
            if label == 0:
                cell.set_title(f"frame {3 * column}", fontsize=8)
        axes[label, 0].set_ylabel(
            f"{name} {ARROWS[name]}", rotation=0, ha="right", va="center", fontsize=11
        )
    save_figure(figure, path)


def draw_accuracy(path: Path, figures: dict[str, Any]) -> None:
    """Draws one bar for each model."""
    pyplot = headless_pyplot()
    values = [accuracy(figures, key) for key in NAMES]
    figure, axes = pyplot.subplots(figsize=(7, 2.8), layout="constrained")
    axes.axvline(CHANCE, color="black", linewidth=0.8, linestyle=":", zorder=0)
    bars = axes.barh(list(NAMES.values()), values, color=[COLOURS[key] for key in NAMES])
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(bars, [f"{value:.1f}" for value in values], padding=4, bbox=ground)
    axes.invert_yaxis()
    axes.set(xlim=(0, 110), xlabel="top-1 on direction, %")
    axes.spines[["top", "right"]].set_visible(False)
    save_figure(figure, path)


def draw_curves(path: Path, runs: Path) -> None:
    """Draws loss and validation accuracy over the epochs of the three runs."""
    pyplot = headless_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for name, size in (("stdha", 6), ("no_offsets", 6), ("head", 3)):
        colour, log = COLOURS[name], read_log(runs / name)
        epoch, loss = zip(*((x["epoch"], x["loss"]) for x in log if "loss" in x), strict=True)
        width = max(1, len(loss) // 30)
        smooth = np.convolve(loss, np.ones(width) / width, "valid")
        left.plot(epoch[width - 1 :], smooth, color=colour)
        points = [(x["epoch"], x["val_top1"]) for x in log if "val_top1" in x]
        right.plot(
            *zip(*points, strict=True), color=colour, marker="o", markersize=size, label=NAMES[name]
        )
    right.axhline(CHANCE, color="black", linewidth=0.8, linestyle=":", label="chance")
    left.set(title="training loss", xlabel="epoch", xlim=(0, None), ylim=(0, None))
    right.set(title="validation accuracy, %", xlabel="epoch", xlim=(0, None), ylim=(0, 102))
    right.legend(fontsize=8, loc="center right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save_figure(figure, path)
