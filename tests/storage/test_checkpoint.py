"""Native folders: what is saved is what is loaded, and nothing unfit is."""

import json
import pickle

import pytest
import torch
from models import build, small_config
from safetensors.torch import load_file, save_file

from zeroi2v import VideoViT, merge
from zeroi2v.bridges.load import load_backbone
from zeroi2v.config import ModelConfig
from zeroi2v.storage.checkpoint import (
    CONFIG,
    WEIGHTS,
    load,
    model_folder,
    save,
    weights_hash,
)


@pytest.fixture
def folder(tmp_path):
    build(small_config(labels=tuple(f"class {i}" for i in range(11)))).save_pretrained(
        tmp_path / "m"
    )
    return tmp_path / "m"


def edit_config(folder, **changes):
    values = json.loads((folder / CONFIG).read_text())
    values["model"].update(changes)
    (folder / CONFIG).write_text(json.dumps(values))


def edit_tensors(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_a_saved_model_loads_with_equal_config_and_tensors(folder):
    model = VideoViT.from_pretrained(folder)
    original = build(model.config)
    assert model.config.labels[3] == "class 3" and not model.training
    for name, tensor in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    assert "pipeline_tag: video-classification" in (folder / "README.md").read_text()


def test_saving_over_a_model_replaces_it_and_leaves_no_debris(folder):
    merged = merge(load(folder))
    merged.save_pretrained(folder)
    assert load(folder).config.adapter is None
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_a_failing_save_leaves_the_old_model(folder, monkeypatch):
    before = (folder / WEIGHTS).read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("zeroi2v.storage.checkpoint.save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save(build(small_config(), seed=1), folder)
    assert (folder / WEIGHTS).read_bytes() == before
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_merged_folder_has_clips_names_and_no_others(folder):
    names = set(merge(load(folder)).state_dict())
    block = ["ln_1", "ln_2", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"]
    expected = {"conv1.weight", "class_embedding", "positional_embedding", "temporal_embedding"}
    expected |= {f"{n}.{k}" for n in ("ln_pre", "ln_post", "head") for k in ("weight", "bias")}
    for i in range(2):
        prefix = f"transformer.resblocks.{i}."
        expected |= {f"{prefix}{n}.{k}" for n in block for k in ("weight", "bias")}
        expected |= {f"{prefix}attn.in_proj_weight", f"{prefix}attn.in_proj_bias"}
    assert names == expected


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            dict(depth=3),
            r"lacks transformer.resblocks.2.ln_1.weight.* and \d+ more, which",
        ),
        (dict(depth=1), r"contains transformer.resblocks.1.* which its config has no place for"),
        (dict(adapter=None), r"contains transformer.resblocks.0.attn.in_adapter.* no place for"),
        (dict(num_classes=12, labels=[]), r"head.weight has shape \[11, 48\], its config asks for"),
        (dict(num_frames=8), r"temporal_embedding has shape \[16, 48\]"),
        (dict(head_offsets=[1, 0]), r"head_offsets needs one entry per head: got 2 for 12 heads"),
        (dict(num_clases=3), r"unknown config key 'num_clases': did you mean num_classes"),
        (dict(width="48"), r"width must be int: got '48'"),
        (dict(labels=["a"]), r"labels needs one name per class: got 1 for 11 classes"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_config_that_contradicts_its_tensors_is_an_error(folder, changes, message):
    edit_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_missing_unexpected_and_integer_tensors_are_errors(folder):
    edit_tensors(folder, lambda t: t.pop("ln_pre.bias"))
    with pytest.raises(ValueError, match="lacks ln_pre.bias"):
        load(folder)
    edit_tensors(folder, lambda t: t.update({"ln_pre.bias": torch.zeros(48, dtype=torch.int64)}))
    with pytest.raises(ValueError, match=r"ln_pre.bias must be floating point: got torch.int64"):
        load(folder)
    edit_tensors(
        folder, lambda t: t.update({"ln_pre.bias": torch.zeros(48), "extra": torch.ones(1)})
    )
    with pytest.raises(ValueError, match="contains extra"):
        load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_an_error(folder, value, dtype):
    def spoil(tensors):
        tensors["ln_pre.bias"] = tensors["ln_pre.bias"].to(dtype)
        tensors["ln_pre.bias"][7] = value

    edit_tensors(folder, spoil)
    with pytest.raises(ValueError, match="ln_pre.bias must be finite: it contains inf or nan"):
        load(folder)


def test_damaged_files_are_errors(folder, tmp_path):
    whole = (folder / WEIGHTS).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"not safetensors at all"):
        (folder / WEIGHTS).write_bytes(damaged)
        with pytest.raises(ValueError, match=r"weights file can't be read: .*model.safetensors"):
            load(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="must be JSON"):
        load(folder)
    (folder / CONFIG).write_text("[]")
    with pytest.raises(ValueError, match='must have "format": "zeroi2v"'):
        load(folder)
    with pytest.raises(FileNotFoundError, match="model folder not found"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"contains no model: config.json is missing"):
        load(tmp_path)


def test_a_run_folder_gives_its_best_model(folder, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(FileNotFoundError, match="neither a model folder nor a run folder"):
        model_folder(run)
    folder.rename(run / "last")
    assert model_folder(run) == run / "last"
    load(run / "last").save_pretrained(run / "best")
    assert model_folder(run) == run / "best"


@pytest.mark.parametrize("layout", ["folder", "safetensors", "pt", "clip.pt"])
def test_backbone_loads_from_clip_layouts_and_leaves_the_rest(tmp_path, layout):
    image = build(small_config(adapter=None, head_offsets=(0,) * 12, num_frames=1), seed=1)
    state = {n: t for n, t in image.state_dict().items() if not n.startswith(("temporal", "head"))}
    if layout == "folder":
        path = tmp_path / "image"
        image.save_pretrained(path)
    elif layout == "safetensors":
        path = tmp_path / "image.safetensors"
        save_file(state, path)
    else:
        path = tmp_path / "image.pt"
        if layout == "clip.pt":  # a whole CLIP: prefixed, with a projection and a text tower
            state = {f"visual.{n}": t for n, t in state.items()}
            state |= {"visual.proj": torch.ones(48, 8), "token_embedding.weight": torch.ones(9, 8)}
        torch.save(state, path)
    video = build(small_config(), seed=2)
    before = {n: t.clone() for n, t in video.state_dict().items()}
    load_backbone(video, path)
    for name, tensor in video.state_dict().items():
        source = image.state_dict() if name in image.state_dict() else before
        source = before if name.startswith(("temporal", "head")) else source
        assert torch.equal(tensor, source[name]), name


def test_backbone_may_be_a_run_or_the_weights_file_of_a_native_folder(tmp_path):
    image = build(small_config(adapter=None), seed=1)
    image.save_pretrained(tmp_path / "run" / "best")
    for path in (tmp_path / "run", tmp_path / "run" / "best" / WEIGHTS):
        video = build(small_config(), seed=2)
        assert load_backbone(video, path) == []
        assert torch.equal(video.conv1.weight, image.conv1.weight)


def test_a_folder_of_another_library_is_not_overwritten(tmp_path):
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / CONFIG).write_text('{"model_type": "clip"}')
    with pytest.raises(ValueError, match="output folder must be empty or contain a model"):
        build(small_config()).save_pretrained(tmp_path / "hf")
    assert (tmp_path / "hf" / CONFIG).read_text() == '{"model_type": "clip"}'


def test_an_unfit_backbone_is_an_error_and_changes_nothing(tmp_path):
    video = build(small_config())
    before = {n: t.clone() for n, t in video.state_dict().items()}
    build(small_config("vit_b16_k400_8x16", mlp_ratio=2.0)).save_pretrained(tmp_path / "adapted")
    with pytest.raises(ValueError, match="merge it first, to train new adapters on it"):
        load_backbone(video, tmp_path / "adapted")
    build(small_config(adapter=None, mlp_ratio=2.0)).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"mlp.c_fc.weight has shape \[96, 48\]"):
        load_backbone(video, tmp_path / "narrow")
    build(small_config(adapter=None, activation="gelu")).save_pretrained(tmp_path / "gelu")
    with pytest.raises(ValueError, match=r"has activation 'gelu', the model 'quick_gelu'"):
        load_backbone(video, tmp_path / "gelu")
    with pytest.raises(FileNotFoundError, match="weights file not found"):
        load_backbone(video, tmp_path / "nothing.pt")
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(ValueError, match="weights file can't be read"):
        load_backbone(video, tmp_path / "text.pt")
    for name, tensor in video.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_pickle_that_would_run_code_is_refused_unexecuted(tmp_path):
    target = tmp_path / "written"

    class Malicious:
        def __reduce__(self):
            return open, (str(target), "w")

    for name in ("raw.pt", "zip.pt"):
        path = tmp_path / name
        if name == "raw.pt":
            path.write_bytes(pickle.dumps({"conv1.weight": Malicious()}))
        else:
            torch.save({"conv1.weight": Malicious()}, path)
        with pytest.raises(ValueError, match=r"weights file can't be read|refused without running"):
            load_backbone(build(small_config()), path)
        assert not target.exists()


def test_config_round_trips_through_json():
    for config in (small_config(), small_config(adapter=None, labels=tuple("abcdefghijk"))):
        assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_hash_of_weights_is_of_names_dtypes_shapes_and_values(tmp_path):
    model = build(small_config())
    model.save_pretrained(tmp_path / "saved")
    state = model.state_dict()
    whole = weights_hash(state)
    assert weights_hash(dict(reversed(load(tmp_path / "saved").state_dict().items()))) == whole
    name = "head.weight"
    (tensor, rest) = state[name], {n: t for n, t in state.items() if n != name}
    bumped = tensor.clone()
    bumped[-1, -1] += 1e-6
    others = [
        rest,
        rest | {"head.weights": tensor},
        rest | {name: tensor.reshape(-1)},
        rest | {name: tensor.view(torch.int32)},
        rest | {name: tensor.bfloat16()},
        rest | {name: bumped},
    ]
    assert len({whole, *map(weights_hash, others)}) == 7
