"""The engine: the only place where cache meets model.

Look up K/V, encode or extend what is missing, let candidates attend to it, rank. Every fault of the
cache leads to encoding the history again, so scores never depend on what the cache holds.
"""

import json
import logging
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.profiler import record_function

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
from torchrec_kvshare.features.batches import (
    RequestBatch,
    collate,
    collate_candidates,
    collate_history,
    collate_tails,
    with_pages,
)
from torchrec_kvshare.features.parse import UNKNOWN_IDS
from torchrec_kvshare.features.request import Events, Request, unknown_ids
from torchrec_kvshare.features.schema import SCORES, UNNAMED_TASK, FeatureSchema, RawId
from torchrec_kvshare.history.pages import split_histories
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel, refuse_weights
from torchrec_kvshare.model.stages import EXPAND, PREFILL, SCORE

CACHE_OFF = "cache_off"
MAX_NAMED = 10  # candidates without a score that an error lists

logger = logging.getLogger(__name__)

Scores = list[float] | dict[str, list[float]]  # of an unnamed task, or by task


@dataclass(frozen=True)
class Answer:
    """Scores of one request.

    Attributes:
        request_id: of the request.
        scores: probabilities, one for each candidate, in the order they came; of named tasks by
            their names.
        model_version: the model that scored.
        cache: what the cache did.
        unknown_ids: their number by column, if the request asked for it.
    """

    request_id: str | int | None
    scores: Scores
    model_version: str
    cache: CacheUse
    unknown_ids: dict[str, int] | None = None

    @property
    def scores_by_task(self) -> dict[str, list[float]]:
        """The scores by task, also of an unnamed one."""
        return self.scores if isinstance(self.scores, dict) else {UNNAMED_TASK: self.scores}

    @property
    def ranking_scores(self) -> list[float]:
        """The scores of the first task, by which candidates are ranked."""
        return next(iter(self.scores_by_task.values()))

    def to_json(self) -> dict[str, Any]:
        """The project's one answer format."""
        answer = {
            "request_id": self.request_id,
            SCORES: self.scores,
            "model_version": self.model_version,
            "cache": vars(self.cache),
        }
        return answer if self.unknown_ids is None else answer | {UNKNOWN_IDS: self.unknown_ids}


@dataclass(frozen=True)
class Unscored:
    """Stands in place of an answer if a score of the request is not finite.

    Attributes:
        error: lists the candidates.
        cache: what the cache did.
    """

    error: ScoreError
    cache: CacheUse


