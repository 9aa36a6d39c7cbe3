"""Parse the times of a log into Unix seconds.

The format is decided once per column: a single value may mean several times, and any number means
some time. A column that is ambiguous, or looks like another format than it would be read as, is an
error that names the option to set.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import compress, product
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.features.ids import canonical_id, is_integer_id
from torchrec_kvshare.features.limits import MAX_TIME

AUTO = "auto"
PER_SECOND_BY_UNIT = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
NAME_BY_UNIT = {
    "s": "Unix seconds",
    "ms": "Unix milliseconds",
    "us": "Unix microseconds",
    "ns": "Unix nanoseconds",
}
# From 1973 on the units do not overlap: 1e11 ms is 1973-03-03, and 1e11 s is the year 5138.
LEAST_BY_UNIT = {"s": 1, "ms": 1e11, "us": 1e14, "ns": 1e17}
MOST = 0.9  # of a column's distinct values show what the column holds
ALLOWED = (
    "allowed: Unix s, ms, us or ns of 1970 to 2100 (data.columns.time_unit), ISO 8601 such as "
    "2019-10-01 00:00:00 UTC, and whatever data.columns.time_format describes"
)

# Dates written in digits without separators, by their number of digits.
STAMP_BY_DIGITS = {8: "%Y%m%d", 10: "%Y%m%d%H", 12: "%Y%m%d%H%M", 14: "%Y%m%d%H%M%S"}
# From 1980 in days since 1970 to 2100 in days since 1900, as spreadsheets count.
DAY_NUMBERS = (3_653, 73_051)
SPREADSHEET_1970 = 25_569
_DATES = (
    *("%m/%d/%Y", "%d/%m/%Y", "%m-%d-%Y", "%d-%m-%Y", "%d.%m.%Y", "%m/%d/%y", "%d/%m/%y"),
    *("%d.%m.%y", "%Y/%m/%d", "%Y.%m.%d", "%d-%b-%Y", "%d %b %Y", "%d/%b/%Y", "%b %d, %Y"),
    *("%b %d %Y", "%B %d, %Y", "%d %B %Y", "%a, %d %b %Y"),
)
_CLOCKS = ("", " %H:%M", " %H:%M:%S", " %I:%M %p", " %I:%M:%S %p", ", %H:%M", ":%H:%M:%S %z",
           " %H:%M:%S %z")  # fmt: skip
LIKELY_FORMATS = (
    *(date + clock for date, clock in product(_DATES, _CLOCKS)),
    *("%a %b %d %H:%M:%S %Y", "%a %b %d %H:%M:%S %z %Y", "%Y-%m-%d %I:%M:%S %p"),
)
SAMPLE = 500  # values tried to guess a column's format

# The format of pyarrow and most exports; numpy parses whole arrays of it.
_PLAIN_ISO = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}[T ][0-9]{2}:[0-9]{2}:[0-9]{2}")
_ISO = re.compile(
    r"([0-9]{4})(-?)([0-9]{2})\2([0-9]{2})"
    r"(?:[Tt ]([0-9]{2}|[0-9](?=:))(:?)([0-9]{2})(?:\6([0-9]{2})(?:[.,][0-9]+)?)?)?"
    r"\s*(?:Z|z|UTC|GMT|([+-])([0-9]{2}):?([0-9]{2})?(?: UTC)?)?"
)


@dataclass(frozen=True)
class TimeFormat:
    """How the times of a log are written.

    Args:
        unit: of numbers: "s", "ms", "us", "ns"; "auto": inferred from the column's magnitudes.
        pattern: the ``datetime.strptime`` format of all times; None: numbers or ISO 8601.

    Raises:
        ConfigError: if a value is not allowed, or both are given.
    """

    unit: str = AUTO
    pattern: str | None = None

    def __post_init__(self) -> None:
        if self.unit not in (AUTO, *PER_SECOND_BY_UNIT):
            allowed = ", ".join((AUTO, *PER_SECOND_BY_UNIT))
            raise ConfigError(f"data.columns.time_unit is {self.unit!r}; allowed: {allowed}")
        if self.pattern is None:
            return
        if self.unit != AUTO:
            raise ConfigError(
                f"data.columns.time_unit is {self.unit!r} and time_format {self.pattern!r}; only "
                "one of them is allowed"
            )
        try:
            some_time = datetime(2010, 12, 1, 8, 26, tzinfo=timezone.utc)
            datetime.strptime(some_time.strftime(self.pattern), self.pattern)
        except ValueError as error:
            raise ConfigError(f"data.columns.time_format {self.pattern!r}: {error}") from error


class Times(NamedTuple):
    """Whole Unix seconds of each text; NaN for texts that are not times from 1970 to 2100."""

    seconds: NDArray[np.float64]
    form: str  # a description of the format


def read_times(texts: Sequence[str], written: TimeFormat, what: str) -> Times:
    """Parse the distinct times of a column; a time without a zone is UTC.

    Args:
        texts: as the file has them, "" for a missing time.
        written: how the times are written.
        what: the column, for messages.

    Returns:
        The seconds; NaN for texts that are not times.

    Raises:
        DataError: if most texts are not times, numbers look like dates or days, or units are mixed.

    Example:
        >>> read_times(["1430622004384", "2015-05-03T03:00:04Z"], TimeFormat(), "time")
        Times(seconds=array([1.430622e+09, 1.430622e+09]), form='Unix milliseconds and ISO 8601')
    """
    texts = [text.strip() for text in texts]
    if written.pattern is not None:
        # canonical_id also makes a float of pandas, such as 20101201.0, fit %Y%m%d.
        seconds = np.array([_seconds_by(canonical_id(text), written.pattern) for text in texts])
        form = f"time_format {written.pattern}"
    else:
        seconds, form = _seconds_of_numbers_and_iso(texts, written, what)
    bad = [text for text, second in zip(texts, seconds, strict=True) if text and second != second]
    num_given = len(texts) - texts.count("")
    if len(bad) > num_given / 2:
        count = f"{len(bad)} of {num_given} distinct values are not times"
        raise DataError(f"{what}: {count}, such as {bad[0]!r}{_advice(bad, form)}; {ALLOWED}")
    return Times(seconds, form)


def fitting_formats(texts: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return the formats in which a column may be written.

    Args:
        texts: times as the file has them.
        patterns: formats to choose from.

    Returns:
        The formats that parse the most texts, if these are nearly all: several where day and month
        cannot be told apart, none where no format fits.

    Example:
        >>> fitting_formats(["1/12/2010", "1/13/2010"], ["%d/%m/%Y", "%m/%d/%Y"])
        ['%m/%d/%Y']
    """
    max_misfits = (1 - MOST) * len(texts)
    misfits_by_pattern = {}
    for pattern in patterns:
        misfits = 0
        for text in texts:
            misfits += math.isnan(_seconds_by(text.strip(), pattern))
            if misfits > max_misfits:
                break
        else:
            misfits_by_pattern[pattern] = misfits
    fewest = min(misfits_by_pattern.values(), default=0)
    return [pattern for pattern, misfits in misfits_by_pattern.items() if misfits == fewest]


