"""The service behind the HTTP and the gRPC server: admit, check, queue, answer, count, log.

The servers translate their protocols to calls of this file, and its errors to their statuses.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

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
    append_events,
    parse_candidates,
    parse_events_user,
    parse_request,
    parse_user,
    sort_history,
    user_columns,
)
from torchrec_kvshare.features.request import Request, count_ids
from torchrec_kvshare.features.schema import FeatureSchema, candidate_key
from torchrec_kvshare.scoring.encoded_user import EncodedUser
from torchrec_kvshare.scoring.engine import Answer, Unscored
from torchrec_kvshare.serving import metrics as outcomes
from torchrec_kvshare.serving.columns import RequestLimits, check_limits
from torchrec_kvshare.serving.intake import Intake
from torchrec_kvshare.serving.metrics import LiveView, ServerMetrics, cache_to_json
from torchrec_kvshare.serving.models import Models, Served
from torchrec_kvshare.serving.prefetch import NOT_HOT, QUEUED, Prefetches
from torchrec_kvshare.serving.scheduler import Job, Part, Scheduler, batch_limits
from torchrec_kvshare.serving.shadow import ShadowParity

Anything = TypeVar("Anything")

logger = logging.getLogger(__name__)
request_logger = logging.getLogger("torchrec_kvshare.requests")

INTERNAL_ERROR = "an error inside the server; its log has more"
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
    """What a server knows of a request besides its body.

    Attributes:
        server: that received it, ``http`` or ``grpc``.
        model: name; None for the only model.
        version: of the model; None for the one that answers.
        request_id: of the message, for the log.
        timeout_s: of the caller; None for the server's.
        began_at: monotonic seconds.
    """

    server: str
    model: str | None
    version: str | None
    request_id: str
    timeout_s: float | None
    began_at: float


class Service:
    """Scores requests; made and used in one event loop.

    Args:
        models: that answer.
        metrics: of the server.
        config: limits and shares.
    """

    def __init__(self, models: Models, metrics: ServerMetrics, config: ServerConfig) -> None:
        self.models = models
        self.metrics = metrics
        self.config = config
        self.limits = RequestLimits(
            # More could never wait together, however often they came.
            requests=min(config.max_requests, config.queue_requests),
            candidates=config.max_candidates,
            events=config.max_events,
            values=config.max_values,
        )
        self.intake = Intake(config.max_inflight_bytes, metrics.refuse)
        self.view = LiveView()
        self.is_draining = False
        self._num_checks = 0
        self._streams: set[Stream] = set()
        limits = batch_limits(config)
        seed = random.randrange(2**32)
        self._shadow = ShadowParity(config.shadow_share, limits.part_candidates, seed)
        self._scheduler = Scheduler(limits, config.queue_requests, self)
        self.prefetches = Prefetches(config.queue_prefetches, models, metrics)
        metrics.read("queue_requests", lambda: self._scheduler.num_waiting)
        metrics.read("streams_open", lambda: len(self._streams))
        metrics.read("inflight_bytes", lambda: self.intake.num_bytes)
        metrics.read("pinned_users", lambda: len(models.pinned))

    @property
    def is_ready(self) -> bool:
        """Whether a request that comes now is answered."""
        return not self.is_draining and bool(self.models.all())

    @contextmanager
    def admit(self, call: Call) -> Iterator[Served]:
        """Yield the version that answers a call; count and log the call however it ends.

        Admission comes before the body of a request is decoded: refusing it must cost little.

        Raises:
            UnavailableError: if no model is loaded.
            UnknownModelError: naming what is served.
            OverloadError: if the queue is full.
        """
        outcome, model, message = outcomes.OK, "", ""
        try:
            served = self.models.get(call.model, call.version)
            model = served.name
            with served.open():
                self.check_queue()
                yield served
        except BaseException as error:
            known = (of for kind, of in OUTCOME_BY_ERROR.items() if isinstance(error, kind))
            outcome = next(known, outcomes.INTERNAL)
            message = str(error)
            raise
        finally:
            seconds = time.monotonic() - call.began_at
            self.metrics.count("requests", model, call.server, outcome)
            self.metrics.observe("request_seconds", seconds, model, call.server)
            self.view.end(outcome, seconds * 1e3)
            if outcome != outcomes.OK:
                _log(call, call.request_id, model, outcome, error=message)

    def would_admit(self, model: str | None, version: str | None) -> bool:
        """Whether ``admit`` would let a request pass now; nothing is counted."""
        return self.models.has(model, version) and self._scheduler.has_room()

    def check_queue(self, num_requests: int = 1) -> None:
        """Check that the queue has room for requests, and count a refusal.

        Raises:
            OverloadError: if it has not.
        """
        try:
            self._scheduler.check_room(num_requests)
        except OverloadError:
            self.metrics.refuse(outcomes.QUEUE_LENGTH)
            raise

    def check_streams(self) -> None:
        """Check that another stream may be opened, and count a refusal.

        Raises:
            OverloadError: if too many streams are open.
        """
        if len(self._streams) >= self.config.max_streams:
            self.metrics.refuse(outcomes.STREAMS)
            raise OverloadError(
                f"{len(self._streams)} streams are open; at most {self.config.max_streams} may be"
            )

    async def rank(self, call: Call, served: Served, raw: Mapping[str, Any]) -> Answer:
        """Score one request.

        Args:
            call: that it came with.
            served: the version that answers.
            raw: the decoded request, in the project's one request format.

        Raises:
            RequestError: naming what came and what was allowed.
            OverloadError: if the queue is full.
            DeadlineError: if the deadline has passed.
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
        self.check_queue(len(raws))  # The queue may have filled since the call was admitted.
        deadline = self._deadline(call)
        jobs = [Job(served.engine, self._parse(call, raw, served), deadline) for raw in raws]
        try:
            for job in jobs:
                self.queue(job)
            answers = await asyncio.gather(*map(self.finish, jobs))
        finally:
            for job in jobs:
                job.answer.cancel()  # If one failed, the others are not needed.
        for job, answer in zip(jobs, answers, strict=True):
            self._record(call, served.name, job, answer)
        return answers

    def queue(self, job: Job) -> None:
        """Submit a job to the scheduler.

        Raises:
            OverloadError: if the queue is full.
        """
        self.check_queue()
        self._scheduler.submit(job)

    async def finish(self, job: Job) -> Answer:
        """Wait for the answer of a job, or cancel it at its deadline.

        Raises:
            DeadlineError: if the deadline has passed.
            ScoreError: if a score is not finite.
        """
        try:
            return await asyncio.wait_for(job.answer, job.deadline - time.monotonic())
        except asyncio.TimeoutError as error:
            waited_ms = (time.monotonic() - job.queued_at) * 1e3
            raise DeadlineError(
                f"the deadline passed after {waited_ms:.0f} ms, {job.num_scored} of "
                f"{job.request.num_candidates} candidates were scored"
            ) from error

    @contextmanager
    def stream(self, call: Call, served: Served, raw: Mapping[str, Any]) -> Iterator["Stream"]:
        """Open a stream: a user whose candidates come in groups, its K/V held until the block ends.

        The block must end by the stream's deadline; the stream counts as open until then.

        Args:
            call: that it came with.
            served: the version that answers.
            raw: a request with the candidates of the first group.

        Raises:
            OverloadError: if too many streams are open, or the queue is full.
            RequestError: naming what came and what was allowed.
        """
        self.check_streams()
        self.check_queue()
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

    def prefetch(self, call: Call, raw: Mapping[str, Any]) -> str:
        """Queue a user to be encoded while no request waits; see ``Prefetches.offer``.

        Args:
            call: that it came with.
            raw: a request; its candidates are not read.

        Raises:
            RequestError: naming what came and what was allowed.
            OverloadError: if too many wait.
            UnavailableError: if no model is loaded.
            UnknownModelError: naming what is served.
        """
        served = self.models.get(call.model, call.version)
        _, request = self._checked(call, raw, served, parse_user)
        return self._prefetch(served, request, self._deadline(call))

    def extend(self, call: Call, raw: Mapping[str, Any]) -> str:
        """Queue a hot user whose history has grown, to be extended while no request waits.

        The events are appended to those of its last request. Scores cannot depend on it: the next
        request brings its own history, and what differs from it is encoded.

        Args:
            call: that it came with.
            raw: the user and its new events, see ``append_events``.

        Returns:
            As ``prefetch``, or ``not_hot``: the user's last request is not remembered.

        Raises:
            RequestError: naming what came and what was allowed; events before the last one too.
            OverloadError: if too many users wait.
        """
        if not self.config.idle_events:
            raise RequestError("server.idle_events is false; events are not taken")
        served = self.models.get(call.model, call.version)
        hot = self.models.hot(served.name)
        check_limits(raw, self.limits)
        user_id = parse_events_user(raw)
        known = hot.last(user_id)
        if known is None:
            self.metrics.count("prefetches", NOT_HOT)
            return NOT_HOT
        grown, request = self._checked(call, append_events(known, raw), served, parse_user)
        hot.replace(user_id, grown)
        return self._prefetch(served, request, self._deadline(call))

    def _prefetch(self, served: Served, request: Request, deadline: float) -> str:
        outcome = self.prefetches.offer(served, request, deadline)
        if outcome == QUEUED:
            self._scheduler.submit_background(self.prefetches.run_next)
        return outcome

    async def forget(self, user_id: str) -> dict[str, int]:
        """Forget a user on this server; nothing of earlier requests is kept.

        Args:
            user_id: as ``canonical_id`` spells it.

        Returns:
            Bytes of K/V that were dropped, by tier.

        Raises:
            UnavailableError: naming the tiers that could not be reached, or if no model is loaded;
                the caller should ask again.
        """
        # Outside the event loop: it waits for disk and Redis.
        dropped = await asyncio.to_thread(self.models.forget, user_id)
        self._shadow.forget(user_id)
        self.prefetches.forget(user_id)
        bytes_by_tier = _all_reached(dropped, "the user is not forgotten yet")
        logger.info("a user is forgotten; bytes dropped by tier: %s", bytes_by_tier)
        return bytes_by_tier

    async def clear(self, kv_version: str) -> dict[str, int]:
        """Drop one version of K/V from every tier; requests that come later encode it anew.

        Args:
            kv_version: see ``KVVersion``.

        Returns:
            Bytes of K/V that were dropped, by tier.

        Raises:
            UnavailableError: as ``forget``.
        """
        dropped = await asyncio.to_thread(self.models.clear, kv_version)
        bytes_by_tier = _all_reached(dropped, "the K/V is not cleared yet")
        logger.info("K/V %s is cleared; bytes dropped by tier: %s", kv_version, bytes_by_tier)
        return bytes_by_tier

    async def pin(self, user_ids: Sequence[str]) -> int:
        """Pin users to the pages of every version, as far as ``cache.pinned_bytes`` has room.

        Returns:
            How many users are pinned now.

        Raises:
            RequestError: if nothing is reserved for pinned users, or too many would be pinned.
            UnavailableError: if no model is loaded.
        """
        stores = [served.store for served in self.models.all() if served.store is not None]
        if stores and not any(store.caches[0].rules.pinned_bytes for store in stores):
            raise RequestError("cache.pinned_bytes is 0; no user can be pinned")
        num_pinned = len(self.models.pinned | {*user_ids})
        if num_pinned > self.config.pinned_users:
            raise RequestError(
                f"{num_pinned} users would be pinned; {self.config.pinned_users} are allowed by "
                "server.pinned_users"
            )
        self.models.pin(user_ids)
        return len(self.models.pinned)

    async def unpin(self, user_ids: Sequence[str]) -> int:
        """Unpin users; return how many are still pinned.

        Raises:
            UnavailableError: if no model is loaded.
        """
        self.models.unpin(user_ids)
        return len(self.models.pinned)

    def close(self) -> None:
        """Stop scoring; call it when no request is in flight."""
        self._scheduler.close()
        self.intake.close()

    def to_json(self) -> dict[str, Any]:
        """Return the live state, for the page."""
        drift = max((served.drift for served in self.models.all()), default=0.0)
        parity = {
            "checks": self._num_checks,
            # JSON has no infinity: null if one of the two scores was not finite.
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

    def batched(self, parts: Sequence[Part]) -> None:
        """Observe the size of a batch; see ``Observer``."""
        num_candidates = sum(part.num_candidates for part in parts)
        self.view.batch(len(parts))
        self.metrics.observe("batch_requests", len(parts))
        self.metrics.observe("batch_candidates", num_candidates)

    def answered(self, job: Job, answer: Answer) -> None:
        """Offer an answer to the shadow check."""
        self._offer(job, answer)

    def unscored(self, job: Job, unscored: Unscored) -> None:
        """Count scores that are not finite, and offer them to the shadow check."""
        self.metrics.count("not_finite_scores")
        self._offer(job, unscored)

    def _offer(self, job: Job, answer: Answer | Unscored) -> None:
        self._shadow.offer(job.engine, job.request, answer)
        # Checked after the offer: forget() marks the user before it clears the samples.
        if self.models.has_forgotten(job.request):
            self._shadow.forget(job.request.user_id)

    def idle(self) -> bool:
        """Check a cached answer against the scores without the cache; see ``Observer``."""
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
        self.metrics.count("parity_checks", served.name)
        self.metrics.set("parity_drift", served.drift, served.name)
        if not drift <= self.config.shadow_limit:
            self.models.bypass(served.engine)
            logger.error(
                "cached scores of model %s were off by %g, %g is allowed: its cache is off from "
                "now on",
                *(served.name, drift, self.config.shadow_limit),
            )

    def _checked(
        self,
        call: Call,
        raw: Mapping[str, Any],
        served: Served,
        parse: Callable[[Mapping[str, Any], FeatureSchema], Request],
    ) -> tuple[Mapping[str, Any], Request]:
        """Parse a request within the limits; also return it raw, its history in order."""
        check_limits(raw, self.limits)
        given, raw = raw, sort_history(raw) if self.config.history_order == SORT else raw
        request = parse(raw, served.engine.schema)
        self.metrics.count("sorted_histories", served.name, amount=int(raw is not given))
        came_at = steady_clock()() - (time.monotonic() - call.began_at)
        return raw, replace(request, came_at=came_at)

    def _parse(self, call: Call, raw: Mapping[str, Any], served: Served) -> Request:
        raw, request = self._checked(call, raw, served, parse_request)
        self.metrics.count_ids(served.name, count_ids(request))
        if request.request_id is None:
            request = replace(request, request_id=call.request_id)
        self.models.remember(served.name, request, user_columns(raw, served.engine.schema))
        return request

    def _deadline(self, call: Call) -> float:
        most_s = self.config.timeout_ms / 1e3
        return call.began_at + (most_s if call.timeout_s is None else min(call.timeout_s, most_s))

    def _record(self, call: Call, model: str, job: Job, answer: Answer) -> None:
        """Record the stages of an answered request, and what the cache did."""
        assert job.started_at is not None
        parse_s = job.queued_at - call.began_at
        queue_s = job.started_at - job.queued_at
        for stage, seconds in (
            (outcomes.PARSE, parse_s),
            (outcomes.QUEUE, queue_s),
            (outcomes.SCORING, job.score_s),
        ):
            self.metrics.observe("stage_seconds", seconds, model, stage)
        if answer.cache.status != HIT:
            self.view.miss(model, answer.request_id, answer.cache)
        if self.config.log_requests:
            _log(
                call,
                answer.request_id,
                model,
                outcomes.OK,
                model_version=answer.model_version,
                candidates=job.request.num_candidates,
                cache=vars(answer.cache),
                score_ms=round(job.score_s * 1e3, 3),
            )


def _all_reached(dropped: Mapping[str, int | None], why: str) -> dict[str, int]:
    """Return bytes by tier, if every tier was reached.

    Raises:
        UnavailableError: naming the tiers that could not be reached; the caller should ask again.
    """
    failed = [tier for tier, num_bytes in dropped.items() if num_bytes is None]
    if failed:
        names = " and ".join(failed)
        raise UnavailableError(f"{why}: tier {names} could not be reached; ask again")
    return {tier: num_bytes or 0 for tier, num_bytes in dropped.items()}


def _log(call: Call, request_id: str | int | None, model: str, outcome: str, **more: Any) -> None:
    """Log one line for one request, however it ended."""
    ms = round((time.monotonic() - call.began_at) * 1e3, 3)
    fields = {"request_id": request_id, "server": call.server, "model": model, "outcome": outcome}
    is_our_error = outcome in (outcomes.INTERNAL, outcomes.NOT_FINITE)
    level = logging.ERROR if is_our_error else logging.INFO
    request_logger.log(level, outcome, extra={**fields, "ms": ms, **more})


def _ignore_error(done: "asyncio.Future[Answer]") -> None:
    """Fetch the error of a job whose client has gone: asyncio would log it as never retrieved."""
    if not done.cancelled():
        done.exception()


class Group:
    """A group of a stream's candidates; its scores come in parts.

    Attributes:
        job: that scores it.
    """

    def __init__(self, service: Service, job: Job) -> None:
        self.job = job
        self._service = service
        self._parts: asyncio.Queue[Answer | None] = asyncio.Queue()
        job.on_scores = self._take
        job.answer.add_done_callback(lambda _: self._parts.put_nowait(None))

    async def parts(self) -> AsyncIterator[tuple[int, Answer]]:
        """Yield the index of a part's first candidate in the stream, and its scores as an answer.

        Raises:
            DeadlineError: if the stream's deadline has passed.
            ScoreError: if a score is not finite.
        """
        first_candidate = self.job.first_candidate
        finishing = asyncio.ensure_future(self._service.finish(self.job))
        finishing.add_done_callback(_ignore_error)
        try:
            while (part := await self._parts.get()) is not None:
                yield first_candidate, part
                first_candidate += len(part.ranking_scores)
            await finishing
        finally:
            finishing.cancel()

    def _take(self, scores: Tensor, use: CacheUse) -> None:
        """Receive the scores of a part from the scheduler."""
        self._parts.put_nowait(self.job.engine.answer(self.job.request, scores, use))


class Stream:
    """A user whose candidates come in groups, all scored over the K/V of the first group.

    Args:
        service: that scores the groups.
        served: the version that answers all groups.
        user: the request that opened the stream, with the candidates of the first group.
        deadline: monotonic seconds, of the whole stream.
    """

    def __init__(self, service: Service, served: Served, user: Request, deadline: float) -> None:
        self.user = user
        self.deadline = deadline
        self._service = service
        self._served = served
        self._encoded = EncodedUser(served.engine, user)
        self._num_candidates = 0
        self._open: set[asyncio.Future[Answer]] = set()

    def first(self) -> Group:
        """Queue the group that came with the user.

        Raises:
            OverloadError: if the queue is full.
        """
        return self._queued(self.user)

    def check_room(self) -> None:
        """Check that another group may come; called before the group is decoded.

        Raises:
            DeadlineError: if the stream's deadline has passed.
            OverloadError: if the queue is full.
        """
        if time.monotonic() > self.deadline:
            raise DeadlineError("the stream's deadline passed")
        self._service.check_queue()

    def next(self, raw: Mapping[str, Any]) -> Group:
        """Queue another group.

        Args:
            raw: ``candidates`` as in a request, and nothing of the user.

        Raises:
            RequestError: naming what came and what was allowed.
            OverloadError: if the queue is full.
            DeadlineError: if the stream's deadline has passed.
        """
        self.check_room()
        check_limits(raw, self._service.limits)
        request = parse_candidates(raw, self.user, self._served.engine.schema)
        of_group = {
            column: count
            for column, count in count_ids(request).items()
            if column.startswith(candidate_key(""))  # The first group counted the user's ids.
        }
        self._service.metrics.count_ids(self._served.name, of_group)
        return self._queued(request)

    def cancel(self) -> None:
        """Cancel all groups in flight."""
        for answer in [*self._open]:
            answer.cancel()

    def release(self) -> None:
        """Release its K/V."""
        self._encoded = EncodedUser(self._served.engine, self.user)

    def expire(self) -> DeadlineError:
        """Fail all groups in flight as past the deadline; return that error."""
        error = DeadlineError("the stream's deadline passed")
        for answer in [*self._open]:
            if not answer.done():
                answer.set_exception(error)
        return error

    async def wait(self, awaited: Coroutine[Any, Any, Anything]) -> Anything:
        """Wait for the client, until the stream's deadline.

        Raises:
            DeadlineError: if the deadline has passed.
        """
        try:
            return await asyncio.wait_for(awaited, self.deadline - time.monotonic())
        except asyncio.TimeoutError as error:
            raise DeadlineError("the stream's deadline passed") from error

    def _queued(self, request: Request) -> Group:
        job = Job(
            self._served.engine,
            request,
            self.deadline,
            encoded=self._encoded,
            first_candidate=self._num_candidates,
        )
        group = Group(self._service, job)
        self._service.queue(job)
        self._open.add(job.answer)
        job.answer.add_done_callback(_ignore_error)
        job.answer.add_done_callback(self._open.discard)
        self._num_candidates += request.num_candidates
        return group
