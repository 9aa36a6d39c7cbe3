"""The repository that Triton would serve: its configs parse, and what it would load scores right.

Triton itself is not in Debian or on PyPI, so its server is not run here.
"""

import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from tests.worlds import PROBABILITY_TOLERANCE, SCHEMA, draw_raw, make_dlrm, parse_all
from torchrec_kvshare.config import CacheConfig
from torchrec_kvshare.errors import ArtifactError
from torchrec_kvshare.export.artifact import SIGNATURE, read_artifact, write_manifest
from torchrec_kvshare.export.exporter import export_model, load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.export.torchscript import load_program
from torchrec_kvshare.export.triton import write_repository
from torchrec_kvshare.export.triton_model import TritonPythonModel
from torchrec_kvshare.features.tensors import input_specs, request_tensors
from torchrec_kvshare.model.ranking import RankingModel

RAWS = [
    draw_raw(num_events, num_candidates, place) | {"user_id": place}
    for place, (num_events, num_candidates) in enumerate([(9, 4), (0, 3), (20, 2)])
]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "artifact"
    export_model(RankingModel(make_dlrm(seed=8)).eval(), SCHEMA, folder)
    return folder


@pytest.fixture(scope="module")
def repository(artifact: Path) -> Path:
    folder = artifact.parent / "repository"
    write_repository(artifact, folder, "shop")
    return folder


def config_of(folder: Path) -> model_config_pb2.ModelConfig:
    """Parse a config as Triton does, with its own message."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def uncached_scores(artifact: Path, raws: list[dict[str, Any]]) -> list[list[float]]:
    engine = new_engine(load_artifact(artifact), CacheConfig("off"))
    return [answer.scores for answer in engine.rank(parse_all(raws))]


def test_the_repository_is_laid_out_as_triton_wants_it(repository: Path) -> None:
    files = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    artifact = {"golden.json", "ids.npy", "manifest.json", "model.pt", "schema.json"}
    assert files == {
        *("shop/config.pbtxt", "shop/1/model.pt"),
        *("shop_engine/config.pbtxt", "shop_engine/1/model.py"),
        *(f"shop_engine/1/artifact/{name}" for name in artifact),
    }


def test_the_programs_config_names_every_input(repository: Path) -> None:
    config = config_of(repository / "shop")
    assert (config.name, config.platform) == ("shop", "pytorch_libtorch")
    assert config.max_batch_size == 0
    assert [group.count for group in config.instance_group] == [1]
    dtypes = {"int64": model_config_pb2.TYPE_INT64, "float32": model_config_pb2.TYPE_FP32}
    assert [(one.name, one.data_type, tuple(one.dims)) for one in config.input] == [
        (spec.name, dtypes[spec.dtype], spec.shape) for spec in input_specs(SCHEMA)
    ]


@pytest.mark.optimised
@torch.no_grad()
def test_the_programs_forward_gives_what_its_config_says(artifact: Path, repository: Path) -> None:
    program = load_program(repository / "shop" / "1" / "model.pt")
    features = request_tensors(parse_all(RAWS), SCHEMA)
    outputs = config_of(repository / "shop").output
    expected = torch.tensor([s for scores in uncached_scores(artifact, RAWS) for s in scores])
    for num_cached in (0, 9 + 13):  # Of 20 events the window holds 13.
        results = program(features)
        assert [one.name for one in outputs] == ["scores__0", "cache__1"]
        dtypes = {torch.float64: "TYPE_FP64", torch.int64: "TYPE_INT64"}
        for one, result in zip(outputs, results, strict=True):
            assert model_config_pb2.DataType.Name(one.data_type) == dtypes[result.dtype]
            assert len(one.dims) == result.dim()
            assert one.dims[1] == result.size(1)
        assert int(results[1][:, 2].sum()) == num_cached
        difference = (results[0].squeeze(1).float() - expected).abs().max()
        assert difference <= PROBABILITY_TOLERANCE


@pytest.mark.optimised
def test_the_programs_forward_refuses_what_its_manifest_does_not_allow(repository: Path) -> None:
    program = load_program(repository / "shop" / "1" / "model.pt")
    features = request_tensors(parse_all(RAWS), SCHEMA)
    features["candidates.item_id.values"][2] = -1
    with pytest.raises(torch.jit.Error, match=r"candidates\.item_id\.values holds -1 at index 2"):
        program(features)


class StandInTensor(NamedTuple):
    """The part of Triton's tensor that a model uses."""

    name: str
    values: np.ndarray

    def as_numpy(self) -> np.ndarray:
        return self.values


