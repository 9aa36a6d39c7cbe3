"""The attention operators defined as float64 loops: no masks, no batches, no fast-path code.

Imported by tests only.
"""

import math

import torch
from torch import Tensor


def reference_history_attention(
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
) -> Tensor:
    """Define ``operators.history_attention``; it takes the same arguments.

    Returns:
        [Q, H, D] float64.

    Example:
        >>> rows, none, ends = torch.ones(2, 1, 1), torch.ones(0, 4, 1, 1), torch.tensor([0, 2])
        >>> nothing = (none, none, *torch.zeros(3, 2, dtype=torch.int64))
        >>> options = (0, 0, "softmax")
        >>> reference_history_attention(rows, ends, rows, rows, ends, *nothing, *options).shape
        torch.Size([2, 1, 1])
    """
    attended = torch.zeros(queries.shape, dtype=torch.float64)
    for user in range(len(query_offsets) - 1):
        new = range(int(key_offsets[user]), int(key_offsets[user + 1]))
        paged = _rows_in_pages(cached_keys, page_ids, page_offsets, cached_offsets, user)
        seen_keys = [cached_keys[slot] for slot in paged] + [keys[row] for row in new]
        seen_values = [cached_values[slot] for slot in paged] + [values[row] for row in new]
        num_rows, end = len(seen_keys), int(query_offsets[user + 1])
        for query in range(int(query_offsets[user]), end):
            row = num_rows - (end - query)
            first = max(0, row + 1 - window) if window else 0
            seen = slice(0, num_rows) if end - query <= num_globals else slice(first, row + 1)
            no_biases = [torch.zeros(queries.size(1)) for _ in seen_keys[seen]]
            attended[query] = _row_by_scoring(
                scoring, queries[query], seen_keys[seen], seen_values[seen], no_biases
            )
    return attended


def reference_candidate_attention(
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
) -> Tensor:
    """Define ``operators.candidate_attention``; it takes the same arguments.

    Returns:
        [C, M, H, D] float64.
    """
    attended = torch.zeros(queries.shape, dtype=torch.float64)
    for user in range(len(candidate_offsets) - 1):
        paged = _rows_in_pages(keys, page_ids, page_offsets, row_offsets, user)
        times = row_times[int(row_offsets[user]) : int(row_offsets[user + 1])].tolist()
        for candidate in range(int(candidate_offsets[user]), int(candidate_offsets[user + 1])):
            end, now = int(visible_rows[candidate]), int(candidate_times[candidate])
            seen = range(max(0, end - window) if window else 0, end)
            biases = [torch.zeros(queries.size(2), dtype=torch.float64) for _ in seen]
            for bias, row in zip(biases, seen, strict=True):
                if times[row] != -1:
                    bias += time_bias[reference_bucket(now - times[row], len(time_bias))]
                if len(place_bias) > 0:
                    bias += place_bias[reference_bucket(end - row, len(place_bias))]
            own = range(queries.size(1))
            for token in own:
                attended[candidate, token] = _row_by_scoring(
                    scoring,
                    queries[candidate, token],
                    [keys[paged[row]] for row in seen] + [own_keys[candidate, one] for one in own],
                    [values[paged[row]] for row in seen]
                    + [own_values[candidate, one] for one in own],
                    biases + [torch.zeros(queries.size(2)) for _ in own],
                )
    return attended


def reference_bucket(amount: int, num_buckets: int) -> int:
    """Return the bucket of a number: 0 below 1, then one per doubling; the last is open-ended.

    Example:
        >>> [reference_bucket(amount, 4) for amount in (-5, 0, 1, 2, 3, 4, 100)]
        [0, 0, 1, 2, 2, 3, 3]
    """
    bucket, width = 0, 1
    while amount >= width and bucket < num_buckets - 1:
        bucket, width = bucket + 1, width * 2
    return bucket


