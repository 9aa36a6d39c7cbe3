"""Put a server under load: mlcommons-loadgen asks over gRPC and times the answers.

Loadgen decides when to send which message, with Poisson arrivals, and times an answer from when its
message was due, even if it was sent late. The client is a process of its own without torch, so that
nothing else takes Python's lock; messages are serialised before it starts, and answers are read
after the last one has arrived.
"""

import json
import math
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from torchrec_kvshare.cache.reasons import HIT
from torchrec_kvshare.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    import grpc

EXTRA = "load"
NEEDED = ("mlperf_loadgen", "grpc", "tritonclient")

TARGET_MS = 50.0  # limit of the 99th percentile of latencies
PERCENTILE = 0.99
STEP = 1.07  # ratio of neighbouring rates on the ladder
LEAST_QPS = 1.0
MOST_QPS = 10_000.0  # more than a client in Python can send

CALL_TIMEOUT_S = 30.0  # a call that takes longer has failed
CONNECT_S = 5.0
SPARE_S = 60.0  # of a client process, for starting and reading answers

INFER = "/inference.GRPCInferenceService/ModelInfer"
SCORES, STATUS = "scores", "cache.status"
DETAIL_LOG = "mlperf_log_detail.txt"
LOG_PREFIX = ":::MLLOG "
NS_PER_MS = 1e6


class LoadResult(NamedTuple):
    """Latencies and counts at one rate, whether the server kept up or not.

    Attributes:
        qps: queries sent per second, on average.
        p50_ms: latency from when a query was due, failed queries included.
        p90_ms: likewise.
        p99_ms: likewise.
        num_answered: queries with scores.
        num_failed: queries that were refused for overload, or answered too late.
        hit_rate: share of the answered queries whose status is ``hit``.
        is_valid: loadgen's verdict. Besides ``p99_ms`` it requires enough queries to rule out
            chance: at least 459, more if some were late.
    """

    qps: float
    p50_ms: float
    p90_ms: float
    p99_ms: float
    num_answered: int
    num_failed: int
    hit_rate: float
    is_valid: bool

    @property
    def meets_target(self) -> bool:
        """Whether no query failed, and the 99th percentile is within ``TARGET_MS``."""
        return self.num_failed == 0 and self.p99_ms <= TARGET_MS


class Saturation(NamedTuple):
    """Saturation throughput of a server.

    Attributes:
        qps: answers per second.
        num_failed: queries that were refused for overload, or answered too late.
        hit_rate: share of the answered queries whose status is ``hit``.
    """

    qps: float
    num_failed: int
    hit_rate: float


class Reply(NamedTuple):
    """One answer: scores as probabilities, and the cache's status."""

    scores: list[float]
    status: str


def measure_server(
    address: str,
    messages: Sequence[bytes],
    qps: float,
    duration_s: float,
    seed: int,
    log_folder: Path,
) -> LoadResult:
    """Send queries to a server at a rate and time the answers.

    Args:
        address: ``host:port`` of the gRPC server.
        messages: serialised ``ModelInferRequest`` messages; every query is one of them, drawn
            uniformly. A message that should be drawn more often is listed more often.
        qps: queries per second; the times between them are drawn from an exponential distribution.
        duration_s: how long queries are sent; the run ends when all are answered.
        seed: of times and queries.
        log_folder: for loadgen's logs; it is made.

    Raises:
        MissingExtraError: if loadgen, grpc or tritonclient is not installed.
        ConfigError: if the server cannot be reached, or refuses a message for its content.
    """
    log_folder.mkdir(parents=True, exist_ok=True)
    limit_s = duration_s + CALL_TIMEOUT_S
    arguments = {"qps": qps, "duration_s": duration_s, "seed": seed, "log_folder": str(log_folder)}
    return LoadResult(*_in_client("poisson", address, messages, arguments, limit_s=limit_s))


def measure_ahead(
    address: str, messages: Sequence[bytes], qps: float, lead_ms: float | None, seed: int
) -> LoadResult:
    """Send each message once, at random times, and its prefetch ahead of it.

    Loadgen draws messages again and again, so it cannot ask for first requests only.

    Args:
        address: as for ``measure_server``.
        messages: of distinct users; every query is one of them, in order.
        qps: queries per second; the times between them are drawn from an exponential distribution.
        lead_ms: from a prefetch to its query; None sends no prefetches.
        seed: of the times.

    Raises:
        MissingExtraError: as for ``measure_server``.
        ConfigError: likewise.
    """
    arguments = {"qps": qps, "lead_ms": lead_ms, "seed": seed}
    limit_s = len(messages) / qps * 2 + CALL_TIMEOUT_S
    return LoadResult(*_in_client("ahead", address, messages, arguments, limit_s=limit_s))


