"""The gRPC server: the Open Inference Protocol, with the stubs of Triton's client.

A stream takes single requests and Triton's sequences: the first message of a sequence has the user
and the history, later messages have only candidates, and all are scored over the same K/V. The
server also answers gRPC's health protocol, ``grpc.health.v1``.
"""

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from numpy.typing import NDArray
from tritonclient.grpc import service_pb2

from torchrec_kvshare.errors import (
    DeadlineError,
    KVShareError,
    NoRoomError,
    OverloadError,
    RequestError,
    ScoreError,
    UnavailableError,
    UnknownModelError,
)
from torchrec_kvshare.features.decode import cut
from torchrec_kvshare.features.parse import check_request_id
from torchrec_kvshare.scoring.engine import Answer
from torchrec_kvshare.serving.columns import output_tensors, raw_candidates, raw_requests
from torchrec_kvshare.serving.intake import InflightBytes
from torchrec_kvshare.serving.metrics import (
    ANSWER_TIME,
    BODY_TIME,
    CALLS,
    IDLE_TIME,
    TOKEN,
    WATCHERS,
    ServerMetrics,
)
from torchrec_kvshare.serving.models import Served
from torchrec_kvshare.serving.oip import (
    decode_infer,
    encode_infer,
    model_metadata,
    parse_infer,
    requested_report,
    server_metadata,
)
from torchrec_kvshare.serving.service import INTERNAL_ERROR, Call, Group, Service, Stream

logger = logging.getLogger(__name__)

GRPC = "grpc"
CODE_BY_ERROR: dict[type[KVShareError], grpc.StatusCode] = {
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownModelError: grpc.StatusCode.NOT_FOUND,
    OverloadError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NoRoomError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    ScoreError: grpc.StatusCode.INTERNAL,
}
Message: TypeAlias = service_pb2.ModelInferRequest
Reply: TypeAlias = service_pb2.ModelInferResponse
Context: TypeAlias = grpc.aio.ServicerContext
Pending: TypeAlias = "asyncio.Queue[tuple[Incoming, asyncio.Future[Reply]] | None]"
SERVICE = "inference.GRPCInferenceService"
HEALTH_SERVICE = "grpc.health.v1.Health"
WATCH_S = 0.1  # between two checks of a watched status
# Methods that take one message and score nothing.
REQUEST_BY_METHOD = {
    "ServerLive": service_pb2.ServerLiveRequest,
    "ServerReady": service_pb2.ServerReadyRequest,
    "ServerMetadata": service_pb2.ServerMetadataRequest,
    "ModelReady": service_pb2.ModelReadyRequest,
    "ModelMetadata": service_pb2.ModelMetadataRequest,
}
# Methods whose calls may stay open for long.
LIMIT_BY_METHOD = {
    f"/{SERVICE}/ModelInfer": CALLS,
    f"/{SERVICE}/ModelStreamInfer": CALLS,
    f"/{HEALTH_SERVICE}/Watch": WATCHERS,
}
PREFETCH = "prefetch"  # parameter of a message: encode its users ahead and score nothing
KEY_BY_LIMIT = {BODY_TIME: "server.body_timeout_s", IDLE_TIME: "server.idle_timeout_s"}


