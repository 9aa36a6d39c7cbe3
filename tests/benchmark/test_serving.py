"""The serving scenario: its requests, its parity check, and its figures."""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from tritonclient.grpc import service_pb2

from torchrec_kvshare.benchmark import load, options, servers
from torchrec_kvshare.benchmark.load import LEAST_QPS, LoadResult, Reply, Saturation
from torchrec_kvshare.benchmark.scenarios import serving as serving_benchmark
from torchrec_kvshare.benchmark.scenarios.serving import (
    CACHED,
    MERGED,
    TOLERANCE,
    UNCACHED,
    ServingOptions,
    Setup,
    Turns,
    check_parity,
    draw_samples,
    engine_share,
    measure_serving,
    serve_commands,
)
from torchrec_kvshare.benchmark.servers import Server, message_of, running
from torchrec_kvshare.benchmark.workload import make_schema
from torchrec_kvshare.errors import ConfigError, MissingExtraError, ParityError
from torchrec_kvshare.serving.oip import decode_infer

HISTORY, NUM_CANDIDATES, NUM_USERS = 9, 4, 7
SMALL = {
    "histories": [HISTORY],
    "long_histories": [],
    "candidates": [NUM_CANDIDATES],
    "merged_chunk_rows": [8],
    "dim": 8,
    "num_layers": 1,
    "num_heads": 2,
    "page_size": 4,
}
NOWHERE = Server("127.0.0.1:1", "127.0.0.1:1")
READY = "serving on http://127.0.0.1:81 and grpc://127.0.0.1:82"


@pytest.fixture(autouse=True)
def few_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving_benchmark, "NUM_USERS", NUM_USERS)
    monkeypatch.setattr(serving_benchmark, "NUM_COMPARED", 2)


# --- what is asked


def test_a_message_holds_a_whole_window_of_its_user() -> None:
    schema = make_schema(HISTORY, NUM_USERS)
    message = service_pb2.ModelInferRequest.FromString(message_of(schema, 3, NUM_CANDIDATES, 5))
    tensors = decode_infer(message)
    assert message.model_name == "kvshare"
    assert tensors["user_id"].tolist() == [3]
    assert tensors["history.item_id.lengths"].tolist() == [HISTORY]
    assert len(tensors["history.item_id.values"]) == HISTORY
    assert tensors["candidates.item_id.lengths"].tolist() == [NUM_CANDIDATES]


def test_users_have_histories_of_their_own_whatever_they_score() -> None:
    schema = make_schema(HISTORY, NUM_USERS)
    events = set()
    for user in range(NUM_USERS):
        message = service_pb2.ModelInferRequest.FromString(message_of(schema, user, 2, 0))
        events.add(tuple(decode_infer(message)["history.item_id.values"].tolist()))
    assert len(events) == NUM_USERS


def test_the_first_user_comes_most_often() -> None:
    by_user = [b"%d" % user for user in range(NUM_USERS)]
    num_by_user = Counter(draw_samples(by_user, seed=3))
    assert draw_samples(by_user, seed=3) == draw_samples(by_user, seed=3)
    # Zipf: user 1 as often as user 2 times 2^1.1; of 4096 draws, five standard deviations.
    assert num_by_user[b"0"] / num_by_user[b"1"] == pytest.approx(2**1.1, rel=0.25)
    assert set(num_by_user) == set(by_user)


# --- servers


def test_a_cache_has_room_at_rest_for_its_share_of_the_users(tmp_path: Path) -> None:
    user_bytes = 3000
    commands = serve_commands(tmp_path, user_bytes, page_size=4)
    assert list(commands) == [Setup(UNCACHED), Setup(CACHED, 100), Setup(CACHED, 25)]
    assert "cache=off" in commands[Setup(UNCACHED)]
    # A fourth of seven users are two.
    for setup, num_users in ((Setup(CACHED, 100), 7), (Setup(CACHED, 25), 2)):
        given = dict(argument.split("=") for argument in commands[setup] if "=" in argument)
        at_rest = int(given["cache.capacity_bytes"]) * float(given["++cache.watermark"])
        assert num_users * user_bytes <= int(at_rest) < (num_users + 1) * user_bytes
        assert given["cache"] == "memory"
        assert given["threads"] == str(torch.get_num_threads())


def printing(*lines: str, then: str = "time.sleep(60)") -> list[str]:
    """Return a command that prints, and goes on or ends."""
    prints = "".join(f"print({line!r}, flush=True); " for line in lines)
    return [sys.executable, "-c", f"import time; {prints}{then}"]


