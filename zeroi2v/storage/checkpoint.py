"""Models on disk: a native folder of `config.json`, `model.safetensors` and a model card.

Loading is strict and executes nothing: a missing, unexpected or wrongly shaped tensor, or a config
that contradicts the tensors, is an error that names it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from zeroi2v_kernels.choice import has_fp8_units, has_int8_products

from zeroi2v.config import ModelConfig
from zeroi2v.files import check_writable, replacing
from zeroi2v.model.int8 import LARGEST
from zeroi2v.model.quantization import CHANNELS, FORMATS, FP8, INT8, SCALE, reserve, widened
from zeroi2v.model.vit import VideoViT
from zeroi2v.storage.model_card import ORIGINS, model_card

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
QUANTIZED = {format.name: format for format in FORMATS.values()}
"""What `weights` in `config.json` says of a model with 8-bit weights in its blocks."""

log = logging.getLogger(__name__)


def save(model: VideoViT, folder: str | Path, extra_files: dict[str, str] | None = None) -> None:
    """Writes `model` to `folder`, whole or not at all.

    Args:
        model: adapted, merged or plain.
        folder: made if needed; an older model in it is replaced, any other content refused.
        extra_files: text files to put beside the model and its `origins`, by name; the card says
            what is in those of `model_card.ORIGINS`.

    Raises:
        ValueError: `folder` contains something other than a model.
        OSError: it can't be written.
    """
    folder = check_output_folder(folder)
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    kind = {"weights": model.quantization.name} if model.quantization else {}
    config = {"format": "zeroi2v", **kind, "model": model.config.to_dict()}
    extra_files = model.origins | (extra_files or {})
    card = model_card(model.config, extra_files, model.quantization)
    files = {CONFIG: json.dumps(config, indent=2), CARD: card, **extra_files}
    with replacing(folder) as temporary:
        try:
            save_file(state, temporary / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:  # its own kind of an input or output error
            raise OSError(f"{folder} can't be written ({error})") from None
        for name, text in files.items():
            (temporary / name).write_text(text.rstrip() + "\n", encoding="utf-8")


def fetch(name: str | Path, **download) -> Path:
    """`name` itself if it is a local path, else the hub's model of that name, downloaded.

    The network is used only for a name of the form `owner/model` that does not exist here:
    neither the path nor a folder `owner`.

    Raises:
        FileNotFoundError: neither a folder nor a hub name.
        OSError: the hub has no such model, or can't be reached.
    """
    path = Path(name)
    remote = re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(name)) and not path.parent.exists()
    if path.exists() or not remote or path.suffix in (".onnx", ".pt2"):
        return path
    from huggingface_hub import snapshot_download

    files = [CONFIG, WEIGHTS, CARD, *ORIGINS]
    try:
        return Path(snapshot_download(str(name), allow_patterns=files, **download))
    except Exception as error:  # the hub's client is another library from version to version
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise OSError(f"{name} is no folder here, and the hub can't give it ({reason})") from None


def load(folder: str | Path, widen: bool | None = None) -> VideoViT:
    """The model in `folder`, on the CPU, in its saved dtype and in eval mode.

    Args:
        folder: a native folder.
        widen: whether a model with 8-bit weights is given `widened`; None: where this machine has
            no products of that kind, which is logged.
    Raises:
        OSError: no such folder or file.
        ValueError: a file is damaged, or the config contradicts the tensors.
    """
    folder = Path(folder)
    values, path = _read_json(folder), folder / CONFIG
    with torch.device("meta"):
        model = VideoViT(_config_of(values, path))
    if (kind := values.get("weights")) is not None:
        if kind not in QUANTIZED:
            known = " or ".join(f'"{name}"' for name in QUANTIZED)
            raise ValueError(f"{path}: weights must be {known}, or left out: got {kind!r}")
        try:
            reserve(model, QUANTIZED[kind])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    state = _read_tensors(folder / WEIGHTS)
    check_state(state, dict(model.state_dict()), f"{folder / WEIGHTS}")
    model.load_state_dict(state, assign=True)
    origins = (folder / name for name in ORIGINS)
    model.origins = {f.name: f.read_text("utf-8", "replace") for f in origins if f.is_file()}
    if model.quantization is None:
        return model.eval()
    if widen is None and (reason := _widening(model)):
        log.warning("%s has %s weights, and %s: widened", folder, model.quantization.title, reason)
        widen = True
    return widened(model) if widen else model.eval()


def _widening(model: VideoViT) -> str:
    """Why this machine computes the model with wide weights; empty if it does not."""
    if model.quantization is FP8 and not has_fp8_units(torch.device("cuda")):
        return "no GPU here has float8 units"
    if model.quantization is INT8 and torch.cuda.is_available():
        return "they are for CPUs, and there is a GPU here"
    if model.quantization is INT8 and not has_int8_products():
        return "PyTorch has no int8 products here"
    return ""


def read_config(folder: str | Path) -> ModelConfig:
    """The `ModelConfig` in `folder`'s `config.json`. Raises as `load`."""
    folder = Path(folder)
    return _config_of(_read_json(folder), folder / CONFIG)


