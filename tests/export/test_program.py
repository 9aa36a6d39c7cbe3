"""A program scores plain tensors as the engine scores requests; its own cache is never stale."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.encoder_worlds import (
    EXTENDED_NAMES,
    NAMES,
    TWO_HISTORIES,
    cut,
    draw_buyer,
    two_histories_model,
    world_of,
)
from tests.worlds import (
    HEAD_DIM,
    NUM_HEADS,
    PROBABILITY_TOLERANCE,
    SCHEMA,
    draw_raw,
    examples,
    fresh_process,
    make_dlrm,
)
from torchrec_kvshare.export.program import RankingProgram
from torchrec_kvshare.export.program_cache import PAGE_SIZE, leading_equal
from torchrec_kvshare.export.torchscript import load_program, script_model, write_torchscript
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.schema import HISTORY, FeatureSchema, History, Window
from torchrec_kvshare.features.tensors import input_specs, request_tensors, user_key
from torchrec_kvshare.history.kinds import KINDS
from torchrec_kvshare.model.quantised import TABLE_DTYPES, quantise_tables
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.audit import audit_model
from torchrec_kvshare.verify.parity import probabilities_of

Raw = dict[str, Any]

# Histories of up to three pages.
LONG = replace(SCHEMA, histories=(History(HISTORY, Window(3 * PAGE_SIZE, 8)),))
LONG_MODEL = RankingModel(make_dlrm(6, LONG)).eval()
LONG_PAGE_BYTES = 4 * PAGE_SIZE * NUM_HEADS * 4 * 4
TTL_S = 1000.0


class Use(NamedTuple):
    """A program's use of its cache for one request."""

    status: str
    reason: str
    cached_events: int
    computed_events: int


def new_program(
    model: RankingModel = LONG_MODEL, schema: FeatureSchema = LONG, num_pages: int = 20
) -> RankingProgram:
    program = RankingProgram(model, schema, "model-tables").eval()
    program.configure(num_pages * LONG_PAGE_BYTES, TTL_S)
    return program


def tensors_of(raws: list[Raw], schema: FeatureSchema = LONG) -> dict[str, Tensor]:
    return request_tensors([parse_request(raw, schema) for raw in raws], schema)


@torch.no_grad()
def rank(
    program: RankingProgram, raws: list[Raw], schema: FeatureSchema = LONG
) -> tuple[Tensor, list[Use]]:
    scores, use = program.rank(tensors_of(raws, schema))
    statuses, reasons = program.status_names(), program.reason_names()
    return scores, [
        Use(statuses[status], reasons[reason], cached, computed)
        for status, reason, cached, computed in use.tolist()
    ]


def uncached(
    raws: list[Raw], model: RankingModel = LONG_MODEL, schema: FeatureSchema = LONG
) -> Tensor:
    engine = Engine(model, schema, store=None)
    return probabilities_of(engine.rank([parse_request(raw, schema) for raw in raws]))


