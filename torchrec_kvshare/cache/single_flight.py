"""Single-flight encoding: of concurrent requests for the same K/V one encodes, the others wait."""

import threading
from collections.abc import Collection, Hashable


class SingleFlight:
    """Keys whose K/V is being encoded, each by one leader.

    Attributes:
        num_finished: calls of ``finish`` so far. If it has changed since a look-up, the look-up
            must be repeated before encoding.
    """

    def __init__(self) -> None:
        self.num_finished = 0
        self._finished_by_key: dict[Hashable, threading.Event] = {}
        self._lock = threading.Lock()

    def lead(self, keys: Collection[Hashable]) -> set[Hashable]:
        """Become the leader of the keys that have none; the caller must ``finish`` them."""
        with self._lock:
            led = {key for key in keys if key not in self._finished_by_key}
            for key in led:
                self._finished_by_key[key] = threading.Event()
            return led

    def finish(self, keys: Collection[Hashable]) -> None:
        """Wake the waiters of keys that the caller leads, whether encoding succeeded or not."""
        with self._lock:
            self.num_finished += 1
            for key in keys:
                self._finished_by_key.pop(key).set()

    def wait(self, key: Hashable, timeout_s: float) -> bool:
        """Wait until a key has no leader; return False on timeout."""
        with self._lock:
            finished = self._finished_by_key.get(key)
        return finished is None or finished.wait(timeout_s)
