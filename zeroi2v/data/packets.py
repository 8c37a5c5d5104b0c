"""What the packets of a video file say, read without decoding: its frames, times and keyframes.

Frame counts in headers are never used: they are often wrong. Packets before the first keyframe are
ignored, as decoding them gives nothing.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

import av
import numpy as np
from av.stream import Disposition

from zeroi2v.data.bitstream import shown_frames
from zeroi2v.data.orientation import UPRIGHT, Orientation, orientation_of

MAX_SIDE = 16384
"""Largest width or height accepted, in pixels."""
MAX_PIXELS = 2**26
"""Largest width x height accepted; 8K video has half of it."""

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
