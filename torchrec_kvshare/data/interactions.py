"""Interaction logs of any user: a table's columns into users, items, times and labels.

A row that cannot be used is counted by its reason and the first ones are named; none disappears in
silence. The reading of files is ``tables``.
"""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.data.tables import (
    EXAMPLE_CHARACTERS,
    EXAMPLES_PER_REASON,
    Exclusion,
    IdColumn,
    RawTable,
    canonical_id,
    encode,
    read_table,
)
from torchrec_kvshare.errors import ConfigError, DataError, ShapeError

LATEST_TIME = 4_102_444_800  # 2100-01-01 UTC; milliseconds taken for seconds lie beyond it
COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_LABEL_RULE = re.compile(r"\s*([^=<>!]+?)\s*(>=|<=|==|!=|>|<)\s*([^=<>!]+?)\s*")
# What Python 3.10 reads of ISO 8601, and "Z" and fractions of any length, which are cut off.
_ISO_TIME = re.compile(
    r"\s*([0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ]([0-9]{2}:[0-9]{2}(?::[0-9]{2})?)(?:[.,][0-9]+)?)?"
    r"\s*(?:Z|([+-][0-9]{2}):?([0-9]{2})?)?\s*"
)


@dataclass(frozen=True)
class ReadReport:
    """What became of the rows of a file; ``examples`` names the first bad rows of each reason."""

    rows_read: int
    rows_kept: int
    dropped: dict[str, int]  # count by reason
    examples: list[str]

    def __str__(self) -> str:
        counts = ", ".join(f"{reason} {count}" for reason, count in self.dropped.items())
        text = f"{self.rows_kept} of {self.rows_read} rows kept; dropped: {counts or 'none'}"
        return f"{text}\n  e.g. {'; '.join(self.examples)}" if self.examples else text


@dataclass(frozen=True)
class ColumnMapping:
    """Which column of a file holds what.

    Args:
        user: column of the user id.
        item: column of the item id.
        time: column of Unix seconds or ISO 8601 text; a time without a zone is UTC.
        action: column of what the user did, such as "view".
        label: rule for the positive label, such as "rating>=4" or "event==buy"; its column may be
            any one of the file. None: every row is positive.
        item_attributes: columns of item attributes, each one or several ids.
        item_floats: columns of item numbers.
        user_attributes: columns of user attributes, each one or several ids.
        list_separator: splits an attribute's value into several ids.

    Raises:
        ConfigError: if the label rule cannot be read or the separator is empty.
    """

    user: str
    item: str
    time: str
    action: str | None = None
    label: str | None = None
    item_attributes: tuple[str, ...] = ()
    item_floats: tuple[str, ...] = ()
    user_attributes: tuple[str, ...] = ()
    list_separator: str = "|"

    def __post_init__(self) -> None:
        if not self.list_separator:
            raise ConfigError("list_separator is ''; allowed is any text of at least one character")
        if self.label is not None:
            _parse_label_rule(self.label)

    def names(self) -> list[str]:
        """Name the columns to read, each once."""
        single = [self.user, self.item, self.time]
        if self.action is not None:
            single.append(self.action)
        if self.label is not None:
            single.append(_parse_label_rule(self.label).column)
        several = (*self.item_attributes, *self.item_floats, *self.user_attributes)
        return list(dict.fromkeys((*single, *several)))


