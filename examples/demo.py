"""The whole job in minutes on two CPU cores: `make demo`, or `python examples/demo.py`.

Makes videos of moving shapes whose class is the direction, which no single frame shows
(`moving_shapes.py`); trains a small image ViT on single frames to name the shape; adapts it to
video with `train/main.py`, once in full and twice with a part left out; evaluates, merges,
evaluates again, classifies a file. All goes to `demo/`; the results are in `demo/report/`. Exit
status 0 means that every claim at the end of the report is true.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import demo_report
import numpy as np
import torch
import torch.nn.functional as F
from moving_shapes import DIRECTIONS, SHAPES, single_frames, write_videos

from zeroi2v.cli import run
from zeroi2v.config import ModelConfig
from zeroi2v.model.vit import VideoViT
from zeroi2v.train.config import load_config

ROOT = Path(__file__).resolve().parents[1]
CONFIG = "demo"
DEMO = Path("demo")
TRAIN_VIDEOS, VAL_VIDEOS = 1600, 400
IMAGE_STEPS, IMAGE_BATCH = 500, 64

# What each training run changes in the config. The first two can't learn the direction however
# long they train, and are stopped early; with shifted heads the loss falls within 4 epochs.
RUNS = {
    "head": ["model.adapter=null", "model.head_offsets=[0,0,0,0]", "optim.epochs=4"],
    "no_offsets": ["model.head_offsets=[0,0,0,0]", "optim.epochs=12"],
    "stdha": [],
}
STEPS = 9


def main(argv: list[str]) -> None:
    """Runs the demo. Raises ValueError if a step fails or a claim is false."""
    parser = argparse.ArgumentParser(
        prog="examples/demo.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of videos and weights (default: 0)")
    args = parser.parse_args(argv)
    os.chdir(ROOT)
    console = Console()
    print(f"{STEPS} steps, about 4 minutes on two idle CPU cores. Everything goes to {DEMO}/.")
    for part in ("videos", "cache", "image_model", "runs", "merged", "eval", "logs", "report"):
        shutil.rmtree(DEMO / part, ignore_errors=True)
    (DEMO / "logs").mkdir(parents=True)

    console.step(f"make {TRAIN_VIDEOS} + {VAL_VIDEOS} videos of moving shapes")
    write_videos(DEMO / "videos", "train", TRAIN_VIDEOS, seed=1000 + args.seed)
    write_videos(DEMO / "videos", "val", VAL_VIDEOS, seed=2000 + args.seed)
    (DEMO / "videos" / "labels.txt").write_text("\n".join(DIRECTIONS) + "\n", encoding="utf-8")

    console.step("train an image model to name the shape in a single frame")
    figures: dict[str, Any] = {"shape_top1": train_image_model(DEMO / "image_model", args.seed)}

    for name, overrides in RUNS.items():
        console.step(f"train on the videos: {demo_report.NAMES[name]}")
        where = [f"run.dir={DEMO}/runs/{name}", f"run.seed={args.seed}"]
        command = [*launcher(), "train/main.py", "--config", CONFIG, *where, *overrides]
        console.run(f"train_{name}", command)

    console.step("evaluate each, 3 clips a video")
    for name in RUNS:
        figures[name] = evaluate(console, name, f"{DEMO}/runs/{name}")

    console.step("merge the adapters into the weights, verify, evaluate again")
    lists = ["--clips", f"{DEMO}/videos/val.txt"]
    console.run(
        "reparam", module("reparam", f"{DEMO}/runs/stdha", "--out", f"{DEMO}/merged", *lists)
    )
    figures["merged"] = evaluate(console, "merged", f"{DEMO}/merged")
    merge = json.loads((DEMO / "merged" / "merge_report.json").read_text(encoding="utf-8"))
    figures["merge_rel"] = {check["dtype"]: check["rel"] for check in merge["checks"]}
    figures["agreement"] = agreement()

    console.step("classify one file, and draw where the heads look")
    video = f"{DEMO}/videos/val/0002.mp4"
    figures["prediction"] = console.run("predict", module("predict", f"{DEMO}/merged", video))
    words = [video, "--layers", "0", "--out", f"{DEMO}/report/heads"]
    console.run("visualize", module("visualize", f"{DEMO}/merged", *words))

    console.step("time the merged model beside the plain image ViT, write the report")
    figures["speed"] = speed()
    figures["seconds"] = time.perf_counter() - console.started
    claims = demo_report.write(DEMO, figures)
    print(f"\n{demo_report.table(figures)}\n\n{demo_report.speed_note(figures)}\n")
    for claim, holds in claims.items():
        print(f"{'yes' if holds else 'NO '}  {claim}")
    print(f"\n{figures['seconds']:.0f} s in all. Report: {DEMO}/report/report.md")
    if not all(claims.values()):
        raise ValueError(f"every claim must hold: {list(claims.values()).count(False)} do not")


class Console:
    """Says what is going on, and runs commands."""

    def __init__(self):
        self.started = time.perf_counter()
        self.number = 0

    def step(self, text: str) -> None:
        """Announces the next step."""
        self.number += 1
        seconds = time.perf_counter() - self.started
        print(f"\n[{self.number}/{STEPS}, {seconds:3.0f} s] {text}", flush=True)

    def run(self, name: str, command: list[str]) -> str:
        """Runs `command`, showing its output; all of it is kept in `demo/logs/<name>.log`.

        Returns what was shown. Raises ValueError if the command fails.
        """
        shown = [Path(command[0]).name, *command[1:]]
        print(f"    $ {shlex.join(shown)}", flush=True)
        lines = []
        log = DEMO / "logs" / f"{name}.log"
        with (
            open(log, "w", encoding="utf-8") as file,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process,
        ):
            for line in process.stdout:
                file.write(line)
                if line.strip() and not line.startswith("["):  # DeepSpeed's own log lines
                    lines.append(line)
                    print(f"    {line}", end="", flush=True)
        if process.returncode:
            raise ValueError(f"command must succeed: {name} ended with {process.returncode}: {log}")
        return "".join(lines)


def launcher() -> list[str]:
    """`deepspeed` for one process on each of two cores, or on a GPU."""
    script = Path(sys.executable).with_name("deepspeed")
    if not script.is_file():
        raise ValueError(f"deepspeed must be installed beside {sys.executable}")
    cores = len(os.sched_getaffinity(0))
    processes = 1 if torch.cuda.is_available() else min(2, cores)
    # More threads than cores would wait for each other most of the time.
    os.environ["OMP_NUM_THREADS"] = str(max(1, min(2, cores) // processes))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [str(script), "--num_accelerators", str(processes), "--master_port", str(port)]


def module(name: str, *words: str) -> list[str]:
    """The command `python -m zeroi2v.<name> …`."""
    return [sys.executable, "-m", f"zeroi2v.{name}", *words]


def evaluate(console: Console, name: str, model: str) -> float:
    """Validation accuracy of the model in folder `model`, in percent."""
    out = DEMO / "eval" / f"{name}.json"
    data = ["--list", f"{DEMO}/videos/val.txt", "--root", f"{DEMO}/videos"]
    words = [*data, "--batch-size", "32", "--out", str(out)]
    console.run(f"evaluate_{name}", module("evaluate", model, *words))
    return json.loads(out.read_text(encoding="utf-8"))["top1"]


def agreement() -> float:
    """Percent of the validation videos whose predicted class is the same after merging."""
    predicted = []
    for name in ("stdha", "merged"):
        lines = (DEMO / "eval" / f"{name}_predictions.jsonl").read_text(encoding="utf-8")
        predicted.append([json.loads(line)["predicted"] for line in lines.splitlines()])
    return 100 * float(np.mean(np.array(predicted[0]) == np.array(predicted[1])))


def image_config() -> ModelConfig:
    """The video model's image ViT: one frame, no shifted heads, no adapters."""
    video = load_config(CONFIG).model.video
    return replace(
        video,
        num_frames=1,
        head_offsets=(0,) * video.num_heads,
        adapter=None,
        num_classes=len(SHAPES),
        labels=SHAPES,
    )


