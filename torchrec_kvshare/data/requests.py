"""Requests made from a data set's test events, in the project's one request format."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from torchrec_kvshare.data.dataset import Dataset, Ints
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.data.splits import TEST
from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.features.schema import ITEM, TIME, USER

LATE_SHARE = 4  # of a log, the part whose traffic is made again: the last fourth


class TargetedRequest(NamedTuple):
    """A raw request, and the index of its event's item among the candidates."""

    raw: dict[str, Any]
    target: int


class _Drawn(NamedTuple):
    """A request before its shard is read: an event of the test split, and its candidates."""

    number: int
    event: int  # index in the whole log
    candidates: list[int]


def make_requests(
    shards: Shards, count: int, num_candidates: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Make requests at the times of random test events.

    The candidates are the event's item, at a random position, and items drawn evenly from the
    catalogue. The history is every strictly earlier event of the user, uncut.

    Args:
        shards: their test split gives users and times.
        count: number of requests; test events may repeat.
        num_candidates: N of every request.
        seed: the same seed gives the same requests.

    Yields:
        Raw requests, ready to be written as JSON.

    Raises:
        ConfigError: if a number is below 1, or the catalogue is smaller than ``num_candidates``.
        DataError: if the test split is empty.
    """
    for request in make_targeted_requests(shards, count, num_candidates, seed):
        yield request.raw


def make_targeted_requests(
    shards: Shards, count: int, num_candidates: int, seed: int
) -> Iterator[TargetedRequest]:
    """Make the requests of ``make_requests``, each with the index of its target."""
    catalogue = shards.shared.known_items
    _check_counts(count, num_candidates, len(catalogue))
    rng = np.random.default_rng(seed)
    events, items, shard_of_event = _tested_events(shards)
    if not len(events):
        raise DataError("the data set has no event in the test split")
    drawn_by_shard: dict[int, list[_Drawn]] = {}
    for number in range(count):
        place = int(rng.choice(len(events)))
        drawn = rng.choice(catalogue, num_candidates, replace=False)
        if items[place] not in drawn:
            drawn[rng.integers(num_candidates)] = items[place]
        drawn_by_shard.setdefault(int(shard_of_event[place]), []).append(
            _Drawn(number, int(events[place]), drawn.tolist())
        )
    request_by_number: dict[int, TargetedRequest] = {}
    for shard, wanted in drawn_by_shard.items():
        dataset = shards.read([shard])
        keys = dataset.keys_of(np.arange(len(dataset.time)))
        for number, key, candidates in wanted:
            event = int(np.searchsorted(keys, key))
            raw = {"request_id": f"r{number + 1}"} | _request(dataset, event, candidates)
            target = candidates.index(dataset.item[event])
            request_by_number[number] = TargetedRequest(raw, target)
    for number in range(count):
        yield request_by_number.pop(number)


def make_late_requests(
    shards: Shards, count: int, num_candidates: int, seed: int, name: str
) -> Iterator[dict[str, Any]]:
    """Make a request of every event of the last fourth of a log, in the order of their times.

    Args:
        shards: the log.
        count: requests, at most.
        num_candidates: items drawn from the catalogue, the same for all requests.
        seed: of the candidates.
        name: of the data, for the error.

    Yields:
        Raw requests; the history is every strictly earlier event of the user, uncut.

    Raises:
        ConfigError: if a number is below 1, or the catalogue is smaller than ``num_candidates``.
        DataError: if none of these events has an earlier one of its user.
    """
    catalogue = shards.shared.known_items
    _check_counts(count, num_candidates, len(catalogue))
    dataset = shards.read([*range(shards.num_shards)])
    drawn = np.random.default_rng(seed).choice(catalogue, num_candidates, replace=False).tolist()
    for number, event in enumerate(late_events(dataset, count, name).tolist()):
        yield {"request_id": f"r{number + 1}"} | _request(dataset, event, drawn)


def late_events(dataset: Dataset, count: int, name: str) -> Ints:
    """Return the first events of the last fourth of a log that have an earlier one of their user.

    Args:
        dataset: the log.
        count: events, at most.
        name: of the data, for the error.

    Raises:
        DataError: if there are none.
    """
    num_early = len(dataset.time) * (LATE_SHARE - 1) // LATE_SHARE
    late = np.argsort(dataset.time, kind="stable")[num_early:]
    late = late[dataset.num_earlier[late] > 0][:count]
    if not len(late):
        raise DataError(
            f"no event of the last fourth of data {name} has an earlier one of its user"
        )
    return late


def _check_counts(count: int, num_candidates: int, num_items: int) -> None:
    for name, value in (("count", count), ("candidates", num_candidates)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if num_candidates > num_items:
        raise ConfigError(f"candidates is {num_candidates}; the catalogue has {num_items} items")


def in_partitions(requests: Sequence[dict[str, Any]], count: int) -> list[list[dict[str, Any]]]:
    """Divide requests by user, for ``pipelines.score_dataset``.

    Args:
        requests: raw requests.
        count: number of parts.

    Returns:
        The parts, with about as many users each; a user's requests are in one of them, one after
        the other, oldest first.

    Example:
        >>> made = [{"user_id": user, "time": time} for time in (9, 7) for user in ("a", "b", "c")]
        >>> [[one["user_id"] for one in part] for part in in_partitions(made, 2)]
        [['a', 'a', 'c', 'c'], ['b', 'b']]
    """
    number_by_user: dict[Any, int] = {}
    for request in requests:
        number_by_user.setdefault(request[USER], len(number_by_user))
    ordered = sorted(requests, key=lambda one: (number_by_user[one[USER]], one[TIME]))
    parts: list[list[dict[str, Any]]] = [[] for _ in range(count)]
    for request in ordered:
        parts[number_by_user[request[USER]] % count].append(request)
    return parts


def _tested_events(shards: Shards) -> tuple[Ints, Ints, Ints]:
    """Return index in the whole log, item and shard of each test event, in the log's order."""
    parts = []
    for shard, dataset in enumerate(shards):
        tested = np.flatnonzero(dataset.split == TEST)
        parts.append((dataset.keys_of(tested), dataset.item[tested], np.full(len(tested), shard)))
    keys, items, shard_of_event = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    order = np.argsort(keys)
    return keys[order], items[order], shard_of_event[order]


def _request(dataset: Dataset, event: int, candidates: list[int]) -> dict[str, Any]:
    log = dataset.log
    user = int(dataset.event_user[event])
    first = int(dataset.user_offsets[user])
    past = slice(first, first + int(dataset.num_earlier[event]))
    items = dataset.item[past].tolist()
    history: dict[str, Any] = {ITEM: _ids(log.items.ids, items)}
    for name, column in log.event_attributes.items():
        ids = _ids(column.ids, column.codes[past].tolist())
        history[name] = [None if raw == "" else raw for raw in ids]
    for name, floats in log.event_floats.items():
        history[name] = floats[past].tolist()
    columns: dict[str, Any] = {ITEM: _ids(log.items.ids, candidates)}
    for name, ids_by_item in log.item_attributes.items():
        history[name] = [[_id(raw) for raw in ids_by_item[item]] for item in items]
        columns[name] = [[_id(raw) for raw in ids_by_item[item]] for item in candidates]
    for name, values in log.item_floats.items():
        columns[name] = [float(values[item]) for item in candidates]
    return {
        USER: _id(log.users.ids[user]),
        TIME: int(dataset.time[event]),
        "context": {
            name: [_id(raw) for raw in ids_by_user[user]]
            for name, ids_by_user in log.user_attributes.items()
        }
        | {
            name: [_id(raw) for raw in column.values[column.codes[event]]]
            for name, column in log.request_attributes.items()
        }
        | {name: float(values[user]) for name, values in log.user_floats.items()}
        | {name: float(values[event]) for name, values in log.request_floats.items()},
        "history": history | {TIME: dataset.time[past].tolist()},
        "candidates": columns,
    }


def _ids(ids: list[str], codes: list[int]) -> list[str | int]:
    return [_id(ids[code]) for code in codes]


def _id(raw: str) -> str | int:
    """Return an integer id as an integer; "007" and "85123A" stay text."""
    if raw.isdecimal() and str(int(raw)) == raw:
        return int(raw)
    return raw
