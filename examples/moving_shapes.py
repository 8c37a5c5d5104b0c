"""A small video set in which only the order of the frames shows the class.

A shape moves at constant speed over a plain ground and comes back on the other side. The class is
the direction. The shape starts anywhere, so in every frame, whatever the class, it is anywhere: a
single frame shows the shape, but not the direction. Run backwards, a clip of one class is a clip of
the opposite one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Classes in index order, and the way (x, y) that each moves."""
SHAPES = (
    "square", "disc", "triangle", "cross",
    "open to the top", "open to the bottom", "open to the right", "open to the left",
)  # fmt: skip
"""What the image model names; the last four are a square ring with one side missing. They make it
distinguish left from right and upper from lower edges. A model that has seen only symmetric shapes
does not, and the direction can't be read from its features."""

SIZE = 32
"""Height and width of a video, in pixels."""
NUM_FRAMES = 24
"""Frames of a video."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What is drawn: everything but the direction."""

    shape: int
    """Index in `SHAPES`."""
    radius: float
    """Half the extent of the shape, in pixels."""
    colour: np.ndarray
    """RGB of the shape, float [3] in 0..255: bright in at least one channel."""
    ground: np.ndarray
    """RGB behind it, float [3] in 0..255: dark."""
    start: np.ndarray
    """Centre (x, y) in frame 0, in pixels, uniform over the frame."""
    speed: float
    """Pixels per frame."""


def random_scene(rng: np.random.Generator) -> Scene:
    """Draws a scene; nothing in it depends on the class."""
    colour = rng.uniform(60, 255, 3)
    colour[rng.integers(3)] = rng.uniform(200, 255)
    return Scene(
        shape=int(rng.integers(len(SHAPES))),
        radius=SIZE * rng.uniform(0.18, 0.28),
        colour=colour,
        ground=rng.uniform(0, 90, 3),
        start=rng.uniform(0, SIZE, 2),
        speed=rng.uniform(0.9, 1.1),
    )


def draw(scene: Scene, direction: str, num_frames: int = NUM_FRAMES) -> np.ndarray:
    """Frames uint8 [num_frames, SIZE, SIZE, 3] of `scene` moving in `direction`, edges smooth."""
    step = scene.speed * np.array(DIRECTIONS[direction])
    centre = scene.start + step * np.arange(num_frames)[:, None]  # [F, 2]
    pixels = np.arange(SIZE) + 0.5
    # From the centre to each pixel, the shorter way round, in -SIZE/2..SIZE/2.
    x, y = (
        (pixels - centre[:, axis, None] + SIZE / 2) % SIZE - SIZE / 2  # [F, SIZE]
        for axis in (0, 1)
    )
    distance = _distance(SHAPES[scene.shape], x[:, None, :], y[:, :, None], scene.radius)
    cover = np.clip(0.5 - distance, 0, 1)[..., None]  # 1 inside, 0 outside
    return np.round(scene.ground + (scene.colour - scene.ground) * cover).astype(np.uint8)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance of pixels to the outline of a shape around the origin, negative inside.

    x, y: offsets from the centre in pixels, y downwards, of shapes that broadcast.
    """

    def box(left, right, top, bottom):
        across = np.maximum(left * radius - x, x - right * radius)
        return np.maximum(across, np.maximum(top * radius - y, y - bottom * radius))

    match shape:
        case "square":
            return box(-0.9, 0.9, -0.9, 0.9)
        case "disc":
            return np.hypot(x, y) - radius
        case "triangle":
            slopes = 0.866 * abs(x) - 0.5 * y - 0.55 * radius
            return np.maximum(y - 0.7 * radius, slopes)
        case "cross":
            return np.minimum(box(-0.33, 0.33, -1, 1), box(-1, 1, -0.33, 0.33))
    sides = {
        "top": box(-1, 1, -1, -0.4),
        "bottom": box(-1, 1, 0.4, 1),
        "right": box(0.4, 1, -1, 1),
        "left": box(-1, -0.4, -1, 1),
    }
    del sides[shape.removeprefix("open to the ")]
    return np.minimum.reduce(np.broadcast_arrays(*sides.values()))


def single_frames(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Frames uint8 [count, SIZE, SIZE, 3] and the index in `SHAPES` of each, int64 [count]."""
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(count)]
    frames = np.concatenate([draw(scene, "right", 1) for scene in scenes])
    return frames, np.array([scene.shape for scene in scenes])


def write_videos(folder: Path, name: str, count: int, seed: int) -> None:
    """Writes `count` h264 files to `folder/name/` and their list to `folder/name.txt`.

    Classes take turns, so they are equally frequent.
    """
    rng = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    lines = []
    for number in range(count):
        label = number % len(DIRECTIONS)
        path = f"{name}/{number:04d}.mp4"
        encode(folder / path, draw(random_scene(rng), list(DIRECTIONS)[label]))
        lines.append(f"{path} {label}\n")
    (folder / f"{name}.txt").write_text("".join(lines), encoding="utf-8")


def encode(path: Path, frames: np.ndarray) -> None:
    """Writes RGB frames uint8 [F, H, W, 3] as an h264 file of 12 frames a second."""
    options = {"crf": "16", "preset": "veryfast", "threads": "1"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=12, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for image in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
