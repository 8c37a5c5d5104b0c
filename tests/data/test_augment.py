"""Augmentation: operations are PIL's, crops and erasing as published, a clip is changed as one."""

import dataclasses

import numpy as np
import pytest
import torch
from loading import config, pixels
from PIL import Image, ImageEnhance, ImageOps
from videos import (
    write_numbered,
    write_video,
)

from zeroi2v.data import augment as changes
from zeroi2v.data import clip_worker
from zeroi2v.data.annotations import Sample
from zeroi2v.data.decode import read_frames
from zeroi2v.data.pipeline import AugmentConfig, ClipLoader


def test_a_mirrored_clip_takes_the_label_of_the_map(tmp_path):
    path = write_numbered(tmp_path / "v.mp4", 20, size=(64, 64))
    whole = dict(rand_augment_ops=0, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))
    clips = {}
    for flip in (0.0, 1.0):
        augment = AugmentConfig(flip=flip, flip_label_map={3: 4, 4: 3}, **whole)
        loader = ClipLoader(
            [Sample(path, label) for label in (3, 4, 5)], config(), batch_size=3, augment=augment
        )
        clips[flip] = next(iter(loader.epoch()))
    plain, mirrored = clips[0.0], clips[1.0]
    assert torch.equal(plain.index, mirrored.index)
    assert torch.equal(mirrored.video, plain.video.flip(-1))
    assert plain.label.tolist() == [3 + i for i in plain.index]
    assert mirrored.label.tolist() == [{0: 4, 1: 3, 2: 5}[i] for i in plain.index.tolist()]


def still_video(path, rng, frames=8, side=64):
    noise = Image.fromarray(rng.integers(40, 200, size=(7, 7, 3), dtype=np.uint8))
    image = np.asarray(noise.resize((side, side), Image.Resampling.BICUBIC))
    path = write_video(path, [image] * frames, qp="1", g="1")
    decoded = read_frames(path, np.arange)
    assert (decoded == decoded[:1]).all()
    return path, decoded[0]


def test_a_still_clip_stays_still_under_full_augmentation(tmp_path):
    rng = np.random.default_rng(0)
    samples = [Sample(still_video(tmp_path / f"{i}.mp4", rng)[0], 0) for i in range(4)]
    augment = AugmentConfig(rand_augment_ops=5, rand_augment_magnitude=9, erasing=1.0)
    loader = ClipLoader(samples, config(), batch_size=4, augment=augment)
    seen = []
    for epoch in range(9):
        video = next(iter(loader.epoch(epoch))).video
        assert torch.equal(video, video[:, :, :, :1].expand_as(video))
        seen += list(video)
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def equalized(image: np.ndarray) -> np.ndarray:
    """Histogram equalization by OpenCV's formula, channel by channel."""
    out = np.empty_like(image)
    for c in range(3):
        total = np.bincount(image[..., c].ravel(), minlength=256).cumsum()
        first = total[total > 0][0]
        table = np.clip((total - first) * 255 / (total[-1] - first), 0, 255)
        out[..., c] = np.round(table).astype(np.uint8)[image[..., c]]
    return out


def pil_operation(name: str, image: np.ndarray, signed: float, grey: int = 128) -> np.ndarray:
    """RandAugment's operations as PIL does them, at strength |signed| of 1."""
    picture, strength, side = Image.fromarray(image), abs(signed), image.shape[0]
    fill = (grey, grey, grey)
    enhance = {
        "brightness": ImageEnhance.Brightness,
        "contrast": ImageEnhance.Contrast,
        "color": ImageEnhance.Color,
        "sharpness": ImageEnhance.Sharpness,
    }
    affine = {
        "translate_x": (1, 0, 0.45 * signed * side, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 0.45 * signed * side),
        "shear_x": (1, 0.3 * signed, -0.3 * signed * side / 2, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * signed, 1, -0.3 * signed * side / 2),
    }
    if name in enhance:
        picture = enhance[name](picture).enhance(1 + 0.9 * signed)
    elif name in affine:
        picture = picture.transform(
            picture.size,
            Image.Transform.AFFINE,
            affine[name],
            Image.Resampling.BILINEAR,
            fillcolor=fill,
        )
    elif name == "rotate":
        picture = picture.rotate(30 * signed, Image.Resampling.BILINEAR, fillcolor=fill)
    elif name == "posterize":
        picture = ImageOps.posterize(picture, 4 - int(4 * strength))
    elif name == "solarize":
        picture = ImageOps.solarize(picture, 256 * (1 - strength))
    elif name == "equalize":
        return equalized(image)
    else:
        picture = (ImageOps.invert if name == "invert" else ImageOps.autocontrast)(picture)
    return np.asarray(picture)


