"""Int8 linear layers: rounding, products, the models made of them, and who refuses them."""

import copy
import dataclasses
import json

import pytest
import torch
from models import FAMILIES, build, family_config, small_config
from quantized import lost_bias, no_split, rows
from zeroi2v_kernels import choice

from bench.quantization_table import with_outliers
from zeroi2v.model import int8
from zeroi2v.model.int8 import channel_factors, int8_linear, pack, round_rows, round_weight
from zeroi2v.model.quantization import INT8, quantized, widened
from zeroi2v.reparam import merge, relative_error, seeded_clips, verify
from zeroi2v.storage.checkpoint import load, weights_hash


def test_rows_are_rounded_to_the_nearest_step_of_their_own():
    x = rows(outlier=4.0).repeat(30, 1)  # more than are rounded at a time
    values, scale = round_rows(x, torch.ones(64))
    assert values.dtype == torch.uint8 and scale.shape == (180, 1)
    steps = values.double() - 128
    assert torch.equal(steps.abs().amax(-1), torch.full((180,), 127.0).double())
    error = (steps * scale.double() - x.double()).abs()
    assert (error <= (0.5 + 1e-4) * scale.double()).all() and (error > 0.4 * scale.double()).any()


def test_rows_of_zeros_are_zeros_and_bad_numbers_stay_loud():
    x = torch.zeros(5, 32)
    x[1, 3], x[2, 5], x[3] = torch.inf, torch.nan, 1e-41  # the last are below normal numbers
    weight, scale = round_weight(torch.eye(32), torch.ones(32))
    for packed in (None, pack(weight)):
        out = int8_linear(x, weight, scale, torch.ones(32), None, packed)
        assert torch.equal(out[[0, 4]], x[[0, 4]]) and not out[1:3].isfinite().all(-1).any()
        assert (out[3] - x[3]).abs().max() <= torch.finfo(torch.float32).smallest_normal


def test_factors_of_channels_are_powers_of_two_that_make_both_sides_alike():
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(1))
    weight[:, 3] /= 64
    weight[:, 7] = 0
    x = rows(outlier=64.0)
    largest = x.abs().amax(0)
    largest[9] = 0
    factors = channel_factors(largest, weight)
    assert torch.equal(factors, torch.exp2(factors.log2().round()))
    assert factors[7] == factors[9] == 1
    sides = (largest * factors)[[3, 5]] / (weight.abs().amax(0) / factors)[[3, 5]]
    assert ((sides >= 0.5) & (sides <= 2)).all()  # as alike as powers of two can make them
    values, scale = round_weight(weight, factors)
    assert values.abs().max() == 63 and values.dtype == torch.int8
    error = (values.double() * scale[:, None].double() - (weight / factors).double()).abs()
    assert (error <= (0.5 + 1e-4) * scale[:, None].double()).all()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_product_is_that_of_the_rounded_factors(dtype, native):
    """By PyTorch's int8 product, if it is exact on this machine, and by float64."""
    generator = torch.Generator().manual_seed(1)
    x = rows().view(2, 3, 64).to(dtype)
    wide = rows(48) * torch.randn(48, 1, generator=generator)
    channels = channel_factors(x.flatten(0, 1).float().abs().amax(0), wide)
    weight, scale = round_weight(wide, channels)
    bias = torch.randn(48, generator=generator)
    packed = pack(weight) if native else None
    if native and packed is None:
        pytest.skip("PyTorch's int8 product is not exact on this machine")
    out = int8_linear(x, weight, scale, channels, bias, packed)
    assert out.dtype == dtype and out.shape == (2, 3, 48)

    values, factors = round_rows(x.flatten(0, 1), channels)
    sums = (values.double() - 128) @ weight.double().T
    truth = (sums * scale.double() * factors.double() + bias.double()).view(2, 3, 48)
    eps = torch.finfo(dtype).eps
    limit = eps * truth.abs() + 2.0**-22 * (truth - bias).abs()
    assert ((out.double() - truth).abs() <= limit).all()
    without = int8_linear(x, weight, scale, channels, None, packed)
    assert ((without.double() + bias - truth).abs() <= limit + eps * bias.abs()).all()


