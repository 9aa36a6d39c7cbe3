"""A Redis for one benchmark: empty, on a free port of this machine, killed afterwards."""

import logging
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from torchrec_kvshare.deploy.ports import HERE, free_port, redis_answers
from torchrec_kvshare.errors import TierError

logger = logging.getLogger(__name__)

REDIS = "redis-server"
START_S = 15.0  # until it answers; the machine may be busy
POLL_S = 0.02


class RedisProcess(NamedTuple):
    """A running server."""

    process: "subprocess.Popen[bytes]"
    url: str


@contextmanager
def redis_server(folder: Path) -> Iterator[RedisProcess | None]:
    """Run a Redis that writes nothing to disk but its log, in ``folder``.

    Yields:
        The server; None, with a warning in the log, if redis-server is not on PATH.

    Raises:
        TierError: if it does not start.
    """
    program = shutil.which(REDIS)
    if program is None:
        logger.warning("%s is not on PATH: the remote tier is not measured", REDIS)
        yield None
        return
    port = free_port()
    listen = ["--bind", HERE, "--port", str(port)]
    no_persistence = ["--save", "", "--appendonly", "no"]
    files = ["--dir", str(folder), "--logfile", str(folder / "redis.log")]
    process = subprocess.Popen([program, *listen, *no_persistence, *files])
    try:
        _wait_for(process, port)
        yield RedisProcess(process, f"redis://{HERE}:{port}")
    finally:
        process.kill()  # There is no data to save.
        process.wait()


def _wait_for(process: "subprocess.Popen[bytes]", port: int) -> None:
    deadline = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < deadline:
        if redis_answers(port):
            return
        time.sleep(POLL_S)
    raise TierError(f"{REDIS} does not answer on port {port}; its exit status: {process.poll()}")
