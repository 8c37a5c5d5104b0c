"""Head-shifted attention by definition, for budgets of rounding; its backward is the kernels'."""

import torch
from torch import Tensor
from zeroi2v_kernels.stdha import source_frames


class _Attention(torch.autograd.Function):
    """Softmax attention of `[..., M, D]` on `[..., N, D]`.

    The backward takes the sum over keys of p dp from the output, which is stored rounded, as every
    attention does that keeps no weights.
    """

    @staticmethod
    def forward(ctx, query, key, value, scale):
        weights = (query @ key.mT * scale).softmax(-1)
        out = weights @ value
        ctx.save_for_backward(query, key, value, weights, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad):
        query, key, value, weights, out = ctx.saved_tensors
        dweights = grad @ value.mT - (grad * out).sum(-1, keepdim=True)
        dscores = weights * dweights
        dquery, dkey = dscores @ key * ctx.scale, dscores.mT @ query * ctx.scale
        return dquery, dkey, weights.mT @ grad, None


def attention(query: Tensor, key_value: Tensor, head_offsets, scale=None) -> Tensor:
    """Arguments and result as in `stdha_split`."""
    frames, width = query.shape[1], query.shape[-1]
    sources = [source_frames(frames, offset) for offset in head_offsets]
    key_value = torch.stack([key_value[:, s, :, :, h] for h, s in enumerate(sources)], dim=2)
    key, value = key_value.unbind(4)  # [B, T, H, N, D]
    scale = width**-0.5 if scale is None else scale
    return _Attention.apply(query.transpose(2, 3), key, value, scale).transpose(2, 3)


def packed_attention(qkv: Tensor, head_offsets, scale=None) -> Tensor:
    """Arguments and result as in `stdha`."""
    return attention(qkv[:, :, :, 0], qkv[:, :, :, 1:], head_offsets, scale)
