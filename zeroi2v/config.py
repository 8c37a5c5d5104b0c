"""What a model is: architecture, adapters, preprocessing, labels; and the nine published recipes.

A `ModelConfig` is everything needed to rebuild a model and to feed it; `config.json` holds it.
Values are checked when a config is made, so no other module checks them again.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal

Activation = Literal["quick_gelu", "gelu", "gelu_tanh", "swiglu"]
Norm = Literal["layer", "rms"]
Pooling = Literal["class", "mean", "attention"]
_CHOICES = {"activation": Activation, "norm": Norm, "pooling": Pooling}

# Mean and standard deviation of CLIP's training images, on 0..255 pixel values.
CLIP_MEAN = (122.769, 116.74, 104.04)
CLIP_STD = (68.493, 66.63, 70.321)


def require(condition: bool, name: str, rule: str, value: Any) -> None:
    """Raises ValueError that names the value and the rule, unless `condition`."""
    if not condition:
        raise ValueError(f"{name} {rule}: got {value}")


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterConfig:
    """The linear adapters of every block: A(x) = x + scale * up(dropout(down(x)))."""

    ratio: float = 0.25
    """Adapter rank as a fraction of the model width."""
    scale: float = 0.5
    """Factor on the adapter's branch."""
    dropout: float = 0.1
    """Probability of zeroing an element of the bottleneck while training."""

    def __post_init__(self):
        require(0 < self.ratio <= 1, "adapter.ratio", "must be in (0, 1]", self.ratio)
        require(0 <= self.dropout < 1, "adapter.dropout", "must be in [0, 1)", self.dropout)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreprocessConfig:
    """How a video becomes a clip: which frames, which pixels, which numbers."""

    mean: tuple[float, float, float] = CLIP_MEAN
    """Per-channel (RGB) mean subtracted from pixels in 0..255."""
    std: tuple[float, float, float] = CLIP_STD
    """Per-channel (RGB) standard deviation, in 0..255, that pixels are divided by."""
    sampling: Literal["dense", "uniform"] = "dense"
    """`dense`: frames `interval` apart; `uniform`: one frame from each of T segments."""
    interval: int = 16
    """Distance between neighbouring frames of a dense clip, in frames."""
    val_short_side: int | None = None
    """Short side, in pixels, a video is resized to before validation's centre crop; None: 8/7 of
    the model's image size, as published."""
    test_short_side: int | None = None
    """Short side, in pixels, a video is resized to before the test crops; None: the model's image
    size, as published."""
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """How frames are resized."""
    antialias: bool = False
    """Whether pixels are averaged where frames become smaller, as PIL does; OpenCV, which resized
    the frames that the published models were trained on, does not."""
    test_views: tuple[int, int] = (3, 1)
    """Clips per video and crops per clip in tests: 1 crop (centre) or 3 along the long side."""

    def __post_init__(self):
        require(
            self.sampling in ("dense", "uniform"),
            "preprocess.sampling",
            "must be 'dense' or 'uniform'",
            self.sampling,
        )
        require(self.interval >= 1, "preprocess.interval", "must be at least 1", self.interval)
        require(
            self.interpolation in ("bilinear", "bicubic"),
            "preprocess.interpolation",
            "must be 'bilinear' or 'bicubic'",
            self.interpolation,
        )
        require(all(s > 0 for s in self.std), "preprocess.std", "must be positive", self.std)
        clips, crops = self.test_views
        require(
            clips >= 1 and crops in (1, 3),
            "preprocess.test_views",
            "must be (clips >= 1, crops 1 or 3)",
            self.test_views,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class RotaryConfig:
    """Rotary positions on two axes: each pair of a head's channels is turned by its angle.

    Row (or column) i of a grid of g patches is at coordinate `start + span * (i + offset) / g`; the
    angle of pair p of D/4 is that times `base ** (-p / (D/4))`. Pair p of the first D/4 is channels
    p and D/2 + p of a head and follows the row, the next D/4 follow the column. The tokens before
    the patches are not turned.

    Source: RoFormer (arXiv 2104.09864); on two axes EVA-02 (arXiv 2303.11331).
    """

    base: float = 10000.0
    """Ratio of the highest frequency to the lowest, nearly."""
    span: float = 16.0
    """Length of the image's side, whatever the number of patches; in radians at frequency 1."""
    start: float = 0.0
    """Coordinate of the image's edge."""
    offset: float = 0.0
    """Where in a patch its coordinate is taken: 0 at its edge, 0.5 at its centre."""

    def __post_init__(self):
        require(self.base > 1, "rotary.base", "must be above 1", self.base)
        require(self.span > 0, "rotary.span", "must be positive", self.span)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A video ViT: an image transformer whose shifted heads read a neighbouring frame.

    The defaults are those of CLIP; other families differ in what a block is made of.
    """

    image_size: int = 224
    """Height and width of the input, in pixels."""
    patch_size: int = 16
    """Height and width of a patch, in pixels."""
    width: int = 768
    """Channels C of a token."""
    depth: int = 12
    """Number of transformer blocks."""
    num_heads: int = 12
    """Attention heads H; each is `width / num_heads` wide."""
    mlp_ratio: float = 4.0
    """Width of the MLP's hidden layer as a multiple of `width`."""
    num_frames: int = 8
    """Frames T of a clip."""
    num_classes: int = 400
    """Size of the classifier's output."""
    head_offsets: tuple[int, ...] | Literal["auto"] = (-1, 1) + (0,) * 10
    """For each head, which frame its keys and values come from, relative to the query's frame;
    `auto` is replaced by `spread_offsets`."""
    activation: Activation = "quick_gelu"
    """Activation of the MLP; OpenAI's CLIP uses quick_gelu: x * sigmoid(1.702 x). With swiglu the
    first layer is twice as wide, a gate and a value, and gives silu(gate) * value."""
    norm: Norm = "layer"
    """Layer norm, or RMS norm, which subtracts no mean."""
    norm_eps: float = 1e-5
    """Added to the variance in every norm."""
    ln_pre: bool = True
    """Whether a norm comes before the blocks, as in CLIP; most other ViTs have none."""
    norm_patches: bool = False
    """Whether a norm comes after the patches' projection, before positions are added (AIMv2)."""
    norm_attended: bool = False
    """Whether a norm comes between attention and its output projection (EVA-02 CLIP)."""
    norm_hidden: bool = False
    """Whether a norm comes between the activation and the MLP's second layer (EVA-02)."""
    class_token: bool = True
    """Whether a learned class token goes before the patches."""
    num_registers: int = 0
    """Learned register tokens between class token and patches (DINOv2, DINOv3)."""
    rotary: RotaryConfig | None = None
    """Rotary positions of queries and keys, beside the positions that are added."""
    pooling: Pooling = "class"
    """What stands for a frame: the class token, the mean of the patches, or what a learned query
    reads from all tokens (SigLIP, PE)."""
    pool_heads: int = 12
    """Heads of the attention that pools, if it does."""
    pool_mlp_ratio: float = 4.0
    """Width of its MLP's hidden layer as a multiple of `width`."""
    adapter: AdapterConfig | None = field(default_factory=AdapterConfig)
    """The adapters, or None for a plain or merged model."""
    adapt_from: int = 0
    """The first block that is adapted. Those before it are the image model's: no adapters, no head
    offsets, and the temporal embedding is added after them. They train without backward."""
    head_dropout: float = 0.5
    """Dropout before the classifier while training."""
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    """How videos are turned into this model's input."""
    labels: tuple[str, ...] = ()
    """Class names in index order; empty when unknown."""

    def __post_init__(self):
        for name in ("image_size", "patch_size", "width", "depth", "num_heads", "num_frames"):
            require(getattr(self, name) >= 1, name, "must be at least 1", getattr(self, name))
        rule = f"must be at least 0 and below depth {self.depth}"
        require(0 <= self.adapt_from < self.depth, "adapt_from", rule, self.adapt_from)
        if self.head_offsets == "auto":
            object.__setattr__(self, "head_offsets", spread_offsets(self.num_heads))
        sides = {
            "val_short_side": round(self.image_size * 8 / 7),
            "test_short_side": self.image_size,
        }
        for name in sides:
            side = getattr(self.preprocess, name)
            if side is not None:
                rule = f"must be at least image_size {self.image_size}"
                require(side >= self.image_size, f"preprocess.{name}", rule, side)
                sides[name] = side
        preprocess = dataclasses.replace(self.preprocess, **sides)
        object.__setattr__(self, "preprocess", preprocess)
        classes = self.num_classes  # None until they have been counted, in a training config alone
        require(classes is None or classes >= 1, "num_classes", "must be at least 1", classes)
        require(
            self.image_size % self.patch_size == 0,
            "image_size",
            f"must be a multiple of patch_size {self.patch_size}",
            self.image_size,
        )
        require(
            self.width % self.num_heads == 0,
            "width",
            f"must be a multiple of num_heads {self.num_heads}",
            self.width,
        )
        if len(self.head_offsets) != self.num_heads:
            raise ValueError(
                "head_offsets needs one entry per head: "
                f"got {len(self.head_offsets)} for {self.num_heads} heads"
            )
        for name, choices in _CHOICES.items():
            known = typing.get_args(choices)
            rule = f"must be {' or '.join(map(repr, known))}"
            require(getattr(self, name) in known, name, rule, getattr(self, name))
        require(self.norm_eps > 0, "norm_eps", "must be positive", self.norm_eps)
        registers = self.num_registers
        require(registers >= 0, "num_registers", "must be at least 0", registers)
        has_class = self.class_token or self.pooling != "class"
        require(has_class, "pooling", "must not be 'class' without class_token", self.pooling)
        if self.rotary:
            rule = "needs heads of a multiple of 4 channels"
            require(self.head_dim % 4 == 0, "rotary", rule, self.head_dim)
        if self.pooling == "attention":
            rule = f"must divide width {self.width}"
            heads = self.pool_heads
            require(heads >= 1 and self.width % heads == 0, "pool_heads", rule, heads)
        require(0 <= self.head_dropout < 1, "head_dropout", "must be in [0, 1)", self.head_dropout)
        if self.labels and classes not in (None, len(self.labels)):
            raise ValueError(
                f"labels needs one name per class: got {len(self.labels)} "
                f"for {self.num_classes} classes"
            )

    @property
    def head_dim(self) -> int:
        """Width D of one attention head."""
        return self.width // self.num_heads

    @property
    def grid(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_prefix(self) -> int:
        """Tokens of one frame that come before its patches: class token and registers."""
        return self.class_token + self.num_registers

    @property
    def num_tokens(self) -> int:
        """Tokens N of one frame: those before the patches, and the patches, row by row."""
        return self.num_prefix + self.grid**2

    @property
    def hidden(self) -> int:
        """Width of the MLP's hidden layer."""
        return round(self.width * self.mlp_ratio)

    @property
    def reads_class(self) -> bool:
        """Whether nothing but the class token leaves the last block."""
        return self.pooling == "class"

    def block(self, number: int) -> ModelConfig:
        """What block `number` is made of: before `adapt_from` a block of the plain image model."""
        if number >= self.adapt_from:
            return self
        return dataclasses.replace(self, adapter=None, head_offsets=(0,) * self.num_heads)

    @property
    def adapter_rank(self) -> int:
        """Width R of an adapter's bottleneck (0 without adapters)."""
        return max(1, round(self.width * self.adapter.ratio)) if self.adapter else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, as written to `config.json`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Inverse of `to_dict`. Raises ValueError that names an unknown key or a wrong type."""
        return build_dataclass(cls, values)


def spread_offsets(num_heads: int) -> tuple[int, ...]:
    """Offsets for a backbone without a recipe: a quarter of the heads read a neighbouring frame.

    Half of these, the first ones, read the frame before and half the one after, by turns; there are
    two at least, if there are as many heads. The recipes shift a sixth to nearly a half.
    """
    pairs = min(max(1, round(num_heads / 8)), num_heads // 2)
    return (-1, 1) * pairs + (0,) * (num_heads - 2 * pairs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One published training recipe and the accuracy reported for it."""

    model: ModelConfig
    top1: float | None
    """Published top-1 in percent at `model.preprocess.test_views`; None if not reported."""
    source: str
    """Where the figures are from."""


_PAPER = "ZeroI2V, ECCV 2024 (arXiv 2310.01324), and its released configs"
_BASE = dict(width=768, depth=12, num_heads=12, patch_size=16)
_LARGE = dict(width=1024, depth=24, num_heads=16, patch_size=14)


_DENSE_16, _DENSE_4, _UNIFORM = ("dense", 16), ("dense", 4), ("uniform", 1)


def _recipe(backbone, frames, classes, offsets, scale, dropout, sampling, views, top1) -> Recipe:
    heads = backbone["num_heads"]
    model = ModelConfig(
        **backbone,
        num_frames=frames,
        num_classes=classes,
        head_offsets=tuple(offsets) + (0,) * (heads - len(offsets)),
        adapter=AdapterConfig(scale=scale, dropout=dropout),
        preprocess=PreprocessConfig(sampling=sampling[0], interval=sampling[1], test_views=views),
    )
    return Recipe(model=model, top1=top1, source=_PAPER)


# Columns: frames, classes, offsets of the first heads (the others are 0), adapter scale and
# dropout, sampling, test views, top-1. For HMDB51 the paper's 73.7 does not say how many frames.
# fmt: off
RECIPES: dict[str, Recipe] = {
    "vit_b16_k400_8x16": _recipe(
        _BASE, 8, 400, (-1, 1), 0.5, 0.1, _DENSE_16, (3, 1), 83.0),
    "vit_b16_ucf101_8": _recipe(
        _BASE, 8, 101, (-1, 1), 0.5, 0.1, _UNIFORM, (1, 3), None),
    "vit_b16_hmdb51_8": _recipe(
        _BASE, 8, 51, (-1, 1), 0.5, 0.1, _UNIFORM, (1, 3), None),
    "vit_b16_ucf101_32": _recipe(
        _BASE, 32, 101, (-1, 1, -2, 2), 0.5, 0.1, _UNIFORM, (2, 3), None),
    "vit_b16_hmdb51_32": _recipe(
        _BASE, 32, 51, (-1, 1, -2, 2), 0.5, 0.1, _UNIFORM, (2, 3), None),
    "vit_b16_ssv2_16": _recipe(
        _BASE, 16, 174, (-1, 1, -2, 2), 1.0, 0.0, _UNIFORM, (1, 3), 67.7),
    "vit_l14_k400_8x16": _recipe(
        _LARGE, 8, 400, (-1, -1, 1, 1), 0.5, 0.1, _DENSE_16, (3, 1), 86.3),
    "vit_l14_k400_32x4": _recipe(
        _LARGE, 32, 400, (-1, -1, 1, 1, -2, -2), 0.5, 0.1, _DENSE_4, (3, 1), 87.2),
    "vit_l14_ssv2_32": _recipe(
        _LARGE, 32, 174, (-1, -1, 1, 1, -2, 2, -3), 1.0, 0.1, _UNIFORM, (1, 3), 72.2),
}
# fmt: on


def recipe(name: str) -> Recipe:
    """The published recipe called `name`. Raises ValueError that names the nearest ones."""
    if name not in RECIPES:
        raise ValueError(unknown_name("recipe", name, RECIPES))
    return RECIPES[name]


def build_dataclass(cls: type, values: Any, where: str = "") -> Any:
    """Builds dataclass `cls` from plain `values` (as read from JSON or YAML), strictly.

    Lists become tuples and nested mappings nested dataclasses. An unknown key, a missing
    one or a value of the wrong type raises ValueError that names the key and the rule.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{where.rstrip('.') or cls.__name__} must be a mapping: got {values!r}")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ValueError(
                unknown_name("config key", f"{where}{key}", [where + k for k in hints])
            )
    required = {
        f.name
        for f in dataclasses.fields(cls)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }
    if missing := sorted(required - set(values)):
        raise ValueError(f"config key {where}{missing[0]} must be given")
    return cls(**{k: _convert(hints[k], v, where + k) for k, v in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        errors = []
        for option in (a for a in args if a is not type(None)):
            try:
                return _convert(option, value, where)
            except ValueError as error:
                errors.append(error)
        raise errors[0]
    if dataclasses.is_dataclass(hint):
        return build_dataclass(hint, value, where + ".")
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} must be one of {list(args)}: got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} must be a list: got {value!r}")
        if args[-1] is Ellipsis:
            return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(args):
            raise ValueError(f"{where} must have {len(args)} entries: got {value!r}")
        return tuple(
            _convert(a, v, f"{where}[{i}]")
            for i, (a, v) in enumerate(zip(args, value, strict=True))
        )
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} must be a mapping: got {value!r}")
        return {
            _convert(args[0], k, where): _convert(args[1], v, f"{where}.{k}")
            for k, v in value.items()
        }
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ValueError(f"{where} must be {hint.__name__}: got {value!r}")
    return value


def flat(values: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Nested mappings and dataclasses as one mapping of dotted names, such as `adapter.scale`."""
    names: dict[str, Any] = {}
    for key, value in values.items():
        if dataclasses.is_dataclass(value):
            value = dataclasses.asdict(value)
        inner = isinstance(value, dict) and value
        names |= flat(value, f"{where}{key}.") if inner else {f"{where}{key}": value}
    return names


def unknown_name(kind: str, name: str, known: typing.Iterable[str]) -> str:
    """The message for an unknown `name`, with the nearest `known` ones."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return f"unknown {kind} {name!r}: {hint}"