def train_image_model(folder: Path, seed: int) -> float:
    """Trains an image ViT in plain PyTorch, saves it to `folder`; returns its accuracy in percent.

    It sees single frames and the names of their shapes, never a direction.
    """
    config = image_config()
    torch.manual_seed(seed)
    torch.set_num_threads(1)  # layers this small gain little from a second, and lose much if busy
    model = VideoViT(config)
    mean = torch.tensor(config.preprocess.mean).view(3, 1, 1, 1)
    std = torch.tensor(config.preprocess.std).view(3, 1, 1, 1)

    def batch(images: np.ndarray) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> [B, 3, 1, H, W]."""
        return (torch.from_numpy(images).permute(0, 3, 1, 2).unsqueeze(2).float() - mean) / std

    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=2e-3, total_steps=IMAGE_STEPS, pct_start=0.1
    )
    images, shapes = single_frames(IMAGE_STEPS * IMAGE_BATCH, seed=3000 + seed)
    for step in range(IMAGE_STEPS):
        rows = slice(step * IMAGE_BATCH, (step + 1) * IMAGE_BATCH)
        loss = F.cross_entropy(model(batch(images[rows])), torch.from_numpy(shapes[rows]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"    step {step + 1}/{IMAGE_STEPS} | loss {loss.item():.3f}", flush=True)
    images, shapes = single_frames(1000, seed=4000 + seed)
    model.eval()
    with torch.no_grad():
        top1 = 100 * np.mean(model(batch(images)).argmax(-1).numpy() == shapes)
    model.save_pretrained(folder)
    print(f"    names {top1:.1f} % of the shapes in new frames; saved to {folder}", flush=True)
    return float(top1)


def speed(clips: int = 16, rounds: int = 60) -> dict[str, float]:
    """Times the merged model on clips, and the plain image ViT on the same frames, in turn.

    Returns the medians over the rounds: `merged` and `image` in ms a clip, and `ratio`, of the
    two times of the same round.
    """
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    merged, image = (VideoViT.from_pretrained(DEMO / p) for p in ("merged", "image_model"))
    config = merged.config
    shape = (clips, 3, config.num_frames, config.image_size, config.image_size)
    video = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    frames = video.transpose(1, 2).flatten(0, 1).unsqueeze(2).contiguous()  # [clips * T, 3, 1, …]
    work = [(merged, video), (image, frames)]
    times: list[list[float]] = [[], []]
    with torch.inference_mode():
        for number in range(rounds + 5):  # the first 5 warm up
            for which in (0, 1) if number % 2 else (1, 0):
                model, data = work[which]
                begun = time.perf_counter()
                model(data)
                times[which].append(1000 * (time.perf_counter() - begun) / clips)
    ours, theirs = (column[5:] for column in times)
    return {
        "merged": statistics.median(ours),
        "image": statistics.median(theirs),
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
    }


if __name__ == "__main__":
    sys.exit(run(main))
