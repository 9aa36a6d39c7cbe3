"""Learning rates by step: a linear warm-up, then half a cosine down to zero."""

import math

from torchrec_kvshare.errors import ConfigError


def rate_share(step: int, num_steps: int, warmup_steps: int) -> float:
    """Return the share of the configured learning rates at a step.

    Args:
        step: from 0.
        num_steps: of the whole run.
        warmup_steps: the last of them has the whole rate; 0 for none.

    Source:
        Warm-up: Goyal et al. 2017 (arXiv:1706.02677); cosine: Loshchilov and Hutter 2017
        (arXiv:1608.03983).

    Example:
        >>> [round(rate_share(step, 7, 3), 2) for step in range(7)]
        [0.33, 0.67, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def check_warmup(warmup_steps: int, num_steps: int) -> None:
    """Refuse a warm-up that takes all of a run's steps.

    Raises:
        ConfigError: naming both numbers.
    """
    if warmup_steps and warmup_steps >= num_steps:
        raise ConfigError(
            f"warmup_steps is {warmup_steps}; it must be below the {num_steps} steps that all "
            "epochs have together"
        )
