"""Frames of a video that is kept as a folder of numbered images, such as `img_00001.jpg`."""

from __future__ import annotations

import os
import re
from collections.abc import Callable

import av
import numpy as np

from zeroi2v.data.decode import check_clip_size
from zeroi2v.data.packets import DecodeError
from zeroi2v.data.video_files import IMAGE_SUFFIXES

_SUFFIX = "|".join(map(re.escape, sorted(IMAGE_SUFFIXES)))
_IMAGE = re.compile(rf"(.*?)(\d+)({_SUFFIX})", re.IGNORECASE)
_FLOW = re.compile(r"(flow_?)?[xy]_", re.IGNORECASE)


def read_frame_folder(
    path: str | os.PathLike,
    choose: Callable[[int], np.ndarray],
    span: tuple[int, int] | None = None,
    filename_tmpl: str | None = None,
) -> np.ndarray:
    """Reads the frames that `choose` picks: RGB, uint8 [*indices.shape, H, W, 3].

    Frame 0 is the image with the lowest number, and each number must be there once. `span` =
    (offset, total) leaves out the first `offset` frames and uses the `total` after them. Without
    `filename_tmpl` (as in `img_{:05}.jpg`) the images must be of one kind, optical flow (`x_…`,
    `flow_y_…`) apart. `choose` is as in `decode.read_frames`. Raises DecodeError.
    """
    path = os.fspath(path)
    try:
        names = _names(path, filename_tmpl)
        offset, total = (0, len(names)) if span is None else span
        if offset + total > len(names):
            raise DecodeError(
                f"must contain the {total} frames after {offset} that the list names: "
                f"got {len(names)} images"
            )
        indices = np.asarray(choose(total))
        frames: dict[int, np.ndarray] = {}
        for i in sorted(set(indices.ravel().tolist())):
            frames[i] = _read_image(os.path.join(path, names[offset + i]))
            if len(frames) == 1:
                check_clip_size(frames[i].shape, indices.size)
            elif frames[i].shape != next(iter(frames.values())).shape:
                raise DecodeError(f"changes its frames at {names[offset + i]}")
    except DecodeError as error:
        raise DecodeError(f"{path}: {error}") from None
    except OSError as error:
        raise DecodeError(f"{path}: {error.strerror}") from None
    packed = np.stack([frames[i] for i in indices.ravel().tolist()])
    return packed.reshape(*indices.shape, *packed.shape[1:])


def _names(path: str, filename_tmpl: str | None) -> list[str]:
    """Names of the images in order of their numbers."""
    if filename_tmpl is not None:
        pattern = re.sub(r"\\\{[^{}]*\\\}", r"(\\d+)", re.escape(filename_tmpl))
        found = [(re.fullmatch(pattern, name), name) for name in os.listdir(path)]
        kinds = {filename_tmpl: [(int(match[1]), name) for match, name in found if match]}
    else:
        kinds = {}
        for name in os.listdir(path):
            match = _IMAGE.fullmatch(name)
            if match and name[0] != "." and not _FLOW.fullmatch(match[1]):
                kinds.setdefault((match[1], match[3]), []).append((int(match[2]), name))
        if len(kinds) > 1:
            some = sorted(f"{prefix}…{suffix}" for prefix, suffix in kinds)
            raise DecodeError(f"contains several kinds of images, give filename_tmpl: {some}")
    images = sorted(image for kind in kinds.values() for image in kind)
    if not images:
        raise DecodeError(f"is a folder without images {filename_tmpl or 'that are numbered'}")
    first, last = images[0][0], images[-1][0]
    if [number for number, _ in images] != list(range(first, last + 1)):
        raise DecodeError(f"must have each image once: got {len(images)} from {first} to {last}")
    return [name for _, name in images]


def _read_image(path: str) -> np.ndarray:
    try:
        with av.open(f"file:{path}", options={"protocol_whitelist": "file"}) as container:
            return next(container.decode(video=0)).to_ndarray(format="rgb24")
    except (av.FFmpegError, StopIteration, IndexError):
        raise DecodeError(f"image {os.path.basename(path)} cannot be decoded") from None
