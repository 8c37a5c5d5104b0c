"""check_data: what it finds out, resuming, what it calls a problem; training by its manifest."""

import csv
import json
import os
import shutil
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from videos import write_numbered

from zeroi2v import check_data
from zeroi2v.check_data import main
from zeroi2v.cli import run
from zeroi2v.data import manifest
from zeroi2v.data.annotations import Sample, read_list
from zeroi2v.data.decode import read_frames
from zeroi2v.data.manifest import inspect_video, read_manifest, use_manifest
from zeroi2v.data.packets import DecodeError


@pytest.fixture
def dataset(tmp_path):
    """Three good videos of classes 0, 1, 1 and a bad one of class 0; their list."""
    (tmp_path / "v").mkdir()
    for i in range(3):
        write_numbered(tmp_path / f"v/{i}.mp4", 10 + i)
    (tmp_path / "v/bad.mp4").write_bytes(b"no video")
    source = tmp_path / "train.txt"
    source.write_text("0.mp4 0\n1.mp4 1\nbad.mp4 0\n2.mp4 1\n")
    return SimpleNamespace(list=str(source), root=str(tmp_path / "v"), out=tmp_path / "m.jsonl")


def arguments(dataset, *more, name=None):
    return [
        name or dataset.list,
        *("--root", dataset.root, "--out", str(dataset.out), "--workers", "1", *more),
    ]


def test_bad_files_are_named_and_make_the_command_fail(dataset, capsys):
    assert run(main, arguments(dataset)) == 1
    out, err = capsys.readouterr()
    assert "bad.mp4: Invalid data found" in out
    assert "4 with 33 frames, of them 1 bad" in out
    assert err.splitlines()[-1] == "error: found 1 bad files and 0 other problems"
    rows = read_manifest(dataset.out)
    assert list(rows) and rows["2.mp4"].frames == 12 and rows["2.mp4"].error is None
    assert rows["2.mp4"].codec == "h264" and (rows["2.mp4"].width, rows["2.mp4"].height) == (
        128,
        96,
    )


def test_a_good_dataset_passes(dataset):
    write_numbered(f"{dataset.root}/bad.mp4", 3)
    main(arguments(dataset))
    assert sum(facts.frames for facts in read_manifest(dataset.out).values()) == 36


def test_a_second_scan_looks_only_at_what_is_new_or_changed_or_was_cut_short(
    dataset, monkeypatch, capsys
):
    run(main, arguments(dataset))
    first = read_manifest(dataset.out)
    seen = []

    def inspect_all(todo, workers):
        seen.extend(job[1] for job in todo)
        return [(path, inspect_video(path, *rest)) for path, *rest in todo]

    monkeypatch.setattr(check_data, "_inspect_all", inspect_all)
    run(main, arguments(dataset))
    assert seen == [] and read_manifest(dataset.out) == first

    lines = dataset.out.read_text().splitlines()
    last = json.loads(lines[-1])["path"]
    dataset.out.write_text("\n".join(lines)[:-9])
    changed = "1.mp4" if last != "1.mp4" else "0.mp4"
    write_numbered(f"{dataset.root}/{changed}", 20)
    run(main, arguments(dataset))
    assert sorted(seen) == sorted({last, changed})
    assert read_manifest(dataset.out) == first | {
        name: inspect_video(f"{dataset.root}/{name}", name) for name in (changed,)
    }


def test_a_manifest_that_is_something_else_is_not_overwritten(dataset):
    dataset.out.write_text('{"a": 1}\nmore\n')
    with pytest.raises(ValueError, match="m.jsonl line 1: must be a line of a manifest"):
        main(arguments(dataset))
    assert dataset.out.read_text() == '{"a": 1}\nmore\n'


