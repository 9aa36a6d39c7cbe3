"""Raw requests become tensors and come back the same; what cannot be cut is refused by name."""

import math
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.encoder_worlds import TWO_HISTORIES
from tests.worlds import SCHEMA, draw_raw, draw_raws, parse_all, ragged_users
from torchrec_kvshare.cache.leases import CacheUse
from torchrec_kvshare.errors import RequestError
from torchrec_kvshare.features import tensors as rows
from torchrec_kvshare.features.parse import Ragged, parse_request
from torchrec_kvshare.features.schema import HISTORY, FeatureSchema, History, Vocabulary, Window
from torchrec_kvshare.scoring.engine import Answer
from torchrec_kvshare.serving.columns import (
    RequestLimits,
    check_limits,
    column_specs,
    column_tensors,
    datatype_of,
    output_specs,
    output_tensors,
    raw_candidates,
    raw_requests,
)

Raw = dict[str, Any]
Tensors = dict[str, NDArray[Any]]

# Items alone: no context, no action, no attributes, no floats.
PLAIN = FeatureSchema(
    {"user_id": Vocabulary(["u"]), "item_id": Vocabulary(["3", "9"])},
    context=(),
    event_attributes=(),
    item_attributes=(),
    item_floats=(),
    histories=(History(HISTORY, Window(8, 4)),),
)
LIMITS = RequestLimits(requests=4, candidates=7, events=40, values=90)
MOST = LIMITS.requests


def good() -> Tensors:
    """Two requests: 3 events and 2 candidates, 5 events and 4 candidates; some ids are null."""
    raws = [draw_raw(3, 2, seed=8), draw_raw(5, 4, seed=11)]
    raws[0]["history"]["genres"] = [["genre 1", None], [], ["genre 6"]]
    raws[1]["history"]["action"][2] = None
    return column_tensors(raws, SCHEMA)


def as_json(raw: Raw) -> Raw:
    """The same request with lists alone."""

    def listed(column: Any) -> Any:
        if isinstance(column, Ragged):
            return column.cells()
        return column.tolist() if isinstance(column, np.ndarray) else column

    return {
        name: {column: listed(values) for column, values in group.items()}
        if isinstance(group, dict)
        else group
        for name, group in raw.items()
    }


def assert_same_requests(raws: list[Raw], others: list[Raw], schema: FeatureSchema) -> None:
    """As the model gets them."""
    requests, expected = parse_all(raws, schema), parse_all(others, schema)
    assert [r.user_id for r in requests] == [r.user_id for r in expected]
    of_requests, of_expected = (rows.request_tensors(r, schema) for r in (requests, expected))
    for name, tensor in of_expected.items():
        assert of_requests[name].tolist() == tensor.tolist(), name


# --- there and back


@pytest.mark.parametrize("schema", [SCHEMA, TWO_HISTORIES, PLAIN], ids=["one", "two", "plain"])
def test_tensors_are_those_that_the_specifications_name(schema: FeatureSchema) -> None:
    tensors = column_tensors([draw_raw(3, 2, 1, schema), draw_raw(0, 4, 2, schema)], schema)
    specs = [spec for spec in column_specs(schema) if not spec.is_optional]
    assert list(tensors) == [spec.name for spec in specs]
    for spec in specs:
        assert datatype_of(tensors[spec.name]) in spec.datatypes
        assert spec.shape == (-1,)
        assert tensors[spec.name].ndim == 1


def test_sizes_are_those_of_requests_events_and_candidates() -> None:
    sizes = {name: tensor.size for name, tensor in good().items()}
    assert sizes["user_id"] == sizes["time"] == sizes["context.country.lengths"] == 2
    assert sizes["history.item_id.values"] == sizes["history.genres.lengths"] == 3 + 5
    assert sizes["candidates.price.values"] == sizes["candidates.genres.lengths"] == 2 + 4
    assert good()["history.time.lengths"].tolist() == [3, 5]
    assert good()["history.genres.lengths"].tolist()[:3] == [2, 0, 1]


@given(users=ragged_users, integers=st.booleans())
def test_requests_come_back_as_they_went(users: list[tuple[int, int, int]], integers: bool) -> None:
    raws = draw_raws(users)
    for raw in raws if integers else []:
        raw["user_id"] = int(raw["time"])
        for group in (raw["history"], raw["candidates"]):
            group["item_id"] = [int(i) if i and i.isdigit() else i for i in group["item_id"]]
    back = raw_requests(column_tensors(raws, SCHEMA), SCHEMA, MOST)
    assert_same_requests(back, raws, SCHEMA)


