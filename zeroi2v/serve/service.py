"""What the page and the API share: requests that are checked, answers in one line, and films."""

from __future__ import annotations

import os
import secrets
from collections import OrderedDict
from pathlib import Path
from typing import Any

from zeroi2v.serve.limits import Limits, Refused
from zeroi2v.serve.worker import Busy, TooSlow, Worker

KEPT = 32
"""Videos whose player works; older ones are forgotten."""


class Problem(Exception):
    """What a request is answered with that can't be done: a status of HTTP and one line."""

    def __init__(self, status: int, line: str):
        super().__init__(line)
        self.status = status


class Service:
    """What the page and the API share: the worker, the folder, and the films of the player."""

    def __init__(self, worker: Worker, limits: Limits, folder: Path | None, films: Path):
        self.worker, self.limits = worker, limits
        self.folder = None if folder is None else folder.resolve()
        self._films, self._shown = films, OrderedDict()

    def ask(self, name: str, kind: str, path: str, *arguments: Any) -> Any:
        """`Worker.ask` about the video at `path`, called `name` in what a Problem says."""
        try:
            return self.worker.ask(kind, path, *arguments)
        except Busy as error:
            raise Problem(503, str(error)) from None
        except TooSlow as error:
            raise Problem(504, f"{name}: {error}") from None
        except Refused as error:
            line = " ".join(str(error).split()).replace(path, name)
            raise Problem(400, line if name in line else f"{name}: {line}") from None
        except RuntimeError:
            raise Problem(500, f"{name}: a fault of the server, which its terminal shows") from None

    def within(self, path: str) -> str:
        """The file that `path` names in the folder that may be read. Raises Problem."""
        if self.folder is None:
            raise Problem(403, "path needs a server that was started with --folder")
        if "\0" in path:
            raise Problem(400, "path must be the name of a file")
        found = (self.folder / os.path.expanduser(path)).resolve()
        if not found.is_relative_to(self.folder):
            raise Problem(403, f"path must lie in the folder of --folder: got {path}")
        if not found.is_file():
            raise Problem(404, f"path must name a file in the folder of --folder: got {path}")
        return str(found)

    def check_size(self, name: str, size: int) -> None:
        """Raises Problem if a file of `size` bytes is too large."""
        if size > 1e6 * self.limits.megabytes:
            raise Problem(413, f"{name}: must be at most {self.limits.megabytes:g} MB")

    def film(self, name: str, path: str) -> str | None:
        """Where a browser finds a film of the video, or None if there is none for it."""
        token = secrets.token_urlsafe(16)
        made = self._films / f"{token}.mp4"
        try:
            itself = self.ask(name, "preview", path, str(made))
        except Problem:
            return None
        self._shown[token] = Path(path) if itself else made
        while len(self._shown) > KEPT:
            old = self._shown.popitem(last=False)[1]
            if old.parent == self._films:
                old.unlink(missing_ok=True)
        return f"/film/{token}"

    def shown(self, token: str) -> Path | None:
        """The file of a film, if it is still there."""
        path = self._shown.get(token)
        return path if path is not None and path.is_file() else None
