"""Rows as float8 (e4m3) numbers, by Triton's kernel where it runs; see `quantize_reference.py`."""

from __future__ import annotations

from torch import Tensor

from zeroi2v_kernels import choice
from zeroi2v_kernels.quantize_reference import quantize_rows_reference


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x [..., C]`, floating point, as e4m3 values `[..., C]` and float32 scales `[..., 1]`.

    Value times scale is `x` to a relative error of 2^-4, or, for numbers below 2^-6 of the scale,
    to 2^-10 of it. A row of zeros stays one; inf or nan leave a nan in their row's values.
    """
    if choice.uses_kernels(x) and choice.on_fp8_units(x):
        from zeroi2v_kernels.quantize_triton import quantize_forward

        return quantize_forward(x)
    return quantize_rows_reference(x)
