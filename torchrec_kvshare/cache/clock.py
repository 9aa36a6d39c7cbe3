"""The clock that tells when K/V was encoded and when a user was forgotten.

Both are compared to keep forgotten users out, so all of a process reads one clock. Times of other
machines are never compared with it as they are: see ``cache/stack.py`` and ``cache/remote.py``.
"""

import functools
import time
from collections.abc import Callable


@functools.cache
def steady_clock() -> Callable[[], float]:
    """Unix seconds that never jump: those at the first call, and what has passed since."""
    start = time.time() - time.monotonic()
    return lambda: start + time.monotonic()
