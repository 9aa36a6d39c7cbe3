"""Columns of users, events and candidates into one TorchRec ``Batch``.

Keys with different numbers of rows in one ``KeyedJaggedTensor`` are what TorchRec calls variable
batch per key (VBE): users' keys have B rows, candidates' keys C rows, and ``inverse_indices`` say
which user each candidate belongs to. Multi-valued event columns have T rows, one bag per event.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_kvshare.features.bags import Bags, jagged, joined, single
from torchrec_kvshare.features.request import Events, Request, distinct_histories
from torchrec_kvshare.features.schema import (
    ITEM,
    REQUEST_HISTORY,
    REQUEST_TIME,
    TIME,
    USER,
    FeatureSchema,
    candidate_key,
    context_key,
    first_place_key,
    has_candidate_rows,
    history_key,
)


def assemble(
    bags_by_key: dict[str, Bags], candidate_user: Tensor, dense: Tensor, labels: Tensor
) -> Batch:
    """One batch in TorchRec's types.

    ::

        #                user 0        user 1
        # history.item   [3, 9, 4]     [8]           B = 2 rows
        # candidates     [5] [7]       [5] [6] [9]   C = 5 rows
        # candidate_user  0   0         1   1   1

    Args:
        bags_by_key: rows of every key; those of ``has_candidate_rows`` have C rows.
        candidate_user: [C] int64, the user of each candidate, in any order.
        dense: [C, num_dense] float32.
        labels: [C] float32.

    Returns:
        The batch; every key keeps its own stride.
    """
    own_row = torch.arange(candidate_user.numel())
    inverse = [own_row if has_candidate_rows(key) else candidate_user for key in bags_by_key]
    features = _keyed(bags_by_key, torch.stack(inverse))
    return Batch(dense_features=dense, sparse_features=features, labels=labels)


def with_key(
    features: KeyedJaggedTensor, key: str, bags: Bags, candidate_user: Tensor
) -> KeyedJaggedTensor:
    """The same features and one key more, with the users' stride.

    Args:
        features: a batch as ``assemble`` makes it.
        key: name of the new key.
        bags: its rows, one per user.
        candidate_user: [C] int64, the user of each candidate.

    Returns:
        A new ``KeyedJaggedTensor``; nothing of the old one is copied N-fold.
    """
    old_keys, inverse = features.inverse_indices()
    rows = features.to_dict(compute_offsets=False)
    bags_by_key = {key: Bags(one.values(), one.lengths()) for key, one in rows.items()}
    assert list(old_keys) == list(bags_by_key)
    return _keyed(bags_by_key | {key: bags}, torch.cat([inverse, candidate_user[None]]))


def _keyed(bags_by_key: Mapping[str, Bags], inverse: Tensor) -> KeyedJaggedTensor:
    """Keys with a stride each, as a batch that knows its sizes, on any device."""
    keys, all_bags = list(bags_by_key), list(bags_by_key.values())
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.cat([bags.values for bags in all_bags]),
        lengths=torch.cat([bags.lengths for bags in all_bags]),
        stride_per_key_per_rank=[[bags.lengths.numel()] for bags in all_bags],
        stride_per_key=[bags.lengths.numel() for bags in all_bags],
        length_per_key=[bags.values.numel() for bags in all_bags],
        inverse_indices=(keys, inverse),
    )


def collate_history(requests: Sequence[Request], schema: FeatureSchema) -> Batch:
    """The histories of some requests, as prefill wants them: no candidates.

    Args:
        requests: at least one.
        schema: the model's columns.

    Returns:
        A batch with the histories' keys alone.
    """
    firsts, _ = distinct_histories(requests)
    return _without_candidates(
        history_bags([requests[row].events_by_history for row in firsts], schema), schema
    )


def collate_tails(
    events_by_history: Sequence[Mapping[str, Events]],
    first_places: Mapping[str, Sequence[int]],
    schema: FeatureSchema,
) -> Batch:
    """The new events of some histories, as ``extend`` wants them.

    Args:
        events_by_history: new events of each user by the history's name; maybe none.
        first_places: by the history's name, the window's place of each user's first new event.
        schema: the model's columns.

    Returns:
        A batch with the histories' keys, and with ``first_place``, alone.
    """
    bags = history_bags(events_by_history, schema)
    for name, places in first_places.items():
        bags[first_place_key(name)] = single(torch.tensor(places))
    return _without_candidates(bags, schema)


def collate_candidates(requests: Sequence[Request], schema: FeatureSchema) -> Batch:
    """Candidates with their users and contexts, and of the histories the times alone.

    Args:
        requests: at least one.
        schema: the model's columns.

    Returns:
        A batch that can be scored once page ids are added.
    """
    return _collate(requests, _request_bags(requests, schema))


def collate(requests: Sequence[Request], schema: FeatureSchema) -> Batch:
    """Histories and candidates, as the uncached model wants them.

    Args:
        requests: at least one.
        schema: the model's columns.

    Returns:
        A batch for ``model(dense, features)``.
    """
    firsts, _ = distinct_histories(requests)
    events = history_bags([requests[row].events_by_history for row in firsts], schema)
    return _collate(requests, _request_bags(requests, schema) | events)


def user_of_candidates(requests: Sequence[Request]) -> Tensor:
    """[C] int64: the request each candidate belongs to."""
    counts = torch.tensor([request.num_candidates for request in requests])
    return torch.repeat_interleave(torch.arange(len(requests)), counts)


def context_bags(requests: Sequence[Request], schema: FeatureSchema) -> dict[str, Bags]:
    """Context of all requests by its key, a bag for each request."""
    return {
        context_key(column): jagged([request.context[column] for request in requests])
        for column in schema.context
    }


def candidate_bags(requests: Sequence[Request], schema: FeatureSchema) -> dict[str, Bags]:
    """Multi-valued columns of all candidates by their keys, a bag for each candidate."""
    return {
        candidate_key(column): joined([request.candidate_bags[column] for request in requests])
        for column in schema.item_attributes
    }


def history_bags(
    events_by_history: Sequence[Mapping[str, Events]], schema: FeatureSchema
) -> dict[str, Bags]:
    """Events by their keys: a bag for each user, of multi-valued columns one for each event."""
    bags = {}
    for history in schema.histories:
        events = [by_history[history.name] for by_history in events_by_history]
        for column in (*schema.event_columns, TIME):
            bags[history_key(history.name, column)] = jagged([e.columns[column] for e in events])
        for column in schema.item_attributes:
            bags[history_key(history.name, column)] = joined([e.bags[column] for e in events])
    return bags


def _collate(requests: Sequence[Request], bags: dict[str, Bags]) -> Batch:
    dense = torch.cat([request.dense for request in requests])
    return assemble(bags, user_of_candidates(requests), dense, torch.zeros(dense.size(0)))


def _request_bags(requests: Sequence[Request], schema: FeatureSchema) -> dict[str, Bags]:
    """Everything but the events, of which there are the times alone."""
    firsts, row_of_request = distinct_histories(requests)
    bags = {USER: single(torch.tensor([request.user_row for request in requests]))}
    bags |= context_bags(requests, schema)
    bags[REQUEST_TIME] = single(torch.tensor([request.time for request in requests]))
    bags[REQUEST_HISTORY] = single(torch.tensor(row_of_request))
    for history in schema.histories:
        times = [requests[row].events_by_history[history.name].columns[TIME] for row in firsts]
        bags[history_key(history.name, TIME)] = jagged(times)
    bags[candidate_key(ITEM)] = single(torch.cat([r.candidate_items for r in requests]))
    return bags | candidate_bags(requests, schema)


def _without_candidates(bags: dict[str, Bags], schema: FeatureSchema) -> Batch:
    nobody = torch.empty(0, dtype=torch.int64)
    return assemble(bags, nobody, torch.empty(0, schema.num_dense), torch.empty(0))
