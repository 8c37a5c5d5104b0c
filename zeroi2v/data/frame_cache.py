"""Reading a sample's frames, whichever way it is kept, and a cache of whole decoded videos.

The cache is a folder with one array file, uint8 [frames, H, W, 3], for each video (or part of
one) as it comes out of decoding, so clips from it are equal bit by bit. A video of 300 frames at
340x256 takes 78 MB: it is meant for small datasets, where decoding is what training waits for.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from zeroi2v.data.annotations import Sample
from zeroi2v.data.decode import read_frames
from zeroi2v.data.frame_folder import read_frame_folder
from zeroi2v.data.gop import Cut, Cutter
from zeroi2v.data.packets import DecodeError

_KEEP_FREE = 0.05
"""Part of the disk that the cache leaves free."""


def read_sample(
    sample: Sample,
    choose: Callable[[int], np.ndarray],
    timeout: float | None = None,
    cache: str | os.PathLike | None = None,
    cutter: Cutter | None = None,
) -> np.ndarray | Cut:
    """The frames of `sample` that `choose` picks, as `decode.read_frames` gives them.

    With `cache`, a folder, they come from there; the first time, the whole video is decoded and
    put there if the disk has the space. Without, and with a `cutter` that takes the video, the
    packets that they are in. Raises DecodeError.
    """
    if os.path.isdir(sample.path):
        if sample.start is not None or sample.end is not None:
            raise DecodeError(f"{sample.path}: is a folder of images, which have no times")
        return read_frame_folder(sample.path, choose, sample.span, sample.filename_tmpl)
    where = sample.start, sample.end, timeout, sample.frames
    if cache is None:
        return read_frames(sample.path, choose, *where, cutter)
    file = _cache_file(sample, Path(cache))
    try:
        video = np.load(file, mmap_mode="r")
    except FileNotFoundError:
        video = _decode_whole(sample, file, timeout)
    except (OSError, ValueError):  # not what was written: a full disk, another program
        video = None
    if video is None:
        return read_frames(sample.path, choose, *where)
    return np.asarray(video[np.asarray(choose(len(video)))])


def _decode_whole(sample: Sample, file: Path, timeout: float | None) -> np.ndarray | None:
    """All frames, which are put into `file`; None where only a part of them can be decoded."""
    try:
        video = read_frames(sample.path, np.arange, sample.start, sample.end, timeout)
    except DecodeError:
        return None  # the wanted frames may be whole
    file.parent.mkdir(parents=True, exist_ok=True)
    disk = shutil.disk_usage(file.parent)
    if disk.free - video.nbytes < _KEEP_FREE * disk.total:
        return video
    number, temporary = tempfile.mkstemp(dir=file.parent, prefix=f".{file.stem}")
    try:
        with open(number, "wb") as stream:
            np.save(stream, video)
        os.replace(temporary, file)
    except OSError:  # not enough space after all
        os.unlink(temporary)
    return video


def _cache_file(sample: Sample, folder: Path) -> Path:
    """Where the sample's frames are kept; another place once the file has changed."""
    try:
        status = os.stat(sample.path)
    except OSError as error:
        raise DecodeError(f"{sample.path}: {error.strerror}") from None
    path = os.path.abspath(sample.path)
    key = (path, status.st_size, status.st_mtime_ns, sample.start, sample.end)
    return folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npy"
