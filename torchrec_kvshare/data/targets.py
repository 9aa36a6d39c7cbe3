"""Training batches: one prefill per window, every event in it a target.

A window is the part of a history that the model reads (``schema.Window``). All targets whose
windows start at the same event share one window; each sees its strictly earlier events and has its
own sampled negatives. So an epoch costs one prefill per window, not one per event, and histories
are cut as in serving. The rows of a log of impressions are such targets too, each with its label
and with the context of its own request.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.datasets.utils import Batch

from torchrec_kvshare.data.dataset import Dataset, Ints, ranges
from torchrec_kvshare.data.draws import Draws, Proposal
from torchrec_kvshare.errors import DataError
from torchrec_kvshare.features.bags import Bags, bits_of, single
from torchrec_kvshare.features.batches import assemble
from torchrec_kvshare.features.dense import clock_features
from torchrec_kvshare.features.schema import (
    CANDIDATE_TIME,
    DRAW_RATIO,
    ITEM,
    REQUEST_HISTORY,
    REQUEST_TIME,
    SHARED_PROBABILITY,
    TARGET_PROBABILITY,
    TIME,
    UNKNOWN_ROW,
    USER,
    candidate_key,
    context_key,
    history_key,
    shared_key,
    visible_key,
)

MAX_TARGETS_PER_WINDOW = 256  # further targets get a copy of the window, so that batches stay even
MIN_CATALOGUE = 2  # items: the target's own and a negative
# Training shows this share of ids as unknown, so that the row of unknown ids is trained.
UNKNOWN_SHARE = 0.01
# Second keys of draws that choose unknown ids; those of candidates are their slots, from 0.
OF_USERS, OF_EVENTS, OF_SHARED = np.array([-1]), np.array([-2]), np.array([-3])


@dataclass(frozen=True, eq=False)
class Windows:
    """W windows and their targets.

    Attributes:
        user: [W] the data set's number of the user.
        first_event: by history [W], the oldest event that the targets see, as an index into the
            data set's ``indices_by_history``.
        num_events: by history [W], number of events that the last target sees.
        num_targets: [W].
        targets: [sum of num_targets] event indices of the targets, window by window.
    """

    user: Ints
    first_event: dict[str, Ints]
    num_events: dict[str, Ints]
    num_targets: Ints
    targets: Ints

    @cached_property
    def first_target(self) -> Ints:
        """[W] index of each window's first target."""
        return np.cumsum(self.num_targets) - self.num_targets

    def take(self, chosen: Ints) -> "Windows":
        """Return some of the windows, in the given order."""
        counts = self.num_targets[chosen]
        return Windows(
            user=self.user[chosen],
            first_event={name: first[chosen] for name, first in self.first_event.items()},
            num_events={name: count[chosen] for name, count in self.num_events.items()},
            num_targets=counts,
            targets=self.targets[ranges(self.first_target[chosen], counts)],
        )


def windows_of(dataset: Dataset, targets: Ints, *, share_prefill: bool = True) -> Windows:
    """Group targets by the window they read.

    Args:
        dataset: holds the targets.
        targets: event indices, ascending.
        share_prefill: whether targets at different times may see prefixes of one prefill; if not,
            all targets of a window have the same time.

    Returns:
        The windows; every target is in exactly one.
    """
    user = dataset.event_user[targets]
    before, earlier, start = {}, {}, {}
    is_first = np.ones(len(targets), bool)
    is_first[1:] = np.diff(user) != 0
    if not share_prefill:
        is_first[1:] |= np.diff(dataset.num_earlier[targets]) != 0
    for history in dataset.schema.histories:
        before[history.name], earlier[history.name] = _events_before(dataset, history.name, targets)
        start[history.name] = history.window.start(earlier[history.name])
        is_first[1:] |= np.diff(start[history.name]) != 0
    index = np.arange(len(targets))
    first_of_window = np.maximum.accumulate(np.where(is_first, index, 0))
    is_first |= (index - first_of_window) % MAX_TARGETS_PER_WINDOW == 0
    firsts = np.flatnonzero(is_first)
    lasts = np.append(firsts[1:], len(targets))[: len(firsts)] - 1
    return Windows(
        user=user[firsts],
        first_event={name: before[name][firsts] + start[name][firsts] for name in start},
        num_events={name: earlier[name][lasts] - start[name][firsts] for name in start},
        num_targets=lasts - firsts + 1,
        targets=targets,
    )


