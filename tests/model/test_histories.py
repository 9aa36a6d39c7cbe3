"""Several histories of one user: all events, and buys only, each with its own tower."""

import copy
from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.data.logs import (
    Event,
    age_of,
    countries_of,
    event_lists,
    genres_of,
    in_order,
    log_of,
    one_user,
    price_of,
)
from tests.encoder_worlds import (
    HEADS,
    HISTORIES,
    TWO_HISTORIES,
    WIDTH,
    cut,
    draw_buyer,
    make_caches,
    two_histories_model,
)
from tests.oracle import reference_logits
from tests.worlds import (
    LOGIT_TOLERANCE,
    PATH_TOLERANCE,
    SCHEMA,
    assert_same_scores,
    draw_raw,
    examples,
    make_dlrm,
    oldest_first,
    parse_all,
    ragged_users,
)
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.data.dataset import Dataset, build_dataset
from torchrec_kvshare.data.targets import Windows, build_batch, windows_of
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.torchscript import script_model
from torchrec_kvshare.features.batches import collate
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.schema import (
    ITEM,
    TIME,
    USER,
    History,
    Window,
    history_key,
    load_schema,
    save_schema,
    visible_key,
)
from torchrec_kvshare.history.kinds import CAUSAL, KINDS, TowerSpec
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Answer, Engine
from torchrec_kvshare.verify.audit import audit_model
from torchrec_kvshare.verify.parity import score_through_pages

RawRequest = dict[str, Any]
Use = tuple[str, str, int, int, str]

# Twelve events of which five are buys: those at 0, 3, 4, 8, 11.
BUYS = [0, 3, 4, 8, 11]


def ranking_model(kind: str = CAUSAL) -> RankingModel:
    return RankingModel(two_histories_model(kind)).eval()


def twelve_events(user: str = "user 1", num_candidates: int = 3) -> RawRequest:
    raw = draw_raw(12, num_candidates, 5) | {"user_id": user}
    raw["history"]["action"] = ["buy" if index in BUYS else "view" for index in range(12)]
    return raw


def make_engine(kind: str = CAUSAL, num_pages: Sequence[int] = (9, 7)) -> Engine:
    """Make an engine with ``num_pages`` for each history."""
    model = ranking_model(kind)
    return Engine(model, TWO_HISTORIES, KVStore(make_caches(model, num_pages)))


def uncached_engine(kind: str = CAUSAL) -> Engine:
    return Engine(ranking_model(kind), TWO_HISTORIES, None)


def rank(engine: Engine, *raws: RawRequest) -> list[Answer]:
    return engine.rank(parse_all(list(raws), TWO_HISTORIES))


def uses(answers: list[Answer]) -> list[Use]:
    return [astuple(answer.cache)[:-1] for answer in answers]  # all but how old it is


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=0.0, atol=tolerance)


# The model.


@pytest.mark.parametrize("kind", KINDS)
@examples(0.02)
@example([(0, 2, 1), (1, 1, 2), (28, 2, 3)])
@given(ragged_users)
@torch.no_grad()
def test_logits_equal_the_reference(kind: str, users: list[tuple[int, int, int]]) -> None:
    raws = [draw_buyer(f"user {index}", *sizes) for index, sizes in enumerate(users)]
    expected = torch.cat(
        [reference_logits(two_histories_model(kind), TWO_HISTORIES, raw) for raw in raws]
    )
    requests = parse_all(raws, TWO_HISTORIES)
    batch = collate(requests, TWO_HISTORIES)
    model = ranking_model(kind)
    assert_close(model(batch.dense_features, batch.sparse_features), expected, LOGIT_TOLERANCE)
    assert_close(score_through_pages(model, requests, TWO_HISTORIES), expected, LOGIT_TOLERANCE)


def test_each_history_has_the_events_of_its_actions_cut_to_its_window() -> None:
    raw = draw_raw(40, 1, 6)
    raw["history"]["action"] = ["buy" if index % 2 else "view" for index in range(40)]
    events = parse_request(raw, TWO_HISTORIES).events_by_history
    times = raw["history"]["time"]
    assert events["seen"].columns[TIME].tolist() == times[18:]  # 40 - 24, at a block
    assert events["bought"].columns[TIME].tolist() == times[1::2][12:]  # 20 - 12, at a block
    assert parse_request(raw, TWO_HISTORIES).num_events == 22 + 8


