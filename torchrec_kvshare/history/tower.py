"""The history tower: an encoder between tokens and one vector per candidate, with no state.

``prefill`` turns the events of all users into K/V, ``extend`` adds the K/V of new events to cached
K/V, ``attend`` turns candidates into one vector each over that K/V. K/V is an argument and a
result, never an attribute. The training forward is ``prefill`` then ``attend`` over the same K/V:
what is trained is what is served.

Tokens have the width of their tables, and what leaves the tower has that of the ranking stage. A
projection gives tokens the tower's width, if they have another; the heads give outputs theirs.
"""

import torch
from torch import Tensor, nn

from torchrec_kvshare.attention.operators import Visibility
from torchrec_kvshare.history.kinds import TowerSpec, new_encoder
from torchrec_kvshare.history.pages import KVPages, row_indices


def projection_between(width: int, new_width: int) -> nn.Module:
    """Return a linear layer between two widths that keeps lengths; the identity for equal ones."""
    if width == new_width:
        return nn.Identity()
    projection = nn.Linear(width, new_width)
    # Rows start on the scale of tables of the new width, and similar rows stay similar.
    nn.init.orthogonal_(projection.weight, gain=max(1.0, width / new_width) ** 0.5)
    nn.init.zeros_(projection.bias)
    return projection


class HistoryTower(nn.Module):
    """Turns event tokens into K/V, and candidates of M tokens over it into one vector each.

    Args:
        spec: kind and sizes.
        max_history: maximum events of a history that it reads.
        block: what it reads starts at a multiple of this many events.

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
        self.token_in = projection_between(spec.token_width, spec.dim)
        self.candidate_token = nn.Parameter(torch.zeros(spec.num_tokens, spec.dim))
        self.norm = nn.LayerNorm(spec.dim)
        self.head = nn.Linear(spec.dim, spec.output_width)
        self.dropout = nn.Dropout(spec.dropout)
        self.has_state = spec.has_state
        self.num_state_planes: int = min(2, self.encoder.num_planes)
        self.state_head: nn.Module = nn.Identity()
        if spec.has_state:
            self.state_head = nn.Linear(self.num_state_planes * spec.dim, spec.output_width)

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Number of planes, heads and head width of the K/V."""
        return self.encoder.num_planes, self.spec.num_heads, self.dim // self.spec.num_heads

    def candidate_weights(self) -> list[str]:
        """Return beginnings of the names of weights that no K/V depends on."""
        of_encoder = [f"encoder.{name}" for name in self.encoder.candidate_weights()]
        return ["candidate_token", "norm.", "head.", "state_head.", *of_encoder]

    def prefill(self, events: Tensor, event_offsets: Tensor) -> Tensor:
        """Return the K/V of the histories of all users.

        Args:
            events: [T, token width] event tokens, grouped by user, oldest first.
            event_offsets: [B + 1] int64, in events.

        Returns:
            [planes, R, H, D], grouped by user, ``encoder.num_kv_rows`` rows for each; rows after
            the last user's are padding.
        """
        return self.encoder.prefill(self.dropout(self.token_in(events)), event_offsets)

    def extend(self, cached: KVPages, events: Tensor, event_offsets: Tensor) -> Tensor:
        """Return the K/V that follows cached rows, as a prefill of the whole history would give it.

        Args:
            cached: for each user the rows of its ``encoder.reusable_events``.
            events: [T, token width] tokens of the events after the reusable ones.
            event_offsets: [B + 1] int64, in events.

        Returns:
            [planes, new rows, H, D], grouped by user.

        Raises:
            ValueError: if histories of this kind cannot be extended.
        """
        return self.encoder.extend(cached, self.dropout(self.token_in(events)), event_offsets)

    def enter(self, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the part of a candidate that does not depend on the user.

        Args:
            candidates: [C, M, token width] candidate tokens.

        Returns:
            Rows [C, M, E] and their projections in the first layer, [C, M, 3E or 4E].
        """
        rows = self.dropout(self.token_in(candidates) + self.candidate_token)
        return rows, self.encoder.enter(rows)

    def attend(
        self,
        candidates: Tensor,
        entered: Tensor,
        candidate_offsets: Tensor,
        kv: KVPages,
        visibility: Visibility,
        event_offsets: Tensor,
    ) -> Tensor:
        """Return one vector for each candidate over the events that it sees of its user's history.

        Args:
            candidates: [C, M, E] rows that ``enter`` gave, grouped by user.
            entered: their projections, from ``enter`` too.
            candidate_offsets: [B + 1] int64, in candidates.
            kv: of the users' histories, in the same order.
            visibility: times, and how many events each candidate sees; its rows are events.
            event_offsets: [B + 1] int64, in events. An encoder that does not take prefixes shows
                every candidate the whole history.

        Returns:
            [C, output width]; differentiable.
        """
        rows = self.encoder.attend(
            candidates, entered, candidate_offsets, kv, visibility, event_offsets
        )
        return self.head(self.norm(rows[:, 0]))

    def state(self, kv: KVPages, users: Tensor, visible: Tensor) -> Tensor:
        """Return what the newest event that a candidate sees says about the next one.

        The K/V of the last layer is a projection of the row of that event, which has seen the
        events before it: the row from which a sequential model predicts the next item.

        Args:
            kv: of the users' histories.
            users: [C] int64, the user of each candidate.
            visible: [C] int64, how many events of its user it sees.

        Returns:
            [C, output width]; zeros where no event is visible. It depends on user and number of
            events only.
        """
        newest = (self.encoder.rows_of_events(visible) - 1).clamp(min=0)
        rows = kv.planes[-self.num_state_planes :].flatten(1, 2).flatten(2)  # [planes, P x S, E]
        if rows.size(1) == 0:  # All histories are empty.
            zeros = rows.new_zeros([self.num_state_planes, users.size(0), self.dim])
            # DistributedDataParallel waits for the gradient of every weight: here it is 0.
            newest_rows = zeros + rows.sum()
        else:
            newest_rows = rows.index_select(1, row_indices(kv, users, newest))
        # Not transposed and flattened: an exported graph would ask whether there is 1 candidate.
        state = self.state_head(torch.cat(newest_rows.unbind(0), dim=1))
        # Not times 0: what is read where nothing is visible may be NaN.
        return state.masked_fill((visible == 0).unsqueeze(1), 0.0)
