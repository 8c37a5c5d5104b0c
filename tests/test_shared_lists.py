"""Processes that share a list of videos say and write what a single one does."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from models import build, small_config
from training import held_port, server
from videos import write_numbered

from zeroi2v import cli, evaluate, predict, processes
from zeroi2v.storage.results import Results

LABELS = tuple(f"class {i}" for i in range(11))
COUNT = 7


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, and a list of seven videos of which the fourth is bad."""
    folder = tmp_path_factory.mktemp("shared")
    build(small_config(labels=LABELS)).save_pretrained(folder / "model")
    for i in range(COUNT):
        write_numbered(folder / f"{i}.mp4", 9 + 5 * i)
    (folder / "3.mp4").write_text("no video")
    (folder / "list.txt").write_text("".join(f"{i}.mp4 {i}\n" for i in range(COUNT)))
    return folder


def words(place: Path, *more: object) -> list[str]:
    given = (place / "model", "--list", place / "list.txt", "--root", place, "--batch-size", 2)
    return [str(word) for word in (*given, *more)]


def by_one(main: Callable, argv: list[str]) -> int:
    return cli.run(main, argv)


def by(
    count: int, main: Callable, argv: list[str], output: Path, before: Callable | None = None
) -> tuple[list[int], str]:
    """Exit statuses of `count` processes that share the work, and what they wrote."""
    with ExitStack() as stack:
        port = stack.enter_context(held_port())
        started = [
            server().Process(target=one_of, args=(rank, count, port, main, argv, output, before))
            for rank in range(count)
        ]
        for process in started:
            process.start()
            stack.callback(process.kill)
        for process in started:
            process.join(120)
    return [process.exitcode for process in started], output.read_text()


def one_of(rank, count, port, main, argv, output, before) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ |= {name: str(value) for name, value in names.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    if before is not None:
        before()
    sys.exit(cli.run(main, argv))


def errors(text: str) -> list[str]:
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("error: ")]


def test_evaluate_gives_the_figures_and_files_of_one_process(place, tmp_path, capsys):
    """Of the five processes, one gets padding alone."""
    count = 5
    assert by_one(evaluate.main, words(place, "--out", tmp_path / "one.json")) == 1
    one = capsys.readouterr()
    argv = words(place, "--out", tmp_path / "all.json")
    codes, text = by(count, evaluate.main, argv, tmp_path / "output")
    assert codes == [1] + [0] * (count - 1)
    assert errors(text) == one.err.splitlines() and "must be at most" in one.err
    assert f" by {count} processes; 1 undecodable" in text
    shown = [line for line in one.out.splitlines() if not line.startswith(("videos", "written"))]
    assert len(shown) > 5 and set(shown) <= set(text.splitlines())
    for name in ("{}.json", "{}_predictions.jsonl", "{}_confusion.png"):
        of_one, of_all = (tmp_path / name.format(which) for which in ("one", "all"))
        assert of_one.read_bytes() == of_all.read_bytes()


def test_predict_writes_the_lines_of_one_process_in_the_order_of_the_list(place, tmp_path, capsys):
    out = tmp_path / "all.jsonl"
    assert by_one(predict.main, words(place, "--out", tmp_path / "one.jsonl")) == 1
    one = capsys.readouterr()
    codes, text = by(3, predict.main, words(place, "--out", out), tmp_path / "output")
    assert codes == [1, 0, 0]
    assert errors(text) == [one.err.splitlines()[-1].replace("one.jsonl", "all.jsonl")]
    assert out.read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert sorted(tmp_path.glob("all*")) == [out]


def dies_after_its_first() -> None:
    """Rank 1 is killed; the others, once they have begun, wait three seconds for it."""
    add = Results.add

    def add_and_die(self, result):
        processes.limit = lambda: timedelta(seconds=3)
        add(self, result)
        if os.environ["RANK"] == "1":
            with open(f"{self.path}.part1", "a") as file:
                file.write('{"path": "half a li')
            os._exit(9)

    Results.add = add_and_die


