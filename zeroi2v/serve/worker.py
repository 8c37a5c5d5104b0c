"""A process of its own that computes, so that no video can end the server.

A decoder may crash, hang or take all memory. Then this process is ended, the request is answered
in one line, and another process takes its place.
"""

from __future__ import annotations

import multiprocessing
import signal
import threading
import traceback
from typing import Any

from zeroi2v.serve.limits import Limits, Refused

START_SECONDS = 300
"""For models to load, which may come from a slow disk."""
MAX_REQUESTS = 2000
"""After so many requests the process is replaced, whatever its libraries have kept."""


class Busy(Exception):
    """Too many requests wait already."""


class TooSlow(Exception):
    """A request took longer than its time."""


class Worker:
    """Asks `Jobs` in another process, one request at a time. Threads may ask at once."""

    def __init__(self, models: list[str], device: str | None, limits: Limits):
        self._arguments, self._limits = (models, device, limits), limits
        self._turn, self._count = threading.Lock(), threading.Lock()
        self._waiting = self._answered = 0
        self._process: multiprocessing.Process | None = None
        self._start()

    def wait(self) -> None:
        """Comes back when the models are loaded. Raises ValueError if they can't be."""
        self.about = self._ready()
        """`Jobs.about` of the models."""

    def ask(self, kind: str, *arguments: Any) -> Any:
        """The result of `Jobs.<kind>(*arguments)`.

        Raises:
            Refused: the request can't be answered, for what its video is.
            Busy: `limits.queue` requests wait already.
            TooSlow: it took longer than `limits.seconds`.
        """
        with self._count:
            if self._waiting > self._limits.queue:
                raise Busy(f"the server is busy: {self._limits.queue} requests wait already")
            self._waiting += 1
        try:
            with self._turn:
                return self._ask(kind, arguments)
        finally:
            with self._count:
                self._waiting -= 1

    def _ask(self, kind: str, arguments: tuple) -> Any:
        if self._process is None or not self._process.is_alive():
            self._start()
            self._ready()
        try:
            self._pipe.send((kind, arguments))
            if not self._pipe.poll(self._limits.seconds):
                self.close()
                raise TooSlow(f"takes longer than the time limit of {self._limits.seconds:g} s")
            how, what = self._pipe.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            self.close()
            raise Refused("video crashes the decoder") from None
        self._answered += 1
        if self._answered % MAX_REQUESTS == 0:
            self.close()
        if how == "refused":
            raise Refused(what)
        if how == "bug":
            raise RuntimeError(what)
        return what

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, *self._arguments), daemon=True)
        self._process.start()
        theirs.close()

    def _ready(self) -> list[dict[str, Any]]:
        try:
            if not self._pipe.poll(START_SECONDS):
                raise ValueError(f"models must load within {START_SECONDS} s")
            how, what = self._pipe.recv()
        except EOFError:
            raise ValueError("models can't be loaded: the process that loads them died") from None
        if how != "ready":
            raise ValueError(what)
        return what

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._pipe.close()
            self._process = None


def _work(pipe: Any, models: list[str], device: str | None, limits: Limits) -> None:
    """What the process does until it is ended, or the server is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from zeroi2v.serve.jobs import Jobs  # and with it torch, which the server itself does without

    try:
        jobs = Jobs(models, device, limits)
    except (ValueError, OSError) as error:
        pipe.send(("failed", str(error)))
        return
    pipe.send(("ready", jobs.about()))
    while True:
        try:
            kind, arguments = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("answer", getattr(jobs, kind)(*arguments))
        except (ValueError, OSError, MemoryError) as error:
            answer = ("refused", str(error) or "video needs more memory than there is")
        except Exception as error:
            traceback.print_exc()
            answer = ("bug", f"{type(error).__name__}: {error}")
        pipe.send(answer)
