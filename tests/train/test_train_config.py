"""A run's configuration: YAML and overrides become one checked tree, or one clear error."""

from pathlib import Path

import pytest
import yaml

from zeroi2v.config import RECIPES
from zeroi2v.train.config import differences, find_config, load_config

CONFIGS = Path(__file__).parents[2] / "zeroi2v" / "train" / "configs"

MINIMAL = {"data": {"train_list": "train.txt"}, "run": {"dir": "runs/test"}}


@pytest.fixture
def load(tmp_path):
    """Loads `values` (YAML text or a dict) with overrides."""

    def load(values, *overrides):
        path = tmp_path / "config.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return load_config(path, overrides)

    return load


def test_minimal_config_has_the_published_training_defaults(load):
    optim = load(MINIMAL).optim
    assert (optim.lr, optim.betas, optim.weight_decay) == (3e-4, (0.9, 0.999), 0.05)
    assert (optim.epochs, optim.warmup_epochs, optim.warmup_start) == (40, 2.5, 0.1)
    assert optim.batch_size == 64


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("vit_*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_file_trains_the_recipe_it_is_named_after(path):
    config = load_config(path)
    assert config.model.video == RECIPES[path.stem].model
    is_ssv2, is_large = "ssv2" in path.stem, "l14" in path.stem
    assert config.optim.epochs == (50 if is_ssv2 else 40)
    assert config.optim.label_smoothing == (0.1 if is_ssv2 else 0.0)
    assert config.optim.backbone_lr_scale == (0.1 if is_large else 1.0)
    assert config.optim.batch_size == (32 if is_large and config.model.num_frames == 32 else 64)
    assert config.augment.erasing == (0.25 if is_ssv2 or "l14_k400" in path.stem else 0.0)
    flips = config.augment.flip_label_map
    assert len(flips) == (6 if is_ssv2 else 0)
    assert all(flips[flips[label]] == label for label in flips)
    assert path.read_text().startswith("# ")
    assert f"--config {path.stem} " in path.read_text()


def test_model_fields_replace_those_of_the_recipe_and_leave_the_others(load):
    config = load(
        MINIMAL,
        "model.recipe=vit_b16_ssv2_16",
        "model.num_classes=20",
        "model.adapter.dropout=0.2",
    )
    ssv2 = RECIPES["vit_b16_ssv2_16"].model
    assert config.model.num_classes == 20
    assert config.model.head_offsets == ssv2.head_offsets
    assert (config.model.adapter.dropout, config.model.adapter.scale) == (0.2, ssv2.adapter.scale)
    assert config.model.video.num_classes == 20


def test_overrides_are_yaml_and_reach_any_depth(load):
    config = load(
        MINIMAL,
        "optim.lr=1e-3",
        "augment=null",
        "model.num_heads=2",
        "model.width=32",
        "model.head_offsets=[-1, 1]",
        "model.adapter=null",
        "model.preprocess.sampling=uniform",
        "run.resume=true",
        "data.root=a=b",
    )
    assert config.optim.lr == 1e-3
    assert config.augment is None
    assert config.model.head_offsets == (-1, 1)
    assert config.model.adapter is None
    assert config.model.preprocess.sampling == "uniform"
    assert config.run.resume is True
    assert config.data.root == "a=b"


def test_number_in_exponent_notation_without_a_dot_is_a_number(load):
    assert load("data: {train_list: t}\nrun: {dir: r}\noptim: {lr: 5e-4}").optim.lr == 5e-4


def test_resolved_config_reads_back_to_the_same_run(load):
    config = load(MINIMAL, "model.recipe=vit_l14_ssv2_32", "augment.flip_label_map={86: 87}")
    assert load(yaml.safe_dump(config.to_dict(), sort_keys=False)) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.leraning_rate=1"], r"unknown config key 'optim.leraning_rate'"),
        (["optim.epoch=1"], r"'optim.epoch': did you mean optim.epochs"),
        (["model.recip=x"], r"'model.recip': did you mean model.recipe"),
        (["optimm.lr=1"], r"unknown config key 'optimm': did you mean optim"),
        (["model.preprocess.intervall=4"], r"'model.preprocess.intervall': did you mean"),
        (["model.recipe=vit_b16_k400"], r"unknown recipe 'vit_b16_k400': did you mean"),
        (["optim.lr"], r"override must read section.key=value: got 'optim.lr'"),
        (["optim..lr=1"], r"override must read section.key=value"),
        (["optim.lr.x=1"], r"optim.lr must be float: got"),
        (["optim.lr=1", "optim.lr.x=1"], r"must name a key: lr has no parts"),
        (["optim.lr=fast"], r"optim.lr must be float: got 'fast'"),
        (["optim.lr=[1"], r"must be valid YAML"),
        (["optim.lr=0"], r"optim.lr must be positive: got 0"),
        (["optim.betas=[0.9, 1]"], r"optim.betas must be in \[0, 1\)"),
        (["optim.warmup_epochs=-1"], r"optim.warmup_epochs must be >= 0: got -1"),
        (["optim.warmup_start=0"], r"optim.warmup_start must be in \(0, 1\]"),
        (["optim.weight_decay=-1"], r"optim.weight_decay must be >= 0"),
        (["optim.label_smoothing=1"], r"optim.label_smoothing must be in \[0, 1\)"),
        (["optim.clip_grad=0"], r"optim.clip_grad must be positive or null"),
        (["optim.precision=int8"], r"optim.precision must be one of \['fp32', 'bf16', 'fp16'\]"),
        (["optim.zero_stage=4"], r"optim.zero_stage must be one of \[0, 1, 2, 3\]"),
        (["optim.precision=bf16", "optim.zero_stage=0"], r"must be 1, 2 or 3 with .* bf16: got 0"),
        (["optim.precision=fp16", "optim.zero_stage=0"], r"must be 1, 2 or 3 with .* fp16: got 0"),
        (["optim.offload=true", "optim.zero_stage=0"], r"with optim.offload: got 0"),
        (["optim.lr_batch=0"], r"optim.lr_batch must be positive: got 0"),
        (["run.resume=maybe"], r"run.resume must be one of \[False, True, 'auto'\]: got 'maybe'"),
        (["data.max_bad_fraction=2"], r"data.max_bad_fraction must be in \[0, 1\]"),
        (["data.workers=-1"], r"data.workers must be >= 0"),
        (["data.train_list=null"], r"data.train_list must be str"),
        (["run.log_every=0"], r"run.log_every must be at least 1"),
        (["model.head_offsets=[0, 1]"], r"head_offsets needs one entry per head: got 2 for 12"),
        (["model.image_size=225"], r"image_size must be a multiple of patch_size 16: got 225"),
        (["model=3"], r"model must be a mapping: got 3"),
    ],
)
def test_bad_value_is_one_line_that_names_it_and_the_rule(load, overrides, message):
    with pytest.raises(ValueError, match=message) as error:
        load(MINIMAL, *overrides)
    assert "\n" not in str(error.value)


