"""Small videos made on the spot, whose frames tell their own number."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from zeroi2v.data.annotations import Sample


def numbered_frame(number: int, height: int, width: int) -> np.ndarray:
    """A grey frame with `number` as 8 black or white bars, readable after lossy coding."""
    image = np.full((height, width, 3), 128, np.uint8)
    for bit in range(8):
        left, right = width * bit // 8, width * (bit + 1) // 8
        image[height // 4 : height * 3 // 4, left:right] = 255 * (number >> bit & 1)
    return image


def read_number(image: np.ndarray) -> int:
    """The number that `numbered_frame` wrote."""
    height, width = image.shape[:2]
    middles = [image[height // 2, width * (2 * bit + 1) // 16].mean() for bit in range(8)]
    return sum(1 << bit for bit, value in enumerate(middles) if value > 128)


@contextmanager
def ordinary_priority() -> Iterator[None]:
    """Within, SVT-AV1 may do as it likes: as root it makes this process a real-time one, for good.

    All others would starve beside it, and wait for it in vain.
    """
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, *before)


def write_video(
    path: Path,
    images: list[np.ndarray],
    codec: str = "libx264",
    times: list[int] | None = None,
    **options: str,
) -> str:
    """Encodes RGB images at 30 frames a second, or at the given `times` in ticks of 1/90000 s."""
    with ordinary_priority(), av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30, options=options)
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 90000 if times else 30)
        for number, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = times[number] if times else number
            frame.time_base = stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return str(path)


def write_numbered(
    path: Path, count: int, codec: str = "libx264", size: tuple[int, int] = (96, 128), **options
) -> str:
    """A video of `count` numbered frames, `size` (height, width)."""
    return write_video(path, [numbered_frame(i, *size) for i in range(count)], codec, **options)


def hide_frame(source: str, path: Path, number: int) -> str:
    """A copy of a VP8 video whose packet of that number holds a frame that is never shown."""
    with av.open(source) as video, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(video.streams.video[0], opaque=True)
        for i, old in enumerate(p for p in video.demux(video=0) if p.size):
            data = bytearray(bytes(old))
            data[0] &= 0xFF if i != number else ~16  # bit show_frame
            packet = av.Packet(bytes(data))
            packet.stream, packet.time_base = stream, old.time_base
            packet.pts, packet.dts, packet.is_keyframe = old.pts, old.dts, old.is_keyframe
            container.mux(packet)
    return str(path)


def numbered_samples(folder) -> list[Sample]:
    """13 made videos of 12 to 24 frames and of four sizes; sample i is of class i % 10."""
    sizes = ((96, 128), (128, 96), (64, 64), (90, 160))
    return [
        Sample(write_numbered(folder / f"{i}.mp4", 12 + i, size=sizes[i % 4]), i % 10)
        for i in range(13)
    ]


def bad_copies(samples: list[Sample], folder) -> list[Sample]:
    """The same with three files that cannot be decoded, at 2, 7 and 11."""
    mixed = list(samples)
    for i in (2, 7, 11):
        (folder / f"bad{i}.mp4").write_bytes(b"no video" * i)
        mixed[i] = Sample(str(folder / f"bad{i}.mp4"), 9)
    return mixed
