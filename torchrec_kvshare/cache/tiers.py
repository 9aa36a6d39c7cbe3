"""What a tier of the cache is, and the nearest of them: values in this process's memory.

A tier holds bytes by user and scope and knows nothing of K/V. A scope begins with the version of
the model that the value is of, and a dot. A user who was forgotten stays forgotten: what was
encoded before that and comes later, from a queue or another tier, is refused.
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
        value: the bytes; None for none. They may be older than the time to live.
        scopes: what else is kept of this user, in order; may be () where there is a value.
    """

    value: bytes | None
    scopes: tuple[str, ...]


class Tier(Protocol):
    """A store of bytes by user and scope; safe to share between threads.

    Whatever the store behind it does, its methods return or raise ``TierError``.
    """

    name: str

    def get(self, keys: Sequence[tuple[str, str]]) -> list[Found]:
        """What is kept under keys, each a user and a scope; one round trip where there is one."""
        ...

    def put(self, user: str, scope: str, value: bytes, encoded_at: float) -> bool:
        """Keep a value in place of what the key had.

        Args:
            user: whose it is: hexadecimal digits.
            scope: what it is of, without slash and colon: ``<model>-<tables>.…``.
            value: any bytes.
            encoded_at: Unix seconds.

        Returns:
            False if it is refused, for the user was forgotten after it was encoded, or so shortly
            before that the store cannot tell. True does not say that it stays: what is older than
            the time to live or larger than the tier does not.
        """
        ...

    def forget(self, user: str, at: float) -> int:
        """Drop all of a user, and for the time to live refuse what was encoded at ``at`` or before.

        Returns:
            Bytes dropped.
        """
        ...

    def clear(self, version: str) -> int:
        """Drop every value whose scope begins with a version and a dot; returns the bytes."""
        ...

    def held_bytes(self) -> int:
        """Bytes that the store takes now."""
        ...

    def close(self) -> None:
        """Let go of the store."""
        ...


class Fences:
    """When users were forgotten, as long as that matters; called under its owner's lock.

    Args:
        ttl_s: seconds for which a value is used.
        clock: Unix seconds.

    Raises:
        ConfigError: if the time to live is not above zero, or has no end.
    """

    def __init__(self, ttl_s: float, clock: Callable[[], float]) -> None:
        check_ttl(ttl_s)
        self.at_by_user: OrderedDict[str, float] = OrderedDict()  # the oldest first, or nearly
        self._ttl_s = ttl_s
        self._clock = clock

    def put(self, user: str, at: float) -> float:
        """Refuse what was encoded until then; returns the time that holds, the latest of all."""
        at = max(at, self.at_by_user.get(user, -math.inf))
        self.at_by_user[user] = at
        self.at_by_user.move_to_end(user)
        return at

    def refuses(self, user: str, encoded_at: float) -> bool:
        """Whether the user was forgotten since."""
        return encoded_at <= self.at_by_user.get(user, -math.inf)

    def is_expired(self, at: float) -> bool:
        """Whether values encoded then are too old to be kept, and fences set then to matter."""
        return at + self._ttl_s <= self._clock()

    def pop_expired(self) -> list[str]:
        """Users whose fences do not matter any more."""
        expired = []
        while self.at_by_user and self.is_expired(next(iter(self.at_by_user.values()))):
            expired.append(self.at_by_user.popitem(last=False)[0])
        return expired


class HostTier:
    """Values in this process's memory, as many as its policy admits.

    Args:
        policy: who leaves when it is full; nobody else uses it.
        ttl_s: seconds for which a value is used.
        clock: Unix seconds, those of ``encoded_at``.
        on_evict: takes the user, the scope and the value of what leaves for lack of room, also of
            what was not admitted.

    Raises:
        ConfigError: if the time to live is not above zero, or has no end.

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
            leaving = self._policy.put(key, len(value))
            # The new value last, so that there is room for it.
            left = [
                (*_split(other), self._pop(*_split(other))) for other in leaving if other != key
            ]
            if key in leaving:
                left.append((user, scope, value))
            else:
                self._value_by_scope_by_user.setdefault(user, {})[scope] = value
                self._held_bytes += len(value)
        if self._on_evict is not None:
            for each in left:
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
        """Take a value out, the policy's record of it aside; empty if there is none."""
        values = self._value_by_scope_by_user.get(user, {})
        value = values.pop(scope, b"")
        if not values:
            self._value_by_scope_by_user.pop(user, None)
        self._held_bytes -= len(value)
        return value


def check_ttl(ttl_s: float) -> None:
    """Refuse a time to live for which a tier would have to remember forgotten users for ever.

    Raises:
        ConfigError: if it is not above zero, or has no end.
    """
    if not 0.0 < ttl_s < math.inf:
        raise ConfigError(f"ttl_s is {ttl_s}; a tier needs a time above 0 seconds that ends")


def _split(key: str) -> tuple[str, str]:
    user, _, scope = key.partition("/")
    return user, scope