def _events_before(dataset: Dataset, history: str, targets: Ints) -> tuple[Ints, Ints]:
    """Count a history's events before each target's user, and the user's before the target."""
    before = dataset.num_before_by_history[history]
    first = dataset.user_offsets[dataset.event_user[targets]]
    return before[first], before[first + dataset.num_earlier[targets]] - before[first]


def batches_of(
    num_targets: Ints, batch_targets: int, rng: np.random.Generator | None
) -> Iterator[Ints]:
    """Group windows into batches of about ``batch_targets`` targets.

    Args:
        num_targets: [W] of each window.
        batch_targets: a batch with this many targets is full.
        rng: shuffles the windows; None keeps their order.

    Yields:
        The indices of each batch's windows.
    """
    order = np.arange(len(num_targets)) if rng is None else rng.permutation(len(num_targets))
    ends = np.cumsum(num_targets[order])
    batch = (ends - 1) // batch_targets
    if len(order):
        yield from np.split(order, np.flatnonzero(np.diff(batch)) + 1)


class SharedItems(NamedTuple):
    """Items of the catalogue that all targets of a batch are told from.

    Attributes:
        items: [S] codes.
        probability: [S] with which each was drawn.
        of_targets: [P] with which each target's own item would have been.
    """

    items: Ints
    probability: NDArray[np.float64]
    of_targets: NDArray[np.float64]


def sample_negatives(
    dataset: Dataset,
    targets: Ints,
    num_negatives: int,
    draws: Draws,
    proposal: Proposal | None = None,
) -> Ints:
    """Draw negatives at random, never the target's own item.

    Args:
        dataset: holds the catalogue.
        targets: [P] event indices of the targets.
        num_negatives: number of negatives per target.
        draws: random numbers by target.
        proposal: what they are drawn from. None, or one with a single item, which may be the own
            one, for the catalogue, all items alike.

    Returns:
        [P, num_negatives] item codes.

    Raises:
        DataError: if the catalogue has fewer than two items.
    """
    catalogue = dataset.known_items
    if num_negatives and len(catalogue) < MIN_CATALOGUE:
        raise DataError(
            f"the catalogue, the items of the training split, has {len(catalogue)} item; negatives "
            f"need at least {MIN_CATALOGUE}"
        )
    keys, slots = dataset.keys_of(targets)[:, None], np.arange(num_negatives)
    own = dataset.item[targets][:, None]
    drawn = draws.below(len(catalogue), keys, slots)
    negatives = catalogue[drawn]
    # The next item of the catalogue replaces the target's own, so it comes twice as often.
    negatives = np.where(negatives == own, catalogue[(drawn + 1) % len(catalogue)], negatives)
    if proposal is None or len(proposal.items) == 1:
        return negatives
    return proposal.draw_others(draws.uniform(keys, slots), own)


