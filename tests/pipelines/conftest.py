"""A run on a tiny world, its artifact and requests for it, made once and never changed."""

from pathlib import Path

import pytest

from tests.pipelines.commands import TINY, WORLD, run_pipeline


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    run_pipeline("train", *WORLD, *TINY, f"output={folder}")
    return folder


@pytest.fixture(scope="session")
def artifact(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "artifact"
    run_pipeline("export", f"run={trained}", f"output={folder}", "threads=1")
    return folder


@pytest.fixture(scope="session")
def requests_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("requests") / "requests.jsonl"
    run_pipeline("make_requests", *WORLD, "count=30", "candidates=12", f"output={path}")
    return path
