"""What a decoding worker does: pick a sample, decode its frames, draw its augmentation.

All randomness of a clip is drawn here, from NumPy generators seeded by (seed, epoch, position in
the list), and handed on as numbers; what follows in the pipeline is deterministic. So a clip does
not depend on the process that decodes it, and a run continues from any step without saved state.
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
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from zeroi2v.config import ModelConfig
from zeroi2v.data.annotations import Sample
from zeroi2v.data.augment import AugmentConfig, draw_crop, draw_erasing, draw_ops
from zeroi2v.data.frame_cache import read_sample
from zeroi2v.data.gop import Cut, Cutter
from zeroi2v.data.packets import DecodeError
from zeroi2v.data.sampling import dense_indices, uniform_indices

PREFETCH = 2
"""Micro-batches made ahead by the workers, and again by the graph."""
MAX_REPLACEMENTS = 50
_ALARM = 2
"""Time limits after which a decoding process that hangs is ended."""


class FrameReader:
    """Decodes the frames of clips. In a process of its own, it ends with the parent. `clips` is the
    number of clips of a video. Decoding fails after `timeout` seconds. `cache` is a folder that
    keeps whole decoded videos. `fatal` maps files that kill the decoding process to the reasons.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        clips: int = 1,
        timeout: float | None = None,
        cache: str | None = None,
        fatal: dict[str, str] | None = None,
    ):
        self.config, self.clips = config, clips
        self.timeout, self.cache = timeout, cache
        self.fatal = fatal or {}
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

    def read(
        self, sample: Sample, key: tuple[int, ...] | None = None, cutter: Cutter | None = None
    ) -> np.ndarray | Cut:
        """Frames uint8 [clips * T, H, W, 3], drawn at random if there is a `key`.

        With a `cutter`, a video that DALI's decoder takes comes as a cut. Raises DecodeError.
        """
        process, num_frames = self.config.preprocess, self.config.num_frames

        def choose(total: int) -> np.ndarray:
            rng = None if key is None else np.random.default_rng(key)
            if process.sampling == "dense":
                interval = process.interval
                indices = dense_indices(total, num_frames, interval, self.clips, rng)
            else:
                indices = uniform_indices(total, num_frames, self.clips, rng)
            return indices.ravel()

        if sample.path in self.fatal:
            raise DecodeError(self.fatal[sample.path])
        limited = self._is_worker and self.timeout is not None and hasattr(signal, "setitimer")
        if not limited:
            return read_sample(sample, choose, self.timeout, self.cache, cutter)
        # Code that hangs within FFmpeg sees no time limit: the alarm ends this process.
        signal.setitimer(signal.ITIMER_REAL, _ALARM * self.timeout)
        try:
            return read_sample(sample, choose, self.timeout, self.cache, cutter)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipPlan:
    """Which training clips a loader makes, in which order, and how; all that a worker needs."""

    samples: Sequence[Sample]
    config: ModelConfig
    augment: AugmentConfig | None
    seed: int
    batch_size: int
    rank: int
    world_size: int
    accumulation: int
    timeout: float | None
    cache: str | None
    cutter: Cutter | None = None
    """Chooses what DALI's decoder decodes; None: PyAV decodes everything."""
    cut_unknown: bool = False
    """Whether it also takes videos that no manifest knows to be whole."""
    fatal: dict[str, str] = field(default_factory=dict)
    """Files that kill the decoding process, with the reasons."""
    clips: int | None = None
    """Different clips of a video, which the epochs take in turn; None: each epoch draws anew."""
    order: np.ndarray | None = None
    """Which clips there are, int64 [n, 2] of (draw, sample); None: all samples, shuffled."""

    def draw(self, epoch: int) -> int:
        """The number of the draw of clips that an epoch takes."""
        return epoch if self.clips is None else epoch % self.clips

    def key(self, draw: int, index: int) -> tuple[int, int, int]:
        """What seeds all that is random in that draw of a sample's clip."""
        return self.seed, draw, 1 + index

    def shuffled(self, epoch: int) -> np.ndarray:
        """The samples in the order of an epoch, int64 [n]."""
        return np.random.default_rng((self.seed, epoch)).permutation(len(self.samples))

    def replacement(self, draw: int, index: int, attempt: int) -> int:
        """The sample in place of one that can't be decoded; `attempt` counts from 0."""
        rng = np.random.default_rng((*self.key(draw, index), 2 + attempt))
        return int(rng.integers(len(self.samples)))

    @property
    def arrays(self) -> dict[str, type]:
        """Name and element type of each array that makes a clip, in the order of the graph's input.

        Shapes and contents:

            report    [bytes]         JSON: index, label, is_cut, bad (name of a sample -> reason)
            geometry  [2, 2]          the size to resize to, and the corner (top, left) of the crop
            frames    [T, H, W, 3]
            is_cut    []              whether DALI's decoder makes the frames, of what follows:
            data      [bytes]         the part of the video's file
            picks     [T]             numbers of the frames in it
            colours   [3, 3]          what puts its colours right
            box       [2, 2]          corner and size of what is used of a frame
            mirror    []              1 to mirror the clip
            ops       `draw_ops`
            erasing   `draw_erasing`
        """
        found = dict(report=np.uint8, geometry=np.int32, frames=np.uint8)
        if self.cutter is not None:
            found |= dict(is_cut=np.bool_, data=np.uint8, picks=np.int32)
            found |= dict(colours=np.float32, box=np.int32)
        if self.augment is not None:
            found |= dict(mirror=np.int32)
            found |= dict(ops=np.float32) if self.augment.rand_augment_ops else {}
            found |= dict(erasing=np.float32) if self.augment.erasing else {}
        return found

    @property
    def global_batch(self) -> int:
        """Clips of all processes in one step."""
        return self.batch_size * self.world_size * self.accumulation

    @property
    def steps(self) -> int:
        """Steps of an epoch; an incomplete last one is left out."""
        count = len(self.samples if self.order is None else self.order)
        return count // self.global_batch

    @property
    def micro_batches(self) -> int:
        """Micro-batches of this process in an epoch."""
        return self.steps * self.accumulation

    @property
    def clip_bytes(self) -> int:
        """Shared memory that a clip of a 344 x 256 video takes."""
        return self.config.num_frames * 256 * 344 * 3

    def shared_bytes(self, workers: int) -> int:
        """Bytes of /dev/shm that DALI takes before its first batch, for that many workers."""
        at_once = math.ceil(self.batch_size / workers)
        return 2 * PREFETCH * workers * max(2**20, at_once * self.clip_bytes)

    def position(self, micro_batch: int, row: int = 0) -> int:
        """Place in the epoch's order of a clip of this process's micro-batch, counted from 0."""
        step, micro = divmod(micro_batch, self.accumulation)
        part = micro * self.world_size + self.rank
        return step * self.global_batch + part * self.batch_size + row


