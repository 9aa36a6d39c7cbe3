"""nginx with the configuration that is written for it, in front of small real servers.

The servers are processes of this file, so that they can be killed: they say who answered.
"""

import asyncio
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, suppress
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import grpc
import pytest
from aiohttp import web
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.cache.servers import Certificates, free_port, make_certificates, wait_until
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.serving.nginx import Address, Limits, Tls, nginx_config

ROOT = Path(__file__).parents[2]
HERE = "127.0.0.1"
START_S = 20.0
NUM_REPLICAS = 3
USERS = [f"user {place}" for place in range(24)]
# A hung replica costs its users the timeout; here nobody wants to wait for it.
LIMITS = Limits(body_bytes=200_000, timeout_s=1.5, drain_s=5.0)
ME, DIE, STATUS, WAIT = "x-replica", "x-die", "x-status", "x-wait"

# ---------------------------------------------------------------- a replica that says who it is


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
        # In one piece with the answer: what has begun cannot be asked of another.
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
        if told.get(DIE) == self._me:
            os.kill(os.getpid(), signal.SIGKILL)
        self._num_open += 1
        await asyncio.sleep(float(told.get(WAIT, 0)))
        self._num_open -= 1


async def _serve(me: str, http_port: int, grpc_port: int) -> None:
    """Until SIGTERM; then it takes nothing more, and answers what it has."""
    replica = _Replica(me)
    app = web.Application(client_max_size=2**30)
    app.router.add_route("*", "/{path:.*}", replica.answer)
    runner = web.AppRunner(app, shutdown_timeout=5.0)
    await runner.setup()
    server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(replica, server)
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
    """Refuse connections; those that are open stay."""
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as opened:
            is_listener = opened.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            if is_listener and opened.getsockname()[1] == port:
                opened.shutdown(socket.SHUT_RDWR)


# ------------------------------------------------------------------------------ who runs them


