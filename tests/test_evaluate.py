"""Evaluation: what is counted, what is averaged, what is left out, and how bad input is told."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from models import build, small_config
from torch import nn
from videos import numbered_frame, write_numbered, write_video

from zeroi2v import cli, evaluate, inference, merge
from zeroi2v.data.annotations import read_list
from zeroi2v.data.views import ViewLoader
from zeroi2v.drawing import figures
from zeroi2v.inference import predict_each
from zeroi2v.storage.checkpoint import load

LABELS = tuple(f"class {i}" for i in range(11))
VIDEOS = 6


def run(argv) -> int:
    return cli.run(evaluate.main, [str(word) for word in argv])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of an adapted model, six videos, a text file that poses as one, and two lists."""
    folder = tmp_path_factory.mktemp("evaluate")
    build(small_config(labels=LABELS)).save_pretrained(folder / "adapted")
    merge(build(small_config(labels=LABELS))).save_pretrained(folder / "merged")
    for i in range(VIDEOS):
        write_numbered(folder / f"video {i}.mp4", 9 + 5 * i)
    (folder / "bad.mp4").write_text("no video")
    good = [f"video {i}.mp4 {i % 4}\n" for i in range(VIDEOS)]
    (folder / "good.txt").write_text("".join(good))
    (folder / "mixed.txt").write_text("".join([*good[:3], "bad.mp4 1\n", *good[3:]]))
    return folder


def loader_for(model, place, list_name="good.txt", views=(2, 3), batch_size=4):
    samples = read_list(place / list_name, place)
    return samples, ViewLoader(samples, model.config, batch_size=batch_size, test=True, views=views)


def test_metrics_count_by_hand():
    # Three clips of class 0 (two right), one of class 1 (right), two of class 5 (none right).
    labels = torch.tensor([0, 0, 0, 1, 5, 5])
    order = torch.tensor(  # classes from the most to the least probable
        [
            [0, 1, 2, 3, 4, 5],
            [0, 2, 1, 3, 4, 5],
            [1, 0, 2, 3, 4, 5],
            [1, 0, 2, 3, 4, 5],
            [0, 1, 2, 3, 5, 4],
            [0, 1, 2, 3, 4, 5],
        ]
    )
    probs = torch.zeros(6, 6).scatter(1, order, torch.linspace(0.3, 0.05, 6).expand(6, 6))
    found = inference.metrics(probs, labels)
    assert found["top1"] == pytest.approx(100 * 3 / 6)
    assert found["top5"] == pytest.approx(100 * 5 / 6)
    assert found["mean_class"] == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)
    assert found["n"] == 6
    true = probs[torch.arange(6), labels].tolist()
    assert found["loss"] == pytest.approx(-sum(math.log(p) for p in true) / 6)
    expected = torch.zeros(6, 6, dtype=torch.int64)
    expected[0, 0], expected[0, 1], expected[1, 1], expected[5, 0] = 2, 1, 1, 2
    assert found["confusion"] == expected.tolist()


def test_top5_is_none_below_five_classes():
    assert inference.metrics(torch.eye(4), torch.arange(4))["top5"] is None
    assert inference.metrics(torch.eye(5), torch.arange(5))["top5"] == 100


def test_loss_of_a_probability_of_zero_is_finite():
    found = inference.metrics(torch.eye(4), torch.tensor([0, 1, 2, 0]))
    assert found["loss"] == pytest.approx(-math.log(1e-12) / 4)


@pytest.mark.parametrize(
    ("probs", "message"),
    [(torch.zeros(0, 4), "at least one clip"), (torch.full((2, 4), torch.nan), "must be finite")],
)
def test_metrics_refuse_what_has_no_accuracy(probs, message):
    with pytest.raises(ValueError, match=message):
        inference.metrics(probs, torch.zeros(len(probs), dtype=torch.int64))


