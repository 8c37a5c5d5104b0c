"""What other ways of adapting the same image model to video cost, beside ZeroI2V merged.

All share one backbone's weights and compute only CLS in the last block, so that the methods are
compared; the papers of AIM and ST-Adapter count that block in full. Accuracies are the published
ones, each with its source; none is measured here.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bench.baselines.aim import aim
from bench.baselines.joint import joint
from bench.baselines.published import PUBLISHED, Published
from bench.baselines.st_adapter import st_adapter
from bench.bench_zero_cost import counted_on_fakes
from bench.cases import DTYPES, LIMITS, shapes

BASELINE = "ZeroI2V, merged"
VIEWS = 3
ROUNDS = {("B/16", 8): 5, ("L/14", 8): 3, ("L/14", 32): 1}
"""On a CPU; on a GPU as many as fit."""


@pytest.mark.parametrize("dtype", DTYPES)
@shapes()
@torch.no_grad()
def bench_rivals(case, dtype, compare, device):
    model, frames = case.model, case.frames
    adapted, merged, image = case.models(dtype)
    video = case.video(dtype)
    models = {
        BASELINE: merged,
        "plain image ViT": image,
        "ZeroI2V, adapted": adapted,
        "ST-Adapter": st_adapter(image),
        "AIM": aim(image),
        "joint attention": joint(image),
    }
    logits = image(video)
    expected = {BASELINE: adapted(video), "ZeroI2V, adapted": adapted(video)}
    expected |= dict.fromkeys(("plain image ViT", "ST-Adapter", "AIM"), logits)

    def check(name, output):
        """Fresh rival adapters add nothing; joint attention has no other model to equal."""
        assert output.shape == logits.shape and output.isfinite().all(), name
        if name in expected:
            error = ((output - expected[name]).norm() / expected[name].norm()).item()
            assert error <= 2 * LIMITS[dtype], f"{name} has a relative error of {error:.2e}"

    contestants = {name: lambda model=model: model(video) for name, model in models.items()}
    published = {name: row for name in models if (row := find(name, model, frames))}
    compare(
        contestants,
        BASELINE,
        check=check,
        graph=True,
        memory=True,
        energy=True,
        rounds=ROUNDS[model, frames] if device == "cpu" else None,
        model=model,
        frames=frames,
        batch=1,
        clips=1,
        dtype=dtype,
        parameters={name: sum(p.numel() for p in m.parameters()) for name, m in models.items()},
        flops={name: counted_on_fakes(run) for name, run in contestants.items()},
        unpruned_gmacs={name: unpruned_gmacs(m, video) for name, m in models.items()},
        views=VIEWS,
        top1={name: row.top1 for name, row in published.items()},
        gmacs={
            name: row.gmacs
            for name, row in published.items()
            if row.gmacs and name != "ZeroI2V, adapted"  # its adapters are not in that count
        },
        source={name: row.source for name, row in published.items()},
    )


def bench_published(store):
    """Accuracies only: methods whose code is not here, or that were not run."""
    assert all(0 < row.top1 < 100 and row.source for row in PUBLISHED)
    store(
        {
            f"{row.method} {row.backbone} {row.dataset} {row.frames or '?'} frames": row._asdict()
            for row in PUBLISHED
        },
        note="ZeroI2V's case is cost, not the top accuracy: others reach more on the same "
        "backbone, and pay for it with every clip.",
    )


def find(name: str, model: str, frames: int) -> Published | None:
    """What is published for a contestant on K400, if it is."""
    wanted = (name.split(",")[0], model, "K400", frames)
    return next((row for row in PUBLISHED if row[:4] == wanted), None)


def unpruned_gmacs(model: nn.Module, video: torch.Tensor) -> float:
    """10^9 multiply-adds of all views through all tokens of all blocks, as papers count."""
    return VIEWS * counted_on_fakes(lambda: model.tokens(video)) / 2e9
