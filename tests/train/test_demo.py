"""The demo's videos: only the order of frames tells the class, in the files as in the drawings."""

import json
from dataclasses import replace

import demo
import demo_report
import numpy as np
import pytest
from moving_shapes import (
    DIRECTIONS,
    NUM_FRAMES,
    SHAPES,
    SIZE,
    draw,
    random_scene,
    single_frames,
    write_videos,
)

from zeroi2v.data.annotations import read_list
from zeroi2v.data.decode import read_frames
from zeroi2v.train.config import load_config

OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def scenes(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [random_scene(rng) for _ in range(count)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    write_videos(folder, "val", 40, seed=0)
    samples = read_list(folder / "val.txt", folder, num_classes=len(DIRECTIONS))
    return [(read_frames(s.path, np.arange), s.label) for s in samples]


def motion(frames: np.ndarray) -> np.ndarray:
    """The shift (x, y) in pixels, around the edges, that best turns each frame into its next."""
    grey = frames.astype(float).mean(-1)
    grey -= grey.mean((1, 2), keepdims=True)
    spectrum = np.fft.fft2(grey)
    match = np.fft.ifft2(spectrum[1:] * spectrum[:-1].conj()).real.sum(0)
    y, x = np.unravel_index(match.argmax(), match.shape)
    return np.array([(v + SIZE // 2) % SIZE - SIZE // 2 for v in (x, y)])


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_clip_run_backwards_is_a_clip_of_the_opposite_class(direction):
    for scene in scenes(10):
        way = np.array(DIRECTIONS[direction])
        end = scene.start + way * scene.speed * (NUM_FRAMES - 1)
        back = draw(replace(scene, start=end), OPPOSITE[direction])
        forth = draw(scene, direction)
        assert np.abs(back[::-1].astype(int) - forth).max() <= 1  # rounding


def test_the_first_frame_does_not_depend_on_the_class():
    for scene in scenes(10):
        first = [draw(scene, direction, 1) for direction in DIRECTIONS]
        assert all(np.array_equal(frame, first[0]) for frame in first)


def test_every_place_is_equally_likely_in_every_frame_of_every_class():
    count = 600
    for direction in DIRECTIONS:
        frames = np.stack([draw(scene, direction)[[0, 11, 23]] for scene in scenes(count)])
        brightness = frames.mean(-1)  # [count, 3, SIZE, SIZE]
        mean, error = brightness.mean(0), brightness.std(0) / count**0.5
        distance = (mean - mean.mean((1, 2), keepdims=True)) / error
        assert np.abs(distance).max() < 6  # of 3072 values; a border effect gives tens


def test_the_files_show_what_was_drawn(videos):
    rng = np.random.default_rng(0)
    for frames, label in videos:
        drawn = draw(random_scene(rng), list(DIRECTIONS)[label])
        assert frames.shape == drawn.shape == (NUM_FRAMES, SIZE, SIZE, 3)
        assert np.abs(frames.astype(int) - drawn).mean() < 8


def test_the_label_is_the_motion_that_the_file_shows(videos):
    for frames, label in videos:
        assert motion(frames).tolist() == list(list(DIRECTIONS.values())[label])


def test_classes_are_equally_frequent(videos):
    assert np.bincount([label for _, label in videos]).tolist() == [10] * len(DIRECTIONS)


def test_shapes_are_told_apart_by_their_pixels():
    scene = scenes(1)[0]
    drawn = [draw(replace(scene, shape=i), "up", 1).astype(int) for i in range(len(SHAPES))]
    for i, one in enumerate(drawn):
        for other in drawn[:i]:
            assert (np.abs(one - other).max(-1) > 50).sum() > 20


def test_single_frames_are_named_by_their_shape():
    frames, shapes = single_frames(64, seed=0)
    assert frames.shape == (64, SIZE, SIZE, 3) and frames.dtype == np.uint8
    assert set(shapes) == set(range(len(SHAPES)))


def test_every_run_of_the_demo_has_a_config_that_fits_its_videos():
    for name, overrides in demo.RUNS.items():
        config = load_config(demo.CONFIG, overrides)
        assert config.model.image_size == SIZE and config.model.num_classes == len(DIRECTIONS)
        assert (config.model.adapter is None) == (name == "head")
        assert any(config.model.head_offsets) == (name == "stdha")
        clip = (config.model.num_frames - 1) * config.model.preprocess.interval + 1
        assert clip < NUM_FRAMES  # so that a clip can start at several places
        flipped = config.augment.flip_label_map
        names = list(DIRECTIONS)
        assert {names[a]: names[b] for a, b in flipped.items()} == {
            "left": "right",
            "right": "left",
        }


FIGURES = {
    "shape_top1": 99.0,
    "head": 26.0,
    "no_offsets": 27.0,
    "stdha": 98.0,
    "merged": 98.0,
    "merge_rel": {"float64": 1e-15, "float32": 1e-7},
    "agreement": 100.0,
    "prediction": "video.mp4\n  98 % left\n",
    "speed": {"merged": 1.0, "image": 1.01, "ratio": 0.99},
    "seconds": 300.0,
}


@pytest.mark.parametrize(
    "change",
    [
        {"stdha": 94.9},
        {"no_offsets": 40.0},
        {"agreement": 99.75},
        {"merge_rel": {"float64": 0.0, "float32": 2e-5}},
    ],
)
def test_each_claim_fails_by_itself(change):
    assert all(demo_report.claims(FIGURES).values())
    assert list(demo_report.claims(FIGURES | change).values()).count(False) == 1


def test_the_report_holds_the_table_and_its_pictures(tmp_path, monkeypatch):
    write_videos(tmp_path / "videos", "val", 8, seed=0)
    (tmp_path / "eval").mkdir()
    merged = {"n": 8, "confusion": np.eye(4, dtype=int).tolist(), "labels": list(DIRECTIONS)}
    (tmp_path / "eval" / "merged.json").write_text(json.dumps(merged))
    for name in demo.RUNS:
        (tmp_path / "runs" / name).mkdir(parents=True)
        lines = [{"step": i, "epoch": i / 10, "loss": 1 / i} for i in range(1, 100)]
        lines.append({"step": 100, "epoch": 10, "val_top1": 90.0})
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "runs" / name / "log.jsonl").write_text(text)
    demo_report.write(tmp_path, FIGURES)
    text = (tmp_path / "report" / "report.md").read_text()
    assert demo_report.table(FIGURES) in text and FIGURES["prediction"] in text
    assert "(heads/layer0_frame3.png)" in text and "(heads/layer0.png)" in text
    for name in ("frames", "accuracy", "curves", "confusion"):
        assert f"({name}.png)" in text
        assert (tmp_path / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
