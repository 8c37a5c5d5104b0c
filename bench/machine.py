"""The machine that figures were measured on: its card, and the ceilings that it really reaches.

`python -m bench.machine` prints both.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from functools import partial
from importlib import metadata
from pathlib import Path

import torch

from bench.measure import interleave
from zeroi2v.model.linear import linear

PACKAGES = (
    "torch triton flash-attn deepspeed av transformers timm open_clip_torch torchcodec decord"
).split()
MATRIX = {"cpu": 2048, "cuda": 8192}
"""Rows and columns of the large matmul, if it fits into the time."""
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float32", "bfloat16", "float16")}
COPY_BYTES = 2**29
"""Size of the large copy, beyond every cache."""


def device() -> str:
    """Where benches run: `cuda` if there is a GPU, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine_card() -> dict:
    """Facts about the machine; an entry that can't be found is left out."""
    card = _gpu() if device() == "cuda" else _cpu()
    name = card["name"]
    if device() != "cuda":
        name += f" {card['cores']} cores {card['isa']}"
    card["slug"] = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    card["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    card["python"] = platform.python_version()
    card["packages"] = {name: version for name in PACKAGES if (version := _version(name))}
    for found in metadata.distributions():
        if (found.name or "").startswith("nvidia-dali"):
            card["packages"][found.name] = found.version
    return card


@torch.no_grad()
def ceilings(seconds: float = 2.0) -> dict[str, float]:
    """What this machine reaches: FLOP/s of a large matmul by dtype, and bytes/s of a large copy.

    Each is the best of the runs that fit into `seconds`, on a CPU by either of the libraries that
    PyTorch carries (see `zeroi2v.model.linear`). A copy counts what it reads and what it writes.
    float32 is as PyTorch computes it unasked, without TF32.
    """
    where, found = device(), {}
    for dtype in DTYPES[where]:
        size, best = 256, 0.0
        while True:  # some CPUs multiply bfloat16 a thousand times as slowly as others
            a, b = (
                torch.randn(size, size, device=where).to(getattr(torch, dtype)) for _ in range(2)
            )
            products = (partial(torch.mm, a, b), partial(linear, a, b, a.new_zeros(size)))
            best = min(_best(product, where, seconds) for product in products)
            if size >= MATRIX[where] or 8 * best > seconds:
                break
            size *= 2
        found[dtype] = 2 * size**3 / best
    source = torch.ones(COPY_BYTES, dtype=torch.int8, device=where)
    target = torch.empty_like(source)
    found["copy"] = 2 * COPY_BYTES / _best(lambda: target.copy_(source), where, seconds)
    return found


def commit() -> str:
    """The checked-out commit, `+` if tracked files but results differ; empty outside a checkout."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!docs")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except OSError:  # no git here
        return ""


def _best(run, where: str, seconds: float) -> float:
    run()
    return min(interleave({"": run}, where, budget=seconds)[""])


def _cpu() -> dict:
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    name = re.search(r"model name\s*: (.*)", text)
    clocks = [float(value) for value in re.findall(r"cpu MHz\s*: (.*)", text)]
    card = dict(
        kind="CPU",
        name=name[1] if name else platform.processor() or platform.machine(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        isa=torch.backends.cpu.get_cpu_capability(),
    )
    return card | ({"clock_mhz": round(max(clocks))} if clocks else {})


def _gpu() -> dict:
    properties = torch.cuda.get_device_properties(0)
    card = dict(
        kind="GPU",
        name=properties.name,
        processors=properties.multi_processor_count,
        capability=f"{properties.major}.{properties.minor}",
        gpu_memory_gib=round(properties.total_memory / 2**30),
        cuda=torch.version.cuda,
        host=_cpu()["name"],
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
    )
    asked = dict(driver="driver_version", clock_mhz="clocks.max.sm", power_watt="power.limit")
    command = [
        "nvidia-smi",
        f"--query-gpu={','.join(asked.values())}",
        "--format=csv,noheader,nounits",
    ]
    command += [f"--id=GPU-{properties.uuid}"] if hasattr(properties, "uuid") else []
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return card
    return card | dict(zip(asked, told.splitlines()[0].split(", "), strict=True))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(machine_card() | {"ceilings": ceilings()}, indent=2))