def assert_right(scores: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(scores, expected, rtol=0.0, atol=PROBABILITY_TOLERANCE)


def user(name: str, num_events: int, seed: int = 1, num_candidates: int = 3) -> Raw:
    """A request of a user; a shorter history of the same seed is a prefix of a longer one."""
    whole = draw_raw(3 * PAGE_SIZE + 20, num_candidates, seed, LONG)
    return cut(whole, 0, num_events) | {"user_id": name}


def edited(raw: Raw, event: int) -> Raw:
    """The request with another item at one event."""
    items = list(raw["history"]["item_id"])
    items[event] = "100" if items[event] != "100" else "101"
    return raw | {"history": raw["history"] | {"item_id": items}}


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_uncached_scores_are_the_engines_bit_for_bit(name: str) -> None:
    world = world_of(name)
    model = RankingModel(world.dlrm).eval()
    raws = [draw_raw(*sizes, world.schema) for sizes in ((9, 4, 1), (0, 3, 2), (30, 2, 3))]
    program = new_program(model, world.schema)
    assert torch.equal(program(tensors_of(raws, world.schema)), uncached(raws, model, world.schema))


@pytest.mark.parametrize("name", NAMES)
def test_a_users_life_is_scored_right_at_every_step(name: str) -> None:
    world = world_of(name)
    model = RankingModel(world.dlrm).eval()
    program = new_program(model, world.schema)
    whole = draw_raw(11, 3, 5, world.schema)
    grows = name in EXTENDED_NAMES
    for raw, status, reason in (
        (cut(whole, 0, 7), "miss", "cold"),
        (cut(whole, 0, 7), "hit", ""),
        (whole, "partial" if grows else "miss", "cold"),
        (edited(whole, 10), "partial" if grows else "miss", "edited"),
        (cut(whole, 0, 5), "partial" if grows else "miss", "shrunk"),
        (cut(whole, 0, 5), "hit", ""),
    ):
        scores, [use] = rank(program, [raw], world.schema)
        assert (use.status, use.reason) == (status, reason)
        assert_right(scores, uncached([raw], model, world.schema))


@pytest.mark.parametrize("kind", KINDS)
def test_histories_side_by_side_are_kept_apart(kind: str) -> None:
    model = RankingModel(two_histories_model(kind)).eval()
    program = new_program(model, TWO_HISTORIES)
    buyer = draw_buyer("user 1", 17, 3, seed=2)
    viewer = buyer | {"history": buyer["history"] | {"action": ["view"] * 17}}
    for raws in ([buyer], [viewer], [buyer, viewer | {"user_id": "user 2"}], [buyer]):
        scores, _ = rank(program, raws, TWO_HISTORIES)
        assert_right(scores, uncached(raws, model, TWO_HISTORIES))
    _, [use] = rank(program, [buyer], TWO_HISTORIES)
    assert (use.status, use.computed_events) == ("hit", 0)


def test_what_is_cached_is_counted_in_events() -> None:
    program = new_program()
    assert rank(program, [user("a", 40)])[1] == [Use("miss", "cold", 0, 40)]
    assert rank(program, [user("a", 55)])[1] == [Use("partial", "cold", 40, 15)]
    assert rank(program, [edited(user("a", 55), 50)])[1] == [Use("partial", "edited", 50, 5)]
    assert rank(program, [user("a", 30)])[1] == [Use("partial", "shrunk", 30, 0)]
    assert rank(program, [user("a", 0)])[1] == [Use("bypass", "too_short", 0, 0)]
    assert rank(program, [user("a", 30)])[1] == [Use("hit", "", 30, 0)]


def test_an_anchor_that_moves_is_a_miss() -> None:
    program = new_program()
    rank(program, [user("a", 96)])
    raw = user("a", 97)
    scores, [use] = rank(program, [raw])
    assert use == Use("miss", "slid", 0, 89)
    assert_right(scores, uncached([raw]))


def test_events_that_left_at_the_front_are_told_from_edited_ones() -> None:
    """The reason was ``edited`` if a client sent only its last events, without ``first_event``."""
    program = new_program()
    whole = user("a", 60)
    whole["history"]["time"] = [1000 * event for event in range(60)]
    assert rank(program, [cut(whole, 5, 45)])[1] == [Use("miss", "cold", 0, 40)]
    assert rank(program, [cut(whole, 6, 46)])[1] == [Use("miss", "slid", 0, 40)]
    other = edited(cut(whole, 6, 46), 0)
    scores, uses = rank(program, [other])
    assert uses == [Use("miss", "edited", 0, 40)]
    assert_right(scores, uncached([other]))


@pytest.mark.parametrize("shift", [TTL_S + 1, -TTL_S - 1])
def test_k_v_expires_by_the_times_of_its_users_requests(shift: float) -> None:
    program = new_program()
    raw = user("a", 40)
    raw |= {"time": raw["time"] + 2 * int(TTL_S)}  # An earlier request is after its events too.
    rank(program, [raw, user("b", 40)])
    later = raw | {"time": raw["time"] + int(shift)}
    scores, [use] = rank(program, [later])
    assert use == Use("miss", "expired", 0, 40)
    assert_right(scores, uncached([later]))
    assert rank(program, [user("b", 40)])[1][0].status == "hit"


def test_the_least_recently_used_makes_room() -> None:
    program = new_program(num_pages=4)
    rank(program, [user("a", 60)])
    rank(program, [user("b", 60)])
    rank(program, [user("a", 60)])
    assert rank(program, [user("c", 60)])[1] == [Use("miss", "cold", 0, 60)]
    assert program.held_bytes() == 4 * LONG_PAGE_BYTES
    assert rank(program, [user("a", 60)])[1][0].status == "hit"
    assert rank(program, [user("b", 60)])[1] == [Use("miss", "evicted", 0, 60)]


def test_who_has_no_room_is_scored_and_evicts_nobody_of_the_batch() -> None:
    program = new_program(num_pages=3)
    raws = [user("a", 60, 1), user("b", 60, 2), user("c", 20, 3)]
    scores, uses = rank(program, raws)
    assert uses == [
        Use("miss", "cold", 0, 60),
        Use("bypass", "not_admitted", 0, 60),
        Use("miss", "cold", 0, 20),
    ]
    assert_right(scores, uncached(raws))
    assert [use.status for use in rank(program, [raws[0], raws[2]])[1]] == ["hit", "hit"]


def test_a_history_that_grew_beyond_the_pool_stays_as_it_was() -> None:
    program = new_program(num_pages=2)
    rank(program, [user("a", 60)])
    grown = user("a", 70)
    scores, [use] = rank(program, [grown])
    assert use == Use("bypass", "not_admitted", 60, 10)
    assert_right(scores, uncached([grown]))
    assert rank(program, [user("a", 60)])[1][0].status == "hit"


def test_a_history_that_cannot_grow_in_place_moves() -> None:
    program = new_program(num_pages=6)
    rank(program, [user("a", 20, 1), user("b", 20, 2)])
    grown = user("a", 90, 1)
    scores, [use] = rank(program, [grown])
    assert use == Use("partial", "cold", 20, 70)
    assert_right(scores, uncached([grown]))
    assert rank(program, [user("b", 20, 2)])[1][0].status == "hit"
    assert program.held_bytes() == 4 * LONG_PAGE_BYTES


def test_a_user_may_stand_in_a_batch_twice() -> None:
    program = new_program()
    same, other = user("a", 40), edited(user("a", 40), 3)
    much_later = same | {"time": same["time"] + 10 * int(TTL_S)}
    scores, uses = rank(program, [same, same, other, much_later])
    assert uses == [
        Use("miss", "cold", 0, 40),
        Use("hit", "", 40, 0),
        Use("bypass", "not_admitted", 3, 37),
        Use("bypass", "not_admitted", 0, 40),
    ]
    assert_right(scores, uncached([same, same, other, much_later]))


def test_a_request_without_candidates_has_no_scores_and_is_kept() -> None:
    program = new_program()
    nobody = user("a", 40, num_candidates=0)
    scores, uses = rank(program, [nobody])
    assert (scores.shape, uses) == ((0, 1), [Use("miss", "cold", 0, 40)])
    assert program(tensors_of([nobody])).shape == (0, 1)
    raws = [user("a", 40, num_candidates=0), user("b", 20), user("c", 0, num_candidates=0)]
    scores, uses = rank(program, raws)
    assert [use.status for use in uses] == ["hit", "miss", "bypass"]
    assert_right(scores, uncached(raws))


def test_a_cache_that_is_configured_anew_knows_nobody() -> None:
    program = new_program()
    rank(program, [user("a", 40)])
    program.configure(20 * LONG_PAGE_BYTES, TTL_S)
    assert rank(program, [user("a", 40)])[1] == [Use("miss", "cold", 0, 40)]


def test_a_model_whose_audit_allows_no_appends_is_encoded_anew() -> None:
    program = RankingProgram(LONG_MODEL, LONG, "model-tables", may_extend=False).eval()
    rank(program, [user("a", 40)])
    for raw, use in (
        (user("a", 40), Use("hit", "", 40, 0)),
        (user("a", 55), Use("miss", "cold", 0, 55)),
        (edited(user("a", 55), 50), Use("miss", "edited", 0, 55)),
    ):
        scores, uses = rank(program, [raw])
        assert uses == [use]
        assert_right(scores, uncached([raw]))


def test_a_model_that_failed_its_audit_keeps_no_k_v() -> None:
    program = RankingProgram(LONG_MODEL, LONG, "model-tables", may_keep=False).eval()
    features = tensors_of([user("a", 40)])
    with pytest.raises(ValueError, match="the model failed its audit: no K/V is kept"):
        program.rank(features)
    assert_right(program(features), uncached([user("a", 40)]))


def test_who_is_forgotten_is_unknown_again() -> None:
    program = new_program()
    rank(program, [user("a", 40), user("b", 40)])
    program.forget(user_key("a"))
    program.forget(user_key("nobody"))
    assert program.held_bytes() == 2 * LONG_PAGE_BYTES
    assert rank(program, [user("a", 40)])[1] == [Use("miss", "cold", 0, 40)]
    assert rank(program, [user("b", 40)])[1][0].status == "hit"


def test_other_weights_are_another_model() -> None:
    program = new_program()
    rank(program, [user("a", 40)])
    program.renew("other-tables")
    assert program.model_version == "other-tables"
    assert rank(program, [user("a", 40)])[1] == [Use("miss", "model", 0, 40)]


def test_two_users_with_one_key_cost_reuse_and_no_score() -> None:
    program = new_program()
    raws = [user("a", 40, 1), user("b", 40, 2)]
    features = tensors_of(raws)
    features["user_key"] = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        for _ in range(3):
            assert_right(program.rank(features)[0], uncached(raws))


def test_the_hosts_tensors_are_its_own_again_after_a_call() -> None:
    """A host may use one buffer for all requests."""
    program = new_program()
    features = tensors_of([user("a", 40)])
    with torch.no_grad():
        program.rank(features)
    features["history.item_id.values"].fill_(0)
    features["history.genres.lengths"].fill_(0)
    assert rank(program, [user("a", 40)])[1][0].status == "hit"


def test_a_cache_too_small_for_a_page_is_refused() -> None:
    with pytest.raises(ValueError, match=f"capacity_bytes is 9; one page takes {LONG_PAGE_BYTES}"):
        new_program().configure(9, TTL_S)


steps = st.lists(
    st.tuples(
        st.sampled_from("abc"),
        st.sampled_from([0, 1, 20, 33, 60, 64, 65, 96, 97, 110]),  # events
        st.sampled_from([None, 0, 5, 31]),  # the event that is edited
        st.sampled_from([0, 0, 0, 600, 1500]),  # seconds that pass
        st.booleans(),  # with what came before in one batch
    ),
    min_size=1,
    max_size=12,
)


@examples(0.3)
@given(steps, st.integers(1, 9))
def test_whatever_comes_the_cached_scores_are_the_uncached(
    drawn: list[tuple[str, int, int | None, int, bool]], num_pages: int
) -> None:
    program = new_program(num_pages=num_pages)
    raws: list[Raw] = []
    now = 0
    for name, num_events, edited_event, seconds, joins in drawn:
        now += seconds
        raw = user(name, num_events, seed=ord(name))
        raw |= {"time": raw["time"] + now}
        if edited_event is not None and edited_event < num_events:
            raw = edited(raw, edited_event)
        raws = [*raws, raw] if joins else [raw]
        scores, uses = rank(program, raws)
        assert_right(scores, uncached(raws))
        read = [parse_request(one, LONG).num_events for one in raws]
        assert [use.cached_events + use.computed_events for use in uses] == read
        assert program.held_bytes() <= num_pages * LONG_PAGE_BYTES


@pytest.mark.parametrize("name", EXTENDED_NAMES)
@torch.no_grad()
def test_a_host_may_keep_k_v_itself(name: str) -> None:
    world = world_of(name)
    model = RankingModel(world.dlrm).eval()
    program = RankingProgram(model, world.schema, "model-tables").eval()
    whole = draw_raw(11, 3, 5, world.schema)
    half = program.prefill(tensors_of([cut(whole, 0, 8)], world.schema))
    [(events, rows)] = program.reusable([8], [8], [11])
    kept = [half[0][:, :rows]]
    new = program.extend(tensors_of([cut(whole, events, 11)], world.schema), kept, [[events]])
    assert rows + new[0].size(1) == program.num_kv_rows([11])[0]
    kv = [torch.cat([kept[0], new[0]], dim=1)]
    scores = program.score(tensors_of([whole], world.schema), kv)
    assert_right(scores, uncached([whole], model, world.schema))


def without_last(tensor: Tensor) -> Tensor:
    return tensor[:-1]


def negative(tensor: Tensor) -> Tensor:
    # The sum does not change.
    return torch.cat([tensor[:1] + tensor[1] + 1, torch.tensor([-1]), tensor[2:]])


def one_more(tensor: Tensor) -> Tensor:
    return tensor + 1


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("user_key", without_last, "user_key has 2 rows; it must have 3"),
        ("time", without_last, "time has 2 rows"),
        ("history.first_event", without_last, r"history\.first_event has 2 rows"),
        ("candidates.dense", without_last, r"candidates\.dense has 8 rows; it must have 9"),
        ("context.country.lengths", without_last, r"context\.country\.lengths has 2 rows"),
        ("context.country.lengths", one_more, r"context\.country\.lengths sum to"),
        ("history.item_id.lengths", negative, r"history\.item_id\.lengths holds -1"),
        ("history.item_id.values", without_last, r"history\.item_id\.values has"),
        ("history.action.lengths", one_more, r"history\.action\.lengths sum to"),
        ("history.genres.lengths", without_last, r"history\.genres\.lengths has"),
        ("history.genres.values", without_last, r"history\.genres\.values has"),
        ("candidates.item_id.lengths", negative, r"candidates\.item_id\.lengths holds -1"),
        ("candidates.genres.lengths", without_last, r"candidates\.genres\.lengths has"),
    ],
)
@pytest.mark.parametrize("method", ["forward", "rank", "prefill"])
def test_tensors_that_disagree_are_refused_by_name(
    name: str, change: Callable[[Tensor], Tensor], message: str, method: str
) -> None:
    program = new_program()
    features = tensors_of([user("a", 9, 1), user("b", 8, 2), user("c", 20, 3)])
    features[name] = change(features[name])
    with pytest.raises(ValueError, match=message):
        getattr(program, method)(features)
    assert program.held_bytes() == 0


