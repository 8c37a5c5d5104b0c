"""A look at single videos after a run: what its model answers, those it has and hasn't trained on.

Training and validation videos are looked at alike: the centre crop, nothing random, no dropout. So
their losses may be compared, which the loss of a training step may not.
"""

from __future__ import annotations

import base64
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zeroi2v.data.annotations import Sample, read_list
from zeroi2v.data.views import ViewLoader
from zeroi2v.drawing.preview import write_preview
from zeroi2v.inference import default_device, predict_views
from zeroi2v.model.vit import VideoViT
from zeroi2v.storage.checkpoint import load, model_folder
from zeroi2v.train.config import RunConfig

VIDEOS = 32
"""Of each list that are looked at, drawn with the run's seed."""
SECONDS = 60.0
"""For each list: then it stops, with what it has."""
SHOWN = 3
"""Videos with a right answer, and as many with a wrong one, that are shown."""
CLIP_SECONDS = 6.0


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model answers for some videos of a list."""

    samples: list[Sample]
    probs: Tensor
    """float32 `[n, K]`."""
    total: int
    """Videos in the list."""

    @property
    def labels(self) -> Tensor:
        return torch.tensor([sample.label for sample in self.samples])

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats."""
        own = self.probs.gather(1, self.labels[:, None])
        return -own.clamp_min(1e-12).log().mean().item()

    @property
    def top1(self) -> float:
        """Percent of the videos whose class is the most probable one."""
        return 100 * (self.probs.argmax(1) == self.labels).double().mean().item()


def answers(model: VideoViT, samples: list[Sample], seed: int) -> Answers:
    """What the model answers for up to `VIDEOS` of the samples, those that decode in time.

    Raises ValueError if none does.
    """
    device, ends = next(model.parameters()).device, time.monotonic() + SECONDS
    drawn = np.random.default_rng(seed).permutation(len(samples))[:VIDEOS]
    chosen, probs = [], []
    for i in drawn:
        loader = ViewLoader([samples[i]], model.config, batch_size=1, timeout=SECONDS)
        index, one = predict_views(model, loader, device)
        if len(index):
            chosen.append(samples[i])
            probs.append(one)
        if time.monotonic() > ends:
            break
    if not chosen:
        raise ValueError("none of the videos can be decoded")
    return Answers(chosen, torch.cat(probs), len(samples))


def look(folder: Path, config: RunConfig) -> tuple[dict[str, Answers], int]:
    """Answers of the run's best (else last) model for its lists: `train`, and `val` if it has one;
    and how many validation videos are files that are trained on too.

    Raises ValueError or OSError if the model, the lists or the videos are no longer there.
    """
    model = load(model_folder(folder)).to(default_device())
    data, found, files = config.data, {}, {}
    val_root = data.root if data.val_root is None else data.val_root
    lists = {"train": (data.train_list, data.root), "val": (data.val_list, val_root)}
    for name, (source, root) in lists.items():
        if source is not None:
            samples = read_list(
                source, root, model.config.num_classes, model.config.labels, data.filename_tmpl
            )
            found[name] = answers(model, samples, config.run.seed)
            files[name] = [os.path.realpath(sample.path) for sample in samples]
    both = set(files["train"]) & set(files.get("val", ()))
    return found, sum(file in both for file in files.get("val", ()))


def films(found: Answers, names: tuple[str, ...]) -> list[dict[str, Any]]:
    """Short films of videos with wrong answers, the surest first, and of such with right ones.

    Each has `film` (a data URI), `name`, `truth`, `right`, and the three best `answers` as (label,
    percent). Videos that are folders of images are left out.
    """
    best = found.probs.max(1)
    order = best.values.argsort(descending=True).tolist()
    right = (best.indices == found.labels).tolist()
    shown: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for wanted in (False, True):
            count = 0
            for i in (i for i in order if right[i] == wanted):
                sample, out = found.samples[i], Path(folder) / "film.mp4"
                length = CLIP_SECONDS
                if sample.end is not None:
                    length = min(length, sample.end - (sample.start or 0.0))
                try:
                    write_preview(sample.path, out, side=240, rate=10, start=sample.start or 0.0,
                                  seconds=length, timeout=SECONDS, quality=32)  # fmt: skip
                except ValueError:
                    continue
                top = found.probs[i].topk(min(3, found.probs.shape[1]))
                pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
                shown.append({
                    "film": "data:video/mp4;base64," + base64.b64encode(out.read_bytes()).decode(),
                    "name": Path(sample.path).name,
                    "truth": names[sample.label],
                    "right": wanted,
                    "answers": [(names[k], 100 * p) for k, p in pairs],
                })  # fmt: skip
                count += 1
                if count == SHOWN:
                    break
    return shown
