"""A training step, forward and backward, with the block that keeps little and with plain autograd.

Contestants: `naive`, the block as the paper and CLIP write it, left to autograd; `modules`, that of
`model.py` left to autograd; and the three policies of the training block. The same frozen ViT-B/16
with trainable adapters, one clip of 8 frames. Peak memory is what the allocator gave out above the
weights, counted event by event, so it has no noise. Takes 20 minutes on two cores: `--rounds 5`.
"""

import dataclasses
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import zeroi2v.model
from bench.baselines.naive_block import naive_block
from zeroi2v import RECIPES, VideoViT
from zeroi2v.reparam import seeded_clips
from zeroi2v.training_block import can_train

POLICIES = ("save", "lean", "recompute")
GOALS = {"save fp32 / naive fp32": 0.95, "lean bf16 / naive fp32": 0.6}
PEAK_GOALS = {"lean bf16 / naive fp32": 0.35}


@pytest.mark.timeout(7200)
def bench_training_block(compare, monkeypatch, request):
    torch.manual_seed(0)
    depth = 12 if request.config.getoption("--benchmark") else 2  # two blocks suffice for a check
    config = RECIPES["vit_b16_k400_8x16"].model
    config = dataclasses.replace(config, depth=depth, head_dropout=0.0)
    models = {"fp32": VideoViT(config).freeze().train()}
    for parameter in models["fp32"].parameters():
        if parameter.abs().max() == 0:  # a fresh adapter does nothing
            torch.nn.init.normal_(parameter, std=0.02)
    models["bf16"] = VideoViT(config).freeze().train()
    models["bf16"].load_state_dict(models["fp32"].state_dict())
    models["bf16"].bfloat16()
    video = seeded_clips(models["fp32"], count=1)

    def step(precision: str, block: str) -> list[torch.Tensor]:
        """One forward and backward pass; the gradients of what is trained."""
        model = models[precision]
        for b in model.transformer.resblocks:
            b.__dict__.pop("forward", None)
            if block == "naive":
                b.forward = partial(naive_block, b)
        monkeypatch.setattr(zeroi2v.model, "can_train", can_train if block in POLICIES else never)
        if block in POLICIES:
            model.set_memory(block)
        loss = torch.nn.functional.cross_entropy(model(video).float(), label)
        return torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])

    label = torch.zeros(1, dtype=torch.long)
    contestants = {
        f"{block} {precision}": partial(step, precision, block)
        for precision in models
        for block in ("naive", "modules", *POLICIES)
    }
    check(models, contestants)
    peaks = {name: peak_bytes(contestant) for name, contestant in contestants.items()}
    base = peaks["naive fp32"]
    for name, peak in peaks.items():
        print(f"{name:<16} peak {peak / 2**20:6.0f} MiB above the weights, {peak / base:.3f} x")
    facts = dict(model="B/16", frames=8, batch=1, clips=1, peak_goals=PEAK_GOALS)
    compare(contestants, "naive fp32", energy=True, peak_bytes=peaks, goals=GOALS, **facts)


def never(*_) -> bool:
    return False


def check(models, contestants) -> None:
    """Without dropout all contestants give the same gradients, as far as their dtype goes."""
    for model in models.values():
        model.eval()
    expected = contestants["naive fp32"]()
    for name, contestant in contestants.items():
        limit = 1e-4 if name.endswith("fp32") else 0.1
        for actual, truth in zip(contestant(), expected, strict=True):
            assert (actual - truth).norm() <= limit * truth.norm(), name
    for model in models.values():
        model.train()


def peak_bytes(run) -> int:
    """The most bytes that `run()` held at once, of those it allocated on the CPU."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
