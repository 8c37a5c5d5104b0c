"""Renders `bench/results/*.json` into the docs: tables, pictures, and a page for each machine.

`python -m bench.report` writes them, `python -m bench.report --check` only names what is stale.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench.plots import digest, draw
from bench.tables import page, summary
from zeroi2v.files import write_whole

RESULTS = Path(__file__).with_name("results")
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"
"""The tables of all machines; their own pages and the pictures lie in the folder of its name."""
BEGIN = "<!-- benches: written by `python -m bench.report` -->"
END = "<!-- end of benches -->"


def load(folder: Path = RESULTS) -> list[dict]:
    """The results of each machine, GPUs first."""
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    found = [results for results in found if "benches" in results]  # not those of check-gpu
    return sorted(found, key=lambda results: results["machine"]["kind"] != "GPU")


def render(target: Path = PAGE, folder: Path = RESULTS) -> dict[Path, str]:
    """What the page and those of the machines should hold, by path.

    Raises ValueError if the page lacks one of the markers.
    """
    machines, beside = load(folder), target.with_suffix("")
    text = target.read_text(encoding="utf-8")
    if not 0 <= text.find(BEGIN) < text.find(END):
        raise ValueError(f"{target.name} must hold the lines {BEGIN!r} and {END!r}")
    part = summary(machines, {path.name for path in beside.glob("*.png")}, beside.name)
    start, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    files = {target: f"{text[:start]}\n\n{part}\n\n{text[end:]}"}
    return files | {beside / f"{m['machine']['slug']}.md": page(m) for m in machines}


def stale(target: Path = PAGE, folder: Path = RESULTS) -> list[str]:
    """Names of files that are not what the results say; pictures, that were drawn of others."""
    names = [
        path.name
        for path, text in render(target, folder).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    for results in load(folder):
        for path in target.with_suffix("").glob(f"{results['machine']['slug']}-*.png"):
            if digest(results).encode() not in path.read_bytes():
                names.append(path.name)
    return names


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, name what is stale")
    if parser.parse_args(argv).check:
        names = stale()
        print(f"stale: {', '.join(names)}; run `python -m bench.report`" if names else "up to date")
        return 1 if names else 0
    for results in load():
        try:
            names = draw(results, PAGE.with_suffix(""))
        except ImportError as error:
            print(f"no pictures: {error.name} is not installed")
        else:
            print("drawn:", ", ".join(names))
    for path, text in render().items():
        write_whole(path, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
