"""Interaction logs: the columns of a table as users, items, times and labels.

Rows that cannot be used are counted by reason, and the first ones are named; none is dropped
silently. ``tables`` reads the files.
"""

import logging
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.data.chunks import EXAMPLE_CHARACTERS
from torchrec_kvshare.data.files import FileFormat
from torchrec_kvshare.data.sources import SourceFile
from torchrec_kvshare.data.tables import (
    EXAMPLES_PER_REASON,
    Exclusion,
    IdColumn,
    RawTable,
    ValueColumn,
    encode,
    read_table,
)
from torchrec_kvshare.data.times import TimeFormat, finite_number, iso_of, read_times
from torchrec_kvshare.errors import ConfigError, DataError, ShapeError
from torchrec_kvshare.features.ids import canonical_id, is_long_id
from torchrec_kvshare.features.limits import MAX_FLOAT
from torchrec_kvshare.features.schema import ACTION, UNNAMED_TASK, check_columns, check_tasks

COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
_LABEL_RULE = re.compile(r"\s*([^=<>!]+?)\s*(>=|<=|==|!=|>|<)\s*([^=<>!]+?)\s*")
MISSING_LABEL = 2  # of a task, as an integer beside labels 0 and 1
BAD_LABEL = "bad label"  # no rule can compare its value
VALUES_SHOWN = 5  # most frequent values of a label's column in a message
BAD_FLOATS = ("not a number", f"beyond {MAX_FLOAT:g}")  # reasons to leave a float out
# Ids that may mean a missing value in some logs.
DUBIOUS_IDS = ("NA", "N/A", "n/a", "none", "?", "-")

logger = logging.getLogger(__name__)


class LogSummary(NamedTuple):
    """Times, ties and positives of a whole log."""

    time_form: str  # how times are written
    first_time: int  # Unix seconds
    last_time: int
    tied_share: float  # of the events: at the time of another event of their user
    positive_shares: dict[str, float]  # by task, of the events that have a label: with label 1

    def __str__(self) -> str:
        positive = ", ".join(
            f"{share:.1%} positive" + (f" for {task}" if task else "")
            for task, share in self.positive_shares.items()
        )
        return (
            f"times ({self.time_form}) from {iso_of(self.first_time)} to {iso_of(self.last_time)}; "
            f"{self.tied_share:.1%} of the events at the time of another of their user; "
            f"{positive}"
        )


@dataclass(frozen=True)
class ReadReport:
    """Which rows of a file were kept, and why others were dropped.

    Attributes:
        rows_read: number of rows of the file.
        rows_kept: number of rows that can be used.
        dropped: number of other rows by reason.
        examples: the first bad rows of each reason, and the first bad floats.
        bad_floats: number of unusable values in float columns of kept rows, by column and reason.
        missing_labels: number of kept rows without a label for a task, by task.
        summary: of the kept rows.
        notes: ids that may mean a missing value.
    """

    rows_read: int
    rows_kept: int
    dropped: dict[str, int]
    examples: list[str]
    bad_floats: dict[str, int] = field(default_factory=dict)
    missing_labels: dict[str, int] = field(default_factory=dict)
    summary: LogSummary | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.rows_kept} of {self.rows_read} rows kept; dropped: {_counts(self.dropped)}"
        ]
        if self.summary is not None:
            lines.append(str(self.summary))
        if self.bad_floats:
            lines.append(f"floats left out: {_counts(self.bad_floats)}")
        if self.missing_labels:
            lines.append(f"rows without a label: {_counts(self.missing_labels)}")
        lines += self.notes
        if self.examples:
            lines.append(f"e.g. {'; '.join(self.examples)}")
        return "\n  ".join(lines)


