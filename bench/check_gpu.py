"""`make check-gpu`: everything that only a GPU can show, cheap and fundamental first.

    python -m bench.check_gpu                          all checks, then figures while time is left
    python -m bench.check_gpu --only kernels data      some of them
    python -m bench.check_gpu --sanitizer              the kernels under compute-sanitizer alone
    python -m bench.check_gpu --dry                    the same steps without a GPU

Each step is a process of its own with a time limit, and a line; the others go on after a failure.
Checks run side by side where there are cores, figures alone. Results are written as steps end. A
step whose package is missing is skipped by name, and a skip is no pass. Exit status 1 if a step
failed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.machine import commit

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results"
_CORES = len(os.sched_getaffinity(0))
_RUNNING: set[subprocess.Popen] = set()
_GRACE = 5
"""Seconds that a process has to end after it has been told to."""


@dataclass(frozen=True)
class Step:
    """One process."""

    name: str
    command: tuple[str, ...]
    """After `python`."""
    limit: float
    """Seconds it may take."""
    needs: tuple[str, ...] = ()
    """Packages without which it is skipped."""
    dry: bool = False
    """Whether it runs without a GPU."""
    figures: bool = False
    """Whether it measures time; those steps come last, and only while there is time."""


@dataclass
class Outcome:
    """How a step ended."""

    name: str
    status: str
    """passed, failed or skipped"""
    seconds: float = 0.0
    said: str = ""
    """One line: what passed, or why the step failed or was skipped."""
    log: str = ""
    """File of all its output, beside the results."""
    lines: list[str] = field(default_factory=list)
    """The numbers that it printed."""


def _pytest(*words: str) -> tuple[str, ...]:
    return ("-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", "--tb=short", *words)


def _shared(*words: str) -> tuple[str, ...]:
    """Tests whose time is the compiling of kernels: by several processes, if there are cores."""
    share = min(_CORES // 2, 6)
    several = share > 1 and find_spec("xdist") is not None
    return _pytest(*words, *(("-n", str(share), "--dist", "worksteal") if several else ()))


def _on_gpu(words: str) -> tuple[str, ...]:
    return _pytest("tests/on_gpu.py", "-k", words)


def _figures(*words: str) -> tuple[str, ...]:
    return ("-m", "pytest", "bench", "--benchmark", "-q", "-p", "no:cacheprovider", *words)


def _test_of(kernel: str) -> str:
    return f"tests/kernels/test_{kernel}.py"


_KERNELS = tuple(
    _test_of(name)
    for name in (
        "stdha_kernels",
        "layouts",
        "norm",
        "activation",
        "quantize",
        "rotary",
        "adapter_linear",
        "kernel_proof",
    )
)
_DATA, _TRAIN = ("nvidia.dali", "av"), ("nvidia.dali", "av", "deepspeed")

STEPS = (
    Step("doctor", ("-m", "zeroi2v.doctor", "--json"), 90, dry=True),
    Step("kernels", _shared(*_KERNELS), 150),
    Step("model", _on_gpu("test_model"), 90, ("av",), dry=True),
    Step("training block", _shared("tests/model/test_training_block.py"), 90, _TRAIN),
    Step("families", _shared("tests/model/test_families.py", "-k", "kernels_compute"), 60, _TRAIN),
    Step("data", _on_gpu("test_data"), 90, _DATA, dry=True),
    Step("training", _on_gpu("test_train_in"), 120, _TRAIN),
    Step("resume", _on_gpu("test_train_killed"), 90, _TRAIN),
    Step("artefacts", _on_gpu("test_artefacts"), 90, (*_DATA, "onnxruntime", "onnxscript")),
    Step("flash", _on_gpu("test_flash"), 60, ("flash_attn",)),
    Step("benches", _shared("bench", "-k", "not data and not predict and not reparam"), 120),
    Step("latency", _figures("-k", "bench_latency"), 60, figures=True),
    Step("zero cost L/14", _figures("-k", "bench_zero_cost[L/14-32-bfloat16]"), 90, figures=True),
    Step("zero cost B/16", _figures("-k", "bench_zero_cost[B/16-8-bfloat16]"), 60, figures=True),
    Step("training step", _figures("-k", "training_block"), 120, figures=True),
    Step("attention", _figures("-k", "bench_stdha and bf"), 120, figures=True),
    Step("decoding", _figures("-k", "bench_decod"), 120, _DATA, figures=True),
)

SANITIZER = tuple(
    Step(
        f"{tool} {name}",
        ("-m", "pytest", "-q", "-p", "no:cacheprovider", _test_of(name), "-k", words),
        280,
    )
    for tool in ("memcheck", "racecheck")
    for name, words in (
        ("stdha_kernels", "compute_the_definition and (5-64 or 17-64 or 50-64)"),
        ("norm", "two_runs"),
        ("activation", "strided"),
        ("adapter_linear", "way_up"),
    )
)


def main(argv: list[str] | None = None) -> int:
    """Runs the steps that `argv` asks for, and returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.check_gpu", description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="STEP", help="names, or beginnings of names")
    parser.add_argument("--minutes", type=float, default=6, help="after which no step is begun")
    parser.add_argument("--dry", action="store_true", help="without a GPU")
    parser.add_argument("--sanitizer", action="store_true", help="compute-sanitizer on the kernels")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args(argv)
    steps = SANITIZER if args.sanitizer else STEPS
    if args.only:
        steps = tuple(s for s in steps if any(s.name.startswith(word) for word in args.only))
        if not steps:
            parser.error(f"--only must name steps: got {' '.join(args.only)}")
    if args.sanitizer and shutil.which("compute-sanitizer") is None:
        parser.error("--sanitizer needs compute-sanitizer, a part of the CUDA toolkit, on the path")
    if not args.dry:
        import torch

        if not torch.cuda.is_available():
            parser.error("a CUDA device is needed; --dry goes through the steps without one")
    outcomes = []
    for outcome in check(steps, args.out, 60 * args.minutes, args.dry):
        print(f"{outcome.status:<8} {outcome.name:<16} {outcome.seconds:6.1f} s  {outcome.said}")
        if outcome.status == "failed":
            print("".join(f"    {line}\n" for line in outcome.lines[-12:]), end="")
            print(f"    {args.out / outcome.log}")
        sys.stdout.flush()
        outcomes.append(outcome)
    counts = {s: sum(o.status == s for o in outcomes) for s in ("passed", "failed", "skipped")}
    print(", ".join(f"{count} {status}" for status, count in counts.items()), end=": ")
    print(args.out / "check_gpu.json")
    return int(counts["failed"] > 0)


