"""The module and the factory for hosts of torchrec.inference, through all of TorchRec's steps."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.inference.modules import PredictFactory, PredictModule

from tests.oracle import reference_logits
from tests.worlds import (
    PROBABILITY_TOLERANCE,
    SCHEMA,
    draw_raw,
    draw_raws,
    make_dlrm,
    new_interpreter,
    parse_all,
    version_called,
)
from torchrec_kvshare.attention.library import library_path
from torchrec_kvshare.errors import ArtifactError, ConfigError
from torchrec_kvshare.export.predict import KVSharePredictFactory, KVSharePredictModule
from torchrec_kvshare.export.program import RankingProgram
from torchrec_kvshare.export.torchscript import load_program, script_model
from torchrec_kvshare.features.tensors import input_specs, request_tensors
from torchrec_kvshare.model.quantised import TABLE_DTYPES, quantise_tables
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.parity import probabilities_of

pytestmark = pytest.mark.optimised

Raw = dict[str, Any]

USERS = [(9, 4, 1), (0, 3, 2), (14, 2, 3), (27, 5, 4), (1, 1, 5)]
VERSION = "model-tables"


@pytest.fixture(scope="module")
def model() -> RankingModel:
    return RankingModel(make_dlrm(seed=6)).eval()


def tensors_of(raws: list[Raw]) -> dict[str, Tensor]:
    return request_tensors(parse_all(raws), SCHEMA)


def scores_of(module: nn.Module, raws: list[Raw]) -> Tensor:
    results = module(tensors_of(raws))
    assert list(results) == ["scores"]
    assert not results["scores"].requires_grad
    return results["scores"]


def engine_scores(model: RankingModel, raws: list[Raw]) -> Tensor:
    answers = Engine(model, SCHEMA, store=None, version=version_called(VERSION)).rank(
        parse_all(raws)
    )
    return probabilities_of(answers).squeeze(1)


# --- the module


def test_scores_are_the_reference_models_probabilities() -> None:
    dlrm = make_dlrm(seed=6)
    raws = draw_raws(USERS)
    factory = KVSharePredictFactory(RankingModel(dlrm).eval(), SCHEMA, VERSION)
    logits = torch.cat([reference_logits(dlrm, SCHEMA, raw) for raw in raws])
    torch.testing.assert_close(
        scores_of(factory.create_predict_module(), raws),
        torch.sigmoid(logits).squeeze(1),
        rtol=0.0,
        atol=PROBABILITY_TOLERANCE,
    )


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_scores_are_the_engines_bit_for_bit(model: RankingModel, dtype: str) -> None:
    module = KVSharePredictFactory(model, SCHEMA, VERSION, dtype).create_predict_module()
    expected = engine_scores(quantise_tables(model, dtype), draw_raws(USERS))
    assert torch.equal(scores_of(module, draw_raws(USERS)), expected)


def test_the_module_is_upstreams(model: RankingModel) -> None:
    factory = KVSharePredictFactory(model, SCHEMA, VERSION)
    module = factory.create_predict_module()
    assert isinstance(factory, PredictFactory)
    assert isinstance(module, PredictModule)
    assert not module.training
    assert module.predict_module.model_version == VERSION


def test_an_artifacts_program_may_be_what_predicts(model: RankingModel, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.jit.save(script_model(RankingProgram(model, SCHEMA, VERSION).eval()), str(path))
    module = KVSharePredictModule(load_program(path))
    expected = engine_scores(model, draw_raws(USERS))
    assert torch.equal(scores_of(module, draw_raws(USERS)), expected)


@pytest.mark.parametrize("dtype", TABLE_DTYPES)
def test_a_row_that_no_table_has_is_refused_by_name(model: RankingModel, dtype: str) -> None:
    """Over int8 tables -1 was scored."""
    factory = KVSharePredictFactory(model, SCHEMA, VERSION, dtype)
    traced = factory.run_weights_independent_tranformations(factory.create_predict_module())
    module = factory.run_weights_dependent_transformations(traced)
    batch = tensors_of(draw_raws(USERS))
    for row in (-1, SCHEMA.num_table_rows("item_id")):
        batch["candidates.item_id.values"][3] = row
        with pytest.raises(torch.jit.Error, match=rf"item_id\.values holds {row} at index 3; from"):
            module(batch)


def test_a_weight_that_is_not_finite_makes_no_module() -> None:
    model = RankingModel(make_dlrm(seed=6)).eval()
    with torch.no_grad():
        model.collection.token_embeddings.embeddings["token_items_genres"].weight[5] = torch.nan
    with pytest.raises(
        ArtifactError, match=r"token_items_genres\.weight holds 12 numbers that are not"
    ):
        KVSharePredictFactory(model, SCHEMA, VERSION).create_predict_module()


def test_calls_may_run_side_by_side(model: RankingModel) -> None:
    module = KVSharePredictFactory(model, SCHEMA, VERSION, "int8").create_predict_module()
    batches = [[draw_raw(5 + seed, 1 + seed % 4, seed)] for seed in range(12)]
    expected = [scores_of(module, raws) for raws in batches]
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda raws: scores_of(module, raws), batches * 4))
    assert all(torch.equal(*pair) for pair in zip(found, expected * 4, strict=True))


# --- TorchRec's steps

FRESH_PROGRAM = """
import json, sys
import fbgemm_gpu, torch
torch.set_num_threads(1)
torch.ops.load_library(sys.argv[3])
module = torch.jit.load(sys.argv[1])
scores = module(torch.load(sys.argv[2], weights_only=True))["scores"].tolist()
ours = [name for name in sys.modules if name.startswith("torchrec")]
print(json.dumps([scores, ours]))
"""


@pytest.mark.parametrize(
    ("dtype", "world_size"), [("float32", 1), ("int8", 1), ("int4", 2)], ids=str
)
def test_a_module_goes_through_every_step_into_a_fresh_process(
    model: RankingModel, dtype: str, world_size: int, tmp_path: Path
) -> None:
    factory = KVSharePredictFactory(model, SCHEMA, VERSION, dtype)
    module = factory.create_predict_module(world_size)
    traced = factory.run_weights_independent_tranformations(module)
    scripted = factory.run_weights_dependent_transformations(traced)
    expected = engine_scores(quantise_tables(model, dtype), draw_raws(USERS))
    for one in (module, traced, scripted):
        assert torch.equal(scores_of(one, draw_raws(USERS)), expected)
    scripted.save(str(tmp_path / "module.pt"))
    torch.save(tensors_of(draw_raws(USERS)), tmp_path / "batch.pt")
    paths = [str(tmp_path / name) for name in ("module.pt", "batch.pt")]
    output, errors = new_interpreter(FRESH_PROGRAM, *paths, str(library_path())).communicate()
    assert output == json.dumps([expected.tolist(), []]) + "\n", errors


def test_tables_that_cannot_be_made_are_refused(model: RankingModel) -> None:
    factory = KVSharePredictFactory(model, SCHEMA, VERSION)
    with pytest.raises(ConfigError, match="table dtype is 'float32'; tables are quantised to"):
        factory.create_predict_module(world_size=2)
    with pytest.raises(ConfigError, match="table dtype is 'int3'"):
        KVSharePredictFactory(model, SCHEMA, VERSION, "int3").create_predict_module()


# --- metadata for a host


def test_inputs_of_several_requests_join_as_the_metadata_says(model: RankingModel) -> None:
    """A host concatenates inputs: no value in them is an offset into the batch."""
    factory = KVSharePredictFactory(model, SCHEMA, VERSION)
    module = factory.create_predict_module()
    raws = draw_raws(USERS)
    parts = [tensors_of([raw]) for raw in raws]
    joined = {}
    for name, metadata in factory.batching_metadata().items():
        assert (metadata.device, metadata.pinned) == ("cpu", [])
        suffixes = {"dense": [""], "sparse": [".values", ".lengths"]}[metadata.type]
        for suffix in suffixes:
            joined[name + suffix] = torch.cat([part[name + suffix] for part in parts])
    assert set(joined) == {spec.name for spec in input_specs(SCHEMA)}
    expected = scores_of(module, raws)
    assert torch.equal(module(joined)["scores"], expected)
    # The host splits the result by candidate counts.
    counts = [len(raw["candidates"]["item_id"]) for raw in raws]
    for raw, of_request in zip(raws, expected.split(counts), strict=True):
        torch.testing.assert_close(
            scores_of(module, [raw]), of_request, rtol=0.0, atol=PROBABILITY_TOLERANCE
        )
    assert factory.result_metadata() == "dict_of_tensor"


def test_what_a_host_is_told_is_json(model: RankingModel) -> None:
    factory = KVSharePredictFactory(model, SCHEMA, VERSION)
    batching = json.loads(factory.batching_metadata_json())
    assert batching["user_id"] == {"type": "dense", "device": "cpu", "pinned": []}
    assert batching["candidates.dense"]["type"] == "dense"
    assert {name for name, of_input in batching.items() if of_input["type"] == "sparse"} == {
        *("context.country", "history.item_id", "history.action", "history.genres"),
        *("history.time", "candidates.item_id", "candidates.genres"),
    }
    assert json.loads(factory.qualname_metadata_json()) == {"forward": {"need_preproc": False}}
    inputs = json.loads(json.dumps(factory.model_inputs_data()))
    assert set(inputs) == set(tensors_of(draw_raws(USERS)))
    assert inputs["candidates.item_id.values"] == {
        "name": "candidates.item_id.values",
        "dtype": "int64",
        "shape": [-1],
        "least": 0,
        "most": SCHEMA.num_table_rows("item_id") - 1,
    }