def test_columns_of_one_history_have_the_same_lengths() -> None:
    features = tensors_of([user("a", 9, 1), user("b", 8, 2)])
    features["history.time.lengths"] = features["history.time.lengths"].flip(0)
    with pytest.raises(ValueError, match=r"time\.lengths differs from history\.item_id\.lengths"):
        new_program().rank(features)


@pytest.mark.parametrize("name", ["candidates.genres", "context.country"])
def test_a_bag_or_a_request_with_too_many_ids_is_refused(name: str) -> None:
    program = new_program()
    features = tensors_of([user("a", 9, 1), user("b", 8, 2)])
    lengths = features[f"{name}.lengths"]
    last = torch.zeros_like(lengths)
    last[-1] = 1
    # The last bag, which is b's, gets 10 001 ids; the others keep theirs.
    longer = torch.full([10_001 - int(lengths[-1])], 2)
    features[f"{name}.lengths"] = lengths + last * longer.numel()
    features[f"{name}.values"] = torch.cat([features[f"{name}.values"], longer])
    with pytest.raises(ValueError, match=rf"{name}.lengths holds 10001 at index .*; from 0 to 100"):
        program.rank(features)
    program.max_request_ids = 10_000
    features[f"{name}.lengths"] -= last
    features[f"{name}.values"] = features[f"{name}.values"][:-1]
    with pytest.raises(ValueError, match=r"request 1 has 100\d\d ids in multi-valued columns"):
        program.rank(features)


