"""Causal history: an event sees itself and earlier events, all of them or the last ``window``.

Later events never change the K/V of an event, so new events extend cached K/V. With a sliding
window nothing depends on where the history starts either: old rows may be dropped.
"""

import torch
from torch import Tensor

from torchrec_kvshare.attention.operators import history_attention
from torchrec_kvshare.history.pages import KVPages, layer_rows
from torchrec_kvshare.history.transformer import TransformerEncoder


class CausalEncoder(TransformerEncoder):
    """See ``TransformerEncoder``.

    Source:
        LONGER (arXiv:2505.04421), causal and without merging.
    """

    def extend(self, cached: KVPages, events: Tensor, event_offsets: Tensor) -> Tensor:
        """Return K/V [planes, T, H, D] of new events [T, E] that follow cached ones."""
        rows = events
        planes: list[Tensor] = []
        for depth, layer in enumerate(self.layers):
            # No layer follows the last one, so its events need keys and values only.
            if depth + 1 == self.num_layers:
                key, value = layer.project_kv(rows)
            else:
                query, key, value = layer.heads(layer.project(rows))
                attended = history_attention(
                    query,
                    event_offsets,
                    key,
                    value,
                    event_offsets,
                    layer_rows(cached, depth),
                    self.window,
                    0,
                    "softmax",
                )
                rows = layer.finish(rows, attended)
            planes.append(key)
            planes.append(value)
        return torch.stack(planes)
