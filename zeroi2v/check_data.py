"""`python -m zeroi2v.check_data LIST --root DIR --out MANIFEST`: is a dataset fit to train on?

Decodes every video in parallel and writes what it finds as JSON lines. A second run continues where
the first one stopped, and checks again only what has changed. Names bad files, suspicious labels,
and videos that occur twice in a list, or in both the training and the validation list.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from zeroi2v.cli import run, usable_cores
from zeroi2v.data.annotations import Sample, class_names, read_list
from zeroi2v.data.classes import count_from_one, occurrence, some
from zeroi2v.data.manifest import (
    VideoFacts,
    inspect_video,
    manifest_line,
    manifest_name,
    read_manifest,
)
from zeroi2v.data.video_files import left_out
from zeroi2v.files import write_whole


def main(argv: list[str]) -> None:
    """Checks the lists `argv` names. Raises ValueError or OSError on bad input or bad data."""
    parser = argparse.ArgumentParser(
        prog="python -m zeroi2v.check_data",
        description="Decodes every video of a list and says what is wrong with it or its labels.",
    )
    parser.add_argument("list", help="text list, CSV, folder per class or a dataset's own list")
    parser.add_argument("--root", help="folder the list's paths are relative to")
    parser.add_argument(
        "--out", required=True, help="manifest to write (JSON lines), or to continue"
    )
    parser.add_argument("--val", metavar="LIST", help="a second list, which must not share a video")
    parser.add_argument("--val-root", help="folder of its paths (default: that of --root)")
    parser.add_argument("--num-classes", type=int, help="expected number of classes")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds a video (default: 60)")
    args = parser.parse_args(argv)
    workers = usable_cores() if args.workers is None else args.workers
    if workers < 1:
        raise ValueError(f"--workers must be at least 1: got {workers}")
    if not args.timeout > 0:
        raise ValueError(f"--timeout must be positive: got {args.timeout}")

    train = read_list(args.list, args.root)
    val_root = args.root if args.val_root is None else args.val_root
    val = read_list(args.val, val_root) if args.val else []
    names = {sample.path: manifest_name(sample.path, args.root) for sample in train}
    names |= {s.path: manifest_name(s.path, val_root) for s in val if s.path not in names}
    classes = class_names(args.list)
    num_classes = args.num_classes or len(classes) or 1 + max(s.label for s in train)

    problems = label_problems(train, num_classes, classes)
    if val:
        val_classes = class_names(args.val)
        problems += name_problems(classes, val_classes)
        if not val_classes:
            problems += [f"--val: {text}" for text in label_problems(val, num_classes, classes)]
    for line in occurrence((s.label for s in train), num_classes, classes):
        print(f"classes     {line}")
    for source in filter(None, (args.list, args.val)):
        if others := left_out(source):
            print(f"no videos   {some(others)}")
    rows = scan(names, Path(args.out), workers, args.timeout)
    bad = [f"{path}: {rows[path].error}" for path in names if rows[path].error]
    for text in bad:
        print(f"bad file    {text}")
    problems += part_problems(train + val, rows) + duplicates(train, val, rows)
    for text in notes(rows[path] for path in names):
        print(f"note        {text}")
    for text in problems:
        print(f"problem     {text}")
    frames = sum(rows[path].frames or 0 for path in names)
    print(f"videos      {len(names)} with {frames} frames, of them {len(bad)} bad")
    print(f"written     {args.out}")
    if bad or problems:
        raise ValueError(f"found {len(bad)} bad files and {len(problems)} other problems")


def scan(names: dict[str, str], out: Path, workers: int, timeout: float) -> dict[str, VideoFacts]:
    """Facts of each path of `names` (path -> name in the manifest), kept in file `out`."""
    known = read_manifest(out) if out.exists() else {}
    rows = {}
    for path, name in names.items():
        if name in known and _is_unchanged(path, known[name]):
            rows[path] = known[name]
    out.parent.mkdir(parents=True, exist_ok=True)
    # The lines of an earlier scan come first; this drops a line that was cut short.
    kept = known | {rows[path].path: rows[path] for path in rows}
    write_whole(out, "".join(map(manifest_line, kept.values())))
    todo = [(path, name, timeout) for path, name in names.items() if path not in rows]
    bar = tqdm(total=len(names), initial=len(rows), desc="check", unit="video", disable=None)
    with bar, open(out, "a", encoding="utf-8", buffering=1) as file:
        for path, facts in _inspect_all(todo, workers):
            rows[path] = facts
            file.write(manifest_line(facts))
            bar.update()
    return rows


def _is_unchanged(path: str, facts: VideoFacts) -> bool:
    try:
        status = os.stat(path)
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (facts.size, facts.mtime_ns)


def _inspect_all(todo: list[tuple], workers: int) -> Iterator[tuple[str, VideoFacts]]:
    """Results in the order they are found. A file that kills its process is bad."""
    rest = iter(todo)
    crashed: list[tuple] = []
    while True:
        running: dict[Future, tuple] = {}
        with _pool(workers) as pool:
            try:
                while True:
                    for job in islice(rest, 2 * workers - len(running)):
                        running[pool.submit(_inspect, inspect_video, job)] = job
                    if not running:
                        break
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        facts = future.result()
                        yield running.pop(future)[0], facts
            except BrokenProcessPool:
                crashed = list(running.values())
        if not running:
            return
        for job in crashed:  # one of them did it: from now on each has its own process
            with _pool(1) as pool:
                try:
                    facts = pool.submit(_inspect, inspect_video, job).result()
                except BrokenProcessPool:
                    facts = VideoFacts(job[1], error="crashes or hangs the decoder")
            yield job[0], facts


def _inspect(inspect: Callable[..., VideoFacts], job: tuple) -> VideoFacts:
    """`inspect(*job)`; ends this process if that hangs long after its time limit."""
    signal.setitimer(signal.ITIMER_REAL, 2 * job[2])
    try:
        return inspect(*job)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _pool(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def label_problems(
    samples: list[Sample], num_classes: int, classes: tuple[str, ...] = ()
) -> list[str]:
    """Problems with the labels of a list, for that many classes with these names, if any."""
    counts = Counter(sample.label for sample in samples)
    high, problems = max(counts), []
    if high >= num_classes:
        problems.append(f"labels must be below {num_classes}: got {high}")
    missing = [label for label in range(num_classes) if label not in counts]
    if count_from_one(counts, num_classes):
        problems.append(f"labels go from 1 to {high}: they should count from 0")
    elif missing:
        names = [repr(classes[label]) for label in missing] if classes else missing
        problems.append(f"{len(missing)} of {num_classes} labels have no video: {some(names)}")
    return problems


def name_problems(classes: tuple[str, ...], val_classes: tuple[str, ...]) -> list[str]:
    """How the class names of the second list differ from the first's, where both have some."""
    if not classes or not val_classes:
        return []
    unknown = [repr(name) for name in val_classes if name not in classes]
    missing = [repr(name) for name in classes if name not in val_classes]
    problems = []
    if unknown:
        problems.append(f"--val: {len(unknown)} classes are not in the list: {some(unknown)}")
    if missing:
        problems.append(
            f"--val: {len(missing)} of {len(classes)} classes are missing: {some(missing)}"
        )
    return problems


