"""Training batches from shards, in an order that no number of processes changes.

An epoch takes the shards in groups, shuffles the windows of a group together and cuts them into
batches, those of all ranks. Each rank trains on the windows of its users: it reads the shards that
have some, one group at a time, in its own process or in workers. The state of a stream is the
number of the next batch.

A group is shards with consecutive numbers. So ranks whose number divides that of the shards and
that of a group have as many shards of each group, and as many users.
"""

import io
import pickle
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapStyle
from torchrec.datasets.utils import Batch

from torchrec_kvshare.config import IN_BATCH, POPULARITY, UNIFORM
from torchrec_kvshare.data.dataset import Dataset, Ints, ranges
from torchrec_kvshare.data.draws import Draws, Proposal
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.data.splits import TRAIN
from torchrec_kvshare.data.targets import (
    MAX_TARGETS_PER_WINDOW,
    Windows,
    batches_of,
    build_batch,
    sample_negatives,
    sample_shared,
    windows_of,
)
from torchrec_kvshare.errors import DataError

LANE_TARGETS = 2 * MAX_TARGETS_PER_WINDOW  # of a batch: a lane has whole windows
MAX_LANES = 8
WORKER_ENDED = "DataLoader worker"  # begins torch's message


@dataclass(frozen=True)
class SamplingSettings:
    """What items are drawn from.

    Attributes:
        negatives: of targets: ``UNIFORM`` from the catalogue, by ``POPULARITY``, or ``IN_BATCH``
            from the items of all targets of the batch, as often as they are there.
        shared: of the items that all targets of a batch share: ``UNIFORM`` or by ``POPULARITY``.
        popularity_power: popularity is the number of training events to this power.
    """

    negatives: str = UNIFORM
    shared: str = UNIFORM
    popularity_power: float = 0.75


@dataclass(frozen=True)
class StreamSettings:
    """How windows become batches.

    Attributes:
        batch_targets: targets per batch of all ranks together, each with its negatives.
        negatives: negatives sampled per target.
        seed: of negatives and of the order.
        shuffle_shards: shards in a group.
        shared_items: maximum number of items that all targets of a batch share; 0 for none.
        sampling: what negatives and shared items are drawn from.
        share_prefill: whether targets at different times may see prefixes of one prefill.
        rank: this process among those that train together.
        world_size: their number.
    """

    batch_targets: int
    negatives: int
    seed: int
    shuffle_shards: int = 1
    shared_items: int = 0
    sampling: SamplingSettings = SamplingSettings()
    share_prefill: bool = True
    rank: int = 0
    world_size: int = 1


@dataclass(frozen=True)
class Loading:
    """Which processes build batches.

    Attributes:
        workers: processes that read and build batches; 0: the process that trains does.
        prefetch: batches that each of them builds ahead.
        pin_memory: whether batches lie in pinned memory, for copies to a GPU.
    """

    workers: int = 0
    prefetch: int = 2
    pin_memory: bool = False


class Held(NamedTuple):
    """Shards that are in memory.

    Attributes:
        shards: their numbers.
        numbers: of their windows, ascending.
        dataset: their users.
        windows: in the order of ``numbers``.
    """

    shards: list[int]
    numbers: Ints
    dataset: Dataset
    windows: Windows


