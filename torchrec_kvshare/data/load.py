"""From a data config to its interaction log."""

from pathlib import Path

from torchrec_kvshare.config import (
    DataConfig,
    Format,
    InteractionsData,
    MovieLensData,
    OnlineRetailData,
)
from torchrec_kvshare.data.files import FileFormat
from torchrec_kvshare.data.interactions import ColumnMapping, InteractionLog, read_interactions
from torchrec_kvshare.data.presets import read_movielens, read_online_retail
from torchrec_kvshare.data.synthetic import synthetic_world
from torchrec_kvshare.data.times import TimeFormat


def load_log(data: DataConfig) -> InteractionLog:
    """Read, or make, the interactions that a config asks for.

    Args:
        data: one of the data configs.

    Returns:
        The log; its report says what was dropped and why.

    Raises:
        ConfigError: if the config describes no file or no columns.
        DataError: if the files are not what the config says.
    """
    if isinstance(data, OnlineRetailData):
        return read_online_retail(Path(data.root), _file_format(data.format))
    if isinstance(data, MovieLensData):
        return read_movielens(Path(data.root), data.positive_rating)
    if isinstance(data, InteractionsData):
        columns = data.columns
        mapping = ColumnMapping(
            columns.user,
            columns.item,
            columns.time,
            columns.action,
            data.label,
            tuple(columns.item_attributes),
            tuple(columns.item_floats),
            tuple(columns.user_attributes),
            columns.list_separator,
            TimeFormat(columns.time_unit, columns.time_format),
        )
        return read_interactions(Path(data.path), mapping, _file_format(data.format))
    return synthetic_world(
        data.num_users, data.events_per_user, data.num_items, data.num_categories, data.seed
    )


def _file_format(values: Format) -> FileFormat:
    # A shell and YAML both make it hard to write a tab.
    delimiter = "\t" if values.delimiter == r"\t" else values.delimiter
    header, missing = tuple(values.header), tuple(values.missing)
    return FileFormat(delimiter, values.quoting, values.encoding, header, missing)