@pytest.mark.parametrize("schema", [TWO_HISTORIES, PLAIN], ids=["two", "plain"])
def test_every_schema_has_its_own_columns(schema: FeatureSchema) -> None:
    raws = [draw_raw(9, 3, 4, schema), draw_raw(0, 1, 5, schema)]
    assert_same_requests(raw_requests(column_tensors(raws, schema), schema, MOST), raws, schema)


@pytest.mark.parametrize(
    ("ids", "datatype", "back"),
    [
        ([3, 0, 9], "INT64", [3, 0, 9]),
        (["3", "é", "九"], "BYTES", ["3", "é", "九"]),
        ([3, "b", 9], "BYTES", ["3", "b", "9"]),
        ([3, None, 9], "BYTES", ["3", None, "9"]),
        ([2**63 - 1, 1, 2], "INT64", [2**63 - 1, 1, 2]),
        ([2**63, 1, 2], "BYTES", [str(2**63), "1", "2"]),
        (["a\0b", "", "\0"], "BYTES", ["a\0b", None, "\0"]),
    ],
    ids=["integers", "texts", "mixed", "null", "longest", "too long", "separators"],
)
def test_ids_are_integers_where_all_are(ids: list[Any], datatype: str, back: list[Any]) -> None:
    raw = draw_raw(2, 3, seed=1)
    raw["candidates"]["item_id"] = ids
    tensors = column_tensors([raw], SCHEMA)
    assert datatype_of(tensors["candidates.item_id.values"]) == datatype
    assert list(raw_requests(tensors, SCHEMA, MOST)[0]["candidates"]["item_id"]) == back


IDS = ["1", "-1", "3.5", "true", "false"]


@pytest.mark.parametrize(
    ("tensor", "rows"),
    [
        (np.array([1, -1, 7]), [2, 3, 1]),
        (np.array([1.0, -1.0, 3.5]), [2, 3, 4]),
        (np.array([True, False, True]), [5, 6, 5]),
        (np.array([b"1.0", b" -1", b"True"], dtype=object), [2, 3, 5]),
    ],
    ids=["INT64", "FP64", "BOOL", "BYTES"],
)
def test_an_id_is_the_same_id_in_every_datatype(tensor: NDArray[Any], rows: list[int]) -> None:
    """Numbers that are no integers, and booleans, had no datatype; a negative one was refused."""
    schema = replace(
        PLAIN, vocabulary_by_column={"user_id": Vocabulary(IDS), "item_id": Vocabulary(IDS)}
    )
    tensors = column_tensors([draw_raw(3, 3, seed, schema) for seed in (1, 2, 3)], schema)
    tensors |= {"user_id": tensor, "candidates.item_id.values": np.concatenate([tensor] * 3)}
    requests = parse_all(raw_requests(tensors, schema, MOST), schema)
    assert [request.user_row for request in requests] == rows
    assert all(request.candidate_items.tolist() == rows for request in requests)


def test_numbers_and_booleans_go_as_texts_of_the_same_id() -> None:
    raw = draw_raw(2, 4, seed=1, schema=PLAIN)
    raw["candidates"]["item_id"] = [3.0, True, -0.0, 9]
    sent = column_tensors([raw], PLAIN)
    assert datatype_of(sent["candidates.item_id.values"]) == "BYTES"
    assert_same_requests(raw_requests(sent, PLAIN, MOST), [raw], PLAIN)
    raw["candidates"]["item_id"] = [3.0, math.nan, 1, 2]
    with pytest.raises(RequestError, match=r"candidates.item_id holds nan"):
        column_tensors([raw], PLAIN)


@pytest.mark.parametrize(
    ("ids", "datatype"),
    [(["3", "-9"], "INT64"), (["3", "a"], "BYTES"), (["3", "3.5"], "BYTES"), (["007"], "BYTES")],
)
def test_the_datatype_told_first_is_one_that_every_known_id_has(
    ids: list[str], datatype: str
) -> None:
    """Metadata said INT64 where the vocabulary holds texts."""
    schema = replace(
        PLAIN, vocabulary_by_column=PLAIN.vocabulary_by_column | {"item_id": Vocabulary(ids)}
    )
    told = {spec.name: spec.datatypes[0] for spec in column_specs(schema)}
    assert told["history.item_id.values"] == told["candidates.item_id.values"] == datatype
    assert told["user_id"] == "BYTES"


