"""One server process under everything at once, for minutes: right scores, no loss, flat memory.

Cached users, new ones and growing histories over HTTP and gRPC, streams, bad requests, deadlines
that pass, dropped connections, clients that stop reading, a Redis that freezes; and at the end
SIGTERM in the middle of it. 8 seconds by default, 10 minutes with KVSHARE_SOAK=1.
"""

import json
import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPResponse, RemoteDisconnected
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.cache.servers import RedisServer
from tests.serving.servers import STOP_S, ServerProcess, grpc_message, running_server
from tests.worlds import PROBABILITY_TOLERANCE, SCHEMA, draw_raw, make_dlrm, parse_all
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine

IS_SOAK = os.environ.get("KVSHARE_SOAK") == "1"
DURATION_S = 600.0 if IS_SOAK else 8.0
WARM_UP = 0.25  # share of the time: caches, pools of threads and the allocator's arenas fill
MAX_SLOPE = 1.0  # MB a minute
# Seconds say nothing of a slope: arenas still fill by some MB then. What keeps each request, of
# 2 kB and some hundred a second, or each connection's buffers, grows by more than this.
MAX_GROWTH_MB = 60.0

# Redis freezes for three seconds of each fifteen, or once.
FREEZE_EVERY_S, FROZEN_FROM_S, FROZEN_TO_S = (15.0, 7.0, 10.0) if IS_SOAK else (8.0, 3.0, 5.0)

# Users who come again; of 200 the device has room for 85, of 80 for 21, and the host for as many.
NUM_KNOWN, KV_BYTES = (200, 512 * 1024) if IS_SOAK else (80, 128 * 1024)
LENGTHS = (4, 9, 14, 20)  # events of a history that grows
STREAM_S, HOLD_S = 3.0, 4.0  # of a stream at most; that a client does not read

# Requests are named after what is wrong with them; these are the ways in which they may end.
FINE, BAD, LATE, DROPPED = "fine", "bad", "late", "dropped"
OUTCOMES = {
    FINE: {"ok"},
    BAD: {"invalid"},
    LATE: {"ok", "deadline", "cancelled"},
    DROPPED: {"ok", "deadline", "cancelled", "invalid"},
}
SETTINGS = [
    "cache=tiered",
    f"cache.capacity_bytes={KV_BYTES}",
    f"cache.host.capacity_bytes={KV_BYTES}",
    "cache.remote.min_events=0",
    "cache.host.min_events=0",
    # Only Redis freezes here: a busy machine is not a slow server.
    "server.timeout_ms=60000",
    f"server.stream_timeout_s={STREAM_S}",
    "server.shadow_share=0.05",
]

RawRequest = dict[str, Any]


class Case(NamedTuple):
    """A request of a user whom the model does not know, and its scores without a cache."""

    raw: RawRequest
    scores: list[float]


class Ended(Exception):  # noqa: N818
    """The server was told to stop and takes no more requests."""


@dataclass
class Seen:
    """What the clients share.

    Attributes:
        cases: by the body's number, then by the length of the history.
        faults: what must not be; the first ends the run.
        answered: ids of requests whose scores came.
        latencies_ms: of plain requests.
        stop: set when the clients are to end.
        is_ending: whether the server was told to end.
    """

    cases: list[list[Case]]
    faults: list[str] = field(default_factory=list)
    answered: set[str] = field(default_factory=set)
    latencies_ms: list[float] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    stop: threading.Event = field(default_factory=threading.Event)
    is_ending: bool = False
    numbers: Iterator[int] = field(default_factory=count)

    def new_id(self, kind: str) -> str:
        return f"{kind}-{next(self.numbers)}"

    def draw(self, rng: random.Random, kind: str = FINE) -> Case:
        """A request of a user who was here before, maybe with fewer events, or of a new one."""
        is_known = rng.random() < 0.8
        number = rng.randrange(NUM_KNOWN) if is_known else next(self.numbers)
        case = rng.choice(self.cases[number % len(self.cases)])
        named = {"user_id": f"{'known' if is_known else 'new'} {number}"}
        return Case(case.raw | named | {"request_id": self.new_id(kind)}, case.scores)

    def check(self, case: Case, scores: list[float]) -> None:
        assert len(scores) == len(case.scores), (case.raw, scores)
        worst = max(abs(one - other) for one, other in zip(scores, case.scores, strict=True))
        assert worst <= PROBABILITY_TOLERANCE, (worst, case.raw, scores)
        self.answered.add(case.raw["request_id"])


