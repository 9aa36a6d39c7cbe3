"""Several replicas of the server, nginx in front of them and Redis behind: all on this machine.

Each is a process of its own. One that dies is started again on the ports that it had, where nginx
finds it; until then others serve its users, with the K/V that Redis has. When all shall end, nginx
first finishes what it accepted, and only then the replicas hear of it.
"""

import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from errno import EADDRINUSE
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hydra.core.override_parser.types import Quote, QuotedString

from torchrec_kvshare.config import ServeClusterConfig, ServerConfig
from torchrec_kvshare.errors import ConfigError, UnavailableError
from torchrec_kvshare.serving.nginx import Address, Limits, Tls, host_port, nginx_config

logger = logging.getLogger(__name__)

HERE = "127.0.0.1"
NGINX, REDIS, TIERED = "nginx", "redis-server", "tiered"
CONFIG_FILE = "nginx.conf"
# Below those that the kernel gives to clients: one of them could sit on a dead replica's.
PORTS = range(10_000, 30_000)
POLL_S = 0.05
PROBE_S = 1.0  # for an answer to whether a process is ready
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # before a process that died is started again
HEALTHY_S = 60.0  # who has run for so long is started again after the first pause
ANSWER_S = 2.0  # beyond a request's deadline: then its replica hangs
KILL_S = 10.0  # beyond the time to drain: then a process is killed
LOG_LINES = 8  # of a process that did not start, for the error
# What the cluster decides, and pipelines.serve does not know or must not be told twice.
OWN_KEYS = ("output", "replicas", "replica_port", "redis_bytes", "access_log", "run", "cache")


class Part(NamedTuple):
    """One process of the cluster."""

    name: str
    command: list[str]
    is_ready: Callable[[], bool]
    log_file: Path


class Layout(NamedTuple):
    """Who runs, in the order of the start, and where clients come."""

    parts: list[Part]  # nginx is the last
    url: str
    drain_s: float


def write_layout(config: ServeClusterConfig, overrides: Sequence[str]) -> Layout:
    """Choose ports and write ``nginx.conf``; nothing runs yet.

    Args:
        config: of the cluster.
        overrides: of the command line; those of a replica are handed on.

    Raises:
        ConfigError: if the config cannot work.
    """
    server = config.server
    output = Path(config.output).resolve()
    front = Address(server.host, *(port or free_port() for port in _front_ports(config)))
    addresses = [_replica_address(config, place) for place in range(config.replicas)]
    access_log = "access.log" if config.access_log else None
    text = nginx_config(front, addresses, limits_of(server), _tls(config), access_log)
    output.mkdir(parents=True, exist_ok=True)
    (output / CONFIG_FILE).write_text(text)
    redis = _redis(config, output)
    url = config.cache.remote.url if redis is None else redis.url
    parts = [] if redis is None else [redis.part]
    for place, address in enumerate(addresses):
        given = [*_handed_on(overrides), *_own_overrides(config, place, address, url)]
        parts.append(_replica(f"replica-{place}", given, address, output))
    s = "s" if server.tls_cert_file else ""
    http, grpc = (host_port(front.host, port) for port in front[1:])
    return Layout(
        [*parts, _nginx(front, output)], f"http{s}://{http} and grpc{s}://{grpc}", server.drain_s
    )


def limits_of(server: ServerConfig) -> Limits:
    """What nginx allows in front of replicas with that config."""
    return Limits(server.max_request_bytes, server.timeout_ms / 1000 + ANSWER_S, server.drain_s)


def run_cluster(layout: Layout, is_told: Callable[[], bool], show: Callable[[], None]) -> None:
    """Start all, keep them running, and drain them once told to stop.

    Args:
        layout: of ``write_layout``.
        is_told: whether to stop; asked all the time.
        show: called once all requests will be answered.

    Raises:
        ConfigError: if nginx is not on PATH.
        UnavailableError: if a process ends before it was ready.
    """
    if shutil.which(NGINX) is None:
        raise ConfigError(f"{NGINX} is not on PATH; it stands in front of the replicas")
    *backends, nginx = (_Supervised(part) for part in layout.parts)
    try:
        for batch in (backends, [nginx]):  # Before them it has nobody to ask.
            _start(batch, is_told)
        if not is_told():
            show()
        while not is_told():
            for one in (*backends, nginx):
                one.keep_running()
            time.sleep(POLL_S)
        logger.info("draining: nginx takes nothing more and finishes what it has")
        _end([nginx], signal.SIGQUIT, layout.drain_s + KILL_S)
    finally:
        _end([nginx], signal.SIGTERM, KILL_S)
        _end(backends, signal.SIGTERM, layout.drain_s + KILL_S)
    logger.info("drained")


