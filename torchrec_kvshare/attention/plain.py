"""The operators in PyTorch's own, user by user: any dtype and device, gradients, no compiler.

What ``operators.cpp`` does not compute comes here: float64, other devices, and everything on a
machine without the library. Scores of one user are whole here, [H, queries, rows].
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_kvshare.attention.checks import check_candidates, check_history, check_rows_linear

SILU = "silu"
NO_TIME = -1  # of a row that no time bias is added for
ROWS_AT_ONCE = 16  # of a linear layer: their products with the weight are all in memory
HIDDEN = -torch.inf  # a score that weighs nothing; every query has another: its own, at least


class Side(NamedTuple):
    """One user's queries and the rows that they may see.

    Attributes:
        queries: [Q, H, D].
        keys: [R, H, D].
        values: [R, H, D].
        bias: [H, Q, R] or [H, 1, R], added to the scores.
        is_seen: [Q, R] bool.
        own_scores: [H, Q, M], of the candidate's own tokens; M is 0 for queries of rows.
        own_values: [Q, M, H, D].
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor
    is_seen: Tensor
    own_scores: Tensor
    own_values: Tensor


def plain_history_attention(
    queries: Tensor,
    query_offsets: Tensor,
    keys: Tensor,
    values: Tensor,
    key_offsets: Tensor,
    cached_keys: Tensor,
    cached_values: Tensor,
    page_ids: Tensor,
    page_offsets: Tensor,
    cached_offsets: Tensor,
    window: int,
    num_globals: int,
    scoring: str,
) -> tuple[Tensor, Tensor]:
    """See ``operators.history_attention``; the second result is of no use here."""
    check_history(
        *(queries, query_offsets, keys, values, key_offsets, cached_keys, cached_values),
        *(page_ids, page_offsets, cached_offsets, window, num_globals, scoring),
    )
    pages = (cached_keys, cached_values, page_ids, page_offsets.tolist(), cached_offsets.tolist())

    def sides() -> Iterator[Side]:
        for user, (first, last) in enumerate(_spans(query_offsets)):
            new_first, new_last = key_offsets[user].item(), key_offsets[user + 1].item()
            cached = _read_pages(*pages, user)
            key = torch.cat([cached[0], keys[new_first:new_last]])
            value = torch.cat([cached[1], values[new_first:new_last]])
            num_rows, num_queries = key.size(0), last - first
            row = torch.arange(num_rows, device=queries.device)
            place = row[num_rows - num_queries :].unsqueeze(1)
            is_seen = row <= place
            if window > 0:
                is_seen &= row > place - window
            is_seen |= place >= num_rows - num_globals
            yield _alone(queries[first:last], key, value, is_seen)

    return _attend(queries, list(sides()), scoring)


def plain_candidate_attention(
    queries: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    candidate_offsets: Tensor,
    keys: Tensor,
    values: Tensor,
    page_ids: Tensor,
    page_offsets: Tensor,
    row_offsets: Tensor,
    row_times: Tensor,
    candidate_times: Tensor,
    visible_rows: Tensor,
    time_bias: Tensor,
    place_bias: Tensor,
    window: int,
    scoring: str,
) -> tuple[Tensor, Tensor]:
    """See ``operators.candidate_attention``; the second result is of no use here."""
    check_candidates(
        *(queries, own_keys, own_values, candidate_offsets, keys, values, page_ids, page_offsets),
        *(row_offsets, row_times, candidate_times, visible_rows, time_bias, place_bias),
        *(window, scoring),
    )
    num_tokens, scale = queries.size(1), _score_scale(queries)
    pages = (keys, values, page_ids, page_offsets.tolist(), row_offsets.tolist())
    end = int(candidate_offsets[-1])
    own_scores = torch.einsum("cmhd,cnhd->hcmn", queries[:end], own_keys[:end]) * scale

    def sides() -> Iterator[Side]:
        for user, (first, last) in enumerate(_spans(candidate_offsets)):
            key, value = _read_pages(*pages, user)
            row_first, row_last = row_offsets[user].item(), row_offsets[user + 1].item()
            row = torch.arange(key.size(0), device=queries.device)
            end = visible_rows[first:last].unsqueeze(1)
            is_seen = row < end
            if window > 0:
                is_seen &= row >= end - window
            times = row_times[row_first:row_last]
            elapsed = candidate_times[first:last].unsqueeze(1) - times
            bias = time_bias[doubling_bucket(elapsed, time_bias.size(0))]  # [N, R, H]
            bias = bias.masked_fill((times == NO_TIME).unsqueeze(1), 0.0)
            if place_bias.size(0) > 0:
                bias = bias + place_bias[doubling_bucket(end - row, place_bias.size(0))]
            yield Side(
                queries[first:last].flatten(0, 1),
                key,
                value,
                bias.repeat_interleave(num_tokens, 0).permute(2, 0, 1),
                is_seen.repeat_interleave(num_tokens, 0),
                own_scores[:, first:last].flatten(1, 2),
                own_values[first:last].repeat_interleave(num_tokens, 0),
            )

    out, log_sums = _attend(queries.flatten(0, 1), list(sides()), scoring)
    return out.view_as(queries), log_sums.view(queries.shape[:3])


