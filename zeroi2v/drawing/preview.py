"""Short films that a browser plays: H.264 in MP4, small, upright, of what our decoder sees."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from zeroi2v.data.decode import all_frames
from zeroi2v.data.orientation import oriented, turn
from zeroi2v.data.packets import DecodeError, Limit, open_video
from zeroi2v.files import whole_file

_TICK = Fraction(1, 1000)


def write_preview(
    path: str,
    out: Path,
    *,
    side: int = 480,
    rate: float = 15,
    start: float = 0.0,
    seconds: float | None = None,
    timeout: float | None = None,
    quality: int = 28,
) -> None:
    """Writes a silent preview of a video file.

    Args:
        path: video file in any format FFmpeg reads.
        out: `.mp4` file to write, whole or not at all.
        side: longest side in pixels; smaller videos keep their size.
        rate: most frames a second.
        start: seconds from the first frame.
        seconds: most that is shown from there on; None for all.
        timeout: seconds after which it gives up.
        quality: of libx264: larger is smaller and worse.
    Raises:
        ValueError: the file is no video, or not one that decodes from `start` on.
    """
    limit = Limit(timeout)
    try:
        container, stream = open_video(path, limit)
        with container, whole_file(out) as temporary, av.open(str(temporary), "w", "mp4") as film:
            options = {"crf": str(quality), "preset": "veryfast", "movflags": "+faststart"}
            encoder = film.add_stream("libx264", options=options)
            encoder.pix_fmt, encoder.codec_context.time_base = "yuv420p", _TICK
            first = size = None
            last = -1.0
            for number, (frame, orientation) in enumerate(
                oriented(all_frames(container, stream, limit))
            ):
                time = number / 25 if frame.time is None else frame.time
                first = time if first is None else first
                time -= first + start
                if time < -1e-6 or time < last + 0.99 / rate:
                    continue
                if seconds is not None and time >= seconds:
                    break
                picture = turn(frame.to_ndarray(format="rgb24"), orientation)
                if size is None:
                    size = _fitting(picture, side)
                    encoder.width, encoder.height = size
                shown = Image.fromarray(np.ascontiguousarray(picture)).resize(size)
                shown = av.VideoFrame.from_image(shown)
                last, shown.pts, shown.time_base = time, round(time / _TICK), _TICK
                film.mux(encoder.encode(shown))
            if size is None:
                raise DecodeError(f"has no frame from {start:g} s on")
            film.mux(encoder.encode(None))
    except DecodeError as error:
        raise DecodeError(f"{path}: {error}") from None
    except (av.FFmpegError, OSError) as error:
        raise DecodeError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def _fitting(picture: np.ndarray, side: int) -> tuple[int, int]:
    """Width and height, even as the codec wants them, of at most `side`."""
    height, width = picture.shape[:2]
    scale = min(1.0, side / max(height, width))
    return tuple(max(2, round(scale * length / 2) * 2) for length in (width, height))
