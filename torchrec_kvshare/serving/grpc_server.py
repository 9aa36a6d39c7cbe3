"""The gRPC face: the Open Inference Protocol, with the stubs of Triton's client.

A stream takes requests of their own, or sequences as Triton has them: the first message of one has
the user and its history, those behind it have candidates alone, and all are scored over one K/V.
Beside it stands gRPC's own health protocol, ``grpc.health.v1``.
"""

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
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
from torchrec_kvshare.features.parse import check_request_id
from torchrec_kvshare.scoring.engine import Answer
from torchrec_kvshare.serving.columns import output_tensors, raw_candidates, raw_requests
from torchrec_kvshare.serving.intake import Held
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
    model_metadata_message,
    parse_infer,
    requested_report,
    server_metadata_message,
)
from torchrec_kvshare.serving.service import Call, Group, Service, Stream

logger = logging.getLogger(__name__)

FACE = "grpc"
CODE_BY_ERROR: dict[type[KVShareError], grpc.StatusCode] = {
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownModelError: grpc.StatusCode.NOT_FOUND,
    OverloadError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    NoRoomError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    ScoreError: grpc.StatusCode.INTERNAL,
}
INTERNAL_ERROR = "an error inside the server; its log has more"
Message: TypeAlias = service_pb2.ModelInferRequest
Reply: TypeAlias = service_pb2.ModelInferResponse
Context: TypeAlias = grpc.aio.ServicerContext
Pending: TypeAlias = "asyncio.Queue[tuple[Incoming, asyncio.Future[Reply]] | None]"
SERVICE = "inference.GRPCInferenceService"
HEALTH_SERVICE = "grpc.health.v1.Health"
WATCH_S = 0.1  # between two looks at what a watcher is told
# Of the methods that take one message and score nothing.
KIND_BY_METHOD = {
    "ServerLive": service_pb2.ServerLiveRequest,
    "ServerReady": service_pb2.ServerReadyRequest,
    "ServerMetadata": service_pb2.ServerMetadataRequest,
    "ModelReady": service_pb2.ModelReadyRequest,
    "ModelMetadata": service_pb2.ModelMetadataRequest,
}
# Of the methods that take long.
LIMIT_BY_METHOD = {
    f"/{SERVICE}/ModelInfer": CALLS,
    f"/{SERVICE}/ModelStreamInfer": CALLS,
    f"/{HEALTH_SERVICE}/Watch": WATCHERS,
}
KEY_BY_LIMIT = {BODY_TIME: "server.body_timeout_s", IDLE_TIME: "server.idle_timeout_s"}
MAX_SHOWN = 200  # characters of a name in a message


