"""Write a merged model for deployment, and prove the file before it is kept.

    python -m zeroi2v.export FOLDER --format onnx|torch-export|clip --out FILE [--dtype fp16]

`onnx` and `torch-export` take float32 video `[B, 3, T, H, W]`, any B, and give float32 logits
whatever the dtype of the weights; preprocessing and labels are inside the file. Heads are grouped
by frame offset, each group with its own projection, so that keys and values of the shifted heads
alone are moved and no others copied. `clip` is the image tower in OpenAI's layout.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zeroi2v.attention import STDHA
from zeroi2v.checkpoint import check_writable, load, model_folder
from zeroi2v.cli import run
from zeroi2v.deployed import CONFIG_KEY, ExportedModel, OnnxModel, embedded
from zeroi2v.extras import require
from zeroi2v.model import VideoViT
from zeroi2v.reparam import DTYPES, merge, seeded_clips, verify

FORMATS = {"onnx": (".onnx",), "torch-export": (".pt2",), "clip": (".safetensors", ".pt")}
TOLERANCE = 1e-4
"""Largest relative error of logits in fp32."""
HALF_PRECISION_MARGIN = 2.0
"""In half precision: how much further from fp32 the file may be than PyTorch in that dtype."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """How far a written file is from the model it was made of."""

    rel: float
    """Norm of the logits' difference over the norm of the fp32 model's logits."""
    limit: float
    """What `rel` may be."""
    batches: tuple[int, ...]
    """The batch sizes compared."""

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.batches))
        return f"relative error {self.rel:.2e} (limit {self.limit:.2e}), batches of {sizes}"


def export(
    model: VideoViT, format: str, path: str | Path, dtype: torch.dtype | None = None
) -> ExportReport | None:
    """Writes `model` to `path`; the file is compared with the model before it takes its name.

    Args:
        model: merged or plain, on the CPU; left untouched.
        format: `onnx`, `torch-export` or `clip`.
        path: file to write, with one of the format's suffixes in `FORMATS`.
        dtype: of the weights; that of the model by default.

    Returns:
        The comparison with the fp32 model; None for `clip`, whose tensors are read back bit-equal.

    Raises:
        ValueError: adapters that are not merged, a wrong suffix, or a file that differs.
        OSError: `path` can't be written.
    """
    path = check_export_path(format, path)
    dtype = dtype or model.head.weight.dtype
    if format == "onnx" and dtype == torch.bfloat16:
        raise ValueError(
            "dtype must be fp32 or fp16 for onnx: ONNX Runtime has no bf16 convolution"
        )
    if format == "onnx":
        require("format onnx", "onnx", "onnxscript", "onnxruntime")
    if model.config.adapter is not None:
        raise ValueError("model must be merged: it has adapters")
    model = copy.deepcopy(model).to(dtype).eval()
    if format == "clip":
        _replace(path, lambda temporary: _write_clip(model, temporary))
        return None
    write, reader = {
        "onnx": (_write_onnx, OnnxModel),
        "torch-export": (_write_program, ExportedModel),
    }[format]
    reports = []

    def write_and_prove(temporary: Path) -> None:
        write(model, temporary)
        reports.append(_compare(model, reader(temporary)))
        if not reports[0].rel <= reports[0].limit:
            raise ValueError(f"{format} file not kept: {reports[0]}")

    _replace(path, write_and_prove)
    return reports[0]


def check_export_path(format: str, path: str | Path) -> Path:
    """`path`, its folder made. Raises ValueError for another suffix than the format's."""
    path = Path(path)
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}: got {format!r}")
    if path.suffix not in FORMATS[format]:
        wanted = " or ".join(FORMATS[format])
        raise ValueError(f"--out must end in {wanted} for format {format}: got {path}")
    return check_writable(path, "--out")


class GroupedAttention(nn.Module):
    """`STDHA` for export: heads of one offset are projected, shifted and attended together.

    Computes what the given module does; its weights are the same numbers in another order.
    """

    def __init__(self, attention: STDHA, num_frames: int, cls_only: bool):
        super().__init__()
        self.cls_only = cls_only
        offsets = [o if abs(o) < num_frames else 0 for o in attention.head_offsets]
        heads = {o: [h for h, p in enumerate(offsets) if p == o] for o in sorted(set(offsets))}
        self.offsets = tuple(heads)
        self.num_heads = tuple(len(group) for group in heads.values())
        weight = attention.in_proj_weight.detach().unflatten(0, (3, len(offsets), -1))
        bias = attention.in_proj_bias.detach().unflatten(0, (3, len(offsets), -1))
        # The class token alone asks in the last block, so queries have a layer of their own.
        self.queries, self.keys_values = nn.ModuleList(), nn.ModuleList()
        for group in heads.values():
            self.queries.append(_linear(weight[:1, group], bias[:1, group]))
            self.keys_values.append(_linear(weight[1:, group], bias[1:, group]))
        order = [h for group in heads.values() for h in group]
        self.out_proj = copy.deepcopy(attention.out_proj)
        columns = self.out_proj.weight.detach().unflatten(1, (len(offsets), -1))
        self.out_proj.weight = nn.Parameter(columns[:, order].flatten(1))

    def forward(self, x: Tensor, cls_only: bool = False) -> Tensor:
        """`x [B, T, N, C]` -> `[B, T, N, C]`, or `[B, T, 1, C]` for the CLS token alone."""
        frames = x.shape[1]
        asking = x[:, :, :1] if self.cls_only else x
        outs = []
        for group, (offset, heads) in enumerate(zip(self.offsets, self.num_heads, strict=True)):
            query = self.queries[group](asking).unflatten(-1, (heads, -1))
            both = self.keys_values[group](x).unflatten(-1, (2 * heads, -1))
            if offset < 0:
                both = torch.cat([both[:, :-offset], both[:, :offset]], dim=1)
            elif offset > 0:
                both = torch.cat([both[:, offset:], both[:, frames - offset :]], dim=1)
            query = query.flatten(0, 1).transpose(1, 2)  # [B*T, H, M, D]
            key, value = both.flatten(0, 1).transpose(1, 2).split(heads, dim=1)
            outs.append(F.scaled_dot_product_attention(query, key, value).transpose(1, 2))
        out = torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]
        return self.out_proj(out.flatten(-2).unflatten(0, (-1, frames)))


