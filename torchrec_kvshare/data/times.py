"""Parse the times of a log into Unix seconds.

The format is decided once per column: a single value may mean several times, and any number means
some time. A column that is ambiguous, or looks like another format than it would be read as, is an
error that names the option to set.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import compress, islice, product
from typing import Any, NamedTuple

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


class Integers(Sequence[str]):
    """Texts of integers, held as an array."""

    def __init__(self, values: NDArray[np.int64]) -> None:
        self.values = values

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Any:
        return str(self.values[index])


class Instants(Integers):
    """Texts such as ``2019-10-01 00:00:00``, held as an array of Unix seconds."""

    def __getitem__(self, index: Any) -> Any:
        return str(self.values[index].astype("datetime64[s]")).replace("T", " ")


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
    reader = time_reader([texts], written, what)
    seconds = reader.seconds(texts)
    return Times(seconds, reader.checked_form())


def time_reader(chunks: Iterable[Sequence[str]], written: TimeFormat, what: str) -> "TimeReader":
    """Decide how the times of a column are written.

    Args:
        chunks: its distinct times, each in one of the chunks.
        written: how the times are written.
        what: the column, for messages.

    Returns:
        The reader of these times.

    Raises:
        DataError: if numbers look like dates or days, or units are mixed.
    """
    if written.pattern is not None or written.unit != AUTO:
        return TimeReader(written, what)
    survey = _UnitSurvey()
    for chunk in chunks:
        texts = _stripped(chunk)
        survey.add(texts, _numbers_of(texts))
    return TimeReader(TimeFormat(unit=survey.unit(what)), what)


class TimeReader:
    """Parses the times of a column in one format, and counts those that cannot be parsed.

    Args:
        written: the unit of numbers, or the pattern of all times.
        what: the column, for messages.
    """

    def __init__(self, written: TimeFormat, what: str) -> None:
        self.written, self.what = written, what
        self._num_given = self._num_bad = 0
        self._first_bad: list[str] = []
        self._has_numbers = self._has_iso = False

    @property
    def per_second(self) -> int:
        """Number of units in a second."""
        return PER_SECOND_BY_UNIT[self.written.unit]

    def seconds(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return the seconds of distinct times, NaN for what is no time."""
        texts = _stripped(texts)
        if self.written.pattern is None:
            seconds = self._seconds_of_numbers_and_iso(texts)
        else:
            # canonical_id also makes a float of pandas, such as 20101201.0, fit %Y%m%d.
            pattern = self.written.pattern
            seconds = np.array([_seconds_by(canonical_id(text), pattern) for text in texts])
        self._count(texts, seconds)
        return seconds

    def checked_form(self) -> str:
        """Return a description of the format of what was parsed.

        Raises:
            DataError: if most of it are not times.
        """
        form = self._form()
        if self._num_bad > self._num_given / 2:
            count = f"{self._num_bad} of {self._num_given} distinct values are not times"
            bad = self._first_bad
            raise DataError(
                f"{self.what}: {count}, such as {bad[0]!r}{_advice(bad, form)}; {ALLOWED}"
            )
        return form

    def _form(self) -> str:
        if self.written.pattern is not None:
            return f"time_format {self.written.pattern}"
        forms = []
        if self._has_numbers or not self._has_iso:
            forms.append(NAME_BY_UNIT[self.written.unit])
        if self._has_iso:
            forms.append("ISO 8601")
        return " and ".join(forms)

    def _count(self, texts: Sequence[str], seconds: NDArray[np.float64]) -> None:
        num_empty = texts.count("") if isinstance(texts, list) else 0
        self._num_given += len(texts) - num_empty
        is_bad = np.isnan(seconds)
        self._num_bad += int(is_bad.sum()) - num_empty  # The empty text is never a time.
        if len(self._first_bad) < SAMPLE:
            bad = (texts[index] for index in np.flatnonzero(is_bad).tolist())
            given = (text for text in bad if text)
            self._first_bad += islice(given, SAMPLE - len(self._first_bad))

    def _seconds_of_numbers_and_iso(self, texts: Sequence[str]) -> NDArray[np.float64]:
        numbers = _numbers_of(texts)
        is_number = ~np.isnan(numbers)
        is_time = (numbers >= 0) & (numbers <= MAX_TIME * self.per_second)
        seconds = np.where(is_time, np.floor_divide(numbers, self.per_second), math.nan)
        if self.written.unit == "ns" and type(texts) is Integers:
            seconds[is_time] = texts.values[is_time] // self.per_second
        elif self.written.unit == "ns":  # Nanoseconds have more digits than a float.
            for index in np.flatnonzero(is_time).tolist():
                if is_integer_id(texts[index]):
                    seconds[index] = int(texts[index]) // self.per_second
        if isinstance(texts, Instants):
            seconds = _in_range_only(texts.values.astype(np.float64))
        elif not is_number.all():
            seconds[~is_number] = _iso_seconds(list(compress(texts, ~is_number)))
        is_read = ~np.isnan(seconds)
        self._has_numbers |= bool((is_read & is_number).any())
        self._has_iso |= bool((is_read & ~is_number).any())
        return seconds


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


