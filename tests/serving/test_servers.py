"""HTTP and gRPC, asked by Triton's own clients: the same scores, errors and streams."""

import asyncio
import copy
import gc
import json
import logging
import queue
import re
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as grpc_client
import tritonclient.http as http_client
from tritonclient.grpc import service_pb2
from tritonclient.utils import InferenceServerException

from tests.cache.servers import wait_until
from tests.serving.servers import Asked, EagerLoader, grpc_message, inputs_of, local_server
from tests.worlds import SCHEMA, draw_raw, make_dlrm, parse_all, version_called
from torchrec_kvshare.errors import RequestError
from torchrec_kvshare.features.request import count_ids, unknown_ids
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.serving.columns import (
    column_specs,
    column_tensors,
    output_specs,
)
from torchrec_kvshare.serving.http_server import split_lines

RawRequest = dict[str, Any]
WAIT_S = 60.0  # a busy machine
UNCACHED = Engine(RankingModel(make_dlrm(1)).eval(), SCHEMA, None)


@pytest.fixture(scope="module")
def server() -> Iterator[Asked]:
    with local_server(EagerLoader(), timeout_ms=60_000.0, stream_timeout_s=60.0) as asked:
        yield asked


@pytest.fixture
def grpc_triton(server: Asked) -> Iterator[grpc_client.InferenceServerClient]:
    with grpc_client.InferenceServerClient(server.grpc_url) as client:
        yield client


@pytest.fixture
def http_triton(server: Asked) -> Iterator[http_client.InferenceServerClient]:
    with http_client.InferenceServerClient(server.http_address, network_timeout=60.0) as client:
        yield client


def expected_scores(raws: list[RawRequest]) -> list[list[float]]:
    return [answer.scores for answer in UNCACHED.rank(parse_all(raws))]


def scores_of(result: Any) -> list[list[float]]:
    ends = np.cumsum(result.as_numpy("scores.lengths"))[:-1]
    return [part.tolist() for part in np.split(result.as_numpy("scores"), ends)]


def raws_of(*seeds: int) -> list[RawRequest]:
    return [draw_raw(4 + seed, 1 + seed, seed) | {"user_id": f"user {seed}"} for seed in seeds]


@pytest.mark.parametrize("seeds", [(1,), (2, 3, 4)], ids=["one", "three"])
def test_tritons_clients_get_the_engines_scores(
    grpc_triton: grpc_client.InferenceServerClient,
    http_triton: http_client.InferenceServerClient,
    seeds: tuple[int, ...],
) -> None:
    raws = raws_of(*seeds)
    tensors = column_tensors(raws, SCHEMA)
    for kit, client in ((grpc_client, grpc_triton), (http_client, http_triton)):
        result = client.infer("kvshare", inputs_of(kit, tensors), request_id="m7")
        for scores, expected in zip(scores_of(result), expected_scores(raws), strict=True):
            assert scores == pytest.approx(expected, rel=0, abs=2e-6)
        assert set(result.as_numpy("cache.status").tolist()) <= {b"hit", b"miss"}
    response = grpc_triton.infer("kvshare", inputs_of(grpc_client, tensors)).get_response()
    assert response.model_version == str(version_called("v1"))


def test_only_the_outputs_that_are_asked_for_come(
    http_triton: http_client.InferenceServerClient,
) -> None:
    inputs = inputs_of(http_client, column_tensors(raws_of(1), SCHEMA))
    outputs = [http_client.InferRequestedOutput("scores", binary_data=False)]
    result = http_triton.infer("kvshare", inputs, outputs=outputs)
    assert [output["name"] for output in result.get_response()["outputs"]] == ["scores"]
    assert result.as_numpy("scores") == pytest.approx(expected_scores(raws_of(1))[0], abs=2e-6)


def test_metadata_tells_every_tensor(
    grpc_triton: grpc_client.InferenceServerClient, http_triton: http_client.InferenceServerClient
) -> None:
    by_grpc = grpc_triton.get_model_metadata("kvshare", as_json=True)
    by_http = http_triton.get_model_metadata("kvshare")
    inputs = [
        {"name": spec.name, "datatype": spec.datatypes[0], "shape": [-1]}
        for spec in column_specs(SCHEMA)
    ]
    assert by_http["inputs"] == inputs
    assert [one["name"] for one in by_grpc["inputs"]] == [one["name"] for one in inputs]
    assert [one["name"] for one in by_http["outputs"]] == [
        spec.name for spec in output_specs(SCHEMA)
    ]
    assert by_http["versions"] == by_grpc["versions"] == ["1"]
    assert http_triton.get_server_metadata()["extensions"] == ["binary_tensor_data", "sequence"]


