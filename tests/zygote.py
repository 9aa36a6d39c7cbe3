"""The process that ``processes.py`` forks Python programs from: it has imported what they import.

It runs nothing before a fork that a program could notice: no parallel region, no pool, no thread
but numpy's own, which numpy ends and starts anew around a fork.
"""

import gc
import importlib
import json
import os
import runpy
import socket
import sys
import time
from types import ModuleType
from typing import Any

# Neither pyarrow, which starts threads when it is imported, nor grpc and duckdb.
PRELOADED = (
    "torchrec",
    "torchrec.models.dlrm",
    "torchrec.optim.rowwise_adagrad",
    "torch.utils.tensorboard",
    "torch._inductor",
    "torch._export",
    "torch.distributed.checkpoint",
    "tensorboard.backend.event_processing.event_accumulator",
    "hydra",
    "torchrec_kvshare.export.open",
    "torchrec_kvshare.training.run",
)


def main(descriptor: int) -> None:
    """Fork a program for each message until the test process is gone."""
    for name in PRELOADED:
        importlib.import_module(name)
    assert "pyarrow" not in sys.modules
    assert "grpc" not in sys.modules
    gc.collect()
    gc.freeze()
    start = _next_child(socket.socket(fileno=descriptor))
    if start is not None:
        _become(**start)


def _next_child(tests: socket.socket) -> dict[str, Any] | None:
    """Return in each child, with what it shall run; in the zygote, None at its end."""
    while True:
        message, files, _, _ = socket.recv_fds(tests, 1 << 20, 3)
        if not message:
            return None
        between = os.fork()
        if between == 0:
            # The test process adopts the child of a child that ends.
            between = os.getpid()
            child = os.fork()
            if child:
                tests.send(str(child).encode())
                os._exit(0)
            while os.getppid() == between:
                time.sleep(1e-4)
            tests.close()
            for standard, file in enumerate(files):
                os.dup2(file, standard)
                os.close(file)
            start: dict[str, Any] = json.loads(message)
            return start
        os.waitpid(between, 0)
        for file in files:
            os.close(file)
        tests.send(b"adopted")


def _become(
    arguments: list[str], folder: str | None, environment: dict[str, str], new_session: bool
) -> None:
    """Run ``-c PROGRAM`` or ``-m MODULE`` as the interpreter does at its start."""
    if new_session:
        os.setsid()
    if folder is not None:
        os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    kind, program, *given = arguments
    sys.argv = [kind, *given]
    main_module = ModuleType("__main__")
    main_module.__dict__["__builtins__"] = __builtins__
    sys.modules["__main__"] = main_module
    if kind == "-m":
        sys.path[0] = os.getcwd()
        runpy._run_module_as_main(program)  # type: ignore[attr-defined]
    else:
        sys.path[0] = ""
        exec(compile(program, "<string>", "exec"), main_module.__dict__)
