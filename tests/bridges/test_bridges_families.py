"""Every family of image models: the real library's model, random weights, the same features.

A case is a model of a library, its folder as the library itself writes it, and what must be seen:
with one field of the converted model's config changed, the features are others.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
from foreign import (
    open_clip_trunk,
    relative,
    save_timm,
    sensitive,
    timm_features,
    timm_model,
    transformers_features,
    transformers_model,
)
from models import build
from safetensors.torch import save_file

from zeroi2v import VideoViT, load_foreign
from zeroi2v.bridges.load import convert, load_backbone
from zeroi2v.bridges.reader import read_source
from zeroi2v.config import ModelConfig, RotaryConfig

LIMIT = 1e-5
EPS_6, EPS_5 = {"norm_eps": 1e-6}, {"norm_eps": 1e-5}
EVA02 = RotaryConfig(base=10000, span=16)
PE, PE_GIGANTIC = RotaryConfig(base=10000, span=14, offset=1), RotaryConfig(base=10000, span=32)
DINOV3 = RotaryConfig(base=100, span=12.566370614359172, start=-6.283185307179586, offset=0.5)


@dataclass(frozen=True)
class Case:
    """One model of one library."""

    build: partial
    """Makes the model: timm's if it is of `timm_model`, else transformers'."""
    has: dict
    """Fields of the converted model's config, as its library has them."""
    wrong: tuple[dict, ...] = field(default=())
    """Changes of the config, each of which must show in the features."""
    size: int = 32
    """Resolution of the model, in pixels."""


def timm(name, **settings) -> partial:
    return partial(timm_model, name, **settings)


def hugging(kind, **settings) -> partial:
    return partial(transformers_model, kind, **settings)


def wrong_rotary(rotary: RotaryConfig, **others) -> tuple[dict, ...]:
    """Changes of rotary positions. Where they begin shows only beside tokens that do not turn."""
    changes = ({"base": rotary.base * 10}, {"span": rotary.span * 1.1}, others)
    return tuple({"rotary": dataclasses.replace(rotary, **change)} for change in changes if change)


CLASS, MEAN, MAP = ({"pooling": kind} for kind in ("class", "mean", "attention"))
GELU, TANH, GATED = ({"activation": kind} for kind in ("gelu", "gelu_tanh", "swiglu"))
NO_CLASS = {"class_token": False}

SMALL = dict(embed_dim=384, num_heads=6, depth=1, img_size=224)
BASE = dict(embed_dim=768, num_heads=12, depth=1, img_size=224, patch_size=16)
HUGGING_BASE = dict(hidden_size=768, num_attention_heads=12, num_hidden_layers=1)
HUGGING_BASE |= dict(intermediate_size=3072, image_size=224, patch_size=16)

