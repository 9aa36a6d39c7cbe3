"""Figures that are not finite: reported as such, never lost and never NaN in JSON."""

import json
import math
from pathlib import Path
from typing import NoReturn

from tests.nan_worlds import bad_candidates, good_raw, poisoned_dlrm
from tests.worlds import SCHEMA, make_dlrm, parse_all
from torchrec_kvshare.benchmark.comparison import compare_paths
from torchrec_kvshare.benchmark.results import Record, write_results
from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.verify.audit import CROSS_REQUEST, audit_model


def refuse_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} stands in JSON")


def test_results_have_null_for_a_figure_that_is_no_number(tmp_path: Path) -> None:
    figures = [1.5, math.nan, math.inf]
    records = [Record("memory", {"path": "p"}, "p99_ms", value, unit="ms") for value in figures]
    text = write_results(tmp_path, records, "command", seed=0).read_text()
    written = json.loads(text, parse_constant=refuse_constant)["records"]
    assert [record["value"] for record in written] == [1.5, None, None]


def test_an_audit_of_nan_fails_and_is_json() -> None:
    audit = audit_model(RankingModel(poisoned_dlrm(1)).eval(), SCHEMA)
    assert audit.scope != CROSS_REQUEST
    text = json.dumps(audit.to_json(), allow_nan=False)
    assert None in json.loads(text)["moved"]["batchmates"].values()


def test_a_path_that_gives_nan_differs_by_nan() -> None:
    """Python's max lost it: the merged path was said to differ by 0.0."""
    model = RankingModel(make_dlrm(1)).eval()
    pool = PagePool(2**20, 5, *pool_shape(model))
    cached = Engine(model, SCHEMA, KVStore([KVCache(pool)]))
    uncached = Engine(model, SCHEMA, None)
    requests = parse_all([good_raw("a", 3), bad_candidates("b", 3, 1)])
    broken = poisoned_dlrm(1)
    merged, *others = compare_paths(broken, uncached, cached, requests, num_merged=2)
    assert math.isnan(merged.max_score_difference)
    assert all(path.max_score_difference < 1e-5 for path in others)


def pool_shape(model: RankingModel) -> tuple[int, int, int]:
    [tower] = model.collection.towers()
    return tower.kv_shape
