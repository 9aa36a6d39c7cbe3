"""The load client against servers with known times: it measures what they did."""

import re
import struct
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from torchrec_kvshare.benchmark import load
from torchrec_kvshare.benchmark.load import (
    LEAST_QPS,
    MOST_QPS,
    STEP,
    TARGET_MS,
    LoadResult,
    Reply,
    ask_each,
    highest_qps,
    measure_server,
    read_log,
    saturated_qps,
)
from torchrec_kvshare.errors import ConfigError, MissingExtraError

HIT, MISS, FULL, LATE, WRONG = "hit", "miss", "full", "late", "wrong"
REFUSAL_BY_NAME = {
    FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    LATE: grpc.StatusCode.DEADLINE_EXCEEDED,
    WRONG: grpc.StatusCode.INVALID_ARGUMENT,
}
NUM_WORKERS = 32


class Sleeper(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Sleeps for every answer, ``num_lanes`` at once; a request's id is its outcome."""

    def __init__(self, sleep_s: float, num_lanes: int) -> None:
        self.sleep_s = sleep_s
        self.lanes = threading.Semaphore(num_lanes)
        self.num_asked = 0

    def ModelInfer(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        self.num_asked += 1
        if request.id in REFUSAL_BY_NAME:
            context.abort(REFUSAL_BY_NAME[request.id], "as it was asked to")
        with self.lanes:
            time.sleep(self.sleep_s)
        answer = service_pb2.ModelInferResponse(id=request.id)
        for name, datatype in (("scores", "FP64"), ("cache.status", "BYTES")):
            answer.outputs.add(name=name, datatype=datatype, shape=[1])
        status = request.id.encode()
        answer.raw_output_contents.extend(
            [struct.pack("<d", 0.1), struct.pack("<I", len(status)) + status]
        )
        return answer


@contextmanager
def serving(sleep_s: float, num_lanes: int = NUM_WORKERS) -> Iterator[tuple[str, Sleeper]]:
    """Run a server on a free port; yield its address and its servicer."""
    sleeper = Sleeper(sleep_s, num_lanes)
    server = grpc.server(ThreadPoolExecutor(NUM_WORKERS))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(sleeper, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}", sleeper
    finally:
        server.stop(grace=None).wait()


def messages(*ids: str) -> list[bytes]:
    return [service_pb2.ModelInferRequest(id=each).SerializeToString() for each in ids]


# --- a rate


def test_latency_is_the_time_that_the_server_takes(tmp_path: Path) -> None:
    with serving(sleep_s=0.02) as (address, sleeper):
        result = measure_server(
            address, messages(HIT), qps=60.0, duration_s=1.5, seed=3, log_folder=tmp_path
        )
    assert result.qps == 60.0
    assert result.num_failed == 0
    assert result.num_answered == sleeper.num_asked
    # Poisson: 90 are expected, and five standard deviations are 47.
    assert 43 <= result.num_answered <= 137
    # Never less than the sleep; the rest is the machine, which may be busy.
    assert 20.0 <= result.p50_ms <= 60.0
    assert result.p50_ms <= result.p90_ms <= result.p99_ms


def test_queries_are_drawn_from_all_messages_as_often_as_they_are_listed(tmp_path: Path) -> None:
    with serving(sleep_s=0.0) as (address, _):
        asked = messages(HIT, HIT, MISS, HIT)
        result = measure_server(
            address, asked, qps=200.0, duration_s=2.0, seed=4, log_folder=tmp_path
        )
    # Of 400 queries; five standard deviations are 0.11.
    assert result.hit_rate == pytest.approx(0.75, abs=0.11)


def test_failed_queries_are_counted_and_end(tmp_path: Path) -> None:
    with serving(sleep_s=0.0) as (address, sleeper):
        asked = messages(HIT, FULL, MISS, LATE)
        result = measure_server(
            address, asked, qps=100.0, duration_s=1.0, seed=5, log_folder=tmp_path
        )
    assert result.num_answered + result.num_failed == sleeper.num_asked
    assert 0 < result.num_failed < sleeper.num_asked
    assert 0.2 < result.hit_rate < 0.8
    assert not result.meets_target


@pytest.mark.parametrize("sleep_s", [0.001, 0.07])
def test_the_figures_and_the_verdict_are_those_of_loadgen(sleep_s: float, tmp_path: Path) -> None:
    with serving(sleep_s) as (address, _):
        result = measure_server(
            address, messages(HIT), qps=250.0, duration_s=2.5, seed=6, log_folder=tmp_path
        )
    summary = (tmp_path / "mlperf_log_summary.txt").read_text()
    verdict = re.search(r"Result is : (\w+)", summary)
    p99_ns = re.search(r"99\.00 percentile latency \(ns\) +: (\d+)", summary)
    assert verdict is not None
    assert p99_ns is not None
    assert result.is_valid == (verdict[1] == "VALID")
    assert result.p99_ms == float(p99_ns[1]) / 1e6
    logged = read_log(tmp_path)
    num_late, num_queries = (
        logged[f"result_{counted}query_count"] for counted in ("overlatency_", "")
    )
    assert num_queries == result.num_answered
    assert result.meets_target == (num_late <= 0.01 * num_queries)
    # 459 queries without a late one rule out chance; here are over 500.
    if num_late == 0:
        assert result.is_valid
    if result.is_valid:
        assert result.meets_target
    assert result.p99_ms > TARGET_MS or sleep_s < 0.05


def test_the_same_seed_asks_the_same_number_of_times(tmp_path: Path) -> None:
    with serving(sleep_s=0.0) as (address, _):
        counts = [
            measure_server(
                address, messages(HIT), qps=90.0, duration_s=0.5, seed=seed, log_folder=tmp_path
            ).num_answered
            for seed in (7, 7, 8)
        ]
    assert counts[0] == counts[1]
    assert len(set(counts)) > 1


def test_a_message_that_cannot_be_scored_is_an_error_and_not_a_low_rate(tmp_path: Path) -> None:
    with (
        serving(sleep_s=0.0) as (address, _),
        pytest.raises(ConfigError, match=r"under load: .*\d+ .* INVALID_ARGUMENT: as it was asked"),
    ):
        measure_server(
            address, messages(HIT, WRONG), qps=50.0, duration_s=0.5, seed=1, log_folder=tmp_path
        )


def test_a_server_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(sleep_s=0.0) as (address, _):
        pass
    with pytest.raises(ConfigError, match=f"{address} cannot be put under load: .*no connection"):
        ask_each(address, messages(HIT))


def test_without_loadgen_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    with pytest.raises(MissingExtraError, match=r"a server under load needs the extra \[load\]"):
        ask_each("127.0.0.1:1", messages(HIT))


# --- the highest rate


def test_the_highest_rate_of_a_server_that_answers_one_at_a_time(tmp_path: Path) -> None:
    with serving(sleep_s=0.005, num_lanes=1) as (address, _):

        def measure_at(qps: float) -> LoadResult:
            return measure_server(
                address,
                messages(HIT),
                qps=qps,
                duration_s=0.5,
                seed=2,
                log_folder=tmp_path / f"{qps:.3f}",
            )

        highest = highest_qps(measure_at, first_qps=100.0)
    assert highest is not None
    assert highest.meets_target
    # 5 ms of sleep each are 200 a second at most. Queues need room, and the machine may be busy.
    assert 40.0 <= highest.qps <= 200.0 * 1.15


def line(capacity_qps: float, asked: list[float]) -> Any:
    """Return a server that meets the target up to a rate, and notes the rates it is asked."""

    def measure_at(qps: float) -> LoadResult:
        asked.append(qps)
        p99_ms = TARGET_MS if qps <= capacity_qps else TARGET_MS + 0.1
        return LoadResult(
            qps=qps,
            p50_ms=1.0,
            p90_ms=2.0,
            p99_ms=p99_ms,
            num_answered=10,
            num_failed=0,
            hit_rate=0.5,
            is_valid=False,
        )

    return measure_at


@pytest.mark.parametrize("first_qps", [0.1, 1.0, 30.0, 950.0, 1e9])
@pytest.mark.parametrize("capacity_qps", [1.0, 1.05, 29.0, 400.0, 9000.0])
def test_the_highest_rate_is_found_from_wherever_one_starts(
    first_qps: float, capacity_qps: float
) -> None:
    asked: list[float] = []
    highest = highest_qps(line(capacity_qps, asked), first_qps)
    assert highest is not None
    assert capacity_qps / STEP < highest.qps * 1.0001 <= capacity_qps * 1.0001
    assert len(set(asked)) == len(asked) <= 16


def test_a_good_guess_takes_two_rates() -> None:
    asked: list[float] = []
    measure_at = line(100.0, asked)
    highest = highest_qps(measure_at, first_qps=100.0)
    assert highest is not None
    assert len(asked) == 2
    assert highest_qps(measure_at, highest.qps) == highest
    assert len(asked) == 4


def test_a_server_that_never_meets_the_target_has_no_rate() -> None:
    asked: list[float] = []
    assert highest_qps(line(0.0, asked), first_qps=50.0) is None
    assert asked[-1] == LEAST_QPS


def test_there_is_a_rate_that_is_high_enough() -> None:
    highest = highest_qps(line(1e12, []), first_qps=50.0)
    assert highest is not None
    assert MOST_QPS / STEP < highest.qps <= MOST_QPS


def test_failures_do_not_meet_the_target() -> None:
    result = LoadResult(
        qps=5.0,
        p50_ms=1.0,
        p90_ms=2.0,
        p99_ms=3.0,
        num_answered=99,
        num_failed=0,
        hit_rate=1.0,
        is_valid=True,
    )
    assert result.meets_target
    assert not result._replace(num_failed=1).meets_target
    assert not result._replace(p99_ms=float("nan")).meets_target


# --- a closed loop, and one by one


def test_a_closed_loop_gives_what_its_lanes_give() -> None:
    with serving(sleep_s=0.02, num_lanes=2) as (address, sleeper):
        saturation = saturated_qps(
            address, messages(HIT, MISS), in_flight=4, duration_s=1.0, seed=0
        )
    # Two lanes of 20 ms are 100 a second at most; the last answers come after the end.
    assert 40.0 <= saturation.qps <= 100.0
    assert saturation.num_failed == 0
    assert 0.2 < saturation.hit_rate < 0.8
    assert saturation.qps == pytest.approx(sleeper.num_asked, rel=0.35)


def test_a_closed_loop_counts_failures() -> None:
    with serving(sleep_s=0.001) as (address, sleeper):
        saturation = saturated_qps(
            address, messages(HIT, FULL), in_flight=2, duration_s=0.3, seed=1
        )
    assert 0 < saturation.num_failed < sleeper.num_asked
    assert saturation.hit_rate == 1.0


def test_one_by_one_gives_the_answers_in_order() -> None:
    with serving(sleep_s=0.0) as (address, _):
        assert ask_each(address, messages(MISS, HIT, MISS)) == [
            Reply([0.1], MISS),
            Reply([0.1], HIT),
            Reply([0.1], MISS),
        ]


def test_one_by_one_suffers_no_failure() -> None:
    with serving(sleep_s=0.0) as (address, _), pytest.raises(ConfigError, match="1 of the calls"):
        ask_each(address, messages(HIT, FULL))


def test_equal_messages_are_sent_to_the_client_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []
    run = load.subprocess.run

    def watched(*arguments: Any, **options: Any) -> Any:
        sent.append(len(options["input"]))
        return run(*arguments, **options)

    monkeypatch.setattr(load.subprocess, "run", watched)
    long = "x" * 100_000
    with serving(sleep_s=0.0) as (address, sleeper):
        ask_each(address, messages(*[long] * 5))
    assert sleeper.num_asked == 5
    assert 100_000 < sent[0] < 200_000
