"""Which requests are scored next, and with which: steps of bounded size, by deadline.

One thread scores. Between two steps it takes what waits: whole requests side by side, of long ones
and of streams a part, so that nobody waits for 5,000 candidates of somebody else. A request that is
scored in parts has its K/V read once, at the first of them.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torchrec_kvshare.cache.leases import CacheUse
from torchrec_kvshare.config import ServerConfig
from torchrec_kvshare.errors import OverloadError, ScoreError
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.scoring.engine import Answer, Encoded, Engine, Unscored

logger = logging.getLogger(__name__)

IDLE_S = 0.02  # without a request, before time is spent on anything else


@dataclass(frozen=True)
class StepLimits:
    """What one step may hold.

    Attributes:
        requests: scored together.
        candidates: scored together; one request gets half of them at most.
        events: encoded together, if more than one request needs it.
        ids: in bags that are read together, if more than one request has some.
        max_wait_s: for a step to fill.
    """

    requests: int
    candidates: int
    events: int
    ids: int
    max_wait_s: float

    @property
    def part_candidates(self) -> int:
        """Candidates of one request that are scored together."""
        return max(1, self.candidates // 2)


def step_limits(config: ServerConfig) -> StepLimits:
    """The limits of a server's steps."""
    return StepLimits(
        config.batch_requests,
        config.batch_candidates,
        config.batch_events,
        config.max_values,
        config.max_wait_ms / 1e3,
    )


class Reading:
    """A user whose candidates come in parts: what is encoded at the first of them, for them all.

    Args:
        user: the request that the parts are of.
    """

    def __init__(self, user: Request) -> None:
        self.user = user
        self.encoded: Encoded | None = None

    def score(self, part: Request, engine: Engine, first_candidate: int) -> list[float]:
        """Probabilities of some candidates, the first of which has this place among all."""
        self.encoded = encoded = self.encoded or engine.encode(self.user)
        return engine.score_with(part, encoded.kv_by_history, first_candidate)

    @property
    def use(self) -> CacheUse:
        """What the cache did, once something was scored."""
        assert self.encoded is not None
        return self.encoded.use


@dataclass(eq=False)
class Job:
    """A request, or a group of a stream's candidates, on its way.

    Attributes:
        engine: that answers.
        request: what is to be scored.
        deadline: monotonic seconds.
        reading: of a stream; a long request gets one of its own.
        first_candidate: place of its first candidate among all of a stream.
        on_scores: called in the event loop with each part's scores as they are ready.
        answer: what comes of it.
        scores: of the candidates that are done.
        queued_at: monotonic seconds.
        started_at: of the first step that has a part of it.
        score_s: that the engine took for it and what it was batched with.
    """

    engine: Engine
    request: Request
    deadline: float
    reading: Reading | None = None
    first_candidate: int = 0
    on_scores: Callable[[list[float], CacheUse], None] | None = None
    answer: "asyncio.Future[Answer]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    scores: list[float] = field(default_factory=list)
    queued_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    score_s: float = 0.0

    @property
    def num_left(self) -> int:
        """Candidates that are not scored yet."""
        return self.request.num_candidates - len(self.scores)


@dataclass(frozen=True)
class Part:
    """What a step does of a job: all of it, or its next candidates."""

    job: Job
    num_candidates: int

    @property
    def is_whole(self) -> bool:
        """Whether nothing of the job was or will be scored elsewhere."""
        return self.job.reading is None and self.num_candidates == self.job.request.num_candidates


class Observer(Protocol):
    """Who is told what the scoring thread does, in that thread."""

    def stepped(self, parts: Sequence[Part]) -> None:
        """A step begins."""

    def answered(self, job: Job, answer: Answer) -> None:
        """A request was scored."""

    def unscored(self, job: Job, unscored: Unscored) -> None:
        """A request got no finite scores."""

    def idle(self) -> bool:
        """Nothing waits; returns whether there is more to do while that is so."""


