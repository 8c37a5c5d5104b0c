"""What the pictures show is the attention that the model computes, of the frame that it reads."""

from dataclasses import replace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import build, family_config, small_config
from PIL import Image
from videos import write_numbered
from zeroi2v_kernels.stdha import source_frames

from zeroi2v import visualize
from zeroi2v.cli import run
from zeroi2v.config import ModelConfig, PreprocessConfig
from zeroi2v.drawing.attention_maps import MAX_COLUMNS, Row, draw_grid, draw_strip, lit
from zeroi2v.reparam import merge
from zeroi2v.visualize import attention_maps, parse_query, read_clip, rows_of, token_of, usual_query


@pytest.fixture(scope="module")
def model():
    config = small_config("vit_b16_ssv2_16", num_frames=5, depth=3)
    pixels = PreprocessConfig(sampling="uniform", interval=1, val_short_side=32)
    return build(replace(config, preprocess=pixels))


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "adapted"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_numbered(tmp_path_factory.mktemp("video") / "numbers.mp4", 20, size=(32, 48))


def random_clip(model, seed=0):
    config = model.config
    shape = (1, 3, config.num_frames, config.image_size, config.image_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("token", [0, 3])
def test_maps_times_the_values_of_the_frames_read_are_what_the_attention_module_puts_out(
    model, token
):
    clip, layer = random_clip(model), 2
    weights = attention_maps(model, clip, [layer], token)[layer]
    assert weights.shape == (5, 12, model.config.num_tokens)
    assert torch.allclose(weights.sum(-1), torch.ones(5, 12))

    inputs = []
    block = model.transformer.resblocks[layer]
    handle = block.register_forward_hook(lambda _m, args, _out: inputs.append(args[0]))
    with torch.no_grad():
        model(clip)
        handle.remove()
        x = block.ln_1(inputs[0])
        attn = block.attn
        value = F.linear(attn.in_adapter(x), attn.in_proj_weight, attn.in_proj_bias)
        value = value.unflatten(-1, (3, 12, -1))[0, :, :, 2]  # [T, N, H, D]
        read = torch.stack(
            [
                value[source_frames(5, offset), :, h]
                for h, offset in enumerate(model.config.head_offsets)
            ],
            dim=2,
        )
        out = torch.einsum("t h m, t m h d -> t h d", weights, read).flatten(1)
        expected = attn(x)[0, :, token]
        assert torch.allclose(attn.out_adapter(attn.out_proj(out)), expected, atol=1e-5)


def test_merged_model_looks_where_the_adapted_one_does(model):
    clip = random_clip(model)
    ours, theirs = (attention_maps(m, clip, [0, 2]) for m in (model, merge(model)))
    for layer in (0, 2):
        assert torch.allclose(ours[layer], theirs[layer], atol=1e-5)


def test_each_shifted_head_has_a_row_and_the_spatial_heads_one_for_their_mean(model):
    attention = attention_maps(model, random_clip(model), [1])[1]
    rows = rows_of(attention, model.config, None)
    assert [row.name for row in rows] == [*(f"head {h}" for h in range(4)), "mean of heads 4-11"]
    assert [row.offset for row in rows] == [-1, 1, -2, 2, 0]
    assert [row.sources[0] for row in rows] == [0, 1, 0, 2, 0]
    assert rows[4].patches == pytest.approx(
        attention[:, 4:, 1:].mean(1).unflatten(-1, (2, 2)).numpy()
    )
    chosen = rows_of(attention, model.config, [7, 1])
    assert [(row.name, row.offset) for row in chosen] == [("head 7", 0), ("head 1", 1)]
    assert chosen[1].meaning == "reads the frame after"


def test_the_clip_is_shown_as_the_pixels_that_validation_gives_the_model(model, video):
    clip = read_clip(model, video)
    assert clip.images.shape == (5, 32, 32, 3) and clip.images.dtype == np.uint8
    pixels = model.config.preprocess
    again = (clip.images.astype(np.float32) - pixels.mean) / pixels.std
    error = np.abs(again.transpose(3, 0, 1, 2) - clip.video[0].numpy()) * min(pixels.std)
    assert error.max() <= 0.5 + 1e-3


def cell(picture, columns, row, column, arrows):
    """The pixels of one frame of a picture, from the sizes that the canvas is laid out by."""
    from zeroi2v.drawing.attention_maps import _CELL, _GAP, _LEFT, _TOP

    top = _TOP + row * (_CELL + (58 if arrows else 34)) + (24 if arrows else 0)
    left = _LEFT + column * (_CELL + _GAP)
    return picture[top + 4 : top + _CELL - 4, left + 4 : left + _CELL - 4]


def grey_frames(count):
    """Frame t has grey level 40 + 20 t, so that a picture tells which frame it shows."""
    return np.stack([np.full((32, 32, 3), 40 + 20 * t, np.uint8) for t in range(count)])


def test_each_cell_of_the_grid_shows_the_frame_that_its_head_reads():
    images, even = grey_frames(4), np.full((4, 2, 2), 0.25)
    rows = [Row("head 0", -1, [0, 0, 1, 2], even), Row("head 1", 2, [2, 3, 2, 3], even)]
    picture = draw_grid(images, rows, ("title", "about"), None)
    for t in range(4):
        assert (cell(picture, 4, 0, t, False) == images[t, 0, 0]).all()
        for number, row in enumerate(rows, 1):
            expected = lit(images[row.sources[t]], row.patches[t])[0, 0]
            assert (cell(picture, 4, number, t, False) == expected).all()


def test_the_strip_of_a_long_clip_always_holds_the_query_and_what_it_reads():
    count, images = 11, grey_frames(11)
    peak = np.zeros((count, 2, 2))
    peak[:, 0, 0] = 1.0
    for offset in (-3, 0, 3, 6):
        row = Row("head", offset, source_frames(count, offset), peak)
        for t in range(count):
            picture = draw_strip(images, [row], ("title", "about"), None, t)
            shown = min(count, max(MAX_COLUMNS, 2 * abs(offset) + 2))
            first = int(np.clip(t - shown // 2, 0, count - shown))
            read = cell(picture, shown, 0, row.sources[t] - first, True)
            assert (read == lit(images[row.sources[t]], peak[t])[0, 0]).all(-1).any()
            if row.sources[t] != t:
                assert (cell(picture, shown, 0, t - first, True) == images[t, 0, 0]).all()


def test_light_is_in_proportion_to_attention_and_even_attention_is_dim():
    image = np.full((8, 8, 3), 200, np.uint8)
    attention = np.array([[0.9, 0.0], [0.1, 0.0]])
    shown = lit(image, attention).astype(int).sum(-1)
    assert shown[0, 0] > shown[4, 0] > shown[0, 4] == shown[4, 4]
    assert shown[0, 4] == 3 * 44
    even = lit(image, np.full((2, 2), 0.25)).astype(int).sum(-1)
    assert shown[0, 4] < even[0, 0] < shown[0, 0]


def test_command_writes_a_grid_a_still_and_a_film_of_every_query_frame(
    folder, video, tmp_path, capsys
):
    argv = [str(folder), video, "--out", str(tmp_path), "--layers", "0", "2", "--query", "1,0"]
    assert run(visualize.main, argv) == 0
    output = capsys.readouterr().out
    assert "predicted    class " in output
    names = {f"layer{n}{end}" for n in (0, 2) for end in (".png", "_frame2.png", ".mp4")}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert all(str(tmp_path / name) in output for name in names)
    still = np.asarray(Image.open(tmp_path / "layer2_frame2.png")).astype(int)
    with av.open(str(tmp_path / "layer2.mp4")) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].codec.name == "h264"
    assert len(frames) == 5 * 7
    distance = [np.abs(still[: f.shape[0], : f.shape[1]] - f).mean() for f in frames[3::7]]
    assert int(np.argmin(distance)) == 2 and distance[2] < 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "3"], "--layers must be in 0..2: got 3"),
        (["--heads", "0", "12"], "--heads must be in 0..11: got 12"),
        (["--frame", "5"], "--frame must be in 0..4: got 5"),
        (["--query", "2,0"], "--query must be cls, or ROW,COLUMN in 0..1: got '2,0'"),
        (["--query", "left"], "--query must be cls"),
    ],
)
def test_bad_option_is_one_line_that_names_it_and_the_rule(
    folder, video, tmp_path, capsys, options, message
):
    assert run(visualize.main, [str(folder), video, "--out", str(tmp_path / "o"), *options]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "o").exists()


