"""The scheduler: a bounded queue and a thread that scores it in batches, by deadline.

A batch holds whole requests, and parts of long requests and streams, so that no request waits for
5,000 candidates of another one. The K/V of a request in parts is read once, at its first part. Work
in the background, such as prefetches, is done one piece at a time while no request waits.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from torchrec_kvshare.cache.leases import CacheUse
from torchrec_kvshare.config import ServerConfig
from torchrec_kvshare.errors import OverloadError, ScoreError
from torchrec_kvshare.features.request import Request
from torchrec_kvshare.scoring.encoded_user import EncodedUser
from torchrec_kvshare.scoring.engine import Answer, Engine, Unscored

logger = logging.getLogger(__name__)

IDLE_S = 0.02  # without a request, before other work starts


@dataclass(frozen=True)
class BatchLimits:
    """Limits of one batch.

    Attributes:
        requests: at most.
        candidates: at most; one request gets half of them.
        events: to encode, if more than one request needs it.
        ids: in bags, if more than one request has some.
        max_wait_s: for a batch to fill.
    """

    requests: int
    candidates: int
    events: int
    ids: int
    max_wait_s: float

    @property
    def part_candidates(self) -> int:
        """The most candidates that one request gets of a batch."""
        return max(1, self.candidates // 2)


def batch_limits(config: ServerConfig) -> BatchLimits:
    """Return the limits of a server's batches."""
    return BatchLimits(
        requests=config.batch_requests,
        candidates=config.batch_candidates,
        events=config.batch_events,
        ids=config.max_values,
        max_wait_s=config.max_wait_ms / 1e3,
    )


@dataclass(eq=False)
class Job:
    """A request, or a group of a stream's candidates, to score.

    Attributes:
        engine: that scores it.
        request: to score.
        deadline: monotonic seconds.
        encoded: K/V that the parts of a stream or of a long request share.
        first_candidate: index of its first candidate among all of the stream.
        on_scores: called in the event loop with the scores of each part.
        answer: resolves to the answer or the error.
        scores: [n, tasks] of the candidates that are done.
        queued_at: monotonic seconds.
        started_at: monotonic seconds; start of the first batch with a part of it.
        score_s: seconds in the engine, of whole batches.
    """

    engine: Engine
    request: Request
    deadline: float
    encoded: EncodedUser | None = None
    first_candidate: int = 0
    on_scores: Callable[[Tensor, CacheUse], None] | None = None
    answer: "asyncio.Future[Answer]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    scores: Tensor | None = None
    queued_at: float = field(default_factory=time.monotonic)
    started_at: float | None = None
    score_s: float = 0.0

    @property
    def num_left(self) -> int:
        """Number of candidates that are not scored yet."""
        return self.request.num_candidates - self.num_scored

    @property
    def num_scored(self) -> int:
        """Number of candidates that are scored."""
        return 0 if self.scores is None else len(self.scores)


@dataclass(frozen=True)
class Part:
    """The share of a job in one batch: all of it, or its next candidates."""

    job: Job
    num_candidates: int

    @property
    def is_whole(self) -> bool:
        """Whether the whole job is in this batch."""
        return self.job.encoded is None and self.num_candidates == self.job.request.num_candidates


class Observer(Protocol):
    """Callbacks of the scoring thread, called in that thread."""

    def batched(self, parts: Sequence[Part]) -> None:
        """Called when a batch starts."""

    def answered(self, job: Job, answer: Answer) -> None:
        """Called when a request was scored."""

    def unscored(self, job: Job, unscored: Unscored) -> None:
        """Called when a request got no finite scores."""

    def idle(self) -> bool:
        """Called when no job waits; returns whether there is more idle work."""


