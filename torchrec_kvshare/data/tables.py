"""Text and Parquet files in, dictionary-coded columns out.

Every column is coded while it is read (a code per row, each distinct text once), and everything
after that, such as parsing a time or testing a rule, happens once per distinct text. That keeps
half a million rows at seconds and tens of millions in memory.
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

    def without(self, missing: Collection[str]) -> "RawTable":
        """Put "" in place of texts that mean no value, space around them or not."""
        columns = {
            name: IdColumn(codes, ["" if text.strip() in missing else text for text in ids])
            for name, (codes, ids) in self.columns.items()
        }
        return replace(self, columns=columns)

    def renamed(self, new_by_old: Mapping[str, str]) -> "RawTable":
        """Give columns other names.

        Args:
            new_by_old: by the present name, the new one.

        Returns:
            This table, its other columns as they were.
        """
        columns = {new_by_old.get(name, name): column for name, column in self.columns.items()}
        return replace(self, columns=columns)


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


def read_table(
    path: Path,
    names: Sequence[str],
    file_format: FileFormat | None = None,
    list_separator: str = "|",
    lists: Collection[str] = (),
) -> RawTable:
    """Read columns of a file, chosen by its ending.

    Args:
        path: ``.csv``, ``.tsv`` or ``.parquet``; each may end in ``.gz``. Where the format names
            a delimiter, any other ending is of a text file.
        names: the columns wanted.
        file_format: how the file is written; None: as is usual for its ending.
        list_separator: joins the values of Parquet's list columns.
        lists: the columns that may be such.

    Returns:
        The columns; "" stands for all that the format takes as missing.

    Raises:
        DataError: if the file or a column is missing, or the file cannot be read.
        ConfigError: if the format is one of text and the file is Parquet.
        MissingExtraError: for Parquet without pyarrow.
    """
    file_format = file_format or FileFormat()
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    if ending == ".parquet":
        table = _read_parquet(path, names, file_format, list_separator, lists)
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
    """Code columns of rows while they stream by.

    Args:
        path: the file, for messages.
        header: the columns it has.
        numbered_rows: line number and fields of each row.
        names: the columns wanted.
        advice: what to do if one is not there, for messages.

    Returns:
        The columns; rows of another number of fields than the header are counted apart.

    Raises:
        DataError: if a wanted column is not there exactly once.
    """
    check_header(path, header, names, advice)
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


def read_header(path: Path, file_format: FileFormat) -> list[str]:
    """The columns of a text file, as its first row names them."""
    ending = Path(path.name.lower().removesuffix(".gz")).suffix
    with open_text(path, file_format.encoding) as lines:
        return _header(text_rows(path, lines, *file_format.splitting(ending)))


def _header(numbered_rows: Iterator[tuple[int, list[str]]]) -> list[str]:
    """The names in the first of some rows, none if there is no row."""
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
    of_text = (file_format.delimiter, file_format.quoting, file_format.header or None)
    if of_text != (None, None, None):
        raise ConfigError(
            f"data.format has a delimiter, a quoting or a header, which text files have; {path} "
            "is Parquet"
        )
    coded = read_parquet(path, names, file_format.encoding, list_separator, lists)
    columns = {}
    for name, (codes, texts) in coded.items():
        spelled = encode(texts)
        columns[name] = IdColumn(spelled.codes[codes], spelled.ids)
    num_rows = len(next(iter(coded.values())).codes) if coded else 0
    return RawTable(str(path), columns, np.arange(1, num_rows + 1), "row")


def _misfit(path: Path, line: int, row: list[str]) -> str:
    text = ",".join(row)[:EXAMPLE_CHARACTERS]
    return f"{path}, line {line}: wrong number of fields: {len(row)} in {text!r}"
