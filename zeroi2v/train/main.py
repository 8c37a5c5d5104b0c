"""Trains a video classifier: the whole run, from top to bottom.

    deepspeed train/main.py --config vit_b16_k400_8x16 [section.key=value …]
    torchrun --nproc_per_node 8 train/main.py --config …
    zeroi2v train --config …            (one process)

Everything it writes is in `run.dir`: `config.yaml`, `log.jsonl`, `tensorboard/`, `state/` (to
resume from), `last/` and `best/` (models), `bad_files.txt`, `eval.json`, `report.html`. Ctrl-C and
SIGTERM save and stop; `run.resume=true` goes on to the very weights an unbroken run reaches, and
`run.resume=auto` does so if there is a state, else begins. With `--dry-run` nothing is written:
the resolved config is printed, and what a run will take of memory and time.
"""

from __future__ import annotations

import argparse
import copy
import json
import signal
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

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
from zeroi2v.reparam import DTYPES
from zeroi2v.storage.checkpoint import save as save_folder
from zeroi2v.train.config import load_config
from zeroi2v.train.distributed import (
    StopSignals,
    add_up,
    end_children,
    end_processes,
    first_alone,
    gather,
    say,
    start_processes,
    together,
    told_once,
    wait_for_all,
)
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
from zeroi2v.train.log import RunLog, cut_log
from zeroi2v.train.prepare import Job, check_root, prepare, with_classes
from zeroi2v.train.report import write_report
from zeroi2v.train.state import load_state, save_state


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
        with told_once(), ExitStack() as keep:
            config = together(lambda: with_classes(load_config(args.config, args.overrides)))
            if args.dry_run:
                say(yaml.safe_dump(config.to_dict(), sort_keys=False))
            job = together(lambda: prepare(config, device, None if args.dry_run else keep))
            with StopSignals() as signals:
                status = estimate(job, signals) if args.dry_run else train(job, signals)
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


