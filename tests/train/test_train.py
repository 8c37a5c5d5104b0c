"""A training run: its files, its exactness when resumed, its stops, its errors."""

import gc
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from training import (
    MODEL,
    Ranks,
    arguments,
    assert_same_run,
    environment,
    make_data,
    wait_for,
    weights,
)

import zeroi2v.train.main
from zeroi2v import VideoViT, check_data
from zeroi2v.cli import run
from zeroi2v.config import ModelConfig
from zeroi2v.data.annotations import read_list
from zeroi2v.data.pipeline import ClipLoader
from zeroi2v.data.views import ViewLoader
from zeroi2v.inference import metrics, predict_views
from zeroi2v.processes import end_processes
from zeroi2v.train.config import OptimConfig, load_config
from zeroi2v.train.distributed import start_processes
from zeroi2v.train.engine import build_engine, parameter_groups, schedule
from zeroi2v.train.log import read_log


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder of videos, with lists of them and a run configuration."""
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def go(data, tmp_path, monkeypatch):
    """Runs main in this process on the folder's config; `name` is the run folder's."""
    gc.freeze()  # DeepSpeed collects garbage many times at a start

    def go(name: str, *overrides: str, plots: bool = False) -> Path:
        if not plots:  # they take longer than the run
            monkeypatch.setattr(zeroi2v.train.main, "write_report", lambda folder: None)
        zeroi2v.train.main.main(arguments(data, tmp_path / name, *overrides))
        return tmp_path / name

    return go


def test_run_folder_holds_all_that_was_promised(go, data, capsys):
    names = "a\nb\nc\nd\n"
    run_dir = go("run", f"data.labels={write(data / 'names.txt', names)}", plots=True)
    output = capsys.readouterr().out
    summary = json.loads(output.splitlines()[-1])
    assert summary["steps"] == 8 and summary["finished"] and summary["dir"] == str(run_dir)
    *_, result, then, _ = output.splitlines()
    assert re.fullmatch(rf"result      8 steps, top-1 [\d.]+ % \(best [\d.]+ %\); report: {run_dir}"
                        r"/report.html", result)  # fmt: skip
    assert then == f"next        zeroi2v reparam {run_dir} --out {run_dir}/merged"
    assert "NONE: random weights" in output
    assert "epoch 1/2 | step 3/8 | loss " in output

    log = read_log(run_dir)
    assert [line["step"] for line in log if "loss" in line] == list(range(1, 9))
    assert [line["step"] for line in log if "val_top1" in line] == [4, 8]
    lr = [line["lr"] for line in log if "loss" in line]
    assert lr == pytest.approx([1e-2 * schedule(s, 8, 2, 0.1) for s in range(8)])

    for name in ("loss", "accuracy", "lr", "throughput"):
        assert (run_dir / "plots" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert list((run_dir / "tensorboard").glob("events*"))
    assert load_config(run_dir / "config.yaml").run.dir == str(run_dir)
    states = [p.name for p in (run_dir / "state").glob("step_*")]
    assert states == [(run_dir / "state" / "latest").read_text().strip()]

    # The saved model says for itself what validation said of it.
    model = VideoViT.from_pretrained(run_dir / "last")
    assert model.config.labels == ("a", "b", "c", "d")
    samples = read_list(data / "val.txt", data)
    loader = ViewLoader(samples, model.config, batch_size=2)
    index, probs = predict_views(model, loader, "cpu")
    expected = metrics(probs, torch.tensor([s.label for s in samples])[index])
    saved = json.loads((run_dir / "eval.json").read_text())
    assert {k: saved[k] for k in expected} == expected
    assert summary["top1"] == saved["top1"] and summary["best_top1"] == saved["best_top1"]
    assert saved["best_top1"] >= saved["top1"]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_only_adapters_temporal_embedding_last_norm_and_head_are_trained(go):
    run_dir = go("run", "run.seed=3", "data.val_list=null")
    torch.manual_seed(3)
    model = VideoViT(load_config(run_dir / "config.yaml").model.video).freeze()
    trained = weights(run_dir)
    for name, before in model.named_parameters():
        assert torch.equal(before, trained[name]) != before.requires_grad, name
    assert not (run_dir / "best").exists()


def test_first_loss_is_the_smoothed_cross_entropy_of_the_loaders_first_batch(go, data):
    still = ("augment=null", "model.adapter.dropout=0", "model.head_dropout=0")
    run_dir = go("run", *still, "optim.label_smoothing=0.3", "run.max_steps=1")
    config = load_config(run_dir / "config.yaml")
    torch.manual_seed(0)
    model = VideoViT(config.model.video)
    samples = read_list(data / "train.txt", data)
    loader = ClipLoader(samples, config.model.video, batch_size=2, accumulation=2)
    batches = loader.epoch(0)
    losses = [
        F.cross_entropy(model(batch.video[:, 0]), batch.label, label_smoothing=0.3)
        for batch in (next(batches), next(batches))
    ]
    logged = read_log(run_dir)[0]["loss"]
    assert logged == pytest.approx(torch.stack(losses).mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("precision", "stage"), [("fp32", 0), ("fp32", 1), ("fp32", 3), ("bf16", 1), ("bf16", 2)]
)
def test_run_stopped_in_mid_epoch_and_resumed_is_bit_equal_to_an_unbroken_one(go, precision, stage):
    options = (f"optim.precision={precision}", f"optim.zero_stage={stage}", "optim.clip_grad=1")
    whole = go("whole", *options)
    broken = go("broken", *options, "run.max_steps=3")
    assert read_log(broken)[-1]["step"] == 3
    go("broken", *options, "run.resume=true", "run.max_steps=6")
    go("broken", *options, "run.resume=true")
    assert_same_run(whole, broken)


def test_bf16_run_saves_fp32_models_with_untouched_frozen_weights(go):
    run_dir = go("run", "optim.precision=bf16", "run.max_steps=1")
    torch.manual_seed(0)
    model = VideoViT(load_config(run_dir / "config.yaml").model.video).freeze()
    for name, tensor in weights(run_dir).items():
        assert tensor.dtype == torch.float32
        if not model.get_parameter(name).requires_grad:
            assert torch.equal(tensor, model.get_parameter(name))


def test_stages_agree_in_fp32(go):
    losses = [
        [line["loss"] for line in read_log(go(f"{n}", f"optim.zero_stage={n}")) if "loss" in line]
        for n in range(4)
    ]
    assert losses[0] == losses[1] == losses[2]
    assert losses[3] == pytest.approx(losses[0], rel=1e-5)


def test_kill_in_the_middle_of_a_save_leaves_the_state_before_it(go, monkeypatch):
    whole = go("whole")
    broken = go("broken", "run.max_steps=3")
    write_whole = zeroi2v.train.state.write_whole

    def killed(path, text):
        if path.name == "latest":
            raise RuntimeError("killed")
        write_whole(path, text)

    monkeypatch.setattr(zeroi2v.train.state, "write_whole", killed)
    with pytest.raises(RuntimeError, match="killed"):
        go("broken", "run.resume=true", "run.max_steps=6")
    monkeypatch.undo()
    assert read_log(broken)[-1]["step"] == 4
    assert len(list((broken / "state").glob("step_*"))) == 2
    go("broken", "run.resume=true")
    assert_same_run(whole, broken)
    assert len(list((broken / "state").glob("step_*"))) == 1


def test_signal_during_validation_stops_at_once_and_loses_nothing(go, monkeypatch, capsys):
    whole = go("whole")
    predict = zeroi2v.train.main.predict_views

    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)
        return predict(*args)

    monkeypatch.setattr(zeroi2v.train.main, "predict_views", interrupted)
    with pytest.raises(SystemExit) as stop:
        go("broken")
    monkeypatch.undo()
    assert stop.value.code == 128 + signal.SIGINT
    output = capsys.readouterr().out
    assert "continue with the same command and run.resume=true" in output
    assert json.loads(output.splitlines()[-1])["steps"] == 4
    assert_same_run(whole, go("broken", "run.resume=true"))


def test_sigterm_to_all_processes_saves_and_exits_143_and_the_run_can_go_on(
    go, data, tmp_path, monkeypatch
):
    """The decoding process gets the signal too, as from launchers and batch systems.

    The run goes on with the number of threads it began with, whatever the new process is told.
    """
    options = ("data.workers=1", "data.val_list=null", "optim.epochs=4")
    words = arguments(data, tmp_path / "broken", *options)
    with Ranks(words, count=1, output=tmp_path / "text", before=os.setsid) as ranks:
        wait_for(lambda: "| step 3/16 |" in ranks.text(), 200)
        os.killpg(ranks.processes[0].pid, signal.SIGTERM)
        assert ranks.wait(60) == [128 + signal.SIGTERM], ranks.text()
    assert ranks.errors() == []
    summary = json.loads(ranks.text().splitlines()[-1])
    assert 3 <= summary["steps"] < 16 and not summary["finished"]

    options = (*options[1:], "data.workers=0")
    monkeypatch.setenv("OMP_NUM_THREADS", environment()["OMP_NUM_THREADS"])
    whole = go("whole", *options)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    broken = go("broken", *options, "run.resume=true")
    expected, actual = weights(whole), weights(broken)
    assert [k for k in expected if not torch.equal(expected[k], actual[k])] == []


def test_two_processes_and_one_with_twice_the_micro_batch_have_the_same_losses(go, data, tmp_path):
    still = ("augment=null", "model.adapter.dropout=0", "model.head_dropout=0")
    words = arguments(data, tmp_path / "two", *still, "optim.micro_batch=1")
    with Ranks(words, count=2, output=tmp_path / "text") as ranks:
        assert ranks.wait(200) == [0, 0], ranks.text()
    one = go("one", *still, "optim.micro_batch=2")
    two = tmp_path / "two"
    keys = ("loss", "val_top1")
    logs = [[line.get(k) for line in read_log(r) for k in keys if k in line] for r in (one, two)]
    assert len(logs[0]) == 10
    assert logs[1] == pytest.approx(logs[0], rel=1e-5)
    assert ranks.text().count('"finished": true') == 1


def test_two_processes_tell_an_error_once(data, tmp_path):
    words = arguments(data, tmp_path / "run", "data.train_list=nowhere.txt")
    with Ranks(words, count=2, output=tmp_path / "text") as ranks:
        assert ranks.wait(200) == [1, 1], ranks.text()
    (error,) = ranks.errors()
    assert "nowhere.txt" in error


def test_bad_videos_are_named_counted_and_replaced(go, data, tmp_path, capsys):
    (data / "bad.mp4").write_text("this is not a video")
    (data / "cut.mp4").write_bytes((data / "0.mp4").read_bytes()[:400])
    text = (data / "train.txt").read_text() + f"bad.mp4 1\n{data}/cut.mp4 2\n"
    write(tmp_path / "list.txt", text)
    options = (f"data.train_list={tmp_path / 'list.txt'}", "optim.batch_size=2")
    run_dir = go("run", *options, "data.max_bad_fraction=0.2")
    output = capsys.readouterr().out
    for name in ("bad.mp4", "cut.mp4"):
        assert sum(f"{name}" in line for line in output.splitlines()) == 1
        assert name in (run_dir / "bad_files.txt").read_text()
    assert "2 of 18 videos" in output
    assert json.loads(output.splitlines()[-1])["finished"]

    with pytest.raises(ValueError, match="max_bad_fraction") as error:
        go("strict", *options)
    assert "bad.mp4" in str(error.value) or "cut.mp4" in str(error.value)


def test_each_part_of_a_film_that_the_manifest_calls_bad_counts(data, tmp_path, capsys):
    (tmp_path / "film.mp4").write_text("this is not a video")
    good = [f"{data}/{i}.mp4,{i % 4},," for i in range(12)]
    parts = [f"film.mp4,0,{i},{i + 1}" for i in range(4)]
    source = write(tmp_path / "list.csv", "\n".join(["path,label,start,end", *good, *parts]) + "\n")
    manifest = tmp_path / "manifest.jsonl"
    words = [str(source), "--root", str(tmp_path), "--out", str(manifest), "--workers", "1"]
    assert run(check_data.main, words) == 1
    for limit, status in ((0.2, 1), (0.25, 0)):
        data_words = [f"data.train_list={source}", f"data.root={tmp_path}", "data.val_list=null",
                      f"data.manifest={manifest}", f"data.max_bad_fraction={limit}"]  # fmt: skip
        words = arguments(data, tmp_path / f"run{limit}", *data_words, "optim.batch_size=4")
        assert run(zeroi2v.train.main.main, [*words, "run.max_steps=1"]) == status
        captured = capsys.readouterr()
        if status:
            assert "at most data.max_bad_fraction 0.2 of 16: got 4" in captured.err
        else:
            assert "videos      12 to train on (4 bad ones left out)" in captured.out


def test_run_over_all_real_clips_damaged_ones_included_finishes(go, clips, tmp_path, capsys):
    lines = (clips / "manifest.tsv").read_text().splitlines()[1:]
    files = [(line.split("\t")[0], line.split("\t")[2]) for line in lines]
    everything = "".join(f"{file} {i % 4}\n" for i, (file, _) in enumerate(files))
    source = write(tmp_path / "all.txt", everything)
    go(
        "run", f"data.train_list={source}", f"data.val_list={source}", f"data.root={clips}",
        "data.max_bad_fraction=0.1", "optim.epochs=1", "optim.warmup_epochs=0",
    )  # fmt: skip
    output = capsys.readouterr().out
    assert json.loads(output.splitlines()[-1])["finished"]
    told = {line.split()[2].rstrip(":") for line in output.splitlines() if "bad file " in line}
    assert told
    assert told <= {str(clips / file) for file, status in files if status != "ok"}


def test_run_on_twenty_real_signs_learns_every_one(go, clips, tmp_path):
    signs = clips / "annotations" / "tiny"
    source = signs / "asl20_k400style.txt"
    run_dir = go(
        "run", f"data.train_list={source}", f"data.val_list={source}", f"data.root={clips}",
        f"data.labels={signs / 'asl20_classes.txt'}", f"data.cache={tmp_path / 'cache'}",
        "augment=null",
        "model.num_classes=20", "model.width=128", "model.num_heads=4", "model.image_size=128",
        "model.head_offsets=[-1, 1, 0, 0]", "model.preprocess.val_short_side=128",
        "model.adapter={ratio: 0.5, scale: 1.0, dropout: 0.0}", "model.head_dropout=0.0",
        "optim.epochs=40", "optim.warmup_epochs=1", "optim.batch_size=5", "optim.micro_batch=5",
        "optim.lr=1.5e-2", "optim.backbone_lr_scale=0.2", "run.val_every=40",
    )  # fmt: skip
    assert json.loads((run_dir / "eval.json").read_text())["top1"] == 100.0


@pytest.mark.parametrize(("lr", "rule"), [("1e30", "finite"), ("100", "below 100")])
def test_diverged_or_exploded_loss_stops_the_run(go, tmp_path, lr, rule):
    with pytest.raises(ValueError, match=rf"loss must be {rule}: got .* at step \d") as error:
        go("run", f"optim.lr={lr}", "optim.warmup_epochs=0", "data.val_list=null")
    report = json.loads((tmp_path / "run" / "diverged" / "report.json").read_text())
    suspects = [clip for clip in report["clips"] if not float(clip["loss"]) < 100]
    assert all(clip["file"] in str(error.value) for clip in suspects or report["clips"])
    assert f"first bad layer: {report['first_bad_layer']}" in str(error.value)
    VideoViT.from_pretrained(tmp_path / "run" / "diverged" / "model")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.epoch=3"], "unknown config key 'optim.epoch': did you mean optim.epochs"),
        (["data.train_list=nowhere.txt"], "nowhere.txt"),
        (["data.val_list=nowhere.txt"], "nowhere.txt"),
        (["data.train_list={tmp}/empty.txt"], "must name at least one video"),
        (["data.train_list={tmp}/negative.txt"], "negative.txt"),
        (["data.train_list={tmp}/large.txt"], "large.txt"),
        (
            ["data.labels={tmp}/names.txt"],
            "model.num_classes must be 2, as many as there are",
        ),
        (["optim.precision=fp16"], "optim.precision fp16 needs a GPU: got the CPU"),
        (["optim.offload=true"], "optim.offload needs a GPU: got the CPU"),
        (["optim.batch_size=32"], "samples must fill one step of 32 clips: got 16"),
        (["model.head_offsets=[1]"], "head_offsets needs one entry per head: got 1 for 2 heads"),
        (["model.backbone={tmp}/nothing.safetensors"], "nothing.safetensors"),
        (["model.backbone={tmp}/text.safetensors"], "text.safetensors"),
        (["model.backbone={tmp}/other"], "other"),
        (["run.dir={tmp}/text.safetensors/run"], "run.dir must be writable: got"),
        (["run.dir=/proc/run"], "run.dir must be writable: got /proc/run"),
        (["run.resume=true"], "run.resume needs a saved state"),
    ],
)
def test_bad_input_is_one_error_line_before_work_starts(data, tmp_path, capsys, overrides, message):
    write(tmp_path / "empty.txt", "\n")
    write(tmp_path / "negative.txt", "0.mp4 -1\n")
    write(tmp_path / "large.txt", "0.mp4 4\n")
    write(tmp_path / "names.txt", "left\nright\n")
    write(tmp_path / "text.safetensors", "not weights")
    other = ModelConfig.from_dict({**MODEL, "width": 64, "adapter": None})
    VideoViT(other).save_pretrained(tmp_path / "other")
    overrides = [text.format(tmp=tmp_path) for text in overrides]
    argv = ["--config", str(data / "config.yaml"), f"run.dir={tmp_path / 'run'}", *overrides]
    assert run(zeroi2v.train.main.main, argv) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert not (tmp_path / "run").exists()


def test_run_folder_is_neither_overwritten_nor_resumed_by_another_run(go, data, tmp_path):
    run_dir = go("run", "run.max_steps=1")
    with pytest.raises(ValueError, match=r"run.dir must contain no run, unless run.resume is"):
        go("run")
    way = f"to train on with other settings, begin a run with model.backbone={run_dir}/last"
    with pytest.raises(ValueError, match=rf"needs the config .*: got optim.lr: 0.01 -> 0.1; {way}"):
        go("run", "run.resume=true", "optim.lr=0.1")
    with pytest.raises(ValueError, match=r"got optim.zero_stage: 1 -> 3"):
        go("run", "run.resume=auto", "optim.zero_stage=3")
    with pytest.raises(ValueError, match=r"got model.adapter"):
        go("run", "run.resume=true", "model.adapter=null")

    train_list = data / "train.txt"
    text = train_list.read_text()
    try:
        train_list.write_text(text.replace("0.mp4 0", "1.mp4 1", 1))
        with pytest.raises(ValueError, match=r"data.train_list must be what the saved run used"):
            go("run", "run.resume=true")
    finally:
        train_list.write_text(text)

    record = next((run_dir / "state").glob("step_*/record.json"))
    text = record.read_text()
    write(record, text.replace('"world_size": 1', '"world_size": 2'))
    with pytest.raises(ValueError, match=r"as many processes as .*, 2: got 1"):
        go("run", "run.resume=true")
    write(record, json.dumps(json.loads(text) | {"trained": 1}))
    with pytest.raises(ValueError, match=r"state must contain the weights it was saved with"):
        go("run", "run.resume=true")


def test_start_that_fails_before_its_first_step_leaves_no_run(go, data, tmp_path):
    for i in range(4):
        write(tmp_path / f"bad{i}.mp4", "no video")
    bad = write(tmp_path / "bad.txt", "".join(f"{tmp_path}/bad{i}.mp4 {i}\n" for i in range(4)))
    with pytest.raises(ValueError, match="samples must contain videos that decode"):
        go("run", f"data.train_list={bad}", "data.max_bad_fraction=1")
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    run_dir = go("run", "run.max_steps=1", "data.val_list=null")
    assert [line["step"] for line in read_log(run_dir)] == [1]


def test_warm_up_is_at_most_half_of_a_short_run(go, capsys):
    run_dir = go("run", "optim.epochs=1", "optim.warmup_epochs=2.5", "data.val_list=null")
    told = "warm-up 2 (half of the run; the recipe's is 2.5 epochs), peak lr 0.01"
    assert told in capsys.readouterr().out
    lr = [line["lr"] for line in read_log(run_dir)]
    assert lr == pytest.approx([0.001, 0.0055, 0.01, 0.005])


def test_training_goes_on_from_a_trained_model(go, tmp_path, capsys):
    first = go("first", "run.max_steps=2", "data.val_list=null")
    few = ("optim.lr=1e-12", "run.max_steps=1", "data.val_list=null")
    second = go("second", f"model.backbone={first}", *few)
    assert "its temporal embedding and its classifier go on" in capsys.readouterr().out
    trained = weights(first)
    for name, tensor in weights(second).items():
        torch.testing.assert_close(tensor, trained[name], rtol=0, atol=1e-9, msg=name)
    third = weights(go("third", f"model.backbone={first}/last", "model.num_classes=5", *few))
    assert "and not its classifier, of other classes, go on" in capsys.readouterr().out
    assert third["head.weight"].shape[0] == 5
    for name, tensor in third.items():
        if not name.startswith("head."):
            torch.testing.assert_close(tensor, trained[name], rtol=0, atol=1e-9, msg=name)
    with pytest.raises(ValueError, match="has head_offsets .*; merge it first, to train new adapt"):
        go("fourth", f"model.backbone={first}", "model.head_offsets=[0, 0]")


def test_backbone_file_gives_the_frozen_weights_and_may_not_change_on_resume(go, tmp_path):
    plain = {**MODEL, "adapter": None, "head_offsets": [0, 0]}
    torch.manual_seed(7)
    backbone = VideoViT(ModelConfig.from_dict(plain))
    backbone.save_pretrained(tmp_path / "clip")
    option = f"model.backbone={tmp_path / 'clip'}"
    run_dir = go("run", option, "run.max_steps=1")
    assert torch.equal(weights(run_dir)["conv1.weight"], backbone.conv1.weight)
    VideoViT(ModelConfig.from_dict(plain)).save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"model.backbone must be what the saved run used"):
        go("run", option, "run.resume=true")


def test_schedule_warms_up_linearly_then_falls_as_a_cosine_to_zero():
    factors = [schedule(step, 100, 10, 0.1) for step in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[5] == pytest.approx(0.55)
    assert factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert factors[100] == pytest.approx(0)
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert schedule(0, 5, 0, 0.1) == 1.0


def test_embeddings_and_norms_have_no_weight_decay_and_all_but_the_head_are_scaled():
    model = VideoViT(ModelConfig.from_dict(MODEL)).freeze()
    groups = parameter_groups(model, OptimConfig(lr=1.0, backbone_lr_scale=0.1, weight_decay=0.5))
    names = {parameter: name for name, parameter in model.named_parameters()}
    seen = {}
    for group in groups:
        for parameter in group["params"]:
            seen[names[parameter]] = (group["lr"], group["weight_decay"])
    assert seen.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, rates in seen.items():
        if name.startswith("head."):
            assert rates == (1.0, 0.5)
        elif name in ("temporal_embedding", "ln_post.weight", "ln_post.bias"):
            assert rates == (0.1, 0.0)
        else:
            assert "_adapter." in name and rates == (0.1, 0.5)


def test_engine_has_every_setting_it_was_given():
    start_processes()
    try:
        optim = OptimConfig(
            batch_size=12, micro_batch=3, clip_grad=0.5, precision="bf16", zero_stage=2, lr=1.0
        )
        model = VideoViT(ModelConfig.from_dict(MODEL)).freeze()
        engine = build_engine(model, optim, steps_per_epoch=10)
        assert engine.train_batch_size() == 12
        assert engine.train_micro_batch_size_per_gpu() == 3
        assert engine.gradient_accumulation_steps() == 4
        assert engine.gradient_clipping() == 0.5
        assert engine.bfloat16_enabled()
        assert engine.get_data_types() == (torch.bfloat16, torch.float32)
        assert engine.zero_optimization_stage() == 2
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert engine.zero_reduce_bucket_size() == trainable
        assert max(engine.get_lr()) == pytest.approx(0.1)
        engine.destroy()
    finally:
        end_processes()
