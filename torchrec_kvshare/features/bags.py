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


def joined(parts: list[Bags]) -> Bags:
    """Concatenate bags."""
    return Bags(torch.cat([b.values for b in parts]), torch.cat([b.lengths for b in parts]))
