"""Blocks before `adapt_from` are the plain image model's, and train without backward."""

import dataclasses

import pytest
import torch
from models import FAMILIES, build, family_config, small_config
from torch.autograd.graph import saved_tensors_hooks
from zeroi2v_kernels.stdha import source_frames

from bench.flops import counted, formula
from zeroi2v.bridges.load import load_backbone
from zeroi2v.config import ModelConfig
from zeroi2v.model.vit import VideoViT
from zeroi2v.processes import end_processes
from zeroi2v.reparam import merge, seeded_clips, verify
from zeroi2v.train.distributed import start_processes
from zeroi2v.train.engine import trained_weights
from zeroi2v.train.prepare import gather_blocks_whole
from zeroi2v.visualize import attention_maps, rows_of

DEPTH = 3


def config_from(first: int, **overrides) -> ModelConfig:
    shape = dict(depth=3, adapt_from=first, head_dropout=0.0)
    return small_config("vit_b16_k400_8x16", **(shape | overrides))


def image_config(config: ModelConfig) -> ModelConfig:
    """The plain image model's."""
    offsets = (0,) * config.num_heads
    return dataclasses.replace(config, adapter=None, head_offsets=offsets, adapt_from=0)


def gradients(model: VideoViT, video: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(video).logsumexp(1).mean().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("first", [1, 2])
def test_the_first_blocks_see_single_frames_as_the_image_model_does(first):
    model = build(config_from(first)).double()
    image = VideoViT(image_config(model.config)).double()
    state = {n: t for n, t in model.state_dict().items() if n in image.state_dict()}
    state["temporal_embedding"] = torch.zeros_like(state["temporal_embedding"])
    image.load_state_dict(state)
    inside = []
    for block in image.transformer.resblocks:
        block.register_forward_hook(lambda _m, _args, out: inside.append(out))
    clips = seeded_clips(model).double()
    with torch.no_grad():
        image.tokens(clips)
        tokens = model.image_tokens(clips)
        assert torch.allclose(tokens, inside[first - 1], rtol=0, atol=1e-12)
        x = tokens + model.temporal_embedding[:, None]
        for block in model.transformer.resblocks[first:]:
            x = block(x)
        assert torch.allclose(model.tokens(clips), x, rtol=0, atol=1e-12)
        assert torch.equal(model(clips), model(tokens, is_tokens=True))
    names = [n for n in model.state_dict() if "_adapter." in n]
    assert {int(n.split(".")[2]) for n in names} == set(range(first, DEPTH))


@pytest.mark.parametrize("memory", [None, "save", "recompute"])
@pytest.mark.parametrize("family", [None, "SigLIP", "EVA-02"])
def test_gradients_are_those_of_plain_autograd_through_all_blocks(monkeypatch, memory, family):
    if family is None:
        config = config_from(2, adapter=dict(ratio=0.25, scale=0.5, dropout=0.0))
    else:
        config = family_config(family, adapt_from=2, head_dropout=0.0)
        config = dataclasses.replace(
            config, adapter=dataclasses.replace(config.adapter, dropout=0.0)
        )
    model = build(config).double().freeze().train()
    video = seeded_clips(model).double()
    if memory:
        model.set_memory(memory)
    else:
        for block in model.transformer.resblocks:
            block.memory = None
    modes = []
    model.transformer.resblocks[1].register_forward_hook(
        lambda *_: modes.append(torch.is_grad_enabled())
    )
    ours = gradients(model, video)
    assert modes == [False]
    model.requires_grad_(True)  # autograd through all of it
    theirs = gradients(model, video)
    assert modes == [False, True]
    assert 0 < len(ours) < len(theirs)
    for name, gradient in ours.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-10, atol=1e-12), name


def test_nothing_of_the_first_blocks_is_kept_for_backward():
    model = build(config_from(2)).freeze().train()
    video, count = seeded_clips(model), []

    def kept(compute) -> int:
        count.clear()
        with saved_tensors_hooks(lambda x: count.append(x), lambda x: x):
            out = compute()
        return len(count) if out.requires_grad else -1

    assert kept(lambda: model.image_tokens(video)) == -1 and not count
    tokens = model.image_tokens(video)
    assert kept(lambda: model(video)) == kept(lambda: model(tokens, is_tokens=True)) > 0


def test_tokens_of_another_shape_are_refused():
    model = build(config_from(1))
    with pytest.raises(ValueError, match=r"tokens must be \[B, 8, 5, 48\]: got \[1, 8, 4, 48\]"):
        model(torch.zeros(1, 8, 4, 48), is_tokens=True)


