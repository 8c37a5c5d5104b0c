"""A frame has the same colours whichever decoder gives it, and a GPU is asked what it decodes."""

import ctypes
import io

import av
import numpy as np
import pytest
import torch
from coloured import UNTAGGED, tagged_frame, write_tagged
from loading import config, pixels

from zeroi2v.data import nvdec
from zeroi2v.data.annotations import Sample
from zeroi2v.data.colours import MATRIX_TAGS, correction, matrix_of, tags, to_rgb
from zeroi2v.data.decode import read_frames
from zeroi2v.data.gop import DALI_CPU, Cut
from zeroi2v.data.gop import nvdec as nvdec_cutter
from zeroi2v.data.nvdec import Capability
from zeroi2v.data.pipeline import ClipLoader

BT709 = 1
H264 = nvdec_cutter((Capability("h264", "4:2:0", 8, 4096, 4096),))


def rgb_of(frame: av.VideoFrame, matrix: str, full: bool) -> np.ndarray:
    """What a decoder that knows that matrix alone makes of a frame: nearest chroma, rounded."""
    y, cb, cr = (
        np.frombuffer(p, np.uint8).reshape(p.height, p.line_size)[:, : p.width].astype(float)
        for p in frame.planes
    )
    cb, cr = (np.kron(c, np.ones((2, 2))) - 128 for c in (cb, cr))
    if not full:
        y, cb, cr = (y - 16) * 255 / 219, cb * 255 / 224, cr * 255 / 224
    rgb = np.stack([y, cb, cr], -1) @ to_rgb(matrix).T
    return rgb.round().clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(144, 176), (720, 1280)])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("tag", MATRIX_TAGS)
def test_pyav_follows_the_tags_of_a_frame(tag, full, size):
    frame = tagged_frame(size, tag, full)
    expected = rgb_of(frame, matrix_of(tag), full).astype(int)
    assert np.abs(frame.to_ndarray(format="rgb24") - expected).max() <= 3  # swscale rounds coarsely


@pytest.mark.parametrize("size", [(144, 176), (720, 1280)])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("tag", MATRIX_TAGS)
@pytest.mark.parametrize("decoded", ["bt601", "bt709"])
def test_colours_of_another_matrix_are_put_right(decoded, tag, full, size):
    frame, wanted = tagged_frame(size, tag, full), matrix_of(tag)
    given = rgb_of(frame, decoded, full)
    right = (given @ correction(decoded, wanted).T).round().clip(0, 255)
    assert np.abs(right - rgb_of(frame, wanted, full)).max() <= 1
    assert np.abs(right - frame.to_ndarray(format="rgb24")).max() <= 3
    if decoded != wanted and "bt2020" != wanted:
        assert np.abs(given.astype(int) - rgb_of(frame, wanted, full)).max() > 3 or wanted in (
            "smpte240m",  # next to BT.709
            "fcc",  # next to BT.601
        )


@pytest.mark.parametrize("size", [(144, 176), (720, 1280)])
@pytest.mark.parametrize(
    ("codec", "tag", "full"),
    [("libvpx-vp9", tag, full) for tag in (None, 1, 5, 6, 7, 9) for full in (False, True)]
    + [("mjpeg", None, True)],
)
def test_dali_gives_pyavs_colours_on_the_cpu(tmp_path, codec, tag, full, size):
    suffix = "avi" if codec == "mjpeg" else "webm"
    path = write_tagged(tmp_path / f"v.{suffix}", codec, tag, full, size)
    views, averaged = [], config(antialias=True)  # not how chroma is placed between two colours
    for decoder in ("dali", "pyav"):
        loader = ClipLoader([Sample(path, 0)], averaged, batch_size=1, decoder=decoder)
        views.append(pixels(next(iter(loader.epoch())).video, averaged.preprocess))
        assert loader.decoded_by == {decoder: 1}
    apart = np.abs(views[0] - views[1])
    assert apart.mean() < 1.5 and apart.max() < 3.5  # swscale errs by up to 2.2


def test_both_decoders_give_the_colours_that_were_recorded(clips):
    path = clips.parent / "cases" / "bt709.webm"
    if not path.exists():
        pytest.skip(f"no {path}")
    for decoder in ("dali", "pyav"):
        loader = ClipLoader([Sample(str(path), 0)], config(), batch_size=1, decoder=decoder)
        view = pixels(next(iter(loader.epoch())).video, config().preprocess)
        assert loader.decoded_by == {decoder: 1}
        colour = view.reshape(-1, 3).mean(0)
        # 192, 64, 32 became 91, 101, 186 in 8 bits, which are 191.3, 62.2, 30.3 again
        assert np.abs(colour - [191.3, 62.2, 30.3]).max() <= 2


