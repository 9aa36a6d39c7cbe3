"""K/V is a hit exactly as long as the model computes the same K/V, whatever else changed."""

import copy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchrec.models.dlrm import DLRM

from tests.encoder_worlds import NAMES, TWO_HISTORIES, make_caches, two_histories_model, world_of
from tests.worlds import CAUSAL_SPEC, SCHEMA, assert_same_scores, draw_raw, make_dlrm, parse_all
from torchrec_kvshare.cache.identity import KVVersion, version_of
from torchrec_kvshare.cache.items import ItemCache
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.errors import RecordError
from torchrec_kvshare.features.batches import collate_history
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.features.schema import FeatureSchema, Vocabulary
from torchrec_kvshare.history.kinds import KINDS, TowerSpec
from torchrec_kvshare.model.quantised import TABLE_DTYPES, quantise_tables
from torchrec_kvshare.model.ranking import RankingModel, dlrm_with_history, split_tables
from torchrec_kvshare.scoring.encoded_user import encode_user, load_user, save_user
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.deterministic import compute_rows_alone

MODEL, TABLES = "model", "tables"
USERS = [(14, 4, 3), (9, 2, 5)]  # events, candidates, seed


def requests_of(schema: FeatureSchema) -> list[Request]:
    raws = [draw_raw(*sizes, schema) | {"user_id": f"user {sizes[0]}"} for sizes in USERS]
    for raw in raws:  # Some events of each history.
        raw["history"]["action"] = ["buy", "view", *raw["history"]["action"][2:]]
    return parse_all(raws, schema)


@torch.no_grad()
def kv_of(model: RankingModel, schema: FeatureSchema) -> list[Tensor]:
    return model.prefill(collate_history(requests_of(schema), schema).sparse_features)


def redraw(weight: Tensor, seed: int) -> None:
    """Change a weight in place, and not only in ways that a norm takes back."""
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        # Integers are the order in which TorchRec's InteractionArch takes pairs of features.
        weight.copy_(weight + noise if weight.is_floating_point() else weight.roll(1, -1))


def check_every_weight(model: RankingModel, schema: FeatureSchema) -> set[tuple[str, str]]:
    """Change one weight after the other; return which outcomes there were, by reason."""
    requests = requests_of(schema)
    items = ItemCache(100, schema)
    engine = Engine(model, schema, KVStore(make_caches(model, [30] * len(schema.histories))), items)
    engine.rank(requests)
    before, version = kv_of(model, schema), engine.version
    tables = {weight.data_ptr() for weight in split_tables(model)[1].values()}
    outcomes = set()
    changed = set()
    for seed, (name, weight) in enumerate(model.state_dict().items()):
        if weight.data_ptr() in changed:
            continue  # It is there under another name.
        changed.add(weight.data_ptr())
        redraw(weight, seed)
        answers = engine.rank(requests)
        after, new = kv_of(model, schema), engine.version
        reason = TABLES if weight.data_ptr() in tables else MODEL
        is_same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
        for history, same in zip(schema.histories, is_same, strict=True):
            of_history = {
                field: one == other
                for field, one, other in zip(
                    KVVersion._fields, version.kv[history.name], new.kv[history.name], strict=True
                )
            }
            assert of_history == {MODEL: True, TABLES: True} | {reason: same}, name
        expected = ("hit", "") if all(is_same) else ("miss", reason)
        if any(is_same) and not all(is_same):
            expected = ("partial", reason)
        assert {(one.cache.status, one.cache.reason) for one in answers} == {expected}, name
        assert_same_scores(answers, Engine(model, schema, None, version=new).rank(requests))
        assert str(new) != str(version), name
        outcomes.add((expected[0], reason))
        before, version = after, new
    return outcomes


@pytest.mark.parametrize("name", NAMES)
def test_kv_is_a_hit_if_and_only_if_its_bits_are_the_same_after_any_one_weight_changed(
    name: str,
) -> None:
    """Every new version discarded all K/V, also one whose ranking stage alone was new."""
    world = world_of(name)
    outcomes = check_every_weight(RankingModel(copy.deepcopy(world.dlrm)).eval(), world.schema)
    # All four for every kind; events have floats, whose weights are dense.
    assert outcomes == {(status, why) for status in ("hit", "miss") for why in (MODEL, TABLES)}


@pytest.mark.parametrize("kind", KINDS)
def test_each_of_two_histories_has_a_version_of_its_own(kind: str) -> None:
    model = RankingModel(copy.deepcopy(two_histories_model(kind))).eval()
    outcomes = check_every_weight(model, TWO_HISTORIES)
    assert {("hit", MODEL), ("hit", TABLES), ("miss", TABLES)} <= outcomes
    if TowerSpec(kind, 8, 1, 1).has_positions:  # Each history has its own positions and layers.
        assert {("partial", MODEL), ("partial", TABLES)} <= outcomes


def test_a_deterministic_model_keeps_its_kv_likewise_and_reads_no_other_s() -> None:
    world = world_of("causal")
    plain = RankingModel(copy.deepcopy(world.dlrm)).eval()
    alone = compute_rows_alone(plain)
    ours, theirs = version_of(alone, world.schema), version_of(plain, world.schema)
    for history in ours.kv:
        assert ours.kv[history].model != theirs.kv[history].model
        assert ours.kv[history].tables == theirs.kv[history].tables
    assert ("hit", MODEL) in check_every_weight(alone, world.schema)


