"""The foils of the benches are what they are named after, or comparing with them says nothing."""

import dataclasses

import pytest
import torch
from models import build, randomize, small_config

from bench.baselines.aim import aim
from bench.baselines.authors_shift import AuthorsViT
from bench.baselines.image_models import IMAGE_MODELS, pooled
from bench.baselines.joint import joint
from bench.baselines.published import PUBLISHED
from bench.baselines.st_adapter import st_adapter
from bench.flops import counted, formula
from zeroi2v.config import RECIPES, ModelConfig
from zeroi2v.model.vit import VideoViT
from zeroi2v.reparam import merge, seeded_clips

RIVALS = {"AIM": aim, "ST-Adapter": st_adapter, "joint": joint}


def image_config(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, adapter=None, head_offsets=(0,) * config.num_heads)


def relative(value, truth):
    return ((value - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("name", IMAGE_MODELS)
def test_image_models_with_our_weights_equal_the_plain_image_vit(name, activation):
    image = build(image_config(small_config("vit_b16_k400_8x16", activation=activation)))
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


@pytest.mark.parametrize("name", ["AIM", "ST-Adapter"])
def test_a_rivals_fresh_adapters_leave_the_image_model_as_it_is(name):
    image = build(image_config(small_config("vit_b16_k400_8x16")))
    model = RIVALS[name](image)
    video = seeded_clips(image)
    with torch.no_grad():
        assert relative(model(video), image(video)) <= 1e-6


def test_joint_attention_over_one_frame_is_the_image_model():
    image = build(image_config(small_config("vit_b16_k400_8x16", num_frames=1)))
    video = seeded_clips(image)
    with torch.no_grad():
        assert relative(joint(image)(video), image(video)) <= 1e-6


@pytest.mark.parametrize("name", RIVALS)
def test_a_rival_mixes_frames_shares_the_weights_and_prunes_its_last_block(name):
    image = build(image_config(small_config("vit_b16_k400_8x16"))).double()
    model = randomize(RIVALS[name](image)).double()
    video = seeded_clips(image, count=1).double()
    changed = video.clone()
    changed[:, :, 3] += 1
    with torch.no_grad():
        tokens = model.tokens(video)
        assert tokens.shape == image.tokens(video).shape
        torch.testing.assert_close(
            model.features(video), model.ln_post(tokens[:, :, 0]), rtol=1e-10, atol=1e-10
        )
        difference = (model.tokens(changed) - tokens).abs().amax(dim=(0, 2, 3))
    assert (difference[[2, 4]] > 0).all()
    weights = {id(p) for p in model.parameters()}
    assert all(id(p) in weights for p in image.parameters())


@pytest.mark.parametrize(
    "recipe, frames, published",
    [("vit_b16_k400_8x16", 8, 606), ("vit_l14_k400_32x4", 32, 11208)],
)
def test_aim_costs_what_its_paper_says(recipe, frames, published):
    row = next(r for r in PUBLISHED if r.method == "AIM" and r.frames == frames)
    assert row.gmacs == published
    assert 3 * unpruned_gmacs(aim, recipe) == pytest.approx(published, rel=0.01)


def test_st_adapter_and_joint_attention_cost_what_a_formula_says():
    config = RECIPES["vit_b16_k400_8x16"].model
    image = formula(image_config(config), cls_only=False) / 2e9
    patches, width, frames = config.num_tokens - 1, config.width, config.num_frames
    bottleneck = frames * patches * (2 * width * 384 + 3 * 384) * config.depth / 1e9
    assert unpruned_gmacs(st_adapter, "vit_b16_k400_8x16") == pytest.approx(image + bottleneck)
    more = 2 * frames * (frames - 1) * config.num_tokens**2 * width * config.depth / 1e9
    assert unpruned_gmacs(joint, "vit_b16_k400_8x16") == pytest.approx(image + more)


def unpruned_gmacs(rival, recipe: str) -> float:
    """10^9 multiply-adds of one view through all tokens of all blocks, and the head."""
    config = image_config(RECIPES[recipe].model)
    size = config.image_size
    with torch.device("meta"):
        model = rival(VideoViT(config))
        video = torch.empty(1, 3, config.num_frames, size, size)
    with torch.no_grad():
        operations = counted(lambda: model.tokens(video))
    return (operations + 2 * config.width * config.num_classes) / 2e9
