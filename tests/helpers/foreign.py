"""Real image models of other libraries, small and random, and the authors' checkpoint layout."""

import copy
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from models import build, small_config

from bench.baselines.image_models import _declare_torchvision_operators
from zeroi2v.bridges.timm_names import settings
from zeroi2v.config import RECIPES
from zeroi2v.model.vit import VideoViT

# The authors' training configs say which class, and count channels to shift as width / div.
CLASSES = {
    "vit_b16_k400_8x16": ("ViT_Zero_CLIP", "shift_div=12, divide_head=False"),
    "vit_b16_ucf101_8": ("ViT_Zero_CLIP", "shift_div=12, divide_head=False"),
    "vit_b16_hmdb51_8": ("ViT_Zero_CLIP", "shift_div=12, divide_head=False"),
    "vit_l14_k400_8x16": ("ViT_Zero_CLIP", "shift_div=8, divide_head=False"),
    "vit_l14_k400_32x4": ("ViT_Zero_CLIP", "shift_div=8, divide_head=False, long_shift_div=8"),
    "vit_l14_ssv2_32": (
        "ViT_Zero_CLIP_long",
        "divide_head=False, shift1_div=8, shift2_div=16, shift3_div=16, shift3_right=False, "
        "shift4_div=-1, shift4_right=False",
    ),
}
_TWO_FRAMES = "shift_div=12, divide_head=False, long_shift_div=12, long_shift_right=True"
for _name in ("vit_b16_ucf101_32", "vit_b16_hmdb51_32", "vit_b16_ssv2_16"):
    CLASSES[_name] = ("ViT_Zero_CLIP_ablation", _TWO_FRAMES)

_PLACES = {
    "attn.in_adapter": "T_Adapter_in",
    "attn.out_adapter": "S_Adapter",
    "mlp.in_adapter": "MLP_Adapter",
    "mlp.out_adapter": "MLP_Adapter_out",
}


