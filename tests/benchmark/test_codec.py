"""What a codec does to scores: the scenario, and the engine that asks for its figures."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.logs import ITEMS, Event, log_of
from tests.pipelines.commands import run_pipeline
from tests.worlds import PROBABILITY_TOLERANCE, random_weights
from torchrec_kvshare.benchmark.results import Record
from torchrec_kvshare.benchmark.run import measure
from torchrec_kvshare.benchmark.scenarios.codec import CodecOptions
from torchrec_kvshare.cache.codecs import CODECS
from torchrec_kvshare.cache.record import KVRecord
from torchrec_kvshare.config import CacheConfig, HostConfig, SyntheticData
from torchrec_kvshare.data import load
from torchrec_kvshare.data.dataset import Dataset, build_dataset
from torchrec_kvshare.data.load import load_log
from torchrec_kvshare.data.requests import make_targeted_requests
from torchrec_kvshare.data.shards import in_memory
from torchrec_kvshare.errors import ArtifactError, ConfigError, DataError
from torchrec_kvshare.export.artifact import read_artifact
from torchrec_kvshare.export.exporter import export_model, load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.features.batches import collate_history
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.schema import HISTORY, History, Window
from torchrec_kvshare.history.kinds import CAUSAL, TowerSpec
from torchrec_kvshare.model.ranking import RankingModel, dlrm_with_history
from torchrec_kvshare.verify import codecs

DATA = SyntheticData(num_users=30, events_per_user=70, num_items=90, num_categories=6)
MAX_HISTORY, BLOCK = 32, 8  # events
NUM_REQUESTS, NUM_CANDIDATES, SEED = 60, 40, 5
PAGE_SIZE = 4
LOSSY = [name for name in CODECS if name != "float32"]
Figures = dict[str, dict[str, float]]
METRICS = ["auc_change", "top10_overlap", "max_score_difference", "bytes_ratio"]


def export(dataset: Dataset, destination: Path) -> Path:
    """Export an untrained model with weights so large that K/V in int8 changes its scores."""
    model = dlrm_with_history(dataset.schema, TowerSpec(CAUSAL, 12, 2, 3), [9, 1])
    random_weights(model, seed=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".tower." in name and not name.endswith("norm.weight"):
                parameter.mul_(5 / 3)
    export_model(RankingModel(model.eval()).eval(), dataset.schema, destination)
    return destination


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    dataset = build_dataset(load_log(DATA), [History(HISTORY, Window(MAX_HISTORY, BLOCK))])
    return export(dataset, tmp_path_factory.mktemp("exported") / "artifact")


@pytest.fixture
def artifact(exported: Path, tmp_path: Path) -> Path:
    """A copy without measured figures."""
    return Path(shutil.copytree(exported, tmp_path / "artifact"))


def options_of(artifact: Path, **change: Any) -> CodecOptions:
    options = CodecOptions(
        artifact=str(artifact),
        data=DATA,
        requests=NUM_REQUESTS,
        candidates=[NUM_CANDIDATES],
        page_size=PAGE_SIZE,
        seed=SEED,
    )
    return replace(options, **change)


@pytest.fixture(scope="module")
def measured(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy with its figures."""
    return Path(shutil.copytree(exported, tmp_path_factory.mktemp("measured") / "artifact"))


@pytest.fixture(scope="module")
def records(measured: Path) -> list[Record]:
    return measure("codec", options_of(measured))


@pytest.fixture(scope="module")
def figures(records: list[Record]) -> Figures:
    """By codec and metric."""
    return figures_by_codec(records)


def figures_by_codec(records: list[Record]) -> Figures:
    found: Figures = {}
    for record in records:
        found.setdefault(str(record.case["codec"]), {})[record.metric] = record.value
    return found


# --- the scenario


def test_every_lossy_codec_has_every_figure(records: list[Record], figures: Figures) -> None:
    assert {name: list(of_codec) for name, of_codec in figures.items()} == {
        "float32": ["auc"],
        **dict.fromkeys(LOSSY, METRICS),
    }
    for record in records:
        codec = record.case["codec"]
        assert record.scenario == "codec"
        assert record.case == {
            "path": codec,
            "codec": codec,
            "encoder": "causal",
            "candidates": NUM_CANDIDATES,
            "requests": NUM_REQUESTS,
        }
    assert 0 < figures["float32"]["auc"] < 1
    # Besides the numbers there are a header and, for int8, scales: four bytes for two channels of
    # a history of at most 32 events.
    assert 0.5 < figures["float16"]["bytes_ratio"] < 0.56
    assert 0.25 + 2 / 32 < figures["int8"]["bytes_ratio"] < 0.36
    # Steps of 2**-11 and 2**-8 of a number, of 2**-8 and 2**-5 of the greatest of its block.
    worst = {name: figures[name]["max_score_difference"] for name in LOSSY}
    assert 0 < worst["float16"] < worst["bfloat16"] < worst["int8"] < worst["fp8_e4m3"] < 0.2


