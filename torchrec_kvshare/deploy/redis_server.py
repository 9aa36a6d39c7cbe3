"""A Redis of its own for a benchmark: empty, on a free port of this machine, gone afterwards."""

import logging
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from torchrec_kvshare.errors import TierError

logger = logging.getLogger(__name__)

REDIS = "redis-server"
HERE = "127.0.0.1"
START_S = 15.0  # until it answers: the machine may be busy


class RedisProcess(NamedTuple):
    """A server that runs."""

    process: "subprocess.Popen[bytes]"
    url: str


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisProcess | None]:
    """Run a Redis that keeps nothing on disk but its log, in ``folder``.

    Yields:
        The server; None, with a warning in the log, where redis-server is not on PATH.

    Raises:
        TierError: if it does not start.
    """
    program = shutil.which(REDIS)
    if program is None:
        logger.warning("%s is not on PATH: the remote tier is not measured", REDIS)
        yield None
        return
    port = _free_port()
    listen = ["--bind", HERE, "--port", str(port)]
    nothing_on_disk = ["--save", "", "--appendonly", "no"]
    files = ["--dir", str(folder), "--logfile", str(folder / "redis.log")]
    process = subprocess.Popen([program, *listen, *nothing_on_disk, *files])
    try:
        _wait_for(process, port)
        yield RedisProcess(process, f"redis://{HERE}:{port}")
    finally:
        process.kill()  # Nothing in it is worth a farewell.
        process.wait()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HERE, 0))
        port: int = listener.getsockname()[1]
        return port


def _wait_for(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection((HERE, port), 1.0) as connection:
            connection.sendall(b"PING\r\n")
            if connection.recv(16).startswith(b"+PONG"):
                return
        time.sleep(0.02)
    raise TierError(f"{REDIS} does not answer on port {port}; its exit status: {process.poll()}")
