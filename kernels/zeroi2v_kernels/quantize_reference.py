"""Rows as float8 (e4m3) numbers with a scale each, for products on float8 units.

    scale = max |x| / 448,   value = x * (1 / scale), rounded to e4m3, the nearest or even

over the last axis of `x [..., C]`; 448 is the largest e4m3 number. All else is in float32, so that
every implementation gives the same bits.

It is a pass of its own over what is multiplied. A norm or an activation could write the same, but
not attention, whose programs see one head of a token each.

Source: FP8 formats for deep learning (arXiv 2209.05433).
"""

from __future__ import annotations

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest e4m3 number."""
UNIT = 2.0**-4
"""Largest relative error of rounding a normal number to e4m3."""
SMALLEST = 2.0**-126
"""Of the scales, so that a row of zeros has one; the smallest normal number of float32."""


def quantize_rows_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `quantize_rows`, in plain PyTorch; argument and result are its own."""
    x = x.float()
    scale = (x.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(SMALLEST)
    return (x * scale.reciprocal()).to(E4M3), scale
