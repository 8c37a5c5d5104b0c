"""Deployed models with one interface: native folder, ONNX file, exported program.

Each is a module that maps normalised video `[B, 3, T, H, W]` float32 to logits `[B, num_classes]`
float32, and has the `config` it was made from: it was written into the file. Files that were
exported with their preprocessing have `takes == "frames"`, and map the frames of clips as decoded,
uint8 `[B, T, H, W, 3]`, to probabilities.
"""

from __future__ import annotations

import io
import json
import os
import re
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn

from zeroi2v.config import ModelConfig
from zeroi2v.extras import require
from zeroi2v.storage.checkpoint import load, model_folder

CONFIG_KEY = "zeroi2v.json"

# All that `torch.export.save` writes for a model of plain tensors. PyTorch would unpickle other
# members, and those that say `use_pickle`, without restriction.
_MEMBERS = re.compile(
    r"version|byteorder|archive_format|archive_version|\.data/\w+|\.format_version|"
    r"models/model\.json|data/weights/(model_weights_config\.json|weight_\d+)|"
    r"data/constants/(model_constants_config\.json|tensor_\d+)|data/sample_inputs/model\.pt|"
    r"extra/zeroi2v\.json"
)


def load_deployed(path: str | Path, device: torch.device | str = "cpu") -> nn.Module:
    """A model to predict with, on `device`: model or run folder, `.onnx` or `.pt2` file.

    An ONNX file runs in ONNX Runtime on the CPU, whatever the device.

    Raises:
        OSError: no such file or folder.
        ValueError: damaged, not made by `zeroi2v.export`, or a kind of file that is not a model.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        return OnnxModel(_existing(path))
    if path.suffix == ".pt2":
        return ExportedModel(_existing(path), device)
    if path.is_file():
        raise ValueError(f"model must be a folder, an .onnx or a .pt2 file: got {path}")
    return load(model_folder(path)).to(device)


class OnnxModel(nn.Module):
    """An ONNX file in ONNX Runtime, on the CPU."""

    def __init__(self, path: Path):
        super().__init__()
        require("an ONNX file", "onnxruntime")
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                os.fspath(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its errors share no base class
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"ONNX file can't be run: {path} ({reason})") from None
        metadata = self.session.get_modelmeta().custom_metadata_map
        self.config, self.takes = read_embedded(metadata.get(CONFIG_KEY), path)
        self.input = self.session.get_inputs()[0].name

    def forward(self, video: Tensor) -> Tensor:
        """Normalised `video [B, 3, T, H, W]` -> logits `[B, num_classes]`, or as `takes` says."""
        video = video if self.takes == "frames" else video.float()
        (out,) = self.session.run(None, {self.input: video.cpu().numpy()})
        return torch.from_numpy(out)


class ExportedModel(nn.Module):
    """A program saved by `torch.export`, run by PyTorch without our code."""

    def __init__(self, path: Path, device: torch.device | str = "cpu"):
        super().__init__()
        _check_archive(path)
        extra = {CONFIG_KEY: ""}
        try:
            program = torch.export.load(path, extra_files=extra)
        except Exception as error:  # a damaged archive makes the reader raise nearly anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"exported program can't be read: {path} ({reason})") from None
        self.config, self.takes = read_embedded(extra[CONFIG_KEY], path)
        if torch.device(device).type != "cpu":
            from torch.export.passes import move_to_device_pass  # `import torch` leaves it out

            program = move_to_device_pass(program, device)
        self.program = program.module(check_guards=False)

    def forward(self, video: Tensor) -> Tensor:
        """Normalised `video [B, 3, T, H, W]` -> logits `[B, num_classes]`, or as `takes` says."""
        return self.program(video if self.takes == "frames" else video.float())

    def train(self, mode: bool = True) -> ExportedModel:
        """Exported programs have no training mode; `False` is what they are."""
        return self


def embedded(config: ModelConfig, takes: str = "clips") -> str:
    """The text that goes into a file, for `read_embedded`. `takes`: "clips" or "frames"."""
    return json.dumps({"format": "zeroi2v", "takes": takes, "model": config.to_dict()})


def read_embedded(text: str | bytes | None, path: Path) -> tuple[ModelConfig, str]:
    """The config that was written into a file, and what it takes. Raises ValueError without one."""
    try:
        values = json.loads(text or "{}")
    except ValueError:
        values = {}
    if not isinstance(values, dict) or values.get("format") != "zeroi2v":
        raise ValueError(
            f"{path} has no embedded preprocessing or labels; re-export it with `zeroi2v export`"
        )
    return ModelConfig.from_dict(values.get("model")), values.get("takes", "clips")


def _existing(path: Path) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"model not found: {path}")
    return path


def _check_archive(path: Path) -> None:
    """Raises ValueError unless reading the archive unpickles tensors alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                inside = name.partition("/")[2]
                if not _MEMBERS.fullmatch(inside):
                    raise ValueError(f"it contains {inside}, which zeroi2v.export does not write")
                if inside.endswith("_config.json"):
                    entries = json.loads(archive.read(name)).get("config", {})
                    if any(entry.get("use_pickle") for entry in entries.values()):
                        raise ValueError(f"{inside} asks for a pickle")
                if inside == "data/sample_inputs/model.pt":
                    torch.load(io.BytesIO(archive.read(name)), weights_only=True)
    except OSError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"exported program can't be read: {path} ({reason})") from None
