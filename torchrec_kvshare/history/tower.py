"""The history tower: a stack of layers with three verbs and no state.

``prefill`` turns the events of all users into K/V, ``attend`` turns candidates into one vector each
over that K/V. K/V is an argument and a result, never an attribute. The training forward is
``prefill`` then ``attend_prefix`` over the same K/V: what is trained is what is served.
"""

import torch
from torch import Tensor, nn

from torchrec_kvshare.history.causal import CausalLayer

# Time since an event falls into buckets of doubling width, from one second to 2**30 s (34 years).
NUM_TIME_BUCKETS = 32


def lengths_to_spans(lengths: Tensor) -> list[tuple[int, int]]:
    """Pairs ``(first, last)`` of rows that lie one after the other.

    Example:
        >>> lengths_to_spans(torch.tensor([2, 0, 3]))
        [(0, 2), (2, 2), (2, 5)]
    """
    spans: list[tuple[int, int]] = []
    first = 0
    counts: list[int] = lengths.tolist()
    for count in counts:
        spans.append((first, first + count))
        first += count
    return spans


class HistoryTower(nn.Module):
    """Causal layers over event tokens, and candidates over their K/V.

    Args:
        dim: width E of tokens and of the result.
        num_layers: layers in the stack.
        num_heads: H; must divide ``dim``.
        dropout: share of activations dropped in training.

    Raises:
        ConfigError: if the sizes do not fit each other.
    """

    bucket_ends: Tensor

    def __init__(self, dim: int, num_layers: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.dim = dim
        self.layers = nn.ModuleList(
            [CausalLayer(dim, num_heads, NUM_TIME_BUCKETS, dropout) for _ in range(num_layers)]
        )
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.candidate_token = nn.Parameter(torch.zeros(dim))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        bucket_ends = 2 ** torch.arange(NUM_TIME_BUCKETS - 1)
        self.register_buffer("bucket_ends", bucket_ends, persistent=False)

    @property
    def bytes_per_event(self) -> int:
        """Size of one event's K/V over all layers, in float32."""
        return self.num_layers * 2 * self.dim * 4

    def time_buckets(self, elapsed: Tensor) -> Tensor:
        """Bucket of each time since an event, in seconds; the future counts as now."""
        return torch.bucketize(elapsed, self.bucket_ends, right=True)

    def prefill(self, events: Tensor, event_spans: list[tuple[int, int]]) -> Tensor:
        """K/V of all layers for the events of all users.

        Args:
            events: [T, E] event tokens, oldest first, users one after the other.
            event_spans: rows ``(first, last)`` of each user; together they cover T in order.

        Returns:
            [layers, 2, T, H, D]; K at 0 and V at 1 of the second axis.
        """
        rows = self.dropout(events)
        kv: list[Tensor] = []
        for depth, layer in enumerate(self.layers):
            # Nothing is above the last layer: its events need keys and values only.
            if depth + 1 == self.num_layers:
                kv.append(layer.project_kv(rows))
            else:
                rows, layer_kv = layer.prefill(rows, event_spans)
                kv.append(layer_kv)
        return torch.stack(kv)

    def attend(
        self,
        candidates: Tensor,
        kv: Tensor,
        elapsed: Tensor,
        candidate_spans: list[tuple[int, int]],
        event_spans: list[tuple[int, int]],
    ) -> Tensor:
        """One vector for each candidate over the whole history of its user; inference only.

        Args:
            candidates: [C, E] candidate tokens, grouped by user.
            kv: [layers, 2, R, H, D] with the users' events at rows ``event_spans``.
            elapsed: [T] int64 seconds from each event to its user's request, users in order.
            candidate_spans: rows ``(first, last)`` of each user's candidates.
            event_spans: rows ``(first, last)`` of each user's events in R.

        Returns:
            [C, E].
        """
        rows = candidates + self.candidate_token
        buckets = self.time_buckets(elapsed)
        for depth, layer in enumerate(self.layers):
            event_bias = layer.time_bias.index_select(0, buckets).t().contiguous()  # [H, T]
            rows = layer.attend(rows, kv[depth], event_bias, candidate_spans, event_spans)
        return self.head(self.norm(rows))

    def attend_prefix(
        self,
        candidates: Tensor,
        kv: Tensor,
        event_time: Tensor,
        candidate_time: Tensor,
        visible_events: Tensor,
        candidate_spans: list[tuple[int, int]],
        event_spans: list[tuple[int, int]],
    ) -> Tensor:
        """One vector for each candidate over the first ``visible_events`` of its user's events.

        Args:
            candidates: [C, E] candidate tokens, grouped by user.
            kv: [layers, 2, T, H, D].
            event_time: [T] int64 Unix seconds.
            candidate_time: [C] int64 Unix seconds.
            visible_events: [C] int64, how many of its user's oldest events a candidate may see.
            candidate_spans: rows ``(first, last)`` of each user's candidates.
            event_spans: rows ``(first, last)`` of each user's events in T.

        Returns:
            [C, E]; differentiable.
        """
        rows = self.dropout(candidates + self.candidate_token)
        buckets: list[Tensor] = []
        moments: list[Tensor] = []
        hidden: list[Tensor] = []
        for user in range(len(event_spans)):
            first, last = candidate_spans[user]
            event_first, event_last = event_spans[user]
            # A target and its negatives share one moment: its biases are looked up once.
            asked = torch.stack([candidate_time[first:last], visible_events[first:last]])
            moment, moment_of_candidate, _ = torch.unique_consecutive(
                asked, return_inverse=True, return_counts=True, dim=1
            )
            elapsed = moment[0].unsqueeze(1) - event_time[event_first:event_last]  # [G, L]
            buckets.append(self.time_buckets(elapsed))
            moments.append(moment_of_candidate)
            position = torch.arange(event_last - event_first, device=kv.device)
            hidden.append(position >= moment[1].unsqueeze(1))  # [G, L]
        for depth, layer in enumerate(self.layers):
            biases: list[Tensor] = []
            for user in range(len(event_spans)):
                bias = nn.functional.embedding(buckets[user], layer.time_bias)  # [G, L, H]
                bias = bias.masked_fill(hidden[user].unsqueeze(2), float("-inf")).permute(2, 0, 1)
                biases.append(bias.index_select(1, moments[user]))  # [H, N, L]
            rows = layer.attend_prefix(rows, kv[depth], biases, candidate_spans, event_spans)
        return self.head(self.norm(rows))
