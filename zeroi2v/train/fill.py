"""Fills the cache of the first blocks' tokens (`tokens.py`) before a run's first step."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from zeroi2v.data.pipeline import check_bad_files
from zeroi2v.model.vit import VideoViT
from zeroi2v.processes import gather, together
from zeroi2v.reparam import DTYPES
from zeroi2v.train.distributed import StopSignals, say
from zeroi2v.train.prepare import Job, check_root
from zeroi2v.train.tokens import machine

Clips = list[tuple[int, int]]
"""Each as (draw, sample)."""


def fill(job: Job, signals: StopSignals) -> int:
    """Computes what the cache of `job` lacks. All processes must call it at once.

    Returns 0, or the exit status after a signal that cut it short. Raises ValueError or OSError as
    training would, and ValueError if this device's numbers depend on a clip's place in the batch.
    """
    tokens = job.tokens
    if tokens is None:
        return 0
    missing = gather(tokens.missing())[0]  # those of one moment
    shares = [missing[rank :: dist.get_world_size()] for rank in range(dist.get_world_size())]
    batches = -(-len(shares[0]) // tokens.plan.batch_size)  # the first share is the largest
    computed, bad = compute(job, shares[dist.get_rank()], signals), []
    for _ in tqdm(range(batches), "first blocks", disable=None, leave=False):
        bad += together(lambda: next(computed, []))
        if stop := max(gather(signals.received)):
            say("stopped     while data.cache_tokens was filled; what is there will be used")
            return 128 + stop
    tokens.bad = {clip for part in gather(bad) for clip in part}
    together(tokens.check)
    return 0


def compute(job: Job, clips: Clips, signals: StopSignals) -> Iterator[Clips]:
    """Computes the clips batch by batch; gives those of each that can't be decoded."""
    if not clips:
        return
    cache, size = job.tokens.cache, job.tokens.plan.batch_size
    cache.begin()
    model = frozen_start(job)
    padded = clips + clips[-1:] * (-len(clips) % size)
    batches = job.loader.of(np.array(padded)).epoch()
    for place in range(0, len(padded), size):
        with signals.not_for_children():
            batch = next(batches)
        if job.loader.bad_files:
            check_root(job.config.data)
            limit = job.config.data.max_bad_fraction
            check_bad_files(job.loader.bad_files, len(job.samples), limit)
        video = batch.video.squeeze(1).to(job.device, cache.dtype)
        found = model.image_tokens(video)
        if place == 0 and not torch.equal(model.image_tokens(video.roll(1, 0)), found.roll(1, 0)):
            raise ValueError(
                f"data.cache_tokens needs optim.micro_batch=1 on {machine(job.device)}, which "
                "rounds a clip otherwise at another place of the batch"
            )
        bad = []
        rows = zip(padded[place : place + size], batch.index.tolist(), found, strict=True)
        for clip, index, values in rows:
            if index == clip[1]:
                cache.write(job.tokens.files[clip], values)
            else:
                bad.append(clip)
        yield bad


def frozen_start(job: Job) -> VideoViT:
    """A copy of the model in the run's precision and on its device, as the engine makes one."""
    return copy.deepcopy(job.model).to(job.device, DTYPES[job.config.optim.precision])
