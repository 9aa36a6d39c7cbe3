"""Every kind of history encoder: equal to the reference, extended, trained, scripted; bad sizes."""

import copy
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from tests.encoder_worlds import (
    EXACT_TOLERANCE,
    EXTENDED_NAMES,
    NAMES,
    NUM_TOKENS,
    OUTPUT_WIDTH,
    PREFIX_NAMES,
    SLIDING_NAMES,
    TOKEN_WIDTH,
    World,
    attend_whole,
    cut,
    draw_rows,
    make_tower,
    one_user,
    raws_of,
    schema_with,
    world_of,
)
from tests.oracle import reference_history, reference_logits
from tests.worlds import (
    LOGIT_TOLERANCE,
    PATH_TOLERANCE,
    examples,
    parse_all,
    ragged_users,
    see_prefixes,
    take_candidates,
)
from torchrec_kvshare.attention.operators import Visibility
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.torchscript import script_model
from torchrec_kvshare.features.bags import single
from torchrec_kvshare.features.batches import RequestBatch, collate, collate_history, with_key
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import (
    HISTORY,
    Window,
    first_index_key,
    state_feature,
)
from torchrec_kvshare.history.kinds import (
    BIDIRECTIONAL,
    CAUSAL,
    HSTU,
    KIND_BY_NAME,
    LONGER,
    TARGET_ONLY,
)
from torchrec_kvshare.history.pages import (
    KVPages,
    flat_pages,
    offsets_of,
    split_users,
    users_of_rows,
)
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.model.collection import kvshare_collection
from torchrec_kvshare.model.ranking import RankingModel, takes_prefixes
from torchrec_kvshare.verify.parity import score_through_pages

pytestmark = pytest.mark.optimised

RawRequest = dict[str, Any]
Users = list[tuple[int, int, int]]

by_name = pytest.mark.parametrize("name", NAMES)
by_prefix_name = pytest.mark.parametrize("name", PREFIX_NAMES)
by_extended_name = pytest.mark.parametrize("name", EXTENDED_NAMES)
by_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
seeds = st.integers(0, 2**32 - 1)

# K/V or vectors of one tower computed two ways: worst of 2000 draws in float32 1.9e-6.
ROW_TOLERANCE = {torch.float32: 2e-5, torch.float64: EXACT_TOLERANCE}
# Gradients of weights are sums over all rows, so they are measured against their own size.
GRADIENT_TOLERANCE = 1e-10
# An empty history, one event, one more than some windows hold, and more than all hold.
EDGES = [(0, 2, 1), (1, 1, 2), (15, 2, 3), (28, 3, 4)]


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got.double(), expected.double(), rtol=0.0, atol=tolerance)


@torch.no_grad()
def score(world: World, raws: list[RawRequest]) -> Tensor:
    batch = collate(parse_all(raws, world.schema), world.schema)
    return world.dlrm(batch.dense_features, batch.sparse_features)


@torch.no_grad()
def history_features_of(world: World, features: Any) -> Tensor:
    """Return the pooled history and the user's state: [C, 2, E]."""
    pooled = world.dlrm.sparse_arch.embedding_bag_collection(features)
    return torch.stack([pooled[key] for key in (HISTORY, state_feature(HISTORY))], dim=1)


def features_of(world: World, raws: list[RawRequest]) -> Any:
    return collate(parse_all(raws, world.schema), world.schema).sparse_features


def history_features(world: World, requests: list[Request]) -> Any:
    return collate_history(requests, world.schema).sparse_features


# The whole model.


@pytest.mark.parametrize("num_tokens", [1, NUM_TOKENS])
@by_name
@examples(0.01)
@example(EDGES)
@given(ragged_users)
def test_logits_equal_the_reference_one_candidate_at_a_time(
    name: str, num_tokens: int, users: Users
) -> None:
    world = world_of(name, num_tokens)
    raws = raws_of(world, users)
    expected = torch.cat([reference_logits(world.dlrm, world.schema, raw) for raw in raws])
    assert_close(score(world, raws), expected, LOGIT_TOLERANCE)


