"""Files and folders that are there whole or not at all."""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_writable(path: str | Path, name: str) -> Path:
    """`path` as a Path, its parent made and proven writable; `name` is what an OSError calls it."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{name} can't be written: {path} ({error.strerror})") from None
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place when the block ends without error."""
    temporary = path.with_name(f".{path.stem}.tmp{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that is there whole or not at all, and on the disk."""
    with whole_file(path) as temporary, open(temporary, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """A temporary folder beside `folder` that takes its place when the block ends without error."""
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    temporary.chmod(0o755)
    try:
        yield temporary
        for file in temporary.iterdir():
            file.chmod(0o644)  # safetensors lets its owner alone read it
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if folder.exists() and not _exchange(temporary, folder):
            old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
            os.replace(folder, old)
            os.replace(temporary, folder)
            shutil.rmtree(old)
        elif not folder.exists():
            os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders in one go, so that neither is ever missing; False where that can't be."""
    if sys.platform != "linux":
        return False
    at_working_folder, exchange = -100, 2
    rename = ctypes.CDLL(None).renameat2
    return rename(at_working_folder, bytes(one), at_working_folder, bytes(other), exchange) == 0
