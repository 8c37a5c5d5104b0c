"""What a decoding worker does: pick a sample, decode its frames, draw its augmentation.

All randomness of a clip is drawn here, from NumPy generators seeded by (seed, epoch, position in
the list), and handed on as numbers; what follows in the pipeline is deterministic. So a clip does
not depend on who decodes it or when, and a run continues from any step without saved state.
Imports neither torch nor DALI: workers start fast.
"""

from __future__ import annotations

import ctypes
import json
import math
import multiprocessing
import signal
import sys
from dataclasses import dataclass, field

import numpy as np

from zeroi2v.config import ModelConfig
from zeroi2v.data.annotations import Sample
from zeroi2v.data.decode import DecodeError
from zeroi2v.data.frame_cache import read_sample
from zeroi2v.data.sampling import dense_indices, uniform_indices

# RandAugment as pytorchvideo does it, which the published recipes use: distinct operations are
# drawn; each is applied with probability 1/2, at a strength m of Normal(magnitude, 0.5) of 10.
RAND_AUGMENT = (
    "translate_x translate_y shear_x shear_y rotate brightness contrast color sharpness posterize "
    "solarize equalize auto_contrast invert"
).split()
KINDS = (
    "identity affine brightness contrast color sharpness posterize solarize equalize "
    "auto_contrast invert"
).split()
"""What the graph distinguishes: the first five operations are one kind, `affine`."""

# Random erasing as published: area and (log-uniform) aspect ratio of the rectangle.
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_RATIO = (3 / 10, 10 / 3)

_MAX_REPLACEMENTS = 50


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Random changes to a training clip; one draw serves all its frames."""

    rand_augment_ops: int = 4
    """Operations RandAugment draws for a clip; 0 for none."""
    rand_augment_magnitude: int = 7
    """Their strength, 0 to 10."""
    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Range of the random crop's area, as a fraction of the frame."""
    crop_ratio: tuple[float, float] = (0.75, 4 / 3)
    """Range of the random crop's width / height."""
    flip: float = 0.5
    """Probability of mirroring a clip."""
    flip_label_map: dict[int, int] = field(default_factory=dict)
    """Class of a mirrored clip, where it differs from the clip's own."""
    erasing: float = 0.0
    """Probability of covering one rectangle of a clip with mid grey."""

    def __post_init__(self):
        def require(condition, name, rule):
            if not condition:
                raise ValueError(f"augment.{name} must be {rule}: got {getattr(self, name)}")

        count = len(RAND_AUGMENT)
        require(0 <= self.rand_augment_ops <= count, "rand_augment_ops", f"in 0..{count}")
        require(0 <= self.rand_augment_magnitude <= 10, "rand_augment_magnitude", "in 0..10")
        low, high = self.crop_scale
        require(0 < low <= high <= 1, "crop_scale", "two ascending fractions in (0, 1]")
        low, high = self.crop_ratio
        require(0 < low <= high, "crop_ratio", "two ascending positive numbers")
        require(0 <= self.flip <= 1, "flip", "a probability")
        require(0 <= self.erasing <= 1, "erasing", "a probability")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipPlan:
    """Which clips a loader makes, in which order, and how; all that a worker needs to know."""

    samples: list[Sample]
    config: ModelConfig
    mode: str
    views: tuple[int, int]
    augment: AugmentConfig | None
    seed: int
    batch_size: int
    rank: int
    world_size: int
    accumulation: int
    timeout: float | None
    cache: str | None

    @property
    def global_batch(self) -> int:
        """Clips of all processes in one step."""
        return self.batch_size * self.world_size * self.accumulation

    @property
    def steps(self) -> int:
        """Steps of an epoch: training leaves an incomplete last one out, testing pads it."""
        round_ = math.floor if self.mode == "train" else math.ceil
        return round_(len(self.samples) / self.global_batch)

    @property
    def short_side(self) -> int:
        """Short side a frame is resized to before its crops, in pixels."""
        process = self.config.preprocess
        side = process.test_short_side if self.mode == "test" else process.val_short_side
        return max(side, self.config.image_size)