CASES = {
    # timm's VisionTransformer
    "timm augreg": Case(
        timm("vit_base_patch16_224"), {**CLASS, **GELU, **EPS_6}, (EPS_5, TANH, MEAN)
    ),
    "timm clip": Case(
        timm("vit_base_patch16_clip_quickgelu_224"),
        {**CLASS, "activation": "quick_gelu", **EPS_5, "ln_pre": True},
        (EPS_6, GELU, MEAN),
    ),
    "timm dinov2": Case(
        timm("vit_base_patch14_dinov2", init_values=0.3),
        {**CLASS, **GELU, **EPS_6},
        (EPS_5, TANH, MEAN),
    ),
    "timm dinov2 registers": Case(
        timm("vit_base_patch14_reg4_dinov2", init_values=0.3),
        {**CLASS, **GELU, **EPS_6, "num_registers": 4},
        (EPS_5, TANH, MEAN),
    ),
    "timm dinov2 giant": Case(
        timm("vit_giant_patch14_reg4_dinov2"), {**CLASS, **GATED, **EPS_6}, (EPS_5, MEAN)
    ),
    "timm siglip": Case(
        timm("vit_base_patch16_siglip_224"),
        {**MAP, **GELU, **EPS_6, **NO_CLASS, "pool_heads": 2},
        (EPS_5, TANH, MEAN, {"pool_heads": 4}),
    ),
    "timm siglip so400m": Case(
        timm("vit_so400m_patch16_siglip_256", embed_dim=144),
        {**MAP, **TANH, **EPS_6, **NO_CLASS},
        (EPS_5, GELU, MEAN),
    ),
    "timm siglip gap": Case(
        timm("vit_base_patch16_siglip_gap_224"), {**MEAN, **GELU, **EPS_6, **NO_CLASS}, (EPS_5,)
    ),
    "timm gap": Case(
        timm("vit_base_patch16_gap_224"), {**MEAN, **GELU, **EPS_6, **NO_CLASS}, (EPS_5, TANH)
    ),
    "timm gap registers": Case(
        timm("vit_so150m_patch16_reg4_gap_256"),
        {**MEAN, **GELU, **EPS_6, **NO_CLASS, "num_registers": 4},
        (EPS_5, TANH),
    ),
    "timm aimv2": Case(
        timm("aimv2_large_patch14_224"),
        {**MEAN, **GATED, **EPS_5, **NO_CLASS, "norm": "rms", "norm_patches": True},
        (EPS_6, {"norm": "layer"}),
    ),
    # timm's Eva
    "timm dinov3": Case(
        timm("vit_base_patch16_dinov3", init_values=0.9),
        {**MEAN, **GELU, **EPS_5, "num_registers": 4, "rotary": DINOV3},
        (EPS_6, CLASS, *wrong_rotary(DINOV3, offset=0.25)),
    ),
    "timm dinov3 class": Case(
        timm("vit_large_patch16_dinov3_qkvb", init_values=0.9, global_pool="token"),
        {**CLASS, **GELU, **EPS_5, "num_registers": 4, "rotary": DINOV3},
        (EPS_6, TANH, MEAN),
    ),
    "timm dinov3 h+": Case(
        timm("vit_huge_plus_patch16_dinov3", init_values=0.3),
        {**MEAN, **GATED, **EPS_5, "num_registers": 4, "rotary": DINOV3},
        (EPS_6, CLASS, *wrong_rotary(DINOV3, offset=0.25)),
    ),
    "timm pe": Case(
        timm("vit_pe_core_base_patch16_224"),
        {**MAP, **GELU, **EPS_5, "ln_pre": True, "pool_heads": 8, "rotary": PE},
        (EPS_6, TANH, CLASS, {"pool_heads": 4}, *wrong_rotary(PE, offset=0.25)),
    ),
    "timm pe gigantic": Case(
        timm("vit_pe_core_gigantic_patch14_448"),
        {**MAP, **GELU, **EPS_5, **NO_CLASS, "ln_pre": True, "rotary": PE_GIGANTIC},
        (EPS_6, TANH, *wrong_rotary(PE_GIGANTIC)),
    ),
    "timm eva02 clip": Case(
        timm("eva02_base_patch16_clip_224"),
        {**CLASS, **GATED, **EPS_6, "norm_attended": True, "norm_hidden": True, "rotary": EVA02},
        (EPS_5, MEAN, *wrong_rotary(EVA02, offset=0.25)),
    ),
    "timm eva clip": Case(
        timm("eva_giant_patch14_clip_224"), {**CLASS, **GELU, **EPS_6, "rotary": None}, (EPS_5,)
    ),
    # transformers
    "clip": Case(
        hugging("CLIPVisionModel", intermediate_size=96, hidden_act="gelu"),
        {**CLASS, **GELU, **EPS_5, "ln_pre": True},
        (EPS_6, TANH, MEAN),
    ),
    "metaclip 2": Case(
        hugging("MetaClip2VisionModel", intermediate_size=96),
        {**CLASS, "activation": "quick_gelu", **EPS_5, "ln_pre": True},
        (EPS_6, GELU),
    ),
    "siglip": Case(
        hugging("SiglipVisionModel", intermediate_size=96),
        {**MAP, **TANH, **EPS_6, **NO_CLASS, "pool_heads": 3},
        (EPS_5, GELU, MEAN, {"pool_heads": 4}),
    ),
    "siglip without head": Case(
        hugging("SiglipVisionModel", intermediate_size=96, vision_use_head=False),
        {**MEAN, **TANH, **EPS_6, **NO_CLASS},
        (EPS_5, GELU),
    ),
    "dinov2": Case(
        hugging("Dinov2Model", layerscale_value=0.3),
        {**CLASS, **GELU, **EPS_6},
        (EPS_5, TANH, MEAN),
    ),
    "dinov2 registers": Case(
        hugging("Dinov2WithRegistersModel", layerscale_value=0.3, use_swiglu_ffn=True),
        {**CLASS, **GATED, **EPS_6, "num_registers": 4},
        (EPS_5, MEAN),
    ),
    "dinov3": Case(
        hugging("DINOv3ViTModel", intermediate_size=96, num_register_tokens=4),
        {**CLASS, **GELU, **EPS_5, "num_registers": 4, "rotary": DINOV3},
        (EPS_6, TANH, MEAN, *wrong_rotary(DINOV3, offset=0.25)),
    ),
    "dinov3 gated": Case(
        hugging(
            "DINOv3ViTModel",
            intermediate_size=96,
            use_gated_mlp=True,
            hidden_act="silu",
            key_bias=True,
            mlp_bias=False,
            rope_theta=50.0,
        ),
        {**CLASS, **GATED, **EPS_5, "num_registers": 0},
        (EPS_6, MEAN, {"rotary": DINOV3}),
    ),
    "vit": Case(
        hugging("ViTModel", intermediate_size=96),
        {**CLASS, **GELU, "norm_eps": 1e-12},
        (EPS_6, TANH, MEAN),
    ),
    "aimv2": Case(
        hugging("Aimv2VisionModel", intermediate_size=96, use_head=False),
        {**MEAN, **GATED, **EPS_5, **NO_CLASS, "norm": "rms", "norm_patches": True},
        (EPS_6, {"norm": "layer"}),
    ),
    "aimv2 lit": Case(
        hugging("Aimv2VisionModel", intermediate_size=96),
        {**MAP, **GATED, **EPS_5, **NO_CLASS, "norm": "rms", "pool_heads": 3},
        (EPS_6, MEAN, {"pool_heads": 4}),
    ),
    # At full width, a layout of each library's
    "timm vit, whole": Case(
        timm("vit_small_patch14_reg4_dinov2", **SMALL, patch_size=14, init_values=0.3),
        {"width": 384, "num_heads": 6},
        (EPS_5,),
        size=224,
    ),
    "timm eva, whole": Case(
        timm("vit_base_patch16_dinov3", **BASE), {"width": 768, "num_heads": 12}, (EPS_6,), size=224
    ),
    "siglip, whole": Case(
        hugging("SiglipVisionModel", **HUGGING_BASE), {"width": 768, "num_heads": 12}, (GELU,), 224
    ),
    "dinov3, whole": Case(
        hugging("DINOv3ViTModel", **HUGGING_BASE), {"width": 768, "num_heads": 12}, (EPS_6,), 224
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A case, the library's model, and the features of images as a function; saved to a folder."""
    case = CASES[request.param]
    model = sensitive(case.build())
    folder = tmp_path_factory.mktemp("model")
    if case.build.func is timm_model:
        save_timm(model, folder)
        return case, folder, partial(timm_features, model)
    model.save_pretrained(folder)
    return case, folder, partial(transformers_features, model)


def images_of(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))


def features(model: VideoViT, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.features(images[:, :, None])[:, 0]


def with_config(model: VideoViT, config: ModelConfig) -> VideoViT:
    """The weights of `model` in a model of another config."""
    other = VideoViT(config).eval()
    other.load_state_dict(model.state_dict(), strict=False)
    return other


def test_features_are_the_librarys_at_both_resolutions(case):
    case, folder, theirs = case
    for size in (case.size, case.size * 3 // 2):
        images = images_of(size)
        ours = load_foreign(folder, image_size=size)
        assert relative(features(ours, images), theirs(images)) <= LIMIT
    told = {name: getattr(ours.config, name) for name in case.has}
    assert told == case.has


def test_a_wrong_field_shows(case):
    case, folder, theirs = case
    images = images_of(case.size)
    expected, ours = theirs(images), load_foreign(folder)
    assert relative(features(ours, images), expected) <= LIMIT  # or anything would show
    for change in case.wrong:
        other = with_config(ours, dataclasses.replace(ours.config, **change))
        assert relative(features(other, images), expected) > 50 * LIMIT, change


@pytest.mark.parametrize("name", ["timm pe", "timm eva02 clip", "aimv2", "dinov3"])
def test_converted_model_is_saved_and_read_again(tmp_path, name):
    model = CASES[name].build()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    ours = load_foreign(tmp_path / "weights.pt", **BARE[name])
    ours.save_pretrained(tmp_path / "native")
    again = VideoViT.from_pretrained(tmp_path / "native")
    assert again.config == ours.config
    assert torch.equal(features(again, images_of(32)), features(ours, images_of(32)))


# What a bare file of weights does not tell, by case; the rest it shows, or its family settles.
BARE = {
    "timm augreg": {**GELU},
    "timm clip": {"activation": "quick_gelu"},
    "timm dinov2 registers": {**GELU},
    "timm dinov2 giant": {},
    "timm siglip": {**GELU},
    "timm siglip gap": {**GELU},
    "timm aimv2": {},
    "timm dinov3": {**MEAN, "image_size": 32},
    "timm dinov3 h+": {**MEAN, "image_size": 32},
    "timm pe": {},
    "timm pe gigantic": {},
    "timm eva02 clip": {},
    "clip": {**GELU, "num_heads": 3},
    "siglip": {"num_heads": 3, "pool_heads": 3},
    "dinov2": {"num_heads": 3},
    "dinov2 registers": {"num_heads": 3},
    "dinov3": {"num_heads": 3, "image_size": 32},
    "vit": {"num_heads": 3, **GELU, "norm_eps": 1e-12},
    "aimv2": {"num_heads": 3},
}
CONVENTIONS = ("num_heads", "pool_heads")  # which small models do not keep to


@pytest.mark.parametrize("name", BARE)
def test_bare_file_asks_for_what_it_does_not_tell(tmp_path, name):
    case, given = CASES[name], BARE[name]
    model = sensitive(case.build())
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    if name == "timm pe":  # its span is the grid of the published one: 14 patches, here 4
        model.rope.ref_feat_shape = [4, 4]
        model.rope.init_non_persistent_buffers()
    for field_name in given.keys() - set(CONVENTIONS):
        rest = {key: value for key, value in given.items() if key != field_name}
        with pytest.raises(ValueError, match=f"does not say all: give .*{field_name}=…"):
            load_foreign(tmp_path / "weights.pt", **rest)
    if name == "timm pe gigantic":
        model.rope.ref_feat_shape = [4, 4]
        model.rope.init_non_persistent_buffers()
    heads = {} if "num_heads" in given or not name.startswith("timm") else {"num_heads": 2}
    if name == "timm siglip":
        heads["pool_heads"] = 2
    ours = load_foreign(tmp_path / "weights.pt", **given, **heads)
    theirs = timm_features if name.startswith("timm") else transformers_features
    assert relative(features(ours, images_of(32)), theirs(model, images_of(32))) <= LIMIT


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ViTForImageClassification", {"intermediate_size": 96}),
        ("Dinov2ForImageClassification", {}),
    ],
)
def test_image_head_is_left_out(tmp_path, kind, settings):
    model = sensitive(transformers_model(kind, **settings))
    model.save_pretrained(tmp_path)
    tower = getattr(model, model.base_model_prefix)
    ours, foreign = convert(read_source(tmp_path), None, {})
    with torch.no_grad():
        expected = tower(images_of(32)).last_hidden_state[:, 0]
    assert relative(features(ours, images_of(32)), expected) <= LIMIT
    assert "its image head is left out" in foreign.notes


@pytest.mark.parametrize("kind", ["Siglip", "MetaClip2", "Aimv2"])
def test_tower_of_a_model_of_images_and_text_is_taken(tmp_path, kind):
    import transformers

    vision = transformers_model(f"{kind}VisionModel", intermediate_size=96)
    text = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=1, num_attention_heads=3)
    text |= dict(vocab_size=50, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    text = {k: v for k, v in text.items() if not k.endswith("token_id") or kind != "Aimv2"}
    config = getattr(transformers, f"{kind}Config")
    config = config(text_config=text, vision_config=vision.config.to_dict())
    model = sensitive(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model.vision_model(images_of(32)).pooler_output
    assert relative(features(load_foreign(tmp_path), images_of(32)), expected) <= LIMIT


TRUNKS = {
    "vit_base_patch16_siglip_256": ("map", "none"),
    "vit_pe_core_base_patch16_224": ("map", None),
    "eva02_base_patch16_clip_224": ("token", None),
    "eva_giant_patch14_224": ("token", None),
    "vit_medium_patch16_gap_256": ("avg", "linear"),
}


@pytest.mark.parametrize("name", TRUNKS)
def test_tower_of_timm_inside_open_clip_is_taken(tmp_path, name):
    pool, proj = TRUNKS[name]
    model, config = open_clip_trunk(name, pool, proj)
    sensitive(model)
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    pixels = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    config = {"model_cfg": config, "preprocess_cfg": pixels}
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps(config))
    ours, foreign = convert(read_source(tmp_path), None, {})
    expected = timm_features(model.visual.trunk, images_of(32))
    assert relative(features(ours, images_of(32)), expected) <= LIMIT
    assert foreign.format == "open_clip, timm ViT"
    assert ours.config.preprocess.mean == (127.5, 127.5, 127.5)
    vision = config["model_cfg"]["vision_cfg"]
    for change, rule in (
        ({"timm_pool": "max"}, "global_pool = 'max' is not supported"),
        ({"timm_model_name": "convnext_base"}, "architecture = 'convnext_base' is not supported"),
        ({"image_size": 64}, "image_size"),
        ({"of_tomorrow": 1}, "of_tomorrow = 1 is not known"),
    ):
        config["model_cfg"]["vision_cfg"] = vision | change
        path.write_text(json.dumps(config))
        with pytest.raises(ValueError, match=rule):
            load_foreign(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        *({"norm_eps": 1e-5}, {"activation": "gelu_tanh"}, {"pool_heads": 4}, {"rotary": DINOV3}),
        *({"norm": "rms"}, {"ln_pre": True}, {"class_token": True}, {"num_registers": 1}),
        *({"norm_attended": True}, {"norm_hidden": True}, {"norm_patches": True}, MEAN),
    ],
)
def test_training_starts_from_a_backbone_of_its_own_architecture_alone(tmp_path, change):
    save_timm(CASES["timm siglip"].build(), tmp_path)
    image = load_foreign(tmp_path)
    video = dict(num_frames=3, num_classes=5, head_offsets=(-1, 1), image_size=48)
    config = dataclasses.replace(image.config, **video, preprocess=ModelConfig().preprocess)
    notes = load_backbone(model := build(config), tmp_path)
    assert "positional embedding resized from 32 pixels" in notes
    assert torch.equal(model.pool.query, image.pool.query)
    wrong = build(dataclasses.replace(config, **change))
    before = {name: tensor.clone() for name, tensor in wrong.state_dict().items()}
    with pytest.raises(ValueError, match=f"has {next(iter(change))} "):
        load_backbone(wrong, tmp_path)
    assert all(torch.equal(before[name], tensor) for name, tensor in wrong.state_dict().items())


