"""Times of logs are read correctly, or refused with what they look like."""

import math
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_kvshare.data.interactions import ColumnMapping, read_interactions
from torchrec_kvshare.data.times import (
    PER_SECOND_BY_UNIT,
    TimeFormat,
    Times,
    fitting_formats,
    read_times,
)
from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.features.limits import MAX_TIME

AUTO = TimeFormat()


def times(*texts: str, written: TimeFormat = AUTO) -> Times:
    return read_times(texts, written, "column 'ts' of log.csv")


def seconds(*texts: str, written: TimeFormat = AUTO) -> list[float | None]:
    found = times(*texts, written=written).seconds.tolist()
    return [None if math.isnan(second) else second for second in found]


def refused(*texts: str, written: TimeFormat = AUTO) -> str:
    with pytest.raises(DataError, match=r"^column 'ts' of log\.csv") as error:
        times(*texts, written=written)
    return str(error.value)


# --- units


@pytest.mark.parametrize(
    ("texts", "form"),
    [
        (("1430622004", "1430622005"), "Unix seconds"),
        (("1430622004384", "1430622005999"), "Unix milliseconds"),
        (("1430622004384000", "1430622005999999"), "Unix microseconds"),
        (("1430622004384000000", "1430622005999999999"), "Unix nanoseconds"),
        (("1430622004.9", "1430622005.0"), "Unix seconds"),
        (("1.430622004384e12", "1430622005999.0"), "Unix milliseconds"),
    ],
)
def test_the_unit_of_a_column_is_told_by_its_magnitudes(texts: tuple[str, ...], form: str) -> None:
    """RetailRocket's milliseconds were a bad time in every row, without a hint."""
    assert seconds(*texts) == [1_430_622_004, 1_430_622_005]
    assert times(*texts).form == form


@given(st.integers(0, MAX_TIME), st.sampled_from(list(PER_SECOND_BY_UNIT)), st.data())
def test_a_unit_that_is_named_reads_every_time_of_1970_to_2100(
    second: int, unit: str, data: st.DataObject
) -> None:
    per_second = PER_SECOND_BY_UNIT[unit]
    rest = data.draw(st.integers(0, per_second - 1)) if second < MAX_TIME else 0
    text = str(second * per_second + rest)
    assert seconds(text, written=TimeFormat(unit)) == [second]
    assert seconds("0", text, str(MAX_TIME * per_second), written=TimeFormat(unit))[1] == second


@given(st.integers(200_000_000, MAX_TIME), st.sampled_from(["s", "ms", "us", "ns"]))
def test_the_unit_is_told_of_every_time_from_1977_on(second: int, unit: str) -> None:
    other = 1_700_000_000 if second % 2 else 1_700_000_001
    per_second = PER_SECOND_BY_UNIT[unit]
    texts = [str(time * per_second) for time in (second, other)]
    assert seconds(*texts) == [second, other]


def test_units_are_not_mixed() -> None:
    message = refused("1700000000", "1700000000000", "1700000001")
    assert "mixes units of time: 1700000000 (Unix seconds) and 1700000000000 (Unix milli" in message
    assert "data.columns.time_unit=s|ms|us|ns" in message


def test_zero_is_1970_in_every_unit() -> None:
    assert seconds("0", "1700000000000") == [0, 1_700_000_000]


def test_a_named_unit_settles_a_mix() -> None:
    texts = ("1700000000", "1700000000000")
    assert seconds(*texts, written=TimeFormat("ms")) == [1_700_000, 1_700_000_000]


def test_a_number_beyond_2100_is_no_time_among_times() -> None:
    assert seconds("1700000000", "4102444800", "4102444801", "-1") == [
        *(1_700_000_000, MAX_TIME),
        *(None, None),
    ]


@pytest.mark.parametrize("unit", ["auto", "s", "ns"])
def test_a_number_of_any_length_is_no_time(unit: str) -> None:
    texts = ("0", "9" * 400, "1")
    assert seconds(*texts, written=TimeFormat(unit))[1] is None


def test_numbers_that_a_named_unit_puts_beyond_2100_are_refused() -> None:
    message = refused("1700000000000", written=TimeFormat("s"))
    assert "such as '1700000000000', read as Unix seconds; allowed: Unix s, ms" in message


@pytest.mark.parametrize("unit", ["", "seconds", "S", "min"])
def test_an_unknown_unit_is_refused(unit: str) -> None:
    with pytest.raises(ConfigError, match=r"time_unit is '.*'; allowed: auto, s, ms, us, ns"):
        TimeFormat(unit)


# --- numbers that are something else


