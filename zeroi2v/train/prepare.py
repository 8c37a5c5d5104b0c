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

from zeroi2v.bridges.load import load_backbone
from zeroi2v.data.annotations import Sample, class_names, read_list
from zeroi2v.data.classes import occurrence, read_labels, some
from zeroi2v.data.manifest import use_manifest
from zeroi2v.data.pipeline import ClipLoader, check_bad_files
from zeroi2v.data.video_files import left_out
from zeroi2v.data.views import ViewLoader
from zeroi2v.inference import default_workers
from zeroi2v.model.vit import Block, VideoViT
from zeroi2v.processes import first_alone, together
from zeroi2v.train.config import DataConfig, OptimConfig, RunConfig, differences, load_config
from zeroi2v.train.distributed import say
from zeroi2v.train.state import clear_leftovers, lock_folder, read_record, read_tag
from zeroi2v.train.tokens import TokenLoader, token_loader


@dataclass
class Job:
    """A run whose input has been checked, ready to start."""

    config: RunConfig
    device: torch.device
    model: VideoViT
    loader: ClipLoader
    val_loader: ViewLoader | None
    samples: list[Sample]
    val_samples: list[Sample]
    record: dict[str, Any] | None
    """The record of the state to resume from; None for a new run."""
    tokens: TokenLoader | None
    """What is trained on instead of `loader`, if `data.cache_tokens` is given."""


def prepare(config: RunConfig, device: torch.device, keep: ExitStack | None) -> Job:
    """Checks all input before work starts, and says what is decided from it.

    The run folder is made and locked last, until `keep` is closed; a dry run, without `keep`, does
    not touch it.
    """
    data, optim = config.data, config.optim
    check_device(optim, device)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    accumulation = optim.accumulation(world_size)
    samples, val_samples = read_samples(config)
    bad: dict[int, str] = {}
    if data.manifest is not None:
        samples, known = use_manifest(samples, data.manifest, data.root)
        bad = {i: known[s.path] for i, s in enumerate(samples) if s.path in known}
        check_bad_files(bad, len(samples), data.max_bad_fraction)
        samples = [sample for i, sample in enumerate(samples) if i not in bad]
    if data.shots is not None:
        samples = draw_shots(samples, data.shots, config.model.num_classes, config.run.seed)
    if data.manifest is not None and val_samples:
        val_root = data.root if data.val_root is None else data.val_root
        val_samples, _ = use_manifest(val_samples, data.manifest, val_root, of_this_list=False)
    if config.run.wandb is not None and find_spec("wandb") is None:
        raise ValueError("run.wandb needs the package wandb: pip install wandb")
    video = config.model.video
    workers = data.workers
    if workers is None:
        workers = default_workers(device)
    shared = dict(
        batch_size=optim.clips_at_once(world_size),
        rank=rank,
        world_size=world_size,
        workers=workers,
        device=str(device),
        timeout=data.timeout,
        cache=data.cache,
    )
    loader = ClipLoader(
        samples,
        video,
        augment=config.augment,
        accumulation=accumulation,
        seed=config.run.seed,
        decoder=data.decoder,
        clips=data.clips_per_video,
        **shared,
    )
    val_loader = ViewLoader(val_samples, video, **shared) if val_samples else None
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
    tokens = token_loader(config, model, loader)

    steps = optim.epochs * loader.steps_per_epoch
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    say(f"backbone    {config.model.backbone or 'NONE: random weights (model.backbone is null)'}")
    say(f"parameters  {trainable:,} trained, {total - trainable:,} frozen")
    bad_ones = f" ({len(bad)} bad ones left out)" if bad else ""
    say(f"videos      {len(samples)} to train on{bad_ones}, {len(val_samples)} to validate on")
    for kind, source, part in (
        ("train", data.train_list, samples),
        ("val", data.val_list, val_samples),
    ):
        if source is not None:
            if others := left_out(source):
                say(f"no videos   {kind}: {some(others)}")
            for line in occurrence((s.label for s in part), video.num_classes, video.labels):
                say(f"classes     {kind}: {line}")
    say(
        f"batch       {optim.batch_size} clips = {optim.clips_at_once(world_size)} x {world_size} "
        f"processes x {accumulation} accumulated"
    )
    cut = f" (half of the run; the recipe's is {optim.warmup_epochs:g} epochs)"
    say(
        f"schedule    {steps} steps = {optim.epochs} epochs x {loader.steps_per_epoch}, "
        f"warm-up {optim.warmup_steps(loader.steps_per_epoch)}"
        + (cut if optim.warmup_epochs > optim.epochs / 2 else "")
        + f", peak lr {optim.peak_lr:g}"
        + (f" (scaled from a batch of {optim.lr_batch})" if optim.lr_batch else "")
    )
    say(
        f"machine     {device.type}, {optim.precision}, ZeRO stage {optim.zero_stage}, "
        f"{torch.get_num_threads()} threads and {workers} decoding workers for each process"
    )
    if device.type == "cpu" and optim.precision == "bf16" and not cpu_has_bf16():
        say("note        this CPU has no bf16 and emulates it: optim.precision=fp32 is faster")
    say(f"decoder     {loader.decoder}")
    if tokens is not None:
        say(f"tokens      {tokens.size()}")
    return Job(config, device, model, loader, val_loader, samples, val_samples, record, tokens)


