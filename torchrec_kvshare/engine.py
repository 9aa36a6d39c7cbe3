"""The only place where cache meets model: look up, prefill what misses, expand, score.

The model is a function of tensors and the cache keeps K/V; this file hands one to the other. Every
fault of the cache is a recomputation, so scores never depend on what it holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_kvshare.cache.identity import history_digest
from torchrec_kvshare.cache.kv_cache import HIT, NOT_ADMITTED, TOO_SHORT, Entry, KVCache
from torchrec_kvshare.data.batches import Bags, with_key
from torchrec_kvshare.data.schema import HISTORY_PAGES, FeatureSchema
from torchrec_kvshare.features import (
    Request,
    collate,
    collate_candidates,
    collate_history,
    user_of_candidates,
)
from torchrec_kvshare.labels import EXPAND, LOOKUP, PREFILL, SCORE

CACHE_OFF = "cache_off"


class RankingFunctions(Protocol):
    """What the engine asks of a model, eager or exported; see ``ranking.RankingModel``."""

    def __call__(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        """Logits [C], histories encoded on the way."""

    def prefill(self, features: KeyedJaggedTensor) -> Tensor:
        """K/V [layers, 2, T, H, D]."""

    def score(self, dense: Tensor, features: KeyedJaggedTensor, kv_pages: Tensor) -> Tensor:
        """Logits [C] over K/V in pages."""


@dataclass(frozen=True)
class CacheUse:
    """What the cache did for one answer.

    Attributes:
        status: ``hit``, ``partial``, ``miss`` or ``bypass``.
        reason: why not a hit; empty for a hit.
        cached_events: events whose K/V was there.
        computed_events: events encoded for this answer.
        tier: where the K/V was found, or ``none``.
    """

    status: str
    reason: str
    cached_events: int
    computed_events: int
    tier: str


@dataclass(frozen=True)
class Answer:
    """Scores of one request, candidates in the order they came, as probabilities."""

    request_id: str | int | None
    scores: list[float]
    model_version: str
    cache: CacheUse

    def to_json(self) -> dict[str, Any]:
        """The project's one answer format."""
        return {
            "request_id": self.request_id,
            "scores": self.scores,
            "model_version": self.model_version,
            "cache": vars(self.cache),
        }


@dataclass(frozen=True)
class _Found:
    """One request's K/V, if it lies in pages, and what to say of it."""

    entry: Entry | None
    use: CacheUse


