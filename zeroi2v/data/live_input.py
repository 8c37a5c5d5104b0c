"""Video from a pipe or a camera, stored in a temporary file, so that the same decoder reads
everything.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av

_CAMERA = re.compile(r"camera:(\d+)")
# How FFmpeg calls the system's cameras.
_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}:none")}


def is_live(name: str) -> bool:
    """Whether `name` is the pipe or a camera, which give another video each time."""
    return name == "-" or _CAMERA.fullmatch(name) is not None


@contextmanager
def as_file(name: str, seconds: float) -> Iterator[str]:
    """A path to read `name` from: itself, or a file of what a pipe or a camera gave.

    `-` is standard input, read to its end; `camera:0` is the first camera, for `seconds`. Raises
    ValueError if the pipe is empty or the camera gives nothing, and on a system whose cameras are
    not known.
    """
    if not is_live(name):
        yield name
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "video.mkv"
        if camera := _CAMERA.fullmatch(name):
            if sys.platform not in _CAMERAS:
                raise ValueError(f"camera is known on {' and '.join(_CAMERAS)}: got {sys.platform}")
            kind, device = _CAMERAS[sys.platform]
            record(device.format(camera[1]), kind, path, seconds)
        else:
            with open(path, "wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
            if not path.stat().st_size:
                raise ValueError("standard input must contain a video: got nothing")
        yield str(path)


def record(source: str, kind: str, path: Path, seconds: float) -> None:
    """Records `seconds` of FFmpeg's device `source` of format `kind` into the file `path`.

    Raises ValueError if there is no such device, or it gives no frame.
    """
    count = 0
    try:
        with av.open(source, format=kind) as device, av.open(str(path), "w") as file:
            stream = device.streams.video[0]
            out = file.add_stream("ffv1", rate=stream.average_rate or 30)  # lossless
            out.width, out.height, out.pix_fmt = stream.width, stream.height, "yuv420p"
            out.codec_context.time_base = stream.time_base
            start = None
            for frame in device.decode(stream):
                start = frame.time if start is None else start
                if count and frame.time - start >= seconds:
                    break
                file.mux(out.encode(frame.reformat(format="yuv420p")))
                count += 1
            file.mux(out.encode(None))
    except (av.FFmpegError, OSError, IndexError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"camera can't be read: {source} ({reason})") from None
    if not count:
        raise ValueError(f"camera gives no frame: {source}")
