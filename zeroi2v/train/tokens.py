"""What the frozen first blocks make of the training clips: computed once, read in every epoch.

    data.cache_tokens/KEY/about.json    what KEY is a hash of: all that the numbers depend on
    data.cache_tokens/KEY/CLIP.tokens   of one clip: values [T, N, C], then their CRC-32

KEY stands for weights, model, preprocessing, precision, batch, machine and versions, CLIP for the
file of the video, the part of it and the draw of the frames. So what was kept for other weights or
another video is never found. Files are there whole or not at all, and are never changed.

A run gives the same bits as without the cache. For that, clips are computed in batches of the run's
own size, and it is proved first that a clip's numbers do not depend on its place in the batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from torch import Tensor

from zeroi2v import __version__
from zeroi2v.data.annotations import Sample
from zeroi2v.data.clip_worker import MAX_REPLACEMENTS
from zeroi2v.data.pipeline import ClipLoader
from zeroi2v.data.views import Batch
from zeroi2v.model.vit import VideoViT
from zeroi2v.reparam import DTYPES
from zeroi2v.storage.checkpoint import weights_hash
from zeroi2v.train.config import RunConfig

AHEAD = 2
"""Micro-batches that are read while the model computes."""
_UNITS = {9: "GB", 6: "MB", 3: "kB"}
_AFTER = {"depth", "head_offsets", "adapter", "pooling", "pool_heads", "pool_mlp_ratio"}
_AFTER |= {"num_classes", "labels", "head_dropout"}
"""Fields of a model that its first blocks know nothing of."""


class TokenCache:
    """The files of one KEY, which is made of `about`; of clips `[T, N, C]` in `dtype`."""

    def __init__(
        self, folder: str, about: dict[str, Any], shape: tuple[int, int, int], dtype: torch.dtype
    ):
        self.about = json.dumps(about, indent=1, sort_keys=True)
        self.folder = Path(folder) / hashlib.sha256(self.about.encode()).hexdigest()[:16]
        self.shape, self.dtype = shape, dtype
        self.file_bytes = math.prod(shape) * dtype.itemsize + 4

    def file(self, identity: tuple, key: tuple[int, ...]) -> Path:
        """Where the clip is, or will be: of the video that is `identity`, drawn by `key`."""
        digest = hashlib.sha256(repr((identity, key)).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.tokens"

    def held(self) -> set[str]:
        """Names of the files that are there."""
        if not self.folder.is_dir():
            return set()
        files = os.scandir(self.folder)
        return {entry.name for entry in files if entry.stat().st_size == self.file_bytes}

    def free(self) -> int:
        """Bytes that are free where the files go."""
        there = next(path for path in (self.folder, *self.folder.absolute().parents)
                     if path.exists())  # fmt: skip
        return shutil.disk_usage(there).free

    def begin(self) -> None:
        """Makes the folder. Raises OSError if that can't be."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(
                f"data.cache_tokens must be writable: got {self.folder} ({error.strerror})"
            ) from None
        self._put(self.folder / "about.json", f"{self.about}\n".encode())

    def write(self, file: Path, tokens: Tensor) -> None:
        """Puts `tokens [T, N, C]` into `file`. Raises OSError if the disk can't take them."""
        self._put(file, self.packed(tokens))

    def _put(self, file: Path, content: bytes) -> None:
        """Another run may write the same file meanwhile: the name until then is of this one."""
        temporary = None
        try:
            number, temporary = tempfile.mkstemp(dir=self.folder, prefix=".")
            with open(number, "wb") as stream:
                stream.write(content)
            os.replace(temporary, file)
        except OSError as error:
            if temporary is not None:
                os.unlink(temporary)
            reason = error.strerror
            raise OSError(f"data.cache_tokens must be writable: got {file} ({reason})") from None

    def packed(self, tokens: Tensor) -> bytes:
        """The content of their file."""
        values = tokens.to("cpu").contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return values + zlib.crc32(values).to_bytes(4, "little")

    def read(self, file: Path) -> Tensor:
        """What `write` put into `file`. Raises OSError or ValueError if it is gone or damaged."""
        return self.parsed(file.read_bytes(), file)

    def parsed(self, content: bytes, file: Path) -> Tensor:
        """The tokens in the `content` of `file`. Raises ValueError if it is damaged."""
        values = memoryview(content)[:-4]
        whole = len(content) == self.file_bytes
        if not whole or zlib.crc32(values) != int.from_bytes(content[-4:], "little"):
            raise ValueError(f"data.cache_tokens: {file} is damaged: delete it and start again")
        return torch.frombuffer(bytearray(values), dtype=self.dtype).view(self.shape)


