"""Class probabilities of videos: what validation, `evaluate`, `predict` and timelines share."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zeroi2v.data.annotations import Sample
from zeroi2v.data.views import ViewLoader
from zeroi2v.model.vit import VideoViT
from zeroi2v.processes import cores_per_process

RECURS = 4
"""Batches of one shape that are worth a CUDA graph, whose capture takes about as long as three."""


def predict(
    model: nn.Module,
    paths: list[str],
    topk: int = 5,
    progress: Callable[[int], object] | None = None,
) -> list[dict[str, Any]]:
    """The `topk` most probable classes of each video file, averaged over the model's test views.

    Args:
        model: adapted, merged or deployed (`load_deployed`), on the device to compute on.
        paths: video files in any format FFmpeg reads.
        topk: classes to name, at most `num_classes`.
        progress: called with 1 after each file.
    Returns:
        One dict per path, in order: `path` and either `topk`, a list of {label, index,
        probability} from the most probable down, or `error`, the reason it can't be decoded.
        `label` is the index as text if the model has no class names.
    Raises:
        ValueError: `topk` below 1, or the model's output contains inf or nan.
    """
    results = []
    for result in predict_each(model, [Sample(path, 0) for path in paths], topk):
        results.append(result)
        if progress is not None:
            progress(1)
    return results


def predict_each(
    model: nn.Module,
    samples: list[Sample],
    topk: int = 5,
    views: tuple[int, int] | None = None,
    batch_size: int = 8,
    share: tuple[int, int] = (0, 1),
) -> Iterator[dict[str, Any]]:
    """`predict` one by one as they are done, for files or parts of files.

    `views` are (clips, crops) of each sample; the model's test views by default. `batch_size`
    samples are computed at once. Labels of samples are not looked at. `share` is (rank,
    world size) of processes of which each computes its own batches of the samples.
    """
    if topk < 1:
        raise ValueError(f"topk must be at least 1: got {topk}")
    if not samples:
        return
    config = model.config
    parameter = next(model.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    loader = ViewLoader(
        samples,
        config,
        batch_size=min(batch_size, len(samples)),
        test=True,
        views=config.preprocess.test_views if views is None else views,
        rank=share[0],
        world_size=share[1],
        workers=default_workers(device) if len(samples) > 32 * share[1] else 0,
        device=device,
        whole=takes_frames(model),
    )
    dtype = None if isinstance(model, VideoViT) else torch.float32  # what deployed models take
    with as_graph(model, loader):
        for step, (index, probs) in enumerate(each_batch(model, loader, device, dtype)):
            if not torch.isfinite(probs).all():
                raise ValueError("model's output must be finite: got inf or nan")
            rows = dict(zip(index.tolist(), probs, strict=True))
            for i in loader.positions(step):
                path = samples[i].path
                if i in rows:
                    yield {"path": path, "topk": _top(rows[i], topk, config.labels)}
                else:
                    yield {"path": path, "error": loader.bad_files[samples[i].name]}


@contextmanager
def as_graph(model: nn.Module, loader: ViewLoader) -> Iterator[None]:
    """Within, a `VideoViT` on a GPU runs as a CUDA graph if `loader` has enough batches.

    The graph is captured before anything is decoded and serves all batches, as the loader pads the
    last one. Afterwards the model has the graphs that it had before.
    """
    if not isinstance(model, VideoViT) or loader.steps < RECURS:
        yield
        return
    kept = model.graphs
    model.accelerate(loader.batch_size * math.prod(loader.views))
    try:
        yield
    finally:
        model.graphs = kept


def predict_views(
    model: nn.Module,
    loader: Any,
    device: torch.device | str,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Tensor, Tensor]:
    """Class probabilities of every video of `loader`: the softmax of each view, averaged.

    Args:
        model: maps video [B, 3, T, H, W] to logits [B, K]; put in eval mode for the call. One that
            takes frames (`takes_frames`) maps those of whole clips to probabilities. Whether a
            `VideoViT` runs as a CUDA graph is its owner's choice (`as_graph`).
        loader: a `ViewLoader`; one epoch of it is read.
        device: where the model is; clips are moved there.
        dtype: of the clips given to the model; None takes that of the model's parameters.
        progress: called after each batch with its number of videos.
    Returns:
        index int64 [n] (position in the loader's samples) and probs float32 [n, K], both on the
        CPU. Padding and videos that could not be decoded are left out; they still take part in
        the forward pass, so that every process of a sharded run makes equally many.
    """
    indices, probs = [], []
    for index, prob in each_batch(model, loader, device, dtype):
        indices.append(index)
        probs.append(prob)
        if progress is not None:
            progress(len(index))
    return torch.cat(indices), torch.cat(probs)


@torch.no_grad()
def each_batch(
    model: nn.Module, loader: Any, device: torch.device | str, dtype: torch.dtype | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `predict_views` gives, batch by batch.

    A GPU gets a batch before the probabilities of the last one are waited for, so that it is not
    idle while the next one is read and copied.
    """
    of_frames, was_training = takes_frames(model), model.training
    if of_frames:
        dtype = torch.uint8
    dtype = dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())
    ahead = int(torch.device(device).type == "cuda")
    waiting: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()

    def done() -> tuple[Tensor, Tensor]:
        index, read = waiting.popleft()
        return index[index >= 0], read()[index >= 0]

    model.eval()
    try:
        for batch in loader.epoch():
            video = batch.video.to(device, dtype, non_blocking=True)
            out = model(video.flatten(0, 1)).float()  # [B * V, K]
            prob = out if of_frames else out.softmax(-1)
            waiting.append((batch.index, _copied(prob.unflatten(0, video.shape[:2]).mean(1))))
            if len(waiting) > ahead:
                yield done()
        while waiting:
            yield done()
    finally:
        model.train(was_training)


