"""What both faces of the server do with a request: check it, queue it, wait for its scores, say so.

The faces translate their protocols to calls of this file and its errors to theirs.
"""

import asyncio
import logging
import random
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torchrec_kvshare.cache.reasons import HIT
from torchrec_kvshare.config import ServerConfig
from torchrec_kvshare.engine import Answer, CacheUse
from torchrec_kvshare.errors import (
    DeadlineError,
    OverloadError,
    RequestError,
    UnavailableError,
    UnknownModelError,
)
from torchrec_kvshare.features import Request, parse_candidates, parse_request
from torchrec_kvshare.serving import metrics as outcomes
from torchrec_kvshare.serving.columns import Limits, check_limits
from torchrec_kvshare.serving.metrics import LiveView, ServerMetrics, cache_to_json
from torchrec_kvshare.serving.models import Models, Served
from torchrec_kvshare.serving.scheduler import Job, Part, Reading, Scheduler, StepLimits
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
        self.limits = Limits(
            config.max_requests, config.max_candidates, config.max_events, config.max_values
        )
        self.view = LiveView()
        self.is_draining = False
        self._shadow = ShadowParity(config.shadow_share, seed=random.randrange(2**32))
        self._num_checks = 0
        self._streams: set[Stream] = set()
        limits = StepLimits(
            config.batch_requests,
            config.batch_candidates,
            config.batch_events,
            config.max_wait_ms / 1e3,
        )
        self._scheduler = Scheduler(limits, config.queue_requests, self)
        metrics.queue_requests.set_function(lambda: self._scheduler.num_waiting)
        metrics.streams_open.set_function(lambda: len(self._streams))

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
        self._scheduler.submit(job)

    async def finish(self, job: Job) -> Answer:
        """What comes of a job; if nobody waits for it any more, no more of it is scored.

        Raises:
            DeadlineError: if its time has passed.
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

        Args:
            call: how it came.
            served: the version that answers.
            raw: a request; its candidates are those of the first group.

        Raises:
            OverloadError: if too many streams are open.
            RequestError: naming what came and what was allowed.
        """
        if len(self._streams) >= self.config.max_streams:
            raise OverloadError(
                f"{len(self._streams)} streams are open; at most {self.config.max_streams} may be"
            )
        most_s = self.config.stream_timeout_s
        timeout_s = most_s if call.timeout_s is None else min(call.timeout_s, most_s)
        user = self._parse(call, raw, served)
        stream = Stream(self, served, user, call.began_at + timeout_s)
        self._streams.add(stream)
        # A client that says nothing more holds K/V no longer than that.
        expiry = asyncio.get_running_loop().call_later(timeout_s, self._release, stream)
        try:
            yield stream
        finally:
            expiry.cancel()
            stream.cancel()
            self._release(stream)

    def _release(self, stream: "Stream") -> None:
        self._streams.discard(stream)
        stream.release()

    def close(self) -> None:
        """Stop scoring; nobody may be waiting for it any more."""
        self._scheduler.close()

    def to_json(self) -> dict[str, Any]:
        """The live state, for the page."""
        parity = {
            "checks": self._num_checks,
            "drift": max((served.drift for served in self.models.all()), default=0.0),
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
        self._shadow.offer(job.engine, job.request, answer)

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
        if drift > self.config.shadow_limit:
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
        request = parse_request(raw, served.engine.schema)
        if request.request_id is None:
            request = replace(request, request_id=call.request_id)
        self.models.hot(served.name).remember(request.user_id, raw)
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
    level = logging.ERROR if outcome == outcomes.INTERNAL else logging.INFO
    request_logger.log(level, outcome, extra={**fields, "ms": ms, **more})


class Group:
    """Candidates of a stream that are on their way; their scores come in parts.

    Attributes:
        job: that scores them.
        first_candidate: place of the first of them among all of the stream.
    """

    def __init__(self, service: Service, job: Job, first_candidate: int) -> None:
        self.job = job
        self.first_candidate = first_candidate
        self._service = service
        self._parts: asyncio.Queue[Answer | None] = asyncio.Queue()
        job.on_scores = self._take
        job.answer.add_done_callback(lambda _: self._parts.put_nowait(None))

    async def parts(self) -> AsyncIterator[tuple[int, Answer]]:
        """The place of a part's first candidate in the stream, and its scores as an answer.

        Raises:
            DeadlineError: if the stream's time has passed.
        """
        place = self.first_candidate
        finishing = asyncio.ensure_future(self._service.finish(self.job))
        try:
            while (part := await self._parts.get()) is not None:
                yield place, part
                place += len(part.scores)
            await finishing
        finally:
            finishing.cancel()

    def _take(self, scores: list[float], use: CacheUse) -> None:
        """Called by the scheduler as a part is done."""
        request_id, version = self.job.request.request_id, self.job.engine.model_version
        self._parts.put_nowait(Answer(request_id, scores, version, use))


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
        self._service = service
        self._served = served
        self._deadline = deadline
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
        if time.monotonic() > self._deadline:
            raise DeadlineError("the stream's deadline passed")
        check_limits(raw, self._service.limits)
        return self._queued(parse_candidates(raw, self.user, self._served.engine.schema))

    def cancel(self) -> None:
        """Score no more of it."""
        for answer in [*self._open]:
            answer.cancel()

    def release(self) -> None:
        """Let go of its K/V."""
        self._reading = Reading(self.user)

    async def wait(self, awaited: Coroutine[Any, Any, Anything]) -> Anything:
        """Wait for its client, until its deadline.

        Raises:
            DeadlineError: if that has passed.
        """
        try:
            return await asyncio.wait_for(awaited, self._deadline - time.monotonic())
        except asyncio.TimeoutError as error:
            raise DeadlineError("the stream's deadline passed") from error

    def _queued(self, request: Request) -> Group:
        job = Job(self._served.engine, request, self._deadline, self._reading)
        group = Group(self._service, job, self._num_candidates)
        self._service.queue(job)
        self._open.add(job.answer)
        job.answer.add_done_callback(self._open.discard)
        self._num_candidates += request.num_candidates
        return group