@dataclass(frozen=True)
class ColumnMapping:
    """The columns of a file by their role.

    Args:
        user: column of the user id.
        item: column of the item id.
        time: column of the time.
        action: column of what the user did, such as "view"; requests call it ``action``.
        event_attributes: columns with one id per row, of the event: the surface, the device.
        label: rule for the positive label, such as "rating>=4" or "event==buy", on any column of
            the file; or rules by task. None: every row is positive.
        item_attributes: columns of item attributes, each with one or several ids.
        item_floats: columns of item numbers.
        user_floats: columns of user numbers.
        request_floats: columns of numbers of the moment of a row.
        event_floats: columns of numbers of the event: the price paid, the time spent.
        user_attributes: columns of user attributes, each with one or several ids.
        request_attributes: columns of what was so at the moment of a row, such as the device, each
            with one or several ids.
        list_separator: separates the ids of an attribute.
        time_format: how times are written; a time without a zone is UTC.

    Raises:
        ConfigError: if a label rule cannot be parsed, the separator is empty, or names of
            attributes clash in requests, or those of tasks.
    """

    user: str
    item: str
    time: str
    action: str | None = None
    event_attributes: tuple[str, ...] = ()
    label: str | Mapping[str, str] | None = None
    item_attributes: tuple[str, ...] = ()
    item_floats: tuple[str, ...] = ()
    user_attributes: tuple[str, ...] = ()
    request_attributes: tuple[str, ...] = ()
    user_floats: tuple[str, ...] = ()
    request_floats: tuple[str, ...] = ()
    event_floats: tuple[str, ...] = ()
    list_separator: str = "|"
    time_format: TimeFormat = field(default_factory=TimeFormat)

    def __post_init__(self) -> None:
        attributes = (*self.user_attributes, *self.request_attributes)
        context = (*attributes, *self.user_floats, *self.request_floats)
        check_columns(
            self.item_attributes,
            self.item_floats,
            context,
            self.event_attributes,
            self.event_floats,
        )
        if ACTION in self.event_attributes:
            raise ConfigError(
                f"event_attributes are {list(self.event_attributes)}; {ACTION!r} is not among "
                "them: columns.action names the column of what the user did"
            )
        if not self.list_separator:
            raise ConfigError("list_separator is ''; allowed is any text of at least one character")
        for task, rule in self.rule_by_task.items():
            label_rule(rule, task)

    @property
    def rule_by_task(self) -> dict[str, str]:
        """The label rules by task; none if every row is positive."""
        if isinstance(self.label, Mapping):
            check_tasks([*self.label])
            return dict(self.label)
        return {} if self.label is None else {UNNAMED_TASK: self.label}

    @property
    def tasks(self) -> tuple[str, ...]:
        """What each row has a label for; the first task ranks."""
        return tuple(self.rule_by_task) or (UNNAMED_TASK,)

    @property
    def attributes(self) -> tuple[str, ...]:
        """Columns of attributes of items, users and requests."""
        return (*self.item_attributes, *self.user_attributes, *self.request_attributes)

    @property
    def floats(self) -> tuple[str, ...]:
        """Columns of numbers of items, users, requests and events, without duplicates."""
        of_rows = (*self.request_floats, *self.event_floats)
        return tuple(dict.fromkeys((*self.item_floats, *self.user_floats, *of_rows)))

    @property
    def event_ids(self) -> dict[str, str]:
        """The columns with one id per event, by their names in requests."""
        action = {} if self.action is None else {ACTION: self.action}
        return action | {name: name for name in self.event_attributes}

    def exclusions_before_time(self, others: Sequence[Exclusion] = ()) -> list[Exclusion]:
        """Return the reasons to drop a row that are tested before its time.

        Args:
            others: further reasons, tested after "no user" and "no item".
        """
        ids = (self.user, self.item, *self.event_ids.values())
        has_long_id = partial(_has_long_id, separator=self.list_separator)
        return [
            Exclusion("no user", self.user, is_blank),
            Exclusion("no item", self.item, is_blank),
            *others,
            *(Exclusion("id too long", column, is_long_id) for column in ids),
            *(Exclusion("id too long", column, has_long_id) for column in self.attributes),
        ]

    def exclusions_after_time(self) -> list[Exclusion]:
        """Return the reasons to drop a row that are tested between its time and its labels."""
        return [] if self.action is None else [Exclusion("no action", self.action, is_blank)]

    def names(self) -> list[str]:
        """Return the columns to read, without duplicates."""
        single = [self.user, self.item, self.time, *self.event_ids.values()]
        single += [label_rule(rule).column for rule in self.rule_by_task.values()]
        return list(dict.fromkeys((*single, *self.attributes, *self.floats)))


