"""A file of one JSON line per video, written as they are done; a second run continues it.

Each line says what it came from: the hash of the weights and of the config, the views, how many
classes are named. A file never has lines of different settings.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

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
    """The results in `path`, a .jsonl file; nothing is changed before `begin`.

    `restart` discards what the file contains. Raises OSError if it can't be written, ValueError if
    it is no .jsonl file or contains anything but results.
    """

    def __init__(self, path: str, restart: bool = False):
        if Path(path).suffix != ".jsonl":
            raise ValueError(f"--out must be a .jsonl file: got {path}")
        self.path = check_writable(path, "--out")
        self.done: dict[str, bool] = {}
        """Whether each video of the file was classified."""
        self._known: dict[str, Any] | None = None
        content = b"" if restart or not self.path.exists() else self.path.read_bytes()
        self._size = content.rfind(b"\n") + 1  # a stopped run may have left part of a line
        for number, line in enumerate(content[: self._size].splitlines(), 1):
            try:
                row = json.loads(line)
                name, settings = row["path"], row.get("settings")
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"--out {path} must contain only results: line {number}") from None
            if not isinstance(settings, dict):
                raise ValueError(
                    f"--out {path} does not say which weights its results are of: line {number}; "
                    "name another file, or start over with --restart"
                )
            self._known = self._known or settings
            self._check(settings, self._known)
            if not is_live(name):
                self.done[name] = "error" not in row

    def begin(self, model: str, settings: dict[str, Any]) -> None:
        """Opens the file for results of `settings`; `model` is what its lines call the model.

        Raises ValueError that names what differs if it contains results of other settings.
        """
        self._check(self._known or settings, settings)
        self._head = {"model": model, "settings": settings}
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 (closed by main)
        self.file.truncate(self._size)

    def _check(self, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
        names = [n for n in {**theirs, **ours} if theirs.get(n) != ours.get(n)]
        if names:
            some = ", ".join(f"{n} {theirs.get(n)}, not {ours.get(n)}" for n in names)
            raise ValueError(
                f"--out {self.path} contains results of {some}: "
                "name another file, or start over with --restart"
            )

    def add(self, result: dict[str, Any]) -> None:
        """Writes a result so that it survives a kill right after."""
        self.file.write(json.dumps({**self._head, **result}) + "\n")
        self.file.flush()
