"""K/V of all layers of B users: planes of rows, in pages or flat."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from torchrec_kvshare.attention.operators import UserRows


class KVPages(NamedTuple):
    """The K/V of B users, in pages.

    Attributes:
        planes: [planes, P, S, H, D], tables of pages of S rows.
        page_ids: [pages] int64, each user's oldest page first; only its last may be partly filled.
        page_offsets: [B + 1] int64, in ``page_ids``.
        row_offsets: [B + 1] int64, in rows.
    """

    planes: Tensor
    page_ids: Tensor
    page_offsets: Tensor
    row_offsets: Tensor


def flat_pages(planes: Tensor, row_offsets: Tensor) -> KVPages:
    """Return planes [planes, R, H, D], grouped by user, as pages of one row each."""
    page_ids = torch.arange(planes.size(1), device=planes.device)
    return KVPages(planes.unsqueeze(2), page_ids, row_offsets, row_offsets)


def layer_rows(kv: KVPages, depth: int) -> UserRows:
    """Return keys and values of one layer."""
    key, value = kv.planes[2 * depth], kv.planes[2 * depth + 1]
    return UserRows(key, value, kv.page_ids, kv.page_offsets, kv.row_offsets)


def split_users(planes: Tensor, num_rows: list[int]) -> list[Tensor]:
    """Split planes [planes, R, H, D], grouped by user, into the rows of each user.

    Rows after the last user's are padding and are dropped: an encoder knows on the host only an
    upper bound of the number of rows.
    """
    return list(torch.split(planes[:, : sum(num_rows)], num_rows, dim=1))


def split_histories(
    kv_by_history: Sequence[Tensor], num_rows: Sequence[Sequence[int]]
) -> list[list[Tensor]]:
    """Return K/V [planes, R, H, D] by user, then by history.

    Args:
        kv_by_history: of all users, see ``split_users``.
        num_rows: by user, then by history.
    """
    by_history = zip(*num_rows, strict=True)
    parts = [split_users(kv, [*rows]) for kv, rows in zip(kv_by_history, by_history, strict=True)]
    return [[*of_user] for of_user in zip(*parts, strict=True)]


def offsets_of(lengths: Tensor) -> Tensor:
    """Return offsets [B + 1] of lengths [B]; both int64.

    Example:
        >>> offsets_of(torch.tensor([2, 0, 3]))
        tensor([0, 2, 2, 5])
    """
    # Not F.pad: vectorised code of a compiled graph would read past the end of a padded tensor.
    ends = lengths.to(torch.int64).cumsum(0)
    return torch.cat([ends.new_zeros([1]), ends])


def users_of_rows(offsets: Tensor, num_rows: int) -> Tensor:
    """Return the user of each row, [R] int64; padding gets the last user.

    Args:
        offsets: [B + 1] int64.
        num_rows: R, known on the host; rows after the last offset are padding.

    Example:
        >>> users_of_rows(torch.tensor([0, 2, 2, 5]), 6)
        tensor([0, 0, 2, 2, 2, 2])
    """
    rows = torch.arange(num_rows, device=offsets.device)
    users = torch.searchsorted(offsets[1:], rows, right=True)
    return users.clamp(max=offsets.size(0) - 2)


def position_in_user(offsets: Tensor, users: Tensor) -> Tensor:
    """Return the position of each row among its user's rows, [R] int64, from 0."""
    return torch.arange(users.size(0), device=users.device) - offsets.index_select(0, users)


def row_indices(kv: KVPages, users: Tensor, position: Tensor) -> Tensor:
    """Return the index of users' rows [R] in planes [planes, P x S, H, D]: [R] int64."""
    page_size = kv.planes.size(2)
    page = kv.page_offsets.index_select(0, users) + position // page_size
    # Padding has no page: an appended page id keeps its index in range.
    page_ids = torch.cat([kv.page_ids, kv.page_ids.new_zeros([1])])
    page_id = page_ids.index_select(0, page.clamp(max=kv.page_ids.size(0)))
    return page_id * page_size + position % page_size
