"""The expected logits of a whole ranking model, from raw requests, in float64 and one by one.

Rows, windows, tokens, sums and clocks are implemented a second time here; the history is the
package's float64 reference; the ranking stage after the collection is TorchRec's, in double
precision.
"""

import copy
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

import torch
from torch import Tensor, nn
from torchrec.sparse.jagged_tensor import KeyedTensor

from torchrec_kvshare.features.schema import FeatureSchema, History, table_name
from torchrec_kvshare.history.kinds import TowerSpec
from torchrec_kvshare.history.reference import (
    ReferenceOptions,
    reference_state,
    reference_tower,
)
from torchrec_kvshare.model.collection import KVShareEmbeddingBagCollection

NO_WEIGHTS: Mapping[str, list[list[float]]] = {}


class GivenFeatures(nn.Module):
    """Replaces the collection and returns features that were computed elsewhere."""

    def __init__(self, keys: list[str], rows: Tensor) -> None:
        super().__init__()
        self.keys = keys
        self.rows = rows  # [N, F, E]

    def forward(self, _: Any) -> KeyedTensor:
        widths = [self.rows.size(2)] * len(self.keys)
        return KeyedTensor(self.keys, widths, self.rows.flatten(1))


def reference_logits(
    model: nn.Module,
    schema: FeatureSchema,
    raw: dict[str, Any],
    weights_by_key: Mapping[str, list[list[float]]] = NO_WEIGHTS,
) -> Tensor:
    """Return the logits of one raw request, [N, tasks] float64.

    ``weights_by_key`` has those of each candidate's ids, for keys of weighted bags.
    """
    collection = model.sparse_arch.embedding_bag_collection
    keys = [key for config in collection.embedding_bag_configs() for key in config.feature_names]
    rows = []
    for index in range(len(raw["candidates"]["item_id"])):
        weights = {key: of_candidates[index] for key, of_candidates in weights_by_key.items()}
        feature_by_key = reference_features(collection, schema, raw, index, weights)
        assert set(feature_by_key) == set(keys)
        rows.append(torch.stack([feature_by_key[key] for key in keys]))
    ranker = copy.deepcopy(model).double()
    ranker.sparse_arch.embedding_bag_collection = GivenFeatures(keys, torch.stack(rows))
    dense = [reference_dense(schema, raw, index) for index in range(len(rows))]
    # Dense features reach the model as float32: their rounding is part of the input.
    with torch.no_grad():
        return ranker(torch.tensor(dense, dtype=torch.float32).double(), None)


def reference_features(
    collection: KVShareEmbeddingBagCollection,
    schema: FeatureSchema,
    raw: dict[str, Any],
    index: int,
    weights_by_key: Mapping[str, list[float]],
) -> dict[str, Tensor]:
    """Return every pooled feature of one candidate, [E] float64, by key."""
    tables = exact_tables(collection)
    cells_by_key = {"user_id": ("user_id", [raw["user_id"]])}
    for column in schema.context:
        cells_by_key[f"context.{column}"] = (f"context.{column}", raw["context"][column])
    candidates = raw["candidates"]
    cells_by_key["candidates.item_id"] = ("item_id", [candidates["item_id"][index]])
    for column in schema.item_attributes:
        cells_by_key[f"candidates.{column}"] = (f"items.{column}", candidates[column][index])
    feature_by_key = {
        key: _rows(tables[f"bag_{table_name(of)}"], schema, of, cells, weights_by_key.get(key))
        for key, (of, cells) in cells_by_key.items()
    }
    for history_index in range(len(schema.histories)):
        feature_by_key |= reference_history(collection, schema, raw, index, history_index)
    if any(tower.spec.has_state for tower in collection.towers()):
        vector = sum(
            _rows(tables[f"vector_{table_name(of)}"], schema, of, cells)
            for key, (of, cells) in cells_by_key.items()
            if key.startswith("candidates.")
        )
        projection = collection.histories.item_vectors.projection
        if isinstance(projection, nn.Linear):
            vector = (
                projection.weight.detach().double() @ vector + projection.bias.detach().double()
            )
        feature_by_key["candidates.vector"] = vector
    return feature_by_key


def exact_tables(collection: KVShareEmbeddingBagCollection) -> dict[str, Tensor]:
    """Return every embedding table of the collection in float64, by name."""
    table_by_name = {}
    for name, weight in collection.state_dict().items():
        *_, table, _ = name.split(".")
        if table.startswith(("bag_", "token_", "vector_")):
            table_by_name[table] = weight.double()
    return table_by_name


