"""Training on whole windows against one row per candidate: targets per second of a step.

Both train one DLRM on the same targets, forward and backward. On a whole window all targets share
one prefill; with one row per candidate each encodes the events before it again.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRMTrain

from torchrec_kvshare.benchmark.plan import Plan, Sizes
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.benchmark.workload import fill_zeros, make_schema
from torchrec_kvshare.errors import ParityError
from torchrec_kvshare.features.bags import Bags, single
from torchrec_kvshare.features.batches import assemble, collate
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.schema import (
    CANDIDATE_TIME,
    HISTORY,
    TIME,
    USER,
    FeatureSchema,
    visible_key,
)
from torchrec_kvshare.model.ranking import dlrm_with_history
from torchrec_kvshare.verify.parity import LOGIT_TOLERANCE

TRAINING = "training"
WHOLE_WINDOWS = "whole_windows"
ROW_PER_CANDIDATE = "row_per_candidate"
NEGATIVES = 4  # of every event
SAMPLED_TARGETS = 16  # of a window that are trained one row per candidate: all would take minutes

RawRequest = dict[str, Any]


def measure_training(plan: Plan, sizes: Sizes) -> list[Record]:
    """Targets per second, forward and backward, of both ways to train.

    Args:
        plan: ``encoders`` (those that see prefixes), ``histories``, ``repeats``, ``seed``.
        sizes: of the tower.

    Returns:
        Records of ``targets_per_s`` and of ``speedup``, whole windows over one row per candidate.

    Raises:
        ParityError: if the logits of the two differ.
    """
    return [
        record
        for encoder in plan.encoders
        for history in plan.histories
        for record in _case_records(plan, sizes, encoder, history)
    ]


def _case_records(plan: Plan, sizes: Sizes, encoder: str, history: int) -> Iterator[Record]:
    schema = make_schema(history, num_users=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        ranker = dlrm_with_history(schema, sizes.spec(encoder, history), [sizes.dim, 1])
    model = DLRMTrain(fill_zeros(ranker).requires_grad_(True))
    raw = draw_raw_request(schema, history, history * (1 + NEGATIVES), plan.seed)
    raw[USER] = "nobody"  # Unknown to the model, as the users of single rows are.
    step = max(1, history // SAMPLED_TARGETS)
    sampled = list(range(0, history, step))
    whole, rows = whole_window(raw, schema, history), one_row_each(raw, schema, sampled)
    _assert_parity(model, whole, rows, sampled)
    latency_ms = interleaved_medians(
        {
            WHOLE_WINDOWS: partial(train_step, model, whole),
            ROW_PER_CANDIDATE: partial(train_step, model, rows),
        },
        plan.repeats,
    )
    rate_by_path = {
        WHOLE_WINDOWS: history / latency_ms[WHOLE_WINDOWS] * 1e3,
        ROW_PER_CANDIDATE: len(sampled) / latency_ms[ROW_PER_CANDIDATE] * 1e3,
    }
    case: Case = sizes.case(encoder) | {"history": history, "candidates": 1 + NEGATIVES, "users": 1}
    for path, value in rate_by_path.items():
        yield Record(TRAINING, case | {"path": path}, "targets_per_s", value, "1/s")
    speedup = rate_by_path[WHOLE_WINDOWS] / rate_by_path[ROW_PER_CANDIDATE]
    yield Record(TRAINING, case | {"path": WHOLE_WINDOWS}, "speedup", speedup, "x")


def train_step(model: DLRMTrain, batch: Batch) -> None:
    """One forward and one backward; what an optimizer costs is the same for both."""
    model.zero_grad()
    model(batch)[0].backward()


def whole_window(raw: RawRequest, schema: FeatureSchema, history: int) -> Batch:
    """One user, every event a target with its negatives beside it."""
    event = torch.arange(history).repeat_interleave(1 + NEGATIVES)
    times = torch.tensor(raw["history"][TIME])
    return _seeing(collate([parse_request(raw, schema)], schema), event, times[event])


def one_row_each(raw: RawRequest, schema: FeatureSchema, targets: Sequence[int]) -> Batch:
    """Every candidate of some targets a user of its own, with the events before its target."""
    requests, visible, times = [], [], []
    for target in targets:
        for place in range(target * (1 + NEGATIVES), (target + 1) * (1 + NEGATIVES)):
            row = dict(raw)
            row[USER] = f"row {place}"
            row["history"] = {c: cells[:target] for c, cells in raw["history"].items()}
            row["candidates"] = {c: [cells[place]] for c, cells in raw["candidates"].items()}
            requests.append(parse_request(row, schema))
            visible.append(target)
            times.append(raw["history"][TIME][target])
    return _seeing(collate(requests, schema), torch.tensor(visible), torch.tensor(times))


def _seeing(batch: Batch, visible: Tensor, times: Tensor) -> Batch:
    features = batch.sparse_features
    keys, inverse = features.inverse_indices()
    bags = {key: Bags(one.values(), one.lengths()) for key, one in features.to_dict().items()}
    bags |= {CANDIDATE_TIME: single(times), visible_key(HISTORY): single(visible)}
    labels = (torch.arange(times.numel()) % (1 + NEGATIVES) == 0).float()
    return assemble(bags, inverse[keys.index(USER)], batch.dense_features, labels)


@torch.no_grad()
def _assert_parity(model: DLRMTrain, whole: Batch, rows: Batch, sampled: Sequence[int]) -> None:
    logits = [
        model.model(batch.dense_features, batch.sparse_features).view(-1, 1 + NEGATIVES)
        for batch in (whole, rows)
    ]
    difference = float((logits[0][list(sampled)] - logits[1]).abs().max())
    if not difference <= LOGIT_TOLERANCE:
        raise ParityError(f"{ROW_PER_CANDIDATE} logits differ by {difference} from {WHOLE_WINDOWS}")
