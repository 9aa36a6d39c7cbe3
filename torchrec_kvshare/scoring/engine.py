"""The only place where cache meets model: look up, prefill or extend what misses, expand, score.

The model is a function of tensors and the cache keeps K/V; this file hands one to the other. Every
fault of the cache is a recomputation, so scores never depend on what it holds.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_kvshare.cache.identity import (
    NO_CONTEXT,
    ModelVersion,
    PrefixDigests,
    identity_of,
    text_digest,
    version_of,
)
from torchrec_kvshare.cache.items import ItemCache
from torchrec_kvshare.cache.leases import CacheUse, Lease, Wanted, acquire, not_cached
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.errors import ConfigError, ScoreError
from torchrec_kvshare.features.bags import Bags
from torchrec_kvshare.features.batches import (
    collate,
    collate_candidates,
    collate_history,
    collate_tails,
    user_of_candidates,
    with_key,
)
from torchrec_kvshare.features.parse import UNKNOWN_IDS
from torchrec_kvshare.features.request import Events, Request, distinct_histories, unknown_ids
from torchrec_kvshare.features.schema import FeatureSchema, RawId, pages_key
from torchrec_kvshare.history.pages import split_histories
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel
from torchrec_kvshare.model.stages import EXPAND, PREFILL, SCORE

CACHE_OFF = "cache_off"
logger = logging.getLogger(__name__)

MAX_NAMED = 10  # candidates without a score that an error names


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
            uses = [not_cached(request.num_events, self.no_store) for request in requests]
            return self._answers(requests, self._score_uncached(requests), uses)
        with self._leased(requests, self.store) as leases:
            scores = self._score_leased(requests, leases, self.store)
            return self._answers(requests, scores, [lease.use for lease in leases])

    @torch.no_grad()
    def prefetch(self, users: Sequence[Request]) -> None:
        """Bring the K/V of users to the device before they are ranked, encoded if it is nowhere.

        Args:
            users: as ``parse_user`` gives them; candidates are not read.
        """
        self.renew_if_changed()
        if self.store is not None:
            with self._leased(users, self.store):
                pass

    @torch.no_grad()
    def encode(self, user: Request) -> Encoded:
        """The K/V of a user, taken out of the store or into it.

        Args:
            user: as ``parse_user`` gives it; candidates are not read.
        """
        self.renew_if_changed()
        use = not_cached(user.num_events, self.no_store)
        if self.store is not None:
            with self._leased([user], self.store) as [lease]:
                if lease.is_admitted:
                    return Encoded(lease.copies(), lease.use)
                use = lease.use
        planes = self.model.prefill(collate_history([user], self.schema).sparse_features)
        num_rows = self.model.num_rows(user.num_events_by_history)
        return Encoded(split_histories(planes, [num_rows])[0], use)

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

    @contextmanager
    def _leased(self, requests: Sequence[Request], store: KVStore) -> Iterator[list[Lease]]:
        """K/V of every request; those of one user and history share a lease, as they share rows."""
        firsts, row_of_request = distinct_histories(requests)
        users = [requests[first] for first in firsts]

        def encode(leases: list[Lease]) -> list[list[Tensor]]:
            with record_function(PREFILL):
                return self._encode([users[lease.index] for lease in leases], leases)

        store.metrics.count("hits_by_scope", len(requests) - len(users), scope="request")
        wanted = [self._wanted(user, store) for user in users]
        with acquire(store, self.model, wanted, encode) as leases:
            yield [leases[row] for row in row_of_request]

    def _wanted(self, user: Request, store: KVStore) -> Wanted:
        context = _context_digest(user, store.context)
        digests = []
        for cache, history in zip(store.caches, self.schema.histories, strict=True):
            identity = identity_of(self.version, context, history.name, cache.pool.page_size)
            digests.append(
                PrefixDigests(user.events_by_history[history.name], self.schema, identity)
            )
        return Wanted(user.user_id, digests, user.came_at)

    def _encode(self, users: Sequence[Request], leases: Sequence[Lease]) -> list[list[Tensor]]:
        """The K/V that leases lack, all of it in one batch."""
        if any(one.kept_rows for lease in leases for one in lease.histories):
            kv_by_history = self._extend(users, leases)
        else:
            kv_by_history = self.model.prefill(collate_history(users, self.schema).sparse_features)
        new_rows = []
        for user, lease in zip(users, leases, strict=True):
            num_rows = self.model.num_rows(user.num_events_by_history)
            kept = [one.kept_rows for one in lease.histories]
            new_rows.append(
                [rows - of_these for rows, of_these in zip(num_rows, kept, strict=True)]
            )
        return split_histories(kv_by_history, new_rows)

    def _extend(self, users: Sequence[Request], leases: Sequence[Lease]) -> list[Tensor]:
        tails: list[dict[str, Events]] = [{} for _ in users]
        first_places: dict[str, list[int]] = {}
        cached, cached_rows = [], []
        for number, history in enumerate(self.schema.histories):
            of_history = [lease.histories[number] for lease in leases]
            first_places[history.name] = [one.kept_events for one in of_history]
            for tail, user, one in zip(tails, users, of_history, strict=True):
                events = user.events_by_history[history.name]
                tail[history.name] = events.part(one.kept_events, events.num_events)
            rows = [lease.cached_rows(number) for lease in leases]
            cached.append(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))
            cached_rows.append(torch.tensor([one.kept_rows for one in of_history]))
        batch = collate_tails(tails, first_places, self.schema)
        return self.model.extend(batch.sparse_features, cached, cached_rows)

    def _answers(
        self,
        requests: Sequence[Request],
        scores: Sequence[list[float]],
        uses: Sequence[CacheUse],
    ) -> list[Answer | Unscored]:
        answers: list[Answer | Unscored] = []
        for request, of_request, use in zip(requests, scores, uses, strict=True):
            try:
                _check_scores(request, of_request)
            except ScoreError as error:
                answers.append(Unscored(error, use))
            else:
                answers.append(self.answer(request, of_request, use))
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

    def _score_leased(
        self, requests: Sequence[Request], leases: Sequence[Lease], store: KVStore
    ) -> list[list[float]]:
        """Scores over K/V in pages, K/V that the store had no room for, or none at all."""
        scores: list[list[float]] = [[] for _ in requests]
        in_pages = [place for place, lease in enumerate(leases) if lease.pages is not None]
        chosen = [requests[place] for place in in_pages]
        firsts, _ = distinct_histories(chosen)
        pages_by_user = [leases[in_pages[first]].pages or [] for first in firsts]
        tables = [cache.pool.kv_pages for cache in store.caches]
        in_order = self._score_pages(chosen, [*zip(*pages_by_user, strict=True)], tables)
        for place, of_request in zip(in_pages, in_order, strict=True):
            scores[place] = of_request
        nowhere = [place for place, lease in enumerate(leases) if not lease.is_admitted]
        in_order = self._score_uncached([requests[place] for place in nowhere])
        for place, of_request in zip(nowhere, in_order, strict=True):
            scores[place] = of_request
        for place, lease in enumerate(leases):
            if lease.kv_by_history is not None:
                scores[place] = self._score_kv(requests[place], lease.kv_by_history)
        return scores

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

    def _score_uncached(self, requests: Sequence[Request]) -> list[list[float]]:
        if not any(request.num_candidates for request in requests):
            return [[] for _ in requests]
        batch = collate(requests, self.schema)
        with record_function(SCORE):
            logits = self.model(batch.dense_features, batch.sparse_features)
        return _probabilities(requests, logits)


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
