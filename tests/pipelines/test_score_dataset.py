"""Files of requests scored by one process, by two under torchrun, and by Ray's actors."""

import json
import shutil
import sys
from pathlib import Path

import pytest

from tests.once import make_once
from tests.pipelines.commands import WORLD, run_all, run_pipeline
from tests.training.on_ranks import torchrun
from torchrec_kvshare.errors import ArtifactError, ConfigError, MissingExtraError

REFUSED = 3
NUM_REQUESTS, NUM_PARTITIONS = 40, 5


@pytest.fixture(scope="module")
def requests(folder: Path) -> Path:
    """Partitions of requests, one of them with a line that is no request."""

    def make(path: Path) -> None:
        sizes = (f"count={NUM_REQUESTS}", "candidates=7", f"partitions={NUM_PARTITIONS}")
        run_pipeline("make_requests", *WORLD, *sizes, f"output={path}")
        with (path / "part-00002.jsonl").open("a") as file:
            file.write("no JSON\n")

    return make_once(folder / "partitions", make)


@pytest.fixture(scope="module")
def expected(artifact: Path, requests: Path, folder: Path) -> Path:
    """The answers of one process."""

    def make(path: Path) -> None:
        with pytest.raises(SystemExit) as ended:
            run_pipeline("score_dataset", *given(artifact, requests, path), "threads=1")
        assert ended.value.code == REFUSED

    return make_once(folder / "answered", make)


def given(artifact: Path, requests: Path, output: Path) -> tuple[str, ...]:
    return f"artifact={artifact}", f"requests={requests}", f"output={output}"


def bytes_by_name(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_users_requests_are_in_one_partition_oldest_first(requests: Path) -> None:
    users: set[str] = set()
    total = 0
    for path in requests.iterdir():
        lines = [line for line in path.read_text().splitlines() if line != "no JSON"]
        order = [(str(raw["user_id"]), raw["time"]) for raw in map(json.loads, lines)]
        of_file = dict.fromkeys(user for user, _ in order)
        assert order == [one for user in of_file for one in sorted(order) if one[0] == user]
        assert users.isdisjoint(of_file)
        users |= {*of_file}
        total += len(order)
    assert total == NUM_REQUESTS


def test_a_finished_data_set_has_the_exit_status_and_the_summary_of_its_first_run(
    artifact: Path, requests: Path, expected: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bytes_by_name(expected)
    for _ in range(2):
        with pytest.raises(SystemExit) as ended:
            run_pipeline("score_dataset", *given(artifact, requests, expected), "threads=1")
        assert ended.value.code == REFUSED
        printed = capsys.readouterr().out
        assert f"scored {NUM_REQUESTS}, refused 1; cache: {{" in printed
        assert printed.endswith(f"unknown ids: none\nwrote {expected}\n")
    assert bytes_by_name(expected) == before
    [last] = (expected / "part-00002.jsonl").read_text().splitlines()[-1:]
    assert json.loads(last)["error"]["type"] == "RequestError"


def test_without_refused_requests_the_status_is_0(
    artifact: Path, requests: Path, expected: Path, tmp_path: Path
) -> None:
    good = [str(requests / f"part-{number:05d}.jsonl") for number in (0, 4)]
    overrides = (f"artifact={artifact}", f"requests=[{','.join(good)}]", "threads=1")
    run_pipeline("score_dataset", *overrides, f"output={tmp_path / 'out'}")
    for path in map(Path, good):
        answers = (tmp_path / "out" / path.name).read_bytes()
        assert answers == (expected / path.name).read_bytes()


def test_two_processes_under_torchrun_write_what_one_writes(
    artifact: Path, requests: Path, expected: Path, tmp_path: Path
) -> None:
    arguments = given(artifact, requests, tmp_path / "out")
    ended = torchrun("-m", "pipelines.score_dataset", *arguments)
    # torchrun has an exit status of its own, and shows those of its processes.
    assert ended.returncode == 1
    assert "exitcode  : 3" in ended.stderr
    assert ended.stdout.count(f"wrote {tmp_path / 'out'}") == 1
    assert bytes_by_name(tmp_path / "out") == bytes_by_name(expected)


def test_actors_on_ray_write_what_one_process_writes(
    artifact: Path, requests: Path, expected: Path, tmp_path: Path
) -> None:
    """As many actors as cores waited forever for Ray Data's tasks that read and write."""
    broken = shutil.copytree(requests, tmp_path / "broken")
    (broken / "part.parquet").write_text("no Parquet")
    # Two of two cores on the smallest machine that runs the suite.
    commands = (
        (*given(artifact, requests, tmp_path / "none"), "actors=10000"),
        (*given(artifact, broken, tmp_path / "out"), "actors=2"),
    )
    refused, scored = run_all(
        tmp_path, [" ".join(("score_dataset", *arguments)) for arguments in commands]
    )
    assert refused.status == 2, refused
    assert "error: actors is 10000; the Ray cluster has" in refused.stderr
    assert scored.status == 2, scored
    assert "part.parquet cannot be read: it is text; expected a Parquet file" in scored.stderr
    # A partition that cannot be read does not keep the others from being scored.
    assert bytes_by_name(tmp_path / "out") == bytes_by_name(expected)


def test_without_ray_the_extra_is_named(
    artifact: Path, requests: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"scoring on Ray needs the extra \[ray\]"):
        run_pipeline("score_dataset", *given(artifact, requests, tmp_path / "out"), "actors=1")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (("requests=nowhere.jsonl",), ConfigError, r"requests has 'nowhere\.jsonl'; there is no"),
        (("artifact=nowhere",), ArtifactError, r"nowhere is no artifact: it has no manifest\.json"),
        (("batch_requests=0",), ConfigError, "batch_requests is 0; it must be at least 1"),
        (("capacity_bytes=10",), ConfigError, "capacity_bytes is 10"),
        (("actors=0",), ConfigError, "actors is 0; it must be at least 1"),
        (("history_order=drop",), ConfigError, "history_order is 'drop'; one of .'refuse', 'sort'"),
    ],
)
def test_a_value_that_cannot_work_is_an_error_before_anything_is_written(
    artifact: Path,
    requests: Path,
    tmp_path: Path,
    overrides: tuple[str, ...],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        run_pipeline("score_dataset", *given(artifact, requests, tmp_path / "out"), *overrides)
    assert [*tmp_path.iterdir()] == []
