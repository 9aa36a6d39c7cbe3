"""The only place where cache meets model: look up, prefill or extend what misses, expand, score.

The model is a function of tensors and the cache keeps K/V; this file hands one to the other. Every
fault of the cache is a recomputation, so scores never depend on what it holds.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_kvshare.cache.codecs import is_finite
from torchrec_kvshare.cache.decision import decide
from torchrec_kvshare.cache.identity import (
    NO_CONTEXT,
    ModelVersion,
    PrefixDigests,
    identity_of,
    text_digest,
    version_of,
)
from torchrec_kvshare.cache.items import ItemCache
from torchrec_kvshare.cache.kv_cache import DEVICE, Entry, Lookup
from torchrec_kvshare.cache.reasons import (
    BYPASS,
    HIT,
    NOT_ADMITTED,
    NOT_FINITE,
    TOO_SHORT,
)
from torchrec_kvshare.cache.stack import Want
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.data.batches import Bags, with_key
from torchrec_kvshare.data.schema import FeatureSchema, RawId, pages_key
from torchrec_kvshare.errors import ConfigError, ScoreError
from torchrec_kvshare.features import (
    UNKNOWN_IDS,
    Events,
    Request,
    collate,
    collate_candidates,
    collate_history,
    collate_tails,
    distinct_histories,
    unknown_ids,
    user_of_candidates,
)
from torchrec_kvshare.history.pages import split_users
from torchrec_kvshare.labels import EXPAND, LOOKUP, PREFILL, SCORE
from torchrec_kvshare.ranking import RankingModel

CACHE_OFF = "cache_off"
NO_TIER = "none"
logger = logging.getLogger(__name__)

MAX_NAMED = 10  # candidates without a score that an error names


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
        staleness_s: seconds since the oldest of the cached K/V was encoded; 0 where none was used.
    """

    status: str
    reason: str
    cached_events: int
    computed_events: int
    tier: str
    staleness_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Answer:
    """Scores of one request, candidates in the order they came, as probabilities.

    Attributes:
        request_id: of the request.
        scores: one for each candidate.
        model_version: that scored.
        cache: what it did.
        unknown_ids: by column, where the request asked for them.
    """

    request_id: str | int | None
    scores: list[float]
    model_version: str
    cache: CacheUse
    unknown_ids: dict[str, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """The project's one answer format."""
        answer = {
            "request_id": self.request_id,
            "scores": self.scores,
            "model_version": self.model_version,
            "cache": vars(self.cache),
        }
        return answer if self.unknown_ids is None else answer | {UNKNOWN_IDS: self.unknown_ids}


@dataclass(frozen=True)
class Unscored:
    """What stands in the place of an answer whose scores are not all finite numbers.

    Attributes:
        error: naming the candidates.
        cache: what the cache did for it.
    """

    error: ScoreError
    cache: CacheUse


class Encoded(NamedTuple):
    """K/V of one user, in no cache's hands.

    Attributes:
        kv_by_history: [planes, R, H, D] of each history.
        use: how much of it was in the store.
    """

    kv_by_history: list[Tensor]
    use: CacheUse


class _Sought(NamedTuple):
    """What is known of one history of a request: its K/V, or why some is missing.

    Attributes:
        lookup: the best that any tier has.
        digests: of the history.
        kept_events: events whose cached K/V is right for it.
        kept_rows: rows of K/V that they have.
    """

    lookup: Lookup
    digests: PrefixDigests
    kept_events: int
    kept_rows: int

    @property
    def num_events(self) -> int:
        return self.digests.num_events

    @property
    def num_cached(self) -> int:
        """Events that need not be encoded."""
        return self.num_events if self.lookup.reason == HIT else self.kept_events

    @property
    def is_complete(self) -> bool:
        return self.lookup.reason == HIT or self.num_events == 0


@dataclass(frozen=True)
class _Found:
    """One request's K/V and what to say of it.

    Attributes:
        use: for the answer.
        entries: of each history, where it lies in pages; None for one without events.
        kv: of each history, where it was encoded and there was no room to keep it.
    """

    use: CacheUse
    entries: tuple[Entry | None, ...] | None = None
    kv: tuple[Tensor, ...] | None = None


class _Holds:
    """Entries that are held for a batch, each until the batch is done or it is let go."""

    def __init__(self, store: KVStore) -> None:
        self._store = store
        self._held: list[tuple[int, Entry]] = []

    def add(self, number: int, entry: Entry | None) -> None:
        if entry is not None:
            self._held.append((number, entry))

    def release(self, number: int, entry: Entry | None) -> None:
        if entry is not None:
            self._held.remove((number, entry))
            self._store.release(number, entry)

    def release_all(self) -> None:
        for number, entry in self._held:
            self._store.release(number, entry)
        self._held.clear()


class Engine:
    """Score requests, their histories encoded once per user while the store holds them.

    Args:
        model: the ranking functions; read only.
        schema: the model's columns.
        store: where K/V is kept between requests; None shares it within a request only.
        items: where projected candidates are kept; None projects them anew.
        version: stands in every answer and in the identity of K/V. None: digests of the model's
            weights, which takes a pass over all of them.
        no_store: why there is no store, for the answers.

    Attributes:
        version: of the weights as they were when they were last looked at.

    Raises:
        ConfigError: if the store keeps K/V apart by a context column that the schema has not, or
            the version is a word of the caller's, or there is none and the model is no
            ``RankingModel``.
    """

    def __init__(
        self,
        model: RankingFunctions,
        schema: FeatureSchema,
        store: KVStore | None,
        items: ItemCache | None = None,
        version: ModelVersion | None = None,
        no_store: str = CACHE_OFF,
    ) -> None:
        if not isinstance(version, ModelVersion | None):
            raise ConfigError(
                f"version is {version!r}; a word tells no weights apart: leave it out, or give an "
                "artifact's manifest.version"
            )
        if store is not None:
            assert len(store.caches) == len(schema.histories)
            if unknown := sorted(set(store.context) - set(schema.context)):
                raise ConfigError(
                    f"the store's context is {unknown}; of {list(schema.context)} some are allowed"
                )
        self.model = model
        self.schema = schema
        self.store = store
        self.items = items
        self.no_store = no_store
        self._weights = _weights_of(model)
        self._num_changes = self._count_changes()
        self.version = version or _version_of(model, schema)

    @property
    def model_version(self) -> str:
        """What answers call the model: ``<model>-<tables>``."""
        return str(self.version)

    def renew(self) -> None:
        """Read the model's weights again: K/V of what they were before is not used any more.

        Weights that were changed in place, as an optimizer's step and ``load_state_dict`` do it,
        are noticed without it. Not while requests are scored.

        Raises:
            ConfigError: if the model is no ``RankingModel``.
        """
        num_changes = self._count_changes()
        self.version = _version_of(self.model, self.schema)
        self._weights = _weights_of(self.model)
        self._num_changes = num_changes
        if self.items is not None:
            self.items.clear()

    def renew_if_changed(self) -> None:
        """Renew if the weights were changed in place since they were last looked at."""
        if self._count_changes() != self._num_changes:
            self.renew()
            logger.warning("the weights were changed; the model is %s now", self.model_version)

    def _count_changes(self) -> int:
        return sum(weight._version for weight in self._weights)

    def rank(self, requests: Sequence[Request]) -> list[Answer]:
        """Score requests in one batch, all or none; safe to call from several threads.

        Args:
            requests: parsed requests; users may repeat, candidates may be none.

        Returns:
            One answer per request, in their order.

        Raises:
            ScoreError: of the first request with a score that is not finite.
        """
        return [_scored(answer) for answer in self.rank_each(requests)]

    @torch.no_grad()
    def rank_each(self, requests: Sequence[Request]) -> list[Answer | Unscored]:
        """Score requests in one batch, each by itself: one that has no score fails alone.

        Args:
            requests: as for ``rank``.

        Returns:
            For each request its answer, or why it has none.
        """
        if not requests:
            return []
        self.renew_if_changed()
        if self.store is None:
            return self._answers(requests, [_not_cached(r, self.no_store) for r in requests])
        holds = _Holds(self.store)
        try:
            found = self._find(requests, self.store, holds)
            return self._answers(requests, [found[place] for place in range(len(requests))])
        finally:
            holds.release_all()

    @torch.no_grad()
    def prefetch(self, users: Sequence[Request]) -> None:
        """Bring the K/V of users to the device before they are ranked, encoded if it is nowhere.

        Args:
            users: as ``parse_user`` gives them; candidates are not read.
        """
        self.renew_if_changed()
        if self.store is not None:
            holds = _Holds(self.store)
            try:
                self._find(users, self.store, holds)
            finally:
                holds.release_all()

    @torch.no_grad()
    def encode(self, user: Request) -> Encoded:
        """The K/V of a user, taken out of the store or into it.

        Args:
            user: as ``parse_user`` gives it; candidates are not read.
        """
        self.renew_if_changed()
        use = _not_cached(user, self.no_store).use
        if self.store is not None:
            holds = _Holds(self.store)
            try:
                found = self._find([user], self.store, holds)[0]
                if found.kv is not None:
                    return Encoded(list(found.kv), found.use)
                if found.entries is not None:
                    return Encoded(_copies(found.entries, self.store), found.use)
                use = found.use
            finally:
                holds.release_all()
        planes = self.model.prefill(collate_history([user], self.schema).sparse_features)
        num_rows = self.model.num_rows(
            [user.events_by_history[history.name].num_events for history in self.schema.histories]
        )
        pairs = zip(planes, num_rows, strict=True)
        return Encoded([split_users(kv, [number])[0] for kv, number in pairs], use)

    def events_to_encode(self, request: Request) -> int:
        """An estimate, without a look-up: none of a user that the device knows, else all."""
        if self.store is not None and self.store.knows(request.user_id):
            return 0
        return request.num_events

    def forget(self, user_id: RawId) -> dict[str, int | None]:
        """Drop the K/V of all histories of a user; see ``KVStore.forget``."""
        return {} if self.store is None else self.store.forget(user_id)

    def close(self) -> None:
        """Let go of the store; see ``KVStore.close``."""
        if self.store is not None:
            self.store.close()

    def _find(
        self, requests: Sequence[Request], store: KVStore, holds: _Holds
    ) -> dict[int, _Found]:
        """K/V of every request: looked up, or encoded in one batch and kept."""
        found: dict[int, _Found] = {}
        missing: dict[int, tuple[_Sought, ...]] = {}
        num_landed = store.flights.num_landed
        with record_function(LOOKUP):
            places = []
            for place, request in enumerate(requests):
                if request.num_events == 0:
                    found[place] = _found_nothing(len(store.caches))
                elif request.num_events < store.min_events:
                    found[place] = _not_cached(request, TOO_SHORT)
                else:
                    places.append(place)
            sought = self._seek([requests[place] for place in places], store, holds)
        for place, of_request in zip(places, sought, strict=True):
            if all(one.is_complete for one in of_request):
                found[place] = _found_pages(of_request)
                store.count_hit(requests[place].user_id, [one.lookup for one in of_request])
            else:
                missing[place] = of_request
        if missing:
            found |= self._encode_once(requests, missing, num_landed, store, holds)
        for one in found.values():
            store.metrics.count("events", one.use.cached_events, source="cached")
            store.metrics.count("events", one.use.computed_events, source="computed")
        return found

    def _seek(
        self, requests: Sequence[Request], store: KVStore, holds: _Holds
    ) -> list[tuple[_Sought, ...]]:
        """The best K/V of each history of each request that any tier has."""
        on_device = [self._look_up(request, store, holds) for request in requests]
        if store.stack is None:
            return on_device
        wants, lookups = [], []
        for request, of_request in zip(requests, on_device, strict=True):
            for number, one in enumerate(of_request):
                if not one.is_complete:
                    num_rows = partial(self._num_rows, number)
                    want = Want(request.user_id, one.digests, one.kept_events, num_rows)
                    wants.append((number, want))
                    lookups.append(one.lookup)
        fetched = iter(store.fetch(wants, lookups))
        best = []
        for of_request in on_device:
            found = []
            for number, one in enumerate(of_request):
                lookup = one.lookup if one.is_complete else next(fetched)
                if lookup.entry is not one.lookup.entry:
                    holds.add(number, lookup.entry)
                    holds.release(number, one.lookup.entry)
                found.append((lookup, one.digests))
            best.append(self._usable(found, store, holds))
        return best

    def _num_rows(self, number: int, num_events: int) -> int:
        """Rows of K/V that so many events of one history have."""
        counts = [0] * len(self.schema.histories)
        counts[number] = num_events
        return self.model.num_rows(counts)[number]

    def _look_up(self, request: Request, store: KVStore, holds: _Holds) -> tuple[_Sought, ...]:
        """What the device has of each history of a request."""
        found = []
        context = _context_digest(request, store.context)
        for number, history in enumerate(self.schema.histories):
            block = store.caches[number].pool.page_size
            identity = identity_of(self.version, context, history.name, block)
            digests = PrefixDigests(request.events_by_history[history.name], self.schema, identity)
            lookup = Lookup(None, TOO_SHORT, 0, 0.0)
            if digests.num_events:
                lookup = store.caches[number].lookup(request.user_id, digests)
                holds.add(number, lookup.entry)
            found.append((lookup, digests))
        return self._usable(found, store, holds)

    def _usable(
        self, found: Sequence[tuple[Lookup, PrefixDigests]], store: KVStore, holds: _Holds
    ) -> tuple[_Sought, ...]:
        """What of the K/V is right for the histories of a request; what is of no use is let go."""
        reusable = self.model.reusable(
            [lookup.num_matched if store.extends else 0 for lookup, _ in found],
            [0 if lookup.entry is None else lookup.entry.num_events for lookup, _ in found],
            [digests.num_events for _, digests in found],
        )
        sought = []
        for number, ((lookup, digests), (events, rows)) in enumerate(
            zip(found, reusable, strict=True)
        ):
            if rows == 0 and lookup.reason != HIT:
                # Its own pages may make room for what comes.
                holds.release(number, lookup.entry)
                lookup = lookup._replace(entry=None, num_matched=0)
            sought.append(_Sought(lookup, digests, events, rows))
        return tuple(sought)

    def _encode_once(
        self,
        requests: Sequence[Request],
        missing: dict[int, tuple[_Sought, ...]],
        num_landed: int,
        store: KVStore,
        holds: _Holds,
    ) -> dict[int, _Found]:
        """K/V of what misses, encoded here, or waited for where another request is encoding it."""
        key_by_place = {
            place: store.flight_key(requests[place].user_id, [one.digests for one in of_request])
            for place, of_request in missing.items()
        }
        led = store.flights.lead(key_by_place.values())
        store.metrics.count("flights", len(led), outcome="led")
        found: dict[int, _Found] = {}
        try:
            mine = {place: missing[place] for place, key in key_by_place.items() if key in led}
            others = [place for place in missing if place not in mine]
            for place in others:
                _let_go(missing[place], holds)
            if store.flights.num_landed != num_landed:
                # One of them may have been encoded since it was looked up.
                for place in mine:
                    _let_go(missing[place], holds)
                mine = self._look_up_again(requests, list(mine), found, store, holds)
            found |= self._prefill(requests, mine, store, holds)
        finally:
            store.flights.land(led)
        if others:
            store.join([key_by_place[place] for place in others])
            rest = self._look_up_again(requests, others, found, store, holds)
            found |= self._prefill(requests, rest, store, holds)
        return found

    def _look_up_again(
        self,
        requests: Sequence[Request],
        places: Sequence[int],
        found: dict[int, _Found],
        store: KVStore,
        holds: _Holds,
    ) -> dict[int, tuple[_Sought, ...]]:
        """What the device still lacks; the rest goes to ``found``."""
        missing = {}
        for place in places:
            of_request = self._look_up(requests[place], store, holds)
            if all(one.is_complete for one in of_request):
                found[place] = _found_pages(of_request)
            else:
                missing[place] = of_request
        return missing

    def _prefill(
        self,
        requests: Sequence[Request],
        missing: dict[int, tuple[_Sought, ...]],
        store: KVStore,
        holds: _Holds,
    ) -> dict[int, _Found]:
        """Encode what misses, all in one batch, and keep what there is room for."""
        if not missing:
            return {}
        places = list(missing)
        firsts, row_of_place = distinct_histories([requests[place] for place in places])
        sought_by_row = [missing[places[first]] for first in firsts]
        with record_function(PREFILL):
            kv_by_history = self._encode(
                [requests[places[first]] for first in firsts], sought_by_row, store
            )
        found_by_row = []
        for row, first in enumerate(firsts):
            new_kv = [parts[row] for parts in kv_by_history]
            request = requests[places[first]]
            found_by_row.append(_keep(request, sought_by_row[row], new_kv, store, holds))
        store.metrics.count("hits_by_scope", len(places) - len(firsts), scope="request")
        return {place: found_by_row[row] for place, row in zip(places, row_of_place, strict=True)}

    def _encode(
        self,
        requests: Sequence[Request],
        sought_by_row: Sequence[Sequence[_Sought]],
        store: KVStore,
    ) -> list[list[Tensor]]:
        """For each history the K/V [planes, new rows, H, D] of each request, behind kept rows."""
        num_rows = [
            self.model.num_rows([one.num_events for one in sought]) for sought in sought_by_row
        ]
        if any(one.kept_rows for sought in sought_by_row for one in sought):
            kv_by_history = self._extend(requests, sought_by_row, store)
        else:
            kv_by_history = self.model.prefill(
                collate_history(requests, self.schema).sparse_features
            )
        parts = []
        for number, kv in enumerate(kv_by_history):
            new_rows = [
                counts[number] - sought[number].kept_rows
                for counts, sought in zip(num_rows, sought_by_row, strict=True)
            ]
            parts.append(split_users(kv, new_rows))
        return parts

    def _extend(
        self,
        requests: Sequence[Request],
        sought_by_row: Sequence[Sequence[_Sought]],
        store: KVStore,
    ) -> list[Tensor]:
        tails: list[dict[str, Events]] = [{} for _ in requests]
        first_places: dict[str, list[int]] = {}
        cached, cached_rows = [], []
        for number, history in enumerate(self.schema.histories):
            of_history = [sought[number] for sought in sought_by_row]
            first_places[history.name] = [one.kept_events for one in of_history]
            for tail, request, one in zip(tails, requests, of_history, strict=True):
                events = request.events_by_history[history.name]
                tail[history.name] = events.part(one.kept_events, events.num_events)
            rows = [store.rows(number, one.lookup.entry, one.kept_rows) for one in of_history]
            cached.append(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))
            cached_rows.append(torch.tensor([one.kept_rows for one in of_history]))
        batch = collate_tails(tails, first_places, self.schema)
        return self.model.extend(batch.sparse_features, cached, cached_rows)

    def _answers(
        self, requests: Sequence[Request], found: Sequence[_Found]
    ) -> list[Answer | Unscored]:
        in_pages = [place for place, one in enumerate(found) if one.entries is not None]
        nowhere = [
            place for place, one in enumerate(found) if one.entries is None and one.kv is None
        ]
        scores = self._score_cached(requests, in_pages, found)
        scores |= self._score_uncached(requests, nowhere)
        for place, one in enumerate(found):
            if one.kv is not None:
                scores[place] = self._score_kv(requests[place], one.kv)
        answers: list[Answer | Unscored] = []
        for place, request in enumerate(requests):
            use = found[place].use
            try:
                _check_scores(request, scores[place])
            except ScoreError as error:
                answers.append(Unscored(error, use))
            else:
                answers.append(self.answer(request, scores[place], use))
        return answers

    def answer(self, request: Request, scores: list[float], use: CacheUse) -> Answer:
        """A request's scores, and what it asked to be told beside them."""
        unknown = unknown_ids(request) if UNKNOWN_IDS in request.report else None
        return Answer(request.request_id, scores, self.model_version, use, unknown)

    @torch.no_grad()
    def score_with(
        self, request: Request, kv_by_history: Sequence[Tensor], first_candidate: int = 0
    ) -> list[float]:
        """Probabilities of a request's candidates over K/V that lies in no cache.

        Args:
            request: its events are not read, but for their times.
            kv_by_history: [planes, R, H, D] of each history.
            first_candidate: place of its first candidate, where it is a part of others.

        Raises:
            ScoreError: naming the candidates whose scores are not finite.
        """
        scores = self._score_kv(request, kv_by_history)
        _check_scores(request, scores, first_candidate)
        return scores

    def _score_kv(self, request: Request, kv_by_history: Sequence[Tensor]) -> list[float]:
        # A history's K/V is a table of one page.
        pages = [[[0] if kv.size(1) else []] for kv in kv_by_history]
        tables = [kv.unsqueeze(1) for kv in kv_by_history]
        return self._score_pages([request], pages, tables)[0]

    def _score_cached(
        self, requests: Sequence[Request], places: list[int], found: Sequence[_Found]
    ) -> dict[int, list[float]]:
        if self.store is None or not places:
            return {}
        chosen = [requests[place] for place in places]
        firsts, _ = distinct_histories(chosen)
        pages_by_history = []
        for number in range(len(self.schema.histories)):
            entries = [(found[places[first]].entries or ())[number] for first in firsts]
            pages_by_history.append([[] if entry is None else entry.pages for entry in entries])
        tables = [cache.pool.kv_pages for cache in self.store.caches]
        scores = self._score_pages(chosen, pages_by_history, tables)
        return dict(zip(places, scores, strict=True))

    def _score_pages(
        self,
        requests: Sequence[Request],
        pages_by_history: Sequence[Sequence[list[int]]],
        tables: list[Tensor],
    ) -> list[list[float]]:
        """Probabilities over K/V in tables of pages, those of each distinct history."""
        if not any(request.num_candidates for request in requests):
            return [[] for _ in requests]
        with record_function(EXPAND):
            batch = collate_candidates(requests, self.schema)
            features = batch.sparse_features
            candidate_user = user_of_candidates(requests)
            for history, pages in zip(self.schema.histories, pages_by_history, strict=True):
                features = expand(features, history.name, pages, candidate_user)
            items = None
            if self.items is not None:
                items = self.items.project(features, self.model.project_candidates)
        with record_function(SCORE):
            logits = self.model.score(batch.dense_features, features, tables, items)
        return _probabilities(requests, logits)

    def _score_uncached(
        self, requests: Sequence[Request], places: list[int]
    ) -> dict[int, list[float]]:
        chosen = [requests[place] for place in places]
        if not any(request.num_candidates for request in chosen):
            return {place: [] for place in places}
        batch = collate(chosen, self.schema)
        with record_function(SCORE):
            logits = self.model(batch.dense_features, batch.sparse_features)
        return dict(zip(places, _probabilities(chosen, logits), strict=True))


