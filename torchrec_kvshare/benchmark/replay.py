"""Requests on a cache without their model: an engine that encodes nothing and scores nothing.

Which K/V stays depends on the number of its pages and not on their content. So zeros stand for K/V,
and all else is the engine's: its look-ups, leases, evictions and reasons, at the requests' times.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from torchrec_kvshare.cache.identity import UNNAMED
from torchrec_kvshare.cache.leases import CacheUse, Lease, Wanted
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.features.batches import RequestBatch
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import FeatureSchema
from torchrec_kvshare.model.ranking import RankingFunctions
from torchrec_kvshare.scoring.engine import Engine

DRAIN_S = 60.0  # for the writes of one request to the tiers below


class TraceClock:
    """The time of the request that is replayed."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class RowCounts(Protocol):
    """What a replay needs of a model: how events become rows of K/V."""

    def num_kv_rows(self, num_events: list[int]) -> list[int]:
        """See ``RankingFunctions``."""

    def reusable(
        self, num_matched: list[int], cached_events: list[int], num_events: list[int]
    ) -> list[tuple[int, int]]:
        """See ``RankingFunctions``."""


class RowPerEvent:
    """The row counts of a causal model."""

    def num_kv_rows(self, num_events: list[int]) -> list[int]:
        return num_events

    def reusable(
        self, num_matched: list[int], cached_events: list[int], num_events: list[int]
    ) -> list[tuple[int, int]]:
        return [(events, events) for events in num_matched]


class WeightlessEngine(Engine):
    """An engine whose K/V are zeros.

    Args:
        rows: the model's row counts.
        schema: the model's columns.
        store: an empty store; its K/V may have any number of planes, heads and channels.
        wanted_by_request: digests of requests by ``id``, of earlier replays of the same requests
            with pages of the same size; new ones are added.
    """

    def __init__(
        self,
        rows: RowCounts,
        schema: FeatureSchema,
        store: KVStore,
        wanted_by_request: dict[int, Wanted] | None = None,
    ) -> None:
        model: RankingFunctions = rows  # type: ignore[assignment]  # Nothing else is called.
        super().__init__(model, schema, store, version=UNNAMED)
        self._wanted_by_request = {} if wanted_by_request is None else wanted_by_request
        self._zeros = [
            torch.zeros(
                cache.pool.kv_pages.size(0),
                model.num_kv_rows([history.window.max_history] * len(schema.histories))[index],
                *cache.pool.kv_pages.shape[-2:],
            )
            for index, (cache, history) in enumerate(
                zip(store.caches, schema.histories, strict=True)
            )
        ]

    def replay(self, requests: Iterable[Request], clock: TraceClock) -> list[CacheUse]:
        """Look up the requests one after another, each at its time.

        Args:
            requests: in the order of their times.
            clock: the store's.

        Returns:
            What the cache did for each.
        """
        uses = []
        assert self.store is not None
        for request in requests:
            clock.now = float(request.time)
            with self._leased(RequestBatch([request]), self.store) as [lease]:
                uses.append(lease.use)
            if self.store.stack is not None:
                self.store.stack.drain(DRAIN_S)
        return uses

    def _wanted(self, user: Request, store: KVStore) -> Wanted:
        if id(user) not in self._wanted_by_request:
            self._wanted_by_request[id(user)] = super()._wanted(user, store)
        return self._wanted_by_request[id(user)]

    def _encode(self, users: Sequence[Request], leases: Sequence[Lease]) -> list[list[Tensor]]:
        encoded = []
        for user, lease in zip(users, leases, strict=True):
            num_rows = self.model.num_kv_rows(user.num_events_by_history)
            encoded.append(
                [
                    zeros[:, : rows - one.kept_rows]
                    for zeros, rows, one in zip(self._zeros, num_rows, lease.histories, strict=True)
                ]
            )
        return encoded
