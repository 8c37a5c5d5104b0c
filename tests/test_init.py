"""init: what it writes can be trained on, and no video is on both sides of its split."""

import shutil
from collections import Counter
from pathlib import Path

import pytest
from videos import write_numbered

from zeroi2v import init
from zeroi2v.cli import run
from zeroi2v.data.annotations import Sample, read_list
from zeroi2v.data.manifest import VideoFacts
from zeroi2v.train.config import load_config
from zeroi2v.train.prepare import read_samples, with_classes


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Three classes of 5, 2 and 1 videos; a copy of one of them, and a bad one."""
    folder = tmp_path_factory.mktemp("made") / "my signs"
    for label, count in (("hello, you", 5), ("wave", 2), ("only one", 1)):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            write_numbered(folder / label / f"{label[0]}{i}.mp4", 5 + 3 * len(label) + 2 * i)
    shutil.copy(folder / "wave/w0.mp4", folder / "wave/w9.mp4")
    (folder / "wave/bad.mp4").write_bytes(b"no video")
    (folder / "wave/notes.txt").write_text("not a video")
    return folder


@pytest.fixture(scope="module")
def out(made) -> Path:
    out = made.parent / "out"
    init.main([str(made), "--out", str(out), "--workers", "1"])
    return out


def test_the_config_is_one_that_training_reads_from_anywhere(out, made, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = with_classes(load_config(out / "config.yaml"))
    assert config.model.labels == ("hello, you", "only one", "wave")
    train, val = read_samples(config)
    assert len(train) == 7 and len(val) == 2
    assert all(Path(sample.path).is_file() for sample in train + val)
    names = {made / name for name in ("hello, you", "wave", "only one")}
    assert {Path(s.path).parent for s in train} == names
    assert config.data.max_bad_fraction == 0.01 and config.optim.batch_size == 1
    assert Path(config.run.dir) == out / "run"


def test_the_template_is_a_recipe_and_keeps_its_comments(out):
    config = load_config("own_videos", ["data.train_list=x"])
    assert config.model.head_offsets[:3] == (-1, 1, 0) and config.model.backbone is None
    text = (out / "config.yaml").read_text()
    for line in init.TEMPLATE.read_text().split("\nmodel:\n")[1].splitlines():
        if "#" in line:
            assert line.split("#")[1] in text


def test_it_says_what_it_did_and_what_comes_next(made, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(init.main, [str(made), "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert "bad.mp4: Invalid data found" in said and "(left out)" in said
    assert f"no videos   {made / 'wave/notes.txt'}" in said
    assert "1 files have copies, kept on one side: wave/w0.mp4 = wave/w9.mp4" in said
    assert "1 of 3 classes have one source alone" in said
    assert "split       7 to train on, 2 to validate on (seed 0)" in said
    assert "zeroi2v train --config my signs-training/config.yaml" in said.replace("'", "")
    before = (tmp_path / "my signs-training/config.yaml").read_text()
    assert run(init.main, [str(made)]) == 1
    assert "--out must hold no config.yaml" in capsys.readouterr().err
    assert (tmp_path / "my signs-training/config.yaml").read_text() == before


def facts(*paths: str, **hashes: str) -> dict[str, VideoFacts]:
    return {path: VideoFacts(path, sha256=hashes.get(path, path)) for path in paths}


def test_the_split_is_seeded_and_takes_its_share_of_every_class():
    samples = [Sample(f"{i:03}", i % 4) for i in range(400)]
    rows = facts(*(s.path for s in samples))
    train, val, told = init.split(samples, rows, 0.2, 3)
    assert not told and Counter(s.label for s in val) == dict.fromkeys(range(4), 20)
    assert sorted(train + val, key=lambda s: s.path) == samples
    assert init.split(samples[::-1], rows, 0.2, 3)[1] == val
    assert init.split(samples, rows, 0.2, 4)[1] != val
    assert init.split(samples, rows, 0.0, 3)[1] == []


def test_parts_and_copies_of_a_film_stay_together():
    samples = [Sample(f"film{f}", f % 2, t, t + 1) for f in range(6) for t in range(1 + 3 * f)]
    rows = facts(*{s.path for s in samples}, film5="film3")  # its copy
    for seed in range(20):
        train, val, told = init.split(samples, rows, 0.2, seed)
        sides = [{rows[s.path].sha256 for s in side} for side in (train, val)]
        assert not sides[0] & sides[1] and told[0].startswith("1 files have copies")
        for side in (train, val):  # a film is all of a class at times, and goes over its share
            assert {s.label for s in side} == {0, 1}


def test_a_film_of_all_classes_never_takes_the_last_source_of_one():
    samples = [Sample("all", k, k, k + 1) for k in range(3)] + [Sample("zero", 0)]
    train, val, told = init.split(samples, facts("all", "zero"), 0.5, 0)
    assert {s.path for s in val} == {"zero"} and {s.label for s in train} == {0, 1, 2}
    assert "2 of 3 classes" in told[0]


def test_a_csv_of_parts_keeps_its_times(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(4):
        write_numbered(tmp_path / f"v{i}.mp4", 60 + i)
    lines = [f"v{i}.mp4,{label},{label},{label + 1}" for i in range(4) for label in (0, 1)]
    (tmp_path / "parts.csv").write_text("path,label,start,end\n" + "\n".join(lines))
    init.main(["parts.csv", "--workers", "1"])
    both = [read_list(f"parts-training/{side}.csv", tmp_path) for side in ("train", "val")]
    assert [len(part) for part in both] == [6, 2]
    assert {(s.start, s.end, s.label) for s in both[1]} == {(0, 1, 0), (1, 2, 1)}
    assert load_config("parts-training/config.yaml").data.root == str(tmp_path)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nothing"], "videos must be a folder with one per class, or a CSV file: got nothing"),
        (["list.txt"], "videos must be a folder with one per class, or a CSV file: got list.txt"),
        (["one", "--root", "x"], "--root must be left out, for a folder is its own: got x"),
        (["one", "--val", "1"], "--val must be at least 0 and below 1: got 1"),
        (["one", "--seed", "-1"], "--seed must not be negative: got -1"),
        (["one", "--workers", "0"], "--workers must be at least 1: got 0"),
        (["one", "--timeout", "0"], "--timeout must be positive: got 0.0"),
        (["one", "--backbone", "gone.pt"], "--backbone not found: gone.pt"),
        (["one"], "found 1 problems; only one-training/manifest.jsonl is written"),
        (["numbers"], "the numbers from 0 on: got '1', '2'"),
        (["torn"], "found 1 problems; only torn-training/manifest.jsonl is written"),
        (["bad"], "videos must hold one that decodes: got none of 1"),
    ],
)
def test_bad_input_is_one_line_and_no_config(words, line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").touch()
    for name in ("one/a", "numbers/1", "numbers/2", "torn/a", "torn/b", "bad/a"):
        (tmp_path / name).mkdir(parents=True)
        write_numbered(tmp_path / name / "v.mp4", 3)
    (tmp_path / "bad/a/v.mp4").write_text("no video")
    assert run(init.main, [*words, *(["--workers", "1"] if "--workers" not in words else [])]) == 1
    said = capsys.readouterr()
    assert said.err.strip().splitlines()[-1].endswith(line)
    assert not list(tmp_path.rglob("config.yaml"))
