"""A column with several ids per row, laid out as in TorchRec: values and lengths."""

from typing import NamedTuple

import torch
from torch import Tensor


class Bags(NamedTuple):
    """The rows of one key: ``values`` holds their ids in order, ``lengths`` the ids per row."""

    values: Tensor
    lengths: Tensor


def single(values: Tensor) -> Bags:
    """Return bags of one id each."""
    return Bags(values, torch.ones_like(values))


def jagged(rows: list[Tensor]) -> Bags:
    """Return one bag per row, of the row's ids."""
    return Bags(torch.cat(rows), torch.tensor([row.numel() for row in rows]))


def bits_of(floats: Tensor) -> Tensor:
    """Return the bits of float32 numbers as int64: a KeyedJaggedTensor holds integers.

    Runs in TorchScript, which has ``view_copy`` with a dtype and no ``view`` with one.

    Example:
        >>> floats_of(bits_of(torch.tensor([0.5, -3.25])))
        tensor([ 0.5000, -3.2500])
    """
    return torch.view_copy(floats, dtype=torch.int32).to(torch.int64)


def floats_of(bits: Tensor) -> Tensor:
    """Return the float32 numbers whose bits ``bits_of`` returned. Runs in TorchScript."""
    return torch.view_copy(bits.to(torch.int32), dtype=torch.float32)


def joined(parts: list[Bags]) -> Bags:
    """Concatenate bags."""
    return Bags(torch.cat([b.values for b in parts]), torch.cat([b.lengths for b in parts]))
