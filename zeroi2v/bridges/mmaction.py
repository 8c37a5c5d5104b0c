"""MMAction2 training configs (.py) of ZeroI2V models, turned into our YAML: parsed, never executed.

What has a counterpart is taken over; what has none is told, one note each, and stands as a comment
in the file. See docs/migration.md for the table.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from zeroi2v.bridges.authors import model_fields
from zeroi2v.bridges.mmconfig import Unknown, find, read_config
from zeroi2v.files import write_whole

# Sections that say how to log, save and distribute; ours do so by themselves.
_RUNTIME = """default_scope default_hooks env_cfg log_processor vis_backends visualizer log_level
load_from resume launcher work_dir randomness dist_params find_unused_parameters custom_hooks
custom_imports data_prefix file_client_args dataset_type data_root data_root_val ann_file_train
ann_file_val ann_file_test train_pipeline val_pipeline test_pipeline train_dataloader
val_dataloader test_dataloader val_evaluator test_evaluator train_cfg val_cfg test_cfg
auto_scale_lr optim_wrapper param_scheduler accumulative_counts model split""".split()


def convert_config(path: str | Path, out: str | Path) -> list[str]:
    """Writes the config at `path` as YAML to `out`, and returns what had no counterpart.

    Raises:
        OSError: no such config, or `out` can't be written.
        ValueError: it can't be parsed, is of another model than ZeroI2V's, or lacks what has no
            default.
    """
    out = Path(out)
    if out.suffix not in (".yaml", ".yml"):
        raise ValueError(f"--out must be a .yaml file for a config: got {out}")
    config, absent = read_config(path)
    where, notes = str(path), [f"base file is not there: {name}" for name in absent]
    sections = {
        "model": _model(config, where),
        "data": _data(config, where, notes),
        "augment": _augment(config, where, notes),
        "optim": _optim(config, where, notes),
        "run": {"dir": f"runs/{Path(path).stem}"},
    }
    for name in config:
        if name not in _RUNTIME and not name.endswith("flip_label_map"):
            notes.append(f"{name} has no counterpart: left out")
    lines = [
        f"# From {Path(path).name} by `zeroi2v convert`; expected top-1: not yet measured.",
        "# Set model.backbone to CLIP's weights, and data.root to the folder of videos.",
        *(f"# {' '.join(note.split())}" for note in notes),
    ]
    text = "\n".join(lines) + "\n" + yaml.safe_dump(sections, sort_keys=False)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, text)
    return notes


def _model(config: dict[str, Any], where: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"activation": "quick_gelu"}
    for key, value in model_fields(config, where).items():
        value = list(value) if isinstance(value, tuple) else value
        section, _, name = key.partition(".")
        if name:
            fields.setdefault(section, {})[name] = value
        else:
            fields[key] = value
    fields.setdefault("adapter", None)  # the class of merged models
    return fields


def _data(config: dict[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    section = {}
    for ours, theirs in (("train_list", "train_dataloader"), ("val_list", "val_dataloader")):
        value = find(config, f"{theirs}.dataset.ann_file", where, None)
        if value is not None:
            section[ours] = value
    if "train_list" not in section:
        raise ValueError(f"{where} lacks train_dataloader.dataset.ann_file")
    for ours, theirs in (("root", "train_dataloader"), ("val_root", "val_dataloader")):
        prefix = find(config, f"{theirs}.dataset.data_prefix", where, {})
        root = prefix.get("video", prefix.get("img"))
        if isinstance(root, str) and root != section.get("root"):
            section[ours] = root
    kind = find(config, "train_dataloader.dataset.type", where, "VideoDataset")
    if kind not in ("VideoDataset", "RawframeDataset"):
        notes.append(f"dataset type {kind} is read as a list of videos")
    io_backend = find(config, "file_client_args.io_backend", where, "disk")
    if io_backend != "disk":
        notes.append(f"io_backend {io_backend}: videos are read from disk")
    return section


def _steps(config: dict[str, Any], name: str, where: str) -> list[dict[str, Any]]:
    pipeline = find(config, name, where, None)
    if pipeline is None:
        pipeline = find(config, "train_dataloader.dataset.pipeline", where, [])
    return [step for step in pipeline if isinstance(step, dict)]


def _augment(config: dict[str, Any], where: str, notes: list[str]) -> dict[str, Any] | None:
    known = "DecordInit DecordDecode PyAVInit PyAVDecode OpenCVInit OpenCVDecode RawFrameDecode "
    known += "SampleFrames UniformSample Resize FormatShape PackActionInputs CenterCrop"
    section: dict[str, Any] = {"rand_augment_ops": 0, "flip": 0.0}
    random_crop = False
    for step in _steps(config, "train_pipeline", where):
        kind = step.get("type")
        if kind == "PytorchVideoWrapper" and step.get("op") == "RandAugment":
            section["rand_augment_ops"] = step.get("num_layers", 2)
            section["rand_augment_magnitude"] = step.get("magnitude", 7)
        elif kind == "RandomResizedCrop":
            random_crop = True
            section["crop_scale"] = list(step.get("area_range", (0.08, 1.0)))
            section["crop_ratio"] = list(step.get("aspect_ratio_range", (3 / 4, 4 / 3)))
        elif kind == "Flip":
            section["flip"] = float(step.get("flip_ratio", 0.5))
            if isinstance(labels := step.get("flip_label_map"), dict) and labels:
                section["flip_label_map"] = labels
        elif kind == "RandomErasing":
            section["erasing"] = float(step.get("erase_prob", 0.5))
        elif kind not in known.split():
            notes.append(f"training step {kind} has no counterpart: left out")
    if random_crop:
        return section
    notes.append("training has no RandomResizedCrop: random augmentation is turned off")
    return None


def _optim(config: dict[str, Any], where: str, notes: list[str]) -> dict[str, Any]:
    def get(name: str, default: Any = None) -> Any:
        return find(config, name, where, default)

    if (kind := get("optim_wrapper.optimizer.type", "AdamW")) != "AdamW":
        notes.append(f"optimizer {kind} is read as AdamW")
    section: dict[str, Any] = {
        "lr": get("optim_wrapper.optimizer.lr"),
        "betas": list(get("optim_wrapper.optimizer.betas", (0.9, 0.999))),
        "weight_decay": get("optim_wrapper.optimizer.weight_decay", 0.05),
        "backbone_lr_scale": get("optim_wrapper.paramwise_cfg.backbone.lr_mult", 1.0),
        "epochs": get("train_cfg.max_epochs"),
        "label_smoothing": get("model.cls_head.label_smooth_eps", 0.0),
        "clip_grad": get("optim_wrapper.clip_grad.max_norm"),
        "batch_size": get("auto_scale_lr.base_batch_size"),
        "micro_batch": get("train_dataloader.batch_size"),
        "warmup_epochs": 0.0,
    }
    schedules = get("param_scheduler", [])
    for step in schedules if isinstance(schedules, list) else []:
        kind = None if isinstance(step, Unknown) else step.get("type")
        if kind == "LinearLR" and step.get("by_epoch", True):
            section["warmup_epochs"] = float(step["end"])
            section["warmup_start"] = step.get("start_factor", 1 / 3)
        elif kind == "CosineAnnealingLR" and not step.get("eta_min", 0):
            continue
        else:
            notes.append(f"schedule {kind} is read as cosine decay to zero")
    if section["batch_size"] is None:
        notes.append("batch_size over all GPUs is not in the config (auto_scale_lr): ours is 64")
    else:
        notes.append(f"batch_size {section['batch_size']} is that of auto_scale_lr, over all GPUs")
    if "Amp" in str(get("optim_wrapper.type", "")):
        notes.append("mixed precision in fp16 there: set optim.precision, else all is in fp32")
    clip = section["clip_grad"]
    return {k: v for k, v in section.items() if v is not None or (k == "clip_grad" and clip)}
