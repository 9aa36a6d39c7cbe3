"""Real Redis servers for tests: single, with TLS and passwords, or a cluster of six.

All listen on 127.0.0.1 only, on free ports, write nothing to disk but their logs, and end with the
``with`` block that started them.
"""

import itertools
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pytest
from redis import Redis

START_S = 15.0  # a busy machine is slow to start six of them
BUS = 10_000  # offset of the port on which a cluster's servers talk to each other
FIRST_PORT, WORKER_PORTS, MOST_WORKERS = 10_000, 750, 8  # all below the ephemeral ports
NODE_TIMEOUT_MS = 2000
READY = "Ready to accept connections"


class Certificates(NamedTuple):
    """Files of a throw-away authority, and of a certificate that it signed for 127.0.0.1."""

    ca: Path
    cert: Path
    key: Path


class RedisServer:
    """A redis-server process.

    Args:
        folder: for its log and a cluster's state.
        arguments: more of redis-server's options.
        certificates: accept TLS only, and require client certificates.
        password: of clients.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        certificates: Certificates | None = None,
        password: str | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self.certificates = certificates
        self.password = password
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis{'s' if self.certificates else ''}://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it, empty, on its port; return when it accepts commands."""
        assert self._process is None
        log = self.folder / "redis.log"
        log.write_text("")
        ports = ["--port", str(self.port)]
        if self.certificates is not None:
            ports = ["--port", "0", "--tls-port", str(self.port)]
            for option, file in zip(("ca-cert", "cert", "key"), self.certificates, strict=True):
                ports += [f"--tls-{option}-file", str(file)]
        secret = ["--requirepass", self.password] if self.password else []
        options = ["--bind", "127.0.0.1", "--dir", str(self.folder), "--logfile", str(log)]
        nothing_on_disk = ["--save", "", "--appendonly", "no"]
        self._process = subprocess.Popen(
            ["redis-server", *ports, *options, *nothing_on_disk, *secret, *self._arguments]
        )
        try:
            wait_until(lambda: READY in log.read_text(), START_S)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill it, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        """Freeze it: it accepts connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    @contextmanager
    def client(self) -> Iterator["Redis"]:
        """A plain client, to see what is in the server."""
        options: dict[str, Any] = {"password": self.password}
        if self.certificates is not None:
            ca, cert, key = map(str, self.certificates)
            options |= {"ssl": True, "ssl_ca_certs": ca, "ssl_certfile": cert, "ssl_keyfile": key}
        with Redis(port=self.port, host="127.0.0.1", **options) as client:
            yield client

    def __enter__(self) -> "RedisServer":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


@contextmanager
def redis_cluster(folder: Path) -> Iterator[list[RedisServer]]:
    """Three primaries and a replica of each, in sync."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                RedisServer(
                    folder / str(number),
                    *("--cluster-enabled", "yes"),
                    *("--cluster-node-timeout", str(NODE_TIMEOUT_MS)),
                    *("--repl-diskless-sync-delay", "0"),
                    # CLUSTER SLOTS lists a replica after its first ping, by default after 10 s.
                    *("--repl-ping-replica-period", "1"),
                )
            )
            for number in range(6)
        ]
        create = ["redis-cli", "--cluster", "create"]
        options = ["--cluster-replicas", "1", "--cluster-yes"]
        addresses = [f"127.0.0.1:{server.port}" for server in servers]
        subprocess.run([*create, *addresses, *options], check=True, capture_output=True, timeout=60)
        wait_until(lambda: all(_is_in_sync(server) for server in servers), START_S)
        yield servers


def _is_in_sync(server: RedisServer) -> bool:
    """Return whether it lists a replica of every slot and, if it is a replica, is in sync."""
    with server.client() as client:
        replication = client.info("replication")
        ranges: Any = client.execute_command("CLUSTER SLOTS")
    is_linked = replication["role"] == "master" or replication["master_link_status"] == "up"
    return is_linked and [len(servers) for _, _, *servers in ranges] == [2, 2, 2]


def make_certificates(folder: Path) -> Certificates:
    """An authority and a certificate of 127.0.0.1, for a day."""
    ca, cert, key = (folder / name for name in ("ca.crt", "redis.crt", "redis.key"))
    ca_key, request, extension = (folder / name for name in ("ca.key", "redis.csr", "extension"))
    extension.write_text("subjectAltName=IP:127.0.0.1")
    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    _openssl("req", "-x509", *new_key, "-keyout", ca_key, "-out", ca, "-subj", "/CN=tests' CA")
    _openssl("req", *new_key, "-keyout", key, "-out", request, "-subj", "/CN=tests' server")
    signed_by = ["-CA", ca, "-CAkey", ca_key, "-CAcreateserial"]
    _openssl("x509", "-req", "-in", request, *signed_by, "-out", cert, "-extfile", extension)
    return Certificates(ca, cert, key)


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments, "-days", "1"], check=True, capture_output=True)


def _ports() -> Iterator[int]:
    """Yield ports in sequence, different for each worker and below the ephemeral ports.

    Ports drawn at random could be drawn twice before a server listens on them.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    first, size = FIRST_PORT + int(worker) % MOST_WORKERS * WORKER_PORTS, WORKER_PORTS
    for number in itertools.count(random.SystemRandom().randrange(size)):
        yield first + number % size


_PORTS = _ports()


def free_port() -> int:
    """Return a port that is free now and whose cluster bus port is free too."""
    return next(port for port in _PORTS if _is_free(port) and _is_free(port + BUS))


@contextmanager
def closed_port() -> Iterator[int]:
    """A port that refuses connections and that no other process can bind meanwhile."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def _is_free(port: int) -> bool:
    with socket.socket() as listener:
        try:
            listener.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def wait_until(is_so: Callable[[], bool], timeout_s: float) -> None:
    """Poll a condition; fail the test if it does not become true in time."""
    deadline = time.monotonic() + timeout_s
    while not is_so():
        if time.monotonic() > deadline:
            pytest.fail(f"the condition did not become true in {timeout_s} s")
        time.sleep(0.01)
