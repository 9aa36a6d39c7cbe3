"""The reader of interaction logs: what it keeps, what it drops, and that it reports both."""

import csv
import gzip
import math
import re
import subprocess
import sys
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_kvshare.data import chunks
from torchrec_kvshare.data.files import FileFormat
from torchrec_kvshare.data.interactions import (
    ColumnMapping,
    InteractionLog,
    ReadReport,
    build_log,
    read_interactions,
)
from torchrec_kvshare.data.tables import (
    Exclusion,
    IdColumn,
    encode,
    read_table,
)
from torchrec_kvshare.errors import ConfigError, DataError, MissingExtraError, ShapeError
from torchrec_kvshare.features.ids import canonical_id
from torchrec_kvshare.features.limits import MAX_TIME

COLUMNS = ColumnMapping("user", "item", "time")
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


def written(folder: Path, text: str, name: str = "log.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def read_parquet(
    folder: Path, columns: dict[str, object], mapping: ColumnMapping = COLUMNS
) -> InteractionLog:
    pa.parquet.write_table(pa.table(columns), folder / "log.parquet")
    return read_interactions(folder / "log.parquet", mapping)


def read(folder: Path, text: str, columns: ColumnMapping = COLUMNS) -> InteractionLog:
    return read_interactions(written(folder, text), columns)


def read_label(folder: Path, rule: str, values: list[str]) -> InteractionLog:
    """A log of one row for each value of a label's column."""
    rows = "".join(f"u,i,{row},{value}\n" for row, value in enumerate(values))
    columns = ColumnMapping("user", "item", "time", label=rule)
    return read(folder, f"user,item,time,value\n{rows}", columns)


def decoded(column: IdColumn) -> list[str]:
    return [column.ids[code] for code in column.codes]


def time_of(folder: Path, text: str) -> int | None:
    """The time of a row beside a good one, None if it is dropped."""
    log = read(folder, f'user,item,time\nu,i,0\nu,i,"{text}"\n')
    if log.report.rows_kept == 1:
        assert log.report.dropped == {"bad time": 1}
        return None
    return int(log.time[1])


def labels(folder: Path, rule: str, values: list[str]) -> list[float]:
    return read_label(folder, rule, values).labels[""].tolist()


# --- formats


@pytest.mark.parametrize(
    "name",
    ["l.csv", "l.tsv", "l.parquet", "l.csv.gz", "l.tsv.gz", "l.parquet.gz", "L.CSV", "L.TSV.GZ"],
)
def test_every_format_gives_the_same_log(tmp_path: Path, name: str) -> None:
    table = pa.table(
        {
            "user": [17850.0, None, 12.0, 17850.0],
            "item": ["85123A", "85123A", "007", 'q"t,\t\n'],
            "time": [5, 6, 7, 8],
            "rating": [4.5, 1.0, 4.0, 2.0],
            "tags": ["a|b", "", "c", "d"],
        }
    )
    path = tmp_path / name
    plain = tmp_path / path.name.lower().removesuffix(".gz")
    if ".parquet" in name:
        pa.parquet.write_table(table, plain)
    else:
        with plain.open("w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if ".tsv" in plain.name else ",")
            writer.writerows([table.column_names, *zip(*table.to_pydict().values(), strict=True)])
    content = plain.read_bytes()
    path.write_bytes(gzip.compress(content) if name.lower().endswith(".gz") else content)

    columns = ColumnMapping(
        user="user",
        item="item",
        time="time",
        action="rating",
        label="rating>=4",
        item_attributes=("tags",),
        item_floats=("rating",),
    )
    quoted = None if ".parquet" in name else FileFormat(quoting="double")
    log = read_interactions(path, columns, quoted)

    assert decoded(log.users) == ["17850", "12", "17850"]
    assert decoded(log.items) == ["85123A", "007", 'q"t,']
    assert log.time.tolist() == [5, 7, 8]
    assert log.labels[""].tolist() == [1, 1, 0]
    assert decoded(log.event_attributes["action"]) == ["4.5", "4", "2"]
    assert log.item_attributes == {"tags": [("a", "b"), ("c",), ("d",)]}
    assert log.item_floats["rating"].tolist() == [4.5, 4, 2]
    assert log.report.dropped == {"no user": 1}


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    assert len(read(tmp_path, "\ufeffuser,item,time\nu,i,1\n").time) == 1


def test_blank_lines_hold_no_row(tmp_path: Path) -> None:
    assert read(tmp_path, "\nuser,item,time\n\nu,i,1\n\n").report.rows_read == 1


def test_a_last_line_without_its_end_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, "user,item,time\nu,i,1\nv,j,2").users.ids == ["u", "v"]


def test_columns_may_stand_in_any_order_among_others(tmp_path: Path) -> None:
    log = read(tmp_path, "x,time,y,item,user\n,1,,i,u\n")
    assert (log.users.ids, log.items.ids, log.time.tolist()) == (["u"], ["i"], [1])


