"""Reading lists of labelled videos in their three formats, and what is refused."""

import os

import pytest

from zeroi2v.data.annotations import Sample, class_names, read_list


def write(path, text):
    path.write_bytes(text.encode())
    return path


def test_text_list_takes_the_last_field_as_label(tmp_path):
    text = "a.mp4 3\r\n\r\nwith some  spaces.mp4 0\n   \nsub/b.avi 2 \n\tc.mkv\t1"
    samples = read_list(write(tmp_path / "list.txt", text), root="/videos", num_classes=4)
    assert samples == [
        Sample("/videos/a.mp4", 3),
        Sample("/videos/with some  spaces.mp4", 0),
        Sample("/videos/sub/b.avi", 2),
        Sample("/videos/c.mkv", 1),
    ]


def test_paths_stay_as_they_are_without_a_root(tmp_path):
    source = write(tmp_path / "list.txt", "a.mp4 0\n/abs/b.mp4 1\n")
    assert [s.path for s in read_list(source)] == ["a.mp4", "/abs/b.mp4"]
    assert [s.path for s in read_list(source, root="r")] == ["r/a.mp4", "/abs/b.mp4"]


def test_csv_list_has_optional_times(tmp_path):
    text = '\ufeffpath,label,start,end\r\n"a, b.mp4",1,0.5,2\r\nc.mp4,0,,\nd.mp4,0,,1.5\n'
    assert read_list(write(tmp_path / "list.csv", text), root="v") == [
        Sample("v/a, b.mp4", 1, 0.5, 2.0),
        Sample("v/c.mp4", 0, None, None),
        Sample("v/d.mp4", 0, None, 1.5),
    ]
    assert read_list(write(tmp_path / "short.csv", "label,path\n4,e.mp4\n")) == [Sample("e.mp4", 4)]


def test_class_folders_are_numbered_by_name(tmp_path):
    for name in ("run/b.mp4", "run/a.AVI", "clap/x.mkv", "clap/notes.txt", ".cache/y.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert class_names(tmp_path) == ("clap", "run")
    assert read_list(tmp_path, num_classes=2) == [
        Sample(os.path.join(tmp_path, "clap", "x.mkv"), 0),
        Sample(os.path.join(tmp_path, "run", "a.AVI"), 1),
        Sample(os.path.join(tmp_path, "run", "b.mp4"), 1),
    ]
    with pytest.raises(ValueError, match=r"must have 1 classes, .*: got 2: clap, run"):
        read_list(tmp_path, num_classes=1)
    (tmp_path / "walk").mkdir()
    with pytest.raises(ValueError, match=r"class folder .*walk must contain a video: got none"):
        read_list(tmp_path)


def test_class_names_are_those_of_the_folders_and_text_lists_have_none(tmp_path):
    assert class_names(write(tmp_path / "list.txt", "a.mp4 0")) == ()
    with pytest.raises(ValueError, match="must contain one folder per class: got none"):
        class_names(tmp_path)


def test_lists_of_frame_folders_give_the_frames_to_use(tmp_path):
    plain = write(tmp_path / "plain.txt", "with space 300 1\nx/y.mp4 12 0\n")
    assert read_list(plain, root="/f") == [
        Sample("/f/with space", 1, span=(0, 300)),
        Sample("/f/x/y.mp4", 0, span=(0, 12)),
    ]
    offset = write(tmp_path / "offset.txt", "imgs 2 5 127\r\n")
    assert read_list(offset, "r", filename_tmpl="img_{:05}.jpg") == [
        Sample("r/imgs", 127, span=(2, 5), filename_tmpl="img_{:05}.jpg")
    ]


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("b.mp4 -1", "label must not be negative: got -1"),
        ("b.mp4 5", "label must be below num_classes 5: got 5"),
        ("b.mp4 1.0", "label must be an integer as all labels.*: got '1.0' beside 4"),
        ("just a path.mp4", "must end with a label: got 'path.mp4'"),
        ("b.mp4", "must be 'path label': got 'b.mp4'"),
        ("b.mp4 3 4", "must be 'path label', or as all lines .*; several labels are not supported"),
    ],
)
def test_text_errors_name_list_line_and_rule(tmp_path, line, rule):
    source = write(tmp_path / "list.txt", f"a.mp4 4\n\n{line}\n")
    with pytest.raises(ValueError, match=f"list.txt line 3: {rule}"):
        read_list(source, num_classes=5)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("b.mp4,-1,,", "label must not be negative: got -1"),
        ("b.mp4,9,,", "label must be below num_classes 5: got 9"),
        ("b.mp4,one,,", "label must be an integer as all labels.*: got 'one' beside 0"),
        ("b.mp4,0,2,1", "end must be after start: got 2.0 to 1.0"),
        ("b.mp4,0,,0", "end must be after start: got None to 0.0"),
        ("b.mp4,0,2,2", "end must be after start: got 2.0 to 2.0"),
        ("b.mp4,0,-1,2", "start must be seconds from 0: got '-1'"),
        ("b.mp4,0,0,nan", "end must be seconds from 0: got 'nan'"),
        ("b.mp4,0,soon,", "start must be seconds from 0: got 'soon'"),
        ("b.mp4,0", "must have 4 fields: path,label,start,end"),
        ("b.mp4,0,0,1,2", "must have 4 fields: path,label,start,end"),
        (",0,0,1", "must have 4 fields: path,label,start,end"),
    ],
)
def test_csv_errors_name_list_line_and_rule(tmp_path, line, rule):
    source = write(tmp_path / "list.csv", f"path,label,start,end\na.mp4,0,,\n{line}\n")
    with pytest.raises(ValueError, match=f"list.csv line 3: {rule}"):
        read_list(source, num_classes=5)


