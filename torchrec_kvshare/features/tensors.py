"""Requests as plain named tensors, the inputs of an exported model in a host of any language.

Every feature is two tensors, its values and the number of values per row, as in TorchRec's
``KeyedJaggedTensor``, which the exported program builds itself.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchrec_kvshare.features.bags import floats_of, jagged
from torchrec_kvshare.features.batches import candidate_bags, context_bags, history_bags
from torchrec_kvshare.features.limits import MAX_BAG_IDS, MAX_TIME
from torchrec_kvshare.features.parse import MAX_CANDIDATES
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import (
    FIRST_EVENT,
    ITEM,
    TIME,
    USER,
    FeatureSchema,
    candidate_key,
    context_key,
    event_key,
    history_key,
    item_key,
)

USER_KEY = "user_key"
DENSE = candidate_key("dense")
INT64, FLOAT32 = "int64", "float32"


@dataclass(frozen=True)
class TensorSpec:
    """One input of an exported model.

    Attributes:
        name: key in the dictionary of inputs.
        dtype: ``int64`` or ``float32``.
        shape: sizes, -1 for a dynamic one.
        least: smallest allowed value; None for no limit.
        most: greatest allowed value; None for no limit.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    least: int | None
    most: int | None

    def to_json(self) -> dict[str, Any]:
        """Return the specification as a manifest holds it."""
        return vars(self) | {"shape": list(self.shape)}


def input_specs(schema: FeatureSchema) -> list[TensorSpec]:
    """Return the inputs of a model that reads these columns.

    ::

        # B requests with C candidates and T events of a history in total
        # user_key, user_id, time                                [B]
        # context.<column>.values, .lengths                      [ids], [B]
        # history.item_id.values, .lengths                       [T], [B]
        # history.<event attribute>, <event float>, time alike   [T], [B]
        # history.<attribute>.values, .lengths                   [ids], [T]
        # history.first_event                                    [B]
        # candidates.item_id.values, .lengths                    [C], [B]
        # candidates.<attribute>.values, .lengths                [ids], [C]
        # candidates.dense                                       [C, num_dense]

    Args:
        schema: the model's columns. Ids are table rows, events are cut to the windows, and
            ``first_event`` is the index of the first one among all of the history's.

    Returns:
        The specifications, in the order above.
    """

    def feature(key: str, column: str, max_length: int) -> list[TensorSpec]:
        most = MAX_TIME if column == TIME else schema.num_table_rows(column) - 1
        return [
            TensorSpec(f"{key}.values", INT64, (-1,), 0, most),
            TensorSpec(f"{key}.lengths", INT64, (-1,), 0, max_length),
        ]

    specs = [
        # A number per user. If two users share one, reuse is lost but scores stay right.
        TensorSpec(USER_KEY, INT64, (-1,), None, None),
        TensorSpec(USER, INT64, (-1,), 0, schema.num_table_rows(USER) - 1),
        TensorSpec(TIME, INT64, (-1,), 0, MAX_TIME),
    ]
    for column in schema.context:
        specs += feature(context_key(column), context_key(column), MAX_BAG_IDS)
    for history in schema.histories:
        max_history = history.window.max_history
        for column in schema.event_columns:
            specs += feature(history_key(history.name, column), event_key(column), max_history)
        for column in schema.event_floats:
            key = history_key(history.name, column)
            specs.append(TensorSpec(f"{key}.values", FLOAT32, (-1,), None, None))
            specs.append(TensorSpec(f"{key}.lengths", INT64, (-1,), 0, max_history))
        specs += feature(history_key(history.name, TIME), TIME, max_history)
        for column in schema.item_attributes:
            specs += feature(history_key(history.name, column), item_key(column), MAX_BAG_IDS)
        name = history_key(history.name, FIRST_EVENT)
        specs.append(TensorSpec(name, INT64, (-1,), 0, None))
    specs += feature(candidate_key(ITEM), ITEM, MAX_CANDIDATES)
    for column in schema.item_attributes:
        specs += feature(candidate_key(column), item_key(column), MAX_BAG_IDS)
    specs.append(TensorSpec(DENSE, FLOAT32, (-1, schema.num_dense), None, None))
    return specs


def request_tensors(requests: Sequence[Request], schema: FeatureSchema) -> dict[str, Tensor]:
    """Convert parsed requests to the inputs of ``input_specs``, in its order.

    Args:
        requests: at least one.
        schema: the model's columns.

    Returns:
        Tensors by name.
    """
    tensors = {
        USER_KEY: torch.tensor([user_key(request.user_id) for request in requests]),
        USER: torch.tensor([request.user_row for request in requests]),
        TIME: torch.tensor([request.time for request in requests]),
    }

    bags = context_bags(requests, schema) | candidate_bags(requests, schema)
    bags |= history_bags([request.events_by_history for request in requests], schema)
    bags[candidate_key(ITEM)] = jagged([request.candidate_items for request in requests])
    for key, (values, lengths) in bags.items():
        tensors[f"{key}.values"], tensors[f"{key}.lengths"] = values, lengths
    for history in schema.histories:
        for column in schema.event_floats:
            name = f"{history_key(history.name, column)}.values"
            tensors[name] = floats_of(tensors[name])
        events = [request.events_by_history[history.name] for request in requests]
        first_events = torch.tensor([one.first_event for one in events])
        tensors[history_key(history.name, FIRST_EVENT)] = first_events
    tensors[DENSE] = torch.cat([request.dense for request in requests])
    return {spec.name: tensors[spec.name] for spec in input_specs(schema)}


def user_key(user_id: str) -> int:
    """Return a signed 64-bit number for a canonical user id, the same in every process."""
    digest = hashlib.blake2b(user_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
