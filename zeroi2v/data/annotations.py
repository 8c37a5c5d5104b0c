"""Lists of labelled videos; the kind of a list is recognised by its content.

text      `path label` on each line; the label is the last field, so a path may contain spaces, or
          what follows the last tab, if there is one. A line that begins with "# " is a comment
frames    `folder total label` or `folder offset total label`: videos kept as folders of images
CSV       a header line with `path,label` and optionally `start,end` in seconds
folder    `<class name>/<video file or folder of images>`
official  the lists that UCF101, HMDB51 and Something-Something V2 come with (`official.py`)

A label is a class's number, from 0, or its name; a list has one kind. Names are looked up among the
known classes, such as those of a model; if none are known, the names are numbered in order.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zeroi2v.data.classes import numbers_of, plain_name, some
from zeroi2v.data.official import read_official, read_text
from zeroi2v.data.video_files import VIDEO_SUFFIXES, class_folders, is_video, refuse_url


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
    """For a folder of images: frames to leave out at the beginning, frames to use; None for all."""
    filename_tmpl: str | None = None
    """For a folder of images: their names, such as `img_{:05}.jpg`; None to find out."""
    frames: int | None = None
    """Frames in the decoded file, as a manifest says; None to find out."""

    @property
    def name(self) -> str:
        """The path, with the part of the video that the sample is, if it is not all of it."""
        if self.span is not None:
            return f"{self.path} ({self.span[1]} images after {self.span[0]})"
        if self.start is None and self.end is None:
            return self.path
        return f"{self.path} (from {self.start} to {self.end} s)"


Entries = Iterable[tuple[str, Sample, str]]
"""(place in the list, video, its label as it is written) of each line."""


def read_list(
    source: str | os.PathLike,
    root: str | os.PathLike | None = None,
    num_classes: int | None = None,
    classes: Sequence[str] = (),
    filename_tmpl: str | None = None,
) -> list[Sample]:
    """Reads a list of labelled videos; its format, of those above, is recognised.

    Args:
        source: the list.
        root: put before the paths of a list; a class folder needs none.
        num_classes: how many classes there are; None for as many as the list has.
        classes: their names in order of their numbers, if they are known; the list's own names are
            looked up there.
        filename_tmpl: names the images of videos kept as folders of them.
    Raises:
        ValueError: names the list, the line and the rule: a malformed line, a label that is not in
            0..num_classes-1 or not among the classes, several labels of one video, times out of
            order, a URL, an empty list; a folder whose classes have other names or, where a model's
            have none, are fewer.
        OSError: no such list.
    """
    source = Path(source).expanduser()
    samples, names = _read(source, root, len(classes) or num_classes, classes)
    if not samples:
        raise ValueError(f"list {source} must name at least one video: got none")
    if names and classes:
        numbers = numbers_of(names, classes)
        samples = [replace(sample, label=numbers[sample.label]) for sample in samples]
    elif names and num_classes not in (None, len(names)):
        raise ValueError(
            f"list {source} must have {num_classes} classes, as their names are not known: "
            f"got {len(names)}: {some(names)}"
        )
    if filename_tmpl is not None:
        samples = [replace(sample, filename_tmpl=filename_tmpl) for sample in samples]
    return samples


def class_names(source: str | os.PathLike) -> tuple[str, ...]:
    """Names of the classes of a list in order of their numbers; empty if it has numbers.

    Raises as `read_list` does.
    """
    return tuple(_read(Path(source).expanduser())[1])


def read_videos(source: str | os.PathLike, root: str | os.PathLike | None = None) -> list[Sample]:
    """The videos of a list. Its labels, if it has any, are ignored: all come back as 0.

    Reads what `read_list` does, and text lists with lines that are paths alone. Raises as
    `read_list`.
    """
    source = Path(source).expanduser()
    if not source.is_dir() and read_official(source) is None and source.suffix.lower() != ".csv":
        lines = list(_lines(source))
        if any(_is_path(line, root) for _, line in lines):
            paths = [(w, x if _is_path(x, root) else _split_label(x)[0]) for w, x in lines]
            return [Sample(_join(root, path, where), 0) for where, path in paths]
    return [replace(sample, label=0) for sample in read_list(source, root)]


def _read(
    source: Path,
    root: str | os.PathLike | None = None,
    num_classes: int | None = None,
    classes: Sequence[str] = (),
) -> tuple[list[Sample], dict[str, str]]:
    """Samples numbered by the list itself, and the names of its classes, each with its place."""
    if source.is_dir():
        return _read_folder(source)
    if (official := read_official(source)) is not None:
        entries, names = official
        samples = [Sample(_join(root, path, str(source)), label) for path, label in entries]
        return _as_folders(samples), {plain_name(name): f"list {source}" for name in names}
    read = _read_csv if source.suffix.lower() == ".csv" else _read_text
    entries = list(read(source, root))
    names = _names(entries, classes)
    order = {name: i for i, name in enumerate(names)}
    samples = [
        replace(
            sample,
            label=order[plain_name(label)]
            if names
            else _number(label.strip(), where, num_classes, classes),
        )
        for where, sample, label in entries
    ]
    return samples, names


def _names(entries: Entries, classes: Sequence[str]) -> dict[str, str]:
    """The class names in a list, in order, each with its first place; none if it has numbers."""
    places: dict[str, str] = {}
    for where, _, label in entries:
        places.setdefault(plain_name(label), where)
    numbers = [name for name in places if re.fullmatch(r"[+-]?\d+", name)]
    if len(numbers) == len(places):
        return {}
    known = set(places) <= set(classes)
    for name, where in places.items():
        if not name or os.path.splitext(name)[1].lower() in VIDEO_SUFFIXES:
            raise ValueError(f"{where}: must end with a label: got {name!r}")
        if not known and name not in numbers and (numbers or re.fullmatch(r"[\d.]+", name)):
            beside = f" beside {numbers[0]}" if numbers else ""
            raise ValueError(
                f"{where}: label must be an integer as all labels, or a class name as all are: "
                f"got {name!r}{beside}"
            )
    return dict(sorted(places.items()))


def _number(label: str, where: str, num_classes: int | None, classes: Sequence[str]) -> int:
    number = int(label)
    if number < 0:
        raise ValueError(f"{where}: label must not be negative: got {number}")
    if num_classes is not None and number >= num_classes:
        raise ValueError(f"{where}: label must be below num_classes {num_classes}: got {number}")
    if classes and label in classes and classes[number] != label:
        raise ValueError(
            f"{where}: label must mean one class: got {number}, which is the number of "
            f"{classes[number]!r} and the name of number {classes.index(label)}"
        )
    return number


def _join(root: str | os.PathLike | None, path: str, where: str) -> str:
    refuse_url(path, where)
    root = "" if root is None else os.path.expanduser(root)
    return os.path.join(root, os.path.expanduser(path) if path.startswith("~/") else path)


def _is_path(line: str, root: str | os.PathLike | None) -> bool:
    """Whether all of a line is a path, with no label after it."""
    is_named_so = os.path.splitext(line)[1].lower() in VIDEO_SUFFIXES
    return is_named_so or os.path.exists(os.path.join(root or "", line))


def _lines(source: Path) -> Iterator[tuple[str, str]]:
    """(place, line) of those that are neither blank nor comments."""
    for number, line in enumerate(read_text(source).split("\n"), 1):
        if (line := line.strip()) and not line.startswith("# "):
            yield f"{source} line {number}", line


def _read_text(source: Path, root) -> Entries:
    counts = None
    for where, line in _lines(source):
        path, *label = _split_label(line)
        if not label:
            raise ValueError(f"{where}: must be 'path label': got {line!r}")
        path, numbers = _trailing_numbers(path.rstrip())
        if counts is None:
            counts = len(numbers)
            if counts and os.path.isfile(_join(root, path, where)):
                raise ValueError(f"{where}: a video must have one label: got {line!r}")
        if len(numbers) != counts or counts > 2:
            raise ValueError(
                f"{where}: must be 'path label', or as all lines 'folder total label' or 'folder "
                f"offset total label'; several labels are not supported: got {line!r}"
            )
        span = None
        if counts:
            span = (0, *numbers)[-2:]
            if span[1] < 1:
                raise ValueError(
                    f"{where}: must be 'path label', or 'folder total label' with a total of at "
                    f"least 1; several labels are not supported: got {line!r}"
                )
        yield where, Sample(_join(root, path, where), 0, span=span), label[0]


def _split_label(line: str) -> list[str]:
    """A line's path, and its label if it has one: what follows the last tab, or the last space."""
    return [part.strip() for part in line.rsplit("\t" if "\t" in line else None, maxsplit=1)]


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


