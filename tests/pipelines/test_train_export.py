"""From a config to a trained run and an artifact, and the demo's two tables."""

import json
import math
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.folders import write_folder
from tests.pipelines.commands import TINY, WORLD, composed, run_pipeline, spawn_pipeline
from torchrec_kvshare.config import SyntheticData, TrainConfig, checked
from torchrec_kvshare.data.dataset import in_canonical_order
from torchrec_kvshare.data.load import load_log
from torchrec_kvshare.errors import ArtifactError, ConfigError, DataError
from torchrec_kvshare.training.run import load_data

SHOWN_METRICS = ["AUC", "GAUC", "NE"]
ARTIFACT_FILES = ["golden.json", "ids.npy", "manifest.json", "model.pt", "schema.json"]


def metrics_of(run: Path) -> dict[str, dict[str, Any]]:
    return json.loads((run / "metrics.json").read_text())["test"]


def test_a_run_evaluates_the_model_and_its_baselines(trained: Path) -> None:
    metrics = metrics_of(trained)
    assert list(metrics) == ["causal", "none", "popularity"]
    for values in metrics.values():
        # Sixty items at most: each of them is among the first 200.
        assert list(values.pop("undefined")) == ["HR@200"]
        assert values.pop("HR@200") is None
        assert {*SHOWN_METRICS, "calibration", "MRR@1", "NDCG@200"} < set(values)
        assert all(math.isfinite(value) for value in values.values())


def test_train_and_export_in_new_processes(trained: Path, tmp_path: Path) -> None:
    run, artifact = tmp_path / "run", tmp_path / "artifact"
    finished = spawn_pipeline("train", *WORLD, *TINY, f"output={run}")
    assert finished.returncode == 0, finished.stderr
    assert f"wrote {run}/metrics.json; TensorBoard: {run}/tensorboard" in finished.stdout
    # Another process, the same seed: the same metrics to the last digit.
    assert metrics_of(run) == metrics_of(trained)
    exported = spawn_pipeline("export", f"run={run}", f"output={artifact}")
    assert exported.returncode == 0, exported.stderr
    assert f"wrote {artifact}" in exported.stdout
    assert sorted(path.name for path in artifact.iterdir()) == ARTIFACT_FILES
    # Hydra wrote no folders or log files.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "run"]


def test_an_artifact_has_its_files_and_the_schema_of_its_run(trained: Path, artifact: Path) -> None:
    assert sorted(path.name for path in artifact.iterdir()) == ARTIFACT_FILES
    for name in ("schema.json", "ids.npy"):
        assert (trained / name).read_bytes() == (artifact / name).read_bytes()


def test_an_artifact_is_never_overwritten(trained: Path, artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="exists; an artifact is never overwritten"):
        run_pipeline("export", f"run={trained}", f"output={artifact}")


def test_a_run_without_a_history_cannot_be_exported(tmp_path: Path) -> None:
    run_pipeline("train", *WORLD, *TINY, "history=none", f"output={tmp_path / 'run'}")
    assert list(metrics_of(tmp_path / "run")) == ["none", "popularity"]
    with pytest.raises(ConfigError, match="was trained with history=none; there is no K/V"):
        run_pipeline("export", f"run={tmp_path / 'run'}", f"output={tmp_path / 'artifact'}")
    assert not (tmp_path / "artifact").exists()


def test_a_folder_that_is_no_run_cannot_be_exported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no finished run: it has no metrics\.json"):
        run_pipeline("export", f"run={tmp_path}", f"output={tmp_path / 'artifact'}")


