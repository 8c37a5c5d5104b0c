"""What the operators need to know of a device, its tensors and its autocast."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

HALF = (torch.bfloat16, torch.float16)
TRITON_DTYPES = (*HALF, torch.float32)
TRITON_WIDTHS = (16, 32, 64, 128)
"""Widths of a head that the attention kernels take."""
_HERE = nullcontext()


@functools.cache
def arch(device: torch.device) -> int:
    """The entry of the launch tables for `device`; the interpreter takes that of Hopper."""
    if device.type != "cuda":
        return 90
    return {9: 90, 10: 100}.get(torch.cuda.get_device_capability(device)[0], 80)


def exporting() -> bool:
    """True while `torch.export` traces, and not while `torch.compile` does.

    In PyTorch 2.11 `torch.compiler.is_exporting()` is true for both.
    """
    return torch.compiler._is_exporting_flag


def on_device(x: Tensor) -> AbstractContextManager:
    """Makes the device of `x` the current one, on which Triton launches."""
    if not x.is_cuda or x.device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(x.device)


def operator(name: str) -> Callable[[Callable], Callable]:
    """`torch.library.custom_op`, bypassed for calls that nothing observes (`_is_watched`). Its
    layers in Python cost the host several times as much as launching a kernel. The operator itself
    is attribute `op` of the decorated function.
    """

    def decorate(function: Callable) -> Callable:
        op = torch.library.custom_op(name, function, mutates_args=())

        @functools.wraps(function)
        def call(x: Tensor, *args):
            return op(x, *args) if _is_watched(x) else function(x, *args)

        call.op = op
        return call

    return decorate


def _is_watched(x: Tensor) -> bool:
    """False if only the result matters: no gradient is wanted and nothing observes the call."""
    return torch.is_grad_enabled() or is_followed(x)


def is_followed(x: Tensor) -> bool:
    """True if a compiler, tensor subclass, mode or transform must see the operators by name."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or is_in_torch_dispatch_mode()
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def ceil_div(number: int, by: int) -> int:
    """`number / by`, rounded up; Triton's own is made for kernels, and slow on the host."""
    return -(-number // by)


def packed(x: Tensor | None) -> Tensor | None:
    """`x` itself if its elements lie one after another from a multiple of 16 bytes on, else a copy.

    So a kernel may count its elements, and is compiled for one alignment only.
    """
    if x is None or (x.is_contiguous() and x.data_ptr() % 16 == 0):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def unwatched(operator: Callable) -> Callable:
    """`operator` as it computes within a PyTorch operator: without autocast, which would narrow
    float32 and widen softmax, and without autograd, so that the operators it calls are bypassed.
    """

    @functools.wraps(operator)
    def wide(x: Tensor, *args, **kwargs):
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            return operator(x, *args, **kwargs)

    # as types, for the registration: their names are not known in this module
    wide.__signature__ = inspect.signature(operator, eval_str=True)
    return wide
