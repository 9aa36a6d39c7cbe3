"""Several labels of a row: one tower, a head for each task, and scores by task wherever they go."""

import csv
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist

from tests.training.on_ranks import trainer_of
from tests.training.worlds import BUDGET, MODEL, tiny_config
from tests.worlds import PROBABILITY_TOLERANCE
from torchrec_kvshare.config import (
    CacheConfig,
    Columns,
    InteractionsData,
    PrepareConfig,
    PreparedData,
    TrainConfig,
)
from torchrec_kvshare.data.dataset import build_dataset
from torchrec_kvshare.data.draws import Draws
from torchrec_kvshare.data.prepare import prepare
from torchrec_kvshare.data.requests import make_requests
from torchrec_kvshare.data.shards import Shards
from torchrec_kvshare.data.splits import TRAIN
from torchrec_kvshare.data.targets import build_batch, sample_negatives, windows_of
from torchrec_kvshare.errors import ArtifactError, ConfigError, DataError
from torchrec_kvshare.export.artifact import file_sha256, read_artifact, write_manifest
from torchrec_kvshare.export.exporter import export_model, load_artifact
from torchrec_kvshare.export.open import new_engine
from torchrec_kvshare.features.parse import parse_request
from torchrec_kvshare.features.schema import load_schema
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.encoded_user import encode_user
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.scoring.files import score_file
from torchrec_kvshare.training.checkpoints import checkpoints_of, load_progress
from torchrec_kvshare.training.evaluate import _scored, model_scorer, sampled_metrics
from torchrec_kvshare.training.objective import Objective, ObjectiveSettings
from torchrec_kvshare.training.ranks import joined_ranks
from torchrec_kvshare.training.run import load_data, load_trained, new_model, train_run

NUM_ITEMS = 12
TASKS = ("like", "love")
RULES = {"like": "stars>=3", "love": "stars==5"}


def stars_of(item: int) -> int:
    """Even items are liked; of these every third is loved."""
    if item % 2:
        return 1 + item % 3 // 2
    return 5 if item % 3 == 0 else 3 + item % 4 // 2


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> InteractionsData:
    rng = np.random.default_rng(3)
    path = tmp_path_factory.mktemp("log") / "stars.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["user", "item", "time", "stars"])
        for user in range(24):
            for number, item in enumerate(rng.integers(0, NUM_ITEMS, 40).tolist()):
                rows.writerow([user, item, 1_700_000_000 + 60 * number, stars_of(item)])
    columns = Columns(user="user", item="item", time="time")
    return InteractionsData(path=str(path), columns=columns, label=RULES)


def tasks_config(output: Path, data: Any, **changes: Any) -> TrainConfig:
    budget = replace(BUDGET, epochs=3, baselines=["none", "popularity"])
    given = {"budget": budget, "negatives": 0, "data": data} | changes
    return tiny_config(output, **given)


