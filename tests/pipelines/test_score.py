"""A file of requests in, a file of answers out: every line is answered, in order."""

import copy
import gc
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.commands import run_pipeline, spawn_pipeline
from tests.worlds import PROBABILITY_TOLERANCE, SCHEMA, make_dlrm
from torchrec_kvshare.errors import ArtifactError, ConfigError
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.scoring.files import score_lines

REFUSED = 3
NUM_REQUESTS, NUM_CANDIDATES = 30, 12
MAX_HISTORY, BLOCK = 32, 8  # events

Json = dict[str, Any]


@pytest.fixture(scope="module")
def good(requests_file: Path) -> list[Json]:
    return [json.loads(line) for line in requests_file.read_text().splitlines()]


Score = Callable[..., list[Json]]


@pytest.fixture(scope="module")
def score(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Score:
    """Return a function that scores lines; ``exit_status`` is the expected one."""

    def answers(lines: list[bytes], *overrides: str, exit_status: int = 0) -> list[Json]:
        folder = tmp_path_factory.mktemp("score")
        requests, output = folder / "requests.jsonl", folder / "answers.jsonl"
        requests.write_bytes(b"".join(line + b"\n" for line in lines))
        given = (f"artifact={artifact}", f"requests={requests}", f"output={output}", *overrides)
        if exit_status:
            with pytest.raises(SystemExit) as ended:
                run_pipeline("score", *given)
            assert ended.value.code == exit_status
        else:
            run_pipeline("score", *given)
        assert sorted(path.name for path in folder.iterdir()) == [output.name, requests.name]
        return [json.loads(line) for line in output.read_text().splitlines()]

    return answers


@pytest.fixture(scope="module")
def uncached(score: Score, good: list[Json]) -> list[Json]:
    """Answers to the good requests without a cache."""
    return score([as_line(request) for request in good], "cache=off")


@pytest.fixture(scope="module")
def whole(good: list[Json]) -> int:
    """Index of a good request with a history long enough to break."""
    return next(i for i, request in enumerate(good) if len(request["history"]["time"]) > 5)


def as_line(request: Json) -> bytes:
    return json.dumps(request).encode()


def changed(request: Json, group: str | None = None, **values: Any) -> Json:
    """Return a copy of a request with other values, at the top or in one of its groups."""
    request = copy.deepcopy(request)
    (request if group is None else request[group]).update(values)
    return request


def assert_same_scores(found: list[Json], expected: list[Json]) -> None:
    assert [a["request_id"] for a in found] == [a["request_id"] for a in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], abs=PROBABILITY_TOLERANCE)


def num_events_read(num_events: int) -> int:
    """Drop blocks of the oldest events until the rest fits the window; return its length."""
    while num_events > MAX_HISTORY:
        num_events -= BLOCK
    return num_events


def statuses(answers: list[Json]) -> list[str]:
    return [answer["cache"]["status"] for answer in answers]


# --- good requests


def test_score_as_a_process_of_its_own_without_the_run(
    trained: Path, requests_file: Path, tmp_path: Path
) -> None:
    requests, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text("no JSON\n" + requests_file.read_text())
    run, artifact = shutil.copytree(trained, tmp_path / "run"), tmp_path / "artifact"
    run_pipeline("export", f"run={run}", f"output={artifact}", "threads=1")
    shutil.rmtree(run)
    ended = spawn_pipeline(
        "score", f"artifact={artifact}", f"requests={requests}", f"output={output}"
    )
    assert ended.returncode == REFUSED, ended.stderr
    assert f"scored {NUM_REQUESTS}, refused 1; cache: {{" in ended.stdout
    assert f"wrote {output}" in ended.stdout
    assert "Traceback" not in ended.stderr
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert ["error" in answer for answer in answers] == [True] + [False] * NUM_REQUESTS


def test_lines_that_wait_for_their_batch_cost_linear_time() -> None:
    """Waiting lines were counted again for each line, so a batch cost quadratic time."""
    engine = Engine(RankingModel(make_dlrm(1)).eval(), SCHEMA, None)

    def seconds(num_lines: int) -> float:
        start = time.process_time()
        answers = [*score_lines(engine, ["no JSON"] * num_lines, batch_requests=num_lines)]
        assert len(answers) == num_lines
        return time.process_time() - start

    gc.disable()  # A collection walks through all objects of the process.
    try:
        small = min(seconds(3_000) for _ in range(5))
        assert min(seconds(12_000) for _ in range(5)) < 8 * small
    finally:
        gc.enable()


