"""Collate parsed requests into one TorchRec ``Batch``.

Keys with different numbers of rows in one ``KeyedJaggedTensor`` are what TorchRec calls variable
batch per key (VBE): users' keys have B rows, candidates' keys C rows, and ``inverse_indices`` say
which user each candidate belongs to. Multi-valued event columns have T rows, one bag per event.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_kvshare.errors import ShapeError
from torchrec_kvshare.features.bags import Bags, bits_of, jagged, joined, single
from torchrec_kvshare.features.request import Events, Request
from torchrec_kvshare.features.schema import (
    ITEM,
    REQUEST_HISTORY,
    REQUEST_TIME,
    TIME,
    USER,
    FeatureSchema,
    candidate_key,
    context_key,
    first_index_key,
    has_candidate_rows,
    history_key,
    pages_key,
)


class RequestBatch(tuple[Request, ...]):
    """Requests that are scored together, and which of them share their histories.

    Requests of one user with equal events share one prefill and one copy of K/V.
    """

    @property
    def users(self) -> list[Request]:
        """The first request of each group that shares its histories."""
        return [self[row] for row in self._groups[0]]

    @property
    def user_of_request(self) -> list[int]:
        """The index among ``users`` of each request."""
        return self._groups[1]

    @cached_property
    def request_of_candidate(self) -> Tensor:
        """[C] int64, the index of the request that each candidate belongs to."""
        counts = torch.tensor([request.num_candidates for request in self])
        return torch.repeat_interleave(torch.arange(len(self)), counts)

    def select(self, rows: Sequence[int]) -> "RequestBatch":
        """Return some of the requests."""
        return self if len(rows) == len(self) else RequestBatch(self[row] for row in rows)

    @cached_property
    def _groups(self) -> tuple[list[int], list[int]]:
        """The row of each group's first request, and the group of each request."""
        firsts: list[int] = []
        group_of_request: list[int] = []
        groups_by_user: dict[str, list[int]] = {}
        for row, request in enumerate(self):
            known = groups_by_user.setdefault(request.user_id, [])
            same = [group for group in known if _same_events(self[firsts[group]], request)]
            if not same:
                known.append(len(firsts))
                firsts.append(row)
            group_of_request.append(same[0] if same else known[-1])
        return firsts, group_of_request


def collate(requests: Sequence[Request], schema: FeatureSchema) -> Batch:
    """Collate histories and candidates, for a model that encodes them all.

    Args:
        requests: at least one.
        schema: the model's columns.

    Returns:
        A batch for ``model(dense, features)``.
    """
    batch = _grouped(requests)
    histories = history_bags([user.events_by_history for user in batch.users], schema)
    return _collate(batch, _request_bags(batch, schema) | histories, schema)


def collate_candidates(requests: Sequence[Request], schema: FeatureSchema) -> Batch:
    """Collate candidates with their users and contexts; of the histories only the times.

    Args:
        requests: at least one.
        schema: the model's columns.

    Returns:
        A batch for ``model.score`` once ``with_key`` has added the page ids.
    """
    batch = _grouped(requests)
    return _collate(batch, _request_bags(batch, schema), schema)


def collate_history(requests: Sequence[Request], schema: FeatureSchema) -> Batch:
    """Collate histories alone, for ``model.prefill``.

    Args:
        requests: at least one.
        schema: the model's columns.

    Returns:
        A batch with the histories' keys; one row for each of ``RequestBatch.users``.
    """
    users = _grouped(requests).users
    bags = history_bags([user.events_by_history for user in users], schema)
    return _without_candidates(bags, schema)


def collate_tails(
    events_by_history: Sequence[Mapping[str, Events]],
    first_indices: Mapping[str, Sequence[int]],
    schema: FeatureSchema,
) -> Batch:
    """Collate the new events of some histories, for ``model.extend``.

    Args:
        events_by_history: each user's new events by history; there may be none.
        first_indices: by history, the index in the window of each user's first new event.
        schema: the model's columns.

    Returns:
        A batch with the histories' keys and their ``first_index_key``.
    """
    bags = history_bags(events_by_history, schema)
    for name, indices in first_indices.items():
        bags[first_index_key(name)] = single(torch.tensor(indices))
    return _without_candidates(bags, schema)


