"""The classes of a dataset: their numbers and names, how often they occur, what looks wrong.

A class has the same number everywhere, the model's. If names are known, a list's classes are
matched with the model's by name, never by position.
"""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

from zeroi2v.data.official import read_text


def read_labels(path: str | os.PathLike) -> tuple[str, ...]:
    """The class names in a text file, one a line in order of their numbers.

    Raises OSError if there is none, ValueError if it has no name, or one of them twice.
    """
    names = tuple(plain_name(line) for line in read_text(Path(path)).split("\n") if line.strip())
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        got = f"{twice[0]!r} {names.count(twice[0])} times" if twice else "none"
        raise ValueError(f"labels file {path} must name each class once: got {got}")
    return names


def plain_name(text: str) -> str:
    """A class name without surrounding space, its accents composed, which files may not do."""
    return unicodedata.normalize("NFC", text.strip())


def numbers_of(names: Mapping[str, str], classes: Sequence[str]) -> list[int]:
    """The number of each of `names` among `classes`.

    Args:
        names: class names of a list, each with its place for messages.
        classes: all names, in order of their numbers.
    Raises:
        ValueError: names that are not among the classes; the nearest ones are suggested.
    """
    number = {name: i for i, name in enumerate(classes)}
    unknown = [name for name in names if name not in number]
    if unknown:
        near = difflib.get_close_matches(unknown[0], classes, n=3, cutoff=0.6)
        hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"as {some(classes)}"
        raise ValueError(
            f"{names[unknown[0]]}: class must be one of the {len(classes)} known, {hint}: "
            f"got {some(map(repr, unknown))}"
        )
    return [number[name] for name in names]


def occurrence(labels: Iterable[int], num_classes: int, classes: Sequence[str] = ()) -> list[str]:
    """Lines about how often classes occur in a list: how many do, which don't, how unevenly.

    Args:
        labels: the class number of each video.
        num_classes: how many classes there are.
        classes: their names, if they have any.
    """
    counts = Counter(labels)
    lines = [f"{len(counts)} of {num_classes} occur"]
    missing = [_called(i, classes) for i in range(num_classes) if i not in counts]
    if missing:
        lines[0] += f"; no video of {some(missing)}"
    if not classes and count_from_one(counts, num_classes):
        lines.append("labels start at 1: are they counted from 1? The first class is number 0")
    (most, high), (least, low) = counts.most_common()[0], counts.most_common()[-1]
    if high > 5 * low:
        lines.append(
            f"uneven: {high} videos of {_called(most, classes)}, {low} of {_called(least, classes)}"
        )
    return lines


def count_from_one(labels: Collection[int], num_classes: int) -> bool:
    """Whether the numbers of a list look as if the first class were number 1."""
    high = max(labels)
    return min(labels) == 1 and high in (len(labels), num_classes, num_classes - 1)


def some(items: Iterable) -> str:
    """The first five, and how many more there are."""
    items = list(items)
    return ", ".join(map(str, items[:5])) + (f" and {len(items) - 5} more" if items[5:] else "")


def _called(label: int, classes: Sequence[str]) -> str:
    return repr(classes[label]) if classes else str(label)
