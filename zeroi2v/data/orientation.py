"""The orientation of a video: one of the eight upright ones, or none of them.

The display matrix comes from the container, which has it for every frame, or from the stream (SEI),
which has it at keyframes, or only at the first. A keyframe's matrix applies until the next one, and
the first one's to all groups of pictures without one, so that each frame has the same orientation
however it is reached.

Source: ISO/IEC 14496-12 (matrix of a track), H.264 and H.265 D.2 (display orientation).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import SideDataContainer


class Orientation(NamedTuple):
    """First rows and columns change places, then rows are mirrored, then columns."""

    is_transposed: bool = False
    mirrors_rows: bool = False
    mirrors_columns: bool = False
    is_odd: bool = False
    """Whether an angle is asked for that is not upright; such a picture is left as it is."""

    def __str__(self) -> str:
        return "odd angle" if self.is_odd else _NAMES[self[:3]]


UPRIGHT = Orientation()
_NAMES = {
    (False, False, False): "upright",
    (False, False, True): "mirrored",
    (False, True, False): "upside down, mirrored",
    (False, True, True): "turned by 180 degrees",
    (True, False, True): "turned by 90 degrees",
    (True, True, False): "turned by 270 degrees",
    (True, False, False): "turned by 270 degrees, mirrored",
    (True, True, True): "turned by 90 degrees, mirrored",
}


def orientation_of(frame: av.VideoFrame) -> Orientation | None:
    """The orientation that a frame brings along; None if it brings none."""
    # Not `frame.side_data`: it and the frame would keep each other alive, and the decoder's
    # buffers.
    for data in SideDataContainer(frame):
        if data.type.name == "DISPLAYMATRIX":
            return read_matrix(np.frombuffer(bytes(data), np.int32))
    return None


def read_matrix(matrix: np.ndarray) -> Orientation:
    """Of a display matrix, int32 [9]: it takes (x, y, 1) of the picture to that of the display."""
    a, b, _, c, d = matrix.tolist()[:5]  # x' = a x + c y, y' = b x + d y
    if a and d and not b and not c:
        return Orientation(False, d < 0, a < 0)
    if b and c and not a and not d:
        return Orientation(True, b < 0, c < 0)
    return Orientation(is_odd=True)


def oriented(
    frames: Iterable[av.VideoFrame], first: Orientation | None = None
) -> Iterator[tuple[av.VideoFrame, Orientation]]:
    """Frames in the order they are shown, each with the orientation that applies to it.

    `first` is that of the file's first frame, if these begin later.
    """
    current = first
    for frame in frames:
        own = orientation_of(frame)
        if first is None:
            first = current = own or UPRIGHT
        elif own is not None or frame.key_frame:
            current = own or first
        yield frame, current


def turn(image: np.ndarray, orientation: Orientation) -> np.ndarray:
    """A view of an image [H, W, ...] as it is to be seen."""
    if orientation.is_transposed:
        image = image.swapaxes(0, 1)
    rows = slice(None, None, -1 if orientation.mirrors_rows else 1)
    columns = slice(None, None, -1 if orientation.mirrors_columns else 1)
    return image[rows, columns]
