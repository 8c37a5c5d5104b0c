"""Deployed files equal the merged model, hold nothing but it, and run no code of others."""

import dataclasses
import json
import os
import subprocess
import sys
import warnings
import zipfile

import numpy as np
import pytest
import torch
from foreign import relative
from loading import mmaction2
from models import build, small_config
from safetensors import safe_open
from safetensors.torch import load_file
from videos import write_numbered

from zeroi2v import evaluate, merge
from zeroi2v.cli import run
from zeroi2v.config import PreprocessConfig
from zeroi2v.export import check_export_path, export, main, program
from zeroi2v.inference import predict
from zeroi2v.reparam import seeded_clips
from zeroi2v.storage.checkpoint import save
from zeroi2v.storage.runtimes import CONFIG_KEY, ExportedModel, OnnxModel, load_deployed

pytest.importorskip("onnxscript", reason="ONNX is not installed: pip install zeroi2v[export]")
SIDES = {"onnx": "onnx", "torch-export": "pt2"}


@pytest.fixture(scope="module")
def merged():
    """Depth 2; heads that read the frame before, two frames on, and beyond the clip's end."""
    offsets = (-1, 2, 2, 16, *[0] * 8)
    config = small_config("vit_b16_ssv2_16", depth=2, head_offsets=offsets, labels=("a",) * 11)
    return merge(build(config))


@pytest.fixture(scope="module")
def files(merged, tmp_path_factory):
    """The model in each format, in fp32."""
    folder = tmp_path_factory.mktemp("exported")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for format, suffix in SIDES.items():
            report = export(merged, format, folder / f"model.{suffix}")
            assert report.rel <= 1e-4 and report.batches == (1, 3)
    return folder


@pytest.mark.parametrize("suffix", SIDES.values())
def test_file_computes_the_merged_model_for_any_batch(merged, files, suffix):
    model = load_deployed(files / f"model.{suffix}")
    assert model.config == merged.config
    for count in (1, 2, 5):
        clips = seeded_clips(merged, count)
        with torch.no_grad():
            assert relative(model.eval()(clips), merged(clips)) <= 1e-4


LOADED_ELSEWHERE = """
import sys, torch
from zeroi2v.storage.runtimes import load_deployed

model = load_deployed(sys.argv[1], "meta")
tensors = [*model.parameters(), *model.buffers()]
assert tensors and all(tensor.is_meta for tensor in tensors)
config = model.config
size = (2, 3, config.num_frames, config.image_size, config.image_size)
assert model(torch.empty(size, device="meta")).is_meta
held = [a for node in model.program.graph.nodes for a in (*node.args, *node.kwargs.values())]
assert "cpu" not in [str(a) for a in held], held
"""


