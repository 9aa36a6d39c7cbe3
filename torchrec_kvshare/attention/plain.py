"""The operators in PyTorch's own: any dtype and device, gradients, no compiler.

What ``operators.cpp`` does not compute comes here: float64, GPUs, and everything on a machine
without the library. On a CPU users take turns, each over its own rows. Elsewhere offsets are not
read back: blocks of queries take turns, each over the rows of all users with those of others
hidden, so that the work grows with the users of a batch.
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
QUERIES_AT_ONCE = 512  # whose scores over all rows of a batch are in memory, on a GPU
HIDDEN = -torch.inf  # a score that weighs nothing; every query has another: its own, at least


class Rows(NamedTuple):
    """Rows one after the other, and whose they are.

    Attributes:
        user: [R] int64, B of a row that is no user's.
        place: [R] int64, among its user's rows.
        is_real: [R] bool, whether it is a user's.
    """

    user: Tensor
    place: Tensor
    is_real: Tensor

    def part(self, span: slice) -> "Rows":
        return Rows(*(tensor[span] for tensor in self))


class Turn(NamedTuple):
    """What is computed at once.

    Attributes:
        queries: of all queries.
        pages: of all page ids.
        new: of all rows that lie in no pages.
    """

    queries: slice
    pages: slice
    new: slice


class Side(NamedTuple):
    """Some queries and the rows that they may see.

    Attributes:
        queries: [Q, H, D].
        is_answered: [Q] bool, false for queries that are no user's.
        keys: [R, H, D].
        values: [R, H, D].
        bias: [H, Q, R] or [H, 1, R], added to the scores.
        is_seen: [Q, R] bool.
        own_scores: [H, Q, M], of the candidate's own tokens; M is 0 for queries of rows.
        own_values: [Q, M, H, D].
    """

    queries: Tensor
    is_answered: Tensor
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
    num_cached, num_new, num_queries = map(_lengths, (cached_offsets, key_offsets, query_offsets))
    num_rows = num_cached + num_new
    page_ids, in_pages = _page_rows(page_offsets, page_ids, cached_keys, num_cached)
    new = _rows(key_offsets, keys, num_cached)
    asking = _rows(query_offsets, queries, num_rows - num_queries)
    page_size = cached_keys.size(1)
    cached_keys, cached_values = _in_order(page_ids, in_pages, cached_keys, cached_values)
    keys, values = (_zeros_unless(new.is_real, rows) for rows in (keys, values))

    def sides() -> Iterator[Side]:
        for turn in _turns(query_offsets, page_offsets, key_offsets, queries.size(0)):
            span = _rows_of(turn.pages, page_size)
            cached, fresh = in_pages.part(span), new.part(turn.new)
            user, place, is_real = (torch.cat(pair) for pair in zip(cached, fresh, strict=True))
            asks = asking.part(turn.queries)
            at = asks.place.unsqueeze(1)
            is_seen = place <= at
            if window > 0:
                is_seen &= place > at - window
            is_seen |= at >= num_rows.index_select(0, asks.user).unsqueeze(1) - num_globals
            is_seen &= is_real & (user == asks.user.unsqueeze(1))
            yield _without_own(
                _zeros_unless(asks.is_real, queries[turn.queries]),
                asks.is_real,
                torch.cat([cached_keys[span], keys[turn.new]]),
                torch.cat([cached_values[span], values[turn.new]]),
                is_seen,
            )

    return _attend(queries, sides(), scoring)


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
    num_tokens, scale, page_size = queries.size(1), _score_scale(queries), keys.size(1)
    page_ids, in_pages = _page_rows(page_offsets, page_ids, keys, _lengths(row_offsets))
    keys, values = _in_order(page_ids, in_pages, keys, values)
    asking = _rows(candidate_offsets, queries, torch.zeros_like(candidate_offsets))
    # Behind the last time stands that of rows that are no user's.
    times = torch.cat([row_times, row_times.new_full([1], NO_TIME)])
    first_row = row_offsets.index_select(0, in_pages.user)
    time_of_row = times.index_select(
        0, torch.where(in_pages.is_real, first_row + in_pages.place, row_times.size(0))
    )

    def sides() -> Iterator[Side]:
        no_new = torch.zeros_like(candidate_offsets)
        for turn in _turns(candidate_offsets, page_offsets, no_new, queries.size(0)):
            asks, span = asking.part(turn.queries), _rows_of(turn.pages, page_size)
            user, place, is_real = in_pages.part(span)
            end = visible_rows[turn.queries].unsqueeze(1)
            is_seen = is_real & (user == asks.user.unsqueeze(1)) & (place < end)
            if window > 0:
                is_seen &= place >= end - window
            elapsed = candidate_times[turn.queries].unsqueeze(1) - time_of_row[span]
            bias = time_bias[doubling_bucket(elapsed, time_bias.size(0))]  # [N, R, H]
            bias = bias.masked_fill((time_of_row[span] == NO_TIME).unsqueeze(1), 0.0)
            if place_bias.size(0) > 0:
                bias = bias + place_bias[doubling_bucket(end - place, place_bias.size(0))]
            query, own_key, own = (
                _zeros_unless(asks.is_real, rows[turn.queries])
                for rows in (queries, own_keys, own_values)
            )
            own_scores = torch.einsum("cmhd,cnhd->hcmn", query, own_key) * scale
            yield Side(
                query.flatten(0, 1),
                asks.is_real.repeat_interleave(num_tokens, 0),
                keys[span],
                values[span],
                bias.repeat_interleave(num_tokens, 0).permute(2, 0, 1),
                is_seen.repeat_interleave(num_tokens, 0),
                own_scores.flatten(1, 2),
                own.repeat_interleave(num_tokens, 0),
            )

    out, log_sums = _attend(queries.flatten(0, 1), sides(), scoring)
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


def _lengths(offsets: Tensor) -> Tensor:
    """[B + 1]: the rows of each user, and those of no user: none."""
    return torch.cat([offsets.diff(), offsets.new_zeros([1])])


def _rows(offsets: Tensor, rows: Tensor, first_place: Tensor) -> Rows:
    """Whose flat rows are.

    Args:
        offsets: [B + 1].
        rows: as many as there are, those behind the last user's too.
        first_place: [B + 1], of each user's first row.
    """
    index = torch.arange(rows.size(0), device=offsets.device)
    user = torch.searchsorted(offsets[1:], index, right=True)
    return Rows(
        user,
        index - offsets.index_select(0, user) + first_place.index_select(0, user),
        user < offsets.numel() - 1,
    )


def _page_rows(
    page_offsets: Tensor, page_ids: Tensor, pages: Tensor, num_rows: Tensor
) -> tuple[Tensor, Rows]:
    """Page ids that are all of pages, and whose rows these are, in their order."""
    page_size = pages.size(1)
    page_ids = page_ids if pages.size(0) else page_ids[:0]
    of_page = _rows(page_offsets, page_ids, torch.zeros_like(page_offsets))
    page_ids = torch.where(of_page.is_real, page_ids, 0)
    slot = torch.arange(page_size, device=page_ids.device)
    user = of_page.user.repeat_interleave(page_size)
    place = (of_page.place.unsqueeze(1) * page_size + slot).flatten()
    return page_ids, Rows(user, place, place < num_rows.index_select(0, user))


def _in_order(page_ids: Tensor, rows: Rows, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [R, H, D] of pages in the order of the page ids."""
    flat = (pages.index_select(0, page_ids).flatten(0, 1) for pages in (keys, values))
    key, value = (_zeros_unless(rows.is_real, one) for one in flat)
    return key, value