class TokenLoader:
    """Batches as those of `loader`, of tokens `[B, 1, T, N, C]` instead of pixels.

    `bad` are the clips, as (draw, sample), that could not be decoded; `fill.py` finds them.
    """

    def __init__(self, cache: TokenCache, loader: ClipLoader, epochs: int):
        self.cache, self.plan = cache, loader.plan
        self.bad: set[tuple[int, int]] = set()
        self.files: dict[tuple[int, int], Path] = {}
        for index, sample in enumerate(self.plan.samples):
            identity = identity_of(sample)
            for draw in range(min(self.plan.clips, epochs)):
                self.files[draw, index] = cache.file(identity, self.plan.key(draw, index))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.plan.steps

    def missing(self) -> list[tuple[int, int]]:
        """The clips, as (draw, sample), whose file is not there."""
        held = self.cache.held()
        return [clip for clip, file in self.files.items() if file.name not in held]

    def size(self) -> str:
        """What it takes, in words. Raises ValueError if the disk has not so much."""
        count, each = len(self.files), self.cache.file_bytes
        missing, free = len(self.missing()), self.cache.free()
        told = (
            f"{count:,} clips of {size_of(each)} in {self.cache.folder}: {size_of(count * each)}, "
            f"{size_of((count - missing) * each)} of it there"
        )
        if missing * each > free:
            raise ValueError(
                f"data.cache_tokens needs {size_of(missing * each)} more, and {size_of(free)} is "
                f"free: {told}"
            )
        return f"{told}; {size_of(free)} is free"

    def check(self) -> None:
        """Raises ValueError if a clip is not here that some process has computed."""
        if lost := set(self.missing()) - self.bad:
            file = self.files[min(lost)]
            raise ValueError(
                f"data.cache_tokens must be one folder for all processes, on one kind of machine: "
                f"{file} and {len(lost) - 1} others are not there"
            )

    def epoch(self, epoch: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """The micro-batches of an epoch, from step `start_step` on, as `ClipLoader.epoch`."""
        plan = self.plan
        numbers = iter(range(start_step * plan.accumulation, plan.micro_batches))
        read = partial(self._batch, plan.draw(epoch), plan.shuffled(epoch))
        with ThreadPoolExecutor(1) as reader:
            ahead = deque(reader.submit(read, number) for number in islice(numbers, AHEAD))
            while ahead:
                batch = ahead.popleft().result()
                ahead.extend(reader.submit(read, number) for number in islice(numbers, 1))
                yield batch

    def _batch(self, draw: int, shuffled: np.ndarray, number: int) -> Batch:
        places = [self.plan.position(number, row) for row in range(self.plan.batch_size)]
        chosen = [self._decodable(draw, int(shuffled[place])) for place in places]
        tokens = torch.stack([self.cache.read(self.files[draw, index]) for index in chosen])
        label = torch.tensor([self.plan.samples[index].label for index in chosen])
        return Batch(tokens.unsqueeze(1), label, torch.tensor(chosen), label)

    def _decodable(self, draw: int, index: int) -> int:
        """The sample itself or what `ClipLoader` takes in its place."""
        for attempt in range(MAX_REPLACEMENTS):
            if (draw, index) not in self.bad:
                return index
            index = self.plan.replacement(draw, index, attempt)
        raise ValueError(f"samples must contain videos that decode: got {len(self.bad)} bad ones")


def size_of(count: int) -> str:
    """Bytes in words, such as "4.84 MB"."""
    unit = next((n for n in (9, 6) if count >= 10**n), 3)
    return f"{count / 10**unit:,.2f} {_UNITS[unit]}"


def identity_of(sample: Sample) -> tuple:
    """What tells a video from others and from itself before it was changed."""
    path = Path(os.path.abspath(sample.path))
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns)
             for file in files if file.exists()]  # fmt: skip
    part = sample.start, sample.end, sample.span, sample.filename_tmpl, sample.frames
    return str(path), *facts, *part


def token_loader(config: RunConfig, model: VideoViT, loader: ClipLoader) -> TokenLoader | None:
    """The cache that `config` asks for, whose files are still to be made; None for none.

    Raises ValueError if the disk can't take it.
    """
    if config.data.cache_tokens is None:
        return None
    import nvidia.dali  # an extra, asked for by name before

    video, dtype = model.config, DTYPES[config.optim.precision]
    about = {
        "weights": weights_hash(dict(model.image_parameters())),
        "model": {k: v for k, v in video.to_dict().items() if k not in _AFTER},
        "precision": config.optim.precision,
        "tf32": config.optim.tf32,
        "clips at once": loader.plan.batch_size,
        "decoder": loader.decoder,
        "machine": machine(loader.device),
        "threads": torch.get_num_threads(),
        "zeroi2v": __version__,
        "torch": torch.__version__,
        "av": av.__version__,
        "dali": nvidia.dali.__version__,
    }
    shape = (video.num_frames, video.num_tokens, video.width)
    cache = TokenCache(config.data.cache_tokens, about, shape, dtype)
    return TokenLoader(cache, loader, config.optim.epochs)


def machine(device: torch.device) -> str:
    """What computes, by name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    about = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*: (.*)", about.read_text()) if about.exists() else None
    return f"{name[1] if name else 'CPU'}, {torch.backends.cpu.get_cpu_capability()}"