def _weights_of(model: RankingFunctions) -> list[Tensor]:
    """Those whose changes PyTorch counts."""
    if not isinstance(model, nn.Module):
        return []
    return [w for w in (*model.parameters(), *model.buffers()) if not w.is_inference()]


def _version_of(model: RankingFunctions, schema: FeatureSchema) -> ModelVersion:
    if not isinstance(model, RankingModel):
        raise ConfigError(
            f"{type(model).__name__} has no version; a RankingModel is its weights' own, and an "
            "artifact's stands in its manifest"
        )
    return version_of(model, schema)


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
    return with_key(features, pages_key(history), Bags(pages, lengths), candidate_user)


def _context_digest(request: Request, columns: Sequence[str]) -> str:
    if not columns:
        return NO_CONTEXT
    return text_digest(json.dumps([request.context[column].tolist() for column in columns]))[:16]


def _keep(
    request: Request,
    sought: Sequence[_Sought],
    new_kv: Sequence[Tensor],
    store: KVStore,
    holds: _Holds,
) -> _Found:
    """Put the new K/V of a request's histories into the store; what was there stays as it is.

    Where one history has no room, none of the request's is read from pages. K/V that is not finite
    is not kept.
    """
    are_finite = all(map(is_finite, new_kv))
    if not are_finite:
        store.metrics.count("not_finite")
    kept: list[Entry | None] = []
    for number, (one, kv) in enumerate(zip(sought, new_kv, strict=True)):
        entry = one.lookup.entry
        if not one.is_complete:
            entry = None
            if are_finite:
                lookup = one.lookup
                if request.came_at is not None:  # Its user may have been forgotten in between.
                    lookup = lookup._replace(at=min(lookup.at, request.came_at))
                content = one.digests.content
                entry = store.put(number, request.user_id, content, kv, lookup, one.kept_rows)
            holds.add(number, entry)
        kept.append(entry)
    if all(
        entry is not None or not one.num_events for entry, one in zip(kept, sought, strict=True)
    ):
        return _found_pages(sought, kept)
    kv_by_history = []
    for number, (one, entry, kv) in enumerate(zip(sought, kept, new_kv, strict=True)):
        if entry is not None:
            kv_by_history.append(store.rows(number, entry, entry.num_rows))
        else:
            cached = store.rows(number, one.lookup.entry, one.kept_rows)
            kv_by_history.append(torch.cat([cached, kv], dim=1))
    use = _use_of(sought, NOT_ADMITTED if are_finite else NOT_FINITE)
    return _Found(use, kv=tuple(kv_by_history))


