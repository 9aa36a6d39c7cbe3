"""Outside input either becomes a request or is refused by name; nothing else ever happens."""

import copy
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.core.worlds import SCHEMA, draw_raw, examples
from torchrec_kvshare.data.schema import HISTORY, FeatureSchema, Vocabulary, Window
from torchrec_kvshare.engine import Engine
from torchrec_kvshare.errors import RequestError
from torchrec_kvshare.features import (
    MAX_CANDIDATES,
    MAX_TIME,
    Events,
    Request,
    decode_request,
    parse_request,
)
from torchrec_kvshare.ranking import RankingModel

RawRequest = dict[str, Any]
DELETED = object()


def good() -> RawRequest:
    return draw_raw(3, 2, 4)


def parse_line(line: str | bytes) -> Request:
    return parse_request(decode_request(line), SCHEMA)


def events_of(request: Request) -> Events:
    return request.events_by_history[HISTORY]


def changed(path: str, value: Any) -> RawRequest:
    """A good request but for one place, such as ``history.time.1``."""
    raw = good()
    *groups, last = path.split(".")
    place: Any = raw
    for group in groups:
        place = place[group]
    if isinstance(place, list):
        place[int(last)] = value
    elif value is DELETED:
        del place[last]
    else:
        place[last] = value
    return raw


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("{'user_id': 1}", "not JSON"),
        ('{"user_id": 7} trailing', "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b'{"user_id": "\xff"}', "not JSON"),
        ('{"user_id": ' + "9" * 5000 + "}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"a": ' * 100_000, "not JSON"),
        ("null", "a request is a JSON object; got NoneType"),
        ("[]", "a request is a JSON object; got list"),
        ('"text"', "a request is a JSON object; got str"),
        ("NaN", "a request is a JSON object; got float"),
        ("7", "a request is a JSON object; got int"),
        ('{"user_id": 1, "user_id": 2}', "the key 'user_id' stands twice"),
        ('{"history": {"time": [], "item_id": [], "time": []}}', "the key 'time' stands twice"),
    ],
)
def test_a_line_that_is_no_request_is_refused(line: str | bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_line(line)


BAD_IDS = [-1, True, 1.0, "", [], {}, ["a"], math.nan]
BAD_TIMES = [-1, -0.5, MAX_TIME + 1, 1_700_000_000_000, True, "1700000000", None, [], {}, 10**400]
BAD_TIMES += [math.nan, math.inf, -math.inf, 1e300]
BAD_FLOATS = [True, "3.5", None, [], {}, [1.0], math.nan, math.inf, -math.inf, 10**400, -(10**31)]
BAD_GROUPS = [None, [], "text", 7, True, [{}]]
BAD_COLUMNS = [None, {}, "text", 7, True]


BAD_BAGS = [-1, 1.5, {}, [[]], [{}], [True], [-1]]
EVENT_COLUMNS = ("item_id", "action", "genres", "time")
CANDIDATE_COLUMNS = ("item_id", "genres", "price")

# Where, what may not stand there, and what the message names.
BREAKAGES: list[tuple[str, list[Any], str]] = [
    ("user_id", [*BAD_IDS, None, DELETED], "user_id"),
    ("time", [*BAD_TIMES, DELETED], "time"),
    ("request_id", [1.5, True, [], {}], "request_id"),
    ("context", [*BAD_GROUPS, DELETED], "context"),
    ("context.country", BAD_BAGS, "context.country"),
    ("context.country", [DELETED], "country"),
    ("history", [*BAD_GROUPS, DELETED], "history"),
    *[(f"history.{column}", BAD_COLUMNS, f"history.{column}") for column in EVENT_COLUMNS],
    *[(f"history.{column}", [DELETED], column) for column in EVENT_COLUMNS],
    ("history.item_id.1", BAD_IDS, "history.item_id"),
    ("history.action.2", BAD_IDS, "history.action"),
    ("history.time.0", BAD_TIMES, "history.time"),
    ("history.genres.0", BAD_BAGS, "history.genres"),
    ("candidates", [*BAD_GROUPS, DELETED], "candidates"),
    *[
        (f"candidates.{column}", BAD_COLUMNS, f"candidates.{column}")
        for column in CANDIDATE_COLUMNS
    ],
    *[(f"candidates.{column}", [DELETED], column) for column in CANDIDATE_COLUMNS],
    ("candidates.item_id.1", BAD_IDS, "candidates.item_id"),
    ("candidates.price.0", BAD_FLOATS, "candidates.price"),
    ("candidates.genres.1", BAD_BAGS, "candidates.genres"),
]


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [(path, value, name) for path, values, name in BREAKAGES for value in values],
)
def test_a_broken_column_is_refused_by_its_name(path: str, value: Any, name: str) -> None:
    with pytest.raises(RequestError, match=name.replace(".", r"\.")):
        parse_request(changed(path, value), SCHEMA)


