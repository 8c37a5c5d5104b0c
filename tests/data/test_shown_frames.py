"""Packets are not frames: number, frame i and parts in seconds are one truth however asked."""

import os
from pathlib import Path

import av
import numpy as np
import pytest
from field_coded import write_field_coded
from videos import read_number, write_numbered

from zeroi2v.data.annotations import Sample
from zeroi2v.data.bitstream import _vp9_frames, _vp9_shows, shown_frames
from zeroi2v.data.decode import frame_times, read_frames
from zeroi2v.data.frame_cache import read_sample
from zeroi2v.data.gop import DALI_CPU, Cut
from zeroi2v.data.manifest import inspect_video
from zeroi2v.data.packets import DecodeError, Limit, read_index


def whole(path) -> tuple[list[np.ndarray], list[float]]:
    """The truth: frames of a decode of the whole file, and when each is shown."""
    frames, stamps = [], []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for packet in container.demux(stream):
            try:
                decoded = packet.decode()
            except av.FFmpegError:  # before the first keyframe, as FFmpeg's own programs go on
                assert not frames
                continue
            for frame in decoded:
                frames.append(frame.to_ndarray(format="rgb24"))
                stamps.append(float(frame.pts * stream.time_base))
    return frames, [stamp - stamps[0] for stamp in stamps]