def sample_shared(
    dataset: Dataset,
    targets: Ints,
    num_items: int,
    draws: Draws,
    batch: int,
    proposal: Proposal | None = None,
) -> SharedItems:
    """Return items that all targets of a batch share: the whole catalogue, or draws from it.

    Args:
        dataset: holds the catalogue.
        targets: [P] event indices of the targets, whose items are in the catalogue.
        num_items: maximum number of items.
        draws: random numbers.
        batch: number of the batch in its epoch; every rank has the same items.
        proposal: what they are drawn from; None for all items alike.
    """
    catalogue = dataset.known_items
    alike = 1.0 / len(catalogue)
    if proposal is None or len(catalogue) <= num_items:
        items = catalogue
        if len(catalogue) > num_items:
            keys = (OF_SHARED, np.array(batch), np.arange(num_items))
            items = catalogue[draws.below(len(catalogue), *keys)]
        return SharedItems(items, np.full(len(items), alike), np.full(len(targets), alike))
    items = proposal.draw(draws.uniform(OF_SHARED, np.array(batch), np.arange(num_items)))
    of_targets = proposal.probability(dataset.item[targets])
    return SharedItems(items, proposal.probability(items), of_targets)


def build_batch(
    dataset: Dataset,
    windows: Windows,
    candidates: Ints,
    draws: Draws | None,
    shared: SharedItems | None = None,
    draw_ratios: NDArray[np.float64] | None = None,
) -> Batch:
    """Build a TorchRec batch: every target with its negatives over its window's history.

    Args:
        dataset: holds the windows.
        windows: W windows, which become the histories of the batch.
        candidates: [P, 1 + negatives] item codes of each target's candidates, its own item first.
        draws: in training, chooses the ids to show as unknown; None shows all ids.
        shared: items that are not candidates of anyone; None for none.
        draw_ratios: [P, 1 + negatives] log of how often each candidate is drawn as a negative, over
            how often it would be if all items were alike; None if they are.

    Returns:
        A VBE batch with C = P x (1 + negatives) candidates, with labels [C, tasks]: the first of
        each target has the target's, a negative is negative for every task. All of a target have
        NaN for a task that it has no label for.
        Its user rows are the windows or, where requests have attributes, the targets, of which
        those of a window share its history.
    """
    window_of_target = np.repeat(np.arange(len(windows.user)), windows.num_targets)
    moments = {CANDIDATE_TIME: dataset.time[windows.targets]}
    for history, first in windows.first_event.items():
        before, earlier = _events_before(dataset, history, windows.targets)
        moments[visible_key(history)] = before + earlier - first[window_of_target]
    bags = {
        key: single(_tensor(np.repeat(values, candidates.shape[1])))
        for key, values in moments.items()
    }
    if draw_ratios is not None:
        bags[DRAW_RATIO] = single(bits_of(_floats(draw_ratios.ravel())))
    if shared is not None:
        bags[shared_key(ITEM)] = single(_tensor(dataset.item_row[shared.items]))
        for name, rows in dataset.item_attributes.items():
            bags[shared_key(name)] = _bags(*rows.take(shared.items))
        of_candidates = np.repeat(shared.of_targets, candidates.shape[1])
        bags[SHARED_PROBABILITY] = single(bits_of(_floats(shared.probability)))
        bags[TARGET_PROBABILITY] = single(bits_of(_floats(of_candidates)))
    return _assemble(dataset, windows, candidates, window_of_target, bags=bags, draws=draws)


def build_catalogue_batch(dataset: Dataset, windows: Windows, candidates: Ints) -> Batch:
    """Build a batch as in serving: each window is a request at the time of its only target.

    Args:
        dataset: holds the windows.
        windows: W windows with one target each.
        candidates: [W, N] item codes to rank for each window.

    Returns:
        A VBE batch with C = W x N candidates over their whole windows.
    """
    assert (windows.num_targets == 1).all()
    bags = {REQUEST_TIME: single(_tensor(dataset.time[windows.targets]))}
    window_of_target = np.arange(len(windows.user))
    return _assemble(dataset, windows, candidates, window_of_target, bags=bags, draws=None)


