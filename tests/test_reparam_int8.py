"""`reparam --dtype int8`: fitted to clips, written with its proof, or not at all."""

import json

import pytest
import torch
from models import build, small_config
from videos import write_numbered

import zeroi2v.reparam as module
from zeroi2v import cli, evaluate, merge
from zeroi2v.model.quantization import INT8
from zeroi2v.storage.checkpoint import load, weights_hash


def run(*words, command=module) -> int:
    return cli.run(command.main, [str(word) for word in words])


@pytest.fixture
def adapted(tmp_path):
    build(small_config("vit_b16_k400_8x16", depth=3)).save_pretrained(tmp_path / "adapted")
    for i in range(3):
        write_numbered(tmp_path / f"{i}.mp4", 12 + i)
    (tmp_path / "list.txt").write_text("0.mp4 0\n1.mp4 1\n2.mp4 2\n")
    return tmp_path / "adapted"


def test_adapted_and_merged_models_become_int8_with_a_proof(adapted, tmp_path, capsys):
    out, clips = tmp_path / "int8", tmp_path / "list.txt"
    assert run(adapted, "--out", out, "--dtype", "int8", "--clips", clips) == 0
    printed = capsys.readouterr().out
    assert "int8: passed, relative error" in printed
    assert f"int8 is fitted to and verified on {clips}" in printed
    report = json.loads((out / "merge_report.json").read_text())
    assert [check["dtype"] for check in report["checks"]] == ["float64", "int8"]
    check = report["checks"][1]
    assert check["clips"] == 3 and 0 < check["rel"] < check["rel_limit"] < 0.1
    assert max(check["per_block_weights"]) <= 1
    read = module._video_clips(load(adapted), str(clips), None)
    expected = weights_hash(merge(load(adapted), torch.int8, read).state_dict())
    assert weights_hash(load(out, widen=False).state_dict()) == expected

    assert run(adapted, "--out", tmp_path / "merged") == 0
    capsys.readouterr()
    assert run(tmp_path / "merged", "--out", tmp_path / "late", "--dtype", "int8") == 0
    assert "seeded noise; --clips takes real videos" in capsys.readouterr().out
    data = ["--list", clips, "--root", tmp_path, "--workers", 0]
    assert run(out, *data, command=evaluate) == 0
    assert "merged or plain, int8" in capsys.readouterr().out


def test_a_fault_is_never_written_and_its_block_is_named(adapted, tmp_path, capsys, monkeypatch):
    quantized = module.quantized

    def faulty(*given):
        made = quantized(*given)
        assert made.quantization is INT8
        made.transformer.resblocks[1].attn.out_proj.weight_channels.mul_(1.3)
        return made

    monkeypatch.setattr(module, "quantized", faulty)
    assert run(adapted, "--out", tmp_path / "out", "--dtype", "int8") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: merged model not written") and error.count("\n") == 1
    assert "of the blocks, block 1 has" in error and not (tmp_path / "out").exists()


def test_models_that_rounding_moves_too_far_are_refused(adapted, tmp_path, capsys):
    model = load(adapted)
    for block in model.transformer.resblocks:  # attention that hangs on small differences
        block.attn.in_proj_weight.data *= 100
    model.save_pretrained(adapted)
    assert run(adapted, "--out", tmp_path / "out", "--dtype", "int8") == 1
    captured = capsys.readouterr()
    assert "(limit 2.50e-01)" in captured.out and "not written" in captured.err
    assert not (tmp_path / "out").exists()
