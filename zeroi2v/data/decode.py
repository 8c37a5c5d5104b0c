"""Exact frames of a video file, by PyAV on one thread.

Frame i is the i-th frame that a decode of the whole file gives (of the stream that FFmpeg ranks
first), turned upright. Two ways lead there:

in order   Decode everything and count. Always right, and cheap for small or old codecs.
by seek    Read all packets without decoding; frame i is the one with the i-th smallest time
           stamp. Then decode only from the keyframe before each wanted frame up to that frame,
           leaving out frames that no other frame refers to.

Seeking is trusted only where a packet is a frame by definition (`packets.SEEKABLE`), or the
bitstream shows that it is a hidden one (`bitstream.py`), and the time stamps are complete and
different. At the first surprise (an error, a wanted time stamp that never shows up, frames out of
order, interlaced fields) the file is decoded in order instead, and the frames' own time stamps say
when they are shown. (In a damaged file whose decoder drops frames without an error, frames found by
seeking keep the place that their time stamps give them.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from zeroi2v.data.orientation import Orientation, oriented, turn
from zeroi2v.data.packets import (
    DecodeError,
    Index,
    Limit,
    Surprise,
    known_index,
    open_video,
    packets_between,
    stretches,
)

MAX_CLIP_BYTES = 4 * 2**30
"""Largest size accepted of all frames of a clip, in bytes of RGB."""


def read_frames(
    path: str | os.PathLike,
    choose: Callable[[int], np.ndarray],
    start: float | None = None,
    end: float | None = None,
    timeout: float | None = None,
    frames: int | None = None,
    cut: Callable | None = None,
) -> np.ndarray:
    """Decodes the frames that `choose` picks, each once, however often it is picked.

    `choose(total)` returns an integer array of any shape of indices in 0..total-1; `total` counts
    the frames of the file, or those with start <= time < end (seconds from the first frame) if
    given. It may be called a second time, with the right total, for a file whose frames turn
    out to be more or fewer than its packets, so it must depend on nothing but `total`. `frames`
    is how many a decode of the whole file gives, where that is known already: it saves counting.
    `cut(container, stream, index, wanted, limit)` may find that the frames `wanted`, positions in
    `index.shown`, are better decoded elsewhere (`gop.py`): what it returns, unless None, is
    returned in the place of frames.
    Returns RGB, uint8 [*indices.shape, H, W, 3], turned as the file asks. Raises DecodeError if
    the file is missing, damaged where it matters, without video, larger than `MAX_SIDE` or
    `MAX_PIXELS`, or takes longer than `timeout` seconds.
    """
    path, limit = os.fspath(path), Limit(timeout)
    with _named(path, timeout):
        container, stream = open_video(path, limit, err_detect="explode")
        with container:
            index = known_index(path, container, stream, limit)
            if index.seekable and frames in (None, len(index.shown)):
                first, total = _window(index.times, start, end)
                wanted = np.asarray(choose(total)) + first
                codec = stream.codec_context
                check_clip_size((codec.height, codec.width, 3), wanted.size)
                try:
                    if cut and (part := cut(container, stream, index, wanted, limit)) is not None:
                        return part
                    return _pack(_decode_by_seek(container, stream, index, wanted, limit), wanted)
                except (Surprise, av.FFmpegError):
                    pass
        return _decode_in_order(path, index, frames, choose, start, end, limit)


@contextmanager
def _named(path: str, timeout: float | None = None) -> Iterator[None]:
    """Every error within becomes a DecodeError that names the file."""
    try:
        yield
    except DecodeError as error:
        raise DecodeError(f"{path}: {error}") from None
    except (av.FFmpegError, OSError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, av.error.ExitError):  # FFmpeg gave up at the end of the time
            reason = f"takes longer to read than the time limit of {timeout:g} s"
        raise DecodeError(f"{path}: {reason}") from None


def frame_times(path: str | os.PathLike) -> np.ndarray:
    """When the frames of a video are shown, in seconds from the first, float64 [frames].

    Read from the packets where these are known to be frames, else all is decoded once. Raises
    DecodeError as `read_frames` does.
    """
    path, limit = os.fspath(path), Limit(None)
    with _named(path):
        container, stream = open_video(path, limit)
        with container:
            index = known_index(path, container, stream, limit)
        if not index.seekable:
            container, stream = open_video(path, limit)
            with container:
                index.times = _decoded_times(container, stream, index, limit)
        return index.times


def _decoded_times(container, stream, index: Index, limit: Limit) -> np.ndarray:
    """Times of the frames that a decode gives; those of the packets if it ends with an error."""
    try:
        stamps = [frame.pts for frame in all_frames(container, stream, limit)]
    except av.FFmpegError:
        return index.times
    return times_of(stamps, float(stream.time_base), index) if stamps else index.times


def _window(times: np.ndarray, start: float | None, end: float | None) -> tuple[int, int]:
    """First frame and number of frames with start <= time < end, to a microsecond."""
    first = 0 if start is None else int(np.searchsorted(times, start - 1e-6))
    last = len(times) if end is None else int(np.searchsorted(times, end - 1e-6))
    if last <= first:
        raise DecodeError(f"has no frame from {start} to {end} s: {_nearest(times, start, end)}")
    return first, last - first


def _nearest(times: np.ndarray, start: float | None, end: float | None) -> str:
    """Describes what is around a part without a frame."""
    before, after = times[times < (start or 0)], times[times >= (end or 0)]
    if not len(after):
        return f"its last one is at {times[-1]:.3f} s"
    return f"there is a gap from {before[-1]:.3f} to {after[0]:.3f} s"


def check_clip_size(shape: tuple[int, int, int], num_frames: int) -> None:
    """Raises DecodeError if frames of `shape` [H, W, 3] are too many to hold."""
    size = num_frames * shape[0] * shape[1] * shape[2]
    if size > MAX_CLIP_BYTES:
        raise DecodeError(
            f"a clip must be at most {MAX_CLIP_BYTES} bytes: got {num_frames} frames of "
            f"{shape[1]}x{shape[0]}"
        )


def _decode_by_seek(container, stream, index: Index, wanted: np.ndarray, limit: Limit) -> dict:
    """The frames with the given positions in `index.shown`; raises Surprise on any doubt."""
    convert = _Converter()
    number_of = {index.pts[index.shown[i]]: i for i in set(wanted.ravel().tolist())}
    frames: dict[int, np.ndarray] = {}
    for key, last in stretches(index, [index.shown[i] for i in number_of.values()]):
        previous = None
        run = _decode_run(container, stream, index, key, last, number_of)
        for frame, orientation in oriented(run, index.orientation):
            limit.check()
            if frame.pts is None or (previous is not None and frame.pts <= previous):
                raise Surprise
            if frame.pts == index.pts[key] and not frame.key_frame:
                raise Surprise
            previous = frame.pts
            if frame.pts in number_of:
                if frame.interlaced_frame or frame.is_corrupt:
                    raise Surprise
                frames[number_of[frame.pts]] = convert(frame, orientation)
    if len(frames) < len(number_of):
        raise Surprise
    return frames


def _decode_run(container, stream, index: Index, key: int, last: int, wanted) -> Iterator:
    """Frames of packets `key`..`last`, without frames that are neither wanted nor referred to."""
    codec = stream.codec_context
    can_skip = codec.codec.canonical_name == "h264"
    for packet in packets_between(container, stream, index, key, last):
        # Frames shown before the keyframe but stored after it need the frames before it.
        if packet.pts is None or packet.pts < index.pts[key]:
            continue
        if can_skip:
            codec.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        yield from codec.decode(packet)
    yield from codec.decode(None)
    codec.flush_buffers()


def _decode_in_order(
    path, index: Index, known: int | None, choose, start, end, limit: Limit
) -> np.ndarray:
    """Decodes up to the last wanted frame if the total is `known`, else everything, and counts.

    A frame's own time stamp says when it is shown. The index guesses this from the packets; if the
    guess is wrong, everything is decoded a second time.
    """
    is_part = start is not None or end is not None
    times = index.times
    if known not in (None, len(times)):
        times, known = (_evenly(known, index), known) if not is_part else (times, None)
    while True:
        first, total = _window(times, start, end)
        indices = np.asarray(choose(total)) + first
        wanted = set(indices.ravel().tolist())
        container, stream = open_video(path, limit)
        check_clip_size((stream.codec_context.height, stream.codec_context.width, 3), indices.size)
        frames: dict[int, np.ndarray] = {}
        stamps: list[int | None] = []
        with container:
            convert = _Converter()
            try:
                for frame, orientation in oriented(all_frames(container, stream, limit)):
                    if len(stamps) in wanted:
                        if frame.is_corrupt:
                            raise DecodeError(f"frame {len(stamps)} is damaged")
                        frames[len(stamps)] = convert(frame, orientation)
                    stamps.append(frame.pts)
                    if known is not None and len(frames) == len(wanted):
                        return _pack(frames, indices)
            except av.FFmpegError as error:
                if len(frames) < len(wanted):
                    reason = f"damaged after frame {len(stamps)}: {error.strerror}"
                    raise DecodeError(reason) from None
                return _pack(frames, indices)
            own = times_of(stamps, float(stream.time_base), index)
        if len(own) == len(times) and (not is_part or np.abs(own - times).max() < 1e-3):
            return _pack(frames, indices)
        if not len(own):
            raise DecodeError("contains no frame")
        times, known = own, None
        if not index.seekable:
            index.times = own  # the next part of the file need not find it out again


def times_of(stamps: list[int | None], time_base: float, index: Index) -> np.ndarray:
    """Times of all frames of a file in seconds, the first at 0, by their time stamps."""
    if None in stamps or any(b <= a for a, b in pairwise(stamps)):
        return _evenly(len(stamps), index)
    return (np.array(stamps) - stamps[0]) * time_base if stamps else np.zeros(0)


def _evenly(count: int, index: Index) -> np.ndarray:
    """Times of `count` frames without time stamps: at the header's rate."""
    return np.arange(count) / index.frame_rate


