"""HTTP/1.1 at the edge: one connection with a client that may be slow, broken or hostile.

uvicorn reads requests and writes replies; this class adds what middleware is too late for. A connection is always in one
phase, and each phase in which the client owes something has a deadline:

    IDLE --first byte--> HEAD --head complete--> BODY --last byte--> REPLY --answered--> IDLE
      |                    |                       |                                       (answered before the body is here:
   idle_timeout_s   header_timeout_s    body_timeout_s, min_body_bytes_per_s                DRAIN, and then IDLE or the end)
    closes, says       408, ends               408, ends
      nothing

LAST is the end: the reply that refused something was written, what still comes is thrown away.

While a request is being answered the next one stays unparsed. Those that came with it in one piece are queued, in order.

One timer per connection serves all deadlines. A later deadline leaves it alone, so an ordinary request sets none.

What the event loop calls ends the connection if it raises.
"""

from __future__ import annotations

import asyncio
import urllib.parse
from enum import Enum
from typing import TYPE_CHECKING, ClassVar

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from inferflux_core.serving.connection_faults import aborts, log_fault
from inferflux_core.serving.connections import Connections, Refusal
from inferflux_core.serving.held_flow import HeldFlow
from inferflux_core.serving.request_head import HeadRefused, check_head, split_target

if TYPE_CHECKING:
    from uvicorn._types import ASGI3Application

MAX_QUEUED_REQUESTS = 128
MAX_BACKLOG_BYTES = 64 * 1024
LINGER_SECONDS = 1.0
DRAIN_SECONDS = 2.0
WRITE_STALL_GRACE_SECONDS = 5.0  # a stream notices its slow reader itself, at `slow_reader_timeout_s`, and says so

_MALFORMED = Refusal(400, "malformed_request", "This is not a well-formed HTTP/1.1 request (RFC 9112).")
_HEAD_TIMEOUT = Refusal(408, "header_timeout", "The head of the request did not arrive in time (server.header_timeout_s).")
_BODY_TIMEOUT = Refusal(
    408,
    "body_timeout",
    "The body of the request did not arrive in time (server.body_timeout_s, server.min_body_bytes_per_s).",
)
_HEAD_TOO_LARGE = Refusal(
    431, "headers_too_large", "The head of the request is too large (server.max_header_bytes, server.max_headers)."
)
_BODY_TOO_LARGE = Refusal(
    413, "request_too_large", "The body as sent, with the framing of its chunks, is too large (server.max_body_bytes)."
)


class Phase(Enum):
    """What a connection waits for; see the module."""

    IDLE = "idle"
    HEAD = "head"
    BODY = "body"
    REPLY = "reply"
    DRAIN = "drain"
    LAST = "last"


class _Stage(Enum):
    """Where in a message the parser is."""

    BETWEEN = 0
    HEAD = 1
    BODY = 2


class _EndOfInput(Exception):
    """Raised in a callback of the parser: what follows on this connection is not looked at."""


