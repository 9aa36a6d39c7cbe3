"""Messages on their way in: how many bytes they may hold, and how large ones are parsed.

A message counts from the first byte that is read of it until it is answered, so that bodies that
come slowly, are parsed or wait to be scored share one limit. Large ones are parsed beside the event
loop, one at a time.
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

# Of every message not counted: whatever others hold, a common request is read. How many there are
# of them is bounded by connections and calls.
SMALL_BYTES = 2**16
LARGE_BYTES = 2**18  # parsed in 2 to 5 ms; of more the event loop would be held up


class Intake:
    """The messages of all clients of one server.

    Args:
        capacity_bytes: that they may hold together, but for the first ``SMALL_BYTES`` of each.
        refuse: told the limit, whenever there is no room.

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
    def message(self) -> Iterator["Held"]:
        """What a message holds until the end of the block."""
        held = Held(self)
        try:
            yield held
        finally:
            self.num_bytes -= held.num_counted

    async def parse(
        self,
        num_bytes: int,
        parse: Callable[Arguments, Parsed],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Parsed:
        """What a parser makes of a message, at once or, if it is large, in a thread.

        Args:
            num_bytes: of the message.
            parse: called with the arguments that follow.

        Raises:
            Exception: what the parser raised.
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


class Held:
    """What one message, or those of one stream, hold of their server's room."""

    def __init__(self, intake: Intake) -> None:
        self.num_counted = 0
        self._intake = intake
        self._num_bytes = 0

    def add(self, num_bytes: int) -> None:
        """More has come.

        Raises:
            NoRoomError: if all messages together hold too much; nothing is added then.
        """
        intake = self._intake
        more = max(0, self._num_bytes + num_bytes - SMALL_BYTES) - self.num_counted
        if more > 0 and intake.num_bytes + more > intake.capacity_bytes:
            intake.refuse(INFLIGHT_BYTES)
            raise NoRoomError(
                f"messages that are read or answered hold {intake.num_bytes} bytes, and {more} "
                f"more came; {intake.capacity_bytes} are allowed by server.max_inflight_bytes"
            )
        self._change(num_bytes)

    def drop(self, num_bytes: int) -> None:
        """A message of so many bytes is answered."""
        self._change(-num_bytes)

    def _change(self, num_bytes: int) -> None:
        self._num_bytes += num_bytes
        counted = max(0, self._num_bytes - SMALL_BYTES)
        self._intake.num_bytes += counted - self.num_counted
        self.num_counted = counted


class _Pauses:
    """How many want no garbage collection now, in all threads."""

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
    """No garbage collection until the last of those who want none has left its block.

    A parser makes objects by the million and no garbage; the collector, which runs with the
    interpreter's lock, looks at all of them again and again: 1.2 to 1.9 s of 15 MiB of JSON that
    take 0.1 s without it.
    """
    _PAUSES.begin()
    try:
        yield
    finally:
        _PAUSES.end()