def iso_of(seconds: int) -> str:
    """Return a time in ISO 8601.

    Example:
        >>> iso_of(1291191960)
        '2010-12-01T08:26:00Z'
    """
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def finite_number(text: str) -> float:
    """Parse a finite number.

    Args:
        text: a number as the file has it.

    Returns:
        The number; NaN if the text is not a finite number.

    Example:
        >>> finite_number(" 2.5"), finite_number("inf"), finite_number("1_000")
        (2.5, nan, nan)
    """
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) and "_" not in text else math.nan


def _seconds_of_numbers_and_iso(
    texts: Sequence[str], written: TimeFormat, what: str
) -> tuple[NDArray[np.float64], str]:
    numbers = np.fromiter(map(finite_number, texts), np.float64, len(texts))
    unit = written.unit if written.unit != AUTO else _unit_of(texts, numbers, what)
    per_second = PER_SECOND_BY_UNIT[unit]
    is_number = ~np.isnan(numbers)
    is_time = (numbers >= 0) & (numbers <= MAX_TIME * per_second)
    seconds = np.where(is_time, np.floor_divide(numbers, per_second), math.nan)
    if unit == "ns":  # Nanoseconds have more digits than a float.
        for index in np.flatnonzero(is_time).tolist():
            if is_integer_id(texts[index]):
                seconds[index] = int(texts[index]) // per_second
    seconds[~is_number] = _iso_seconds(list(compress(texts, ~is_number)))
    is_read = ~np.isnan(seconds)
    forms = []
    if (is_read & is_number).any() or not is_read.any():
        forms.append(NAME_BY_UNIT[unit])
    if (is_read & ~is_number).any():
        forms.append("ISO 8601")
    return seconds, " and ".join(forms)