def _turns(
    query_offsets: Tensor, page_offsets: Tensor, key_offsets: Tensor, num_queries: int
) -> Iterator[Turn]:
    """Users, where their offsets can be read; else blocks of queries over everything."""
    if query_offsets.is_cpu:
        spans = map(_spans, (query_offsets, page_offsets, key_offsets))
        return map(Turn, *spans)
    return _blocks(num_queries)


def _blocks(num_queries: int) -> Iterator[Turn]:
    for first in range(0, num_queries, QUERIES_AT_ONCE):
        queries = slice(first, min(first + QUERIES_AT_ONCE, num_queries))
        yield Turn(queries, slice(None), slice(None))


def _spans(offsets: Tensor) -> list[slice]:
    return [slice(first, last) for first, last in pairwise(offsets.tolist())]


def _rows_of(pages: slice, page_size: int) -> slice:
    if pages == slice(None):
        return pages
    return slice(pages.start * page_size, pages.stop * page_size)


def _zeros_unless(is_real: Tensor, rows: Tensor) -> Tensor:
    """Rows [R, ...], zeros for those that are no user's, whatever stands there."""
    return torch.where(is_real.view(-1, *[1] * (rows.dim() - 1)), rows, 0.0)


def _without_own(
    queries: Tensor, is_answered: Tensor, keys: Tensor, values: Tensor, is_seen: Tensor
) -> Side:
    """Queries without a bias and without own tokens."""
    num_queries, num_heads = queries.shape[:2]
    return Side(
        queries,
        is_answered,
        keys,
        values,
        queries.new_zeros([num_heads, 1, keys.size(0)]),
        is_seen,
        queries.new_zeros([num_heads, num_queries, 0]),
        queries.unsqueeze(1)[:, :0],
    )


def _attend(queries: Tensor, sides: Iterator[Side], scoring: str) -> tuple[Tensor, Tensor]:
    out, num_answered = [queries[:0] * 1.0], 0
    for side in sides:
        query = side.queries.transpose(0, 1) * _score_scale(queries)  # [H, Q, D]
        # Zero times NaN is NaN: of values that are not finite, the scores of their rows tell.
        is_finite = side.values.isfinite()
        values = torch.where(is_finite, side.values, 0.0).transpose(0, 1)
        spoilt = torch.where(is_finite.all(2), 0.0, torch.nan).to(queries).t().unsqueeze(1)
        scores = query @ side.keys.permute(1, 2, 0) + side.bias + spoilt
        if scoring == SILU:
            weights = torch.where(side.is_seen, torch.nn.functional.silu(scores), 0.0)
            own = torch.nn.functional.silu(side.own_scores)
        else:
            scores = torch.where(side.is_seen, scores, HIDDEN)
            scores = torch.cat([scores, side.own_scores], dim=2)
            scores = torch.where(side.is_answered.unsqueeze(1), scores, 0.0)
            weights, own = scores.softmax(2).split([len(side.keys), side.own_scores.size(2)], 2)
        over_rows = (weights @ values).transpose(0, 1)
        attended = over_rows + torch.einsum("hqm,qmhd->qhd", own, side.own_values)
        out.append(_zeros_unless(side.is_answered, attended))
        num_answered += len(side.queries)
    out.append(torch.zeros_like(queries[num_answered:]))
    return torch.cat(out), queries.new_zeros(queries.shape[:2])
