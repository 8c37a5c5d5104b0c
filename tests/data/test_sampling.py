"""Frame indices against the published formulas, written once more in plain Python."""

import numpy as np
import pytest

from zeroi2v.data.sampling import dense_indices, uniform_indices

TOTALS = range(1, 401)
FRAMES = (1, 2, 3, 5, 8, 16, 32)
INTERVALS = (1, 4, 16)


def dense_starts(total, num_frames, interval, num_clips):
    max_off = max(total - ((num_frames - 1) * interval + 1), 0)
    if num_clips == 1:
        return [max_off // 2]
    return [round(k * (max_off / (num_clips - 1))) for k in range(num_clips)]


@pytest.mark.parametrize("num_frames", FRAMES)
@pytest.mark.parametrize("interval", INTERVALS)
def test_dense_test_indices_equal_the_published_formula(num_frames, interval):
    for total in TOTALS:
        for num_clips in (1, 2, 3, 4, 7, 10):
            want = [
                [(start + t * interval) % total for t in range(num_frames)]
                for start in dense_starts(total, num_frames, interval, num_clips)
            ]
            got = dense_indices(total, num_frames, interval, num_clips)
            assert got.dtype == np.int64
            assert got.tolist() == want, (total, num_clips)


@pytest.mark.parametrize("num_frames", FRAMES)
def test_uniform_test_indices_equal_the_published_formula(num_frames):
    for total in TOTALS:
        seg = (total - 1) / num_frames
        for num_clips in (1, 2, 3, 4, 7, 10):
            want = [
                [round(seg * i) + int(seg / (num_clips + 1) * (k + 1)) for i in range(num_frames)]
                for k in range(num_clips)
            ]
            got = uniform_indices(total, num_frames, num_clips)
            assert got.dtype == np.int64
            assert got.tolist() == want, (total, num_clips)
            assert got.min() >= 0 and got.max() < total


def test_dense_training_starts_cover_exactly_the_published_range():
    for total, num_frames, interval in ((300, 8, 16), (140, 8, 16), (128, 8, 16), (5, 8, 16)):
        span = num_frames * interval
        clips = dense_indices(total, num_frames, interval, 4000, np.random.default_rng(0))
        assert set(clips[:, 0]) == set(range(max(total - span + 1, 1)))
        steps = (clips - clips[:, :1]) % total
        assert (steps == np.arange(num_frames) * interval % total).all()


def test_uniform_training_frames_cover_exactly_their_segments_ends_included():
    for total, num_frames in ((100, 8), (33, 16), (9, 8), (3, 8), (1, 4)):
        seg = (total - 1) / num_frames
        clips = uniform_indices(total, num_frames, 4000, np.random.default_rng(0))
        for i in range(num_frames):
            low, high = round(seg * i), round(seg * (i + 1))
            assert set(clips[:, i]) == set(range(low, high + 1))


def test_indices_stay_inside_short_videos():
    rng = np.random.default_rng(1)
    for total in range(1, 40):
        for num_frames in FRAMES:
            for clips in (
                dense_indices(total, num_frames, 16, 3, rng),
                uniform_indices(total, num_frames, 3, rng),
            ):
                assert clips.shape == (3, num_frames) and clips.dtype == np.int64
                assert clips.min() >= 0 and clips.max() < total


def test_a_video_shorter_than_a_dense_clip_wraps_around():
    assert dense_indices(10, 4, 4).tolist() == [[0, 4, 8, 2]]


def test_equal_generators_draw_equal_indices():
    for draw in (
        lambda rng: dense_indices(300, 8, 4, 2, rng),
        lambda rng: uniform_indices(300, 8, 2, rng),
    ):
        assert (draw(np.random.default_rng(7)) == draw(np.random.default_rng(7))).all()
        assert (draw(np.random.default_rng(7)) != draw(np.random.default_rng(8))).any()


@pytest.mark.parametrize("name", ["total", "num_frames", "interval", "num_clips"])
def test_counts_below_one_are_refused(name):
    counts = dict(total=10, num_frames=8, interval=2, num_clips=1) | {name: 0}
    with pytest.raises(ValueError, match=f"{name} must be at least 1: got 0"):
        dense_indices(**counts)
    if name != "interval":
        counts.pop("interval")
        with pytest.raises(ValueError, match=f"{name} must be at least 1: got 0"):
            uniform_indices(**counts)
