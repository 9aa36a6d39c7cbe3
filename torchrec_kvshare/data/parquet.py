"""Read Parquet files: columns of logs as codes and texts, spelt as in a text file, and requests."""

import importlib
import zlib
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from torchrec_kvshare.data.chunks import Chunk, CodedTexts, coded
from torchrec_kvshare.data.files import HEAD_BYTES, PARQUET, check_header, check_kind, open_bytes
from torchrec_kvshare.errors import DataError, MissingExtraError
from torchrec_kvshare.features.ids import canonical_id

PARQUET_ROWS = 131_072  # of a chunk
REQUEST_ROWS = 64  # of a chunk of requests, each with a history and candidates
ALLOWED = "numbers, booleans, text, UTF-8 bytes, dates and times; for attributes lists of these"


def parquet_chunks(
    path: Path, names: Sequence[str], encoding: str, list_separator: str, lists: Collection[str]
) -> Iterator[Chunk]:
    """Read columns of a Parquet file, chunk by chunk.

    Args:
        path: the file, gzipped where it ends in ``.gz``.
        names: the columns to read.
        encoding: of binary columns.
        list_separator: joins the values of a list.
        lists: the columns that may hold lists.

    Yields:
        Rows with their numbers, from 1: whole numbers without ".0" or exponent, times in ISO 8601
        and UTC, "" for nulls and NaN.

    Raises:
        DataError: if the file or a column cannot be read.
        MissingExtraError: without pyarrow.
    """
    with _opened(path) as opened:
        check_header(path, opened.schema_arrow.names, names, "")
        kind_by_name = {name: opened.schema_arrow.field(name).type for name in names}
        for name, kind in kind_by_name.items():
            _check_type(kind, f"column {name!r} of {path}", may_list=name in lists)
        first_row = 1
        for batch in opened.iter_batches(PARQUET_ROWS, columns=list(kind_by_name)):
            columns = {}
            for name in names:
                column, what = batch.column(name), f"column {name!r} of {path}"
                if _element_type(column.type) is None:
                    columns[name] = _coded(column, what, encoding, first_row)
                else:
                    columns[name] = _joined(column, what, encoding, list_separator, first_row)
            yield Chunk(columns, np.arange(first_row, first_row + batch.num_rows))
            first_row += batch.num_rows


def parquet_requests(path: Path) -> Iterator[dict[str, Any]]:
    """Read raw requests, one a row: a column for each key, groups such as ``history`` are structs.

    Args:
        path: the file.

    Yields:
        Requests as JSON has them. A null is a key that is not given, but inside a list it is a
        missing value.

    Raises:
        DataError: if the file cannot be read.
        MissingExtraError: without pyarrow.
    """
    with _opened(path) as opened:
        for batch in opened.iter_batches(REQUEST_ROWS):
            yield from (_given(row) for row in batch.to_pylist())