def test_more_events_than_the_window_holds_are_refused() -> None:
    wide = replace(SCHEMA, histories=(History(HISTORY, Window(4 * PAGE_SIZE, 8)),))
    features = tensors_of([user("a", 100)], wide)
    with pytest.raises(ValueError, match=r"item_id\.lengths holds 100 at index 0; from 0 to 96"):
        new_program()(features)


METHODS = ("forward", "rank", "prefill", "extend", "score")
ALL_IDS = (
    *("user_id", "context.country.values", "history.item_id.values", "history.action.values"),
    *("history.genres.values", "candidates.item_id.values", "candidates.genres.values"),
)


@pytest.fixture(scope="module", params=TABLE_DTYPES)
def any_program(request: pytest.FixtureRequest) -> RankingProgram:
    """A TorchScript program over tables of each dtype."""
    model = quantise_tables(LONG_MODEL, request.param)
    scripted: RankingProgram = script_model(RankingProgram(model, LONG, "model-tables").eval())
    return scripted


def call(program: RankingProgram, method: str, features: dict[str, Tensor]) -> object:
    """A method of a program, and its arguments after the tensors of two requests."""
    nothing = torch.empty(4, 0, NUM_HEADS, HEAD_DIM)
    if method == "extend":
        return program.extend(features, [nothing], [[0, 0]])
    if method == "score":
        return program.score(features, [nothing])
    return getattr(program, method)(features)


