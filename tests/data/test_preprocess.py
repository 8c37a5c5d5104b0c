"""Pixels as published: OpenCV and MMAction2's rules are the oracle of resizing and cropping."""

import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from loading import mmaction2
from PIL import Image

from zeroi2v.config import PreprocessConfig
from zeroi2v.data.decode import read_frames
from zeroi2v.data.preprocess import crop_views, normalise

PUBLISHED = PreprocessConfig()


def ours(frames: np.ndarray, *args, process=PUBLISHED) -> np.ndarray:
    return crop_views(torch.from_numpy(frames), *args, process).numpy()


def test_frames_of_any_size_are_resized_and_cropped_bit_for_bit_as_by_opencv():
    rng = np.random.default_rng(0)
    for _ in range(400):
        height, width = rng.integers(1, 500, 2)
        side = int(rng.integers(1, 300))
        short_side = side if rng.random() < 0.5 else int(rng.integers(side, 2 * side + 1))
        if rng.random() < 0.1 and min(height, width) >= 2 * side:
            short_side = min(height, width) // 2  # where OpenCV takes another way
        frame = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        args = short_side, side, int(rng.choice([1, 3]))
        assert np.array_equal(ours(frame, *args), mmaction2(frame, *args)), (height, width, args)


@pytest.mark.parametrize("short_side", [224, 256])
def test_real_clips_are_resized_bit_for_bit_as_by_opencv(clips, short_side):
    files = sorted((clips / "actions").iterdir())[::3]
    assert len(files) == 5
    for path in files:
        frames = read_frames(str(path), lambda total: np.array([0, total // 2]))
        got = ours(frames, short_side, 224, 3)
        for i, frame in enumerate(frames):
            assert np.array_equal(got[:, i], mmaction2(frame, short_side, 224, 3)), path.name


def test_a_planted_fault_is_seen():
    rng = np.random.default_rng(0)
    frame = rng.integers(0, 256, (90, 160, 3), dtype=np.uint8)
    published = mmaction2(frame, 64, 64, 1)
    for fault in (PreprocessConfig(antialias=True), PreprocessConfig(interpolation="bicubic")):
        assert np.abs(ours(frame, 64, 64, 1, process=fault) - published.astype(int)).max() > 20


@pytest.mark.parametrize(
    ("interpolation", "resample"),
    [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)],
)
def test_antialiased_frames_are_those_of_pil(interpolation, resample):
    process = PreprocessConfig(interpolation=interpolation, antialias=True)
    rng = np.random.default_rng(0)
    for height, width, short_side in ((90, 160, 64), (301, 50, 40), (64, 64, 64), (24, 30, 40)):
        noise = rng.integers(0, 256, (3, height // 4, width // 4, 3), dtype=np.uint8)
        # PIL cuts what leaves 0..255 between its two passes, as it does in noise.
        frames = np.stack([cv2.resize(frame, (width, height)) // 2 + 64 for frame in noise])
        scale = short_side / min(height, width)
        size = int(width * scale + 0.5), int(height * scale + 0.5)
        top, left = (size[1] - 32) // 2, (size[0] - 32) // 2
        got = ours(frames, short_side, 32, 1, process=process)[0].astype(int)
        for i, frame in enumerate(frames):
            want = np.asarray(Image.fromarray(frame).resize(size, resample))
            apart = np.abs(got[i] - want[top : top + 32, left : left + 32])
            assert apart.max() <= 1 and apart.mean() < 0.3


def test_bicubic_without_antialiasing_is_opencvs():
    process = PreprocessConfig(interpolation="bicubic")
    frame = np.random.default_rng(0).integers(0, 256, (90, 160, 3), dtype=np.uint8)
    want = cv2.resize(frame, (114, 64), interpolation=cv2.INTER_CUBIC)[16:48, 41:73]
    assert np.abs(ours(frame, 64, 32, 1, process=process)[0].astype(int) - want).max() <= 1


def test_normalised_by_channel_and_laid_out_for_the_model():
    process = PreprocessConfig(mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 5.0))
    video = torch.randint(0, 256, (2, 5, 4, 6, 6, 3), dtype=torch.uint8)
    out = normalise(video, process)
    assert out.shape == (2, 5, 3, 4, 6, 6) and out.dtype == torch.float32 and out.is_contiguous()
    for channel, (mean, std) in enumerate(zip(process.mean, process.std, strict=True)):
        want = (video[..., channel].float() - mean) / std
        torch.testing.assert_close(out[:, :, channel], want)


def test_neither_dali_nor_deepspeed_is_imported_on_the_way_to_a_prediction():
    code = (
        "import sys, zeroi2v.predict, zeroi2v.evaluate, zeroi2v.visualize, zeroi2v.export\n"
        "print([n for n in ('nvidia.dali', 'deepspeed', 'cv2') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