def check(
    steps: tuple[Step, ...], out: Path, seconds: float, dry: bool = False
) -> Iterator[Outcome]:
    """Runs the steps; results are written to `out` after each.

    Args:
        steps: what is run, in order.
        out: folder of `check_gpu.json`, and of a log of each step.
        seconds: after which no step is begun.
        dry: leave out what needs CUDA, and give the rest four times as long.
    """
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    begun, done = time.monotonic(), {}
    report: dict[str, Any] = {
        "commit": commit(), "command": " ".join(sys.argv), "dry": dry, "machine": None, "steps": []
    }  # fmt: skip

    def take(step: Step) -> Outcome:
        reason = _reason_to_skip(step, dry)
        if reason is None and time.monotonic() - begun > seconds:
            reason = f"no time left of {seconds / 60:g} minutes"
        if reason:
            return Outcome(step.name, "skipped", said=reason)
        return run(replace(step, limit=4 * step.limit) if dry else step, out)

    for outcome in _side_by_side(take, steps):
        done[outcome.name] = outcome
        if report["machine"] is None and not dry:
            from bench.machine import machine_card

            report["machine"] = machine_card()
        report["steps"] = [asdict(done[step.name]) for step in steps if step.name in done]
        temporary = out / ".check_gpu.json"
        temporary.write_text(json.dumps(report, indent=1) + "\n")
        temporary.replace(out / "check_gpu.json")
        yield outcome


