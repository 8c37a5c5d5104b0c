"""Every kernel of the package, for the shapes and dtypes that models have."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from zeroi2v_kernels import activation, adapter_linear_triton, norm, proof, stdha_launch


def prove_shipped(device: torch.device, fresh: bool = False) -> Iterator[proof.Verdict]:
    """Proves every kernel on `device`, for the usual shapes and dtypes, one verdict at a time.

    Args:
        device: a CUDA device, or the CPU in Triton's interpreter.
        fresh: prove again what the cache knows.
    """
    for module in (stdha_launch, adapter_linear_triton, activation, norm):
        for configuration in module.shipped(device):
            yield proof.prove(configuration, device, fresh)
