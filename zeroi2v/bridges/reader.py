"""Tensors of foreign files, read without executing anything that is in them.

Safetensors hold no code. Pickles go through PyTorch's restricted unpickler (`weights_only=True`);
objects of a few known training libraries, which it would refuse, become inert placeholders, and
any other name is refused before anything is built. A TorchScript archive is read as the pickle of
tensors that it contains: its code is never looked at.
"""

from __future__ import annotations

import io
import json
import warnings
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

# Files of a folder that hold weights, in order of preference, and those that describe them.
WEIGHT_FILES = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
ADAPTER_CONFIG, ADAPTER = "adapter_config.json", "adapter_model.safetensors"
CONFIG_FILES = (
    ADAPTER_CONFIG,
    "config.json",
    "open_clip_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)

# What MMEngine puts beside the weights: history buffers, and NumPy's arrays and numbers in them.
# Python pickles the buffers' functions as getattr(class, name). Others keep their command line.
_INERT_MODULES = ("mmengine.", "mmcv.", "mmaction.", "numpy.")
_INERT_NAMES = (
    "builtins.getattr",
    "argparse.Namespace",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What a foreign file or folder holds."""

    path: Path
    tensors: dict[str, Tensor]
    """By name, without the prefix `module.` that wrappers add."""
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The JSON files beside the weights, by file name."""
    text: str | None = None
    """The config text inside an MMEngine checkpoint."""
    scripted: bool = False
    """Whether it is a TorchScript archive."""
    adapter: dict[str, Tensor] | None = None
    """Tensors of a LoRA adapter beside the weights (`ADAPTER`)."""


class Inert:
    """Stands for a class or function that is not wanted: keeps state, does nothing."""

    def __new__(cls, *_args, **_kwargs):
        return super().__new__(cls)

    def __init__(self, *_args, **_kwargs):
        self.state: Any = None

    def __setstate__(self, state):
        self.state = state


def read_source(path: str | Path) -> Source:
    """Reads a weights file, or a folder with one and its JSON configs.

    Raises:
        OSError: no such file, or none of `WEIGHT_FILES` in the folder.
        ValueError: damaged, or it names an object that a weights file has no need of.
    """
    source = _read(Path(path))
    if ADAPTER_CONFIG in source.configs:
        adapter = source.path.parent / ADAPTER
        if not adapter.is_file():
            raise FileNotFoundError(f"{adapter.parent} contains {ADAPTER_CONFIG}, but no {ADAPTER}")
        return replace(source, adapter=_read_safetensors(adapter))
    return source


def _read(path: Path) -> Source:
    if path.is_dir():
        index = path / "model.safetensors.index.json"
        if index.is_file():
            tensors: dict[str, Tensor] = {}
            for name in sorted(set(_read_json(index).get("weight_map", {}).values())):
                tensors |= _read_safetensors(path / Path(name).name)
            return _source(index, tensors, _read_configs(path))
        for name in WEIGHT_FILES:
            if (path / name).is_file():
                return _read(path / name)
        beside = " beside its adapter" if (path / ADAPTER).is_file() else ""
        names = ", ".join(WEIGHT_FILES)
        raise FileNotFoundError(f"{path} contains no weights{beside}: none of {names}")
    if not path.is_file():
        raise FileNotFoundError(f"weights file not found: {path}")
    configs = _read_configs(path.parent) if path.name in WEIGHT_FILES else {}
    with open(path, "rb") as handle:
        start = handle.read(9)
    if start[8:9] == b"{":
        return _source(path, _read_safetensors(path), configs)
    try:
        if not zipfile.is_zipfile(path):
            return _source(path, _load(path), configs)
        _check_zip(path)
        with zipfile.ZipFile(path) as archive:
            scripted = any(name.endswith("/constants.pkl") for name in archive.namelist())
            if scripted:
                return _source(path, _module_tensors(_load(_without_code(archive))), configs, True)
        return _source(path, _load(path), configs)
    except (OSError, _Refused):
        raise
    except Exception as error:  # a damaged file makes the readers raise nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if " " not in reason:  # such as the key of a KeyError
            reason = "neither safetensors nor a file of torch.save"
        raise ValueError(f"weights file can't be read: {path} ({reason})") from None


class _Refused(ValueError):
    """The file is readable, but asks for what is not given."""


def _load(file: Path | io.BytesIO) -> Any:
    """`torch.load`, with inert placeholders for what the known libraries add."""
    names = _foreign_names(file)
    for name in names:
        known = name.startswith((*_INERT_MODULES, "__torch__.", "torch.jit._pickle."))
        if not known and name not in _INERT_NAMES:
            raise _Refused(
                f"weights file names {name}, which is not data: refused without running it"
            )
    with warnings.catch_warnings(), torch.serialization.safe_globals([(Inert, n) for n in names]):
        warnings.simplefilter("ignore")  # about pickle protocols: the error says enough
        return torch.load(file, map_location="cpu", weights_only=True)


def _foreign_names(file: Path | io.BytesIO) -> list[str]:
    if isinstance(file, Path) and not zipfile.is_zipfile(file):
        return []  # the format before PyTorch 1.6: plain state dicts only
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    if isinstance(file, io.BytesIO):
        file.seek(0)
    return sorted(names)


def _check_zip(path: Path) -> None:
    """PyTorch compresses code alone; tensors that unpack to more than the file has are a bomb."""
    with zipfile.ZipFile(path) as archive:
        data = [e for e in archive.infolist() if _inside(e.filename).startswith("data")]
    if (size := sum(entry.file_size for entry in data)) > path.stat().st_size:
        raise _Refused(f"weights file must not be compressed: {path} unpacks to {size:,} bytes")


def _inside(name: str) -> str:
    """The name of an archive's member without the archive's own."""
    return name.partition("/")[2]


def _without_code(archive: zipfile.ZipFile) -> io.BytesIO:
    """The archive's tensors and the pickle that names them, as `torch.save` would write them."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as copy:
        for name in archive.namelist():
            inside = _inside(name)
            if inside.startswith("data") or inside in ("version", "byteorder"):
                copy.writestr(f"archive/{inside}", archive.read(name))
    out.seek(0)
    return out


def _module_tensors(module: Any, prefix: str = "") -> dict[str, Tensor]:
    """The state dict of a TorchScript module whose classes were read as placeholders."""
    tensors = {}
    for name, value in (module.state if isinstance(module.state, dict) else {}).items():
        if isinstance(value, Tensor):
            tensors[prefix + name] = value
        elif isinstance(value, Inert):
            tensors |= _module_tensors(value, f"{prefix}{name}.")
    return tensors


def _source(path: Path, loaded: Any, configs: dict, scripted: bool = False) -> Source:
    text = None
    if isinstance(loaded, dict):
        meta = loaded.get("meta")
        if isinstance(meta, dict):
            text = meta.get("cfg") if isinstance(meta.get("cfg"), str) else None
        for key in ("state_dict", "model"):
            if isinstance(loaded.get(key), dict):
                loaded = loaded[key]
                break
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise _Refused(f"weights file must hold a state dict of tensors: {path}")
    tensors = {name.removeprefix("module."): tensor.detach() for name, tensor in loaded.items()}
    for name, tensor in tensors.items():
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise _Refused(
                f"{path}: {name} claims shape {list(tensor.shape)}, its data are smaller"
            )
    return Source(path=path, tensors=tensors, configs=configs, text=text, scripted=scripted)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"weights file can't be read: {path} ({error})") from None


def _read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    return {name: _read_json(folder / name) for name in CONFIG_FILES if (folder / name).is_file()}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a JSON object: got {type(values).__name__}")
    return values
