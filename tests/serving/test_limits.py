"""Limits of what one client may take: connections, time, bytes, queue, calls, streams."""

import asyncio
import gc
import json
import queue
import re
import resource
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from tests.cache.servers import wait_until
from tests.serving.servers import Asked, EagerLoader, grpc_message, inputs_of, local_server
from tests.worlds import SCHEMA, draw_raw
from torchrec_kvshare.config import ServerConfig
from torchrec_kvshare.errors import ConfigError, NoRoomError, RequestError, UnavailableError
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.scoring.engine import Answer, Engine, Unscored
from torchrec_kvshare.serving import grpc_server, http_server
from torchrec_kvshare.serving import service as service_module
from torchrec_kvshare.serving.columns import column_tensors
from torchrec_kvshare.serving.intake import LARGE_BYTES, SMALL_BYTES, Intake, gc_paused
from torchrec_kvshare.serving.metrics import LIMITS, ServerMetrics
from torchrec_kvshare.serving.models import Models
from torchrec_kvshare.serving.oip import MAX_FIELDS, decode_infer_json, parse_infer
from torchrec_kvshare.serving.server import listening
from torchrec_kvshare.serving.service import Service

PROTOCOL = "inference.GRPCInferenceService"
WAIT_S = 60.0
PATIENT = {"timeout_ms": 60_000.0}
RAW = draw_raw(5, 2, 1)


def refusals(server: Asked) -> dict[str, int]:
    """Number of refusals by limit."""
    _, text = server.ask("GET", "/metrics")
    found = re.findall(r'^kvshare_refusals_total\{limit="(\w+)"\} (\S+)$', text, re.M)
    assert {limit for limit, _ in found} == {*LIMITS}
    return {limit: int(float(value)) for limit, value in found if float(value)}


def gauge(server: Asked, name: str) -> int:
    _, text = server.ask("GET", "/metrics")
    [value] = re.findall(rf"^kvshare_{re.escape(name)} (\S+)$", text, re.M)
    return int(float(value))


def connect(address: str) -> socket.socket:
    host, port = address.split(":")
    return socket.create_connection((host, int(port)), WAIT_S)


