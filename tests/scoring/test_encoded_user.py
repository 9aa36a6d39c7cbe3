"""A user that is encoded once and scored piece by piece, here or where it was loaded."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.encoder_worlds import (
    TWO_HISTORIES,
    draw_buyer,
    make_caches,
    two_histories_model,
)
from tests.worlds import (
    PROBABILITY_TOLERANCE,
    SCHEMA,
    draw_raw,
    make_dlrm,
    parse_all,
    version_called,
)
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.errors import RecordError, RequestError
from torchrec_kvshare.history.kinds import CAUSAL
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.encoded_user import encode_user, load_user, save_user
from torchrec_kvshare.scoring.engine import Engine

RawRequest = dict[str, Any]


def engine_of(num_pages: int, version: str = "v1") -> Engine:
    model = RankingModel(two_histories_model(CAUSAL)).eval()
    store = KVStore(make_caches(model, [num_pages, num_pages])) if num_pages else None
    return Engine(model, TWO_HISTORIES, store, version=version_called(version))


def buyer() -> RawRequest:
    raw = draw_buyer("a", 12, 7, 5)
    raw["history"]["action"] = ["buy", "view", "view"] * 4
    return raw


def part(raw: RawRequest, first: int, last: int) -> dict[str, list[Any]]:
    return {column: cells[first:last] for column, cells in raw["candidates"].items()}


@pytest.mark.parametrize("num_pages", [0, 1, 9])
@pytest.mark.parametrize("splits", [[7], [1] * 7, [3, 0, 4]])
def test_candidates_score_alike_one_by_one_in_groups_and_together(
    num_pages: int, splits: list[int]
) -> None:
    """With no store, one that has no room, and one that has."""
    engine, raw = engine_of(num_pages), buyer()
    [expected] = engine_of(0).rank(parse_all([raw], TWO_HISTORIES))
    user = encode_user(engine, raw)
    scores, first = [], 0
    for size in splits:
        scores += user.predict(part(raw, first, first + size))
        first += size
    assert scores == pytest.approx(expected.scores, rel=0.0, abs=PROBABILITY_TOLERANCE)


def test_a_user_outlives_its_place_in_the_cache() -> None:
    engine, raw = engine_of(9), buyer()
    user = encode_user(engine, raw)
    before = user.predict(raw["candidates"])
    engine.forget("a")
    engine.rank(parse_all([draw_buyer(name, 14, 1, 3) for name in "bcdef"], TWO_HISTORIES))
    assert user.predict(raw["candidates"]) == before


def test_encoding_goes_through_the_store() -> None:
    engine, raw = engine_of(9), buyer()
    encode_user(engine, raw)
    [answer] = engine.rank(parse_all([raw], TWO_HISTORIES))
    assert answer.cache.status == "hit"


def test_a_user_without_events_is_scored_too() -> None:
    raw = draw_raw(0, 3, 8)
    model = RankingModel(make_dlrm(3)).eval()
    engine = Engine(model, SCHEMA, None)
    [expected] = engine.rank(parse_all([raw]))
    scores = encode_user(engine, raw).predict(raw["candidates"])
    assert scores == pytest.approx(expected.scores, rel=0.0, abs=PROBABILITY_TOLERANCE)


def test_the_time_of_scoring_may_be_later(tmp_path: Path) -> None:
    engine, raw = engine_of(0), buyer()
    later = raw | {"time": raw["time"] + 86_400}
    [expected] = engine.rank(parse_all([later], TWO_HISTORIES))
    scores = encode_user(engine, raw).predict(raw["candidates"], later["time"])
    assert scores == pytest.approx(expected.scores, rel=0.0, abs=PROBABILITY_TOLERANCE)
    assert scores != encode_user(engine, raw).predict(raw["candidates"])


def test_a_saved_user_is_scored_with_the_same_bits(tmp_path: Path) -> None:
    raw = buyer()
    user = encode_user(engine_of(9), raw)
    save_user(user, raw, tmp_path / "user")
    loaded = load_user(engine_of(0), tmp_path / "user")
    assert loaded.predict(raw["candidates"]) == user.predict(raw["candidates"])
    assert [path.name for path in tmp_path.iterdir()] == ["user"]


def test_a_user_of_another_model_is_refused(tmp_path: Path) -> None:
    save_user(encode_user(engine_of(0), buyer()), buyer(), tmp_path / "user")
    ours, asked = (version_called(name).model[:16] for name in ("v1", "v2"))
    message = f"model of the record is '{ours}'; '{asked}' was asked for"
    with pytest.raises(RecordError, match=message):
        load_user(engine_of(0, "v2"), tmp_path / "user")


@pytest.mark.parametrize("number", [0, 1])
def test_kv_with_other_rows_than_its_events_have_is_refused(tmp_path: Path, number: int) -> None:
    """Its file says that it is of the whole history, and nobody counted."""
    user = encode_user(engine_of(0), buyer())
    kv_by_history = user.kv_by_history()
    assert isinstance(kv_by_history, list)
    kv_by_history[number] = kv_by_history[number][:, :-1]
    save_user(user, buyer(), tmp_path / "user")
    with pytest.raises(RecordError, match="holds K/V that is not of the history beside it"):
        load_user(engine_of(0), tmp_path / "user")


def broken_files(whole: bytes) -> list[bytes]:
    head, _, packets = whole.partition(b"\n")
    described = json.loads(head)
    other = copy.deepcopy(described)
    other["user"]["history"]["time"][3] += 1
    return [
        b"",
        b"no json\n",
        b"[]\n",
        whole[:-1],
        whole + b"x",
        whole[:-9] + b"x" + whole[-8:],
        json.dumps(described | {"lengths": described["lengths"][:1]}).encode() + b"\n" + packets,
        json.dumps(described | {"lengths": ["x", "y"]}).encode() + b"\n" + packets,
        json.dumps(described | {"lengths": 3}).encode() + b"\n" + packets,
        json.dumps(described | {"user": {}}).encode() + b"\n" + packets,
        json.dumps(other).encode() + b"\n" + packets,
    ]


@pytest.mark.parametrize("number", range(11))
def test_a_broken_file_is_refused(tmp_path: Path, number: int) -> None:
    path = tmp_path / "user"
    save_user(encode_user(engine_of(0), buyer()), buyer(), path)
    path.write_bytes(broken_files(path.read_bytes())[number])
    with pytest.raises(RecordError):
        load_user(engine_of(0), path)


def test_candidates_that_cannot_be_read_are_named() -> None:
    user = encode_user(engine_of(0), buyer())
    with pytest.raises(RequestError, match="item_id"):
        user.predict({})
    with pytest.raises(RequestError, match="has no 'history'"):
        encode_user(engine_of(0), {"user_id": 7, "context": {"country": ["GB"]}})