def test_an_answer_has_the_one_format(
    score: Score, good: list[Json], uncached: list[Json], artifact: Path
) -> None:
    answers = [*uncached, *score([as_line(request) for request in good])]
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert [answer["request_id"] for answer in answers] == [r["request_id"] for r in good * 2]
    for answer, request in zip(answers, good * 2, strict=True):
        assert list(answer) == ["request_id", "scores", "model_version", "cache"]
        assert len(answer["scores"]) == len(request["candidates"]["item_id"])
        assert all(0 < value < 1 for value in answer["scores"])
        digests = (manifest["model_digest"][:16], manifest["tables_digest"][:16])
        assert answer["model_version"] == "-".join(digests)
        cache = answer["cache"]
        counts = ["cached_events", "computed_events"]
        assert list(cache) == ["status", "reason", *counts, "tier", "staleness_s"]
        assert cache["status"] in ("hit", "partial", "miss", "bypass")
        assert cache["tier"] in ("pages", "host", "disk", "remote", "none")
        read = cache["cached_events"] + cache["computed_events"]
        assert read == num_events_read(len(request["history"]["time"]))


def test_cache_on_and_off_give_the_same_scores(
    score: Score, good: list[Json], uncached: list[Json]
) -> None:
    lines = [as_line(request) for request in good]
    assert {(a["cache"]["status"], a["cache"]["reason"]) for a in uncached} == {
        ("bypass", "cache_off")
    }
    twice = score(lines * 2, "cache=memory")
    assert_same_scores(twice, uncached * 2)
    assert "hit" in statuses(twice)
    # Two layers of 16 floats a key and a value are 256 bytes an event: two pages of 16 events.
    small = score(lines, "cache=memory", "cache.page_size=16", "cache.capacity_bytes=8192")
    assert_same_scores(small, uncached)
    assert "not_admitted" in {answer["cache"]["reason"] for answer in small}


def test_the_same_history_again_is_a_hit(score: Score, good: list[Json], whole: int) -> None:
    first = good[whole]
    again = changed(first, request_id="again", time=first["time"] + 3600)
    edited = changed(first, "history", item_id=[*first["history"]["item_id"][:-1], 5])
    lines = [as_line(request) for request in (first, again, edited, edited)]
    answers = score(lines, "batch_requests=1")
    assert statuses(answers) == ["miss", "hit", "miss", "hit"]
    assert [answer["cache"]["reason"] for answer in answers] == ["cold", "", "edited", ""]
    assert answers[1]["cache"]["tier"] == "pages"
    assert answers[1]["cache"]["computed_events"] == 0
    assert_same_scores(answers, score(lines, "cache=off"))


@pytest.mark.parametrize("batch_requests", [1, 7])
def test_how_many_are_scored_together_does_not_matter(
    score: Score, good: list[Json], uncached: list[Json], batch_requests: int
) -> None:
    lines = [as_line(request) for request in good]
    assert_same_scores(score(lines, f"batch_requests={batch_requests}"), uncached)


def test_columns_that_the_model_does_not_know_are_ignored(
    score: Score, good: list[Json], uncached: list[Json]
) -> None:
    more = changed(changed(good[0], "history", dwell=[1]), weather={"rain": True})
    assert_same_scores(score([as_line(more)]), uncached[:1])


def test_an_empty_file_has_no_answers(score: Score) -> None:
    assert score([]) == []
    assert score([b"", b"   ", b"\t\r"]) == []


def test_kept_items_do_not_change_scores(
    score: Score, good: list[Json], uncached: list[Json]
) -> None:
    lines = [as_line(request) for request in good]
    assert_same_scores(score(lines * 2, "cache.items=1000", "batch_requests=5"), uncached * 2)


# --- deterministic mode


def test_deterministic_mode_refuses_an_artifact_whose_scores_move(
    artifact: Path, requests_file: Path, tmp_path: Path
) -> None:
    """On some processors scores may not move, but scores that move are never written."""
    given = (f"artifact={artifact}", f"requests={requests_file}")
    output = tmp_path / "loose.jsonl"
    ended = spawn_pipeline("score", *given, "deterministic=true", "threads=1", f"output={output}")
    assert output.exists() == (ended.returncode == 0)
    if ended.returncode:
        assert "deterministic is true, but" in ended.stderr
        assert "in an artifact that was exported with deterministic=true" in ended.stderr


