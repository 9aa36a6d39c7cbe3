"""Compiled graphs compute what the eager model does, at sizes not exported, with torch alone.

Compiling takes some twenty seconds for each kind, so each is compiled once; the causal graphs are
those of an artifact. One process that has only torch runs the graphs of all kinds.
"""

import json
import shutil
import zipfile
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from tests.encoder_worlds import LONGER_WINDOW, SLIDING_WINDOW
from tests.worlds import (
    LOGIT_TOLERANCE,
    SCHEMA,
    assert_same_scores,
    draw_raw,
    make_dlrm,
    new_interpreter,
    parse_all,
)
from torchrec_kvshare.attention.library import library_path
from torchrec_kvshare.config import CacheConfig
from torchrec_kvshare.errors import ArtifactError, ConfigError
from torchrec_kvshare.export.exporter import PT2, export_model, load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.export.pt2 import (
    GRAPHS,
    WEIGHTS,
    CompiledRanking,
    Graph,
    Inputs,
    example_sizes,
    graph_inputs,
    load_pt2,
    write_pt2,
)
from torchrec_kvshare.export.triton import write_repository
from torchrec_kvshare.features.batches import collate
from torchrec_kvshare.features.schema import FeatureSchema, History
from torchrec_kvshare.history.kinds import (
    BIDIRECTIONAL,
    CAUSAL,
    HSTU,
    LONGER,
    TARGET_ONLY,
    TowerSpec,
)
from torchrec_kvshare.model.ranking import RankingFunctions, RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.deterministic import compute_rows_alone, require_determinism
from torchrec_kvshare.verify.parity import score_extended, score_through_pages

KEY = b"a secret"
# Only items and times, so that graphs are small.
BARE = replace(SCHEMA, context=(), event_attributes=(), item_attributes=(), item_floats=())
SEEN, BOUGHT = History("seen", SLIDING_WINDOW), History("bought", SLIDING_WINDOW, ("buy",))


class World(NamedTuple):
    """The schema and the tower spec of a compiled model."""

    schema: FeatureSchema
    spec: TowerSpec


# Together they cover all features of a model; test_graphs.py covers them for every kind.
WORLD_BY_KIND = {
    CAUSAL: World(
        replace(SCHEMA, tasks=("like", "love")),
        TowerSpec(CAUSAL, 10, 2, 2, num_tokens=2, has_state=True, token_dim=6, output_dim=8),
    ),
    BIDIRECTIONAL: World(BARE, TowerSpec(BIDIRECTIONAL, 10, 1, 2)),
    TARGET_ONLY: World(
        replace(BARE, event_attributes=("action",), histories=(SEEN, BOUGHT)),
        TowerSpec(TARGET_ONLY, 10, 1, 2, window=4, has_state=True),
    ),
    HSTU: World(
        replace(BARE, histories=(History("history", SLIDING_WINDOW),)),
        TowerSpec(HSTU, 10, 1, 2, window=4),
    ),
    LONGER: World(
        replace(BARE, histories=(History("history", LONGER_WINDOW),)),
        TowerSpec(LONGER, 10, 2, 2, merge=3, recent=12, num_globals=2, has_state=True),
    ),
}

NAMES = ("encode", "score")
FILES = [GRAPHS, WEIGHTS, *(f"{name}.pt2" for name in NAMES)]

# The export draws 2 users of a whole window and 100 candidates each.
BATCHES = [
    [(9, 1, 31)],
    [(0, 2, 32)],
    [(1, 3, 33)],
    [(0, 1, 34), (0, 2, 35)],
    [(24, 97, 36), (0, 1, 37)],
    [(number, 1 + number % 4, 40 + number) for number in range(23)],
]

