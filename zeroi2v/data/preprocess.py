"""From decoded frames to a model's input, in PyTorch: the same on every device, and in exports.

Models trained by MMAction2, the published ones among them, saw frames resized by OpenCV's bilinear
interpolation, without antialiasing. Its fixed-point arithmetic is repeated here in integers, so a
model is given the very pixels that it was trained on, on a GPU as on a CPU.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zeroi2v.config import PreprocessConfig

_ONE = 2**11
"""The whole weight of a pixel, in OpenCV's fixed-point arithmetic."""


def crop_views(
    frames: Tensor, short_side: int, side: int, crops: int, process: PreprocessConfig
) -> Tensor:
    """Frames resized to a short side, and square crops of them.

    Args:
        frames: uint8 `[..., H, W, 3]`.
        short_side: what the shorter of H and W becomes; the other one keeps the shape.
        side: height and width of a crop, at most `short_side`.
        crops: 1, the centre; or 3, the left, centre and right (top, centre and bottom of upright
            frames), as MMAction2's `ThreeCrop` takes them.
        process: whose `interpolation` and `antialias` say how.
    Returns:
        uint8 `[crops, ..., side, side, 3]`.
    """
    old = [torch.scalar_tensor(n, dtype=torch.float64) for n in frames.shape[-3:-1]]
    # A number over a tensor would be its reciprocal times the number, which rounds twice.
    scale = torch.scalar_tensor(short_side, dtype=torch.float64) / torch.minimum(*old)
    new = [(n * scale + 0.5).floor().clamp(min=short_side) for n in old]
    free = [n - side for n in new]
    middle = [(n / 2).floor() for n in free]
    upright = old[0] > old[1]
    # From 0 to twice the middle along the longer side, which leaves out an odd last pixel.
    corners = [
        (middle[0] * torch.where(upright, place, 1), middle[1] * torch.where(upright, 1, place))
        for place in ((1,) if crops == 1 else (0, 1, 2))
    ]
    resize = _crop_like_opencv
    if process.interpolation != "bilinear" or process.antialias:
        frames = _interpolate(frames, [int(n) for n in new], process)
        resize = _cut
    return torch.stack([resize(frames, old, new, corner, side) for corner in corners])


def normalise(video: Tensor, process: PreprocessConfig) -> Tensor:
    """uint8 `[..., T, H, W, 3]` -> float32 `[..., 3, T, H, W]`, by mean and std of `process`."""
    mean, std = (torch.tensor(x, device=video.device) for x in (process.mean, process.std))
    return ((video.float() - mean) / std).movedim(-1, -4).contiguous()


def _crop_like_opencv(
    frames: Tensor, old: list[Tensor], new: list[Tensor], corner: tuple[Tensor, Tensor], side: int
) -> Tensor:
    """`cv2.resize(frame, INTER_LINEAR)`, computed where the crop is; uint8 `[..., side, side, 3]`.

    After `resize.cpp` of OpenCV: rounded weights of 11 bits, products cut to 16 bits on the way.
    """
    (top, bottom, down), (left, right, across) = (
        _neighbours(*axis, side, frames.device) for axis in zip(old, new, corner, strict=True)
    )
    # On the edge of a row, but not of a column, one pixel has all of the weight.
    across = (across * (left < right)).repeat_interleave(3)  # for each colour

    def row(rows: Tensor) -> Tensor:
        rows = frames.index_select(-3, rows)
        near, far = (rows.index_select(-2, x).flatten(-2).int() for x in (left, right))
        return near * (_ONE - across) + far * across

    down = down[:, None]
    upper = ((row(top) >> 4) * (_ONE - down)) >> 16
    lower = ((row(bottom) >> 4) * down) >> 16
    return ((upper + lower + 2) >> 2).to(torch.uint8).unflatten(-1, (-1, 3))


def _neighbours(
    old: Tensor, new: Tensor, corner: Tensor, side: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Which two of `old` pixels each of `side` pixels after `corner` lies between, of `new` in all.

    Returns their positions, int64 `[side]`, and the weight of the second, int32 `[side]`.
    """
    centre = torch.arange(side, dtype=torch.float64) + corner + 0.5
    # In OpenCV's order of operations and in its precisions: a weight may lie on the edge.
    place = (centre * (1 / (new / old)) - 0.5).float()
    low = place.floor()
    weight = ((place - low) * _ONE).round().int()
    low, last = low.long(), (old - 1).long()
    low, high = (n.clamp(min=0).minimum(last) for n in (low, low + 1))
    return low.to(device), high.to(device), weight.to(device)


def _interpolate(frames: Tensor, size: list[int], process: PreprocessConfig) -> Tensor:
    """Whole frames resized, in float32 one by one, for they may be large."""
    out = frames.new_empty(*frames.shape[:-3], *size, 3)
    options = dict(size=size, mode=process.interpolation, antialias=process.antialias)
    whole = (-1, *frames.shape[-3:])
    for frame, target in zip(frames.reshape(whole), out.view(-1, *size, 3), strict=True):
        resized = F.interpolate(frame.movedim(-1, 0)[None].float(), **options)
        target.copy_(resized[0].movedim(0, -1).round_().clamp_(0, 255))
    return out


def _cut(frames: Tensor, old, new, corner: tuple[Tensor, Tensor], side: int) -> Tensor:
    top, left = (int(n) for n in corner)
    return frames[..., top : top + side, left : left + side, :]
