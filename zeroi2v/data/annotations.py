"""Lists of labelled videos; what kind a list is, it tells itself.

text      `path label` on each line; the label is the last field, so a path may hold spaces
frames    `folder total label` or `folder offset total label`: videos kept as folders of images
CSV       a header line with `path,label` and optionally `start,end` in seconds
folder    `<class name>/<video file or folder of images>`; classes in order of their names
official  the lists that UCF101, HMDB51 and Something-Something V2 come with (`official.py`)
"""

from __future__ import annotations

import csv
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from zeroi2v.data.official import read_official, read_text

_SUFFIXES = "3gp asf avi flv m2ts m4v mkv mov mp4 mpeg mpg ogv ts webm wmv"
VIDEO_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())


@dataclass(frozen=True, slots=True)
class Sample:
    """One labelled video, or the part of it between two times."""

    path: str
    """Path of the video file, or of a folder with an image for each frame."""
    label: int
    """Class index, from 0."""
    start: float | None = None
    """Start of the labelled part, in seconds from the first frame; None for the beginning."""
    end: float | None = None
    """End of the labelled part (exclusive), in seconds; None for the end of the video."""
    span: tuple[int, int] | None = None
    """Of a folder of images: frames to leave out at the beginning, frames to use; None for all."""
    filename_tmpl: str | None = None
    """Of a folder of images: their names, such as `img_{:05}.jpg`; None to find out."""
    frames: int | None = None
    """Frames that decoding the whole file gives, where a manifest tells; None to find out."""

    @property
    def name(self) -> str:
        """The path, with the part of the video that the sample is, if it is not all of it."""
        if self.span is not None:
            return f"{self.path} ({self.span[1]} images after {self.span[0]})"
        if self.start is None and self.end is None:
            return self.path
        return f"{self.path} (from {self.start} to {self.end} s)"


def read_list(
    source: str | os.PathLike,
    root: str | os.PathLike | None = None,
    num_classes: int | None = None,
    filename_tmpl: str | None = None,
) -> list[Sample]:
    """Reads a list of labelled videos; which of the formats above it has is told by itself.

    `root` is put before the paths of a list (a class folder needs none); `filename_tmpl` names
    the images of videos kept as folders of them. Raises ValueError that names the list, the line
    and the rule: a malformed line, a label that is not an integer in 0..num_classes-1, several
    labels of one video, times out of order, an empty list; OSError if there is no such list.
    """
    source, root = Path(source), "" if root is None else root
    if source.is_dir():
        samples = _read_folder(source, num_classes)
    elif (official := read_official(source)) is not None:
        entries, names = official
        _check_classes(source, names, num_classes)
        samples = [Sample(os.path.join(root, path), label) for path, label in entries]
        samples = _as_folders(samples)
    else:
        read = _read_csv if source.suffix.lower() == ".csv" else _read_text
        samples = read(read_text(source), source, root, num_classes)
    if not samples:
        raise ValueError(f"list {source} must name at least one video: got none")
    if filename_tmpl is not None:
        samples = [replace(sample, filename_tmpl=filename_tmpl) for sample in samples]
    return samples


def class_names(source: str | os.PathLike) -> tuple[str, ...]:
    """Names of the classes in order of their index; empty for text and CSV lists, which have none.

    Raises ValueError if `source` is a directory without class folders, and as `read_list` does.
    """
    source = Path(source)
    if not source.is_dir():
        official = read_official(source)
        return () if official is None else official[1]
    names = tuple(sorted(f.name for f in source.iterdir() if f.is_dir() and f.name[0] != "."))
    if not names:
        raise ValueError(f"list {source} must hold one folder per class: got none")
    return names


