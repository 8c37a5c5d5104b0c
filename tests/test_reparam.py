"""Merged equals adapted, for every recipe; a wrong merge is caught and never written."""

import dataclasses
import json

import pytest
import torch
from fake_gpu import fake_gpu
from models import build, small_config

from zeroi2v.cli import run
from zeroi2v.config import RECIPES, AdapterConfig, ModelConfig
from zeroi2v.model.vit import VideoViT
from zeroi2v.reparam import main, merge, seeded_clips, verify
from zeroi2v.storage.checkpoint import load


@pytest.mark.parametrize("name", RECIPES)
def test_merged_model_equals_adapted_model_on_every_recipe(name):
    adapted = build(small_config(name))
    clips = seeded_clips(adapted)
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        report = verify(adapted, merge(adapted, dtype), clips)
        assert report.passed and report.rel <= limit and report.top1_agreement == 1, str(report)
        assert len(report.per_block) == adapted.config.depth
        assert max(report.per_block) <= limit
    for dtype in (torch.bfloat16, torch.float16):
        report = verify(adapted, merge(adapted, dtype), clips)
        assert report.passed and 1e-5 < report.rel <= report.rel_limit < 0.1, str(report)


def test_full_size_b16_merges():
    config = RECIPES["vit_b16_k400_8x16"].model
    adapted = build(dataclasses.replace(config, image_size=64))  # all weights, on few tokens
    merged = merge(adapted)
    report = verify(adapted, merged, seeded_clips(adapted, count=1))
    assert report.passed and report.rel <= 1e-5, str(report)
    assert sum(p.numel() for p in merged.parameters()) == image_vit_parameters(merged.config)


def image_vit_parameters(config: ModelConfig) -> int:
    """Counted by hand: patch conv, embeddings, blocks, norms; the temporal embedding; the head."""
    width, hidden = config.width, 4 * config.width
    attention = 4 * width * width + 4 * width
    mlp = 2 * width * hidden + hidden + width
    block = attention + mlp + 4 * width
    stem = 3 * config.patch_size**2 * width + width + config.num_tokens * width
    backbone = stem + config.depth * block + 4 * width
    return backbone + config.num_frames * width + config.num_classes * (width + 1)


@pytest.mark.parametrize("name", RECIPES)
def test_merged_model_has_the_image_models_parameters_names_and_flops(name):
    from torch.utils.flop_counter import FlopCounterMode

    adapted = build(small_config(name))
    merged = merge(adapted)
    offsets = (0,) * adapted.config.num_heads
    image = build(dataclasses.replace(merged.config, head_offsets=offsets))
    assert sum(p.numel() for p in merged.parameters()) == image_vit_parameters(merged.config)
    assert list(merged.state_dict()) == list(image.state_dict())
    clips = seeded_clips(adapted)
    flops = []
    for model in (merged, image):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(clips)
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_merge_leaves_the_input_untouched_and_shares_no_memory():
    adapted = build(small_config())
    before = {name: tensor.clone() for name, tensor in adapted.state_dict().items()}
    merged = merge(adapted)
    for parameter in merged.parameters():
        parameter.data.zero_()
    for name, tensor in adapted.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_merge_refuses_a_merged_model():
    with pytest.raises(ValueError, match="model must have adapters: got one that is merged"):
        merge(merge(build(small_config())))


def wrong_scale(adapted):
    for module in adapted.modules():
        if hasattr(module, "scale"):
            module.scale = 0.5
    return adapted


def wrong_offsets(adapted):
    offsets = tuple(o if abs(o) < 2 else 0 for o in adapted.config.head_offsets)
    config = dataclasses.replace(adapted.config, head_offsets=offsets)
    return reloaded(adapted, config)


def no_offsets(adapted):
    return reloaded(
        adapted,
        dataclasses.replace(adapted.config, head_offsets=(0,) * adapted.config.num_heads),
    )


def reloaded(adapted, config):
    other = VideoViT(config)
    other.load_state_dict(adapted.state_dict())
    return other


def last_block_not_merged(adapted):
    for name, parameter in adapted.named_parameters():
        if f"resblocks.{adapted.config.depth - 1}." in name and "_adapter.up" in name:
            parameter.data.zero_()
    return adapted


@pytest.mark.parametrize(
    "mistake",
    [wrong_scale, wrong_offsets, no_offsets, last_block_not_merged],
    ids=lambda f: f.__name__,
)
def test_the_known_mistakes_of_merging_are_caught(mistake):
    adapted = build(small_config("vit_b16_ssv2_16"))
    broken = merge(mistake(build(small_config("vit_b16_ssv2_16"))))
    clips = seeded_clips(adapted)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert not verify(adapted, broken.to(dtype), clips).passed