def _read_csv(source: Path, root) -> Entries:
    rows = csv.DictReader(io.StringIO(read_text(source), newline=""), skipinitialspace=True)
    columns = [name.strip() for name in rows.fieldnames or []]
    allowed = {"path", "label", "start", "end"}
    if not {"path", "label"} <= set(columns) <= allowed or len(columns) != len(set(columns)):
        raise ValueError(
            f"{source} line 1: the header must be path,label with optional start,end: "
            f"got {','.join(columns)!r}"
        )
    rows.fieldnames = columns
    for row in rows:
        where = f"{source} line {rows.line_num}"
        if None in row or None in row.values() or not row["path"].strip():
            raise ValueError(f"{where}: must have {len(columns)} fields: {','.join(columns)}")
        start, end = (_seconds(row.get(key, ""), key, where) for key in ("start", "end"))
        if end is not None and end <= (start or 0.0):
            raise ValueError(f"{where}: end must be after start: got {start} to {end}")
        yield where, Sample(_join(root, row["path"].strip(), where), 0, start, end), row["label"]


def _read_folder(source: Path) -> tuple[list[Sample], dict[str, str]]:
    folders = class_folders(source)
    if not folders:
        raise ValueError(f"list {source} must contain one folder per class: got none")
    samples = []
    for label, folder in enumerate(folders):
        videos = sorted(
            str(entry)
            for entry in folder.iterdir()
            if is_video(entry) or (entry.is_dir() and entry.name[0] != ".")
        )
        if not videos:
            raise ValueError(f"class folder {folder} must contain a video: got none")
        samples += [Sample(video, label) for video in videos]
    return samples, {plain_name(folder.name): str(folder) for folder in folders}


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
