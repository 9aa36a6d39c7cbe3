"""Batches are the same whatever the number of ranks and workers, and wherever a run resumes."""

import os
import signal
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchrec.datasets.utils import Batch

from tests.data.folders import write_folder
from tests.data.logs import all_events
from torchrec_kvshare.config import IN_BATCH, POPULARITY, UNIFORM
from torchrec_kvshare.data.dataset import Dataset, build_dataset
from torchrec_kvshare.data.requests import make_requests
from torchrec_kvshare.data.shards import Shards, in_memory, open_prepared
from torchrec_kvshare.data.split_report import split_report
from torchrec_kvshare.data.splits import TEST
from torchrec_kvshare.data.stream import (
    Loading,
    SamplingSettings,
    StreamSettings,
    WindowStream,
    worker_errors,
)
from torchrec_kvshare.data.synthetic import synthetic_world
from torchrec_kvshare.errors import DataError
from torchrec_kvshare.features.schema import (
    ITEM,
    SHARED_PROBABILITY,
    TARGET_PROBABILITY,
    UNKNOWN_ROW,
    USER,
    candidate_key,
    shared_key,
)
from torchrec_kvshare.training.evaluate import evaluate_sampled
from torchrec_kvshare.training.ranking import RankingSettings, rank_held_out

HISTORIES = all_events(16, 4)
BATCH_TARGETS, NEGATIVES, SEED = 24, 2, 5
by_sampling = pytest.mark.parametrize(
    "sampling",
    [
        SamplingSettings(),
        SamplingSettings(POPULARITY, POPULARITY),
        SamplingSettings(IN_BATCH, UNIFORM),
    ],
    ids=lambda sampling: sampling.negatives,
)


@pytest.fixture(scope="module")
def one() -> Shards:
    """The log in memory: one shard."""
    return in_memory(build_dataset(synthetic_world(31, 26, 40, 5, seed=1), HISTORIES))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stream") / "folder"
    return write_folder(synthetic_world(31, 26, 40, 5, seed=1), path, 6)


@pytest.fixture(scope="module")
def six(folder: Path) -> Shards:
    """The same log, in six shards."""
    return open_prepared(folder, HISTORIES)


def stream_of(shards: Shards, **changes: Any) -> WindowStream:
    settings = {"shuffle_shards": 2, "shared_items": 7} | changes
    return WindowStream(shards, StreamSettings(BATCH_TARGETS, NEGATIVES, SEED, **settings))


def tensors_of(batch: Batch) -> list[Tensor]:
    features = batch.sparse_features
    keys, inverse = features.inverse_indices()
    return [
        *(features.values(), features.lengths(), inverse, batch.dense_features, batch.labels),
        torch.tensor([len(key) for key in keys]),
    ]


