"""Random numbers that depend on what they are drawn for, not on when or by which process.

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
