"""What a report shows of single videos, and the page that compares runs."""

import base64
import json
import math
import shutil
from pathlib import Path

import av
import pytest
import torch
import yaml
from models import build, small_config
from videos import write_numbered

from zeroi2v.cli import run
from zeroi2v.data.annotations import Sample
from zeroi2v.data.decode import read_frames
from zeroi2v.drawing.preview import write_preview
from zeroi2v.train import report, samples
from zeroi2v.train.samples import Answers

LABELS = ("left", "<b>right", "up")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run folder as training leaves it, but for a model of random weights, and its videos."""
    folder = tmp_path_factory.mktemp("runs")
    for i in range(6):
        write_numbered(folder / f"{i}.mp4", 12 + i)
    (folder / "train.txt").write_text("".join(f"{i}.mp4 {i % 3}\n" for i in range(3)))
    (folder / "val.txt").write_text("".join(f"{i}.mp4 {i % 3}\n" for i in range(3, 6)))
    config = small_config().to_dict() | {"num_classes": 3, "labels": list(LABELS)}
    config["preprocess"] = config["preprocess"] | {"sampling": "uniform"}
    model = build(type(small_config()).from_dict(config))
    where = folder / "first"
    model.save_pretrained(where / "last")
    (where / "config.yaml").write_text(yaml.safe_dump({
        "model": model.config.to_dict(),
        "data": {"train_list": str(folder / "train.txt"), "val_list": str(folder / "val.txt"),
                 "root": str(folder)},
        "run": {"dir": str(where)},
    }))  # fmt: skip
    lines = [{"step": i, "epoch": i / 2, "loss": 2.0, "lr": 1e-3, "seconds": 1.0,
              "clips_per_s": 8.0} for i in range(1, 5)]  # fmt: skip
    lines.append({"step": 4, "epoch": 2.0, "val_top1": 50.0})
    (where / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures = {"step": 4, "n": 4, "top1": 50.0, "top5": None, "mean_class": 50.0,
               "confusion": [[1, 1, 0], [1, 0, 0], [0, 0, 1]]}  # fmt: skip
    (where / "eval.json").write_text(json.dumps(figures))
    return folder


@pytest.fixture(scope="module")
def text(folder) -> str:
    assert run(report.main, [str(folder / "first")]) == 0
    return (folder / "first" / "report.html").read_text(encoding="utf-8")


def test_validation_videos_are_films_in_the_page_with_truth_and_answer(text, tmp_path):
    films = text.split('<video src="data:video/mp4;base64,')[1:]
    assert 1 <= len(films) <= 3  # there are three validation videos
    for film in films:
        (tmp_path / "film.mp4").write_bytes(base64.b64decode(film.split('"')[0]))
        assert len(read_frames(tmp_path / "film.mp4", lambda total: torch.arange(total).numpy()))
        assert "It is <b>" in film and ("✓" in film or "✗" in film)
    assert "<b>right" not in text.replace('<b class="right', "")  # a name is text
    for outside in ("http://", "https://", "url(", "<script", "<link", "href="):
        assert outside not in text


def test_training_and_validation_are_looked_at_alike_and_the_gap_is_their_difference(text, folder):
    config = report.load_config(folder / "first" / "config.yaml")
    found, shared = samples.look(folder / "first", config)
    assert shared == 0
    for part in ("train", "val"):
        assert f">{found[part].loss:.3f}</td>" in text and "3 of 3</td>" in text
    assert f">{found['val'].loss - found['train'].loss:+.3f}</td>" in text


def test_loss_and_accuracy_are_those_of_the_probabilities():
    probs = torch.tensor([[0.5, 0.5, 0.0], [0.1, 0.8, 0.1], [0.25, 0.25, 0.5]])
    found = Answers([Sample("a", 0), Sample("b", 1), Sample("c", 0)], probs, 9)
    assert found.loss == pytest.approx(-(math.log(0.5) + math.log(0.8) + math.log(0.25)) / 3)
    assert found.top1 == pytest.approx(200 / 3)


def test_validation_on_what_is_trained_on_is_said(folder, tmp_path):
    where = tmp_path / "run"
    shutil.copytree(folder / "first", where)
    config = yaml.safe_load((where / "config.yaml").read_text())
    config["data"]["val_list"] = config["data"]["train_list"]
    (where / "config.yaml").write_text(yaml.safe_dump(config))
    assert run(report.main, [str(where)]) == 0
    assert "3 of the validation videos are files that were trained on too" in (
        where / "report.html"
    ).read_text(encoding="utf-8")


def test_without_the_videos_the_report_says_so_and_is_written(folder, tmp_path):
    where = tmp_path / "run"
    shutil.copytree(folder / "first", where)
    config = (where / "config.yaml").read_text().replace("train.txt", "gone.txt")
    (where / "config.yaml").write_text(config)
    assert run(report.main, [str(where)]) == 0
    page = (where / "report.html").read_text(encoding="utf-8")
    assert "Single videos are not shown: list not found" in page and "<video" not in page


def test_runs_are_compared_by_what_came_out_and_what_was_set_otherwise(folder, tmp_path):
    second = tmp_path / "second"
    shutil.copytree(folder / "first", second)
    config = yaml.safe_load((second / "config.yaml").read_text())
    config["optim"] = {"lr": 1e-2}
    (second / "config.yaml").write_text(yaml.safe_dump(config))
    figures = json.loads((second / "eval.json").read_text())
    figures |= {"top1": 75.0, "confusion": [[2, 0, 0], [1, 0, 0], [0, 0, 1]]}
    (second / "eval.json").write_text(json.dumps(figures))
    out = tmp_path / "both.html"
    assert run(report.main, [str(folder / "first"), str(second), "--out", str(out)]) == 0
    page = " ".join(out.read_text(encoding="utf-8").replace("<", " <").split())
    row = '<th class="key">{} </th> <td class="number">{} </td> <td class="number">{} </td>'
    assert row.format("top-1 of the best model, %", "50.00", "75.00") in page
    assert row.format("optim.lr", "0.0003", "0.01") in page
    assert row.format("left", "50.0", "100.0") in page
    assert "optim.epochs" not in page and ">up <" not in page  # alike in both
    assert page.count("data:image/png;base64,") == 2
    for outside in ("http://", "https://", "url(", "<script", "<link", "href="):
        assert outside not in page


def test_bad_runs_are_one_line(folder, tmp_path, capsys):
    first = str(folder / "first")
    assert run(report.main, [first, str(tmp_path)]) == 1
    assert "is no run folder" in capsys.readouterr().err
    assert run(report.main, [first, "--out", "x.html"]) == 1
    assert "--out must be left out for one run" in capsys.readouterr().err


@pytest.mark.parametrize(("size", "shape"), [((96, 128), (96, 128)), ((700, 350), (480, 240))])
def test_a_preview_is_the_video_in_small(size, shape, tmp_path):
    source = write_numbered(tmp_path / "source.mp4", 60, size=size)
    write_preview(source, tmp_path / "out.mp4", rate=10, start=0.5, seconds=1.0)
    with av.open(str(tmp_path / "out.mp4")) as film:
        frames = list(film.decode(video=0))
        assert film.streams.video[0].codec_context.name == "h264"
    assert (frames[0].height, frames[0].width) == shape
    assert len(frames) == 10 and float(frames[-1].time) == pytest.approx(0.9, abs=0.04)


def test_what_is_no_video_has_no_preview(tmp_path):
    (tmp_path / "bad.mp4").write_text("no video")
    with pytest.raises(ValueError, match=r"bad.mp4: Invalid data"):
        write_preview(str(tmp_path / "bad.mp4"), tmp_path / "out.mp4")
    source = write_numbered(tmp_path / "source.mp4", 10)
    with pytest.raises(ValueError, match="has no frame from 5 s on"):
        write_preview(source, tmp_path / "out.mp4", start=5)
    assert not (tmp_path / "out.mp4").exists()