def test_training_says_what_a_bare_file_leaves_open(tmp_path):
    model = CASES["timm dinov3"].build()
    torch.save(model.state_dict(), tmp_path / "dinov3.pth")
    shape = dict(width=128, depth=2, num_heads=2, patch_size=8, image_size=64, num_frames=3)
    shape |= dict(num_registers=4, rotary=DINOV3, **GELU, **EPS_5, ln_pre=False)
    video = build(ModelConfig(**shape, num_classes=5, head_offsets="auto"))
    notes = load_backbone(video, tmp_path / "dinov3.pth")
    for note in ("image_size 64 as given", "pooling class as given", "num_heads 2 as given"):
        assert any(note in told for told in notes), notes
    assert not any("resized" in note for note in notes)
    rows = video.positional_embedding[5:]
    assert rows.shape == (64, 128) and torch.equal(rows, rows[:1].expand_as(rows))


def test_offsets_are_spread_over_the_heads_of_any_backbone(tmp_path):
    model = timm_model("vit_base_patch16_224", num_heads=16)
    save_timm(model, tmp_path)
    video = load_foreign(tmp_path, head_offsets="auto", num_frames=4, num_classes=5)
    assert video.config.head_offsets == (-1, 1, -1, 1) + (0,) * 12


@pytest.mark.parametrize(
    ("library", "name", "told"),
    [
        ("timm", "bicubic", ("bicubic", True)),
        ("timm", "bilinear", ("bilinear", True)),
        ("timm", "lanczos", ("bilinear", False)),
        ("transformers", 3, ("bicubic", True)),
        ("transformers", 2, ("bilinear", True)),
        ("transformers", 1, ("bilinear", False)),
    ],
)
def test_way_of_resizing_comes_with_the_backbone(tmp_path, library, name, told):
    if library == "timm":
        save_timm(timm_model("vit_base_patch16_224"), tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config["pretrained_cfg"] |= {"interpolation": name, "mean": [0.5, 0.4, 0.3]}
        (tmp_path / "config.json").write_text(json.dumps(config))
    else:
        transformers_model("ViTModel", intermediate_size=96).save_pretrained(tmp_path)
        pixels = {"resample": name, "image_mean": [0.5, 0.4, 0.3]}
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(pixels))
    model, foreign = convert(read_source(tmp_path), None, {})
    pixels = model.config.preprocess
    assert (pixels.interpolation, pixels.antialias) == told
    assert pixels.mean == (127.5, 102.0, 76.5)
    taken = not any(f" {name}" in note for note in foreign.notes)
    assert taken == told[1], foreign.notes
    chosen = convert(read_source(tmp_path), None, {"preprocess.interpolation": "bilinear"})[0]
    assert chosen.config.preprocess.interpolation == "bilinear"


