"""Classify videos with a model folder, an ONNX file or an exported program alike.

    python -m zeroi2v.predict MODEL VIDEO [VIDEO …] [--topk 5] [--json]
    python -m zeroi2v.predict MODEL FOLDER --out all.jsonl      as it goes; a second run resumes,
                                                                with the same model and settings
    torchrun --nproc_per_node 8 -m zeroi2v.predict MODEL … --out all.jsonl     8 GPUs share them
    python -m zeroi2v.predict MODEL LONG.mp4 --timeline FOLDER  what happens when
    … | python -m zeroi2v.predict MODEL -                       a pipe; camera:0 is a camera

Frames, views and pixels are those of `evaluate`: same loader, same averaging. A file that can't be
decoded is named and the others go on; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from zeroi2v.cli import run
from zeroi2v.data.annotations import Sample, read_videos
from zeroi2v.data.classes import some
from zeroi2v.data.live_input import as_file, is_live
from zeroi2v.data.video_files import find_videos
from zeroi2v.drawing.timeline import draw_timeline, timeline
from zeroi2v.files import check_writable, write_whole
from zeroi2v.inference import choose_device, predict_each
from zeroi2v.processes import (
    first_alone,
    gather,
    joined,
    rank,
    shared_bar,
    together,
    told_once,
    world_size,
)
from zeroi2v.storage.checkpoint import fetch
from zeroi2v.storage.results import Results, settings_of
from zeroi2v.storage.runtimes import load_deployed


def read_paths(source: str, root: str | None) -> list[str]:
    """The videos of a list. Raises as `read_videos`, and ValueError for parts of videos."""
    samples = read_videos(source, root)
    for sample in samples:
        if sample.name != sample.path:
            raise ValueError(
                f"list {source} must name whole videos, for windows see --timeline: "
                f"got {sample.name}"
            )
    return [sample.path for sample in samples]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m zeroi2v.predict", description="Classify videos.", allow_abbrev=False
    )
    parser.add_argument("model", help="model or run folder, .onnx or .pt2 file, or name on the hub")
    parser.add_argument("video", nargs="*", help="file, folder (of images too), - (pipe), camera:0")
    parser.add_argument("--list", help="text list, CSV, folder per class; labels are not needed")
    parser.add_argument("--root", help="folder the list's paths are relative to")
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: the GPU if there is one)")
    parser.add_argument("--batch-size", type=int, default=8, help="videos at once (default: 8)")
    parser.add_argument("--topk", type=int, default=5, help="classes to name (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON line per video")
    parser.add_argument("--out", help=".jsonl file to write as it goes, or to continue")
    parser.add_argument("--restart", action="store_true", help="start the --out file over")
    parser.add_argument("--timeline", metavar="FOLDER", help="classify windows; JSON and PNG there")
    parser.add_argument("--window", type=float, help="seconds of a window (default: of a clip)")
    parser.add_argument("--stride", type=float, help="seconds between windows (default: half)")
    parser.add_argument("--seconds", type=float, default=5, help="of a camera (default: 5)")
    args = parser.parse_intermixed_args(argv)
    advice = "start it again: it continues the --out file"
    started = time.perf_counter()
    with joined() as device:
        with told_once(advice):
            job, failed = classify(args, device)
        if rank():  # the first one does the rest
            return
        if world_size() > 1:
            job.out.collect(args.batch_size)
    if failed:
        where = args.out or "above"
        raise ValueError(f"{failed} of {job.count} files can't be decoded: see {where}")
    print(f"{job.count} classified in {time.perf_counter() - started:.1f} s", file=sys.stderr)


def classify(args: argparse.Namespace, device: torch.device | None) -> tuple[Job, int]:
    """What was to be done, and how many videos of all processes can't be decoded."""
    job = together(lambda: prepare(args, device))
    if job.out is not None:
        first_alone(lambda: job.out.collect(args.batch_size))
    # The bar is for long jobs; a few files are done before it could be read.
    hidden = True if len(job.todo) < 16 and args.timeline is None else None
    failed = job.failed
    with ExitStack() as stack:
        files = {stack.enter_context(as_file(name, args.seconds)): name for name in job.todo}
        advance = stack.enter_context(shared_bar(len(files), hidden=hidden))
        if job.out is not None:
            part = rank() if world_size() > 1 else None
            stack.enter_context(job.out.open(args.model, job.settings, part))
        for result in _results(job.model, files, args):
            path, result["path"] = result["path"], files[result["path"]]
            if "error" in result:
                failed += 1
                result["error"] = result["error"].replace(path, result["path"])
            if job.out is not None:
                job.out.add(result)
            if args.json or job.out is None:
                _show(result, args.json)
            advance(1)
    return job, sum(gather(failed))


