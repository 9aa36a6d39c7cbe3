"""An artifact scores as the model does, is complete or absent, and is refused if it is broken."""

import copy
import json
import math
import os
import re
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchrec.models.dlrm import DLRM

from tests.worlds import (
    CAUSAL_SPEC,
    HEAD_DIM,
    MAX_HISTORY,
    NUM_HEADS,
    NUM_PLANES,
    SCHEMA,
    draw_raw,
    fresh_process,
    make_dlrm,
    new_interpreter,
    parse_all,
)
from torchrec_kvshare.cache.identity import model_digest, version_of
from torchrec_kvshare.data.files import file_sha256
from torchrec_kvshare.errors import ArtifactError, ConfigError, ParityError
from torchrec_kvshare.export.artifact import (
    add_measured,
    artifact_folder,
    read_artifact,
)
from torchrec_kvshare.export.exporter import export_model, load_artifact
from torchrec_kvshare.features.batches import collate
from torchrec_kvshare.features.schema import HISTORY, FeatureSchema
from torchrec_kvshare.features.tensors import input_specs
from torchrec_kvshare.history.tower import HistoryTower
from torchrec_kvshare.model.ranking import RankingModel, dlrm_with_history, split_tables
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.audit import audit_model
from torchrec_kvshare.verify.parity import LOGIT_TOLERANCE, check_parity, score_through_pages

FILES = ["golden.json", "ids.npy", "manifest.json", "model.pt", "schema.json"]
VOUCHED = [name for name in FILES if name != "manifest.json"]
# Sizes that the export did not see: one request, many candidates, more users than it drew.
BATCHES = [
    [(9, 1, 31)],
    [(0, 2, 32)],
    [(14, 97, 33), (0, 1, 34)],
    [(number, 1 + number % 4, 40 + number) for number in range(23)],
]


@pytest.fixture(scope="module")
def model() -> RankingModel:
    return RankingModel(make_dlrm(seed=8)).eval()