def make_cases() -> list[list[Case]]:
    engine = Engine(RankingModel(make_dlrm(1)).eval(), SCHEMA, None)
    cases = []
    for seed in range(40):
        raw = draw_raw(LENGTHS[-1], 1 + seed % 9, seed) | {"user_id": "unknown to the model"}
        raws = [
            raw | {"history": {c: cells[:length] for c, cells in raw["history"].items()}}
            for length in LENGTHS
        ]
        scores = [answer.scores for answer in engine.rank(parse_all(raws))]
        cases.append([Case(*each) for each in zip(raws, scores, strict=True)])
    return cases


def test_minutes_of_everything_at_once_change_no_score_and_lose_nothing(
    artifact: Path, tmp_path: Path
) -> None:
    seed = random.randrange(2**32)
    seen = Seen(make_cases())
    room = ("--maxmemory", "32mb", "--maxmemory-policy", "allkeys-lru")
    with (
        RedisServer(tmp_path / "redis", *room) as redis,
        running_server(
            f"artifact={artifact}", *SETTINGS, f"cache.remote.url={redis.url}"
        ) as server,
        ThreadPoolExecutor(5) as threads,
    ):
        server.logs.clear()  # Of loading: libraries have their own words there.
        clients = (http_client, http_client, grpc_client, rude_client, mute_client)
        asking = [
            threads.submit(client, server, seen, random.Random(f"{seed}/{place}"))
            for place, client in enumerate(clients)
        ]
        outcomes: Counter[str] = Counter()
        served: set[str] = set()
        try:
            samples_mb = watch(server, redis, seen, outcomes, served)
            state = server.ask("GET", "/v1/state")[1]
            seen.is_ending = True
            server.process.send_signal(signal.SIGTERM)
            status = server.process.wait(STOP_S)
        finally:
            seen.is_ending = True
            seen.stop.set()
            redis.resume()
        for one in asking:
            one.result()
        wait_for_logs(server)
        read_logs(server, seen, outcomes, served)
    assert not seen.faults, "\n".join([f"seed {seed}", *seen.faults[:5]])
    slope, growth_mb = memory(samples_mb)
    p50, p99 = np.percentile(seen.latencies_ms, [50, 99])
    report = (
        f"seed {seed}: {len(seen.answered) / DURATION_S:.0f} requests/s, p50 {p50:.1f} ms, p99 "
        f"{p99:.1f} ms, {slope:.2f} MB/min, {growth_mb:.1f} MB more at {samples_mb[-1]:.0f} MB; "
        f"{dict(seen.done)}, {dict(outcomes)}, {state['hits_by_tier']}"
    )
    print(report)
    assert status == 0, report
    lost = {one for one in served if one.startswith(FINE)} - seen.answered
    assert not lost, (report, sorted(lost)[:5])
    # The run was what its name says.
    assert min(seen.done.values()) > 0, report
    assert all(state["hits_by_tier"].get(tier) for tier in ("pages", "host", "remote")), report
    assert state["parity"]["checks"] > 0, report
    assert not state["parity"]["alarm"], report
    if IS_SOAK:
        assert slope <= MAX_SLOPE, report
    assert growth_mb <= MAX_GROWTH_MB, report


# --- what is watched


def watch(
    server: ServerProcess,
    redis: RedisServer,
    seen: Seen,
    outcomes: Counter[str],
    served: set[str],
) -> list[float]:
    """Freeze Redis from time to time; returns the server's memory at each second, in MB."""
    start = time.monotonic()
    samples_mb, is_frozen = [], False
    while (elapsed_s := time.monotonic() - start) < DURATION_S and not seen.faults:
        should_freeze = FROZEN_FROM_S <= elapsed_s % FREEZE_EVERY_S < FROZEN_TO_S
        if should_freeze != is_frozen:
            (redis.pause if should_freeze else redis.resume)()
            is_frozen = should_freeze
        samples_mb.append(rss_mb(server.process.pid))
        read_logs(server, seen, outcomes, served)
        time.sleep(1.0)
    return samples_mb


def rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def memory(samples_mb: list[float]) -> tuple[float, float]:
    """MB a minute by least squares, and the most above the first, both after the warm-up."""
    warm = samples_mb[int(len(samples_mb) * WARM_UP) :]
    minutes = np.arange(len(warm)) / 60.0
    return float(np.polyfit(minutes, warm, 1)[0]), max(warm) - warm[0]


