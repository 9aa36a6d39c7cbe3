"""Rows of raw ids: vocabularies and hashed columns, in memory and in files."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.worlds import SCHEMA, draw_raw
from torchrec_kvshare.errors import ConfigError, DataError, RequestError
from torchrec_kvshare.features import schema as schema_module
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.hashing import Coded, codes_of_ids
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import unknown_ids
from torchrec_kvshare.features.schema import (
    ITEM,
    MAX_EXAMPLES,
    MAX_REMEMBERED,
    NUM_RESERVED_ROWS,
    UNKNOWN_ROW,
    FeatureSchema,
    Hashed,
    IdMap,
    Managed,
    Vocabulary,
    load_schema,
    save_schema,
)

KNOWN = [*map(str, range(-5, 40)), "85123A", "007", "ünï", "true", str(2**63), "3.5"]
MAPS = [Vocabulary(KNOWN), Hashed(1_000_003, salt=7)]


def with_items(map_of_ids: IdMap) -> FeatureSchema:
    vocabularies = SCHEMA.vocabulary_by_column | {ITEM: map_of_ids}
    return replace(SCHEMA, vocabulary_by_column=vocabularies)


@pytest.mark.parametrize("map_of_ids", MAPS)
def test_an_id_has_one_row_however_it_is_spelt_and_asked_for(map_of_ids: IdMap) -> None:
    spellings: list[Any] = [17, "17", 17.0, " 17.0", "17.00"]
    [row] = set(map_of_ids.rows(spellings))
    assert [map_of_ids.row(one) for one in spellings] == [row] * len(spellings)
    assert map_of_ids.rows_of_array(np.array([17, 17])).tolist() == [row] * 2
    assert map_of_ids.rows_of_ids(["17"]).tolist() == [row]
    assert row >= NUM_RESERVED_ROWS
    assert map_of_ids.row("a17") != row
    assert map_of_ids.row(None) == 0


def test_rows_of_a_vocabulary_are_in_the_order_of_its_ids() -> None:
    vocabulary = Vocabulary(KNOWN)
    assert vocabulary.rows(KNOWN) == list(range(2, 2 + len(KNOWN)))
    assert vocabulary.rows_of_ids(KNOWN).tolist() == list(range(2, 2 + len(KNOWN)))
    assert vocabulary.rows([2**63, 3.5, True, "new", 99]) == [51, 52, 50, 1, 1]
    assert vocabulary.num_table_rows == len(KNOWN) + 2


def test_no_id_of_a_hashed_column_is_unknown() -> None:
    hashed = Hashed(7, salt=3)
    rows = hashed.rows(["never met", *range(500)])
    assert {*rows} == {*range(NUM_RESERVED_ROWS, 9)}
    assert hashed.num_table_rows == 9
    assert Hashed(7, salt=4).rows(range(500)) != rows[1:]


@pytest.mark.parametrize("map_of_ids", [Vocabulary([str(i) for i in range(9)]), Hashed(10**6)])
def test_rows_stay_the_same_when_ids_are_remembered_and_dropped(map_of_ids: IdMap) -> None:
    """A dictionary in front of the hash keeps raw ids, up to a limit."""
    raws = [3, "3.0", "x", 4.0]
    before = map_of_ids.rows(raws)
    assert map_of_ids.rows(raws) == before
    for first in range(0, 2 * MAX_REMEMBERED, 10_000):
        map_of_ids.rows(f"{number % 9}.{'0' * (number // 9 % 200 + 1)}" for number in range(2000))
        map_of_ids.rows(range(first, first + 10_000))
        assert len(map_of_ids._row_by_raw) <= MAX_REMEMBERED
    assert map_of_ids.rows(raws) == before
    assert map_of_ids.rows(range(MAX_REMEMBERED + 1))[3] == before[0]


def test_unknown_ids_are_not_remembered() -> None:
    vocabulary = Vocabulary(["a"])
    vocabulary.rows(["b", "a", 7, None])
    assert vocabulary._row_by_raw == {None: 0, "a": 2}


@given(st.lists(st.integers(-50, 50), unique=True), st.lists(st.integers(-60, 60)))
def test_arrays_texts_and_integers_have_the_rows_of_a_dictionary(
    known: list[int], asked: list[int]
) -> None:
    row_by_id = {one: row for row, one in enumerate(known, NUM_RESERVED_ROWS)}
    expected = [row_by_id.get(one, UNKNOWN_ROW) for one in asked]
    vocabulary = Vocabulary([*map(str, known)])
    assert vocabulary.rows_of_array(np.array(asked, np.int64)).tolist() == expected
    assert vocabulary.rows(asked) == vocabulary.rows([*map(str, asked)]) == expected


def test_two_ids_of_one_code_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def colliding(ids: Sequence[str]) -> Coded:
        codes, is_integer = codes_of_ids(ids)
        codes[[one in ("left", "right") for one in ids]] = 12
        return Coded(codes, is_integer)

    monkeypatch.setattr(schema_module, "codes_of_ids", colliding)
    with pytest.raises(DataError, match="the ids 'left' and 'right' of one column have one code"):
        Vocabulary(["7", "left", "8", "right"])


# --- files


def test_maps_of_every_kind_are_read_as_they_were_written(tmp_path: Path) -> None:
    many = Vocabulary([f"item {number}" for number in range(3 * MAX_EXAMPLES + 1)])
    sparse = Vocabulary.of_arrays(
        np.array([[5, 77], [9, 4]]),
        {"num_table_rows": 12, "examples": ["a", "b"], "has_text": True},
    )
    schema = with_items(many)
    vocabularies = schema.vocabulary_by_column | {
        "user_id": sparse,
        "events.action": Hashed(11, salt=2),
    }
    schema = replace(schema, vocabulary_by_column=vocabularies)
    save_schema(tmp_path, schema)
    again = load_schema(tmp_path)
    assert again.to_json() == schema.to_json()
    for column, map_of_ids in again.vocabulary_by_column.items():
        assert type(map_of_ids) is type(vocabularies[column])
        assert map_of_ids.num_table_rows == vocabularies[column].num_table_rows
        raws = [*vocabularies[column].examples, "never met", 7]
        assert map_of_ids.rows(raws) == vocabularies[column].rows(raws)
    assert again.vocabulary_by_column["user_id"].rows_of_codes(np.array([77, 6])).tolist() == [4, 1]
    assert {path.name for path in tmp_path.iterdir()} == {"schema.json", "ids.npy"}


def test_the_file_of_columns_lists_a_few_ids_only(tmp_path: Path) -> None:
    """The ids of ten million items were 142 MiB of JSON."""
    ids = [f"item {number}" for number in range(10 * MAX_EXAMPLES)]
    save_schema(tmp_path, with_items(Vocabulary(ids)))
    values = json.loads((tmp_path / "schema.json").read_text())["vocabulary_by_column"][ITEM]
    assert values["examples"] == ids[::10]
    assert values["num_ids"] == len(ids)


def test_files_of_two_schemas_are_refused(tmp_path: Path) -> None:
    for name, ids in (("one", ["a", "b"]), ("other", ["b", "a"])):
        (tmp_path / name).mkdir()
        save_schema(tmp_path / name, with_items(Vocabulary(ids)))
    (tmp_path / "one" / "ids.npy").write_bytes((tmp_path / "other" / "ids.npy").read_bytes())
    with pytest.raises(ConfigError, match=r"one/ids.npy does not belong to .*one/schema.json"):
        load_schema(tmp_path / "one")


def test_ids_are_managed_until_training_has_ended(tmp_path: Path) -> None:
    save_schema(tmp_path, with_items(Managed(30)))
    with pytest.raises(ConfigError, match="has managed ids: its training has not ended"):
        load_schema(tmp_path)


# --- requests


def test_a_request_of_hashed_ids_has_no_unknown_ones() -> None:
    schema = with_items(Hashed(50))
    raw = draw_raw_request(schema, 9, 7, seed=3)
    raw["candidates"][ITEM][2] = "never met"
    request = parse_request(raw, schema)
    assert request.candidate_items.tolist() == Hashed(50).rows(raw["candidates"][ITEM])
    assert {"history.item_id", "candidates.item_id"}.isdisjoint(unknown_ids(request))


@pytest.mark.parametrize("map_of_ids", [Vocabulary(["100"]), Hashed(50)])
@pytest.mark.parametrize(
    "bad", ["", " \t", float("nan"), {}, [], "x" * 257, 10**300, 10**5000], ids=range(8)
)
def test_what_is_no_id_is_refused_whatever_the_map(map_of_ids: IdMap, bad: Any) -> None:
    raw = draw_raw(5, 3, seed=2)
    raw["candidates"][ITEM] = ["100", bad, None]
    for _ in range(2):  # what was refused is not remembered
        with pytest.raises(RequestError, match=r"^candidates.item_id (holds|has) "):
            parse_request(raw, with_items(map_of_ids))
