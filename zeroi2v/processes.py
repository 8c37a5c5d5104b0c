"""The processes that a launcher started: how they meet, agree, and end when one of them is lost.

Training, `evaluate` and `predict` share them. Every error is reported once, whichever processes
meet it, and no process waits for ever. Messages go over gloo, on a group of its own, from CPU to
CPU. Without a launcher there is one process, which needs no group.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm

from zeroi2v.cli import usable_cores

T = TypeVar("T")

# What the backends' messages have in common when a process they talk to is gone or stuck.
_LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out")
_POLL = 0.2
"""Seconds between two looks at how far the others are."""
_PATIENCE = 10
"""Seconds in which the others should have seen that the work has ended."""

_control: dist.ProcessGroup | None = None
_store: dist.Store | None = None


def is_launched() -> bool:
    """Whether a launcher started this process, alone or with others."""
    return "RANK" in os.environ


def rank() -> int:
    """This process among all that share the work."""
    return dist.get_rank() if _store else 0


def world_size() -> int:
    """How many processes share the work."""
    return dist.get_world_size() if _store else 1


def processes_here() -> int:
    """Processes of the run on this machine, as set by torchrun or DeepSpeed's launcher."""
    names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
    return int(next((os.environ[name] for name in names if name in os.environ), 1))


def cores_per_process() -> int:
    """CPU cores this process may use beside the others on its machine."""
    return max(1, usable_cores() // processes_here())


def limit() -> timedelta:
    """How long a process waits for the others: `DEEPSPEED_TIMEOUT` minutes, 10 unless it is set."""
    return timedelta(minutes=int(os.environ.get("DEEPSPEED_TIMEOUT", 10)))


@contextmanager
def joined() -> Iterator[torch.device | None]:
    """Within, the processes of a launcher can talk; yields the device that is this one's, if any.

    Raises as `meet` and `check_gpus`.
    """
    if not is_launched():
        yield None
        return
    store = meet()
    device = None
    if torch.cuda.is_available():
        check_gpus(store)
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", cores_per_process())))
    join(store, "gloo", limit())
    try:
        yield device
    finally:
        end_processes()


def meet() -> dist.Store:
    """What the processes find each other by; a single one needs no port for it.

    Raises OSError if the port where they meet is taken, or they don't come.
    """
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
    """Ends all processes if there is no GPU for one of them; the first one says so.

    Raises ValueError in a single process, SystemExit in several.
    """
    number, gpus = processes_here(), torch.cuda.device_count()
    own, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    lacking = int(os.environ["LOCAL_RANK"]) >= gpus
    store.set(f"gpus_{own}", f"got {number} for {gpus}" if lacking else "")
    found = [store.get(f"gpus_{other}").decode() for other in range(count)]
    reason = max(found)
    if not reason:
        return
    text = (
        f"processes of a machine (--num_gpus, --nproc_per_node) must be at most its GPUs: {reason}"
    )
    if count == 1:
        raise ValueError(text)
    if own == 0:
        print(f"error: {text}", file=sys.stderr, flush=True)
        store.set("gpus_told", "")
    with suppress(RuntimeError):  # the store goes with the first process
        store.wait(["gpus_told"])  # else the launcher kills the first before it has reported
    raise SystemExit(1)


def join(
    store: dist.Store, backend: str, timeout: timedelta, device: torch.device | None = None
) -> None:
    """Makes the default group, of `backend` on `device`, and the one that messages go over.

    Raises OSError if the others don't come.
    """
    global _control, _store
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=timeout,
            device_id=device,
        )
        _control, _store = dist.new_group(backend="gloo", timeout=limit()), store
    except dist.DistError as error:
        raise OSError(f"the processes could not meet: {str(error).splitlines()[0]}") from None


def end_processes() -> None:
    """Leaves the groups; without this some exits end in an abort."""
    global _control, _store
    _control = _store = None
    if "deepspeed" in sys.modules:
        from deepspeed import comm

        if comm.is_initialized():
            comm.destroy_process_group()  # it forgets DeepSpeed's own groups as well
    if dist.is_initialized():
        dist.destroy_process_group()


def gather(value: T) -> list[T]:
    """`value` of every process, in order of rank."""
    if _store is None:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


def add_up(numbers: list[float]) -> list[float]:
    """Each of `numbers`, summed over all processes."""
    totals = torch.tensor(numbers, dtype=torch.float64)
    if _store is not None:
        dist.all_reduce(totals, group=_control)
    return totals.tolist()


def wait_for_all() -> None:
    """Returns when every process has come here."""
    add_up([0.0])  # a barrier would also ask the GPU


def together(work: Callable[[], T]) -> T:
    """Runs `work` in every process; bad input in any of them stops all, and is reported once.

    Raises ValueError or OSError from `work` in a single process; SystemExit in several.
    """
    if world_size() == 1:
        return work()
    result, message = None, None
    try:
        result = work()
    except (ValueError, OSError) as error:
        message = str(error)
    messages = list(dict.fromkeys(m for m in gather(message) if m is not None))
    if not messages:
        return result
    if rank() == 0:
        for message in messages:
            print(f"error: {message}", file=sys.stderr, flush=True)
    wait_for_all()  # nobody leaves before it is printed: the launcher then kills the others
    raise SystemExit(1)


def first_alone(work: Callable[[], object]) -> None:
    """Runs `work` in the first process only, while the others wait; errors are as in `together`."""
    together(work if rank() == 0 else lambda: None)


@contextmanager
def shared_bar(
    total: int, title: str | None = None, hidden: bool | None = None
) -> Iterator[Callable[[int], object]]:
    """A progress bar of the `total` videos that all processes share, shown by the first.

    Yields what a process calls with the number that it has done. Is left when all are through with
    their parts, which may be hours after this one. Raises RuntimeError if none advances for as long
    as `limit`, SystemExit if another has reported an error.
    """
    hidden = True if rank() else hidden
    with tqdm(total=total, desc=title, unit="video", disable=hidden) as bar:
        if world_size() == 1:
            yield bar.update
            return

        shown = 0

        def advance(done: int) -> None:
            nonlocal shown
            before, shown = shown, _store.add("advanced", done)
            bar.update(shown - before)

        yield advance
        before, since = None, time.monotonic()
        _store.add("through", 1)
        while (through := _store.add("through", 0)) < world_size():
            if _store.add("told", 0):
                raise SystemExit(1)
            advance(0)
            if (through, shown) != before:
                before, since = (through, shown), time.monotonic()
            elif time.monotonic() - since > limit().total_seconds():
                raise dist.DistError(f"timed out after {limit()}")
            time.sleep(_POLL)
        advance(0)


@contextmanager
def told_once(advice: str) -> Iterator[None]:
    """Within, if a process ends, the others end too; one process reports the error in one line.

    If only one process met bad input (ValueError, OSError), it reports that, and the others end
    silently; if a process has died or is stuck, one of those that notice reports it, with `advice`.
    In a single process errors pass. Raises SystemExit in several.
    """
    several = world_size() > 1

    def tell(text: str) -> None:
        try:
            told = _store.add("told", 1) > 1
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
        tell(f"a process of this run has died or is stuck ({reason}); {advice}")
    except SystemExit:
        if not several:
            raise
    else:
        return
    store, count, until = _store, world_size(), time.monotonic() + _PATIENCE
    end_processes()  # cuts the others short
    with suppress(RuntimeError):  # the store has gone with the first process
        store.add("left", 1)
        while store.add("left", 0) < count and time.monotonic() < until:
            time.sleep(_POLL)  # they ask the store, which may live in this process
    raise SystemExit(1)