def read_logs(server: ServerProcess, seen: Seen, outcomes: Counter[str], served: set[str]) -> None:
    """Count what the server says of its requests; none may end in a way that it should not."""
    lines = server.logs[:]
    del server.logs[: len(lines)]  # Ten minutes of them are too many to keep.
    for line in lines:
        # The core of gRPC, which is C++, has words of its own as it closes its port.
        is_core = set(line) == {"message"} and "posix_engine_listener.cc" in line["message"]
        if line.get("level") not in ("INFO", "WARNING") and not is_core:
            seen.faults.append(f"in the log: {line}")
        if "outcome" in line:
            outcome, kind = line["outcome"], line["request_id"].split("-")[0]
            outcomes[outcome] += 1
            if outcome not in OUTCOMES.get(kind, {}):
                seen.faults.append(f"it ended so: {line}")
            if outcome == "ok":
                served.add(line["request_id"])


def wait_for_logs(server: ServerProcess) -> None:
    """Until the last lines of a server that has ended were read."""
    length = -1
    while length != len(server.logs):
        length = len(server.logs)
        time.sleep(0.5)


def until_told(seen: Seen, act: Callable[[], None]) -> None:
    """Again and again, until time is up or something is wrong."""
    try:
        while not seen.stop.is_set() and not seen.faults:
            act()
    except Ended:
        pass
    except BaseException as error:
        seen.faults.append(f"{type(error).__name__}: {str(error)[:2000]}")
        raise


# --- HTTP


def http_client(server: ServerProcess, seen: Seen, rng: random.Random) -> None:
    """Asks for scores over one connection."""
    acts = (rank, rank, rank, rank, rank_list, stream, ask_badly, ask_in_haste)
    with closing(HTTPConnection(server.http_address, timeout=60.0)) as connection:
        until_told(seen, lambda: rng.choice(acts)(connection, seen, rng))


def rank(connection: HTTPConnection, seen: Seen, rng: random.Random) -> None:
    case = seen.draw(rng)
    start = time.monotonic()
    status, body = post(connection, seen, "/v1/rank", case.raw, case.raw["request_id"])
    seen.latencies_ms.append((time.monotonic() - start) * 1e3)
    assert status == 200, body
    seen.check(case, json.loads(body)["scores"])
    seen.done["http"] += 1


def rank_list(connection: HTTPConnection, seen: Seen, rng: random.Random) -> None:
    cases = [seen.draw(rng) for _ in range(3)]
    raws = [case.raw for case in cases]
    status, body = post(connection, seen, "/v1/rank", raws, seen.new_id(FINE))
    assert status == 200, body
    for case, answer in zip(cases, json.loads(body), strict=True):
        seen.check(case, answer["scores"])
    seen.done["http lists"] += 1


def stream(connection: HTTPConnection, seen: Seen, rng: random.Random) -> None:
    case = seen.draw(rng)
    groups = cut(case.raw)
    body = "".join(json.dumps(group) + "\n" for group in groups).encode()
    status, text = post(connection, seen, "/v1/rank?stream=1", body, case.raw["request_id"])
    assert status == 200, text
    *events, end = text.decode().strip().split("\n\n")
    assert end.startswith("event: end"), text
    scores: list[float] = []
    for event in events:
        scores += json.loads(event.split("data: ")[1])["scores"]
    seen.check(case, scores)
    seen.done["http streams"] += 1


def ask_badly(connection: HTTPConnection, seen: Seen, rng: random.Random) -> None:
    raw = seen.draw(rng, BAD).raw
    raw_or_text: list[Any] = [
        b"{",
        json.dumps(raw).encode()[: rng.randrange(100)],
        raw | {"time": "now"},
        raw | {"history": {}},
        raw | {"candidates": raw["candidates"] | {"price": []}},
    ]
    path = rng.choice(["/v1/rank", "/v1/rank?stream=1", "/v2/models/kvshare/infer"])
    status, body = post(connection, seen, path, rng.choice(raw_or_text), raw["request_id"])
    assert status == 400, body
    assert json.loads(body)["error"], body
    seen.done["http bad"] += 1