@dataclass
class Job:
    """What a prediction needs, checked."""

    model: nn.Module
    todo: list[str]
    """The videos, of all processes, but for those done before."""
    count: int
    """All videos."""
    failed: int
    """How many of those done before can't be decoded, as the first process counts them."""
    out: Results | None
    settings: dict[str, Any]


def prepare(args: argparse.Namespace, device: torch.device | None) -> Job:
    """Reads names, results of an earlier run and the model; nothing is written yet.

    `device` is what a launcher gave this process. Raises ValueError or OSError for what can't be
    used.
    """
    names, others = find_videos(args.video)
    if others and rank() == 0:
        print(f"no videos, left out: {some(others)}", file=sys.stderr)
    names += read_paths(args.list, args.root) if args.list else []
    if not names:
        raise ValueError("videos must be given: as files, folders, a --list, - or camera:0")
    names = list(dict.fromkeys(names))
    for name in ("topk", "batch_size"):
        if (value := getattr(args, name)) < 1:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} must be at least 1: got {value}")
    if device is None or args.device is not None:
        device = choose_device(args.device)
    for name in ("window", "stride", "seconds"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"--{name} must be positive seconds: got {value:g}")
    if args.timeline is not None:
        check_writable(Path(args.timeline) / "x.json", "--timeline")
    if args.restart and not args.out:
        raise ValueError("--restart needs the --out file to start over")
    if world_size() > 1:
        if not args.out:
            raise ValueError("processes that share videos need an --out file: got none")
        if live := [name for name in names if is_live(name)]:
            raise ValueError(f"processes can share files only: got {live[0]}")
    out = Results(args.out, args.restart) if args.out else None
    done = out.done if out is not None else {}
    todo = [name for name in names if name not in done]
    source = fetch(args.model)
    model = load_deployed(source, device)
    settings = {}
    if out is not None:
        settings = settings_of(model, source, **_settings(model, args))
        out.check(settings)
    if len(todo) < len(names) and rank() == 0:
        print(f"{len(names) - len(todo)} done before", file=sys.stderr)
    failed = 0 if rank() else sum(not done[name] for name in names if name in done)
    return Job(model, todo, len(names), failed, out, settings)


def _results(
    model: nn.Module, files: dict[str, str], args: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Those of this process's share of `files`, which are paths and how they were named."""
    if args.timeline is not None:
        return _timelines(model, files, args)
    samples = [Sample(path, 0) for path in files]
    share = rank(), world_size()
    return predict_each(model, samples, args.topk, batch_size=args.batch_size, share=share)


def _settings(model: nn.Module, args) -> dict[str, Any]:
    """The options that decide the results."""
    if args.timeline is None:
        return {"views": list(model.config.preprocess.test_views), "topk": args.topk}
    return {"views": [1, 1], "topk": args.topk, "window": args.window or "default",
            "stride": args.stride or "default"}  # fmt: skip


def _timelines(model: nn.Module, files: dict[str, str], args) -> Iterator[dict[str, Any]]:
    """Writes a JSON and a PNG for each file; yields its path and where they are, or its error."""
    taken: Counter[str] = Counter()
    for position, (path, name) in enumerate(files.items()):
        stem = "pipe" if name == "-" else Path(name).stem.replace(":", "")
        taken[stem] += 1
        target = Path(args.timeline) / (f"{stem}_{taken[stem]}" if taken[stem] > 1 else stem)
        if position // args.batch_size % world_size() != rank():
            continue  # another process's
        try:
            result = timeline(model, path, args.window, args.stride, args.topk)
        except ValueError as error:
            yield {"path": path, "error": str(error)}
            continue
        if all("error" in window for window in result["windows"]):
            yield {"path": path, "error": result["windows"][0]["error"]}
            continue
        result["path"] = name
        target = target.with_name(f"{target.name}.json")  # a stem may hold dots
        write_whole(target, json.dumps(result, indent=1) + "\n")
        draw_timeline(result, target.with_suffix(".png"))
        yield {"path": path, "timeline": str(target), "windows": result["windows"]}


def _show(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result), flush=True)
    elif "error" in result:
        print(f"can't be decoded: {result['error']}")
    elif "windows" in result:
        print(f"{result['path']}: {result['timeline']}")
        for window in result["windows"]:
            best = window["topk"][0] if "topk" in window else {"label": window["error"]}
            share = f"{100 * best.get('probability', 0):6.2f} %"
            print(f"    {window['start']:8.2f} s  {share}  {best['label']}")
    else:
        print(result["path"])
        for row in result["topk"]:
            print(f"    {100 * row['probability']:6.2f} %  {row['label']}", flush=True)


if __name__ == "__main__":
    sys.exit(run(main))
