"""Prediction: the same figures as evaluation, names of classes, and files that can't be read."""

import io
import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import build, small_config
from videos import write_numbered

from zeroi2v import cli, inference, predict
from zeroi2v.data.annotations import Sample
from zeroi2v.data.views import ViewLoader
from zeroi2v.inference import predict_views
from zeroi2v.storage.checkpoint import load, weights_hash

LABELS = tuple(f"class {i}" for i in range(11))


def run(argv) -> int:
    return cli.run(predict.main, [str(word) for word in argv])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predict")
    build(small_config(labels=LABELS)).save_pretrained(folder / "named")
    build(small_config()).save_pretrained(folder / "unnamed")
    for i in range(3):
        write_numbered(folder / f"video {i}.mp4", 9 + 5 * i)
    (folder / "bad.mp4").write_text("no video")
    return folder


def test_probabilities_are_those_of_evaluation(place):
    model = build(small_config(labels=LABELS))
    paths = [str(place / f"video {i}.mp4") for i in range(3)]
    results = inference.predict(model, paths, topk=11)
    samples = [Sample(path, 0) for path in paths]
    views = model.config.preprocess.test_views
    loader = ViewLoader(samples, model.config, batch_size=2, test=True, views=views)
    _, probs = predict_views(model, loader, "cpu")
    assert [result["path"] for result in results] == paths
    for result, row in zip(results, probs, strict=True):
        values = [entry["probability"] for entry in result["topk"]]
        assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(1)
        for entry in result["topk"]:
            assert entry["probability"] == pytest.approx(row[entry["index"]].item(), rel=1e-4)
            assert entry["label"] == f"class {entry['index']}"


def test_json_lines_hold_every_file_in_order_and_the_others_go_on_after_a_bad_one(place, capsys):
    files = [place / "video 0.mp4", place / "bad.mp4", place / "gone.mp4", place / "video 1.mp4"]
    assert run([place / "named", *files, "--json", "--topk", 2]) == 1
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["path"] for line in lines] == [str(file) for file in files]
    assert [sorted(line) for line in lines] == [
        ["path", "topk"], ["error", "path"], ["error", "path"], ["path", "topk"]
    ]  # fmt: skip
    assert [len(line["topk"]) for line in lines if "topk" in line] == [2, 2]
    assert str(place / "bad.mp4") in lines[1]["error"]
    assert captured.err == "error: 2 of 4 files can't be decoded: see above\n"


def test_the_device_and_the_batch_may_be_chosen_and_change_nothing(place, capsys):
    files = [place / f"video {i}.mp4" for i in range(3)]
    outputs = []
    for words in ([], ["--device", "cpu", "--batch-size", "1"]):
        assert run([place / "named", *files, "--json", *words]) == 0
        outputs.append([json.loads(line) for line in capsys.readouterr().out.splitlines()])
    for one, other in zip(*outputs, strict=True):
        assert [t["index"] for t in one["topk"]] == [t["index"] for t in other["topk"]]


