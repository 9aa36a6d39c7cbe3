"""One model in every runtime: what prefill and scoring cost, and what the runtime itself does.

One export serves all lengths: nothing is compiled for the sizes that are measured.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from torchrec_kvshare.benchmark.plan import Plan, Sizes
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.benchmark.workload import draw_requests, fill_zeros, make_schema
from torchrec_kvshare.errors import ParityError
from torchrec_kvshare.export.exporter import RUNTIMES
from torchrec_kvshare.features.batches import (
    collate_candidates,
    collate_history,
    user_of_candidates,
)
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import HISTORY, FeatureSchema
from torchrec_kvshare.history.kinds import LONGER
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel, dlrm_with_history
from torchrec_kvshare.scoring.engine import expand
from torchrec_kvshare.verify.audit import audit_model
from torchrec_kvshare.verify.deterministic import compute_rows_alone
from torchrec_kvshare.verify.parity import LOGIT_TOLERANCE

RUNTIMES_SCENARIO = "runtimes"
EAGER, DETERMINISTIC = "eager", "eager, deterministic"
PREFILL, SCORE = "prefill", "score"
WARM_CALLS = 3  # TorchScript rewrites a program after its first calls.


@torch.no_grad()
def measure_runtimes(plan: Plan, sizes: Sizes) -> list[Record]:
    """Latency of one user's prefill, and of its candidates over K/V in pages, by runtime.

    Args:
        plan: ``encoders``, ``histories``, ``candidates``, ``repeats``, ``seed``.
        sizes: of the model.

    Returns:
        Records of ``latency_ms`` and ``ratio_to_eager`` (eager's time over the runtime's) for the
        paths ``prefill`` and ``score``; of ``export_s``, ``load_s`` and ``artifact_bytes``.

    Raises:
        ParityError: if a runtime's K/V or logits are not the eager model's.
    """
    records: list[Record] = []
    for encoder in plan.encoders:
        longest = max(plan.histories)
        spec = sizes.spec(encoder, longest)
        # Groups of ``longer`` must fill a block.
        schema = make_schema(longest, num_users=1, block=spec.merge if encoder == LONGER else None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(plan.seed)
            ranker = dlrm_with_history(schema, spec, [sizes.dim, 1])
        eager = RankingModel(fill_zeros(ranker)).eval()
        models: dict[str, RankingFunctions] = {
            EAGER: eager,
            DETERMINISTIC: compute_rows_alone(eager),
        }
        case: Case = sizes.case(encoder)
        for runtime in RUNTIMES:
            models[runtime], costs = _exported(runtime, eager, schema)
            of_runtime = case | {"path": "export", "runtime": runtime}
            records += [
                Record(RUNTIMES_SCENARIO, of_runtime, metric, value, unit)
                for metric, value, unit in costs
            ]
        for history in plan.histories:
            requests = draw_requests(schema, plan.candidates, 0, plan.seed, history)
            calls = {name: _prefill(model, requests[0], schema) for name, model in models.items()}
            records += _compared(case | {"path": PREFILL, "history": history}, calls, plan.repeats)
            for request in requests:
                calls = {
                    name: _score(model, eager, request, schema) for name, model in models.items()
                }
                of_score: Case = {"history": history, "candidates": request.num_candidates}
                records += _compared(case | {"path": SCORE} | of_score, calls, plan.repeats)
    return records


def _exported(
    runtime: str, eager: RankingModel, schema: FeatureSchema
) -> tuple[RankingFunctions, list[tuple[str, float, str]]]:
    """The model as a runtime has it, and what that took."""
    chosen = RUNTIMES[runtime]
    audit = audit_model(eager, schema)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        files = chosen.write(eager, schema, RUNTIMES_SCENARIO, audit, folder)
        written = time.perf_counter()
        spec = asdict(eager.collection.towers()[0].spec)
        model = chosen.load(folder, schema, spec)
        loaded = time.perf_counter()
        num_bytes = sum((folder / file).stat().st_size for file in files)
    return model, [
        ("export_s", written - start, "s"),
        ("load_s", loaded - written, "s"),
        ("artifact_bytes", float(num_bytes), "bytes"),
    ]


def _compared(case: Case, calls: dict[str, Callable[[], Tensor]], repeats: int) -> list[Record]:
    """Latencies, after the results were found equal."""
    expected = calls[EAGER]()
    for runtime, call in calls.items():
        for _ in range(WARM_CALLS):
            difference = float((call() - expected).abs().max())
        if not difference <= LOGIT_TOLERANCE:
            raise ParityError(f"{case['path']} of {runtime} differs by {difference} from eager's")
    latency_ms = interleaved_medians(calls, repeats)
    records = []
    for runtime, value in latency_ms.items():
        of_runtime = case | {"runtime": runtime}
        ratio = latency_ms[EAGER] / value
        records.append(Record(RUNTIMES_SCENARIO, of_runtime, "latency_ms", value, "ms"))
        records.append(Record(RUNTIMES_SCENARIO, of_runtime, "ratio_to_eager", ratio, "x"))
    return records


def _prefill(
    model: RankingFunctions, request: Request, schema: FeatureSchema
) -> Callable[[], Tensor]:
    features = collate_history([request], schema).sparse_features
    return lambda: model.prefill(features)[0]


def _score(
    model: RankingFunctions, eager: RankingModel, request: Request, schema: FeatureSchema
) -> Callable[[], Tensor]:
    """Scoring over K/V that lies in pages: a table of one page."""
    [kv] = eager.prefill(collate_history([request], schema).sparse_features)
    batch = collate_candidates([request], schema)
    candidate_user = user_of_candidates([request])
    features = expand(batch.sparse_features, HISTORY, [[0]], candidate_user)
    return partial(model.score, batch.dense_features, features, [kv.unsqueeze(1)])
