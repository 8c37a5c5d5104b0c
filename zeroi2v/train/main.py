"""Trains a video classifier: the whole run, from top to bottom.

    deepspeed train/main.py --config vit_b16_k400_8x16 [section.key=value …]
    torchrun --nproc_per_node 8 train/main.py --config …
    zeroi2v train --config …            (one process)

Everything it writes is in `run.dir`: `config.yaml`, `log.jsonl`, `tensorboard/`, `state/` (to
resume from), `last/` and `best/` (models), `bad_files.txt`, `eval.json`, `report.html`. Ctrl-C and
SIGTERM save and stop; `run.resume=true` continues, and reaches the same weights as a run that was
never stopped; `run.resume=auto` does so if there is a state, and else begins. `--dry-run` writes
nothing: it prints the resolved config, and the memory and time that a run will take.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from zeroi2v.cli import run
from zeroi2v.data.annotations import Sample
from zeroi2v.data.pipeline import ClipLoader, check_bad_files
from zeroi2v.data.views import Batch, ViewLoader
from zeroi2v.extras import require
from zeroi2v.files import write_whole
from zeroi2v.inference import metrics, predict_views
from zeroi2v.model.vit import VideoViT
from zeroi2v.processes import (
    add_up,
    end_processes,
    first_alone,
    gather,
    together,
    told_once,
    wait_for_all,
)
from zeroi2v.reparam import DTYPES
from zeroi2v.storage.checkpoint import save as save_folder
from zeroi2v.train.config import load_config
from zeroi2v.train.distributed import StopSignals, end_children, say, start_processes
from zeroi2v.train.divergence import is_bad, stop_diverged
from zeroi2v.train.engine import (
    build_engine,
    checksum,
    read_later,
    seed_dropout,
    trained_weights,
    update,
)
from zeroi2v.train.estimate import estimate
from zeroi2v.train.fill import fill
from zeroi2v.train.log import RunLog, cut_log
from zeroi2v.train.prepare import Job, check_root, prepare, with_classes
from zeroi2v.train.report import write_report
from zeroi2v.train.state import load_state, save_state

LOST = "start it again with run.resume=auto"
"""What to do when one of several processes has died."""


def main(argv: list[str]) -> None:
    """Parses `argv` and trains. Raises ValueError or OSError on bad input, SystemExit on a stop."""
    parser = argparse.ArgumentParser(
        prog="zeroi2v train", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--config", required=True, help="name of a recipe, or YAML file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="parsed as YAML")
    parser.add_argument("--dry-run", action="store_true", help="check, measure a few steps, end")
    parser.add_argument("--local_rank", "--local-rank", help="set by launchers; not needed")
    args = parser.parse_intermixed_args(argv)
    require("training", "nvidia.dali", "deepspeed", "tensorboard", "jinja2", "psutil")
    device = start_processes()
    status = 0
    try:
        with told_once(LOST), ExitStack() as keep:
            config = together(lambda: with_classes(load_config(args.config, args.overrides)))
            if args.dry_run:
                say(yaml.safe_dump(config.to_dict(), sort_keys=False))
            job = together(lambda: prepare(config, device, None if args.dry_run else keep))
            with StopSignals(patience=1 if args.dry_run else 5) as signals:
                if args.dry_run:
                    status = estimate(job, signals)
                else:
                    status = fill(job, signals) or Trainer(job, signals).run()
                wait_for_all()
    finally:
        end_children()
        end_processes()
    if status:
        sys.exit(status)


@dataclass
class Progress:
    """How far a run has come; saved with its state."""

    step: int = 0
    """Optimizer steps done."""
    validated: int = 0
    """Step of the last validation."""
    top1: float | None = None
    """Its accuracy in percent."""
    best_top1: float | None = None
    """Accuracy of the model in `best/`."""
    best_step: int = 0
    """Step of the model in `best/`."""
    bad_files: dict[str, dict[str, str]] = field(default_factory=lambda: {"train": {}, "val": {}})
    """For "train" and "val": name -> reason of every sample that could not be decoded."""


class Trainer:
    """A run: `run()` takes steps, and saves and validates when it is time to.

    Every process has one, and all of them call each method at once.
    """

    def __init__(self, job: Job, signals: StopSignals):
        self.job, self.signals = job, signals
        self.config, self.optim = job.config, job.config.optim
        self.folder, self.started = Path(self.config.run.dir), time.time()
        self.is_first = dist.get_rank() == 0
        self.steps_per_epoch = job.loader.steps_per_epoch
        self.total_steps = self.optim.epochs * self.steps_per_epoch
        self.last_step = min(self.total_steps, self.config.run.max_steps or self.total_steps)
        self.accumulation = self.optim.accumulation(dist.get_world_size())
        self.dtype = DTYPES[self.optim.precision]
        # What a resumed run must find unchanged, beside its config.
        frozen = {n: p for n, p in job.model.named_parameters() if not p.requires_grad}
        samples = "\n".join(repr(sample) for sample in job.samples)
        self.identity = {
            "model.backbone": checksum(frozen),
            "data.train_list": zlib.crc32(samples.encode()),
        }
        # Models are saved from an fp32 twin: the engine's weights may be bf16 and spread out.
        self.twin = copy.deepcopy(job.model) if self.is_first else None
        self.engine = build_engine(job.model, self.optim, self.steps_per_epoch)
        seed_dropout(self.config.run.seed)
        self.progress, self.has_begun = Progress(), False
        self.num_bad = 0
        """Bad training files that have been reported, over all processes."""
        self.log: RunLog | None = None
        if job.record is not None:
            self._resume(job.record)

    def _resume(self, record: dict[str, Any]) -> None:
        together(lambda: check_identity(record["identity"], self.identity))
        together(lambda: load_state(self.engine, self.folder / "state", record))
        self.progress = Progress(**record["progress"])
        say(f"resumed     after step {self.progress.step}")
        self._begin()

    def _begin(self) -> None:
        """Writes the run folder, which a start that fails before its first step does not leave."""
        progress, run = self.progress, self.config.run

        def write() -> None:
            text = yaml.safe_dump(self.config.to_dict(), sort_keys=False)
            write_whole(self.folder / "config.yaml", text)
            cut_log(self.folder, progress.step, progress.validated)
            self.log = RunLog(
                self.folder, self.steps_per_epoch, self.optim.epochs, run.log_every, run.wandb,
                self.config.to_dict(),
            )  # fmt: skip

        first_alone(write)
        self.has_begun = True

    def run(self) -> int:
        """Trains to the end, to a signal or to `run.max_steps`; returns the exit status."""
        progress, run = self.progress, self.config.run
        saved_step, stop = progress.step, 0
        batches = micro_batches(self.job, progress.step, self.signals)
        while True:
            epoch, rest = divmod(progress.step, self.steps_per_epoch)
            done = progress.step >= self.last_step
            save_due = rest == 0 or progress.step % (run.save_every or self.total_steps) == 0
            if (save_due or done or stop) and saved_step != progress.step:
                self.save()
                saved_step = progress.step
            if stop:
                break
            at_end = progress.step == self.total_steps
            val_due = at_end or (rest == 0 and epoch % run.val_every == 0)
            if self.job.val_loader is not None and val_due and progress.validated < progress.step:
                stop = self.validate()
                if stop:
                    break
                self.save()
            if done:
                break
            stop = self.step(batches)
        batches.close()
        self.engine.destroy()
        self._finish(stop)
        return 128 + stop if stop else 0

    def step(self, batches: Iterator[Batch]) -> int:
        """One optimizer step, of `accumulation` micro-batches; returns the signal to stop at, or 0.

        Loss and signals are shared while the last backward pass runs. Raises ValueError, and keeps
        what is needed to see why, if the loss is not finite or has exploded.
        """
        engine, progress, job, begun = self.engine, self.progress, self.job, time.perf_counter()
        lr = max(engine.get_lr())
        losses, mean, waited = self.forward_backward(batches)
        loss, stop, num_bad = share(mean(), self.signals, job.loader)
        if is_bad(loss):
            parts, weights = [x.item() for x in losses], trained_weights(engine)
            at = progress.step + 1
            stop_diverged(engine.module, job, self.twin, weights, at, parts, self.dtype)
        if not self.has_begun:
            self._begin()
        update(engine)
        progress.step += 1
        if num_bad != self.num_bad:
            self.report_bad_files("train", job.loader, job.samples)
            self.num_bad = num_bad
        if self.log is not None:
            seconds = time.perf_counter() - begun
            try:
                self.log.step(progress.step, self.optim.batch_size, loss=loss, lr=lr,
                              seconds=seconds, waited=waited)  # fmt: skip
            except OSError as error:
                raise OSError(f"{self.folder} can't be written ({error.strerror})") from None
        return stop

    def forward_backward(
        self, batches: Iterator[Batch]
    ) -> tuple[list[Tensor], Callable[[], float], float]:
        """The forward and backward passes of a step.

        Returns the losses of its micro-batches, a function that waits for their mean, and the
        seconds that were spent waiting for data.
        """
        engine, losses, waited = self.engine, [], 0.0
        for number in range(1, self.accumulation + 1):
            if losses:
                engine.step()  # the weights stay as they are until the last forward pass
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            video = batch.video.squeeze(1).to(self.job.device, self.dtype, non_blocking=True)
            target = batch.target.to(self.job.device, non_blocking=True)
            logits = engine(video, is_tokens=self.job.tokens is not None).float()
            loss = F.cross_entropy(logits, target, label_smoothing=self.optim.label_smoothing)
            losses.append(loss.detach())
            if number == self.accumulation:  # it is there before this backward pass has ended
                mean = read_later(torch.stack(losses).mean())
            engine.backward(loss)
        return losses, mean, waited

    def save(self) -> None:
        """Writes `last/`, and `state/` to resume from."""
        weights, progress = trained_weights(self.engine), self.progress
        together(lambda: check_weights(weights, progress.step))
        first_alone(lambda: save_model(self.twin, weights, self.folder / "last"))
        record = {
            "step": progress.step,
            "validated": progress.validated,
            "world_size": dist.get_world_size(),
            "threads": torch.get_num_threads(),
            "identity": self.identity,
            "trained": checksum(weights),
            "progress": asdict(progress),
        }
        save_state(self.engine, self.folder / "state", record)

    def validate(self) -> int:
        """Measures accuracy; writes `eval.json`, and `best/` if it is the best so far.

        Returns 0, or the signal that cut it short; the state is saved already then.
        """
        job, progress = self.job, self.progress
        probs = predict(self.engine.module, job, self.dtype, self.signals)
        parts = gather((probs, self.signals.received))
        if any(part is None for part, _ in parts):
            return max(received for _, received in parts)
        index, probs = (torch.cat(part) for part in zip(*(p for p, _ in parts), strict=True))
        labels = torch.tensor([sample.label for sample in job.val_samples])[index]
        self.report_bad_files("val", job.val_loader, job.val_samples)
        figures = together(lambda: metrics(probs, labels))
        progress.validated, progress.top1 = progress.step, figures["top1"]
        improved = progress.best_top1 is None or progress.top1 > progress.best_top1
        if improved:
            progress.best_top1, progress.best_step = progress.top1, progress.step
            weights = trained_weights(self.engine)
        best = {"best_step": progress.best_step, "best_top1": progress.best_top1}
        text = json.dumps({"step": progress.step, **best, **figures})

        def write() -> None:
            if improved:
                save_model(self.twin, weights, self.folder / "best", {"eval.json": text})
            shown = {k: figures[k] for k in ("loss", "top1", "top5", "mean_class")}
            self.log.validation(progress.step, **shown)
            write_whole(self.folder / "eval.json", text + "\n")

        first_alone(write)
        best = f"best {progress.best_top1:.2f} after step {progress.best_step}"
        say(f"validation  top-1 {progress.top1:.2f} % after step {progress.step} ({best})")
        return 0

    def report_bad_files(
        self, kind: str, loader: ClipLoader | ViewLoader, samples: list[Sample]
    ) -> None:
        """Names each undecodable video, or part of one, once; too many of them end the run."""
        data, known, total = self.config.data, self.progress.bad_files[kind], len(samples)
        found = {name: reason for part in gather(loader.bad_files) for name, reason in part.items()}
        new = {name: reason for name, reason in found.items() if name not in known}
        if new:
            together(lambda: check_root(data))
        known |= new
        for number, reason in enumerate(new.values(), len(known) - len(new) + 1):
            say(f"bad file    {reason} ({kind}: {number} of {total} videos)")
        if new:
            by_kind = self.progress.bad_files.items()
            lines = [f"{k}: {reason}\n" for k, bad in by_kind for reason in bad.values()]
            first_alone(lambda: write_whole(self.folder / "bad_files.txt", "".join(lines)))
        bad = {i: known[s.name] for i, s in enumerate(samples) if s.name in known}
        together(lambda: check_bad_files(bad, total, data.max_bad_fraction))

    def _finish(self, stop: int) -> None:
        """Says how the run ended, in words and, last, as a line of JSON; writes the report."""
        progress = self.progress
        finished = progress.step == self.total_steps and not stop
        if not finished:
            say(f"stopped     after step {progress.step} of {self.total_steps}, saved: "
                "continue with the same command and run.resume=true")  # fmt: skip
        if not self.is_first:
            return
        self.log.close()
        if not stop:  # who sends a signal is in a hurry
            write_report(self.folder)
            say_result(progress, self.folder, finished)
        summary = {
            "steps": progress.step,
            "finished": finished,
            "top1": progress.top1,
            "best_top1": progress.best_top1,
            "seconds": round(time.time() - self.started, 1),
            "dir": str(self.folder),
        }
        print(json.dumps(summary), flush=True)


def say_result(progress: Progress, folder: Path, finished: bool) -> None:
    """Ends a run with two lines for people: the result, and what to do with it."""
    result = f"{progress.step} steps"
    if progress.top1 is not None:
        result += f", top-1 {progress.top1:.2f} % (best {progress.best_top1:.2f} %)"
    print(f"result      {result}; report: {folder / 'report.html'}")
    if finished:
        print(f"next        zeroi2v reparam {folder} --out {folder / 'merged'}")


def share(loss: float, signals: StopSignals, loader: ClipLoader) -> tuple[float, int, int]:
    """Mean loss, signal to stop at (or 0) and number of bad files, over all processes."""
    received = [signals.received == number for number in (signal.SIGINT, signal.SIGTERM)]
    total, interrupted, terminated, bad = add_up([loss, *received, len(loader.bad_files)])
    stop = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
    return total / dist.get_world_size(), int(stop), int(bad)


def predict(
    model: nn.Module, job: Job, dtype: torch.dtype, signals: StopSignals
) -> tuple[Tensor, Tensor] | None:
    """`predict_views` of this process's part of the validation list; None if a signal came.

    Op by op: threads of DALI's that wait for training's next batches may synchronise the GPU, which
    would end the capture of a CUDA graph.
    """

    def progress(count: int) -> None:
        bar.update(count * dist.get_world_size())
        if signals.received:
            raise InterruptedError

    with tqdm(total=len(job.val_samples), desc="validation", disable=None, leave=False) as bar:
        try:
            with signals.not_for_children():
                return predict_views(model, job.val_loader, job.device, dtype, progress)
        except InterruptedError:
            return None


def micro_batches(job: Job, step: int, signals: StopSignals) -> Iterator[Batch]:
    """The training batches from optimizer step `step` on, epoch after epoch."""
    loader = job.tokens or job.loader
    while True:
        epoch, start = divmod(step, loader.steps_per_epoch)
        batches = loader.epoch(epoch, start_step=start)
        while True:
            try:
                with signals.not_for_children():
                    batch = next(batches, None)
            except ValueError:
                check_root(job.config.data)
                raise
            if batch is None:
                break
            yield batch
        step = (epoch + 1) * loader.steps_per_epoch


def save_model(
    twin: VideoViT, weights: dict[str, Tensor], folder: Path, files: dict[str, str] | None = None
) -> None:
    """Saves `twin` with the trained `weights` in it as a native folder, with text `files` in it."""
    twin.load_state_dict(weights, strict=False)
    save_folder(twin, folder, files)


def check_identity(saved: dict[str, int], now: dict[str, int]) -> None:
    """Raises ValueError that names what is no longer as it was when the run was saved."""
    for key, value in saved.items():
        if now[key] != value:
            raise ValueError(f"{key} must be what the saved run used: its content has changed")


def check_weights(weights: dict[str, Tensor], step: int) -> None:
    """Raises ValueError that names the first trained weight that is not finite any more."""
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"trained weights must be finite: {name} is not after step {step}, which is not "
                "saved; try a lower optim.lr or optim.clip_grad"
            )


if __name__ == "__main__":
    sys.exit(run(main))