def reference_attention(
    query: Tensor, keys: list[Tensor], values: list[Tensor], biases: list[Tensor]
) -> Tensor:
    """Attend from one row to a list of rows by softmax, head by head, key by key.

    Args:
        query: [H, D].
        keys: one [H, D] for each visible row.
        values: likewise.
        biases: one [H] for each row, added to its scores.

    Returns:
        [H, D] float64; zeros if no row is visible.

    Source:
        Scaled dot-product attention, Vaswani et al. 2017, eq. 1 (arXiv:1706.03762).

    Example:
        >>> like, unlike, no_bias = torch.ones(1, 2), -torch.ones(1, 2), torch.zeros(1)
        >>> keys = values = [like, unlike]
        >>> reference_attention(100 * like, keys, values, [no_bias, no_bias])
        tensor([[1., 1.]], dtype=torch.float64)
    """
    attended = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(len(query)):
        scores = _scores(query, keys, biases, head)
        highest = max(scores, default=0.0)
        weights = [math.exp(score - highest) for score in scores]
        for weight, value in zip(weights, values, strict=True):
            attended[head] += weight / sum(weights) * value[head].double()
    return attended


def reference_silu_attention(
    query: Tensor,
    keys: list[Tensor],
    values: list[Tensor],
    biases: list[Tensor],
    fixed_scale: float,
) -> Tensor:
    """Sum a list of rows weighted by the SiLU of their scores; the weights need not add to 1.

    Args:
        query: [H, D].
        keys: one [H, D] for each visible row.
        values: likewise.
        biases: one [H] for each row, added to its scores before the SiLU.
        fixed_scale: factor of every weight, the same for any number of visible rows.

    Returns:
        [H, D] float64; zeros if no row is visible.

    Source:
        Pointwise aggregated attention, HSTU, Zhai et al. 2024, eq. 2 (arXiv:2402.17152).

    Example:
        >>> query, key, no_bias = torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1)
        >>> reference_silu_attention(query, [key], [key], [no_bias], 1.0)  # a score of 0 weighs 0
        tensor([[0., 0.]], dtype=torch.float64)
    """
    attended = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(len(query)):
        scores = _scores(query, keys, biases, head)
        for score, value in zip(scores, values, strict=True):
            attended[head] += reference_silu(score) * fixed_scale * value[head].double()
    return attended


def reference_silu(value: float) -> float:
    """Return the value times its logistic function.

    Args:
        value: any finite number.

    Returns:
        The product, between -0.28 and ``value`` or zero.

    Source:
        Elfwing et al. 2017 (arXiv:1702.03118).

    Example:
        >>> reference_silu(0.0)
        0.0
    """
    if value < 0.0:  # exp(-value) could overflow
        return value * math.exp(value) / (1.0 + math.exp(value))
    return value / (1.0 + math.exp(-value))


def _scores(query: Tensor, keys: list[Tensor], biases: list[Tensor], head: int) -> list[float]:
    """Return one head's score of every key: the scaled product plus the key's bias."""
    return [
        float((query[head].double() * key[head].double()).sum()) / math.sqrt(query.shape[1])
        + float(bias[head])
        for key, bias in zip(keys, biases, strict=True)
    ]


def _rows_in_pages(
    pages: Tensor, page_ids: Tensor, page_offsets: Tensor, row_offsets: Tensor, user: int
) -> list[tuple[int, int]]:
    """Return the page of each row of a user, and its slot in that page."""
    ids = page_ids[int(page_offsets[user]) : int(page_offsets[user + 1])].tolist()
    slots = [(page, slot) for page in ids for slot in range(pages.size(1))]
    return slots[: int(row_offsets[user + 1] - row_offsets[user])]


def _row_by_scoring(
    scoring: str, query: Tensor, keys: list[Tensor], values: list[Tensor], biases: list[Tensor]
) -> Tensor:
    if scoring == "silu":
        return reference_silu_attention(query, keys, values, biases, 1.0)
    assert scoring == "softmax"
    return reference_attention(query, keys, values, biases)
