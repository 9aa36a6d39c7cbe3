"""Preparing a log with DuckDB gives what reading it in memory gives, whatever its files are."""

import csv
import gzip
import json
import math
import shutil
from collections.abc import Callable
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.prepared import assert_equals, rows_of
from tests.data.test_presets import (
    real_root,
    write_completejourney,
    write_movielens_1m,
    write_movielens_csv,
    write_retail,
)
from tests.worlds import examples
from torchrec_kvshare.config import (
    Columns,
    CompleteJourneyData,
    DataConfig,
    Format,
    InteractionsData,
    MovieLensData,
    OnlineRetailData,
    PrepareConfig,
    SyntheticData,
)
from torchrec_kvshare.data.coding import ORDER_OF_IDS
from torchrec_kvshare.data.load import load_log
from torchrec_kvshare.data.prepare import prepare
from torchrec_kvshare.data.splits import split_rule
from torchrec_kvshare.errors import ConfigError, DataError, KVShareError
from torchrec_kvshare.features.ids import sorted_ids

HEADER = ("user", "item", "time", "what", "stars", "tags", "price", "city")
COLUMNS = Columns(
    user="user",
    item="item",
    time="time",
    action="what",
    event_attributes=["city", "item"],
    item_attributes=["tags"],
    item_floats=["price"],
    user_attributes=["city"],
    request_attributes=["tags", "user"],
    user_floats=["stars"],
    request_floats=["price"],
    event_floats=["stars", "price"],
)
PLAIN = Columns(user="user", item="item", time="time")
LONG = "x" * 257


def checked(folder: Path, data: DataConfig, num_shards: int | None = None) -> dict[str, Any]:
    """Prepare a log twice, cut differently, compare both with the log in memory."""
    log = load_log(data)
    for index, number in enumerate({None, num_shards} if num_shards else {1}):
        output = folder / f"prepared{index}"
        manifest = prepare(PrepareConfig(str(output), data, num_shards=number, threads=2))
        assert_equals(output, log)
        shutil.rmtree(output)
    return manifest


def good_rows(count: int, seed: int = 3) -> list[tuple[str, ...]]:
    """Rows of a shop's log, of few users and items, some at the same time."""
    rng = np.random.default_rng(seed)
    draw = [rng.integers(0, limit, count).tolist() for limit in (7, 11, 40, 3, 6, 5, 4, 3)]
    return [
        (
            f"{user - 2}",
            f"{item}.0" if item % 2 else f"p{item}",
            f"{1_700_000_000 + 1000 * time}",
            ("view", "buy", "True")[what],
            str(stars),
            ("", "a", "a|b", " b|7.0", "|")[tags],
            ("", "2.5", "3", "1e3")[price],
            ("Oslo", "Rome", "")[city],
        )
        for user, item, time, what, stars, tags, price, city in zip(*draw, strict=True)
    ]