def assert_same_batches(found: list[Batch], expected: list[Batch]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for one, other in zip(tensors_of(ours), tensors_of(theirs), strict=True):
            assert torch.equal(one, other)


def test_ranks_have_as_much_to_do_in_a_large_batch(
    one: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks waited in every batch for the one whose users happened to have more targets in it."""
    monkeypatch.setattr("torchrec_kvshare.data.stream.LANE_TARGETS", 36)
    stream = WindowStream(one, StreamSettings(2 * 36, NEGATIVES, SEED))
    batches = stream.epoch(3).chosen
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(stream.user)))
    largest = int(stream.num_targets.max())
    assert largest <= 18
    shares = np.array(
        [
            [stream.num_targets[part[stream.user[part] % 2 == rank]].sum() for rank in range(2)]
            for part in batches
        ]
    )
    both = shares[: (shares > 0).all(1).argmin()]  # In the last batches one lane has none left.
    assert len(both) > 5
    assert np.abs(np.diff(both.cumsum(0), axis=1)).max() < largest


def windows_of_user(stream: WindowStream) -> dict[int, list[int]]:
    """Return the number of targets of each window, by user code."""
    found: dict[int, list[int]] = {}
    for user, count in zip(stream.user.tolist(), stream.num_targets.tolist(), strict=True):
        found.setdefault(user, []).append(count)
    return found


# --- the order


def test_one_shard_is_shuffled_as_a_whole(one: Shards) -> None:
    """The order of runs in memory is that of runs before there were shards."""
    stream = stream_of(one)
    for epoch in (0, 3):
        order = np.random.default_rng([SEED, epoch]).permutation(len(stream.user))
        assert np.concatenate(stream.epoch(epoch).chosen).tolist() == order.tolist()


def test_shards_have_the_windows_of_the_log(one: Shards, six: Shards) -> None:
    assert windows_of_user(stream_of(six)) == windows_of_user(stream_of(one))


@pytest.mark.parametrize("shuffle_shards", [1, 2, 4, 6, 9])
def test_an_epoch_has_every_window_once_group_by_group(six: Shards, shuffle_shards: int) -> None:
    stream = stream_of(six, shuffle_shards=shuffle_shards)
    epoch = stream.epoch(1)
    order = np.concatenate(epoch.chosen)
    assert sorted(order.tolist()) == list(range(len(stream.user)))
    assert order.tolist() != sorted(order.tolist())
    groups: list[list[int]] = []
    for chosen, held in zip(epoch.chosen, epoch.held, strict=True):
        shards = stream.user[chosen] % 6
        assert set(shards.tolist()) <= set(held)
        if not groups or groups[-1] != held:
            groups.append(held)
    assert sorted(shard for group in groups for shard in group) == list(range(6))
    assert max(map(len, groups)) == min(6, shuffle_shards)
    sizes = [epoch.num_targets(index) for index in range(len(epoch))]
    assert sum(sizes) == stream.num_targets.sum()
    # Batches are full, but for those that end a group.
    assert sum(sizes) / BATCH_TARGETS <= len(sizes) < sum(sizes) / BATCH_TARGETS + len(groups)


def test_epochs_and_seeds_have_orders_of_their_own(six: Shards) -> None:
    stream = stream_of(six)
    orders = [np.concatenate(stream.epoch(number).chosen).tolist() for number in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    assert len({tuple(map(tuple, stream.epoch(number).held)) for number in range(4)}) > 1
    again = stream_of(six).epoch(2)
    assert np.concatenate(again.chosen).tolist() == orders[2]


# --- who builds the batches


@by_sampling
@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_are_the_same_from_any_number_of_workers(
    six: Shards, workers: int, sampling: SamplingSettings
) -> None:
    stream = stream_of(six, sampling=sampling)
    epoch = stream.epoch(1)
    expected = [stream.batch(chosen, 1, index) for index, chosen in enumerate(epoch.chosen)]
    assert len(expected) > 20
    found = list(stream_of(six, sampling=sampling).epoch(1).load(0, Loading(workers)))
    assert_same_batches(found, expected)


def test_workers_build_batches_of_a_log_in_memory(one: Shards) -> None:
    epoch = stream_of(one).epoch(0)
    assert_same_batches(list(epoch.load(0, Loading(2))), list(epoch.load(0, Loading())))


@by_sampling
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_epoch_goes_on_with_the_same_batches(
    six: Shards, workers: int, sampling: SamplingSettings
) -> None:
    expected = list(stream_of(six, sampling=sampling).epoch(1).load(0, Loading()))
    for first in (1, 11, len(expected) - 1, len(expected)):
        resumed = list(stream_of(six, sampling=sampling).epoch(1).load(first, Loading(workers)))
        assert_same_batches(resumed, expected[first:])


def test_torchs_own_random_numbers_are_left_alone(six: Shards) -> None:
    state = torch.get_rng_state()
    for workers in (0, 1):
        list(islice(stream_of(six).epoch(0).load(0, Loading(workers)), 2))
    assert torch.equal(torch.get_rng_state(), state)


def candidates_by_user(batch: Batch) -> list[tuple[int, ...]]:
    """Return user row, item row, label and the probability of the target, sorted."""
    features = batch.sparse_features
    keys, inverse = features.inverse_indices()
    users = features[USER].values()[inverse[keys.index(USER)]].tolist()
    items = features[candidate_key(ITEM)].values().tolist()
    probabilities = features[TARGET_PROBABILITY].values().tolist()
    labels = batch.labels[:, 0].tolist()
    return sorted(zip(users, items, labels, probabilities, strict=True))


@by_sampling
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_together_have_the_batches_of_one_process(
    six: Shards, world_size: int, sampling: SamplingSettings
) -> None:
    expected = stream_of(six, sampling=sampling).epoch(1)
    epochs = [
        stream_of(six, sampling=sampling, rank=rank, world_size=world_size).epoch(1)
        for rank in range(world_size)
    ]
    num_padded = 0
    for index, batch in enumerate(expected.load(0, Loading())):
        parts = []
        for epoch in epochs:
            assert epoch.chosen[index].tolist() == expected.chosen[index].tolist()
            part = epoch[index]
            assert isinstance(part, Batch)
            assert part.labels.numel() > 0
            for key in (shared_key(ITEM), SHARED_PROBABILITY):
                of_part, of_batch = part.sparse_features[key], batch.sparse_features[key]
                assert torch.equal(of_part.values(), of_batch.values())
            if epoch.has_own(index):
                parts += candidates_by_user(part)
            num_padded += not epoch.has_own(index)
        assert sorted(parts) == candidates_by_user(batch)
    assert num_padded > 0


def test_a_log_in_memory_and_in_shards_has_the_same_counts_to_draw_by(
    one: Shards, six: Shards
) -> None:
    sampling = SamplingSettings(POPULARITY, POPULARITY)
    streams = [stream_of(shards, sampling=sampling, shuffle_shards=6) for shards in (one, six)]
    of_one, of_six = (stream.batch(np.arange(1), 0, 0).sparse_features for stream in streams)
    for key in (shared_key(ITEM), SHARED_PROBABILITY):
        assert torch.equal(of_one[key].values(), of_six[key].values())


def test_negatives_of_the_batch_are_items_of_its_other_targets_as_often_as_these(
    one: Shards,
) -> None:
    stream = stream_of(one, sampling=SamplingSettings(negatives=IN_BATCH))
    chosen = stream.epoch(0).chosen[2]
    stream.hold([0])
    assert stream._held is not None
    targets = stream._held.windows.take(chosen).targets
    own = stream._held.dataset.item_row[stream._held.dataset.item[targets]]
    drawn: dict[int, list[int]] = {row: [] for row in own.tolist()}
    for epoch in range(300):
        items = stream.batch(chosen, epoch, 2).sparse_features[candidate_key(ITEM)].values()
        for row, negatives in zip(own.tolist(), items.view(len(own), -1)[:, 1:], strict=True):
            drawn[row] += negatives.tolist()
    for row, negatives in drawn.items():
        found = np.array(negatives)
        found = found[found != UNKNOWN_ROW]  # Training shows some ids as unknown.
        assert not (found == row).any()
        others = own[own != row]
        for other in np.unique(others).tolist():
            share = float((others == other).mean())
            # Five standard deviations of a binomial share.
            deviation = 5 * (share * (1 - share) / len(found)) ** 0.5
            assert float((found == other).mean()) == pytest.approx(share, abs=deviation)
        assert np.isin(found, others).all()


def test_a_batch_of_one_item_has_negatives_of_the_catalogue(one: Shards) -> None:
    """The last batch of an epoch may be one target, whose own item is all there is to draw."""
    stream = stream_of(one, sampling=SamplingSettings(negatives=IN_BATCH))
    smallest = int(stream.num_targets.argmin())
    assert stream.num_targets[smallest] == 1
    items = stream.batch(np.array([smallest]), 0, 0).sparse_features[candidate_key(ITEM)].values()
    assert len(set(items.tolist())) == 1 + NEGATIVES


@pytest.mark.parametrize(("world_size", "shuffle_shards"), [(2, 2), (3, 3), (2, 6), (6, 6)])
def test_a_rank_reads_the_shards_of_its_users_alone(
    six: Shards, world_size: int, shuffle_shards: int
) -> None:
    """Ranks whose number divides that of the shards and of a group have equal parts of a group."""
    for rank in range(world_size):
        stream = stream_of(six, rank=rank, world_size=world_size, shuffle_shards=shuffle_shards)
        read: list[int] = []
        real_read = six.read

        def reading(numbers: list[int]) -> Any:
            read.extend(numbers)  # noqa: B023
            return real_read(numbers)  # noqa: B023

        stream.shards = replace(six, read=reading)
        for number in range(3):
            epoch = stream.epoch(number)
            assert {len(held) for held in epoch.held} == {shuffle_shards // world_size}
            list(epoch.load(0, Loading()))
        assert {shard % world_size for shard in read} == {rank}
        # Each once in an epoch, unless one epoch ends with the group that begins the next.
        assert len(read) <= 3 * 6 // world_size


# --- memory


class Counted:
    """Shards that count how many of their data sets are in memory."""

    def __init__(self, shards: Shards) -> None:
        self.num_alive = self.most_alive = 0
        self.most_shards = 0
        self.shards = replace(shards, read=self._read)
        self._real_read = shards.read

    def _read(self, numbers: Sequence[int]) -> Dataset:
        dataset = self._real_read(numbers)
        self.num_alive += 1
        self.most_alive = max(self.most_alive, self.num_alive)
        self.most_shards = max(self.most_shards, len(numbers))
        weakref.finalize(dataset, self._dropped)
        return dataset

    def _dropped(self) -> None:
        self.num_alive -= 1


def test_one_group_is_held_at_a_time(six: Shards) -> None:
    counted = Counted(six)
    stream = stream_of(counted.shards)
    # While one is read the one before is still there.
    assert (counted.most_alive, counted.most_shards) == (2, 1)
    counted.most_alive = 0
    for _ in stream.epoch(0).load(0, Loading()):
        assert counted.num_alive == 1
    assert (counted.most_alive, counted.most_shards) == (1, 2)
    stream.forget()
    assert counted.num_alive == 0


def test_evaluations_reports_and_requests_hold_two_shards_at_most(six: Shards) -> None:
    counted = Counted(six)
    split_report(counted.shards)
    assert len(list(make_requests(counted.shards, 20, 5, seed=1))) == 20
    evaluate_sampled(lambda batch: batch.labels, counted.shards, TEST, 2)
    rank_held_out(lambda batch: batch.labels, counted.shards, RankingSettings())
    assert (counted.most_alive, counted.most_shards) == (2, 1)
    assert counted.num_alive == 0


# --- what goes wrong


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_is_gone_ends_the_epoch_in_our_words(folder: Path, workers: int) -> None:
    shards = open_prepared(folder, HISTORIES)
    stream = stream_of(shards)
    file = folder / "shards/00002.events.parquet"
    content = file.read_bytes()
    file.unlink()
    try:
        with pytest.raises(DataError) as error:
            list(stream.epoch(0).load(0, Loading(workers)))
    finally:
        file.write_bytes(content)
    assert str(error.value).startswith(f"{file} cannot be read: ")
    assert "Traceback" not in str(error.value)


def test_a_shard_that_changed_ends_the_epoch(folder: Path, tmp_path: Path) -> None:
    stream = stream_of(open_prepared(folder, HISTORIES))
    other = write_folder(synthetic_world(31, 30, 40, 5, seed=2), tmp_path / "other", 6)
    stream.shards = open_prepared(other, HISTORIES)
    with pytest.raises(DataError, match=r"training windows; they had .* the data has changed"):
        list(stream.epoch(0).load(0, Loading()))


def test_a_worker_that_is_killed_ends_the_epoch_in_our_words(six: Shards) -> None:
    stream = stream_of(six)
    epoch = stream.epoch(0)
    parent, real_batch = os.getpid(), stream.batch

    def batch(chosen: Any, number: int, index: int, whole: Any) -> Batch:
        if os.getpid() != parent and chosen is not None and chosen[0] == epoch.chosen[9][0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real_batch(chosen, number, index, whole)

    stream.batch = batch  # type: ignore[method-assign]
    with pytest.raises(DataError, match="a process that read data has ended: "), worker_errors():
        list(epoch.load(0, Loading(2)))
