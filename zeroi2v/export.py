"""Write a merged model for deployment, and prove the file before it is kept.

    python -m zeroi2v.export FOLDER --format onnx|torch-export|clip --out FILE [--dtype fp16]

`onnx` and `torch-export` take float32 video `[B, 3, T, H, W]`, any B, and give float32 logits
whatever the dtype of the weights. With `--with-preprocess` they take a clip's frames as they are
decoded, uint8 `[B, T, H, W, 3]` of any size, and give probabilities. Labels are inside the file,
and how clips are made. Heads are grouped by frame offset, each group with its own projection, so
that keys and values of the shifted heads alone are moved and no others copied. `clip` is the image
tower in OpenAI's layout.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import sys
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from zeroi2v.cli import run
from zeroi2v.config import ModelConfig
from zeroi2v.data.preprocess import crop_views, normalise
from zeroi2v.extras import require
from zeroi2v.files import check_writable, whole_file
from zeroi2v.model.attention import STDHA
from zeroi2v.model.vit import VideoViT
from zeroi2v.reparam import DTYPES, merge, relative_error, seeded_clips, verify
from zeroi2v.storage.checkpoint import load, model_folder
from zeroi2v.storage.runtimes import CONFIG_KEY, ExportedModel, OnnxModel, embedded

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
    model: VideoViT,
    format: str,
    path: str | Path,
    dtype: torch.dtype | None = None,
    with_preprocess: bool = False,
) -> ExportReport | None:
    """Writes `model` to `path`; the file is compared with the model before it gets that name.

    Args:
        model: merged or plain, its weights not in 8 bits, on the CPU; left untouched.
        format: `onnx`, `torch-export` or `clip`.
        path: file to write, with one of the format's suffixes in `FORMATS`.
        dtype: of the weights; that of the model by default.
        with_preprocess: the file resizes, crops and normalises, and averages the crops.

    Returns:
        The comparison with the fp32 model; None for `clip`, whose tensors are read back bit-equal.

    Raises:
        ValueError: adapters that are not merged, 8-bit weights, a wrong suffix, or a file that
            differs.
        OSError: `path` can't be written.
    """
    path = check_export_path(format, path)
    if (held := model.quantization) is not None:
        raise ValueError(
            f"model must have wide weights to be exported: its blocks have {held.title}; "
            "export the model that it was made of"
        )
    dtype = dtype or model.head.weight.dtype
    if format == "onnx" and dtype == torch.bfloat16:
        raise ValueError(
            "dtype must be fp32 or fp16 for onnx: ONNX Runtime has no bf16 convolution"
        )
    if format == "onnx":
        require("format onnx", "onnx", "onnxscript", "onnxruntime")
    process = model.config.preprocess
    if with_preprocess and format == "clip":
        raise ValueError("--with-preprocess is for the formats onnx and torch-export: got clip")
    if with_preprocess and (process.interpolation != "bilinear" or process.antialias):
        raise ValueError(
            "--with-preprocess needs a model whose frames are resized bilinear without "
            f"antialiasing: got {process.interpolation}, antialias {process.antialias}"
        )
    if model.config.adapter is not None:
        raise ValueError("model must be merged: it has adapters")
    if format == "clip":
        _check_clip(model.config)
    model = copy.deepcopy(model).to(dtype).eval()
    if format == "clip":
        with whole_file(path) as temporary:
            _write_clip(model, temporary)
            temporary.chmod(0o644)  # safetensors lets its owner alone read it
        return None
    file = _OfFrames(model) if with_preprocess else _OfClips(model)
    write, reader = {
        "onnx": (_write_onnx, OnnxModel),
        "torch-export": (_write_program, ExportedModel),
    }[format]
    with whole_file(path) as temporary:
        write(file, temporary)
        report = _compare(model, file, reader(temporary))
        if not report.rel <= report.limit:
            raise ValueError(f"{format} file not kept: {report}")
    return report


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
        self.rotary, self.ln = attention.rotary, copy.deepcopy(attention.ln)
        if self.ln:
            for parameter in self.ln.parameters():
                parameter.data = parameter.data.unflatten(0, (len(offsets), -1))[order].flatten()
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
            if self.rotary:
                query = query if self.cls_only else self._turned(query)
                both = torch.cat([self._turned(both[:, :, :, :heads]), both[:, :, :, heads:]], 3)
            query = query.flatten(0, 1).transpose(1, 2)  # [B*T, H, M, D]
            key, value = both.flatten(0, 1).transpose(1, 2).split(heads, dim=1)
            outs.append(F.scaled_dot_product_attention(query, key, value).transpose(1, 2))
        out = torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]
        out = out.flatten(-2).unflatten(0, (-1, frames))
        return self.out_proj(self.ln(out) if self.ln else out)

    def _turned(self, x: Tensor) -> Tensor:
        """`x [B, T, N, H, D]` with its last P tokens turned, as by `zeroi2v_kernels.rotary`."""
        table = self.rotary.table(torch.float32)
        places = table.shape[1]
        before, patches = x.split((x.shape[2] - places, places), dim=2)
        cosines, sines = table[:, :, None]  # [P, 1, D/2] each
        first, second = patches.chunk(2, dim=-1)
        turned = [first * cosines - second * sines, second * cosines + first * sines]
        return torch.cat([before, torch.cat(turned, dim=-1).to(x.dtype)], dim=2)


class _OfClips(nn.Module):
    """float32 video to float32 logits, whatever the weights' dtype."""

    names = ("video", "logits")
    takes = "clips"

    def __init__(self, model: VideoViT):
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        blocks, config = self.model.transformer.resblocks, model.config
        for index, block in enumerate(blocks):
            cls_only = config.reads_class and index == len(blocks) - 1
            block.attn = GroupedAttention(block.attn, config.num_frames, cls_only)

    @property
    def config(self) -> ModelConfig:
        """Of the model."""
        return self.model.config

    def forward(self, video: Tensor) -> Tensor:
        return self.model(video).float()

    def examples(self) -> list[Tensor]:
        """Inputs for the comparison: four clips."""
        return [seeded_clips(self.model, 4)]

    def dynamic(self) -> dict[int, torch.export.Dim]:
        """Dimensions of the input that are free."""
        return {0: torch.export.Dim("batch", min=1, max=4096)}


