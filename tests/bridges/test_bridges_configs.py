"""Foreign configs are read whole: each setting gives the library's own model, or is refused.

The library is the oracle. A model is saved by the library's own function, one setting of its config
is changed, and the library builds what that config now says. Ours must have its features, or name
the setting in an error. Where the library itself can't load the weights, only the error will do.
"""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from foreign import (
    open_clip_model,
    relative,
    shake,
    timm_model,
    transformers_config,
    transformers_model,
)
from safetensors.torch import load_file, save_file

from bench.baselines.image_models import _declare_torchvision_operators
from zeroi2v import load_foreign
from zeroi2v.bridges import open_clip as open_clip_bridge
from zeroi2v.bridges import timm as timm_bridge
from zeroi2v.bridges import timm_names
from zeroi2v.bridges import transformers as transformers_bridge
from zeroi2v.bridges.foreign import read_keys
from zeroi2v.bridges.transformers_families import FAMILIES

_declare_torchvision_operators()  # before any of the libraries is imported
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TIMM = "vit_base_patch16_clip_224"


def same_or_refused(folder, key, theirs) -> bool:
    """Whether ours is `theirs()`; an error must name `key`. Fails if it is another model."""
    try:
        expected = theirs()
    except Exception:  # the library refuses what the config now says
        expected = None
    try:
        ours = load_foreign(folder)
    except ValueError as error:
        assert any(word in str(error) for word in NAMES.get(key, (key,))), str(error)
        return False
    assert expected is not None, f"{key}: the library can't load it"
    with torch.no_grad():
        assert relative(ours.features(IMAGES[:, :, None])[:, 0], expected) <= 1e-5
    return True


# What our messages call a setting, where it is not by its own name.
NAMES = {
    "embed_dim": ("width",),
    "hidden_size": ("width",),
    "num_hidden_layers": ("depth",),
    "layers": ("depth",),
    "img_size": ("image_size",),
    "input_size": ("image_size", "input_size"),
    "num_attention_heads": ("num_heads",),
    "layer_norm_eps": ("epsilon",),
    "head_width": ("num_heads",),
}


def write(path, config, place, key, value):
    section = config
    for part in place:
        section = section.setdefault(part, {})
    section[key] = value
    path.write_text(json.dumps(config))


def save_timm(folder, **settings):
    from timm.models._hub import save_for_hf

    model = timm_model(settings.pop("name", TIMM), **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 0.3  # so that an epsilon shows
    save_for_hf(model, folder, safe_serialization=True)
    return json.loads((folder / "config.json").read_text())


def timm_says(folder):
    import timm

    config = json.loads((folder / "config.json").read_text())
    model = timm.create_model(config["architecture"], **config["model_args"])
    model.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        tokens = model.eval().forward_features(IMAGES)
        return tokens[:, 0] if model.global_pool in ("token", "") else model.pool(tokens)


@pytest.mark.parametrize(
    ("key", "value", "taken"),
    [
        ("act_layer", "quick_gelu", True),
        ("act_layer", "gelu", True),
        ("act_layer", "gelu_tanh", True),
        ("act_layer", "relu", False),
        ("num_heads", 4, True),
        ("num_heads", 1, True),
        ("norm_layer", "layernorm", True),
        ("norm_layer", "rmsnorm", False),
        ("global_pool", "avg", False),
        ("global_pool", "max", False),
        ("global_pool", "map", False),
        ("global_pool", "", True),
        ("fc_norm", True, False),
        ("fc_norm", False, True),
        ("class_token", False, False),
        ("reg_tokens", 4, False),
        ("pre_norm", False, False),
        ("final_norm", False, False),
        ("qk_norm", True, False),
        ("scale_attn_norm", True, False),
        ("scale_mlp_norm", True, False),
        ("init_values", 0.1, False),
        ("qkv_bias", False, False),
        ("proj_bias", False, False),
        ("no_embed_class", True, False),
        ("pos_embed", "none", False),
        ("img_size", [32, 64], False),
        ("img_size", 64, False),
        ("patch_size", 4, False),
        ("in_chans", 1, False),
        ("embed_dim", 64, False),
        ("depth", 3, False),
        ("mlp_ratio", 2.0, False),
        ("pool_include_prefix", True, False),
        ("dynamic_img_size", True, True),
        ("dynamic_img_pad", True, True),
        ("drop_rate", 0.5, True),
        ("patch_drop_rate", 0.5, True),
        ("attn_drop_rate", 0.5, True),
        ("proj_drop_rate", 0.5, True),
        ("drop_path_rate", 0.5, True),
        ("weight_init", "jax", True),
        ("fix_init", True, True),
        ("setting_of_tomorrow", 1, False),
    ],
)
def test_timm_argument_is_timms_model_or_refused_by_name(tmp_path, key, value, taken):
    config = save_timm(tmp_path)
    write(tmp_path / "config.json", config, ["model_args"], key, value)
    assert same_or_refused(tmp_path, key, lambda: timm_says(tmp_path)) == taken


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"act_layer": "quick_gelu"},
        {"qkv_bias": False},
        {"proj_bias": False, "init_values": 0.3},
        {"name": "vit_base_patch16_224", "qkv_bias": False, "num_heads": 4},
        {"name": "vit_base_patch14_dinov2"},
        {"name": "deit3_base_patch16_224"},
        {"name": "vit_base_patch16_clip_quickgelu_224"},
    ],
)
def test_timm_folder_as_timm_saves_it_has_timms_features(tmp_path, settings):
    save_timm(tmp_path, **settings)
    assert same_or_refused(tmp_path, "", lambda: timm_says(tmp_path))


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ([], "global_pool", "avg"),
        ([], "architecture", "vit_base_patch16_rope_224"),
        ([], "setting_of_tomorrow", 1),
        (["pretrained_cfg"], "input_size", [3, 32, 64]),
        (["pretrained_cfg"], "setting_of_tomorrow", 1),
    ],
)
def test_timm_config_of_another_model_is_refused_by_name(tmp_path, place, key, value):
    write(tmp_path / "config.json", save_timm(tmp_path), place, key, value)
    assert not same_or_refused(tmp_path, key, lambda: None)


