"""A block's forward and backward written out, for `training_block.py`: no autograd in here.

Tokens are rows `[B*T*N, C]`. On CUDA the Triton kernels of `zeroi2v_kernels` compute, on the CPU
PyTorch's operators. For its attention keys and values move between frames inside the projection's
output, which spares copies; the GPU's kernels read them where they lie, and so do the matrix
products that some CPUs take for bfloat16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from zeroi2v_kernels import choice, stdha_matmul
from zeroi2v_kernels.activation_reference import activate, activate_grad
from zeroi2v_kernels.adapter_linear import (
    Adapter,
    Dropout,
    adapt,
    adapt_grad,
    bottleneck,
    merge,
    merged_after_grad,
    parameter_grads,
)
from zeroi2v_kernels.rotary import turn_
from zeroi2v_kernels.stdha import _move_heads_

from zeroi2v.model.linear import linear, scaled_linear

BEFORE_QKV, AFTER_PROJ, BEFORE_FC1, AFTER_FC2 = range(4)
"""Places of the adapters."""


class Layer(NamedTuple):
    """Weights of a linear layer or a norm."""

    weight: Tensor
    bias: Tensor

    def to(self, dtype: torch.dtype) -> Layer:
        return Layer(self.weight.to(dtype), self.bias.to(dtype))


class Frozen(NamedTuple):
    """Weights of a block's backbone, in the order in which the operators take them."""

    norm_1: Layer
    qkv: Layer
    proj: Layer
    norm_2: Layer
    fc1: Layer
    fc2: Layer
    norm_attended: Layer | None
    norm_hidden: Layer | None

    @classmethod
    def of(cls, weights: Sequence[Tensor], settings: Settings) -> Frozen:
        """Of all `weights` of a block, those of its adapters after them."""
        layers = iter(Layer(*weights[i : i + 2]) for i in range(0, settings.num_frozen, 2))
        has = [True] * 6 + [settings.norm_attended, settings.norm_hidden]
        return cls(*(next(layers) if there else None for there in has))


class Settings(NamedTuple):
    """All that determines the arithmetic beside the tensors."""

    head_offsets: Sequence[int]
    """H ints, in frames."""
    dtype: torch.dtype
    """Of matrix products and what they give; the residual stream keeps that of x."""
    scale: float
    """Factor on the adapters' branches."""
    dropout: float
    """Probability of zeroing an element of a bottleneck."""
    activation: str
    """That of the config."""
    centres: bool
    """Norms are layer norms, and not RMS norms."""
    eps: float
    """Of the norms."""
    norm_attended: bool
    """A norm comes between attention and its output projection."""
    norm_hidden: bool
    """A norm comes between the activation and fc2."""
    memory: str
    """`save`, `lean` or `recompute`."""
    cls_only: bool
    """Compute the CLS token's output alone."""

    @property
    def num_frozen(self) -> int:
        """How many weights are of the backbone: a weight and a bias for each layer and norm."""
        return 2 * (6 + self.norm_attended + self.norm_hidden)


def merged_places(x: Tensor, weights: Sequence[Tensor], settings: Settings) -> list[int]:
    """Where the adapter is merged into its layer for the forward: without dropout, if it pays."""
    if settings.dropout or settings.cls_only or len(weights) == settings.num_frozen:
        return []
    num_rows = x.shape[:-1].numel()
    frozen = Frozen.of(weights, settings)
    layers = {BEFORE_QKV: frozen.qkv, AFTER_PROJ: frozen.proj, BEFORE_FC1: frozen.fc1}
    return [
        place
        for place, layer in layers.items()
        if choice.merging_pays(num_rows, layer.weight)
        or (place == AFTER_PROJ and settings.memory == "lean")
    ]


def attends_by_matmul(x: Tensor, settings: Settings) -> bool:
    """True if attention to `x [B, T, N, C]` runs as matrix products, which keep no sums."""
    queries = 1 if settings.cls_only else x.shape[2]
    pays = choice.matmul_pays(x.device, settings.dtype, queries)
    return pays and not choice.uses_kernels(x)


