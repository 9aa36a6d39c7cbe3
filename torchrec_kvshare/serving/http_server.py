"""The HTTP face: the Open Inference Protocol, requests in the project's format, and the page."""

import asyncio
import hmac
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

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
from torchrec_kvshare.features.decode import decode_json, decode_request
from torchrec_kvshare.features.parse import check_request_id, parse_forget, request_id_of
from torchrec_kvshare.scoring.engine import Answer
from torchrec_kvshare.serving.columns import output_tensors, raw_requests
from torchrec_kvshare.serving.intake import Held
from torchrec_kvshare.serving.metrics import BODY_TIME, REQUEST_BYTES, TOKEN, ServerMetrics
from torchrec_kvshare.serving.models import Served
from torchrec_kvshare.serving.oip import (
    decode_infer_json,
    encode_infer_json,
    model_metadata_json,
    requested_outputs_json,
    requested_report_json,
    server_metadata_json,
)
from torchrec_kvshare.serving.peers import FORGOTTEN, LOCAL, Peers
from torchrec_kvshare.serving.service import Call, Group, Service, Stream

logger = logging.getLogger(__name__)

Anything = TypeVar("Anything")
Arguments = ParamSpec("Arguments")

FACE = "http"
PAGE = Path(__file__).with_name("page.html")
POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
JSON_LENGTH = "Inference-Header-Content-Length"  # Triton's, where tensors follow the JSON
MAX_DIGITS = 19  # of a length
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
RETRY_AFTER_S = {429: "1", 503: "1"}  # of a server that has no room, or no model yet
Chunks: TypeAlias = "asyncio.Queue[bytes | KVShareError | None]"
Lines: TypeAlias = AsyncIterator[bytes]
NEEDS_TOKEN = "users are forgotten where callers say a token: server.token_file is not set"
INTERNAL_ERROR = "an error inside the server; its log has more"


def http_app(service: Service, token: bytes | None) -> web.Application:
    """The application.

    Args:
        service: that answers.
        token: what callers must say as a bearer token; None for nothing.

    Raises:
        ConfigError: if the server's peers cannot be asked.
    """
    face = _HttpFace(service, has_token=token is not None)
    app = web.Application(
        middlewares=[_errors_as_json, _bearer(token, service.metrics), _plain_bodies],
        client_max_size=service.config.max_request_bytes,
    )
    model = "/v2/models/{model}"
    for prefix in (model, f"{model}/versions/{{version}}"):
        app.router.add_get(prefix, face.model_metadata)
        app.router.add_get(f"{prefix}/ready", face.model_ready)
        app.router.add_post(f"{prefix}/infer", face.infer)
    app.router.add_get("/v2", face.server_metadata)
    app.router.add_get("/v2/health/live", face.live)
    app.router.add_get("/v2/health/ready", face.ready)
    app.router.add_post("/v1/rank", face.rank)
    app.router.add_post("/v1/forget", face.forget)
    app.router.add_get("/v1/state", face.state)
    app.router.add_get("/v1/example", face.example)
    app.router.add_get("/metrics", face.metrics)
    app.router.add_get("/", face.page)
    app.on_response_prepare.append(face.close_while_draining)
    return app