@pytest.mark.parametrize(
    ("texts", "pattern"),
    [
        (("20101201", "20101202", "20111209"), "%Y%m%d"),
        (("20101201.0", "20101202.0"), "%Y%m%d"),
        (("20101201", "0"), "%Y%m%d"),
        (("2010120108", "2010120109"), "%Y%m%d%H"),
        (("201012010826", "201012010827"), "%Y%m%d%H%M"),
        (("20101201082600", "20101201082700"), "%Y%m%d%H%M%S"),
    ],
)
def test_dates_in_digits_are_refused_with_their_format(
    texts: tuple[str, ...], pattern: str
) -> None:
    """20101201 was read as a time in August 1970."""
    message = refused(*texts)
    assert f"looks like dates in digits, such as {texts[0].removesuffix('.0')}" in message
    assert f"set data.columns.time_format='{pattern}'" in message
    assert seconds(*texts, written=TimeFormat(pattern=pattern))[0] in (
        *(1_291_161_600, 1_291_190_400, 1_291_191_960),
    )


def test_dates_in_digits_are_seconds_where_the_config_says_so() -> None:
    assert seconds("20101201", written=TimeFormat("s")) == [20_101_201]


def test_seconds_of_august_1970_are_no_dates_in_digits() -> None:
    assert seconds("20101201", "20101299", "20199999", "20209901") == [
        *(20_101_201, 20_101_299, 20_199_999, 20_209_901)
    ]


@pytest.mark.parametrize(
    ("texts", "meanings"),
    [
        (("40513.35", "40514.01"), ("2080-12-02", "as spreadsheets count them (2010-12-01)")),
        (("14944", "14945"), ("days since 1970 (14944 would be 2010-12-01)",)),
    ],
)
def test_day_numbers_are_refused_with_what_they_look_like(
    texts: tuple[str, ...], meanings: tuple[str, ...]
) -> None:
    """Day numbers and spreadsheet dates were read as times on 1970-01-01."""
    message = refused(*texts)
    assert all(meaning in message for meaning in meanings)
    assert "write it as ISO 8601, or set data.columns.time_unit=s" in message


def test_positions_in_an_order_are_seconds() -> None:
    assert seconds("1", "2", "3") == [1, 2, 3]
    assert seconds("14944", "14945", written=TimeFormat("s")) == [14_944, 14_945]


# --- ISO 8601


@pytest.mark.parametrize(
    "text",
    [
        "2019-10-01 08:26:00 UTC",
        "2019-10-01 08:26:00 GMT",
        "2019-10-01 08:26:00+00",
        "2019-10-01 08:26:00 +0000 UTC",
        "2019-10-01T08:26:00Z",
        "2019-10-01t08:26:00z",
        "2019-10-01T08:26",
        "2019-10-01 8:26",
        "2019-10-01T08:26:00.999999999+00:00",
        "2019-10-01T08:26:00,5",
        "20191001T082600Z",
        "20191001T0826",
        "2019-10-01T13:56:00+0530",
        "2019-10-01 03:26:00-05",
        " 2019-10-01 08:26:00 UTC ",
    ],
)
def test_iso_times_are_read_in_their_usual_spellings(text: str) -> None:
    """`2019-10-01 00:00:00 UTC`, as REES46 writes it, was a bad time in every row."""
    assert seconds(text) == [1_569_918_360]
    assert times(text).form == "ISO 8601"


@pytest.mark.parametrize(
    "text",
    ["2019-1001", "2019-10-01 826", "2019-10-01T08:26:61", "2019-10-01 24:26", "2019-10-01 08:2600",
     "2019-10-01 08:26 CET", "2019-W40-2", "2019-10", "2019-02-29", "2019-10-01T08:26+24:00"],
)  # fmt: skip
def test_what_is_not_iso_is_no_time(text: str) -> None:
    assert seconds("2019-10-01", text) == [1_569_888_000, None]


@given(
    st.datetimes(datetime(1971, 1, 1), datetime(2099, 1, 1)),
    st.integers(-23 * 60, 23 * 60),
    st.sampled_from(["%Y-%m-%dT%H:%M:%S%z", "%Y%m%dT%H%M%S%z", "%Y-%m-%d %H:%M:%S.%f %z"]),
)
def test_iso_spellings_agree_with_datetime(naive: datetime, minutes: int, pattern: str) -> None:
    time = naive.replace(tzinfo=timezone(timedelta(minutes=minutes)))
    assert seconds(time.strftime(pattern)) == [math.floor(time.timestamp())]


def test_iso_times_and_numbers_may_stand_in_one_column() -> None:
    texts = ("1430622004384", "2015-05-03T03:00:04Z")
    assert seconds(*texts) == [1_430_622_004, 1_430_622_004]
    assert times(*texts).form == "Unix milliseconds and ISO 8601"


# --- formats of other people


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        ("%m/%d/%Y %H:%M", "12/1/2010 8:26"),
        ("%d-%m-%Y %H:%M", "01-12-2010 08:26"),
        ("%d-%m-%Y %H:%M", " 01-12-2010 08:26 "),
        ("%a %b %d %H:%M:%S %z %Y", "Wed Dec 01 09:26:00 +0100 2010"),
        ("%d %b %Y, %I:%M %p", "1 Dec 2010, 8:26 AM"),
    ],
)
def test_a_time_format_is_followed(pattern: str, text: str) -> None:
    written = TimeFormat(pattern=pattern)
    assert seconds(text, written=written) == [1_291_191_960]
    assert times(text, written=written).form == f"time_format {pattern}"


