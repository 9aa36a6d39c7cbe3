"""The cacheability contract, tried on a model: what moves the K/V of a history, and what must not.

Requests are drawn from the schema and perturbed one way at a time. K/V that moves with anything but
the history itself must not be kept between requests; rows that move with later events must not be
extended. A model's claims (``reusable_events``) are believed only if they hold here.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from torchrec_kvshare.features.batches import collate
from torchrec_kvshare.features.draw import draw_raw_request
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.request import distinct_histories
from torchrec_kvshare.features.schema import TIME, FeatureSchema
from torchrec_kvshare.history.pages import split_histories
from torchrec_kvshare.model.ranking import RankingModel

CROSS_REQUEST = "cross_request"
REQUEST = "request"
EXACT = "exact"
REFUSED = "refused"
# A share of the greatest value. In the suite, rounding in other batches moves K/V of every kind by
# less than a tenth of this, a planted violation by more than a hundred times.
TOLERANCE = 2e-5
NUM_CANDIDATES = 3
SCORES = "scores"
LEAVES_SCORES = ("candidates", "batchmates", "batch_order")  # The others may well move scores.

Raw = dict[str, Any]


@dataclass(frozen=True)
class Audit:
    """What was found.

    Attributes:
        scope: ``cross_request`` or ``request``: where K/V of this model may be used.
        append: ``exact`` if new events may extend what is cached, else ``refused``.
        failures: the perturbations that moved what must not move.
        moved: by perturbation, and by ``history/layer`` or ``scores``: how far it moved, as a share
            of the greatest value.
    """

    scope: str
    append: str
    failures: list[str]
    moved: dict[str, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """As the manifest holds it; null where something moved by what is no number."""
        moved = {
            name: {
                where: value if math.isfinite(value) else None for where, value in by_place.items()
            }
            for name, by_place in self.moved.items()
        }
        return asdict(self) | {"moved": moved}


@torch.no_grad()
def audit_model(model: RankingModel, schema: FeatureSchema, seed: int = 0) -> Audit:
    """Perturb requests and watch K/V and scores.

    Args:
        model: in eval mode.
        schema: its columns and histories.
        seed: of the requests drawn.

    Returns:
        The verdict and the figures behind it.
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
        for name, by_place in moved.items()
        if not all(
            value <= TOLERANCE
            for where, value in by_place.items()
            if where != SCORES or name in LEAVES_SCORES
        )
    ]
    claims = auditor.claims_append()
    if not claims and "later_events" in failures:
        failures.remove("later_events")  # Nobody said that they would not move it.
    exact = claims and "later_events" not in failures
    return Audit(
        REQUEST if failures else CROSS_REQUEST, EXACT if exact else REFUSED, failures, moved
    )


