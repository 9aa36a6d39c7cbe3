"""Two attention operators over jagged users, and a batch-invariant linear layer.

They are registered with PyTorch as library ``torchrec_kvshare``: opaque to ``torch.export``,
callable from TorchScript and C++, with a backward, so that training, evaluation and serving share
one path. The C++ backend computes float32 on a CPU; ``plain.py`` computes the rest.

Offsets may end before the rows do. The rows after the last offset are padding (the tensor was sized
before the offsets were known): they are not read, and their results are zeros.

::

    # two users with histories of 3 and 2 events, pages of 2 rows, 1 and 2 candidates
    keys, values       [P, S, H, D]    page 4: e0 e1   page 7: e2 -   page 5: f0 f1
    page_ids           [4, 7, 5]
    page_offsets       [0, 2, 3]       of page_ids
    row_offsets        [0, 3, 5]       of everything in row order
    candidate_offsets  [0, 1, 3]
"""

from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_kvshare.attention.library import register_operators

register_operators()


class UserRows(NamedTuple):
    """Keys and values of the rows of B users, read in place from pages.

    Attributes:
        keys: [P, S, H, D] float, a table of pages of S rows.
        values: laid out as ``keys``.
        page_ids: [pages] int64, each user's oldest page first; only its last may be partly filled.
        page_offsets: [B + 1] int64, in ``page_ids``.
        row_offsets: [B + 1] int64, in rows.
    """

    keys: Tensor
    values: Tensor
    page_ids: Tensor
    page_offsets: Tensor
    row_offsets: Tensor


class Visibility(NamedTuple):
    """Which rows of its user's history a candidate sees, and the times of both.

    Attributes:
        row_times: [R] int64 Unix seconds of all users' rows; -1 for a row without a time bias.
        candidate_times: [C] int64 Unix seconds.
        visible_rows: [C] int64, how many of its user's rows a candidate sees, oldest first.
    """

    row_times: Tensor
    candidate_times: Tensor
    visible_rows: Tensor


def flat_rows(keys: Tensor, values: Tensor, row_offsets: Tensor) -> UserRows:
    """Return rows [R, H, D], grouped by user, as pages of one row each."""
    page_ids = torch.arange(keys.size(0), device=keys.device)
    return UserRows(keys.unsqueeze(1), values.unsqueeze(1), page_ids, row_offsets, row_offsets)


def history_attention(
    queries: Tensor,
    query_offsets: Tensor,
    keys: Tensor,
    values: Tensor,
    key_offsets: Tensor,
    cached: UserRows,
    window: int,
    num_globals: int,
    scoring: str,
) -> Tensor:
    """Attend from each user's newest rows to themselves and to the user's earlier rows.

    Args:
        queries: [Q, H, D] float, of the last of each user's new rows.
        query_offsets: [B + 1] int64, in queries.
        keys: [N, H, D] of each user's new rows.
        values: laid out as ``keys``.
        key_offsets: [B + 1] int64, in new rows.
        cached: each user's rows before the new ones; they get no gradients.
        window: rows that a row sees, itself included; 0 for all earlier ones.
        num_globals: how many of each user's last rows see all of its rows.
        scoring: ``softmax`` or ``silu``.

    Returns:
        [Q, H, D].

    Raises:
        ValueError: naming the argument, if the arguments do not fit each other.

    Source:
        Scaled dot-product attention, Vaswani et al. 2017, eq. 1 (arXiv:1706.03762); ``silu``: HSTU,
        Zhai et al. 2024, eq. 2 (arXiv:2402.17152). Meaning: ``attention/reference.py``.

    Example:
        >>> q = k = torch.zeros(3, 1, 2)
        >>> v = torch.tensor([0.0, 2.0, 4.0]).view(3, 1, 1).expand(3, 1, 2)
        >>> nothing = flat_rows(k[:0], v[:0], torch.tensor([0, 0]))
        >>> ends = torch.tensor([0, 3])
        >>> history_attention(q, ends, k, v, ends, nothing, 0, 0, "softmax")[:, 0, 0].round()
        tensor([0., 1., 2.])
        >>> history_attention(q, ends, k, v, ends, nothing, 2, 0, "softmax")[:, 0, 0].round()
        tensor([0., 1., 3.])
    """
    return torch.ops.torchrec_kvshare.history_attention(
        queries,
        query_offsets,
        keys,
        values,
        key_offsets,
        cached.keys,
        cached.values,
        cached.page_ids,
        cached.page_offsets,
        cached.row_offsets,
        window,
        num_globals,
        scoring,
    )[0]


