"""Softmax attention of jagged users: every row is a query over K/V rows, read where they lie.

Users differ in length, so each is attended to alone over a slice of the flat tensors; nothing is
padded and no K/V is copied per candidate. A candidate's own tokens are merged in by log-sum-exp, so
that the history's K/V stays one block. Runs in TorchScript; needs torch alone.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from torchrec_kvshare.attention.flex import flex_over_history


class Spans(NamedTuple):
    """Rows ``(first, last)`` of each user.

    Attributes:
        candidates: B spans that cover the candidates in order.
        events: B spans of K/V rows, wherever they lie; two users may share one.
    """

    candidates: list[tuple[int, int]]
    events: list[tuple[int, int]]


def hidden_bias() -> float:
    """The bias that hides an event.

    Its exponential is zero in every dtype, and unlike minus infinity it is a number, whose SiLU and
    whose gradients are zeros, not NaN.
    """
    return -1e4


def lengths_to_spans(lengths: list[int]) -> list[tuple[int, int]]:
    """Pairs ``(first, last)`` of rows that lie one after the other.

    Example:
        >>> lengths_to_spans([2, 0, 3])
        [(0, 2), (2, 2), (2, 5)]
    """
    spans: list[tuple[int, int]] = []
    first = 0
    for length in lengths:
        spans.append((first, first + length))
        first += length
    return spans


def causal_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_spans: list[tuple[int, int]],
    key_spans: list[tuple[int, int]],
    window: int,
) -> Tensor:
    """Attend from a user's newest events, or all of them, to themselves and to what is earlier.

    Args:
        queries: [Q, H, D] float, of each user's last events.
        keys: [T, H, D], dtype and device of ``queries``.
        values: [T, H, D], likewise.
        query_spans: rows ``(first, last)`` of each user's queries; together they cover Q in order.
        key_spans: rows of each user's keys, which end with those of its queries.
        window: events that a row sees, itself included; 0 for all.

    Returns:
        [Q, H, D].

    Source:
        Scaled dot-product attention, Vaswani et al. 2017, eq. 1 (arXiv:1706.03762).

    Example:
        >>> q = k = torch.zeros(3, 1, 2)
        >>> v = torch.tensor([0.0, 2.0, 4.0]).view(3, 1, 1).expand(3, 1, 2)
        >>> causal_attention(q, k, v, [(0, 3)], [(0, 3)], 0)[:, 0, 0]
        tensor([0., 1., 2.])
        >>> causal_attention(q[2:], k, v, [(0, 1)], [(0, 3)], 2)[:, 0, 0]
        tensor([3.])
    """
    attended = [torch.zeros_like(queries[:0])]
    for user in range(len(query_spans)):
        first, last = query_spans[user]
        key_first, key_last = key_spans[user]
        earlier = (key_last - key_first) - (last - first)
        if earlier == 0 and (window == 0 or window >= last - first):
            if last > first:
                rows = functional.scaled_dot_product_attention(
                    heads_first(queries[first:last]),
                    heads_first(keys[key_first:key_last]),
                    heads_first(values[key_first:key_last]),
                    is_causal=True,
                )  # [1, H, L, D]
                attended.append(rows.squeeze(0).transpose(0, 1))
        else:
            block = 256  # Rows at once: a mask of all rows would be [L, L].
            for start in range(first, last, block):
                stop = min(start + block, last)
                # Positions in the user's history.
                newest = earlier + stop - first
                oldest = 0 if window == 0 else max(0, earlier + start - first - window + 1)
                seen = causal_mask(earlier + start - first, newest, oldest, window, keys.device)
                rows = functional.scaled_dot_product_attention(
                    heads_first(queries[start:stop]),
                    heads_first(keys[key_first + oldest : key_first + newest]),
                    heads_first(values[key_first + oldest : key_first + newest]),
                    attn_mask=seen,
                )
                attended.append(rows.squeeze(0).transpose(0, 1))
    return torch.cat(attended)


def causal_mask(first: int, last: int, oldest: int, window: int, device: torch.device) -> Tensor:
    """Whether rows ``first`` to ``last`` of a history see its rows ``oldest`` to ``last``.

    Returns:
        [last - first, last - oldest] bool.

    Example:
        >>> causal_mask(1, 3, 0, 2, torch.device("cpu")).int()
        tensor([[1, 1, 0],
                [0, 1, 1]], dtype=torch.int32)
    """
    row = torch.arange(first, last, device=device).unsqueeze(1)
    column = torch.arange(oldest, last, device=device)
    seen = column <= row
    if window > 0:
        seen = seen & (column > row - window)
    return seen


def full_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    query_spans: list[tuple[int, int]],
    key_spans: list[tuple[int, int]],
) -> Tensor:
    """Attend from every row to all keys of its user.

    Args:
        queries: [Q, H, D] float.
        keys: [T, H, D], dtype and device of ``queries``.
        values: [T, H, D], likewise.
        query_spans: rows ``(first, last)`` of each user's queries; together they cover Q in order.
        key_spans: rows of each user's keys; a user with queries has some.

    Returns:
        [Q, H, D].
    """
    attended = [torch.zeros_like(queries[:0])]
    for user in range(len(query_spans)):
        first, last = query_spans[user]
        key_first, key_last = key_spans[user]
        if last > first:
            rows = functional.scaled_dot_product_attention(
                heads_first(queries[first:last]),
                heads_first(keys[key_first:key_last]),
                heads_first(values[key_first:key_last]),
            )
            attended.append(rows.squeeze(0).transpose(0, 1))
    return torch.cat(attended)


def shared_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    biases: list[Tensor],
    spans: Spans,
    body: str,
) -> Tensor:
    """Attend from every candidate to its own M tokens and to its user's one history.

    Args:
        queries: [C, M, H, D] float; candidates ``spans.candidates[b]`` belong to user b.
        keys: [R, H, D]; rows ``spans.events[b]`` are user b's, wherever they lie in R.
        values: [R, H, D], laid out as ``keys``.
        own_keys: [C, M, H, D], of the candidates' own tokens, which see each other.
        own_values: [C, M, H, D], likewise.
        biases: per user [H, 1, L] or [H, N, L], added to the scores; ``hidden_bias()`` hides one.
        spans: whose rows are whose.
        body: how it is computed, see ``attention/bodies.py``; only ``dense`` has gradients.

    Returns:
        [C, M, H, D]. A candidate that sees no event attends to its own tokens alone: no NaN.

    Source:
        Vaswani et al. 2017, eq. 1; log-sum-exp merge as in FlashAttention (arXiv:2205.14135), sec.
        3.1. Meaning: ``attention/reference.py``.

    Example:
        >>> one, seen = torch.ones(1, 1, 1, 2), torch.full((3, 1, 2), 5.0)
        >>> blind, sighted = Spans([(0, 1)], [(0, 0)]), Spans([(0, 1)], [(0, 3)])
        >>> shared_attention(one, seen, seen, one, one, [torch.zeros(1, 1, 0)], blind, "flash")
        tensor([[[[1., 1.]]]])
        >>> bias = torch.full((1, 1, 3), 100.0)
        >>> shared_attention(one, seen, seen, one, one, [bias], sighted, "flash")
        tensor([[[[5., 5.]]]])
    """
    # TorchScript sees no globals: these are the names of attention/bodies.py.
    if body == "dense":
        return _dense(queries, keys, values, own_keys, own_values, biases, spans)
    if needs_gradients([queries, keys, values, own_keys, own_values] + biases):
        raise RuntimeError(f"body {body} has no gradients; body dense has")
    if body == "flash":
        over_history, log_sum_exp = _flash_over_history(queries, keys, values, biases, spans)
    elif body == "flex" and not torch.jit.is_scripting():  # type: ignore[attr-defined]
        over_history, log_sum_exp = flex_over_history(
            queries, keys, values, biases, spans.candidates, spans.events
        )
    else:
        raise ValueError(f"body is {body}; flash, dense and, outside TorchScript, flex exist")
    scale = 1.0 / math.sqrt(queries.size(3))
    own_scores = own_token_scores(queries, own_keys).to(log_sum_exp.dtype) * scale  # [C, M, M, H]
    own_highest = own_scores.amax(2)
    highest = torch.maximum(own_highest, log_sum_exp)  # [C, M, H]
    # In exponentials alone: a vectorised sigmoid gives other bits in the last rows of a tensor.
    own_weights = torch.exp(own_scores - own_highest.unsqueeze(2))
    own_total = own_weights.sum(2)
    own_weight = own_total * torch.exp(own_highest - highest)
    own_share = own_weight / (torch.exp(log_sum_exp - highest) + own_weight)
    own = own_values
    if own_values.size(1) > 1:
        shares = own_weights / own_total.unsqueeze(2)
        own = weigh_own_tokens(shares.to(own_values.dtype), own_values)
    return torch.lerp(over_history, own, own_share.to(own.dtype).unsqueeze(-1))


def needs_gradients(tensors: list[Tensor]) -> bool:
    """Whether autograd would follow what is computed from any of the tensors."""
    for tensor in tensors:
        if tensor.requires_grad:
            return torch.is_grad_enabled()
    return False


def own_token_scores(queries: Tensor, own_keys: Tensor) -> Tensor:
    """Products of every token of a candidate with every token of it: [C, M, M, H]."""
    return (queries.unsqueeze(2) * own_keys.unsqueeze(1)).sum(-1)


def weigh_own_tokens(weights: Tensor, own_values: Tensor) -> Tensor:
    """Sum of a candidate's own values [C, M, H, D] under weights [C, M, M, H]: [C, M, H, D]."""
    return (weights.unsqueeze(-1) * own_values.unsqueeze(1)).sum(2)


