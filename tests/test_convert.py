"""The command line of conversion, and MMAction2 configs turned into ours."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from foreign import authors_config, authors_state, save_authors, timm_model, trained_model
from models import build

from zeroi2v import ModelConfig, cli, convert
from zeroi2v.bridges.load import load_backbone
from zeroi2v.config import RECIPES
from zeroi2v.storage.checkpoint import load
from zeroi2v.train.config import load_config

SSV2 = "vit_b16_ssv2_16"

# What an MMAction2 config holds besides the model, in the words of the SSv2 recipe's.
TRAINING = """
_base_ = ['../_base_/default_runtime.py']
data_prefix = 'data/'
root = data_prefix + 'videos'
file_client_args = dict(io_backend='petrel')
flip_label_map = {86: 87, 87: 86}
train_pipeline = [
    dict(type='DecordInit', **file_client_args),
    dict(type='UniformSample', clip_len=16),
    dict(type='DecordDecode'),
    dict(type='Resize', scale=(-1, 256)),
    dict(type='RandomResizedCrop'),
    dict(type='Resize', scale=(224, 224), keep_ratio=False),
    dict(type='Flip', flip_ratio=0.5, flip_label_map=flip_label_map),
    dict(type='PytorchVideoWrapper', op='RandAugment', magnitude=7, num_layers=4),
    dict(type='RandomErasing', erase_prob=0.25),
    dict(type='ColorJitter'),
    dict(type='FormatShape', input_format='NCTHW'),
    dict(type='PackActionInputs')
]
train_dataloader = dict(
    batch_size=4,
    dataset=dict(type='VideoDataset', ann_file='data/train.txt',
                 data_prefix=dict(video=root), pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=4, dataset=dict(type='VideoDataset', ann_file='data/val.txt',
                               data_prefix=dict(video='other')))
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=50, val_begin=1)
optim_wrapper = dict(
    type='GradMonitorAmpOptimWrapper',
    optimizer=dict(type='AdamW', lr=0.0003, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(class_embedding=dict(decay_mult=0.0), backbone=dict(lr_mult=0.1)))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=2.5,
         convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max=50, eta_min=0, by_epoch=True, begin=0, end=50)
]
auto_scale_lr = dict(enable=False, base_batch_size=64)
my_extra = 3
"""


def run(*argv) -> int:
    return cli.run(convert.main, [str(word) for word in argv])


def test_checkpoint_becomes_a_folder_that_says_where_it_is_from(tmp_path, capsys):
    trained = trained_model(SSV2)
    path = save_authors(tmp_path / "b.pth", authors_state(trained), authors_config(trained, SSV2))
    assert run(path, "--out", tmp_path / "model", "preprocess.test_views=[1, 1]") == 0
    printed = capsys.readouterr().out
    assert "format       ZeroI2V" in printed and "offsets [-1, 1, -2, 2, 0" in printed
    ours = load(tmp_path / "model")
    assert ours.config.preprocess.test_views == (1, 1)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor)
    origin = json.loads((tmp_path / "model" / "conversion.json").read_text())
    assert origin["source"] == str(path)
    assert "converted from | ZeroI2V" in (tmp_path / "model" / "README.md").read_text()


def test_image_model_becomes_a_backbone_to_train_from(tmp_path, capsys):
    torch.save(timm_model().state_dict(), tmp_path / "vit.pth")
    out = tmp_path / "image"
    assert run(tmp_path / "vit.pth", "--out", out, "activation=gelu", "image_size=64") == 0
    assert "resized from 32 to 64 pixels" in capsys.readouterr().out
    image = load(out)
    shape = dict(width=128, depth=2, num_heads=2, patch_size=8, image_size=64)
    offsets = dict(head_offsets=(-1, 1), activation="gelu")
    with pytest.raises(ValueError, match="has num_heads 2, the model 12"):
        load_backbone(trained_model(SSV2), out)
    video = build(ModelConfig(**shape, **offsets, num_classes=5))
    load_backbone(video, out)
    assert torch.equal(video.conv1.weight, image.conv1.weight)


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        (["none.pth"], "weights file not found: none.pth"),
        (["vit.pth"], "give activation="),
        (["vit.pth", "activation"], "override must read key=value: got 'activation'"),
        (["vit.pth", "activation=relu"], "activation must be one of"),
        (
            ["vit.pth", "activatoin=gelu"],
            "unknown config key 'activatoin': did you mean activation",
        ),
        (["vit.pth", "activation=[1"], "override must have a YAML value"),
        (["vit.pth", "activation=gelu", "--recipe", "vit_b16"], "unknown recipe 'vit_b16'"),
        (["config.py", "activation=gelu"], "a config is taken as it is"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, capsys, words, rule):
    monkeypatch.chdir(tmp_path)
    torch.save(timm_model().state_dict(), "vit.pth")
    assert run(*words, "--out", "out") == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and rule in captured.err
    assert captured.err.count("\n") == 1 and not (tmp_path / "out").exists()


def validated_by_rule(config: ModelConfig) -> ModelConfig:
    """Their config says nothing of validation's short side, which then follows the image size."""
    return replace(config, preprocess=replace(config.preprocess, val_short_side=None))


