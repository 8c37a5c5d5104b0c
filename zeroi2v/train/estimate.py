"""The memory and time that a run will take, before it starts: `zeroi2v train --dry-run`.

Steps of one clip and of three at once are measured, with the real model, engine, optimizer and
loaders, and what a clip adds is extrapolated to the run's own number. If that is well within
memory, two steps of that size are measured to check it; if not, measured changes are proposed that
make the run fit.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import re
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, get_args

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from zeroi2v.model.training_block import Memory
from zeroi2v.model.vit import VideoViT
from zeroi2v.processes import gather, processes_here
from zeroi2v.reparam import DTYPES
from zeroi2v.train.config import OptimConfig
from zeroi2v.train.distributed import StopSignals, say
from zeroi2v.train.engine import build_engine, seed_dropout
from zeroi2v.train.fill import frozen_start
from zeroi2v.train.prepare import Job

GB = 1e9
SAFE = 0.7
"""Part of the memory up to which an extrapolation is put to the test."""


@dataclass(frozen=True)
class Cost:
    """Of a forward and backward pass: a fixed part, and one for each clip."""

    fixed: float
    a_clip: float

    def __call__(self, clips: int) -> float:
        return self.fixed + clips * self.a_clip

    def most(self, limit: float) -> int:
        """The most clips whose cost is within `limit`; 0 if none."""
        return max(0, int((limit - self.fixed) // self.a_clip))


def estimate(job: Job, signals: StopSignals) -> int:
    """Measures a few steps of `job` and prints what the run will take; returns exit status 0."""
    optim, loader, world_size = job.config.optim, job.loader, dist.get_world_size()
    clips, passes = optim.clips_at_once(world_size), optim.accumulation(world_size)
    twin = copy.deepcopy(job.model) if dist.get_rank() == 0 else None  # as a run has it
    first = frozen_start(job) if job.tokens is not None else None
    engine = build_engine(job.model, optim, loader.steps_per_epoch)
    seed_dropout(job.config.run.seed)
    with signals.not_for_children():
        clip, reading = read_clip(job)
    if first is not None:
        clip, reading = compute_tokens(job, first, clip, reading)
        first = None
    start = peak_memory(job.device)
    measure_pass(engine, clip, 1, optim)  # makes the optimizer's state
    memory, seconds = measure(engine, clip, optim)
    limit, total = memory_limit(job.device)
    peak, computing = max(start, memory(clips)), seconds(clips)
    is_safe = max(gather(peak)) < SAFE * limit
    if is_safe:
        peak, computing = measure_run(engine, clip, clips, optim)
        peak = max(start, peak)
    # Workers read while this process computes.
    step = max(computing, reading) if loader.workers else computing + reading
    peak, step = max(gather(peak)), passes * max(gather(step))
    epoch = step * loader.steps_per_epoch
    say(
        f"memory      {peak / GB:.2f} GB at most in a process; each may use "
        f"{limit / GB:.1f} of {total / GB:.1f} GB ("
        f"{'measured' if is_safe else 'extrapolated'}; {memory.a_clip / GB:.3f} for each of "
        f"{clips} clips at once)"
    )
    say(
        f"time        {step:.2f} s a step: {passes * computing:.2f} computing, "
        f"{passes * reading:.2f} reading; {_span(epoch)} an epoch, {_span(epoch * optim.epochs)} "
        "in all, without validation"
    )
    fits = peak <= limit
    for line in ["fits"] if fits else advice(job, engine, clip, memory, limit):
        say(f"verdict     {line}")
    say(json.dumps({
        "memory_gb": round(peak / GB, 3), "limit_gb": round(limit / GB, 3), "fits": fits,
        "seconds_per_step": round(step, 3), "steps_per_epoch": loader.steps_per_epoch,
    }))  # fmt: skip
    engine.destroy()
    del twin
    return 0


def read_clip(job: Job) -> tuple[Tensor, float]:
    """A training clip, `[1, 3, T, H, W]`, and the seconds that a batch takes to be read.

    Validation's first batch is read as well, since a run holds its buffers too.
    """
    batches = job.loader.epoch(0)
    clip, begun, count = next(batches).video[:1].squeeze(1).clone(), time.perf_counter(), 0
    while count < 4 and next(batches, None) is not None:
        count += 1
    seconds = (time.perf_counter() - begun) / max(1, count)
    if job.val_loader is not None:
        next(job.val_loader.epoch())
    return clip, seconds


@torch.no_grad()
def compute_tokens(job: Job, first: VideoViT, clip: Tensor, reading: float) -> tuple[Tensor, float]:
    """The tokens of a clip, and the seconds that a batch of them takes to be read.

    Says how long all take to be computed, where a batch of clips takes `reading` seconds.
    """
    video, begun = clip.to(job.device, job.tokens.cache.dtype), time.perf_counter()
    tokens = first.image_tokens(video).cpu()
    clips = job.tokens.plan.batch_size
    batch = max(reading, clips * (time.perf_counter() - begun))
    batches = len(job.tokens.missing()) / clips / dist.get_world_size()
    say(f"tokens      computed in about {_span(batches * batch)}, before the first step")
    content, begun = job.tokens.cache.packed(tokens[0]), time.perf_counter()
    job.tokens.cache.parsed(content, job.tokens.cache.folder)
    return tokens, clips * (time.perf_counter() - begun)


def measure(engine: Any, clip: Tensor, optim: OptimConfig) -> tuple[Cost, Cost]:
    """Peak memory in bytes and time in seconds of a forward and backward pass, by its clips."""
    ones = measure_pass(engine, clip, 1, optim)
    limit, _ = memory_limit(engine.device)
    more = 2 if max(gather(3 * ones[0])) < limit else 1
    slopes = [
        (b - a) / more
        for a, b in zip(ones, measure_pass(engine, clip, 1 + more, optim), strict=True)
    ]
    memory, seconds = (Cost(a - slope, slope) for a, slope in zip(ones, slopes, strict=True))
    return memory, seconds


def measure_run(engine: Any, clip: Tensor, count: int, optim: OptimConfig) -> tuple[float, float]:
    """Peak memory in bytes and time in seconds of steps of `count` clips at once, as in the run."""
    forget_peak(engine.device)
    for _ in range(2):
        begun = time.perf_counter()
        run_pass(engine, clip, count, optim)
        seconds = time.perf_counter() - begun
    return peak_memory(engine.device), seconds


def measure_pass(engine: Any, clip: Tensor, count: int, optim: OptimConfig) -> tuple[float, float]:
    """Peak memory in bytes and time in seconds of the pass of `count` clips that ends a step."""
    if optim.accumulation(dist.get_world_size()) > 1:
        run_pass(engine, clip, 1, optim, last=False)  # whose gradients are kept
    forget_peak(engine.device)
    begun = time.perf_counter()
    run_pass(engine, clip, count, optim)
    return peak_memory(engine.device), time.perf_counter() - begun


def forget_peak(device: torch.device) -> None:
    """Restarts `peak_memory` from what is in use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what is free is given back
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> int:
    """The most bytes held since `forget_peak`: of the GPU's allocator, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1]) * 1024


def run_pass(engine: Any, clip: Tensor, count: int, optim: OptimConfig, last: bool = True) -> None:
    """Forward and backward pass of `count` copies of the clip, or of its tokens `[1, T, N, C]`, and
    the update at the step's end."""
    video = clip.to(engine.device, DTYPES[optim.precision])
    video = video.expand(count, *clip.shape[1:]).contiguous()
    label = torch.zeros(count, dtype=torch.long, device=engine.device)
    engine.set_gradient_accumulation_boundary(last)
    logits = engine(video, is_tokens=video.ndim == 4)
    engine.backward(F.cross_entropy(logits.float(), label))
    engine.step()
    if engine.device.type == "cuda":
        torch.cuda.synchronize()