def free_port() -> int:
    """A port of this machine that is free now, and that the kernel gives to no client."""
    while True:
        port = random.choice(PORTS)
        with socket.socket() as listener:
            try:
                listener.bind(("", port))
            except OSError as error:
                if error.errno != EADDRINUSE:
                    raise
            else:
                return port


class _Supervised:
    """A process that is started again when it dies, ever more slowly if it does not stay."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._is_known_ready = False

    def start(self) -> None:
        with self.part.log_file.open("ab") as log:
            # A session of its own: Ctrl-C is for us, who end the parts in their order.
            self._process = subprocess.Popen(
                self.part.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started = time.monotonic()
        self._is_known_ready = False
        name, log_file = self.part.name, self.part.log_file
        logger.info("%s runs as process %d; its log is %s", name, self._process.pid, log_file)

    def is_ready(self) -> bool:
        """Whether it answers.

        Raises:
            UnavailableError: if it has ended.
        """
        assert self._process is not None
        status = self._process.poll()
        if status is not None:
            lines = self.part.log_file.read_text(errors="replace").splitlines()[-LOG_LINES:]
            raise UnavailableError(
                f"{self.part.name} ended with {status} before it was ready; the end of "
                f"{self.part.log_file}:\n" + "\n".join(lines)
            )
        self._is_known_ready = self._is_known_ready or self.part.is_ready()
        return self._is_known_ready

    def keep_running(self) -> None:
        """Start it again if it has died and its pause is over; one look, no waiting."""
        if self._process is None:
            if time.monotonic() >= self._started:
                self.start()
            return
        status = self._process.poll()
        if status is not None:
            self._bury(status)
        elif not self._is_known_ready and self.part.is_ready():
            self._is_known_ready = True
            logger.info("%s is back", self.part.name)

    def _bury(self, status: int) -> None:
        assert self._process is not None
        self._kill_group()
        self._process = None
        now = time.monotonic()
        if now - self._started > HEALTHY_S:
            self._pause_s = FIRST_PAUSE_S
        name, pause_s = self.part.name, self._pause_s
        logger.warning("%s ended with %d and starts again in %g s", name, status, pause_s)
        self._started = now + pause_s
        self._pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def tell(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def wait(self, deadline: float) -> None:
        """Until it has ended; what has not by the deadline is killed."""
        if self._process is None:
            return
        try:
            status = self._process.wait(max(0.0, deadline - time.monotonic()))
            logger.info("%s ended (%d)", self.part.name, status)
        except subprocess.TimeoutExpired:
            logger.error("%s did not end in time and is killed", self.part.name)
            self._process.kill()
            self._process.wait()
        self._kill_group()
        self._process = None

    def _kill_group(self) -> None:
        """What it has left behind: nginx that is killed leaves its workers at the port."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _start(batch: Sequence[_Supervised], is_told: Callable[[], bool]) -> None:
    for one in batch:
        one.start()
    # All are looked at, every time: one that has ended is an error whoever else is not ready.
    while not is_told() and {one.is_ready() for one in batch} != {True}:
        time.sleep(POLL_S)