def test_a_report_names_the_block_where_the_error_starts():
    adapted = build(small_config("vit_b16_ssv2_16"))
    broken = merge(adapted, torch.float64)
    broken.transformer.resblocks[1].attn.out_proj.bias.data += 0.01
    report = verify(adapted, broken, seeded_clips(adapted))
    assert report.per_block[0] <= 1e-10 < 1e-4 < report.per_block[1]


def test_nan_weights_do_not_pass():
    adapted = build(small_config())
    adapted.head.bias.data[0] = float("nan")
    assert not verify(adapted, merge(adapted), seeded_clips(adapted)).passed


def test_command_writes_a_verified_model_and_its_report(tmp_path, capsys):
    adapted = build(small_config())
    adapted.save_pretrained(tmp_path / "run" / "best")
    assert run(main, [str(tmp_path / "run"), "--out", str(tmp_path / "merged")]) == 0
    assert "passed" in capsys.readouterr().out
    merged = load(tmp_path / "merged")
    assert merged.config == dataclasses.replace(adapted.config, adapter=None)
    clips = seeded_clips(adapted)
    torch.testing.assert_close(merged(clips), adapted(clips), rtol=1e-4, atol=1e-5)
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert [check["dtype"] for check in report["checks"]] == ["float64", "float32"]
    assert all(check["passed"] for check in report["checks"])

    assert run(main, [str(tmp_path / "merged"), "--out", str(tmp_path / "again")]) == 1
    assert "merged already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


def test_command_merges_and_proves_on_the_gpu_if_there_is_one(tmp_path, monkeypatch):
    import zeroi2v.reparam as module

    ran, saved = [], []
    forward = VideoViT.forward

    def watched(model, video):
        ran.append((video.device.type, video.dtype, model.config.adapter is None))
        return forward(model, video)

    config = small_config()
    build(config).save_pretrained(tmp_path / "adapted")
    with fake_gpu(monkeypatch, number=1.0):  # an error of 1, and agreement of all
        monkeypatch.setattr(module, "TOLERANCE", {torch.float64: 1.0})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
        monkeypatch.setattr(VideoViT, "forward", watched)
        monkeypatch.setattr(module, "load", lambda _folder, widen: VideoViT(config).eval())
        monkeypatch.setattr(module, "save", lambda *given: saved.append(given))
        main([str(tmp_path / "adapted"), "--out", str(tmp_path / "merged"), "--dtype", "bf16"])
    expected = {("cuda", d, m) for d in (torch.float64, torch.bfloat16) for m in (True, False)}
    assert set(ran) == expected
    model, _, files = saved[0]
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert json.loads(files["merge_report.json"])["device"] == "Some GPU"


@pytest.mark.parametrize("dtype, expected", [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_command_casts_on_request(tmp_path, dtype, expected):
    build(small_config()).save_pretrained(tmp_path / "adapted")
    arguments = [str(tmp_path / "adapted"), "--out", str(tmp_path / "merged"), "--dtype", dtype]
    assert run(main, arguments) == 0
    assert load(tmp_path / "merged").head.weight.dtype == expected


def test_command_writes_nothing_and_gives_the_figures_when_verification_fails(
    tmp_path, capsys, monkeypatch
):
    build(small_config()).save_pretrained(tmp_path / "adapted")
    monkeypatch.setattr(
        "zeroi2v.reparam.merge", lambda model, *rest: merge(wrong_scale(copy_of(model)), *rest)
    )
    assert run(main, [str(tmp_path / "adapted"), "--out", str(tmp_path / "merged")]) == 1
    captured = capsys.readouterr()
    assert "FAILED" in captured.out and "relative error" in captured.out
    assert "error: merged model not written" in captured.err
    assert not (tmp_path / "merged").exists()


def copy_of(model):
    config = dataclasses.replace(model.config, adapter=AdapterConfig(scale=1.0))
    return reloaded(model, config)


@pytest.mark.parametrize("place", ["out_is_file", "out_is_source", "out_holds_other_files"])
def test_command_refuses_bad_outputs_before_it_works(tmp_path, capsys, place):
    build(small_config()).save_pretrained(tmp_path / "adapted")
    out = tmp_path / "out"
    if place == "out_is_file":
        out.write_text("kept")
    elif place == "out_is_source":
        out = tmp_path / "adapted"
    else:
        out.mkdir()
        (out / "notes.txt").write_text("kept")
    assert run(main, [str(tmp_path / "adapted"), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert "merging" not in captured.out
