"""Repeated launches of a kernel cost the host little: the compiled kernel is remembered."""

from __future__ import annotations

from typing import Any

import triton


class Launcher:
    """A Triton kernel with its constants, for tensors of one kind on one device.

    Triton's own launch inspects every argument each time, to find what to compile. Here the caller
    must keep those properties constant: device, dtypes, which tensors are None, starts at multiples
    of 16 bytes (`device.packed`), and integers, except those that the kernel does not specialise
    on. Constants come last in the kernel's signature.
    """

    def __init__(self, kernel: triton.JITFunction, constants: dict[str, Any], **options: int):
        self.kernel, self.constants, self.options = kernel, constants, options
        names = kernel.arg_names
        self._names = names[: len(names) - len(constants)]
        self._values = [constants[name] for name in names[len(self._names) :]]
        self._compiled = None

    def __call__(self, grid: tuple[int, ...], **arguments: Any) -> None:
        """Runs `grid` programs of the kernel on the current device and stream."""
        if self._compiled is None:  # as it remains in Triton's interpreter
            self._compiled = self.kernel[grid](**arguments, **self.constants, **self.options)
        else:
            values = [arguments[name] for name in self._names]
            self._compiled[(*grid, 1, 1)](*values, *self._values)
