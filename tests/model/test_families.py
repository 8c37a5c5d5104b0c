"""Every family of backbones through all that is done to a model: merge, training, export."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch
from blocks import (
    POLICIES,
    assert_close,
    build_block,
    drawn_masks,
    run,
    tokens,
    trained,
    value_and_grads,
)
from models import FAMILIES, build, family_config
from triton_ops import DEVICE
from zeroi2v_kernels import choice
from zeroi2v_kernels.stdha import shift_heads

from bench.baselines.naive_block import naive_block
from bench.flops import counted, formula
from zeroi2v import VideoViT
from zeroi2v.config import AdapterConfig, ModelConfig, RotaryConfig
from zeroi2v.export import export
from zeroi2v.model import training_block
from zeroi2v.model.attention import Rotary
from zeroi2v.reparam import merge, seeded_clips, verify
from zeroi2v.storage.runtimes import load_deployed

families = pytest.mark.parametrize("family", FAMILIES)


@families
@pytest.mark.parametrize("memory", POLICIES)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_output_and_every_gradient_equal_plain_autograd(family, memory, dropout):
    config = family_config(family, adapter=AdapterConfig(dropout=dropout))
    block, x = build_block(config).double(), tokens(config)
    for cls_only in (False, True) if config.reads_class else (False,):
        masks = drawn_masks(block, x, cls_only, seed=3)
        expected = value_and_grads(naive_block(block, x, cls_only, masks), [x, *trained(block)])
        assert_close(run(block, x, cls_only, memory, seed=3), expected, 1e-10)


@families
def test_merged_model_equals_the_adapted_one(family):
    adapted = build(family_config(family))
    clips = seeded_clips(adapted, 2)
    report = verify(copy.deepcopy(adapted).double(), merge(adapted, torch.float64), clips)
    assert report.passed and report.rel <= 1e-10
    assert verify(adapted, merge(adapted), clips).passed
    assert not any("adapter" in name for name in merge(adapted).state_dict())


@families
def test_kernels_compute_a_step_as_exactly_as_pytorch(family, monkeypatch):
    """The GPU's path through a block of the family, without one in Triton's interpreter."""
    adapter = AdapterConfig(ratio=0.5, dropout=0.0)
    config = family_config(family, adapter=adapter, width=64, num_frames=2, depth=1)
    block = build_block(config).to(DEVICE)
    x = tokens(config, torch.float32, batch=1, device=DEVICE)
    truth_block = copy.deepcopy(block).double()
    x64 = x.detach().double().requires_grad_()
    truth = value_and_grads(naive_block(truth_block, x64), [x64, *trained(truth_block)])
    plain = value_and_grads(naive_block(block, x), [x, *trained(block)])
    monkeypatch.setattr(choice, "uses_kernels", lambda x: True)
    ours = run(block, x, False, "save")
    for actual, other, true in zip(ours, plain, truth, strict=True):
        size = torch.finfo(torch.float32).eps * true.abs().max()
        assert (actual - true).abs().max() <= 2 * ((other - true).abs().max() + size)


@families
def test_block_is_a_well_formed_operator(family):
    config = family_config(family, depth=1)
    block, x = build_block(config), tokens(config, torch.float32)
    called = []
    original = training_block.block_forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_block, "is_followed", lambda x: True)
        patch.setattr(
            training_block, "block_forward", lambda *args: called.append(args) or original(*args)
        )
        block(x)
    (args,) = called
    args = [[w.detach() for w in a] if isinstance(a, list) and torch.is_tensor(a[0]) else a
            for a in args]  # fmt: skip
    args[0] = args[0].detach()
    torch.library.opcheck(training_block.block_forward, args)
    out, *kept = training_block.block_forward(*args)
    torch.library.opcheck(training_block.block_backward, (out, args[0], kept, *args[1:], True))


@families
def test_operations_counted_are_those_of_the_formula(family):
    model = build(dataclasses.replace(family_config(family), adapter=None))
    with torch.no_grad():
        assert counted(lambda: model(seeded_clips(model, 1))) == formula(model.config)


@families
def test_inference_and_training_see_the_same_model(family):
    model = build(family_config(family, adapter=AdapterConfig(dropout=0.0)))
    video = seeded_clips(model, 2)
    with torch.no_grad():
        fast = model(video)
    plain = model(video)  # every parameter is differentiated by autograd
    frozen = model.freeze()(video)
    for other in (plain, frozen):
        torch.testing.assert_close(other, fast, rtol=1e-4, atol=1e-5)


@families
@pytest.mark.parametrize("format, suffix", [("onnx", "onnx"), ("torch-export", "pt2")])
def test_exported_file_gives_the_answer_of_the_adapted_model(family, format, suffix, tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX is not installed: pip install zeroi2v[export]")
    adapted = build(family_config(family, depth=1, num_frames=2, head_offsets=(-1, 0, 0, 0)))
    path = tmp_path / f"model.{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export(merge(adapted), format, path)
    video = seeded_clips(adapted, 3)
    with torch.no_grad():
        expected = adapted(video)
    torch.testing.assert_close(load_deployed(path)(video), expected, rtol=1e-4, atol=1e-5)


@families
def test_saved_models_come_back_whole(family, tmp_path):
    model = build(family_config(family))
    model.save_pretrained(tmp_path)
    back = VideoViT.from_pretrained(tmp_path)
    assert back.config == model.config
    ours, theirs = model.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    video = seeded_clips(model, 1)
    with torch.no_grad():
        torch.testing.assert_close(back(video), model(video))


def test_rotary_angles_are_those_of_the_definition():
    config = family_config("PE", rotary=RotaryConfig(base=100.0, span=6.0, start=-1.0, offset=0.5))
    cosines, sines = Rotary(config.rotary, config).table(torch.float64)
    grid, pairs = config.grid, config.head_dim // 4
    for row, column, pair in [(0, 0, 0), (1, 3, 1), (3, 2, 0)]:
        for axis, place in enumerate((row, column)):
            angle = (-1 + 6 * (place + 0.5) / grid) * 100 ** (-pair / pairs)
            at = (row * grid + column, axis * pairs + pair)
            assert cosines[at].item() == pytest.approx(math.cos(angle), abs=1e-12)
            assert sines[at].item() == pytest.approx(math.sin(angle), abs=1e-12)


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float64])
def test_rotary_table_stays_exact_when_the_model_is_cast(cast):
    config = family_config("DINOv3")
    rotary = Rotary(config.rotary, config)
    expected = rotary.table(torch.float32).clone()
    with torch.device("meta"):
        moved = Rotary(config.rotary, config)
    for other in (rotary.to(cast), moved, moved.to_empty(device="cpu")):
        assert torch.equal(other.table(torch.float32), expected)
    assert rotary.table(torch.float64).dtype == torch.float64


def test_shifting_heads_commutes_with_turning_them():
    config = family_config("DINOv3")
    rotary = Rotary(config.rotary, config)
    shape = (2, config.num_frames, config.num_tokens, 2, config.num_heads, config.head_dim)
    key_value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    offsets = list(config.head_offsets)
    turned_first = shift_heads(rotary(key_value, 1), offsets)
    assert torch.equal(turned_first, rotary(shift_heads(key_value, offsets), 1))


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(class_token=False), "pooling must not be 'class' without class_token: got class"),
        (dict(pooling="max"), "pooling must be 'class' or 'mean' or 'attention': got max"),
        (dict(norm="batch"), "norm must be 'layer' or 'rms': got batch"),
        (dict(norm_eps=0.0), "norm_eps must be positive: got 0.0"),
        (dict(num_registers=-1), "num_registers must be at least 0: got -1"),
        (dict(rotary=RotaryConfig(), width=24), "rotary needs heads of a multiple of 4 .*: got 6"),
        (dict(pooling="attention", pool_heads=5), "pool_heads must divide width 32: got 5"),
    ],
)
def test_impossible_families_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**(dict(width=32, num_heads=4, head_offsets=(0,) * 4) | fields))


@pytest.mark.parametrize("heads, shifted", [(1, 0), (2, 2), (6, 2), (12, 4), (16, 4), (24, 6)])
def test_auto_spreads_offsets_over_a_quarter_of_the_heads(heads, shifted):
    offsets = ModelConfig(width=64 * heads, num_heads=heads, head_offsets="auto").head_offsets
    assert offsets == (-1, 1) * (shifted // 2) + (0,) * (heads - shifted)


def moving_dots() -> tuple[torch.Tensor, torch.Tensor]:
    """Six dots that move a patch to the right, and the same clips run backwards; their classes."""
    rows, columns = torch.meshgrid(torch.arange(2), torch.arange(3), indexing="ij")
    clips, number = torch.zeros(6, 3, 2, 4, 4), torch.arange(6)
    clips[number, :, 0, rows.flatten(), columns.flatten()] = 3
    clips[number, :, 1, rows.flatten(), columns.flatten() + 1] = 3
    clips = torch.cat([clips, clips.flip(2)])
    return clips.repeat_interleave(4, 3).repeat_interleave(4, 4), torch.arange(12) // 6


@families
def test_direction_of_motion_is_learned_with_shifted_heads_and_not_without(family):
    clips, classes = moving_dots()
    shape = dict(image_size=16, patch_size=4, depth=2, num_frames=2, num_classes=2)
    shape |= dict(adapter=None, head_dropout=0.0)

    def made(head_offsets):
        model = build(family_config(family, head_offsets=head_offsets, **shape))
        model.temporal_embedding.requires_grad_(False).zero_()
        return model.train()

    # A clip and its reverse have the same frames: without shifted heads they have the same logits.
    there, back = made((0,) * 4)(clips).chunk(2)
    torch.testing.assert_close(there, back, rtol=1e-4, atol=1e-4)

    model = made((-1, 1, -1, 1))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(250):
        logits = model(clips)
        if torch.equal(logits.argmax(-1), classes):
            return
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits, classes).backward()
        optimizer.step()
    pytest.fail("not learned in 250 steps")
