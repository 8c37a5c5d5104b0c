"""A training step, forward and backward, with the training block and with plain autograd.

Contestants: `naive`, the block as the paper and CLIP write it, keys and values cloned and shifted,
with autograd; and the three policies of the training block. All run the same frozen ViT-B/16 or
ViT-L/14 with trainable adapters at 8 frames: one clip on a CPU, batches on a GPU. Before any is
timed, all must give the gradients of plain autograd in float64. Peak memory is what was allocated
above the weights; on a CPU it is counted event by event, so it has no noise.

On a GPU, as on a CPU: `pytest bench/bench_training_block.py --benchmark`.
"""

import copy
import dataclasses
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from bench.baselines.naive_block import naive_block
from bench.cases import WHERE, adapted_model
from zeroi2v import RECIPES, VideoViT
from zeroi2v.reparam import seeded_clips

POLICIES = ("save", "lean", "recompute")
CASES = {  # recipe and clips
    "cpu": [("vit_b16_k400_8x16", 1), ("vit_l14_k400_8x16", 1)],
    "cuda": [("vit_b16_k400_8x16", 16), ("vit_l14_k400_8x16", 8)],
}[WHERE]
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}[WHERE]
"""In which a step is timed."""
GOALS = {
    "cpu": {
        "save float32 / naive float32": 0.95,
        "lean bfloat16 / naive float32": 0.6,
        "peak of lean bfloat16 / naive float32": 0.35,
        "peak of lean float32 / naive float32": 0.6,
        "peak of recompute float32 / naive float32": 0.15,
    },
    "cuda": {
        "lean bfloat16 / naive bfloat16": 0.5,
        "peak of lean bfloat16 / naive bfloat16": 0.4,
    },
}


@pytest.mark.timeout(7200)
@pytest.mark.parametrize("recipe, clips", CASES)
def bench_training_block(recipe, clips, compare, timed, device):
    config = RECIPES[recipe].model
    few = dict(depth=2, image_size=4 * config.patch_size, num_frames=2)
    few["width"] = 16 * config.num_heads
    small = {} if timed else few  # enough to check
    config = dataclasses.replace(config, head_dropout=0.0, **small)
    models = {"float32": adapted_model(config, device).freeze().train()}
    models["bfloat16"] = copy.deepcopy(models["float32"]).bfloat16()
    video = seeded_clips(models["float32"], count=clips).to(device)
    truth = exact_gradients(models["float32"], video)
    models = {dtype: models[dtype].train() for dtype in DTYPES}
    contestants = {
        f"{block} {dtype}": partial(step, model, block, video)
        for dtype, model in models.items()
        for block in ("naive", *POLICIES)
    }
    prove_equal(truth, models, contestants)
    saved = {
        f"{block} {dtype}": widths_saved(model, block, video)
        for dtype, model in models.items()
        for block in ("naive", *POLICIES)
    }
    compare(
        contestants,
        baseline=next(iter(contestants)),
        memory=True,
        energy=True,
        rounds=3 if device == "cpu" else None,
        model=recipe,
        frames=config.num_frames,
        batch=clips,
        clips=clips,
        widths_saved=saved,
        goals=GOALS[device],
    )


def step(model: VideoViT, block: str, video: Tensor) -> list[Tensor]:
    """One forward and backward pass; the gradients of what is trained."""
    use(model, block)
    label = torch.zeros(len(video), dtype=torch.long, device=video.device)
    loss = torch.nn.functional.cross_entropy(model(video).float(), label)
    return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def exact_gradients(model: VideoViT, video: Tensor) -> list[Tensor]:
    """By plain autograd in float64, without dropout; clip by clip, as memory is short."""
    wide = copy.deepcopy(model).double().eval()
    sums = None
    for clip in video.double().split(1):
        found = step(wide, "naive", clip)
        sums = found if sums is None else [a + b for a, b in zip(sums, found, strict=True)]
    return [x / len(video) for x in sums]


def use(model: VideoViT, block: str) -> None:
    """Makes the model's blocks compute as the contestant `block` does."""
    for b in model.transformer.resblocks:
        b.__dict__.pop("forward", None)
        if block == "naive":
            b.forward = partial(naive_block, b)
    if block in POLICIES:
        model.set_memory(block)


def widths_saved(model: VideoViT, block: str, video: Tensor) -> float:
    """What a block keeps for backward, without weights, in widths for each of its tokens."""
    use(model, block)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    x = model.embed(video)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.transformer.resblocks[0](x)
    del out
    return sum(storage.nbytes() for storage in kept.values()) / (x.numel() * x.element_size())


def prove_equal(
    expected: list[Tensor], models: dict[str, VideoViT], contestants: dict[str, Callable]
) -> None:
    """Without dropout all contestants give these gradients, as far as their dtype goes."""
    for model in models.values():
        model.eval()
    for name, contestant in contestants.items():
        limit = 1e-4 if name.endswith("float32") else 0.1
        for actual, truth in zip(contestant(), expected, strict=True):
            assert (actual - truth).norm() <= limit * truth.norm(), name
    for model in models.values():
        model.train()
