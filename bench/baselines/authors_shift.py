"""A merged model run the way the released code runs it, on the same weights, for comparison.

Tokens lie sequence first, `[N, B*T, C]`. In every block the keys and the values of *all* heads are
copied, and the shifted heads' frames written over the copies; the last block computes all tokens,
though CLS alone leaves it; and QuickGELU is three operations.

PyTorch has removed its attention function. In its place, `fused=True` calls today's
`scaled_dot_product_attention`, which is faster; `fused=False` computes softmax between two batched
products, as the original did. Linear layers are multiplied as ours are, so that only the way of
shifting is compared.

The released class for merged models supports only offsets of -1 and +1; this one supports all.

Source: the code released with ZeroI2V (arXiv 2310.01324), described, not copied.
"""

from __future__ import annotations

from itertools import groupby

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from zeroi2v.model.linear import linear
from zeroi2v.model.vit import Block, VideoViT


class AuthorsViT(nn.Module):
    """`model`, which has no adapters, run as described above. Shares its parameters.

    Raises ValueError if `model` has adapters.
    """

    def __init__(self, model: VideoViT, fused: bool):
        super().__init__()
        if model.config.adapter is not None:
            raise ValueError("model must be merged: got one with adapters")
        self.model = model
        self.fused = fused

    def forward(self, video: Tensor) -> Tensor:
        """Normalised `video [B, 3, T, H, W]` -> logits `[B, num_classes]`."""
        model, clips = self.model, len(video)
        x = rearrange(model.embed(video), "b t n c -> n (b t) c")
        for block in model.transformer.resblocks:
            x = x + self._attention(block, block.ln_1(x))
            hidden = block.mlp.c_fc(block.ln_2(x))
            if block.mlp.activation == "quick_gelu":
                hidden = hidden * torch.sigmoid(1.702 * hidden)
            else:
                hidden = F.gelu(hidden)
            x = x + block.mlp.c_proj(hidden)
        cls = model.ln_post(rearrange(x[0], "(b t) c -> b t c", b=clips))
        return model.head(cls.mean(dim=1))

    def _attention(self, block: Block, x: Tensor) -> Tensor:
        """`[N, B*T, C]` -> `[N, B*T, C]`."""
        attn, tokens = block.attn, len(x)
        query, key, value = linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
        heads = [
            rearrange(part, "n bt (h d) -> (bt h) n d", h=attn.num_heads)
            for part in (query, self._shift(key), self._shift(value))
        ]
        if self.fused:
            out = F.scaled_dot_product_attention(*heads)
        else:
            query, key, value = heads
            scores = torch.bmm(query / query.shape[-1] ** 0.5, key.transpose(1, 2))
            out = torch.bmm(scores.softmax(dim=-1), value)
        out = out.transpose(0, 1).reshape(tokens, *x.shape[1:])
        return attn.out_proj(out)

    def _shift(self, x: Tensor) -> Tensor:
        """Copy of keys or values `[N, B*T, C]` whose heads come from their frames."""
        config = self.model.config
        x = rearrange(x, "n (b t) c -> n b t c", t=config.num_frames)
        out = x.clone(memory_format=torch.contiguous_format)
        first = 0
        for offset, heads in groupby(config.head_offsets):
            last = first + len(list(heads)) * config.head_dim
            step = abs(offset)
            if 0 < step < config.num_frames:
                to, source = slice(None, -step), slice(step, None)
                if offset < 0:
                    to, source = source, to
                out[:, :, to, first:last] = x[:, :, source, first:last]
            first = last
        return out.flatten(1, 2)
