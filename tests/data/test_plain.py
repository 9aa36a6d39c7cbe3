"""Arrow's reading of text gives the rows, the lines and the errors of ``csv``'s."""

import gzip
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.worlds import examples
from torchrec_kvshare.data import plain
from torchrec_kvshare.data.files import FileFormat
from torchrec_kvshare.data.tables import read_table
from torchrec_kvshare.errors import DataError

NAMES = ["a", "c"]
FORMATS = {
    "csv": FileFormat(),
    "quotes are text": FileFormat(quoting="none"),
    "semicolons": FileFormat(delimiter=";", missing=()),
    "no header": FileFormat(header=("c", "b", "a")),
    "ascii": FileFormat(encoding="ascii"),
    "latin-1": FileFormat(encoding="latin-1"),
}
FIELDS = st.sampled_from(["", "1", " x ", "é", '"', '"a,b"', '"a""b"', 'q"', "NULL", "a;b", "\0"])
LINES = st.lists(FIELDS, max_size=4).map(",".join) | st.lists(FIELDS, max_size=4).map(";".join)
GOOD = st.sampled_from(["1,2,3", "x,,y", ",,", " é ,b,c"])
ENDS = st.sampled_from(["\n", "\r\n", "\n", "\n\n", "\r", ""])


def read(path: Path, file_format: FileFormat) -> Any:
    """What a file holds, or the error."""
    try:
        table = read_table(path, NAMES, file_format)
    except DataError as error:
        return str(error)
    columns = {name: [ids[code] for code in codes] for name, (codes, ids) in table.columns.items()}
    return columns, table.positions.tolist(), table.num_misfits, table.misfits


def assert_same(path: Path, file_format: FileFormat, block_bytes: int) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "BLOCK_BYTES", block_bytes)
        found = read(path, file_format)
        patch.setattr(plain.Splitting, "may_be_plain", lambda _: False)
        assert found == read(path, file_format)
    return found


@examples(3)
@given(
    header=st.sampled_from(["a,b,c", "a;b;c", '"a",b,"c"', "\ufeffa,b,c", "", '"a\nb",b,c', "c,c"]),
    lines=st.lists(st.tuples(GOOD | GOOD | LINES, ENDS), max_size=12),
    file_format=st.sampled_from(list(FORMATS.values())),
    block_bytes=st.integers(1, 40),
)
def test_drawn_files_are_read_as_by_csv(
    tmp_path_factory: pytest.TempPathFactory,
    header: str,
    lines: list[tuple[str, str]],
    file_format: FileFormat,
    block_bytes: int,
) -> None:
    path = tmp_path_factory.getbasetemp() / "drawn.csv"
    path.write_bytes("\n".join([header, "".join(map("".join, lines))]).encode())
    assert_same(path, file_format, block_bytes)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize(
    ("rows", "num_rows"),
    [
        (b"1,2,3\n4,5,6\n7,8,9", 3),
        (b"1,2,3\r\n4,5,6\r\n", 2),
        (b"1,2,3\n\n4,5,6\n1,2\n\n\n7,8,9\n", 3),
        (b'1,2,3\n4,"5\n6,7",6\n8,9,8\n', 3),
        (b"1,2,3\r4,5,6\n", 2),
        (b"", 0),
    ],
)
def test_files_of_any_length_of_block(
    tmp_path: Path, rows: bytes, num_rows: int, ending: str
) -> None:
    path = tmp_path / f"log.csv{ending}"
    content = b"a,b,c\n" + rows
    path.write_bytes(gzip.compress(content) if ending else content)
    for block_bytes in (1, 2, 7, 100):
        _, positions, _, _ = assert_same(path, FileFormat(), block_bytes)
        assert len(positions) == num_rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1,\xff,3\n", "line 3: byte 0xff is not utf-8"),
        (b"1," + b"x" * 140_000 + b",3\n", "line 3: field larger than field limit"),
        (b'1,"2"3,4\n', "line 3: text follows the closing quote"),
    ],
)
def test_errors_are_those_of_csv(tmp_path: Path, content: bytes, message: str) -> None:
    """The bad value stands in a column that is not read."""
    path = tmp_path / "log.csv"
    path.write_bytes(b"a,b,c\n1,2,3\n" + content)
    for block_bytes in (8, 10**6):
        assert message in assert_same(path, FileFormat(), block_bytes)


def test_a_broken_gzip_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log.csv.gz"
    path.write_bytes(gzip.compress(b"a,b,c\n" + b"1,2,3\n" * 9999)[:-20])
    assert "cannot be read: Compressed file ended" in assert_same(path, FileFormat(), 100)