def test_program_is_loaded_onto_another_device_with_all_that_it_holds(files):
    # In a fresh interpreter: something else may have imported what moves it.
    run = [sys.executable, "-c", LOADED_ELSEWHERE, str(files / "model.pt2")]
    done = subprocess.run(run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("suffix", SIDES.values())
def test_file_comes_from_an_adapted_run_by_the_command_line(suffix, tmp_path, capsys):
    adapted = build(small_config("vit_b16_k400_8x16", depth=1))
    save(adapted, tmp_path / "run" / "best")
    format = {v: k for k, v in SIDES.items()}[suffix]
    out = tmp_path / "out" / f"model.{suffix}"
    main([str(tmp_path / "run"), "--format", format, "--out", str(out), "--dtype", "fp16"])
    printed = capsys.readouterr().out
    assert "merged       float32: passed" in printed and "checked      relative error" in printed
    assert os.listdir(out.parent) == [out.name]  # nothing temporary is left
    clips = seeded_clips(adapted, 2)
    with torch.no_grad():
        assert relative(load_deployed(out)(clips), adapted(clips)) <= 2e-2


@pytest.mark.parametrize("format, dtype", [("onnx", None), ("torch-export", torch.bfloat16)])
def test_vit_of_another_lineage_adapted_in_part_is_exported_like_clip(format, dtype, tmp_path):
    shape = dict(depth=2, adapt_from=1, activation="gelu", ln_pre=False, adapter=None)
    model = build(small_config("vit_b16_k400_8x16", **shape))
    path = tmp_path / f"model.{SIDES[format]}"
    report = export(model, format, path, dtype)
    assert report.rel <= report.limit and (report.limit <= 1e-4) == (dtype is None)
    clips = seeded_clips(model, 2)
    with torch.no_grad():
        assert relative(load_deployed(path)(clips), model(clips)) <= (3e-2 if dtype else 1e-4)


@pytest.mark.parametrize("dtype", [None, "fp16"])
@pytest.mark.parametrize("suffix", SIDES.values())
def test_file_with_its_preprocessing_takes_frames_of_any_size(suffix, dtype, tmp_path):
    """It gives what the model gives on MMAction2's pixels, and `predict` and `evaluate` take it."""
    place = tmp_path / "place"
    place.mkdir()
    config = small_config("vit_b16_k400_8x16", depth=1)
    process = dataclasses.replace(config.preprocess, test_views=(2, 3), test_short_side=40)
    model = merge(build(dataclasses.replace(config, preprocess=process)))
    model.save_pretrained(place / "merged")
    format = {v: k for k, v in SIDES.items()}[suffix]
    out, path = place / f"model.{suffix}", str(place / "merged")
    words = [path, "--format", format, "--out", str(out), "--with-preprocess"]
    main(words + (["--dtype", dtype] if dtype else []))
    written, near = load_deployed(out), 1e-4 if dtype is None else 2e-2
    rng = np.random.default_rng(0)
    mean, std = np.array(process.mean), np.array(process.std)
    for batch, height, width in ((1, 50, 90), (3, 77, 40), (2, 33, 33)):
        frames = rng.integers(0, 256, (batch, 8, height, width, 3), dtype=np.uint8)
        views = np.stack([[mmaction2(f, 40, 32, 3) for f in clip] for clip in frames], axis=1)
        views = torch.from_numpy((views - mean) / std).float()  # [8, B, 3, side, side, RGB]
        with torch.no_grad():
            probs = [model(views[:, b].permute(1, 4, 0, 2, 3)) for b in range(batch)]
            want = torch.stack([logits.softmax(-1).mean(0) for logits in probs])
            assert relative(written(torch.from_numpy(frames)), want) <= near
    for i in range(3):
        write_numbered(place / f"{i}.mp4", 60, size=(50 + 20 * i, 70))
    (place / "list.txt").write_text("0.mp4 0\n1.mp4 1\n2.mp4 2\n")
    lines = []
    for source, workers in ((path, 0), (str(out), 0), (str(out), 2))[: 3 if dtype is None else 2]:
        done = tmp_path / f"{len(lines)}.json"
        words = [source, "--list", str(place / "list.txt"), "--root", str(place)]
        assert run(evaluate.main, [*words, "--workers", str(workers), "--out", str(done)]) == 0
        rows = done.with_name(f"{done.stem}_predictions.jsonl").read_text().splitlines()
        lines.append([json.loads(row) for row in rows])
    for native, *others in zip(*lines, strict=True):
        for other in others:
            assert other["top5"] == native["top5"] or dtype
            assert other["probability"] == pytest.approx(native["probability"], rel=near)
    assert run(evaluate.main, [*words, "--views", "2x1"]) == 1
    one = predict(written, [str(place / "0.mp4")], topk=1)[0]["topk"][0]
    assert one["index"] == lines[1][0]["predicted"]
    assert one["probability"] == pytest.approx(lines[1][0]["probability"], abs=1e-5)


def test_program_holds_no_adapter_and_moves_the_shifted_heads_alone(merged):
    graph = program(merged)
    weights = [tensor for _, tensor in graph.named_parameters()]
    assert sum(w.numel() for w in weights) == sum(p.numel() for p in merged.parameters())
    assert not any("adapter" in name for name, _ in graph.named_parameters())
    operators = [node for node in graph.graph.nodes if node.op == "call_function"]
    names = " ".join(str(node.target) for node in operators)
    assert "zeroi2v" not in names
    for copying in ("clone", "copy", "index", "scatter", "gather", "roll", "contiguous"):
        assert copying not in names
    moved = [
        node.meta["val"].shape
        for node in operators
        if str(node.target).startswith("aten.cat") and node.args[1:] == (1,)
    ]
    config = merged.config
    frames, tokens, width = config.num_frames, config.num_tokens, config.head_dim
    one, two = (frames, tokens, 2, width), (frames, tokens, 4, width)  # K and V of 1 and 2 heads
    assert [tuple(shape[1:]) for shape in moved] == [one, two] * config.depth


def test_onnx_file_moves_the_shifted_heads_alone(merged, files):
    import onnx

    graph = onnx.shape_inference.infer_shapes(onnx.load(files / "model.onnx")).graph
    kinds = {node.op_type for node in graph.node}
    assert not kinds & {"ScatterND", "ScatterElements", "Gather", "GatherND", "GatherElements"}
    assert {node.domain for node in graph.node} == {""}  # nothing but standard operators
    shapes = {
        value.name: [d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in graph.value_info
    }
    config = merged.config
    moved = [
        shapes[node.output[0]][1:]
        for node in graph.node
        if node.op_type == "Concat" and len(shapes.get(node.output[0], ())) == 5
        if next(a.i for a in node.attribute if a.name == "axis") == 1
    ]
    one, two = ([config.num_frames, config.num_tokens, n, config.head_dim] for n in (2, 4))
    assert moved == [one, two] * config.depth
    assert not [i.name for i in graph.initializer if "adapter" in i.name]
    held = sum(torch.Size(i.dims).numel() for i in graph.initializer if i.data_type == 1)
    parameters = sum(p.numel() for p in merged.parameters())
    assert parameters <= held < parameters + 100  # and a few constants


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_clip_file_loads_strictly_in_open_clip_and_gives_its_features(suffix, tmp_path):
    from bench.baselines.image_models import open_clip_tower

    config = small_config("vit_b16_ssv2_16", num_heads=1, width=64, head_offsets=(0,), adapter=None)
    model = build(dataclasses.replace(config, num_frames=1))
    with torch.no_grad():
        model.temporal_embedding.zero_()
    path = tmp_path / f"tower.{suffix}"
    assert export(model, "clip", path) is None
    state = load_file(path) if suffix == "safetensors" else torch.load(path, weights_only=True)
    tower = open_clip_tower(config)
    tower.proj = torch.nn.Parameter(torch.zeros(64, 64))
    tower.load_state_dict(state)
    images = seeded_clips(model, 2)[:, :, 0]
    with torch.no_grad():
        assert relative(tower(images), model.features(images[:, :, None])[:, 0]) <= 1e-5
    if suffix == "safetensors":
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()[CONFIG_KEY])["model"]["num_frames"] == 1


def test_file_that_differs_is_not_kept_and_the_old_one_stays(merged, files, tmp_path, monkeypatch):
    import zeroi2v.export as module

    path = tmp_path / "model.pt2"
    path.write_bytes(b"old")
    other = copy_of(merged)
    with torch.no_grad():
        other.head.bias += 1
    monkeypatch.setattr(module, "program", lambda _model: program(other))
    with pytest.raises(ValueError, match="torch-export file not kept: relative error"):
        export(merged, "torch-export", path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["model.pt2"]


def copy_of(model):
    copy = build(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def test_bad_arguments_are_one_line_before_work(merged, tmp_path):
    adapted = build(small_config(depth=1))
    process = PreprocessConfig(antialias=True)
    antialiased = build(small_config(depth=1, adapter=None, preprocess=dataclasses.asdict(process)))
    for arguments, rule in (
        ((adapted, "onnx", tmp_path / "m.onnx"), "model must be merged: it has adapters"),
        ((merged, "onnx", tmp_path / "m.pt2"), r"--out must end in .onnx for format onnx"),
        ((merged, "tflite", tmp_path / "m"), "format must be one of onnx, torch-export, clip"),
        ((merged, "onnx", tmp_path / "m.onnx", torch.bfloat16), "must be fp32 or fp16 for onnx"),
        ((merged, "clip", tmp_path / "m.pt", None, True), "--with-preprocess is for .*: got clip"),
        ((antialiased, "onnx", tmp_path / "m.onnx", None, True), "got bilinear, antialias True"),
    ):
        with pytest.raises(ValueError, match=rule):
            export(*arguments)
    assert not os.listdir(tmp_path)
    assert check_export_path("clip", tmp_path / "a" / "m.pt").parent.is_dir()


class Attack:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def rewritten(source, target, changes):
    """Copies an archive with some members replaced or added, by name without the archive's."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for name in old.namelist():
            if name.partition("/")[2] not in changes:
                new.writestr(name, old.read(name))
        for name, data in changes.items():
            new.writestr(f"{root}/{name}", data)
    return target


def test_program_with_a_pickle_in_it_is_refused_unexecuted(files, tmp_path):
    mark = tmp_path / "mark"
    torch.save(Attack(mark), tmp_path / "attack.pt")
    attack = (tmp_path / "attack.pt").read_bytes()
    with zipfile.ZipFile(files / "model.pt2") as archive:
        name = next(n for n in archive.namelist() if n.endswith("model_weights_config.json"))
        weights = json.loads(archive.read(name))
    next(iter(weights["config"].values()))["use_pickle"] = True
    for changes, rule in (
        ({"data/sample_inputs/model.pt": attack}, "can't be read"),
        ({"data/weights/model.pt": attack}, "contains data/weights/model.pt, which"),
        ({"data/constants/opaque_obj_0": attack}, "contains data/constants/opaque_obj_0"),
        ({"data/weights/model_weights_config.json": json.dumps(weights)}, "asks for a pickle"),
        ({"extra/zeroi2v.json": "{}"}, "has no embedded preprocessing or labels"),
    ):
        path = rewritten(files / "model.pt2", tmp_path / "bad.pt2", changes)
        with pytest.raises(ValueError, match=rule):
            ExportedModel(path)
    assert not mark.exists()


def test_damaged_or_foreign_files_are_one_clear_line(files, tmp_path):
    for suffix, reader in (("onnx", OnnxModel), ("pt2", ExportedModel)):
        whole = (files / f"model.{suffix}").read_bytes()
        path = tmp_path / f"model.{suffix}"
        for size in (0, 100, len(whole) // 2):
            path.write_bytes(whole[:size])
            with pytest.raises(ValueError, match=r"can't be r|has no embedded preprocessing"):
                reader(path)
        with pytest.raises(OSError, match="model not found"):
            load_deployed(tmp_path / f"none.{suffix}")
    with pytest.raises(OSError, match="model folder not found"):
        load_deployed(tmp_path / "none")
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match="must be a folder, an .onnx or a .pt2 file"):
        load_deployed(tmp_path / "model.bin")
