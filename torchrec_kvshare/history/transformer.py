"""The pre-norm layer that four of the five encoders are made of, and how candidates run through it.

An event's row does not depend on candidates or on the time of the request, and the scale is fixed.
The time since an event is a bias on the candidate's attention only.
"""

from torch import Tensor, nn
from torch.nn import functional

from torchrec_kvshare.attention.operators import UserRows, Visibility, candidate_attention
from torchrec_kvshare.history.encoder import Encoder, Projection, check_heads, tie_query_and_key
from torchrec_kvshare.history.pages import KVPages, layer_rows

# Initial time bias. Query and key projections start tied, so a candidate is most similar to itself:
# without a bias towards events its own key would take nearly all the weight. On Online Retail the
# model with history then lost to the plain DLRM.
START_EVENT_BIAS = 4.0


class TransformerLayer(nn.Module):
    """Projections, norms and feed-forward part of one layer; the encoder does the attention.

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
        weight = self.query_key_value.weight
        tie_query_and_key(weight[:dim], weight[dim : 2 * dim])

    def project(self, rows: Tensor) -> Tensor:
        """Return queries, keys and values side by side, [..., 3E], of rows [..., E]."""
        return self.query_key_value(self.attention_norm(rows))

    def heads(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split ``project``'s result into queries, keys and values, each [..., H, D]."""
        query, key, value = projected.unflatten(-1, [3, self.num_heads, -1]).unbind(-3)
        return query, key, value

    def project_kv(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values only, each [R, H, D], of rows [R, E]."""
        projected = self.query_key_value.outputs_from(self.attention_norm(rows), self.dim)
        key, value = projected.unflatten(-1, [2, self.num_heads, -1]).unbind(-3)
        return key, value

    def finish(self, rows: Tensor, attended: Tensor) -> Tensor:
        """Add the attention's result [..., H, D], then the feed-forward part: [..., E]."""
        rows = rows + self.dropout(self.attention_out(attended.flatten(-2)))
        hidden = functional.gelu(self.feedforward_in(self.feedforward_norm(rows)))
        return rows + self.dropout(self.feedforward_out(hidden))


class TransformerEncoder(Encoder):
    """Transformer layers whose K/V candidates attend to; subclasses add ``prefill`` and ``extend``.

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

    def candidate_weights(self) -> list[str]:
        """Return beginnings of names: no layer follows the last one, which ends with its K/V."""
        last = f"layers.{self.num_layers - 1}."
        return [*super().candidate_weights(), f"{last}attention_out.", f"{last}feedforward_"]

    def attend(
        self,
        candidates: Tensor,
        entered: Tensor,
        candidate_offsets: Tensor,
        kv: KVPages,
        visibility: Visibility,
        event_offsets: Tensor,
    ) -> Tensor:
        """Run candidates [C, M, E] through all layers, over the K/V of their users: [C, M, E]."""
        layers = [layer_rows(kv, depth) for depth in range(self.num_layers)]
        seen = [visibility for _ in layers]
        return self.attend_layers(candidates, entered, candidate_offsets, layers, seen)

    def attend_layers(
        self,
        candidates: Tensor,
        entered: Tensor,
        candidate_offsets: Tensor,
        layers: list[UserRows],
        visibility: list[Visibility],
    ) -> Tensor:
        """Run candidates through all layers, each layer with its own rows and visibility."""
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
                visibility[depth],
                time_bias,
                time_bias[:0],
                self.window,
                "softmax",
            )
            rows = layer.finish(rows, attended)
        return rows
