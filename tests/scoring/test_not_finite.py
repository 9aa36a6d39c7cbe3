"""A model that gives NaN: each request that it touches gets an error, the others their scores."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.encoder_worlds import make_caches
from tests.nan_worlds import (
    bad_candidates,
    bad_history,
    good_raw,
    poisoned_dlrm,
)
from tests.worlds import PROBABILITY_TOLERANCE, SCHEMA, make_dlrm, parse_all, version_called
from torchrec_kvshare.cache.codecs import get_codec
from torchrec_kvshare.cache.kv_cache import KVCache
from torchrec_kvshare.cache.policies import LruPolicy
from torchrec_kvshare.cache.stack import Level, TierStack
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.cache.tiers import HostTier
from torchrec_kvshare.errors import RecordError, ScoreError
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.encoded_user import encode_user, save_user
from torchrec_kvshare.scoring.engine import Answer, Engine, Unscored
from torchrec_kvshare.scoring.files import score_file

RawRequest = dict[str, Any]
HEALTHY = Engine(RankingModel(make_dlrm(1)).eval(), SCHEMA, None)


def poisoned_engine(num_pages: int = 0) -> Engine:
    model = RankingModel(poisoned_dlrm(1)).eval()
    store = KVStore(make_caches(model, [num_pages])) if num_pages else None
    return Engine(model, SCHEMA, store)


def cache_of(engine: Engine) -> KVCache:
    assert engine.store is not None
    return engine.store.caches[0]


def assert_scored(answer: Answer | Unscored, raw: RawRequest) -> None:
    """As the same model without the bad item scores it."""
    assert isinstance(answer, Answer)
    [expected] = HEALTHY.rank(parse_all([raw]))
    assert answer.scores == pytest.approx(expected.scores, rel=0.0, abs=PROBABILITY_TOLERANCE)


@pytest.mark.parametrize("num_pages", [0, 30], ids=["uncached", "cached"])
def test_a_request_without_scores_fails_alone(num_pages: int) -> None:
    """One candidate's NaN made the answers to all requests of its batch NaN in JSON, or none."""
    engine = poisoned_engine(num_pages)
    raws = [good_raw("a", 3), bad_candidates("b", 5, 1, 4), bad_history("c", 2), good_raw("d", 4)]
    for _ in range(2):  # the second time from the cache
        first, second, third, last = engine.rank_each(parse_all(raws))
        assert_scored(first, raws[0])
        assert_scored(last, raws[3])
        assert isinstance(second, Unscored)
        assert isinstance(third, Unscored)
        assert str(second.error) == (
            "the model gave no finite score for candidates 1, 4 of request b"
        )
        assert "candidates 0, 1 of request c" in str(third.error)


def test_all_or_none_raises_the_first_error() -> None:
    raws = [good_raw("a", 3), bad_candidates("b", 30, *range(3, 20))]
    engine = poisoned_engine()
    with pytest.raises(ScoreError, match=r"candidates 3, 4, .*, 12 and 7 more of request b"):
        engine.rank(parse_all(raws))
    assert len(engine.rank(parse_all(raws[:1]))) == 1


def test_kv_that_is_not_finite_is_kept_nowhere() -> None:
    """It was put into pages and written to the tiers below, and read there by every later request
    of this user and of those who share content."""
    model = RankingModel(poisoned_dlrm(1)).eval()
    host = HostTier(LruPolicy(10**6), ttl_s=60.0)
    stack = TierStack([Level(host, get_codec("float32"))], ttl_s=60.0)
    store = KVStore(make_caches(model, [30]), stack)
    engine = Engine(model, SCHEMA, store, version=version_called(f"{'5e' * 32}-{'0f' * 32}"))
    raws = [bad_history("a", 2), good_raw("b", 2)]
    engine.prefetch(parse_all(raws[:1]))
    [bad, good] = engine.rank_each(parse_all(raws))
    engine.rank_each(parse_all(raws))
    assert isinstance(bad, Unscored)
    assert (bad.cache.status, bad.cache.reason) == ("bypass", "not_finite")
    assert isinstance(good, Answer)
    assert stack.drain(10.0)
    assert store.metrics.snapshot().value("not_finite") == 3
    assert engine.forget("a") == {"pages": 0, "host": 0}
    assert all(engine.forget("b").values())
    engine.close()


def test_a_history_that_grows_by_a_bad_event_leaves_what_was_kept() -> None:
    engine = poisoned_engine(num_pages=30)
    raw = good_raw("a", 2)
    engine.rank(parse_all([raw]))
    grown = json.loads(json.dumps(raw))
    for column, cells in grown["history"].items():
        cells.append("105" if column == "item_id" else cells[-1])
    [error] = engine.rank_each(parse_all([grown]))
    assert isinstance(error, Unscored)
    assert error.cache.cached_events == 6
    [again] = engine.rank_each(parse_all([raw]))
    assert_scored(again, raw)
    assert isinstance(again, Answer)
    assert again.cache.status == "hit"
    assert cache_of(engine).num_leased == 0


def test_a_line_without_scores_gets_its_error_and_the_rest_goes_on(tmp_path: Path) -> None:
    """The whole file ended without answers."""
    raws = [good_raw("a", 2), bad_candidates("b", 3, 2), {"user_id": 1}, good_raw("c", 1)]
    requests, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    requests.write_text("".join(json.dumps(raw) + "\n" for raw in raws))
    counts = score_file(poisoned_engine(), requests, output, batch_requests=4)
    assert (counts.scored, counts.refused) == (2, 2)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert answers[1] == {
        "request_id": "b",
        "error": {
            "type": "ScoreError",
            "message": "the model gave no finite score for candidates 2 of request b",
        },
    }
    assert answers[2]["error"]["type"] == "RequestError"
    assert len(answers[3]["scores"]) == 1


@pytest.mark.parametrize("num_pages", [0, 30])
def test_an_encoded_user_gives_no_nan_and_is_not_saved(num_pages: int, tmp_path: Path) -> None:
    engine = poisoned_engine(num_pages)
    raw = bad_candidates("a", 3, 1)
    user = encode_user(engine, raw)
    with pytest.raises(ScoreError, match="candidates 1 of request a"):
        user.predict(raw["candidates"])
    assert len(user.predict(good_raw("a", 3)["candidates"])) == 3
    bad = encode_user(engine, bad_history("b", 2))
    with pytest.raises(ScoreError, match="candidates 0, 1"):
        bad.predict(raw["candidates"] | {"item_id": ["100", "101", "102"]})
    with pytest.raises(RecordError, match="nan"):
        save_user(bad, bad_history("b", 2), tmp_path / "user")
    assert list(tmp_path.iterdir()) == []


def test_the_greatest_numbers_are_finite() -> None:
    """Their sum is not: it is only the cheap look."""
    kv = torch.full((2, 3, 1, 4), 3e38)
    assert torch.equal(get_codec("float32").encode(kv)["kv"], kv)
