"""Bidirectional history: every event sees all events of its user.

A new event changes the K/V of all earlier ones, so K/V of a shorter history cannot be reused, and
candidates that see a prefix need a prefill of that prefix.
"""

import torch
from torch import Tensor

from torchrec_kvshare.attention.operators import flat_rows, history_attention
from torchrec_kvshare.history.pages import KVPages
from torchrec_kvshare.history.transformer import TransformerEncoder


class BidirectionalEncoder(TransformerEncoder):
    """See ``TransformerEncoder``.

    Source:
        LONGER (arXiv:2505.04421), unmasked and without merging.
    """

    def __init__(self, dim: int, num_layers: int, num_heads: int, dropout: float) -> None:
        super().__init__(dim, num_layers, num_heads, dropout, window=0)
        self.takes_prefixes = False

    def reusable_events(self, num_matched: int, cached_events: int, num_events: int) -> int:
        """Return 0: a new event changes the K/V of all others."""
        return 0

    def prefill(self, events: Tensor, event_offsets: Tensor) -> Tensor:
        """Return K/V [planes, T, H, D] of events [T, E]."""
        rows = events
        planes: list[Tensor] = []
        for depth, layer in enumerate(self.layers):
            if depth + 1 == self.num_layers:
                key, value = layer.project_kv(rows)
            else:
                query, key, value = layer.heads(layer.project(rows))
                no_cached = flat_rows(key[:0], value[:0], torch.zeros_like(event_offsets))
                attended = history_attention(
                    query,
                    event_offsets,
                    key,
                    value,
                    event_offsets,
                    no_cached,
                    0,
                    1 << 40,  # all rows are globals, so all see all
                    "softmax",
                )
                rows = layer.finish(rows, attended)
            planes.append(key)
            planes.append(value)
        return torch.stack(planes)

    def extend(self, cached: KVPages, events: Tensor, event_offsets: Tensor) -> Tensor:
        """Raise ValueError: a new event changes the K/V of every earlier one."""
        raise ValueError("bidirectional histories cannot be extended: prefill the whole history")
