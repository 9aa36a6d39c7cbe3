"""Training on whole windows against one row per candidate: targets per second of a step.

Both train one DLRM on the same targets, forward and backward. On a whole window all targets share
one prefill; with one row per candidate each row encodes the events before its target again.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRMTrain

from torchrec_kvshare.benchmark.options import EncoderOptions, ModelSizes, TimedOptions
from torchrec_kvshare.benchmark.results import Case, Record
from torchrec_kvshare.benchmark.timing import interleaved_medians
from torchrec_kvshare.benchmark.workload import make_dlrm, make_schema
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
from torchrec_kvshare.verify.parity import LOGIT_TOLERANCE

TRAINING = "training"
WHOLE_WINDOWS = "whole_windows"
ROW_PER_CANDIDATE = "row_per_candidate"
NEGATIVES = 4  # of every event
SAMPLED_TARGETS = 16  # of a window, trained one row per candidate: all would take minutes

RawRequest = dict[str, Any]


@dataclass
class TrainingOptions(TimedOptions, EncoderOptions, ModelSizes):
    """Options of ``scenario=training``; the encoders must be trainable on prefixes."""

    histories: list[int] = field(default_factory=lambda: [256])  # events of a window


def measure_training(options: TrainingOptions) -> list[Record]:
    """Measure targets per second, forward and backward, of both ways to train.

    Returns:
        Records of ``targets_per_s`` and of ``speedup``, whole windows over one row per candidate.

    Raises:
        ParityError: if the logits of the two differ.
    """
    return [
        record
        for encoder in options.encoders
        for history in options.histories
        for record in _case_records(options, encoder, history)
    ]


def _case_records(options: TrainingOptions, encoder: str, history: int) -> Iterator[Record]:
    schema = make_schema(history, num_users=1)
    ranker = make_dlrm(schema, options, options.seed, encoder)
    model = DLRMTrain(ranker.requires_grad_(True))
    raw = draw_raw_request(schema, history, history * (1 + NEGATIVES), options.seed)
    raw[USER] = "unknown"  # to the model, like the users of single rows
    sampled = list(range(0, history, max(1, history // SAMPLED_TARGETS)))
    whole, rows = whole_window(raw, schema, history), one_row_each(raw, schema, sampled)
    _assert_parity(model, whole, rows, sampled)
    latency_ms = interleaved_medians(
        {
            WHOLE_WINDOWS: partial(train_step, model, whole),
            ROW_PER_CANDIDATE: partial(train_step, model, rows),
        },
        options.repeats,
    )
    rate_by_path = {
        WHOLE_WINDOWS: history / latency_ms[WHOLE_WINDOWS] * 1e3,
        ROW_PER_CANDIDATE: len(sampled) / latency_ms[ROW_PER_CANDIDATE] * 1e3,
    }
    case: Case = options.case(encoder) | {
        "history": history,
        "candidates": 1 + NEGATIVES,
        "users": 1,
    }
    for path, value in rate_by_path.items():
        yield Record(TRAINING, case | {"path": path}, "targets_per_s", value, unit="1/s")
    speedup = rate_by_path[WHOLE_WINDOWS] / rate_by_path[ROW_PER_CANDIDATE]
    yield Record(TRAINING, case | {"path": WHOLE_WINDOWS}, "speedup", speedup, unit="x")


def train_step(model: DLRMTrain, batch: Batch) -> None:
    """Run forward and backward; the optimizer costs the same for both ways."""
    model.zero_grad()
    model(batch)[0].backward()


def whole_window(raw: RawRequest, schema: FeatureSchema, history: int) -> Batch:
    """Return a batch of one user: every event is a target with its negatives beside it."""
    event = torch.arange(history).repeat_interleave(1 + NEGATIVES)
    times = torch.tensor(raw["history"][TIME])
    return _seeing(collate([parse_request(raw, schema)], schema), event, times[event])


def one_row_each(raw: RawRequest, schema: FeatureSchema, targets: Sequence[int]) -> Batch:
    """Return a batch with one user per candidate of some targets, each with the earlier events."""
    requests, visible, times = [], [], []
    for target in targets:
        for index in range(target * (1 + NEGATIVES), (target + 1) * (1 + NEGATIVES)):
            row = dict(raw)
            row[USER] = f"row {index}"
            row["history"] = {c: cells[:target] for c, cells in raw["history"].items()}
            row["candidates"] = {c: [cells[index]] for c, cells in raw["candidates"].items()}
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
