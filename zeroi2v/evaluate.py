"""Accuracy of a model on a list of videos.

    python -m zeroi2v.evaluate FOLDER --list FILE --root DIR [--views 3x1] [--out JSON]

What can't be decoded is named and left out; more of it than `--max-bad-fraction` is a failure.
`predict_views` and `metrics` are what validation during training, `evaluate` and `predict` share.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from zeroi2v.checkpoint import check_writable, fetch, model_folder, write_whole
from zeroi2v.cli import run, usable_cores
from zeroi2v.data.annotations import Sample, read_list
from zeroi2v.data.classes import occurrence, some
from zeroi2v.data.video_files import left_out
from zeroi2v.data.views import ViewLoader
from zeroi2v.deployed import load_deployed
from zeroi2v.figures import draw_confusion
from zeroi2v.model import VideoViT


@torch.no_grad()
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
            takes frames (`takes_frames`) maps those of whole clips to probabilities.
        loader: a `ViewLoader`; one epoch of it is read.
        device: where the model is; clips are moved there.
        dtype: of the clips given to the model; None takes that of the model's parameters.
        progress: called after each batch with the number of videos it held.
    Returns:
        index int64 [n] (position in the loader's samples) and probs float32 [n, K], both on the
        CPU. Padding and videos that could not be decoded are left out; they still take part in
        the forward pass, so that every process of a sharded run makes equally many.
    """
    of_frames = takes_frames(model)
    if of_frames:
        dtype = torch.uint8
    dtype = dtype or next(p.dtype for p in model.parameters() if p.is_floating_point())
    was_training = model.training
    model.eval()
    indices, probs = [], []
    try:
        for batch in loader.epoch():
            video = batch.video.to(device, dtype, non_blocking=True)
            out = model(video.flatten(0, 1)).float()  # [B * V, K]
            prob = out if of_frames else out.softmax(-1)
            prob = prob.unflatten(0, video.shape[:2]).mean(1).cpu()
            index = batch.index.cpu()
            kept = index >= 0
            indices.append(index[kept])
            probs.append(prob[kept])
            if progress is not None:
                progress(int(kept.sum()))
    finally:
        model.train(was_training)
    return torch.cat(indices), torch.cat(probs)


def takes_frames(model: nn.Module) -> bool:
    """Whether it was exported with its preprocessing: its loader must be `whole`."""
    return getattr(model, "takes", "clips") == "frames"


