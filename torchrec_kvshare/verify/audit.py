"""Proof of the cacheability contract: what the K/V of a history depends on.

Requests are drawn from the schema and perturbed one way at a time. If K/V moves with anything but
its own history, it must not be kept between requests; if rows move with later events, they must not
be extended. A model's claims (``reusable_events``) are trusted only if they hold here.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torchrec_kvshare.features.batches import RequestBatch, collate
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.schema import TIME, FeatureSchema
from torchrec_kvshare.history.pages import split_histories
from torchrec_kvshare.model.ranking import RankingModel

CROSS_REQUEST = "cross_request"
REQUEST = "request"
EXACT = "exact"
REFUSED = "refused"
# Relative to the greatest value. In the suite, rounding in another batch moves K/V of every kind by
# less than a tenth of this; a planted violation moves it by more than a hundred times.
TOLERANCE = 2e-5
NUM_CANDIDATES = 3
SCORES = "scores"
MUST_KEEP_SCORES = ("candidates", "batchmates", "batch_order")  # Other perturbations move scores.

Raw = dict[str, Any]


@dataclass(frozen=True)
class Audit:
    """Verdict of an audit, with its figures.

    Attributes:
        scope: ``cross_request`` or ``request``: where K/V of this model may be used.
        append: ``exact`` if new events may extend cached K/V, else ``refused``.
        failures: perturbations that moved what must not move.
        moved: by perturbation and tensor, how far the tensor moved. K/V (``history/layer_N``, or
            ``history/events``) is relative to its greatest value, ``scores`` are logits.
    """

    scope: str
    append: str
    failures: list[str]
    moved: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """Return the audit as the manifest holds it; null where a distance is not finite."""
        moved = {
            name: {
                tensor: value if math.isfinite(value) else None
                for tensor, value in distance_by_tensor.items()
            }
            for name, distance_by_tensor in self.moved.items()
        }
        return asdict(self) | {"moved": moved}


@torch.no_grad()
def audit_model(model: RankingModel, schema: FeatureSchema, seed: int = 0) -> Audit:
    """Perturb requests and measure how far K/V and scores move.

    Args:
        model: in eval mode.
        schema: columns and histories of the model.
        seed: seed of the drawn requests.
    """
    auditor = _Auditor(model, schema, seed)
    moved = {
        "candidates": auditor.moved_by(_other_candidates),
        "request_time": auditor.moved_by(_other_time),
        "context": auditor.moved_by(_other_context),
        "batchmates": auditor.moved_by_batchmates(),
        "batch_order": auditor.moved_by_order(),
        "later_events": auditor.moved_by_later_events(),
    }
    failures = [
        name
        for name, distance_by_tensor in moved.items()
        if not all(
            distance <= TOLERANCE  # False for NaN
            for tensor, distance in distance_by_tensor.items()
            if tensor != SCORES or name in MUST_KEEP_SCORES
        )
    ]
    claims = auditor.claims_append()
    if not claims and "later_events" in failures:
        failures.remove("later_events")  # The model claims no append, so rows may move.
    exact = claims and "later_events" not in failures
    return Audit(
        REQUEST if failures else CROSS_REQUEST, EXACT if exact else REFUSED, failures, moved
    )


class _Auditor:
    def __init__(self, model: RankingModel, schema: FeatureSchema, seed: int) -> None:
        self.model = model
        self.schema = schema
        windows = [history.window for history in schema.histories]
        # Long enough for closed groups, short enough that no window moves
        self.longest = min(window.max_history for window in windows)
        sizes = [self.longest, max(1, self.longest // 2), max(1, self.longest // 3)]
        self.raws = [
            draw_raw_request(schema, num_events, NUM_CANDIDATES, seed + index)
            for index, num_events in enumerate(sizes)
        ]
        for index, raw in enumerate(self.raws):
            raw["user_id"] = f"audited {index}"  # Requests of one user would share one prefill.
        self.kv = self.encode(self.raws)
        self.scores = self.score(self.raws)

    def encode(self, raws: Sequence[Raw]) -> list[list[Tensor]]:
        """Return K/V [planes, R, H, D] by request and history, prefilled in one batch."""
        requests = [parse_request(raw, self.schema) for raw in raws]
        assert len(RequestBatch(requests).users) == len(requests)
        features = collate(requests, self.schema).sparse_features
        rows = [self.model.num_kv_rows(request.num_events_by_history) for request in requests]
        return split_histories(self.model.prefill(features), rows)

    def score(self, raws: Sequence[Raw]) -> Tensor:
        """Return logits [requests, candidates, tasks]."""
        batch = collate([parse_request(raw, self.schema) for raw in raws], self.schema)
        logits = self.model(batch.dense_features, batch.sparse_features)
        return logits.view(len(raws), NUM_CANDIDATES, -1)

    def moved_by(self, perturb: Callable[[Raw, Raw], Raw]) -> dict[str, float]:
        """Perturb all requests; compare their K/V and the scores of their first candidates."""
        others = self.raws[1:] + self.raws[:1]
        perturbed = [perturb(raw, other) for raw, other in zip(self.raws, others, strict=True)]
        return self.distances(self.encode(perturbed), self.score(perturbed)[:, :1])

    def moved_by_batchmates(self) -> dict[str, float]:
        """Compare each request alone with the same request in the batch."""
        alone = [self.encode([raw])[0] for raw in self.raws]
        return self.distances(alone, torch.cat([self.score([raw]) for raw in self.raws]))

    def moved_by_order(self) -> dict[str, float]:
        """Compare the batch with the same batch in reverse order."""
        reverse = self.raws[::-1]
        return self.distances(self.encode(reverse)[::-1], self.score(reverse).flip(0))

    def claims_append(self) -> bool:
        """Whether any encoder claims that rows stay valid when events are appended."""
        return any(
            tower.encoder.reusable_events(earlier, earlier, self.longest) > 0
            for tower in self.model.collection.towers()
            for earlier in range(1, self.longest)
        )

    def moved_by_later_events(self) -> dict[str, float]:
        """Compare rows before and after an append: all, or only those a model claims to keep."""
        whole, claims = self.raws[0], self.claims_append()
        towers = self.model.collection.towers()
        after = parse_request(whole, self.schema).num_events_by_history
        moved: dict[str, float] = {}
        for kept in (self.longest - 1, self.longest * 3 // 4, self.longest // 2):
            cut = copy.deepcopy(whole)
            cut["history"] = {column: cells[:kept] for column, cells in cut["history"].items()}
            before = parse_request(cut, self.schema).num_events_by_history
            earlier = self.encode([cut])[0]
            for index, history in enumerate(self.schema.histories):
                encoder = towers[index].encoder
                reusable = encoder.reusable_events(before[index], before[index], after[index])
                num_rows = encoder.reusable_rows(reusable) if claims else before[index]
                part, full = earlier[index][:, :num_rows], self.kv[0][index][:, :num_rows]
                for name, value in _distance_by_layer(history.name, part, full).items():
                    moved[name] = _greater(value, moved.get(name, 0.0))
        return moved

    def distances(self, kv: Sequence[Sequence[Tensor]], scores: Tensor) -> dict[str, float]:
        moved: dict[str, float] = {}
        for got, expected in zip(kv, self.kv, strict=True):
            for history, one, other in zip(self.schema.histories, got, expected, strict=True):
                for name, value in _distance_by_layer(history.name, one, other).items():
                    moved[name] = _greater(value, moved.get(name, 0.0))
        expected_scores = self.scores[:, : scores.size(1)]
        return moved | {SCORES: float((scores - expected_scores).abs().max())}


def _distance_by_layer(history: str, one: Tensor, other: Tensor) -> dict[str, float]:
    """Return the greatest distance in each layer's K/V, relative to its greatest value."""
    moved: dict[str, float] = {}
    for plane in range(one.size(0)):
        greatest = max(1.0, float(other[plane].abs().amax())) if other[plane].numel() else 1.0
        distance = (one[plane] - other[plane]).abs()
        value = float(distance.amax()) / greatest if distance.numel() else 0.0
        name = f"{history}/layer_{plane // 2}" if one.size(0) > 1 else f"{history}/events"
        moved[name] = _greater(value, moved.get(name, 0.0))
    return moved