def test_chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "".join(f"{row % 3},{row % 5},{row}\n" for row in range(11))
    path = written(tmp_path, f"user,item,time\n{rows}short\n9,9,x\n")
    whole = read_interactions(path, COLUMNS)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 4)
    in_chunks = read_interactions(path, COLUMNS)
    assert whole.report == in_chunks.report
    assert decoded(whole.items) == decoded(in_chunks.items)
    assert whole.time.tolist() == in_chunks.time.tolist()


@given(st.lists(st.tuples(TEXTS, TEXTS, TEXTS)))
def test_log_equals_a_row_by_row_reading(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, str]]
) -> None:
    # Good rows at the end keep the log from being refused for mostly bad times.
    rows = [*rows, *[("u", "i", str(second)) for second in range(2 * len(rows) + 1)]]
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("user", "item", "time"), *rows])

    log = read_interactions(path, COLUMNS)

    kept = [
        (canonical_id(user), canonical_id(item), math.floor(float(time.strip())))
        for user, item, time in rows
        if user.strip() and item.strip() and is_plain_time(time)
    ]
    times = log.time.tolist()
    assert list(zip(decoded(log.users), decoded(log.items), times, strict=True)) == kept
    assert log.report.rows_read == len(rows)
    assert log.report.rows_kept + sum(log.report.dropped.values()) == len(rows)


def is_plain_time(text: str) -> bool:
    # Six characters are too few for ISO 8601: a time is a number here. The reader strips a text as
    # str.strip does, which takes more characters for space than float does, such as "\x1f".
    try:
        return 0 <= float(text.strip()) <= MAX_TIME and "_" not in text
    except ValueError:
        return False


# --- times


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1700000000", 1_700_000_000),
        ("1700000000.9", 1_700_000_000),
        ("1.7e9", 1_700_000_000),
        ("0", 0),
        ("4102444800", MAX_TIME),
        ("1970-01-02", 86_400),
        ("2010-12-01 08:26:00", 1_291_191_960),
        ("2010-12-01T08:26", 1_291_191_960),
        ("2010-12-01T08:26:00.123456789Z", 1_291_191_960),
        ("2010-12-01T09:26:00+01:00", 1_291_191_960),
        ("2010-12-01T03:26:00-0500", 1_291_191_960),
        ("2010-12-01 10:26:00+02", 1_291_191_960),
        ("2100-01-01T00:00:00Z", MAX_TIME),
    ],
)
def test_time_is_read(tmp_path: Path, text: str, seconds: int) -> None:
    assert time_of(tmp_path, text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "yesterday",
        "nan",
        "inf",
        "-1",
        "-0.5",
        "4102444801",
        "1_000",
        "2100-01-01T00:00:01Z",
        "1969-12-31 23:59:59",
        "2010-13-01",
        "2010-02-30 00:00:00",
        "2010-12-01 25:00:00",
        "2010-12-01T08:26:00+25:00",
        "12/1/2010 8:26",
    ],
)
def test_bad_time_drops_the_row(tmp_path: Path, text: str) -> None:
    assert time_of(tmp_path, text) is None


@given(
    st.datetimes(datetime(1971, 1, 1), datetime(2099, 1, 1)),
    st.integers(-14 * 60, 14 * 60),
    st.sampled_from(["T", " "]),
)
def test_iso_times_agree_with_datetime(
    tmp_path_factory: pytest.TempPathFactory, naive: datetime, minutes: int, between: str
) -> None:
    time = naive.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    seconds = time_of(tmp_path_factory.getbasetemp(), time.isoformat(between))
    assert seconds == math.floor(time.timestamp())


# --- labels and actions


def test_label_is_one_without_a_rule(tmp_path: Path) -> None:
    log = read(tmp_path, "user,item,time\nu,i,1\nu,j,2\n")
    assert log.labels[""].tolist() == [1, 1]
    assert log.labels[""].dtype == np.float32
    assert log.event_attributes == {}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("value>=4", [0, 1, 1]),
        ("value<=4", [1, 1, 0]),
        ("value>4", [0, 0, 1]),
        ("value<4", [1, 0, 0]),
        ("value==4", [0, 1, 0]),
        ("value!=4", [1, 0, 1]),
        (" value >= 3.6 ", [0, 1, 1]),
    ],
)
def test_label_rule_compares_numbers(tmp_path: Path, rule: str, expected: list[float]) -> None:
    assert labels(tmp_path, rule, ["3.5", "4.0", "10"]) == expected


@pytest.mark.parametrize(
    ("rule", "expected"), [("value==buy", [1, 0, 0]), ("value!=add to cart", [1, 0, 1])]
)
def test_label_rule_compares_text(tmp_path: Path, rule: str, expected: list[float]) -> None:
    assert labels(tmp_path, rule, [" buy", "add to cart", "buyer"]) == expected


