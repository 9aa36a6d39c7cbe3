"""One encoding at a time for each history: who comes later waits for who came first."""

import threading
from collections.abc import Collection, Hashable


class Flights:
    """Keys that are being worked on, and by whom they are waited for.

    Attributes:
        num_landed: times that work has ended; who looked something up at another number, looks
            again before it begins.
    """

    def __init__(self) -> None:
        self.num_landed = 0
        self._landed_by_key: dict[Hashable, threading.Event] = {}
        self._lock = threading.Lock()

    def lead(self, keys: Collection[Hashable]) -> set[Hashable]:
        """Begin work on those keys that nobody works on; they are to be landed."""
        with self._lock:
            led = {key for key in keys if key not in self._landed_by_key}
            for key in led:
                self._landed_by_key[key] = threading.Event()
            return led

    def land(self, keys: Collection[Hashable]) -> None:
        """End the work on keys that the caller leads, however it went."""
        with self._lock:
            self.num_landed += 1
            for key in keys:
                self._landed_by_key.pop(key).set()

    def wait(self, key: Hashable, timeout_s: float) -> bool:
        """Wait until nobody works on a key; whether it came to that in time."""
        with self._lock:
            landed = self._landed_by_key.get(key)
        return landed is None or landed.wait(timeout_s)