def test_who_trains_the_first_blocks_gets_their_gradients():
    model = build(config_from(2)).freeze()
    weight = model.transformer.resblocks[0].mlp.c_fc.weight.requires_grad_(True)
    assert gradients(model, seeded_clips(model))
    assert weight.grad.abs().max() > 0
    model.freeze()
    video = seeded_clips(model).requires_grad_(True)  # what the answer depends on
    model(video).sum().backward()
    assert video.grad.abs().max() > 0


def test_merged_equals_adapted_and_costs_what_the_formula_says():
    adapted = build(config_from(1))
    merged = merge(adapted)
    assert merged.config.adapt_from == 1 and not any("_adapter" in n for n in merged.state_dict())
    clips = seeded_clips(adapted)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        report = verify(adapted, merge(adapted, dtype), clips)
        assert report.passed, str(report)
    for model in (adapted, merged):
        with torch.no_grad():
            assert counted(lambda m=model: m(clips[:1])) == formula(model.config)
    assert formula(config_from(0)) > formula(config_from(1)) > formula(merged.config)


def test_no_head_of_the_first_blocks_reads_another_frame():
    model = build(config_from(1))
    clip = seeded_clips(model, 1)
    maps = attention_maps(model, clip, [0, 2])
    rows = {n: rows_of(maps[n], model.config.block(n), None) for n in (0, 2)}
    assert [row.offset for row in rows[0]] == [0] and [row.offset for row in rows[2]] == [-1, 1, 0]
    # What is drawn is what the model does: as if it had been asked block by block.
    with torch.no_grad():
        x = model.timed(model.image_tokens(clip))
        x = model.transformer.resblocks[1](x)
        block = model.transformer.resblocks[2]
        qkv = block.attn.project(block.attn.in_adapter(block.ln_1(x)))[0]
    query, key, _ = qkv.unbind(2)
    for head, offset in enumerate(model.config.head_offsets):
        frames = source_frames(len(key), offset)
        scores = torch.einsum("t d, t m d -> t m", query[:, 0, head], key[frames, :, head])
        weights = (scores * query.shape[-1] ** -0.5).softmax(-1)
        assert torch.allclose(maps[2][:, head], weights, atol=1e-6)


def test_training_goes_on_from_the_block_where_it_began(tmp_path):
    trained = build(config_from(1))
    trained.save_pretrained(tmp_path / "model")
    assert "| adapted blocks | 1 to 2, after" in (tmp_path / "model" / "README.md").read_text()
    assert VideoViT.from_pretrained(tmp_path / "model").config == trained.config
    again = build(config_from(1), seed=1)
    load_backbone(again, tmp_path / "model")
    clips = seeded_clips(again)
    with torch.no_grad():
        assert torch.equal(again(clips), trained(clips))
    with pytest.raises(ValueError, match="has adapt_from 1, the model 0; merge it first"):
        load_backbone(build(config_from(0)), tmp_path / "model")
    merge(trained).save_pretrained(tmp_path / "merged")
    load_backbone(build(config_from(2)), tmp_path / "merged")


@pytest.mark.parametrize("first", [-1, 3, 7])
def test_there_must_be_a_block_to_adapt(first):
    rule = rf"^adapt_from must be at least 0 and below depth 3: got {first}$"
    with pytest.raises(ValueError, match=rule):
        config_from(first)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_begin_as_an_image_model(family):
    adapted = build(family_config(family, adapt_from=1))
    assert verify(adapted, merge(adapted), seeded_clips(adapted)).passed


def test_zero_stage_3_trains_as_without_stages():
    start_processes()
    try:
        from zeroi2v.train.config import OptimConfig
        from zeroi2v.train.engine import build_engine, update

        found = []
        for stage in (0, 3):
            torch.manual_seed(0)
            model = build(config_from(1, adapter=dict(ratio=0.25, scale=0.5, dropout=0.0))).freeze()
            optim = OptimConfig(batch_size=2, micro_batch=2, zero_stage=stage, warmup_epochs=0)
            video = seeded_clips(model)
            if stage == 3:
                gather_blocks_whole(model)
            engine = build_engine(model.train(), optim, steps_per_epoch=10)
            for _ in range(2):
                engine.backward(engine(video).logsumexp(1).mean())
                update(engine)
            found.append(trained_weights(engine))
            engine.destroy()
        for name, weight in found[0].items():
            assert torch.allclose(weight, found[1][name], rtol=1e-5, atol=1e-6), name
    finally:
        end_processes()
