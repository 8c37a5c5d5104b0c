"""The processes of a training run: how they start and stop.

The default group carries gradients, on GPUs over NCCL. NCCL's watchdog kills a process before it
can report anything, so the default group waits longer than the one of `zeroi2v.processes`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import active_children, resource_tracker

import torch

from zeroi2v.data.pipeline import await_observers, dali_observers
from zeroi2v.processes import check_gpus, cores_per_process, is_launched, join, limit, meet, rank
from zeroi2v.train.log import show


def start_processes() -> torch.device:
    """Joins the other processes of the launcher, or becomes the only one; returns the device.

    A process waits for the others `DEEPSPEED_TIMEOUT` minutes at most, 10 unless it is set. Raises
    OSError if the port where they meet is taken, or they don't come; ValueError, or SystemExit in
    several processes, if a machine has more of them than GPUs.
    """
    if not is_launched():
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
    backend = "nccl" if has_gpu else "gloo"
    join(store, backend, gradient_limit(), device if has_gpu else None)
    return device


def gradient_limit() -> timedelta:
    """The same for gradients: on GPUs longer, so that the control group reports first."""
    return limit() + timedelta(minutes=2 if torch.cuda.is_available() else 0)


def end_children() -> None:
    """Ends the processes that decode, for which Python and DALI might wait for ever at the exit."""
    for child in active_children():
        child.kill()
    await_observers(dali_observers())


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if rank() == 0:
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
