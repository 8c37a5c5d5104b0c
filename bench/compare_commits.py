"""Compares the benches of two commits: how many times the seconds of BASE each row takes now.

`python -m bench.compare_commits BASE [-k EXPRESSION] [--passes 4] [--seconds 5]`

BASE is checked out into a throw-away worktree. The benches of this tree run on both libraries, one
file at a time, in turns (BASE, now, now, BASE, …), so that both meet the same machine; a ratio is
taken within each pair of runs, and the table shows their median and range.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]

Seconds = dict[tuple[str, str], float]
"""Median seconds by bench and row."""


@contextmanager
def worktree(base: str) -> Iterator[Path]:
    """A folder with the tree of commit `base` and the benches of this tree; gone afterwards.

    Raises ValueError if there is no such commit.
    """
    name = base + "^{commit}"
    found = _git("rev-parse", "--verify", "--quiet", name)
    if found.returncode:
        raise ValueError(f"BASE must name a commit: got {base!r}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "base"
        try:
            _git("worktree", "add", "--detach", str(path), found.stdout.strip(), check=True)
            shutil.rmtree(path / "bench", ignore_errors=True)
            skipped = shutil.ignore_patterns("results", "__pycache__")
            shutil.copytree(ROOT / "bench", path / "bench", ignore=skipped)
            yield path
        finally:
            _git("worktree", "remove", "--force", str(path))


def measure(root: Path, file: str, options: list[str]) -> tuple[Seconds, str]:
    """Seconds of the benches of one file with the library in `root`, and the error if one failed.

    Raises ValueError if Python would not import the library from `root`.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "pytest", "-q", f"bench/{file}", "--benchmark", "--results", folder]
        done = _python(root, [*command, "-p", "no:cacheprovider", *options])
        paths = list(Path(folder).glob("*.json"))
        benches = json.loads(paths[0].read_text())["benches"] if paths else {}
    seconds = {
        (name, row): figures["seconds"]
        for name, bench in benches.items()
        for row, figures in bench["rows"].items()
        if "seconds" in figures
    }
    failed = done.returncode not in (0, 5)  # 5: no bench of this file was selected
    lines = [line for line in done.stdout.splitlines() if line.startswith(("E  ", "FAILED"))]
    return seconds, (lines or ["pytest failed"])[-1][:160] if failed else ""


def check_import(root: Path) -> None:
    """Raises ValueError unless Python in `root` imports both packages from there."""
    code = "import zeroi2v, zeroi2v_kernels as k; print(zeroi2v.__file__); print(k.__path__[0])"
    places = _python(root, ["-c", code]).stdout.split()
    if len(places) != 2 or not all(Path(place).is_relative_to(root) for place in places):
        raise ValueError(f"the library must be imported from {root}: got {places}")


def table(base: list[Seconds], now: list[Seconds]) -> list[str]:
    """Lines of the comparison; `base[i]` and `now[i]` are a pair of runs."""
    keys = dict.fromkeys(key for run in (*base, *now) for key in run)
    width = max((len(f"{bench}, {row}") for bench, row in keys), default=0)
    lines = [f"{'bench, row':<{width}} {'BASE ms':>10} {'now ms':>10}   now / BASE  [range]"]
    for key in keys:
        pairs = [(b[key], n[key]) for b, n in zip(base, now, strict=True) if key in b and key in n]
        line = f"{', '.join(key):<{width}}"
        if not pairs:
            side = "now" if any(key in run for run in now) else "BASE"
            lines.append(f"{line}   only in {side}")
            continue
        before, after = (1e3 * statistics.median(side) for side in zip(*pairs, strict=True))
        ratios = sorted(n / b for b, n in pairs)
        lines.append(
            f"{line} {before:10.2f} {after:10.2f}   {statistics.median(ratios):10.3f}  "
            f"[{ratios[0]:.3f}, {ratios[-1]:.3f}]"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", metavar="BASE", help="commit to compare this tree with")
    parser.add_argument("-k", metavar="EXPRESSION", default="", help="only benches that match")
    parser.add_argument("--passes", type=int, default=4, help="pairs of runs of each file")
    parser.add_argument("--seconds", type=float, default=5, help="time to fill with each bench")
    arguments = parser.parse_args(argv)
    options = ["--seconds", str(arguments.seconds)]
    options += ["-k", arguments.k] if arguments.k else []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree is removed
    files = sorted(path.name for path in (ROOT / "bench").glob("bench_*.py"))
    errors: dict[str, None] = {}
    try:
        with worktree(arguments.base) as root:
            runs: dict[Path, list[Seconds]] = {root: [], ROOT: []}
            for side in runs:
                check_import(side)
            turns = [(file, i) for file in files for i in range(arguments.passes)]
            for file, i in tqdm(turns, unit="pair of runs"):
                if i and not (runs[root][-1] or runs[ROOT][-1]):
                    continue  # `-k` selects nothing of this file, or it fails on both sides
                for side in (root, ROOT)[:: 1 if i % 2 == 0 else -1]:
                    seconds, error = measure(side, file, options)
                    runs[side].append(seconds)
                    if error:
                        errors[f"{file} failed {'now' if side is ROOT else 'in BASE'}: {error}"] = (
                            None
                        )
            print("\n".join([*table(runs[root], runs[ROOT]), *errors]))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _python(root: Path, arguments: list[str]) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(root), str(root / "kernels")])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _git(*arguments: str, check: bool = False) -> subprocess.CompletedProcess:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=check)


if __name__ == "__main__":
    sys.exit(main())
