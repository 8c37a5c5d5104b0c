"""Exact frames of a video file, by PyAV on one thread.

Frame i is the i-th frame that a decode of the whole file gives (of the stream FFmpeg holds for
the best), turned upright. Two ways lead there:

in order   Decode everything and count. Always right, and cheap for small or old codecs.
by seek    Read all packets without decoding; frame i is the one with the i-th smallest time
           stamp. Then decode only from the keyframe before each wanted frame up to that frame,
           leaving out frames that no other frame refers to.

Seeking is trusted only where a packet is a frame by definition (`SEEKABLE`), or the bitstream shows
that it is a hidden one (`bitstream.py`), and the time stamps are complete and different. Packets
before the first keyframe count for nothing, as a decode gives nothing for them. At the first
surprise (an error, a wanted time stamp that never shows up, frames out of order, interlaced fields)
the file is decoded in order instead, and the frames' own time stamps say when they are shown.
Headers are never asked how many frames there are: they lie. (In a damaged file whose decoder drops
frames without an error, frames found by seeking keep the place that their time stamps give them.)
"""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import av
import numpy as np
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from zeroi2v.data.bitstream import shown_frames
from zeroi2v.data.orientation import UPRIGHT, Orientation, orientation_of, oriented, turn

MAX_SIDE = 16384
"""Largest width or height accepted, in pixels."""
MAX_PIXELS = 2**26
"""Largest width x height accepted; 8K video has half of it."""
MAX_CLIP_BYTES = 4 * 2**30
"""Largest size accepted of all frames of a clip, in bytes of RGB."""

# Containers and codecs in which each packet is one frame, shown or (of vp9 and av1) known to be
# hidden. Not so: fields in mpegts, hidden frames in vp8, packed B-frames in avi.
SEEKABLE = {"mov,mp4,m4a,3gp,3g2,mj2": {"h264", "hevc", "av1", "mjpeg"}, "avi": {"mjpeg"}}
SEEKABLE["matroska,webm"] = SEEKABLE["mov,mp4,m4a,3gp,3g2,mj2"] | {"vp9"}


class DecodeError(ValueError):
    """A video that cannot give the wanted frames; the message names the file and the reason."""


class Surprise(Exception):
    """The file is not what the packet index promised."""


class Limit:
    """A time limit in seconds, from now on; None for none."""

    def __init__(self, seconds: float | None):
        self.seconds = seconds
        self.end = None if seconds is None else time.monotonic() + seconds

    @property
    def left(self) -> float | None:
        return None if self.end is None else max(self.end - time.monotonic(), 1e-3)

    def check(self) -> None:
        if self.end is not None and time.monotonic() > self.end:
            raise DecodeError(f"takes longer to decode than the time limit of {self.seconds:g} s")


@dataclass(slots=True)
class Index:
    """What can be known about a video by reading all packets without decoding."""

    pts: list[int | None]
    dts: list[int | None]
    is_key: list[bool]
    is_entry: list[bool]
    """Whether decoding may begin there."""
    shown: list[int]
    """Packets that become frames, in order of their time stamps (of the file without any)."""
    times: np.ndarray
    """Times of those frames in seconds, the first at 0; of the decoded ones where these are known
    and the file is not `seekable`."""
    frame_rate: float
    """Frames a second, by the header; 25 where it says nothing."""
    seekable: bool
    orientation: Orientation
    """Of the first frame."""


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


def check_clip_size(shape: tuple[int, int, int], num_frames: int) -> None:
    """Raises DecodeError if frames of `shape` [H, W, 3] are too many to hold."""
    size = num_frames * shape[0] * shape[1] * shape[2]
    if size > MAX_CLIP_BYTES:
        raise DecodeError(
            f"a clip must be at most {MAX_CLIP_BYTES} bytes: got {num_frames} frames of "
            f"{shape[1]}x{shape[0]}"
        )


def open_video(path: str, limit: Limit, **codec_options: str):
    """The container and its video stream, set to decode on one thread."""
    container = av.open(
        f"file:{path}",
        metadata_errors="ignore",
        options={"protocol_whitelist": "file"},
        timeout=limit.left,
    )
    stream = container.streams.best("video")
    if stream is not None and _is_cover(stream):
        stream = next((s for s in container.streams.video if not _is_cover(s)), None)
        if stream is None:
            container.close()
            raise DecodeError("has no video, only a cover picture")
    if stream is None or stream.codec_context is None:
        container.close()
        raise DecodeError("has no video stream that can be decoded")
    codec = stream.codec_context
    if max(codec.width, codec.height) > MAX_SIDE:
        container.close()
        raise DecodeError(
            f"frames must be at most {MAX_SIDE} pixels a side: got {codec.width}x{codec.height}"
        )
    if codec.width * codec.height > MAX_PIXELS:
        container.close()
        raise DecodeError(
            f"frames must be at most {MAX_PIXELS} pixels: got {codec.width}x{codec.height}"
        )
    codec.thread_count = 1
    codec.options = {"max_pixels": str(MAX_PIXELS), **codec_options}
    return container, stream


def _is_cover(stream) -> bool:
    return bool(stream.disposition & Disposition.attached_pic)


_last_index: tuple[tuple, Index] | None = None


