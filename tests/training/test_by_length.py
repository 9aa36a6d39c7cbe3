"""Metrics by length of history: which targets count where, empty buckets, and the plot."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from tests.data.logs import Event
from tests.training.worlds import MODEL, shards_of, tiny_config
from torchrec_kvshare.config import Budget, EvaluationConfig
from torchrec_kvshare.data.splits import TEST
from torchrec_kvshare.errors import MissingExtraError
from torchrec_kvshare.features.schema import UNNAMED_TASK
from torchrec_kvshare.training.by_length import LEAST_BY_BUCKET, by_history_length
from torchrec_kvshare.training.evaluate import Scored, sampled_metrics, score_split
from torchrec_kvshare.training.metrics import Measures, measures_of
from torchrec_kvshare.training.plots import plot_by_length
from torchrec_kvshare.training.ranking import Ranked, RankingSettings, rank_held_out
from torchrec_kvshare.training.run import train_run

BUCKETS = list(LEAST_BY_BUCKET)


def scored_of(num_earlier: list[int], labels: list[int]) -> Scored:
    """Targets of one user each; each positive is before its negative, but for the last."""
    count = len(num_earlier)
    logits = torch.tensor([[[2.0], [1.0]]] * (count - 1) + [[[1.0], [2.0]]])
    order = np.arange(count)
    of_targets = torch.tensor(labels).float().unsqueeze(1)
    return Scored(order, order, np.array(num_earlier), of_targets, logits, (UNNAMED_TASK,))


def test_a_target_counts_in_the_bucket_of_its_earlier_events() -> None:
    bounds = [0, 10, 11, 50, 51, 200, 201, 1000, 1001, 999_999]
    scored = scored_of(bounds, [1] * len(bounds))
    ranked = Ranked(np.array(bounds), np.array([*range(8), 50, 200]), num_items=99)
    found = by_history_length(scored, ranked)
    assert list(found) == ["0-10", "11-50", "51-200", "201-1000", "more"]
    for measures in found.values():
        assert (measures.values["targets"], measures.values["held_out"]) == (2, 2)
    assert [found[bucket].values["HR@10"] for bucket in BUCKETS] == [1, 1, 1, 1, 0]
    assert found["0-10"].values["NDCG@10"] == pytest.approx((1 + 1 / np.log2(3)) / 2)
    assert [found[bucket].values["AUC"] for bucket in ("0-10", "201-1000")] == [1, 1]
    # The last target is after its negative: two of the four pairs are in order.
    assert found["more"].values["GAUC"] == pytest.approx(0.5)


def test_what_a_bucket_cannot_say_has_a_reason() -> None:
    scored = scored_of([3, 20, 20], [0, 1, 1])
    found = by_history_length(scored, Ranked(np.array([20]), np.array([4]), num_items=99))
    short, _, empty, *_ = (found[bucket].to_json() for bucket in BUCKETS)
    assert short == {
        "targets": 1,
        "held_out": 0,
        "AUC": None,
        "GAUC": None,
        "HR@10": None,
        "NDCG@10": None,
        "undefined": {
            **dict.fromkeys(("AUC", "GAUC"), "all 2 labels are negative"),
            **dict.fromkeys(("HR@10", "NDCG@10"), "no user has a held-out item"),
        },
    }
    assert (empty["targets"], empty["undefined"]["AUC"]) == (0, "there is no target")
    assert found["11-50"].undefined == {}


def test_lengths_count_the_whole_log_where_the_model_reads_less() -> None:
    events = [Event("u", f"{100 + time % 9}", time) for time in range(70)]
    events += [Event("vv", f"{100 + time % 7}", time) for time in range(12)]
    shards = shards_of(events)
    assert max(history.window.max_history for history in shards.schema.histories) == 8
    scored = score_split(lambda batch: batch.labels, shards, TEST, 2)
    ranked = rank_held_out(lambda batch: batch.labels, shards, RankingSettings())
    assert scored.num_earlier.tolist() == [*range(63, 70), *range(11, 12)]
    assert ranked.num_earlier.tolist() == [69, 11]
    found = by_history_length(scored, ranked)
    assert [found[bucket].values["targets"] for bucket in BUCKETS] == [0, 1, 7, 0, 0]
    taken = scored.take(np.array([0, 1, 2, 3, 4, 5, 6]))
    assert found["51-200"].values["AUC"] == sampled_metrics(taken).values["AUC"]


# --- the plot


def drawn_measures(factor: float) -> dict[str, Measures]:
    return {
        bucket: measures_of(
            {
                "targets": 1234,
                "held_out": 7,
                "AUC": 0.5 + factor * index,
                "GAUC": 0.6,
                "HR@10": "no user has a held-out item",
                "NDCG@10": 0.1,
            }
        )
        for index, bucket in enumerate(BUCKETS)
    }


def test_the_plot_has_a_line_for_each_model(tmp_path: Path) -> None:
    models = {"causal": drawn_measures(0.1), "none": drawn_measures(0.05)}
    paths = tmp_path / "one.png", tmp_path / "both.png"
    plot_by_length(paths[0], {"causal": models["causal"]})
    plot_by_length(paths[1], models)
    one, both = map(imread, paths)
    assert one.shape == both.shape
    assert one.shape[1] > 3 * one.shape[0]  # Four panels side by side.
    blue, orange = ((31, 119, 180), (255, 127, 14))
    assert has_color(one, blue)
    assert has_color(both, blue)
    assert not has_color(one, orange)
    assert has_color(both, orange)


def has_color(picture: Any, color: tuple[int, int, int]) -> bool:
    near = np.abs(picture[:, :, :3] * 255 - np.array(color)) < 2
    return bool(near.all(axis=2).any())


def test_without_matplotlib_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingExtraError, match=r"drawing plots needs the extra \[plots\]"):
        plot_by_length(tmp_path / "plot.png", {"causal": drawn_measures(0.1)})


# --- a run


def run_with(folder: Path, **changes: Any) -> dict[str, Any]:
    """Train the plain DLRM and count popularity; return ``metrics.json``."""
    budget = Budget("tiny", epochs=1, max_users=12, baselines=["none", "popularity"])
    model = {**vars(MODEL), "history": "none"}
    train_run(tiny_config(folder, budget=budget, model=type(MODEL)(**model), **changes))
    return json.loads((folder / "metrics.json").read_text())


def test_a_run_writes_metrics_by_length_of_all_its_models_and_a_plot(tmp_path: Path) -> None:
    metrics = run_with(tmp_path / "run", split="leave_one_out")
    by_length = metrics["by_history_length"]
    assert list(by_length) == list(metrics["test"]) == ["none", "popularity"]
    for buckets in by_length.values():
        assert list(buckets) == BUCKETS
        assert sum(found["targets"] for found in buckets.values()) == 12
        # One test event of each user, ranked where it is positive.
        assert 0 < sum(found["held_out"] for found in buckets.values()) <= 12
        assert buckets["more"]["undefined"]["AUC"] == "there is no target"
    assert imread(tmp_path / "run" / "history_length.png").ndim == 3
    data = metrics["data"]
    assert (data["split"], data["events"]["test split"]) == ("leave_one_out", 12)
    assert 0 < data["own_positive_share"] < 1
    assert 0 <= data["tied_share"] < 1


def test_a_run_without_matplotlib_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level(logging.INFO):
        metrics = run_with(
            tmp_path / "run", evaluation=EvaluationConfig(candidates=9, seen="include")
        )
    assert caplog.text.count("drawing plots needs the extra [plots]") == 1
    assert not (tmp_path / "run" / "history_length.png").exists()
    # Of ten items in a ranking each is among the first ten.
    undefined = metrics["test"]["none"]["undefined"]
    assert list(undefined) == ["HR@10", "HR@50", "HR@200"]
