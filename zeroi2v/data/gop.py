"""Cutting the wanted groups of pictures out of a file, for a decoder that reads from the start.

DALI's video decoder (NVDEC on a GPU) takes a file in memory and decodes all of it up to the last
wanted frame. So a worker copies the packets that the wanted frames need, from the keyframe before
each, into a small MP4 in memory, without decoding them, and says which frames of that to take.

Only what is sure to give the same frames there is cut: codecs and sizes that the decoder has, 8-bit
4:2:0, colours that are known to come out right or can be put right (`colours.py`), closed groups of
pictures, no rotation and no interlaced fields. The first picture is decoded as a check, because
headers give neither the rotation nor the true size. PyAV decodes everything else.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np

from zeroi2v.data.colours import MATRIX_TAGS, Matrix, correction, matrix_of, tags
from zeroi2v.data.nvdec import Capability
from zeroi2v.data.orientation import UPRIGHT, orientation_of
from zeroi2v.data.packets import Index, Limit, Surprise, packets_between, stretches

_FORMATS = ("yuv420p", "yuvj420p")
_TICK = Fraction(1, 25)


@dataclass(frozen=True, slots=True)
class Cut:
    """A part of a video that is still to be decoded."""

    data: np.ndarray
    """An MP4 file of the needed groups of pictures, uint8 [bytes]."""
    frames: np.ndarray
    """Positions of the wanted frames in it, in the order asked for, int32 [F]."""
    height: int
    """Height of a frame, in pixels."""
    width: int
    """Width of a frame, in pixels."""
    colours: np.ndarray
    """What its RGB is to be multiplied with once it has been decoded, float32 [3, 3]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cutter:
    """Which videos a decoder takes. Calling it makes the `Cut` of a video."""

    capabilities: tuple[Capability, ...]
    """The streams that it decodes."""
    matrices: dict[tuple[int, bool], Matrix]
    """By which matrix it makes RGB of a stream with that matrix's tag and full range or not; of
    other streams it is not known."""

    def __call__(
        self, container, stream, index: Index, wanted: np.ndarray, limit: Limit
    ) -> Cut | None:
        """The part of the video that contains the frames `wanted`, positions in `index.shown`.

        None if the decoder does not take it. Raises Surprise or FFmpegError where the file is not
        what its index promised, DecodeError over the time limit.
        """
        codec = stream.codec_context
        sides = codec.height, codec.width
        kind = codec.codec.canonical_name, "4:2:0", 8, codec.width, codec.height
        if codec.pix_fmt not in _FORMATS or not any(c.takes(*kind) for c in self.capabilities):
            return None
        made_by, tagged = self.matrices.get(tags(codec)), matrix_of(tags(codec)[0])
        if made_by is None or tagged is None:
            return None
        packets = [index.shown[i] for i in wanted.ravel().tolist()]
        needed = stretches(index, sorted(set(packets)))
        shown = set(index.shown)
        if any(i not in shown for key, last in needed for i in range(key, last + 1)):
            return None  # a decoder that takes packets for frames would miscount
        if any(_has_leading_frames(index, key, last) for key, last in needed):
            return None
        kept = [
            packet
            for key, last in needed
            for packet in packets_between(container, stream, index, key, last)
        ]
        limit.check()
        if index.orientation != UPRIGHT or not _is_plain(codec, kept[0]):
            return None
        stamps = sorted(packet.pts for packet in kept)
        if len(set(stamps)) < len(stamps):
            raise Surprise
        place = {stamp: i for i, stamp in enumerate(stamps)}
        frames = np.array([place[index.pts[packet]] for packet in packets], np.int32)
        return Cut(_remux(stream, kept, place), frames, *sides, correction(made_by, tagged))


# Not MPEG-4, which NVDEC could: packets of its AVI files are not frames, so that only decoding the
# whole file shows which frame is which. Nor VP8, whose packets may contain hidden frames.
_NVDEC_CODECS = ("h264", "hevc", "av1", "vp9")


def nvdec(capabilities: tuple[Capability, ...]) -> Cutter:
    """What DALI leaves to the hardware of a GPU that has these (`nvdec.capabilities`).

    DALI 2.4 makes RGB by BT.601, whatever the tag. It knows full range only from the bitstream, not
    from the container, so that PyAV decodes it.
    """
    return Cutter(
        capabilities=tuple(c for c in capabilities if c.codec in _NVDEC_CODECS),
        matrices={(tag, False): "bt601" for tag in MATRIX_TAGS},
    )


# Without a GPU DALI decodes by FFmpeg, of which it carries only these (and VP8). It follows the
# range but no matrix (all tried in DALI 2.4).
DALI_CPU = Cutter(
    capabilities=tuple(Capability(codec, "4:2:0", 8, 4096, 4096) for codec in ("vp9", "mjpeg")),
    matrices={(tag, full): "bt601" for tag in MATRIX_TAGS for full in (False, True)},
)


def _has_leading_frames(index: Index, key: int, last: int) -> bool:
    """Whether frames stored after a keyframe of the stretch are shown before it (open groups)."""
    latest = None
    for i in range(key, last + 1):
        if index.pts[i] is None:
            return True
        if index.is_key[i]:
            latest = index.pts[i]
        elif index.pts[i] < latest:
            return True
    return False


def _is_plain(codec, key: av.Packet) -> bool:
    """Whether the keyframe decodes to one upright, progressive frame of the promised size."""
    try:
        frames = [*codec.decode(key), *codec.decode(None)]
    finally:
        codec.flush_buffers()
    if len(frames) != 1:
        return False
    (frame,) = frames
    return (
        (frame.height, frame.width) == (codec.height, codec.width)
        and frame.format.name in _FORMATS
        and frame.key_frame
        and orientation_of(frame) in (None, UPRIGHT)
        and not frame.interlaced_frame
        and not frame.is_corrupt
        and (frame.colorspace, frame.color_range) == (codec.colorspace, codec.color_range)
    )


def _remux(stream, packets: list[av.Packet], place: dict[int, int]) -> np.ndarray:
    """The packets as an MP4 file, shown in the order of `place`, at even distances."""
    late = max(i - place[packet.pts] for i, packet in enumerate(packets))
    file = io.BytesIO()
    # With an edit list, rounding may hide the last frame.
    with av.open(file, "w", format="mp4", options={"use_editlist": "0"}) as container:
        track = container.add_stream_from_template(stream, opaque=True)
        for i, packet in enumerate(packets):
            packet.stream, packet.time_base, packet.duration = track, _TICK, 1
            packet.pts, packet.dts = place[packet.pts] + late, i
            container.mux(packet)
    return np.frombuffer(file.getbuffer(), np.uint8)