@dataclass(frozen=True, eq=False)
class InteractionLog:
    """Who did what to which item and when, as columns; the kept rows in the order of the file.

    Args:
        users: user of each row.
        items: item of each row.
        time: [T] int64, Unix seconds.
        label: [T] float32 in {0, 1}; 1 everywhere where no rule was given.
        action: what the user did, where the log says so.
        item_attributes: by name, then by item code: raw ids, empty where the log has none.
        item_floats: by name: [num_items] float32, 0 where the log has no number.
        user_attributes: by name, then by user code: raw ids, empty where the log has none.
        report: what became of the rows of the file.

    Raises:
        ShapeError: if the columns do not fit each other.
    """

    users: IdColumn
    items: IdColumn
    time: NDArray[np.int64]
    label: NDArray[np.float32]
    action: IdColumn | None
    item_attributes: dict[str, list[tuple[str, ...]]]
    item_floats: dict[str, NDArray[np.float32]]
    user_attributes: dict[str, list[tuple[str, ...]]]
    report: ReadReport

    def __post_init__(self) -> None:
        num_events = len(self.time)
        _check_length("users", self.users.codes, num_events)
        _check_length("items", self.items.codes, num_events)
        _check_length("label", self.label, num_events)
        if self.action is not None:
            _check_length("action", self.action.codes, num_events)
        for name, values in self.item_attributes.items():
            _check_length(name, values, len(self.items.ids))
        for name, floats in self.item_floats.items():
            _check_length(name, floats, len(self.items.ids))
        for name, values in self.user_attributes.items():
            _check_length(name, values, len(self.users.ids))


def read_interactions(path: Path, columns: ColumnMapping) -> InteractionLog:
    """Read a log of interactions.

    Blank lines of a text file hold no row. Bytes that are not UTF-8 become U+FFFD. Of an item's or
    user's attribute the first non-empty value in the file counts, of an item's float the median.

    Args:
        path: ``.csv`` or ``.tsv`` with a header, or ``.parquet``; each may end in ``.gz``.
        columns: which column holds what.

    Returns:
        The usable rows in the order of the file. Its ``report`` counts the others by reason: no
        user, no item, bad time, bad label, no action, wrong number of fields.

    Raises:
        DataError: if the file or a column is missing, or no row is left.
        MissingExtraError: for Parquet without pyarrow.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.csv"
        >>> _ = path.write_text("who,what,when\\nann,7,1700000000\\nbob,7.0,2023-11-14 23:00:00\\n")
        >>> log = read_interactions(path, ColumnMapping("who", "what", "when"))
        >>> log.users.ids, log.items, log.time.tolist()
        (['ann', 'bob'], IdColumn(codes=array([0, 0]), ids=['7']), [1700000000, 1700002800])
    """
    return build_log(read_table(path, columns.names(), columns.list_separator), columns)


def build_log(
    table: RawTable, columns: ColumnMapping, exclusions: Sequence[Exclusion] = ()
) -> InteractionLog:
    """Make the log of a table: drop what cannot be used, code the rest anew.

    Args:
        table: the rows.
        columns: which column holds what.
        exclusions: further reasons to drop a row; tested after "no user" and "no item".

    Returns:
        The log.

    Raises:
        DataError: if no row is left, or a float column holds no number.
    """
    rows = _RowFilter(table)
    rows.drop(Exclusion("no user", columns.user, _is_blank))
    rows.drop(Exclusion("no item", columns.item, _is_blank))
    for exclusion in exclusions:
        rows.drop(exclusion)
    time = rows.parsed("bad time", columns.time, _unix_seconds)
    label = np.ones(len(rows.keep))
    if columns.label is not None:
        rule = _parse_label_rule(columns.label)
        label = rows.parsed("bad label", rule.column, rule.label)
    if columns.action is not None:
        rows.drop(Exclusion("no action", columns.action, _is_blank))
    report = rows.report()
    if not report.rows_kept:
        raise DataError(f"no row of {table.source} can be used: {report}")
    return _assemble(rows, columns, time, label, report)


