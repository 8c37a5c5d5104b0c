"""Which files are videos, by their names, and which are left out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

_SUFFIXES = """
    3g2 3gp asf avi divx f4v flv gif m2t m2ts m2v m4v mkv mov mp4 mpeg mpg mts mxf ogg ogv ts vob
    webm wmv
"""
VIDEO_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
IMAGE_SUFFIXES = frozenset((".bmp", ".jpeg", ".jpg", ".png", ".webp"))
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_video(path: Path) -> bool:
    """Whether a file found in a folder counts as a video; hidden files do not."""
    return path.suffix.lower() in VIDEO_SUFFIXES and path.name[0] != "."


def find_videos(names: Iterable[str]) -> tuple[list[str], list[str]]:
    """Videos among `names` and in the folders among them, however deep, sorted; and what is left
    out there, hidden files apart.

    A folder of images is a video itself. Raises ValueError for a folder of neither, and for a URL.
    """
    found: list[str] = []
    others: list[str] = []
    for name in names:
        refuse_url(name, "video")
        if not os.path.isdir(name):
            found.append(name)
            continue
        files = [
            path
            for path in sorted(Path(name).rglob("*"))
            if path.is_file() and not any(part[0] == "." for part in path.relative_to(name).parts)
        ]
        videos = [str(path) for path in files if is_video(path)]
        images = any(p.suffix.lower() in IMAGE_SUFFIXES and p.parent == Path(name) for p in files)
        if not videos and not images:
            raise ValueError(f"folder must contain video files: got {name}")
        found += videos or [name]
        others += [str(path) for path in files if videos and not is_video(path)]
    return found, others


def left_out(source: str | os.PathLike) -> list[str]:
    """The files beside the videos of a folder per class that are taken for something else.

    Hidden files are not named, nor what lies in a folder of images; a list has none.
    """
    source = Path(source).expanduser()
    folders = [source, *class_folders(source)] if source.is_dir() else []
    return sorted(
        str(entry)
        for folder in folders
        for entry in folder.iterdir()
        if entry.is_file() and entry.name[0] != "." and not is_video(entry)
    )


def class_folders(source: Path) -> list[Path]:
    """The folders in `source`, hidden ones apart, in order of their names."""
    return sorted(f for f in source.iterdir() if f.is_dir() and f.name[0] != ".")


def refuse_url(path: str, where: str) -> None:
    """Raises ValueError if `path` is a URL: nothing is downloaded."""
    if _URL.match(path):
        raise ValueError(f"{where}: must be a file on this machine: got the URL {path}")
