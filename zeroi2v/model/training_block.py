"""A transformer block for training that keeps little between forward and backward.

With the backbone frozen, backward needs no input of a frozen linear layer; and with linear
adapters most of what it does need is cheap to compute again. Kept, in widths C per token:

    `save`        x 1, queries, keys and values 3, attention's output 1, the residual between
                  attention and MLP 1, fc1's output 4, fc2's output 1, four bottlenecks 1    = 12
    `lean`        the same without three of the bottlenecks                              = 11.25
    `recompute`   x and the last bottleneck                                                = 1.25

and without dropout no bottleneck of an adapter that is merged into its layer for the forward: 11
in `lean`. PyTorch's autograd keeps 18 of the block in `vit.py`, and 22 with QuickGELU written as
in CLIP. Never kept: normalised inputs and their statistics, adapted inputs, the activation (only a
trained fc2 would need it), dropout masks (a seed gives them again), and the projection's output,
which its adapter reads (see `adapter_linear.py`).

Forward and backward are one operator each, so that `torch.compile` can neither keep more nor undo
what is computed again. Where nobody follows operators an autograd function runs the same: PyTorch's
layers around an operator of so many tensors keep the host longer than a few clips keep a GPU.

Source: ZeroI2V (arXiv 2310.01324), section 3, for the block; the bookkeeping is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_type_hints

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from zeroi2v_kernels import choice
from zeroi2v_kernels.device import is_followed, unwatched

from zeroi2v.model.training_math import (
    AFTER_FC2,
    AFTER_PROJ,
    BEFORE_QKV,
    BlockArithmetic,
    Frozen,
    Layer,
    Settings,
    attends_by_matmul,
    merged_places,
)

if TYPE_CHECKING:
    from zeroi2v.model.vit import Block

Memory = Literal["save", "lean", "recompute"]


def can_train(block: Block, x: Tensor) -> bool:
    """True if autograd needs gradients, but for no backbone parameter of `block`, and the training
    block has operators for `x` (`choice.trains_by_block`)."""
    if not torch.is_grad_enabled():
        return False
    frozen, adapters = _parameters(block)
    wanted = x.requires_grad or any(p.requires_grad for p in adapters)
    if not wanted or any(p.requires_grad for p in frozen):
        return False
    return choice.trains_by_block(x, block.attn.num_heads, block.attn.backend)


def training_block(block: Block, x: Tensor, cls_only: bool) -> Tensor:
    """What `block(x, cls_only)` computes for `x [B, T, N, C]`, kept by policy `block.memory`."""
    frozen, adapters = _parameters(block)
    adapter = block.attn.in_adapter if adapters else None
    dropout = adapter.dropout.p if adapters and block.training else 0.0
    autocast = torch.is_autocast_enabled(x.device.type)
    settings = Settings(
        head_offsets=list(block.attn.head_offsets),
        dtype=torch.get_autocast_dtype(x.device.type) if autocast else x.dtype,
        scale=adapter.scale if adapters else 0.0,
        dropout=dropout,
        activation=block.mlp.activation,
        centres=block.ln_1.centres,
        eps=block.ln_1.eps,
        norm_attended=block.attn.ln is not None,
        norm_hidden=block.mlp.ln is not None,
        memory=block.memory,
        cls_only=cls_only,
    )
    seed = torch.randint(2**62, (), device=x.device) if dropout else None
    table = block.attn.rotary and block.attn.rotary.table(settings.dtype)
    if is_followed(x):
        return block_forward(x, frozen + adapters, seed, table, *settings)[0]
    return _Block.apply(x, seed, table, settings, *frozen, *adapters)


class _Block(torch.autograd.Function):
    """The operators below without PyTorch's layers around them."""

    @staticmethod
    def forward(ctx, x, seed, table, settings, *weights):
        out, *kept = _forward(x, weights, seed, table, *settings)
        ctx.settings, ctx.num_weights = settings, len(weights)
        ctx.save_for_backward(x, seed, table, *weights, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x_grad, weight_grads, *_ = _backward(ctx, [grad], _gradients)
        return x_grad, None, None, None, *weight_grads


def _parameters(block: Block) -> tuple[list[Tensor], list[Tensor]]:
    """The frozen parameters and those of the adapters, in the order `BlockArithmetic` expects."""
    attn, mlp = block.attn, block.mlp
    frozen = Frozen(
        norm_1=Layer(block.ln_1.weight, block.ln_1.bias),
        qkv=Layer(attn.in_proj_weight, attn.in_proj_bias),
        proj=Layer(attn.out_proj.weight, attn.out_proj.bias),
        norm_2=Layer(block.ln_2.weight, block.ln_2.bias),
        fc1=Layer(mlp.c_fc.weight, mlp.c_fc.bias),
        fc2=Layer(mlp.c_proj.weight, mlp.c_proj.bias),
        norm_attended=attn.ln and Layer(attn.ln.weight, attn.ln.bias),
        norm_hidden=mlp.ln and Layer(mlp.ln.weight, mlp.ln.bias),
    )
    adapters = (attn.in_adapter, attn.out_adapter, mlp.in_adapter, mlp.out_adapter)
    weights = [w for layer in frozen if layer for w in layer]
    layers = [x for adapter in adapters if not isinstance(adapter, nn.Identity)
              for x in (adapter.down, adapter.up)]  # fmt: skip
    return weights, [p for layer in layers for p in (layer.weight, layer.bias)]


@unwatched
def _forward(x: Tensor, weights: Sequence[Tensor], seed, table, *settings) -> list[Tensor]:
    """The block's output, then what `block_backward` needs beside the inputs.

    `x` is `[B, T, N, C]`; `weights` are those of the backbone, then of the adapters, if any; `seed`
    is of the dropouts, one int64, or None without dropout; `table` is that of `Rotary`, or None;
    the others are `Settings`.
    """
    settings = Settings(*settings)
    block = BlockArithmetic(x, weights, seed, table, settings)
    made = block.until_fc1()
    out = block.after_fc1(made)
    kept = [made[name] for name in _kept(x, weights, settings)]
    return [out.view(*x.shape[:2], -1, x.shape[-1]), *kept]


@unwatched
def _gradients(grad: Tensor, x: Tensor, kept, weights, seed, table, *values) -> list[Tensor]:
    """The gradient of `x`, if it is needed, then those of the adapters' weights.

    `values` are `Settings`, then whether `x` needs a gradient; the others as in `_forward`.
    """
    settings, x_needs_grad = Settings(*values[:-1]), values[-1]
    block = BlockArithmetic(x, weights, seed, table, settings)
    made = dict(zip(_kept(x, weights, settings), kept, strict=True))
    if settings.memory == "recompute":
        made |= block.until_fc1()
    adapters = weights[settings.num_frozen :]
    grads = [None] * len(adapters)
    rows = grad.reshape(-1, x.shape[-1]).contiguous()
    x_grad = block.backward(rows, made, grads, x_needs_grad)
    grads = [g.to(w.dtype) for g, w in zip(grads, adapters, strict=True)]
    return [x_grad.view(x.shape), *grads] if x_needs_grad else grads


def _kept(x: Tensor, weights: Sequence[Tensor], settings: Settings) -> list[str]:
    """Names of what is kept from forward to backward."""
    kept, places = [], [AFTER_FC2]
    if settings.memory != "recompute":
        kept = ["query", "key_value"] if settings.cls_only else ["qkv"]
        kept += ["attended", "middle", "fc1", "fc2"]
        kept += [] if attends_by_matmul(x, settings) else ["sums"]
        places = range(4) if settings.memory == "save" else [AFTER_PROJ]
    if len(weights) == settings.num_frozen:
        return kept
    merged = merged_places(x, weights, settings)
    return kept + [f"bottleneck_{place}" for place in places if place not in merged]


_TYPES = {
    Sequence[int]: "SymInt[]", torch.dtype: "ScalarType", float: "float", str: "str", bool: "bool",
}  # fmt: skip
_SETTINGS = ", ".join(f"{_TYPES[kind]} {name}" for name, kind in get_type_hints(Settings).items())
_INPUTS = f"Tensor[] weights, Tensor? seed, Tensor? table, {_SETTINGS}"
block_forward = torch.library.custom_op(
    "zeroi2v::block_forward", _forward, mutates_args=(), schema=f"(Tensor x, {_INPUTS}) -> Tensor[]"
)
block_backward = torch.library.custom_op(
    "zeroi2v::block_backward", _gradients, mutates_args=(),
    schema=f"(Tensor grad, Tensor x, Tensor[] kept, {_INPUTS}, bool x_needs_grad) -> Tensor[]",
)  # fmt: skip


@block_forward.register_fake
def _(x, weights, seed, table, *values):
    settings = Settings(*values)
    batch, frames, tokens, width = x.shape
    asked = 1 if settings.cls_only else tokens
    rows, asked_rows = batch * frames * tokens, batch * frames * asked
    shapes = {
        "qkv": (rows, 3 * width),
        "query": (asked_rows, width),
        "key_value": (rows, 2 * width),
        "attended": (asked_rows, width),
        "fc1": (asked_rows, Frozen.of(weights, settings).fc1.weight.shape[0]),
        "fc2": (asked_rows, width),
    }
    for place, down in enumerate(weights[settings.num_frozen :: 4]):
        num_rows = rows if place == BEFORE_QKV else asked_rows
        shapes[f"bottleneck_{place}"] = (num_rows, down.shape[0])
    made = {name: x.new_empty(shape, dtype=settings.dtype) for name, shape in shapes.items()}
    made["middle"] = x.new_empty(asked_rows, width)
    made["sums"] = _fake_sums(x, asked, settings)
    kept = [made[name] for name in _kept(x, weights, settings)]
    return [x.new_empty(batch, frames, asked, width), *kept]


def _fake_sums(x: Tensor, asked: int, settings: Settings) -> Tensor:
    """The logarithms of attention's sums, in the layout of the CPU or of the kernels."""
    (batch, frames), heads = x.shape[:2], len(settings.head_offsets)
    if choice.uses_kernels(x):
        return x.new_empty(batch, frames, heads, asked, dtype=torch.float32)
    dtype = torch.promote_types(settings.dtype, torch.float32)
    return x.new_empty(batch * frames, asked, heads, dtype=dtype).transpose(1, 2)


@block_backward.register_fake
def _(grad, x, kept, weights, seed, table, *values):
    grads = [torch.empty_like(w) for w in weights[Settings(*values[:-1]).num_frozen :]]
    return [x.new_empty(x.shape), *grads] if values[-1] else grads


def _save(ctx, inputs, output):
    x, weights, seed, table, *settings = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.settings, ctx.num_weights = Settings(*settings), len(weights)
    ctx.save_for_backward(x, seed, table, *weights, *output[1:])


def _backward(ctx, grads, gradients=block_backward):
    x, seed, table, *tensors = ctx.saved_tensors
    weights, kept = tensors[: ctx.num_weights], tensors[ctx.num_weights :]
    x_needs_grad = ctx.needs_input_grad[0]
    given = gradients(grads[0], x, kept, weights, seed, table, *ctx.settings, x_needs_grad)
    x_grad = given.pop(0) if x_needs_grad else None
    weight_grads = [None] * ctx.settings.num_frozen + given
    return x_grad, weight_grads, *[None] * (2 + len(ctx.settings))


block_forward.register_autograd(_backward, setup_context=_save)
