"""Open log files: check the kind of a file, decode its text and split it into rows.

An undecodable byte or a stray quote is an error that names its line, because everything read after
it could be wrong.
"""

import codecs
import csv
import gzip
import hashlib
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TextIO

from torchrec_kvshare.errors import ConfigError, DataError

# What databases, pandas and Python write for a missing value. Not "NA", which is also Namibia.
MISSING = ("NULL", "null", r"\N", "nan", "NaN", "None", "<NA>")
DELIMITER_BY_ENDING = {".csv": ",", ".tsv": "\t"}
QUOTINGS = ("double", "none")
MIN_COLUMNS_OF_A_ROW = 3  # user, item and time; a log has at least these
MAX_SHOWN_COLUMNS = 400  # characters of a header in a message

HEAD_BYTES = 512  # enough to tell the kind of a file
CHUNK_BYTES = 1 << 20  # digested at a time: a file may be larger than memory
TEXT, GZIP, PARQUET = "text", "a gzip file", "a Parquet file"
UTF16 = "UTF-16 text (data.format.encoding=utf-16 reads it)"
KIND_BY_MAGIC = {
    b"PK\x03\x04": "a zip archive, as .xlsx files are too",
    b"\x1f\x8b": GZIP,
    b"PAR1": PARQUET,
    b"\xff\xfe": UTF16,
    b"\xfe\xff": UTF16,
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\0": "an xz file",
    b"7z\xbc\xaf": "a 7z archive",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\xd0\xcf\x11\xe0": "an old Excel file",
    b"SQLite format 3\0": "an SQLite database",
    b"ARROW1": "a Feather file",
    b"Obj\x01": "an Avro file",
    b"\x89HDF": "an HDF5 file",
    b"\x80\x04\x95": "a Python pickle",
}

_LINE_END = re.compile("\r\n|\r|\n")


@dataclass(frozen=True)
class FileFormat:
    """How a file is written.

    Args:
        delimiter: the character between fields; None: a comma in ``.csv``, a tab in ``.tsv``.
        quoting: "double": a field in double quotes may hold anything, with its quotes doubled;
            "none": quotes are text. None: "none" for tab-separated fields, else "double".
        encoding: of text, and of Parquet's binary columns.
        header: the names of the columns; empty: the first row has them.
        missing: texts that mean no value, besides the empty text.

    Raises:
        ConfigError: naming the value that cannot work.
    """

    delimiter: str | None = None
    quoting: str | None = None
    encoding: str = "utf-8"
    header: tuple[str, ...] = ()
    missing: tuple[str, ...] = MISSING

    def __post_init__(self) -> None:
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise ConfigError(
                f"data.format.delimiter is {self.delimiter!r}; one character is allowed, and "
                "neither a quote nor a line end"
            )
        if self.quoting not in (None, *QUOTINGS):
            raise ConfigError(
                f"data.format.quoting is {self.quoting!r}; allowed: {', '.join(QUOTINGS)}"
            )
        if len(set(self.header)) < len(self.header):
            raise ConfigError(f"data.format.header names a column twice: {list(self.header)}")
        try:
            b"a".decode(self.encoding, "ignore")
        except (LookupError, ValueError) as error:
            raise ConfigError(
                f"data.format.encoding is {self.encoding!r}; allowed are Python's names of text "
                "encodings, such as utf-8, latin-1, cp1252"
            ) from error

    def splitting(self, ending: str) -> tuple[str, str]:
        """Return the delimiter and the quoting, with the defaults of a file's ending."""
        delimiter = self.delimiter or DELIMITER_BY_ENDING[ending]
        return delimiter, self.quoting or ("none" if delimiter == "\t" else "double")


@contextmanager
def open_text(path: Path, encoding: str) -> Iterator[TextIO]:
    """Open a text file, gzipped or not.

    Args:
        path: the file.
        encoding: its encoding; a UTF-8 byte order mark is skipped.

    Yields:
        The open file, its line ends untouched.

    Raises:
        DataError: if it is missing, broken, not text or in another encoding, also while it is read.
    """
    encoding = "utf-8-sig" if codecs.lookup(encoding).name == "utf-8" else encoding
    try:
        with reading(path), open_bytes(path) as file:
            check_kind(path, file.read(HEAD_BYTES), TEXT, encoding)
            file.seek(0)
            with io.TextIOWrapper(file, encoding, newline="") as text:
                yield text
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, {_first_undecodable(path, encoding)} is not {encoding.removesuffix('-sig')}; "
            "data.format.encoding says what it is, such as latin-1"
        ) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise a DataError for what the system or a packed file says while a file is read."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}") from error


