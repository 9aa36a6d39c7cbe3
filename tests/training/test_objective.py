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
from torchrec_kvshare.config import GBCE, IN_BATCH, POPULARITY, SASREC, SOFTMAX
from torchrec_kvshare.data.dataset import Dataset
from torchrec_kvshare.data.draws import Draws, Proposal
from torchrec_kvshare.data.shards import Shards, in_memory
from torchrec_kvshare.data.splits import TRAIN
from torchrec_kvshare.data.stream import SamplingSettings, StreamSettings, WindowStream
from torchrec_kvshare.data.targets import (
    Windows,
    build_batch,
    sample_negatives,
    sample_shared,
    windows_of,
)
from torchrec_kvshare.features.bags import floats_of
from torchrec_kvshare.features.schema import (
    DRAW_RATIO,
    HISTORY,
    ITEM,
    VECTOR,
    candidate_key,
    state_feature,
    visible_key,
)
from torchrec_kvshare.history.kinds import KINDS
from torchrec_kvshare.model.ranking import RankingStage, takes_prefixes
from torchrec_kvshare.training.objective import (
    Objective,
    ObjectiveSettings,
    gbce_loss,
    is_own_item,
    next_item_loss,
)
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
    q = torch.full([7], 1 / 7, dtype=torch.float64)
    found = next_item_loss(states, own, vectors, is_own_item(items, rows), q[:5], q)
    for target, p in enumerate(place):
        logits = [float(states[target] @ vector) for vector in vectors]
        expected = math.log(sum(math.exp(one) for one in logits)) - logits[p]
        assert float(found[target]) == pytest.approx(expected, abs=EXACT)


def test_a_drawn_item_stands_for_as_many_others_as_were_not_drawn() -> None:
    """Over all single draws the mean of the estimated sums is the sum over the catalogue."""
    states, vectors = drawn(2, 1, 3), drawn(3, 6, 3)
    item, rows = torch.tensor([4]), torch.arange(6)
    own = states[0] @ vectors[4]
    q = torch.full([1], 1 / 6, dtype=torch.float64)
    sums = []
    for row in (0, 1, 2, 3, 5):
        part = slice(row, row + 1)
        loss = next_item_loss(states, own[None], vectors[part], is_own_item(item, rows[part]), q, q)
        sums.append(math.exp(float(loss) + float(own)))
    expected = sum(math.exp(float(states[0] @ vector)) for vector in vectors)
    assert sum(sums) / 5 == pytest.approx(expected, rel=EXACT)


def test_the_own_item_among_the_draws_counts_once() -> None:
    states, vectors = drawn(4, 1, 3), drawn(5, 2, 3)
    own = states[0] @ vectors[0]
    item, rows = torch.tensor([8]), torch.tensor([8, 9, 8])
    three = vectors[[0, 1, 0]]
    q = torch.full([3], 1 / 2, dtype=torch.float64)
    found = next_item_loss(states, own[None], three, is_own_item(item, rows), q[:1], q)
    expected = torch.logsumexp(states[0] @ vectors.T, 0) - own
    assert float(found) == pytest.approx(float(expected), abs=EXACT)


def test_drawn_by_popularity_an_item_stands_for_the_more_the_rarer_it_is_drawn() -> None:
    """Over single draws of others the mean of the estimated sums is the sum over the catalogue."""
    states, vectors = drawn(6, 1, 3), drawn(7, 6, 3)
    item, rows = torch.tensor([4]), torch.arange(6)
    own = states[0] @ vectors[4]
    q = torch.tensor([0.3, 0.05, 0.2, 0.1, 0.25, 0.1], dtype=torch.float64)
    mean = 0.0
    for row in (0, 1, 2, 3, 5):
        part = slice(row, row + 1)
        is_own = is_own_item(item, rows[part])
        loss = next_item_loss(states, own[None], vectors[part], is_own, q[4:5], q[part])
        mean += float(q[row] / (1 - q[4])) * math.exp(float(loss) + float(own))
    expected = sum(math.exp(float(states[0] @ vector)) for vector in vectors)
    assert mean == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
