"""The scenario compares runtimes that agree, and refuses one that does not."""

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.pipelines.commands import run_pipeline
from torchrec_kvshare.benchmark.run import measure
from torchrec_kvshare.benchmark.scenarios.runtimes import RuntimesOptions
from torchrec_kvshare.errors import ConfigError, ParityError
from torchrec_kvshare.export.exporter import RUNTIMES, TORCHSCRIPT
from torchrec_kvshare.features.schema import FeatureSchema
from torchrec_kvshare.model.ranking import RankingFunctions

pytestmark = pytest.mark.optimised

SIZES = ["dim=8", "num_layers=1", "num_heads=2", "histories=[5,16]", "candidates=[2,3]"]


RUNTIMES_COMPARED = ("eager", "eager, deterministic", TORCHSCRIPT)


@pytest.fixture(autouse=True)
def torchscript_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another runtime would take minutes to compile; the comparison is the same."""
    for runtime in set(RUNTIMES) - {TORCHSCRIPT}:
        monkeypatch.delitem(RUNTIMES, runtime)


def test_every_runtime_is_compared_with_eager(tmp_path: Path) -> None:
    run_pipeline("benchmark", "scenario=runtimes", *SIZES, f"output={tmp_path / 'out'}")
    records = json.loads((tmp_path / "out" / "results.json").read_text())["records"]
    by_case: dict[tuple[Any, ...], dict[str, float]] = {}
    for record in records:
        case = record["case"]
        key = (case["path"], case.get("history"), case.get("candidates"), case["runtime"])
        by_case.setdefault(key, {})[record["metric"]] = record["value"]
    compared = [("prefill", history, None) for history in (5, 16)]
    compared += [("score", history, number) for history in (5, 16) for number in (2, 3)]
    expected = {(*case, runtime) for case in compared for runtime in RUNTIMES_COMPARED}
    assert set(by_case) == expected | {("export", None, None, TORCHSCRIPT)}
    costs = by_case.pop(("export", None, None, TORCHSCRIPT))
    assert set(costs) == {"export_s", "load_s", "artifact_bytes"}
    assert costs["artifact_bytes"] > 4 * 10_000 * 8  # The table of items alone.
    for (*case, _), figures in by_case.items():
        eager = by_case[(*case, "eager")]["latency_ms"]
        assert figures["ratio_to_eager"] == pytest.approx(eager / figures["latency_ms"])


class OffByALittle:
    """A runtime whose K/V differs a little from the model's."""

    def __init__(self, model: RankingFunctions) -> None:
        self.model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def prefill(self, features: Any) -> list[Tensor]:
        return [kv + 1e-4 for kv in self.model.prefill(features)]


def test_a_runtime_that_differs_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = RUNTIMES[TORCHSCRIPT]

    def load(folder: Path, schema: FeatureSchema, encoder: dict[str, Any]) -> Any:
        return OffByALittle(right.load(folder, schema, encoder))

    monkeypatch.setitem(RUNTIMES, TORCHSCRIPT, right._replace(load=load))
    options = RuntimesOptions(
        histories=[32], candidates=[2], encoders=["longer"], dim=8, num_layers=1, num_heads=2
    )
    with pytest.raises(ParityError, match="prefill of torchscript differs by"):
        measure("runtimes", options)


def test_no_history_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"histories is \[\]; at least one is needed"):
        measure("runtimes", RuntimesOptions(histories=[]))
