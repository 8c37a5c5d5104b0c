"""Triton's interpreter in half of its time, with the same results.

It looks through its language for what to replace at each call of a device function, though the
kernel that calls has found it replaced. It computes whether sums of integers overflow, for an
assertion that it leaves out unless it debugs. And it makes its table of NumPy's dtypes anew to look
one up.
"""

from functools import cache
from importlib.util import find_spec
from types import SimpleNamespace

import numpy


@cache
def make_quick() -> None:
    """Leaves out all that, for good; does nothing where Triton is not installed."""
    if find_spec("triton") is None:
        return
    from triton import language
    from triton.runtime import interpreter

    interpreter.interpreter_builder.options = interpreter.InterpreterOptions(
        sanitize_overflow=False
    )
    replace = interpreter._patch_lang

    def replace_once(function):
        places = [x for x in function.__globals__.values() if x is language or x is language.core]
        if places and all(place.static_print is print for place in places):
            return SimpleNamespace(restore=lambda: None)
        return replace(function)

    interpreter._patch_lang = replace_once
    of_scalar = cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: (
        numpy.dtype(numpy.uint64) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)
    )
