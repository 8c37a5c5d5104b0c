"""Accuracy of a model on a list of videos.

    python -m zeroi2v.evaluate FOLDER --list FILE --root DIR [--views 3x1] [--out JSON]
    torchrun --nproc_per_node 8 -m zeroi2v.evaluate …       8 GPUs share the list

What can't be decoded is named and left out; more of it than `--max-bad-fraction` is a failure.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zeroi2v.cli import run
from zeroi2v.data.annotations import Sample, read_list
from zeroi2v.data.classes import occurrence, some
from zeroi2v.data.video_files import left_out
from zeroi2v.data.views import ViewLoader
from zeroi2v.drawing.figures import draw_confusion
from zeroi2v.files import check_writable, write_whole
from zeroi2v.inference import (
    as_graph,
    default_device,
    default_workers,
    metrics,
    predict_views,
    takes_frames,
)
from zeroi2v.model.vit import VideoViT
from zeroi2v.processes import gather, joined, rank, shared_bar, together, told_once, world_size
from zeroi2v.storage.checkpoint import fetch, model_folder
from zeroi2v.storage.runtimes import load_deployed

Part = tuple[Tensor, Tensor, dict[str, str]]
"""Index int64 [n], probabilities float32 [n, K] and bad files of one process."""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m zeroi2v.evaluate",
        description="Accuracy of a model, adapted, merged or exported, on a list of videos.",
    )
    parser.add_argument("model", help="model or run folder, .onnx or .pt2 file, or name on the hub")
    parser.add_argument("--list", required=True, help="text list, CSV or folder per class")
    parser.add_argument("--root", help="folder the list's paths are relative to")
    parser.add_argument("--views", help="CLIPSxCROPS, such as 3x1 (default: the model's own)")
    parser.add_argument("--batch-size", type=int, default=8, help="videos at once (default: 8)")
    parser.add_argument("--workers", type=int, help="decoding processes (default: by the machine)")
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of the list that may fail to decode (default: 0.01)",
    )
    parser.add_argument(
        "--out", help="JSON file of the figures; predictions and confusion matrix go beside it"
    )
    args = parser.parse_args(argv)
    with joined() as device:
        with told_once("start it again"):
            job, parts, seconds = evaluate(args, device or default_device())
        if rank() == 0:  # the others have done their part
            report(args, job, parts, seconds)


def evaluate(args: argparse.Namespace, device: torch.device) -> tuple[Job, list[Part], float]:
    """What was evaluated, what each process that shares the list has found, and the seconds."""
    job = together(lambda: prepare(args, device))
    started = time.perf_counter()
    with shared_bar(len(job.loader.samples), "evaluate") as bar, as_graph(job.model, job.loader):
        dtype = None if job.is_native else torch.float32  # what deployed models take
        found = predict_views(job.model, job.loader, device, dtype, bar)
    parts = gather((*found, job.loader.bad_files))
    return job, parts, time.perf_counter() - started


@dataclass
class Job:
    """What an evaluation needs, checked."""

    model: nn.Module
    source: Path
    """Where the model is."""
    loader: ViewLoader
    """This process's part of the videos."""
    out: Path | None

    @property
    def is_native(self) -> bool:
        """Whether the model is ours, not a deployed file."""
        return isinstance(self.model, VideoViT)


def prepare(args: argparse.Namespace, device: torch.device) -> Job:
    """Reads model and list. Raises ValueError or OSError for what can't be used."""
    if not 0 <= args.max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction must be in [0, 1]: got {args.max_bad_fraction:g}")
    source = fetch(args.model)
    model = load_deployed(source, device)
    config = model.config
    views = config.preprocess.test_views if args.views is None else parse_views(args.views)
    if takes_frames(model) and views[1] != config.preprocess.test_views[1]:
        raise ValueError(
            f"--views must have {config.preprocess.test_views[1]} crops, which {args.model} makes "
            f"itself: got {views[1]}"
        )
    samples = read_list(args.list, args.root, config.num_classes, config.labels)
    out = None if args.out is None else check_output_file(args.out)
    loader = ViewLoader(
        samples,
        config,
        batch_size=args.batch_size,
        test=True,
        views=views,
        rank=rank(),
        world_size=world_size(),
        workers=default_workers(device) if args.workers is None else args.workers,
        device=device,
        whole=takes_frames(model),
    )
    return Job(model, source, loader, out)