VISION = dict(layers=2, width=128, patch_size=8, image_size=32)


def save_open_clip(folder, **vision):
    from open_clip.push_to_hf_hub import save_config_for_hf

    quick = vision.get("quick_gelu", False)
    model = open_clip_model(**vision)
    model.visual.image_mean, model.visual.image_std = [0.5] * 3, [0.25] * 3
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    vision = {k: v for k, v in vision.items() if k != "quick_gelu"}
    text = dict(context_length=8, vocab_size=50, width=64, heads=1, layers=1)
    config = dict(embed_dim=32, vision_cfg=VISION | vision, text_cfg=text, quick_gelu=quick)
    path = folder / "open_clip_config.json"
    save_config_for_hf(model, path, model_config=config)
    return json.loads(path.read_text())


def open_clip_says(folder):
    from open_clip.model import CLIP

    model = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    theirs = CLIP(**model)
    theirs.load_state_dict(load_file(folder / "open_clip_model.safetensors"))
    theirs.visual.proj = None
    with torch.no_grad():
        result = theirs.eval().visual(IMAGES)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize(
    ("key", "value", "taken"),
    [
        ("head_width", 32, True),
        ("head_width", 128, True),
        ("norm_kwargs", {"eps": 1e-3}, True),
        ("norm_kwargs", {"elementwise_affine": False}, False),
        ("act_kwargs", {"approximate": "tanh"}, False),
        ("pool_type", "avg", False),
        ("pool_type", "none", False),
        ("attentional_pool", True, False),
        ("no_ln_pre", True, False),
        ("final_ln_after_pool", True, False),
        ("pos_embed_type", "sin_cos_2d", False),
        ("ls_init_value", 0.1, False),
        ("block_type", "custom", False),
        ("qk_norm", True, False),
        ("scaled_cosine_attn", True, False),
        ("scale_heads", True, False),
        ("scale_attn_inner", True, False),
        ("scale_attn", True, False),
        ("scale_fc", True, False),
        ("timm_model_name", "vit_base_patch16_224", False),
        ("image_size", [16, 64], False),
        ("image_size", [32, 32], True),
        ("mlp_ratio", 2.0, False),
        ("layers", 3, False),
        ("width", 64, False),
        ("patch_size", 4, False),
        ("patch_dropout", 0.5, True),
        ("output_tokens", True, True),
        ("attn_pooler_heads", 4, True),
        ("timm_pool", "", True),
        ("timm_drop", 0.5, True),
        ("setting_of_tomorrow", False, False),
    ],
)
def test_open_clip_setting_is_open_clips_model_or_refused_by_name(tmp_path, key, value, taken):
    config = save_open_clip(tmp_path)
    path = tmp_path / "open_clip_config.json"
    write(path, config, ["model_cfg", "vision_cfg"], key, value)
    assert same_or_refused(tmp_path, key, lambda: open_clip_says(tmp_path)) == taken


@pytest.mark.parametrize(("key", "value"), [("quick_gelu", True), ("quick_gelu", False)])
def test_open_clip_folder_as_it_saves_it_has_its_features(tmp_path, key, value):
    config = save_open_clip(tmp_path, quick_gelu=not value)
    write(tmp_path / "open_clip_config.json", config, ["model_cfg"], key, value)
    assert same_or_refused(tmp_path, key, lambda: open_clip_says(tmp_path))
    write(tmp_path / "open_clip_config.json", config, ["model_cfg"], "of_tomorrow", 1)
    assert not same_or_refused(tmp_path, "of_tomorrow", lambda: None)


