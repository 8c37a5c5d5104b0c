"""Batches of clips: one DALI graph for both devices, fed by workers that decode with PyAV.

A worker (`source.py`) decodes and draws; the graph below resizes, augments and normalises, on
the CPU or on the GPU, with the same operators. Pixels stay uint8 until the last kernel.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.auto_aug import augmentations
from nvidia.dali.auto_aug.core import select
from nvidia.dali.plugin.pytorch import feed_ndarray

from zeroi2v.config import ModelConfig
from zeroi2v.data.annotations import Sample
from zeroi2v.data.source import KINDS, AugmentConfig, ClipPlan, ClipSource

_GREY = 128  # fills what an operation uncovers or erases, as published

__all__ = ["AugmentConfig", "Batch", "ClipLoader", "check_bad_files"]


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of clips."""

    video: torch.Tensor
    """Normalised pixels, float32 [B, V, 3, T, H, W]; views are clip-major, V = 1 to train."""
    label: torch.Tensor
    """Class, int64 [B], after mirroring where that changes it; -1 where `index` is."""
    index: torch.Tensor
    """Position in `samples`, int64 [B]; -1 for padding and for videos that cannot be decoded."""


class ClipLoader:
    """Batches of clips from a list of videos, for training, validation or test.

    `train`: an epoch is `steps_per_epoch` steps of `accumulation` micro-batches; clips are
    shuffled, start at random frames, and are changed at random if `augment` is given. Step s
    takes the same clips however many processes share it. A bad video is replaced by another.
    `val`: one clip, centre crop after resizing to `val_short_side`. `test`: `views` = (clips,
    crops) after resizing to `test_short_side`. Both take every sample once, in order, shared
    among the processes; the last batches are padded, and bad videos marked, with index -1.

    `batch_size` is the micro-batch of this process. `workers` decode in processes of their own
    (0: in this one), which live as long as the loader; one epoch is read at a time. `device` is
    "cpu", "gpu" or "cuda[:n]". A video that takes longer than `timeout` seconds to decode is a bad
    one. `cache` is a folder that keeps whole decoded videos, which take much space there: for
    small datasets.
    Raises ValueError if an argument breaks its rule or an epoch would have no step.
    """

    def __init__(
        self,
        samples: list[Sample],
        config: ModelConfig,
        *,
        batch_size: int,
        mode: str = "train",
        views: tuple[int, int] = (1, 1),
        augment: AugmentConfig | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        workers: int = 0,
        device: str = "cpu",
        timeout: float | None = None,
        cache: str | None = None,
    ):
        if mode not in ("train", "val", "test"):
            raise ValueError(f"mode must be 'train', 'val' or 'test': got {mode!r}")
        for name, value in (("batch_size", batch_size), ("accumulation", accumulation)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1: got {value}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be in 0..world_size-1: got {rank} of {world_size}")
        if workers < 0:
            raise ValueError(f"workers must not be negative: got {workers}")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout must be positive: got {timeout}")
        if views[0] < 1 or views[1] not in (1, 3):
            raise ValueError(f"views must be (clips >= 1, crops 1 or 3): got {views}")
        if mode != "test" and tuple(views) != (1, 1):
            raise ValueError(f"views must be (1, 1) in mode {mode!r}: got {views}")
        if mode != "train" and (augment is not None or accumulation != 1):
            raise ValueError(f"augment and accumulation are for mode 'train': got mode {mode!r}")
        self.plan = ClipPlan(
            samples=list(samples),
            config=config,
            mode=mode,
            views=tuple(views),
            augment=augment,
            seed=seed,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            accumulation=accumulation,
            timeout=timeout,
            cache=cache,
        )
        if self.plan.steps == 0:
            raise ValueError(
                f"samples must fill one step of {self.plan.global_batch} clips: "
                f"got {len(self.plan.samples)}"
            )
        self.workers = workers
        self.device = torch.device("cuda" if device == "gpu" else device)
        self.bad_files: dict[str, str] = {}
        """Paths of the videos that could not be decoded so far, with the reasons."""
        self._pipeline = None
        self._next_epoch: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of a training epoch; batches of a validation or test."""
        return self.plan.steps

    def epoch(self, epoch: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """The micro-batches of an epoch, from step `start_step` on.

        Nothing before `start_step` is decoded, and the batches are those of the whole epoch.
        Raises ValueError if so many videos are bad that no replacement is found.
        """
        if not 0 <= start_step <= self.plan.steps:
            raise ValueError(f"start_step must be in 0..{self.plan.steps}: got {start_step}")
        return self._iterate(epoch, start_step)

    def _iterate(self, epoch: int, start_step: int) -> Iterator[Batch]:
        if self._pipeline is not None and (epoch, start_step) == (self._next_epoch, 0):
            self._pipeline.reset()
        else:
            self._pipeline = self._build(epoch, start_step)
        self._next_epoch = None
        pipeline = self._pipeline
        while True:
            if pipeline is not self._pipeline:
                raise RuntimeError("this epoch ended when another one was begun")
            try:
                outputs = pipeline.run()
            except StopIteration:
                break
            yield self._batch(*outputs)
        # Tests do not depend on the epoch: any may follow.
        self._next_epoch = epoch + 1 if self.plan.mode == "train" else 0

    def _build(self, epoch: int, start_step: int):
        plan = self.plan
        gpu = self.device.type == "cuda"
        device_id = self.device.index if gpu else None
        if gpu and device_id is None:
            device_id = torch.cuda.current_device()
        pipeline = _graph(
            ClipSource(plan, epoch, start_step),
            plan,
            gpu,
            self.workers > 0,
            batch_size=plan.batch_size,
            num_threads=max(1, min(self.workers, plan.batch_size)),
            device_id=device_id,
            py_num_workers=max(1, self.workers),
            py_start_method="spawn",
            prefetch_queue_depth=2,
            seed=0,
        )
        # A spawned worker imports the main program, torch and all; ours needs nothing from it.
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")
        try:
            pipeline.build()
        finally:
            sys.modules["__main__"] = main
        return pipeline

    def _batch(self, reports, *crops) -> Batch:
        plan = self.plan
        reports = [json.loads(bytes(np.array(reports.at(i)))) for i in range(plan.batch_size)]
        for report in reports:
            self.bad_files.update(report["bad"])
        index = torch.tensor([report["index"] for report in reports])
        if plan.mode == "train" and (index < 0).any():
            raise ValueError(
                f"samples must hold videos that decode: got {len(self.bad_files)} bad ones, "
                f"such as {next(iter(self.bad_files.values()))}"
            )
        clips, num_frames = plan.views[0], plan.config.num_frames
        views = [_to_torch(crop, self.device).unflatten(2, (clips, num_frames)) for crop in crops]
        video = torch.stack(views, dim=1)  # [B, crops, 3, clips, T, H, W]
        video = video.permute(0, 3, 1, 2, 4, 5, 6).flatten(1, 2).contiguous()
        return Batch(video, torch.tensor([report["label"] for report in reports]), index)


def check_bad_files(bad: dict[str, str], total: int, max_bad_fraction: float) -> None:
    """Raises ValueError that lists the bad files if they are more than the given part of all."""
    if len(bad) > max_bad_fraction * total:
        reasons = "\n".join(f"  {reason}" for reason in sorted(bad.values()))
        raise ValueError(
            f"bad videos must be at most max_bad_fraction {max_bad_fraction} of {total}: "
            f"got {len(bad)}:\n{reasons}"
        )


def _to_torch(data, device: torch.device) -> torch.Tensor:
    """A copy of DALI's output, which DALI will overwrite."""
    dense = data.as_tensor()
    tensor = torch.empty(dense.shape(), dtype=torch.float32, device=device)
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    return feed_ndarray(dense, tensor, cuda_stream=stream)


@pipeline_def(enable_conditionals=True)
def _graph(source: ClipSource, plan: ClipPlan, gpu: bool, parallel: bool):
    config, augment = plan.config, plan.augment
    dtypes = [types.UINT8, types.UINT8, types.INT32]
    if augment:
        dtypes += [types.INT32]
        dtypes += [types.FLOAT] * bool(augment.rand_augment_ops)
        dtypes += [types.FLOAT] * bool(augment.erasing)
    workers = {}
    if parallel:
        # A clip larger than the hint makes DALI's shared memory grow.
        clip_bytes = plan.views[0] * config.num_frames * 256 * 344 * 3
        workers = dict(parallel=True, prefetch_queue_depth=2, bytes_per_sample_hint=clip_bytes)
    frames, report, geometry, *draws = fn.external_source(
        source,
        num_outputs=len(dtypes),
        layout=["FHWC"] + [""] * (len(dtypes) - 1),
        dtype=dtypes,
        batch=False,
        **workers,
    )
    if gpu:
        frames = frames.gpu()
    size = fn.cast(geometry[0], dtype=types.FLOAT)
    frames = fn.resize(frames, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
    mirror = 0
    if augment:
        mirror = draws.pop(0)
        if augment.rand_augment_ops:
            ops = draws.pop(0)
            for i in range(augment.rand_augment_ops):
                frames = _rand_augment(frames, ops[i], gpu)
        if augment.erasing:
            corner, shape = draws[0][0], draws[0][1]
            frames = fn.erase(frames, anchor=corner, shape=shape, axis_names="HW", fill_value=_GREY)
    outputs = [report]
    for crop in range(1 if plan.views[1] == 1 else 3):
        side = config.image_size
        view = fn.slice(frames, geometry[1 + crop], [side, side], axis_names="HW")
        view = fn.crop_mirror_normalize(
            view,
            mirror=mirror,
            mean=list(config.preprocess.mean),
            std=list(config.preprocess.std),
            output_layout="CFHW",
            dtype=types.FLOAT,
        )
        outputs.append(view)
    return tuple(outputs)


def _rand_augment(frames, op, gpu: bool):
    """Applies to each clip the one operation that its row of numbers asks for."""
    kind, value = fn.cast(op[0], dtype=types.INT32), op[1]
    matrix = fn.reshape(op[2:8], shape=[2, 3])
    operand, kernel = op[1], fn.reshape(op[2:11], shape=[3, 3])
    if gpu:
        operand, kernel = operand.gpu(), kernel.gpu()
    choices = [globals()[f"_{name}"] for name in KINDS]
    return select(choices, kind, frames, value, matrix, operand, kernel)


# One function for each of KINDS; `value` and `operand` are the same number, the second on the
# device of the frames. Statistics (contrast, equalize, auto_contrast) are taken frame by frame.
def _identity(frames, value, matrix, operand, kernel):
    return frames


def _affine(frames, value, matrix, operand, kernel):
    return fn.warp_affine(frames, matrix=matrix, fill_value=_GREY)


def _brightness(frames, value, matrix, operand, kernel):
    return fn.brightness(frames, brightness=value)


def _contrast(frames, value, matrix, operand, kernel):
    return augmentations.contrast.op(frames, operand)


def _color(frames, value, matrix, operand, kernel):
    return fn.saturation(frames, saturation=value)


def _sharpness(frames, value, matrix, operand, kernel):
    return fn.filter(frames, kernel)


def _posterize(frames, value, matrix, operand, kernel):
    return frames & fn.cast(operand, dtype=types.UINT8)


def _solarize(frames, value, matrix, operand, kernel):
    return augmentations.solarize.op(frames, operand)


def _equalize(frames, value, matrix, operand, kernel):
    return fn.equalize(frames)


def _auto_contrast(frames, value, matrix, operand, kernel):
    return augmentations.auto_contrast.op(frames, None)


def _invert(frames, value, matrix, operand, kernel):
    return augmentations.invert.op(frames, None)
