"""From a data config to its interaction log."""

from pathlib import Path

from torchrec_kvshare.config import (
    DataConfig,
    InteractionsData,
    MovieLensData,
    OnlineRetailData,
)
from torchrec_kvshare.data.interactions import ColumnMapping, InteractionLog, read_interactions
from torchrec_kvshare.data.presets import read_movielens, read_online_retail
from torchrec_kvshare.data.synthetic import synthetic_world


def load_log(data: DataConfig) -> InteractionLog:
    """Read, or make, the interactions that a config asks for.

    Args:
        data: one of the data configs.

    Returns:
        The log; its report says what was dropped and why.

    Raises:
        DataError: if the files are not what the config says.
    """
    if isinstance(data, OnlineRetailData):
        return read_online_retail(Path(data.root))
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
        )
        return read_interactions(Path(data.path), mapping)
    return synthetic_world(
        data.num_users, data.events_per_user, data.num_items, data.num_categories, data.seed
    )
