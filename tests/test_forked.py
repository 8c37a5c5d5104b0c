"""A process that is forked from a prepared one does what a started interpreter does."""

import subprocess
import sys

import forked
import pytest

PROGRAMS = {
    "arguments and the environment": ["-c", "import os, sys; print(sys.argv, os.environ)", "a b"],
    "where it runs": ["-c", "import os, sys; print(os.getcwd(), repr(sys.stdin.read()))"],
    "a message": ["-c", "import sys; print('said'); sys.exit('an error')"],
    "a status": ["-c", "raise SystemExit(3)"],
    "an exception": ["-c", "1 / 0"],
    "a signal": ["-c", "import os; os.kill(os.getpid(), 9)"],
    "the main process": [
        "-c",
        "import atexit, multiprocessing as m; atexit.register(print, 'the end')\n"
        "print(m.parent_process(), m.current_process().name, __name__)",
    ],
    "a module": ["-m", "json.tool", "--help"],
    "a script": ["a.py", "b"],
    "no such script": ["none.py"],
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_it_ends_and_says_the_same(what, tmp_path):
    (tmp_path / "a.py").write_text("import sys, b; print(sys.argv, __name__, b)")
    (tmp_path / "b.py").write_text("")
    command, env = [sys.executable, *PROGRAMS[what]], {"LC_ALL": "C.UTF-8", "A": "1"}
    started = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    done = forked.run(command, cwd=tmp_path, env=env)
    assert done.stdout == started.stdout
    if what != "no such script":  # of which the interpreter tells, with status 2
        assert done.returncode == started.returncode
        assert done.stderr.splitlines()[-1:] == started.stderr.splitlines()[-1:]
    else:
        assert done.returncode and "none.py" in done.stderr


def test_what_it_says_is_read_as_it_goes_and_a_signal_ends_it():
    program = "import time; print('begun', flush=True); time.sleep(99)"
    command = [sys.executable, "-c", program]
    process = forked.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline() == "begun\n" and process.poll() is None
    process.send_signal(15)
    assert process.wait(20) == -15 and process.stdout.read() == ""
    with pytest.raises(AssertionError, match="ended with 3\nsaid"):
        forked.run([sys.executable, "-c", "print('said'); raise SystemExit(3)"], check=True)
    with pytest.raises(subprocess.TimeoutExpired):
        forked.run(command, timeout=0.1)