def _config_of(values: dict[str, Any], path: Path) -> ModelConfig:
    try:
        return ModelConfig.from_dict(values.get("model"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_json(folder: Path) -> dict[str, Any]:
    """The content of the `config.json` in `folder`."""
    if not folder.is_dir():
        raise FileNotFoundError(f"model folder not found: {folder}")
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} contains no model: {CONFIG} is missing")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(values, dict) or values.get("format") != "zeroi2v":
        raise ValueError(f'{path} must have "format": "zeroi2v"')
    return values


def model_folder(path: str | Path) -> Path:
    """`path` itself if it is a native folder, or the best (else last) model of a run folder."""
    path = Path(path)
    if not path.is_dir():
        what = (
            "model must be a folder: got the file" if path.exists() else "model folder not found:"
        )
        raise FileNotFoundError(f"{what} {path}")
    for candidate in (path, path / "best", path / "last"):
        if (candidate / CONFIG).is_file():
            return candidate
    raise FileNotFoundError(f"{path} is neither a model folder nor a run folder: no {CONFIG} in it")


def is_native(folder: Path) -> bool:
    """Whether a folder contains a native model; others may have a `config.json` of their own
    kind."""
    try:
        text = (folder / CONFIG).read_text("utf-8", "replace")
    except OSError:
        return False
    return '"zeroi2v"' in text


def check_output_folder(folder: str | Path) -> Path:
    """`folder` as a Path, its parent made and proven writable. Raises as `save`."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output must be a folder: got the file {folder}")
    if folder.is_dir() and any(folder.iterdir()) and not is_native(folder):
        raise ValueError(f"output folder must be empty or contain a model: got {folder}")
    return check_writable(folder, "output folder")


def weights_hash(state: dict[str, Tensor]) -> str:
    """Short hash of the names, dtypes, shapes and values of tensors, in hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file."""
    if not path.is_file():
        raise FileNotFoundError(f"weights file not found: {path}")
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:  # a damaged file makes the reader raise nearly anything
        raise ValueError(f"weights file can't be read: {path} ({error})") from None


def check_state(state: dict[str, Tensor], expected: dict[str, Tensor], where: str) -> None:
    """Raises ValueError unless `state` has the names and shapes of `expected`, in finite floats.

    8-bit weights are asked for and given at the same places; what belongs to them is float32 and
    positive.
    """
    if missing := [name for name in expected if name not in state]:
        raise ValueError(f"{where} lacks {_some(missing)}, which its config asks for")
    if unexpected := [name for name in state if name not in expected]:
        raise ValueError(f"{where} contains {_some(unexpected)}, which its config has no place for")
    for name, tensor in expected.items():
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{where}: {name} has shape {list(state[name].shape)}, "
                f"its config asks for {list(tensor.shape)}"
            )
        dtype, is_factor = state[name].dtype, name.endswith((SCALE, CHANNELS))
        is_fixed = tensor.dtype in FORMATS or is_factor
        if not is_fixed and not dtype.is_floating_point:
            raise ValueError(f"{where}: {name} must be floating point: got {dtype}")
        if (dtype.itemsize == 1 or is_fixed) and dtype != tensor.dtype:
            what = tensor.dtype if is_fixed else "16 bits wide at least"
            raise ValueError(f"{where}: {name} must be {what}: got {dtype}")
        values = state[name].float() if dtype in FORMATS else state[name]
        low, high = map(float, values.aminmax())  # nan comes through
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"{where}: {name} must be finite: it contains inf or nan")
        if is_factor and low <= 0:
            raise ValueError(f"{where}: {name} must be positive: got {low:g}")
        if dtype == torch.int8 and max(-low, high) > LARGEST:
            raise ValueError(
                f"{where}: {name} must be in -{LARGEST}..{LARGEST}: got {low:g}..{high:g}"
            )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