class Scheduler:
    """A bounded queue of jobs and the thread that scores them.

    Args:
        limits: of a step.
        queue_requests: jobs that wait, at most.
        observer: told what happens.
    """

    def __init__(self, limits: StepLimits, queue_requests: int, observer: Observer) -> None:
        self._limits = limits
        self._queue_requests = queue_requests
        self._observer = observer
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="kvshare-score", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Jobs that are not done, but for what the current step does."""
        return len(self._jobs)

    def submit(self, job: Job) -> None:
        """Queue a job of this event loop.

        Raises:
            OverloadError: if the queue is full.
        """
        with self._changed:
            if len(self._jobs) >= self._queue_requests:
                raise OverloadError(
                    f"{len(self._jobs)} requests wait; at most {self._queue_requests} may"
                )
            self._jobs.append(job)
            self._changed.notify()

    def close(self) -> None:
        """End the thread; what still waits is cancelled."""
        with self._changed:
            self._is_closed = True
            left, self._jobs = self._jobs, []
            self._changed.notify()
        self._thread.join()
        for job in left:
            job.answer.cancel()

    def _work(self) -> None:
        has_more = True
        while not self._is_closed:
            parts = self._take(IDLE_S if has_more else None)
            if parts:
                self._observer.stepped(parts)
                self._run(parts)
                has_more = True
            elif not self._is_closed:
                has_more = self._idle()

    def _idle(self) -> bool:
        try:
            return self._observer.idle()
        except Exception:
            logger.exception("work in idle time failed")
            return False

    def _take(self, timeout_s: float | None) -> list[Part]:
        """The next step, or nothing after so long without a job."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._is_closed, timeout_s)
            if self._jobs:
                fill_until = self._jobs[0].queued_at + self._limits.max_wait_s
                self._changed.wait_for(
                    lambda: len(self._jobs) >= self._limits.requests or self._is_closed,
                    max(0.0, fill_until - time.monotonic()),
                )
            now = time.monotonic()
            # Of what nobody waits for any more nothing is scored.
            self._jobs = [j for j in self._jobs if not j.answer.done() and j.deadline > now]
            parts = next_step(self._jobs, self._limits)
            for part in parts:
                if part.num_candidates == part.job.num_left:
                    self._jobs.remove(part.job)
        return parts

    def _run(self, parts: Sequence[Part]) -> None:
        now = time.monotonic()
        for part in parts:
            part.job.started_at = part.job.started_at or now
        self._rank([part.job for part in parts if part.is_whole])
        for part in parts:
            if not part.is_whole:
                self._score(part)

    def _rank(self, jobs: Sequence[Job]) -> None:
        """Whole requests, in one batch; where that fails one by one, so that one alone fails."""
        if not jobs:
            return
        start = time.monotonic()
        try:
            answers = jobs[0].engine.rank_each([job.request for job in jobs])
        except Exception as error:
            if len(jobs) > 1:
                for job in jobs:
                    self._rank([job])
            else:
                self._end(jobs[0], error)
            return
        seconds = time.monotonic() - start
        for job, answer in zip(jobs, answers, strict=True):
            job.score_s = seconds
            if isinstance(answer, Unscored):
                self._observer.unscored(job, answer)
                self._end(job, answer.error)
            else:
                self._observer.answered(job, answer)
                self._end(job, answer)

    def _score(self, part: Part) -> None:
        """Some candidates of a job whose K/V is held."""
        job = part.job
        job.reading = reading = job.reading or Reading(job.request)
        first = len(job.scores)
        request = job.request.part(first, first + part.num_candidates)
        start = time.monotonic()
        try:
            scores = reading.score(request, job.engine, job.first_candidate + first)
        except Exception as error:
            if isinstance(error, ScoreError):
                self._observer.unscored(job, Unscored(error, reading.use))
            with self._changed:
                self._jobs = [other for other in self._jobs if other is not job]
            self._end(job, error)
            return
        job.scores += scores
        job.score_s += time.monotonic() - start
        if job.on_scores is not None:
            self._loop.call_soon_threadsafe(job.on_scores, scores, reading.use)
        if not job.num_left:
            answer = job.engine.answer(job.request, job.scores, reading.use)
            self._observer.answered(job, answer)
            self._end(job, answer)

    def _end(self, job: Job, result: Answer | Exception) -> None:
        self._loop.call_soon_threadsafe(_resolve, job.answer, result)


def next_step(jobs: Sequence[Job], limits: StepLimits) -> list[Part]:
    """What to score next of what waits.

    By deadline, all of one engine. A job gets half of the step's candidates at most; jobs that have
    begun get half of them together, as long as others wait for their first turn.

    Args:
        jobs: those that wait.
        limits: of the step.
    """
    by_deadline = sorted(jobs, key=lambda job: job.deadline)
    half = limits.part_candidates
    room = limits.candidates
    room_for_begun = half if any(not job.scores for job in by_deadline) else room
    room_for_events, room_for_ids = limits.events, limits.ids
    parts: list[Part] = []
    for job in by_deadline:
        if len(parts) == limits.requests:
            break
        if job.engine is not by_deadline[0].engine:
            continue
        share = min(job.num_left, half)
        events = 0 if job.reading else job.engine.events_to_encode(job.request)
        ids = job.request.num_bag_ids
        if share > (room_for_begun if job.scores else room):
            continue
        if parts and (events > room_for_events or ids > room_for_ids):
            continue
        parts.append(Part(job, share))
        room -= share
        room_for_begun = min(room, room_for_begun - (share if job.scores else 0))
        room_for_events -= events
        room_for_ids -= ids
    return parts


def _resolve(answer: "asyncio.Future[Answer]", result: Answer | Exception) -> None:
    if answer.done():
        return  # Nobody waits for it any more.
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)
