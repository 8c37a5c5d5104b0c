"""A file of one JSON line per video, written as they are done; a second run continues it.

Each line says what it came from: the hash of the weights and of the config, the views, how many
classes are named. A file never has lines of different settings. Processes that share the videos
write a part each, `all.jsonl.part0` beside `all.jsonl`; the first one collects them.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any

from torch import nn

from zeroi2v.data.live_input import is_live
from zeroi2v.files import check_writable
from zeroi2v.model.vit import VideoViT
from zeroi2v.storage.checkpoint import weights_hash


def settings_of(model: nn.Module, source: Path, **more: Any) -> dict[str, Any]:
    """What decides the results of a model, as JSON values.

    Args:
        model: as `load_deployed` gives it.
        source: path that it was read from.
        more: further settings, by name.
    Returns:
        `weights`, the hash of a model's tensors, or of the content of an ONNX or program file;
        `config`, the hash of its architecture, preprocessing and labels; and `more`.
    """
    if isinstance(model, VideoViT):
        weights = weights_hash(model.state_dict())
    else:
        digest = hashlib.sha256()
        with open(source, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        weights = digest.hexdigest()[:16]
    config = json.dumps(model.config.to_dict(), sort_keys=True)
    return {"weights": weights, "config": hashlib.sha256(config.encode()).hexdigest()[:16], **more}


class Results:
    """The results in `path`, a .jsonl file, and its parts; nothing is changed before `collect`.

    `restart` discards what they contain. Raises OSError if the file can't be written, ValueError if
    it is no .jsonl file or contains anything but results.
    """

    def __init__(self, path: str, restart: bool = False):
        if Path(path).suffix != ".jsonl":
            raise ValueError(f"--out must be a .jsonl file: got {path}")
        self.path = check_writable(path, "--out")
        self.done: dict[str, bool] = {}
        """Whether each video of the file was classified."""
        self._known: dict[str, Any] | None = None
        self._discarded = restart
        for file in [] if restart else [self.path, *self._parts()]:
            for number, line in enumerate(_lines(file), 1):
                self._read(file, number, line)

    def _read(self, file: Path, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            name, settings = row["path"], row.get("settings")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(f"--out {file} must contain only results: line {number}") from None
        if not isinstance(settings, dict):
            raise ValueError(
                f"--out {file} does not say which weights its results are of: line {number}; "
                "name another file, or start over with --restart"
            )
        self._known = self._known or settings
        self.check(settings)
        if not is_live(name):
            self.done[name] = "error" not in row

    def _parts(self) -> list[Path]:
        """What processes have written beside the file, in their order."""
        start = f"{self.path.name}.part"
        numbers = {
            int(file.name.removeprefix(start)): file
            for file in self.path.parent.iterdir()
            if file.name.startswith(start) and file.name.removeprefix(start).isdecimal()
        }
        return [numbers[n] for n in sorted(numbers)]

    def collect(self, size: int = 1) -> None:
        """Moves the parts into the file: `size` lines of each in turn, as the videos were shared.

        To be called by one process, before any writes and after all have written.
        """
        parts, lines = self._parts(), [] if self._discarded else _lines(self.path)
        with open(self.path, "ab") as file:
            file.truncate(sum(map(len, lines)))  # a stopped run may have left part of a line
            if parts and not self._discarded:
                known = {_name(line) for line in lines}  # was this stopped half-way?
                more = [[li for li in _lines(part) if _name(li) not in known] for part in parts]
                for first in range(0, max(map(len, more)), size):
                    for part in more:
                        file.writelines(part[first : first + size])
            file.flush()
            os.fsync(file.fileno())
        for part in parts:
            part.unlink()
        self._discarded = False

    def open(self, model: str, settings: dict[str, Any], part: int | None = None) -> IO[str]:
        """The file, or a part of it, for results of `settings` and of what is called `model`."""
        self._head = {"model": model, "settings": settings}
        path = self.path if part is None else Path(f"{self.path}.part{part}")
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by who gets it)
        return self._file

    def check(self, settings: dict[str, Any]) -> None:
        """Raises ValueError that names what differs if the file has results of other settings."""
        theirs = self._known or settings
        names = [n for n in {**theirs, **settings} if theirs.get(n) != settings.get(n)]
        if names:
            some = ", ".join(f"{n} {theirs.get(n)}, not {settings.get(n)}" for n in names)
            raise ValueError(
                f"--out {self.path} contains results of {some}: "
                "name another file, or start over with --restart"
            )

    def add(self, result: dict[str, Any]) -> None:
        """Writes a result so that it survives a kill right after."""
        self._file.write(json.dumps({**self._head, **result}) + "\n")
        self._file.flush()


def _lines(path: Path) -> list[bytes]:
    """The whole lines of a file, which may be missing."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return lines if not lines or lines[-1].endswith(b"\n") else lines[:-1]


def _name(line: bytes) -> str:
    return json.loads(line)["path"]