def test_views_are_averaged_after_the_softmax(place):
    model = build(small_config())
    _, loader = loader_for(model, place)
    index, probs = inference.predict_views(model, loader, "cpu")
    assert index.tolist() == list(range(VIDEOS)) and probs.dtype == torch.float32
    batches = list(loader.epoch())
    with torch.no_grad():
        for i in range(VIDEOS):
            views = batches[i // 4].video[i % 4]  # [6, 3, T, H, W]
            by_view = torch.cat([model(view[None]).softmax(-1) for view in views])
            torch.testing.assert_close(probs[i], by_view.mean(0), rtol=1e-4, atol=1e-6)
            assert (by_view - by_view.mean(0)).abs().max() > 1e-4  # views do differ


def test_padding_and_undecodable_videos_are_left_out_and_the_rest_unchanged(place):
    model = build(small_config())
    _, loader = loader_for(model, place)
    _, expected = inference.predict_views(model, loader, "cpu")
    _, loader = loader_for(model, place, "mixed.txt")
    counts = []
    index, probs = inference.predict_views(model, loader, "cpu", progress=counts.append)
    assert index.tolist() == [0, 1, 2, 4, 5, 6] and sum(counts) == VIDEOS
    torch.testing.assert_close(probs, expected, rtol=1e-4, atol=1e-6)


class Probe(nn.Module):
    """Notes the mode and the dtype it is called in."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=dtype))
        self.seen = set()

    def forward(self, video):
        self.seen.add((self.training, video.dtype, torch.is_grad_enabled()))
        return video.mean((2, 3, 4)) * self.weight


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_called_in_eval_mode_in_its_dtype_and_given_back_as_it_was(training):
    batch = SimpleNamespace(
        video=torch.ones(2, 1, 3, 2, 4, 4), index=torch.tensor([0, 1]), label=torch.zeros(2)
    )
    model = Probe(torch.bfloat16).train(training)
    inference.predict_views(model, SimpleNamespace(epoch=lambda: [batch]), "cpu")
    assert model.seen == {(False, torch.bfloat16, False)} and model.training == training


def test_the_command_writes_the_figures_of_its_views(place, tmp_path, capsys):
    out = tmp_path / "new" / "eval.json"
    words = ["--list", place / "mixed.txt", "--root", place, "--views", "2x3", "--out", out]
    assert run([place / "adapted", *words, "--max-bad-fraction", "0.2"]) == 0
    printed = capsys.readouterr().out
    assert "1 undecodable, left out" in printed
    assert f"can't be decoded: {place / 'bad.mp4'}" in printed

    model = build(small_config())
    samples, loader = loader_for(model, place)
    _, probs = inference.predict_views(model, loader, "cpu")
    expected = inference.metrics(probs, torch.tensor([s.label for s in samples]))
    report = json.loads(out.read_text())
    assert {key: report[key] for key in expected} == expected
    assert report["views"] == [2, 3] and report["labels"] == list(LABELS)
    assert list(report["undecodable"]) == [str(place / "bad.mp4")]
    assert f"{expected['top1']:.2f} %" in printed

    lines = [json.loads(x) for x in (tmp_path / "new/eval_predictions.jsonl").open()]
    assert [line["path"] for line in lines] == [s.path for s in read_list(words[1], place)]
    assert "error" in lines[3] and "predicted" not in lines[3]
    kept = lines[:3] + lines[4:]
    assert [line["predicted"] for line in kept] == probs.argmax(-1).tolist()
    assert [line["top5"] for line in kept] == probs.topk(5).indices.tolist()
    assert kept[0]["probability"] == pytest.approx(probs[0].max().item(), abs=1e-5)
    assert (tmp_path / "new/eval_confusion.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "new").iterdir())) == 3


def test_the_merged_model_gets_the_figures_of_the_adapted_one(place, tmp_path):
    reports = []
    for name in ("adapted", "merged"):
        out = tmp_path / f"{name}.json"
        words = ["--list", place / "good.txt", "--root", place, "--out", out]
        assert run([place / name, *words]) == 0
        reports.append(json.loads(out.read_text()))
    assert reports[0]["confusion"] == reports[1]["confusion"]
    assert reports[0]["views"] == list(small_config().preprocess.test_views)


def test_a_run_folder_means_its_best_model(place, tmp_path, capsys):
    better = build(small_config(labels=LABELS), seed=1)
    better.save_pretrained(tmp_path / "run" / "best")
    build(small_config(labels=LABELS)).save_pretrained(tmp_path / "run" / "last")
    assert run([tmp_path / "run", "--list", place / "good.txt", "--root", place]) == 0
    assert str(tmp_path / "run" / "best") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "--list", "good.txt"], "model folder not found: nowhere"),
        (["adapted", "--list", "gone.txt"], "gone.txt"),
        (["adapted", "--list", "high.txt"], "label must be below num_classes 11: got 11"),
        (["adapted", "--list", "good.txt", "--views", "3"], "--views must be CLIPSxCROPS"),
        (["adapted", "--list", "good.txt", "--views", "0x1"], "--views must be CLIPSxCROPS"),
        (["adapted", "--list", "good.txt", "--views", "2x2"], "--views must be CLIPSxCROPS"),
        (["adapted", "--list", "good.txt", "--batch-size", "0"], "batch_size must be at least 1"),
        (["adapted", "--list", "good.txt", "--workers", "-1"], "workers must not be negative"),
        (["adapted", "--list", "good.txt", "--max-bad-fraction", "7"], "must be in [0, 1]: got 7"),
        (["adapted", "--list", "good.txt", "--out", "."], "--out must be a .json file"),
        (["adapted", "--list", "good.txt", "--out", "good.txt/x.json"], "--out can't be written"),
    ],
)
def test_bad_input_is_one_clear_line_before_any_video_is_read(
    place, monkeypatch, capsys, words, message
):
    monkeypatch.chdir(place)
    (place / "high.txt").write_text("video 0.mp4 11\n")
    monkeypatch.setattr(evaluate, "predict_views", lambda *a, **k: pytest.fail("work has begun"))
    assert run(words) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message in captured.err


def test_a_list_without_any_decodable_video_has_no_accuracy(place, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("bad.mp4 0\n")
    assert run([place / "adapted", "--list", tmp_path / "list.txt", "--root", place]) == 1
    captured = capsys.readouterr()
    assert "bad.mp4" in captured.out and "at least one clip that can be decoded" in captured.err


def test_more_bad_videos_than_the_limit_are_a_failure_that_says_how_to_go_on(
    place, tmp_path, capsys
):
    words = [place / "adapted", "--list", place / "mixed.txt", "--root", place]
    assert run([*words, "--out", tmp_path / "eval.json"]) == 1
    captured = capsys.readouterr()
    assert f"can't be decoded: {place / 'bad.mp4'}" in captured.out and "top-1" in captured.out
    assert json.loads((tmp_path / "eval.json").read_text())["n"] == VIDEOS  # the work is kept
    assert captured.err.count("\n") == 1
    for part in ("--max-bad-fraction 0.01 of 7: got 1", "raise --max-bad-fraction"):
        assert part in captured.err
    for limit, status in ((1 / 7, 0), (0.1, 1)):
        assert run([*words, "--max-bad-fraction", limit]) == status


@pytest.fixture
def gap(tmp_path):
    """A CSV of a film with frames in seconds 0 to 2 and 60 to 62: two of its five parts have none,
    and one file is not there, whose part stands twice."""
    times = [90_000 * second // 10 for second in (*range(20), *range(600, 620))]
    images = [numbered_frame(i, 48, 64) for i in range(40)]
    write_video(tmp_path / "gap.mkv", images, times=times)
    spans = ["gap.mkv,0,0,2", "gap.mkv,1,12,16", "gap.mkv,2,20.25,24", "gap.mkv,3,60,62"]
    (tmp_path / "parts.csv").write_text(
        "\n".join(["path,label,start,end", *spans, "gone.mp4,1,0,2", "gone.mp4,1,0,2"])
    )
    return tmp_path


def test_each_part_of_a_film_has_its_own_reason_and_counts_as_a_sample(place, gap, capsys):
    out = gap / "eval.json"
    words = [place / "adapted", "--list", gap / "parts.csv", "--root", gap, "--out", out]
    assert run(words) == 1
    captured = capsys.readouterr()
    assert "of 6: got 4, named above" in captured.err  # four samples of two files
    reasons = [line for line in captured.out.splitlines() if line.startswith("can't be decoded")]
    assert "from 12.0 to 16.0 s" in reasons[0] and "from 20.25 to 24.0 s" in reasons[1]
    lines = [json.loads(line) for line in (gap / "eval_predictions.jsonl").open()]
    assert ["error" in line for line in lines] == [False, True, True, False, True, True]
    for line, span in ((lines[1], "from 12.0 to 16.0 s"), (lines[2], "from 20.25 to 24.0 s")):
        assert span in line["error"]


def test_each_part_of_a_film_is_predicted_with_its_own_reason(place, gap):
    results = list(predict_each(load(place / "adapted"), read_list(gap / "parts.csv", gap)))
    errors = [result.get("error", "") for result in results]
    for error, span in zip(errors, ("", "12.0 to 16.0", "20.25 to 24.0", ""), strict=False):
        assert span in error and bool(error) == bool(span)


@pytest.mark.parametrize("size", [2, 7, 15, 20, 51, 52, 174, 400])
def test_names_in_a_confusion_matrix_are_apart_and_of_one_size_for_any_number(
    size, tmp_path, monkeypatch
):
    drawn = []
    save = figures.save_figure
    monkeypatch.setattr(figures, "save_figure", lambda f, p: drawn.append(f) or save(f, p))
    labels = tuple(f"pretending to put $something$ number {i} onto something" for i in range(size))
    confusion = (1000 * torch.eye(size, dtype=torch.int64)).tolist()
    confusion[0][1] = 321
    figures.draw_confusion(tmp_path / "x.png", confusion, labels)
    (figure,) = drawn
    axes = figure.axes[0]
    page = figure.bbox
    assert page.width <= 11 * figure.dpi and page.height <= 13 * figure.dpi
    for ticks, low, high in (
        (axes.get_xticklabels(), "x0", "x1"), (axes.get_yticklabels(), "y0", "y1")
    ):  # fmt: skip
        boxes = sorted((t.get_window_extent() for t in ticks), key=lambda box: getattr(box, low))
        assert len(boxes) == size if size <= 51 else len(boxes) in (26, 44, 50)
        for box, following in pairwise(boxes):
            assert getattr(box, high) <= getattr(following, low)
        for tick, box in zip(ticks, boxes, strict=True):
            assert tick.get_fontsize() == 8
            assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1
    assert [t.get_text().startswith("Strongest") for t in figure.texts] == [True] * (size > 51)
    if size > 51:
        box = figure.texts[0].get_window_extent()
        assert "\n321 of 1321   pretending" in figure.texts[0].get_text()
        assert box.y0 >= 0 and box.x1 <= page.x1
        assert box.y1 <= axes.get_tightbbox().y0


def test_strongest_confusions_are_in_order_and_no_right_answer_is_one():
    confusion = [[9, 1, 0], [5, 2, 0], [0, 0, 0]]
    assert figures.strongest_confusions(confusion, ("a", "b", "c")) == [
        "5 of 7   b → a", "1 of 10   a → b",
    ]  # fmt: skip


def test_views_of_the_model_are_the_default(place):
    config = replace(
        small_config(), preprocess=replace(small_config().preprocess, test_views=(1, 1))
    )
    build(config).save_pretrained(place / "one_view")
    out = place / "one_view.json"
    words = ["--list", place / "good.txt", "--root", place, "--out", out]
    assert run([place / "one_view", *words]) == 0
    assert json.loads(out.read_text())["views"] == [1, 1]