@pytest.mark.parametrize("header", ["", "path", "path,label,stop", "path,label,label", "a.mp4,0"])
def test_a_csv_header_must_name_path_and_label(tmp_path, header):
    source = write(tmp_path / "list.csv", f"{header}\na.mp4,0,1\n")
    with pytest.raises(ValueError, match=r"list\.csv line 1: the header must be path,label with"):
        read_list(source)


def test_missing_empty_and_binary_lists_are_refused(tmp_path):
    with pytest.raises(OSError, match=r"nowhere\.txt"):
        read_list(tmp_path / "nowhere.txt")
    for name, text in (("list.txt", "\n \n"), ("list.csv", "path,label\n")):
        with pytest.raises(ValueError, match=f"{name} must name at least one video: got none"):
            read_list(write(tmp_path / name, text))
    (tmp_path / "video.mp4").write_bytes(b"\x00\xff\xfe\x80")
    with pytest.raises(ValueError, match=r"video\.mp4 must be a UTF-8 text file"):
        read_list(tmp_path / "video.mp4")


def test_real_lists_are_read_whole(clips):
    folder = clips / "annotations"
    asl = read_list(folder / "tiny/asl20_k400style.txt", root=clips, num_classes=20)
    assert [s.label for s in asl] == list(range(20))
    assert all(os.path.isfile(s.path) for s in asl)

    k400 = read_list(folder / "kinetics400/val_small_videos.list", root="k", num_classes=400)
    assert len(k400) == 128
    assert k400[0] == Sample("k/abseiling/_4YTwq0-73Y_000044_000054.mp4", 0)

    videos = read_list(folder / "mmaction2/video_test_list.txt", root=clips)
    assert videos == [Sample(str(clips / "test.mp4"), 0)] * 2

    frames = read_list(folder / "kinetics400/val_small_frames.list", num_classes=400)
    assert len(frames) == 200
    assert frames[1] == Sample("abseiling/_EDt9CNqqxk_000260_000270.mp4", 0, span=(0, 250))
    for name, span in (("", (0, 5)), ("_with_offset", (2, 5))):
        frames = read_list(folder / f"mmaction2/rawframe_test_list{name}.txt", clips)
        assert frames == [Sample(str(clips / "imgs"), 127, span=span)] * 2


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("video_test_list_multi_label.txt", "line 1: .* several labels are not supported: got 'te"),
        ("rawframe_test_list_multi_label.txt", "line 2: .* several labels are not supported: got"),
        ("rawvideo_test_anno.json", "needs one labels.json .* beside it: got 0"),
    ],
)
def test_lists_of_several_labels_are_refused(clips, name, rule):
    with pytest.raises((ValueError, OSError), match=f"{name} {rule}"):
        read_list(clips / "annotations" / "mmaction2" / name)


def test_a_video_file_with_two_labels_is_not_taken_for_a_folder(tmp_path):
    (tmp_path / "a.mp4").touch()
    with pytest.raises(ValueError, match="line 1: a video must have one label: got 'a.mp4 3 4'"):
        read_list(write(tmp_path / "list.txt", "a.mp4 3 4"), root=tmp_path)
    with pytest.raises(ValueError, match="line 1: .* total of at least 1; .*: got 'a 0 4'"):
        read_list(write(tmp_path / "list.txt", "a 0 4"), root=tmp_path)