class Engine:
    """Score requests; each user's history is encoded once while the store holds its K/V.

    Args:
        model: the ranking functions; the engine never changes them.
        schema: the model's columns.
        store: keeps K/V between requests; None shares K/V within a request only.
        items: keeps projected candidates; None projects them in every request.
        version: part of every answer and of the identity of K/V. None takes digests of the model's
            weights, which reads all of them once.
        no_store: the reason that answers give for not using a cache.

    Attributes:
        version: the model's version when its weights were last read.

    Raises:
        ConfigError: if the store separates K/V by a context column that the schema lacks, if the
            version is a word made up by the caller, or if it is None and the model is not a
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
        if isinstance(model, RankingModel):
            refuse_weights(model)
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
        """The version as answers show it: ``<model>-<tables>``."""
        return str(self.version)

    def renew(self) -> None:
        """Read the model's weights again, so that K/V of the old weights is not used any more.

        In-place changes, as an optimizer's step or ``load_state_dict`` make them, are noticed
        without it. Do not call it while requests are scored.

        Raises:
            ConfigError: if the model is not a ``RankingModel``.
        """
        num_changes = self._count_changes()
        self.version = _version_of(self.model, self.schema)
        self._weights = _weights_of(self.model)
        self._num_changes = num_changes
        if self.items is not None:
            self.items.clear()

    def renew_if_changed(self) -> None:
        """Call ``renew`` if the weights were changed in place since they were last read."""
        if self._count_changes() != self._num_changes:
            self.renew()
            logger.warning("the weights changed; the model is now %s", self.model_version)

    def rank(self, requests: Sequence[Request]) -> list[Answer]:
        """Score requests in one batch, all or none; may be called from several threads.

        Args:
            requests: parsed requests; users may repeat, a request may have no candidates.

        Returns:
            One answer per request, in their order.

        Raises:
            ScoreError: for the first request with a score that is not finite.
        """
        answers: list[Answer] = []
        for answer in self.rank_each(requests):
            if isinstance(answer, Unscored):
                raise answer.error
            answers.append(answer)
        return answers

    @torch.no_grad()
    def rank_each(self, requests: Sequence[Request]) -> list[Answer | Unscored]:
        """Score requests in one batch; a request without finite scores fails alone.

        Args:
            requests: as for ``rank``.

        Returns:
            For each request its answer, or why it has none.
        """
        if not requests:
            return []
        self.renew_if_changed()
        batch = RequestBatch(requests)
        if self.store is None:
            uses = [not_cached(request.num_events, self.no_store) for request in batch]
            return self._answers(batch, self._score_uncached(batch), uses)
        with self._leased(batch, self.store) as leases:
            scores = self._score_leased(batch, leases, self.store)
            return self._answers(batch, scores, [lease.use for lease in leases])

    @torch.no_grad()
    def prefetch(self, users: Sequence[Request]) -> list[CacheUse]:
        """Bring users' K/V into pages before they are ranked; encode what no tier has.

        Args:
            users: as ``parse_user`` returns them; candidates are not read.

        Returns:
            What the cache did for each.
        """
        self.renew_if_changed()
        if self.store is None:
            return [not_cached(user.num_events, self.no_store) for user in users]
        with self._leased(RequestBatch(users), self.store) as leases:
            return [lease.use for lease in leases]

    def kv_key(self, user: Request) -> Hashable:
        """Return a key that is equal for requests that need the same K/V; None without a store."""
        if self.store is None:
            return None
        wanted = self._wanted(user, self.store)
        return self.store.single_flight_key(wanted.user_id, wanted.histories)

    @torch.no_grad()
    def encode(self, user: Request) -> tuple[list[Tensor], CacheUse]:
        """Copy a user's K/V out of the store, or encode it (and keep it there).

        Args:
            user: as ``parse_user`` returns it; candidates are not read.

        Returns:
            K/V [planes, R, H, D] of each history, and what the cache did.
        """
        self.renew_if_changed()
        use = not_cached(user.num_events, self.no_store)
        if self.store is not None:
            with self._leased(RequestBatch([user]), self.store) as [lease]:
                if lease.is_admitted:
                    return lease.copies(), lease.use
                use = lease.use
        planes = self.model.prefill(collate_history([user], self.schema).sparse_features)
        return split_histories(planes, [self.model.num_kv_rows(user.num_events_by_history)])[0], use

    @torch.no_grad()
    def score_with(
        self, request: Request, kv_by_history: Sequence[Tensor], first_candidate: int = 0
    ) -> Tensor:
        """Score candidates over K/V that the caller holds.

        Args:
            request: of its events only the times are read.
            kv_by_history: [planes, R, H, D] of each history.
            first_candidate: index of its first candidate, where the request is a part of another.

        Returns:
            Probabilities [N, tasks] float64, in the order of the candidates.

        Raises:
            ScoreError: listing the candidates whose scores are not finite.
        """
        scores = self._score_kv(request, kv_by_history)
        _check_scores(request, scores, first_candidate)
        return scores

    def answer(self, request: Request, scores: Tensor, use: CacheUse) -> Answer:
        """The answer to a request with scores [N, tasks], and the reports it asked for."""
        unknown = unknown_ids(request) if UNKNOWN_IDS in request.report else None
        answered = answered_scores(scores, self.schema.tasks)
        return Answer(request.request_id, answered, self.model_version, use, unknown)

    def events_to_encode(self, request: Request) -> int:
        """Estimate without a look-up: 0 for a user that has pages, else all events."""
        if self.store is not None and self.store.contains(request.user_id):
            return 0
        return request.num_events

    def forget(self, user_id: RawId) -> dict[str, int | None]:
        """Drop the K/V of all histories of a user; see ``KVStore.forget``."""
        return {} if self.store is None else self.store.forget(user_id)

    def close(self) -> None:
        """Close the store; see ``KVStore.close``."""
        if self.store is not None:
            self.store.close()

    def _count_changes(self) -> int:
        return sum(weight._version for weight in self._weights)

    @contextmanager
    def _leased(self, batch: RequestBatch, store: KVStore) -> Iterator[list[Lease]]:
        """Lease the K/V of every request; requests that share their histories share the lease."""
        users = batch.users

        def encode(leases: list[Lease]) -> list[list[Tensor]]:
            with record_function(PREFILL):
                return self._encode([users[lease.index] for lease in leases], leases)

        store.metrics.count("hits_by_scope", len(batch) - len(users), scope="request")
        wanted = [self._wanted(user, store) for user in users]
        with acquire(store, self.model, wanted, encode) as leases:
            yield [leases[user] for user in batch.user_of_request]

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
        """Encode all K/V that the leases lack, in one batch."""
        if any(one.kept_rows for lease in leases for one in lease.histories):
            kv_by_history = self._extend(users, leases)
        else:
            kv_by_history = self.model.prefill(collate_history(users, self.schema).sparse_features)
        new_rows = []
        for user, lease in zip(users, leases, strict=True):
            num_rows = self.model.num_kv_rows(user.num_events_by_history)
            kept_rows = [one.kept_rows for one in lease.histories]
            new_rows.append([rows - kept for rows, kept in zip(num_rows, kept_rows, strict=True)])
        return split_histories(kv_by_history, new_rows)

    def _extend(self, users: Sequence[Request], leases: Sequence[Lease]) -> list[Tensor]:
        tails: list[dict[str, Events]] = [{} for _ in users]
        first_indices: dict[str, list[int]] = {}
        cached, cached_rows = [], []
        for number, history in enumerate(self.schema.histories):
            of_history = [lease.histories[number] for lease in leases]
            first_indices[history.name] = [one.kept_events for one in of_history]
            for tail, user, one in zip(tails, users, of_history, strict=True):
                events = user.events_by_history[history.name]
                tail[history.name] = events.part(one.kept_events, events.num_events)
            rows = [lease.cached_rows(number) for lease in leases]
            cached.append(rows[0] if len(rows) == 1 else torch.cat(rows, dim=1))
            cached_rows.append(torch.tensor([one.kept_rows for one in of_history]))
        batch = collate_tails(tails, first_indices, self.schema)
        return self.model.extend(batch.sparse_features, cached, cached_rows)

    def _answers(
        self,
        requests: Sequence[Request],
        scores: Sequence[Tensor],
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

    def _score_leased(
        self, batch: RequestBatch, leases: Sequence[Lease], store: KVStore
    ) -> list[Tensor]:
        """Score over pages, over K/V that the store had no room for, or without a cache."""
        scores = [self._no_scores() for _ in batch]
        in_pages = [row for row, lease in enumerate(leases) if lease.pages is not None]
        # Requests that share their histories share a lease: one list of pages for each of them.
        distinct = dict.fromkeys(leases[row] for row in in_pages)
        pages_by_user = [lease.pages or [] for lease in distinct]
        tables = [cache.pool.kv_pages for cache in store.caches]
        pages_by_history = [*zip(*pages_by_user, strict=True)]
        of_pages = self._score_pages(batch.select(in_pages), pages_by_history, tables)
        uncached = [row for row, lease in enumerate(leases) if not lease.is_admitted]
        of_uncached = self._score_uncached(batch.select(uncached))
        for row, of_request in zip([*in_pages, *uncached], [*of_pages, *of_uncached], strict=True):
            scores[row] = of_request
        for row, lease in enumerate(leases):
            if lease.kv_by_history is not None:
                scores[row] = self._score_kv(batch[row], lease.kv_by_history)
        return scores

    def _score_kv(self, request: Request, kv_by_history: Sequence[Tensor]) -> Tensor:
        # Each history's K/V is a table of one page.
        pages = [[[0] if kv.size(1) else []] for kv in kv_by_history]
        tables = [kv.unsqueeze(1) for kv in kv_by_history]
        return self._score_pages(RequestBatch([request]), pages, tables)[0]

    def _score_pages(
        self,
        batch: RequestBatch,
        pages_by_history: Sequence[Sequence[list[int]]],
        tables: Sequence[Tensor],
    ) -> list[Tensor]:
        if not any(request.num_candidates for request in batch):
            return [self._no_scores() for _ in batch]
        logits = score_pages(
            self.model, batch, self.schema, pages_by_history, tables, items=self.items
        )
        return self._probabilities(batch, logits)

    def _score_uncached(self, batch: RequestBatch) -> list[Tensor]:
        if not any(request.num_candidates for request in batch):
            return [self._no_scores() for _ in batch]
        collated = collate(batch, self.schema)
        with record_function(SCORE):
            logits = self.model(collated.dense_features, collated.sparse_features)
        return self._probabilities(batch, logits)

    def _no_scores(self) -> Tensor:
        return torch.empty(0, len(self.schema.tasks), dtype=torch.float64)

    def _probabilities(self, requests: Sequence[Request], logits: Tensor) -> list[Tensor]:
        """Return the probabilities [N, tasks] of each request."""
        shape = [sum(request.num_candidates for request in requests), len(self.schema.tasks)]
        if [*logits.shape] != shape:
            raise ConfigError(
                f"the model gives logits {[*logits.shape]}; {shape} are needed, one for each "
                f"candidate and each of the tasks {list(self.schema.tasks)}"
            )
        # Not torch.sigmoid: its vectorised form gives other bits than the one for a tensor's last
        # rows.
        probabilities = 1.0 / (1.0 + torch.exp(-logits.double()))
        return [*probabilities.split([request.num_candidates for request in requests])]


def score_pages(
    model: RankingFunctions,
    requests: Sequence[Request],
    schema: FeatureSchema,
    pages_by_history: Sequence[Sequence[list[int]]],
    tables: Sequence[Tensor],
    *,
    items: ItemCache | None = None,
) -> Tensor:
    """Score requests over K/V in tables of pages.

    Args:
        model: the ranking functions.
        requests: at least one, with at least one candidate among them.
        schema: the model's columns.
        pages_by_history: for each history the page ids of each of ``RequestBatch.users``, oldest
            rows first.
        tables: for each history its pages [planes, P, S, H, D].
        items: keeps projected candidates between requests; None projects them here.

    Returns:
        Logits [C, tasks].
    """
    with record_function(EXPAND):
        batch = collate_candidates(requests, schema)
        features = with_pages(batch.sparse_features, schema, pages_by_history)
        projected = None if items is None else items.project(features, model.project_candidates)
    with record_function(SCORE):
        return model.score(batch.dense_features, features, [*tables], projected)


def _weights_of(model: RankingFunctions) -> list[Tensor]:
    """The weights whose in-place changes PyTorch counts."""
    if not isinstance(model, nn.Module):
        return []
    return [w for w in (*model.parameters(), *model.buffers()) if not w.is_inference()]


def _version_of(model: RankingFunctions, schema: FeatureSchema) -> ModelVersion:
    if not isinstance(model, RankingModel):
        raise ConfigError(
            f"{type(model).__name__} has no version; a RankingModel's weights have digests, an "
            "artifact's manifest has a version"
        )
    return version_of(model, schema)


def _context_digest(request: Request, columns: Sequence[str]) -> str:
    if not columns:
        return NO_CONTEXT
    return text_digest(json.dumps([request.context[column].tolist() for column in columns]))[:16]


def answered_scores(scores: Tensor, tasks: Sequence[str]) -> Scores:
    """Return scores [N, tasks] as answers have them.

    Example:
        >>> answered_scores(torch.tensor([[0.5, 0.25], [1.0, 0.0]]), ("like", "love"))
        {'like': [0.5, 1.0], 'love': [0.25, 0.0]}
        >>> answered_scores(torch.tensor([[0.5], [1.0]]), (UNNAMED_TASK,))
        [0.5, 1.0]
    """
    by_task: dict[str, list[float]] = dict(zip(tasks, scores.T.tolist(), strict=True))
    return by_task.get(UNNAMED_TASK, by_task)


def _check_scores(request: Request, scores: Tensor, first_candidate: int = 0) -> None:
    """Refuse scores that are not finite, listing their candidates' indices."""
    is_finite = scores.isfinite().all(1)
    if bool(is_finite.all()):
        return
    wrong: list[int] = (~is_finite).nonzero().flatten().tolist()
    listed = ", ".join(str(first_candidate + index) for index in wrong[:MAX_NAMED])
    more = f" and {len(wrong) - MAX_NAMED} more" if len(wrong) > MAX_NAMED else ""
    raise ScoreError(
        f"the model gave no finite score for candidates {listed}{more} of request "
        f"{request.request_id}"
    )