def known_index(path: str, container, stream, limit: Limit) -> Index:
    """`read_index`, remembered for the last file: parts of a film are asked for one by one."""
    global _last_index
    status = os.stat(path)
    key = (os.path.abspath(path), status.st_size, status.st_mtime_ns)
    if _last_index is None or _last_index[0] != key:
        _last_index = key, read_index(container, stream, limit)
    return _last_index[1]


def read_index(container, stream, limit: Limit) -> Index:
    """Reads all packets; of the frames, only the first is decoded, and the one after it."""
    pts, dts, is_key, is_shown = [], [], [], []
    name, damaged, head = stream.codec_context.codec.canonical_name, False, []
    try:
        for packet in container.demux(stream):
            limit.check()
            if packet.size:
                if len(pts) < 2 and (head or packet.is_keyframe):
                    head.append(packet)
                pts.append(packet.pts)
                dts.append(packet.dts)
                is_key.append(packet.is_keyframe)
                number = shown_frames(name, bytes(packet)) if name in ("vp9", "av1") else 1
                damaged = damaged or number not in (0, 1)
                is_shown.append(number != 0 and not packet.is_discard)
    except av.FFmpegError:
        damaged = True
    except IndexError:  # what PyAV raises if the chosen stream is not among those of the file
        raise DecodeError("has damaged stream headers") from None
    # A JPEG may rely on the tables of those before it.
    is_entry = is_key if name != "mjpeg" else [i == 0 for i in range(len(is_key))]
    # What comes before the first keyframe refers to what is not there, and is not decoded.
    first = next((i for i, entry in enumerate(is_entry) if entry), 0)
    shown = [i for i, out in enumerate(is_shown) if out and i >= first]
    if not shown:
        raise DecodeError("contains no frame")
    stamps = [pts[i] for i in shown]
    complete = None not in stamps and len(set(stamps)) == len(stamps)
    frame_rate = float(stream.average_rate or 25)
    if complete:
        shown.sort(key=pts.__getitem__)
        times = (np.array(sorted(stamps)) - min(stamps)) * float(stream.time_base)
    else:
        times = np.arange(len(shown)) / frame_rate
    codecs = SEEKABLE.get(container.format.name, ())
    # Frames shown before the first keyframe but stored after it may be decoded or not.
    leading = complete and pts[first] is not None and pts[shown[0]] < pts[first]
    seekable = complete and not damaged and not leading and is_entry[first] and name in codecs
    frames, orientation = _frames_of(stream.codec_context, head), UPRIGHT
    if frames:
        orientation = orientation_of(frames[0]) or UPRIGHT
        # Fewer frames than packets: each is half of a frame.
        in_fields = name == "h264" and len(frames) < sum(is_shown[: len(head)])
        seekable = seekable and not in_fields and not frames[0].interlaced_frame
    return Index(pts, dts, is_key, is_entry, shown, times, frame_rate, seekable, orientation)


def _frames_of(codec, packets: list[av.Packet]) -> list[av.VideoFrame]:
    """The frames of packets from a keyframe on, up to the first error."""
    frames = []
    try:
        for packet in [*packets, None]:
            frames += codec.decode(packet)
    except av.FFmpegError:
        pass
    codec.flush_buffers()
    return frames


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
    """What is around a part without a frame."""
    before, after = times[times < (start or 0)], times[times >= (end or 0)]
    if not len(after):
        return f"its last one is at {times[-1]:.3f} s"
    return f"there is a gap from {before[-1]:.3f} to {after[0]:.3f} s"


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
    """Frames of packets `key`..`last`, without those nobody wants or refers to."""
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


def stretches(index: Index, packets: list[int]) -> list[tuple[int, int]]:
    """The stretches of packets, (keyframe, last), whose decoding gives all the given packets."""
    keys = [i for i, entry in enumerate(index.is_entry) if entry and index.pts[i] is not None]
    keys.sort(key=index.pts.__getitem__)
    key_pts = [index.pts[i] for i in keys]
    found: list[tuple[int, int]] = []
    for packet in sorted(packets):
        at = bisect_right(key_pts, index.pts[packet]) - 1
        if at < 0 or keys[at] > packet:
            raise Surprise
        if found and keys[at] <= found[-1][1]:
            found[-1] = (min(keys[at], found[-1][0]), packet)
        else:
            found.append((keys[at], packet))
    return found


def packets_between(container, stream, index: Index, key: int, last: int) -> Iterator[av.Packet]:
    """Packets `key`..`last` of the file, found by seeking; every one is checked."""
    stamps = [s for s in (index.pts[key], index.dts[key]) if s is not None]
    container.seek(min(stamps), stream=stream)
    position = None
    for packet in container.demux(stream):
        if not packet.size:
            continue
        stamp = (packet.pts, packet.dts)
        if position is None and stamp == (index.pts[key], index.dts[key]):
            position = key
        if position is not None:
            if stamp != (index.pts[position], index.dts[position]):
                raise Surprise
            yield packet
            if position == last:
                return
            position += 1
    raise Surprise


def _decode_in_order(
    path, index: Index, known: int | None, choose, start, end, limit: Limit
) -> np.ndarray:
    """Decodes up to the last wanted frame if the number of all is `known`, else all, and counts.

    When a frame is shown is its own time stamp's to say. The index guesses that from the packets;
    where it was wrong, all is decoded a second time.
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
