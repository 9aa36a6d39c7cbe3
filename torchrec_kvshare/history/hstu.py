"""HSTU history: SiLU attention that is not normalised, gated, without a feed-forward part.

An event sees itself and earlier events without any bias; candidates add a bias by the time since
an event and by its position from the newest. The scale is a constant of the model, not one over the
longest history of a batch, so that batchmates do not matter.
"""

import math

import torch
from torch import Tensor, nn

from torchrec_kvshare.attention.operators import (
    Visibility,
    candidate_attention,
    history_attention,
)
from torchrec_kvshare.history.encoder import Encoder, Projection, check_heads, tie_query_and_key
from torchrec_kvshare.history.pages import KVPages, layer_rows

NUM_POSITION_BUCKETS = 16  # of doubling width: the newest event to the 2**14th and older


class HSTULayer(nn.Module):
    """Projections, gate and norms of one layer.

    Args:
        dim: model width E.
        num_heads: H; must divide ``dim``.
        dropout: share of activations dropped in training.

    Raises:
        ConfigError: if the heads do not divide the width.

    Source:
        HSTU, Zhai et al. 2024, eqs. 1 to 3 (arXiv:2402.17152).
    """

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        check_heads(dim, num_heads)
        self.num_heads = num_heads
        self.dim = dim
        self.norm = nn.LayerNorm(dim)
        self.gate_query_key_value = Projection(dim, 4 * dim)
        self.attended_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)
        weight = self.gate_query_key_value.weight
        tie_query_and_key(weight[dim : 2 * dim], weight[2 * dim : 3 * dim])

    def project(self, rows: Tensor) -> Tensor:
        """Return gate, queries, keys and values side by side, [..., 4E], of rows [..., E]."""
        return silu_of_twice(0.5 * self.gate_query_key_value(self.norm(rows)))

    def heads(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Split ``project``'s result: gate [..., E]; queries, keys and values, each [..., H, D]."""
        gate, query, key, value = projected.chunk(4, dim=-1)
        shape = [self.num_heads, self.dim // self.num_heads]
        return (
            gate,
            query.unflatten(-1, shape),
            key.unflatten(-1, shape),
            value.unflatten(-1, shape),
        )

    def project_kv(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values only, each [R, H, D], of rows [R, E]."""
        key_value = self.gate_query_key_value.outputs_from(self.norm(rows), 2 * self.dim)
        projected = silu_of_twice(0.5 * key_value)
        key, value = projected.unflatten(-1, [2, self.num_heads, -1]).unbind(-3)
        return key, value

    def finish(self, rows: Tensor, attended: Tensor, gate: Tensor) -> Tensor:
        """Add the attention's result [..., H, D], gated, to the rows: [..., E]."""
        return rows + self.dropout(self.out(self.attended_norm(attended.flatten(-2)) * gate))


class HSTUEncoder(Encoder):
    """A stack of HSTU layers.

    Args:
        dim: width E of tokens.
        num_layers: layers in the stack.
        num_heads: H; must divide ``dim``.
        dropout: share of activations dropped in training.
        max_history: maximum events a row sees; the attention's scale is one over its square root.
        window: events that a row and a candidate see at every layer; 0 for all.

    Raises:
        ConfigError: if the sizes do not fit each other.

    Source:
        HSTU, Zhai et al. 2024 (arXiv:2402.17152), with the relative bias on candidate rows only.
        The source divides by the maximum length; dividing by its square root keeps short histories
        above the epsilon of the norm that follows.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        max_history: int,
        window: int,
    ) -> None:
        layers: list[nn.Module] = [HSTULayer(dim, num_heads, dropout) for _ in range(num_layers)]
        super().__init__(layers, num_heads, 0.0, window)
        self.scale: float = 1.0 / math.sqrt(max_history)
        self.position_bias = nn.Parameter(torch.zeros(num_layers, NUM_POSITION_BUCKETS, num_heads))

    def candidate_weights(self) -> list[str]:
        """Return beginnings of names: no layer follows the last one, which ends with its K/V."""
        last = f"layers.{self.num_layers - 1}."
        ours = ["position_bias", f"{last}attended_norm.", f"{last}out."]
        return [*super().candidate_weights(), *ours]

    def extend(self, cached: KVPages, events: Tensor, event_offsets: Tensor) -> Tensor:
        """Return K/V [planes, T, H, D] of new events [T, E] that follow cached ones."""
        rows = events
        planes: list[Tensor] = []
        for depth, layer in enumerate(self.layers):
            # No layer follows the last one, so its events need keys and values only.
            if depth + 1 == self.num_layers:
                key, value = layer.project_kv(rows)
            else:
                gate, query, key, value = layer.heads(layer.project(rows))
                attended = history_attention(
                    query,
                    event_offsets,
                    key,
                    value,
                    event_offsets,
                    layer_rows(cached, depth),
                    self.window,
                    0,
                    "silu",
                )
                rows = layer.finish(rows, attended * self.scale, gate)
            planes.append(key)
            planes.append(value)
        return torch.stack(planes)

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
        rows = candidates
        for depth, layer in enumerate(self.layers):
            projected = entered if depth == 0 else layer.project(rows)
            gate, query, own_key, own_value = layer.heads(projected)
            attended = candidate_attention(
                query,
                own_key,
                own_value,
                candidate_offsets,
                layer_rows(kv, depth),
                visibility,
                self.time_bias[depth],
                self.position_bias[depth],
                self.window,
                "silu",
            )
            rows = layer.finish(rows, attended * self.scale, gate)
        return rows


def silu_of_twice(halves: Tensor) -> Tensor:
    """Return SiLU of twice the values: ``x * sigmoid(x)`` at ``x = 2 h`` is ``h * (1 + tanh(h))``.

    Not ``torch.sigmoid`` or ``silu``: their vectorised code gives other bits than the scalar code
    that computes the last few values of a tensor.
    """
    return (torch.tanh(halves) + 1.0) * halves
