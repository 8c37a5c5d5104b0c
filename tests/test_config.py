"""Configurations: the published table as published, and one clear line for each mistake."""

import ast
import subprocess
import sys

import pytest

from zeroi2v.config import RECIPES, AdapterConfig, ModelConfig, PreprocessConfig, recipe

# name: frames, classes, non-zero offsets, adapter scale, dropout, sampling, views, width, depth
PUBLISHED = {
    "vit_b16_k400_8x16": (8, 400, [-1, 1], 0.5, 0.1, ("dense", 16), (3, 1), 768, 12),
    "vit_b16_ucf101_8": (8, 101, [-1, 1], 0.5, 0.1, ("uniform", 1), (1, 3), 768, 12),
    "vit_b16_hmdb51_8": (8, 51, [-1, 1], 0.5, 0.1, ("uniform", 1), (1, 3), 768, 12),
    "vit_b16_ucf101_32": (32, 101, [-1, 1, -2, 2], 0.5, 0.1, ("uniform", 1), (2, 3), 768, 12),
    "vit_b16_hmdb51_32": (32, 51, [-1, 1, -2, 2], 0.5, 0.1, ("uniform", 1), (2, 3), 768, 12),
    "vit_b16_ssv2_16": (16, 174, [-1, 1, -2, 2], 1.0, 0.0, ("uniform", 1), (1, 3), 768, 12),
    "vit_l14_k400_8x16": (8, 400, [-1, -1, 1, 1], 0.5, 0.1, ("dense", 16), (3, 1), 1024, 24),
    "vit_l14_k400_32x4": (
        *(32, 400, [-1, -1, 1, 1, -2, -2], 0.5, 0.1, ("dense", 4), (3, 1), 1024, 24),
    ),
    "vit_l14_ssv2_32": (
        *(32, 174, [-1, -1, 1, 1, -2, 2, -3], 1.0, 0.1, ("uniform", 1), (1, 3), 1024, 24),
    ),
}


def test_the_nine_recipes_are_as_published():
    table = {}
    for name, entry in RECIPES.items():
        model = entry.model
        shifted = [o for o in model.head_offsets if o]
        assert list(model.head_offsets[: len(shifted)]) == shifted
        preprocess = model.preprocess
        table[name] = (
            *(model.num_frames, model.num_classes, shifted),
            *(model.adapter.scale, model.adapter.dropout),
            *((preprocess.sampling, preprocess.interval), preprocess.test_views),
            *(model.width, model.depth),
        )
        assert (model.image_size, model.activation, model.head_dim) == (224, "quick_gelu", 64)
        assert model.patch_size == {768: 16, 1024: 14}[model.width]
        assert model.adapter_rank == model.width // 4
    assert table == PUBLISHED


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: ModelConfig(head_offsets=(0,) * 8),
            "needs one entry per head: got 8 for 12",
        ),
        (
            lambda: ModelConfig(image_size=100),
            "image_size must be a multiple of patch_size 16",
        ),
        (lambda: ModelConfig(width=100), "width must be a multiple of num_heads 12: got 100"),
        (lambda: ModelConfig(depth=0), "depth must be at least 1: got 0"),
        (
            lambda: ModelConfig(activation="relu"),
            "activation must be 'quick_gelu' or 'gelu' or 'gelu_tanh' or 'swiglu': got",
        ),
        (lambda: ModelConfig(head_dropout=1.0), r"head_dropout must be in \[0, 1\): got 1.0"),
        (lambda: AdapterConfig(ratio=0.0), r"adapter.ratio must be in \(0, 1\]: got 0.0"),
        (lambda: AdapterConfig(dropout=-0.1), r"adapter.dropout must be in \[0, 1\): got -0.1"),
        (lambda: PreprocessConfig(interval=0), "preprocess.interval must be at least 1: got 0"),
        (lambda: PreprocessConfig(std=(1, 0, 1)), "preprocess.std must be positive"),
        (lambda: PreprocessConfig(test_views=(1, 2)), "preprocess.test_views must be"),
        (
            lambda: recipe("vit_b16_k400"),
            "unknown recipe 'vit_b16_k400': did you mean vit_b16_k400_8",
        ),
        (lambda: from_dict(adapter=3), "adapter must be a mapping: got 3"),
        (lambda: from_dict(adapter=dict(rank=3)), "unknown config key 'adapter.rank'"),
        (lambda: from_dict(head_offsets="none"), "head_offsets must be a list: got 'none'"),
        (lambda: from_dict(head_offsets=[0.5] * 12), r"head_offsets\[0\] must be int: got 0.5"),
        (lambda: from_dict(num_frames=True), "num_frames must be int: got True"),
        (lambda: from_dict(preprocess=dict(mean=[1, 2])), "preprocess.mean must have 3 entries"),
        (lambda: from_dict(preprocess=dict(sampling="x")), "preprocess.sampling must be one of"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_value_and_the_rule(make, message):
    with pytest.raises(ValueError, match=message) as raised:
        make()
    assert "\n" not in str(raised.value)


def from_dict(**values):
    return ModelConfig.from_dict(values)


def output_of(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_model_and_the_merge_loads_nothing_optional():
    heavy = {"triton", "nvidia.dali", "deepspeed", "flash_attn", "matplotlib", "av", "transformers"}
    code = "import sys, zeroi2v; zeroi2v.VideoViT; zeroi2v.merge; print(sorted(sys.modules))"
    loaded = set(ast.literal_eval(output_of(code)))
    assert "zeroi2v.reparam" in loaded
    assert not heavy & loaded


def test_a_data_worker_never_loads_torch():
    assert (
        output_of("import sys, zeroi2v.data.clip_worker; print('torch' in sys.modules)") == "False"
    )


@pytest.mark.parametrize(
    ("image_size", "val", "test"), [(224, 256, 224), (112, 128, 112), (336, 384, 336), (32, 37, 32)]
)
def test_sizes_of_videos_follow_the_images(image_size, val, test):
    pixels = ModelConfig(image_size=image_size).preprocess
    assert (pixels.val_short_side, pixels.test_short_side) == (val, test)
    read = ModelConfig.from_dict(ModelConfig(image_size=image_size).to_dict())
    assert read.preprocess == pixels  # a saved config says them


def test_sizes_may_be_given_but_not_below_the_images():
    given = PreprocessConfig(val_short_side=300, test_short_side=250)
    pixels = ModelConfig(preprocess=given).preprocess
    assert (pixels.val_short_side, pixels.test_short_side) == (300, 250)
    small = PreprocessConfig(test_short_side=200)
    with pytest.raises(
        ValueError, match="test_short_side must be at least image_size 224: got 200"
    ):
        ModelConfig(preprocess=small)