def saturated_qps(
    address: str, messages: Sequence[bytes], in_flight: int, duration_s: float, seed: int
) -> Saturation:
    """Send queries in a closed loop: every answer is followed by the next query.

    Args:
        address: as for ``measure_server``.
        messages: likewise.
        in_flight: queries at once.
        duration_s: how long queries are sent.
        seed: of the order of the messages.

    Raises:
        MissingExtraError: as for ``measure_server``.
        ConfigError: likewise.
    """
    arguments = {"in_flight": in_flight, "duration_s": duration_s, "seed": seed}
    limit_s = duration_s + CALL_TIMEOUT_S
    return Saturation(*_in_client("closed_loop", address, messages, arguments, limit_s=limit_s))


def ask_each(address: str, messages: Sequence[bytes]) -> list[Reply]:
    """Send messages one after the other and return the answers.

    Args:
        address: as for ``measure_server``.
        messages: likewise, but each is sent once, in order.

    Raises:
        MissingExtraError: as for ``measure_server``.
        ConfigError: likewise, and if a query failed.
    """
    limit_s = CALL_TIMEOUT_S * len(messages)
    replies = _in_client("one_by_one", address, messages, {}, limit_s=limit_s)
    return [Reply(*reply) for reply in replies]


def highest_qps(measure_at: Callable[[float], LoadResult], first_qps: float) -> LoadResult | None:
    """Find the highest rate that meets the target, on a ladder of rates ``STEP`` apart.

    Steps up or down from the first rate double until they go too far; then a binary search follows.

    Args:
        measure_at: measures a rate, as ``measure_server`` does.
        first_qps: where to start; the closer to the highest rate, the fewer rates are tried.

    Returns:
        The result at the highest rate that met the target while the next higher one did not; None
        if not even ``LEAST_QPS`` did.

    Example:
        >>> def busy(qps: float) -> LoadResult:
        ...     return LoadResult(qps, 1.0, 2.0, qps / 2, 99, 0, 1.0, True)
        >>> highest = highest_qps(busy, first_qps=20.0)
        >>> 100.0 / STEP <= highest.qps <= 100.0
        True
    """
    measured: dict[int, LoadResult] = {}

    def meets(rung: int) -> bool:
        if rung not in measured:
            measured[rung] = measure_at(LEAST_QPS * STEP**rung)
        return measured[rung].meets_target

    top = _rung(MOST_QPS)
    # The highest rung known to meet the target and the lowest known not to.
    low, high = -1, top + 1
    rung, stride = min(max(_rung(first_qps), 0), top), 1
    while low + 1 < high:
        if meets(rung):
            low = rung
        else:
            high = rung
        is_bracketed = low in measured and high in measured
        if is_bracketed:
            rung = (low + high) // 2
        else:
            rung = min(low + stride, top) if low in measured else max(high - stride, 0)
            stride *= 2
    return measured.get(low)


def check_installed() -> None:
    """Check that the packages of a client are installed.

    Raises:
        MissingExtraError: if loadgen, grpc or tritonclient is not installed.
    """
    if any(find_spec(name) is None for name in NEEDED):
        raise MissingExtraError(EXTRA, "putting a server under load")


def _rung(qps: float) -> int:
    # The logarithm of a rung may be rounded down to just below it.
    return math.floor(math.log(max(qps, LEAST_QPS) / LEAST_QPS, STEP) + 1e-9)


def _in_client(
    call: str,
    address: str,
    messages: Sequence[bytes],
    arguments: dict[str, Any],
    limit_s: float,
) -> Any:
    """Run one of ``CALLS`` in a process of its own and return its result."""
    check_installed()
    index_by_message = {message: index for index, message in enumerate(dict.fromkeys(messages))}
    header = {
        "call": call,
        "address": address,
        "arguments": arguments,
        "lengths": [len(message) for message in index_by_message],
        "samples": [index_by_message[message] for message in messages],
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=b"".join([json.dumps(header).encode(), b"\n", *index_by_message]),
        capture_output=True,
        timeout=limit_s + SPARE_S,
        check=False,
    )
    if done.returncode:
        last_line = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ConfigError(f"{address} cannot be put under load: {last_line}")
    return json.loads(done.stdout.splitlines()[-1])