def test_the_place_of_the_first_event_goes_and_comes_if_a_request_says_it() -> None:
    raws = [draw_raw(9, 1, seed) for seed in (1, 2, 3)]
    assert "history.first_event" not in column_tensors(raws, SCHEMA)
    raws[0]["history"]["first_event"] = 500
    raws[1]["history"]["first_event"] = None
    tensors = column_tensors(raws, SCHEMA)
    assert tensors["history.first_event"].tolist() == [500, 0, 0]
    back = raw_requests(tensors, SCHEMA, MOST)
    assert_same_requests(back, raws, SCHEMA)
    read = [request.events_by_history[HISTORY].first_event for request in parse_all(back)]
    assert read == [504, 0, 0]  # 72 blocks of 7


def test_a_model_of_some_actions_has_no_tensor_for_the_first_place() -> None:
    assert "history.first_event" in [spec.name for spec in column_specs(SCHEMA)]
    assert "history.first_event" not in [spec.name for spec in column_specs(TWO_HISTORIES)]


def test_unknown_ids_are_told_where_a_request_asked() -> None:
    use = CacheUse("miss", "cold", 0, 3, "none")
    asked, silent = Answer("a", [0.1], "m-t", use, {"user_id": 1}), Answer("b", [0.1], "m-t", use)
    assert "unknown_ids" not in output_tensors([silent])
    told = output_tensors([silent, asked])["unknown_ids"].tolist()
    assert told == [b"{}", b'{"user_id": 1}']


def test_cells_come_back_as_lists() -> None:
    raw = draw_raw(4, 1, seed=1)
    raw["history"]["genres"] = ["genre 1", None, [], ["genre 2", "genre 3"]]
    raw["context"]["country"] = "AT"
    back = as_json(raw_requests(column_tensors([raw], SCHEMA), SCHEMA, MOST)[0])
    assert back["history"]["genres"] == [["genre 1"], [], [], ["genre 2", "genre 3"]]
    assert back["context"] == {"country": ["AT"]}
    assert_same_requests([back], [raw], SCHEMA)


def test_a_text_without_utf8_is_refused_by_its_column() -> None:
    raw = draw_raw(2, 3, seed=1) | {"user_id": "a\ud800"}
    with pytest.raises(RequestError, match=r"^user_id holds '\\ud800'"):
        column_tensors([raw], SCHEMA)


def test_outputs_are_scores_and_what_the_cache_did() -> None:
    assert {spec.name: spec.datatypes for spec in output_specs(SCHEMA)} == {
        "scores": ("FP64",),
        "scores.lengths": ("INT64",),
        "cache.status": ("BYTES",),
        "cache.reason": ("BYTES",),
        "cache.tier": ("BYTES",),
        "cache.cached_events": ("INT64",),
        "cache.computed_events": ("INT64",),
        "cache.staleness_s": ("FP64",),
    }


def test_answers_are_the_tensors_that_the_specifications_name() -> None:
    hit = CacheUse("hit", "", 5, 0, "pages", 1.5)
    miss = CacheUse("miss", "cold", 0, 3, "none")
    tensors = output_tensors([Answer("a", [0.1, 1 / 3], "m-t", hit), Answer("b", [], "m-t", miss)])
    assert [(name, (datatype_of(tensor),)) for name, tensor in tensors.items()] == [
        (spec.name, spec.datatypes) for spec in output_specs(SCHEMA)
    ]
    assert {name: tensor.tolist() for name, tensor in tensors.items()} == {
        "scores": [0.1, 1 / 3],
        "scores.lengths": [2, 0],
        "cache.status": [b"hit", b"miss"],
        "cache.reason": [b"", b"cold"],
        "cache.tier": [b"pages", b"none"],
        "cache.cached_events": [5, 0],
        "cache.computed_events": [0, 3],
        "cache.staleness_s": [1.5, 0.0],
    }


# --- candidates of a user who came before


def candidates_of(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name.startswith("candidates.")}


