"""Thousands of broken requests over HTTP and gRPC: each is refused, and none harms the next.

Good requests are mutated at every level that a sender can get wrong: bits, JSON trees, tensors,
headers, paths. 1,000 by default, 20,000 with KVSHARE_SOAK=1; every failure shows the seed.
"""

import gc
import json
import logging
import os
import random
import socket
import string
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from http.client import HTTPConnection, RemoteDisconnected
from typing import Any, NamedTuple

import grpc
import numpy as np
import pytest
from aiohttp import ClientConnectionResetError
from aiohttp.http_exceptions import BadHttpMessage
from grpc._cython.cygrpc import ExecuteBatchError
from tritonclient.grpc import service_pb2

from tests.serving.servers import Asked, EagerLoader, local_server
from tests.worlds import PROBABILITY_TOLERANCE, SCHEMA, draw_raw, make_dlrm, parse_all
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.serving.columns import column_tensors

NUM_REQUESTS = 20_000 if os.environ.get("KVSHARE_SOAK") == "1" else 1_000
ROUND = 100  # broken requests between two good ones
MAX_SHOWN = 5  # faults in a failure's message

# Small limits are met more often. Deadlines are the requests' own: a busy machine is not slow.
LIMITS = {
    "max_request_bytes": 100_000,
    "max_requests": 8,
    "max_candidates": 40,
    "max_events": 60,
    "max_values": 150,
    "timeout_ms": 60_000.0,
    "stream_timeout_s": 60.0,
    "log_requests": False,
}
RANK, STREAM, INFER = "/v1/rank", "/v1/rank?stream=1", "/v2/models/kvshare/infer"
UNARY, STREAMED = "ModelInfer", "ModelStreamInfer"
LENGTH_HEADER = "Inference-Header-Content-Length"
INTERNAL_ERROR = "inside the server"

STATUSES = {200, 400, 404, 405, 413, 415, 417, 429, 504}
CODES = {
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
}

