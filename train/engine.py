"""The machinery under a run: processes, the DeepSpeed engine, its state on disk, stop signals.

What DeepSpeed gets wrong by default is set right here, with the reason beside it. It is imported
late, since its import takes seconds and bad input should be told before.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import signal
import socket
import sys
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children, resource_tracker
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.config import OptimConfig
from zeroi2v.checkpoint import write_whole

T = TypeVar("T")


def start_processes() -> torch.device:
    """Joins the other processes of the launcher, or becomes the only one; returns the device."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
        os.environ |= {k: str(v) for k, v in alone.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        # A resumed run must repeat the same sums in the same order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    else:
        device = torch.device("cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", cores_per_process())))
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else DeepSpeed guesses, and warns
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def end_processes() -> None:
    """Leaves the group; without this some exits end in an abort."""
    if "deepspeed" in sys.modules:
        from deepspeed import comm

        if comm.is_initialized():
            comm.destroy_process_group()  # it forgets DeepSpeed's own groups as well
    if dist.is_initialized():
        dist.destroy_process_group()


def cores_per_process() -> int:
    """CPU cores this process may use beside the others on its machine."""
    cores = len(os.sched_getaffinity(0))
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", 1)))
    return max(1, cores // local)


def gather(value: T) -> list[T]:
    """`value` of every process, in order of rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(work: Callable[[], T]) -> T:
    """Runs `work` in every process; bad input in any of them stops all, and is told once.

    Raises ValueError or OSError from `work` in a single process; SystemExit in several.
    """
    if dist.get_world_size() == 1:
        return work()
    result, message = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        message = str(error)
    messages = list(dict.fromkeys(m for m in gather(message) if m is not None))
    if not messages:
        return result
    if dist.get_rank() == 0:
        for message in messages:
            print(f"error: {message}", file=sys.stderr, flush=True)
    dist.barrier()  # nobody leaves before it is printed: the launcher then kills the others
    raise SystemExit(1)


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if dist.get_rank() == 0:
        print(text, flush=True)


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
            "lr": optim.lr * (1.0 if is_head else optim.backbone_lr_scale),
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

    # At stage 3 it calls what torch is about to rename, and torch tells at every step.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # A C++ op that training does not use; building it takes minutes and a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    steps = optim.epochs * steps_per_epoch
    warmup = round(optim.warmup_epochs * steps_per_epoch)
    # Torch's own optimizer and scheduler: DeepSpeed's need C++ and lose the groups' rates.
    optimizer = torch.optim.AdamW(parameter_groups(model, optim), lr=optim.lr, betas=optim.betas)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule(step, steps, warmup, optim.warmup_start)
    )
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        config=deepspeed_config(optim, dist.get_world_size(), trainable),
    )
    return engine


def deepspeed_config(optim: OptimConfig, world_size: int, trainable: int) -> dict[str, Any]:
    """DeepSpeed's configuration; it ignores unknown keys silently, so tests pin each one."""
    config = {
        "train_batch_size": optim.batch_size,
        "train_micro_batch_size_per_gpu": optim.micro_batch,
        "gradient_accumulation_steps": optim.accumulation(world_size),
        "gradient_clipping": optim.clip_grad or 0.0,
        "steps_per_print": 2**31,
        "zero_optimization": {
            "stage": optim.zero_stage,
            # The default takes gigabytes for a buffer that the few trained weights never fill.
            "reduce_bucket_size": trainable,
        },
    }
    if optim.precision == "bf16":
        config |= {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
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


def save_state(engine: Any, folder: Path, record: dict[str, Any]) -> None:
    """Saves all that the run needs to go on, then removes the state before it.

    DeepSpeed's part goes to `folder/TAG` and `record`, which must hold `step` and `validated`,
    beside it; only then does `folder/latest` name TAG, so a kill at any time leaves a whole state.
    """
    tag = f"step_{record['step']:08d}_validated_{record['validated']:08d}"
    random_states = gather(_random_state())
    if dist.get_rank() == 0:
        shutil.rmtree(folder / tag, ignore_errors=True)  # what a killed run left
    dist.barrier()
    engine.save_checkpoint(
        str(folder),
        tag=tag,
        client_state={"random": random_states},
        save_latest=False,  # it would be written before the other processes are done
        exclude_frozen_parameters=True,
    )
    dist.barrier()
    if dist.get_rank() == 0:
        write_whole(folder / tag / "record.json", json.dumps(record, indent=1) + "\n")
        for file in (folder / tag).iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        write_whole(folder / "latest", tag + "\n")
        for old in folder.glob("step_*"):
            if old.name != tag:
                shutil.rmtree(old)
    dist.barrier()


def read_record(folder: Path) -> dict[str, Any]:
    """The `record` of the newest state in `folder`. Raises ValueError if there is none."""
    try:
        tag = (folder / "latest").read_text(encoding="utf-8").strip()
        return json.loads((folder / tag / "record.json").read_text(encoding="utf-8")) | {"tag": tag}
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ValueError(
            f"run.resume needs a saved state: no {error.filename}; remove the folder to start again"
        ) from None


def load_state(engine: Any, folder: Path, record: dict[str, Any]) -> None:
    """Puts the engine and this process's random numbers where `save_state` left them.

    Raises ValueError if the weights are not the saved ones.
    """
    path, client = engine.load_checkpoint(
        str(folder),
        tag=record["tag"],
        load_module_strict=False,  # frozen weights are not in it
    )
    if path is None or checksum(trained_weights(engine)) != record["trained"]:
        raise ValueError(f"state must hold the weights it was saved with: got {folder}")
    state = client["random"][dist.get_rank()]
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])


def _random_state() -> dict[str, Any]:
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


class StopSignals:
    """While entered, Ctrl-C and SIGTERM only set `received`, so that the run can stop in order.

    The launcher may pass a signal on more than once; the fifth ends the process the hard way.
    """

    def __enter__(self) -> StopSignals:
        self.received = 0
        self._count = 0
        self._old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @contextmanager
    def not_for_children(self) -> Iterator[None]:
        """Decoding processes started within never see a stop signal, whoever sends it to them.

        They end when this process is done with them. If one died before, DALI would wait for ever.
        """
        resource_tracker.ensure_running()  # its start would lift the block
        signal.pthread_sigmask(signal.SIG_BLOCK, self._old)
        try:
            yield
        except RuntimeError:  # of DALI's, whose clean-up waits for SIGTERM to be obeyed
            for child in active_children():
                child.kill()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, self._old)

    def _handle(self, number: int, _: object) -> None:
        self.received = self.received or number
        self._count += 1
        if self._count >= 5:
            raise KeyboardInterrupt
