"""Graphs compute what the eager model computes, before they are compiled."""

from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
from torchrec.modules.embedding_modules import (
    EmbeddingBagCollection,
    EmbeddingBagCollectionInterface,
)
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor, KeyedTensor

from tests.encoder_worlds import (
    EXTENDED_NAMES,
    NAMES,
    NUM_TOKENS,
    TWO_HISTORIES,
    draw_buyer,
    make_caches,
    raws_of,
    two_histories_model,
    world_of,
)
from tests.model.test_ranking_models import BUILD_BY_NAME, new_collection
from tests.oracle import reference_logits
from tests.worlds import (
    CAUSAL_SPEC,
    LOGIT_TOLERANCE,
    PATH_TOLERANCE,
    SCHEMA,
    assert_same_scores,
    draw_raw,
    examples,
    make_dlrm,
    parse_all,
    ragged_users,
    random_weights,
    see_prefixes,
    take_candidates,
)
from torchrec_kvshare.benchmark.memory import peak_allocated_bytes
from torchrec_kvshare.benchmark.workload import draw_requests, fill_zeros, make_schema
from torchrec_kvshare.cache.identity import UNNAMED
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.pt2 import CompiledRanking, graphs_of, write_pt2
from torchrec_kvshare.features.batches import (
    collate,
    collate_candidates,
    collate_history,
    collate_tails,
    with_pages,
)
from torchrec_kvshare.features.schema import HISTORY, FeatureSchema
from torchrec_kvshare.history.kinds import BIDIRECTIONAL, CAUSAL, HSTU, KINDS, TowerSpec
from torchrec_kvshare.history.pages import split_users
from torchrec_kvshare.model.collection import KVShareEmbeddingBagCollection
from torchrec_kvshare.model.ranking import RankingModel, dlrm_with_history
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.parity import score_through_pages

# Empty histories, one event, whole and cut windows; the longest has the fewest candidates.
USERS = [(0, 3, 1), (1, 1, 2), (14, 5, 3), (30, 1, 4), (7, 4, 5)]
BATCHES = [USERS, USERS[:1], USERS[1:2], USERS[3:4], [(0, 2, 6), (0, 1, 7)]]


def as_graphs(model: nn.Module, schema: FeatureSchema, spec: TowerSpec) -> CompiledRanking:
    """The ranking functions of a model's graphs as plain modules."""
    return CompiledRanking(graphs_of(RankingModel(model).eval(), schema), schema, spec, {})


@lru_cache
def both(name: str, num_tokens: int = NUM_TOKENS) -> tuple[CompiledRanking, RankingModel]:
    """The functions of the graphs and the eager functions of a world's model."""
    schema, spec, dlrm = world_of(name, num_tokens)
    return as_graphs(dlrm, schema, spec), RankingModel(dlrm).eval()


def assert_close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(got, expected, rtol=0.0, atol=tolerance)


def assert_equals_eager(
    got: CompiledRanking, model: nn.Module, users: list[tuple[int, int, int]]
) -> None:
    """Logits of a model of the usual schema, uncached and through pages."""
    requests = parse_all([draw_raw(*user) for user in users])
    batch = collate(requests, SCHEMA)
    expected = model(batch.dense_features, batch.sparse_features)
    uncached = got(batch.dense_features, batch.sparse_features)
    assert_close(uncached, expected, PATH_TOLERANCE)
    assert_close(score_through_pages(got, requests, SCHEMA), expected, PATH_TOLERANCE)


@pytest.mark.parametrize("num_tokens", [1, NUM_TOKENS])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_equal_the_reference(name: str, num_tokens: int) -> None:
    world = world_of(name, num_tokens)
    got, _ = both(name, num_tokens)
    raws = raws_of(world, USERS)
    expected = torch.cat([reference_logits(world.dlrm, world.schema, raw) for raw in raws])
    requests = parse_all(raws, world.schema)
    batch = collate(requests, world.schema)
    uncached = got(batch.dense_features, batch.sparse_features).double()
    assert expected.std() > 100 * LOGIT_TOLERANCE
    assert_close(uncached, expected, LOGIT_TOLERANCE)
    assert_close(
        score_through_pages(got, requests, world.schema).double(), expected, LOGIT_TOLERANCE
    )