@pytest.mark.parametrize(
    ("rule", "values"),
    [("value==Buy", ["buy", "view", "view"]), ("value>=9", ["8", "2", "2"]),
     ("value>=1", ["buy", "view", "view"]), ("value!=a", ["a", "a", "a"])],
)  # fmt: skip
def test_a_label_rule_that_fits_nothing_is_refused_with_the_values_of_its_column(
    tmp_path: Path, rule: str, values: list[str]
) -> None:
    """`event==Buy` on a log with `buy` trained on zeros only, with an NE of 4e11."""
    expected = rf"label rule '{rule}' makes no row of .*log\.csv positive; the most frequent"
    with pytest.raises(DataError, match=expected) as error:
        read_label(tmp_path, rule, values)
    last = values[-1]
    assert str(error.value).split(": ")[-1].startswith(f"'{last}' ({values.count(last)} rows)")


def test_only_the_most_frequent_values_of_a_label_are_shown(tmp_path: Path) -> None:
    values = [value for value in "abcdefgh" for _ in range(ord(value) - 96)]
    with pytest.raises(DataError, match=r"'h' \(8 rows\), .*, 'd' \(4 rows\)$"):
        read_label(tmp_path, "value==z", values)


def test_a_label_rule_of_one_class_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_label(tmp_path, "value>=1", ["1", "2"]).labels[""].tolist() == [1, 1]
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "label rule 'value>=1' makes every row of" in record.getMessage()


def test_two_classes_are_no_matter_for_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read_label(tmp_path, "value>=2", ["1", "2"])
    assert caplog.records == []


def test_each_task_has_its_own_labels_and_a_row_without_any_is_dropped(tmp_path: Path) -> None:
    """A row that one of the rules could not compare was dropped with its other labels."""
    rows = "u,i,1,3,yes\nu,j,2,4,no\nu,k,3,5,\nu,l,4,,no\nu,m,5,5,no\nu,n,6,2,yes\nu,o,7,none,\n"
    rules = {"love": "stars>=5", "like": "stars>=4", "kept": "kept==yes"}
    columns = ColumnMapping("user", "item", "time", label=rules)
    log = read(tmp_path, f"user,item,time,stars,kept\n{rows}", columns)
    assert list(log.labels) == list(columns.tasks) == ["love", "like", "kept"]
    none = pytest.approx(np.nan, nan_ok=True)
    assert [labels.tolist() for labels in log.labels.values()] == [
        [0, 0, 1, none, 1, 0],
        [0, 1, 1, none, 1, 0],
        [1, 0, none, 0, 0, 1],
    ]
    assert "6 of 7 rows kept; dropped: bad label 1" in str(log.report)
    assert log.report.missing_labels == {"love": 1, "like": 1, "kept": 1}
    assert "rows without a label: love 1, like 1, kept 1" in str(log.report)
    assert "line 8: bad label: stars is 'none'" in str(log.report)
    said = "40.0% positive for love, 60.0% positive for like, 40.0% positive for kept"
    assert said in str(log.report)


def test_a_rule_that_fits_nothing_is_named_with_its_task(tmp_path: Path) -> None:
    rules = {"like": "value>=4", "love": "value>=9"}
    expected = r"label rule 'value>=9' of task 'love' makes no row of .* positive; the most"
    columns = ColumnMapping("user", "item", "time", label=rules)
    with pytest.raises(DataError, match=expected):
        read(tmp_path, "user,item,time,value\nu,i,1,4\nu,j,2,5\n", columns)


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ({}, "there is no task; at least one is needed"),
        ({"": "a>1"}, "the tasks are"),
        ({"lengths": "a>1"}, "'lengths' is not allowed: distinct names of letters, digits, _"),
        ({"a b": "a>1"}, "the tasks are ['a b']; 'a b' is not allowed"),
        ({"1st": "a>1"}, "'1st' is not allowed"),
        ({3: "a>1"}, "3 is not allowed"),
        ({"like": "a=1"}, "label rule 'a=1' of task 'like'; allowed: COLUMN OPERATOR VALUE, with"),
        ({"like": "a>1", "love": 4}, "label rule 4 of task 'love'; allowed: COLUMN OPERATOR VALUE"),
        ({"like": "a>b"}, "label rule 'a>b' of task 'like' orders by text 'b'"),
        ("{like: a>1, love: a>2}", 'or rules by task, such as {like: "rating>=4", love:'),
        (["a>1"], "label rule ['a>1']; allowed: COLUMN OPERATOR VALUE"),
    ],
)
def test_a_mistake_in_a_label_names_the_task_and_what_is_allowed(label: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)) as error:
        ColumnMapping("user", "item", "time", label=label)
    assert said in str(error.value)


@pytest.mark.parametrize("rule", ["value==true", "value==True", "value!=false"])
def test_a_label_rule_spells_booleans_as_ids_are_spelt(tmp_path: Path, rule: str) -> None:
    assert labels(tmp_path, rule, ["True", "true", "False"]) == [1, 1, 0]


@pytest.mark.parametrize(("rule", "bad"), [("value>=4", "many"), ("value>=4", "nan"),
                                           ("value>=4", ""), ("value!=buy", " ")])  # fmt: skip
