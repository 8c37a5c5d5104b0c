"""A package that only a verb needs is asked for in one line, and by nothing else."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from models import build, small_config
from videos import write_numbered

import zeroi2v.train.main
from zeroi2v import cli, export, extras, merge, predict

ROOT = Path(__file__).parents[1]


@pytest.fixture
def without_extras(monkeypatch):
    monkeypatch.setattr(extras, "find_spec", lambda name: None)


def test_each_verb_names_the_package_and_how_to_get_it(without_extras, tmp_path, capsys):
    merge(build(small_config())).save_pretrained(tmp_path / "merged")
    (tmp_path / "x.onnx").touch()
    merged, out = str(tmp_path / "merged"), str(tmp_path / "y.onnx")
    for main, words, line in (
        (export.main, [merged, "--format", "onnx", "--out", out],
         "error: format onnx needs the package onnx: pip install 'zeroi2v[export]'"),
        (predict.main, [str(tmp_path / "x.onnx"), "v.mp4"],
         "error: an ONNX file needs the package onnxruntime: pip install 'zeroi2v[export]'"),
        (zeroi2v.train.main.main, ["--config", "x.yaml", "--dry-run"],
         "error: training needs the package nvidia.dali: pip install 'zeroi2v[train]'"),
    ):  # fmt: skip
        assert cli.run(main, words) == 1
        assert capsys.readouterr().err.strip() == line
    assert not (tmp_path / "y.onnx").exists()


def test_extras_are_those_of_the_installation_and_imported_where_they_are_used():
    project = (ROOT / "pyproject.toml").read_text()
    for package, extra in extras.EXTRAS.items():
        listed = project.split(f"\n{extra} = [")[1].split("]")[0]
        assert f'"{package.replace(".", "-")}' in listed
    late = {*extras.EXTRAS, "zeroi2v.data.graph"}  # which is imported where a graph is built
    for path in (ROOT / "zeroi2v").rglob("*.py"):
        if path.name == "graph.py":
            continue
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                parts = {name.split(".")[0], ".".join(name.split(".")[:2]), name}
                assert not parts & late, f"{path} imports {name} at once"


PLAIN = """
import sys
from importlib.machinery import PathFinder

hidden, find_spec = {"nvidia", *sys.argv[1].split(",")}, PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name in hidden else find_spec(name, *rest)
from zeroi2v import cli
import zeroi2v.train.main

for verb in cli.VERBS:
    sys.argv = ["zeroi2v", verb, "--help"]
    try:
        cli.main()
    except SystemExit as end:
        assert end.code == 0, verb
statuses = []
for line in sys.stdin.read().splitlines():
    sys.argv = ["zeroi2v", *line.split("|")]
    statuses.append(cli.main())
statuses.append(cli.run(zeroi2v.train.main.main, ["--config", "x.yaml", "--dry-run"]))
print("statuses", statuses)
"""


def test_a_plain_installation_has_all_verbs_and_no_traceback(tmp_path):
    merge(build(small_config())).save_pretrained(tmp_path / "merged")
    video, model = write_numbered(tmp_path / "v.mp4", 40), tmp_path / "merged"
    (tmp_path / "list.txt").write_text("v.mp4 0\n")
    words = ["--list", tmp_path / "list.txt", "--root", tmp_path]
    lines = [
        ["predict", model, video],
        ["evaluate", model, *words],
        ["visualize", model, video, "--out", tmp_path / "pictures"],
        [
            "check_data",
            tmp_path / "list.txt",
            "--root",
            tmp_path,
            "--out",
            tmp_path / "manifest.jsonl",
        ],
        ["reparam", model, "--out", tmp_path / "again"],
        ["export", model, "--format", "torch-export", "--out", tmp_path / "x.pt2"],
        ["predict", tmp_path / "x.pt2", video],
        ["export", model, "--format", "onnx", "--out", tmp_path / "x.onnx"],
        ["predict", tmp_path / "x.onnx", video],
    ]
    (tmp_path / "x.onnx").touch()
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, ",".join(extras.EXTRAS)],
        input="\n".join("|".join(map(str, line)) for line in lines),
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    statuses = done.stdout.splitlines()[-1]
    assert statuses == f"statuses {[0, 0, 0, 0, 1, 0, 0, 1, 1, 1]}", (statuses, done.stderr)
    assert done.stderr.count("pip install 'zeroi2v[export]'") == 2
    assert done.stderr.count("pip install 'zeroi2v[train]'") == 1


ELSEWHERE = """
import os, signal, sys
from importlib.machinery import BuiltinImporter, PathFinder

import av, matplotlib.pyplot, safetensors.torch, torch  # their own ways depend on the system

for module, names in ((os, ["sched_getaffinity", "statvfs", "fork"]),
                      (signal, ["SIGALRM", "SIGKILL", "setitimer", "alarm"])):
    for name in names:
        delattr(module, name)
hidden = {"fcntl", "resource", "nvidia", "deepspeed", "triton", "pwd", "grp"}
for finder in (PathFinder, BuiltinImporter):
    find = finder.find_spec
    finder.find_spec = lambda name, *rest, find=find: None if name in hidden else find(name, *rest)
sys.platform = "darwin"
from zeroi2v import evaluate, predict, reparam, visualize
from zeroi2v.cli import run

model, video, listed, out = sys.argv[1:]
assert run(predict.main, [model, video]) == 0
words = ["--list", listed, "--root", os.path.dirname(listed), "--workers", "0"]
assert run(evaluate.main, [model, *words]) == 0
assert run(visualize.main, [model, video, "--out", out]) == 0
"""


def test_predict_and_evaluate_need_nothing_of_linux(tmp_path):
    merge(build(small_config())).save_pretrained(tmp_path / "merged")
    video = write_numbered(tmp_path / "v.mp4", 40)
    (tmp_path / "list.txt").write_text("v.mp4 0\n")
    words = [tmp_path / "merged", video, tmp_path / "list.txt", tmp_path / "pictures"]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
