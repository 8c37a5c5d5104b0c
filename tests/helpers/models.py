"""Small random models for tests."""

import re

import torch

from zeroi2v.config import RECIPES, ModelConfig, RotaryConfig
from zeroi2v.model.vit import VideoViT


def small_config(recipe: str | None = None, **overrides) -> ModelConfig:
    """A recipe's model at 4 channels a head, 2 blocks and 32 px: same offsets, scale and frames."""
    config = RECIPES[recipe or "vit_b16_ssv2_16"].model.to_dict()
    config.update(width=4 * config["num_heads"], depth=2, image_size=2 * config["patch_size"])
    config.update(num_classes=11, **overrides)
    return ModelConfig.from_dict(config)


_NO_CLASS = dict(class_token=False, ln_pre=False)
_DINOV3 = RotaryConfig(base=100.0, span=12.566, start=-6.283, offset=0.5)
FAMILIES = {
    "DINOv2": dict(activation="gelu", norm_eps=1e-6, num_registers=4, ln_pre=False),
    "DINOv3": dict(activation="gelu", num_registers=4, rotary=_DINOV3, ln_pre=False),
    "DINOv3 H+": dict(activation="swiglu", num_registers=4, rotary=_DINOV3, ln_pre=False),
    "SigLIP": dict(activation="gelu_tanh", pooling="attention", pool_heads=2, **_NO_CLASS),
    "PE": dict(
        activation="gelu", pooling="attention", pool_heads=4, rotary=RotaryConfig(offset=1.0)
    ),
    "EVA-02": dict(
        activation="swiglu", norm_attended=True, norm_hidden=True, mlp_ratio=8 / 3,
        rotary=RotaryConfig(), norm_eps=1e-6, ln_pre=False,
    ),
    "AIMv2": dict(activation="swiglu", norm="rms", pooling="mean", mlp_ratio=8 / 3, **_NO_CLASS),
}  # fmt: skip
"""What each family's blocks and tokens are made of, as fields of `ModelConfig`."""


def family_config(family: str, **overrides) -> ModelConfig:
    """A model of the family with 4 heads of 8 channels, 3 blocks, 4 x 4 patches and 3 frames."""
    shape = dict(image_size=32, patch_size=8, width=32, depth=3, num_heads=4, num_frames=3)
    shape |= dict(num_classes=11, head_offsets=(-1, 1, 0, 2))
    return ModelConfig(**(shape | FAMILIES[family] | overrides))


def build(config: ModelConfig, seed: int = 0) -> VideoViT:
    """A model in eval mode with every parameter drawn, without paying for its initialisation."""
    with torch.device("meta"):
        model = VideoViT(config)
    return randomize(model.to_empty(device="cpu"), seed).eval()


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Gives every parameter, zero-initialised ones too, values of the size that training leaves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter.shape[-1] if parameter.ndim == 2 else parameter[0].numel()
            scale = 0.1 if parameter.ndim == 1 else max(fan_in, 1) ** -0.5
            is_norm_gain = re.search(r"(^|\.)ln(_\w+)?\.weight$", name)
            parameter.copy_(noise * scale + (1.0 if is_norm_gain else 0.0))
    return model