def assert_all_refuse(program: RankingProgram, features: dict[str, Tensor], message: str) -> None:
    for method in METHODS:
        with pytest.raises((ValueError, torch.jit.Error), match=message):
            call(program, method, features)
    assert program.held_bytes() == 0


@pytest.mark.parametrize("name", ALL_IDS)
def test_a_row_that_no_table_has_is_refused_by_name(any_program: RankingProgram, name: str) -> None:
    """A program over int8 tables scored -1 as a row of zeros, and float32 raised from deep inside
    without a name."""
    good = tensors_of([user("a", 9), user("b", 20, 2)])
    [most] = [spec.most for spec in input_specs(LONG) if spec.name == name]
    assert most is not None
    for row in (-1, most + 1, 2**63 - 1, -(2**63)):
        rows = good[name].clone()
        rows[1] = row
        message = re.escape(f"{name} holds {row} at index 1; from 0 to {most} is allowed")
        assert_all_refuse(any_program, good | {name: rows}, message)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("time", -1, r"time holds -1 at index 1; from 0 to 4102444800 is allowed"),
        ("time", 4_102_444_801, r"time holds 4102444801 at index 1"),
        ("history.time.values", -5, r"history\.time\.values holds -5 at index 1; from 0 to"),
        ("history.first_event", -1, r"history\.first_event holds -1 at index 1; from 0 to"),
    ],
)
def test_a_number_outside_the_manifests_range_is_refused_by_name(
    any_program: RankingProgram, name: str, value: int, message: str
) -> None:
    features = tensors_of([user("a", 9), user("b", 20, 2)])
    features[name][1] = value
    assert_all_refuse(any_program, features, message)