def head_of(path: str, num_bytes: int, *fields: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: here", f"Content-Length: {num_bytes}", *fields]
    return "\r\n".join([*lines, "", ""]).encode()


def read_to_end(connection: socket.socket) -> bytes:
    """Read until the server closes or resets the connection."""
    received = b""
    try:
        while more := connection.recv(65_536):
            received += more
    except ConnectionError:
        pass
    return received


# --- connections and time of HTTP


def test_connections_beyond_the_limit_are_refused_and_counted() -> None:
    with local_server(EagerLoader(), max_connections=3, **PATIENT) as server:
        held = [connect(server.http_address) for _ in range(3)]
        for connection in held:
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: here\r\n\r\n")
            assert b"200 OK" in connection.recv(65_536)
        with connect(server.http_address) as late:
            answer = read_to_end(late)
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert b"Retry-After: 1" in answer
        for connection in held[1:]:
            connection.close()
        wait_until(lambda: _answers(server), WAIT_S)
        assert refusals(server)["connections"] >= 1
        assert gauge(server, "connections_open") in (2, 3)  # one is held, one asks
        held[0].close()


def _answers(server: Asked) -> bool:
    try:
        return server.ask("GET", "/v2/health/live")[0] == 200
    except ConnectionError:
        return False


@pytest.mark.parametrize("begin", [b"", b"POST /v1/rank HTTP/1.1\r\nHos"])
@pytest.mark.parametrize("has_asked", [False, True])
def test_a_connection_without_headers_is_closed(begin: bytes, has_asked: bool) -> None:
    """They stayed open for an hour; those that sent a byte a minute stayed for ever."""
    times = {"header_timeout_s": 0.5, "idle_timeout_s": 60.0 if begin else 0.5}
    with local_server(EagerLoader(), **times, **PATIENT) as server:
        with connect(server.http_address) as connection:
            if has_asked:
                connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: here\r\n\r\n")
                assert b'{"live": true}' in connection.recv(65_536)
            connection.sendall(begin)
            read_to_end(connection)
        if begin:
            assert refusals(server) == {"header_time": 1}


def test_headers_byte_by_byte_are_cut_off() -> None:
    with local_server(EagerLoader(), header_timeout_s=0.5, **PATIENT) as server:
        with connect(server.http_address) as connection:
            connection.sendall(b"GET /v2 HTTP/1.1\r\nX-Slow: ")
            connection.settimeout(0.05)

            def is_closed() -> bool:
                try:
                    connection.sendall(b"x")
                    return connection.recv(1) == b""
                except TimeoutError:
                    return False
                except ConnectionError:
                    return True

            wait_until(is_closed, WAIT_S)
        assert refusals(server) == {"header_time": 1}


def test_an_idle_connection_is_closed_and_counts_as_no_refusal() -> None:
    with local_server(EagerLoader(), idle_timeout_s=0.3, **PATIENT) as server:
        with connect(server.http_address) as connection:
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: here\r\n\r\n")
            assert b'{"live": true}' in read_to_end(connection)
        assert refusals(server) == {}


@pytest.mark.parametrize("path", ["/v1/rank", "/v1/rank?stream=1", "/v2/models/kvshare/infer"])
def test_a_body_that_does_not_come_is_not_waited_for(path: str) -> None:
    with local_server(EagerLoader(), body_timeout_s=0.3, **PATIENT) as server:
        with connect(server.http_address) as connection:
            connection.sendall(head_of(path, 1000) + b"{")
            answer = connection.recv(65_536)
        assert answer.startswith(b"HTTP/1.1 504 ")
        assert b"server.body_timeout_s" in answer
        assert refusals(server)["body_time"] == 1


def test_answers_that_are_not_read_end_their_connection() -> None:
    """They were kept in memory for as long as the client liked."""
    with local_server(EagerLoader(), body_timeout_s=0.5, **PATIENT) as server:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(0.1)
            host, port = server.http_address.split(":")
            connection.connect((host, int(port)))

            def is_ended() -> bool:
                try:
                    connection.send(b"GET / HTTP/1.1\r\nHost: here\r\n\r\n" * 100)
                except TimeoutError:
                    pass
                except ConnectionError:
                    return True
                return False

            wait_until(is_ended, WAIT_S)
        assert refusals(server) == {"answer_time": 1}
        wait_until(lambda: gauge(server, "connections_open") == 1, WAIT_S)


# --- bytes


def test_bytes_in_flight_are_bounded_over_all_clients() -> None:
    """Bodies had no common limit: 200 of 16 MiB took 3 GiB before any was queued."""
    limits = {"max_request_bytes": 400_000, "max_inflight_bytes": 400_000}
    message = json.dumps(RAW | {"more": "x" * 300_000}).encode()
    with local_server(EagerLoader(), **limits, **PATIENT) as server:
        with connect(server.http_address) as connection:
            connection.sendall(head_of("/v1/rank", 400_000) + message[:280_000])
            wait_until(lambda: gauge(server, "inflight_bytes") == 280_000 - SMALL_BYTES, WAIT_S)
            for path in ("/v1/rank", "/v2/models/kvshare/infer"):
                status, answer, retry_after = ask_with_headers(server, path, message)
                assert (status, retry_after) == (503, "1")
                assert "server.max_inflight_bytes" in json.dumps(answer)
            status, text = server.ask("POST", "/v1/rank?stream=1", message)
            assert (status, "server.max_inflight_bytes" in str(text)) == (503, True)
            with grpc.insecure_channel(server.grpc_url) as channel:
                infer = channel.unary_unary(f"/{PROTOCOL}/ModelInfer")
                with pytest.raises(grpc.RpcError, match=r"server\.max_inflight_bytes") as refused:
                    infer(b"x" * 300_000, timeout=WAIT_S)
                assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert refusals(server) == {"inflight_bytes": 4}
            # A small request always has room.
            assert server.rank(RAW)[0] == 200
        wait_until(lambda: gauge(server, "inflight_bytes") == 0, WAIT_S)
        assert server.rank(message)[0] == 200


def ask_with_headers(server: Asked, path: str, body: bytes) -> tuple[int, Any, str | None]:
    connection = HTTPConnection(server.http_address, timeout=WAIT_S)
    try:
        connection.request("POST", path, body)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.getheader("Retry-After")
    finally:
        connection.close()


def test_a_message_of_a_stream_counts_until_it_is_answered() -> None:
    limits = {"max_request_bytes": 400_000, "max_inflight_bytes": 400_000}
    padded = grpc_message(RAW | {"request_id": "fits"})
    padded.parameters["more"].string_param = "x" * 300_000
    with (
        local_server(EagerLoader(), **limits, **PATIENT) as server,
        grpc.insecure_channel(server.grpc_url) as channel,
    ):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        messages: queue.Queue[Any] = queue.Queue()
        calls = stub.ModelStreamInfer(iter(messages.get, None), timeout=WAIT_S)
        for _ in range(5):  # Together they would not fit.
            messages.put(padded)
            answer = next(calls)
            assert not answer.error_message
        wait_until(lambda: gauge(server, "inflight_bytes") == 0, WAIT_S)
        messages.put(None)
        assert [*calls] == []


def test_what_is_held_is_counted_beyond_the_small_part_of_each() -> None:
    refused: list[str] = []
    intake = Intake(100, refused.append)
    with intake.message() as one, intake.message() as other:
        one.add(SMALL_BYTES)
        other.add(SMALL_BYTES + 100)
        assert intake.num_bytes == 100
        with pytest.raises(NoRoomError, match="hold 100 bytes, and 1 more came; 100 are allowed"):
            one.add(1)
        other.drop(SMALL_BYTES + 60)
        one.add(1)
        assert intake.num_bytes == 1
    assert intake.num_bytes == 0
    assert refused == ["inflight_bytes"]
    intake.close()


def test_large_messages_are_parsed_in_a_thread_without_the_collector() -> None:
    """15 MiB of JSON blocked the event loop for 1.6 s, nearly all of it garbage collection."""
    intake = Intake(1, print)

    def parse() -> tuple[str, bool]:
        return threading.current_thread().name, gc.isenabled()

    async def both() -> list[tuple[str, bool]]:
        sizes = (LARGE_BYTES, LARGE_BYTES + 1)
        return [await intake.parse(num_bytes, parse) for num_bytes in sizes]

    small, large = asyncio.run(both())
    intake.close()
    assert small == (threading.current_thread().name, True)
    assert large[0].startswith("kvshare-parse")
    assert not large[1]
    assert gc.isenabled()


def test_the_collector_is_back_after_the_last_pause_and_stays_off_where_it_was() -> None:
    with gc_paused():
        with gc_paused():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with gc_paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def memory_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_a_message_of_many_empty_fields_is_refused_before_it_is_made() -> None:
    """2 MiB of empty outputs became 48 MiB, as many inputs 84."""
    for wire in (b"\x32\x00", b"\x2a\x00", b"\x3a\x00"):  # outputs, inputs, raw contents
        before = memory_bytes()
        with pytest.raises(RequestError, match=f"at most {MAX_FIELDS} are allowed"):
            parse_infer(wire * 2**22)
        assert memory_bytes() - before < 16 * 2**20
        parse_infer(wire * MAX_FIELDS)
    for hidden in (b"\x0b\x0c", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\x07"):
        with pytest.raises(RequestError, match="the bytes are no ModelInferRequest"):
            parse_infer(hidden + b"\x32\x00" * 2**21)
    for key in ("inputs", "outputs"):
        head = {"inputs": [], key: [{}] * (MAX_FIELDS + 1)}
        with local_server(EagerLoader(), **PATIENT) as server:
            status, answer = server.ask("POST", "/v2/models/kvshare/infer", head)
        assert status == 400
        assert f"{key} has {MAX_FIELDS + 1} entries" in answer["error"]
    with pytest.raises(RequestError, match=f"inputs has {MAX_FIELDS + 1} entries"):
        decode_infer_json({"inputs": [{}] * (MAX_FIELDS + 1)}, b"")


# --- admission


def count_decoding(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions that decode bodies or parse columns, as they are called."""
    called: list[str] = []

    def watch(module: Any, name: str) -> None:
        original = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            called.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    for name in ("decode_json", "decode_request", "decode_infer_json", "raw_requests"):
        watch(http_server, name)
    for name in ("decode_infer", "raw_requests", "raw_candidates"):
        watch(grpc_server, name)
    for name in ("parse_request", "parse_candidates"):
        watch(service_module, name)
    return called


@contextmanager
def blocked_scoring(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Score nothing until the event is set, or the block ends."""
    may_go_on, rank_each = threading.Event(), Engine.rank_each

    def rank_later(self: Engine, requests: Sequence[Request]) -> list[Answer | Unscored]:
        assert may_go_on.wait(WAIT_S)
        return rank_each(self, requests)

    monkeypatch.setattr(Engine, "rank_each", rank_later)
    try:
        yield may_go_on
    finally:
        may_go_on.set()


def fill_queue(server: Asked, threads: ThreadPoolExecutor, num_requests: int) -> list[Future[Any]]:
    """Send a request that is being scored, then others until ``num_requests`` wait."""
    asking = [threads.submit(server.rank, RAW)]
    wait_until(lambda: batches_started(server) == 1, WAIT_S)
    while gauge(server, "queue_requests") < num_requests:
        waiting = gauge(server, "queue_requests") + 1
        asking.append(threads.submit(server.rank, RAW))
        wait_until(lambda waiting=waiting: gauge(server, "queue_requests") == waiting, WAIT_S)
    return asking


def batches_started(server: Asked) -> int:
    return gauge(server, "batch_requests_count")


def overloaded(server: Asked, kind: str) -> int:
    return gauge(server, f'requests_total{{model="kvshare",outcome="overloaded",server="{kind}"}}')


def test_a_request_refused_for_a_full_queue_is_not_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its body was decoded and its columns were parsed before the queue was looked at."""
    called = count_decoding(monkeypatch)
    with (
        blocked_scoring(monkeypatch) as may_go_on,
        ThreadPoolExecutor(2) as threads,
        local_server(EagerLoader(), queue_requests=1, **PATIENT) as server,
        grpc.insecure_channel(server.grpc_url) as channel,
    ):
        asking = fill_queue(server, threads, 1)
        called.clear()
        body, stub = json.dumps(RAW).encode(), service_pb2_grpc.GRPCInferenceServiceStub(channel)
        paths = ("/v1/rank", "/v1/rank?stream=1", "/v2/models/kvshare/infer")
        for path, text in (*((path, body) for path in paths), ("/v1/rank", b"[" + body + b"]")):
            status, answer, retry_after = ask_with_headers(server, path, text)
            assert (status, retry_after) == (429, "1")
            assert "1 requests wait, 1 more came; at most 1 may wait" in json.dumps(answer)
        with pytest.raises(grpc.RpcError, match="at most 1 may wait") as refused:
            stub.ModelInfer(grpc_message(RAW), timeout=WAIT_S)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        messages = iter([grpc_message(RAW), grpc_message(RAW, "s")])
        for reply in stub.ModelStreamInfer(messages, timeout=WAIT_S):
            assert reply.error_message.startswith("OverloadError: 1 requests wait")
        assert called == []
        assert refusals(server) == {"queue": 7}
        assert (overloaded(server, "http"), overloaded(server, "grpc")) == (4, 3)
        may_go_on.set()
        assert [one.result(WAIT_S)[0] for one in asking] == [200, 200]


def test_a_group_refused_for_a_full_queue_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    called = count_decoding(monkeypatch)
    with (
        blocked_scoring(monkeypatch) as may_go_on,
        ThreadPoolExecutor(3) as threads,
        local_server(EagerLoader(), queue_requests=2, **PATIENT) as server,
        connect(server.http_address) as connection,
    ):
        asking = fill_queue(server, threads, 1)
        first = json.dumps(RAW | {"user_id": "stream"}).encode() + b"\n"
        group = json.dumps({"candidates": RAW["candidates"]}).encode() + b"\n"
        connection.sendall(head_of("/v1/rank?stream=1", len(first) + len(group)) + first)
        wait_until(lambda: gauge(server, "queue_requests") == 2, WAIT_S)
        called.clear()
        connection.sendall(group)
        wait_until(lambda: refusals(server) == {"queue": 1}, WAIT_S)
        assert called == []
        may_go_on.set()
        answer = b""
        while b"event: error" not in answer:
            answer += connection.recv(65_536)
        assert b"event: scores" in answer
        assert [one.result(WAIT_S)[0] for one in asking] == [200, 200]


def test_a_message_of_more_requests_than_the_queue_has_room_for_is_not_parsed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called = count_decoding(monkeypatch)
    tensors = column_tensors([RAW, RAW, RAW], SCHEMA)
    with (
        blocked_scoring(monkeypatch) as may_go_on,
        ThreadPoolExecutor(2) as threads,
        local_server(EagerLoader(), queue_requests=3, **PATIENT) as server,
        triton.InferenceServerClient(server.grpc_url) as client,
    ):
        asking = fill_queue(server, threads, 1)
        called.clear()
        with pytest.raises(InferenceServerException, match="1 requests wait, 3 more came; at most"):
            client.infer("kvshare", inputs_of(triton, tensors))
        assert "parse_request" not in called
        assert refusals(server) == {"queue": 1}
        may_go_on.set()
        assert [one.result(WAIT_S)[0] for one in asking] == [200, 200]


def test_a_message_of_more_requests_than_may_ever_wait_is_not_told_to_come_back() -> None:
    """It got 429 however often it was sent, also by an empty queue."""
    with (
        local_server(EagerLoader(), queue_requests=2) as server,
        triton.InferenceServerClient(server.grpc_url) as client,
    ):
        status, answer = server.ask("POST", "/v1/rank", [RAW, RAW, RAW])
        assert (status, answer["error"]["type"]) == (400, "RequestError")
        assert "a list of 3; a request, or a list of at most 2" in answer["error"]["message"]
        with pytest.raises(InferenceServerException, match="has 3 elements; 1 to 2 are allowed"):
            client.infer("kvshare", inputs_of(triton, column_tensors([RAW, RAW, RAW], SCHEMA)))
        assert refusals(server) == {}


def test_a_request_for_an_unknown_model_is_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    called = count_decoding(monkeypatch)
    with (
        local_server(EagerLoader(), **PATIENT) as server,
        grpc.insecure_channel(server.grpc_url) as channel,
    ):
        body, stub = json.dumps(RAW).encode(), service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for path in ("/v1/rank?model=x", "/v1/rank?model=x&stream=1", "/v2/models/x/infer"):
            assert server.ask("POST", path, body)[0] == 404
        message = grpc_message(RAW)
        message.model_name = "x"
        with pytest.raises(grpc.RpcError, match="x was asked for") as refused:
            stub.ModelInfer(message, timeout=WAIT_S)
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        [reply] = stub.ModelStreamInfer(iter([message]), timeout=WAIT_S)
        assert reply.error_message.startswith("UnknownModelError: x was asked for")
        assert called == []


def test_while_grpc_drains_a_message_is_refused_before_it_is_parsed() -> None:
    loader = EagerLoader()
    metrics = ServerMetrics(loader.metrics)
    models = Models(loader.load, metrics, num_hot=0, hot_bytes=0)

    async def drain() -> None:
        service = Service(models, metrics, ServerConfig())
        server = grpc_server.GrpcServer(service)
        with pytest.raises(RequestError, match="no ModelInferRequest"):
            server._decode(b"\xff")
        await server.drain(0.0)
        with pytest.raises(UnavailableError, match="the server is about to stop"):
            server._decode(b"\xff")
        service.close()

    asyncio.run(drain())


def test_a_message_that_finds_room_after_all_is_decoded_on_admission() -> None:
    message = grpc_message(RAW)
    tensors = grpc_server.Incoming(message, inputs=None, num_bytes=0).tensors()
    assert tensors.keys() == {one.name for one in message.inputs}


# --- tokens


def test_without_the_token_nothing_of_a_message_is_read(tmp_path: Path) -> None:
    """Over gRPC the refusal waited for the whole message."""
    secret = tmp_path / "token"
    secret.write_text("open sesame")
    with local_server(EagerLoader(), token_file=str(secret), **PATIENT) as server:
        for path in ("/v1/rank", "/v1/rank?stream=1", "/v2/models/kvshare/infer"):
            with connect(server.http_address) as connection:
                connection.sendall(head_of(path, 10_000_000))
                assert connection.recv(65_536).startswith(b"HTTP/1.1 401 ")
        never, told = threading.Event(), {"Authorization": "Bearer open sesame"}
        with grpc.insecure_channel(server.grpc_url) as channel:
            for method in ("ModelInfer", "ModelMetadata", "ModelStreamInfer"):
                ask = channel.stream_unary(f"/{PROTOCOL}/{method}")
                with pytest.raises(grpc.RpcError) as refused:
                    ask(_never(never), timeout=WAIT_S)
                assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
            never.set()
        _, text = server.ask("GET", "/metrics", headers=told)
        assert 'kvshare_refusals_total{limit="token"} 6.0' in text


def _never(event: threading.Event) -> Iterator[bytes]:
    event.wait(WAIT_S)
    yield b""


# --- calls


def test_calls_beyond_the_limit_are_refused_and_health_still_answers() -> None:
    with (
        local_server(EagerLoader(), max_calls=2, **PATIENT) as server,
        grpc.insecure_channel(server.grpc_url) as channel,
        # Of one connection more would wait at the client.
        grpc.insecure_channel(server.grpc_url, [("grpc.use_local_subchannel_pool", 1)]) as other,
    ):
        never = threading.Event()
        ask = channel.stream_stream(f"/{PROTOCOL}/ModelStreamInfer")
        open_calls = [ask(_never(never)) for _ in range(2)]
        wait_until(lambda: gauge(server, "calls_open") == 2, WAIT_S)
        stub = service_pb2_grpc.GRPCInferenceServiceStub(other)
        with pytest.raises(grpc.RpcError, match=r"server\.max_calls") as refused:
            stub.ModelInfer(grpc_message(RAW), timeout=WAIT_S)
        assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        health = health_pb2_grpc.HealthStub(other)
        request = health_pb2.HealthCheckRequest()
        watching = [health.Watch(request) for _ in range(2)]
        assert [next(one).status for one in watching] == [
            health_pb2.HealthCheckResponse.SERVING
        ] * 2
        assert refusals(server) == {"calls": 1}
        for one in [*open_calls, *watching]:
            one.cancel()
        never.set()
        wait_until(lambda: gauge(server, "calls_open") == 0, WAIT_S)
        assert (
            health.Check(request, timeout=WAIT_S).status == health_pb2.HealthCheckResponse.SERVING
        )
        assert stub.ModelInfer(grpc_message(RAW), timeout=WAIT_S).raw_output_contents


def test_a_call_whose_message_does_not_come_ends() -> None:
    """It was waited for as long as the connection lived."""
    with (
        local_server(EagerLoader(), body_timeout_s=0.3, **PATIENT) as server,
        grpc.insecure_channel(server.grpc_url) as channel,
    ):
        never = threading.Event()
        for method in (
            f"{PROTOCOL}/ModelInfer",
            f"{PROTOCOL}/ServerLive",
            "grpc.health.v1.Health/Check",
        ):
            with pytest.raises(grpc.RpcError, match=r"server\.body_timeout_s") as ended:
                channel.stream_unary(f"/{method}")(_never(never), timeout=WAIT_S)
            assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        with pytest.raises(grpc.RpcError, match="one is needed") as empty:
            channel.stream_unary(f"/{PROTOCOL}/ModelInfer")(iter([]), timeout=WAIT_S)
        assert empty.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        never.set()
        assert refusals(server) == {"body_time": 3}


def test_a_stream_of_messages_that_is_idle_ends() -> None:
    with (
        local_server(EagerLoader(), idle_timeout_s=0.5, **PATIENT) as server,
        grpc.insecure_channel(server.grpc_url) as channel,
    ):
        never = threading.Event()
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        def messages() -> Iterator[Any]:
            yield grpc_message(RAW)
            never.wait(WAIT_S)

        call = stub.ModelStreamInfer(messages(), timeout=WAIT_S)
        assert not next(call).error_message
        with pytest.raises(grpc.RpcError, match=r"server\.idle_timeout_s") as ended:
            next(call)
        assert ended.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        never.set()
        assert refusals(server) == {"idle_time": 1}


def test_silent_connections_of_grpc_are_bounded_in_time_and_number() -> None:
    with local_server(EagerLoader(), header_timeout_s=1.0, max_connections=2, **PATIENT) as server:
        silent = [connect(server.grpc_url) for _ in range(4)]
        for connection in silent:
            read_to_end(connection)  # The last two at once, the others after a second.
            connection.close()
        with grpc.insecure_channel(server.grpc_url) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            message = grpc_message(RAW)
            assert stub.ModelInfer(message, timeout=WAIT_S, wait_for_ready=True).outputs


# --- streams


def started(number: int) -> service_pb2.ModelInferRequest:
    raw = RAW | {"user_id": f"user {number}", "request_id": f"started {number}"}
    return grpc_message(raw, f"s{number}")


def test_sequences_are_bounded_in_number_also_after_their_deadline() -> None:
    """At the deadline only the count dropped: 32 were open where 8 may be."""
    limits = {"max_streams": 8, "stream_timeout_s": 3.0, "stream_depth": 1}
    with (
        local_server(EagerLoader(num_pages=400), **limits, **PATIENT) as server,
        grpc.insecure_channel(server.grpc_url) as channel,
    ):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        messages: queue.Queue[Any] = queue.Queue()
        answers = stub.ModelStreamInfer(iter(messages.get, None), timeout=4 * WAIT_S)

        def ask(message: service_pb2.ModelInferRequest) -> str:
            messages.put(message)
            return str(next(answers).error_message)

        # On a slow machine the first deadlines pass before the last sequence starts.
        open_ones = [ask(started(number)) for number in range(32)].count("")
        assert 8 <= open_ones < 32
        assert gauge(server, "streams_open") <= 8
        wait_until(lambda: gauge(server, "streams_open") == 0, WAIT_S)
        late = grpc_message(RAW, "s0", is_first=False)
        assert "sequence s0 was not started in this stream, or its deadline has passed" in ask(late)
        again = [ask(started(number)) for number in range(32)]
        assert any("8 streams are open; at most 8 may be" in error for error in again)
        assert gauge(server, "streams_open") <= 8
        messages.put(None)
        assert [*answers] == []
        wait_until(lambda: gauge(server, "streams_open") == 0, WAIT_S)
        assert refusals(server)["streams"] >= 2
        assert refusals(server)["stream_time"] >= 8


def test_a_retired_version_leaves_when_the_deadline_of_its_sequences_has_passed(
    tmp_path: Path,
) -> None:
    """It stayed as long as the call, which may be open for days."""
    loader = EagerLoader()
    metrics = ServerMetrics(loader.metrics)
    models = Models(loader.load, metrics, num_hot=0, hot_bytes=0)
    config = ServerConfig(http_port=0, grpc_port=0, stream_timeout_s=2.0, timeout_ms=60_000.0)

    def states() -> list[tuple[str, str]]:
        return [(standing.version, standing.state) for standing in models.standings()]

    def ask(address: str) -> None:
        messages: queue.Queue[Any] = queue.Queue()
        with grpc.insecure_channel(address) as channel:
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            answers = stub.ModelStreamInfer(iter(messages.get, None), timeout=WAIT_S)
            messages.put(started(1))
            assert not next(answers).error_message
            models.publish("kvshare", "2", Path("2"))
            wait_until(lambda: states() == [("2", "serving")], WAIT_S)
            # The call is open still, and is answered by the new version.
            messages.put(started(2))
            answer = next(answers)
            assert not answer.error_message
            assert answer.infer_response.model_version == loader.engines[1].model_version
            messages.put(None)
            assert [*answers] == []

    async def run() -> None:
        models.publish("kvshare", "1", Path("1"))
        service = Service(models, metrics, config)
        try:
            async with listening(service, config) as open_grpc:
                ports = await open_grpc()
                await asyncio.to_thread(ask, f"127.0.0.1:{ports.grpc}")
        finally:
            service.close()

    asyncio.run(run())


def test_a_sequence_whose_answers_wait_ends_at_its_deadline_with_an_error_in_their_place() -> None:
    limits = {"stream_timeout_s": 0.5, "max_wait_ms": 5000.0, "timeout_ms": 60_000.0}
    with (
        local_server(EagerLoader(), **limits) as server,
        grpc.insecure_channel(server.grpc_url) as channel,
    ):
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        messages = [
            grpc_message(RAW, "s", is_first=True),
            grpc_message(RAW, "s", is_first=False, is_last=True),
        ]
        answers = [*stub.ModelStreamInfer(iter(messages), timeout=WAIT_S)]
        assert len(answers) == 2
        for answer in answers:
            assert answer.error_message.startswith("DeadlineError: the ")
        assert gauge(server, "streams_open") == 0


# --- what cannot work


def test_limits_that_cannot_work_are_refused_at_the_start() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    for settings, message in (
        ({"max_inflight_bytes": 9, "max_request_bytes": 10}, r"server\.max_inflight_bytes is 9"),
        ({"max_connections": hard}, r"server\.max_connections is \d+, for which \d+ open files"),
    ):
        with pytest.raises(ConfigError, match=message), local_server(EagerLoader(), **settings):
            pass


def test_many_connections_have_room_for_their_files() -> None:
    """The default limit is 1024 open files; accepting failed beyond it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with local_server(EagerLoader(), max_connections=300, **PATIENT):
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= 600
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_good_and_refused_calls_side_by_side_lose_nothing() -> None:
    """A refusal ends its own call only."""
    with (
        local_server(EagerLoader(), max_calls=4, **PATIENT) as server,
        ThreadPoolExecutor(8) as threads,
    ):

        def ask(number: int) -> str:
            options = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(server.grpc_url, options) as channel:
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                try:
                    return str(stub.ModelInfer(started_alone(number), timeout=WAIT_S).id)
                except grpc.RpcError as error:
                    return str(error.code().name)

        ends = [*threads.map(ask, range(60))]
        good = [number for number in range(60) if ends[number] == f"alone {number}"]
        assert good
        assert {ends[number] for number in {*range(60)} - {*good}} <= {"RESOURCE_EXHAUSTED"}
        wait_until(lambda: gauge(server, "calls_open") == 0, WAIT_S)


def started_alone(number: int) -> service_pb2.ModelInferRequest:
    return grpc_message(RAW | {"request_id": f"alone {number}"})