def reference_history(
    collection: KVShareEmbeddingBagCollection,
    schema: FeatureSchema,
    raw: dict[str, Any],
    index: int,
    history_index: int = 0,
) -> dict[str, Tensor]:
    """Return the features [E] float64 of one history for one candidate, by key.

    They are the pooled history and, with states, the user's state.
    """
    described, tower = schema.histories[history_index], collection.towers()[history_index]
    history = raw["history"]
    read = [
        event
        for event in range(len(history["time"]))
        if not described.actions or history["action"][event] in described.actions
    ]
    first = 0
    while len(read) - first > described.window.max_history:
        first += described.window.block
    tables = exact_tables(collection)
    positions = tables.get(f"token_position_{table_name(described.name)}")
    floats = collection.histories.poolings[history_index].event_floats
    events = []
    for position, event in enumerate(read[first:]):
        token = torch.zeros(tower.spec.token_width, dtype=torch.float64)
        if positions is not None:
            token = token + positions[position]
        for column in schema.event_columns:
            of = column if column == "item_id" else f"events.{column}"
            cells = [history[column][event]]
            token = token + _rows(tables[f"token_{table_name(of)}"], schema, of, cells)
        for column in schema.item_attributes:
            of = f"items.{column}"
            token = token + _rows(
                tables[f"token_{table_name(of)}"], schema, of, history[column][event]
            )
        for number, column in enumerate(schema.event_floats):
            weight = floats[0].weight[number].detach().double()
            token = token + _squashed(history[column][event]) * weight
        events.append(token)
    item = raw["candidates"]["item_id"][index]
    tokens = [_rows(tables["token_item_id"], schema, "item_id", [item])]
    for column in schema.item_attributes:
        of, cell = f"items.{column}", raw["candidates"][column][index]
        tokens.append(_rows(tables[f"token_{table_name(of)}"], schema, of, cell))
    candidate = torch.stack(tokens)
    if tower.spec.num_tokens == 1:
        candidate = candidate.sum(0, keepdim=True)
    seen = torch.stack(events) if events else torch.empty(0, tower.spec.token_width)
    times = [history["time"][event] for event in read[first:]]
    options = reference_options(tower.spec, described)
    parameters = tower.state_dict()
    pooled = reference_tower(parameters, options, seen, times, candidate, raw["time"])
    if not tower.spec.has_state:
        return {described.name: pooled}
    return {
        described.name: pooled,
        f"{described.name}.state": reference_state(parameters, options, seen, times),
    }


def reference_options(spec: TowerSpec, history: History) -> ReferenceOptions:
    """Return the options of a tower for the reference."""
    return ReferenceOptions(
        spec.kind,
        spec.num_heads,
        sliding=spec.window or None,
        max_history=spec.window or history.window.max_history,
        merge=spec.merge,
        recent=spec.recent,
        block=history.window.block,
    )


def reference_dense(schema: FeatureSchema, raw: dict[str, Any], index: int) -> list[float]:
    """Return a candidate's dense features: two clocks on unit circles, then squashed floats of the
    request and of the candidate."""
    moment = datetime.fromtimestamp(raw["time"], tz=timezone.utc)
    seconds = moment.hour * 3600 + moment.minute * 60 + moment.second
    hour = 2 * math.pi * seconds / 86_400
    weekday = 2 * math.pi * moment.weekday() / 7
    dense = [math.sin(hour), math.cos(hour), math.sin(weekday), math.cos(weekday)]
    values = [raw["context"][column] for column in schema.context_floats]
    values += [raw["candidates"][column][index] for column in schema.item_floats]
    return dense + [math.copysign(math.log(1 + abs(value)), value) for value in values]


def _squashed(value: float) -> float:
    """Return a float as history rows read it: its rounding to float32 is part of the input."""
    return float(torch.tensor(math.copysign(math.log(1 + abs(value)), value)))


def _rows(
    table: Tensor,
    schema: FeatureSchema,
    column: str,
    cells: list[Any],
    weights: list[float] | None = None,
) -> Tensor:
    """Return the sum of a bag's rows, [E]. Row 0 is for missing ids, row 1 for unknown ids."""
    known = list(schema.vocabulary_by_column[column].examples)
    total = torch.zeros(table.size(1), dtype=torch.float64)
    for cell, weight in zip(cells, weights or [1.0] * len(cells), strict=True):
        row = 0 if cell is None else 1
        if cell is not None and str(cell) in known:
            row = 2 + known.index(str(cell))
        total = total + weight * table[row]
    return total
