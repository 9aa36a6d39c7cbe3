"""Outside input either becomes a request or is refused with the column's name."""

import copy
import gc
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.worlds import BLOCK, MAX_HISTORY, SCHEMA, draw_raw, examples
from torchrec_kvshare.errors import RequestError
from torchrec_kvshare.features import decode
from torchrec_kvshare.features.batches import RequestBatch
from torchrec_kvshare.features.decode import MAX_DEPTH, MAX_KEYS, decode_json, decode_request
from torchrec_kvshare.features.limits import (
    MAX_BAG_IDS,
    MAX_ID_CHARACTERS,
    MAX_REQUEST_IDS,
    MAX_TIME,
)
from torchrec_kvshare.features.parse import (
    MAX_CANDIDATES,
    MAX_REQUEST_ID,
    Ragged,
    parse_candidates,
    parse_request,
    parse_user,
    request_id_of,
    sort_history,
    user_columns,
)
from torchrec_kvshare.features.request import (
    Events,
    Request,
    count_ids,
    unknown_ids,
)
from torchrec_kvshare.features.schema import (
    HISTORY,
    FeatureSchema,
    History,
    Vocabulary,
    Window,
    load_schema,
    save_schema,
)
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine

RawRequest = dict[str, Any]
DELETED = object()


def good() -> RawRequest:
    return draw_raw(3, 2, 4)


def parse_line(line: str | bytes) -> Request:
    return parse_request(decode_request(line), SCHEMA)


def events_of(request: Request) -> Events:
    return request.events_by_history[HISTORY]


