"""Users that are encoded ahead: behind every request, once each, bounded, and dropped when late."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import InferenceServerClient, service_pb2

from tests.cache.servers import wait_until
from tests.serving.servers import Asked, EagerLoader, grpc_message, local_server
from tests.worlds import SCHEMA, draw_raw
from torchrec_kvshare.cache.leases import CacheUse
from torchrec_kvshare.errors import OverloadError
from torchrec_kvshare.features.parse import parse_user
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.scoring.engine import Answer, Engine, Unscored
from torchrec_kvshare.serving.metrics import ServerMetrics
from torchrec_kvshare.serving.models import Models
from torchrec_kvshare.serving.prefetch import Prefetches

RawRequest = dict[str, Any]

PATIENCE_S = 60.0  # a busy machine
SOON_S = 1e9


def asks(user: str, num_events: int = 8) -> RawRequest:
    return draw_raw(num_events, 2, seed=5) | {"user_id": user}


def without_candidates(raw: RawRequest) -> RawRequest:
    return {name: value for name, value in raw.items() if name != "candidates"}


def prefetch(server: Asked, raw: RawRequest, **headers: str) -> tuple[int, Any]:
    return server.ask("POST", "/v1/prefetch", without_candidates(raw), headers)


def metric(server: Asked, name: str) -> float:
    text = server.ask("GET", "/metrics")[1]
    found = [line for line in text.splitlines() if line.startswith(f"kvshare_{name} ")]
    return float(found[0].rpartition(" ")[2]) if found else 0.0


def count(server: Asked, outcome: str) -> float:
    return metric(server, f'prefetches_total{{outcome="{outcome}"}}')


def use_of(answer: tuple[int, Any]) -> tuple[str, str]:
    assert answer[0] == 200, answer
    return answer[1]["cache"]["status"], answer[1]["cache"]["tier"]


def serve(loader: EagerLoader | None = None, **settings: Any) -> Any:
    return local_server(loader or EagerLoader(), **{"timeout_ms": 60_000.0} | settings)


@contextmanager
def held_scoring(server: Asked, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Hold the scoring thread inside a batch until the yielded function is called."""
    is_there, may_go_on = threading.Event(), threading.Event()
    rank_each = Engine.rank_each

    def rank_later(self: Engine, requests: Sequence[Request]) -> list[Answer | Unscored]:
        is_there.set()
        assert may_go_on.wait(PATIENCE_S)
        return rank_each(self, requests)

    with ThreadPoolExecutor(1) as threads:
        monkeypatch.setattr(Engine, "rank_each", rank_later)
        asking = threads.submit(lambda: server.rank(asks("busy")))
        assert is_there.wait(PATIENCE_S)
        try:
            yield may_go_on.set
        finally:
            may_go_on.set()
            assert asking.result(PATIENCE_S)[0] == 200


def test_the_first_request_of_a_prefetched_user_is_a_hit() -> None:
    with serve() as server:
        uncached = server.rank(asks("b"))[1]["scores"]
        assert prefetch(server, asks("a")) == (202, {"prefetch": "queued"})
        wait_until(lambda: count(server, "miss") == 1.0, PATIENCE_S)
        answer = server.rank(asks("a"))
        assert use_of(answer) == ("hit", "pages")
        assert len(answer[1]["scores"]) == len(uncached)
        # What grew since then is extended by the request, and by the next prefetch.
        assert prefetch(server, asks("a")) == (202, {"prefetch": "queued"})
        wait_until(lambda: count(server, "hit") == 1.0, PATIENCE_S)


def test_it_needs_no_time_and_reads_no_candidates() -> None:
    raw = without_candidates(asks("a"))
    del raw["time"]
    with serve() as server:
        for candidates in ({}, {"candidates": "whatever"}):
            answer = server.ask("POST", "/v1/prefetch", raw | candidates)
            assert answer == (202, {"prefetch": "queued"})
            wait_until(lambda: metric(server, "prefetches_waiting") == 0.0, PATIENCE_S)
        assert use_of(server.rank(asks("a"))) == ("hit", "pages")


