"""Zero cost: the merged video model beside the plain image model, on the same frames."""

import dataclasses

import pytest
import torch

from bench.baselines.image_models import transformers_clip
from zeroi2v import RECIPES, VideoViT, merge, verify
from zeroi2v.reparam import seeded_clips

MODELS = {"B/16, 8 frames": "vit_b16_k400_8x16"}


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def bench_zero_cost(name, compare):
    torch.manual_seed(0)
    adapted = VideoViT(RECIPES[MODELS[name]].model).eval()
    for parameter in adapted.parameters():
        if parameter.abs().max() == 0:  # a fresh adapter does nothing: give it something to merge
            torch.nn.init.normal_(parameter, std=0.02)
    merged = merge(adapted)
    video = seeded_clips(adapted, count=1)
    report = verify(adapted, merged, video)
    assert report.passed, str(report)

    offsets = (0,) * merged.config.num_heads
    image = VideoViT(dataclasses.replace(merged.config, head_offsets=offsets)).eval()
    image.load_state_dict(merged.state_dict())
    theirs = transformers_clip(image)
    frames = video[0].transpose(0, 1).contiguous()
    torch.nn.init.zeros_(image.temporal_embedding)  # the image model knows no time
    expected = theirs(frames).pooler_output
    assert (image.features(video)[0] - expected).norm() <= 1e-5 * expected.norm()

    compare(
        {
            "transformers CLIP": lambda: theirs(frames),
            "plain image ViT": lambda: image(video),
            "adapted": lambda: adapted(video),
            "merged": lambda: merged(video),
        },
        baseline="transformers CLIP",
        merge_error=report.rel,
        dtype=report.dtype,
    )
