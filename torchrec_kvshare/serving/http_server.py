"""The HTTP server: the Open Inference Protocol, requests in the project's format, and the page."""

import asyncio
import hmac
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from numpy.typing import NDArray

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
from torchrec_kvshare.features.decode import decode_json, decode_request, shown
from torchrec_kvshare.features.parse import (
    check_request_id,
    parse_clear,
    parse_forget,
    parse_pin,
    request_id_of,
)
from torchrec_kvshare.scoring.engine import Answer
from torchrec_kvshare.serving.columns import output_tensors, raw_requests
from torchrec_kvshare.serving.intake import InflightBytes
from torchrec_kvshare.serving.metrics import BODY_TIME, REQUEST_BYTES, TOKEN, ServerMetrics
from torchrec_kvshare.serving.models import Served
from torchrec_kvshare.serving.oip import (
    decode_infer_json,
    encode_infer_json,
    model_metadata,
    requested_outputs_json,
    requested_report_json,
    server_metadata,
)
from torchrec_kvshare.serving.peers import FORGOTTEN, LOCAL, Peers
from torchrec_kvshare.serving.service import INTERNAL_ERROR, Call, Group, Service, Stream

logger = logging.getLogger(__name__)

Anything = TypeVar("Anything")

HTTP = "http"
PAGE = Path(__file__).with_name("page.html")
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
JSON_LENGTH = "Inference-Header-Content-Length"  # Triton's, where tensors follow the JSON
MAX_DIGITS = 19  # of a length in a header
TIMEOUT, REQUEST_ID = "X-Timeout-Ms", "X-Request-Id"
STATUS_BY_ERROR: dict[type[KVShareError], int] = {
    RequestError: 400,
    UnknownModelError: 404,
    OverloadError: 429,
    NoRoomError: 503,
    ScoreError: 500,
    UnavailableError: 503,
    DeadlineError: 504,
}
RETRY_AFTER_S = {429: "1", 503: "1"}  # seconds in the header Retry-After, by status
Chunks: TypeAlias = "asyncio.Queue[bytes | KVShareError | None]"
Lines: TypeAlias = AsyncIterator[bytes]


def http_app(service: Service, token: bytes | None) -> web.Application:
    """Make the application.

    Args:
        service: that answers.
        token: the bearer token of callers; None if none is needed.

    Raises:
        ConfigError: if ``server.peers`` cannot work.
    """
    server = _HttpServer(service, has_token=token is not None)
    app = web.Application(
        middlewares=[_errors_as_json, _bearer(token, service.metrics), _plain_bodies],
        client_max_size=service.config.max_request_bytes,
    )
    model = "/v2/models/{model}"
    for prefix in (model, f"{model}/versions/{{version}}"):
        app.router.add_get(prefix, server.model_metadata)
        app.router.add_get(f"{prefix}/ready", server.model_ready)
        app.router.add_post(f"{prefix}/infer", server.infer)
    app.router.add_get("/v2", server.server_metadata)
    app.router.add_get("/v2/health/live", server.live)
    app.router.add_get("/v2/health/ready", server.ready)
    app.router.add_post("/v1/rank", server.rank)
    app.router.add_post("/v1/prefetch", partial(server.ahead, service.prefetch))
    app.router.add_post("/v1/events", partial(server.ahead, service.extend))
    for action in server.actions():
        app.router.add_post(f"/v1/{action.name}", partial(server.act, action))
    app.router.add_get("/v1/state", server.state)
    app.router.add_get("/v1/example", server.example)
    app.router.add_get("/metrics", server.metrics)
    app.router.add_get("/", server.page)
    app.on_response_prepare.append(server.close_while_draining)
    return app


class Action(NamedTuple):
    """Something that is done at all replicas, with a token only.

    Attributes:
        name: in the path.
        result: key of the result in the answer.
        parse: returns the argument, given the decoded message.
        do: does it at this replica.
    """

    name: str
    result: str
    parse: Callable[[Mapping[str, Any]], Any]
    do: Callable[[Any], Awaitable[Any]]


