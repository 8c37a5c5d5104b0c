"""What a model costs: formula and count agree, with each other and with what is published."""

import dataclasses

import pytest
import torch
from models import build, small_config

from bench.flops import counted, formula
from zeroi2v.config import RECIPES, ModelConfig
from zeroi2v.model.attention import set_backend
from zeroi2v.model.vit import VideoViT
from zeroi2v.reparam import seeded_clips


def on_meta(config: ModelConfig) -> VideoViT:
    """A model of full size without weights, for counting."""
    with torch.device("meta"):
        return VideoViT(config).eval()


def meta_video(config: ModelConfig, clips: int = 1) -> torch.Tensor:
    size = config.image_size
    return torch.empty(clips, 3, config.num_frames, size, size, device="meta")


@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "merged"])
@pytest.mark.parametrize("name", RECIPES)
def test_count_equals_the_formula_on_every_recipe(name, adapted):
    """At full width; of the blocks, which are all alike but the last, two are enough."""
    config = dataclasses.replace(RECIPES[name].model, depth=2)
    config = config if adapted else dataclasses.replace(config, adapter=None)
    model, video = on_meta(config), meta_video(config)
    with torch.no_grad():
        assert counted(lambda: model(video)) == formula(config)
        # All tokens of the last block, but for the head, which reads CLS.
        head = 2 * config.width * config.num_classes
        assert counted(lambda: model.tokens(video)) + head == formula(config, cls_only=False)


@pytest.mark.parametrize("adapted", [True, False], ids=["adapted", "merged"])
def test_count_equals_the_formula_where_attention_is_one_operator(adapted):
    config = small_config() if adapted else small_config(adapter=None)
    model = build(config)
    with torch.no_grad():
        assert counted(lambda: model(seeded_clips(model, count=1))) == formula(config)


def test_count_knows_the_triton_kernels():
    config = RECIPES["vit_b16_k400_8x16"].model
    model, video = on_meta(config), meta_video(config, clips=2)
    set_backend(model, "triton")
    with torch.no_grad():
        one_head = 2 * config.width * config.num_classes
        assert counted(lambda: model(video)) == 2 * formula(config)
        assert counted(lambda: model.tokens(video)) == 2 * (formula(config, False) - one_head)


@pytest.mark.parametrize(
    "name, views, published",
    [("vit_b16_k400_8x16", 3, 422), ("vit_l14_k400_32x4", 3, 7783)],
)
def test_unpruned_model_costs_the_published_multiply_adds(name, views, published):
    """Source: ZeroI2V (arXiv 2310.01324), whose GFLOPs are 10^9 multiply-adds."""
    config = dataclasses.replace(RECIPES[name].model, adapter=None)
    gmacs = views * formula(config, cls_only=False) / 2e9
    assert gmacs == pytest.approx(published, rel=0.01)


@pytest.mark.parametrize("name, share", [("vit_b16_k400_8x16", 0.93), ("vit_l14_k400_32x4", 0.965)])
def test_a_last_block_on_cls_alone_saves_what_is_promised(name, share):
    config = dataclasses.replace(RECIPES[name].model, adapter=None)
    assert formula(config) / formula(config, cls_only=False) == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize("name", RECIPES)
def test_merged_model_costs_no_more_than_the_image_model(name):
    """Neither operations, nor parameters beyond `temporal_embedding` and head."""
    config = dataclasses.replace(RECIPES[name].model, adapter=None)
    image = dataclasses.replace(config, head_offsets=(0,) * config.num_heads)
    video = meta_video(config)
    merged, plain = on_meta(config), on_meta(image)
    with torch.no_grad():
        assert counted(lambda: merged(video)) == counted(lambda: plain(video)) > 0
    extra = {"temporal_embedding", "head.weight", "head.bias"}
    parameters = {n: p.numel() for n, p in merged.named_parameters()}
    assert sum(n for name, n in parameters.items() if name not in extra) == clip_parameters(config)


def clip_parameters(config: ModelConfig) -> int:
    """Of open_clip's image tower, without its projection to the joint space."""
    from bench.baselines.image_models import open_clip_tower

    with torch.device("meta"):
        theirs = open_clip_tower(config)
    return sum(p.numel() for n, p in theirs.named_parameters() if n != "proj")