class GrpcFace:
    """The methods of the protocol.

    Args:
        service: that answers.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._num_open = 0
        self._is_closed = False

    async def drain(self, timeout_s: float) -> None:
        """Refuse new calls as UNAVAILABLE and wait for those that were accepted."""
        self._is_closed = True
        deadline = time.monotonic() + timeout_s
        while self._num_open and time.monotonic() < deadline:
            await asyncio.sleep(0.01)

    def _accept(self, context: Context) -> None:
        """Have the server end only after the answer to a call has left.

        Raises:
            UnavailableError: if no more are accepted.
        """
        if self._is_closed:
            raise UnavailableError("the server is about to stop")
        self._num_open += 1
        context.add_done_callback(self._note_end)

    def _note_end(self, _: Context) -> None:
        self._num_open -= 1

    async def ServerLive(self, request: Any, context: Context) -> Any:  # noqa: N802
        """The process answers."""
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request: Any, context: Context) -> Any:  # noqa: N802
        """A request that comes now will be answered."""
        return service_pb2.ServerReadyResponse(ready=self._service.is_ready)

    async def ModelReady(self, request: Any, context: Context) -> Any:  # noqa: N802
        """A model, or one version of it, answers."""
        try:
            self._service.models.get(request.name, request.version)
        except (UnavailableError, UnknownModelError):
            return service_pb2.ModelReadyResponse(ready=False)
        return service_pb2.ModelReadyResponse(ready=True)

    async def ServerMetadata(self, request: Any, context: Context) -> Any:  # noqa: N802
        """What this server is."""
        return server_metadata_message()

    async def ModelMetadata(self, request: Any, context: Context) -> Any:  # noqa: N802
        """What a model takes and gives."""
        served = self._service.models.get(request.name, request.version)
        return model_metadata_message(served.name, [served.version], served.engine.schema)

    async def ModelInfer(self, request: "Incoming", context: Context) -> Reply:  # noqa: N802
        """Score the requests of one message, all or none."""
        self._accept(context)
        return await _infer(self._service, request, context.time_remaining())

    async def ModelStreamInfer(  # noqa: N802
        self, messages: AsyncIterator[bytes], context: Context
    ) -> None:
        """Score messages as they come; an error takes the place of its answer and no more."""
        async with _errors_as_status(context):
            self._accept(context)
            with self._service.intake.message() as held:
                await self._stream(messages, held, context)

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802
        """Whether the server, its protocol or a model answers."""
        status = self._health(request.service)
        if status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN:
            name = request.service[:MAX_SHOWN]
            await context.abort(grpc.StatusCode.NOT_FOUND, f"there is no service {name}")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(  # noqa: N802
        self, messages: AsyncIterator[bytes], context: Context
    ) -> None:
        """The same, told again whenever it changes.

        The library's own servicer tells a second watcher nothing more once a first one has left.
        """
        async with _errors_as_status(context):
            message = await _only_message(messages, self._service)
            request = _parsed(message, health_pb2.HealthCheckRequest)
            told = None
            while True:
                status = self._health(request.service)
                if status != told:
                    told = status
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

    async def _stream(self, messages: AsyncIterator[bytes], held: Held, context: Context) -> None:
        # As many answers wait here as may: the client is read on when one has left.
        room = asyncio.Semaphore(self._service.config.stream_depth)
        pending: Pending = asyncio.Queue()
        sequences = _Sequences(self._service, context.time_remaining())
        reading = _Reading(self._service, sequences, held, room, pending)
        reader = asyncio.ensure_future(reading.read(messages))
        try:
            while await self._answer_next(pending, sequences, context, held):
                room.release()
            await reader
        finally:
            reading.is_over = True
            reader.cancel()
            while not pending.empty():
                if (left := pending.get_nowait()) is not None:
                    left[1].cancel()
            sequences.close()

    async def _answer_next(
        self, pending: Pending, sequences: "_Sequences", context: Context, held: Held
    ) -> bool:
        """Whether there was a message; it is let go of at the end, and not with the next one."""
        one = await pending.get()
        if one is None:
            return False
        incoming, reply = one
        await self._write(await _stream_reply(incoming.message, reply), context)
        sequences.answered(incoming)
        held.drop(incoming.num_bytes)
        return True

    async def _write(self, reply: Any, context: Context) -> None:
        """Have a client read an answer, which it is not waited for any longer than it may take."""
        timeout_s = self._service.config.body_timeout_s
        try:
            await asyncio.wait_for(context.write(reply), timeout_s)
        except asyncio.TimeoutError as error:
            self._service.metrics.refuse(ANSWER_TIME)
            raise DeadlineError(
                f"the client did not read for {timeout_s:g} s, which server.body_timeout_s allows"
            ) from error


def add_face(face: GrpcFace, service: Service, server: grpc.aio.Server) -> None:
    """Have a server answer by a face.

    Requests are read and parsed here and not by the library, which waits for a message for ever,
    and to which bytes that are no message are an error of the server.
    """
    handlers = {
        name: _answering(service, getattr(face, name), partial(_parsed, kind=kind))
        for name, kind in KIND_BY_METHOD.items()
    }
    handlers["ModelInfer"] = _answering(service, face.ModelInfer, _decoded)
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        face.ModelStreamInfer, response_serializer=_serialized
    )
    health = {
        "Check": _answering(
            service, face.Check, partial(_parsed, kind=health_pb2.HealthCheckRequest)
        ),
        "Watch": grpc.stream_stream_rpc_method_handler(face.Watch),
    }
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(SERVICE, handlers),
            grpc.method_handlers_generic_handler(HEALTH_SERVICE, health),
        )
    )


def _answering(
    service: Service,
    method: Callable[[Any, Context], Awaitable[Any]],
    parse: Callable[[bytes], Any],
) -> Any:
    """The handler of a method that takes one message."""

    async def answer(messages: AsyncIterator[bytes], context: Context) -> Any:
        async with _errors_as_status(context):
            request = await _only_message(messages, service)
            with service.intake.message() as held:
                held.add(len(request))
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
    """What a client sends next; None where it sends no more.

    Raises:
        DeadlineError: after so long; it is counted by the name of the limit.
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
        message: empty where the bytes were none.
        inputs: of it, or why it has none.
        num_bytes: that it came in.
    """

    message: Message
    inputs: dict[str, NDArray[Any]] | KVShareError
    num_bytes: int

    def tensors(self) -> dict[str, NDArray[Any]]:
        """Its inputs.

        Raises:
            KVShareError: if it cannot be scored.
        """
        if isinstance(self.inputs, KVShareError):
            raise self.inputs
        return self.inputs


def _decoded(request: bytes) -> Incoming:
    """Parse a message; what is wrong with its inputs is told to those who ask for them.

    Raises:
        RequestError: if the bytes are no message.
    """
    message = parse_infer(request)
    try:
        return Incoming(message, decode_infer(message), len(request))
    except RequestError as error:
        return Incoming(message, error, len(request))


@dataclass(eq=False)
class _Sequence:
    """A stream of candidates inside a call.

    Attributes:
        served: the version that answers.
        stream: of its groups.
        exits: what is closed when it ends.
    """

    served: Served
    stream: Stream
    exits: ExitStack


class _Sequences:
    """Messages of one stream: each a request of its own, or of a sequence over one K/V.

    A sequence ends at its deadline, whatever becomes of the call: what it holds, its place among
    the streams and its model version are let go.
    """

    def __init__(self, service: Service, timeout_s: float | None) -> None:
        self._service = service
        self._timeout_s = timeout_s
        self._sequence_by_id: dict[int | str, _Sequence] = {}
        self._ended_by_message: dict[int, _Sequence] = {}

    async def reply(self, incoming: Incoming) -> Reply:
        """The answer to a message; those of a sequence are queued in the order of the calls."""
        message = incoming.message
        sequence_id = _sequence_id(message)
        if sequence_id is None:
            return await _infer(self._service, incoming, self._timeout_s)
        try:
            group = self._group(sequence_id, incoming)
        finally:
            if message.parameters["sequence_end"].bool_param:
                self._end(sequence_id, incoming)
        scores: list[float] = []
        async for _, part in group.parts():
            scores += part.scores
        return _reply(message, message.model_name, [replace(part, scores=scores)])

    def answered(self, incoming: Incoming) -> None:
        """Let go of a sequence after the answer to its last message, and so to all of them."""
        ended = self._ended_by_message.pop(id(incoming), None)
        if ended is not None:
            ended.exits.close()

    def close(self) -> None:
        """Let go of all."""
        for sequence in [*self._sequence_by_id.values(), *self._ended_by_message.values()]:
            sequence.exits.close()

    def _group(self, sequence_id: int | str, incoming: Incoming) -> Group:
        if incoming.message.parameters["sequence_start"].bool_param:
            return self._open(sequence_id, incoming)
        if sequence_id not in self._sequence_by_id:
            raise RequestError(
                f"sequence {str(sequence_id)[:MAX_SHOWN]} was not started in this stream, or its "
                "deadline has passed"
            )
        sequence = self._sequence_by_id[sequence_id]
        schema = sequence.served.engine.schema
        return sequence.stream.next(raw_candidates(incoming.tensors(), schema))

    def _end(self, sequence_id: int | str, incoming: Incoming) -> None:
        """No more of it may come."""
        if sequence_id in self._sequence_by_id:
            self._ended_by_message[id(incoming)] = self._sequence_by_id.pop(sequence_id)

    def _open(self, sequence_id: int | str, incoming: Incoming) -> Group:
        if sequence_id in self._sequence_by_id:
            raise RequestError(f"sequence {str(sequence_id)[:MAX_SHOWN]} was started already")
        message = incoming.message
        call = _call(message, self._timeout_s)
        with ExitStack() as exits:
            served = exits.enter_context(self._service.counted(call))
            schema = served.engine.schema
            raws = raw_requests(incoming.tensors(), schema, self._service.limits.requests)
            if len(raws) != 1:
                raise RequestError(f"a sequence is of one request; {len(raws)} came")
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
        """Let go of a sequence whose deadline has passed, also of one whose answers wait."""
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
class _Reading:
    """Reads the messages of a stream, as long as its answers leave.

    Attributes:
        service: that answers.
        sequences: of the stream.
        held: by its messages.
        room: for answers that wait.
        pending: messages and their answers, in their order; None at the end.
        is_over: whether the stream has ended.
    """

    service: Service
    sequences: _Sequences
    held: Held
    room: asyncio.Semaphore
    pending: Pending
    is_over: bool = False

    async def read(self, messages: AsyncIterator[bytes]) -> None:
        """Until the last.

        Raises:
            DeadlineError: if none came for too long.
        """
        try:
            while await self._read_next(messages):
                pass
        finally:
            self.pending.put_nowait(None)

    async def _read_next(self, messages: AsyncIterator[bytes]) -> bool:
        """Whether there was a message; nothing of it is kept here while the next one is awaited."""
        timeout_s = self.service.config.idle_timeout_s
        request = await _next_message(messages, timeout_s, self.service, IDLE_TIME)
        # ``wait_for`` forgets that it was cancelled if what it waits for comes at the same time.
        if request is None or self.is_over:
            return False
        incoming = await self._incoming(request)
        # Tasks begin in the order in which they were made.
        reply = asyncio.ensure_future(self._reply(incoming))
        # A reply that nobody takes, for its client has gone, is no error of ours.
        reply.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.pending.put_nowait((incoming, reply))
        return True

    async def _incoming(self, request: bytes) -> Incoming:
        try:
            self.held.add(len(request))
        except NoRoomError as error:
            await self.room.acquire()
            return Incoming(Message(), error, 0)
        # Room comes first: whoever lets go of the queue has let go of every reply.
        await self.room.acquire()
        try:
            return await self.service.intake.parse(len(request), _decoded, request)
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
    """Score the requests of one message, all or none."""
    message = incoming.message
    call = _call(message, timeout_s)
    with service.counted(call) as served:
        raws = raw_requests(incoming.tensors(), served.engine.schema, service.limits.requests)
        ids = [call.request_id, *(f"{call.request_id}/{place}" for place in range(1, len(raws)))]
        said = {"report": requested_report(message)}
        named = [raw | said | {"request_id": one} for raw, one in zip(raws, ids, strict=True)]
        answers = await service.rank_all(call, served, named)
        return _reply(message, served.name, answers)


def _reply(message: Message, model: str, answers: list[Answer]) -> Reply:
    requested = [output.name for output in message.outputs]
    outputs = output_tensors(answers)
    return encode_infer(model, answers[0].model_version, message.id, outputs, requested)


def _call(message: Message, timeout_s: float | None) -> Call:
    check_request_id(message.id, "id")
    request_id = message.id or uuid.uuid4().hex
    model, version = message.model_name or None, message.model_version or None
    return Call(FACE, model, version, request_id, timeout_s, time.monotonic())


def _sequence_id(message: Message) -> int | str | None:
    if "sequence_id" not in message.parameters:
        return None
    parameter = message.parameters["sequence_id"]
    sequence = parameter.string_param or parameter.int64_param
    check_request_id(sequence, "sequence_id")
    return sequence


@asynccontextmanager
async def _errors_as_status(context: Context) -> AsyncIterator[None]:
    """Every error as a status of the call."""
    try:
        yield
    except tuple(CODE_BY_ERROR) as error:
        await context.abort(CODE_BY_ERROR[type(error)], str(error))
    except grpc.aio.BaseError:
        raise  # The call has its status, its client has gone, or the server stops: nothing is told.
    except Exception:
        logger.exception("a call failed")
        await context.abort(grpc.StatusCode.INTERNAL, INTERNAL_ERROR)


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls before their messages are read: without the token, or while too many are open.

    Health needs no token, which probes cannot say, and ``Check`` is always answered.

    Args:
        token: what callers must say in the metadata ``authorization``, behind ``Bearer``; None for
            nothing.
        max_calls: that are scored at once; as many more may watch health.
        metrics: where calls, and those that were refused, are counted.
    """

    def __init__(self, token: bytes | None, max_calls: int, metrics: ServerMetrics) -> None:
        self._expected = None if token is None else b"Bearer " + token
        self._max_calls = max_calls
        self._metrics = metrics
        self._num_open = dict.fromkeys(LIMIT_BY_METHOD.values(), 0)
        metrics.calls_open.set_function(lambda: self._num_open[CALLS])

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        """The method's handler, or one that refuses in its place."""
        if not self._is_welcome(details):
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

    def _is_welcome(self, details: Any) -> bool:
        if self._expected is None or details.method.startswith(f"/{HEALTH_SERVICE}/"):
            return True
        said = dict(details.invocation_metadata).get("authorization", "")
        if isinstance(said, str):
            said = said.encode("utf-8", "surrogateescape")
        return hmac.compare_digest(said, self._expected)

    def _open(self, limit: str) -> None:
        """Count a call until its task has ended, which this runs in."""
        task = asyncio.current_task()
        assert task is not None
        self._num_open[limit] += 1
        task.add_done_callback(lambda _: self._close(limit))

    def _close(self, limit: str) -> None:
        self._num_open[limit] -= 1


def _refusing(code: grpc.StatusCode, text: str) -> Any:
    """The handler of any method, which reads nothing of the call."""

    async def refuse(_: Any, context: Context) -> None:
        await context.abort(code, text)

    return grpc.stream_stream_rpc_method_handler(refuse)
