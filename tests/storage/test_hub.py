"""Hugging Face hub conventions, without a network."""

import dataclasses
import json
import socket

import pytest
import yaml
from models import FAMILIES, build, small_config

from zeroi2v import VideoViT, merge, predict, reparam
from zeroi2v.cli import run
from zeroi2v.config import RECIPES
from zeroi2v.storage.checkpoint import fetch, save
from zeroi2v.storage.model_card import model_card, published_recipe


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_args, **_kwargs):
        pytest.fail("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def test_local_paths_never_ask_the_network(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build(small_config()).save_pretrained("runs/best")
    assert VideoViT.from_pretrained("runs/best").config == small_config()
    for missing in ("runs/bset", "none", "/none/model", "./none/model", "a/b/c"):
        with pytest.raises(OSError, match="model folder not found"):
            VideoViT.from_pretrained(missing)


def test_hub_name_downloads_the_folder_once(tmp_path, monkeypatch):
    import huggingface_hub

    monkeypatch.chdir(tmp_path)
    build(small_config()).save_pretrained(tmp_path / "cache")
    asked = []

    def download(name, **options):
        asked.append((name, options))
        return str(tmp_path / "cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    model = VideoViT.from_pretrained("owner/model", revision="v1")
    assert model.config == small_config() and not model.training
    assert asked[0][0] == "owner/model" and asked[0][1]["revision"] == "v1"
    assert "model.safetensors" in asked[0][1]["allow_patterns"]
    (tmp_path / "owner").mkdir()  # then it is a mistyped path
    assert str(fetch("owner/model")) == "owner/model" and len(asked) == 1


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("no snapshot\nPlease check"),
        ValueError("bad name"),
        RuntimeError("of some client"),
        OSError(""),
    ],
)
def test_hub_that_gives_nothing_is_one_clear_line(tmp_path, monkeypatch, capsys, error):
    import huggingface_hub

    def fail(*_args, **_options):
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    assert run(predict.main, ["owner/model", "video.mp4"]) == 1
    captured = capsys.readouterr().err
    assert "owner/model is no folder here, and the hub can't give it (" in captured
    assert captured.count("\n") == 1
    assert run(predict.main, ["owner/model.onnx", "video.mp4"]) == 1  # a mistyped file
    assert "model not found: owner/model.onnx" in capsys.readouterr().err


def test_push_to_hub_uploads_what_save_pretrained_writes(tmp_path, monkeypatch):
    import huggingface_hub.hub_mixin as mixin

    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_options):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **_options):
            sent["repo"] = repo_id
            sent["model"] = VideoViT.from_pretrained(folder_path)
            sent["files"] = sorted(path.name for path in folder_path.iterdir())
            sent["card"] = (folder_path / "README.md").read_text()
            return "url"

    monkeypatch.setattr(mixin, "HfApi", Api)
    model = build(small_config())
    assert model.push_to_hub("owner/model") == "url"
    assert sent["repo"] == "owner/model"
    assert sent["files"] == ["README.md", "config.json", "model.safetensors"]
    assert sent["model"].config == model.config

    # What a run and the merge left beside a model goes along, and into the card.
    figures = {"eval.json": json.dumps({"top1": 67.7, "n": 9}), "training.json": '{"data": "x"}'}
    save(model, tmp_path / "best", figures)
    assert run(reparam.main, [str(tmp_path / "best"), "--out", str(tmp_path / "merged")]) == 0
    VideoViT.from_pretrained(tmp_path / "merged").push_to_hub("owner/merged")
    assert {"eval.json", "training.json", "merge_report.json"} < set(sent["files"])
    for line in ("| top-1 | 67.70 % of 9", "| training: data | x", "| merge, float32 | passed"):
        assert line in sent["card"]


def test_card_tells_recipe_preprocessing_and_where_the_model_is_from(tmp_path):
    model = merge(build(small_config("vit_b16_ssv2_16")))
    check = dict(dtype="float32", passed=True, rel=2e-7, top1_agreement=1.0, clips=2)
    files = {
        "merge_report.json": json.dumps({"checks": [check]}),
        "eval.json": json.dumps({"top1": 67.712, "top5": None, "mean_class": 60.0, "n": 9}),
        "training.json": json.dumps({"data": "lists/train.txt"}),
        "conversion.json": json.dumps({"format": "open_clip", "notes": ["resized"]}),
    }
    save(model, tmp_path / "model", files)
    card = (tmp_path / "model" / "README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["pipeline_tag"] == "video-classification" and "zeroi2v" in header["tags"]
    for line in (
        "| input | 16 frames of 32 px, sampled uniform |",
        "| merge, float32 | passed: relative error 2.0e-07 to the adapted model, top-1",
        "| top-1 | 67.71 % of 9 videos |",
        "| training: data | lists/train.txt |",
        "| converted from | open_clip; resized |",
        "| test views | 1 clips x 3 crops, short side 224 px |",
        "| recipe | none of the published ones |",
    ):
        assert line in card
    for name, recipe in RECIPES.items():
        assert published_recipe(recipe.model) == name
        for parts in FAMILIES.values():
            assert published_recipe(dataclasses.replace(recipe.model, **parts)) is None


def test_card_refuses_what_is_not_json():
    for text, rule in (("{", "eval.json must be JSON"), ("[]", "eval.json must be a JSON object")):
        with pytest.raises(ValueError, match=rule):
            model_card(small_config(), {"eval.json": text})
