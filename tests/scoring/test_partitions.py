"""Files of requests become files of answers: complete, resumable, shared by processes."""

import fcntl
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet as parquet
import pytest

from tests.processes import ForkedPython
from tests.worlds import (
    HEAD_DIM,
    MAX_HISTORY,
    NUM_HEADS,
    NUM_PLANES,
    PAGE_BYTES,
    PAGE_SIZE,
    PROBABILITY_TOLERANCE,
    ROOT,
    SCHEMA,
    draw_raw,
    make_dlrm,
)
from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.pages import PagePool
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.data.requests import in_partitions
from torchrec_kvshare.errors import ConfigError, DataError, KVShareError, MissingExtraError
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.scoring.files import Counts, score_lines
from torchrec_kvshare.scoring.partitions import (
    BEGUN,
    COUNTS,
    Partition,
    ScoringSettings,
    begin,
    partitions_of,
    score_partitions,
    total,
)

Json = dict[str, Any]

NUM_USERS, REQUESTS_PER_USER = 7, 3
SETTINGS = ScoringSettings(
    batch_requests=4, history_order="refuse", capacity_bytes=20 * PAGE_BYTES, deterministic=False
)


def new_engine(num_pages: int = 20, seed: int = 3) -> Engine:
    pool = PagePool(num_pages * PAGE_BYTES, PAGE_SIZE, NUM_PLANES, NUM_HEADS, HEAD_DIM)
    return Engine(RankingModel(make_dlrm(seed)).eval(), SCHEMA, KVStore([KVCache(pool)]))


def grown(user: int) -> list[Json]:
    """Requests of one user whose history grows, all of them inside one window."""
    raw = draw_raw(MAX_HISTORY, 4, seed=user)
    lengths = (MAX_HISTORY - 2, MAX_HISTORY - 1, MAX_HISTORY)
    return [
        raw
        | {"request_id": f"{user}-{length}", "user_id": f"user {user}"}
        | {"history": {name: cells[:length] for name, cells in raw["history"].items()}}
        for length in lengths
    ]


def all_requests() -> list[Json]:
    return [raw for user in range(NUM_USERS) for raw in grown(user)]


def write_jsonl(folder: Path, parts: Sequence[Sequence[Json]]) -> None:
    folder.mkdir()
    for number, part in enumerate(parts):
        lines = "".join(json.dumps(raw) + "\n" for raw in part)
        (folder / f"part-{number}.jsonl").write_text(lines)


@pytest.fixture
def requests(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "requests", in_partitions(all_requests(), 3))
    return tmp_path / "requests"


def score(
    requests: Path, output: Path, engine: Engine | None = None, settings: ScoringSettings = SETTINGS
) -> list[Partition]:
    """Score what is left, as the pipeline does."""
    engine = new_engine() if engine is None else engine
    partitions = partitions_of(str(requests), output)
    begin(output, engine.model_version, settings, partitions)
    return [*score_partitions(engine, partitions, settings)]


