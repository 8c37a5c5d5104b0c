"""No file runs code, whatever reads it; damage of every kind is one clear line."""

import argparse
import json
import os
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from foreign import authors_config, authors_state, save_authors, trained_model
from safetensors.torch import save_file

from zeroi2v import load_foreign
from zeroi2v.bridges.load import load_backbone
from zeroi2v.bridges.mmconfig import Unknown, find, parse_config, read_config
from zeroi2v.bridges.reader import read_source
from zeroi2v.storage.checkpoint import load, save

SSV2 = "vit_b16_ssv2_16"


class Attack:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def attacks(mark):
    """Calls that would write a file: blocked, builtin, hidden in an allowed name, of torch."""
    return [
        Attack(os.system, f"touch {mark}"),
        Attack(open, str(mark), "w"),
        Attack(eval, f"open({str(mark)!r}, 'w')"),
        Attack(getattr, Attack(os.system, f"touch {mark}"), "x"),
        Attack(torch.hub.load_state_dict_from_url, f"file://{mark}"),
    ]


def hide(path, state, attack, where):
    """Saves `state` with the attack in its place of a checkpoint."""
    checkpoint = {"meta": {}, "state_dict": dict(state), "message_hub": {}}
    if where == "beside":
        checkpoint["message_hub"]["loss"] = attack
    else:
        checkpoint["state_dict"]["backbone.ln_post.bias"] = attack
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize("where", ["beside", "inside"])
@pytest.mark.parametrize("number", range(5))
def test_malicious_pickle_is_refused_unexecuted_by_every_reader(tmp_path, number, where):
    mark = tmp_path / "mark"
    state = authors_state(trained_model(SSV2))
    path = hide(tmp_path / "bad.pth", state, attacks(mark)[number], where)
    for read in (load_foreign, lambda p: load_backbone(trained_model(SSV2), p)):
        with pytest.raises(ValueError, match=r"refused without running it|can't be read"):
            read(path)
    assert not mark.exists()


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_malicious_pickle_of_the_old_format_is_refused_unexecuted(tmp_path, protocol):
    mark = tmp_path / "mark"
    path = tmp_path / "old.pth"
    for write in (
        lambda: path.write_bytes(pickle.dumps(Attack(os.system, f"touch {mark}"), protocol)),
        lambda: torch.save(
            {"a": Attack(os.system, f"touch {mark}")}, path, _use_new_zipfile_serialization=False
        ),
    ):
        write()
        for read in (load_foreign, lambda p: load_backbone(trained_model(SSV2), p)):
            with pytest.raises(ValueError, match=r"can't be read|refused without"):
                read(path)
    assert not mark.exists()


def test_history_buffers_are_skipped_whatever_they_hold(tmp_path, monkeypatch):
    trained = trained_model(SSV2)
    text = authors_config(trained, SSV2)
    path = save_authors(tmp_path / "best.pth", authors_state(trained), text, monkeypatch)
    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    assert "mmengine.logging.history_buffer.HistoryBuffer" in names and "builtins.getattr" in names
    source = read_source(path)
    assert source.text == text and len(source.tensors) == len(trained.state_dict())


def test_command_line_kept_beside_the_weights_is_skipped(tmp_path):
    trained = trained_model(SSV2)
    meta = {"cfg": authors_config(trained, SSV2)}
    args = argparse.Namespace(lr=0.1, output=Path("/runs"), betas=(0.9, 0.99))
    torch.save({"meta": meta, "args": args, "state_dict": authors_state(trained)}, tmp_path / "a")
    assert len(read_source(tmp_path / "a").tensors) == len(trained.state_dict())


