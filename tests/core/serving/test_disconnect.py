"""Clients of a real server that hang up."""

from __future__ import annotations

import asyncio
import json

import pytest

from core.serving.scripted import CHAT, HELLO, STARTED, USAGE, Stand, serving, stand
from inferflux_core.serving.generation import Delta, Done


async def send_request(port: int, body: dict[str, object]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    content = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
    return reader, writer


async def closed(s: Stand) -> None:
    async with asyncio.timeout(5):
        await s.pipeline.closed.wait()


@pytest.mark.parametrize("abrupt", [False, True])
async def test_a_stream_whose_client_leaves_is_aborted(abrupt: bool) -> None:
    s = stand(*HELLO[:2], asyncio.Event(), *HELLO[2:])
    async with serving(s.app) as port:
        reader, writer = await send_request(port, {**CHAT, "stream": True})
        await reader.readuntil(b'"content":"Hel"')
        assert not s.pipeline.closed.is_set()
        if abrupt:
            writer.transport.abort()
        else:
            writer.close()
        await closed(s)
    assert s.pipeline.completed == 0
    assert s.sample("inferflux_client_disconnects_total") == 1


async def test_a_whole_answer_whose_client_leaves_is_aborted() -> None:
    entered, never = asyncio.Event(), asyncio.Event()

    class Marked(asyncio.Event):
        async def wait(self) -> bool:  # type: ignore[override]  # as in asyncio, which has a Literal here
            entered.set()
            return await never.wait()

    s = stand(*HELLO[:2], Marked(), *HELLO[2:])
    async with serving(s.app) as port:
        _, writer = await send_request(port, CHAT)
        await entered.wait()
        assert not s.pipeline.closed.is_set()
        writer.close()
        await closed(s)
    assert s.pipeline.completed == 0
    assert s.sample("inferflux_client_disconnects_total") == 1


async def test_a_client_that_leaves_during_its_own_body() -> None:
    s = stand()
    async with serving(s.app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n"
        writer.write(head + b'Content-Type: application/json\r\n\r\n{"prompt":')
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    # Leaving the server waits for the request, so it has been counted.
    assert s.pipeline.requests == []


async def test_a_client_that_does_not_read_is_given_up() -> None:
    """The kernel and the server buffer some megabytes; after that a send stalls, and the stream ends."""
    s = stand(STARTED, *(Delta(0, "x" * 100_000) for _ in range(1000)), Done(USAGE), slow_reader_timeout_s=0.1)
    async with serving(s.app) as port:
        reader, writer = await send_request(port, {**CHAT, "stream": True})
        reader._transport.pause_reading()  # type: ignore[attr-defined]  # the only way not to read at all
        await closed(s)
        writer.transport.abort()
    assert s.pipeline.completed == 0
    assert s.sample('inferflux_errors_total{reason="slow_reader"}') == 1
    assert s.sample("inferflux_client_disconnects_total") == 0


async def test_a_connection_goes_on_after_a_stream() -> None:
    s = stand()
    async with serving(s.app) as port:
        reader, writer = await send_request(port, {**CHAT, "stream": True})
        text = await reader.readuntil(b"0\r\n\r\n")
        assert b"data: [DONE]\n\n" in text
        writer.write(b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b'{"status":"alive"}' in await reader.readuntil(b"}")
        writer.close()
    assert s.sample("inferflux_client_disconnects_total") == 0


@pytest.mark.parametrize("framing", [b"Content-Length: 100000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
async def test_a_client_that_only_writes_still_reads_why(framing: bytes) -> None:
    """100 MB into a server that takes 10 KB: the 413 arrives although the client reads only after it has written."""
    s = stand(max_body_bytes=10_000)
    chunk = bytes(1_000_000)
    wire = b"%x\r\n%b\r\n" % (len(chunk), chunk) if b"chunked" in framing else chunk
    async with serving(s.app) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n" + framing)
        for _ in range(100):
            writer.write(wire)
            await writer.drain()
        if b"chunked" in framing:
            writer.write(b"0\r\n\r\n")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 413 ")
        assert b"connection: close" in head.lower()
        assert b'"request_too_large"' in await reader.read()
        writer.close()