def test_bad_label_drops_the_row(tmp_path: Path, rule: str, bad: str) -> None:
    columns = ColumnMapping("user", "item", "time", label=rule)
    log = read(tmp_path, f"user,item,time,value\nu,i,1,5\nu,j,2,{bad}\n", columns)
    assert log.items.ids == ["i"]
    assert log.report.dropped == {"bad label": 1}


@pytest.mark.parametrize("rule", ["rating", "rating=4", ">=4", "rating>=", "a>=b>=4", "x>==4", ""])
def test_unreadable_label_rule_is_refused(rule: str) -> None:
    with pytest.raises(ConfigError, match="allowed: COLUMN OPERATOR VALUE"):
        ColumnMapping("user", "item", "time", label=rule)


def test_label_rule_does_not_order_text() -> None:
    with pytest.raises(ConfigError, match="'event>buy' orders by text 'buy'"):
        ColumnMapping("user", "item", "time", label="event>buy")


def test_action_is_coded_and_a_row_without_one_is_dropped(tmp_path: Path) -> None:
    columns = ColumnMapping("user", "item", "time", action="what")
    log = read(tmp_path, "user,item,time,what\nu,i,1,buy\nu,j,2,\nu,k,3,view\nu,i,4,buy\n", columns)
    assert decoded(log.event_attributes["action"]) == ["buy", "view", "buy"]
    assert log.report.dropped == {"no action": 1}


# --- attributes and floats


@pytest.mark.parametrize("step", [1, -1])
def test_an_attribute_is_what_most_rows_say_in_whatever_order(tmp_path: Path, step: int) -> None:
    """The first value in the file was taken: reordered rows were other data."""
    columns = ColumnMapping(
        "user", "item", "time", item_attributes=("tags",), user_attributes=("city",)
    )
    rows = ["u,i,1,,Oslo", "v,i,2,|,Rome", "u,i,3,a| b.0|7.0,Bonn", "u,j,4,,Oslo", "v,i,5,c,"]
    rows += ["u,i,6,a|b.0|7,Bonn", "v,k,7,d,", "v,k,8,c,"]
    log = read(tmp_path, "\n".join(["user,item,time,tags,city", *rows[::step]]), columns)
    tags = dict(zip(log.items.ids, log.item_attributes["tags"], strict=True))
    assert tags == {"i": ("a", "b.0", "7"), "j": (), "k": ("c",)}
    cities = dict(zip(log.users.ids, log.user_attributes["city"], strict=True))
    assert cities == {"u": ("Bonn",), "v": ("Rome",)}


def test_dropped_rows_lend_no_attribute(tmp_path: Path) -> None:
    columns = ColumnMapping("user", "item", "time", item_attributes=("tag",))
    log = read(tmp_path, "user,item,time,tag\nu,i,x,a\nu,i,2,b\n", columns)
    assert log.item_attributes == {"tag": [("b",)]}


def test_list_separator_splits_attributes(tmp_path: Path) -> None:
    columns = ColumnMapping("user", "item", "time", item_attributes=("tags",), list_separator="; ")
    log = read(tmp_path, "user,item,time,tags\nu,i,1,a; b|c\n", columns)
    assert log.item_attributes == {"tags": [("a", "b|c")]}


def test_empty_list_separator_is_refused() -> None:
    with pytest.raises(ConfigError, match="list_separator is ''"):
        ColumnMapping("user", "item", "time", list_separator="")


@given(
    st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["", "x", "nan", "-2.5", "1", "4", "1e300"])),
        min_size=1,
    )
)
def test_item_float_is_the_median_of_its_numbers(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[int, str]]
) -> None:
    # The last row keeps the column from having no number at all.
    pairs = [*pairs, (9, "3.5")]
    rows = "".join(f"u,{item},1,{price}\n" for item, price in pairs)
    columns = ColumnMapping("user", "item", "time", item_floats=("price",))
    log = read(tmp_path_factory.getbasetemp(), f"user,item,time,price\n{rows}", columns)
    for item, median in zip(log.items.ids, log.item_floats["price"], strict=True):
        numbers = [float(text) for own, text in pairs if str(own) == item and text[-1:].isdigit()]
        numbers = [number for number in numbers if number < 1e300]
        assert median == (np.median(numbers) if numbers else 0)
    assert log.item_floats["price"].dtype == np.float32


def test_a_float_column_without_any_number_is_refused(tmp_path: Path) -> None:
    columns = ColumnMapping("user", "item", "time", item_floats=("price",))
    with pytest.raises(DataError, match=r"column 'price' of .*log\.csv holds no number.*'cheap'"):
        read(tmp_path, "user,item,time,price\nu,i,1,cheap\n", columns)


def test_floats_that_are_no_numbers_are_counted_and_named(tmp_path: Path) -> None:
    """`$3.50` was taken for a missing price and not counted."""
    columns = ColumnMapping("user", "item", "time", item_floats=("price",))
    prices = ["$3.50", '"1,250.00"', "2.5", "4.5", "", "NULL", "1_000", "inf"]
    rows = "".join(f"u,i,{time},{price}\n" for time, price in enumerate(prices))
    log = read(tmp_path, f"user,item,time,price\n{rows}u,j,9,$1\n,k,9,free\n", columns)
    assert log.report.bad_floats == {"price: not a number": 5}
    assert log.item_floats["price"].tolist() == [3.5, 0]
    examples = [text for text in log.report.examples if "not a number" in text]
    assert [text.split("log.csv, ")[1] for text in examples] == [
        "line 2: not a number: price is '$3.50'",
        "line 3: not a number: price is '1,250.00'",
    ]
    assert "floats left out: price: not a number 5" in str(log.report)