@pytest.mark.parametrize(
    ("tag", "full", "decoded_as"),
    [*((tag, False, "bt601") for tag in (None, *MATRIX_TAGS)), (1, True, None), (None, True, None)],
)
def test_nvdec_is_given_only_colours_that_are_known_to_come_out(tmp_path, tag, full, decoded_as):
    path = write_tagged(tmp_path / "v.mp4", "libx264", tag, full)
    got = read_frames(path, lambda n: np.array([0, 3]), None, None, 60, None, H264)
    expected = read_frames(path, lambda n: np.array([0, 3]))
    if decoded_as is None:
        assert np.array_equal(got, expected)
        return
    assert isinstance(got, Cut)
    with av.open(io.BytesIO(got.data.tobytes())) as container:
        frames = [rgb_of(frame, decoded_as, False) for frame in container.decode(video=0)]
    given = np.stack([frames[i] for i in got.frames])
    right = (given @ got.colours.T).round().clip(0, 255)
    assert np.abs(right - expected).max() <= 3
    if tag == BT709:
        assert np.abs(given.astype(int) - expected).max() > 3


def test_tags_of_a_stream_are_read(tmp_path):
    for tag, full in ((None, False), (BT709, False), (6, True), (9, False)):
        path = write_tagged(tmp_path / "v.mp4", "libx264", tag, full)
        with av.open(path) as container:
            read = tags(container.streams.video[0].codec_context)
        assert read == (UNTAGGED if tag is None else tag, full)


# What NVDEC decodes


class Driver:
    """Stands in for libnvcuvid: `decodes` maps (codec, chroma, bits) to its largest side."""

    def __init__(self, decodes: dict[tuple[int, int, int], int], error: int = 0):
        self.decodes, self.error, self.asked = decodes, error, 0

    def cuvidGetDecoderCaps(self, pointer) -> int:
        caps = ctypes.cast(pointer, ctypes.POINTER(nvdec._Caps)).contents
        self.asked += 1
        side = self.decodes.get((caps.codec, caps.chroma, caps.bits_minus_8 + 8))
        if side is not None:
            caps.is_supported = 1
            caps.max_width = caps.max_height = side
            caps.max_macroblocks, caps.min_width, caps.min_height = side**2 // 256, 48, 16
        return self.error


HOPPER = {(4, 1, 8): 4096, (8, 1, 8): 8192, (8, 1, 10): 8192, (8, 3, 8): 8192, (10, 1, 8): 8192}


def test_a_gpu_without_av1_is_given_none_of_it(monkeypatch):
    found = nvdec._ask(Driver(HOPPER))
    assert {(c.codec, c.chroma, c.bits) for c in found} == {
        ("h264", "4:2:0", 8), ("hevc", "4:2:0", 8), ("hevc", "4:2:0", 10), ("hevc", "4:4:4", 8),
        ("vp9", "4:2:0", 8),
    }  # fmt: skip
    assert {c.codec for c in nvdec_cutter(found).capabilities} == {"h264", "hevc", "vp9"}
    ada = nvdec._ask(Driver(HOPPER | {(11, 1, 8): 8192, (2, 1, 8): 2032, (9, 1, 8): 4096}))
    assert {c.codec for c in nvdec_cutter(ada).capabilities} == {"h264", "hevc", "vp9", "av1"}
    assert nvdec._ask(Driver(HOPPER, error=100)) == ()


def test_the_structure_is_laid_out_as_the_driver_has_it():
    assert ctypes.sizeof(nvdec._Caps) == 88
    offsets = {name: getattr(nvdec._Caps, name).offset for name, _ in nvdec._Caps._fields_}
    assert offsets["is_supported"] == 24 and offsets["max_width"] == 28
    assert offsets["min_width"] == 40 and offsets["reserved3"] == 48


@pytest.mark.parametrize(
    ("size", "fits"),
    [((1920, 1080), True), ((48, 16), True), ((47, 16), False), ((48, 15), False),
     ((4096, 4096), True), ((4097, 16), False), ((16, 4097), False)],
)  # fmt: skip
def test_sizes_are_within_the_limits(size, fits):
    (h264,) = nvdec._ask(Driver({(4, 1, 8): 4096}))
    assert h264.takes("h264", "4:2:0", 8, *size) == fits
    assert not h264.takes("h264", "4:2:0", 10, *size)
    assert not h264.takes("hevc", "4:2:0", 8, *size)


def test_blocks_are_counted_whole():
    h264 = Capability("h264", "4:2:0", 8, 4096, 4096, max_macroblocks=8160)
    assert h264.takes("h264", "4:2:0", 8, 1920, 1088)  # 120 x 68 blocks
    assert not h264.takes("h264", "4:2:0", 8, 1921, 1088)


def test_without_the_drivers_part_for_video_pyav_decodes_and_it_is_told(monkeypatch):
    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert nvdec.capabilities.__wrapped__(torch.device("cuda", 0)) == ()
    monkeypatch.setattr("zeroi2v.data.pipeline.capabilities", lambda device: ())
    samples = [Sample("v.mp4", 0, frames=8)]
    loader = ClipLoader(samples, config(), batch_size=1, device="cuda")
    assert loader.decoder.startswith("PyAV, as cuda decodes no video")
    with pytest.raises(ValueError, match="decoder 'dali' needs a GPU that decodes video: cuda"):
        ClipLoader(samples, config(), batch_size=1, device="cuda", decoder="dali")


def test_the_decoder_on_the_cpu_is_known_by_trial():
    assert {c.codec for c in DALI_CPU.capabilities} == {"vp9", "mjpeg"}
    assert set(DALI_CPU.matrices.values()) == {"bt601"}
