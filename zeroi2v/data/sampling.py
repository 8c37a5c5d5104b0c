"""Which frames of a video make up a clip: the index formulas of the published recipes.

`dense`: T frames `interval` apart; indices past the end wrap around. `uniform`: one frame from
each of T equal segments. A NumPy generator draws as in training; without one the indices are
the fixed ones of validation and test. `round` is NumPy's throughout (half to even).
"""

from __future__ import annotations

import numpy as np


def dense_indices(
    total: int,
    num_frames: int,
    interval: int,
    num_clips: int = 1,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Frame indices of clips whose frames are `interval` apart: int64 [num_clips, num_frames].

    A clip starts, with `rng`, anywhere in [0, max(total - T*interval + 1, 1)); without, at
    `max_off // 2` for one clip and at round(k * max_off / (K-1)) for clip k of K, where
    max_off = max(total - ((T-1)*interval + 1), 0). All indices are taken modulo `total`.
    Raises ValueError unless every count is at least 1.
    """
    _check(total=total, num_frames=num_frames, interval=interval, num_clips=num_clips)
    if rng is not None:
        starts = rng.integers(max(total - num_frames * interval + 1, 1), size=num_clips)
    else:
        max_off = max(total - ((num_frames - 1) * interval + 1), 0)
        if num_clips == 1:
            starts = np.array([max_off // 2])
        else:
            starts = np.round(np.arange(num_clips) * (max_off / (num_clips - 1)))
    steps = np.arange(num_frames) * interval
    return (starts.astype(np.int64)[:, None] + steps) % total


def uniform_indices(
    total: int, num_frames: int, num_clips: int = 1, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Frame indices of clips with a frame from each of T segments: int64 [num_clips, num_frames].

    A segment is seg = (total-1) / T frames long. Frame i is, with `rng`, any integer in
    [round(seg*i), round(seg*(i+1))], ends included; without, it is
    round(seg*i) + int(seg / (K+1) * (k+1)) for clip k of K. Neither leaves [0, total).
    Raises ValueError unless every count is at least 1.
    """
    _check(total=total, num_frames=num_frames, num_clips=num_clips)
    segment = (total - 1) / num_frames
    edges = np.round(segment * np.arange(num_frames + 1)).astype(np.int64)
    if rng is not None:
        return rng.integers(edges[:-1], edges[1:], size=(num_clips, num_frames), endpoint=True)
    shifts = segment / (num_clips + 1) * np.arange(1, num_clips + 1)
    return edges[:-1] + shifts.astype(np.int64)[:, None]


def _check(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1: got {value}")