REFUSED = {
    "dinov2": [
        *(("use_swiglu_ffn", True), ("qkv_bias", False), ("mlp_ratio", 2), ("hidden_act", "silu")),
        *(("num_hidden_layers", 3), ("patch_size", 4), ("image_size", [32, 64])),
    ],
    "dinov2 registers": [("num_register_tokens", 2), ("use_swiglu_ffn", False)],
    "dinov3": [
        *(("use_gated_mlp", True), ("key_bias", True), ("query_bias", False), ("mlp_bias", False)),
        *(("num_register_tokens", 0), ("intermediate_size", 48), ("image_size", [32, 64])),
    ],
    "dinov3 gated": [("hidden_act", "gelu"), ("use_gated_mlp", False)],
    "siglip": [("vision_use_head", False), ("model_type", "siglip2_vision_model")],
    "vit": [("qkv_bias", False), ("model_type", "deit"), ("hidden_act", "relu")],
    "aimv2": [("use_head", True), ("is_native", True), ("qkv_bias", True), ("hidden_act", "gelu")],
}
FREELY = {
    "dinov2": [("layer_norm_eps", 1e-4), ("hidden_act", "gelu_pytorch_tanh"), ("out_indices", [1])],
    "dinov3": [("rope_theta", 10.0), ("layer_norm_eps", 1e-4), ("pos_embed_rescale", None)],
    "siglip": [("hidden_act", "gelu"), ("attention_dropout", 0.5), ("num_attention_heads", 6)],
    "vit": [("layer_norm_eps", 1e-4), ("num_attention_heads", 6), ("hidden_dropout_prob", 0.5)],
    "aimv2": [("rms_norm_eps", 1e-4), ("num_attention_heads", 6)],
}


def changed(folder, key, value) -> dict:
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (folder / "config.json").write_text(json.dumps(config))
    return config


@pytest.mark.parametrize("name", REFUSED)
def test_setting_of_another_model_is_refused_by_name(tmp_path, name):
    CASES[name].build().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    words = {"num_hidden_layers": "depth", "model_type": "model_type"}
    for key, value in [*REFUSED[name], ("setting_of_tomorrow", 1), ("num_channels", 1)]:
        (tmp_path / "config.json").write_text(text)
        changed(tmp_path, key, value)
        with pytest.raises(ValueError, match=words.get(key, key)):
            load_foreign(tmp_path)


@pytest.mark.parametrize("name", FREELY)
def test_setting_that_may_differ_is_the_librarys_model(tmp_path, name):
    model = sensitive(CASES[name].build())
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    for key, value in FREELY[name]:
        (tmp_path / "config.json").write_text(text)
        config = changed(tmp_path, key, value)
        config.pop("out_features", None)
        theirs = type(model)(type(model.config)(**config)).eval()
        theirs.load_state_dict(model.state_dict())
        expected = transformers_features(theirs, images_of(32))
        assert relative(features(load_foreign(tmp_path), images_of(32)), expected) <= LIMIT