def test_mmaction_config_becomes_a_config_that_loads(tmp_path, capsys):
    trained = trained_model(SSV2)
    theirs = tmp_path / "CLIP-B_sthv2_u16.py"
    smooth = "num_classes=11,\n        label_smooth_eps=0.1,"
    text = authors_config(trained, SSV2, dropout_rate=0).replace("num_classes=11,", smooth)
    theirs.write_text(text + TRAINING)
    assert run(theirs, "--out", tmp_path / "ours.yaml") == 0
    printed = capsys.readouterr().out
    for note in ("base file is not there: ../_base_/default_runtime.py", "io_backend petrel"):
        assert note in printed
    for note in ("training step ColorJitter has no counterpart", "my_extra has no counterpart"):
        assert note in printed and note in (tmp_path / "ours.yaml").read_text()
    ours = load_config(tmp_path / "ours.yaml")
    assert ours.model.video == validated_by_rule(trained.config)
    assert (ours.data.train_list, ours.data.val_list) == ("data/train.txt", "data/val.txt")
    assert (ours.data.root, ours.data.val_root) == ("data/videos", "other")
    augment, optim = ours.augment, ours.optim
    assert (augment.rand_augment_ops, augment.rand_augment_magnitude) == (4, 7)
    assert (augment.flip, augment.erasing) == (0.5, 0.25)
    assert augment.flip_label_map == {86: 87, 87: 86}
    assert (optim.lr, optim.epochs, optim.batch_size, optim.micro_batch) == (3e-4, 50, 64, 4)
    assert (optim.warmup_epochs, optim.warmup_start, optim.label_smoothing) == (2.5, 0.1, 0.1)
    assert (optim.backbone_lr_scale, optim.weight_decay) == (0.1, 0.05)


@pytest.mark.parametrize("recipe", RECIPES)
def test_mmaction_config_of_every_recipe_is_that_recipe(recipe, tmp_path):
    trained = trained_model(recipe)
    published = validated_by_rule(trained.config)
    rate = {"dropout_rate": published.adapter.dropout}
    theirs = tmp_path / f"{recipe}.py"
    theirs.write_text(authors_config(trained, recipe, **rate) + TRAINING)
    assert run(theirs, "--out", tmp_path / "ours.yaml") == 0
    assert load_config(tmp_path / "ours.yaml").model.video == published


def test_config_that_would_run_code_runs_none(tmp_path, capsys):
    mark, theirs = tmp_path / "mark", tmp_path / "config.py"
    calls = (
        f"open({str(mark)!r}, 'w')",
        f"__import__('os').system('touch {mark}')",
        f"[open({str(mark)!r}, 'w') for _ in range(1)][0]",
        f"(lambda: open({str(mark)!r}, 'w'))()",
    )
    text = authors_config(trained_model(SSV2), SSV2) + TRAINING
    for call in calls:
        theirs.write_text(f"import os\nos.mkdir({str(mark)!r})\nx = {call}\n{call}\n" + text)
        assert run(theirs, "--out", tmp_path / "ours.yaml") == 0
        assert "x has no counterpart" in capsys.readouterr().out
        theirs.write_text(text.replace("batch_size=4", f"batch_size={call}"))
        assert run(theirs, "--out", tmp_path / "ours.yaml") == 1
        assert "batch_size must be a plain value" in capsys.readouterr().err
    assert not mark.exists()


def test_config_of_another_model_or_without_data_is_refused(tmp_path, capsys):
    trained = trained_model(SSV2)
    theirs, text = tmp_path / "config.py", authors_config(trained, SSV2)
    for content, rule in (
        (TRAINING, "lacks model.backbone.type"),
        ("model = dict(backbone=dict(type='ResNet3d'))", "backbone must be one of ViT_Zero_CLIP"),
        (text, "lacks train_dataloader.dataset.ann_file"),
        ("model = (", "config can't be parsed"),
        (text + "_base_ = ['config.py']", "must not be its own base"),
    ):
        theirs.write_text(content)
        assert run(theirs, "--out", tmp_path / "ours.yaml") == 1
        assert rule in capsys.readouterr().err
    assert run(theirs, "--out", tmp_path / "ours.json") == 1
    assert "--out must be a .yaml file" in capsys.readouterr().err
    assert not (tmp_path / "ours.yaml").exists() and not list(tmp_path.glob(".ours*"))


def test_yaml_is_plain_data(tmp_path):
    theirs = tmp_path / "config.py"
    theirs.write_text(authors_config(trained_model(SSV2), SSV2) + TRAINING)
    assert run(theirs, "--out", tmp_path / "ours.yaml") == 0
    values = yaml.safe_load((tmp_path / "ours.yaml").read_text())
    assert list(values) == ["model", "data", "augment", "optim", "run"]
