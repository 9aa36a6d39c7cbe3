"""Prefetches: users whose K/V is wanted soon are encoded while no request waits.

An upstream stage knows the user before it has the candidates. What it sends here waits behind all
requests, and is dropped rather than late: the request itself then encodes its history as ever.

Source:
    The pre-inference of RelayGR, in which the retrieval stage triggers the encoding.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

from torchrec_kvshare.errors import OverloadError
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.serving.metrics import PREFETCHES, ServerMetrics
from torchrec_kvshare.serving.models import Models, Served

# What became of a prefetch, beside the cache's hit, partial, miss and bypass.
QUEUED = "queued"
DUPLICATE = "duplicate"  # the same history of the user waits already
REPLACED = "replaced"  # another history of the user came before it was encoded
NO_CACHE = "no_cache"
NOT_HOT = "not_hot"  # events of a user whose last request is not remembered
FULL = "full"
LATE = "late"
RETIRED = "retired"  # another version of the model has taken over
FORGOTTEN = "forgotten"
FAILED = "failed"


@dataclass(frozen=True)
class Prefetch:
    """A user that waits to be encoded.

    Attributes:
        served: the version that its request was parsed for.
        request: without candidates.
        deadline: monotonic seconds; it is dropped afterwards.
        key: equal for prefetches that need the same K/V.
    """

    served: Served
    request: Request
    deadline: float
    key: Hashable


class Prefetches:
    """A bounded queue of users to encode, each of them once; thread-safe.

    Args:
        max_waiting: users at most.
        models: says which version answers now.
        metrics: counts what became of each.
    """

    def __init__(self, max_waiting: int, models: Models, metrics: ServerMetrics) -> None:
        self._max_waiting = max_waiting
        self._models = models
        self._metrics = metrics
        self._waiting: OrderedDict[tuple[str, str], Prefetch] = OrderedDict()
        self._lock = threading.Lock()
        metrics.read("prefetches_waiting", lambda: len(self._waiting))

    def check_room(self) -> None:
        """Check that another user may wait, after those that are late were dropped.

        Raises:
            OverloadError: if none may.
        """
        with self._lock:
            if len(self._waiting) >= self._max_waiting:
                now = time.monotonic()
                for place, waiting in [*self._waiting.items()]:
                    if waiting.deadline <= now:
                        self._drop(place, LATE)
            num_waiting = len(self._waiting)
        if num_waiting >= self._max_waiting:
            self._metrics.refuse(PREFETCHES)
            self._metrics.count("prefetches", FULL)
            raise OverloadError(
                f"{num_waiting} prefetches wait; server.queue_prefetches allows no more"
            )

    def offer(self, served: Served, request: Request, deadline: float) -> str:
        """Queue a user.

        Args:
            served: the version that answers.
            request: without candidates.
            deadline: monotonic seconds.

        Returns:
            ``queued``, or ``duplicate`` or ``no_cache``: nothing is left to do.

        Raises:
            OverloadError: if too many wait.
        """
        key = served.engine.kv_key(request)
        if key is None:
            self._metrics.count("prefetches", NO_CACHE)
            return NO_CACHE
        self.check_room()
        place = (served.name, request.user_id)
        with self._lock:
            before = self._waiting.get(place)
            if before is not None and before.key == key and before.served is served:
                self._metrics.count("prefetches", DUPLICATE)
                return DUPLICATE
            if before is not None:
                self._drop(place, REPLACED)
            self._waiting[place] = Prefetch(served, request, deadline, key)
        return QUEUED

    def run_next(self) -> None:
        """Encode the user that has waited longest, unless it is too late; in the scoring thread."""
        with self._lock:
            if not self._waiting:
                return
            (name, _), waiting = self._waiting.popitem(last=False)
        engine = waiting.served.engine
        if waiting.deadline <= time.monotonic():
            self._metrics.count("prefetches", LATE)
        elif not self._models.answers(name, engine):
            self._metrics.count("prefetches", RETIRED)
        elif self._models.has_forgotten(waiting.request):
            self._metrics.count("prefetches", FORGOTTEN)
        else:
            try:
                [use] = engine.prefetch([waiting.request])
            except Exception:
                self._metrics.count("prefetches", FAILED)
                raise
            self._metrics.count("prefetches", use.status)

    def forget(self, user_id: str) -> None:
        """Drop a user, of all models."""
        with self._lock:
            for place in [*self._waiting]:
                if place[1] == user_id:
                    self._drop(place, FORGOTTEN)

    def _drop(self, place: tuple[str, str], reason: str) -> None:
        del self._waiting[place]
        self._metrics.count("prefetches", reason)
