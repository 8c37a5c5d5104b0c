"""What a training run is: a frozen dataclass tree, read from YAML and `section.key=value` words.

    model:   {recipe: vit_b16_k400_8x16, backbone: weights/vit_b16.safetensors, num_classes: 20}
    data:    {train_list: lists/train.txt, val_list: lists/val.txt, root: videos}
    augment: {rand_augment_ops: 4, erasing: 0.25}          (or null: no random augmentation)
    optim:   {batch_size: 64, micro_batch: 8}
    run:     {dir: runs/first}

Besides `recipe` and `backbone`, section `model` takes every field of `zeroi2v.config.ModelConfig`;
they replace those of the recipe. Overrides are parsed as YAML: `model.head_offsets=[-1,1,0,0]`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import yaml

from zeroi2v.config import ModelConfig, build_dataclass, flat, recipe, require, unknown_name
from zeroi2v.data.pipeline import AugmentConfig
from zeroi2v.model.training_block import Memory

CONFIGS = Path(__file__).parent / "configs"
"""A file for each published recipe, and the demo's."""

# Keys that may differ between a run and its resumption: none of them changes the weights.
FREE_ON_RESUME = {
    "run.dir",
    "run.resume",
    "run.log_every",
    "run.save_every",
    "run.max_steps",
    "run.wandb",
    "data.workers",
    "data.timeout",
    "data.cache",
    "data.cache_tokens",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection(ModelConfig):
    """Which model is trained, and from what it starts: a `ModelConfig` and two keys."""

    num_classes: int | None = None
    """Size of the classifier's output; None: as many as `labels` or the training list have."""
    recipe: str | None = None
    """Published recipe whose model takes the place of `ModelConfig`'s defaults."""
    backbone: str | None = None
    """Image weights of any known format (docs/backbones.md), or a model of ours; None: random."""

    @property
    def video(self) -> ModelConfig:
        """The model alone; its classes must have been counted (`prepare.with_classes`)."""
        return ModelConfig(**{f.name: getattr(self, f.name) for f in fields(ModelConfig)})


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which videos are trained on and validated on."""

    train_list: str
    """Text list, CSV, folder-per-class directory or a dataset's own list (docs/datasets)."""
    val_list: str | None = None
    """The same for validation; None: no validation, and no `best/`."""
    root: str | None = None
    """Folder that the paths of the lists start from."""
    val_root: str | None = None
    """The same for `val_list`; None: `root`."""
    labels: str | None = None
    """Text file of class names, one a line in index order; None: those of the list, if any."""
    workers: int | None = None
    """Processes that decode for each training process; None: sized from the machine."""
    max_bad_fraction: float = 0.01
    """Share of the videos that may fail to decode before the run stops."""
    timeout: float | None = 60.0
    """Seconds after which a video that is still being decoded counts as bad; None: no limit."""
    manifest: str | None = None
    """What `check_data` wrote; training videos that it knows to be bad are left out."""
    decoder: Literal["auto", "dali", "pyav"] = "auto"
    """`pyav`: PyAV decodes; `auto`: on a GPU, through DALI, its hardware decodes what it can of the
    videos that `manifest` knows to be whole; `dali`: of all, though it does not notice damage."""
    cache: str | None = None
    """Folder to keep whole decoded videos in, about 260 kB a frame; for small datasets."""
    filename_tmpl: str | None = None
    """Names of the images of videos kept as folders of them, as `img_{:05}.jpg`; None: found."""
    shots: int | None = None
    """Training videos of each class, drawn by `run.seed`, to train on; None: all."""
    clips_per_video: int | None = None
    """Different clips of a training video, augmentation included, drawn by `run.seed`, which the
    epochs take in turn; None: every epoch draws anew."""
    cache_tokens: str | None = None
    """Folder to keep what the blocks before `model.adapt_from` make of the clips in, so that it is
    computed once; needs `clips_per_video` and no augmentation."""

    def __post_init__(self):
        require(
            self.workers is None or self.workers >= 0, "data.workers", "must be >= 0", self.workers
        )
        require(
            self.timeout is None or self.timeout > 0,
            "data.timeout",
            "must be positive or null",
            self.timeout,
        )
        require(
            0 <= self.max_bad_fraction <= 1,
            "data.max_bad_fraction",
            "must be in [0, 1]",
            self.max_bad_fraction,
        )
        for name in ("shots", "clips_per_video"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"data.{name}", "must be at least 1", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW with linear warm-up and cosine decay to zero; the defaults are the published ones."""

    lr: float = 3e-4
    """Peak learning rate."""
    lr_batch: int | None = None
    """Batch that `lr` was chosen for: it is scaled by `batch_size / lr_batch`; None: not scaled."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    weight_decay: float = 0.05
    """Decoupled weight decay; embeddings and LayerNorms have none."""
    backbone_lr_scale: float = 1.0
    """Factor on the learning rate of everything trained but the head (0.1 for ViT-L)."""
    epochs: int = 40
    """Passes over the training list."""
    warmup_epochs: float = 2.5
    """Length of the linear warm-up, in epochs; at most half of them."""
    warmup_start: float = 0.1
    """Factor on the learning rate at the first step."""
    label_smoothing: float = 0.0
    """Probability spread evenly over all classes."""
    batch_size: int = 64
    """Clips per optimizer step, over all processes."""
    micro_batch: int = 8
    """Most clips per forward pass of one process; the rest is gradient accumulation."""
    clip_grad: float | None = None
    """Largest norm of the gradient; None: not clipped."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of weights and activations; fp16, with dynamic loss scaling, needs a GPU. Always fp32: the
    optimizer's own copy of the weights, LayerNorm, and the sums of softmax."""
    tf32: bool = False
    """Let a GPU round the factors of fp32 matrix products to 10 bits: faster, not exact."""
    memory: Memory = "save"
    """What a block keeps for backward, in widths per token: `save` 12, `lean` 11.25 (4 % slower),
    `recompute` 1.25 (a third slower)."""
    zero_stage: Literal[0, 1, 2, 3] = 1
    """What DeepSpeed shards: 1 optimizer state, 2 gradients too, 3 weights too; 0 nothing."""
    offload: bool = False
    """Keep the optimizer's state in the CPU's memory, and update there; needs a GPU."""

    def __post_init__(self):
        for name in ("lr", "lr_batch", "backbone_lr_scale", "epochs", "batch_size", "micro_batch"):
            value = getattr(self, name)
            require(value is None or value > 0, f"optim.{name}", "must be positive", value)
        require(self.weight_decay >= 0, "optim.weight_decay", "must be >= 0", self.weight_decay)
        require(all(0 <= b < 1 for b in self.betas), "optim.betas", "must be in [0, 1)", self.betas)
        require(self.warmup_epochs >= 0, "optim.warmup_epochs", "must be >= 0", self.warmup_epochs)
        require(
            0 < self.warmup_start <= 1,
            "optim.warmup_start",
            "must be in (0, 1]",
            self.warmup_start,
        )
        require(
            0 <= self.label_smoothing < 1,
            "optim.label_smoothing",
            "must be in [0, 1)",
            self.label_smoothing,
        )
        require(
            self.clip_grad is None or self.clip_grad > 0,
            "optim.clip_grad",
            "must be positive or null",
            self.clip_grad,
        )
        if self.zero_stage == 0 and (self.precision != "fp32" or self.offload):
            # DeepSpeed's bf16 at stage 0 is another algorithm: it makes an empty step at the start.
            what = "optim.offload" if self.offload else f"optim.precision {self.precision}"
            raise ValueError(f"optim.zero_stage must be 1, 2 or 3 with {what}: got 0")

    @property
    def peak_lr(self) -> float:
        """The learning rate after warm-up."""
        return self.lr if self.lr_batch is None else self.lr * self.batch_size / self.lr_batch

    def warmup_steps(self, steps_per_epoch: int) -> int:
        """Length of the warm-up in steps: a short run has half of its own, at most."""
        return round(min(self.warmup_epochs, self.epochs / 2) * steps_per_epoch)

    def accumulation(self, world_size: int) -> int:
        """Forward passes of each process per optimizer step: as few as `micro_batch` allows.

        Raises ValueError if the batch can't be shared evenly.
        """
        each, rest = divmod(self.batch_size, world_size)
        if rest:
            fits = [n for n in range(1, self.batch_size + 1) if self.batch_size % n == 0]
            raise ValueError(
                f"optim.batch_size must be a multiple of the number of processes: got "
                f"{self.batch_size} for {world_size}; {', '.join(map(str, fits))} processes can "
                f"share it, or take {max(1, each) * world_size}"
            )
        return next(n for n in range(-(-each // self.micro_batch), each + 1) if each % n == 0)

    def clips_at_once(self, world_size: int) -> int:
        """Clips per forward pass of one process. Raises as `accumulation`."""
        return self.batch_size // (world_size * self.accumulation(world_size))


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """Where a run keeps its files, and how often it logs, validates and saves."""

    dir: str
    """The run folder."""
    seed: int = 0
    """Of the initial weights, the order and augmentation of the clips, and dropout."""
    resume: Literal[False, True, "auto"] = False
    """Go on from the state saved in `dir`; `auto`: if there is one, else begin."""
    log_every: int = 10
    """Optimizer steps between progress lines."""
    val_every: int = 1
    """Epochs between validations; the last epoch is always validated."""
    save_every: int | None = None
    """Optimizer steps between saves, besides those at the end of each epoch."""
    max_steps: int | None = None
    """Stop and save after this many optimizer steps; the schedule stays that of all epochs."""
    wandb: str | None = None
    """Weights & Biases project to log to as well; `WANDB_MODE=offline` keeps that on this disk."""

    def __post_init__(self):
        for name in ("log_every", "val_every", "save_every", "max_steps"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"run.{name}", "must be at least 1", value)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """A whole training run."""

    model: ModelSection
    data: DataConfig
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)
    """Random augmentation of training clips; None: none at all."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunOptions

    def __post_init__(self):
        if self.data.cache_tokens is None:
            return
        for holds, need in (
            (self.augment is None, "augment=null: what is changed at random never comes again"),
            (self.model.adapt_from, "model.adapt_from above 0: no block before 0 is frozen"),
            (self.data.clips_per_video, "data.clips_per_video: else each epoch has other frames"),
        ):
            if not holds:
                raise ValueError(f"data.cache_tokens needs {need}")

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as `load_config` reads them back."""
        return asdict(self)


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Reads the YAML file at `path`, applies `section.key=value` overrides and checks everything.

    `path` may be the name of a file in `configs/`, such as `vit_b16_k400_8x16`.

    Raises:
        ValueError: malformed YAML or override, unknown key, wrong type, or a broken rule.
        OSError: no such file.
    """
    path = find_config(path)
    values = _parse(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(values, dict):
        raise ValueError(f"config must be a mapping of sections: got {path}")
    for override in overrides:
        _override(values, override)
    values = {k: {} if v is None and k != "augment" else v for k, v in values.items()}
    values = _at_home(values)
    model = values.setdefault("model", {})
    if isinstance(model, dict) and model.get("recipe") is not None:
        published = recipe(str(model["recipe"])).model.to_dict()
        # What follows from the data and from the size of the image may be given another.
        published["num_classes"] = None
        published["preprocess"] |= {"val_short_side": None, "test_short_side": None}
        values["model"] = _merged(published, model)
    return build_dataclass(RunConfig, values)


def find_config(name: str | Path) -> Path:
    """The file of that path, or of that name in `configs/`. Raises ValueError for neither."""
    path, ours = Path(name), CONFIGS / f"{name}.yaml"
    if path.suffix or path.is_file():
        return path
    if not ours.is_file():
        files = sorted(CONFIGS.rglob("*.yaml"))
        names = [file.relative_to(CONFIGS).with_suffix("").as_posix() for file in files]
        raise ValueError(unknown_name("config", str(name), names))
    return ours


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """The keys that keep `new` from continuing a run of `old`, as `key: old -> new`."""
    old_values, new_values = flat(old.to_dict()), flat(new.to_dict())
    return [
        f"{key}: {old_values.get(key)} -> {new_values.get(key)}"
        for key in sorted(old_values | new_values)
        if key not in FREE_ON_RESUME and old_values.get(key) != new_values.get(key)
    ]


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`base` with `over` on top, mapping by mapping."""
    out = dict(base)
    for key, value in over.items():
        below = base.get(key)
        both = isinstance(below, dict) and isinstance(value, dict)
        out[key] = _merged(below, value) if both else value
    return out


def _override(values: dict[str, Any], override: str) -> None:
    """Sets one `section.key=value` in `values`."""
    path, equals, text = override.partition("=")
    keys = path.split(".")
    if not equals or not all(keys):
        raise ValueError(f"override must read section.key=value: got {override!r}")
    for key in keys[:-1]:
        if values.get(key) is None:
            values[key] = {}
        values = values[key]
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r} must name a key: {key} has no parts")
    values[keys[-1]] = _parse(text, override)


def _at_home(value: Any) -> Any:
    """`value` with the user's folder in place of the `~` that paths begin with."""
    if isinstance(value, dict):
        return {key: _at_home(inner) for key, inner in value.items()}
    if isinstance(value, str) and value.startswith("~/"):
        return str(Path(value).expanduser())
    return value


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `3e-4` as text, for want of a dot; here it is a number."""


_Loader.yaml_implicit_resolvers = dict(yaml.SafeLoader.yaml_implicit_resolvers)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789")
)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(f"{source} must be valid YAML: {' '.join(str(error).split())}") from None