@pytest.mark.parametrize(
    ("labels", "classes", "problem"),
    [
        ((0, 1, 2), None, None),
        ((1, 2, 3), None, "labels go from 1 to 3: they should count from 0"),
        ((1, 3, 3), 3, "labels must be below 3: got 3|labels go from 1 to 3: they should"),
        ((0, 0, 2), None, "1 of 3 labels have no video: 1"),
        ((0, 1, 2), 12, "9 of 12 labels have no video: 3, 4, 5, 6, 7 and 4 more"),
        ((0, 1, 4), 3, "labels must be below 3: got 4|1 of 3 labels have no video: 2"),
    ],
)
def test_suspicious_labels_are_reported(labels, classes, problem):
    samples = [Sample(f"{i}.mp4", label) for i, label in enumerate(labels)]
    problems = check_data.label_problems(samples, classes or 1 + max(labels))
    assert len(problems) == (problem.count("|") + 1 if problem else 0)
    for text, want in zip(problems, (problem or "").split("|"), strict=False):
        assert want in text


def test_videos_in_both_lists_or_twice_are_reported(dataset, tmp_path, capsys):
    shutil.copy(f"{dataset.root}/0.mp4", f"{dataset.root}/copy.mp4")
    (tmp_path / "twice.txt").write_text("0.mp4 0\n1.mp4 1\n0.mp4 0\n1.mp4 0\n")
    (tmp_path / "val.txt").write_text("copy.mp4 0\n1.mp4 1\n2.mp4 1\n")
    more = ("--val", str(tmp_path / "val.txt"))
    with pytest.raises(ValueError, match="found 0 bad files and 3 other problems"):
        main(arguments(dataset, *more, name=str(tmp_path / "twice.txt")))
    out = capsys.readouterr().out
    assert f"2 videos are listed twice: {dataset.root}/0.mp4, {dataset.root}/1.mp4" in out
    assert f"1 videos have several labels: {dataset.root}/1.mp4" in out
    shared = f"{dataset.root}/copy.mp4 (= {dataset.root}/0.mp4), {dataset.root}/1.mp4"
    assert f"2 videos are in both lists: {shared}" in out


def crash_on_bad(path, name, timeout):
    if "bad" in path:
        os.abort()
    return inspect_video(path, name, timeout)


def hang_on_bad(path, name, timeout):
    if "bad" in path:
        time.sleep(600)
    return inspect_video(path, name, timeout)


@pytest.mark.parametrize("inspect", [crash_on_bad, hang_on_bad])
def test_a_file_that_kills_or_hangs_its_process_is_a_bad_one(dataset, monkeypatch, inspect):
    monkeypatch.setattr(check_data, "inspect_video", inspect)
    with pytest.raises(ValueError, match="found 1 bad files and 0 other problems"):
        main(arguments(dataset, "--timeout", "1.5"))
    rows = read_manifest(dataset.out)
    assert {name: facts.error for name, facts in rows.items() if facts.error} == {
        "bad.mp4": "crashes or hangs the decoder"
    }
    assert len(rows) == 4


def test_a_manifest_tells_bad_files_and_numbers_of_frames_unless_they_have_changed(
    dataset, tmp_path
):
    run(main, arguments(dataset))
    samples = read_list(dataset.list, dataset.root)
    bad = f"{dataset.root}/bad.mp4"
    known, reasons = use_manifest(samples, dataset.out, dataset.root)
    assert [s.frames for s in known] == [10, 11, None, 12]
    assert [replace(s, frames=None) for s in known] == samples
    assert list(reasons) == [bad] and reasons[bad].startswith(f"{bad}: Invalid data found")
    write_numbered(bad, 3)
    assert use_manifest(samples, dataset.out, dataset.root) == (known, {})
    with pytest.raises(ValueError, match="m.jsonl must be a manifest of the list, made with the"):
        use_manifest(samples, dataset.out, tmp_path / "elsewhere")
    assert use_manifest(samples, dataset.out, tmp_path, of_this_list=False) == (samples, {})
    with pytest.raises(OSError, match="nowhere"):
        use_manifest(samples, tmp_path / "nowhere", dataset.root)