class _Deployable(nn.Module):
    """float32 video to float32 logits, whatever the weights' dtype."""

    def __init__(self, model: VideoViT):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        blocks = self.model.transformer.resblocks
        for index, block in enumerate(blocks):
            last = index == len(blocks) - 1
            block.attn = GroupedAttention(block.attn, model.config.num_frames, last)

    def forward(self, video: Tensor) -> Tensor:
        return self.model(video).float()


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A layer of weight `[P, H, D, C]` and bias `[P, H, D]`, its outputs in that order."""
    layer = nn.Linear(weight.shape[-1], bias.numel(), device="meta")
    layer.weight = nn.Parameter(weight.flatten(0, 2).contiguous())
    layer.bias = nn.Parameter(bias.flatten().contiguous())
    return layer


def program(model: VideoViT) -> torch.export.ExportedProgram:
    """`model`, merged or plain, as a `torch.export` program with a dynamic batch."""
    batch = torch.export.Dim("batch", min=1, max=4096)
    with torch.no_grad():
        return torch.export.export(
            _Deployable(model), (seeded_clips(model, 2),), dynamic_shapes=({0: batch},)
        )


def _write_program(model: VideoViT, path: Path) -> None:
    torch.export.save(program(model), path, extra_files={CONFIG_KEY: embedded(model.config)})


def _write_onnx(model: VideoViT, path: Path) -> None:
    if sum(p.numel() * p.element_size() for p in model.parameters()) >= 2**31 - 2**20:
        raise ValueError("an ONNX file must be below 2 GiB: take --dtype fp16 or torch-export")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        exported = torch.onnx.export(
            program(model),
            dynamo=True,
            input_names=["video"],
            output_names=["logits"],
            verbose=False,
        )
    exported.model.metadata_props[CONFIG_KEY] = embedded(model.config)
    exported.save(path, external_data=False)


def _write_clip(model: VideoViT, path: Path) -> None:
    """The image tower by OpenAI's names, with an identity projection so that it loads strictly."""
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name != "temporal_embedding" and not name.startswith("head.")
    }
    state["proj"] = torch.eye(model.config.width, dtype=state["ln_post.weight"].dtype)
    if path.suffix == ".safetensors":
        save_file(state, path, metadata={"format": "pt", CONFIG_KEY: embedded(model.config)})
        read = load_file(path)
    else:
        torch.save(state, path)
        read = torch.load(path, weights_only=True)
    if read.keys() != state.keys() or any(not torch.equal(read[n], t) for n, t in state.items()):
        raise ValueError(f"clip file not kept: it reads back other than it was written: {path}")


def _compare(model: VideoViT, written: nn.Module) -> ExportReport:
    """Runs the file and the model on the same clips, in batches of one and of three."""
    clips = seeded_clips(model, 4)
    dtype = model.head.weight.dtype
    with torch.no_grad():
        truth = copy.deepcopy(model).float()(clips)
        logits = torch.cat([written(clips[:1]), written(clips[1:])])
        limit = TOLERANCE
        if dtype != torch.float32:
            limit = max(limit, HALF_PRECISION_MARGIN * _rel(model(clips.to(dtype)).float(), truth))
    return ExportReport(rel=_rel(logits, truth), limit=limit, batches=(1, 3))


def _rel(value: Tensor, truth: Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` fill a file beside `path`, which takes its place if all went well."""
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m zeroi2v.export",
        description="Write a model for deployment. The file is run beside the model first, and "
        "kept only if both agree.",
    )
    parser.add_argument("model", help="run folder (its best model) or model folder")
    parser.add_argument("--format", required=True, choices=FORMATS, help="kind of file")
    parser.add_argument("--out", required=True, help="file: .onnx, .pt2, .safetensors or .pt")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as is)")
    args = parser.parse_args(argv)

    source = model_folder(args.model)
    path = check_export_path(args.format, args.out)
    model = load(source)
    if model.config.adapter is not None:
        merged = merge(model)
        report = verify(model, merged, seeded_clips(model))
        print(f"merged       {report}")
        if not report.passed:
            raise ValueError(f"{source} not exported: merged, it is another model")
        model = merged
    report = export(model, args.format, path, DTYPES.get(args.dtype))
    if report is None:
        print("checked      tensors read back bit-equal")
        if any(model.config.head_offsets) or model.temporal_embedding.any():
            print("note         an image tower has no frame offsets and no temporal embedding:")
            print("             other code gives the features of single frames")
    else:
        print(f"checked      {report}")
    print(f"written      {path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    sys.exit(run(main))
