"""An exponential moving average of a model's dense weights (EMA).

Tables are not averaged: an average would double their memory, and every step would write all of
their rows, not only those of its batch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class AveragedWeights:
    """The average of weights that are being trained.

    Args:
        weights: by name; the average starts as they are.
        decay: share of the average that stays in a step; less in the first steps.

    Attributes:
        average: by name, tensors that ``update`` changes in place.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], decay: float) -> None:
        self.weights = weights
        self.decay = decay
        self.average: dict[str, Tensor] = {
            name: weight.detach().clone() for name, weight in weights.items()
        }

    def update(self, step: int) -> None:
        """Move the average towards the weights as they are after a step, counted from 0."""
        decay = decay_at(step, self.decay)
        pairs = [(self.average[name], self.weights[name]) for name in self.average]
        average, weights = map(list, zip(*pairs, strict=True))
        get_ema_multi_avg_fn(decay)(average, weights, None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Give the model the average, to the end of the block."""
        trained = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self._fill(self.average)
        try:
            yield
        finally:
            self._fill(trained)

    @torch.no_grad()
    def _fill(self, values: Mapping[str, Tensor]) -> None:
        for name, weight in self.weights.items():
            weight.copy_(values[name])


def decay_at(step: int, decay: float) -> float:
    """Return the decay of a step: low at first, so that the random first weights are forgotten.

    Args:
        step: from 0.
        decay: highest decay.

    Source:
        ``num_updates`` of TensorFlow's ``ExponentialMovingAverage``.

    Example:
        >>> [round(decay_at(step, 0.99), 2) for step in (0, 8, 90, 10_000)]
        [0.1, 0.5, 0.91, 0.99]
    """
    return min(decay, (1 + step) / (10 + step))
