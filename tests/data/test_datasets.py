"""The lists datasets come with, and videos kept as folders of images."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from zeroi2v.data.annotations import Sample, class_names, read_list
from zeroi2v.data.frame_cache import read_sample
from zeroi2v.data.frame_folder import read_frame_folder
from zeroi2v.data.packets import DecodeError


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


# UCF101


def ucf101(folder, index="1 Archery\r\n2 Yo\r\n"):
    write(folder / "classInd.txt", index)
    write(folder / "trainlist02.txt", "Archery/v_1.avi 1\r\nYo/v_2.avi 2\r\n\r\n")
    write(folder / "testlist02.txt", "Yo/v_3.avi\r\nArchery/v_4.avi\r\n")
    return folder


def test_ucf101_lists_number_classes_from_zero(tmp_path):
    folder = ucf101(tmp_path)
    train = read_list(folder / "trainlist02.txt", "/v", num_classes=2)
    assert train == [Sample("/v/Archery/v_1.avi", 0), Sample("/v/Yo/v_2.avi", 1)]
    test = read_list(folder / "testlist02.txt", num_classes=2)
    assert test == [Sample("Yo/v_3.avi", 1), Sample("Archery/v_4.avi", 0)]
    assert class_names(folder / "testlist02.txt") == ("Archery", "Yo")


def test_ucf101_videos_may_be_folders_of_images(tmp_path):
    folder = ucf101(tmp_path)
    (tmp_path / "frames/Archery/v_1").mkdir(parents=True)
    train = read_list(folder / "trainlist02.txt", tmp_path / "frames")
    assert [s.path for s in train] == [f"{tmp_path}/frames/{x}" for x in ("Archery/v_1", "Yo/v_2")]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("Yo/v.avi 1", "class of Yo must be 2 as in classInd.txt: got '1'"),
        ("Yo/v.avi 2 2", "class of Yo must be 2 as in classInd.txt: got '2 2'"),
        ("Nope/v.avi 2", "folder must be a class of classInd.txt: got 'Nope'"),
    ],
)
def test_ucf101_lines_must_agree_with_the_class_index(tmp_path, line, rule):
    write(ucf101(tmp_path) / "trainlist02.txt", f"Archery/v.avi 1\r\n\r\n{line}\r\n")
    with pytest.raises(ValueError, match=f"trainlist02.txt line 3: {rule}"):
        read_list(tmp_path / "trainlist02.txt")


def test_ucf101_needs_a_whole_class_index(tmp_path):
    source = ucf101(tmp_path, "1 Archery\n3 Yo\n") / "testlist02.txt"
    with pytest.raises(ValueError, match="classInd.txt line 2: must be '2 ClassName': got '3 Yo'"):
        read_list(source)
    (tmp_path / "classInd.txt").unlink()
    with pytest.raises(OSError, match="testlist02.txt needs UCF101's classInd.txt beside it"):
        read_list(source)


def test_the_real_ucf101_lists_load(clips):
    folder, names = clips / "annotations/ucf101", clips / "annotations/label_maps"
    train = read_list(folder / "trainlist01_excerpt.txt", "v", num_classes=101)
    assert len(train) == 272
    assert train[0] == Sample("v/ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi", 0)
    (juggling,) = {s.label for s in train if "/SoccerJuggling/" in s.path}
    assert juggling == 83
    test = read_list(folder / "testlist01_excerpt.txt", num_classes=101)
    assert len(test) == 140 and not any(s.path.endswith("\r") for s in test)
    map_ = (names / "ucf101_label_map.txt").read_text().split()
    assert list(class_names(folder / "testlist01_excerpt.txt")) == map_
    with pytest.raises(ValueError, match="must have 100 classes, .*: got 101: Apply"):
        read_list(folder / "testlist01_excerpt.txt", num_classes=100)


# HMDB51


def test_hmdb51_splits_give_their_part_of_each_class(tmp_path):
    for name in ("wave", "cart_wheel"):
        for split in "123":
            text = f"{name}_a.avi 1 \n{name}_b.avi 2 \r\n{name}_c.avi 0 \n{name}_d.avi {split} \n"
            write(tmp_path / f"{name}_test_split{split}.txt", text.replace("3", "2"))
    assert read_list(f"{tmp_path}:train1", "/v", 2) == [
        Sample("/v/cart_wheel/cart_wheel_a.avi", 0),
        Sample("/v/cart_wheel/cart_wheel_d.avi", 0),
        Sample("/v/wave/wave_a.avi", 1),
        Sample("/v/wave/wave_d.avi", 1),
    ]
    assert [s.path[-5] for s in read_list(f"{tmp_path}:test3")] == ["b", "d"] * 2
    assert class_names(f"{tmp_path}:test2") == ("cart_wheel", "wave")


def test_hmdb51_mistakes_are_named(tmp_path):
    file = write(tmp_path / "wave_test_split1.txt", "a.avi 1 \nb.avi 3 \n")
    with pytest.raises(ValueError, match="split1.txt line 2: must be 'video.avi 0|1|2': got 'b.av"):
        read_list(f"{tmp_path}:train1")
    with pytest.raises(ValueError, match=r"is one class of an HMDB51 split: give .*:train1"):
        read_list(file)
    with pytest.raises(ValueError, match="must contain files named <class>_test_split2.txt: got"):
        read_list(f"{tmp_path}:train2")
    with pytest.raises(OSError, match="folder of HMDB51 splits not found: nowhere"):
        read_list("nowhere:test1")


def test_the_real_hmdb51_lists_load(clips):
    folder = clips / "annotations/hmdb51"
    for split in "123":
        train, test = (read_list(f"{folder}:{part}{split}", num_classes=2) for part in
                       ("train", "test"))  # fmt: skip
        assert [sum(s.label == k for s in train) for k in (0, 1)] == [70, 70]
        assert [sum(s.label == k for s in test) for k in (0, 1)] == [30, 30]
        assert not {s.path for s in train} & {s.path for s in test}
    assert class_names(f"{folder}:test1") == ("cartwheel", "wave")
    parts = {part: [s.path for s in read_list(f"{folder}:{part}1")] for part in ("train", "test")}
    assert sum("wave/RATRACE" in path for path in parts["train"]) > 0
    assert sum("TrumanShow" in path for path in parts["test"]) > 0
    assert not any("SchoolRules" in path for path in parts["train"] + parts["test"])


# Something-Something V2


def ssv2(folder, rows, labels='{"Holding something": "1", "Doing something": "0"}'):
    write(folder / "something-something-v2-labels.json", labels)
    return write(folder / "train.json", json.dumps(rows, indent=1))


def test_ssv2_json_takes_the_class_of_its_template(tmp_path):
    rows = [
        {"id": "7", "label": "holding a cup", "template": "Holding [something]"},
        {"id": "12", "label": "doing it", "template": "Doing something"},
    ]
    source = ssv2(tmp_path, rows)
    assert read_list(source, "/v", 2) == [Sample("/v/7.webm", 1), Sample("/v/12.webm", 0)]
    assert class_names(source) == ("Doing something", "Holding something")


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ({"id": "8", "template": "Eating [something]"}, r"template must be a class of the labels"),
        ({"id": "8"}, r"must have text for 'id' and 'template' \(the test list has no classes"),
        ({"id": 8, "template": "Doing something"}, r"must have text for 'id' and 'template'"),
    ],
)
def test_ssv2_mistakes_name_the_line(tmp_path, row, rule):
    source = ssv2(tmp_path, [{"id": "7", "template": "Doing [something]"}, row])
    line = 1 + source.read_text().splitlines().index(" {", 2)
    with pytest.raises(ValueError, match=rf"train\.json line {line}: {rule}"):
        read_list(source)


def test_ssv2_files_must_be_json_of_the_right_kind(tmp_path):
    source = ssv2(tmp_path, [])
    with pytest.raises(ValueError, match="must name at least one video: got none"):
        read_list(source)
    write(source, '[\n{"id": "7",}]')
    with pytest.raises(ValueError, match=r"train.json line 2: must be JSON: "):
        read_list(source)
    write(source, '{"id": "7"}')
    with pytest.raises(ValueError, match=r"train.json line 1: must be a list"):
        read_list(source)
    rows = [{"id": "7", "template": "a"}]
    for labels, rule in (
        ('{"a": "1"}', r"must number its classes 0..0, each once"),
        ('["a"]', "must map class names to numbers"),
    ):
        with pytest.raises(ValueError, match=f"labels.json {rule}"):
            read_list(ssv2(tmp_path, rows, labels))
    write(tmp_path / "labels.json", "{}")
    with pytest.raises(OSError, match=r"needs one labels.json .* beside it: got 2"):
        read_list(source)


def test_the_real_ssv2_lists_load(clips):
    folder = clips / "annotations/sthv2"
    train = read_list(folder / "train_format_sample.json", "v", num_classes=174)
    assert train == [Sample("v/78687.webm", 19), Sample("v/166766.webm", 57)]
    answers = read_list(folder / "test-answers_format_sample.csv", "v", num_classes=174)
    assert answers == [Sample("v/3.webm", 16), Sample("v/166766.webm", 57)]
    map_ = (clips / "annotations/label_maps/sthv2_label_map.txt").read_text().splitlines()
    assert list(class_names(folder / "train_format_sample.json")) == map_
    with pytest.raises(ValueError, match="line 2: .*the test list has no classes"):
        read_list(folder / "test_format_sample.json")


# Folders of images


def images(folder, numbers, name="img_{:05}.jpg", size=(8, 6)):
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        Image.new("RGB", size, (number * 10,) * 3).save(folder / name.format(number))
    return folder


def greys(frames):
    return (frames[..., 4, 3, 0] / 10).round().astype(int).tolist()


def test_frame_folders_count_from_their_lowest_number(tmp_path):
    for first, name in ((0, "{:d}.png"), (1, "img_{:05}.jpg"), (3, "frame{:03}.JPEG")):
        folder = images(tmp_path / str(first), range(first, first + 12), name)
        frames = read_frame_folder(folder, lambda n: np.array([[0, n - 1], [10, 2]]))
        assert frames.shape == (2, 2, 6, 8, 3) and frames.dtype == np.uint8
        assert greys(frames) == [[first, first + 11], [first + 10, first + 2]]
        assert greys(read_frame_folder(folder, np.arange, span=(2, 4))) == [
            *range(2 + first, 6 + first)
        ]


def test_kinds_of_images_are_told_apart(tmp_path):
    folder = images(tmp_path, range(1, 4))
    images(folder, range(1, 9), "flow_x_{:05}.jpg")
    images(folder, range(1, 9), "y_{:05}.jpg")
    (folder / "notes.txt").touch()
    assert greys(read_frame_folder(folder, np.arange)) == [1, 2, 3]
    images(folder, range(5, 7), "depth_{:05}.jpg")
    with pytest.raises(DecodeError, match="contains several kinds of images, give filename_tmpl"):
        read_frame_folder(folder, np.arange)
    assert greys(read_frame_folder(folder, np.arange, None, "depth_{:05}.jpg")) == [5, 6]
    assert greys(read_frame_folder(folder, np.arange, None, "img_{:05}.jpg")) == [1, 2, 3]


def test_bad_frame_folders_are_named_with_the_reason(tmp_path):
    def reason(folder, **arguments):
        with pytest.raises(DecodeError, match=f"^{re.escape(str(folder))}: ") as caught:
            read_frame_folder(folder, np.arange, **arguments)
        return str(caught.value)

    folder = images(tmp_path / "a", (1, 2, 4))
    assert "must have each image once: got 3 from 1 to 4" in reason(folder)
    images(folder, (3,))
    assert "must contain the 3 frames after 2 that the list names: got 4 images" in reason(
        folder, span=(2, 3)
    )
    assert "is a folder without images x{}.jpg" in reason(folder, filename_tmpl="x{}.jpg")
    images(folder, (2,), size=(10, 6))
    assert "changes its frames at img_00002.jpg" in reason(folder)
    (folder / "img_00002.jpg").write_bytes(b"no image")
    assert "image img_00002.jpg cannot be decoded" in reason(folder)
    assert "No such file" in reason(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "is a folder without images that are numbered" in reason(tmp_path / "empty")


def test_real_frames_are_those_of_the_image_files(clips, tmp_path):
    folder = clips / "annotations/rawframes/imgs"
    frames = read_frame_folder(folder, np.arange)
    assert frames.shape == (10, 240, 320, 3)
    for i, frame in enumerate(frames, 1):
        theirs = np.asarray(Image.open(folder / f"img_{i:05}.jpg")).astype(int)
        assert np.abs(frame - theirs).mean() < 2
    (sample, _) = read_list(clips / "annotations/mmaction2/rawframe_test_list_with_offset.txt")
    assert np.array_equal(read_frame_folder(folder, np.arange, sample.span), frames[2:7])


def test_samples_that_are_folders_of_images_are_read_as_such(tmp_path):
    folder = str(images(tmp_path / "a", range(1, 8)))
    sample = Sample(folder, 0, span=(2, 4))
    assert greys(read_sample(sample, np.arange, cache=tmp_path / "cache")) == [3, 4, 5, 6]
    with pytest.raises(DecodeError, match="is a folder of images, which have no times"):
        read_sample(Sample(folder, 0, end=1.0), np.arange)


def test_class_folders_may_hold_folders_of_images(tmp_path):
    images(tmp_path / "run/a", range(3))
    images(tmp_path / "walk/b", range(3))
    assert [(s.path, s.label) for s in read_list(tmp_path, num_classes=2)] == [
        (str(tmp_path / "run/a"), 0),
        (str(tmp_path / "walk/b"), 1),
    ]


# Training on them


def test_class_names_travel_into_the_models_config(tmp_path):
    from zeroi2v.train.config import build_dataclass
    from zeroi2v.train.prepare import RunConfig, with_classes

    ucf101(tmp_path / "ucf")
    write(tmp_path / "names.txt", "left\nright\n")
    write(tmp_path / "list.txt", "a.mp4 0\n")

    def labels(**data):
        values = {"model": {"num_classes": 2}, "data": data, "run": {"dir": "x"}}
        return with_classes(build_dataclass(RunConfig, values)).model.labels

    assert labels(train_list=str(tmp_path / "ucf/trainlist02.txt")) == ("Archery", "Yo")
    names = str(tmp_path / "names.txt")
    assert labels(train_list=str(tmp_path / "list.txt"), labels=names) == ("left", "right")
    assert labels(train_list=str(tmp_path / "list.txt")) == ()


def test_long_waits_for_data_are_hinted_at_once(tmp_path, capsys):
    from zeroi2v.train.log import RunLog

    log = RunLog(tmp_path, steps_per_epoch=100, epochs=1, every=5)
    waits = [0.9] * 5 + [0.05] * 5 + [0.2] * 20  # the first steps always wait
    for step, waited in enumerate(waits, 1):
        log.step(step, 8, loss=1.0, lr=1e-3, seconds=1.0, waited=waited)
        assert ("hint" in capsys.readouterr().out) == (step == 15)
    log.close()