def test_a_user_waits_once_and_with_its_newest_history(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve() as server:
        with held_scoring(server, monkeypatch):
            assert prefetch(server, asks("a", 7))[1] == {"prefetch": "queued"}
            assert prefetch(server, asks("a", 7))[1] == {"prefetch": "duplicate"}
            assert prefetch(server, asks("a", 8))[1] == {"prefetch": "queued"}
            assert metric(server, "prefetches_waiting") == 1.0
        wait_until(lambda: count(server, "miss") == 1.0, PATIENCE_S)
        assert (count(server, "duplicate"), count(server, "replaced")) == (1.0, 1.0)
        assert use_of(server.rank(asks("a", 8))) == ("hit", "pages")


def test_requests_go_first(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    encode, rank_each = Engine.prefetch, Engine.rank_each

    def noted_prefetch(self: Engine, users: Sequence[Request]) -> list[CacheUse]:
        done.append("prefetch")
        return encode(self, users)

    def noted_rank(self: Engine, requests: Sequence[Request]) -> list[Answer | Unscored]:
        done.extend(request.user_id for request in requests)
        return rank_each(self, requests)

    monkeypatch.setattr(Engine, "prefetch", noted_prefetch)
    monkeypatch.setattr(Engine, "rank_each", noted_rank)
    with serve(batch_requests=1) as server, ThreadPoolExecutor(2) as threads:
        with held_scoring(server, monkeypatch) as go_on:
            for user in "cd":
                prefetch(server, asks(user))
            asking = [threads.submit(server.rank, asks(user)) for user in "ab"]
            wait_until(lambda: metric(server, "queue_requests") == 2.0, PATIENCE_S)
            go_on()
            for one in asking:
                assert one.result(PATIENCE_S)[0] == 200
        wait_until(lambda: metric(server, "prefetches_waiting") == 0.0, PATIENCE_S)
    assert done[0] == "busy"
    assert sorted(done[1:3]) == ["a", "b"]
    assert done[3:] == ["prefetch", "prefetch"]


def test_too_many_are_refused_and_late_ones_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve(queue_prefetches=2) as server:
        with held_scoring(server, monkeypatch):
            prefetch(server, asks("a"), **{"X-Timeout-Ms": "50"})
            prefetch(server, asks("b"))
            status, body = prefetch(server, asks("c"))
            if status == 429:  # Else the first one was late already, on a busy machine.
                assert "server.queue_prefetches allows no more" in body["error"]["message"]
                assert count(server, "full") == 1.0
                assert metric(server, 'refusals_total{limit="prefetches"}') == 1.0
                time.sleep(0.06)
                assert prefetch(server, asks("c"))[0] == 202
            assert count(server, "late") == 1.0
            prefetch_late = {"X-Timeout-Ms": "0.001"}
            assert prefetch(server, asks("d"), **prefetch_late)[0] == 429
        wait_until(lambda: count(server, "miss") == 2.0, PATIENCE_S)
        assert use_of(server.rank(asks("a"))) == ("miss", "none")
        assert use_of(server.rank(asks("b"))) == ("hit", "pages")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "a request is a JSON object; got list"),
        ({}, "has no 'user_id'"),
        ({"user_id": "a"}, "has no 'context'"),
        (b"{", "JSON"),
    ],
)
def test_what_is_no_user_is_refused(body: Any, message: str) -> None:
    with serve() as server:
        status, refusal = server.ask("POST", "/v1/prefetch", body)
        assert status == 400
        assert message in refusal["error"]["message"]


