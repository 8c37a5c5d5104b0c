"""The attention of a block: multi-head attention with a frame offset for each head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from zeroi2v_kernels.rotary import rotated
from zeroi2v_kernels.stdha import BACKENDS, stdha, stdha_split

from zeroi2v.config import ModelConfig, RotaryConfig
from zeroi2v.model.adapter import LinearAdapter
from zeroi2v.model.linear import Linear, linear
from zeroi2v.model.norm import Norm
from zeroi2v.model.quantization import QuantizedWeights


class STDHA(QuantizedWeights):
    """Self-attention within frames; head h reads keys and values `head_offsets[h]` frames on.

    Parameters carry the names of `nn.MultiheadAttention`, as CLIP's do. With adapters the input
    passes `in_adapter` before the projection to queries, keys and values, and the output
    `out_adapter` after the output projection. `backend` says what computes the attention, as in
    `zeroi2v_kernels.stdha`; `set_backend` sets it for a whole model.

    Rotary positions depend on a token's place alone, which a shifted head's key shares with the
    key that it stands for: turning before the shift or after it is the same.

    Source: ZeroI2V (arXiv 2310.01324), section 3.2.
    """

    backend: str | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.width
        self.num_heads = config.num_heads
        self.head_offsets = config.head_offsets
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.reserve_names("in_proj_weight")
        self.rotary = Rotary(config.rotary, config) if config.rotary else None
        self.ln = Norm(width, config) if config.norm_attended else None
        self.out_proj = Linear(width, width)
        if config.adapter:
            self.in_adapter = LinearAdapter(width, config.adapter_rank, config.adapter)
            self.out_adapter = LinearAdapter(width, config.adapter_rank, config.adapter)
        else:
            self.in_adapter = self.out_adapter = nn.Identity()

    def forward(self, x: Tensor, cls_only: bool = False) -> Tensor:
        """`x [B, T, N, C]` -> `[B, T, N, C]`, or `[B, T, 1, C]` for the CLS token alone."""
        x = self.in_adapter(x)
        # Without autograd nobody else holds the projection's output: heads may move inside it.
        choice = dict(backend=self.backend, overwrite=not torch.is_grad_enabled())
        if cls_only:
            query, key_value = self.project(x, cls_only)
            out = stdha_split(query, key_value, self.head_offsets, **choice)
        else:
            out = stdha(self.project(x), self.head_offsets, **choice)
        out = out.flatten(-2)
        return self.out_adapter(self.out_proj(self.ln(out) if self.ln else out))

    def project(self, x: Tensor, cls_only: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Packed queries, keys and values `[B, T, N, 3, H, D]` of the adapted input `[B, T, N, C]`.

        For the CLS token alone its query `[B, T, 1, H, D]`, and keys and values
        `[B, T, N, 2, H, D]`. Queries and keys are turned by rotary positions, if the model has any.
        """
        if cls_only:
            width = x.shape[-1]
            query = self._project(x[:, :, :1], (0, width))
            key_value = self._project(x, (width, 3 * width))
            query = query.unflatten(-1, (self.num_heads, -1))
            key_value = key_value.unflatten(-1, (2, self.num_heads, -1))
            return query, self.rotary(key_value, 1) if self.rotary else key_value
        qkv = self._project(x)
        qkv = qkv.unflatten(-1, (3, self.num_heads, -1))
        return self.rotary(qkv, 2) if self.rotary else qkv

    def _project(self, x: Tensor, rows: tuple[int, int] | None = None) -> Tensor:
        """`x W^T + b` of queries, keys and values, or of `rows` (from, to) of them alone."""
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if rows:
            weight, bias = weight[slice(*rows)], bias[slice(*rows)]
        if self.in_proj_weight_scale is not None:
            return self.product("in_proj_weight", x, bias, rows)
        return linear(x, weight, bias)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_offsets={self.head_offsets}"


class Rotary(nn.Module):
    """Turns queries and keys of the patches by their places; see `RotaryConfig`.

    The angles are large numbers, so the table of their cosines and sines is of float32 whatever the
    model is cast to, and of float64 for a float64 input.
    """

    def __init__(self, rotary: RotaryConfig, config: ModelConfig):
        super().__init__()
        self.rotary, self.grid, self.head_dim = rotary, config.grid, config.head_dim
        self.register_buffer("_table", self._made(torch.float32), persistent=False)

    def forward(self, x: Tensor, parts: int) -> Tensor:
        """The first `parts` (queries and keys, or keys) of `x [B, T, N, K, H, D]` turned.

        Without autograd `x` itself is written to.
        """
        return rotated(x, self.table(x.dtype), parts, overwrite=not torch.is_grad_enabled())

    def table(self, dtype: torch.dtype) -> Tensor:
        """Cosines and sines of the P patches' angles for such queries and keys, `[2, P, D/2]`."""
        if dtype == torch.float64:
            return self._made(dtype).to(self._table.device)
        return self._table

    def _made(self, dtype: torch.dtype) -> Tensor:
        rotary, pairs = self.rotary, self.head_dim // 4
        # On the CPU also where the model is made on `meta`, to be filled later.
        steps = torch.arange(max(self.grid, pairs), dtype=torch.float64, device="cpu")
        places = rotary.start + rotary.span * (steps[: self.grid] + rotary.offset) / self.grid
        angles = places[:, None] * rotary.base ** (-steps[:pairs] / pairs)  # [g, D/4]
        shape = (self.grid, self.grid, pairs)
        rows, columns = angles[:, None].expand(shape), angles[None].expand(shape)
        angles = torch.cat([rows, columns], dim=-1).flatten(0, 1)
        return torch.stack([angles.cos(), angles.sin()]).to(dtype)

    def _apply(self, function, recurse=True):
        super()._apply(function, recurse)
        self._table = self._made(torch.float32).to(self._table.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.rotary}"


def set_backend(model: nn.Module, backend: str | None) -> None:
    """Has `backend` compute all attention of `model`; None leaves the choice to the device.

    Raises ValueError for an unknown name; what it can not run it refuses when it is run.
    """
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)} or None: got {backend!r}")
    for module in model.modules():
        if isinstance(module, STDHA):
            module.backend = backend