def test_what_a_time_format_does_not_fit_is_no_time() -> None:
    written = TimeFormat(pattern="%d/%m/%Y")
    assert seconds("31/12/2010", "12/31/2010", "31/12/2010", written=written)[1] is None
    assert "3 of 3 distinct values" in refused("1/1/1969", "1/1/2101", "x", written=written)


def test_iso_times_under_a_time_format_are_refused_with_both_named() -> None:
    message = refused("2010-12-01", written=TimeFormat(pattern="%d/%m/%Y"))
    assert "such as '2010-12-01', read as time_format %d/%m/%Y; allowed:" in message


@pytest.mark.parametrize("pattern", ["%-d/%m/%Y", "%Q", "%"])
def test_a_time_format_that_python_cannot_read_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.columns\.time_format '%"):
        TimeFormat(pattern=pattern)


def test_a_unit_and_a_format_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="time_unit is 'ms' and time_format '%Y'; only one"):
        TimeFormat("ms", "%Y")


@pytest.mark.parametrize(
    ("texts", "advice"),
    [
        (("12/1/2010 8:26",), "'%m/%d/%Y %H:%M' or '%d/%m/%Y %H:%M'"),
        (("12/1/2010 8:26", "12/13/2010 8:26"), ": set data.columns.time_format='%m/%d/%Y %H:%M'"),
        (("1/12/2010 8:26", "13/12/2010 8:26"), ": set data.columns.time_format='%d/%m/%Y %H:%M'"),
        (("01-12-2010 08:26",), "'%m-%d-%Y %H:%M' or '%d-%m-%Y %H:%M'"),
        (("12/1/2010 8:26:01 PM", "12/13/2010 8:26:01 AM"), "'%m/%d/%Y %I:%M:%S %p'"),
        (("1.12.10",), "'%d.%m.%y'"),
        (("2010/12/01 08:26",), "'%Y/%m/%d %H:%M'"),
        (("01-Dec-2010",), "'%d-%b-%Y'"),
        (("Wed Dec 01 08:26:00 +0000 2010",), "'%a %b %d %H:%M:%S %z %Y'"),
    ],
)
def test_times_of_another_form_are_refused_with_the_formats_that_fit(
    texts: tuple[str, ...], advice: str
) -> None:
    """`12/1/2010 8:26` and `01-12-2010 08:26` were bad times in every row, without a hint."""
    message = refused(*texts)
    assert f"distinct values are not times, such as '{texts[0]}'" in message
    assert advice in message
    assert "allowed: Unix s, ms, us or ns of 1970 to 2100" in message
    assert ("more than one format fits" in message) == (" or '" in message)


def test_a_few_texts_that_are_no_times_are_dropped_only() -> None:
    assert seconds("1700000000", "1700000001", "unknown", "", "12/1/2010") == [
        *(1_700_000_000, 1_700_000_001),
        *(None, None, None),
    ]


def test_most_texts_without_a_time_are_refused_with_one_of_them() -> None:
    message = refused("1700000000", "soon", "later", "")
    assert message.startswith("column 'ts' of log.csv: 2 of 3 distinct values are not times")
    assert "such as 'soon'; allowed:" in message


def test_a_column_without_any_text_has_no_times() -> None:
    assert seconds("") == [None]
    assert seconds() == []


def test_fitting_formats_forgive_a_few_texts_and_tell_a_tie() -> None:
    orders = ["%d/%m/%Y", "%m/%d/%Y"]
    assert fitting_formats(["1/2/2010"] * 19 + ["x"], orders) == orders
    assert fitting_formats(["1/2/2010"] * 19 + ["1/13/2010"], orders) == ["%m/%d/%Y"]
    assert fitting_formats(["1/2/2010", "x"], orders) == []
    assert fitting_formats(["1-2-2010"], orders) == []


# --- in a log


def test_only_kept_rows_tell_how_a_column_is_written(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item,time\nu,i,1700000000\n,i,1700000000000\n,i,soon\n,i,later\n")
    log = read_interactions(path, ColumnMapping("user", "item", "time"))
    assert log.time.tolist() == [1_700_000_000]
    assert log.report.dropped == {"no user": 3}


def test_the_time_format_of_a_mapping_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text("user,item,time\nu,i,12/1/2010 8:26\nu,j,20101202\n")
    columns = ColumnMapping(
        "user", "item", "time", time_format=TimeFormat(pattern="%d/%m/%Y %H:%M")
    )
    log = read_interactions(path, columns)
    assert log.time.tolist() == [datetime(2010, 1, 12, 8, 26, tzinfo=timezone.utc).timestamp()]
    assert "line 3: bad time: time is '20101202'" in log.report.examples[0]
    assert log.report.summary is not None
    assert log.report.summary.time_form == "time_format %d/%m/%Y %H:%M"
