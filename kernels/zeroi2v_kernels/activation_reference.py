"""The definition of the MLP's activations, in plain PyTorch, and of their gradients.

`activation.py` has their formulas, and the kernels that compute them on CUDA.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def activate(x: Tensor, kind: str) -> Tensor:
    """Activation `kind` of `x [..., C]`; `swiglu` takes gate and value, `[..., 2 C]`."""
    if kind == "swiglu":
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value
    if kind == "quick_gelu":
        return x * torch.sigmoid(1.702 * x)
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def activate_grad(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    """Gradient of the activation's input `x` for that of its output, which may be lost."""
    aten = torch.ops.aten
    if kind == "swiglu":
        gate, value = x.chunk(2, dim=-1)
        of_value = grad * F.silu(gate)
        of_gate = aten.silu_backward.grad_input(grad.mul_(value), gate, grad_input=grad)
        return torch.cat([of_gate, of_value], dim=-1)
    if kind == "quick_gelu":
        return aten.silu_backward(grad, 1.702 * x)
    approximate = "tanh" if kind == "gelu_tanh" else "none"
    return aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=grad)
