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

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchrec_kvshare.attention.shared import (
    Spans,
    lengths_to_spans,
)
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.history.encoder import append_rows
from torchrec_kvshare.history.moments import Moments, doubling_bucket
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

    def first_recent(self, num_events: int) -> int:
        """The first group that goes on to deeper layers."""
        surplus = max(0, num_events - self.recent)
        return (surplus + self.block - 1) // self.block * self.block // self.merge

    def reusable_events(self, num_matched: int, cached_events: int, num_events: int) -> int:
        """Those of closed groups, as long as the recent ones start where they did."""
        if self.first_recent(cached_events) != self.first_recent(num_events):
            return 0
        return num_matched // self.merge * self.merge

    def reusable_rows(self, reusable_events: int) -> int:
        """Closed groups of so many reusable events; the globals are not among them."""
        return reusable_events // self.merge

    def extend(
        self,
        cached: Tensor,
        cached_spans: list[tuple[int, int]],
        events: Tensor,
        event_spans: list[tuple[int, int]],
    ) -> Tensor:
        """New groups behind the closed ones that are cached, then the globals: of each user."""
        new_groups = [self.num_groups(last - first) for first, last in event_spans]
        group_spans = lengths_to_spans(new_groups)
        groups = self.merge_events(events, event_spans, group_spans)
        rows: list[Tensor] = []
        firsts: list[int] = []
        num_globals: list[int] = []
        for user in range(len(event_spans)):
            first, last = group_spans[user]
            closed = cached_spans[user][1] - cached_spans[user][0]
            num_events = event_spans[user][1] - event_spans[user][0] + closed * self.merge
            num_globals.append(self.num_globals if num_events > 0 else 0)
            rows.append(groups[first:last])
            rows.append(self.global_tokens[: num_globals[user]])
            firsts.append(self.first_recent(num_events))
        return self.deepen(torch.cat(rows), new_groups, num_globals, firsts, cached, cached_spans)

    def deepen(
        self,
        rows: Tensor,
        new_groups: list[int],
        num_globals: list[int],
        first_recent: list[int],
        cached: Tensor,
        cached_spans: list[tuple[int, int]],
    ) -> Tensor:
        """K/V of new groups and globals [new rows, E] through all layers."""
        planes: list[Tensor] = []
        groups = new_groups  # of each user that get to a layer
        closed: list[int] = []
        recent_spans: list[tuple[int, int]] = []
        for user in range(len(cached_spans)):
            first, last = cached_spans[user]
            closed.append(last - first)
            recent_spans.append((min(first + first_recent[user], last), last))
        for depth, layer in enumerate(self.layers):
            query, key, value = layer.heads(layer.project(rows))
            spans = lengths_to_spans(
                [groups[user] + num_globals[user] for user in range(len(groups))]
            )
            planes.append(self.behind_zeros(key, spans, new_groups, groups))
            planes.append(self.behind_zeros(value, spans, new_groups, groups))
            if depth + 1 < self.num_layers:
                seen = cached_spans if depth == 0 else recent_spans
                keys, key_spans = append_rows(cached[2 * depth], seen, key, spans)
                values, _ = append_rows(cached[2 * depth + 1], seen, value, spans)
                # Only recent groups go on, and at deeper layers all are.
                kept: list[int] = []
                for user in range(len(groups)):
                    old = first_recent[user] - closed[user] if depth == 0 else 0
                    kept.append(groups[user] - max(0, old))
                attended = self.attend_history(
                    self.going_on(query, spans, kept, num_globals),
                    keys,
                    values,
                    key_spans,
                    kept,
                    num_globals,
                )
                rows = layer.finish(self.going_on(rows, spans, kept, num_globals), attended)
                groups = kept
        return torch.stack(planes)

    def going_on(
        self, rows: Tensor, spans: list[tuple[int, int]], kept: list[int], num_globals: list[int]
    ) -> Tensor:
        """The last ``kept`` groups of each user, and its globals behind them."""
        parts = [rows[:0]]
        for user in range(len(spans)):
            last = spans[user][1]
            parts.append(rows[last - num_globals[user] - kept[user] : last])
        return torch.cat(parts)

    def attend_history(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        key_spans: list[tuple[int, int]],
        num_groups: list[int],
        num_globals: list[int],
    ) -> Tensor:
        """What groups and globals [rows, H, D] attend to, each user's groups before its globals."""
        attended = [query[:0]]
        first = 0
        for user in range(len(key_spans)):
            key_first, key_last = key_spans[user]
            middle = first + num_groups[user]
            last = middle + num_globals[user]
            # Groups see no globals: those know later groups.
            group_keys = [(key_first, key_last - num_globals[user])]
            all_keys = [(key_first, key_last)]
            own, together = [(0, num_groups[user])], [(0, num_globals[user])]
            rows = query[first:middle]
            attended.append(self.attention.causal(rows, keys, values, own, group_keys, 0))
            rows = query[middle:last]
            attended.append(self.attention.full(rows, keys, values, together, all_keys))
            first = last
        return torch.cat(attended)

    def behind_zeros(
        self,
        plane: Tensor,
        spans: list[tuple[int, int]],
        new_groups: list[int],
        at_layer: list[int],
    ) -> Tensor:
        """A plane in which groups that did not get so deep have rows of zeros, never read."""
        parts: list[Tensor] = [plane[:0]]
        for user in range(len(spans)):
            first, last = spans[user]
            missing = new_groups[user] - at_layer[user]
            parts.append(plane.new_zeros([missing, plane.size(1), plane.size(2)]))
            parts.append(plane[first:last])
        return torch.cat(parts)

    def merge_events(
        self,
        events: Tensor,
        event_spans: list[tuple[int, int]],
        group_spans: list[tuple[int, int]],
    ) -> Tensor:
        """Groups [groups, E] of events [T, E], each group through the inner layer first."""
        places: list[Tensor] = [torch.arange(0, device=events.device)]
        num_groups = 0
        for user in range(len(event_spans)):
            first, last = event_spans[user]
            start = group_spans[user][0] * self.merge
            places.append(torch.arange(start, start + last - first, device=events.device))
            num_groups = group_spans[user][1]
        place = torch.cat(places)
        dim = events.size(1)
        num_places = num_groups * self.merge
        rows = events
        present = torch.ones([num_groups, self.merge], dtype=torch.bool, device=events.device)
        if num_places != events.size(0):
            rows = events.new_zeros([num_places, dim]).index_copy(0, place, events)
            present = torch.zeros_like(present).view(-1).index_fill(0, place, 1).view_as(present)
        rows = rows.view(num_groups, self.merge, dim)
        query, key, value = self.inner.heads(self.inner.project(rows))
        scores = torch.matmul(query.transpose(1, 2), key.permute(0, 2, 3, 1))  # [groups, H, K, K]
        scores = scores * (dim // self.num_heads) ** -0.5
        hidden = ~present.unsqueeze(1).unsqueeze(2)
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
        attended = torch.matmul(weights, value.transpose(1, 2)).transpose(1, 2)
        inner = self.inner.finish(rows, attended) * present.unsqueeze(2)
        return self.merge_group(inner.flatten(1))

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
        buckets = self.group_buckets(moments)
        recent_buckets: list[Tensor] = []
        recent_spans: list[tuple[int, int]] = []
        for user in range(len(buckets)):
            first_recent = self.first_recent(moments.elapsed[user].size(1))
            recent_buckets.append(buckets[user][:, first_recent:])
            first, last = spans.events[user]
            recent_spans.append((min(first + first_recent, last), last))
        recents = Spans(spans.candidates, recent_spans)
        biases = [self.group_biases(0, buckets, spans)]
        seen = [spans]
        for depth in range(1, self.num_layers):
            biases.append(self.group_biases(depth, recent_buckets, recents))
            seen.append(recents)
        return self.attend_layers(candidates, entered, kv, biases, seen, body)

    def group_buckets(self, moments: Moments) -> list[Tensor]:
        """Per user [1, groups], the time bucket of each group's newest event."""
        buckets: list[Tensor] = []
        for user in range(len(moments.elapsed)):
            elapsed = moments.elapsed[user]
            if elapsed.size(0) > 1:
                raise ValueError("longer shows candidates whole histories: one moment for a window")
            num_events = elapsed.size(1)
            end = torch.arange(1, self.num_groups(num_events) + 1, device=elapsed.device)
            newest = (end * self.merge).clamp(max=num_events) - 1
            buckets.append(doubling_bucket(elapsed[:, newest], self.num_time_buckets))
        return buckets

    def group_biases(self, depth: int, buckets: list[Tensor], spans: Spans) -> list[Tensor]:
        """Biases of groups, and none for the globals behind them: per user [H, 1, rows]."""
        biases: list[Tensor] = []
        for user in range(len(buckets)):
            first, last = spans.events[user]
            bias = functional.embedding(buckets[user], self.time_bias[depth])  # [1, groups, H]
            unbiased = last - first - bias.size(1)
            biases.append(functional.pad(bias, [0, 0, 0, unbiased]).permute(2, 0, 1).contiguous())
        return biases
