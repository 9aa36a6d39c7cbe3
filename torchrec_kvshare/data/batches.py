"""Columns of users, events and candidates into one TorchRec ``Batch``.

Keys with different numbers of rows in one ``KeyedJaggedTensor`` are what TorchRec calls variable
batch per key (VBE): users' keys have B rows, candidates' keys C rows, and ``inverse_indices`` say
which user each candidate belongs to. Multi-valued event columns have T rows, one bag per event.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_kvshare.data.schema import CLOCK_FEATURES, has_candidate_rows

SECONDS_PER_HOUR = 3600
SECONDS_PER_DAY = 24 * SECONDS_PER_HOUR
EPOCH_WEEKDAY = 3  # 1970-01-01 was a Thursday; Monday is 0.


class Bags(NamedTuple):
    """One key's rows: ``values`` are their ids one after the other, ``lengths`` ids per row."""

    values: Tensor
    lengths: Tensor


def single(values: Tensor) -> Bags:
    """Bags of one id each."""
    return Bags(values, torch.ones_like(values))


def jagged(rows: list[Tensor]) -> Bags:
    """Bags of the ids of each row."""
    return Bags(torch.cat(rows), torch.tensor([row.numel() for row in rows]))


def joined(parts: list[Bags]) -> Bags:
    """The bags of some parts one after the other."""
    return Bags(torch.cat([b.values for b in parts]), torch.cat([b.lengths for b in parts]))


def assemble(
    bags_by_key: dict[str, Bags], candidate_user: Tensor, dense: Tensor, labels: Tensor
) -> Batch:
    """One batch in TorchRec's types.

    ::

        #                user 0        user 1
        # history.item   [3, 9, 4]     [8]           B = 2 rows
        # candidates     [5] [7]       [5] [6] [9]   C = 5 rows
        # candidate_user  0   0         1   1   1

    Args:
        bags_by_key: rows of every key; those of ``has_candidate_rows`` have C rows.
        candidate_user: [C] int64, the user of each candidate, in any order.
        dense: [C, num_dense] float32.
        labels: [C] float32.

    Returns:
        The batch; every key keeps its own stride.
    """
    own_row = torch.arange(candidate_user.numel())
    inverse = [own_row if has_candidate_rows(key) else candidate_user for key in bags_by_key]
    features = _keyed(bags_by_key, torch.stack(inverse))
    return Batch(dense_features=dense, sparse_features=features, labels=labels)


def with_key(
    features: KeyedJaggedTensor, key: str, bags: Bags, candidate_user: Tensor
) -> KeyedJaggedTensor:
    """The same features and one key more, with the users' stride.

    Args:
        features: a batch as ``assemble`` makes it.
        key: name of the new key.
        bags: its rows, one per user.
        candidate_user: [C] int64, the user of each candidate.

    Returns:
        A new ``KeyedJaggedTensor``; nothing of the old one is copied N-fold.
    """
    old_keys, inverse = features.inverse_indices()
    rows = features.to_dict(compute_offsets=False)
    bags_by_key = {key: Bags(one.values(), one.lengths()) for key, one in rows.items()}
    assert list(old_keys) == list(bags_by_key)
    return _keyed(bags_by_key | {key: bags}, torch.cat([inverse, candidate_user[None]]))


def _keyed(bags_by_key: Mapping[str, Bags], inverse: Tensor) -> KeyedJaggedTensor:
    """Keys with a stride each, as a batch that knows its sizes, on any device."""
    keys, all_bags = list(bags_by_key), list(bags_by_key.values())
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.cat([bags.values for bags in all_bags]),
        lengths=torch.cat([bags.lengths for bags in all_bags]),
        stride_per_key_per_rank=[[bags.lengths.numel()] for bags in all_bags],
        stride_per_key=[bags.lengths.numel() for bags in all_bags],
        length_per_key=[bags.values.numel() for bags in all_bags],
        inverse_indices=(keys, inverse),
    )


def clock_features(time: np.ndarray) -> np.ndarray:
    """Hour of day and day of week of Unix times, UTC, as points on two circles.

    Args:
        time: [N] int64 Unix seconds.

    Returns:
        [N, 4] float32, in the order of ``CLOCK_FEATURES``.
    """
    hour = (time % SECONDS_PER_DAY) * (2 * np.pi / SECONDS_PER_DAY)
    weekday = (time // SECONDS_PER_DAY + EPOCH_WEEKDAY) % 7 * (2 * np.pi / 7)
    circles = np.stack([np.sin(hour), np.cos(hour), np.sin(weekday), np.cos(weekday)], axis=1)
    assert circles.shape[1] == len(CLOCK_FEATURES)
    return circles.astype(np.float32)


def squash(values: np.ndarray) -> np.ndarray:
    """Signed logarithm, so that prices and counts of any scale reach the dense arch near one."""
    return (np.sign(values) * np.log1p(np.abs(values))).astype(np.float32)
