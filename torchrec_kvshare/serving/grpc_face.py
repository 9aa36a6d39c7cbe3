"""The gRPC face: the Open Inference Protocol, with the stubs of Triton's client.

A stream takes requests of their own, or sequences as Triton has them: the first message of one has
the user and its history, those behind it have candidates alone, and all are scored over one K/V.
"""

import asyncio
import hmac
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2

from torchrec_kvshare.engine import Answer
from torchrec_kvshare.errors import (
    DeadlineError,
    KVShareError,
    OverloadError,
    RequestError,
    UnavailableError,
    UnknownModelError,
)
from torchrec_kvshare.serving.columns import output_tensors, raw_candidates, raw_requests
from torchrec_kvshare.serving.models import Served
from torchrec_kvshare.serving.oip import (
    decode_infer,
    encode_infer,
    model_metadata_message,
    server_metadata_message,
)
from torchrec_kvshare.serving.service import Call, Group, Service, Stream

logger = logging.getLogger(__name__)

FACE = "grpc"
CODE_BY_ERROR: dict[type[KVShareError], grpc.StatusCode] = {
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    UnknownModelError: grpc.StatusCode.NOT_FOUND,
    OverloadError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
}
INTERNAL_ERROR = "an error inside the server; its log has more"
Message: TypeAlias = service_pb2.ModelInferRequest
Reply: TypeAlias = service_pb2.ModelInferResponse
Context: TypeAlias = grpc.aio.ServicerContext
Pending: TypeAlias = "asyncio.Queue[tuple[Message, asyncio.Future[Reply]] | None]"
SERVICE = "inference.GRPCInferenceService"
# Of the methods that are no streams.
REQUEST_BY_METHOD = {
    "ServerLive": "ServerLiveRequest",
    "ServerReady": "ServerReadyRequest",
    "ServerMetadata": "ServerMetadataRequest",
    "ModelReady": "ModelReadyRequest",
    "ModelMetadata": "ModelMetadataRequest",
    "ModelInfer": "ModelInferRequest",
}
MAX_ID = 200  # characters of a request's id


