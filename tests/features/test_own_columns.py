"""Columns of a user's own log: floats of users, requests and events beside the usual columns."""

import copy
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.encoder_worlds import ANCHORED_WINDOW, make_caches, schema_with, world_of
from tests.worlds import PROBABILITY_TOLERANCE, assert_same_scores, draw_raw
from torchrec_kvshare.cache.identity import NO_CONTEXT, UNNAMED, PrefixDigests, identity_of
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.errors import ConfigError, RequestError
from torchrec_kvshare.export.program import RankingProgram
from torchrec_kvshare.features.bags import bits_of, floats_of
from torchrec_kvshare.features.batches import RequestBatch, collate
from torchrec_kvshare.features.dense import clock_features
from torchrec_kvshare.features.parse import (
    parse_candidates,
    parse_request,
    parse_user,
    user_columns,
)
from torchrec_kvshare.features.request import Events
from torchrec_kvshare.features.schema import HISTORY, load_schema, save_schema
from torchrec_kvshare.features.tensors import request_tensors
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.serving.columns import column_specs, column_tensors, raw_requests
from torchrec_kvshare.verify.parity import probabilities_of

OWN = schema_with(ANCHORED_WINDOW)

Raw = dict[str, Any]


def good(**context: Any) -> Raw:
    raw = draw_raw(5, 3, seed=4, schema=OWN)
    return raw | {"context": {"country": ["GB"], "age": 31.0, "battery": -0.5} | context}


def test_floats_of_the_request_stand_between_its_clock_and_the_items_floats() -> None:
    raw = good()
    dense = parse_request(raw, OWN).dense.numpy()
    prices = np.array(raw["candidates"]["price"])
    assert OWN.num_dense == dense.shape[1] == 7
    clock = clock_features(np.array([raw["time"]]))
    assert dense[:, :4].tolist() == np.repeat(clock, 3, axis=0).tolist()
    of_request = [math.log(32), -math.log(1.5)]
    assert dense[:, 4:6] == pytest.approx(np.array([of_request] * 3), rel=1e-6)
    squashed = np.sign(prices) * np.log1p(np.abs(prices))
    assert dense[:, 6] == pytest.approx(squashed, rel=1e-6)


@pytest.mark.parametrize("value", [None, "31", True, math.nan, math.inf, [31.0], {}, 10**31])
def test_a_float_of_the_context_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(RequestError, match=r"context\.battery holds .*; a finite number is"):
        parse_request(good(battery=value), OWN)


def test_a_request_without_a_float_of_the_context_is_refused() -> None:
    raw = good()
    del raw["context"]["age"]
    with pytest.raises(RequestError, match="context has no 'age'"):
        parse_request(raw, OWN)


def test_candidates_that_come_later_have_their_users_floats() -> None:
    raw = good()
    user = parse_user(user_columns(raw, OWN), OWN)
    later = {"time": raw["time"] + 7, "candidates": raw["candidates"]}
    together = parse_request(raw | {"time": raw["time"] + 7}, OWN)
    assert torch.equal(parse_candidates(later, user, OWN).dense, together.dense)


def test_floats_of_the_context_go_as_tensors_of_one_number_per_request() -> None:
    raws = [good(), good(age=7, battery=1e-3) | {"request_id": "other"}]
    tensors = column_tensors(raws, OWN)
    assert list(tensors) == [spec.name for spec in column_specs(OWN) if not spec.is_optional]
    assert tensors["context.age.values"].tolist() == [31.0, 7.0]
    for dtype in (np.float64, np.float32):
        tensors["context.battery.values"] = np.array([-0.5, 0.25], dtype)
        back = raw_requests(tensors, OWN, 2)
        assert [one["context"]["battery"] for one in back] == [-0.5, 0.25]
        dense = [parse_request(one, OWN).dense for one in back]
        expected = [parse_request(raws[0], OWN), parse_request(good(age=7, battery=0.25), OWN)]
        assert all(map(torch.equal, dense, (one.dense for one in expected)))
    tensors["context.age.values"] = np.array([1.0])
    with pytest.raises(RequestError, match=r"context\.age\.values has 1 elements; user_id has 2"):
        raw_requests(tensors, OWN, 2)


def test_the_schema_of_own_columns_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_schema(tmp_path, OWN)
    assert load_schema(tmp_path).to_json() == OWN.to_json()