def test_figures_are_those_of_the_codec_alone(measured: Path, figures: Figures) -> None:
    """Computed again in torch, over K/V that was never in a record."""
    artifact = load_artifact(measured)
    dataset = build_dataset(load_log(DATA), artifact.schema.histories)
    engine = new_engine(artifact, CacheConfig(name="off"))
    int8 = CODECS["int8"]
    drawn, exact, lossy = [], [], []
    for raw, target in make_targeted_requests(
        in_memory(dataset), NUM_REQUESTS, NUM_CANDIDATES, SEED
    ):
        request = parse_request(raw, artifact.schema)
        features = collate_history([request], artifact.schema).sparse_features
        with torch.no_grad():
            [kv] = artifact.model.prefill(features)
        drawn.append(target)
        exact.append(engine.rank([request])[0].scores)
        over_int8 = engine.score_with(request, [int8.decode(int8.encode(kv))])
        lossy.append(over_int8[:, 0].tolist())
    auc = {}
    best = {}
    for name, rows in (("exact", exact), ("lossy", lossy)):
        scores = torch.tensor(rows, dtype=torch.float64)  # [Q, N]
        own = scores.gather(1, torch.tensor(drawn)[:, None])
        auc[name] = float((scores < own).sum(1).double().mean()) / (NUM_CANDIDATES - 1)
        best[name] = torch.zeros_like(scores).scatter(1, scores.topk(10).indices, 1.0)
    assert figures["float32"]["auc"] == pytest.approx(auc["exact"], abs=1e-12)
    assert figures["int8"]["auc_change"] == pytest.approx(auc["lossy"] - auc["exact"], abs=1e-12)
    overlap = float((best["exact"] * best["lossy"]).sum(1).mean()) / 10
    assert figures["int8"]["top10_overlap"] == pytest.approx(overlap, abs=1e-12)
    worst = float((torch.tensor(lossy) - torch.tensor(exact)).abs().max())
    # An uncached path's scores are not those over K/V to the last bit.
    assert figures["int8"]["max_score_difference"] == pytest.approx(
        worst, abs=PROBABILITY_TOLERANCE
    )
    # Otherwise the two comparisons above would prove nothing.
    assert auc["lossy"] != auc["exact"]
    assert overlap < 1


def test_the_manifest_gets_what_the_records_say_and_still_loads(
    measured: Path, exported: Path, figures: Figures
) -> None:
    before, _ = read_artifact(exported)
    after = load_artifact(measured).manifest
    assert before.codecs == {}
    assert after.codecs == {
        name: figures[name] | {"requests": NUM_REQUESTS, "candidates": NUM_CANDIDATES}
        for name in LOSSY
    }
    assert replace(after, codecs={}) == before
    files = [sorted(path.name for path in folder.iterdir()) for folder in (measured, exported)]
    assert files[0] == files[1]