class GrpcFace:
    """The methods of the protocol.

    Args:
        service: that answers.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

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

    async def ModelInfer(self, request: Message, context: Context) -> Reply:  # noqa: N802
        """Score the requests of one message, all or none."""
        return await _infer(self._service, request, context.time_remaining())

    async def ModelStreamInfer(  # noqa: N802
        self, messages: AsyncIterator[bytes], context: Context
    ) -> None:
        """Score messages as they come; an error takes the place of its answer and no more."""
        try:
            await self._stream(messages, context)
        except asyncio.TimeoutError:
            # Everything is let go by now: this waits until the client reads, or is gone.
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the client does not read")

    async def _stream(self, messages: AsyncIterator[bytes], context: Context) -> None:
        # As many answers wait here as may: the client is read on when one has left.
        room = asyncio.Semaphore(self._service.config.stream_depth)
        pending: Pending = asyncio.Queue()
        sequences = _Sequences(self._service, context.time_remaining())
        reader = asyncio.ensure_future(_read(messages, sequences, room, pending))
        try:
            while (one := await pending.get()) is not None:
                message, reply = one
                written = context.write(await _stream_reply(message, reply))
                # A client that does not read is not waited for longer than a stream may take.
                await asyncio.wait_for(written, self._service.config.stream_timeout_s)
                sequences.answered(message)
                room.release()
            await reader
        finally:
            reader.cancel()
            while not pending.empty():
                if (left := pending.get_nowait()) is not None:
                    left[1].cancel()
            sequences.close()


def add_face(face: GrpcFace, server: grpc.aio.Server) -> None:
    """Have a server answer by a face.

    Requests are parsed here and not by generated code, to which bytes that are no message are an
    error of the server.
    """
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            _answering(getattr(face, name), getattr(service_pb2, kind)),
            response_serializer=_serialized,
        )
        for name, kind in REQUEST_BY_METHOD.items()
    }
    handlers["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        face.ModelStreamInfer, response_serializer=_serialized
    )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def _answering(
    method: Callable[[Any, Context], Awaitable[Any]], kind: Any
) -> Callable[[bytes, Context], Awaitable[Any]]:
    async def answer(request: bytes, context: Context) -> Any:
        async with _errors_as_status(context):
            return await method(_parsed(request, kind), context)

    return answer


def _serialized(reply: Any) -> bytes:
    serialized: bytes = reply.SerializeToString()
    return serialized


class _Sequences:
    """Messages of one stream: each a request of its own, or of a sequence over one K/V."""

    def __init__(self, service: Service, timeout_s: float | None) -> None:
        self._service = service
        self._timeout_s = timeout_s
        self._stream_by_id: dict[int | str, tuple[Served, Stream, ExitStack]] = {}
        self._ended_by_message: dict[int, ExitStack] = {}

    async def reply(self, message: Message) -> Reply:
        """The answer to a message; those of a sequence are queued in the order of the calls."""
        sequence = _sequence_id(message)
        if sequence is None:
            return await _infer(self._service, message, self._timeout_s)
        try:
            group = self._group(sequence, message)
        finally:
            if message.parameters["sequence_end"].bool_param:
                self._end(sequence, message)
        scores: list[float] = []
        async for _, part in group.parts():
            scores += part.scores
        return _reply(message, message.model_name, [replace(part, scores=scores)])

    def answered(self, message: Message) -> None:
        """Let go of a sequence after the answer to its last message, and so to all of them."""
        self._ended_by_message.pop(id(message), ExitStack()).close()

    def close(self) -> None:
        """Let go of all."""
        open_ones = [exits for _, _, exits in self._stream_by_id.values()]
        for exits in [*open_ones, *self._ended_by_message.values()]:
            exits.close()

    def _group(self, sequence: int | str, message: Message) -> Group:
        if message.parameters["sequence_start"].bool_param:
            return self._open(sequence, message)
        if sequence not in self._stream_by_id:
            raise RequestError(f"sequence {str(sequence)[:200]} was not started in this stream")
        served, stream, _ = self._stream_by_id[sequence]
        return stream.next(raw_candidates(decode_infer(message), served.engine.schema))

    def _end(self, sequence: int | str, message: Message) -> None:
        """No more of it may come."""
        if sequence in self._stream_by_id:
            self._ended_by_message[id(message)] = self._stream_by_id.pop(sequence)[2]

    def _open(self, sequence: int | str, message: Message) -> Group:
        if sequence in self._stream_by_id:
            raise RequestError(f"sequence {str(sequence)[:200]} was started already")
        call = _call(message, self._timeout_s)
        with ExitStack() as exits:
            served = exits.enter_context(self._service.counted(call))
            schema = served.engine.schema
            raws = raw_requests(decode_infer(message), schema, self._service.limits.requests)
            if len(raws) != 1:
                raise RequestError(f"a sequence is of one request; {len(raws)} came")
            raw = raws[0] | {"request_id": call.request_id}
            stream = exits.enter_context(self._service.stream(call, served, raw))
            group = stream.first()
            self._stream_by_id[sequence] = served, stream, exits.pop_all()
        return group


def _parsed(request: bytes, kind: Any = Message) -> Any:
    try:
        return kind.FromString(request)
    except DecodeError as error:
        raise RequestError(f"the bytes are no {kind.DESCRIPTOR.name}: {error}") from error


async def _read(
    messages: AsyncIterator[bytes],
    sequences: _Sequences,
    room: asyncio.Semaphore,
    pending: Pending,
) -> None:
    try:
        async for request in messages:
            # Room comes first: whoever lets go of the queue has let go of every reply.
            await room.acquire()
            try:
                message = _parsed(request)
            except RequestError as error:
                message = Message()
                reply: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
                reply.set_exception(error)
            else:
                # Tasks begin in the order in which they were made.
                reply = asyncio.ensure_future(sequences.reply(message))
            # A reply that nobody takes, for its client has gone, is no error of ours.
            reply.add_done_callback(lambda done: done.cancelled() or done.exception())
            pending.put_nowait((message, reply))
    finally:
        pending.put_nowait(None)


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


async def _infer(service: Service, message: Message, timeout_s: float | None) -> Reply:
    """Score the requests of one message, all or none."""
    call = _call(message, timeout_s)
    with service.counted(call) as served:
        raws = raw_requests(decode_infer(message), served.engine.schema, service.limits.requests)
        ids = [call.request_id, *(f"{call.request_id}/{place}" for place in range(1, len(raws)))]
        named = [raw | {"request_id": one} for raw, one in zip(raws, ids, strict=True)]
        answers = await service.rank_all(call, served, named)
        return _reply(message, served.name, answers)


def _reply(message: Message, model: str, answers: list[Answer]) -> Reply:
    requested = [output.name for output in message.outputs]
    outputs = output_tensors(answers)
    return encode_infer(model, answers[0].model_version, message.id, outputs, requested)


def _call(message: Message, timeout_s: float | None) -> Call:
    request_id = message.id[:MAX_ID] or uuid.uuid4().hex
    model, version = message.model_name or None, message.model_version or None
    return Call(FACE, model, version, request_id, timeout_s, time.monotonic())


def _sequence_id(message: Message) -> int | str | None:
    if "sequence_id" not in message.parameters:
        return None
    parameter = message.parameters["sequence_id"]
    return parameter.string_param or parameter.int64_param


@asynccontextmanager
async def _errors_as_status(context: Context) -> AsyncIterator[None]:
    """Every error as a status of the call."""
    try:
        yield
    except tuple(CODE_BY_ERROR) as error:
        await context.abort(CODE_BY_ERROR[type(error)], str(error))
    except grpc.aio.AbortError:
        raise
    except Exception:
        logger.exception("a call failed")
        await context.abort(grpc.StatusCode.INTERNAL, INTERNAL_ERROR)


class BearerToken(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without the token.

    Args:
        token: what callers must say in the metadata ``authorization``, behind ``Bearer``.
    """

    def __init__(self, token: bytes) -> None:
        self._expected = b"Bearer " + token

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: Any
    ) -> Any:
        """The method's handler, or one that refuses in its place."""
        said = dict(details.invocation_metadata).get("authorization", "")
        handler = await continuation(details)
        if hmac.compare_digest(said.encode("utf-8", "surrogateescape"), self._expected):
            return handler
        if handler is not None and handler.request_streaming:
            return grpc.stream_stream_rpc_method_handler(_refuse)
        return grpc.unary_unary_rpc_method_handler(_refuse)


async def _refuse(_: Any, context: Context) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "a bearer token is needed")
