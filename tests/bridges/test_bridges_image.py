"""Image models of other libraries: the real library's model, random weights, the same features."""

import dataclasses
import json
import warnings
import zipfile

import pytest
import torch
from foreign import open_clip_model, relative, shake, timm_model, transformers_config
from models import build
from safetensors.torch import save_file

from zeroi2v import VideoViT, load_foreign, merge, verify
from zeroi2v.bridges.load import load_backbone
from zeroi2v.config import ModelConfig
from zeroi2v.reparam import seeded_clips

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def features(model: VideoViT, images: torch.Tensor = IMAGES) -> torch.Tensor:
    with torch.no_grad():
        return model.features(images[:, :, None])[:, 0]


@pytest.fixture(scope="module")
def clip():
    """The state dict of open_clip's CLIP with QuickGELU, as OpenAI's."""
    return open_clip_model(quick_gelu=True).state_dict()


def openai_state(state: dict) -> dict:
    marks = {"input_resolution": 32, "context_length": 8, "vocab_size": 50}
    return state | {name: torch.tensor(value) for name, value in marks.items()}


def test_openai_state_dict_has_the_features_of_open_clips_loader(clip, tmp_path):
    from open_clip.model import build_model_from_openai_state_dict

    state = openai_state({name: tensor.half() for name, tensor in clip.items()})  # as OpenAI's
    torch.save(state, tmp_path / "ViT.pt")
    theirs = build_model_from_openai_state_dict(dict(state), cast_dtype=torch.float32)
    theirs.visual.proj = None
    with torch.no_grad():
        expected = theirs.float().eval().visual(IMAGES)
    ours = load_foreign(tmp_path / "ViT.pt")
    assert relative(features(ours), expected) <= 1e-5
    assert (ours.config.activation, ours.config.num_heads) == ("quick_gelu", 2)
    assert ours.config.adapter is None and not any(ours.config.head_offsets)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """A TorchScript archive in fp16, as OpenAI publishes its CLIP."""
    path = tmp_path_factory.mktemp("openai") / "ViT-B-16.pt"
    model = open_clip_model(quick_gelu=True)
    model.__dict__["attn_mask"] = model._buffers.pop("attn_mask")  # no buffer in OpenAI's
    for name, tensor in openai_state({}).items():
        model.__dict__.pop(name, None)
        model.register_buffer(name, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        inputs = (IMAGES, torch.ones(2, 8, dtype=int))
        scripted = torch.jit.trace(model, inputs, check_trace=False)
        for tensor in (*scripted.parameters(), *scripted.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.half()
        scripted.save(str(path))
    return path


def test_openai_torchscript_archive_has_the_features_of_open_clips_loader(archive):
    from open_clip.openai import load_openai_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = load_openai_model(str(archive), precision="fp32", device="cpu")
    theirs.visual.proj = None
    with torch.no_grad():
        expected = theirs.eval().visual(IMAGES)
    ours = load_foreign(archive)
    assert relative(features(ours), expected) <= 1e-5
    assert (ours.config.activation, ours.config.num_heads) == ("quick_gelu", 2)


def test_openai_torchscript_archive_runs_no_code(archive, tmp_path, monkeypatch):
    for name in ("load", "_load_for_lite_interpreter"):
        monkeypatch.setattr(torch.jit, name, lambda *a, **k: pytest.fail("it was run"), False)
    broken = tmp_path / "ViT.pt"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(broken, "w") as new:
        for name in old.namelist():
            code = "/code/" in name and not name.endswith(".debug_pkl")
            new.writestr(name, b"this is no code" if code else old.read(name))
    assert torch.equal(features(load_foreign(broken)), features(load_foreign(archive)))


@pytest.mark.parametrize("source", ["archive", "state", "transformers", "timm"])
@pytest.mark.parametrize("size", [32, 64])
def test_training_starts_from_any_of_them_as_it_is(archive, clip, tmp_path, source, size):
    import transformers

    shape = dict(image_size=size, patch_size=8, width=128, depth=2, num_heads=2, num_frames=3)
    config = ModelConfig(**shape, num_classes=5, head_offsets=(-1, 1))
    path = tmp_path / "vit.pt"
    if source == "archive":
        path = archive
    elif source == "state":
        torch.save({"state_dict": clip}, path)
    elif source == "transformers":
        sizes = dict(hidden_size=128, intermediate_size=512, num_attention_heads=2)
        theirs = shake(transformers.CLIPVisionModel(transformers_config(**sizes)))
        theirs.save_pretrained(tmp_path)
        path = tmp_path
    else:
        torch.save(timm_model().state_dict(), path)
        config = dataclasses.replace(config, activation="gelu")
    told = source in ("archive", "transformers")  # heads and activation
    image = load_foreign(path, **({} if told else {"activation": config.activation}))
    video = build(config)
    notes = load_backbone(video, path)
    assert any("format" in note for note in notes)
    assert any("resized from 32 pixels" in note for note in notes) == (size != 32)
    for name, tensor in image.state_dict().items():
        resized = name == "positional_embedding" and size != 32
        if not resized and not name.startswith(("temporal", "head")):
            assert torch.equal(video.state_dict()[name], tensor)

    other = "gelu" if config.activation == "quick_gelu" else "quick_gelu"
    wrong = build(dataclasses.replace(config, activation=other))
    heads = build(dataclasses.replace(config, num_heads=4, head_offsets=(-1, 1, 0, 0)))
    if told:
        with pytest.raises(
            ValueError, match=f"activation '{config.activation}', the model '{other}"
        ):
            load_backbone(wrong, path)
        with pytest.raises(ValueError, match="num_heads 2, the model 4"):
            load_backbone(heads, path)
    else:
        given = f"activation {other} as given, which the file does not tell"
        assert given in load_backbone(wrong, path)
        assert any("against the convention of 2" in note for note in load_backbone(heads, path))


def test_openai_resolution_that_contradicts_the_weights_is_an_error(clip, tmp_path):
    state = openai_state(clip) | {"input_resolution": torch.tensor(224)}
    torch.save(state, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="input_resolution is 224.* is for 32 pixels"):
        load_foreign(tmp_path / "clip.pt")


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_open_clip_file_has_open_clips_features(tmp_path, quick_gelu, suffix):
    model = open_clip_model(quick_gelu=quick_gelu)
    path = tmp_path / f"open_clip_model.{suffix}"
    state = {f"module.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    if suffix == "pt":
        torch.save({"epoch": 3, "name": "x", "state_dict": state, "optimizer": {}}, path)
    else:
        save_file(state, path)
    model.visual.proj = None
    with torch.no_grad():
        expected = model.visual(IMAGES)
    right, wrong = ("quick_gelu", "gelu") if quick_gelu else ("gelu", "quick_gelu")
    assert relative(features(load_foreign(path, activation=right)), expected) <= 1e-5
    # The activation is in no tensor: it is asked for, and a wrong answer could not be told.
    with pytest.raises(ValueError, match="does not say all: give activation"):
        load_foreign(path)
    assert relative(features(load_foreign(path, activation=wrong)), expected) > 1e-3


@pytest.mark.parametrize("size", [24, 48])
def test_positions_are_resized_as_open_clip_does(tmp_path, size):
    from open_clip.model import resize_pos_embed

    state = open_clip_model().state_dict()
    torch.save(dict(state), tmp_path / "laion.pt")
    theirs, resized = open_clip_model(image_size=size), dict(state)
    resize_pos_embed(resized, theirs)
    theirs.load_state_dict(resized)
    theirs.visual.proj = None
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.visual(images)
    ours = load_foreign(tmp_path / "laion.pt", activation="gelu", image_size=size)
    assert relative(features(ours, images), expected) <= 1e-5


def test_open_clip_folder_tells_heads_and_activation(tmp_path):
    model = open_clip_model(head_width=32, ls_init_value=0.3)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    vision = dict(layers=2, width=128, patch_size=8, image_size=32, head_width=32)
    vision |= dict(ls_init_value=0.3)
    pixels = {"mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]}
    config = {"model_cfg": {"embed_dim": 32, "vision_cfg": vision}, "preprocess_cfg": pixels}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    model.visual.proj = None
    with torch.no_grad():
        expected = model.visual(IMAGES)
    ours = load_foreign(tmp_path)
    assert relative(features(ours), expected) <= 1e-5  # LayerScale is merged
    assert (ours.config.num_heads, ours.config.activation) == (4, "gelu")
    assert ours.config.preprocess.mean == (127.5, 127.5, 127.5)
    for override, rule in (
        ({"activation": "quick_gelu"}, "activation must be gelu"),
        (
            {"num_heads": 2},
            "num_heads must be 4",
        ),
    ):
        with pytest.raises(ValueError, match=rule):
            load_foreign(tmp_path, **override)
    for change, rule in (
        ({"layers": 3}, "depth 3, its weights 2"),
        ({"image_size": 64}, "image_size 64"),
        ({"pool_type": "avg"}, "pool_type = 'avg' is not supported"),
        ({"no_ln_pre": True}, "no_ln_pre = True is not supported"),
    ):
        config["model_cfg"]["vision_cfg"] = vision | change
        (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rule):
            load_foreign(tmp_path)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel"])
def test_transformers_folder_has_its_features(tmp_path, kind, activation):
    import transformers

    config = transformers_config(hidden_act=activation)
    if kind == "CLIPModel":
        text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=50)
        text |= dict(num_attention_heads=1, bos_token_id=0, eos_token_id=1, pad_token_id=1)
        config = transformers.CLIPConfig(text_config=text, vision_config=config.to_dict())
    theirs = shake(getattr(transformers, kind)(config))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3]}')
    tower = theirs if kind == "CLIPVisionModel" else theirs.vision_model
    with torch.no_grad():
        expected = tower(IMAGES).pooler_output
    ours = load_foreign(tmp_path)
    assert relative(features(ours), expected) <= 1e-5
    assert ours.config.activation == activation and ours.config.num_heads == 3
    assert ours.config.preprocess.mean == (127.5, 102.0, 76.5)


def test_transformers_config_that_contradicts_the_weights_is_an_error(tmp_path):
    import transformers

    shake(transformers.CLIPVisionModel(transformers_config())).save_pretrained(tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    for change, rule in (
        ({"image_size": 64}, "image_size 64, its weights 32"),
        ({"hidden_act": "relu"}, "hidden_act must be quick_gelu or gelu or .*: got relu"),
        ({"layer_norm_eps": 0}, "layer_norm_eps = 0 must be a positive number"),
        ({"num_attention_heads": 5}, "width must be a multiple of num_heads 5"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(told | change))
        with pytest.raises(ValueError, match=rule):
            load_foreign(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(told))
    for override, rule in (
        ({"num_heads": 6}, "num_heads must be 3"),
        ({"activation": "gelu"}, "activation must be quick_gelu"),
        ({"image_size": 36}, "image_size must be a multiple of patch_size 8"),
        ({"depth": 3}, "depth must be 2"),
    ):
        with pytest.raises(ValueError, match=rule):
            load_foreign(tmp_path, **override)


def test_bare_transformers_file_asks_for_what_it_does_not_say(tmp_path):
    import transformers

    theirs = shake(transformers.CLIPVisionModel(transformers_config()))
    torch.save(theirs.state_dict(), tmp_path / "weights.bin")
    with pytest.raises(ValueError, match="give activation=.*; num_heads="):
        load_foreign(tmp_path / "weights.bin")
    ours = load_foreign(tmp_path / "weights.bin", num_heads=3, activation="quick_gelu")
    with torch.no_grad():
        assert relative(features(ours), theirs(IMAGES).pooler_output) <= 1e-5


def test_timm_folder_tells_the_activation(tmp_path):
    theirs = timm_model("vit_base_patch16_clip_quickgelu_224")
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "vit_base_patch16_clip_quickgelu_224", "pretrained_cfg": {}}
    config["model_args"] = {"num_heads": 2}  # the architecture has 12
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = load_foreign(tmp_path)
    with torch.no_grad():
        assert relative(features(ours), theirs.forward_features(IMAGES)[:, 0]) <= 1e-5
    with pytest.raises(ValueError, match="activation must be quick_gelu"):
        load_foreign(tmp_path, activation="gelu")


# What they were trained on: ImageNet-21k (and, of the same shape, DINO), DINOv2, DeiT III.
@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224",
        "vit_base_patch14_dinov2",
        "deit3_base_patch16_224",
        "vit_base_patch16_clip_224",
    ],
)
@pytest.mark.parametrize("size", [32, 48])
def test_timm_vit_of_every_lineage_has_timms_features(tmp_path, name, size):
    theirs = timm_model(name, init_values=0.3) if "dino" in name else timm_model(name)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter *= 0.05  # so small that a norm's epsilon shows
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    if size != 32:
        from timm.models.vision_transformer import checkpoint_filter_fn

        other = timm_model(name, img_size=size, **({"init_values": 1} if "dino" in name else {}))
        other.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), other))
        theirs = other
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.forward_features(images)[:, 0]
    ours = load_foreign(tmp_path / "vit.pth", activation="gelu", image_size=size)
    assert relative(features(ours, images), expected) <= 1e-5
    assert ours.config.ln_pre == ("clip" in name)
    if not ours.config.ln_pre:  # the epsilon does matter
        for module in theirs.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = 1e-5
        with torch.no_grad():
            assert relative(theirs.forward_features(images)[:, 0], expected) > 1e-4


