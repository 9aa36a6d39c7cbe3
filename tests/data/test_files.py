"""Real-world files: delimiters, quotes, encodings, headers, and files of another kind."""

import csv
import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrec_kvshare.data.files import FileFormat
from torchrec_kvshare.data.interactions import ColumnMapping, InteractionLog, read_interactions
from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.features.ids import canonical_id

COLUMNS = ColumnMapping("user", "item", "time")
TITLED = ColumnMapping("user", "item", "time", item_attributes=("title",))
LINES = ["user,item,time", "ann,7,5", "bob,8,6"]


def read(path: Path, content: bytes | str, file_format: FileFormat | None = None) -> InteractionLog:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_interactions(path, COLUMNS, file_format)


def decoded(log: InteractionLog) -> list[tuple[str, str, int]]:
    users = [log.users.ids[code] for code in log.users.codes]
    items = [log.items.ids[code] for code in log.items.codes]
    return list(zip(users, items, log.time.tolist(), strict=True))


# --- delimiters and headers


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|", " ", "\x01"])
@pytest.mark.parametrize("name", ["log.csv", "log.tsv", "log.txt", "u.data", "log.data.gz", "log"])
def test_any_character_may_stand_between_fields(tmp_path: Path, delimiter: str, name: str) -> None:
    content = "\n".join(LINES).replace(",", delimiter).encode()
    content = gzip.compress(content, mtime=0) if name.endswith(".gz") else content
    log = read(tmp_path / name, content, FileFormat(delimiter))
    assert decoded(log) == [("ann", "7", 5), ("bob", "8", 6)]