def test_health_is_answered_by_both(
    grpc_triton: grpc_client.InferenceServerClient, http_triton: http_client.InferenceServerClient
) -> None:
    for client in (grpc_triton, http_triton):
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("kvshare")
        assert client.is_model_ready("kvshare", "1")
        assert not client.is_model_ready("kvshare", "2")
        assert not client.is_model_ready("another")


def test_a_bad_tensor_is_named(
    grpc_triton: grpc_client.InferenceServerClient, http_triton: http_client.InferenceServerClient
) -> None:
    tensors = column_tensors(raws_of(1), SCHEMA)
    name = "history.item_id.lengths"
    for kit, client in ((grpc_client, grpc_triton), (http_client, http_triton)):
        with pytest.raises(InferenceServerException) as refused:
            client.infer("kvshare", inputs_of(kit, tensors | {name: np.array([-3])}))
        assert name in refused.value.message()
        assert refused.value.status() in ("StatusCode.INVALID_ARGUMENT", "400")
    nan = tensors | {"candidates.price.values": np.array([np.nan, 1.0])}
    with pytest.raises(InferenceServerException, match=r"candidates\.price holds nan"):
        grpc_triton.infer("kvshare", inputs_of(grpc_client, nan))


def test_an_unknown_model_is_not_found(
    server: Asked, grpc_triton: grpc_client.InferenceServerClient
) -> None:
    with pytest.raises(InferenceServerException, match="another was asked for") as refused:
        grpc_triton.infer("another", [])
    assert refused.value.status() == "StatusCode.NOT_FOUND"
    status, body = server.ask("POST", "/v1/rank?model=another", raws_of(1)[0])
    assert (status, body["error"]["type"]) == (404, "UnknownModelError")
    assert server.ask("GET", "/v2/models/another")[0] == 404
    assert server.ask("GET", "/v2/models/kvshare/versions/9")[0] == 404


def test_the_projects_own_format_for_one_and_for_many(server: Asked) -> None:
    raws = raws_of(1, 2)
    status, answer = server.rank(raws[0])
    assert status == 200
    assert answer["scores"] == pytest.approx(expected_scores(raws)[0], abs=2e-6)
    assert set(answer) == {"request_id", "scores", "model_version", "cache"}
    assert answer["cache"]["staleness_s"] >= 0.0
    status, answers = server.rank([raws[0], raws[1] | {"time": "now"}, 7])
    assert status == 200
    assert answers[0]["cache"]["status"] == "hit"
    assert answers[1]["request_id"] == raws[1]["request_id"]
    assert answers[1]["error"]["message"].startswith("time holds 'now'")
    assert answers[2]["error"]["type"] == "RequestError"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "not JSON"),
        (b"", "not JSON"),
        (b"7", "the body is int"),
        (b'{"user_id": 1, "user_id": 2}', "appears twice"),
        (b"[" * 100_000, "nested deeper than 16"),
        (b"[" + b"{}," * 64 + b"{}]", "a list of 65"),
    ],
    ids=["cut", "empty", "number", "twice", "deep", "long"],
)
def test_a_bad_body_is_refused(server: Asked, body: bytes, message: str) -> None:
    status, answer = server.rank(body)
    assert status == 400
    assert message in answer["error"]["message"]


def test_the_page_of_metrics_and_the_state(server: Asked) -> None:
    for _ in range(2):  # It failed where no test before it, in the same worker, had made a hit.
        server.rank(raws_of(1)[0])
    status, text = server.ask("GET", "/metrics")
    assert status == 200
    assert 'kvshare_requests_total{model="kvshare",outcome="ok",server="http"}' in text
    assert 'kvshare_cache_lookups_total{outcome="hit",tier="pages"}' in text
    state = server.ask("GET", "/v1/state")[1]
    assert state["ready"]
    assert state["models"][0]["state"] == "serving"
    assert state["requests"]["ok"] > 0
    example = server.ask("GET", "/v1/example?model=kvshare")[1]
    assert len(server.rank(example)[1]["scores"]) == len(example["candidates"]["item_id"])