@pytest.mark.parametrize(
    "columns",
    [
        {"context_floats": ("country",)},
        {"context_floats": ("age", "age")},
    ],
)
def test_a_float_of_the_context_has_a_name_of_its_own(columns: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"the user columns are \[.*\]; '.*' is there twice"):
        replace(OWN, **columns)


# --- floats of events

EVENTS = ("item_id", "action", "surface", "dwell", "paid", "genres", "brands", "time")


def with_history(**columns: list[Any]) -> Raw:
    raw = good()
    return raw | {"history": raw["history"] | columns}


def events_of(raw: Raw) -> Events:
    return parse_request(raw, OWN).events_by_history[HISTORY]


def digest_of(raw: Raw) -> bytes:
    identity = identity_of(UNNAMED, NO_CONTEXT, HISTORY, 2)
    return PrefixDigests(events_of(raw), OWN, identity).whole


def test_floats_of_events_are_squashed_and_cut_to_the_window_like_ids() -> None:
    raw = draw_raw(ANCHORED_WINDOW.max_history + 3, 2, seed=6, schema=OWN)
    start = ANCHORED_WINDOW.start(len(raw["history"]["dwell"]))
    read = np.array(raw["history"]["dwell"][start:])
    floats = events_of(raw).floats["dwell"]
    assert floats.dtype == torch.float32
    assert floats.numpy() == pytest.approx(np.sign(read) * np.log1p(np.abs(read)), rel=1e-6)
    tail = events_of(raw).part(2, 5)
    assert tail.floats["paid"].tolist() == events_of(raw).floats["paid"][2:5].tolist()


def test_a_batch_has_the_bits_of_floats_and_gives_them_back() -> None:
    raws = [draw_raw(events, 1, seed=events, schema=OWN) for events in (0, 3, 9)]
    requests = [parse_request(raw, OWN) for raw in raws]
    column = collate(requests, OWN).sparse_features["history.dwell"]
    assert column.lengths().tolist() == [0, 3, 9]
    expected = torch.cat([one.events_by_history[HISTORY].floats["dwell"] for one in requests])
    assert torch.equal(floats_of(column.values()), expected)
    tensors = request_tensors(requests, OWN)
    assert torch.equal(tensors["history.dwell.values"], expected)


@given(st.lists(st.floats(width=32, allow_nan=False)))
def test_bits_are_those_of_the_float(values: list[float]) -> None:
    floats = torch.tensor(values, dtype=torch.float32)
    bits = bits_of(floats)
    assert bits.tolist() == floats.numpy().view(np.int32).tolist()
    assert torch.equal(bits_of(floats_of(bits)), bits)


@pytest.mark.parametrize(
    "edit",
    [
        {"dwell": [1.0, 2.0, 3.0, 4.0, 5.5]},
        {"dwell": [2.0, 1.0, 3.0, 4.0, 5.0]},
        {"paid": [0.0, 2.0, 1e30, 4.0, 5.0]},
        {"surface": ["home", "home", "search", None, "home"]},
    ],
)
def test_an_edited_column_of_events_is_another_history(edit: dict[str, list[Any]]) -> None:
    columns = {"dwell": [1.0, 2.0, 3.0, 4.0, 5.0], "paid": [0.0, -2.0, 1e30, 4.0, 5.0]}
    one = with_history(**columns, surface=["home", None, "search", None, "home"])
    other = one | {"history": one["history"] | edit}
    assert digest_of(one) != digest_of(other)
    assert digest_of(one) == digest_of(copy.deepcopy(one))
    assert len(RequestBatch([parse_request(raw, OWN) for raw in (one, other)]).users) == 2
    assert len(RequestBatch([parse_request(raw, OWN) for raw in (one, one)]).users) == 1


def test_an_edited_float_is_a_miss_and_scored_anew() -> None:
    """K/V of the events before the edit is reused; the scores are those without a cache."""
    world = world_of("causal", 1)
    model = RankingModel(world.dlrm).eval()
    engine = Engine(model, OWN, KVStore(make_caches(model, [9])), version=UNNAMED)
    raw = draw_raw(12, 3, seed=9, schema=OWN)
    [first] = engine.rank([parse_request(raw, OWN)])
    edited = copy.deepcopy(raw)
    edited["history"]["dwell"][-1] += 1.0
    [other] = engine.rank([parse_request(edited, OWN)])
    assert (first.cache.status, other.cache.status) == ("miss", "partial")
    assert (other.cache.reason, other.cache.cached_events) == ("edited", 10)
    assert other.scores != first.scores
    [expected] = Engine(model, OWN, None, version=UNNAMED).rank([parse_request(edited, OWN)])
    assert_same_scores([other], [expected])