def test_facts_of_real_files_are_those_of_their_manifest(clips):
    with open(clips / "manifest.tsv", newline="") as lines:
        rows = {row["file"]: row for row in csv.DictReader(lines, delimiter="\t")}
    flags = {
        "derived/walk_h264_vfr.mp4": (True, False),
        "derived/walk_h264_opengop.mkv": (False, True),
        "derived/walk_h264_bframes.avi": (False, False),
        "derived/walk_vp9.webm": (False, False),
        "derived/walk_h264.ts": (False, False),
        "derived/walk_mjpeg.avi": (False, False),
        "robust/hevc__torchcodec.mp4": (False, True),
        "robust/rotated_90__nasa_13013.mp4": (False, False),
    }
    for name, (vfr, open_gop) in flags.items():
        facts, row = inspect_video(str(clips / name), name), rows[name]
        assert (facts.vfr, facts.open_gop, facts.error) == (vfr, open_gop, None), name
        mine = (facts.frames, facts.keyframes, facts.codec, facts.sha256)
        assert [str(x) for x in mine] == [
            row[key] for key in ("frames", "keyframes", "codec", "sha256")
        ], name
        clockwise = -int(row["rotation"]) % 360
        assert facts.orientation == (f"turned by {clockwise} degrees" if clockwise else "upright")
        assert (facts.width, facts.height) == (int(row["w"]), int(row["h"]))
    lying = inspect_video(str(clips / "actions/wave__hmdb51_SchoolRules_0.avi"), "x")
    assert (lying.header_frames, lying.frames, lying.error) == (75, 74, None)


@pytest.mark.parametrize(
    ("file", "frames", "error"),
    [
        ("robust/CORRUPT_packet__decord.mp4", 28, "damaged after frame 28"),
        ("derived/CORRUPT_truncated_faststart.mp4", 43, "damaged after frame 43"),
        ("derived/CORRUPT_no_moov.mp4", None, "Invalid data found"),
        ("derived/NOVIDEO_audio_only.mp4", None, "has no video stream"),
        ("nowhere.mp4", None, "No such file"),
    ],
)
def test_damaged_files_have_their_reason(clips, file, frames, error):
    facts = inspect_video(str(clips / file), file)
    assert facts.frames == frames and error in facts.error and str(clips) not in facts.error


def test_a_folder_of_images_is_a_video(clips):
    facts = inspect_video(str(clips / "annotations/rawframes/imgs"), "imgs")
    assert (facts.codec, facts.frames, facts.width, facts.height) == ("images", 10, 320, 240)
    assert facts.error is None


def test_a_scan_over_its_time_limit_is_an_error(tmp_path):
    path = write_numbered(tmp_path / "v.mp4", 10)
    assert "longer" in inspect_video(path, "v", 1e-9).error


def checked(tmp_path, text: str, *more: str, name: str = "list.csv") -> int:
    (tmp_path / name).write_text(text)
    words = [str(tmp_path / name), "--root", str(tmp_path), "--workers", "1"]
    return run(main, [*words, "--out", str(tmp_path / "m.jsonl"), *more])


def test_parts_are_held_against_the_length_of_their_film(tmp_path, capsys):
    write_numbered(tmp_path / "film.mp4", 60)  # 2 s
    parts = ["film.mp4,0,0,1", "film.mp4,0,1,2", "film.mp4,0,1,2.01"]
    assert checked(tmp_path, "\n".join(["path,label,start,end", *parts])) == 0
    parts += ["film.mp4,0,2.5,3", "film.mp4,0,1,2.4"]
    assert checked(tmp_path, "\n".join(["path,label,start,end", *parts])) == 1
    out = capsys.readouterr().out
    film = f"{tmp_path}/film.mp4"
    assert f"1 parts begin after the end of their video: {film} (from 2.5 to 3.0 s), 2.000 s" in out
    assert f"1 parts reach past the end of their video: {film} (from 1.0 to 2.4 s), 2.000 s" in out