def ask_in_haste(connection: HTTPConnection, seen: Seen, rng: random.Random) -> None:
    case = seen.draw(rng, LATE)
    timeout = {"X-Timeout-Ms": f"{rng.uniform(0.01, 8.0)}"}
    status, body = post(connection, seen, "/v1/rank", case.raw, case.raw["request_id"], timeout)
    assert status in (200, 504), body
    if status == 200:
        seen.check(case, json.loads(body)["scores"])
    else:
        assert json.loads(body)["error"]["type"] == "DeadlineError", body
        seen.done["http late"] += 1


def post(
    connection: HTTPConnection,
    seen: Seen,
    path: str,
    raw: Any,
    request_id: str,
    headers: dict[str, str] | None = None,
) -> tuple[int, bytes]:
    """Return the answer; a stopping server may refuse a request, but answers accepted ones."""
    body = raw if isinstance(raw, bytes) else json.dumps(raw).encode()
    try:
        connection.request("POST", path, body, {"X-Request-Id": request_id} | (headers or {}))
        response: HTTPResponse = connection.getresponse()
    except (ConnectionError, RemoteDisconnected):
        connection.close()
        if seen.is_ending:
            raise Ended from None
        raise
    return response.status, response.read()


PARTS = (slice(0, 1), slice(1, None))


def cut(raw: RawRequest) -> list[RawRequest]:
    """A request with its first candidate alone, and a group with the others."""
    columns = raw["candidates"].items()
    first, others = ({c: cells[part] for c, cells in columns} for part in PARTS)
    return [raw | {"candidates": first}, {"candidates": others}]


# --- gRPC


def grpc_client(server: ServerProcess, seen: Seen, rng: random.Random) -> None:
    """Asks for scores over one channel."""
    acts = (infer, infer, infer, sequences, infer_badly, infer_in_haste)
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        until_told(seen, lambda: rng.choice(acts)(stub, seen, rng))


def infer(stub: Any, seen: Seen, rng: random.Random) -> None:
    case = seen.draw(rng)
    start = time.monotonic()
    with refused_at_the_end(seen):
        response = stub.ModelInfer(grpc_message(case.raw), timeout=60.0)
    seen.latencies_ms.append((time.monotonic() - start) * 1e3)
    seen.check(case, scores_of(response))
    seen.done["grpc"] += 1


def sequences(stub: Any, seen: Seen, rng: random.Random) -> None:
    """Two users side by side in one stream, each with two groups, and a request of its own."""
    cases = [seen.draw(rng) for _ in range(3)]
    messages = []
    for is_last in (False, True):
        for place, case in enumerate(cases[:2]):
            group = case.raw | cut(case.raw)[is_last]
            messages.append(grpc_message(group, f"sequence {place}", not is_last, is_last))
    messages.insert(rng.randrange(5), grpc_message(cases[2].raw))
    scores_by_id: dict[str, list[float]] = {case.raw["request_id"]: [] for case in cases}
    num_answers = 0
    try:
        for response in stub.ModelStreamInfer(iter(messages), timeout=60.0):
            assert not response.error_message, response.error_message
            scores_by_id[response.infer_response.id] += scores_of(response.infer_response)
            num_answers += 1
    except grpc.RpcError as error:
        if seen.is_ending and not num_answers and error.code() == grpc.StatusCode.UNAVAILABLE:
            raise Ended from None
        raise
    assert num_answers == len(messages)
    for case in cases:
        seen.check(case, scores_by_id[case.raw["request_id"]])
    seen.done["grpc streams"] += 1


def infer_badly(stub: Any, seen: Seen, rng: random.Random) -> None:
    message = grpc_message(seen.draw(rng, BAD).raw)
    place = rng.randrange(len(message.inputs))
    rng.choice(
        [
            lambda: message.inputs[place].shape.append(2),
            lambda: message.raw_input_contents.pop(),
            lambda: setattr(message.inputs[place], "datatype", "FP16"),
            lambda: setattr(message.inputs[place], "name", "no column"),
        ]
    )()
    with pytest.raises(grpc.RpcError) as refused, refused_at_the_end(seen):
        stub.ModelInfer(message, timeout=60.0)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT, refused.value
    assert refused.value.details(), refused.value
    seen.done["grpc bad"] += 1


def infer_in_haste(stub: Any, seen: Seen, rng: random.Random) -> None:
    case, response = seen.draw(rng, LATE), None
    code = grpc.StatusCode.OK
    try:
        with refused_at_the_end(seen):
            response = stub.ModelInfer(grpc_message(case.raw), timeout=rng.uniform(1e-4, 8e-3))
    except grpc.RpcError as error:
        code = error.code()
    if response is not None:
        seen.check(case, scores_of(response))
    else:
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED, code
        seen.done["grpc late"] += 1


