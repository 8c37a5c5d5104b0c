"""One config on several splits or seeds, in one command; then a table with mean and deviation.

    python -m zeroi2v.train.splits --config vit_b16_ucf101_8 --splits 1,2,3 \\
        data.train_list=lists/ucf101/trainlist0{split}.txt \\
        data.val_list=lists/ucf101/testlist0{split}.txt [section.key=value …]
    python -m zeroi2v.train.splits --config … --seeds 0,1,2,3,4 data.shots=4

In an override `{split}` stands for the split. The runs go one after the other, each by
`train/main.py` in a folder of its own below `run.dir`, and each trained model is evaluated there
with the recipe's test views. What is finished is not done again: after a stop, the same command
goes on. The last model of each run counts, not the best: that one is chosen on the videos it is
judged by.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zeroi2v import evaluate
from zeroi2v.cli import run
from zeroi2v.files import write_whole
from zeroi2v.train.config import RunConfig, differences, load_config
from zeroi2v.train.log import read_log
from zeroi2v.train.prepare import read_samples, with_classes


@dataclass(frozen=True)
class Part:
    """One of the runs."""

    name: str
    """Of its folder below `run.dir`, such as `split1_seed0`."""
    overrides: list[str]
    config: RunConfig

    @property
    def folder(self) -> Path:
        return Path(self.config.run.dir)


def plan(path: str, overrides: list[str], splits: list[str], seeds: list[int]) -> list[Part]:
    """The runs of every split with every seed, their configs and lists checked.

    Raises ValueError or OSError as `load_config` and `read_list`, or if `splits` and the overrides
    do not go together.
    """
    named = [override for override in overrides if "{split}" in override]
    if bool(splits) != bool(named):
        raise ValueError(
            "--splits must go with {split} in an override: "
            f"got --splits {','.join(splits) or 'none'}, and {len(named)} overrides with it"
        )
    base, parts = load_config(path, overrides).run.dir, []
    for split in splits or [""]:
        for seed in seeds:
            name = f"split{split}_seed{seed}" if split else f"seed{seed}"
            words = [override.replace("{split}", split) for override in overrides]
            words += [f"run.dir={Path(base, name)}", f"run.seed={seed}", "run.resume=auto"]
            config = with_classes(load_config(path, words))
            if config.data.val_list is None:
                raise ValueError("data.val_list must be given: the table is of its accuracy")
            read_samples(config)
            parts.append(Part(name, words, config))
    return parts


def is_finished(part: Part) -> bool:
    """Whether the run has trained to its end and validated then.

    Raises ValueError if the run in its folder is of another config.
    """
    if not (part.folder / "eval.json").exists():
        return False
    changed = differences(load_config(part.folder / "config.yaml"), part.config)
    if changed:
        raise ValueError(
            f"{part.folder} contains a run of another config: got {'; '.join(changed)}"
        )
    validated = json.loads((part.folder / "eval.json").read_text(encoding="utf-8"))["step"]
    last = max(read_log(part.folder), key=lambda line: line["step"])
    return last["epoch"] >= part.config.optim.epochs and validated == last["step"]


def train(part: Part, path: str, launcher: list[str]) -> None:
    """Runs `zeroi2v train`. A stop signal is left to it; SystemExit if it stopped then.

    Raises ValueError if it fails.
    """
    as_module = "--module" if Path(launcher[0]).name == "deepspeed" else "-m"
    command = [*launcher, as_module, "zeroi2v.train", "--config", path, *part.overrides]
    process = subprocess.Popen(command)
    # Ctrl-C reaches it from the terminal, SIGTERM does not.
    old = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda n, _: process.send_signal(n)),
    }
    try:
        status = process.wait()
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        print(f"stopped in {part.name}: the same command continues", flush=True)
        raise SystemExit(status)
    if status:
        raise ValueError(
            f"run {part.name} must succeed: it ended with status {status}, see above; the same "
            "command continues from there"
        )


def test(part: Part) -> float:
    """Top-1 of the run's last model with the test views, in percent; kept in `test.json`."""
    out = part.folder / "test.json"
    if not out.exists():
        data = part.config.data
        root = data.val_root or data.root
        words = [str(part.folder / "last"), "--list", data.val_list, "--out", str(out)]
        evaluate.main(words + (["--root", root] if root else []))
    return json.loads(out.read_text(encoding="utf-8"))["top1"]


def summarize(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the rows, then the mean and the sample deviation over them."""
    lines = ["| run | validation top-1 | test top-1 |", "|---|---:|---:|"]
    lines += [f"| {row['run']} | {row['val_top1']:.2f} | {row['test_top1']:.2f} |" for row in rows]
    mean, deviation = ["mean"], ["standard deviation"]
    for key in ("val_top1", "test_top1"):
        values = [row[key] for row in rows]
        mean.append(f"{statistics.mean(values):.2f}")
        deviation.append(f"± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in (mean, deviation))])


def find_launcher(words: str) -> list[str]:
    """The command that starts `zeroi2v.train`, from words as on a command line.

    Programs of this Python's environment are found without being on the PATH.
    """
    first, *others = shlex.split(words) or [""]
    beside = Path(sys.executable).with_name(first)
    found = shutil.which(first) or (first and beside.is_file() and str(beside))
    if not found:
        raise ValueError(f"--launcher must be a command: got {words!r}")
    return [found, *others]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m zeroi2v.train.splits",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="name of a recipe, or YAML file")
    parser.add_argument("--splits", default="", help="what {split} stands for in turn: 1,2,3")
    parser.add_argument("--seeds", default="0", help="of run.seed: 0,1,2 (default: 0)")
    parser.add_argument(
        "--launcher", help="such as 'deepspeed' (default: this Python, one process)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for all runs")
    args = parser.parse_intermixed_args(argv)
    launcher = [sys.executable] if args.launcher is None else find_launcher(args.launcher)
    splits = [split for split in args.splits.split(",") if split]
    if not all(seed.isdigit() for seed in args.seeds.split(",")):
        raise ValueError(f"--seeds must be numbers with commas between: got {args.seeds!r}")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    parts = plan(args.config, args.overrides, splits, seeds)
    finished = {part.name: is_finished(part) for part in parts}

    rows = []
    for number, part in enumerate(parts, 1):
        done = finished[part.name]
        print(f"[{number}/{len(parts)}] {part.folder}{': finished before' * done}", flush=True)
        if not done:
            train(part, args.config, launcher)
        validation = json.loads((part.folder / "eval.json").read_text(encoding="utf-8"))
        rows.append({"run": part.name, "val_top1": validation["top1"], "test_top1": test(part)})
    table, base = summarize(rows), parts[0].folder.parent
    write_whole(base / "splits.json", json.dumps(rows, indent=1) + "\n")
    write_whole(base / "splits.md", table + "\n")
    views = "{} clips x {} crops".format(*parts[0].config.model.preprocess.test_views)
    print(f"\n{table}\n\nTest: {views}. Written: {base / 'splits.json'}, {base / 'splits.md'}")


if __name__ == "__main__":
    sys.exit(run(main))
