"""Diagnoses a loss that is not finite or has exploded, and keeps the evidence.

The loss is checked before the optimizer's step, so the weights are still those that produced it.
The clips are made again, with the same bits, and go through the model again while it is watched.
"""

from __future__ import annotations

import json
import math
import re
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from zeroi2v.files import replacing
from zeroi2v.model.vit import VideoViT
from zeroi2v.processes import gather, together
from zeroi2v.storage.checkpoint import save
from zeroi2v.train.prepare import Job
from zeroi2v.train.state import read_tag

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
    """Ends a run whose loss at `step` (from 1) is bad. All processes must call it at once.

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
        "largest_value_of_layer": {name: str(x) for name, x in layers.items()},
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
            f"{layer}; clips and weights are kept in {folder}; "
            + remedy(value, dtype, read_tag(folder.parent / "state") is not None)
        )

    together(keep_and_tell)


def remedy(loss: float, dtype: torch.dtype, has_state: bool) -> str:
    """What to try after a bad loss, computed in `dtype`, in a run that has saved a state or not."""
    advice = "try a lower optim.lr or optim.clip_grad"
    if dtype == torch.float16 and not math.isfinite(loss):
        advice = (
            "fp16 ends at 65,504: try optim.precision=bf16, a lower optim.lr or optim.clip_grad"
        )
    return advice + (", and continue from the last state with run.resume=true" if has_state else "")


@torch.no_grad()
def watch(model: nn.Module, video: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Logits of `video [B, 3, T, H, W]`, and the largest |value| that each layer made, in order.

    Without dropout. Nothing is recorded after the first value that is not finite, which makes that
    of its layer inf or nan.
    """
    inside, names = [model], {module: name for name, module in model.named_modules()}
    hooks = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(lambda module, _: inside.append(module)))
        hooks.append(module.register_forward_hook(lambda *_: inside.pop() and None))
    model.eval()
    recorder = _Recorder(inside, names)
    try:
        with recorder:
            logits = model(video)
        return logits, recorder.largest
    finally:
        for hook in hooks:
            hook.remove()


class _Recorder(TorchDispatchMode):
    """Records the largest |value| that operators make, by the layer whose weights they read.

    Modules have no hooks: some hand their weights to a kernel instead of being called. An operator
    without weights counts as the module that is `inside[-1]` at the time.
    """

    def __init__(self, inside: list[nn.Module], names: dict[nn.Module, str]):
        super().__init__()
        self.largest: dict[str, float] = {}
        self._inside, self._names, self._done = inside, names, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        out = result[0] if isinstance(result, (tuple, list)) and result else result
        # Views and new memory hold nothing that was made here.
        is_made = not (self._done or func.is_view or "empty" in func.__name__)
        if is_made and isinstance(out, Tensor) and out.is_floating_point() and out.numel():
            value, name = out.abs().max().item(), self._layer(args)
            self.largest[name] = max(value, self.largest.pop(name, 0.0))
            if not math.isfinite(value):
                self.largest[name], self._done = value, True
        return result

    def _layer(self, args: tuple) -> str:
        module = self._inside[-1]
        prefix, read = self._names[module], [x.data_ptr() for x in _tensors(args)]
        for name, parameter in module.named_parameters():
            # By address, since views of it are read; with ZeRO many share one storage.
            begin = parameter.data_ptr()
            if any(begin <= place < begin + parameter.nbytes for place in read):
                return re.sub(r"[._](weight|bias)$", "", f"{prefix}.{name}".lstrip("."))
        return prefix or "the model"


def _tensors(args: tuple) -> list[Tensor]:
    flat = [x for arg in args for x in (arg if isinstance(arg, (tuple, list)) else [arg])]
    return [x for x in flat if isinstance(x, Tensor)]


def first_bad(layers: dict[str, float], pixels_finite: bool) -> str:
    """The first of `layers` that made a value not finite, else the one that made the largest."""
    if not pixels_finite:
        return "none, the pixels themselves are not finite"
    bad = [name for name, value in layers.items() if not math.isfinite(value)]
    if bad:
        return bad[0]
    name = max(layers, key=layers.get)
    return f"none without dropout; the largest value, {layers[name]:.3g}, is of {name}"
