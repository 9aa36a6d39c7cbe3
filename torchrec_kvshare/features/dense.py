"""Dense features of a candidate: the time of its request and squashed floats."""

import numpy as np

from torchrec_kvshare.features.schema import CLOCK_FEATURES

SECONDS_PER_HOUR = 3600
SECONDS_PER_DAY = 24 * SECONDS_PER_HOUR
EPOCH_WEEKDAY = 3  # 1970-01-01 was a Thursday; Monday is 0.


def clock_features(time: np.ndarray) -> np.ndarray:
    """Return the hour of day and day of week (UTC) as points on two circles.

    Args:
        time: [N] int64 Unix seconds.

    Returns:
        [N, 4] float32, in the order of ``CLOCK_FEATURES``.
    """
    hour = (time % SECONDS_PER_DAY) * (2 * np.pi / SECONDS_PER_DAY)
    weekday = (time // SECONDS_PER_DAY + EPOCH_WEEKDAY) % 7 * (2 * np.pi / 7)
    circles = np.stack([np.sin(hour), np.cos(hour), np.sin(weekday), np.cos(weekday)], axis=1)
    assert circles.shape[1] == len(CLOCK_FEATURES)
    return circles.astype(np.float32)


def squash(values: np.ndarray) -> np.ndarray:
    """Return the signed logarithm, which brings prices and counts of any scale near one."""
    return (np.sign(values) * np.log1p(np.abs(values))).astype(np.float32)
