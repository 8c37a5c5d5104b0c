"""The processes of a run: how they start, agree, stop, and end when one of them is lost.

Every error is told once, whichever processes meet it, and none of them waits for ever for another.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import active_children, resource_tracker
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from train.log import show

T = TypeVar("T")

# What the backends' messages have in common when a process they talk to is gone or stuck.
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out")


def start_processes() -> torch.device:
    """Joins the other processes of the launcher, or becomes the only one; returns the device.

    A process waits for the others `DEEPSPEED_TIMEOUT` minutes at most, 10 unless it is set. Raises
    OSError if the port where they meet is taken, or they don't come.
    """
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
        # A resumed run must repeat the same sums in the same order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    else:
        device = torch.device("cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", cores_per_process())))
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else DeepSpeed guesses, and warns
    if not dist.is_initialized():
        minutes = int(os.environ.setdefault("DEEPSPEED_TIMEOUT", "10"))
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
        except dist.DistError as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            if "EADDRINUSE" in str(error):
                raise OSError(
                    f"MASTER_PORT must be free: {place} is taken; choose another by the "
                    "launcher's --master_port"
                ) from None
            reason = str(error).splitlines()[0]
            raise OSError(f"the processes could not meet at {place}: {reason}") from None
    return device


def end_processes() -> None:
    """Leaves the group; without this some exits end in an abort."""
    if "deepspeed" in sys.modules:
        from deepspeed import comm

        if comm.is_initialized():
            comm.destroy_process_group()  # it forgets DeepSpeed's own groups as well
    if dist.is_initialized():
        dist.destroy_process_group()


def end_children() -> None:
    """Ends the processes that decode, for which Python and DALI might wait for ever at the exit."""
    for child in active_children():
        child.kill()
    for thread in threading.enumerate():
        if thread.name.endswith("(_observer_thread)"):
            thread.join(10)  # DALI's: it has to see that they are gone before it is told to end


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


def first_alone(work: Callable[[], object]) -> None:
    """Runs `work` in the first process only, while the others wait; errors are as in `together`."""
    together(work if dist.get_rank() == 0 else lambda: None)


@contextmanager
def told_once() -> Iterator[None]:
    """Within, the end of a process ends the others, each error in one line from one process.

    Where one process alone has met bad input (ValueError, OSError), it tells, and the others leave
    without a word; where a process has died or is stuck, one of those that notice tells. In a
    single process errors pass. Raises SystemExit in several.
    """
    store, several = _get_default_store(), dist.get_world_size() > 1

    def tell(text: str) -> None:
        try:
            told = store.add("told", 1) > 1
        except RuntimeError:  # the store has gone with the first process
            told = False
        if not told:
            print(f"error: {text}", file=sys.stderr, flush=True)

    try:
        yield
    except (ValueError, OSError) as error:
        if not several:
            raise
        tell(str(error))
        end_processes()  # cuts the others short
        time.sleep(3)  # while they ask the store, which may live in this process
        raise SystemExit(1) from None
    except RuntimeError as error:
        text = str(error)
        lost = isinstance(error, dist.DistError) or any(word in text.lower() for word in _LOST)
        if not (several and lost):
            raise
        reason = text.splitlines()[0].partition(". This is typically")[0]
        reason = re.sub(r"^\[[^\]]*\] ", "", reason)  # gloo's file and line
        tell(
            f"a process of this run has died or is stuck ({reason}); start it again with "
            "run.resume=auto"
        )
        raise SystemExit(1) from None


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if dist.get_rank() == 0:
        show(text)


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
