"""Head-shifted attention by calls of plain attention, such as flash-attn's.

Neighbouring heads of one offset form a group; a group is one call, on views alone. Frames of all
clips lie one after another, so keys `offset` frames on are a slice of them: query frames
`[0, B*T - offset)` go with key frames `[offset, B*T)`. At the edges of clips that slice reads the
next clip's frames; those results are replaced by further calls, one for each frame at the edge.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from itertools import groupby

import torch
from torch import Tensor


def attend_grouped(
    query: Tensor, key_value: Tensor, head_offsets: Sequence[int], attend: Callable
) -> Tensor:
    """`stdha_split` by calls of `attend`.

    Args:
        query: `[B, T, M, H, D]`.
        key_value: `[B, T, N, 2, H, D]`.
        head_offsets: H ints, in frames.
        attend: plain attention, `(query [X, M, h, D], key, value [X, N, h, D]) -> [X, M, h, D]`.

    Returns:
        `[B, T, M, H, D]`.
    """
    num_frames = query.shape[1]
    key, value = key_value.unbind(3)
    offsets = [offset if abs(offset) < num_frames else 0 for offset in head_offsets]
    outs, first = [], 0
    for offset, group in groupby(offsets):
        heads = slice(first, first + len(list(group)))
        outs.append(
            _attend_group(*(x[:, :, :, heads] for x in (query, key, value)), offset, attend)
        )
        first = heads.stop
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=3)


def _attend_group(
    query: Tensor, key: Tensor, value: Tensor, offset: int, attend: Callable
) -> Tensor:
    """Heads that share `offset`, smaller than the number of frames."""
    clips, num_frames = query.shape[:2]
    step = abs(offset)
    flat = [x.flatten(0, 1) for x in (query, key, value)]
    if step == 0:
        return attend(*flat).unflatten(0, (clips, num_frames))
    early, late = slice(None, -step), slice(step, None)
    asking, read = (early, late) if offset > 0 else (late, early)
    inner = attend(flat[0][asking], flat[1][read], flat[2][read])
    missing = inner.new_zeros(step, *inner.shape[1:])
    out = torch.cat([inner, missing] if offset > 0 else [missing, inner])
    out = out.unflatten(0, (clips, num_frames))
    edge = range(num_frames - step, num_frames) if offset > 0 else range(step)
    edges = torch.stack([attend(query[:, t], key[:, t], value[:, t]) for t in edge], dim=1)
    kept = out[:, :-step] if offset > 0 else out[:, step:]
    return torch.cat([kept, edges] if offset > 0 else [edges, kept], dim=1)


def flash_attention(device: torch.device) -> Callable:
    """flash-attn's function, the newest installed that `device` runs, returning the output alone.

    Raises ValueError, saying what to install, if there is none.
    """
    major = torch.cuda.get_device_capability(device)[0]
    homes = ["flash_attn"]  # 2
    if major == 9:
        homes.insert(0, "flash_attn_interface")  # 3
    if major >= 9:
        homes.insert(len(homes) - 1, "flash_attn.cute")  # 4
    for home in homes:
        try:
            function = import_module(home).flash_attn_func
        except (ImportError, AttributeError):
            continue
        return lambda *args, **kwargs: _first(function(*args, **kwargs))
    package = "flash-attn-4" if major >= 9 else "flash-attn"
    raise ValueError(f"backend 'flash' needs the package {package}: pip install {package}")


def _first(result: Tensor | tuple) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