def import_pyarrow(purpose: str) -> tuple[Any, Any]:
    """Return the modules ``pyarrow`` and ``pyarrow.parquet``; ``purpose`` is what needs them.

    Raises:
        MissingExtraError: without pyarrow.
    """
    try:
        return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError("parquet", purpose) from error


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a Parquet file; what goes wrong while it is read is a DataError."""
    pyarrow, parquet = import_pyarrow("reading Parquet")
    try:
        with open_bytes(path) as file:
            check_kind(path, file.read(HEAD_BYTES), PARQUET)
            file.seek(0)
            is_packed = path.suffix.lower() == ".gz"
            source = pyarrow.BufferReader(file.read()) if is_packed else path
        # With pre_buffer Arrow keeps every row group that it has read.
        with parquet.ParquetFile(source, pre_buffer=False) as opened:
            yield opened
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


def _given(row: dict[str, Any]) -> dict[str, Any]:
    """Leave out keys without a value, at the top and in groups."""
    return {
        key: _given(value) if isinstance(value, dict) else value
        for key, value in row.items()
        if value is not None
    }


def check_separator(texts: Sequence[str], separator: str, where: str) -> None:
    """Check that no id of a list holds the separator by which the list is joined.

    Raises:
        DataError: naming the id.
    """
    for text in texts:
        if separator in text:
            raise DataError(f"{where} has the id {text!r}; list_separator {separator!r} is in it")


def _element_type(kind: Any) -> Any:
    """Return the element type of a list type, else None."""
    kinds = importlib.import_module("pyarrow").types
    is_list = kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind)
    return kind.value_type if is_list else None


def _is_readable(kind: Any) -> bool:
    kinds = importlib.import_module("pyarrow").types
    if kinds.is_dictionary(kind):
        kind = kind.value_type
    is_readable = (
        *(kinds.is_integer, kinds.is_floating, kinds.is_decimal, kinds.is_boolean, kinds.is_null),
        *(kinds.is_string, kinds.is_large_string, kinds.is_string_view, kinds.is_binary),
        *(kinds.is_large_binary, kinds.is_fixed_size_binary, kinds.is_binary_view),
        *(kinds.is_date, kinds.is_timestamp),
    )
    return any(test(kind) for test in is_readable)


def _check_type(kind: Any, what: str, may_list: bool) -> None:
    element = _element_type(kind)
    if not _is_readable(kind) and not (element is not None and _is_readable(element) and may_list):
        raise DataError(f"{what} is {kind}; allowed: {ALLOWED}")


def _coded(column: Any, what: str, encoding: str, first_row: int) -> CodedTexts:
    """Code a column; each distinct value is converted to text once."""
    pyarrow = importlib.import_module("pyarrow")
    kinds = pyarrow.types
    if kinds.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if kinds.is_timestamp(column.type):
        # Arrow stores instants in UTC, with a zone or without.
        seconds = column.cast(pyarrow.timestamp("s", tz=column.type.tz), safe=False)
        column = seconds.cast(pyarrow.int64()).cast(pyarrow.timestamp("s"))
    in_codes = column.dictionary_encode("encode")
    codes = in_codes.indices.to_numpy(zero_copy_only=False).astype(np.int64)
    values = in_codes.dictionary
    if any(is_kind(column.type) for is_kind in (kinds.is_integer, kinds.is_boolean,
                                                kinds.is_timestamp, kinds.is_string)):  # fmt: skip
        # These Arrow spells as `spelled` does.
        values.validate(full=True)
        return CodedTexts(codes, values)
    float_type = _float_type(column.type)
    texts = []
    for code, value in enumerate(values.to_pylist()):
        try:
            texts.append(spelled(value, float_type, encoding))
        except UnicodeDecodeError as error:
            row = int(np.argmax(codes == code)) + first_row
            raise DataError(_undecodable(what, row, error, encoding)) from error
    return CodedTexts(codes, texts)


def _joined(column: Any, what: str, encoding: str, separator: str, first_row: int) -> CodedTexts:
    """Code a column of lists, the texts of their elements joined."""
    float_type = _float_type(_element_type(column.type))
    joined = []
    for row, values in enumerate(column.to_pylist(), start=first_row):
        try:
            texts = [spelled(value, float_type, encoding) for value in values or ()]
        except UnicodeDecodeError as error:
            raise DataError(_undecodable(what, row, error, encoding)) from error
        check_separator(texts, separator, f"{what}, row {row}")
        joined.append(separator.join(texts))
    return coded(joined)


def _float_type(kind: Any) -> type[np.floating[Any]]:
    """Return the numpy type whose shortest decimal a float of the column has."""
    kinds = importlib.import_module("pyarrow").types
    if kinds.is_float16(kind):
        return np.float16
    return np.float32 if kinds.is_float32(kind) else np.float64


def spelled(value: Any, float_type: type[np.floating[Any]], encoding: str) -> str:
    """Return a value of a Parquet or JSON file as a text file has it.

    Args:
        value: text, bytes, a number, a boolean, a date, or None.
        float_type: numpy type whose shortest decimal a float has.
        encoding: of bytes.
    """
    if value is None or value != value:
        return ""
    if isinstance(value, bytes):
        return value.decode(encoding)
    if isinstance(value, float):
        # A float32 of 0.1 is 0.1, not 0.10000000149011612.
        return canonical_id(float(str(float_type(value))))
    if isinstance(value, Decimal):
        # Unlike normalize(), this keeps every digit.
        text = format(value, "f")
        return text.rstrip("0").rstrip(".") if "." in text else text
    return canonical_id(value) if isinstance(value, bool | int) else str(value)


def _undecodable(what: str, row: int, error: UnicodeDecodeError, encoding: str) -> str:
    byte = error.object[error.start]
    return (
        f"{what}, row {row}: byte 0x{byte:02x} is not {encoding}; data.format.encoding says what "
        "it is, such as latin-1"
    )
