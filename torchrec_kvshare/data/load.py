"""Load what a data config describes: its interaction log, or its shards."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torchrec_kvshare.config import (
    CompleteJourneyData,
    DataConfig,
    Format,
    InteractionsData,
    MovieLensData,
    OnlineRetailData,
    PreparedData,
)
from torchrec_kvshare.data.dataset import NO_MAPS, build_dataset, keep_users
from torchrec_kvshare.data.files import FileFormat
from torchrec_kvshare.data.interactions import ColumnMapping, InteractionLog, read_interactions
from torchrec_kvshare.data.presets import (
    completejourney_folder,
    read_completejourney,
    read_movielens,
    read_online_retail,
)
from torchrec_kvshare.data.shards import (
    Shards,
    in_memory,
    num_prepared_users,
    open_prepared,
    prepared_rule,
    read_prepared_log,
)
from torchrec_kvshare.data.sources import source_files
from torchrec_kvshare.data.splits import BY_TIME_SHARE, SplitRule
from torchrec_kvshare.data.synthetic import synthetic_world
from torchrec_kvshare.data.times import TimeFormat
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.schema import FeatureSchema, History, IdMap


def load_shards(
    data: DataConfig,
    histories: Sequence[History],
    max_users: int | None = None,
    id_maps: Mapping[str, IdMap] = NO_MAPS,
    rule: SplitRule | None = None,
    schema: FeatureSchema | None = None,
) -> Shards:
    """Load a log as shards: a prepared folder as its shards, any other log as one.

    Args:
        data: one of the data configs.
        histories: the histories that the model reads.
        max_users: number of users to keep, as ``first_users`` chooses them; None for all. Those
            of a prepared folder are read into memory, unless they are all of its users.
        id_maps: as in ``build_dataset``.
        rule: how the events are split; None: as those of a prepared folder are, else
            ``time_share``.
        schema: as in ``build_dataset``.

    Raises:
        ConfigError: if a format, a label rule, a column name or a history cannot work, or a
            folder was prepared with another split.
        DataError: if the files are not what the config says, or have other columns than the schema.
        MissingExtraError: if a Parquet file cannot be read without pyarrow.
    """
    if isinstance(data, PreparedData):
        path = Path(data.path)
        rule = _rule_of_folder(path, rule)
        if max_users is None or max_users >= num_prepared_users(path):
            return open_prepared(path, histories, id_maps, schema)
        log = read_prepared_log(path, max_users)
        return in_memory(build_dataset(log, histories, id_maps, rule, schema))
    rule = rule or BY_TIME_SHARE
    log = load_log(data)
    if max_users is not None:
        log = keep_users(log, max_users, rule)
    return in_memory(build_dataset(log, histories, id_maps, rule, schema))


def _rule_of_folder(path: Path, wanted: SplitRule | None) -> SplitRule:
    rule = prepared_rule(path)
    if wanted is not None and wanted != rule:
        raise ConfigError(
            f"{path} was prepared with {rule}, and {wanted} is asked for; set {rule}, or prepare "
            f"the log with {wanted}"
        )
    return rule


def load_log(data: DataConfig) -> InteractionLog:
    """Read or generate the interaction log that a config describes.

    Args:
        data: one of the data configs.

    Returns:
        The log; its report says what was dropped and why.

    Raises:
        ConfigError: if a format, a label rule or a column name cannot work.
        DataError: if the files are not what the config says.
        MissingExtraError: if a data set or pyarrow is not installed.
    """
    if isinstance(data, OnlineRetailData):
        return read_online_retail(Path(data.root), file_format_of(data.format))
    if isinstance(data, MovieLensData):
        return read_movielens(Path(data.root), data.positive_rating)
    if isinstance(data, CompleteJourneyData):
        return read_completejourney(root_of(data))
    if isinstance(data, PreparedData):
        return read_prepared_log(Path(data.path), None)
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


def root_of(data: OnlineRetailData | MovieLensData | CompleteJourneyData) -> Path:
    """Return the folder of a data set's files.

    Raises:
        MissingExtraError: if it is that of a package that is not installed.
    """
    return completejourney_folder() if data.root is None else Path(data.root)


def mapping_of(data: InteractionsData) -> ColumnMapping:
    """Return the columns of a log by their role."""
    columns = data.columns
    return ColumnMapping(
        user=columns.user,
        item=columns.item,
        time=columns.time,
        action=columns.action,
        event_attributes=tuple(columns.event_attributes),
        label=data.label,
        item_attributes=tuple(columns.item_attributes),
        item_floats=tuple(columns.item_floats),
        user_attributes=tuple(columns.user_attributes),
        request_attributes=tuple(columns.request_attributes),
        user_floats=tuple(columns.user_floats),
        request_floats=tuple(columns.request_floats),
        event_floats=tuple(columns.event_floats),
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
