"""Quantised tables: their values, the model around them, its state, and its shards."""

import copy
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchrec.datasets.utils import Batch
from torchrec.distributed.global_settings import get_propogate_device
from torchrec.inference.modules import quantize_inference_model
from torchrec.models.dlrm import DLRM
from torchrec.modules.embedding_modules import EmbeddingBagCollection, EmbeddingCollection

from tests.encoder_worlds import (
    TWO_HISTORIES,
    make_caches,
    two_histories_model,
    world_of,
)
from tests.oracle import reference_logits
from tests.worlds import (
    CAUSAL_SPEC,
    DIM,
    LOGIT_TOLERANCE,
    MAX_HISTORY,
    SCHEMA,
    assert_same_scores,
    draw_raws,
    make_dlrm,
    new_interpreter,
    parse_all,
)
from torchrec_kvshare.attention.library import library_path
from torchrec_kvshare.cache.identity import model_digest
from torchrec_kvshare.cache.items import ItemCache
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.export.torchscript import script_model
from torchrec_kvshare.features.batches import collate
from torchrec_kvshare.features.schema import HISTORY, FeatureSchema, Vocabulary
from torchrec_kvshare.history.kinds import CAUSAL, LONGER
from torchrec_kvshare.model.bags import user_candidate_bags
from torchrec_kvshare.model.collection import KVShareEmbeddingBagCollection
from torchrec_kvshare.model.quantised import (
    TABLE_DTYPES,
    quantise_tables,
    shard_tables,
    table_bytes,
)
from torchrec_kvshare.model.ranking import RankingModel, split_tables
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.audit import audit_model
from torchrec_kvshare.verify.parity import check_parity, score_extended, score_through_pages

pytestmark = pytest.mark.optimised

QUANTISED = TABLE_DTYPES[1:]
BITS = {"int8": 8, "int4": 4}
USERS = [(9, 4, 1), (0, 3, 2), (14, 2, 3), (27, 5, 4), (1, 1, 5)]
# Sizes that tables were not traced or scripted with.
BATCHES = [USERS, USERS[:1], [(0, 1, 6)], [(5, 0, 7), (3, 31, 8)], [(14, 2, 9)] * 3]
SEED = 8


@pytest.fixture(scope="module")
def model() -> RankingModel:
    return RankingModel(make_dlrm(SEED)).eval()


@pytest.fixture(scope="module", params=QUANTISED)
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def quantised(model: RankingModel, dtype: str) -> RankingModel:
    return quantise_tables(model, dtype)


@pytest.fixture(scope="module")
def program(quantised: RankingModel) -> torch.jit.ScriptModule:
    """Script after a run: in its first run TorchRec's tables cache the order of their keys, and
    cannot be traced afterwards."""
    logits(quantised, batch_of(USERS))
    return script_model(quantised)


@pytest.fixture(scope="module")
def sharded(model: RankingModel) -> RankingModel:
    return shard_tables(model, "int8", 2)


@pytest.fixture(scope="module")
def sharded_program(sharded: RankingModel) -> torch.jit.ScriptModule:
    return script_model(sharded)


def batch_of(users: list[tuple[int, int, int]], schema: FeatureSchema = SCHEMA) -> Batch:
    return collate(parse_all(draw_raws(users), schema), schema)


@torch.no_grad()
def logits(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch.dense_features, batch.sparse_features)


def assert_same_bits(model: nn.Module, other: nn.Module, schema: FeatureSchema = SCHEMA) -> None:
    for users in BATCHES * 2:  # TorchScript rewrites a program after its first calls.
        batch = batch_of(users, schema)
        assert torch.equal(logits(model, batch), logits(other, batch))


# --- what the tables hold


def written_and_read(table: Tensor, dtype: str) -> Tensor:
    """Return a table's rows rounded to its dtype: row by row a minimum and equal steps from it."""
    if dtype == "float16":
        return table.half().float()
    highest = 2 ** BITS[dtype] - 1
    least = table.amin(1, keepdim=True).half().float()
    step = ((table.amax(1, keepdim=True) - least) / highest).half().float()
    return ((table - least) / step).round().clamp(0, highest) * step + least


def with_tables_written_and_read(model: DLRM, dtype: str) -> DLRM:
    rounded = copy.deepcopy(model)
    with torch.no_grad():
        for module in rounded.modules():
            if isinstance(module, nn.Embedding | nn.EmbeddingBag):
                module.weight.copy_(written_and_read(module.weight, dtype))
    return rounded


