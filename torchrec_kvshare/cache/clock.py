"""The clock that dates encoded K/V and forgotten users.

The two times are compared to refuse K/V of forgotten users, so one process uses one clock. Times
from other machines are never compared with it directly: see ``cache/stack.py`` and
``cache/remote.py``.
"""

import functools
import time
from collections.abc import Callable


@functools.cache
def steady_clock() -> Callable[[], float]:
    """Return a clock of Unix seconds that never jumps: it reads the wall clock only once."""
    start = time.time() - time.monotonic()
    return lambda: start + time.monotonic()
