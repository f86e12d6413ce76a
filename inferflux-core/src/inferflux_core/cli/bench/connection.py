"""One HTTP/1.1 connection that costs the load generator a few microseconds a chunk, and what an answer brought."""

from __future__ import annotations

import asyncio
import ssl
from time import perf_counter
from typing import Any, cast

import httptools
import msgspec

from inferflux_core.cli.api_errors import ApiError, connection_cause, error_from_event, error_from_response, unreachable
from inferflux_core.cli.endpoint import Endpoint
from inferflux_core.cli.sse import DONE, EventStream

CONNECT_TIMEOUT_S = 5.0


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    """The keys of a `/v1/completions` chunk that count; servers add others, and msgspec skips them unread."""

    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: Any = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


class Answer:
    """What one request brought. Times are `time.perf_counter` seconds."""

    __slots__ = (
        "arrivals",
        "body",
        "cached_tokens",
        "chunks",
        "completion_tokens",
        "finished",
        "prompt_tokens",
        "retry_after",
        "sent",
        "status",
        "texts",
    )

    def __init__(self) -> None:
        self.sent = 0.0  # when the request was handed to the socket
        self.status = 0
        self.retry_after: str | None = None
        self.body = b""  # of an answer that is no event stream
        self.arrivals: list[float] = []  # one for each time that text came, however many chunks came together
        self.chunks = 0  # chunks with text
        self.texts: list[str] = []
        self.finished = False  # a finish reason or [DONE] came
        self.prompt_tokens: int | None = None  # None: the server sent no usage
        self.completion_tokens: int | None = None
        self.cached_tokens: int | None = None  # None: the server does not say


class StaleConnection(ApiError):
    """The server had closed a kept-alive connection before the request reached it: send it again on a new one."""

    def __init__(self) -> None:
        super().__init__("the server closed the connection before it answered")


class Connection(asyncio.Protocol):
    """A kept-alive connection to one server; one request at a time. Open it with `open`."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._transport: asyncio.Transport | None = None
        self._parser: Any = None  # httptools has no types for what it calls back
        self._waiter: asyncio.Future[None] | None = None
        self._answer = Answer()
        self._events: EventStream | None = None  # while the body is an event stream
        self._now = 0.0  # when the bytes that are being parsed arrived
        self._used = False  # a request has been answered on it
        self._sized = False  # the headers say where the body ends
        host = f"[{endpoint.host}]" if ":" in endpoint.host else endpoint.host
        fields = {"host": f"{host}:{endpoint.port}", "accept": "*/*"} | endpoint.headers()
        self._fields = "".join(f"{name}: {value}\r\n" for name, value in fields.items())

    @classmethod
    async def open(cls, endpoint: Endpoint) -> Connection:
        """Connects.

        Raises:
            ApiError: the server cannot be reached.
        """
        loop = asyncio.get_running_loop()
        context = ssl.create_default_context() if endpoint.tls else None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(lambda: cls(endpoint), endpoint.host, endpoint.port, ssl=context)
        except TimeoutError as error:
            raise unreachable(endpoint.url, "no answer to the connection") from error
        except OSError as error:
            raise unreachable(endpoint.url, connection_cause(error)) from error
        return connection

    @property
    def is_open(self) -> bool:
        """Whether the next request can be sent on it."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Closes it at once; a request under way is aborted."""
        if self._transport is not None:
            self._transport.abort()

    async def get(self, path: str) -> Answer:
        """GETs a path below the server's base URL; the answer may have any status."""
        return await self._exchange("GET", path, b"")

    async def post(self, path: str, body: bytes) -> Answer:
        """POSTs JSON and waits for the end of the streamed answer.

        Raises:
            ApiError: an error status, an error in the stream, or an answer that is cut off or no event stream.
            StaleConnection: the server had closed the connection; nothing was lost.
        """
        answer = await self._exchange("POST", path, body)
        if answer.status != 200:
            url = self._endpoint.url
            raise error_from_response(url, path, answer.status, answer.body, answer.retry_after)
        if self._events is None:
            raise ApiError(f"{self._endpoint.url}{path} did not answer with an event stream")
        if not answer.finished:
            raise ApiError("the connection closed in the middle of the answer")
        return answer

    async def _exchange(self, method: str, path: str, body: bytes) -> Answer:
        if self._transport is None or self._waiter is not None:
            raise RuntimeError("a connection takes one request at a time, after it is open")
        if self._transport.is_closing():
            raise StaleConnection()
        self._waiter = asyncio.get_running_loop().create_future()
        self._answer = answer = Answer()
        self._events = None
        self._sized = False
        self._parser = httptools.HttpResponseParser(self)
        head = f"{method} {self._endpoint.path}{path} HTTP/1.1\r\n{self._fields}"
        if method == "POST":
            head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n"
        answer.sent = perf_counter()
        self._transport.write(f"{head}\r\n".encode("ascii") + body)
        try:
            await self._waiter
        except asyncio.CancelledError:
            self.close()
            raise
        finally:
            self._waiter = None
        self._used = True
        return answer

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but its class

    def data_received(self, data: bytes) -> None:
        self._now = perf_counter()
        if self._waiter is None:  # bytes that nobody asked for: the framing is lost
            self.close()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__  # what one of the methods below has raised
            self._fail(cause if isinstance(cause, ApiError) else ApiError(f"the answer cannot be read: {cause}"))
        except httptools.HttpParserError:
            self._fail(ApiError("the answer is not HTTP"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._waiter is None or self._waiter.done():
            return
        if self._answer.status and not self._sized:  # a body without a length ends with the connection
            self._waiter.set_result(None)
        elif self._used and not self._answer.status:
            self._waiter.set_exception(StaleConnection())
        else:
            cause = f": {connection_cause(exc)}" if exc is not None else ""
            self._waiter.set_exception(ApiError(f"the connection closed in the middle of the answer{cause}"))

    def _fail(self, error: ApiError) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(error)
        self.close()

    # What httptools calls

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header of the answer."""
        name = name.lower()
        if name == b"content-type":
            if value.lower().startswith(b"text/event-stream"):
                self._events = EventStream()
        elif name in (b"content-length", b"transfer-encoding"):
            self._sized = True
        elif name == b"retry-after":
            self._answer.retry_after = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        """The status is known, and the body begins."""
        self._answer.status = self._parser.get_status_code()
        if self._answer.status != 200:
            self._events = None

    def on_body(self, data: bytes) -> None:
        """Some of the body, without the framing of HTTP chunks."""
        if self._events is None:
            self._answer.body += data
            return
        answer = self._answer
        for payload in self._events.feed(data):
            if payload == DONE:
                answer.finished = True
                continue
            chunk = _decode_chunk(payload)
            if chunk.error is not None:
                raise error_from_event(chunk.error)
            for choice in chunk.choices:
                if choice.text:
                    answer.texts.append(choice.text)
                    answer.chunks += 1
                    if not answer.arrivals or answer.arrivals[-1] != self._now:
                        answer.arrivals.append(self._now)
                if choice.finish_reason is not None:
                    answer.finished = True
            if chunk.usage is not None:
                answer.prompt_tokens = chunk.usage.prompt_tokens
                answer.completion_tokens = chunk.usage.completion_tokens
                details = chunk.usage.prompt_tokens_details
                answer.cached_tokens = details.cached_tokens if details is not None else answer.cached_tokens

    def on_message_complete(self) -> None:
        """The body has ended."""
        if not self._parser.should_keep_alive():
            self.close()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