@by_name
@examples(0.06)
@given(ragged_users, st.data())
def test_batchmates_order_and_splits_do_not_matter(
    name: str, users: Users, data: st.DataObject
) -> None:
    world = world_of(name)
    raws = raws_of(world, users)
    together = score(world, raws)
    alone = torch.cat([score(world, [raw]) for raw in raws])
    assert_close(alone, together, PATH_TOLERANCE)
    batch = collate(parse_all(raws, world.schema), world.schema)
    order = torch.tensor(data.draw(st.permutations(range(len(together)))))
    num_first = data.draw(st.integers(1, len(together)))
    chosen = take_candidates(batch, order[:num_first])
    with torch.no_grad():
        got = world.dlrm(chosen.dense_features, chosen.sparse_features)
    assert_close(got, together[order[:num_first]], PATH_TOLERANCE)


@by_name
def test_users_without_candidates_get_no_scores_and_change_none(name: str) -> None:
    world = world_of(name)
    asking, silent = raws_of(world, [(9, 3, 1), (0, 2, 2)]), raws_of(world, [(8, 0, 3), (0, 0, 4)])
    got = score(world, [silent[0], asking[0], silent[1], asking[1]])
    assert_close(got, score(world, asking), PATH_TOLERANCE)


@by_name
@torch.no_grad()
def test_no_candidates_give_no_vectors(name: str) -> None:
    tower = make_tower(name, torch.float32)
    no_candidates = torch.empty(0, NUM_TOKENS, TOKEN_WIDTH)
    for num_events in (0, 11):
        kv = prefill_alone(tower, draw_rows(2, torch.float32, num_events, TOKEN_WIDTH))
        assert attend_whole(tower, no_candidates, kv, num_events).shape == (0, OUTPUT_WIDTH)
    asked = Asked([3, 0], [0, 0], [], [])
    events = draw_rows(2, torch.float32, 3, TOKEN_WIDTH)
    assert TrainingPath(tower)(events, no_candidates, asked).shape == (0, OUTPUT_WIDTH)


# The tokens of a candidate.


@pytest.mark.parametrize("num_events", [0, 11])
@by_name
@torch.no_grad()
def test_tokens_of_a_candidate_see_each_other_and_no_other_candidate(
    name: str, num_events: int
) -> None:
    tower = make_tower(name, torch.float32)
    candidates = draw_rows(1, torch.float32, 4, NUM_TOKENS, TOKEN_WIDTH)
    kv = tower.prefill(draw_rows(2, torch.float32, num_events, TOKEN_WIDTH), one_user(num_events))
    before = attend_whole(tower, candidates, kv, num_events)
    for token in range(NUM_TOKENS):
        changed = candidates.clone()
        changed[2, token] = draw_rows(3, torch.float32, TOKEN_WIDTH)
        moved = (attend_whole(tower, changed, kv, num_events) - before).abs().amax(1)
        assert moved[2] > 100 * PATH_TOLERANCE
        assert moved[[0, 1, 3]].tolist() == [0.0, 0.0, 0.0]


@by_name
def test_another_brand_changes_what_its_candidate_pools_and_no_other(name: str) -> None:
    world = world_of(name)
    [raw] = raws_of(world, [(7, 3, 8)])
    before = history_features_of(world, features_of(world, [raw]))
    raw["candidates"]["brands"][1] = ["brand 2", "brand 5", "brand 3"]
    moved = history_features_of(world, features_of(world, [raw])) - before
    moved = moved.abs().amax((1, 2))
    assert moved[1] > 100 * PATH_TOLERANCE
    assert moved[[0, 2]].tolist() == [0.0, 0.0]


# New events on top of cached K/V.