def _side_by_side(take: Callable[[Step], Outcome], steps: tuple[Step, ...]) -> Iterator[Outcome]:
    """Outcomes as they come: of checks, one for every four cores at a time, then of figures."""
    pool = ThreadPoolExecutor(max(1, _CORES // 4))
    try:
        checks = [pool.submit(take, step) for step in steps if not step.figures]
        for check in as_completed(checks):
            yield check.result()
    finally:  # of all, or when nobody waits for the others
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(_RUNNING):
            _end(process)
    for step in steps:
        if step.figures:
            yield take(step)


def _reason_to_skip(step: Step, dry: bool) -> str | None:
    if dry and not step.dry:
        return "needs CUDA"
    missing = [package for package in step.needs if not _is_there(package)]
    return f"not installed: {', '.join(missing)}" if missing else None


def _is_there(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # of the package that it is a part of
        return False


def run(step: Step, out: Path) -> Outcome:
    """Runs a step to its end, or to its limit."""
    log = out / f"check_{re.sub(r'[^a-z0-9]+', '_', step.name.lower())}.log"
    command = [sys.executable, *step.command]
    if step in SANITIZER:
        tool = step.name.split()[0]
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *command]
    if step.figures and out != RESULTS:
        command += ["--results", str(out)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(
        [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])}  # fmt: skip
    begun, late = time.monotonic(), False
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        _RUNNING.add(process)
        try:
            process.wait(step.limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _end(process)
            _RUNNING.discard(process)
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    outcome = Outcome(
        step.name, "failed", time.monotonic() - begun, log=log.name, lines=lines[-40:]
    )
    if late:
        outcome.said = f"took longer than its limit of {step.limit:g} s"
    elif process.returncode < 0:
        outcome.said = f"was killed by {signal.Signals(-process.returncode).name}"
    else:
        outcome.status, outcome.said = _judge(step, process.returncode, lines)
    if outcome.status != "failed":
        outcome.lines = list(_printed(lines))
    return outcome


def _printed(lines: list[str]) -> Iterator[str]:
    """What the tests of a step that passed have printed, of pytest's report."""
    inside = False
    for line in lines:
        if re.match(r"[-=_]{3,} ", line):
            inside = "Captured stdout call" in line
        elif inside:
            yield line


def _judge(step: Step, status: int, lines: list[str]) -> tuple[str, str]:
    """Status and summary line of a process that ended by itself. Without a result it failed."""
    if step.command[:2] == ("-m", "zeroi2v.doctor"):
        try:
            checks = json.loads("\n".join(lines))["checks"]
        except (ValueError, KeyError):
            return "failed", f"ended with status {status} and no report"
        broken = [f"{c['name']}: {c['detail']}" for c in checks if c["status"] == "broken"]
        if broken or status:
            return "failed", "; ".join(broken) or f"ended with status {status}"
        return "passed", f"{sum(c['status'] == 'ok' for c in checks)} of {len(checks)} parts work"
    last = lines[-1] if lines else ""
    counts = {
        word: int(count) for count, word in re.findall(r"(\d+) (passed|failed|skipped)", last)
    }
    if status == 0 and counts.get("passed"):
        return "passed", last.strip("= ")
    if status == 0 and counts.get("skipped"):
        why = next((line for line in reversed(lines) if line.startswith("SKIPPED")), last)
        return "skipped", why.partition(": ")[2] or why
    return "failed", last.strip("= ") or f"ended with status {status} without a word"


def _end(process: subprocess.Popen) -> None:
    """Ends the process, if it has not, and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


if __name__ == "__main__":
    sys.exit(main())
