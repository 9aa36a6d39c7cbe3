"""Requests made from a data set's test events, in the project's one request format."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from torchrec_kvshare.data.dataset import TEST, Dataset
from torchrec_kvshare.errors import ConfigError, DataError
from torchrec_kvshare.features.schema import ACTION, ITEM, TIME, USER


class TargetedRequest(NamedTuple):
    """A raw request, and the index of its event's item among the candidates."""

    raw: dict[str, Any]
    target: int


def make_requests(
    dataset: Dataset, count: int, num_candidates: int, seed: int
) -> Iterator[dict[str, Any]]:
    """Make requests at the times of random test events.

    The candidates are the event's item, at a random position, and items drawn evenly from the
    catalogue. The history is every strictly earlier event of the user, uncut.

    Args:
        dataset: its test split gives users and times.
        count: number of requests; test events may repeat.
        num_candidates: N of every request.
        seed: the same seed gives the same requests.

    Yields:
        Raw requests, ready to be written as JSON.

    Raises:
        ConfigError: if a number is below 1, or the catalogue is smaller than ``num_candidates``.
        DataError: if the test split is empty.
    """
    for request in make_targeted_requests(dataset, count, num_candidates, seed):
        yield request.raw


def make_targeted_requests(
    dataset: Dataset, count: int, num_candidates: int, seed: int
) -> Iterator[TargetedRequest]:
    """Make the requests of ``make_requests``, each with the index of its target."""
    for name, value in (("count", count), ("candidates", num_candidates)):
        if value < 1:
            raise ConfigError(f"{name} is {value}; it must be at least 1")
    if num_candidates > len(dataset.known_items):
        raise ConfigError(
            f"candidates is {num_candidates}; the catalogue has {len(dataset.known_items)} items"
        )
    rng = np.random.default_rng(seed)
    events = np.flatnonzero(dataset.split == TEST)
    if not len(events):
        raise DataError("the data set has no event in the test split")
    for number in range(count):
        event = int(rng.choice(events))
        drawn = rng.choice(dataset.known_items, num_candidates, replace=False)
        if dataset.item[event] not in drawn:
            drawn[rng.integers(num_candidates)] = dataset.item[event]
        candidates = drawn.tolist()
        raw = {"request_id": f"r{number + 1}"} | _request(dataset, event, candidates)
        yield TargetedRequest(raw, candidates.index(dataset.item[event]))


def _request(dataset: Dataset, event: int, candidates: list[int]) -> dict[str, Any]:
    log = dataset.log
    user = int(dataset.event_user[event])
    first = int(dataset.user_offsets[user])
    past = slice(first, first + int(dataset.num_earlier[event]))
    items = dataset.item[past].tolist()
    history: dict[str, Any] = {ITEM: _ids(log.items.ids, items)}
    if log.action is not None:
        history[ACTION] = _ids(log.action.ids, dataset.action[past].tolist())
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
        },
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