class Cluster:
    """Replicas by name, and nginx in front of them."""

    def __init__(self, folder: Path, tls: Tls | None = None) -> None:
        self.front = Address(HERE, free_port(), free_port())
        self.addresses = [Address(HERE, free_port(), free_port()) for _ in range(NUM_REPLICAS)]
        self.names = [f"replica {place}" for place in range(NUM_REPLICAS)]
        self.processes: dict[str, subprocess.Popen[str]] = {}
        self.folder = folder
        text = nginx_config(self.front, self.addresses, LIMITS, tls, "access.log")
        (folder / "nginx.conf").write_text(text)
        self.nginx: subprocess.Popen[bytes] | None = None

    def start(self, *names: str) -> None:
        """Replicas, from a process of their own each; those that run already stay."""
        new = [name for name in names if name not in self.processes]
        for name in new:
            address = self.addresses[self.names.index(name)]
            ports = (str(address.http_port), str(address.grpc_port))
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-m", "tests.serving.test_nginx", name, *ports],
                cwd=ROOT,
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
    # As root nginx would give its work to a user who cannot enter the folder.
    user = ["-g", "user root;"] if os.geteuid() == 0 else []
    command = ["nginx", "-p", str(folder), "-c", "nginx.conf", "-e", "nginx.log", *user]
    return subprocess.Popen([*command, *arguments], stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with closing(Cluster(tmp_path_factory.mktemp("nginx"))) as cluster:
        cluster.start(*cluster.names)
        cluster.start_nginx()
        yield cluster


@pytest.fixture
def cluster(running: Cluster) -> Iterator[Cluster]:
    """All replicas run, and nginx knows it."""
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
    """Who answers each user; fails the test if somebody is not answered."""
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
        """Who has answered."""
        named = list((told or {}).items())
        if user is not None:
            named.append(("x-user-id", user))
        request = service_pb2.ServerLiveRequest()
        answer, call = self.stub.ServerLive.with_call(request, metadata=named, timeout=START_S)
        assert answer.live
        return str(dict(call.trailing_metadata())[ME])

    def send(self, num_bytes: int, user: str) -> tuple[str, int]:
        """Who has answered a call of that size, and how many bytes came there."""
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
@pytest.mark.parametrize("host", [HERE, "::1"])
def test_nginx_accepts_every_variant(
    tmp_path: Path,
    certificates: Certificates,
    num_replicas: int,
    files: int,
    access_log: str | None,
    host: str,
) -> None:
    replicas = [Address(host, 9000 + 2 * place, 9001 + 2 * place) for place in range(num_replicas)]
    known = (certificates.cert, certificates.key, certificates.ca)[:files]
    tls = Tls(*map(str, known)) if known else None
    text = nginx_config(Address(host, 8000, 8001), replicas, Limits(), tls, access_log)
    (tmp_path / "nginx.conf").write_text(text)
    checked = run_nginx(tmp_path, "-t")
    assert checked.wait(timeout=START_S) == 0, (tmp_path / "nginx.log").read_text()
    # A warning would be one of every start.
    assert "warn" not in (tmp_path / "nginx.log").read_text()
    assert text.count("max_fails=1") == 2 * num_replicas


def test_no_replica_is_refused() -> None:
    with pytest.raises(ConfigError, match="there are 0 replicas; nginx needs at least 1"):
        nginx_config(Address(HERE, 8000, 8001), [], Limits())


@pytest.mark.parametrize("path", ["/a;b", '/a"b', "/$a", "/a\nb", "/{a"])
def test_a_path_that_nginx_would_read_as_more_is_refused(path: str) -> None:
    front, replicas = Address(HERE, 8000, 8001), [Address(HERE, 9000, 9001)]
    with pytest.raises(ConfigError, match="the path"):
        nginx_config(front, replicas, Limits(), Tls("/cert", path))
    with pytest.raises(ConfigError, match="the path"):
        nginx_config(front, replicas, Limits(), None, path)


# ------------------------------------------------------------------------------ whose user it is


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


@pytest.mark.parametrize("face", ["http", "grpc"])
def test_a_dead_replica_moves_its_own_users_alone(cluster: Cluster, calls: Grpc, face: str) -> None:
    ask_all = calls.homes if face == "grpc" else lambda: homes(cluster)
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


def test_a_replica_that_hangs_costs_its_users_the_timeout(cluster: Cluster, calls: Grpc) -> None:
    user, home = next(iter(homes(cluster).items()))
    process = cluster.processes[home]
    process.send_signal(signal.SIGSTOP)
    try:
        assert ask(cluster, user).body["replica"] != home
        # Still within the pause, in which it is not even tried.
        others = {calls.ask(other) for other in USERS}
        assert home not in others
    finally:
        process.send_signal(signal.SIGCONT)


def test_a_call_of_which_a_hung_replica_took_a_part_goes_whole_to_the_next(
    cluster: Cluster, calls: Grpc
) -> None:
    """With grpc_next_upstream the next one got the rest of it, and all replicas seemed to fail."""
    user, home = next(iter(calls.homes().items()))
    process = cluster.processes[home]
    process.send_signal(signal.SIGSTOP)
    try:
        # It takes no more than the 64 KiB that the protocol lets it before it must answer.
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
        for place in range(3):
            line = f'{{"group": {place}}}\n'.encode()
            connection.send(b"%x\r\n%s\r\n" % (len(line), line))
            response = response or connection.getresponse()
            assert response.getheader("Content-Type") == "text/event-stream"
            assert response.readline() == b"event: scores\n"
            assert response.readline() == b"data: " + line
            assert response.readline() == b"\n"
        connection.send(b"0\r\n\r\n")
        assert response is not None
        assert response.read() == b"event: end\ndata: {}\n\n"


@pytest.mark.parametrize("face", ["http", "grpc"])
def test_a_stream_whose_replica_is_gone_goes_to_another(
    cluster: Cluster, calls: Grpc, face: str
) -> None:
    before = calls.homes() if face == "grpc" else homes(cluster)
    user, home = next(iter(before.items()))
    cluster.stop(home)
    if face == "http":
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
    for place in range(3):
        requests.put(service_pb2.ModelInferRequest(id=f"group {place}"))
        assert next(answers).infer_response.id == f"group {place}"
    requests.put(None)
    assert list(answers) == []


# ----------------------------------------------------------------------- what nginx says itself


@pytest.mark.parametrize("path", ["/", "/metrics", "/v1/state"])
def test_what_one_replica_tells_of_itself_is_not_told_by_all(cluster: Cluster, path: str) -> None:
    answer = ask(cluster, path=path)
    assert answer.status == 404
    assert answer.body["error"]["message"] == "each replica tells of itself: ask it directly"
    assert answer.headers["Server"] == "nginx"  # And not which version.


def test_too_large_a_request_is_said_in_the_face_s_own_words(cluster: Cluster, calls: Grpc) -> None:
    answer = ask(cluster, body=b"x" * (LIMITS.body_bytes + 1))
    assert answer.status == 413
    message = f"the limit is {LIMITS.body_bytes} bytes"
    assert answer.body["error"] == {"type": "RequestError", "message": message}
    request = service_pb2.ModelInferRequest(raw_input_contents=[b"x" * LIMITS.body_bytes])
    with pytest.raises(grpc.RpcError) as error:
        calls.stub.ModelInfer(request, timeout=START_S)
    assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.value.details() == message


def test_without_any_replica_both_faces_say_unavailable(tmp_path: Path) -> None:
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
    ask(cluster, user, told={STATUS: f"{home} 503"})
    line = cluster.logged()[-1]
    assert (line["status"], line["replica_status"]) == ("200", "503, 200")
    address = cluster.addresses[cluster.names.index(home)]
    assert line["replicas"].startswith(f"{HERE}:{address.http_port}, ")
    assert not any(user in value for value in line.values())


def test_tls_ends_at_nginx_on_both_faces(tmp_path: Path, certificates: Certificates) -> None:
    with closing(Cluster(tmp_path, tls_of(certificates))) as cluster, ExitStack() as stack:
        cluster.start(cluster.names[0])
        cluster.start_nginx()
        context = ssl.create_default_context(cafile=str(certificates.ca))
        connection = HTTPSConnection(HERE, cluster.front.http_port, context=context)
        stack.enter_context(closing(connection))
        connection.request("POST", "/v1/rank", b"{}")
        with connection.getresponse() as response:
            assert json.loads(response.read())["replica"] == cluster.names[0]
        credentials = grpc.ssl_channel_credentials(certificates.ca.read_bytes())
        calls = stack.enter_context(closing(Grpc(cluster, credentials)))
        assert calls.ask(USERS[0]) == cluster.names[0]


def test_nginx_that_is_told_to_quit_answers_what_it_has(tmp_path: Path) -> None:
    with closing(Cluster(tmp_path)) as cluster, ExitStack() as stack:
        cluster.start(cluster.names[0])
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


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
