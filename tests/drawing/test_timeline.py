"""Timelines of long films, and of films with gaps: as much work as they have frames."""

import av
import numpy as np
import pytest
from models import build, small_config
from videos import numbered_frame, write_video

from zeroi2v.data import decode
from zeroi2v.drawing.timeline import _columns, draw_timeline, timeline, window_spans

RATE, DAY = 5, 86_400


@pytest.fixture(scope="module")
def model():
    return build(small_config())


def film(path, times) -> str:
    """A film of small frames at the given times, in seconds."""
    images = [numbered_frame(i % 256, 48, 64) for i in range(len(times))]
    ticks = [round(90_000 * second) for second in times]
    return write_video(path, images, times=ticks, g="10")


class CountedPackets:
    """Stands for PyAV's `open`; counts the packets that are asked for."""

    def __init__(self, monkeypatch):
        self.opened, self.count = av.open, 0
        monkeypatch.setattr(av, "open", self.open)

    def open(self, *args, **options):
        return Counted(self.opened(*args, **options), self)


class Counted:
    def __init__(self, container, counter):
        self._container, self._counter = container, counter

    def __getattr__(self, name):
        return getattr(self._container, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._container.close()

    def demux(self, stream):
        for packet in self._container.demux(stream):
            self._counter.count += 1
            yield packet


def test_packets_of_a_film_are_read_once_and_then_only_those_of_the_window(
    model, tmp_path, monkeypatch
):
    read = {}
    for seconds in (20, 80):
        video = film(tmp_path / f"{seconds}.mp4", np.arange(seconds * RATE) / RATE)
        with monkeypatch.context() as patch:
            packets = CountedPackets(patch)
            windows = timeline(model, video, 4.0, 4.0)["windows"]
        assert len(windows) == seconds // 4 and all("topk" in w for w in windows)
        read[seconds] = packets.count / (seconds * RATE)
    # All once for their time stamps; then a window's 20, and those from a keyframe before it on.
    assert read[80] < 4 and read[80] == pytest.approx(read[20], rel=0.1)


def test_the_index_of_a_file_that_has_changed_is_read_again(tmp_path):
    path, totals = tmp_path / "film.mp4", []
    for count in (12, 30):
        film(path, np.arange(count) / RATE)
        decode.read_frames(path, lambda total: totals.append(total) or np.arange(1))
    assert totals == [12, 30]


def test_a_gap_of_a_day_makes_no_windows_and_is_drawn_no_wider_than_one(model, tmp_path):
    part = np.arange(6 * RATE) / RATE
    video = film(tmp_path / "days.mkv", [*part, *(part + DAY)])
    result = timeline(model, video, 2.0, 1.0)
    windows = result["windows"]
    assert result["seconds"] == pytest.approx(DAY + 6, abs=0.01)
    assert 10 <= len(windows) <= 14 and all("topk" in w for w in windows)
    spans = [(w["start"], w["end"]) for w in windows]
    assert spans[:6] == [(i, i + 2) for i in range(6)]
    assert all(start >= DAY - 2 for start, _ in spans[6:])
    assert spans[-1][1] == pytest.approx(result["seconds"])
    edges, columns, _ = _columns(result)
    assert columns.count(None) == 1 and edges == sorted(edges)
    at = columns.index(None)
    assert edges[at + 1] - edges[at] == pytest.approx(2.0) and edges[-1] < 20
    draw_timeline(result, tmp_path / "days.png")
    # The default window is of a clip at the usual distance of frames, not at their mean rate.
    assert len(timeline(model, video)["windows"]) < 20


@pytest.mark.parametrize("stride", [0.3, 1.0, 3.7])
@pytest.mark.parametrize("window", [0.5, 1.0, 3.0])
def test_windows_are_those_of_the_whole_grid_that_hold_a_frame(window, stride):
    rng = np.random.default_rng(0)
    for _ in range(20):
        times = np.cumsum(rng.choice([0.2, 0.2, 0.2, 0.2, 9.0], 40))
        times -= times[0]
        seconds = float(times[-1]) + 0.2
        starts = list(np.arange(0, max(seconds - window, 0) + 1e-6, stride))
        if starts[-1] + window < seconds - 1e-6:
            starts.append(seconds - window)
        grid = [(start, min(start + window, seconds)) for start in starts]
        held = [
            span for span in grid if ((times >= span[0] - 1e-6) & (times < span[1] - 1e-6)).any()
        ]
        assert np.allclose(window_spans(times, seconds, window, stride), held)


def test_gaps_are_left_blank_where_they_are():
    windows = [{"start": s, "end": s + 2.0} for s in (0.0, 1.0, 2.0, 100.0, 101.0)]
    edges, columns, knots = _columns(
        {"windows": windows, "window": 2.0, "stride": 1.0, "seconds": 103.0}
    )
    assert columns == [0, 1, 2, None, 3, 4]
    assert edges == [0.0, 1.5, 2.5, 4.0, 6.0, 7.5, 9.0]
    assert knots == [(0.0, 0.0), (4.0, 4.0), (6.0, 100.0), (9.0, 103.0)]
