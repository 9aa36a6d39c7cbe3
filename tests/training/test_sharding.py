"""Wherever tables lie, the same is learned; what does not work is refused before training."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.once import shared_folder
from tests.training.on_ranks import (
    LOSS_TOLERANCE,
    Case,
    find,
    run_config,
    run_on_ranks,
)
from tests.training.sharding_program import FORCED
from tests.training.worlds import MODEL
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.errors import ConfigError
from torchrec_kvshare.training.ranks import ALONE, Ranks, joined_ranks
from torchrec_kvshare.training.run import load_data, new_model, train_run
from torchrec_kvshare.training.sharding import (
    ADAGRAD,
    ADAM,
    ROWWISE_ADAGRAD,
    SGD,
    TableSettings,
    check_tables,
    plan_table,
    shard,
)

# Tables after six steps against a plain loop's; rows are summed rank by rank. Worst: 1.9e-6; of
# adagrad 2.3e-5, because it divides a value's gradient by that gradient's own size, even near 0.
TABLE_TOLERANCE = {SGD: 1e-5, ROWWISE_ADAGRAD: 1e-5, ADAGRAD: 1e-4}
BAGS = ("bag_user_id", "bag_context_country", "bag_item_id", "bag_items_category")
TOKENS = (
    *("token_item_id", "token_events_action", "token_items_category", "token_position_history"),
    *("vector_item_id", "vector_items_category"),
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[list[Case]]:
    """The cases of two ranks."""
    return run_on_ranks("sharding_program", shared_folder(tmp_path_factory, "sharding"), 2)[2]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return load_data(run_config(tmp_path_factory.mktemp("unused")))


# --- what works


@pytest.mark.parametrize(
    ("forced", "optimizer"),
    [(forced, optimizer) for forced in FORCED for optimizer in (SGD, ADAGRAD)]
    + [(forced, ROWWISE_ADAGRAD) for forced in ("table_wise", "row_wise", "chosen by the planner")],
)
def test_sharded_tables_learn_what_a_plain_loop_learns(
    ranks: list[list[Case]], forced: str, optimizer: str
) -> None:
    """Data-parallel tables, which the planner chose by itself, got AdamW instead of their own."""
    for cases in ranks:
        case = find(cases, case="losses", forced=forced, optimizer=optimizer)
        assert case["losses"] == pytest.approx(case["expected"], abs=LOSS_TOLERANCE, rel=0)
        assert len(case["losses"]) == 6
        assert case["tables"] <= TABLE_TOLERANCE[optimizer]


@pytest.mark.parametrize("forced", FORCED)
def test_the_plan_has_the_sharding_types_that_were_asked_for(
    ranks: list[list[Case]], forced: str
) -> None:
    case = find(ranks[0], case="losses", forced=forced, optimizer=SGD)
    assert set(case["types"]) == {*BAGS, *TOKENS}
    wanted = FORCED[forced]
    for table, found in case["types"].items():
        allowed = wanted.get(table, wanted.get("*", ["table_wise", "row_wise"]))
        assert found in allowed
        assert case["num_ranks"][table] == (1 if found == "table_wise" else 2)


def test_the_plan_is_printed_with_a_line_for_each_table(shards: Shards) -> None:
    model = new_model(shards.schema, MODEL, "causal", 0)
    settings = TableSettings(SGD, 0.5, {"bag_item_id": ["column_wise"], "*": ["table_wise"]})
    with joined_ranks(torch.device("cpu")) as alone:
        _, plan = shard(model, settings, alone)
    header, *lines = [line.split() for line in plan_table(plan).splitlines()]
    assert header == ["table", "sharding", "kernel", "ranks"]
    assert {line[0] for line in lines} == {*BAGS, *TOKENS}
    kinds = {line[0]: line[1] for line in lines}
    assert kinds.pop("bag_item_id") == "column_wise"
    assert set(kinds.values()) == {"table_wise"}
    assert all(line[2:4] == ["fused", line[3]] for line in lines)


def test_a_step_changes_the_rows_of_its_batch_alone(ranks: list[list[Case]]) -> None:
    """Data-parallel tables were written whole in each step, and decayed."""
    for cases in ranks:
        changed = find(cases, case="changed rows")["changed"]
        assert set(changed) == {*BAGS, *TOKENS} - {"token_position_history"}
        for counts in changed.values():
            assert counts["outside"] == 0
            assert 0 < counts["inside"] < counts["rows"]


def test_torchrecs_train_pipeline_pipelines_all_collections(ranks: list[list[Case]]) -> None:
    """Children of a ModuleList were traced, and a proxy cannot be iterated: none was pipelined."""
    for cases in ranks:
        case = find(cases, case="pipeline")
        assert case["modules"] == [
            "ShardedEmbeddingBagCollection",
            "ShardedEmbeddingBagCollection",
            "ShardedEmbeddingCollection",
        ]
        # The same operations in the same order, on batches whose ids were sent one step earlier.
        assert len(case["losses"]) == 5
        assert case["losses"] == case["expected"]
        assert case["weights"] == 0.0


def test_tables_on_meta_are_drawn_where_they_lie(ranks: list[list[Case]]) -> None:
    """Their weights were cloned before sharding, which meta tensors do not have."""
    for cases in ranks:
        case = find(cases, case="meta")
        assert case["num_on_meta"] == [10, 0]
        assert case["dense"] == 0.0
        assert case["finite"]
        for table, scale in case["scales"].items():
            wanted = MODEL.dim**-0.5 * (0.25 if table == "token_position_history" else 1.0)
            # The standard deviation of 64 draws, the smallest table's, is off by 9 % at one sigma.
            assert scale == pytest.approx(wanted, rel=0.35)
        assert 0.3 < case["loss"] < 2.0


def test_ranks_draw_different_rows_for_tables_on_meta(ranks: list[list[Case]]) -> None:
    """With one seed on all ranks the second half of a table repeated the first."""
    for cases in ranks:
        case = find(cases, case="meta")
        assert case["equal_rows"] == 0
        # Dropout and later weights are drawn as if nothing had been sharded.
        assert case["same_generator"]


# --- what does not

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bags row-wise": (
        {"sharding": {"bag_item_id": ["row_wise"]}},
        "table bag_item_id of an EmbeddingBagCollection is to be sharded ['row_wise']; on cpu "
        "['table_wise', 'column_wise'] are allowed",
    ),
    "replicated bags": (
        {"sharding": {"*": ["table_wise"], "bag_user_id": ["data_parallel"]}},
        "table bag_user_id of an EmbeddingBagCollection is to be sharded ['data_parallel']; on cpu "
        "['table_wise', 'column_wise'] are allowed",
    ),
    "replicated tokens": (
        {"sharding": {"token_item_id": ["table_wise", "data_parallel"]}},
        "table token_item_id of an EmbeddingCollection is to be sharded ['data_parallel']; on cpu "
        "['table_wise', 'row_wise', 'column_wise'] are allowed",
    ),
    "a misspelt type": (
        {"sharding": {"token_events_action": ["tablewise"]}},
        "table token_events_action of an EmbeddingCollection is to be sharded ['tablewise']; on",
    ),
    "a table of no model": (
        {"sharding": {"token_items": ["row_wise"]}},
        f"sharding names the tables ['token_items'], which no model has; {sorted(BAGS + TOKENS)} "
        "and '*' are allowed",
    ),
    "a kernel for no model": (
        {"kernels": {"bag_items": ["fused"]}},
        "kernels names the tables ['bag_items'], which no model has",
    ),
    "a kernel of CUDA": (
        {"kernels": {"bag_item_id": ["fused_uvm_caching"]}},
        "table bag_item_id is to have compute kernels ['fused_uvm_caching']; on cpu ['fused'] are "
        "allowed",
    ),
    "adam": (
        {"table_optimizer": "adam"},
        "table_optimizer is 'adam'; on cpu one of ['rowwise_adagrad', 'adagrad', 'sgd'] is allowed",
    ),
    "an unknown optimizer": (
        {"table_optimizer": "lion"},
        "table_optimizer is 'lion'; on cpu one of ['rowwise_adagrad', 'adagrad', 'sgd'] is allowed",
    ),
}


@pytest.mark.parametrize(
    ("sharding", "kernels", "message"),
    [
        (
            {"bag_item_id": ["row_wise", "data_parallel"]},
            {},
            "table bag_item_id of an EmbeddingBagCollection is to be sharded ['data_parallel']; on "
            "cuda ['table_wise', 'column_wise', 'row_wise', ",
        ),
        ({"*": ["data_parallel"]}, {}, "on cuda ['table_wise', "),
        ({}, {"*": ["dense"]}, "to have compute kernels ['dense']; on cuda ['fused', 'fused_uvm'"),
        ({"token_item_id": ["row_wise"]}, {"bag_item_id": ["fused_uvm_caching"]}, ""),
    ],
)
def test_tables_on_a_gpu_have_a_fused_optimizer(
    shards: Shards, sharding: dict[str, Any], kernels: dict[str, Any], message: str
) -> None:
    """A data-parallel table got AdamW, which wrote all of its rows in every step."""
    models = [new_model(shards.schema, MODEL, "causal", 0)]
    settings = TableSettings(ADAM, 0.5, sharding, kernels)
    of_gpu = Ranks(0, 1, 1, torch.device("cuda", 0))
    if not message:
        check_tables(models, settings, of_gpu)
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_tables(models, settings, of_gpu)


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_work_is_refused_before_anything_is_written(
    what: str, tmp_path: Path
) -> None:
    """A name that no model has was ignored, and the planner did as it liked."""
    changes, message = REFUSED[what]
    with pytest.raises(ConfigError, match=re.escape(message)):
        train_run(run_config(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_table_that_one_of_a_runs_models_has_is_no_mistake(shards: Shards) -> None:
    """The baseline without a history has no token tables."""
    models = [new_model(shards.schema, MODEL, kind, 0) for kind in ("causal", "none")]
    settings = TableSettings(SGD, 0.5, {"token_item_id": ["row_wise"]}, {"*": ["fused"]})
    check_tables(models, settings, ALONE)
    with pytest.raises(ConfigError, match="token_item_id"):
        check_tables(models[1:], settings, ALONE)


def test_sharding_refuses_what_does_not_work_and_changes_no_model(shards: Shards) -> None:
    model = new_model(shards.schema, MODEL, "causal", 0)
    before = [type(module) for module in model.modules()]
    settings = TableSettings(SGD, 0.5, {"*": ["data_parallel"]})
    with pytest.raises(ConfigError, match="table bag_user_id of an EmbeddingBagCollection"):
        shard(model, settings, ALONE)
    assert [type(module) for module in model.modules()] == before
