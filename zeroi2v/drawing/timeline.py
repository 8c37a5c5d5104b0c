"""What happens when in a long video: a model on sliding windows, as JSON and as a picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from zeroi2v.data.annotations import Sample
from zeroi2v.data.decode import frame_times
from zeroi2v.drawing.figures import headless_pyplot, save_figure
from zeroi2v.inference import predict_each

UNIFORM_SECONDS = 4.0
"""Window of a model that spreads its frames over the whole video."""
MAX_ROWS = 20
"""Labels that a picture names."""


def timeline(
    model: nn.Module,
    path: str,
    window: float | None = None,
    stride: float | None = None,
    topk: int = 5,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Classes of every window of a video: one clip each, centre crop.

    Args:
        model: as for `predict_each`.
        path: video file.
        window: seconds a window is long; by default what the model's clip spans, `num_frames *
            interval` frames, or 4 s for uniform sampling.
        stride: seconds between the starts of windows; half of `window` by default.
        topk: classes to name for each.
        progress: called with 1 after each window.
    Returns:
        `path`, `seconds`, `window`, `stride` and `windows`: a list of {start, end, topk} or
        {start, end, error}. The last window ends with the video; where a gap in the time stamps
        leaves a window without a frame, there is none.
    Raises:
        ValueError: the file is no video, or `window` or `stride` is not positive.
    """
    times = frame_times(path)
    frame = float(np.median(np.diff(times))) if len(times) > 1 else 1 / 25
    seconds = float(times[-1]) + frame
    pixels = model.config.preprocess
    if window is None:
        dense = pixels.sampling == "dense"
        window = model.config.num_frames * pixels.interval * frame if dense else UNIFORM_SECONDS
    stride = window / 2 if stride is None else stride
    if window <= 0 or stride <= 0:
        raise ValueError(f"window and stride must be positive seconds: got {window} and {stride}")
    spans = window_spans(times, seconds, window, stride)
    samples = [Sample(path, 0, start, end) for start, end in spans]
    windows = []
    for (start, end), result in zip(
        spans, predict_each(model, samples, topk, views=(1, 1)), strict=True
    ):
        result.pop("path")
        windows.append({"start": round(start, 3), "end": round(end, 3), **result})
        if progress is not None:
            progress(1)
    return {
        "path": path,
        "seconds": round(seconds, 3),
        "window": round(window, 3),
        "stride": round(stride, 3),
        "windows": windows,
    }


def window_spans(
    times: np.ndarray, seconds: float, window: float, stride: float
) -> list[tuple[float, float]]:
    """Starts and ends of the windows of a video of `seconds` that contain a frame, in order.

    Windows start at multiples of `stride`; the last one ends with the video. There are as many as
    the frames need, however long the gaps between them.
    """
    gaps = np.flatnonzero(np.diff(times) >= window)
    found: list[int] = []
    for first, last in zip(times[[0, *(gaps + 1)]], times[[*gaps, -1]], strict=True):
        low = max(int((first - window) // stride) + 1, 0, found[-1] + 1 if found else 0)
        found += range(low, int((last + 1e-6) // stride) + 1)
    starts = [k * stride for k in found if k * stride <= max(seconds - window, 0) + 1e-6]
    if not starts or starts[-1] + window < seconds - 1e-6:
        starts.append(max(seconds - window, 0.0))
    spans = [(start, min(start + window, seconds)) for start in starts]
    places = np.searchsorted(times, np.array(spans) - 1e-6)  # as the decoder counts
    return [span for span, (low, high) in zip(spans, places, strict=True) if low < high]


def draw_timeline(result: dict[str, Any], path: str | Path) -> None:
    """Draws a timeline to PNG `path`: a strip of the label over time, and probabilities below it.

    Rows are the labels that are ever the most probable, in order of their first time, at most
    `MAX_ROWS` of those that are it longest. Windows that can't be decoded are hatched. A gap
    without windows is left blank, and drawn no wider than one; the axis shows the true times.
    """
    pyplot = headless_pyplot()
    windows = result["windows"]
    edges, columns, knots = _columns(result)
    best = [w["topk"][0]["label"] if "topk" in w else None for w in windows]
    counts = Counter(label for label in best if label is not None)
    longest = [label for label, _ in counts.most_common(MAX_ROWS)]
    labels = [label for label in counts if label in longest]
    colours = dict(zip(labels, pyplot.get_cmap("tab20").colors, strict=False))
    share = np.full((max(len(labels), 1), len(columns)), np.nan)
    for column, i in enumerate(columns):
        if i is not None and "topk" in windows[i]:
            found = {row["label"]: row["probability"] for row in windows[i]["topk"]}
            share[: len(labels), column] = [found.get(label, 0.0) for label in labels]

    height = 0.28 * len(share)
    figure, (strip, rows) = pyplot.subplots(
        2,
        1,
        figsize=(12, 2.2 + height),
        sharex=True,
        height_ratios=(0.6, max(height, 0.6)),
        layout="constrained",
    )
    for i, (left, right) in zip(columns, pairwise(edges), strict=True):
        label = None if i is None else best[i]
        if i is None:
            strip.text((left + right) / 2, 0.5, "gap", rotation=90, ha="center", va="center")
        elif label is None:
            strip.axvspan(left, right, facecolor="white", edgecolor="grey", hatch="///")
        else:
            strip.axvspan(left, right, color=colours.get(label, "lightgrey"), linewidth=0)
    picture = rows.pcolormesh(edges, np.arange(len(share) + 1), share, vmin=0, vmax=1, cmap="Blues")
    rows.invert_yaxis()
    figure.colorbar(picture, ax=rows, label="probability", pad=0.01)
    rows.set_yticks(np.arange(len(labels)) + 0.5, labels, fontsize=8)
    for tick, label in zip(rows.get_yticklabels(), labels, strict=True):
        tick.set(bbox=dict(facecolor=colours[label], edgecolor="none", alpha=0.6, pad=1.5))
    others = len(counts) - len(labels)
    title = Path(result["path"]).name + (f" ({others} labels more, in grey)" if others else "")
    strip.set(yticks=[], title=title, xlim=(0, edges[-1]))
    rows.set(xlabel="seconds", facecolor="whitesmoke")
    if len(knots) > 2:
        rows.xaxis.set_major_formatter(
            lambda x, _: f"{np.interp(x, *zip(*knots, strict=True)):.6g}"
        )
    save_figure(figure, Path(path))


def _columns(
    result: dict[str, Any],
) -> tuple[list[float], list[int | None], list[tuple[float, float]]]:
    """Where the windows of a timeline are drawn.

    Returns the edges of the columns, in seconds less what gaps are shortened by; for each column
    its window, or None for a gap; and the points (drawn, time) between which nothing is shortened.
    """
    windows, cut = result["windows"], 0.0
    edges, columns, knots = [0.0], [0], [(0.0, 0.0)]
    for i, (w, following) in enumerate(pairwise(windows), 1):
        hole = following["start"] - w["end"]
        if hole > 0 and following["start"] - w["start"] > result["stride"] + 2e-3:  # of rounding
            edges.append(w["end"] - cut)
            knots.append((edges[-1], w["end"]))
            cut += max(0.0, hole - result["window"])
            edges.append(following["start"] - cut)
            knots.append((edges[-1], following["start"]))
            columns.append(None)
        else:
            middles = w["start"] + w["end"] + following["start"] + following["end"]
            edges.append(middles / 4 - cut)
        columns.append(i)
    edges.append(result["seconds"] - cut)
    return edges, columns, [*knots, (edges[-1], result["seconds"])]
