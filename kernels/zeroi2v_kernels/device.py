"""What the operators need to know of a device, its tensors and its autocast."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
TRITON_DTYPES = (*HALF, torch.float32)
TRITON_WIDTHS = (16, 32, 64, 128)
"""Widths of a head that the attention kernels take."""


def arch(device: torch.device) -> int:
    """The entry of the launch tables for `device`; the interpreter takes that of Hopper."""
    if device.type != "cuda":
        return 90
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


def on_device(x: Tensor) -> AbstractContextManager:
    """Makes the device of `x` the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def packed(x: Tensor | None) -> Tensor | None:
    """`x` itself if its elements lie one after another from a multiple of 16 bytes on, else a copy.

    So a kernel may count its elements, and is compiled for one alignment only.
    """
    if x is None or (x.is_contiguous() and x.data_ptr() % 16 == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def without_autocast(operator: Callable) -> Callable:
    """`operator` as it computes without autocast, which would narrow float32 and widen softmax."""

    @functools.wraps(operator)
    def wide(x: Tensor, *args, **kwargs):
        with torch.autocast(x.device.type, enabled=False):
            return operator(x, *args, **kwargs)

    # as types, for whoever registers it: their names are not known in this module
    wide.__signature__ = inspect.signature(operator, eval_str=True)
    return wide