class ClipSource:
    """A callable for DALI's external source: SampleInfo -> the arrays of one clip.

    DALI's epoch 0 is training epoch `epoch` from step `start_step`; those after it are whole.
    Returns (frames uint8 [F, H, W, 3], report uint8 [n], geometry int32 [1 + crops, 2]) and, with
    augmentation, mirror int32 [], and, as far as it asks for them, the results of `draw_ops` and
    `draw_erasing`. `report` is JSON: index, label, bad (path -> reason). `geometry` holds the
    size to resize to and the corner (top, left) of each crop.
    """

    def __init__(self, plan: ClipPlan, epoch: int, start_step: int):
        self.plan, self.epoch, self.start_step = plan, epoch, start_step
        self._order: tuple[int, np.ndarray] | None = None

    def __setstate__(self, state: dict) -> None:
        """Unpickled in a decoding process, which must not outlive the one it decodes for."""
        self.__dict__.update(state)
        if multiprocessing.parent_process() is not None and sys.platform == "linux":
            set_parent_death_signal = 1
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)

    def __call__(self, info) -> tuple[np.ndarray, ...]:
        plan = self.plan
        epoch = self.epoch + info.epoch_idx
        first = self.start_step * plan.accumulation if info.epoch_idx == 0 else 0
        step, micro = divmod(first + info.iteration, plan.accumulation)
        if step >= plan.steps:
            raise StopIteration
        row = (micro * plan.world_size + plan.rank) * plan.batch_size + info.idx_in_batch
        position = step * plan.global_batch + row
        if plan.mode == "train":
            return self._train_clip(epoch, int(self._permutation(epoch)[position]))
        return self._test_clip(position)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng((self.plan.seed, epoch))
            self._order = (epoch, rng.permutation(len(self.plan.samples)))
        return self._order[1]

    def _train_clip(self, epoch: int, index: int) -> tuple[np.ndarray, ...]:
        """The clip of sample `index`, or of the first other one drawn that can be decoded."""
        plan, bad = self.plan, {}
        for attempt in range(_MAX_REPLACEMENTS):
            key = (plan.seed, epoch, 1 + index)
            sample = plan.samples[index]
            try:
                frames = self._frames(sample, key)
            except DecodeError as error:
                bad[sample.path] = str(error)
                rng = np.random.default_rng((*key, 2 + attempt))
                index = int(rng.integers(len(plan.samples)))
                continue
            return self._finish(frames, index, sample.label, bad, np.random.default_rng((*key, 1)))
        return self._blank(bad)

    def _test_clip(self, position: int) -> tuple[np.ndarray, ...]:
        if position >= len(self.plan.samples):
            return self._blank({})
        sample = self.plan.samples[position]
        try:
            frames = self._frames(sample, None)
        except DecodeError as error:
            return self._blank({sample.path: str(error)})
        return self._finish(frames, position, sample.label, {}, None)

    def _frames(self, sample: Sample, key: tuple[int, ...] | None) -> np.ndarray:
        """Frames uint8 [clips * T, H, W, 3], drawn at random if there is a `key`."""
        process, num_frames = self.plan.config.preprocess, self.plan.config.num_frames

        def choose(total: int) -> np.ndarray:
            rng = None if key is None else np.random.default_rng(key)
            if process.sampling == "dense":
                interval = process.interval
                indices = dense_indices(total, num_frames, interval, self.plan.views[0], rng)
            else:
                indices = uniform_indices(total, num_frames, self.plan.views[0], rng)
            return indices.ravel()

        return read_sample(sample, choose, self.plan.timeout, self.plan.cache)

    def _finish(self, frames, index, label, bad, rng) -> tuple[np.ndarray, ...]:
        augment = self.plan.augment
        height, width = frames.shape[1:3]
        if augment is None:
            size, corners = self._crops(height, width)
            return frames, _report(index, label, bad), np.array([size, *corners], np.int32)
        top, left, height, width = draw_crop(rng, height, width, augment)
        frames = np.ascontiguousarray(frames[:, top : top + height, left : left + width])
        mirror = rng.random() < augment.flip
        if mirror:
            label = augment.flip_label_map.get(label, label)
        side = self.plan.config.image_size
        outputs = [
            frames,
            _report(index, label, bad),
            np.array([(side, side), (0, 0)], np.int32),
            np.array(mirror, np.int32),
        ]
        if augment.rand_augment_ops:
            outputs.append(draw_ops(rng, side, augment))
        if augment.erasing:
            outputs.append(draw_erasing(rng, side, augment))
        return tuple(outputs)

    def _crops(self, height: int, width: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        """Size of a resized frame, and the corners of its crops: centre, or 3 along its length."""
        side, short = self.plan.config.image_size, self.plan.short_side
        scale = short / min(height, width)
        height, width = (max(short, int(x * scale + 0.5)) for x in (height, width))
        free = np.array([height - side, width - side])
        places = (0.0, 0.5, 1.0) if self.plan.views[1] == 3 else (0.5,)
        long = int(width >= height)
        corners = []
        for place in places:
            corner = free // 2
            if place != 0.5:
                corner[long] = free[long] * place
            corners.append((int(corner[0]), int(corner[1])))
        return (height, width), corners

    def _blank(self, bad: dict[str, str]) -> tuple[np.ndarray, ...]:
        """Black frames of index and label -1: padding, or a video that cannot be decoded."""
        side = self.plan.config.image_size
        frames = np.zeros(
            (self.plan.views[0] * self.plan.config.num_frames, side, side, 3), np.uint8
        )
        rng = np.random.default_rng(0)
        return self._finish(frames, -1, -1, bad, rng)


def draw_crop(rng, height: int, width: int, augment: AugmentConfig) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random crop, as torchvision and MMAction2 draw it."""
    for _ in range(10):
        area = rng.uniform(*augment.crop_scale) * height * width
        ratio = math.exp(rng.uniform(*np.log(augment.crop_ratio)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


def draw_ops(rng, side: int, augment: AugmentConfig) -> np.ndarray:
    """RandAugment's draw: float32 [n, 11], each row an operation on frames of `side` pixels.

    A row holds the index in `KINDS`, a value (factor, threshold or bit mask), and 9 numbers: a
    matrix [2, 3] from output to input pixels for `affine`, a kernel [3, 3] for `sharpness`.
    """
    count = augment.rand_augment_ops
    drawn = rng.choice(RAND_AUGMENT, size=count, replace=False)
    applied = rng.random(count) < 0.5
    strength = np.clip(rng.normal(augment.rand_augment_magnitude, 0.5, size=count), 0, 10) / 10
    signs = rng.choice((-1, 1), size=count)
    rows = [
        _operation(name, m, sign * m, side) if apply else ("identity", 0, ())
        for name, m, sign, apply in zip(drawn, strength, signs, applied, strict=True)
    ]
    table = np.zeros((count, 11), np.float32)
    for row, (kind, value, numbers) in zip(table, rows, strict=True):
        row[:2] = KINDS.index(kind), value
        row[2 : 2 + len(numbers)] = numbers
    return table


def _operation(name: str, m: float, signed: float, side: int) -> tuple[str, float, tuple]:
    """Kind, value and numbers of an operation at strength m in [0, 1]; `signed` is m or -m."""
    middle = side / 2
    match name:
        case "translate_x":
            return "affine", 0, (1, 0, 0.45 * signed * side, 0, 1, 0)
        case "translate_y":
            return "affine", 0, (1, 0, 0, 0, 1, 0.45 * signed * side)
        case "shear_x":
            return "affine", 0, (1, 0.3 * signed, -0.3 * signed * middle, 0, 1, 0)
        case "shear_y":
            return "affine", 0, (1, 0, 0, 0.3 * signed, 1, -0.3 * signed * middle)
        case "rotate":
            cos, sin = math.cos(math.radians(30 * signed)), math.sin(math.radians(30 * signed))
            shift_x, shift_y = middle * (1 - cos + sin), middle * (1 - cos - sin)
            return "affine", 0, (cos, -sin, shift_x, sin, cos, shift_y)
        case "brightness" | "contrast" | "color":
            return name, 1 + 0.9 * signed, ()
        case "sharpness":
            factor = 1 + 0.9 * signed
            blur = np.array([1, 1, 1, 1, 5, 1, 1, 1, 1]) / 13
            return name, 0, tuple((1 - factor) * blur + factor * (np.arange(9) == 4))
        case "posterize":
            bits = 4 - int(4 * m)
            return name, 256 - 2 ** (8 - bits), ()
        case "solarize":
            return name, 256 * (1 - m), ()
        case _:
            return name, 0, ()


def draw_erasing(rng, side: int, augment: AugmentConfig) -> np.ndarray:
    """Corner and size of the rectangle to erase, float32 [2, 2]; of size 0 for none."""
    if rng.random() >= augment.erasing:
        return np.zeros((2, 2), np.float32)
    area = rng.uniform(*_ERASE_AREA) * side * side
    ratio = math.exp(rng.uniform(*np.log(_ERASE_RATIO)))
    size = [min(side, round(math.sqrt(x))) for x in (area * ratio, area / ratio)]
    corner = [rng.integers(side - x + 1) for x in size]
    return np.array([corner, size], np.float32)


def _report(index: int, label: int, bad: dict[str, str]) -> np.ndarray:
    text = json.dumps({"index": index, "label": label, "bad": bad})
    return np.frombuffer(text.encode(), np.uint8)