def grow(tower: HistoryTower, cached: Tensor, num_cached: int, events: Tensor) -> Tensor:
    """Return K/V of events: reuse what is valid of the cached K/V, extend it by the rest."""
    num_kept = tower.encoder.reusable_events(num_cached, num_cached, len(events))
    rows = tower.encoder.reusable_rows(num_kept)
    kept = flat_pages(cached[:, :rows], one_user(rows))
    planes = tower.extend(kept, events[num_kept:], one_user(len(events) - num_kept))
    [new] = split_users(planes, [tower.encoder.num_kv_rows(len(events)) - rows])
    return torch.cat([cached[:, :rows], new], dim=1)


def prefill_alone(tower: HistoryTower, events: Tensor) -> Tensor:
    planes = tower.prefill(events, one_user(len(events)))
    return split_users(planes, [tower.encoder.num_kv_rows(len(events))])[0]


@by_dtype
@by_extended_name
@torch.no_grad()
def test_extending_at_any_event_gives_what_a_prefill_gives(name: str, dtype: torch.dtype) -> None:
    tower = make_tower(name, dtype)
    events = draw_rows(4, dtype, 23, TOKEN_WIDTH)
    for num_events in (23, 13, 6):
        whole = prefill_alone(tower, events[:num_events])
        for num_cached in range(num_events + 1):
            cached = prefill_alone(tower, events[:num_cached])
            got = grow(tower, cached, num_cached, events[:num_events])
            assert_close(got, whole, ROW_TOLERANCE[dtype])


@by_extended_name
@examples(0.2)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), seeds)
@torch.no_grad()
def test_extending_again_and_again_gives_what_a_prefill_gives(
    name: str, steps: list[int], seed: int
) -> None:
    tower = make_tower(name, torch.float64)
    events = draw_rows(seed, torch.float64, sum(steps), TOKEN_WIDTH)
    num_events = 0
    kv = prefill_alone(tower, events[:0])
    for step in steps:
        kv = grow(tower, kv, num_events, events[: num_events + step])
        num_events += step
    assert_close(kv, prefill_alone(tower, events), EXACT_TOLERANCE)


@by_extended_name
@examples(0.2)
@given(st.lists(st.tuples(st.integers(0, 17), st.integers(0, 5)), min_size=1, max_size=4), seeds)
@torch.no_grad()
def test_users_are_extended_together_as_alone_wherever_their_rows_lie(
    name: str, users: list[tuple[int, int]], seed: int
) -> None:
    tower = make_tower(name, torch.float64)
    encoder = tower.encoder
    cached, new_events, expected = [], [], []
    for index, (num_cached, num_new) in enumerate(users):
        events = draw_rows(seed + index, torch.float64, num_cached + num_new, TOKEN_WIDTH)
        num_kept = encoder.reusable_events(num_cached, num_cached, len(events))
        rows = encoder.reusable_rows(num_kept)
        cached.append(prefill_alone(tower, events[:num_cached])[:, :rows])
        new_events.append(events[num_kept:])
        expected.append(prefill_alone(tower, events)[:, rows:])
    event_offsets = offsets_of(torch.tensor([len(events) for events in new_events]))
    got = tower.extend(pages_with_gaps(cached), torch.cat(new_events), event_offsets)
    expected_kv = torch.cat(expected, dim=1)
    assert_close(got[:, : expected_kv.size(1)], expected_kv, EXACT_TOLERANCE)


