"""Write-behind: a queue, bounded in length and bytes, and one thread that writes."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

logger = logging.getLogger(__name__)


class Write(NamedTuple):
    """A queued write and the bytes of memory that it keeps until it is done."""

    run: Callable[[], None]
    num_bytes: int


class WriteQueue:
    """Runs writes in order, one at a time.

    Args:
        name: of the thread.
        max_length: most queued writes.
        max_bytes: most bytes of queued writes.
    """

    def __init__(self, name: str, max_length: int, max_bytes: int) -> None:
        self._max_length = max_length
        self._max_bytes = max_bytes
        self._queued: deque[Write] = deque()
        self._queued_bytes = 0
        self._is_running = False
        self._is_closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    @property
    def length(self) -> int:
        """Queued writes, without the one that runs."""
        return len(self._queued)

    @property
    def num_bytes(self) -> int:
        """Bytes of the queued writes."""
        return self._queued_bytes

    def offer(self, write: Write) -> bool:
        """Queue a write; return False if the queue is full or closed."""
        with self._changed:
            has_room = (
                len(self._queued) < self._max_length
                and self._queued_bytes + write.num_bytes <= self._max_bytes
            )
            if self._is_closed or not has_room:
                return False
            self._queued.append(write)
            self._queued_bytes += write.num_bytes
            self._changed.notify_all()
            return True

    def drain(self, timeout_s: float) -> bool:
        """Wait until no write is queued or running; return False on timeout."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while self._queued or self._is_running:
                if not self._changed.wait(deadline - time.monotonic()):
                    return not (self._queued or self._is_running)
            return True

    def close(self, timeout_s: float) -> None:
        """Run the queued writes within a timeout and refuse new ones."""
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
                while not self._queued:
                    if self._is_closed:
                        return
                    self._changed.wait()
                write = self._queued.popleft()
                self._queued_bytes -= write.num_bytes
                self._is_running = True
            try:
                write.run()
            except Exception:  # A failed write must not stop the thread.
                logger.exception("a queued write failed")