def test_a_program_refuses_floats_that_are_none_and_misses_edited_ones() -> None:
    world = world_of("causal", 1)
    program = RankingProgram(RankingModel(world.dlrm).eval(), OWN, "a-b").eval()
    raw = draw_raw(12, 3, seed=9, schema=OWN)
    tensors = request_tensors([parse_request(raw, OWN)], OWN)
    name = "history.dwell.values"
    for wrong, message in (
        (tensors[name].double(), f"{name} does not hold float32"),
        (tensors[name] / 0, f"{name}: 12 of 12 numbers are not finite"),
        (tensors[name][1:], "history.dwell.lengths sum to 12"),
        (tensors[name][:, None], f"{name} has more than one dimension"),
    ):
        with pytest.raises(ValueError, match=message):
            program.rank(tensors | {name: wrong})
    with pytest.raises(ValueError, match=f"{name} is missing"):
        program({other: one for other, one in tensors.items() if other != name})
    program.rank(tensors)
    raw["history"]["dwell"][-1] += 1.0
    scores, use = program.rank(request_tensors([parse_request(raw, OWN)], OWN))
    assert program.reason_names()[int(use[0, 1])] == "edited"
    assert use[0, 2:].tolist() == [11, 1]
    [expected] = Engine(program.ranking, OWN, None, version=UNNAMED).rank([parse_request(raw, OWN)])
    torch.testing.assert_close(
        scores, probabilities_of([expected]), rtol=0.0, atol=PROBABILITY_TOLERANCE
    )


@pytest.mark.parametrize("value", [None, "3", False, math.nan, -math.inf, [1.0], 10**400])
def test_a_float_of_an_event_that_is_no_number_is_refused(value: Any) -> None:
    with pytest.raises(RequestError, match=r"history\.paid holds .*; a finite number is allowed"):
        parse_request(with_history(paid=[1.0, 2, value, 4, 5]), OWN)


@pytest.mark.parametrize("column", EVENTS)
def test_every_column_of_events_is_needed_in_full(column: str) -> None:
    raw = good()
    raw["history"][column] = raw["history"][column][:-1]
    with pytest.raises(RequestError, match="the columns of history differ in length"):
        parse_request(raw, OWN)
    del raw["history"][column]
    with pytest.raises(RequestError, match=f"history has no '{column}'"):
        parse_request(raw, OWN)


def test_columns_of_events_go_as_tensors_and_come_back() -> None:
    raws = [draw_raw(events, 2, seed=events, schema=OWN) for events in (3, 5)]
    tensors = column_tensors(raws, OWN)
    assert tensors["history.dwell.values"].dtype == np.float64
    back = raw_requests(tensors, OWN, 2)
    for raw, other in zip(raws, back, strict=True):
        expected, found = events_of(raw), events_of(other)
        assert torch.equal(expected.columns["surface"], found.columns["surface"])
        assert torch.equal(expected.floats["paid"], found.floats["paid"])
    tensors["history.paid.values"] = np.arange(8)
    with pytest.raises(RequestError, match=r"history\.paid\.values is INT64; FP32 or FP64 is"):
        raw_requests(tensors, OWN, 2)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"event_floats": ("surface",)}, "'surface' is there twice"),
        ({"event_floats": ("genres",)}, "'genres' is there twice"),
        ({"event_floats": ("action",)}, r"event columns are named \['action'\]; requests reserve"),
        ({"event_floats": ("time",)}, r"event columns are named \['time'\]; requests reserve"),
        ({"event_attributes": ("action", "genres")}, "'genres' is there twice"),
    ],
)
def test_a_column_of_events_has_a_name_of_its_own(columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(OWN, **columns)


def test_candidates_and_events_may_have_a_float_of_one_name() -> None:
    schema = replace(OWN, event_floats=("price",))
    assert schema.item_floats == ("price",)


def test_training_reaches_the_vector_of_every_float() -> None:
    world = world_of("causal", 1)
    batch = collate([parse_request(draw_raw(9, 3, seed=2, schema=OWN), OWN)], OWN)
    logits = world.dlrm(batch.dense_features, batch.sparse_features)
    names = [name for name, _ in world.dlrm.named_parameters() if "event_floats" in name]
    [gradient] = torch.autograd.grad(logits.sum(), world.dlrm.get_parameter(names[0]))
    assert (len(names), gradient.shape) == (1, (2, world.spec.token_width))
    assert (gradient.abs().sum(1) > 0).all()
