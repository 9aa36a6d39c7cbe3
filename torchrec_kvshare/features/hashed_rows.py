"""Rows by hashing, in tensor arithmetic: one telling for NumPy's arrays and for programs."""

from torch import Tensor


def hashed_rows(codes: Tensor, num_rows: int, salt: int) -> Tensor:
    """Return a row for each code, in tensor arithmetic that scripts and exports.

    Args:
        codes: int64, as ``codes_of_ids`` and ``codes_of_integers`` return them.
        num_rows: of the table.
        salt: another salt gives other rows.

    Returns:
        int64 from 0 to ``num_rows - 1``, of the shape of ``codes``.

    Example:
        >>> import numpy as np
        >>> import torch
        >>> from torchrec_kvshare.features.hashing import codes_of_integers
        >>> codes = torch.from_numpy(codes_of_integers(np.arange(5)))
        >>> hashed_rows(codes, 1000, 0).tolist(), hashed_rows(codes, 1000, 1).tolist()
        ([891, 960, 632, 185, 462], [508, 766, 761, 189, 686])
    """
    # SplitMix64 as in ``mixed``. Its constants are signed here: products wrap around all the same,
    # and a mask makes a right shift logical.
    state = (codes ^ salt) + -7046029254386353131
    state = (state ^ ((state >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    state = (state ^ ((state >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    state = state ^ ((state >> 31) & 0x1FFFFFFFF)
    return (state & 0x7FFFFFFFFFFFFFFF) % num_rows
