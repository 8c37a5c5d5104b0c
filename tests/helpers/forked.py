"""Processes forked from one that has imported all: no interpreter starts, and nothing is imported.

`run` and `Popen` take our commands as `subprocess` does. `quick_workers` has the library's own
workers forked as well. What is tested of the start itself needs `subprocess`.
"""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
import warnings
from multiprocessing import context, forkserver, process, reduction, resource_tracker
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def server() -> context.ForkServerContext:
    """Forks processes from one that has imported all, which spares seconds, and has no threads."""
    _QUICK.set_forkserver_preload(["preloaded", "training"])
    path = os.environ.get("PYTHONPATH", "")
    os.environ["PYTHONPATH"] = f"{Path(__file__).parent}:{ROOT}:{path}"
    forkserver.ensure_running()
    os.environ["PYTHONPATH"] = path
    return _QUICK


class _Process(context.ForkServerProcess):
    """Its parent, by which it is ended, is the server that forked it."""

    def run(self) -> None:
        multiprocessing.parent_process()._pid = os.getppid()
        super().run()


class _Quick(context.ForkServerContext):
    Process = _Process


_QUICK = _Quick()


def quick_workers(monkeypatch) -> None:
    """From now on processes that would be spawned are forked from the server."""
    get_context = multiprocessing.get_context
    server()
    monkeypatch.setattr(
        multiprocessing,
        "get_context",
        lambda method=None: _QUICK if method == "spawn" else get_context(method),
    )


class _Descriptor:
    """A file descriptor that goes to a process with its arguments."""

    def __init__(self, number: int):
        self.number = number

    def __reduce__(self):
        return _received, (reduction.DupFd(self.number),)


def _received(duplicate) -> int:
    return duplicate.detach()


class Popen:
    """`subprocess.Popen` of `[sys.executable, …]`: a script, `-m` a module or `-c` a program.

    It reads nothing. `stdout` is a file or a `PIPE` of text, `stderr` a file or `STDOUT`.
    """

    def __init__(
        self,
        command,
        *,
        cwd=None,
        env=None,
        stdout,
        stderr,
        stdin=subprocess.DEVNULL,
        start_new_session=False,
    ):
        executable, *words = map(str, command)
        assert executable == sys.executable and stdin == subprocess.DEVNULL, command
        self.args, self.returncode, self.stdout = command, None, None
        ours, theirs = os.pipe()
        if stdout == subprocess.PIPE:
            self.stdout = os.fdopen(os.dup(ours), encoding="utf-8")
        out = theirs if stdout == subprocess.PIPE else stdout.fileno()
        err = out if stderr == subprocess.STDOUT else stderr.fileno()
        cwd, env = os.fspath(cwd or os.getcwd()), dict(os.environ if env is None else env)
        arguments = (words, cwd, env, _Descriptor(out), _Descriptor(err), start_new_session)
        self._process = server().Process(target=_command, args=arguments)
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")  # it need not import pytest's
        try:
            self._process.start()
        finally:
            sys.modules["__main__"] = main
        self.pid = self._process.pid
        os.close(ours)
        os.close(theirs)

    def poll(self) -> int | None:
        self.returncode = self._process.exitcode
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def run(command, *, cwd=None, env=None, timeout=None, check=False) -> subprocess.CompletedProcess:
    """As `subprocess.run` with `capture_output=True, text=True`; `check` tells what was said."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = Popen(command, cwd=cwd, env=env, stdout=out, stderr=err)
        try:
            process.wait(timeout)
        finally:
            process.send_signal(signal.SIGKILL)
        said = []
        for file in (out, err):
            file.seek(0)
            said.append(file.read().decode())
    done = subprocess.CompletedProcess(command, process.returncode, *said)
    assert not (check and done.returncode), f"ended with {done.returncode}\n{''.join(said)}"
    return done


def _command(words, cwd, env, out, err, own_session) -> None:
    """Body of a process of `Popen`; what it starts of this Python is forked from it."""
    asyncio.create_subprocess_exec = _fork
    forkserver._forkserver.ensure_running = resource_tracker.ensure_running  # it is, elsewhere
    process._parent_process = None
    multiprocessing.current_process().name = "MainProcess"
    _become(words, cwd, env, out, err, own_session)


def _become(words, cwd, env, out, err, own_session) -> None:
    """What the interpreter does with its arguments, in a process that has been one before."""
    if own_session:
        os.setsid()
    os.dup2(out, 1)
    os.dup2(err, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [p for p in env.get("PYTHONPATH", "").split(os.pathsep) if p]
    warnings.filterwarnings("ignore", ".* found in sys.modules after import", RuntimeWarning)
    kind, *rest = [word for word in words if word != "-u"]
    try:
        if kind == "-m":
            sys.path.insert(0, cwd)
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.path.insert(0, "")
            sys.argv = ["-c", *rest[1:]]
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        else:
            sys.path.insert(0, os.path.dirname(os.path.abspath(kind)))
            sys.argv = [kind, *rest]
            runpy.run_path(kind, run_name="__main__")
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()


class _Child:
    """An `asyncio.subprocess.Process`."""

    returncode = None

    def __init__(self, pid: int):
        self.pid = pid

    async def wait(self) -> int:
        while self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
            else:
                await asyncio.sleep(0.01)
        return self.returncode


async def _fork(executable, *words, stdin, stdout, stderr, pass_fds, env, start_new_session):
    """In place of `asyncio.create_subprocess_exec`: all files stay open, `pass_fds` among them."""
    assert executable == sys.executable and stdin == subprocess.DEVNULL
    sys.stdout.flush()
    if pid := os.fork():
        return _Child(pid)
    status = 1
    try:
        asyncio.events._set_running_loop(None)
        _become(words, os.getcwd(), env, stdout.fileno(), stderr.fileno(), start_new_session)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
