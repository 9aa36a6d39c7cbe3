"""The pre-norm layer that four of the five encoders are made of, and how candidates pass it.

Nothing on an event's row depends on candidates or on the time of the request, and the scale is
fixed. Time since an event is a bias on the candidate's side only.
"""

from torch import Tensor, nn
from torch.nn import functional

from torchrec_kvshare.attention.operators import Sights, UserRows, candidate_attention
from torchrec_kvshare.history.encoder import Encoder, Projection, check_heads, project_alike
from torchrec_kvshare.history.pages import KVPages, layer_rows

# Starting values. With keys projected as queries are, a candidate is most like itself: without a
# bias towards events its own key would leave them next to nothing, and on Online Retail the history
# then lost to the plain DLRM.
START_EVENT_BIAS = 4.0


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
        self.query_key_value = Projection(dim, 3 * dim)
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
        projected = self.query_key_value.behind(self.attention_norm(rows), self.dim)
        key, value = projected.unflatten(-1, [2, self.num_heads, -1]).unbind(-3)
        return key, value

    def finish(self, rows: Tensor, attended: Tensor) -> Tensor:
        """Add what was attended to, [..., H, D], then the feed-forward part: [..., E]."""
        rows = rows + self.dropout(self.attention_out(attended.flatten(-2)))
        hidden = functional.gelu(self.feedforward_in(self.feedforward_norm(rows)))
        return rows + self.dropout(self.feedforward_out(hidden))


class TransformerEncoder(Encoder):
    """Transformer layers whose K/V candidates attend to; the kinds add the history's side.

    Args:
        dim: width E of tokens.
        num_layers: layers in the stack.
        num_heads: H; must divide ``dim``.
        dropout: share of activations dropped in training.
        window: events that a row and a candidate see at every layer; 0 for all.

    Raises:
        ConfigError: if the sizes do not fit each other.
    """

    def __init__(
        self, dim: int, num_layers: int, num_heads: int, dropout: float, window: int
    ) -> None:
        layers: list[nn.Module] = [
            TransformerLayer(dim, num_heads, dropout) for _ in range(num_layers)
        ]
        super().__init__(layers, num_heads, START_EVENT_BIAS, window)

    def attend(
        self,
        candidates: Tensor,
        entered: Tensor,
        candidate_offsets: Tensor,
        kv: KVPages,
        sights: Sights,
        event_offsets: Tensor,
    ) -> Tensor:
        """Candidates [C, M, E] through all layers, over the K/V of their users: [C, M, E]."""
        layers = [layer_rows(kv, depth) for depth in range(self.num_layers)]
        seen = [sights for _ in layers]
        return self.attend_layers(candidates, entered, candidate_offsets, layers, seen)

    def attend_layers(
        self,
        candidates: Tensor,
        entered: Tensor,
        candidate_offsets: Tensor,
        layers: list[UserRows],
        sights: list[Sights],
    ) -> Tensor:
        """Candidates through all layers, each over its own rows."""
        rows = candidates
        for depth, layer in enumerate(self.layers):
            projected = entered if depth == 0 else layer.project(rows)
            query, own_key, own_value = layer.heads(projected)
            time_bias = self.time_bias[depth]
            attended = candidate_attention(
                query,
                own_key,
                own_value,
                candidate_offsets,
                layers[depth],
                sights[depth],
                time_bias,
                time_bias[:0],
                self.window,
                "softmax",
            )
            rows = layer.finish(rows, attended)
        return rows