def test_gbce_is_the_papers_loss_in_loops(t: float) -> None:
    states, vectors = drawn(8, 3, 4), drawn(9, 6, 4)
    items, rows = torch.tensor([21, 33, 40]), torch.tensor([20, 21, 22, 33, 21, 25])
    num_items = 31
    own = drawn(10, 3)
    q = torch.full([3], 1 / num_items, dtype=torch.float64)
    found = gbce_loss(states, own, vectors, is_own_item(items, rows), q, t)
    for target, item in enumerate(items.tolist()):
        negatives = [v for v, row in zip(vectors, rows.tolist(), strict=True) if row != item]
        alpha = len(negatives) / (num_items - 1)
        beta = alpha * (t * (1 - 1 / alpha) + 1 / alpha)
        total = beta * math.log(1 / (1 + math.exp(-float(own[target]))))
        for vector in negatives:
            total += math.log(1 - 1 / (1 + math.exp(-float(states[target] @ vector))))
        assert float(found[target]) == pytest.approx(-total / (1 + len(negatives)), abs=EXACT)


def test_gbce_of_the_whole_catalogue_is_binary_cross_entropy_for_every_t() -> None:
    states, vectors = drawn(11, 1, 3), drawn(12, 5, 3)
    is_own = is_own_item(torch.tensor([2]), torch.arange(5))
    logits = states @ vectors.T
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, is_own.double())
    q = torch.full([1], 1 / 5, dtype=torch.float64)
    for t in (0.0, 1.0):
        found = gbce_loss(states, logits[:, 2], vectors, is_own, q, t)
        assert float(found) == pytest.approx(float(expected), abs=EXACT)


def test_without_other_items_both_losses_are_finite() -> None:
    states, own, q = drawn(13, 2, 3), drawn(14, 2), torch.full([2], 0.5, dtype=torch.float64)
    is_own = torch.ones(2, 2, dtype=torch.bool)
    vectors = drawn(15, 2, 3)
    assert next_item_loss(states, own, vectors, is_own, q, q).tolist() == pytest.approx([0.0, 0.0])
    assert bool(gbce_loss(states, own, vectors, is_own, q, 0.75).isfinite().all())


def test_shared_items_are_drawn_by_popularity_with_their_probabilities(shards: Shards) -> None:
    dataset = shards.read([0])
    known = dataset.known_items
    weights = shards.num_training[known] ** 0.5
    proposal = Proposal(known, weights)
    targets = np.arange(7)
    drawn_items = []
    for batch in range(500):
        shared = sample_shared(dataset, targets, 9, DRAWS, batch, proposal)
        drawn_items.append(shared.items)
    expected = weights / weights.sum()
    counts = np.bincount(np.concatenate(drawn_items), minlength=len(dataset.item_row))[known]
    assert np.abs(counts - 4500 * expected).max() < 5 * (4500 * expected.max()) ** 0.5
    assert np.corrcoef(counts, expected)[0, 1] > 0.9
    by_item = dict(zip(known.tolist(), expected.tolist(), strict=True))
    for found, items in (
        (shared.probability, shared.items),
        (shared.of_targets, dataset.item[targets]),
    ):
        assert found.tolist() == pytest.approx([by_item[item] for item in items.tolist()])
    whole = sample_shared(dataset, targets, len(known), DRAWS, 0, proposal)
    assert whole.probability.tolist() == [1 / len(known)] * len(known)


