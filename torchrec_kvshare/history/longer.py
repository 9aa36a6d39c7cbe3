"""LONGER history: neighbouring events are merged, and only recent groups go on to deeper layers.

::

    # events          a b c d | e f g h | i j         merge = 4; the last group is still open
    # groups             A    |    B    |  C          each through the inner layer, then merged
    # first layer     A B C and globals are seen      by the recent groups and the globals
    # deeper layers   recent groups and globals are seen

A group closes when it is full, at multiples of ``merge`` of the event index. A closed group sees no
later group, so its K/V stays valid. The open group and the globals, which see everything, are
computed again when events are added. The recent groups start at a block boundary, as windows do.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from torchrec_kvshare.attention.operators import Visibility, history_attention
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.history.pages import (
    KVPages,
    layer_rows,
    offsets_of,
    position_in_user,
    row_indices,
    users_of_rows,
)
from torchrec_kvshare.history.transformer import TransformerEncoder, TransformerLayer


@dataclass(frozen=True, kw_only=True)
class LongerOptions:
    """Options of ``longer`` histories.

    Attributes:
        merge: events in a group; must divide the window's block.
        recent: newest events whose groups go on to deeper layers; a multiple of the block.
        num_globals: learned rows that see the whole history.
    """

    merge: int = 8
    recent: int = 128
    num_globals: int = 4


def check_options(options: LongerOptions, block: int) -> None:
    """Check that the options are in range and fit the block.

    Raises:
        ConfigError: naming the option.
    """
    if options.merge < 1 or block % options.merge:
        raise ConfigError(f"merge is {options.merge}; it must divide block = {block} events")
    if options.recent < 1 or options.recent % block:
        raise ConfigError(
            f"recent is {options.recent}; it must be a multiple of block = {block} events"
        )
    if options.num_globals < 0:
        raise ConfigError(f"num_globals is {options.num_globals}; it must be at least 0")


class LongerEncoder(TransformerEncoder):
    """See ``TransformerEncoder``.

    Args:
        dim: width E of tokens.
        num_layers: layers in the stack, the first of them over all groups.
        num_heads: H; must divide ``dim``.
        dropout: share of activations dropped in training.
        options: group size, recent events and globals.
        block: the recent groups start at a multiple of this many events.

    Raises:
        ConfigError: if the sizes do not fit each other.

    Source:
        LONGER, Chai et al. 2025 (arXiv:2505.04421): token merge with InnerTrans, global tokens,
        cross attention of recent queries, then self attention.
    """

    hidden_score: Final[float] = -1e30  # its weight is 0 beside any other

    def __init__(
        self,
        dim: int,
        num_layers: int,
        num_heads: int,
        dropout: float,
        options: LongerOptions,
        block: int,
    ) -> None:
        super().__init__(dim, num_layers, num_heads, dropout, window=0)
        check_options(options, block)
        self.merge = options.merge
        self.recent = options.recent
        self.block = block
        self.num_globals = options.num_globals
        self.takes_prefixes = False
        self.inner = TransformerLayer(dim, num_heads, dropout)
        self.merge_group = nn.Linear(self.merge * dim, dim)
        self.global_tokens = nn.Parameter(torch.randn(self.num_globals, dim) * dim**-0.5)

    def num_groups(self, num_events: int) -> int:
        """Return the number of groups of a history, an open one included."""
        return (num_events + self.merge - 1) // self.merge

    def num_kv_rows(self, num_events: int) -> int:
        """Return the number of groups plus globals; 0 without events."""
        return 0 if num_events == 0 else self.num_groups(num_events) + self.num_globals

    def row_offsets(self, event_offsets: Tensor) -> Tensor:
        """Return offsets [B + 1] of K/V rows, for histories with these event offsets."""
        lengths = event_offsets.diff()
        return offsets_of(self.rows_of_events(lengths) + (lengths > 0) * self.num_globals)

    def rows_of_events(self, num_events: Tensor) -> Tensor:
        """Return the number of groups of so many events; globals follow them."""
        return (num_events + self.merge - 1) // self.merge

    def first_recent(self, num_events: int) -> int:
        """Return the index of the first group that goes on to deeper layers."""
        surplus = max(0, num_events - self.recent)
        return (surplus + self.block - 1) // self.block * self.block // self.merge

    def first_recent_of(self, lengths: Tensor) -> Tensor:
        """Return ``first_recent`` [B] of histories with these lengths [B]."""
        surplus = (lengths - self.recent).clamp(min=0)
        return (surplus + self.block - 1) // self.block * self.block // self.merge

    def reusable_events(self, num_matched: int, cached_events: int, num_events: int) -> int:
        """Return the events in closed groups, or 0 if the recent groups start elsewhere now."""
        if self.first_recent(cached_events) != self.first_recent(num_events):
            return 0
        return num_matched // self.merge * self.merge

    def reusable_rows(self, reusable_events: int) -> int:
        """Return the number of closed groups; globals are never reusable."""
        return reusable_events // self.merge

    def max_groups(self, num_events: int, num_users: int) -> int:
        """Return an upper bound of the groups of a batch, from sizes that the host knows."""
        return num_events // self.merge + num_users

    def max_recent_rows(self, num_users: int) -> int:
        """Return an upper bound of the rows, globals included, that go on to deeper layers."""
        return num_users * (self.recent // self.merge + self.num_globals)

    def extend(self, cached: KVPages, events: Tensor, event_offsets: Tensor) -> Tensor:
        """Return K/V of each user's groups after the cached closed ones, then of the globals."""
        num_users = event_offsets.size(0) - 1
        num_cached = cached.row_offsets.diff()
        groups = self.rows_of_events(event_offsets.diff())
        num_events = event_offsets.diff() + num_cached * self.merge
        new_offsets = offsets_of(groups + (num_events > 0) * self.num_globals)
        max_groups = self.max_groups(events.size(0), num_users)
        users = users_of_rows(new_offsets, max_groups + num_users * self.num_globals)
        position = position_in_user(new_offsets, users)
        rows = self.new_rows(events, event_offsets, groups, users, position)
        # Only recent groups go on to deeper layers, and all globals, which follow them.
        first_recent = self.first_recent_of(num_events)
        num_old = (first_recent - num_cached).clamp(min=0).minimum(groups)
        kept = rows_from(new_offsets, num_old, self.max_recent_rows(num_users))
        kept_rows = new_offsets.index_select(0, kept.users) + kept.position
        kept_rows = kept_rows.clamp(max=users.size(0) - 1)
        first_kept = num_old.index_select(0, users)
        is_old = (position < first_kept).view(-1, 1, 1)
        kept_index = kept.offsets.index_select(0, users) + position - first_kept
        kept_index = kept_index.clamp(0, kept.users.size(0) - 1)
        recent = pages_from(cached, first_recent, self.max_recent_rows(num_users))
        planes: list[Tensor] = []
        for depth, layer in enumerate(self.layers):
            query, key, value = layer.heads(layer.project(rows))
            planes.append(with_zeros(key, kept_index, is_old) if depth > 0 else key)
            planes.append(with_zeros(value, kept_index, is_old) if depth > 0 else value)
            if depth + 1 < self.num_layers:
                attended = history_attention(
                    query.index_select(0, kept_rows) if depth == 0 else query,
                    kept.offsets,
                    key,
                    value,
                    new_offsets if depth == 0 else kept.offsets,
                    layer_rows(cached if depth == 0 else recent, depth),
                    0,
                    self.num_globals,
                    "softmax",
                )
                rows = rows.index_select(0, kept_rows) if depth == 0 else rows
                rows = layer.finish(rows, attended)
        return torch.stack(planes)

    def new_rows(
        self, events: Tensor, event_offsets: Tensor, groups: Tensor, users: Tensor, position: Tensor
    ) -> Tensor:
        """Return the first layer's input [new rows, E]: each user's groups, then the globals."""
        group_offsets = offsets_of(groups)
        merged = self.merge_events(events, event_offsets, group_offsets)
        global_index = position - groups.index_select(0, users)  # negative for groups
        group_index = group_offsets.index_select(0, users) + position
        source = torch.where(global_index < 0, group_index, merged.size(0) + global_index)
        tokens = torch.cat([merged, self.global_tokens])
        return tokens.index_select(0, source.clamp(max=tokens.size(0) - 1))

    def merge_events(self, events: Tensor, event_offsets: Tensor, group_offsets: Tensor) -> Tensor:
        """Merge events [T, E] into groups [groups, E], after the inner layer within each group."""
        num_users, dim = event_offsets.size(0) - 1, events.size(1)
        num_groups = self.max_groups(events.size(0), num_users)
        users = users_of_rows(event_offsets, events.size(0))
        first_slot = group_offsets.index_select(0, users) * self.merge
        slot = first_slot + position_in_user(event_offsets, users)
        rows = events.new_zeros([num_groups * self.merge, dim]).index_copy(0, slot, events)
        present = torch.zeros([num_groups * self.merge], dtype=torch.bool, device=events.device)
        present = present.index_fill(0, slot, 1).view(num_groups, self.merge)
        rows = rows.view(num_groups, self.merge, dim)
        query, key, value = self.inner.heads(self.inner.project(rows))
        scores = torch.matmul(query.transpose(1, 2), key.permute(0, 2, 3, 1))  # [groups, H, K, K]
        scores = scores * (dim // self.num_heads) ** -0.5
        # Finite, not -inf: all slots of a padding group are hidden, and -inf alone would give NaN.
        hidden = present.logical_not().unsqueeze(1).unsqueeze(2)
        weights = torch.softmax(scores.masked_fill(hidden, self.hidden_score), dim=-1)
        attended = torch.matmul(weights, value.transpose(1, 2)).transpose(1, 2)
        inner = self.inner.finish(rows, attended) * present.unsqueeze(2)
        return self.merge_group(inner.flatten(1))

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
        lengths = event_offsets.diff()
        num_users, num_events = lengths.size(0), visibility.row_times.size(0)
        num_rows = self.max_groups(num_events, num_users) + num_users * self.num_globals
        users = users_of_rows(kv.row_offsets, num_rows)
        position = position_in_user(kv.row_offsets, users)
        # A group has the time of its newest event; globals have none.
        newest = ((position + 1) * self.merge).minimum(lengths.index_select(0, users)) - 1
        event = (event_offsets.index_select(0, users) + newest).clamp(0, num_events)
        times = torch.cat([visibility.row_times, visibility.row_times.new_zeros([1])])
        times = times.index_select(0, event)
        is_group = position < self.rows_of_events(lengths).index_select(0, users)
        row_times = torch.where(is_group, times, -1)
        candidate_user = users_of_rows(candidate_offsets, candidates.size(0))
        first_recent = self.first_recent_of(lengths)
        kept = rows_from(kv.row_offsets, first_recent, self.max_recent_rows(num_users))
        kept_rows = kv.row_offsets.index_select(0, kept.users) + kept.position
        recent_times = row_times.index_select(0, kept_rows.clamp(max=num_rows - 1))
        recent = pages_from(kv, first_recent, self.max_recent_rows(num_users))
        seen = [self.all_visible(visibility, row_times, kv.row_offsets, candidate_user)]
        deeper = self.all_visible(visibility, recent_times, recent.row_offsets, candidate_user)
        layers = [layer_rows(kv, 0)]
        for depth in range(1, self.num_layers):
            seen.append(deeper)
            layers.append(layer_rows(recent, depth))
        return self.attend_layers(candidates, entered, candidate_offsets, layers, seen)

    def all_visible(
        self, visibility: Visibility, row_times: Tensor, row_offsets: Tensor, candidate_user: Tensor
    ) -> Visibility:
        """Return the same candidate times, with all rows visible."""
        visible_rows = row_offsets.diff().index_select(0, candidate_user)
        return Visibility(row_times, visibility.candidate_times, visible_rows)


class RowsFrom(NamedTuple):
    """The rows of each user from a given row on.

    Attributes:
        offsets: [B + 1] int64, of these rows.
        users: [K] int64, the user of each row; K is an upper bound, the rest is padding.
        position: [K] int64, the position of each row among all rows of its user.
    """

    offsets: Tensor
    users: Tensor
    position: Tensor


def rows_from(row_offsets: Tensor, first_rows: Tensor, max_rows: int) -> RowsFrom:
    """Return the rows of each user from its ``first_rows`` [B] on; ``max_rows`` is K."""
    offsets = offsets_of((row_offsets.diff() - first_rows).clamp(min=0))
    users = users_of_rows(offsets, max_rows)
    position = position_in_user(offsets, users) + first_rows.index_select(0, users)
    return RowsFrom(offsets, users, position)


def with_zeros(recent_rows: Tensor, indices: Tensor, is_old: Tensor) -> Tensor:
    """Gather recent rows, with zeros for old groups, which do not reach this layer."""
    return recent_rows.index_select(0, indices).masked_fill(is_old, 0.0)


def pages_from(kv: KVPages, first_rows: Tensor, max_rows: int) -> KVPages:
    """Return the K/V of ``rows_from`` as pages of one row each."""
    rows = rows_from(kv.row_offsets, first_rows, max_rows)
    page_ids = row_indices(kv, rows.users, rows.position)
    planes = kv.planes.flatten(1, 2).unsqueeze(2)
    return KVPages(planes, page_ids, rows.offsets, rows.offsets)
