"""What both faces of the server do with a request: check it, queue it, wait for its scores, say so.

The faces translate their protocols to calls of this file and its errors to theirs.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torchrec_kvshare.cache.clock import steady_clock
from torchrec_kvshare.cache.leases import CacheUse
from torchrec_kvshare.cache.reasons import HIT
from torchrec_kvshare.config import SORT, ServerConfig
from torchrec_kvshare.errors import (
    DeadlineError,
    OverloadError,
    RequestError,
    ScoreError,
    UnavailableError,
    UnknownModelError,
)
from torchrec_kvshare.features.parse import (
    parse_candidates,
    parse_request,
    sort_history,
    user_columns,
)
from torchrec_kvshare.features.request import Request, count_ids
from torchrec_kvshare.features.schema import candidate_key
from torchrec_kvshare.scoring.engine import Answer, Unscored
from torchrec_kvshare.serving import metrics as outcomes
from torchrec_kvshare.serving.columns import RequestLimits, check_limits
from torchrec_kvshare.serving.intake import Intake
from torchrec_kvshare.serving.metrics import LiveView, ServerMetrics, cache_to_json
from torchrec_kvshare.serving.models import Models, Served
from torchrec_kvshare.serving.scheduler import Job, Part, Reading, Scheduler, step_limits
from torchrec_kvshare.serving.shadow import ShadowParity

Anything = TypeVar("Anything")

logger = logging.getLogger(__name__)
request_logger = logging.getLogger("torchrec_kvshare.requests")

OUTCOME_BY_ERROR: dict[type[BaseException], str] = {
    RequestError: outcomes.INVALID,
    OverloadError: outcomes.OVERLOADED,
    DeadlineError: outcomes.DEADLINE,
    UnavailableError: outcomes.UNAVAILABLE,
    UnknownModelError: outcomes.UNKNOWN,
    ScoreError: outcomes.NOT_FINITE,
    asyncio.CancelledError: outcomes.CANCELLED,
    ConnectionError: outcomes.CANCELLED,
}


@dataclass(frozen=True)
class Call:
    """What a face knows of a request beside the request.

    Attributes:
        face: that it came by, ``http`` or ``grpc``.
        model: that it names; None for the only one.
        version: that it names; None for the one that answers.
        request_id: of the message, for the log.
        timeout_s: of the caller; None for the server's.
        began_at: monotonic seconds.
    """

    face: str
    model: str | None
    version: str | None
    request_id: str
    timeout_s: float | None
    began_at: float


class Service:
    """Requests in, answers out; made and used in one event loop.

    Args:
        models: that answer.
        metrics: where requests are counted.
        config: limits and shares.
    """

    def __init__(self, models: Models, metrics: ServerMetrics, config: ServerConfig) -> None:
        self.models = models
        self.metrics = metrics
        self.config = config
        self.limits = RequestLimits(
            config.max_requests, config.max_candidates, config.max_events, config.max_values
        )
        self.intake = Intake(config.max_inflight_bytes, metrics.refuse)
        self.view = LiveView()
        self.is_draining = False
        self._num_checks = 0
        self._streams: set[Stream] = set()
        limits = step_limits(config)
        seed = random.randrange(2**32)
        self._shadow = ShadowParity(config.shadow_share, limits.part_candidates, seed)
        self._scheduler = Scheduler(limits, config.queue_requests, self)
        metrics.queue_requests.set_function(lambda: self._scheduler.num_waiting)
        metrics.streams_open.set_function(lambda: len(self._streams))
        metrics.inflight_bytes.set_function(lambda: self.intake.num_bytes)

    @property
    def is_ready(self) -> bool:
        """Whether a request that comes now will be answered."""
        return not self.is_draining and bool(self.models.all())

    async def rank(self, call: Call, served: Served, raw: Mapping[str, Any]) -> Answer:
        """Score one request.

        Args:
            call: how it came.
            served: the version that answers.
            raw: the decoded request, in the project's one request format.

        Raises:
            RequestError: naming what came and what was allowed.
            OverloadError: if too many wait.
            DeadlineError: if its time has passed.
            ScoreError: if a score is not finite.
        """
        [answer] = await self.rank_all(call, served, [raw])
        return answer

    async def rank_all(
        self, call: Call, served: Served, raws: Sequence[Mapping[str, Any]]
    ) -> list[Answer]:
        """Score the requests of one message, all or none.

        Raises:
            KVShareError: as ``rank``, for the first that cannot be scored.
        """
        deadline = self._deadline(call)
        jobs = [Job(served.engine, self._parse(call, raw, served), deadline) for raw in raws]
        try:
            for job in jobs:
                self.queue(job)
            answers = await asyncio.gather(*map(self.finish, jobs))
        finally:
            for job in jobs:
                job.answer.cancel()  # Of those that fail, the others are wanted no more.
        for job, answer in zip(jobs, answers, strict=True):
            self._tell(call, served.name, job, answer)
        return answers

    def queue(self, job: Job) -> None:
        """Send a job on its way.

        Raises:
            OverloadError: if too many wait.
        """
        try:
            self._scheduler.submit(job)
        except OverloadError:
            self.metrics.refuse(outcomes.QUEUE_LENGTH)
            raise

    async def finish(self, job: Job) -> Answer:
        """What comes of a job; if nobody waits for it any more, no more of it is scored.

        Raises:
            DeadlineError: if its time has passed.
            ScoreError: if a score is not finite.
        """
        try:
            return await asyncio.wait_for(job.answer, job.deadline - time.monotonic())
        except asyncio.TimeoutError as error:
            waited_ms = (time.monotonic() - job.queued_at) * 1e3
            raise DeadlineError(
                f"the deadline passed after {waited_ms:.0f} ms, {len(job.scores)} of "
                f"{job.request.num_candidates} candidates were scored"
            ) from error

    @contextmanager
    def stream(self, call: Call, served: Served, raw: Mapping[str, Any]) -> Iterator["Stream"]:
        """A user whose candidates come in groups; its K/V is held until the block ends.

        The block must end by the stream's deadline: until then it counts as open.

        Args:
            call: how it came.
            served: the version that answers.
            raw: a request; its candidates are those of the first group.

        Raises:
            OverloadError: if too many streams are open.
            RequestError: naming what came and what was allowed.
        """
        if len(self._streams) >= self.config.max_streams:
            self.metrics.refuse(outcomes.STREAMS)
            raise OverloadError(
                f"{len(self._streams)} streams are open; at most {self.config.max_streams} may be"
            )
        most_s = self.config.stream_timeout_s
        timeout_s = most_s if call.timeout_s is None else min(call.timeout_s, most_s)
        user = self._parse(call, raw, served)
        stream = Stream(self, served, user, call.began_at + timeout_s)
        self._streams.add(stream)
        try:
            yield stream
        except DeadlineError:
            self.metrics.refuse(outcomes.STREAM_TIME)
            raise
        finally:
            self._streams.discard(stream)
            stream.cancel()
            stream.release()

    async def forget(self, user_id: str) -> dict[str, int]:
        """Forget a user here; nothing of requests that came before is kept.

        Args:
            user_id: as ``canonical_id`` spells it.

        Returns:
            Bytes of K/V that were dropped, by tier.

        Raises:
            UnavailableError: naming the tiers that could not be reached, or if no model is loaded;
                to be asked again.
        """
        # Not in the event loop: disk and Redis are waited for.
        dropped = await asyncio.to_thread(self.models.forget, user_id)
        self._shadow.forget(user_id)
        failed = [tier for tier, num_bytes in dropped.items() if num_bytes is None]
        if failed:
            raise UnavailableError(
                f"the user is not forgotten yet: tier {' and '.join(failed)} could not be reached; "
                "ask again"
            )
        bytes_by_tier = {tier: num_bytes or 0 for tier, num_bytes in dropped.items()}
        logger.info("a user is forgotten; bytes dropped by tier: %s", bytes_by_tier)
        return bytes_by_tier

    def close(self) -> None:
        """Stop scoring; nobody may be waiting for it any more."""
        self._scheduler.close()
        self.intake.close()

    def to_json(self) -> dict[str, Any]:
        """The live state, for the page."""
        drift = max((served.drift for served in self.models.all()), default=0.0)
        parity = {
            "checks": self._num_checks,
            # JSON has no infinity: null where one of the two scores was no number.
            "drift": drift if math.isfinite(drift) else None,
            "limit": self.config.shadow_limit,
            "alarm": bool(self.models.names_without_cache),
        }
        return {
            **self.view.to_json(),
            "ready": self.is_ready,
            "draining": self.is_draining,
            "queue": {
                "requests": self._scheduler.num_waiting,
                "limit": self.config.queue_requests,
            },
            **cache_to_json(self.metrics.cache),
            "models": [standing._asdict() for standing in self.models.standings()],
            "parity": parity,
        }

    def stepped(self, parts: Sequence[Part]) -> None:
        """A step begins; see ``Observer``."""
        self.view.step(len(parts))
        self.metrics.batch_requests.observe(len(parts))
        self.metrics.batch_candidates.observe(sum(part.num_candidates for part in parts))

    def answered(self, job: Job, answer: Answer) -> None:
        """A request was scored."""
        self._offer(job, answer)

    def unscored(self, job: Job, unscored: Unscored) -> None:
        """A request got no finite scores."""
        self.metrics.not_finite.inc()
        self._offer(job, unscored)

    def _offer(self, job: Job, answer: Answer | Unscored) -> None:
        self._shadow.offer(job.engine, job.request, answer)
        if self.models.has_forgotten(job.request):  # Asked last: whoever forgets asks it first.
            self._shadow.forget(job.request.user_id)

    def idle(self) -> bool:
        """Check an answer against what the model says without the cache."""
        checked = self._shadow.check()
        if checked is not None:
            sample, drift = checked
            for served in self.models.all():
                if served.engine is sample.engine:
                    self._note_drift(served, drift)
        return self._shadow.has_more

    def _note_drift(self, served: Served, drift: float) -> None:
        self._num_checks += 1
        served.drift = max(drift, served.drift)
        self.metrics.parity_checks.labels(served.name).inc()
        self.metrics.parity_drift.labels(served.name).set(served.drift)
        if not drift <= self.config.shadow_limit:
            self.models.bypass(served.engine)
            logger.error(
                "cached scores of model %s were off by %g, %g is allowed: it is scored without its "
                "cache from now on",
                *(served.name, drift, self.config.shadow_limit),
            )

    @contextmanager
    def counted(self, call: Call) -> Iterator[Served]:
        """The version that answers a call, which is counted and logged however it ends.

        Raises:
            UnavailableError: if no model is loaded.
            UnknownModelError: naming what is served.
        """
        outcome, model, message = outcomes.OK, "", ""
        try:
            served = self.models.get(call.model, call.version)
            model = served.name
            with served.open():
                yield served
        except BaseException as error:
            known = (of for kind, of in OUTCOME_BY_ERROR.items() if isinstance(error, kind))
            outcome = next(known, outcomes.INTERNAL)
            message = str(error)
            raise
        finally:
            seconds = time.monotonic() - call.began_at
            self.metrics.requests.labels(model, call.face, outcome).inc()
            self.metrics.request_seconds.labels(model, call.face).observe(seconds)
            self.view.end(outcome, seconds * 1e3)
            if outcome != outcomes.OK:
                _log(call, call.request_id, model, outcome, error=message)

    def _parse(self, call: Call, raw: Mapping[str, Any], served: Served) -> Request:
        check_limits(raw, self.limits)
        given, raw = raw, sort_history(raw) if self.config.history_order == SORT else raw
        request = parse_request(raw, served.engine.schema)
        self.metrics.sorted_histories.labels(served.name).inc(raw is not given)
        self.metrics.count_ids(served.name, count_ids(request))
        if request.request_id is None:
            request = replace(request, request_id=call.request_id)
        came_at = steady_clock()() - (time.monotonic() - call.began_at)
        request = replace(request, came_at=came_at)
        self.models.remember(served.name, request, user_columns(raw, served.engine.schema))
        return request

    def _deadline(self, call: Call) -> float:
        most_s = self.config.timeout_ms / 1e3
        return call.began_at + (most_s if call.timeout_s is None else min(call.timeout_s, most_s))

    def _tell(self, call: Call, model: str, job: Job, answer: Answer) -> None:
        """Where an answered request's time went, and what the cache did."""
        assert job.started_at is not None
        parse_s = job.queued_at - call.began_at
        queue_s = job.started_at - job.queued_at
        for stage, seconds in (
            (outcomes.PARSE, parse_s),
            (outcomes.QUEUE, queue_s),
            (outcomes.SCORING, job.score_s),
        ):
            self.metrics.stage_seconds.labels(model, stage).observe(seconds)
        if answer.cache.status != HIT:
            self.view.miss(model, answer.request_id, answer.cache)
        if self.config.log_requests:
            _log(
                *(call, answer.request_id, model, outcomes.OK),
                model_version=answer.model_version,
                candidates=len(answer.scores),
                cache=vars(answer.cache),
                score_ms=round(job.score_s * 1e3, 3),
            )


