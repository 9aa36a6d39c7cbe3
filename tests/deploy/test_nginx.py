"""nginx with the configuration that is written for it, in front of small real servers.

Each server is a process that runs this file, so that it can be killed; its answers name it.
"""

import asyncio
import json
import os
import pwd
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager, suppress
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import grpc
import pytest
from aiohttp import web
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import HealthServicer
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.cache.servers import Certificates, free_port, make_certificates, wait_until
from tests.processes import ROOT, ForkedPython
from torchrec_kvshare.cache.private import write_secret
from torchrec_kvshare.deploy.nginx import (
    Address,
    NginxLimits,
    Tls,
    nginx_command,
    nginx_config,
    token_config,
)
from torchrec_kvshare.errors import ConfigError

HERE = "127.0.0.1"
START_S = 20.0
NUM_REPLICAS = 3
USERS = [f"user {index}" for index in range(24)]
# A hung replica costs its users the timeout: it is short, so that the tests are.
LIMITS = NginxLimits(body_bytes=200_000, timeout_s=1.5, drain_s=5.0)
ME, DIE, STATUS, WAIT = "x-replica", "x-die", "x-status", "x-wait"
ANYONE = "anyone"  # every replica that reads it dies
TOKEN = b"s3cret.of $both +servers"

# ------------------------------------------------------------- a replica whose answers name it


