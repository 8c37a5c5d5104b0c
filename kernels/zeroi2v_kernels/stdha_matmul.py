"""Head-shifted attention by matrix products, one frame at a time: backend `matmul`.

Keys and values are gathered from the frame that each head reads, and gradients are added there; a
shift costs no more. In between are batched matrix products with a softmax, whose scores of one
frame stay in the processor's cache. Sums are of float32; scores have the dtype of the input.

In half precision a rounded score of 20 is off by up to 1/16, and so is the weight that follows. So
the product is taken once more, minus the rounded scores; this rounding error times the softmax's
derivative corrects the weights to first order. Outputs are then as exact as those of attention that
keeps its scores in float32. Backward computes the weights again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from zeroi2v_kernels.device import unwatched


@unwatched
def forward(query: Tensor, key_value: Tensor, head_offsets: Sequence[int], scale: float) -> Tensor:
    """Attention's output `[B, T, M, H, D]`; arguments as in `zeroi2v_kernels.stdha.stdha_split`."""
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    for clip, frame, asking, key, value, _ in _frames(query, key_value, head_offsets):
        weights = _weights(asking, key, scale)
        out[clip, frame] = torch.bmm(weights, value).transpose(0, 1)
    return out


@unwatched
def backward(
    grad: Tensor,
    query: Tensor,
    key_value: Tensor,
    dquery: Tensor,
    dkey_value: Tensor,
    head_offsets: Sequence[int],
    scale: float,
) -> None:
    """Writes the gradients of `query` and `key_value` for that of the output."""
    dkey_value.zero_()
    given = grad.new_empty(2, query.shape[3], key_value.shape[2], query.shape[4])
    for clip, frame, asking, key, value, sources in _frames(query, key_value, head_offsets):
        weights = _weights(asking, key, scale)
        dout = grad[clip, frame].transpose(0, 1).contiguous()
        torch.bmm(weights.mT, dout, out=given[1])
        dweights = torch.bmm(dout, value.mT)
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
        dquery[clip, frame] = _product(dscores, key, scale).transpose(0, 1)
        given[0] = _product(dscores.mT, asking, scale)
        for source, heads in sources:
            dkey_value[clip, source, :, :, heads] += given[:, heads].permute(2, 0, 1, 3)


def _frames(query: Tensor, key_value: Tensor, head_offsets: Sequence[int]) -> Iterator[tuple]:
    """Clip, frame, its queries, keys and values `[H, M or N, D]`, and where its heads read them.

    Keys and values are written over by the next frame's.
    """
    clips, num_frames, _, num_heads, width = query.shape
    groups, first = [], 0
    for offset, group in groupby(head_offsets):
        groups.append((offset, slice(first, first := first + len(list(group)))))
    gathered = key_value.new_empty(2, num_heads, key_value.shape[2], width)
    for clip in range(clips):
        for frame in range(num_frames):
            sources = [
                (frame + offset if 0 <= frame + offset < num_frames else frame, heads)
                for offset, heads in groups
            ]
            for source, heads in sources:
                gathered[:, heads] = key_value[clip, source, :, :, heads].permute(1, 2, 0, 3)
            yield clip, frame, query[clip, frame].transpose(0, 1), *gathered, sources


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """The softmax of the scores, `[H, M, N]`."""
    scores = _product(query, key.mT, scale)
    weights = torch.softmax(scores, -1)
    if scores.dtype not in (torch.bfloat16, torch.float16):
        return weights
    lost = torch.baddbmm(scores, query, key.mT, beta=-1, alpha=scale, out=scores)
    return weights.add_(torch._softmax_backward_data(lost, weights, -1, weights.dtype))


def _product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale * a b`."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)