FOREIGN_PROGRAM = """
import json, os, sys
import torch
torch.set_num_threads(1)
operators, *folders = sys.argv[1:]
torch.ops.load_library(operators)
loaded = []
for folder in folders:
    graphs = json.load(open(f"{folder}/graphs.json"))["graphs"]
    weights = torch.load(f"{folder}/weights.pt", mmap=True)
    loaders = {}
    for name, graph in graphs.items():
        package = torch._inductor.aoti_load_package(f"{folder}/{graph['file']}")
        own = {key: weights[key] for key in package.get_constant_fqns()}
        package.load_constants(own, check_full_update=True, user_managed=True)
        loaders[name] = package.loader
    loaded.append((graphs, loaders))
num_threads = len(os.listdir("/proc/self/task"))
for folder, (graphs, loaders) in zip(folders, loaded):
    answers = []
    for name, inputs in torch.load(f"{folder}/asked"):
        answers.append(loaders[name].run([inputs[one["name"]] for one in graphs[name]["inputs"]]))
    torch.save(answers, f"{folder}/answered")
found = {"new_threads": len(os.listdir("/proc/self/task")) - num_threads}
found["modules"] = [n for n in ("torchrec_kvshare", "torchrec", "fbgemm_gpu") if n in sys.modules]
print(json.dumps(found))
"""


def answers_of(model: RankingFunctions, world: World) -> list[dict[str, Any]]:
    """K/V and logits of each batch, by how they are computed."""
    answers = []
    for users in BATCHES:
        requests = parse_all([draw_raw(*user, world.schema) for user in users], world.schema)
        batch = collate(requests, world.schema)
        found = {
            "kv": model.prefill(batch.sparse_features),
            "uncached": model(batch.dense_features, batch.sparse_features),
            "pages": score_through_pages(model, requests, world.schema),
        }
        if world.spec.kind != BIDIRECTIONAL:
            found["extended"] = score_extended(model, requests, world.schema)
        answers.append(found)
    return answers


def assert_equals_eager(answers: list[dict[str, Any]], kind: str) -> None:
    """Compare with the eager model, which is not asked through pages."""
    for got, eager in zip(answers, answers_of(eager_model(kind), WORLD_BY_KIND[kind]), strict=True):
        expected = eager | {"pages": eager["uncached"]}
        torch.testing.assert_close(got, expected, rtol=0.0, atol=LOGIT_TOLERANCE)


def recording(graphs: dict[str, Graph], asked: list[tuple[str, Inputs]]) -> dict[str, Graph]:
    """The same graphs, and a record of their inputs."""

    def record(name: str) -> Graph:
        def call(inputs: Inputs) -> list[Tensor]:
            asked.append((name, inputs))
            return graphs[name](inputs)

        return call

    return {name: record(name) for name in graphs}


def sources_of(path: Path) -> str:
    """All C++ of a compiled graph."""
    with zipfile.ZipFile(path) as package:
        names = [name for name in package.namelist() if name.endswith(".cpp")]
        return "".join(package.read(name).decode() for name in names)


def eager_model(kind: str) -> RankingModel:
    eager = RankingModel(make_dlrm(8, *WORLD_BY_KIND[kind])).eval()
    return compute_rows_alone(eager) if kind == HSTU else eager


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed artifact of the causal model."""
    folder = tmp_path_factory.mktemp("pt2") / "artifact"
    schema = WORLD_BY_KIND[CAUSAL].schema
    manifest = export_model(eager_model(CAUSAL), schema, folder, runtime=PT2, key=KEY)
    assert 0.0 < manifest.parity["exported_eager"] <= LOGIT_TOLERANCE
    return folder


@pytest.fixture(scope="module")
def folders(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the graphs of each kind."""
    base = tmp_path_factory.mktemp("graphs")
    shutil.copytree(artifact, base / CAUSAL)
    for kind, world in WORLD_BY_KIND.items():
        if kind != CAUSAL:
            (base / kind).mkdir()
            assert write_pt2(eager_model(kind), world.schema, base / kind) == FILES
            assert sorted(path.name for path in (base / kind).iterdir()) == sorted(FILES)
    return {kind: base / kind for kind in WORLD_BY_KIND}