def metrics(probs: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy in percent of `probs` [n, K] for true classes `labels` int64 [n].

    Returns:
        top1; top5 (None below 5 classes); mean_class, the mean over the classes that occur of
        their top-1; n; confusion, a K x K list whose row is the true class.
    Raises:
        ValueError: no clips, or a probability that is not finite.
    """
    n, num_classes = probs.shape
    if n == 0:
        raise ValueError("accuracy needs at least one clip that can be decoded: got 0")
    if not torch.isfinite(probs).all():
        raise ValueError("probs must be finite: the model's output holds inf or nan")
    predicted = probs.argmax(-1)
    confusion = torch.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    confusion = confusion.view(num_classes, num_classes)
    per_class = confusion.sum(1)
    recall = confusion.diagonal()[per_class > 0] / per_class[per_class > 0]
    top5 = None
    if num_classes >= 5:
        top5 = 100 * (probs.topk(5).indices == labels[:, None]).any(-1).double().mean().item()
    return {
        "top1": 100 * (predicted == labels).double().mean().item(),
        "top5": top5,
        "mean_class": 100 * recall.double().mean().item(),
        "n": n,
        "confusion": confusion.tolist(),
    }


def default_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_workers(device: torch.device) -> int:
    """Decoding processes: most of the cores if a GPU does the rest."""
    cores = usable_cores()
    return max(1, cores - 1) if device.type == "cuda" else cores // 4


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m zeroi2v.evaluate",
        description="Accuracy of a model, adapted, merged or exported, on a list of videos.",
    )
    parser.add_argument("model", help="model or run folder, .onnx or .pt2 file, or name on the hub")
    parser.add_argument("--list", required=True, help="text list, CSV or folder per class")
    parser.add_argument("--root", help="folder the list's paths are relative to")
    parser.add_argument("--views", help="CLIPSxCROPS, such as 3x1 (default: the model's own)")
    parser.add_argument("--batch-size", type=int, default=8, help="videos at once (default: 8)")
    parser.add_argument("--workers", type=int, help="decoding processes (default: by the machine)")
    parser.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of the list that may fail to decode (default: 0.01)",
    )
    parser.add_argument(
        "--out", help="JSON file of the figures; predictions and confusion matrix go beside it"
    )
    args = parser.parse_args(argv)
    if not 0 <= args.max_bad_fraction <= 1:
        raise ValueError(f"--max-bad-fraction must be in [0, 1]: got {args.max_bad_fraction:g}")

    device = default_device()
    source = fetch(args.model)
    model = load_deployed(source, device)
    config, native = model.config, isinstance(model, VideoViT)
    views = config.preprocess.test_views if args.views is None else parse_views(args.views)
    if takes_frames(model) and views[1] != config.preprocess.test_views[1]:
        raise ValueError(
            f"--views must have {config.preprocess.test_views[1]} crops, which {args.model} makes "
            f"itself: got {views[1]}"
        )
    samples = read_list(args.list, args.root, config.num_classes, config.labels)
    out = None if args.out is None else check_output_file(args.out)
    loader = ViewLoader(
        samples,
        config,
        batch_size=args.batch_size,
        test=True,
        views=views,
        workers=default_workers(device) if args.workers is None else args.workers,
        device=device,
        whole=takes_frames(model),
    )

    started = time.perf_counter()
    with tqdm(total=len(samples), desc="evaluate", unit="video", disable=None) as bar:
        dtype = None if native else torch.float32  # what deployed models take
        index, probs = predict_views(model, loader, device, dtype, bar.update)
    seconds = time.perf_counter() - started
    for reason in loader.bad_files.values():
        print(f"can't be decoded: {reason}")
    figures = metrics(probs, torch.tensor([s.label for s in samples])[index])
    undecodable = len(samples) - figures["n"]

    name = model_folder(source) if native else source
    kind = ("adapted" if config.adapter else "merged or plain") if native else "deployed"
    print(f"model        {name} ({kind})")
    print(f"views        {views[0]} clips x {views[1]} crops, softmax averaged")
    for line in occurrence((s.label for s in samples), config.num_classes, config.labels):
        print(f"classes      {line}")
    if others := left_out(args.list):
        print(f"no videos    {some(others)}")
    print(f"videos       {figures['n']} in {seconds:.1f} s", end="")
    print(f"; {undecodable} undecodable, left out of the accuracy" if undecodable else "")
    for key, title in (("top1", "top-1"), ("top5", "top-5"), ("mean_class", "mean class")):
        if figures[key] is not None:
            print(f"{title:<12} {figures[key]:6.2f} %")
    if out is not None:
        write_predictions(beside(out, "predictions.jsonl"), samples, index, probs, loader.bad_files)
        draw_confusion(beside(out, "confusion.png"), figures["confusion"], config.labels)
        report = {
            "model": str(name),
            "list": args.list,
            "views": list(views),
            **figures,
            "undecodable": loader.bad_files,
            "labels": config.labels,
        }
        write_whole(out, json.dumps(report, indent=1) + "\n")
        beside_it = beside(out, "predictions.jsonl"), beside(out, "confusion.png")
        print(f"written      {out}, {beside_it[0]}, {beside_it[1]}")
    if undecodable > args.max_bad_fraction * len(samples):
        raise ValueError(
            f"bad videos must be at most --max-bad-fraction {args.max_bad_fraction:g} of "
            f"{len(samples)}: got {undecodable}, named above; leave them out of the list, or "
            "raise --max-bad-fraction if the rest is what you mean to measure"
        )


def parse_views(text: str) -> tuple[int, int]:
    """`"3x1"` -> (3, 1): clips per video and crops per clip. Raises ValueError."""
    match = re.fullmatch(r"([1-9]\d*)x([13])", text)
    if not match:
        raise ValueError(f"--views must be CLIPSxCROPS, with 1 or 3 crops: got {text!r}")
    return int(match[1]), int(match[2])


def check_output_file(path: str | Path) -> Path:
    """`path`, its folder made and proven writable. Raises OSError or ValueError if it is not."""
    path = Path(path)
    if path.is_dir() or path.suffix != ".json":
        raise ValueError(f"--out must be a .json file: got {path}")
    return check_writable(path, "--out")


def beside(out: Path, name: str) -> Path:
    """`eval.json` -> `eval_<name>` in the same folder, so that two evaluations may share one."""
    return out.with_name(f"{out.stem}_{name}")


def write_predictions(
    path: Path, samples: list[Sample], index: Tensor, probs: Tensor, bad_files: dict[str, str]
) -> None:
    """Writes one JSON line per sample: its path, label and the top classes, or the error."""
    rows = dict(zip(index.tolist(), probs, strict=True))
    lines = []
    for i, sample in enumerate(samples):
        line: dict[str, Any] = {"path": sample.path, "label": sample.label}
        if sample.start is not None or sample.end is not None:
            line |= {"start": sample.start, "end": sample.end}
        if i in rows:
            top = rows[i].topk(min(5, len(rows[i])))
            line["predicted"] = int(top.indices[0])
            line["probability"] = round(float(top.values[0]), 6)
            line["top5"] = top.indices.tolist()
        else:
            line["error"] = bad_files[sample.name]
        lines.append(json.dumps(line) + "\n")
    write_whole(path, "".join(lines))


if __name__ == "__main__":
    sys.exit(run(main))
