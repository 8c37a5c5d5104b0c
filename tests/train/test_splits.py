"""Few-shot draws, and one config on several splits and seeds with a table at the end."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import yaml
from training import wait_for
from videos import write_numbered

import zeroi2v.train.main
from zeroi2v.cli import run
from zeroi2v.data.annotations import Sample
from zeroi2v.train import splits
from zeroi2v.train.config import load_config
from zeroi2v.train.log import read_log
from zeroi2v.train.prepare import draw_shots


def samples(*counts: int) -> list[Sample]:
    """As many samples of each class as `counts` says, mixed."""
    rows = [(label, i) for label, count in enumerate(counts) for i in range(count)]
    return [Sample(f"{label}/{i}.mp4", label) for label, i in sorted(rows, key=lambda r: r[1])]


def test_shots_are_so_many_of_each_class_in_the_lists_order():
    everything = samples(5, 9, 3)
    drawn = draw_shots(everything, 3, 3, seed=0)
    assert [sum(s.label == label for s in drawn) for label in range(3)] == [3, 3, 3]
    places = [everything.index(sample) for sample in drawn]
    assert places == sorted(set(places))


def test_shots_are_the_same_for_a_seed_and_do_not_depend_on_other_classes():
    everything = samples(20, 20, 20)
    drawn = draw_shots(everything, 4, 3, seed=1)
    assert draw_shots(everything, 4, 3, seed=1) == drawn
    others = [draw_shots(everything, 4, 3, seed) for seed in range(2, 6)]
    assert all(other != drawn for other in others)
    fewer = draw_shots(samples(20, 9, 20), 4, 3, seed=1)
    assert [s for s in fewer if s.label != 1] == [s for s in drawn if s.label != 1]


def test_a_class_with_too_few_videos_is_named():
    with pytest.raises(
        ValueError,
        match=r"data.shots must be at most .*: got 3, but there are 0 of class 1, 2 of class 2$",
    ):
        draw_shots(samples(4, 0, 2), 3, 3, seed=0)
    with pytest.raises(ValueError, match=r"0 of class 3 and 96 more classes$"):
        draw_shots(samples(4), 3, 100, seed=0)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A config of a tiny model, three splits of a few videos in UCF101's own lists."""
    folder = tmp_path_factory.mktemp("small")
    names = ["Archery", "Bowling", "Diving"]
    lists = folder / "lists"
    lists.mkdir()
    (lists / "classInd.txt").write_text("".join(f"{i} {n}\n" for i, n in enumerate(names, 1)))
    for name in names:
        (folder / "videos" / name).mkdir(parents=True)
        for i in range(6):
            write_numbered(folder / "videos" / name / f"{i}.mp4", 6, size=(32, 32))
    for split in (1, 2, 3):
        tested = (2 * split - 2, 2 * split - 1)
        train_lines, test_lines = [], []
        for number, name in enumerate(names, 1):
            for i in range(6):
                if i in tested:
                    test_lines.append(f"{name}/{i}.mp4\n")
                else:
                    train_lines.append(f"{name}/{i}.mp4 {number}\n")
        (lists / f"trainlist0{split}.txt").write_text("".join(train_lines))
        (lists / f"testlist0{split}.txt").write_text("".join(test_lines))
    values = {
        "model": {"image_size": 32, "width": 32, "depth": 1, "num_heads": 2, "num_frames": 4,
                  "num_classes": 3, "head_offsets": [-1, 0],
                  "preprocess": {"sampling": "uniform", "val_short_side": 32,
                                 "test_short_side": 32, "test_views": [1, 1]}},
        "data": {"train_list": str(lists / "trainlist01.txt"),
                 "val_list": str(lists / "testlist01.txt"),
                 "root": str(folder / "videos"), "workers": 0},
        "augment": None,
        "optim": {"epochs": 1, "batch_size": 6, "micro_batch": 6, "warmup_epochs": 0},
        "run": {"dir": "unset", "log_every": 1},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder / "config.yaml"


def argv(config: Path, run_dir: Path, *words: str) -> list[str]:
    lists = config.parent / "lists"
    return [
        "--config", str(config), f"run.dir={run_dir}", *words,
        f"data.train_list={lists}/trainlist0{{split}}.txt",
        f"data.val_list={lists}/testlist0{{split}}.txt",
    ]  # fmt: skip


@pytest.fixture
def here(monkeypatch):
    """Has the runs happen in this process, and counts them."""
    started = []

    def train_here(part, path, launcher):
        started.append(part.name)
        zeroi2v.train.main.main(["--config", path, *part.overrides])

    monkeypatch.setattr(splits, "train", train_here)
    monkeypatch.setattr(zeroi2v.train.main, "write_report", lambda folder: None)
    return started


def test_three_splits_are_trained_tested_and_averaged_and_finished_ones_kept(
    config, tmp_path, here, capsys
):
    words = argv(config, tmp_path / "runs", "--splits", "1,2,3")
    assert run(splits.main, words) == 0, capsys.readouterr().err
    output = capsys.readouterr().out
    assert here == ["split1_seed0", "split2_seed0", "split3_seed0"]
    rows = json.loads((tmp_path / "runs" / "splits.json").read_text())
    assert [row["run"] for row in rows] == here
    for split, row in enumerate(rows, 1):
        folder = tmp_path / "runs" / row["run"]
        saved = load_config(folder / "config.yaml")
        assert saved.data.train_list.endswith(f"trainlist0{split}.txt")
        assert saved.data.val_list.endswith(f"testlist0{split}.txt")
        assert row["val_top1"] == json.loads((folder / "eval.json").read_text())["top1"]
        tested = json.loads((folder / "test.json").read_text())
        assert row["test_top1"] == tested["top1"] and tested["n"] == 6
        assert tested["model"] == str(folder / "last") and tested["views"] == [1, 1]
    table = (tmp_path / "runs" / "splits.md").read_text().strip()
    assert table in output and table == splits.summarize(rows)

    # One is taken away: the others are not trained again.
    shutil.rmtree(tmp_path / "runs" / "split2_seed0")
    assert run(splits.main, words) == 0
    assert here[3:] == ["split2_seed0"]
    assert capsys.readouterr().out.count("finished before") == 2
    assert json.loads((tmp_path / "runs" / "splits.json").read_text()) == rows

    # Nor are runs of another config taken for these.
    assert run(splits.main, [*words, "optim.lr=1e-2"]) == 1
    assert (
        "contains a run of another config: got optim.lr: 0.0003 -> 0.01" in capsys.readouterr().err
    )


def test_seeds_draw_different_shots(config, tmp_path, here, capsys):
    words = ["--config", str(config), f"run.dir={tmp_path}", "--seeds", "3,4", "data.shots=2"]
    assert run(splits.main, words) == 0, capsys.readouterr().err
    assert here == ["seed3", "seed4"]
    for seed in (3, 4):
        saved = load_config(tmp_path / f"seed{seed}" / "config.yaml")
        assert (saved.run.seed, saved.data.shots) == (seed, 2)
        steps = [line for line in read_log(tmp_path / f"seed{seed}") if "loss" in line]
        assert len(steps) == 1  # 2 shots of 3 classes, 6 clips a step
    assert capsys.readouterr().out.count("6 to train on") == 2


def test_table_has_mean_and_sample_deviation():
    rows = [
        {"run": "a", "val_top1": 70.0, "test_top1": 71.0},
        {"run": "b", "val_top1": 80.0, "test_top1": 73.0},
        {"run": "c", "val_top1": 90.0, "test_top1": 75.0},
    ]
    lines = splits.summarize(rows).splitlines()
    assert lines[2] == "| a | 70.00 | 71.00 |"
    assert lines[-2:] == ["| mean | 80.00 | 73.00 |", "| standard deviation | ± 10.00 | ± 2.00 |"]
    assert splits.summarize(rows[:1]).splitlines()[-1] == "| standard deviation |  |  |"


def is_there(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_stop_signal_is_handed_on_and_the_same_command_goes_on(config, tmp_path):
    script = Path(splits.__file__)
    command = [
        sys.executable, str(script), *argv(config, tmp_path / "runs", "--splits", "1,2"),
        "optim.epochs=400",
    ]  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    process = forked.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=env | {"OMP_NUM_THREADS": "1"}, start_new_session=True,
    )  # fmt: skip
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "| step 4/" in line:
            sent = time.perf_counter()
            process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, "".join(lines)
    assert time.perf_counter() - sent < 60
    text = "".join(lines)
    assert "run.resume" in text and "stopped in split1_seed0: the same command continues" in text
    wait_for(lambda: not is_there(process.pid), 10)  # nobody is left behind
    steps = [s["step"] for s in read_log(tmp_path / "runs" / "split1_seed0") if "loss" in s]
    assert 4 <= len(steps) < 800


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--splits", "1,2"], "--splits must go with {split} in an override"),
        (["data.train_list=list{split}.txt"], "--splits must go with {split} in an override"),
        (["--seeds", "one"], "--seeds must be numbers with commas between: got 'one'"),
        (["--launcher", "no-such-program x"], "--launcher must be a command: got"),
        (["data.val_list=null"], "data.val_list must be given"),
        (["--splits", "1,9", "data.train_list={lists}/trainlist0{split}.txt"], "trainlist09.txt"),
        (["data.shots=0"], "data.shots must be at least 1: got 0"),
        (["optim.epoch=1"], "unknown config key 'optim.epoch'"),
    ],
)
def test_bad_input_is_one_line_before_any_run(config, tmp_path, here, capsys, words, message):
    words = [word.replace("{lists}", str(config.parent / "lists")) for word in words]
    assert run(splits.main, ["--config", str(config), f"run.dir={tmp_path}/r", *words]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert here == [] and not (tmp_path / "r").exists()