def test_products_that_overflow_are_not_used(monkeypatch, tmp_path, caplog):
    """As with weights of 8 bits on processors that add pairs of products in 16."""
    product = torch.ops.onednn.qlinear_pointwise

    def overflowing(values, *rest):
        return product(values, *rest).clamp(-32768, 32767)

    monkeypatch.setattr(torch.ops.onednn, "qlinear_pointwise", overflowing)
    choice.has_int8_products.cache_clear()
    try:
        assert not choice.has_int8_products() and pack(torch.ones(4, 4, dtype=torch.int8)) is None
        made(plain()).save_pretrained(tmp_path)
        assert load(tmp_path).quantization is None
        (said,) = caplog.records
        assert "has int8 weights, and PyTorch has no int8 products here: widened" in str(
            said.msg % said.args
        )
    finally:
        choice.has_int8_products.cache_clear()


def plain(name="vit_b16_ssv2_16", **changes):
    return build(dataclasses.replace(small_config(name, depth=3), adapter=None, **changes))


def made(model):
    """With clips that are not those of `verify`."""
    return quantized(model, INT8, seeded_clips(model, 3)[2:])


@pytest.mark.parametrize("name", [*FAMILIES, "vit_b16_ssv2_16"])
def test_models_with_outliers_stay_within_their_limits(name):
    model = build(family_config(name, adapter=None)) if name in FAMILIES else plain(name)
    model = with_outliers(model)
    report = verify(model, made(model), seeded_clips(model))
    assert report.passed and report.dtype == "int8", str(report)
    assert 0.003 < report.rel < report.rel_limit < 0.15, str(report)
    ratios = [a / b for a, b in zip(report.per_block, report.per_block_limit, strict=True)]
    assert len(ratios) == 3 and 0.25 < min(ratios) <= max(ratios) < 0.8, ratios


@torch.no_grad()
def test_factors_of_channels_keep_outliers_from_costing_the_others(monkeypatch):
    model = with_outliers(plain())
    clips = seeded_clips(model)
    errors = [relative_error(made(model)(clips), model(clips))]
    ones = "zeroi2v.model.quantization.channel_factors"
    monkeypatch.setattr(ones, lambda largest, weight: torch.ones_like(largest))
    errors.append(relative_error(made(model)(clips), model(clips)))
    assert 4 * errors[0] < errors[1]


@torch.no_grad()
def test_the_last_block_projects_with_the_rows_scales():
    attn = made(with_outliers(plain())).transformer.resblocks[-1].attn
    x = torch.randn(2, 16, 5, 48)
    whole = attn.project(x)
    query, key_value = attn.project(x, cls_only=True)
    assert torch.equal(query, whole[:, :, :1, 0]) and torch.equal(key_value, whole[:, :, :, 1:])


@torch.no_grad()
def test_weights_are_laid_out_once_and_again_after_a_change():
    model = made(plain())
    clips = seeded_clips(model)
    before = model(clips)
    packs = [m._packs for m in model.modules() if getattr(m, "_packs", None)]
    held = {id(packed) for pack in packs for _, packed in pack.values()}
    with torch.inference_mode():
        assert torch.equal(model(clips), before)
    assert {id(packed) for pack in packs for _, packed in pack.values()} == held
    other = copy.deepcopy(model)
    assert not any(getattr(m, "_packs", None) for m in other.modules())
    changed = made(build(dataclasses.replace(model.config), seed=3))
    model.load_state_dict(changed.state_dict())
    assert torch.equal(model(clips), changed(clips)) and torch.equal(other(clips), before)
    assert not any("pack" in name for name in model.state_dict())


def another_channel(model):
    channels = model.transformer.resblocks[1].mlp.c_proj.weight_channels
    channels.copy_(2 * channels)
    return model


@pytest.mark.parametrize("fault, block", [(no_split, 0), (another_channel, 1), (lost_bias, 2)])
def test_planted_faults_exceed_the_limit_and_the_block_is_named(fault, block):
    model = with_outliers(plain())
    for one in model.transformer.resblocks:
        one.attn.in_proj_weight.data *= torch.rand(144, 1) + 0.2
        one.mlp.c_fc.bias.data += 1
    clips = seeded_clips(model)
    one = made(model)
    assert verify(model, one, clips).passed
    report = verify(model, fault(one), clips)
    assert not report.passed
    errors = zip(report.per_block, report.per_block_limit, strict=True)
    assert [error > limit for error, limit in errors].index(True) == block
    faulty = [error > 1 for error in report.per_block_weights]
    assert faulty == {0: [True] * 3, 1: [False, True, False], 2: [False] * 3}[block]