def shake(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Moves every parameter of a fresh model, so that none is the zero or one it starts as."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def open_clip_model(**vision) -> torch.nn.Module:
    """open_clip's `CLIP` with a vision tower of width 128, depth 2, patch 8, 32 px."""
    _declare_torchvision_operators()
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    quick = vision.pop("quick_gelu", False)
    tower = dict(layers=2, width=128, patch_size=8, image_size=32) | vision
    text = CLIPTextCfg(context_length=8, vocab_size=50, width=64, heads=1, layers=1)
    return shake(CLIP(32, CLIPVisionCfg(**tower), text, quick_gelu=quick))


def transformers_config(**vision):
    """transformers' `CLIPVisionConfig`: width 48, 3 heads, depth 2, patch 8, 32 px."""
    from transformers import CLIPVisionConfig

    sizes = dict(hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=3)
    sizes |= dict(image_size=32, patch_size=8, projection_dim=16)
    return CLIPVisionConfig(**(sizes | vision))


# Parameters that add to the residual stream, and those before and after the activation.
_ADDED = r"embed|_token|probe|ln_pre|pre_layrnorm|norm_pre|conv1"
_ADDED += r"|(attn|attention)\.(proj|o_proj|out_proj|output\.dense)"
_BEFORE = r"fc1|up_proj|gate_proj|intermediate|weights_in|c_fc"
_AFTER = r"fc2|down_proj|weights_out|c_proj|\d\.output\.dense"


def sensitive(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """`shake`n so that a wrong epsilon or activation shows.

    The residual stream is small, and activations are near -2.5, where GELU itself is small and most
    unlike its approximations.
    """
    shake(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if re.search(_ADDED, name) and not name.startswith("head."):
                parameter *= 0.01
            elif re.search(_AFTER, name):
                parameter *= 0.3
            elif re.search(_BEFORE, name):
                parameter.mul_(0.5).sub_(2.5 if name.endswith("bias") else 0)
    return model


def timm_model(name: str = "vit_base_patch16_clip_224", **sizes) -> torch.nn.Module:
    """A timm ViT of that name, with width 128, 2 heads, depth 2, patch 8, 32 px."""
    _declare_torchvision_operators()
    import timm

    torch.manual_seed(0)
    shape = dict(embed_dim=128, num_heads=2, depth=2, img_size=32, patch_size=8, num_classes=7)
    return shake(timm.create_model(name, **(shape | sizes)))


def trained_model(recipe: str, **overrides) -> VideoViT:
    """A small model of `recipe` as training would leave it."""
    return build(small_config(recipe, **overrides))


def authors_state(model: VideoViT) -> dict[str, torch.Tensor]:
    """The weights of `model` by the names of the authors' checkpoints."""
    state = {}
    for name, tensor in model.state_dict().items():
        if name.startswith("head."):
            name = name.replace("head", "cls_head.fc_cls")
        else:
            for ours, theirs in _PLACES.items():
                name = name.replace(f"{ours}.", f"{theirs}.")
            name = "backbone." + name.replace(".attn.T_A", ".T_A").replace(".attn.S_A", ".S_A")
            name = name.replace(".down.", ".D_fc1.").replace(".up.", ".D_fc2.")
        state[name] = tensor[None] if name.endswith("temporal_embedding") else tensor
    return state


def authors_config(model: VideoViT, recipe: str, **backbone) -> str:
    """The config text of a checkpoint, as MMEngine prints it."""
    config, (kind, stdha) = model.config, CLASSES[recipe]
    extra = "".join(f"        {key}={value!r},\n" for key, value in backbone.items())
    if kind != "ViT_Zero_CLIP_eval" and "num_tadapter" not in backbone:
        extra += "        num_tadapter=2,\n"
    if "type" not in backbone:
        extra += f"        type={kind!r},\n"
    if "stdha_cfg" not in backbone:
        extra += f"        stdha_cfg=dict({stdha}),\n"
    if "adapter_scale" not in backbone and config.adapter:
        scale = RECIPES[recipe].model.adapter.scale
        extra += f"        adapter_scale={int(scale) if scale == 1 else scale},\n"
    process = config.preprocess
    sample = f"dict(type='UniformSample', clip_len={config.num_frames}, test_mode=True"
    if process.sampling == "dense":
        sample = f"dict(type='SampleFrames', frame_interval={process.interval}, test_mode=True"
    crops = "ThreeCrop" if process.test_views[1] == 3 else "CenterCrop"
    return f"""default_scope = 'mmaction'
log_processor = dict(type='LogProcessor', window_size=20, by_epoch=True)
model = dict(
    type='Recognizer3D',
    backbone=dict(
        pretrained='your_clip_path',
        input_resolution={config.image_size},
        patch_size={config.patch_size},
        num_frames={config.num_frames},
        width={config.width},
        layers={config.depth},
        heads={config.num_heads},
{extra}    ),
    cls_head=dict(
        type='I3DHead',
        in_channels={config.width},
        num_classes={config.num_classes},
        spatial_type='avg',
        dropout_ratio=0.5,
        average_clips='prob'),
    data_preprocessor=dict(
        type='ActionDataPreprocessor',
        mean=[122.769, 116.74, 104.04],
        std=[68.493, 66.63, 70.321],
        format_shape='NCTHW'))
test_pipeline = [
    dict(type='DecordInit', io_backend='ceph'),
    {sample}, num_clips={process.test_views[0]}),
    dict(type='DecordDecode'),
    dict(type='Resize', scale=(-1, 224)),
    dict(type='{crops}', crop_size=224),
]
"""


def save_authors(
    path: Path, state: dict[str, torch.Tensor], text: str | None = None, monkeypatch=None
) -> Path:
    """Writes an MMEngine-shaped checkpoint, with history buffers if `monkeypatch` is given.

    MMEngine is not installed: a class of that module's name is made for the time of writing.
    """
    checkpoint = {"meta": {"epoch": 40, "time": "20230901_101010"}, "state_dict": state}
    if text is not None:
        checkpoint["meta"]["cfg"] = text
    if monkeypatch is not None:
        module = types.ModuleType("mmengine.logging.history_buffer")
        exec("class HistoryBuffer:\n    def mean(self): return 0\n", module.__dict__)
        buffer = module.HistoryBuffer
        for name in ("mmengine", "mmengine.logging", module.__name__):
            part = module if name == module.__name__ else types.ModuleType(name)
            monkeypatch.setitem(sys.modules, name, part)
        history = buffer()
        history.__dict__ = {
            "log_history": np.arange(3.0),
            "count_history": np.arange(3),
            "statistics_methods": {"mean": buffer.mean},
            "last": np.float64(0.5),
        }
        checkpoint["message_hub"] = {"log_scalars": {"train/loss": history}, "runtime_info": {}}
        checkpoint["optimizer"] = {"state": {}, "param_groups": [{"lr": 3e-4}]}
    torch.save(checkpoint, path)
    if monkeypatch is not None:
        for name in ("mmengine", "mmengine.logging", "mmengine.logging.history_buffer"):
            monkeypatch.delitem(sys.modules, name)
    return path


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference over the norm of `theirs`."""
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


def save_timm(model: torch.nn.Module, folder: Path) -> None:
    """Writes weights and `config.json` as timm does for the hub."""
    _declare_torchvision_operators()
    from timm.models._hub import save_for_hf

    save_for_hf(model, folder, safe_serialization=True)


def timm_features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What timm's head reads of each image, at any resolution; `model` stays as it is."""
    model = copy.deepcopy(model)
    model.set_input_size(img_size=images.shape[-2:])
    with torch.no_grad():
        return model.forward_head(model.forward_features(images), pre_logits=True)


def open_clip_trunk(name: str, pool: str, proj: str | None) -> tuple[torch.nn.Module, dict]:
    """open_clip's model with an image tower of timm's, of depth 1 and heads of 16; its config."""
    _declare_torchvision_operators()
    import open_clip.timm_model

    heads = settings(name)[1]["num_heads"]
    vision = dict(timm_model_name=name, timm_pool=pool, timm_proj=proj, image_size=32)
    text = dict(context_length=8, vocab_size=50, width=64, heads=1, layers=1)
    config = dict(embed_dim=32, vision_cfg=vision, text_cfg=text)

    def small(name, pretrained=False, **given):
        return timm_model(name, embed_dim=16 * heads, num_heads=heads, depth=1, **given)

    with pytest.MonkeyPatch.context() as patch:
        timm = types.SimpleNamespace(create_model=small)
        patch.setattr(open_clip.timm_model, "timm", timm)
        model = open_clip.model.CustomTextCLIP(**config)
    return model.eval(), config | {"custom_text": True}


def transformers_model(kind: str, **settings) -> torch.nn.Module:
    """transformers' model called `kind`: width 48, 3 heads, depth 2, patch 8, 32 px."""
    _declare_torchvision_operators()
    import transformers

    sizes = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=32)
    torch.manual_seed(0)
    sizes |= dict(patch_size=8) | settings
    kind = getattr(transformers, kind)
    return kind(kind.config_class(**sizes))


def transformers_features(model: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What transformers reads of each image, with positions resized as timm does, or PIL."""
    from timm.layers import resample_abs_pos_embed

    config, state = model.config.to_dict(), model.state_dict()
    size = images.shape[-1]
    if size != config["image_size"]:
        for name in [
            name for name in state if re.search(r"position_embeddings?(\.weight)?$", name)
        ]:
            shape = [size // config["patch_size"]] * 2
            table = state[name].reshape(1, -1, state[name].shape[-1])
            prefix = table.shape[1] - (config["image_size"] // config["patch_size"]) ** 2
            table = resample_abs_pos_embed(table, shape, num_prefix_tokens=prefix)
            state[name] = table if state[name].ndim == 3 else table[0]
        model = type(model)(type(model.config)(**config | {"image_size": size})).eval()
        model.load_state_dict(state)
    with torch.no_grad():
        out = model(images)
    if type(model).__name__ == "ViTModel":  # whose pooler adds a layer
        return out.last_hidden_state[:, 0]
    return out.last_hidden_state.mean(1) if out.pooler_output is None else out.pooler_output
