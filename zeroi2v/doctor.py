"""`python -m zeroi2v.doctor [--json]`: what this machine can do and what it lacks, in one screen.

Each check runs in a process of its own with a time limit (`probes.py`), so that one that crashes or
hangs is a line of the report and not its end. Needs nothing but Python. Exit status 1 if something
that is installed does not work, or something that everything needs is not installed.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import platform
import signal
import sys
import tempfile
import textwrap

from zeroi2v import __version__
from zeroi2v.cli import run
from zeroi2v.probes import FRAMES, Check, shared_memory

SECONDS = 60
"""Time limit of a check; the kernels' proofs, which compile, have ten times as much."""
PACKAGES = {  # module: (requirement, what needs it; empty: everything)
    "torch": ("torch>=2.11", ""),
    "numpy": ("numpy>=1.26", ""),
    "einops": ("einops>=0.8", ""),
    "safetensors": ("safetensors>=0.5", ""),
    "huggingface_hub": ("huggingface_hub>=0.30", ""),
    "yaml": ("pyyaml>=6", ""),
    "tqdm": ("tqdm>=4.66", ""),
    "av": ("av>=15", ""),
    "matplotlib": ("matplotlib>=3.8", ""),
    "PIL": ("pillow", ""),
    "nvidia.dali": ("nvidia-dali-cuda130>=2.4", "training"),
    "deepspeed": ("deepspeed>=0.19", "training"),
    "tensorboard": ("tensorboard>=2.16", "training"),
    "jinja2": ("jinja2>=3", "training"),
    "psutil": ("psutil", "training"),
    "onnx": ("onnx>=1.18", "export to ONNX"),
    "onnxscript": ("onnxscript>=0.5", "export to ONNX"),
    "onnxruntime": ("onnxruntime>=1.20", "running ONNX files"),
    "triton": ("triton>=3.6", "the GPU kernels"),
    "gradio": ("gradio>=6", "the web page"),
    "transformers": ("transformers>=4.50", "tests and benches"),
}
PROBES = {  # probe: (group, the modules it can't run without)
    "cpu": ("CPU", ["torch"]),
    "gpu": ("GPU", ["torch"]),
    "kernels": ("GPU", ["torch", "numpy"]),
    "nvdec": ("GPU", ["torch", "numpy", "nvidia.dali"]),
    **{f"codec:{name}": ("decoders", ["av", "numpy"]) for name in FRAMES},
    "dali": ("data", ["nvidia.dali", "numpy"]),
    "deepspeed": ("training", ["torch", "deepspeed"]),
    "torch_export": ("export", ["torch"]),
    "onnx": ("export", ["torch", "onnx", "onnxscript", "onnxruntime"]),
}
JOINED = ("packages", "decoders")
"""Groups whose working members share a line."""


def examine() -> list[Check]:
    """Runs every check; a few at a time."""
    return asyncio.run(_examine())


async def _examine() -> list[Check]:
    room = asyncio.Semaphore(min(8, len(os.sched_getaffinity(0))))
    done = 0

    async def probe(name: str, group: str) -> list[Check]:
        nonlocal done
        async with room:
            if sys.stderr.isatty():
                print(f"\r\033[Kchecking {name} ({done} done)", end="", file=sys.stderr)
            checks = await run_probe(name, group, SECONDS * (10 if name == "kernels" else 1))
            done += 1
            return checks

    found = {module: is_installed(module) for module in PACKAGES}
    imports = await asyncio.gather(
        *(probe(f"import:{module}", "packages") for module in found if found[module])
    )
    packages = {check.name: check for checks in imports for check in checks}
    for module in found:
        packages.setdefault(module, _not_installed(module))
    unusable = {name for name, check in packages.items() if check.status != "ok"}
    todo = {name: row for name, row in PROBES.items() if not unusable.intersection(row[1])}
    results = await asyncio.gather(*(probe(name, row[0]) for name, row in todo.items()))
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    checks = [*packages.values(), *shared_memory(), *(c for result in results for c in result)]
    for name, (group, modules) in PROBES.items():
        if lacking := unusable.intersection(modules):
            detail = f"not tried without {', '.join(sorted(lacking))}"
            checks.append(Check(group, name.removeprefix("codec:"), "missing", detail))
    return checks


async def run_probe(name: str, group: str, seconds: float) -> list[Check]:
    """What the probe reports from its own process, and how that ended if it ended badly."""
    # Modules come from where ours do, and not from the current folder.
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1"}
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "zeroi2v.probes", name, str(out.fileno())),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
            pass_fds=[out.fileno()],
            env=environment,
            start_new_session=True,
        )
        failure = ""
        try:
            status = await asyncio.wait_for(child.wait(), seconds)
            if status < 0:
                failure = f"died by signal {-status} ({signal.Signals(-status).name})"
            elif status:
                errors.seek(0)
                lines = errors.read().decode(errors="replace").strip().splitlines()
                failure = lines[-1][:200] if lines else f"exit status {status}"
        except asyncio.TimeoutError:
            failure = f"did not end within {seconds:g} s"
        finally:
            if child.returncode is None:
                os.killpg(child.pid, signal.SIGKILL)
                await child.wait()
        out.seek(0)
        checks = [Check(**json.loads(line)) for line in out.read().splitlines()]
    if failure:
        kind, _, what = name.partition(":")
        fix = ""
        if kind == "import":
            failure, fix = f"import: {failure}", _install(what, "--force-reinstall ")
        checks.append(Check(group, what or kind, "broken", failure, fix))
    return checks


def is_installed(module: str) -> bool:
    """Whether `module` is there to be imported; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # no parent package; blocked
        return False


def _not_installed(module: str) -> Check:
    needed_for = PACKAGES[module][1]
    if module == "triton" and not os.path.exists("/proc/driver/nvidia/version"):
        return Check("packages", module, "absent", "only for a CUDA GPU")
    if not needed_for:
        detail = "not installed, and everything needs it"
        return Check("packages", module, "broken", detail, _install(module))
    return Check("packages", module, "missing", f"only for {needed_for}", _install(module))


def _install(module: str, options: str = "") -> str:
    return f"pip install {options}'{PACKAGES[module][0]}'"


def render(checks: list[Check]) -> str:
    """The report, 80 columns wide."""
    lines = [f"zeroi2v {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for group in dict.fromkeys(check.group for check in checks):
        label, members = group, [check for check in checks if check.group == group]
        fine = [check for check in members if check.status == "ok" and group in JOINED]
        rows = [("ok", ", ".join(f"{c.name} {c.detail}".strip() for c in fine))] if fine else []
        for check in members:
            if check not in fine:
                fix = f": {check.fix}" if check.fix else ""
                rows.append((check.status, f"{check.name}: {check.detail}{fix}"))
        for status, text in rows:
            for line in textwrap.wrap(text, 61, break_on_hyphens=False):
                lines.append(f"{label:<10}{status:<9}{line}")
                label = status = ""
    broken = [check.name for check in checks if check.status == "broken"]
    lines.append(f"broken: {', '.join(broken)}" if broken else "what is installed works")
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    """Examines the machine and prints the report. Raises SystemExit(1) if something is broken."""
    parser = argparse.ArgumentParser(
        prog="python -m zeroi2v.doctor",
        description="What this machine can do and what it lacks. Exit status 1 if something "
        "installed does not work.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    checks = examine()
    works = all(check.status != "broken" for check in checks)
    if args.json:
        report = {"zeroi2v": __version__, "works": works}
        print(json.dumps(report | {"checks": [check._asdict() for check in checks]}, indent=2))
    else:
        print(render(checks))
    if not works:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run(main))
