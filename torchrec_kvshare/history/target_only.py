"""Target attention only: events do not see each other, candidates see them at every layer.

K/V of every layer is a projection of the event's token, so only the token is cached: one plane
instead of two per layer. Keys and values are projected from it when candidates attend.
"""

from torch import Tensor

from torchrec_kvshare.attention.operators import UserRows, Visibility, flat_rows
from torchrec_kvshare.history.pages import KVPages, position_in_user, row_indices, users_of_rows
from torchrec_kvshare.history.transformer import TransformerEncoder


class TargetOnlyEncoder(TransformerEncoder):
    """See ``TransformerEncoder``; event tokens have no positions and do not depend on each other.

    Args:
        dim: width E of tokens.
        num_layers: layers in the stack.
        num_heads: H; must divide ``dim``.
        dropout: share of activations dropped in training.
        window: events that a candidate sees; 0 for all.

    Source:
        Stacked target-to-history cross attention, STCA (arXiv:2511.06077).
    """

    def __init__(
        self, dim: int, num_layers: int, num_heads: int, dropout: float, window: int
    ) -> None:
        super().__init__(dim, num_layers, num_heads, dropout, window)
        self.num_planes = 1

    def candidate_weights(self) -> list[str]:
        """Return beginnings of names: the K/V is the events' tokens, without any layer."""
        return ["layers.", "time_bias"]

    def prefill(self, events: Tensor, event_offsets: Tensor) -> Tensor:
        """Return events [T, E] as one plane [1, T, H, D]."""
        return events.unflatten(-1, [self.num_heads, -1]).unsqueeze(0)

    def extend(self, cached: KVPages, events: Tensor, event_offsets: Tensor) -> Tensor:
        """Return new events as one plane; they do not depend on what is cached."""
        return self.prefill(events, event_offsets)

    def attend(
        self,
        candidates: Tensor,
        entered: Tensor,
        candidate_offsets: Tensor,
        kv: KVPages,
        visibility: Visibility,
        event_offsets: Tensor,
    ) -> Tensor:
        """Run candidates [C, M, E] through all layers, over their users' events: [C, M, E]."""
        # The pages hold other users' events too: only this batch's are projected.
        users = users_of_rows(event_offsets, visibility.row_times.size(0))
        rows = row_indices(kv, users, position_in_user(event_offsets, users))
        events = kv.planes[0].flatten(0, 1).index_select(0, rows).flatten(1)
        layers: list[UserRows] = []
        for layer in self.layers:
            key, value = layer.project_kv(events)
            layers.append(flat_rows(key, value, event_offsets))
        seen = [visibility for _ in layers]
        return self.attend_layers(candidates, entered, candidate_offsets, layers, seen)
