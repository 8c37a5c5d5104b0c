"""What happens when in a long video: a model on sliding windows, as JSON and as a picture."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
from torch import nn

from zeroi2v.data.annotations import Sample
from zeroi2v.predict import predict_each

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
        {start, end, error}. The last window ends with the video.
    Raises:
        ValueError: the file is no video, or `window` or `stride` is not positive.
    """
    seconds, rate = duration(path)
    pixels = model.config.preprocess
    if window is None:
        dense = pixels.sampling == "dense"
        window = model.config.num_frames * pixels.interval / rate if dense else UNIFORM_SECONDS
    stride = window / 2 if stride is None else stride
    if window <= 0 or stride <= 0:
        raise ValueError(f"window and stride must be positive seconds: got {window} and {stride}")
    starts = list(np.arange(0, max(seconds - window, 0) + 1e-6, stride))
    if starts[-1] + window < seconds - 1e-6:
        starts.append(seconds - window)
    spans = [(float(s), float(min(s + window, seconds))) for s in starts]
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


def duration(path: str) -> tuple[float, float]:
    """Seconds from the first to after the last frame, and frames per second, from all packets.

    Raises ValueError if there is no such video.
    """
    times = []
    try:
        with av.open(
            f"file:{path}", metadata_errors="ignore", options={"protocol_whitelist": "file"}
        ) as container:
            stream = container.streams.best("video")
            rate = float((stream and stream.average_rate) or 25)
            for packet in container.demux(stream) if stream else ():
                if packet.size and not packet.is_discard:
                    stamp = packet.pts if packet.pts is not None else packet.dts
                    times.append(None if stamp is None else float(stamp * stream.time_base))
    except (av.FFmpegError, OSError, IndexError) as error:
        if not times:
            reason = getattr(error, "strerror", None) or str(error)
            raise ValueError(f"{path}: {reason}") from None
    if not times:
        raise ValueError(f"{path}: holds no frame")
    if None in times:
        return len(times) / rate, rate
    return max(times) - min(times) + 1 / rate, rate


def draw_timeline(result: dict[str, Any], path: str | Path) -> None:
    """Draws a timeline to PNG `path`: a strip of the label over time, and probabilities below it.

    Rows are the labels that are ever the most probable, in order of their first time, at most
    `MAX_ROWS` of those that are it longest. Windows that can't be decoded are hatched.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    windows = result["windows"]
    middles = [(w["start"] + w["end"]) / 2 for w in windows]
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(middles)), result["seconds"]]
    best = [w["topk"][0]["label"] if "topk" in w else None for w in windows]
    counts = Counter(label for label in best if label is not None)
    longest = [label for label, _ in counts.most_common(MAX_ROWS)]
    labels = [label for label in counts if label in longest]
    colours = dict(zip(labels, pyplot.get_cmap("tab20").colors, strict=False))
    share = np.full((max(len(labels), 1), len(windows)), np.nan)
    for column, w in enumerate(windows):
        if "topk" in w:
            found = {row["label"]: row["probability"] for row in w["topk"]}
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
    for label, (left, right) in zip(best, pairwise(edges), strict=True):
        if label is None:
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
    strip.set(yticks=[], title=title, xlim=(0, result["seconds"]))
    rows.set(xlabel="seconds", facecolor="whitesmoke")
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
    os.replace(temporary, path)
