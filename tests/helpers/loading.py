"""What tests of loaders share: a small model's config, clips as they come and as they should."""

import av
import cv2
import numpy as np
import torch

from zeroi2v.config import ModelConfig, PreprocessConfig
from zeroi2v.data.augment import AugmentConfig

# Every kind of change at random; DALI takes a second to build the graph of four operations.
AUGMENT = AugmentConfig(rand_augment_ops=1, erasing=0.5)


def config(side=32, frames=4, **process):
    sides = dict(val_short_side=max(40, side), test_short_side=max(32, side))
    process = dict(sampling="uniform") | sides | process
    return ModelConfig(
        image_size=side,
        patch_size=16,
        num_frames=frames,
        num_classes=10,
        preprocess=PreprocessConfig(**process),
    )


def assert_same(left, right):
    left, right = list(left), list(right)
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        for name in ("index", "label", "target", "video"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def pixels(video, process: PreprocessConfig) -> np.ndarray:
    """Normalised [..., 3, T, H, W] back to 0..255 as [..., T, H, W, 3]."""
    video = np.moveaxis(video.numpy(), -4, -1)
    return video * np.array(process.std) + np.array(process.mean)


def mmaction2(frame: np.ndarray, short_side: int, side: int, crops: int) -> np.ndarray:
    """What `Resize((-1, short_side))` and `CenterCrop` or `ThreeCrop` make of uint8 [H, W, 3]."""
    height, width = frame.shape[:2]
    scale = short_side / min(height, width)
    size = int(width * scale + 0.5), int(height * scale + 0.5)
    frame = cv2.resize(frame, size, interpolation=cv2.INTER_LINEAR)
    across, down = (size[0] - side) // 2, (size[1] - side) // 2
    if crops == 1:
        corners = [(down, across)]
    elif width >= height:
        corners = [(down, 0), (down, across), (down, 2 * across)]
    else:
        corners = [(0, across), (down, across), (2 * down, across)]
    return np.stack([frame[top : top + side, left : left + side] for top, left in corners])


def whole_decode(path, wanted):
    """{index: RGB} of the wanted frames, and the number of all; the definition of truth."""
    frames, count = {}, 0
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        stream.codec_context.thread_count = 1
        for frame in container.decode(stream):
            if count in wanted:
                image = frame.to_ndarray(format="rgb24")
                frames[count] = np.rot90(image, frame.rotation // 90)
            count += 1
    return frames, count