class BlockArithmetic:
    """One pass through a block, forward or backward."""

    def __init__(self, x, weights, seed, table, settings: Settings):
        self.batch, self.frames, self.tokens, self.width = x.shape
        self.x, self.settings, self.dtype = x.reshape(-1, self.width), settings, settings.dtype
        self.cls_only, self.head_offsets = settings.cls_only, tuple(settings.head_offsets)
        self.on_kernels = choice.uses_kernels(x)
        self.table = table
        frozen = Frozen.of(weights, settings)
        # Kernels widen the norms' weights as they read.
        wide = None if self.on_kernels else torch.promote_types(x.dtype, torch.float32)
        self.norm_1, self.norm_2, self.norm_attended, self.norm_hidden = (
            norm.to(wide) if norm and wide else norm
            for norm in (frozen.norm_1, frozen.norm_2, frozen.norm_attended, frozen.norm_hidden)
        )
        layers = (frozen.qkv, frozen.proj, frozen.fc1, frozen.fc2)
        self.qkv, self.proj, self.fc1, self.fc2 = (layer.to(self.dtype) for layer in layers)
        first = settings.num_frozen
        wide = [Adapter(*weights[i : i + 4], settings.scale) for i in range(first, len(weights), 4)]
        self.adapters = [Adapter(*(w.to(self.dtype) for w in a[:4]), a.scale) for a in wide]
        self.dropouts = [Dropout(settings.dropout, seed, place) for place in range(4)]
        self.merged = {
            place: [
                w.to(self.dtype) for w in merge(*layers[place], wide[place], place == AFTER_PROJ)
            ]
            for place in merged_places(x, weights, settings)
        }
        self.by_matmul = attends_by_matmul(x, settings)
        # PyTorch has silu but not QuickGELU; the factors ride on the products around it.
        scales = settings.activation == "quick_gelu" and not settings.norm_hidden
        self.is_silu = scales and not self.on_kernels
        self.factor = 1.702 if self.is_silu else 1.0

    def until_fc1(self) -> dict[str, Tensor]:
        """All that is made up to fc1's output, by name."""
        made = {}
        x = self._norm(self.x, self.norm_1)[0]
        x = self._adapt(BEFORE_QKV, x, made)
        self._project(self.merged.get(BEFORE_QKV, self.qkv), x, made)
        self._attend(made)
        attended = self._inner_norm(made["attended"], self.norm_attended)[0]
        branch = linear(attended, *self.merged.get(AFTER_PROJ, self.proj))
        branch = self._adapt(AFTER_PROJ, branch, made)
        x, made["middle"] = self._add_norm(branch, self._asked_rows(self.x), self.norm_2)
        x = self._adapt(BEFORE_FC1, x, made)
        fc1 = self.merged.get(BEFORE_FC1, self.fc1)
        made["fc1"] = scaled_linear(x, *fc1, input_scale=self.factor, bias_scale=self.factor)
        return made

    def after_fc1(self, made: dict[str, Tensor]) -> Tensor:
        """The block's output from what `until_fc1` made; adds what is made on the way."""
        active = self._inner_norm(self._activate(made["fc1"]), self.norm_hidden)[0]
        made["fc2"] = scaled_linear(active, *self.fc2, input_scale=1 / self.factor)
        if not self.adapters:
            return made["fc2"] + made["middle"]
        out, made["bottleneck_3"] = adapt(
            made["fc2"], self.adapters[AFTER_FC2], self.dropouts[AFTER_FC2], made["middle"]
        )
        return out

    def backward(
        self, grad: Tensor, made: dict[str, Tensor], grads: list, x_needs_grad: bool
    ) -> Tensor | None:
        """Gradient of x for that of the output; fills in `grads`, those of the adapters."""
        # MLP
        if self.norm_hidden or "fc2" not in made:
            hidden = self._activate(made["fc1"])
            active, *statistics = self._inner_norm(hidden, self.norm_hidden)
        if "fc2" in made:
            out_grad = self._adapt_grad(AFTER_FC2, grad, made["fc2"], made, grads)
        else:
            active = active.div_(self.factor) if self.is_silu else active
            out_grad = self._adapt_grad(AFTER_FC2, grad, active, made, grads, self.fc2)
            del active
        hidden_grad = linear(out_grad, self.fc2.weight.t())
        if self.norm_hidden:
            hidden_grad = self._norm_grad(hidden_grad, hidden, statistics, self.norm_hidden, None)
            del hidden
        hidden_grad = self._activate_grad(hidden_grad, made["fc1"])
        x_grad = linear(hidden_grad, self.fc1.weight.t())
        del hidden_grad, out_grad
        x, *statistics = self._norm(made["middle"], self.norm_2)
        x_grad = self._adapt_grad(BEFORE_FC1, x_grad, x, made, grads)
        middle_grad = self._norm_grad(x_grad, made["middle"], statistics, self.norm_2, grad)

        # attention
        attended, *inner = self._inner_norm(made["attended"], self.norm_attended)
        if AFTER_PROJ in self.merged:
            out_grad, grads[4:8] = merged_after_grad(
                middle_grad.to(self.dtype), attended, *self.proj, self.adapters[AFTER_PROJ]
            )
        else:
            branch_grad = self._adapt_grad(
                AFTER_PROJ, middle_grad, attended, made, grads, self.proj
            )
            out_grad = linear(branch_grad, self.proj.weight.t())
        if self.norm_attended:
            norm = self.norm_attended
            out_grad = self._norm_grad(out_grad, made["attended"], inner, norm, None)
        x_grad = self._project_grad(self._attend_grad(out_grad, made))
        if not (self.adapters or x_needs_grad):
            return None
        x, *statistics = self._norm(self.x, self.norm_1)
        x_grad = self._adapt_grad(BEFORE_QKV, x_grad, x, made, grads)
        if not x_needs_grad:
            return None
        passed = None if self.cls_only else middle_grad
        x_grad = self._norm_grad(x_grad, self.x, statistics, self.norm_1, passed)
        if self.cls_only:
            self._asked_rows(x_grad).add_(middle_grad)
        return x_grad

    # adapters

    def _adapt(self, place: int, x: Tensor, made: dict[str, Tensor]) -> Tensor:
        """What passes the adapter, unless it is merged; x may be written over."""
        if not self.adapters or place in self.merged:
            return x
        out, made[f"bottleneck_{place}"] = adapt(
            x, self.adapters[place], self.dropouts[place], overwrite=True
        )
        return out

    def _adapt_grad(self, place, grad, source, made, grads, linear=None) -> Tensor:
        """Gradient of an adapter's input; fills in those of its weights.

        `source` is its input, or with `linear` what that layer makes its input of.
        """
        grad = grad.to(self.dtype)
        if not self.adapters:
            return grad
        adapter, dropout = self.adapters[place], self.dropouts[place]
        d = made.get(f"bottleneck_{place}")
        if d is None:
            d = bottleneck(source, adapter, dropout)
        out, d_grad, sums = adapt_grad(grad, adapter, dropout)
        grads[4 * place : 4 * place + 4] = parameter_grads(
            grad, source, d, d_grad, sums, adapter.scale, linear
        )
        return out

    # norms

    def _norm(self, x: Tensor, norm: Layer) -> tuple[Tensor, Tensor, Tensor]:
        """The norm in the dtype of products; mean and 1 / deviation, in float32 at least.

        The mean is zero for RMS norms.
        """
        eps, centres = self.settings.eps, self.settings.centres
        if self.on_kernels:
            from zeroi2v_kernels.norm import norm_forward

            out, _, mean, rstd = norm_forward(x, None, *norm, eps, centres, self.dtype)
            return out, mean, rstd
        if centres:
            out, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], *norm, eps)
            return out.to(self.dtype), mean, rstd
        wide = x.to(norm.weight.dtype)
        rstd = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        out = wide * rstd * norm.weight + norm.bias
        return out.to(self.dtype), torch.zeros_like(rstd), rstd

    def _inner_norm(self, x: Tensor, norm: Layer | None) -> tuple[Tensor, ...]:
        """`_norm` where the block has one there, else x alone."""
        return self._norm(x, norm) if norm else (x,)

    def _add_norm(self, branch: Tensor, residual: Tensor, norm: Layer) -> tuple[Tensor, Tensor]:
        """The norm of the sum, and the sum in the residual's dtype; branch may be lost."""
        if self.on_kernels:
            from zeroi2v_kernels.norm import norm_forward

            rest = (residual.contiguous(), *norm, self.settings.eps, self.settings.centres)
            return norm_forward(branch, *rest, self.dtype)[:2]
        total = branch.add_(residual) if branch.dtype == residual.dtype else branch + residual
        return self._norm(total, norm)[0], total

    def _norm_grad(self, grad, x, statistics, norm: Layer, passed: Tensor | None) -> Tensor:
        """Gradient of the norm's input x, plus the gradient passed to x by others, if any."""
        if self.on_kernels:
            from zeroi2v_kernels.norm import norm_backward

            rest = (x, *statistics, norm.weight, self.settings.centres, False)
            return norm_backward(grad, passed, *rest)[0]
        if self.settings.centres:
            out = torch.ops.aten.native_layer_norm_backward(
                grad.to(x.dtype), x, x.shape[-1:], *statistics, *norm, (True, False, False)
            )[0]
        else:
            rstd = statistics[1]
            scaled, y = grad.to(rstd.dtype) * norm.weight, x.to(rstd.dtype) * rstd
            out = (rstd * (scaled - y * (scaled * y).mean(-1, keepdim=True))).to(x.dtype)
        return out if passed is None else out.add_(passed)

    # attention

    def _project(self, qkv: list[Tensor], x: Tensor, made: dict[str, Tensor]) -> None:
        """Queries, keys and values, turned by rotary positions if there are any.

        On the CPU keys and values then move to the frames that read them.
        """
        if self.cls_only:
            weight, bias = (w.split((self.width, 2 * self.width)) for w in qkv)
            made["query"] = linear(self._asked_rows(x), weight[0], bias[0])
            made["key_value"] = linear(x, weight[1], bias[1])
        else:
            made["qkv"] = linear(x, *qkv)
        self._turn(made["key_value" if self.cls_only else "qkv"])
        if not (self.on_kernels or self.by_matmul):
            _, key_value = self._split(made)
            _move_heads_(key_value, key_value, self.head_offsets)

    def _turn(self, rows: Tensor, back: bool = False) -> None:
        """Turns queries and keys by their places in place, if the block does; or keys alone.

        `rows` holds whole tokens of what the attention takes: of queries, keys and values; keys and
        values; or of one of them.
        """
        if self.table is not None:
            heads = len(self.head_offsets)
            x = rows.view(self.batch, self.frames, self.tokens, -1, heads, self.width // heads)
            turn_(x, self.table, max(1, x.shape[3] - 1), back)

    def _split(self, made: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Queries `[B, T, M, H, D]`, keys and values `[B, T, N, 2, H, D]`."""
        frames, heads = (self.batch, self.frames), len(self.head_offsets)
        if self.cls_only:
            query = made["query"].view(*frames, 1, heads, -1)
            return query, made["key_value"].view(*frames, self.tokens, 2, heads, -1)
        qkv = made["qkv"].view(*frames, self.tokens, 3, heads, -1)
        return qkv[:, :, :, 0], qkv[:, :, :, 1:]

    def _attend(self, made: dict[str, Tensor]) -> None:
        """Attention's output in rows and, except for `matmul`, the logarithms of its sums."""
        query, key_value = self._split(made)
        scale = query.shape[-1] ** -0.5
        if self.by_matmul:
            out = stdha_matmul.forward(query, key_value, self.head_offsets, scale)
        elif self.on_kernels:
            from zeroi2v_kernels import stdha_launch

            out, made["sums"] = stdha_launch.forward(query, key_value, self.head_offsets, scale)
        else:
            flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            out, made["sums"] = flash(*_flash_layout(query, *key_value.unbind(3)))
            out = out.transpose(1, 2)
        made["attended"] = out.reshape(-1, self.width)

    def _attend_grad(self, grad: Tensor, made: dict[str, Tensor]) -> list[Tensor]:
        """Gradients of queries, keys and values in rows; some of them packed, as is cheapest."""
        query, key_value = self._split(made)
        out, grad = (x.view(query.shape) for x in (made["attended"], grad))
        if self.on_kernels or self.by_matmul:
            names = ["query", "key_value"] if self.cls_only else ["qkv"]
            packed = {name: torch.empty_like(made[name]) for name in names}
            last = (*self._split(packed), self.head_offsets, query.shape[-1] ** -0.5)
            if self.by_matmul:
                stdha_matmul.backward(grad, query, key_value, *last)
            else:
                from zeroi2v_kernels import stdha_launch

                stdha_launch.backward(grad, query, key_value, out, made["sums"], *last)
            self._turn(packed[names[-1]], back=True)
            return list(packed.values())
        tensors = _flash_layout(grad, query, *key_value.unbind(3), out)
        grads = _flash_backward(*tensors, made["sums"])
        for x in grads[1:]:
            _collect_heads_(x.unflatten(0, (self.batch, self.frames)), self.head_offsets)
        rows = [x.transpose(1, 2).reshape(-1, self.width) for x in grads]
        for x in rows[1 if self.cls_only else 0 : 2]:
            self._turn(x, back=True)
        return rows

    def _project_grad(self, grads: list[Tensor]) -> Tensor:
        """Gradient of the input of the projection to queries, keys and values."""
        weight = self.qkv.weight
        if len(grads) == 1:
            return linear(grads[0], weight.t())
        query, *others = grads
        weights = weight[self.width :].chunk(len(others))
        out = linear(others[0], weights[0].t())
        for other, weight_of_other in zip(others[1:], weights[1:], strict=True):
            out.add_(linear(other, weight_of_other.t()))
        self._asked_rows(out).add_(linear(query, weight[: self.width].t()))
        return out

    def _asked_rows(self, x: Tensor) -> Tensor:
        """Of rows of all tokens those that go on after attention, as a view."""
        return x.view(-1, self.tokens, self.width)[:, 0] if self.cls_only else x

    # activation

    def _activate(self, x: Tensor) -> Tensor:
        if self.on_kernels:
            from zeroi2v_kernels.activation import activation_forward

            return activation_forward(x, None, self.settings.activation)
        return F.silu(x) if self.is_silu else activate(x, self.settings.activation)

    def _activate_grad(self, grad: Tensor, x: Tensor) -> Tensor:
        """Gradient of the activation's input x; that of its output may be written over."""
        if self.on_kernels:
            from zeroi2v_kernels.activation import activation_backward

            return activation_backward(grad, x, None, self.settings.activation)
        if self.is_silu:
            return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)
        return activate_grad(grad, x, self.settings.activation)


def _flash_layout(*tensors: Tensor) -> list[Tensor]:
    """`[B, T, N, H, D]` -> `[B*T, H, N, D]`, views."""
    return [x.flatten(0, 1).transpose(1, 2) for x in tensors]


def _flash_backward(grad: Tensor, *tensors: Tensor) -> list[Tensor]:
    """Gradients of queries, keys and values `[B*T, H, N, D]` on the CPU.

    In half precision PyTorch's own takes 1.5x the time of float32, so frames are widened, one by
    one.
    """
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    if grad.dtype not in (torch.bfloat16, torch.float16):
        return list(backward(grad, *tensors, 0.0, False))
    outs = [torch.empty_like(x.transpose(1, 2)).transpose(1, 2) for x in tensors[:3]]
    for frame in range(grad.shape[0]):
        wide = (x[frame : frame + 1].float() for x in (grad, *tensors))
        for out, part in zip(outs, backward(*wide, 0.0, False), strict=True):
            out[frame] = part[0]
    return outs


def _collect_heads_(grad: Tensor, head_offsets: tuple[int, ...]) -> None:
    """Adjoint of moving heads: frame s of `grad [B, T, H, N, D]` collects from its readers."""
    for head, offset in enumerate(head_offsets):
        step = abs(offset)
        if not 0 < step < grad.shape[1]:
            continue
        collected = grad[:, :, head]
        given = collected.clone()
        if offset > 0:
            collected[:, :step] = 0
            collected[:, step:] = given[:, :-step]
            collected[:, -step:] += given[:, -step:]
        else:
            collected[:, -step:] = 0
            collected[:, :-step] = given[:, step:]
            collected[:, :step] += given[:, :step]
