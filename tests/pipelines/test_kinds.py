"""Runs with other histories than one causal history, from training to scores."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.pipelines.commands import TINY, WORLD, run_pipeline
from tests.worlds import PROBABILITY_TOLERANCE

Json = dict[str, Any]

# Overrides of each run; two layers with a sliding window of 8 events see 15 together.
LONGER, HSTU = "longer of two tokens", "sliding hstu of two histories"
RUNS = {
    LONGER: (
        *("history=longer", "model.merge=4", "model.recent=16", "model.candidate_tokens=2"),
        "model.table_dim=24",
    ),
    HSTU: (
        *("history=hstu", "model.window=sliding", "model.max_history=8"),
        "+model.histories.buys=[buy]",
    ),
}
SMALLER = ("budget.baselines=[]", "budget.max_users=12", "budget.eval_users=5")
NUM_REQUESTS = 9
NUM_EVENTS = 11  # no window moves when one more comes


class Made(NamedTuple):
    """A run and its artifact."""

    run: Path
    artifact: Path

    @property
    def manifest(self) -> Json:
        return json.loads((self.artifact / "manifest.json").read_text())


Make = Callable[[str], Made]


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Train and export a run by name, once."""
    made_by_name: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in made_by_name:
            folder = tmp_path_factory.mktemp("kinds")
            made = Made(folder / "run", folder / "artifact")
            run_pipeline("train", *WORLD, *TINY, *SMALLER, *RUNS[name], f"output={made.run}")
            given = (f"run={made.run}", f"output={made.artifact}")
            run_pipeline("export", *given, "threads=1")
            made_by_name[name] = made
        return made_by_name[name]

    return make


@pytest.fixture(scope="session")
def early(requests_file: Path) -> list[Json]:
    """Requests of some users when they have a few events."""
    raws = [json.loads(line) for line in requests_file.read_text().splitlines()]
    raw_by_user = {raw["user_id"]: raw for raw in raws if len(raw["history"]["time"]) > NUM_EVENTS}
    assert len(raw_by_user) >= NUM_REQUESTS
    return [
        with_events(raw, *range(NUM_EVENTS)) for raw in list(raw_by_user.values())[:NUM_REQUESTS]
    ]


@pytest.fixture(scope="session")
def late(early: list[Json]) -> list[Json]:
    """Requests of the same users after they viewed the oldest item again."""
    requests = [with_events(raw, *range(NUM_EVENTS), 0) for raw in early]
    for raw in requests:
        raw["history"]["time"][-1] = raw["history"]["time"][-2]
        raw["history"]["action"][-1] = "view"
    return requests


def with_events(raw: Json, *rows: int) -> Json:
    history = {name: [cells[row] for row in rows] for name, cells in raw["history"].items()}
    return raw | {"history": history}


def score(artifact: Path, raws: list[Json], folder: Path, *overrides: str) -> list[Json]:
    requests, output = folder / "requests.jsonl", folder / "answers.jsonl"
    requests.write_text("".join(json.dumps(raw) + "\n" for raw in raws))
    given = (f"artifact={artifact}", f"requests={requests}", f"output={output}", "threads=1")
    run_pipeline("score", *given, *overrides)
    return [json.loads(line) for line in output.read_text().splitlines()]


@pytest.mark.parametrize("name", list(RUNS))
def test_cached_and_uncached_scores_agree_while_histories_grow(
    made: Make, early: list[Json], late: list[Json], tmp_path: Path, name: str
) -> None:
    artifact = made(name).artifact
    raws = [*early, *early, *late]
    batches = f"batch_requests={NUM_REQUESTS}"
    uncached = score(artifact, raws, tmp_path, batches, "cache=off")
    cached = score(artifact, raws, tmp_path, batches, "cache.items=1000")
    assert [answer["request_id"] for answer in cached] == [raw["request_id"] for raw in raws]
    for one, other in zip(cached, uncached, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=PROBABILITY_TOLERANCE)
    statuses = [answer["cache"]["status"] for answer in cached]
    assert statuses == [s for s in ("miss", "hit", "partial") for _ in range(NUM_REQUESTS)]
    for answer, raw in zip(cached[-NUM_REQUESTS:], early, strict=True):
        # Closed groups of four events; or all events but the new one, and all bought ones.
        num_bought = raw["history"]["action"].count("buy") if name == HSTU else 0
        kept, new = (NUM_EVENTS + num_bought, 1) if name == HSTU else (8, 4)
        assert [answer["cache"][f"{key}_events"] for key in ("cached", "computed")] == [kept, new]
    # Scores differ by candidate, and change with the new event.
    assert all(len(set(answer["scores"])) > 1 for answer in uncached)
    for before, after in zip(uncached[:NUM_REQUESTS], uncached[-NUM_REQUESTS:], strict=True):
        assert before["scores"] != pytest.approx(after["scores"], abs=PROBABILITY_TOLERANCE)


def test_a_manifest_of_longer_says_what_was_trained(made: Make) -> None:
    manifest = made(LONGER).manifest
    spec = {"kind": "longer", "dim": 16, "num_tokens": 2, "window": 0, "merge": 4, "recent": 16}
    widths = {"token_dim": 24, "output_dim": 24}
    assert (spec | widths).items() <= manifest["encoder"].items()
    # Eight groups of 32 events, and the four globals.
    assert manifest["towers"]["history"]["max_rows"] == 12
    assert list(json.loads((made(LONGER).run / "metrics.json").read_text())["test"]) == ["longer"]


def test_a_manifest_of_a_sliding_window_says_what_is_seen_and_what_is_read(made: Make) -> None:
    manifest = made(HSTU).manifest
    spec = {"kind": "hstu", "dim": 16, "num_tokens": 1, "window": 8}
    assert spec.items() <= manifest["encoder"].items()
    # Two layers of 8 events see 15; 24 lets the window start at a block boundary.
    rows = {name: tower["max_rows"] for name, tower in manifest["towers"].items()}
    assert rows == {"history": 24, "buys": 24}
    schema = json.loads((made(HSTU).artifact / "schema.json").read_text())
    assert [(one["name"], one["actions"]) for one in schema["histories"]] == [
        ("history", []),
        ("buys", ["buy"]),
    ]


@pytest.mark.parametrize("name", list(RUNS))
def test_what_was_exported_may_be_cached_and_extended(made: Make, name: str) -> None:
    audit = made(name).manifest["audit"]
    assert (audit["scope"], audit["append"], audit["failures"]) == ("cross_request", "exact", [])
