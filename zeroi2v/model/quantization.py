"""Models whose blocks keep the weights of their linear layers in 8 bits, for inference.

`fp8.py` and `int8.py` say how a layer is computed. Where the device has no products of that kind,
the model is computed from the same rounded numbers, which is slow, so there `load` gives it
`widened`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from zeroi2v_kernels.quantize import quantize_rows
from zeroi2v_kernels.quantize_reference import E4M3

from zeroi2v.model.fp8 import WIDE, fp8_linear
from zeroi2v.model.int8 import channel_factors, int8_linear, pack, round_weight

if TYPE_CHECKING:
    from zeroi2v.model.vit import Block, VideoViT

SCALE, CHANNELS = "_scale", "_channels"
"""What is added to the name of a weight for its rows' scales, and for its input's factors."""


class Format(NamedTuple):
    """A kind of 8-bit weights."""

    title: str
    dtype: torch.dtype
    wide: torch.dtype
    """Of all else in the model."""
    multiple: int
    """What both sides of a weight must be a multiple of."""
    has_channels: bool
    """Whether channels of the input have factors."""

    @property
    def name(self) -> str:
        """As a folder's `config.json` and reports call it."""
        return str(self.dtype).removeprefix("torch.")


FP8 = Format("float8", E4M3, WIDE, 16, False)
INT8 = Format("int8", torch.int8, torch.float32, 1, True)
FORMATS = {format.dtype: format for format in (FP8, INT8)}


class Packs(dict):
    """Weights as a product wants them, with what they were made of; copies are empty."""

    def __reduce__(self):
        return Packs, ()


class QuantizedWeights(nn.Module):
    """A module whose weights may be kept in 8 bits: they are moved then, but never cast.

    So `.to(dtype)` and the like change the other parts of a model alone.
    """

    def reserve_names(self, *names: str) -> None:
        """Buffers for what belongs to the weights of those names, if they are kept in 8 bits."""
        for name in names:
            self.register_buffer(name + SCALE, None)
            self.register_buffer(name + CHANNELS, None)
        self._packs = Packs()

    def product(
        self,
        name: str,
        x: Tensor,
        bias: Tensor | None,
        rows: tuple[int, int] | None = None,
        factor: float = 1.0,
    ) -> Tensor:
        """`factor * x W^T + bias` for the weight of that name, or its `rows` (from, to) alone."""
        weight, scale = getattr(self, name), getattr(self, name + SCALE)
        if rows:
            weight, scale = weight[slice(*rows)], scale[slice(*rows)]
        scale = scale if factor == 1 else factor * scale
        if weight.dtype == E4M3:
            return fp8_linear(x, weight, scale, bias)
        channels = getattr(self, name + CHANNELS)
        return int8_linear(x, weight, scale, channels, bias, self._packed(name, rows, weight))

    def _packed(self, name: str, rows: tuple[int, int] | None, weight: Tensor) -> Tensor | None:
        """The weight as its product wants it, laid out once, and again after it has changed."""
        if torch.compiler.is_compiling():
            return None
        version = 0 if weight.is_inference() else weight._version
        state = (weight.data_ptr(), version)
        held = self._packs.get((name, rows))
        if held is None or held[0] != state:
            self._packs[name, rows] = held = (state, pack(weight))
        return held[1]

    def _apply(self, function, recurse=True):
        kept = (SCALE, CHANNELS)
        beside = [buffer for name, buffer in self._buffers.items() if name.endswith(kept)]

        def uncast(tensor: Tensor) -> Tensor:
            out = function(tensor)
            fixed = tensor.dtype in FORMATS or any(tensor is buffer for buffer in beside)
            return tensor.to(out.device) if fixed and out.dtype != tensor.dtype else out

        return super()._apply(uncast, recurse)


def places(block: Block) -> Iterator[tuple[QuantizedWeights, str]]:
    """Each module of a block with a weight that may be kept in 8 bits, and the weight's name."""
    yield block.attn, "in_proj_weight"
    for layer in (block.attn.out_proj, block.mlp.c_fc, block.mlp.c_proj):
        yield layer, "weight"


def readers(block: Block) -> tuple[nn.Module, ...]:
    """The modules whose input the weights of `places` are multiplied with, in that order."""
    return block.attn, block.attn.out_proj, block.mlp, block.mlp.c_proj


