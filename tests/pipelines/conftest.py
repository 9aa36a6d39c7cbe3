"""A run on a tiny world, its artifact and requests for it, made once and never changed."""

from pathlib import Path

import pytest

from tests.once import make_once, shared_folder
from tests.pipelines.commands import TINY, WORLD, run_pipeline


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_folder(tmp_path_factory, "pipelines")


@pytest.fixture(scope="session")
def trained(folder: Path) -> Path:
    return make_once(
        folder / "run", lambda run: run_pipeline("train", *WORLD, *TINY, f"output={run}")
    )


@pytest.fixture(scope="session")
def artifact(folder: Path, trained: Path) -> Path:
    given = (f"run={trained}", "threads=1")
    return make_once(
        folder / "artifact", lambda made: run_pipeline("export", *given, f"output={made}")
    )


@pytest.fixture(scope="session")
def requests_file(folder: Path) -> Path:
    given = (*WORLD, "count=30", "candidates=12")
    return make_once(
        folder / "requests.jsonl",
        lambda path: run_pipeline("make_requests", *given, f"output={path}"),
    )