@pytest.fixture(scope="module")
def artifact(model: RankingModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("export") / "artifact"
    export_model(model, SCHEMA, destination)
    return destination


@pytest.fixture
def broken(artifact: Path, tmp_path: Path) -> Path:
    """A copy that a test may break."""
    return Path(shutil.copytree(artifact, tmp_path / "artifact"))


@torch.no_grad()
def logits_of(model: RankingModel, sizes: list[tuple[int, int, int]]) -> tuple[Tensor, Tensor]:
    """Logits of one batch, uncached and through pages."""
    requests = parse_all([draw_raw(*size) for size in sizes])
    batch = collate(requests, SCHEMA)
    uncached = model(batch.dense_features, batch.sparse_features)
    return uncached, score_through_pages(model, requests, SCHEMA)


FRESH_PROGRAM = """
import json, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from torchrec_kvshare.export.exporter import load_artifact
loaded = load_artifact(Path(sys.argv[1]))
modules = sorted(name for name in sys.modules if name.startswith("torchrec_kvshare"))
from tests.export.test_exporter import BATCHES, logits_of
logits = [[part.tolist() for part in logits_of(loaded.model, sizes)] for sizes in BATCHES]
print(json.dumps({"modules": modules, "schema": loaded.schema.to_json(), "logits": logits}))
"""


def found_in_fresh_process(artifact: Path) -> dict[str, Any]:
    output, errors = new_interpreter(FRESH_PROGRAM, str(artifact)).communicate()
    assert output, errors
    return json.loads(output)


def all_logits(model: RankingModel) -> list[list[list[float]]]:
    return [[part.tolist() for part in logits_of(model, sizes)] for sizes in BATCHES]


@pytest.mark.optimised
def test_a_fresh_process_scores_as_eager_does_bit_for_bit(
    model: RankingModel, artifact: Path
) -> None:
    found = found_in_fresh_process(artifact)
    assert found["logits"] == all_logits(model)
    assert found["schema"] == SCHEMA.to_json()
    # Loading needs neither the training code nor the readers of data sets.
    assert "torchrec_kvshare.export.exporter" in found["modules"]
    assert [name for name in found["modules"] if ".training" in name] == []
    assert "torchrec_kvshare.data.interactions" not in found["modules"]


@pytest.mark.optimised
def test_a_loaded_program_stays_bit_equal_call_after_call(
    model: RankingModel, artifact: Path
) -> None:
    loaded = load_artifact(artifact).model
    for sizes in BATCHES * 2:
        for got, expected in zip(logits_of(loaded, sizes), logits_of(model, sizes), strict=True):
            assert torch.equal(got, expected)


@pytest.mark.optimised
def test_the_manifest_says_what_the_artifact_is(model: RankingModel, artifact: Path) -> None:
    written = json.loads((artifact / "manifest.json").read_text())
    assert set(written) == {
        *("format", "runtime", "model_digest", "tables_digest", "kv", "tables"),
        *(
            "encoder",
            "towers",
            "columns",
            "inputs",
            "audit",
            "parity",
            "provenance",
            "versions",
            "sha256_by_file",
        ),
        *("codecs", "break_even_events"),
    }
    assert (written["format"], written["encoder"]) == (9, asdict(CAUSAL_SPEC))
    assert (written["runtime"], written["tables"]) == ("torchscript", "float32")
    sizes = {"num_planes": NUM_PLANES, "num_heads": NUM_HEADS, "head_dim": HEAD_DIM}
    assert written["towers"] == {HISTORY: sizes | {"max_rows": MAX_HISTORY}}
    assert written["audit"] == audit_model(model, SCHEMA).to_json()
    assert written["columns"] == {
        "request": ["user_id", "time"],
        "context": ["country"],
        "history": ["item_id", "action", "genres", "time"],
        "candidates": ["item_id", "genres", "price"],
    }
    assert written["inputs"] == [spec.to_json() for spec in input_specs(SCHEMA)]
    parity = written["parity"]
    assert set(parity) == {
        *("exported_eager", "cached_uncached", "extended_uncached", "one_by_one_together")
    }
    assert parity["exported_eager"] == 0.0
    assert all(0.0 <= difference <= LOGIT_TOLERANCE for difference in parity.values())
    assert written["versions"]["torch"] == torch.__version__
    assert set(written["versions"]) == {"torch", "torchrec", "fbgemm", "torchrec_kvshare"}
    assert sorted(written["sha256_by_file"]) == sorted(VOUCHED)
    assert sorted(path.name for path in artifact.iterdir()) == FILES
    description = {
        "encoder": written["encoder"],
        "schema": SCHEMA.to_json(),
    }
    dense, tables = split_tables(model)
    assert written["model_digest"] == model_digest(dense, description)
    assert written["tables_digest"] == model_digest(tables, {})
    of_history = version_of(model, SCHEMA).kv[HISTORY]
    assert written["kv"] == {HISTORY: of_history._asdict()}


def test_reading_gives_back_what_was_written(artifact: Path) -> None:
    manifest, schema = read_artifact(artifact)
    assert json.loads((artifact / "manifest.json").read_text()) == manifest.to_json()
    assert schema.to_json() == SCHEMA.to_json()
    digests = (manifest.model_digest[:16], manifest.tables_digest[:16])
    assert manifest.model_version == "-".join(digests)
    assert load_artifact(artifact).manifest == manifest


def test_another_weight_is_another_version(artifact: Path, tmp_path: Path) -> None:
    model = RankingModel(make_dlrm(seed=9)).eval()
    manifest = export_model(model, SCHEMA, tmp_path / "other")
    assert manifest.model_version != read_artifact(artifact)[0].model_version


def test_a_program_that_extends_wrongly_is_found_out(model: RankingModel) -> None:
    wrong = copy.copy(model)
    wrong.extend = lambda *arguments: [kv + 0.1 for kv in model.extend(*arguments)]
    assert "extended_uncached" not in check_parity(
        wrong, model, SCHEMA, extends=False, tolerance=0.0
    )
    with pytest.raises(ParityError, match="extended_uncached logits differ by"):
        check_parity(wrong, model, SCHEMA, extends=True, tolerance=0.0)


def test_one_process_exports_models_of_several_depths(artifact: Path, tmp_path: Path) -> None:
    """TorchScript bound the type of the first model's tower to a property of the collection, and
    refused every later model with another number of layers."""
    for num_layers in (1, 3):
        spec = replace(CAUSAL_SPEC, dim=15, num_layers=num_layers, num_heads=5)
        dlrm = dlrm_with_history(SCHEMA, spec, [6, 1])
        destination = tmp_path / str(num_layers)
        manifest = export_model(RankingModel(dlrm).eval(), SCHEMA, destination)
        assert manifest.towers[HISTORY].num_planes == 2 * num_layers


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(broken: Path, name: str) -> None:
    (broken / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        load_artifact(broken)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_file_is_named(broken: Path, name: str) -> None:
    content = (broken / name).read_bytes()
    (broken / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=name):
        load_artifact(broken)


@pytest.mark.parametrize("name", VOUCHED)
def test_one_changed_bit_is_noticed(broken: Path, name: str) -> None:
    content = bytearray((broken / name).read_bytes())
    content[len(content) // 2] ^= 1
    (broken / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{name} has sha256 .*; its manifest says"):
        load_artifact(broken)


@pytest.mark.parametrize(
    "content", ["", "{", "null", "7", "[]", '"text"', "{}", '{"format": 2}', '{"format": 1}', "\0"]
)
def test_a_manifest_that_is_none_is_named(broken: Path, content: str) -> None:
    (broken / "manifest.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        load_artifact(broken)


@pytest.mark.parametrize("value", [None, [], 7, "text"])
@pytest.mark.parametrize("field", ["towers", "sha256_by_file"])
def test_a_manifest_with_a_field_of_another_kind_is_named(
    broken: Path, field: str, value: Any
) -> None:
    written = json.loads((broken / "manifest.json").read_text())
    (broken / "manifest.json").write_text(json.dumps(written | {field: value}))
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        load_artifact(broken)


@pytest.mark.parametrize("name", VOUCHED)
def test_a_manifest_that_does_not_vouch_for_a_file_is_named(broken: Path, name: str) -> None:
    """A file whose digest had been left out of the manifest was loaded without any check."""
    written = json.loads((broken / "manifest.json").read_text())
    del written["sha256_by_file"][name]
    (broken / "manifest.json").write_text(json.dumps(written))
    with pytest.raises(ArtifactError, match=name):
        load_artifact(broken)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere is no artifact"):
        load_artifact(tmp_path / "nowhere")


def test_a_program_that_is_vouched_for_but_no_program_is_named(broken: Path) -> None:
    written = json.loads((broken / "manifest.json").read_text())
    written["sha256_by_file"]["model.pt"] = written["sha256_by_file"]["schema.json"]
    (broken / "manifest.json").write_text(json.dumps(written))
    shutil.copy(broken / "schema.json", broken / "model.pt")
    with pytest.raises(ArtifactError, match=r"model\.pt cannot be loaded"):
        load_artifact(broken)


def rewrite(artifact: Path, **changed: Any) -> None:
    """Change fields of a manifest."""
    written = json.loads((artifact / "manifest.json").read_text())
    (artifact / "manifest.json").write_text(json.dumps(written | changed))


@pytest.mark.parametrize("name", ["torch", "torchrec", "fbgemm"])
def test_a_library_of_another_version_is_named(broken: Path, name: str) -> None:
    versions = read_artifact(broken)[0].versions
    rewrite(broken, versions=versions | {name: "0.9.1"})
    with pytest.raises(ArtifactError, match=f"was exported with {name} 0.9.1; here is "):
        load_artifact(broken)
    rewrite(broken, versions={key: value for key, value in versions.items() if key != name})
    with pytest.raises(ArtifactError, match=f"was exported with {name} ; here is"):
        load_artifact(broken)


def test_another_build_of_the_same_version_will_do(broken: Path) -> None:
    versions = read_artifact(broken)[0].versions
    rewrite(broken, versions=versions | {"torch": versions["torch"].split("+")[0] + "+cu130"})
    load_artifact(broken)


def test_a_runtime_that_nobody_knows_is_named(broken: Path) -> None:
    rewrite(broken, runtime="onnx")
    with pytest.raises(ArtifactError, match="needs runtime 'onnx'"):
        load_artifact(broken)


def test_an_artifact_that_scores_otherwise_here_is_refused(broken: Path) -> None:
    golden = json.loads((broken / "golden.json").read_text())
    golden[3]["scores"][1] += 1e-4
    (broken / "golden.json").write_text(json.dumps(golden))
    digests = read_sha256(broken) | {"golden.json": file_sha256(broken / "golden.json")}
    rewrite(broken, sha256_by_file=digests)
    with pytest.raises(ArtifactError, match="scores candidate 1 of golden request drawn-3"):
        load_artifact(broken)


def read_sha256(artifact: Path) -> dict[str, str]:
    return json.loads((artifact / "manifest.json").read_text())["sha256_by_file"]


def test_golden_scores_are_the_eager_models(model: RankingModel, artifact: Path) -> None:
    golden = json.loads((artifact / "golden.json").read_text())
    raws = [one["request"] for one in golden]
    assert [len(raw["history"]["item_id"]) for raw in raws] == [0, 1, 4, 7, 17]
    answers = Engine(model, SCHEMA, store=None).rank(parse_all(raws))
    assert [one["scores"] for one in golden] == [answer.scores for answer in answers]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "onnx"}, "runtime is 'onnx'"),
        ({"tables": "int3"}, "table dtype is 'int3'"),
    ],
)
def test_what_cannot_be_exported_is_named_and_leaves_nothing(
    model: RankingModel, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        export_model(model, SCHEMA, tmp_path / "artifact", **options)
    assert list(tmp_path.iterdir()) == []


def test_tables_in_fewer_bits_are_other_tables_of_the_same_model(
    model: RankingModel, artifact: Path, tmp_path: Path
) -> None:
    float32 = read_artifact(artifact)[0]
    int8 = export_model(
        model, SCHEMA, tmp_path / "int8", tables="int8", provenance={"licence": "Apache-2.0"}
    )
    assert int8.model_digest == float32.model_digest
    assert int8.tables_digest != float32.tables_digest
    assert (int8.tables, int8.provenance) == ("int8", {"licence": "Apache-2.0"})
    loaded = load_artifact(tmp_path / "int8").model
    for sizes in BATCHES:
        for got, exact in zip(logits_of(loaded, sizes), logits_of(model, sizes), strict=True):
            assert 0.0 < float((got - exact).abs().max()) < 0.1


class Differing(nn.Module):
    """A head that returns other logits in TorchScript than in eager mode."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.head = head

    def forward(self, rows: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self.head(rows) * 1.001
        return self.head(rows)


def tower_of(dlrm: DLRM) -> HistoryTower:
    [tower] = dlrm.sparse_arch.embedding_bag_collection.towers()
    return tower


def with_head(dlrm: DLRM, head: nn.Module) -> RankingModel:
    tower_of(dlrm).head = head
    return RankingModel(dlrm).eval()


def test_a_program_that_differs_from_its_model_leaves_nothing_behind(tmp_path: Path) -> None:
    dlrm = make_dlrm(seed=8)
    model = with_head(dlrm, Differing(tower_of(dlrm).head))
    with pytest.raises(ParityError, match="uncached scores of the program differ by"):
        export_model(model, SCHEMA, tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("head.bias", 3),
        ("bag_user_id.weight", (4, 2)),
        ("token_items_genres.weight", (5, slice(2, 9))),
    ],
)
def test_a_weight_that_is_not_finite_is_named_and_leaves_nothing_behind(
    tmp_path: Path, name: str, place: Any, value: float
) -> None:
    """A row of NaN in a table that no drawn request read was exported, and its user got no
    scores."""
    model = RankingModel(make_dlrm(seed=8)).eval()
    weight = next(one for full, one in model.state_dict().items() if full.endswith(name))
    weight[place] = value
    num_wrong, num = int((~weight.isfinite()).sum()), weight.numel()
    message = re.escape(f"{name} holds {num_wrong} numbers that are not finite, of {num};")
    with pytest.raises(ArtifactError, match=message):
        export_model(model, SCHEMA, tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tables", "value", "message"),
    [
        (
            "float16",
            70_000.0,
            "table token_items_genres holds 1 numbers that are not finite, of 108;",
        ),
        (
            "int8",
            1e8,
            "scales of table token_items_genres holds 1 numbers that are not finite, of 9;",
        ),
        (
            "int4",
            -1e6,
            "scales of table token_items_genres holds 1 numbers that are not finite, of 9;",
        ),
    ],
)
def test_a_number_too_great_for_fewer_bits_is_named_and_leaves_nothing_behind(
    tmp_path: Path, tables: str, value: float, message: str
) -> None:
    """float16 overflows at 65504: a table of finite numbers became infinite."""
    model = RankingModel(make_dlrm(seed=8)).eval()
    with torch.no_grad():
        model.collection.token_embeddings.embeddings["token_items_genres"].weight[5, 7] = value
    with pytest.raises(ArtifactError, match=re.escape(message)):
        export_model(model, SCHEMA, tmp_path / "artifact", tables=tables)
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_logits_overflow_leaves_nothing_behind(tmp_path: Path) -> None:
    """The score of an infinite logit is 1, which looks valid."""
    model = RankingModel(make_dlrm(seed=8)).eval()
    with torch.no_grad():
        for parameter in model.ranker.over_arch.parameters():
            parameter.fill_(3e38)
    with pytest.raises(ParityError, match="the model has logits that are not finite"):
        export_model(model, SCHEMA, tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_logits_that_are_nan_differ(model: RankingModel) -> None:
    def says_nan(*tensors: Any) -> Tensor:
        return model(*tensors) * math.nan

    wrong = copy.copy(model)
    wrong.score = lambda *tensors: model.score(*tensors) * math.nan
    with pytest.raises(ParityError, match="cached_uncached logits differ by nan"):
        check_parity(wrong, model, SCHEMA, extends=False, tolerance=LOGIT_TOLERANCE)
    with pytest.raises(ParityError, match="exported_eager logits differ by nan"):
        check_parity(model, says_nan, SCHEMA, extends=False, tolerance=LOGIT_TOLERANCE)


@pytest.mark.parametrize("field", ["codecs", "break_even_events"])
def test_a_figure_that_is_not_finite_is_not_added(broken: Path, field: str) -> None:
    """It was written as NaN, which is not JSON: other readers could not read the manifest."""
    before = (broken / "manifest.json").read_bytes()
    with pytest.raises(ArtifactError, match="a number in the manifest is not finite"):
        add_measured(broken, **{field: {"fp8": {"score_difference": math.nan}}})
    assert (broken / "manifest.json").read_bytes() == before
    assert sorted(path.name for path in broken.iterdir()) == FILES


def test_a_golden_score_of_nan_is_refused(broken: Path) -> None:
    golden = json.loads((broken / "golden.json").read_text())
    golden[3]["scores"][1] = math.nan
    (broken / "golden.json").write_text(json.dumps(golden))
    digests = read_sha256(broken) | {"golden.json": file_sha256(broken / "golden.json")}
    rewrite(broken, sha256_by_file=digests)
    with pytest.raises(ArtifactError, match="it was exported with nan"):
        load_artifact(broken)


def test_what_is_there_is_never_overwritten(model: RankingModel, tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "precious").write_text("kept")
    with pytest.raises(ArtifactError, match="artifact exists; an artifact is never overwritten"):
        export_model(model, SCHEMA, tmp_path / "artifact")
    assert [path.name for path in tmp_path.rglob("*")] == ["artifact", "precious"]


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_an_export_that_is_interrupted_leaves_nothing_behind(
    tmp_path: Path, fault: type[BaseException]
) -> None:
    def interrupted() -> None:
        with artifact_folder(tmp_path / "deep" / "artifact") as folder:
            (folder / "model.pt").write_text("half a program")
            raise fault

    with pytest.raises(fault):
        interrupted()
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_export_that_is_killed_leaves_no_artifact(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from torchrec_kvshare.export.artifact import artifact_folder
with artifact_folder(Path(sys.argv[1])) as folder:
    (folder / "manifest.json").write_text("{}")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    process = fresh_process(program, str(tmp_path / "artifact"))
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "artifact").exists()
    # The leftover folder has another name and does not block the next export.
    with artifact_folder(tmp_path / "artifact") as folder:
        (folder / "model.pt").write_text("a program")
    assert os.listdir(tmp_path / "artifact") == ["model.pt"]


def test_an_artifact_may_be_read_by_other_users(artifact: Path) -> None:
    assert artifact.stat().st_mode & 0o777 == 0o755


def test_a_model_of_items_and_times_alone_exports_too(tmp_path: Path) -> None:
    """Without multi-valued columns, as on Online Retail, scripting met an empty list and failed."""
    vocabularies = {name: SCHEMA.vocabulary_by_column[name] for name in ("user_id", "item_id")}
    bare = FeatureSchema(vocabularies, histories=SCHEMA.histories)
    export_model(RankingModel(make_dlrm(seed=5, schema=bare)).eval(), bare, tmp_path / "a")
    assert load_artifact(tmp_path / "a").schema.item_attributes == ()
