"""The plain PyTorch backend of the operators: any dtype and device, gradients, no compiler.

It computes what ``operators.cpp`` does not: float64, GPUs, and everything on a machine without the
library. On a CPU it works user by user, each over its own rows. On other devices offsets are not
read back: it works in blocks of queries, each over the rows of all users with other users' rows
masked, so the work grows with the number of users in a batch.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_kvshare.attention.checks import check_candidates, check_history, check_rows_linear

SILU = "silu"
NO_TIME = -1  # time of a row that gets no time bias
ROWS_AT_ONCE = 16  # rows of a linear layer whose products with the weight are held in memory
QUERIES_AT_ONCE = 512  # on a GPU: queries whose scores over all rows of a batch are held in memory
HIDDEN = -torch.inf  # score of a masked row; every query sees at least itself


class Rows(NamedTuple):
    """The user of each row, and the row's position among the user's rows.

    Attributes:
        user: [R] int64; B for padding.
        position: [R] int64, among its user's rows.
        is_real: [R] bool, false for padding.
    """

    user: Tensor
    position: Tensor
    is_real: Tensor

    def part(self, span: slice) -> "Rows":
        return Rows(*(tensor[span] for tensor in self))


class ChunkSlices(NamedTuple):
    """What is computed at once.

    Attributes:
        queries: slice of all queries.
        pages: slice of all page ids.
        new: slice of all rows that are not in pages.
    """

    queries: slice
    pages: slice
    new: slice


class Chunk(NamedTuple):
    """Some queries and the rows that they may see.

    Attributes:
        queries: [Q, H, D].
        is_real: [Q] bool, false for padding.
        keys: [R, H, D].
        values: [R, H, D].
        bias: [H, Q, R] or [H, 1, R], added to the scores.
        is_seen: [Q, R] bool.
        own_scores: [H, Q, M], of the candidate's own tokens; M is 0 for queries of history rows.
        own_values: [Q, M, H, D].
    """

    queries: Tensor
    is_real: Tensor
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
    """See ``operators.history_attention``; the second result, the log sums, is all zeros."""
    check_history(
        *(queries, query_offsets, keys, values, key_offsets, cached_keys, cached_values),
        *(page_ids, page_offsets, cached_offsets, window, num_globals, scoring),
    )
    num_cached, num_new, num_queries = map(_lengths, (cached_offsets, key_offsets, query_offsets))
    num_rows = num_cached + num_new
    page_ids, in_pages = _page_rows(page_offsets, page_ids, cached_keys, num_cached)
    new = _rows(key_offsets, keys, num_cached)
    query_rows = _rows(query_offsets, queries, num_rows - num_queries)
    page_size = cached_keys.size(1)
    cached_keys, cached_values = _in_order(page_ids, in_pages, cached_keys, cached_values)
    keys, values = (_zeros_unless(new.is_real, rows) for rows in (keys, values))

    def chunks() -> Iterator[Chunk]:
        for slices in _chunk_slices(query_offsets, page_offsets, key_offsets, queries.size(0)):
            span = _rows_of(slices.pages, page_size)
            cached, fresh = in_pages.part(span), new.part(slices.new)
            user, position, is_real = (torch.cat(pair) for pair in zip(cached, fresh, strict=True))
            query = query_rows.part(slices.queries)
            query_position = query.position.unsqueeze(1)
            is_seen = position <= query_position
            if window > 0:
                is_seen &= position > query_position - window
            first_global = num_rows.index_select(0, query.user).unsqueeze(1) - num_globals
            is_seen |= query_position >= first_global
            is_seen &= is_real & (user == query.user.unsqueeze(1))
            yield _chunk_without_own(
                _zeros_unless(query.is_real, queries[slices.queries]),
                query.is_real,
                torch.cat([cached_keys[span], keys[slices.new]]),
                torch.cat([cached_values[span], values[slices.new]]),
                is_seen,
            )

    return _attend(queries, chunks(), scoring)


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
    """See ``operators.candidate_attention``; the second result, the log sums, is all zeros."""
    check_candidates(
        *(queries, own_keys, own_values, candidate_offsets, keys, values, page_ids, page_offsets),
        *(row_offsets, row_times, candidate_times, visible_rows, time_bias, place_bias),
        *(window, scoring),
    )
    num_tokens, scale, page_size = queries.size(1), _score_scale(queries), keys.size(1)
    page_ids, in_pages = _page_rows(page_offsets, page_ids, keys, _lengths(row_offsets))
    keys, values = _in_order(page_ids, in_pages, keys, values)
    candidate_rows = _rows(candidate_offsets, queries, torch.zeros_like(candidate_offsets))
    # The entry after the last time is for padding.
    times = torch.cat([row_times, row_times.new_full([1], NO_TIME)])
    first_row = row_offsets.index_select(0, in_pages.user)
    time_of_row = times.index_select(
        0, torch.where(in_pages.is_real, first_row + in_pages.position, row_times.size(0))
    )

    def chunks() -> Iterator[Chunk]:
        no_new = torch.zeros_like(candidate_offsets)
        for slices in _chunk_slices(candidate_offsets, page_offsets, no_new, queries.size(0)):
            span = _rows_of(slices.pages, page_size)
            candidate = candidate_rows.part(slices.queries)
            user, position, is_real = in_pages.part(span)
            end = visible_rows[slices.queries].unsqueeze(1)
            is_seen = is_real & (user == candidate.user.unsqueeze(1)) & (position < end)
            if window > 0:
                is_seen &= position >= end - window
            elapsed = candidate_times[slices.queries].unsqueeze(1) - time_of_row[span]
            bias = time_bias[doubling_bucket(elapsed, time_bias.size(0))]  # [N, R, H]
            bias = bias.masked_fill((time_of_row[span] == NO_TIME).unsqueeze(1), 0.0)
            if place_bias.size(0) > 0:
                bias = bias + place_bias[doubling_bucket(end - position, place_bias.size(0))]
            query, own_key, own_value = (
                _zeros_unless(candidate.is_real, rows[slices.queries])
                for rows in (queries, own_keys, own_values)
            )
            own_scores = torch.einsum("cmhd,cnhd->hcmn", query, own_key) * scale
            yield Chunk(
                query.flatten(0, 1),
                candidate.is_real.repeat_interleave(num_tokens, 0),
                keys[span],
                values[span],
                bias.repeat_interleave(num_tokens, 0).permute(2, 0, 1),
                is_seen.repeat_interleave(num_tokens, 0),
                own_scores.flatten(1, 2),
                own_value.repeat_interleave(num_tokens, 0),
            )

    out, log_sums = _attend(queries.flatten(0, 1), chunks(), scoring)
    return out.view_as(queries), log_sums.view(queries.shape[:3])


def plain_rows_linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See ``operators.rows_linear``; sums in float64, ``ROWS_AT_ONCE`` rows at a time."""
    check_rows_linear(rows, weight, bias)
    weight, bias = weight.double().unsqueeze(1), bias.double()
    out = [rows.new_zeros([rows.size(0), 0, bias.size(0)])]
    for few in rows.double().split(max(1, ROWS_AT_ONCE // max(1, rows.size(0))), dim=1):
        out.append(((few.unsqueeze(2) * weight).sum(3) + bias).to(rows.dtype))
    return torch.cat(out, dim=1)


def doubling_bucket(amount: Tensor, num_buckets: int) -> Tensor:
    """Return the bucket of each number: 0 below one, then one per doubling; the last is open-ended.

    Example:
        >>> doubling_bucket(torch.tensor([-5, 0, 1, 2, 3, 4, 100]), 4)
        tensor([0, 0, 1, 2, 2, 3, 3])
    """
    num_ends = min(num_buckets - 1, 63)  # 2**63 is no int64.
    ends = 2 ** torch.arange(num_ends, device=amount.device)
    return torch.bucketize(amount, ends, right=True)


def _score_scale(queries: Tensor) -> float:
    """Return the factor of the product of a query and a key: 1 / sqrt(D), or 1 if D is 0."""
    return max(1, queries.size(-1)) ** -0.5


def _lengths(offsets: Tensor) -> Tensor:
    """Return the number of rows [B + 1] of each user, and 0 for padding."""
    return torch.cat([offsets.diff(), offsets.new_zeros([1])])


def _rows(offsets: Tensor, rows: Tensor, first_position: Tensor) -> Rows:
    """Describe flat rows, padding included.

    Args:
        offsets: [B + 1].
        rows: [R, ...], only their number is used.
        first_position: [B + 1], position of each user's first row.
    """
    index = torch.arange(rows.size(0), device=offsets.device)
    user = torch.searchsorted(offsets[1:], index, right=True)
    return Rows(
        user,
        index - offsets.index_select(0, user) + first_position.index_select(0, user),
        user < offsets.numel() - 1,
    )


def _page_rows(
    page_offsets: Tensor, page_ids: Tensor, pages: Tensor, num_rows: Tensor
) -> tuple[Tensor, Rows]:
    """Return valid page ids (0 for padding), and the rows of these pages in order."""
    page_size = pages.size(1)
    page_ids = page_ids if pages.size(0) else page_ids[:0]
    of_page = _rows(page_offsets, page_ids, torch.zeros_like(page_offsets))
    page_ids = torch.where(of_page.is_real, page_ids, 0)
    slot = torch.arange(page_size, device=page_ids.device)
    user = of_page.user.repeat_interleave(page_size)
    position = (of_page.position.unsqueeze(1) * page_size + slot).flatten()
    return page_ids, Rows(user, position, position < num_rows.index_select(0, user))


def _in_order(page_ids: Tensor, rows: Rows, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Gather keys and values [R, H, D] from pages, in the order of the page ids."""
    flat = (pages.index_select(0, page_ids).flatten(0, 1) for pages in (keys, values))
    key, value = (_zeros_unless(rows.is_real, one) for one in flat)
    return key, value


def _chunk_slices(
    query_offsets: Tensor, page_offsets: Tensor, key_offsets: Tensor, num_queries: int
) -> Iterator[ChunkSlices]:
    """Yield one chunk per user on a CPU; elsewhere blocks of queries over all rows."""
    if query_offsets.is_cpu:
        spans = map(_spans, (query_offsets, page_offsets, key_offsets))
        return map(ChunkSlices, *spans)
    return _blocks(num_queries)


def _blocks(num_queries: int) -> Iterator[ChunkSlices]:
    for first in range(0, num_queries, QUERIES_AT_ONCE):
        queries = slice(first, min(first + QUERIES_AT_ONCE, num_queries))
        yield ChunkSlices(queries, slice(None), slice(None))


def _spans(offsets: Tensor) -> list[slice]:
    return [slice(first, last) for first, last in pairwise(offsets.tolist())]


def _rows_of(pages: slice, page_size: int) -> slice:
    if pages == slice(None):
        return pages
    return slice(pages.start * page_size, pages.stop * page_size)


def _zeros_unless(is_real: Tensor, rows: Tensor) -> Tensor:
    """Return rows [R, ...] with padding set to zero, whatever it holds."""
    return torch.where(is_real.view(-1, *[1] * (rows.dim() - 1)), rows, 0.0)


def _chunk_without_own(
    queries: Tensor, is_real: Tensor, keys: Tensor, values: Tensor, is_seen: Tensor
) -> Chunk:
    """Make a chunk without biases and without own tokens."""
    num_queries, num_heads = queries.shape[:2]
    return Chunk(
        queries,
        is_real,
        keys,
        values,
        queries.new_zeros([num_heads, 1, keys.size(0)]),
        is_seen,
        queries.new_zeros([num_heads, num_queries, 0]),
        queries.unsqueeze(1)[:, :0],
    )


def _attend(queries: Tensor, chunks: Iterator[Chunk], scoring: str) -> tuple[Tensor, Tensor]:
    out, num_attended = [queries[:0] * 1.0], 0
    for chunk in chunks:
        query = chunk.queries.transpose(0, 1) * _score_scale(queries)  # [H, Q, D]
        # Zero times NaN is NaN, so a masked row with a value that is not finite would spoil the
        # result: such values are set to zero, and NaN is added to the scores of their rows.
        is_finite = chunk.values.isfinite()
        values = torch.where(is_finite, chunk.values, 0.0).transpose(0, 1)
        spoilt = torch.where(is_finite.all(2), 0.0, torch.nan).to(queries).t().unsqueeze(1)
        scores = query @ chunk.keys.permute(1, 2, 0) + chunk.bias + spoilt
        if scoring == SILU:
            weights = torch.where(chunk.is_seen, torch.nn.functional.silu(scores), 0.0)
            own_weights = torch.nn.functional.silu(chunk.own_scores)
        else:
            scores = torch.where(chunk.is_seen, scores, HIDDEN)
            scores = torch.cat([scores, chunk.own_scores], dim=2)
            scores = torch.where(chunk.is_real.unsqueeze(1), scores, 0.0)
            num_rows, num_own = len(chunk.keys), chunk.own_scores.size(2)
            weights, own_weights = scores.softmax(2).split([num_rows, num_own], 2)
        over_rows = (weights @ values).transpose(0, 1)
        attended = over_rows + torch.einsum("hqm,qmhd->qhd", own_weights, chunk.own_values)
        out.append(_zeros_unless(chunk.is_real, attended))
        num_attended += len(chunk.queries)
    out.append(torch.zeros_like(queries[num_attended:]))
    return torch.cat(out), queries.new_zeros(queries.shape[:2])
