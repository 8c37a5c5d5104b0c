"""The `zeroi2v` command: every verb is also `python -m zeroi2v.<verb>`."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from importlib import import_module

from zeroi2v import __version__

VERBS = {
    "check_data": "decode a dataset's videos and say what is wrong with them",
    "convert": "turn a foreign model or config into ours",
    "doctor": "what this machine can do and what it lacks",
    "evaluate": "accuracy of a model on a list of videos",
    "init": "from a folder of your videos to the config of a training run",
    "export": "write a merged model for deployment, proven",
    "predict": "classify video files",
    "train": "train a video classifier (also by deepspeed or torchrun: train/main.py)",
    "report": "a page about a run, or one that compares several",
    "reparam": "merge a model's adapters into its weights, and prove it",
    "serve": "a local web page to try a model on, with a JSON API",
    "visualize": "pictures of which frames and patches the heads look at",
}
MODULES = {
    "train": "zeroi2v.train.main",
    "report": "zeroi2v.train.report",
    "serve": "zeroi2v.serve.main",
}
"""Verbs whose module is not named as they are."""
_HOME = re.compile(r"(?<![^=])~/")
"""At the start of a word, or of what an option or a key is set to, where shells leave it alone."""


def run(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Runs `main(argv)` and returns its exit status: bad input ends in one line on stderr and 1.

    Bad input raises ValueError or OSError; anything else is a bug and keeps its traceback.
    """
    try:
        words = sys.argv[1:] if argv is None else argv
        main([_HOME.sub(os.path.expanduser("~/"), word) for word in words])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    return 0


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def main() -> int:
    """Entry point of the installed `zeroi2v` command, and of `python -m zeroi2v`."""
    if sys.argv[1:] == ["--version"]:
        print(f"zeroi2v {__version__}")
        return 0
    if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
        print("usage: zeroi2v VERB [options]     (zeroi2v VERB --help)\n")
        for verb, meaning in VERBS.items():
            print(f"  {verb:<10} {meaning}")
        return 0 if len(sys.argv) > 1 else 2
    verb = sys.argv[1]
    if verb not in VERBS:
        print(f"error: unknown verb {verb!r}: known: {', '.join(VERBS)}", file=sys.stderr)
        return 2
    sys.argv[0] = f"zeroi2v {verb}"
    module = MODULES.get(verb, f"zeroi2v.{verb}")
    return run(import_module(module).main, sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