@pytest.mark.parametrize("name", NAMES)
@examples(0.1)
@given(users=ragged_users)
@torch.no_grad()
def test_any_batch_says_what_the_eager_model_says(
    name: str, users: list[tuple[int, int, int]]
) -> None:
    world = world_of(name)
    got, eager = both(name)
    batch = collate(parse_all(raws_of(world, users), world.schema), world.schema)
    features = batch.sparse_features
    for one, other in zip(got.prefill(features), eager.prefill(features), strict=True):
        assert_close(one, other, PATH_TOLERANCE)
    expected = eager(batch.dense_features, features)
    assert_close(got(batch.dense_features, features), expected, PATH_TOLERANCE)


@pytest.mark.parametrize("name", EXTENDED_NAMES)
@torch.no_grad()
def test_new_events_extend_what_is_cached_as_eager_does(name: str) -> None:
    """One user has no cached events, one no new events, and one has neither."""
    schema = world_of(name).schema
    got, eager = both(name)
    requests = parse_all(
        raws_of(world_of(name), [(0, 1, 1), (12, 1, 2), (9, 1, 3), (12, 1, 4)]), schema
    )
    whole = [request.events_by_history[HISTORY] for request in requests]
    kept = [0, 9, 9, 0]  # events; a multiple of what longer merges
    rows = [eager.reusable([number], [number], [12])[0][1] for number in kept]
    heads = [
        replace(request, events_by_history={HISTORY: events.part(0, number)})
        for request, events, number in zip(requests, whole, kept, strict=True)
    ]
    kv = eager.prefill(collate_history(heads, schema).sparse_features)[0]
    all_rows = [eager.num_kv_rows([number])[0] for number in kept]
    parts = zip(split_users(kv, all_rows), rows, strict=True)
    cached = torch.cat([part[:, :number] for part, number in parts], dim=1)
    tails = [
        {HISTORY: events.part(number, events.num_events)}
        for events, number in zip(whole, kept, strict=True)
    ]
    for chosen in ([0, 1, 2, 3], [1], [2], [3]):
        features = collate_tails(
            [tails[user] for user in chosen], {HISTORY: [kept[user] for user in chosen]}, schema
        ).sparse_features
        taken = torch.cat([cached.split(rows, dim=1)[user] for user in chosen], dim=1)
        arguments = (features, [taken], [torch.tensor([rows[user] for user in chosen])])
        [expected] = eager.extend(*arguments)
        assert_close(got.extend(*arguments)[0], expected, PATH_TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_two_histories_are_read_each_by_its_tower(kind: str) -> None:
    """Two requests are of one user with the same events at two times."""
    dlrm = two_histories_model(kind)
    spec = dlrm.sparse_arch.embedding_bag_collection.towers()[0].spec
    raws = [draw_buyer(f"user {user[2]}", *user) for user in USERS]
    raws.append(raws[2] | {"time": raws[2]["time"] + 1_000_000})
    requests = parse_all(raws, TWO_HISTORIES)
    batch = collate(requests, TWO_HISTORIES)
    got = as_graphs(dlrm, TWO_HISTORIES, spec)
    expected = torch.cat([reference_logits(dlrm, TWO_HISTORIES, raw) for raw in raws])
    uncached = got(batch.dense_features, batch.sparse_features).double()
    assert_close(uncached, expected, LOGIT_TOLERANCE)
    through_pages = score_through_pages(got, requests, TWO_HISTORIES).double()
    assert_close(through_pages, expected, LOGIT_TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_serves_graphs_from_pages_nobody_wrote_whole(name: str) -> None:
    """Rows of pages that were never written are NaN, and must not be read."""
    world = world_of(name)
    got, eager = both(name)
    engine = Engine(got, world.schema, KVStore(make_caches(eager, [40])), version=UNNAMED)
    uncached = Engine(eager, world.schema, store=None)
    for shortened in (6, 3, 0):
        users = [(max(0, events - shortened), *rest) for events, *rest in USERS]
        raws = raws_of(world, USERS)
        for raw, (num_events, _, _) in zip(raws, users, strict=True):
            raw["history"] = {name: cells[:num_events] for name, cells in raw["history"].items()}
        requests = parse_all(raws, world.schema)
        assert_same_scores(engine.rank(requests), uncached.rank(requests))


@torch.no_grad()
def test_candidates_come_in_any_order() -> None:
    got, eager = both(NAMES[0])
    world = world_of(NAMES[0])
    batch = collate(parse_all(raws_of(world, USERS), world.schema), world.schema)
    mixed = take_candidates(batch, torch.tensor([9, 0, 13, 4, 2, 3, 12, 5]))
    expected = eager(mixed.dense_features, mixed.sparse_features)
    assert_close(got(mixed.dense_features, mixed.sparse_features), expected, PATH_TOLERANCE)


@torch.no_grad()
def test_what_graphs_cannot_do_is_refused() -> None:
    got, eager = both(BIDIRECTIONAL)
    schema = world_of(BIDIRECTIONAL).schema
    batch = collate(parse_all(raws_of(world_of(BIDIRECTIONAL), USERS[:2]), schema), schema)
    features = batch.sparse_features
    kv = eager.prefill(features)
    with pytest.raises(ValueError, match="bidirectional histories cannot be extended"):
        got.extend(features, kv, [torch.tensor([0, 1])])
    with pytest.raises(ConfigError, match=r"cache\.items must be off"):
        got.project_candidates(features)
    with pytest.raises(ConfigError, match=r"cache\.items must be off"):
        got.score(batch.dense_features, features, kv, eager.project_candidates(features))
    prefixes = see_prefixes(batch, [0, 0, 0, 1], [7, 7, 7, 8])
    with pytest.raises(ValueError, match="whole histories, not prefixes"):
        got(prefixes.dense_features, prefixes.sparse_features)


def with_value(batch: Batch, key: str, value: int) -> KeyedJaggedTensor:
    """The keys of a batch, the second value of one of them replaced."""
    features = batch.sparse_features
    features[key].values()[1] = value
    return features


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("user_id", -1, "user_id holds -1 at index 1; from 0 to 6 is allowed"),
        ("user_id", 7, "user_id holds 7 at index 1; from 0 to 6 is allowed"),
        ("context.country", -1, r"context\.country holds -1"),
        ("history.item_id", -1, r"history\.item_id holds -1 at index 1; from 0 to 12"),
        ("history.item_id", 13, r"history\.item_id holds 13 at index 1; from 0 to 12"),
        ("history.genres", -1, r"history\.genres holds -1"),
        ("history.action", 5, r"history\.action holds 5 at index 1; from 0 to 4"),
        ("candidates.item_id", -1, r"candidates\.item_id holds -1"),
        ("candidates.genres", 9, r"candidates\.genres holds 9"),
        ("request.time", -1, r"request\.time holds -1"),
    ],
)
@torch.no_grad()
def test_what_a_graph_would_take_for_another_thing_is_refused_by_name(
    key: str, value: int, message: str
) -> None:
    """A compiled graph takes -1 for the last row of a table."""
    got, eager = both(NAMES[0])
    world = world_of(NAMES[0])
    users = [(14, 3, 3), (7, 2, 5)]
    requests = parse_all(raws_of(world, users), world.schema)
    whole = collate(requests, world.schema)
    kv = [one.unsqueeze(1) for one in eager.prefill(whole.sparse_features)]
    features = with_value(whole, key, value)
    with pytest.raises(ValueError, match=message):
        got(whole.dense_features, features)
    if key.startswith("history."):
        history = collate_history(requests, world.schema)
        features = with_value(history, key, value)
        with pytest.raises(ValueError, match=message):
            got.prefill(features)
        with pytest.raises(ValueError, match=message):
            got.extend(features, [one[:, 0, :0] for one in kv], [torch.tensor([0, 0])])
    else:
        candidates = collate_candidates(requests, world.schema)
        features = with_value(candidates, key, value)
        with pytest.raises(ValueError, match=message):
            got.score(candidates.dense_features, features, kv)


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_counted_as_by_the_model(name: str) -> None:
    got, eager = both(name)
    for num_events in range(25):
        assert got.num_kv_rows([num_events]) == eager.num_kv_rows([num_events])
        for cached in range(num_events + 1):
            numbers = ([cached // 2], [cached], [num_events])
            assert got.reusable(*numbers) == eager.reusable(*numbers)


@pytest.mark.parametrize("name", BUILD_BY_NAME)
@torch.no_grad()
def test_torchrecs_ranking_models_are_taken_as_they_are(name: str) -> None:
    model = BUILD_BY_NAME[name](new_collection()).eval()
    random_weights(model, 12)
    for users in BATCHES:
        assert_equals_eager(as_graphs(model, SCHEMA, CAUSAL_SPEC), model, users)


@pytest.mark.parametrize("pooling", [PoolingType.SUM, PoolingType.MEAN])
@torch.no_grad()
def test_torchrecs_own_bags_are_pooled_as_their_tables_say(pooling: PoolingType) -> None:
    good = new_collection()
    tables = [replace(one, pooling=pooling) for one in good.bags.embedding_bag_configs()]
    collection = KVShareEmbeddingBagCollection(
        EmbeddingBagCollection(tables=tables),
        good.token_embeddings,
        {HISTORY: good.towers()[0]},
        SCHEMA,
    )
    model = BUILD_BY_NAME["DLRM"](collection).eval()
    random_weights(model, 13)
    for users in BATCHES:
        assert_equals_eager(as_graphs(model, SCHEMA, CAUSAL_SPEC), model, users)


@torch.no_grad()
def test_the_given_model_stays_as_it_was() -> None:
    model = RankingModel(make_dlrm(seed=8)).eval()
    modules = dict(model.named_modules(remove_duplicate=False))
    graphs = graphs_of(model, SCHEMA)
    assert dict(model.named_modules(remove_duplicate=False)) == modules
    own = {id(parameter) for parameter in model.parameters()}
    for graph in graphs.values():
        assert {id(parameter) for parameter in graph.parameters()} <= own


class OtherBags(EmbeddingBagCollectionInterface):
    """Bags whose tables are not TorchRec's."""

    def __init__(self, configs: list[EmbeddingBagConfig]) -> None:
        super().__init__()
        self.configs = configs

    def forward(self, features: KeyedJaggedTensor) -> KeyedTensor:
        raise NotImplementedError

    def embedding_bag_configs(self) -> list[EmbeddingBagConfig]:
        return self.configs

    def is_weighted(self) -> bool:
        return False


def test_bags_that_are_no_plain_tables_are_refused(tmp_path: Path) -> None:
    good = new_collection()
    bags = OtherBags(good.bags.embedding_bag_configs())
    collection = KVShareEmbeddingBagCollection(
        bags, good.token_embeddings, {HISTORY: good.towers()[0]}, SCHEMA
    )
    model = RankingModel(BUILD_BY_NAME["DLRM"](collection)).eval()
    with pytest.raises(ConfigError, match="the ranking stage's bags are OtherBags"):
        write_pt2(model, SCHEMA, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [CAUSAL, HSTU])
@torch.no_grad()
def test_more_candidates_copy_no_history(kind: str) -> None:
    history, dim, more = 512, 8, 64
    schema, spec = make_schema(history, num_users=1), TowerSpec(kind, dim, 2, 2)
    model = fill_zeros(dlrm_with_history(schema, spec, [8, 1]))
    got = as_graphs(model, schema, spec)
    requests = draw_requests(schema, [8, 8 + more], user=0, seed=0)
    kv = got.prefill(collate([requests[0]], schema).sparse_features)
    peaks = []
    for request in requests:
        batch = collate_candidates([request], schema)
        features = with_pages(batch.sparse_features, schema, [[[0]]])
        table = [kv[0].unsqueeze(1)]
        score = partial(got.score, batch.dense_features, features, table)
        peaks.append(peak_allocated_bytes(score))
    # K and V of two layers. The attention scores that a candidate needs are an eighth of that.
    assert peaks[1] - peaks[0] < more * kv[0].nbytes / 2
