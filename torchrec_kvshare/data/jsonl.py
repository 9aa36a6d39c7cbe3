"""Read columns of files with one JSON object a line, spelt as in Parquet and text files."""

import json
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.data.chunks import CHUNK_ROWS, Chunk, coded
from torchrec_kvshare.data.files import check_header, open_text
from torchrec_kvshare.data.parquet import check_separator, spelled
from torchrec_kvshare.errors import DataError

ALLOWED = "texts, numbers, true, false and null; for attributes lists of these"


def jsonl_chunks(
    path: Path,
    names: Sequence[str],
    encoding: str,
    list_separator: str,
    lists: Collection[str],
) -> Iterator[Chunk]:
    """Read columns of a file of JSON objects, chunk by chunk; blank lines are skipped.

    Args:
        path: the file, gzipped where it ends in ``.gz``.
        names: the columns to read; an object without one has no value there.
        encoding: of the text.
        list_separator: joins the values of a list.
        lists: the columns that may hold lists.

    Yields:
        Rows with the line of each; values spelt as Parquet's.

    Raises:
        DataError: naming the line that is no object or holds another value, or the column that no
            object has.
    """
    unseen = dict.fromkeys(names)
    keys: dict[str, None] = {}
    with open_text(path, encoding) as text:
        lines = ((number, line) for number, line in enumerate(text, start=1) if line.strip())
        while numbered := list(islice(lines, CHUNK_ROWS)):
            rows = [_object(path, number, line) for number, line in numbered]
            if unseen:  # Only until every column has appeared once.
                for row in rows:
                    keys |= dict.fromkeys(row)
                unseen = {name: None for name in unseen if name not in keys}
            positions = np.array([number for number, _ in numbered], np.int64)
            columns = {}
            for name in names:
                values = [row.get(name) for row in rows]
                may_list = list_separator if name in lists else None
                what = f"column {name!r} of {path}"
                columns[name] = coded(_texts(values, what, positions, may_list))
                _check_text(columns[name].texts, what)
            yield Chunk(columns, positions)
    check_header(path, list(keys) if unseen else list(names), names, "")


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number} is not a JSON object, but {line.strip()[:80]!r}")
    return row


def _texts(
    values: list[Any], what: str, positions: NDArray[np.int64], separator: str | None
) -> list[str]:
    texts = []
    for row, value in enumerate(values):
        several = value if isinstance(value, list) and separator is not None else [value]
        if any(isinstance(one, list | dict) for one in several):
            raise DataError(f"{what}, line {positions[row]} is {value!r}; allowed: {ALLOWED}")
        spelt = [spelled(one, np.float64, "utf-8") for one in several]
        if several is value:
            check_separator(spelt, str(separator), f"{what}, line {positions[row]}")
        texts.append(str(separator).join(spelt) if several is value else spelt[0])
    return texts


def _check_text(texts: Sequence[str], what: str) -> None:
    r"""Refuse half of a surrogate pair, which JSON can write as ``"\ud800"`` and UTF-8 cannot."""
    for text in texts:
        if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
            raise DataError(
                f"{what} holds {text!r}, half of a surrogate pair; allowed: Unicode text"
            )
