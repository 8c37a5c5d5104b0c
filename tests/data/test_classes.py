"""Classes are matched by name wherever names are known, and lists are read alike by every verb."""

import json
import os
import shutil
import unicodedata
from pathlib import Path

import pytest
from models import build, small_config
from training import arguments, make_data
from videos import write_numbered

from zeroi2v import check_data, cli, evaluate, predict
from zeroi2v.data.annotations import Sample, class_names, read_list, read_videos
from zeroi2v.data.classes import occurrence, read_labels
from zeroi2v.data.video_files import find_videos, left_out
from zeroi2v.train.config import load_config
from zeroi2v.train.main import main as train
from zeroi2v.train.prepare import read_samples, with_classes

TRAINED = ("archery", "chess", "diving", "golf")


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def folders(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        write(root / name / f"{name}.mp4", "")
    return root


def ssv2(root: Path, names: tuple[str, ...]) -> Path:
    labels = {name: str(i) for i, name in enumerate(names)}
    write(root / "labels.json", json.dumps(labels))
    return write(root / "list.json", json.dumps([{"id": n, "template": n} for n in names]))


def ucf101(root: Path, names: tuple[str, ...]) -> Path:
    index = "".join(f"{i} {name}\n" for i, name in enumerate(names, 1))
    write(root / "classInd.txt", index)
    return write(root / "testlist01.txt", "".join(f"{name}/{name}.avi\n" for name in names))


def hmdb51(root: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        write(root / f"{name}_test_split1.txt", f"{name}.avi 2\n")
    return Path(f"{root}:test1")


READERS = {
    "text": lambda root, names: write(
        root / "list.txt", "".join(f"{name}.mp4 {name}\n" for name in names)
    ),
    "csv": lambda root, names: write(
        root / "list.csv", "path,label\n" + "".join(f"{name}.mp4,{name}\n" for name in names)
    ),
    "folder": folders,
    "ucf101": ucf101,
    "hmdb51": hmdb51,
    "ssv2": ssv2,
}


def by_name(samples: list[Sample]) -> dict[str, int]:
    return {Path(sample.path).stem: sample.label for sample in samples}


@pytest.mark.parametrize("kind", READERS)
def test_a_list_of_fewer_classes_keeps_the_numbers_of_the_known_ones(kind, tmp_path):
    source = READERS[kind](tmp_path / "some", ("diving", "golf"))
    assert by_name(read_list(source, classes=TRAINED)) == {"diving": 2, "golf": 3}
    turned = READERS[kind](tmp_path / "all", TRAINED)
    order = tuple(reversed(TRAINED))
    assert by_name(read_list(turned, classes=order)) == {n: i for i, n in enumerate(order)}
    assert class_names(turned) == TRAINED  # without known names the list's order numbers them


@pytest.mark.parametrize("kind", READERS)
def test_an_unknown_class_is_an_error_that_names_it(kind, tmp_path):
    source = READERS[kind](tmp_path / "list", ("archery", "chess", "divng", "golf"))
    with pytest.raises(ValueError, match=r"did you mean 'diving'\?: got 'divng'"):
        read_list(source, classes=TRAINED)


@pytest.mark.parametrize("kind", ["folder", "ucf101", "hmdb51", "ssv2"])
def test_without_known_names_a_list_must_have_all_classes(kind, tmp_path):
    source = READERS[kind](tmp_path / "list", ("diving", "golf"))
    with pytest.raises(ValueError, match="must have 4 classes, .* got 2: diving, golf"):
        read_list(source, num_classes=4)


def test_names_with_accents_are_the_same_however_they_are_composed(tmp_path):
    name = "lancer l'épée"
    folders(tmp_path / "videos", (unicodedata.normalize("NFD", name), "nager"))
    labels = read_labels(write(tmp_path / "labels.txt", f"nager\n{name}\n"))
    assert sorted(by_name(read_list(tmp_path / "videos", classes=labels)).values()) == [0, 1]


def test_names_with_spaces_need_a_tab_in_text_lists(tmp_path):
    classes = ("playing chess", "playing golf")
    tabs = write(tmp_path / "tabs.txt", "a b.mp4\tplaying golf\nc.mp4\tplaying chess\n")
    assert read_list(tabs, classes=classes) == [Sample("a b.mp4", 1), Sample("c.mp4", 0)]
    assert class_names(tabs) == classes
    spaces = write(tmp_path / "spaces.txt", "a.mp4 playing golf\n")
    with pytest.raises(ValueError, match="line 1: class must be one of the 2 known.*got 'golf'"):
        read_list(spaces, classes=classes)


def test_a_number_that_is_the_name_of_another_class_is_refused(tmp_path):
    classes = ("1", "10", "2")  # folders called by numbers, in the order of their names
    source = write(tmp_path / "list.txt", "a.mp4 0\nb.mp4 2\n")
    with pytest.raises(ValueError, match="line 2: label must mean one class: got 2, .*number of"):
        read_list(source, classes=classes[:1] + ("2", "10"))
    with pytest.raises(ValueError, match="line 1: label must mean one class: got 1"):
        read_list(write(tmp_path / "one.txt", "a.mp4 1\n"), classes=classes)
    assert read_list(write(tmp_path / "zero.txt", "a.mp4 0\n"), classes=classes)[0].label == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model of four named classes, and a folder of validation videos of two of them."""
    place = tmp_path_factory.mktemp("place")
    config = small_config().to_dict() | {"num_classes": 4, "labels": TRAINED}
    build(type(small_config()).from_dict(config)).save_pretrained(place / "model")
    for name in ("diving", "golf"):
        (place / "val" / name).mkdir(parents=True)
        write_numbered(place / "val" / name / f"{name}.mp4", 9)
    return place


def test_evaluate_looks_classes_up_in_the_model_and_tells_the_missing(place, tmp_path, capsys):
    argv = [str(place / "model"), "--list", str(place / "val"), "--views", "1x1"]
    assert cli.run(evaluate.main, [*argv, "--out", str(tmp_path / "eval.json")]) == 0
    lines = (tmp_path / "eval_predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [2, 3]
    confusion = json.loads((tmp_path / "eval.json").read_text())["confusion"]
    assert [sum(row) for row in confusion] == [0, 0, 1, 1]
    assert "classes      2 of 4 occur; no video of 'archery', 'chess'" in capsys.readouterr().out
    shutil.copytree(place / "val", tmp_path / "val")
    (tmp_path / "val/golf").rename(tmp_path / "val/gulf")
    argv[2] = str(tmp_path / "val")
    assert cli.run(evaluate.main, argv) == 1
    assert "did you mean 'golf'?: got 'gulf'" in capsys.readouterr().err


def config_of(tmp_path: Path, train_list: Path, *overrides: str):
    write(tmp_path / "config.yaml", "model: {recipe: vit_b16_k400_8x16}")
    words = [f"data.train_list={train_list}", "run.dir=x", *overrides]
    return with_classes(load_config(tmp_path / "config.yaml", words))


def test_training_counts_and_names_the_classes_by_its_list(tmp_path):
    by_folder = config_of(tmp_path, folders(tmp_path / "train", TRAINED))
    assert (by_folder.model.num_classes, by_folder.model.labels) == (4, TRAINED)
    numbers = write(tmp_path / "numbers.txt", "a.mp4 0\nb.mp4 6\n")
    assert config_of(tmp_path, numbers).model.num_classes == 7
    assert config_of(tmp_path, numbers).model.labels == ()
    assert config_of(tmp_path, numbers, "model.num_classes=9").model.num_classes == 9
    labels = write(tmp_path / "labels.txt", "".join(f"{name}\n" for name in "abcdefgh"))
    named = config_of(tmp_path, numbers, f"data.labels={labels}").model
    assert (named.num_classes, named.labels) == (8, tuple("abcdefgh"))
    with pytest.raises(ValueError, match="num_classes must be 8, .*: got 9"):
        config_of(tmp_path, numbers, f"data.labels={labels}", "model.num_classes=9")


def test_validation_during_training_has_the_numbers_of_the_training_list(tmp_path):
    train_list = folders(tmp_path / "train", TRAINED)
    val_list = folders(tmp_path / "val", ("chess", "golf"))
    config = config_of(tmp_path, train_list, f"data.val_list={val_list}")
    assert by_name(read_samples(config)[1]) == {"chess": 1, "golf": 3}
    folders(val_list, ("tennis",))
    with pytest.raises(ValueError, match="class must be one of the 4 known.*: got 'tennis'"):
        read_samples(config)


def test_a_run_tells_which_classes_occur_and_which_files_are_no_videos(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("zeroi2v.train.main.write_report", lambda folder: None)
    data = make_data(tmp_path / "data") if (tmp_path / "data").mkdir() is None else None
    for kind, numbers in (("train", range(16)), ("val", (1, 2, 5))):
        for i in numbers:
            folder = tmp_path / kind / TRAINED[i % 4]
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(data / f"{i}.mp4", folder)
    write(tmp_path / "train/golf/notes.doc", "")
    lists = (f"data.train_list={tmp_path}/train", f"data.val_list={tmp_path}/val")
    train(arguments(data, tmp_path / "run", *lists, "data.root=null", "optim.epochs=1",
                    "optim.warmup_epochs=0", "model.num_classes=null"))  # fmt: skip
    out = capsys.readouterr().out
    assert "classes     train: 4 of 4 occur" in out
    assert "classes     val: 2 of 4 occur; no video of 'archery', 'golf'" in out
    assert f"no videos   train: {tmp_path}/train/golf/notes.doc" in out
    confusion = json.loads((tmp_path / "run/eval.json").read_text())["confusion"]
    assert [sum(row) for row in confusion] == [0, 2, 1, 0]


def test_check_data_names_the_missing_and_the_unknown(place, tmp_path, capsys):
    for name in ("diving", "golf", "archery"):
        shutil.copytree(place / "val/golf", tmp_path / "train" / name)
    shutil.copytree(place / "val/golf", tmp_path / "val/golf")
    shutil.copytree(place / "val/golf", tmp_path / "val/tennis")
    argv = [str(tmp_path / "train"), "--val", str(tmp_path / "val"), "--workers", "1"]
    assert cli.run(check_data.main, [*argv, "--out", str(tmp_path / "manifest.jsonl")]) == 1
    out = capsys.readouterr().out
    assert "problem     --val: 1 classes are not in the list: 'tennis'" in out
    assert "problem     --val: 2 of 3 classes are missing: 'archery', 'diving'" in out
    assert "classes     3 of 3 occur" in out


def test_uneven_and_shifted_labels_are_told():
    assert occurrence([0, 1, 1, 2], 3) == ["3 of 3 occur"]
    lines = occurrence([1] * 12 + [2, 3], 4)
    assert lines[0] == "3 of 4 occur; no video of 0"
    assert "labels start at 1" in lines[1]
    assert lines[2] == "uneven: 12 videos of 1, 1 of 3"
    named = occurrence([1] * 12 + [2, 3], 4, TRAINED)  # nobody counted these
    assert named == [
        "3 of 4 occur; no video of 'archery'",
        "uneven: 12 videos of 'chess', 1 of 'golf'",
    ]
    assert occurrence([2, 3], 6) == ["2 of 6 occur; no video of 0, 1, 4, 5"]


# One reader for all lists


LISTS = {  # file, its bytes, what it names
    "byte order mark": ("list.txt", b"\xef\xbb\xbfv.mp4 0\r\n", ["v.mp4"]),
    "tabs": ("list.txt", b"v.mp4\t0\nw x.mp4\t1\n", ["v.mp4", "w x.mp4"]),
    "names with #": ("list.txt", b"#1_Clip.mp4 0\nv.mp4 1\n", ["#1_Clip.mp4", "v.mp4"]),
    "comments": ("list.txt", b"# of cats\nv.mp4 1\n\n", ["v.mp4"]),
    "line separator": ("list.txt", "a\u2028b.mp4 0\n".encode(), ["a\u2028b.mp4"]),
    "form feed": ("list.txt", b"a\x0cb.mp4 0\n", ["a\x0cb.mp4"]),
    "class names": ("list.txt", b"v.mp4 golf\nw.mp4 chess\n", ["v.mp4", "w.mp4"]),
    "quoted line break": ("list.csv", b'path,label\n"a\nb.mp4",0\n', ["a\nb.mp4"]),
    "quoted comma": ("list.csv", b'path,label\n"a, b.mp4",0\n', ["a, b.mp4"]),
}


@pytest.mark.parametrize("case", LISTS)
def test_every_verb_reads_the_same_videos_from_a_list(case, tmp_path):
    name, content, expected = LISTS[case]
    (tmp_path / name).write_bytes(content)
    paths = [os.path.join("r", path) for path in expected]
    assert [sample.path for sample in read_list(tmp_path / name, "r")] == paths
    assert predict.read_paths(tmp_path / name, "r") == paths


def test_predict_needs_no_labels_in_a_text_list(tmp_path):
    source = write(tmp_path / "list.txt", "\ufeffa b.mp4\n# comment\n#c.mkv\n")
    assert predict.read_paths(source, "r") == ["r/a b.mp4", "r/#c.mkv"]
    assert predict.read_paths(folders(tmp_path / "videos", TRAINED), None)[3].endswith("golf.mp4")
    mixed = write(tmp_path / "mixed.txt", "a.mp4 0\nb c.mp4\nd.mp4\t1\n")
    assert predict.read_paths(mixed, "r") == ["r/a.mp4", "r/b c.mp4", "r/d.mp4"]
    with pytest.raises(ValueError, match="line 2: must end with a label: got 'c.mp4'"):
        read_list(mixed)
    parts = write(tmp_path / "parts.csv", "path,label,start,end\na.mp4,0,1,2\n")
    with pytest.raises(ValueError, match="must name whole videos.*got a.mp4 .from 1.0 to 2.0 s"):
        predict.read_paths(parts, None)


@pytest.mark.parametrize("read", [read_list, read_videos, class_names, read_labels])
def test_a_list_in_another_encoding_is_named(read, tmp_path):
    (tmp_path / "list.txt").write_bytes("épée.mp4 0\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list .*list\.txt must be a UTF-8 text file"):
        read(tmp_path / "list.txt")


def test_labels_files_are_read_as_lists_are(tmp_path):
    source = write(tmp_path / "labels.txt", "\ufeffriding a bike\r\nb\u2028c\r\n\r\n#1\r\n")
    assert read_labels(source) == ("riding a bike", "b\u2028c", "#1")
    with pytest.raises(ValueError, match="must name each class once: got 'a' 2 times"):
        read_labels(write(tmp_path / "twice.txt", "a\nb\na\n"))


def test_a_url_is_refused_as_such(tmp_path):
    url = "https://example.org/v.mp4"
    source = write(tmp_path / "list.txt", f"{url} 0\n")
    for read in (read_list, read_videos):
        with pytest.raises(ValueError, match=f"line 1: must be a file .* got the URL {url}"):
            read(source)
    with pytest.raises(ValueError, match=f"got the URL {url}"):
        find_videos([url])
    assert cli.run(predict.main, ["model", url]) == 1


def test_the_users_folder_may_be_called_by_its_tilde(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "list.txt", "~/v.mp4 0\nw.mp4 1\n")
    assert [s.path for s in read_list("~/list.txt", "~/videos")] == [
        f"{tmp_path}/v.mp4",
        f"{tmp_path}/videos/w.mp4",
    ]
    seen = []
    cli.run(seen.extend, ["~/a", "--out=~/b", "model.backbone=~/c", "x~/d"])
    assert seen == [f"{tmp_path}/a", f"--out={tmp_path}/b", f"model.backbone={tmp_path}/c", "x~/d"]
    yaml = "model: {num_classes: 2}\ndata: {train_list: ~/list.txt, root: ~/videos}\nrun: {dir: x}"
    config = load_config(write(tmp_path / "config.yaml", yaml))
    assert (config.data.train_list, config.data.root) == (
        f"{tmp_path}/list.txt",
        f"{tmp_path}/videos",
    )


def test_what_is_no_video_in_a_folder_is_left_out_and_told(tmp_path):
    root = tmp_path / "videos"
    taken = ("a.mts", "b.3g2", "c.m2v", "d.GIF", "e.mp4")
    for name in (*taken, "._e.mp4", ".hidden.mp4", "notes.txt", "f.mp3"):
        write(root / "golf" / name, "")
    write(root / "readme.md", "")
    paths = [str(root / "golf" / name) for name in taken]
    others = [str(root / "golf/f.mp3"), str(root / "golf/notes.txt"), str(root / "readme.md")]
    assert [sample.path for sample in read_list(root)] == paths
    assert left_out(root) == others
    assert find_videos([str(root)]) == (paths, others)
