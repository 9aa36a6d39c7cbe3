"""The HTTP face: the Open Inference Protocol, requests in the project's format, and the page."""

import asyncio
import hmac
import json
import logging
import math
import time
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from torchrec_kvshare.engine import Answer
from torchrec_kvshare.errors import (
    DeadlineError,
    KVShareError,
    OverloadError,
    RequestError,
    UnavailableError,
    UnknownModelError,
)
from torchrec_kvshare.features import decode_json, decode_request
from torchrec_kvshare.serving.columns import output_tensors, raw_requests
from torchrec_kvshare.serving.models import Served
from torchrec_kvshare.serving.oip import (
    decode_infer_json,
    encode_infer_json,
    model_metadata_json,
    requested_outputs_json,
    server_metadata_json,
)
from torchrec_kvshare.serving.service import Call, Group, Service, Stream

logger = logging.getLogger(__name__)

Anything = TypeVar("Anything")

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
    UnavailableError: 503,
    DeadlineError: 504,
}
Lines: TypeAlias = "asyncio.Queue[bytes | RequestError | None]"
INTERNAL_ERROR = "an error inside the server; its log has more"


def http_app(service: Service, token: bytes | None) -> web.Application:
    """The application.

    Args:
        service: that answers.
        token: what callers must say as a bearer token; None for nothing.
    """
    face = _HttpFace(service)
    app = web.Application(
        middlewares=[_errors_as_json, _bearer(token), _plain_bodies],
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
    app.router.add_get("/v1/state", face.state)
    app.router.add_get("/v1/example", face.example)
    app.router.add_get("/metrics", face.metrics)
    app.router.add_get("/", face.page)
    return app


class _HttpFace:
    def __init__(self, service: Service) -> None:
        self._service = service
        self._page = PAGE.read_text()

    async def live(self, _: web.Request) -> web.Response:
        return web.json_response({"live": True})

    async def ready(self, _: web.Request) -> web.Response:
        is_ready = self._service.is_ready
        return web.json_response({"ready": is_ready}, status=200 if is_ready else 503)

    async def server_metadata(self, _: web.Request) -> web.Response:
        return web.json_response(server_metadata_json())

    async def model_metadata(self, request: web.Request) -> web.Response:
        served = self._served(request)
        schema = served.engine.schema
        return web.json_response(model_metadata_json(served.name, [served.version], schema))

    async def model_ready(self, request: web.Request) -> web.Response:
        return web.json_response({"name": self._served(request).name, "ready": True})

    async def state(self, _: web.Request) -> web.Response:
        return web.json_response(self._service.to_json())

    async def example(self, request: web.Request) -> web.Response:
        return web.json_response(self._service.models.get(request.query.get("model")).example())

    async def metrics(self, _: web.Request) -> web.Response:
        headers = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=self._service.metrics.text(), headers=headers)

    async def page(self, _: web.Request) -> web.Response:
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store"}
        return web.Response(text=self._page, content_type="text/html", headers=headers)

    async def infer(self, request: web.Request) -> web.Response:
        """Score the requests of one message, all or none."""
        body = await self._before_timeout(request.read())
        call = _call(request)
        with self._service.counted(call) as served:
            head, binary = _parts(request, body)
            requested = requested_outputs_json(head)
            tensors = decode_infer_json(head, binary)
            raws = raw_requests(tensors, served.engine.schema, self._service.limits.requests)
            message_id = head.get("id") or call.request_id
            if not isinstance(message_id, str):
                raise RequestError(f"id is {type(message_id).__name__}; a text is allowed")
            answers = await self._service.rank_all(call, served, raws)
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
        body = await self._before_timeout(request.read())
        call = _call(request)
        raw: Any = None
        try:
            with self._service.counted(call) as served:
                raw = decode_json(body)
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
        call = _call(request)
        response = web.StreamResponse(
            headers={
                "Content-Type": "text/event-stream",
                "Cache-Control": "no-store",
                "X-Accel-Buffering": "no",
                REQUEST_ID: call.request_id,
            }
        )
        lines: Lines = asyncio.Queue()
        reader = asyncio.ensure_future(_read_lines(request, lines))
        try:
            with self._service.counted(call) as served:
                first = await self._before_timeout(_next_line(lines))
                with self._service.stream(call, served, decode_request(first or b"")) as stream:
                    await response.prepare(request)
                    await self._write_groups(stream, lines, response)
                    await _write_event(response, stream, "end", {})
        except KVShareError as error:
            if not response.prepared:
                raise
            await _write_event(response, None, "error", _error(error))
        except ConnectionError:
            pass  # The client has gone, as it may.
        finally:
            reader.cancel()
        return response

    async def _write_groups(
        self, stream: Stream, lines: Lines, response: web.StreamResponse
    ) -> None:
        # So many wait to be scored, and no more, until the scores of one have left.
        groups: asyncio.Queue[Group | Exception | None] = asyncio.Queue(
            self._service.config.stream_depth
        )
        reader = asyncio.ensure_future(_read_groups(stream, lines, groups))
        try:
            while True:
                group = await stream.wait(groups.get())
                if group is None:
                    break
                if isinstance(group, Exception):
                    raise group
                async for place, part in group.parts():
                    scored = {"first_candidate": place} | part.to_json()
                    await _write_event(response, stream, "scores", scored)
        finally:
            reader.cancel()

    async def _before_timeout(self, coming: Coroutine[Any, Any, Anything]) -> Anything:
        """What a client sends, which is not waited for any longer than a stream may take."""
        timeout_s = self._service.config.stream_timeout_s
        try:
            return await asyncio.wait_for(coming, timeout_s)
        except asyncio.TimeoutError as error:
            raise DeadlineError(f"the body did not come within {timeout_s:g} s") from error

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


