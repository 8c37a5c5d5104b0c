"""Views of videos for validation, test and prediction: every video once, in order.

A view is a clip at fixed places of the video, resized and cropped (`preprocess.py`) by the process
that decodes it, so that workers hand over little and no GPU is needed.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from zeroi2v.config import ModelConfig
from zeroi2v.data.annotations import Sample
from zeroi2v.data.clip_worker import FrameReader
from zeroi2v.data.fatal_files import find_fatal_files, without_main_program
from zeroi2v.data.packets import DecodeError
from zeroi2v.data.preprocess import crop_views, normalise
from zeroi2v.data.shared_samples import SharedSamples


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of clips."""

    video: Tensor
    """Normalised pixels, float32 [B, V, 3, T, H, W]; views are clip-major, V = 1 to train."""
    label: Tensor
    """Class, int64 [B], after mirroring where that changes it; -1 where `index` is."""
    index: Tensor
    """Position in `samples`, int64 [B]; -1 for padding and for videos that cannot be decoded."""
    target: Tensor
    """The target of training: `label`, or where clips are mixed, class probabilities, float32 [B,
    num_classes]."""


class ViewSource(FrameReader):
    """Position in the list -> the views of that video, or its whole clips if `crops` is None."""

    def __init__(
        self, samples: Sequence[Sample], short_side: int, crops: int | None, *args, **kwargs
    ):
        super().__init__(*args, **kwargs)
        self.samples, self.short_side, self.crops = samples, short_side, crops

    def __call__(self, position: int) -> Tensor | str:
        """uint8 `[clips * crops, T, side, side, 3]`, clip-major, or why there is none."""
        try:
            frames = torch.from_numpy(self.read(self.samples[position]))
        except DecodeError as error:
            return str(error)
        frames = frames.unflatten(0, (self.clips, -1))
        if self.crops is None:
            return frames
        side, process = self.config.image_size, self.config.preprocess
        views = crop_views(frames, self.short_side, side, self.crops, process)
        return views.transpose(0, 1).flatten(0, 1)


