"""Compiled graphs compute what the eager model does, at sizes not exported, with torch alone.

Compiling takes half a minute for each kind, so one test does all that needs its graphs; the causal
ones are those of an artifact.
"""

import json
import zipfile
from collections.abc import Iterator
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
    PROBABILITY_TOLERANCE,
    SCHEMA,
    draw_raw,
    fresh_process,
    make_dlrm,
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
BARE = replace(SCHEMA, context=(), has_action=False, item_attributes=(), item_floats=())
SEEN, BOUGHT = History("seen", SLIDING_WINDOW), History("bought", SLIDING_WINDOW, ("buy",))


class World(NamedTuple):
    """The schema and the tower spec of a compiled model."""

    schema: FeatureSchema
    spec: TowerSpec


# Together they cover all features of a model; test_graphs.py covers them for every kind.
WORLD_BY_KIND = {
    CAUSAL: World(SCHEMA, TowerSpec(CAUSAL, 10, 2, 2, num_tokens=2)),
    BIDIRECTIONAL: World(BARE, TowerSpec(BIDIRECTIONAL, 10, 1, 2)),
    TARGET_ONLY: World(
        replace(BARE, has_action=True, histories=(SEEN, BOUGHT)),
        TowerSpec(TARGET_ONLY, 10, 1, 2, window=4),
    ),
    HSTU: World(
        replace(BARE, histories=(History("history", SLIDING_WINDOW),)),
        TowerSpec(HSTU, 10, 1, 2, window=4),
    ),
    LONGER: World(
        replace(BARE, histories=(History("history", LONGER_WINDOW),)),
        TowerSpec(LONGER, 10, 2, 2, merge=3, recent=12, num_globals=2),
    ),
}

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
operators, folder, asked, answered = sys.argv[1:]
torch.ops.load_library(operators)
graphs = json.load(open(f"{folder}/graphs.json"))["graphs"]
weights = torch.load(f"{folder}/weights.pt", mmap=True)
loaders = {}
for name, graph in graphs.items():
    package = torch._inductor.aoti_load_package(f"{folder}/{graph['file']}")
    own = {key: weights[key] for key in package.get_constant_fqns()}
    package.load_constants(own, check_full_update=True, user_managed=True)
    loaders[name] = package.loader
num_threads = len(os.listdir("/proc/self/task"))
answers = []
for name, inputs in torch.load(asked):
    answers.append(loaders[name].run([inputs[one["name"]] for one in graphs[name]["inputs"]]))
torch.save(answers, answered)
found = {"new_threads": len(os.listdir("/proc/self/task")) - num_threads}
found["modules"] = [n for n in ("torchrec_kvshare", "torchrec", "fbgemm_gpu") if n in sys.modules]
print(json.dumps(found))
"""


def assert_equals_eager(
    got: RankingFunctions, eager: RankingModel, world: World, users: list[tuple[int, int, int]]
) -> None:
    """K/V, and logits uncached, through pages and, where there are such, extended."""
    requests = parse_all([draw_raw(*user, world.schema) for user in users], world.schema)
    batch = collate(requests, world.schema)
    features = batch.sparse_features
    for one, other in zip(got.prefill(features), eager.prefill(features), strict=True):
        assert_close(one, other)
    expected = eager(batch.dense_features, features)
    assert_close(got(batch.dense_features, features), expected)
    assert_close(score_through_pages(got, requests, world.schema), expected)
    if world.spec.kind != BIDIRECTIONAL:
        extended = score_extended(eager, requests, world.schema)
        assert_close(score_extended(got, requests, world.schema), extended)


def assert_close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0.0, atol=LOGIT_TOLERANCE)


def recording(graphs: dict[str, Graph], asked: list[tuple[str, Inputs]]) -> dict[str, Graph]:
    """The same graphs, and a record of their inputs."""

    def record(name: str) -> Graph:
        def call(inputs: Inputs) -> list[Tensor]:
            asked.append((name, inputs))
            return graphs[name](inputs)

        return call

    return {name: record(name) for name in graphs}


def answer_elsewhere(
    folder: Path, asked: list[tuple[str, Inputs]], work: Path
) -> tuple[Any, Iterator[Any]]:
    """State of a process that has only torch, and outputs of its graphs."""
    torch.save(asked, work / "asked")
    files = [str(library_path()), str(folder), str(work / "asked"), str(work / "answered")]
    output, errors = fresh_process(FOREIGN_PROGRAM, *files).communicate()
    assert output, errors
    return json.loads(output), iter(torch.load(work / "answered"))


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


@pytest.mark.parametrize("kind", WORLD_BY_KIND)
@torch.no_grad()
def test_compiled_graphs_say_what_the_model_says(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    world, eager = WORLD_BY_KIND[kind], eager_model(kind)
    names = ["encode", "score"]
    files = [GRAPHS, WEIGHTS, *(f"{name}.pt2" for name in names)]
    folder = tmp_path / "written"
    if kind == CAUSAL:
        folder = request.getfixturevalue("artifact")
    else:
        folder.mkdir()
        assert write_pt2(eager, world.schema, folder) == files
        assert sorted(path.name for path in folder.iterdir()) == sorted(files)
    loaded = load_pt2(folder, world.schema, asdict(world.spec))
    assert isinstance(loaded, CompiledRanking)
    if kind == HSTU:
        require_determinism(loaded, world.schema)
    asked: list[tuple[str, Inputs]] = []
    here = CompiledRanking(
        recording(dict(loaded.graphs), asked), world.schema, world.spec, loaded.weights
    )
    for users in BATCHES:
        assert_equals_eager(here, eager, world, users)
    assert {name for name, _ in asked} == set(names)
    found, answers = answer_elsewhere(folder, asked, tmp_path)
    assert found == {"new_threads": 0, "modules": []}
    there = CompiledRanking(
        dict.fromkeys(names, lambda _: next(answers)), world.schema, world.spec, {}
    )
    for users in BATCHES:
        assert_equals_eager(there, eager, world, users)
    for name in names:
        sources = sources_of(folder / f"{name}.pt2")
        assert "omp parallel" in sources
        assert "num_threads(" not in sources  # not the exporter's number of threads


def test_an_artifact_of_compiled_graphs_is_served_by_the_same_engine(
    artifact: Path, tmp_path: Path
) -> None:
    model, schema = eager_model(CAUSAL), WORLD_BY_KIND[CAUSAL].schema
    loaded = load_artifact(artifact, KEY)
    requests = parse_all([draw_raw(9, 4, 1, schema), draw_raw(30, 2, 2, schema)], schema)
    expected = [one.scores for one in Engine(model, schema, None).rank(requests)]
    engine = new_engine(loaded)
    for status in ("miss", "hit"):
        for answer, scores in zip(engine.rank(requests), expected, strict=True):
            assert answer.cache.status == status
            assert answer.scores == pytest.approx(scores, abs=PROBABILITY_TOLERANCE, rel=0.0)
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
