"""`reparam --dtype fp8`: written with its proof, or not at all; and what other commands do then."""

import json

import pytest
import torch
from models import build, small_config
from videos import write_numbered
from zeroi2v_kernels.quantize_reference import E4M3

import zeroi2v.reparam as module
from zeroi2v import cli, evaluate, export, merge
from zeroi2v.bridges.load import load_backbone
from zeroi2v.storage.checkpoint import load, weights_hash


def run(*words, command=module) -> int:
    return cli.run(command.main, [str(word) for word in words])


@pytest.fixture
def adapted(tmp_path):
    build(small_config("vit_b16_k400_8x16", depth=3)).save_pretrained(tmp_path / "adapted")
    return tmp_path / "adapted"


def test_adapted_and_merged_models_become_float8_with_a_proof(adapted, tmp_path, capsys):
    for i in range(3):
        write_numbered(tmp_path / f"{i}.mp4", 12 + i)
    (tmp_path / "list.txt").write_text("0.mp4 0\n1.mp4 1\n2.mp4 2\n")
    out = tmp_path / "fp8"
    assert run(adapted, "--out", out, "--dtype", "fp8", "--clips", tmp_path / "list.txt") == 0
    printed = capsys.readouterr().out
    assert "float8_e4m3fn: passed, relative error" in printed and "list.txt" in printed
    report = json.loads((out / "merge_report.json").read_text())
    assert [check["dtype"] for check in report["checks"]] == ["float64", "float8_e4m3fn"]
    check = report["checks"][1]
    assert check["clips"] == 3 and 0 < check["rel"] < check["rel_limit"] < 0.25
    assert len(check["per_block"]) == len(check["per_block_limit"]) == 3
    assert max(check["per_block_weights"]) <= 1
    assert "merge, float8_e4m3fn" in (out / "README.md").read_text()
    expected = weights_hash(merge(load(adapted), E4M3).state_dict())
    assert weights_hash(load(out, widen=False).state_dict()) == expected

    assert run(adapted, "--out", tmp_path / "merged") == 0
    capsys.readouterr()
    assert run(tmp_path / "merged", "--out", tmp_path / "late", "--dtype", "fp8") == 0
    assert "seeded noise; --clips takes real videos" in capsys.readouterr().out
    report = json.loads((tmp_path / "late" / "merge_report.json").read_text())
    assert [check["dtype"] for check in report["checks"]] == ["float8_e4m3fn"]

    data = ["--list", tmp_path / "list.txt", "--root", tmp_path, "--workers", 0]
    assert run(out, *data, command=evaluate) == 0
    assert "merged or plain" in capsys.readouterr().out


@pytest.mark.parametrize("source", ["adapted", "merged"])
def test_a_fault_is_never_written_and_its_block_is_named(
    adapted, tmp_path, capsys, monkeypatch, source
):
    if source == "merged":
        merge(load(adapted)).save_pretrained(tmp_path / "merged")
    quantized = module.quantized

    def faulty(*given):
        made = quantized(*given)
        made.transformer.resblocks[1].attn.out_proj.weight_scale.mul_(1.3)
        return made

    monkeypatch.setattr(module, "quantized", faulty)
    assert run(tmp_path / source, "--out", tmp_path / "out", "--dtype", "fp8") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: merged model not written") and error.count("\n") == 1
    assert "of the blocks, block 1 has" in error and "(limit " in error
    assert not (tmp_path / "out").exists()


def test_what_needs_wide_weights_refuses_float8_by_name(adapted, tmp_path, capsys):
    out = tmp_path / "fp8"
    merge(load(adapted), E4M3).save_pretrained(out)
    for dtype in ("fp8", "bf16"):
        assert run(out, "--out", tmp_path / "again", "--dtype", dtype) == 1
        assert "is merged already: its blocks have float8 weights" in capsys.readouterr().err
    words = ["--format", "torch-export", "--out", tmp_path / "model.pt2"]
    assert run(out, *words, command=export) == 1
    error = capsys.readouterr().err
    assert "model must have wide weights to be exported" in error and error.count("\n") == 1
    assert not (tmp_path / "model.pt2").exists()
    with pytest.raises(ValueError, match=r"backbone .*fp8 must have wide weights to be trained"):
        load_backbone(build(small_config("vit_b16_k400_8x16")), out)


def test_models_that_rounding_moves_too_far_are_refused(adapted, tmp_path, capsys):
    model = load(adapted)
    for block in model.transformer.resblocks:  # attention that hangs on small differences
        block.attn.in_proj_weight.data *= 30
    with torch.no_grad():
        model.save_pretrained(adapted)
    assert run(adapted, "--out", tmp_path / "out", "--dtype", "fp8") == 1
    captured = capsys.readouterr()
    assert "(limit 2.50e-01)" in captured.out and "not written" in captured.err
    assert not (tmp_path / "out").exists()
