"""`python -m zeroi2v.init VIDEOS`: from a folder of videos to a training run's config.

    zeroi2v init signs                      a folder with a folder of videos for each class
    zeroi2v init parts.csv --root films     a CSV with path,label and optionally start,end

Decodes every video, leaves bad ones out, and splits the others into training and validation. A
source file, all of its parts and all of its copies lie on one side. Writes `config.yaml`, the lists
and what is known of each video (`manifest.jsonl`) to a folder of their own, and says the next
command. The same videos, seed and share give the same split.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import re
import shlex
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from zeroi2v.check_data import duplicates, label_problems, notes, part_problems, scan
from zeroi2v.cli import run, usable_cores
from zeroi2v.data.annotations import Sample, class_names, read_list
from zeroi2v.data.classes import occurrence, some
from zeroi2v.data.manifest import VideoFacts, manifest_name
from zeroi2v.data.video_files import left_out
from zeroi2v.files import check_writable, write_whole

TEMPLATE = Path(__file__).parent / "train" / "configs" / "own_videos.yaml"
STEPS_PER_EPOCH = 4
"""Optimizer steps an epoch should have, from which the batch follows."""


def main(argv: list[str]) -> None:
    """Looks at the videos `argv` names. Raises ValueError or OSError on bad input or bad data."""
    parser = argparse.ArgumentParser(
        prog="python -m zeroi2v.init",
        description="Splits and checks your videos, and writes the config of a training run.",
    )
    parser.add_argument("videos", help="folder with a folder per class, or CSV: path,label")
    parser.add_argument("--root", help="folder that the paths of a CSV start from")
    parser.add_argument("--out", metavar="FOLDER", help="what to make (default: NAME-training)")
    parser.add_argument("--backbone", metavar="FILE", help="CLIP image weights, as ViT-B-16.pt")
    parser.add_argument("--val", type=float, default=0.2, help="share to validate on (0.2)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: 0)")
    parser.add_argument("--workers", type=int, help="processes (default: one for each core)")
    parser.add_argument("--timeout", type=float, default=60, help="seconds a video (default: 60)")
    args = parser.parse_args(argv)
    videos = Path(args.videos)
    workers = usable_cores() if args.workers is None else args.workers
    if not 0 <= args.val < 1:
        raise ValueError(f"--val must be at least 0 and below 1: got {args.val:g}")
    if args.seed < 0:
        raise ValueError(f"--seed must not be negative: got {args.seed}")
    if workers < 1:
        raise ValueError(f"--workers must be at least 1: got {workers}")
    if not args.timeout > 0:
        raise ValueError(f"--timeout must be positive: got {args.timeout}")
    if not videos.is_dir() and (videos.suffix.lower() != ".csv" or not videos.is_file()):
        raise ValueError(f"videos must be a folder with one per class, or a CSV file: got {videos}")
    if videos.is_dir() and args.root is not None:
        raise ValueError(f"--root must be left out, for a folder is its own: got {args.root}")
    root = args.videos if videos.is_dir() else args.root or "."
    if args.backbone is not None and not Path(args.backbone).exists():
        raise FileNotFoundError(f"--backbone not found: {args.backbone}")
    out = Path(args.out or f"{videos.resolve().stem}-training")
    if (out / "config.yaml").exists():
        raise ValueError(f"--out must hold no config.yaml, which may be edited by now: got {out}")
    check_writable(out / "config.yaml", "--out")

    samples, classes = read_list(videos, root), class_names(videos)
    check_numbers(classes)
    for line in occurrence((s.label for s in samples), count_of(samples, classes), classes):
        print(f"classes     {line}")
    if others := left_out(videos):
        print(f"no videos   {some(others)}")
    names = {sample.path: manifest_name(sample.path, root) for sample in samples}
    rows = scan(names, out / "manifest.jsonl", workers, args.timeout)
    good = [sample for sample in samples if rows[sample.path].error is None]
    for path in names:
        if rows[path].error is not None:
            print(f"bad file    {path}: {rows[path].error} (left out)")
    for text in notes(rows[path] for path in names):
        print(f"note        {text}")
    if not good:
        raise ValueError(f"videos must hold one that decodes: got none of {len(names)}")
    train, val, problems = split(good, rows, args.val, args.seed)
    for text in problems:
        print(f"note        {text}")
    problems = label_problems(good, count_of(samples, classes), classes)
    if len({sample.label for sample in good}) < 2:
        problems.append("a classifier needs two classes that have videos")
    problems += part_problems(good, rows) + duplicates(train, val, rows) + two_classes(good, rows)
    for text in problems:
        print(f"problem     {text}")
    if problems:
        raise ValueError(
            f"found {len(problems)} problems; only {out / 'manifest.jsonl'} is written"
        )

    values = {
        "model.backbone": None if args.backbone is None else os.path.abspath(args.backbone),
        "data.train_list": str(write_list(out / "train.csv", train, root, classes)),
        "data.val_list": str(write_list(out / "val.csv", val, root, classes)) if val else None,
        "data.root": os.path.abspath(root),
        "data.manifest": str((out / "manifest.jsonl").absolute()),
        "optim.batch_size": batch_size(len(train)),
        "optim.micro_batch": min(8, batch_size(len(train))),
        "optim.precision": precision(),
        "run.dir": os.path.abspath(out / "run"),
    }
    text = "".join(TEMPLATE.read_text(encoding="utf-8").partition("\nmodel:\n")[1:])
    title = f"# Of {videos.resolve()}, split with seed {args.seed}. Every key: docs/config.md.\n"
    config = out / "config.yaml"
    write_whole(config, title + filled(text.lstrip("\n"), values))
    print(f"split       {len(train)} to train on, {len(val)} to validate on (seed {args.seed})")
    print(f"written     {config}, train.csv, {'val.csv, ' * bool(val)}manifest.jsonl")
    weights = "" if args.backbone else " model.backbone=ViT-B-16.pt"
    print(f"next        zeroi2v train --config {shlex.quote(str(config))}{weights} --dry-run")
    print("            says what it takes of time and memory; the same without --dry-run trains")


def check_numbers(classes: Sequence[str]) -> None:
    """Raises ValueError if classes are called by numbers that a list would number otherwise."""
    numbers = [name for name in classes if name.isdecimal()]
    if numbers and sorted(numbers, key=int) != [str(i) for i in range(len(classes))]:
        raise ValueError(
            "classes must have names that are no numbers, or the numbers from 0 on: got "
            f"{some(map(repr, numbers))}"
        )


def two_classes(samples: Sequence[Sample], rows: dict[str, VideoFacts]) -> list[str]:
    """Whole files of one content that stand in two classes under two names."""
    files: dict[str, dict[str, int]] = defaultdict(dict)
    for sample in samples:
        if sample.name == sample.path and (digest := rows[sample.path].sha256):
            files[digest][rows[sample.path].path] = sample.label
    torn = [" = ".join(f) for f in files.values() if len(f) > 1 and len(set(f.values())) > 1]
    return [f"{len(torn)} files have a copy in another class: {some(torn)}"] if torn else []


def count_of(samples: Sequence[Sample], classes: Sequence[str]) -> int:
    """How many classes there are: as named, or as the highest number says."""
    return len(classes) or 1 + max(sample.label for sample in samples)


def split(
    samples: Sequence[Sample], rows: dict[str, VideoFacts], share: float, seed: int
) -> tuple[list[Sample], list[Sample], list[str]]:
    """Samples to train on, samples to validate on, and what may surprise about that.

    Those of one source (a file, its parts, its copies) go together. Each class keeps a source to
    train on and, if it has a second one, gives about `share` of its samples, but at least one, to
    validation.

    Args:
        samples: labelled videos, or parts of videos.
        rows: what is known of each path.
        share: of each class, to validate on; 0 for none.
        seed: of the order in which sources are tried.
    """
    sources: dict[str, list[Sample]] = defaultdict(list)
    for sample in samples:
        sources[rows[sample.path].sha256 or sample.path].append(sample)
    # In an order that depends on names alone, so that the seed means the same on each machine.
    groups = sorted(sources.values(), key=lambda group: min(rows[s.path].path for s in group))
    holds = [Counter(sample.label for sample in group) for group in groups]
    total = sum(holds, Counter())
    left = Counter(label for held in holds for label in held)  # sources to train on
    wanted = {label: max(1, round(share * count)) for label, count in total.items()}
    taken: Counter[int] = Counter()
    chosen: set[int] = set()

    def take(number: int) -> None:
        chosen.add(number)
        taken.update(holds[number])
        left.subtract(holds[number].keys())

    order = np.random.default_rng(seed).permutation(len(groups)).tolist() if share else []
    for number in order:
        held = holds[number]
        if all(left[k] > 1 and taken[k] + held[k] <= wanted[k] for k in held):
            take(number)
    for label in sorted(total):  # whose sources are all too large: the smallest one
        able = [n for n in order if label in holds[n] and all(left[k] > 1 for k in holds[n])]
        if able and not taken[label]:
            take(min(able, key=lambda n: holds[n].total()))

    surprises = []
    copies = [group for group in groups if len({s.path for s in group}) > 1]
    if copies:
        told = [" = ".join(sorted({rows[s.path].path for s in group})) for group in copies]
        surprises.append(f"{len(copies)} files have copies, kept on one side: {some(told)}")
    without = len(total) - len(taken)
    if share and without:
        surprises.append(
            f"{without} of {len(total)} classes have one source alone, so nothing to validate on"
        )
    train = [s for n, group in enumerate(groups) if n not in chosen for s in group]
    val = [s for n, group in enumerate(groups) if n in chosen for s in group]
    return train, val, surprises


def write_list(path: Path, samples: Sequence[Sample], root: str, classes: Sequence[str]) -> Path:
    """Writes a CSV that `read_list` reads with `root`; returns its absolute path."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = any(sample.start is not None or sample.end is not None for sample in samples)
    writer.writerow(["path", "label", "start", "end"] if parts else ["path", "label"])
    for sample in samples:
        label = classes[sample.label] if classes else sample.label
        times = ["" if t is None else t for t in (sample.start, sample.end)] if parts else []
        writer.writerow([manifest_name(sample.path, root), label, *times])
    write_whole(path, text.getvalue())
    return path.absolute()