class _RowFilter:
    """Which rows of a table are kept, and why the others are not."""

    def __init__(self, table: RawTable) -> None:
        self.table = table
        self.keep = np.ones(len(table.places), np.bool_)
        self.dropped = {"wrong number of fields": table.num_misfits} if table.num_misfits else {}
        self.examples = list(table.misfits)

    def drop(self, exclusion: Exclusion) -> None:
        texts = self.table.columns[exclusion.column].ids
        bad = np.fromiter(map(exclusion.excludes, texts), np.bool_, len(texts))
        self._drop(exclusion.reason, exclusion.column, bad)

    def parsed(
        self, reason: str, name: str, parse: Callable[[str], float]
    ) -> NDArray[np.float64]:  # [rows]
        """The number of each row's text; rows where it is NaN are dropped."""
        column = self.table.columns[name]
        numbers = _numbers(column, parse)
        self._drop(reason, name, np.isnan(numbers))
        return numbers[column.codes]

    def report(self) -> ReadReport:
        rows_read = len(self.keep) + self.table.num_misfits
        return ReadReport(rows_read, int(self.keep.sum()), self.dropped, self.examples)

    def _drop(self, reason: str, name: str, bad_by_code: NDArray[np.bool_]) -> None:
        column = self.table.columns[name]
        rows = np.flatnonzero(self.keep & bad_by_code[column.codes])
        if not len(rows):
            return
        self.keep[rows] = False
        self.dropped[reason] = self.dropped.get(reason, 0) + len(rows)
        for row in rows[:EXAMPLES_PER_REASON]:
            place = f"{self.table.place_word} {self.table.places[row]}"
            text = column.ids[column.codes[row]][:EXAMPLE_CHARACTERS]
            self.examples.append(f"{self.table.source}, {place}: {reason}: {name} is {text!r}")


class _LabelRule(NamedTuple):
    column: str
    compare: Callable[[Any, Any], bool]
    right: float | str

    def label(self, text: str) -> float:
        """1 or 0; NaN where the text cannot be compared."""
        if isinstance(self.right, str):
            return math.nan if _is_blank(text) else self.compare(text.strip(), self.right)
        number = finite_number(text)
        return math.nan if math.isnan(number) else self.compare(number, self.right)


def _parse_label_rule(rule: str) -> _LabelRule:
    match = _LABEL_RULE.fullmatch(rule)
    if match is None:
        allowed = " ".join(COMPARISONS)
        raise ConfigError(f"label rule {rule!r}; allowed: COLUMN OPERATOR VALUE, with {allowed}")
    column, sign, text = match.groups()
    number = finite_number(text)
    if not math.isnan(number):
        return _LabelRule(column, COMPARISONS[sign], number)
    if sign not in ("==", "!="):
        raise ConfigError(f"label rule {rule!r} orders by text {text!r}; allowed with text: == !=")
    return _LabelRule(column, COMPARISONS[sign], text)


def _assemble(
    rows: _RowFilter,
    columns: ColumnMapping,
    time: NDArray[np.float64],
    label: NDArray[np.float64],
    report: ReadReport,
) -> InteractionLog:
    table = rows.table
    kept = {
        name: IdColumn(column.codes[rows.keep], column.ids)
        for name, column in table.columns.items()
    }
    users, items = _canonical(kept[columns.user]), _canonical(kept[columns.item])
    separator = columns.list_separator
    return InteractionLog(
        users=users,
        items=items,
        time=time[rows.keep].astype(np.int64),
        label=label[rows.keep].astype(np.float32),
        action=None if columns.action is None else _canonical(kept[columns.action]),
        item_attributes={
            name: _attribute(items, kept[name], separator) for name in columns.item_attributes
        },
        item_floats={
            name: _medians(items, kept[name], f"column {name!r} of {table.source}")
            for name in columns.item_floats
        },
        user_attributes={
            name: _attribute(users, kept[name], separator) for name in columns.user_attributes
        },
        report=report,
    )


def _canonical(column: IdColumn) -> IdColumn:
    """Canonical ids, only those that occur, by first appearance."""
    canonical = encode(map(canonical_id, column.ids))
    codes = canonical.codes[column.codes]  # [T]
    occurring, first_rows = np.unique(codes, return_index=True)
    occurring = occurring[np.argsort(first_rows)]
    code_by_old = np.zeros(len(canonical.ids), np.int64)
    code_by_old[occurring] = np.arange(len(occurring))
    return IdColumn(code_by_old[codes], [canonical.ids[old] for old in occurring])