class StandInResponse(NamedTuple):
    """The part of Triton's response that a model uses."""

    output_tensors: list[StandInTensor]


@pytest.fixture
def python_model(repository: Path, monkeypatch: pytest.MonkeyPatch) -> TritonPythonModel:
    """The model of the Python backend, with a stand-in for the module that Triton provides."""
    utils: Any = ModuleType("triton_python_backend_utils")
    utils.Tensor = StandInTensor
    utils.InferenceResponse = StandInResponse
    utils.get_input_tensor_by_name = lambda request, name: request[name]
    monkeypatch.setitem(sys.modules, utils.__name__, utils)
    folder = repository / "shop_engine"
    scope: dict[str, Any] = {}
    exec((folder / "1" / "model.py").read_text(), scope)
    model: TritonPythonModel = scope["TritonPythonModel"]()
    model.initialize({"model_repository": str(folder), "model_version": "1"})
    return model


def test_the_python_backend_answers_every_line_in_its_place(
    artifact: Path, repository: Path, python_model: TritonPythonModel
) -> None:
    config = config_of(repository / "shop_engine")
    assert config.backend == "python"
    [wanted], [given] = config.input, config.output
    lines = [json.dumps(raw).encode() for raw in RAWS]
    requests = [[lines[0], b" ", lines[2]], [b"{}"], [lines[1]]]
    responses = python_model.execute(
        [{wanted.name: StandInTensor(wanted.name, np.array(one, dtype=object))} for one in requests]
    )
    python_model.finalize()
    answers = []
    for response in responses:
        [tensor] = response.output_tensors
        assert tensor.name == given.name
        answers.append([json.loads(line) for line in tensor.values])
    assert [["error" in one for one in of_request] for of_request in answers] == [
        [False, True, False],
        [True],
        [False],
    ]
    scores = [answers[0][0]["scores"], answers[2][0]["scores"], answers[0][2]["scores"]]
    for got, expected in zip(scores, uncached_scores(artifact, RAWS), strict=True):
        assert got == pytest.approx(expected, abs=PROBABILITY_TOLERANCE, rel=0.0)


def test_an_engine_whose_config_names_a_key_loads_no_artifact_without_its_signature(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", ModuleType("utils"))
    key = tmp_path / "key"
    key.write_text("a secret\n")
    with pytest.raises(ArtifactError, match=r"is not signed: it has no manifest\.mac"):
        write_repository(artifact, tmp_path / "never", key_file=str(key))
    signed = tmp_path / "signed"
    shutil.copytree(artifact, signed)
    write_manifest(signed, read_artifact(signed)[0], b"a secret")
    write_repository(signed, tmp_path / "repository", "shop", str(key))
    folder = tmp_path / "repository" / "shop_engine"
    parameters = config_of(folder).parameters
    assert {name: one.string_value for name, one in parameters.items()} == {
        "artifact_key_file": str(key)
    }
    # Triton gives a model its config message as JSON.
    told = json.dumps({"parameters": {"artifact_key_file": {"string_value": str(key)}}})
    args = {"model_repository": str(folder), "model_version": "1", "model_config": told}
    TritonPythonModel().initialize(args)
    (folder / "1" / "artifact" / SIGNATURE).unlink()
    with pytest.raises(ArtifactError, match=r"is not signed: it has no manifest\.mac"):
        TritonPythonModel().initialize(args)


def test_a_repository_is_never_overwritten(artifact: Path, repository: Path) -> None:
    with pytest.raises(ArtifactError, match="repository exists"):
        write_repository(artifact, repository)


def test_a_broken_artifact_makes_no_repository(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no artifact"):
        write_repository(tmp_path / "nowhere", tmp_path / "repository")
    assert list(tmp_path.iterdir()) == []
