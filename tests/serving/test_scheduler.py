"""Batches of bounded size, by deadline; no job starves, and cancelled jobs are not scored."""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.encoder_worlds import make_caches
from tests.worlds import SCHEMA, draw_raw, make_dlrm, parse_all
from torchrec_kvshare.cache.store import KVStore
from torchrec_kvshare.errors import OverloadError
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.model.ranking import RankingModel
from torchrec_kvshare.scoring.encoded_user import EncodedUser
from torchrec_kvshare.scoring.engine import Answer, Engine, Unscored
from torchrec_kvshare.serving.scheduler import (
    BatchLimits,
    Job,
    Part,
    Scheduler,
    next_batch,
)

MODEL = RankingModel(make_dlrm(1)).eval()
UNCACHED = Engine(MODEL, SCHEMA, None)
LIMITS = BatchLimits(requests=3, candidates=8, events=100, ids=1000, max_wait_s=0.0)
SOON = 60.0


class Quiet:
    """An observer that records batches, answers and errors."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[object, int]]] = []
        self.answers: list[Answer] = []
        self.errors: list[str] = []

    def batched(self, parts: Sequence[Part]) -> None:
        self.batches.append([(part.job.request.request_id, part.num_candidates) for part in parts])

    def answered(self, job: Job, answer: Answer) -> None:
        self.answers.append(answer)

    def unscored(self, job: Job, unscored: Unscored) -> None:
        self.errors.append(str(unscored.error))

    def idle(self) -> bool:
        return False


def cached_engine() -> Engine:
    return Engine(MODEL, SCHEMA, KVStore(make_caches(MODEL, [30])))


def request_of(num_candidates: int, num_events: int = 6, seed: int = 0) -> Request:
    raw = draw_raw(num_events, num_candidates, seed) | {"request_id": f"r{seed}"}
    return parse_all([raw])[0]


def job_of(
    num_candidates: int,
    deadline: float,
    num_events: int = 6,
    num_scored: int = 0,
    engine: Engine = UNCACHED,
    seed: int = 0,
) -> Job:
    """A job outside any event loop."""
    answer: asyncio.Future[Answer] = asyncio.Future(loop=asyncio.new_event_loop())
    answer.get_loop().close()
    request = request_of(num_candidates, num_events, seed)
    job = Job(engine, request, deadline, answer=answer)
    job.scores = [0.5] * num_scored
    if num_scored:
        job.encoded = EncodedUser(engine, request)
    return job


def shares(jobs: Sequence[Job], limits: BatchLimits = LIMITS) -> list[tuple[int, int]]:
    """Index of the job and number of candidates of each part of the next batch."""
    return [(jobs.index(part.job), part.num_candidates) for part in next_batch(jobs, limits)]


def test_the_earliest_deadline_is_scored_first() -> None:
    jobs = [job_of(2, deadline=3.0), job_of(2, deadline=1.0), job_of(2, deadline=2.0)]
    assert shares(jobs) == [(1, 2), (2, 2), (0, 2)]


def test_a_batch_holds_no_more_than_its_limits() -> None:
    assert shares([job_of(1, deadline) for deadline in range(5)]) == [(0, 1), (1, 1), (2, 1)]
    assert shares([job_of(3, deadline) for deadline in range(3)]) == [(0, 3), (1, 3)]
    jobs = [job_of(1, deadline, num_events=6) for deadline in range(3)]
    assert shares(jobs, replace(LIMITS, events=13)) == [(0, 1), (1, 1)]


def test_ids_in_bags_are_limited() -> None:
    jobs = [job_of(1, deadline) for deadline in range(3)]
    [ids] = {job.request.num_bag_ids for job in jobs}
    assert shares(jobs, replace(LIMITS, ids=2 * ids)) == [(0, 1), (1, 1)]
    assert shares(jobs, replace(LIMITS, ids=1)) == [(0, 1)]


def test_cached_histories_are_not_counted_as_events() -> None:
    engine = cached_engine()
    engine.rank([request_of(1)])
    limits = replace(LIMITS, events=1)
    assert shares([job_of(1, deadline, engine=engine) for deadline in range(3)], limits) == [
        (0, 1),
        (1, 1),
        (2, 1),
    ]
    assert shares([job_of(1, deadline) for deadline in range(3)], limits) == [(0, 1)]


def test_a_long_request_leaves_half_of_each_batch_to_others() -> None:
    long, short = job_of(40, deadline=1.0), job_of(4, deadline=9.0)
    assert shares([long, short]) == [(0, 4), (1, 4)]
    begun = [job_of(40, deadline=1.0, num_scored=4), job_of(40, deadline=2.0, num_scored=4)]
    assert shares([*begun, short]) == [(0, 4), (2, 4)]
    assert shares(begun) == [(0, 4), (1, 4)]


def test_a_request_that_fits_a_batch_is_never_split() -> None:
    jobs = [job_of(3, deadline=1.0), job_of(3, deadline=2.0), job_of(3, deadline=3.0)]
    assert shares(jobs) == [(0, 3), (1, 3)]


def test_a_batch_is_of_one_engine() -> None:
    jobs = [job_of(1, 1.0), job_of(1, 2.0, engine=cached_engine()), job_of(1, 3.0)]
    assert shares(jobs) == [(0, 1), (2, 1)]


@given(
    st.lists(
        st.tuples(st.integers(0, 20), st.floats(0, 9), st.integers(0, 40)), min_size=1, max_size=8
    )
)
def test_every_batch_makes_progress_and_has_the_earliest_deadline(
    drawn: list[tuple[int, float, int]],
) -> None:
    jobs = [
        job_of(num_candidates, deadline, min(num_events, 14))
        for num_candidates, deadline, num_events in drawn
    ]
    parts = next_batch(jobs, LIMITS)
    assert parts[0].job is min(jobs, key=lambda job: job.deadline)
    assert len(parts) <= LIMITS.requests
    assert sum(part.num_candidates for part in parts) <= LIMITS.candidates
    assert all(part.num_candidates or not part.job.num_left for part in parts)


def test_scores_are_the_engines_whatever_they_were_batched_with() -> None:
    requests = [request_of(1 + 5 * seed, seed=seed) for seed in range(6)]  # up to 26 candidates
    observer = Quiet()

    async def ask() -> list[Answer]:
        scheduler = Scheduler(LIMITS, 10, observer)
        engine = cached_engine()
        jobs = [Job(engine, request, time.monotonic() + SOON) for request in requests]
        for job in jobs:
            scheduler.submit(job)
        answers = await asyncio.gather(*(job.answer for job in jobs))
        scheduler.close()
        return answers

    answers = asyncio.run(ask())
    for answer, alone in zip(answers, UNCACHED.rank(requests), strict=True):
        assert answer.request_id == alone.request_id
        assert answer.scores == pytest.approx(alone.scores, rel=0, abs=2e-6)
    assert len(observer.answers) == len(requests)
    assert max(sum(count for _, count in batch) for batch in observer.batches) <= LIMITS.candidates


def test_a_full_queue_refuses() -> None:
    async def ask() -> None:
        scheduler = Scheduler(replace(LIMITS, max_wait_s=SOON), 2, Quiet())
        jobs = [Job(UNCACHED, request_of(1), time.monotonic() + SOON) for _ in range(3)]
        for job in jobs[:2]:
            scheduler.submit(job)
        with pytest.raises(OverloadError, match="2 requests wait, 1 more came; at most 2 may wait"):
            scheduler.submit(jobs[2])
        scheduler.close()
        assert all(job.answer.cancelled() for job in jobs[:2])

    asyncio.run(ask())


def test_cancelled_and_expired_jobs_are_not_scored() -> None:
    observer = Quiet()

    async def ask() -> None:
        scheduler = Scheduler(replace(LIMITS, max_wait_s=0.05), 10, observer)
        late = Job(UNCACHED, request_of(1, seed=1), time.monotonic() - 1.0)
        gone = Job(UNCACHED, request_of(1, seed=2), time.monotonic() + SOON)
        good = Job(UNCACHED, request_of(1, seed=3), time.monotonic() + SOON)
        for job in (late, gone, good):
            scheduler.submit(job)
        gone.answer.cancel()
        await good.answer
        scheduler.close()

    asyncio.run(ask())
    assert observer.batches == [[("r3", 1)]]


def test_one_bad_request_of_a_batch_fails_alone() -> None:
    class Choosy(Engine):
        def rank_each(self, requests: Sequence[Request]) -> list[Answer | Unscored]:
            if any(request.request_id == "r1" for request in requests):
                raise RuntimeError("not this one")
            return super().rank_each(requests)

    async def ask() -> list[object]:
        scheduler = Scheduler(LIMITS, 10, Quiet())
        engine = Choosy(MODEL, SCHEMA, None)
        jobs = [Job(engine, request_of(1, seed=seed), time.monotonic() + SOON) for seed in range(3)]
        for job in jobs:
            scheduler.submit(job)
        results = await asyncio.gather(*(job.answer for job in jobs), return_exceptions=True)
        scheduler.close()
        return list(results)

    results = asyncio.run(ask())
    assert [type(result) for result in results] == [Answer, RuntimeError, Answer]


def test_a_request_in_parts_is_encoded_once() -> None:
    class Counting(Engine):
        num_encoded = 0

        def encode(self, user: Request):  # type: ignore[no-untyped-def]
            self.num_encoded += 1
            return super().encode(user)

    async def ask() -> tuple[Answer, int]:
        scheduler = Scheduler(LIMITS, 10, Quiet())
        engine = Counting(MODEL, SCHEMA, None)
        job = Job(engine, request_of(30), time.monotonic() + SOON)
        scheduler.submit(job)
        answer = await job.answer
        scheduler.close()
        return answer, engine.num_encoded

    answer, num_encoded = asyncio.run(ask())
    assert num_encoded == 1
    expected = UNCACHED.rank([request_of(30)])[0]
    assert answer.scores == pytest.approx(expected.scores, rel=0, abs=2e-6)
    assert answer.cache == expected.cache
