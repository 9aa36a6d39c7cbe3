"""Intake of messages: one limit of bytes in flight, and parsing of large messages in a thread.

A message counts from its first byte until it is answered, so that bodies that come slowly, are
parsed or wait to be scored share one limit. Large messages are parsed outside the event loop, one
at a time.
"""

import asyncio
import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from torchrec_kvshare.errors import NoRoomError
from torchrec_kvshare.serving.metrics import INFLIGHT_BYTES

Parsed = TypeVar("Parsed")
Arguments = ParamSpec("Arguments")

# The first bytes of every message are not counted, so that a common request always has room.
# Connections and calls bound the number of messages.
SMALL_BYTES = 2**16
LARGE_BYTES = 2**18  # parsed in 2 to 5 ms; a larger message would block the event loop for longer


class Intake:
    """The messages of all clients of one server.

    Args:
        capacity_bytes: of all messages together, without the first ``SMALL_BYTES`` of each.
        refuse: called with the name of the limit whenever there is no room.

    Example:
        >>> intake = Intake(capacity_bytes=100, refuse=print)
        >>> with intake.message() as message:
        ...     message.add(SMALL_BYTES + 60)
        ...     intake.num_bytes
        60
        >>> intake.num_bytes
        0
    """

    def __init__(self, capacity_bytes: int, refuse: Callable[[str], None]) -> None:
        self.capacity_bytes = capacity_bytes
        self.refuse = refuse
        self.num_bytes = 0
        self._parsing = ThreadPoolExecutor(1, "kvshare-parse")

    @contextmanager
    def message(self) -> Iterator["InflightBytes"]:
        """Count the bytes of a message until the end of the block."""
        inflight = InflightBytes(self)
        try:
            yield inflight
        finally:
            self.num_bytes -= inflight.num_counted

    async def parse(
        self,
        num_bytes: int,
        parse: Callable[Arguments, Parsed],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Parsed:
        """Parse a message, in a thread if it is large.

        Args:
            num_bytes: of the message.
            parse: called with the arguments that follow.

        Raises:
            Exception: whatever the parser raises.
        """
        if num_bytes <= LARGE_BYTES:
            return parse(*args, **kwargs)

        def without_garbage_collection() -> Parsed:
            with gc_paused():
                return parse(*args, **kwargs)

        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._parsing, without_garbage_collection)

    def close(self) -> None:
        """End the thread."""
        self._parsing.shutdown(cancel_futures=True)


class InflightBytes:
    """Bytes in flight of one message, or of all messages of one stream."""

    def __init__(self, intake: Intake) -> None:
        self.num_counted = 0
        self._intake = intake
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """Add bytes that have come.

        Raises:
            NoRoomError: if all messages together exceed the limit; then nothing is added.
        """
        intake = self._intake
        more = max(0, self._num_bytes + num_bytes - SMALL_BYTES) - self.num_counted
        if more > 0 and intake.num_bytes + more > intake.capacity_bytes:
            intake.refuse(INFLIGHT_BYTES)
            raise NoRoomError(
                f"messages in flight hold {intake.num_bytes} bytes, and {more} more came; "
                f"{intake.capacity_bytes} are allowed by server.max_inflight_bytes"
            )
        self._change(num_bytes)

    def drop(self, num_bytes: int) -> None:
        """Drop the bytes of a message that is answered."""
        self._change(-num_bytes)

    def _change(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        counted = max(0, self._num_bytes - SMALL_BYTES)
        self._intake.num_bytes += counted - self.num_counted
        self.num_counted = counted


class _Pauses:
    """Counts the open pauses of garbage collection in all threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_open = 0
        self._was_enabled = False

    def begin(self) -> None:
        with self._lock:
            if not self._num_open:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._num_open += 1

    def end(self) -> None:
        with self._lock:
            self._num_open -= 1
            if not self._num_open and self._was_enabled:
                gc.enable()


_PAUSES = _Pauses()


@contextmanager
def gc_paused() -> Iterator[None]:
    """Pause garbage collection until the last open block ends, in whichever thread.

    A parser makes millions of objects and no garbage. The collector, which holds the interpreter's
    lock, visits all of them again and again: 15 MiB of JSON take 1.2 to 1.9 s with it and 0.1 s
    without it.
    """
    _PAUSES.begin()
    try:
        yield
    finally:
        _PAUSES.end()