def test_casts_and_widening_keep_the_numbers():
    source = with_outliers(plain())
    source.origins = {"training.json": "{}"}
    model = made(source)
    state = model.state_dict()
    fixed = (torch.int8,)
    held = {n: t.clone() for n, t in state.items() if n.endswith(("_scale", "_channels"))}
    held |= {n: t.clone() for n, t in state.items() if t.dtype in fixed}
    assert len(held) == 3 * 4 * 3
    cast = copy.deepcopy(model).to(torch.bfloat16).state_dict()
    assert weights_hash({n: cast[n] for n in held}) == weights_hash(held)
    wide = widened(model)
    assert wide.quantization is None and wide.origins == source.origins
    assert list(wide.state_dict()) == list(source.state_dict())
    for name, tensor in wide.state_dict().items():
        error = (tensor - source.state_dict()[name]).norm() / source.state_dict()[name].norm()
        assert error < 0.04
    clips = seeded_clips(source)
    with torch.no_grad():
        truth = source(clips)
        errors = [relative_error(m(clips), truth) for m in (wide, model)]
    assert 0.001 < errors[0] < errors[1]  # activations are no longer rounded


def test_what_cannot_be_int8_is_refused_by_name():
    clips = seeded_clips(plain())
    with pytest.raises(ValueError, match="must be merged for int8 weights: it has adapters"):
        quantized(build(small_config()), INT8, clips)
    with pytest.raises(ValueError, match="int8 needs clips, for the range of each channel"):
        merge(build(small_config()), torch.int8)
    model = made(plain())
    with pytest.raises(ValueError, match="must have wide weights: got one with int8 weights"):
        quantized(model, INT8, clips)
    with pytest.raises(ValueError, match="to be trained: its blocks have int8"):
        model.freeze()
    with pytest.raises(ValueError, match=r"int8 weights has no gradients: use torch.no_grad\(\)"):
        model(clips.requires_grad_())


def test_folder_is_a_quarter_as_large_and_strict(tmp_path, caplog, monkeypatch):
    from safetensors.torch import load_file, save_file

    source = plain(width=96)
    model = made(source)
    model.save_pretrained(tmp_path / "int8")
    source.save_pretrained(tmp_path / "wide")
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("int8", "wide")]
    state = model.state_dict()
    blocks = sum(t.numel() for t in state.values() if t.dtype == torch.int8)
    beside = sum(t.numel() for n, t in state.items() if n.endswith(("_scale", "_channels")))
    assert abs(sizes[1] - sizes[0] - (3 * blocks - 4 * beside)) < 4000  # names take some
    assert json.loads((tmp_path / "int8" / "config.json").read_text())["weights"] == "int8"
    assert "; int8 in the blocks, a scale for each row" in (tmp_path / "int8/README.md").read_text()
    again = load(tmp_path / "int8")
    assert again.quantization is INT8 and not caplog.records
    clips = seeded_clips(source)
    with torch.no_grad():
        assert torch.equal(again(clips), model(clips))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert load(tmp_path / "int8").quantization is None
    assert "they are for CPUs, and there is a GPU here" in caplog.records[0].getMessage()
    monkeypatch.undo()
    path = tmp_path / "int8" / "model.safetensors"
    state = load_file(path)
    name = "transformer.resblocks.1.mlp.c_fc.weight"
    for change, message in (
        ({name: state[name].clone().fill_(64)}, "c_fc.weight must be in -63..63: got 64..64"),
        ({name: state[name].float()}, "c_fc.weight must be torch.int8: got torch.float32"),
        ({name + "_channels": -state[name + "_channels"]}, "_channels must be positive"),
        ({"ln_post.weight": state["ln_post.weight"].to(torch.int8)}, "must be floating point"),
    ):
        save_file(state | change, path)
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "int8")


def test_largest_numbers_give_exact_sums():
    """Where all products of a row have one sign, and where signs alternate."""
    if not choice.has_int8_products():
        pytest.skip("PyTorch's int8 product is not exact on this machine")
    for width in (64, 1000, 4096):
        x = torch.ones(4, width)
        x[1], x[2, ::2], x[3, width // 2 :] = -1, -1, -1
        weight = torch.cat([x, x.roll(1, 1)]).mul(int8.LARGEST).to(torch.int8)
        given = (x * 127, weight, torch.ones(8), torch.ones(width), None)
        found, expected = int8_linear(*given, pack(weight)), (127 * x).double() @ weight.double().T
        assert torch.equal(found.double(), expected.float().double())
