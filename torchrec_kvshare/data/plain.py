"""Read the parts of a text file that hold no quotes, block by block with Arrow.

Where every line is a row and every delimiter a boundary, Arrow splits a file ten times as fast as
Python's ``csv``. Whatever a block holds beyond that is left to ``text_rows``, which alone says what
a row is: ``data/test_plain.py`` holds both to the same rows.
"""

import codecs
import csv
import importlib
import importlib.util
import io
from collections.abc import Generator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from torchrec_kvshare.data.chunks import Chunk, CodedTexts, chunks_of_rows
from torchrec_kvshare.data.files import (
    HEAD_BYTES,
    TEXT,
    check_kind,
    open_bytes,
    reading,
    text_rows,
)
from torchrec_kvshare.errors import DataError

BLOCK_BYTES = 8 * 2**20
NEWLINE = ord("\n")


class Splitting(NamedTuple):
    """How the fields of a text file are told apart."""

    encoding: str
    delimiter: str
    quoting: str

    def may_be_plain(self) -> bool:
        """Return whether bytes can be split without decoding them, and Arrow is installed."""
        is_utf8 = codecs.lookup(self.encoding).name == "utf-8"
        has_arrow = importlib.util.find_spec("pyarrow") is not None
        return is_utf8 and self.delimiter.isascii() and has_arrow


def first_row(path: Path, splitting: Splitting) -> list[str]:
    """Return the first line as a row; empty if it is blank or the row does not end with it."""
    with reading(path), open_bytes(path) as file:
        check_kind(path, file.read(HEAD_BYTES), TEXT)
        file.seek(0)
        line = file.readline().removeprefix(codecs.BOM_UTF8)
    try:
        text = line.decode(splitting.encoding)
        lines = io.StringIO(text, newline="")
        rows = text_rows(path, lines, splitting.delimiter, splitting.quoting)
        return next(rows, (1, []))[1]
    except (UnicodeDecodeError, DataError):
        return []


def plain_chunks(
    path: Path, width: int, index_by_name: dict[str, int], splitting: Splitting, skip_first: bool
) -> Generator[Chunk, None, int | None]:
    """Read columns of a file as long as its blocks are plain.

    Args:
        path: the file.
        width: number of its columns, at least two.
        index_by_name: the columns to read.
        splitting: how its fields are told apart.
        skip_first: whether the first line is the header.

    Yields:
        Rows with the line of each.

    Returns:
        None at the end of the file; otherwise the number of lines that were read: later ones are
        not plain.

    Raises:
        DataError: if the file cannot be read or is not text.
    """
    with reading(path), open_bytes(path) as file:
        check_kind(path, file.read(HEAD_BYTES), TEXT)
        file.seek(0)
        num_lines = 0
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        if skip_first:
            file.readline()
            num_lines = 1
        rest = b""
        while block := _next_block(file, rest):
            whole, rest = block
            ends = np.flatnonzero(np.frombuffer(whole, np.uint8) == NEWLINE)
            if not _is_plain(whole, ends, splitting):
                return num_lines
            first, num_lines = num_lines + 1, num_lines + len(ends) + (not whole.endswith(b"\n"))
            columns = _columns(whole, width, index_by_name, splitting.delimiter)
            if columns is not None:
                yield Chunk(columns, np.arange(first, num_lines + 1))
                continue
            # Blank lines, or some with another number of fields; as rows end with their lines,
            # those of the block are read by themselves.
            text = io.StringIO(whole.decode(splitting.encoding), newline="")
            rows = text_rows(path, text, splitting.delimiter, splitting.quoting)
            numbered = ((first - 1 + line, row) for line, row in rows)
            yield from chunks_of_rows(path, width, index_by_name, numbered)
    return None


def _next_block(file: BinaryIO, rest: bytes) -> tuple[bytes, bytes] | None:
    """Return whole lines, and the beginning of the next line; None at the end of the file."""
    block = rest
    while read := file.read(BLOCK_BYTES):
        block += read
        end = block.rfind(b"\n") + 1
        if end or len(block) > csv.field_size_limit():  # The latter is no plain block.
            return (block[:end], block[end:]) if end else (block, b"")
    return (block, b"") if block else None


def _is_plain(block: bytes, ends: Any, splitting: Splitting) -> bool:
    """Return whether each line of a block is one row for ``csv`` too, or one that Arrow refuses."""
    has_quotes = splitting.quoting != "none" and b'"' in block
    if has_quotes or b"\0" in block or block.count(b"\r") != block.count(b"\r\n"):
        return False
    lengths = np.diff(np.concatenate([[-1], ends, [len(block)]]))
    if lengths.max() > csv.field_size_limit():
        return False
    try:
        block.decode(splitting.encoding)
    except UnicodeDecodeError:
        return False
    return True


def _columns(
    block: bytes, width: int, index_by_name: dict[str, int], delimiter: str
) -> dict[str, CodedTexts] | None:
    """Return the columns of a block; None if a line is blank or has another number of fields."""
    if block.startswith((b"\n", b"\r")) or b"\n\n" in block or b"\n\r" in block:
        return None
    arrow, arrow_csv = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.csv")
    chosen = [str(index) for index in dict.fromkeys(index_by_name.values())]
    try:
        table = arrow_csv.read_csv(
            arrow.BufferReader(block),
            read_options=arrow_csv.ReadOptions(
                column_names=[str(index) for index in range(width)], block_size=len(block) + 1
            ),
            parse_options=arrow_csv.ParseOptions(
                delimiter=delimiter, quote_char=False, ignore_empty_lines=False
            ),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=chosen,
                column_types=dict.fromkeys(chosen, arrow.string()),
                strings_can_be_null=False,
            ),
        )
    except arrow.ArrowInvalid:
        return None
    columns = {}
    for name, index in index_by_name.items():
        coded = table.column(str(index)).combine_chunks().dictionary_encode()
        codes = coded.indices.to_numpy(zero_copy_only=False).astype(np.int64)
        columns[name] = CodedTexts(codes, coded.dictionary)
    return columns
