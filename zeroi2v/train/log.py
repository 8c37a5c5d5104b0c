"""What a run reports: lines and a bar, `log.jsonl`, TensorBoard, W&B and plots."""

from __future__ import annotations

import json
import resource
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from zeroi2v.drawing.figures import headless_pyplot, save_figure
from zeroi2v.files import write_whole


class RunLog:
    """Records every step in `log.jsonl`, and every `every` steps on the terminal and TensorBoard.

    Only rank 0 has one. A line of the file contains `step` (optimizer steps done) and `epoch`, and
    either `loss`, `lr`, `seconds`, `waited` and `clips_per_s` of that step or `val_*` after it. On
    a terminal a bar below the lines counts the steps. With `project`, what TensorBoard gets goes to
    that project of Weights & Biases as well, and `config` once.
    """

    def __init__(
        self,
        folder: Path,
        steps_per_epoch: int,
        epochs: int,
        every: int,
        project: str | None = None,
        config: dict[str, Any] | None = None,
    ):
        from torch.utils.tensorboard import SummaryWriter

        lines = read_log(folder)
        last = lines[-1]["step"] if lines else 0
        self._file = open(folder / "log.jsonl", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=last + 1)
        self._wandb = None if project is None else start_wandb(folder, project, config)
        self._steps_per_epoch, self._epochs, self._every = steps_per_epoch, epochs, every
        self._bar = tqdm(
            total=epochs * steps_per_epoch,
            initial=last,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            disable=None,  # where there is no terminal
        )
        self._window: list[dict[str, float]] = []
        self._started = self._hinted = False

    def step(self, step: int, clips: int, **figures: float) -> None:
        """Records optimizer step `step` (from 1) of `clips` clips.

        `figures`: loss, lr, seconds it took and how many of them it waited for data.
        """
        figures["clips_per_s"] = clips / figures["seconds"]
        self._write({"step": step, "epoch": round(step / self._steps_per_epoch, 4), **figures})
        self._window.append(figures)
        self._bar.set_postfix_str(f"loss {figures['loss']:.4f}", refresh=False)
        self._bar.update(1)
        if step % self._every and step % self._steps_per_epoch:
            return
        total = {k: sum(line[k] for line in self._window) for k in ("loss", "seconds", "waited")}
        count = len(self._window)
        speed = count * clips / total["seconds"]
        loss = total["loss"] / count
        steps = self._epochs * self._steps_per_epoch
        left = timedelta(seconds=round(total["seconds"] / count * (steps - step)))
        show(
            f"epoch {-(-step // self._steps_per_epoch)}/{self._epochs} | step {step}/{steps} | "
            f"loss {loss:.4f} | lr {figures['lr']:.1e} | "
            f"{speed:.{1 if speed >= 1 else 4}f} clips/s | "
            f"data {total['waited'] / total['seconds']:.0%} | mem {_memory():.1f} GB | eta {left}"
        )
        if self._started and not self._hinted and total["waited"] > 0.1 * total["seconds"]:
            show(
                "hint        over 10 % of the time is spent waiting for data: raise data.workers, "
                "store videos at a short side near 256, or set data.cache if the disk has space"
            )
            self._hinted = True
        self._started = True  # the steps before this line waited for the workers to start
        self._publish(
            step, {"train/loss": loss, "train/lr": figures["lr"], "train/clips_per_s": speed}
        )
        self._window = []

    def validation(self, step: int, **figures: float | None) -> None:
        """Records the loss and the accuracy in percent after `step`: top1, top5, mean_class."""
        figures = {f"val_{k}": v for k, v in figures.items() if v is not None}
        self._write({"step": step, "epoch": round(step / self._steps_per_epoch, 4), **figures})
        self._publish(step, {k.replace("_", "/", 1): v for k, v in figures.items()})

    def close(self) -> None:
        """Flushes and closes the files, and takes away the bar."""
        self._bar.close()
        self._file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")

    def _publish(self, step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(figures, step=step)


def show(text: str) -> None:
    """Prints a whole line, above the bars there may be."""
    with tqdm.external_write_mode():
        print(text, flush=True)


def start_wandb(folder: Path, project: str, config: dict[str, Any] | None) -> Any:
    """The W&B run of run folder `folder`: a new one, or the one that the folder already has. W&B
    leaves out steps that a resumed run repeats. `WANDB_MODE=offline` is obeyed by `wandb`. Raises
    ValueError if W&B can't be begun, for want of a key or of the network.
    """
    import wandb

    path = folder / "wandb_id.txt"
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:12] + "\n")
    try:
        return wandb.init(
            project=project,
            id=path.read_text(encoding="utf-8").strip(),
            name=folder.name,
            dir=str(folder),
            config=config,
            resume="allow",
        )
    except wandb.Error as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"run.wandb can't start: {reason}") from None


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of `log.jsonl`; one that a kill cut short is left out."""
    path = folder / "log.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def cut_log(folder: Path, step: int, validated: int) -> None:
    """Takes out of `log.jsonl` what a resumed run will do again: steps after `step` and so on."""
    kept = [
        json.dumps(line)
        for line in read_log(folder)
        if line["step"] <= (step if "loss" in line else validated)
    ]
    write_whole(folder / "log.jsonl", "".join(line + "\n" for line in kept))


# File, title and lines (key in log.jsonl, label) of each plot.
PLOTS = (
    ("loss", "loss", (("loss", "training, each step"), ("val_loss", "validation"))),
    ("accuracy", "validation accuracy, %", (
        ("val_top1", "top-1"), ("val_top5", "top-5"), ("val_mean_class", "mean over classes"))),
    ("lr", "learning rate of the head", (("lr", "learning rate"),)),
    ("throughput", "training speed, clips/s", (("clips_per_s", "each step"),)),
)  # fmt: skip


def draw_plots(folder: Path) -> None:
    """Draws loss, accuracy, learning rate and speed over epochs to `plots/*.png`."""
    pyplot, log = headless_pyplot(), read_log(folder)
    (folder / "plots").mkdir(exist_ok=True)
    for name, title, curves in PLOTS:
        figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
        for key, label in curves:
            x, y = ([line[k] for line in log if key in line] for k in ("epoch", key))
            if not x:
                continue
            marker = "o" if key.startswith("val_") else ""
            width = len(y) // 20
            if marker or width < 3 or name == "lr":
                axes.plot(x, y, marker=marker, markersize=3, label=label)
            else:
                axes.plot(x, y, color="lightgray", label=label)
                mean = np.convolve(y, np.ones(width) / width, "valid")
                axes.plot(x[width - 1 :], mean, label=f"mean of {width} steps")
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        save_figure(figure, folder / "plots" / f"{name}.png")


def _memory() -> float:
    """Peak memory of this process in GB: of the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