def test_it_needs_the_token_and_a_model(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    with serve(token_file=str(tmp_path / "token")) as server:
        assert prefetch(server, asks("a"))[0] == 401
        assert prefetch(server, asks("a"), Authorization="Bearer secret")[0] == 202
        said = {"Authorization": "Bearer secret"}
        raw = without_candidates(asks("a"))
        assert server.ask("POST", "/v1/prefetch?model=other", raw, said)[0] == 404


def test_a_server_without_a_cache_says_so() -> None:
    with serve(EagerLoader(num_pages=0)) as server:
        assert prefetch(server, asks("a")) == (202, {"prefetch": "no_cache"})
        assert count(server, "no_cache") == 1.0


def test_one_that_fails_is_counted_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Engine.prefetch

    def fail(self: Engine, users: Sequence[Request]) -> list[CacheUse]:
        if users[0].user_id == "a":
            raise RuntimeError("no")
        return encode(self, users)

    monkeypatch.setattr(Engine, "prefetch", fail)
    with serve() as server:
        for user in "ab":
            prefetch(server, asks(user))
        wait_until(lambda: count(server, "miss") == 1.0, PATIENCE_S)
        assert count(server, "failed") == 1.0
        assert use_of(server.rank(asks("a"))) == ("miss", "none")


def test_a_message_over_grpc_may_ask_for_it() -> None:
    with serve() as server, InferenceServerClient(server.grpc_url) as client:
        empty = {name: [] for name in asks("a")["candidates"]}
        message = grpc_message(asks("a") | {"candidates": empty, "request_id": "r"})
        message.parameters["prefetch"].bool_param = True
        reply: service_pb2.ModelInferResponse = client._client_stub.ModelInfer(message)
        assert (reply.id, reply.model_name, list(reply.outputs)) == ("r", "kvshare", [])
        wait_until(lambda: count(server, "miss") == 1.0, PATIENCE_S)
        assert use_of(server.rank(asks("a"))) == ("hit", "pages")


# ------------------------------------------------------------------------- without a server around


def parsed(user: str, came_at: float | None = None) -> Request:
    return replace(parse_user(asks(user), SCHEMA), came_at=came_at)


def make(max_waiting: int = 8) -> tuple[Models, Prefetches, ServerMetrics]:
    loader = EagerLoader()
    metrics = ServerMetrics(loader.metrics)
    models = Models(loader.load, metrics, 8, 2**20)
    models.publish("shop", "1", Path("1"))
    return models, Prefetches(max_waiting, models, metrics), metrics


def counted(metrics: ServerMetrics) -> dict[str, float]:
    return {
        sample.labels["outcome"]: sample.value
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == "kvshare_prefetches_total"
    }


def test_one_for_a_version_that_no_longer_answers_is_dropped() -> None:
    models, prefetches, metrics = make()
    old = models.get()
    prefetches.offer(old, parsed("a"), SOON_S)
    models.publish("shop", "2", Path("2"))
    # The same history for the new version takes its place.
    prefetches.offer(old, parsed("b"), SOON_S)
    assert prefetches.offer(models.get(), parsed("b"), SOON_S) == "queued"
    for _ in range(4):
        prefetches.run_next()
    assert counted(metrics) == {"retired": 1.0, "replaced": 1.0, "miss": 1.0}


def test_a_forgotten_user_is_not_encoded_ahead() -> None:
    models, prefetches, metrics = make()
    for user in "ab":
        prefetches.offer(models.get(), parsed(user, came_at=1.0), SOON_S)
    models.forget("a")
    prefetches.forget("a")
    models.forget("b")  # Between the two calls of a server.
    prefetches.run_next()
    prefetches.run_next()
    assert counted(metrics) == {"forgotten": 2.0}
    assert models.get().store is not None
    assert models.get().store.caches[0].held_bytes == 0


def test_a_late_one_is_not_encoded() -> None:
    models, prefetches, metrics = make(max_waiting=1)
    prefetches.offer(models.get(), parsed("a"), time.monotonic() - 1.0)
    prefetches.run_next()
    prefetches.offer(models.get(), parsed("b"), SOON_S)
    with pytest.raises(OverloadError, match="1 prefetches wait"):
        prefetches.offer(models.get(), parsed("c"), SOON_S)
    assert counted(metrics) == {"late": 1.0, "full": 1.0}


# -------------------------------------------------------------------------------- a feed of events


def cut(raw: RawRequest, first: int, last: int) -> RawRequest:
    return raw | {"history": {name: cells[first:last] for name, cells in raw["history"].items()}}


def tell(server: Asked, raw: RawRequest) -> tuple[int, Any]:
    return server.ask("POST", "/v1/events", {"user_id": raw["user_id"], "history": raw["history"]})


def test_a_hot_user_s_new_events_are_encoded_before_it_asks() -> None:
    whole = asks("a", 8)
    with serve(idle_events=True) as server:
        server.rank(cut(whole, 0, 5))
        for first, last, done in ((5, 7, 1.0), (7, 8, 2.0)):
            assert tell(server, cut(whole, first, last)) == (202, {"prefetch": "queued"})
            wait_until(lambda n=done: count(server, "partial") == n, PATIENCE_S)
        answer = server.rank(whole)
        assert use_of(answer) == ("hit", "pages")
    with serve(EagerLoader(num_pages=0)) as server:
        assert answer[1]["scores"] == pytest.approx(server.rank(whole)[1]["scores"], abs=2e-6)


def test_events_that_the_request_does_not_have_do_not_change_its_scores() -> None:
    whole = asks("a", 8)
    other = cut(whole, 5, 8)
    other["history"]["item_id"] = ["101", "102", "103"]
    with serve(idle_events=True) as server:
        server.rank(cut(whole, 0, 5))
        tell(server, other)
        wait_until(lambda: count(server, "partial") == 1.0, PATIENCE_S)
        answer = server.rank(whole)
        assert use_of(answer)[0] != "hit"
    with serve(EagerLoader(num_pages=0)) as server:
        assert answer[1]["scores"] == pytest.approx(server.rank(whole)[1]["scores"], abs=2e-6)


def test_events_of_others_and_wrong_ones_change_nothing() -> None:
    whole = asks("a", 8)
    with serve(idle_events=True) as server:
        assert tell(server, cut(whole, 5, 8)) == (202, {"prefetch": "not_hot"})
        server.rank(cut(whole, 0, 5))
        wrong = cut(whole, 5, 8)
        wrong["history"]["time"] = [1, 2, 3]
        missing = cut(whole, 5, 8)
        del missing["history"]["item_id"]
        for raw, message in (
            (wrong, "oldest first"),
            (missing, "history has no 'item_id'"),
            (whole | {"history": []}, "history is a list of 0"),
            (whole | {"history": cut(whole, 5, 8)["history"] | {"time": 7}}, "time holds 7"),
        ):
            status, body = tell(server, raw)
            assert status == 400
            assert message in body["error"]["message"]
        assert tell(server, cut(whole, 5, 8)) == (202, {"prefetch": "queued"})
        wait_until(lambda: count(server, "partial") == 1.0, PATIENCE_S)
        assert use_of(server.rank(whole)) == ("hit", "pages")


def test_events_are_taken_only_if_the_config_says_so(tmp_path: Path) -> None:
    with serve() as server:
        server.rank(asks("a"))
        status, body = tell(server, asks("a"))
        assert (status, body["error"]["message"]) == (
            400,
            "server.idle_events is false; events are not taken",
        )


def test_events_of_a_forgotten_user_are_not_kept(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    said = {"Authorization": "Bearer secret"}
    whole = asks("a", 8)
    with serve(idle_events=True, token_file=str(tmp_path / "token")) as server:
        server.rank(cut(whole, 0, 5), **said)
        assert server.ask("POST", "/v1/forget", {"user_id": "a"}, said)[0] == 200
        raw = {"user_id": "a", "history": cut(whole, 5, 8)["history"]}
        answer = server.ask("POST", "/v1/events", raw, said)
        assert answer == (202, {"prefetch": "not_hot"})
