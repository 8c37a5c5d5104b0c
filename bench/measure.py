"""How time, memory and energy are measured, on a CPU or on a GPU.

Contestants take turns in rounds, so that a machine that slows down slows all of them; what counts
are ratios within a round. On a GPU a run is timed by CUDA events, after the L2 cache is flushed.
"""

from __future__ import annotations

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], Any]

ROUNDS = {"cpu": (3, 15), "cuda": (5, 100)}
"""The fewest and the most rounds, if none are asked for."""
SHORT, MANY = 1.0, 200
"""Short runs go on for so many seconds, and at most so many rounds."""
PATIENCE = {"cpu": math.inf, "cuda": 4.0}
"""Budgets after which even the fewest rounds are cut short; one is always run."""


def interleave(
    contestants: dict[str, Run],
    device: str,
    rounds: int | None = None,
    budget: float = 60.0,
    timer: Callable[[], float] = time.perf_counter,
    exact: bool = False,
) -> dict[str, list[float]]:
    """Seconds of each warmed-up contestant in each round; the first one rotates.

    Without `rounds`, as many as fit into `budget` seconds, within `ROUNDS`. More if they are short,
    and fewer if they are so long that `PATIENCE` ends, unless `rounds` is `exact`.
    """
    names = list(contestants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    least, most = (rounds, rounds) if rounds else ROUNDS[device]
    start, done, now = time.perf_counter(), 0, 0.0
    longest = math.inf if exact else PATIENCE[device] * budget
    while (
        (done < least and now <= longest)
        or (done < most and now * (done + 1) / done <= budget)
        or (not exact and done < MANY and now < min(SHORT, budget))
    ):
        shift = done % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(seconds_of(contestants[name], device, timer))
        done += 1
        now = time.perf_counter() - start
    return seconds


def seconds_of(run: Run, device: str, timer: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that one run takes."""
    if device == "cpu":
        start = timer()
        run()
        return timer() - start
    _cache_filler().zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def summary(times: list[float], baseline: list[float]) -> dict:
    """Median and quartiles of the seconds, and of the ratio to the baseline of the same round."""
    row = {}
    ratios = [a / b for a, b in zip(times, baseline, strict=True)]
    for name, values in (("seconds", times), ("ratio", ratios)):
        low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        low, high = max(low, min(values)), min(high, max(values))  # of two, else outside of both
        row |= {name: statistics.median(values), f"{name}_quartiles": [low, high]}
    return row


def run_counting_memory(run: Run, device: str) -> tuple[Any, int]:
    """The output of `run()`, and the most bytes it held at once of those that it allocated.

    On a CPU counted from the allocator's events, so it has no noise; NumPy's are not seen.
    """
    gc.collect()
    if device == "cuda":
        run()  # workspaces of libraries are made once, for all
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        output = run()
        torch.cuda.synchronize()
        return output, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        output = run()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return output, peak


def captured(run: Run, pool: tuple[int, int]) -> Run:
    """`run` captured in a CUDA graph that takes its memory from `pool`, as other graphs may.

    Its inputs and its output have fixed addresses; replays of other graphs write over the output.
    """
    side = _side_stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    gc.collect()  # what waits for it may call CUDA when it goes, which would end the capture
    torch.cuda.empty_cache()  # of what the runs before took, on either stream
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = run()

    def replay():
        graph.replay()
        return output

    return replay


def joules(run: Run, seconds: float = 1.0) -> float | None:
    """Energy of one run, the GPU's own count over `seconds` of runs; None if it keeps none."""
    before = _millijoules()
    if before is None:
        return None
    start, runs = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        run()
        torch.cuda.synchronize()
        runs += 1
    return (_millijoules() - before) / 1e3 / runs


@cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one: what is allocated on a stream is kept for that stream


@cache
def _cache_filler() -> torch.Tensor:
    return torch.empty(2**28, dtype=torch.int8, device="cuda")  # more than any L2 cache holds


@cache
def _nvml() -> tuple[ctypes.CDLL, ctypes.c_void_p] | None:
    """NVIDIA's management library, which comes with the driver, and its handle of our GPU."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode()
    except (OSError, AttributeError, RuntimeError, AssertionError):
        return None
    handle = ctypes.c_void_p()
    if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(handle)):
        return None
    return library, handle


def _millijoules() -> int | None:
    """What the GPU has used since its driver was loaded."""
    if _nvml() is None:
        return None
    library, handle = _nvml()
    count = ctypes.c_ulonglong()
    if library.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(count)):
        return None
    return count.value
