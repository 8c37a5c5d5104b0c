"""Field-coded H.264, as camcorders write it and no encoder at hand does: two pictures a frame.

Every macroblock is stored raw (I_PCM), so that the encoder is a writer of headers: ITU-T H.264,
7.3.2.1 (sequence), 7.3.2.2 (picture), 7.3.3 (slice header) and 7.3.5 (macroblock).
"""

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from videos import numbered_frame


class _Bits:
    """Bits of a payload, the most significant first."""

    def __init__(self):
        self.text = ""

    def put(self, value: int, width: int) -> None:
        self.text += f"{value:0{width}b}"

    def golomb(self, *values: int) -> None:
        """Unsigned Exp-Golomb codes, ue(v)."""
        for value in values:
            self.text += f"{value + 1:0{2 * (value + 1).bit_length() - 1}b}"

    def flush(self) -> bytes:
        """The bits so far as whole bytes, filled up with zeros."""
        text, self.text = self.text + "0" * (-len(self.text) % 8), ""
        return int(text, 2).to_bytes(len(text) // 8, "big") if text else b""


def _unit(kind: int, payload: bytes) -> bytes:
    """A NAL unit of Annex B; three bytes that would look like its start are kept apart."""
    data = bytearray()
    for byte in payload:
        if byte <= 3 and data[-2:] == b"\0\0":
            data.append(3)
        data.append(byte)
    return b"\0\0\0\1" + bytes([1 << 5 | kind]) + bytes(data)


def _parameters(height: int, width: int) -> bytes:
    sequence = _Bits()
    for value in (77, 0, 30):  # Main profile, level 3
        sequence.put(value, 8)
    # Identity, 4 bits of frame number, 8 of picture order; two references.
    sequence.golomb(0, 0, 0, 4, 2)
    sequence.put(0, 1)
    sequence.golomb(width // 16 - 1, height // 32 - 1)
    sequence.put(0b001001, 6)  # not frames alone, not mixed in a frame; no cropping, no more; stop
    picture = _Bits()
    picture.golomb(0, 0)
    picture.put(0b00, 2)  # CAVLC
    picture.golomb(0, 0, 0)
    picture.put(0b000, 3)
    picture.golomb(0, 0, 0)
    picture.put(0b1001, 4)  # slices say how they are deblocked; stop
    return _unit(7, sequence.flush()) + _unit(8, picture.flush())


def _field(planes: list[np.ndarray], frame: int, bottom: int, is_idr: bool) -> bytes:
    """One field as one slice. `planes`: Y, U and V of the field; `frame` counts from the IDR."""
    bits = _Bits()
    bits.golomb(0, 7, 0)  # from the first macroblock on, all intra
    bits.put(frame % 16, 4)
    bits.put(0b10 | bottom, 2)
    if is_idr:
        bits.golomb(0)
    bits.put((2 * frame + bottom) % 256, 8)
    bits.put(0, 2 if is_idr else 1)  # kept as a reference in the plain way
    bits.golomb(0, 1)  # no change of the quantiser, no deblocking
    data = b""
    luma, *chroma = planes
    for y in range(0, luma.shape[0], 16):
        for x in range(0, luma.shape[1], 16):
            bits.golomb(25)
            data += bits.flush() + luma[y : y + 16, x : x + 16].tobytes()
            for plane in chroma:
                data += plane[y // 2 : y // 2 + 8, x // 2 : x // 2 + 8].tobytes()
    return _unit(5 if is_idr else 1, data + b"\x80")


def _fields(count: int, group: int, height: int, width: int) -> Iterator[tuple[bytes, bool]]:
    """(data, whether an IDR begins) of the fields of `count` numbered frames, top field first."""
    for number in range(count):
        image = av.VideoFrame.from_ndarray(numbered_frame(number, height, width), format="rgb24")
        flat = image.reformat(format="yuv420p").to_ndarray()
        luma, chroma = flat[:height], flat[height:].reshape(2, height // 2, width // 2)
        for bottom in (0, 1):
            planes = [plane[bottom::2] for plane in (luma, *chroma)]
            is_idr = number % group == 0 and not bottom
            head = _parameters(height, width) if is_idr else b""
            yield head + _field(planes, number % group, bottom, is_idr), is_idr


def write_field_coded(
    path: Path,
    count: int,
    group: int = 5,
    *,
    packet_of: str = "field",
    stamped: str = "both",
    size: tuple[int, int] = (96, 128),
) -> str:
    """A video of `count` numbered frames, 25 a second, each two pictures, a keyframe every `group`.

    `packet_of`: "field" or "frame"; a second field has a time stamp of its own if `stamped` is
    "both", and none if it is "first". `size`: (height, width), multiples of 32 and 16.
    """
    fields = list(_fields(count, group, *size))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 50)
        stream.codec_context.extradata = _parameters(*size)
        step = 1 if packet_of == "field" else 2
        for i in range(0, 2 * count, step):
            packet = av.Packet(b"".join(data for data, _ in fields[i : i + step]))
            packet.stream, packet.time_base = stream, Fraction(1, 50)
            packet.dts = i
            packet.pts = i if stamped == "both" or i % 2 == 0 else None
            packet.is_keyframe = fields[i][1]
            container.mux(packet)
    return str(path)