def heads_first(rows: Tensor) -> Tensor:
    """Rows [L, H, D] as [1, H, L, D]; nothing is copied."""
    return rows.transpose(0, 1).unsqueeze(0)


def bias_of_tokens(bias: Tensor, num_tokens: int) -> Tensor:
    """A bias [H, 1 or N, L] of candidates as that of their tokens, [H, 1 or N x M, L]."""
    if bias.size(1) == 1 or num_tokens == 1:
        return bias
    return bias.repeat_interleave(num_tokens, dim=1)


def _flash_over_history(
    queries: Tensor, keys: Tensor, values: Tensor, biases: list[Tensor], spans: Spans
) -> tuple[Tensor, Tensor]:
    """What candidates see of histories, [C, M, H, D], and its log-sum-exp, [C, M, H]."""
    if queries.device.type != "cpu":
        raise RuntimeError(f"body flash runs on cpu; the queries are on {queries.device.type}")
    num_tokens = queries.size(1)
    over_history = [torch.zeros_like(queries[:0])]
    # Of float64 the kernel gives it in float64; else in float32.
    exact = torch.float64 if queries.dtype == torch.float64 else torch.float32
    log_sum_exp = [torch.zeros([0, num_tokens, queries.size(2)], dtype=exact)]
    for user in range(len(spans.candidates)):
        first, last = spans.candidates[user]
        event_first, event_last = spans.events[user]
        # The kernel must not see an empty side: it divides by the length and kills the process.
        if last > first and event_last > event_first:
            bias = bias_of_tokens(biases[user], num_tokens).unsqueeze(0)
            rows, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                heads_first(queries[first:last].flatten(0, 1)),
                heads_first(keys[event_first:event_last]),
                heads_first(values[event_first:event_last]),
                0.0,
                False,
                attn_mask=bias.to(queries.dtype),
                scale=1.0 / math.sqrt(queries.size(3)),
            )  # [1, H, N x M, D], [1, H, N x M]
            over_history.append(rows.squeeze(0).transpose(0, 1).unflatten(0, [-1, num_tokens]))
            log_sum_exp.append(lse.squeeze(0).transpose(0, 1).unflatten(0, [-1, num_tokens]))
        else:
            blind = queries[first:last]
            over_history.append(torch.zeros_like(blind))
            log_sum_exp.append(torch.full_like(blind[..., 0], -math.inf, dtype=exact))
    return torch.cat(over_history), torch.cat(log_sum_exp)