class EdgeProtocol(HttpToolsProtocol):
    """One connection. Made by uvicorn, through a subclass of `edge_protocol`."""

    registry: ClassVar[Connections]
    flow: HeldFlow

    @aborts
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn
        # Before anything that may fail, as `connection_lost` needs it.
        self._settings = self.registry.settings
        self._max_head_bytes = self._settings.max_header_bytes
        self._max_headers = self._settings.max_headers
        # Chunks have framing; what the reader of the body refuses by its size comes long before this.
        self._max_sent_bytes = self._settings.max_body_bytes + max(self._settings.max_body_bytes // 8, 64 * 1024)
        self._phase = Phase.IDLE
        self._stage = _Stage.BETWEEN
        self._ended = False  # no further input is looked at
        self._head_bytes = 0  # of the head being read, as far as known
        self._line_bytes = 0  # of its complete lines
        self._body_bytes = 0
        self._body_since = 0.0
        self._body_arrived = False
        self._running: RequestResponseCycle | None = None
        self._backlog = bytearray()
        self._postponed: Refusal | None = None
        self._deadline: float | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self._lingering = self._admitted = False
        self._address: str | None = None
        super().connection_made(transport)
        self.flow = HeldFlow(transport)
        self._address = self.client[0] if self.client else None
        refusal = self.registry.admit(self._address)
        self._admitted = refusal is None
        if refusal is None:
            self._due_in(self._settings.idle_timeout_s)
        else:
            self._lingering = self.registry.linger()
            self._say_last(refusal)
            if not self._lingering:
                transport.close()

    @aborts
    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._ended = True
        self._postponed = None
        self._backlog.clear()
        self.pipeline.clear()
        # uvicorn tells the last request only, and an earlier one may be the one that is being answered.
        if self._running is not None:
            _disconnect(self._running)
        if self._admitted:
            self.registry.release(self._address)
        if self._lingering:
            self.registry.linger_done()

    def abort(self) -> None:
        """End the connection at once; what was written and not read is dropped."""
        self._ended, self._phase = True, Phase.LAST
        self.transport.abort()

    # --- what comes in ------------------------------------------------------------------------------------------------

    @aborts
    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        phase = self._phase
        if phase is Phase.REPLY:
            self._backlog += data
            if len(self._backlog) > MAX_BACKLOG_BYTES:
                self.flow.hold()
            return
        if phase is Phase.IDLE:
            self._head_bytes = len(data)
        elif phase is Phase.HEAD:
            self._head_bytes += len(data)
        else:
            self._body_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # Nothing is upgraded: the request is answered as it is. What follows it may be of the other protocol.
            self._end_input()
        except httptools.HttpParserError as error:
            if not self._ended:
                cause = error.__context__
                if isinstance(error, httptools.HttpParserCallbackError) and not isinstance(cause, HeadRefused):
                    log_fault("parser", cause or error)
                self._refuse(cause.refusal if isinstance(cause, HeadRefused) else _MALFORMED)
                return
        if self._body_arrived:
            self._body_arrived = False
            self.cycle.message_event.set()
        self._after_input(phase)

    @aborts
    def eof_received(self) -> None:
        if self._phase is Phase.LAST:
            self.transport.close()

    def _after_input(self, before: Phase) -> None:
        """The phase after a piece of input, by where the parser stands."""
        if self._unanswered():
            if self._stage is _Stage.BODY and not self.pipeline:
                self._expect_body(before)
            else:
                self._phase, self._deadline = Phase.REPLY, None
        elif self._ended:
            self.transport.close()
        elif self._stage is _Stage.BODY:
            if self._body_bytes > self._max_sent_bytes:
                self.transport.close()
        elif self._stage is _Stage.BETWEEN and before is Phase.DRAIN:
            self._phase = Phase.IDLE
            self._due_in(self._settings.idle_timeout_s)
        else:  # within a head, or in the empty lines that may precede one
            if before is not Phase.HEAD:
                if before is not Phase.IDLE:
                    self._head_bytes = 0  # it began somewhere within this piece
                self._phase = Phase.HEAD
                self._due_in(self._settings.header_timeout_s)
            if self._head_bytes > self._max_head_bytes:
                self._refuse(_HEAD_TOO_LARGE)

    def _expect_body(self, before: Phase) -> None:
        settings, now = self._settings, self.loop.time()
        if before is not Phase.BODY:
            self._phase, self._body_since = Phase.BODY, now
        elif self._body_bytes > self._max_sent_bytes and not self.cycle.response_started:
            self._refuse(_BODY_TOO_LARGE)
            return
        patience = settings.body_timeout_s
        due = now + patience
        if settings.min_body_bytes_per_s:
            due = min(due, self._body_since + max(patience, self._body_bytes / settings.min_body_bytes_per_s))
        self._due_at(due)

    def _unanswered(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _end_input(self) -> None:
        """The request that was read last is the last one of this connection."""
        self._ended = True
        self._stage = _Stage.BETWEEN
        if self.cycle is not None:
            self.cycle.keep_alive = False

    # --- callbacks of the parser --------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._ended:
            raise _EndOfInput
        super().on_message_begin()
        self._stage = _Stage.HEAD
        self._line_bytes = 0

    def on_url(self, url: bytes) -> None:
        self.url += url
        self._count_line(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._stage is not _Stage.HEAD:
            return  # a trailer: it must not become a header of a request that is being answered already
        name = name.lower()
        if name == b"expect" and value.lower() == b"100-continue":
            self.expect_100_continue = True
        self.headers.append((name, value))
        self._count_line(len(name) + len(value) + 4)
        if len(self.headers) > self._max_headers:
            raise HeadRefused(_HEAD_TOO_LARGE)

    def _count_line(self, size: int) -> None:
        self._line_bytes += size
        if self._line_bytes > self._max_head_bytes:
            raise HeadRefused(_HEAD_TOO_LARGE)

    def on_headers_complete(self) -> None:
        method, version = self.parser.get_method(), self.parser.get_http_version()
        check_head(method, version, self.headers)
        raw_path, query = split_target(self.url, method, self.headers)
        path = raw_path.decode("ascii")
        scope = self.scope
        scope["method"] = method.decode("ascii")
        scope["http_version"] = version
        scope["path"] = self.root_path + (urllib.parse.unquote(path) if "%" in path else path)
        scope["raw_path"] = self.root_path.encode("ascii") + raw_path
        scope["query_string"] = query
        waiting = self._unanswered()
        self.cycle = RequestResponseCycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=self.access_log,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=self.expect_100_continue and version == "1.1",
            keep_alive=version == "1.1" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self._stage = _Stage.BODY
        self._body_bytes = 0
        if waiting:
            self.pipeline.appendleft((self.cycle, self.app))
        else:
            self._run(self.cycle, self.app)

    def on_body(self, body: bytes) -> None:
        cycle = self.cycle
        if cycle.response_complete:
            return
        cycle.body += body
        self._body_arrived = True
        if len(cycle.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()

    def on_message_complete(self) -> None:
        self._stage = _Stage.BETWEEN
        cycle = self.cycle
        if not cycle.response_complete:
            cycle.more_body = False
            cycle.message_event.set()
        if not cycle.keep_alive or len(self.pipeline) >= MAX_QUEUED_REQUESTS:
            self._end_input()

    # --- what goes out ------------------------------------------------------------------------------------------------

    def _run(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        self._start_asgi_task(cycle, app)

    @aborts
    def on_response_complete(self) -> None:
        """A reply was written; called by the request's own task."""
        self.server_state.total_requests += 1
        self._running = None
        if self.transport.is_closing():
            self._ended, self._phase = True, Phase.LAST
            self._due_in(self._settings.slow_reader_timeout_s)  # for what was written and not read yet
            return
        if self.pipeline:
            self._run(*self.pipeline.pop())
            if self.pipeline or self._stage is not _Stage.BODY:
                return
            self._expect_body(Phase.REPLY)
        elif self._postponed is not None:
            self._say_last(self._postponed)
            return
        elif self._stage is _Stage.BODY:
            self._phase = Phase.DRAIN
            self._due_in(DRAIN_SECONDS)
        elif self._stage is _Stage.HEAD:
            self._phase, self._head_bytes = Phase.HEAD, 0
            self._due_in(self._settings.header_timeout_s)
        else:
            self._phase = Phase.IDLE
            self._due_in(self._settings.idle_timeout_s)
        self.flow.release()
        if self._backlog:
            data, self._backlog = bytes(self._backlog), bytearray()
            self.data_received(data)

    def _refuse(self, refusal: Refusal) -> None:
        """End the connection with a reply, after those to the requests before."""
        self._ended = True
        cycle = self.cycle if self._stage is _Stage.BODY else None  # what is refused is the body of this request
        self._stage = _Stage.BETWEEN
        if cycle is not None and self.pipeline:
            self.pipeline.popleft()
            self._postponed, self._phase, self._deadline = refusal, Phase.REPLY, None
        elif cycle is None and self._unanswered():
            self._postponed, self._phase, self._deadline = refusal, Phase.REPLY, None
        elif cycle is None or not cycle.response_started:
            if cycle is not None:
                _disconnect(cycle)
            self._say_last(refusal)
        else:
            _disconnect(cycle)
            self.registry.refused(refusal, self._address)
            self._close()

    def _say_last(self, refusal: Refusal) -> None:
        """Reply, and discard what comes for a moment: closing with unread input would reset the connection, and the client
        would never see the reply (RFC 9112, section 9.6)."""
        self._ended = True
        self.registry.refused(refusal, self._address)
        self.transport.write(refusal.response(self.server_state.default_headers))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._phase = Phase.LAST
        self._due_in(LINGER_SECONDS)
        self.flow.release()

    def _close(self) -> None:
        """Close; what the client does not read in time is dropped."""
        self._ended, self._phase = True, Phase.LAST
        self.transport.close()
        self._due_in(self._settings.slow_reader_timeout_s)

    @aborts
    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            seconds = self._settings.slow_reader_timeout_s + WRITE_STALL_GRACE_SECONDS
            self._stall_timer = self.loop.call_later(seconds, self.transport.abort)

    @aborts
    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    # --- time ---------------------------------------------------------------------------------------------------------

    def _due_in(self, seconds: float) -> None:
        self._due_at(self.loop.time() + seconds)

    def _due_at(self, deadline: float) -> None:
        self._deadline = deadline
        if self._timer is not None:
            if self._timer.when() <= deadline:
                return  # it will look again when it fires
            self._timer.cancel()
        self._timer = self.loop.call_at(deadline, self._on_timer)

    @aborts
    def _on_timer(self) -> None:
        self._timer = None
        if self._deadline is None:
            return
        if self.loop.time() < self._deadline:
            self._due_at(self._deadline)
        elif self._phase is Phase.HEAD:
            self._refuse(_HEAD_TIMEOUT)
        elif self._phase is Phase.BODY:
            if self.flow.read_paused:  # it is the server that does not read
                self._body_since = self.loop.time()
                self._body_bytes = 0
                self._due_in(self._settings.body_timeout_s)
            else:
                self._refuse(_BODY_TIMEOUT)
        elif self._phase is Phase.LAST:
            self.transport.abort()
        else:
            self._close()


def edge_protocol(registry: Connections) -> type[EdgeProtocol]:
    """The protocol class of one server, as `uvicorn.Config(http=...)` wants it."""
    return type("ServerEdgeProtocol", (EdgeProtocol,), {"registry": registry})


def _disconnect(cycle: RequestResponseCycle) -> None:
    """Tell a request that its client is gone: it is aborted, and what it still sends goes nowhere."""
    if not cycle.response_complete:
        cycle.disconnected = True
    cycle.message_event.set()
