"""Start Python programs without importing torch anew: they are forked from a process that has.

Importing torch, torchrec and this package takes 5 to 7 s of CPU, and the suite starts some 150
programs that do. A zygote (``zygote.py``) imports them once; each program is a fork of it that
behaves as an interpreter just started: argv, environment, folder, pipes, session, exit status.
What a library reads from the environment while it is loaded cannot change later, so each set of
these variables, and of interpreter options, has a zygote of its own.

Where the start itself or the memory is what a test measures, it starts an interpreter
(``new_interpreter`` in ``worlds.py``).
"""

import atexit
import ctypes
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, ClassVar

ROOT = Path(__file__).parents[1]
# Variables that the interpreter or a library reads while it is loaded.
READ_WHILE_LOADED = (
    "PYTHON", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "LD_", "MALLOC_", "TORCH", "PYTORCH_",
    "AOT_INDUCTOR_", "ATEN_", "FBGEMM_", "ASAN_", "UBSAN_", "KVSHARE_",
)  # fmt: skip
PR_SET_CHILD_SUBREAPER = 36


class Zygote:
    """A process of ours with everything imported, and the socket to it."""

    def __init__(self, options: tuple[str, ...], environment: Mapping[str, str]) -> None:
        self._tests, its_own = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = f"from tests.zygote import main; main({its_own.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, *options, "-c", program],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[its_own.fileno()],
        )
        its_own.close()
        atexit.register(self.end)

    def fork(self, start: Mapping[str, Any], files: Sequence[int]) -> int:
        """Fork a program whose parent is this process; return its id."""
        # Only while a child is handed over: other orphans stay those of the system.
        _adopt_orphans(True)
        try:
            socket.send_fds(self._tests, [json.dumps(start).encode()], files)
            pid, adopted = self._tests.recv(64), self._tests.recv(64)
        finally:
            _adopt_orphans(False)
        if not adopted:
            raise RuntimeError(f"the zygote ended with {self._process.wait()}")
        return int(pid)

    def end(self) -> None:
        """Close the socket, which ends the process."""
        self._tests.close()
        self._process.wait()


class ForkedPython(subprocess.Popen[Any]):
    """``Popen`` of ``python [options] -c PROGRAM`` or ``-m MODULE``, forked from a zygote."""

    _zygotes: ClassVar[dict[tuple[Any, ...], Zygote]] = {}
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def _execute_child(self, *given: Any) -> None:
        by_name = signature(super()._execute_child).bind(*given).arguments
        refused = ("preexec_fn", "pass_fds", "shell", "executable")
        assert not any(by_name[name] for name in refused), f"a fork takes none of {refused}"
        words, environment, folder = by_name["args"], by_name["env"], by_name["cwd"]
        at = next(place for place, word in enumerate(words) if word in ("-c", "-m"))
        start = {
            "arguments": [os.fspath(word) for word in words[at:]],
            "folder": None if folder is None else os.fspath(folder),
            "environment": dict(os.environ if environment is None else environment),
            "new_session": by_name["start_new_session"],
        }
        pipes = [by_name[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        files = [standard if pipe == -1 else pipe for standard, pipe in enumerate(pipes)]
        with self._lock:
            zygote = self._zygote(tuple(words[1:at]), start["environment"])
            self.pid = zygote.fork(start, files)
        self._child_created = True
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(by_name[name] for name in names))

    def _zygote(self, options: tuple[str, ...], environment: Mapping[str, str]) -> Zygote:
        read = {k: v for k, v in environment.items() if k.startswith(READ_WHILE_LOADED)}
        key = (options, *sorted(read.items()))
        if key not in self._zygotes:
            self._zygotes[key] = Zygote(options, environment)
        return self._zygotes[key]


def _adopt_orphans(adopt: bool) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
