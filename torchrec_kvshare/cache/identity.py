"""What a piece of cached K/V is the K/V of: the model, the user and every event of the history.

The model's digest and that of the events must both match before K/V is used again. They are made of
bytes alone, so they are the same in every process and on every machine of one byte order.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from torchrec_kvshare.data.schema import FeatureSchema
from torchrec_kvshare.features import Events

DIGEST_BYTES = 16


def model_digest(state: Mapping[str, Tensor], description: Mapping[str, Any]) -> str:
    """Digest of weights, tables, architecture and window: whatever changes the K/V changes it.

    Args:
        state: the model's state dict.
        description: sizes, encoder and schema, as JSON values.

    Returns:
        Hexadecimal text.
    """
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class PrefixDigests:
    """Digests of what a history begins with, so that the longest part that is cached can be found.

    Args:
        events: the history, already cut to its window.
        schema: the model's columns, whose order the digests follow.
        block: events between two of ``blocks``.

    Attributes:
        num_events: of the whole history.
        first_event: its first event's place among all of the user's.

    Example:
        >>> import torch
        >>> from torchrec_kvshare.data.schema import FeatureSchema, History, Vocabulary, Window
        >>> histories = (History("history", Window(8, 4)),)
        >>> schema = FeatureSchema({}, (), False, (), (), histories)
        >>> times = torch.arange(5)
        >>> five = PrefixDigests(Events({"time": times}, {}, 0), schema, 2)
        >>> three = PrefixDigests(Events({"time": times[:3]}, {}, 0), schema, 2)
        >>> five.at(3) == three.at(3), len(five.blocks)
        (True, 2)
    """

    def __init__(self, events: Events, schema: FeatureSchema, block: int) -> None:
        self.num_events = events.num_events
        self.first_event = events.first_event
        self.block = block
        bags = [events.bags[column] for column in schema.item_attributes]
        columns = [events.columns[column] for column in sorted(events.columns)]
        columns += [bag.lengths for bag in bags]
        # Row by row, so that the first events are the first bytes; rows and times are below 2**32.
        rows = np.empty((events.num_events, len(columns)), dtype=np.uint32)
        for place, column in enumerate(columns):
            rows[:, place] = column.numpy()
        self._parts = [rows, *(bag.values.numpy().astype(np.uint32) for bag in bags)]

    @cached_property
    def whole(self) -> bytes:
        """Digest of all events."""
        return self.at(self.num_events)

    @cached_property
    def blocks(self) -> tuple[bytes, ...]:
        """Digests of the first ``block`` events, of twice as many, and so on."""
        states = [hashlib.blake2b(digest_size=DIGEST_BYTES) for _ in self._parts]
        digests = []
        for last in range(self.block, self.num_events + 1, self.block):
            for state, part, ends in zip(states, self._parts, self._ends, strict=True):
                state.update(part[ends[last - self.block] : ends[last]].data)
            digests.append(_joined(states, last))
        return tuple(digests)

    def at(self, num_events: int) -> bytes:
        """Digest of the first ``num_events`` events: 16 bytes."""
        parts = self._parts
        if num_events < self.num_events:
            parts = [part[: ends[num_events]] for part, ends in zip(parts, self._ends, strict=True)]
        states = [hashlib.blake2b(part.data, digest_size=DIGEST_BYTES) for part in parts]
        return _joined(states, num_events)

    @cached_property
    def _ends(self) -> list[Sequence[int]]:
        """For each part and number of events, where what belongs to these ends."""
        rows = self._parts[0]
        num_bags = len(self._parts) - 1
        lengths = rows[:, rows.shape[1] - num_bags :].T
        return [range(self.num_events + 1), *([0, *each.cumsum().tolist()] for each in lengths)]


def _joined(states: Sequence["hashlib.blake2b"], num_events: int) -> bytes:
    """With the number of events the end of each part is known: no two histories are the same."""
    joined = hashlib.blake2b(num_events.to_bytes(8, "little"), digest_size=DIGEST_BYTES)
    for state in states:
        joined.update(state.digest())
    return joined.digest()