def _unit_of(texts: Sequence[str], numbers: NDArray[np.float64], what: str) -> str:
    """Infer the unit of a column's numbers; zero fits every unit."""
    is_positive = numbers > 0
    positive_texts = list(compress(texts, is_positive))
    positive = numbers[is_positive]
    _refuse_stamps(positive, what)
    _refuse_day_numbers(positive_texts, positive, what)
    example_by_unit = {}
    for unit, least in LEAST_BY_UNIT.items():
        is_of_unit = (positive >= least) & (positive <= MAX_TIME * PER_SECOND_BY_UNIT[unit])
        if is_of_unit.any():
            example_by_unit[unit] = positive_texts[int(np.argmax(is_of_unit))]
    if len(example_by_unit) > 1:
        came = " and ".join(f"{text} ({NAME_BY_UNIT[u]})" for u, text in example_by_unit.items())
        raise DataError(
            f"{what} mixes units of time: {came}; data.columns.time_unit={'|'.join(LEAST_BY_UNIT)} "
            "reads all values in one unit"
        )
    return next(iter(example_by_unit), "s")


def _refuse_stamps(numbers: NDArray[np.float64], what: str) -> None:
    """Refuse numbers such as 20101201, which would be read as a time in August 1970."""
    for digits, pattern in STAMP_BY_DIGITS.items():
        dates = numbers // 10.0 ** (digits - 8)
        year, month, day = dates // 10_000, dates // 100 % 100, dates % 100
        is_stamp = (year >= 1970) & (year <= 2100) & (month >= 1) & (month <= 12) & (day >= 1)
        is_stamp &= (day <= 31) & (numbers % 1 == 0)
        if is_stamp.sum() < max(1, MOST * len(numbers)):
            continue
        stamps = [str(int(number)) for number in numbers[is_stamp][:SAMPLE]]
        if fitting_formats(stamps, [pattern]):
            raise DataError(
                f"{what} looks like dates in digits, such as {stamps[0]}: set "
                f"data.columns.time_format='{pattern}', or time_unit if it is a number; {ALLOWED}"
            )


def _refuse_day_numbers(texts: Sequence[str], numbers: NDArray[np.float64], what: str) -> None:
    """Refuse numbers such as 40513.35, which would be read as a time on 1970-01-01."""
    is_day = (numbers >= DAY_NUMBERS[0]) & (numbers <= DAY_NUMBERS[1])
    if not len(numbers) or is_day.mean() < MOST:
        return
    first = int(np.argmax(is_day))
    days = int(numbers[first])
    meanings = [f"days since 1970 ({texts[first]} would be {iso_of(days * 86_400)[:10]})"]
    if days >= SPREADSHEET_1970:
        date = iso_of((days - SPREADSHEET_1970) * 86_400)[:10]
        meanings.append(f"days as spreadsheets count them ({date})")
    raise DataError(
        f"{what} looks like {' or '.join(meanings)}: write it as ISO 8601, or set "
        f"data.columns.time_unit=s if these are seconds or mere positions in an order; {ALLOWED}"
    )


def _advice(bad: Sequence[str], form: str) -> str:
    """Return advice on the format that a column seems to have, or an empty text."""
    fitting = fitting_formats(bad[:SAMPLE], LIKELY_FORMATS)
    if fitting:
        named = " or ".join(f"'{pattern}'" for pattern in fitting)
        came = ", and more than one format fits" if len(fitting) > 1 else ""
        return f"{came}: set data.columns.time_format={named}"
    is_number_or_iso = not math.isnan(finite_number(bad[0])) or _ISO.fullmatch(bad[0])
    return f", read as {form}" if is_number_or_iso else ""


def _seconds_by(text: str, pattern: str) -> float:
    try:
        return _in_range(datetime.strptime(text, pattern))
    except (ValueError, OverflowError):
        return math.nan


def _iso_seconds(texts: Sequence[str]) -> NDArray[np.float64]:
    if all(map(_PLAIN_ISO.fullmatch, texts)):
        try:
            plain = np.array(texts, "datetime64[s]").astype(np.float64)
        except ValueError:
            pass  # Some are not dates, such as 2010-02-30.
        else:
            return np.where((plain >= 0) & (plain <= MAX_TIME), plain, math.nan)
    return np.fromiter(map(_iso_second, texts), np.float64, len(texts))


def _iso_second(text: str) -> float:
    match = _ISO.fullmatch(text)
    if match is None:
        return math.nan
    year, _, month, day, hour, _, minute, second, sign, zone_hours, zone_minutes = match.groups("0")
    offset = timedelta(hours=int(zone_hours), minutes=int(zone_minutes))
    try:
        zone = timezone(-offset if sign == "-" else offset)
        clock = int(hour), int(minute), int(second)
        return _in_range(datetime(int(year), int(month), int(day), *clock, tzinfo=zone))
    except (ValueError, OverflowError):
        return math.nan


def _in_range(time: datetime) -> float:
    """Return whole seconds; NaN outside 1970 to 2100."""
    seconds = (time if time.tzinfo else time.replace(tzinfo=timezone.utc)).timestamp()
    return float(math.floor(seconds)) if 0 <= seconds <= MAX_TIME else math.nan
