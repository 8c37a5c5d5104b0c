"""Every kernel of the package, for the shapes and dtypes that models have."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import torch

from zeroi2v_kernels import (
    activation,
    adapter_linear_triton,
    norm,
    proof,
    quantize_triton,
    rotary_triton,
    stdha_launch,
)

MODULES = (stdha_launch, adapter_linear_triton, activation, norm, rotary_triton, quantize_triton)


def prove_shipped(
    device: torch.device, fresh: bool = False, processes: int = 1
) -> Iterator[proof.Verdict]:
    """Proves every kernel on `device`, for the usual shapes and dtypes, one verdict at a time.

    Args:
        device: a CUDA device, or the CPU in Triton's interpreter.
        fresh: prove again what the cache knows.
        processes: that share the work, since compiling is most of it.
    """
    prove = functools.partial(_prove, device, fresh)
    numbers = range(len(configurations(device)))
    if processes == 1:
        yield from map(prove, numbers)
        return
    pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))  # for CUDA's sake
    try:
        yield from pool.map(prove, numbers)
    finally:
        pool.shutdown(cancel_futures=True)


@functools.cache
def configurations(device: torch.device) -> list[proof.Configuration]:
    """What `prove_shipped` proves, in its order."""
    return [configuration for module in MODULES for configuration in module.shipped(device)]


def _prove(device: torch.device, fresh: bool, number: int) -> proof.Verdict:
    return proof.prove(configurations(device)[number], device, fresh)
