"""Views of videos for validation, tests and prediction: places, order, bad files, workers."""

import dataclasses
import multiprocessing
import shutil
from multiprocessing import connection

import cv2
import numpy as np
import pytest
import torch
from deadly_views import DeadlyViews
from loading import assert_same, config, mmaction2, pixels
from videos import write_numbered, write_video

from zeroi2v.data import views
from zeroi2v.data.annotations import Sample
from zeroi2v.data.decode import read_frames
from zeroi2v.data.sampling import dense_indices, uniform_indices
from zeroi2v.data.views import ViewLoader

pytestmark = pytest.mark.usefixtures("forked_workers")


@pytest.mark.parametrize("test", [False, True])
def test_shards_see_each_sample_once_in_order(bad_samples, test):
    loaders = [
        ViewLoader(bad_samples, config(), batch_size=3, test=test, rank=rank, world_size=2)
        for rank in (0, 1)
    ]
    batches = [list(loader.epoch()) for loader in loaders]
    assert [len(b) for b in batches] == [3, 3] == [loader.steps for loader in loaders]
    index = [i for pair in zip(*batches, strict=True) for b in pair for i in b.index.tolist()]
    label = [i for pair in zip(*batches, strict=True) for b in pair for i in b.label.tolist()]
    want = [-1 if i in (2, 7, 11) else i for i in range(13)] + [-1] * 5
    assert index == want
    assert label == [-1 if i < 0 else bad_samples[i].label for i in want]
    bad = loaders[0].bad_files | loaders[1].bad_files
    assert set(bad) == {bad_samples[i].path for i in (2, 7, 11)}


def test_validation_is_the_published_frames_and_pixels(tmp_path):
    rng = np.random.default_rng(0)
    for height, width in ((96, 128), (162, 90), (24, 30), (64, 64), (50, 300)):
        noise = rng.integers(256, size=(9, 9, 3), dtype=np.uint8)
        image = cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
        path = write_video(tmp_path / "v.mp4", [np.roll(image, i, 0) for i in range(9)], qp="1")
        (batch,) = ViewLoader([Sample(path, 1)], config(32, 4), batch_size=1).epoch()
        frames = read_frames(path, lambda n: uniform_indices(n, 4)[0])
        want = np.stack([mmaction2(frame, 40, 32, 1)[0] for frame in frames])
        got = pixels(batch.video[0, 0], config().preprocess)
        assert np.array_equal(got.round(), want) and np.abs(got - want).max() < 1e-3


def test_test_views_are_clip_by_clip_left_centre_right(tmp_path):
    for height, width in ((64, 200), (200, 64), (64, 64)):
        path = write_numbered(tmp_path / f"{height}.mp4", 30, size=(height, width))
        cfg = config(32, 4, sampling="dense", interval=2, test_short_side=49)
        loader = ViewLoader([Sample(path, 1)], cfg, batch_size=1, test=True, views=(3, 3))
        video = next(loader.epoch()).video
        assert video.shape == (1, 9, 3, 4, 32, 32)
        got = pixels(video[0], cfg.preprocess).round()
        frames = read_frames(path, lambda n: dense_indices(n, 4, 2, 3).ravel()).reshape(
            3, 4, height, width, 3
        )
        for clip in range(3):
            for t in range(4):
                want = mmaction2(frames[clip, t], 49, 32, 3)
                assert np.array_equal(got[3 * clip : 3 * clip + 3, t], want), (height, width, clip)