@pytest.mark.parametrize("column", ["item_id", "action", "genres", "time"])
def test_columns_of_a_history_have_one_length(column: str) -> None:
    raw = changed(f"history.{column}", good()["history"][column][:-1])
    with pytest.raises(RequestError, match=rf"columns of history differ in length.*'{column}': 2"):
        parse_request(raw, SCHEMA)


@pytest.mark.parametrize("column", ["item_id", "genres", "price"])
def test_columns_of_candidates_have_one_length(column: str) -> None:
    raw = changed(f"candidates.{column}", good()["candidates"][column] * 2)
    with pytest.raises(RequestError, match=rf"of candidates differ in length.*'{column}': 4"):
        parse_request(raw, SCHEMA)


def test_too_many_candidates_are_refused() -> None:
    raw = good()
    repeats = MAX_CANDIDATES // 2 + 1
    raw["candidates"] = {column: cells * repeats for column, cells in raw["candidates"].items()}
    with pytest.raises(RequestError, match="candidates has 100002 rows; at most 100000"):
        parse_request(raw, SCHEMA)


def test_an_integer_too_long_to_print_is_refused() -> None:
    """Its digits could not be put into the message, and that was a ValueError of Python's own."""
    for path in ("user_id", "time", "history.time.0", "candidates.price.1", "candidates.item_id.0"):
        with pytest.raises(RequestError, match=path.removesuffix(".0").removesuffix(".1")):
            parse_request(changed(path, -(10**5000)), SCHEMA)


@pytest.mark.parametrize("path", ["user_id", "history.genres.0", "candidates.price.1"])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nesting_of_any_depth_is_refused(path: str, opening: str, closing: str) -> None:
    line = json.dumps(changed(path, "HERE"))
    for depth in [2, 10, *range(380, 1000, 20), 5000]:
        with pytest.raises(RequestError):
            parse_line(line.replace('"HERE"', opening * depth + "1" + closing * depth))


def test_a_message_stays_short_whatever_came() -> None:
    """The whole value stood in the message, however large it was."""
    names = {str(number): 0 for number in range(10_000)}
    text = "b" * 100_000
    lines = [json.dumps(changed("time", value)) for value in (names, list(names), text)]
    lines += [json.dumps(names), f'{{"{text}": 1, "{text}": 2}}']
    for line in lines:
        with pytest.raises(RequestError) as refusal:
            parse_line(line)
        assert len(str(refusal.value)) < 500


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([10**400, -(10**400), 2**63, 2**64, -1, 0, 1])
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=5)
    | st.sampled_from(["105", "genre 1", "view", "user 2", "NaN", ""]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["item_id", "time", "genres", "a"]), inner, max_size=4)
    ),
    max_leaves=8,
)
PATHS = [
    *("request_id", "user_id", "time", "context", "context.country", "history", "candidates"),
    *("history.item_id", "history.action", "history.genres", "history.time"),
    *("history.item_id.0", "history.action.1", "history.genres.2", "history.time.1"),
    *("candidates.item_id", "candidates.genres", "candidates.price"),
    *("candidates.item_id.1", "candidates.genres.0", "candidates.price.1"),
]