# --- in the client's process


class _Calls:
    """Calls of a server's ModelInfer, bytes to bytes, and their results.

    Args:
        channel: to the server.
        messages: the messages, by number of the sample.
    """

    def __init__(self, channel: "grpc.Channel", messages: Sequence[bytes]) -> None:
        import grpc

        self._ask = channel.unary_unary(INFER)
        self.messages = messages
        self.answers: list[bytes] = []
        self.num_failed = 0
        self.refusals: list[str] = []
        self._overload = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED)

    def start(self, sample: int, done: Callable[[], None]) -> None:
        """Send a message, and call ``done`` when it is answered or has failed."""
        future = self._ask.future(self.messages[sample], timeout=CALL_TIMEOUT_S)

        def keep(future: Any) -> None:
            self._keep(future)
            done()

        future.add_done_callback(keep)

    def send(self, message: bytes) -> None:
        """Send a message of which only a refusal matters."""
        future = self._ask.future(message, timeout=CALL_TIMEOUT_S)
        future.add_done_callback(self._check)

    def wait_for(self, sample: int) -> None:
        """Send a message and wait until it is answered or has failed."""
        future = self._ask.future(self.messages[sample], timeout=CALL_TIMEOUT_S)
        future.exception()
        self._keep(future)

    def _keep(self, future: Any) -> None:
        if self._check(future):
            self.answers.append(future.result())

    def _check(self, future: Any) -> bool:
        """Whether a message was answered; count it if not."""
        error = future.exception()
        if error is None:
            return True
        if error.code() in self._overload:
            self.num_failed += 1
        else:
            self.refusals.append(f"{error.code().name}: {error.details()}")
        return False

    def replies(self) -> list[Reply]:
        """Return the decoded answers.

        Raises:
            RuntimeError: if a call was refused for another reason than overload.
        """
        if self.refusals:
            [(refusal, count)] = Counter(self.refusals).most_common(1)
            raise RuntimeError(f"{count} of the calls were refused with {refusal}")
        return [_read(answer) for answer in self.answers]


def _read(answer: bytes) -> Reply:
    from tritonclient.grpc import InferResult, service_pb2

    tensors = InferResult(service_pb2.ModelInferResponse.FromString(answer))
    [status] = tensors.as_numpy(STATUS)
    return Reply(tensors.as_numpy(SCORES).tolist(), status.decode())


def _hit_rate(replies: Sequence[Reply]) -> float:
    return sum(reply.status == HIT for reply in replies) / max(1, len(replies))


def _poisson(
    calls: _Calls, qps: float, duration_s: float, seed: int, log_folder: str
) -> LoadResult:
    import mlperf_loadgen as loadgen

    def issue(samples: Sequence[Any]) -> None:
        for sample in samples:
            calls.start(sample.index, partial(complete, sample.id))

    def complete(query: int) -> None:
        loadgen.QuerySamplesComplete([loadgen.QuerySampleResponse(query, 0, 0)])

    def nothing(*_: Any) -> None:
        """Do nothing: all messages are in memory, and loadgen waits for the answers."""

    settings = loadgen.TestSettings()
    settings.scenario = loadgen.TestScenario.Server
    settings.mode = loadgen.TestMode.PerformanceOnly
    settings.server_target_qps = qps
    settings.server_target_latency_ns = int(TARGET_MS * NS_PER_MS)
    settings.server_target_latency_percentile = PERCENTILE
    settings.use_token_latencies = False
    settings.min_duration_ms = int(duration_s * 1e3)
    settings.min_query_count = 1
    settings.qsl_rng_seed = settings.sample_index_rng_seed = settings.schedule_rng_seed = seed
    logs = loadgen.LogSettings()
    logs.enable_trace = False
    logs.log_output.outdir = log_folder
    num_samples = len(calls.messages)
    library = loadgen.ConstructQSL(num_samples, num_samples, nothing, nothing)
    server = loadgen.ConstructSUT(issue, nothing)
    loadgen.StartTestWithLogSettings(server, library, settings, logs)
    loadgen.DestroyQSL(library)
    loadgen.DestroySUT(server)
    replies = calls.replies()
    value_by_key = read_log(Path(log_folder))
    p50_ms, p90_ms, p99_ms = (
        value_by_key[f"result_{percent}.00_percentile_latency_ns"] / NS_PER_MS
        for percent in (50, 90, 99)
    )
    return LoadResult(
        qps=qps,
        p50_ms=p50_ms,
        p90_ms=p90_ms,
        p99_ms=p99_ms,
        num_answered=len(replies),
        num_failed=calls.num_failed,
        hit_rate=_hit_rate(replies),
        is_valid=value_by_key["result_validity"] == "VALID",
    )