class _HttpServer:
    def __init__(self, service: Service, *, has_token: bool) -> None:
        self._service = service
        self._intake = service.intake
        self._has_token = has_token
        self._peers = Peers(service.config)
        self._page = PAGE.read_text()
        max_values = service.config.max_json_values
        self._decode = partial(decode_json, max_values=max_values)
        self._decode_request = partial(decode_request, max_values=max_values)

    async def close_while_draining(self, _: web.Request, response: web.StreamResponse) -> None:
        """Close kept-alive connections, so that clients reconnect to another replica."""
        if self._service.is_draining:
            response.headers["Connection"] = "close"
            response.force_close()

    async def live(self, _: web.Request) -> web.Response:
        return _json({"live": True})

    async def ready(self, _: web.Request) -> web.Response:
        is_ready = self._service.is_ready
        return _json({"ready": is_ready}, 200 if is_ready else 503)

    async def server_metadata(self, _: web.Request) -> web.Response:
        return _json(server_metadata())

    async def model_metadata(self, request: web.Request) -> web.Response:
        served = self._served(request)
        schema = served.engine.schema
        return _json(model_metadata(served.name, [served.version], schema))

    async def model_ready(self, request: web.Request) -> web.Response:
        return _json({"name": self._served(request).name, "ready": True})

    async def state(self, _: web.Request) -> web.Response:
        return _json(self._service.to_json())

    async def example(self, request: web.Request) -> web.Response:
        return _json(self._service.models.get(request.query.get("model")).example())

    async def metrics(self, _: web.Request) -> web.Response:
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=self._service.metrics.text(), headers=headers)

    async def page(self, _: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store"}
        return web.Response(text=self._page, content_type="text/html", headers=headers)

    async def ahead(
        self, queue: Callable[[Call, Mapping[str, Any]], str], request: web.Request
    ) -> web.Response:
        """Queue a user to be encoded ahead of its request; answer at once."""
        call = _call(request)
        self._service.prefetches.check_room()
        async with self._body(request) as body:
            raw = await self._intake.parse(len(body), self._decode_request, body)
            return _json({"prefetch": queue(call, raw)}, 202)

    def actions(self) -> list["Action"]:
        """What is done at all replicas."""
        service = self._service
        return [
            Action("forget", FORGOTTEN, parse_forget, service.forget),
            Action("clear", "cleared_bytes", parse_clear, service.clear),
            Action("pin", "pinned_users", parse_pin, service.pin),
            Action("unpin", "pinned_users", parse_pin, service.unpin),
        ]

    async def act(self, action: "Action", request: web.Request) -> web.Response:
        """Do something at all replicas, or only at this one if a replica asks."""
        if not self._has_token:
            raise web.HTTPForbidden(
                reason=f"/v1/{action.name} needs a token: server.token_file is not set"
            )
        async with self._body(request) as body:
            decoded = await self._intake.parse(len(body), self._decode_request, body)
            wanted = action.parse(decoded)
        if not self._peers or LOCAL in request.query:
            return _json({action.result: await action.do(wanted)})
        done, failed = await self._peers.ask(
            action.name, decoded, action.result, request.headers["Authorization"]
        )
        if not failed:
            return _json({"replicas": done})
        reasons = "; ".join(f"{replica}: {reason}" for replica, reason in failed.items())
        error = UnavailableError(f"{action.name} is not done at all replicas; ask again. {reasons}")
        return _json({"request_id": None, **_error_json(error), "replicas": done}, 503)

    async def infer(self, request: web.Request) -> web.Response:
        """Score the requests of one message, all or none."""
        async with self._body(request) as body:
            call = _call(request)
            with self._service.admit(call) as served:
                head, tensors = await self._intake.parse(
                    len(body), self._decode_infer, request, body
                )
                requested = requested_outputs_json(head, served.engine.schema)
                raws = raw_requests(tensors, served.engine.schema, self._service.limits.requests)
                message_id = head.get("id") or call.request_id
                if not isinstance(message_id, str):
                    raise RequestError(f"id is {type(message_id).__name__}; a text is allowed")
                check_request_id(message_id, "id")
                report = {"report": requested_report_json(head)}
                raws = [raw | report for raw in raws]
                answers = await self._service.rank_all(call, served, raws)
        text, json_length = encode_infer_json(
            model_name=served.name,
            model_version=answers[0].model_version,
            request_id=message_id,
            outputs=output_tensors(answers),
            binary_by_output=requested,
        )
        response = web.Response(body=text, content_type="application/json")
        if json_length is not None:
            response.content_type = "application/octet-stream"
            response.headers[JSON_LENGTH] = str(json_length)
        return response

    async def rank(self, request: web.Request) -> web.StreamResponse:
        """Score a request or a list of requests; in a list an error takes its answer's place."""
        if request.query.get("stream") == "1":
            return await self._rank_stream(request)
        async with self._body(request) as body:
            call = _call(request)
            raw: Any = None
            try:
                with self._service.admit(call) as served:
                    raw = await self._intake.parse(len(body), self._decode, body)
                    if isinstance(raw, dict):
                        return _json((await self._service.rank(call, served, raw)).to_json())
                    return _json(await self._rank_list(call, served, raw))
            except tuple(STATUS_BY_ERROR) as error:
                return _json(_to_json(error, raw), STATUS_BY_ERROR[type(error)])

    async def _rank_list(self, call: Call, served: Served, raws: Any) -> list[dict[str, Any]]:
        most = self._service.limits.requests
        if not isinstance(raws, list) or len(raws) > most:
            came = f"a list of {len(raws)}" if isinstance(raws, list) else type(raws).__name__
            raise RequestError(
                f"the body is {came}; a request, or a list of at most {most}, is allowed"
            )
        answers = await asyncio.gather(*(self._answer(call, served, raw) for raw in raws))
        return [_to_json(answer, raw) for answer, raw in zip(answers, raws, strict=True)]

    async def _rank_stream(self, request: web.Request) -> web.StreamResponse:
        """Score groups of candidates line by line; answer with server-sent events."""
        self._check_size(request, request.content_length or 0)
        call = _call(request)
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
                REQUEST_ID: call.request_id,
            }
        )
        chunks: Chunks = asyncio.Queue()
        lines = split_lines(chunks)
        try:
            with self._service.admit(call) as served, self._reading(request, chunks):
                self._service.check_streams()
                first = await self._before_timeout(anext(lines, b""))
                raw = await self._intake.parse(len(first), self._decode_request, first)
                with self._service.stream(call, served, raw) as stream:
                    await response.prepare(request)
                    await self._write_groups(stream, lines, response)
                    await _write_event(response, stream, "end", {})
        except KVShareError as error:
            if not response.prepared:
                raise
            await _write_event(response, None, "error", _error_json(error))
        except ConnectionError:
            pass  # The client has gone.
        return response

    @contextmanager
    def _reading(self, request: web.Request, chunks: Chunks) -> Iterator[None]:
        """Read a body in the background while its first lines are answered."""
        with self._intake.message() as inflight:
            reader = asyncio.ensure_future(self._read_chunks(request, chunks, inflight))
            try:
                yield
            finally:
                reader.cancel()

    async def _write_groups(
        self, stream: Stream, lines: Lines, response: web.StreamResponse
    ) -> None:
        # Backpressure: at most stream_depth groups may be queued.
        groups: asyncio.Queue[Group | Exception | None] = asyncio.Queue(
            self._service.config.stream_depth
        )
        reader = asyncio.ensure_future(self._read_groups(stream, lines, groups))
        try:
            while True:
                group = await stream.wait(groups.get())
                if group is None:
                    break
                if isinstance(group, Exception):
                    raise group
                try:
                    async for first_candidate, part in group.parts():
                        scored = {"first_candidate": first_candidate} | part.to_json()
                        await _write_event(response, stream, "scores", scored)
                except ScoreError as error:  # The other groups go on.
                    failed = {"first_candidate": group.job.first_candidate} | _error_json(error)
                    await _write_event(response, stream, "error", failed)
        finally:
            reader.cancel()

    async def _read_groups(
        self, stream: Stream, lines: Lines, groups: "asyncio.Queue[Group | Exception | None]"
    ) -> None:
        try:
            await groups.put(stream.first())
            async for line in lines:
                stream.check_room()
                raw = await self._intake.parse(len(line), self._decode_request, line)
                await groups.put(stream.next(raw))
            await groups.put(None)
        except KVShareError as error:
            await groups.put(error)

    @asynccontextmanager
    async def _body(self, request: web.Request) -> AsyncIterator[bytes]:
        """Read the whole body; its bytes count as in flight until the block ends."""
        self._check_size(request, request.content_length or 0)

        async def read(inflight: InflightBytes) -> bytes:
            return b"".join([chunk async for chunk in self._chunks(request, inflight)])

        with self._intake.message() as inflight:
            yield await self._before_timeout(read(inflight))

    async def _read_chunks(
        self, request: web.Request, chunks: Chunks, inflight: InflightBytes
    ) -> None:
        """Queue the chunks of a body as they come; None at its end.

        The body is read without backpressure: once an answer has begun, nginx gives up on a body
        that is not read for a while. The size limit of a body bounds the queue.
        """
        try:
            async for chunk in self._chunks(request, inflight):
                chunks.put_nowait(chunk)
            chunks.put_nowait(None)
        except web.HTTPRequestEntityTooLarge:
            chunks.put_nowait(RequestError(_too_large(request)))
        except KVShareError as error:
            chunks.put_nowait(error)
        except ConnectionError as error:
            chunks.put_nowait(RequestError(f"the body cannot be read: {shown(error)}"))

    async def _chunks(self, request: web.Request, inflight: InflightBytes) -> AsyncIterator[bytes]:
        """Yield the chunks of a body within the limits.

        Raises:
            HTTPRequestEntityTooLarge: if the body is too long.
            NoRoomError: if all bodies together are too long.
            RequestError: if the body cannot be read.
            ConnectionError: if the client has gone.
        """
        num_bytes = 0
        try:
            async for chunk in request.content.iter_any():
                num_bytes += len(chunk)
                self._check_size(request, num_bytes)
                inflight.add(len(chunk))
                yield chunk
        except (KVShareError, web.HTTPException, ConnectionError):
            raise
        except Exception as error:  # aiohttp's errors of malformed chunks and encodings
            raise RequestError(f"the body cannot be read: {shown(error)}") from error

    def _check_size(self, request: web.Request, num_bytes: int) -> None:
        """Refuse a body whose bytes so far, or whose announced length, exceed the limit."""
        most = request.client_max_size
        if num_bytes > most:
            self._service.metrics.refuse(REQUEST_BYTES)
            raise web.HTTPRequestEntityTooLarge(most, num_bytes)

    async def _before_timeout(self, coming: Awaitable[Anything]) -> Anything:
        """Wait for a client to send, within the timeout of bodies."""
        timeout_s = self._service.config.body_timeout_s
        try:
            return await asyncio.wait_for(coming, timeout_s)
        except asyncio.TimeoutError as error:
            self._service.metrics.refuse(BODY_TIME)
            raise DeadlineError(
                f"the body did not come within {timeout_s:g} s, which server.body_timeout_s allows"
            ) from error

    def _decode_infer(
        self, request: web.Request, body: bytes
    ) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Decode the JSON of a message and its inputs, which may be in bytes after the JSON."""
        length = request.headers.get(JSON_LENGTH, str(len(body)))
        if not length.isdecimal() or len(length) > MAX_DIGITS or int(length) > len(body):
            raise RequestError(f"{JSON_LENGTH} is {shown(length)}; the body has {len(body)} bytes")
        head = self._decode_request(body[: int(length)])
        return head, decode_infer_json(head, body[int(length) :])

    async def _answer(self, call: Call, served: Served, raw: Any) -> Answer | KVShareError:
        if not isinstance(raw, dict):
            return RequestError(f"a request is a JSON object; got {type(raw).__name__}")
        try:
            return await self._service.rank(call, served, raw)
        except tuple(STATUS_BY_ERROR) as error:
            return error

    def _served(self, request: web.Request) -> Served:
        return self._service.models.get(
            request.match_info["model"], request.match_info.get("version")
        )


async def split_lines(chunks: Chunks) -> Lines:
    """Yield the lines of a body, except blank ones; each byte is searched and copied once."""
    begun: list[bytes] = []  # pieces of a line whose end has not come
    while (chunk := await chunks.get()) is not None:
        if isinstance(chunk, Exception):
            raise chunk
        *ends, start = chunk.split(b"\n")
        for end in ends:
            line = b"".join([*begun, end])
            begun.clear()
            if line.strip():
                yield line
        begun.append(start)
    line = b"".join(begun)
    if line.strip():
        yield line


async def _write_event(
    response: web.StreamResponse, stream: Stream | None, name: str, data: dict[str, Any]
) -> None:
    event = f"event: {name}\ndata: {json.dumps(data, allow_nan=False)}\n\n".encode()
    if stream is None:
        await response.write(event)
    else:
        # A client that does not read holds K/V until the stream's deadline at most.
        await stream.wait(response.write(event))


def _call(request: web.Request) -> Call:
    """Read the call from headers and URL."""
    timeout = request.headers.get(TIMEOUT)
    request_id = request.headers.get(REQUEST_ID) or uuid.uuid4().hex
    model = request.match_info.get("model") or request.query.get("model")
    version = request.match_info.get("version") or request.query.get("version")
    timeout_s = None if timeout is None else _milliseconds(timeout) / 1e3
    check_request_id(request_id, REQUEST_ID)
    return Call(
        server=HTTP,
        model=model,
        version=version,
        request_id=request_id,
        timeout_s=timeout_s,
        began_at=time.monotonic(),
    )


def _milliseconds(text: str) -> float:
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0.0 < milliseconds < math.inf:
        raise RequestError(f"{TIMEOUT} is {shown(text)}; milliseconds above 0 are allowed")
    return milliseconds


def _to_json(answer: Answer | KVShareError, raw: Any) -> dict[str, Any]:
    if isinstance(answer, Answer):
        return answer.to_json()
    return {"request_id": request_id_of(raw), **_error_json(answer)}


def _error_json(error: BaseException) -> dict[str, Any]:
    return {"error": {"type": type(error).__name__, "message": str(error)}}


def _json(body: Any, status: int = 200) -> web.Response:
    text = json.dumps(body, allow_nan=False)
    headers = {"Retry-After": RETRY_AFTER_S[status]} if status in RETRY_AFTER_S else None
    return web.Response(text=text, status=status, headers=headers, content_type="application/json")


@web.middleware
async def _plain_bodies(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse compressed bodies: their decompressed size is not bounded."""
    coding = request.headers.get("Content-Encoding", "identity")
    if coding != "identity":
        return _failure(request, 415, RequestError(f"Content-Encoding is {shown(coding)}"))
    return await handler(request)


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Answer every error as JSON: of ``/v2`` in its protocol, of the rest in our format."""
    try:
        return await handler(request)
    except tuple(STATUS_BY_ERROR) as error:
        return _failure(request, STATUS_BY_ERROR[type(error)], error)
    except web.HTTPRequestEntityTooLarge as error:
        return _failure(request, error.status, RequestError(_too_large(request)))
    except web.HTTPException as error:
        return _failure(request, error.status, RequestError(error.reason))
    except ConnectionError:
        return web.Response(status=400)  # The client has gone and will not read it.
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        return _failure(request, 500, RuntimeError(INTERNAL_ERROR))


def _too_large(request: web.Request) -> str:
    came = "longer" if request.content_length is None else f"{request.content_length} bytes"
    return f"the body is {came}; {request.client_max_size} are allowed by server.max_request_bytes"


def _failure(request: web.Request, status: int, error: Exception) -> web.Response:
    if request.path.startswith("/v2"):
        return _json({"error": str(error)}, status)
    return _json({"request_id": None, **_error_json(error)}, status)


def _bearer(token: bytes | None, metrics: ServerMetrics) -> Middleware:
    expected = b"" if token is None else b"Bearer " + token

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_open = request.path == "/" or request.path.startswith("/v2/health/")
        given = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if token is None or is_open or hmac.compare_digest(given, expected):
            return await handler(request)
        metrics.refuse(TOKEN)
        response = _failure(request, 401, RequestError("a bearer token is needed"))
        response.headers["WWW-Authenticate"] = "Bearer"
        return response

    return check
