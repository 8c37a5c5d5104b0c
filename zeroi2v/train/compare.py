"""One page that compares runs: what came out, what was set otherwise, which classes changed.

Written by `zeroi2v report RUN RUN …` from the files of the run folders alone; opens offline.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from zeroi2v.config import flat
from zeroi2v.files import write_whole
from zeroi2v.storage.checkpoint import read_config
from zeroi2v.train.config import RunConfig, load_config
from zeroi2v.train.log import read_log

CHANGED = 12
"""Classes that are listed: those whose accuracy differs most."""
OWN = {"run.dir", "run.resume"}
"""Keys that differ between any two runs."""
CURVES = (
    ("loss", "training loss (smoothed)"),
    ("val_loss", "validation loss"),
    ("val_top1", "validation accuracy: top-1, %"),
)


def compare(folders: list[Path], out: Path, render: Any) -> None:
    """Writes the page; `render(template, **values)` fills a template.

    Raises OSError or ValueError if one of `folders` is no run folder, or has no step yet.
    """
    runs = [read_run(folder) for folder in folders]
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    text = render(
        "compare.html.jinja",
        names=names,
        rows=results(runs),
        changed=changed_keys([config for config, _, _, _ in runs]),
        curves=[
            {"title": title, "data": draw(names, [log for _, log, _, _ in runs], key, title)}
            for key, title in CURVES
            if any(key in line for _, log, _, _ in runs for line in log)
        ],
        classes=changed_classes(runs),
    )
    write_whole(out, text)


Run = tuple[RunConfig, list[dict[str, Any]], dict[str, Any] | None, tuple[str, ...]]
"""Config, log, figures of the best model (None: never validated), names of the classes."""


def read_run(folder: Path) -> Run:
    """What a run folder holds. Raises OSError or ValueError if it is none."""
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(f"{folder} is no run folder: no config.yaml in it")
    config, log = load_config(folder / "config.yaml"), read_log(folder)
    if not any("loss" in line for line in log):
        raise ValueError(f"run folder must hold a step in log.jsonl: got none in {folder}")
    figures = None
    for path in (folder / "eval.json", folder / "best" / "eval.json"):
        if path.is_file():
            figures = json.loads(path.read_text(encoding="utf-8"))
    saved = folder / "last"
    return config, log, figures, (read_config(saved) if saved.is_dir() else config.model).labels


def results(runs: list[Run]) -> list[tuple[str, list[str]]]:
    """Rows of the table of results: what is measured, and that of each run."""
    rows: dict[str, list[str]] = {}
    for config, log, figures, _ in runs:
        steps = [line for line in log if "loss" in line]
        last = steps[-1]
        mean = np.mean([line["loss"] for line in steps if line["epoch"] > last["epoch"] - 1])
        seconds = sum(line.get("seconds", 0.0) for line in steps)
        speeds = [line["clips_per_s"] for line in steps if "clips_per_s" in line]
        figures = figures or {}
        for name, value, form in (
            ("top-1 of the best model, %", figures.get("top1"), "{:.2f}"),
            ("top-5, %", figures.get("top5"), "{:.2f}"),
            ("mean over classes, %", figures.get("mean_class"), "{:.2f}"),
            ("validation loss", figures.get("loss"), "{:.3f}"),
            ("validation videos", figures.get("n"), "{}"),
            ("training loss, last epoch", mean, "{:.3f}"),
            ("epochs done", last["epoch"], f"{{:g}} of {config.optim.epochs}"),
            ("steps", last["step"], "{}"),
            ("hours of training", seconds / 3600, "{:.2f}"),
            ("clips a second", np.median(speeds) if speeds else None, "{:.1f}"),
        ):
            rows.setdefault(name, []).append("" if value is None else form.format(value))
    return [(name, values) for name, values in rows.items() if any(values)]


def changed_keys(configs: list[RunConfig]) -> list[tuple[str, list[str]]]:
    """The keys that are not the same in all configs, with the value of each."""
    values = [flat(config.to_dict()) for config in configs]
    keys = sorted({key for one in values for key in one} - OWN)
    rows = [(key, [str(one.get(key, "")) for one in values]) for key in keys]
    return [(key, row) for key, row in rows if len(set(row)) > 1]


def changed_classes(runs: list[Run]) -> list[tuple[str, list[str], float]]:
    """Classes by how much their accuracy differs between the runs that know them, most first.

    Each with its accuracy in every run, in percent, and the difference from the first to the last.
    """
    known: list[dict[str, float]] = []
    for _, _, figures, labels in runs:
        confusion = (figures or {}).get("confusion", [])
        names = labels or [str(i) for i in range(len(confusion))]
        known.append(
            {names[i]: 100 * row[i] / sum(row) for i, row in enumerate(confusion) if sum(row)}
        )
    shared = [name for name in known[0] if all(name in one for one in known)]
    rows = [
        (name, [f"{one[name]:.1f}" for one in known], known[-1][name] - known[0][name])
        for name in shared
    ]
    spread = {
        name: max(one[name] for one in known) - min(one[name] for one in known) for name in shared
    }
    rows.sort(key=lambda row: -spread[row[0]])
    return [row for row in rows if spread[row[0]]][:CHANGED]


def draw(names: list[str], logs: list[list[dict[str, Any]]], key: str, title: str) -> str:
    """A plot of `key` over epochs, a line for each run, as the data URI of a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for name, log in zip(names, logs, strict=True):
        x, y = (np.array([line[k] for line in log if key in line]) for k in ("epoch", key))
        if width := len(y) // 20 if key == "loss" else 0:
            x, y = x[width - 1 :], np.convolve(y, np.ones(width) / width, "valid")
        axes.plot(x, y, marker="" if key == "loss" else "o", markersize=3, label=name)
    axes.set(title=title, xlabel="epoch")
    axes.grid(alpha=0.3)
    axes.legend()
    file = io.BytesIO()
    figure.savefig(file, dpi=120, format="png")
    pyplot.close(figure)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