@pytest.mark.parametrize(
    ("part", "is_shared"),
    [("0.5,1.5", True), ("1,2", False), (",", True), ("0,0.2", True), ("1.0,", False)],
)
def test_parts_of_one_film_are_shared_where_they_overlap(tmp_path, capsys, part, is_shared):
    write_numbered(tmp_path / "film.mp4", 60)
    shutil.copy(tmp_path / "film.mp4", tmp_path / "copy.mp4")
    for name in ("film", "copy"):
        (tmp_path / "val.csv").write_text(f"path,label,start,end\n{name}.mp4,0,{part}\n")
        text = "path,label,start,end\nfilm.mp4,0,0,1\n"
        assert checked(tmp_path, text, "--val", str(tmp_path / "val.csv")) == is_shared
        assert ("1 videos are in both lists" in capsys.readouterr().out) == is_shared


def test_what_videos_are_not_expected_to_be_is_told(tmp_path, capsys):
    path = write_numbered(tmp_path / "whole.mkv", 60, g="12")
    data = Path(path).read_bytes()
    (tmp_path / "short.mkv").write_bytes(data[: len(data) // 2])
    with av.open(str(tmp_path / "wide.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=30)
        stream.height, stream.width, stream.pix_fmt = 96, 128, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        stream.codec_context.color_trc = 16
        for i in range(6):
            frame = av.VideoFrame.from_ndarray(np.full((96, 128, 3), 9 * i, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    names = "".join(f"{name} 0\n" for name in ("whole.mkv", "short.mkv", "wide.mp4"))
    assert checked(tmp_path, names, name="list.txt") == 0
    notes = [x for x in capsys.readouterr().out.splitlines() if x.startswith("note")]
    assert len(notes) == 3
    assert "1 videos have pixels that are not square, which is ignored: wide.mp4" in notes[0]
    assert "1 videos are HDR, and are read as SDR: wide.mp4" in notes[1]
    assert "1 videos contain less than their header says: short.mkv (0." in notes[2]
    assert " of 2 s)" in notes[2]


def test_promised_frames_that_are_missing_are_named(clips):
    facts = inspect_video(str(clips / "actions/wave__hmdb51_SchoolRules_0.avi"), "wave.avi")
    (note,) = check_data.notes([facts])
    assert note.endswith("contain less than their header says: wave.avi (frames 74 to 74 of 75)")


def test_sound_with_a_cover_picture_is_no_video(clips, tmp_path, capsys):
    path = clips.parent / "cases" / "podcast.mp4"
    if not path.exists():
        pytest.skip(f"no {path}")
    with pytest.raises(DecodeError, match="podcast.mp4: has no video, only a cover picture"):
        read_frames(str(path), np.arange)
    assert inspect_video(str(path), "x").error == "has no video, only a cover picture"


class Guarded:
    """A container or stream of PyAV that must not be used after the container was closed."""

    def __init__(self, real, state):
        self.real, self.state = real, state

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.real.close()
        self.state["open"] = False

    def __getattr__(self, name):
        assert self.state["open"], f"{name} read after the file was closed"
        value = getattr(self.real, name)
        if not callable(value):
            return value
        return lambda *args, **words: value(*(getattr(a, "real", a) for a in args), **words)


def test_a_file_is_not_read_after_it_was_closed(monkeypatch, tmp_path):
    opened = manifest.open_video

    def guarded(path, limit):
        state = {"open": True}
        return tuple(Guarded(part, state) for part in opened(path, limit))

    monkeypatch.setattr(manifest, "open_video", guarded)
    facts = inspect_video(write_numbered(tmp_path / "a.mp4", 10), "a.mp4")
    assert facts.error is None and facts.frames == 10 and facts.vfr is False
