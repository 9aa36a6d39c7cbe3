"""Text and Parquet files in, dictionary-coded columns out.

Every column is coded while it is read (a code per row, each distinct text once), and everything
after that, such as parsing a time or testing a rule, happens once per distinct text. That keeps
half a million rows at seconds and tens of millions in memory.
"""

import csv
import gzip
import importlib
import math
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.errors import DataError, MissingExtraError

CHUNK_ROWS = 65_536  # rows held as Python lists at once, some 30 MB of a wide file
EXAMPLES_PER_REASON = 2
EXAMPLE_CHARACTERS = 80
DELIMITERS = {".csv": ",", ".tsv": "\t"}
_INTEGRAL_FLOAT = re.compile(r"(0|-?[1-9][0-9]*)\.0")
_END_OF_FILE = "the file ended outside quotes"


class IdColumn(NamedTuple):
    """A dictionary-coded column: row t holds ``ids[codes[t]]``; ids stand by first appearance."""

    codes: NDArray[np.int64]  # [T]
    ids: list[str]


class Exclusion(NamedTuple):
    """A reason to drop a row, decided by the text in one of its columns."""

    reason: str
    column: str
    excludes: Callable[[str], bool]


@dataclass(frozen=True, eq=False)
class RawTable:
    """The wanted columns of a file, coded, their texts as they stand in the file.

    Args:
        source: the file, as messages name it.
        columns: coded column by name, all of the same number of rows.
        places: [rows] int64, the line (of text files) or row (of Parquet) each row begins at.
        place_word: "line" or "row".
        num_misfits: rows left out because of their number of fields.
        misfits: the first of those, named.
    """

    source: str
    columns: dict[str, IdColumn]
    places: NDArray[np.int64]
    place_word: str = "line"
    num_misfits: int = 0
    misfits: tuple[str, ...] = ()

    def joined(self, key: str, side: "RawTable", names: Sequence[str]) -> "RawTable":
        """Add columns of another table, found by the id in column ``key``, which both have.

        Args:
            key: the id's column; where ``side`` has an id twice, its first row counts.
            side: the table to look up in; "" stands where it lacks an id.
            names: the columns to add.

        Returns:
            This table with those columns.

        Raises:
            DataError: if a row of ``side`` has the wrong number of fields.
        """
        if side.num_misfits:
            raise DataError(f"{side.num_misfits} unreadable rows: {'; '.join(side.misfits)}")
        side_ids = [canonical_id(text) for text in _texts(side.columns[key])]
        row_by_id = {id_: row for row, id_ in reversed(list(enumerate(side_ids)))}
        own = self.columns[key]
        rows = [row_by_id.get(canonical_id(text)) for text in own.ids]
        added = {}
        for name in names:
            texts = _texts(side.columns[name])
            found = encode("" if row is None else texts[row] for row in rows)
            added[name] = IdColumn(found.codes[own.codes], found.ids)
        return replace(self, columns=self.columns | added)

    def renamed(self, new_by_old: Mapping[str, str]) -> "RawTable":
        """Give columns other names.

        Args:
            new_by_old: by the present name, the new one.

        Returns:
            This table, its other columns as they were.
        """
        columns = {new_by_old.get(name, name): column for name, column in self.columns.items()}
        return replace(self, columns=columns)


def canonical_id(text: str) -> str:
    """Spell an id the one way it is compared: no space around it, no ".0" after an integer.

    Args:
        text: an id as it stands in a file.

    Returns:
        The id; "007" and "85123A" are not integers' spellings and stay.

    Example:
        >>> [canonical_id(text) for text in ("17850.0", " 85123A", "007", "3.5")]
        ['17850', '85123A', '007', '3.5']
    """
    text = text.strip()
    return text[:-2] if _INTEGRAL_FLOAT.fullmatch(text) else text


def encode(texts: Iterable[str]) -> IdColumn:
    """Dictionary-code texts in order of first appearance.

    Args:
        texts: T of them, taken as they are.

    Returns:
        The coded column.

    Example:
        >>> encode(["b", "a", "b"])
        IdColumn(codes=array([0, 1, 0]), ids=['b', 'a'])
    """
    coder = _Coder()
    coder.add(list(texts))
    return coder.column()


def read_table(path: Path, names: Sequence[str], list_separator: str = "|") -> RawTable:
    """Read columns of a file, chosen by its ending.

    Args:
        path: ``.csv``, ``.tsv`` or ``.parquet``; each may end in ``.gz``.
        names: the columns wanted.
        list_separator: joins the values of Parquet's list columns.

    Returns:
        The columns.

    Raises:
        DataError: if the file or a column is missing, or the file cannot be read.
        MissingExtraError: for Parquet without pyarrow.
    """
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    if ending == ".parquet":
        return _read_parquet(path, names, list_separator)
    if ending not in DELIMITERS:
        raise DataError(
            f"{path} ends in {ending!r}; allowed: .csv, .tsv, .parquet, with .gz or not"
        )
    with open_text(path, "utf-8-sig") as lines:
        numbered_rows = _csv_rows(path, lines, DELIMITERS[ending])
        _, header = next(numbered_rows, (0, []))
        return code_rows(path, header, numbered_rows, names)


