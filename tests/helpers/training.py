"""A small training set, and runs on it by several processes that may be killed at any time."""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from forked import server
from safetensors.torch import load_file
from videos import write_video

from zeroi2v import VideoViT
from zeroi2v.config import ModelConfig
from zeroi2v.train.log import read_log

ROOT = Path(__file__).parents[2]
MODEL = dict(
    image_size=32, patch_size=16, width=32, depth=2, num_heads=2, num_frames=4, num_classes=4,
    head_offsets=[-1, 1], preprocess=dict(sampling="uniform", val_short_side=32),
)  # fmt: skip

# What Python prints in a decoding process whose parent is killed before it has told it what to do.
STARTING_WORKER = re.compile(
    r"Traceback.*\n(?:  .*\n)*  .*spawn_main\n(?:  .*\n)*EOFError: Ran out of input\n"
)


def make_video(path: Path, label: int, seed: int) -> None:
    """A short h264 file: a square whose place tells half of the class, its direction the other."""
    rng = np.random.default_rng(seed)
    start, colour = rng.integers(0, 36), rng.integers(120, 255, 3)
    images = []
    for t in range(10):
        image = np.full((48, 48, 3), 30, np.uint8)
        left = (start + (3 * t if label % 2 else -3 * t)) % 36
        top = 24 * (label // 2)
        image[top : top + 20, left : left + 12] = colour
        images.append(image)
    write_video(path, images, preset="ultrafast", g="5")


def make_data(folder: Path) -> Path:
    """Fills `folder` with 22 videos, lists of 16 to train and 5 to validate on, a `config.yaml`."""
    for i in range(22):
        make_video(folder / f"{i}.mp4", i % 4, i)
    (folder / "train.txt").write_text("".join(f"{i}.mp4 {i % 4}\n" for i in range(16)))
    (folder / "val.txt").write_text("".join(f"{i}.mp4 {i % 4}\n" for i in range(16, 21)))
    values = {
        "model": MODEL,
        "data": {"train_list": str(folder / "train.txt"), "val_list": str(folder / "val.txt"),
                 "root": str(folder), "workers": 0},
        "augment": {"rand_augment_ops": 1},  # DALI takes a second for the graph of four
        "optim": {"epochs": 2, "batch_size": 4, "micro_batch": 2, "warmup_epochs": 0.5,
                  "lr": 1e-2},
        "run": {"dir": "unset", "log_every": 1},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def weights(run_dir: Path, which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(run_dir / which / "model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    """Both runs ended in the same bits, and logged the same losses and accuracies."""
    for which in ("last", "best"):
        expected, actual = weights(one, which), weights(other, which)
        assert expected.keys() == actual.keys()
        assert [k for k in expected if not torch.equal(expected[k], actual[k])] == []
    keys = ("step", "loss", "lr", "val_top1")
    logs = [[[line.get(k) for k in keys] for line in read_log(r)] for r in (one, other)]
    assert logs[0] == logs[1]
    assert (one / "eval.json").read_text() == (other / "eval.json").read_text()


def arguments(data: Path, run_dir: Path, *overrides: str) -> list[str]:
    return ["--config", str(data / "config.yaml"), f"run.dir={run_dir}", *overrides]


def command(data: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [str(ROOT / "train" / "main.py"), *arguments(data, run_dir, *overrides)]


def environment() -> dict[str, str]:
    """For a process of its own: this one's rank is none of its business."""
    ours = ("RANK", "WORLD_SIZE", "MASTER_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours) and "LOCAL_" not in k}
    return env | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{env['PATH']}"}


def finish(command: list[str], status: int = 0, **options) -> subprocess.CompletedProcess:
    """Runs `command` to its end; fails, with all that it said, if it ends with another status."""
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == status, f"ended with {done.returncode}\n{done.stdout}{done.stderr}"
    return done


@contextmanager
def held_port() -> Iterator[int]:
    """A port from 20000 to 29999 that nobody else gets meanwhile, but who listens on it by name."""
    with socket.socket() as holder:
        while not holder.getsockname()[1]:
            with suppress(OSError):  # taken
                holder.bind(("127.0.0.1", random.SystemRandom().randrange(20000, 30000)))
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # for the listener to come
        yield holder.getsockname()[1]


class Ranks:
    """The processes of a run as a batch system starts them: no launcher ends those that are left.

    They do the runs that `arguments` tell, one after the other, and write to file `output`;
    `before` is called in each first. As a context it leaves none of them behind.
    """

    def __init__(
        self,
        *arguments: list[str],
        count: int,
        output: Path,
        before: Callable[[], object] | None = None,
    ):
        context = server()
        self._keep = ExitStack()
        self.ports = [self._keep.enter_context(held_port()) for _ in arguments]
        self.output = output
        self.processes = [
            context.Process(
                target=run_rank, args=(arguments, rank, count, self.ports, output, before)
            )
            for rank in range(count)
        ]

    def __enter__(self) -> Ranks:
        for process in self.processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        self._keep.close()

    def send(self, number: int, ranks: list[int]) -> None:
        """Sends signal `number` to some of them, if they still run."""
        for rank in ranks:
            if self.processes[rank].is_alive():
                os.kill(self.processes[rank].pid, number)

    def wait(self, seconds: float) -> list[int]:
        """Exit statuses, negative for a signal. Fails if a process is still there after that."""
        until = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        assert None not in codes, f"still running after {seconds} s: {codes}\n{self.text()}"
        return codes

    def errors(self) -> list[str]:
        """The error lines they wrote; no traceback may be among the rest."""
        text = STARTING_WORKER.sub("", self.text())
        assert "Traceback" not in text, text
        return [line for line in text.splitlines() if line.startswith("error: ")]

    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ""


def run_rank(
    arguments: tuple[list[str], ...],
    rank: int,
    count: int,
    ports: list[int],
    output: Path,
    before: Callable[[], object] | None,
) -> None:
    """Body of a process of `Ranks`."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import zeroi2v.train.main
    from zeroi2v.cli import run

    zeroi2v.train.main.write_report = lambda folder: None  # it takes longer than the run
    if before is not None:
        before()
    linear = F.linear
    for words, port in zip(arguments, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        F.linear = linear  # stage 3 puts another one in its place for good
        status = run(zeroi2v.train.main.main, words)
        if status:
            sys.exit(status)
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024} bytes")


def save_for_ever(folder: Path, classes: tuple[int, int]) -> None:
    """Saves two models over each other, told apart by their number of classes."""
    models = [VideoViT(ModelConfig.from_dict({**MODEL, "num_classes": n})) for n in classes]
    while True:
        for model in models:
            model.save_pretrained(folder)


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"did not happen in {seconds} s"
        time.sleep(0.01)
