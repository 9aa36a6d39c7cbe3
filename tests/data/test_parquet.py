"""Parquet's own types are read by their meaning, or refused by name."""

import gzip
import math
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from torchrec_kvshare.data.files import FileFormat
from torchrec_kvshare.data.interactions import ColumnMapping, InteractionLog, read_interactions
from torchrec_kvshare.errors import DataError

COLUMNS = ColumnMapping("user", "item", "time")


def read(
    folder: Path,
    columns: dict[str, object],
    mapping: ColumnMapping = COLUMNS,
    file_format: FileFormat | None = None,
) -> InteractionLog:
    pa.parquet.write_table(pa.table(columns), folder / "log.parquet")
    return read_interactions(folder / "log.parquet", mapping, file_format)


def users_of(folder: Path, users: object) -> list[str]:
    """The ids that a column of users gives, row by row."""
    count = len(users)  # type: ignore[arg-type]
    log = read(folder, {"user": users, "item": ["i"] * count, "time": range(1, count + 1)})
    return [log.users.ids[code] for code in log.users.codes]


@pytest.mark.parametrize(
    ("users", "ids"),
    [
        (pa.array([b"ann", "José".encode(), b" ann"]), ["ann", "José", "ann"]),
        (pa.array([b"ann", b"bob"], pa.large_binary()), ["ann", "bob"]),
        (pa.array([b"ann", b"bob"], pa.binary(3)), ["ann", "bob"]),
        (pa.array([b"ann", b"bob", b"ann"]).dictionary_encode(), ["ann", "bob", "ann"]),
        (pa.array([True, False, True]), ["true", "false", "true"]),
        (pa.array([Decimal("17850.00"), Decimal("3.50")]), ["17850", "3.5"]),
        (pa.array([Decimal("100")]), ["100"]),
        (pa.array([Decimal("-1.0")], pa.decimal256(50, 1)), ["-1"]),
        (pa.array([17850.0, -1.0, 3.5]), ["17850", "-1", "3.5"]),
        (pa.array([0.1, 17850.0], pa.float32()), ["0.1", "17850"]),
        (pa.array([7, -7], pa.int8()), ["7", "-7"]),
        (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
        (pa.array(["ann", "17850.0"], pa.large_string()), ["ann", "17850"]),
        (pa.array([date(2010, 12, 1)]), ["2010-12-01"]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_ids_of_every_type_are_spelt_the_one_way(
    tmp_path: Path, users: object, ids: list[str]
) -> None:
    """Binary ids became b'ann', with the b; a float32 0.1 became 0.10000000149011612."""
    assert users_of(tmp_path, users) == ids


def test_binary_that_is_no_text_is_refused_by_row(tmp_path: Path) -> None:
    columns = {"user": [b"ann", b"Jos\xe9", b"Jos\xe8"], "item": [1, 2, 3], "time": [1, 2, 3]}
    expected = r"column 'user' of .*log\.parquet, row 2: byte 0xe9 is not utf-8; data\.format\.enc"
    with pytest.raises(DataError, match=expected):
        read(tmp_path, columns)
    log = read(tmp_path, columns, file_format=FileFormat(encoding="latin-1"))
    assert log.users.ids == ["ann", "José", "Josè"]


def test_binary_in_lists_is_text_or_refused_by_row(tmp_path: Path) -> None:
    mapping = ColumnMapping("user", "item", "time", item_attributes=("tags",))
    columns = {"user": [1, 2], "item": [1, 2], "time": [1, 2]}
    log = read(tmp_path, columns | {"tags": [[b"a", b"b"], []]}, mapping)
    assert log.item_attributes == {"tags": [("a", "b"), ()]}
    with pytest.raises(DataError, match=r"column 'tags' of .*, row 2: byte 0xff is not utf-8"):
        read(tmp_path, columns | {"tags": [[b"a"], [b"b", b"\xff"]]}, mapping)


@pytest.mark.parametrize(
    "tags",
    [
        pa.array([[3, 4], None], pa.list_(pa.int64(), -1)),
        pa.array([[3, 4], [None, None]], pa.list_(pa.int64(), 2)),
        pa.array([[3.0, 4.0], []], pa.large_list(pa.float32())),
    ],
    ids=["list", "fixed size", "large list of floats"],
)
def test_lists_of_every_kind_are_several_ids(tmp_path: Path, tags: object) -> None:
    mapping = ColumnMapping("user", "item", "time", item_attributes=("tags",))
    log = read(tmp_path, {"user": [1, 2], "item": [1, 2], "time": [1, 2], "tags": tags}, mapping)
    assert log.item_attributes == {"tags": [("3", "4"), ()]}


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (pa.array([{"id": 1}]), r"struct<id: int64>"),
        (pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())), "map<string, int64"),
        (pa.array([[[1]]]), "list<element: list"),
        (pa.array([[{"id": 1}]]), "list<element: struct"),
        (pa.array([time(8, 26)]), "time64"),
        (pa.array([timedelta(days=1)]), "duration"),
    ],
    ids=["struct", "map", "list of lists", "list of structs", "time of day", "duration"],
)
def test_types_that_mean_no_id_are_refused_by_name(
    tmp_path: Path, values: object, kind: str
) -> None:
    mapping = ColumnMapping("user", "item", "time", item_attributes=("tags",))
    with pytest.raises(
        DataError, match=rf"column 'tags' of .* is {kind}.*; allowed: numbers, bool"
    ):
        read(tmp_path, {"user": [1], "item": [1], "time": [1], "tags": values}, mapping)


