"""A store behind a tier, so that whatever it does costs a request no more than its deadline.

The known breaker libraries hold a lock while the guarded call runs, which would make every request
wait for the slowest, so the breaker is our own.
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

READERS = 4  # look-ups of one store at a time; more of them wait within their deadline
CLOSED, TRIAL, OPEN = 0.0, 0.5, 1.0
HELD_S = 2.0  # between two looks at what a store behind a deadline takes
MAX_HELD_AGE_S = 10.0  # of the last look that is still shown


class Breaker:
    """Refuses calls after so many failures in a row; after a pause it lets one of them try.

    Args:
        max_failures: that open it.
        pause_s: seconds until the next trial.
        clock: seconds that only go forward.
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
        """0 if calls go through, 1 if none do, 0.5 while one is on trial."""
        return self._state

    def admits(self) -> bool:
        """Whether to call; who was told so says then how it went."""
        with self._lock:
            if self._state == OPEN and self._clock() - self._opened_at >= self._pause_s:
                self._state = TRIAL
                return True
            return self._state == CLOSED

    def succeeded(self) -> None:
        """A call did what it should."""
        with self._lock:
            self._num_failures = 0
            self._state = CLOSED

    def failed(self) -> None:
        """A call did not, or took too long."""
        with self._lock:
            self._num_failures += 1
            if self._state == TRIAL or self._num_failures >= self._max_failures:
                self._state = OPEN
                self._opened_at = self._clock()


class Readers:
    """Threads for look-ups. Python does not wait for them when it ends, as for an executor's.

    Args:
        name: of the threads.
        count: look-ups at a time.
    """

    def __init__(self, name: str, count: int) -> None:
        self._waiting: SimpleQueue[tuple[Future[list[Found]], Callable[[], list[Found]]] | None]
        self._waiting = SimpleQueue()
        self._count = count
        self._is_closed = False
        for _ in range(count):
            threading.Thread(target=self._work, name=name, daemon=True).start()

    def submit(self, look_up: Callable[[], list[Found]]) -> "Future[list[Found]]":
        """Look something up, when a thread is free.

        Raises:
            TierError: if the threads were ended.
        """
        if self._is_closed:
            raise TierError("nobody looks up any more")
        future: Future[list[Found]] = Future()
        self._waiting.put((future, look_up))
        return future

    def close(self) -> None:
        """End the threads, each after what it is doing."""
        self._is_closed = True
        for _ in range(self._count):
            self._waiting.put(None)

    def _work(self) -> None:
        while (one := self._waiting.get()) is not None:
            future, look_up = one
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(look_up())
                except BaseException as error:
                    future.set_exception(error)


class GuardedTier:
    """A tier whose failures are answers: counted, logged when they begin, and never raised.

    Args:
        tier: the store.
        deadline_s: of a look-up; None asks in the caller's own thread, for a store that is memory.
        breaker: shared by look-ups and writes.
        metrics: where failures and times are counted.
    """

    def __init__(
        self, tier: Tier, deadline_s: float | None, breaker: Breaker, metrics: CacheMetrics
    ) -> None:
        self.tier = tier
        self.name = tier.name
        self.breaker = breaker
        self._deadline_s = deadline_s
        self._metrics = metrics
        self._readers: Readers | None = None
        self._held_at, self._held_bytes = -math.inf, math.nan
        self._is_over = threading.Event()
        if deadline_s is not None:
            self._readers = Readers(f"kvshare-read-{tier.name}", READERS)
            name = f"kvshare-held-{tier.name}"
            threading.Thread(target=self._watch_held, name=name, daemon=True).start()

    def get(self, keys: Sequence[tuple[str, str]]) -> list[Found] | str:
        """What is kept under some keys, or the reason why nobody knows."""
        if not self.breaker.admits():
            self._metrics.count("tier_failures", tier=self.name, kind="breaker_open")
            return TIER_ERROR
        try:
            with self._metrics.timed("seconds", tier=self.name, operation="get"):
                found = self._look_up(keys)
        except FutureTimeoutError as error:
            return self._failed("deadline", error, DEADLINE)
        except Exception as error:  # A store's fault is a miss, whatever it raises.
            return self._failed("error", error, TIER_ERROR)
        self.breaker.succeeded()
        return found

    def _look_up(self, keys: Sequence[tuple[str, str]]) -> list[Found]:
        if self._readers is None:
            return self.tier.get(keys)
        look_up = self._readers.submit(partial(self.tier.get, keys))
        try:
            return look_up.result(self._deadline_s)
        finally:
            look_up.cancel()  # Nobody waits for it any more, if it has not begun.

    def put(self, user: str, scope: str, value: bytes, encoded_at: float) -> str:
        """Write a value; returns an empty text, or why it was dropped."""
        if not self.breaker.admits():
            return "breaker_open"
        try:
            with self._metrics.timed("seconds", tier=self.name, operation="put"):
                is_kept = self.tier.put(user, scope, value, encoded_at)
        except Exception as error:  # As above: nobody waits for this write.
            self._failed("error", error, TIER_ERROR)
            return "error"
        self.breaker.succeeded()
        return "" if is_kept else "fenced"

    def remove(self, remove: Callable[[Tier], int]) -> int | None:
        """Bytes that ``remove`` dropped, or None if the store did not do it."""
        try:
            return remove(self.tier)
        except Exception as error:  # The other tiers are to be asked all the same.
            self._failed("error", error, TIER_ERROR)
            return None

    def held_bytes(self) -> float:
        """What the store takes, or took some seconds ago; NaN while nobody knows.

        A store behind a deadline is asked by a thread of its own: this never waits for it.
        """
        if self._deadline_s is None:
            self._look_at_held()
        is_old = time.monotonic() - self._held_at > MAX_HELD_AGE_S
        return math.nan if is_old or self.breaker.state == OPEN else self._held_bytes

    def _watch_held(self) -> None:
        while True:
            if self.breaker.state != OPEN:
                self._look_at_held()
            if self._is_over.wait(HELD_S):
                return

    def _look_at_held(self) -> None:
        try:
            self._held_bytes = float(self.tier.held_bytes())
        except Exception:  # Look-ups and writes say what is wrong with it.
            self._held_bytes = math.nan
        self._held_at = time.monotonic()

    def close(self) -> None:
        """Let go of the store; look-ups that hang are not waited for."""
        self._is_over.set()
        if self._readers is not None:
            self._readers.close()
        self.tier.close()

    def _failed(self, kind: str, error: BaseException, reason: str) -> str:
        was_open = self.breaker.state == OPEN
        self.breaker.failed()
        self._metrics.count("tier_failures", tier=self.name, kind=kind)
        if self.breaker.state == OPEN and not was_open:
            logger.warning("tier %s fails and is left alone for now: %r", self.name, error)
        return reason
