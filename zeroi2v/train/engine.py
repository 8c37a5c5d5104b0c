"""The DeepSpeed engine of a run: its optimizer, its settings, the weights it trains.

What DeepSpeed gets wrong by default is set right here, with the reason beside it. It is imported
late, since its import takes seconds and bad input should be reported before.
"""

from __future__ import annotations

import math
import random
import time
import warnings
import zlib
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from zeroi2v.processes import limit
from zeroi2v.train.config import OptimConfig
from zeroi2v.train.distributed import gradient_limit

"""Of weights, clips and activations, by `optim.precision`."""


def seed_dropout(seed: int) -> None:
    """Gives each process its own random numbers; the data draw theirs from the seed and epoch."""
    number = int(np.random.SeedSequence((seed, dist.get_rank())).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def parameter_groups(model: nn.Module, optim: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters of `model` by learning rate and weight decay.

    Embeddings and LayerNorms have no weight decay; all but the head have their rate scaled.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_head = name.startswith("head.")
            decays = not any(
                part.endswith("_embedding") or part.startswith("ln_") for part in name.split(".")
            )
            groups.setdefault((is_head, decays), []).append(parameter)
    return [
        {
            "params": parameters,
            "lr": optim.peak_lr * (1.0 if is_head else optim.backbone_lr_scale),
            "weight_decay": optim.weight_decay if decays else 0.0,
        }
        for (is_head, decays), parameters in groups.items()
    ]


def schedule(step: int, steps: int, warmup: int, warmup_start: float) -> float:
    """Factor on the learning rate at `step` of `steps`: linear warm-up, then cosine to zero."""
    if step < warmup:
        return warmup_start + (1 - warmup_start) * step / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup))))


def build_engine(model: nn.Module, optim: OptimConfig, steps_per_epoch: int) -> Any:
    """The DeepSpeed engine around `model`, whose trainable parameters it will update."""
    import deepspeed

    # At stage 3 it calls what torch is about to rename, and torch warns at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # A C++ op that training does not use; building it takes minutes and a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    steps = optim.epochs * steps_per_epoch
    warmup = optim.warmup_steps(steps_per_epoch)
    # Torch's own optimizer and scheduler: DeepSpeed's need C++ and lose the groups' rates.
    optimizer = torch.optim.AdamW(parameter_groups(model, optim), betas=optim.betas)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule(step, steps, warmup, optim.warmup_start)
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    with redirect_stdout(None):  # with bf16 it prints a page about memory
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(optim, dist.get_world_size(), trainable),
        )
    # Its own groups of processes would wait half an hour for one that is stuck.
    for group, (backend, _) in distributed_c10d._world.pg_map.items():
        wait = gradient_limit() if backend == "nccl" else limit()
        distributed_c10d._set_pg_timeout(wait, group)
    return engine


def update(engine: Any) -> None:
    """The optimizer's step. The schedule advances even if fp16 skips the step.

    Raises ValueError if gradients in fp16 overflow whatever they are scaled by.
    """
    try:
        engine.step()
    except Exception as error:  # DeepSpeed's has no class of its own
        if "loss scale already at minimum" not in str(error):
            raise
        raise ValueError(
            "gradients must be finite in fp16: they overflow at the smallest loss scale; take "
            "optim.precision=bf16 or a lower optim.lr"
        ) from None
    if not engine.was_step_applied():
        engine.lr_scheduler.step()


def read_later(number: Tensor) -> Callable[[], float]:
    """Copies `number` to the CPU later; the returned function waits for it and returns it.

    On a GPU that is not to wait for what is queued after this call. Raises RuntimeError there if it
    takes longer than the processes wait for each other.
    """
    copied = number.to("cpu", non_blocking=True)
    if not number.is_cuda:
        return copied.item
    event = torch.cuda.Event()
    event.record()

    def read() -> float:
        until = time.monotonic() + limit().total_seconds()
        while not event.query():  # nothing else could end a wait for gradients that never come
            if time.monotonic() > until:
                raise RuntimeError(f"the GPU timed out: no loss in {limit()} h")
            time.sleep(1e-4)
        return copied.item()

    return read


def deepspeed_config(optim: OptimConfig, world_size: int, trainable: int) -> dict[str, Any]:
    """DeepSpeed's configuration; it ignores unknown keys silently, so tests pin each one."""
    config = {
        "train_batch_size": optim.batch_size,
        "train_micro_batch_size_per_gpu": optim.clips_at_once(world_size),
        "gradient_accumulation_steps": optim.accumulation(world_size),
        "gradient_clipping": optim.clip_grad or 0.0,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": optim.zero_stage,
            # The default takes gigabytes for a buffer that the few trained weights never fill.
            "reduce_bucket_size": trainable,
        },
    }
    if optim.precision != "fp32":
        config |= {optim.precision: {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    if optim.offload:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
        config["zero_force_ds_cpu_optimizer"] = False  # its own is C++, to be compiled
    return config


def trained_weights(engine: Any) -> dict[str, Tensor]:
    """The fp32 values of all trained parameters, on the CPU; all processes must call it at once."""
    from deepspeed.utils import safe_get_full_fp32_param

    whole = (lambda p: p) if engine.zero_optimization_stage() == 0 else safe_get_full_fp32_param
    return {
        name: whole(parameter).detach().to("cpu", torch.float32, copy=True)
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def checksum(tensors: dict[str, Tensor]) -> int:
    """CRC of names and values, in order of name."""
    crc = 0
    for name in sorted(tensors):
        values = tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8)
        crc = zlib.crc32(values.numpy(), zlib.crc32(name.encode(), crc))
    return crc