def test_timm_vit_without_a_norm_before_its_blocks_trains_merges_and_is_saved(tmp_path):
    torch.save(timm_model("vit_base_patch16_224").state_dict(), tmp_path / "vit.pth")
    offsets = dict(num_heads=2, head_offsets=[-1, 1], num_frames=4, num_classes=5)
    video = load_foreign(
        tmp_path / "vit.pth", activation="gelu", **offsets, adapter={"ratio": 0.25, "scale": 0.5}
    )
    adapted = randomize_adapters(video)
    clips = seeded_clips(adapted, 2)
    adapted.freeze()(clips).sum().backward()
    assert adapted.transformer.resblocks[0].attn.in_adapter.up.weight.grad.norm() > 0
    merged = merge(adapted.eval())
    assert verify(adapted, merged, clips).passed
    assert not [name for name in merged.state_dict() if "ln_pre" in name]
    merged.save_pretrained(tmp_path / "merged")
    with torch.no_grad():
        again = VideoViT.from_pretrained(tmp_path / "merged")
        assert torch.equal(again(clips), merged(clips))


def randomize_adapters(model: VideoViT) -> VideoViT:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_adapter." in name or name.startswith("head."):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("deit_base_distilled_patch16_224", "has a distillation token"),
        ("eva_large_patch14_196", "has a norm after the mean of the tokens"),
        ("vit_base_patch16_rope_mixed_224", "has learned rotary frequencies"),
        ("vit_base_patch16_rope_224", "may have rotary positions"),
        ("vit_base_patch16_rope_reg1_gap_256", "has a norm after the mean of the tokens"),
        ("vit_pe_spatial_base_patch16_512", "lacks a norm after the blocks"),
        ("vit_base_patch16_xp_224", "is of no known format"),
        ("vit_relpos_base_patch16_224", "has relative positions"),
        ("vit_srelpos_small_patch16_224", "has relative positions"),
        ("eva02_enormous_patch14_clip_224", "may have rotary positions"),
    ],
)
def test_timm_models_of_another_shape_are_refused(tmp_path, name, rule):
    torch.save(timm_model(name).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match=rule):
        load_foreign(tmp_path / "vit.pth", activation="gelu")


