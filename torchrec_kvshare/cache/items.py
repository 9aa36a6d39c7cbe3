"""A cache of projected candidates: the part of a candidate that does not depend on the user.

A candidate's token and its projections in the first layer depend only on the item, its attributes
and the weights, so they are computed once per item and used for every user. This is exact: a cached
item is used only if all its attributes are the same.
"""

import threading
from collections.abc import Callable

import torch
from torch import Tensor
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.features.schema import ITEM, NUM_RESERVED_ROWS, FeatureSchema, candidate_key

MAX_BAG = 8  # ids of one attribute; an item with more is not cached
NO_ID = -1
NO_SLOT = -1

Project = Callable[[KeyedJaggedTensor], list[Tensor]]


class ItemCache:
    """Projected items of one model in a ring of slots; thread-safe.

    Args:
        capacity_items: most items cached.
        schema: the model's columns.

    Attributes:
        num_hits: candidates whose projections were cached.
        num_misses: candidates that were projected.

    Raises:
        ConfigError: if the capacity is below 1.
    """

    def __init__(self, capacity_items: int, schema: FeatureSchema) -> None:
        if capacity_items < 1:
            raise ConfigError(f"capacity_items is {capacity_items}; it must be at least 1")
        self.num_hits = 0
        self.num_misses = 0
        self._keys = [candidate_key(column) for column in (ITEM, *schema.item_attributes)]
        self._slot_of_row = torch.full((schema.num_table_rows(ITEM),), NO_SLOT)
        self._row_of_slot = torch.full((capacity_items,), NO_ID)
        self._bags_of_slot = torch.full((capacity_items, len(self._keys) - 1, MAX_BAG), NO_ID)
        self._tables: list[Tensor] = []  # for each history [slots, M, width]
        self._next_slot = 0
        self._lock = threading.Lock()

    def project(self, features: KeyedJaggedTensor, project: Project) -> list[Tensor]:
        """Return the projections of a batch's candidates; compute only the missing ones.

        Args:
            features: a batch with the candidates' keys.
            project: the model's ``project_candidates``.

        Returns:
            For each history [C, M, width], candidates in batch order.
        """
        jagged_by_key = features.to_dict(compute_offsets=False)
        jagged = [jagged_by_key[key] for key in self._keys]
        rows = jagged[0].values()
        bags, fits = self._padded(jagged[1:], rows.numel())
        with self._lock:
            slots = self._slot_of_row[rows]
            same = (self._bags_of_slot[slots] == bags).flatten(1).all(1)
            known = (slots != NO_SLOT) & same & fits
            kept = [table[slots[known]] for table in self._tables]
            num_known = int(known.sum())
            self.num_hits += num_known
            self.num_misses += known.numel() - num_known
        if known.all() and kept:
            return kept
        missing = torch.nonzero(~known).squeeze(1)
        computed = project(take_rows(jagged, self._keys, missing))
        with self._lock:
            keepable = fits[missing] & (rows[missing] >= NUM_RESERVED_ROWS)
            self._keep(rows[missing][keepable], bags[missing][keepable], computed, keepable)
        if not kept:
            return computed
        return [
            whole.new_empty(rows.numel(), *whole.shape[1:])
            .index_copy(0, missing, whole)
            .index_copy(0, torch.nonzero(known).squeeze(1), part)
            for whole, part in zip(computed, kept, strict=True)
        ]

    def clear(self) -> None:
        """Drop all items, because the model's weights have changed."""
        with self._lock:
            self._slot_of_row.fill_(NO_SLOT)
            self._row_of_slot.fill_(NO_ID)

    def _padded(self, attributes: list[JaggedTensor], num_rows: int) -> tuple[Tensor, Tensor]:
        """Pad bags to [C, attributes, MAX_BAG]; also return which candidates' bags all fit."""
        padded = torch.full((num_rows, len(attributes), MAX_BAG), NO_ID)
        fits = torch.ones(num_rows, dtype=torch.bool)
        for index, bag in enumerate(attributes):
            lengths = bag.lengths().to(torch.int64)
            fits &= lengths <= MAX_BAG
            row = torch.repeat_interleave(torch.arange(num_rows), lengths)
            column = torch.arange(row.numel()) - (lengths.cumsum(0) - lengths)[row]
            inside = column < MAX_BAG
            padded[row[inside], index, column[inside]] = bag.values()[inside]
        return padded, fits

    def _keep(self, rows: Tensor, bags: Tensor, computed: list[Tensor], keepable: Tensor) -> None:
        """Write items into the next slots of the ring, each item once."""
        capacity = self._row_of_slot.numel()
        items, item_of_row = torch.unique(rows, return_inverse=True)
        indices = torch.arange(rows.numel())
        chosen = torch.empty_like(items).index_copy_(0, item_of_row, indices)[:capacity]
        if not self._tables:
            self._tables = [one.new_zeros(capacity, *one.shape[1:]) for one in computed]
        slots = (self._next_slot + torch.arange(chosen.numel())) % capacity
        self._next_slot = int(self._next_slot + chosen.numel()) % capacity
        # An item whose attributes changed moves to a new slot; its old slot becomes free.
        moved = self._slot_of_row[rows[chosen]]
        self._row_of_slot[moved[moved != NO_SLOT]] = NO_ID
        leaving = self._row_of_slot[slots]
        leaving = leaving[leaving != NO_ID]
        self._slot_of_row[leaving] = NO_SLOT
        self._row_of_slot[slots] = rows[chosen]
        self._slot_of_row[rows[chosen]] = slots
        self._bags_of_slot[slots] = bags[chosen]
        for table, whole in zip(self._tables, computed, strict=True):
            table[slots] = whole[keepable][chosen]


def take_rows(jagged: list[JaggedTensor], keys: list[str], chosen: Tensor) -> KeyedJaggedTensor:
    """Take some rows of each key, as a batch of one stride."""
    values, lengths = [], []
    for one in jagged:
        counts = one.lengths().to(torch.int64)
        firsts = (counts.cumsum(0) - counts)[chosen]
        taken = counts[chosen]
        start = torch.repeat_interleave(firsts - (taken.cumsum(0) - taken), taken)
        values.append(one.values()[start + torch.arange(start.numel())])
        lengths.append(taken)
    return KeyedJaggedTensor(
        keys=keys, values=torch.cat(values), lengths=torch.cat(lengths), stride=chosen.numel()
    )
