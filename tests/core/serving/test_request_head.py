"""What is a request and what is refused before it becomes one, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.raw_http import RawConnection, head
from core.serving.edge import ask, edge, post, until

CHUNKED = head("POST", "/", "Transfer-Encoding: chunked")


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (head("POST", "/", "Content-Length: 3", "Transfer-Encoding: chunked") + b"0\r\n\r\n", 400, "malformed_request"),
        (head("POST", "/", "Transfer-Encoding: chunked", "Content-Length: 3") + b"0\r\n\r\n", 400, "malformed_request"),
        (head("POST", "/", "Content-Length: 3", "Content-Length: 3") + b"abc", 400, "malformed_request"),
        (head("POST", "/", "Content-Length: 3", "Content-Length: 4") + b"abc", 400, "malformed_request"),
        (head("POST", "/", "Content-Length: 3, 3") + b"abc", 400, "malformed_request"),
        (head("POST", "/", "Content-Length: -1"), 400, "malformed_request"),
        (head("POST", "/", "Content-Length: +1"), 400, "malformed_request"),
        (head("POST", "/", "Content-Length: 0x1"), 400, "malformed_request"),
        (head("POST", "/", "Content-Length:"), 400, "malformed_request"),
        (head("POST", "/", "Content-Length: 99999999999999999999999"), 400, "malformed_request"),
        (head("POST", "/", "Transfer-Encoding: gzip, chunked") + b"0\r\n\r\n", 501, "transfer_coding_not_supported"),
        (head("POST", "/", "Transfer-Encoding: identity"), 501, "transfer_coding_not_supported"),
        (head("POST", "/", "Transfer-Encoding: chunked, gzip"), 400, "malformed_request"),
        (head("POST", "/", "Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), 400, "malformed_request"),
        (b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400, "malformed_request"),
        (CHUNKED + b"3\nabc\n0\n\n", 400, "malformed_request"),
        (CHUNKED + b"xyz\r\n", 400, "malformed_request"),
        (b"GET / HTTP/1.1\nHost: localhost\n\n", 400, "malformed_request"),
        (b"GET / HTTP/1.1\r\nHost: localhost\nX: y\r\n\r\n", 400, "malformed_request"),
        (b"GET / HTTP/1.1\r\nHost: localhost\rX: y\r\n\r\n", 400, "malformed_request"),
        (head("GET", "/", "X: a\0b"), 400, "malformed_request"),
        (head("GET", "/", "X: a", " folded"), 400, "malformed_request"),
        (head("GET", "/", "X : a"), 400, "malformed_request"),
        (head("GET", "/", ": a"), 400, "malformed_request"),
        (b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", 400, "malformed_request"),
        (b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n", 505, "http_version_not_supported"),
        (b"GET /\r\n\r\n", 505, "http_version_not_supported"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "malformed_request"),
        (head("CONNECT", "localhost:443"), 501, "method_not_supported"),
        (head("TRACE", "/"), 501, "method_not_supported"),
        (head("get", "/"), 400, "malformed_request"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400, "malformed_request"),
        (head("GET", "http://evil.example/"), 400, "malformed_request"),
        (head("GET", "http://user@localhost/"), 400, "malformed_request"),
        (head("GET", "ftp://localhost/"), 400, "malformed_request"),
        (head("GET", "http://localhost/", host=None), 400, "malformed_request"),
        (head("GET", "v1"), 400, "malformed_request"),
        (head("GET", "*"), 400, "malformed_request"),
        (head("GET", "/a#b"), 400, "malformed_request"),
        (head("GET", "/\x80"), 400, "malformed_request"),
        (head("GET", "/", "X: " + "a" * 40_000), 431, "headers_too_large"),
        (head("GET", "/" + "a" * 40_000), 431, "headers_too_large"),
        (head("GET", "/", *["X: y"] * 101), 431, "headers_too_large"),
    ],
)
async def test_refused_and_closed(data: bytes, status: int, code: str) -> None:
    async with edge() as e:
        reply, ended = await ask(e, data)
        assert (reply.status, reply.error["code"], reply.headers["connection"]) == (status, code, "close")
        assert reply.error["type"] == ("server_error" if status >= 500 else "invalid_request_error")
        assert ended
        assert e.refusals == [(status, code)]
        assert all(body is None for _, body in e.seen)


async def test_what_is_well_formed_passes() -> None:
    absolute = head("GET", "HTTP://LocalHost:80?q=1", host="localhost:80")
    with_limits = head("GET", "/99", *[f"X: {n}" for n in range(99)])
    trailers = CHUNKED + b"3;ext=1\r\nabc\r\n0\r\nAuthorization: Bearer trailer\r\nHost: evil\r\n\r\n"
    old = b"GET /old HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"
    async with edge() as e:
        data = b"\r\n" + head("GET", "/a%2Fb?c=%20") + absolute + with_limits + trailers + head("OPTIONS", "*") + old

        def play(connection: RawConnection) -> list[bytes]:
            connection.send(data)
            bodies = [connection.reply().body for _ in range(6)]
            assert connection.ended()
            return bodies

        assert await e.talk(play) == [b"/a/b", b"/", b"/99", b"/", b"*", b"/old"]
        assert e.seen[3] == ("/", b"abc")
        assert (e.scopes[0]["raw_path"], e.scopes[0]["query_string"]) == (b"/a%2Fb", b"c=%20")
        assert e.scopes[1]["query_string"] == b"q=1"
        assert e.scopes[3]["headers"] == [(b"host", b"localhost"), (b"transfer-encoding", b"chunked")]
        assert (e.scopes[0]["http_version"], e.scopes[5]["http_version"]) == ("1.1", "1.0")
        assert e.refusals == []


PIPELINE = (
    head("GET", "/a")
    + head("POST", "/b", "Transfer-Encoding: chunked")
    + b"3\r\nabc\r\n2;x=y\r\nde\r\n0\r\nTrailer: t\r\n\r\n"
    + b"\r\n"
    + post("/c", 4)
    + b"1234"
    + head("GET", "/d", "Connection: close")
)
few = settings(max_examples=30, deadline=None)


async def conversation(pieces: list[bytes], patience: float) -> tuple[list[tuple[str, bytes | None]], bytes]:
    """What the application saw and what the client got until the connection ended or was idle."""
    async with edge(idle_timeout_s=patience, header_timeout_s=patience, body_timeout_s=patience) as e:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(e.url.rpartition(":")[2]))
        await until(lambda: bool(e.state.connections))
        protocol = e.protocol
        for piece in pieces:
            protocol.data_received(piece)  # so that pieces stay pieces
            await asyncio.sleep(0)
        answer = await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
        return e.seen, answer


@few
@given(st.lists(st.integers(1, len(PIPELINE) - 1), max_size=8))
async def test_requests_are_the_same_however_they_are_cut(cuts: list[int]) -> None:
    ends = [0, *sorted(cuts), len(PIPELINE)]
    pieces = [PIPELINE[begin:end] for begin, end in itertools.pairwise(ends) if end > begin]
    seen, answer = await conversation(pieces, 10)
    assert seen == [("/a", b""), ("/b", b"abcde"), ("/c", b"1234"), ("/d", b"")]
    assert answer.count(b"HTTP/1.1 200 OK\r\n") == 4


@few
@given(st.integers(0, len(PIPELINE) - 1), st.binary(max_size=3), st.integers(1, len(PIPELINE) - 1))
async def test_whatever_comes_the_answers_are_whole_and_in_order(at: int, instead: bytes, cut: int) -> None:
    data = PIPELINE[:at] + instead + PIPELINE[at + 1 :]
    _, answer = await conversation([data[:cut], data[cut:]], 0.05)
    statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]
    refusals = [status for status in statuses if status != 200]
    assert set(refusals) <= {400, 408, 413, 431, 501, 505}
    assert statuses == [200] * (len(statuses) - len(refusals)) + refusals[:1]  # a refusal is the last word
