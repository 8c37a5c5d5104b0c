"""What `pip install` brings: a wheel, installed apart from this checkout, has everything."""

import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from training import make_data

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Runs a program of an environment in which the wheel is installed; what it prints."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        if name.startswith(("zeroi2v/", "kernels/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(folder),
    ]
    subprocess.run([*build, str(source)], check=True, timeout=250)
    (wheel,) = folder.glob("zeroi2v-*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    packages = sysconfig.get_path("purelib")
    place = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True, timeout=100)
    (Path(place) / "later.pth").write_text(f"import sys; sys.path.append({packages!r})\n")

    def run(*words: object) -> str:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        done = subprocess.run(
            [folder / "env" / "bin" / words[0], *map(str, words[1:])],
            capture_output=True, text=True, cwd=folder, env=environment, timeout=250,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_package_is_the_wheels(program):
    told = program("python", "-c", "import zeroi2v, zeroi2v_kernels as k; "
                   "print(zeroi2v.__file__, k.__file__)")  # fmt: skip
    assert told.count("/env/lib/") == 2 and str(ROOT) not in told
    version = program("zeroi2v", "--version")
    assert version == program("python", "-m", "zeroi2v", "--version") and "zeroi2v 0." in version


def test_it_trains_merges_and_predicts_out_of_the_tree(program, tmp_path):
    make_data(tmp_path)
    words = ["--config", tmp_path / "config.yaml", f"run.dir={tmp_path / 'run'}"]
    summary = json.loads(program("zeroi2v", "train", *words).splitlines()[-1])
    assert summary["finished"] and (tmp_path / "run" / "report.html").stat().st_size > 10_000
    program("zeroi2v", "reparam", tmp_path / "run", "--out", tmp_path / "merged")
    line = program("zeroi2v", "predict", tmp_path / "merged", tmp_path / "0.mp4", "--json")
    assert json.loads(line)["topk"]


def test_recipes_are_there_by_name(program):
    assert "name of a recipe" in program("python", "-m", "zeroi2v.train", "--help")
    told = program("python", "-c", "from zeroi2v.train.config import load_config; "
                   "print(load_config('vit_l14_ssv2_32').model.num_frames)")  # fmt: skip
    assert told.strip() == "32"
