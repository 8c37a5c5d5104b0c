"""Merge a model's adapters into its frozen weights, and prove that nothing changed.

    python -m zeroi2v.reparam RUN_OR_FOLDER --out FOLDER [--dtype fp32|bf16|fp16|fp8|int8]
                              [--clips LIST]

Merging is computed in float64 and then cast. Before anything is written, the merged model is run
beside the adapted one: in float64, where they must agree to 1e-10 on one clip, and in the dtype
asked for on all. All of it is computed on the GPU if there is one.

fp8 and int8 round the weights of the blocks, and what they are multiplied with, to 8 bits, which
shows. So the limit is what such rounding costs this model: it runs in float32 with random errors of
that size in both factors of each product (`zeroi2v.model.quantization_proof`).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from zeroi2v.cli import run
from zeroi2v.model.adapter import LinearAdapter, merge_after, merge_before
from zeroi2v.model.quantization import FORMATS, FP8, INT8, quantized
from zeroi2v.model.quantization_proof import decided, weight_errors, with_noise
from zeroi2v.model.vit import VideoViT
from zeroi2v.storage.checkpoint import check_output_folder, load, model_folder, save

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
QUANTIZED = {"fp8": FP8, "int8": INT8}
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
HALF_PRECISION_MARGIN = 1.1
QUANTIZED_MARGIN, QUANTIZED_RUNS = 2.0, 2
"""How many times the root mean square of what so many runs with random errors are off by."""
QUANTIZED_CAP = 0.25
"""What the relative error of logits may be with 8-bit weights, however sensitive the model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeReport:
    """How far a merged model is from the adapted one it was made of."""

    dtype: str
    """The merged model's dtype, in which both were run."""
    clips: int
    """Number of clips they were run on."""
    max_abs: float
    """Largest absolute difference of a logit."""
    rel: float
    """Norm of the logits' difference over the norm of the adapted model's logits. In half precision
    the truth is the adapted model in fp64, and `rel` the root mean square over `per_block` and the
    logits: a few logits alone are too small a sample of rounding errors."""
    rel_limit: float
    """What `rel` may be: 1e-10 in fp64, 1e-5 in fp32, in half precision 1.1 times what the adapted
    model in the same dtype has, with 8-bit weights twice what random errors of their rounding cost,
    0.25 at most."""
    top1_agreement: float
    """Fraction of clips on which both name the same class."""
    agreement_limit: float
    """What that must be: 1 in fp64 and fp32, 0 in half precision, with 8-bit weights the fraction
    of clips whose best two logits are too far apart for an error of `rel_limit` to change their
    order."""
    per_block: tuple[float, ...]
    """`rel` of the first token (CLS, if there is one) after each block: where an error is from."""
    per_block_limit: tuple[float, ...] = ()
    """What these may be with 8-bit weights, as `rel_limit`."""
    per_block_weights: tuple[float, ...] = ()
    """With 8-bit weights the largest error of one, in units of what rounding it by the scale of its
    own row may cost: 1 at most."""
    passed: bool
    """Whether the merged model may stand for the adapted one."""

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        least = f" (at least {self.agreement_limit:.0%})" if self.per_block_limit else ""
        return (
            f"{self.dtype}: {verdict}, relative error {self.rel:.2e} (limit {self.rel_limit:.2e}), "
            f"largest {self.max_abs:.2e}, top-1 agreement {self.top1_agreement:.0%}{least} "
            f"on {self.clips} clips"
        )

    @property
    def worst(self) -> str:
        """The block whose error is largest, or with 8-bit weights nearest to its limits."""
        rounded = len(self.per_block_limit) > 0
        limits = self.per_block_limit if rounded else (1.0,) * len(self.per_block)
        excess = [error / limit for error, limit in zip(self.per_block, limits, strict=True)]
        if rounded:
            excess = list(map(max, excess, self.per_block_weights))
        block = max(range(len(excess)), key=excess.__getitem__)
        told = f"block {block} has {self.per_block[block]:.2e}"
        if not rounded:
            return told
        weights = self.per_block_weights[block]
        return f"{told} (limit {limits[block]:.2e}) and weights off by {weights:.2f} of rounding"