class WindowStream:
    """The training windows of a log, numbered shard by shard, and batches of them.

    Args:
        shards: the log; all of it is read once, to count its windows.
        settings: how windows become batches.
    """

    def __init__(self, shards: Shards, settings: StreamSettings) -> None:
        self.shards = shards
        self.settings = settings
        sampling = settings.sampling
        users, num_targets, lengths, items = [], [], [], []
        for dataset in shards:
            windows = self._windows_of(dataset)
            if sampling.negatives == IN_BATCH:
                # Four bytes per event: a rank does not read the windows of the others again.
                items.append(dataset.item[windows.targets].astype(np.int32))
            users.append(dataset.user_code[windows.user])
            num_targets.append(windows.num_targets)
            lengths.append(len(windows.user))
        self.user: Ints = np.concatenate(users)  # [W] code of each window's user
        self.num_targets: Ints = np.concatenate(num_targets)  # [W]
        self.offsets: Ints = np.cumsum([0, *lengths])  # in windows, by shard
        self._items = np.concatenate(items) if items else None  # of all windows' targets
        self._first_target: Ints = np.cumsum(self.num_targets) - self.num_targets
        self._popular: Proposal | None = None
        if POPULARITY in (sampling.negatives, sampling.shared):
            self._popular = self._by_popularity(sampling.popularity_power)
        # What negatives are distributed as, unless all items are alike.
        self._drawn_as = self._popular if sampling.negatives == POPULARITY else None
        if sampling.negatives == IN_BATCH:
            self._drawn_as = self._by_popularity(1.0)
        self._held: Held | None = None

    def epoch(self, number: int) -> "Epoch":
        """Return the batches of an epoch."""
        rng = np.random.default_rng([self.settings.seed, number])
        num_shards, group_shards = self.shards.num_shards, self.settings.shuffle_shards
        shards = (int(rng.integers(num_shards)) + np.arange(num_shards)) % num_shards
        groups = np.split(shards, range(group_shards, num_shards, group_shards))
        chosen: list[Ints] = []
        held: list[list[int]] = []
        for place in rng.permutation(len(groups)).tolist():
            group = sorted(groups[place].tolist())
            chosen += self._batches_of(self._windows_in(group), rng)
            held += [self._shards_with_own(group)] * (len(chosen) - len(held))
        return Epoch(self, number, chosen, held)

    def _batches_of(self, windows: Ints, rng: np.random.Generator) -> list[Ints]:
        """Shuffle windows and cut them into batches.

        Large batches take as many targets from each of several lanes of users. Ranks whose number
        divides that of the lanes then have as much to do in every batch.
        """
        num_lanes = max(1, self.settings.batch_targets // LANE_TARGETS)
        num_lanes = min(MAX_LANES, 1 << (num_lanes.bit_length() - 1))
        lane = self.user[windows] % num_lanes
        by_lane = []
        for number in range(num_lanes):
            of_lane = windows[lane == number]
            num_targets = self.settings.batch_targets // num_lanes
            batches = batches_of(self.num_targets[of_lane], num_targets, rng)
            by_lane.append([of_lane[batch] for batch in batches])
        none = windows[:0]
        return [np.concatenate(parts) for parts in zip_longest(*by_lane, fillvalue=none)]

    def own(self, chosen: Ints) -> Ints:
        """Return those windows whose users are this rank's."""
        return chosen[self.user[chosen] % self.settings.world_size == self.settings.rank]

    def hold(self, shards: list[int]) -> None:
        """Read shards, unless they are held, and drop the others."""
        if self._held is not None and self._held.shards == shards:
            return
        self._held = None
        dataset = self.shards.read(shards)
        windows = self._windows_of(dataset)
        numbers = self._windows_in(shards)
        if len(windows.user) != len(numbers):
            raise DataError(
                f"shards {shards} have {len(windows.user)} training windows; they had "
                f"{len(numbers)} when training started: the data has changed"
            )
        self._held = Held(shards, numbers, dataset, windows)

    def smallest(self) -> Ints:
        """Return the held window with the fewest targets."""
        assert self._held is not None
        return self._held.numbers[[self._held.windows.num_targets.argmin()]]

    def batch(self, chosen: Ints, epoch: int, index: int, whole: Ints | None = None) -> Batch:
        """Build the part of an epoch's batch that has some windows.

        Args:
            chosen: numbers of the windows; their shards are read unless they are held.
            epoch: from 0.
            index: of the batch in its epoch.
            whole: numbers of all windows of the batch; None if they are those chosen.
        """
        needed = np.unique(np.searchsorted(self.offsets, chosen, side="right") - 1).tolist()
        if self._held is None or not set(needed) <= set(self._held.shards):
            self.hold(needed)
        assert self._held is not None
        dataset = self._held.dataset
        part = self._held.windows.take(np.searchsorted(self._held.numbers, chosen))
        draws = Draws(self.settings.seed, epoch)
        settings, sampling = self.settings, self.settings.sampling
        proposal = self._drawn_as
        if self._items is not None:
            proposal = self._in_batch(self._items, chosen if whole is None else whole)
        negatives = sample_negatives(dataset, part.targets, settings.negatives, draws, proposal)
        candidates = np.concatenate([dataset.item[part.targets][:, None], negatives], axis=1)
        shared = None
        if settings.shared_items:
            by_popularity = self._popular if sampling.shared == POPULARITY else None
            num_items = settings.shared_items
            shared = sample_shared(dataset, part.targets, num_items, draws, index, by_popularity)
        ratios = None
        if self._drawn_as is not None:
            ratios = np.log(self._drawn_as.probability(candidates) * len(dataset.known_items))
        return build_batch(dataset, part, candidates, draws, shared, ratios)

    def _by_popularity(self, power: float) -> Proposal:
        known = self.shards.shared.known_items
        return Proposal(known, self.shards.num_training[known].astype(np.float64) ** power)

    def _in_batch(self, items: NDArray[np.int32], chosen: Ints) -> Proposal:
        """Return the items of all targets of some windows, each as often as it is there."""
        targets = ranges(self._first_target[chosen], self.num_targets[chosen])
        distinct, counts = np.unique(items[targets].astype(np.int64), return_counts=True)
        return Proposal(distinct, counts.astype(np.float64))

    def forget(self) -> None:
        """Drop the shards that are held."""
        self._held = None

    def _windows_of(self, dataset: Dataset) -> Windows:
        training = np.flatnonzero(dataset.split == TRAIN)
        return windows_of(dataset, training, share_prefill=self.settings.share_prefill)

    def _windows_in(self, shards: list[int]) -> Ints:
        """Return the numbers of the windows of shards, which ascend."""
        return np.concatenate(
            [np.arange(self.offsets[shard], self.offsets[shard + 1]) for shard in shards]
        )

    def _shards_with_own(self, group: list[int]) -> list[int]:
        """Return the shards of a group that have windows of this rank; one if there are none."""
        own = [shard for shard in group if len(self.own(self._windows_in([shard])))]
        return own or [max(group, key=lambda shard: len(self._windows_in([shard])))]


@dataclass(frozen=True, eq=False)
class Epoch(MapStyle["Batch | DataError"]):
    """The batches of an epoch; item k is this rank's part of batch k, or why it cannot be read.

    Attributes:
        stream: builds them.
        number: of the epoch, from 0.
        chosen: numbers of each batch's windows, those of all ranks.
        held: shards of each batch's group that this rank reads.
    """

    stream: WindowStream
    number: int
    chosen: list[Ints]
    held: list[list[int]]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Batch | DataError:
        try:
            self.stream.hold(self.held[index])
            own = self.stream.own(self.chosen[index])
            # Every rank takes part in every step: without windows of its own it pads.
            chosen = own if len(own) else self.stream.smallest()
            return self.stream.batch(chosen, self.number, index, self.chosen[index])
        except DataError as error:  # Raised in a worker, it would come with its traceback as text.
            return error

    def has_own(self, index: int) -> bool:
        """Whether this rank has windows in a batch; if not, its part of the batch is padding."""
        return len(self.stream.own(self.chosen[index])) > 0

    def num_targets(self, index: int) -> int:
        """Return the number of targets of a batch, those of all ranks."""
        return int(self.stream.num_targets[self.chosen[index]].sum())

    def load(self, first: int, loading: Loading) -> Generator[Batch, None, None]:
        """Build this rank's batches in order, in workers if there are some.

        Args:
            first: the batch to begin with.
            loading: which processes build batches.

        Raises:
            DataError: if a shard cannot be read, or a worker ended.
        """
        workers = loading.workers
        collate: Callable[[Any], Any] = _packed if workers else _unchanged
        loader = DataLoader(
            self,
            batch_size=None,
            sampler=range(first, len(self)),
            num_workers=workers,
            prefetch_factor=loading.prefetch if workers else None,
            collate_fn=collate,
            # The workers share what this process has read; nothing of it is written to.
            multiprocessing_context="fork" if workers else None,
            generator=torch.Generator(),  # of workers' seeds; else torch's own moves on
        )
        with worker_errors():
            for item in loader:
                batch = pickle.loads(item) if isinstance(item, bytes) else item
                if isinstance(batch, DataError):
                    raise batch
                yield batch.pin_memory() if loading.pin_memory else batch


class _Packer(pickle.Pickler):
    """Writes tensors as arrays, by value.

    Torch shares a tensor between processes by a file descriptor, for which they meet at a socket:
    4 ms for the tensors of a batch of 300 kB, against 0.2 ms for its bytes.
    """

    def reducer_override(self, value: object) -> Any:
        """Return how to make a tensor again."""
        if isinstance(value, torch.Tensor):
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


def _packed(item: Batch | DataError) -> bytes:
    file = io.BytesIO()
    _Packer(file, pickle.HIGHEST_PROTOCOL).dump(item)
    return file.getvalue()


def _unchanged(item: Batch | DataError) -> Batch | DataError:
    return item


@contextmanager
def worker_errors() -> Iterator[None]:
    """Raise a ``DataError`` where a worker ended.

    Torch tells by a signal, at any point of the block, or the connection to the worker breaks.
    """
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith(WORKER_ENDED):
            raise
        raise DataError(
            f"a process that read data has ended: {error}; if it was for lack of memory, set fewer "
            "workers or shuffle_shards; workers=0 reads in the process that trains"
        ) from error
