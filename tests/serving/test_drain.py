"""gRPC's health protocol, and draining: accepted requests are answered, later ones are refused so
that clients ask another replica."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.cache.servers import wait_until
from tests.serving.servers import EagerLoader, grpc_message, local_server, running_server
from tests.worlds import draw_raw
from torchrec_kvshare.config import ServerConfig
from torchrec_kvshare.serving.metrics import ServerMetrics
from torchrec_kvshare.serving.models import Models
from torchrec_kvshare.serving.server import Ports, listening
from torchrec_kvshare.serving.service import Service

SERVING, NOT_SERVING, SERVICE_UNKNOWN = (
    health_pb2.HealthCheckResponse.SERVING,
    health_pb2.HealthCheckResponse.NOT_SERVING,
    health_pb2.HealthCheckResponse.SERVICE_UNKNOWN,
)
PROTOCOL = "inference.GRPCInferenceService"
WAIT_S = 60.0


def asked_for(name: str) -> health_pb2.HealthCheckRequest:
    return health_pb2.HealthCheckRequest(service=name)


def status_of(channel: grpc.Channel, name: str) -> int:
    return health_pb2_grpc.HealthStub(channel).Check(asked_for(name), timeout=WAIT_S).status


@pytest.mark.parametrize("with_token", [False, True])
def test_health_is_told_by_grpcs_protocol(with_token: bool, tmp_path: Path) -> None:
    """A Kubernetes probe cannot send a token."""
    settings = {}
    if with_token:
        settings["token_file"] = str(tmp_path / "token")
        Path(settings["token_file"]).write_text("open sesame")
    with (
        local_server(EagerLoader(), **settings) as server,
        grpc.insecure_channel(server.grpc_url) as channel,
    ):
        assert [status_of(channel, name) for name in ("", PROTOCOL, "kvshare")] == [SERVING] * 3
        with pytest.raises(grpc.RpcError) as unknown:
            status_of(channel, "another")
        assert unknown.value.code() == grpc.StatusCode.NOT_FOUND
        assert "another" in unknown.value.details()
        watching = health_pb2_grpc.HealthStub(channel).Watch(asked_for("another"))
        assert next(watching).status == SERVICE_UNKNOWN
        watching.cancel()
        with pytest.raises(grpc.RpcError) as broken:
            channel.unary_unary("/grpc.health.v1.Health/Check")(b"\xff", timeout=WAIT_S)
        assert broken.value.code() == grpc.StatusCode.INVALID_ARGUMENT


@asynccontextmanager
async def listening_to(models: Models, metrics: ServerMetrics) -> AsyncIterator[Ports]:
    """HTTP and gRPC over these models."""
    config = ServerConfig(http_port=0, grpc_port=0)
    service = Service(models, metrics, config)
    try:
        async with listening(service, config) as open_grpc:
            yield await open_grpc()
    finally:
        service.close()


def test_without_a_model_nothing_is_served_until_there_is_one(tmp_path: Path) -> None:
    loader = EagerLoader()
    metrics = ServerMetrics(loader.metrics)
    models = Models(loader.load, metrics, num_hot=0, hot_bytes=0)

    def states(address: str) -> list[int]:
        with grpc.insecure_channel(address) as channel:
            return [status_of(channel, name) for name in ("", PROTOCOL)]

    async def ask() -> tuple[list[int], list[int], int]:
        async with listening_to(models, metrics) as ports:
            address = f"127.0.0.1:{ports.grpc}"
            before = await asyncio.to_thread(states, address)
            with grpc.insecure_channel(address) as channel:
                watching = health_pb2_grpc.HealthStub(channel).Watch(asked_for(""))
                told = [(await asyncio.to_thread(next, watching)).status]
                await asyncio.to_thread(models.publish, "kvshare", "1", Path("1"))
                told.append((await asyncio.to_thread(next, watching)).status)
                watching.cancel()
            return before, told, (await asyncio.to_thread(states, address))[0]

    before, told, after = asyncio.run(ask())
    assert before == [NOT_SERVING] * 2
    assert told == [NOT_SERVING, SERVING]
    assert after == SERVING


def test_watchers_are_told_that_the_server_stops() -> None:
    """The library's servicer stops updating the other watchers once one has left."""
    told: list[int] = []
    codes: list[grpc.StatusCode] = []

    def watch(calls: Iterator[Any], seen: threading.Event) -> None:
        try:
            for answer in calls:
                told.append(answer.status)
                seen.set()
        except grpc.RpcError as error:
            codes.append(error.code())

    with ThreadPoolExecutor(1) as threads:
        with local_server(EagerLoader()) as server:
            channel = grpc.insecure_channel(server.grpc_url)
            stub, seen = health_pb2_grpc.HealthStub(channel), threading.Event()
            first = stub.Watch(asked_for(""))
            assert next(first).status == SERVING
            watching = threads.submit(watch, stub.Watch(asked_for("")), seen)
            assert seen.wait(WAIT_S)
            first.cancel()
        watching.result(WAIT_S)
        channel.close()
    assert told == [SERVING, NOT_SERVING]
    assert codes == [grpc.StatusCode.UNAVAILABLE]


