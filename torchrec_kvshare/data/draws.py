"""Random numbers and items that depend on what they are drawn for, not on when or by which process.

So every rank of a distributed run, and a resumed run, draws the same negatives for a target without
drawing those of all other targets first.
"""

import numpy as np
from numpy.typing import NDArray

from torchrec_kvshare.features.hashing import IntArray, mixed

EVALUATION_SEED = 20_240_101  # every scorer gets the same negatives and candidates
MANTISSA_SHIFT = np.uint64(11)  # leaves the 53 bits that a float64 has room for


class Draws:
    """Uniform random numbers by key.

    Args:
        seed: integers; equal seeds give equal numbers.

    Example:
        >>> keys = np.arange(3)
        >>> Draws(0, 1).below(10, keys).tolist() == Draws(0, 1).below(10, keys[:3]).tolist()
        True
        >>> Draws(0, 1).below(10, keys)[2:].tolist() == Draws(0, 1).below(10, keys[2:]).tolist()
        True
    """

    def __init__(self, *seed: int) -> None:
        self._state = np.zeros(1, np.uint64)
        for part in seed:
            self._state = mixed(self._state, np.array([part]))

    def uniform(self, *keys: IntArray) -> NDArray[np.float64]:
        """Return a number in [0, 1) for each element of the keys, which are broadcast."""
        state = self._state
        for key in keys:
            state = mixed(state, key)
        return (state >> MANTISSA_SHIFT).astype(np.float64) * 2.0**-53

    def below(self, limit: int, *keys: IntArray) -> IntArray:
        """Return an integer from 0 to ``limit - 1`` for each element of the keys."""
        return (self.uniform(*keys) * limit).astype(np.int64)


class Proposal:
    """A distribution of items to draw from.

    Args:
        items: [I] codes, distinct and ascending.
        weights: [I] above 0; an item is drawn in proportion to its own.

    Example:
        >>> proposal = Proposal(np.array([4, 7, 9]), np.array([1.0, 2.0, 1.0]))
        >>> uniform = np.array([0.0, 0.3, 0.8])
        >>> proposal.draw(uniform).tolist()
        [4, 7, 9]
        >>> proposal.draw_others(uniform, np.array([7, 7, 4])).tolist()
        [4, 4, 9]
    """

    def __init__(self, items: IntArray, weights: NDArray[np.float64]) -> None:
        self.items = items
        self._ends = np.cumsum(weights, dtype=np.float64)
        self._ends /= self._ends[-1]
        self._starts = np.append(0.0, self._ends[:-1])

    def probability(self, items: IntArray) -> NDArray[np.float64]:
        """Return the probability of drawing each item; 0 of one that is not among them."""
        place, is_known = self._places(items)
        return np.where(is_known, self._ends[place] - self._starts[place], 0.0)

    def draw(self, uniform: NDArray[np.float64]) -> IntArray:
        """Return an item for each number in [0, 1)."""
        return self.items[self._place_at(uniform)]

    def draw_others(self, uniform: NDArray[np.float64], own: IntArray) -> IntArray:
        """Return an item other than ``own`` for each number in [0, 1).

        Args:
            uniform: numbers.
            own: items, which broadcast with the numbers; there must be another item than each.
        """
        place, is_known = self._places(own)
        start, width = self._starts[place], np.where(is_known, self.probability(own), 0.0)
        left = uniform * (1.0 - width)
        drawn = self._place_at(np.where(left >= start, left + width, left))
        # Rounding may reach the neighbour's interval.
        is_own = self.items[drawn] == own
        return self.items[np.where(is_own, np.where(drawn > 0, drawn - 1, drawn + 1), drawn)]

    def _places(self, items: IntArray) -> tuple[IntArray, NDArray[np.bool_]]:
        place = np.searchsorted(self.items, items).clip(max=len(self.items) - 1)
        return place, self.items[place] == items

    def _place_at(self, uniform: NDArray[np.float64]) -> IntArray:
        return np.searchsorted(self._ends, uniform, "right").clip(max=len(self.items) - 1)