def load_graphs(kind: str, folder: Path) -> CompiledRanking:
    world = WORLD_BY_KIND[kind]
    loaded = load_pt2(folder, world.schema, asdict(world.spec))
    assert isinstance(loaded, CompiledRanking)
    return loaded


@pytest.fixture(scope="module")
@torch.no_grad()
def here(folders: dict[str, Path]) -> dict[str, list[dict[str, Any]]]:
    """Answers of each kind's graphs, whose inputs are then in the folders."""
    answers_by_kind = {}
    for kind, folder in folders.items():
        world, loaded = WORLD_BY_KIND[kind], load_graphs(kind, folder)
        asked: list[tuple[str, Inputs]] = []
        graphs = recording(dict(loaded.graphs), asked)
        recorded = CompiledRanking(graphs, world.schema, world.spec, loaded.weights)
        answers_by_kind[kind] = answers_of(recorded, world)
        torch.save(asked, folder / "asked")
    return answers_by_kind


@pytest.mark.parametrize("kind", WORLD_BY_KIND)
@torch.no_grad()
def test_compiled_graphs_say_what_the_model_says(
    kind: str, folders: dict[str, Path], here: dict[str, list[dict[str, Any]]]
) -> None:
    assert_equals_eager(here[kind], kind)
    asked = torch.load(folders[kind] / "asked")
    assert {name for name, _ in asked} == set(NAMES)


def test_one_user_alone_gets_the_same_bits_from_compiled_graphs(folders: dict[str, Path]) -> None:
    """Of a model that computes rows alone, as an exported one may be asked to."""
    require_determinism(load_graphs(HSTU, folders[HSTU]), WORLD_BY_KIND[HSTU].schema)


