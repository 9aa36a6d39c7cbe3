"""One pre-norm transformer layer in which an event sees itself and earlier events.

Nothing on an event's row depends on later events, candidates or the time of the request, and the
scale is fixed: so its K/V may be kept. Time since an event is a bias on the candidate's side only.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchrec_kvshare.attention.shared import causal_attention, prefix_attention, shared_attention
from torchrec_kvshare.errors import ConfigError

# Starting values. With keys projected as queries are, a candidate is most like itself: without a
# bias towards events its own key would leave them next to nothing, and on Online Retail the history
# then lost to the plain DLRM.
START_EVENT_BIAS = 4.0
START_GAIN = 1.5


class CausalLayer(nn.Module):
    """Causal self-attention over events; candidates attend to the events' K/V and to themselves.

    Args:
        dim: model width E.
        num_heads: H; must divide ``dim``.
        num_time_buckets: buckets of the time since an event, each with a learned bias per head.
        dropout: share of activations dropped in training.

    Raises:
        ConfigError: if the heads do not divide the width.

    Source:
        Pre-norm block: Xiong et al. 2020 (arXiv:2002.04745). Causal history with target attention
        through the same layers: LONGER (arXiv:2505.04421).
    """

    def __init__(self, dim: int, num_heads: int, num_time_buckets: int, dropout: float) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ConfigError(f"num_heads is {num_heads}; it must divide dim = {dim}")
        self.num_heads = num_heads
        self.head_dim: int = dim // num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query_key_value = nn.Linear(dim, 3 * dim)
        self.attention_out = nn.Linear(dim, dim)
        self.feedforward_norm = nn.LayerNorm(dim)
        self.feedforward_in = nn.Linear(dim, 4 * dim)
        self.feedforward_out = nn.Linear(4 * dim, dim)
        self.time_bias = nn.Parameter(torch.full((num_time_buckets, num_heads), START_EVENT_BIAS))
        self.dropout = nn.Dropout(dropout)
        self._attend_to_alike()

    @torch.no_grad()
    def _attend_to_alike(self) -> None:
        """Start with keys projected as queries are: rows attend to what is like them at once.

        Finding the like of a candidate in a history is most of what has to be learned, and from two
        unrelated projections it takes thousands of steps to be found.
        """
        query, key, _ = self.query_key_value.weight.chunk(3)
        nn.init.orthogonal_(query, gain=START_GAIN)
        key.copy_(query)

    def project(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each [R, H, D], of rows [R, E]."""
        projected = self.query_key_value(self.attention_norm(rows))
        query, key, value = projected.view(-1, 3, self.num_heads, self.head_dim).unbind(1)
        return query, key, value

    def project_kv(self, rows: Tensor) -> Tensor:
        """Keys and values [2, R, H, D] of rows [R, E] whose queries nobody needs."""
        dim = rows.size(1)
        weight, bias = self.query_key_value.weight[dim:], self.query_key_value.bias[dim:]
        projected = functional.linear(self.attention_norm(rows), weight, bias)
        return projected.view(-1, 2, self.num_heads, self.head_dim).transpose(0, 1)

    def finish(self, rows: Tensor, attended: Tensor) -> Tensor:
        """Add what was attended to, then the feed-forward part: [R, E]."""
        rows = rows + self.dropout(self.attention_out(attended.reshape(-1, rows.size(1))))
        hidden = functional.gelu(self.feedforward_in(self.feedforward_norm(rows)))
        return rows + self.dropout(self.feedforward_out(hidden))

    def prefill(self, events: Tensor, event_spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Events [T, E] one layer up, and their K/V [2, T, H, D]."""
        query, key, value = self.project(events)
        attended = causal_attention(query, key, value, event_spans)
        return self.finish(events, attended), torch.stack([key, value])

    def attend(
        self,
        candidates: Tensor,
        layer_kv: Tensor,
        event_bias: Tensor,
        candidate_spans: list[tuple[int, int]],
        event_spans: list[tuple[int, int]],
    ) -> Tensor:
        """Candidates [C, E] one layer up, each over all events of its user."""
        query, key, value = self.project(candidates)
        attended = shared_attention(
            query, layer_kv[0], layer_kv[1], key, value, event_bias, candidate_spans, event_spans
        )
        return self.finish(candidates, attended)

    def attend_prefix(
        self,
        candidates: Tensor,
        layer_kv: Tensor,
        biases: list[Tensor],
        candidate_spans: list[tuple[int, int]],
        event_spans: list[tuple[int, int]],
    ) -> Tensor:
        """Candidates [C, E] one layer up, each over the events that its bias lets it see."""
        query, key, value = self.project(candidates)
        attended = prefix_attention(
            query, layer_kv[0], layer_kv[1], key, value, biases, candidate_spans, event_spans
        )
        return self.finish(candidates, attended)
