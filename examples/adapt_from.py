"""What `model.adapt_from` costs in accuracy and saves in time: `python examples/adapt_from.py`.

An image ViT of six blocks learns to name the shape in a single frame (`moving_shapes.py`), as in
the demo. Then it is adapted to tell the direction of motion, from block 0, 2 or 3 on, with several
seeds, each on clips that it sees once. Last, a training step of a ViT-S/16 is timed: all choices in
turn on the same clip, with pixels and with the first blocks' tokens given.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from moving_shapes import DIRECTIONS, SHAPES, draw, random_scene, single_frames
from torch import Tensor

from zeroi2v.config import RECIPES, ModelConfig
from zeroi2v.model.vit import VideoViT
from zeroi2v.train.config import load_config

FIRST, DEPTH = (0, 2, 3), 6
IMAGE_STEPS, VIDEO_STEPS, TEST_CLIPS = 500, 2000, 800
SMALL = ["model.depth=6", "model.width=32", "model.num_frames=4"]
Batches = Callable[[int], tuple[Tensor, Tensor]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--rounds", type=int, default=7, help="of timed steps (default: 7)")
    args = parser.parse_args()
    if args.rounds == 1:
        parser.error("--rounds must be 0 or at least 2, for quartiles: got 1")
    video = replace(load_config("demo", SMALL).model.video, labels=tuple(DIRECTIONS))
    top1: dict[int, list[float]] = {first: [] for first in FIRST} if args.seeds else {}
    for seed in args.seeds:
        image = train_image(video, seed)
        for first in FIRST:
            top1[first].append(train_video(replace(video, adapt_from=first), image, seed))
            print(f"seed {seed}, from block {first}: {top1[first][-1]:.1f} %", flush=True)
    if args.seeds:
        print("\n| first adapted block of 6 | top-1, mean | of each seed |\n|---|---|---|")
    for first, values in top1.items():
        each = ", ".join(f"{value:.1f}" for value in values)
        print(f"| {first} | {statistics.mean(values):.1f} | {each} |")
    if not args.rounds:
        return
    print("\n| first adapted block of 12 | step | from tokens |\n|---|---|---|")
    for first, (pixels, tokens) in time_steps(args.rounds).items():
        print(f"| {first} | {pixels} | {tokens} |")


def clips(config: ModelConfig, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Clips `[count, 3, T, H, W]`, normalised, and their directions."""
    labels = rng.integers(len(DIRECTIONS), size=count)
    interval = config.preprocess.interval
    frames = [draw(random_scene(rng), list(DIRECTIONS)[label], interval * config.num_frames)
              for label in labels]  # fmt: skip
    return normalised(np.stack(frames)[:, ::interval], config), torch.from_numpy(labels)


def normalised(frames: np.ndarray, config: ModelConfig) -> Tensor:
    """uint8 `[B, T, H, W, 3]` -> `[B, 3, T, H, W]`."""
    mean, std = (torch.tensor(x) for x in (config.preprocess.mean, config.preprocess.std))
    return ((torch.from_numpy(frames).float() - mean) / std).permute(0, 4, 1, 2, 3)


def train(model: VideoViT, batch: Batches, steps: int, lr: float) -> None:
    """AdamW with a one-cycle schedule; `batch(number)` gives inputs and labels of a step."""
    weights = [p for p in model.train().parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for number in range(steps):
        x, label = batch(number)
        F.cross_entropy(model(x), label).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def train_image(video: ModelConfig, seed: int) -> VideoViT:
    """An image ViT that names the shape in a frame."""
    offsets = (0,) * video.num_heads
    config = replace(video, num_frames=1, head_offsets=offsets, adapter=None,
                     num_classes=len(SHAPES), labels=SHAPES)  # fmt: skip
    torch.manual_seed(seed)
    model = VideoViT(config)

    def batch(number: int) -> tuple[Tensor, Tensor]:
        frames, shapes = single_frames(64, seed=1_000_000 * (1 + seed) + number)
        return normalised(frames[:, None], config), torch.from_numpy(shapes)

    train(model, batch, IMAGE_STEPS, 2e-3)
    return model


def train_video(config: ModelConfig, image: VideoViT, seed: int) -> float:
    """Adapts `image` to video by `config`; returns the accuracy on new clips, in percent."""
    torch.manual_seed(seed)
    model = VideoViT(config)
    kept = ("temporal_embedding", "head.")
    state = {n: t for n, t in image.state_dict().items() if not n.startswith(kept)}
    model.load_state_dict(state, strict=False)
    rng = np.random.default_rng((seed, 1))
    train(model.freeze(), lambda _: clips(config, 16, rng), VIDEO_STEPS, 3e-3)
    video, label = clips(config, TEST_CLIPS, np.random.default_rng((seed, 2)))
    with torch.no_grad():
        return 100 * (model.eval()(video).argmax(1) == label).double().mean().item()


def time_steps(rounds: int) -> dict[int, tuple[str, str]]:
    """Of a ViT-S/16 of 12 blocks by its first adapted block: processor time of a step's forward and
    backward, as a part of that from block 0 on in the same round; with pixels, and with tokens
    given. Each is the median of all rounds, and the quartiles."""
    config = replace(RECIPES["vit_b16_k400_8x16"].model, image_size=112, num_classes=10,
                     width=384, num_heads=6, head_offsets=(-1, 1, 0, 0, 0, 0))  # fmt: skip
    torch.set_num_threads(1)  # whose time is that of the process, whoever else is at work
    models = {k: VideoViT(replace(config, adapt_from=k)).freeze().train() for k in (0, 4, 6)}
    video, label = torch.randn(1, 3, 8, 112, 112), torch.tensor([1])
    times: dict[tuple[int, bool], list[float]] = {(k, t): [] for k in models for t in (False, True)}
    del times[0, True]
    for _ in range(rounds + 1):
        for (first, is_tokens), found in times.items():
            model = models[first]
            x = model.image_tokens(video) if is_tokens else video
            begun = time.process_time()
            F.cross_entropy(model(x, is_tokens=is_tokens), label).backward()
            found.append(time.process_time() - begun)
            model.zero_grad()
    whole = times[0, False][1:]  # the first round warms up
    print(f"from block 0 on: {statistics.median(whole):.2f} s a step", flush=True)

    def part(found: list[float]) -> str:
        ratios = [a / b for a, b in zip(found[1:], whole, strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return f"{median:.2f} [{low:.2f}, {high:.2f}]"

    return {k: (part(times[k, False]), part(times[k, True]) if k else "") for k in models}


if __name__ == "__main__":
    main()
