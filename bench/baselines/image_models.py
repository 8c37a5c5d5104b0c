"""Other libraries' CLIP image towers, built in the shape and with the weights of a `VideoViT`.

transformers, open_clip and timm import torchvision, whose compiled operators do not load beside a
torch without CUDA. None of the models here needs them: declaring their names is enough. The project
itself never uses torchvision.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys

import torch
from torch import nn

from zeroi2v.config import ModelConfig
from zeroi2v.model import VideoViT

# Lives as long as the process: the operators it declares vanish with it.
_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")


def transformers_clip(model: VideoViT) -> nn.Module:
    """`transformers.CLIPVisionModel` (PyTorch attention) with the backbone weights of `model`."""
    _declare_torchvision_operators()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = model.config
    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.width,
            intermediate_size=round(config.mlp_ratio * config.width),
            num_hidden_layers=config.depth,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            hidden_act=config.activation,
            attn_implementation="sdpa",
        )
    ).eval()
    theirs.load_state_dict(_transformers_names(model, theirs))
    return theirs


def open_clip_tower(config: ModelConfig) -> nn.Module:
    """open_clip's `VisionTransformer` in the shape of `config`, with its own random weights."""
    _declare_torchvision_operators()
    from open_clip.transformer import QuickGELU, VisionTransformer

    return VisionTransformer(
        image_size=config.image_size,
        patch_size=config.patch_size,
        width=config.width,
        layers=config.depth,
        heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        output_dim=512,
        act_layer=QuickGELU if config.activation == "quick_gelu" else nn.GELU,
    ).eval()


def _transformers_names(model: VideoViT, theirs: nn.Module) -> dict[str, torch.Tensor]:
    prefix = (
        "vision_model." if any(n.startswith("vision_model.") for n in theirs.state_dict()) else ""
    )
    ours = model.state_dict()
    state = {
        "embeddings.class_embedding": ours["class_embedding"],
        "embeddings.patch_embedding.weight": ours["conv1.weight"],
        "embeddings.position_embedding.weight": ours["positional_embedding"],
    }
    for kind in ("weight", "bias"):
        state[f"pre_layrnorm.{kind}"] = ours[f"ln_pre.{kind}"]
        state[f"post_layernorm.{kind}"] = ours[f"ln_post.{kind}"]
        for i in range(model.config.depth):
            a, b = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
            state[f"{a}layer_norm1.{kind}"] = ours[f"{b}ln_1.{kind}"]
            state[f"{a}layer_norm2.{kind}"] = ours[f"{b}ln_2.{kind}"]
            state[f"{a}mlp.fc1.{kind}"] = ours[f"{b}mlp.c_fc.{kind}"]
            state[f"{a}mlp.fc2.{kind}"] = ours[f"{b}mlp.c_proj.{kind}"]
            state[f"{a}self_attn.out_proj.{kind}"] = ours[f"{b}attn.out_proj.{kind}"]
            for letter, part in zip("qkv", ours[f"{b}attn.in_proj_{kind}"].chunk(3), strict=True):
                state[f"{a}self_attn.{letter}_proj.{kind}"] = part
    return {prefix + name: tensor for name, tensor in state.items()}


def _declare_torchvision_operators() -> None:
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        files = importlib.metadata.files("torchvision")
        source = next(f for f in files if f.name == "_meta_registrations.py").locate().read_text()
        pattern = r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"\)'
        for name in set(re.findall(pattern, source)):
            _TORCHVISION.define(f"{name}(Tensor x) -> Tensor")
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
