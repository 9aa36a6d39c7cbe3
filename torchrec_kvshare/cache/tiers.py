"""The interface of a cache tier, and the host tier: values in this process's memory.

A tier stores bytes by user and scope; it does not interpret them. A scope begins with the model
version of the value and a dot. A forgotten user stays forgotten: a fence refuses values that were
encoded earlier and are written later, from a queue or another tier.
"""

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torchrec_kvshare.cache.policies import Policy
from torchrec_kvshare.errors import ConfigError


class Found(NamedTuple):
    """What a tier has under a key.

    Attributes:
        value: the bytes, maybe older than the time to live; None if there are none.
        scopes: the user's other scopes, sorted; may be () if there is a value.
    """

    value: bytes | None
    scopes: tuple[str, ...]


class Tier(Protocol):
    """A store of bytes by user and scope; thread-safe.

    Whatever the store does, the methods return or raise ``TierError``.
    """

    name: str

    def get(self, keys: Sequence[tuple[str, str]]) -> list[Found]:
        """Look up keys, each a user and a scope; a networked tier does it in one round trip."""
        ...

    def put(self, user: str, scope: str, value: bytes, encoded_at: float) -> bool:
        """Store a value, replacing the one under the same key.

        Args:
            user: hexadecimal digest of the user id.
            scope: identity and codec of the value, without slash or colon: ``<model>-<tables>.…``.
            value: any bytes.
            encoded_at: Unix seconds.

        Returns:
            False if it is refused: the user was forgotten after it was encoded, or so shortly
            before that the store cannot tell. True does not mean that it is kept: a value older
            than the time to live or larger than the tier is not.
        """
        ...

    def forget(self, user: str, at: float) -> int:
        """Drop a user's values; for the time to live refuse values encoded at ``at`` or before.

        Returns:
            Bytes dropped.
        """
        ...

    def clear(self, version: str) -> int:
        """Drop each value whose scope begins with a version and a dot; return the bytes dropped."""
        ...

    def held_bytes(self) -> int:
        """Return the bytes in the store."""
        ...

    def close(self) -> None:
        """Release the store."""
        ...