def test_a_server_is_ready_when_it_says_where_it_serves(tmp_path: Path) -> None:
    with running(printing("loading", READY), tmp_path) as server:
        assert server == Server("127.0.0.1:81", "127.0.0.1:82")
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_ends_is_named_with_its_last_words(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="server ended with 3; its last line: no such model"),
        running(printing("loading", "no such model", then="exit(3)"), tmp_path),
    ):
        pass


def test_a_server_that_is_never_ready_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(servers, "START_S", 0.5)
    with (
        pytest.raises(ConfigError, match=r"not ready after 0\.5 s; its last line: loading"),
        running(printing("loading"), tmp_path),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_does_not_stop_is_killed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(servers, "STOP_S", 0.3)
    deaf = f"import signal; signal.signal(15, signal.SIG_IGN); print({READY!r}, flush=True); "
    with running([sys.executable, "-c", f"{deaf}import time; time.sleep(60)"], tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


# --- parity


def servers_that_answer(monkeypatch: pytest.MonkeyPatch, **reply_by_path: Reply) -> Any:
    """Return servers by setup, each with one answer to all requests."""
    server_by_setup = {
        Setup(path, 100 * (path == CACHED)): Server("", path) for path in reply_by_path
    }
    monkeypatch.setattr(
        serving_benchmark,
        "ask_each",
        lambda address, messages: [reply_by_path[address]] * len(messages),
    )
    return server_by_setup


def test_servers_that_give_the_same_scores_may_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    close = Reply([0.25, 0.5 + 0.9 * TOLERANCE], "hit")
    uncached = Reply([0.25, 0.5], "bypass")
    servers = servers_that_answer(monkeypatch, cached=close, uncached=uncached, merged=uncached)
    check_parity(servers, [b"message"] * 3)


@pytest.mark.parametrize("path", [CACHED, MERGED])
def test_a_server_with_another_score_is_found_out(
    monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    good, wrong = Reply([0.25, 0.5], "hit"), Reply([0.25, 0.5 + 1.1 * TOLERANCE], "hit")
    replies = {CACHED: good, UNCACHED: good, MERGED: good} | {path: wrong}
    servers = servers_that_answer(monkeypatch, **replies)
    with pytest.raises(ParityError, match=f"a score of .*'{path}'.* differs by 5.* of user 0"):
        check_parity(servers, [b"message"] * 3)


def test_a_score_that_is_no_number_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    servers = servers_that_answer(
        monkeypatch, uncached=Reply([0.5], "bypass"), cached=Reply([float("nan")], "hit")
    )
    with pytest.raises(ParityError, match="differs by nan"):
        check_parity(servers, [b"message"])


def test_a_cache_that_keeps_nothing_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    reply = Reply([0.5], "miss")
    servers = servers_that_answer(monkeypatch, uncached=reply, cached=reply)
    with pytest.raises(ParityError, match="kept no K/V of user 0: miss"):
        check_parity(servers, [b"message"])


# --- figures


@pytest.fixture
def metrics_page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server whose metrics grow from one scrape to the next, without any requests."""
    scrapes = count()

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            scrape = next(scrapes)
            text = "# TYPE kvshare_stage_seconds histogram\n"
            for stage, seconds in (("parse", 5.0), ("queue", 7.0), ("score", 3.0 + 6.0 * scrape)):
                text += f'kvshare_stage_seconds_bucket{{stage="{stage}",le="+Inf"}} 9\n'
                text += f'kvshare_stage_seconds_sum{{stage="{stage}"}} {seconds}\n'
            text += "# TYPE kvshare_request_seconds histogram\n"
            text += f'kvshare_request_seconds_sum{{server="grpc"}} {40.0 + 8.0 * scrape}\n'
            self.send_response(200)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: Any) -> None:
            """Tests print nothing."""

    monkeypatch.setattr(serving_benchmark, "saturated_qps", lambda *_, **__: None)
    with HTTPServer(("127.0.0.1", 0), Page) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Server(f"127.0.0.1:{server.server_port}", "nowhere:1")
        server.shutdown()
        thread.join()


def test_the_engine_share_is_that_of_what_was_asked_meanwhile(metrics_page: Server) -> None:
    assert engine_share(metrics_page, [b"message"], seed=0) == pytest.approx(6.0 / 8.0)


def result(qps: float, p99_ms: float = 40.0, hit_rate: float = 1.0) -> LoadResult:
    return LoadResult(
        qps=qps,
        p50_ms=1.0,
        p90_ms=2.0,
        p99_ms=p99_ms,
        num_answered=9,
        num_failed=0,
        hit_rate=hit_rate,
        is_valid=True,
    )


def turns_of(highest: list[LoadResult | None], *saturated: float) -> Turns:
    saturations = [Saturation(qps, 0, 0.5) for qps in saturated]
    return Turns(highest, saturations, [0.9] * len(saturated))


def test_figures_are_medians_and_a_turn_without_a_rate_counts_as_0() -> None:
    turns = turns_of([result(30.0), None, result(10.0, hit_rate=0.8)], 50.0, 40.0, 60.0)
    assert turns.qps_at_50ms == 10.0
    assert turns.saturated_qps == 50.0
    assert turns.hit_rate == pytest.approx(0.9)
    assert turns_of([None], 40.0).hit_rate == 0.5


def test_a_search_begins_where_the_last_one_ended() -> None:
    assert turns_of([], 50.0).first_qps() == 25.0
    assert turns_of([result(30.0)], 50.0, 60.0).first_qps() == 30.0
    assert turns_of([None], 50.0, 60.0).first_qps() == LEAST_QPS


def test_ratios_are_to_the_servers_that_have_such_a_rate() -> None:
    records = serving_benchmark._records(
        {"history": HISTORY},
        {
            Setup(UNCACHED): turns_of([result(10.0)], 20.0),
            Setup(CACHED, 25): turns_of([result(30.0, p99_ms=48.0)], 80.0),
            Setup(MERGED): turns_of([None], 2.0),
        },
    )
    value_by_figure = {(record.case["path"], record.metric): record.value for record in records}
    assert value_by_figure == {
        (UNCACHED, "qps_at_50ms"): 10.0,
        (UNCACHED, "saturated_qps"): 20.0,
        (UNCACHED, "hit_rate"): 1.0,
        (UNCACHED, "engine_share"): 0.9,
        (UNCACHED, "p99_ms"): 40.0,
        (UNCACHED, "saturated_vs_merged"): 10.0,
        (CACHED, "qps_at_50ms"): 30.0,
        (CACHED, "saturated_qps"): 80.0,
        (CACHED, "hit_rate"): 1.0,
        (CACHED, "engine_share"): 0.9,
        (CACHED, "p99_ms"): 48.0,
        (CACHED, "qps_vs_uncached"): 3.0,
        (CACHED, "saturated_vs_uncached"): 4.0,
        (CACHED, "saturated_vs_merged"): 40.0,
        (MERGED, "qps_at_50ms"): 0.0,
        (MERGED, "saturated_qps"): 2.0,
        (MERGED, "hit_rate"): 0.5,
        (MERGED, "engine_share"): 0.9,
    }


def test_a_server_that_never_answered_has_no_ratios_to_it() -> None:
    turns = {Setup(UNCACHED): turns_of([None], 0.0), Setup(CACHED, 100): turns_of([None], 80.0)}
    metrics = {record.metric for record in serving_benchmark._records({}, turns)}
    assert metrics == {"qps_at_50ms", "saturated_qps", "hit_rate", "engine_share"}


def test_without_loadgen_nothing_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlperf_loadgen", None)
    monkeypatch.setattr(serving_benchmark, "export_model", None)
    with pytest.raises(MissingExtraError, match=r"\[load\]"):
        measure_serving(ServingOptions(**SMALL))


# --- the whole


def test_real_servers_are_compared_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "MIN_REPEATS", 1)
    monkeypatch.setattr(serving_benchmark, "CAPACITY_PERCENTS", (100,))
    monkeypatch.setattr(serving_benchmark, "SATURATED_S", 0.2)
    monkeypatch.setattr(serving_benchmark, "RUN_S", 0.3)
    monkeypatch.setattr(load, "MOST_QPS", load.LEAST_QPS)  # one rate is tried
    records = measure_serving(ServingOptions(**SMALL, repeats=1))
    value_by_figure = {(record.case["path"], record.metric): record.value for record in records}
    assert len(value_by_figure) == len(records)
    for path in (CACHED, UNCACHED, MERGED):
        assert value_by_figure[path, "qps_at_50ms"] in (0.0, load.LEAST_QPS)
        assert value_by_figure[path, "saturated_qps"] > 0
        assert 0.0 < value_by_figure[path, "engine_share"] < 1.0
        assert value_by_figure[path, "hit_rate"] == (1.0 if path == CACHED else 0.0)
    for path, baseline in ((CACHED, UNCACHED), (CACHED, MERGED), (UNCACHED, MERGED)):
        rates = [value_by_figure[each, "saturated_qps"] for each in (path, baseline)]
        ratio = value_by_figure[path, f"saturated_vs_{baseline}"]
        assert ratio == pytest.approx(rates[0] / rates[1])
    for record in records:
        assert record.scenario == "serving"
        assert (record.case["history"], record.case["candidates"]) == (HISTORY, NUM_CANDIDATES)
        assert record.case["users"] == NUM_USERS
        assert ("capacity_percent" in record.case) == (record.case["path"] == CACHED)
