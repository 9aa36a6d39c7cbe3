"""Ids that are given rows while the model trains: TorchRec's managed collisions, on the host.

A table of few rows serves a stream of many ids: rows of ids that have become rare go to ids that
have become frequent. Every rank holds the same state, because all see the ids of all ranks. After
training the map is an ordinary vocabulary, and nothing later knows that it was managed.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.modules.mc_modules import DistanceLFU_EvictionPolicy, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from torchrec_kvshare.features.hashing import IntArray, codes_of_ids
from torchrec_kvshare.features.schema import (
    MAX_EXAMPLES,
    NUM_RESERVED_ROWS,
    UNKNOWN_ROW,
    FeatureSchema,
    Managed,
    Vocabulary,
    candidate_key,
    event_key,
    history_key,
    item_key,
    shared_key,
    vector_key,
)
from torchrec_kvshare.training.ranks import Ranks

logger = logging.getLogger(__name__)

PENDING_CODES, PENDING_COUNTS = "pending_codes", "pending_counts"
NO_ID = torch.iinfo(torch.int64).max  # in TorchRec's buffers: the slot is free
IDS = "ids"


class Counted(NamedTuple):
    """Distinct ids of a column, ascending, and how often each came."""

    codes: IntArray
    counts: IntArray


NOTHING = Counted(np.zeros(0, np.int64), np.zeros(0, np.int64))


class ManagedIds:
    """The maps of a run's managed columns; without such a column everything passes unchanged.

    Args:
        schema: its ``Managed`` columns are mapped here; in batches a code stands for a row.
        ranks: the processes that train together.

    Attributes:
        num_evicted: by column, the ids that lost their rows in the last step, if it was one in
            which ids can.
    """

    def __init__(self, schema: FeatureSchema, ranks: Ranks) -> None:
        self.ranks = ranks
        self.num_evicted: dict[str, int] = {}
        self._map_by_column = {
            column: ids
            for column, ids in schema.vocabulary_by_column.items()
            if isinstance(ids, Managed)
        }
        self._keys_by_column = {column: keys_of(schema, column) for column in self._map_by_column}
        self._modules = {
            column: MCHManagedCollisionModule(
                zch_size=ids.num_rows + 1,  # The last slot is that of unknown ids.
                device=torch.device("cpu"),
                eviction_policy=DistanceLFU_EvictionPolicy(),
                eviction_interval=1,  # of calls; ``observe`` collects the ids of several steps
            ).train()
            for column, ids in self._map_by_column.items()
        }
        self._pending = dict.fromkeys(self._modules, NOTHING)

    def observe(self, batch: Batch | None, step: int) -> dict[str, IntArray]:
        """Count the ids of a training step; all ranks must call this.

        Args:
            batch: of this rank, not remapped; None for a rank that pads.
            step: number of the step, from 0; every ``eviction_steps`` frequent ids get rows.

        Returns:
            By column, the rows that go from one id to another.
        """
        self.num_evicted = {}
        if not self._modules:
            return {}
        own = {column: self._count(batch, column) for column in self._modules}
        everyone = self.ranks.gather(own)
        evicted = {}
        for column, module in self._modules.items():
            pending = [self._pending[column], *(of_rank[column] for of_rank in everyone)]
            self._pending[column] = _sum(pending)
            if (step + 1) % self._map_by_column[column].eviction_steps == 0:
                evicted[column] = self._give_rows(module, self._pending[column])
                self._pending[column] = NOTHING
        self.num_evicted = {column: rows.size for column, rows in evicted.items()}
        return evicted

    def remapped(self, batch: Batch) -> Batch:
        """Return a batch with table rows in place of codes; ids without a row are unknown."""
        if not self._modules:
            return batch
        features = batch.sparse_features
        values = features.values().clone()
        for column, module in self._modules.items():
            for part in self._parts(features, values, self._keys_by_column[column]):
                slots = module.remap(_jagged(part))[IDS].values()
                is_id = part >= NUM_RESERVED_ROWS
                part[is_id] = _rows_of_slots(slots[is_id], module)
        mapped = KeyedJaggedTensor(
            keys=features.keys(),
            values=values,
            lengths=features.lengths(),
            stride_per_key_per_rank=features.stride_per_key_per_rank(),
            stride_per_key=features.stride_per_key(),
            length_per_key=features.length_per_key(),
            inverse_indices=features.inverse_indices(),
        )
        return Batch(batch.dense_features, mapped, batch.labels)

    def frozen(
        self, schema: FeatureSchema, known_ids: Mapping[str, Sequence[str]]
    ) -> FeatureSchema:
        """Return the schema with vocabularies of the ids that have rows now.

        Args:
            schema: as the class takes it.
            known_ids: of the training split, by column.
        """
        vocabularies = {
            column: self._vocabulary(column, known_ids[column]) for column in self._modules
        }
        for column, vocabulary in vocabularies.items():
            logger.info(
                "%s is managed: %s ids have a row, of the %s ids of the training split",
                column,
                f"{vocabulary.codes.size:,}",
                f"{len(known_ids[column]):,}",
            )
        return replace(schema, vocabulary_by_column=schema.vocabulary_by_column | vocabularies)

    def arrays(self) -> dict[str, NDArray[np.int64]]:
        """Return the state as arrays by name, the same on every rank."""
        found: dict[str, NDArray[np.int64]] = {}
        for column, module in self._modules.items():
            found |= {f"{column}/{name}": one.numpy() for name, one in module.state_dict().items()}
            found[f"{column}/{PENDING_CODES}"] = self._pending[column].codes
            found[f"{column}/{PENDING_COUNTS}"] = self._pending[column].counts
        return found

    def load(self, arrays: Mapping[str, NDArray[np.int64]]) -> None:
        """Return to a state that ``arrays`` gave."""
        for column, module in self._modules.items():
            module.load_state_dict(
                {name: torch.from_numpy(arrays[f"{column}/{name}"]) for name in module.state_dict()}
            )
            # The next call of ``profile`` reads the number of calls from the state.
            module._current_iter = -1
            names = (PENDING_CODES, PENDING_COUNTS)
            self._pending[column] = Counted(*(arrays[f"{column}/{name}"] for name in names))

    def _count(self, batch: Batch | None, column: str) -> Counted:
        if batch is None:
            return NOTHING
        features = batch.sparse_features
        keys = [key for key in self._keys_by_column[column] if not key.startswith(shared_key(""))]
        parts = [part.numpy() for part in self._parts(features, features.values(), keys)]
        codes, counts = np.unique(np.concatenate(parts), return_counts=True)
        is_id = codes >= NUM_RESERVED_ROWS
        return Counted(codes[is_id], counts[is_id])

    def _parts(
        self, features: KeyedJaggedTensor, values: Tensor, keys: Sequence[str]
    ) -> list[Tensor]:
        """Return the keys' views of a batch's values."""
        parts = dict(zip(features.keys(), values.split(features.length_per_key()), strict=True))
        return [parts[key] for key in keys if key in parts]

    def _give_rows(self, module: MCHManagedCollisionModule, ids: Counted) -> IntArray:
        """Give rows to the ids of several steps; return those that other ids had."""
        if not ids.codes.size:
            return ids.codes
        taken = module._mch_remapped_ids_mapping[module._mch_sorted_raw_ids != NO_ID].numpy()
        # TorchRec sizes its buffer by the first call and drops what does not fit.
        module._input_history_buffer_size = -1
        module.profile(_jagged(torch.from_numpy(np.repeat(*ids))))
        changed = module.evict()
        assert changed is not None
        return np.intersect1d(changed.numpy(), taken) + NUM_RESERVED_ROWS

    def _vocabulary(self, column: str, known: Sequence[str]) -> Vocabulary:
        module = self._modules[column]
        has_row = module._mch_sorted_raw_ids != NO_ID
        codes = module._mch_sorted_raw_ids[has_row].numpy() - NUM_RESERVED_ROWS
        rows = module._mch_remapped_ids_mapping[has_row].numpy() + NUM_RESERVED_ROWS
        coded = codes_of_ids(known)
        is_kept = np.isin(coded.codes, codes)
        kept = np.flatnonzero(is_kept)
        return Vocabulary.of_arrays(
            np.stack([codes, rows]),
            {
                "num_table_rows": self._map_by_column[column].num_table_rows,
                "examples": [
                    known[index] for index in kept[:: -(-kept.size // MAX_EXAMPLES) or 1].tolist()
                ],
                "has_text": not coded.is_integer[is_kept].all(),
            },
        )


def keys_of(schema: FeatureSchema, column: str) -> list[str]:
    """Return the keys of a batch, and features of tables, that hold ids of a column.

    Args:
        schema: the model's columns.
        column: a key of its vocabularies.
    """
    name_by_column = {event_key(name): name for name in schema.event_columns}
    name_by_column |= {item_key(name): name for name in schema.item_attributes}
    if column not in name_by_column:
        return [column]
    name = name_by_column[column]
    keys = [history_key(history.name, name) for history in schema.histories]
    of_events = name in schema.event_attributes
    return keys + ([] if of_events else [candidate_key(name), shared_key(name), vector_key(name)])


def _sum(parts: Sequence[Counted]) -> Counted:
    codes, inverse = np.unique(np.concatenate([one.codes for one in parts]), return_inverse=True)
    counts = np.zeros(codes.size, np.int64)
    np.add.at(counts, inverse, np.concatenate([one.counts for one in parts]))
    return Counted(codes, counts)


def _jagged(ids: Tensor) -> dict[str, JaggedTensor]:
    return {IDS: JaggedTensor(values=ids, lengths=torch.tensor([ids.numel()]))}


def _rows_of_slots(slots: Tensor, module: MCHManagedCollisionModule) -> Tensor:
    is_unknown = slots == module.output_size() - 1
    return torch.where(is_unknown, UNKNOWN_ROW, slots + NUM_RESERVED_ROWS)
