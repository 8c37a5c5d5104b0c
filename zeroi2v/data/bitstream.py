"""How many frames a packet shows, for codecs with hidden frames, which only serve as references.

Usually a hidden frame shares the packet of one that is shown. Some writers give it a packet and a
time stamp of its own: then packets are not frames, as only the bitstream shows.

Source: VP9 bitstream specification 6.1 and Annex B; AV1 bitstream specification 5.3 to 5.9.
"""

from __future__ import annotations

from collections.abc import Iterator


def shown_frames(codec: str, data: bytes) -> int | None:
    """Frames that a packet of VP9 or AV1 shows; None if unknown, as for other codecs."""
    try:
        if codec == "vp9":
            return sum(map(_vp9_shows, _vp9_frames(data)))
        if codec == "av1":
            return sum(_av1_shows(data))
    except (IndexError, ValueError):  # damaged
        pass
    return None


def _vp9_frames(data: bytes) -> Iterator[bytes]:
    """The frames of a superframe, or the one frame that the packet is."""
    marker = data[-1]
    count, size = (marker & 7) + 1, (marker >> 3 & 3) + 1
    length = 2 + count * size
    if marker >> 5 != 0b110 or len(data) < length or data[-length] != marker:
        yield data
        return
    begin = 0
    for i in range(count):
        at = len(data) - length + 1 + i * size
        end = begin + int.from_bytes(data[at : at + size], "little")
        if end > len(data) - length:
            raise ValueError("a frame reaches past its packet")
        if end > begin:
            yield data[begin:end]
        begin = end


def _vp9_shows(frame: bytes) -> bool:
    """By the uncompressed header: marker 2 bits, profile 2 (or 3), then the flags."""
    bits = int.from_bytes(frame[:2].ljust(2, b"\0"), "big")
    if bits >> 14 != 2:
        raise ValueError("no frame marker")
    at = 12 if bits >> 12 & 3 != 3 else 11  # after the profile, whose value 3 has a reserved bit
    shows_existing = bits >> (at - 1) & 1
    return bool(shows_existing or bits >> (at - 3) & 1)  # frame_type is in between


def _av1_shows(data: bytes) -> Iterator[bool]:
    """For each frame header of a temporal unit, whether it shows its frame."""
    at, is_still = 0, False
    while at < len(data):
        header = data[at]
        kind, has_extension, has_size = header >> 3 & 15, header >> 2 & 1, header >> 1 & 1
        at += 1 + has_extension
        size = len(data) - at
        if has_size:
            size, shift = 0, 0
            while True:
                byte = data[at]
                at += 1
                size |= (byte & 127) << shift
                shift += 7
                if not byte & 128:
                    break
        if at + size > len(data):
            raise ValueError("a unit reaches past its packet")
        if (
            kind == 1
        ):  # sequence header: profile 3 bits, still_picture, reduced_still_picture_header
            is_still = bool(data[at] >> 3 & 1)
        elif kind in (3, 6):  # frame header, frame: show_existing_frame, frame_type 2, show_frame
            first = data[at]
            yield is_still or bool(first >> 7 or first >> 4 & 1)
        at += size
