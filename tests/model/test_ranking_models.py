"""TorchRec's ranking models take the collection unmodified and score the same from pages."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torchrec.models.deepfm import SimpleDeepFMNN
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRM_Projection, DLRMTrain
from torchrec.modules.embedding_modules import EmbeddingBagCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from tests.oracle import reference_logits
from tests.worlds import (
    BLOCK,
    CAUSAL_SPEC,
    DIM,
    LOGIT_TOLERANCE,
    MAX_HISTORY,
    PATH_TOLERANCE,
    SCHEMA,
    draw_raws,
    make_dlrm,
    parse_all,
    random_weights,
    see_prefixes,
    take_candidates,
)
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.torchscript import script_model
from torchrec_kvshare.features.batches import RequestBatch, collate
from torchrec_kvshare.features.schema import HISTORY
from torchrec_kvshare.history.tower import HistoryTower, projection_between
from torchrec_kvshare.model.collection import KVShareEmbeddingBagCollection, kvshare_collection
from torchrec_kvshare.model.ranking import (
    RankingModel,
    dlrm_with_history,
    lift_kv_pages,
    plain_dlrm,
)
from torchrec_kvshare.verify.parity import score_through_pages

NUM_DENSE = SCHEMA.num_dense
USERS = [(9, 4, 1), (0, 3, 2), (14, 2, 3), (27, 5, 4), (1, 1, 5)]

Build = Callable[[KVShareEmbeddingBagCollection], nn.Module]
BUILD_BY_NAME: dict[str, Build] = {
    "DLRM": lambda bags: DLRM(bags, NUM_DENSE, [7, DIM], [9, 1]),
    "DLRM_DCN": lambda bags: DLRM_DCN(bags, NUM_DENSE, [7, DIM], [9, 1], 2, 5),
    "DLRM_Projection": lambda bags: DLRM_Projection(
        bags, NUM_DENSE, [7, DIM], [9, 1], [8, 2 * DIM], [10, 3 * DIM]
    ),
    "SimpleDeepFMNN": lambda bags: SimpleDeepFMNN(NUM_DENSE, bags, 7, 5),
}


def new_collection() -> KVShareEmbeddingBagCollection:
    return kvshare_collection(SCHEMA, CAUSAL_SPEC)


@pytest.fixture(scope="module", params=BUILD_BY_NAME)
def model(request: pytest.FixtureRequest) -> nn.Module:
    model = BUILD_BY_NAME[request.param](new_collection())
    random_weights(model, 12)
    return model.eval()


@pytest.fixture(scope="module")
def expected(model: nn.Module) -> Tensor:
    return torch.cat([reference_logits(model, SCHEMA, raw) for raw in draw_raws(USERS)])


@torch.no_grad()
def test_the_model_takes_the_collection_unmodified(model: nn.Module, expected: Tensor) -> None:
    batch = collate(parse_all(draw_raws(USERS)), SCHEMA)
    got = model(batch.dense_features, batch.sparse_features)
    assert got.shape == (15, 1)
    assert expected.std() > 100 * LOGIT_TOLERANCE
    torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=LOGIT_TOLERANCE)


@torch.no_grad()
def test_the_model_scores_the_same_from_pages(model: nn.Module, expected: Tensor) -> None:
    got = score_through_pages(RankingModel(model).eval(), parse_all(draw_raws(USERS)), SCHEMA)
    torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=LOGIT_TOLERANCE)


@torch.no_grad()
def test_lifting_changes_neither_the_model_nor_its_scores(model: nn.Module) -> None:
    batch = collate(parse_all(draw_raws(USERS)), SCHEMA)
    before = model(batch.dense_features, batch.sparse_features)
    lifted = lift_kv_pages(model)
    assert torch.equal(lifted(batch.dense_features, batch.sparse_features, None, None), before)
    assert torch.equal(model(batch.dense_features, batch.sparse_features), before)
    own = {id(parameter) for parameter in model.parameters()}
    assert {id(parameter) for parameter in lifted.parameters()} == own


def test_a_model_without_the_collection_cannot_be_lifted() -> None:
    with pytest.raises(ConfigError, match="DLRM calls 0 KVShareEmbeddingBagCollections"):
        lift_kv_pages(plain_dlrm(SCHEMA, DIM, [9, 1]))


class TwoRankers(nn.Module):
    """Two collections in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.first = BUILD_BY_NAME["DLRM"](new_collection())
        self.second = BUILD_BY_NAME["DLRM"](new_collection())

    def forward(self, dense_features: Tensor, sparse_features: KeyedJaggedTensor) -> Tensor:
        first = self.first(dense_features, sparse_features)
        return first + self.second(dense_features, sparse_features)