def test_scores_are_those_of_the_numbers_that_the_tables_hold(dtype: str) -> None:
    dlrm = make_dlrm(SEED)
    rounded = with_tables_written_and_read(dlrm, dtype)
    raws = draw_raws(USERS)
    expected = torch.cat([reference_logits(rounded, SCHEMA, raw) for raw in raws])
    model = RankingModel(dlrm).eval()
    requests = parse_all(raws)
    quantised = quantise_tables(model, dtype)
    with torch.no_grad():
        by_path = {
            "uncached": logits(quantised, collate(requests, SCHEMA)),
            "through pages": score_through_pages(quantised, requests, SCHEMA),
            "extended": score_extended(quantised, requests, SCHEMA),
        }
    for got in by_path.values():
        torch.testing.assert_close(got.double(), expected, rtol=0.0, atol=LOGIT_TOLERANCE)
    # Otherwise float tables would pass this test too.
    exact = torch.cat([reference_logits(dlrm, SCHEMA, raw) for raw in raws])
    assert (exact - expected).abs().max() > 4 * LOGIT_TOLERANCE


def test_fewer_bits_are_farther_from_float32(model: RankingModel) -> None:
    batch = batch_of(USERS)
    exact = logits(model, batch)
    distances = [
        float((logits(quantise_tables(model, dtype), batch) - exact).abs().max())
        for dtype in TABLE_DTYPES
    ]
    assert distances[0] == 0.0
    assert distances == sorted(distances)
    assert len(set(distances)) == len(TABLE_DTYPES)


def test_an_engine_caches_k_v_and_items_of_quantised_tables(quantised: RankingModel) -> None:
    raws = [raw | {"user_id": f"user {number}"} for number, raw in enumerate(draw_raws(USERS))]
    requests = parse_all(raws)
    expected = Engine(quantised, SCHEMA, store=None).rank(requests)
    store, items = KVStore(make_caches(quantised, [40])), ItemCache(50, SCHEMA)
    engine = Engine(quantised, SCHEMA, store, items)
    for status in ("miss", "hit"):
        answers = engine.rank(requests)
        assert_same_scores(answers, expected)
        found = [answer.cache.status for answer in answers]
        assert found == [status, "bypass", status, status, status]  # The second has no events.
    assert items.num_hits > 0


def test_a_batch_without_candidates_has_no_scores(quantised: RankingModel) -> None:
    assert logits(quantised, batch_of([(5, 0, 1), (0, 0, 2)])).shape == (0, 1)


# --- the model around them


def test_a_program_with_groups_of_events_is_bit_equal_caches_and_extends() -> None:
    world = world_of(LONGER)
    quantised = quantise_tables(RankingModel(world.dlrm).eval(), "int8")
    check_parity(script_model(quantised), quantised, world.schema, extends=True, tolerance=0.0)


def test_two_histories_may_be_quantised() -> None:
    quantised = quantise_tables(RankingModel(two_histories_model(CAUSAL)).eval(), "int8")
    check_parity(script_model(quantised), quantised, TWO_HISTORIES, extends=True, tolerance=0.0)


def test_a_program_is_bit_equal_to_eager_at_other_sizes(
    quantised: RankingModel, program: torch.jit.ScriptModule
) -> None:
    assert_same_bits(program, quantised)


FRESH_PROGRAM = """
import json, sys
import fbgemm_gpu, torch
torch.set_num_threads(1)
torch.ops.load_library(sys.argv[2])
loaded = torch.jit.load(sys.argv[1])
from tests.model.test_quantised import BATCHES, batch_of, logits
print(json.dumps([logits(loaded, batch_of(users)).tolist() for users in BATCHES]))
"""


@pytest.mark.parametrize("dtype", ["int4"], indirect=True)
def test_a_fresh_process_scores_as_eager_does_bit_for_bit(
    quantised: RankingModel, program: torch.jit.ScriptModule, tmp_path: Path
) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(program, str(path))
    output, errors = new_interpreter(FRESH_PROGRAM, str(path), str(library_path())).communicate()
    expected = [logits(quantised, batch_of(users)).tolist() for users in BATCHES]
    assert output == f"{expected}\n", errors


def test_the_audit_says_the_same_of_quantised_tables(
    model: RankingModel, quantised: RankingModel
) -> None:
    found, expected = audit_model(quantised, SCHEMA), audit_model(model, SCHEMA)
    assert (found.scope, found.append) == (expected.scope, expected.append)


