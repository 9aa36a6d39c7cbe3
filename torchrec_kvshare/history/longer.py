"""LONGER history: neighbouring events are merged, and only the recent ones go on to deeper layers.

::

    # events          a b c d | e f g h | i j         merge = 4; the last group is still open
    # groups             A    |    B    |  C          each through the inner layer, then merged
    # first layer     A B C and globals are seen      by the recent groups and the globals
    # deeper layers   recent groups and globals are seen

A group closes when it is full, at multiples of ``merge`` of the event index; a closed group sees no
later one, so its K/V stays. The open group and the globals, which see everything, are computed anew
when events come. The recent groups start at a block boundary, as windows do.
"""

from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from torchrec_kvshare.attention.operators import Sights, history_attention
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.history.pages import (
    KVPages,
    layer_rows,
    offsets_of,
    place_in_user,
    row_places,
    users_of_rows,
)
from torchrec_kvshare.history.transformer import TransformerEncoder, TransformerLayer


class LongerEncoder(TransformerEncoder):
    """See ``TransformerEncoder``.

    Args:
        dim: width E of tokens.
        num_layers: layers in the stack, the first of them over all groups.
        num_heads: H; must divide ``dim``.
        dropout: share of activations dropped in training.
        merge: events in a group; divides ``block``.
        recent: newest events whose groups are queries; a multiple of ``block``.
        block: events between two places where the recent groups may start.
        num_globals: learned rows that see the whole history.

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
        merge: int,
        recent: int,
        block: int,
        num_globals: int,
    ) -> None:
        super().__init__(dim, num_layers, num_heads, dropout, window=0)
        if merge < 1 or block % merge:
            raise ConfigError(f"merge is {merge}; it must divide block = {block} events")
        if recent < 1 or recent % block:
            raise ConfigError(
                f"recent is {recent}; it must be a multiple of block = {block} events"
            )
        if num_globals < 0:
            raise ConfigError(f"num_globals is {num_globals}; it must be at least 0")
        self.merge = merge
        self.recent = recent
        self.block = block
        self.num_globals = num_globals
        self.takes_prefixes = False
        self.inner = TransformerLayer(dim, num_heads, dropout)
        self.merge_group = nn.Linear(merge * dim, dim)
        self.global_tokens = nn.Parameter(torch.randn(num_globals, dim) * dim**-0.5)

    def num_groups(self, num_events: int) -> int:
        """Groups of a history, the last of them perhaps open."""
        return (num_events + self.merge - 1) // self.merge

    def num_rows(self, num_events: int) -> int:
        """Rows of K/V: groups, then globals; none without events."""
        return 0 if num_events == 0 else self.num_groups(num_events) + self.num_globals

    def row_offsets(self, event_offsets: Tensor) -> Tensor:
        """Offsets [B + 1] of the rows of histories with these offsets."""
        lengths = event_offsets.diff()
        return offsets_of(self.groups_of(lengths) + (lengths > 0) * self.num_globals)

    def groups_of(self, lengths: Tensor) -> Tensor:
        """Groups [B] of histories of so many events [B]."""
        return (lengths + self.merge - 1) // self.merge

    def first_recent(self, num_events: int) -> int:
        """The first group that goes on to deeper layers."""
        surplus = max(0, num_events - self.recent)
        return (surplus + self.block - 1) // self.block * self.block // self.merge

    def first_recent_of(self, lengths: Tensor) -> Tensor:
        """The same [B] of histories of so many events [B]."""
        surplus = (lengths - self.recent).clamp(min=0)
        return (surplus + self.block - 1) // self.block * self.block // self.merge

    def reusable_events(self, num_matched: int, cached_events: int, num_events: int) -> int:
        """Those of closed groups, as long as the recent ones start where they did."""
        if self.first_recent(cached_events) != self.first_recent(num_events):
            return 0
        return num_matched // self.merge * self.merge

    def reusable_rows(self, reusable_events: int) -> int:
        """Closed groups of so many reusable events; the globals are not among them."""
        return reusable_events // self.merge

    def most_groups(self, num_events: int, num_users: int) -> int:
        """Groups of so many events of so many users at most: what the host knows of them."""
        return num_events // self.merge + num_users

    def most_recent(self, num_users: int) -> int:
        """Rows, globals among them, that go on to deeper layers at most."""
        return num_users * (self.recent // self.merge + self.num_globals)

    def extend(self, cached: KVPages, events: Tensor, event_offsets: Tensor) -> Tensor:
        """New groups behind the closed ones that are cached, then the globals: of each user."""
        num_users = event_offsets.size(0) - 1
        num_cached = cached.row_offsets.diff()
        groups = self.groups_of(event_offsets.diff())
        num_events = event_offsets.diff() + num_cached * self.merge
        new_offsets = offsets_of(groups + (num_events > 0) * self.num_globals)
        most_groups = self.most_groups(events.size(0), num_users)
        users = users_of_rows(new_offsets, most_groups + num_users * self.num_globals)
        place = place_in_user(new_offsets, users)
        rows = self.new_rows(events, event_offsets, groups, users, place)
        # Only recent groups go on to deeper layers; the globals, behind them, all do.
        first_recent = self.first_recent_of(num_events)
        old = (first_recent - num_cached).clamp(min=0).minimum(groups)
        kept = rows_behind(new_offsets, old, self.most_recent(num_users))
        kept_rows = new_offsets.index_select(0, kept.users) + kept.place
        kept_rows = kept_rows.clamp(max=users.size(0) - 1)
        first_old = old.index_select(0, users)
        is_old = (place < first_old).view(-1, 1, 1)
        place_kept = kept.offsets.index_select(0, users) + place - first_old
        place_kept = place_kept.clamp(0, kept.users.size(0) - 1)
        recent = pages_behind(cached, first_recent, self.most_recent(num_users))
        planes: list[Tensor] = []
        for depth, layer in enumerate(self.layers):
            query, key, value = layer.heads(layer.project(rows))
            planes.append(zeros_for(is_old, key, place_kept) if depth > 0 else key)
            planes.append(zeros_for(is_old, value, place_kept) if depth > 0 else value)
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
        self, events: Tensor, event_offsets: Tensor, groups: Tensor, users: Tensor, place: Tensor
    ) -> Tensor:
        """Groups and globals [new rows, E] before the first layer, each user's globals last."""
        group_offsets = offsets_of(groups)
        merged = self.merge_events(events, event_offsets, group_offsets)
        behind = place - groups.index_select(0, users)
        of_group = group_offsets.index_select(0, users) + place
        source = torch.where(behind < 0, of_group, merged.size(0) + behind)
        tokens = torch.cat([merged, self.global_tokens])
        return tokens.index_select(0, source.clamp(max=tokens.size(0) - 1))

    def merge_events(self, events: Tensor, event_offsets: Tensor, group_offsets: Tensor) -> Tensor:
        """Groups [groups, E] of events [T, E], each group through the inner layer first."""
        num_users, dim = event_offsets.size(0) - 1, events.size(1)
        num_groups = self.most_groups(events.size(0), num_users)
        users = users_of_rows(event_offsets, events.size(0))
        first_place = group_offsets.index_select(0, users) * self.merge
        place = first_place + place_in_user(event_offsets, users)
        rows = events.new_zeros([num_groups * self.merge, dim]).index_copy(0, place, events)
        present = torch.zeros([num_groups * self.merge], dtype=torch.bool, device=events.device)
        present = present.index_fill(0, place, 1).view(num_groups, self.merge)
        rows = rows.view(num_groups, self.merge, dim)
        query, key, value = self.inner.heads(self.inner.project(rows))
        scores = torch.matmul(query.transpose(1, 2), key.permute(0, 2, 3, 1))  # [groups, H, K, K]
        scores = scores * (dim // self.num_heads) ** -0.5
        # Finite: groups that are no user's have nothing else.
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
        sights: Sights,
        event_offsets: Tensor,
    ) -> Tensor:
        """Candidates [C, M, E] through all layers, over the K/V of their users: [C, M, E]."""
        lengths = event_offsets.diff()
        num_users, num_events = lengths.size(0), sights.row_times.size(0)
        num_rows = self.most_groups(num_events, num_users) + num_users * self.num_globals
        users = users_of_rows(kv.row_offsets, num_rows)
        place = place_in_user(kv.row_offsets, users)
        # The time of a group is its newest event's; globals have none.
        newest = ((place + 1) * self.merge).minimum(lengths.index_select(0, users)) - 1
        event = (event_offsets.index_select(0, users) + newest).clamp(0, num_events)
        times = torch.cat([sights.row_times, sights.row_times.new_zeros([1])])
        times = times.index_select(0, event)
        is_group = place < self.groups_of(lengths).index_select(0, users)
        row_times = torch.where(is_group, times, -1)
        candidate_user = users_of_rows(candidate_offsets, candidates.size(0))
        first_recent = self.first_recent_of(lengths)
        kept = rows_behind(kv.row_offsets, first_recent, self.most_recent(num_users))
        kept_rows = kv.row_offsets.index_select(0, kept.users) + kept.place
        recent_times = row_times.index_select(0, kept_rows.clamp(max=num_rows - 1))
        recent = pages_behind(kv, first_recent, self.most_recent(num_users))
        seen = [self.all_visible(sights, row_times, kv.row_offsets, candidate_user)]
        deeper = self.all_visible(sights, recent_times, recent.row_offsets, candidate_user)
        layers = [layer_rows(kv, 0)]
        for depth in range(1, self.num_layers):
            seen.append(deeper)
            layers.append(layer_rows(recent, depth))
        return self.attend_layers(candidates, entered, candidate_offsets, layers, seen)

    def all_visible(
        self, sights: Sights, row_times: Tensor, row_offsets: Tensor, candidate_user: Tensor
    ) -> Sights:
        """The same moments over rows, all of which are seen."""
        num_rows = row_offsets.diff()
        return Sights(row_times, sights.candidate_times, num_rows.index_select(0, candidate_user))