@dataclass(frozen=True, eq=False)
class InteractionLog:
    """The kept rows of a log as columns, in the order of the file.

    Args:
        users: user of each row.
        items: item of each row.
        time: [T] int64, Unix seconds.
        labels: by task: [T] float32 in {0, 1}, or NaN for a task of several that a row has no label
            for; all 1 without a label rule.
        event_attributes: by name in requests, ``action`` among them: id of each row, empty where
            the log has none.
        item_attributes: by name, then by item code: raw ids, empty where the log has none.
        item_floats: by name: [num_items] float32, 0 where the log has no number.
        user_attributes: by name, then by user code: raw ids, empty where the log has none.
        report: which rows of the file were kept and dropped.
        request_attributes: by name, raw ids of each row.
        user_floats: by name: [num_users] float32, 0 where the log has no number.
        request_floats: by name: [T] float32, likewise.
        event_floats: by name: [T] float32, likewise.

    Raises:
        ShapeError: if lengths of columns differ.
    """

    users: IdColumn
    items: IdColumn
    time: NDArray[np.int64]
    labels: dict[str, NDArray[np.float32]]
    event_attributes: dict[str, IdColumn]
    item_attributes: dict[str, list[tuple[str, ...]]]
    item_floats: dict[str, NDArray[np.float32]]
    user_attributes: dict[str, list[tuple[str, ...]]]
    report: ReadReport
    request_attributes: dict[str, ValueColumn] = field(default_factory=dict)
    user_floats: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    request_floats: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    event_floats: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_events = len(self.time)
        for name, column in self.request_attributes.items():
            _check_length(name, column.codes, num_events)
        _check_length("users", self.users.codes, num_events)
        _check_length("items", self.items.codes, num_events)
        for task, labels in self.labels.items():
            _check_length(f"label {task}".strip(), labels, num_events)
        for name, ids in self.event_attributes.items():
            _check_length(name, ids.codes, num_events)
        for name, values in self.item_attributes.items():
            _check_length(name, values, len(self.items.ids))
        for name, floats in self.item_floats.items():
            _check_length(name, floats, len(self.items.ids))
        for name, values in self.user_attributes.items():
            _check_length(name, values, len(self.users.ids))
        for name, floats in self.user_floats.items():
            _check_length(name, floats, len(self.users.ids))
        for name, floats in (*self.request_floats.items(), *self.event_floats.items()):
            _check_length(name, floats, num_events)


def read_interactions(
    files: Path | Sequence[SourceFile],
    columns: ColumnMapping,
    file_format: FileFormat | None = None,
) -> InteractionLog:
    """Read a log of interactions.

    Blank lines of a text file are skipped. An attribute of an item or user is the value that most
    of its rows have, a float the median.

    Args:
        files: ``.csv``, ``.tsv``, ``.parquet``, ``.jsonl`` or ``.ndjson``, optionally followed by
            ``.gz``; one file, or several as one log.
        columns: the columns by their role.
        file_format: how the files are written; None: the default of their ending.

    Returns:
        The usable rows in the order of the files. Its ``report`` counts the others by reason: no
        user, no item, id too long, bad time, bad label, no action, wrong number of fields.

    Raises:
        DataError: if the file or a column is missing or not as described, or no row is left.
        MissingExtraError: for Parquet without pyarrow.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "log.csv"
        >>> _ = path.write_text("who,what,when\\nann,7,1700000000\\nbob,7.0,2023-11-14 23:00:00\\n")
        >>> log = read_interactions(path, ColumnMapping("who", "what", "when"))
        >>> log.users.ids, log.items, log.time.tolist()
        (['ann', 'bob'], IdColumn(codes=array([0, 0]), ids=['7']), [1700000000, 1700002800])
    """
    table = read_table(
        files,
        columns.names(),
        file_format,
        list_separator=columns.list_separator,
        lists=columns.attributes,
    )
    return build_log(table, columns)