def pages_with_gaps(parts: list[Tensor], page_size: int = 3) -> KVPages:
    """Return users' rows in shuffled pages, with NaN where there is no row."""
    planes, _, heads, width = parts[0].shape
    counts = [-(-part.size(1) // page_size) for part in parts]
    page_ids = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(1))
    table = parts[0].new_full((planes, len(page_ids), page_size, heads, width), torch.nan)
    page_ids = page_ids[: sum(counts)]
    for part, ids in zip(parts, page_ids.split(counts), strict=True):
        for row in range(part.size(1)):
            table[:, ids[row // page_size], row % page_size] = part[:, row]
    lengths = torch.tensor([part.size(1) for part in parts])
    return KVPages(table, page_ids, offsets_of(torch.tensor(counts)), offsets_of(lengths))


@by_extended_name
@torch.no_grad()
def test_what_is_cached_is_read_and_not_encoded_again(name: str) -> None:
    tower = make_tower(name, torch.float32)
    events = draw_rows(6, torch.float32, 11, TOKEN_WIDTH)
    cached = prefill_alone(tower, events[:8])
    moved = (grow(tower, cached + 1.0, 8, events) - grow(tower, cached, 8, events)).abs()
    rows = tower.encoder.reusable_rows(tower.encoder.reusable_events(8, 8, 11))
    assert rows > 0
    assert (moved[:, :rows] > 0.9).all()
    if not KIND_BY_NAME[tower.spec.kind].mixes_events:
        assert (moved[:, rows:] == 0.0).all()
    else:
        assert moved[2:, rows:].amax() > 1e-3


@pytest.mark.parametrize(
    ("num_cached", "num_events", "reusable"),
    [
        (2, 5, 0),  # The only group is still open.
        (7, 11, 6),
        (12, 12, 12),
        (12, 13, 0),  # With a 13th event the recent groups start at event 6.
        (13, 18, 12),
        (18, 19, 0),
        (20, 24, 18),
        (0, 9, 0),
    ],
)
def test_longer_reuses_closed_groups_while_the_recent_ones_start_where_they_did(
    num_cached: int, num_events: int, reusable: int
) -> None:
    encoder = make_tower(LONGER, torch.float32).encoder
    assert encoder.reusable_events(num_cached, num_cached, num_events) == reusable
    assert encoder.reusable_rows(reusable) == reusable / 3


@by_extended_name
@examples(0.1)
@given(st.lists(st.tuples(st.integers(1, 12), st.data()), min_size=1, max_size=3), seeds)
@torch.no_grad()
def test_a_model_extends_to_what_it_would_prefill(
    name: str, users: list[tuple[int, st.DataObject]], seed: int
) -> None:
    world = world_of(name)
    model = RankingModel(world.dlrm).eval()
    encoder = model.collection.towers()[0].encoder
    raws = raws_of(
        world, [(num_events, 1, seed + index) for index, (num_events, _) in enumerate(users)]
    )
    cuts = [data.draw(st.integers(0, num_events)) for num_events, data in users]
    kept = [
        encoder.reusable_events(cut_at, cut_at, raw_length(raw))
        for cut_at, raw in zip(cuts, raws, strict=True)
    ]
    rows = [encoder.reusable_rows(num_kept) for num_kept in kept]
    cached, expected = [], []
    for raw, cut_at, num_rows in zip(raws, cuts, rows, strict=True):
        earlier = parse_all([cut(raw, 0, cut_at)], world.schema)
        cached.append(model.prefill(history_features(world, earlier))[0][:, :num_rows])
        whole = parse_all([raw], world.schema)
        [planes] = model.prefill(history_features(world, whole))
        [kv] = split_users(planes, model.num_kv_rows([raw_length(raw)]))
        expected.append(kv[:, num_rows:])
    tails = [
        cut(raw, num_kept, raw_length(raw)) | {"user_id": f"user {index}"}
        for index, (raw, num_kept) in enumerate(zip(raws, kept, strict=True))
    ]
    features = history_features(world, parse_all(tails, world.schema))
    features = with_key(features, first_index_key(HISTORY), single(torch.tensor(kept)))
    [got] = model.extend(features, [torch.cat(cached, dim=1)], [torch.tensor(rows)])
    expected_kv = torch.cat(expected, dim=1)
    assert_close(got[:, : expected_kv.size(1)], expected_kv, PATH_TOLERANCE)


def raw_length(raw: RawRequest) -> int:
    return len(raw["history"]["time"])


@torch.no_grad()
def test_a_bidirectional_history_refuses_to_be_extended() -> None:
    tower = make_tower(BIDIRECTIONAL, torch.float32)
    assert [tower.encoder.reusable_events(cached, cached, 9) for cached in (0, 5, 9)] == [0, 0, 0]
    events = draw_rows(6, torch.float32, 9, TOKEN_WIDTH)
    cached = prefill_alone(tower, events[:6])
    with pytest.raises(ValueError, match="bidirectional histories cannot be extended"):
        tower.extend(flat_pages(cached, one_user(6)), events[6:], one_user(3))


# Candidates that see prefixes of one prefill, as in training.


@by_prefix_name
@examples(0.06)
@given(st.integers(1, 12), st.integers(1, 4), st.data(), seeds)
def test_a_candidate_that_may_see_some_events_pools_as_over_a_history_of_these(
    name: str, num_events: int, num_candidates: int, data: st.DataObject, seed: int
) -> None:
    world = world_of(name)
    [raw] = raws_of(world, [(num_events, num_candidates, seed)])
    indices = range(num_candidates)
    visible = [data.draw(st.integers(0, num_events)) for _ in indices]
    times = [raw["time"] - data.draw(st.integers(-5, 5_000_000)) for _ in indices]
    batch = see_prefixes(collate(parse_all([raw], world.schema), world.schema), visible, times)
    collection = world.dlrm.sparse_arch.embedding_bag_collection
    expected = []
    for index, num_seen, time in zip(indices, visible, times, strict=True):
        asked = cut(raw, 0, num_seen) | {"time": time}
        features = reference_history(collection, world.schema, asked, index)
        expected.append(torch.stack([*features.values()]))
    got = history_features_of(world, batch.sparse_features)
    assert_close(got, torch.stack(expected), LOGIT_TOLERANCE)


@by_name
@examples(0.1)
@given(ragged_users)
def test_seeing_everything_at_the_time_of_the_request_is_serving(name: str, users: Users) -> None:
    world = world_of(name)
    requests = parse_all(raws_of(world, users), world.schema)
    batch = collate(requests, world.schema)
    asked = [requests[user] for user in RequestBatch(requests).request_of_candidate.tolist()]
    training = see_prefixes(
        batch, [request.num_events for request in asked], [request.time for request in asked]
    )
    got = history_features_of(world, training.sparse_features)
    assert_close(got, history_features_of(world, batch.sparse_features), PATH_TOLERANCE)


@by_name
def test_an_encoder_says_whether_its_candidates_may_see_prefixes(name: str) -> None:
    assert takes_prefixes(world_of(name).dlrm) == (name in PREFIX_NAMES)


@pytest.mark.parametrize("name", [BIDIRECTIONAL, LONGER])
def test_an_encoder_that_takes_no_prefixes_refuses_them(name: str) -> None:
    world = world_of(name)
    batch = collate(parse_all(raws_of(world, [(9, 2, 1)]), world.schema), world.schema)
    prefixes = see_prefixes(batch, [9, 8], [1_700_000_000, 1_700_000_000])
    with pytest.raises(ValueError, match="whole histories, not prefixes"):
        history_features_of(world, prefixes.sparse_features)


def test_longer_takes_candidates_at_different_moments() -> None:
    world = world_of(LONGER)
    [raw] = raws_of(world, [(9, 2, 1)])
    batch = collate(parse_all([raw], world.schema), world.schema)
    times = [raw["time"], raw["time"] + 10**6]
    got = history_features_of(world, see_prefixes(batch, [9, 9], times).sparse_features)
    for index, time in enumerate(times):
        expected = history_features_of(world, features_of(world, [raw | {"time": time}]))
        assert_close(got[index], expected[index], PATH_TOLERANCE)
    assert (got[1] - history_features_of(world, batch.sparse_features)[1]).abs().max() > 1e-4


# Sliding windows.


@pytest.mark.parametrize("name", SLIDING_NAMES)
@examples(0.04)
@example([(40, 2, 1), (13, 1, 2)])
@given(ragged_users)
def test_a_sliding_model_scores_as_the_reference_over_the_history_never_cut(
    name: str, users: Users
) -> None:
    world = world_of(name)
    raws = raws_of(world, users)
    uncut = schema_with(Window(60, 6))
    expected = torch.cat([reference_logits(world.dlrm, uncut, raw) for raw in raws])
    assert_close(score(world, raws), expected, LOGIT_TOLERANCE)


@by_dtype
@pytest.mark.parametrize("name", SLIDING_NAMES)
@torch.no_grad()
def test_only_events_that_its_layers_see_back_to_matter_to_a_sliding_window(
    name: str, dtype: torch.dtype
) -> None:
    tower = make_tower(name, dtype)
    events, candidates = (
        draw_rows(7, dtype, 15, TOKEN_WIDTH),
        draw_rows(8, dtype, 3, NUM_TOKENS, TOKEN_WIDTH),
    )
    expected = attend_whole(tower, candidates, prefill_alone(tower, events), 15)
    last_start = 15 - tower.spec.events_read
    assert last_start == (8 if KIND_BY_NAME[tower.spec.kind].mixes_events else 11)
    for start in range(1, last_start + 2):
        kv = prefill_alone(tower, events[start:])
        moved = (attend_whole(tower, candidates, kv, 15 - start) - expected).abs().max()
        if start <= last_start:
            assert moved <= ROW_TOLERANCE[dtype]
        else:
            assert moved > 100 * PATH_TOLERANCE


# Training.


class Asked(NamedTuple):
    """Candidates of several users.

    Attributes:
        lengths: events of each user.
        counts: candidates of each user.
        visible: events that each candidate sees.
        times: of each candidate.
    """

    lengths: list[int]
    counts: list[int]
    visible: list[int]
    times: list[int]


def asked_of(tower: HistoryTower) -> Asked:
    """Return candidates at equal and different times, some see no event; one user has none."""
    if tower.encoder.takes_prefixes:
        visible, times = [0, 3, 3, 7, 0, 5, 4], [650, 250, 250, 640, 30, 480, 900]
    else:
        visible, times = [7, 7, 7, 7, 0, 5, 5], [640, 640, 640, 640, 30, 480, 480]
    return Asked([7, 0, 5], [4, 1, 2], visible, times)


class TrainingPath(nn.Module):
    """A tower's training forward, pooled history plus state; event i has time 100 i."""

    def __init__(self, tower: HistoryTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, events: Tensor, candidates: Tensor, asked: Asked) -> Tensor:
        event_offsets = offsets_of(torch.tensor(asked.lengths))
        kv = self.tower.prefill(events, event_offsets)
        rows, entered = self.tower.enter(candidates)
        times = [100 * torch.arange(length) for length in asked.lengths]
        asked_at = torch.tensor(asked.times, dtype=torch.int64)
        visible = torch.tensor(asked.visible, dtype=torch.int64)
        pages = flat_pages(kv, self.tower.encoder.row_offsets(event_offsets))
        pooled = self.tower.attend(
            rows,
            entered,
            offsets_of(torch.tensor(asked.counts)),
            pages,
            Visibility(torch.cat(times), asked_at, visible),
            event_offsets,
        )
        counts = torch.tensor(asked.counts)
        users = torch.arange(len(counts)).repeat_interleave(counts)
        return pooled + self.tower.state(pages, users, visible)


def draw_leaves(asked: Asked) -> tuple[Tensor, Tensor]:
    events = draw_rows(9, torch.float64, sum(asked.lengths), TOKEN_WIDTH)
    candidates = draw_rows(10, torch.float64, sum(asked.counts), NUM_TOKENS, TOKEN_WIDTH)
    return events.requires_grad_(), candidates.requires_grad_()


@by_name
def test_gradients_of_the_training_path_are_right(name: str) -> None:
    tower = make_tower(name, torch.float64)
    path, asked = TrainingPath(tower), asked_of(tower)
    names = [name for name, _ in path.named_parameters()]

    def of_leaves(events: Tensor, candidates: Tensor, *parameters: Tensor) -> Tensor:
        weights = dict(zip(names, parameters, strict=True))
        return functional_call(path, weights, (events, candidates, asked))

    leaves = [*draw_leaves(asked), *path.parameters()]
    # Fast mode checks one drawn direction of each tensor: there are some 3000 weights.
    assert torch.autograd.gradcheck(of_leaves, leaves, fast_mode=True)


@by_name
def test_every_weight_gets_a_gradient(name: str) -> None:
    tower = make_tower(name, torch.float64)
    path, asked = TrainingPath(tower), asked_of(tower)
    path(*draw_leaves(asked), asked).square().sum().backward()
    # Single rows may have none: no event falls into some time buckets.
    assert [n for n, p in path.named_parameters() if p.grad is None or not p.grad.any()] == []


@by_name
def test_one_prefill_for_all_candidates_learns_as_one_row_for_each(name: str) -> None:
    tower = make_tower(name, torch.float64)
    path, asked = TrainingPath(tower), asked_of(tower)
    events, candidates = draw_leaves(asked)
    weigh = draw_rows(11, torch.float64, sum(asked.counts), OUTPUT_WIDTH)
    leaves = [events, candidates, *path.parameters()]
    together = torch.autograd.grad((path(events, candidates, asked) * weigh).sum(), leaves)
    loss = torch.zeros((), dtype=torch.float64)
    for index, first, alone in one_row_each(asked):
        seen = events[first : first + alone.lengths[0]]
        pooled = path(seen, candidates[index : index + 1], alone)
        loss = loss + (pooled * weigh[index]).sum()
    each = torch.autograd.grad(loss, leaves)
    for got, expected in zip(together, each, strict=True):
        assert_close(
            got / expected.abs().max(), expected / expected.abs().max(), GRADIENT_TOLERANCE
        )


def one_row_each(asked: Asked) -> Iterator[tuple[int, int, Asked]]:
    """Yield every candidate's index, its user's first event, and the candidate as its own user."""
    users = [user for user, count in enumerate(asked.counts) for _ in range(count)]
    for index, user in enumerate(users):
        visible, time = asked.visible[index], asked.times[index]
        yield index, sum(asked.lengths[:user]), Asked([visible], [1], [visible], [time])


# Cached.


@pytest.mark.parametrize("num_tokens", [1, NUM_TOKENS])
@by_name
@torch.no_grad()
def test_cached_kv_scores_as_the_reference(name: str, num_tokens: int) -> None:
    world = world_of(name, num_tokens)
    model = RankingModel(copy.deepcopy(world.dlrm)).eval()
    raws = raws_of(world, EDGES)
    requests = parse_all(raws, world.schema)
    expected = torch.cat([reference_logits(world.dlrm, world.schema, raw) for raw in raws])
    assert_close(score_through_pages(model, requests, world.schema), expected, LOGIT_TOLERANCE)


# TorchScript.


class ServingPath(nn.Module):
    """A tower's prefill and attend as one function of tensors, for TorchScript."""

    def __init__(self, tower: HistoryTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(
        self,
        events: Tensor,
        event_offsets: Tensor,
        candidates: Tensor,
        candidate_offsets: Tensor,
        visibility: Visibility,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kv = self.tower.prefill(events, event_offsets)
        rows, entered = self.tower.enter(candidates)
        pages = flat_pages(kv, self.tower.encoder.row_offsets(event_offsets))
        pooled = self.tower.attend(
            rows, entered, candidate_offsets, pages, visibility, event_offsets
        )
        users = users_of_rows(candidate_offsets, candidates.size(0))
        return kv, pooled, self.tower.state(pages, users, visibility.visible_rows)


@by_name
@torch.no_grad()
def test_a_scripted_tower_is_bit_equal_to_eager(name: str) -> None:
    path = ServingPath(make_tower(name, torch.float32))
    scripted = torch.jit.script(path)
    for lengths, counts in (([13, 0, 7], [2, 1, 3]), ([1], [5]), ([22, 9], [0, 4])) * 2:
        arguments = (
            draw_rows(12, torch.float32, sum(lengths), TOKEN_WIDTH),
            offsets_of(torch.tensor(lengths)),
            draw_rows(13, torch.float32, sum(counts), NUM_TOKENS, TOKEN_WIDTH),
            offsets_of(torch.tensor(counts)),
            Visibility(
                torch.cat([7 * torch.arange(length) for length in lengths]),
                torch.full([sum(counts)], 7 * max(lengths)),
                torch.tensor(lengths).repeat_interleave(torch.tensor(counts)),
            ),
        )
        for got, expected in zip(scripted(*arguments), path(*arguments), strict=True):
            assert torch.equal(got, expected)


@lru_cache
def models_of(name: str) -> tuple[RankingModel, torch.jit.ScriptModule]:
    """The model of a world, eager and scripted."""
    model = RankingModel(world_of(name).dlrm).eval()
    return model, script_model(model)


# The other kinds differ only in their towers, which are scripted above.
@pytest.mark.parametrize("kind", [CAUSAL, LONGER])
@torch.no_grad()
def test_a_scripted_model_is_bit_equal_to_eager(kind: str) -> None:
    world = world_of(kind)
    eager, scripted = models_of(kind)
    for users in (EDGES, [(13, 5, 9)], EDGES[::-1]):  # TorchScript rewrites a program as it runs.
        batch = collate(parse_all(raws_of(world, users), world.schema), world.schema)
        expected = eager(batch.dense_features, batch.sparse_features)
        assert torch.equal(scripted(batch.dense_features, batch.sparse_features), expected)
    [projected] = scripted.project_candidates(batch.sparse_features)
    assert torch.equal(projected, eager.project_candidates(batch.sparse_features)[0])
    for num_events in (0, 1, 6, 13, 24):
        assert scripted.num_kv_rows([num_events]) == eager.num_kv_rows([num_events])


@pytest.mark.parametrize("kind", [CAUSAL, LONGER])
@torch.no_grad()
def test_a_scripted_model_extends_bit_equal_to_eager(kind: str) -> None:
    world = world_of(kind)
    [raw] = raws_of(world, [(11, 1, 3)])
    eager, scripted = models_of(kind)
    encoder = eager.collection.towers()[0].encoder
    num_kept = encoder.reusable_events(8, 8, 11)
    rows = encoder.reusable_rows(num_kept)
    earlier, tail = parse_all([cut(raw, 0, 8), cut(raw, num_kept, 11)], world.schema)
    cached = [eager.prefill(history_features(world, [earlier]))[0][:, :rows]]
    features = history_features(world, [tail])
    [expected] = eager.extend(features, cached, [torch.tensor([rows])])
    for _ in range(2):
        assert torch.equal(scripted.extend(features, cached, [torch.tensor([rows])])[0], expected)


# What cannot work.


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        ("casual", "history", "'casual'"),
        *((kind, "num_heads", value) for kind in (CAUSAL, HSTU, LONGER) for value in (3, 0)),
        *((kind, "num_layers", 0) for kind in (CAUSAL, BIDIRECTIONAL, TARGET_ONLY, HSTU, LONGER)),
        (CAUSAL, "num_tokens", 0),
        (CAUSAL, "num_tokens", 2),
        (HSTU, "num_tokens", 4),
        (TARGET_ONLY, "window", -1),
        (BIDIRECTIONAL, "window", 4),
        (LONGER, "window", 4),
        (LONGER, "merge", 4),
        (LONGER, "merge", 0),
        (LONGER, "recent", 9),
        (LONGER, "recent", 0),
        (LONGER, "num_globals", -1),
    ],
)
def test_sizes_that_cannot_work_are_named(kind: str, field: str, value: Any) -> None:
    world = world_of(LONGER)
    changed = {"kind": kind} | ({field: value} if field != "history" else {})
    with pytest.raises(ConfigError, match=f"{field} is {value}"):
        kvshare_collection(world.schema, replace(world.spec, **changed))


@by_name
@pytest.mark.parametrize("num_tokens", [1, NUM_TOKENS])
def test_one_token_or_one_for_each_column_is_allowed(name: str, num_tokens: int) -> None:
    world = world_of(name, num_tokens)
    [projected] = RankingModel(world.dlrm).project_candidates(
        features_of(world, raws_of(world, [(2, 4, 1)]))
    )
    assert projected.shape[:2] == (4, num_tokens)