def assemble(
    bags_by_key: dict[str, Bags], candidate_user: Tensor, dense: Tensor, labels: Tensor
) -> Batch:
    """Assemble a batch in TorchRec's types.

    ::

        #                user 0        user 1
        # history.item   [3, 9, 4]     [8]           B = 2 rows
        # candidates     [5] [7]       [5] [6] [9]   C = 5 rows
        # candidate_user  0   0         1   1   1

    Args:
        bags_by_key: rows of every key; keys with ``has_candidate_rows`` have C rows.
        candidate_user: [C] int64, the user of each candidate, in any order.
        dense: [C, num_dense] float32.
        labels: [C, tasks] float32.

    Returns:
        The batch; every key keeps its own stride.
    """
    own_row = torch.arange(candidate_user.numel())
    inverse = [own_row if has_candidate_rows(key) else candidate_user for key in bags_by_key]
    features = _keyed(bags_by_key, torch.stack(inverse))
    return Batch(dense_features=dense, sparse_features=features, labels=labels)


def with_key(features: KeyedJaggedTensor, key: str, bags: Bags) -> KeyedJaggedTensor:
    """Add a key with one row per user.

    Args:
        features: of a batch as ``assemble`` returns it.
        key: name of the new key.
        bags: its rows, one per user.

    Returns:
        A new ``KeyedJaggedTensor``; no rows are repeated per candidate.
    """
    old_keys, inverse = features.inverse_indices()
    of_users = next(row for row, old in enumerate(old_keys) if not has_candidate_rows(old))
    bags_by_key = _bags_by_key(features)
    assert list(old_keys) == list(bags_by_key)
    weights = features.weights_or_none()
    if weights is not None:
        weights = torch.cat([weights, weights.new_ones(bags.values.size(0))])
    inverse = torch.cat([inverse, inverse[of_users, None]])
    return _keyed(bags_by_key | {key: bags}, inverse, weights)


def with_weights(
    features: KeyedJaggedTensor, weights_by_key: Mapping[str, Tensor]
) -> KeyedJaggedTensor:
    """Give ids weights, by which a weighted EmbeddingBagCollection multiplies their rows.

    Args:
        features: of a batch as ``assemble`` returns it.
        weights_by_key: by key, [ids] float32: one weight for each of its ids, in their order.

    Returns:
        A new ``KeyedJaggedTensor``, in which ids of other keys have weight 1.

    Raises:
        ShapeError: naming the key, if the batch has no such key or another number of ids in it.

    Example:
        >>> users = torch.zeros(2, dtype=torch.int64)
        >>> bags = {"user_id": single(torch.tensor([3])), "candidates.tag": single(users + 7)}
        >>> batch = assemble(bags, users, torch.zeros(2, 1), torch.zeros(2))
        >>> weights = {"candidates.tag": torch.tensor([0.5, 2.0])}
        >>> with_weights(batch.sparse_features, weights).weights()
        tensor([1.0000, 0.5000, 2.0000])
    """
    bags_by_key = _bags_by_key(features)
    if unknown := sorted(set(weights_by_key) - set(bags_by_key)):
        raise ShapeError(f"there are weights for {unknown}; the batch has {list(bags_by_key)}")
    weights: list[Tensor] = []
    for key, bags in bags_by_key.items():
        of_key = weights_by_key.get(key, torch.ones(bags.values.size(0)))
        if of_key.shape != bags.values.shape:
            raise ShapeError(
                f"{key} has weights of shape {list(of_key.shape)}; its {bags.values.size(0)} ids "
                "have one each"
            )
        weights.append(of_key.to(bags.values.device))
    return _keyed(bags_by_key, features.inverse_indices()[1], torch.cat(weights))


def with_pages(
    features: KeyedJaggedTensor,
    schema: FeatureSchema,
    pages_by_history: Sequence[Sequence[list[int]]],
) -> KeyedJaggedTensor:
    """Tell candidates where their users' K/V is: one key per history, whose values are page ids.

    Args:
        features: as ``collate_candidates`` returns them.
        schema: the model's columns.
        pages_by_history: for each history the page ids of each of ``RequestBatch.users``, oldest
            rows first.

    Returns:
        The features with each history's ``pages_key`` at the users' stride. No K/V is copied.
    """
    for history, pages_by_user in zip(schema.histories, pages_by_history, strict=True):
        pages = torch.tensor([*chain.from_iterable(pages_by_user)], dtype=torch.int64)
        lengths = torch.tensor([len(pages) for pages in pages_by_user])
        features = with_key(features, pages_key(history.name), Bags(pages, lengths))
    return features