# JSON that json.dumps cannot write; a tree names them by their index.
# fmt: off
TEXTS = [
    "NaN", "Infinity", "-Infinity", "1e400", "-1e400", "1e-400", "-0", "-0.0", "00", "0x1", "+1",
    "9" * 400, "9" * 5000, "-" + "9" * 300, "1" + "0" * 299 + ".5", "'a'", "undefined", "",
    '"\\ud800"', '"\\udfff\\ud800"', '"\\u0000"', '"\\x"', '"\t"', '"\x7f"',
    '{"a": 1, "a": 2}', '{"item_id": [], "item_id": []}', "[1,]", "{,}", "]", "}", '"',
    *("[" * deep + "]" * deep for deep in (50, 500, 980, 5000)),
    *('{"a":' * deep + "1" + "}" * deep for deep in (50, 500, 980, 5000)),
]
VALUES = [
    None, True, False, 0, -1, 1, 7, 0.5, -0.5, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63), 2**64,
    10**30, 1e30, 1.1e30, 1e308, -1e308, "", "0", "x", "\0", "é" * 50, "x" * 5000, "\u202e",
    [], {}, [[]], [None], [[None]], [0], [-1], ["x"], [[1, 2], 3], {"a": 1}, {"": {}}, [1] * 300,
    "user 1", "100", "GB", "kvshare", "scores", "INT64", "BYTES", "FP64", "BOOL",
]
# fmt: on
NUMBERS = [0, 1, -1, 2, 3, 41, 61, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63)]
HEADERS: list[tuple[str, list[str]]] = [
    (LENGTH_HEADER, ["0", "1", "-1", "99999999", "x", "", "1.5", "+1", "\xb2", "9" * 5000, "1, 2"]),
    ("X-Timeout-Ms", ["0", "-1", "nan", "inf", "1e-9", "0.01", "1e308", "", "soon", "9" * 5000]),
    ("Content-Encoding", ["gzip", "deflate", "br", "zstd", "identity", "x", "gzip, gzip"]),
    ("X-Request-Id", ["", "x" * 5000, "\xff\xfe", "a\tb", '"', "\\ud800"]),
    ("Content-Type", ["", "text/plain", "multipart/form-data", "x", "a/b; charset=nothing"]),
    ("Accept-Encoding", ["gzip", "*;q=0", "\xff"]),
    ("Authorization", ["Bearer", "Bearer x", "Basic \xff", ""]),
    ("Expect", ["100-continue", "x"]),
    ("Connection", ["close", "upgrade", "x"]),
    ("Upgrade", ["websocket", "h2c"]),
    ("Range", ["bytes=0-1", "x"]),
    ("Cookie", ["a", "=;=", "\xff"]),
]
METHODS = ["GET", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE", "POST", "NONSENSE"]
PATHS = [
    *("/", "/v1", "/v1/", "/v1/rank/", "/v1/example", "/v1/example?model=x", "/v1/state"),
    *("/v1/rank?model=x", "/v1/rank?model=&version=9", "/v1/rank?stream=2", "/v1/rank?stream=%ff"),
    *("/v2/models/x/infer", "/v2/models/kvshare/versions/9/infer", "/v2/models/%00/ready"),
    *("/v2/models/kvshare/versions/1/infer", "/v2/models//infer", "/v2/models/..%2f..%2f/infer"),
    *("/v2", "/v2/health/live", "/v2/models/%ff%fe", "/metrics", "//", "/%", "/..", "*"),
    *("/v1/rank?" + "a" * 3000, "/" + "a" * 7000, "/v1/rank?stream=1&stream=1&model=%ed%a0%80"),
]


GOOD = [draw_raw(3 + 4 * seed, 1 + seed, seed) for seed in range(4)]
GOOD_SCORES = [
    answer.scores
    for answer in Engine(RankingModel(make_dlrm(1)).eval(), SCHEMA, None).rank(parse_all(GOOD))
]


class Tensor(NamedTuple):
    """A tensor as a message has it, whatever it claims."""

    name: str
    datatype: str
    shape: list[int]
    data: bytes


class Sent(NamedTuple):
    """An HTTP request."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]


class Called(NamedTuple):
    """A gRPC call: the bytes of its messages."""

    method: str
    messages: list[bytes]
    timeout_s: float


# --- the test


def test_no_broken_request_breaks_the_server(caplog: pytest.LogCaptureFixture) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    faults: dict[str, str] = {}  # one request for each way to fail
    ends: Counter[str] = Counter()
    with local_server(EagerLoader(), **LIMITS) as server:
        check_good_requests(server)
        threads = threading.enumerate()
        with Clients(server) as clients:
            for number in range(NUM_REQUESTS):
                broken = draw_sent(rng) if rng.random() < 0.6 else draw_called(rng)
                try:
                    ends[clients.send(broken)] += 1
                except AssertionError as error:
                    faults.setdefault(str(error)[:500], shown(broken))
                if number % ROUND == ROUND - 1:
                    check_good_requests(server)
                    assert all(thread.is_alive() for thread in threads), f"seed {seed}"
            clients.send_raw(rng, faults)
        wait_for_rest(server)
    logged = errors_in(caplog)
    assert not faults, f"seed {seed}: {len(faults)} faults, {[*faults.items()][:MAX_SHOWN]}"
    assert not logged, f"seed {seed}: {len(logged)} errors in the log, {logged[:MAX_SHOWN]}"
    # Some mutations leave a request whole; most do not.
    assert 0.02 < (ends["200"] + ends["OK"]) / NUM_REQUESTS < 0.5, f"seed {seed}: {ends}"
    assert {"400", "404", "405", "413", "INVALID_ARGUMENT"} <= set(ends), f"seed {seed}: {ends}"


def errors_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What was logged as an error, each once."""
    gc.collect()  # asyncio logs exceptions that were never retrieved.
    found = {}
    for record in caplog.records:
        error = record.exc_info[1] if record.exc_info else None
        # gRPC and aiohttp log passed deadlines, bytes that are not HTTP, and clients that have gone
        # before "100 Continue"; none reaches our code.
        is_late = isinstance(error, ExecuteBatchError)
        is_theirs = isinstance(error, BadHttpMessage | ClientConnectionResetError)
        if record.levelno >= logging.ERROR and not is_late and not is_theirs:
            found[f"{record.name}: {record.getMessage()[:300]} {error!r:.300}"] = None
    return [*found]


def broken_id() -> bytes:
    tree = tree_of(tensors_of(GOOD), is_binary=False) | {"id": float("nan")}
    return json.dumps(tree).encode()


def test_what_broke_it_once_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    """Each was a 500, or UNKNOWN, with a traceback in the log."""
    raw = json.dumps(GOOD[1]).encode()
    broken: list[Sent | Called] = [
        *(
            Sent("POST", path, raw, {"Content-Encoding": coding})
            for path in (RANK, STREAM, INFER)
            for coding in ("gzip", "deflate", "br", "zstd")
        ),
        Sent("POST", INFER, raw, {LENGTH_HEADER: "9" * 5000}),
        Sent("POST", INFER, broken_id(), {}),
        Called(UNARY, [b"\xff"], 60.0),
        Called(STREAMED, [b"\xff"], 60.0),
    ]
    faults: dict[str, str] = {}
    with local_server(EagerLoader(), **LIMITS) as server:
        with Clients(server) as clients:
            for one in broken:
                try:
                    assert clients.send(one) not in ("200", "OK") or one.method == STREAMED
                except AssertionError as error:
                    faults[shown(one)[:300]] = str(error)[:300]
        check_good_requests(server)
    assert not faults, faults
    assert not errors_in(caplog)


def check_good_requests(server: Asked) -> None:
    """Check scores over HTTP, gRPC and a stream."""
    status, answers = server.rank(GOOD)
    assert status == 200, answers
    message = message_of(tensors_of(GOOD)).SerializeToString()
    with grpc.insecure_channel(server.grpc_url) as channel:
        text = channel.unary_unary(name_of(UNARY))(message, timeout=60.0)
        [streamed] = channel.stream_stream(name_of(STREAMED))(iter([message]), timeout=60.0)
    replies = [
        service_pb2.ModelInferResponse.FromString(text),
        service_pb2.ModelStreamInferResponse.FromString(streamed).infer_response,
    ]
    flat = [score for scores in GOOD_SCORES for score in scores]
    by_grpc = [np.frombuffer(reply.raw_output_contents[0]).tolist() for reply in replies]
    by_http = [score for answer in answers for score in answer["scores"]]
    for scores in (by_http, *by_grpc):
        assert scores == pytest.approx(flat, rel=0.0, abs=PROBABILITY_TOLERANCE)


def wait_for_rest(server: Asked) -> None:
    """Nothing waits, and no stream is open, once the senders are gone."""
    deadline = time.monotonic() + 60.0
    while True:
        queued = server.ask("GET", "/v1/state")[1]["queue"]["requests"]
        is_open = "kvshare_streams_open 0.0" not in server.ask("GET", "/metrics")[1]
        if not queued and not is_open:
            return
        assert time.monotonic() < deadline, (queued, is_open)
        time.sleep(0.05)


def shown(broken: Sent | Called) -> str:
    """Enough of a request to send it again."""
    text = repr(broken)
    return text if len(text) < 3000 else f"{text[:3000]}... of {len(text)}"


# --- HTTP and gRPC clients


class Clients:
    """Connections over HTTP and gRPC, opened again when the server has closed one."""

    def __init__(self, server: Asked) -> None:
        self._server = server
        self._http = HTTPConnection(server.http_address, timeout=60.0)
        self._channel = grpc.insecure_channel(server.grpc_url)

    def __enter__(self) -> "Clients":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()
        self._channel.close()

    def send(self, broken: Sent | Called) -> str:
        """The status, once it is one of those that are allowed and says why."""
        return self._ask(broken) if isinstance(broken, Sent) else self._call(broken)

    def _ask(self, sent: Sent) -> str:
        try:
            status, text = self._answer(sent)
        except (RemoteDisconnected, ConnectionError):
            # It may have closed the connection after its last answer; not a new one.
            self._http.close()
            try:
                status, text = self._answer(sent)
            except (RemoteDisconnected, ConnectionError) as error:
                self._http.close()
                raise AssertionError(f"no answer: {error!r}") from error
        assert status in STATUSES, (status, text[:300])
        if status >= 400 and sent.method != "HEAD":
            assert message_in(sent, text), (status, text[:300])
        if status == 200 and sent.path == STREAM and sent.method == "POST":
            check_events(text.decode())
        elif status == 200 and sent.path in (RANK, INFER) and sent.method == "POST":
            assert INTERNAL_ERROR.encode() not in text, text[:300]
        return str(status)

    def _answer(self, sent: Sent) -> tuple[int, bytes]:
        self._http.request(sent.method, sent.path, sent.body, sent.headers)
        response = self._http.getresponse()
        return response.status, response.read()

    def _call(self, called: Called) -> str:
        name = name_of(called.method)
        try:
            if called.method == UNARY:
                rank = self._channel.unary_unary(name)
                text = rank(called.messages[0], timeout=called.timeout_s)
                service_pb2.ModelInferResponse.FromString(text)
                return "OK"
            rank_stream = self._channel.stream_stream(name)
            texts = [*rank_stream(iter(called.messages), timeout=called.timeout_s)]
        except grpc.RpcError as error:
            code, details = error.code(), error.details()
        else:
            check_replies(texts, len(called.messages))
            return "OK"
        assert code in CODES, (code, details)
        assert details, code
        return code.name

    def send_raw(self, rng: random.Random, faults: dict[str, str]) -> None:
        """Requests whose first lines are broken too, and connections that end in the middle."""
        for _ in range(NUM_REQUESTS // 20):
            sent = draw_sent(rng)
            head = [f"{sent.method} {sent.path} HTTP/1.1", "Host: here"]
            head += [f"{name}: {value}" for name, value in sent.headers.items()]
            head.append(f"Content-Length: {len(sent.body)}")
            text = "\r\n".join([*head, "", ""]).encode("latin-1") + sent.body
            broken = flip(rng, text)
            answer = say(self._server, self._server.http_address, broken)
            if b" 500 " in answer[:20] or INTERNAL_ERROR.encode() in answer:
                faults.setdefault(f"{answer[:300]!r}", f"{broken[:3000]!r}")
            say(self._server, self._server.grpc_url, broken)


def say(server: Asked, address: str, text: bytes) -> bytes:
    """What comes back to some bytes with nothing behind them."""
    host, port = address.split(":")
    seen = b""
    with (
        socket.create_connection((host, int(port)), 10.0) as connection,
        suppress(OSError),  # It closes what is no HTTP before it has read it all.
    ):
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        while received := connection.recv(65_536):
            seen += received
    return seen


def name_of(method: str) -> str:
    return f"/inference.GRPCInferenceService/{method}"


def message_in(sent: Sent, text: bytes) -> str:
    """Of an answer that is an error."""
    try:
        error = json.loads(text)["error"]
    except ValueError:
        return text.decode()  # What is no HTTP is refused before any of our code.
    return error if sent.path.startswith("/v2") else error["message"]


def check_events(text: str) -> None:
    """Scores, then the end or an error with a message."""
    *events, last = text.strip().split("\n\n")
    assert all(event.startswith("event: scores\ndata: ") for event in events), text[:300]
    name, data = last.split("\n")
    assert name in ("event: end", "event: error"), text[-300:]
    if name == "event: error":
        message = json.loads(data.removeprefix("data: "))["error"]["message"]
        assert message, last
        assert INTERNAL_ERROR not in message, last


def check_replies(texts: list[bytes], num_messages: int) -> None:
    """One for each message, scores or an error in words."""
    assert len(texts) == num_messages, (len(texts), num_messages)
    for text in texts:
        reply = service_pb2.ModelStreamInferResponse.FromString(text)
        assert bool(reply.error_message) != bool(reply.infer_response.outputs), reply
        assert INTERNAL_ERROR not in reply.error_message, reply


# --- requests over HTTP


def draw_sent(rng: random.Random) -> Sent:
    path = rng.choice([RANK, STREAM, INFER])
    body, headers = draw_body(rng, path)
    draw = rng.random()
    if draw < 0.55:
        mutate = rng.choice([flip, cut, double, noise])
        return Sent("POST", path, mutate(rng, body), headers)
    if draw < 0.8:
        for name, values in rng.sample(HEADERS, rng.randrange(1, 3)):
            headers[name] = rng.choice(values)
        return Sent("POST", path, body, headers)
    if draw < 0.95:
        return Sent(rng.choice(METHODS), rng.choice([*PATHS, path]), body, headers)
    return Sent("POST", path, body + b" " * rng.randrange(90_000, 120_000), headers)


def draw_body(rng: random.Random, path: str) -> tuple[bytes, dict[str, str]]:
    """A body that is broken above the level of its bits, or good."""
    raws = draw_raws(rng)
    if path == RANK:
        tree: Any = raws if len(raws) > 1 else raws[0]
        return text_of(rng, mutate_tree(rng, tree)), {}
    if path == STREAM:
        groups = [raws[0], *({"candidates": raw["candidates"]} for raw in raws[1:])]
        return b"\n".join(text_of(rng, mutate_tree(rng, group)) for group in groups), {}
    tensors = mutate_tensors(rng, tensors_of(raws))
    if rng.random() < 0.5:
        return text_of(rng, mutate_tree(rng, tree_of(tensors, is_binary=False))), {}
    tree = mutate_tree(rng, tree_of(tensors, is_binary=True))
    head = text_of(rng, tree)
    return head + b"".join(one.data for one in tensors), {LENGTH_HEADER: str(len(head))}


def draw_raws(rng: random.Random) -> list[dict[str, Any]]:
    count = rng.choice([1, 1, 1, 2, 3, 9])
    return [draw_raw(rng.randrange(25), rng.randrange(12), rng.randrange(50)) for _ in range(count)]


def mutate_tree(rng: random.Random, tree: Any) -> Any:
    """The tree with some values that are others, gone, or twice."""
    tree = json.loads(json.dumps(tree))  # A copy: the drawn ones share nothing with it.
    for _ in range(rng.choice([0, 0, 1, 1, 2, 5])):
        parent, key = draw_place(rng, tree)
        if parent is None:
            return draw_value(rng)
        draw = rng.random()
        if draw < 0.6:
            parent[key] = draw_value(rng)
        elif draw < 0.75:
            del parent[key]
        elif draw < 0.9 and isinstance(parent, list):
            parent.insert(key, deepcopy(parent[key]))
        elif isinstance(parent, dict):
            parent[rng.choice(["", "x", "time", "parameters", "\0", "x" * 300])] = deepcopy(
                parent[key]
            )
    return tree


def draw_place(rng: random.Random, tree: Any) -> tuple[Any, Any]:
    """Somewhere in the tree: a container and a key of it; None for the whole."""
    parent, key = None, None
    while isinstance(tree, dict | list) and tree and rng.random() < 0.85:
        parent, key = tree, rng.choice([*(tree if isinstance(tree, dict) else range(len(tree)))])
        tree = parent[key]
    return parent, key


def draw_value(rng: random.Random) -> Any:
    # A copy, as what it becomes part of is mutated again.
    is_text = rng.random() < 0.4
    return f"@{rng.randrange(len(TEXTS))}@" if is_text else deepcopy(rng.choice(VALUES))


def text_of(rng: random.Random, tree: Any) -> bytes:
    """JSON of a tree, with the texts that it names, and maybe a key twice."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    for place, other in enumerate(TEXTS):
        text = text.replace(f'"@{place}@"', other)
    if rng.random() < 0.05:
        text = text.replace("{", '{"time": 3, ', rng.randrange(1, 4))
    return text.encode()


# --- tensors, for HTTP and gRPC


def tensors_of(raws: list[dict[str, Any]]) -> list[Tensor]:
    tensors = []
    for name, values in column_tensors(raws, SCHEMA).items():
        is_text = values.dtype == object
        datatype = "BYTES" if is_text else {"i": "INT64", "f": "FP64"}[values.dtype.kind]
        elements = [len(one).to_bytes(4, "little") + one for one in values] if is_text else []
        data = b"".join(elements) if is_text else values.tobytes()
        tensors.append(Tensor(name, datatype, [*values.shape], data))
    return tensors


def mutate_tensors(rng: random.Random, tensors: list[Tensor]) -> list[Tensor]:
    """Some of them with another name, type, shape or content; or gone, or twice."""
    tensors = [*tensors]
    for _ in range(rng.choice([0, 0, 1, 1, 2, 4])):
        place = rng.randrange(len(tensors))
        mutate = rng.choice(
            [rename, retype, reshape, renumber, renumber, recount, cut_data, flipped]
        )
        draw = rng.random()
        if draw < 0.8:
            tensors[place] = mutate(rng, tensors[place])
        elif draw < 0.9 and len(tensors) > 1:
            del tensors[place]
        else:
            tensors.append(tensors[place])
    if rng.random() < 0.1:
        rng.shuffle(tensors)
    return tensors


def rename(rng: random.Random, tensor: Tensor) -> Tensor:
    names = ["", "x", "x" * 300, "scores", "history.item_id", "\0", tensor.name + " ", "user_id"]
    return tensor._replace(name=rng.choice(names))


def retype(rng: random.Random, tensor: Tensor) -> Tensor:
    datatypes = ["INT64", "BYTES", "FP32", "FP64", "INT32", "BOOL", "", "int64", "x" * 300]
    return tensor._replace(datatype=rng.choice(datatypes))


def reshape(rng: random.Random, tensor: Tensor) -> Tensor:
    shapes = [[], [rng.choice(NUMBERS)], [*tensor.shape, 1], [2**62, 4], [0] * 50, [-1]]
    return tensor._replace(shape=rng.choice(shapes))


def renumber(rng: random.Random, tensor: Tensor) -> Tensor:
    """Of eight bytes each, some are another number: a negative or overflowing length, NaN."""
    values = np.frombuffer(tensor.data[: len(tensor.data) // 8 * 8], np.int64).copy()
    for place in range(values.size):
        if rng.random() < 0.3:
            values[place] = rng.choice([*NUMBERS, int(np.float64(np.nan).view(np.int64))])
    # Four such lengths are 0 in 64 bits.
    if rng.random() < 0.2:
        values = np.concatenate([values, np.full(4, 2**62)])
    return tensor._replace(data=values.tobytes(), shape=[values.size])


def recount(rng: random.Random, tensor: Tensor) -> Tensor:
    """Other numbers of elements: none, one, or more than may come."""
    count = rng.choice([0, 1, 2, 9, 41, 61, 151, 1000])
    size = 4 if tensor.datatype == "BYTES" else 8
    return tensor._replace(data=b"\1\0\0\0\0\0\0\0"[-size:] * count, shape=[count])


def cut_data(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor._replace(data=cut(rng, tensor.data))


def flipped(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor._replace(data=flip(rng, tensor.data))


def tree_of(tensors: list[Tensor], is_binary: bool) -> dict[str, Any]:
    """The JSON of a message."""
    inputs = []
    for one in tensors:
        tree = {"name": one.name, "datatype": one.datatype, "shape": one.shape}
        if is_binary:
            inputs.append(tree | {"parameters": {"binary_data_size": len(one.data)}})
        else:
            inputs.append(tree | {"data": elements_of(one)})
    outputs = [{"name": "scores", "parameters": {"binary_data": True}}, {"name": "cache.tier"}]
    parameters = {"binary_data_output": False}
    return {"id": "m1", "inputs": inputs, "outputs": outputs, "parameters": parameters}


def elements_of(tensor: Tensor) -> list[Any]:
    dtype = {"INT64": np.int64, "FP64": np.float64, "FP32": np.float32}.get(tensor.datatype)
    if dtype is None:
        return texts_in(tensor.data)
    size = np.dtype(dtype).itemsize
    return np.frombuffer(tensor.data[: len(tensor.data) // size * size], dtype).tolist()


def texts_in(data: bytes) -> list[str]:
    """Elements after their lengths, as far as the data go."""
    texts, end = [], 0
    while end + 4 <= len(data):
        start, end = end + 4, end + 4 + int.from_bytes(data[end : end + 4], "little")
        texts.append(data[start:end].decode("latin-1"))
    return texts


# --- gRPC calls


def draw_called(rng: random.Random) -> Called:
    timeout_s = rng.choice([60.0] * 9 + [1e-4, 1e-3])
    if rng.random() < 0.5:
        return Called(UNARY, [draw_message(rng)], timeout_s)
    return Called(STREAMED, [draw_message(rng) for _ in range(rng.randrange(5))], timeout_s)


def draw_message(rng: random.Random) -> bytes:
    tensors = tensors_of(draw_raws(rng))
    if rng.random() < 0.3:
        tensors = [one for one in tensors if one.name.startswith("candidates.")]
    message = message_of(mutate_tensors(rng, tensors))
    for mutate in (name_otherwise, join_sequence, refill):
        if rng.random() < 0.3:
            mutate(rng, message)
    text = message.SerializeToString()
    if rng.random() < 0.3:
        text = rng.choice([flip, cut, double, noise])(rng, text)
    return text + (b"\0" * 120_000 if rng.random() < 0.02 else b"")


def message_of(tensors: list[Tensor]) -> service_pb2.ModelInferRequest:
    message = service_pb2.ModelInferRequest(model_name="kvshare", id="m1")
    for one in tensors:
        message.inputs.add(name=one.name, datatype=one.datatype, shape=one.shape)
        message.raw_input_contents.append(one.data)
    return message


def name_otherwise(rng: random.Random, message: service_pb2.ModelInferRequest) -> None:
    message.model_name = rng.choice(["", "kvshare", "x", "x" * 5000, "\0"])
    message.model_version = rng.choice(["", "", "1", "2", "-1", "x" * 300])
    message.id = rng.choice(["", "x" * 5000, "\u202e", "\0"])
    for _ in range(rng.randrange(3)):
        message.outputs.add(name=rng.choice(["scores", "scores", "x", "", "x" * 5000]))


def join_sequence(rng: random.Random, message: service_pb2.ModelInferRequest) -> None:
    """Its first, its last, or one of no sequence; of an id that is a number, a text or neither."""
    parameter = message.parameters["sequence_id"]
    rng.choice(
        [
            lambda: setattr(parameter, "int64_param", rng.choice([0, 1, -1, 2**63 - 1])),
            lambda: setattr(parameter, "string_param", rng.choice(["", "s", "x" * 5000])),
            lambda: setattr(parameter, "bool_param", True),
            lambda: None,
        ]
    )()
    for name in ("sequence_start", "sequence_end"):
        if rng.random() < 0.8:
            message.parameters[name].bool_param = rng.random() < 0.5
        elif rng.random() < 0.5:
            message.parameters[name].string_param = "true"


def refill(rng: random.Random, message: service_pb2.ModelInferRequest) -> None:
    """Data in typed contents, in the right ones or in others, and maybe in both places."""
    fill: list[Callable[[Any], object]] = [
        lambda contents: contents.int64_contents.extend([0, -1, 2**62]),
        lambda contents: contents.bytes_contents.extend([b"", b"\xff", b"user 1"]),
        lambda contents: contents.fp64_contents.extend([np.nan, np.inf, 1e308]),
        lambda contents: contents.fp32_contents.append(1.0),
        lambda contents: contents.bool_contents.append(True),
    ]
    for one in message.inputs:
        if rng.random() < 0.5:
            rng.choice(fill)(one.contents)
    if rng.random() < 0.8:
        del message.raw_input_contents[rng.randrange(-1, 3) :]


# --- bytes


def flip(rng: random.Random, text: bytes) -> bytes:
    """With some bits the other way."""
    flipped_text = bytearray(text)
    for _ in range(rng.choice([1, 1, 2, 8]) if text else 0):
        flipped_text[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
    return bytes(flipped_text)


def cut(rng: random.Random, text: bytes) -> bytes:
    """Without a part of it."""
    first, last = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    return rng.choice([text[:last], text[first:], text[:first] + text[last:]])


def double(rng: random.Random, text: bytes) -> bytes:
    """With a part of it twice."""
    first, last = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    return text[:last] + text[first:]


def noise(rng: random.Random, text: bytes) -> bytes:
    """Any bytes, or any letters that JSON is made of."""
    length = rng.choice([0, 1, 3, 30, 300, 5000])
    if rng.random() < 0.5:
        return rng.randbytes(length)
    return "".join(rng.choices('[]{}",:.-\\ \n' + string.hexdigits, k=length)).encode()