def assert_one_truth(path, folder: Path) -> int:
    """Every way to ask for frames of a file gives those of a whole decode; returns their number."""
    frames, times = whole(path)
    asked: list[int] = []

    def choose(wanted):
        def choice(total):
            asked.append(total)
            return np.array([i for i in wanted if i < total] or [0])

        return choice

    def same(got, wanted, way):
        if isinstance(got, Cut):  # decoded elsewhere: as many frames as are asked for
            assert len(got.frames) == len(wanted), way
            return
        assert len(got) == len(wanted), way
        assert all(np.array_equal(a, frames[i]) for a, i in zip(got, wanted, strict=True)), way

    count = len(frames)
    facts = inspect_video(str(path), "x")
    assert facts.frames == count and facts.error is None
    assert facts.last == pytest.approx(times[-1], abs=2e-3)
    assert frame_times(path) == pytest.approx(times, abs=2e-3)
    for i in range(count):
        same(read_frames(path, choose([i])), [i], f"frame {i} alone")
        assert asked[-1] == count, f"frame {i} alone"
    together = [count - 1, 0, count // 2, count // 3]
    for sample in (Sample(str(path), 0), Sample(str(path), 0, frames=count)):
        for cache, cutter in ((None, None), (None, DALI_CPU), (str(folder), None)):
            got = read_sample(sample, choose(together), None, cache, cutter)
            same(got, together, (sample.frames, cache, cutter))
            assert asked[-1] == count
    for start, end in (
        (None, times[count // 2]),
        (times[count // 3], None),
        (0.3, 0.9),
        (0.9, 1.5),
    ):
        within = [i for i, t in enumerate(times) if (start or 0) - 1e-6 <= t < (end or 1e9) - 1e-6]
        for known in (None, count):
            for cache in (None, str(folder)):
                sample = Sample(str(path), 0, start, end, frames=known)
                if not within:
                    with pytest.raises(DecodeError, match="has no frame from"):
                        read_sample(sample, np.arange, None, cache)
                    continue
                same(
                    read_sample(sample, np.arange, None, cache), within, (start, end, known, cache)
                )
    return count


@pytest.mark.parametrize("name", ["hidden_frames.webm", "head/k.mp4"])
def test_files_seen_to_be_miscounted_give_one_truth(clips, tmp_path, name):
    path = clips.parent / "cases" / name
    if not path.exists():
        pytest.skip(f"no {path}")
    assert assert_one_truth(path, tmp_path) == {"hidden_frames.webm": 75, "head/k.mp4": 50}[name]


def remux(source: str, path: Path, packets) -> Path:
    """Writes (data, pts, dts, is_keyframe) packets of the video in `source` to `path`."""
    options = {"use_editlist": "0"} if path.suffix == ".mp4" else {}
    with av.open(source) as video, av.open(str(path), "w", options=options) as container:
        track = container.add_stream_from_template(video.streams.video[0], opaque=True)
        for data, pts, dts, is_key in packets:
            packet = av.Packet(data)
            packet.pts, packet.dts, packet.is_keyframe = pts, dts, is_key
            packet.time_base, packet.stream = video.streams.video[0].time_base, track
            container.mux(packet)
    return path


def packets_of(source: str) -> list[tuple]:
    with av.open(source) as video:
        return [(bytes(p), p.pts, p.dts, p.is_keyframe) for p in video.demux(video=0) if p.size]


def superframe(parts: list[bytes]) -> bytes:
    """One packet of several frames, with the index of Annex B at its end."""
    marker = bytes([0b110 << 5 | 3 << 3 | len(parts) - 1])
    sizes = b"".join(len(part).to_bytes(4, "little") for part in parts)
    return b"".join(parts) + marker + sizes + marker


def test_hidden_frames_are_told_within_packets_and_in_their_own(clips, tmp_path):
    source = clips.parent / "cases" / "hidden_frames.webm"
    if not source.exists():
        pytest.skip(f"no {source}")
    joined, hidden = [], []
    for data, pts, dts, is_key in packets_of(str(source)):
        assert list(_vp9_frames(data)) == [data]
        if not _vp9_shows(data):
            hidden.append(data)
            continue
        both = superframe([*hidden, data]) if hidden else data
        assert list(_vp9_frames(both)) == [*hidden, data] and shown_frames("vp9", both) == 1
        joined.append((both, pts, dts, is_key))
        hidden = []
    assert len(joined) == 75
    path = remux(str(source), tmp_path / "joined.webm", joined)
    assert assert_one_truth(path, tmp_path / "cache") == 75
    apart, together = (read_frames(str(x), np.arange) for x in (source, path))
    assert np.array_equal(apart, together)


def test_units_of_av1_show_one_frame_each(tmp_path):
    priority = os.sched_getscheduler(0)
    path = write_numbered(tmp_path / "v.mkv", 40, "libsvtav1", g="16", preset="12")
    assert os.sched_getscheduler(0) == priority
    packets = packets_of(path)
    assert [shown_frames("av1", data) for data, *_ in packets] == [1] * 40
    assert assert_one_truth(path, tmp_path / "cache") == 40


@pytest.mark.parametrize("codec", ["vp9", "av1"])
def test_damaged_packets_tell_nothing(codec):
    assert not shown_frames(codec, b"")
    assert shown_frames(codec, b"\xff\xff\xff\xff") is None
    assert shown_frames("h264", b"\x00\x00\x01\x65") is None


@pytest.mark.parametrize(
    ("codec", "options"),
    [("libx264", {"g": "8", "bf": "2"}), ("libx264", {"g": "8", "bf": "0"}),
     ("libx265", {"x265-params": "keyint=8:open-gop=0:log-level=none"}),
     ("libvpx-vp9", {"g": "8", "deadline": "realtime", "cpu-used": "8"})],
)  # fmt: skip
def test_a_file_cut_at_any_packet_gives_one_truth(tmp_path, codec, options):
    suffix = "webm" if codec == "libvpx-vp9" else "mp4"
    source = write_numbered(tmp_path / f"source.{suffix}", 30, codec, **options)
    packets = packets_of(source)
    counts = set()
    for first in (0, 1, 2, 3, 5, 7, 8, 9, 11, 16):
        path = remux(source, tmp_path / f"{first}.{suffix}", packets[first:])
        counts.add(assert_one_truth(path, tmp_path / f"cache{first}"))
    assert len(counts) >= 2


FIELD_CODED = [
    (suffix, packet_of, stamped)
    for suffix in ("mp4", "mov", "mkv", "ts", "avi")
    for packet_of, stamped in (("field", "both"), ("field", "first"), ("frame", "both"))
    if (suffix, stamped) != ("mkv", "first")  # Matroska has a time stamp in every packet
]


@pytest.mark.parametrize(("suffix", "packet_of", "stamped"), FIELD_CODED)
def test_two_fields_are_one_frame(tmp_path, suffix, packet_of, stamped):
    path = tmp_path / f"v.{suffix}"
    write_field_coded(path, 13, packet_of=packet_of, stamped=stamped)
    split = packet_of == "field" or suffix == "ts"  # FFmpeg takes frames in TS apart
    assert len(packets_of(str(path))) == (26 if split else 13)
    assert [read_number(image) for image in whole(path)[0]] == list(range(13))
    assert assert_one_truth(path, tmp_path / "cache") == 13
    facts = inspect_video(str(path), "x")
    assert not facts.vfr
    if suffix != "avi":  # its header counts ticks of the clock
        assert facts.header_frames in (0, 13)


def test_parts_of_field_coded_video_are_measured_in_frames(tmp_path):
    path = write_field_coded(tmp_path / "v.mp4", 13)  # 0.52 s
    frames = read_frames(path, np.arange, start=0.24, end=0.52)
    assert [read_number(image) for image in frames] == [6, 7, 8, 9, 10, 11, 12]


@pytest.mark.parametrize("hidden", [1, 3])
def test_a_film_trimmed_by_its_container_is_still_read_by_seeking(tmp_path, hidden):
    source = write_numbered(tmp_path / "whole.mp4", 24, g="8", bf="0")
    path = tmp_path / "trimmed.mp4"
    with av.open(source) as video, av.open(str(path), "w") as container:
        track = container.add_stream_from_template(video.streams.video[0], opaque=True)
        for packet in video.demux(video=0):
            if packet.size:  # what is shown before 0 is hidden by an edit list
                shift = hidden * packet.duration
                packet.pts, packet.dts, packet.stream = (
                    packet.pts - shift,
                    packet.dts - shift,
                    track,
                )
                container.mux(packet)
    assert assert_one_truth(path, tmp_path / "cache") == 24 - hidden
    with av.open(str(path)) as container:
        discarded = [p.is_discard for p in container.demux(video=0) if p.size]
        assert discarded == [True] * hidden + [False] * (24 - hidden)
    with av.open(str(path)) as container:
        assert read_index(container, container.streams.video[0], Limit(None)).seekable
