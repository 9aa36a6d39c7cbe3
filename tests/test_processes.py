"""A program forked from a zygote is one that an interpreter has just started."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.processes import ROOT, ForkedPython

SELF = """
import atexit, json, os, signal, sys, threading, warnings
atexit.register(print, "the end")
threading.Timer(0.1, print, ["a thread that is joined"]).start()
warnings.warn("of no interest")
print(json.dumps({
    "argv": sys.argv, "first of path": sys.path[0], "name": __name__, "folder": os.getcwd(),
    "globals": sorted(set(globals()) - {"__annotations__", "__cached__", "__file__"}
                      - {"__package__"}),
    "main": sys.modules["__main__"].__dict__ is globals(), "warnings": sys.warnoptions,
    "parent": os.getppid(), "leads a session": os.getsid(0) == os.getpid(),
    "environment": dict(os.environ), "files": sorted(os.listdir("/proc/self/fd")),
    "interrupt": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "terminate": signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "input": sys.stdin.read(),
    "hash": hash("one"),  # Of the program's own environment, though it is read at the start.
}))
"""
KINDS = pytest.mark.parametrize("popen", [subprocess.Popen, ForkedPython])


def run(
    popen: "type[subprocess.Popen[Any]]", *arguments: str, given: str = "", **options: Any
) -> tuple[int, str, str]:
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-W", "ignore", *arguments]
    options = {"cwd": ROOT, "env": os.environ | {"OMP_NUM_THREADS": "1"}} | options
    process = popen(command, **pipes, text=True, **options)
    output, errors = process.communicate(given)
    return process.returncode, output, errors


def both(*arguments: str, **options: Any) -> tuple[int, str, str]:
    """What a program did, which was the same in an interpreter and in a fork."""
    expected = run(subprocess.Popen, *arguments, **options)
    assert run(ForkedPython, *arguments, **options) == expected
    return expected


@pytest.mark.parametrize("new_session", [False, True])
def test_a_program_sees_what_it_would_see_in_an_interpreter(
    new_session: bool, tmp_path: Path
) -> None:
    environment = os.environ | {"PYTHONHASHSEED": "5", "NEW": "é"}
    options = {"cwd": tmp_path, "env": environment, "start_new_session": new_session}
    status, output, errors = both("-c", SELF, "one", "-m", "two", given="said", **options)
    assert (status, errors) == (0, "")
    first, *last = output.splitlines()
    assert last == ["a thread that is joined", "the end"]
    seen = json.loads(first)
    assert (seen["parent"], seen["argv"], seen["input"]) == (
        os.getpid(),
        ["-c", "one", "-m", "two"],
        "said",
    )


def test_a_module_is_run_as_by_an_interpreter(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(SELF + "print(__file__, __spec__.name)\n")
    status, output, _ = both(
        "-m", "program", "one", cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": "5"}
    )
    assert status == 0
    assert json.loads(output.splitlines()[0])["argv"] == [str(tmp_path / "program.py"), "one"]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("import sys; sys.exit(7)", 7),
        ("raise SystemExit('a last word')", 1),
        ("import os; os._exit(3)", 3),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL),
        ("import os; os.kill(os.getpid(), 15)", -signal.SIGTERM),
        ("import os; os.abort()", -signal.SIGABRT),
    ],
)
def test_exit_statuses_are_those_of_an_interpreter(program: str, expected: int) -> None:
    assert both("-c", program)[0] == expected


@KINDS
def test_an_error_ends_in_its_traceback(popen: "type[subprocess.Popen[Any]]") -> None:
    status, output, errors = run(popen, "-c", "def f():\n    1 / 0\nf()")
    assert (status, output) == (1, "")
    end = 'File "<string>", line 3, in <module>\n  File "<string>", line 2, in f\nZeroDivisionError'
    assert end in errors


@KINDS
def test_signals_and_timeouts_reach_a_program(popen: "type[subprocess.Popen[Any]]") -> None:
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-c",
        "import time; print(1, flush=True); time.sleep(99)",
    ]
    process = popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"1\n"
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() == -signal.SIGINT
    process.stdout.close()


def test_programs_do_not_draw_the_same() -> None:
    program = "import random, numpy; print(random.random(), numpy.random.default_rng().random())"
    one, other = (run(ForkedPython, "-c", program)[1].split() for _ in range(2))
    assert not {*one} & {*other}


def test_an_orphan_of_a_program_is_not_adopted() -> None:
    """Only a program itself becomes a child of the tests' process, which reaps nothing else."""
    program = """
import os, time
between = os.fork()
if between:
    os.waitpid(between, 0)
elif os.fork():
    os._exit(0)
else:
    time.sleep(0.1)
    print(os.getppid(), flush=True)
    os._exit(0)
"""
    status, output, _ = run(ForkedPython, "-c", program)
    assert status == 0
    assert output != f"{os.getpid()}\n"


def test_what_a_fork_cannot_take_is_refused() -> None:
    with pytest.raises(AssertionError, match="takes none of"):
        ForkedPython([sys.executable, "-c", ""], preexec_fn=print)