@torch.no_grad()
def test_a_view_moves_what_was_seen_and_not_what_was_bought() -> None:
    model, raw = ranking_model(), twelve_events()
    requests = parse_all([raw, copy.deepcopy(raw)], TWO_HISTORIES)
    raw["history"]["item_id"][5] = "107" if raw["history"]["item_id"][5] != "107" else "108"
    requests[1] = parse_request(raw, TWO_HISTORIES)
    before, after = (model.prefill(collate([r], TWO_HISTORIES).sparse_features) for r in requests)
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1])
    assert [kv.size(1) for kv in before] == [12, 5]


def test_towers_are_apart_and_tables_are_shared() -> None:
    names = [name for name, _ in two_histories_model(CAUSAL).named_parameters()]
    assert sum(name.endswith("candidate_token") for name in names) == 2
    tables = [name.split(".")[-2] for name in names if ".token_embeddings." in name]
    assert sorted(tables) == [
        "token_events_action",
        "token_item_id",
        "token_items_genres",
        "token_position_bought",
        "token_position_seen",
        "vector_item_id",
        "vector_items_genres",
    ]


def test_a_model_of_two_histories_passes_its_audit() -> None:
    audit = audit_model(ranking_model(), TWO_HISTORIES)
    assert (audit.scope, audit.append, audit.failures) == ("cross_request", "exact", [])
    assert {name.split("/")[0] for name in audit.moved["candidates"]} == {
        "seen",
        "bought",
        "scores",
    }


@torch.no_grad()
def test_a_scripted_model_is_bit_equal_to_eager() -> None:
    model = ranking_model()
    scripted = script_model(model)
    batch = collate(
        parse_all([draw_buyer("a", 28, 3, 1), draw_buyer("b", 0, 2, 2)], TWO_HISTORIES),
        TWO_HISTORIES,
    )
    arguments = batch.dense_features, batch.sparse_features
    assert torch.equal(scripted(*arguments), model(*arguments))
    got, expected = (one.prefill(batch.sparse_features) for one in (scripted, model))
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert scripted.num_kv_rows([9, 4]) == [9, 4]


# The engine.


@pytest.mark.parametrize("kind", KINDS)
def test_the_kv_of_both_histories_is_found_again(kind: str) -> None:
    engine = make_engine(kind)
    raws = [twelve_events(), draw_buyer("b", 28, 2, 2), draw_buyer("c", 0, 2, 3)]
    first, second = rank(engine, *raws), rank(engine, *raws)
    assert [use[0] for use in uses(first)] == ["miss", "miss", "bypass"]
    assert uses(first)[0] == ("miss", "cold", 0, 12 + 5, "none")
    assert uses(second)[0] == ("hit", "", 12 + 5, 0, "pages")
    assert uses(second)[2] == ("bypass", "too_short", 0, 0, "none")
    expected = rank(uncached_engine(kind), *raws)
    assert_same_scores(first, expected)
    assert_same_scores(second, expected)
    assert engine.store is not None
    for cache in engine.store.caches:
        counted = cache.metrics.snapshot()
        assert [counted.value("lookups", outcome=reason) for reason in ("cold", "hit")] == [2, 2]


def test_a_new_view_leaves_what_was_bought_in_the_cache() -> None:
    engine, raw = make_engine(), twelve_events()
    rank(engine, cut(raw, 0, 11))  # The twelfth event is a buy, the eleventh a view.
    rank(engine, cut(raw, 0, 10))
    after = rank(engine, cut(raw, 0, 11))
    assert uses(after) == [("partial", "cold", 10 + 4, 1, "pages")]
    assert_same_scores(after, rank(uncached_engine(), cut(raw, 0, 11)))
    assert uses(rank(engine, cut(raw, 0, 11))) == [("hit", "", 11 + 4, 0, "pages")]


def test_a_new_buy_extends_both() -> None:
    engine, raw = make_engine(), twelve_events()
    rank(engine, cut(raw, 0, 11))
    after = rank(engine, raw)
    assert uses(after) == [("partial", "cold", 11 + 4, 2, "pages")]
    assert_same_scores(after, rank(uncached_engine(), raw))


def test_a_history_evicted_alone_is_encoded_alone() -> None:
    engine = make_engine(num_pages=(9, 1))
    rank(engine, twelve_events("a"))
    rank(engine, twelve_events("b"))  # The one page of what was bought is b's now.
    again = rank(engine, twelve_events("a"))
    assert uses(again) == [("partial", "evicted", 12, 5, "pages")]
    assert_same_scores(again, rank(uncached_engine(), twelve_events("a")))