def reserve(model: VideoViT, format: Format) -> VideoViT:
    """`model` itself, its blocks with room for weights in 8 bits, and without gradients.

    Raises ValueError for adapters, and for layers of a width that the format does not take.
    """
    if model.config.adapter is not None:
        raise ValueError(f"model must be merged for {format.title} weights: it has adapters")
    for name in ("width", "hidden"):
        if (width := getattr(model.config, name)) % format.multiple:
            rule = f"must be a multiple of {format.multiple} for {format.title}"
            raise ValueError(f"{name} {rule}: got {width}")
    for block in model.transformer.resblocks:
        for module, name in places(block):
            weight = getattr(module, name).detach()
            setattr(module, name, nn.Parameter(torch.empty_like(weight, dtype=format.dtype), False))
            setattr(module, name + SCALE, torch.empty_like(weight[:, 0], dtype=torch.float32))
            if format.has_channels:
                setattr(module, name + CHANNELS, torch.empty_like(weight[0], dtype=torch.float32))
    return model.requires_grad_(False)


def quantized(model: VideoViT, format: Format = FP8, clips: Tensor | None = None) -> VideoViT:
    """A copy of `model` with 8-bit weights in its blocks, and all else in `format.wide`.

    Args:
        model: merged or plain, of any dtype; left untouched.
        format: of the weights.
        clips: normalised video `[B, 3, T, H, W]`, for int8, which it shows the range of each
            channel.
    Returns:
        The model, in eval mode, without gradients.
    Raises:
        ValueError: `model` has adapters or 8-bit weights, weights that are not finite, or layers of
            a width that the format does not take; or there are no clips where they are needed.
    """
    if (held := model.quantization) is not None:
        raise ValueError(f"model must have wide weights: got one with {held.title} weights")
    if format.has_channels and clips is None:
        raise ValueError(f"{format.title} needs clips, for the range of each channel: got none")
    with torch.device("meta"):
        made = reserve(type(model)(model.config), format)
    names, given = made.state_dict().keys(), model.state_dict()
    for name in given:
        if name + SCALE in names and not given[name].isfinite().all():
            raise ValueError(f"{name} must be finite: it contains inf or nan")
    ranges = largest_inputs(model, clips) if format.has_channels else {}
    state: dict[str, Tensor] = {}
    for name, tensor in given.items():
        if name + SCALE not in names:
            state[name] = tensor.to(format.wide, copy=True)
        elif format.has_channels:
            channels = state[name + CHANNELS] = channel_factors(ranges[name], tensor)
            state[name], state[name + SCALE] = round_weight(tensor, channels)
        else:
            state[name], scale = quantize_rows(tensor)
            state[name + SCALE] = scale.squeeze(-1)
    return _filled(made, state, model)


@torch.no_grad()
def largest_inputs(model: VideoViT, clips: Tensor) -> dict[str, Tensor]:
    """For each weight of `places`, by name, the largest magnitudes of its input, `[in]`."""
    model = copy.deepcopy(model).float().eval()
    found: dict[str, Tensor] = {}
    for index, block in enumerate(model.transformer.resblocks):
        for reader, (module, weight) in zip(readers(block), places(block), strict=True):
            own = next(name for name, other in block.named_modules() if other is module)
            name = f"transformer.resblocks.{index}.{own}.{weight}"

            def look(_module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                largest = args[0].flatten(0, -2).abs().amax(0)
                found[name] = torch.maximum(found.get(name, largest), largest)

            reader.register_forward_pre_hook(look)
    for clip in clips.to(model.head.weight.device, torch.float32).split(1):  # L/14 is big
        model(clip)
    return found


def widened(model: VideoViT) -> VideoViT:
    """A copy of a model with 8-bit weights that has these as numbers of its own dtype.

    It is a plain model in eval mode, which no longer rounds what the weights are multiplied with.
    """
    with torch.device("meta"):
        made = type(model)(model.config)
    held, dtype = model.state_dict(), model.head.weight.dtype
    state = {}
    for name in made.state_dict():
        tensor = held[name]
        if (scale := held.get(name + SCALE)) is not None:
            tensor = tensor.float() * scale[:, None]
            tensor = tensor * held.get(name + CHANNELS, 1.0)
        state[name] = tensor.to(dtype, copy=True)
    return _filled(made, state, model)


def _filled(made: VideoViT, state: dict[str, Tensor], source: VideoViT) -> VideoViT:
    made.load_state_dict(state, assign=True)
    made.origins = dict(source.origins)
    return made.eval()