def _dense(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    biases: list[Tensor],
    spans: Spans,
) -> Tensor:
    """The whole of ``shared_attention`` in operators that have gradients, on any device."""
    num_tokens = queries.size(1)
    scale = 1.0 / math.sqrt(queries.size(3))
    own_scores = own_token_scores(queries, own_keys) * scale
    attended = [torch.zeros_like(queries[:0])]
    for user in range(len(spans.candidates)):
        first, last = spans.candidates[user]
        event_first, event_last = spans.events[user]
        query = queries[first:last].flatten(0, 1).transpose(0, 1) * scale  # [H, N x M, D]
        key = keys[event_first:event_last].permute(1, 2, 0)  # [H, D, L]
        bias = bias_of_tokens(biases[user], num_tokens).to(query.dtype)
        scores = torch.baddbmm(bias, query, key)  # [H, N x M, L]
        own = own_scores[first:last].flatten(0, 1).permute(2, 0, 1)  # [H, N x M, M]
        weights = torch.softmax(torch.cat([scores, own], dim=-1), dim=-1)
        num_events = event_last - event_first
        history = torch.bmm(
            weights[:, :, :num_events], values[event_first:event_last].transpose(0, 1)
        )  # [H, N x M, D]
        own_weights = weights[:, :, num_events:].permute(1, 2, 0).unflatten(0, [-1, num_tokens])
        own_part = weigh_own_tokens(own_weights, own_values[first:last])
        attended.append(history.transpose(0, 1).unflatten(0, [-1, num_tokens]) + own_part)
    return torch.cat(attended)
