"""How the Triton kernels are judged, in the interpreter or on CUDA."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@contextmanager
def poisoned():
    """Fresh memory holds NaN, so that an element that a kernel leaves out cannot pass."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


def assert_within_budget(
    op: Callable, reference: Callable, tensors: Sequence[Tensor | None]
) -> None:
    """Outputs and every gradient of `op`: error <= 2 (error of `reference` + eps max|truth|).

    Errors are against `reference` in float64 of the same (rounded) inputs.
    """
    wide = [t if t is None else t.detach().double().requires_grad_() for t in tensors]
    truths = _values(reference, wide)
    dtype = next(t.dtype for t in tensors if t is not None)
    eps = torch.finfo(dtype).eps
    results = zip(_values(op, tensors), _values(reference, tensors), truths, strict=True)
    for number, (actual, expected, truth) in enumerate(results):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype), number
        errors = [(t.double() - truth).abs().max().item() for t in (actual, expected)]
        budget = 2 * (errors[1] + eps * truth.abs().max().item())
        assert errors[0] <= budget, f"{number}: {errors[0]:.3g} > {budget:.3g}"


def _values(function: Callable, tensors: Sequence[Tensor | None]) -> list[Tensor]:
    """Outputs, then gradients, for the same random weights of the outputs in any dtype."""
    outs = function(*tensors)
    outs = [outs] if isinstance(outs, Tensor) else list(outs)
    generator = torch.Generator().manual_seed(1)
    weights = [
        torch.randn(out.shape, generator=generator, dtype=torch.bfloat16).to(out) for out in outs
    ]
    inputs = [t for t in tensors if t is not None]
    return [*(out.detach() for out in outs), *torch.autograd.grad(outs, inputs, weights)]