def merge(
    model: VideoViT, dtype: torch.dtype | None = None, clips: Tensor | None = None
) -> VideoViT:
    """A model without adapters that computes what `model` does in eval mode.

    Args:
        model: an adapted model; left untouched.
        dtype: of the merged weights; that of `model` by default. `torch.float8_e4m3fn` and
            `torch.int8` are those of the blocks alone (`zeroi2v.model.quantization.quantized`).
        clips: for int8, what `quantized` takes.

    Returns:
        A `VideoViT` with `config.adapter` None, on the device of `model`, in eval mode.

    Raises:
        ValueError: `model` has no adapters.

    Source: ZeroI2V (arXiv 2310.01324), section 3.3.
    """
    if model.config.adapter is None:
        raise ValueError("model must have adapters: got one that is merged or plain already")
    if dtype in FORMATS:
        return quantized(merge(model, torch.float64), FORMATS[dtype], clips)
    dtype = dtype or model.head.weight.dtype
    with torch.device("meta"):
        merged = VideoViT(dataclasses.replace(model.config, adapter=None))
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    made: dict[str, Tensor] = {}
    with torch.no_grad():
        for index, block in enumerate(model.transformer.resblocks):
            if index < model.config.adapt_from:
                continue
            place = f"transformer.resblocks.{index}."
            for names, adapter, rule in (
                (("attn.in_proj_weight", "attn.in_proj_bias"), block.attn.in_adapter, merge_before),
                (
                    ("attn.out_proj.weight", "attn.out_proj.bias"),
                    block.attn.out_adapter,
                    merge_after,
                ),
                (("mlp.c_fc.weight", "mlp.c_fc.bias"), block.mlp.in_adapter, merge_before),
                (("mlp.c_proj.weight", "mlp.c_proj.bias"), block.mlp.out_adapter, merge_after),
            ):
                weight, bias = (place + name for name in names)
                both = rule(state[weight], state[bias], adapter)
                made[weight], made[bias] = (tensor.to(dtype) for tensor in both)
        for name in merged.state_dict().keys() - made.keys():
            made[name] = state[name].to(dtype, copy=True)
    merged.load_state_dict(made, assign=True)
    merged.origins = dict(model.origins)
    return merged.eval()


def verify(adapted: VideoViT, merged: VideoViT, clips: Tensor) -> MergeReport:
    """Runs both models on the same clips and compares logits, top-1 and every block's output.

    Args:
        adapted: the model that was merged; left untouched. For a `merged` with 8-bit weights it may
            also be a merged model in a wider dtype.
        merged: what `merge` made of it; its dtype is the one the comparison is made in.
        clips: normalised video `[B, 3, T, H, W]`, any floating dtype.

    Returns:
        The report; `passed` says whether the limits of its dtype hold.
    """
    dtype = merged.head.weight.dtype
    exact = dtype in TOLERANCE and merged.quantization is None
    ours = _trace(merged, clips, dtype)
    truth = _trace(adapted, clips, dtype if exact else torch.float64)
    errors = [relative_error(a, b) for a, b in zip(ours, truth, strict=True)]
    rel, limits, weights, least, names = errors[-1], (), (), 1.0, truth[-1]
    if merged.quantization is not None:
        plain = adapted if adapted.config.adapter is None else merge(adapted, torch.float32)
        weights = weight_errors(plain, merged)
        *limits, limit = _rounding_limits(plain, merged, clips, truth)
        limit = min(limit, QUANTIZED_CAP)
        least = decided(truth[-1], limit)
    elif exact:
        limit = TOLERANCE[dtype]
    else:
        theirs = _trace(adapted, clips, dtype)
        own = [relative_error(a, b) for a, b in zip(theirs, truth, strict=True)]
        rel, limit = _mean_square(errors) ** 0.5, HALF_PRECISION_MARGIN * _mean_square(own) ** 0.5
        least, names = 0.0, theirs[-1]
    logits, expected = ours[-1], truth[-1]
    agreement = (logits.argmax(-1) == names.argmax(-1)).double().mean().item()
    finite = bool(torch.isfinite(logits).all() and torch.isfinite(expected).all())
    within = all(error <= most for error, most in zip(errors, limits, strict=False))
    within = within and all(error <= 1 for error in weights)
    return MergeReport(
        dtype=merged.quantization.name
        if merged.quantization
        else str(dtype).removeprefix("torch."),
        clips=len(clips),
        max_abs=(logits - expected).abs().max().item(),
        rel=rel,
        rel_limit=limit,
        top1_agreement=agreement,
        agreement_limit=least,
        per_block=tuple(errors[:-1]),
        per_block_limit=tuple(limits),
        per_block_weights=tuple(weights),
        passed=finite and within and rel <= limit and agreement >= least,
    )


def _rounding_limits(
    plain: VideoViT, made: VideoViT, clips: Tensor, truth: list[Tensor]
) -> list[float]:
    """What the relative error of each part of `truth` may be in `made`, with 8-bit weights."""
    squares = [0.0] * len(truth)
    for seed in range(QUANTIZED_RUNS):
        noisy = _trace(with_noise(plain, made, seed), clips, torch.float32)
        for place, (a, b) in enumerate(zip(noisy, truth, strict=True)):
            squares[place] += relative_error(a, b) ** 2 / QUANTIZED_RUNS
    return [QUANTIZED_MARGIN * square**0.5 for square in squares]


