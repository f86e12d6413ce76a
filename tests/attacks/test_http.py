"""Attacks on HTTP itself, through the front door of a real server. Numbers are those of reference/security.md, 7.3.

The limits are set low so that the tests are quick; that the documented ones are the defaults is asserted with the protocol.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from attacks.raw_http import RawConnection, ask, head
from served import ServedInferFlux, fake, serving, until

MAX_CONNECTIONS = 64
SETTINGS = {
    "header_timeout_s": 0.5,
    "body_timeout_s": 0.5,
    "idle_timeout_s": 30,
    "slow_reader_timeout_s": 0.5,
    "max_connections": MAX_CONNECTIONS,
    "max_body_bytes": 1024 * 1024,
}
CHAT = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}).encode()
JSON = "Content-Type: application/json"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedInferFlux]:
    folder = tmp_path_factory.mktemp("server")
    settings = [part for key, value in SETTINGS.items() for part in ("--set", f"server.{key}={value}")]
    with serving(*fake(), *settings, "--set", f"state_dir={folder}", cwd=folder) as server:
        yield server


@pytest.fixture(autouse=True)
def well_afterwards(served: ServedInferFlux) -> Iterator[None]:
    """Whatever was done to it, the server answers the next one, quickly."""
    yield
    with RawConnection(served.url) as connection:
        connection.send(chat())
        assert connection.reply().status == 200
        assert connection.age() < 5


def resident_bytes(served: ServedInferFlux) -> int:
    pages = int(Path(f"/proc/{served.process.pid}/statm").read_text().split()[1])
    return pages * 4096


def files_open(served: ServedInferFlux) -> int:
    return len(list(Path(f"/proc/{served.process.pid}/fd").iterdir()))


def chat(*lines: str, body: bytes = CHAT) -> bytes:
    return head("POST", "/v1/chat/completions", JSON, f"Content-Length: {len(body)}", *lines) + body


@contextlib.contextmanager
def connections(served: ServedInferFlux, count: int) -> Iterator[list[RawConnection]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(RawConnection(served.url)) for _ in range(count)]


# --- 1, 2, 15: slow requests --------------------------------------------------------------------------------------------


def test_1_partial_heads_end_in_time_and_bother_nobody(served: ServedInferFlux) -> None:
    with connections(served, 50) as slow:
        for connection in slow:
            connection.send(b"POST /v1/chat/completions HTTP/1.1\r\nHost: loc")
        began = time.monotonic()
        assert httpx.get(served.url + "/v1/models").status_code == 200
        assert time.monotonic() - began < 1
        for connection in slow:
            assert connection.send(b"a")
            reply = connection.reply()
            assert (reply.status, reply.error["code"]) == (408, "header_timeout")
            assert connection.ended()
            assert connection.age() < 5


@pytest.mark.parametrize("lines", [(), ("Expect: 100-continue",)])
def test_2_and_15_bodies_that_stop_or_never_come(served: ServedInferFlux, lines: tuple[str, ...]) -> None:
    with RawConnection(served.url) as connection:
        connection.send(head("POST", "/v1/chat/completions", JSON, "Content-Length: 1000", *lines))
        if not lines:
            connection.send(b'{"mod')
        reply = connection.reply()
        assert (reply.status, reply.error["code"]) == (408, "body_timeout")
        assert connection.ended()
        assert connection.age() < 5


def test_2_a_body_byte_by_byte_is_below_the_least_rate(served: ServedInferFlux) -> None:
    with RawConnection(served.url) as connection:
        connection.send(head("POST", "/v1/chat/completions", JSON, "Content-Length: 100000"))
        stop, sent = threading.Event(), 0

        def trickle() -> None:
            nonlocal sent
            while not stop.wait(0.02) and connection.send(b" "):
                sent += 1

        thread = threading.Thread(target=trickle)
        thread.start()
        try:
            assert connection.reply().error["code"] == "body_timeout"
            assert connection.age() < 5
        finally:
            stop.set()
            thread.join()
        assert sent > 3  # it was never silent


# --- 3: slow readers ----------------------------------------------------------------------------------------------------


def test_3_a_stream_that_is_not_read_is_aborted_and_frees_its_slot(served: ServedInferFlux) -> None:
    body = {"model": "fake", "prompt": "x", "max_tokens": 1900, "ignore_eos": True, "stream": True, "n": 8, "logprobs": 20}
    with RawConnection(served.url, receive_buffer=4096) as connection:
        connection.send(head("POST", "/v1/completions", JSON, f"Content-Length: {len(json.dumps(body))}"))
        connection.send(json.dumps(body).encode())
        assert httpx.get(served.url + "/v1/models").status_code == 200
        until(lambda: 'inferflux_errors_total{reason="slow_reader"} 1.0' in httpx.get(served.url + "/metrics").text)
        until(lambda: served.health()["requests_running"] == 0 and served.health()["kv_cache_usage_ratio"] == 0)


# --- 4, 5, 11: size -----------------------------------------------------------------------------------------------------


def test_4_large_heads(served: ServedInferFlux) -> None:
    httpx.get(served.url + "/v1/models")
    before = resident_bytes(served)
    for data in (
        head("GET", "/v1/models", "X: " + "a" * 1024 * 1024),
        head("GET", "/v1/models?" + "a" * 1024 * 1024),
        head("GET", "/v1/models", "a" * 1024 * 1024 + ": x"),
        head("GET", "/v1/models", *["X: y"] * 10_000),
    ):
        reply = ask(served.url, data)
        assert (reply.status, reply.error["code"]) == (431, "headers_too_large")
    assert resident_bytes(served) - before < 5 * 1024 * 1024


@pytest.mark.parametrize("chunked", [False, True])
def test_5_a_body_of_100_mib(served: ServedInferFlux, chunked: bool) -> None:
    size, before = 100 * 1024 * 1024, resident_bytes(served)
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {size}"
    piece = b"10000\r\n" + b" " * 65536 + b"\r\n" if chunked else b" " * 65536
    with RawConnection(served.url) as connection:
        connection.send(head("POST", "/v1/chat/completions", JSON, length))
        for _ in range(size // 65536):
            if not connection.send(piece):
                break
        reply = connection.reply()
        assert (reply.status, reply.error["code"]) == (413, "request_too_large")
        assert connection.ended()
    assert resident_bytes(served) - before < 20 * 1024 * 1024


def test_11_three_million_chunks_of_one_byte(served: ServedInferFlux) -> None:
    before = resident_bytes(served)
    with RawConnection(served.url) as connection:
        connection.send(head("POST", "/v1/chat/completions", JSON, "Transfer-Encoding: chunked"))
        for _ in range(300):
            if not connection.send(b"1\r\n \r\n" * 10_000):
                break
        reply = connection.reply()
        assert (reply.status, reply.error["code"]) == (413, "request_too_large")
    assert resident_bytes(served) - before < 20 * 1024 * 1024


# --- 6, 7, 8: what a request is, whom it is for, what it asks for ---------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        head("POST", "/v1/chat/completions", JSON, f"Content-Length: {len(CHAT)}", "Transfer-Encoding: chunked") + CHAT,
        head("POST", "/v1/chat/completions", JSON, f"Content-Length: {len(CHAT)}", "Content-Length: 0") + CHAT,
        head("POST", "/v1/chat/completions", JSON, "Content-Length: -1") + CHAT,
        head("GET", "/v1/models").replace(b"\r\n", b"\n"),
        head("GET", "/v1/models", "X: a\nY: b"),
        head("GET", "/v1/models", "X: a\0b"),
        head("GET", "/v1/models", "X: a", "\tb"),
    ],
)
def test_6_ambiguous_requests(served: ServedInferFlux, data: bytes) -> None:
    with RawConnection(served.url) as connection:
        connection.send(data + head("GET", "/v1/models"))
        reply = connection.reply()
        assert (reply.status, reply.error["code"], reply.headers["connection"]) == (400, "malformed_request", "close")
        assert connection.ended()


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        ((), 400),
        (("Host: localhost", "Host: localhost"), 400),
        (("Host: localhost", "hOST: evil.example"), 400),
        (("Host: localhost/v1/models?",), 400),
        (("Host: evil.example@localhost",), 400),
        (("Host:",), 400),
        (("Host: evil.example",), 421),
        (("Host: localhost.evil.example",), 421),
        (("Host: localhost:80",), 200),
    ],
)
@pytest.mark.parametrize("target", ["/v1/models", "/livez", "/nowhere"])
def test_7_hosts(served: ServedInferFlux, lines: tuple[str, ...], status: int, target: str) -> None:
    with RawConnection(served.url) as connection:
        connection.send(head("GET", target, *lines, host=None))
        reply = connection.reply()
        if status == 200:
            assert reply.status == (404 if target == "/nowhere" else 200)
            return
        assert reply.status == status
        assert reply.error["type"] == "invalid_request_error"
        assert reply.headers.get("connection") == ("close" if status == 400 else None)
        assert status != 400 or connection.ended()


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("//v1/models", 404),
        ("/v1/../admin/keys", 404),
        ("/v1/%2e%2e/admin/keys", 404),
        ("/v1/../v1/models", 404),
        ("/V1/models", 404),
        ("/v1/models/", 404),
        ("/v1/models;x", 404),
        ("/v1/models;x=/livez", 404),
        ("/livez/../v1/models", 404),
        ("/livez%00", 404),
        ("/v1%5cmodels", 404),
        ("http://localhost/v1/models", 200),
        ("http://evil.example/v1/models", 400),
        ("https://localhost:1/v1/models", 400),
        ("http://localhost@evil.example/v1/models", 400),
        ("evil.example:80", 400),
        ("/v1/models#/livez", 400),
    ],
)
def test_8_ways_to_write_a_path(served: ServedInferFlux, target: str, status: int) -> None:
    reply = ask(served.url, head("GET", target))
    assert reply.status == status
    assert status == 200 or reply.error["type"] == "invalid_request_error"


# --- 10, 13: encodings and ranges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("coding", ["gzip", "deflate", "zstd", "br", "gzip, gzip", "identity, gzip", "x-unknown"])
def test_10_compressed_bodies_are_not_unpacked(served: ServedInferFlux, coding: str) -> None:
    bomb = gzip.compress(bytes(10**7)) if coding.startswith("gzip") else zlib.compress(bytes(10**7))
    before = resident_bytes(served)
    reply = ask(served.url, chat(f"Content-Encoding: {coding}", body=bomb))
    assert reply.status == 415
    assert "Compressed request bodies are not accepted" in reply.error["message"]
    assert resident_bytes(served) - before < 5 * 1024 * 1024


def test_10_nor_as_a_transfer_coding(served: ServedInferFlux) -> None:
    bomb = gzip.compress(bytes(10**7))
    data = b"%x\r\n" % len(bomb) + bomb + b"\r\n0\r\n\r\n"
    reply = ask(served.url, head("POST", "/v1/chat/completions", JSON, "Transfer-Encoding: gzip, chunked") + data)
    assert (reply.status, reply.error["code"]) == (501, "transfer_coding_not_supported")


def test_13_ranges_are_ignored(served: ServedInferFlux) -> None:
    plain = ask(served.url, head("GET", "/v1/models"))
    ranges = "Range: bytes=" + ",".join(f"{n}-" for n in range(5_000))
    began = time.monotonic()
    reply = ask(served.url, head("GET", "/v1/models", ranges))
    assert time.monotonic() - began < 0.5
    assert (reply.status, reply.body) == (200, plain.body)
    assert "accept-ranges" not in reply.headers


# --- 14, 16: many at once ------------------------------------------------------------------------------------------------


def test_14_a_hundred_pipelined_requests_are_answered_in_order(served: ServedInferFlux) -> None:
    before = resident_bytes(served)
    with RawConnection(served.url) as connection:
        connection.send(b"".join(chat(f"X-Request-Id: r{n}") for n in range(100)))
        replies = [connection.reply() for _ in range(100)]
    assert [reply.headers["x-request-id"] for reply in replies] == [f"r{n}" for n in range(100)]
    assert {reply.status for reply in replies} == {200}
    assert resident_bytes(served) - before < 10 * 1024 * 1024


def test_14_a_hundred_thousand_are_not_kept_in_memory(served: ServedInferFlux) -> None:
    before = resident_bytes(served)
    with RawConnection(served.url) as connection:
        sending = threading.Thread(target=connection.send, args=(head("GET", "/livez") * 100_000,))
        sending.start()
        answered = 0
        with contextlib.suppress(AssertionError):
            while connection.reply().status == 200:
                answered += 1
        sending.join()
    assert 100 < answered < 100_000  # it ended the connection
    assert resident_bytes(served) - before < 10 * 1024 * 1024


def test_16_idle_connections_are_capped_and_those_that_have_one_are_served(served: ServedInferFlux) -> None:
    with RawConnection(served.url) as early:
        early.send(chat())
        assert early.reply().status == 200
        with connections(served, MAX_CONNECTIONS + 16) as many:
            refused = many[MAX_CONNECTIONS:]
            for connection in refused:
                reply = connection.reply()
                assert (reply.status, reply.error["code"]) == (503, "too_many_connections")
                assert reply.headers["retry-after"] == "1"
                assert connection.ended()
            early.send(chat())
            assert early.reply().status == 200
            assert files_open(served) < MAX_CONNECTIONS + 100
    until(lambda: ask(served.url, head("GET", "/livez")).status == 200)


# --- 17: other people's web pages ----------------------------------------------------------------------------------------


def test_17_pages_of_other_origins(served: ServedInferFlux) -> None:
    text = head("POST", "/v1/chat/completions", "Content-Type: text/plain", f"Content-Length: {len(CHAT)}") + CHAT
    assert ask(served.url, text).status == 415
    for origin in ("https://evil.example", "null", "http://localhost:1"):
        for request in (
            chat(f"Origin: {origin}"),
            head("GET", "/v1/models", f"Origin: {origin}"),
            head("OPTIONS", "/v1/chat/completions", f"Origin: {origin}", "Access-Control-Request-Method: POST"),
            head("GET", "/v1/models", f"Origin: {origin}", "Connection: Upgrade", "Upgrade: websocket"),
        ):
            reply = ask(served.url, request)
            assert (reply.status, reply.error["code"]) == (403, "origin_not_allowed")
            assert not any(name.startswith("access-control") for name in reply.headers)
            assert len(reply.headers["x-request-id"]) == 32
    assert ask(served.url, chat("Sec-Fetch-Site: cross-site")).status == 403
    own = f"http://localhost:{httpx.URL(served.url).port}"
    assert ask(served.url, chat().replace(b"Host: localhost", f"Host: {own[7:]}\r\nOrigin: {own}".encode())).status == 200


def test_what_was_refused_is_in_the_metrics_and_the_log(served: ServedInferFlux) -> None:
    ask(served.url, b"nonsense\r\n\r\n")
    metrics = httpx.get(served.url + "/metrics").text
    assert 'inferflux_errors_total{reason="malformed_request"}' in metrics
    until(lambda: any("malformed_request" in line and "127.0.0.1" in line for line in served.log))
    assert not any("Traceback" in line for line in served.log)