def cpu_has_bf16() -> bool:
    """True if PyTorch multiplies bfloat16 by oneDNN here; else it does so many times slower."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def provenance(
    config: RunConfig, samples: list[Sample], val_samples: list[Sample]
) -> dict[str, Any]:
    """What a model's card says about its training; files by name alone."""
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
            raise ValueError("optim.offload needs a GPU: got the CPU, which has nothing to offload")
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
        raise ValueError(
            f"data.shots must be at most the videos of each class: got {shots}, but there are "
            f"{some}{more}"
        )
    drawn = [
        np.random.default_rng((seed, label)).choice(own, shots, replace=False)
        for label, own in enumerate(rows)
    ]
    return [samples[row] for row in sorted(np.concatenate(drawn))]


def gather_blocks_whole(model: VideoViT) -> None:
    """Makes ZeRO stage 3 gather a block's weights all at once, as the block uses them."""
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
        keep.callback(lock_folder(folder).release, force=True)
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
            raise ValueError(
                f"run.resume needs the config of {folder}: got {'; '.join(changed)}; to train on "
                f"with other settings, begin a run with model.backbone={folder / 'last'}"
            )
        if record["world_size"] != world_size:
            raise ValueError(
                f"run.resume needs as many processes as {folder}, {record['world_size']}: "
                f"got {world_size}"
            )
    elif not config.run.resume and any(
        (folder / name).exists() for name in ("config.yaml", "state", "log.jsonl")
    ):
        raise ValueError(
            f"run.dir must contain no run, unless run.resume is true or auto: got {folder}"
        )
    return record


def check_root(data: DataConfig) -> None:
    """Raises OSError if the videos' folder has vanished, or what was mounted there."""
    for key, root in (("data.root", data.root), ("data.val_root", data.val_root)):
        if root is not None and not (Path(root).is_dir() and any(Path(root).iterdir())):
            raise OSError(f"{key} must contain the videos: {root} is empty or gone")


def with_classes(config: RunConfig) -> RunConfig:
    """`config` with its classes named, and counted where it leaves that open.

    The names are those of the config, of a file, of the training list itself, or none; then the
    highest number in the list counts them. Raises as `read_list` and `read_labels`, and ValueError
    if the config counts otherwise.
    """
    model, data = config.model, config.data
    labels = model.labels
    if not labels:
        known = data.labels is not None
        labels = read_labels(data.labels) if known else class_names(data.train_list)
    count = model.num_classes or len(labels)
    if labels and count != len(labels):
        raise ValueError(
            f"model.num_classes must be {len(labels)}, as many as there are names, or null to be "
            f"counted: got {count}"
        )
    if not count:
        count = 1 + max(sample.label for sample in read_list(data.train_list))
    return replace(config, model=replace(model, num_classes=count, labels=labels))


def read_samples(config: RunConfig) -> tuple[list[Sample], list[Sample]]:
    """Samples to train on and to validate on, numbered alike: by the names of the classes, where
    they have some. Raises as `read_list`."""
    data, model = config.data, config.model
    read = partial(
        read_list,
        num_classes=model.num_classes,
        classes=model.labels,
        filename_tmpl=data.filename_tmpl,
    )
    val_root = data.root if data.val_root is None else data.val_root
    val_samples = [] if data.val_list is None else read(data.val_list, val_root)
    return read(data.train_list, data.root), val_samples
