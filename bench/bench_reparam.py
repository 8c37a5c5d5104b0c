"""Merging from the command line: seconds and the most memory that the process held at once.

Beside it the unavoidable part of merging: reading the adapted model and writing one. Weights are
random; before anything is timed, the report of the merge must say that it passed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import forked
import pytest
from models import small_config

from bench.cases import adapted_model
from zeroi2v import RECIPES

MODELS = {"B/16": "vit_b16_k400_8x16", "L/14": "vit_l14_k400_8x16"}
COPY = "from zeroi2v import VideoViT; VideoViT.from_pretrained({!r}).save_pretrained({!r})"


@pytest.mark.parametrize("model", MODELS)
def bench_reparam(model, tmp_path, compare, timed, device):
    recipe = MODELS[model]
    adapted = adapted_model(RECIPES[recipe].model if timed else small_config(recipe), device)
    adapted.save_pretrained(tmp_path / "adapted")
    parameters = sum(p.numel() for p in adapted.parameters())
    del adapted
    peaks = {}

    def fresh(name, *words):
        if not timed:
            forked.run([sys.executable, *words], check=True)
            return
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        peaks[name] = max(peaks.get(name, 0), 1024 * usage.ru_maxrss)

    source, out, copy = (str(tmp_path / name) for name in ("adapted", "merged", "copy"))

    def check(name, _):
        if name == "reparam":
            report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
            assert all(check["passed"] for check in report["checks"])

    compare(
        {
            "read and write": lambda: fresh("read and write", "-c", COPY.format(source, copy)),
            "reparam": lambda: fresh("reparam", "-m", "zeroi2v.reparam", source, "--out", out),
        },
        baseline="read and write",
        check=check,
        device="cpu",
        rounds=1,
        model=model,
        peak_bytes=peaks,
        parameters_before=parameters,
    )