def test_groups_are_scored_over_what_the_first_one_read(server: Asked) -> None:
    raw = draw_raw(9, 12, 5) | {"user_id": "streams"}
    groups = cut_candidates(raw, 4, 4, 9)
    events = stream(server, groups)
    assert [name for name, _ in events] == ["scores", "scores", "scores", "scores", "end"]
    scores = [score for _, data in events[:-1] for score in data["scores"]]
    assert [data["first_candidate"] for _, data in events[:-1]] == [0, 4, 4, 9]
    assert scores == pytest.approx(expected_scores([raw])[0], abs=2e-6)
    assert {data["cache"]["status"] for _, data in events[:-1]} == {"miss"}


def test_a_sequence_of_messages_is_a_stream(grpc_triton: grpc_client.InferenceServerClient) -> None:
    raw = draw_raw(9, 12, 6) | {"user_id": "sequences"}
    groups = cut_candidates(raw, 5, 8)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    grpc_triton.start_stream(lambda result, error: answers.put((result, error)))
    for number, group in enumerate(groups):
        tensors = column_tensors([raw | group], SCHEMA)
        if number:
            tensors = {n: values for n, values in tensors.items() if n.startswith("candidates.")}
        grpc_triton.async_stream_infer(
            "kvshare",
            inputs_of(grpc_client, tensors),
            request_id=f"m{number}",
            sequence_id="s",
            sequence_start=number == 0,
            sequence_end=number == len(groups) - 1,
        )
    # A sequence that has ended is unknown; the stream goes on.
    grpc_triton.async_stream_infer("kvshare", [], request_id="late", sequence_id="s")
    whole = inputs_of(grpc_client, column_tensors([raw], SCHEMA))
    grpc_triton.async_stream_infer("kvshare", whole, request_id="own")
    got = [answers.get(timeout=60) for _ in range(len(groups) + 2)]
    grpc_triton.stop_stream()
    scores = [score for result, _ in got[:3] for score in result.as_numpy("scores").tolist()]
    assert [result.get_response().id for result, _ in got[:3]] == ["m0", "m1", "m2"]
    assert scores == pytest.approx(expected_scores([raw])[0], abs=2e-6)
    assert "sequence s was not started" in str(got[3][1])
    assert got[4][0].as_numpy("scores").tolist() == pytest.approx(scores, abs=2e-6)


def test_a_bad_group_ends_an_http_stream_with_its_error(server: Asked) -> None:
    raw = draw_raw(9, 2, 7)
    events = stream(server, [raw, {"candidates": {"item_id": [[]]}}])
    assert [name for name, _ in events] == ["scores", "error"]
    assert "candidates" in events[1][1]["error"]["message"]


def test_scores_leave_before_the_last_group_has_come(server: Asked) -> None:
    raw = draw_raw(9, 4, 8)
    first, second = cut_candidates(raw, 2)
    host, port = server.http_address.split(":")
    with socket.create_connection((host, int(port)), 60.0) as connection:
        head = f"POST /v1/rank?stream=1 HTTP/1.1\r\nHost: {host}\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(f"{head}\r\n".encode() + chunk(first))
        seen = receive_until(connection, b"\n\n", b"first_candidate")
        assert b'"first_candidate": 0' in seen
        connection.sendall(chunk(second) + b"0\r\n\r\n")
        assert b'"first_candidate": 2' in receive_until(connection, b"event: end")


def test_one_request_of_thousands_does_not_hold_up_the_others() -> None:
    """Its candidates are scored in parts, other requests in between."""
    with local_server(EagerLoader(), timeout_ms=120_000.0, batch_candidates=200) as server:
        long, short = draw_raw(9, 9000, 1), draw_raw(9, 3, 2)
        server.rank(short)
        done: list[str] = []

        def ask(name: str, raw: RawRequest) -> float:
            status, answer = server.rank(raw)
            assert status == 200, answer
            done.append(name)
            return len(answer["scores"])

        with ThreadPoolExecutor(2) as threads:
            asking = threads.submit(ask, "long", long)
            wait_until(lambda: server.ask("GET", "/v1/state")[1]["queue"]["requests"] > 0, WAIT_S)
            assert threads.submit(ask, "short", short).result() == 3
            assert asking.result() == 9000
        assert done == ["short", "long"]


