"""A new model takes over warm, and every request is answered by one of the two."""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.core.encoder_worlds import make_caches
from tests.core.worlds import SCHEMA, assert_same_scores, draw_raw, make_dlrm, parse_all
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.engine import Engine
from torchrec_kvshare.errors import ConfigError, RequestError
from torchrec_kvshare.ranking import RankingModel
from torchrec_kvshare.serving.live import LiveEngine

RawRequest = dict[str, Any]


def engine_of(seed: int, num_pages: int = 30) -> Engine:
    model = RankingModel(make_dlrm(seed)).eval()
    return Engine(model, SCHEMA, f"v{seed}", KVStore(make_caches(model, [num_pages])))


def asks(user: str) -> RawRequest:
    return draw_raw(6, 2, ord(user)) | {"user_id": user}


def test_the_new_model_hits_for_who_asked_most() -> None:
    live = LiveEngine(engine_of(1), num_hot=3)
    for user in "dabcabcab":
        live.rank([asks(user)])
    successor = engine_of(2)
    assert live.publish(successor) == 3
    answers = {user: live.rank([asks(user)])[0] for user in "abz"}
    assert {user: answer.cache.status for user, answer in answers.items()} == {
        "a": "hit",
        "b": "hit",
        "z": "miss",
    }
    assert {answer.model_version for answer in answers.values()} == {"v2"}
    uncached = Engine(successor.model, SCHEMA, "v2", None)
    assert_same_scores(list(answers.values()), uncached.rank(parse_all([*map(asks, "abz")])))


def test_a_newcomer_can_become_hot() -> None:
    live = LiveEngine(engine_of(1), num_hot=4)
    for user in "aaaabbbbccccddddeeeee":
        live.rank([asks(user)])
    assert live.hottest()[0]["user_id"] == "e"
    assert len(live.hottest()) == 4


def test_requests_during_a_switch_are_answered_by_one_model_or_the_other() -> None:
    engines = {f"v{seed}": engine_of(seed) for seed in (1, 2)}
    live = LiveEngine(engines["v1"])
    requests = parse_all([asks("a"), asks("b")])
    expected = {
        version: Engine(engine.model, SCHEMA, version, None).rank(requests)
        for version, engine in engines.items()
    }
    seen: set[str] = set()
    stop = threading.Event()

    def ask() -> None:
        while not stop.is_set():
            answers = live.rank([asks("a"), asks("b")])
            [version] = {answer.model_version for answer in answers}
            assert_same_scores(answers, expected[version])
            seen.add(version)

    with ThreadPoolExecutor(3) as threads:
        asking = [threads.submit(ask) for _ in range(3)]
        wait_for(lambda: "v1" in seen or any(one.done() for one in asking))
        live.publish(engines["v2"])
        wait_for(lambda: "v2" in seen or any(one.done() for one in asking))
        stop.set()
        for one in asking:
            one.result()
    assert seen == {"v1", "v2"}


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.001)


def test_a_request_that_the_new_model_cannot_read_keeps_nobody_cold() -> None:
    live = LiveEngine(engine_of(1))
    live.rank([asks("a"), asks("b")])
    broken = live.hottest()[0]
    del broken["history"]["time"]  # type: ignore[attr-defined]
    assert live.publish(engine_of(2)) == 1


def test_what_cannot_be_scored_is_refused_and_not_remembered() -> None:
    live = LiveEngine(engine_of(1))
    with pytest.raises(RequestError):
        live.rank([asks("a"), {"user_id": "b"}])
    assert live.hottest() == []
    with pytest.raises(ConfigError, match="num_hot is 0"):
        LiveEngine(engine_of(1), num_hot=0)