class refused_at_the_end(suppress):  # noqa: N801
    """A server that was told to end says that it is unavailable."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self._seen = seen

    def __exit__(self, kind: Any, error: Any, trace: Any) -> bool:
        is_refusal = (
            isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.UNAVAILABLE
        )
        if self._seen.is_ending and is_refusal:
            raise Ended from None
        return False


def scores_of(response: service_pb2.ModelInferResponse) -> list[float]:
    assert response.outputs[0].name == "scores"
    return np.frombuffer(response.raw_output_contents[0]).tolist()


# --- clients without manners


def rude_client(server: ServerProcess, seen: Seen, rng: random.Random) -> None:
    """Drops connections and calls in the middle."""
    acts = (drop_early, drop_late, drop_late, drop_call, drop_call)
    with grpc.insecure_channel(server.grpc_url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)

        def act() -> None:
            rng.choice(acts)(server, stub, seen, rng)
            seen.stop.wait(0.02)

        until_told(seen, act)


def mute_client(server: ServerProcess, seen: Seen, rng: random.Random) -> None:
    """Leaves answers unread."""
    until_told(seen, lambda: stop_reading(server, seen))


def connect(server: ServerProcess, seen: Seen, address: str) -> socket.socket:
    host, port = address.split(":")
    connection = socket.socket()
    # Before it is connected: the window is agreed upon then.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(10.0)
    try:
        connection.connect((host, int(port)))
    except ConnectionError:
        connection.close()
        if seen.is_ending:
            raise Ended from None
        raise
    return connection


def drop_early(server: ServerProcess, stub: Any, seen: Seen, rng: random.Random) -> None:
    """Nothing is sent, or not a whole request."""
    for address in (server.http_address, server.grpc_url):
        with connect(server, seen, address) as connection, suppress(ConnectionError):
            connection.sendall(head_of("/v1/rank", seen, 99)[: rng.randrange(200)])
            time.sleep(rng.random() * 0.01)
    seen.done["dropped early"] += 1


def drop_late(server: ServerProcess, stub: Any, seen: Seen, rng: random.Random) -> None:
    """A request or a part of a stream is sent, and its answer is not awaited."""
    raw = seen.draw(rng, DROPPED).raw
    line = json.dumps(raw).encode() + b"\n"
    path, announced = rng.choice([("/v1/rank", len(line)), ("/v1/rank?stream=1", len(line) + 99)])
    with connect(server, seen, server.http_address) as connection, suppress(ConnectionError):
        connection.sendall(head_of(path, seen, announced) + line)
        time.sleep(rng.random() * 0.01)
    seen.done["dropped late"] += 1


def drop_call(server: ServerProcess, stub: Any, seen: Seen, rng: random.Random) -> None:
    raw = seen.draw(rng, DROPPED).raw
    first = grpc_message(cut(raw)[0], "never ended")
    if rng.random() < 0.5:
        call = stub.ModelInfer.future(grpc_message(raw), timeout=60.0)
    else:
        call = stub.ModelStreamInfer(iter([first]), timeout=60.0)
    time.sleep(rng.random() * 0.01)
    call.cancel()
    seen.done["dropped calls"] += 1


def stop_reading(server: ServerProcess, seen: Seen) -> None:
    """A stream of large answers that nobody reads, for longer than a stream may take."""
    raw = draw_raw(9, 2000, 1) | {"request_id": seen.new_id(DROPPED)}
    group = json.dumps({"candidates": raw["candidates"]}).encode() + b"\n"
    held_until = time.monotonic() + HOLD_S
    with connect(server, seen, server.http_address) as connection, suppress(ConnectionError):
        head = head_of("/v1/rank?stream=1", seen, 2**30)
        connection.sendall(head + json.dumps(raw).encode() + b"\n")
        connection.settimeout(0.1)
        while time.monotonic() < held_until and not seen.stop.is_set():
            with suppress(TimeoutError):
                connection.send(group)
    seen.done["unread"] += 1
    seen.stop.wait(HOLD_S / 2)


def head_of(path: str, seen: Seen, length: int) -> bytes:
    request_id = seen.new_id(DROPPED)
    fields = f"Host: here\r\nX-Request-Id: {request_id}\r\nContent-Length: {length}"
    return f"POST {path} HTTP/1.1\r\n{fields}\r\n\r\n".encode()