def test_a_float_is_limited_in_a_log_as_in_a_request(tmp_path: Path) -> None:
    """1e38 passed the reader, and every request with that price was refused."""
    columns = ColumnMapping("user", "item", "time", item_floats=("price",))
    prices = ["1e30", "1e30", "-1e30", "1.001e30", "-1e38", "1e300"]
    rows = "".join(f"u,{item},1,{price}\n" for item, price in enumerate(prices))
    log = read(tmp_path, f"user,item,time,price\n{rows}", columns)
    assert log.report.bad_floats == {"price: beyond 1e+30": 3}
    expected = np.float32([1e30, 1e30, -1e30, 0, 0, 0])
    np.testing.assert_array_equal(log.item_floats["price"], expected)


# --- columns that a request has itself


@pytest.mark.parametrize("name", ["item_id", "action", "time", "first_event"])
@pytest.mark.parametrize("field", ["item_attributes", "item_floats"])
def test_an_item_column_called_like_a_column_of_requests_is_refused(name: str, field: str) -> None:
    """Such an attribute took the vocabulary of our own column, or failed deep inside."""
    expected = (
        rf"are named \['{name}'\]; requests reserve \['item_id', 'action', 'time', 'first_event'"
    )
    with pytest.raises(ConfigError, match=expected):
        ColumnMapping("user", "item", "time", **{field: ("kind", name)})


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"event_attributes": ("time",)}, r"event columns are named \['time'\]; requests reserve"),
        ({"event_attributes": ("a", "a")}, "'a' is there twice"),
        ({"event_attributes": ("a",), "item_attributes": ("a",)}, "'a' is there twice"),
        ({"event_attributes": ("action",)}, "columns.action names the column of what the user did"),
        ({"event_attributes": ("a", "action"), "action": "act"}, r"event_attributes are \['a'"),
    ],
)
def test_names_of_event_columns_that_clash_are_refused(
    columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ColumnMapping("user", "item", "time", **columns)


def test_an_attribute_of_events_has_an_id_per_row_or_none(tmp_path: Path) -> None:
    rows = ["u,a,1,7.0,x", "u,b,2,,x", "u,a,3,NULL,", "v,c,4, 7,y"]
    (tmp_path / "log.csv").write_text("\n".join(["user,item,time,page,what", *rows]))
    columns = ColumnMapping("user", "item", "time", action="what", event_attributes=("page",))
    log = read_interactions(tmp_path / "log.csv", columns)
    assert decoded(log.event_attributes["page"]) == ["7", "", "7"]
    assert decoded(log.event_attributes["action"]) == ["x", "x", "y"]
    assert log.report.dropped == {"no action": 1}


@pytest.mark.parametrize(
    ("attributes", "floats", "of_users"),
    [(("size",), ("size",), ()), (("size", "size"), (), ()), ((), ("size", "size"), ()),
     ((), (), ("size", "size"))],
)  # fmt: skip
def test_attributes_of_one_name_are_refused(
    attributes: tuple[str, ...], floats: tuple[str, ...], of_users: tuple[str, ...]
) -> None:
    with pytest.raises(ConfigError, match=r"are \['size', 'size'\]; 'size' is there twice"):
        ColumnMapping(
            user="user",
            item="item",
            time="time",
            item_attributes=attributes,
            item_floats=floats,
            user_attributes=of_users,
        )


@pytest.mark.parametrize(
    "name", ["user_id", "item_id", "time", "position", "first_index", "pages", "a.b", "Customer ID"]
)
def test_a_user_attribute_may_have_any_name(tmp_path: Path, name: str) -> None:
    columns = ColumnMapping("u", "i", "t", user_attributes=(name,))
    assert read(tmp_path, f"u,i,t,{name}\nx,y,1,z\n", columns).user_attributes == {name: [("z",)]}


@pytest.mark.parametrize("name", ["user_id", "position", "first_index", "pages", "a.b", "my tag"])
def test_an_item_attribute_may_have_any_other_name(tmp_path: Path, name: str) -> None:
    columns = ColumnMapping("u", "i", "t", item_attributes=(name,), user_attributes=(name,))
    log = read(tmp_path, f"u,i,t,{name}\nx,y,1,z\n", columns)
    assert log.item_attributes == log.user_attributes == {name: [("z",)]}


# --- what is dropped is said


def test_every_reason_is_counted_and_named_with_its_line(tmp_path: Path) -> None:
    text = (
        "user,item,time,rating,act\n"
        "u,i,1,5,view\n"
        ",i,1,5,view\n"
        "u, ,1,5,view\n"
        "u,i,soon,5,view\n"
        "u,i,1,good,view\n"
        "u,i,1,5,\n"
        "u,i,1\n"
        "u,i,1,5,view,more\n"
    )
    columns = ColumnMapping("user", "item", "time", action="act", label="rating>=4")
    path = written(tmp_path, text)
    report = read_interactions(path, columns).report
    reasons = ["no user", "no item", "bad time", "bad label", "no action"]
    expected = dict.fromkeys(reasons, 1)
    assert report.dropped == {"wrong number of fields": 2} | expected
    assert (report.rows_read, report.rows_kept) == (8, 1)
    assert report.examples == [
        f"{path}, line 8: wrong number of fields: 3 in 'u,i,1'",
        f"{path}, line 9: wrong number of fields: 6 in 'u,i,1,5,view,more'",
        f"{path}, line 3: no user: user is ''",
        f"{path}, line 4: no item: item is ' '",
        f"{path}, line 5: bad time: time is 'soon'",
        f"{path}, line 7: no action: act is ''",
        f"{path}, line 6: bad label: rating is 'good'",
    ]


def test_a_row_with_an_id_too_long_is_dropped_and_counted(tmp_path: Path) -> None:
    """A log took ids of any length, which requests refuse."""
    longest, longer = "x" * 256, "x" * 257
    text = "user,item,time,act,tags,city\n" + "".join(
        ",".join(row) + "\n"
        for row in (
            (f" {longest} ", longest, "1", longest, f"a|{longest}", longest),
            ("u", "7." + "0" * 300, "1", "buy", "a", "Graz"),
            (longer, "i", "1", "buy", "a", "Graz"),
            ("u", longer, "1", "buy", "a", "Graz"),
            ("u", "1e+300", "1", "buy", "a", "Graz"),
            ("u", "i", "1", longer, "a", "Graz"),
            ("u", "i", "1", "buy", f"a|{longer}", "Graz"),
            ("u", "i", "1", "buy", "a", longer),
        )
    )
    columns = ColumnMapping(
        "user", "item", "time", "act", item_attributes=("tags",), user_attributes=("city",)
    )
    log = read(tmp_path, text, columns)
    assert log.report.dropped == {"id too long": 6}
    assert (log.users.ids, log.items.ids) == ([longest, "u"], [longest, "7"])
    assert "line 4: id too long: user is 'xxx" in log.report.examples[0]


def test_a_row_counts_under_its_first_reason_only(tmp_path: Path) -> None:
    report = read(tmp_path, "user,item,time\nu,i,1\n,,never\n").report
    assert report.dropped == {"no user": 1}


def test_exclusions_come_after_missing_ids_and_before_bad_times(tmp_path: Path) -> None:
    text = "user,item,time,kind\nu,i,1,sale\n,i,1,gift\nu,i,never,gift\nu,j,2,gift\n"
    table = read_table(written(tmp_path, text), ["user", "item", "time", "kind"])
    log = build_log(table, COLUMNS, [Exclusion("a gift", "kind", "gift".__eq__)])
    assert log.report.dropped == {"no user": 1, "a gift": 2}
    assert log.items.ids == ["i"]


def test_examples_are_few_and_short(tmp_path: Path) -> None:
    rows = "".join(f"u,i,{'never' * 99}\n" for _ in range(9))
    report = read(tmp_path, f"user,item,time\nu,i,1\n{rows}").report
    assert report.dropped == {"bad time": 9}
    assert [example.split(": ")[0][-6:] for example in report.examples] == ["line 3", "line 4"]
    assert all(len(example) < len(str(tmp_path)) + 150 for example in report.examples)


def test_a_row_over_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    report = read(tmp_path, 'user,item,time\nu,"a\nb\nc",1\nu,i,1\nu,"a\nb",never\n').report
    assert "line 6: bad time" in report.examples[0]


def test_report_prints_counts_and_examples() -> None:
    clean = ReadReport(3, 3, {}, [])
    assert str(clean) == "3 of 3 rows kept; dropped: none"
    report = ReadReport(9, 6, {"no user": 2, "bad time": 1}, ["f, line 2", "f, line 3"])
    assert str(report) == (
        "6 of 9 rows kept; dropped: no user 2, bad time 1\n  e.g. f, line 2; f, line 3"
    )


def test_the_report_says_times_ties_and_the_share_of_positives(tmp_path: Path) -> None:
    columns = ColumnMapping("user", "item", "time", label="stars>=4")
    # Two events of u are at one moment, and v has one at the same.
    rows = ["u,a,1291191960,5", "u,b,1291191960,1", "v,a,1291191960,2", "u,c,1291278360,4"]
    log = read(tmp_path, "\n".join(["user,item,time,stars", *rows]), columns)
    assert log.report.summary == ("Unix seconds", 1_291_191_960, 1_291_278_360, 0.5, {"": 0.5})
    assert str(log.report).split("\n  ")[1] == (
        "times (Unix seconds) from 2010-12-01T08:26:00Z to 2010-12-02T08:26:00Z; 50.0% of the "
        "events at the time of another of their user; 50.0% positive"
    )


def test_an_id_that_may_mean_none_is_kept_and_noted(tmp_path: Path) -> None:
    log = read(tmp_path, "user,item,time\nNA,i,1\nNA,-,2\nu,i,3\nNAN,j,4\n")
    assert log.users.ids == ["NA", "u", "NAN"]
    assert [note.split(";")[0] for note in log.report.notes] == [
        "user 'NA' of 2 rows is taken as an id",
        "item '-' of 1 rows is taken as an id",
    ]
    assert log.report.notes[0] in str(log.report)


# --- files that cannot be read


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv cannot be read: .*No such file"):
        read_interactions(tmp_path / "none.csv", COLUMNS)
    with pytest.raises(DataError, match=r"none\.parquet cannot be read"):
        read_interactions(tmp_path / "none.parquet", COLUMNS)


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"log\.xlsx ends in '\.xlsx'; allowed: \.csv"):
        read_interactions(tmp_path / "log.xlsx", COLUMNS)


