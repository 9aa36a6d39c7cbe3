"""The next-event loss: what it is, what it sees, and that it leaves nothing else changed."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRMTrain

from tests.training.on_ranks import NEGATIVES, plain_model
from tests.training.worlds import MODEL, tiny_config
from torchrec_kvshare.config import SASREC
from torchrec_kvshare.data.dataset import Dataset
from torchrec_kvshare.data.draws import Draws
from torchrec_kvshare.data.shards import Shards, in_memory
from torchrec_kvshare.data.splits import TRAIN
from torchrec_kvshare.data.targets import (
    Windows,
    build_batch,
    sample_negatives,
    sample_shared,
    windows_of,
)
from torchrec_kvshare.features.schema import HISTORY, ITEM, candidate_key, state_feature
from torchrec_kvshare.history.kinds import KINDS
from torchrec_kvshare.model.ranking import RankingStage, takes_prefixes
from torchrec_kvshare.training.objective import Objective, ObjectiveSettings, next_item_loss
from torchrec_kvshare.training.run import load_data, new_model

# Two float64 sums of the same terms.
EXACT = 1e-12
DRAWS = Draws(3)


@pytest.fixture(scope="module")
def shards() -> Shards:
    return load_data(tiny_config(Path("unused")))


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_over_the_whole_catalogue_the_loss_is_cross_entropy() -> None:
    states, vectors = drawn(0, 5, 3), drawn(1, 7, 3)
    rows = torch.tensor([12, 10, 16, 11, 15, 13, 14])  # of the catalogue, in any order
    items = torch.tensor([11, 16, 10, 10, 15])
    place = [rows.tolist().index(item) for item in items.tolist()]
    own = torch.stack([states[i] @ vectors[p] for i, p in enumerate(place)])
    found = next_item_loss(states, own, vectors, items, rows, num_items=7)
    for target, p in enumerate(place):
        logits = [float(states[target] @ vector) for vector in vectors]
        expected = math.log(sum(math.exp(one) for one in logits)) - logits[p]
        assert float(found[target]) == pytest.approx(expected, abs=EXACT)


def test_a_drawn_item_stands_for_as_many_others_as_were_not_drawn() -> None:
    """Over all single draws the mean of the estimated sums is the sum over the catalogue."""
    states, vectors = drawn(2, 1, 3), drawn(3, 6, 3)
    item, rows = torch.tensor([4]), torch.arange(6)
    own = states[0] @ vectors[4]
    sums = []
    for row in (0, 1, 2, 3, 5):
        part = slice(row, row + 1)
        loss = next_item_loss(states, own[None], vectors[part], item, rows[part], num_items=6)
        sums.append(math.exp(float(loss) + float(own)))
    expected = sum(math.exp(float(states[0] @ vector)) for vector in vectors)
    assert sum(sums) / 5 == pytest.approx(expected, rel=EXACT)


def test_the_own_item_among_the_draws_counts_once() -> None:
    states, vectors = drawn(4, 1, 3), drawn(5, 2, 3)
    own = states[0] @ vectors[0]
    item, rows = torch.tensor([8]), torch.tensor([8, 9, 8])
    three = vectors[[0, 1, 0]]
    found = next_item_loss(states, own[None], three, item, rows, num_items=2)
    expected = torch.logsumexp(states[0] @ vectors.T, 0) - own
    assert float(found) == pytest.approx(float(expected), abs=EXACT)


def test_all_targets_of_a_batch_share_the_catalogue_or_uniform_draws(shards: Shards) -> None:
    dataset = shards.read([0])
    whole = sample_shared(dataset, len(dataset.known_items), DRAWS, batch=2)
    assert whole.tolist() == dataset.known_items.tolist()
    few = [sample_shared(dataset, 9, DRAWS, batch) for batch in range(400)]
    counts = np.bincount(np.concatenate(few), minlength=len(dataset.item_row))
    assert counts[dataset.known_items].sum() == 400 * 9
    expected = 400 * 9 / len(dataset.known_items)
    # Five standard deviations of a binomial count.
    assert np.abs(counts[dataset.known_items] - expected).max() < 5 * expected**0.5
    assert (few[3] == sample_shared(dataset, 9, DRAWS, 3)).all()


def batch_of(dataset: Dataset, windows: Windows) -> Batch:
    negatives = sample_negatives(dataset, windows.targets, NEGATIVES, DRAWS)
    candidates = np.concatenate([dataset.item[windows.targets][:, None], negatives], axis=1)
    return build_batch(dataset, windows, candidates, None, dataset.known_items)


def with_item(dataset: Dataset, event: int) -> Dataset:
    """Return the data set with another item at an event."""
    item = dataset.item.copy()
    item[event] = dataset.known_items[dataset.known_items != item[event]][5]
    return replace(dataset, item=item)


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_depends_on_strictly_earlier_events_alone(shards: Shards, kind: str) -> None:
    """A leak: a target's own event, one at its time, or a later one would be an easy answer."""
    dataset = tied(shards.read([0]))
    target = int(dataset.user_offsets[3] + 7)
    assert dataset.num_earlier[target] == 5  # Events 5 to 7 of this user have one time.
    model = plain_model(kind, in_memory(dataset)).eval()
    stage = RankingStage(model.model)

    def state_of_target(changed: Dataset) -> Tensor:
        first = dataset.user_offsets[3]
        targets = np.arange(first, first + 12)
        share_prefill = takes_prefixes(model.model)
        windows = windows_of(changed, targets, share_prefill=share_prefill)
        if not share_prefill:
            [chosen] = np.flatnonzero([target in part for part in parts_of(windows)])
            windows = windows.take(np.array([chosen]))
        batch = batch_of(changed, windows)
        pooled = stage.predict(batch.dense_features, batch.sparse_features).pooled
        place = windows.targets.tolist().index(target)
        return pooled[state_feature(HISTORY)][place * (1 + NEGATIVES)].detach()

    before = state_of_target(dataset)
    for event in (target - 2, target - 1, target, target + 1, target + 4):
        assert torch.equal(state_of_target(with_item(dataset, event)), before)
    assert not torch.allclose(state_of_target(with_item(dataset, target - 3)), before, atol=1e-4)


