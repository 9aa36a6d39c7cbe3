"""The history tower: an encoder between tokens and one vector per candidate, with no state.

``prefill`` turns the events of all users into K/V, ``extend`` adds the K/V of new events to what is
cached, ``attend`` turns candidates into one vector each over that K/V. K/V is an argument and a
result, never an attribute. The training forward is ``prefill`` then ``attend_prefix`` over the same
K/V: what is trained is what is served.
"""

import torch
from torch import Tensor, nn

from torchrec_kvshare.attention.bodies import FLASH, NATIVE
from torchrec_kvshare.attention.shared import Spans, lengths_to_spans
from torchrec_kvshare.history.kinds import TowerSpec, new_encoder
from torchrec_kvshare.history.moments import (
    moments_of_candidates,
    moments_of_requests,
    newest_events,
)


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
        self.window = spec.window
        self.body: str = FLASH
        self.candidate_token = nn.Parameter(torch.zeros(spec.num_tokens, spec.dim))
        self.norm = nn.LayerNorm(spec.dim)
        self.head = nn.Linear(spec.dim, spec.dim)
        self.dropout = nn.Dropout(spec.dropout)

    def use_body(self, body: str) -> None:
        """Compute attention by a body that ``choose_body`` gave."""
        self.body = body
        self.encoder.attention.native = body == NATIVE

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """Planes, heads and head width of the K/V."""
        return self.encoder.num_planes, self.spec.num_heads, self.dim // self.spec.num_heads

    def row_spans(self, event_lengths: list[int]) -> list[tuple[int, int]]:
        """Where each user's rows of K/V are, users one after the other."""
        return lengths_to_spans([self.encoder.num_rows(length) for length in event_lengths])

    def prefill(self, events: Tensor, event_spans: list[tuple[int, int]]) -> Tensor:
        """K/V of the histories of all users.

        Args:
            events: [T, E] event tokens, oldest first, users one after the other.
            event_spans: rows ``(first, last)`` of each user; together they cover T in order.

        Returns:
            [planes, R, H, D], users one after the other, ``encoder.num_rows`` rows for each.
        """
        return self.encoder.prefill(self.dropout(events), event_spans)

    def extend(
        self,
        cached: Tensor,
        cached_spans: list[tuple[int, int]],
        events: Tensor,
        event_spans: list[tuple[int, int]],
    ) -> Tensor:
        """K/V of what follows cached rows, as a prefill of the whole history would give it.

        Args:
            cached: [planes, R, H, D].
            cached_spans: rows of each user in R, those of its ``encoder.reusable_events``.
            events: [T, E] event tokens behind the reusable ones.
            event_spans: rows of each user in T.

        Returns:
            [planes, new rows, H, D], users one after the other.

        Raises:
            ValueError: if histories of this kind cannot be extended.
        """
        return self.encoder.extend(cached, cached_spans, self.dropout(events), event_spans)

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
        kv: Tensor,
        elapsed: list[Tensor],
        spans: Spans,
    ) -> Tensor:
        """One vector for each candidate over the whole history of its user; inference only.

        Args:
            candidates: [C, M, E] rows that ``enter`` gave, grouped by user.
            entered: their projections.
            kv: [planes, R, H, D] with the users' rows at ``spans.events``.
            elapsed: per user [L] int64 seconds from each event to the request.
            spans: whose candidates and rows are whose.

        Returns:
            [C, E].
        """
        if self.window > 0:
            spans = Spans(spans.candidates, newest_events(spans.events, self.window))
            elapsed = [one[-self.window :] for one in elapsed]
        moments = moments_of_requests(elapsed, spans.candidates)
        rows = self.encoder.attend(candidates, entered, kv, moments, spans, self.body)
        return self.head(self.norm(rows[:, 0]))

    def attend_prefix(
        self,
        candidates: Tensor,
        entered: Tensor,
        kv: Tensor,
        event_time: list[Tensor],
        candidate_time: Tensor,
        visible_events: Tensor,
        spans: Spans,
    ) -> Tensor:
        """One vector for each candidate over the first ``visible_events`` of its user's events.

        Args:
            candidates: [C, M, E] rows that ``enter`` gave, grouped by user.
            entered: their projections.
            kv: [planes, R, H, D].
            event_time: per user [L] int64 Unix seconds.
            candidate_time: [C] int64 Unix seconds.
            visible_events: [C] int64, how many of its user's oldest events a candidate may see.
            spans: whose candidates and rows are whose.

        Returns:
            [C, E]; differentiable.

        Raises:
            ValueError: if a candidate may not see all events and the encoder takes no prefixes.
        """
        moments = moments_of_candidates(
            event_time, candidate_time, visible_events, spans.candidates, self.window
        )
        if not self.encoder.takes_prefixes:
            for hidden in moments.hidden:
                if bool(hidden.any()):
                    raise ValueError("this encoder shows candidates whole histories, not prefixes")
        rows = self.encoder.attend(candidates, entered, kv, moments, spans, "dense")
        return self.head(self.norm(rows[:, 0]))