def _attribute(owners: IdColumn, column: IdColumn, separator: str) -> list[tuple[str, ...]]:
    """By owner's code, the first value in file order that has an id."""
    value_by_code = [_split(text, separator) for text in column.ids]
    has_id = np.fromiter(map(bool, value_by_code), np.bool_, len(value_by_code))
    rows = np.flatnonzero(has_id[column.codes])
    owner_codes, first = np.unique(owners.codes[rows], return_index=True)
    values: list[tuple[str, ...]] = [()] * len(owners.ids)
    for owner, code in zip(owner_codes, column.codes[rows[first]], strict=True):
        values[owner] = value_by_code[code]
    return values


def _split(text: str, separator: str) -> tuple[str, ...]:
    return tuple(id_ for id_ in map(canonical_id, text.split(separator)) if id_)


def _medians(items: IdColumn, column: IdColumn, what: str) -> NDArray[np.float32]:
    """By item code, the median over the item's rows that have a number, else 0."""
    numbers = _numbers(column, _float32_number)[column.codes]  # [T]
    with_number = ~np.isnan(numbers)
    if not with_number.any():
        raise DataError(f"{what} holds no number; its first value is {column.ids[0]!r}")
    owners, numbers = items.codes[with_number], numbers[with_number]
    numbers = numbers[np.lexsort((numbers, owners))]
    counts = np.bincount(owners, minlength=len(items.ids))  # [num_items]
    starts = np.cumsum(counts) - counts
    # An item without a number points at row 0 and is overwritten below.
    low = np.where(counts > 0, starts + (counts - 1) // 2, 0)
    high = np.where(counts > 0, starts + counts // 2, 0)
    medians = np.where(counts > 0, (numbers[low] + numbers[high]) / 2, 0.0)
    return medians.astype(np.float32)


def _numbers(column: IdColumn, parse: Callable[[str], float]) -> NDArray[np.float64]:
    """By code, what ``parse`` makes of the text."""
    return np.fromiter(map(parse, column.ids), np.float64, len(column.ids))


def finite_number(text: str) -> float:
    """Read a finite number.

    Args:
        text: a number as it stands in a file.

    Returns:
        The number, NaN where there is none.

    Example:
        >>> finite_number(" 2.5"), finite_number("inf"), finite_number("two")
        (2.5, nan, nan)
    """
    try:
        number = float(text)
    except ValueError:
        return math.nan
    return number if math.isfinite(number) else math.nan


def _float32_number(text: str) -> float:
    """The number, NaN where float32 has none."""
    number = finite_number(text)
    return number if abs(number) <= float(np.finfo(np.float32).max) else math.nan


def _unix_seconds(text: str) -> float:
    """Whole seconds since 1970, NaN where the text is no time between 1970 and 2100."""
    seconds = finite_number(text)
    if math.isnan(seconds):
        seconds = _iso_seconds(text)
    return float(math.floor(seconds)) if 0 <= seconds <= LATEST_TIME else math.nan


def _iso_seconds(text: str) -> float:
    match = _ISO_TIME.fullmatch(text)
    if match is None:
        return math.nan
    date, clock, zone_hours, zone_minutes = match.groups()
    zone = f"{zone_hours}:{zone_minutes or '00'}" if zone_hours else "+00:00"
    try:
        return datetime.fromisoformat(f"{date}T{clock or '00:00'}{zone}").timestamp()
    except ValueError:
        return math.nan


def _is_blank(text: str) -> bool:
    return not text.strip()


def _check_length(name: str, column: Sequence[Any] | NDArray[Any], length: int) -> None:
    if len(column) != length:
        raise ShapeError(f"{name} holds {len(column)} values; allowed: {length}")