def test_deadlines_and_a_full_queue_have_their_own_statuses() -> None:
    with local_server(EagerLoader(), max_wait_ms=700.0, queue_requests=1) as server:
        raw = raws_of(1)[0]
        status, answer = server.rank(raw, **{"X-Timeout-Ms": "30"})
        assert (status, answer["error"]["type"]) == (504, "DeadlineError")
        assert server.rank(raw, **{"X-Timeout-Ms": "soon"})[0] == 400
        wait_until(lambda: server.ask("GET", "/v1/state")[1]["queue"]["requests"] == 0, WAIT_S)
        with ThreadPoolExecutor(1) as threads:
            waiting = threads.submit(server.rank, raw)
            wait_until(lambda: server.ask("GET", "/v1/state")[1]["queue"]["requests"] == 1, WAIT_S)
            status, answer = server.rank(raw)
            assert (status, answer["error"]["type"]) == (429, "OverloadError")
            assert waiting.result()[0] == 200
        with grpc_client.InferenceServerClient(server.grpc_url) as client:
            inputs = inputs_of(grpc_client, column_tensors([raw], SCHEMA))
            with pytest.raises(InferenceServerException) as late:
                client.infer("kvshare", inputs, client_timeout=0.05)
        assert late.value.status() == "StatusCode.DEADLINE_EXCEEDED"
        outcomes = server.ask("GET", "/v1/state")[1]["requests"]
        assert outcomes["deadline"] + outcomes["cancelled"] >= 2
        assert outcomes["overloaded"] == 1


def test_messages_and_requests_that_are_too_large_are_refused() -> None:
    limits = {"max_request_bytes": 20_000, "max_candidates": 5, "max_events": 9, "max_values": 6}
    with local_server(EagerLoader(), **limits) as server:
        assert server.rank(draw_raw(3, 6, 1))[1]["error"]["message"] == (
            "candidates.item_id has 6 candidates; at most 5 are allowed"
        )
        assert "at most 9" in server.rank(draw_raw(10, 2, 1))[1]["error"]["message"]
        many = draw_raw(1, 1, 1)
        many["context"]["country"] = ["GB"] * 7
        assert "at most 6" in server.rank(many)[1]["error"]["message"]
        assert server.rank(b" " * 20_001)[0] == 413
        assert server.rank(draw_raw(3, 2, 1))[0] == 200
        with grpc_client.InferenceServerClient(server.grpc_url) as client:
            text = np.array([b"x" * 30_000], dtype=object)
            with pytest.raises(InferenceServerException) as large:
                client.infer("kvshare", inputs_of(grpc_client, {"user_id": text}))
        assert large.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


