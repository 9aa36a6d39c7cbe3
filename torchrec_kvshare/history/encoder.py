"""The base of all history encoders: a stack of layers, and which cached K/V may be reused.

An encoder has four verbs and no state: ``prefill`` and ``extend`` compute K/V of events, ``enter``
and ``attend`` run candidates through the layers over that K/V. Each kind overrides what differs.
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
        start_bias: initial bias of every time bucket.
        window: events that a row and a candidate see at every layer; 0 for all.

    Attributes:
        takes_prefixes: whether candidates may see prefixes of one prefill.
        num_planes: number of tensors [R, H, D] in the K/V of a history.

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

    def candidate_weights(self) -> list[str]:
        """Return beginnings of the names of weights that no K/V depends on.

        All others are part of the identity of K/V. A name that is missing here costs hits when such
        a weight changes; one too many, and K/V of old weights would be used.
        """
        return ["time_bias"]

    def num_kv_rows(self, num_events: int) -> int:
        """Return how many rows of K/V a history of ``num_events`` events has."""
        return num_events

    def reusable_events(self, num_matched: int, cached_events: int, num_events: int) -> int:
        """Return how many events of a cached history have K/V that is valid for another history.

        Args:
            num_matched: length of the histories' common prefix, in events.
            cached_events: length of the cached history, in events.
            num_events: length of the other history, in events.
        """
        return num_matched

    def reusable_rows(self, reusable_events: int) -> int:
        """Return how many rows of K/V ``reusable_events`` events have."""
        return reusable_events

    def rows_of_events(self, num_events: Tensor) -> Tensor:
        """Return how many rows of K/V so many events have, without rows that follow the events."""
        return num_events

    def row_offsets(self, event_offsets: Tensor) -> Tensor:
        """Return offsets [B + 1] of K/V rows, for histories with these event offsets."""
        return event_offsets

    def prefill(self, events: Tensor, event_offsets: Tensor) -> Tensor:
        """Return K/V [planes, R, H, D] of events [T, E], both grouped by user."""
        head_dim = events.size(1) // self.num_heads
        no_rows = events.new_zeros([self.num_planes, 0, self.num_heads, head_dim])
        cached = flat_pages(no_rows, torch.zeros_like(event_offsets))
        return self.extend(cached, events, event_offsets)

    def extend(self, cached: KVPages, events: Tensor, event_offsets: Tensor) -> Tensor:
        """Return K/V [planes, new rows, H, D] of new events [T, E] that follow cached rows.

        Args:
            cached: the ``reusable_rows`` of each user.
            events: the events after the reusable ones.
            event_offsets: [B + 1], in T.
        """
        raise NotImplementedError

    def enter(self, candidates: Tensor) -> Tensor:
        """Project candidates [C, M, E] for the first layer; the result is the same for any user."""
        return self.layers[0].project(candidates)


class Projection(nn.Linear):
    """A linear layer that can compute its last outputs only."""

    def outputs_from(self, rows: Tensor, first: int) -> Tensor:
        """Return the outputs from index ``first`` on, [..., N - first], of rows [..., K]."""
        return nn.functional.linear(rows, self.weight[first:], self.bias[first:])


def check_heads(dim: int, num_heads: int) -> None:
    """Check that ``num_heads`` divides ``dim``.

    Raises:
        ConfigError: naming both.
    """
    if num_heads < 1 or dim % num_heads:
        raise ConfigError(f"num_heads is {num_heads}; it must divide dim = {dim}")


@torch.no_grad()
def tie_query_and_key(query_weight: Tensor, key_weight: Tensor) -> None:
    """Initialise the query and key projections alike, so attention starts as similarity.

    Most of what has to be learned is to find events similar to a candidate, and from two unrelated
    projections that takes thousands of training steps.
    """
    nn.init.orthogonal_(query_weight, gain=START_GAIN)
    key_weight.copy_(query_weight)
