"""Read text and Parquet files into dictionary-coded columns.

A column is coded while it is read: a code per row, each distinct text stored once. Later work, such
as parsing times or testing a rule, is done once per distinct text. Half a million rows then take
seconds, and tens of millions fit in memory.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.data.files import (
    DELIMITER_BY_ENDING,
    FileFormat,
    check_header,
    open_text,
    text_rows,
)
from torchrec_kvshare.data.parquet import read_parquet
from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.features.ids import canonical_id

CHUNK_ROWS = 65_536  # rows held as Python lists at once, some 30 MB of a wide file
EXAMPLES_PER_REASON = 2
EXAMPLE_CHARACTERS = 80


class IdColumn(NamedTuple):
    """A dictionary-coded column: row t holds ``ids[codes[t]]``; ids by first appearance."""

    codes: NDArray[np.int64]  # [T]
    ids: list[str]


class Exclusion(NamedTuple):
    """A reason to drop a row, decided by the text in one column."""

    reason: str
    column: str
    excludes: Callable[[str], bool]


@dataclass(frozen=True, eq=False)
class RawTable:
    """The wanted columns of a file, coded, their texts as in the file.

    Args:
        source: the file, for messages.
        columns: coded column by name, all with the same number of rows.
        positions: [rows] int64, line (text files) or row number (Parquet) at which each row begins.
        position_name: "line" or "row".
        num_misfits: number of rows dropped because of their number of fields.
        misfits: descriptions of the first of these.
    """

    source: str
    columns: dict[str, IdColumn]
    positions: NDArray[np.int64]
    position_name: str = "line"
    num_misfits: int = 0
    misfits: tuple[str, ...] = ()

    def joined(self, key: str, side: "RawTable", names: Sequence[str]) -> "RawTable":
        """Join columns of another table on column ``key``.

        Args:
            key: the id column of both tables; where ``side`` repeats an id, its first row is used.
            side: the other table; ids that it lacks give "".
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

    def without(self, missing: Collection[str]) -> "RawTable":
        """Replace texts that mean no value by "", ignoring surrounding space."""
        columns = {
            name: IdColumn(codes, ["" if text.strip() in missing else text for text in ids])
            for name, (codes, ids) in self.columns.items()
        }
        return replace(self, columns=columns)

    def renamed(self, new_by_old: Mapping[str, str]) -> "RawTable":
        """Rename columns.

        Args:
            new_by_old: new name by old name.

        Returns:
            This table, with the other columns unchanged.
        """
        columns = {new_by_old.get(name, name): column for name, column in self.columns.items()}
        return replace(self, columns=columns)


def encode(texts: Iterable[str]) -> IdColumn:
    """Dictionary-code texts in order of first appearance.

    Args:
        texts: [T].

    Returns:
        The coded column.

    Example:
        >>> encode(["b", "a", "b"])
        IdColumn(codes=array([0, 1, 0]), ids=['b', 'a'])
    """
    coder = _Coder()
    coder.add(list(texts))
    return coder.column()


def read_table(
    path: Path,
    names: Sequence[str],
    file_format: FileFormat | None = None,
    list_separator: str = "|",
    lists: Collection[str] = (),
) -> RawTable:
    """Read columns of a file; its ending says the kind.

    Args:
        path: ``.csv``, ``.tsv`` or ``.parquet``, optionally followed by ``.gz``. If the format
            names a delimiter, a file with any other ending is text.
        names: the columns to read.
        file_format: how the file is written; None: the default of its ending.
        list_separator: joins the values of Parquet's list columns.
        lists: the columns that may hold lists.

    Returns:
        The columns, with "" for missing values.

    Raises:
        DataError: if the file or a column is missing, or the file cannot be read.
        ConfigError: if the format has options of text files and the file is Parquet.
        MissingExtraError: for Parquet without pyarrow.
    """
    file_format = file_format or FileFormat()
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    if ending == ".parquet":
        table = _read_parquet(path, names, file_format, list_separator=list_separator, lists=lists)
    elif ending in DELIMITER_BY_ENDING or file_format.delimiter is not None:
        table = _read_text(path, names, file_format, ending)
    else:
        raise DataError(
            f"{path} ends in {ending!r}; allowed: .csv, .tsv, .parquet, with .gz or not; and any "
            "ending of a text file where data.format.delimiter is set"
        )
    return table.without(file_format.missing)


