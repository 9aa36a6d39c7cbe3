"""What a target sees, batch by batch, against the raw log read event by event."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.datasets.utils import Batch

from tests.data.logs import (
    ITEMS,
    SURFACES,
    Event,
    age_of,
    all_events,
    countries_of,
    event_lists,
    genres_of,
    impressions,
    in_order,
    log_of,
    one_user,
    price_of,
)
from tests.worlds import LOGIT_TOLERANCE, make_dlrm
from torchrec_kvshare.data import targets as targets_module
from torchrec_kvshare.data.dataset import Dataset, Ints, build_dataset
from torchrec_kvshare.data.draws import Draws
from torchrec_kvshare.data.synthetic import synthetic_world
from torchrec_kvshare.data.targets import (
    UNKNOWN_SHARE,
    Windows,
    batches_of,
    build_batch,
    build_catalogue_batch,
    sample_negatives,
    windows_of,
)
from torchrec_kvshare.errors import DataError
from torchrec_kvshare.features.bags import floats_of
from torchrec_kvshare.features.batches import collate
from torchrec_kvshare.features.dense import clock_features, squash
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.schema import (
    ACTION,
    CANDIDATE_TIME,
    HISTORY,
    ITEM,
    REQUEST_HISTORY,
    REQUEST_TIME,
    TIME,
    UNKNOWN_ROW,
    USER,
    candidate_key,
    context_key,
    history_key,
    visible_key,
)

MAX_HISTORY, BLOCK = 9, 3
NUM_CANDIDATES = 3  # of a target: its own item and two more

# Events in the order of the data set, as the log has them.
Events = list[Event]


def dataset_of(events: Events) -> Dataset:
    return build_dataset(log_of(events), all_events(MAX_HISTORY, BLOCK))


def cut(events: Events) -> Events:
    """The newest events that fit, dropped by whole blocks from the oldest on."""
    start = 0
    while len(events) - start > MAX_HISTORY:
        start += BLOCK
    return events[start:]


def seen_by(target: Event, events: Events) -> Events:
    """The window of a target: what its user did strictly earlier, cut."""
    return cut([e for e in in_order(events) if e.user == target.user and e.time < target.time])


def all_targets(dataset: Dataset) -> Ints:
    return np.arange(len(dataset.time))


def candidates_of(dataset: Dataset, targets: Ints) -> Ints:
    rng = np.random.default_rng(len(targets))
    shape = (len(targets), NUM_CANDIDATES - 1)
    negatives = rng.integers(0, len(dataset.log.items.ids), shape)
    return np.concatenate([dataset.item[targets][:, None], negatives], axis=1)


def whole_batch(dataset: Dataset) -> tuple[Windows, Ints, Batch]:
    """One batch in which every event of the data set is a target."""
    windows = windows_of(dataset, all_targets(dataset))
    candidates = candidates_of(dataset, windows.targets)
    return windows, candidates, build_batch(dataset, windows, candidates, None)


def rows_of(batch: Batch, key: str) -> list[list[int]]:
    """Every row of a key, as lists."""
    return [row.tolist() for row in batch.sparse_features[key].to_dense()]


def user_of_candidate(batch: Batch, key: str = USER) -> list[int]:
    keys, inverse = batch.sparse_features.inverse_indices()
    return inverse[keys.index(key)].tolist()


def raw_request(target: Event, events: Events, candidates: list[str]) -> dict[str, Any]:
    """The raw request at the time of a target, with its whole history."""
    past = [e for e in in_order(events) if e.user == target.user and e.time < target.time]
    return {
        USER: target.user,
        TIME: target.time,
        "context": {
            "country": list(countries_of(target.user)),
            "surface": list(target.surfaces),
            "age": age_of(target.user),
            "battery": target.battery,
        },
        "history": {
            ITEM: [event.item for event in past],
            ACTION: [event.action for event in past],
            "mood": [event.mood or None for event in past],
            "dwell": [event.dwell for event in past],
            "genres": [list(genres_of(event.item)) for event in past],
            TIME: [event.time for event in past],
        },
        "candidates": {
            ITEM: candidates,
            "genres": [list(genres_of(item)) for item in candidates],
            "price": [price_of(item) for item in candidates],
        },
    }


@given(event_lists)
def test_every_target_is_in_exactly_one_window(events: Events) -> None:
    dataset = dataset_of(events)
    windows = windows_of(dataset, all_targets(dataset))
    assert Counter(windows.targets.tolist()) == Counter(range(len(events)))
    assert windows.num_targets.sum() == len(events)
    assert windows.num_targets.min() >= 1
    owner = np.repeat(windows.user, windows.num_targets)
    assert owner.tolist() == dataset.event_user[windows.targets].tolist()


@given(event_lists)
def test_a_target_sees_its_strictly_earlier_events_cut_to_the_window(events: Events) -> None:
    dataset = dataset_of(events)
    windows, _, batch = whole_batch(dataset)
    ordered, vocabularies = in_order(events), dataset.schema.vocabulary_by_column
    histories, times = (
        rows_of(batch, history_key(HISTORY, ITEM)),
        rows_of(batch, history_key(HISTORY, TIME)),
    )
    actions = rows_of(batch, history_key(HISTORY, ACTION))
    visible = batch.sparse_features[visible_key(HISTORY)].values().tolist()
    for index, user in enumerate(user_of_candidate(batch)):
        target = ordered[windows.targets[index // NUM_CANDIDATES]]
        seen = seen_by(target, events)
        oldest = slice(0, visible[index])
        assert histories[user][oldest] == vocabularies[ITEM].rows(e.item for e in seen)
        assert actions[user][oldest] == vocabularies["events.action"].rows(e.action for e in seen)
        assert times[user][oldest] == [event.time for event in seen]
        assert len(histories[user]) <= MAX_HISTORY


def test_events_of_one_time_see_none_of_each_other() -> None:
    dataset = build_dataset(one_user([5, 5, 7, 7, 7, 9]), all_events(8, 4))
    _, _, batch = whole_batch(dataset)
    visible = batch.sparse_features[visible_key(HISTORY)].values().view(-1, NUM_CANDIDATES)
    assert visible[:, 0].tolist() == [0, 0, 2, 2, 2, 5]


def test_targets_that_read_from_one_start_share_a_prefill() -> None:
    dataset = build_dataset(one_user(list(range(16))), all_events(MAX_HISTORY, BLOCK))
    windows, _, batch = whole_batch(dataset)
    # Up to nine events are read from the first on, then from the fourth, then from the seventh.
    assert windows.first_event[HISTORY].tolist() == [0, 3, 6]
    assert windows.num_targets.tolist() == [10, 3, 3]
    assert windows.num_events[HISTORY].tolist() == [9, 9, 9]
    assert batch.sparse_features[history_key(HISTORY, ITEM)].lengths().tolist() == [9, 9, 9]


def test_a_window_of_many_targets_is_split_between_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets_module, "MAX_TARGETS_PER_WINDOW", 4)
    dataset = build_dataset(one_user(list(range(16))), all_events(MAX_HISTORY, BLOCK))
    windows = windows_of(dataset, all_targets(dataset))
    assert windows.num_targets.tolist() == [4, 4, 2, 3, 3]
    assert windows.first_event[HISTORY].tolist() == [0, 0, 0, 3, 6]
    # A part encodes no further than its last target sees.
    assert windows.num_events[HISTORY].tolist() == [3, 7, 9, 9, 9]


@given(event_lists, st.integers(0, 2**32 - 1))
def test_the_window_of_a_target_is_the_one_its_request_would_get(events: Events, seed: int) -> None:
    dataset = dataset_of(events)
    windows, _, batch = whole_batch(dataset)
    target = int(np.random.default_rng(seed).integers(len(events)))
    raw_target = in_order(events)[target]
    request = parse_request(raw_request(raw_target, events, [raw_target.item]), dataset.schema)
    read = request.events_by_history[HISTORY].columns
    index = windows.targets.tolist().index(target) * NUM_CANDIDATES
    user = user_of_candidate(batch)[index]
    visible = batch.sparse_features[visible_key(HISTORY)].values()[index]
    for column in (ITEM, ACTION, "mood"):
        row = rows_of(batch, history_key(HISTORY, column))[user][:visible]
        assert row == read[column].tolist()
    assert rows_of(batch, history_key(HISTORY, TIME))[user][:visible] == read[TIME].tolist()
    dwells = torch.tensor(rows_of(batch, history_key(HISTORY, "dwell"))[user][:visible])
    expected = request.events_by_history[HISTORY].floats["dwell"]
    assert floats_of(dwells).tolist() == expected.tolist()


@given(event_lists)
def test_rows_of_a_batch_have_the_stride_of_their_kind(events: Events) -> None:
    dataset = dataset_of(events)
    windows, candidates, batch = whole_batch(dataset)
    num_users, num_candidates = len(windows.user), candidates.size
    stride_by_key = {
        USER: num_users,
        context_key("country"): num_users,
        history_key(HISTORY, TIME): num_users,
        history_key(HISTORY, ITEM): num_users,
        history_key(HISTORY, ACTION): num_users,
        history_key(HISTORY, "mood"): num_users,
        history_key(HISTORY, "dwell"): num_users,
        history_key(HISTORY, "genres"): windows.num_events[HISTORY].sum(),
        candidate_key(ITEM): num_candidates,
        candidate_key("genres"): num_candidates,
        CANDIDATE_TIME: num_candidates,
        visible_key(HISTORY): num_candidates,
    }
    features = batch.sparse_features
    assert dict(zip(features.keys(), features.stride_per_key(), strict=True)) == stride_by_key
    owner = np.repeat(np.arange(num_users), windows.num_targets * NUM_CANDIDATES).tolist()
    for key in stride_by_key:
        is_candidates = key.split(".")[0] in ("candidates", "targets")
        expected = list(range(num_candidates)) if is_candidates else owner
        assert user_of_candidate(batch, key) == expected


@given(event_lists)
def test_every_value_of_a_batch_is_that_of_the_log(events: Events) -> None:
    dataset = dataset_of(events)
    windows, candidates, batch = whole_batch(dataset)
    vocabularies = dataset.schema.vocabulary_by_column
    ordered = in_order(events)
    targets = [ordered[index] for index in windows.targets]
    shown = [dataset.log.items.ids[code] for code in candidates.ravel()]
    assert shown[::NUM_CANDIDATES] == [target.item for target in targets]
    assert rows_of(batch, candidate_key(ITEM)) == [[row] for row in vocabularies[ITEM].rows(shown)]
    genres = [vocabularies["items.genres"].rows(genres_of(item)) for item in shown]
    assert rows_of(batch, candidate_key("genres")) == genres
    users = [dataset.log.users.ids[code] for code in windows.user]
    assert rows_of(batch, USER) == [[row] for row in vocabularies[USER].rows(users)]
    countries = [vocabularies["context.country"].rows(countries_of(user)) for user in users]
    assert rows_of(batch, context_key("country")) == countries
    times = np.repeat([target.time for target in targets], NUM_CANDIDATES)
    assert batch.sparse_features[CANDIDATE_TIME].values().tolist() == times.tolist()
    prices = squash(np.array([[price_of(item)] for item in shown]))
    owners = [target for target in targets for _ in range(NUM_CANDIDATES)]
    floats = squash(np.array([[age_of(owner.user), owner.battery] for owner in owners]))
    dense = np.concatenate([clock_features(times), floats, prices], axis=1)
    assert np.array_equal(batch.dense_features.numpy(), dense)
    labels = [[target.label] + [0] * (NUM_CANDIDATES - 1) for target in targets]
    assert batch.labels.tolist() == [[label] for group in labels for label in group]


@given(event_lists)
def test_attributes_stand_on_their_own_event(events: Events) -> None:
    dataset = dataset_of(events)
    windows, _, batch = whole_batch(dataset)
    ordered, vocabulary = in_order(events), dataset.schema.vocabulary_by_column["items.genres"]
    read = [
        ordered[index]
        for first, length in zip(
            windows.first_event[HISTORY], windows.num_events[HISTORY], strict=True
        )
        for index in range(first, first + length)
    ]
    assert rows_of(batch, history_key(HISTORY, "genres")) == [
        vocabulary.rows(genres_of(event.item)) for event in read
    ]


def logits(batch: Batch, dataset: Dataset) -> Tensor:
    model = make_dlrm(3, dataset.schema)
    with torch.no_grad():
        return model(batch.dense_features, batch.sparse_features).squeeze(1)


@pytest.fixture(scope="module")
def ragged() -> tuple[Events, Dataset]:
    """Three users of different lengths, with equal times and an item common in all splits."""
    rng = np.random.default_rng(8)
    events = [
        Event(user, str(rng.choice(ITEMS)), int(rng.integers(1_000_000, 9_000_000)), action)
        for user, count in (("u", 26), ("vv", 5), ("www", 1))
        for action in rng.choice(["view", "buy"], count).tolist()
    ]
    events += [event._replace(item="104") for event in events[::5]]
    return events, dataset_of(events)


@pytest.fixture(scope="module", params=["ragged", "impressions"])
def logged(
    request: pytest.FixtureRequest, ragged: tuple[Events, Dataset]
) -> tuple[Events, Dataset]:
    """The ragged users, or requests that have attributes of their own."""
    if request.param == "ragged":
        return ragged
    events = impressions(4)
    return events, dataset_of(events)


def test_a_target_has_the_logits_of_its_catalogue_batch(logged: tuple[Events, Dataset]) -> None:
    _, dataset = logged
    windows, candidates, batch = whole_batch(dataset)
    together = logits(batch, dataset).view(-1, NUM_CANDIDATES)
    for index, target in enumerate(windows.targets):
        window = windows_of(dataset, np.array([target]))
        alone = build_catalogue_batch(dataset, window, candidates[index : index + 1])
        assert alone.sparse_features[REQUEST_TIME].values().tolist() == [dataset.time[target]]
        difference = (logits(alone, dataset) - together[index]).abs().max()
        assert difference <= LOGIT_TOLERANCE


def test_a_catalogue_batch_ranks_many_windows_at_once(ragged: tuple[Events, Dataset]) -> None:
    _, dataset = ragged
    last_of_users = dataset.user_offsets[1:] - 1
    candidates = np.stack([np.roll(dataset.known_items, shift) for shift in range(3)])
    windows = windows_of(dataset, last_of_users)
    batch = build_catalogue_batch(dataset, windows, candidates)
    together = logits(batch, dataset).view(candidates.shape)
    for index in range(3):
        chosen = np.array([index])
        alone = build_catalogue_batch(dataset, windows.take(chosen), candidates[chosen])
        assert (logits(alone, dataset) - together[index]).abs().max() <= LOGIT_TOLERANCE


def test_a_target_has_the_logits_of_its_request(logged: tuple[Events, Dataset]) -> None:
    """What is trained is what is served, from the log to the logits."""
    events, dataset = logged
    windows, candidates, batch = whole_batch(dataset)
    trained = logits(batch, dataset).view(-1, NUM_CANDIDATES)
    ordered, ids = in_order(events), dataset.log.items.ids
    for index, target in enumerate(windows.targets):
        shown = [ids[code] for code in candidates[index]]
        request = parse_request(raw_request(ordered[target], events, shown), dataset.schema)
        served = logits(collate([request], dataset.schema), dataset)
        assert (served - trained[index]).abs().max() <= LOGIT_TOLERANCE


def test_requests_of_a_window_share_its_prefill() -> None:
    """Each has its own context, and rows shown at one time see none of each other."""
    events = impressions(7)
    dataset = dataset_of(events)
    windows = windows_of(dataset, all_targets(dataset))
    batch = build_batch(dataset, windows, dataset.item[windows.targets][:, None], None)
    ordered, features = in_order(events), batch.sparse_features
    assert len(windows.user) < len({(event.user, event.time) for event in events})
    assert features[history_key(HISTORY, TIME)].lengths().numel() == len(windows.user)
    window_of_request = np.repeat(np.arange(len(windows.user)), windows.num_targets)
    assert features[REQUEST_HISTORY].values().tolist() == window_of_request.tolist()
    vocabulary = dataset.schema.vocabulary_by_column[context_key("surface")]
    assert vocabulary.num_table_rows == 2 + len({s for one in SURFACES for s in one})
    targets = [ordered[index] for index in windows.targets]
    surfaces = rows_of(batch, context_key("surface"))
    assert surfaces == [vocabulary.rows(target.surfaces) for target in targets]
    assert batch.labels.tolist() == [[target.label] for target in targets]
    visible = features[visible_key(HISTORY)].values().tolist()
    assert visible == [len(seen_by(target, events)) for target in targets]


# --- chance


@given(event_lists, st.integers(0, 2**32 - 1))
def test_negatives_are_of_the_catalogue_and_never_the_target(events: Events, seed: int) -> None:
    dataset = dataset_of(events)
    if len(dataset.known_items) < 2:
        return
    negatives = sample_negatives(dataset, all_targets(dataset), 5, Draws(seed))
    assert negatives.shape == (len(events), 5)
    assert not (negatives == dataset.item[:, None]).any()
    assert np.isin(negatives, dataset.known_items).all()


def test_a_catalogue_of_one_item_has_no_negatives() -> None:
    """Its negatives were the target itself, labelled 0 beside the same item labelled 1."""
    dataset = build_dataset(one_user([1, 2, 3, 4], ["100"] * 4), all_events(8, 4))
    with pytest.raises(DataError, match="training split, has 1 item; negatives need at least 2"):
        sample_negatives(dataset, np.array([0]), 1, Draws(0))


def test_negatives_cover_the_catalogue_evenly() -> None:
    dataset = build_dataset(one_user(list(range(12)), [*ITEMS[:9], *ITEMS[:3]]), all_events(8, 4))
    targets = np.zeros(1, np.int64)
    epochs = [sample_negatives(dataset, targets, 8, Draws(0, epoch)) for epoch in range(2000)]
    negatives = np.concatenate(epochs)
    counts = np.bincount(negatives.ravel(), minlength=len(ITEMS))[dataset.known_items]
    expected = negatives.size / len(dataset.known_items)
    assert counts[dataset.item[0]] == 0
    # The neighbour of the target's own item comes twice as often, the others by chance alone.
    assert counts[1] == pytest.approx(2 * expected, rel=0.1)
    assert counts[2:] == pytest.approx(expected, rel=0.1)


def test_some_ids_are_shown_as_unknown_in_training_alone() -> None:
    dataset = build_dataset(synthetic_world(60, 200, 90, 6, seed=1), all_events(64, 16))
    windows = windows_of(dataset, all_targets(dataset))
    candidates = candidates_of(dataset, windows.targets)
    plain = build_batch(dataset, windows, candidates, None).sparse_features
    again = build_batch(dataset, windows, candidates, None).sparse_features
    assert torch.equal(plain.values(), again.values())
    drawn = build_batch(dataset, windows, candidates, Draws(2)).sparse_features
    for key in plain.keys():  # noqa: SIM118  # a KeyedJaggedTensor is no dict
        before, after = plain[key].values(), drawn[key].values()
        changed = before != after
        if key in (USER, history_key(HISTORY, ITEM), candidate_key(ITEM)):
            assert (after[changed] == UNKNOWN_ROW).all()
        else:
            assert not changed.any()
        if key == candidate_key(ITEM):
            # Three standard deviations of a share of 0.01 among 28,000.
            assert changed.float().mean() == pytest.approx(UNKNOWN_SHARE, abs=0.002)


@given(event_lists, st.integers(1, 30), st.integers(0, 2**32 - 1))
def test_batches_hold_every_window_once(events: Events, batch_targets: int, seed: int) -> None:
    dataset = dataset_of(events)
    windows = windows_of(dataset, all_targets(dataset))
    batches = list(batches_of(windows.num_targets, batch_targets, np.random.default_rng(seed)))
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(windows.user)))
    for chosen in batches:
        counts = windows.num_targets[chosen]
        assert len(chosen) > 0
        # A batch is full when the window that fills it is in.
        assert counts.sum() - batch_targets < counts.max()
    again = list(batches_of(windows.num_targets, batch_targets, np.random.default_rng(seed)))
    assert [chosen.tolist() for chosen in batches] == [chosen.tolist() for chosen in again]
    in_order = list(batches_of(windows.num_targets, batch_targets, None))
    assert np.concatenate(in_order).tolist() == list(range(len(windows.user)))


@given(event_lists, st.integers(0, 2**32 - 1))
def test_windows_are_taken_with_their_targets(events: Events, seed: int) -> None:
    dataset = dataset_of(events)
    windows = windows_of(dataset, all_targets(dataset))
    parts = np.split(windows.targets, np.cumsum(windows.num_targets)[:-1])
    rng = np.random.default_rng(seed)
    chosen = rng.integers(0, len(windows.user), rng.integers(1, 6))
    taken = windows.take(chosen)
    assert taken.user.tolist() == windows.user[chosen].tolist()
    assert taken.first_event[HISTORY].tolist() == windows.first_event[HISTORY][chosen].tolist()
    assert taken.num_events[HISTORY].tolist() == windows.num_events[HISTORY][chosen].tolist()
    assert taken.targets.tolist() == [target for index in chosen for target in parts[index]]
