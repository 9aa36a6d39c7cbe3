"""The pre-norm layer that four of the five encoders are made of, and how candidates pass it.

Nothing on an event's row depends on candidates or on the time of the request, and the scale is
fixed. Time since an event is a bias on the candidate's side only.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchrec_kvshare.attention.shared import Spans, shared_attention
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.history.moments import (
    Moments,
    candidate_biases,
    doubling_bucket,
)

# Time since an event falls into buckets of doubling width, from one second to 2**30 s (34 years).
NUM_TIME_BUCKETS = 32
# Starting values. With keys projected as queries are, a candidate is most like itself: without a
# bias towards events its own key would leave them next to nothing, and on Online Retail the history
# then lost to the plain DLRM.
START_EVENT_BIAS = 4.0
START_GAIN = 1.5


class TransformerLayer(nn.Module):
    """Projections, norms and feed-forward part of one layer; what attends to what is the encoder's.

    Args:
        dim: model width E.
        num_heads: H; must divide ``dim``.
        dropout: share of activations dropped in training.

    Raises:
        ConfigError: if the heads do not divide the width.

    Source:
        Pre-norm block: Xiong et al. 2020 (arXiv:2002.04745).
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.dim = dim
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.feedforward_norm = nn.LayerNorm(dim)
        self.feedforward_in = nn.Linear(dim, 4 * dim)
        self.feedforward_out = nn.Linear(4 * dim, dim)
        self.dropout = nn.Dropout(dropout)
        project_alike(self.query_key_value.weight[:dim], self.query_key_value.weight[dim : 2 * dim])

    def project(self, rows: Tensor) -> Tensor:
        """Queries, keys and values side by side, [..., 3E], of rows [..., E]."""
        return self.query_key_value(self.attention_norm(rows))

    def heads(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [..., H, D], of what ``project`` gave."""
        query, key, value = projected.unflatten(-1, [3, self.num_heads, -1]).unbind(-3)
        return query, key, value

    def project_kv(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each [R, H, D], of rows [R, E] whose queries nobody needs."""
        weight, bias = (
            self.query_key_value.weight[self.dim :],
            self.query_key_value.bias[self.dim :],
        )
        projected = functional.linear(self.attention_norm(rows), weight, bias)
        key, value = projected.unflatten(-1, [2, self.num_heads, -1]).unbind(-3)
        return key, value

    def finish(self, rows: Tensor, attended: Tensor) -> Tensor:
        """Add what was attended to, [..., H, D], then the feed-forward part: [..., E]."""
        rows = rows + self.dropout(self.attention_out(attended.flatten(-2)))
        hidden = functional.gelu(self.feedforward_in(self.feedforward_norm(rows)))
        return rows + self.dropout(self.feedforward_out(hidden))


class TransformerEncoder(nn.Module):
    """Layers over history rows whose K/V candidates attend to; the kinds add the history's side.

    Its verbs are those of every encoder: ``prefill``, ``extend``, ``enter`` and ``attend``.

    Args:
        dim: width E of tokens.
        num_layers: layers in the stack.
        num_heads: H; must divide ``dim``.
        dropout: share of activations dropped in training.

    Attributes:
        window: events that a row and a candidate see at every layer; 0 for all.
        takes_prefixes: whether candidates may see prefixes of one prefill.
        num_planes: tensors [R, H, D] that are kept of a history.

    Raises:
        ConfigError: if the sizes do not fit each other.
    """

    window: int
    takes_prefixes: bool
    num_planes: int

    def __init__(self, dim: int, num_layers: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        if num_layers < 1:
            raise ConfigError(f"num_layers is {num_layers}; it must be at least 1")
        self.layers = nn.ModuleList(
            [TransformerLayer(dim, num_heads, dropout) for _ in range(num_layers)]
        )
        self.num_layers = num_layers
        self.num_heads = num_heads
        self.num_time_buckets: int = NUM_TIME_BUCKETS
        self.time_bias = nn.Parameter(
            torch.full((num_layers, NUM_TIME_BUCKETS, num_heads), START_EVENT_BIAS)
        )
        self.window = 0
        self.takes_prefixes = True
        self.num_planes = 2 * num_layers

    def num_rows(self, num_events: int) -> int:
        """Rows of K/V that a history of so many events has."""
        return num_events

    def reusable_events(self, cached_events: int, num_events: int) -> int:
        """Events whose K/V stays right when a history grows from one length to another."""
        return cached_events

    def reusable_rows(self, reusable_events: int) -> int:
        """Rows that so many reusable events have."""
        return reusable_events

    def enter(self, candidates: Tensor) -> Tensor:
        """What candidates [C, M, E] are to the first layer: [C, M, 3E], the same for every user."""
        # Indexing is not scriptable for a ModuleList in a loop's stead; the first layer is the 0th.
        return self.layers[0].project(candidates)

    def attend(
        self,
        candidates: Tensor,
        entered: Tensor,
        kv: Tensor,
        moments: Moments,
        spans: Spans,
        body: str,
    ) -> Tensor:
        """Candidates [C, M, E] through all layers, over K/V [planes, R, H, D]: [C, M, E]."""
        rows = candidates
        buckets = [doubling_bucket(elapsed, self.num_time_buckets) for elapsed in moments.elapsed]
        for depth, layer in enumerate(self.layers):
            projected = entered if depth == 0 else layer.project(rows)
            biases = self.biases(depth, buckets, moments, spans)
            query, own_key, own_value = layer.heads(projected)
            attended = shared_attention(
                query, kv[2 * depth], kv[2 * depth + 1], own_key, own_value, biases, spans, body
            )
            rows = layer.finish(rows, attended)
        return rows

    def biases(
        self, depth: int, buckets: list[Tensor], moments: Moments, spans: Spans
    ) -> list[Tensor]:
        """Biases of one layer, from the time bucket of each event."""
        by_event = [functional.embedding(bucket, self.time_bias[depth]) for bucket in buckets]
        return candidate_biases(by_event, moments, spans)


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


def append_rows(
    cached: Tensor, cached_spans: list[tuple[int, int]], rows: Tensor, spans: list[tuple[int, int]]
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Every user's rows behind its cached ones, and where each user's rows are then.

    Args:
        cached: [R, H, D].
        cached_spans: of each user in R.
        rows: [T, H, D].
        spans: of each user in T.
    """
    if cached.size(0) == 0:
        return rows, spans
    parts = [rows[:0]]
    joined: list[tuple[int, int]] = []
    end = 0
    for user in range(len(spans)):
        cached_first, cached_last = cached_spans[user]
        first, last = spans[user]
        parts.append(cached[cached_first:cached_last])
        parts.append(rows[first:last])
        start, end = end, end + cached_last - cached_first + last - first
        joined.append((start, end))
    return torch.cat(parts), joined


def no_cached_rows(events: Tensor, num_planes: int, num_heads: int) -> Tensor:
    """K/V [planes, 0, H, D] of nothing, to be extended by events [T, E]."""
    return events.new_zeros([num_planes, 0, num_heads, events.size(1) // num_heads])


def no_spans(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans of no rows, for as many users."""
    return [(0, 0) for _ in spans]