def code_rows(
    path: Path,
    header: Sequence[str],
    numbered_rows: Iterator[tuple[int, list[str]]],
    names: Sequence[str],
    advice: str = "",
) -> RawTable:
    """Code the columns of a stream of rows.

    Args:
        path: the file, for messages.
        header: the names of its columns.
        numbered_rows: line number and fields of each row.
        names: the columns to read.
        advice: what to do about a missing column, for messages.

    Returns:
        The columns; rows with another number of fields than the header are dropped and counted.

    Raises:
        DataError: if the file does not have a column exactly once.
    """
    check_header(path, header, names, advice)
    index_by_name = {name: header.index(name) for name in names}
    coder_by_name = {name: _Coder() for name in names}
    lines = [np.zeros(0, np.int64)]
    misfits: list[str] = []
    num_misfits = 0
    while chunk := list(islice(numbered_rows, CHUNK_ROWS)):
        fitting = [row for _, row in chunk if len(row) == len(header)]
        fitting_lines = [line for line, row in chunk if len(row) == len(header)]
        lines.append(np.array(fitting_lines, np.int64))
        for name, index in index_by_name.items():
            coder_by_name[name].add([row[index] for row in fitting])
        if len(fitting) < len(chunk):
            num_misfits += len(chunk) - len(fitting)
            misfits += [_misfit(path, *pair) for pair in chunk if len(pair[1]) != len(header)]
            del misfits[EXAMPLES_PER_REASON:]
    columns = {name: coder.column() for name, coder in coder_by_name.items()}
    return RawTable(
        source=str(path),
        columns=columns,
        positions=np.concatenate(lines),
        position_name="line",
        num_misfits=num_misfits,
        misfits=tuple(misfits),
    )


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


def read_header(path: Path, file_format: FileFormat) -> list[str]:
    """Return the column names in the first row of a text file."""
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    with open_text(path, file_format.encoding) as lines:
        return _header(text_rows(path, lines, *file_format.splitting(ending)))


def _header(numbered_rows: Iterator[tuple[int, list[str]]]) -> list[str]:
    """Return the names in the first row; none if there is no row."""
    return [name.strip() for name in next(numbered_rows, (0, []))[1]]


def _read_text(path: Path, names: Sequence[str], file_format: FileFormat, ending: str) -> RawTable:
    delimiter, quoting = file_format.splitting(ending)
    advice = (
        f". Fields are split at {delimiter!r} (data.format.delimiter), quoting is {quoting} "
        "(data.format.quoting); data.format.header names the columns of a file without a header"
    )
    with open_text(path, file_format.encoding) as lines:
        numbered_rows = text_rows(path, lines, delimiter, quoting)
        header = list(file_format.header) or _header(numbered_rows)
        return code_rows(path, header, numbered_rows, names, advice)


def _read_parquet(
    path: Path,
    names: Sequence[str],
    file_format: FileFormat,
    list_separator: str,
    lists: Collection[str],
) -> RawTable:
    text_options = (file_format.delimiter, file_format.quoting, file_format.header or None)
    if text_options != (None, None, None):
        raise ConfigError(
            f"data.format has a delimiter, a quoting or a header, which only text files have; "
            f"{path} is Parquet"
        )
    coded = read_parquet(
        path,
        names,
        encoding=file_format.encoding,
        list_separator=list_separator,
        lists=lists,
    )
    columns = {}
    for name, (codes, texts) in coded.items():
        spelled = encode(texts)
        columns[name] = IdColumn(spelled.codes[codes], spelled.ids)
    num_rows = len(next(iter(coded.values())).codes) if coded else 0
    return RawTable(str(path), columns, np.arange(1, num_rows + 1), "row")


def _misfit(path: Path, line: int, row: list[str]) -> str:
    text = ",".join(row)[:EXAMPLE_CHARACTERS]
    return f"{path}, line {line}: wrong number of fields: {len(row)} in {text!r}"
