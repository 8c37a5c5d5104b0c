"""Pictures that more than one program draws."""

from __future__ import annotations

from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

import torch

from zeroi2v.files import whole_file

MAX_NAMED = 51
"""Classes that are named along each side of a confusion matrix; of more, every second, third, …"""
LISTED = 12
"""Strongest confusions that are listed below a matrix whose classes are not all named."""
_SIDE, _CELL, _FONT = 7.2, 0.48, 8.0  # largest matrix and cell, in inches; size of names, in points


def draw_confusion(path: Path, confusion: list[list[int]], labels: tuple[str, ...]) -> None:
    """Draws the confusion matrix, rows as percent of the true class, to PNG `path`.

    Names are as large for any number of classes: up to `MAX_NAMED` all are shown, of more classes
    every k-th, with the least k that keeps them apart; the `LISTED` strongest confusions are then
    listed below. Names along the bottom are upright where they are wider than a cell, and long ones
    lose their middle. Up to 15 classes, cells hold counts. The figure grows with the classes to at
    most 11 by 13 inches.

    Args:
        path: file to write.
        confusion: K x K counts, rows are true classes.
        labels: K class names in index order; without any, classes are numbered.
    """
    size = len(confusion)
    names = labels or tuple(str(i) for i in range(size))
    step = ceil(size / MAX_NAMED)
    named = range(0, size, step)
    ticks = [_shorten(names[i], 32) for i in named]
    listed = strongest_confusions(confusion, names) if step > 1 else []
    counts = torch.tensor(confusion, dtype=torch.float64)
    share = 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)

    side = min(_SIDE, max(4, size) * _CELL)
    cell, widest = side / size, max(map(_inches, ticks))
    rotation = 90 if widest > 0.9 * cell else 0
    left = bottom = widest + 0.45
    if not rotation:
        bottom = 0.55
    below = 0.16 * (len(listed) + 2) if listed else 0.0
    width, height = left + side + 1.0, below + bottom + side + 0.15
    figure = headless_pyplot().figure(figsize=(width, height))

    def place(x: float, wide: float):
        return figure.add_axes((x / width, (below + bottom) / height, wide / width, side / height))

    axes = place(left, side)
    picture = axes.imshow(share.numpy(), vmin=0, vmax=100, cmap="Blues")
    figure.colorbar(picture, cax=place(left + side + 0.2, 0.15), label="% of the true class")
    style = {"fontsize": _FONT, "parse_math": False}
    axes.set_xticks(named, ticks, rotation=rotation, **style)
    axes.set_yticks(named, ticks, **style)
    some = f" (one of {step} is named)" if step > 1 else ""
    axes.set(xlabel=f"predicted class{some}", ylabel=f"true class{some}")
    if size <= 15:
        digits = len(str(max(chain(*confusion))))
        for row, column in ((r, c) for r in range(size) for c in range(size)):
            axes.text(
                column,
                row,
                str(confusion[row][column]),
                ha="center",
                va="center",
                fontsize=min(10.0, 72 * cell / (0.75 * digits)),
                color="white" if share[row, column] > 55 else "black",
            )
    if listed:
        text = "\n".join(["Strongest confusions, true → predicted:", *listed])
        figure.text(0.15 / width, below / height, text, va="top", linespacing=1.3, **style)
    save_figure(figure, path)


def strongest_confusions(confusion: list[list[int]], names: tuple[str, ...]) -> list[str]:
    """The pairs of classes that are most often confused, as text, at most `LISTED` of them."""
    counts = torch.tensor(confusion)
    total = counts.sum(1).tolist()
    counts.fill_diagonal_(0)
    top = counts.flatten().topk(min(LISTED, counts.numel()))
    pairs = [divmod(place, len(names)) for place in top.indices.tolist()]
    return [
        f"{count} of {total[true]}   {_shorten(names[true], 64)} → {_shorten(names[other], 64)}"
        for count, (true, other) in zip(top.values.tolist(), pairs, strict=True)
        if count
    ]


def _shorten(name: str, length: int) -> str:
    """`name`, or its beginning and its end, as many names differ in their last words alone."""
    if len(name) <= length:
        return name
    end = (length - 1) // 2
    return f"{name[: length - 1 - end].rstrip()}…{name[-end:].lstrip()}"


def _inches(name: str) -> float:
    """How wide `name` is drawn."""
    from matplotlib.textpath import TextPath

    return TextPath((0, 0), name.replace("$", "s"), size=_FONT).get_extents().width / 72


def headless_pyplot() -> Any:
    """matplotlib's pyplot, set to draw without a screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: Path) -> None:
    """Saves a pyplot figure as PNG `path`, whole or not at all, and closes it."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    headless_pyplot().close(figure)
