"""The server process: HTTP and gRPC over one service, from loading models to draining."""

import asyncio
import logging
import os
import resource
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import grpc
from aiohttp import web
from torch.utils.tensorboard import SummaryWriter

from torchrec_kvshare.config import ServeConfig, ServerConfig
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.serving.connections import BoundedSite
from torchrec_kvshare.serving.grpc_server import Gate, GrpcServer
from torchrec_kvshare.serving.http_server import http_app
from torchrec_kvshare.serving.metrics import ServerMetrics
from torchrec_kvshare.serving.models import (
    DEFAULT_NAME,
    DEFAULT_VERSION,
    Loader,
    Models,
    versions_in,
)
from torchrec_kvshare.serving.service import Service

logger = logging.getLogger(__name__)

BACKLOG = 4096  # connections that wait to be accepted
LAST_CALLS_S = 0.2  # for calls of clients that had connected before the port was closed
OTHER_FILES = 256  # of models, tiers, logs
TENSORBOARD_S = 10.0  # between two writes


class Ports(NamedTuple):
    """Ports of the two servers."""

    http: int
    grpc: int


async def serve(
    config: ServeConfig, loader: Loader, stop: asyncio.Event, show: Callable[[Ports], None]
) -> None:
    """Serve until told to stop, then answer what was accepted.

    Args:
        config: of the server and its models.
        loader: loads artifacts; closed at the end.
        stop: set by the caller.
        show: called with the ports once requests are answered.

    Raises:
        ConfigError: if the config cannot work.
        ArtifactError: if the artifact of the config is broken.
        MissingExtraError: if a tier's packages are not installed.
    """
    if (config.artifact is None) == (config.models is None):
        raise ConfigError(
            f"artifact is {config.artifact!r} and models is {config.models!r}; one is needed"
        )
    metrics = ServerMetrics(loader.metrics)
    server = config.server
    models = Models(loader.load, metrics, server.hot_users, server.hot_bytes)
    service = Service(models, metrics, config.server)
    try:
        async with (
            listening(service, config.server) as open_grpc,
            _background(config, models, metrics) as first_model,
        ):
            await _either(first_model, stop)
            if not stop.is_set():
                show(await open_grpc())
            await stop.wait()
            logger.info("draining")
    finally:
        service.close()
        loader.close()


@asynccontextmanager
async def listening(
    service: Service, config: ServerConfig
) -> AsyncIterator[Callable[[], Awaitable[Ports]]]:
    """Listen over HTTP at once, over gRPC when the yielded function is called; drain at the end.

    Over HTTP a proxy understands "not ready yet". Over gRPC it does not: a call would fail here
    instead of going to a replica that is ready.

    Raises:
        ConfigError: if a port is taken, or a secret or a certificate cannot be read.
    """
    _check_room(config)
    token = None if config.token_file is None else _read(config.token_file, "token_file").strip()
    if token == b"":
        raise ConfigError(f"server.token_file is {config.token_file!r}, which is empty")
    app = http_app(service, token)
    runner = web.AppRunner(
        app,
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=config.drain_s,
        auto_decompress=False,
        keepalive_timeout=config.idle_timeout_s,
    )
    await runner.setup()
    gate = Gate(token, config.max_calls, service.metrics)
    server = grpc.aio.server(interceptors=[gate], options=_grpc_options(config))
    grpc_server = GrpcServer(service)
    grpc_server.add_to(server)
    grpc_ports: list[int] = []

    async def open_grpc() -> Ports:
        grpc_ports.append(await _listen_grpc(server, config))
        return Ports(runner.addresses[0][1], grpc_ports[0])

    try:
        await _listen_http(runner, config, service.metrics)
        yield open_grpc
    finally:
        service.is_draining = True
        # A client that can no longer connect asks another replica.
        for port in grpc_ports:
            _shut_down(port, are_listening=True)
            await asyncio.sleep(LAST_CALLS_S)
        await asyncio.gather(runner.cleanup(), grpc_server.drain(config.drain_s))
        # grpc's stop() ends new calls as CANCELLED; a lost connection ends them as UNAVAILABLE.
        for port in grpc_ports:
            _shut_down(port, are_listening=False)
        await server.stop(None)


