"""Corrects decoders that ignore a file's colour tags, so that all of them give the same frames.

A file's tags say by which matrix, and in which range, its Y'CbCr was made from RGB. FFmpeg follows
them (untagged is BT.601, limited range), other decoders do not. Two matrices of one range differ by
a 3 x 3 matrix on RGB, up to rounding, and to the clipping of colours outside of the cube.

Source: ITU-R BT.601, BT.709 and BT.2020, and H.273 for the tags.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Matrix = Literal["bt601", "bt709", "bt2020", "fcc", "smpte240m"]
_WEIGHTS: dict[Matrix, tuple[float, float]] = {  # of red and of blue in luma
    "bt601": (0.299, 0.114),
    "bt709": (0.2126, 0.0722),
    "bt2020": (0.2627, 0.0593),
    "fcc": (0.30, 0.11),
    "smpte240m": (0.212, 0.087),
}
_BY_TAG: dict[int, Matrix] = {
    1: "bt709",
    2: "bt601",  # untagged, as FFmpeg reads it
    4: "fcc",
    5: "bt601",
    6: "bt601",
    7: "smpte240m",
    9: "bt2020",
}
MATRIX_TAGS = tuple(_BY_TAG)
_FULL_RANGE = 2


def tags(codec) -> tuple[int, bool]:
    """Number of the matrix in H.273, and whether the range is full, of a PyAV codec context."""
    full = int(codec.color_range) == _FULL_RANGE or (codec.pix_fmt or "").startswith("yuvj")
    return int(codec.colorspace), full


def matrix_of(tag: int) -> Matrix | None:
    """The matrix that a tag stands for; None for one that is no matrix on Y'CbCr."""
    return _BY_TAG.get(tag)


def to_rgb(matrix: Matrix) -> np.ndarray:
    """The matrix from (Y', Cb, Cr), full range, chroma around 0, to R'G'B': float64 [3, 3]."""
    red, blue = _WEIGHTS[matrix]
    green = 1 - red - blue
    return np.array(
        [
            [1, 0, 2 * (1 - red)],
            [1, -2 * blue * (1 - blue) / green, -2 * red * (1 - red) / green],
            [1, 2 * (1 - blue), 0],
        ]
    )


def correction(decoded: Matrix, wanted: Matrix) -> np.ndarray:
    """Turns RGB decoded by one matrix into that of another: float32 [3, 3]."""
    if decoded == wanted:
        return np.eye(3, dtype=np.float32)
    return (to_rgb(wanted) @ np.linalg.inv(to_rgb(decoded))).astype(np.float32)