@contextmanager
def open_text(path: Path, encoding: str) -> Iterator[TextIO]:
    """Open a text file, gzipped or not; a file that cannot be read is a ``DataError``.

    Args:
        path: the file.
        encoding: its encoding; bytes outside it become U+FFFD.

    Returns:
        The open file, its line ends untouched.

    Raises:
        DataError: if it is missing or broken, also while it is read.
    """
    opener: Callable[..., TextIO] = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        with opener(path, "rt", encoding=encoding, errors="replace", newline="") as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def code_rows(
    path: Path,
    header: Sequence[str],
    numbered_rows: Iterator[tuple[int, list[str]]],
    names: Sequence[str],
) -> RawTable:
    """Code columns of rows while they stream by.

    Args:
        path: the file, for messages.
        header: the columns it has.
        numbered_rows: line number and fields of each row.
        names: the columns wanted.

    Returns:
        The columns; rows of another number of fields than the header are counted apart.

    Raises:
        DataError: if a wanted column is not there exactly once.
    """
    _check_columns(path, header, names)
    position_by_name = {name: header.index(name) for name in names}
    coder_by_name = {name: _Coder() for name in names}
    places = [np.zeros(0, np.int64)]
    misfits: list[str] = []
    num_misfits = 0
    while chunk := list(islice(numbered_rows, CHUNK_ROWS)):
        fitting = [row for _, row in chunk if len(row) == len(header)]
        lines = [line for line, row in chunk if len(row) == len(header)]
        places.append(np.array(lines, np.int64))
        for name, position in position_by_name.items():
            coder_by_name[name].add([row[position] for row in fitting])
        if len(fitting) < len(chunk):
            num_misfits += len(chunk) - len(fitting)
            misfits += [_misfit(path, *pair) for pair in chunk if len(pair[1]) != len(header)]
            del misfits[EXAMPLES_PER_REASON:]
    columns = {name: coder.column() for name, coder in coder_by_name.items()}
    return RawTable(str(path), columns, np.concatenate(places), "line", num_misfits, tuple(misfits))


class _Coder:
    """Codes one column, chunk by chunk."""

    def __init__(self) -> None:
        self.code_by_text: dict[Any, int] = {}
        self.chunks: list[NDArray[np.int64]] = []

    def add(self, texts: Sequence[Any]) -> None:
        for text in dict.fromkeys(texts):
            self.code_by_text.setdefault(text, len(self.code_by_text))
        codes = map(self.code_by_text.__getitem__, texts)
        self.chunks.append(np.fromiter(codes, np.int64, len(texts)))

    def column(self) -> IdColumn:
        codes = np.concatenate(self.chunks) if self.chunks else np.zeros(0, np.int64)
        return IdColumn(codes, list(self.code_by_text))


def _texts(column: IdColumn) -> list[str]:
    return [column.ids[code] for code in column.codes]


def _csv_rows(path: Path, lines: TextIO, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The line each row begins at, and its fields."""
    # The line after the last one tells an open quote: it would be swallowed as a field's text.
    reader = csv.reader(chain(lines, [_END_OF_FILE]), delimiter=delimiter)
    ends, row = [0, 0], [_END_OF_FILE]  # of the row before, and of this one
    try:
        for row in reader:
            ends = [ends[1], reader.line_num]
            if row and row != [_END_OF_FILE]:
                yield ends[0] + 1, row
    except csv.Error as error:
        raise DataError(f"{path}, line {ends[1] + 1}: {error}") from error
    if row != [_END_OF_FILE]:
        raise DataError(f"{path}, line {ends[0] + 1}: a quote opens that is never closed")


def _misfit(path: Path, line: int, row: list[str]) -> str:
    text = ",".join(row)[:EXAMPLE_CHARACTERS]
    return f"{path}, line {line}: wrong number of fields: {len(row)} in {text!r}"


def _check_columns(path: Path, header: Sequence[str], names: Sequence[str]) -> None:
    for name in names:
        if header.count(name) != 1:
            came = "not" if name not in header else f"{header.count(name)} times"
            has = ", ".join(header) or "no column"
            raise DataError(f"column {name!r} is {came} in {path}; it has: {has}")


def _read_parquet(path: Path, names: Sequence[str], separator: str) -> RawTable:
    try:
        pyarrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError("parquet", "reading Parquet") from error
    try:
        source = gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else None
        opened = path if source is None else pyarrow.BufferReader(source)
        with parquet.ParquetFile(opened) as file:
            _check_columns(path, file.schema_arrow.names, names)
            arrow_table = file.read(columns=list(dict.fromkeys(names)))
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    columns = {
        name: _arrow_column(arrow_table.column(name), f"column {name!r} of {path}", separator)
        for name in names
    }
    return RawTable(str(path), columns, np.arange(1, arrow_table.num_rows + 1), "row")


def _arrow_column(column: Any, what: str, separator: str) -> IdColumn:
    """Code an arrow column; each distinct value is spelled once."""
    pyarrow = importlib.import_module("pyarrow")
    kinds = pyarrow.types
    if kinds.is_timestamp(column.type):
        seconds = pyarrow.timestamp("s", tz=column.type.tz)
        column = column.cast(seconds, safe=False).cast(pyarrow.int64())
    values = column.to_pylist()
    if kinds.is_list(column.type) or kinds.is_large_list(column.type):
        values = [_joined(value, what, separator) for value in values]
    elif kinds.is_nested(column.type):
        raise DataError(f"{what} is {column.type}; allowed: numbers, text, times, lists of these")
    codes, distinct = encode(values)
    spelled = encode(map(_spelled, distinct))
    return IdColumn(spelled.codes[codes], spelled.ids)


def _joined(value: list[Any] | None, what: str, separator: str) -> str:
    texts = [_spelled(element) for element in value or ()]
    for text in texts:
        if separator in text:
            raise DataError(f"{what} has the id {text!r}; list_separator {separator!r} is in it")
    return separator.join(texts)


def _spelled(value: object) -> str:
    """A cell as CSV would have it: nothing for a null or NaN, no ".0" or exponent for integers."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    is_empty = value is None or (isinstance(value, float) and math.isnan(value))
    return "" if is_empty else str(value)
