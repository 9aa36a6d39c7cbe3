"""Writes that nobody waits for: a queue, bounded in length and in bytes, and one thread."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Write(NamedTuple):
    """Something to do later that holds so many bytes until it is done."""

    run: Callable[[], None]
    num_bytes: int


class WriteQueue:
    """Runs writes in their order, one at a time.

    Args:
        name: of the thread.
        max_length: writes that may wait.
        max_bytes: that those may hold.
    """

    def __init__(self, name: str, max_length: int, max_bytes: int) -> None:
        self._max_length = max_length
        self._max_bytes = max_bytes
        self._waiting: deque[Write] = deque()
        self._waiting_bytes = 0
        self._is_running = False
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def length(self) -> int:
        """Writes that wait."""
        return len(self._waiting)

    @property
    def num_bytes(self) -> int:
        """Bytes that those hold."""
        return self._waiting_bytes

    def offer(self, write: Write) -> bool:
        """Take a write, unless there is no room for it."""
        with self._changed:
            is_full = len(self._waiting) >= self._max_length
            if (
                self._is_closed
                or is_full
                or self._waiting_bytes + write.num_bytes > self._max_bytes
            ):
                return False
            self._waiting.append(write)
            self._waiting_bytes += write.num_bytes
            self._changed.notify_all()
            return True

    def drain(self, timeout_s: float) -> bool:
        """Wait until nothing waits or runs; whether it came to that in time."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._waiting or self._is_running:
                if not self._changed.wait(deadline - time.monotonic()):
                    return not (self._waiting or self._is_running)
            return True

    def close(self, timeout_s: float) -> None:
        """Do what waits, as far as the time allows, and take nothing more."""
        self.drain(timeout_s)
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._is_running = False
                self._changed.notify_all()
                while not self._waiting:
                    if self._is_closed:
                        return
                    self._changed.wait()
                write = self._waiting.popleft()
                self._waiting_bytes -= write.num_bytes
                self._is_running = True
            try:
                write.run()
            except Exception:  # One write that fails must not keep the others from being made.
                logger.exception("a write behind failed")