def test_in_deterministic_mode_scores_do_not_depend_on_batches_or_caches(
    trained: Path, requests_file: Path, tmp_path: Path
) -> None:
    # Every user first sends half of its history, so that K/V is encoded in two steps.
    grown = tmp_path / "requests.jsonl"
    raws = [json.loads(line) for line in requests_file.read_text().splitlines()]
    with grown.open("w") as file:
        for raw in raws:
            half = {name: cells[: len(cells) // 2] for name, cells in raw["history"].items()}
            print(json.dumps(raw | {"history": half}), file=file)
            print(json.dumps(raw), file=file)
    artifact = tmp_path / "artifact"
    exported = (f"run={trained}", f"output={artifact}", "deterministic=true")
    run_pipeline("export", *exported, "threads=1")
    answers = []
    for turn in ("batch_requests=1 cache=off", "batch_requests=7 cache.items=1000"):
        output = tmp_path / f"{len(answers)}.jsonl"
        given = (f"artifact={artifact}", f"requests={grown}", f"output={output}")
        run_pipeline("score", *given, "deterministic=true", "threads=1", *turn.split())
        answers.append([json.loads(line) for line in output.read_text().splitlines()])
    one, other = answers
    assert len(one) == 2 * NUM_REQUESTS
    assert [answer["scores"] for answer in one] == [answer["scores"] for answer in other]
    assert set(statuses(one)) == {"bypass"}
    assert {"miss", "partial"} <= set(statuses(other))


# --- broken requests


def broken_lines(request: Json) -> dict[str, bytes]:
    """Return lines that must be refused, by what is wrong with them."""
    line = as_line(changed(request, request_id="bad"))
    without = {
        f"no {key}": as_line({k: v for k, v in json.loads(line).items() if k != key})
        for key in ("user_id", "time", "context", "history", "candidates")
    }
    history, candidates = request["history"], request["candidates"]
    first_item = candidates["item_id"][1:]

    def group(name: str, **values: Any) -> bytes:
        return as_line(changed(json.loads(line), name, **values))

    return without | {
        "no JSON": b"{request_id: 1",
        "half a line": line[: len(line) // 2],
        "not UTF-8": line.replace(b'"bad"', b'"\xff\xfe"'),
        "UTF-16": line.decode().encode("utf-16")[:-1],
        "an array": b"[" + line + b"]",
        "a number": b"7",
        "null": b"null",
        "deep": b"[" * 200_000 + b"]" * 200_000,
        "deep inside": line[:-1] + b', "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001,
        "duplicate keys": line[:-1] + b', "time": 5}',
        "duplicate keys inside": line.replace(b'"action":', b'"action": [], "action":'),
        "no item_id": as_line(changed(json.loads(line), candidates={"category": [], "price": []})),
        "candidates of unequal length": group("candidates", item_id=first_item),
        "events of unequal length": group("history", time=[*history["time"], 5]),
        "a blank item": group("candidates", item_id=[" ", *first_item]),
        "blank events": group("history", item_id=["\t"] * len(history["item_id"])),
        "a blank user": as_line(changed(json.loads(line), user_id="  ")),
        "NaN for an id": group("candidates", item_id=[float("nan"), *first_item]),
        "infinity for an id": group("candidates", item_id=[float("inf"), *first_item]),
        "a list for an id": group("candidates", item_id=[[1], *first_item]),
        "events in reverse": group("history", time=history["time"][::-1]),
        "an event of the future": group("history", time=[*history["time"][:-1], request["time"]]),
        "a first_event that is not an index": group("history", first_event=-1),
        "an unknown report": as_line(changed(json.loads(line), report=["scores"])),
        "NaN for a time": as_line(changed(json.loads(line), time=float("nan"))),
        "infinite time": as_line(changed(json.loads(line), time=float("inf"))),
        "milliseconds": as_line(changed(json.loads(line), time=1_700_000_000_000)),
        "a huge time": as_line(changed(json.loads(line), time=10**300)),
        "NaN for the time of an event": group(
            "history", time=[float("nan")] * len(history["time"])
        ),
        "NaN for a price": group("candidates", price=[float("nan")] * NUM_CANDIDATES),
        "a column that is no list": group("history", item_id=7),
        "a group that is no object": as_line(changed(json.loads(line), history=[])),
        "a request_id that is a list": as_line(changed(json.loads(line), request_id=[1])),
        "a long request_id": as_line(changed(json.loads(line), request_id="x" * 201)),
        "too many digits": line.replace(b'"time": ', b'"time": ' + b"1" * 5000, 1),
        "a long line": b'{"request_id": "bad", "x": "' + b"y" * 3_000_000 + b'"}',
        "too many candidates": as_line(
            changed(
                json.loads(line),
                candidates={
                    "item_id": [1] * 100_001,
                    "category": [[]] * 100_001,
                    "price": [1] * 100_001,
                },
            )
        ),
    }


def repeated(history: Json, times: int) -> Json:
    """Repeat a history, sorted by time."""
    long = {name: column * times for name, column in history.items()}
    return long | {"time": sorted(long["time"])}


def unusual_lines(request: Json) -> dict[str, bytes]:
    """Return lines that must be scored, by what is unusual about them."""
    history, candidates = request["history"], request["candidates"]
    times = 100_000 // max(1, len(history["time"])) + 1
    return {
        "unknown user": as_line(changed(request, user_id="nobody ever")),
        "unknown items": as_line(changed(request, "candidates", item_id=list(range(900, 912)))),
        "unknown events": as_line(
            changed(request, "history", item_id=["x"] * len(history["item_id"]))
        ),
        "no candidates": as_line(changed(request, candidates={key: [] for key in candidates})),
        "no history": as_line(changed(request, history={key: [] for key in history})),
        "no candidates and no history": as_line(
            changed(
                request,
                candidates={key: [] for key in candidates},
                history={key: [] for key in history},
            )
        ),
        "100,000 events": as_line(changed(request, history=repeated(history, times))),
        "a negative item": as_line(changed(request, "candidates", item_id=[-1] * 12)),
        "a negative user": as_line(changed(request, user_id=-7)),
        "booleans": as_line(changed(request, "candidates", item_id=[True] * 12)),
        "ids as floats": as_line(
            changed(request, "candidates", item_id=[float(one) for one in candidates["item_id"]])
        ),
        "ids as texts": as_line(
            changed(request, "candidates", item_id=[f" {one}.0" for one in candidates["item_id"]])
        ),
        "a very long line": as_line(changed(request, note="y" * 3_000_000)),
        "no request_id": as_line({k: v for k, v in request.items() if k != "request_id"}),
        "nulls": as_line(changed(request, "history", action=[None] * len(history["action"]))),
        "blanks around it": b"  " + as_line(request) + b" \r",
        "1,000 candidates": as_line(
            changed(request, candidates={name: [c[0]] * 1000 for name, c in candidates.items()})
        ),
    }


def test_broken_lines_are_refused_and_the_others_scored_in_order(
    score: Score, good: list[Json], uncached: list[Json], whole: int
) -> None:
    broken = broken_lines(good[whole])
    indices = [index % NUM_REQUESTS for index in range(len(broken))]
    lines: list[bytes] = []
    for bad, index in zip(broken.values(), indices, strict=True):
        lines += [bad, b"", as_line(good[index])]
    answers = score(lines, "batch_requests=5", exit_status=REFUSED)
    assert len(answers) == 2 * len(broken)
    assert_same_scores(answers[1::2], [uncached[index] for index in indices])
    for name, answer in zip(broken, answers[::2], strict=True):
        assert set(answer) == {"request_id", "error"}, name
        assert set(answer["error"]) == {"type", "message"}
        assert answer["error"]["type"] == "RequestError"
        assert 10 < len(answer["error"]["message"]) < 1000, name
        assert answer["request_id"] in ("bad", None)
    messages = {n: a["error"]["message"] for n, a in zip(broken, answers[::2], strict=True)}
    for key in ("user_id", "time", "context", "history", "candidates"):
        assert f"has no '{key}'" in messages[f"no {key}"]
    assert "appears twice" in messages["duplicate keys"]
    assert "candidates.item_id holds ' '" in messages["a blank item"]
    assert "user_id holds '  '" in messages["a blank user"]
    assert "events are given oldest first" in messages["events in reverse"]
    assert "not before the request's time" in messages["an event of the future"]
    assert "time holds nan" in messages["NaN for a time"]
    assert "differ in length" in messages["events of unequal length"]
    # A refused line keeps its request id if it can be read.
    by_name = {n: a["request_id"] for n, a in zip(broken, answers[::2], strict=True)}
    assert by_name["no time"] == by_name["a blank item"] == by_name["a long line"] == "bad"
    assert by_name["no JSON"] is by_name["a request_id that is a list"] is None


def test_unusual_lines_are_scored(
    score: Score, good: list[Json], uncached: list[Json], whole: int
) -> None:
    unusual = unusual_lines(good[whole])
    answers = dict(zip(unusual, score(list(unusual.values()), "batch_requests=5"), strict=True))
    plain = uncached[whole]
    counts = {name: len(answer["scores"]) for name, answer in answers.items()}
    assert counts == dict.fromkeys(unusual, NUM_CANDIDATES) | {
        "no candidates": 0,
        "no candidates and no history": 0,
        "1,000 candidates": 1000,
    }
    assert answers["no request_id"]["request_id"] is None
    empty = answers["no history"]["cache"]
    assert (empty["status"], empty["reason"], empty["computed_events"]) == (
        "bypass",
        "too_short",
        0,
    )
    as_plain = ("a very long line", "no request_id", "blanks around it")
    for name in (*as_plain, "ids as floats", "ids as texts"):
        assert answers[name]["scores"] == pytest.approx(plain["scores"], abs=PROBABILITY_TOLERANCE)
    # The first candidate, a thousand times.
    expected = [plain["scores"][0]] * 1000
    assert answers["1,000 candidates"]["scores"] == pytest.approx(
        expected, abs=PROBABILITY_TOLERANCE
    )


def test_a_long_history_is_cut_to_the_window(score: Score, good: list[Json], whole: int) -> None:
    history = good[whole]["history"]
    long = repeated(history, 100_000 // len(history["time"]) + 1)
    num_read = num_events_read(len(long["time"]))
    cut = {name: column[-num_read:] for name, column in long.items()}
    found, expected = score([as_line(changed(good[whole], history=h)) for h in (long, cut)])
    assert_same_scores([found], [expected])
    assert found["cache"]["computed_events"] == num_read


# --- what is counted


def test_unknown_ids_are_printed_by_column_with_their_share(
    score: Score, good: list[Json], whole: int, capsys: pytest.CaptureFixture[str]
) -> None:
    score([as_line(good[whole])])
    capsys.readouterr()
    odd = changed(good[whole], "candidates", item_id=["new", "newer", *range(10)])
    answers = score(
        [as_line(odd | {"user_id": "nobody"}), as_line(odd | {"report": ["unknown_ids"]})]
    )
    printed = capsys.readouterr().out
    found = answers[1]["unknown_ids"]["candidates.item_id"]
    assert "unknown_ids" not in answers[0]
    assert found >= 2
    assert "unknown ids: user_id 1 of 2 (50.0 %)" in printed
    assert f"candidates.item_id {2 * found} of 24 ({found / 12:.1%}".replace("%", " %)") in printed


def test_histories_out_of_order_are_sorted_and_counted_with_history_order_sort(
    score: Score,
    good: list[Json],
    uncached: list[Json],
    whole: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    history = good[whole]["history"]
    # Newest first, but events of one time in their order, which sorting keeps.
    rows = sorted(range(len(history["time"])), key=lambda row: -history["time"][row])
    mixed = {name: [cells[row] for row in rows] for name, cells in history.items()}
    turned = changed(good[whole], history=mixed)
    lines = [as_line(one) for one in (good[whole], turned, changed(turned, time=5))]
    *answers, refused = score(lines, "history_order=sort", exit_status=REFUSED)
    assert_same_scores(answers, [uncached[whole]] * 2)
    assert "not before the request's time 5" in refused["error"]["message"]
    assert "sorted histories: 1" in capsys.readouterr().out


def test_a_client_that_sends_cut_histories_hits_as_one_that_sends_whole_ones(
    score: Score, good: list[Json]
) -> None:
    """Without ``first_event`` each of its requests was a miss with reason ``edited``."""
    longest = max(good, key=lambda request: len(request["history"]["time"]))
    num_events = len(longest["history"]["time"])
    assert num_events > MAX_HISTORY + BLOCK
    lines: dict[str, list[bytes]] = {"whole": [], "cut": [], "silent": []}
    for last in range(num_events - BLOCK, num_events + 1):
        whole = {name: cells[:last] for name, cells in longest["history"].items()}
        part = {name: cells[-MAX_HISTORY:] for name, cells in whole.items()}
        says = part | {"first_event": last - MAX_HISTORY}
        for name, history in (("whole", whole), ("cut", says), ("silent", part)):
            lines[name].append(as_line(changed(longest, history=history)))
    of_whole, of_cut, of_silent = (score(lines[name], "batch_requests=1") for name in lines)
    assert [one["scores"] for one in of_cut] == [one["scores"] for one in of_whole]
    assert statuses(of_cut) == statuses(of_whole)
    assert "partial" in statuses(of_cut)
    assert {one["cache"]["reason"] for one in of_silent} == {"cold", "slid"}
    assert set(statuses(of_silent)) == {"miss"}


# --- errors before scoring


def test_an_artifact_is_used_only_if_it_was_signed_with_the_key(
    trained: Path, artifact: Path, requests_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "key").write_text("a secret of ours\n")
    key = f"artifact_key_file={tmp_path / 'key'}"
    signed, output = tmp_path / "signed", tmp_path / "answers.jsonl"
    run_pipeline("export", f"run={trained}", f"output={signed}", "threads=1", key)
    given = (f"requests={requests_file}", f"output={output}", "threads=1", key)
    with pytest.raises(ArtifactError, match=r"is not signed: it has no manifest\.mac"):
        run_pipeline("score", f"artifact={artifact}", *given)
    assert not output.exists()
    run_pipeline("score", f"artifact={signed}", *given)
    assert len(output.read_text().splitlines()) == 30
    with pytest.raises(ConfigError, match=r"artifact_key_file is .*nowhere', which cannot be read"):
        run_pipeline("score", f"artifact={signed}", *given, "artifact_key_file=nowhere")


@pytest.fixture
def spoilt(artifact: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(artifact, tmp_path / "spoilt"))


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("name", ["model.pt", "schema.json", "ids.npy"])
@pytest.mark.parametrize("spoil", [flip_a_byte, truncate, append, empty, Path.unlink])
def test_a_spoilt_artifact_is_refused_by_file(
    spoilt: Path, requests_file: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    spoil(spoilt / name)
    with pytest.raises(ArtifactError, match=name):
        run_pipeline(
            "score", f"artifact={spoilt}", f"requests={requests_file}", f"output={spoilt / 'out'}"
        )
    assert not (spoilt / "out").exists()


@pytest.mark.parametrize("spoil", [truncate, empty, Path.unlink])
def test_a_spoilt_manifest_is_refused(
    spoilt: Path, requests_file: Path, spoil: Callable[[Path], None]
) -> None:
    spoil(spoilt / "manifest.json")
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        run_pipeline(
            "score", f"artifact={spoilt}", f"requests={requests_file}", f"output={spoilt / 'out'}"
        )


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (("requests=nowhere.jsonl",), ConfigError, r"requests is 'nowhere\.jsonl'; there is no"),
        (("artifact=nowhere",), ArtifactError, r"nowhere is no artifact: it has no manifest\.json"),
        (("batch_requests=0",), ConfigError, "batch_requests is 0; it must be at least 1"),
        (("cache.name=disk",), ConfigError, "cache is 'disk'; one of"),
        (("cache.page_size=0",), ConfigError, "page_size is 0"),
        (("cache.capacity_bytes=10",), ConfigError, "capacity_bytes is 10"),
        (("history_order=drop",), ConfigError, "history_order is 'drop'; one of .'refuse', 'sort'"),
        (("threads=0",), ConfigError, "threads is 0; it must be at least 1"),
    ],
)
def test_a_value_that_cannot_work_is_an_error_before_anything_is_written(
    artifact: Path,
    requests_file: Path,
    tmp_path: Path,
    overrides: tuple[str, ...],
    error: type[Exception],
    message: str,
) -> None:
    given = (f"artifact={artifact}", f"requests={requests_file}", f"output={tmp_path / 'out'}")
    with pytest.raises(error, match=message):
        run_pipeline("score", *given, *overrides)
    assert list(tmp_path.iterdir()) == []
