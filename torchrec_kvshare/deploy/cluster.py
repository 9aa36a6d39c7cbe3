"""Run a cluster on this machine: replicas of the server, nginx in front and Redis behind.

Each is a process. A process that dies is started again on the same ports, so that nginx finds it;
until then other replicas serve its users, with the K/V that Redis has. At shutdown nginx first
finishes the requests it accepted, and only then the replicas are stopped.

Redis has a password and its packets are signed with a key; both are made here unless the config
names them. They are in files of the output folder that no other user can read, never on a command
line.
"""

import logging
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
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
from torchrec_kvshare.deploy.ports import HERE, PROBE_S, free_port, is_listening, redis_answers
from torchrec_kvshare.errors import ConfigError, UnavailableError

logger = logging.getLogger(__name__)

REDIS = "redis-server"
# In the output folder; nginx has a folder of its own, see nginx_command.
NGINX_FOLDER, TOKEN_FILE = "nginx", "token.conf"
REDIS_FILE, PASSWORD_FILE, KEY_FILE = "redis.conf", "redis_password", "packet_key"
POLL_S = 0.05
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0  # before a process that died is started again
HEALTHY_S = 60.0  # uptime after which the pause is FIRST_PAUSE_S again
ANSWER_S = 2.0  # after a request's deadline: a replica that takes longer hangs
KILL_S = 10.0  # after the time to drain: a process that takes longer is killed
LOG_LINES = 8  # of a process that did not start, for the error
# Settings of the cluster: pipelines.serve does not know them, or gets them from the cluster.
OWN_KEYS = ("output", "replicas", "replica_port", "redis_bytes", "access_log", "run", "cache")


class ProcessSpec(NamedTuple):
    """How to start one process of the cluster, and how to check that it is ready."""

    name: str
    command: list[str]
    is_ready: Callable[[], bool]
    log_file: Path
    folder: Path | None = None  # its working folder; None: that of this process


class Layout(NamedTuple):
    """The processes in the order they start, and the URLs for clients."""

    processes: list[ProcessSpec]  # nginx is the last
    url: str
    drain_s: float
    config_file: Path  # of nginx


def write_layout(
    config: ServeClusterConfig,
    overrides: Sequence[str],
    cache_option: str | None = None,
    config_dirs: Sequence[str] = (),
) -> Layout:
    """Choose ports, write ``nginx.conf`` and the secrets; start nothing.

    Args:
        config: of the cluster.
        overrides: of the command line; those that a replica knows are passed on to it.
        cache_option: of the config group ``cache``; None for the one with the cache's name.
        config_dirs: folders with config options of one's own.

    Raises:
        ConfigError: if the config cannot work, one of its secrets cannot be read, or a secret that
            an earlier run made is open to other users.
    """
    server = config.server
    output = Path(config.output).resolve()
    http_port, grpc_port = server.http_port or free_port(), server.grpc_port or free_port()
    front = Address(server.host, http_port, grpc_port)
    addresses = [_replica_address(config, index) for index in range(config.replicas)]
    nginx = _nginx(config, front, addresses, output / NGINX_FOLDER)
    redis = _redis(config, output)
    remote = {} if redis is None else redis.overrides
    processes = [] if redis is None else [redis.process]
    for index, address in enumerate(addresses):
        own = _own_overrides(config, index, address) | remote
        option = cache_option or config.cache.name
        given = [*_passed_on(overrides), f"cache={option}", *_override_texts(own)]
        given.append(_peers(addresses))
        given += [f"--config-dir={folder}" for folder in config_dirs]
        processes.append(_replica(f"replica-{index}", given, address, output))
    s = "s" if server.tls_cert_file else ""
    http, grpc = (host_port(front.host, port) for port in front[1:])
    return Layout(
        processes=[*processes, nginx],
        url=f"http{s}://{http} and grpc{s}://{grpc}",
        drain_s=server.drain_s,
        config_file=output / NGINX_FOLDER / CONFIG_FILE,
    )