def test_a_model_with_two_collections_cannot_be_lifted() -> None:
    with pytest.raises(ConfigError, match="TwoRankers calls 2"):
        lift_kv_pages(TwoRankers())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"token_dim": 9},
            "token_item_id is 12 wide; the tower of history takes tokens of width 9: set token_dim",
        ),
        (
            {"dim": 15, "token_dim": 12},
            "bag_user_id is 12 wide; the tower of history gives rows of width 15: set output_dim",
        ),
    ],
)
def test_tables_of_another_width_than_the_spec_says_are_refused(
    spec: dict[str, int], message: str
) -> None:
    good = new_collection()
    tower = HistoryTower(replace(CAUSAL_SPEC, **spec), MAX_HISTORY, BLOCK)
    with pytest.raises(ConfigError, match=message):
        KVShareEmbeddingBagCollection(good.bags, good.token_embeddings, {HISTORY: tower}, SCHEMA)


def test_a_width_below_zero_is_refused() -> None:
    with pytest.raises(ConfigError, match="output_dim is -8; it must be at least 1, or 0 for dim"):
        replace(CAUSAL_SPEC, output_dim=-8)


def test_equal_widths_need_no_projection_and_leave_a_models_weights_as_they_were() -> None:
    torch.manual_seed(3)
    plain = dlrm_with_history(SCHEMA, replace(CAUSAL_SPEC, has_state=True), [9, 1])
    torch.manual_seed(3)
    widths = {"token_dim": DIM, "output_dim": DIM}
    named = dlrm_with_history(SCHEMA, replace(CAUSAL_SPEC, has_state=True, **widths), [9, 1])
    assert not [name for name in plain.state_dict() if "token_in" in name or "projection." in name]
    weights = named.state_dict()
    assert list(weights) == list(plain.state_dict())
    assert all(torch.equal(weights[name], one) for name, one in plain.state_dict().items())


def test_projected_tokens_start_on_the_scale_of_tables_of_the_towers_width() -> None:
    for width, new_width in ((64, 16), (16, 64)):
        projection = projection_between(width, new_width)
        rows = torch.randn(200, width) * width**-0.5
        assert 0.9 < float(projection(rows).detach().std() * new_width**0.5) < 1.1


def test_torchrecs_own_bags_will_do() -> None:
    good = new_collection()
    bags = EmbeddingBagCollection(tables=good.bags.embedding_bag_configs())
    towers = {HISTORY: good.towers()[0]}
    collection = KVShareEmbeddingBagCollection(bags, good.token_embeddings, towers, SCHEMA)
    model = BUILD_BY_NAME["DLRM"](collection).eval()
    random_weights(model, 13)
    expected = torch.cat([reference_logits(model, SCHEMA, raw) for raw in draw_raws(USERS)])
    batch = collate(parse_all(draw_raws(USERS)), SCHEMA)
    with torch.no_grad():
        got = model(batch.dense_features, batch.sparse_features)
    torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=LOGIT_TOLERANCE)


def test_heads_that_do_not_divide_the_width_are_refused() -> None:
    with pytest.raises(ConfigError, match="num_heads is 5; it must divide dim = 12"):
        HistoryTower(replace(CAUSAL_SPEC, num_heads=5), MAX_HISTORY, BLOCK)


@torch.no_grad()
def test_the_scripted_dlrm_is_bit_equal_to_eager(dlrm: DLRM) -> None:
    scripted = script_model(dlrm)
    for users in (USERS, USERS[:1], [(0, 1, 6)], USERS[1:], [(14, 31, 7)]):
        batch = collate(parse_all(draw_raws(users)), SCHEMA)
        expected = dlrm(batch.dense_features, batch.sparse_features)
        for _ in range(3):  # TorchScript rewrites a program after its first calls.
            assert torch.equal(scripted(batch.dense_features, batch.sparse_features), expected)


def test_every_parameter_learns() -> None:
    model = DLRMTrain(make_dlrm(seed=5)).train()
    requests = parse_all(draw_raws(USERS))
    asked = [requests[user] for user in RequestBatch(requests).request_of_candidate.tolist()]
    visible = [request.num_events - index % 3 for index, request in enumerate(asked)]
    times = [request.time - 5 * index for index, request in enumerate(asked)]
    batch = see_prefixes(collate(requests, SCHEMA), [max(0, n) for n in visible], times)
    batch.labels = torch.arange(len(asked)).remainder(2).float()
    loss, _ = model(batch)
    loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set()


def test_training_scores_are_serving_scores(dlrm: DLRM) -> None:
    requests = parse_all(draw_raws(USERS))
    asked = [requests[user] for user in RequestBatch(requests).request_of_candidate.tolist()]
    batch = collate(requests, SCHEMA)
    training = see_prefixes(
        batch, [request.num_events for request in asked], [request.time for request in asked]
    )
    order = torch.tensor([14, 3, 0, 8, 1, 2, 13, 4, 7, 5, 6, 9, 12, 10, 11])
    chosen = take_candidates(training, order)
    assert torch.equal(chosen.labels, torch.zeros(15, 1))
    chosen.labels = chosen.labels.squeeze(1)  # TorchRec's own objective is of one task.
    _, (_, logits, _) = DLRMTrain(dlrm)(chosen)
    with torch.no_grad():
        serving = dlrm(batch.dense_features, batch.sparse_features)
    expected = serving[order].squeeze(1)
    torch.testing.assert_close(logits.detach(), expected, rtol=0.0, atol=PATH_TOLERANCE)