def candidate_attention(
    queries: Tensor,
    own_keys: Tensor,
    own_values: Tensor,
    candidate_offsets: Tensor,
    rows: UserRows,
    visibility: Visibility,
    time_bias: Tensor,
    place_bias: Tensor,
    window: int,
    scoring: str,
) -> Tensor:
    """Attend from every candidate to its own M tokens and to its user's one history.

    Args:
        queries: [C, M, H, D] float, grouped by user.
        own_keys: [C, M, H, D] of the candidates' own tokens, which see each other.
        own_values: laid out as ``own_keys``.
        candidate_offsets: [B + 1] int64, in candidates.
        rows: keys and values of the users' histories.
        visibility: times, and how many rows each candidate sees.
        time_bias: [buckets, H], added to the scores; the bucket is the time in seconds from a row
            to a candidate, in buckets of doubling width.
        place_bias: [buckets, H], likewise by a row's position counted from the newest visible row,
            which is 1; zero buckets for no such bias.
        window: only this many of the newest visible rows are seen; 0 for all.
        scoring: ``softmax`` or ``silu``.

    Returns:
        [C, M, H, D]. A candidate that sees no row attends to its own tokens only: no NaN.

    Raises:
        ValueError: naming the argument, if the arguments do not fit each other.

    Source:
        As ``history_attention``.

    Example:
        >>> one, seen = torch.ones(1, 1, 1, 2), torch.full((3, 1, 2), 5.0)
        >>> rows = flat_rows(seen, seen, torch.tensor([0, 3]))
        >>> visibility = Visibility(torch.zeros(3).long(), torch.tensor([9]), torch.tensor([3]))
        >>> bias, none, first = torch.full((32, 1), 100.0), torch.zeros(0, 1), torch.tensor([0, 1])
        >>> candidate_attention(one, one, one, first, rows, visibility, bias, none, 0, "softmax")
        tensor([[[[5., 5.]]]])
        >>> blind = visibility._replace(visible_rows=torch.tensor([0]))
        >>> candidate_attention(one, one, one, first, rows, blind, bias, none, 0, "softmax")
        tensor([[[[1., 1.]]]])
    """
    return torch.ops.torchrec_kvshare.candidate_attention(
        queries,
        own_keys,
        own_values,
        candidate_offsets,
        rows.keys,
        rows.values,
        rows.page_ids,
        rows.page_offsets,
        rows.row_offsets,
        visibility.row_times,
        visibility.candidate_times,
        visibility.visible_rows,
        time_bias,
        place_bias,
        window,
        scoring,
    )[0]


def rows_linear(rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute a linear layer in which a row's result does not depend on the other rows, to the bit.

    Libraries choose their kernels by the number of rows; this layer is batch invariant. It has no
    backward: it is for scoring.

    Args:
        rows: [..., K] float.
        weight: [N, K], dtype of ``rows``.
        bias: [N], likewise.

    Returns:
        [..., N].

    Raises:
        ValueError: naming the argument, if the arguments do not fit each other.

    Example:
        >>> rows_linear(torch.ones(2, 3), torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([4.0]))
        tensor([[10.],
                [10.]])
    """
    flat = rows.flatten(0, -2).unsqueeze(0)
    results = torch.ops.torchrec_kvshare.rows_linear(flat, weight.unsqueeze(0), bias)
    return results.view(rows.shape[:-1] + weight.shape[:1])


def rows_bmm(left: Tensor, right: Tensor) -> Tensor:
    """Compute ``torch.bmm`` in which a row's result does not depend on the others.

    See ``rows_linear``.

    Args:
        left: [G, R, K] float.
        right: [G, K, N], dtype of ``left``.

    Returns:
        [G, R, N].

    Raises:
        ValueError: naming the argument, if the arguments do not fit each other.
    """
    no_bias = left.new_zeros([right.size(2)])
    return torch.ops.torchrec_kvshare.rows_linear(left, right.transpose(1, 2), no_bias)