def _assemble(
    dataset: Dataset,
    windows: Windows,
    candidates: Ints,
    window_of_target: Ints,
    bags: dict[str, Bags],
    draws: Draws | None,
) -> Batch:
    num_candidates = candidates.shape[1]
    codes = candidates.ravel()
    slots = np.tile(np.arange(num_candidates), len(windows.targets))
    request_of_target = window_of_target
    if dataset.request_context:
        request_of_target = np.arange(len(windows.targets))
        bags[REQUEST_HISTORY] = single(_tensor(window_of_target))
    bags |= _user_bags(dataset, windows, draws)
    for history in windows.first_event:
        bags |= _event_bags(dataset, windows, history, draws)
    keys = np.repeat(dataset.keys_of(windows.targets), num_candidates)
    bags[candidate_key(ITEM)] = single(_hidden(dataset.item_row[codes], draws, keys, slots))
    for name, rows in dataset.item_attributes.items():
        bags[candidate_key(name)] = _bags(*rows.take(codes))
    labels = np.zeros((*candidates.shape, dataset.labels.shape[1]), np.float32)
    of_targets = dataset.labels[windows.targets]
    labels[:, 0] = of_targets
    # Negatives are what a label is told from: beside none they would be all negatives of the task.
    labels[np.repeat(np.isnan(of_targets)[:, None], num_candidates, axis=1)] = np.nan
    targets = np.repeat(windows.targets, num_candidates)
    return assemble(
        bags,
        _tensor(np.repeat(request_of_target, num_candidates)),
        _dense(dataset, targets, codes),
        torch.from_numpy(labels.reshape(len(codes), -1)),
    )


def _user_bags(dataset: Dataset, windows: Windows, draws: Draws | None) -> dict[str, Bags]:
    user = np.repeat(windows.user, windows.num_targets) if dataset.request_context else windows.user
    hidden = _hidden(dataset.user_row[user], draws, dataset.user_code[user], OF_USERS)
    bags = {USER: single(hidden)}
    for name, rows in dataset.context.items():
        bags[context_key(name)] = _bags(*rows.take(user))
    for name, of_events in dataset.request_context.items():
        bags[context_key(name)] = _bags(*of_events.take(windows.targets))
    return bags


def _event_bags(
    dataset: Dataset, windows: Windows, history: str, draws: Draws | None
) -> dict[str, Bags]:
    read = ranges(windows.first_event[history], windows.num_events[history])
    events = dataset.indices_by_history[history][read]
    lengths = _tensor(windows.num_events[history])
    items = dataset.item[events]
    bags = {
        history_key(history, ITEM): Bags(
            _hidden(dataset.item_row[items], draws, dataset.keys_of(events), OF_EVENTS), lengths
        ),
        history_key(history, TIME): Bags(_tensor(dataset.time[events]), lengths),
    }
    for name, of_events in dataset.event_attributes.items():
        bags[history_key(history, name)] = Bags(_tensor(of_events.take(events)), lengths)
    for index, name in enumerate(dataset.schema.event_floats):
        floats = torch.from_numpy(dataset.event_floats[events, index])
        bags[history_key(history, name)] = Bags(bits_of(floats), lengths)
    for name, rows in dataset.item_attributes.items():
        bags[history_key(history, name)] = _bags(*rows.take(items))
    return bags


def _dense(dataset: Dataset, targets: Ints, items: Ints) -> Tensor:
    """Return the dense features of candidates, each with its target."""
    columns: list[NDArray[np.float32]] = [
        clock_features(dataset.time[targets]),
        dataset.user_floats[dataset.event_user[targets]],
        dataset.request_floats[targets],
        dataset.item_floats[items],
    ]
    return torch.from_numpy(np.concatenate(columns, axis=1))


def _hidden(rows: Ints, draws: Draws | None, *keys: Ints) -> Tensor:
    """Show a share of rows as unknown, chosen by their keys."""
    if draws is not None:
        rows = np.where(draws.uniform(*keys) < UNKNOWN_SHARE, UNKNOWN_ROW, rows)
    return _tensor(rows)


def _bags(values: Ints, lengths: Ints) -> Bags:
    return Bags(_tensor(values), _tensor(lengths))


def _tensor(values: Ints) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int64))


def _floats(values: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
