"""The audit of a trained run."""

import json
from pathlib import Path

import pytest

from tests.pipelines.commands import run_pipeline
from torchrec_kvshare.errors import ConfigError

PERTURBED = [
    *("candidates", "request_time", "context"),
    *("batchmates", "batch_order", "later_events"),
]
TENSORS = ["history/layer_0", "history/layer_1", "scores"]


def test_an_audit_prints_its_table_and_its_verdict_is_the_manifests(
    trained: Path, artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pipeline("audit", f"run={trained}", f"output={tmp_path / 'audit'}", "threads=1")
    *table, verdict, where = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["perturbed", *TENSORS]
    rows = {name: cells for name, *cells in (line.split() for line in table[1:])}
    assert list(rows) == PERTURBED
    assert [path.name for path in (tmp_path / "audit").iterdir()] == ["audit.json"]
    audit = json.loads((tmp_path / "audit" / "audit.json").read_text())
    for name, cells in rows.items():
        moved = audit["moved"][name]
        assert cells == [f"{moved[tensor]:.1e}" if tensor in moved else "-" for tensor in TENSORS]
    assert verdict == "K/V may be used across: cross_request; append: exact"
    assert where == f"wrote {tmp_path / 'audit' / 'audit.json'}"
    manifest = json.loads((artifact / "manifest.json").read_text())
    verdicts = [
        {k: v for k, v in one.items() if k != "moved"} for one in (audit, manifest["audit"])
    ]
    assert (
        verdicts[0]
        == verdicts[1]
        == {
            "scope": "cross_request",
            "append": "exact",
            "failures": [],
        }
    )
    assert list(audit["moved"]) == list(manifest["audit"]["moved"]) == PERTURBED


def test_other_requests_lead_to_the_same_verdict(trained: Path, tmp_path: Path) -> None:
    for seed in (0, 7):
        run_pipeline("audit", f"run={trained}", f"output={tmp_path / str(seed)}", f"seed={seed}")
    first, other = (json.loads((tmp_path / seed / "audit.json").read_text()) for seed in ("0", "7"))
    assert (first["scope"], first["append"]) == (other["scope"], other["append"])
    # Scores depend on the request's time, by another distance for other requests.
    assert first["moved"]["request_time"]["scores"] != other["moved"]["request_time"]["scores"]


def test_a_folder_without_a_run_cannot_be_audited(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no finished run"):
        run_pipeline("audit", f"run={tmp_path}", f"output={tmp_path / 'audit'}")
    assert list(tmp_path.iterdir()) == []
