"""What a GPU's video decoder (NVDEC) can decode; the driver is asked once, before any cut."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # workers unpickle a `Capability` without torch
    import torch

# FFmpeg's names of the codecs, and NVIDIA's numbers (cuviddec.h of the Video Codec SDK).
_CODECS = {"mpeg1video": 0, "mpeg2video": 1, "mpeg4": 2, "vc1": 3, "h264": 4, "mjpeg": 5,
           "hevc": 8, "vp8": 9, "vp9": 10, "av1": 11}  # fmt: skip
_CHROMA = {"4:0:0": 0, "4:2:0": 1, "4:2:2": 2, "4:4:4": 3}
_BITS = (8, 10, 12)
_MACROBLOCK = 16


class Capability(NamedTuple):
    """A kind of stream that is decoded."""

    codec: str
    """FFmpeg's name of the codec."""
    chroma: str
    """Subsampling, such as `4:2:0`."""
    bits: int
    """Of a sample."""
    max_width: int
    max_height: int
    """Largest frame, in pixels."""
    min_width: int = 1
    min_height: int = 1
    """Smallest frame, in pixels."""
    max_macroblocks: int = 2**31
    """Most blocks of 16 x 16 pixels in a frame."""

    def takes(self, codec: str, chroma: str, bits: int, width: int, height: int) -> bool:
        """Whether a stream is of this kind and its frames, in pixels, of a size that fits."""
        blocks = -(-width // _MACROBLOCK) * -(-height // _MACROBLOCK)
        return (
            (codec, chroma, bits) == (self.codec, self.chroma, self.bits)
            and self.min_width <= width <= self.max_width
            and self.min_height <= height <= self.max_height
            and blocks <= self.max_macroblocks
        )


class _Caps(ctypes.Structure):
    """CUVIDDECODECAPS."""

    _fields_ = [
        ("codec", ctypes.c_int),
        ("chroma", ctypes.c_int),
        ("bits_minus_8", ctypes.c_uint),
        ("reserved1", ctypes.c_uint * 3),
        ("is_supported", ctypes.c_ubyte),
        ("num_decoders", ctypes.c_ubyte),
        ("output_formats", ctypes.c_ushort),
        ("max_width", ctypes.c_uint),
        ("max_height", ctypes.c_uint),
        ("max_macroblocks", ctypes.c_uint),
        ("min_width", ctypes.c_ushort),
        ("min_height", ctypes.c_ushort),
        ("has_histogram", ctypes.c_ubyte),
        ("counter_bits", ctypes.c_ubyte),
        ("max_histogram_bins", ctypes.c_ushort),
        ("reserved3", ctypes.c_uint * 10),
    ]


@functools.cache
def capabilities(device: torch.device) -> tuple[Capability, ...]:
    """All that the decoder of a CUDA device decodes; empty if the driver comes without it.

    In a container the driver's part for video is there if NVIDIA_DRIVER_CAPABILITIES has `video`.
    """
    try:
        library = ctypes.CDLL("libnvcuvid.so.1")
    except OSError:
        return ()
    import torch

    with torch.cuda.device(device):
        torch.cuda.synchronize()  # the driver asks for a current context, which this makes
        return _ask(library)


def _ask(library) -> tuple[Capability, ...]:
    found = []
    for codec, codec_number in _CODECS.items():
        for chroma, chroma_number in _CHROMA.items():
            for bits in _BITS:
                caps = _Caps(codec=codec_number, chroma=chroma_number, bits_minus_8=bits - 8)
                failed = library.cuvidGetDecoderCaps(ctypes.byref(caps))
                if not failed and caps.is_supported:
                    sizes = caps.max_width, caps.max_height, caps.min_width, caps.min_height
                    found.append(Capability(codec, chroma, bits, *sizes, caps.max_macroblocks))
    return tuple(found)
