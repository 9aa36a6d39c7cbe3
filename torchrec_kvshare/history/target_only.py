"""Target attention only: events do not see each other, candidates see them at every layer.

K/V of every layer comes straight from the event's token, so the token is what is kept: one plane
instead of two for each layer. Keys and values are projected from it when candidates attend.
"""

import torch
from torch import Tensor

from torchrec_kvshare.attention.shared import Spans
from torchrec_kvshare.history.encoder import append_rows
from torchrec_kvshare.history.moments import Moments
from torchrec_kvshare.history.transformer import TransformerEncoder


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
        super().__init__(dim, num_layers, num_heads, dropout, window)
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
        # A page table holds other users' events too: only this batch's are projected.
        nobody = [(0, 0) for _ in spans.events]
        events, event_spans = append_rows(kv[0], spans.events, kv[0], nobody)
        planes: list[Tensor] = []
        for layer in self.layers:
            key, value = layer.project_kv(events.flatten(1))
            planes.append(key)
            planes.append(value)
        own = Spans(spans.candidates, event_spans)
        biases = self.time_biases(moments, own)
        return self.attend_layers(
            candidates, entered, torch.stack(planes), biases, [own for _ in biases], body
        )
