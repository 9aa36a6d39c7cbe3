"""Target attention only: events do not see each other, candidates see them at every layer.

K/V of every layer comes straight from the event's token, so the token is what is kept: one plane
instead of two for each layer. Keys and values are projected from it when candidates attend.
"""

from torch import Tensor

from torchrec_kvshare.attention.shared import Spans, shared_attention
from torchrec_kvshare.history.moments import Moments, doubling_bucket
from torchrec_kvshare.history.transformer import TransformerEncoder, append_rows, no_spans


class TargetOnlyEncoder(TransformerEncoder):
    """See ``TransformerEncoder``; the tokens say nothing of their place, so the oldest may leave.

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
        super().__init__(dim, num_layers, num_heads, dropout)
        self.window = window
        self.num_planes = 1

    def prefill(self, events: Tensor, event_spans: list[tuple[int, int]]) -> Tensor:
        """Events [T, E] as one plane [1, T, H, D]."""
        return events.unflatten(-1, [self.num_heads, -1]).unsqueeze(0)

    def extend(
        self,
        cached: Tensor,
        cached_spans: list[tuple[int, int]],
        events: Tensor,
        event_spans: list[tuple[int, int]],
    ) -> Tensor:
        """New events as one plane; what is cached does not matter to them."""
        return self.prefill(events, event_spans)

    def attend(
        self,
        candidates: Tensor,
        entered: Tensor,
        kv: Tensor,
        moments: Moments,
        spans: Spans,
        body: str,
    ) -> Tensor:
        """Candidates [C, M, E] through all layers, over events [1, R, H, D]: [C, M, E]."""
        rows = candidates
        # A page table holds other users' events too: only this batch's are projected.
        events, event_spans = append_rows(kv[0], spans.events, kv[0], no_spans(spans.events))
        spans = Spans(spans.candidates, event_spans)
        buckets = [doubling_bucket(elapsed, self.num_time_buckets) for elapsed in moments.elapsed]
        for depth, layer in enumerate(self.layers):
            key, value = layer.project_kv(events.flatten(1))
            projected = entered if depth == 0 else layer.project(rows)
            query, own_key, own_value = layer.heads(projected)
            biases = self.biases(depth, buckets, moments, spans)
            attended = shared_attention(query, key, value, own_key, own_value, biases, spans, body)
            rows = layer.finish(rows, attended)
        return rows