def test_while_it_drains_http_and_grpc_send_new_requests_elsewhere() -> None:
    """New calls of an open connection were CANCELLED, which no client takes for 'ask another'."""
    raw = draw_raw(5, 2, 1)
    slow = {"timeout_ms": 60_000.0, "max_wait_ms": 3000.0, "drain_s": 60.0}
    with ThreadPoolExecutor(3) as threads:
        with local_server(EagerLoader(), **slow) as server:
            channel = grpc.insecure_channel(server.grpc_url)
            stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            assert stub.ServerReady(service_pb2.ServerReadyRequest()).ready
            message = grpc_message(raw)
            answering = threads.submit(stub.ModelInfer, message, timeout=WAIT_S)
            connection = HTTPConnection(server.http_address, timeout=WAIT_S)
            connection.request("POST", "/v1/rank", json.dumps(raw))
            by_http = threads.submit(connection.getresponse)
            waiting = "/v1/state"
            wait_until(lambda: server.ask("GET", waiting)[1]["queue"]["requests"] == 2, WAIT_S)
            late = threads.submit(first_refusal, stub, message)
        assert len(answering.result(WAIT_S).raw_output_contents) > 0
        response = by_http.result(WAIT_S)
        assert response.status == 200
        assert response.getheader("Connection") == "close"
        assert len(json.loads(response.read())["scores"]) == 2
        code, details, readiness = late.result(WAIT_S)
        assert (code, details) == (grpc.StatusCode.UNAVAILABLE, "the server is about to stop")
        assert readiness is False
        connection.close()
        channel.close()


def first_refusal(stub: Any, message: Any) -> tuple[grpc.StatusCode, str, bool]:
    """Ask until the server says no; then whether it calls itself ready."""
    while True:
        try:
            # A call that is accepted waits to be scored longer than that.
            stub.ModelInfer(message, timeout=0.05)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.DEADLINE_EXCEEDED:
                ready = stub.ServerReady(service_pb2.ServerReadyRequest(), timeout=WAIT_S).ready
                return error.code(), error.details(), ready


def test_sigterm_under_load_gives_grpc_answers_or_unavailable(artifact: Path) -> None:
    """No other status: a client library asks elsewhere after UNAVAILABLE alone."""
    codes: list[str] = []
    settings = ["server.timeout_ms=60000", "server.max_wait_ms=5"]
    with running_server(f"artifact={artifact}", *settings) as server:
        message = grpc_message(draw_raw(5, 2, 1))

        def ask(_: int) -> None:
            with grpc.insecure_channel(server.grpc_url) as channel:
                stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                num_refused = 0
                while num_refused < 3:
                    try:
                        stub.ModelInfer(message, timeout=WAIT_S)
                        codes.append("OK")
                    except grpc.RpcError as error:
                        codes.append(error.code().name)
                        num_refused += 1

        with ThreadPoolExecutor(8) as threads:
            asking = [threads.submit(ask, number) for number in range(8)]
            wait_until(lambda: codes.count("OK") > 50, WAIT_S)
            assert server.stop() == 0
            for one in asking:
                one.result(WAIT_S)
    assert {*codes} == {"OK", "UNAVAILABLE"}
    served = [log for log in server.logs if log.get("outcome") == "ok"]
    assert len(served) == codes.count("OK")
    assert [log for log in server.logs if log.get("level") == "ERROR"] == []


@pytest.mark.parametrize("path", ["/v1/rank", "/v1/rank?stream=1", "/v2/models/kvshare/infer"])
def test_what_is_too_large_is_told_the_limit_and_its_name(path: str) -> None:
    """The error was 'Request Entity Too Large', without the size or the key to change."""
    with local_server(EagerLoader(), max_request_bytes=2000) as server:
        status, answer = server.ask("POST", path, b" " * 2001)
        error = answer["error"]
        message = error if path.startswith("/v2") else error["message"]
        assert status == 413
        assert message == "the body is 2001 bytes; 2000 are allowed by server.max_request_bytes"


def test_a_body_of_unknown_length_is_told_the_limit_too() -> None:
    with local_server(EagerLoader(), max_request_bytes=2000) as server:
        for path, expected in (("/v1/rank", 413), ("/v1/rank?stream=1", 400)):
            connection = HTTPConnection(server.http_address, timeout=WAIT_S)
            chunks = iter([b" " * 1500, b" " * 1500])
            connection.request("POST", path, chunks, encode_chunked=True)
            response = connection.getresponse()
            message = json.loads(response.read())["error"]["message"]
            connection.close()
            assert response.status == expected
            assert message == "the body is longer; 2000 are allowed by server.max_request_bytes"


def test_grpc_names_the_limit_and_what_came() -> None:
    """By its library, which does not read a larger message."""
    with (
        local_server(EagerLoader(), max_request_bytes=2000) as server,
        grpc.insecure_channel(server.grpc_url) as channel,
    ):
        rank = channel.unary_unary(f"/{PROTOCOL}/ModelInfer")
        with pytest.raises(grpc.RpcError, match=r"larger than max .*2001 vs\. 2000") as large:
            rank(b" " * 2001, timeout=WAIT_S)
        assert large.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