@pytest.fixture(scope="module")
def run(log: InteractionsData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_run(tasks_config(folder, log, keep_best="GAUC"))
    return folder


@pytest.fixture(scope="module")
def shards(log: InteractionsData, run: Path) -> Shards:
    return load_data(tasks_config(run, log))


# --- training


def test_each_task_is_learnt_and_has_its_metrics(run: Path) -> None:
    found = json.loads((run / "metrics.json").read_text())
    tested = found["test"]["causal"]
    assert tested["AUC/like"] > 0.9
    assert tested["AUC/love"] > 0.9
    named = [f"{name}/{task}" for task in TASKS for name in ("AUC", "GAUC", "NE", "calibration")]
    assert [name for name in tested if "@" not in name and name != "undefined"] == named
    assert [name for name in tested if name.startswith("HR@1")] == ["HR@1", "HR@10"]
    # The popularity of an item is that of the task.
    popular = found["test"]["popularity"]
    assert popular["AUC/like"] > 0.9
    assert popular["AUC/love"] > 0.9
    of_bucket = found["by_history_length"]["causal"]["11-50"]
    assert [name for name in of_bucket if name.startswith(("AUC", "GAUC"))] == [
        *("AUC/like", "GAUC/like", "AUC/love", "GAUC/love")
    ]


def test_curves_and_the_best_epoch_are_by_task(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard" / "causal"))
    events.Reload()
    tags = events.Tags()["scalars"]
    wanted = {f"valid/{name}/{task}" for name in ("AUC", "GAUC", "NE") for task in TASKS}
    assert wanted <= set(tags)
    curve = [event.value for event in events.Scalars("valid/GAUC/like")]
    best = load_progress(checkpoints_of(run / "causal")[-1])["best"]
    assert best["value"] == pytest.approx(max(curve))


def test_the_loss_is_the_weighted_sum_of_the_tasks(shards: Shards) -> None:
    dataset = shards.read([0])
    targets = np.flatnonzero(dataset.split == TRAIN)[:40]
    batch = build_batch(dataset, windows_of(dataset, targets), dataset.item[targets][:, None], None)
    assert batch.labels.tolist() == dataset.labels[targets].tolist()
    model = new_model(shards.schema, replace(MODEL, user_state=False), "causal", seed=2).eval()
    objective = Objective(
        model,
        ObjectiveSettings(task_weights={"love": 0.25}),
        histories=["history"],
        tasks=TASKS,
        negatives=0,
    )
    loss, (_, logits, labels) = objective(batch)
    assert logits.shape == labels.shape == (40, 2)
    cross_entropy = torch.nn.BCEWithLogitsLoss()
    expected = [cross_entropy(logits[:, task], labels[:, task]) for task in range(2)]
    assert float(loss.detach()) == pytest.approx(float(expected[0] + expected[1] / 4), rel=1e-6)


def test_torchrecs_pipeline_trains_all_tasks_as_a_plain_loop_does(
    shards: Shards, tmp_path: Path
) -> None:
    with joined_ranks(torch.device("cpu")) as ranks:
        plain, piped = (trainer_of("causal", shards, tmp_path, ranks) for _ in range(2))
        epoch = plain.stream.epoch(0)
        batches = [epoch[index] for index in range(3)]
        expected = []
        for batch in batches:
            plain.optimizer.zero_grad()
            loss, _ = plain.sharded(batch)
            loss.backward()
            plain.optimizer.step()
            expected.append(loss.item())
        pipeline = TrainPipelineSparseDist(
            piped.sharded,
            piped.optimizer,
            torch.device("cpu"),
            execute_all_batches=True,
            pipeline_postproc=True,
        )
        left = iter(batches)
        found = [pipeline.progress(left)[0].item() for _ in batches]
    assert pipeline._pipelined_modules
    assert found == expected


def test_a_negative_is_negative_for_every_task(shards: Shards) -> None:
    dataset = shards.read([0])
    targets = np.flatnonzero((dataset.split == TRAIN) & (dataset.labels.sum(1) == 2))[:5]
    negatives = sample_negatives(dataset, targets, 3, Draws(1))
    candidates = np.concatenate([dataset.item[targets][:, None], negatives], axis=1)
    batch = build_batch(dataset, windows_of(dataset, targets), candidates, None)
    assert batch.labels.view(5, 4, 2).tolist() == [[[1, 1]] + [[0, 0]] * 3] * 5


def test_the_first_task_ranks(shards: Shards) -> None:
    dataset = shards.read([0])
    assert shards.schema.tasks == TASKS
    assert np.array_equal(dataset.is_positive, dataset.labels[:, 0] > 0)
    positive = shards.num_positive.sum(0)
    assert positive.tolist() == dataset.labels[dataset.split == TRAIN].sum(0).tolist()
    assert positive[0] > positive[1] > 0


def test_a_run_with_baselines_and_sampled_negatives_of_a_prepared_log_is_that_of_the_log(
    log: InteractionsData, tmp_path: Path
) -> None:
    prepare(PrepareConfig(str(tmp_path / "prepared"), log, num_shards=1))
    changes = {
        "budget": replace(BUDGET, epochs=1, baselines=["pooled", "sasrec", "popularity"]),
        "negatives": 2,
        "task_weights": {"love": 0.5},
    }
    ours = train_run(tasks_config(tmp_path / "a", log, **changes))
    prepared = PreparedData(path=str(tmp_path / "prepared"))
    assert train_run(tasks_config(tmp_path / "b", prepared, **changes)) == ours
    # The order of tasks is a part of what a folder was prepared with.
    turned = replace(log, label=dict(reversed(RULES.items())))
    with pytest.raises(ConfigError, match="which was begun with another data config"):
        prepare(PrepareConfig(str(tmp_path / "prepared"), turned, num_shards=1))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"task_weights": {"buy": 1.0}},
            r"task_weights has ['buy']; the tasks of interactions are",
        ),
        (
            {"label": {"like": "stars>=3", "any": "stars>=1"}},
            "no event with label 0 for task 'any'",
        ),
    ],
)
def test_what_cannot_work_names_the_task(
    log: InteractionsData, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    data = replace(log, label=changes.pop("label", RULES))
    with pytest.raises((ConfigError, DataError), match=re.escape(said)):
        train_run(tasks_config(tmp_path / "run", data, **changes))
    assert not (tmp_path / "run").exists()


# --- labels that are missing for some tasks


def with_gaps(log: InteractionsData, folder: Path) -> InteractionsData:
    """The same rows, of which a third has no label for the first task and others none for love."""
    with Path(log.path).open() as file:
        _, *rows = csv.reader(file)
    folder.mkdir(exist_ok=True)
    with (folder / "gaps.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["user", "item", "time", "like", "love"])
        for number, (user, item, time, stars) in enumerate(rows):
            like, love = ("" if number % 3 == left else stars for left in (0, 1))
            writer.writerow([user, item, time, like, love])
    rules = {"like": "like>=3", "love": "love==5"}
    return replace(log, path=str(folder / "gaps.csv"), label=rules)


@pytest.fixture(scope="module")
def gaps(log: InteractionsData, tmp_path_factory: pytest.TempPathFactory) -> InteractionsData:
    return with_gaps(log, tmp_path_factory.mktemp("gaps"))


@pytest.fixture(scope="module")
def gappy(gaps: InteractionsData, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    return load_data(tasks_config(tmp_path_factory.mktemp("unused"), gaps))


def test_a_row_keeps_the_labels_that_it_has(shards: Shards, gappy: Shards) -> None:
    """A row without a label for one of the tasks was dropped whole."""
    found, expected = gappy.read([0]).labels, shards.read([0]).labels
    assert len(found) == len(expected) == 24 * 40
    for task, labels in enumerate(found.T):
        has_label = ~np.isnan(labels)
        assert has_label.sum() == 640
        assert np.array_equal(labels[has_label], expected[has_label, task])
    assert not np.isnan(found).all(1).any()
    assert "960 of 960 rows kept; dropped: none" in gappy.report
    assert "rows without a label: like 320, love 320" in gappy.report
    labelled = gappy.num_positive.sum(0) + gappy.num_negative.sum(0)
    in_training = found[gappy.read([0]).split == TRAIN]
    assert labelled.tolist() == (~np.isnan(in_training)).sum(0).tolist()


@pytest.mark.parametrize("num_negatives", [0, 2])
def test_a_row_without_a_label_has_no_loss_for_the_task_and_its_own_for_the_other(
    gappy: Shards, num_negatives: int
) -> None:
    """Nor have its negatives: they would be negatives of a target that may be one too."""
    dataset = gappy.read([0])
    targets = np.flatnonzero(dataset.split == TRAIN)[:40]
    negatives = sample_negatives(dataset, targets, num_negatives, Draws(1))
    candidates = np.concatenate([dataset.item[targets][:, None], negatives], axis=1)
    batch = build_batch(dataset, windows_of(dataset, targets), candidates, None)
    model = new_model(gappy.schema, MODEL, "causal", seed=2).eval()
    settings = ObjectiveSettings(task_weights={"love": 0.25})
    names = {"histories": ["history"], "tasks": TASKS, "negatives": num_negatives}
    loss, (_, logits, labels) = Objective(model, settings, **names)(batch)
    per_target = labels.view(40, 1 + num_negatives, 2)
    missing = np.isnan(dataset.labels[targets])
    assert 0 < missing.sum() < missing.size
    assert per_target.isnan().all(1).numpy().tolist() == missing.tolist()
    assert per_target.isnan().any(1).numpy().tolist() == missing.tolist()
    expected = 0.0
    for task, weight in enumerate((1.0, 0.25)):
        counts = ~labels[:, task].isnan()
        summed = torch.nn.BCEWithLogitsLoss(reduction="sum")
        expected += weight * float(summed(logits[counts, task], labels[counts, task]))
    assert float(loss.detach()) == pytest.approx(expected / len(labels), rel=1e-6)


def test_metrics_of_a_task_are_those_of_its_labelled_targets(gappy: Shards) -> None:
    dataset = gappy.read([0])
    scored = _scored(dataset, np.arange(300), torch.randn(300, 3, 2))
    found = sampled_metrics(scored)
    for number, task in enumerate(TASKS):
        labelled = scored.take(np.flatnonzero(~np.isnan(dataset.labels[:300, number])))
        assert len(labelled.keys) == 200
        alone = labelled._replace(
            labels=labelled.labels[:, number : number + 1],
            logits=labelled.logits[:, :, number : number + 1],
            tasks=(task,),
        )
        expected = sampled_metrics(alone)
        # Sums of float32 in another order; AUCs were equal, NE was off by 6e-10.
        assert {name: found.values[name] for name in expected.values} == pytest.approx(
            expected.values, rel=1e-6
        )
        assert all(value is not None for value in expected.values.values())


@pytest.mark.parametrize("negatives", [0, 2])
def test_a_prepared_log_with_missing_labels_trains_as_the_log(
    gaps: InteractionsData, tmp_path: Path, negatives: int
) -> None:
    prepare(PrepareConfig(str(tmp_path / "prepared"), gaps, num_shards=1))
    budget = replace(BUDGET, epochs=1, baselines=["none", "popularity"])
    changes = {"budget": budget, "negatives": negatives}
    ours = train_run(tasks_config(tmp_path / "a", gaps, **changes))
    prepared = PreparedData(path=str(tmp_path / "prepared"))
    assert train_run(tasks_config(tmp_path / "b", prepared, **changes)) == ours
    assert ours is not None
    if not negatives:  # The popularity of an item is that of the rows that have a label.
        assert ours["popularity"]["AUC/like"] > 0.9
        assert ours["popularity"]["AUC/love"] > 0.9


def test_a_log_made_by_hand_needs_a_label_of_each_row(gappy: Shards) -> None:
    log = gappy.read([0]).log
    labels = {task: one.copy() for task, one in log.labels.items()}
    for one in labels.values():
        one[7] = np.nan
    with pytest.raises(
        DataError, match=r"row 7 has no label for any of the tasks \['like', 'love'"
    ):
        build_dataset(replace(log, labels=labels), gappy.schema.histories)
    labels["like"][7] = 2.0
    with pytest.raises(DataError, match=r"a label is 2\.0; 0, 1 and NaN for none are allowed"):
        build_dataset(replace(log, labels=labels), gappy.schema.histories)


# --- offline = served


@pytest.fixture(scope="module")
def artifact(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, schema = load_trained(run)
    folder = tmp_path_factory.mktemp("artifacts") / "torchscript"
    export_model(RankingModel(model).eval(), schema, folder)
    assert load_schema(folder).tasks == TASKS
    return folder


def offline_scores(run: Path, shards: Shards, raw: dict[str, Any]) -> Tensor:
    """Return what training's scorer says of a request: probabilities [N, tasks]."""
    dataset = shards.read([0])
    user = dataset.log.users.ids.index(str(raw["user_id"]))
    [event, *_] = np.flatnonzero((dataset.event_user == user) & (dataset.time == raw["time"]))
    items = [dataset.log.items.ids.index(str(item)) for item in raw["candidates"]["item_id"]]
    windows = windows_of(dataset, np.array([event]))
    batch = build_batch(dataset, windows, np.array([items]), None)
    return torch.sigmoid(model_scorer(load_trained(run)[0])(batch).double())


@pytest.mark.parametrize("cache", ["off", "memory"])
def test_served_scores_are_those_of_training_for_every_task(
    run: Path, artifact: Path, shards: Shards, tmp_path: Path, cache: str
) -> None:
    raws = list(make_requests(shards, count=6, num_candidates=5, seed=1))
    asked = raws * 2  # With a cache the second time hits.
    (tmp_path / "requests").write_text("\n".join(map(json.dumps, asked)))
    engine = new_engine(load_artifact(artifact), CacheConfig(name=cache))
    counts = score_file(engine, tmp_path / "requests", tmp_path / "answers", batch_requests=4)
    assert counts.by_status["hit"] >= (6 if cache == "memory" else 0)
    answers = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    for raw, answer in zip(asked, answers, strict=True):
        assert list(answer["scores"]) == list(TASKS)
        found = torch.tensor(list(answer["scores"].values()), dtype=torch.float64).T
        expected = offline_scores(run, shards, raw)
        torch.testing.assert_close(found, expected, rtol=0.0, atol=PROBABILITY_TOLERANCE)
        assert float((expected[:, 0] - expected[:, 1]).abs().max()) > 0.01


def test_an_encoded_user_and_a_request_without_candidates_answer_by_task(
    artifact: Path, shards: Shards
) -> None:
    engine = new_engine(load_artifact(artifact))
    [raw] = make_requests(shards, count=1, num_candidates=4, seed=2)
    [expected] = engine.rank([parse_request(raw, engine.schema)])
    found = encode_user(engine, raw).predict(raw["candidates"])
    assert isinstance(found, dict)
    assert list(found) == list(TASKS)
    assert expected.ranking_scores == expected.scores["like"]
    for task, scores in found.items():
        assert scores == pytest.approx(expected.scores[task], rel=0.0, abs=PROBABILITY_TOLERANCE)
    [nothing] = engine.rank([parse_request(raw | {"candidates": {"item_id": []}}, engine.schema)])
    assert nothing.to_json()["scores"] == {"like": [], "love": []}


def test_golden_requests_are_checked_for_every_task(artifact: Path, tmp_path: Path) -> None:
    manifest, _ = read_artifact(artifact)
    broken = tmp_path / "artifact"
    broken.mkdir()
    for name in ("model.pt", "schema.json", "ids.npy"):
        (broken / name).symlink_to(artifact / name)
    golden = json.loads((artifact / "golden.json").read_text())
    golden[3]["scores"]["love"][1] += 1e-4
    (broken / "golden.json").write_text(json.dumps(golden))
    digests = manifest.sha256_by_file | {"golden.json": file_sha256(broken / "golden.json")}
    write_manifest(broken, replace(manifest, sha256_by_file=digests))
    with pytest.raises(ArtifactError, match=r"candidate 1 of golden request .* for task love here"):
        load_artifact(broken)


def test_a_model_with_another_number_of_logits_is_refused(run: Path, shards: Shards) -> None:
    """Its second logit was left out, or one logit was taken for all tasks."""
    model, schema = load_trained(run)
    [raw] = make_requests(shards, count=1, num_candidates=4, seed=2)
    engine = Engine(RankingModel(model).eval(), replace(schema, tasks=("like",)), None)
    said = r"the model gives logits \[4, 2\]; \[4, 1\] are needed, .* of the tasks \['like'\]"
    with pytest.raises(ConfigError, match=said):
        engine.rank([parse_request(raw, engine.schema)])
