"""The foils of the benches are what they are named after, or a comparison with them says nothing."""

import dataclasses

import pytest
import torch
from models import build, small_config

from bench.baselines.authors_shift import AuthorsViT
from bench.baselines.image_models import IMAGE_MODELS, pooled
from zeroi2v.config import RECIPES
from zeroi2v.model import VideoViT
from zeroi2v.reparam import merge, seeded_clips


def relative(value, truth):
    return ((value - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_image_models_with_our_weights_equal_the_plain_image_vit(name, activation):
    config = small_config("vit_b16_k400_8x16", activation=activation, adapter=None)
    image = build(dataclasses.replace(config, head_offsets=(0,) * config.num_heads))
    torch.nn.init.zeros_(image.temporal_embedding)
    video = seeded_clips(image, count=1)
    with torch.no_grad():
        theirs = pooled(IMAGE_MODELS[name](image)(video[0].transpose(0, 1)))
        assert relative(theirs, image.features(video)[0]) <= 1e-5


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", RECIPES)
def test_the_authors_way_of_shifting_computes_the_merged_model(name, fused):
    merged = merge(build(small_config(name)), torch.float64)
    video = seeded_clips(merged).double()
    with torch.no_grad():
        assert relative(AuthorsViT(merged, fused)(video), merged(video)) <= 1e-12


def test_the_authors_way_refuses_a_model_with_adapters():
    with pytest.raises(ValueError, match="model must be merged: got one with adapters"):
        AuthorsViT(VideoViT(small_config()), fused=True)