@pytest.mark.parametrize("delimiter", ["", "::", '"', "\n", "\r"])
def test_a_delimiter_that_is_no_single_character_is_refused(delimiter: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.format\.delimiter is .*; one character"):
        FileFormat(delimiter)


def test_a_wrong_delimiter_is_named_with_the_columns_it_gives(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"it has: user;item;time\. Fields are split at ','"):
        read(tmp_path / "log.csv", "user;item;time\nu;i;1\n")


@pytest.mark.parametrize("name", ["log.csv", "log.tsv"])
def test_a_file_without_a_header_is_read_by_the_names_given(tmp_path: Path, name: str) -> None:
    content = "196,242,3,5\n186,302,3,6\n".replace(",", "\t" if "tsv" in name else ",")
    log = read(tmp_path / name, content, FileFormat(header=("user", "item", "stars", "time")))
    assert decoded(log) == [("196", "242", 5), ("186", "302", 6)]
    assert log.report.rows_read == 2


def test_a_missing_header_is_among_the_advice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.format\.header names the columns of a file with"):
        read(tmp_path / "log.csv", "196,242,3\n")


def test_space_round_a_name_in_a_header_is_no_part_of_it(tmp_path: Path) -> None:
    assert decoded(read(tmp_path / "log.csv", "user, item , time\nu, 7, 5\n")) == [("u", "7", 5)]


def test_a_header_that_does_not_fit_the_rows_is_counted(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no row .*: wrong number of fields 1"):
        read(tmp_path / "log.csv", "1,2,3,4\n", FileFormat(header=("user", "item", "time")))


def test_a_header_with_a_name_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.format\.header names a column twice: \['a', 'a'"):
        FileFormat(header=("a", "a"))


@pytest.mark.parametrize("given", [{"delimiter": ";"}, {"quoting": "none"}, {"header": ("user",)}])
def test_what_only_text_has_is_refused_for_parquet(
    tmp_path: Path, given: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match=r"which only text files have; .*log\.parquet is Parquet"):
        read(tmp_path / "log.parquet", b"", FileFormat(**given))


# --- quotes


def test_a_quote_in_a_tsv_is_text(tmp_path: Path) -> None:
    """Two titles that began with a quote took in the rows between them: 2 of 4 were left."""
    rows = ['u\t1\t1\t"Oops', "u\t2\t2\tfine", 'u\t3\t3\t"Oops', "u\t4\t4\tfine"]
    path = tmp_path / "log.tsv"
    path.write_text("\n".join(["user\titem\ttime\ttitle", *rows]))
    log = read_interactions(path, TITLED)
    assert log.item_attributes["title"] == [('"Oops',), ("fine",), ('"Oops',), ("fine",)]
    assert (log.report.rows_read, log.report.rows_kept) == (4, 4)


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        (['u,1,1,"Oops', "u,2,2,fine", 'u,3,3,"Oops', "u,4,4,fine"], 2),
        (["u,1,1,fine", 'u,2,2,"Oops', "u,3,3,fine"], 3),
        (['u,1,1,"Oops', "u,2,2,fine", 'u,3,3,"a title, quoted"'], 2),
        (['u,1,1,"Oops', 'u,2,2,5" disk'], 2),
        (['u,1,1,"Oops', 'u,2,2,5"', "u,3,3,fine"], 2),
        (['u,1,1,"Oops', "u,2,2,fine", 'u,3,3,5"', "u,4,4,fine"], 2),
        (['u,1,1,"Oops', "", "u,2,2", 'u,3,3,5"', "u,4,4,fine"], 2),
        (["u,1,1,fine", '"u,2,2,fine', 'v",3,3,fine'], 3),
        (['u,1,1,"said "hello" twice"'], 2),
    ],
)
def test_a_stray_quote_is_an_error_with_its_line(
    tmp_path: Path, rows: list[str], line: int
) -> None:
    """The rows up to the next quote were read as one field and not counted."""
    path = tmp_path / "log.csv"
    path.write_text("\n".join(["user,item,time,title", *rows, ""]))
    with pytest.raises(DataError, match=rf"log\.csv, line {line}: .*data\.format\.quoting=none"):
        read_interactions(path, TITLED)
    assert read_interactions(path, COLUMNS, FileFormat(quoting="none")).report.rows_kept >= 1


def test_a_quoted_field_may_hold_line_ends_delimiters_and_quotes(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    titles = ["one\ntwo", "a\nc, d, e, f", 'say ""x""\r\n, more', "", 'an inch is 1""']
    rows = [f'u,{item},{item},"{title}"' for item, title in enumerate(titles)]
    path.write_bytes("\n".join(["user,item,time,title", *rows, 'u,9,9,12" disk', ""]).encode())
    log = read_interactions(path, TITLED)
    assert [values[:1] for values in log.item_attributes["title"]] == [
        *[(title.replace('""', '"'),) for title in titles[:3]],
        (),
        ('an inch is 1"',),
        ('12" disk',),
    ]


@pytest.mark.parametrize("name", ["log.csv", "log.tsv"])
def test_quoting_is_an_option(tmp_path: Path, name: str) -> None:
    delimiter = "\t" if "tsv" in name else ","
    content = f'user,item,time\n"a{delimiter}b",1,1\n"c",2,2\n'.replace(",", delimiter)
    log = read(tmp_path / name, content, FileFormat(quoting="double"))
    assert log.users.ids == [f"a{delimiter}b", "c"]
    log = read(tmp_path / name, content, FileFormat(quoting="none"))
    assert log.users.ids == ['"c"']
    assert log.report.dropped == {"wrong number of fields": 1}


def test_an_unknown_quoting_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.format\.quoting is 'all'; allowed: double, none"):
        FileFormat(quoting="all")


TITLES = st.text(st.sampled_from('ab ,"\n\r'), max_size=8)


@given(st.lists(TITLES, min_size=1, max_size=5))
def test_whatever_a_writer_quotes_is_read(
    tmp_path_factory: pytest.TempPathFactory, titles: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "titles.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerow(("user", "item", "time", "title"))
        csv.writer(file).writerows(("u", f"i{row}", row, title) for row, title in enumerate(titles))
    log = read_interactions(path, TITLED)
    assert log.report.rows_kept == len(titles)
    kept = [canonical_id(title) for title in titles]
    assert log.item_attributes["title"] == [(title,) if title else () for title in kept]


# --- encodings


@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
def test_bytes_of_another_encoding_are_refused_by_line(tmp_path: Path, name: str) -> None:
    """José and Josè of a latin-1 file both became Jos?, silently one user."""
    content = "user,item,time\nann,i,1\nJosé,i,2\nJosè,i,3\n".encode("latin-1")
    content = gzip.compress(content, mtime=0) if name.endswith(".gz") else content
    expected = rf"{name}, line 3: byte 0xe9 is not utf-8; data\.format\.encoding says"
    with pytest.raises(DataError, match=expected):
        read(tmp_path / name, content)
    log = read(tmp_path / name, content, FileFormat(encoding="latin-1"))
    assert log.users.ids == ["ann", "José", "Josè"]


def test_a_bad_byte_far_into_a_file_is_named_by_its_line(tmp_path: Path) -> None:
    rows = b"".join(b"u,i,%d\r\n" % row for row in range(50_000))
    with pytest.raises(DataError, match=r"line 50002: byte 0xff is not utf-8"):
        read(tmp_path / "log.csv", b"user,item,time\r\n" + rows + b"\xff,i,1\r\n")


def test_a_file_cut_inside_a_character_is_refused(tmp_path: Path) -> None:
    content = "user,item,time\nu,i,1\nv,i,2é".encode()[:-1]
    with pytest.raises(DataError, match=r"line 3: the last character is not utf-8"):
        read(tmp_path / "log.csv", content)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "UTF8", "cp1252", "utf-16", "utf-32"])
def test_encodings_are_read_by_name(tmp_path: Path, encoding: str) -> None:
    content = "user,item,time\nJosé,i,1\n".encode(encoding)
    assert read(tmp_path / "l.csv", content, FileFormat(encoding=encoding)).users.ids == ["José"]


def test_a_mark_before_quoted_utf_8_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf"user","item","time"\nu,i,1\n'
    assert read(tmp_path / "log.csv", content).users.ids == ["u"]


@pytest.mark.parametrize("encoding", ["latin-0", "hex", ""])
def test_an_unknown_encoding_is_refused(encoding: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.format\.encoding is '.*'; allowed"):
        FileFormat(encoding=encoding)


# --- missing values


@pytest.mark.parametrize("missing", ["", " ", "NULL", "null", r"\N", "nan", "NaN", "None", "<NA>"])
def test_texts_that_mean_missing_are_no_ids(tmp_path: Path, missing: str) -> None:
    """A user NULL got the events of all unknown users."""
    log = read(tmp_path / "log.csv", f"user,item,time\nu,i,1\n{missing},i,2\nu, {missing},3\n")
    assert log.report.dropped == {"no user": 1, "no item": 1}


def test_what_means_missing_is_an_option(tmp_path: Path) -> None:
    content = "user,item,time\nNULL,i,1\n-1,i,2\nu,i,3\n,i,4\n"
    log = read(tmp_path / "log.csv", content, FileFormat(missing=("-1",)))
    assert log.users.ids == ["NULL", "u"]
    assert log.report.dropped == {"no user": 2}


def test_missing_values_are_missing_in_every_column(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    rows = ["u,i,1,NULL,NULL,NULL,5", r"u,i,2,b,2.5,\N,5", "u,j,nan,c,1,AT,5", "u,k,4,d,1,AT,None"]
    path.write_text("\n".join(["user,item,time,tag,price,land,stars", *rows]))
    columns = ColumnMapping(
        user="user",
        item="item",
        time="time",
        label="stars>1",
        item_attributes=("tag",),
        item_floats=("price",),
        user_attributes=("land",),
    )
    log = read_interactions(path, columns)
    assert log.report.dropped == {"bad time": 1, "bad label": 1}
    assert log.item_attributes == {"tag": [("b",)]}
    assert log.item_floats["price"].tolist() == [2.5]
    assert log.report.bad_floats == {}
    assert log.user_attributes == {"land": [()]}


# --- files of another kind


def packed(kind: str) -> bytes:
    """A log inside an archive."""
    content, buffer = "\n".join(LINES).encode(), io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("log.csv", content)
    elif kind == "tar":
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            info = tarfile.TarInfo("log.csv")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (packed("zip"), "a zip archive"),
        (packed("tar"), "a tar archive"),
        (gzip.compress(b"user,item,time\n", mtime=0), "a gzip file"),
        (b"PAR1\x15\x04\x15", "a Parquet file"),
        ("user,item,time\nu,i,1".encode("utf-16"), r"UTF-16 text \(data.format.encoding=utf-16 "),
        (
            "user,item,time\nu,i,1".encode("utf-16-le"),
            "not text, or UTF-16 without a byte order",
        ),
        (b"SQLite format 3\0", "an SQLite database"),
    ],
)
@pytest.mark.parametrize("name", ["log.csv", "log.tsv.gz"])
def test_a_file_of_another_kind_is_named_and_its_bytes_are_not_shown(
    tmp_path: Path, content: bytes, kind: str, name: str
) -> None:
    content = gzip.compress(content, mtime=0) if name.endswith(".gz") else content
    with pytest.raises(DataError, match=rf"{name} cannot be read: it is {kind}") as error:
        read(tmp_path / name, content)
    assert str(error.value).isascii()
    assert "\\x" not in str(error.value)


@pytest.mark.parametrize("name", ["log.csv.gz", "log.parquet", "log.parquet.gz"])
def test_a_zip_archive_under_any_ending_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"{name} cannot be read: it is a zip archive"):
        read(tmp_path / name, packed("zip"))


def test_text_that_is_not_gzipped_is_named_without_its_bytes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"it is text; expected a gzip file$"):
        read(tmp_path / "log.csv.gz", "user,item,time\n")