def build_log(
    table: RawTable, columns: ColumnMapping, exclusions: Sequence[Exclusion] = ()
) -> InteractionLog:
    """Build the log of a table: drop unusable rows and recode the others.

    Args:
        table: the rows.
        columns: the columns by their role.
        exclusions: further reasons to drop a row, tested after "no user" and "no item".

    Returns:
        The log.

    Raises:
        DataError: if no row is left, the times cannot be parsed, a label rule makes no row
            positive or a float column holds no number.
    """
    rows = _RowFilter(table)
    for exclusion in columns.exclusions_before_time(exclusions):
        rows.drop(exclusion)
    time, time_form = _times(rows, columns)
    for exclusion in columns.exclusions_after_time():
        rows.drop(exclusion)
    labels = {task: _labels(rows, task, rule) for task, rule in columns.rule_by_task.items()}
    if labels:
        name = next(iter(map(label_rule, columns.rule_by_task.values()))).column
        has_none = np.isnan(np.stack([*labels.values()])).all(axis=0)
        rows.drop_rows(BAD_LABEL, name, np.asarray(has_none))
    check_kept(rows.report(), table.source)
    if not labels:
        labels = {UNNAMED_TASK: np.ones(len(rows.keep))}
    return _assemble(rows, columns, time, labels, time_form=time_form)