def test_pixels_are_normalised_with_the_models_own_mean_and_std(samples):
    plain = config(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    other = config(mean=(10.0, 20.0, 30.0), std=(2.0, 3.0, 4.0))
    first, second = (
        next(ViewLoader(samples, c, batch_size=4).epoch()).video for c in (plain, other)
    )
    assert first.min() >= 0 and 200 < first.max() <= 255 and torch.equal(first, first.round())
    mean = torch.tensor(other.preprocess.mean).view(3, 1, 1, 1)
    std = torch.tensor(other.preprocess.std).view(3, 1, 1, 1)
    torch.testing.assert_close(second, (first - mean) / std)


def test_how_frames_are_resized_is_the_models(samples):
    made = [
        next(ViewLoader(samples, config(**how), batch_size=4).epoch()).video
        for how in ({}, dict(antialias=True), dict(interpolation="bicubic", antialias=True))
    ]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert 0.001 < (made[one] - made[other]).abs().mean() < 0.3


def test_workers_give_the_views_of_one_process_and_live_on_until_the_loader_is_gone(bad_samples):
    how = dict(batch_size=3, test=True, views=(2, 3))
    alone = ViewLoader(bad_samples, config(), **how)
    loader = ViewLoader(bad_samples, config(), workers=2, **how)
    others = set(multiprocessing.active_children())
    workers = []
    for _ in range(2):
        assert_same(loader.epoch(), alone.epoch())
        workers.append(set(multiprocessing.active_children()) - others)
    assert loader.bad_files == alone.bad_files and len(loader.bad_files) == 3
    assert len(workers[0]) == 2 and workers[0] == workers[1]
    for _ in loader.epoch():
        break
    assert_same(loader.epoch(), alone.epoch())
    del loader
    for child in workers[0]:
        child.join(20)
        assert not child.is_alive()


@pytest.mark.parametrize("how", ["deadly", "endless"])
def test_a_file_that_kills_or_hangs_its_worker_is_named(samples, tmp_path, monkeypatch, how):
    path = str(shutil.copy(samples[3].path, tmp_path / f"{how}.mp4"))
    mixed = [*samples[:3], Sample(path, 3), *samples[4:]]
    monkeypatch.setattr(views, "ViewSource", DeadlyViews)
    loader = ViewLoader(mixed, config(), batch_size=2, workers=1, timeout=1.5)
    index = torch.cat([batch.index for _ in range(2) for batch in loader.epoch()])
    once = [0, 1, 2, -1, *range(4, 13), -1]
    assert index.tolist() == 2 * once
    verb = {"deadly": "crashes", "endless": "hangs"}[how]
    assert loader.bad_files == {path: f"{path}: {verb} the decoder"}


def test_workers_that_are_killed_for_no_fault_of_a_file_are_replaced_once_a_video(samples):
    plain = list(ViewLoader(samples, config(), batch_size=2).epoch())
    loader = ViewLoader(samples, config(), batch_size=2, workers=1)
    others, got = set(multiprocessing.active_children()), []

    def kill_all():
        for child in set(multiprocessing.active_children()) - others:
            child.kill()
            connection.wait([child.sentinel])

    for batch in loader.epoch():
        got.append(batch)
        if len(got) in (1, 3):
            kill_all()
    assert_same(got, plain)
    assert loader.bad_files == {}
    submit = loader._submit

    def broken(position):
        future = submit(position)
        kill_all()
        return future

    loader._submit = broken
    with pytest.raises(RuntimeError, match="a decoding process was killed"):
        list(loader.epoch())


def test_a_video_over_its_time_limit_is_a_bad_one(samples):
    loader = ViewLoader(samples, config(), batch_size=13, timeout=1e-9)
    (batch,) = loader.epoch()
    assert (batch.index == -1).all()
    assert all("longer" in reason and "limit of 1e-09 s" in reason for reason in
               loader.bad_files.values()) and len(loader.bad_files) == 13  # fmt: skip


def test_a_file_that_vanishes_or_changes_during_a_run_is_a_bad_one(samples, tmp_path):
    paths = [shutil.copy(samples[i].path, tmp_path / f"{i}.mp4") for i in range(4)]
    for cache in (None, str(tmp_path / "cache")):
        loader = ViewLoader([Sample(str(p), 0) for p in paths], config(), batch_size=4, cache=cache)
        (batch,) = loader.epoch()
        assert batch.index.tolist() == [0, 1, 2, 3]
        content = [path.read_bytes() for path in paths]
        paths[1].unlink()
        paths[2].write_bytes(content[2][: len(content[2]) // 3])
        (batch,) = loader.epoch()
        assert batch.index.tolist() == [0, -1, -1, 3]
        assert set(loader.bad_files) == {str(paths[1]), str(paths[2])}
        for path, data in zip(paths, content, strict=True):
            path.write_bytes(data)


def test_parts_of_one_bad_file_are_bad_each_with_its_reason(samples):
    parts = [dataclasses.replace(samples[0], start=s, end=s + 1.0) for s in (0.0, 50.0, 60.0)]
    loader = ViewLoader(parts, config(), batch_size=3)
    (batch,) = loader.epoch()
    assert batch.index.tolist() == [0, -1, -1]
    assert [name.removeprefix(parts[0].path) for name in loader.bad_files] == [
        " (from 50.0 to 51.0 s)", " (from 60.0 to 61.0 s)",
    ]  # fmt: skip
    for start, reason in zip((50.0, 60.0), loader.bad_files.values(), strict=True):
        assert f"has no frame from {start} to {start + 1} s" in reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(batch_size=0), "batch_size must be at least 1: got 0"),
        (dict(rank=2, world_size=2), r"rank must be in 0..world_size-1: got 2 of 2"),
        (dict(timeout=0), "timeout must be positive: got 0"),
        (dict(workers=-1), "workers must not be negative: got -1"),
        (dict(views=(1, 2)), r"views must be \(clips >= 1, crops 1 or 3\): got"),
    ],
)
def test_arguments_are_checked_before_any_work(samples, arguments, message):
    with pytest.raises(ValueError, match=message):
        ViewLoader(samples, config(), **(dict(batch_size=2) | arguments))
    with pytest.raises(ValueError, match="samples must contain a video: got none"):
        ViewLoader([], config(), batch_size=2)
