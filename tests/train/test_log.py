"""What a run shows while it goes: whole lines, a bar on a terminal, W&B where it is asked for."""

import json
import os
import re
import struct
import sys
import termios
from fcntl import ioctl
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import zeroi2v.train.main
from zeroi2v.cli import run
from zeroi2v.train.log import RunLog, cut_log, draw_plots, read_log

LINE = (
    r"epoch (\d+)/(\d+) \| step (\d+)/(\d+) \| loss ([\d.]+) \| lr [\d.e-]+ \| ([\d.]+) clips/s \| "
    r"data \d+% \| mem [\d.]+ GB \| eta \d+:\d\d:\d\d"
)


def train_steps(log: RunLog, first: int, last: int) -> None:
    """Steps of 8 clips in half a second each, with loss 1 / step."""
    for step in range(first, last + 1):
        log.step(step, 8, loss=1 / step, lr=1e-3, seconds=0.5, waited=0.01)


def test_a_line_every_so_many_steps_and_at_the_end_of_an_epoch_and_no_bar_in_a_file(
    tmp_path, capsys
):
    log = RunLog(tmp_path, steps_per_epoch=10, epochs=2, every=4)
    train_steps(log, 1, 20)
    log.close()
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    found = [re.fullmatch(LINE, line) for line in lines]
    assert all(found), lines
    assert [int(match[3]) for match in found] == [4, 8, 10, 12, 16, 20]
    assert [int(match[1]) for match in found] == [1, 1, 1, 2, 2, 2]
    assert {match[6] for match in found} == {"16.0"}
    assert float(found[2][5]) == pytest.approx((1 / 9 + 1 / 10) / 2, abs=1e-4)
    assert lines[0].endswith("eta 0:00:08") and lines[-1].endswith("eta 0:00:00")
    assert captured.err == ""


def test_a_speed_below_one_clip_a_second_is_still_told(tmp_path, capsys):
    log = RunLog(tmp_path, steps_per_epoch=1, epochs=2, every=1)
    log.step(1, 2, loss=1.0, lr=1e-3, seconds=525.0, waited=0.0)
    log.close()
    assert "| 0.0038 clips/s |" in capsys.readouterr().out


def read_terminal(master: int) -> str:
    """What has been written to a pseudo terminal."""
    os.set_blocking(master, False)
    parts = []
    while True:
        try:
            parts.append(os.read(master, 65536))
        except BlockingIOError:
            return b"".join(parts).decode()


def test_on_a_terminal_a_bar_counts_the_steps_below_whole_lines(tmp_path, monkeypatch):
    master, slave = os.openpty()
    ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 150, 0, 0))
    with open(slave, "w", buffering=1) as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        monkeypatch.setattr(sys, "stderr", terminal)
        RunLog(tmp_path, steps_per_epoch=10, epochs=2, every=4).close()
        log = RunLog(tmp_path, steps_per_epoch=10, epochs=2, every=4)
        for step in range(1, 13):
            train_steps(log, step, step)
            log._bar.refresh()
        log.close()
        text = read_terminal(master)
        # A run that goes on has its bar go on.
        log = RunLog(tmp_path, steps_per_epoch=10, epochs=2, every=4)
        log.close()
        again = read_terminal(master)
    os.close(master)
    bars = re.findall(r"training: +(\d+)%\|[^|]*\| (\d+)/20 \[[^]]*loss ([\d.]+)", text)
    assert {int(count) for _, count, _ in bars} >= set(range(1, 13))
    assert ("60", "12", "0.0833") in bars
    lines = [part for part in re.split(r"[\r\n]+", text) if part.startswith("epoch ")]
    assert [int(re.fullmatch(LINE, line)[3]) for line in lines] == [4, 8, 10, 12]
    assert "12/20" in again


def test_tensorboard_holds_what_the_lines_say_and_the_validation(tmp_path):
    log = RunLog(tmp_path, steps_per_epoch=4, epochs=1, every=2)
    train_steps(log, 1, 4)
    log.validation(4, loss=0.5, top1=50.0, top5=None, mean_class=40.0)
    log.close()
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = {"train/loss", "train/lr", "train/clips_per_s", "val/loss", "val/top1"}
    tags.add("val/mean_class")
    assert set(board.Tags()["scalars"]) == tags
    loss = [(event.step, event.value) for event in board.Scalars("train/loss")]
    assert loss == [(2, pytest.approx(0.75)), (4, pytest.approx((1 / 3 + 1 / 4) / 2))]
    assert [event.value for event in board.Scalars("val/top1")] == [50.0]


