"""The same answers from every artefact; folders, lists, pipes, cameras, long and broken videos."""

import dataclasses
import hashlib
import io
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import av
import forked
import numpy as np
import pytest
import torch
import yaml
from models import build, small_config
from videos import numbered_frame, write_numbered, write_video

from zeroi2v import cli, evaluate, export, predict, reparam
from zeroi2v.data.decode import read_frames
from zeroi2v.data.live_input import record
from zeroi2v.drawing.timeline import draw_timeline, timeline
from zeroi2v.storage.runtimes import load_deployed

ROOT = Path(__file__).parents[2]
PICTURES = ("one", "none", "many")
LABELS = tuple(f"class {i}" for i in range(11))


def run(*argv) -> int:
    return cli.run(predict.main, [str(word) for word in argv])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An adapted model as a run, its merged folder, ONNX file and program; a folder of videos."""
    folder = tmp_path_factory.mktemp("deployed")
    config = small_config("vit_b16_k400_8x16", depth=2, labels=LABELS)
    pixels = dataclasses.replace(config.preprocess, test_views=(2, 3), interval=2)
    config = dataclasses.replace(config, preprocess=pixels)
    build(config).save_pretrained(folder / "run" / "best")
    reparam.main([str(folder / "run"), "--out", str(folder / "merged")])
    pytest.importorskip("onnxscript", reason="ONNX is not installed: pip install zeroi2v[export]")
    for format, name in (("onnx", "model.onnx"), ("torch-export", "model.pt2")):
        export.main([str(folder / "merged"), "--format", format, "--out", str(folder / name)])
    (folder / "videos" / "deep").mkdir(parents=True)
    for i, name in enumerate(("a.mp4", "deep/b.mkv", "c with space.avi")):
        codec = "mjpeg" if name.endswith("avi") else "libx264"
        write_numbered(folder / "videos" / name, 20 + 9 * i, codec)
    (folder / "videos" / "bad.mp4").write_text("no video")
    (folder / "videos" / "notes.txt").write_text("not looked at")
    return folder


def test_every_artefact_gives_the_same_top_5(place, capsys):
    videos = [place / "videos" / name for name in ("a.mp4", "deep/b.mkv", "c with space.avi")]
    answers = []
    for artefact in ("run", "merged", "model.onnx", "model.pt2"):
        assert run(place / artefact, *videos, "--json") == 0
        answers.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    for other in answers[1:]:
        for result, expected in zip(other, answers[0], strict=True):
            assert result["path"] == expected["path"]
            for row, right in zip(result["topk"], expected["topk"], strict=True):
                assert (row["label"], row["index"]) == (right["label"], right["index"])
                assert row["probability"] == pytest.approx(right["probability"], rel=1e-3)


def test_trained_model_gives_the_same_top_5_through_every_step_and_artefact(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(8):  # still pictures of one grey each; all that matters is that it trains
        image = np.full((48, 48, 3), 20 + 30 * i, np.uint8)
        write_video(tmp_path / f"{i}.mp4", [image + rng.integers(0, 9, image.shape, np.uint8)] * 6)
    (tmp_path / "list.txt").write_text("".join(f"{i}.mp4 {i}\n" for i in range(8)))
    (tmp_path / "names.txt").write_text("".join(f"grey {i}\n" for i in range(8)))
    pixels = dict(sampling="uniform", val_short_side=32, test_short_side=32)
    shape = dict(width=32, depth=2, num_heads=2, image_size=32, num_frames=4, num_classes=8)
    config = {
        "model": shape | {"head_offsets": [-1, 1], "preprocess": pixels},
        "data": {"train_list": str(tmp_path / "list.txt"), "val_list": str(tmp_path / "list.txt"),
                 "root": str(tmp_path), "labels": str(tmp_path / "names.txt"), "workers": 0},
        "augment": None,
        "optim": {"epochs": 6, "batch_size": 8, "micro_batch": 8, "lr": 3e-2},
        "run": {"dir": str(tmp_path / "run")},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    main = [sys.executable, str(ROOT / "train" / "main.py"), "--config", tmp_path / "config.yaml"]
    forked.run(main, check=True, timeout=200)

    trained = load_deployed(tmp_path / "run")
    adapters = [p for n, p in trained.named_parameters() if "_adapter.up.weight" in n]
    assert len(adapters) == 8 and all(p.norm() > 0 for p in adapters)
    assert cli.run(reparam.main, [str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    for format, name in (("onnx", "model.onnx"), ("torch-export", "model.pt2")):
        words = [str(tmp_path / "merged"), "--format", format, "--out", str(tmp_path / name)]
        assert cli.run(export.main, words) == 0
    capsys.readouterr()
    card = (tmp_path / "merged" / "README.md").read_text()  # how it was trained, how good it is
    for line in ("| training: data | list.txt, 8 videos |", "| top-1 | ", "| merge, float32 | pas"):
        assert line in card
    answers = {}
    for artefact in ("run", "merged", "model.onnx", "model.pt2"):
        words = [tmp_path / f"{i}.mp4" for i in range(8)]
        assert run(tmp_path / artefact, *words, "--json") == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        answers[artefact] = [[row["label"] for row in line["topk"]] for line in lines]
    assert len({str(top) for top in answers["run"]}) > 1  # it does tell videos apart
    assert all(top[0].startswith("grey ") for top in answers["run"])
    for other in ("merged", "model.onnx", "model.pt2"):
        assert answers[other] == answers["run"]


def test_folder_gives_every_video_in_it_and_names_the_bad_one(place, capsys):
    assert run(place / "merged", place / "videos", "--json") == 1
    captured = capsys.readouterr()
    lines = {json.loads(line)["path"]: json.loads(line) for line in captured.out.splitlines()}
    names = ["a.mp4", "bad.mp4", "c with space.avi", "deep/b.mkv"]
    assert list(lines) == [str(place / "videos" / name) for name in names]
    assert "error" in lines[str(place / "videos" / "bad.mp4")]
    notes = f"no videos, left out: {place}/videos/notes.txt\n"
    assert captured.err == notes + "error: 1 of 4 files can't be decoded: see above\n"
    (place / "empty").mkdir()
    assert run(place / "merged", place / "empty") == 1
    assert "folder must contain video files" in capsys.readouterr().err


def test_list_gives_its_files_with_or_without_labels(place, tmp_path, capsys):
    words = ["--list", tmp_path / "list.txt", "--root", place / "videos", "--json"]
    names = ("a.mp4", "c with space.avi")
    for text in ("# two\na.mp4 3\n\nc with space.avi\n", "a.mp4 3\nc with space.avi 0\n"):
        (tmp_path / "list.txt").write_text(text)
        assert run(place / "merged", *words) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["path"] for line in lines] == [str(place / "videos" / name) for name in names]
    (tmp_path / "list.txt").write_text("# none\n")
    assert run(place / "merged", *words) == 1
    assert "must name at least one video: got none" in capsys.readouterr().err


def test_csv_gives_its_column_of_paths_and_no_parts(place, tmp_path, capsys):
    words = ["--list", tmp_path / "list.csv", "--root", place / "videos", "--json"]
    (tmp_path / "list.csv").write_text("path,label\na.mp4,3\ndeep/b.mkv,0\n")
    assert run(place / "merged", *words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = ("a.mp4", "deep/b.mkv")
    assert [line["path"] for line in lines] == [str(place / "videos" / name) for name in names]
    (tmp_path / "list.csv").write_text("path,label,start,end\na.mp4,3,0,0.5\n")
    assert run(place / "merged", *words) == 1
    assert "list.csv must name whole videos" in capsys.readouterr().err


def test_folder_of_images_is_a_video(place, tmp_path, capsys):
    with av.open(str(place / "videos" / "c with space.avi")) as container:
        for number, frame in enumerate(container.decode(video=0)):
            frame.save(str(tmp_path / f"img_{number:05}.png"))
    assert run(place / "merged", place / "videos" / "c with space.avi", tmp_path, "--json") == 0
    video, images = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert images["path"] == str(tmp_path)
    assert [row["index"] for row in images["topk"]] == [row["index"] for row in video["topk"]]


def test_batch_run_writes_as_it_goes_and_resumes(place, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out" / "all.jsonl"
    words = [place / "merged", place / "videos", "--out", out]
    real, count = predict.predict_each, []

    def stopped(*args, **options):
        for result in real(*args, **options):
            if len(count) == 2:
                raise KeyboardInterrupt
            count.append(result)
            yield result

    monkeypatch.setattr(predict, "predict_each", stopped)
    assert run(*words) != 0 and len(out.read_text().splitlines()) == 2
    with open(out, "a") as file:
        file.write('{"model": "x", "pa')  # the moment it was killed
    asked = []

    def counted(model, samples, *args, **options):
        asked.extend(samples)
        return real(model, samples, *args, **options)

    monkeypatch.setattr(predict, "predict_each", counted)
    assert run(*words) == 1  # one file is bad
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 4 and len({line["path"] for line in lines}) == 4 and len(asked) == 2
    assert run(*words) == 1 and len(asked) == 2  # nothing is left to do; the bad one still counts
    assert "1 of 4 files" in capsys.readouterr().err
    assert run(place / "run", place / "videos", "--out", out) == 1
    assert "contains results of weights" in capsys.readouterr().err
    out.write_text("other\n")
    assert run(*words) == 1 and out.read_text() == "other\n"
    assert "must contain only results: line 1" in capsys.readouterr().err
    assert run(place / "merged", place / "videos", "--out", tmp_path / "x.json") == 1
    assert "--out must be a .jsonl file" in capsys.readouterr().err


@pytest.mark.parametrize("artefact", ["model.onnx", "model.pt2"])
def test_results_of_a_file_carry_the_hash_of_its_content(place, artefact, tmp_path, capsys):
    out, video = tmp_path / "all.jsonl", place / "videos" / "a.mp4"
    assert run(place / artefact, video, "--out", out) == 0
    content = hashlib.sha256((place / artefact).read_bytes()).hexdigest()
    assert json.loads(out.read_text())["settings"]["weights"] == content[:16]
    assert run(place / "merged", video, "--out", out) == 1
    assert "contains results of weights" in capsys.readouterr().err


def test_pipe_is_read_to_its_end(place, capsys, monkeypatch):
    path = place / "videos" / "a.mp4"
    assert run(place / "merged", path, "--json") == 0
    expected = json.loads(capsys.readouterr().out)["topk"]
    pipe = SimpleNamespace(buffer=io.BytesIO(path.read_bytes()))
    monkeypatch.setattr(sys, "stdin", pipe)
    assert run(place / "merged", "-", "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"path": "-", "topk": expected}
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert run(place / "merged", "-") == 1
    assert "standard input must contain a video" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"no video")))
    assert run(place / "merged", "-") == 1
    assert capsys.readouterr().out.startswith("can't be decoded: -:")


def test_camera_is_recorded_for_the_seconds_asked(tmp_path, capsys):
    # FFmpeg's test picture stands for a camera: a device of frames without end.
    record("testsrc=size=64x48:rate=10", "lavfi", tmp_path / "camera.mkv", 1.5)
    totals = []
    read_frames(tmp_path / "camera.mkv", lambda total: totals.append(total) or torch.arange(1))
    assert totals[-1] == 15
    with pytest.raises(ValueError, match="camera can't be read: /dev/video99"):
        record("/dev/video99", "v4l2", tmp_path / "none.mkv", 1)


def test_timeline_covers_the_video_in_windows(place, tmp_path, capsys):
    video = write_numbered(tmp_path / "long.mp4", 100)
    words = ["--timeline", tmp_path / "out", "--window", 1, "--stride", 0.5]
    assert run(place / "merged", video, *words) == 0
    assert "class" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "long.json").read_text())
    windows = result["windows"]
    assert result["seconds"] == pytest.approx(100 / 30, abs=1e-3)
    spans = [(w["start"], w["end"]) for w in windows]
    assert spans == [(0, 1), (0.5, 1.5), (1, 2), (1.5, 2.5), (2, 3), (2.333, 3.333)]
    assert all(len(w["topk"]) == 5 for w in windows)
    assert (tmp_path / "out" / "long.png").read_bytes()[:4] == b"\x89PNG"
    assert run(place / "merged", place / "videos" / "bad.mp4", "--timeline", tmp_path / "out") == 1
    assert "can't be decoded" in capsys.readouterr().out


def test_timeline_sees_what_is_in_each_window(place, tmp_path):
    black, white = (numbered_frame(n, 96, 128) for n in (0, 255))
    video = write_video(tmp_path / "cut.mp4", [black] * 60 + [white] * 60)
    model = load_deployed(place / "merged")
    windows = timeline(model, video, 2.0, 2.0)["windows"]
    (alone,) = timeline(model, write_video(tmp_path / "white.mp4", [white] * 60), 2.0)["windows"]
    assert len(windows) == 2 and windows[0]["topk"] != windows[1]["topk"]
    assert [r["index"] for r in windows[1]["topk"]] == [r["index"] for r in alone["topk"]]
    pixels = dataclasses.replace(model.config.preprocess, interval=16)
    model.config = dataclasses.replace(model.config, preprocess=pixels)
    default = timeline(model, video)  # dense: 8 frames 16 apart, at 30 a second
    assert default["window"] == pytest.approx(8 * 16 / 30, abs=1e-3)
    assert len(default["windows"]) == 1
    draw_timeline(default, tmp_path / "one.png")
    names = [f"a long name of class {i}" for i in range(30)]
    spans = [{"start": i, "end": i + 1.0} for i in range(31)]
    top = [{"topk": [{"label": name, "probability": 0.5}]} for name in names]
    many = [span | found for span, found in zip(spans, [*top, {"error": "damaged"}], strict=True)]
    result = {"path": "x.mp4", "seconds": 31.0, "window": 1.0, "stride": 1.0, "windows": many}
    draw_timeline(result, tmp_path / "many.png")
    draw_timeline(result | {"windows": many[-1:]}, tmp_path / "none.png")
    height = [struct.unpack(">I", (tmp_path / f"{n}.png").read_bytes()[20:24])[0] for n in PICTURES]
    assert height[0] == height[1] < height[2]  # rows for labels, and no more than fit
    assert height[2] < 1200
    for window, stride in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match="window and stride must be positive seconds"):
            timeline(model, video, window, stride)
    with pytest.raises(ValueError, match="none.mp4"):
        timeline(model, str(tmp_path / "none.mp4"))


def test_every_file_of_the_clips_has_a_result_or_a_reason(place, clips, tmp_path, capsys):
    files = sorted(str(path) for path in clips.rglob("*") if path.is_file())
    answers = {}
    shares = {"merged": files, "model.onnx": files[::3], "model.pt2": files[1::3]}
    for artefact, given in shares.items():
        out = tmp_path / f"{artefact}.jsonl"
        capsys.readouterr()
        assert run(place / artefact, *given, "--out", out) == 1
        lines = [json.loads(line) for line in out.read_text().splitlines()]
        assert [line["path"] for line in lines] == given
        classified = [line["path"] for line in lines if "topk" in line]
        assert len(classified) >= (60 if given is files else 15)
        assert all("topk" in line or line["error"] for line in lines)
        captured = capsys.readouterr()
        assert f"{len(given) - len(classified)} of {len(given)} files" in captured.err
        assert "Traceback" not in captured.err + captured.out
        for line in lines:
            told = [row["index"] for row in line["topk"]] if "topk" in line else line["error"]
            assert answers.setdefault(line["path"], told) == told, artefact


@pytest.mark.parametrize("artefact", ["model.onnx", "model.pt2"])
def test_exported_file_is_evaluated_like_the_model(place, artefact, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("a.mp4 3\ndeep/b.mkv 0\nc with space.avi 7\n")
    figures = {}
    for name in ("merged", artefact):
        out = tmp_path / f"{name}.json"
        words = [str(place / name), "--list", str(tmp_path / "list.txt"), "--out", str(out)]
        assert cli.run(evaluate.main, [*words, "--root", str(place / "videos")]) == 0
        figures[name] = json.loads(out.read_text())
    assert f"{artefact} (deployed)" in capsys.readouterr().out
    for key in ("top1", "top5", "mean_class", "confusion", "n", "views"):
        assert figures["merged"][key] == figures[artefact][key]


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["--window", "0"], "--window must be positive seconds: got 0"),
        (["--stride", "-1"], "--stride must be positive seconds: got -1"),
        (["--seconds", "nan"], "--seconds must be positive seconds: got nan"),
        (["--out", "notes.txt/all.jsonl"], "--out can't be written: notes.txt/all.jsonl"),
        (["--timeline", "notes.txt"], "--timeline can't be written: notes.txt"),
        (["--list", "none.txt"], "list not found: none.txt"),
    ],
)
def test_bad_options_are_one_clear_line_before_the_model_is_read(
    place, monkeypatch, capsys, words, rule
):
    monkeypatch.chdir(place / "videos")
    monkeypatch.setattr(predict, "load_deployed", lambda *_: pytest.fail("work has begun"))
    assert run(place / "merged", "a.mp4", *words) == 1
    captured = capsys.readouterr()
    assert rule in captured.err and captured.err.count("\n") == 1


def test_timelines_of_files_of_one_name_do_not_overwrite_each_other(place, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_numbered(tmp_path / name / "clip.mp4", 20 if name == "one" else 40)
    out = tmp_path / "out"
    assert run(place / "merged", tmp_path / "one", tmp_path / "two", "--timeline", out) == 0
    names = ["clip.json", "clip.png", "clip_2.json", "clip_2.png"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert json.loads((out / "clip_2.json").read_text())["path"] == str(tmp_path / "two/clip.mp4")


def test_timeline_of_a_video_without_a_readable_window_is_a_failure(place, clips, tmp_path, capsys):
    bad = clips / "derived" / "CORRUPT_bitflips.mp4"
    assert run(place / "merged", bad, "--timeline", tmp_path / "out", "--window", 60) == 1
    assert "damaged after frame" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*.json"))


def test_no_video_is_one_line(place, capsys):
    assert run(place / "merged") == 1
    assert capsys.readouterr().err.startswith("error: videos must be given")