def test_bad_model_or_video_is_one_line(folder, tmp_path, capsys):
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    for argv, message in (
        ([str(tmp_path / "none"), str(text)], "model folder not found"),
        ([str(folder), str(text)], "can't be decoded"),
        ([str(folder), str(tmp_path / "none.mp4")], "can't be decoded"),
    ):
        assert run(visualize.main, argv) == 1
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


def test_patch_is_row_and_column():
    config = ModelConfig()
    assert parse_query("5, 8", config) == (5, 8)
    assert parse_query("cls", config) is None and usual_query(config) is None
    assert token_of((5, 8), config) == 1 + 5 * 14 + 8
    with pytest.raises(ValueError, match=r"cls, or ROW,COLUMN in 0..13: got '14,0'"):
        parse_query("14,0", config)


def test_a_model_without_class_token_is_asked_by_its_middle_patch():
    config = family_config("SigLIP")
    assert usual_query(config) == (2, 2) and token_of((2, 2), config) == 10
    with pytest.raises(ValueError, match=r"--query must be ROW,COLUMN in 0..3: got 'cls'"):
        parse_query("cls", config)
    registers = family_config("DINOv3")
    assert token_of(None, registers) == 0 and token_of((0, 0), registers) == 5


@pytest.mark.parametrize("family", ["DINOv3", "SigLIP"])
def test_weights_of_other_families_are_those_of_their_patches(family):
    model = build(family_config(family))
    maps = attention_maps(model, random_clip(model), [0], token_of((0, 0), model.config))[0]
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:2]))
    (row, *_) = rows_of(maps, model.config, [0])
    assert row.patches.shape[1:] == (4, 4)
    expected = maps[:, 0, model.config.num_prefix :].unflatten(-1, (4, 4)).numpy()
    assert row.patches == pytest.approx(expected)