class ClipSource(FrameReader):
    """A callable for DALI's external source: SampleInfo -> `plan.arrays` of one clip.

    DALI's epoch 0 is training epoch `epoch` from micro-batch `start` on; those after it are whole.
    """

    def __init__(self, plan: ClipPlan, epoch: int, start: int):
        super().__init__(plan.config, timeout=plan.timeout, cache=plan.cache, fatal=plan.fatal)
        self.plan, self.epoch, self.start = plan, epoch, start
        self._shuffled: tuple[int, np.ndarray] | None = None

    def __call__(self, info) -> tuple[np.ndarray, ...]:
        plan = self.plan
        epoch = self.epoch + info.epoch_idx
        micro_batch = info.iteration + (self.start if info.epoch_idx == 0 else 0)
        if micro_batch >= plan.micro_batches:
            raise StopIteration
        position = plan.position(micro_batch, info.idx_in_batch)
        return self._clip(*self._chosen(epoch, position))

    def _chosen(self, epoch: int, position: int) -> tuple[int, int]:
        """Draw and sample of the clip at that place in the epoch's order."""
        plan = self.plan
        if plan.order is not None:
            draw, index = plan.order[position]
            return int(draw), int(index)
        if self._shuffled is None or self._shuffled[0] != epoch:
            self._shuffled = (epoch, plan.shuffled(epoch))
        return plan.draw(epoch), int(self._shuffled[1][position])

    def _clip(self, draw: int, index: int) -> tuple[np.ndarray, ...]:
        """The clip of sample `index`, or of the first replacement that can be decoded."""
        plan, bad = self.plan, {}
        for attempt in range(MAX_REPLACEMENTS):
            key = plan.key(draw, index)
            sample = plan.samples[index]
            is_whole = sample.frames is not None  # as a manifest found it
            try:
                clip = self.read(sample, key, plan.cutter if plan.cut_unknown or is_whole else None)
            except DecodeError as error:
                bad[sample.name] = str(error)
                index = plan.replacement(draw, index, attempt)
                continue
            return self._finish(clip, index, sample.label, bad, np.random.default_rng((*key, 1)))
        side = plan.config.image_size
        black = np.zeros((plan.config.num_frames, side, side, 3), np.uint8)
        return self._finish(black, -1, -1, bad, np.random.default_rng(0))

    def _finish(self, clip: np.ndarray | Cut, index, label, bad, rng) -> tuple[np.ndarray, ...]:
        augment, is_cut = self.plan.augment, isinstance(clip, Cut)
        height, width = (clip.height, clip.width) if is_cut else clip.shape[1:3]
        box, made = (0, 0, height, width), {}
        side = self.plan.config.image_size
        if augment is None:
            short = self.plan.config.preprocess.val_short_side
            scale = short / min(height, width)
            size = [max(short, int(x * scale + 0.5)) for x in (height, width)]
            corner = [(x - side) // 2 for x in size]
        else:
            box = draw_crop(rng, height, width, augment)
            made["mirror"] = rng.random() < augment.flip
            if made["mirror"]:
                label = augment.flip_label_map.get(label, label)
            size, corner = (side, side), (0, 0)
            if augment.rand_augment_ops:
                made["ops"] = draw_ops(rng, side, augment)
            if augment.erasing:
                made["erasing"] = draw_erasing(rng, side, augment)
        text = json.dumps({"index": index, "label": label, "is_cut": is_cut, "bad": bad})
        top, left, height, width = box
        made |= dict(
            report=np.frombuffer(text.encode(), np.uint8),
            geometry=(size, corner),
            frames=np.zeros((1, 1, 1, 3), np.uint8)
            if is_cut
            else clip[:, top : top + height, left : left + width],
            is_cut=is_cut,
            data=clip.data if is_cut else [0],
            picks=clip.frames if is_cut else [0],
            colours=clip.colours if is_cut else np.eye(3),
            box=((top, left), (height, width)),
        )
        arrays = self.plan.arrays.items()
        return tuple(np.asarray(made[name], dtype, order="C") for name, dtype in arrays)
