"""The processes of a run: how they start, agree, stop, and end when one of them is lost.

Every error is reported once, whichever processes meet it, and no process waits for ever.
Messages go over gloo, on a group of its own, from CPU to CPU; the default group carries gradients,
on GPUs over NCCL. NCCL's watchdog kills a process before it can report anything, so the default
group waits longer.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from multiprocessing import active_children, resource_tracker
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from zeroi2v.data.pipeline import await_observers, dali_observers, processes_here
from zeroi2v.train.log import show

T = TypeVar("T")

# What the backends' messages have in common when a process they talk to is gone or stuck.
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out")


_control: dist.ProcessGroup | None = None


def start_processes() -> torch.device:
    """Joins the other processes of the launcher, or becomes the only one; returns the device.

    A process waits for the others `DEEPSPEED_TIMEOUT` minutes at most, 10 unless it is set. Raises
    OSError if the port where they meet is taken, or they don't come; ValueError, or SystemExit in
    several processes, if a machine has more of them than GPUs.
    """
    global _control
    if "RANK" not in os.environ:
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
        os.environ |= {k: str(v) for k, v in alone.items()}
    has_gpu = torch.cuda.is_available()
    # Before DeepSpeed is imported, which else guesses, and warns.
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if has_gpu else "cpu")
    os.environ.setdefault("DEEPSPEED_TIMEOUT", "10")
    store = meet()
    if has_gpu:
        check_gpus(store)
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        # A resumed run must repeat the same sums in the same order.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    else:
        device = torch.device("cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", cores_per_process())))
    try:
        dist.init_process_group(
            "nccl" if has_gpu else "gloo",
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=gradient_limit(),
            device_id=device if has_gpu else None,
        )
        _control = dist.new_group(backend="gloo", timeout=limit())
    except dist.DistError as error:
        raise OSError(f"the processes could not meet: {str(error).splitlines()[0]}") from None
    return device


def meet() -> dist.Store:
    """What the processes find each other by; a single one needs no port for it."""
    if os.environ["WORLD_SIZE"] == "1":
        return dist.HashStore()
    try:
        return next(dist.rendezvous("env://", timeout=limit()))[0]
    except dist.DistError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        if "EADDRINUSE" in str(error):
            raise OSError(
                f"MASTER_PORT must be free: {place} is taken; choose another by the "
                "launcher's --master_port"
            ) from None
        reason = str(error).splitlines()[0]
        raise OSError(f"the processes could not meet at {place}: {reason}") from None


def check_gpus(store: dist.Store) -> None:
    """Ends all processes if there is no GPU for one of them; the first one says so."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    number, gpus = processes_here(), torch.cuda.device_count()
    lacking = int(os.environ["LOCAL_RANK"]) >= gpus
    store.set(f"gpus_{rank}", f"got {number} for {gpus}" if lacking else "")
    found = [store.get(f"gpus_{other}").decode() for other in range(world_size)]
    reason = max(found)
    if not reason:
        return
    text = (
        f"processes of a machine (--num_gpus, --nproc_per_node) must be at most its GPUs: {reason}"
    )
    if world_size == 1:
        raise ValueError(text)
    if rank == 0:
        print(f"error: {text}", file=sys.stderr, flush=True)
        store.set("gpus_told", "")
    with suppress(RuntimeError):  # the store goes with the first process
        store.wait(["gpus_told"])  # else the launcher kills the first before it has reported
    raise SystemExit(1)


def limit() -> timedelta:
    """How long a process waits for the others."""
    return timedelta(minutes=int(os.environ["DEEPSPEED_TIMEOUT"]))


def gradient_limit() -> timedelta:
    """The same for gradients: on GPUs longer, so that the control group reports first."""
    return limit() + timedelta(minutes=2 if torch.cuda.is_available() else 0)


def end_processes() -> None:
    """Leaves the group; without this some exits end in an abort."""
    global _control
    _control = None
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
    await_observers(dali_observers())


def cores_per_process() -> int:
    """CPU cores this process may use beside the others on its machine."""
    return max(1, len(os.sched_getaffinity(0)) // processes_here())


def gather(value: T) -> list[T]:
    """`value` of every process, in order of rank."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


def add_up(numbers: list[float]) -> list[float]:
    """Each of `numbers`, summed over all processes."""
    totals = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(totals, group=_control)
    return totals.tolist()


def wait_for_all() -> None:
    """Returns when every process has come here."""
    add_up([0.0])  # a barrier would also ask the GPU


def together(work: Callable[[], T]) -> T:
    """Runs `work` in every process; bad input in any of them stops all, and is reported once.

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
    wait_for_all()  # nobody leaves before it is printed: the launcher then kills the others
    raise SystemExit(1)


def first_alone(work: Callable[[], object]) -> None:
    """Runs `work` in the first process only, while the others wait; errors are as in `together`."""
    together(work if dist.get_rank() == 0 else lambda: None)


@contextmanager
def told_once() -> Iterator[None]:
    """Within, if a process ends, the others end too; one process reports the error in one line.

    If only one process met bad input (ValueError, OSError), it reports that, and the others end
    silently; if a process has died or is stuck, one of those that notice reports it. In a single
    process errors pass. Raises SystemExit in several.
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
    else:
        return
    end_processes()  # cuts the others short
    time.sleep(3)  # while they ask the store, which may live in this process
    raise SystemExit(1)


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if dist.get_rank() == 0:
        show(text)


class StopSignals:
    """While entered, Ctrl-C and SIGTERM only set `received`, so that the run can stop in order.

    The launcher may pass a signal on more than once; the one of number `patience` ends the process
    the hard way. With a patience of 1 that is the first, for work that leaves nothing to save.
    """

    def __init__(self, patience: int = 5):
        self._patience = patience

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
        if self._count >= self._patience:
            raise KeyboardInterrupt