class Engine:
    """Score requests, their histories encoded once per user while the cache holds them.

    Args:
        model: the ranking functions; read only.
        schema: the model's columns.
        model_version: stands in every answer.
        cache: where K/V is kept between requests; None shares it within a request only.
    """

    def __init__(
        self,
        model: RankingFunctions,
        schema: FeatureSchema,
        model_version: str,
        cache: KVCache | None,
    ) -> None:
        self.model = model
        self.schema = schema
        self.model_version = model_version
        self.cache = cache

    @torch.no_grad()
    def rank(self, requests: Sequence[Request]) -> list[Answer]:
        """Score requests in one batch.

        Args:
            requests: parsed requests; users may repeat, candidates may be none.

        Returns:
            One answer per request, in their order.
        """
        if not requests:
            return []
        if self.cache is None:
            return self._answers(requests, [_not_cached(r, CACHE_OFF) for r in requests])
        found: dict[int, _Found] = {}
        try:
            self._find(requests, self.cache, found)
            return self._answers(requests, [found[place] for place in range(len(requests))])
        finally:
            for one in found.values():
                if one.entry is not None:
                    self.cache.release(one.entry)

    def _find(self, requests: Sequence[Request], cache: KVCache, found: dict[int, _Found]) -> None:
        """K/V of every request into ``found``: looked up, or encoded in one batch and kept."""
        missing: dict[int, tuple[bytes, str]] = {}
        with record_function(LOOKUP):
            for place, request in enumerate(requests):
                if request.num_events == 0:
                    found[place] = _not_cached(request, TOO_SHORT)
                    continue
                digest = history_digest(request, self.schema)
                lookup = cache.lookup(request.user_id, digest, request.num_events)
                if lookup.entry is None:
                    missing[place] = (digest, lookup.reason)
                else:
                    use = CacheUse(HIT, "", request.num_events, 0, "device")
                    found[place] = _Found(lookup.entry, use)
        if missing:
            self._prefill(requests, missing, cache, found)

    def _prefill(
        self,
        requests: Sequence[Request],
        missing: dict[int, tuple[bytes, str]],
        cache: KVCache,
        found: dict[int, _Found],
    ) -> None:
        """Encode the histories that miss, all in one batch, and keep what the pool has room for."""
        places = list(missing)
        with record_function(PREFILL):
            batch = collate_history([requests[place] for place in places], self.schema)
            kv = self.model.prefill(batch.sparse_features)
        parts = kv.split([requests[place].num_events for place in places], dim=2)
        for place, part in zip(places, parts, strict=True):
            digest, reason = missing[place]
            entry = cache.put(requests[place].user_id, digest, part)
            if entry is None:
                found[place] = _not_cached(requests[place], NOT_ADMITTED)
            else:
                found[place] = _Found(entry, CacheUse("miss", reason, 0, part.size(2), "none"))

    def _answers(self, requests: Sequence[Request], found: Sequence[_Found]) -> list[Answer]:
        # Without a cache even an empty history goes the uncached way; with one it has no pages to
        # read.
        paged = [
            place
            for place, one in enumerate(found)
            if one.entry is not None or one.use.reason == TOO_SHORT
        ]
        unpaged = [place for place in range(len(found)) if place not in set(paged)]
        scores: dict[int, list[float]] = {}
        scores |= self._score_cached(requests, paged, found)
        scores |= self._score_uncached(requests, unpaged)
        return [
            Answer(request.request_id, scores[place], self.model_version, found[place].use)
            for place, request in enumerate(requests)
        ]

    def _score_cached(
        self, requests: Sequence[Request], places: list[int], found: Sequence[_Found]
    ) -> dict[int, list[float]]:
        chosen = [requests[place] for place in places]
        if self.cache is None or not any(request.num_candidates for request in chosen):
            return {place: [] for place in places}
        with record_function(EXPAND):
            batch = collate_candidates(chosen, self.schema)
            features = expand(
                batch.sparse_features,
                [_pages(found[place].entry) for place in places],
                user_of_candidates(chosen),
            )
        with record_function(SCORE):
            logits = self.model.score(batch.dense_features, features, self.cache.pool.kv_pages)
        return _scores_by_place(places, chosen, logits)

    def _score_uncached(
        self, requests: Sequence[Request], places: list[int]
    ) -> dict[int, list[float]]:
        chosen = [requests[place] for place in places]
        if not any(request.num_candidates for request in chosen):
            return {place: [] for place in places}
        batch = collate(chosen, self.schema)
        with record_function(SCORE):
            logits = self.model(batch.dense_features, batch.sparse_features)
        return _scores_by_place(places, chosen, logits)


def expand(
    features: KeyedJaggedTensor, pages_by_user: Sequence[list[int]], candidate_user: Tensor
) -> KeyedJaggedTensor:
    """Give every candidate its user's K/V: one key more, whose values are page ids.

    Args:
        features: candidates and users as ``collate_candidates`` makes them.
        pages_by_user: page ids of each user, oldest events first.
        candidate_user: [C] int64, the user of each candidate.

    Returns:
        The features with the key ``history.pages`` at the users' stride. No K/V is copied.
    """
    pages = torch.tensor([page for pages in pages_by_user for page in pages], dtype=torch.int64)
    lengths = torch.tensor([len(pages) for pages in pages_by_user])
    return with_key(features, HISTORY_PAGES, Bags(pages, lengths), candidate_user)


def _pages(entry: Entry | None) -> list[int]:
    return [] if entry is None else entry.pages


def _not_cached(request: Request, reason: str) -> _Found:
    return _Found(None, CacheUse("bypass", reason, 0, request.num_events, "none"))


def _scores_by_place(
    places: list[int], requests: Sequence[Request], logits: Tensor
) -> dict[int, list[float]]:
    parts = torch.sigmoid(logits).split([request.num_candidates for request in requests])
    return {place: part.tolist() for place, part in zip(places, parts, strict=True)}