def test_a_run_resumes_in_its_folder_and_another_run_is_refused_there(
    trained: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    before = (run / "metrics.json").read_bytes()
    run_pipeline("train", *WORLD, *TINY, f"output={run}")
    assert (run / "metrics.json").read_bytes() == before
    with pytest.raises(ConfigError, match=r"another config; these differ: \['negatives"):
        run_pipeline("train", *WORLD, *TINY, f"output={run}", "negatives=2")


# --- a user's own log

COLUMNS = (
    "data=interactions",
    "data.columns.user=uid",
    "data.columns.item=film title",
    "data.columns.time=when",
    "data.columns.action=stars",
    "data.columns.event_attributes=[remark]",
    "data.columns.user_floats=[age]",
    "data.columns.request_floats=[stay]",
    "data.columns.event_floats=[price,stay]",
    "data.columns.item_attributes=[kinds]",
    "data.columns.item_floats=[price]",
    "data.columns.user_attributes=[city]",
    "data.columns.list_separator=;",
)


def write_csv(path: Path) -> None:
    """Films bought by 12 users, rated and remarked on; one row in fifty has no user."""
    chance = random.Random(5)
    lines = ["when,film title,uid,stars,kinds,price,city,remark,age,stay"]
    for second in range(400):
        film = chance.randrange(25)
        user = "" if second % 50 == 49 else f"u{chance.randrange(12)}"
        kinds = ";".join(f"k{kind}" for kind in range(film % 3))
        when = f"2024-03-{1 + second // 15:02d}T10:{second % 60:02d}:00Z"
        lines.append(
            f"{when},film {film},{user},{chance.randint(1, 5)},{kinds},{film}.5,city {user},"
            f"{('x', 'y', '')[second % 3]},{20 + film},{chance.random():.2f}"
        )
    path.write_text("\n".join(lines))


def test_a_users_own_csv_is_trained_exported_and_scored(tmp_path: Path) -> None:
    """A process gets ``data.label=stars>=4`` without quotes, as a shell passes it."""
    write_csv(tmp_path / "log.csv")
    data = (*COLUMNS, f"data.path={tmp_path / 'log.csv'}", "data.label=stars>=4")
    made = spawn_pipeline(
        "make_requests", *data, "count=9", "candidates=8", f"output={tmp_path / 'requests'}"
    )
    assert made.returncode == 0, made.stderr
    assert f"wrote 9 requests to {tmp_path / 'requests'}" in made.stdout
    # In this process Hydra needs the quotes.
    quoted = (*COLUMNS[:-1], 'data.columns.list_separator=";"', data[-2], 'data.label="stars>=4"')
    run_pipeline("train", *quoted, *TINY, f"output={tmp_path / 'run'}")
    (tmp_path / "log.csv").unlink()
    run_pipeline("export", f"run={tmp_path / 'run'}", f"output={tmp_path / 'artifact'}")
    run_pipeline(
        "score",
        f"artifact={tmp_path / 'artifact'}",
        f"requests={tmp_path / 'requests'}",
        f"output={tmp_path / 'answers'}",
    )
    schema = json.loads((tmp_path / "artifact" / "schema.json").read_text())
    assert schema["event_attributes"] == ["action", "remark"]
    assert (schema["context"], schema["item_attributes"]) == (["city"], ["kinds"])
    assert schema["event_floats"] == ["price", "stay"]
    assert (schema["context_floats"], schema["item_floats"]) == (["age", "stay"], ["price"])
    vocabularies = schema["vocabulary_by_column"]
    assert sorted(vocabularies["events.action"]["examples"]) == ["1", "2", "3", "4", "5"]
    assert sorted(vocabularies["events.remark"]["examples"]) == ["x", "y"]
    answers = [json.loads(line) for line in (tmp_path / "answers").read_text().splitlines()]
    assert [len(answer["scores"]) for answer in answers] == [8] * 9


def test_a_label_rule_decides_what_is_positive(tmp_path: Path) -> None:
    write_csv(tmp_path / "log.csv")
    columns = (*COLUMNS[:-1], f"data.path={tmp_path / 'log.csv'}")
    config = checked(composed("train", *columns, 'data.label="stars>=4"'), TrainConfig)
    dataset = load_data(config).read([0])
    actions = dataset.log.event_attributes["action"]
    liked = [code for code, stars in enumerate(actions.ids) if int(stars) >= 4]
    assert dataset.labels[:, 0].tolist() == np.isin(actions.codes, liked).tolist()
    assert 0 < dataset.labels.mean() < 1
    assert dataset.log.report.dropped == {"no user": 8}


def test_a_prepared_log_is_trained_exported_and_scored(tmp_path: Path) -> None:
    """Requests made of the folder are those made of the log."""
    data = SyntheticData(num_users=40, events_per_user=40, num_items=60, num_categories=6)
    folder = write_folder(load_log(data), tmp_path / "folder", 3)
    prepared = ("data=prepared", f"data.path={folder}")
    run, requests = tmp_path / "run", tmp_path / "requests"
    run_pipeline("train", *prepared, *TINY, "budget.max_users=null", f"output={run}", "workers=1")
    run_pipeline("export", f"run={run}", f"output={tmp_path / 'artifact'}")
    asked = ("count=9", "candidates=8")
    run_pipeline("make_requests", *prepared, *asked, f"output={requests}")
    of_log = tmp_path / "requests_of_the_log"
    run_pipeline("make_requests", *WORLD, *asked, f"output={of_log}")
    assert requests.read_text() == of_log.read_text()
    answers = tmp_path / "answers"
    files = (f"requests={requests}", f"output={answers}")
    run_pipeline("score", f"artifact={tmp_path / 'artifact'}", *files)
    scores = [json.loads(line)["scores"] for line in answers.read_text().splitlines()]
    assert [len(found) for found in scores] == [8] * 9


def test_requests_of_a_split_are_of_its_test_events(tmp_path: Path) -> None:
    asked = (*WORLD, "count=30", "candidates=7", "seed=2")
    output = tmp_path / "requests"
    run_pipeline("make_requests", *asked, "split=leave_one_out", f"output={output}")
    found = [json.loads(line) for line in output.read_text().splitlines()]
    data = SyntheticData(num_users=40, events_per_user=40, num_items=60, num_categories=6)
    log = in_canonical_order(load_log(data))
    last_time = dict(zip(log.users.codes.tolist(), log.time.tolist(), strict=True))
    for request in found:
        assert request["time"] == last_time[log.users.ids.index(str(request["user_id"]))]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    write_csv(tmp_path / "log.csv")
    columns = [f"data.path={tmp_path / 'log.csv'}", "data=interactions", "data.columns.user=uuid"]
    with pytest.raises(DataError, match=r"column 'uuid' is not in .*log\.csv; it has: when, film"):
        run_pipeline("train", *columns, *TINY, f"output={tmp_path / 'run'}")


# --- the demo


def test_the_demo_prints_its_two_tables_and_what_to_open(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pipeline(
        "demo",
        *WORLD,
        "budget=smoke",
        "budget.eval_users=10",
        "requests=11",
        "candidates=9",
        "threads=1",
        f"output={tmp_path / 'demo'}",
    )
    printed = capsys.readouterr().out
    quality, speed = printed.split("\n\n")[-4], printed.split("\n\n")[-2]
    rows = [line.split() for line in quality.splitlines()]
    assert rows[0] == ["model", *SHOWN_METRICS]
    assert [row[0] for row in rows[1:]] == ["causal", "none", "popularity"]
    found = metrics_of(tmp_path / "demo" / "train")
    for name, *values in rows[1:]:
        assert [float(value) for value in values] == [
            pytest.approx(found[name][metric], abs=6e-5) for metric in SHOWN_METRICS
        ]
    paths = [line.replace(" ms", "").split() for line in speed.splitlines()]
    assert paths[0][:5] == ["path", "requests", "p50", "mean", "throughput"]
    assert [path[:2] for path in paths[1:]] == [
        ["uncached_merged", "10"],
        ["request_shared", "11"],
        ["cross_request_hit", "11"],
    ]
    # The last column is the difference between paths.
    assert max(float(path[-1]) for path in paths[1:]) <= 5e-6
    assert "Test split of synthetic, every model on the same budget:" in printed
    assert "11 requests, 9 candidates each:" in printed
    for _, num_requests, _, mean_ms, per_second, *_ in paths[1:]:
        assert float(mean_ms) * float(per_second.removesuffix("/s")) == pytest.approx(1e3, rel=0.2)
        assert int(num_requests) > 0
    wrote, plot, curves, serve, page = printed.splitlines()[-5:]
    assert wrote == f"wrote {tmp_path / 'demo'}"
    drawn = Path(plot.removeprefix("plot of the latencies: "))
    assert drawn.read_bytes().startswith(b"\x89PNG")
    assert [*Path(curves.split("--logdir ")[1]).rglob("events.out.*")]
    assert serve.endswith(f" serve artifact={tmp_path / 'demo' / 'artifact'}")
    assert page == "    and open http://127.0.0.1:8000/"
    assert sorted(path.name for path in (tmp_path / "demo" / "artifact").iterdir()) == (
        ARTIFACT_FILES
    )


def test_the_demo_refuses_too_many_candidates_before_it_trains(tmp_path: Path) -> None:
    """The mistake showed after training, minutes later."""
    with pytest.raises(ConfigError, match="candidates is 61; the catalogue has"):
        run_pipeline("demo", *WORLD, "candidates=61", f"output={tmp_path / 'demo'}")
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ("{kind: hash, num_rows: 9}", "ids.item_id.kind is 'hash'; one of ('vocabulary', 'hashed'"),
        ("{kind: hashed, num_rows: 0}", "ids.item_id.num_rows is 0; it must be at least 1"),
        ("{kind: hashed, rows: 9}", "rows is not a key of this config; did you mean num_rows?"),
    ],
)
def test_kinds_and_numbers_of_ids_are_checked_by_column(
    tmp_path: Path, ids: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        run_pipeline("train", f"+ids={{item_id: {ids}}}", f"output={tmp_path / 'run'}")
