"""Which file killed a decoding process: a crash of the decoder, or one that never comes back."""

from __future__ import annotations

import multiprocessing
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from types import ModuleType, SimpleNamespace

from zeroi2v.data.source import ClipSource


def find_fatal_files(source: ClipSource, micro_batches: range) -> dict[str, str]:
    """Makes the clips of `source` again, in a process of their own, until it survives them all.

    Returns path -> reason of each file at which it died; they are left out once they are known.
    """
    fatal: dict[str, str] = {}
    spawn = multiprocessing.get_context("spawn")
    while True:
        source.plan = replace(source.plan, fatal=source.plan.fatal | fatal)
        ours, theirs = spawn.Pipe()
        process = spawn.Process(target=_make_clips, args=(micro_batches, theirs))
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
        how = "hangs" if process.exitcode == -signal.SIGALRM else "crashes"
        fatal[path] = f"{path}: {how} the decoder"


def _make_clips(micro_batches: range, connection: Connection) -> None:
    source = connection.recv()
    read = source.read

    def announced(sample, key):
        connection.send(sample.path)
        return read(sample, key)

    source.read = announced
    for micro_batch in micro_batches:
        for row in range(source.plan.batch_size):
            try:
                source(SimpleNamespace(epoch_idx=0, iteration=micro_batch, idx_in_batch=row))
            except StopIteration:
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