def _read_text(text: str, source: Path, root, num_classes: int | None) -> list[Sample]:
    samples, counts = [], None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        where = f"{source} line {number}"
        path, *label = line.strip().rsplit(maxsplit=1)
        if not label:
            raise ValueError(f"{where}: must be 'path label': got {line.strip()!r}")
        label = _label(label[0], where, num_classes)
        path, numbers = _trailing_numbers(path)
        if counts is None:
            counts = len(numbers)
            if counts and os.path.isfile(os.path.join(root, path)):
                raise ValueError(f"{where}: a video must have one label: got {line.strip()!r}")
        if len(numbers) != counts or counts > 2:
            raise ValueError(
                f"{where}: must be 'path label', or as all lines 'folder total label' or 'folder "
                f"offset total label'; several labels are not supported: got {line.strip()!r}"
            )
        span = None
        if counts:
            span = (0, *numbers)[-2:]
            if span[1] < 1:
                raise ValueError(
                    f"{where}: must be 'path label', or 'folder total label' with a total of at "
                    f"least 1; several labels are not supported: got {line.strip()!r}"
                )
        samples.append(Sample(os.path.join(root, path), label, span=span))
    return samples


def _trailing_numbers(text: str) -> tuple[str, list[int]]:
    """`"imgs 2 5"` -> (`"imgs"`, [2, 5]); the path itself is never taken for a number."""
    numbers: list[int] = []
    while match := re.fullmatch(r"(.*\S)\s+(\d+)", text):
        text = match[1]
        numbers.insert(0, int(match[2]))
    return text, numbers


def _as_folders(samples: list[Sample]) -> list[Sample]:
    """The samples, or where the first one's video is a folder of images, those folders."""
    first = samples[0].path if samples else ""
    if os.path.exists(first) or not os.path.isdir(os.path.splitext(first)[0]):
        return samples
    return [replace(sample, path=os.path.splitext(sample.path)[0]) for sample in samples]


def _read_csv(text: str, source: Path, root, num_classes: int | None) -> list[Sample]:
    rows = csv.DictReader(text.splitlines(), skipinitialspace=True)
    columns = [name.strip() for name in rows.fieldnames or []]
    allowed = {"path", "label", "start", "end"}
    if not {"path", "label"} <= set(columns) <= allowed or len(columns) != len(set(columns)):
        raise ValueError(
            f"{source} line 1: the header must be path,label with optional start,end: "
            f"got {','.join(columns)!r}"
        )
    rows.fieldnames = columns
    samples = []
    for row in rows:
        where = f"{source} line {rows.line_num}"
        if None in row or None in row.values() or not row["path"].strip():
            raise ValueError(f"{where}: must have {len(columns)} fields: {','.join(columns)}")
        start, end = (_seconds(row.get(key, ""), key, where) for key in ("start", "end"))
        if end is not None and end <= (start or 0.0):
            raise ValueError(f"{where}: end must be after start: got {start} to {end}")
        path = os.path.join(root, row["path"].strip())
        samples.append(Sample(path, _label(row["label"], where, num_classes), start, end))
    return samples


def _read_folder(source: Path, num_classes: int | None) -> list[Sample]:
    names = class_names(source)
    _check_classes(source, names, num_classes)
    samples = []
    for label, name in enumerate(names):
        videos = sorted(
            str(entry)
            for entry in (source / name).iterdir()
            if entry.name[0] != "." and (entry.suffix.lower() in VIDEO_SUFFIXES or entry.is_dir())
        )
        if not videos:
            raise ValueError(f"class folder {source / name} must hold a video: got none")
        samples += [Sample(video, label) for video in videos]
    return samples


def _check_classes(source: Path, names: tuple[str, ...], num_classes: int | None) -> None:
    if num_classes is not None and len(names) > num_classes:
        raise ValueError(f"list {source} must have at most {num_classes} classes: got {len(names)}")


def _label(text: str, where: str, num_classes: int | None) -> int:
    try:
        label = int(text)
    except ValueError:
        raise ValueError(f"{where}: label must be an integer: got {text!r}") from None
    if label < 0:
        raise ValueError(f"{where}: label must not be negative: got {label}")
    if num_classes is not None and label >= num_classes:
        raise ValueError(f"{where}: label must be below num_classes {num_classes}: got {label}")
    return label


def _seconds(text: str, name: str, where: str) -> float | None:
    if not text.strip():
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{where}: {name} must be seconds from 0: got {text!r}")
    return seconds
