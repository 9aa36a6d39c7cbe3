"""The only place where cache meets model: look up, prefill or extend what misses, expand, score.

The model is a function of tensors and the cache keeps K/V; this file hands one to the other. Every
fault of the cache is a recomputation, so scores never depend on what it holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_kvshare.cache.identity import PrefixDigests
from torchrec_kvshare.cache.items import ItemCache
from torchrec_kvshare.cache.kv_cache import (
    HIT,
    NOT_ADMITTED,
    TOO_SHORT,
    Entry,
    KVCache,
    Lookup,
)
from torchrec_kvshare.data.batches import Bags, with_key
from torchrec_kvshare.data.schema import PAGES, FeatureSchema, history_key
from torchrec_kvshare.features import (
    Events,
    Request,
    collate,
    collate_candidates,
    collate_history,
    collate_tails,
    distinct_histories,
    user_of_candidates,
)
from torchrec_kvshare.labels import EXPAND, LOOKUP, PREFILL, SCORE

CACHE_OFF = "cache_off"


class RankingFunctions(Protocol):
    """What the engine asks of a model, eager or exported; see ``ranking.RankingModel``."""

    def __call__(self, dense: Tensor, features: KeyedJaggedTensor) -> Tensor:
        """Logits [C], histories encoded on the way."""

    def prefill(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """For each history K/V [planes, R, H, D]."""

    def extend(
        self, features: KeyedJaggedTensor, cached: list[Tensor], cached_rows: list[Tensor]
    ) -> list[Tensor]:
        """For each history K/V of new events behind cached rows."""

    def num_rows(self, num_events: list[int]) -> list[int]:
        """Rows of K/V of histories of so many events, in the order of the histories."""

    def reusable(
        self, num_matched: list[int], cached_events: list[int], num_events: list[int]
    ) -> list[tuple[int, int]]:
        """For each history events and rows of cached K/V that are right for another history."""

    def project_candidates(self, features: KeyedJaggedTensor) -> list[Tensor]:
        """For each history what candidates are before they meet a user."""

    def score(
        self,
        dense: Tensor,
        features: KeyedJaggedTensor,
        kv_pages: list[Tensor],
        items: list[Tensor] | None = None,
    ) -> Tensor:
        """Logits [C] over K/V in pages."""


@dataclass(frozen=True)
class CacheUse:
    """What the cache did for one answer, over all histories.

    Attributes:
        status: ``hit``, ``partial`` (some of the K/V was there), ``miss`` or ``bypass``.
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
    """One request's K/V, if it lies in pages, and what to say of it.

    Attributes:
        entries: of each history; None for one without events.
        use: for the answer.
        in_pages: whether it can be scored from pages.
    """

    entries: tuple[Entry | None, ...]
    use: CacheUse
    in_pages: bool