def test_text_output_is_one_block_a_file(place, capsys):
    assert run([place / "named", place / "video 0.mp4", place / "video 2.mp4", "--topk", 3]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(place / "video 0.mp4") and lines[4] == str(place / "video 2.mp4")
    assert len(lines) == 8 and all(" %  class " in lines[i] for i in (1, 2, 3, 5, 6, 7))


def test_a_bad_file_is_one_line_of_text(place, capsys):
    assert run([place / "named", place / "bad.mp4"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and "can't be decoded" in lines[0] and "bad.mp4" in lines[0]


def test_without_names_the_index_is_the_label_and_topk_stops_at_all_classes(place, capsys):
    assert run([place / "unnamed", place / "video 0.mp4", "--json", "--topk", 100]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    topk = json.loads(line)["topk"]
    assert sorted(entry["index"] for entry in topk) == list(range(11))
    assert all(entry["label"] == str(entry["index"]) for entry in topk)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere", "video 0.mp4"], "model folder not found: nowhere"),
        (["named", "video 0.mp4", "--topk", "0"], "--topk must be at least 1: got 0"),
        (["named", "video 0.mp4", "--batch-size", "0"], "--batch-size must be at least 1: got 0"),
        (["named", "video 0.mp4", "--device", "gpu"], "--device must be one of cpu: got gpu"),
    ],
)
def test_bad_input_is_one_clear_line(place, monkeypatch, capsys, words, message):
    monkeypatch.chdir(place)
    assert run(words) == 1
    captured = capsys.readouterr()
    assert captured.err == f"error: {message}\n" and not captured.out


def test_a_model_whose_output_is_not_finite_predicts_nothing(place):
    model = build(small_config())
    with torch.no_grad():
        model.head.bias[0] = torch.nan
    with pytest.raises(ValueError, match="must be finite"):
        inference.predict(model, [str(place / "video 0.mp4")])


def rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_results_say_which_weights_views_and_topk_they_are_of(place, tmp_path):
    out = tmp_path / "all.jsonl"
    assert run([place / "named", place / "video 0.mp4", "--out", out, "--topk", 2]) == 0
    (row,) = rows(out)
    model = load(place / "named")
    assert row["settings"]["weights"] == weights_hash(model.state_dict())
    assert row["settings"]["views"] == list(model.config.preprocess.test_views)
    assert row["settings"]["topk"] == 2 == len(row["topk"])


def test_results_of_another_model_or_setting_never_get_into_the_same_file(place, tmp_path, capsys):
    out, video, other = tmp_path / "all.jsonl", place / "video 1.mp4", tmp_path / "model"
    config = small_config(labels=LABELS)

    def save(config, seed=0):
        build(config, seed).save_pretrained(other)

    def changed(**preprocess):
        return replace(config, preprocess=replace(config.preprocess, **preprocess))

    save(config)
    assert run([other, place / "video 0.mp4", "--out", out]) == 0
    before = out.read_bytes()
    timeline = ["--timeline", tmp_path / "windows"]
    cases = [
        (config, 1, [], "weights"),  # trained on, under the same name
        (config, 0, ["--topk", "3"], "topk 5, not 3"),
        (changed(test_views=(1, 1)), 0, [], "config"),
        (changed(test_short_side=300), 0, [], "config"),
        (replace(config, labels=LABELS[::-1]), 0, [], "config"),
        (config, 0, timeline, "window None, not default"),
        (config, 0, [*timeline, "--window", "1"], "window None, not 1.0"),
    ]
    for changed_config, seed, words, difference in cases:
        save(changed_config, seed)
        capsys.readouterr()
        assert run([other, video, "--out", out, *words]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and difference in error and "--restart" in error
        assert out.read_bytes() == before
    save(config)
    other.rename(tmp_path / "the same elsewhere")
    assert run([tmp_path / "the same elsewhere", video, "--out", out]) == 0
    assert len(rows(out)) == 2


def test_restart_begins_the_file_anew_once_the_model_is_there(place, tmp_path, capsys):
    out, video = tmp_path / "all.jsonl", place / "video 0.mp4"
    out.write_text(json.dumps({"model": "m", "path": str(video), "topk": []}) + "\n")
    before = out.read_text()
    assert run([place / "named", video, "--out", out]) == 1
    assert "does not say which weights" in (error := capsys.readouterr().err)
    assert error.count("\n") == 1 and "--restart" in error and out.read_text() == before
    assert run(["nowhere", video, "--out", out, "--restart"]) == 1 and out.read_text() == before
    out.write_text(before + '{"model": "m", "pa')
    assert run([place / "named", video, "--out", out, "--restart"]) == 0
    (row,) = rows(out)
    assert len(row["topk"]) == 5
    assert run([place / "named", video, "--restart"]) == 1
    assert "--restart needs the --out file" in capsys.readouterr().err


@pytest.mark.parametrize("left", [1, 2, 40, 10_000])
def test_a_line_cut_anywhere_is_written_again(place, tmp_path, left):
    out, videos = tmp_path / "all.jsonl", [place / "video 0.mp4", place / "video 1.mp4"]
    assert run([place / "named", *videos, "--out", out]) == 0
    whole = out.read_bytes()
    first = whole.index(b"\n") + 1
    out.write_bytes(whole[: min(first + left, len(whole) - 1)])
    assert run([place / "named", *videos, "--out", out]) == 0
    again = rows(out)
    assert [row["path"] for row in again] == [str(video) for video in videos]
    assert again[0] == json.loads(whole[:first])


def test_a_file_of_other_bytes_is_left_alone(place, tmp_path, capsys):
    out = tmp_path / "all.jsonl"
    out.write_bytes(b"\xff\xfe\n")
    assert run([place / "named", place / "video 0.mp4", "--out", out]) == 1
    assert "must contain only results: line 1" in capsys.readouterr().err
    assert out.read_bytes() == b"\xff\xfe\n"


def test_a_pipe_is_another_video_each_time(place, tmp_path, monkeypatch):
    out = tmp_path / "all.jsonl"
    for number in (0, 2):
        pipe = io.BytesIO((place / f"video {number}.mp4").read_bytes())
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=pipe))
        assert run([place / "named", "-", "--out", out]) == 0
    first, second = rows(out)
    assert first["path"] == second["path"] == "-" and first["topk"] != second["topk"]


def test_an_answer_needs_neither_compiler_nor_plots_nor_trainer(place):
    # Each takes a second or more to import, at every cold start.
    code = f"""
import sys
from zeroi2v import cli, inference, predict
from zeroi2v.storage.checkpoint import load, weights_hash
status = cli.run(predict.main, [{str(place / "named")!r}, {str(place / "video 0.mp4")!r}])
heavy = "torch._dynamo torch._inductor sympy matplotlib deepspeed onnxruntime transformers".split()
print(status, [name for name in heavy if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "0 []"


@pytest.mark.parametrize("device, expected", [
    ("cpu", "made 0, given 0, made 1, given 1, made 2, given 2"),
    ("cuda", "made 0, made 1, given 0, made 2, given 1, given 2"),
])  # fmt: skip
def test_a_gpu_gets_the_next_batch_before_the_last_one_is_waited_for(device, expected):
    """A stand-in for batches on a GPU: `each_batch` looks at the device's name alone."""
    order = []
    config = small_config()
    clip = torch.randn(2, 1, 3, config.num_frames, config.image_size, config.image_size)

    class Video:
        def __init__(self, number):
            self.number = number

        def to(self, *_, non_blocking):
            assert non_blocking
            order.append(f"made {self.number}")
            return clip * (1 + self.number)

    model = build(config).train()
    batches = [SimpleNamespace(video=Video(i), index=torch.tensor([i, -1])) for i in range(3)]
    found = []
    loader = SimpleNamespace(epoch=lambda: iter(batches))
    for index, probs in inference.each_batch(model, loader, device, None):
        assert not model.training and not probs.requires_grad
        order.append(f"given {index.item()}")
        found.append(probs)
    assert ", ".join(order) == expected and model.training
    model.eval()
    for i, probs in enumerate(found):
        expected = model(clip[:, 0] * (1 + i)).softmax(-1)[:1]
        torch.testing.assert_close(probs, expected)


def test_a_copy_from_a_gpu_is_awaited_by_its_event(monkeypatch):
    done = []
    event = SimpleNamespace(record=lambda: done.append("recorded"),
                            synchronize=lambda: done.append("awaited"))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "Event", lambda: event)
    tensor = SimpleNamespace(is_cuda=True, to=lambda *_, non_blocking: done.append("copied") or 7)
    read = inference._copied(tensor)
    assert done == ["copied", "recorded"] and read() == 7 and done[2:] == ["awaited"]