def changed(path: str, value: Any) -> RawRequest:
    """A good request with one value replaced, such as ``history.time.1``."""
    raw = good()
    *groups, last = path.split(".")
    parent: Any = raw
    for group in groups:
        parent = parent[group]
    if isinstance(parent, list):
        parent[int(last)] = value
    elif value is DELETED:
        del parent[last]
    else:
        parent[last] = value
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
        ('{"user_id": 7}'.encode("utf-16"), "not JSON"),
        ("[" * 100_000, "nested deeper than 16"),
        ('{"a": ' * 100_000, "nested deeper than 16"),
        ("null", "a request is a JSON object; got NoneType"),
        ("[]", "a request is a JSON object; got list"),
        ('"text"', "a request is a JSON object; got str"),
        ("NaN", "a request is a JSON object; got float"),
        ("7", "a request is a JSON object; got int"),
        ('{"user_id": 1, "user_id": 2}', "the key 'user_id' appears twice"),
        ('{"history": {"time": [], "item_id": [], "time": []}}', "the key 'time' appears twice"),
    ],
)
def test_a_line_that_is_no_request_is_refused(line: str | bytes, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        parse_line(line)


BAD_IDS = ["", " ", "\t\n", [], {}, ["a"], math.nan, math.inf, -math.inf]
BAD_TIMES = [-1, -0.5, MAX_TIME + 1, 1_700_000_000_000, True, "1700000000", None, [], {}, 10**400]
BAD_TIMES += [math.nan, math.inf, -math.inf, 1e300]
BAD_FLOATS = [True, "3.5", None, [], {}, [1.0], math.nan, math.inf, -math.inf, 10**400, -(10**31)]
BAD_FIRST_EVENTS = [-1, 1.0, True, "3", [], {}, math.nan, 2**62 + 1]
BAD_REPORTS = ["unknown_ids", ["scores"], [1], [["unknown_ids"]], {}, True, 0]
BAD_GROUPS = [None, [], "text", 7, True, [{}]]
BAD_COLUMNS = [None, {}, "text", 7, True]


BAD_BAGS = ["", math.nan, {}, [[]], [{}], [" "], [-math.inf], ["genre 1", ""], [1, [2]]]
EVENT_COLUMNS = ("item_id", "action", "genres", "time")
CANDIDATE_COLUMNS = ("item_id", "genres", "price")

# The path, the values refused there, and the name in the message.
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
    ("history.first_event", BAD_FIRST_EVENTS, "history.first_event"),
    ("report", BAD_REPORTS, "report"),
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


@pytest.mark.parametrize("path", ["candidates.genres.0", "history.genres.1", "context.country"])
def test_a_bag_has_so_many_ids_and_no_more(path: str) -> None:
    """One candidate with 200,000 ids beside 2,047 others took 7 GB, padded to the longest."""
    parse_request(changed(path, ["x"] * MAX_BAG_IDS), SCHEMA)
    column = path.removesuffix(".0").removesuffix(".1")
    with pytest.raises(RequestError, match=f"a row of {column} has 10001 ids; at most 10000"):
        parse_request(changed(path, ["x"] * (MAX_BAG_IDS + 1)), SCHEMA)


def test_a_ragged_bag_has_so_many_ids_and_no_more() -> None:
    raw = good()
    lengths = np.array([MAX_BAG_IDS + 1] + [0] * (len(raw["candidates"]["item_id"]) - 1))
    raw["candidates"]["genres"] = Ragged(np.zeros(MAX_BAG_IDS + 1, np.int64), lengths)
    with pytest.raises(RequestError, match=r"a row of candidates.genres has 10001 ids"):
        parse_request(raw, SCHEMA)


def test_a_request_has_so_many_ids_in_its_bags_and_no_more() -> None:
    full = MAX_REQUEST_IDS // MAX_BAG_IDS
    raw = draw_raw(0, full, 1) | {"context": {"country": []}}
    raw["candidates"]["genres"] = [["x"] * MAX_BAG_IDS for _ in range(full)]
    user = parse_request(raw, SCHEMA)
    assert user.num_bag_ids == MAX_REQUEST_IDS
    with pytest.raises(RequestError, match="has 1000001 ids in multi-valued columns; at most 1000"):
        parse_request(raw | {"context": {"country": ["x"]}}, SCHEMA)
    of_country = parse_user(raw | {"context": {"country": ["x"]}}, SCHEMA)
    with pytest.raises(RequestError, match="has 1000001 ids in multi-valued columns"):
        parse_candidates(raw, of_country, SCHEMA)


def test_an_integer_too_long_to_print_is_refused() -> None:
    """Python raised a ValueError when the message printed its digits."""
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


def test_values_are_counted_before_a_reader_makes_objects_of_them() -> None:
    text = '[[1, 2], {"a": "b, [c"}, {}]'  # Seven, and two in a string, which count too.
    assert decode_json(text, max_values=9) == decode_json(text) == json.loads(text)
    with pytest.raises(RequestError, match="the JSON holds 9 values; at most 8 are allowed"):
        decode_json(text, max_values=8)
    with pytest.raises(RequestError, match="at most 8 are allowed"):
        decode_request(text.encode(), max_values=8)


def nested(depth: int, innermost: str = "") -> str:
    """Lists in lists, one string beside each."""
    return '["]]",' * depth + innermost + "0" + "]" * depth


def test_nesting_is_bounded_and_brackets_in_texts_are_none() -> None:
    """Deep nesting was refused only when Python's reader ran out of stack, at about 1,000."""
    for innermost in ('"[[[[[[",', '"\\\\",', '"\\"[{",', '"[\\\\\\"[",', '"{}[",', '"é[",'):
        assert decode_json(nested(MAX_DEPTH, innermost))
        with pytest.raises(RequestError, match="nested deeper than 16 levels"):
            decode_json(nested(MAX_DEPTH + 1, innermost))
    line = json.dumps(good() | {"more": "HERE"})
    parse_line(line.replace('"HERE"', nested(MAX_DEPTH - 1)))
    with pytest.raises(RequestError, match="nested deeper than 16 levels"):
        parse_line(line.replace('"HERE"', nested(MAX_DEPTH)))


def test_depth_is_counted_across_chunks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for num_bytes in range(1, 12):
        monkeypatch.setattr(decode, "DEPTH_CHUNK", num_bytes)
        test_nesting_is_bounded_and_brackets_in_texts_are_none()


def test_an_object_has_so_many_keys_and_no_more() -> None:
    """The number of keys was unbounded, and each was compared with all others."""
    names = {str(number): 0 for number in range(MAX_KEYS)}
    assert_safe(parse_request(decode_request(json.dumps(good() | {"more": names})), SCHEMA))
    line = json.dumps(good() | {"more": names | {"one more": 0}})
    with pytest.raises(RequestError, match="an object has 4097 keys; at most 4096 are allowed"):
        parse_line(line)


def least_seconds(run: Callable[[], object]) -> float:
    """The least processor time of a few runs."""
    seconds = []
    gc.disable()  # A collection walks through all objects of the process.
    try:
        for _ in range(7):
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
    finally:
        gc.enable()
    return min(seconds)


def key_twice(num_keys: int) -> str:
    """An object whose last two keys are the same."""
    names = [f'"{number}": 0' for number in [*range(num_keys - 1), num_keys - 2]]
    return "{" + ", ".join(names) + "}"


def refuse(line: str | bytes) -> None:
    with pytest.raises(RequestError):
        parse_line(line)


HOSTILE_LINES: dict[str, Callable[[int], str]] = {
    "many objects": lambda size: f"[{', '.join([key_twice(8)[:-8] + '}'] * size)}]",
    "open lists": lambda size: "[" * (100 * size),
    "lists side by side": lambda size: "[" + "[]," * (100 * size) + "0]",
    "backslashes": lambda size: '"' + "\\" * (100 * size),
    "quotes": lambda size: '["[' + '"' * (100 * size),
    "digits": lambda size: '{"time": 1' + "7" * (100 * size) + ".5}",
    "a long user": lambda size: json.dumps(changed("user_id", " 7." + "0" * (100 * size) + "x")),
}


def test_a_key_that_appears_twice_is_found_in_linear_time() -> None:
    """Each key was searched for among all others: 8,000 keys blocked the server for 0.75 s."""
    small, large = key_twice(MAX_KEYS // 4), key_twice(MAX_KEYS)
    for line in (small, large):
        with pytest.raises(RequestError, match="appears twice in one object"):
            parse_line(line)
    assert least_seconds(lambda: refuse(large)) < 8 * least_seconds(lambda: refuse(small))


@pytest.mark.parametrize("kind", HOSTILE_LINES)
def test_four_times_the_text_takes_four_times_as_long(kind: str) -> None:
    small, large = HOSTILE_LINES[kind](2_000), HOSTILE_LINES[kind](8_000)
    assert least_seconds(lambda: refuse(large)) < 8 * least_seconds(lambda: refuse(small)) + 1e-3


NAME_BY_ID_PATH = {
    "user_id": "user_id",
    "context.country": "context.country",
    "history.item_id.1": "history.item_id",
    "history.action.2": "history.action",
    "history.genres.0": "history.genres",
    "candidates.item_id.1": "candidates.item_id",
    "candidates.genres.0": "candidates.genres",
}


@pytest.mark.parametrize("path", NAME_BY_ID_PATH)
def test_an_id_has_so_many_characters_and_no_more(path: str) -> None:
    """An id could be as long as the message, and stayed in caches and logs."""
    longest = [" " + "é" * MAX_ID_CHARACTERS + " ", 10**255, -(10**254), "7." + "0" * 300]
    for value in longest:
        assert_safe(parse_request(changed(path, value), SCHEMA))
    for value, length in (
        ("é" * 257, 257),
        ("x" * 100_000, 100_000),
        (10**256, 257),
        (-(10**255), 257),
        (1e300, 301),
        ("1e+300", 301),
        ("7" * 300 + ".0", 300),
    ):
        message = f"{NAME_BY_ID_PATH[path]} has {length} characters; at most 256 are allowed"
        with pytest.raises(RequestError, match=f"^{re.escape(message)}$"):
            parse_request(changed(path, value), SCHEMA)


def test_a_request_id_has_so_many_characters_and_no_more() -> None:
    """A request id of any length went into the log, the state and the answer."""
    for value in ("é" * MAX_REQUEST_ID, 10 ** (MAX_REQUEST_ID - 1)):
        assert parse_request(good() | {"request_id": value}, SCHEMA).request_id == value
        assert request_id_of({"request_id": value}) == value
    for value in ("é" * (MAX_REQUEST_ID + 1), 10**MAX_REQUEST_ID):
        with pytest.raises(RequestError, match="request_id has 201 characters; at most 200 are"):
            parse_request(good() | {"request_id": value}, SCHEMA)
        assert request_id_of({"request_id": value}) is None
    for raw in ({"request_id": [1]}, {"request_id": True}, {}, "text", [7], None):
        assert request_id_of(raw) is None


def test_what_a_user_needs_is_kept_and_nothing_else() -> None:
    raw = good()
    raw["history"]["price"], raw["context"]["device"], raw["more"] = [1.0] * 3, "a phone", "x" * 9
    raw["history"]["first_event"] = 0
    kept = user_columns(raw, SCHEMA)
    assert set(kept) == {"user_id", "time", "context", "history"}
    assert set(kept["context"]) == {"country"}
    assert set(kept["history"]) == {"item_id", "action", "genres", "time", "first_event"}
    ours, theirs = parse_user(kept, SCHEMA), parse_user(raw, SCHEMA)
    assert RequestBatch([ours, theirs]).users == [ours]
    assert ours.context["country"].tolist() == theirs.context["country"].tolist()


def test_a_message_stays_short_whatever_came() -> None:
    """A value of any size was put into the message whole."""
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
    *("history.first_event", "report"),
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
    """No code after ``parse_request`` checks again, so rows exist and numbers are finite."""
    assert list(request.events_by_history) == [HISTORY]
    events = events_of(request)
    rows_by_column = {
        "user_id": [torch.tensor([request.user_row])],
        "item_id": [events.columns["item_id"], request.candidate_items],
        "events.action": [events.columns["action"]],
        "items.genres": [events.bags["genres"].values, request.candidate_bags["genres"].values],
        "context.country": [request.context["country"]],
    }
    for column, rows in rows_by_column.items():
        for row in torch.cat(rows).tolist():
            assert 0 <= row < SCHEMA.num_table_rows(column)
    assert 0 <= request.num_events <= SCHEMA.histories[0].window.max_history
    assert all(0 <= time <= MAX_TIME for time in [*events.columns["time"].tolist(), request.time])
    assert events.bags["genres"].lengths.numel() == request.num_events
    assert {rows.numel() for rows in events.columns.values()} == {request.num_events}
    times = events.columns["time"].tolist()
    assert times == sorted(times)
    assert max(times, default=-1) <= request.newest < request.time
    assert events.first_event >= 0
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
    (answer,) = Engine(ranking_model, SCHEMA, None).rank([request])
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
    (answer,) = Engine(ranking_model, SCHEMA, None).rank([request])
    assert len(set(answer.scores)) == 2


@pytest.mark.parametrize(
    "ids",
    [[100, 110], ["100", "110"], [100.0, "110.0"], [" 100", "110\n"], np.array([100, 110])]
    + [np.array([100.0, 110.0]), [100, "110.00"]],
)
def test_every_spelling_of_an_id_is_the_same_id(ids: Any) -> None:
    """``17850.0`` and `` 17850`` were known in a log, and unknown or refused in a request."""
    raw = good()
    raw["candidates"]["item_id"] = ids
    assert parse_request(raw, SCHEMA).candidate_items.tolist() == [2, 12]


SPELLINGS = {
    "7": [7, "7", 7.0, "7.0", " 7 "],
    "-1": [-1, "-1", -1.0, "-1.0"],
    "0": [0, "0", 0.0, -0.0, "-0.0"],
    "3.5": [3.5, "3.5"],
    "true": [True, "True", "true"],
    "10000000000000000": [10**16, 1e16, "1e+16"],
    "007": ["007"],
}


@pytest.mark.parametrize("spelt", SPELLINGS)
def test_a_user_is_the_same_user_however_it_is_spelt(spelt: str) -> None:
    for spelling in SPELLINGS[spelt]:
        assert parse_request(good() | {"user_id": spelling}, SCHEMA).user_id == spelt


def schema_of_ids(ids: list[str]) -> FeatureSchema:
    """A schema whose every vocabulary has these ids."""
    vocabularies = {column: Vocabulary(ids) for column in SCHEMA.vocabulary_by_column}
    return replace(SCHEMA, vocabulary_by_column=vocabularies)


@pytest.mark.parametrize("spelt", SPELLINGS)
def test_every_column_takes_every_spelling(spelt: str) -> None:
    """Negative integers and booleans were refused, although a log may have them."""
    schema = schema_of_ids([*SPELLINGS])
    row = 2 + list(SPELLINGS).index(spelt)
    for spelling in SPELLINGS[spelt]:
        raw = good() | {"user_id": spelling, "context": {"country": [spelling]}}
        for group in ("history", "candidates"):
            size = len(raw[group]["item_id"])
            raw[group] |= {"item_id": [spelling] * size, "genres": [[spelling]] * size}
        raw["history"]["action"] = [spelling] * 3
        request = parse_request(raw, schema)
        events = events_of(request)
        rows = [request.context["country"], *events.columns.values(), events.bags["genres"].values]
        rows = [*rows[:-2], rows[-1], request.candidate_items, request.candidate_bags["genres"][0]]
        assert request.user_row == row
        assert {one for tensor in rows for one in tensor.tolist()} == {row}


def test_equal_ids_are_one_history_and_one_user() -> None:
    """Ids given as floats and as integers made different histories of the same user."""
    spelt = [copy.deepcopy(good()) | {"user_id": user} for user in (7, "7.0")]
    for raw, items in zip(spelt, ([101, 102, 103], ["101.0", " 102", 103.0]), strict=True):
        raw["history"]["item_id"] = items
    requests = [parse_request(raw, SCHEMA) for raw in spelt]
    batch = RequestBatch(requests)
    assert (batch.users, batch.user_of_request) == (requests[:1], [0, 0])


def test_arrays_of_any_type_are_read_as_their_lists_are() -> None:
    """Floats and booleans of an array were taken for integers."""
    columns = [np.array([1.0, 3.5]), np.array([True, False]), np.array([-1, 105])]
    schema = schema_of_ids(["1", "3.5", "true", "105", "-1"])
    for column in columns:
        as_array, as_list = good(), good()
        as_array["candidates"]["item_id"] = column
        as_list["candidates"]["item_id"] = column.tolist()
        rows = [parse_request(raw, schema).candidate_items for raw in (as_array, as_list)]
        assert rows[0].tolist() == rows[1].tolist()
    raw = good()
    raw["candidates"]["item_id"] = np.array([1.0, math.nan])
    with pytest.raises(RequestError, match=r"candidates.item_id holds nan"):
        parse_request(raw, schema)
    raw = good()
    raw["history"]["time"] = np.array([1.0, 2.0, math.nan])
    with pytest.raises(RequestError, match=r"history.time holds nan"):
        parse_request(raw, schema)


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
    raw["context"]["device"] = {}
    assert_safe(parse_request(raw, SCHEMA))


def test_a_schema_without_context_needs_no_context() -> None:
    schema = FeatureSchema(SCHEMA.vocabulary_by_column, histories=SCHEMA.histories)
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


def with_times(*times: float, now: float = 1_700_000_000) -> RawRequest:
    """A request whose events are at these times."""
    return (
        draw_raw(len(times), 2, 4)
        | {"time": now}
        | {"history": draw_raw(len(times), 2, 4)["history"] | {"time": list(times)}}
    )


@pytest.mark.parametrize(
    ("times", "now", "message"),
    [
        ((5, 9, 7), 50, "history.time[2] is 7, before history.time[1] = 9: events are given oldes"),
        ((9, 7, 5), 50, "history.time[1] is 7, before history.time[0] = 9: events are given oldes"),
        ((5, 6, 50), 50, "history.time[2] is 50, not before the request's time 50"),
        ((60, 70, 80), 50, "history.time[0] is 60, not before the request's time 50"),
        ((5, 60, 7), 50, "history.time[1] is 60, not before the request's time 50"),
        ((5, 9, 7, 60), 50, "history.time[2] is 7, before history.time[1] = 9"),
        ((5, 50.9), 50.2, "history.time[1] is 50, not before the request's time 50"),
    ],
)
def test_a_history_out_of_order_or_from_the_future_is_refused(
    times: tuple[float, ...], now: float, message: str
) -> None:
    """It was scored silently; training sees strictly earlier events, oldest first."""
    raw = with_times(*times, now=now)
    as_array = copy.deepcopy(raw)
    as_array["history"]["time"] = np.array([int(time) for time in times])
    for one in (raw, as_array):
        with pytest.raises(RequestError, match=re.escape(message)):
            parse_request(one, SCHEMA)


def test_events_of_one_time_and_fractions_of_a_second_are_in_order() -> None:
    times = events_of(parse_request(with_times(5, 7.9, 7.1, 7, 8, now=9), SCHEMA)).columns["time"]
    assert times.tolist() == [5, 7, 7, 7, 8]
    assert times.dtype == torch.int64


def test_events_before_the_window_are_in_order_too() -> None:
    with pytest.raises(RequestError, match=r"history.time\[1\] is 7, before history.time\[0\] = 9"):
        parse_request(with_times(9, 7, *range(10, 40)), SCHEMA)


def test_a_user_without_a_time_has_events_of_any_time_in_order() -> None:
    raw = with_times(5, MAX_TIME)
    del raw["time"]
    assert parse_user(raw, SCHEMA).num_events == 2
    raw["history"]["time"].reverse()
    with pytest.raises(RequestError, match="events are given oldest first"):
        parse_user(raw, SCHEMA)


def test_candidates_come_after_their_users_events() -> None:
    """An encoded user, or a stream, could be scored at a time before its own events."""
    raw = with_times(5, 20, now=30)
    user, candidates = parse_request(raw, SCHEMA), {"candidates": raw["candidates"]}
    assert parse_candidates(candidates | {"time": 21}, user, SCHEMA).time == 21
    with pytest.raises(RequestError, match="time is 20, not after the user's newest event at 20"):
        parse_candidates(candidates | {"time": 20}, user, SCHEMA)
    del raw["time"]
    user = parse_user(raw, SCHEMA)
    assert parse_candidates(candidates | {"time": 21}, user, SCHEMA).time == 21
    with pytest.raises(RequestError, match="the candidates have no 'time', and neither"):
        parse_candidates(candidates, user, SCHEMA)


def test_the_newest_event_bounds_the_time_whatever_the_model_reads() -> None:
    """A history of some actions may not hold the newest event."""
    schema = replace(SCHEMA, histories=(History("buys", Window(4, 2), ("buy",)),))
    raw = with_times(5, 20, now=30)
    raw["history"]["action"] = ["buy", "view"]
    user = parse_request(raw, schema)
    assert user.num_events == 1
    with pytest.raises(RequestError, match="not after the user's newest event at 20"):
        parse_candidates({"candidates": raw["candidates"], "time": 12}, user, schema)


# --- sorted histories


def test_a_history_is_sorted_with_all_its_columns() -> None:
    raw = with_times(30, 10, 30, 20)
    raw["history"]["item_id"] = ["100", "101", "102", "103"]
    raw["history"] |= {"ignored": "any", "other": [1, 2], "first_event": 5}
    sorted_raw = sort_history(raw)
    history = sorted_raw["history"]
    assert history["time"] == [10, 20, 30, 30]
    assert history["item_id"] == ["101", "103", "100", "102"]
    assert history["genres"] == [raw["history"]["genres"][index] for index in (1, 3, 0, 2)]
    assert {name: history[name] for name in ("ignored", "other", "first_event")} == {
        "ignored": "any",
        "other": [1, 2],
        "first_event": 5,
    }
    assert raw["history"]["time"] == [30, 10, 30, 20]  # The input is unchanged.
    assert sort_history(sorted_raw) is sorted_raw


def test_arrays_and_ragged_columns_are_sorted_as_lists_are() -> None:
    raw = with_times(30, 10, 30, 20)
    raw["history"]["genres"] = [["genre 1"], [], ["genre 2", "genre 3"], ["genre 4"]]
    as_arrays = copy.deepcopy(raw)
    as_arrays["history"]["time"] = np.array(raw["history"]["time"])
    values = ["genre 1", "genre 2", "genre 3", "genre 4"]
    as_arrays["history"]["genres"] = Ragged(values, np.array([1, 0, 2, 1]))
    requests = [parse_request(sort_history(one), SCHEMA) for one in (raw, as_arrays)]
    events, others = map(events_of, requests)
    assert events.columns["time"].tolist() == others.columns["time"].tolist() == [10, 20, 30, 30]
    for one, other in zip(events.bags["genres"], others.bags["genres"], strict=True):
        assert one.tolist() == other.tolist()


def test_events_of_one_second_stay_in_their_order() -> None:
    in_order = with_times(10, 30.9, 30.1)
    assert sort_history(in_order) is in_order
    assert sort_history(with_times(30.9, 30.1, 10))["history"]["time"] == [10, 30.9, 30.1]


def test_sorting_drops_no_event_from_the_future() -> None:
    with pytest.raises(
        RequestError, match=r"history.time\[2\] is 80, not before the request's time"
    ):
        parse_request(sort_history(with_times(80, 5, 20, now=50)), SCHEMA)


@pytest.mark.parametrize(
    "history",
    [None, [], {}, {"time": None}, {"time": [3, "a"]}, {"time": [True, False]}, {"time": [[2], 1]}],
)
def test_what_cannot_be_sorted_is_left_to_be_refused(history: Any) -> None:
    raw = good() | {"history": history}
    assert sort_history(raw) is raw
    with pytest.raises(RequestError, match="history"):
        parse_request(raw, SCHEMA)


# --- unknown ids


def test_unknown_ids_are_counted_by_column() -> None:
    raw = with_times(5, 6, 7) | {"user_id": "nobody", "context": {"country": ["GB", "??"]}}
    raw["history"] |= {"item_id": [999, None, "100"], "action": ["view", "stare", "gaze"]}
    raw["history"]["genres"] = [["genre 1", "jazz"], [], [None]]
    raw["candidates"] |= {"item_id": ["new", 101], "genres": [["rock"], ["pop", "genre 2"]]}
    request = parse_request(raw, SCHEMA)
    assert count_ids(request) == {
        "user_id": (1, 1),
        "context.country": (2, 1),
        "history.item_id": (2, 1),
        "history.action": (3, 2),
        "history.genres": (2, 1),
        "candidates.item_id": (2, 1),
        "candidates.genres": (3, 2),
    }
    assert unknown_ids(request) == {
        column: count.unknown for column, count in count_ids(request).items()
    }
    assert unknown_ids(parse_request(good() | {"user_id": "user 1"}, SCHEMA)).get("user_id") is None


def test_an_answer_tells_unknown_ids_if_its_request_asks(ranking_model: RankingModel) -> None:
    raw = good() | {"user_id": "nobody"}
    asked = parse_request(raw | {"report": ["unknown_ids"]}, SCHEMA)
    silent, told = Engine(ranking_model, SCHEMA, None).rank([parse_request(raw, SCHEMA), asked])
    assert "unknown_ids" not in silent.to_json()
    assert told.to_json()["unknown_ids"]["user_id"] == 1
    assert told.to_json()["unknown_ids"] == unknown_ids(asked)


# --- histories cut by the client


def events_from(first_event: int, num_given: int, schema: FeatureSchema = SCHEMA) -> Events:
    """The events read when a client sends a user's last events and says where they start."""
    raw = draw_raw(60, 1, 8, schema)
    last = first_event + num_given
    history = {name: cells[first_event:last] for name, cells in raw["history"].items()}
    return events_of(
        parse_request(raw | {"history": history | {"first_event": first_event}}, schema)
    )


@given(st.integers(0, 60), st.data())
def test_a_client_that_sends_enough_reads_what_one_that_sends_all_reads(
    num_events: int, data: st.DataObject
) -> None:
    """The window was cut from the events given, so that every new event moved it."""
    num_given = data.draw(st.integers(min(MAX_HISTORY, num_events), num_events))
    part, whole = events_from(num_events - num_given, num_given), events_from(0, num_events)
    assert part.first_event == whole.first_event
    assert all(torch.equal(part.columns[c], rows) for c, rows in whole.columns.items())


@given(st.integers(1, MAX_HISTORY - 1), st.integers(0, 40))
def test_a_client_that_sends_too_few_has_a_window_that_stays_for_a_block(
    num_given: int, first_event: int
) -> None:
    events = events_from(first_event, num_given)
    end = first_event + num_given
    assert events.first_event + events.num_events == end
    boundaries = [index for index in range(first_event, end) if index % BLOCK == 0]
    start_of_all = SCHEMA.histories[0].window.start(end)
    expected = start_of_all if start_of_all >= first_event else [*boundaries, first_event][0]
    assert events.first_event == expected


def test_a_history_of_some_actions_refuses_a_first_event() -> None:
    schema = replace(SCHEMA, histories=(History("buys", Window(4, 2), ("buy",)),))
    raw = good()
    raw["history"]["first_event"] = 0
    parse_request(raw, schema)
    raw["history"]["first_event"] = 1
    with pytest.raises(
        RequestError, match=r"first_event is 1; the model's histories \['buys'\] keep"
    ):
        parse_request(raw, schema)


@pytest.mark.parametrize("actions", [["2.0", " 2", 2, 2.0, "view"], np.array([2, 2, 2, 2, 1])])
def test_events_of_an_action_are_found_however_it_is_spelt(actions: Any) -> None:
    """``2.0`` was not taken for action ``2``, although a log makes them one."""
    histories = (History("rated", Window(8, 4), ("2",)),)
    schema = replace(schema_of_ids(["1", "2", "view"]), histories=histories)
    raw = with_times(1, 2, 3, 4, 5)
    raw["history"]["action"] = actions
    read = parse_request(raw, schema).events_by_history["rated"]
    assert read.columns["time"].tolist() == [1, 2, 3, 4]


def test_a_hundred_thousand_events_are_their_window() -> None:
    raw = draw_raw(10, 2, 8)
    raw["history"] = {column: cells * 10_000 for column, cells in raw["history"].items()}
    raw["history"]["time"].sort()
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


def test_a_schema_is_read_as_it_was_written(tmp_path: Path) -> None:
    save_schema(tmp_path, SCHEMA)
    again = load_schema(tmp_path)
    assert again.to_json() == SCHEMA.to_json()
    assert again.vocabulary_by_column["items.genres"].row("genre 3") == 5
    assert again.event_columns == ("item_id", "action")


def test_rows_of_a_vocabulary_begin_after_those_reserved() -> None:
    vocabulary = Vocabulary(["a", "7"])
    assert vocabulary.num_table_rows == 4
    assert [vocabulary.row(raw) for raw in ("a", "7", 7, "b", None)] == [2, 3, 3, 1, 0]
    assert vocabulary.rows(["a", "7", 7, "b", None]) == [2, 3, 3, 1, 0]