def test_the_given_model_stays_as_it_is(dtype: str) -> None:
    model = RankingModel(make_dlrm(SEED)).eval()
    untouched = RankingModel(make_dlrm(SEED)).eval()
    quantised = quantise_tables(model, dtype)
    shard_tables(model, dtype, 2)
    for one, other in zip(model.modules(), untouched.modules(), strict=True):
        assert type(one).__name__ == type(other).__name__
        assert list(vars(one)) == list(vars(other))
    ours, theirs = (one.collection.token_embeddings for one in (model, untouched))
    assert str(ours.embedding_configs()) == str(theirs.embedding_configs())
    assert_same_bits(model, untouched)
    # Changes of the given model do not change the new one.
    before = logits(quantised, batch_of(USERS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(logits(quantised, batch_of(USERS)), before)


def test_float32_is_the_model_itself(model: RankingModel) -> None:
    assert quantise_tables(model, "float32") is model


def test_no_float_table_is_left(quantised: RankingModel) -> None:
    left = [
        module
        for module in quantised.modules()
        if isinstance(module, EmbeddingBagCollection | EmbeddingCollection)
    ]
    assert left == []


def assert_refuses_unknown_rows(model: nn.Module) -> None:
    batch = batch_of([(3, 2, 1)])
    batch.sparse_features.values()[0] = SCHEMA.num_table_rows("user_id")
    with pytest.raises(RuntimeError, match="idx < num_rows"):
        logits(model, batch)
    for row in (-1, -7, -(2**63)):
        for key in ("user_id", "candidates.item_id", "history.action"):
            batch = batch_of([(3, 2, 1)])
            batch.sparse_features[key].values()[0] = row
            with pytest.raises((ValueError, torch.jit.Error), match=f"holds row {row}; rows from"):
                logits(model, batch)


def test_a_row_that_no_table_has_is_an_error(
    quantised: RankingModel, program: torch.jit.ScriptModule
) -> None:
    """fbgemm's tables read row 0 for it, and treat a negative row as a pruned one."""
    assert_refuses_unknown_rows(quantised)
    assert_refuses_unknown_rows(program)


# --- the state


def digest(model: nn.Module) -> str:
    return model_digest(model.state_dict(), {})


def test_one_number_of_one_table_is_another_digest(model: RankingModel, dtype: str) -> None:
    """fbgemm keeps the bytes of tables out of the state: models with different tables had equal
    states."""
    expected = digest(quantise_tables(model, dtype))
    assert digest(quantise_tables(model, dtype)) == expected
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.collection.token_embeddings.embeddings["token_items_genres"].weight[5, 7] += 1.0
    assert digest(quantise_tables(other, dtype)) != expected


def test_dense_weights_are_the_float_models(model: RankingModel, quantised: RankingModel) -> None:
    dense, tables = split_tables(model)
    found = quantised.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in dense.items())
    assert set(found).isdisjoint(tables)


def test_bytes_are_those_of_rows_and_what_is_beside_their_numbers(model: RankingModel) -> None:
    columns = ["user_id", "context.country", "item_id", "items.genres", "item_id", "events.action"]
    columns += ["items.genres"]
    num_rows = sum(SCHEMA.num_table_rows(column) for column in columns) + MAX_HISTORY
    assert table_bytes(model) == num_rows * DIM * 4
    # Two bytes of scale and two of bias; a row starts at a multiple of 16, a table at one of 128.
    row_bytes = {"float16": 32, "int8": 16, "int4": 16}
    for dtype, expected in row_bytes.items():
        padding = table_bytes(quantise_tables(model, dtype)) - num_rows * expected
        assert 0 <= padding < (len(columns) + 1) * 128


def test_a_state_is_the_whole_model(dtype: str) -> None:
    """Loaded into a model with other weights, it gives the scores of the first model."""
    one, other = (quantise_tables(RankingModel(make_dlrm(s)).eval(), dtype) for s in (SEED, 9))
    assert not torch.equal(logits(one, batch_of(USERS)), logits(other, batch_of(USERS)))
    other.load_state_dict(one.state_dict())
    assert_same_bits(one, other)


# --- what cannot be quantised


def with_own_bags(seed: int) -> RankingModel:
    """Make a model whose bags are one EmbeddingBagCollection over users and candidates."""
    dlrm = make_dlrm(seed)
    good = dlrm.sparse_arch.embedding_bag_collection
    configs = user_candidate_bags(SCHEMA, DIM).embedding_bag_configs()
    collection = KVShareEmbeddingBagCollection(
        EmbeddingBagCollection(tables=configs),
        good.token_embeddings,
        {HISTORY: good.towers()[0]},
        SCHEMA,
    )
    return RankingModel(DLRM(collection, SCHEMA.num_dense, [DIM, DIM], [9, 1])).eval()


def test_torchrecs_own_bags_are_refused_with_the_reason() -> None:
    message = "one EmbeddingBagCollection over users and candidates; .* inverse indices"
    with pytest.raises(ConfigError, match=message):
        quantise_tables(with_own_bags(SEED), "int8")
    with pytest.raises(ConfigError, match="UserCandidateBags, one collection for each, is allowed"):
        shard_tables(with_own_bags(SEED), "int8", 2)


def test_torchrecs_own_bags_mix_up_users_and_candidates() -> None:
    """The reason for the refusal; if this fails, TorchRec supports it now."""
    features = batch_of(USERS).sparse_features
    bags = with_own_bags(SEED).collection.bags
    assert len(bags(features).values()) == 15
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        holder = quantize_inference_model(nn.Sequential(bags))
    # Two keys of 5 users and two of 15 candidates, cut into four keys of equally many rows.
    assert len(holder(features).values()) == 10


@pytest.mark.parametrize(("dtype", "multiple"), [("int8", 2), ("int4", 4)])
def test_a_width_that_does_not_fill_its_bytes_is_refused(dtype: str, multiple: int) -> None:
    dim = 3 * multiple // 2 * 5
    spec = replace(CAUSAL_SPEC, dim=dim, num_heads=5)
    model = RankingModel(make_dlrm(SEED, spec=spec)).eval()
    message = f"table bag_user_id is {dim} wide; {dtype} takes multiples of {multiple}"
    with pytest.raises(ConfigError, match=message):
        quantise_tables(model, dtype)
    quantise_tables(model, "float16")


def test_an_unknown_dtype_is_refused(model: RankingModel) -> None:
    with pytest.raises(ConfigError, match=r"table dtype is 'int2'; .*'float16', 'int8', 'int4'"):
        quantise_tables(model, "int2")


def test_quantised_tables_are_not_quantised_again(quantised: RankingModel) -> None:
    with pytest.raises(ConfigError, match="has no float tables; quantised tables are not"):
        quantise_tables(quantised, "int4")


# --- shards

LARGE_COUNTRIES = replace(
    SCHEMA,
    vocabulary_by_column=SCHEMA.vocabulary_by_column
    | {
        "context.country": Vocabulary([f"country {number}" for number in range(40)]),
        "items.genres": Vocabulary([f"genre {number}" for number in range(50)]),
    },
)


@pytest.mark.parametrize("world_size", [1, 2, 7])
def test_shards_score_as_the_whole_does(dtype: str, world_size: int) -> None:
    """The largest table goes to the first rank, and its key came first in the pooled output: with
    more countries than users the two were swapped."""
    model = RankingModel(make_dlrm(SEED, LARGE_COUNTRIES)).eval()
    sharded, whole = shard_tables(model, dtype, world_size), quantise_tables(model, dtype)
    assert_same_bits(sharded, whole, LARGE_COUNTRIES)


def test_a_program_of_shards_is_bit_equal_caches_and_extends(
    model: RankingModel, sharded_program: torch.jit.ScriptModule
) -> None:
    whole = quantise_tables(model, "int8")
    check_parity(sharded_program, whole, SCHEMA, extends=True, tolerance=0.0)
    assert_same_bits(sharded_program, whole)


def test_a_row_that_no_shard_has_is_an_error(
    sharded: RankingModel, sharded_program: torch.jit.ScriptModule
) -> None:
    """fbgemm's shards read unrelated memory for it."""
    assert_refuses_unknown_rows(sharded)
    assert_refuses_unknown_rows(sharded_program)


def test_tables_are_spread_over_the_ranks(model: RankingModel, sharded: RankingModel) -> None:
    num_parts = [
        sum(name.endswith("weights_host") for name in one.collection.state_dict())
        for one in (quantise_tables(model, "int8"), sharded)
    ]
    assert num_parts == [3, 6]


def test_shards_have_a_state_with_their_bytes(model: RankingModel, sharded: RankingModel) -> None:
    assert digest(shard_tables(model, "int8", 2)) == digest(sharded)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.collection.bags.user_bags.embedding_bags["bag_context_country"].weight[2, 5] += 1.0
    assert digest(shard_tables(other, "int8", 2)) != digest(sharded)


def test_upstreams_switch_of_the_process_is_put_back(model: RankingModel) -> None:
    assert not get_propogate_device()
    shard_tables(model, "int8", 2)
    assert not get_propogate_device()


@pytest.mark.parametrize(
    ("dtype", "world_size", "message"),
    [
        ("int8", 0, "world_size is 0; it must be at least 1"),
        ("float32", 2, "table dtype is 'float32'; tables are quantised to"),
    ],
)
def test_shards_that_cannot_be_made_are_refused(
    model: RankingModel, dtype: str, world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        shard_tables(model, dtype, world_size)
