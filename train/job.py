"""What happens before a run starts: all its input is read and checked, its parts are made."""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from train.config import DataConfig, OptimConfig, RunConfig, differences, load_config
from train.processes import cores_per_process, first_alone, say, together
from train.state import clear_leftovers, lock_folder, read_record, read_tag
from zeroi2v.checkpoint import load_backbone
from zeroi2v.data.annotations import Sample, class_names, read_list
from zeroi2v.data.manifest import use_manifest
from zeroi2v.data.pipeline import ClipLoader, check_bad_files
from zeroi2v.model import Block, VideoViT


@dataclass
class Job:
    """A run whose input has been checked, ready to start."""

    config: RunConfig
    device: torch.device
    model: VideoViT
    loader: ClipLoader
    val_loader: ClipLoader | None
    samples: list[Sample]
    val_samples: list[Sample]
    record: dict[str, Any] | None
    """Of the state to resume from; None for a new run."""


def prepare(config: RunConfig, device: torch.device, keep: ExitStack | None) -> Job:
    """Checks all input before work starts, and says what is decided from it.

    The run folder is made and taken last, until `keep` is closed; for a dry run, without `keep`, it
    is left alone.
    """
    data, optim = config.data, config.optim
    check_device(optim, device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    accumulation = optim.accumulation(world_size)
    read = partial(
        read_list, num_classes=config.model.num_classes, filename_tmpl=data.filename_tmpl
    )
    samples, known_bad = read(data.train_list, data.root), {}
    if data.manifest is not None:
        samples, known_bad = use_manifest(samples, data.manifest, data.root)
        check_bad_files(known_bad, len(samples), data.max_bad_fraction)
        samples = [sample for sample in samples if sample.path not in known_bad]
    if data.shots is not None:
        samples = draw_shots(samples, data.shots, config.model.num_classes, config.run.seed)
    val_samples = []
    if data.val_list is not None:
        val_root = data.root if data.val_root is None else data.val_root
        val_samples = read(data.val_list, val_root)
        if data.manifest is not None:
            val_samples, _ = use_manifest(val_samples, data.manifest, val_root, of_this_list=False)
    if config.run.wandb is not None and find_spec("wandb") is None:
        raise ValueError("run.wandb needs the package wandb: pip install wandb")
    video = replace(config.model.video, labels=class_labels(config))
    workers = default_workers(device) if data.workers is None else data.workers
    common = dict(
        batch_size=optim.clips_at_once(world_size),
        rank=rank,
        world_size=world_size,
        workers=workers,
        device=str(device),
        seed=config.run.seed,
        timeout=data.timeout,
        cache=data.cache,
        decoder=data.decoder,
    )
    loader = ClipLoader(
        samples, video, mode="train", augment=config.augment, accumulation=accumulation, **common
    )
    # Validated on the very pixels that `evaluate` sees, which knows of no manifest.
    common["decoder"] = "pyav"
    val_loader = ClipLoader(val_samples, video, mode="val", **common) if val_samples else None
    torch.manual_seed(config.run.seed)
    model = VideoViT(video)
    if config.model.backbone is not None:
        for note in load_backbone(model, config.model.backbone):
            say(f"backbone    {note}")
    model.origins = {"training.json": json.dumps(provenance(config, samples, val_samples))}
    model.freeze()
    record = None if keep is None else enter_run_dir(config, keep)
    if record is not None:
        torch.set_num_threads(record["threads"])  # sums over other parts round differently
    model.set_memory(optim.memory)
    if optim.zero_stage == 3:
        gather_blocks_whole(model)

    steps = optim.epochs * loader.steps_per_epoch
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    say(f"backbone    {config.model.backbone or 'NONE: random weights (model.backbone is null)'}")
    say(f"parameters  {trainable:,} trained, {total - trainable:,} frozen")
    left_out = f" ({len(known_bad)} bad ones left out)" if known_bad else ""
    say(f"videos      {len(samples)} to train on{left_out}, {len(val_samples)} to validate on")
    say(
        f"batch       {optim.batch_size} clips = {optim.clips_at_once(world_size)} x {world_size} "
        f"processes x {accumulation} accumulated"
    )
    say(
        f"schedule    {steps} steps = {optim.epochs} epochs x {loader.steps_per_epoch}, "
        f"warm-up {round(optim.warmup_epochs * loader.steps_per_epoch)}, peak lr {optim.peak_lr:g}"
        + (f" (scaled from a batch of {optim.lr_batch})" if optim.lr_batch else "")
    )
    say(
        f"machine     {device.type}, {optim.precision}, ZeRO stage {optim.zero_stage}, "
        f"{torch.get_num_threads()} threads and {workers} decoding workers for each process"
    )
    say(f"decoder     {loader.decoder}")
    return Job(config, device, model, loader, val_loader, samples, val_samples, record)


def provenance(
    config: RunConfig, samples: list[Sample], val_samples: list[Sample]
) -> dict[str, Any]:
    """What a model's card tells about its training; files by name alone."""
    optim, lists = config.optim, (config.data.train_list, config.data.val_list)
    train_list, val_list = (Path(name or "none").name for name in lists)
    return {
        "recipe": config.model.recipe or "none",
        "backbone": Path(config.model.backbone or "random weights").name,
        "data": f"{train_list}, {len(samples)} videos",
        "validation": f"{val_list}, {len(val_samples)} videos",
        "schedule": f"{optim.epochs} epochs of {optim.batch_size} clips a step, lr {optim.lr:g}",
        "precision": optim.precision,
        "seed": config.run.seed,
    }


def check_device(optim: OptimConfig, device: torch.device) -> None:
    """Raises ValueError for what DeepSpeed can't do on the CPU; sets how a GPU multiplies."""
    if device.type == "cpu":
        if optim.precision == "fp16":
            raise ValueError("optim.precision fp16 needs a GPU: got the CPU; take bf16 or fp32")
        if optim.offload:
            raise ValueError("optim.offload needs a GPU: got the CPU, which has nothing to unload")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = optim.tf32


def draw_shots(samples: list[Sample], shots: int, num_classes: int, seed: int) -> list[Sample]:
    """`shots` samples of each class, in their order; the same ones for the same seed.

    A class has its own generator, so that its draw does not depend on the other classes. Raises
    ValueError that names the classes that have fewer.
    """
    rows: list[list[int]] = [[] for _ in range(num_classes)]
    for row, sample in enumerate(samples):
        rows[sample.label].append(row)
    few = {label: len(own) for label, own in enumerate(rows) if len(own) < shots}
    if few:
        some = ", ".join(f"{count} of class {label}" for label, count in list(few.items())[:3])
        more = f" and {len(few) - 3} more classes" if len(few) > 3 else ""
        raise ValueError(f"data.shots must be had in every class: got {shots} for {some}{more}")
    drawn = [
        np.random.default_rng((seed, label)).choice(own, shots, replace=False)
        for label, own in enumerate(rows)
    ]
    return [samples[row] for row in sorted(np.concatenate(drawn))]


def gather_blocks_whole(model: VideoViT) -> None:
    """Makes ZeRO stage 3 gather a block's weights all at once, since so the block uses them."""
    from deepspeed.utils import set_z3_leaf_modules

    set_z3_leaf_modules(model, [Block])


def enter_run_dir(config: RunConfig, keep: ExitStack) -> dict[str, Any] | None:
    """Makes `run.dir`, takes it until `keep` is closed; the record of the state to resume, if any.

    All processes must call it at once. Raises as `check_run_dir` and `lock_folder`, and OSError if
    the folder can't be written to.
    """
    folder, world_size = Path(config.run.dir), dist.get_world_size()
    check_run_dir(config, world_size)

    def take() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise OSError(f"run.dir must be writable: got {folder} ({error.strerror})") from None
        keep.enter_context(lock_folder(folder))
        clear_leftovers(folder)

    first_alone(take)
    # Once more, now that nobody else writes there.
    return together(lambda: check_run_dir(config, world_size))


def check_run_dir(config: RunConfig, world_size: int) -> dict[str, Any] | None:
    """The record of the state to resume, if any. Raises ValueError if the run can't be there."""
    folder, record = Path(config.run.dir), None
    resume = config.run.resume
    if resume == "auto":
        resume = read_tag(folder / "state") is not None
        if not resume and (folder / "best").exists():  # never made before a state
            raise ValueError(f"run.resume=auto needs the state of a run that has one: got {folder}")
    if resume:
        record = read_record(folder / "state")
        changed = differences(load_config(folder / "config.yaml"), config)
        if changed:
            raise ValueError(f"run.resume needs the config of {folder}: got {'; '.join(changed)}")
        if record["world_size"] != world_size:
            raise ValueError(
                f"run.resume needs as many processes as {folder}, {record['world_size']}: "
                f"got {world_size}"
            )
    elif not config.run.resume and any(
        (folder / name).exists() for name in ("config.yaml", "state", "log.jsonl")
    ):
        raise ValueError(
            f"run.dir must hold no run, unless run.resume is true or auto: got {folder}"
        )
    return record


def check_root(data: DataConfig) -> None:
    """Raises OSError if the videos' folder has vanished, or what was mounted there."""
    for key, root in (("data.root", data.root), ("data.val_root", data.val_root)):
        if root is not None and not (Path(root).is_dir() and any(Path(root).iterdir())):
            raise OSError(f"{key} must hold the videos: {root} is empty or gone")


def class_labels(config: RunConfig) -> tuple[str, ...]:
    """Names of the classes: of the model's config, of a file, of the list itself, or none."""
    if config.model.labels:
        return config.model.labels
    if config.data.labels is not None:
        lines = Path(config.data.labels).read_text(encoding="utf-8").splitlines()
        return tuple(line.strip() for line in lines if line.strip())
    return class_names(config.data.train_list)


def default_workers(device: torch.device) -> int:
    """Decoding processes for each training process: most of its cores if a GPU does the rest."""
    cores = cores_per_process()
    return max(1, cores - 1) if device.type == "cuda" else cores // 4
