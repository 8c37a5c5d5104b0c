"""A package that only a verb needs is asked for in one line, and by nothing else."""

import ast
from pathlib import Path

import pytest
from models import build, small_config

import train.main
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
        (train.main.main, ["--config", "x.yaml", "--dry-run"],
         "error: training needs the package nvidia.dali: pip install 'zeroi2v[train]'"),
    ):  # fmt: skip
        assert cli.run(main, words) == 1
        assert capsys.readouterr().err.strip() == line
    assert not (tmp_path / "y.onnx").exists()


def test_extras_are_those_of_the_installation_and_imported_where_they_are_used():
    setup = (ROOT / "setup.py").read_text()
    for package, extra in extras.EXTRAS.items():
        listed = setup.split(f'"{extra}": [')[1].split("]")[0]
        assert f'"{package.replace(".", "-")}' in listed
    late = {*extras.EXTRAS, "zeroi2v.data.graph"}  # which is imported where a graph is built
    for path in [*(ROOT / "zeroi2v").rglob("*.py"), *(ROOT / "train").rglob("*.py")]:
        if path.name == "graph.py":
            continue
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                parts = {name.split(".")[0], ".".join(name.split(".")[:2]), name}
                assert not parts & late, f"{path} imports {name} at once"