def train(job: Job, signals: StopSignals) -> int:
    """Runs `job` to its end, to a signal or to `run.max_steps`; returns the exit status."""
    config, optim, device = job.config, job.config.optim, job.device
    folder, is_first, started = Path(config.run.dir), dist.get_rank() == 0, time.time()
    steps_per_epoch = job.loader.steps_per_epoch
    total_steps = optim.epochs * steps_per_epoch
    last_step = min(total_steps, config.run.max_steps or total_steps)
    accumulation = optim.accumulation(dist.get_world_size())
    dtype = DTYPES[optim.precision]

    # What a resumed run must find unchanged, beside its config.
    frozen = {n: p for n, p in job.model.named_parameters() if not p.requires_grad}
    samples = "\n".join(repr(sample) for sample in job.samples)
    identity = {
        "model.backbone": checksum(frozen),
        "data.train_list": zlib.crc32(samples.encode()),
    }
    # Models are saved from an fp32 twin: the engine's weights may be bf16 and spread out.
    twin = copy.deepcopy(job.model) if is_first else None
    engine = build_engine(job.model, optim, steps_per_epoch)
    seed_dropout(config.run.seed)
    progress = Progress()
    if job.record is not None:
        together(lambda: check_identity(job.record["identity"], identity))
        together(lambda: load_state(engine, folder / "state", job.record))
        progress = Progress(**job.record["progress"])
        say(f"resumed     after step {progress.step}")
    log = None

    def begin() -> None:
        nonlocal log
        write_whole(folder / "config.yaml", yaml.safe_dump(config.to_dict(), sort_keys=False))
        cut_log(folder, progress.step, progress.validated)
        every, project = config.run.log_every, config.run.wandb
        log = RunLog(folder, steps_per_epoch, optim.epochs, every, project, config.to_dict())

    has_begun = job.record is not None
    if has_begun:
        first_alone(begin)

    def save() -> None:
        """Writes `last/`, and `state/` to resume from."""
        weights = trained_weights(engine)
        together(lambda: check_weights(weights, progress.step))
        first_alone(lambda: save_model(twin, weights, folder / "last"))
        record = {
            "step": progress.step,
            "validated": progress.validated,
            "world_size": dist.get_world_size(),
            "threads": torch.get_num_threads(),
            "identity": identity,
            "trained": checksum(weights),
            "progress": asdict(progress),
        }
        save_state(engine, folder / "state", record)

    def validate() -> int:
        """Measures accuracy; writes `eval.json`, and `best/` if it is the best so far.

        Returns 0, or the signal that cut it short; the state is saved already then.
        """
        parts = gather((predict(engine.module, job, dtype, signals), signals.received))
        if any(part is None for part, _ in parts):
            return max(received for _, received in parts)
        index, probs = (torch.cat(part) for part in zip(*(p for p, _ in parts), strict=True))
        labels = torch.tensor([sample.label for sample in job.val_samples])[index]
        report_bad_files("val", job.val_loader, job.val_samples)
        figures = together(lambda: metrics(probs, labels))
        progress.validated, progress.top1 = progress.step, figures["top1"]
        improved = progress.best_top1 is None or progress.top1 > progress.best_top1
        if improved:
            progress.best_top1, progress.best_step = progress.top1, progress.step
            weights = trained_weights(engine)
        best = {"best_step": progress.best_step, "best_top1": progress.best_top1}
        text = json.dumps({"step": progress.step, **best, **figures})

        def write() -> None:
            if improved:
                save_model(twin, weights, folder / "best", {"eval.json": text})
            log.validation(progress.step, **{k: figures[k] for k in ("top1", "top5", "mean_class")})
            write_whole(folder / "eval.json", text + "\n")

        first_alone(write)
        best = f"best {progress.best_top1:.2f} after step {progress.best_step}"
        say(f"validation  top-1 {progress.top1:.2f} % after step {progress.step} ({best})")
        return 0

    def report_bad_files(kind: str, loader: ClipLoader | ViewLoader, samples: list[Sample]) -> None:
        """Names each undecodable video, or part of one, once; too many of them end the run."""
        known, total = progress.bad_files[kind], len(samples)
        found = {name: reason for part in gather(loader.bad_files) for name, reason in part.items()}
        new = {name: reason for name, reason in found.items() if name not in known}
        if new:
            together(lambda: check_root(config.data))
        known |= new
        for number, reason in enumerate(new.values(), len(known) - len(new) + 1):
            say(f"bad file    {reason} ({kind}: {number} of {total} videos)")
        if new:
            lines = [f"{k}: {r}\n" for k, bad in progress.bad_files.items() for r in bad.values()]
            first_alone(lambda: write_whole(folder / "bad_files.txt", "".join(lines)))
        bad = {i: known[s.name] for i, s in enumerate(samples) if s.name in known}
        together(lambda: check_bad_files(bad, total, config.data.max_bad_fraction))

    saved_step, num_bad, stop = progress.step, 0, 0
    batches = micro_batches(job, progress.step, signals)
    while True:
        epoch, rest = divmod(progress.step, steps_per_epoch)
        done = progress.step >= last_step
        save_due = rest == 0 or progress.step % (config.run.save_every or total_steps) == 0
        if (save_due or done or stop) and saved_step != progress.step:
            save()
            saved_step = progress.step
        if stop:
            break
        val_due = progress.step == total_steps or (rest == 0 and epoch % config.run.val_every == 0)
        if job.val_loader is not None and val_due and progress.validated < progress.step:
            stop = validate()
            if stop:
                break
            save()
        if done:
            break

        begun, waited = time.perf_counter(), 0.0
        lr, losses = max(engine.get_lr()), []
        for number in range(1, accumulation + 1):
            if losses:
                engine.step()  # the weights stay as they are until the last forward pass
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            video = batch.video.squeeze(1).to(device, dtype, non_blocking=True)
            target = batch.target.to(device, non_blocking=True)
            logits = engine(video).float()
            loss = F.cross_entropy(logits, target, label_smoothing=optim.label_smoothing)
            losses.append(loss.detach())
            if number == accumulation:  # it is there before this backward pass has ended
                mean = read_later(torch.stack(losses).mean())
            engine.backward(loss)
        loss, stop, bad = share(mean(), signals, job.loader)
        if is_bad(loss):
            parts = [x.item() for x in losses]
            weights = trained_weights(engine)
            stop_diverged(engine.module, job, twin, weights, progress.step + 1, parts, dtype)
        if not has_begun:  # a start that fails before its first step leaves no run
            first_alone(begin)
            has_begun = True
        update(engine)
        progress.step += 1
        if bad != num_bad:
            report_bad_files("train", job.loader, job.samples)
            num_bad = bad
        if log is not None:
            seconds = time.perf_counter() - begun
            try:
                log.step(progress.step, optim.batch_size, loss=loss, lr=lr, seconds=seconds,
                         waited=waited)  # fmt: skip
            except OSError as error:
                raise OSError(f"{folder} can't be written ({error.strerror})") from None
    batches.close()
    engine.destroy()
    finished = progress.step == total_steps and not stop
    if not finished:
        say(f"stopped     after step {progress.step} of {total_steps}, saved: "
            "go on with the same command and run.resume=true")  # fmt: skip
    if is_first:
        log.close()
        if not stop:  # who sends a signal is in a hurry
            write_report(folder)
            say_result(progress, folder, finished)
        summary = {"steps": progress.step, "finished": finished, "top1": progress.top1,
                   "best_top1": progress.best_top1, "seconds": round(time.time() - started, 1),
                   "dir": str(folder)}  # fmt: skip
        print(json.dumps(summary), flush=True)
    return 128 + stop if stop else 0


def say_result(progress: Progress, folder: Path, finished: bool) -> None:
    """The end of a run in two lines for people: what came out, and what to do with it."""
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
    """`predict_views` of this process's part of the validation list; None if a signal came."""

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
    loader = job.loader
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