def limits_of(server: ServerConfig, replicas: int) -> NginxLimits:
    """Return nginx's limits in front of so many replicas with that config.

    As many requests may be in flight as all replicas have room for, half of them from one address.
    """
    requests = replicas * (server.queue_requests + server.batch_requests + server.max_streams)
    return NginxLimits(
        body_bytes=server.max_request_bytes,
        timeout_s=server.timeout_ms / 1000 + ANSWER_S,
        drain_s=server.drain_s,
        requests=requests,
        client_requests=-(-requests // 2),
    )


def run_cluster(
    layout: Layout, should_stop: Callable[[], bool], on_ready: Callable[[], None]
) -> None:
    """Start all processes, keep them running, and drain them when told to stop.

    Args:
        layout: from ``write_layout``.
        should_stop: polled all the time.
        on_ready: called once, when the cluster answers requests.

    Raises:
        ConfigError: if nginx is not on PATH.
        UnavailableError: if a process ends before it was ready.
    """
    if shutil.which(PROGRAM) is None:
        raise ConfigError(f"{PROGRAM} is not on PATH; the cluster needs it in front of replicas")
    *backends, nginx = (_Supervised(spec) for spec in layout.processes)
    try:
        for group in (backends, [nginx]):  # nginx is last: it needs the replicas.
            _start(group, should_stop)
        if not should_stop():
            on_ready()
        while not should_stop():
            for one in (*backends, nginx):
                one.keep_running()
            time.sleep(POLL_S)
        logger.info("draining: nginx takes nothing more and finishes what it has")
        _end([nginx], signal.SIGQUIT, layout.drain_s + KILL_S)
    finally:
        _end([nginx], signal.SIGTERM, KILL_S)
        _end(backends, signal.SIGTERM, layout.drain_s + KILL_S)
    logger.info("drained")


class _Supervised:
    """A process that is restarted when it dies, with a longer pause after every early death."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._pause_s = FIRST_PAUSE_S
        self._is_known_ready = False

    def start(self) -> None:
        with self.spec.log_file.open("ab") as log:
            # A session of its own: Ctrl-C reaches this process alone, which stops them in order.
            self._process = subprocess.Popen(
                self.spec.command,
                cwd=self.spec.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._started = time.monotonic()
        self._is_known_ready = False
        name, log_file = self.spec.name, self.spec.log_file
        logger.info("%s runs as process %d; its log is %s", name, self._process.pid, log_file)

    def is_ready(self) -> bool:
        """Whether it answers.

        Raises:
            UnavailableError: if it has ended.
        """
        assert self._process is not None
        status = self._process.poll()
        if status is not None:
            lines = self.spec.log_file.read_text(errors="replace").splitlines()[-LOG_LINES:]
            raise UnavailableError(
                f"{self.spec.name} ended with {status} before it was ready; the end of "
                f"{self.spec.log_file}:\n" + "\n".join(lines)
            )
        self._is_known_ready = self._is_known_ready or self.spec.is_ready()
        return self._is_known_ready

    def keep_running(self) -> None:
        """Restart it if it has died and its pause is over; return at once."""
        if self._process is None:
            if time.monotonic() >= self._started:
                self.start()
            return
        status = self._process.poll()
        if status is not None:
            self._schedule_restart(status)
        elif not self._is_known_ready and self.spec.is_ready():
            self._is_known_ready = True
            logger.info("%s is back", self.spec.name)

    def _schedule_restart(self, status: int) -> None:
        assert self._process is not None
        self._kill_group()
        self._process = None
        now = time.monotonic()
        if now - self._started > HEALTHY_S:
            self._pause_s = FIRST_PAUSE_S
        name, pause_s = self.spec.name, self._pause_s
        logger.warning("%s ended with %d and starts again in %g s", name, status, pause_s)
        self._started = now + pause_s
        self._pause_s = min(2 * pause_s, LONGEST_PAUSE_S)

    def send(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)

    def wait(self, deadline: float) -> None:
        """Wait until it has ended; kill it at the deadline."""
        if self._process is None:
            return
        try:
            status = self._process.wait(max(0.0, deadline - time.monotonic()))
            logger.info("%s ended (%d)", self.spec.name, status)
        except subprocess.TimeoutExpired:
            logger.error("%s did not end in time and is killed", self.spec.name)
            self._process.kill()
            self._process.wait()
        self._kill_group()
        self._process = None

    def _kill_group(self) -> None:
        """Kill its children: the workers of a killed nginx keep the port open."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)


def _start(group: Sequence[_Supervised], should_stop: Callable[[], bool]) -> None:
    for one in group:
        one.start()
    # Check all of them every time: one that has ended is an error, even if others are not ready.
    while not should_stop() and {one.is_ready() for one in group} != {True}:
        time.sleep(POLL_S)


def _end(group: Sequence[_Supervised], number: signal.Signals, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for one in group:
        one.send(number)
    for one in group:
        one.wait(deadline)


# ---------------------------------------------------------------------------- the processes


Overrides = dict[str, str | int | None]  # value by key


class _Redis(NamedTuple):
    process: ProcessSpec
    overrides: Overrides  # of each replica, to use it


def _redis(config: ServeClusterConfig, output: Path) -> _Redis | None:
    """A Redis for the replicas to share; None if the config names one or uses no remote tier."""
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
    logger.info("cache.remote.url is null: starting a Redis at %s that writes no file", url)
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
    # With volatile-ttl the records of forgotten users are evicted last.
    command += ["--maxmemory", str(config.redis_bytes), "--maxmemory-policy", "volatile-ttl"]
    is_ready = partial(redis_answers, port, password)
    return _Redis(ProcessSpec("redis", command, is_ready, output / "redis.log"), overrides)


def _replica(name: str, overrides: list[str], address: Address, output: Path) -> ProcessSpec:
    command = [*process_command("serve"), *overrides]
    return ProcessSpec(name, command, partial(_is_serving, address), output / f"{name}.log")


def _nginx(
    config: ServeClusterConfig, front: Address, replicas: Sequence[Address], folder: Path
) -> ProcessSpec:
    """nginx in a folder of its own; make the folder and write the files that nginx reads."""
    server = config.server
    command, token = nginx_command(), None
    if server.token_file is not None:
        token = token_config(read_secret(server.token_file, "server.token_file").strip())
    text = nginx_config(
        front,
        replicas,
        limits_of(server, config.replicas),
        tls=_tls(config),
        access_log="access.log" if config.access_log else None,
        token_file=None if token is None else TOKEN_FILE,
    )
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o711)  # Workers pass through it to the stored bodies, and cannot write to it.
    (folder / CONFIG_FILE).write_text(text)
    if token is not None:
        write_secret(folder / TOKEN_FILE, token.encode())
    host = {"0.0.0.0": HERE, "::": "::1"}.get(front.host, front.host)
    is_ready = partial(_is_listening, front._replace(host=host))
    return ProcessSpec(PROGRAM, command, is_ready, log_file=folder / LOG_FILE, folder=folder)


def _passed_on(overrides: Sequence[str]) -> list[str]:
    names = [(override.lstrip("+~").partition("=")[0], override) for override in overrides]
    return [override for name, override in names if name not in OWN_KEYS]


def _own_overrides(config: ServeClusterConfig, index: int, address: Address) -> Overrides:
    """Settings that differ between replicas, or from the command line."""
    cache, server = config.cache, config.server
    # The replicas share the machine's cores.
    threads = config.threads or max(1, granted_cores() // config.replicas)
    own: Overrides = {
        "server.host": address.host,
        "server.http_port": address.http_port,
        "server.grpc_port": address.grpc_port,
        "server.tls_cert_file": None,
        "server.tls_key_file": None,
        "server.tls_client_ca_file": None,
        "server.tensorboard": _folder_of(server.tensorboard, index),
        "threads": threads,
    }
    if cache.name == TIERED:  # The config files of other caches have no such keys.
        own["cache.remote.url"] = cache.remote.url
        own["cache.disk.folder"] = _folder_of(cache.disk.folder, index)
    return own


def _override_texts(overrides: Overrides) -> list[str]:
    return [f"{key}={_quoted(value)}" for key, value in overrides.items()]


def _peers(addresses: Sequence[Address]) -> str:
    quoted = (_quoted(host_port(one.host, one.http_port)) for one in addresses)
    return f"server.peers=[{','.join(quoted)}]"


def _folder_of(folder: str | None, index: int) -> str | None:
    return None if folder is None else str(Path(folder).resolve() / f"replica-{index}")


def _quoted(value: str | int | None) -> str:
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    return "null" if value is None else str(value)


def _replica_address(config: ServeClusterConfig, index: int) -> Address:
    if config.replica_port is None:
        return Address(HERE, free_port(), free_port())
    first = config.replica_port + 2 * index
    if not 0 < first < 2**16 - 1:
        raise ConfigError(
            f"replica_port is {config.replica_port}; {config.replicas} replicas take two ports "
            "each from there on, and 65535 is the last port"
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


# --------------------------------------------------------------------------- readiness probes


def _is_serving(address: Address) -> bool:
    url = f"http://{host_port(address.host, address.http_port)}/v2/health/ready"
    try:
        with urllib.request.urlopen(url, timeout=PROBE_S):
            return _is_listening(address)
    except OSError:  # It does not listen yet, or answers 503.
        return False


def _is_listening(address: Address) -> bool:
    return all(is_listening(address.host, port) for port in (address.http_port, address.grpc_port))
