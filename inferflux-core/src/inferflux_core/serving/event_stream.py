"""Server-sent events (WHATWG HTML, section 9.2) out of pipeline events. The hot path: one small write a token.

One task reads the pipeline and writes to the client; what wakes rarely (pings, a reader that stopped reading, a client
that left) is in tasks of its own, so that an event costs no timer and no task.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import AsyncGenerator
from typing import Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from inferflux_core.errors import RequestError
from inferflux_core.serving.disconnect import ClientDisconnected, cancel_and_wait, while_connected
from inferflux_core.serving.error_responses import error_reason, internal_error_body
from inferflux_core.serving.exchange import Exchange
from inferflux_core.serving.generation import Delta, Done, Event, Started
from inferflux_core.settings import ServerSettings
from inferflux_core.telemetry.logging import frames_of
from inferflux_core.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"
_HEAD = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),
    ],
}


class ChunkFormat(Protocol):
    """Pipeline events to the bytes of a wire format; b"" sends nothing."""

    def started(self, event: Started) -> bytes:
        """What a stream begins with."""

    def delta(self, event: Delta) -> bytes:
        """New text of a choice."""

    def done(self, event: Done) -> bytes:
        """What a stream ends with."""


class SlowReader(Exception):
    """The client does not read what was sent to it."""


class EventStream(Response):
    """A response that streams what the pipeline generates.

    The head goes out with the first event, so an error before it is a plain HTTP error; or with the first ping, when the
    pipeline is silent for `sse_ping_seconds`. An error after the head is an event of its own, and no `[DONE]` follows.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[Event, None],
        chunks: ChunkFormat,
        *,
        exchange: Exchange,
        settings: ServerSettings,
        metrics: Metrics,
    ) -> None:
        super().__init__()
        self._events = events
        self._chunks = chunks
        self._exchange = exchange
        self._ping_seconds = settings.sse_ping_seconds or math.inf
        self._slow_reader_seconds = settings.slow_reader_timeout_s
        self._metrics = metrics
        self._head_sent = False
        self._complete = False
        self._pinging = asyncio.Lock()
        self._last_sent = 0.0
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Stream until the pipeline is done or the client is gone.

        Raises:
            RequestError: the pipeline refused the request and nothing was sent yet.
            ClientDisconnected: the client left; the request was aborted.
        """
        try:
            await while_connected(receive, self._stream(send))
        except ClientDisconnected:
            # The server says so as well when the response is complete, and may say it before the tasks here are done.
            if not self._complete:
                raise
        except SlowReader:
            # Returning without a last message makes the server close the connection.
            self._exchange.error = "slow_reader"
            self._metrics.error("slow_reader")

    async def _stream(self, send: Send) -> None:
        """Write events while a second task watches the clock; the first of the two to end ends both."""
        self._last_sent = asyncio.get_running_loop().time()
        writer = asyncio.create_task(self._write(send))
        clock = asyncio.create_task(self._watch_clock(send))
        try:
            await asyncio.wait((writer, clock), return_when=asyncio.FIRST_COMPLETED)
            (writer if writer.done() else clock).result()
        finally:
            await cancel_and_wait(writer, clock)

    async def _write(self, send: Send) -> None:
        try:
            async with contextlib.aclosing(self._events) as events:
                last = await self._write_events(events, send)
            await self._send_last(send, last)
        except RequestError as error:
            if not self._head_sent:
                raise
            self._exchange.error = error_reason(error)
            await self._send_last(send, b"data: " + msgspec.json.encode(error.body()) + b"\n\n")
        except Exception as error:
            if not self._head_sent:
                raise
            logger.error("stream failed with %s\n%s", type(error).__qualname__, frames_of(error))
            self._exchange.error = "internal_error"
            await self._send_last(send, b"data: " + internal_error_body(self._exchange.request_id) + b"\n\n")

    async def _write_events(self, events: AsyncGenerator[Event, None], send: Send) -> bytes:
        """Write all events but the last, and return what is to be written of that once the generator is closed."""
        now = asyncio.get_running_loop().time
        delta = self._chunks.delta
        async for event in events:
            if type(event) is Delta:
                chunk = delta(event)
            elif isinstance(event, Started):
                self._exchange.model = event.model
                chunk = self._chunks.started(event)
            elif isinstance(event, Done):
                self._exchange.usage = event.usage
                return self._chunks.done(event)
            if not chunk:
                continue
            if not self._head_sent or self._pinging.locked():
                await self._send_head(send)
            self._sending_since = now()
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._sending_since = None
            self._last_sent = now()
        raise RuntimeError("the pipeline ended without Done")

    async def _send_head(self, send: Send) -> None:
        async with self._pinging:
            if not self._head_sent:
                self._head_sent = True
                await send(_HEAD)

    async def _send_last(self, send: Send, chunk: bytes) -> None:
        await self._send_head(send)
        self._sending_since = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": chunk, "more_body": False})
        self._sending_since = None
        self._complete = True

    async def _watch_clock(self, send: Send) -> None:
        """Ping a silent stream; give up on a reader that lets a send wait too long."""
        now = asyncio.get_running_loop().time
        while True:
            if self._sending_since is not None:
                due = self._sending_since + self._slow_reader_seconds
                if now() >= due:
                    raise SlowReader
            else:
                due = self._last_sent + self._ping_seconds
                if now() >= due:
                    await self._ping(send)
                    continue
            # A send that begins while this sleeps is noticed late by at most the time slept, so that is bounded.
            await asyncio.sleep(min(due - now(), self._slow_reader_seconds))

    async def _ping(self, send: Send) -> None:
        try:
            async with asyncio.timeout(self._slow_reader_seconds):
                await self._send_head(send)
                async with self._pinging:
                    if not self._complete:  # the last message may have gone out since this was due
                        await send({"type": "http.response.body", "body": PING, "more_body": True})
        except TimeoutError:
            raise SlowReader from None
        self._last_sent = asyncio.get_running_loop().time()