def parse_or_refuse(line: str | bytes) -> Request | None:
    try:
        return parse_line(line)
    except RequestError as refusal:
        message = str(refusal)
    assert len(message) < 500
    return None


def assert_safe(request: Request) -> None:
    """Nothing behind ``features.py`` checks again: so rows exist and numbers are finite."""
    assert list(request.events_by_history) == [HISTORY]
    events = events_of(request)
    rows_by_column = {
        "user_id": [torch.tensor([request.user_row])],
        "item_id": [events.columns["item_id"], request.candidate_items],
        "action": [events.columns["action"]],
        "genres": [events.bags["genres"].values, request.candidate_bags["genres"].values],
        "country": [request.context["country"]],
    }
    for column, rows in rows_by_column.items():
        for row in torch.cat(rows).tolist():
            assert 0 <= row < SCHEMA.num_rows(column)
    assert 0 <= request.num_events <= SCHEMA.histories[0].window.max_history
    assert all(0 <= time <= MAX_TIME for time in [*events.columns["time"].tolist(), request.time])
    assert events.bags["genres"].lengths.numel() == request.num_events
    assert {rows.numel() for rows in events.columns.values()} == {request.num_events}
    assert request.dense.shape == (request.num_candidates, SCHEMA.num_dense)
    assert request.dense.dtype == torch.float32
    assert request.dense.isfinite().all()


@examples(4)
@given(st.sampled_from(PATHS), json_values)
def test_any_json_in_any_place_is_parsed_or_refused(path: str, value: Any) -> None:
    request = parse_or_refuse(json.dumps(changed(path, value)))
    if request is not None:
        assert_safe(request)


@examples(2)
@given(json_values)
def test_any_json_is_parsed_or_refused(value: Any) -> None:
    assert parse_or_refuse(json.dumps(value)) is None


@examples(2)
@given(st.dictionaries(st.sampled_from([*good(), "more"]), json_values))
def test_any_object_is_parsed_or_refused(raw: RawRequest) -> None:
    parse_or_refuse(json.dumps(raw))


@given(st.text() | st.binary())
def test_any_line_is_parsed_or_refused(line: str | bytes) -> None:
    with pytest.raises(RequestError):
        parse_line(line)