def test_file_may_be_of_the_format_before_pytorch_1_6(tmp_path):
    trained = trained_model(SSV2)
    checkpoint = {"meta": {"cfg": authors_config(trained, SSV2)}, "state_dict": {}}
    checkpoint["state_dict"] = authors_state(trained)
    torch.save(checkpoint, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert load_foreign(tmp_path / "old.pth").config == load_config_of(trained, tmp_path)


def load_config_of(trained, folder):
    text = authors_config(trained, SSV2)
    return load_foreign(save_authors(folder / "new.pth", authors_state(trained), text)).config


def test_damage_of_every_kind_is_one_clear_line(tmp_path):
    trained = trained_model(SSV2)
    state, text = authors_state(trained), authors_config(trained, SSV2)
    path = save_authors(tmp_path / "best.pth", state, text)
    whole = path.read_bytes()
    for size in (0, 5, 100, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="can't be read"):
            load_foreign(path)
    with pytest.raises(OSError, match="weights file not found"):
        load_foreign(tmp_path / "none.pth")
    with pytest.raises(OSError, match="contains no weights: none of model.safetensors"):
        load_foreign(tmp_path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="must hold a state dict of tensors"):
        load_foreign(path)
    torch.save({"some.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="is of no known format: .* it contains some.weight"):
        load_foreign(path)


def test_truncated_or_inflated_safetensors_are_one_clear_line(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"visual.conv1.weight": torch.ones(4, 3, 2, 2)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="can't be read"):
        load_foreign(path)
    header = {"visual.conv1.weight": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"0000")
    with pytest.raises(ValueError, match="can't be read"):
        load_foreign(path)
    path.write_bytes(struct.pack("<Q", 1 << 50) + b"{}")
    with pytest.raises(ValueError, match="can't be read"):
        load_foreign(path)


def test_shapes_larger_than_their_data_are_refused(tmp_path):
    trained = trained_model(SSV2)
    state, text = authors_state(trained), authors_config(trained, SSV2)
    big = state | {"backbone.conv1.weight": torch.ones(1).expand(1 << 30, 3, 16, 16)}
    with pytest.raises(ValueError, match="claims shape .1073741824, 3, 16, 16., its data are"):
        load_foreign(save_authors(tmp_path / "bomb.pth", big, text))
    path = save_authors(tmp_path / "best.pth", state, text)
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / "zip.pth", "w") as packed:
        for name in plain.namelist():
            data = bytes(1 << 24) if name.endswith("data/0") else plain.read(name)
            packed.writestr(name, data, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="must not be compressed"):
        load_foreign(tmp_path / "zip.pth")
    for name, number in (("999999999", 0), ("7", 1)):
        odd = {n.replace(f"resblocks.{number}.", f"resblocks.{name}."): t for n, t in state.items()}
        with pytest.raises(ValueError, match="blocks must be numbered from 0 on"):
            load_foreign(save_authors(path, odd, text))


def test_weights_that_are_not_finite_are_refused(tmp_path):
    trained = trained_model(SSV2)
    for value in (float("nan"), float("inf")):
        state = {name: tensor.clone() for name, tensor in authors_state(trained).items()}
        state["backbone.ln_post.bias"][3] = value
        path = save_authors(tmp_path / "nan.pth", state, authors_config(trained, SSV2))
        with pytest.raises(ValueError, match="ln_post.bias must be finite: it contains inf or nan"):
            load_foreign(path)


def test_native_folder_with_a_pickle_or_damage_is_refused(tmp_path):
    save(trained_model(SSV2), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    whole, mark = weights.read_bytes(), tmp_path / "mark"
    torch.save({"a": Attack(os.system, f"touch {mark}")}, weights)
    with pytest.raises(ValueError, match="can't be read"):
        load(tmp_path / "model")
    weights.write_bytes(whole[:-8])
    with pytest.raises(ValueError, match="can't be read"):
        load(tmp_path / "model")
    assert not mark.exists()


def test_config_text_evaluates_literals_names_and_bases_alone(tmp_path):
    (tmp_path / "base.py").write_text("model = dict(a=1, b=dict(c=2, d=3))\nkept = (1, -2.5)\n")
    (tmp_path / "top.py").write_text(
        "_base_ = ['base.py', '../absent.py']\nroot = 'data'\nargs = dict(x=root + '/videos')\n"
        "model = dict(b=dict(c=5), e=[dict(type='A', **args), f'{root}_{7}'])\n"
        "lr = 4 * 1e-3 / 2\nbatch = 2 ** 40\nraw = print('x')\nold = dict(_delete_=True, z=None)\n"
    )
    names, absent = read_config(tmp_path / "top.py")
    assert names["model"] == {
        "a": 1,
        "b": {"c": 5, "d": 3},
        "e": [{"type": "A", "x": "data/videos"}, "data_7"],
    }
    assert (names["kept"], names["lr"], absent) == ((1, -2.5), 2e-3, ["../absent.py"])
    assert names["batch"] == Unknown("2 ** 40") and names["old"] == {"z": None}
    with pytest.raises(ValueError, match="x: raw must be a plain value: got print"):
        find(names, "raw", "x")
    with pytest.raises(ValueError, match="x lacks model.f"):
        find(names, "model.f", "x")
    (tmp_path / "loop.py").write_text("_base_ = 'loop.py'")
    with pytest.raises(ValueError, match="must not be its own base"):
        read_config(tmp_path / "loop.py")
    for text in ("model = dict(", "a = " + "(" * 5000, "a = " + "-" * 100000 + "1"):
        with pytest.raises(ValueError, match="config can't be parsed"):
            parse_config(text, "x")
