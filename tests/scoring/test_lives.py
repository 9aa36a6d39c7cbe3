"""Users of every kind of encoder live on between requests, and are scored as without a cache."""

import copy
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.encoder_worlds import (
    EXTENDED_NAMES,
    NAMES,
    TWO_HISTORIES,
    cut,
    draw_buyer,
    make_caches,
    raws_of,
    two_histories_model,
    world_of,
)
from tests.worlds import assert_same_scores, examples, oldest_first, parse_all
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.history.kinds import KINDS
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine

RawRequest = dict[str, Any]

DEEDS = ("same", "grow by one", "grow", "edit late", "edit early", "shrink", "new")


@lru_cache
def model_of(name: str) -> RankingModel:
    return RankingModel(copy.deepcopy(world_of(name).dlrm)).eval()


def live(history: dict[str, list[Any]], deed: str, rng: np.random.Generator) -> None:
    """Change a history as its user did."""
    num_events = len(history["time"])
    if deed == "edit late" and num_events:
        history["time"][-1] += 1
    elif deed == "edit early" and num_events:
        history["time"][int(rng.integers(num_events))] += 1
    for cells in history.values():
        if deed.startswith("grow") and cells:
            cells += cells[-1 if deed == "grow by one" else -7 :]
        elif deed == "shrink":
            del cells[num_events * 2 // 3 :]


lives = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from(DEEDS)), min_size=1, max_size=4),
    min_size=1,
    max_size=7,
)


@pytest.mark.parametrize("name", NAMES)
@examples(0.04)
@given(lives, st.integers(0, 2**32 - 1))
def test_any_life_is_scored_as_without_a_cache(
    name: str, lives: list[list[tuple[int, str]]], seed: int
) -> None:
    world, model = world_of(name), model_of(name)
    engine = Engine(model, world.schema, KVStore(make_caches(model, [14])))
    uncached = Engine(model, world.schema, None)
    rng = np.random.default_rng(seed)
    raw_by_user: dict[int, RawRequest] = {}
    for coming in lives:
        raws = []
        for user, deed in coming:
            num_events, num_candidates, drawn_seed = rng.integers((30, 4, 2**32)).tolist()
            [drawn] = raws_of(world, [(num_events, num_candidates, drawn_seed)])
            old = drawn if deed == "new" else raw_by_user.get(user, drawn)
            history = copy.deepcopy(old["history"])
            live(history, deed, rng)
            lived = drawn | {"user_id": f"user {user}", "history": history}
            raw_by_user[user] = oldest_first(lived)
            raws.append(raw_by_user[user])
        requests = parse_all(raws, world.schema)
        assert_same_scores(engine.rank(requests), uncached.rank(requests))


@pytest.mark.parametrize("name", NAMES)
def test_a_history_that_grew_is_extended_by_the_kinds_that_can(name: str) -> None:
    world, model = world_of(name), model_of(name)
    engine = Engine(model, world.schema, KVStore(make_caches(model, [14])))
    [raw] = raws_of(world, [(10, 2, 3)])
    for num_events in range(4, 11):
        history = {column: cells[:num_events] for column, cells in raw["history"].items()}
        [answer] = engine.rank(parse_all([raw | {"history": history}], world.schema))
        # longer keeps closed groups of 3 events.
        kept = (num_events - 1) // 3 * 3 if name == "longer" else num_events - 1
        if num_events == 4 or name not in EXTENDED_NAMES:
            kept = 0
        assert (answer.cache.cached_events, answer.cache.reason) == (kept, "cold")


def last_events(raw: RawRequest, num_events: int, num_given: int, says: bool) -> RawRequest:
    """What a client sends that keeps so many of its users' newest events."""
    first = max(0, num_events - num_given)
    sent = cut(raw, first, num_events)
    return sent | {"history": sent["history"] | {"first_event": first}} if says else sent


@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_sends_enough_of_its_last_events_is_answered_as_one_that_sends_all(
    name: str,
) -> None:
    """Its window moved with every event, so that nothing that was cached fitted: ``edited``."""
    world, model = world_of(name), model_of(name)
    window = world.schema.histories[0].window
    engines = [Engine(model, world.schema, KVStore(make_caches(model, [14]))) for _ in range(2)]
    [raw] = raws_of(world, [(40, 2, 3)])
    uses = set()
    for num_events in range(window.max_history - 2, 41):
        sent = [cut(raw, 0, num_events), last_events(raw, num_events, window.max_history, True)]
        [whole], [part] = (
            engine.rank(parse_all([one], world.schema))
            for engine, one in zip(engines, sent, strict=True)
        )
        assert part.scores == whole.scores
        assert part.cache == whole.cache
        uses.add((part.cache.status, part.cache.reason))
    grows = {("partial", "cold")} if name in EXTENDED_NAMES else set()
    assert uses == {("miss", "cold"), ("miss", "slid")} | grows


@pytest.mark.parametrize("name", EXTENDED_NAMES)
def test_a_client_that_sends_too_few_events_hits_until_their_first_block_leaves(name: str) -> None:
    world, model = world_of(name), model_of(name)
    block = world.schema.histories[0].window.block
    engine = Engine(model, world.schema, KVStore(make_caches(model, [14])))
    uncached = Engine(model, world.schema, None)
    [raw] = raws_of(world, [(60, 2, 3)])
    reasons = []
    for num_events in range(20, 20 + 3 * block):
        requests = parse_all([last_events(raw, num_events, block + 2, True)], world.schema)
        [answer] = engine.rank(requests)
        assert_same_scores([answer], uncached.rank(requests))
        reasons.append(answer.cache.reason)
    assert reasons[0] == "cold"
    assert reasons.count("slid") == 3
    assert set(reasons) == {"cold", "slid"}


@pytest.mark.parametrize("name", NAMES)
def test_a_client_that_does_not_say_where_its_events_start_is_told_that_the_window_slid(
    name: str,
) -> None:
    world, model = world_of(name), model_of(name)
    engine = Engine(model, world.schema, KVStore(make_caches(model, [14])))
    [raw] = raws_of(world, [(40, 2, 3)])
    raw["history"]["time"] = list(range(1, 41))
    answers = []
    for num_events in (12, 13, 17, 17):
        sent = last_events(raw, num_events, 9, False)
        answers += engine.rank(parse_all([sent], world.schema))
    uses = [(answer.cache.status, answer.cache.reason) for answer in answers]
    assert uses == [("miss", "cold"), ("miss", "slid"), ("miss", "slid"), ("hit", "")]


@pytest.mark.parametrize("kind", KINDS)
def test_one_history_may_grow_while_another_stays(kind: str) -> None:
    model = RankingModel(two_histories_model(kind)).eval()
    engine = Engine(model, TWO_HISTORIES, KVStore(make_caches(model, [14, 14])))
    uncached = Engine(model, TWO_HISTORIES, None)
    raw = draw_buyer("a", 9, 3, 4)
    raw["history"]["action"] = ["buy", "view", "buy", "view", "view", "buy", "view", "view", "view"]
    mate = draw_buyer("b", 8, 2, 5)
    for num_events in (4, 6, 7, 9):  # The last three are not bought.
        history = {column: cells[:num_events] for column, cells in raw["history"].items()}
        requests = parse_all([raw | {"history": history}, mate], TWO_HISTORIES)
        answers = engine.rank(requests)
        assert_same_scores(answers, uncached.rank(requests))
    assert answers[0].cache.status == "partial"
    assert answers[1].cache.status == "hit"