def test_events_that_are_not_oldest_first_are_refused(any_program: RankingProgram) -> None:
    """A history in reverse was scored without an error."""
    features = tensors_of([user("a", 9), user("b", 20, 2)])
    times = features["history.time.values"]
    times[:9] = 1800  # of another request
    times[9:12] = 5
    times[12], times[13] = 1700, 1699
    name = r"history\.time\.values"
    message = rf"{name}\[13\] is 1699, before {name}\[12\] = 1700: events are given oldest first"
    assert_all_refuse(any_program, features, message)


@pytest.mark.parametrize("seconds", [0, 1])
def test_an_event_that_is_not_before_its_request_is_refused(
    any_program: RankingProgram, seconds: int
) -> None:
    """Training sees strictly earlier events only; a program scored later ones too."""
    features = tensors_of([user("a", 9), user("b", 20, 2)])
    request_time = int(features["time"][1])
    features["history.time.values"][28] = request_time + seconds
    message = (
        rf"history\.time\.values\[28\] is {request_time + seconds}, not before the request's time "
        rf"{request_time}"
    )
    assert_all_refuse(any_program, features, message)


def test_the_time_of_one_user_may_be_before_that_of_the_one_before() -> None:
    early, late = user("a", 9), user("b", 20, 2)
    early["time"], late["time"] = sorted([early["time"], late["time"]])
    raws = [moved_to(one, early["time"] - 500_000) for one in (early, late)]
    scores, _ = rank(new_program(), [raws[1], raws[0]])
    assert_right(scores, uncached([raws[1], raws[0]]))


def moved_to(raw: Raw, time: int) -> Raw:
    """The request at another time, with its events the same time before it."""
    seconds = time - raw["time"]
    times = [one + seconds for one in raw["history"]["time"]]
    return raw | {"time": time, "history": raw["history"] | {"time": times}}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("user_id", Tensor.float, "user_id does not hold int64"),
        ("user_key", Tensor.int, "user_key does not hold int64"),
        ("history.item_id.values", Tensor.double, r"history\.item_id\.values does not hold int64"),
        ("candidates.item_id.lengths", Tensor.int, r"item_id\.lengths does not hold int64"),
        ("time", lambda t: t.unsqueeze(1), "time has 2 dimensions; it must have 1"),
        ("candidates.dense", Tensor.double, r"candidates\.dense does not hold float32"),
        ("candidates.dense", lambda t: t[:, :3], r"dense is \[6, 3\]; it must be \[C, 5\]"),
        ("candidates.dense", lambda t: t[0], r"candidates\.dense is \[5\]"),
        ("candidates.dense", lambda t: t * torch.nan, r"dense: 30 of 30 numbers are not finite"),
        ("candidates.dense", lambda t: t.clamp(min=torch.inf), r"dense: 30 of 30 numbers are not"),
    ],
)
def test_tensors_of_another_kind_are_refused_by_name(
    any_program: RankingProgram, name: str, change: Callable[[Tensor], Tensor], message: str
) -> None:
    features = tensors_of([user("a", 9), user("b", 20, 2)])
    assert_all_refuse(any_program, features | {name: change(features[name])}, message)