@contextmanager
def open_bytes(path: Path) -> Iterator[BinaryIO]:
    """Open a file, unpacked if it ends in ``.gz``.

    Raises:
        DataError: if a ``.gz`` file is not gzipped.
    """
    with path.open("rb") as file:
        if path.suffix.lower() != ".gz":
            yield file
            return
        check_kind(path, file.read(HEAD_BYTES), GZIP)
        file.seek(0)
        with gzip.open(file) as unpacked:
            yield unpacked  # type: ignore[misc]


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_kind(path: Path, head: bytes, expected: str, encoding: str = "utf-8") -> None:
    """Check the kind of a file by its first bytes.

    Args:
        path: the file, for messages.
        head: its first bytes.
        expected: ``TEXT``, ``GZIP`` or ``PARQUET``.
        encoding: of text.

    Raises:
        DataError: if it is of another kind.
    """
    kind = next((kind for magic, kind in KIND_BY_MAGIC.items() if head.startswith(magic)), TEXT)
    has_wide_characters = codecs.lookup(encoding).name.startswith(("utf-16", "utf-32"))
    if has_wide_characters and kind == UTF16:
        kind = TEXT
    if head[257:262] == b"ustar":
        kind = "a tar archive"
    elif kind == TEXT and not has_wide_characters and b"\0" in head:
        kind = "not text, or UTF-16 without a byte order mark: it holds NUL bytes"
    if kind != expected:
        raise DataError(f"{path} cannot be read: it is {kind}; expected {expected}")


def text_rows(
    path: Path, lines: TextIO, delimiter: str, quoting: str
) -> Iterator[tuple[int, list[str]]]:
    """Split text into rows of fields; blank lines are skipped.

    Args:
        path: the file, for messages.
        lines: its text.
        delimiter: the character between fields.
        quoting: "double" or "none".

    Yields:
        The line number at which each row begins, and its fields.

    Raises:
        DataError: naming the line of a stray quote or of a field that is too long.
    """
    if quoting == "none":
        reader = csv.reader(lines, delimiter=delimiter, quoting=csv.QUOTE_NONE)
    else:
        reader = csv.reader(lines, delimiter=delimiter, strict=True)
    advice = "; where quotes are text, set data.format.quoting=none" if quoting != "none" else ""
    last, width = 0, 0
    try:
        for row in reader:
            first, last = last + 1, reader.line_num
            if not row:
                continue
            width = width or len(row)
            if last > first and _is_swallowed(row, delimiter, width):
                raise DataError(
                    f"{path}, line {first}: a quoted field goes on to line {last}, but both lines "
                    f"are rows of {width} fields by themselves: a stray quote{advice}"
                )
            yield first, row
    except csv.Error as error:
        came = str(error)
        if came == "unexpected end of data":
            came = "a quote is never closed"
        elif "expected after" in came:
            came = f"text follows the closing quote of a field (found by line {reader.line_num})"
        raise DataError(f"{path}, line {last + 1}: {came}{advice}") from error


def check_header(path: Path, header: Sequence[str], names: Sequence[str], advice: str) -> None:
    """Check that a file has each of the wanted columns exactly once.

    Args:
        path: the file, for messages.
        header: the names of its columns.
        names: the columns to read.
        advice: what to do about a missing column, for messages.

    Raises:
        DataError: naming the first column that does not appear exactly once.
    """
    for name in names:
        if header.count(name) != 1:
            came = "not" if name not in header else f"{header.count(name)} times"
            has = ", ".join(header)[:MAX_SHOWN_COLUMNS] or "no column"
            raise DataError(f"column {name!r} is {came} in {path}; it has: {has}{advice}")


def _is_swallowed(row: Sequence[str], delimiter: str, width: int) -> bool:
    """Return whether the first and last line of a multi-line row are rows by themselves.

    This happens where a stray quote opens in one row and another closes in a later one. Lines of
    free text with as many fields differ in that they have no number in the same column, as rows of
    a log do.
    """
    lines = _LINE_END.split(delimiter.join(row))
    first, last = lines[0].split(delimiter), lines[-1].split(delimiter)
    if width < MIN_COLUMNS_OF_A_ROW or len(first) != width or len(last) != width:
        return False
    pairs = zip(first, last, strict=True)
    return any(
        above.strip()[:1].isdigit() and below.strip()[:1].isdigit() for above, below in pairs
    )


def _first_undecodable(path: Path, encoding: str) -> str:
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    with open_bytes(path) as file:
        for block in file:
            try:
                line += len(_LINE_END.findall(decoder.decode(block)))
            except UnicodeDecodeError as error:
                before = error.object[: error.start].decode(encoding, "ignore")
                line += len(_LINE_END.findall(before))
                return f"line {line}: byte 0x{error.object[error.start]:02x}"
    return f"line {line}: the last character"