def all_frames(container, stream, limit: Limit) -> Iterator[av.VideoFrame]:
    """All frames that a decode of the whole file gives, in the order they are shown."""
    # Without a keyframe before them, packets of these are errors; those of others give no frame.
    waits = stream.codec_context.codec.canonical_name in ("vp9", "av1", "vp8")
    for packet in container.demux(stream):
        limit.check()
        waits = waits and not packet.is_keyframe
        if not waits:
            yield from packet.decode()


class _Converter:
    """Frames to upright RGB arrays of one size, uint8 [H, W, 3]."""

    def __init__(self):
        self.reformatter = VideoReformatter()
        self.size = None

    def __call__(self, frame: av.VideoFrame, orientation: Orientation) -> np.ndarray:
        size = (frame.width, frame.height, str(orientation))
        self.size = self.size or size
        if size != self.size:
            before, now = ("{}x{} {}".format(*size) for size in (self.size, size))
            raise DecodeError(f"changes its frames from {before} to {now}")
        image = self.reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return turn(image, orientation)


def _pack(frames: dict[int, np.ndarray], indices: np.ndarray) -> np.ndarray:
    missing = sorted(set(indices.ravel().tolist()) - set(frames))
    if missing:
        raise DecodeError(f"frame {missing[0]} cannot be decoded")
    packed = np.empty((indices.size, *frames[int(indices.flat[0])].shape), np.uint8)
    for place, i in enumerate(indices.ravel().tolist()):
        packed[place] = frames[i]
    return packed.reshape(*indices.shape, *packed.shape[1:])