def notes(rows: Iterable[VideoFacts]) -> list[str]:
    """Surprising properties of videos that decode."""
    good = [row for row in rows if row.error is None]
    kinds = {
        "have an odd rotation angle, which is ignored": [
            row.path for row in good if row.orientation == "odd angle"
        ],
        "have pixels that are not square, which is ignored": [
            f"{row.path} ({row.pixel_aspect:g})"
            for row in good
            if row.pixel_aspect not in (None, 1)
        ],
        "are HDR, and are read as SDR": [row.path for row in good if row.hdr],
        "contain less than their header says": [
            f"{row.path} ({short})" for row in good if (short := _shortness(row))
        ],
    }
    return [f"{len(names)} videos {what}: {some(names)}" for what, names in kinds.items() if names]


def _shortness(row: VideoFacts) -> str:
    """The frames or the length that the header gives and the video lacks; empty if none."""
    if row.header_frames and row.frames < row.header_frames:
        return f"frames {row.frames} to {row.header_frames - 1} of {row.header_frames}"
    length = (row.last or 0) + 1 / (row.fps or 25)
    if row.header_seconds and row.last is not None and length < 0.9 * row.header_seconds - 0.5:
        return f"{length:g} of {row.header_seconds:g} s"
    return ""


def part_problems(samples: list[Sample], rows: dict[str, VideoFacts]) -> list[str]:
    """Parts that begin or end after the end of their video."""
    late, long = [], []
    for sample in samples:
        row = rows[sample.path]
        if row.last is None:
            continue
        end = row.last + 1 / (row.fps or 25)
        if sample.start is not None and sample.start > row.last:
            late.append(f"{sample.name}, {end:.3f} s long")
        elif sample.end is not None and sample.end > end + 0.5 / (row.fps or 25):
            long.append(f"{sample.name}, {end:.3f} s long")
    return [
        f"{len(names)} parts {what} the end of their video: {some(names)}"
        for what, names in (("begin after", late), ("reach past", long))
        if names
    ]


def duplicates(train: list[Sample], val: list[Sample], rows: dict[str, VideoFacts]) -> list[str]:
    """Duplicates: by path and part within a list, by path or content between the lists."""
    problems = []
    for kind, samples in (("", train), ("--val: ", val)):
        parts: dict[tuple, set[int]] = defaultdict(set)
        twice = []
        for sample in samples:
            part = (sample.path, sample.start, sample.end, sample.span)
            if part in parts:
                twice.append(sample.path)
            parts[part].add(sample.label)
        several = [part[0] for part, labels in parts.items() if len(labels) > 1]
        if twice:
            problems.append(f"{kind}{len(twice)} videos are listed twice: {some(twice)}")
        if several:
            problems.append(f"{kind}{len(several)} videos have several labels: {some(several)}")
    by_path: dict[str, list[Sample]] = defaultdict(list)
    by_hash: dict[str | None, list[Sample]] = defaultdict(list)
    for sample in train:
        by_path[sample.path].append(sample)
        by_hash[rows[sample.path].sha256].append(sample)
    shared = []
    for sample in val:
        digest = rows[sample.path].sha256
        same = by_path[sample.path] or (by_hash[digest] if digest else [])
        twin = next((other for other in same if _overlap(sample, other)), None)
        if twin is not None:
            other = "" if twin.path == sample.path else f" (= {twin.path})"
            shared.append(f"{sample.name}{other}")
    shared = list(dict.fromkeys(shared))
    if shared:
        problems.append(f"{len(shared)} videos are in both lists: {some(shared)}")
    return problems


def _overlap(one: Sample, other: Sample) -> bool:
    """Whether two parts of the same video have something in common."""
    if one.span is not None or other.span is not None:
        first, second = (s.span or (0, math.inf) for s in (one, other))
        return first[0] < sum(second) and second[0] < sum(first)
    return (one.start or 0) < (math.inf if other.end is None else other.end) and (
        other.start or 0
    ) < (math.inf if one.end is None else one.end)


if __name__ == "__main__":
    sys.exit(run(main))