class _UnitSurvey:
    """What the numbers of a column say about their unit; zero fits every unit."""

    def __init__(self) -> None:
        self.num_positive = self.num_days = 0
        self.num_stamps_by_digits = dict.fromkeys(STAMP_BY_DIGITS, 0)
        self.stamps_by_digits: dict[int, list[str]] = {digits: [] for digits in STAMP_BY_DIGITS}
        self.first_day: tuple[str, int] | None = None
        self.example_by_unit: dict[str, str] = {}

    def add(self, texts: Sequence[str], numbers: NDArray[np.float64]) -> None:
        positions = np.flatnonzero(numbers > 0)
        positive = numbers[positions]
        self.num_positive += len(positive)
        for digits, stamps in self.stamps_by_digits.items():
            is_stamp = _is_stamp(positive, digits)
            self.num_stamps_by_digits[digits] += int(is_stamp.sum())
            few = positive[is_stamp][: SAMPLE - len(stamps)]
            stamps += [str(int(number)) for number in few]
        is_day = (positive >= DAY_NUMBERS[0]) & (positive <= DAY_NUMBERS[1])
        self.num_days += int(is_day.sum())
        if self.first_day is None and is_day.any():
            first = int(np.argmax(is_day))
            self.first_day = texts[int(positions[first])], int(positive[first])
        for unit, least in LEAST_BY_UNIT.items():
            is_of_unit = (positive >= least) & (positive <= MAX_TIME * PER_SECOND_BY_UNIT[unit])
            if unit not in self.example_by_unit and is_of_unit.any():
                self.example_by_unit[unit] = texts[int(positions[int(np.argmax(is_of_unit))])]

    def unit(self, what: str) -> str:
        self._refuse_stamps(what)
        self._refuse_day_numbers(what)
        in_order = [unit for unit in LEAST_BY_UNIT if unit in self.example_by_unit]
        if len(in_order) > 1:
            came = " and ".join(
                f"{self.example_by_unit[unit]} ({NAME_BY_UNIT[unit]})" for unit in in_order
            )
            raise DataError(
                f"{what} mixes units of time: {came}; "
                f"data.columns.time_unit={'|'.join(LEAST_BY_UNIT)} reads all values in one unit"
            )
        return next(iter(in_order), "s")

    def _refuse_stamps(self, what: str) -> None:
        """Refuse numbers such as 20101201, which would be read as a time in August 1970."""
        for digits, pattern in STAMP_BY_DIGITS.items():
            if self.num_stamps_by_digits[digits] < max(1, MOST * self.num_positive):
                continue
            stamps = self.stamps_by_digits[digits]
            if fitting_formats(stamps, [pattern]):
                raise DataError(
                    f"{what} looks like dates in digits, such as {stamps[0]}: set "
                    f"data.columns.time_format='{pattern}', or time_unit if it is a number; "
                    f"{ALLOWED}"
                )

    def _refuse_day_numbers(self, what: str) -> None:
        """Refuse numbers such as 40513.35, which would be read as a time on 1970-01-01."""
        if self.first_day is None or self.num_days / self.num_positive < MOST:
            return
        text, days = self.first_day
        meanings = [f"days since 1970 ({text} would be {iso_of(days * 86_400)[:10]})"]
        if days >= SPREADSHEET_1970:
            date = iso_of((days - SPREADSHEET_1970) * 86_400)[:10]
            meanings.append(f"days as spreadsheets count them ({date})")
        raise DataError(
            f"{what} looks like {' or '.join(meanings)}: write it as ISO 8601, or set "
            "data.columns.time_unit=s if these are seconds or mere positions in an order; "
            f"{ALLOWED}"
        )


def _stripped(texts: Sequence[str]) -> Sequence[str]:
    return texts if isinstance(texts, Integers) else [text.strip() for text in texts]


def _numbers_of(texts: Sequence[str]) -> NDArray[np.float64]:
    """Return the number that each text is, NaN for other texts."""
    if isinstance(texts, Instants):
        return np.full(len(texts), math.nan)
    if isinstance(texts, Integers):
        return texts.values.astype(np.float64)
    return np.fromiter(map(finite_number, texts), np.float64, len(texts))


def _is_stamp(numbers: NDArray[np.float64], digits: int) -> NDArray[np.bool_]:
    per_year = 10.0 ** (digits - 4)
    is_stamp = (numbers >= 1970 * per_year) & (numbers < 2101 * per_year)
    inside = numbers[is_stamp]
    dates = inside // 10.0 ** (digits - 8)
    month, day = dates // 100 % 100, dates % 100
    is_date = (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31)
    is_stamp[is_stamp] = is_date & (inside % 1 == 0)
    return is_stamp


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
            return _in_range_only(plain)
    return np.fromiter(map(iso_second, texts), np.float64, len(texts))


def _in_range_only(seconds: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where((seconds >= 0) & (seconds <= MAX_TIME), seconds, math.nan)


def iso_second(text: str) -> float:
    """Parse a time in ISO 8601, UTC without a zone.

    Returns:
        Whole Unix seconds; NaN for what is no time of 1970 to 2100.

    Example:
        >>> iso_second("2010-12-01"), iso_second("2010-12-01T09:26+01:00"), iso_second("12/1/2010")
        (1291161600.0, 1291191960.0, nan)
    """
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
