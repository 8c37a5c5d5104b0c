"""Small random models for tests."""

import torch

from zeroi2v.config import RECIPES, ModelConfig
from zeroi2v.model.vit import VideoViT


def small_config(recipe: str | None = None, **overrides) -> ModelConfig:
    """A recipe's model at 4 channels a head, 3 blocks and 32 px: same offsets, scale and frames."""
    config = RECIPES[recipe or "vit_b16_ssv2_16"].model.to_dict()
    config.update(width=4 * config["num_heads"], depth=3, image_size=2 * config["patch_size"])
    config.update(num_classes=11, **overrides)
    return ModelConfig.from_dict(config)


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
            is_norm_gain = ".ln_" in f".{name}" and name.endswith("weight")
            parameter.copy_(noise * scale + (1.0 if is_norm_gain else 0.0))
    return model