class RowsBehind(NamedTuple):
    """Users' rows from one of each on.

    Attributes:
        offsets: [B + 1] int64, of these rows.
        users: [K] int64, the user of each; K may be more than there are.
        place: [K] int64, its place among all rows of its user.
    """

    offsets: Tensor
    users: Tensor
    place: Tensor


def rows_behind(row_offsets: Tensor, first_rows: Tensor, most_rows: int) -> RowsBehind:
    """The rows of each user from its ``first_rows`` [B] on, ``most_rows`` K of all at most."""
    offsets = offsets_of((row_offsets.diff() - first_rows).clamp(min=0))
    users = users_of_rows(offsets, most_rows)
    place = place_in_user(offsets, users) + first_rows.index_select(0, users)
    return RowsBehind(offsets, users, place)


def zeros_for(is_old: Tensor, rows: Tensor, places: Tensor) -> Tensor:
    """Rows at these places of recent rows, zeros for groups that did not get so deep."""
    return rows.index_select(0, places).masked_fill(is_old, 0.0)


def pages_behind(kv: KVPages, first_rows: Tensor, most_rows: int) -> KVPages:
    """The K/V of the same rows, as pages of one row."""
    rows = rows_behind(kv.row_offsets, first_rows, most_rows)
    page_ids = row_places(kv, rows.users, rows.place)
    planes = kv.planes.flatten(1, 2).unsqueeze(2)
    return KVPages(planes, page_ids, rows.offsets, rows.offsets)
