"""Read columns of Parquet files as codes and texts, spelt as in a text file."""

import importlib
import zlib
from collections.abc import Collection, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.data.files import HEAD_BYTES, PARQUET, check_header, check_kind, open_bytes
from torchrec_kvshare.errors import DataError, MissingExtraError
from torchrec_kvshare.features.ids import canonical_id

ALLOWED = "numbers, booleans, text, UTF-8 bytes, dates and times; for attributes lists of these"


class CodedTexts(NamedTuple):
    """Row t holds ``texts[codes[t]]``; texts may repeat."""

    codes: NDArray[np.int64]
    texts: list[str]


def read_parquet(
    path: Path, names: Sequence[str], encoding: str, list_separator: str, lists: Collection[str]
) -> dict[str, CodedTexts]:
    """Read columns of a Parquet file.

    Args:
        path: the file, gzipped where it ends in ``.gz``.
        names: the columns to read.
        encoding: of binary columns.
        list_separator: joins the values of a list.
        lists: the columns that may hold lists.

    Returns:
        The columns by name: whole numbers without ".0" or exponent, times in ISO 8601 and UTC, ""
        for nulls and NaN.

    Raises:
        DataError: if the file or a column cannot be read.
        MissingExtraError: without pyarrow.
    """
    try:
        pyarrow = importlib.import_module("pyarrow")
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise MissingExtraError("parquet", "reading Parquet") from error
    try:
        with open_bytes(path) as file:
            check_kind(path, file.read(HEAD_BYTES), PARQUET)
            file.seek(0)
            is_packed = path.suffix.lower() == ".gz"
            source = pyarrow.BufferReader(file.read()) if is_packed else path
        with parquet.ParquetFile(source) as opened:
            check_header(path, opened.schema_arrow.names, names, "")
            table = opened.read(columns=list(dict.fromkeys(names)))
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    coded = {}
    for name in names:
        column, what = table.column(name), f"column {name!r} of {path}"
        element = _element_type(column.type)
        if _is_readable(column.type):
            coded[name] = _coded(column, what, encoding)
        elif element is not None and _is_readable(element) and name in lists:
            coded[name] = _joined(column, what, encoding, list_separator)
        else:
            raise DataError(f"{what} is {column.type}; allowed: {ALLOWED}")
    return coded


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


def _coded(column: Any, what: str, encoding: str) -> CodedTexts:
    """Code a column; each distinct value is converted to text once."""
    pyarrow = importlib.import_module("pyarrow")
    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pyarrow.types.is_timestamp(column.type):
        # Arrow stores instants in UTC, with a zone or without.
        seconds = column.cast(pyarrow.timestamp("s", tz=column.type.tz), safe=False)
        column = seconds.cast(pyarrow.int64()).cast(pyarrow.timestamp("s")).cast(pyarrow.string())
    chunks = column.dictionary_encode("encode").unify_dictionaries().chunks
    if not chunks:
        return CodedTexts(np.zeros(0, np.int64), [])
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in chunks]).astype(np.int64)
    values = chunks[0].dictionary.to_pylist()
    digits = _float_type(column.type)
    texts = []
    for code, value in enumerate(values):
        try:
            texts.append(_spelled(value, digits, encoding))
        except UnicodeDecodeError as error:
            row = int(np.argmax(codes == code)) + 1
            raise DataError(_undecodable(what, row, error, encoding)) from error
    return CodedTexts(codes, texts)


def _joined(column: Any, what: str, encoding: str, separator: str) -> CodedTexts:
    """Code a column of lists, the texts of their elements joined."""
    digits = _float_type(_element_type(column.type))
    code_by_text: dict[str, int] = {}
    codes = []
    for row, values in enumerate(column.to_pylist(), start=1):
        try:
            texts = [_spelled(value, digits, encoding) for value in values or ()]
        except UnicodeDecodeError as error:
            raise DataError(_undecodable(what, row, error, encoding)) from error
        for text in texts:
            if separator in text:
                raise DataError(
                    f"{what}, row {row} has the id {text!r}; list_separator {separator!r} is in it"
                )
        codes.append(code_by_text.setdefault(separator.join(texts), len(code_by_text)))
    return CodedTexts(np.array(codes, np.int64), list(code_by_text))


def _float_type(kind: Any) -> type[np.floating[Any]]:
    """Return the numpy type whose shortest decimal a float of the column has."""
    kinds = importlib.import_module("pyarrow").types
    if kinds.is_float16(kind):
        return np.float16
    return np.float32 if kinds.is_float32(kind) else np.float64


def _spelled(value: Any, float_type: type[np.floating[Any]], encoding: str) -> str:
    """Return a value as a text file has it."""
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