@pytest.fixture(scope="module")
def elsewhere(folders: dict[str, Path], here: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """What a process with torch alone says of itself; its answers are in the folders."""
    given = (str(library_path()), *map(str, folders.values()))
    output, errors = new_interpreter(FOREIGN_PROGRAM, *given).communicate()
    assert output, errors
    found: dict[str, Any] = json.loads(output)
    return found


def test_graphs_need_torch_alone_and_start_no_thread(elsewhere: dict[str, Any]) -> None:
    assert elsewhere == {"new_threads": 0, "modules": []}


@pytest.mark.parametrize("kind", WORLD_BY_KIND)
@pytest.mark.usefixtures("elsewhere")
@torch.no_grad()
def test_graphs_say_the_same_in_a_process_with_torch_alone(
    kind: str, folders: dict[str, Path]
) -> None:
    world, answers = WORLD_BY_KIND[kind], iter(torch.load(folders[kind] / "answered"))
    graphs = dict.fromkeys(NAMES, lambda _: next(answers))
    there = CompiledRanking(graphs, world.schema, world.spec, {})
    assert_equals_eager(answers_of(there, world), kind)


@pytest.mark.parametrize("kind", WORLD_BY_KIND)
def test_graphs_use_as_many_threads_as_their_host_wants(
    kind: str, folders: dict[str, Path]
) -> None:
    """Not as many as the exporter had."""
    for name in NAMES:
        sources = sources_of(folders[kind] / f"{name}.pt2")
        assert "omp parallel" in sources
        assert "num_threads(" not in sources


def test_an_artifact_of_compiled_graphs_is_served_by_the_same_engine(
    artifact: Path, tmp_path: Path
) -> None:
    model, schema = eager_model(CAUSAL), WORLD_BY_KIND[CAUSAL].schema
    loaded = load_artifact(artifact, KEY)
    requests = parse_all([draw_raw(9, 4, 1, schema), draw_raw(30, 2, 2, schema)], schema)
    expected = Engine(model, schema, None).rank(requests)
    engine = new_engine(loaded)
    for status in ("miss", "hit"):
        answers = engine.rank(requests)
        assert [answer.cache.status for answer in answers] == [status] * 2
        assert_same_scores(answers, expected)
    with pytest.raises(ConfigError, match=r"cache\.items is 10; graphs of runtime pt2"):
        new_engine(loaded, CacheConfig(items=10))
    with pytest.raises(ConfigError, match="has runtime pt2; Triton needs torchscript"):
        write_repository(artifact, tmp_path / "repository")


@pytest.mark.parametrize("max_history", [1, 2, 5, 7, 99, 100, 200])
def test_the_examples_of_an_export_have_nothing_in_common(max_history: int) -> None:
    """Exported with two histories, a graph assumed two and read past the end of one."""
    window = replace(SLIDING_WINDOW, max_history=max_history, block=1)
    schema = replace(SCHEMA, histories=(History("history", window),))
    model = RankingModel(make_dlrm(8, schema, WORLD_BY_KIND[CAUSAL].spec)).eval()
    for inputs in graph_inputs(model, schema).values():
        sizes = sorted(example_sizes(inputs, schema).values())
        assert sizes[0] >= 5
        assert all(other - one >= 3 for one, other in pairwise(sizes))


def test_a_graph_for_another_cpu_is_refused(tmp_path: Path) -> None:
    (tmp_path / GRAPHS).write_text(json.dumps({"cpu": "AVX1024", "graphs": {}}))
    with pytest.raises(ArtifactError, match="was compiled for a CPU with AVX1024; this one has"):
        load_pt2(tmp_path, BARE, asdict(WORLD_BY_KIND[CAUSAL].spec))


def test_a_file_that_is_no_graph_is_named(tmp_path: Path) -> None:
    cpu = torch.backends.cpu.get_cpu_capability()
    graphs = {"score": {"file": "score.pt2", "inputs": []}}
    (tmp_path / GRAPHS).write_text(json.dumps({"cpu": cpu, "graphs": graphs}))
    torch.save({}, tmp_path / WEIGHTS)
    (tmp_path / "score.pt2").write_text("no graph")
    with pytest.raises(ArtifactError, match=r"score\.pt2 cannot be loaded"):
        load_pt2(tmp_path, BARE, asdict(WORLD_BY_KIND[CAUSAL].spec))


def test_inputs_are_described_for_hosts_of_any_language() -> None:
    model = RankingModel(make_dlrm(8)).eval()
    described = {
        graph: {name: (dtype, shape) for name, dtype, shape in inputs}
        for graph, inputs in graph_inputs(model, SCHEMA).items()
    }
    kv_sizes = (3, 4)
    users, histories = ("int64", ("users",)), ("int64", ("histories",))
    candidates, events = ("int64", ("candidates",)), ("int64", ("history.events",))

    def ids(key: str) -> tuple[str, tuple[str]]:
        return ("int64", (f"{key}.ids",))

    times = {"history.time.values": events, "history.time.lengths": histories}
    assert described["encode"] == times | {
        "history.item_id.values": events,
        "history.item_id.lengths": histories,
        "history.action.values": events,
        "history.action.lengths": histories,
        "history.genres.values": ids("history.genres"),
        "history.genres.lengths": events,
        "request.first_index.history.values": histories,
        "request.first_index.history.lengths": histories,
        "history.kv": ("float32", (4, "history.cached", *kv_sizes)),
        "history.rows": histories,
    }
    assert described["score"] == times | {
        "user_id.values": users,
        "user_id.lengths": users,
        "request.time.values": users,
        "request.time.lengths": users,
        "request.history.values": users,
        "request.history.lengths": users,
        "context.country.values": ids("context.country"),
        "context.country.lengths": users,
        "candidates.item_id.values": candidates,
        "candidates.item_id.lengths": candidates,
        "candidates.genres.values": ids("candidates.genres"),
        "candidates.genres.lengths": candidates,
        "candidates.request": candidates,
        "candidates.dense": ("float32", ("candidates", 5)),
        "request.pages.history.values": ids("request.pages.history"),
        "request.pages.history.lengths": histories,
        "history.kv": ("float32", (4, "history.pages", "history.page_rows", *kv_sizes)),
    }