def transformers_says(folder):
    import transformers

    config = transformers.CLIPVisionConfig(**json.loads((folder / "config.json").read_text()))
    theirs = transformers.CLIPVisionModel(config)
    theirs.load_state_dict(load_file(folder / "model.safetensors"))
    with torch.no_grad():
        return theirs.eval()(IMAGES).pooler_output


@pytest.mark.parametrize(
    ("key", "value", "taken"),
    [
        ("hidden_act", "gelu", True),
        ("hidden_act", "gelu_new", False),
        ("hidden_act", "relu", False),
        ("num_attention_heads", 6, True),
        ("num_attention_heads", 5, False),
        ("layer_norm_eps", 1e-6, True),
        ("layer_norm_eps", 1e-3, True),
        ("layer_norm_eps", 1e-12, True),
        ("hidden_size", 96, False),
        ("intermediate_size", 192, False),
        ("num_hidden_layers", 3, False),
        ("image_size", 64, False),
        ("patch_size", 16, False),
        ("num_channels", 1, False),
        ("model_type", "siglip_vision_model", False),
        ("attention_dropout", 0.5, True),
        ("initializer_range", 0.5, True),
        ("projection_dim", 99, True),
        ("output_attentions", False, True),
        ("setting_of_tomorrow", None, False),
    ],
)
def test_transformers_setting_is_its_model_or_refused_by_name(tmp_path, key, value, taken):
    import transformers

    shake(transformers.CLIPVisionModel(transformers_config())).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    write(tmp_path / "config.json", config, [], key, value)
    assert same_or_refused(tmp_path, key, lambda: transformers_says(tmp_path)) == taken


@pytest.mark.parametrize(
    ("key", "value"), [("do_normalize", False), ("rescale_factor", 1), ("of_tomorrow", 1)]
)
def test_transformers_pixels_of_another_scale_are_refused(tmp_path, key, value):
    import transformers

    shake(transformers.CLIPVisionModel(transformers_config())).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(ValueError, match=key):
        load_foreign(tmp_path)


# Configs as they are published: no key of theirs is one that nobody has looked at


def refusals(read) -> list[str]:
    try:
        read()
    except ValueError as error:
        return [str(error)]
    return []


def test_every_config_that_open_clip_ships_is_read_or_refused_for_what_it_is():
    import open_clip

    files = sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json"))
    told = {}
    for file in files:
        config = json.loads(file.read_text())
        if config["vision_cfg"].get("timm_model_name") or isinstance(
            config["vision_cfg"].get("layers"), list
        ):
            continue  # a tower of timm's, or a ResNet
        read_top = partial(read_keys, config, "", {"vision_cfg": {}, "quick_gelu": False})
        read_tower = partial(
            read_keys, config["vision_cfg"], "", open_clip_bridge._HANDLED,
            open_clip_bridge._FIXED, open_clip_bridge._HARMLESS,
        )  # fmt: skip
        told[file.stem] = refusals(partial(read_top, harmless=open_clip_bridge._TOP))
        told[file.stem] += refusals(read_tower)
    refused = {name: errors for name, errors in told.items() if errors}
    assert len(told) > 50 and len(refused) < 0.4 * len(told)
    for name, errors in refused.items():
        assert all("is not supported" in error for error in errors), (name, errors)
    for name in ("ViT-B-16", "ViT-L-14-quickgelu", "ViT-H-14", "ViT-L-14-336", "ViT-B-16-plus"):
        assert name in told and name not in refused, refused.get(name)


def timm_architectures() -> dict[str, tuple[bool, dict]]:
    """What timm itself makes of each name: whether it is an `Eva`, and its arguments."""
    import timm
    from timm.models import eva, vision_transformer

    found = {}
    with pytest.MonkeyPatch.context() as patch:
        for module, maker in (
            (vision_transformer, "_create_vision_transformer"),
            (eva, "_create_eva"),
        ):
            is_eva = module is eva
            patch.setattr(
                module,
                maker,
                lambda name, pretrained, _e=is_eva, **k: found.update({name: (_e, k)}),
            )
            for name in timm.list_models(module=module.__name__.rpartition(".")[2]):
                timm.models.model_entrypoint(name)()
    return found


def test_names_of_timm_stand_for_what_they_stand_for_there():
    unlike, taken = {}, 0
    for name, (is_eva, theirs) in timm_architectures().items():
        if (ours := timm_names.settings(name)) is None:
            continue
        taken += 1
        norm = theirs.pop("norm_layer", None)
        theirs["norm_eps"] = norm.keywords["eps"] if norm else 1e-6
        gated = theirs.get("mlp_layer") is not None
        for key, value in ours[1].items():
            base = timm_names.EVA if is_eva else timm_names.VIT
            other = theirs.get(key, base[key])
            other = other[0] if key == "ref_feat_shape" and other else other
            if key == "act_layer" and gated:
                other = "silu"
            if (ours[0], value) != (is_eva, other):
                unlike[name] = (key, value, other)
    assert taken > 130 and not unlike


