"""A tier behind a deadline and a circuit breaker: its faults cost a request at most the deadline.

The known circuit breaker libraries hold a lock while the guarded call runs, so every request would
wait for the slowest one. That is why the circuit breaker is our own.
"""

import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from functools import partial
from queue import SimpleQueue

from torchrec_kvshare.cache.metrics import CacheMetrics
from torchrec_kvshare.cache.reasons import DEADLINE, TIER_ERROR
from torchrec_kvshare.cache.tiers import Found, Tier
from torchrec_kvshare.errors import TierError

logger = logging.getLogger(__name__)

READERS = 4  # concurrent look-ups of one tier; further ones wait within their deadline
CLOSED, HALF_OPEN, OPEN = 0.0, 0.5, 1.0
SIZE_POLL_S = 2.0  # between two polls of the bytes of a tier that has a deadline
MAX_SIZE_AGE_S = 10.0  # of the last poll that ``held_bytes`` still returns


class CircuitBreaker:
    """Refuses calls after several failures in a row; after a pause it allows one trial call.

    Args:
        max_failures: failures in a row that open it.
        pause_s: seconds from opening until the trial call.
        clock: monotonic seconds.
    """

    def __init__(self, max_failures: int, pause_s: float, clock: Callable[[], float]) -> None:
        self._max_failures = max_failures
        self._pause_s = pause_s
        self._clock = clock
        self._num_failures = 0
        self._state = CLOSED
        self._opened_at = 0.0
        self._lock = threading.Lock()

    @property
    def state(self) -> float:
        """``CLOSED``, ``OPEN``, or ``HALF_OPEN`` while a trial call runs."""
        return self._state

    def allows_call(self) -> bool:
        """Return whether to call; the caller must record the result of an allowed call."""
        with self._lock:
            if self._state == OPEN and self._clock() - self._opened_at >= self._pause_s:
                self._state = HALF_OPEN
                return True
            return self._state == CLOSED

    def record_success(self) -> None:
        """Close the circuit."""
        with self._lock:
            self._num_failures = 0
            self._state = CLOSED

    def record_failure(self) -> None:
        """Count an error or a missed deadline; open the circuit if there are too many."""
        with self._lock:
            self._num_failures += 1
            if self._state == HALF_OPEN or self._num_failures >= self._max_failures:
                self._state = OPEN
                self._opened_at = self._clock()


class Readers:
    """Daemon threads for look-ups: unlike an executor's they do not delay the interpreter's exit.

    Args:
        name: of the threads.
        count: number of threads.
    """

    def __init__(self, name: str, count: int) -> None:
        self._waiting: SimpleQueue[tuple[Future[list[Found]], Callable[[], list[Found]]] | None]
        self._waiting = SimpleQueue()
        self._count = count
        self._is_closed = False
        for _ in range(count):
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, look_up: Callable[[], list[Found]]) -> "Future[list[Found]]":
        """Run a look-up in the next free thread.

        Raises:
            TierError: if the threads were told to end.
        """
        if self._is_closed:
            raise TierError("the tier is closed: its reader threads have ended")
        future: Future[list[Found]] = Future()
        self._waiting.put((future, look_up))
        return future

    def close(self) -> None:
        """End each thread after the look-ups that wait."""
        self._is_closed = True
        for _ in range(self._count):
            self._waiting.put(None)

    def _work(self) -> None:
        while (work := self._waiting.get()) is not None:
            future, look_up = work
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(look_up())
                except BaseException as error:
                    future.set_exception(error)


