"""What is found out and kept when the loss is not finite, or has exploded.

It is noticed before the optimizer's step, so the weights are still those that gave it. The clips
are made once more, which gives the same bits, and pass through the model once more, watched.
"""

from __future__ import annotations

import json
import math
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from train.job import Job
from train.processes import gather, together
from zeroi2v.checkpoint import replacing, save
from zeroi2v.model import VideoViT

MAX_LOSS = 100.0
"""Past it a mean cross-entropy counts as exploded: guessing among K classes gives log K."""


def is_bad(loss: float) -> bool:
    """Whether `loss` is not finite or has exploded."""
    return not loss < MAX_LOSS


def stop_diverged(
    model: nn.Module,
    job: Job,
    twin: VideoViT | None,
    weights: dict[str, Tensor],
    step: int,
    losses: list[float],
    dtype: torch.dtype,
) -> None:
    """Ends a run whose loss at `step` (from 1) is bad; all processes must call it at once.

    Names the clips and the first bad layer, and keeps in `run.dir/diverged`: `report.json`,
    `clips.safetensors` (the forward pass that went wrong: video [B, 3, T, H, W], label, loss) and
    `model/` (a native folder, with the weights before the step).

    Args:
        model: what trains, as the engine has it.
        twin: fp32 model to save from; None in all processes but the first.
        weights: fp32 values of what is trained.
        losses: of each forward pass of this process in the step.
        dtype: of the clips given to the model.

    Raises ValueError in a single process, SystemExit in several.
    """
    passes = gather([i for i, loss in enumerate(losses) if is_bad(loss)])
    rank = next(r for r, bad in enumerate(passes) if bad)
    epoch, start = divmod(step - 1, job.loader.steps_per_epoch)
    batches = job.loader.epoch(epoch, start_step=start)
    batch = next(islice(batches, passes[rank][0], None))
    video = batch.video.squeeze(1).to(job.device, dtype)
    logits, layers = watch(model, video)
    loss = F.cross_entropy(
        logits.float(), batch.label.to(job.device), reduction="none",
        label_smoothing=job.config.optim.label_smoothing,
    )  # fmt: skip
    of_clip = [
        {"file": job.samples[i].path, "pixels_finite": bool(v.isfinite().all()), "loss": str(x)}
        for i, v, x in zip(batch.index.tolist(), video, loss.tolist(), strict=True)
    ]
    tensors = {"video": video.float().cpu(), "label": batch.label, "loss": loss.cpu()}
    found = (of_clip, layers, tensors) if dist.get_rank() == rank else None
    of_clip, layers, tensors = gather(found)[rank]
    value = losses[passes[rank][0]] if dist.get_rank() == rank else None
    value = gather(value)[rank]

    suspects = [clip for clip in of_clip if is_bad(float(clip["loss"]))] or of_clip
    files = ", ".join(clip["file"] for clip in suspects[:8])
    files += f" and {len(suspects) - 8} more" if len(suspects) > 8 else ""
    layer = first_bad(layers, all(clip["pixels_finite"] for clip in of_clip))
    report = {
        "step": step,
        "process": rank,
        "forward_pass": passes[rank][0] + 1,
        "loss": str(value),
        "first_bad_layer": layer,
        "clips": of_clip,
        "largest_output_of_layer": {name: str(x) for name, x in layers.items()},
    }
    folder = Path(job.config.run.dir) / "diverged"

    def keep_and_tell() -> None:
        if dist.get_rank() == 0:
            with replacing(folder) as temporary:
                (temporary / "report.json").write_text(json.dumps(report, indent=1) + "\n")
                save_file(tensors, temporary / "clips.safetensors")
            twin.load_state_dict(weights, strict=False)
            save(twin, folder / "model")
        rule = "finite" if not math.isfinite(value) else f"below {MAX_LOSS:g}"
        raise ValueError(
            f"loss must be {rule}: got {value} at step {step}, from {files}; first bad layer: "
            f"{layer}; clips and weights are kept in {folder}; try a lower optim.lr or "
            "optim.clip_grad, and go on from the last state with run.resume=true"
        )

    together(keep_and_tell)


@torch.no_grad()
def watch(model: nn.Module, video: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Logits of `video [B, 3, T, H, W]`, and the largest |output| of each layer, in their order.

    Without dropout. A value that is not finite makes that of its layer inf or nan.
    """
    largest: dict[str, float] = {}

    def record(name: str):
        def hook(_module, _inputs, output: Any) -> None:
            largest[name] = output.detach().abs().max().item()

        return hook

    hooks = [m.register_forward_hook(record(name)) for name, m in model.named_modules() if name]
    model.eval()
    try:
        return model(video), largest
    finally:
        for hook in hooks:
            hook.remove()


def first_bad(layers: dict[str, float], pixels_finite: bool) -> str:
    """The first of `layers` whose output is not finite, else the one with the largest output."""
    if not pixels_finite:
        return "none, the pixels themselves are not finite"
    bad = [name for name, value in layers.items() if not math.isfinite(value)]
    if bad:
        return bad[0]
    name = max(layers, key=layers.get)
    return f"none without dropout; the largest output, {layers[name]:.3g}, is of {name}"
