"""What the host does in a pass on a GPU, without a GPU: `python -m bench.host`.

Triton's driver is a stand-in that launches nothing, and PyTorch's operators compute on the CPU,
on a model so small that they take no time. What is left is Python and the launching by Triton and
PyTorch, about as on a GPU. The results mean nothing.

Reads names of `runs()` from its input, a line each, and answers `done` when it has run one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from zeroi2v_kernels import (
    activation,
    adapter_linear_triton,
    choice,
    device,
    norm,
    stdha_launch,
)

from bench.baselines.image_models import pooled, transformers_clip
from bench.bench_training_block import step
from bench.cases import adapted_model
from zeroi2v import VideoViT, merge
from zeroi2v.config import ModelConfig

TRANSFORMERS, MERGED, WATCHED = "transformers CLIP", "merged", "merged, all through operators"
NAIVE, SAVE = "naive", "save"
PASSES = 5
"""Of a run."""
CONFIG = ModelConfig.from_dict(
    dict(image_size=32, patch_size=16, width=64, depth=12, num_heads=1, num_frames=2,
         num_classes=8, head_offsets=[1])
)  # fmt: skip


class Driver:
    """A GPU of Hopper's kind on which kernels do nothing."""

    def __init__(self) -> None:
        self.launches = 0
        self.utils = self

    def launcher_cls(self, source, metadata) -> Callable[..., None]:
        def launch(*_) -> None:
            self.launches += 1

        return launch

    def load_binary(self, *_) -> tuple[int, ...]:
        return 1, 1, 32, 0, 1024  # module, function, registers, spills, threads at most

    def get_device_properties(self, _) -> dict[str, int]:
        return dict(max_shared_mem=227 * 1024)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def runs() -> dict[str, Callable[[], Tensor]]:
    """Passes of each, on a CPU that poses as a GPU from now on."""
    for module in (norm, activation, stdha_launch, adapter_linear_triton):
        module.INTERPRET = True  # else they refuse tensors of a CPU
    choice.uses_kernels = choice.patches_by_product = lambda x: True
    choice.choose_backend = lambda x: "triton"
    choice.trains_by_block = lambda *_: True
    adapted = adapted_model(CONFIG, "cpu")
    merged = merge(adapted).bfloat16().eval()
    trained = adapted.bfloat16().freeze().train()
    theirs = transformers_clip(merged)
    video = torch.randn(1, 3, CONFIG.num_frames, 32, 32).bfloat16()
    frames = video.transpose(1, 2).flatten(0, 1).contiguous()
    is_watched = device._is_watched

    def watched() -> Tensor:
        device._is_watched = lambda x: True
        try:
            return merged(video)
        finally:
            device._is_watched = is_watched

    return {
        TRANSFORMERS: lambda: pooled(theirs(frames)),
        MERGED: lambda: merged(video),
        WATCHED: watched,
        **{block: training_step(trained, block, video) for block in (NAIVE, SAVE)},
    }


def training_step(model: VideoViT, block: str, video: Tensor) -> Callable[[], list[Tensor]]:
    """Forward and backward, with a contestant of `bench_training_block`."""

    @torch.enable_grad()
    def run() -> list[Tensor]:
        return step(model, block, video)

    return run


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    gpu = Driver()
    driver.set_active(gpu)
    found = runs()
    for run in found.values():
        run()
    kernels = gpu.launches
    found[MERGED]()
    print("launches", gpu.launches - kernels, flush=True)
    for line in sys.stdin:
        for _ in range(PASSES):
            found[line.strip()]()
        print("done", flush=True)


if __name__ == "__main__":
    main()