class Scheduler:
    """A bounded queue of jobs and the thread that scores them.

    Args:
        limits: of a batch.
        queue_requests: the most jobs that may wait.
        observer: of batches and answers.
    """

    def __init__(self, limits: BatchLimits, queue_requests: int, observer: Observer) -> None:
        self._limits = limits
        self._queue_requests = queue_requests
        self._observer = observer
        self._jobs: list[Job] = []
        self._background: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._work, name="kvshare-score", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Number of jobs in the queue; a job leaves it when its last part is in a batch."""
        return len(self._jobs)

    def has_room(self, num_jobs: int = 1) -> bool:
        """Whether the queue has room for more jobs."""
        return len(self._jobs) + num_jobs <= self._queue_requests

    def check_room(self, num_jobs: int = 1) -> None:
        """Check that the queue has room for more jobs, all of them or none.

        Raises:
            OverloadError: if it has not.
        """
        if not self.has_room(num_jobs):
            raise OverloadError(
                f"{len(self._jobs)} requests wait, {num_jobs} more came; at most "
                f"{self._queue_requests} may wait"
            )

    def submit(self, job: Job) -> None:
        """Queue a job of this event loop.

        Raises:
            OverloadError: if the queue is full.
        """
        with self._changed:
            self.check_room()
            self._jobs.append(job)
            self._changed.notify()

    def submit_background(self, work: Callable[[], None]) -> None:
        """Queue work for the scoring thread until no job waits; the caller bounds the queue."""
        with self._changed:
            self._background.append(work)
            self._changed.notify()

    def close(self) -> None:
        """End the thread and cancel the jobs that wait."""
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
                self._observer.batched(parts)
                self._run(parts)
                has_more = True
            elif not self._is_closed:
                has_more = self._idle()

    def _idle(self) -> bool:
        """Do a piece of work in the background, or else idle work; return whether there is more."""
        try:
            if self._background:
                self._background.popleft()()
                return True
            return self._observer.idle()
        except Exception:
            logger.exception("idle work failed")
            return False

    def _take(self, timeout_s: float | None) -> list[Part]:
        """Return the next batch, or nothing if no job came in time."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._jobs or self._background or self._is_closed, timeout_s
            )
            if self._jobs:
                fill_until = self._jobs[0].queued_at + self._limits.max_wait_s
                self._changed.wait_for(
                    lambda: len(self._jobs) >= self._limits.requests or self._is_closed,
                    max(0.0, fill_until - time.monotonic()),
                )
            now = time.monotonic()
            # Drop cancelled and expired jobs.
            self._jobs = [j for j in self._jobs if not j.answer.done() and j.deadline > now]
            parts = next_batch(self._jobs, self._limits)
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
        """Score whole requests together; if that fails, one by one: only the bad one fails."""
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
        """Score the next candidates of a job, over K/V that its parts share."""
        job = part.job
        job.encoded = encoded = job.encoded or EncodedUser(job.engine, job.request)
        first = job.num_scored
        request = job.request.part(first, first + part.num_candidates)
        start = time.monotonic()
        try:
            scores = encoded.score(request, job.first_candidate + first)
        except Exception as error:
            if isinstance(error, ScoreError):
                self._observer.unscored(job, Unscored(error, encoded.use))
            with self._changed:
                self._jobs = [other for other in self._jobs if other is not job]
            self._end(job, error)
            return
        job.scores = scores if job.scores is None else torch.cat([job.scores, scores])
        job.score_s += time.monotonic() - start
        if job.on_scores is not None:
            self._loop.call_soon_threadsafe(job.on_scores, scores, encoded.use)
        if not job.num_left:
            answer = job.engine.answer(job.request, job.scores, encoded.use)
            self._observer.answered(job, answer)
            self._end(job, answer)

    def _end(self, job: Job, result: Answer | Exception) -> None:
        self._loop.call_soon_threadsafe(_resolve, job.answer, result)


def next_batch(jobs: Sequence[Job], limits: BatchLimits) -> list[Part]:
    """Choose the next batch of the jobs that wait.

    By deadline, all of one engine. A job gets at most half of the batch's candidates. Jobs that
    have started get half together while other jobs wait for their first part.

    Args:
        jobs: that wait.
        limits: of the batch.
    """
    by_deadline = sorted(jobs, key=lambda job: job.deadline)
    half = limits.part_candidates
    room = limits.candidates
    room_for_started = half if any(not job.num_scored for job in by_deadline) else room
    room_for_events, room_for_ids = limits.events, limits.ids
    parts: list[Part] = []
    for job in by_deadline:
        if len(parts) == limits.requests:
            break
        if job.engine is not by_deadline[0].engine:
            continue
        share = min(job.num_left, half)
        events = 0 if job.encoded else job.engine.events_to_encode(job.request)
        ids = job.request.num_bag_ids
        if share > (room_for_started if job.num_scored else room):
            continue
        if parts and (events > room_for_events or ids > room_for_ids):
            continue
        parts.append(Part(job, share))
        room -= share
        room_for_started = min(room, room_for_started - (share if job.num_scored else 0))
        room_for_events -= events
        room_for_ids -= ids
    return parts


def _resolve(answer: "asyncio.Future[Answer]", result: Answer | Exception) -> None:
    if answer.done():
        return  # It was cancelled.
    if isinstance(result, Exception):
        answer.set_exception(result)
    else:
        answer.set_result(result)