def with_bad(rows: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The rows with some of every kind of bad value between them."""
    bad: list[tuple[str, ...]] = []
    for column, text in (
        *((0, ""), (0, " "), (0, "NULL"), (0, LONG), (1, ""), (1, f"7.{'0' * 300}"), (1, LONG)),
        *((2, "yesterday"), (2, ""), (2, "-1"), (2, "2010-02-30 00:00:00"), (2, "NaN")),
        *((3, " "), (3, LONG), (4, "many"), (4, ""), (5, f"a|{LONG}"), (6, "$3"), (6, "1e31")),
        *((6, "inf"), (6, " nan"), (7, LONG), (0, "NA"), (1, "-"), (0, "n/a"), (2, "1e9")),
        *((2, "2023-11-14 22:13:20"), (2, "2023-11-14T22:13:21+01:00"), (2, " 1700000000")),
    ):
        row = list(rows[len(bad)])
        row[column] = text
        bad.append(tuple(row))
    both = [*bad, ("", "", "x", "", "", "", "", ""), ("9", "9", "x", "", "", "", "", LONG)]
    step = max(1, len(rows) // len(both))
    mixed = list(rows)
    for index, row in enumerate(both):
        mixed.insert(index * (step + 1), row)
    return mixed


def write_csv(path: Path, rows: list[tuple[str, ...]], header: tuple[str, ...] = HEADER) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def data_of(path: Path | str | list[str], label: Any = None, **values: Any) -> DataConfig:
    columns = values.pop("columns", COLUMNS)
    paths = path if isinstance(path, list) else str(path)
    return InteractionsData(path=paths, columns=columns, label=label, format=Format(**values))


# --- kinds of files


@pytest.mark.parametrize(
    "label",
    [
        *(None, "stars>=3", "what==buy", "time>1700010000"),
        {"love": "stars>=4", "buy": "what==buy", "like": "stars>=2"},
    ],
)
def test_rows_of_every_kind_of_badness_are_dropped_and_reported_as_in_memory(
    tmp_path: Path, label: Any
) -> None:
    path = write_csv(tmp_path / "log.csv", with_bad(good_rows(400)))
    with path.open("a") as file:
        file.write("short,row\n\n1,2,3,4,5,6,7,8,9\n1,p2,1700000007,buy,4,a,1,Oslo\n")
    manifest = checked(tmp_path, data_of(path, label), num_shards=3)
    reasons = ["wrong number of fields", "no user", "no item", "id too long", "bad time"]
    reasons += ["no action", "floats left out: price: not a number", "price: beyond 1e+30"]
    reasons += ["user 'NA' of 1 rows is taken as an id", "line 2: no user: user is ''"]
    assert [reason for reason in reasons if reason not in manifest["report"]] == []
    # A row without a rating is bought or not.
    missing = "rows without a label: love 2, like 2" if isinstance(label, dict) else ""
    assert missing in manifest["report"]
    assert ("bad label" in manifest["report"]) == (label in ("stars>=3", "time>1700010000"))


def test_several_files_of_every_kind_are_one_log(tmp_path: Path) -> None:
    rows = with_bad(good_rows(300))
    folder = tmp_path / "logs"
    write_csv(folder / "a.csv", rows[:90])
    content = write_csv(tmp_path / "b.csv", rows[90:150]).read_bytes()
    (folder / "b.csv.gz").write_bytes(gzip.compress(content))
    tabs = write_csv(tmp_path / "c.csv", []).read_text().replace(",", "\t")
    lines = ["\t".join(row).replace('"', "") for row in rows[150:200]]
    (folder / "c.TSV").write_text(tabs + "\n".join(lines))
    objects = [json.dumps(dict(zip(HEADER, row, strict=True))) for row in rows[200:260]]
    (folder / "d.jsonl").write_text("\n".join(objects))
    (folder / "_SUCCESS").write_text("")
    columns = dict(zip(HEADER, map(list, zip(*rows[260:], strict=True)), strict=True))
    pq.write_table(pa.table(columns), folder / "e.parquet", row_group_size=7)
    write_csv(folder / "f.csv", [])

    manifest = checked(tmp_path, data_of(folder, "stars>=3"), num_shards=4)
    one = data_of(write_csv(tmp_path / "all.csv", rows), "stars>=3")
    alone = checked(tmp_path, one, num_shards=4)
    assert manifest["digest"] == alone["digest"]
    several = [str(folder / "a.csv"), str(folder / "b*.gz"), str(folder / "[c-f]*")]
    assert checked(tmp_path, data_of(several, "stars>=3"))["digest"] == alone["digest"]


def test_examples_name_the_file_and_the_row_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "logs"
    good = [("u", f"i{row}", str(row), *[""] * 5) for row in range(5)]
    write_csv(folder / "a.csv", good)
    bad = [*good, ("", "i", "1", *[""] * 5)]
    table = dict(zip(HEADER, map(list, zip(*bad, strict=True)), strict=True))
    pq.write_table(pa.table(table), folder / "b.parquet")
    objects = [json.dumps(dict(zip(HEADER, row, strict=True))) for row in bad]
    (folder / "c.ndjson").write_text("\n\n".join(objects))
    report = checked(tmp_path, data_of(folder, columns=PLAIN))["report"]
    assert f"{folder / 'b.parquet'}, row 6: no user: user is ''" in report
    assert f"{folder / 'c.ndjson'}, line 11: no user: user is ''" in report


def test_folders_named_by_a_column_are_that_column(tmp_path: Path) -> None:
    rows = good_rows(120)
    root = tmp_path / "shop=1" / "logs"  # Folders above the one that is named are not columns.
    for index, city in enumerate(("Oslo", "S%C3%A3o Paulo", "__HIVE_DEFAULT_PARTITION__")):
        part = rows[40 * index : 40 * index + 40]
        folder = root / f"year=20{index}" / f"city={city}"
        write_csv(folder / "x.csv", [row[:7] for row in part], HEADER[:7])
    manifest = checked(tmp_path, data_of(root), num_shards=2)
    for data in (data_of(f"{root}/*/*/*.csv"), data_of(f"{root}/**/x.csv")):
        assert checked(tmp_path, data)["digest"] == manifest["digest"]
    prepare(PrepareConfig(str(tmp_path / "out"), data_of(root)))
    found = rows_of(tmp_path / "out" / "vocabulary" / "context_city.parquet")
    assert set(found["id"]) <= {"Oslo", "São Paulo"}
    with pytest.raises(DataError, match=r"column 'shop' is not in .*x\.csv"):
        checked(tmp_path, data_of(root, columns=Columns(user="shop", item="item", time="time")))


TYPED = {
    "user": pa.array([3, -4, 3, None, 2**53, -4, 3, 70, 3, -4] * 3),
    "item": pa.array([1.5, 2.0, None, 1e16, 2.0, 1.5, 7.0, math.nan, 7.0, -0.0] * 3),
    "time": pa.array([1_700_000_000 + 7 * (row % 13) for row in range(30)]),
    "what": pa.array([b"v", b"w\xc3\xa9"] * 15, pa.binary()),
    "stars": pa.array([Decimal("3.50"), Decimal("-1.00"), None] * 10),
    "tags": pa.array([["a", "b"], [], None, ["a"], ["b", None]] * 6),
    "price": pa.array([0.1, 1e31, None, math.inf, 2.5] * 6, pa.float32()),
    "city": pa.array([True, False, None] * 10).dictionary_encode(),
}
DATES = [datetime(2019, 10, day, 8, 26, 30, 999_999, tzinfo=timezone.utc) for day in (1, 2, 3)] * 10
TIMES: dict[str, Any] = {
    "seconds": TYPED["time"],
    "seconds in int32": TYPED["time"].cast(pa.int32()),
    "milliseconds": pa.array([1_700_000_000_999 + row for row in range(30)]),
    "nanoseconds": pa.array([1_700_000_000_999_999_999 + 10**8 * row for row in range(30)]),
    "too large": pa.array([1_700_000_000, 4_102_444_801, -1, None, 0] * 6),
    "floats": pa.array([1_700_000_000.75 + row for row in range(30)]),
    "float32": pa.array([1.7e9 + 1000 * row for row in range(30)], pa.float32()),
    "uint64": pa.array([1_700_000_000, 2**64 - 1, 5] * 10, pa.uint64()),
    "timestamps": pa.array(DATES, pa.timestamp("us")),
    "zoned": pa.array(DATES, pa.timestamp("ns", "Asia/Tokyo")),
    "before 1970": pa.array([datetime(1969, 1, 1), *[datetime(2001, 1, 1)] * 29]),
    "dates": pa.array([date(2019, 10, 1 + row % 9) for row in range(30)]),
    "texts": pa.array([f"2019-10-{1 + row % 9:02d} 00:00:00 UTC" for row in range(30)]),
    "plain": pa.array([f"2019-10-{1 + row % 9:02d} 08:26:00" for row in range(30)]),
    "T": pa.array([f"2019-10-{1 + row % 9:02d}T08:26:00" for row in range(30)]),
    "plain, one no date": pa.array(["2010-02-30 00:00:00", *["2010-02-03 00:00:01"] * 29]),
    "mixed": pa.array(["1700000000", "2019-10-01 00:00:00", " 5", "07", "-0", "x"] * 5),
}


@pytest.mark.parametrize("time", TIMES.values(), ids=TIMES)
def test_parquet_columns_of_every_type_are_those_in_memory(tmp_path: Path, time: Any) -> None:
    pq.write_table(pa.table(TYPED | {"time": time}), tmp_path / "log.parquet", row_group_size=11)
    checked(tmp_path, data_of(tmp_path / "log.parquet"), num_shards=2)


@pytest.mark.parametrize(
    ("values", "missing"),
    [(["1700000000", "7"], ["7"]), (["2019-10-01 00:00:00"] * 2, []), (["5", "NULL"], ["5"])],
)
def test_times_that_are_declared_missing_are_no_times(
    tmp_path: Path, values: list[str], missing: list[str]
) -> None:
    texts = ["1700000001", "2020-01-01 00:00:00", *values]
    data = {"user": ["u"] * 4, "item": list("abcd"), "time": texts}
    pq.write_table(pa.table(data), tmp_path / "log.parquet")
    checked(tmp_path, data_of(tmp_path / "log.parquet", columns=PLAIN, missing=missing))
    integers = pa.array([1_700_000_001, 7, 5, 1_700_000_002])
    pq.write_table(pa.table(data | {"time": integers}), tmp_path / "log.parquet")
    checked(tmp_path, data_of(tmp_path / "log.parquet", columns=PLAIN, missing=missing))


@pytest.mark.parametrize(
    ("texts", "options"),
    [
        (["20101201", "20101202.0"], {"time_format": "%Y%m%d"}),
        (["1700000000", "1700000001"], {"time_unit": "ms"}),
        (["2010-12-01 08:26:00", "2010-12-02 08:26:00"], {"time_format": "%Y-%m-%d %H:%M:%S"}),
        (["40513", "40514"], {"time_unit": "s"}),
    ],
)
def test_the_format_of_times_may_be_named(
    tmp_path: Path, texts: list[str], options: dict[str, Any]
) -> None:
    rows = [("u", f"i{row}", texts[row % 2]) for row in range(9)]
    path = write_csv(tmp_path / "log.csv", rows, HEADER[:3])
    columns = Columns(user="user", item="item", time="time", **options)
    checked(tmp_path, data_of(path, columns=columns))


def test_one_column_may_have_several_roles(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", good_rows(90))
    columns = Columns(
        user="user",
        item="item",
        time="time",
        action="stars",
        event_attributes=["price", "user"],
        item_attributes=["stars"],
        item_floats=["price"],
        user_attributes=["user", "city", "time"],
    )
    checked(tmp_path, data_of(path, "stars>=3", columns=columns), num_shards=2)


def test_names_of_columns_may_hold_quotes_dots_and_spaces(tmp_path: Path) -> None:
    header = ('a "user"', "it'em", "ti.me", "tag; --", 'pri"ce')
    rows = [(f"u{row % 3}", f"i{row % 4}", str(row), "x|y", "2.5") for row in range(20)]
    columns = Columns(
        user=header[0],
        item=header[1],
        time=header[2],
        item_attributes=[header[3]],
        item_floats=[header[4]],
    )
    folder = tmp_path / "it's"
    checked(folder, data_of(write_csv(folder / "log.csv", rows, header), columns=columns))


def test_a_text_format_reaches_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "u.data"
    path.write_bytes("José|i|1\nv|i|2\n-|j|3\n".encode("latin-1"))
    options = {"delimiter": "|", "header": list(HEADER[:3]), "missing": ["-"]}
    manifest = checked(tmp_path, data_of(path, columns=PLAIN, encoding="latin-1", **options))
    assert "no user 1" in manifest["report"]


# --- drawn logs

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
IDS = st.sampled_from(["1", "1.0", " 1", "-1", "-20", "10", "9", "007", "a", "é", "𝄞", "b\0", ""])
TAGS = st.lists(IDS | TEXTS, max_size=3).map("|".join)
PRICES = st.sampled_from(
    ["", "x", "-2.5", "-0.0", "-1e-60", "1", "4", "1e300", "0.1", "0.2", "0.7", "3.3"]
)
MOMENTS = st.integers(1_700_000_000, 1_700_000_005).map(str) | st.sampled_from(
    ["2023-11-14 22:13:20", "2023-11-14T22:13:21Z", "1700000002.5", "x", "", " 1700000003"]
)
WHATS = st.sampled_from(["view", "buy", "1.0", "1", ""])


@examples(0.3)
@given(
    rows=st.lists(
        st.tuples(IDS | TEXTS, IDS | TEXTS, MOMENTS, WHATS, PRICES, TAGS, PRICES, TAGS),
        min_size=1,
        max_size=40,
    ),
    num_files=st.integers(1, 3),
    is_jsonl=st.booleans(),
)
def test_a_drawn_log_is_prepared_as_it_is_read_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, ...]],
    num_files: int,
    is_jsonl: bool,
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    # Good rows, so that the log is not refused, of two users.
    rows += [(user, "i", str(1_700_000_000 + row), "buy", "4", "a", "2.5", "b")
             for row in range(len(rows) + 1) for user in ("u", "v")]  # fmt: skip
    for index in range(num_files):
        part = rows[index::num_files]
        if is_jsonl:
            objects = [json.dumps(dict(zip(HEADER, row, strict=True))) for row in part]
            (folder / f"{index}.jsonl").write_text("\n".join(objects))
        else:
            columns = dict(zip(HEADER, map(list, zip(*part, strict=True)), strict=True))
            pq.write_table(pa.table(columns), folder / f"{index}.parquet")
    data = data_of(folder, "stars>=1")
    output = folder.with_name(f"{folder.name}-prepared")
    prepare(PrepareConfig(str(output), data, num_shards=2, threads=1))
    assert_equals(output, load_log(data))
    shutil.rmtree(output)


@given(
    st.sets(st.integers().map(str) | TEXTS | st.from_regex(r"-?[0-9]{1,40}", fullmatch=True) | IDS)
)
def test_ids_are_ordered_by_sql_as_by_sorted_ids(ids: set[str]) -> None:
    table = pa.table({"id": pa.array(sorted(ids), pa.string())})  # noqa: F841 -- DuckDB reads it.
    found = duckdb.sql(f"SELECT id FROM table ORDER BY {ORDER_OF_IDS}".replace("table", '"table"'))
    assert [id_ for (id_,) in found.fetchall()] == sorted_ids(ids)


# --- presets


@pytest.mark.parametrize("write", [write_movielens_csv, write_movielens_1m])
def test_movielens_is_prepared_as_it_is_read(tmp_path: Path, write: Callable[[Path], Path]) -> None:
    (tmp_path / "in").mkdir()
    checked(tmp_path, MovieLensData(root=str(write(tmp_path / "in"))), num_shards=2)


def test_online_retail_is_prepared_as_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    checked(tmp_path, OnlineRetailData(root=str(write_retail(tmp_path / "in"))), num_shards=2)


def test_the_complete_journey_is_prepared_as_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    root = write_completejourney(tmp_path / "in")
    checked(tmp_path, CompleteJourneyData(root=str(root)), num_shards=2)


@pytest.mark.parametrize("root", real_root("ml-latest-small"))
def test_the_real_movielens_is_prepared_as_it_is_read(tmp_path: Path, root: Path) -> None:
    checked(tmp_path, MovieLensData(root=str(root)), num_shards=7)


@pytest.mark.parametrize("root", real_root("uci-online-retail"))
def test_the_real_online_retail_is_prepared_as_it_is_read(tmp_path: Path, root: Path) -> None:
    checked(tmp_path, OnlineRetailData(root=str(root)))


def test_a_synthetic_world_is_prepared_as_it_is_drawn(tmp_path: Path) -> None:
    world = SyntheticData(num_users=30, events_per_user=20, num_items=50, num_categories=6)
    checked(tmp_path, world, num_shards=4)


# --- what is refused, as in memory


@pytest.mark.parametrize(
    ("content", "columns", "label"),
    [
        ("user,item,time\n", PLAIN, None),
        ("user,item,time\n,i,1\n", PLAIN, None),
        ("user,item\nu,i\n", PLAIN, None),
        ("", PLAIN, None),
        ("user,item,time\nu,i,20101201\nu,j,20101202\n", PLAIN, None),
        ("user,item,time\nu,i,40513.35\nu,j,40514\n", PLAIN, None),
        ("user,item,time\nu,i,40514\nu,j,40513\n,j,7\n", PLAIN, None),
        ("user,item,time\nu,i,1700000000\nu,j,1700000000000\n", PLAIN, None),
        ("user,item,time\nu,i,12/1/2010 8:26\nu,j,12/2/2010 8:26\n", PLAIN, None),
        ("user,item,time\nu,i,12/13/2010\nu,j,12/2/2010\nu,k,5\n", PLAIN, None),
        ("user,item,time\nu,i,yesterday\nu,j,\nu,j,x\n", PLAIN, None),
        ("user,item,time,x\nu,i,1,a\nu,j,2,b\nu,j,2,b\nu,j,2,\n", PLAIN, "x==c"),
        ("user,item,time,x\n" + "".join(f"u,i,1,{c}\n" for c in "zabcdefgz"), PLAIN, "x==q"),
        ("user,item,time,x\nu,i,1,b\nu,i,x,a\nu,i,2,a\nu,i,3,\nu,i,3,NULL\n", PLAIN, "x==q"),
        ('user,item,time\nu,"i,1\n', PLAIN, None),
        ("user,item,time,what,stars,tags,price,city\nu,i,1,a,1,,NULL,\n", COLUMNS, None),
        ("user,item,time,what,stars,tags,price,city\nu,i,1,a,1,,$5,\n", COLUMNS, None),
        ("user,item,time,what,stars,tags,price,city\nu,i,1,,1,,5,\n", COLUMNS, None),
    ],
)
def test_a_log_is_refused_in_the_words_of_the_reader_in_memory(
    tmp_path: Path, content: str, columns: Columns, label: str | None
) -> None:
    path = tmp_path / "log.csv"
    path.write_text(content)
    data = data_of(path, label, columns=columns)
    with pytest.raises(DataError) as expected:
        load_log(data)
    for _ in range(2):  # Again from the stages that are there.
        with pytest.raises(DataError) as error:
            prepare(PrepareConfig(str(tmp_path / "out"), data))
        assert str(error.value) == str(expected.value)
    assert not (tmp_path / "out" / "prepared.json").exists()


def test_a_file_that_lacks_a_column_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "in" / "a.csv", [("u", "i", "1")], HEADER[:3])
    write_csv(tmp_path / "in" / "b.csv", [("u", "i", "1")], ("user", "item", "when"))
    with pytest.raises(DataError, match=r"column 'time' is not in .*b\.csv; it has: user, item"):
        prepare(PrepareConfig(str(tmp_path / "out"), data_of(tmp_path / "in", columns=PLAIN)))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1]", r"line 2 is not a JSON object, but '\[1\]'"),
        ("{", "line 2 is not JSON"),
        ('{"user": {"id": 1}, "item": 1, "time": 1}', r"column 'user' .*, line 2 is \{'id': 1\}"),
        ('{"user": [1], "item": 1, "time": 1}', r"column 'user' .* is \[1\]; allowed: texts"),
        ('{"user": "\\ud800", "item": 1, "time": 1}', "half of a surrogate pair"),
    ],
)
def test_a_bad_line_of_json_is_named(tmp_path: Path, line: str, message: str) -> None:
    good = '{"user": 1, "item": "a", "time": 5}'
    (tmp_path / "log.jsonl").write_text(f"{good}\n{line}\n")
    data = data_of(tmp_path / "log.jsonl", columns=PLAIN)
    for read in (load_log, lambda data: prepare(PrepareConfig(str(tmp_path / "out"), data))):
        with pytest.raises(DataError, match=message):
            read(data)


def test_values_of_json_are_spelt_as_those_of_text(tmp_path: Path) -> None:
    objects = [
        {"user": 7.0, "item": True, "time": 1_700_000_000, "tags": [1, "b", None], "price": 2.5},
        {"user": "7", "item": "true", "time": "1700000001", "tags": "1|b|", "price": "3"},
        {"user": 8, "item": 2, "time": 1_700_000_002.5, "price": None},
    ]
    (tmp_path / "log.ndjson").write_text("".join(json.dumps(one) + "\n" for one in objects))
    columns = Columns("user", "item", "time", item_attributes=["tags"], item_floats=["price"])
    data = data_of(tmp_path / "log.ndjson", columns=columns)
    log = load_log(data)
    assert (log.users.ids, log.items.ids) == (["7", "8"], ["true", "2"])
    assert log.item_attributes == {"tags": [("1", "b"), ()]}
    assert log.item_floats["price"].tolist() == [2.75, 0]
    checked(tmp_path, data, num_shards=2)


# --- options and folders


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ([], ConfigError, "data.path is"),
        (["a.csv", 3], ConfigError, "data.path is"),
        (3, ConfigError, "data.path is 3"),
        ("none/*.csv", DataError, r"none/\*\.csv holds no file"),
        ("none.csv", DataError, r"none\.csv cannot be read"),
        (["log.csv", "log.csv"], DataError, r"log\.csv is named twice"),
        ("log.xlsx", DataError, r"log\.xlsx ends in '\.xlsx'; allowed: \.csv"),
    ],
)
def test_a_path_that_cannot_work_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: Any,
    error: type[KVShareError],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_csv(Path("log.csv"), good_rows(9))
    Path("log.xlsx").write_text("x")
    data = InteractionsData(path=path, columns=PLAIN)
    with pytest.raises(error, match=message):
        load_log(data)
    with pytest.raises(error, match=message):
        prepare(PrepareConfig("out", data))
    assert not Path("out", "prepared.json").exists()


def test_more_shards_than_users_are_refused(tmp_path: Path) -> None:
    data = data_of(write_csv(tmp_path / "log.csv", good_rows(50)))
    with pytest.raises(ConfigError, match="num_shards is 8; the log has 7 users"):
        prepare(PrepareConfig(str(tmp_path / "out"), data, num_shards=8))


def test_less_memory_than_python_needs_is_refused(tmp_path: Path) -> None:
    data = data_of(write_csv(tmp_path / "log.csv", good_rows(50)))
    with pytest.raises(ConfigError, match="memory_bytes is 400000000; it must be at least 500"):
        prepare(PrepareConfig(str(tmp_path / "out"), data, memory_bytes=400_000_000))


def test_a_finished_folder_is_not_written_again(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", good_rows(50))
    output = tmp_path / "out"
    config = PrepareConfig(str(output), data_of(path), num_shards=2)
    manifest = prepare(config)
    times = {one: one.stat().st_mtime_ns for one in output.rglob("*")}
    assert prepare(config) == manifest
    assert {one: one.stat().st_mtime_ns for one in output.rglob("*")} == times


@pytest.mark.parametrize(
    ("split", "times"),
    [("leave_one_out", []), ("time", ["2023-11-15T01:00:00Z", 1_700_030_000])],
)
def test_the_training_split_is_that_of_the_rule(
    tmp_path: Path, split: str, times: list[Any]
) -> None:
    data = data_of(write_csv(tmp_path / "log.csv", good_rows(90)))
    output = tmp_path / "out"
    prepare(PrepareConfig(str(output), data, split, times, num_shards=3, threads=2))
    assert_equals(output, load_log(data), split_rule(split, times))


def test_a_split_that_cannot_work_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    data = data_of(write_csv(tmp_path / "log.csv", good_rows(5)))
    with pytest.raises(ConfigError, match=r"split_times is \[\]; split=time needs two"):
        prepare(PrepareConfig(str(tmp_path / "out"), data, "time"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("label", "another data config"),
        ("shards", "another num_shards"),
        ("split", "another split"),
        ("file", "other files"),
    ],
)
def test_a_folder_of_another_config_or_of_other_files_is_refused(
    tmp_path: Path, is_finished: bool, change: str, message: str
) -> None:
    path = write_csv(tmp_path / "log.csv", good_rows(50))
    label = "stars>=1" if is_finished else "stars>=7"  # The latter is refused after staging.
    config = PrepareConfig(str(tmp_path / "out"), data_of(path, label))
    if is_finished:
        prepare(config)
    else:
        with pytest.raises(DataError, match="makes no row"):
            prepare(config)
    other = PrepareConfig(config.output, data_of(path, "stars>=2" if change == "label" else label))
    other.num_shards = 2 if change == "shards" else None
    other.split = "leave_one_out" if change == "split" else "time_share"
    if change == "file":
        write_csv(path, good_rows(51))
    with pytest.raises(ConfigError, match=f"which was begun with {message}; name another folder"):
        prepare(other)


def test_an_output_inside_the_log_is_refused(tmp_path: Path) -> None:
    write_csv(tmp_path / "in" / "log.csv", good_rows(50))
    for path in (tmp_path / "in", [str(tmp_path / "in")]):
        with pytest.raises(ConfigError, match=r"inside data\.path"):
            prepare(PrepareConfig(str(tmp_path / "in" / "out"), data_of(path)))
    assert [one.name for one in (tmp_path / "in").iterdir()] == ["log.csv"]


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "in" / "log.csv", good_rows(50))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="which holds other files"):
        prepare(PrepareConfig(str(tmp_path / "out"), data_of(path)))
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["notes.txt"]
