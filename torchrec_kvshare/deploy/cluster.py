"""Several replicas of the server, nginx in front of them and Redis behind: all on this machine.

Each is a process of its own. One that dies is started again on the ports that it had, where nginx
finds it; until then others serve its users, with the K/V that Redis has. When all shall end, nginx
first finishes what it accepted, and only then the replicas hear of it.

Redis has a password and the packets in it a key, both made here unless the config names them. They
stand in files of the output folder that no other user can read, never on a command line.
"""

import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from errno import EADDRINUSE
from functools import partial
from pathlib import Path
from typing import NamedTuple

from hydra.core.override_parser.types import Quote, QuotedString

from torchrec_kvshare.cache.open import TIERED
from torchrec_kvshare.cache.private import make_secret, read_secret, write_secret
from torchrec_kvshare.commands.layout import process_command
from torchrec_kvshare.commands.machine import granted_cores
from torchrec_kvshare.config import ServeClusterConfig, ServerConfig
from torchrec_kvshare.deploy.nginx import (
    CONFIG_FILE,
    LOG_FILE,
    PROGRAM,
    Address,
    NginxLimits,
    Tls,
    host_port,
    nginx_command,
    nginx_config,
    token_config,
)
from torchrec_kvshare.errors import ConfigError, UnavailableError

logger = logging.getLogger(__name__)

HERE = "127.0.0.1"
REDIS = "redis-server"
# In the output folder; nginx has a folder of its own, see nginx_command.
NGINX_FOLDER, TOKEN_FILE = "nginx", "token.conf"
REDIS_FILE, PASSWORD_FILE, KEY_FILE = "redis.conf", "redis_password", "packet_key"
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
    folder: Path | None = None  # in which it is started; None: in ours


class Layout(NamedTuple):
    """Who runs, in the order of the start, and where clients come."""

    parts: list[Part]  # nginx is the last
    url: str
    drain_s: float
    config_file: Path  # of nginx


def write_layout(config: ServeClusterConfig, overrides: Sequence[str]) -> Layout:
    """Choose ports, write ``nginx.conf`` and make secrets; nothing runs yet.

    Args:
        config: of the cluster.
        overrides: of the command line; those of a replica are handed on.

    Raises:
        ConfigError: if the config cannot work, a secret of it cannot be read, or one that an
            earlier run made is open to other users.
    """
    server = config.server
    output = Path(config.output).resolve()
    front = Address(server.host, *(port or free_port() for port in _front_ports(config)))
    addresses = [_replica_address(config, place) for place in range(config.replicas)]
    nginx = _nginx(config, front, addresses, output / NGINX_FOLDER)
    redis = _redis(config, output)
    remote = {} if redis is None else redis.overrides
    parts = [] if redis is None else [redis.part]
    for place, address in enumerate(addresses):
        own = _own_overrides(config, place, address) | remote
        given = [*_handed_on(overrides), f"cache={config.cache.name}", *_spelt(own)]
        given.append(_peers(addresses))
        parts.append(_replica(f"replica-{place}", given, address, output))
    s = "s" if server.tls_cert_file else ""
    http, grpc = (host_port(front.host, port) for port in front[1:])
    return Layout(
        *([*parts, nginx], f"http{s}://{http} and grpc{s}://{grpc}", server.drain_s),
        output / NGINX_FOLDER / CONFIG_FILE,
    )


def limits_of(server: ServerConfig, replicas: int) -> NginxLimits:
    """What nginx allows in front of so many replicas with that config.

    In flight are as many requests as all replicas have room for; one address has half of them.
    """
    requests = replicas * (server.queue_requests + server.batch_requests + server.max_streams)
    return NginxLimits(
        body_bytes=server.max_request_bytes,
        timeout_s=server.timeout_ms / 1000 + ANSWER_S,
        drain_s=server.drain_s,
        requests=requests,
        client_requests=-(-requests // 2),
    )


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
    if shutil.which(PROGRAM) is None:
        raise ConfigError(f"{PROGRAM} is not on PATH; it stands in front of the replicas")
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
                cwd=self.part.folder,
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


Overrides = dict[str, str | int | None]  # value by key


class _Redis(NamedTuple):
    part: Part
    overrides: Overrides  # with which replicas use it


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
    password = make_secret(output / PASSWORD_FILE, "the password of Redis", "output")
    write_secret(output / REDIS_FILE, b"requirepass " + password + b"\n")
    overrides: Overrides = {
        "cache.remote.url": url,
        "cache.remote.username": None,
        "cache.remote.password_file": str(output / PASSWORD_FILE),
    }
    if cache.key_file is None:
        make_secret(output / KEY_FILE, "the key of packets", "output")
        overrides["cache.key_file"] = str(output / KEY_FILE)
    command = [program, str(output / REDIS_FILE), "--bind", HERE, "--port", str(port)]
    command += ["--dir", str(output), "--save", "", "--appendonly", "no"]
    # What says that a user was forgotten leaves last.
    command += ["--maxmemory", str(config.redis_bytes), "--maxmemory-policy", "volatile-ttl"]
    is_ready = partial(_says_pong, port, password)
    return _Redis(Part("redis", command, is_ready, output / "redis.log"), overrides)


def _replica(name: str, overrides: list[str], address: Address, output: Path) -> Part:
    command = [*process_command("serve"), *overrides]
    return Part(name, command, partial(_is_serving, address), output / f"{name}.log")


def _nginx(
    config: ServeClusterConfig, front: Address, replicas: Sequence[Address], folder: Path
) -> Part:
    """nginx in a folder of its own, which is made with all that it reads."""
    server = config.server
    command, token = nginx_command(), None
    if server.token_file is not None:
        token = token_config(read_secret(server.token_file, "server.token_file").strip())
    text = nginx_config(
        *(front, replicas, limits_of(server, config.replicas), _tls(config)),
        access_log="access.log" if config.access_log else None,
        token_file=None if token is None else TOKEN_FILE,
    )
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o711)  # Workers pass through it to their bodies, and cannot write to it.
    (folder / CONFIG_FILE).write_text(text)
    if token is not None:
        write_secret(folder / TOKEN_FILE, token.encode())
    host = {"0.0.0.0": HERE, "::": "::1"}.get(front.host, front.host)
    is_ready = partial(_is_listening, front._replace(host=host))
    return Part(PROGRAM, command, is_ready, folder / LOG_FILE, folder)


def _handed_on(overrides: Sequence[str]) -> list[str]:
    names = [(override.lstrip("+~").partition("=")[0], override) for override in overrides]
    return [override for name, override in names if name not in OWN_KEYS]


def _own_overrides(config: ServeClusterConfig, place: int, address: Address) -> Overrides:
    """What is another value for each replica, or not the one of the command line."""
    cache, server = config.cache, config.server
    # All of them together have the machine's cores.
    threads = config.threads or max(1, granted_cores() // config.replicas)
    own: Overrides = {
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
        own["cache.remote.url"] = cache.remote.url
        own["cache.disk.folder"] = _folder_of(cache.disk.folder, place)
    return own


def _spelt(overrides: Overrides) -> list[str]:
    return [f"{key}={_quoted(value)}" for key, value in overrides.items()]


def _peers(addresses: Sequence[Address]) -> str:
    quoted = (_quoted(host_port(one.host, one.http_port)) for one in addresses)
    return f"server.peers=[{','.join(quoted)}]"


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


def _says_pong(port: int, password: bytes) -> bool:
    try:
        with socket.create_connection((HERE, port), PROBE_S) as connection:
            connection.sendall(b"AUTH " + password + b"\r\n")
            if not connection.recv(16).startswith(b"+OK"):
                return False
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False