def test_the_pipeline_measures_the_same_again(
    artifact: Path, records: list[Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The manifest has figures of another seed before."""
    other = measure("codec", options_of(artifact, seed=SEED + 1, requests=3))
    assert figures_by_codec(other)["int8"] != figures_by_codec(records)["int8"]
    assert {one["requests"] for one in read_artifact(artifact)[0].codecs.values()} == {3}
    run_pipeline(
        "benchmark",
        "scenario=codec",
        f"artifact={artifact}",
        *(f"data.{key}={value}" for key, value in vars(DATA).items()),
        f"requests={NUM_REQUESTS}",
        f"candidates=[{NUM_CANDIDATES}]",
        f"page_size={PAGE_SIZE}",
        f"seed={SEED}",
        f"output={tmp_path / 'results'}",
    )
    written = json.loads((tmp_path / "results" / "results.json").read_text())
    assert written["records"] == [asdict(record) for record in records]
    assert {one["requests"] for one in read_artifact(artifact)[0].codecs.values()} == {NUM_REQUESTS}
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["encoder", "history", "candidates", "path", "auc", *METRICS]
    assert [row.split()[3] for row in rows[:5]] == ["float32", *LOSSY]


# --- the engine that asks for it


def tiered(codec: str, **budget: float) -> CacheConfig:
    return CacheConfig(name="tiered", host=HostConfig(2**20, codec), **budget)


@pytest.mark.parametrize("codec", LOSSY)
def test_an_engine_refuses_a_codec_until_it_is_measured(exported: Path, codec: str) -> None:
    message = (
        f"codec {codec} was not measured on model .*; "
        "python -m pipelines.benchmark scenario=codec artifact=DIR"
    )
    with pytest.raises(ConfigError, match=message):
        new_engine(load_artifact(exported), tiered(codec))


@pytest.mark.parametrize("codec", LOSSY)
def test_an_engine_takes_a_codec_within_its_budget_only(
    measured: Path, figures: Figures, codec: str
) -> None:
    artifact = load_artifact(measured)
    enough = {
        "max_auc_change": abs(figures[codec]["auc_change"]),
        "max_top10_loss": 1.0 - figures[codec]["top10_overlap"],
        "max_score_difference": figures[codec]["max_score_difference"],
    }
    store = new_engine(artifact, tiered(codec, **enough)).store
    assert store is not None
    assert store.stack is not None
    store.stack.close()
    for budget, measured_change in enough.items():
        with pytest.raises(ConfigError, match=f"codec {codec} exceeds cache.{budget}: "):
            new_engine(artifact, tiered(codec, **enough | {budget: measured_change - 1e-9}))


# --- what cannot be measured


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"candidates": [5, 9]}, r"candidates is \[5, 9\]; it must be one number, at least 2"),
        ({"candidates": [1]}, r"candidates is \[1\]; it must be one number, at least 2"),
        ({"candidates": [500]}, "candidates is 500; the catalogue has 90 items"),
    ],
)
def test_options_that_cannot_work_are_refused(
    exported: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        measure("codec", options_of(exported, **change))
    assert read_artifact(exported)[0].codecs == {}


def test_a_folder_that_is_no_artifact_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"is no artifact: it has no manifest\.json"):
        measure("codec", options_of(tmp_path))


def test_another_data_set_than_the_models_is_refused(exported: Path) -> None:
    """Without ``data=`` it is the synthetic data, which says nothing about a shop's model."""
    other = replace(DATA, num_items=40)
    message = "data synthetic has 40 of the 90 items that the model knows; at least half"
    with pytest.raises(ConfigError, match=message):
        measure("codec", options_of(exported, data=other, candidates=[20]))
    assert read_artifact(exported)[0].codecs == {}


# --- histories without events


def one_users(user: str, *actions: str) -> list[Event]:
    """Return twenty events whose actions alternate."""
    return [
        Event(user, ITEMS[time % len(ITEMS)], time, actions[time % len(actions)])
        for time in range(20)
    ]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that reads buys and rates."""
    histories = [History(name, Window(MAX_HISTORY, BLOCK), (name,)) for name in ("buy", "rate")]
    log = log_of(one_users("www", "view", "buy", "rate"))
    return export(build_dataset(log, histories), tmp_path_factory.mktemp("sparse") / "artifact")


def test_what_has_no_events_is_neither_scored_nor_weighed(
    sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = [*one_users("u", "view"), *one_users("vv", "buy"), *one_users("www", "buy", "rate")]
    monkeypatch.setattr(load, "load_log", lambda _: log_of(events))
    packed: list[tuple[str, int]] = []
    pack = codecs.pack

    def watched(record: KVRecord, *arguments: Any, **named: Any) -> bytes:
        packed.append((record.content.identity.tower, record.content.num_events))
        return pack(record, *arguments, **named)

    monkeypatch.setattr(codecs, "pack", watched)
    records = measure("codec", options_of(sparse, requests=12, candidates=[len(ITEMS)]))
    artifact = load_artifact(sparse)
    dataset = build_dataset(log_of(events), artifact.schema.histories)
    users = [
        raw["user_id"]
        for raw, _ in make_targeted_requests(in_memory(dataset), 12, len(ITEMS), SEED)
    ]
    num_buys, num_both = users.count("vv"), users.count("www")
    assert min(num_buys, num_both, users.count("u")) > 0
    assert {record.case["requests"] for record in records} == {num_buys + num_both}
    assert all(num_events > 0 for _, num_events in packed)
    towers = [tower for tower, _ in packed]
    assert towers.count("buy") == len(CODECS) * (num_buys + num_both)
    assert towers.count("rate") == len(CODECS) * num_both


def test_requests_that_all_lack_events_are_refused(
    sparse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One event of a user is in no test split.
    events = [*one_users("u", "view"), Event("vv", "100", 1, "buy"), Event("www", "101", 1, "rate")]
    monkeypatch.setattr(load, "load_log", lambda _: log_of(events))
    before = read_artifact(sparse)
    options = options_of(sparse, requests=6, candidates=[5])
    with pytest.raises(DataError, match="none of 6 requests of data synthetic has an event"):
        measure("codec", options)
    assert read_artifact(sparse)[0] == before[0]