class GrpcServer:
    """The methods of the protocols.

    Args:
        service: that answers.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._num_open = 0
        self._is_closed = False

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register the methods with a gRPC server.

        Requests are read and parsed in this file: the library waits for a message for ever, and
        reports bytes that are no message as an error of the server.
        """
        service = self._service
        handlers = {
            name: _answering(service, getattr(self, name), partial(_parsed, kind=kind))
            for name, kind in REQUEST_BY_METHOD.items()
        }
        handlers["ModelInfer"] = _answering(service, self.ModelInfer, self._decode)
        handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
            self.ModelStreamInfer, response_serializer=_serialized
        )
        parse_health = partial(_parsed, kind=health_pb2.HealthCheckRequest)
        health_handlers = {
            "Check": _answering(service, self.Check, parse_health),
            "Watch": grpc.stream_stream_rpc_method_handler(self.Watch),
        }
        server.add_generic_rpc_handlers(
            (
                grpc.method_handlers_generic_handler(SERVICE, handlers),
                grpc.method_handlers_generic_handler(HEALTH_SERVICE, health_handlers),
            )
        )

    async def drain(self, timeout_s: float) -> None:
        """Refuse new calls as UNAVAILABLE and wait for the accepted ones."""
        self._is_closed = True
        deadline = time.monotonic() + timeout_s
        while self._num_open and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    def _accept(self, context: Context) -> None:
        """Count a call until its answer has left; ``drain`` waits for it.

        Raises:
            UnavailableError: if the server drains.
        """
        self._check_open()
        self._num_open += 1
        context.add_done_callback(self._note_end)

    def _note_end(self, _: Context) -> None:
        self._num_open -= 1

    def _check_open(self) -> None:
        if self._is_closed:
            raise UnavailableError("the server is about to stop")

    def _decode(self, request: bytes) -> "Incoming":
        """Decode a message, unless the server drains."""
        self._check_open()
        return _decode_admitted(request, self._service)

    async def ServerLive(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Answer that the process is alive."""
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Answer whether a request that comes now is answered."""
        return service_pb2.ServerReadyResponse(ready=self._service.is_ready)

    async def ModelReady(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Answer whether a model, or one version of it, is served."""
        ready = self._service.models.has(request.name, request.version)
        return service_pb2.ModelReadyResponse(ready=ready)

    async def ServerMetadata(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Answer with the metadata of this server."""
        return service_pb2.ServerMetadataResponse(**server_metadata())

    async def ModelMetadata(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Answer with the inputs and outputs of a model."""
        served = self._service.models.get(request.name, request.version)
        metadata = model_metadata(served.name, [served.version], served.engine.schema)
        return service_pb2.ModelMetadataResponse(**metadata)

    async def ModelInfer(self, request: "Incoming", context: Context) -> Reply:  # noqa: N802
        """Score the requests of one message, all or none."""
        self._accept(context)
        return await _infer(self._service, request, context.time_remaining())

    async def ModelStreamInfer(  # noqa: N802
        self, messages: AsyncIterator[bytes], context: Context
    ) -> None:
        """Score messages as they come; an error takes its answer's place and the call goes on."""
        async with _errors_as_status(context):
            self._accept(context)
            with self._service.intake.message() as inflight:
                await self._stream(messages, inflight, context)

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Answer the health of the server, its protocol or a model."""
        status = self._health(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            text = f"there is no service {cut(request.service)}"
            await context.abort(grpc.StatusCode.NOT_FOUND, text)
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(  # noqa: N802
        self, messages: AsyncIterator[bytes], context: Context
    ) -> None:
        """Answer the health, and again whenever it changes.

        The library's own servicer stops updating a second watcher once a first one has left.
        """
        async with _errors_as_status(context):
            message = await _only_message(messages, self._service)
            request = _parsed(message, health_pb2.HealthCheckRequest)
            last_status = None
            while True:
                status = self._health(request.service)
                if status != last_status:
                    last_status = status
                    await context.write(_serialized(health_pb2.HealthCheckResponse(status=status)))
                await asyncio.sleep(WATCH_S)

    def _health(self, name: str) -> int:
        status = health_pb2.HealthCheckResponse
        models = self._service.models
        if name in ("", SERVICE):
            return status.SERVING if self._service.is_ready else status.NOT_SERVING
        if name in {served.name for served in models.all()}:
            return status.NOT_SERVING if self._service.is_draining else status.SERVING
        is_known = name in {standing.name for standing in models.standings()}
        return status.NOT_SERVING if is_known else status.SERVICE_UNKNOWN

    async def _stream(
        self, messages: AsyncIterator[bytes], inflight: InflightBytes, context: Context
    ) -> None:
        # Backpressure: at most stream_depth messages wait; each answer sent makes room for one.
        room = asyncio.Semaphore(self._service.config.stream_depth)
        pending: Pending = asyncio.Queue()
        sequences = _Sequences(self._service, context.time_remaining())
        reader = _Reader(self._service, sequences, inflight=inflight, room=room, pending=pending)
        reading = asyncio.ensure_future(reader.read(messages))
        try:
            while await self._answer_next(pending, sequences, context, inflight):
                room.release()
            await reading
        finally:
            reader.is_over = True
            reading.cancel()
            while not pending.empty():
                if (left := pending.get_nowait()) is not None:
                    left[1].cancel()
            sequences.close()

    async def _answer_next(
        self, pending: Pending, sequences: "_Sequences", context: Context, inflight: InflightBytes
    ) -> bool:
        """Answer the next message; return whether there was one.

        A function of its own: it keeps no reference to the message while the next one is awaited.
        """
        item = await pending.get()
        if item is None:
            return False
        incoming, reply = item
        await self._write(await _stream_reply(incoming.message, reply), context)
        sequences.answered(incoming)
        inflight.drop(incoming.num_bytes)
        return True

    async def _write(self, reply: Any, context: Context) -> None:
        """Send an answer, or fail if the client does not read it in time."""
        timeout_s = self._service.config.body_timeout_s
        try:
            await asyncio.wait_for(context.write(reply), timeout_s)
        except asyncio.TimeoutError as error:
            self._service.metrics.refuse(ANSWER_TIME)
            raise DeadlineError(
                f"the client did not read for {timeout_s:g} s, which server.body_timeout_s allows"
            ) from error


def _answering(
    service: Service,
    method: Callable[[Any, Context], Awaitable[Any]],
    parse: Callable[[bytes], Any],
) -> Any:
    """Return the handler of a method that takes one message."""

    async def answer(messages: AsyncIterator[bytes], context: Context) -> Any:
        async with _errors_as_status(context):
            request = await _only_message(messages, service)
            with service.intake.message() as inflight:
                inflight.add(len(request))
                parsed = await service.intake.parse(len(request), parse, request)
                return await method(parsed, context)

    return grpc.stream_unary_rpc_method_handler(answer, response_serializer=_serialized)


async def _only_message(messages: AsyncIterator[bytes], service: Service) -> bytes:
    message = await _next_message(messages, service.config.body_timeout_s, service, BODY_TIME)
    if message is None:
        raise RequestError("the call has no message; one is needed")
    return message


async def _next_message(
    messages: AsyncIterator[bytes], timeout_s: float, service: Service, limit: str
) -> bytes | None:
    """Return the next message of a client; None at the end.

    Raises:
        DeadlineError: if none comes in time; it is counted under the name of the limit.
    """
    try:
        return await asyncio.wait_for(anext(messages, None), timeout_s)
    except asyncio.TimeoutError as error:
        service.metrics.refuse(limit)
        key = KEY_BY_LIMIT[limit]
        raise DeadlineError(f"no message came for {timeout_s:g} s, which {key} allows") from error


def _serialized(reply: Any) -> bytes:
    serialized: bytes = reply.SerializeToString()
    return serialized


class Incoming(NamedTuple):
    """A message to score.

    Attributes:
        message: empty if the bytes could not be parsed.
        inputs: by name; an error if they are broken; None if they are not decoded yet.
        num_bytes: in flight.
    """

    message: Message
    inputs: dict[str, NDArray[Any]] | KVShareError | None
    num_bytes: int

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Return the inputs.

        Raises:
            KVShareError: if the message cannot be scored.
        """
        if isinstance(self.inputs, KVShareError):
            raise self.inputs
        return decode_infer(self.message) if self.inputs is None else self.inputs


def _decode_admitted(request: bytes, service: Service) -> Incoming:
    """Parse a message, and decode its inputs if it would be admitted.

    The model's name is in the message, so that admission needs the parsed message. A message that
    is refused is never decoded; the rare one that finds room after all is decoded on admission.

    Raises:
        RequestError: if the bytes are no message.
    """
    message = parse_infer(request)
    if not service.would_admit(message.model_name or None, message.model_version or None):
        return Incoming(message, None, len(request))
    try:
        return Incoming(message, decode_infer(message), len(request))
    except RequestError as error:
        return Incoming(message, error, len(request))


@dataclass(eq=False)
class _Sequence:
    """A sequence of a call.

    Attributes:
        served: the version that answers.
        stream: of its groups.
        exits: closed when the sequence ends.
    """

    served: Served
    stream: Stream
    exits: ExitStack


class _Sequences:
    """Messages of one call: single requests, or parts of sequences over one K/V.

    A sequence ends at its deadline, even if the call goes on: its K/V, its slot among the streams
    and its model version are released.
    """

    def __init__(self, service: Service, timeout_s: float | None) -> None:
        self._service = service
        self._timeout_s = timeout_s
        self._sequence_by_id: dict[int | str, _Sequence] = {}
        self._ended_by_message: dict[int, _Sequence] = {}

    async def reply(self, incoming: Incoming) -> Reply:
        """Score a message; messages of a sequence are queued in the order of the calls."""
        message = incoming.message
        sequence_id = _sequence_id(message)
        if sequence_id is None:
            return await _infer(self._service, incoming, self._timeout_s)
        try:
            group = self._group(sequence_id, incoming)
        finally:
            if message.parameters["sequence_end"].bool_param:
                self._end(sequence_id, incoming)
        answer = await self._service.finish(group.job)
        return _reply(message, message.model_name, [answer])

    def answered(self, incoming: Incoming) -> None:
        """Release a sequence after the answer to its last message."""
        ended = self._ended_by_message.pop(id(incoming), None)
        if ended is not None:
            ended.exits.close()

    def close(self) -> None:
        """Release all sequences."""
        for sequence in [*self._sequence_by_id.values(), *self._ended_by_message.values()]:
            sequence.exits.close()

    def _group(self, sequence_id: int | str, incoming: Incoming) -> Group:
        if incoming.message.parameters["sequence_start"].bool_param:
            return self._open(sequence_id, incoming)
        if sequence_id not in self._sequence_by_id:
            raise RequestError(
                f"sequence {sequence_id} was not started in this stream, or its deadline has passed"
            )
        sequence = self._sequence_by_id[sequence_id]
        sequence.stream.check_room()
        schema = sequence.served.engine.schema
        return sequence.stream.next(raw_candidates(incoming.tensors(), schema))

    def _end(self, sequence_id: int | str, incoming: Incoming) -> None:
        """Close a sequence to further messages."""
        if sequence_id in self._sequence_by_id:
            self._ended_by_message[id(incoming)] = self._sequence_by_id.pop(sequence_id)

    def _open(self, sequence_id: int | str, incoming: Incoming) -> Group:
        if sequence_id in self._sequence_by_id:
            raise RequestError(f"sequence {sequence_id} was started already")
        message = incoming.message
        call = _call(message, self._timeout_s)
        with ExitStack() as exits:
            served = exits.enter_context(self._service.admit(call))
            self._service.check_streams()
            schema = served.engine.schema
            raws = raw_requests(incoming.tensors(), schema, self._service.limits.requests)
            if len(raws) != 1:
                raise RequestError(f"a sequence has one request; {len(raws)} came")
            raw = raws[0] | {"request_id": call.request_id, "report": requested_report(message)}
            stream = exits.enter_context(self._service.stream(call, served, raw))
            group = stream.first()
            sequence = _Sequence(served, stream, exits.pop_all())
        self._sequence_by_id[sequence_id] = sequence
        left_s = stream.deadline - time.monotonic()
        loop = asyncio.get_running_loop()
        timer = loop.call_later(left_s, self._expire, sequence_id, sequence)
        sequence.exits.callback(timer.cancel)
        return group

    def _expire(self, sequence_id: int | str, sequence: _Sequence) -> None:
        """Release a sequence whose deadline has passed, even if answers are pending."""
        if self._sequence_by_id.get(sequence_id) is sequence:
            del self._sequence_by_id[sequence_id]
        error = sequence.stream.expire()
        sequence.exits.__exit__(type(error), error, None)


def _parsed(request: bytes, kind: Any) -> Any:
    try:
        return kind.FromString(request)
    except DecodeError as error:
        raise RequestError(f"the bytes are no {kind.DESCRIPTOR.name}: {error}") from error


@dataclass(eq=False)
class _Reader:
    """Reads the messages of a stream while there is room for their answers.

    Attributes:
        service: that answers.
        sequences: of the stream.
        inflight: bytes of its messages.
        room: for pending answers.
        pending: messages and their answers in order; None at the end.
        is_over: whether the stream has ended.
    """

    service: Service
    sequences: _Sequences
    inflight: InflightBytes
    room: asyncio.Semaphore
    pending: Pending
    is_over: bool = False

    async def read(self, messages: AsyncIterator[bytes]) -> None:
        """Read all messages.

        Raises:
            DeadlineError: if none comes for too long.
        """
        try:
            while await self._read_next(messages):
                pass
        finally:
            self.pending.put_nowait(None)

    async def _read_next(self, messages: AsyncIterator[bytes]) -> bool:
        """Read a message and start to score it; return whether there was one.

        A function of its own: it keeps no reference to the message while the next one is awaited.
        """
        timeout_s = self.service.config.idle_timeout_s
        request = await _next_message(messages, timeout_s, self.service, IDLE_TIME)
        # wait_for can lose a cancellation if a message comes at the same time.
        if request is None or self.is_over:
            return False
        incoming = await self._incoming(request)
        # Tasks start in the order of their creation.
        reply = asyncio.ensure_future(self._reply(incoming))
        # Fetch the error of a reply whose client has gone: asyncio would log it.
        reply.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.pending.put_nowait((incoming, reply))
        return True

    async def _incoming(self, request: bytes) -> Incoming:
        try:
            self.inflight.add(len(request))
        except NoRoomError as error:
            await self.room.acquire()
            return Incoming(Message(), error, 0)
        # Before there is a reply: clearing the queue then cancels every reply.
        await self.room.acquire()
        try:
            return await self.service.intake.parse(
                len(request), _decode_admitted, request, self.service
            )
        except RequestError as error:
            return Incoming(Message(), error, len(request))

    async def _reply(self, incoming: Incoming) -> Reply:
        if not incoming.message.ByteSize():
            incoming.tensors()
        return await self.sequences.reply(incoming)


async def _stream_reply(
    message: Message, reply: "asyncio.Future[Reply]"
) -> service_pb2.ModelStreamInferResponse:
    try:
        return service_pb2.ModelStreamInferResponse(infer_response=await reply)
    except tuple(CODE_BY_ERROR) as error:
        text = f"{type(error).__name__}: {error}"
    except Exception:
        logger.exception("a message of a stream failed")
        text = INTERNAL_ERROR
    failed = service_pb2.ModelInferResponse(id=message.id)
    return service_pb2.ModelStreamInferResponse(error_message=text, infer_response=failed)


async def _infer(service: Service, incoming: Incoming, timeout_s: float | None) -> Reply:
    """Score the requests of one message, all or none, or only queue their users to be encoded."""
    message = incoming.message
    call = _call(message, timeout_s)
    if PREFETCH in message.parameters and message.parameters[PREFETCH].bool_param:
        return _prefetch(service, incoming, call)
    with service.admit(call) as served:
        raws = raw_requests(incoming.tensors(), served.engine.schema, service.limits.requests)
        ids = [call.request_id, *(f"{call.request_id}/{index}" for index in range(1, len(raws)))]
        report = {"report": requested_report(message)}
        raws = [raw | report | {"request_id": one} for raw, one in zip(raws, ids, strict=True)]
        answers = await service.rank_all(call, served, raws)
        return _reply(message, served.name, answers)


def _prefetch(service: Service, incoming: Incoming, call: Call) -> Reply:
    """Queue the users of one message to be encoded ahead; the answer has no outputs."""
    served = service.models.get(call.model, call.version)
    message = incoming.message
    for raw in raw_requests(incoming.tensors(), served.engine.schema, service.limits.requests):
        service.prefetch(call, raw)
    return encode_infer(
        model_name=served.name,
        model_version=served.engine.model_version,
        request_id=message.id,
        outputs={},
        requested=[],
    )


def _reply(message: Message, model: str, answers: list[Answer]) -> Reply:
    return encode_infer(
        model_name=model,
        model_version=answers[0].model_version,
        request_id=message.id,
        outputs=output_tensors(answers),
        requested=[output.name for output in message.outputs],
    )


def _call(message: Message, timeout_s: float | None) -> Call:
    check_request_id(message.id, "id")
    return Call(
        server=GRPC,
        model=message.model_name or None,
        version=message.model_version or None,
        request_id=message.id or uuid.uuid4().hex,
        timeout_s=timeout_s,
        began_at=time.monotonic(),
    )


def _sequence_id(message: Message) -> int | str | None:
    if "sequence_id" not in message.parameters:
        return None
    parameter = message.parameters["sequence_id"]
    sequence = parameter.string_param or parameter.int64_param
    check_request_id(sequence, "sequence_id")
    return sequence


@asynccontextmanager
async def _errors_as_status(context: Context) -> AsyncIterator[None]:
    """Turn every error into a status of the call."""
    try:
        yield
    except tuple(CODE_BY_ERROR) as error:
        await context.abort(CODE_BY_ERROR[type(error)], str(error))
    except grpc.aio.BaseError:
        raise  # The call has its status, its client has gone, or the server stops.
    except Exception:
        logger.exception("a call failed")
        await context.abort(grpc.StatusCode.INTERNAL, INTERNAL_ERROR)


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls before their messages are read: without the token, or while too many are open.

    Health needs no token, as probes cannot send one, and ``Check`` is always answered.

    Args:
        token: the bearer token of callers, in the metadata ``authorization``; None if none is
            needed.
        max_calls: limit of open scoring calls, and of open ``Watch`` calls.
        metrics: counts open and refused calls.
    """

    def __init__(self, token: bytes | None, max_calls: int, metrics: ServerMetrics) -> None:
        self._expected = None if token is None else b"Bearer " + token
        self._max_calls = max_calls
        self._metrics = metrics
        self._num_open = dict.fromkeys(LIMIT_BY_METHOD.values(), 0)
        metrics.read("calls_open", lambda: self._num_open[CALLS])

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        """Return the method's handler, or one that refuses the call."""
        if not self._is_authorized(details):
            self._metrics.refuse(TOKEN)
            return _refusing(grpc.StatusCode.UNAUTHENTICATED, "a bearer token is needed")
        limit = LIMIT_BY_METHOD.get(details.method)
        if limit is not None:
            if self._num_open[limit] >= self._max_calls:
                self._metrics.refuse(limit)
                text = f"{self._max_calls} calls are open; server.max_calls allows no more"
                return _refusing(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
            self._open(limit)
        return await continuation(details)

    def _is_authorized(self, details: Any) -> bool:
        if self._expected is None or details.method.startswith(f"/{HEALTH_SERVICE}/"):
            return True
        given = dict(details.invocation_metadata).get("authorization", "")
        if isinstance(given, str):
            given = given.encode("utf-8", "surrogateescape")
        return hmac.compare_digest(given, self._expected)

    def _open(self, limit: str) -> None:
        """Count a call until its task ends, which is the current one."""
        task = asyncio.current_task()
        assert task is not None
        self._num_open[limit] += 1
        task.add_done_callback(lambda _: self._close(limit))

    def _close(self, limit: str) -> None:
        self._num_open[limit] -= 1


def _refusing(code: grpc.StatusCode, text: str) -> Any:
    """Return a handler for any method that refuses the call without reading it."""

    async def refuse(_: Any, context: Context) -> None:
        await context.abort(code, text)

    return grpc.stream_stream_rpc_method_handler(refuse)
