"""A column with several ids a row, as TorchRec has it: values and lengths."""

from typing import NamedTuple

import torch
from torch import Tensor


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