def test_who_bought_nothing_misses_and_hits_by_what_was_seen() -> None:
    engine, raw = make_engine(), twelve_events()
    raw["history"]["action"] = ["view"] * 12
    answers = [rank(engine, raw)[0] for _ in range(2)]
    assert uses(answers) == [("miss", "cold", 0, 12, "none"), ("hit", "", 12, 0, "pages")]
    assert_same_scores(answers, rank(uncached_engine(), raw, raw))


def test_a_user_is_forgotten_in_every_history() -> None:
    engine = make_engine()
    rank(engine, twelve_events("a"), twelve_events("b"))
    assert engine.store is not None
    held = [cache.held_bytes for cache in engine.store.caches]
    assert engine.forget("a") == {"pages": sum(held) // 2}
    assert [cache.held_bytes for cache in engine.store.caches] == [part // 2 for part in held]
    assert engine.forget("a") == {"pages": 0}
    assert uncached_engine().forget("b") == {}
    uses_after = uses(rank(engine, twelve_events("a"), twelve_events("b")))
    assert [use[:2] for use in uses_after] == [("miss", "cold"), ("hit", "")]


def test_where_one_history_has_no_room_the_request_is_scored_all_the_same() -> None:
    engine = make_engine(num_pages=(1, 7))
    answers = rank(engine, twelve_events(), draw_buyer("b", 3, 2, 1))
    assert [use[:2] for use in uses(answers)] == [("bypass", "not_admitted"), ("miss", "cold")]
    assert_same_scores(answers, rank(uncached_engine(), twelve_events(), draw_buyer("b", 3, 2, 1)))
    assert engine.store is not None
    for cache in engine.store.caches:
        assert all(entry.num_leases == 0 for entry in cache._entry_by_user.values())


deeds = st.sampled_from(["same", "view", "buy", "edit", "shrink", "new"])


@examples(0.15)
@given(
    st.tuples(st.integers(1, 9), st.integers(1, 5)),
    st.lists(
        st.lists(st.tuples(st.sampled_from("abc"), deeds), min_size=1, max_size=4),
        min_size=1,
        max_size=5,
    ),
    st.integers(0, 2**32 - 1),
)
def test_any_life_of_users_scores_as_without_a_cache(
    num_pages: tuple[int, int], lives: list[list[tuple[str, str]]], seed: int
) -> None:
    engine, uncached = make_engine(num_pages=num_pages), uncached_engine()
    rng = np.random.default_rng(seed)
    raw_by_user: dict[str, RawRequest] = {}
    for coming in lives:
        raws = []
        for user, deed in coming:
            num_events, num_candidates, drawn_seed = rng.integers((24, 4, 2**32)).tolist()
            drawn = draw_buyer(user, num_events, num_candidates, drawn_seed)
            raw_by_user[user] = live(raw_by_user.get(user, drawn), drawn, deed)
            raws.append(raw_by_user[user])
        answers = rank(engine, *raws)
        assert_same_scores(answers, rank(uncached, *raws))
        for request, (status, reason, cached, computed, tier) in zip(
            parse_all(raws, TWO_HISTORIES), uses(answers), strict=True
        ):
            assert cached + computed == request.num_events
            assert (status == "hit") == (reason == "")
            assert (tier == "pages") == (cached > 0)
            # A history that shrank to whole blocks of the cached one needs no encoding.
            assert status != "partial" or (cached > 0 and (computed > 0 or reason == "shrunk"))


def live(old: RawRequest, drawn: RawRequest, deed: str) -> RawRequest:
    """Return a user's request after a change of its history; candidates and time are new."""
    history = copy.deepcopy(old["history"])
    if deed == "new" or not history["time"]:
        history = drawn["history"]
    elif deed in ("view", "buy"):
        history = {name: cells + cells[-1:] for name, cells in history.items()}
        history["action"][-1] = deed
    elif deed == "shrink":
        history = {name: cells[: len(cells) // 2] for name, cells in history.items()}
    elif deed == "edit":
        history["time"][-1] += 1
    return oldest_first(drawn | {"history": history})


# One user twice in a batch.


class CountingPrefill:
    """A model that counts the rows of K/V that it computes."""

    def __init__(self, model: RankingModel) -> None:
        self.model = model
        self.rows: list[list[int]] = []

    def __call__(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        self.prefill(features)
        return self.model(dense, features)

    def prefill(self, features: KeyedJaggedTensor) -> list[Tensor]:
        kv_by_history = self.model.prefill(features)
        self.rows.append([kv.size(1) for kv in kv_by_history])
        return kv_by_history

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_cached", [False, True])
def test_one_user_at_two_times_is_prefilled_once(kind: str, is_cached: bool) -> None:
    engine = make_engine(kind) if is_cached else uncached_engine(kind)
    counting = CountingPrefill(ranking_model(kind))
    engine.model = counting
    raw = twelve_events()
    later = twelve_events() | {"time": raw["time"] + 5_000_000}
    other = draw_buyer("b", 9, 2, 1)
    answers = rank(engine, raw, other, later)
    alone = [rank(uncached_engine(kind), one)[0] for one in (raw, other, later)]
    assert_same_scores(answers, alone)
    assert np.abs(np.subtract(answers[0].scores, answers[2].scores)).max() > 1e-3
    num_kv_rows = counting.model.num_kv_rows
    [num_seen, num_bought] = [
        events.num_events
        for events in parse_request(other, TWO_HISTORIES).events_by_history.values()
    ]
    expected = np.add(num_kv_rows([12, 5]), num_kv_rows([num_seen, num_bought])).tolist()
    # At most one row for each of the two users is padding.
    [counted] = counting.rows
    assert all(e <= c <= e + 2 for e, c in zip(expected, counted, strict=True))


def test_one_user_with_two_histories_of_events_gets_each_its_own() -> None:
    raw = twelve_events()
    edited = copy.deepcopy(raw)
    edited["history"]["time"][-1] += 1
    for engine in (make_engine(), uncached_engine()):
        answers = rank(engine, raw, edited, raw)
        expected = [rank(uncached_engine(), one)[0] for one in (raw, edited, raw)]
        assert_same_scores(answers, expected)


# Training.


def dataset_of(events: list[Event]) -> Dataset:
    return build_dataset(log_of(events), SHORT_HISTORIES)


SHORT_HISTORIES = (History("seen", Window(9, 3)), History("bought", Window(4, 2), ("buy",)))


def read_by(target: Event, events: list[Event], history: History) -> list[Event]:
    """Return the events of a history that a target may see: strictly earlier, filtered, cut."""
    read = [
        event
        for event in in_order(events)
        if event.user == target.user
        and event.time < target.time
        and (not history.actions or event.action in history.actions)
    ]
    start = 0
    while len(read) - start > history.window.max_history:
        start += history.window.block
    return read[start:]


def has_buys(events: list[Event]) -> bool:
    return any(event.action == "buy" for event in events)


def whole_batch(dataset: Dataset, share_prefill: bool = True) -> tuple[Windows, Any]:
    """Make a batch with every event as a target; its candidates are its item and another one."""
    windows = windows_of(dataset, np.arange(len(dataset.time)), share_prefill=share_prefill)
    own = dataset.item[windows.targets]
    candidates = np.stack([own, np.roll(own, 1)], axis=1)
    return windows, build_batch(dataset, windows, candidates, None)


@pytest.mark.parametrize("share_prefill", [True, False])
@examples(0.5)
@given(event_lists.filter(has_buys))
def test_a_target_sees_strictly_earlier_events_of_each_history(
    share_prefill: bool, events: list[Event]
) -> None:
    dataset = dataset_of(events)
    windows, batch = whole_batch(dataset, share_prefill)
    ordered = in_order(events)
    vocabulary = dataset.schema.vocabulary_by_column[ITEM]
    window_of_target = np.repeat(np.arange(len(windows.user)), windows.num_targets)
    for history in SHORT_HISTORIES:
        items, times = (
            batch.sparse_features[history_key(history.name, column)].to_dense()
            for column in (ITEM, TIME)
        )
        visible = batch.sparse_features[visible_key(history.name)].values().view(-1, 2)
        assert torch.equal(visible[:, 0], visible[:, 1])
        for target, window, num_seen in zip(
            windows.targets, window_of_target, visible[:, 0].tolist(), strict=True
        ):
            read = read_by(ordered[target], events, history)
            assert times[window][:num_seen].tolist() == [event.time for event in read]
            assert items[window][:num_seen].tolist() == vocabulary.rows(e.item for e in read)
        # Every prefilled event is visible to some target.
        assert [len(row) for row in times] == [
            visible[window_of_target == window, 0].max() for window in range(len(windows.user))
        ]


@examples(0.5)
@given(event_lists.filter(has_buys))
def test_without_shared_prefills_a_window_holds_one_moment(events: list[Event]) -> None:
    dataset = dataset_of(events)
    windows = windows_of(dataset, np.arange(len(events)), share_prefill=False)
    assert sorted(windows.targets.tolist()) == list(range(len(events)))
    firsts = np.cumsum(windows.num_targets) - windows.num_targets
    for first, count in zip(firsts, windows.num_targets, strict=True):
        targets = windows.targets[first : first + count]
        assert len(set(dataset.time[targets].tolist())) == 1
    moments = {(e.user, e.time) for e in events}
    assert len(windows.user) == len(moments)


@pytest.mark.parametrize("share_prefill", [True, False])
@torch.no_grad()
def test_a_target_has_the_logits_of_its_request(share_prefill: bool) -> None:
    """What is trained is what is served, also with two histories."""
    rng = np.random.default_rng(8)
    events = [
        Event(
            str(rng.choice(["u", "vv"])),
            str(100 + int(rng.integers(12))),
            1_700_000_000 + 3_000 * int(rng.integers(20)),
            str(rng.choice(["view", "buy"])),
        )
        for _ in range(33)
    ]
    dataset = dataset_of(events)
    spec = TowerSpec(CAUSAL, WIDTH, 2, HEADS)
    model = make_dlrm(6, dataset.schema, spec)
    windows, batch = whole_batch(dataset, share_prefill)
    trained = model(batch.dense_features, batch.sparse_features).view(-1, 2, 1)
    ordered = in_order(events)
    own = dataset.item[windows.targets]
    for index, target in enumerate(windows.targets):
        shown = [dataset.log.items.ids[code] for code in (own[index], np.roll(own, 1)[index])]
        request = raw_request(ordered[target], events, shown)
        served = collate([parse_request(request, dataset.schema)], dataset.schema)
        expected = model(served.dense_features, served.sparse_features)
        assert_close(trained[index], expected, PATH_TOLERANCE)


def raw_request(target: Event, events: list[Event], candidates: list[str]) -> RawRequest:
    """Return the request at the time of a target, with the whole history."""
    past = [e for e in in_order(events) if e.user == target.user and e.time < target.time]
    return {
        USER: target.user,
        TIME: target.time,
        "context": {
            "country": list(countries_of(target.user)),
            "age": age_of(target.user),
            "battery": target.battery,
        },
        "history": {
            ITEM: [event.item for event in past],
            "action": [event.action for event in past],
            "mood": [event.mood or None for event in past],
            "dwell": [event.dwell for event in past],
            "genres": [list(genres_of(event.item)) for event in past],
            TIME: [event.time for event in past],
        },
        "candidates": {
            ITEM: candidates,
            "genres": [list(genres_of(item)) for item in candidates],
            "price": [price_of(item) for item in candidates],
        },
    }


# What cannot work.


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"histories are \[\]"),
        (("seen", "seen"), r"histories are \['seen', 'seen'\]; at least one, with distinct names"),
        (("seen", "context"), r"histories are \['seen', 'context'\]"),
        (("request",), r"histories are \['request'\]"),
        (("candidates",), r"histories are \['candidates'\]"),
        (("user_id",), r"histories are \['user_id'\]"),
        (("",), r"histories are \[''\]"),
        (("seen.bought",), r"history 'seen\.bought': no dot is allowed"),
    ],
)
def test_names_that_cannot_work_are_refused(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(SCHEMA, histories=tuple(History(name, Window(6, 3)) for name in names))


def test_actions_need_a_column_of_actions() -> None:
    message = r"history bought keeps actions \('buy',\); events have no action"
    with pytest.raises(ConfigError, match=message):
        replace(TWO_HISTORIES, event_attributes=())


def test_an_action_that_the_log_does_not_have_is_named() -> None:
    log = one_user([1, 2, 3, 4])
    histories = [History("seen", Window(9, 3)), History("bought", Window(4, 2), ("bye", "view"))]
    with pytest.raises(
        ConfigError, match=r"bought keeps actions \['bye'\]; the log has \['view'\]"
    ):
        build_dataset(log, histories)


def test_a_log_without_actions_refuses_histories_of_actions() -> None:
    log = replace(one_user([1, 2, 3, 4]), event_attributes={})
    with pytest.raises(ConfigError, match="events have no action"):
        build_dataset(log, SHORT_HISTORIES)


def test_a_schema_of_two_histories_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_schema(tmp_path, TWO_HISTORIES)
    assert load_schema(tmp_path).histories == HISTORIES