class ViewLoader:
    """Batches of the views of a list of videos, in the list's order.

    Args:
        samples: videos, or parts of them.
        config: the model's, whose preprocessing is used.
        batch_size: videos of this process in a batch. The last one is padded.
        test: resize to `test_short_side`; False: to `val_short_side`, as in validation.
        views: (clips, crops) of each video; 1 crop (centre) or 3 along the longer side.
        rank: this process among those that share the list.
        world_size: number of those processes; all make equally many batches.
        workers: processes that decode; 0: this one. They live as long as the loader.
        device: where batches are normalised and left.
        timeout: seconds after which a video that is still being decoded is a bad one.
        cache: folder that keeps whole decoded videos, which take much space there.
        whole: leave frames as they are decoded, for a model that takes those: the `video` of a
            batch, which has one sample, is uint8 `[1, clips, T, H, W, 3]`.
    Raises:
        ValueError: an argument breaks its rule.
    """

    def __init__(
        self,
        samples: list[Sample],
        config: ModelConfig,
        *,
        batch_size: int,
        test: bool = False,
        views: tuple[int, int] = (1, 1),
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        device: str | torch.device = "cpu",
        timeout: float | None = None,
        cache: str | None = None,
        whole: bool = False,
    ):
        check_arguments(batch_size, rank, world_size, workers, timeout)
        if views[0] < 1 or views[1] not in (1, 3):
            raise ValueError(f"views must be (clips >= 1, crops 1 or 3): got {views}")
        if not samples:
            raise ValueError("samples must contain a video: got none")
        self.samples, self.config, self.views = samples, config, tuple(views)
        self.batch_size = 1 if whole else batch_size
        self.rank, self.world_size, self.whole = rank, world_size, whole
        self.device = torch.device(device)
        self.workers = min(workers, len(samples))
        self.bad_files: dict[str, str] = {}
        """Names of the samples that could not be decoded so far, with the reasons."""
        process, (clips, crops) = config.preprocess, self.views
        short_side = process.test_short_side if test else process.val_short_side
        self._source = ViewSource(
            SharedSamples(samples) if self.workers else samples,
            short_side,
            None if whole else crops,
            config,
            clips=clips,
            timeout=timeout,
            cache=cache,
        )
        self._pool: ProcessPoolExecutor | None = None

    @property
    def steps(self) -> int:
        """Batches of an epoch."""
        return math.ceil(len(self.samples) / (self.batch_size * self.world_size))

    def epoch(self) -> Iterator[Batch]:
        """The batches of this process."""
        batches = [self.positions(step) for step in range(self.steps)]
        all_of_them = [position for positions in batches for position in positions]
        made = self._by_workers(all_of_them) if self.workers else map(self._source, all_of_them)
        for positions in batches:
            yield self._batch(positions, list(islice(made, len(positions))))

    def positions(self, step: int) -> range:
        """Places in `samples` of this process's batch number `step`, without its padding."""
        first = (step * self.world_size + self.rank) * self.batch_size
        return range(first, min(first + self.batch_size, len(self.samples)))

    def _batch(self, positions: range, made: list[Tensor | str]) -> Batch:
        (clips, crops), config = self.views, self.config
        count, side = clips * (1 if self.whole else crops), config.image_size
        video = [torch.zeros(count, config.num_frames, side, side, 3, dtype=torch.uint8)]
        video *= self.batch_size
        index = torch.full((self.batch_size,), -1)
        label = index.clone()
        for row, (position, views) in enumerate(zip(positions, made, strict=True)):
            sample = self.samples[position]
            if isinstance(views, str):
                self.bad_files[sample.name] = views
            else:
                video[row], index[row], label[row] = views, position, sample.label
        video = torch.stack(video)
        video = video.pin_memory() if self.device.type == "cuda" else video
        video = video.to(self.device, non_blocking=True)
        return Batch(
            video if self.whole else normalise(video, config.preprocess), label, index, label
        )

    def _by_workers(self, positions: list[int]) -> Iterator[Tensor | str]:
        """What the source makes of `positions`, in order; two batches are made ahead.

        A file that kills its decoding process is looked for, and counts as bad from now on. If
        there is none, the same is tried once more.
        """
        ahead = 2 * self.batch_size + self.workers
        todo, waiting = deque(positions), deque[tuple[int, Future]]()
        tried_again = None
        try:
            while todo or waiting:
                try:
                    while todo and len(waiting) < ahead:
                        waiting.append((todo[0], self._submit(todo[0])))
                        todo.popleft()
                    views = waiting[0][1].result()
                except (BrokenProcessPool, OSError):  # the latter while it is being taken down
                    self._end_workers()
                    again = [position for position, _ in waiting]
                    todo.extendleft(reversed(again))
                    waiting.clear()
                    fatal = find_fatal_files(self._source, again or [todo[0]])
                    if not fatal and tried_again == todo[0]:
                        raise RuntimeError("a decoding process was killed") from None
                    tried_again = todo[0]
                    self._source.fatal |= fatal
                    continue
                waiting.popleft()
                yield views if isinstance(views, str) else torch.from_numpy(views)
        finally:
            for _, future in waiting:
                future.cancel()

    def _submit(self, position: int) -> Future:
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.workers,
                multiprocessing.get_context("spawn"),
                initializer=_begin_worker,
                initargs=(pickle.dumps(self._source),),
            )
            finalize(self, self._pool.shutdown, wait=False, cancel_futures=True)
        with without_main_program():  # processes are started here
            return self._pool.submit(_make_views, position)

    def _end_workers(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._pool = None


def check_arguments(
    batch_size: int, rank: int, world_size: int, workers: int, timeout: float | None
) -> None:
    """Raises ValueError that names the value and the rule."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1: got {batch_size}")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..world_size-1: got {rank} of {world_size}")
    if workers < 0:
        raise ValueError(f"workers must not be negative: got {workers}")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout must be positive: got {timeout}")


def _begin_worker(source: bytes) -> None:
    global _source
    try:
        _source = pickle.loads(source)
    except FileNotFoundError:  # its list of samples: the loader is gone already
        os._exit(1)
    torch.set_num_threads(1)


def _make_views(position: int) -> np.ndarray | str:
    views = _source(position)
    # A tensor would come by way of /dev/shm, which containers have little of.
    return views if isinstance(views, str) else views.numpy()