def read_log(log_folder: Path) -> dict[str, Any]:
    """Return the last value of each key of loadgen's detailed log."""
    lines = (log_folder / DETAIL_LOG).read_text().splitlines()
    entries = [json.loads(line.removeprefix(LOG_PREFIX)) for line in lines]
    return {entry["key"]: entry["value"] for entry in entries}


def _closed_loop(calls: _Calls, in_flight: int, duration_s: float, seed: int) -> Saturation:
    start = time.perf_counter()

    def ask(client: int) -> None:
        rng = random.Random(seed * in_flight + client)
        while time.perf_counter() - start < duration_s:
            calls.wait_for(rng.randrange(len(calls.messages)))

    with ThreadPoolExecutor(in_flight) as clients:
        list(clients.map(ask, range(in_flight)))
    elapsed_s = time.perf_counter() - start
    replies = calls.replies()
    return Saturation(len(replies) / elapsed_s, calls.num_failed, _hit_rate(replies))


def _ahead(calls: _Calls, qps: float, lead_ms: float | None, seed: int) -> LoadResult:
    from tritonclient.grpc import service_pb2

    rng = random.Random(seed)
    due = list(accumulate(rng.expovariate(qps) for _ in calls.messages))
    latency_ms = [math.inf] * len(due)
    prefetches = []
    for message in calls.messages if lead_ms is not None else []:
        ahead = service_pb2.ModelInferRequest.FromString(message)
        ahead.parameters["prefetch"].bool_param = True
        prefetches.append(ahead.SerializeToString())
    start = time.perf_counter() + 2.0 * (lead_ms or 0.0) / 1e3
    left = threading.Semaphore(0)

    def answered(number: int) -> None:
        latency_ms[number] = (time.perf_counter() - start - due[number]) * 1e3
        left.release()

    sends = [(at, number, False) for number, at in enumerate(due)]
    if lead_ms is not None:
        sends += [(at - lead_ms / 1e3, number, True) for number, at in enumerate(due)]
    for at, number, is_ahead in sorted(sends):
        time.sleep(max(0.0, start + at - time.perf_counter()))
        if is_ahead:
            calls.send(prefetches[number])
        else:
            calls.start(number, partial(answered, number))
    for _ in due:
        left.acquire()
    replies = calls.replies()
    ranked = sorted(latency_ms)
    p50_ms, p90_ms, p99_ms = (ranked[int(share * (len(ranked) - 1))] for share in (0.5, 0.9, 0.99))
    return LoadResult(
        qps=qps,
        p50_ms=p50_ms,
        p90_ms=p90_ms,
        p99_ms=p99_ms,
        num_answered=len(replies),
        num_failed=calls.num_failed,
        hit_rate=_hit_rate(replies),
        is_valid=True,
    )


def _one_by_one(calls: _Calls) -> list[Reply]:
    for sample in range(len(calls.messages)):
        calls.wait_for(sample)
    if calls.num_failed:
        raise RuntimeError(f"{calls.num_failed} of the calls failed for overload")
    return calls.replies()


CALLS: dict[str, Callable[..., Any]] = {
    "poisson": _poisson,
    "closed_loop": _closed_loop,
    "ahead": _ahead,
    "one_by_one": _one_by_one,
}


@contextmanager
def _connected(address: str) -> Iterator["grpc.Channel"]:
    import grpc

    unlimited = [(f"grpc.max_{way}_message_length", -1) for way in ("send", "receive")]
    with grpc.insecure_channel(address, options=unlimited) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=CONNECT_S)
        except grpc.FutureTimeoutError:
            raise RuntimeError(f"no connection within {CONNECT_S:g} s") from None
        yield channel


def _serve_job(stdin: BinaryIO) -> Any:
    header = json.loads(stdin.readline())
    distinct = [stdin.read(length) for length in header["lengths"]]
    messages = [distinct[index] for index in header["samples"]]
    with _connected(header["address"]) as channel:
        return CALLS[header["call"]](_Calls(channel, messages), **header["arguments"])


if __name__ == "__main__":
    print(json.dumps(_serve_job(sys.stdin.buffer)))
