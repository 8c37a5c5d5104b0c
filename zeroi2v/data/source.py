"""What a decoding worker does: pick a sample, decode its frames, draw its augmentation.

All randomness of a clip is drawn here, from NumPy generators seeded by (seed, epoch, position in
the list), and handed on as numbers; what follows in the pipeline is deterministic. So a clip does
not depend on who decodes it or when, and a run continues from any step without saved state.
Imports neither torch nor DALI: workers start fast.
"""

from __future__ import annotations

import ctypes
import json
import math
import multiprocessing
import os
import signal
import sys
from dataclasses import dataclass, field

import numpy as np

from zeroi2v.config import ModelConfig
from zeroi2v.data.annotations import Sample
from zeroi2v.data.augment import AugmentConfig, draw_crop, draw_erasing, draw_ops
from zeroi2v.data.decode import DecodeError
from zeroi2v.data.frame_cache import read_sample
from zeroi2v.data.gop import Cut, Cutter
from zeroi2v.data.sampling import dense_indices, uniform_indices

_MAX_REPLACEMENTS = 50
_ALARM = 2
"""Time limits after which a decoding process that does not come back is ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipPlan:
    """Which clips a loader makes, in which order, and how; all that a worker needs to know."""

    samples: list[Sample]
    config: ModelConfig
    mode: str
    views: tuple[int, int]
    augment: AugmentConfig | None
    seed: int
    batch_size: int
    rank: int
    world_size: int
    accumulation: int
    timeout: float | None
    cache: str | None
    cutter: Cutter | None = None
    """What leaves frames to DALI's decoder; None: PyAV decodes all."""
    cut_unknown: bool = False
    """Whether it takes videos, too, that no manifest knows to be whole."""
    fatal: dict[str, str] = field(default_factory=dict)
    """Files that kill who decodes them, with the reasons."""

    @property
    def global_batch(self) -> int:
        """Clips of all processes in one step."""
        return self.batch_size * self.world_size * self.accumulation

    @property
    def steps(self) -> int:
        """Steps of an epoch: training leaves an incomplete last one out, testing pads it."""
        round_ = math.floor if self.mode == "train" else math.ceil
        return round_(len(self.samples) / self.global_batch)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of this process in an epoch."""
        return self.steps * self.accumulation

    def position(self, micro_batch: int, row: int = 0) -> int:
        """Place in the epoch's order of a clip of this process's micro-batch, counted from 0."""
        step, micro = divmod(micro_batch, self.accumulation)
        part = micro * self.world_size + self.rank
        return step * self.global_batch + part * self.batch_size + row

    @property
    def short_side(self) -> int:
        """Short side a frame is resized to before its crops, in pixels."""
        process = self.config.preprocess
        return process.test_short_side if self.mode == "test" else process.val_short_side


class ClipSource:
    """A callable for DALI's external source: SampleInfo -> the arrays of one clip.

    DALI's epoch 0 is training epoch `epoch` from micro-batch `start` on; those after it are whole.
    Returns (report uint8 [n], geometry int32 [1 + crops, 2], frames uint8 [F, H, W, 3]); if there
    is a cutter, (is_cut bool [], data uint8 [bytes], picks int32 [F], colours float32 [3, 3], box
    int32 [2, 2]), used in the place of `frames` if is_cut; with augmentation, mirror int32 [], and,
    as far as it asks for them, the results of `draw_ops` and `draw_erasing`. `report` is JSON:
    index, label, is_cut, bad (name of a sample -> reason). `geometry` holds the size to resize to
    and the corner (top, left) of each crop, `box` the corner and size of what is used of a frame.
    """

    def __init__(self, plan: ClipPlan, epoch: int, start: int):
        self.plan, self.epoch, self.start = plan, epoch, start
        self._order: tuple[int, np.ndarray] | None = None
        self._is_worker = False

    def __setstate__(self, state: dict) -> None:
        """Unpickled in a decoding process, which must not outlive the one it decodes for."""
        self.__dict__.update(state)
        parent = multiprocessing.parent_process()
        self._is_worker = parent is not None
        if self._is_worker and sys.platform == "linux":
            set_parent_death_signal = 1
            ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
            if os.getppid() != parent.pid:  # it has died already, while this process was starting
                os.kill(os.getpid(), signal.SIGKILL)

    def __call__(self, info) -> tuple[np.ndarray, ...]:
        plan = self.plan
        epoch = self.epoch + info.epoch_idx
        micro_batch = info.iteration + (self.start if info.epoch_idx == 0 else 0)
        if micro_batch >= plan.micro_batches:
            raise StopIteration
        position = plan.position(micro_batch, info.idx_in_batch)
        if plan.mode == "train":
            return self._train_clip(epoch, int(self._permutation(epoch)[position]))
        return self._test_clip(position)

    def _permutation(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng((self.plan.seed, epoch))
            self._order = (epoch, rng.permutation(len(self.plan.samples)))
        return self._order[1]

    def _train_clip(self, epoch: int, index: int) -> tuple[np.ndarray, ...]:
        """The clip of sample `index`, or of the first other one drawn that can be decoded."""
        plan, bad = self.plan, {}
        for attempt in range(_MAX_REPLACEMENTS):
            key = (plan.seed, epoch, 1 + index)
            sample = plan.samples[index]
            try:
                clip = self.read(sample, key)
            except DecodeError as error:
                bad[sample.name] = str(error)
                rng = np.random.default_rng((*key, 2 + attempt))
                index = int(rng.integers(len(plan.samples)))
                continue
            return self._finish(clip, index, sample.label, bad, np.random.default_rng((*key, 1)))
        return self._blank(bad)

    def _test_clip(self, position: int) -> tuple[np.ndarray, ...]:
        if position >= len(self.plan.samples):
            return self._blank({})
        sample = self.plan.samples[position]
        try:
            clip = self.read(sample, None)
        except DecodeError as error:
            return self._blank({sample.name: str(error)})
        return self._finish(clip, position, sample.label, {}, None)

    def read(self, sample: Sample, key: tuple[int, ...] | None) -> np.ndarray | Cut:
        """Frames uint8 [clips * T, H, W, 3], drawn at random if there is a `key`, or their cut."""
        plan = self.plan
        process, num_frames = plan.config.preprocess, plan.config.num_frames

        def choose(total: int) -> np.ndarray:
            rng = None if key is None else np.random.default_rng(key)
            if process.sampling == "dense":
                interval = process.interval
                indices = dense_indices(total, num_frames, interval, plan.views[0], rng)
            else:
                indices = uniform_indices(total, num_frames, plan.views[0], rng)
            return indices.ravel()

        if sample.path in plan.fatal:
            raise DecodeError(plan.fatal[sample.path])
        cutter = plan.cutter if plan.cut_unknown or sample.frames is not None else None
        if not self._is_worker or plan.timeout is None:
            return read_sample(sample, choose, plan.timeout, plan.cache, cutter)
        # Who hangs within FFmpeg sees no time limit: the alarm ends this process.
        signal.setitimer(signal.ITIMER_REAL, _ALARM * plan.timeout)
        try:
            return read_sample(sample, choose, plan.timeout, plan.cache, cutter)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _finish(self, clip: np.ndarray | Cut, index, label, bad, rng) -> tuple[np.ndarray, ...]:
        augment, is_cut = self.plan.augment, isinstance(clip, Cut)
        height, width = (clip.height, clip.width) if is_cut else clip.shape[1:3]
        box, draws = (0, 0, height, width), []
        if augment is None:
            size, corners = self._crops(height, width)
        else:
            box = draw_crop(rng, height, width, augment)
            if rng.random() < augment.flip:
                label, mirror = augment.flip_label_map.get(label, label), 1
            else:
                mirror = 0
            draws.append(np.array(mirror, np.int32))
            side = self.plan.config.image_size
            size, corners = (side, side), [(0, 0)]
            if augment.rand_augment_ops:
                draws.append(draw_ops(rng, side, augment))
            if augment.erasing:
                draws.append(draw_erasing(rng, side, augment))
        text = json.dumps({"index": index, "label": label, "is_cut": is_cut, "bad": bad})
        outputs = [np.frombuffer(text.encode(), np.uint8), np.array([size, *corners], np.int32)]
        top, left, height, width = box
        if is_cut:
            outputs.append(np.zeros((1, 1, 1, 3), np.uint8))
        else:
            crop = clip[:, top : top + height, left : left + width]
            outputs.append(np.ascontiguousarray(crop))
        if self.plan.cutter is not None:
            nothing = np.zeros(1, np.uint8), np.zeros(1, np.int32), np.eye(3, dtype=np.float32)
            cut = (clip.data, clip.frames, clip.colours) if is_cut else nothing
            outputs += [np.array(is_cut), *cut]
            outputs.append(np.array([(top, left), (height, width)], np.int32))
        return (*outputs, *draws)

    def _crops(self, height: int, width: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
        """Size of a resized frame, and the corners of its crops: centre, or 3 along its length."""
        side, short = self.plan.config.image_size, self.plan.short_side
        scale = short / min(height, width)
        height, width = (max(short, int(x * scale + 0.5)) for x in (height, width))
        free = np.array([height - side, width - side])
        places = (0.0, 0.5, 1.0) if self.plan.views[1] == 3 else (0.5,)
        long = int(width >= height)
        corners = []
        for place in places:
            corner = free // 2
            if place != 0.5:
                corner[long] = free[long] * place
            corners.append((int(corner[0]), int(corner[1])))
        return (height, width), corners

    def _blank(self, bad: dict[str, str]) -> tuple[np.ndarray, ...]:
        """Black frames of index and label -1: padding, or a video that cannot be decoded."""
        side = self.plan.config.image_size
        frames = np.zeros(
            (self.plan.views[0] * self.plan.config.num_frames, side, side, 3), np.uint8
        )
        rng = np.random.default_rng(0)
        return self._finish(frames, -1, -1, bad, rng)
