"""How the time of a clip grows with its frames: image model, merged model, joint attention.

Heads that look at a neighbouring frame leave a frame's cost as it is; attention over all frames
at once does not.
"""

import copy
import dataclasses

import pytest
import torch

from bench.baselines.joint import joint
from bench.cases import adapted_model
from zeroi2v import RECIPES, VideoViT
from zeroi2v.reparam import seeded_clips

IMAGE = "plain image ViT"
FRAMES = (4, 8, 16, 32)
ROUNDS = 3
"""On a CPU; on a GPU as many as fit."""
LIMIT = 0.05
"""Relative error of bfloat16."""


@pytest.mark.parametrize("frames", FRAMES)
@torch.no_grad()
def bench_scaling(frames, compare, timed, device):
    config = dataclasses.replace(
        RECIPES["vit_b16_k400_8x16"].model, adapter=None, num_frames=frames
    )
    if not timed:
        config = dataclasses.replace(config, width=192, depth=2, image_size=64)
    merged = adapted_model(config, device)
    offsets = (0,) * config.num_heads
    with torch.device("meta"):
        image = VideoViT(dataclasses.replace(config, head_offsets=offsets)).eval()
    image.load_state_dict(copy.deepcopy(merged.state_dict()), assign=True)
    models = {IMAGE: image, "merged": merged, "joint attention": joint(image)}
    video = seeded_clips(merged, count=1).to(device)
    truth = {name: model(video) for name, model in models.items()}
    models = {name: model.to(torch.bfloat16) for name, model in models.items()}
    video = video.bfloat16()

    def check(name, output):
        error = (output.float() - truth[name]).norm() / truth[name].norm()
        assert error <= LIMIT, f"{name} has a relative error of {error:.2e}"

    compare(
        {name: lambda model=model: model(video) for name, model in models.items()},
        baseline=IMAGE,
        check=check,
        graph=True,
        memory=True,
        rounds=ROUNDS if device == "cpu" else None,
        model="B/16",
        frames=frames,
        batch=1,
        clips=1,
        dtype="bfloat16",
    )
