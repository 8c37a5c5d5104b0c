"""A LoRA adapter of peft beside an image model, written as peft writes it: melted in exactly."""

import json
import math

import pytest
import torch
from foreign import (
    open_clip_model,
    relative,
    save_timm,
    shake,
    timm_features,
    timm_model,
    transformers_features,
    transformers_model,
)
from safetensors.torch import load_file, save_file

from zeroi2v import load_foreign
from zeroi2v.bridges.load import convert
from zeroi2v.bridges.reader import read_source

IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
# As peft 0.21 writes it, less what it leaves null.
CONFIG = {
    "auto_mapping": {"base_model_class": "ViTModel", "parent_library": "transformers"},
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "loftq_config": {},
    "lora_alpha": 6,
    "lora_bias": False,
    "lora_dropout": 0.1,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "alpha_pattern": {},
    "revision": None,
    "target_modules": ["q_proj"],
    "task_type": None,
    "trainable_token_indices": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
}


def save_adapter(folder, pairs: dict, others: dict | None = None, **config) -> None:
    tensors = {}
    for module, (down, up) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = down
        tensors[f"base_model.model.{module}.lora_B.weight"] = up
    tensors |= {f"base_model.model.{name}": tensor for name, tensor in (others or {}).items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))


def pair(rows: int, columns: int, rank: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + rank)
    down = 0.3 * torch.randn(rank, columns, generator=generator)
    return down, 0.3 * torch.randn(rows, rank, generator=generator)


def features(model) -> torch.Tensor:
    with torch.no_grad():
        return model.features(IMAGES[:, :, None])[:, 0]


def add(weight: torch.Tensor, both: tuple, scale: float) -> None:
    with torch.no_grad():
        weight += scale * both[1] @ both[0]


@pytest.mark.parametrize("wrapper", ["", "vit."])
def test_transformers_model_with_its_adapter_has_the_merged_features(tmp_path, wrapper):
    theirs = shake(transformers_model("ViTModel", intermediate_size=96))
    theirs.save_pretrained(tmp_path)
    query, hidden = pair(48, 48), pair(96, 48, rank=2)
    bias, norm = torch.randn(48), torch.rand(48)
    pairs = {
        f"{wrapper}layers.0.attention.q_proj": query,
        f"{wrapper}layers.1.mlp.fc1": hidden,
    }
    others = {
        f"{wrapper}layers.0.attention.q_proj.base_layer.bias": bias,
        f"{wrapper}layernorm.weight": norm,
        f"{wrapper}layernorm.original_module.weight": torch.zeros(48),
        "classifier.weight": torch.zeros(7, 48),
    }
    save_adapter(
        tmp_path, pairs, others, rank_pattern={"fc1": 2}, alpha_pattern={r"layers\.1\..*": 3}
    )
    before = features(load_foreign(tmp_path))
    add(theirs.layers[0].attention.q_proj.weight, query, 6 / 4)
    add(theirs.layers[1].mlp.fc1.weight, hidden, 3 / 2)
    with torch.no_grad():
        theirs.layers[0].attention.q_proj.bias.copy_(bias)
        theirs.layernorm.weight.copy_(norm)
    expected = transformers_features(theirs, IMAGES)
    assert relative(before, expected) <= 1e-5
    _, foreign = convert(read_source(tmp_path), None, {})
    assert "a LoRA adapter is melted into 2 layers" in foreign.notes
    assert "2 tensors that were trained with it replace the model's own" in foreign.notes
    (tmp_path / "adapter_config.json").unlink()  # without it the weights are the model's own
    assert relative(features(load_foreign(tmp_path)), expected) > 0.1


@pytest.mark.parametrize("rs", [False, True])
def test_timm_model_with_its_adapter_has_the_merged_features(tmp_path, rs):
    theirs = timm_model("vit_base_patch14_reg4_dinov2", init_values=0.5)
    save_timm(theirs, tmp_path)
    packed = pair(384, 128)
    save_adapter(tmp_path, {"blocks.1.attn.qkv": packed}, use_rslora=rs)
    add(theirs.blocks[1].attn.qkv.weight, packed, 6 / (math.sqrt(4) if rs else 4))
    assert relative(features(load_foreign(tmp_path)), timm_features(theirs, IMAGES)) <= 1e-5


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    shake(transformers_model("ViTModel", intermediate_size=96)).save_pretrained(folder)
    return folder


QUERY = "layers.0.attention.q_proj"


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"peft_type": "LOHA"}, "peft_type = 'LOHA' is not supported"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"use_qalora": True}, "use_qalora = True is not supported"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True is not supported"),
        ({"lora_bias": True}, "lora_bias = True is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa' is not supported"),
        ({"layer_replication": [[0, 1]]}, "layer_replication = .* is not supported"),
        ({"setting_of_tomorrow": 1}, "setting_of_tomorrow = 1 is not known"),
        ({"r": 8}, f"{QUERY} must be of rank 8"),
        ({"rank_pattern": {"q_proj": 2}}, f"{QUERY} must be of rank 2"),
    ],
)
def test_setting_of_another_adapter_is_refused_by_name(model, change, rule):
    save_adapter(model, {QUERY: pair(48, 48)}, **change)
    with pytest.raises(ValueError, match=rule):
        load_foreign(model)


@pytest.mark.parametrize(
    ("pairs", "others", "rule"),
    [
        ({"layers.0.attention.kv": pair(48, 48)}, {}, "layers.0.attention.kv is no layer"),
        ({QUERY: pair(48, 24)}, {}, r"beside a matrix \[48, 24\]: got \[48, 48\]"),
        ({QUERY: pair(24, 48)}, {}, r"got \[4, 48\] and \[24, 4\]"),
        ({}, {f"{QUERY}.lora_A.weight": torch.zeros(4, 48)}, "lacks lora_B.weight"),
        ({}, {f"{QUERY}.lora_magnitude_vector": torch.zeros(48)}, "lora_magnitude_vector has no"),
        ({}, {f"{QUERY}.bias": torch.zeros(24)}, r"q_proj.bias must be \[48\]: got \[24\]"),
    ],
)
def test_adapter_of_another_model_is_refused_by_name(model, pairs, others, rule):
    save_adapter(model, pairs, others)
    with pytest.raises(ValueError, match=rule):
        load_foreign(model)


def test_adapter_without_its_weights_or_beside_another_format_is_an_error(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps(CONFIG))
    save_file(open_clip_model().state_dict(), tmp_path / "open_clip_model.safetensors")
    with pytest.raises(FileNotFoundError, match="but no adapter_model.safetensors"):
        load_foreign(tmp_path, activation="gelu")
    save_adapter(tmp_path, {"visual.transformer.resblocks.0.mlp.c_fc": pair(512, 128)})
    with pytest.raises(ValueError, match="holds a LoRA adapter for open_clip"):
        load_foreign(tmp_path, activation="gelu")
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="contains no weights beside its adapter"):
        load_foreign(tmp_path)


def test_the_files_of_an_adapter_are_read_as_data(model):
    save_adapter(model, {QUERY: pair(48, 48)})
    assert set(load_file(model / "adapter_model.safetensors")) == set(read_source(model).adapter)
