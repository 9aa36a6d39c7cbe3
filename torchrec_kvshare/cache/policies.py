"""Who leaves when a tier is full, by bytes: the least recently used, or the least often used.

A policy knows keys and sizes and holds no K/V: its owner drops what a policy says has left, and
calls it under the owner's own lock, for a policy has none.
"""

from collections import OrderedDict
from typing import Final, Protocol

from torchrec_kvshare.errors import ConfigError, MissingExtraError

LRU = "lru"
TINY_LFU: Final = "tiny_lfu"

WEIGHT_BITS = 32  # moka clamps a weight to what an unsigned integer of so many bits holds


class Policy(Protocol):
    """Keys within a budget of bytes; not safe to share between threads."""

    capacity_bytes: int

    def put(self, key: str, num_bytes: int) -> list[str]:
        """Add a key, or give it another size.

        Args:
            key: what its owner wants to keep.
            num_bytes: its size, at least 0.

        Returns:
            The keys that leave for it. It is among them if it is not admitted; one that is larger
            than the capacity never is, and then no other key leaves.
        """
        ...

    def touch(self, key: str) -> None:
        """Count a look-up of a key, whether it is there or not."""
        ...

    def remove(self, key: str) -> None:
        """Take a key out, if it is there."""
        ...


class LruPolicy:
    """The least recently used keys leave, and every key that fits is admitted.

    Args:
        capacity_bytes: what the keys' sizes may add up to.

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
        self._bytes_by_key: OrderedDict[str, int] = OrderedDict()  # the least recently used first

    def put(self, key: str, num_bytes: int) -> list[str]:
        self.remove(key)
        if num_bytes > self.capacity_bytes:
            return [key]
        left = []
        while self._held_bytes + num_bytes > self.capacity_bytes:
            oldest, freed_bytes = self._bytes_by_key.popitem(last=False)
            self._held_bytes -= freed_bytes
            left.append(oldest)
        self._bytes_by_key[key] = num_bytes
        self._held_bytes += num_bytes
        return left

    def touch(self, key: str) -> None:
        if key in self._bytes_by_key:
            self._bytes_by_key.move_to_end(key)

    def remove(self, key: str) -> None:
        self._held_bytes -= self._bytes_by_key.pop(key, 0)


class TinyLfuPolicy:
    """A new key is admitted if it was looked up more often than those that would leave for it.

    It learns from ``touch``, of absent keys too: a key that is put and was never looked up does not
    get into a full tier. Counting starts when the tier is half full. It is done in a sketch whose
    hash is drawn anew for each policy, so which keys are kept differs from run to run.

    Args:
        capacity_bytes: what the keys' sizes may add up to, above 0. From 4 GiB on sizes are rounded
            up to units of a 2**31st to a 2**32nd of the capacity, 512 bytes at 1 TiB.

    Raises:
        MissingExtraError: if moka-py is not installed.

    Source:
        TinyLFU, Einziger et al. 2017 (arXiv:1512.00727), as moka has it.
    """

    def __init__(self, capacity_bytes: int) -> None:
        try:
            from moka_py import Moka
        except ImportError as error:
            raise MissingExtraError("tiers", f"the policy {TINY_LFU}") from error
        unit_bytes = 1 << max(0, capacity_bytes.bit_length() - WEIGHT_BITS)
        left: list[str] = []

        # Closures over locals: moka would keep this object alive for ever if they held it.
        def note(key: str, _: int, cause: str) -> None:
            if cause == "size":
                left.append(key)

        self.capacity_bytes = capacity_bytes
        self._capacity_units = capacity_bytes // unit_bytes
        self._left = left
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
        # One run ends after 100 ms, however many keys it has still to evict.
        while self._cache.weighted_size() > self._capacity_units:
            self._cache.run_pending_tasks()
        left = self._left.copy()
        self._left.clear()
        return left

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
    """The policy of a name.

    Args:
        name: ``lru`` or ``tiny_lfu``.
        capacity_bytes: what the keys' sizes may add up to.

    Returns:
        A policy that holds no key yet.

    Raises:
        ConfigError: if there is no such policy, or the capacity is below 1 byte.
        MissingExtraError: for ``tiny_lfu`` without moka-py.
    """
    if name not in _POLICY_BY_NAME:
        raise ConfigError(f"policy is {name!r}; one of {tuple(_POLICY_BY_NAME)} is allowed")
    if capacity_bytes < 1:
        raise ConfigError(f"capacity_bytes is {capacity_bytes}; it must be at least 1")
    return _POLICY_BY_NAME[name](capacity_bytes)