def memory_limit(device: torch.device) -> tuple[float, float]:
    """Bytes that each process may have, including what it already has; and all bytes there are.

    Of its GPU, or its part of the machine, where a control group may allow less.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved(), total
    import psutil

    machine = psutil.virtual_memory()
    free, total = min([(machine.available, machine.total), *group_memory()])
    own = sum(gather(psutil.Process().memory_info().rss)) / dist.get_world_size()
    return own + free / processes_here(), total


def group_memory(root: Path = Path("/sys/fs/cgroup")) -> list[tuple[int, int]]:
    """Free and allowed bytes of each control group (version 2) that this process is in.

    What files occupy in memory counts as free: it is given up when memory is needed.
    """
    own = Path("/proc/self/cgroup").read_text().strip().splitlines()[-1].rpartition("::")[2]
    folder, found = root / own.lstrip("/"), []
    for group in (folder, *folder.parents):
        if not group.is_relative_to(root) or not (group / "memory.max").exists():
            continue
        allowed = (group / "memory.max").read_text().strip()
        if allowed != "max":
            files = sum(
                int(size)
                for kind, size in map(str.split, (group / "memory.stat").open())
                if kind in ("active_file", "inactive_file")
            )
            used = int((group / "memory.current").read_text()) - files
            found.append((max(0, int(allowed) - used), int(allowed)))
    return found


def advice(job: Job, engine: Any, clip: Tensor, memory: Cost, limit: float) -> list[str]:
    """What to change so that the run fits, each with what it would then take."""
    optim, world_size = job.config.optim, dist.get_world_size()
    clips, lines = optim.clips_at_once(world_size), []

    def propose(option: str, cost: Cost) -> None:
        most = min(gather(cost.most(limit)))
        if most:
            count = replace(optim, micro_batch=min(most, clips)).clips_at_once(world_size)
            fewer = f" optim.micro_batch={count}" if count < clips else ""
            lines.append(f"fits with {(option + fewer).strip()}: {cost(count) / GB:.2f} GB")

    propose("", memory)
    costs = {optim.memory: memory}
    for policy in get_args(Memory):
        if policy not in costs:
            engine.module.set_memory(policy)
            costs[policy] = measure(engine, clip, optim)[0]
            if costs[policy].a_clip < memory.a_clip:
                propose(f"optim.memory={policy}", costs[policy])
    frugal = min(costs.values(), key=lambda cost: cost.a_clip)
    weights = {True: 0, False: 0}  # by whether they are trained
    for parameter in engine.module.parameters():
        weights[parameter.requires_grad] += getattr(parameter, "ds_numel", parameter.numel())
    size, share = DTYPES[optim.precision].itemsize, 1 - 1 / world_size
    # fp32 moments and copy, gradients, weights: what each stage shares out beside the one before.
    saved = [0, 12 * weights[True], 4 * weights[True], size * sum(weights.values())]
    for stage in range(optim.zero_stage + 1, 4 if world_size > 1 else 0):
        less = sum(saved[optim.zero_stage + 1 : stage + 1]) * share
        policy = next(name for name, cost in costs.items() if cost is frugal)
        propose(f"optim.zero_stage={stage} optim.memory={policy}",
                Cost(frugal.fixed - less, frugal.a_clip))  # fmt: skip
    more = f"{frugal(1) / GB:.2f} GB even for one clip at a time"
    return ["does NOT fit", *(lines or [f"no option helps: {more}; take a larger machine"])]


def _span(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
