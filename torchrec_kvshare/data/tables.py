"""Read text and Parquet files into dictionary-coded columns.

A column is coded while it is read: a code per row, each distinct text stored once. Later work, such
as parsing times or testing a rule, is done once per distinct text. Half a million rows then take
seconds, and tens of millions fit in memory.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.data.chunks import (
    Chunk,
    CodedTexts,
    chunks_of_rows,
    coded,
)
from torchrec_kvshare.data.files import (
    DELIMITER_BY_ENDING,
    FileFormat,
    check_header,
    open_text,
    text_rows,
)
from torchrec_kvshare.data.jsonl import jsonl_chunks
from torchrec_kvshare.data.parquet import parquet_chunks
from torchrec_kvshare.data.plain import Splitting, first_row, plain_chunks
from torchrec_kvshare.data.sources import SourceFile, source_name
from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.features.ids import canonical_id

JSONL_ENDINGS = (".jsonl", ".ndjson")
ALLOWED_ENDINGS = (
    ".csv, .tsv, .parquet, .jsonl, .ndjson, with .gz or not; and any ending of a text file where "
    "data.format.delimiter is set"
)
EXAMPLES_PER_REASON = 2


class IdColumn(NamedTuple):
    """A dictionary-coded column: row t holds ``ids[codes[t]]``; ids by first appearance."""

    codes: NDArray[np.int64]  # [T]
    ids: list[str]


class ValueColumn(NamedTuple):
    """A coded column with several ids per row: row t holds ``values[codes[t]]``."""

    codes: NDArray[np.int64]  # [T]
    values: list[tuple[str, ...]]


class Exclusion(NamedTuple):
    """A reason to drop a row, decided by the text in one column."""

    reason: str
    column: str
    excludes: Callable[[str], bool]


class Part(NamedTuple):
    """The rows of a table that come from one file."""

    source: str
    position_name: str  # "line" or "row"
    num_rows: int

    def where(self, position: int) -> str:
        """Return a row of the file in words."""
        return f"{self.source}, {self.position_name} {position}"


@dataclass(frozen=True, eq=False)
class RawTable:
    """The wanted columns of one or several files, coded, their texts as in the files.

    Args:
        source: the file or files, for messages.
        columns: coded column by name, all with the same number of rows.
        positions: [rows] int64, line (text files) or row number (Parquet) at which each row begins.
        parts: the files in the order of their rows; none: all rows are lines of ``source``.
        num_misfits: number of rows dropped because of their number of fields.
        misfits: descriptions of the first of these.
    """

    source: str
    columns: dict[str, IdColumn]
    positions: NDArray[np.int64]
    parts: tuple[Part, ...] = ()
    num_misfits: int = 0
    misfits: tuple[str, ...] = ()

    def where(self, row: int) -> str:
        """Return the file of a row and its position there."""
        parts = self.parts or (Part(self.source, "line", len(self.positions)),)
        ends = np.cumsum([part.num_rows for part in parts])
        part = parts[int(np.searchsorted(ends, row, side="right"))]
        return part.where(int(self.positions[row]))

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
        """Replace texts that mean no value by ""."""
        columns = {
            name: IdColumn(codes, without_missing(ids, missing))
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


def without_missing(texts: Iterable[str], missing: Collection[str]) -> list[str]:
    """Replace texts that mean no value by "", ignoring surrounding space.

    Example:
        >>> without_missing(["7", " NULL "], ("NULL",))
        ['7', '']
    """
    return ["" if text.strip() in missing else text for text in texts]


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
    column = coded(list(texts))
    return IdColumn(column.codes, column.as_list())


def read_table(
    files: Path | Sequence[SourceFile],
    names: Sequence[str],
    file_format: FileFormat | None = None,
    list_separator: str = "|",
    lists: Collection[str] = (),
) -> RawTable:
    """Read columns of one or several files; the ending of each says its kind.

    Args:
        files: ``.csv``, ``.tsv``, ``.parquet``, ``.jsonl`` or ``.ndjson``, optionally followed by
            ``.gz``. If the format names a delimiter, a file with any other ending is text.
        names: the columns to read.
        file_format: how the files are written; None: the default of their ending.
        list_separator: joins the values of list columns.
        lists: the columns that may hold lists.

    Returns:
        The columns, with "" for missing values.

    Raises:
        DataError: if a file or a column is missing, or a file cannot be read.
        ConfigError: if the format has options of text files and a file is none.
        MissingExtraError: for Parquet without pyarrow.
    """
    file_format = file_format or FileFormat()
    several = [SourceFile(files, {})] if isinstance(files, Path) else files
    parts = [
        (file, table_chunks(file, names, file_format, list_separator=list_separator, lists=lists))
        for file in several
    ]
    return _coded_table(source_name(several), parts, names).without(file_format.missing)


def table_chunks(
    file: SourceFile,
    names: Sequence[str],
    file_format: FileFormat,
    list_separator: str,
    lists: Collection[str],
) -> Iterator[Chunk]:
    """Read columns of a file, chunk by chunk, texts as in the file; see ``read_table``."""
    path, text_by_column, _ = file
    own = [name for name in names if name not in text_by_column]
    ending = _ending(path)
    if ending == ".parquet":
        _refuse_text_options(file_format, path, "Parquet")
        chunks = parquet_chunks(path, own, file_format.encoding, list_separator, lists)
    elif ending in JSONL_ENDINGS and file_format.delimiter is None:
        _refuse_text_options(file_format, path, "JSON")
        chunks = jsonl_chunks(path, own, file_format.encoding, list_separator, lists)
    elif ending in DELIMITER_BY_ENDING or file_format.delimiter is not None:
        chunks = _text_chunks(path, own, file_format, ending)
    else:
        raise DataError(f"{path} ends in {ending!r}; allowed: {ALLOWED_ENDINGS}")
    for chunk in chunks:
        constant = np.zeros(len(chunk.positions), np.int64)
        added = {
            name: CodedTexts(constant, [text_by_column[name]])
            for name in names
            if name in text_by_column
        }
        yield chunk._replace(columns=chunk.columns | added)


def position_name(path: Path) -> str:
    """Return what the position of a row in a file is: its line, or its number."""
    return "row" if _ending(path) == ".parquet" else "line"


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
    chunks = _row_chunks(path, header, numbered_rows, names, advice)
    return _coded_table(str(path), [(SourceFile(path, {}), chunks)], names)


def _row_chunks(
    path: Path,
    header: Sequence[str],
    numbered_rows: Iterator[tuple[int, list[str]]],
    names: Sequence[str],
    advice: str,
) -> Iterator[Chunk]:
    check_header(path, header, names, advice)
    index_by_name = {name: header.index(name) for name in names}
    yield from chunks_of_rows(path, len(header), index_by_name, numbered_rows)


def _coded_table(
    source: str, parts: Sequence[tuple[SourceFile, Iterator[Chunk]]], names: Sequence[str]
) -> RawTable:
    """Join the chunks of several files, in order."""
    coder_by_name = {name: _Coder() for name in names}
    positions = [np.zeros(0, np.int64)]
    counted = []
    num_misfits, misfits = 0, tuple[str, ...]()
    for file, chunks in parts:
        num_rows = 0
        for chunk in chunks:
            positions.append(chunk.positions)
            num_rows += len(chunk.positions)
            num_misfits += chunk.num_misfits
            misfits = (*misfits, *chunk.misfits)[:EXAMPLES_PER_REASON]
            for name, coder in coder_by_name.items():
                coder.add(chunk.columns[name])
        counted.append(Part(str(file.path), position_name(file.path), num_rows))
    return RawTable(
        source=source,
        columns={name: coder.column() for name, coder in coder_by_name.items()},
        positions=np.concatenate(positions),
        parts=tuple(counted),
        num_misfits=num_misfits,
        misfits=misfits,
    )


class _Coder:
    """Codes one column, chunk by chunk."""

    def __init__(self) -> None:
        self.code_by_text: dict[str, int] = {}
        self.chunks: list[NDArray[np.int64]] = []

    def add(self, chunk: CodedTexts) -> None:
        texts = chunk.as_list()
        code_by_text = self.code_by_text
        codes = [code_by_text.setdefault(text, len(code_by_text)) for text in texts]
        self.chunks.append(np.array(codes, np.int64)[chunk.codes])

    def column(self) -> IdColumn:
        codes = np.concatenate(self.chunks) if self.chunks else np.zeros(0, np.int64)
        return IdColumn(codes, list(self.code_by_text))


def _texts(column: IdColumn) -> list[str]:
    return [column.ids[code] for code in column.codes]


def read_header(path: Path, file_format: FileFormat) -> list[str]:
    """Return the column names in the first row of a text file."""
    with open_text(path, file_format.encoding) as lines:
        return _header(text_rows(path, lines, *file_format.splitting(_ending(path))))


def _header(numbered_rows: Iterator[tuple[int, list[str]]]) -> list[str]:
    """Return the names in the first row; none if there is no row."""
    return [name.strip() for name in next(numbered_rows, (0, []))[1]]


def _ending(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _text_chunks(
    path: Path, names: Sequence[str], file_format: FileFormat, ending: str
) -> Iterator[Chunk]:
    delimiter, quoting = file_format.splitting(ending)
    advice = (
        f". Fields are split at {delimiter!r} (data.format.delimiter), quoting is {quoting} "
        "(data.format.quoting); data.format.header names the columns of a file without a header"
    )
    splitting = Splitting(file_format.encoding, delimiter, quoting)
    header, num_lines = list(file_format.header), 0
    if splitting.may_be_plain():
        plain = header or [name.strip() for name in first_row(path, splitting)]
        if len(plain) > 1:
            check_header(path, plain, names, advice)
            index_by_name = {name: plain.index(name) for name in names}
            read = yield from plain_chunks(
                path, len(plain), index_by_name, splitting, skip_first=not header
            )
            if read is None:
                return
            num_lines = read
    with open_text(path, file_format.encoding) as lines:
        numbered_rows = text_rows(path, lines, delimiter, quoting)
        header = header or _header(numbered_rows)
        rest = (pair for pair in numbered_rows if pair[0] > num_lines)
        yield from _row_chunks(path, header, rest, names, advice)


def _refuse_text_options(file_format: FileFormat, path: Path, kind: str) -> None:
    text_options = (file_format.delimiter, file_format.quoting, file_format.header or None)
    if text_options != (None, None, None):
        raise ConfigError(
            f"data.format has a delimiter, a quoting or a header, which only text files have; "
            f"{path} is {kind}"
        )