class _HttpFace:
    def __init__(self, service: Service, has_token: bool) -> None:
        self._service = service
        self._has_token = has_token
        self._peers = Peers(service.config)
        self._page = PAGE.read_text()
        most_values = service.config.max_json_values
        self._decode = partial(decode_json, most_values=most_values)
        self._decode_request = partial(decode_request, most_values=most_values)

    async def close_while_draining(self, _: web.Request, response: web.StreamResponse) -> None:
        """Tell clients that keep their connection to make another, elsewhere."""
        if self._service.is_draining:
            response.headers["Connection"] = "close"
            response.force_close()

    async def live(self, _: web.Request) -> web.Response:
        return _json({"live": True})

    async def ready(self, _: web.Request) -> web.Response:
        is_ready = self._service.is_ready
        return _json({"ready": is_ready}, 200 if is_ready else 503)

    async def server_metadata(self, _: web.Request) -> web.Response:
        return _json(server_metadata_json())

    async def model_metadata(self, request: web.Request) -> web.Response:
        served = self._served(request)
        schema = served.engine.schema
        return _json(model_metadata_json(served.name, [served.version], schema))

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

    async def forget(self, request: web.Request) -> web.Response:
        """Forget a user at all replicas, or at this one alone if one of them asks."""
        if not self._has_token:
            raise web.HTTPForbidden(reason=NEEDS_TOKEN)
        async with self._body(request) as body:
            user_id = parse_forget(await self._parsed(body, self._decode_request, body))
        if not self._peers or LOCAL in request.query:
            return _json({FORGOTTEN: await self._service.forget(user_id)})
        done, failed = await self._peers.forget(user_id, request.headers["Authorization"])
        if not failed:
            return _json({"replicas": done})
        reasons = "; ".join(f"{replica}: {reason}" for replica, reason in failed.items())
        error = UnavailableError(f"not all replicas have forgotten the user; ask again. {reasons}")
        return _json({"request_id": None, **_error(error), "replicas": done}, 503)

    async def infer(self, request: web.Request) -> web.Response:
        """Score the requests of one message, all or none."""
        async with self._body(request) as body:
            call = _call(request)
            with self._service.counted(call) as served:
                head, tensors = await self._parsed(body, self._tensors, request, body)
                requested = requested_outputs_json(head)
                raws = raw_requests(tensors, served.engine.schema, self._service.limits.requests)
                message_id = head.get("id") or call.request_id
                if not isinstance(message_id, str):
                    raise RequestError(f"id is {type(message_id).__name__}; a text is allowed")
                check_request_id(message_id, "id")
                said = {"report": requested_report_json(head)}
                answers = await self._service.rank_all(call, served, [raw | said for raw in raws])
        text, json_length = encode_infer_json(
            *(served.name, answers[0].model_version, message_id),
            *(output_tensors(answers), requested),
        )
        response = web.Response(body=text, content_type="application/json")
        if json_length is not None:
            response.content_type = "application/octet-stream"
            response.headers[JSON_LENGTH] = str(json_length)
        return response

    async def rank(self, request: web.Request) -> web.StreamResponse:
        """Score one request or a list of them; in a list an error stands in its place."""
        if request.query.get("stream") == "1":
            return await self._rank_stream(request)
        async with self._body(request) as body:
            call = _call(request)
            raw: Any = None
            try:
                with self._service.counted(call) as served:
                    raw = await self._parsed(body, self._decode, body)
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
        """Score candidates as they come, line by line; server-sent events as they are scored."""
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
            with self._service.counted(call) as served, self._reading(request, chunks):
                first = await self._before_timeout(anext(lines, b""))
                raw = await self._parsed(first, self._decode_request, first)
                with self._service.stream(call, served, raw) as stream:
                    await response.prepare(request)
                    await self._write_groups(stream, lines, response)
                    await _write_event(response, stream, "end", {})
        except KVShareError as error:
            if not response.prepared:
                raise
            await _write_event(response, None, "error", _error(error))
        except ConnectionError:
            pass  # The client has gone, as it may.
        return response

    @contextmanager
    def _reading(self, request: web.Request, chunks: Chunks) -> Iterator[None]:
        """Have a body read while its first lines are answered."""
        with self._service.intake.message() as held:
            reader = asyncio.ensure_future(self._read_chunks(request, chunks, held))
            try:
                yield
            finally:
                reader.cancel()

    async def _write_groups(
        self, stream: Stream, lines: Lines, response: web.StreamResponse
    ) -> None:
        # So many wait to be scored, and no more, until the scores of one have left.
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
                    async for place, part in group.parts():
                        scored = {"first_candidate": place} | part.to_json()
                        await _write_event(response, stream, "scores", scored)
                except ScoreError as error:  # of this group alone
                    failed = {"first_candidate": group.job.first_candidate} | _error(error)
                    await _write_event(response, stream, "error", failed)
        finally:
            reader.cancel()

    async def _read_groups(
        self, stream: Stream, lines: Lines, groups: "asyncio.Queue[Group | Exception | None]"
    ) -> None:
        try:
            await groups.put(stream.first())
            async for line in lines:
                raw = await self._parsed(line, self._decode_request, line)
                await groups.put(stream.next(raw))
            await groups.put(None)
        except KVShareError as error:
            await groups.put(error)

    @asynccontextmanager
    async def _body(self, request: web.Request) -> AsyncIterator[bytes]:
        """The whole body, which counts among the bytes in flight until the block ends."""
        self._check_size(request, request.content_length or 0)
        with self._service.intake.message() as held:
            yield await self._before_timeout(self._received(request, held))

    async def _received(self, request: web.Request, held: Held) -> bytes:
        return b"".join([chunk async for chunk in self._chunks(request, held)])

    async def _read_chunks(self, request: web.Request, chunks: Chunks, held: Held) -> None:
        """A body that is still coming; None at its end.

        All of it is read as it comes: once an answer has begun, nginx does not go on with a body
        that nobody read for a while. What may wait here is what a request may hold.
        """
        try:
            async for chunk in self._chunks(request, held):
                chunks.put_nowait(chunk)
            chunks.put_nowait(None)
        except web.HTTPRequestEntityTooLarge:
            chunks.put_nowait(RequestError(_too_large(request)))
        except KVShareError as error:
            chunks.put_nowait(error)
        except ConnectionError as error:
            chunks.put_nowait(RequestError(f"the body cannot be read: {error!r:.200}"))

    async def _chunks(self, request: web.Request, held: Held) -> AsyncIterator[bytes]:
        """The chunks of a body, as long as there is room for them.

        Raises:
            HTTPRequestEntityTooLarge: if it is longer than one may be.
            NoRoomError: if all bodies together are.
            RequestError: if it cannot be read.
            ConnectionError: if the client has gone.
        """
        num_bytes = 0
        try:
            async for chunk in request.content.iter_any():
                num_bytes += len(chunk)
                self._check_size(request, num_bytes)
                held.add(len(chunk))
                yield chunk
        except (KVShareError, web.HTTPException, ConnectionError):
            raise
        except Exception as error:  # aiohttp's own, of chunks and encodings that are none
            raise RequestError(f"the body cannot be read: {error!r:.200}") from error

    def _check_size(self, request: web.Request, num_bytes: int) -> None:
        """Refuse a body of which so much came or is to come, before any more is read."""
        most = request.client_max_size
        if num_bytes > most:
            self._service.metrics.refuse(REQUEST_BYTES)
            raise web.HTTPRequestEntityTooLarge(most, num_bytes)

    async def _before_timeout(self, coming: Awaitable[Anything]) -> Anything:
        """What a client sends, which is not waited for any longer than it may take."""
        timeout_s = self._service.config.body_timeout_s
        try:
            return await asyncio.wait_for(coming, timeout_s)
        except asyncio.TimeoutError as error:
            self._service.metrics.refuse(BODY_TIME)
            raise DeadlineError(
                f"the body did not come within {timeout_s:g} s, which server.body_timeout_s allows"
            ) from error

    async def _parsed(
        self,
        text: bytes,
        parse: Callable[Arguments, Anything],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Anything:
        return await self._service.intake.parse(len(text), parse, *args, **kwargs)

    def _tensors(
        self, request: web.Request, body: bytes
    ) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """The JSON of a message and its inputs, which may be in the bytes behind it."""
        length = request.headers.get(JSON_LENGTH, str(len(body)))
        if not length.isdecimal() or len(length) > MAX_DIGITS or int(length) > len(body):
            raise RequestError(f"{JSON_LENGTH} is {length[:200]!r}; the body has {len(body)} bytes")
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
    """Lines of a body, without the blank ones, each searched and copied once however it comes."""
    begun: list[bytes] = []  # of a line whose end has not come
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
        # A client that does not read holds K/V until the stream's deadline and no longer.
        await stream.wait(response.write(event))


def _call(request: web.Request) -> Call:
    """What the request says of itself beside its body."""
    timeout = request.headers.get(TIMEOUT)
    request_id = request.headers.get(REQUEST_ID) or uuid.uuid4().hex
    model = request.match_info.get("model") or request.query.get("model")
    version = request.match_info.get("version") or request.query.get("version")
    timeout_s = None if timeout is None else _milliseconds(timeout) / 1e3
    check_request_id(request_id, REQUEST_ID)
    return Call(FACE, model, version, request_id, timeout_s, time.monotonic())


def _milliseconds(text: str) -> float:
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0.0 < milliseconds < math.inf:
        raise RequestError(f"{TIMEOUT} is {text[:200]!r}; milliseconds above 0 are allowed")
    return milliseconds


def _to_json(answer: Answer | KVShareError, raw: Any) -> dict[str, Any]:
    if isinstance(answer, Answer):
        return answer.to_json()
    return {"request_id": request_id_of(raw), **_error(answer)}


def _error(error: BaseException) -> dict[str, Any]:
    return {"error": {"type": type(error).__name__, "message": str(error)}}


def _json(body: Any, status: int = 200) -> web.Response:
    text = json.dumps(body, allow_nan=False)
    headers = {"Retry-After": RETRY_AFTER_S[status]} if status in RETRY_AFTER_S else None
    return web.Response(text=text, status=status, headers=headers, content_type="application/json")


@web.middleware
async def _plain_bodies(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse bodies that are compressed: what they unfold to has no limit but our memory."""
    coding = request.headers.get("Content-Encoding", "identity")
    if coding != "identity":
        return _failure(request, 415, RequestError(f"Content-Encoding is {coding[:200]!r}"))
    return await handler(request)


@web.middleware
async def _errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error as JSON: of ``/v2`` as its protocol has it, of the rest as the project has it."""
    try:
        return await handler(request)
    except tuple(STATUS_BY_ERROR) as error:
        return _failure(request, STATUS_BY_ERROR[type(error)], error)
    except web.HTTPRequestEntityTooLarge as error:
        return _failure(request, error.status, RequestError(_too_large(request)))
    except web.HTTPException as error:
        return _failure(request, error.status, RequestError(error.reason))
    except ConnectionError:
        return web.Response(status=400)  # The client has gone: nobody reads it.
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        return _failure(request, 500, RuntimeError(INTERNAL_ERROR))


def _too_large(request: web.Request) -> str:
    came = "longer" if request.content_length is None else f"{request.content_length} bytes"
    return f"the body is {came}; {request.client_max_size} are allowed by server.max_request_bytes"


def _failure(request: web.Request, status: int, error: Exception) -> web.Response:
    if request.path.startswith("/v2"):
        return _json({"error": str(error)}, status)
    return _json({"request_id": None, **_error(error)}, status)


def _bearer(token: bytes | None, metrics: ServerMetrics) -> Middleware:
    expected = b"" if token is None else b"Bearer " + token

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_open = request.path == "/" or request.path.startswith("/v2/health/")
        said = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if token is None or is_open or hmac.compare_digest(said, expected):
            return await handler(request)
        metrics.refuse(TOKEN)
        response = _failure(request, 401, RequestError("a bearer token is needed"))
        response.headers["WWW-Authenticate"] = "Bearer"
        return response

    return check