def test_a_process_that_dies_is_told_and_what_is_done_is_kept(place, tmp_path, capsys):
    out = tmp_path / "all.jsonl"
    argv = words(place, "--out", out)
    codes, text = by(2, predict.main, argv, tmp_path / "output", dies_after_its_first)
    assert codes == [1, 9]
    (error,) = errors(text)
    assert "a process of this run has died or is stuck" in error
    assert error.endswith("start it again: it continues the --out file")
    done = [json.loads(li)["path"] for li in (tmp_path / "all.jsonl.part0").open()]
    assert len(done) == 4 and len((tmp_path / "all.jsonl.part1").read_text().splitlines()) == 2
    assert by_one(predict.main, argv) == 1  # a single one continues
    assert "5 done before" in capsys.readouterr().err
    paths = [json.loads(line)["path"] for line in out.open()]
    assert sorted(paths) == [str(place / f"{i}.mp4") for i in range(COUNT)]
    assert sorted(tmp_path.glob("all*")) == [out]


def nan_in_one() -> None:
    """Rank 1's model is broken."""
    load = predict.load_deployed

    def broken(*args):
        model = load(*args)
        if os.environ["RANK"] == "1":
            with torch.no_grad():
                model.head.bias[0] = torch.nan
        return model

    predict.load_deployed, predict.settings_of = broken, lambda *_, **__: {}


def test_an_error_in_one_process_ends_all_and_is_told_once(place, tmp_path):
    argv = words(place, "--out", tmp_path / "all.jsonl")
    codes, text = by(3, predict.main, argv, tmp_path / "output", nan_in_one)
    assert codes == [1, 1, 1]
    assert errors(text) == ["error: model's output must be finite: got inf or nan"]


@pytest.mark.parametrize(
    ("main", "more", "message"),
    [
        (predict.main, [], "processes that share videos need an --out file: got none"),
        (predict.main, ["camera:0", "--out", "x.jsonl"], "can share files only: got camera:0"),
        (evaluate.main, ["--views", "2"], "--views must be CLIPSxCROPS"),
    ],
)
def test_bad_input_is_told_once(place, tmp_path, monkeypatch, main, more, message):
    monkeypatch.chdir(tmp_path)
    codes, text = by(2, main, words(place, *more), tmp_path / "output")
    assert codes == [1, 1]
    (error,) = errors(text)
    assert message in error and sorted(os.listdir(tmp_path)) == ["output"]


def test_parts_are_collected_in_turn_and_never_twice(place, tmp_path):
    out, settings = tmp_path / "all.jsonl", {"weights": "w"}
    model = dict(model="m", settings=settings)

    def write(path, *names):
        path.write_text("".join(json.dumps({**model, "path": name}) + "\n" for name in names))

    write(out, "a", "c")  # of a collection that was stopped after "c", and amid the next line
    with out.open("a") as file:
        file.write('{"model": "m", "pa')
    write(tmp_path / "all.jsonl.part0", "b", "c", "d", "g")
    write(tmp_path / "all.jsonl.part2", "e", "f")
    write(tmp_path / "all.jsonl.part10", "h")
    (tmp_path / "all.jsonl.partial").write_text("somebody else's")
    results = Results(str(out))
    assert list(results.done) == ["a", "c", "b", "d", "g", "e", "f", "h"]
    results.collect(2)
    assert [json.loads(line)["path"] for line in out.open()] == list("acbdefhg")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["all.jsonl", "all.jsonl.partial"]


def test_parts_of_other_settings_are_refused_and_restart_discards_them(place, tmp_path):
    out, part = tmp_path / "all.jsonl", tmp_path / "all.jsonl.part1"
    part.write_text(json.dumps({"path": "a", "model": "m", "settings": {"weights": "w"}}) + "\n")
    with pytest.raises(ValueError, match="contains results of weights w, not v"):
        Results(str(out)).check({"weights": "v"})
    results = Results(str(out), restart=True)
    results.check({"weights": "v"})
    assert part.exists() and not results.done
    results.collect()
    assert not part.exists() and out.read_bytes() == b""