def _log(call: Call, request_id: str | int | None, model: str, outcome: str, **more: Any) -> None:
    """One line for one request, however it ended."""
    ms = round((time.monotonic() - call.began_at) * 1e3, 3)
    fields = {"request_id": request_id, "face": call.face, "model": model, "outcome": outcome}
    is_ours = outcome in (outcomes.INTERNAL, outcomes.NOT_FINITE)
    level = logging.ERROR if is_ours else logging.INFO
    request_logger.log(level, outcome, extra={**fields, "ms": ms, **more})


def _see_error(done: "asyncio.Future[Answer]") -> None:
    """What failed for a client that has gone is no error of ours."""
    if not done.cancelled():
        done.exception()


class Group:
    """Candidates of a stream that are on their way; their scores come in parts.

    Attributes:
        job: that scores them.
    """

    def __init__(self, service: Service, job: Job) -> None:
        self.job = job
        self._service = service
        self._parts: asyncio.Queue[Answer | None] = asyncio.Queue()
        job.on_scores = self._take
        job.answer.add_done_callback(lambda _: self._parts.put_nowait(None))

    async def parts(self) -> AsyncIterator[tuple[int, Answer]]:
        """The place of a part's first candidate in the stream, and its scores as an answer.

        Raises:
            DeadlineError: if the stream's time has passed.
            ScoreError: if a score is not finite.
        """
        place = self.job.first_candidate
        finishing = asyncio.ensure_future(self._service.finish(self.job))
        finishing.add_done_callback(_see_error)
        try:
            while (part := await self._parts.get()) is not None:
                yield place, part
                place += len(part.scores)
            await finishing
        finally:
            finishing.cancel()

    def _take(self, scores: list[float], use: CacheUse) -> None:
        """Called by the scheduler as a part is done."""
        self._parts.put_nowait(self.job.engine.answer(self.job.request, scores, use))


