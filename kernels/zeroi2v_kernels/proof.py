"""Kernels prove themselves on the device they run on, before they are trusted.

A compiler can be wrong, on one architecture, for one shape. So a kernel's configuration (its
constants, launch, dtypes) is run on a small random input the first time it is wanted, twice, into
memory full of NaN. Every element must be within what rounding explains (`bounds.py`), and the two
runs must agree bit for bit. The verdict is kept in `$XDG_CACHE_HOME/zeroi2v/proofs` (`~/.cache`
without it), for these sources, this device and this compiler.

A configuration that fails is never used. If the user asked for it by name, that is an error;
otherwise PyTorch computes in its place, with one warning.

Triton's interpreter compiles nothing, so there nothing is proven, unless `INTERPRETED` is set.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from zeroi2v_kernels.bounds import Bounded

INTERPRETED = False
"""Whether kernels are proven in Triton's interpreter too."""

log = logging.getLogger(__name__)
_LOCK = threading.Lock()  # autograd runs backward in threads of its own


class Verdict(NamedTuple):
    """The result of proving one kernel configuration."""

    name: str
    """Kernel and configuration, such as "stdha backward_fused D=64 N=50 bf16"."""
    passed: bool
    message: str
    """What is wrong, with error and limit; empty if it passed."""
    cached: bool
    """Whether it was found in the user's cache."""


class Trial(NamedTuple):
    """A configuration on a small random input."""

    outputs: list[Tensor]
    """Of the shapes and dtypes that `run` writes; their values do not matter."""
    run: Callable[..., None]
    """Runs the kernels, which write all of the outputs, its arguments."""
    truths: list[Bounded]
    """What each output should be, and the error allowed."""


class Configuration(NamedTuple):
    """All that determines a compiled kernel, apart from sources, compiler and device."""

    name: str
    settings: tuple[Hashable, ...]
    trial: Callable[[torch.Generator], Trial]
    """Draws the input from a generator, on its device."""


_VERDICTS: dict[Hashable, Verdict] = {}


def trusted(
    key: Hashable,
    device: torch.device,
    configure: Callable[[], Configuration],
    named: bool = False,
) -> bool:
    """Whether a kernel may be used; it is proven when its key is first seen.

    Args:
        key: names the configuration in this process, device included.
        device: that of the tensors.
        configure: describes the configuration; called once a key.
        named: whether the user asked for this kernel.

    Raises:
        RuntimeError: a kernel asked for by name is wrong; or one that has never been proven is
            wanted while a CUDA graph is captured, when nothing else can be run.
    """
    verdict = _VERDICTS.get(key)
    if verdict is None:
        if device.type != "cuda" and not INTERPRETED:
            return True
        with _LOCK:
            if key not in _VERDICTS:
                verdict = prove(configure(), device)
                _VERDICTS[key] = verdict
                if not verdict.passed and not named:
                    log.warning(
                        "a kernel is wrong on this device, PyTorch computes in its place: %s: %s",
                        verdict.name,
                        verdict.message,
                    )
        verdict = _VERDICTS[key]
    if named and not verdict.passed:
        raise RuntimeError(
            "backend 'triton' was asked for, but its kernel is wrong on this device: "
            f"{verdict.name}: {verdict.message}"
        )
    return verdict.passed


def prove(configuration: Configuration, device: torch.device, fresh: bool = False) -> Verdict:
    """The verdict on a configuration, from the cache or by running it.

    A kernel that breaks the device (an illegal address) raises RuntimeError, as everything after it
    would; the verdict is kept, so that the next process does not try it.
    """
    path = _path(configuration, device)
    kept = None if fresh else _read(path)
    if kept is not None:
        return Verdict(configuration.name, not kept, kept, True)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{configuration.name}: a kernel is proven when it is first used, which cannot be "
            "while a CUDA graph is captured: run the same once before the capture"
        )
    try:
        message = _try(configuration, device)
    except torch.OutOfMemoryError:
        raise
    except torch.AcceleratorError as error:
        _write(path, f"breaks the device: {str(error).splitlines()[0]}")
        raise
    except (triton.TritonError, RuntimeError) as error:
        # it may run another time: a compiler may be missing, or memory of the chip taken
        message = f"cannot be run: {str(error).splitlines()[0] if str(error) else error!r}"
        return Verdict(configuration.name, False, message, False)
    _write(path, message)
    return Verdict(configuration.name, not message, message, False)


def _try(configuration: Configuration, device: torch.device) -> str:
    """What is wrong with a configuration, or nothing."""
    generator = torch.Generator(device).manual_seed(0)  # the user's is left alone
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        trial = configuration.trial(generator)
        runs = []
        for _ in range(2):
            outputs = [torch.full_like(x, float("nan")) for x in trial.outputs]
            trial.run(*outputs)
            runs.append(outputs)
        for number, (first, second, (truth, limit)) in enumerate(
            zip(*runs, trial.truths, strict=True)
        ):
            error = (first.double() - truth).abs()
            if not bool((error <= limit).all()):  # NaN is not
                worst = (error / limit).nan_to_num(float("inf")).argmax()
                error, limit = error.flatten()[worst].item(), limit.flatten()[worst].item()
                return f"output {number}: error {error:.2g}, limit {limit:.2g}"
            if not torch.equal(first, second):
                return f"output {number}: two runs differ"
    return ""


def draw(generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def _path(configuration: Configuration, device: torch.device) -> Path:
    """Where the verdict is kept: a name for all that it depends on."""
    what = (_sources(), _platform(device), configuration.name, configuration.settings)
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = hashlib.sha256(repr(what).encode()).hexdigest()[:40]
    return Path(home) / "zeroi2v" / "proofs" / f"{name}.json"


@functools.cache
def _sources() -> str:
    """A digest of all sources of this package: of the kernels and whatever they call."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


@functools.cache
def _platform(device: torch.device) -> tuple[Hashable, ...]:
    """Triton, the device, the compiler behind Triton."""
    if device.type != "cuda":
        return (triton.__version__, "interpreter")
    nvidia = triton.knobs.nvidia
    tools = [(tool.path, tool.version) for tool in (nvidia.ptxas, nvidia.ptxas_blackwell)]
    properties = torch.cuda.get_device_properties(device)
    return (
        triton.__version__,
        torch.version.cuda,
        properties.name,
        (properties.major, properties.minor),
        *tools,
    )


def _read(path: Path) -> str | None:
    """The message of a verdict that is kept; None if there is none that can be read."""
    try:
        kept = json.loads(path.read_text())
        message = kept["message"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return message if isinstance(message, str) else None


def _write(path: Path, message: str) -> None:
    """Keeps a verdict, at once or not at all; without a cache it is proven again next time."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            temporary = Path(file.name)
            json.dump(dict(message=message), file)
        temporary.replace(path)
    except OSError as error:
        log.debug("the verdict is not kept: %s", error)
        if temporary is not None:
            temporary.unlink(missing_ok=True)
