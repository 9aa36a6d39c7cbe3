"""What is costly and never changed is made by one of several test processes, for all of them."""

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Path:
    """Return a folder that all workers of pytest-xdist share in this session."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    return folder


def make_once(path: Path, make: Callable[[Path], object]) -> Path:
    """Call ``make(path)`` in the first process that needs it; return ``path`` once it is made."""
    with path.with_name(f"{path.name}.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not lock.tell():
            make(path)
            lock.write("made")
    return path
