"""Command-line options of a file reach its reader."""

from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.commands import composed
from torchrec_kvshare.config import TrainConfig, checked, literal_overrides
from torchrec_kvshare.data.files import FileFormat
from torchrec_kvshare.data.interactions import InteractionLog
from torchrec_kvshare.data.load import load_log
from torchrec_kvshare.errors import ConfigError, DataError


def load(path: Path, content: str, *overrides: str) -> InteractionLog:
    path.write_bytes(content.encode())
    data = f"data.path={path}" if path.name != "online_retail.csv" else f"data.root={path.parent}"
    kind = "interactions" if path.name != "online_retail.csv" else "online_retail"
    # As a pipeline does with what it gets from a shell.
    arguments = literal_overrides([f"data={kind}", data, *overrides, "output=never_written"])
    config = composed("train", *arguments)
    return load_log(checked(config, TrainConfig).data)


def test_the_defaults_of_the_config_are_those_of_the_reader(tmp_path: Path) -> None:
    for kind in ("interactions", "online_retail"):
        needed = "data.path=x" if kind == "interactions" else "data.root=x"
        config = checked(composed("train", f"data={kind}", needed, "output=o"), TrainConfig)
        values: dict[str, Any] = vars(config.data.format)
        as_tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        assert FileFormat(**as_tuples) == FileFormat()


@pytest.mark.parametrize(
    ("delimiter", "option"),
    [
        (";", ";"),
        ("|", "|"),
        ("\t", r"\t"),
        ("\t", '"\\t"'),
        ("\t", "'\t'"),
        (",", ","),
        (" ", "' '"),
    ],
)
def test_the_delimiter_is_an_option(tmp_path: Path, delimiter: str, option: str) -> None:
    content = "user_id,item_id,time\nu,i,1\n".replace(",", delimiter)
    log = load(tmp_path / "log.txt", content, f"data.format.delimiter={option}")
    assert (log.users.ids, log.items.ids) == (["u"], ["i"])


def test_every_option_of_a_format_reaches_the_reader(tmp_path: Path) -> None:
    content = '"Jos\u00e9|i|1430622004384\n-|j|1430622005384\nv|"k|1430622006384\n'
    path = tmp_path / "log.csv"
    config = composed(
        "train",
        "data=interactions",
        f"data.path={path}",
        "data.format.delimiter='|'",
        "data.format.quoting=none",
        "data.format.encoding=latin-1",
        "data.format.header=[user_id,item_id,time]",
        "data.format.missing=['-']",
        "data.columns.time_unit=ms",
        "output=never_written",
    )
    path.write_bytes(content.encode("latin-1"))
    log = load_log(checked(config, TrainConfig).data)
    assert (log.users.ids, log.items.ids) == (['"José', "v"], ["i", '"k'])
    assert log.time.tolist() == [1_430_622_004, 1_430_622_006]
    assert log.report.dropped == {"no user": 1}


def test_the_time_format_is_an_option(tmp_path: Path) -> None:
    content = "user_id,item_id,time\nu,i,01-12-2010 08:26\n"
    option = "data.columns.time_format='%d-%m-%Y %H:%M'"
    assert load(tmp_path / "log.csv", content, option).time.tolist() == [1_291_191_960]


def test_the_columns_of_a_file_without_a_header_may_be_called_by_their_numbers(
    tmp_path: Path,
) -> None:
    header = "data.format.header=[0,1,2]"
    named = ("data.columns.user=0", "data.columns.item=1", "data.columns.time=2")
    assert load(tmp_path / "log.csv", "u,i,7\n", header, *named).users.ids == ["u"]


@pytest.mark.parametrize("header", ["false", "no_list", "3", "null"])
def test_a_header_that_is_no_list_is_refused(tmp_path: Path, header: str) -> None:
    with pytest.raises(ConfigError, match=r"^data\.format\.header: "):
        load(tmp_path / "log.csv", "user_id,item_id,time\n", f"data.format.header={header}")


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("data.format.delimiter=ab", "data.format.delimiter is 'ab'"),
        ("data.format.quoting=single", "data.format.quoting is 'single'"),
        ("data.format.encoding=utf-9", "data.format.encoding is 'utf-9'"),
        ("data.columns.time_unit=days", "data.columns.time_unit is 'days'"),
        ("data.columns.time_format='%Q'", "data.columns.time_format '%Q'"),
        ("data.columns.item_attributes=[action]", r"item columns are named \['action'\]"),
    ],
)
def test_what_cannot_work_is_refused_before_the_file_is_read(
    tmp_path: Path, option: str, named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        load(tmp_path / "log.csv", "not a log", option)


def test_online_retail_takes_a_format(tmp_path: Path) -> None:
    header = "InvoiceNo;StockCode;Quantity;InvoiceDate;UnitPrice;CustomerID;Country"
    content = f"{header}\n5;85123A;6;2010-12-01 08:26:00;2.55;17850.0;France\n"
    path = tmp_path / "online_retail.csv"
    assert load(path, content, "data.format.delimiter=;").users.ids == ["17850"]
    with pytest.raises(DataError, match="column 'InvoiceNo' is not in"):
        load(path, content)
