"""The DLRM with history against the float64 reference, and what its K/V must not depend on."""

import copy
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchrec.datasets.utils import Batch
from torchrec.models.dlrm import DLRM

from tests.oracle import reference_history, reference_logits
from tests.worlds import (
    LOGIT_TOLERANCE,
    PATH_TOLERANCE,
    SCHEMA,
    draw_raw,
    draw_raws,
    examples,
    make_dlrm,
    oldest_first,
    parse_all,
    ragged_users,
    see_prefixes,
    take_candidates,
)
from torchrec_kvshare.attention.plain import doubling_bucket
from torchrec_kvshare.features.batches import RequestBatch, collate, collate_history
from torchrec_kvshare.features.schema import HISTORY
from torchrec_kvshare.history.encoder import NUM_TIME_BUCKETS

RawRequest = dict[str, Any]


@torch.no_grad()
def logits_of(model: DLRM, batch: Batch) -> Tensor:
    return model(batch.dense_features, batch.sparse_features)


def score(model: DLRM, raws: list[RawRequest]) -> Tensor:
    return logits_of(model, collate(parse_all(raws), SCHEMA))


def prefill(model: DLRM, raws: list[RawRequest]) -> Tensor:
    return prefill_batch(model, collate_history(parse_all(raws), SCHEMA))


@torch.no_grad()
def prefill_batch(model: DLRM, batch: Batch) -> Tensor:
    [kv] = model.sparse_arch.embedding_bag_collection.prefill(batch.sparse_features)
    return kv


@torch.no_grad()
def pooled_history(model: DLRM, batch: Batch) -> Tensor:
    collection = model.sparse_arch.embedding_bag_collection
    return collection(batch.sparse_features)[HISTORY]


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=0.0, atol=tolerance)


@examples(0.3)
@given(ragged_users)
def test_logits_equal_the_reference_one_candidate_at_a_time(
    dlrm: DLRM, users: list[tuple[int, int, int]]
) -> None:
    raws = draw_raws(users)
    expected = torch.cat([reference_logits(dlrm, SCHEMA, raw) for raw in raws])
    assert_close(score(dlrm, raws), expected, LOGIT_TOLERANCE)


