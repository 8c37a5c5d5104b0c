"""Classify videos with a model folder, an ONNX file or an exported program alike.

    python -m zeroi2v.predict MODEL VIDEO [VIDEO …] [--topk 5] [--json]
    python -m zeroi2v.predict MODEL FOLDER --out all.jsonl      as it goes; a second run resumes,
                                                                with the same model and settings
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
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from zeroi2v.cli import run
from zeroi2v.data.annotations import Sample, read_videos
from zeroi2v.data.classes import some
from zeroi2v.data.live_input import as_file
from zeroi2v.data.video_files import find_videos
from zeroi2v.drawing.timeline import draw_timeline, timeline
from zeroi2v.files import check_writable, write_whole
from zeroi2v.inference import choose_device, predict_each
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
    args = parser.parse_args(argv)
    started = time.perf_counter()
    names, others = find_videos(args.video)
    if others:
        print(f"no videos, left out: {some(others)}", file=sys.stderr)
    names += read_paths(args.list, args.root) if args.list else []
    if not names:
        raise ValueError("videos must be given: as files, folders, a --list, - or camera:0")
    for name in ("topk", "batch_size"):
        if (value := getattr(args, name)) < 1:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} must be at least 1: got {value}")
    device = choose_device(args.device)
    for name in ("window", "stride", "seconds"):
        if (value := getattr(args, name)) is not None and not value > 0:
            raise ValueError(f"--{name} must be positive seconds: got {value:g}")
    if args.timeline is not None:
        check_writable(Path(args.timeline) / "x.json", "--timeline")
    if args.restart and not args.out:
        raise ValueError("--restart needs the --out file to start over")
    out = Results(args.out, args.restart) if args.out else None
    todo = [n for n in dict.fromkeys(names) if out is None or n not in out.done]
    failed = 0 if out is None else sum(not out.done[n] for n in set(names) & out.done.keys())
    source = fetch(args.model)
    model = load_deployed(source, device)
    if out is not None:
        out.begin(args.model, settings_of(model, source, **_settings(model, args)))
    if len(todo) < len(set(names)):
        print(f"{len(set(names)) - len(todo)} done before", file=sys.stderr)
    # The bar is for long jobs; a few files are done before it could be read.
    hidden = True if len(todo) < 16 and args.timeline is None else None
    with ExitStack() as stack:
        files = {stack.enter_context(as_file(name, args.seconds)): name for name in todo}
        bar = stack.enter_context(tqdm(total=len(todo), unit="video", disable=hidden))
        if out is not None:
            stack.enter_context(out.file)
        if args.timeline is not None:
            results = _timelines(model, files, args)
        else:
            samples = [Sample(path, 0) for path in files]
            results = predict_each(model, samples, args.topk, batch_size=args.batch_size)
        for result in results:
            path, result["path"] = result["path"], files[result["path"]]
            if "error" in result:
                failed += 1
                result["error"] = result["error"].replace(path, result["path"])
            if out is not None:
                out.add(result)
            if args.json or out is None:
                _show(result, args.json)
            bar.update(1)
    if failed:
        where = args.out or "above"
        raise ValueError(f"{failed} of {len(set(names))} files can't be decoded: see {where}")
    seconds = time.perf_counter() - started
    print(f"{len(set(names))} classified in {seconds:.1f} s", file=sys.stderr)


def _settings(model: nn.Module, args) -> dict[str, Any]:
    """The options that decide the results."""
    if args.timeline is None:
        return {"views": list(model.config.preprocess.test_views), "topk": args.topk}
    return {"views": [1, 1], "topk": args.topk, "window": args.window or "default",
            "stride": args.stride or "default"}  # fmt: skip


def _timelines(model: nn.Module, files: dict[str, str], args) -> Iterator[dict[str, Any]]:
    """Writes a JSON and a PNG for each file; yields its path and where they are, or its error."""
    taken: Counter[str] = Counter()
    for path, name in files.items():
        stem = "pipe" if name == "-" else Path(name).stem.replace(":", "")
        taken[stem] += 1
        target = Path(args.timeline) / (f"{stem}_{taken[stem]}" if taken[stem] > 1 else stem)
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
