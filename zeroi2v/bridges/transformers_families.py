"""The kinds of image models in transformers: which settings they have, and with which defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What the models of one kind have in common."""

    name: str
    """In words."""
    mark: str
    """A tensor that only this family has, as a pattern for its whole name."""
    kinds: tuple[str, ...]
    """Values of `model_type`."""
    handled: dict[str, Any]
    """Settings that are read, with transformers' values for what is left out of the file."""
    fixed: dict[str, tuple] = field(default_factory=dict)
    """Settings that may have these values only."""
    bare: dict[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` that no model of the family has otherwise; for a bare file."""
    asks: dict[str, str] = field(default_factory=dict)
    """Fields that a bare file leaves open."""
    all_biases: bool = True
    """Whether every layer has its bias."""
    head_dim: int = 64
    """Channels of a head; for a bare file of a usual width."""


_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
_BASE |= {"image_size": 224, "patch_size": 16}
_MLP = {"intermediate_size": 3072, "hidden_act": "gelu", "layer_norm_eps": 1e-6}
_ACT = {"activation": "hidden_act in the model's config.json"}
_EPS = {"norm_eps": "layer_norm_eps in the model's config.json"}
_DINOV2 = {**_BASE, "patch_size": 14, "mlp_ratio": 4, "use_swiglu_ffn": False, "qkv_bias": True}
_DINOV2 |= {"hidden_act": "gelu", "layer_norm_eps": 1e-6}

FAMILIES = (
    Family(
        name="CLIP",
        mark=r"embeddings\.class_embedding",
        kinds=("clip", "clip_vision_model", "metaclip_2", "metaclip_2_vision_model"),
        handled={
            **_BASE,
            **_MLP,
            "patch_size": 32,
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
        },
        bare={"norm_eps": 1e-5},
        asks=_ACT,
    ),
    Family(
        name="SigLIP",
        mark=r"head\.probe|embeddings\.patch_embedding\.bias",
        kinds=("siglip", "siglip_vision_model"),
        handled={**_BASE, **_MLP, "hidden_act": "gelu_pytorch_tanh", "vision_use_head": True},
        bare={"norm_eps": 1e-6, "activation": "gelu_tanh"},
    ),
    Family(
        name="DINOv3",
        mark=r"embeddings\.patch_embeddings\.weight",
        kinds=("dinov3_vit",),
        handled={
            **_BASE,
            **_MLP,
            "hidden_size": 384,
            "num_attention_heads": 6,
            "intermediate_size": 1536,
            "layer_norm_eps": 1e-5,
            "rope_theta": 100.0,
            "use_gated_mlp": False,
            "num_register_tokens": 0,
            "query_bias": True,
            "key_bias": False,
            "value_bias": True,
            "proj_bias": True,
            "mlp_bias": True,
        },
        bare={"norm_eps": 1e-5, "activation": "gelu"},
        asks={"image_size": "the weights hold no positions"},
        all_biases=False,
    ),
    Family(
        name="DINOv2 with registers",
        mark=r"embeddings\.register_tokens",
        kinds=("dinov2_with_registers",),
        handled={**_DINOV2, "patch_size": 16, "num_register_tokens": 4},
        bare={"norm_eps": 1e-6, "activation": "gelu"},
        all_biases=False,
    ),
    Family(
        name="DINOv2",
        mark=r"encoder\.layer\.0\.layer_scale1\.lambda1",
        kinds=("dinov2",),
        handled=_DINOV2,
        bare={"norm_eps": 1e-6, "activation": "gelu"},
        all_biases=False,
    ),
    Family(
        name="ViT",
        mark=r"(encoder\.layer|layers)\.0\.layernorm_before\.weight",
        kinds=("vit",),
        handled={**_BASE, **_MLP, "layer_norm_eps": 1e-12, "qkv_bias": True},
        asks=_ACT | _EPS,
        all_biases=False,
    ),
    Family(
        name="AIMv2",
        mark=r"embeddings\.rms_norm\.weight",
        kinds=("aimv2", "aimv2_vision_model"),
        handled={
            **_BASE,
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "patch_size": 14,
            "intermediate_size": 2816,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "use_head": True,
            "qkv_bias": False,
            "mlp_bias": False,
        },
        fixed={"is_native": (False,)},
        bare={"norm_eps": 1e-5},
        all_biases=False,
        head_dim=128,
    ),
)
