"""HTTP connections: a limit of their number, and timeouts for headers and for reading answers.

aiohttp has none of these: a silent connection stays open for an hour, and one that sends its
headers byte by byte or reads no answer stays open for ever.
"""

import asyncio
import ssl
from typing import Any

from aiohttp import web
from aiohttp.web_protocol import RequestHandler

from torchrec_kvshare.config import ServerConfig
from torchrec_kvshare.serving.metrics import ANSWER_TIME, CONNECTIONS, HEADER_TIME, ServerMetrics

REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nContent-Length: 0\r\n"
    b"Connection: close\r\n\r\n"
)


class BoundedSite(web.TCPSite):
    """The HTTP listener, with a limit of open connections.

    Args:
        runner: of the application.
        config: host, port and limits.
        metrics: counts open, refused and ended connections.
        ssl_context: None for plain text.
        backlog: connections that wait to be accepted.
    """

    def __init__(
        self,
        runner: web.AppRunner,
        config: ServerConfig,
        metrics: ServerMetrics,
        ssl_context: ssl.SSLContext | None,
        backlog: int,
    ) -> None:
        super().__init__(
            runner, config.host, config.http_port, ssl_context=ssl_context, backlog=backlog
        )
        self.config = config
        self.metrics = metrics
        self.num_open = 0
        metrics.read("connections_open", lambda: self.num_open)

    async def start(self) -> None:
        """Start to listen."""
        await web.BaseSite.start(self)
        handshake_s = None if self._ssl_context is None else self.config.header_timeout_s
        self._server = await asyncio.get_running_loop().create_server(
            self._new_connection,
            *(self._host, self._port),
            ssl=self._ssl_context,
            backlog=self._backlog,
            ssl_handshake_timeout=handshake_s,
        )

    def _new_connection(self) -> "_Connection":
        server = self._runner.server
        assert server is not None
        return _Connection(self, server, loop=asyncio.get_running_loop(), **server._kwargs)


class _Connection(RequestHandler):
    """A client's connection; a timer runs for each limit that it must meet."""

    __slots__ = ("_is_counted", "_site", "_timer_by_limit")

    def __init__(self, site: BoundedSite, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._site = site
        self._is_counted = False
        self._timer_by_limit: dict[str, asyncio.TimerHandle] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request, or refuse a connection beyond the limit."""
        assert isinstance(transport, asyncio.Transport)
        if self._site.num_open >= self._site.config.max_connections:
            self._site.metrics.refuse(CONNECTIONS)
            transport.write(REFUSAL)
            transport.close()
            return
        self._is_counted = True
        self._site.num_open += 1
        # With no write buffer, pause_writing is called for any rest that the client does not read.
        transport.set_write_buffer_limits(high=0)
        super().connection_made(transport)
        self._start_timer(HEADER_TIME, self._site.config.header_timeout_s)

    def data_received(self, data: bytes) -> None:
        """Read; a request that has begun must send its headers in time."""
        super().data_received(data)
        if self._messages:
            self._stop_timer(HEADER_TIME)
        elif self._waiter is not None and not self._waiter.done():
            self._start_timer(HEADER_TIME, self._site.config.header_timeout_s)

    def pause_writing(self) -> None:
        """Start the timer of a client that reads more slowly than it is answered."""
        super().pause_writing()
        self._start_timer(ANSWER_TIME, self._site.config.body_timeout_s)

    def resume_writing(self) -> None:
        """Stop the timer: the client has read everything that was sent."""
        super().resume_writing()
        self._stop_timer(ANSWER_TIME)

    def connection_lost(self, exc: BaseException | None) -> None:
        """Stop all timers and stop counting the connection."""
        for limit in [*self._timer_by_limit]:
            self._stop_timer(limit)
        if self._is_counted:
            self._site.num_open -= 1
        super().connection_lost(exc)

    def _start_timer(self, limit: str, timeout_s: float) -> None:
        if limit not in self._timer_by_limit:
            transport = self.transport
            assert transport is not None
            timer = self._loop.call_later(timeout_s, self._expire, limit, transport)
            self._timer_by_limit[limit] = timer

    def _stop_timer(self, limit: str) -> None:
        timer = self._timer_by_limit.pop(limit, None)
        if timer is not None:
            timer.cancel()

    def _expire(self, limit: str, transport: asyncio.Transport) -> None:
        del self._timer_by_limit[limit]
        self._site.metrics.refuse(limit)
        transport.abort()
