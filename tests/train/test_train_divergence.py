"""The layer that is named for numbers gone wrong is the one where they did, on every path."""

import re

import pytest
import torch
from models import build, small_config

from zeroi2v.model.attention import set_backend
from zeroi2v.model.training_block import can_train
from zeroi2v.train.divergence import first_bad, remedy, watch

CONFIG = small_config(depth=2, width=32, num_heads=2, head_offsets=(-1, 1), num_frames=2)
NAMES = [n for n, _ in build(CONFIG).named_parameters() if "resblocks.0" not in n]


def layer_named(model, video) -> str:
    logits, layers = watch(model, video)
    assert not logits.isfinite().any()
    return first_bad(layers, pixels_finite=True)


def planted(name: str):
    """A model whose parameter `name` has no finite number, and a video for it."""
    torch.manual_seed(0)
    model = build(CONFIG).freeze()
    with torch.no_grad():
        model.get_parameter(name).fill_(float("nan"))
    size, frames = CONFIG.image_size, CONFIG.num_frames
    return model, torch.randn(1, 3, frames, size, size)


def share_one_storage(model) -> None:
    """As ZeRO has it."""
    parameters = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in parameters])
    for parameter, part in zip(
        parameters, flat.split([p.numel() for p in parameters]), strict=True
    ):
        parameter.data = part.view(parameter.shape)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        *(("plain", name) for name in NAMES),
        *(("zero", name) for name in NAMES),
        *(("kernels", name) for name in NAMES if "bias" not in name),  # slow in the interpreter
    ],
)
def test_layer_with_a_planted_nan_is_named(monkeypatch, name, path):
    model, video = planted(name)
    if path == "kernels":
        monkeypatch.setattr("zeroi2v_kernels.choice.uses_kernels", lambda _: True)
        set_backend(model, "triton")
    if path == "zero":
        share_one_storage(model)
    assert layer_named(model, video) == re.sub("[._](weight|bias)$", "", name)


@pytest.mark.parametrize("name", [n for n in NAMES if "resblocks" in n])
def test_layer_with_a_planted_nan_is_named_though_training_calls_no_module(name):
    model, video = planted(name)
    model.train()
    called = []
    block = model.transformer.resblocks[1]
    for module in block.modules():
        if module is not block:
            module.register_forward_hook(lambda *_: called.append(1))
    assert can_train(block, model.embed(video))
    assert not model(video).isfinite().any() and not called
    assert layer_named(model, video) == re.sub("[._](weight|bias)$", "", name)


def test_arithmetic_without_weights_is_named_by_its_module():
    """Here an adapter, whose branch overflows when it is scaled."""
    model, video = planted("head.bias")
    adapter = model.transformer.resblocks[1].attn.in_adapter
    with torch.no_grad():
        model.head.bias.zero_()
        adapter.up.bias.fill_(1e35)
    adapter.scale = 1e10
    assert layer_named(model, video) == "transformer.resblocks.1.attn.in_adapter"


@pytest.mark.parametrize("layer", ["mlp.c_fc", "attn.out_proj", "mlp.c_proj"])
def test_layer_that_leaves_the_range_of_fp16_is_named_and_bf16_has_room_for_it(layer):
    model, video = planted("head.bias")
    name = f"transformer.resblocks.1.{layer}"
    with torch.no_grad():
        model.head.bias.zero_()
        model.get_parameter(f"{name}.bias").fill_(70000.0)
    assert torch.finfo(torch.float16).max < 70000.0
    logits, layers = watch(model.to(torch.bfloat16), video.to(torch.bfloat16))
    assert logits.isfinite().all()
    model, inf = model.half(), float("inf")
    _, layers = watch(model, video.half())
    assert first_bad(layers, pixels_finite=True) == name and layers[name] == inf
    assert "try optim.precision=bf16" in remedy(layers[name], torch.float16, False)


def test_another_precision_is_offered_where_fp16_overflows():
    inf = float("inf")
    assert "try optim.precision=bf16" in remedy(inf, torch.float16, False)
    for loss, dtype in ((200.0, torch.float16), (inf, torch.bfloat16), (inf, torch.float32)):
        assert "bf16" not in remedy(loss, dtype, False)
    assert remedy(inf, torch.float32, True).endswith("from the last state with run.resume=true")
    assert "resume" not in remedy(inf, torch.float32, False)
