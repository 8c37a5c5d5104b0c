"""Frames by seeking against a decode of the whole file, on made, real and damaged videos."""

import csv
import time
from pathlib import Path

import av
import numpy as np
import pytest
from loading import whole_decode
from videos import hide_frame, numbered_frame, read_number, write_numbered, write_video

from zeroi2v.data import decode, packets
from zeroi2v.data.decode import read_frames
from zeroi2v.data.packets import DecodeError
from zeroi2v.data.sampling import dense_indices, uniform_indices

# Files of the seekable kinds for which seeking finds something amiss. H.264 with open GOPs: the
# frames after the keyframe name references that it does not have.
NOT_SEEKABLE = {"derived/walk_h264_opengop.mkv"}


def every(total):
    return np.arange(total)


def forbid(monkeypatch, name):
    def fail(*args):
        raise AssertionError(f"{name} must not be called")

    monkeypatch.setattr(decode, name, fail)


def manifest(clips):
    with open(clips / "manifest.tsv", newline="") as lines:
        return list(csv.DictReader(lines, delimiter="\t"))


@pytest.mark.parametrize(
    ("name", "codec", "options", "seeks"),
    [
        ("b.mp4", "libx264", {"g": "12", "bf": "3", "b-pyramid": "normal"}, True),
        ("long.mp4", "libx264", {"g": "300"}, True),
        ("intra.mkv", "libx264", {"g": "1"}, True),
        ("hevc.mp4", "libx265", {"x265-params": "keyint=12:open-gop=1:log-level=none"}, True),
        ("vp9.webm", "libvpx-vp9", {"g": "12", "deadline": "realtime", "cpu-used": "8"}, True),
        ("mpeg4.avi", "mpeg4", {"g": "12", "bf": "2"}, False),
        ("ts.ts", "libx264", {"g": "12"}, False),
        ("mjpeg.avi", "mjpeg", {}, True),
        ("vp8.webm", "libvpx", {"g": "12", "deadline": "realtime"}, False),
    ],
)
def test_each_frame_of_a_made_video_is_found(tmp_path, monkeypatch, name, codec, options, seeks):
    path = write_numbered(tmp_path / name, 50, codec, **options)
    forbid(monkeypatch, "_decode_in_order" if seeks else "_decode_by_seek")
    for wanted in ([0], [49], [11, 12, 13], [30, 2, 30, 47], range(50)):
        frames = read_frames(path, lambda total, wanted=wanted: np.array(wanted))
        assert [read_number(frame) for frame in frames] == list(wanted)


def test_a_packet_whose_frame_is_hidden_is_not_counted(tmp_path):
    plain = write_numbered(tmp_path / "v.webm", 30, "libvpx", g="12", deadline="realtime")
    path = hide_frame(plain, tmp_path / "hidden.webm", 7)
    totals = []

    def all_of_them(total):
        totals.append(total)
        return np.arange(total)

    frames = read_frames(path, all_of_them)
    assert totals == [30, 29]
    assert [read_number(frame) for frame in frames] == [i for i in range(30) if i != 7]


def test_frames_take_the_shape_of_the_indices(tmp_path):
    path = write_numbered(tmp_path / "v.mp4", 20)
    totals = []

    def choose(total):
        totals.append(total)
        return np.array([[0, 5, 19], [5, 5, 1]])

    frames = read_frames(path, choose)
    assert frames.shape == (2, 3, 96, 128, 3) and frames.dtype == np.uint8
    assert totals == [20]
    assert [read_number(frame) for frame in frames.reshape(-1, 96, 128, 3)] == [0, 5, 19, 5, 5, 1]


@pytest.mark.parametrize("name", ["v.mp4", "v.avi"])
def test_start_and_end_keep_the_frames_shown_from_start_to_before_end(tmp_path, name):
    codec = "libx264" if name == "v.mp4" else "mpeg4"
    path = write_numbered(tmp_path / name, 60, codec)
    for start, end, first, last in (
        (None, None, 0, 60),
        (0.5, None, 15, 60),
        (None, 1.0, 0, 30),
        (0.5, 1.0, 15, 30),
        (0.51, 1.01, 16, 31),
        (1.9, 99.0, 57, 60),
    ):
        frames = read_frames(path, every, start, end)
        assert [read_number(frame) for frame in frames] == list(range(first, last))
    with pytest.raises(
        DecodeError, match=f"{name}: has no frame from 2.5 to 3.0 s: its last one is at 1.967 s"
    ):
        read_frames(path, every, 2.5, 3.0)


