"""Eviction and admission policies with a budget in bytes: LRU and TinyLFU.

A policy has keys and sizes but no K/V: its owner drops the K/V of the keys that the policy evicts.
A policy has no lock, so the owner calls it under its own.
"""

from collections import OrderedDict
from typing import Final, Protocol

from torchrec_kvshare.errors import ConfigError, MissingExtraError

LRU = "lru"
TINY_LFU: Final = "tiny_lfu"

WEIGHT_BITS = 32  # moka clamps a weight to an unsigned integer of this many bits


class Policy(Protocol):
    """Keys within a budget of bytes; not thread-safe."""

    capacity_bytes: int

    def put(self, key: str, num_bytes: int) -> list[str]:
        """Add a key, or change its size.

        Args:
            key: of what the owner wants to keep.
            num_bytes: its size, at least 0.

        Returns:
            The evicted keys; ``key`` itself is among them if it is not admitted. A key larger than
            the capacity is not admitted and evicts no other key.
        """
        ...

    def touch(self, key: str) -> None:
        """Count a look-up of a key, present or not."""
        ...

    def remove(self, key: str) -> None:
        """Remove a key, if it is present."""
        ...


class LruPolicy:
    """Evicts the least recently used keys and admits every key that fits.

    Args:
        capacity_bytes: maximum sum of the keys' sizes.

    Example:
        >>> policy = LruPolicy(100)
        >>> policy.put("a", 60), policy.put("b", 40)
        ([], [])
        >>> policy.touch("a")
        >>> policy.put("c", 30)
        ['b']
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._held_bytes = 0
        self._bytes_by_key: OrderedDict[str, int] = OrderedDict()  # least recently used first

    def put(self, key: str, num_bytes: int) -> list[str]:
        self.remove(key)
        if num_bytes > self.capacity_bytes:
            return [key]
        evicted = []
        while self._held_bytes + num_bytes > self.capacity_bytes:
            oldest, freed_bytes = self._bytes_by_key.popitem(last=False)
            self._held_bytes -= freed_bytes
            evicted.append(oldest)
        self._bytes_by_key[key] = num_bytes
        self._held_bytes += num_bytes
        return evicted

    def touch(self, key: str) -> None:
        if key in self._bytes_by_key:
            self._bytes_by_key.move_to_end(key)

    def remove(self, key: str) -> None:
        self._held_bytes -= self._bytes_by_key.pop(key, 0)


class TinyLfuPolicy:
    """Admits a new key if it was looked up more often than the keys it would evict.

    It counts each ``touch``, of absent keys too: a key that is put without a look-up is not
    admitted to a full tier. Counting starts when the tier is half full. Counts are kept in a sketch
    with a random hash for each policy, so which keys are kept differs from run to run.

    Args:
        capacity_bytes: maximum sum of the keys' sizes, above 0. From 4 GiB on sizes are rounded up
            to a unit between a 2**32nd and a 2**31st of the capacity: 512 bytes at 1 TiB.

    Raises:
        MissingExtraError: if moka-py is not installed.

    Source:
        TinyLFU, Einziger et al. 2017 (arXiv:1512.00727), as implemented by moka.
    """

    def __init__(self, capacity_bytes: int) -> None:
        try:
            from moka_py import Moka
        except ImportError as error:
            raise MissingExtraError("tiers", f"the policy {TINY_LFU}") from error
        unit_bytes = 1 << max(0, capacity_bytes.bit_length() - WEIGHT_BITS)
        evicted: list[str] = []

        # Closures over locals: a listener that refers to this object would keep it alive for ever.
        def note(key: str, _: int, cause: str) -> None:
            if cause == "size":
                evicted.append(key)

        self.capacity_bytes = capacity_bytes
        self._capacity_units = capacity_bytes // unit_bytes
        self._evicted = evicted
        self._cache: Moka[str, int] = Moka(
            self._capacity_units,
            policy=TINY_LFU,
            weigher=lambda _, num_bytes: -(-num_bytes // unit_bytes),
            eviction_listener=note,
        )

    def put(self, key: str, num_bytes: int) -> list[str]:
        if num_bytes > self.capacity_bytes:
            self.remove(key)
            return [key]
        self._cache.set(key, num_bytes)
        self._cache.run_pending_tasks()
        # One run stops after 100 ms, even if more keys must be evicted.
        while self._cache.weighted_size() > self._capacity_units:
            self._cache.run_pending_tasks()
        evicted = self._evicted.copy()
        self._evicted.clear()
        return evicted

    def touch(self, key: str) -> None:
        self._cache.get(key)

    def remove(self, key: str) -> None:
        self._cache.remove(key)
        self._cache.run_pending_tasks()


_POLICY_BY_NAME: dict[str, type[LruPolicy] | type[TinyLfuPolicy]] = {
    LRU: LruPolicy,
    TINY_LFU: TinyLfuPolicy,
}


def new_policy(name: str, capacity_bytes: int) -> Policy:
    """Return a new policy without keys.

    Args:
        name: ``lru`` or ``tiny_lfu``.
        capacity_bytes: maximum sum of the keys' sizes.

    Raises:
        ConfigError: if there is no such policy, or the capacity is below 1 byte.
        MissingExtraError: for ``tiny_lfu`` without moka-py.
    """
    if name not in _POLICY_BY_NAME:
        raise ConfigError(f"policy is {name!r}; one of {tuple(_POLICY_BY_NAME)} is allowed")
    if capacity_bytes < 1:
        raise ConfigError(f"capacity_bytes is {capacity_bytes}; it must be at least 1")
    return _POLICY_BY_NAME[name](capacity_bytes)