def batch_size(videos: int) -> int:
    """Clips a step: a power of two from 1 to 64 that leaves an epoch enough steps."""
    return max([b for b in (1, 2, 4, 8, 16, 32, 64) if b * STEPS_PER_EPOCH <= videos] or [1])


def precision() -> str:
    """What trains best on this machine."""
    import torch

    return "bf16" if torch.cuda.is_available() else "fp32"


def filled(template: str, values: dict[str, object]) -> str:
    """A YAML file of sections with the values of `section.key` replaced, its comments kept."""
    lines, section = [], ""
    for line in template.splitlines():
        if opened := re.match(r"(\w+):", line):
            section = opened[1]
        found = re.fullmatch(r"  (\w+):\s*([^#]*?)(\s*#.*)?", line)
        key = found and f"{section}.{found[1]}"
        if key in values:
            value, comment = values[key], (found[3] or "").strip()
            line = f"  {found[1]}: {quoted(value)}"
            line = f"{line:<31} {comment}".rstrip()
        lines.append(line)
    return "\n".join(lines) + "\n"


def quoted(value: object) -> str:
    """A value as YAML; text that could be read otherwise is quoted."""
    import yaml

    return yaml.safe_dump(value, width=10**9, allow_unicode=True).splitlines()[0]


if __name__ == "__main__":
    sys.exit(run(main))