class Fences:
    """Times at which users were forgotten, kept for the time to live; not thread-safe.

    Args:
        ttl_s: seconds from encoding until a value expires.
        clock: Unix seconds.

    Raises:
        ConfigError: if the time to live is not above zero and finite.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        check_ttl(ttl_s)
        self.at_by_user: OrderedDict[str, float] = OrderedDict()  # nearly oldest first
        self._ttl_s = ttl_s
        self._clock = clock

    def put(self, user: str, at: float) -> float:
        """Set a user's fence, unless the existing one is later; return the fence's time."""
        at = max(at, self.at_by_user.get(user, -math.inf))
        self.at_by_user[user] = at
        self.at_by_user.move_to_end(user)
        return at

    def refuses(self, user: str, encoded_at: float) -> bool:
        """Return whether the user was forgotten at ``encoded_at`` or later."""
        return encoded_at <= self.at_by_user.get(user, -math.inf)

    def is_expired(self, at: float) -> bool:
        """Return whether values encoded at ``at`` have expired; so has a fence of that time."""
        return at + self._ttl_s <= self._clock()

    def pop_expired(self) -> list[str]:
        """Remove expired fences; return their users."""
        expired = []
        while self.at_by_user and self.is_expired(next(iter(self.at_by_user.values()))):
            expired.append(self.at_by_user.popitem(last=False)[0])
        return expired


class HostTier:
    """Values in this process's memory, within the budget of a policy.

    Args:
        policy: eviction and admission policy; not shared.
        ttl_s: seconds from encoding until a value expires.
        clock: Unix seconds, the clock of ``encoded_at``.
        on_evict: called with user, scope and value of each evicted or not admitted value.

    Raises:
        ConfigError: if the time to live is not above zero and finite.

    Example:
        >>> from torchrec_kvshare.cache.policies import LruPolicy
        >>> tier = HostTier(LruPolicy(capacity_bytes=10), ttl_s=60.0, clock=lambda: 100.0)
        >>> tier.put("7e", "m-t.none", b"12345678", encoded_at=90.0), tier.held_bytes()
        (True, 8)
        >>> tier.get([("7e", "m-t.none"), ("7e", "m-u.none")])
        [Found(value=b'12345678', scopes=()), Found(value=None, scopes=('m-t.none',))]
        >>> tier.forget("7e", at=95.0), tier.put("7e", "m-t.none", b"12345678", encoded_at=90.0)
        (8, False)
    """

    name = "host"

    def __init__(
        self,
        policy: Policy,
        ttl_s: float,
        clock: Callable[[], float] = time.time,
        on_evict: Callable[[str, str, bytes], None] | None = None,
    ) -> None:
        self._policy = policy
        self._on_evict = on_evict
        self._fences = Fences(ttl_s, clock)
        self._value_by_scope_by_user: dict[str, dict[str, bytes]] = {}
        self._held_bytes = 0
        self._lock = threading.Lock()

    def get(self, keys: Sequence[tuple[str, str]]) -> list[Found]:
        with self._lock:
            return [self._get(user, scope) for user, scope in keys]

    def put(self, user: str, scope: str, value: bytes, encoded_at: float) -> bool:
        with self._lock:
            if self._fences.refuses(user, encoded_at):
                return False
            if self._fences.is_expired(encoded_at):
                return True
            self._pop(user, scope)
            key = f"{user}/{scope}"
            evicted_keys = self._policy.put(key, len(value))
            # The new value is added last, when there is room for it.
            evicted = [
                (*_split(other), self._pop(*_split(other)))
                for other in evicted_keys
                if other != key
            ]
            if key in evicted_keys:
                evicted.append((user, scope, value))
            else:
                self._value_by_scope_by_user.setdefault(user, {})[scope] = value
                self._held_bytes += len(value)
        if self._on_evict is not None:
            for each in evicted:
                self._on_evict(*each)
        return True

    def forget(self, user: str, at: float) -> int:
        with self._lock:
            self._fences.pop_expired()
            self._fences.put(user, at)
            return self._drop(user, "")

    def clear(self, version: str) -> int:
        with self._lock:
            users = list(self._value_by_scope_by_user)
            return sum(self._drop(user, f"{version}.") for user in users)

    def held_bytes(self) -> int:
        return self._held_bytes

    def close(self) -> None:
        with self._lock:
            for user in list(self._value_by_scope_by_user):
                self._drop(user, "")

    def _get(self, user: str, scope: str) -> Found:
        self._policy.touch(f"{user}/{scope}")
        values = self._value_by_scope_by_user.get(user, {})
        return Found(values.get(scope), tuple(sorted(values.keys() - {scope})))

    def _drop(self, user: str, prefix: str) -> int:
        scopes = self._value_by_scope_by_user.get(user, {})
        dropped_bytes = 0
        for scope in [scope for scope in scopes if scope.startswith(prefix)]:
            dropped_bytes += len(self._pop(user, scope))
            self._policy.remove(f"{user}/{scope}")
        return dropped_bytes

    def _pop(self, user: str, scope: str) -> bytes:
        """Remove a value, but not its key from the policy; return ``b""`` if there is none."""
        values = self._value_by_scope_by_user.get(user, {})
        value = values.pop(scope, b"")
        if not values:
            self._value_by_scope_by_user.pop(user, None)
        self._held_bytes -= len(value)
        return value


def check_ttl(ttl_s: float) -> None:
    """Refuse a time to live for which a tier would have to remember forgotten users for ever.

    Raises:
        ConfigError: if it is not above zero and finite.
    """
    if not 0.0 < ttl_s < math.inf:
        raise ConfigError(f"ttl_s is {ttl_s}; a tier needs a finite time above 0 seconds")


def _split(key: str) -> tuple[str, str]:
    user, _, scope = key.partition("/")
    return user, scope
