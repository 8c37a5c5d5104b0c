"""The recipes as YAML: each value of the published table, and a true header.

Those of other backbones than CLIP are for models of the libraries that publish the weights.
"""

import dataclasses
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
from foreign import save_timm, timm_model, transformers_model
from models import build

from zeroi2v.bridges.load import load_backbone
from zeroi2v.config import CLIP_MEAN, CLIP_STD, RECIPES, spread_offsets
from zeroi2v.train.config import load_config

CONFIGS = Path(__file__).parents[2] / "zeroi2v" / "train" / "configs"

# Frames, sampling, offsets of the first heads, adapter scale and dropout, classes, test views,
# epochs, batch, erasing, label smoothing, factor on the backbone's learning rate.
D16, D4, U = ("dense", 16), ("dense", 4), ("uniform", 1)
PUBLISHED = {
    "vit_b16_k400_8x16": (8, D16, (-1, 1), 0.5, 0.1, 400, (3, 1), 40, 64, 0, 0, 1.0),
    "vit_b16_ucf101_8": (8, U, (-1, 1), 0.5, 0.1, 101, (1, 3), 40, 64, 0, 0, 1.0),
    "vit_b16_hmdb51_8": (8, U, (-1, 1), 0.5, 0.1, 51, (1, 3), 40, 64, 0, 0, 1.0),
    "vit_b16_ucf101_32": (32, U, (-1, 1, -2, 2), 0.5, 0.1, 101, (2, 3), 40, 64, 0, 0, 1.0),
    "vit_b16_hmdb51_32": (32, U, (-1, 1, -2, 2), 0.5, 0.1, 51, (2, 3), 40, 64, 0, 0, 1.0),
    "vit_b16_ssv2_16": (16, U, (-1, 1, -2, 2), 1.0, 0.0, 174, (1, 3), 50, 64, 0.25, 0.1, 1.0),
    "vit_l14_k400_8x16": (8, D16, (-1, -1, 1, 1), 0.5, 0.1, 400, (3, 1), 40, 64, 0.25, 0, 0.1),
    "vit_l14_k400_32x4": (
        32, D4, (-1, -1, 1, 1, -2, -2), 0.5, 0.1, 400, (3, 1), 40, 32, 0.25, 0, 0.1),
    "vit_l14_ssv2_32": (
        32, U, (-1, -1, 1, 1, -2, 2, -3), 1.0, 0.1, 174, (1, 3), 50, 32, 0.25, 0.1, 0.1),
}  # fmt: skip
TOP1 = {
    "vit_b16_k400_8x16": "83.0", "vit_l14_k400_8x16": "86.3", "vit_l14_k400_32x4": "87.2",
    "vit_b16_ssv2_16": "67.7", "vit_l14_ssv2_32": "72.2",
    "vit_b16_hmdb51_8": "73.7", "vit_b16_hmdb51_32": "73.7",
}  # fmt: skip


def header(name: str) -> str:
    """The comment lines at the top, without their marks."""
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").strip() for line in lines[:first])