class Engine:
    """Score requests, their histories encoded once per user while the cache holds them.

    Args:
        model: the ranking functions; read only.
        schema: the model's columns.
        model_version: stands in every answer.
        caches: where K/V is kept between requests, one for each history of the schema; None shares
            it within a request only.
        items: where projected candidates are kept; None projects them anew.
        extends: whether K/V may be extended by new events; else whole histories alone are reused.
    """

    def __init__(
        self,
        model: RankingFunctions,
        schema: FeatureSchema,
        model_version: str,
        caches: Sequence[KVCache] | None,
        items: ItemCache | None = None,
        extends: bool = True,
    ) -> None:
        assert caches is None or len(caches) == len(schema.histories)
        self.model = model
        self.schema = schema
        self.model_version = model_version
        self.caches = caches
        self.items = items
        self.extends = extends

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
        if self.caches is None:
            return self._answers(requests, [_not_cached(r, CACHE_OFF) for r in requests])
        found: dict[int, _Found] = {}
        pinned: list[tuple[KVCache, Entry]] = []
        try:
            self._find(requests, self.caches, found, pinned)
            return self._answers(requests, [found[place] for place in range(len(requests))])
        finally:
            for cache, entry in pinned:
                cache.release(entry)

    def forget(self, user_id: str) -> int:
        """Drop the K/V of all histories of a user, an id as text.

        Returns:
            Bytes that it was.
        """
        return sum(cache.forget(user_id) for cache in self.caches or ())

    def _find(
        self,
        requests: Sequence[Request],
        caches: Sequence[KVCache],
        found: dict[int, _Found],
        pinned: list[tuple[KVCache, Entry]],
    ) -> None:
        """K/V of every request into ``found``: looked up, or encoded in one batch and kept."""
        missing: dict[int, list[_Lookup]] = {}
        with record_function(LOOKUP):
            for place, request in enumerate(requests):
                lookups = self._look_up(request, caches, pinned)
                if request.num_events == 0:
                    found[place] = _found_nothing(lookups)
                elif all(lookup.reason in (HIT, TOO_SHORT) for lookup in lookups):
                    found[place] = _found_pages(lookups, [])
                else:
                    missing[place] = lookups
        if missing:
            self._prefill(requests, missing, caches, found, pinned)

    def _look_up(
        self,
        request: Request,
        caches: Sequence[KVCache],
        pinned: list[tuple[KVCache, Entry]],
    ) -> list["_Lookup"]:
        found = []
        for history, cache in zip(self.schema.histories, caches, strict=True):
            events = request.events_by_history[history.name]
            digests = PrefixDigests(events, self.schema, cache.pool.page_size)
            lookup = Lookup(None, TOO_SHORT, 0)
            if events.num_events:
                lookup = cache.lookup(request.user_id, digests)
            if lookup.entry is not None:
                pinned.append((cache, lookup.entry))
            found.append((digests, lookup))
        reusable = self.model.reusable(
            [lookup.num_matched if self.extends else 0 for _, lookup in found],
            [0 if lookup.entry is None else lookup.entry.num_events for _, lookup in found],
            [digests.num_events for digests, _ in found],
        )
        lookups = []
        for cache, (digests, lookup), (kept_events, rows) in zip(
            caches, found, reusable, strict=True
        ):
            entry = lookup.entry
            if entry is not None and rows == 0 and lookup.reason != HIT:
                # Nothing of it is of use: its own pages may make room for what comes.
                pinned.remove((cache, entry))
                cache.release(entry)
                entry = None
            lookups.append(_Lookup(entry, lookup.reason, digests, kept_events, rows))
        return lookups

    def _prefill(
        self,
        requests: Sequence[Request],
        missing: dict[int, list["_Lookup"]],
        caches: Sequence[KVCache],
        found: dict[int, _Found],
        pinned: list[tuple[KVCache, Entry]],
    ) -> None:
        """Encode what misses, all in one batch, and keep what the pool has room for."""
        places = list(missing)
        firsts, row_of_place = distinct_histories([requests[place] for place in places])
        lookups_by_row = [missing[places[first]] for first in firsts]
        with record_function(PREFILL):
            kv_by_history = self._encode(
                [requests[places[first]] for first in firsts], lookups_by_row, caches
            )
        kept: dict[int, list[_Lookup]] = {}
        for place, row in zip(places, row_of_place, strict=True):
            if row not in kept:
                kept[row] = [
                    _keep(requests[place].user_id, lookup, cache, parts[row], pinned)
                    for lookup, cache, parts in zip(
                        lookups_by_row[row], caches, kv_by_history, strict=True
                    )
                ]
            found[place] = _found_pages(missing[place], kept[row])

    def _encode(
        self,
        requests: Sequence[Request],
        lookups_by_row: Sequence[Sequence["_Lookup"]],
        caches: Sequence[KVCache],
    ) -> list[tuple[Tensor, ...]]:
        """For each history the K/V [planes, new rows, H, D] of each request, behind kept rows."""
        num_rows = [
            self.model.num_rows([lookup.num_events for lookup in lookups])
            for lookups in lookups_by_row
        ]
        if any(lookup.kept_rows for lookups in lookups_by_row for lookup in lookups):
            kv_by_history = self._extend(requests, lookups_by_row, caches)
        else:
            kv_by_history = self.model.prefill(
                collate_history(requests, self.schema).sparse_features
            )
        parts = []
        for place, kv in enumerate(kv_by_history):
            new_rows = [
                counts[place] - lookups[place].kept_rows
                for counts, lookups in zip(num_rows, lookups_by_row, strict=True)
            ]
            parts.append(kv.split(new_rows, dim=1))
        return parts

    def _extend(
        self,
        requests: Sequence[Request],
        lookups_by_row: Sequence[Sequence["_Lookup"]],
        caches: Sequence[KVCache],
    ) -> list[Tensor]:
        tails: list[dict[str, Events]] = [{} for _ in requests]
        first_places: dict[str, list[int]] = {}
        cached, cached_rows = [], []
        for place, (history, cache) in enumerate(zip(self.schema.histories, caches, strict=True)):
            of_history = [lookups[place] for lookups in lookups_by_row]
            first_places[history.name] = [lookup.kept_events for lookup in of_history]
            for tail, request, lookup in zip(tails, requests, of_history, strict=True):
                events = request.events_by_history[history.name]
                tail[history.name] = events.part(lookup.kept_events, events.num_events)
            rows = [_cached_rows(cache, lookup) for lookup in of_history]
            cached.append(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))
            cached_rows.append(torch.tensor([lookup.kept_rows for lookup in of_history]))
        batch = collate_tails(tails, first_places, self.schema)
        return self.model.extend(batch.sparse_features, cached, cached_rows)

    def _answers(self, requests: Sequence[Request], found: Sequence[_Found]) -> list[Answer]:
        paged = [place for place, one in enumerate(found) if one.in_pages]
        unpaged = [place for place, one in enumerate(found) if not one.in_pages]
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
        if self.caches is None or not any(request.num_candidates for request in chosen):
            return {place: [] for place in places}
        with record_function(EXPAND):
            batch = collate_candidates(chosen, self.schema)
            features = batch.sparse_features
            firsts, _ = distinct_histories(chosen)
            for number, history in enumerate(self.schema.histories):
                entries = [found[places[first]].entries[number] for first in firsts]
                pages = [[] if entry is None else entry.pages for entry in entries]
                features = expand(features, history.name, pages, user_of_candidates(chosen))
            items = None
            if self.items is not None:
                items = self.items.project(features, self.model.project_candidates)
        with record_function(SCORE):
            kv_pages = [cache.pool.kv_pages for cache in self.caches]
            logits = self.model.score(batch.dense_features, features, kv_pages, items)
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


