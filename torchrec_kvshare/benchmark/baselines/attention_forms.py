"""Other ways to score N candidates over one history with the weights of a causal tower.

They are what one would write, or find in libraries, without a kernel for a shared history: K/V
copied for every candidate, or one long sequence with a mask. Each starts from event and candidate
tokens, as prefill and attend do, and gives the same vectors. Each is as fast as it can be: masks
are made beforehand, and the last layer computes the candidates' queries only.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from torchrec_kvshare.attention.plain import doubling_bucket
from torchrec_kvshare.history.encoder import NUM_TIME_BUCKETS
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.history.transformer import TransformerLayer

REPEATED_AT_A_TIME = 64  # candidates, and copies of the K/V in memory at once

# Queries [1, H, Q, D] of the last Q rows and K/V [1, H, R, D] of all rows; the layer.
Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def repeat_kv(tower: HistoryTower, events: Tensor, candidates: Tensor, elapsed: Tensor) -> Tensor:
    """Prefill once, copy the K/V for every candidate, and use SDPA over the copies: [N, E].

    Args:
        tower: causal, one token per candidate, in eval mode.
        events: [L, E] event tokens.
        candidates: [N, E] candidate tokens.
        elapsed: [L] int64 seconds from each event to the request.
    """
    kv = tower.prefill(events, torch.tensor([0, events.size(0)]))
    biases = event_biases(tower, elapsed)
    parts = candidates.split(REPEATED_AT_A_TIME)
    return torch.cat([_repeat_kv(tower, kv, biases, part) for part in parts])


def _repeat_kv(tower: HistoryTower, kv: Tensor, biases: list[Tensor], rows: Tensor) -> Tensor:
    rows = rows + tower.candidate_token
    for depth, layer in enumerate(transformer_layers(tower)):
        query, *own = layer.heads(layer.project(rows))
        key, value = (
            torch.cat([kv[2 * depth + which].expand(len(rows), -1, -1, -1), one.unsqueeze(1)], 1)
            for which, one in enumerate(own)
        )  # [N, L + 1, H, D]
        attended = functional.scaled_dot_product_attention(
            query.unsqueeze(2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=functional.pad(biases[depth], (0, 1))[None, :, None],
        )
        rows = layer.finish(rows, attended.squeeze(2))
    return tower.head(tower.norm(rows))


def one_sequence(
    tower: HistoryTower, events: Tensor, candidates: Tensor, attention: Attention
) -> Tensor:
    """Append the candidates to the history and send one sequence through all layers: [N, E].

    Args:
        tower: causal, one token per candidate, in eval mode.
        events: [L, E] event tokens.
        candidates: [N, E] candidate tokens.
        attention: attends with a mask that hides the candidates from each other.
    """
    num_events, layers = events.size(0), transformer_layers(tower)
    rows = torch.cat([events, candidates + tower.candidate_token])
    for depth, layer in enumerate(layers):
        query, key, value = (
            part.transpose(0, 1).unsqueeze(0) for part in layer.heads(layer.project(rows))
        )
        first = num_events if depth + 1 == len(layers) else 0
        attended = attention(query[:, :, first:], key, value, depth)
        rows = layer.finish(rows[first:], attended.squeeze(0).transpose(0, 1))
    return tower.head(tower.norm(rows))


def sdpa_with_mask(tower: HistoryTower, elapsed: Tensor, num_candidates: int) -> Attention:
    """Return SDPA with a mask of the whole sequence, made once, that includes the time bias."""
    num_events = elapsed.numel()
    size = num_events + num_candidates
    row = torch.arange(size).unsqueeze(1)
    column = torch.arange(size)
    seen = (column <= row) & ((column < num_events) | (column == row))
    masks = []
    for bias in event_biases(tower, elapsed):
        mask = torch.zeros(bias.size(0), size, size)
        mask[:, num_events:, :num_events] = bias.unsqueeze(1)
        masks.append(mask.masked_fill(~seen, -torch.inf).unsqueeze(0))

    def attend(query: Tensor, key: Tensor, value: Tensor, depth: int) -> Tensor:
        mask = masks[depth][:, :, size - query.size(2) :]
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    return attend


def compiled_flex(tower: HistoryTower, elapsed: Tensor, num_candidates: int) -> Attention:
    """Return compiled FlexAttention: the same mask as a function, block by block."""
    num_events = elapsed.numel()
    size = num_events + num_candidates
    biases = [functional.pad(b, (0, num_candidates)) for b in event_biases(tower, elapsed)]
    # Inductor's C++ does not compile with dynamic sizes, and after eight cases torch recompiles no
    # more.
    torch.compiler.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    calls: dict[tuple[int, int], Callable[..., Any]] = {}

    def attend(query: Tensor, key: Tensor, value: Tensor, depth: int) -> Tensor:
        case = (query.size(2), depth)
        if case not in calls:
            calls[case] = _flex_call(
                compiled, biases[depth], num_events=num_events, size=size, num_queries=query.size(2)
            )
        return calls[case](query, key, value)

    return attend


def _flex_call(
    compiled: Callable[..., Any], bias: Tensor, num_events: int, size: int, num_queries: int
) -> Callable[..., Any]:
    first = size - num_queries

    def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        row = query + first
        return (key <= row) & ((key < num_events) | (key == row))

    def biased(score: Tensor, _batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.where(query + first >= num_events, score + bias[head, key], score)

    mask = create_block_mask(sees, B=None, H=None, Q_LEN=num_queries, KV_LEN=size, device="cpu")
    return partial(compiled, score_mod=biased, block_mask=mask)


def event_biases(tower: HistoryTower, elapsed: Tensor) -> list[Tensor]:
    """Return the bias [H, L] of each layer, from the time since each event."""
    bucket = doubling_bucket(elapsed, NUM_TIME_BUCKETS)
    return [bias[bucket].t().contiguous() for bias in tower.encoder.time_bias]


def transformer_layers(tower: HistoryTower) -> list[TransformerLayer]:
    """Return the layers of a causal tower."""
    return [layer for layer in tower.encoder.layers if isinstance(layer, TransformerLayer)]
