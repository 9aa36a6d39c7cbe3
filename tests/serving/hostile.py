"""Hostile clients in a process of their own: ``python -m`` with a JSON object of ``Target``'s
fields. They run until standard input ends, and print how often each acted.

Silent and slow ones, bodies and calls that never end, messages that are huge, deep, or have
thousands of keys, more streams than there may be, and none with the token. Imports no torch: it
starts in no time, and takes few turns of the cores that the server has.
"""

import json
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

PAUSE_S = 0.05  # between two rounds of a kind
HALF_BYTES = 100_000  # of a body that ends there
KIB = 2**10


@dataclass(frozen=True)
class Target:
    """The server, and what the clients send.

    Attributes:
        http: host and port.
        grpc: host and port.
        token: that is accepted.
        raw: a good request.
        message_file: the same as a message that starts a sequence.
        max_request_bytes: of the server.
    """

    http: str
    grpc: str
    token: str
    raw: dict[str, Any]
    message_file: str
    max_request_bytes: int

    def head(self, path: str, num_bytes: int, *, has_token: bool = True) -> bytes:
        """Of an HTTP request."""
        fields = ["Host: here", f"Content-Length: {num_bytes}"]
        fields += [f"Authorization: Bearer {self.token}"] * has_token
        return "\r\n".join([f"POST {path} HTTP/1.1", *fields, "", ""]).encode()


class Sockets:
    """So many connections of one kind; one that was closed is opened again.

    Args:
        address: of the server.
        num_open: at once.
        begin: what each sends first.
        go_on: what it sends in every round.
    """

    def __init__(self, address: str, num_open: int, begin: bytes, go_on: bytes = b"") -> None:
        self._address = address.split(":")
        self._begin = begin
        self._go_on = go_on
        self._open: list[socket.socket | None] = [None] * num_open

    def act(self) -> None:
        """One round: open what is closed, read what came, send a little more."""
        for index, connection in enumerate(self._open):
            try:
                self._open[index] = self._connected() if connection is None else connection
                self._exchange(self._open[index])
            except OSError:
                self._close(index)

    def close(self) -> None:
        """End them."""
        for index in range(len(self._open)):
            self._close(index)

    def _connected(self) -> socket.socket:
        host, port = self._address
        connection = socket.create_connection((host, int(port)), 5.0)
        connection.settimeout(0.5)
        connection.sendall(self._begin)
        connection.setblocking(False)
        return connection

    def _exchange(self, connection: socket.socket | None) -> None:
        assert connection is not None
        with suppress(BlockingIOError):
            if not connection.recv(65_536):
                raise ConnectionResetError
        if self._go_on:
            with suppress(BlockingIOError):
                connection.send(self._go_on)

    def _close(self, index: int) -> None:
        connection, self._open[index] = self._open[index], None
        if connection is not None:
            connection.close()


def kinds_of_sockets(target: Target) -> dict[str, Sockets]:
    """Two hundred connections."""
    raw = json.dumps(target.raw).encode()
    most = target.max_request_bytes
    deep = b'{"a":' * 50_000
    keys = json.dumps({f"key {number}": 0 for number in range(20_000)}).encode()
    lists = b"[" + b"[]," * ((most - 4) // 3) + b"[]]"
    stream, rank = "/v1/rank?stream=1", "/v1/rank"
    infer = "/v2/models/kvshare/infer"
    outputs = json.dumps({"inputs": [], "outputs": [{}] * 100_000}).encode()
    return {
        "silent": Sockets(target.http, 50, b""),
        "silent grpc": Sockets(target.grpc, 20, b""),
        "slow": Sockets(target.http, 30, b"GET /v2 HTTP/1.1\r\nX-Slow: ", b"x"),
        "half-open": Sockets(target.http, 30, target.head(rank, most) + lists[:HALF_BYTES]),
        "dripping": Sockets(target.http, 10, target.head(infer, most) + b"{", b" "),
        "streams": Sockets(target.http, 20, target.head(stream, most) + raw + b"\n", b"\n"),
        "without token": Sockets(
            target.http, 20, target.head(rank, most, has_token=False) + lists[: 8 * KIB]
        ),
        "too large": Sockets(target.http, 5, target.head(rank, most + 1) + lists),
        "lists": Sockets(target.http, 5, target.head(rank, len(lists)) + lists),
        "deep": Sockets(target.http, 4, target.head(rank, len(deep)) + deep),
        "keys": Sockets(target.http, 3, target.head(rank, len(keys)) + keys),
        "outputs": Sockets(target.http, 3, target.head(infer, len(outputs)) + outputs),
    }


# --- gRPC


def half_sent_calls(target: Target, stop: threading.Event) -> Callable[[], None]:
    """Twenty calls of three methods whose message never comes."""
    channel = grpc.insecure_channel(target.grpc)
    metadata = (("authorization", f"Bearer {target.token}"),)
    calls: list[Any] = []

    def never() -> Iterator[bytes]:
        stop.wait()
        yield b""

    def act() -> None:
        calls[:] = [call for call in calls if not call.done()]
        for number in range(20 - len(calls)):
            method = ("ModelInfer", "ModelStreamInfer", "ModelMetadata")[number % 3]
            ask = channel.stream_stream(f"/inference.GRPCInferenceService/{method}")
            calls.append(ask(never(), metadata=metadata if number % 4 else ()))

    return act


def many_sequences(target: Target, stop: threading.Event) -> Callable[[], None]:
    """Sequences that are started in one call and never ended."""
    stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(target.grpc))
    message = service_pb2.ModelInferRequest.FromString(Path(target.message_file).read_bytes())
    metadata = (("authorization", f"Bearer {target.token}"),)

    def messages() -> Iterator[service_pb2.ModelInferRequest]:
        for number in range(100):
            message.parameters["sequence_id"].string_param = f"sequence {number}"
            yield message
            if stop.wait(PAUSE_S):
                return

    def act() -> None:
        with suppress(grpc.RpcError):
            for _ in stub.ModelStreamInfer(messages(), metadata=metadata):
                pass

    return act


def many_fields(target: Target) -> Callable[[], None]:
    """Messages of empty outputs, as many as a message has room for."""
    channel = grpc.insecure_channel(target.grpc)
    infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
    metadata = (("authorization", f"Bearer {target.token}"),)
    body = b"\x32\x00" * (target.max_request_bytes // 2)

    def act() -> None:
        with suppress(grpc.RpcError):
            infer(body, metadata=metadata, timeout=10.0)

    return act


def repeat(name: str, act: Callable[[], None], stop: threading.Event, done: Counter[str]) -> None:
    """Until told to stop."""
    while not stop.wait(PAUSE_S):
        act()
        done[name] += 1


def main() -> None:
    """Run all kinds side by side."""
    target = Target(**json.loads(sys.argv[1]))
    stop, done = threading.Event(), Counter[str]()
    sockets = kinds_of_sockets(target)
    acts = {name: kind.act for name, kind in sockets.items()}
    acts["half-sent calls"] = half_sent_calls(target, stop)
    acts["sequences"] = many_sequences(target, stop)
    acts["fields"] = many_fields(target)
    threads = [
        threading.Thread(target=repeat, args=(name, act, stop, done)) for name, act in acts.items()
    ]
    for thread in threads:
        thread.start()
    sys.stdin.read()
    stop.set()
    for thread in threads:
        thread.join(10.0)
    for kind in sockets.values():
        kind.close()
    print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