def _copies(entries: Sequence[Entry | None], store: KVStore) -> list[Tensor]:
    return [
        store.rows(number, entry, 0 if entry is None else entry.num_rows).clone()
        for number, entry in enumerate(entries)
    ]


def _let_go(sought: Sequence[_Sought], holds: _Holds) -> None:
    for number, one in enumerate(sought):
        holds.release(number, one.lookup.entry)


def _found_pages(sought: Sequence[_Sought], kept: Sequence[Entry | None] | None = None) -> _Found:
    """A request whose histories lie in pages, all looked up or encoded and kept."""
    entries = [one.lookup.entry for one in sought] if kept is None else kept
    return _Found(_use_of(sought), entries=tuple(entries))


def _use_of(sought: Sequence[_Sought], why_not_kept: str = "") -> CacheUse:
    """What an answer says of these look-ups."""
    decision = decide(
        [one.lookup.reason for one in sought],
        [one.num_events for one in sought],
        [one.kept_events for one in sought],
        why_not_kept,
    )
    staleness_s = max((one.lookup.age_s for one in sought if one.num_cached), default=0.0)
    return CacheUse(*decision, _tier(sought), staleness_s)


def _tier(sought: Sequence[_Sought]) -> str:
    """Where cached K/V was found; the tier below the device, where any of it was there."""
    tiers = [one.lookup.tier for one in sought if one.num_events and one.num_cached]
    return next((tier for tier in tiers if tier != DEVICE), DEVICE if tiers else NO_TIER)