class _Lookup(NamedTuple):
    """What is known of one history of a request: its K/V, or why some is missing.

    Attributes:
        entry: pinned; None if nothing is cached.
        reason: why it is not a hit.
        digests: of the history.
        kept_events: events whose cached K/V is right for it.
        kept_rows: rows of K/V that they have.
    """

    entry: Entry | None
    reason: str
    digests: PrefixDigests
    kept_events: int
    kept_rows: int

    @property
    def num_events(self) -> int:
        return self.digests.num_events

    @property
    def num_cached(self) -> int:
        """Events that need not be encoded."""
        return self.num_events if self.reason == HIT else self.kept_events


def expand(
    features: KeyedJaggedTensor,
    history: str,
    pages_by_user: Sequence[list[int]],
    candidate_user: Tensor,
) -> KeyedJaggedTensor:
    """Give every candidate its user's K/V: one key more, whose values are page ids.

    Args:
        features: candidates and users as ``collate_candidates`` makes them.
        history: whose pages they are.
        pages_by_user: page ids of each user's history, oldest rows first.
        candidate_user: [C] int64, the user of each candidate.

    Returns:
        The features with the history's key ``pages`` at the users' stride. No K/V is copied.
    """
    pages = torch.tensor([page for pages in pages_by_user for page in pages], dtype=torch.int64)
    lengths = torch.tensor([len(pages) for pages in pages_by_user])
    return with_key(features, history_key(history, PAGES), Bags(pages, lengths), candidate_user)


def _cached_rows(cache: KVCache, lookup: _Lookup) -> Tensor:
    """Those rows [planes, R, H, D] of what is cached that are right for the history."""
    pages = [] if lookup.entry is None else lookup.entry.pages
    return cache.pool.read(pages, lookup.kept_rows)


def _keep(
    user_id: str,
    lookup: _Lookup,
    cache: KVCache,
    kv: Tensor,
    pinned: list[tuple[KVCache, Entry]],
) -> _Lookup:
    """Put the K/V of a history that missed into the cache; what was there stays as it is."""
    if lookup.reason == HIT or lookup.num_events == 0:
        return lookup
    entry = cache.put(user_id, lookup.digests, kv, lookup.entry, lookup.kept_rows)
    if entry is None:
        return lookup._replace(reason=NOT_ADMITTED)
    pinned.append((cache, entry))
    return lookup._replace(entry=entry)


def _found_pages(looked_up: Sequence[_Lookup], kept: Sequence[_Lookup]) -> _Found:
    """A request whose histories lie in pages, all looked up or encoded and kept.

    Where one history has no room, none of the request's is read from pages.
    """
    num_events = sum(lookup.num_events for lookup in looked_up)
    if any(lookup.reason == NOT_ADMITTED for lookup in kept):
        use = CacheUse("bypass", NOT_ADMITTED, 0, num_events, "none")
        return _Found((), use, in_pages=False)
    cached = sum(lookup.num_cached for lookup in looked_up)
    reasons = [lookup.reason for lookup in looked_up if lookup.reason not in (HIT, TOO_SHORT)]
    status = "partial" if reasons and cached else "miss" if reasons else HIT
    tier = "device" if cached else "none"
    use = CacheUse(status, reasons[0] if reasons else "", cached, num_events - cached, tier)
    return _Found(tuple(lookup.entry for lookup in kept or looked_up), use, in_pages=True)


def _found_nothing(lookups: Sequence[_Lookup]) -> _Found:
    """A request without events: there is nothing to keep, and no page to read."""
    use = CacheUse("bypass", TOO_SHORT, 0, 0, "none")
    return _Found(tuple(None for _ in lookups), use, in_pages=True)


def _not_cached(request: Request, reason: str) -> _Found:
    use = CacheUse("bypass", reason, 0, request.num_events, "none")
    return _Found((), use, in_pages=False)


def _scores_by_place(
    places: list[int], requests: Sequence[Request], logits: Tensor
) -> dict[int, list[float]]:
    # Not torch.sigmoid: its vectorised form gives other bits than the one for a tensor's last rows.
    probabilities = 1.0 / (1.0 + torch.exp(-logits.double()))
    parts = probabilities.split([request.num_candidates for request in requests])
    return {place: part.tolist() for place, part in zip(places, parts, strict=True)}
