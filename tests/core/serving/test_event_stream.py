"""Streams over time: silence, slow readers, and when the head goes out. Driven through the ASGI interface."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

from starlette.types import Message, Send

from core.serving.scripted import CHAT, HELLO, STARTED, USAGE, Stand, stand
from inferflux_core.errors import ModelLoadingError
from inferflux_core.serving.generation import Delta, Done

PING = b": ping\n\n"


async def ask(s: Stand, send: Send, gone: asyncio.Event | None = None) -> None:
    """One streamed chat request; the client stays until `gone` is set."""
    body = json.dumps({**CHAT, "stream": True}).encode()
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    gone = gone or asyncio.Event()

    async def receive() -> Message:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    path = "/v1/chat/completions"
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers, "scheme": "http",
    }  # fmt: skip
    async with asyncio.timeout(10):
        await s.app(scope, receive, send)


class Reader:
    """Collects what is sent and runs `on_ping` at each ping."""

    def __init__(self, on_ping: Callable[[int], None] = lambda count: None) -> None:
        self.messages: list[Message] = []
        self._on_ping = on_ping
        self._pings = 0

    async def __call__(self, message: Message) -> None:
        self.messages.append(message)
        if message.get("body") == PING:
            self._pings += 1
            self._on_ping(self._pings)

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.messages if message["type"] == "http.response.body"]

    def kinds(self) -> list[str]:
        """`head`, `ping`, `chunk` or `done` for each message."""
        kinds = []
        for message in self.messages:
            if message["type"] == "http.response.start":
                kinds.append("head")
            elif message["body"] == PING:
                kinds.append("ping")
            else:
                kinds.append("done" if message["body"].endswith(b"data: [DONE]\n\n") else "chunk")
        return kinds


async def test_head_goes_out_with_the_first_event() -> None:
    reader = Reader()
    await ask(stand(), reader)
    assert reader.kinds() == ["head", "chunk", "chunk", "chunk", "done"]
    assert reader.messages[0]["status"] == 200
    assert [message.get("more_body") for message in reader.messages[1:]] == [True, True, True, False]


async def test_silence_before_the_first_event_sends_the_head_and_pings() -> None:
    gate = asyncio.Event()
    reader = Reader(lambda count: gate.set() if count == 2 else None)
    await ask(stand(gate, *HELLO, sse_ping_seconds=0.01), reader)
    assert reader.kinds() == ["head", "ping", "ping", "chunk", "chunk", "chunk", "done"]


async def test_silence_later_pings() -> None:
    gate = asyncio.Event()
    reader = Reader(lambda count: gate.set())
    await ask(stand(*HELLO[:2], gate, *HELLO[2:], sse_ping_seconds=0.01), reader)
    assert reader.kinds() == ["head", "chunk", "chunk", "ping", "chunk", "done"]


async def test_no_ping_after_the_last_message() -> None:
    """Pings fall due all the time, also while the server takes the last message; none may follow it."""
    reader = Reader()

    async def slow(message: Message) -> None:
        if message.get("more_body") is False:
            for _ in range(20):
                await asyncio.sleep(0)
        await reader(message)

    for _ in range(20):
        gate = asyncio.Event()
        asyncio.get_running_loop().call_later(0.001, gate.set)
        await ask(stand(gate, *HELLO, sse_ping_seconds=0.001), slow)
        assert reader.kinds()[-1] == "done"


async def test_error_after_a_ping_is_an_event() -> None:
    gate = asyncio.Event()
    reader = Reader(lambda count: gate.set())
    s = stand(gate, ModelLoadingError("The model is loading; try again later."), sse_ping_seconds=0.01)
    await ask(s, reader)
    assert reader.kinds() == ["head", "ping", "chunk"]
    assert json.loads(reader.bodies[-1].removeprefix(b"data: "))["error"]["code"] == "model_loading"
    assert reader.messages[-1]["more_body"] is False


async def test_no_pings_when_turned_off() -> None:
    """With pings every 10 ms the same script would wait for its gate and get one; here a timer opens it."""
    gate = asyncio.Event()
    asyncio.get_running_loop().call_later(0.05, gate.set)
    reader = Reader()
    await ask(stand(gate, *HELLO, sse_ping_seconds=0), reader)
    assert reader.kinds() == ["head", "chunk", "chunk", "chunk", "done"]


async def test_slow_reader_is_given_up() -> None:
    s = stand(STARTED, *(Delta(0, "x") for _ in range(100)), Done(USAGE), slow_reader_timeout_s=0.05, sse_ping_seconds=0.01)
    sent: list[Message] = []

    async def stall(message: Message) -> None:
        sent.append(message)
        if len(sent) == 5:
            await asyncio.Event().wait()

    await ask(s, stall)
    assert len(sent) == 5, "neither chunks nor pings pile up behind a stalled one"
    assert s.pipeline.closed.is_set()
    assert s.pipeline.completed == 0
    assert s.sample('inferflux_errors_total{reason="slow_reader"}') == 1
    assert s.sample("inferflux_client_disconnects_total") == 0


async def test_a_reader_that_stalls_in_a_ping_is_given_up() -> None:
    s = stand(STARTED, asyncio.Event(), slow_reader_timeout_s=0.05, sse_ping_seconds=0.01)

    async def stall(message: Message) -> None:
        if message.get("body") == PING:
            await asyncio.Event().wait()

    await ask(s, stall)
    assert s.pipeline.closed.is_set()
    assert s.sample('inferflux_errors_total{reason="slow_reader"}') == 1


async def test_disconnect_ends_a_stream_that_waits() -> None:
    s, gone = stand(*HELLO[:2], asyncio.Event(), *HELLO[2:]), asyncio.Event()
    reader = Reader()

    async def leave_after_text(message: Message) -> None:
        await reader(message)
        if b'"Hel"' in message.get("body", b""):
            gone.set()

    await ask(s, leave_after_text, gone)
    assert s.pipeline.closed.is_set()
    assert reader.kinds() == ["head", "chunk", "chunk"]
    assert s.sample("inferflux_client_disconnects_total") == 1


async def test_no_task_is_left_behind() -> None:
    before = asyncio.all_tasks()
    for script in (HELLO, (STARTED, KeyError("x")), (ModelLoadingError("loading"),)):
        await ask(stand(*script), Reader())
    assert asyncio.all_tasks() == before
