"""Answers are checked in parts, so that no request waits for the check of a whole long one."""

import math
from dataclasses import replace

import pytest

from tests.encoder_worlds import make_caches
from tests.worlds import SCHEMA, draw_raw, make_dlrm, parse_all
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.engine import Engine
from torchrec_kvshare.serving.shadow import ShadowParity


class Watched(RankingModel):
    """A model that remembers how many candidates it scored at a time."""

    def score(self, dense, *others):  # type: ignore[no-untyped-def]
        scored.append(len(dense))
        return super().score(dense, *others)


scored: list[int] = []
MODEL = Watched(make_dlrm(1)).eval()


def checked_after(num_candidates: int, offset: float = 0.0) -> tuple[int, float]:
    """Number of calls until an answer is checked, and the drift found."""
    engine = Engine(MODEL, SCHEMA, KVStore(make_caches(MODEL, [30])))
    [request] = parse_all([draw_raw(9, num_candidates, 1)])
    engine.rank([request])
    [answer] = engine.rank([request])
    assert answer.cache.status == "hit"
    shadow = ShadowParity(share=1.0, part_candidates=8)
    changed = [score + offset * (index == 19) for index, score in enumerate(answer.scores)]
    shadow.offer(engine, request, replace(answer, scores=changed))
    scored.clear()
    for calls in range(1, 100):
        found = shadow.check()
        assert shadow.has_more == (found is None)
        if found is not None:
            return calls, found[1]
    return 100, math.nan


@pytest.mark.parametrize(
    ("num_candidates", "parts"), [(20, [8, 8, 4]), (8, [8]), (9, [8, 1]), (0, [])]
)
def test_a_check_scores_no_more_candidates_at_a_time_than_a_part_has(
    num_candidates: int, parts: list[int]
) -> None:
    """Whole requests of 10,000 candidates were scored again in one go."""
    calls, drift = checked_after(num_candidates)
    assert scored == parts
    assert calls == max(1, len(parts))
    assert drift < 2e-6


def test_a_difference_in_the_last_part_is_found() -> None:
    assert checked_after(20, offset=0.25)[1] == pytest.approx(0.25, abs=1e-5)