def _found_nothing(num_histories: int) -> _Found:
    """A request without events: there is nothing to keep, and no page to read."""
    use = CacheUse(BYPASS, TOO_SHORT, 0, 0, NO_TIER)
    return _Found(use, entries=(None,) * num_histories)


def _not_cached(request: Request, reason: str) -> _Found:
    return _Found(CacheUse(BYPASS, reason, 0, request.num_events, NO_TIER))


def _probabilities(requests: Sequence[Request], logits: Tensor) -> list[list[float]]:
    # Not torch.sigmoid: its vectorised form gives other bits than the one for a tensor's last rows.
    probabilities = 1.0 / (1.0 + torch.exp(-logits.double()))
    parts = probabilities.split([request.num_candidates for request in requests])
    return [part.tolist() for part in parts]


def _check_scores(request: Request, scores: Sequence[float], first_candidate: int = 0) -> None:
    """Refuse scores that are no finite numbers, by their candidates' places."""
    if all(map(math.isfinite, scores)):
        return
    wrong = [place for place, score in enumerate(scores) if not math.isfinite(score)]
    named = ", ".join(str(first_candidate + place) for place in wrong[:MAX_NAMED])
    more = f" and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
    raise ScoreError(
        f"the model gave no finite score for candidates {named}{more} of request "
        f"{request.request_id}"
    )


def _scored(answer: Answer | Unscored) -> Answer:
    if isinstance(answer, Unscored):
        raise answer.error
    return answer