@pytest.mark.parametrize("loss", [SOFTMAX, GBCE])
@torch.no_grad()
def test_the_objective_gives_the_loss_what_the_batch_says(shards: Shards, loss: str) -> None:
    """Against loops over the targets, in float64, of draws by popularity or all alike."""
    dataset = shards.read([0])
    windows = windows_of(dataset, np.flatnonzero(dataset.split == TRAIN)[1:21])
    known = dataset.known_items
    q = np.full(len(known), 1 / len(known))
    proposal = None
    if loss == SOFTMAX:
        proposal = Proposal(known, shards.num_training[known].astype(np.float64))
        q = shards.num_training[known] / shards.num_training.sum()
    shared = sample_shared(dataset, windows.targets, 11, DRAWS, 0, proposal)
    negatives = sample_negatives(dataset, windows.targets, NEGATIVES, DRAWS)
    candidates = np.concatenate([dataset.item[windows.targets][:, None], negatives], axis=1)
    batch = build_batch(dataset, windows, candidates, None, shared)
    model = plain_model("causal", shards).model.eval()
    settings = ObjectiveSettings(next_event=2.0, loss=loss, gbce_t=0.6)
    objective = Objective(
        model, settings, histories=[HISTORY], tasks=shards.schema.tasks, negatives=NEGATIVES
    )
    total, (_, logits, labels) = objective(batch)
    predicted = RankingStage(model).predict(batch.dense_features, batch.sparse_features)
    states = predicted.pooled[state_feature(HISTORY)][:: 1 + NEGATIVES].double()
    own_vectors = predicted.pooled[VECTOR][:: 1 + NEGATIVES].double()
    visible = batch.sparse_features[visible_key(HISTORY)].values()[:: 1 + NEGATIVES]
    losses = []
    for place, item in enumerate(dataset.item[windows.targets].tolist()):
        if batch.labels[place * (1 + NEGATIVES)] == 0 or visible[place] == 0:
            losses.append(0.0)
            continue
        positive = float(states[place] @ own_vectors[place])
        others = [
            (float(states[place] @ vector), q[np.searchsorted(known, code)])
            for vector, code in zip(predicted.shared.double(), shared.items.tolist(), strict=True)
            if code != item
        ]
        of_own = q[np.searchsorted(known, item)]
        if loss == SOFTMAX:
            rest = sum(math.exp(one) * (1 - of_own) / (len(others) * p) for one, p in others)
            losses.append(math.log(math.exp(positive) + rest) - positive)
        else:
            beta = 1 - 0.6 * (1 - len(others) / (len(known) - 1))
            terms = [beta * math.log1p(math.exp(-positive))]
            terms += [math.log1p(math.exp(one)) for one, _ in others]
            losses.append(sum(terms) / len(terms))
    ranking = torch.nn.BCEWithLogitsLoss()(logits, labels)
    assert len(set(losses)) > 5
    assert float(total.detach() - ranking) == pytest.approx(2.0 * np.mean(losses), abs=2e-5)


@pytest.mark.parametrize("sampling", [POPULARITY, IN_BATCH])
@torch.no_grad()
def test_scores_mean_the_same_whatever_negatives_are_drawn_from(
    shards: Shards, sampling: str
) -> None:
    """Scores of a model trained on popular negatives were low for popular items: they ranked worse
    than they were, and NE and calibration told of another task.

    An item with probability p of being the target's own, drawn with probability q as each of K
    negatives, has the trained logit log p / (K q); subtracting log q I, of I items, the score is
    log p I / K, as with negatives that are all alike.
    """
    stream = WindowStream(
        shards,
        StreamSettings(40, NEGATIVES, 1, sampling=SamplingSettings(sampling, popularity_power=0.5)),
    )
    chosen = stream.epoch(0).chosen[0]
    batch = stream.batch(chosen, 0, 0)
    model = plain_model("causal", shards).model.eval()
    objective = Objective(
        model,
        ObjectiveSettings(),
        histories=[HISTORY],
        tasks=shards.schema.tasks,
        negatives=NEGATIVES,
        has_draw_ratios=True,
    )
    loss, (_, logits, labels) = objective(batch)
    power = 0.5 if sampling == POPULARITY else 1.0
    known = shards.shared.known_items
    weight_by_row = dict(
        zip(
            shards.read([0]).item_row[known].tolist(),
            (shards.num_training[known] ** power).tolist(),
            strict=True,
        )
    )
    total = sum(weight_by_row.values())
    losses = []
    rows = batch.sparse_features[candidate_key(ITEM)].values().tolist()
    ratios = floats_of(batch.sparse_features[DRAW_RATIO].values()).tolist()
    for row, logit, label, ratio in zip(rows, logits, labels, ratios, strict=True):
        if row in weight_by_row:  # Training shows some ids as unknown.
            expected = math.log(weight_by_row[row] / total * len(known))
            assert ratio == pytest.approx(expected, abs=1e-6)
        trained = float(logit) - ratio
        losses.append(math.log1p(math.exp(trained if not label else -trained)))
    assert len(set(ratios)) > 5
    assert float(loss) == pytest.approx(np.mean(losses), abs=1e-6)