def test_every_input_that_is_missing_is_named(any_program: RankingProgram) -> None:
    good = tensors_of([user("a", 9), user("b", 20, 2)])
    assert set(good) == {spec.name for spec in input_specs(LONG)}
    for name in good:
        rest = {other: tensor for other, tensor in good.items() if other != name}
        assert_all_refuse(any_program, rest, re.escape(f"{name} is missing"))


def test_dense_features_whose_sum_overflows_are_finite() -> None:
    features = tensors_of([user("a", 9)])
    features["candidates.dense"][:, 4] = 3e38
    with torch.no_grad():
        assert new_program()(features).isfinite().all()


def broken_model(value: float) -> RankingModel:
    """A model with one number that is not finite, which every candidate's score reads."""
    model = RankingModel(make_dlrm(6, LONG)).eval()
    with torch.no_grad():
        list(model.ranker.parameters())[-1].fill_(value)
    return model


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_scores_that_are_not_finite_are_refused(value: float) -> None:
    """The host got NaN as a score, and 0 or 1 for an infinite logit."""
    program = new_program(broken_model(value))
    features = tensors_of([user("a", 9), user("b", 20, 2)])
    for method in ("forward", "rank"):
        with pytest.raises(ValueError, match=r"for candidates 0, 1, 2, 3, 4, 5$"):
            call(program, method, features)


def test_of_many_scores_that_are_not_finite_ten_are_named() -> None:
    features = tensors_of([user("a", 9, num_candidates=25)])
    message = r"for candidates 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 15 more$"
    with pytest.raises(ValueError, match=message):
        new_program(broken_model(torch.nan))(features)


@pytest.mark.parametrize(
    ("one", "other", "expected"), [([], [], 0), ([5], [5], 1), ([5], [6], 0), ([5, 6], [5, 7], 1)]
)
def test_leading_equal(one: list[int], other: list[int], expected: int) -> None:
    assert leading_equal(torch.tensor(one), torch.tensor(other)) == expected


LIVES = [(5, 2), (5, 0), (9, 3), (9, 1), (0, 4), (11, 2)]  # events and candidates of one user

FRESH = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from tests.export.test_program import found_in
print(json.dumps({kind: found_in(Path(sys.argv[1]) / kind, kind) for kind in sys.argv[2:]}))
"""


def found_in(folder: Path, kind: str) -> list[Any]:
    """Outputs of a loaded program: for one user's requests in turn, for a batch, and uncached."""
    return life_of(load_program(folder / "model.pt"), world_of(kind).schema)


@torch.no_grad()
def life_of(program: RankingProgram, schema: FeatureSchema) -> list[Any]:
    found: list[Any] = [program.model_version]
    for num_events, num_candidates in LIVES:
        raw = cut(draw_raw(11, num_candidates, 5, schema), 0, num_events)
        scores, uses = rank(program, [raw | {"time": 1_700_000_000}], schema)
        found.append([scores.tolist(), uses])
    raws = [draw_raw(number, 1 + number % 3, 40 + number, schema) for number in range(13)]
    return [*found, program(tensors_of(raws, schema)).tolist()]


@pytest.fixture(scope="module")
def found_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What one fresh process says of the programs of all kinds."""
    folder = tmp_path_factory.mktemp("programs")
    for kind in KINDS:
        world = world_of(kind)
        model = RankingModel(world.dlrm).eval()
        (folder / kind).mkdir()
        audit = audit_model(model, world.schema)
        write_torchscript(model, world.schema, "model-tables", audit, folder / kind)
    output, errors = fresh_process(FRESH, str(folder), *KINDS).communicate()
    assert output, errors
    return json.loads(output)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_process_says_what_the_eager_program_says_bit_for_bit(
    kind: str, found_elsewhere: dict[str, list[Any]]
) -> None:
    world = world_of(kind)
    model = RankingModel(world.dlrm).eval()
    may_extend = kind in EXTENDED_NAMES
    program = RankingProgram(model, world.schema, "model-tables", True, may_extend).eval()
    eager = life_of(program, world.schema)
    assert found_elsewhere[kind] == json.loads(json.dumps(eager))
