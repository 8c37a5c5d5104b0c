"""A video is seen as it asks to be seen, however its frames are asked for."""

import itertools
import struct
from pathlib import Path

import av
import numpy as np
import pytest
from videos import write_video

from zeroi2v import check_data, cli
from zeroi2v.data.annotations import Sample
from zeroi2v.data.decode import read_frames
from zeroi2v.data.frame_cache import read_sample
from zeroi2v.data.gop import DALI_CPU, Cut
from zeroi2v.data.manifest import inspect_video
from zeroi2v.data.orientation import Orientation, read_matrix, turn
from zeroi2v.data.packets import DecodeError

ONE = 1 << 16
MATRICES = [
    np.array([a, 0, 0, 0, d, 0, 0, 0, 1 << 30], np.int32)
    for a, d in itertools.product((ONE, -ONE), repeat=2)
] + [
    np.array([0, b, 0, c, 0, 0, 0, 0, 1 << 30], np.int32)
    for b, c in itertools.product((ONE, -ONE), repeat=2)
]
HEIGHT, WIDTH = 64, 96


def picture(number: int) -> np.ndarray:
    """Four corners of four colours, and a brightness that tells the frame."""
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    image[: HEIGHT // 2, : WIDTH // 2] = (220, 30, 30)
    image[: HEIGHT // 2, WIDTH // 2 :] = (30, 220, 30)
    image[HEIGHT // 2 :, : WIDTH // 2] = (30, 30, 220)
    image[HEIGHT // 2 :, WIDTH // 2 :] = 40 + 12 * number
    return image


def as_displayed(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The definition: the pixel at (x, y) is shown at (a x + c y, b x + d y), moved into view."""
    a, b, _, c, d = (np.sign(matrix[:5])).tolist()
    y, x = np.mgrid[: image.shape[0], : image.shape[1]]
    across, down = a * x + c * y, b * x + d * y
    across, down = across - across.min(), down - down.min()
    out = np.zeros((down.max() + 1, across.max() + 1, 3), image.dtype)
    out[down, across] = image
    return out


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda m: str(read_matrix(m)))
def test_each_upright_matrix_moves_pixels_where_it_says(matrix):
    image = np.arange(HEIGHT * WIDTH * 3, dtype=np.uint16).reshape(HEIGHT, WIDTH, 3)
    assert np.array_equal(turn(image, read_matrix(matrix)), as_displayed(image, matrix))


def test_the_eight_have_names_of_their_own_and_other_angles_are_odd():
    assert len({str(read_matrix(matrix)) for matrix in MATRICES}) == 8
    half = int(ONE * 0.7071)
    odd = np.array([half, half, 0, -half, half, 0, 0, 0, 1 << 30], np.int32)
    assert read_matrix(odd) == Orientation(is_odd=True) and str(read_matrix(odd)) == "odd angle"
    image = picture(0)
    assert np.array_equal(turn(image, read_matrix(odd)), image)


def in_container(source: str, path: Path, matrix: np.ndarray) -> str:
    """A copy of an MP4 or MOV file whose track has that matrix."""
    data = Path(source).read_bytes()
    plain = struct.pack(">9i", ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30)
    at = data.index(b"tkhd")
    place = data.index(plain, at)
    path.write_bytes(data[:place] + struct.pack(">9i", *matrix.tolist()) + data[place + 36 :])
    return str(path)


SEI = {  # mirrored left to right, upside down, turned left by; and the matrix that it stands for
    (0, 0, 90): [0, -ONE, ONE, 0],
    (0, 0, 180): [-ONE, 0, 0, -ONE],
    (0, 0, 270): [0, ONE, -ONE, 0],
    (1, 0, 0): [-ONE, 0, 0, ONE],
    (0, 1, 0): [ONE, 0, 0, -ONE],
}


def in_stream(source: str, path: Path, asked: tuple[int, int, int]) -> str:
    """A copy of an H.264 transport stream whose keyframes have SEI that asks for an orientation."""
    left_right, up_down, degrees = asked
    bits = f"0{left_right}{up_down}{degrees * 65536 // 360:016b}" + "10" + "100"
    unit = b"\x00\x00\x01\x06\x2f\x03" + int(bits, 2).to_bytes(3, "big") + b"\x80"
    slice_ = b"\x00\x00\x01\x65"  # of a keyframe
    with av.open(source) as video, av.open(str(path), "w") as container:
        track = container.add_stream_from_template(video.streams.video[0], opaque=True)
        for old in video.demux(video=0):
            if old.size:
                packet = av.Packet(bytes(old).replace(slice_, unit + slice_, 1))
                packet.pts, packet.dts, packet.time_base = old.pts, old.dts, old.time_base
                packet.is_keyframe, packet.stream = old.is_keyframe, track
                container.mux(packet)
    return str(path)


def reads(path: str, folder: Path):
    """Frames 0, 5 and 11: alone, together, all in order, through the cache and the manifest."""
    wanted = np.array([0, 5, 11])
    together = read_frames(path, lambda n: wanted)
    yield "together", together
    yield "alone", np.stack([read_frames(path, lambda n, i=i: np.array([i]))[0] for i in wanted])
    yield "all", read_frames(path, np.arange)[wanted]
    for _ in range(2):
        yield "cache", read_sample(Sample(path, 0), lambda n: wanted, None, str(folder), None)
    facts = inspect_video(path, path)
    known = Sample(path, 0, frames=facts.frames)
    yield "manifest", read_sample(known, lambda n: wanted, None, None, DALI_CPU)


def assert_seen(path: str, folder: Path, matrix: np.ndarray) -> None:
    expected = np.stack([as_displayed(picture(i), matrix) for i in (0, 5, 11)]).astype(int)
    for way, frames in reads(path, folder):
        if isinstance(frames, Cut):
            assert str(read_matrix(matrix)) == "upright"
            continue
        assert frames.shape == expected.shape, way
        inner = np.abs(frames.astype(int) - expected).mean(-1)
        assert np.median(inner) <= 6 and inner.mean() < 12, way  # but for the lines between
    assert inspect_video(path, path).orientation == str(read_matrix(matrix))


CODECS = {"libx264": ("mp4", {"g": "6", "bf": "2"}), "mpeg4": ("mov", {"g": "6", "q": "2"}),
          "libx265": ("mp4", {"x265-params": "keyint=6:open-gop=0:log-level=none"}),
          "mjpeg": ("mov", {})}  # fmt: skip


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    images = [picture(i) for i in range(12)]
    return {
        codec: write_video(folder / f"{codec}.{suffix}", images, codec, **options)
        for codec, (suffix, options) in CODECS.items()
    } | {"ts": write_video(folder / "v.ts", images, "libx264", g="6", bf="2")}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("matrix", MATRICES, ids=lambda m: str(read_matrix(m)))
def test_all_matrices_of_a_container_by_every_way_to_read(sources, tmp_path, codec, matrix):
    suffix = CODECS[codec][0]
    assert_seen(in_container(sources[codec], tmp_path / f"v.{suffix}", matrix), tmp_path, matrix)


@pytest.mark.parametrize("suffix", ["mkv", "mp4", "ts"])
@pytest.mark.parametrize("asked", SEI)
def test_what_keyframes_ask_for_holds_for_the_frames_after_them(sources, tmp_path, asked, suffix):
    a, b, c, d = SEI[asked]
    matrix = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], np.int32)
    path = in_stream(sources["ts"], tmp_path / f"v.{suffix}", asked)
    with av.open(path) as container:  # the file has it at keyframes alone
        brought = [
            any(data.type.name == "DISPLAYMATRIX" for data in frame.side_data)
            for frame in container.decode(video=0)
        ]
    assert 0 < sum(brought) < 12
    assert_seen(path, tmp_path, matrix)


def test_odd_angles_are_left_unturned_and_told(sources, tmp_path, capsys):
    half = int(ONE * 0.7071)
    odd = np.array([half, half, 0, -half, half, 0, 0, 0, 1 << 30], np.int32)
    path = in_container(sources["libx264"], tmp_path / "v.mp4", odd)
    frames = read_frames(path, np.arange)
    assert np.array_equal(frames, read_frames(sources["libx264"], np.arange))
    (tmp_path / "list.txt").write_text(f"{path} 0\n")
    words = [str(tmp_path / "list.txt"), "--root", "/", "--out", str(tmp_path / "m.jsonl")]
    assert cli.run(check_data.main, words) == 0
    assert f"note        1 videos have an odd rotation angle, which is ignored: {path[1:]}" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("name", ["hflip.mp4", "flip.mkv"])
def test_mirrored_files_are_seen_mirrored(clips, name):
    path = clips.parent / "cases" / "orientation" / name
    if not path.exists():
        pytest.skip(f"no {path}")
    frames = read_frames(path, np.arange)
    alone = np.stack(
        [read_frames(path, lambda n, i=i: np.array([i]))[0] for i in range(len(frames))]
    )
    assert np.array_equal(frames, alone)
    for frame in frames:  # green red / white blue
        quarters = frame.reshape(2, frame.shape[0] // 2, 2, frame.shape[1] // 2, 3).mean((1, 3))
        names = [["green", "red"], ["white", "blue"]]
        for row, name_row in zip(quarters, names, strict=True):
            for colour, wanted in zip(row, name_row, strict=True):
                strong = {"green": [1], "red": [0], "blue": [2], "white": [0, 1, 2]}[wanted]
                assert all((colour[i] > 100) == (i in strong) for i in range(3)), (wanted, colour)


def test_a_change_of_orientation_within_a_clip_is_named(sources, tmp_path):
    turned = in_stream(sources["ts"], tmp_path / "a.ts", (0, 0, 90))
    both = tmp_path / "both.ts"
    both.write_bytes(Path(sources["ts"]).read_bytes() + Path(turned).read_bytes())
    with pytest.raises(DecodeError, match="changes its frames from 96x64 upright to 96x64 turned"):
        read_frames(str(both), np.arange)
