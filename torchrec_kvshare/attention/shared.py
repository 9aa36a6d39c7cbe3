"""Attention of jagged users: every row is a query over K/V rows that are read where they lie.

Users differ in length, so each is attended to alone over a slice of the flat tensors; nothing is
padded and no K/V is copied per candidate. A candidate also attends to its own key; that one term is
merged in by log-sum-exp, so that the history's K/V stays one block. Runs in TorchScript; needs
torch alone.
"""

import math

import torch
from torch import Tensor


def causal_attention(
    queries: Tensor, keys: Tensor, values: Tensor, event_spans: list[tuple[int, int]]
) -> Tensor:
    """Attend from every event to itself and the earlier events of its user.

    Args:
        queries: [T, H, D] float.
        keys: [T, H, D], dtype and device of ``queries``.
        values: [T, H, D], likewise.
        event_spans: rows ``first:last`` of each user's events; together they cover T in order.

    Returns:
        [T, H, D].

    Source:
        Scaled dot-product attention, Vaswani et al. 2017, eq. 1 (arXiv:1706.03762).

    Example:
        >>> q = k = torch.zeros(3, 1, 2)
        >>> v = torch.tensor([0.0, 2.0, 4.0]).view(3, 1, 1).expand(3, 1, 2)
        >>> causal_attention(q, k, v, [(0, 3)])[:, 0, 0]
        tensor([0., 1., 2.])
    """
    attended: list[Tensor] = []
    for first, last in event_spans:
        if last > first:
            rows = torch.nn.functional.scaled_dot_product_attention(
                queries[first:last].transpose(0, 1).unsqueeze(0),
                keys[first:last].transpose(0, 1).unsqueeze(0),
                values[first:last].transpose(0, 1).unsqueeze(0),
                is_causal=True,
            )  # [1, H, L, D]
            attended.append(rows.squeeze(0).transpose(0, 1))
    if len(attended) == 0:
        return torch.zeros_like(queries)
    return torch.cat(attended)


def shared_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    event_bias: Tensor,
    candidate_spans: list[tuple[int, int]],
    event_spans: list[tuple[int, int]],
) -> Tensor:
    """Attend from every candidate to itself and to all events of its user; inference only.

    Args:
        queries: [C, H, D] float; rows ``candidate_spans[b]`` belong to user b.
        keys: [R, H, D]; rows ``event_spans[b]`` are user b's events, wherever they lie in R.
        values: [R, H, D], laid out as ``keys``.
        own_keys: [C, H, D], the candidates' own keys.
        own_values: [C, H, D], likewise.
        event_bias: [H, T], added to the scores of each event, users one after the other.
        candidate_spans: B pairs ``(first, last)``; together they cover C in order.
        event_spans: B pairs ``(first, last)``.

    Returns:
        [C, H, D]. A candidate whose user has no history gets its own value, not NaN.

    Source:
        Vaswani et al. 2017, eq. 1; log-sum-exp merge as in FlashAttention (arXiv:2205.14135), sec.
        3.1.
        Meaning: ``attention/reference.py``.

    Example:
        >>> one = torch.ones(1, 1, 2)
        >>> seen = torch.full((3, 1, 2), 5.0)
        >>> shared_attention(one, one, one, one, one, torch.zeros(1, 0), [(0, 1)], [(0, 0)])
        tensor([[[1., 1.]]])
        >>> shared_attention(one, seen, seen, one, one, torch.zeros(1, 3), [(0, 1)], [(0, 3)]).shape
        torch.Size([1, 1, 2])
    """
    scale = 1.0 / math.sqrt(queries.size(2))
    over_history = torch.zeros_like(queries)
    log_sum_exp = torch.full_like(queries[:, :, 0], -math.inf)  # [C, H]
    bias_first = 0
    for user in range(len(candidate_spans)):
        first, last = candidate_spans[user]
        event_first, event_last = event_spans[user]
        bias_last = bias_first + event_last - event_first
        # The kernel must not see an empty side: it divides by the length and kills the process.
        if last > first and event_last > event_first:
            rows, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries[first:last].transpose(0, 1).unsqueeze(0),
                keys[event_first:event_last].transpose(0, 1).unsqueeze(0),
                values[event_first:event_last].transpose(0, 1).unsqueeze(0),
                0.0,
                False,
                attn_mask=event_bias[:, bias_first:bias_last].unsqueeze(0).unsqueeze(2),
                scale=scale,
            )  # [1, H, N, D], [1, H, N]
            over_history[first:last] = rows.squeeze(0).transpose(0, 1)
            log_sum_exp[first:last] = lse.squeeze(0).transpose(0, 1)
        bias_first = bias_last
    own_score = (queries * own_keys).sum(-1) * scale  # [C, H]
    own_weight = torch.sigmoid(own_score - log_sum_exp).unsqueeze(-1)
    return torch.lerp(over_history, own_values, own_weight)


def prefix_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    biases: list[Tensor],
    candidate_spans: list[tuple[int, int]],
    event_spans: list[tuple[int, int]],
) -> Tensor:
    """Attend from every candidate to itself and to those events that its bias lets it see.

    The differentiable form, for training and for candidates that see different prefixes of one
    history.

    Args:
        queries: [C, H, D] float; rows ``candidate_spans[b]`` belong to user b.
        keys: [R, H, D]; rows ``event_spans[b]`` are user b's events.
        values: [R, H, D], laid out as ``keys``.
        own_keys: [C, H, D], the candidates' own keys.
        own_values: [C, H, D], likewise.
        biases: per user [H, N, L], added to the scores; ``-inf`` hides an event.
        candidate_spans: B pairs ``(first, last)``; together they cover C in order.
        event_spans: B pairs ``(first, last)``.

    Returns:
        [C, H, D]. A candidate that sees no event gets its own value, not NaN.

    Source:
        Vaswani et al. 2017, eq. 1. Meaning: ``attention/reference.py``.
    """
    scale = 1.0 / math.sqrt(queries.size(2))
    attended: list[Tensor] = []
    for user in range(len(candidate_spans)):
        first, last = candidate_spans[user]
        event_first, event_last = event_spans[user]
        query = queries[first:last].transpose(0, 1) * scale  # [H, N, D]
        key = keys[event_first:event_last].permute(1, 2, 0)  # [H, D, L]
        scores = torch.baddbmm(biases[user], query, key)  # [H, N, L]
        own_score = (query * own_keys[first:last].transpose(0, 1)).sum(-1, keepdim=True)
        weights = torch.softmax(torch.cat([scores, own_score], dim=-1), dim=-1)  # [H, N, L + 1]
        num_events = event_last - event_first
        history = torch.bmm(
            weights[:, :, :num_events], values[event_first:event_last].transpose(0, 1)
        )
        own = weights[:, :, num_events:] * own_values[first:last].transpose(0, 1)
        attended.append((history + own).transpose(0, 1))
    if len(attended) == 0:
        return torch.zeros_like(queries)
    return torch.cat(attended)
