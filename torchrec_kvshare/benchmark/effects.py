"""Requests of a trained model's own data, and records of what fewer bits do to their scores."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from torchrec_kvshare.benchmark.options import DataOptions, Options
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.data.load import load_shards
from torchrec_kvshare.data.requests import make_targeted_requests
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import ITEM, UNKNOWN_ROW, FeatureSchema, Vocabulary
from torchrec_kvshare.features.tensors import FLOAT32

UNIT_BY_METRIC = {
    "auc": "auc",
    "auc_change": "auc",
    "top10_overlap": "share",
    "max_score_difference": "probability",
    "bytes_ratio": "x",
}


@dataclass
class EffectOptions(Options, DataOptions):
    """Options of a scenario that scores requests of the data that a model was trained on.

    Raises:
        ConfigError: if ``candidates`` is not one number.
    """

    candidates: list[int] = field(default_factory=lambda: [500])  # one number

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.candidates) != 1 or self.candidates[0] < 2:
            raise ConfigError(f"candidates is {self.candidates}; it must be one number, at least 2")

    @property
    def num_candidates(self) -> int:
        """Candidates of every request."""
        return self.candidates[0]


def targeted_requests(
    options: EffectOptions, schema: FeatureSchema
) -> Iterator[tuple[Request, int]]:
    """Make requests of test events, each with the index of the event's item among the candidates.

    Args:
        options: which data, how many requests and candidates, and the seed.
        schema: the model's columns.

    Raises:
        ConfigError: if the model knows too few items of the data, or it has too few candidates.
        DataError: if the data cannot be read.
        RequestError: if the data lacks a column of the model.
    """
    shards = load_shards(options.data, schema.histories)
    _check_known(schema, shards, options.data.name)
    for raw, target in make_targeted_requests(
        shards, options.requests, options.num_candidates, options.seed
    ):
        yield parse_request(raw, schema), target


def effect_records(
    scenario: str,
    key: str,
    auc: float,
    figures_by_name: Mapping[str, Mapping[str, float]],
    case: Case,
) -> list[Record]:
    """Return the AUC of the exact scores, and the figures of everything compared with them.

    Args:
        scenario: its name.
        key: key of the case that says what is compared.
        auc: of the exact scores.
        figures_by_name: as ``effect_figures`` gives them, by codec or dtype.
        case: the rest of the case.
    """

    def record(name: str, metric: str, value: float) -> Record:
        own: Case = {"path": name, key: name}
        return Record(scenario, own | case, metric, value, unit=UNIT_BY_METRIC[metric])

    return [
        record(FLOAT32, "auc", auc),
        *(
            record(name, metric, value)
            for name, figures in figures_by_name.items()
            for metric, value in figures.items()
        ),
    ]


def _check_known(schema: FeatureSchema, shards: Shards, data_name: str) -> None:
    """Refuse data whose items the model does not know: its scores of them mean nothing."""
    known = schema.vocabulary_by_column[ITEM]
    if not isinstance(known, Vocabulary):
        return  # Hashed ids: no list says what was trained.
    num_known = known.codes.size
    num_shared = np.count_nonzero(known.rows_of_ids(shards.shared.log.items.ids) != UNKNOWN_ROW)
    if 2 * num_shared < num_known:
        raise ConfigError(
            f"data {data_name} has {num_shared} of the {num_known} items that the model knows; "
            "at least half are needed: is it what the model was trained on?"
        )