def report(args: argparse.Namespace, job: Job, parts: list[Part], seconds: float) -> None:
    """Prints the figures, and writes what `--out` asks for.

    Raises ValueError if too many videos are bad.
    """
    config, samples, views = job.model.config, job.loader.samples, job.loader.views
    indices, probs, bad = zip(*parts, strict=True)
    index, order = torch.cat(indices).sort()
    probs = torch.cat(probs)[order]
    reasons = {name: reason for part in bad for name, reason in part.items()}
    undecodable = {s.name: reasons[s.name] for s in samples if s.name in reasons}
    for reason in undecodable.values():
        print(f"can't be decoded: {reason}")
    figures = metrics(probs, torch.tensor([s.label for s in samples])[index])
    missing = len(samples) - figures["n"]

    name, kind = job.source, "deployed"
    if job.is_native:
        name, kind = model_folder(name), "adapted" if config.adapter else "merged or plain"
        kind += f", {job.model.quantization.title}" if job.model.quantization else ""
    print(f"model        {name} ({kind})")
    print(f"views        {views[0]} clips x {views[1]} crops, softmax averaged")
    for line in occurrence((s.label for s in samples), config.num_classes, config.labels):
        print(f"classes      {line}")
    if others := left_out(args.list):
        print(f"no videos    {some(others)}")
    print(f"videos       {figures['n']} in {seconds:.1f} s", end="")
    print(f" by {len(parts)} processes" if len(parts) > 1 else "", end="")
    print(f"; {missing} undecodable, left out of the accuracy" if missing else "")
    for key, title in (("top1", "top-1"), ("top5", "top-5"), ("mean_class", "mean class")):
        if figures[key] is not None:
            print(f"{title:<12} {figures[key]:6.2f} %")
    print(f"loss         {figures['loss']:6.3f}")
    if (out := job.out) is not None:
        write_predictions(beside(out, "predictions.jsonl"), samples, index, probs, undecodable)
        draw_confusion(beside(out, "confusion.png"), figures["confusion"], config.labels)
        values = {
            "model": str(name),
            "list": args.list,
            "views": list(views),
            **figures,
            "undecodable": undecodable,
            "labels": config.labels,
        }
        write_whole(out, json.dumps(values, indent=1) + "\n")
        beside_it = beside(out, "predictions.jsonl"), beside(out, "confusion.png")
        print(f"written      {out}, {beside_it[0]}, {beside_it[1]}")
    if missing > args.max_bad_fraction * len(samples):
        raise ValueError(
            f"bad videos must be at most --max-bad-fraction {args.max_bad_fraction:g} of "
            f"{len(samples)}: got {missing}, named above; leave them out of the list, or "
            "raise --max-bad-fraction if the rest is what you mean to measure"
        )


def parse_views(text: str) -> tuple[int, int]:
    """`"3x1"` -> (3, 1): clips per video and crops per clip. Raises ValueError."""
    match = re.fullmatch(r"([1-9]\d*)x([13])", text)
    if not match:
        raise ValueError(f"--views must be CLIPSxCROPS, with 1 or 3 crops: got {text!r}")
    return int(match[1]), int(match[2])


def check_output_file(path: str | Path) -> Path:
    """`path`, its folder made and proven writable. Raises OSError or ValueError if it is not."""
    path = Path(path)
    if path.is_dir() or path.suffix != ".json":
        raise ValueError(f"--out must be a .json file: got {path}")
    return check_writable(path, "--out")


def beside(out: Path, name: str) -> Path:
    """`eval.json` -> `eval_<name>` in the same folder, so that two evaluations may share one."""
    return out.with_name(f"{out.stem}_{name}")


def write_predictions(
    path: Path, samples: list[Sample], index: Tensor, probs: Tensor, bad_files: dict[str, str]
) -> None:
    """Writes one JSON line per sample: its path, label and the top classes, or the error."""
    rows = dict(zip(index.tolist(), probs, strict=True))
    lines = []
    for i, sample in enumerate(samples):
        line: dict[str, Any] = {"path": sample.path, "label": sample.label}
        if sample.start is not None or sample.end is not None:
            line |= {"start": sample.start, "end": sample.end}
        if i in rows:
            top = rows[i].topk(min(5, len(rows[i])))
            line["predicted"] = int(top.indices[0])
            line["probability"] = round(float(top.values[0]), 6)
            line["top5"] = top.indices.tolist()
        else:
            line["error"] = bad_files[sample.name]
        lines.append(json.dumps(line) + "\n")
    write_whole(path, "".join(lines))


if __name__ == "__main__":
    sys.exit(run(main))