class Stream:
    """A user whose candidates come in groups, all scored over the K/V that the first of them read.

    Args:
        service: that scores them.
        served: the version that answers, from the first group to the last.
        user: the request that opened it, with the candidates of the first group.
        deadline: monotonic seconds, of the whole stream.
    """

    def __init__(self, service: Service, served: Served, user: Request, deadline: float) -> None:
        self.user = user
        self.deadline = deadline
        self._service = service
        self._served = served
        self._reading = Reading(user)
        self._num_candidates = 0
        self._open: set[asyncio.Future[Answer]] = set()

    def first(self) -> Group:
        """The group that came with the user.

        Raises:
            OverloadError: if too many wait.
        """
        return self._queued(self.user)

    def next(self, raw: Mapping[str, Any]) -> Group:
        """Another group.

        Args:
            raw: ``candidates`` as in a request, and nothing of the user.

        Raises:
            RequestError: naming what came and what was allowed.
            OverloadError: if too many wait.
            DeadlineError: if its time has passed.
        """
        if time.monotonic() > self.deadline:
            raise DeadlineError("the stream's deadline passed")
        check_limits(raw, self._service.limits)
        request = parse_candidates(raw, self.user, self._served.engine.schema)
        of_group = {
            column: count
            for column, count in count_ids(request).items()
            if column.startswith(candidate_key(""))  # The user was counted with the first group.
        }
        self._service.metrics.count_ids(self._served.name, of_group)
        return self._queued(request)

    def cancel(self) -> None:
        """Score no more of it."""
        for answer in [*self._open]:
            answer.cancel()

    def release(self) -> None:
        """Let go of its K/V."""
        self._reading = Reading(self.user)

    def expire(self) -> DeadlineError:
        """Score no more of it, and tell those that wait why; returns what they are told."""
        error = DeadlineError("the stream's deadline passed")
        for answer in [*self._open]:
            if not answer.done():
                answer.set_exception(error)
        return error

    async def wait(self, awaited: Coroutine[Any, Any, Anything]) -> Anything:
        """Wait for its client, until its deadline.

        Raises:
            DeadlineError: if that has passed.
        """
        try:
            return await asyncio.wait_for(awaited, self.deadline - time.monotonic())
        except asyncio.TimeoutError as error:
            raise DeadlineError("the stream's deadline passed") from error

    def _queued(self, request: Request) -> Group:
        first = self._num_candidates
        job = Job(self._served.engine, request, self.deadline, self._reading, first)
        group = Group(self._service, job)
        self._service.queue(job)
        self._open.add(job.answer)
        job.answer.add_done_callback(_see_error)
        job.answer.add_done_callback(self._open.discard)
        self._num_candidates += request.num_candidates
        return group
