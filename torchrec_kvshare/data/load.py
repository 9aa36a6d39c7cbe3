"""Load the interaction log that a data config describes."""

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
from torchrec_kvshare.data.sources import source_files
from torchrec_kvshare.data.synthetic import synthetic_world
from torchrec_kvshare.data.times import TimeFormat


def load_log(data: DataConfig) -> InteractionLog:
    """Read or generate the interaction log that a config describes.

    Args:
        data: one of the data configs.

    Returns:
        The log; its report says what was dropped and why.

    Raises:
        ConfigError: if a format, the label rule or a column name cannot work.
        DataError: if the files are not what the config says.
    """
    if isinstance(data, OnlineRetailData):
        return read_online_retail(Path(data.root), file_format_of(data.format))
    if isinstance(data, MovieLensData):
        return read_movielens(Path(data.root), data.positive_rating)
    if isinstance(data, InteractionsData):
        files = source_files(data.path)
        return read_interactions(files, mapping_of(data), file_format_of(data.format))
    return synthetic_world(
        num_users=data.num_users,
        events_per_user=data.events_per_user,
        num_items=data.num_items,
        num_categories=data.num_categories,
        seed=data.seed,
    )


def mapping_of(data: InteractionsData) -> ColumnMapping:
    """Return the columns of a log by their role."""
    columns = data.columns
    return ColumnMapping(
        user=columns.user,
        item=columns.item,
        time=columns.time,
        action=columns.action,
        label=data.label,
        item_attributes=tuple(columns.item_attributes),
        item_floats=tuple(columns.item_floats),
        user_attributes=tuple(columns.user_attributes),
        list_separator=columns.list_separator,
        time_format=TimeFormat(columns.time_unit, columns.time_format),
    )


def file_format_of(values: Format) -> FileFormat:
    """Return how a log's files are written."""
    return FileFormat(
        # A tab is hard to write in a shell and in YAML.
        delimiter="\t" if values.delimiter == r"\t" else values.delimiter,
        quoting=values.quoting,
        encoding=values.encoding,
        header=tuple(values.header),
        missing=tuple(values.missing),
    )
