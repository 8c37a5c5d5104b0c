"""Other libraries' CLIP image towers, built in the shape and with the weights of a `VideoViT`.

Each takes frames `[B, 3, H, W]`; `pooled` finds the normalised CLS token in what it returns, the
features of `VideoViT` where its `temporal_embedding` is zero. The weights are shared with `model`,
not copied. ImportError if the library is absent.

transformers, open_clip and timm import torchvision, whose compiled operators do not load beside a
torch without CUDA. None of the models here needs them: declaring their names is enough. The project
itself never uses torchvision.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from zeroi2v.config import ModelConfig
from zeroi2v.model.vit import VideoViT

State = dict[str, torch.Tensor]

# Lives as long as the process: the operators it declares vanish with it.
_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")


def transformers_clip(model: VideoViT) -> nn.Module:
    """`transformers.CLIPVisionModel` (PyTorch attention) with the backbone weights of `model`."""
    _declare_torchvision_operators()
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = model.config
    theirs = CLIPVisionConfig(
        hidden_size=config.width,
        intermediate_size=round(config.mlp_ratio * config.width),
        num_hidden_layers=config.depth,
        num_attention_heads=config.num_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        hidden_act=config.activation,
        attn_implementation="sdpa",
    )
    return _with_weights(lambda: CLIPVisionModel(theirs), _transformers_names, model)


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


def open_clip_vit(model: VideoViT) -> nn.Module:
    """open_clip's `VisionTransformer` with the backbone weights of `model`, which have its names.

    Without `proj`, so that it ends where ours does.
    """

    def tower() -> nn.Module:
        theirs = open_clip_tower(model.config)
        theirs.proj = None
        return theirs

    return _with_weights(tower, lambda ours, theirs: {n: ours[n] for n in theirs}, model)


def timm_vit(model: VideoViT) -> nn.Module:
    """timm's `VisionTransformer`, shaped as its CLIP models are, with the weights of `model`."""
    _declare_torchvision_operators()
    from timm.models.vision_transformer import VisionTransformer

    config = model.config
    make = partial(
        VisionTransformer,
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=config.mlp_ratio,
        num_classes=0,
        pre_norm=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-5),
        act_layer=config.activation,
    )
    return _with_weights(make, _timm_names, model)


IMAGE_MODELS = {
    "transformers CLIP": transformers_clip,
    "timm ViT": timm_vit,
    "open_clip ViT": open_clip_vit,
}


def pooled(output) -> torch.Tensor:
    """The normalised CLS token `[B, C]` in what one of the models returns."""
    return getattr(output, "pooler_output", output)


def _with_weights(make: Callable[[], nn.Module], names: Callable, model: VideoViT) -> nn.Module:
    """What `make` builds, with the weights of `model` by its own `names`, whole on their device."""
    device = model.head.weight.device
    with device:  # drawing random weights takes seconds on a CPU
        theirs = make().eval()
    theirs.load_state_dict(names(model.state_dict(), theirs.state_dict()), assign=True)
    return theirs.to(device)  # constants of a constructor that names its own device


def _timm_names(ours: State, theirs: State) -> State:
    state = {
        "cls_token": ours["class_embedding"].view(1, 1, -1),
        "pos_embed": ours["positional_embedding"].unsqueeze(0),
        "patch_embed.proj.weight": ours["conv1.weight"],
    }
    places = {"norm_pre": "ln_pre", "norm": "ln_post"}
    for i in range(_depth(ours)):
        a, b = f"blocks.{i}.", f"transformer.resblocks.{i}."
        places |= {f"{a}norm1": f"{b}ln_1", f"{a}norm2": f"{b}ln_2"}
        places |= {f"{a}mlp.fc1": f"{b}mlp.c_fc", f"{a}mlp.fc2": f"{b}mlp.c_proj"}
        places |= {f"{a}attn.proj": f"{b}attn.out_proj"}
        for kind in ("weight", "bias"):
            state[f"{a}attn.qkv.{kind}"] = ours[f"{b}attn.in_proj_{kind}"]
    for kind in ("weight", "bias"):
        state |= {f"{a}.{kind}": ours[f"{b}.{kind}"] for a, b in places.items()}
    return state


def _transformers_names(ours: State, theirs: State) -> State:
    prefix = "vision_model." if any(name.startswith("vision_model.") for name in theirs) else ""
    state = {
        "embeddings.class_embedding": ours["class_embedding"],
        "embeddings.patch_embedding.weight": ours["conv1.weight"],
        "embeddings.position_embedding.weight": ours["positional_embedding"],
    }
    for kind in ("weight", "bias"):
        state[f"pre_layrnorm.{kind}"] = ours[f"ln_pre.{kind}"]
        state[f"post_layernorm.{kind}"] = ours[f"ln_post.{kind}"]
        for i in range(_depth(ours)):
            a, b = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
            state[f"{a}layer_norm1.{kind}"] = ours[f"{b}ln_1.{kind}"]
            state[f"{a}layer_norm2.{kind}"] = ours[f"{b}ln_2.{kind}"]
            state[f"{a}mlp.fc1.{kind}"] = ours[f"{b}mlp.c_fc.{kind}"]
            state[f"{a}mlp.fc2.{kind}"] = ours[f"{b}mlp.c_proj.{kind}"]
            state[f"{a}self_attn.out_proj.{kind}"] = ours[f"{b}attn.out_proj.{kind}"]
            for letter, part in zip("qkv", ours[f"{b}attn.in_proj_{kind}"].chunk(3), strict=True):
                state[f"{a}self_attn.{letter}_proj.{kind}"] = part
    return {prefix + name: tensor for name, tensor in state.items()}


def _depth(ours: State) -> int:
    return sum(name.endswith(".ln_1.weight") for name in ours)


def _declare_torchvision_operators() -> None:
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return  # who needs it says so
    except RuntimeError:
        files = importlib.metadata.files("torchvision")
        source = next(f for f in files if f.name == "_meta_registrations.py").locate().read_text()
        pattern = r'register_(?:meta|fake)\("(?:torchvision::)?(\w+)"\)'
        for name in set(re.findall(pattern, source)):
            _TORCHVISION.define(f"{name}(Tensor x) -> Tensor")
        for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
            del sys.modules[module]
