"""One model in every runtime: latency of prefill and scoring, time to export and to load.

One export serves all lengths: nothing is compiled for the sizes that are measured.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from torchrec_kvshare.benchmark.exports import EAGER, WARM_CALLS, exported
from torchrec_kvshare.benchmark.options import MERGE, EncoderOptions, ModelSizes, TimedOptions
from torchrec_kvshare.benchmark.results import PREFILL_PATH, Case, Record
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.benchmark.workload import draw_requests, make_dlrm, make_schema
from torchrec_kvshare.errors import ConfigError, ParityError
from torchrec_kvshare.export.exporter import RUNTIMES
from torchrec_kvshare.features.batches import (
    collate_candidates,
    collate_history,
    with_pages,
)
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import FeatureSchema
from torchrec_kvshare.history.kinds import LONGER
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel
from torchrec_kvshare.verify.deterministic import compute_rows_alone
from torchrec_kvshare.verify.parity import LOGIT_TOLERANCE

RUNTIMES_SCENARIO = "runtimes"
DETERMINISTIC = "eager, deterministic"
SCORE_PATH = "score"


@dataclass
class RuntimesOptions(TimedOptions, EncoderOptions, ModelSizes):
    """Options of ``scenario=runtimes``."""

    histories: list[int] = field(default_factory=lambda: [256, 1000])  # events
    candidates: list[int] = field(default_factory=lambda: [100, 500, 1000])


@torch.no_grad()
def measure_runtimes(options: RuntimesOptions) -> list[Record]:
    """Measure one user's prefill, and scoring its candidates over K/V in pages, by runtime.

    Returns:
        Records of ``latency_ms`` and ``ratio_to_eager`` (eager's time over the runtime's) for the
        paths ``prefill`` and ``score``; of ``export_s``, ``load_s`` and ``artifact_bytes``.

    Raises:
        ConfigError: if there is no history.
        ParityError: if K/V or logits of a runtime differ from the eager model's.
    """
    if not options.histories:
        raise ConfigError("histories is []; at least one is needed")
    records: list[Record] = []
    for encoder in options.encoders:
        longest = max(options.histories)
        # Groups of ``longer`` must fill a block.
        schema = make_schema(longest, num_users=1, block=MERGE if encoder == LONGER else None)
        eager = RankingModel(make_dlrm(schema, options, options.seed, encoder)).eval()
        models: dict[str, RankingFunctions] = {
            EAGER: eager,
            DETERMINISTIC: compute_rows_alone(eager),
        }
        model_case: Case = options.case(encoder)
        for runtime in RUNTIMES:
            models[runtime], costs = exported(runtime, eager, schema)
            export_case = model_case | {"path": "export", "runtime": runtime}
            records += [
                Record(RUNTIMES_SCENARIO, export_case, metric, value, unit=unit)
                for metric, value, unit in costs
            ]
        for history in options.histories:
            requests = draw_requests(
                schema, options.candidates, user=0, seed=options.seed, history=history
            )
            calls = {name: _prefill(model, requests[0], schema) for name, model in models.items()}
            case: Case = model_case | {"path": PREFILL_PATH, "history": history}
            records += _compared(case, calls, options.repeats)
            for request in requests:
                calls = {
                    name: _score(model, eager, request, schema) for name, model in models.items()
                }
                case = model_case | {"path": SCORE_PATH, "history": history}
                case |= {"candidates": request.num_candidates}
                records += _compared(case, calls, options.repeats)
    return records


def _compared(case: Case, calls: dict[str, Callable[[], Tensor]], repeats: int) -> list[Record]:
    """Time the runtimes, once their results are found equal."""
    expected = calls[EAGER]()
    for runtime, call in calls.items():
        for _ in range(WARM_CALLS):
            difference = float((call() - expected).abs().max())
        if not difference <= LOGIT_TOLERANCE:
            raise ParityError(f"{case['path']} of {runtime} differs by {difference} from eager's")
    latency_ms = interleaved_medians(calls, repeats)
    records = []
    for runtime, value in latency_ms.items():
        own = case | {"runtime": runtime}
        ratio = latency_ms[EAGER] / value
        records.append(Record(RUNTIMES_SCENARIO, own, "latency_ms", value, unit="ms"))
        records.append(Record(RUNTIMES_SCENARIO, own, "ratio_to_eager", ratio, unit="x"))
    return records


def _prefill(
    model: RankingFunctions, request: Request, schema: FeatureSchema
) -> Callable[[], Tensor]:
    features = collate_history([request], schema).sparse_features
    return lambda: model.prefill(features)[0]


def _score(
    model: RankingFunctions, eager: RankingModel, request: Request, schema: FeatureSchema
) -> Callable[[], Tensor]:
    """Return the call that scores over K/V in pages: a table of one page."""
    [kv] = eager.prefill(collate_history([request], schema).sparse_features)
    batch = collate_candidates([request], schema)
    features = with_pages(batch.sparse_features, schema, [[[0]]])
    return partial(model.score, batch.dense_features, features, [kv.unsqueeze(1)])