def bytes_by_name(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def answers_of(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def num_computed(engine: Engine) -> float:
    """Events that the engine has encoded."""
    assert engine.store is not None
    return engine.store.metrics.snapshot().value("events", source="computed")


def uncached(raws: Sequence[Json]) -> list[Json]:
    engine = Engine(RankingModel(make_dlrm(3)).eval(), SCHEMA, None)
    return [*score_lines(engine, map(json.dumps, raws), batch_requests=1)]


# --- what is answered


def test_every_partition_is_answered_in_order_without_what_depends_on_the_hour(
    requests: Path, tmp_path: Path
) -> None:
    scored = score(requests, tmp_path / "out")
    assert sorted(one.answers.name for one in scored) == [f"part-{n}.jsonl" for n in range(3)]
    for one in scored:
        raws = [json.loads(line) for line in one.requests.read_text().splitlines()]
        for answer, expected in zip(answers_of(one.answers), uncached(raws), strict=True):
            assert list(answer) == ["request_id", "scores", "model_version"]
            assert answer["request_id"] == expected["request_id"]
            assert answer["scores"] == pytest.approx(expected["scores"], abs=PROBABILITY_TOLERANCE)


def test_a_user_with_a_growing_history_costs_one_prefill() -> None:
    """Requests of one batch were encoded together, so each encoded its whole history."""
    engine = new_engine()
    counts = Counts()
    assert len([*score_lines(engine, all_requests(), 4, counts=counts)]) == 21
    assert dict(counts.by_status) == {"miss": NUM_USERS, "partial": 2 * NUM_USERS}
    assert num_computed(engine) == NUM_USERS * MAX_HISTORY  # as many as users have in the end


def test_requests_with_one_history_share_one_prefill_across_batches() -> None:
    raws = [grown(user)[-1] for user in range(NUM_USERS) for _ in range(3)]
    counts = Counts()
    assert len([*score_lines(new_engine(), raws, 2, counts=counts)]) == 21
    # A batch of two that begins a user is two misses of one prefill; the others find it.
    assert set(counts.by_status) == {"miss", "hit"}
    engine = new_engine()
    [*score_lines(engine, raws, 2)]
    assert num_computed(engine) == NUM_USERS * MAX_HISTORY


def test_no_kv_goes_from_one_partition_to_the_next(tmp_path: Path) -> None:
    """Scores would depend in their last bits on where a run was killed."""
    write_jsonl(tmp_path / "requests", [grown(1), grown(1)])
    score(tmp_path / "requests", tmp_path / "out")
    one, other = (tmp_path / "out" / COUNTS / f"part-{n}.jsonl.json" for n in range(2))
    assert one.read_bytes() == other.read_bytes()
    assert json.loads(one.read_text())["counts"]["by_status"] == {"miss": 1, "partial": 2}


def test_more_users_than_pages_hold_are_scored_within_the_capacity(
    requests: Path, tmp_path: Path
) -> None:
    engine = new_engine(num_pages=4)  # A window takes three.
    scored = score(requests, tmp_path / "out", engine)
    assert engine.store is not None
    assert engine.store.caches[0].held_bytes <= 4 * PAGE_BYTES
    roomy = score(requests, tmp_path / "roomy")
    for one, other in zip(scored, roomy, strict=True):
        for answer, expected in zip(
            answers_of(one.answers), answers_of(other.answers), strict=True
        ):
            assert answer["scores"] == pytest.approx(expected["scores"], abs=PROBABILITY_TOLERANCE)


def test_bad_requests_are_answered_in_place_and_counted(tmp_path: Path) -> None:
    good = grown(1)[0]
    (tmp_path / "part.jsonl").write_text(
        "no JSON\n" + json.dumps(good) + "\n\n" + json.dumps(good | {"time": -1}) + "\n"
    )
    [one] = score(tmp_path / "part.jsonl", tmp_path / "out")
    first, second, third = answers_of(one.answers)
    assert first["request_id"] is None
    assert first["error"]["type"] == third["error"]["type"] == "RequestError"
    assert second["request_id"] == third["request_id"] == good["request_id"]
    counts = total([one])
    assert (counts.scored, counts.refused) == (1, 2)


# --- Parquet


def write_parquet(path: Path, raws: Sequence[Json]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([*raws]), path)


def test_parquet_is_answered_with_the_scores_of_json_lines(tmp_path: Path) -> None:
    raws = all_requests()
    raws[3] = raws[3] | {"time": None}
    raws[5] = raws[5] | {"request_id": None}
    write_parquet(tmp_path / "part.parquet", raws)
    write_jsonl(tmp_path / "lines", [raws])
    [one] = score(tmp_path / "part.parquet", tmp_path / "out")
    [other] = score(tmp_path / "lines", tmp_path / "other")
    table = parquet.read_table(one.answers)
    assert table.column_names == ["request_id", "scores", "model_version", "error"]
    for row, answer in zip(table.to_pylist(), answers_of(other.answers), strict=True):
        assert {key: value for key, value in row.items() if value is not None} == {
            key: value for key, value in answer.items() if value is not None
        } or row["request_id"] == raws[3]["request_id"]
    refused = table.to_pylist()[3]
    assert refused["scores"] is refused["model_version"] is None
    assert refused["error"]["type"] == "RequestError"
    assert "the request has no 'time'" in refused["error"]["message"]


def test_scores_by_task_have_a_list_for_each_task_in_parquet(tmp_path: Path) -> None:
    """The column of scores was one list of numbers, and scores by task were not."""
    schema = replace(SCHEMA, tasks=("like", "love"))
    raws = all_requests()[:4]
    raws[2] = raws[2] | {"time": None}
    write_parquet(tmp_path / "part.parquet", raws)
    engine = Engine(RankingModel(make_dlrm(3, schema=schema)).eval(), schema, None)
    [one] = score(tmp_path / "part.parquet", tmp_path / "out", engine)
    expected = [*score_lines(engine, map(json.dumps, raws), batch_requests=4)]
    rows = parquet.read_table(one.answers).to_pylist()
    assert rows[2]["scores"] is None
    for number in (0, 1, 3):
        assert rows[number]["scores"].keys() == {"like", "love"}
        assert rows[number]["scores"] == expected[number]["scores"]


def test_a_null_in_parquet_is_a_key_that_is_not_given(tmp_path: Path) -> None:
    """A column that only some requests have is null in the rows of the others."""
    first, second = grown(1)[:2]
    second = second | {"history": second["history"] | {"first_event": 0}, "report": []}
    write_parquet(tmp_path / "part.parquet", [first | {"report": None}, second])
    [row, _] = parquet.read_table(tmp_path / "part.parquet").to_pylist()
    assert row["report"] is row["history"]["first_event"] is None
    [one] = score(tmp_path / "part.parquet", tmp_path / "out")
    assert total([one]).refused == 0


def test_integer_request_ids_are_text_in_parquet(tmp_path: Path) -> None:
    write_parquet(tmp_path / "part.parquet", [grown(1)[0] | {"request_id": 7}])
    [one] = score(tmp_path / "part.parquet", tmp_path / "out")
    assert parquet.read_table(one.answers)["request_id"].to_pylist() == ["7"]


def test_many_scores_are_written_in_several_groups_of_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchrec_kvshare.scoring.answer_files.GROUP_SCORES", 10)
    write_parquet(tmp_path / "part.parquet", all_requests())
    [one] = score(tmp_path / "part.parquet", tmp_path / "out")
    assert parquet.ParquetFile(one.answers).num_row_groups == 7  # of 12 scores
    assert parquet.read_table(one.answers).num_rows == NUM_USERS * REQUESTS_PER_USER


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_parquet(tmp_path / "part.parquet", grown(1))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"needs the extra \[parquet\]"):
        score(tmp_path / "part.parquet", tmp_path / "out")
    assert not (tmp_path / "out" / "part.parquet").exists()


# --- resuming


KILLED = """
import sys
from pathlib import Path
from tests.scoring.test_partitions import score
score(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_run_that_is_killed_and_resumed_writes_the_same_bytes(tmp_path: Path) -> None:
    raws = [raw | {"user_id": f"{raw['user_id']}-{n}"} for n in range(9) for raw in all_requests()]
    write_jsonl(tmp_path / "requests", in_partitions(raws, 12))
    output, whole = tmp_path / "out", tmp_path / "whole"
    process = ForkedPython(
        [sys.executable, "-W", "ignore", "-c", KILLED, str(tmp_path / "requests"), str(output)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    # Killed in the middle of its third partition or a later one.
    deadline = time.monotonic() + 120
    while len([*output.glob("part-*")]) < 2 or not [*output.glob(".part-*")]:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(1e-3)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = {path.name: path.stat().st_mtime_ns for path in output.glob("part-*")}
    assert 2 <= len(finished) < 12
    score(tmp_path / "requests", output)
    score(tmp_path / "requests", whole)
    assert bytes_by_name(output) == bytes_by_name(whole)
    assert {name: (output / name).stat().st_mtime_ns for name in finished} == finished


def test_a_finished_partition_is_not_scored_again(requests: Path, tmp_path: Path) -> None:
    [first, *_] = score(requests, tmp_path / "out")
    before = bytes_by_name(tmp_path / "out")
    written = first.answers.stat().st_mtime_ns
    scored = score(requests, tmp_path / "out")
    assert len(scored) == 3
    assert first.answers.stat().st_mtime_ns == written
    assert bytes_by_name(tmp_path / "out") == before
    assert total(scored).scored == NUM_USERS * REQUESTS_PER_USER


def test_new_partitions_are_scored_beside_finished_ones(requests: Path, tmp_path: Path) -> None:
    score(requests, tmp_path / "out")
    (requests / "part-3.jsonl").write_text(json.dumps(grown(11)[0]) + "\n")
    assert len(score(requests, tmp_path / "out")) == 4
    assert len(answers_of(tmp_path / "out" / "part-3.jsonl")) == 1


def test_a_partition_that_cannot_be_read_leaves_the_finished_ones(
    requests: Path, tmp_path: Path
) -> None:
    (requests / "part-9.parquet").write_bytes(b"PAR1 is how it begins")
    with pytest.raises(DataError, match=r"part-9\.parquet cannot be read"):
        score(requests, tmp_path / "out")
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {BEGUN, COUNTS, "part-0.jsonl", "part-1.jsonl", "part-2.jsonl"}
    (requests / "part-9.parquet").unlink()
    assert len(score(requests, tmp_path / "out")) == 3


def test_processes_share_the_partitions_and_wait_for_each_other(
    requests: Path, tmp_path: Path
) -> None:
    output, whole = tmp_path / "out", tmp_path / "whole"
    [first, *_] = partitions_of(str(requests), output)
    output.mkdir()
    # Another process has the first partition, and dies before it is finished.
    with (output / f".{first.answers.name}.new").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        held.write("half an answ")
        held.flush()
        (output / BEGUN).write_text(
            json.dumps({"model_version": new_engine().model_version} | vars(SETTINGS))
        )
        scored: list[Partition] = []
        thread = threading.Thread(target=lambda: scored.extend(score(requests, output)))
        thread.start()
        while len([*output.glob("part-*")]) < 2:
            time.sleep(1e-3)
        assert not first.is_finished
    thread.join(timeout=60)
    assert [one.answers.name for one in scored] == ["part-1.jsonl", "part-2.jsonl", "part-0.jsonl"]
    score(requests, whole)
    assert bytes_by_name(output / COUNTS) == bytes_by_name(whole / COUNTS)
    assert [*output.glob(".*")] == []
    for one in scored:
        assert one.answers.read_bytes() == (whole / one.answers.name).read_bytes()


# --- what is refused


def test_another_model_or_other_settings_are_refused(requests: Path, tmp_path: Path) -> None:
    score(requests, tmp_path / "out")
    before = bytes_by_name(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"was begun with model_version .*set another output"):
        score(requests, tmp_path / "out", new_engine(seed=4))
    other = ScoringSettings(
        batch_requests=5, history_order="sort", capacity_bytes=7, deterministic=True
    )
    for name, value in vars(other).items():
        changed = ScoringSettings(**(vars(SETTINGS) | {name: value}))
        with pytest.raises(ConfigError, match=f"was begun with {name} .*; it is {value} now"):
            score(requests, tmp_path / "out", settings=changed)
    assert bytes_by_name(tmp_path / "out") == before


def test_requests_that_changed_since_they_were_answered_are_refused(
    requests: Path, tmp_path: Path
) -> None:
    score(requests, tmp_path / "out")
    with (requests / "part-1.jsonl").open("a") as file:
        file.write(json.dumps(grown(1)[0]) + "\n")
    with pytest.raises(DataError, match=r"part-1\.jsonl has changed since it was answered: remove"):
        score(requests, tmp_path / "out")
    (tmp_path / "out" / "part-1.jsonl").unlink()
    score(requests, tmp_path / "out")
    assert len(answers_of(tmp_path / "out" / "part-1.jsonl")) == 7


def test_a_folder_with_other_files_is_refused(requests: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(ConfigError, match=r"holds other files: it has no _begun\.json"):
        score(requests, tmp_path / "out")


def test_answers_are_where_their_requests_are_below_the_folder(tmp_path: Path) -> None:
    for day in ("day=1", "day=2"):
        (tmp_path / "in" / day).mkdir(parents=True)
        (tmp_path / "in" / day / "part.jsonl").write_text(json.dumps(grown(1)[0]) + "\n")
    score(tmp_path / "in", tmp_path / "out")
    assert len(answers_of(tmp_path / "out" / "day=2" / "part.jsonl")) == 1


@pytest.mark.parametrize(
    ("files", "requests", "output", "error", "message"),
    [
        ((), "in", "out", DataError, "in holds no file"),
        ((), "in/none.jsonl", "out", ConfigError, r"none\.jsonl'; there is no such file"),
        (("a.csv",), "in", "out", ConfigError, r"a\.csv'; \.jsonl and \.parquet are allowed"),
        (("a.jsonl",), "in", "in/out", ConfigError, "out', inside requests="),
        (
            ("a.jsonl",),
            "",
            "out",
            ConfigError,
            "requests is ''; a file, a folder, a glob",
        ),
    ],
)
def test_files_that_cannot_be_partitions_are_refused(
    tmp_path: Path,
    files: tuple[str, ...],
    requests: str,
    output: str,
    error: type[KVShareError],
    message: str,
) -> None:
    (tmp_path / "in").mkdir()
    for name in files:
        (tmp_path / "in" / name).write_text("")
    with pytest.raises(error, match=message):
        partitions_of(requests and str(tmp_path / requests), tmp_path / output)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_jsonl(tmp_path / folder, [[]])
    both = [str(tmp_path / "a"), str(tmp_path / "b")]
    with pytest.raises(ConfigError, match=r"both would be answered in .*out/part-0\.jsonl"):
        partitions_of(both, tmp_path / "out")
