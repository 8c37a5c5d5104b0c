"""Finds the file that killed a decoding process, by a crash of the decoder or by hanging."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

from zeroi2v.data.clip_worker import FrameReader


def find_fatal_files(source: FrameReader, tasks: Iterable[Any]) -> dict[str, str]:
    """Calls `source` with each task in another process, until that survives them all.

    Returns path -> reason of each file that killed it, which `source.fatal` gets as well.
    """
    fatal: dict[str, str] = {}
    spawn = multiprocessing.get_context("spawn")
    while True:
        source.fatal = source.fatal | fatal
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_make_clips, args=(list(tasks), theirs))
        with without_main_program():
            process.start()
        theirs.close()
        path = None
        try:
            ours.send(source)
            while True:
                path = ours.recv()
        except (EOFError, ConnectionError):
            process.join()
        if process.exitcode >= 0 or path is None:
            return fatal
        alarm = getattr(signal, "SIGALRM", None)  # not on Windows
        how = "hangs" if alarm is not None and process.exitcode == -alarm else "crashes"
        fatal[path] = f"{path}: {how} the decoder"


def _make_clips(tasks: list, connection: Connection) -> None:
    source = connection.recv()
    read = source.read

    def announced(sample, *args):
        connection.send(sample.path)
        return read(sample, *args)

    source.read = announced
    for task in tasks:
        try:
            source(task)
        except StopIteration:  # the epoch's end
            return


@contextmanager
def without_main_program() -> Iterator[None]:
    """A process spawned within does not import the main program, torch and all."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