def _end(batch: Sequence[_Supervised], number: signal.Signals, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for one in batch:
        one.tell(number)
    for one in batch:
        one.wait(deadline)


# ------------------------------------------------------------------------ what is to be started


class _Redis(NamedTuple):
    part: Part
    url: str


def _redis(config: ServeClusterConfig, output: Path) -> _Redis | None:
    """A Redis for the replicas to share, unless they have one or keep nothing there."""
    cache = config.cache
    if cache.name != TIERED:
        logger.info("cache=%s: the replicas share no K/V", cache.name)
        return None
    if cache.remote.url is not None:
        return None
    program = shutil.which(REDIS)
    if program is None:
        logger.warning("%s is not on PATH: the replicas run without a remote tier", REDIS)
        return None
    port = free_port()
    url = f"redis://{HERE}:{port}"
    logger.info("cache.remote.url is null: a Redis is started at %s, and keeps no file", url)
    command = [program, "--bind", HERE, "--port", str(port), "--dir", str(output)]
    command += ["--save", "", "--appendonly", "no"]
    # What says that a user was forgotten leaves last.
    command += ["--maxmemory", str(config.redis_bytes), "--maxmemory-policy", "volatile-ttl"]
    return _Redis(Part("redis", command, partial(_says_pong, port), output / "redis.log"), url)


def _replica(name: str, overrides: list[str], address: Address, output: Path) -> Part:
    command = [sys.executable, "-m", "pipelines.serve", *overrides]
    return Part(name, command, partial(_is_serving, address), output / f"{name}.log")


def _nginx(front: Address, output: Path) -> Part:
    # As root it would give its work to a user who may not enter the folder.
    user = ["-g", "user root;"] if os.geteuid() == 0 else []
    command = [NGINX, "-p", str(output), "-c", CONFIG_FILE, "-e", "nginx.log", *user]
    host = {"0.0.0.0": HERE, "::": "::1"}.get(front.host, front.host)
    is_ready = partial(_is_listening, front._replace(host=host))
    return Part(NGINX, command, is_ready, output / "nginx.log")


def _handed_on(overrides: Sequence[str]) -> list[str]:
    names = [(override.lstrip("+~").partition("=")[0], override) for override in overrides]
    return [override for name, override in names if name not in OWN_KEYS]


def _own_overrides(
    config: ServeClusterConfig, place: int, address: Address, redis_url: str | None
) -> list[str]:
    """What is another value for each replica, or not the one of the command line."""
    cache, server = config.cache, config.server
    # All of them together have the machine's cores.
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // config.replicas)
    value_by_key: dict[str, str | int | None] = {
        "server.host": address.host,
        "server.http_port": address.http_port,
        "server.grpc_port": address.grpc_port,
        "server.tls_cert_file": None,
        "server.tls_key_file": None,
        "server.tls_client_ca_file": None,
        "server.tensorboard": _folder_of(server.tensorboard, place),
        "threads": threads,
    }
    if cache.name == TIERED:  # The other caches' files have no such keys.
        value_by_key["cache.remote.url"] = redis_url
        value_by_key["cache.disk.folder"] = _folder_of(cache.disk.folder, place)
    own = [f"{key}={_quoted(value)}" for key, value in value_by_key.items()]
    return [f"cache={cache.name}", *own]


def _folder_of(folder: str | None, place: int) -> str | None:
    return None if folder is None else str(Path(folder).resolve() / f"replica-{place}")


def _quoted(value: str | int | None) -> str:
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    return "null" if value is None else str(value)


def _front_ports(config: ServeClusterConfig) -> tuple[int, int]:
    return config.server.http_port, config.server.grpc_port


def _replica_address(config: ServeClusterConfig, place: int) -> Address:
    if config.replica_port is None:
        return Address(HERE, free_port(), free_port())
    first = config.replica_port + 2 * place
    if not 0 < first < 2**16 - 1:
        raise ConfigError(
            f"replica_port is {config.replica_port}; {config.replicas} replicas take two ports "
            "each from there on, and 65535 is the last"
        )
    return Address(HERE, first, first + 1)


def _tls(config: ServeClusterConfig) -> Tls | None:
    server = config.server
    if (server.tls_cert_file is None) != (server.tls_key_file is None):
        raise ConfigError(
            f"server.tls_cert_file is {server.tls_cert_file!r} and server.tls_key_file is "
            f"{server.tls_key_file!r}; both or none are needed"
        )
    if server.tls_cert_file is None or server.tls_key_file is None:
        return None
    cert, key = (str(Path(file).resolve()) for file in (server.tls_cert_file, server.tls_key_file))
    ca = server.tls_client_ca_file
    return Tls(cert, key, None if ca is None else str(Path(ca).resolve()))


# ------------------------------------------------------------------------------ who is ready


def _is_serving(address: Address) -> bool:
    url = f"http://{host_port(address.host, address.http_port)}/v2/health/ready"
    try:
        with urllib.request.urlopen(url, timeout=PROBE_S):
            return _is_listening(address)
    except OSError:  # It does not listen yet, or says 503.
        return False


def _is_listening(address: Address) -> bool:
    try:
        for port in (address.http_port, address.grpc_port):
            socket.create_connection((address.host, port), PROBE_S).close()
    except OSError:
        return False
    return True


def _says_pong(port: int) -> bool:
    try:
        with socket.create_connection((HERE, port), PROBE_S) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False
