"""Floating-point operations of a model: by formula, and counted operator by operator as it runs.

One multiply-add is two operations. Papers on video models print multiply-adds and call them FLOPs:
divide by two before comparing. Only matrix products count, convolutions and attention included, as
is usual.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import zeroi2v_kernels.stdha  # noqa: F401  (defines the operators below)
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from zeroi2v.config import ModelConfig


def counted(run: Callable[[], Any]) -> int:
    """Operations of everything that `run()` has PyTorch do, gradients included, on any device."""
    with FlopCounterMode(display=False, custom_mapping=_UNKNOWN) as counter:
        run()
    return counter.get_total_flops()


def formula(config: ModelConfig, cls_only: bool = True) -> int:
    """Operations of one clip through a `VideoViT`, written down from the method.

    `cls_only` is what a model does that reads the CLS token: its last block computes queries,
    projection and MLP for that alone. Without it all blocks are alike, as in the published counts.
    """
    tokens, width = config.num_tokens, config.width
    patches = config.grid**2 * width * 3 * config.patch_size**2
    blocks = [_block(config.block(number), tokens) for number in range(config.depth - 1)]
    blocks.append(_block(config, 1 if cls_only and config.reads_class else tokens))
    frame = patches + sum(blocks) + _pool(config)
    return 2 * (config.num_frames * frame + width * config.num_classes)


def _block(config: ModelConfig, queries: int) -> int:
    """Multiply-adds of one block on one frame, of which `queries` tokens go on."""
    tokens, width = config.num_tokens, config.width
    first = config.hidden * (2 if config.activation == "swiglu" else 1)  # gates and values
    adapter = 2 * width * config.adapter_rank if config.adapter else 0
    key_value = tokens * (adapter + 2 * width * width)
    query = queries * width * width
    attention = 2 * queries * tokens * width
    projection = queries * (width * width + adapter)
    mlp = queries * (width * (first + config.hidden) + 2 * adapter)
    return key_value + query + attention + projection + mlp


def _pool(config: ModelConfig) -> int:
    """Multiply-adds of what pools the tokens of one frame, if that is attention."""
    if config.pooling != "attention":
        return 0
    tokens, width = config.num_tokens, config.width
    hidden = round(width * config.pool_mlp_ratio)
    first = hidden * (2 if config.activation == "swiglu" else 1)
    key_value, attention = tokens * 2 * width * width, 2 * tokens * width
    return key_value + attention + width * width + width * (first + hidden)


def _stdha(qkv_shape, *_args, out_shape=None, **_kwargs) -> int:
    clips, frames, tokens, _, heads, width = qkv_shape
    return 4 * clips * frames * heads * tokens * tokens * width


def _stdha_split(query_shape, key_value_shape, *_args, out_shape=None, **_kwargs) -> int:
    clips, frames, queries, heads, width = query_shape
    return 4 * clips * frames * heads * queries * key_value_shape[2] * width


def _attention(query_shape, key_shape, value_shape, *_args, out_shape=None, **_kwargs) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def _native_attention(query_shape, *_args, out_shape=None, **_kwargs) -> int:
    """`nn.MultiheadAttention` for inference: attention between its two projections."""
    clips, tokens, width = query_shape
    return 8 * clips * tokens * width * width + 4 * clips * tokens * tokens * width


def _linear(x_shape, weight_shape, *_args, out_shape=None, **_kwargs) -> int:
    return 2 * math.prod(x_shape) * weight_shape[0]


# What PyTorch's counter does not know: some of its own operators on the CPU, and our kernels.
_UNKNOWN = {
    torch.ops.mkldnn._linear_pointwise: _linear,
    torch.ops.aten._native_multi_head_attention: _native_attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.zeroi2v.stdha: _stdha,
    torch.ops.zeroi2v.stdha_split: _stdha_split,
    torch.ops.zeroi2v.stdha_matmul: _stdha_split,
}