@pytest.mark.parametrize("name", changes.RAND_AUGMENT)
@pytest.mark.parametrize("signed", [0.7, -0.55])
def test_each_rand_augment_operation_equals_pils(tmp_path, monkeypatch, name, signed):
    path, image = still_video(tmp_path / "v.mp4", np.random.default_rng(3))
    kind, value, numbers = changes._operation(name, abs(signed), signed, 64)
    row = np.zeros((1, 11), np.float32)
    row[0, :2] = changes.KINDS.index(kind), value
    row[0, 2 : 2 + len(numbers)] = numbers
    monkeypatch.setattr(clip_worker, "draw_ops", lambda *args: row)
    augment = AugmentConfig(
        rand_augment_ops=1, crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0
    )
    cfg = config(64)
    batch = next(iter(ClipLoader([Sample(path, 0)], cfg, batch_size=1, augment=augment).epoch()))
    got = pixels(batch.video[0, 0, :, :1], cfg.preprocess)[0]
    want = pil_operation(name, image, signed)
    # The two blend differently along the border of the picture and of what an operation uncovers.
    inside = np.full((64, 64), True)
    if name in changes.RAND_AUGMENT[:5]:
        inside = pil_operation(name, np.full_like(image, 255), signed, grey=0)[..., 0]
        shifted = [np.roll(inside, s, axis) for s in (-1, 1) for axis in (0, 1)]
        inside = np.all([np.isin(x, (0, 255)) & (x == inside) for x in shifted], axis=0)
    inside[[0, -1]] = inside[:, [0, -1]] = False
    assert inside.mean() > 0.8
    error = np.abs(got - want)[inside]
    assert error.max() <= 2.01 and error.mean() <= 0.7, (error.max(), error.mean())
    assert np.abs(got - image)[inside].mean() > 1  # it did something


def test_operations_are_distinct_applied_half_the_time_and_of_the_asked_strength():
    augment = AugmentConfig(rand_augment_ops=4, rand_augment_magnitude=7)
    rng = np.random.default_rng(0)
    rows = np.stack([changes.draw_ops(rng, 64, augment) for _ in range(6000)])
    assert rows.shape == (6000, 4, 11) and rows.dtype == np.float32
    kinds = rows[..., 0].astype(int)
    assert abs((kinds == 0).mean() - 0.5) < 0.02
    for kind, name in enumerate(changes.KINDS[2:], 2):
        assert abs((kinds == kind).sum() / (0.5 * kinds.size / 14) - 1) < 0.15, name
        assert ((kinds == kind).sum(axis=1) <= 1).all()
    factors = rows[kinds == changes.KINDS.index("brightness")][:, 1]
    assert abs(np.abs(factors - 1).mean() - 0.63) < 0.01
    assert 0.01 < np.abs(factors - 1).std() < 0.07 and 0.4 < (factors > 1).mean() < 0.6


def test_erasing_covers_one_grey_rectangle_of_the_whole_clip(samples):
    plain = AugmentConfig(rand_augment_ops=0)
    clips = [
        ClipLoader(samples, config(), batch_size=12, augment=dataclasses.replace(plain, erasing=p))
        for p in (0.0, 1.0)
    ]
    before, after = (pixels(next(iter(c.epoch())).video[:, 0], config().preprocess) for c in clips)
    for a, b in zip(before, after, strict=True):
        changed = (np.abs(a - b) > 1e-3).any(axis=(0, 3))
        rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
        box = b[:, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        assert np.abs(box - 128).max() < 1e-3
        assert 0.01 * 32 * 32 < box.shape[1] * box.shape[2] < 0.4 * 32 * 32


def test_random_crops_keep_to_area_and_ratio_and_reach_everywhere():
    rng, augment = np.random.default_rng(0), AugmentConfig()
    boxes = np.array([changes.draw_crop(rng, 120, 160, augment) for _ in range(4000)])
    top, left, height, width = boxes.T
    assert (top >= 0).all() and (top + height <= 120).all()
    assert (left >= 0).all() and (left + width <= 160).all()
    area, ratio = height * width / (120 * 160), width / height
    assert 0.075 < area.min() < 0.1 and area.max() > 0.9
    assert 0.72 < ratio.min() < 0.78 and 1.28 < ratio.max() < 1.38
    assert top.min() == left.min() == 0
    assert (top + height).max() == 120 and (left + width).max() == 160
    # No crop of that ratio fits: the centre square.
    wide = AugmentConfig(crop_scale=(0.9, 1.0))
    assert changes.draw_crop(rng, 10, 100, wide) == (0, 45, 10, 10)