@pytest.mark.parametrize("schema", [SCHEMA, PLAIN], ids=["one", "plain"])
def test_candidates_alone_come_back_as_they_went(schema: FeatureSchema) -> None:
    tensors = column_tensors([draw_raw(2, 4, 7, schema)], schema)
    (raw,) = raw_requests(tensors, schema, MOST)
    alone = raw_candidates(candidates_of(tensors), schema)
    assert as_json(alone) == {"candidates": as_json(raw)["candidates"]}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (column_tensors([draw_raw(2, 4, 7)], SCHEMA), "'user_id' is no input"),
        ({}, "input candidates.item_id.values is missing"),
        (candidates_of(good()), "candidates.item_id.lengths has 2 elements; 1 are allowed"),
    ],
    ids=["a user", "nothing", "two groups"],
)
def test_what_is_not_one_group_of_candidates_is_refused(tensors: Tensors, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        raw_candidates(tensors, SCHEMA)


# --- malformed tensors


def integers(*values: int) -> NDArray[Any]:
    return np.array(values, dtype=np.int64)


def texts(*values: bytes) -> NDArray[Any]:
    return np.array(values, dtype=object)


HALF = 2**62
EIGHT_TEXTS = [b"a"] * 8

# What stands there instead (None: nothing), and what the message says.
BREAKAGES: dict[str, tuple[str, NDArray[Any] | None, str]] = {
    "missing": ("history.time.values", None, "input history.time.values is missing; these came"),
    "misspelt": ("history.tyme.values", integers(1), "'history.tyme.values' is no input.*'time'"),
    "long name": ("x" * 9999, integers(1), r"^'x{199}\.\.\. is no input"),
    "narrow": ("time", np.array([1, 2], np.int32), "time is int32; INT64 is allowed"),
    "narrow ids": ("user_id", np.float32([1, 2]), "user_id is FP32; BYTES or INT64 or FP64 or B"),
    "places": ("history.first_event", integers(1), "first_event has 1 elements; user_id has 2"),
    "text places": ("history.first_event", texts(b"1", b"2"), "first_event is BYTES; INT64 is al"),
    "text lengths": ("history.time.lengths", texts(b"3", b"5"), "time.lengths is BYTES; INT64 is"),
    "text times": ("time", texts(b"1", b"2"), "time is BYTES; INT64 is allowed"),
    "integer floats": ("candidates.price.values", integers(1), "price.values is INT64; FP32 or FP"),
    "no dimension": ("time", np.array(7), "time has 0 dimensions; 1 is allowed"),
    "two dimensions": ("time", integers(7, 8).reshape(1, 2), "time has 2 dimensions; 1 is"),
    "nobody": ("user_id", integers(), "user_id has 0 elements; 1 to 4 are allowed"),
    "crowd": ("user_id", integers(*range(5)), "user_id has 5 elements; 1 to 4 are allowed"),
    "users": ("user_id", integers(7), "time has 2 elements; user_id has 1"),
    "times": ("time", integers(7, 8, 9), "time has 3 elements; user_id has 2"),
    "lengths of requests": (
        "history.action.lengths",
        integers(8),
        "history.action.lengths has 1 elements; 2 are allowed",
    ),
    "lengths of events": (
        "history.genres.lengths",
        integers(1, 1, 1),
        "history.genres.lengths has 3 elements; 8 are allowed",
    ),
    "lengths of candidates": (
        "candidates.genres.lengths",
        integers(),
        "candidates.genres.lengths has 0 elements; 6 are allowed",
    ),
    "negative": ("history.time.lengths", integers(-1, 9), "history.time.lengths holds -1"),
    "short": ("history.item_id.lengths", integers(3, 4), "item_id.lengths sums to 7;.*has 8 ele"),
    "long": ("candidates.price.lengths", integers(2, 5), "price.lengths sums to 7;.*has 6 ele"),
    "no utf-8": (
        "history.action.values",
        texts(*EIGHT_TEXTS[:-1], b"ok\xff"),
        r"history.action.values holds the byte b'\\xff'",
    ),
    "half a letter": (
        "history.action.values",
        texts(b"\xc3", b"\xa9", *EIGHT_TEXTS[2:]),
        r"history.action.values holds the byte b'\\xc3'",
    ),
}


@pytest.mark.parametrize("case", BREAKAGES)
def test_a_broken_tensor_is_refused_by_its_name(case: str) -> None:
    name, tensor, message = BREAKAGES[case]
    tensors = good()
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    with pytest.raises(RequestError, match=message):
        raw_requests(tensors, SCHEMA, MOST)


def test_lengths_whose_sum_wraps_to_the_right_one_are_refused() -> None:
    raws = [draw_raw(0, 1, seed) for seed in range(4)]
    tensors = column_tensors(raws, SCHEMA)
    tensors["history.action.lengths"] = integers(HALF, HALF, HALF, HALF)
    assert tensors["history.action.lengths"].sum() == tensors["history.action.values"].size == 0
    with pytest.raises(RequestError, match=f"history.action.lengths sums to {2**64}"):
        raw_requests(tensors, SCHEMA, MOST)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("user_id", texts(b"", b"u"), "user_id holds None"),
        ("user_id", np.array([np.nan, 4.0]), "user_id holds nan"),
        ("history.item_id.values", np.full(8, np.inf), "history.item_id holds inf"),
        ("history.item_id.values", texts(*[b" "] * 8), "history.item_id holds ' '"),
        ("history.first_event", integers(-1, 4), "history.first_event is -1"),
        ("time", integers(2**40, 4), "time is 1099511627776"),
        ("history.time.lengths", integers(2, 6), "columns of history differ in length"),
        ("candidates.price.values", np.full(6, np.nan), "candidates.price holds nan"),
    ],
    ids=[
        *("no user", "no number", "infinite", "blank", "negative place"),
        *("milliseconds", "unequal columns", "not a number"),
    ],
)
def test_what_tensors_hold_is_checked_as_in_json(
    name: str, tensor: NDArray[Any], message: str
) -> None:
    (raw, _) = raw_requests(good() | {name: tensor}, SCHEMA, MOST)
    with pytest.raises(RequestError, match=message):
        parse_request(raw, SCHEMA)