def test_a_list_is_no_user(tmp_path: Path) -> None:
    """A user [3, 4] was read as the user "3|4"."""
    with pytest.raises(DataError, match=r"column 'user' of .* is list<.*for attributes lists"):
        read(tmp_path, {"user": [[3, 4]], "item": [1], "time": [1]})


@pytest.mark.parametrize(
    "users", [[None, "u"], [math.nan, 7.0], [b"NULL", b"u"], ["nan", "u"]], ids=str
)
def test_nulls_of_every_type_are_missing(tmp_path: Path, users: list[object]) -> None:
    log = read(tmp_path, {"user": users, "item": [1, 2], "time": [1, 2]})
    assert log.report.dropped == {"no user": 1}
    assert len(log.users.ids) == 1


def test_a_column_of_nulls_alone_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row of .* can be used: 0 of 2 .* no user 2"):
        read(tmp_path, {"user": pa.nulls(2), "item": [1, 2], "time": [1, 2]})


def test_a_table_without_rows_has_no_usable_row(tmp_path: Path) -> None:
    columns = {name: pa.array([], pa.int64()) for name in ("user", "item", "time")}
    with pytest.raises(DataError, match="can be used: 0 of 0 rows"):
        read(tmp_path, columns)


def test_timestamps_are_instants_whatever_the_unit_of_numbers(tmp_path: Path) -> None:
    """A timestamp column has its own unit; data.columns.time_unit is of numbers."""
    times = pa.array([datetime(2010, 12, 1, 8, 26)], pa.timestamp("ns"))
    log = read(tmp_path, {"user": [1], "item": [1], "time": times})
    assert log.time.tolist() == [1_291_191_960]
    assert log.report.summary is not None
    assert log.report.summary.time_form == "ISO 8601"


@pytest.mark.parametrize("kind", [pa.date32(), pa.date64()])
def test_dates_are_midnights(tmp_path: Path, kind: pa.DataType) -> None:
    times = pa.array([date(2010, 12, 1)], kind)
    log = read(tmp_path, {"user": [1], "item": [1], "time": times})
    assert log.time.tolist() == [1_291_161_600]


def test_row_groups_do_not_show(tmp_path: Path) -> None:
    """Codes of each group begin anew where their dictionaries are not joined."""
    columns = {"user": list("abcab"), "item": ["x", None, "y", "x", "z"], "time": [1, 2, 3, 4, 5]}
    path = tmp_path / "log.parquet"
    pa.parquet.write_table(pa.table(columns), path, row_group_size=2)
    log = read_interactions(path, COLUMNS)
    assert [log.users.ids[code] for code in log.users.codes] == list("acab")
    assert [log.items.ids[code] for code in log.items.codes] == list("xyxz")
    assert "row 2: no item" in log.report.examples[0]


def test_gzipped_parquet_is_read(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"user": [1], "item": [2], "time": [3]}), tmp_path / "plain")
    (tmp_path / "log.parquet.gz").write_bytes(gzip.compress((tmp_path / "plain").read_bytes()))
    assert read_interactions(tmp_path / "log.parquet.gz", COLUMNS).items.ids == ["2"]