def test_missing_key_and_malformed_file_are_named(load):
    with pytest.raises(ValueError, match="config key data.train_list must be given"):
        load({"data": {}, "run": {"dir": "x"}})
    with pytest.raises(ValueError, match="must be a mapping of sections"):
        load("just text")
    with pytest.raises(ValueError, match="must be valid YAML"):
        load("a: [1\nb: 2")
    with pytest.raises(OSError, match="nowhere"):
        load_config("nowhere.yaml")


def test_batch_stays_the_same_on_any_number_of_processes_that_can_share_it(load):
    optim = load(MINIMAL).optim  # 64 clips, 8 at once
    for processes, clips, passes in ((1, 8, 8), (2, 8, 4), (8, 8, 1), (16, 4, 1), (64, 1, 1)):
        assert (optim.clips_at_once(processes), optim.accumulation(processes)) == (clips, passes)
        assert processes * clips * passes == 64
    assert load(MINIMAL, "optim.batch_size=42").optim.clips_at_once(2) == 7  # the most up to 8
    message = r"multiple of the number of processes: got 64 for 3; 1, 2, .*, 64 .* or take 63"
    with pytest.raises(ValueError, match=message):
        optim.accumulation(3)
    with pytest.raises(ValueError, match=r"got 64 for 128; .* or take 128"):
        optim.accumulation(128)


def test_learning_rate_is_scaled_only_when_asked(load):
    assert load(MINIMAL, "optim.batch_size=256").optim.peak_lr == 3e-4
    assert load(MINIMAL, "optim.batch_size=256", "optim.lr_batch=64").optim.peak_lr == 1.2e-3
    assert load(MINIMAL, "optim.batch_size=32", "optim.lr_batch=64").optim.peak_lr == 1.5e-4


def test_only_keys_that_cannot_change_the_weights_may_differ_on_resume(load):
    config = load(MINIMAL)
    same = load(MINIMAL, "run.resume=true", "run.log_every=3", "data.workers=7", "run.max_steps=9")
    assert differences(config, same) == []
    other = load(MINIMAL, "optim.lr=1e-3", "model.adapter=null", "augment=null")
    text = "; ".join(differences(config, other))
    for key in ("optim.lr: 0.0003 -> 0.001", "model.adapter", "augment"):
        assert key in text
    assert differences(config, load(MINIMAL, "run.seed=1")) == ["run.seed: 0 -> 1"]


def test_another_image_size_alone_changes_the_sizes_of_videos_with_it(tmp_path):
    (tmp_path / "config.yaml").write_text(
        "model: {recipe: vit_b16_k400_8x16, image_size: 112}\ndata: {train_list: x}\nrun: {dir: y}"
    )
    pixels = load_config(tmp_path / "config.yaml").model.preprocess
    assert (pixels.val_short_side, pixels.test_short_side) == (128, 112)
    word = "model.preprocess.val_short_side=120"
    assert load_config(tmp_path / "config.yaml", [word]).model.preprocess.val_short_side == 120


def test_a_recipe_is_found_by_its_name_beside_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # as the demo makes it
    assert find_config("demo") == CONFIGS / "demo.yaml"
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "plain").touch()
    for name in ("mine.yaml", "plain", "nowhere.yaml"):
        assert find_config(name) == Path(name)
    with pytest.raises(ValueError, match="unknown config 'vit_b16_k400': did you mean vit_b16_k"):
        find_config("vit_b16_k400")