@examples(0.3)
@given(ragged_users, st.data())
def test_order_across_users_and_splits_do_not_matter(
    dlrm: DLRM, users: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    raws = draw_raws(users)
    batch = collate(parse_all(raws), SCHEMA)
    expected = torch.cat([reference_logits(dlrm, SCHEMA, raw) for raw in raws])
    order = torch.tensor(data.draw(st.permutations(range(len(expected)))))
    cut = data.draw(st.integers(0, len(expected) - 1))
    parts = [part for part in (order[:cut], order[cut:]) if part.numel()]
    got = torch.cat([logits_of(dlrm, take_candidates(batch, part)) for part in parts])
    assert_close(got, expected[order], LOGIT_TOLERANCE)


def test_another_draw_of_weights_equals_the_reference_too() -> None:
    raws = draw_raws([(14, 5, 1), (0, 2, 2), (22, 3, 3), (1, 1, 4)])
    for seed in range(3):
        model = make_dlrm(seed)
        expected = torch.cat([reference_logits(model, SCHEMA, raw) for raw in raws])
        assert_close(score(model, raws), expected, LOGIT_TOLERANCE)


def test_a_hundred_candidates_equal_the_reference_one_at_a_time(dlrm: DLRM) -> None:
    raw = draw_raw(13, 100, 17)
    assert_close(score(dlrm, [raw]), reference_logits(dlrm, SCHEMA, raw), LOGIT_TOLERANCE)


@given(ragged_users)
def test_a_candidate_alone_scores_as_among_others(
    dlrm: DLRM, users: list[tuple[int, int, int]]
) -> None:
    batch = collate(parse_all(draw_raws(users)), SCHEMA)
    together = logits_of(dlrm, batch)
    index = users[0][2] % len(together)
    alone = logits_of(dlrm, take_candidates(batch, torch.tensor([index])))
    assert_close(alone, together[[index]], PATH_TOLERANCE)


@given(ragged_users, st.integers(0, 2**32 - 1))
def test_candidates_do_not_see_each_other(
    dlrm: DLRM, users: list[tuple[int, int, int]], seed: int
) -> None:
    raws = draw_raws(users)
    before = score(dlrm, raws)
    kept = {column: cells[0] for column, cells in raws[0]["candidates"].items()}
    for index, raw in enumerate(raws):
        raw["candidates"] = draw_raw(0, users[index][1], seed + index)["candidates"]
    for column, cell in kept.items():
        raws[0]["candidates"][column][0] = cell
    assert_close(score(dlrm, raws)[:1], before[:1], PATH_TOLERANCE)


@given(ragged_users, st.integers(0, 2**32 - 1))
def test_history_rows_see_neither_candidates_nor_the_request(
    dlrm: DLRM, users: list[tuple[int, int, int]], seed: int
) -> None:
    raws = draw_raws(users)
    for index, raw in enumerate(raws):
        raw["user_id"] = f"user {index}"  # One user's equal histories would share their rows.
    before = prefill(dlrm, raws)
    for index, raw in enumerate(raws):
        raw |= {key: value for key, value in draw_raw(0, 6, seed).items() if key != "history"}
        raw["user_id"] = f"user {index + 1}"
    raws = [oldest_first(raw) for raw in raws]
    assert torch.equal(prefill(dlrm, raws), before)
    assert torch.equal(prefill_batch(dlrm, collate(parse_all(raws), SCHEMA)), before)


@given(st.integers(1, 14), st.data(), st.integers(0, 2**32 - 1))
def test_later_events_do_not_change_the_kv_of_earlier_ones(
    dlrm: DLRM, num_events: int, data: st.DataObject, seed: int
) -> None:
    num_kept = data.draw(st.integers(0, num_events))
    raw = draw_raw(num_events, 1, seed)
    whole = prefill(dlrm, [raw])
    raw["history"] = {column: cells[:num_kept] for column, cells in raw["history"].items()}
    assert_close(prefill(dlrm, [raw]), whole[:, :num_kept], PATH_TOLERANCE)


@given(ragged_users)
def test_batchmates_do_not_matter_to_the_kv(dlrm: DLRM, users: list[tuple[int, int, int]]) -> None:
    raws = draw_raws(users)
    batch = RequestBatch(parse_all(raws))
    parts = prefill(dlrm, raws).split([user.num_events for user in batch.users], dim=1)
    for raw, row in zip(raws, batch.user_of_request, strict=True):
        assert_close(prefill(dlrm, [raw]), parts[row], PATH_TOLERANCE)


def test_earlier_events_do_change_the_kv_of_later_ones(dlrm: DLRM) -> None:
    raw = draw_raw(9, 1, 5)
    before = prefill(dlrm, [raw])
    raw["history"]["genres"][3] = ["genre 1", "genre 5", "genre 5"]
    moved = (prefill(dlrm, [raw]) - before).abs().amax(dim=(0, 2, 3))
    assert (moved[:3] <= PATH_TOLERANCE).all()
    assert (moved[3:] > 100 * PATH_TOLERANCE).all()


@examples(0.3)
@given(st.integers(1, 14), st.integers(1, 5), st.data(), st.integers(0, 2**32 - 1))
def test_a_candidate_that_may_see_some_events_pools_as_over_a_history_of_these(
    dlrm: DLRM, num_events: int, num_candidates: int, data: st.DataObject, seed: int
) -> None:
    raw = draw_raw(num_events, num_candidates, seed)
    indices = range(num_candidates)
    visible = [data.draw(st.integers(0, num_events)) for _ in indices]
    times = [raw["time"] - data.draw(st.integers(-5, 5_000_000)) for _ in indices]
    batch = see_prefixes(collate(parse_all([raw]), SCHEMA), visible, times)
    expected = []
    for index, num_seen, time in zip(indices, visible, times, strict=True):
        history = {column: cells[:num_seen] for column, cells in raw["history"].items()}
        asked = raw | {"history": history, "time": time}
        collection = dlrm.sparse_arch.embedding_bag_collection
        expected.append(reference_history(collection, SCHEMA, asked, index)[HISTORY])
    assert_close(pooled_history(dlrm, batch), torch.stack(expected), LOGIT_TOLERANCE)


@examples(0.5)
@given(ragged_users, st.data())
def test_seeing_everything_at_the_time_of_the_request_is_serving(
    dlrm: DLRM, users: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    requests = parse_all(draw_raws(users))
    asked = [requests[user] for user in RequestBatch(requests).request_of_candidate.tolist()]
    batch = collate(requests, SCHEMA)
    training = see_prefixes(
        batch, [request.num_events for request in asked], [request.time for request in asked]
    )
    order = torch.tensor(data.draw(st.permutations(range(len(asked)))))
    got = logits_of(dlrm, take_candidates(training, order))
    assert_close(got, logits_of(dlrm, batch)[order], PATH_TOLERANCE)


def test_multi_valued_attributes_are_summed(dlrm: DLRM) -> None:
    model = copy.deepcopy(dlrm)
    rows = SCHEMA.vocabulary_by_column["items.genres"].rows(
        ["genre 1", "genre 4", "genre 4", "genre 6"]
    )
    tables = [weight for name, weight in model.state_dict().items() if "_genres." in name]
    assert len(tables) == 2
    for weight in tables:
        weight[rows[3]] = weight[rows[:3]].sum(0)
    raw = draw_raw(8, 3, 21)
    both = copy.deepcopy(raw)
    for group in ("history", "candidates"):
        raw[group]["genres"][1] = ["genre 6"]
        both[group]["genres"][1] = ["genre 4", "genre 1", "genre 4"]
    assert_close(score(model, [both]), score(model, [raw]), PATH_TOLERANCE)
    raw["history"]["genres"][1] = []
    assert (score(model, [both]) - score(model, [raw])).abs().max() > 100 * PATH_TOLERANCE


def test_time_buckets_double_from_one_second_on() -> None:
    elapsed = torch.tensor([-5, 0, 1, 2, 3, 4, 2**30 - 1, 2**30, 2**40])
    assert doubling_bucket(elapsed, NUM_TIME_BUCKETS).tolist() == [0, 0, 1, 2, 2, 3, 30, 31, 31]
