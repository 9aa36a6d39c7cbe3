"""What embedding tables in fewer bits do to a trained model's scores, and how many bytes they take.

The requests and measures are those of ``codec_benchmark``. Nothing is timed.
"""

from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch

from torchrec_kvshare.benchmark.plan import Plan, Sizes
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.scenarios.codec import (
    UNIT_BY_METRIC,
    Effect,
    check_known,
    codec_figures,
    effect_on,
    one_queue_length,
)
from torchrec_kvshare.cache.identity import UNNAMED
from torchrec_kvshare.config import DataConfig
from torchrec_kvshare.data.dataset import build_dataset
from torchrec_kvshare.data.load import load_log
from torchrec_kvshare.data.requests import make_targeted_requests
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.model.quantised import FLOAT32, TABLE_DTYPES, quantise_tables, table_bytes
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.training.run import load_trained

TABLES = "tables"


class Rated(NamedTuple):
    """A model over tables of one dtype.

    Attributes:
        engine: without a cache.
        num_bytes: of the tables.
    """

    engine: Engine
    num_bytes: int


@torch.no_grad()
def measure_tables(plan: Plan, sizes: Sizes) -> list[Record]:
    """Change of AUC, of the best candidates, of scores and of bytes, by dtype of the tables.

    The AUC is the mean of the requests' own, see ``request_auc``; the positive is the item of the
    test event, whatever its label.

    Args:
        plan: ``run``, a trained one; ``data``, what it was trained on or later events of the same
            items; ``requests``, one number of ``candidates``, ``seed``.
        sizes: ``body``; the model is the run's.

    Returns:
        Of float32 its ``auc``; of each other dtype ``auc_change``, ``top10_overlap``,
        ``max_score_difference`` and ``bytes_ratio``, tables over those of float32.

    Raises:
        ConfigError: if the plan has no run, or its run, data or candidates cannot be used.
        DataError: if the data cannot be read.
        RequestError: if the data lacks a column of the model.
    """
    run, data, num_candidates = _needed(plan)
    ranker, schema = load_trained(run)
    model = RankingModel(ranker).eval()
    dataset = build_dataset(load_log(data), schema.histories)
    check_known(schema, dataset, data.name)
    rated_by_dtype = {}
    for dtype in TABLE_DTYPES:
        quantised = quantise_tables(model, dtype)
        engine = Engine(quantised, schema, None, version=UNNAMED)
        rated_by_dtype[dtype] = Rated(engine, table_bytes(quantised))
    effects_by_dtype: dict[str, list[Effect]] = {dtype: [] for dtype in TABLE_DTYPES}
    for raw, target in make_targeted_requests(dataset, plan.requests, num_candidates, plan.seed):
        request = parse_request(raw, schema)
        for dtype, effect in _effects(rated_by_dtype, request, target).items():
            effects_by_dtype[dtype].append(effect)
    exact = effects_by_dtype.pop(FLOAT32)
    encoder = model.collection.towers()[0].spec.kind

    def record(dtype: str, metric: str, value: float) -> Record:
        case: Case = {"path": dtype, "tables": dtype, "encoder": encoder}
        case |= {"candidates": num_candidates, "requests": plan.requests}
        return Record(TABLES, case, metric, value, UNIT_BY_METRIC.get(metric, metric))

    return [
        record(FLOAT32, "auc", fmean(effect.auc for effect in exact)),
        *(
            record(dtype, metric, value)
            for dtype, effects in effects_by_dtype.items()
            for metric, value in codec_figures(effects, exact).items()
        ),
    ]


def _needed(plan: Plan) -> tuple[Path, DataConfig, int]:
    """Run, data and candidates of a plan that has them."""
    if plan.run is None or plan.data is None:
        raise ConfigError(
            "run or data is null; scenario=tables measures a trained model on its own data: "
            "run=DIR, an output of pipelines.train, and data=NAME with data.root or data.path"
        )
    return plan.run, plan.data, one_queue_length(plan, TABLES)


def _effects(rated_by_dtype: dict[str, Rated], request: Request, target: int) -> dict[str, Effect]:
    """What tables of each dtype do to one request."""
    scores_by_dtype = {
        dtype: rated.engine.rank([request])[0].scores for dtype, rated in rated_by_dtype.items()
    }
    exact = scores_by_dtype[FLOAT32]
    return {
        dtype: effect_on(scores, exact, target, rated_by_dtype[dtype].num_bytes)
        for dtype, scores in scores_by_dtype.items()
    }