@examples(2)
@given(st.data())
def test_any_bytes_changed_in_a_line_are_parsed_or_refused(data: st.DataObject) -> None:
    line = bytearray(json.dumps(good()).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        line[data.draw(st.integers(0, len(line) - 1))] = data.draw(st.integers(0, 255))
    request = parse_or_refuse(bytes(line))
    if request is not None:
        assert_safe(request)


@examples(0.3)
@given(st.sampled_from(PATHS), json_values)
def test_whatever_is_parsed_can_be_scored(
    ranking_model: RankingModel, path: str, value: Any
) -> None:
    request = parse_or_refuse(json.dumps(changed(path, value)))
    if request is None:
        return
    (answer,) = Engine(ranking_model, SCHEMA, "v1", None).rank([request])
    assert len(answer.scores) == request.num_candidates
    assert all(math.isfinite(score) for score in answer.scores)
    json.dumps(answer.to_json())


def test_unknown_and_missing_ids_have_rows_of_their_own(ranking_model: RankingModel) -> None:
    raw = good() | {"user_id": "nobody"}
    raw["history"]["item_id"] = [None, 999_999, "105"]
    raw["candidates"]["item_id"] = [None, "new"]
    request = parse_request(raw, SCHEMA)
    assert request.user_row == 1
    assert events_of(request).columns["item_id"].tolist() == [0, 1, 7]
    assert request.candidate_items.tolist() == [0, 1]
    (answer,) = Engine(ranking_model, SCHEMA, "v1", None).rank([request])
    assert len(set(answer.scores)) == 2


def test_an_integer_and_its_text_are_the_same_id() -> None:
    as_integers, as_texts = good(), good()
    as_integers["candidates"]["item_id"] = [100, 110]
    as_texts["candidates"]["item_id"] = ["100", "110"]
    rows = [parse_request(raw, SCHEMA).candidate_items for raw in (as_integers, as_texts)]
    assert rows[0].tolist() == rows[1].tolist() == [2, 12]


def test_a_single_id_stands_for_a_list_of_one_and_null_for_none() -> None:
    raw = changed("history.genres", ["genre 0", None, ["genre 6", "genre 0"]])
    raw["context"]["country"] = "ZA"
    request = parse_request(raw, SCHEMA)
    assert events_of(request).bags["genres"].lengths.tolist() == [1, 0, 2]
    assert events_of(request).bags["genres"].values.tolist() == [2, 8, 2]
    assert request.context["country"].tolist() == [5]


def test_columns_that_the_model_does_not_read_are_ignored() -> None:
    raw = good() | {"more": math.nan}
    raw["history"]["price"] = "anything"
    raw["candidates"]["colour"] = [[[]]]
    raw["context"]["device"] = -1
    assert_safe(parse_request(raw, SCHEMA))


def test_a_schema_without_context_needs_no_context() -> None:
    schema = FeatureSchema(SCHEMA.vocabulary_by_column, (), False, (), (), SCHEMA.histories)
    request = parse_request(
        {
            "user_id": 7,
            "time": 0,
            "history": {"item_id": [], "time": []},
            "candidates": {"item_id": []},
        },
        schema,
    )
    assert (request.request_id, request.num_events, request.num_candidates) == (None, 0, 0)
    assert request.dense.shape == (0, 4)


def test_an_empty_history_and_no_candidates_are_a_request() -> None:
    request = parse_request(draw_raw(0, 0, 1), SCHEMA)
    assert (request.num_events, request.num_candidates) == (0, 0)
    assert_safe(request)


def test_events_stay_in_the_order_given() -> None:
    raw = changed("history.time", [1_500_000_000, 1_400_000_000, 1_600_000_000.75])
    times = events_of(parse_request(raw, SCHEMA)).columns["time"]
    assert times.tolist() == [1_500_000_000, 1_400_000_000, 1_600_000_000]
    assert times.dtype == torch.int64


def test_a_hundred_thousand_events_are_their_window() -> None:
    raw = draw_raw(10, 2, 8)
    raw["history"] = {column: cells * 10_000 for column, cells in raw["history"].items()}
    start = 99_988  # 100 000 - 14, rounded up to sevens.
    windowed = copy.deepcopy(raw)
    windowed["history"] = {column: cells[start:] for column, cells in raw["history"].items()}
    whole, part = parse_request(raw, SCHEMA), parse_request(windowed, SCHEMA)
    assert whole.num_events == part.num_events == 12
    for column, rows in events_of(part).columns.items():
        assert torch.equal(events_of(whole).columns[column], rows)
    for got, expected in zip(
        events_of(whole).bags["genres"], events_of(part).bags["genres"], strict=True
    ):
        assert torch.equal(got, expected)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 300))
def test_a_window_starts_on_a_block_and_holds_as_much_as_it_can(
    block: int, num_blocks: int, num_events: int
) -> None:
    window = Window(block * num_blocks, block)
    start = 0
    while num_events - start > window.max_history:
        start += block
    assert window.start(num_events) == start
    assert window.start(np.array([num_events, 0])).tolist() == [start, 0]


def test_a_schema_survives_json() -> None:
    again = FeatureSchema.from_json(json.loads(json.dumps(SCHEMA.to_json())))
    assert again.to_json() == SCHEMA.to_json()
    assert again.vocabulary_by_column["genres"].row("genre 3") == 5
    assert again.event_columns == ("item_id", "action")


def test_rows_of_a_vocabulary_begin_after_those_reserved() -> None:
    vocabulary = Vocabulary(["a", "7"])
    assert vocabulary.num_rows == 4
    assert [vocabulary.row(raw) for raw in ("a", "7", 7, "b", None)] == [2, 3, 3, 1, 0]
    assert vocabulary.rows(["a", "7", 7, "b", None]) == [2, 3, 3, 1, 0]