def _bags_by_key(features: KeyedJaggedTensor) -> dict[str, Bags]:
    rows = features.to_dict(compute_offsets=False)
    return {key: Bags(one.values(), one.lengths()) for key, one in rows.items()}


def _keyed(
    bags_by_key: Mapping[str, Bags], inverse: Tensor, weights: Tensor | None = None
) -> KeyedJaggedTensor:
    """Return keys with their own strides; all sizes are given, so that no device is read."""
    keys, all_bags = list(bags_by_key), list(bags_by_key.values())
    return KeyedJaggedTensor(
        keys=keys,
        values=torch.cat([bags.values for bags in all_bags]),
        weights=weights,
        lengths=torch.cat([bags.lengths for bags in all_bags]),
        stride_per_key_per_rank=[[bags.lengths.numel()] for bags in all_bags],
        stride_per_key=[bags.lengths.numel() for bags in all_bags],
        length_per_key=[bags.values.numel() for bags in all_bags],
        inverse_indices=(keys, inverse),
    )


def context_bags(requests: Sequence[Request], schema: FeatureSchema) -> dict[str, Bags]:
    """Return the context columns by key, one bag per request."""
    return {
        context_key(column): jagged([request.context[column] for request in requests])
        for column in schema.context
    }


def candidate_bags(requests: Sequence[Request], schema: FeatureSchema) -> dict[str, Bags]:
    """Return the candidates' multi-valued columns by key, one bag per candidate."""
    return {
        candidate_key(column): joined([request.candidate_bags[column] for request in requests])
        for column in schema.item_attributes
    }


def history_bags(
    events_by_history: Sequence[Mapping[str, Events]], schema: FeatureSchema
) -> dict[str, Bags]:
    """Return event columns by key: one bag per user, or per event if multi-valued.

    Floats are there as ``bits_of`` returns them.
    """
    bags = {}
    for history in schema.histories:
        events = [by_history[history.name] for by_history in events_by_history]
        for column in (*schema.event_columns, TIME):
            bags[history_key(history.name, column)] = jagged([e.columns[column] for e in events])
        for column in schema.event_floats:
            bits = [bits_of(e.floats[column]) for e in events]
            bags[history_key(history.name, column)] = jagged(bits)
        for column in schema.item_attributes:
            bags[history_key(history.name, column)] = joined([e.bags[column] for e in events])
    return bags


def _grouped(requests: Sequence[Request]) -> RequestBatch:
    return requests if isinstance(requests, RequestBatch) else RequestBatch(requests)


def _collate(batch: RequestBatch, bags: dict[str, Bags], schema: FeatureSchema) -> Batch:
    dense = torch.cat([request.dense for request in batch])
    labels = torch.zeros(dense.size(0), len(schema.tasks))
    return assemble(bags, batch.request_of_candidate, dense, labels)


def _request_bags(batch: RequestBatch, schema: FeatureSchema) -> dict[str, Bags]:
    """Return all columns of users and candidates, and the times of the events."""
    bags = {USER: single(torch.tensor([request.user_row for request in batch]))}
    bags |= context_bags(batch, schema)
    bags[REQUEST_TIME] = single(torch.tensor([request.time for request in batch]))
    bags[REQUEST_HISTORY] = single(torch.tensor(batch.user_of_request))
    for history in schema.histories:
        times = [user.events_by_history[history.name].columns[TIME] for user in batch.users]
        bags[history_key(history.name, TIME)] = jagged(times)
    bags[candidate_key(ITEM)] = single(torch.cat([r.candidate_items for r in batch]))
    return bags | candidate_bags(batch, schema)


def _without_candidates(bags: dict[str, Bags], schema: FeatureSchema) -> Batch:
    no_candidates = torch.empty(0, dtype=torch.int64)
    labels = torch.empty(0, len(schema.tasks))
    return assemble(bags, no_candidates, torch.empty(0, schema.num_dense), labels)


def _same_events(one: Request, other: Request) -> bool:
    if one.events_by_history is other.events_by_history:
        return True
    for name, events in one.events_by_history.items():
        others = other.events_by_history[name]
        columns, bags = others.columns | others.floats, others.bags
        both = events.columns | events.floats
        if not all(torch.equal(values, columns[c]) for c, values in both.items()):
            return False
        for column, (values, lengths) in events.bags.items():
            if not torch.equal(lengths, bags[column].lengths):
                return False
            if not torch.equal(values, bags[column].values):
                return False
    return True