def test_block_that_lacks_a_part_of_the_others_is_damaged(tmp_path):
    state = timm_model().state_dict()
    del state["blocks.1.mlp.fc1.bias"]  # not one of zeros
    torch.save(state, tmp_path / "vit.pth")
    rule = "all blocks must have the same parts: mlp.c_fc.bias of block 1"
    with pytest.raises(ValueError, match=rule):
        load_foreign(tmp_path / "vit.pth", activation="gelu")


def test_heads_of_wide_models_are_asked_for(tmp_path):
    theirs = timm_model(embed_dim=1280, num_heads=16, depth=1)
    torch.save(theirs.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(ValueError, match="give num_heads="):
        load_foreign(tmp_path / "vit.pth", activation="gelu")
    ours = load_foreign(tmp_path / "vit.pth", activation="gelu", num_heads=16)
    with torch.no_grad():
        assert relative(features(ours), theirs.forward_features(IMAGES)[:, 0]) <= 1e-5


def test_recipe_makes_the_untrained_video_model_of_an_image_model(tmp_path):
    theirs = timm_model(embed_dim=768, num_heads=12, depth=12, patch_size=16)
    path = tmp_path / "vit.pth"
    torch.save(theirs.state_dict(), path)
    with pytest.raises(ValueError, match="recipe vit_l14_ssv2_32 has width 1024"):
        load_foreign(path, recipe="vit_l14_ssv2_32", activation="gelu")
    with pytest.raises(ValueError, match="recipe vit_b16_ssv2_16 has image_size 224"):
        load_foreign(path, recipe="vit_b16_ssv2_16", activation="gelu")
    with pytest.raises(ValueError, match="give activation="):  # a recipe does not settle it
        load_foreign(path, recipe="vit_b16_ssv2_16", image_size=32)
    ours = load_foreign(path, recipe="vit_b16_ssv2_16", activation="gelu", image_size=32)
    assert ours.config.head_offsets[:4] == (-1, 1, -2, 2) and ours.config.num_frames == 16
    assert ours.config.adapter.scale == 1.0 and ours.config.num_classes == 174
    still = IMAGES[:, :, None].expand(-1, -1, 16, -1, -1)  # nothing moves, nothing is trained
    with torch.no_grad():
        expected = theirs.forward_features(IMAGES)[:, 0]
        assert relative(ours.features(still)[:, 3], expected) <= 1e-5
