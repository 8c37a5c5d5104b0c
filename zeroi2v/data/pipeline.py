"""Batches of training clips: one DALI graph for both devices, fed by workers that decode by PyAV.

A worker (`clip_worker.py`) chooses frames, draws the augmentation, and decodes; on a GPU it may
leave decoding to DALI and hand over the packets that the frames are in (`gop.py`). The graph
(`graph.py`) resizes, augments and normalises, on the CPU or on the GPU, with the same operators.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import wait
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from zeroi2v.config import ModelConfig
from zeroi2v.data.annotations import Sample
from zeroi2v.data.augment import AugmentConfig
from zeroi2v.data.clip_worker import PREFETCH, ClipPlan, ClipSource
from zeroi2v.data.fatal_files import find_fatal_files, without_main_program
from zeroi2v.data.gop import DALI_CPU, nvdec
from zeroi2v.data.mixing import mix
from zeroi2v.data.nvdec import capabilities
from zeroi2v.data.shared_samples import SharedSamples
from zeroi2v.data.views import Batch, check_arguments
from zeroi2v.processes import processes_here

DECODERS = ("auto", "dali", "pyav")
_PATIENCE = 10
"""Seconds in which DALI's thread should see that its processes are gone."""

__all__ = ["DECODERS", "AugmentConfig", "Batch", "ClipLoader", "check_bad_files"]