class GuardedTier:
    """A tier whose failures are returned as reasons and counted, never raised.

    Args:
        tier: the tier.
        deadline_s: of a look-up; None for a tier in memory, which is read in the caller's thread.
        breaker: shared by look-ups and writes; a warning is logged when it opens.
        metrics: where failures and times are counted.
    """

    def __init__(
        self, tier: Tier, deadline_s: float | None, breaker: CircuitBreaker, metrics: CacheMetrics
    ) -> None:
        self.tier = tier
        self.name = tier.name
        self.breaker = breaker
        self._deadline_s = deadline_s
        self._metrics = metrics
        self._readers: Readers | None = None
        self._size_read_at, self._held_bytes = -math.inf, math.nan
        self._is_closed = threading.Event()
        if deadline_s is not None:
            self._readers = Readers(f"kvshare-read-{tier.name}", READERS)
            name = f"kvshare-size-{tier.name}"
            threading.Thread(target=self._poll_size, name=name, daemon=True).start()

    def get(self, keys: Sequence[tuple[str, str]]) -> list[Found] | str:
        """Return what the tier has under the keys, or the reason why it could not be read."""
        if not self.breaker.allows_call():
            self._metrics.count("tier_failures", tier=self.name, kind="breaker_open")
            return TIER_ERROR
        try:
            with self._metrics.timed("seconds", tier=self.name, operation="get"):
                found = self._look_up(keys)
        except FutureTimeoutError as error:
            return self._record_failure("deadline", error, DEADLINE)
        except Exception as error:  # Whatever the store raises is a miss.
            return self._record_failure("error", error, TIER_ERROR)
        self.breaker.record_success()
        return found

    def _look_up(self, keys: Sequence[tuple[str, str]]) -> list[Found]:
        if self._readers is None:
            return self.tier.get(keys)
        look_up = self._readers.submit(partial(self.tier.get, keys))
        try:
            return look_up.result(self._deadline_s)
        finally:
            look_up.cancel()  # Past the deadline a look-up that still waits need not run.

    def put(self, user: str, scope: str, value: bytes, encoded_at: float) -> str:
        """Write a value; return an empty text, or why the write was dropped."""
        if not self.breaker.allows_call():
            return "breaker_open"
        try:
            with self._metrics.timed("seconds", tier=self.name, operation="put"):
                is_kept = self.tier.put(user, scope, value, encoded_at)
        except Exception as error:  # Whatever the store raises is a dropped write.
            self._record_failure("error", error, TIER_ERROR)
            return "error"
        self.breaker.record_success()
        return "" if is_kept else "fenced"

    def remove(self, remove: Callable[[Tier], int]) -> int | None:
        """Return the bytes that ``remove`` dropped, or None if it failed."""
        try:
            return remove(self.tier)
        except Exception as error:  # The other tiers must still be asked.
            self._record_failure("error", error, TIER_ERROR)
            return None

    def held_bytes(self) -> float:
        """Return the bytes in the store, at most ``MAX_SIZE_AGE_S`` old; NaN if unknown.

        A tier with a deadline is polled by a thread of its own, so this never waits for it.
        """
        if self._deadline_s is None:
            self._read_size()
        is_old = time.monotonic() - self._size_read_at > MAX_SIZE_AGE_S
        return math.nan if is_old or self.breaker.state == OPEN else self._held_bytes

    def _poll_size(self) -> None:
        while True:
            if self.breaker.state != OPEN:
                self._read_size()
            if self._is_closed.wait(SIZE_POLL_S):
                return

    def _read_size(self) -> None:
        try:
            self._held_bytes = float(self.tier.held_bytes())
        except Exception:  # Look-ups and writes count and log the failure.
            self._held_bytes = math.nan
        self._size_read_at = time.monotonic()

    def close(self) -> None:
        """Close the tier without waiting for look-ups that hang."""
        self._is_closed.set()
        if self._readers is not None:
            self._readers.close()
        self.tier.close()

    def _record_failure(self, kind: str, error: BaseException, reason: str) -> str:
        was_open = self.breaker.state == OPEN
        self.breaker.record_failure()
        self._metrics.count("tier_failures", tier=self.name, kind=kind)
        if self.breaker.state == OPEN and not was_open:
            logger.warning("tier %s is paused, its circuit breaker is open: %r", self.name, error)
        return reason
