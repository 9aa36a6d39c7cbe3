"""The history tower: an encoder between tokens and one vector per candidate, with no state.

``prefill`` turns the events of all users into K/V, ``extend`` adds the K/V of new events to what is
cached, ``attend`` turns candidates into one vector each over that K/V. K/V is an argument and a
result, never an attribute. The training forward is ``prefill`` then ``attend`` over the same K/V:
what is trained is what is served.
"""

import torch
from torch import Tensor, nn

from torchrec_kvshare.attention.operators import Sights
from torchrec_kvshare.history.kinds import TowerSpec, new_encoder
from torchrec_kvshare.history.pages import KVPages


class HistoryTower(nn.Module):
    """Event tokens into K/V, and candidates of M tokens over it into one vector each.

    Args:
        spec: what the tower is.
        max_history: most events of its history that it reads.
        block: events between two places where that may start.

    Raises:
        ConfigError: naming the field, if the sizes do not fit each other.
    """

    __jit_ignored_attributes__ = ("spec",)
    __jit_unused_properties__ = ("kv_shape",)

    def __init__(self, spec: TowerSpec, max_history: int, block: int) -> None:
        super().__init__()
        self.spec = spec
        self.encoder = new_encoder(spec, max_history, block)
        self.dim = spec.dim
        self.num_tokens = spec.num_tokens
        self.candidate_token = nn.Parameter(torch.zeros(spec.num_tokens, spec.dim))
        self.norm = nn.LayerNorm(spec.dim)
        self.head = nn.Linear(spec.dim, spec.dim)
        self.dropout = nn.Dropout(spec.dropout)

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Planes, heads and head width of the K/V."""
        return self.encoder.num_planes, self.spec.num_heads, self.dim // self.spec.num_heads

    def prefill(self, events: Tensor, event_offsets: Tensor) -> Tensor:
        """K/V of the histories of all users.

        Args:
            events: [T, E] event tokens, oldest first, users one after the other.
            event_offsets: [B + 1] int64, in events.

        Returns:
            [planes, R, H, D], users one after the other, ``encoder.num_rows`` rows for each.
        """
        return self.encoder.prefill(self.dropout(events), event_offsets)

    def extend(self, cached: KVPages, events: Tensor, event_offsets: Tensor) -> Tensor:
        """K/V of what follows cached rows, as a prefill of the whole history would give it.

        Args:
            cached: of each user, the rows of its ``encoder.reusable_events``.
            events: [T, E] event tokens behind the reusable ones.
            event_offsets: [B + 1] int64, in events.

        Returns:
            [planes, new rows, H, D], users one after the other.

        Raises:
            ValueError: if histories of this kind cannot be extended.
        """
        return self.encoder.extend(cached, self.dropout(events), event_offsets)

    def enter(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """What a candidate is before it meets a user, to be computed once for each item.

        Args:
            candidates: [C, M, E] candidate tokens.

        Returns:
            Rows [C, M, E] and their projections in the first layer, [C, M, 3E or 4E].
        """
        rows = self.dropout(candidates + self.candidate_token)
        return rows, self.encoder.enter(rows)

    def attend(
        self,
        candidates: Tensor,
        entered: Tensor,
        candidate_offsets: Tensor,
        kv: KVPages,
        sights: Sights,
        event_offsets: Tensor,
    ) -> Tensor:
        """One vector for each candidate over what it sees of its user's history.

        Args:
            candidates: [C, M, E] rows that ``enter`` gave, users one after the other.
            entered: their projections.
            candidate_offsets: [B + 1] int64, in candidates.
            kv: of the users' histories, in the same order.
            sights: when the candidates look, and how much they see; its rows are events.
            event_offsets: [B + 1] int64, in events. An encoder that does not take prefixes shows
                every candidate the whole history.

        Returns:
            [C, E]; differentiable.
        """
        rows = self.encoder.attend(
            candidates, entered, candidate_offsets, kv, sights, event_offsets
        )
        return self.head(self.norm(rows[:, 0]))
