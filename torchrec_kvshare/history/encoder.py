"""What every kind of history encoder has: a stack of layers, and what of cached K/V stays right.

An encoder has four verbs and no state: ``prefill`` and ``extend`` make K/V of events, ``enter`` and
``attend`` take candidates through the layers over it. A kind overrides what is its own.
"""

import torch
from torch import Tensor, nn

from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.history.pages import KVPages, flat_pages

# Time since an event falls into buckets of doubling width, from one second to 2**30 s (34 years).
NUM_TIME_BUCKETS = 32
START_GAIN = 1.5


class Encoder(nn.Module):
    """Layers over history rows.

    Args:
        layers: one or more, of one kind.
        num_heads: H.
        start_bias: of every time bucket.
        window: events that a row and a candidate see at every layer; 0 for all.

    Attributes:
        takes_prefixes: whether candidates may see prefixes of one prefill.
        num_planes: tensors [R, H, D] that are kept of a history.

    Raises:
        ConfigError: if there are no layers.
    """

    def __init__(
        self, layers: list[nn.Module], num_heads: int, start_bias: float, window: int
    ) -> None:
        super().__init__()
        if not layers:
            raise ConfigError("num_layers is 0; it must be at least 1")
        self.layers = nn.ModuleList(layers)
        self.num_layers: int = len(layers)
        self.num_heads = num_heads
        self.time_bias = nn.Parameter(
            torch.full((len(layers), NUM_TIME_BUCKETS, num_heads), start_bias)
        )
        self.window = window
        self.takes_prefixes: bool = True
        self.num_planes: int = 2 * len(layers)

    def num_rows(self, num_events: int) -> int:
        """Rows of K/V that a history of so many events has."""
        return num_events

    def reusable_events(self, num_matched: int, cached_events: int, num_events: int) -> int:
        """Events whose cached K/V is right for another history that begins in the same way.

        Args:
            num_matched: events that both histories begin with.
            cached_events: of the cached history.
            num_events: of the other one.
        """
        return num_matched

    def reusable_rows(self, reusable_events: int) -> int:
        """Rows that so many reusable events have."""
        return reusable_events

    def row_offsets(self, event_offsets: Tensor) -> Tensor:
        """Offsets [B + 1] of the rows of K/V that histories with these offsets have."""
        return event_offsets

    def prefill(self, events: Tensor, event_offsets: Tensor) -> Tensor:
        """K/V [planes, R, H, D] of events [T, E], users one after the other."""
        head_dim = events.size(1) // self.num_heads
        nothing = events.new_zeros([self.num_planes, 0, self.num_heads, head_dim])
        cached = flat_pages(nothing, torch.zeros_like(event_offsets))
        return self.extend(cached, events, event_offsets)

    def extend(self, cached: KVPages, events: Tensor, event_offsets: Tensor) -> Tensor:
        """K/V [planes, new rows, H, D] of new events [T, E] behind cached rows.

        Args:
            cached: of each user, its ``reusable_rows``.
            events: those behind the reusable ones.
            event_offsets: [B + 1], in T.
        """
        raise NotImplementedError

    def enter(self, candidates: Tensor) -> Tensor:
        """Candidates [C, M, E] projected for the first layer, the same for every user."""
        return self.layers[0].project(candidates)


class Projection(nn.Linear):
    """A linear layer of which the first results are not always needed."""

    def behind(self, rows: Tensor, first: int) -> Tensor:
        """The results from one on, [..., N - first], of rows [..., K]."""
        return nn.functional.linear(rows, self.weight[first:], self.bias[first:])


def check_heads(dim: int, num_heads: int) -> None:
    """Refuse heads that do not divide the width.

    Raises:
        ConfigError: naming both.
    """
    if num_heads < 1 or dim % num_heads:
        raise ConfigError(f"num_heads is {num_heads}; it must divide dim = {dim}")


@torch.no_grad()
def project_alike(query_weight: Tensor, key_weight: Tensor) -> None:
    """Start with keys projected as queries are: rows attend to what is like them at once.

    Finding the like of a candidate in a history is most of what has to be learned, and from two
    unrelated projections it takes thousands of steps to be found.
    """
    nn.init.orthogonal_(query_weight, gain=START_GAIN)
    key_weight.copy_(query_weight)