def test_all_targets_of_a_batch_share_the_catalogue_or_uniform_draws(shards: Shards) -> None:
    dataset = shards.read([0])
    targets = np.arange(5)
    whole = sample_shared(dataset, targets, len(dataset.known_items), DRAWS, batch=2)
    assert whole.items.tolist() == dataset.known_items.tolist()
    assert whole.probability.tolist() == [1 / len(dataset.known_items)] * len(whole.items)
    few = [sample_shared(dataset, targets, 9, DRAWS, batch).items for batch in range(400)]
    counts = np.bincount(np.concatenate(few), minlength=len(dataset.item_row))
    assert counts[dataset.known_items].sum() == 400 * 9
    expected = 400 * 9 / len(dataset.known_items)
    # Five standard deviations of a binomial count.
    assert np.abs(counts[dataset.known_items] - expected).max() < 5 * expected**0.5
    assert (few[3] == sample_shared(dataset, targets, 9, DRAWS, 3).items).all()


def batch_of(dataset: Dataset, windows: Windows) -> Batch:
    negatives = sample_negatives(dataset, windows.targets, NEGATIVES, DRAWS)
    candidates = np.concatenate([dataset.item[windows.targets][:, None], negatives], axis=1)
    shared = sample_shared(dataset, windows.targets, len(dataset.known_items), DRAWS, 0)
    return build_batch(dataset, windows, candidates, None, shared)


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
    expected_logits = objective.model(batch.dense_features, batch.sparse_features)
    assert torch.equal(logits, expected_logits)


def test_sasrec_learns_the_next_item_whatever_the_weight_of_others(shards: Shards) -> None:
    """With ``next_event=0`` it was trained with the ranking loss."""
    dataset = shards.read([0])
    batch = batch_of(dataset, windows_of(dataset, np.flatnonzero(dataset.split == TRAIN)[:20]))
    model = new_model(shards.schema, MODEL, SASREC, seed=2).eval()
    losses = [
        Objective(
            model,
            ObjectiveSettings(next_event=weight),
            histories=[HISTORY],
            tasks=shards.schema.tasks,
            negatives=NEGATIVES,
        )(batch)[0].detach()
        for weight in (0.0, 0.5)
    ]
    assert losses[0] == losses[1]
    # Untrained, it is near that of a guess among all items.
    assert 0.5 < float(losses[0]) / math.log(len(dataset.known_items)) < 2.0


def test_without_the_next_event_loss_the_objective_is_torchrecs(shards: Shards) -> None:
    dataset = shards.read([0])
    batch = batch_of(dataset, windows_of(dataset, np.flatnonzero(dataset.split == TRAIN)[:20]))
    model = plain_model("causal", shards).model.eval()
    given = {"histories": [], "tasks": shards.schema.tasks, "negatives": 3}
    objective = Objective(model, ObjectiveSettings(), **given)
    loss, (_, logits, _) = objective(batch)
    batch.labels = batch.labels.squeeze(1)
    expected, (_, expected_logits, _) = DLRMTrain(model)(batch)
    assert torch.equal(loss, expected)
    assert torch.equal(logits.squeeze(1), expected_logits)