class _RowFilter:
    """Tracks which rows of a table are kept, and why others are dropped."""

    def __init__(self, table: RawTable) -> None:
        self.table = table
        self.keep = np.ones(len(table.positions), np.bool_)
        self.dropped = {"wrong number of fields": table.num_misfits} if table.num_misfits else {}
        self.bad_floats: dict[str, int] = {}
        self.examples = list(table.misfits)

    def drop(self, exclusion: Exclusion) -> None:
        texts = self.table.columns[exclusion.column].ids
        bad = np.fromiter(map(exclusion.excludes, texts), np.bool_, len(texts))
        self.drop_where(exclusion.reason, exclusion.column, bad)

    def drop_where(self, reason: str, name: str, bad_by_code: NDArray[np.bool_]) -> None:
        self.drop_rows(reason, name, bad_by_code[self.table.columns[name].codes])

    def drop_rows(self, reason: str, name: str, is_bad: NDArray[np.bool_]) -> None:
        """Drop rows [rows of the table]; examples name them with their value of a column."""
        rows = np.flatnonzero(self.keep & is_bad)
        if len(rows):
            self.keep[rows] = False
            self.dropped[reason] = self.dropped.get(reason, 0) + len(rows)
            self._name_first(rows, reason, name)

    def floats(self, name: str) -> NDArray[np.float64]:  # [kept rows]
        """Return the numbers of a column, NaN where missing, and count the unusable values."""
        column = self.table.columns[name]
        reasons = np.array([bad_float(text) for text in column.ids], object)
        for reason in BAD_FLOATS:
            rows = self._rows_of(name, reasons == reason)
            if len(rows):
                self.bad_floats[f"{name}: {reason}"] = len(rows)
                self._name_first(rows, reason, name)
        numbers = _numbers(column, finite_number)
        numbers[reasons != ""] = math.nan
        return numbers[column.codes[self.keep]]

    def report(self) -> ReadReport:
        rows_read = len(self.keep) + self.table.num_misfits
        num_kept = int(self.keep.sum())
        return ReadReport(
            rows_read=rows_read,
            rows_kept=num_kept,
            dropped=self.dropped,
            examples=self.examples,
            bad_floats=self.bad_floats,
        )

    def _rows_of(self, name: str, is_wanted_by_code: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Return the kept rows that have some of a column's values."""
        return np.flatnonzero(self.keep & is_wanted_by_code[self.table.columns[name].codes])

    def _name_first(self, rows: NDArray[np.int64], reason: str, name: str) -> None:
        column = self.table.columns[name]
        for row in rows[:EXAMPLES_PER_REASON]:
            text = column.ids[column.codes[row]]
            self.examples.append(example_of(self.table.where(int(row)), reason, name, text))


def _times(rows: _RowFilter, columns: ColumnMapping) -> tuple[NDArray[np.float64], str]:
    """Return Unix seconds by row, and the format, which the kept rows decide."""
    column = rows.table.columns[columns.time]
    is_used = np.zeros(len(column.ids), np.bool_)
    is_used[column.codes[rows.keep]] = True
    texts = list(compress(column.ids, is_used))
    what = f"column {columns.time!r} of {rows.table.source}"
    times = read_times(texts, columns.time_format, what)
    seconds = np.full(len(column.ids), math.nan)  # [codes]
    seconds[is_used] = times.seconds
    rows.drop_where("bad time", columns.time, np.isnan(seconds))
    return seconds[column.codes], times.form


def _labels(rows: _RowFilter, task: str, rule_text: str) -> NDArray[np.float64]:
    """Return 1 or 0 by row, NaN where the rule cannot compare the value."""
    rule = label_rule(rule_text, task)
    column = rows.table.columns[rule.column]
    label_by_code = _numbers(column, rule.label)
    counts = np.bincount(column.codes[rows.keep], minlength=len(column.ids))
    frequent = np.argsort(-counts, kind="stable")[:VALUES_SHOWN].tolist()
    check_labels(
        task,
        rule_text,
        rows.table.source,
        num_positive=int(counts[label_by_code == 1].sum()),
        num_negative=int(counts[label_by_code == 0].sum()),
        frequent=[(column.ids[code], int(counts[code])) for code in frequent if counts[code]],
    )
    return label_by_code[column.codes]


def check_labels(
    task: str,
    rule: str,
    source: str,
    *,
    num_positive: int,
    num_negative: int,
    frequent: Sequence[tuple[str, int]],
) -> None:
    """Refuse a label rule that makes no row positive; warn of one that makes every row positive.

    Args:
        task: its task.
        rule: the rule.
        source: the log, for messages.
        num_positive: rows with label 1.
        num_negative: rows with label 0.
        frequent: most frequent values of the rule's column, with their numbers of rows; none if
            there is no row.

    Raises:
        DataError: if there are rows and none is positive.
    """
    if frequent and not num_positive:
        shown = ", ".join(
            f"{text[:EXAMPLE_CHARACTERS]!r} ({count} rows)" for text, count in frequent
        )
        raise DataError(
            f"{_described(rule, task)} makes no row of {source} positive; the most frequent values "
            f"of column {label_rule(rule).column!r}: {shown}"
        )
    if num_positive and not num_negative:
        logger.warning("%s makes every row of %s positive", _described(rule, task), source)


def check_kept(report: ReadReport, source: str) -> None:
    """Refuse a log without a usable row."""
    if not report.rows_kept:
        raise DataError(f"no row of {source} can be used: {report}")


def check_float(name: str, source: str, num_numbers: int, first: str) -> None:
    """Refuse a float column that holds no number; ``first`` is its first value."""
    if not num_numbers:
        raise DataError(
            f"column {name!r} of {source} holds no number; its first value is {first!r}"
        )


def example_of(where: str, reason: str, column: str, text: str) -> str:
    """Return a bad row in words: its file and position, what is wrong, and the value."""
    return f"{where}: {reason}: {column} is {text[:EXAMPLE_CHARACTERS]!r}"


def bad_float(text: str) -> str:
    """Return why a value of a float column is left out; "" for a number and for no value."""
    number = finite_number(text)
    if math.isnan(number):
        return "" if is_blank(text) else BAD_FLOATS[0]
    return BAD_FLOATS[1] if abs(number) > MAX_FLOAT else ""


def dubious_note(role: str, id_: str, num_rows: int) -> str:
    """Say that an id may mean a missing value."""
    return (
        f"{role} {id_!r} of {num_rows} rows is taken as an id; "
        "list it in data.format.missing if it means no value"
    )


class LabelRule(NamedTuple):
    """A rule for the positive label: a column, a comparison and its right side."""

    column: str
    compare: Callable[[Any, Any], bool]
    right: float | str

    def label(self, text: str) -> float:
        """Return 1 or 0; NaN if the text cannot be compared."""
        if isinstance(self.right, str):
            return math.nan if is_blank(text) else self.compare(canonical_id(text), self.right)
        number = finite_number(text)
        return math.nan if math.isnan(number) else self.compare(number, self.right)


def label_rule(rule: str, task: str = UNNAMED_TASK) -> LabelRule:
    """Parse a rule such as ``rating>=4``; an error names its task."""
    match = _LABEL_RULE.fullmatch(rule) if isinstance(rule, str) else None
    if match is None:
        allowed = f"COLUMN OPERATOR VALUE, with {' '.join(COMPARISONS)}"
        if not task:
            allowed += ', or rules by task, such as {like: "rating>=4", love: "rating>=5"}'
        raise ConfigError(f"{_described(rule, task)}; allowed: {allowed}")
    column, sign, text = match.groups()
    number = finite_number(text)
    if not math.isnan(number):
        return LabelRule(column, COMPARISONS[sign], number)
    if sign not in ("==", "!="):
        raise ConfigError(
            f"{_described(rule, task)} orders by text {text!r}; allowed with text: == !="
        )
    return LabelRule(column, COMPARISONS[sign], canonical_id(text))


def _described(rule: Any, task: str) -> str:
    """Return a label rule in words."""
    return f"label rule {rule!r}" + (f" of task {task!r}" if task else "")


def _assemble(
    rows: _RowFilter,
    columns: ColumnMapping,
    time_by_row: NDArray[np.float64],
    labels_by_row: dict[str, NDArray[np.float64]],
    time_form: str,
) -> InteractionLog:
    table, separator = rows.table, columns.list_separator
    kept = {
        name: IdColumn(column.codes[rows.keep], column.ids)
        for name, column in table.columns.items()
    }
    users, items = _canonical(kept[columns.user]), _canonical(kept[columns.item])
    time = time_by_row[rows.keep].astype(np.int64)
    labels = {task: one[rows.keep].astype(np.float32) for task, one in labels_by_row.items()}
    numbers_by_name = {}
    for name in columns.floats:
        numbers_by_name[name] = numbers = rows.floats(name)
        num_numbers = int((~np.isnan(numbers)).sum())
        check_float(name, table.source, num_numbers, first=table.columns[name].ids[0])
    order = np.lexsort((time, users.codes))
    summary = LogSummary(
        time_form=time_form,
        first_time=int(time.min()),
        last_time=int(time.max()),
        tied_share=num_tied(users.codes[order], time[order]) / len(time),
        positive_shares={
            task: positive_share(int((one == 1).sum()), int((one == 0).sum()))
            for task, one in labels.items()
        },
    )
    num_missing = {task: int(np.isnan(one).sum()) for task, one in labels.items()}
    notes = (*_notes("user", users), *_notes("item", items))
    return InteractionLog(
        users=users,
        items=items,
        time=time,
        labels=labels,
        event_attributes={
            name: _canonical(kept[column]) for name, column in columns.event_ids.items()
        },
        item_attributes={
            name: _attribute(items, kept[name], separator) for name in columns.item_attributes
        },
        item_floats={name: _medians(items, numbers_by_name[name]) for name in columns.item_floats},
        user_attributes={
            name: _attribute(users, kept[name], separator) for name in columns.user_attributes
        },
        report=replace(
            rows.report(),
            missing_labels={task: count for task, count in num_missing.items() if count},
            summary=summary,
            notes=notes,
        ),
        request_attributes={
            name: _values(kept[name], separator) for name in columns.request_attributes
        },
        user_floats={name: _medians(users, numbers_by_name[name]) for name in columns.user_floats},
        request_floats={name: _of_rows(numbers_by_name[name]) for name in columns.request_floats},
        event_floats={name: _of_rows(numbers_by_name[name]) for name in columns.event_floats},
    )


def codes_of_labels(labels: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return labels as integers, as digests and files have them.

    Example:
        >>> codes_of_labels(np.array([1, np.nan, 0], np.float32)).tolist()
        [1, 2, 0]
    """
    return np.where(np.isnan(labels), MISSING_LABEL, labels).astype(np.uint8)


def labels_of_codes(codes: NDArray[Any]) -> NDArray[np.float32]:
    """Return the labels of ``codes_of_labels``."""
    return np.where(codes == MISSING_LABEL, np.nan, codes).astype(np.float32)


def positive_share(num_positive: int, num_negative: int) -> float:
    """Return the share of labels that are 1; 0 if there are none."""
    return num_positive / max(1, num_positive + num_negative)


def num_tied(users: NDArray[np.int64], time: NDArray[np.int64]) -> int:
    """Return the number of events at the time of another event of their user.

    Args:
        users: [T] ascending.
        time: [T] ascending within a user.

    Example:
        >>> num_tied(np.array([0, 0, 0, 1]), np.array([5, 5, 7, 7]))
        2
    """
    is_as_before = (np.diff(users) == 0) & (np.diff(time) == 0)
    is_tied = np.zeros(len(time), np.bool_)
    is_tied[1:] |= is_as_before
    is_tied[:-1] |= is_as_before
    return int(is_tied.sum())


def _notes(role: str, column: IdColumn) -> list[str]:
    """Name the ids that may mean a missing value."""
    return [
        dubious_note(role, id_, int((column.codes == code).sum()))
        for code, id_ in enumerate(column.ids)
        if id_ in DUBIOUS_IDS
    ]


def _canonical(column: IdColumn) -> IdColumn:
    """Recode a column by canonical ids, only those that occur, by first appearance."""
    canonical = encode(map(canonical_id, column.ids))
    codes = canonical.codes[column.codes]  # [T]
    occurring, first_rows = np.unique(codes, return_index=True)
    occurring = occurring[np.argsort(first_rows)]
    code_by_old = np.zeros(len(canonical.ids), np.int64)
    code_by_old[occurring] = np.arange(len(occurring))
    return IdColumn(code_by_old[codes], [canonical.ids[old] for old in occurring])


def _attribute(owners: IdColumn, column: IdColumn, separator: str) -> list[tuple[str, ...]]:
    """Return by owner code the value that most of its rows have, ties going to the first in order.

    Rows without an id do not count, and the order of rows does not matter.
    """
    rank, values = _values(column, separator)
    pairs = (owners.codes * len(values) + rank)[rank > 0]  # Rank 0 is the empty value.
    distinct, counts = np.unique(pairs, return_counts=True)
    owner, rank = np.divmod(distinct, len(values))
    order = np.lexsort((rank, -counts, owner))
    _, firsts = np.unique(owner[order], return_index=True)
    chosen: list[tuple[str, ...]] = [()] * len(owners.ids)
    for best in order[firsts]:
        chosen[owner[best]] = values[rank[best]]
    return chosen


def _values(column: IdColumn, separator: str) -> ValueColumn:
    """Return a column of texts as values, in order; the first is empty."""
    value_by_code = [attribute_ids(text, separator) for text in column.ids]
    values = sorted({(), *value_by_code})
    rank_by_value = {value: rank for rank, value in enumerate(values)}
    rank_by_code = np.array([rank_by_value[value] for value in value_by_code], np.int64)
    return ValueColumn(rank_by_code[column.codes], values)


def attribute_ids(text: str, separator: str) -> tuple[str, ...]:
    """Return the canonical ids that a text of an attribute's column holds."""
    return tuple(id_ for id_ in map(canonical_id, text.split(separator)) if id_)


def _has_long_id(text: str, separator: str) -> bool:
    return any(map(is_long_id, text.split(separator)))


def _of_rows(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the number of each row, else 0; a negative zero, which orders as 0, is 0."""
    return np.where(np.isnan(numbers), 0, numbers).astype(np.float32) + np.float32(0)


def _medians(owned: IdColumn, numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return by owner code the median over the owner's rows that have a number, else 0."""
    with_number = ~np.isnan(numbers)
    owners, numbers = owned.codes[with_number], numbers[with_number]
    numbers = numbers[np.lexsort((numbers, owners))]
    counts = np.bincount(owners, minlength=len(owned.ids))  # [owners]
    starts = np.cumsum(counts) - counts
    # An owner without a number reads row 0 here and gets 0 below.
    low = np.where(counts > 0, starts + (counts - 1) // 2, 0)
    high = np.where(counts > 0, starts + counts // 2, 0)
    medians = np.where(counts > 0, (numbers[low] + numbers[high]) / 2, 0.0)
    return medians.astype(np.float32)


def _numbers(column: IdColumn, parse: Callable[[str], float]) -> NDArray[np.float64]:
    """Return ``parse`` of the text of each code."""
    return np.fromiter(map(parse, column.ids), np.float64, len(column.ids))


def _counts(count_by_reason: dict[str, int]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in count_by_reason.items()) or "none"


def is_blank(text: str) -> bool:
    """Return whether a text holds no value."""
    return not text.strip()


def _check_length(name: str, column: Sequence[Any] | NDArray[Any], length: int) -> None:
    if len(column) != length:
        raise ShapeError(f"{name} holds {len(column)} values; allowed: {length}")
