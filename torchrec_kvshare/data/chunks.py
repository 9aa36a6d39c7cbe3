"""Parts of a log's file, a bounded number of rows each, their columns dictionary-coded.

Every reader of a kind of file yields them. Reading in memory and preparing shards differ in what
they do with a chunk, not in what is in it.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

CHUNK_ROWS = 65_536  # rows held as Python lists at once, some 30 MB of a wide file
EXAMPLE_CHARACTERS = 80  # of a bad row or value in a message


class CodedTexts(NamedTuple):
    """Row t holds ``texts[codes[t]]``; texts may repeat."""

    codes: NDArray[np.int64]
    # A list, or an Arrow array of strings, integers, booleans or times in seconds, whose texts are
    # those that Arrow casts it to; "" for a null.
    texts: Any

    def as_list(self) -> list[str]:
        """Return the texts by code."""
        if isinstance(self.texts, list):
            return self.texts
        return list(self.texts.cast("string").fill_null("").to_pylist())


class Chunk(NamedTuple):
    """Some rows of one file, and the rows dropped among them because of their number of fields."""

    columns: dict[str, CodedTexts]
    positions: NDArray[np.int64]  # line (text files) or row number (Parquet) of each row
    num_misfits: int = 0
    misfits: tuple[str, ...] = ()  # descriptions of all of them


def coded(texts: Sequence[str]) -> CodedTexts:
    """Dictionary-code texts in order of first appearance.

    Example:
        >>> coded(["b", "a", "b"])
        CodedTexts(codes=array([0, 1, 0]), texts=['b', 'a'])
    """
    code_by_text = {text: code for code, text in enumerate(dict.fromkeys(texts))}
    codes = np.fromiter(map(code_by_text.__getitem__, texts), np.int64, len(texts))
    return CodedTexts(codes, list(code_by_text))


def chunks_of_rows(
    path: Path,
    width: int,
    index_by_name: dict[str, int],
    numbered_rows: Iterator[tuple[int, list[str]]],
) -> Iterator[Chunk]:
    """Code the columns of a stream of rows.

    Args:
        path: the file, for messages.
        width: number of its columns; rows with another number of fields are dropped and counted.
        index_by_name: the columns to read.
        numbered_rows: line number and fields of each row.

    Yields:
        The rows, at most ``CHUNK_ROWS`` at once.
    """
    while chunk := list(islice(numbered_rows, CHUNK_ROWS)):
        fitting = [row for _, row in chunk if len(row) == width]
        lines = [line for line, row in chunk if len(row) == width]
        columns = {
            name: coded([row[index] for row in fitting]) for name, index in index_by_name.items()
        }
        misfits = [_misfit(path, *pair) for pair in chunk if len(pair[1]) != width]
        yield Chunk(columns, np.array(lines, np.int64), len(misfits), tuple(misfits))


def _misfit(path: Path, line: int, row: list[str]) -> str:
    text = ",".join(row)[:EXAMPLE_CHARACTERS]
    return f"{path}, line {line}: wrong number of fields: {len(row)} in {text!r}"