def _greater(one: float, other: float) -> float:
    """Return the greater distance; NaN is greater than any number."""
    return one if math.isnan(one) or one > other else other


def _other_candidates(raw: Raw, other: Raw) -> Raw:
    """Replace all candidates but the first by those of another request."""
    mixed = {
        column: [cells[0], *other["candidates"][column][1:]]
        for column, cells in raw["candidates"].items()
    }
    return raw | {"candidates": mixed}


def _other_time(raw: Raw, _other: Raw) -> Raw:
    return raw | {TIME: raw[TIME] + 1_000_000}


def _other_context(raw: Raw, other: Raw) -> Raw:
    return raw | {"context": other["context"]}


def audit_table(audit: Audit) -> str:
    """Return the distance of every tensor by perturbation, as a fixed-width text table."""
    tensors = list(dict.fromkeys(tensor for row in audit.moved.values() for tensor in row))
    width = max(len(tensor) for tensor in tensors)
    lines = [f"{'perturbed':<14}" + "".join(f"  {tensor:>{width}}" for tensor in tensors)]
    for name, row in audit.moved.items():
        cells = [f"{row[tensor]:.1e}" if tensor in row else "-" for tensor in tensors]
        verdict = "  failed" if name in audit.failures else ""
        lines.append(f"{name:<14}" + "".join(f"  {cell:>{width}}" for cell in cells) + verdict)
    return "\n".join(lines)
