"""Cold start: from the shell to the first answer on one video, each time in a fresh process.

Contestants are the same merged model as a folder, an ONNX file and an exported program. `import
torch` alone is the lower limit of any Python program that uses it. Before any is timed, each must
name the same classes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial

import forked
import pytest
from models import build, small_config
from videos import write_numbered

from zeroi2v import RECIPES, merge
from zeroi2v.export import export

RECIPE = "vit_b16_k400_8x16"
FILES = {"onnx": "model.onnx", "torch-export": "model.pt2"}
FLOOR = "import torch"


def bench_predict(tmp_path, compare, timed):
    pytest.importorskip("onnxscript", reason="ONNX is not installed: pip install zeroi2v[export]")
    model = merge(build(RECIPES[RECIPE].model if timed else small_config(RECIPE, depth=1)))
    model.save_pretrained(tmp_path / "folder")
    for format, name in FILES.items():
        export(model, format, tmp_path / name)
    video = write_numbered(tmp_path / "video.mp4", 150, size=(256, 340), g="12")

    def fresh(*words):
        start = partial(subprocess.run, capture_output=True, text=True) if timed else forked.run
        return start([sys.executable, *words], check=True).stdout

    def predict(artefact):
        return lambda: fresh("-m", "zeroi2v.predict", str(tmp_path / artefact), video, "--json")

    answers = {}

    def check(name, output):
        if name != FLOOR:
            answers[name] = [row["index"] for row in json.loads(output)["topk"]]
            assert len(answers[name]) == 5 and len({tuple(a) for a in answers.values()}) == 1

    compare(
        {
            **({FLOOR: lambda: fresh("-c", "import torch")} if timed else {}),
            "folder": predict("folder"),
            **{format: predict(name) for format, name in FILES.items()},
        },
        baseline="folder",
        check=check,
        device="cpu",
        model="B/16",
        frames=model.config.num_frames,
        views=model.config.preprocess.test_views,
    )