def parts_of(windows: Windows) -> list[list[int]]:
    """Return the targets of each window."""
    ends = np.cumsum(windows.num_targets)[:-1]
    return [part.tolist() for part in np.split(windows.targets, ends)]


def tied(dataset: Dataset) -> Dataset:
    """Return the data set with three events of user 3 at one time."""
    first = dataset.user_offsets[3] + 5
    time, earlier = dataset.time.copy(), dataset.num_earlier.copy()
    time[first : first + 3] = time[first]
    earlier[first : first + 3] = 5
    return replace(dataset, time=time, num_earlier=earlier)


@pytest.mark.parametrize("changed", ["negative", "unknown"])
def test_a_target_that_nobody_should_predict_has_no_loss(shards: Shards, changed: str) -> None:
    """The item of a negative event, and one that is shown as unknown, are no next items."""
    dataset = shards.read([0])
    targets = np.flatnonzero(dataset.split == TRAIN)[1:30]
    batch = batch_of(dataset, windows_of(dataset, targets))
    objective = plain_model("causal", shards).eval()
    objective.weight = 1.0

    def next_event(batch: Batch) -> float:
        loss, (_, logits, labels) = objective(batch)
        ranking = torch.nn.BCEWithLogitsLoss()(logits, labels)
        return float((loss - ranking).detach()) * len(targets)

    whole = next_event(batch)
    if changed == "negative":
        batch.labels[:] = 0.0
    else:
        keys = batch.sparse_features.keys()
        parts = batch.sparse_features.values().split(batch.sparse_features.length_per_key())
        parts[keys.index(candidate_key(ITEM))][:] = 1
    assert whole > 1.0
    assert next_event(batch) == pytest.approx(0.0, abs=1e-4)


def test_the_objective_has_the_logits_of_its_model(shards: Shards) -> None:
    dataset = shards.read([0])
    targets = np.flatnonzero(dataset.split == TRAIN)[:20]
    batch = batch_of(dataset, windows_of(dataset, targets))
    objective = plain_model("causal", shards).eval()
    loss, (detached, logits, labels) = objective(batch)
    assert detached == loss > torch.nn.BCEWithLogitsLoss()(logits, labels)
    expected_logits = objective.model(batch.dense_features, batch.sparse_features).squeeze(1)
    assert torch.equal(logits, expected_logits)


def test_sasrec_learns_the_next_item_whatever_the_weight_of_others(shards: Shards) -> None:
    """With ``next_event=0`` it was trained with the ranking loss."""
    dataset = shards.read([0])
    batch = batch_of(dataset, windows_of(dataset, np.flatnonzero(dataset.split == TRAIN)[:20]))
    model = new_model(shards.schema, MODEL, SASREC, seed=2).eval()
    num_items = len(dataset.known_items)
    losses = [
        Objective(
            model,
            ObjectiveSettings(next_event=weight),
            histories=[HISTORY],
            negatives=NEGATIVES,
            num_items=num_items,
        )(batch)[0].detach()
        for weight in (0.0, 0.5)
    ]
    assert losses[0] == losses[1]
    # Untrained, it is near that of a guess among all items.
    assert 0.5 < float(losses[0]) / math.log(num_items) < 2.0


def test_without_the_next_event_loss_the_objective_is_torchrecs(shards: Shards) -> None:
    dataset = shards.read([0])
    batch = batch_of(dataset, windows_of(dataset, np.flatnonzero(dataset.split == TRAIN)[:20]))
    model = plain_model("causal", shards).model.eval()
    objective = Objective(model, ObjectiveSettings(), histories=[], negatives=3, num_items=9)
    loss, (_, logits, _) = objective(batch)
    expected, (_, expected_logits, _) = DLRMTrain(model)(batch)
    assert torch.equal(loss, expected)
    assert torch.equal(logits, expected_logits)