@pytest.mark.parametrize("name", ["log.csv", "log.parquet"])
def test_a_missing_column_is_named_with_the_file_and_its_columns(tmp_path: Path, name: str) -> None:
    if name.endswith("csv"):
        written(tmp_path, "user,thing,time\nu,i,1\n", name)
    else:
        table = pa.table({"user": ["u"], "thing": ["i"], "time": [1]})
        pa.parquet.write_table(table, tmp_path / name)
    with pytest.raises(DataError, match=rf"'item' is not in .*{name}; it has: user, thing, time"):
        read_interactions(tmp_path / name, COLUMNS)


def test_the_column_of_the_label_rule_must_be_there(tmp_path: Path) -> None:
    columns = ColumnMapping("user", "item", "time", label="stars>=4")
    with pytest.raises(DataError, match="column 'stars' is not in"):
        read(tmp_path, "user,item,time\nu,i,1\n", columns)


def test_a_wanted_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="column 'item' is 2 times in"):
        read(tmp_path, "user,item,item,time\nu,i,j,1\n")


def test_an_empty_file_has_no_columns(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="it has: no column"):
        read(tmp_path, "")


@pytest.mark.parametrize("rows", ["", ",i,1\n", "u,i,\n"])
def test_a_log_without_a_usable_row_is_refused(tmp_path: Path, rows: str) -> None:
    with pytest.raises(DataError, match=r"no row of .*log\.csv can be used: 0 of"):
        read(tmp_path, f"user,item,time\n{rows}")


