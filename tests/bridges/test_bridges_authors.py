"""Checkpoints of the ZeroI2V authors: all recipes, all their classes, and what fails silently."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from foreign import CLASSES, authors_config, authors_state, relative, save_authors, trained_model
from loading import mmaction2
from models import build, small_config
from videos import write_numbered

from zeroi2v import cli, convert, evaluate, load_foreign, merge, verify
from zeroi2v.bridges.authors import offsets
from zeroi2v.config import RECIPES, Recipe
from zeroi2v.data.decode import read_frames
from zeroi2v.data.sampling import dense_indices, uniform_indices
from zeroi2v.reparam import seeded_clips

SSV2 = "vit_b16_ssv2_16"


def saved(tmp_path, model, recipe, monkeypatch=None, **backbone):
    text = authors_config(model, recipe, **backbone)
    return save_authors(tmp_path / "best.pth", authors_state(model), text, monkeypatch)


@pytest.mark.parametrize("recipe", RECIPES)
def test_checkpoint_of_every_recipe_converts_merges_and_verifies(recipe, tmp_path, monkeypatch):
    trained = trained_model(recipe)
    ours = load_foreign(saved(tmp_path, trained, recipe, monkeypatch))
    told, expected = ours.config.to_dict(), trained.config.to_dict()
    for name in ("labels", "preprocess", "adapter"):  # no label, nor dropout, in the file
        del told[name], expected[name]
    assert told == expected
    assert ours.config.adapter.scale == RECIPES[recipe].model.adapter.scale
    process, published = ours.config.preprocess, trained.config.preprocess
    assert (process.sampling, process.test_views) == (published.sampling, published.test_views)
    clips = seeded_clips(ours, 1)
    with torch.no_grad():
        assert torch.equal(ours(clips), trained(clips))
    assert verify(ours, merge(ours, torch.float64), clips).passed


@pytest.mark.parametrize("recipe", RECIPES)
def test_offsets_of_every_published_config_are_the_recipes(recipe):
    model, (kind, stdha) = RECIPES[recipe].model, CLASSES[recipe]
    settings = eval(f"dict({stdha})")
    found = offsets(kind, settings, model.width, model.num_heads, "config")
    assert found == model.head_offsets


def test_recipe_takes_the_place_of_a_missing_config(tmp_path):
    recipe = "vit_b16_ucf101_32"
    model = build(small_config(recipe))
    path = save_authors(tmp_path / "bare.pth", authors_state(model))
    with pytest.raises(ValueError, match="give num_heads=.*head_offsets=.*adapter.scale="):
        load_foreign(path)
    ours = load_foreign(
        path,
        num_heads=12,
        head_offsets=list(model.config.head_offsets),
        **{"adapter.scale": 0.5, "preprocess.sampling": "uniform"},
    )
    clips = seeded_clips(model, 1)
    with torch.no_grad():
        assert torch.equal(ours(clips), model(clips))
    with pytest.raises(ValueError, match=f"recipe {recipe} has width 768"):
        load_foreign(path, recipe=recipe)


def test_recipe_of_another_dataset_is_an_error_not_another_scale(tmp_path, monkeypatch):
    small = {name: Recipe(model=small_config(name), top1=None, source="") for name in RECIPES}
    for name, published in RECIPES.items():  # small widths, but the published numbers of classes
        model = dataclasses.replace(small[name].model, num_classes=published.model.num_classes)
        small[name] = dataclasses.replace(small[name], model=model)
    monkeypatch.setattr("zeroi2v.config.RECIPES", small)
    # Both of 32 frames on ViT-L; offsets and scale differ, and no tensor tells.
    right, wrong = "vit_l14_k400_32x4", "vit_l14_ssv2_32"
    model = build(small[right].model)
    path = save_authors(tmp_path / "bare.pth", authors_state(model))
    ours = load_foreign(path, recipe=right)
    clips = seeded_clips(model, 1)
    with torch.no_grad():
        assert torch.equal(ours(clips), model(clips))
    assert ours.config.preprocess == small[right].model.preprocess
    with pytest.raises(ValueError, match=f"recipe {wrong} has num_classes 174, .* has 400: say"):
        load_foreign(path, recipe=wrong)
    assert load_foreign(path, recipe=right, num_classes=400).config == ours.config
    for name in RECIPES:  # a recipe that fits is one whose offsets and scale are the model's
        try:
            other = load_foreign(path, recipe=name).config
        except ValueError:
            continue
        assert (other.head_offsets, other.adapter) == (
            ours.config.head_offsets,
            ours.config.adapter,
        )


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ({"adapter.scale": 0.5}, "adapter.scale must be 1.0, .*got 0.5"),
        ({"head_offsets": [-1, 1] + [0] * 10}, r"head_offsets must be \(-1, 1, -2, 2, 0"),
        ({"head_offsets": [0] * 12}, "head_offsets must be"),
        ({"depth": 12}, "depth must be 2"),
        ({"num_frames": 8}, "num_frames must be 16"),
        ({"num_heads": 6}, "num_heads must be 12"),
        ({"activation": "gelu"}, "activation must be quick_gelu"),
        ({"adapt_from": 1}, "adapt_from must be 0"),
        (
            {"adapter": None},
            "in_adapter.down.weight.* and 29 more, which its config has no place for",
        ),
    ],
)
def test_settings_that_contradict_the_checkpoint_are_errors(tmp_path, override, rule):
    path = saved(tmp_path, trained_model(SSV2), SSV2)
    with pytest.raises(ValueError, match=rule):
        load_foreign(path, **override)


# The five ways in which the released merge goes wrong without a word.


def test_heads_two_and_three_frames_off_survive_the_merge(tmp_path):
    for recipe in ("vit_b16_hmdb51_32", "vit_l14_k400_32x4", "vit_l14_ssv2_32"):
        trained = trained_model(recipe)
        merged = merge(load_foreign(saved(tmp_path, trained, recipe)))
        assert max(map(abs, merged.config.head_offsets)) >= 2
        clips = seeded_clips(trained, 1)
        with torch.no_grad():
            assert relative(merged(clips), trained(clips)) <= 1e-5
        near = tuple(o if abs(o) < 2 else 0 for o in merged.config.head_offsets)
        forgot = build(dataclasses.replace(merged.config, head_offsets=near))
        forgot.load_state_dict(merged.state_dict())
        with torch.no_grad():
            assert relative(forgot(clips), trained(clips)) > 1e-2


def test_adapter_scale_of_one_is_read_not_assumed(tmp_path):
    trained = trained_model(SSV2)
    merged = merge(load_foreign(saved(tmp_path, trained, SSV2)))
    clips = seeded_clips(trained, 1)
    with torch.no_grad():
        assert relative(merged(clips), trained(clips)) <= 1e-5
    with pytest.raises(ValueError, match="adapter.scale must be 1.0.*got 0.5"):
        load_foreign(tmp_path / "best.pth", **{"adapter.scale": 0.5})


def test_all_24_blocks_are_merged_and_a_model_merged_in_part_is_refused(tmp_path):
    recipe = "vit_l14_k400_8x16"
    trained = trained_model(recipe, depth=24)
    path = saved(tmp_path, trained, recipe)
    clips = seeded_clips(trained, 1)
    with torch.no_grad():
        assert relative(merge(load_foreign(path))(clips), trained(clips)) <= 1e-5
    half = merge(trained).state_dict()  # the released script: 12 blocks, whatever the depth
    state = authors_state(trained)
    for name in list(state):
        block = int(name.split(".")[3]) if ".resblocks." in name else 99
        if block < 12 and "Adapter" in name:
            del state[name]
        elif block < 12:
            state[name] = half[name.removeprefix("backbone.")]
    path = save_authors(tmp_path / "half.pth", state, authors_config(trained, recipe))
    with pytest.raises(ValueError, match="it is merged in part"):
        load_foreign(path)


def test_merged_model_without_attention_settings_is_refused(tmp_path):
    merged = merge(trained_model(SSV2))
    state = authors_state(merged)
    for stdha in ({}, {"divide_head": False}):
        text = authors_config(merged, SSV2, type="ViT_Zero_CLIP_eval", stdha_cfg=stdha)
        path = save_authors(tmp_path / "eval.pth", state, text.replace("num_tadapter=2,", ""))
        with pytest.raises(ValueError, match="a merged model needs its stdha_cfg"):
            load_foreign(path)
    bare = save_authors(tmp_path / "bare.pth", state)  # what the released script writes
    with pytest.raises(ValueError, match="give num_heads=.*head_offsets="):
        load_foreign(bare)


def test_merged_model_with_its_settings_is_what_was_merged(tmp_path):
    merged = merge(trained_model(SSV2))
    settings = dict(shift_div=12, long_shift_div=12, long_shift_right=True)
    text = authors_config(merged, SSV2, type="ViT_Zero_CLIP_eval", stdha_cfg=settings)
    path = save_authors(tmp_path / "eval.pth", authors_state(merged), text)
    ours = load_foreign(path)  # the released class drops the heads two frames off
    assert ours.config.head_offsets == merged.config.head_offsets and ours.config.adapter is None
    clips = seeded_clips(merged, 1)
    with torch.no_grad():
        assert torch.equal(ours(clips), merged(clips))


def test_weights_without_adapters_under_a_training_config_must_be_vouched_for(tmp_path):
    trained = trained_model(SSV2)
    merged = merge(trained)
    text = authors_config(trained, SSV2)
    path = save_authors(tmp_path / "merged.pth", authors_state(merged), text)
    with pytest.raises(ValueError, match="give adapter=… .its config trains adapters and it holds"):
        load_foreign(path)
    clips = seeded_clips(merged, 1)
    with torch.no_grad():
        assert torch.equal(load_foreign(path, adapter=None)(clips), merged(clips))


# Variants of their ablation class.


@pytest.mark.parametrize(("count", "dropped"), [(1, "mlp.out"), (-1, "mlp.out attn.out")])
def test_fewer_adapters_become_identities(count, dropped, tmp_path):
    trained = trained_model(SSV2)
    for name, tensor in trained.state_dict().items():
        if any(f"{place}_adapter.up" in name for place in dropped.split()):
            tensor.zero_()
    state = {
        name: tensor
        for name, tensor in authors_state(trained).items()
        if "MLP_Adapter_out" not in name and not (count == -1 and "S_Adapter" in name)
    }
    text = authors_config(trained, SSV2, num_tadapter=count)
    ours = load_foreign(save_authors(tmp_path / "few.pth", state, text))
    clips = seeded_clips(trained, 1)
    with torch.no_grad():
        assert torch.equal(ours(clips), trained(clips))
    wrong = authors_config(trained, SSV2, num_tadapter=2)
    with pytest.raises(ValueError, match="asks for adapters .*, the weights have"):
        load_foreign(save_authors(tmp_path / "few.pth", state, wrong))


def test_separate_adapters_of_queries_keys_and_values_are_merged(tmp_path):
    trained = trained_model(SSV2)
    state = authors_state(trained)
    for name in [n for n in state if "T_Adapter_in" in n]:
        tensor = state.pop(name)
        for letter in "qkv":  # the same adapter three times is the shared one
            state[name.replace("T_Adapter_in", f"T_Adapter_in_{letter}")] = tensor.clone()
    text = authors_config(trained, SSV2, attn_adapter_type="qkv")
    ours = load_foreign(save_authors(tmp_path / "qkv.pth", state, text))
    clips = seeded_clips(trained, 1)
    with torch.no_grad():
        assert relative(ours(clips), trained(clips)) <= 1e-5


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"adapter_type": "gelu"}, "backbone.adapter_type must be 'linear' or 'rep': got 'gelu'"),
        ({"adapter_scale": "learnable"}, "adapter_scale must be a number: got 'learnable'"),
        ({"stdha_cfg": {"shift_div": 12, "shift_pattern": "qkv"}}, "shift_pattern must be 'kv'"),
        ({"stdha_cfg": {"shift_div": 12, "ops_type": "tcs"}}, "ops_type must be 'stdha'"),
        ({"stdha_cfg": {"shift_div": 12, "divide_head": True}}, "divide_head must be False"),
        ({"stdha_cfg": {"shift_div": 16}}, "which are no whole heads of 4"),
        ({"stdha_cfg": {"shift_div": 1}}, "shifts 24 heads: there are 12"),
        ({"type": "ResNet3dSlowFast"}, "backbone must be one of ViT_Zero_CLIP, .*got ResNet3d"),
        ({"num_frames": 8}, "config in .* says num_frames 8, its weights 16"),
        ({"input_resolution": 64}, "config in .* says image_size 64, its weights 32"),
    ],
)
def test_models_that_videovit_is_not_are_refused(settings, rule, tmp_path):
    trained = trained_model(SSV2)
    text = authors_config(trained, SSV2, **settings)
    for name, value in (("num_frames", 16), ("input_resolution", 32)):
        if name in settings:
            text = text.replace(f"        {name}={value},\n", "")
    with pytest.raises(ValueError, match=rule):
        load_foreign(save_authors(tmp_path / "odd.pth", authors_state(trained), text))


def test_config_text_is_parsed_and_never_executed(tmp_path):
    trained = trained_model(SSV2)
    mark = tmp_path / "executed"
    text = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n" + authors_config(trained, SSV2)
    path = save_authors(tmp_path / "best.pth", authors_state(trained), text)
    assert load_foreign(path).config.num_frames == 16
    for call in (f"open({str(mark)!r}, 'w')", f"__import__('os').system('touch {mark}')"):
        odd = authors_config(trained, SSV2).replace("heads=12", f"heads={call}")
        save_authors(path, authors_state(trained), odd)
        with pytest.raises(ValueError, match="model.backbone.heads must be a plain value"):
            load_foreign(path)
    assert not mark.exists()


@pytest.mark.parametrize("recipe", ["vit_b16_k400_8x16", "vit_b16_ucf101_32"])
def test_evaluation_of_a_converted_checkpoint_is_on_the_published_pixels(recipe, tmp_path):
    """OpenCV's, by MMAction2's rules, with nothing said about them."""
    trained = trained_model(recipe)
    path, model = str(saved(tmp_path, trained, recipe)), str(tmp_path / "model")
    names = [f"{i}.mp4" for i in range(3)]
    for i, name in enumerate(names):
        write_numbered(tmp_path / name, 40 + 9 * i, size=(90 + 20 * i, 130))
    (tmp_path / "list.txt").write_text("".join(f"{name} 0\n" for name in names))
    assert cli.run(convert.main, [path, "--out", model]) == 0
    words = [model, "--list", str(tmp_path / "list.txt"), "--root", str(tmp_path)]
    assert cli.run(evaluate.main, [*words, "--out", str(tmp_path / "eval.json")]) == 0
    rows = (tmp_path / "eval_predictions.jsonl").read_text().splitlines()

    process, frames = trained.config.preprocess, trained.config.num_frames
    clips, crops = process.test_views
    mean, std = np.array([122.769, 116.74, 104.04]), np.array([68.493, 66.63, 70.321])
    for name, row in zip(names, map(json.loads, rows), strict=True):

        def indices(total):
            if process.sampling == "uniform":
                return uniform_indices(total, frames, clips).ravel()
            return dense_indices(total, frames, process.interval, clips).ravel()

        images = read_frames(str(tmp_path / name), indices)
        views = np.stack([mmaction2(image, 224, 32, crops) for image in images], axis=1)
        views = ((views - mean) / std).reshape(crops * clips, frames, 32, 32, 3)
        video = torch.from_numpy(views.transpose(0, 4, 1, 2, 3)).float()
        with torch.no_grad():
            probs = trained(video).softmax(-1).mean(0)
        assert row["predicted"] == int(probs.argmax())
        assert row["probability"] == pytest.approx(float(probs.max()), abs=2e-6)


def test_how_a_config_resizes_is_taken_over_or_refused(tmp_path):
    trained = trained_model(SSV2)
    text = authors_config(trained, SSV2)
    for kind in ("bilinear", "bicubic", "area"):
        changed = text.replace("scale=(-1, 224)", f"scale=(-1, 224), interpolation={kind!r}")
        path = save_authors(tmp_path / f"{kind}.pth", authors_state(trained), changed)
        if kind == "area":
            with pytest.raises(ValueError, match="preprocess.interpolation must be.*: got .*area"):
                load_foreign(path)
        else:
            assert load_foreign(path).config.preprocess.interpolation == kind
