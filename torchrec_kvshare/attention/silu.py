"""SiLU attention of HSTU: weights are not normalised, so what is attended to is a plain sum.

The same spans, biases and own tokens as in ``attention/shared.py``. There is no kernel for it on a
CPU; scores are computed in blocks that stay in the cache of a core. Every operator has gradients
and runs on every device, and gives a row the same bits wherever it stands in a tensor. Runs in
TorchScript; needs torch alone.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional

from torchrec_kvshare.attention.shared import (
    Spans,
    bias_of_tokens,
    causal_mask,
    own_token_scores,
    weigh_own_tokens,
)


def silu_causal_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_spans: list[tuple[int, int]],
    key_spans: list[tuple[int, int]],
    window: int,
) -> Tensor:
    """Sum over a user's earlier events and the event itself; arguments as ``causal_attention``'s.

    Returns:
        [Q, H, D].

    Source:
        HSTU, Zhai et al. 2024, eq. 2 (arXiv:2402.17152), without the biases.
    """
    scale = 0.5 / math.sqrt(queries.size(2))
    attended = [torch.zeros_like(queries[:0])]
    for user in range(len(query_spans)):
        first, last = query_spans[user]
        key_first, key_last = key_spans[user]
        num_keys = key_last - key_first
        earlier = num_keys - (last - first)
        block = _block_rows(queries.size(1), num_keys)
        for start in range(first, last, block):
            stop = min(start + block, last)
            newest = earlier + stop - first
            oldest = 0 if window == 0 else max(0, earlier + start - first - window + 1)
            seen = causal_mask(earlier + start - first, newest, oldest, window, keys.device)
            key = keys[key_first + oldest : key_first + newest].permute(1, 2, 0)  # [H, D, L]
            value = values[key_first + oldest : key_first + newest].transpose(0, 1)
            query = _two_rows(queries[start:stop].transpose(0, 1) * scale)
            weights = silu_of_twice(torch.bmm(query, key)).masked_fill(~seen, 0.0)
            attended.append(torch.bmm(weights, value).transpose(0, 1)[: stop - start])
    return torch.cat(attended)


def silu_shared_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    biases: list[Tensor],
    spans: Spans,
) -> Tensor:
    """Sum over a candidate's own tokens and its user's history; see ``shared_attention``.

    Returns:
        [C, M, H, D]; a candidate that sees no event sums over its own tokens.

    Source:
        HSTU, Zhai et al. 2024, eq. 2 (arXiv:2402.17152). Meaning: ``attention/reference.py``.

    Example:
        >>> one, seen = torch.ones(1, 1, 1, 1), torch.zeros(3, 1, 1)
        >>> hidden = torch.full((1, 1, 3), -1e4)
        >>> spans = Spans([(0, 1)], [(0, 3)])
        >>> bool(silu_shared_attention(one, seen, seen, one, one, [hidden], spans) == one.sigmoid())
        True
    """
    num_tokens = queries.size(1)
    scale = 0.5 / math.sqrt(queries.size(3))
    attended = [torch.zeros_like(queries[:0]).flatten(0, 1)]
    for user in range(len(spans.candidates)):
        first, last = spans.candidates[user]
        event_first, event_last = spans.events[user]
        query = queries[first:last].flatten(0, 1).transpose(0, 1) * scale  # [H, N x M, D]
        key = keys[event_first:event_last].permute(1, 2, 0)
        value = values[event_first:event_last].transpose(0, 1)
        bias = bias_of_tokens(biases[user], num_tokens) * 0.5
        block = _block_rows(queries.size(2), event_last - event_first)
        fewest = _fewest_rows(event_last - event_first, queries.size(3))
        for start in range(0, query.size(1), block):
            stop = min(start + block, query.size(1))
            block_bias = bias if bias.size(1) == 1 else _padded(bias[:, start:stop], fewest)
            block_query = _padded(query[:, start:stop], fewest)
            scores = torch.baddbmm(block_bias.to(query.dtype), block_query, key)
            rows = torch.bmm(silu_of_twice(scores), value).transpose(0, 1)
            attended.append(rows[: stop - start])
    own_weights = silu_of_twice(own_token_scores(queries, own_keys) * scale)
    return torch.cat(attended).view_as(queries) + weigh_own_tokens(own_weights, own_values)


def silu_of_twice(halves: Tensor) -> Tensor:
    """SiLU of twice the values: ``x * sigmoid(x)`` at ``x = 2 h`` is ``h * (1 + tanh(h))``.

    Not ``torch.sigmoid`` or ``silu``: their vectorised forms give other bits than the plain ones,
    which compute the last few values of a tensor.
    """
    return (torch.tanh(halves) + 1.0) * halves


def _two_rows(query: Tensor) -> Tensor:
    """A single row [H, 1, D] twice: for one row MKL has another kernel, with other bits."""
    return query if query.size(1) != 1 else query.expand(-1, 2, -1)


def _padded(rows: Tensor, fewest: int) -> Tensor:
    """Rows [H, Q, D] and zeros behind them, if they are too few."""
    missing = fewest - rows.size(1)
    return rows if missing <= 0 else functional.pad(rows, [0, 0, 0, missing])


def _fewest_rows(num_events: int, head_dim: int) -> int:
    """Rows from which on MKL computes all of them alike.

    It has another kernel for one row, and torch one of its own below 400 multiplications: both give
    other bits, so that a score would depend on how many candidates there are.
    """
    each = max(1, num_events * head_dim)
    return max(2, (399 + each) // each)


def _block_rows(num_heads: int, num_events: int) -> int:
    """Rows whose scores over so many events are 1 MiB of float32."""
    return max(1, (1 << 18) // max(1, num_heads * num_events))