def plain_rows_linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See ``operators.rows_linear``; sums in float64, a few rows at a time."""
    check_rows_linear(rows, weight, bias)
    weight, bias = weight.double().unsqueeze(1), bias.double()
    out = [rows.new_zeros([rows.size(0), 0, bias.size(0)])]
    for few in rows.double().split(max(1, ROWS_AT_ONCE // max(1, rows.size(0))), dim=1):
        out.append(((few.unsqueeze(2) * weight).sum(3) + bias).to(rows.dtype))
    return torch.cat(out, dim=1)


def doubling_bucket(amount: Tensor, num_buckets: int) -> Tensor:
    """Bucket of each number: 0 below one, then one for each doubling; the last has no end.

    Example:
        >>> doubling_bucket(torch.tensor([-5, 0, 1, 2, 3, 4, 100]), 4)
        tensor([0, 0, 1, 2, 2, 3, 3])
    """
    num_ends = min(num_buckets - 1, 63)  # 2**63 is no int64.
    ends = 2 ** torch.arange(num_ends, device=amount.device)
    return torch.bucketize(amount, ends, right=True)


def _score_scale(queries: Tensor) -> float:
    """What the product of a query and a key is multiplied by; heads of no width have none."""
    return max(1, queries.size(-1)) ** -0.5


def _spans(offsets: Tensor) -> list[tuple[int, int]]:
    return list(pairwise(offsets.tolist()))


def _read_pages(
    keys: Tensor,
    values: Tensor,
    page_ids: Tensor,
    page_offsets: list[int],
    row_offsets: list[int],
    user: int,
) -> tuple[Tensor, Tensor]:
    """Keys and values [R, H, D] of one user."""
    ids = page_ids[page_offsets[user] : page_offsets[user + 1]]
    num_rows = row_offsets[user + 1] - row_offsets[user]
    return keys[ids].flatten(0, 1)[:num_rows], values[ids].flatten(0, 1)[:num_rows]


def _alone(queries: Tensor, keys: Tensor, values: Tensor, is_seen: Tensor) -> Side:
    """Queries without a bias and without own tokens."""
    num_queries, num_heads = queries.shape[:2]
    return Side(
        queries,
        keys,
        values,
        queries.new_zeros([num_heads, 1, keys.size(0)]),
        is_seen,
        queries.new_zeros([num_heads, num_queries, 0]),
        queries.unsqueeze(1)[:, :0],
    )


def _attend(queries: Tensor, sides: list[Side], scoring: str) -> tuple[Tensor, Tensor]:
    out = [queries[:0] * 1.0]
    for side in sides:
        query = side.queries.transpose(0, 1) * _score_scale(queries)  # [H, Q, D]
        # Zero times NaN is NaN: of values that are not finite, the scores of their rows tell.
        is_finite = side.values.isfinite()
        values = side.values.masked_fill(~is_finite, 0.0).transpose(0, 1)
        spoilt = torch.where(is_finite.all(2), 0.0, torch.nan).to(queries).t().unsqueeze(1)
        scores = query @ side.keys.permute(1, 2, 0) + side.bias + spoilt
        if scoring == SILU:
            weights = torch.nn.functional.silu(scores).masked_fill(~side.is_seen, 0.0)
            own = torch.nn.functional.silu(side.own_scores)
        else:
            scores = torch.cat([scores.masked_fill(~side.is_seen, HIDDEN), side.own_scores], dim=2)
            weights, own = scores.softmax(2).split([len(side.keys), side.own_scores.size(2)], 2)
        over_rows = (weights @ values).transpose(0, 1)
        out.append(over_rows + torch.einsum("hqm,qmhd->qhd", own, side.own_values))
    num_answered = sum(len(side.queries) for side in sides)
    out.append(torch.zeros_like(queries[num_answered:]))
    return torch.cat(out), queries.new_zeros(queries.shape[:2])