class _Replica(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, me: str) -> None:
        self._me = me
        self._num_open = 0

    async def answer(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/open":
            return web.json_response(self._num_open)
        if request.query.get("stream") == "1":
            return await self._echo_lines(request)
        body = await request.read()
        await self._think(request.headers)
        named, _, status = request.headers.get(STATUS, "").rpartition(" ")
        answer = {"replica": self._me, "bytes": len(body)}
        return web.json_response(answer, status=int(status) if named == self._me else 200)

    async def _echo_lines(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        async for line in request.content:
            await response.write(b"event: scores\ndata: " + line + b"\n")
        await response.write(b"event: end\ndata: {}\n\n")
        return response

    async def ServerLive(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._think(dict(context.invocation_metadata()))
        # Trailing, in one piece with the answer: nginx cannot retry an answer that has begun.
        context.set_trailing_metadata(((ME, self._me),))
        return service_pb2.ServerLiveResponse(live=True)

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        await self._think(dict(context.invocation_metadata()))
        context.set_trailing_metadata(((ME, self._me),))
        return service_pb2.ModelInferResponse(id=str(sum(map(len, request.raw_input_contents))))

    async def ModelStreamInfer(self, requests: Any, context: Any) -> Any:  # noqa: N802
        async for request in requests:
            answer = service_pb2.ModelInferResponse(id=request.id)
            yield service_pb2.ModelStreamInferResponse(infer_response=answer)

    async def _think(self, told: Mapping[str, str]) -> None:
        if told.get(DIE) in (self._me, ANYONE):
            os.kill(os.getpid(), signal.SIGKILL)
        self._num_open += 1
        await asyncio.sleep(float(told.get(WAIT, 0)))
        self._num_open -= 1


async def _serve(me: str, http_port: int, grpc_port: int) -> None:
    """Serve until SIGTERM; then accept nothing more, and answer the open requests."""
    replica = _Replica(me)
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", replica.answer)
    runner = web.AppRunner(app, shutdown_timeout=5.0)
    await runner.setup()
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(replica, server)
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(), server)
    server.add_insecure_port(f"{HERE}:{grpc_port}")
    await server.start()
    await web.TCPSite(runner, HERE, http_port).start()
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    print("ready", flush=True)
    await ended.wait()
    _stop_listening(grpc_port)
    await asyncio.sleep(0.2)
    await asyncio.gather(server.stop(5.0), runner.cleanup())


def _stop_listening(port: int) -> None:
    """Refuse new connections; open ones stay."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as opened:
            is_listener = opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if is_listener and opened.getsockname()[1] == port:
                opened.shutdown(socket.SHUT_RDWR)


# -------------------------------------------------------------------------------- the cluster


class Cluster:
    """Replicas by name, and nginx in front of them."""

    def __init__(
        self,
        folder: Path,
        tls: Tls | None = None,
        limits: NginxLimits = LIMITS,
        token: bytes | None = None,
    ) -> None:
        self.front = Address(HERE, free_port(), free_port())
        self.addresses = [Address(HERE, free_port(), free_port()) for _ in range(NUM_REPLICAS)]
        self.names = [f"replica {index}" for index in range(NUM_REPLICAS)]
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.folder = folder
        token_file = None if token is None else "token.conf"
        text = nginx_config(
            self.front,
            self.addresses,
            limits,
            tls=tls,
            access_log="access.log",
            token_file=token_file,
        )
        (folder / "nginx.conf").write_text(text)
        if token is not None:
            write_secret(folder / "token.conf", token_config(token).encode())
        self.nginx: subprocess.Popen[bytes] | None = None

    def start(self, *names: str) -> None:
        """Start replicas, each in its own process; those that run already stay."""
        new = [name for name in names if name not in self.processes]
        for name in new:
            address = self.addresses[self.names.index(name)]
            ports = (str(address.http_port), str(address.grpc_port))
            self.processes[name] = ForkedPython(
                [sys.executable, "-W", "ignore", "-m", "tests.deploy.test_nginx", name, *ports],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
        for name in new:
            stdout = self.processes[name].stdout
            assert stdout is not None
            assert stdout.readline() == "ready\n"

    def stop(self, name: str, number: signal.Signals = signal.SIGKILL) -> int:
        process = self.processes.pop(name)
        process.send_signal(number)
        assert process.stdout is not None
        process.stdout.close()
        return process.wait(timeout=START_S)

    def start_nginx(self) -> None:
        self.nginx = run_nginx(self.folder)
        wait_until(self._listens, START_S)

    def _listens(self) -> bool:
        try:
            socket.create_connection((HERE, self.front.grpc_port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def num_open(self) -> int:
        """Requests that replicas have not answered yet."""
        num_open = 0
        for name in self.processes:
            port = self.addresses[self.names.index(name)].http_port
            with urllib.request.urlopen(f"http://{HERE}:{port}/open") as response:
                num_open += json.loads(response.read())
        return num_open

    def close(self) -> None:
        for name in list(self.processes):
            self.stop(name)
        if self.nginx is not None:
            self.nginx.terminate()
            self.nginx.wait(timeout=START_S)

    def logged(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in (self.folder / "access.log").read_text().splitlines()]


def run_nginx(folder: Path, *arguments: str) -> "subprocess.Popen[bytes]":
    folder.chmod(0o711)  # The folder above it is closed to nginx's workers.
    command = [*nginx_command(), *arguments]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with closing(Cluster(tmp_path_factory.mktemp("nginx"))) as cluster:
        cluster.start(*cluster.names)
        cluster.start_nginx()
        yield cluster


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    """A cluster whose replicas all run, and to all of which nginx sends requests."""
    yield running
    running.start(*running.names)
    wait_until(lambda: len(Counter(homes(running).values())) == NUM_REPLICAS, START_S)
    with closing(Grpc(running)) as calls:
        wait_until(lambda: len({calls.ask(user) for user in USERS}) == NUM_REPLICAS, START_S)


class Answer(NamedTuple):
    status: int
    body: Any
    headers: dict[str, str]


def ask(
    cluster: Cluster,
    user: str | None = None,
    path: str = "/v1/rank",
    body: bytes = b"{}",
    told: Mapping[str, str] | None = None,
) -> Answer:
    connection = HTTPConnection(HERE, cluster.front.http_port, timeout=START_S)
    with closing(connection):
        named = dict(told or {}) if user is None else {"X-User-Id": user, **(told or {})}
        connection.request("POST", path, body, named)
        with connection.getresponse() as response:
            return Answer(response.status, json.loads(response.read()), dict(response.headers))


def homes(cluster: Cluster) -> dict[str, str]:
    """The replica that answers each user; every request must be answered."""
    answers = {user: ask(cluster, user) for user in USERS}
    assert {answer.status for answer in answers.values()} == {200}
    return {user: answer.body["replica"] for user, answer in answers.items()}


class Grpc:
    """Calls over one connection to nginx."""

    def __init__(self, cluster: Cluster, credentials: Any = None) -> None:
        target = f"{HERE}:{cluster.front.grpc_port}"
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        if credentials is None:
            self.channel = grpc.insecure_channel(target, options)
        else:
            self.channel = grpc.secure_channel(target, credentials, options)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def ask(self, user: str | None = None, told: Mapping[str, str] | None = None) -> str:
        """Return the replica that answered."""
        named = list((told or {}).items())
        if user is not None:
            named.append(("x-user-id", user))
        request = service_pb2.ServerLiveRequest()
        answer, call = self.stub.ServerLive.with_call(request, metadata=named, timeout=START_S)
        assert answer.live
        return str(dict(call.trailing_metadata())[ME])

    def send(self, num_bytes: int, user: str) -> tuple[str, int]:
        """Return the replica that answered a call of that size, and the bytes that it got."""
        request = service_pb2.ModelInferRequest(raw_input_contents=[b"x" * num_bytes])
        named = [("x-user-id", user)]
        answer, call = self.stub.ModelInfer.with_call(request, metadata=named, timeout=START_S)
        return str(dict(call.trailing_metadata())[ME]), int(answer.id)

    def homes(self) -> dict[str, str]:
        return {user: self.ask(user) for user in USERS}

    def close(self) -> None:
        self.channel.close()


@pytest.fixture
def calls(cluster: Cluster) -> Iterator[Grpc]:
    with closing(Grpc(cluster)) as opened:
        yield opened


# --------------------------------------------------------------------------- what nginx accepts


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


def tls_of(certificates: Certificates) -> Tls:
    return Tls(str(certificates.cert), str(certificates.key))


@pytest.mark.parametrize("num_replicas", [1, 3])
@pytest.mark.parametrize("files", [0, 2, 3], ids=["plain", "tls", "mutual tls"])
@pytest.mark.parametrize("access_log", [None, "access.log"])
@pytest.mark.parametrize("token", [None, TOKEN, bytes(range(1, 255)), b"x" * 900])
@pytest.mark.parametrize("host", [HERE, "::1"])
def test_nginx_accepts_every_variant(
    tmp_path: Path,
    certificates: Certificates,
    num_replicas: int,
    files: int,
    access_log: str | None,
    token: bytes | None,
    host: str,
) -> None:
    replicas = [Address(host, 9000 + 2 * index, 9001 + 2 * index) for index in range(num_replicas)]
    known = (certificates.cert, certificates.key, certificates.ca)[:files]
    tls = Tls(*map(str, known)) if known else None
    token_file = None if token is None else "token.conf"
    text = nginx_config(
        Address(host, 8000, 8001),
        replicas,
        NginxLimits(),
        tls=tls,
        access_log=access_log,
        token_file=token_file,
    )
    (tmp_path / "nginx.conf").write_text(text)
    if token is not None:
        write_secret(tmp_path / "token.conf", token_config(token).encode())
    checked = run_nginx(tmp_path, "-t")
    assert checked.wait(timeout=START_S) == 0, (tmp_path / "nginx.log").read_text()
    # A warning would come with every start.
    assert "warn" not in (tmp_path / "nginx.log").read_text()
    assert text.count("max_fails=1") == 2 * num_replicas


def test_no_replica_is_refused() -> None:
    with pytest.raises(ConfigError, match="there are 0 replicas; nginx needs at least 1"):
        nginx_config(Address(HERE, 8000, 8001), [], NginxLimits())


@pytest.mark.parametrize("path", ["/a;b", '/a"b', "/$a", "/a\nb", "/{a"])
def test_a_path_that_nginx_would_read_as_more_is_refused(path: str) -> None:
    front, replicas = Address(HERE, 8000, 8001), [Address(HERE, 9000, 9001)]
    with pytest.raises(ConfigError, match="the path"):
        nginx_config(front, replicas, NginxLimits(), tls=Tls("/cert", path))
    with pytest.raises(ConfigError, match="the path"):
        nginx_config(front, replicas, NginxLimits(), access_log=path)
    with pytest.raises(ConfigError, match="the path"):
        nginx_config(front, replicas, NginxLimits(), token_file=path)


def test_a_percent_sign_in_a_path_stays() -> None:
    """Values could have been read as placeholders of the template."""
    front, replicas = Address(HERE, 8000, 8001), [Address(HERE, 9000, 9001)]
    tls = Tls("/cert%%", "/%d/key")
    text = nginx_config(front, replicas, NginxLimits(), tls=tls, token_file="/100%")
    assert 'ssl_certificate "/cert%%";' in text
    assert 'ssl_certificate_key "/%d/key";' in text
    assert 'include "/100%";' in text
    assert text.count("%") == 2 * 3 + 1


def test_a_token_that_is_too_long_for_nginx_is_refused() -> None:
    with pytest.raises(ConfigError, match="the token has 901 bytes; nginx reads at most 900"):
        token_config(b"x" * 901)


# ------------------------------------------------------------------------ which replica a user has


def test_a_user_stays_with_one_replica_and_all_have_users(cluster: Cluster) -> None:
    first = homes(cluster)
    assert set(first.values()) == set(cluster.names)
    assert homes(cluster) == first


def test_a_user_of_grpc_stays_with_one_replica_too(calls: Grpc, cluster: Cluster) -> None:
    first = calls.homes()
    assert set(first.values()) == set(cluster.names)
    assert calls.homes() == first


def test_requests_that_name_no_user_are_spread(cluster: Cluster, calls: Grpc) -> None:
    over_http = Counter(ask(cluster).body["replica"] for _ in range(60))
    over_grpc = Counter(calls.ask() for _ in range(60))
    # 20 of 60 each on average; fewer than 4 at one of them: once in 1e6 runs.
    assert set(over_http) == set(over_grpc) == set(cluster.names)
    assert min([*over_http.values(), *over_grpc.values()]) >= 4


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_dead_replica_moves_its_own_users_alone(
    cluster: Cluster, calls: Grpc, protocol: str
) -> None:
    ask_all = calls.homes if protocol == "grpc" else lambda: homes(cluster)
    before = ask_all()
    dead = cluster.names[1]
    cluster.stop(dead)
    moved = ask_all()
    assert dead not in moved.values()
    stayed = {user: home for user, home in before.items() if home != dead}
    assert {user: moved[user] for user in stayed} == stayed
    cluster.start(dead)
    wait_until(lambda: ask_all() == before, START_S)


@pytest.mark.parametrize("size", [10, 150_000])
def test_a_request_whose_replica_dies_over_it_is_answered_by_another(
    cluster: Cluster, size: int
) -> None:
    user, home = next(iter(homes(cluster).items()))
    answer = ask(cluster, user, body=b"x" * size, told={DIE: home})
    assert (answer.status, answer.body["bytes"]) == (200, size)
    assert answer.body["replica"] != home
    assert cluster.processes[home].wait(timeout=START_S) == -signal.SIGKILL
    cluster.stop(home)


def test_a_call_whose_replica_dies_over_it_is_answered_by_another(
    cluster: Cluster, calls: Grpc
) -> None:
    user, home = next(iter(calls.homes().items()))
    assert calls.ask(user, told={DIE: home}) != home
    assert cluster.processes[home].wait(timeout=START_S) == -signal.SIGKILL
    cluster.stop(home)


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_request_that_kills_whoever_reads_it_visits_two_replicas(
    cluster: Cluster, calls: Grpc, protocol: str
) -> None:
    """It killed all three: nginx counts no try that fails over a kept-alive connection."""
    for user in USERS:  # Connections that nginx keeps alive are open now.
        ask(cluster, user)
    poison = {DIE: ANYONE}
    if protocol == "http":
        answer = ask(cluster, USERS[0], told=poison)
        assert (answer.status, answer.body["error"]["type"]) == (503, "UnavailableError")
    else:
        with pytest.raises(grpc.RpcError) as error:
            calls.ask(USERS[0], told=poison)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    died = [name for name, process in cluster.processes.items() if dies(process)]
    for name in died:
        cluster.stop(name)
    assert len(died) == 2
    # The replica that is left answers the others.
    [left] = cluster.processes
    wait_until(lambda: ask(cluster, USERS[0]).body.get("replica") == left, START_S)


def dies(process: "subprocess.Popen[str]") -> bool:
    """Whether it was killed, now or within a second."""
    try:
        return process.wait(timeout=1.0) == -signal.SIGKILL
    except subprocess.TimeoutExpired:
        return False


def test_a_replica_that_hangs_costs_its_users_the_timeout(cluster: Cluster, calls: Grpc) -> None:
    user, home = next(iter(homes(cluster).items()))
    process = cluster.processes[home]
    process.send_signal(signal.SIGSTOP)
    try:
        assert ask(cluster, user).body["replica"] != home
        # During the pause nginx does not try it.
        others = {calls.ask(other) for other in USERS}
        assert home not in others
    finally:
        process.send_signal(signal.SIGCONT)


def test_a_call_of_which_a_hung_replica_took_a_part_goes_whole_to_the_next(
    cluster: Cluster, calls: Grpc
) -> None:
    """With grpc_next_upstream the next replica got the rest of the call, and all seemed to fail."""
    user, home = next(iter(calls.homes().items()))
    process = cluster.processes[home]
    process.send_signal(signal.SIGSTOP)
    try:
        # The stopped replica takes the 64 KiB of the protocol's window and no more.
        name, num_bytes = calls.send(150_000, user)
        assert (name == home, num_bytes) == (False, 150_000)
    finally:
        process.send_signal(signal.SIGCONT)


def test_a_replica_that_says_503_is_passed_over(cluster: Cluster) -> None:
    user, home = next(iter(homes(cluster).items()))
    answer = ask(cluster, user, told={STATUS: f"{home} 503"})
    assert answer.status == 200
    assert answer.body["replica"] != home


@pytest.mark.parametrize("status", [400, 404, 429, 500, 504])
def test_what_a_replica_decides_is_not_asked_of_another(cluster: Cluster, status: int) -> None:
    user, home = next(iter(homes(cluster).items()))
    answer = ask(cluster, user, told={STATUS: f"{home} {status}"})
    assert (answer.status, answer.body["replica"]) == (status, home)


def test_a_replica_that_names_one_that_did_not_forget_is_not_taken_for_dead(
    cluster: Cluster,
) -> None:
    user, home = next(iter(homes(cluster).items()))
    answer = ask(cluster, user, "/v1/forget", told={STATUS: f"{home} 503"})
    assert (answer.status, answer.body["replica"]) == (503, home)
    assert ask(cluster, user).body["replica"] == home


def test_a_replica_that_is_told_to_end_takes_no_answer_with_it(cluster: Cluster) -> None:
    name = cluster.names[2]
    with ExitStack() as stack:
        clients = [stack.enter_context(closing(Grpc(cluster))) for _ in range(4)]
        pending = [
            client.stub.ServerLive.future(
                service_pb2.ServerLiveRequest(),
                metadata=[("x-user-id", user), (WAIT, "0.5")],
                timeout=START_S,
            )
            for client in clients
            for user in USERS[:12]
        ]
        cluster.processes[name].terminate()
        for _ in range(20):
            assert homes(cluster)
            assert clients[0].homes()
        assert all(call.result().live for call in pending)
    assert cluster.stop(name, signal.SIGTERM) == 0


# -------------------------------------------------------------------------------------- streams


def test_lines_and_events_pass_while_both_sides_still_speak(cluster: Cluster) -> None:
    connection = HTTPConnection(HERE, cluster.front.http_port, timeout=START_S)
    with closing(connection):
        connection.putrequest("POST", "/v1/rank?model=a&stream=1")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        response = None
        for group in range(3):
            line = f'{{"group": {group}}}\n'.encode()
            connection.send(b"%x\r\n%s\r\n" % (len(line), line))
            response = response or connection.getresponse()
            assert response.getheader("Content-Type") == "text/event-stream"
            assert response.readline() == b"event: scores\n"
            assert response.readline() == b"data: " + line
            assert response.readline() == b"\n"
        connection.send(b"0\r\n\r\n")
        assert response is not None
        assert response.read() == b"event: end\ndata: {}\n\n"


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_stream_whose_replica_is_gone_goes_to_another(
    cluster: Cluster, calls: Grpc, protocol: str
) -> None:
    before = calls.homes() if protocol == "grpc" else homes(cluster)
    user, home = next(iter(before.items()))
    cluster.stop(home)
    if protocol == "http":
        with closing(HTTPConnection(HERE, cluster.front.http_port, timeout=START_S)) as connection:
            connection.request("POST", "/v1/rank?stream=1", b"{}\n", {"X-User-Id": user})
            with connection.getresponse() as response:
                assert response.read().startswith(b"event: scores\ndata: {}\n")
    else:
        requests = iter([service_pb2.ModelInferRequest(id="a")])
        answers = calls.stub.ModelStreamInfer(
            requests, metadata=[("x-user-id", user)], timeout=START_S
        )
        assert [answer.infer_response.id for answer in answers] == ["a"]


def test_a_stream_cannot_be_asked_for_by_its_inner_name(cluster: Cluster) -> None:
    connection = HTTPConnection(HERE, cluster.front.http_port, timeout=START_S)
    with closing(connection):
        connection.request("POST", "/v1/rank/stream")
        with connection.getresponse() as response:
            assert response.status == 404


def test_messages_of_grpc_pass_while_both_sides_still_speak(calls: Grpc) -> None:
    requests: SimpleQueue[Any] = SimpleQueue()
    answers = calls.stub.ModelStreamInfer(iter(requests.get, None), timeout=START_S)
    for group in range(3):
        requests.put(service_pb2.ModelInferRequest(id=f"group {group}"))
        assert next(answers).infer_response.id == f"group {group}"
    requests.put(None)
    assert list(answers) == []


# ----------------------------------------------------------------------- what nginx says itself


@pytest.mark.parametrize("path", ["/", "/metrics", "/v1/state"])
def test_what_one_replica_tells_of_itself_is_not_told_by_all(cluster: Cluster, path: str) -> None:
    answer = ask(cluster, path=path)
    assert answer.status == 404
    assert answer.body["error"]["message"] == "each replica tells of itself: ask it directly"
    assert answer.headers["Server"] == "nginx"  # And not which version.


def test_too_large_a_request_is_an_error_in_the_protocol_s_own_form(
    cluster: Cluster, calls: Grpc
) -> None:
    answer = ask(cluster, body=b"x" * (LIMITS.body_bytes + 1))
    assert answer.status == 413
    message = f"server.max_request_bytes is {LIMITS.body_bytes}"
    assert answer.body["error"] == {"type": "RequestError", "message": message}
    request = service_pb2.ModelInferRequest(raw_input_contents=[b"x" * LIMITS.body_bytes])
    with pytest.raises(grpc.RpcError) as error:
        calls.stub.ModelInfer(request, timeout=START_S)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.value.details() == message


def test_without_any_replica_both_protocols_say_unavailable(tmp_path: Path) -> None:
    with closing(Cluster(tmp_path)) as cluster, ExitStack() as stack:
        cluster.start_nginx()
        answer = ask(cluster, USERS[0])
        assert (answer.status, answer.body["error"]["type"]) == (503, "UnavailableError")
        assert answer.body["error"]["message"] == "no replica has answered"
        calls = stack.enter_context(closing(Grpc(cluster)))
        with pytest.raises(grpc.RpcError) as error:
            calls.ask(USERS[0])
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE


def test_the_log_says_who_was_asked_and_never_who_asked(cluster: Cluster) -> None:
    user, home = next(iter(homes(cluster).items()))
    num_before = len(cluster.logged())
    ask(cluster, user, told={STATUS: f"{home} 503"})
    # nginx writes the log after the answer.
    wait_until(lambda: len(cluster.logged()) > num_before, START_S)
    line = cluster.logged()[-1]
    assert (line["status"], line["replica_status"]) == ("200", "503, 200")
    address = cluster.addresses[cluster.names.index(home)]
    assert line["replicas"].startswith(f"{HERE}:{address.http_port}, ")
    assert not any(user in value for value in line.values())


def test_tls_ends_at_nginx_for_both_protocols(tmp_path: Path, certificates: Certificates) -> None:
    with closing(Cluster(tmp_path, tls_of(certificates))) as cluster, ExitStack() as stack:
        cluster.start(*cluster.names[:2])
        cluster.start_nginx()
        context = ssl.create_default_context(cafile=str(certificates.ca))
        connection = HTTPSConnection(HERE, cluster.front.http_port, context=context)
        stack.enter_context(closing(connection))
        connection.request("POST", "/v1/rank", b"{}")
        with connection.getresponse() as response:
            assert json.loads(response.read())["replica"] in cluster.names
        credentials = grpc.ssl_channel_credentials(certificates.ca.read_bytes())
        calls = stack.enter_context(closing(Grpc(cluster, credentials)))
        assert calls.ask(USERS[0]) in cluster.names


def test_nginx_that_is_told_to_quit_answers_what_it_has(tmp_path: Path) -> None:
    with closing(Cluster(tmp_path)) as cluster, ExitStack() as stack:
        cluster.start(*cluster.names[:2])
        cluster.start_nginx()
        assert cluster.nginx is not None
        calls = stack.enter_context(closing(Grpc(cluster)))
        assert calls.ask(USERS[0])
        request = service_pb2.ServerLiveRequest()
        pending = calls.stub.ServerLive.future(request, metadata=[(WAIT, "1")], timeout=START_S)
        connection = HTTPConnection(HERE, cluster.front.http_port, timeout=START_S)
        stack.enter_context(closing(connection))
        connection.request("POST", "/v1/rank", b"{}", {WAIT: "1"})
        wait_until(lambda: cluster.num_open() == 2, START_S)
        cluster.nginx.send_signal(signal.SIGQUIT)
        with connection.getresponse() as response:
            assert response.status == 200
        assert pending.result().live
        assert cluster.nginx.wait(timeout=START_S) == 0


# -------------------------------------------------------------------------- limits of a client


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster whose callers need a token, and may send large bodies."""
    limits = LIMITS._replace(body_bytes=64 * 2**20, timeout_s=START_S)
    folder = tmp_path_factory.mktemp("guarded")
    with closing(Cluster(folder, limits=limits, token=TOKEN)) as cluster:
        cluster.start(*cluster.names[:2])
        cluster.start_nginx()
        yield cluster


BEARER = {"Authorization": f"Bearer {TOKEN.decode()}"}
WRONG = ["", "Bearer", f"Bearer {TOKEN.decode().upper()}", f"Bearer {TOKEN.decode()}x", "Bearer ."]


def files_of_bodies(cluster: Cluster) -> list[Path]:
    return [*(cluster.folder / "nginx_temp").rglob("*")]


def open_bodies(cluster: Cluster) -> int:
    """Bodies that nginx's workers have in files; nginx unlinks a file as soon as it opens it."""
    num_open = 0
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            num_open += os.readlink(link).startswith(f"{cluster.folder}/nginx_temp/")
    return num_open


@pytest.mark.parametrize("said", WRONG)
def test_without_the_token_no_byte_of_a_body_is_stored(guarded: Cluster, said: str) -> None:
    """nginx stored uploads before the replica asked for the token."""
    with closing(HTTPConnection(HERE, guarded.front.http_port, timeout=START_S)) as connection:
        connection.putrequest("POST", "/v1/rank")
        connection.putheader("Content-Length", str(32 * 2**20))
        if said:
            connection.putheader("Authorization", said)
        connection.endheaders()
        # nginx answers before the body, and drops what is sent nevertheless.
        with connection.getresponse() as response:
            assert response.status == 401
            assert response.headers["WWW-Authenticate"] == "Bearer"
            told = json.loads(response.read())["error"]
            assert told == {"type": "RequestError", "message": "a bearer token is needed"}
        with suppress(OSError):
            connection.send(b"x" * (8 * 2**20))
        assert open_bodies(guarded) == 0
    assert files_of_bodies(guarded) == []


def test_with_the_token_a_body_is_stored_until_it_has_come(guarded: Cluster) -> None:
    body = b"x" * (2 * 2**20)
    with closing(HTTPConnection(HERE, guarded.front.http_port, timeout=START_S)) as connection:
        connection.putrequest("POST", "/v1/rank")
        connection.putheader("Content-Length", str(2 * len(body)))
        connection.putheader("Authorization", BEARER["Authorization"])
        connection.endheaders()
        connection.send(body)
        wait_until(lambda: open_bodies(guarded) == 1, START_S)
        connection.send(body)
        with connection.getresponse() as response:
            assert json.loads(response.read())["bytes"] == 2 * len(body)
    wait_until(lambda: open_bodies(guarded) == 0, START_S)
    assert ask(guarded, USERS[0], told=BEARER).status == 200


def test_a_body_that_is_too_large_does_not_get_past_the_token_either(guarded: Cluster) -> None:
    assert ask(guarded, body=b"x" * (65 * 2**20)).status == 401
    assert ask(guarded, body=b"x" * (65 * 2**20), told=BEARER).status == 413


@pytest.mark.parametrize("path", ["/v1/rank?stream=1", "/v2/models/kvshare/infer", "/v1/state"])
def test_every_path_needs_the_token(guarded: Cluster, path: str) -> None:
    assert ask(guarded, path=path, told={"X-Other": TOKEN.decode()}).status == 401


def test_health_needs_no_token_and_stores_nothing(guarded: Cluster) -> None:
    assert ask(guarded, path="/v2/health/live", body=b"").status == 200
    answer = ask(guarded, path="/v2/health/live", body=b"x" * 100)
    assert answer.status == 413
    assert answer.body["error"]["message"] == "a question about health has no body"
    # A path that leads out of there is no health check.
    assert ask(guarded, path="/v2/health/../../v1/rank").status == 401


def test_a_call_without_the_token_is_refused_in_grpc_s_own_words(guarded: Cluster) -> None:
    with closing(Grpc(guarded)) as calls:
        large = service_pb2.ModelInferRequest(raw_input_contents=[b"x" * (8 * 2**20)])
        for said in WRONG:
            named = [("authorization", said)]
            with pytest.raises(grpc.RpcError) as error:
                calls.stub.ModelInfer(large, metadata=named, timeout=START_S)
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert error.value.details() == "a bearer token is needed"
            with pytest.raises(grpc.RpcError) as error:
                [*calls.stub.ModelStreamInfer(iter([large]), metadata=named, timeout=START_S)]
            assert error.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert open_bodies(guarded) == 0
        assert calls.ask(USERS[0], {"authorization": BEARER["Authorization"]})
        health = health_pb2_grpc.HealthStub(calls.channel)
        question = health_pb2.HealthCheckRequest()
        serving = health_pb2.HealthCheckResponse.SERVING
        assert health.Check(question, timeout=START_S).status == serving
        watched = health.Watch(question, timeout=START_S)
        assert next(watched).status == serving
        watched.cancel()


def test_the_token_stands_in_no_file_that_others_can_read_and_in_no_log(guarded: Cluster) -> None:
    ask(guarded, USERS[0], told=BEARER)
    spelt = token_config(TOKEN).split('"')[1].encode()
    holders = []
    for file in guarded.folder.iterdir():
        if file.is_file() and any(one in file.read_bytes() for one in (TOKEN, spelt)):
            holders.append((file.name, file.stat().st_mode & 0o777))
    assert holders == [("token.conf", 0o600)]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster that takes four requests in flight, three of them from one address."""
    limits = LIMITS._replace(timeout_s=START_S, requests=4, client_requests=3)
    with closing(Cluster(tmp_path_factory.mktemp("narrow"), limits=limits)) as cluster:
        cluster.start(*cluster.names[:2])
        cluster.start_nginx()
        yield cluster


def open_request(cluster: Cluster, source: str) -> tuple[socket.socket, str]:
    """Send a request's header from an address of this machine; return what nginx answers to it.

    nginx answers 100 once the request is in flight.
    """
    address = (HERE, cluster.front.http_port)
    connection = socket.create_connection(address, START_S, source_address=(source, 0))
    head = "POST /v1/rank HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\nExpect: 100-continue\r\n\r\n"
    connection.sendall(head.encode())
    return connection, connection.recv(4096).decode()


@contextmanager
def in_flight(cluster: Cluster, num: int, source: str) -> Iterator[None]:
    """Hold this many requests of an address open, once nginx has finished the earlier ones."""
    with ExitStack() as stack:

        def is_opened() -> bool:
            connection, said = open_request(cluster, source)
            stack.enter_context(closing(connection))
            return said.startswith("HTTP/1.1 100 ")

        for _ in range(num):
            wait_until(is_opened, START_S)
        yield


def status_from(cluster: Cluster, source: str) -> int:
    connection = HTTPConnection(
        HERE, cluster.front.http_port, timeout=START_S, source_address=(source, 0)
    )
    with closing(connection):
        connection.request("POST", "/v1/rank", b"{}")
        with connection.getresponse() as response:
            return response.status


def await_answer(cluster: Cluster, source: str) -> None:
    """Wait for a request to succeed: nginx finishes earlier ones only after their answers."""
    wait_until(lambda: status_from(cluster, source) == 200, START_S)


def test_one_address_has_its_share_of_requests_in_flight_and_others_go_on(narrow: Cluster) -> None:
    with in_flight(narrow, 3, "127.0.0.2"):
        connection, said = open_request(narrow, "127.0.0.2")
        with closing(connection):  # nginx does not ask for its body.
            head, _, body = said.partition("\r\n\r\n")
        assert head.startswith("HTTP/1.1 429 ")
        told = json.loads(body)["error"]
        message = "4 requests are in flight, or 3 of this address: no more are taken"
        assert told == {"type": "OverloadError", "message": message}
        for _ in range(5):
            await_answer(narrow, "127.0.0.3")
    await_answer(narrow, "127.0.0.2")


def test_all_together_have_no_more_requests_in_flight_than_are_allowed(narrow: Cluster) -> None:
    with in_flight(narrow, 2, "127.0.0.2"), in_flight(narrow, 2, "127.0.0.3"):
        assert status_from(narrow, "127.0.0.4") == 429
        # Health checks are still answered.
        assert ask(narrow, path="/v2/health/live", body=b"").status == 200
        with closing(Grpc(narrow)) as calls:
            with pytest.raises(grpc.RpcError) as error:
                calls.ask(USERS[0])
            assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "4 requests are in flight" in error.value.details()
    await_answer(narrow, "127.0.0.4")


def test_connections_that_say_nothing_keep_nobody_out(narrow: Cluster) -> None:
    with ExitStack() as stack:
        for _ in range(50):
            address = (HERE, narrow.front.http_port)
            silent = stack.enter_context(socket.create_connection(address, START_S))
            silent.sendall(b"POST /v1/rank HTTP/1.1\r\nHost:")
        for _ in range(5):
            await_answer(narrow, HERE)


def test_a_message_of_the_largest_size_that_a_replica_takes_passes(cluster: Cluster) -> None:
    """With gRPC's prefix of five bytes it was too large for nginx."""
    with closing(Grpc(cluster)) as calls:
        head = service_pb2.ModelInferRequest(raw_input_contents=[b"x" * 100_000]).ByteSize()
        num_bytes = LIMITS.body_bytes - (head - 100_000)
        assert calls.send(num_bytes, USERS[0])[1] == num_bytes
        with pytest.raises(grpc.RpcError) as error:
            calls.send(num_bytes + 1, USERS[0])
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("names", [["www-data"], ["nginx", "nobody"], []])
def test_root_s_nginx_works_as_the_first_user_that_there_is(
    monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    users = {name: pwd.getpwuid(os.getuid()) for name in names}
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(pwd, "getpwnam", users.__getitem__)
    if not names:
        with pytest.raises(ConfigError, match="none of the users"):
            nginx_command()
        return
    assert nginx_command()[-2] == "-g"
    assert nginx_command()[-1].startswith(f"user {names[0]} ")


def test_an_ordinary_user_s_nginx_stays_that_user_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert "-g" not in nginx_command()


@pytest.mark.skipif(os.geteuid() != 0, reason="an ordinary user's nginx has one user")
def test_workers_of_root_s_nginx_are_not_root_and_cannot_write_to_its_folder(
    guarded: Cluster,
) -> None:
    """They were root; and a worker that can write there could make root write elsewhere."""
    assert guarded.nginx is not None
    pid = guarded.nginx.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    assert children
    # A worker that has just been forked is still its master.
    wait_until(lambda: all("0" not in ids_of(child) for child in children), START_S)
    folder = guarded.folder.stat()
    assert (folder.st_uid, folder.st_mode & 0o022) == (0, 0)
    # The folder above may be closed to them: a body was stored in test_with_the_token.
    assert guarded.folder.parent.stat().st_mode & 0o077 == 0


def ids_of(process: str) -> set[str]:
    """All ids of its user and its groups: real, effective, saved and of files."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    found = [line.split()[1:] for line in lines if line.startswith(("Uid:", "Gid:", "Groups:"))]
    return {one for ids in found for one in ids}


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