@pytest.mark.parametrize("dtype", TABLE_DTYPES[1:])
def test_a_quantised_table_is_in_the_version_if_and_only_if_events_read_it(dtype: str) -> None:
    spec = TowerSpec("causal", 12, 2, 3, has_state=True)
    model = RankingModel(make_dlrm(5, SCHEMA, spec)).eval()
    before = kv_of(quantise_tables(model, dtype), SCHEMA)
    version = version_of(model, SCHEMA, table_dtype=dtype)
    assert version.kv["history"].tables != version_of(model, SCHEMA).kv["history"].tables
    found = set()
    for seed, weight in enumerate(split_tables(model.collection)[1].values()):
        redraw(weight, seed)
        after = kv_of(quantise_tables(model, dtype), SCHEMA)
        new = version_of(model, SCHEMA, table_dtype=dtype)
        is_same = all(map(torch.equal, before, after))
        assert (new.kv == version.kv) == is_same
        assert new.tables != version.tables
        found.add(is_same)
        before, version = after, new
    assert found == {True, False}


@pytest.mark.parametrize("dtype", TABLE_DTYPES[1:])
def test_tables_that_are_quantised_already_are_one_table_to_the_version(dtype: str) -> None:
    """TorchRec keeps all tables of a collection in one buffer: K/V may be missed, never stale."""
    model = quantise_tables(RankingModel(make_dlrm(5)).eval(), dtype)
    before, version = kv_of(model, SCHEMA), version_of(model, SCHEMA)
    for name, weight in split_tables(model.collection)[1].items():
        if not name.endswith("weights_host"):
            continue  # Sizes and offsets of the tables.
        with torch.no_grad():
            weight.copy_(weight.flatten().roll(12).view_as(weight))
        after, new = kv_of(model, SCHEMA), version_of(model, SCHEMA)
        is_same = all(map(torch.equal, before, after))
        assert is_same or new.kv["history"].tables != version.kv["history"].tables
        assert (new.kv == version.kv) == name.startswith("bags."), name
        before, version = after, new


def same_history_part(model: RankingModel, other: RankingModel) -> None:
    """Give another model the weights and tables that the K/V of a model depends on."""
    [weights] = model.collection.kv_weights()
    state = other.collection.state_dict()
    for name in weights.names:
        state[name].copy_(model.collection.state_dict()[name])


@pytest.mark.parametrize("change", ["users", "context", "floats", "over arch"])
def test_a_ranking_stage_of_other_columns_and_layers_keeps_the_kv(change: str) -> None:
    more = {"user_id": Vocabulary([f"user {number}" for number in range(9)])}
    plan = {"context.plan": Vocabulary(["free", "paid"])}
    vocabularies = SCHEMA.vocabulary_by_column
    schema = {
        "users": replace(SCHEMA, vocabulary_by_column=vocabularies | more),
        "context": replace(
            SCHEMA, vocabulary_by_column=vocabularies | plan, context=("country", "plan")
        ),
        "floats": replace(SCHEMA, item_floats=("price", "stock")),
        "over arch": SCHEMA,
    }[change]
    old = RankingModel(make_dlrm(1)).eval()
    made: DLRM = dlrm_with_history(schema, CAUSAL_SPEC, [7, 5, 1])
    new = RankingModel(made).eval()
    same_history_part(old, new)
    assert version_of(new, schema).kv == version_of(old, SCHEMA).kv
    assert version_of(new, schema).model != version_of(old, SCHEMA).model
    store = KVStore(make_caches(old, [30]))
    Engine(old, SCHEMA, store).rank(requests_of(SCHEMA))
    answers = Engine(new, schema, store).rank(requests_of(schema))
    assert {one.cache.status for one in answers} == {"hit"}
    assert_same_scores(answers, Engine(new, schema, None).rank(requests_of(schema)))


@pytest.mark.parametrize("window", [(28, 7), (14, 2)])
def test_another_window_or_another_runtime_is_other_kv(window: tuple[int, int]) -> None:
    model = RankingModel(make_dlrm(1)).eval()
    [history] = SCHEMA.histories
    other = replace(history, window=replace(history.window, max_history=window[0], block=window[1]))
    version = version_of(model, SCHEMA).kv["history"]
    for new in (
        version_of(model, replace(SCHEMA, histories=(other,))),
        version_of(model, SCHEMA, runtime="pt2"),
    ):
        assert new.kv["history"].model != version.model
        assert new.kv["history"].tables == version.tables


def test_a_saved_user_is_read_by_every_version_with_the_same_kv(tmp_path: Path) -> None:
    raw = draw_raw(9, 3, 3)
    old, new, other = (RankingModel(make_dlrm(seed)).eval() for seed in (1, 2, 3))
    same_history_part(old, new)
    engine = Engine(old, SCHEMA, None)
    save_user(encode_user(engine, raw), raw, tmp_path / "user")
    held = load_user(Engine(new, SCHEMA, None), tmp_path / "user")
    [expected] = Engine(new, SCHEMA, None).rank(parse_all([raw]))
    assert held.predict(raw["candidates"]) == pytest.approx(expected.scores, rel=0.0, abs=2e-6)
    with pytest.raises(RecordError, match="was asked for"):
        load_user(Engine(other, SCHEMA, None), tmp_path / "user")


def test_the_specs_of_all_towers_are_in_the_version() -> None:
    """Weights of one shape may be read in another way, as by another number of heads."""
    versions = set()
    for spec in (CAUSAL_SPEC, replace(CAUSAL_SPEC, num_heads=2), replace(CAUSAL_SPEC, window=7)):
        model = RankingModel(make_dlrm(1, SCHEMA, spec)).eval()
        versions.add(version_of(model, SCHEMA).kv["history"].model)
        assert asdict(spec) == asdict(model.collection.towers()[0].spec)
    assert len(versions) == 3