def test_there_is_one_file_for_each_recipe_and_the_demo():
    names = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert names == {*RECIPES, "demo", "own_videos"} and set(PUBLISHED) == set(RECIPES)


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_is_the_published_one(name):
    config = load_config(CONFIGS / f"{name}.yaml")
    (frames, sampling, offsets, scale, dropout, classes, views, epochs, batch, erasing, smoothing,
     backbone) = PUBLISHED[name]  # fmt: skip
    model, optim, augment = config.model, config.optim, config.augment
    large, ssv2 = "l14" in name, "ssv2" in name
    assert model.recipe == name and model.video == RECIPES[name].model
    heads = 16 if large else 12
    assert (model.width, model.depth, model.num_heads, model.patch_size) == (
        (1024, 24, 16, 14) if large else (768, 12, 12, 16)
    )
    assert model.image_size == 224 and model.activation == "quick_gelu"
    assert (model.num_frames, model.num_classes, model.head_dropout) == (frames, classes, 0.5)
    assert model.head_offsets == offsets + (0,) * (heads - len(offsets))
    assert (model.adapter.ratio, model.adapter.scale, model.adapter.dropout) == (
        0.25, scale, dropout)  # fmt: skip
    pixels = model.preprocess
    assert (pixels.sampling, pixels.interval) == sampling and pixels.test_views == views
    assert (pixels.val_short_side, pixels.test_short_side) == (256, 224)
    assert pixels.mean == (122.769, 116.74, 104.04) and pixels.std == (68.493, 66.63, 70.321)

    assert (optim.lr, optim.betas, optim.weight_decay) == (3e-4, (0.9, 0.999), 0.05)
    assert (optim.epochs, optim.warmup_epochs, optim.warmup_start) == (epochs, 2.5, 0.1)
    assert (optim.batch_size, optim.label_smoothing) == (batch, smoothing)
    assert optim.backbone_lr_scale == backbone and optim.clip_grad is None
    for processes in (1, 2, 4, 8):  # the recipe's batch on each of them
        passes = optim.accumulation(processes)
        assert passes * processes * optim.micro_batch == batch

    assert (augment.rand_augment_ops, augment.rand_augment_magnitude) == (4, 7)
    assert (augment.flip, augment.erasing) == (0.5, erasing)
    assert (augment.crop_scale, augment.crop_ratio) == ((0.08, 1.0), (0.75, 4 / 3))
    swapped = {86: 87, 93: 94, 166: 167} if ssv2 else {}
    assert augment.flip_label_map == swapped | {b: a for a, b in swapped.items()}


@pytest.mark.parametrize("name", PUBLISHED)
def test_header_tells_command_hardware_memory_and_top1(name):
    text = header(name)
    title = f"ViT-{'L/14' if 'l14' in name else 'B/16'} on "
    assert text.startswith(title)
    assert "Hardware: " in text and "GPUs of" in text
    if name in TOP1:
        assert f"Top-1: {TOP1[name]} published" in text and "arXiv 2310.01324" in text
    else:
        assert "Top-1: none published" in text
    top1 = RECIPES[name].top1
    assert top1 is None or f"{top1}" == TOP1[name]
    if top1 is not None:
        clips, crops = RECIPES[name].model.preprocess.test_views
        assert f"{clips} clip{'s' * (clips > 1)} x {crops} crop{'s' * (crops > 1)}" in text
    assert "by this code not yet measured" in " ".join(text.split())


@pytest.mark.parametrize("name", PUBLISHED)
def test_commands_of_the_header_are_taken_by_the_config(name):
    text = header(name).replace("\\\n", " ")
    commands = [shlex.split(x) for x in text.splitlines() if re.match("deepspeed|python", x)]
    assert len(commands) == (2 if "ucf101" in name or "hmdb51" in name else 1)
    for command in commands:
        assert command[:2] == ["deepspeed", "train/main.py"] or command[1:3] == [
            "-m",
            "zeroi2v.train.splits",
        ]
        recipe = command[command.index("--config") + 1]
        overrides = [word for word in command if re.match(r"\w+\.\w+=", word)]
        assert len(overrides) >= 2
        config = load_config(recipe, overrides)
        assert recipe == name and config.model.backbone and config.data.root


@pytest.mark.parametrize("name", PUBLISHED)
def test_expected_memory_is_what_is_kept_for_backward_and_little_more(name):
    """Kept: 12 widths a token and layer in bf16, the figure of `training_block.py` for `save`."""
    config = load_config(CONFIGS / f"{name}.yaml")
    model, optim = config.model, config.optim
    assert optim.memory == "save" and optim.precision == "bf16"
    tokens = optim.micro_batch * model.num_frames * model.num_tokens
    kept = tokens * model.width * model.depth * 12 * 2 / 1e9
    text = header(name)
    whole, told = re.search(r"Memory: about (\d+) GB .* of which ([\d.]+) are kept", text).groups()
    assert float(told) == pytest.approx(kept, abs=0.05)
    weights = 1.5 if "l14" in name else 0.4  # bf16; of the trained ones fp32, gradients, moments
    assert 1.0 <= int(whole) / (kept + weights) <= 1.3
    needed = int(re.search(r"GPUs of (\d+) GB", text)[1])
    assert 1.2 <= needed / int(whole) <= 2.1


IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
HALF = (127.5, 127.5, 127.5), (127.5, 127.5, 127.5)


def of_timm(name: str, width: int, heads: int, patch: int, **settings) -> partial:
    shape = dict(embed_dim=width, num_heads=heads, patch_size=patch, img_size=224, depth=1)
    return partial(timm_model, name, **shape, **settings)


def of_transformers(kind: str, width: int, heads: int, patch: int, hidden: int, **settings):
    shape = dict(hidden_size=width, num_attention_heads=heads, patch_size=patch, image_size=224)
    shape |= dict(num_hidden_layers=1, intermediate_size=hidden)
    return partial(transformers_model, kind, **shape, **settings)


# The published sizes, and mean and standard deviation of the images.
BACKBONES = {
    "augreg_b16": (of_timm("vit_base_patch16_224", 768, 12, 16), HALF),
    "dinov2_b14": (of_timm("vit_base_patch14_reg4_dinov2", 768, 12, 14), IMAGENET),
    "dinov3_b16": (
        of_transformers("DINOv3ViTModel", 768, 12, 16, 3072, num_register_tokens=4),
        IMAGENET,
    ),
    "siglip2_b16": (of_transformers("SiglipVisionModel", 768, 12, 16, 3072), HALF),
    "pe_core_b16": (of_timm("vit_pe_core_base_patch16_224", 768, 12, 16), HALF),
    "eva02_clip_b16": (
        of_timm("eva02_base_patch16_clip_224", 768, 12, 16),
        (CLIP_MEAN, CLIP_STD),
    ),
    "metaclip2_h14": (
        of_transformers("MetaClip2VisionModel", 1280, 16, 14, 5120),
        (CLIP_MEAN, CLIP_STD),
    ),
    "aimv2_l14": (
        of_transformers("Aimv2VisionModel", 1024, 8, 14, 2816, use_head=False),
        (CLIP_MEAN, CLIP_STD),
    ),
}


def test_there_is_one_file_for_each_family_of_backbones():
    assert {path.stem for path in (CONFIGS / "backbones").glob("*.yaml")} == set(BACKBONES)


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_recipe_takes_the_librarys_weights(name, tmp_path):
    make, (mean, std) = BACKBONES[name]
    model = make()
    if make.func is timm_model:
        save_timm(model, tmp_path)
    else:
        model.save_pretrained(tmp_path)
    video = load_config(f"backbones/{name}").model.video
    load_backbone(build(dataclasses.replace(video, depth=1)), tmp_path)
    pixels = video.preprocess
    assert (pixels.mean, pixels.std) == (mean, std)
    assert (pixels.interpolation, pixels.antialias) == ("bicubic", True)
    assert video.head_offsets == spread_offsets(video.num_heads)
    assert any(video.head_offsets) and sum(video.head_offsets) == 0


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_recipe_is_the_published_one_in_all_else(name):
    config = load_config(f"backbones/{name}")
    other = load_config("vit_b16_k400_8x16" if "b1" in name else "vit_l14_k400_8x16")
    assert (config.optim, config.augment) == (other.optim, other.augment)
    ours, theirs = config.model.video, other.model.video
    for field in ("num_frames", "num_classes", "adapter", "head_dropout", "image_size"):
        assert getattr(ours, field) == getattr(theirs, field)
    for field in ("sampling", "interval", "test_views", "val_short_side", "test_short_side"):
        assert getattr(ours.preprocess, field) == getattr(theirs.preprocess, field)
    assert config.run.dir == f"runs/{name}" and config.model.backbone is None


@pytest.mark.parametrize("name", BACKBONES)
def test_backbone_recipes_header_tells_the_command_and_that_nothing_is_measured(name):
    text = header(f"backbones/{name}")
    assert "Top-1: not yet measured." in text and "time: not yet measured" in text
    command = next(
        shlex.split(line)
        for line in text.replace("\\\n", " ").splitlines()
        if line.startswith("deepspeed")
    )
    recipe = command[command.index("--config") + 1]
    config = load_config(recipe, [word for word in command if re.match(r"\w+\.\w+=", word)])
    assert recipe == f"backbones/{name}" and config.model.backbone and config.data.root