def _check_room(config: ServerConfig) -> None:
    """Check that the largest request fits in flight, and allow enough open files.

    Raises:
        ConfigError: if the limits contradict each other, or the system allows too few files.
    """
    if config.max_inflight_bytes < config.max_request_bytes:
        raise ConfigError(
            f"server.max_inflight_bytes is {config.max_inflight_bytes}, less than "
            f"server.max_request_bytes = {config.max_request_bytes}: such a request would never fit"
        )
    needed = 2 * config.max_connections + OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise ConfigError(
            f"server.max_connections is {config.max_connections}, for which {needed} open files "
            f"are needed; {hard} are allowed (ulimit -Hn)"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _grpc_options(config: ServerConfig) -> list[tuple[str, int]]:
    header_ms, idle_ms = round(config.header_timeout_s * 1e3), round(config.idle_timeout_s * 1e3)
    return [
        ("grpc.so_reuseport", 0),  # A port that is taken is an error.
        ("grpc.max_receive_message_length", config.max_request_bytes),
        ("grpc.max_allowed_incoming_connections", config.max_connections),
        # Per connection; more calls wait at the client.
        ("grpc.max_concurrent_streams", config.max_calls),
        # TLS and HTTP/2's first frames.
        ("grpc.server_handshake_timeout_ms", header_ms),
        ("grpc.max_connection_idle_ms", idle_ms),
        # A client that has gone, or reads nothing at all, does not answer a ping.
        ("grpc.keepalive_time_ms", idle_ms),
        ("grpc.keepalive_timeout_ms", header_ms),
    ]


async def _listen_http(runner: web.AppRunner, config: ServerConfig, metrics: ServerMetrics) -> None:
    try:
        site = BoundedSite(
            runner, config, metrics, ssl_context=_ssl_context(config), backlog=BACKLOG
        )
        await site.start()
    except OSError as error:
        raise ConfigError(f"server.http_port is {config.http_port}: {error}") from error


async def _listen_grpc(server: grpc.aio.Server, config: ServerConfig) -> int:
    address = f"[{config.host}]" if ":" in config.host else config.host
    address = f"{address}:{config.grpc_port}"
    try:
        if config.tls_cert_file is None:
            grpc_port = server.add_insecure_port(address)
        else:
            grpc_port = server.add_secure_port(address, _grpc_credentials(config))
    except RuntimeError as error:
        raise ConfigError(f"server.grpc_port is {config.grpc_port}: {error}") from error
    await server.start()
    return grpc_port


def _shut_down(port: int, *, are_listening: bool) -> None:
    """Shut down the listening sockets of a port of this process, or its open connections."""
    for link in Path("/proc/self/fd").iterdir():
        # Another thread may close one in the meantime.
        with suppress(OSError):
            if not os.readlink(link).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(link.name))) as opened:
                if opened.family not in (socket.AF_INET, socket.AF_INET6):
                    continue
                is_listener = opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if bool(is_listener) == are_listening and opened.getsockname()[1] == port:
                    opened.shutdown(socket.SHUT_RDWR)


def _ssl_context(config: ServerConfig) -> ssl.SSLContext | None:
    if (config.tls_cert_file is None) != (config.tls_key_file is None):
        raise ConfigError(
            f"server.tls_cert_file is {config.tls_cert_file!r} and server.tls_key_file is "
            f"{config.tls_key_file!r}; both or none are needed"
        )
    if config.tls_cert_file is None:
        if config.tls_client_ca_file is not None:
            raise ConfigError("server.tls_client_ca_file needs server.tls_cert_file")
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(config.tls_cert_file, config.tls_key_file)
        if config.tls_client_ca_file is not None:
            context.load_verify_locations(config.tls_client_ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
    except OSError as error:  # A superclass of ssl.SSLError.
        raise ConfigError(f"the files of server.tls_* cannot be used: {error}") from error
    return context


def _grpc_credentials(config: ServerConfig) -> grpc.ServerCredentials:
    assert config.tls_key_file is not None
    assert config.tls_cert_file is not None
    key = _read(config.tls_key_file, "tls_key_file")
    certificate = _read(config.tls_cert_file, "tls_cert_file")
    authority = None
    if config.tls_client_ca_file is not None:
        authority = _read(config.tls_client_ca_file, "tls_client_ca_file")
    return grpc.ssl_server_credentials([(key, certificate)], authority, authority is not None)


def _read(path: str, name: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"server.{name} is {path!r}, which cannot be read: {error}") from error


@asynccontextmanager
async def _background(
    config: ServeConfig, models: Models, metrics: ServerMetrics
) -> AsyncIterator["asyncio.Task[None]"]:
    """Run the tasks that load and watch models and write to TensorBoard; yield the first load."""
    first_model = asyncio.create_task(_load_first(config, models))
    tasks = [first_model]
    if config.models is not None:
        tasks.append(asyncio.create_task(_watch(Path(config.models), models, config.server.poll_s)))
    if config.server.tensorboard is not None:
        tasks.append(asyncio.create_task(_write_tensorboard(config.server.tensorboard, metrics)))
    try:
        yield first_model
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _load_first(config: ServeConfig, models: Models) -> None:
    if config.artifact is not None:
        folder = Path(config.artifact)
        await asyncio.to_thread(models.publish, DEFAULT_NAME, DEFAULT_VERSION, folder)
        return
    assert config.models is not None
    versions_in(Path(config.models))  # Raise at once if the folder cannot be read.
    while not models.all():
        await asyncio.sleep(0.01)


async def _watch(folder: Path, models: Models, poll_s: float) -> None:
    while True:
        try:
            await asyncio.to_thread(models.refresh, folder)
        except Exception:
            logger.exception("the folder of models could not be read")
        await asyncio.sleep(poll_s)


async def _write_tensorboard(folder: str, metrics: ServerMetrics) -> None:
    step = 0
    with SummaryWriter(folder) as writer:
        while True:
            await asyncio.sleep(TENSORBOARD_S)
            step += 1
            await asyncio.to_thread(metrics.write, writer, step)


async def _either(task: "asyncio.Task[None]", stop: asyncio.Event) -> None:
    """Wait for the task or the stop; raise what the task raised."""
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([task, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if task.done():
        task.result()