def test_labelled_parts_of_real_videos_are_their_frames(clips):
    """Parts that a list of frames names, asked for by their seconds."""
    with open(clips / "annotations/tiny/intel_segments.tsv", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t"))
    assert len(rows) == 39
    rates = {row["file"]: float(row["fps"] or 0) for row in manifest(clips)}
    for row in rows[::8]:
        path, rate = clips / row["file"], rates[row["file"]]
        first, last = int(row["start_frame"]), int(row["end_frame_excl"])
        half = 0.5 / rate
        part = read_frames(
            path, lambda n: np.array([0, n // 2, n - 1]), first / rate - half, last / rate - half
        )
        picks = np.array([first, first + (last - first) // 2, last - 1])
        assert np.array_equal(part, read_frames(path, lambda n, picks=picks: picks)), row


def test_times_of_a_variable_frame_rate_count(tmp_path):
    times = [0, 9000, 90000, 99000, 270000]  # 0, 0.1, 1, 1.1 and 3 s
    images = [numbered_frame(i, 64, 64) for i in range(5)]
    path = write_video(tmp_path / "vfr.mp4", images, times=times)
    frames = read_frames(path, every, 0.1, 1.1)
    assert [read_number(frame) for frame in frames] == [1, 2]


def test_intact_files_give_the_frames_of_a_whole_decode(clips, monkeypatch):
    in_order = []
    decode_in_order = decode._decode_in_order
    monkeypatch.setattr(
        decode, "_decode_in_order", lambda *a: in_order.append(a[0]) or decode_in_order(*a)
    )
    rows = [row for row in manifest(clips) if row["status"] == "ok"]
    assert len(rows) == 79
    for row in rows:
        path = clips / row["file"]
        few = int(row["w"]) >= 1280
        draws = [
            lambda total: np.random.default_rng(total).integers(total, size=3),
            lambda total: dense_indices(total, 8, 4).ravel(),
            lambda total: uniform_indices(total, 5).ravel(),
        ]
        got, totals = {}, []
        for draw in draws[:1] if few else draws:

            def choose(total, draw=draw, totals=totals):
                totals.append(total)
                return draw(total)

            frames = read_frames(path, choose)
            got |= dict(zip(draw(totals[-1]).tolist(), frames, strict=True))
        want, count = whole_decode(path, got)
        assert totals[-1] == count, row["file"]
        for i, frame in want.items():
            assert np.array_equal(got[i], frame), (row["file"], i)

        container = {"matroska,webm", "mov,mp4,m4a,3gp,3g2,mj2"} & {row["container"]}
        seekable = container and row["codec"] in ("h264", "hevc", "av1", "vp9")
        seekable = seekable or (row["container"], row["codec"]) == ("avi", "mjpeg")
        seekable = bool(seekable) and row["file"] not in NOT_SEEKABLE
        assert (str(path) not in in_order) == seekable, row["file"]


def test_the_true_number_of_frames_counts_where_the_header_lies(clips):
    path = clips / "actions/wave__hmdb51_SchoolRules_0.avi"
    totals = []

    def choose(total):
        totals.append(total)
        return np.array([total - 1])

    last = read_frames(path, choose)[0]
    assert totals == [75, 74]
    want, count = whole_decode(path, {73})
    assert count == 74 and np.array_equal(last, want[73])


@pytest.mark.parametrize("name", ["v.mp4", "v.avi"])
def test_a_known_number_of_frames_is_believed_until_the_file_says_otherwise(
    tmp_path, monkeypatch, name
):
    path = write_numbered(tmp_path / name, 40, "libx264" if name == "v.mp4" else "mpeg4")
    decoded = []
    one = decode._Converter.__call__
    monkeypatch.setattr(decode._Converter, "__call__", lambda *a: decoded.append(1) or one(*a))
    for known, totals in ((40, [40]), (38, [38]), (43, [43, 40])):
        asked = []

        def last(total, asked=asked):
            asked.append(total)
            return np.array([3, total - 1])

        frames = read_frames(path, last, frames=known)
        assert asked == totals and [read_number(f) for f in frames] == [3, totals[-1] - 1]
    forbid(monkeypatch, "_decode_by_seek")
    if name == "v.avi":  # what lies behind the last wanted frame is not decoded
        count = []
        whole = decode.all_frames
        monkeypatch.setattr(
            decode, "all_frames", lambda *a: (count.append(1) or f for f in whole(*a))
        )
        for known, most in ((40, 7), (None, 40)):
            count.clear()
            read_frames(path, lambda total: np.array([5, 2]), frames=known)
            assert len(count) <= most and (known or len(count) == 40)


@pytest.mark.parametrize(
    ("file", "shape"),
    [
        ("rotated_90__decord.mov", (568, 320, 3)),
        ("rotated_180__decord.mov", (320, 568, 3)),
        ("rotated_270__decord.mov", (568, 320, 3)),
        ("rotated_90__nasa_13013.mp4", (480, 270, 3)),
    ],
)
def test_rotated_files_come_upright(clips, monkeypatch, file, shape):
    by_seek = read_frames(clips / "robust" / file, every)
    assert by_seek.shape[1:] == shape
    monkeypatch.setattr(packets, "SEEKABLE", {})
    assert np.array_equal(read_frames(clips / "robust" / file, every), by_seek)


def test_damaged_files_give_true_frames_or_an_error(clips):
    intact = {
        "derived/CORRUPT_bitflips.mp4": "derived/walk_h264_gop12.mp4",
        "derived/CORRUPT_truncated_faststart.mp4": "derived/walk_h264_faststart.mp4",
    }
    good = bad = 0
    for damaged, original in intact.items():
        want = read_frames(clips / original, every)
        for i in range(0, len(want), 2):
            try:
                frame = read_frames(clips / damaged, lambda total, i=i: np.array([i % total]))[0]
            except DecodeError as error:
                assert damaged in str(error)
                bad += 1
            else:
                total = []
                read_frames(clips / damaged, lambda n, t=total: t.append(n) or np.array([0]))
                assert np.array_equal(frame, want[i % total[-1]]), (damaged, i)
                good += 1
    assert good > 30 and bad > 10

    # Ends in the middle without an error: what it holds are its frames.
    path = clips / "derived/CORRUPT_truncated.mkv"
    want, count = whole_decode(path, set(range(26)))
    assert count == 26
    assert np.array_equal(read_frames(path, every), [want[i] for i in range(26)])


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("derived/CORRUPT_no_moov.mp4", "Invalid data found"),
        ("derived/CORRUPT_empty.mp4", "Invalid data found"),
        ("derived/CORRUPT_text.mp4", "Invalid data found"),
        ("derived/NOVIDEO_audio_only.mp4", "has no video stream that can be decoded"),
        ("derived/CORRUPT_bitflips.mp4", "damaged after frame|is damaged"),
        ("robust/CORRUPT_packet__decord.mp4", "damaged after frame 28: Invalid data found"),
        ("derived/nowhere.mp4", "No such file or directory"),
        ("derived", "Is a directory|Invalid|Permission|denied"),
    ],
)
def test_unusable_files_are_named_with_the_reason(clips, file, reason):
    with pytest.raises(DecodeError, match=f"{file}: .*({reason})"):
        read_frames(clips / file, every)


def test_unusable_made_files_are_named_with_the_reason(tmp_path):
    path = tmp_path / "empty.mp4"
    path.touch()
    with pytest.raises(DecodeError, match=r"empty\.mp4: Invalid data found"):
        read_frames(path, every)
    with pytest.raises(DecodeError, match=r"nowhere\.mp4: No such file or directory"):
        read_frames(tmp_path / "nowhere.mp4", every)


def test_absurd_sizes_are_refused_before_any_frame_is_decoded(tmp_path, monkeypatch):
    path = write_numbered(tmp_path / "v.mp4", 3, size=(64, 128))
    monkeypatch.setattr(packets, "MAX_SIDE", 100)
    forbid(monkeypatch, "_decode_by_seek")
    with pytest.raises(DecodeError, match=r"v\.mp4: frames must be at most 100 .* got 128x64"):
        read_frames(path, every)


def test_clips_too_large_to_hold_are_refused_before_any_frame_is_decoded(tmp_path, monkeypatch):
    paths = [write_numbered(tmp_path / "v.mp4", 3), write_numbered(tmp_path / "v.avi", 3, "mpeg4")]
    monkeypatch.setattr(decode, "_Converter", None)
    for path in paths:
        monkeypatch.setattr(decode, "MAX_CLIP_BYTES", 3 * 96 * 128 * 3 - 1)
        with pytest.raises(DecodeError, match="clip must be at most .* got 3 frames of 128x96"):
            read_frames(path, every)
        monkeypatch.setattr(packets, "MAX_PIXELS", 96 * 128 - 1)
        with pytest.raises(DecodeError, match="frames must be at most 12287 pixels: got 128x96"):
            read_frames(path, every)
        monkeypatch.undo()
        monkeypatch.setattr(decode, "_Converter", None)


def test_a_stream_that_grows_absurd_on_the_way_is_refused_by_the_decoder(tmp_path, monkeypatch):
    small = write_numbered(tmp_path / "small.ts", 5, size=(64, 64))
    large = write_numbered(tmp_path / "large.ts", 5, size=(512, 512))
    both = tmp_path / "both.ts"
    both.write_bytes(Path(small).read_bytes() + Path(large).read_bytes())
    with pytest.raises(DecodeError, match=r"both\.ts: changes its frames from"):
        read_frames(both, every)
    monkeypatch.setattr(packets, "MAX_PIXELS", 64 * 64)
    with pytest.raises(
        DecodeError, match=r"both\.ts: (damaged after|contains no|frame \d+ cannot)"
    ):
        read_frames(both, every)


def test_decoding_ends_at_the_time_limit(tmp_path, monkeypatch):
    for name, codec in (("v.mp4", "libx264"), ("v.avi", "mpeg4")):
        path = write_numbered(tmp_path / name, 30, codec)
        assert len(read_frames(path, every, timeout=60)) == 30
        with pytest.raises(DecodeError, match=f"{name}: takes longer to (decode|read) than the"):
            read_frames(path, every, timeout=1e-9)
        # Frames that each take a while: stopped soon after the limit, not at the end of the file.
        slow = decode._Converter.__call__
        monkeypatch.setattr(
            decode._Converter, "__call__", lambda *a, f=slow: time.sleep(0.3) or f(*a)
        )
        begun = time.perf_counter()
        with pytest.raises(DecodeError, match="takes longer to decode than the time limit of 0.2"):
            read_frames(path, every, timeout=0.2)
        assert time.perf_counter() - begun < 6  # all of them would take 9 s
        monkeypatch.undo()


@pytest.mark.parametrize("name", ["v.mp4", "v.avi"])
def test_a_file_that_vanishes_or_shrinks_while_it_is_read_is_an_error_or_whole(tmp_path, name):
    path = tmp_path / name
    write_numbered(path, 40, "libx264" if name == "v.mp4" else "mpeg4")
    whole, content = read_frames(path, every), path.read_bytes()

    def vanish(total):
        path.unlink(missing_ok=True)
        return np.arange(total)

    def shrink(total):
        with open(path, "r+b") as file:
            file.truncate(len(content) // 2)
        return np.arange(total)

    for change in (vanish, shrink):
        path.write_bytes(content)
        try:
            frames = read_frames(path, change)
        except DecodeError as error:
            assert str(path) in str(error)
        else:
            assert np.array_equal(frames, whole[: len(frames)])


def test_a_file_of_one_frame_or_fewer_than_asked_repeats_or_wraps(tmp_path):
    for count in (1, 3):
        for name, codec in (("v.mp4", "libx264"), ("v.avi", "mpeg4"), ("v.webm", "libvpx-vp9")):
            path = write_numbered(tmp_path / name, count, codec)
            for draw in (
                lambda n: uniform_indices(n, 8)[0],
                lambda n: dense_indices(n, 8, 4)[0],
                lambda n: uniform_indices(n, 8, rng=np.random.default_rng(0))[0],
            ):
                frames = read_frames(path, draw)
                assert [read_number(frame) for frame in frames] == draw(count).tolist()


def test_of_several_streams_the_best_video_is_read(clips, tmp_path):
    """The larger of two videos; sound beside it changes nothing; sound alone is an error."""
    path = clips / "actions/inspecting_mirror__nasa_13013.mp4"
    with av.open(str(path)) as container:
        sizes = [(s.codec_context.height, s.codec_context.width) for s in container.streams.video]
    assert len(sizes) == 2
    assert read_frames(path, lambda n: np.array([0])).shape[1:3] == max(sizes)
    with pytest.raises(DecodeError, match="has no video stream that can be decoded"):
        read_frames(clips / "derived/NOVIDEO_audio_only.mp4", every)


def test_names_are_files_and_never_addresses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("-dash.mp4", "a:b.mp4", "with space.mp4", "pipe:0.mp4"):
        write_numbered(tmp_path / name, 2)
        assert len(read_frames(name, every)) == 2
    with pytest.raises(DecodeError, match="No such file"):
        read_frames("http://localhost/v.mp4", every)