def _trace(model: VideoViT, clips: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The first token after each block, then the logits, of `model` in eval mode and `dtype`.

    If it has another dtype, a copy is cast.
    """
    if model.head.weight.dtype != dtype:
        model = copy.deepcopy(model).to(dtype)
    was_training = model.training
    model.eval()
    trace: list[Tensor] = []
    hooks = [
        block.register_forward_hook(lambda _m, _args, out: trace.append(out[:, :, 0].double()))
        for block in model.transformer.resblocks
    ]
    rows = []
    try:
        with torch.no_grad():
            # One by one: L/14 is big.
            for clip in clips.to(model.head.weight.device, dtype).split(1):
                rows.append(model(clip).double())
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    depth = model.config.depth
    return [torch.cat(trace[block::depth]) for block in range(depth)] + [torch.cat(rows)]


def relative_error(value: Tensor, truth: Tensor) -> float:
    return ((value - truth).norm() / truth.norm().clamp_min(1e-300)).item()


def _mean_square(values: list[float]) -> float:
    return sum(value * value for value in values) / len(values)


def seeded_clips(model: VideoViT, count: int = 2) -> Tensor:
    """Reproducible noise clips `[count, 3, T, H, W]` for `model`, scaled as normalised video."""
    config = model.config
    generator = torch.Generator().manual_seed(0)
    shape = (count, 3, config.num_frames, config.image_size, config.image_size)
    return torch.randn(shape, generator=generator)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m zeroi2v.reparam",
        description="Merge a model's adapters into its weights. The merged model is verified "
        "against the adapted one first, and written only if it passes. Computed on the GPU, if "
        "there is one; CUDA_VISIBLE_DEVICES= hides it.",
    )
    parser.add_argument("model", help="run folder (its best model) or model folder")
    parser.add_argument("--out", required=True, help="folder for the merged model")
    parser.add_argument(
        "--dtype",
        choices=[*DTYPES, *QUANTIZED],
        help="of the merged weights (default: as is); fp8 and int8 take a merged model too",
    )
    parser.add_argument(
        "--clips", help="video list to verify on, and to fit int8 to (default: seeded noise)"
    )
    parser.add_argument("--root", help="folder the list's paths are relative to")
    args = parser.parse_args(argv)

    source = model_folder(args.model)
    out = check_output_folder(args.out)
    if out.resolve() == source.resolve():
        raise ValueError(f"--out must not be the model itself: got {args.out}")
    adapted = load(source, widen=False)
    format, is_merged = QUANTIZED.get(args.dtype), adapted.config.adapter is None
    if (held := adapted.quantization) is not None:
        raise ValueError(f"{source} is merged already: its blocks have {held.title} weights")
    if is_merged and format is None:
        raise ValueError(f"{source} is merged already: it has no adapters")
    clips = _video_clips(adapted, args.clips, args.root) if args.clips else seeded_clips(adapted)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    adapted.to(device)
    print(f"merging {source}: {sum(_adapter_sizes(adapted)):,} adapter parameters, on {device}")
    if format is not None:
        on = args.clips or "seeded noise; --clips takes real videos"
        print(f"{format.title} is {'fitted to and ' * format.has_channels}verified on {on}")
    own = adapted.head.weight.dtype
    dtype = DTYPES.get(args.dtype, own) if format is None else format.dtype
    reports = []
    for proof in dict.fromkeys((dtype,) if is_merged else (torch.float64, dtype)):
        adapted.to(torch.float64 if proof == torch.float64 else own)  # in place: L/14 is big
        make = quantized if is_merged else merge
        merged = make(adapted, format if is_merged else proof, clips)
        # Arithmetic shows in one clip, and float64 is slow.
        reports.append(verify(adapted, merged, clips[:1] if proof == torch.float64 else clips))
        print(reports[-1])
        if not reports[-1].passed:
            raise ValueError(
                "merged model not written: it differs from the adapted one; of the blocks, "
                f"{reports[-1].worst}"
            )
    figures = {
        "source": str(args.model),
        "clips": args.clips or "seeded noise",
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "parameters_before": sum(p.numel() for p in adapted.parameters()),
        "parameters_after": sum(p.numel() for p in merged.parameters()),
        "checks": [dataclasses.asdict(report) for report in reports],
    }
    save(merged, out, {"merge_report.json": json.dumps(figures, indent=2)})
    print(f"written to {out}: {figures['parameters_after']:,} parameters")


def _adapter_sizes(model: nn.Module) -> list[int]:
    adapters = (m for m in model.modules() if isinstance(m, LinearAdapter))
    return [p.numel() for adapter in adapters for p in adapter.parameters()]


def _video_clips(model: VideoViT, source: str, root: str | None) -> Tensor:
    """The first view of up to 8 videos of a list, `[n, 3, T, H, W]`."""
    from zeroi2v.data.annotations import read_videos
    from zeroi2v.data.views import ViewLoader

    samples = read_videos(source, root or Path(source).parent)[:8]
    loader = ViewLoader(samples, model.config, batch_size=1)
    clips = [batch.video[:, 0] for batch in loader.epoch() if batch.index[0] >= 0]
    if not clips:
        raise ValueError(f"--clips must hold a video that can be decoded: got {source}")
    return torch.cat(clips)


if __name__ == "__main__":
    sys.exit(run(main))