async def _read_groups(
    stream: Stream, lines: Lines, groups: "asyncio.Queue[Group | Exception | None]"
) -> None:
    try:
        await groups.put(stream.first())
        while (line := await _next_line(lines)) is not None:
            await groups.put(stream.next(decode_request(line)))
        await groups.put(None)
    except KVShareError as error:
        await groups.put(error)


async def _read_lines(request: web.Request, lines: Lines) -> None:
    """Lines of a body that is still coming, without the blank ones; None at its end.

    All of it is read as it comes: once an answer has begun, nginx does not go on with a body that
    nobody read for a while. What may wait here is what a request may hold.
    """
    try:
        waiting, num_bytes = b"", 0
        async for chunk in request.content.iter_any():
            num_bytes += len(chunk)
            if num_bytes > request.client_max_size:
                raise RequestError(f"the body is longer than {request.client_max_size} bytes")
            *whole, waiting = (waiting + chunk).split(b"\n")
            for line in filter(bytes.strip, whole):
                lines.put_nowait(line)
        if waiting.strip():
            lines.put_nowait(waiting)
        lines.put_nowait(None)
    except RequestError as error:
        lines.put_nowait(error)
    except Exception as error:  # aiohttp's own, of chunks and encodings that are none
        lines.put_nowait(RequestError(f"the body cannot be read: {error!r:.200}"))


async def _next_line(lines: Lines) -> bytes | None:
    line = await lines.get()
    if isinstance(line, Exception):
        raise line
    return line


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
    return Call(FACE, model, version, request_id[:200], timeout_s, time.monotonic())


def _milliseconds(text: str) -> float:
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = math.nan
    if not 0.0 < milliseconds < math.inf:
        raise RequestError(f"{TIMEOUT} is {text[:200]!r}; milliseconds above 0 are allowed")
    return milliseconds


def _parts(request: web.Request, body: bytes) -> tuple[dict[str, Any], bytes]:
    """The JSON of a message and the bytes behind it."""
    length = request.headers.get(JSON_LENGTH)
    if length is None:
        return decode_request(body), b""
    if not length.isdecimal() or len(length) > MAX_DIGITS or int(length) > len(body):
        raise RequestError(f"{JSON_LENGTH} is {length[:200]!r}; the body has {len(body)} bytes")
    return decode_request(body[: int(length)]), body[int(length) :]


def _to_json(answer: Answer | KVShareError, raw: Any) -> dict[str, Any]:
    if isinstance(answer, Answer):
        return answer.to_json()
    return {"request_id": _id_of(raw), **_error(answer)}


def _id_of(raw: Any) -> str | int | None:
    request_id = raw.get("request_id") if isinstance(raw, dict) else raw
    is_id = isinstance(request_id, str | int) and not isinstance(request_id, bool)
    return request_id if is_id and len(str(request_id)) <= 1000 else None


def _error(error: BaseException) -> dict[str, Any]:
    return {"error": {"type": type(error).__name__, "message": str(error)}}


def _json(body: Any, status: int = 200) -> web.Response:
    text = json.dumps(body, allow_nan=False)
    return web.Response(text=text, status=status, content_type="application/json")


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
    except web.HTTPException as error:
        return _failure(request, error.status, RequestError(error.reason))
    except ConnectionError:
        return web.Response(status=400)  # The client has gone: nobody reads it.
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        return _failure(request, 500, RuntimeError(INTERNAL_ERROR))


def _failure(request: web.Request, status: int, error: Exception) -> web.Response:
    if request.path.startswith("/v2"):
        return _json({"error": str(error)}, status)
    return _json({"request_id": None, **_error(error)}, status)


def _bearer(token: bytes | None) -> Middleware:
    expected = b"" if token is None else b"Bearer " + token

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        is_open = request.path == "/" or request.path.startswith("/v2/health/")
        said = request.headers.get("Authorization", "").encode("utf-8", "surrogateescape")
        if token is None or is_open or hmac.compare_digest(said, expected):
            return await handler(request)
        response = _failure(request, 401, RequestError("a bearer token is needed"))
        response.headers["WWW-Authenticate"] = "Bearer"
        return response

    return check
