"""The lists that datasets are published with, as they come: UCF101, HMDB51, Something-Something V2.

UCF101   `trainlist01.txt` (`Class/video.avi 7`, classes from 1) and `testlist01.txt` (paths only),
         with `classInd.txt` beside them
HMDB51   a folder of `<class>_test_split1.txt` files (`video.avi 0|1|2`: unused, train, test);
         `FOLDER:train1` or `FOLDER:test3` says which part of which split
SSv2     JSON of `{"id": …, "template": …}` with `labels.json` beside it (any `*labels.json`), and
         the `id;class` lines of the test answers
"""

from __future__ import annotations

import json
import re
from pathlib import Path

_HMDB51 = re.compile(r"(?P<folder>.+):(?P<part>train|test)(?P<split>[1-3])")
_HMDB51_FILE = re.compile(r"(?P<name>.+)_test_split(?P<split>[1-3])\.txt")
_UCF101_FILE = re.compile(r"(train|test)list0[1-3].*\.txt")

Entries = tuple[list[tuple[str, int]], tuple[str, ...]]
"""(path below the dataset's folder, class index from 0) of each video; the names of the classes."""


def read_official(source: Path) -> Entries | None:
    """Entries and class names of a dataset's own list; None if `source` is not one.

    Raises ValueError that names the list, the line and the rule; OSError if a file is missing.
    """
    if match := _HMDB51.fullmatch(str(source)):
        return _read_hmdb51(Path(match["folder"]), match["part"], match["split"])
    if _HMDB51_FILE.fullmatch(source.name):
        raise ValueError(
            f"list {source} is one class of an HMDB51 split: give {source.parent}:train1 for the "
            "training part of split 1, or test1 for its test part"
        )
    if _UCF101_FILE.fullmatch(source.name):
        return _read_ucf101(source)
    if source.suffix.lower() == ".json":
        return _read_ssv2(source)
    if source.suffix.lower() == ".csv" and re.match(r"\d+;", read_text(source)):
        return _read_ssv2_answers(source)
    return None


def read_text(path: Path) -> str:
    """Content of a list. Raises FileNotFoundError or ValueError that names it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise FileNotFoundError(f"list not found: {path}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"list {path} must be a UTF-8 text file: {error}") from None


def _lines(path: Path):
    """(place for messages, fields) of the lines that are not blank."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield f"{path} line {number}", line.split()


def _read_ucf101(source: Path) -> Entries:
    index_file = source.with_name("classInd.txt")
    if not index_file.is_file():
        raise FileNotFoundError(
            f"list {source} needs UCF101's classInd.txt beside it: got none in {source.parent}"
        )
    index_of: dict[str, int] = {}
    for where, fields in _lines(index_file):
        if len(fields) != 2 or fields[0] != str(len(index_of) + 1):
            raise ValueError(
                f"{where}: must be '{len(index_of) + 1} ClassName': got {' '.join(fields)!r}"
            )
        index_of[fields[1]] = len(index_of)
    entries = []
    for where, (path, *number) in _lines(source):
        name = path.split("/")[0]
        if name not in index_of:
            raise ValueError(f"{where}: folder must be a class of classInd.txt: got {name!r}")
        if number not in ([], [str(index_of[name] + 1)]):
            raise ValueError(
                f"{where}: class of {name} must be {index_of[name] + 1} as in classInd.txt: "
                f"got {' '.join(number)!r}"
            )
        entries.append((path, index_of[name]))
    return entries, tuple(index_of)


def _read_hmdb51(folder: Path, part: str, split: str) -> Entries:
    if not folder.is_dir():
        raise FileNotFoundError(f"folder of HMDB51 splits not found: {folder}")
    files = {}
    for file in folder.iterdir():
        match = _HMDB51_FILE.fullmatch(file.name)
        if match and match["split"] == split:
            files[match["name"]] = file
    if not files:
        raise ValueError(
            f"{folder} must contain files named <class>_test_split{split}.txt: got none"
        )
    names = tuple(sorted(files))
    wanted, entries = {"train": "1", "test": "2"}[part], []
    for label, name in enumerate(names):
        for where, fields in _lines(files[name]):
            if len(fields) != 2 or fields[1] not in ("0", "1", "2"):
                raise ValueError(f"{where}: must be 'video.avi 0|1|2': got {' '.join(fields)!r}")
            if fields[1] == wanted:
                entries.append((f"{name}/{fields[0]}", label))
    return entries, names


def _read_ssv2(source: Path) -> Entries:
    text = read_text(source)
    rows = _json(text, source)
    keys = {"id", "template"}
    if not isinstance(rows, list):
        raise ValueError(f"{source} line 1: must be a list of {{id, template}}: got another type")
    index_of, entries = _ssv2_classes(source), []
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in keys):
            raise ValueError(
                f"{source} line {_line_of_object(text, number)}: must have text for 'id' and "
                f"'template' (the test list has no classes: use the answers): got {row!r}"
            )
        name = row["template"].replace("[", "").replace("]", "")
        if name not in index_of:
            raise ValueError(
                f"{source} line {_line_of_object(text, number)}: template must be a class of the "
                f"labels file: got {row['template']!r}"
            )
        entries.append((f"{row['id']}.webm", index_of[name]))
    return entries, tuple(index_of)


def _read_ssv2_answers(source: Path) -> Entries:
    index_of, entries = _ssv2_classes(source), []
    for where, fields in _lines(source):
        number, _, name = " ".join(fields).partition(";")
        if not number.isdigit() or name not in index_of:
            raise ValueError(f"{where}: must be 'id;class' of the labels file: got {number};{name}")
        entries.append((f"{number}.webm", index_of[name]))
    return entries, tuple(index_of)


def _ssv2_classes(source: Path) -> dict[str, int]:
    """Class index by name, in order, from the labels file beside `source`."""
    files = sorted(source.parent.glob("*labels.json"))
    if len(files) != 1:
        raise FileNotFoundError(
            f"list {source} needs one labels.json (or *-labels.json) beside it: got {len(files)}"
        )
    classes = _json(read_text(files[0]), files[0])
    try:
        index_of = {name: int(number) for name, number in classes.items()}
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"{files[0]} must map class names to numbers") from None
    if sorted(index_of.values()) != list(range(len(index_of))):
        raise ValueError(f"{files[0]} must number its classes 0..{len(index_of) - 1}, each once")
    return dict(sorted(index_of.items(), key=lambda item: item[1]))


def _json(text: str, source: Path):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source} line {error.lineno}: must be JSON: {error.msg}") from None


def _line_of_object(text: str, number: int) -> int:
    """Line where the object of that number, from 0, begins in a list of flat objects."""
    begins = [match.start() for match in re.finditer(r"\{", text)]
    return 1 + text.count("\n", 0, begins[min(number, len(begins) - 1)] if begins else 0)