class _Auditor:
    def __init__(self, model: RankingModel, schema: FeatureSchema, seed: int) -> None:
        self.model = model
        self.schema = schema
        windows = [history.window for history in schema.histories]
        # Long enough for closed groups, short enough that no window moves.
        self.longest = min(window.max_history for window in windows)
        sizes = [self.longest, max(1, self.longest // 2), max(1, self.longest // 3)]
        self.raws = [
            draw_raw_request(schema, num_events, NUM_CANDIDATES, seed + place)
            for place, num_events in enumerate(sizes)
        ]
        for place, raw in enumerate(self.raws):
            raw["user_id"] = f"audited {place}"  # Equal users would share one prefill.
        self.kv = self.encode(self.raws)
        self.scores = self.score(self.raws)

    def encode(self, raws: Sequence[Raw]) -> list[list[Tensor]]:
        """K/V [planes, R, H, D] of every request and history, prefilled in one batch."""
        requests = [parse_request(raw, self.schema) for raw in raws]
        assert len(distinct_histories(requests)[0]) == len(requests)
        features = collate(requests, self.schema).sparse_features
        rows = [self.model.num_rows(request.num_events_by_history) for request in requests]
        return split_histories(self.model.prefill(features), rows)

    def score(self, raws: Sequence[Raw]) -> Tensor:
        """Logits [requests, candidates]."""
        batch = collate([parse_request(raw, self.schema) for raw in raws], self.schema)
        return self.model(batch.dense_features, batch.sparse_features).view(len(raws), -1)

    def moved_by(self, perturb: Callable[[Raw, Raw], Raw]) -> dict[str, float]:
        """K/V of all requests, and the scores of their first candidates."""
        others = self.raws[1:] + self.raws[:1]
        perturbed = [perturb(raw, other) for raw, other in zip(self.raws, others, strict=True)]
        return self.distances(self.encode(perturbed), self.score(perturbed)[:, :1])

    def moved_by_batchmates(self) -> dict[str, float]:
        """Each request in a batch of its own."""
        alone = [self.encode([raw])[0] for raw in self.raws]
        return self.distances(alone, torch.cat([self.score([raw]) for raw in self.raws]))

    def moved_by_order(self) -> dict[str, float]:
        """The requests in reverse."""
        turned = self.raws[::-1]
        return self.distances(self.encode(turned)[::-1], self.score(turned).flip(0))

    def claims_append(self) -> bool:
        """Whether the encoders say that rows stay when events come."""
        return any(
            tower.encoder.reusable_events(earlier, earlier, self.longest) > 0
            for tower in self.model.collection.towers()
            for earlier in range(1, self.longest)
        )

    def moved_by_later_events(self) -> dict[str, float]:
        """Rows that are claimed to stay when events come, or all where nothing is claimed."""
        whole, claims = self.raws[0], self.claims_append()
        towers = self.model.collection.towers()
        after = parse_request(whole, self.schema).num_events_by_history
        moved: dict[str, float] = {}
        for kept in (self.longest - 1, self.longest * 3 // 4, self.longest // 2):
            cut = copy.deepcopy(whole)
            cut["history"] = {column: cells[:kept] for column, cells in cut["history"].items()}
            before = parse_request(cut, self.schema).num_events_by_history
            earlier = self.encode([cut])[0]
            for place, history in enumerate(self.schema.histories):
                encoder = towers[place].encoder
                stays = encoder.reusable_events(before[place], before[place], after[place])
                rows = encoder.reusable_rows(stays) if claims else before[place]
                part, full = earlier[place][:, :rows], self.kv[0][place][:, :rows]
                for name, value in _by_layer(history.name, part, full).items():
                    moved[name] = _further(value, moved.get(name, 0.0))
        return moved

    def distances(self, kv: Sequence[Sequence[Tensor]], scores: Tensor) -> dict[str, float]:
        moved: dict[str, float] = {}
        for got, expected in zip(kv, self.kv, strict=True):
            for history, one, other in zip(self.schema.histories, got, expected, strict=True):
                for name, value in _by_layer(history.name, one, other).items():
                    moved[name] = _further(value, moved.get(name, 0.0))
        expected_scores = self.scores[:, : scores.size(1)]
        return moved | {SCORES: float((scores - expected_scores).abs().max())}


def _by_layer(history: str, one: Tensor, other: Tensor) -> dict[str, float]:
    """Greatest distance in each layer's K/V, as a share of its greatest value."""
    moved: dict[str, float] = {}
    for plane in range(one.size(0)):
        greatest = max(1.0, float(other[plane].abs().amax())) if other[plane].numel() else 1.0
        distance = (one[plane] - other[plane]).abs()
        value = float(distance.amax()) / greatest if distance.numel() else 0.0
        name = f"{history}/layer_{plane // 2}" if one.size(0) > 1 else f"{history}/events"
        moved[name] = _further(value, moved.get(name, 0.0))
    return moved


def _further(one: float, other: float) -> float:
    """The greater distance; what is no number is farther than anything."""
    return one if math.isnan(one) or one > other else other


def _other_candidates(raw: Raw, other: Raw) -> Raw:
    """All candidates but the first are another request's."""
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
    """How far each perturbation moved what, as fixed-width text."""
    places = list(dict.fromkeys(place for by_place in audit.moved.values() for place in by_place))
    width = max(len(place) for place in places)
    lines = [f"{'perturbed':<14}" + "".join(f"  {place:>{width}}" for place in places)]
    for name, by_place in audit.moved.items():
        cells = [f"{by_place[p]:.1e}" if p in by_place else "-" for p in places]
        verdict = "  failed" if name in audit.failures else ""
        lines.append(f"{name:<14}" + "".join(f"  {cell:>{width}}" for cell in cells) + verdict)
    return "\n".join(lines)
