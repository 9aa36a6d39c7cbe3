"""What embedding tables in fewer bits do to a trained model's scores, and how many bytes they take.

Nothing is timed.
"""

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import torch
from omegaconf import MISSING

from torchrec_kvshare.benchmark.effects import EffectOptions, effect_records, targeted_requests
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.cache.identity import UNNAMED
from torchrec_kvshare.model.quantised import FLOAT32, TABLE_DTYPES, quantise_tables, table_bytes
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.training.run import load_trained
from torchrec_kvshare.verify.codecs import Effect, effect_figures, effect_on
from torchrec_kvshare.verify.parity import probabilities_of

TABLES = "tables"


@dataclass
class TablesOptions(EffectOptions):
    """Options of ``scenario=tables``."""

    run: str = MISSING  # output of pipelines.train


@torch.no_grad()
def measure_tables(options: TablesOptions) -> list[Record]:
    """Measure how AUC, best candidates, scores and bytes change, by dtype of the tables.

    The AUC is the mean of the requests' own, see ``request_auc``; the positive is the item of the
    test event, whatever its label.

    Returns:
        Of float32 its ``auc``; of each other dtype ``auc_change``, ``top10_overlap``,
        ``max_score_difference`` and ``bytes_ratio``, tables over those of float32.

    Raises:
        ConfigError: if the run, the data or the candidates cannot be used.
        DataError: if the data cannot be read.
        RequestError: if the data lacks a column of the model.
    """
    ranker, schema = load_trained(Path(options.run))
    model = RankingModel(ranker).eval()
    engine_by_dtype = {}
    bytes_by_dtype = {}
    for dtype in TABLE_DTYPES:
        quantised = quantise_tables(model, dtype)
        engine_by_dtype[dtype] = Engine(quantised, schema, None, version=UNNAMED)
        bytes_by_dtype[dtype] = table_bytes(quantised)
    effects_by_dtype: dict[str, list[Effect]] = {dtype: [] for dtype in TABLE_DTYPES}
    for request, target in targeted_requests(options, schema):
        scores_by_dtype = {
            dtype: probabilities_of(engine.rank([request]))
            for dtype, engine in engine_by_dtype.items()
        }
        for dtype, scores in scores_by_dtype.items():
            effect = effect_on(scores, scores_by_dtype[FLOAT32], target, bytes_by_dtype[dtype])
            effects_by_dtype[dtype].append(effect)
    exact = effects_by_dtype.pop(FLOAT32)
    figures_by_dtype = {
        dtype: effect_figures(effects, exact) for dtype, effects in effects_by_dtype.items()
    }
    case: Case = {"encoder": model.collection.towers()[0].spec.kind}
    case |= {"candidates": options.num_candidates, "requests": options.requests}
    auc = fmean(effect.auc for effect in exact)
    return effect_records(TABLES, TABLES, auc=auc, figures_by_name=figures_by_dtype, case=case)
