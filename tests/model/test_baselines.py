"""The baselines are what they are said to be, target by target."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch

from tests.oracle import exact_tables, reference_options
from tests.training.worlds import MODEL, tiny_config
from torchrec_kvshare.config import POOLED, SASREC, ModelConfig
from torchrec_kvshare.data.dataset import Dataset, Ints
from torchrec_kvshare.data.draws import Draws
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.data.targets import build_batch, sample_negatives, windows_of
from torchrec_kvshare.features.schema import HISTORY
from torchrec_kvshare.history.reference import reference_state
from torchrec_kvshare.model.baselines import SequentialModel
from torchrec_kvshare.training.run import load_data, new_model

NEGATIVES = 2
WIDER_TABLES = replace(MODEL, table_dim=24)
TOLERANCE = 2e-5  # float32 against float64


@pytest.fixture(scope="module")
def shards() -> Shards:
    return load_data(tiny_config(Path("unused")))


def batch_of(dataset: Dataset, targets: Ints) -> Batch:
    windows = windows_of(dataset, targets)
    negatives = sample_negatives(dataset, windows.targets, NEGATIVES, Draws(1))
    candidates = np.concatenate([dataset.item[windows.targets][:, None], negatives], axis=1)
    return build_batch(dataset, windows, candidates, None)


def token(dataset: Dataset, tables: dict[str, Tensor], event: int, *, with_action: bool) -> Tensor:
    """Return the sum of an event's columns, without its position."""
    item = dataset.item[event]
    category = dataset.item_attributes["category"].take(np.array([item]))[0]
    total = tables["token_item_id"][dataset.item_row[item]]
    total = total + tables["token_items_category"][category].sum(0)
    if with_action:
        [action] = dataset.event_attributes["action"].take(np.array([event]))
        total = total + tables["token_events_action"][action]
    return total


def test_pooled_is_the_mean_of_the_events_that_a_target_sees(shards: Shards) -> None:
    dataset = shards.read([0])
    model = new_model(shards.schema, MODEL, POOLED, seed=2).eval()
    collection = model.get_submodule("sparse_arch.embedding_bag_collection")
    first = int(dataset.user_offsets[2])
    targets = np.arange(first, first + 9)
    features = batch_of(dataset, targets).sparse_features
    pooled = collection(features).to_dict()[HISTORY].detach()
    tables = exact_tables(collection)
    for place, target in enumerate(targets.tolist()):
        seen = range(first, first + int(dataset.num_earlier[target]))
        tokens = [token(dataset, tables, event, with_action=True) for event in seen]
        expected = torch.stack(tokens).mean(0) if tokens else torch.zeros(MODEL.dim)
        rows = slice(place * (1 + NEGATIVES), (place + 1) * (1 + NEGATIVES))
        for row in pooled[rows]:
            torch.testing.assert_close(row.double(), expected.double(), rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("sizes", [MODEL, WIDER_TABLES])
def test_sasrec_is_the_state_of_a_user_times_the_vector_of_an_item(
    shards: Shards, sizes: ModelConfig
) -> None:
    dataset = shards.read([0])
    model = new_model(shards.schema, sizes, SASREC, seed=2).eval()
    assert isinstance(model, SequentialModel)
    first = int(dataset.user_offsets[2])
    targets = np.arange(first, first + 9)
    batch = batch_of(dataset, targets)
    logits = model(batch.dense_features, batch.sparse_features).detach()
    tower = model.histories.by_name()[HISTORY].tower
    assert tower.spec.num_layers == MODEL.num_layers + 1
    tables = exact_tables(model)  # type: ignore[arg-type]
    options = reference_options(tower.spec, shards.schema.histories[0])
    for place, target in enumerate(targets.tolist()):
        seen = range(first, first + int(dataset.num_earlier[target]))
        events = [
            token(dataset, tables, event, with_action=True) + tables["token_position_history"][at]
            for at, event in enumerate(seen)
        ]
        rows = torch.stack(events) if events else torch.zeros(0, sizes.table_dim or sizes.dim)
        times = dataset.time[list(seen)].tolist()
        state = reference_state(tower.state_dict(), options, rows, times)
        vector = token(dataset, tables, target, with_action=False)
        expected = float(state @ vector)
        assert float(logits[place * (1 + NEGATIVES), 0]) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("sizes", [MODEL, WIDER_TABLES])
@pytest.mark.parametrize("num_targets", [1, 40])
@pytest.mark.parametrize("kind", [POOLED, SASREC])
def test_all_that_is_trained_gets_a_gradient(
    shards: Shards, kind: str, num_targets: int, sizes: ModelConfig
) -> None:
    """DistributedDataParallel waits for the gradient of every parameter that asks for one.

    The first event of a user sees nothing: a batch of such events ended the training of sasrec.
    """
    dataset = shards.read([0])
    model = new_model(shards.schema, sizes, kind, seed=2)
    batch = batch_of(dataset, np.arange(num_targets))
    model(batch.dense_features, batch.sparse_features).square().sum().backward()
    missing = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    assert missing == []