def test_steps_and_validations_are_kept_or_cut_each_by_its_own_count(tmp_path):
    log = RunLog(tmp_path, steps_per_epoch=4, epochs=2, every=4)
    train_steps(log, 1, 4)
    log.validation(4, top1=50.0)
    train_steps(log, 5, 6)
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 7, "epo')  # a kill in mid-line
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4, 4, 5, 6]
    cut_log(tmp_path, step=5, validated=0)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4, 5]
    assert (tmp_path / "log.jsonl").read_text().endswith("}\n")


def test_plots_are_drawn_of_any_log(tmp_path):
    log = RunLog(tmp_path, steps_per_epoch=100, epochs=1, every=100)
    train_steps(log, 1, 100)
    log.close()
    draw_plots(tmp_path)
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {"loss.png", "accuracy.png", "lr.png", "throughput.png"}
    for name in names:
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


FAKE = """
import json, pathlib

class Error(Exception):
    pass

class Run:
    def __init__(self, values):
        self.path = pathlib.Path(values["dir"]) / "fake.jsonl"
        self.write(init=values)
    def write(self, **line):
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\\n")
    def log(self, figures, step):
        self.write(step=step, figures=figures)
    def finish(self):
        self.write(finished=True)

def init(**values):
    if values["project"] == "refused":
        raise Error("api key not configured\\n(and more)")
    return Run(values)
"""


@pytest.fixture
def fake_wandb(tmp_path, monkeypatch):
    """A stand-in for the package, that writes what it is given to `fake.jsonl`."""
    package = tmp_path / "packages" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(FAKE)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield
    sys.modules.pop("wandb", None)


def test_wandb_gets_config_and_figures_and_a_resumed_run_is_the_same_run(tmp_path, fake_wandb):
    folder = tmp_path / "run"
    folder.mkdir()
    config = {"optim": {"lr": 1e-3}}
    log = RunLog(folder, 4, 1, 2, "videos", config)
    train_steps(log, 1, 4)
    log.validation(4, top1=50.0)
    log.close()
    RunLog(folder, 4, 1, 2, "videos", config).close()
    lines = [json.loads(line) for line in (folder / "fake.jsonl").read_text().splitlines()]
    first, again = (line["init"] for line in lines if "init" in line)
    assert first == again
    assert first["project"] == "videos" and first["config"] == config and first["name"] == "run"
    assert first["resume"] == "allow" and len(first["id"]) >= 8
    assert "mode" not in first  # so that WANDB_MODE, offline for example, decides
    figures = [(line["step"], line["figures"]) for line in lines if "figures" in line]
    assert [step for step, _ in figures] == [2, 4, 4]
    assert figures[0][1] == {
        "train/loss": pytest.approx(0.75), "train/lr": 1e-3, "train/clips_per_s": 16.0,
    }  # fmt: skip
    assert figures[2][1] == {"val/top1": 50.0}
    assert [line for line in lines if "finished" in line] == [{"finished": True}] * 2


def test_wandb_that_can_not_start_is_one_line(tmp_path, fake_wandb):
    with pytest.raises(ValueError, match=r"run.wandb can't start: api key not configured") as error:
        RunLog(tmp_path, 4, 1, 2, "refused", {})
    assert "\n" not in str(error.value)


def test_wandb_asked_for_but_not_installed_is_told_before_work_starts(
    tmp_path, monkeypatch, capsys
):
    find_spec = zeroi2v.train.prepare.find_spec
    monkeypatch.setattr(
        zeroi2v.train.prepare,
        "find_spec",
        lambda name: None if name == "wandb" else find_spec(name),
    )
    Path(tmp_path / "list.txt").write_text("a.mp4 0\n")
    config = {
        "model": {"image_size": 32, "width": 32, "depth": 1, "num_heads": 2, "num_classes": 4,
                  "head_offsets": [-1, 1]},
        "data": {"train_list": str(tmp_path / "list.txt"), "workers": 0},
        "optim": {"batch_size": 1, "micro_batch": 1},
        "run": {"dir": str(tmp_path / "run"), "wandb": "videos"},
    }  # fmt: skip
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert run(zeroi2v.train.main.main, ["--config", str(tmp_path / "config.yaml")]) == 1
    error = capsys.readouterr().err
    assert error == "error: run.wandb needs the package wandb: pip install wandb\n"
    assert not (tmp_path / "run").exists()