# --- limits

# Which request is too long, for what, and what the message says.
TIGHT: dict[str, tuple[int, dict[str, int], str]] = {
    "events": (1, {"events": 4}, "^history.item_id has 5 events; at most 4 are allowed"),
    "candidates": (1, {"candidates": 3}, "^candidates.item_id has 4 candidates; at most 3 are"),
    "values": (0, {"values": 2}, "^history.genres has 3 ids; at most 2 are allowed"),
}


@pytest.mark.parametrize("case", TIGHT)
def test_what_is_too_long_is_refused_as_tensors_and_as_json(case: str) -> None:
    row, tight, message = TIGHT[case]
    tensors, limits = good(), replace(LIMITS, **tight)
    longer = raw_requests(tensors, SCHEMA, MOST)[row]
    check_limits(longer, LIMITS)
    for raw in (longer, as_json(longer)):
        with pytest.raises(RequestError, match=message):
            check_limits(raw, limits)


def test_limits_are_of_one_request_each() -> None:
    exact = RequestLimits(requests=3, candidates=4, events=5, values=10)
    raws = [draw_raw(5, 4, seed) for seed in range(3)]
    for raw in raw_requests(column_tensors(raws, SCHEMA), SCHEMA, exact.requests):
        check_limits(raw, exact)


def test_ids_of_a_context_are_limited() -> None:
    with pytest.raises(RequestError, match=r"context.country has 91 ids; at most 90 are allowed"):
        check_limits({"context": {"country": ["AT"] * 91}}, LIMITS)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)
groups = json_values | st.dictionaries(st.sampled_from(["item_id", "time"]), json_values)


@given(raw=st.dictionaries(st.sampled_from(["context", "history", "candidates"]), groups))
def test_limits_of_any_json_hold_or_are_refused(raw: Raw) -> None:
    with suppress(RequestError):
        check_limits(raw, RequestLimits(requests=1, candidates=1, events=1, values=1))


arrays = st.one_of(
    st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-1, 9), max_size=9).map(
        lambda values: np.array(values, dtype=np.int64)
    ),
    st.lists(st.binary(max_size=3), max_size=9).map(lambda values: np.array(values, dtype=object)),
    st.lists(st.floats(), max_size=9).map(np.array),
)


@given(changes=st.dictionaries(st.sampled_from(list(good())), arrays, min_size=1, max_size=3))
def test_any_tensors_are_requests_or_are_refused(changes: Tensors) -> None:
    with suppress(RequestError):
        parse_all(raw_requests(good() | changes, SCHEMA, MOST))
