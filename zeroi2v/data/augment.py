"""Augmentation of training clips: its settings, and the random draws that the graph applies.

All randomness comes from the given NumPy generator; one draw serves all frames of a clip. Imports
neither torch nor DALI: decoding workers use it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

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


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentConfig:
    """Random changes to training clips; one draw serves all frames of a clip."""

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
    mixup: float = 0.0
    """Blends pairs of clips of a batch, with shares from Beta(mixup, mixup); 0 for never."""
    cutmix: float = 0.0
    """Swaps a rectangle between them, its share from Beta(cutmix, cutmix); 0 for never. With both
    set, a fair coin decides for each pair."""

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
        require(self.mixup >= 0, "mixup", "at least 0")
        require(self.cutmix >= 0, "cutmix", "at least 0")

    @property
    def mixes(self) -> bool:
        """Whether clips are mixed with each other."""
        return self.mixup > 0 or self.cutmix > 0


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

    A row contains the index in `KINDS`, a value (factor, threshold or bit mask), and 9 numbers: a
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
