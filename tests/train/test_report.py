"""The report of a run: whole in one file, true to the run's files, and its commands work."""

import base64
import csv
import importlib
import json
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from videos import write_numbered

import zeroi2v.train.main
from zeroi2v.cli import run
from zeroi2v.train import report
from zeroi2v.train.report import per_class, write_report

LABELS = ["left", "right", "<b>up</b>", "down & out"]


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words, self._hidden = [], [], False
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._hidden = tag in ("style", "script")

    def handle_endtag(self, tag):
        self._hidden = False

    def handle_data(self, data):
        if not self._hidden:
            self.words.append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a real, tiny run with a bad file in its list."""
    folder = tmp_path_factory.mktemp("data with space")
    lines = []
    for i in range(12):
        write_numbered(folder / f"{i}.mp4", 8, size=(32, 32))
        lines.append(f"{i}.mp4 {i % 3}\n")  # no video of class 3
    (folder / "bad.mp4").write_text("no video")
    (folder / "train.txt").write_text("".join(lines) + "bad.mp4 0\n")
    (folder / "val.txt").write_text("".join(lines[:7]))
    (folder / "labels.txt").write_text("\n".join(LABELS))
    config = {
        "model": {"image_size": 32, "width": 32, "depth": 2, "num_heads": 2, "num_frames": 4,
                  "num_classes": 4, "head_offsets": [-1, 0],
                  "preprocess": {"sampling": "uniform", "val_short_side": 32,
                                 "test_short_side": 32}},
        "data": {"train_list": str(folder / "train.txt"), "val_list": str(folder / "val.txt"),
                 "root": str(folder), "labels": str(folder / "labels.txt"), "workers": 0,
                 "max_bad_fraction": 0.2},
        "augment": None,
        "optim": {"epochs": 2, "batch_size": 4, "micro_batch": 4, "warmup_epochs": 0},
        "run": {"dir": str(folder / "first run"), "log_every": 1},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    zeroi2v.train.main.main(["--config", str(folder / "config.yaml")])
    return folder / "first run"


@pytest.fixture(scope="module")
def page(finished) -> Page:
    return Page((finished / "report.html").read_text(encoding="utf-8"))


def test_the_report_needs_nothing_but_itself(finished, page):
    text = (finished / "report.html").read_text(encoding="utf-8")
    for outside in ("http://", "https://", "url(", "@import", "<script", "<link", "href="):
        assert outside not in text
    images = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 5
    for source in images:
        head, data = source.split(",")
        assert head == "data:image/png;base64"
        assert base64.b64decode(data).startswith(b"\x89PNG")
    for name in ("loss", "accuracy", "lr", "throughput", "confusion"):
        png = (finished / "plots" / f"{name}.png").read_bytes()
        assert any(base64.b64decode(source.split(",")[1]) == png for source in images)


def test_the_report_says_what_was_trained_and_what_came_of_it(finished, page):
    figures = json.loads((finished / "best" / "eval.json").read_text())
    last = json.loads((finished / "eval.json").read_text())
    assert figures["step"] == last["best_step"] and figures["top1"] == last["best_top1"]
    assert "first run" in page.text
    assert "Finished: 6 steps, 2 of 2 epochs" in page.text
    assert f"{figures['top1']:.2f} %" in page.text and "25 % what guessing" in page.text
    assert f"by the model of step {figures['step']}, on 7 validation videos" in page.text
    assert "4 frames of 32 x 32 pixels, spread over the video" in page.text
    assert "1 of 2 in each adapted block, by -1 frames" in page.text
    assert "NOWHERE: they are random" in page.text
    assert "an epoch is 12 clips" in page.text
    assert "augmentation none" in page.text
    assert "bad.mp4: " in page.text and "could not be decoded None." not in page.text
    assert "max_bad_fraction: 0.2" in page.text


def test_class_names_are_text_and_a_class_without_videos_is_named(finished, page):
    assert LABELS[2] in page.text  # escaped, so it is read back as text
    assert "<b>up" not in (finished / "report.html").read_text(encoding="utf-8")
    assert "not measured: down & out" in page.text


def test_classes_are_in_order_of_accuracy_with_their_most_frequent_mistake():
    confusion = [[3, 1, 0, 0], [0, 0, 2, 3], [0, 0, 5, 0], [0, 0, 0, 0]]
    rows = per_class(confusion, ())
    assert [row["name"] for row in rows] == ["2", "0", "1", "3"]
    assert [row["accuracy"] for row in rows] == [100, 75, 0, 0]
    assert [(row["taken_for"], row["taken_count"]) for row in rows] == [
        ("", 0), ("1", 1), ("3", 3), ("", 0),
    ]  # fmt: skip
    assert [(row["right"], row["videos"]) for row in rows] == [(5, 5), (3, 4), (0, 5), (0, 0)]


def test_the_table_of_classes_is_a_csv_file_too(finished):
    confusion = json.loads((finished / "best" / "eval.json").read_text())["confusion"]
    with open(finished / "per_class.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["name"] for row in rows} == set(LABELS)
    for row in rows:
        index = LABELS.index(row["name"])
        assert int(row["index"]) == index
        assert int(row["right"]) == confusion[index][index]
        assert int(row["videos"]) == sum(confusion[index])


def test_every_command_that_is_proposed_works_as_it_stands(finished, capsys):
    text = (finished / "report.html").read_text(encoding="utf-8")
    commands = [
        shlex.split(line) for line in Page(text).words for line in line.splitlines()
        if line.startswith(("python", "<pre>python"))
    ]  # fmt: skip
    verbs = [words[2] for words in commands]
    assert verbs == [f"zeroi2v.{v}" for v in ("evaluate", "reparam", "predict", "visualize")]
    for words in commands:
        argv = [str(finished.parent / "0.mp4") if word == "VIDEO" else word for word in words[3:]]
        if words[2] == "zeroi2v.visualize":
            argv += ["--out", str(finished / "attention")]
        assert run(importlib.import_module(words[2]).main, argv) == 0, capsys.readouterr().err


def test_many_classes_are_shown_by_their_best_and_worst_and_all_in_a_fold(finished, tmp_path):
    config = yaml.safe_load((finished / "config.yaml").read_text())
    config["model"]["num_classes"], config["model"]["labels"] = 60, []
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "log.jsonl").write_text((finished / "log.jsonl").read_text())
    confusion = [[0] * 60 for _ in range(60)]
    for i in range(60):
        confusion[i][i], confusion[i][(i + 1) % 60] = i, 60 - i
    figures = {"step": 6, "n": 3600, "top1": 49.17, "top5": 90.0, "mean_class": 49.17,
               "confusion": confusion}  # fmt: skip
    (tmp_path / "eval.json").write_text(json.dumps(figures))
    write_report(tmp_path)
    page = Page((tmp_path / "report.html").read_text())
    best, worst = page.text.split("The 10 best")[1].split("The 10 worst")
    assert "59 98.3 % 60 0 (1)" in best and "50 83.3 %" in best and "49 81.7 %" not in best
    assert "0 0.0 % 60 1 (60)" in worst.split("All 60 classes")[0]
    assert "30 50.0 % 60 31 (30)" in worst.split("All 60 classes")[1]
    assert "90.00 % top-5" in page.text
    assert "Videos that could not be decoded None." in page.text


def test_a_run_without_validation_is_reported_without_accuracy(finished, tmp_path):
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    lines = (finished / "log.jsonl").read_text().splitlines()
    lines = [line for line in lines if "val_" not in line][:2]
    (tmp_path / "log.jsonl").write_text("\n".join(lines) + "\n")
    assert run(report.main, [str(tmp_path)]) == 0
    page = Page((tmp_path / "report.html").read_text())
    assert "Not finished: 2 steps, 0.6667 of 2 epochs" in page.text
    assert "no accuracy is known" in page.text and "top-1" not in page.text
    assert len([tag for tag, _ in page.tags if tag == "img"]) == 3


def test_what_is_no_run_folder_is_one_line(tmp_path, finished, capsys):
    assert run(report.main, [str(tmp_path)]) == 1
    assert "is no run folder" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text((finished / "config.yaml").read_text())
    assert run(report.main, [str(tmp_path)]) == 1
    assert "must hold a step in log.jsonl" in capsys.readouterr().err