def _copied(tensor: Tensor) -> Callable[[], Tensor]:
    """Copies `tensor` to the CPU; what is returned waits for that, and not for later work."""
    copy = tensor.to("cpu", non_blocking=True)
    if not tensor.is_cuda:
        return lambda: copy
    event = torch.cuda.Event()
    event.record()

    def read() -> Tensor:
        event.synchronize()
        return copy

    return read


def takes_frames(model: nn.Module) -> bool:
    """Whether it was exported with its preprocessing: its loader must be `whole`."""
    return getattr(model, "takes", "clips") == "frames"


def _top(probs: torch.Tensor, topk: int, labels: tuple[str, ...]) -> list[dict[str, Any]]:
    top = probs.topk(min(topk, len(probs)))
    return [
        {"label": labels[k] if labels else str(k), "index": k, "probability": probability}
        for k, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def metrics(probs: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy in percent, and loss, of `probs` [n, K] for true classes `labels` int64 [n].

    Returns:
        loss, the cross-entropy: the mean of -ln of the true class's probability, which counts as
        1e-12 at least; top1; top5 (None below 5 classes); mean_class, the mean over the classes
        that occur of their top-1; n; confusion, a K x K list whose row is the true class.
    Raises:
        ValueError: no clips, or a probability that is not finite.
    """
    n, num_classes = probs.shape
    if n == 0:
        raise ValueError("accuracy needs at least one clip that can be decoded: got 0")
    if not torch.isfinite(probs).all():
        raise ValueError("probs must be finite: the model's output contains inf or nan")
    predicted = probs.argmax(-1)
    confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    confusion = confusion.view(num_classes, num_classes)
    per_class = confusion.sum(1)
    recall = confusion.diagonal()[per_class > 0] / per_class[per_class > 0]
    top5 = None
    if num_classes >= 5:
        top5 = 100 * (probs.topk(5).indices == labels[:, None]).any(-1).double().mean().item()
    loss = -probs.double().gather(1, labels[:, None]).clamp_min(1e-12).log().mean().item()
    return {
        "loss": loss,
        "top1": 100 * (predicted == labels).double().mean().item(),
        "top5": top5,
        "mean_class": 100 * recall.double().mean().item(),
        "n": n,
        "confusion": confusion.tolist(),
    }


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_device(name: str | None) -> torch.device:
    """The device of that name, or the default. Raises ValueError if it is not there."""
    if name is None:
        return default_device()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", "cuda", *(f"cuda:{i}" for i in range(count))] if count else ["cpu"]
    if name not in known:
        raise ValueError(f"--device must be one of {', '.join(known)}: got {name}")
    return torch.device(name)


def default_workers(device: torch.device) -> int:
    """Decoding processes for this one's share of the cores: most if a GPU does the rest."""
    cores = cores_per_process()
    return max(1, cores - 1) if device.type == "cuda" else cores // 4