def test_every_vit_of_a_name_that_is_known_has_a_config_without_an_unknown_key():
    import timm
    from timm.models import get_pretrained_cfg

    names = [n for n in timm.list_pretrained() if timm_names.settings(n.partition(".")[0])]
    unknown = {}
    for name in names:
        config = get_pretrained_cfg(name).to_dict()
        handled = {"architecture": None, "input_size": None, "global_pool": None}
        read = partial(
            read_keys, config, name, handled | timm_bridge._PIXELS, harmless=timm_bridge._HARMLESS
        )
        if errors := refusals(read):
            unknown[name] = errors
    assert len(names) > 150 and not unknown


def test_configs_that_transformers_writes_have_no_unknown_key():
    import transformers

    kinds = "CLIP CLIPVision MetaClip2 MetaClip2Vision Siglip SiglipVision ViT Dinov2"
    kinds += " Dinov2WithRegisters DINOv3ViT Aimv2 Aimv2Vision"
    seen = set()
    for kind in kinds.split():
        config = getattr(transformers, f"{kind}Config")().to_dict()
        family = next(f for f in FAMILIES if config["model_type"] in f.kinds)
        seen.add(family.name)
        fixed = transformers_bridge._FIXED | {"model_type": family.kinds} | family.fixed
        sections = [config.pop("vision_config"), config] if "vision_config" in config else [config]
        for section in sections:
            read_keys(section, kind, family.handled, fixed, transformers_bridge._HARMLESS)
        tower = sections[0]
        unlike = {
            k: (v, tower[k]) for k, v in family.handled.items() if k in tower and v != tower[k]
        }
        assert not unlike, (kind, unlike)  # the values of what a file leaves out
    assert len(seen) == len(FAMILIES)


# Values of another kind than a setting has


def save_transformers(folder):
    import transformers

    shake(transformers.CLIPVisionModel(transformers_config())).save_pretrained(folder)


def save_dinov3(folder):
    transformers_model("DINOv3ViTModel", intermediate_size=96).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")


def save_pe(folder):
    save_timm(folder, name="vit_pe_core_base_patch16_224")


@pytest.mark.parametrize(
    ("save", "file", "place", "key", "values"),
    [
        (save_timm, "config.json", ["model_args"], "num_heads", [0, "x", None, 2.5, True]),
        (save_timm, "config.json", ["model_args"], "act_layer", [["gelu"], {}]),
        (save_timm, "config.json", [], "pretrained_cfg", [[1], "x", 3]),
        (save_timm, "config.json", [], "model_args", [[1], "x", 3]),
        (save_timm, "config.json", ["pretrained_cfg"], "input_size", [3, [], [3], "x"]),
        (save_timm, "config.json", ["pretrained_cfg"], "std", [0.5, [0, 0, 0], "x"]),
        (save_timm, "config.json", ["pretrained_cfg"], "mean", [0.5, [0.5], "x"]),
        (save_transformers, "config.json", [], "hidden_size", [0, "x", None]),
        (save_transformers, "config.json", [], "intermediate_size", ["x", None]),
        (save_transformers, "config.json", [], "num_attention_heads", [0, "x"]),
        (save_transformers, "config.json", [], "hidden_act", [["gelu"]]),
        (save_transformers, "config.json", [], "layer_norm_eps", [0, "1e-5"]),
        (save_dinov3, "config.json", [], "rope_theta", [0, "x", None, [100.0]]),
        (save_dinov3, "config.json", [], "image_size", ["x", [], [1.5], 0]),
        (save_pe, "config.json", ["model_args"], "rope_temperature", [0, "x", None]),
        (save_pe, "config.json", ["model_args"], "rope_grid_offset", ["x", None]),
        (save_pe, "config.json", ["model_args"], "ref_feat_shape", ["x", [], [0, 1]]),
        (save_pe, "config.json", ["model_args"], "attn_pool_num_heads", ["x", 2.5]),
    ],
)
def test_value_of_another_kind_is_refused_by_key_and_file(tmp_path, save, file, place, key, values):
    save(tmp_path)
    text = (tmp_path / file).read_text()
    for value in values:
        write(tmp_path / file, json.loads(text), place, key, value)
        with pytest.raises(ValueError) as error:
            load_foreign(tmp_path)
        message = str(error.value)
        assert key in message and file in message and repr(value) in message, message
        assert "\n" not in message and len(message) < 400