class ClipLoader:
    """Batches of training clips from a list of videos.

    An epoch is `steps_per_epoch` steps of `accumulation` micro-batches; clips are shuffled, start
    at random frames, and are changed at random if `augment` is given; if not, they are the centre
    crop after resizing to `val_short_side`. Step s takes the same clips however many processes
    share it. A bad video is replaced by another.

    `batch_size` is the micro-batch of this process. `workers` decode in processes of their own
    (0: in this one), which live as long as the loader; one epoch is read at a time. `device` is
    "cpu", "gpu" or "cuda[:n]". A video that takes longer than `timeout` seconds to decode is a bad
    one. `cache` is a folder that keeps whole decoded videos, which take much space there: for
    small datasets. `clips` is the number of different clips of a video, augmentation included,
    which the epochs take in turn; None: every epoch draws anew.

    `decoder`: "pyav" decodes in the workers. "dali" gives DALI's decoder all that it takes, on a
    GPU the hardware's. That hides damage: the frames of a damaged video may be wrong. So "auto"
    gives the hardware only videos whose `Sample.frames` says that a manifest knows them to be
    whole, and is "pyav" on the CPU. Either way the frames are the same, up to the rounding of
    colours, and PyAV decodes what DALI does not take, in the same batches. Raises ValueError if an
    argument breaks its rule or an epoch would have no step.
    """

    def __init__(
        self,
        samples: list[Sample],
        config: ModelConfig,
        *,
        batch_size: int,
        augment: AugmentConfig | None = None,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulation: int = 1,
        workers: int = 0,
        device: str = "cpu",
        timeout: float | None = None,
        cache: str | None = None,
        decoder: str = "auto",
        clips: int | None = None,
    ):
        check_arguments(batch_size, rank, world_size, workers, timeout)
        if accumulation < 1:
            raise ValueError(f"accumulation must be at least 1: got {accumulation}")
        if augment is not None and augment.mixes and batch_size % 2:
            raise ValueError(f"batch_size must be even with mixup or cutmix: got {batch_size}")
        if decoder not in DECODERS:
            raise ValueError(f"decoder must be one of {', '.join(DECODERS)}: got {decoder!r}")
        self.device = torch.device("cuda" if device == "gpu" else device)
        on_gpu = self.device.type == "cuda"
        cutter = None
        if cache is None and (decoder == "dali" or (decoder == "auto" and on_gpu)):
            cutter = nvdec(capabilities(self.device)) if on_gpu else DALI_CPU
            if decoder == "dali" and not cutter.capabilities:
                raise ValueError(
                    f"decoder 'dali' needs a GPU that decodes video: {self.device} does not, or "
                    "its driver's libnvcuvid is missing (a container needs "
                    "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video)"
                )
        self.plan = ClipPlan(
            samples=SharedSamples(samples) if workers else list(samples),
            config=config,
            augment=augment,
            seed=seed,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            accumulation=accumulation,
            timeout=timeout,
            cache=cache,
            cutter=cutter,
            cut_unknown=decoder == "dali",
            clips=clips,
        )
        if self.plan.steps == 0:
            raise ValueError(
                f"samples must fill one step of {self.plan.global_batch} clips: "
                f"got {len(self.plan.samples)}; lower the batch (optim.batch_size) or add videos"
            )
        self.workers = workers
        self._known = sum(sample.frames is not None for sample in samples)
        self.bad_files: dict[str, str] = {}
        """Names of the samples that could not be decoded so far, with the reasons."""
        self.decoded_by: Counter[str] = Counter()
        """Clips so far by who decoded them: "dali" or "pyav"."""
        self._pipeline = None
        self._children: list[multiprocessing.Process] = []
        self._observers: list[threading.Thread] = []
        self._tried_again: tuple[int, int] | None = None
        self._next_epoch: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.plan.steps

    @property
    def decoder(self) -> str:
        """Who decodes, in words."""
        if self.plan.cutter is None:
            return "PyAV"
        if not self.plan.cutter.capabilities:
            return f"PyAV, as {self.device} decodes no video, or its driver's libnvcuvid is missing"
        if self.plan.cut_unknown:
            which = "what it can"
        elif self._known:
            which = f"what it can of {self._known} videos that a manifest knows to be whole"
        else:
            which = "nothing, as no manifest says which videos are whole"
        return f"DALI on the {self.device.type}: {which}; the rest by PyAV"

    def of(self, clips: np.ndarray) -> ClipLoader:
        """A loader of these clips alone, int64 [n, 2] of (draw, sample), for this process.

        Its one epoch ends with the last whole batch. `bad_files` are this loader's as well.
        """
        other = copy.copy(self)
        other.plan = replace(self.plan, order=clips, rank=0, world_size=1, accumulation=1)
        other.decoded_by, other._pipeline = Counter(), None
        return other

    def epoch(self, epoch: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """The micro-batches of an epoch, from step `start_step` on.

        Nothing before `start_step` is decoded, and the batches are those of the whole epoch.
        Raises ValueError if so many videos are bad that no replacement is found.
        """
        if not 0 <= start_step <= self.plan.steps:
            raise ValueError(f"start_step must be in 0..{self.plan.steps}: got {start_step}")
        return self._iterate(epoch, start_step)

    def _iterate(self, epoch: int, start_step: int) -> Iterator[Batch]:
        micro_batch = start_step * self.plan.accumulation
        if self._pipeline is not None and (epoch, start_step) == (self._next_epoch, 0):
            self._pipeline.reset()
        else:
            if self._pipeline is None and self.workers:
                check_shared_memory(self.plan.shared_bytes(self.workers))
            self._pipeline = self._build(self.plan, epoch, micro_batch, self.workers)
        self._next_epoch = None
        pipeline = self._pipeline
        while True:
            if pipeline is not self._pipeline:
                raise RuntimeError("this epoch ended when another one was begun")
            try:
                # DALI itself would wait for one that died while it was idle. Asked by sentinel: a
                # thread of DALI's reaps its processes, and `is_alive` is wrong while it does so.
                if wait([child.sentinel for child in self._children], timeout=0):
                    raise RuntimeError("a decoding process was killed")
                outputs = pipeline.run()
            except StopIteration:
                break
            except RuntimeError as error:
                outputs = self._rescue(error, epoch, micro_batch)
                pipeline = self._pipeline
            if outputs is not None:
                yield self._batch(epoch, micro_batch, *outputs)
                micro_batch += 1
        self._next_epoch = epoch + 1

    def _build(self, plan: ClipPlan, epoch: int, micro_batch: int, workers: int):
        from zeroi2v.data.graph import clip_graph  # takes DALI to be installed

        gpu = self.device.type == "cuda"
        device_id = self.device.index if gpu else None
        if gpu and device_id is None:
            device_id = torch.cuda.current_device()
        pipeline = clip_graph(
            ClipSource(plan, epoch, micro_batch),
            plan,
            gpu,
            workers > 0,
            batch_size=plan.batch_size,
            num_threads=max(1, min(workers, plan.batch_size)),
            device_id=device_id,
            py_num_workers=max(1, workers),
            py_start_method="spawn",
            prefetch_queue_depth=PREFETCH,
            seed=0,
        )
        others = {*multiprocessing.active_children(), *threading.enumerate()}
        with without_main_program():
            pipeline.build()
        self._children = [p for p in multiprocessing.active_children() if p not in others]
        self._observers = [thread for thread in dali_observers() if thread not in others]
        return pipeline

    def _rescue(self, error: RuntimeError, epoch: int, micro_batch: int) -> tuple | None:
        """Rebuilds the pipeline after an error; returns what that micro-batch is, if known.

        A micro-batch that DALI's decoder fails on is left to PyAV, which names the bad file. A file
        that kills its decoding process is looked for, and counts as bad from now on. If there is
        none, the micro-batch is tried once more. Raises `error` if none of this helps.
        """
        ends = [child.sentinel for child in self._children]
        decoder_failed = "decoders.video" in str(error)
        died = bool(ends and not decoder_failed and wait(ends, timeout=1))
        if died:  # by writing to a full /dev/shm, it may be: of frames larger than usual
            check_shared_memory(self.plan.clip_bytes)
        for child in self._children:  # DALI would wait for them, and they may not heed it
            child.kill()
        await_observers(self._observers)
        self._pipeline = outputs = None
        if decoder_failed:
            careful = self._build(replace(self.plan, cutter=None), epoch, micro_batch, 0)
            outputs = careful.run()
            micro_batch += 1
        else:
            ahead = [
                SimpleNamespace(epoch_idx=0, iteration=number, idx_in_batch=row)
                for number in range(micro_batch, micro_batch + 1 + 2 * PREFETCH)
                for row in range(self.plan.batch_size)
            ]
            fatal = find_fatal_files(ClipSource(self.plan, epoch, 0), ahead) if died else {}
            if not fatal and (not died or self._tried_again == (epoch, micro_batch)):
                raise error
            self._tried_again = epoch, micro_batch
            self.plan = replace(self.plan, fatal=self.plan.fatal | fatal)
        self._pipeline = self._build(self.plan, epoch, micro_batch, self.workers)
        return outputs

    def _batch(self, epoch: int, micro_batch: int, reports, clips) -> Batch:
        plan = self.plan
        reports = [json.loads(bytes(np.array(reports.at(i)))) for i in range(plan.batch_size)]
        for report in reports:
            self.bad_files.update(report["bad"])
            self.decoded_by["dali" if report["is_cut"] else "pyav"] += report["index"] >= 0
        index = torch.tensor([report["index"] for report in reports])
        if (index < 0).any():
            raise ValueError(
                f"samples must contain videos that decode: got {len(self.bad_files)} bad ones, "
                f"such as {next(iter(self.bad_files.values()))}"
            )
        label = torch.tensor([report["label"] for report in reports])
        # Not copied: DALI keeps its hands off memory that a tensor still holds.
        video = torch.from_dlpack(clips.as_tensor()).unsqueeze(1)  # [B, 1, 3, T, H, W]
        target = label
        if plan.augment is not None and plan.augment.mixes:
            first = plan.position(micro_batch)
            classes = plan.config.num_classes
            target = mix(video, label, plan.augment, (plan.seed, epoch), first, classes)
        return Batch(video, label, index, target)


def check_shared_memory(needed: int) -> None:
    """Raises ValueError if /dev/shm can't take `needed` bytes for each process on this machine."""
    try:
        stat = os.statvfs("/dev/shm")
    except OSError:  # not Linux
        return
    free, needed = stat.f_bavail * stat.f_frsize, needed * processes_here()
    if free < needed:
        raise ValueError(
            f"/dev/shm must have {needed / 1e6:,.0f} MB free for the clips of the decoding "
            f"workers: it has {free / 1e6:,.0f}; give the container more (docker run "
            "--shm-size=8g), or take fewer clips at once (optim.micro_batch) or data.workers=0"
        )


def dali_observers() -> list[threading.Thread]:
    """The threads by which DALI watches the processes that decode."""
    return [t for t in threading.enumerate() if t.name.endswith("(_observer_thread)")]


def await_observers(threads: list[threading.Thread]) -> None:
    """Waits until they have seen that their processes were killed, and then DALI need not.

    A process may have held a lock that its observer needs: then that waits for ever, and DALI for
    it when the pipeline is dropped, or at the exit.
    """
    for thread in threads:
        thread.join(_PATIENCE)
        if thread.is_alive():
            thread.join = lambda timeout=None: None


def check_bad_files(bad: dict[Any, str], total: int, max_bad_fraction: float) -> None:
    """Raises ValueError that lists the bad samples if they are too large a part of all.

    `bad` has the reason of each bad sample, of the `total` in the list.
    """
    if len(bad) > max_bad_fraction * total:
        reasons = "\n".join(f"  {reason}" for reason in sorted(bad.values()))
        raise ValueError(
            f"bad videos must be at most data.max_bad_fraction {max_bad_fraction} of {total}: "
            f"got {len(bad)}:\n{reasons}\n"
            "to continue without them, raise data.max_bad_fraction; `check_data` names all of them "
            "at once, and data.manifest leaves out those that it found"
        )