def test_a_quote_that_never_closes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 3: a quote is never closed"):
        read(tmp_path, 'user,item,time\nu,i,1\n"u,i,1\nu,i,2\n')


def test_a_field_beyond_the_csv_limit_is_refused_by_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="line 3: field larger than field limit"):
        read(tmp_path, f"user,item,time\nu,i,1\nu,{'x' * 200_000},1\n")


@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_truncated_gzip_is_refused(tmp_path: Path, keep: float) -> None:
    rows = "".join(f"u{row},i,{row}\n" for row in range(999))
    packed = gzip.compress(f"user,item,time\n{rows}".encode())
    path = tmp_path / "log.csv.gz"
    path.write_bytes(packed[: int(len(packed) * keep)])
    with pytest.raises(DataError, match=r"log\.csv\.gz cannot be read"):
        read_interactions(path, COLUMNS)


@pytest.mark.parametrize("name", ["log.csv.gz", "log.parquet", "log.parquet.gz"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read_interactions(written(tmp_path, "user,item,time\nu,i,1\n", name), COLUMNS)


# --- Parquet's own types


INSTANTS = [datetime(2010, 12, 1, 8, 26, 0, 900_000), datetime(2010, 12, 1, 8, 26, 1)]


@pytest.mark.parametrize(
    "times",
    [
        *[pa.array(INSTANTS, pa.timestamp(unit)) for unit in ("ms", "us", "ns")],
        pa.array([1_291_191_960, 1_291_191_961], pa.timestamp("s")),
        pa.array(INSTANTS, pa.timestamp("us", tz="Europe/Paris")),
        pa.array(INSTANTS, pa.timestamp("ns", tz="-03:00")),
        pa.array(INSTANTS, pa.timestamp("ms")).dictionary_encode(),
        [1_291_191_960.0, 1_291_191_961.0],
        ["2010-12-01 08:26:00", "1291191961"],
    ],
    ids=["milliseconds", "microseconds", "nanoseconds", "seconds", "with zone", "with offset",
         "dictionary", "float", "text"],
)  # fmt: skip
def test_parquet_times_are_seconds(tmp_path: Path, times: object) -> None:
    # With a zone or without one, arrow stores an instant in UTC.
    log = read_parquet(tmp_path, {"user": [1, 2], "item": ["a", "b"], "time": times})
    assert log.time.tolist() == [1_291_191_960, 1_291_191_961]


def test_parquet_dates_are_midnights(tmp_path: Path) -> None:
    log = read_parquet(tmp_path, {"user": [1], "item": ["a"], "time": [date(1970, 1, 3)]})
    assert log.time.tolist() == [2 * 86_400]


def test_parquet_nulls_are_missing_and_named_by_row(tmp_path: Path) -> None:
    users = [1.0, math.nan, 1e7, None]
    log = read_parquet(
        tmp_path, {"user": users, "item": ["a", "b", None, "d"], "time": [1, 2, 3, 4]}
    )
    assert log.report.dropped == {"no user": 2, "no item": 1}
    assert "row 2: no user" in log.report.examples[0]


def test_large_parquet_ids_have_no_exponent(tmp_path: Path) -> None:
    log = read_parquet(tmp_path, {"user": [1e16], "item": [2**62], "time": [1]})
    assert (log.users.ids, log.items.ids) == (["10000000000000000"], [str(2**62)])


def test_parquet_dictionaries_are_read_by_value(tmp_path: Path) -> None:
    items = pa.array(["b", "a", "b"]).dictionary_encode()
    log = read_parquet(tmp_path, {"user": [1, 2, 3], "item": items, "time": [1, 2, 3]})
    assert decoded(log.items) == ["b", "a", "b"]


@pytest.mark.parametrize("kind", [pa.list_, pa.large_list])
def test_parquet_lists_are_several_ids(tmp_path: Path, kind: Callable[..., object]) -> None:
    tags = pa.array([[3, 4], None], kind(pa.int64()))
    mapping = ColumnMapping("user", "item", "time", item_attributes=("tags",))
    columns = {"user": [1, 2], "item": ["a", "b"], "time": [1, 2], "tags": tags}
    assert read_parquet(tmp_path, columns, mapping).item_attributes == {"tags": [("3", "4"), ()]}


def test_a_separator_inside_a_parquet_list_is_refused(tmp_path: Path) -> None:
    mapping = ColumnMapping("user", "item", "time", item_attributes=("tags",))
    columns = {"user": [1], "item": [1], "time": [1], "tags": [["a|b", "c"]]}
    with pytest.raises(DataError, match=r"has the id 'a\|b'; list_separator '\|' is in it"):
        read_parquet(tmp_path, columns, mapping)


def test_parquet_structs_are_refused(tmp_path: Path) -> None:
    columns = {"user": [{"id": 1}], "item": [1], "time": [1]}
    with pytest.raises(DataError, match=r"column 'user' of .* is struct<id: int64>; allowed"):
        read_parquet(tmp_path, columns)


def test_parquet_without_pyarrow_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"reading Parquet needs the extra \[parquet\]"):
        read_interactions(tmp_path / "log.parquet", COLUMNS)


# --- tables and logs


def test_joined_columns_are_found_by_canonical_id(tmp_path: Path) -> None:
    log = read_table(written(tmp_path, "item,x\n7.0,a\n8,b\n7,c\n9,d\n"), ["item", "x"])
    side_text = "item,tag,size\n8,t8,s8\n7,t7,s7\n7.0,again,again\n"
    side = read_table(written(tmp_path, side_text, "side.csv"), ["item", "tag", "size"])
    joined = log.joined("item", side, ["tag", "size"]).renamed({"tag": "label"})
    assert list(joined.columns) == ["item", "x", "label", "size"]
    assert decoded(joined.columns["label"]) == ["t7", "t8", "t7", ""]
    assert decoded(joined.columns["size"]) == ["s7", "s8", "s7", ""]
    assert list(log.columns) == ["item", "x"]


def test_a_broken_side_table_is_refused(tmp_path: Path) -> None:
    log = read_table(written(tmp_path, "item\n7\n"), ["item"])
    side = read_table(written(tmp_path, "item,tag\n7\n", "side.csv"), ["item", "tag"])
    with pytest.raises(DataError, match=r"1 unreadable rows: .*side\.csv, line 2"):
        log.joined("item", side, ["tag"])


@pytest.mark.parametrize("name", ["users", "items", "action", "time", "label", "tag", "city"])
def test_columns_that_do_not_fit_are_refused(name: str) -> None:
    long_column = encode(["a", "b", "a", "b"])
    column = encode(["a", "b", "a"])
    value_by_name = {name: long_column if name in ("users", "items", "action") else np.ones(4)}
    with pytest.raises(ShapeError, match="allowed: "):
        InteractionLog(
            users=value_by_name.get("users", column),
            items=value_by_name.get("items", column),
            time=value_by_name.get("time", np.arange(3)),
            labels={"like": value_by_name.get("label", np.ones(3, np.float32))},
            event_attributes={"action": value_by_name.get("action", column)},
            item_attributes={"tag": [()] * (3 if name == "tag" else 2)},
            item_floats={"price": np.zeros(2, np.float32)},
            user_attributes={"city": [()] * (3 if name == "city" else 2)},
            report=ReadReport(3, 3, {}, []),
        )


def test_reading_data_needs_no_torch() -> None:
    modules = "interactions", "presets", "synthetic"
    imports = "; ".join(f"import torchrec_kvshare.data.{module}" for module in modules)
    code = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