def test_json_of_too_many_values_is_refused_on_every_path(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("open")
    said = {"Authorization": "Bearer open"}
    many = json.dumps(draw_raw(30, 2, 1) | {"more": [0] * 100}).encode()
    limits = {"max_json_values": 100, "token_file": str(tmp_path / "token")}
    with local_server(EagerLoader(), **limits) as server:
        for path in ("/v1/rank", "/v1/rank?stream=1", "/v2/models/kvshare/infer", "/v1/forget"):
            status, answer = server.ask("POST", path, many, said)
            assert status == 400
            assert "values; at most 100 are allowed" in json.dumps(answer)
        assert server.rank(draw_raw(3, 2, 1), **said)[0] == 200


def test_ids_too_long_are_refused_over_every_protocol(
    server: Asked,
    http_triton: http_client.InferenceServerClient,
    grpc_triton: grpc_client.InferenceServerClient,
) -> None:
    """Ids as long as a message were kept with the users."""
    for column, raw in (
        ("user_id", draw_raw(3, 2, 1) | {"user_id": "é" * 257}),
        ("candidates.item_id", draw_raw(3, 2, 1)),
    ):
        if column == "candidates.item_id":
            raw["candidates"]["item_id"][1] = "é" * 257
        message = f"{column} has 257 characters; at most 256 are allowed"
        assert server.rank(raw) == (
            400,
            {
                "request_id": raw["request_id"],
                "error": {"type": "RequestError", "message": message},
            },
        )
        tensors = column_tensors([raw], SCHEMA)
        for kit, client in ((http_client, http_triton), (grpc_client, grpc_triton)):
            with pytest.raises(InferenceServerException, match=message):
                client.infer("kvshare", inputs_of(kit, tensors))


def test_ids_of_messages_too_long_are_refused_over_every_protocol(
    server: Asked,
    http_triton: http_client.InferenceServerClient,
    grpc_triton: grpc_client.InferenceServerClient,
) -> None:
    """Over gRPC and in a header they were cut silently, in a body they were not."""
    raw, tensors = draw_raw(3, 2, 1), column_tensors([draw_raw(3, 2, 1)], SCHEMA)
    allowed = "has 201 characters; at most 200 are allowed"
    assert server.rank(raw, **{"X-Request-Id": "x" * 200})[0] == 200
    status, refusal = server.rank(raw, **{"X-Request-Id": "x" * 201})
    assert (status, refusal["error"]["message"]) == (400, f"X-Request-Id {allowed}")
    status, refusal = server.rank(raw | {"request_id": "x" * 201})
    assert (status, refusal["request_id"]) == (400, None)
    assert refusal["error"]["message"] == f"request_id {allowed}"
    for kit, client in ((http_client, http_triton), (grpc_client, grpc_triton)):
        inputs = inputs_of(kit, tensors)
        assert client.infer("kvshare", inputs, request_id="x" * 200).get_response()
        with pytest.raises(InferenceServerException, match=f"id {allowed}"):
            client.infer("kvshare", inputs, request_id="x" * 201)
    answers: queue.Queue[tuple[Any, Any]] = queue.Queue()
    grpc_triton.start_stream(lambda result, error: answers.put((result, error)))
    start = {"sequence_id": "x" * 201, "sequence_start": True}
    grpc_triton.async_stream_infer("kvshare", inputs_of(grpc_client, tensors), **start)
    assert f"sequence_id {allowed}" in str(answers.get(timeout=60)[1])
    grpc_triton.stop_stream()


def packets(num_packets: int) -> "asyncio.Queue[bytes | RequestError | None]":
    """A body that comes in packets, whose first line ends with the last of them."""
    chunks: asyncio.Queue[bytes | RequestError | None] = asyncio.Queue()
    for _ in range(num_packets):
        chunks.put_nowait(b"x" * 1_400)
    for end in (b"y\n \n\n", b"", b"z\n", b"last", None):
        chunks.put_nowait(end)
    return chunks


def test_lines_of_a_stream_are_found_in_linear_time() -> None:
    """The whole buffer was searched for each packet: 8 ms per 1.4 kB with 8 MiB buffered."""

    async def seconds(num_packets: int) -> float:
        chunks = packets(num_packets)
        start = time.process_time()
        lines = [line async for line in split_lines(chunks)]
        taken = time.process_time() - start
        assert lines == [b"x" * 1_400 * num_packets + b"y", b"z", b"last"]
        return taken

    small = min(asyncio.run(seconds(1_000)) for _ in range(7))
    assert min(asyncio.run(seconds(4_000)) for _ in range(7)) < 8 * small + 1e-3


def test_a_line_may_come_in_pieces(server: Asked) -> None:
    raw = draw_raw(9, 12, 5) | {"user_id": "pieces"}
    body = "".join(json.dumps(group) + "\r\n\n" for group in cut_candidates(raw, 4, 9)).encode()
    pieces = [body[place : place + 7] for place in range(0, len(body), 7)]
    connection = HTTPConnection(server.http_address, timeout=60.0)
    connection.request("POST", "/v1/rank?stream=1", iter(pieces), encode_chunked=True)
    events = [json.loads(line[6:]) for line in connection.getresponse() if line[:5] == b"data:"]
    connection.close()
    scores = [score for event in events[:-1] for score in event["scores"]]
    assert scores == pytest.approx(expected_scores([raw])[0], abs=2e-6)


def test_a_message_with_one_bad_request_is_refused_before_any_is_scored() -> None:
    with (
        local_server(EagerLoader(), max_candidates=5) as server,
        grpc_client.InferenceServerClient(server.grpc_url) as client,
    ):

        def num_lookups() -> int:
            assert server.rank(draw_raw(3, 2, 1))[0] == 200
            return server.ask("GET", "/v1/state")[1]["lookups"]

        for_each = num_lookups()
        tensors = column_tensors([draw_raw(3, 2, 2), draw_raw(3, 6, 3)], SCHEMA)
        with pytest.raises(InferenceServerException, match="6 candidates; at most 5"):
            client.infer("kvshare", inputs_of(grpc_client, tensors))
        assert num_lookups() == 2 * for_each


def test_streams_are_bounded_in_number_and_in_time() -> None:
    with local_server(EagerLoader(), max_streams=1, stream_timeout_s=1.5) as server:
        host, port = server.http_address.split(":")
        raw = draw_raw(5, 2, 1)
        with socket.create_connection((host, int(port)), 60.0) as connection:
            head = "POST /v1/rank?stream=1 HTTP/1.1\r\nHost: here\r\nTransfer-Encoding: chunked\r\n"
            connection.sendall(f"{head}\r\n".encode() + chunk(raw))
            receive_until(connection, b"first_candidate")
            status, answer = server.ask("POST", "/v1/rank?stream=1", json.dumps(raw).encode())
            assert (status, answer["error"]["type"]) == (429, "OverloadError")
            # A client that says nothing more is not waited for longer than a stream may take.
            assert b"DeadlineError" in receive_until(connection, b"event: error", b"}}")
        assert stream(server, [raw])[-1][0] == "end"


def test_a_client_that_does_not_read_blocks_no_other() -> None:
    """Its stream is read only while scores leave, and ends at the deadline."""
    with (
        local_server(EagerLoader(), stream_timeout_s=2.0, timeout_ms=60_000.0) as server,
        # Without the probe the window stays at 64 KiB, and is full after some answers.
        grpc.insecure_channel(server.grpc_url, [("grpc.http2.bdp_probe", 0)]) as channel,
    ):
        rank = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        num_sent = 0

        def messages() -> Iterator[bytes]:
            nonlocal num_sent
            for number in range(3000):
                num_sent += 1
                message = grpc_message(draw_raw(9, 2000, 1), "s", is_first=number == 0)
                yield message.SerializeToString()

        call = rank(messages())  # never read
        wait_until(lambda: "kvshare_streams_open 1.0" in server.ask("GET", "/metrics")[1], WAIT_S)
        assert server.rank(raws_of(1)[0])[0] == 200
        wait_until(lambda: "kvshare_streams_open 0.0" in server.ask("GET", "/metrics")[1], WAIT_S)
        assert num_sent < 1000
        call.cancel()
        assert server.rank(raws_of(2)[0])[0] == 200


def test_answers_of_a_cancelled_stream_are_no_errors(caplog: pytest.LogCaptureFixture) -> None:
    """A stream was cancelled while a refusal waited for room: asyncio logged a lost exception."""
    with (
        local_server(EagerLoader(), max_wait_ms=5000.0, stream_depth=1) as server,
        grpc.insecure_channel(server.grpc_url) as channel,
    ):
        rank = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")
        waits = grpc_message(draw_raw(9, 2, 1), "s")
        refused = service_pb2.ModelInferRequest(model_name="kvshare")
        call = rank(message.SerializeToString() for message in (waits, *[refused] * 4))
        wait_until(lambda: "kvshare_streams_open 1.0" in server.ask("GET", "/metrics")[1], WAIT_S)
        time.sleep(0.3)  # for those behind it to be read, were there room
        call.cancel()
        wait_until(lambda: "kvshare_streams_open 0.0" in server.ask("GET", "/metrics")[1], WAIT_S)
        gc.collect()
    assert [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR] == []


def test_connections_that_are_opened_and_dropped_cost_nothing(server: Asked) -> None:
    host, port = server.http_address.split(":")
    grpc_host, grpc_port = server.grpc_url.split(":")
    for number in range(1000):
        address = (host, int(port)) if number % 2 else (grpc_host, int(grpc_port))
        with socket.create_connection(address, 10.0) as connection:
            if number % 3 == 0:
                connection.sendall(
                    b"POST /v1/rank HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
                )
    assert server.rank(raws_of(1)[0])[0] == 200
    with grpc_client.InferenceServerClient(server.grpc_url) as client:
        assert client.is_server_ready()


def cut_candidates(raw: RawRequest, *places: int) -> list[RawRequest]:
    """A request with its first candidates, and groups with the others."""
    ends = [0, *places, len(raw["candidates"]["item_id"])]
    groups = [
        {"candidates": {column: cells[first:last] for column, cells in raw["candidates"].items()}}
        for first, last in pairwise(ends)
    ]
    return [raw | groups[0], *groups[1:]]


def stream(server: Asked, groups: list[RawRequest]) -> list[tuple[str, Any]]:
    """Server-sent events of a stream, by name."""
    body = "".join(json.dumps(group) + "\n" for group in groups).encode()
    status, text = server.ask("POST", "/v1/rank?stream=1", body)
    assert status == 200, text
    events = [event.split("\n") for event in text.strip().split("\n\n")]
    return [
        (name.removeprefix("event: "), json.loads(data.removeprefix("data: ")))
        for name, data in events
    ]


def chunk(value: Any) -> bytes:
    """A line of JSON as HTTP sends it in chunks."""
    line = json.dumps(value).encode() + b"\n"
    return f"{len(line):x}\r\n".encode() + line + b"\r\n"


def receive_until(connection: socket.socket, *marks: bytes) -> bytes:
    """What comes until it holds all the marks."""
    seen = b""
    while not all(mark in seen for mark in marks):
        received = connection.recv(65_536)
        assert received, seen
        seen += received
    return seen


# --- reports, ids and times of a request


def strange() -> RawRequest:
    """A request with ids that no table knows."""
    raw = draw_raw(3, 3, 6) | {"user_id": "nobody"}
    raw["history"]["item_id"] = ["100", "new", None]
    raw["candidates"]["item_id"] = ["newer", "101", "newest"]
    return raw


def unknown_of(raw: RawRequest) -> dict[str, int]:
    [request] = parse_all([raw])
    return unknown_ids(request)


def test_unknown_ids_are_told_over_every_protocol_if_asked_for(
    server: Asked,
    grpc_triton: grpc_client.InferenceServerClient,
    http_triton: http_client.InferenceServerClient,
) -> None:
    raw = strange()
    expected = unknown_of(raw)
    assert expected["candidates.item_id"] == 2
    assert "unknown_ids" not in server.rank(raw)[1]
    assert server.rank(raw | {"report": ["unknown_ids"]})[1]["unknown_ids"] == expected
    assert server.rank([raw, raw | {"report": ["unknown_ids"]}])[1][1]["unknown_ids"] == expected
    tensors = column_tensors([raw, raw], SCHEMA)
    for kit, client in ((grpc_client, grpc_triton), (http_client, http_triton)):
        silent = client.infer("kvshare", inputs_of(kit, tensors))
        assert silent.as_numpy("unknown_ids") is None
        told = client.infer(
            "kvshare", inputs_of(kit, tensors), parameters={"report": "unknown_ids"}
        ).as_numpy("unknown_ids")
        assert [json.loads(one) for one in told] == [expected, expected]
        with pytest.raises(InferenceServerException, match="the parameter report is weights"):
            client.infer("kvshare", inputs_of(kit, tensors), parameters={"report": "weights"})


def test_a_stream_tells_unknown_ids_with_each_group(server: Asked) -> None:
    raw = strange() | {"report": ["unknown_ids"]}
    more = {"candidates": raw["candidates"]}
    body = b"\n".join(json.dumps(line).encode() for line in (raw, more))
    _, text = server.ask("POST", "/v1/rank?stream=1", body)
    told = [json.loads(line[6:]) for line in text.splitlines() if line.startswith('data: {"first')]
    assert [one["unknown_ids"] for one in told] == [unknown_of(raw)] * 2


def counted(server: Asked, name: str) -> dict[str, float]:
    """Values of a counter by its column."""
    _, text = server.ask("GET", "/metrics")
    found = re.findall(rf'^{name}{{column="([^"]*)",model="kvshare"}} (\S+)$', text, re.M)
    return {column: float(value) for column, value in found}


def test_ids_are_counted_by_column_in_metrics(server: Asked) -> None:
    before = [counted(server, f"kvshare_{name}_total") for name in ("ids", "unknown_ids")]
    raw = strange()
    body = b"\n".join(json.dumps(one).encode() for one in (raw, {"candidates": raw["candidates"]}))
    assert server.rank(raw)[0] == 200
    server.ask("POST", "/v1/rank?stream=1", body)
    after = [counted(server, f"kvshare_{name}_total") for name in ("ids", "unknown_ids")]
    [request] = parse_all([raw])
    for column, (given, unknown) in count_ids(request).items():
        times = 3 if column.startswith("candidates.") else 2  # Of a stream the user counts once.
        moved = [
            late[column] - early.get(column, 0.0) for early, late in zip(before, after, strict=True)
        ]
        assert moved == [times * given, times * unknown], column


def test_a_history_out_of_order_or_from_the_future_is_refused_over_every_protocol(
    server: Asked,
    grpc_triton: grpc_client.InferenceServerClient,
    http_triton: http_client.InferenceServerClient,
) -> None:
    raw = draw_raw(3, 2, 6) | {"time": 50}
    for times, message in (
        ([10, 30, 20], r"history.time[2] is 20, before history.time[1] = 30"),
        ([10, 30, 50], r"history.time[2] is 50, not before the request's time 50"),
    ):
        raw["history"]["time"] = times
        status, answer = server.rank(raw)
        assert (status, answer["error"]["type"]) == (400, "RequestError")
        assert message in answer["error"]["message"]
        for kit, client in ((grpc_client, grpc_triton), (http_client, http_triton)):
            with pytest.raises(InferenceServerException, match=re.escape(message)):
                client.infer("kvshare", inputs_of(kit, column_tensors([raw], SCHEMA)))


def test_a_group_of_a_stream_comes_after_the_events(server: Asked) -> None:
    raw = draw_raw(3, 2, 6) | {"time": 50}
    raw["history"]["time"] = [10, 20, 30]
    late = {"candidates": raw["candidates"], "time": 30}
    body = b"\n".join(json.dumps(line).encode() for line in (raw, late))
    _, text = server.ask("POST", "/v1/rank?stream=1", body)
    assert "time is 30, not after the user's newest event at 30" in text


def test_a_server_may_sort_histories_and_counts_them() -> None:
    raw = draw_raw(4, 2, 6) | {"time": 50, "user_id": "sorted"}
    raw["history"]["time"] = [10, 20, 30, 40]
    mixed = copy.deepcopy(raw)
    mixed["history"] = {name: cells[::-1] for name, cells in raw["history"].items()}
    with local_server(EagerLoader(), timeout_ms=60_000.0, history_order="sort") as server:
        [expected] = expected_scores([raw])
        for one in (raw, mixed):
            assert server.rank(one)[1]["scores"] == pytest.approx(expected, rel=0.0, abs=2e-6)
        _, text = server.ask("GET", "/metrics")
        assert 'kvshare_sorted_histories_total{model="kvshare"} 1.0' in text
        status, answer = server.rank(mixed | {"time": 40})
        assert status == 400
        assert "history.time[3] is 40, not before the request's time 40" in str(answer)


def test_a_client_that_sends_the_last_events_hits_over_every_protocol(
    server: Asked,
    grpc_triton: grpc_client.InferenceServerClient,
    http_triton: http_client.InferenceServerClient,
) -> None:
    """The window moved with every event, so that it never hit."""
    whole = draw_raw(40, 3, 6) | {"user_id": "cuts its history"}

    def last(num_events: int, num_given: int) -> RawRequest:
        first = num_events - num_given
        cells = {name: cells[first:num_events] for name, cells in whole["history"].items()}
        return whole | {"history": cells | {"first_event": first}}

    uses = [server.rank(last(36, 20))[1]["cache"]["status"]]
    uses.append(server.rank(last(37, 20))[1]["cache"]["status"])
    for num_events, kit, client in ((38, grpc_client, grpc_triton), (39, http_client, http_triton)):
        tensors = column_tensors([last(num_events, 20)], SCHEMA)
        answer = client.infer("kvshare", inputs_of(kit, tensors))
        uses.append(answer.as_numpy("cache.status")[0].decode())
    assert uses == ["miss", "partial", "partial", "partial"]