class _OfFrames(_OfClips):
    """Frames as decoded, uint8 `[B, T, H, W, 3]`, to the mean over the crops of their softmax."""

    names = ("frames", "probabilities")
    takes = "frames"

    def forward(self, frames: Tensor) -> Tensor:
        config, (_, crops) = self.config, self.config.preprocess.test_views
        side, short_side = config.image_size, config.preprocess.test_short_side
        views = crop_views(frames, short_side, side, crops, config.preprocess)
        video = normalise(views.flatten(0, 1), config.preprocess)
        return super().forward(video).softmax(-1).unflatten(0, (crops, -1)).mean(0)

    def examples(self) -> list[Tensor]:
        """Larger and smaller frames than the model's, lying, upright and square."""
        side, generator = self.config.image_size, torch.Generator().manual_seed(0)
        sizes = [(side * 3 // 2, side * 2), (side * 2, side + 1), (side, side), (side // 2, side)]
        shapes = [(4, self.config.num_frames, *size, 3) for size in sizes]
        return [
            torch.randint(256, shape, generator=generator, dtype=torch.uint8) for shape in shapes
        ]

    def dynamic(self) -> dict[int, torch.export.Dim]:
        sizes = {
            2: torch.export.Dim("height", min=2, max=2**14),
            3: torch.export.Dim("width", min=2, max=2**14),
        }
        return super().dynamic() | sizes


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A layer of weight `[P, H, D, C]` and bias `[P, H, D]`, its outputs in that order."""
    layer = nn.Linear(weight.shape[-1], bias.numel(), device="meta")
    layer.weight = nn.Parameter(weight.flatten(0, 2).contiguous())
    layer.bias = nn.Parameter(bias.flatten().contiguous())
    return layer


def program(file: VideoViT | _OfClips) -> torch.export.ExportedProgram:
    """What goes into a file, or a model, merged or plain, as a program with a dynamic batch."""
    file = _OfClips(file) if isinstance(file, VideoViT) else file
    with torch.no_grad():
        example = file.examples()[0][:2]
        return torch.export.export(file, (example,), dynamic_shapes=(file.dynamic(),))


def _write_program(file: _OfClips, path: Path) -> None:
    extra = {CONFIG_KEY: embedded(file.config, file.takes)}
    torch.export.save(program(file), path, extra_files=extra)


def _write_onnx(file: _OfClips, path: Path) -> None:
    if sum(p.numel() * p.element_size() for p in file.parameters()) >= 2**31 - 2**20:
        raise ValueError("an ONNX file must be below 2 GiB: take --dtype fp16 or torch-export")
    # It warns of torchvision, which nothing here needs.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        exported = torch.onnx.export(
            program(file),
            dynamo=True,
            input_names=[file.names[0]],
            output_names=[file.names[1]],
            verbose=False,
        )
    exported.model.metadata_props[CONFIG_KEY] = embedded(file.config, file.takes)
    exported.save(path, external_data=False)


def _check_clip(config: ModelConfig) -> None:
    """Raises ValueError for a model with parts that no CLIP has and no reader of CLIP expects."""
    clip = ModelConfig()
    parts = ["norm", "norm_eps", "norm_attended", "norm_hidden", "rotary"]
    parts += ["class_token", "num_registers", "pooling"]
    theirs = {name: (getattr(clip, name),) for name in parts}
    for name, values in (theirs | {"activation": ("quick_gelu", "gelu")}).items():
        if (value := getattr(config, name)) not in values:
            rule = " or ".join(map(str, values))
            raise ValueError(f"format clip needs a model with {name} {rule}: got {value}")


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
        raise ValueError(f"clip file not kept: its tensors differ when read back: {path}")


def _compare(model: VideoViT, file: _OfClips, written: nn.Module) -> ExportReport:
    """Runs the file and the model on the same inputs, in batches of one and of three."""
    limit = TOLERANCE
    with torch.no_grad():
        wide = copy.deepcopy(file)
        wide.model = copy.deepcopy(model).float()
        truth = torch.cat([wide(x) for x in file.examples()])
        found = torch.cat([written(part) for x in file.examples() for part in (x[:1], x[1:])])
        if model.head.weight.dtype != torch.float32:
            wide.model = model
            half = torch.cat([wide(x) for x in file.examples()])
            limit = max(limit, HALF_PRECISION_MARGIN * relative_error(half, truth))
    return ExportReport(rel=relative_error(found, truth), limit=limit, batches=(1, 3))


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
    parser.add_argument(
        "--with-preprocess",
        action="store_true",
        help="the file takes uint8 frames of any size, and gives probabilities",
    )
    args = parser.parse_args(argv)

    source = model_folder(args.model)
    path = check_export_path(args.format, args.out)
    model = load(source, widen=False)
    if model.config.adapter is not None:
        merged = merge(model)
        report = verify(model, merged, seeded_clips(model))
        print(f"merged       {report}")
        if not report.passed:
            raise ValueError(f"{source} not exported: merging changed its outputs")
        model = merged
    report = export(model, args.format, path, DTYPES.get(args.dtype), args.with_preprocess)
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
