"""VideoViT against the image models it generalises, and the promises its docstrings make."""

import dataclasses

import pytest
import torch
from models import build, randomize, small_config
from zeroi2v_kernels import choice

from bench.baselines.image_models import open_clip_tower, transformers_clip
from zeroi2v.config import RECIPES, ModelConfig
from zeroi2v.model.norm import Norm
from zeroi2v.model.vit import PatchEmbedding, VideoViT
from zeroi2v.reparam import merge

SHAPES = {
    "B/16": dict(width=768, depth=12, num_heads=12, patch_size=16),
    "B/32": dict(width=768, depth=12, num_heads=12, patch_size=32),
    "L/14": dict(width=1024, depth=6, num_heads=16, patch_size=14),  # a quarter as deep
}


def video_for(config, batch=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    size = config.image_size
    return torch.randn(batch, 3, config.num_frames, size, size, generator=generator)


def plain(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, adapter=None, head_offsets=(0,) * config.num_heads)


@pytest.mark.parametrize("name", SHAPES)
def test_zero_offsets_without_adapters_equal_transformers_clip(name):
    shape = SHAPES[name]
    heads = shape["num_heads"]
    config = ModelConfig(**shape, num_frames=2, head_offsets=(0,) * heads, adapter=None)
    model = build(config)
    torch.nn.init.zeros_(model.temporal_embedding)
    theirs = transformers_clip(model)
    video = video_for(config, batch=1)
    with torch.no_grad():
        ours = model.features(video)[0]
        expected = theirs(video[0].transpose(0, 1)).pooler_output
    assert relative(ours, expected) <= 1e-5


@pytest.mark.parametrize("patch", [14, 16])
def test_patches_as_a_matrix_product_are_the_convolution(patch, monkeypatch):
    embedding = PatchEmbedding(24, patch).double()
    video = torch.randn(2, 3, 2, 3 * patch, 2 * patch, dtype=torch.float64)
    video = video.transpose(1, 2).contiguous().transpose(1, 2)  # as loaders make them
    results = []
    for by_product in (False, True):
        monkeypatch.setattr(choice, "patches_by_product", lambda video, answer=by_product: answer)
        out = embedding(video)
        results.append((out, *torch.autograd.grad(out.square().sum(), embedding.weight)))
    assert results[0][0].shape == (2, 2, 6, 24)
    for one, other in zip(*results, strict=True):
        assert relative(one, other) <= 1e-12


@pytest.mark.parametrize("name", SHAPES)
def test_zero_offsets_without_adapters_equal_open_clip(name):
    shape = SHAPES[name]
    heads = shape["num_heads"]
    config = ModelConfig(**shape, num_frames=2, head_offsets=(0,) * heads, adapter=None)
    model = build(config, seed=1)
    torch.nn.init.zeros_(model.temporal_embedding)
    theirs = open_clip_tower(config)
    loaded = theirs.load_state_dict(model.state_dict(), strict=False)
    assert loaded.missing_keys == ["proj"]
    assert set(loaded.unexpected_keys) == {"temporal_embedding", "head.weight", "head.bias"}
    theirs.proj = None  # features before the projection to the joint space
    video = video_for(config, batch=1)
    with torch.no_grad():
        ours, expected = model.features(video)[0], theirs(video[0].transpose(0, 1))
    assert relative(ours, expected) <= 1e-5


@pytest.mark.parametrize("name", RECIPES)
def test_merged_backbone_fills_open_clips_tower_but_for_its_projection(name):
    merged = merge(build(small_config(name)))
    loaded = open_clip_tower(merged.config).load_state_dict(merged.state_dict(), strict=False)
    assert loaded.missing_keys == ["proj"]
    assert set(loaded.unexpected_keys) == {"temporal_embedding", "head.weight", "head.bias"}


def relative(value, truth):
    return ((value - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("training", [False, True])
def test_last_block_on_cls_alone_gives_the_same_features_and_gradients(training):
    config = small_config("vit_b16_ssv2_16")
    model = build(config).double().train(training)
    video = video_for(config).double()
    lean = model.features(video)
    full = model.ln_post(model.tokens(video)[:, :, 0])
    torch.testing.assert_close(lean, full, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(full)
    parameters = [p for n, p in model.named_parameters() if not n.startswith("head.")]
    for a, b in zip(
        torch.autograd.grad(lean, parameters, weight),
        torch.autograd.grad(full, parameters, weight),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_last_block_on_cls_alone_saves_the_patch_tokens_work_also_in_training():
    from torch.utils.flop_counter import FlopCounterMode

    config = small_config()
    model = VideoViT(config)
    video = video_for(config)
    flops = {}
    for name in ("features", "tokens"):
        with FlopCounterMode(display=False) as counter:
            getattr(model, name)(video).sum().backward()
        flops[name] = counter.get_total_flops()
    assert flops["features"] < 0.9 * flops["tokens"]


@pytest.mark.parametrize("grad", [False, True])
def test_compiles_into_one_graph(grad):
    config = small_config()
    model = build(config)
    video = video_for(config)
    with torch.set_grad_enabled(grad):
        torch.compiler.reset()  # what other tests compiled counts against a limit
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(video), model(video), rtol=1e-5, atol=1e-6)


def test_gradients_reach_adapters_alone_after_freeze():
    model = VideoViT(small_config()).freeze()
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {n for n, _ in model.named_parameters() if "_adapter." in n}
    assert len(adapters) == 4 * 4 * model.config.depth
    assert trainable == adapters | {
        *("temporal_embedding", "ln_post.weight", "ln_post.bias", "head.weight", "head.bias")
    }
    model(video_for(model.config)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_fresh_adapters_change_nothing():
    config = small_config()
    adapted = VideoViT(config).eval()
    bare = VideoViT(dataclasses.replace(config, adapter=None)).eval()
    bare.load_state_dict({n: t for n, t in adapted.state_dict().items() if "_adapter." not in n})
    video = video_for(config)
    torch.testing.assert_close(adapted(video), bare(video), rtol=1e-6, atol=1e-6)


def test_frames_interact_only_where_an_offset_says_so():
    config = small_config(head_offsets=(1,) + (0,) * 11, num_frames=4)
    model = build(config).double()
    video = video_for(config, batch=1).double()
    changed = video.clone()
    changed[:, :, 2] += 1
    with torch.no_grad():
        difference = (model.tokens(changed) - model.tokens(video)).abs().amax(dim=(0, 2, 3))
    # Three blocks that look one frame ahead: frames 0 to 2 see frame 2, frame 3 does not.
    assert (difference[:3] > 0).all() and difference[3] == 0


def test_autocast_to_bf16_stays_close():
    config = small_config()
    model = build(config)
    video = video_for(config)
    with torch.no_grad():
        exact = model(video)
        with torch.autocast("cpu", torch.bfloat16):
            out = model(video)
    assert out.dtype == torch.bfloat16
    assert relative(out.float(), exact) < 0.05


def test_layer_norm_keeps_float32_statistics_in_bf16():
    norm = randomize(Norm(64, ModelConfig()))
    x = 300 + torch.randn(5, 64)  # bf16 statistics would lose the variance beside such a mean
    expected = torch.nn.functional.layer_norm(x.bfloat16().float(), (64,), norm.weight, norm.bias)
    out = norm.bfloat16()(x.bfloat16())
    torch.testing.assert_close(out.float(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layer_norm_of_half_precision_is_as_good_as_one_computed_in_float32(dtype):
    norm = randomize(Norm(768, ModelConfig())).to(dtype)
    x = (20 * torch.randn(768) + torch.randn(500, 768)).to(dtype)
    truth, wide = (
        torch.nn.functional.layer_norm(x.to(t), (768,), norm.weight.to(t), norm.bias.to(t))
        for t in (torch.float64, torch.float32)
    )
    assert relative(norm(x).double(), truth) <= 1.001 * relative(wide.to(dtype).double(), truth)
    with torch.autocast("cpu", dtype):
        assert norm(x).dtype == dtype


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_activation_is_the_named_one(activation):
    model = build(small_config(activation=activation, adapter=None))
    mlp = model.transformer.resblocks[0].mlp.double()
    x = torch.randn(7, model.config.width, dtype=torch.float64)
    hidden = x @ mlp.c_fc.weight.T + mlp.c_fc.bias
    if activation == "gelu":
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    else:
        hidden = hidden * torch.sigmoid(1.702 * hidden)
    expected = hidden @ mlp.c_proj.weight.T + mlp.c_proj.bias
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(mlp(x), expected, rtol=1e-12, atol=1e-12)


def test_wrong_video_shapes_are_refused():
    model = VideoViT(small_config())
    with pytest.raises(ValueError, match=r"video must be \[B, 3, 16, 32, 32\]: got \[1, 3, 8, 32"):
        model(torch.zeros(1, 3, 8, 32, 32))
    with pytest.raises(ValueError, match=r"video must be"):
        model(torch.zeros(3, 16, 32, 32))
