"""Bodies that are not the JSON they should be, at the door of the server."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.serving.scripted import CHAT, stand
from inferflux_core.errors import InvalidRequestError
from inferflux_core.serving.body_reader import INLINE_BYTES
from inferflux_core.serving.generation import GenerationRequest
from inferflux_core.serving.json_body import MAX_NODES, parse_object
from inferflux_core.serving.openai.schemas import ChatBody
from inferflux_core.settings import ServerSettings

URL = "/v1/chat/completions"
JSON = {"content-type": "application/json"}
TEN_MIB = 10 * 1024 * 1024

MALFORMED = [
    (b"", "The request body is empty; send a JSON object."),
    (b" \n", "The request body is empty; send a JSON object."),
    (b"\xef\xbb\xbf{}", "begins with a byte order mark"),
    (b'{"a":1', "it ends too early at line 1 column 7."),
    (b'{"a":1,}', "trailing comma in object at line 1 column 8."),
    (b'{\n "a": 1\n} x', "trailing characters at line 3 column 3."),
    (b"{'a':1}", "object keys must be strings at line 1 column 2."),
    (b'{"a":NaN}', "NaN is not a JSON number at line 1 column 6."),
    (b'{"a":Infinity}', "Infinity is not a JSON number at line 1 column 6."),
    (b'{"a":\n-Infinity}', "-Infinity is not a JSON number at line 2 column 1."),
    (b'{"a":1e400}', "number out of range."),
    (b'{"a":"\\ud800"}', "half of a surrogate pair at line 1 column 7."),
    (b'{"a":"\\ud83d\\ude00 \\udc00"}', "half of a surrogate pair at line 1 column 20."),
    (b'{"a":"\\ud800\\u0041"}', "half of a surrogate pair at line 1 column 7."),
    (b'{"a":"ok","b":"\xff"}', "a byte that is not UTF-8 at line 1 column 16."),
    (b'{"a":"\xed\xa0\x80"}', "a byte that is not UTF-8 at line 1 column 7."),
    (b'{"a":"\x01"}', "invalid character at line 1 column 7."),
    (b'{"a":\x00}', "invalid character at line 1 column 6."),
    (b"[]", "must be a JSON object, but it is an array."),
    (b'"x"', "must be a JSON object, but it is a string."),
    (b"null", "must be a JSON object, but it is null."),
    (b"true", "must be a JSON object, but it is a boolean."),
    (b"1", "must be a JSON object, but it is a number."),
    (b'{"a":' * 65 + b"1" + b"}" * 65, "is nested deeper than 64 levels"),
    (b'{"\\"[":' * 65 + b"1" + b"}" * 65, "is nested deeper than 64 levels"),
]


@pytest.mark.parametrize(("body", "cause"), MALFORMED)
async def test_malformed(body: bytes, cause: str) -> None:
    s = stand()
    async with s.client() as client:
        response = await client.post(URL, content=body, headers=JSON)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, "invalid_json")
    assert cause in error["message"]


@pytest.mark.parametrize(
    ("body", "document"),
    [
        (b'{"a":"\\\\ud800"}', {"a": "\\ud800"}),
        (b'{"a":"\\ud83d\\ude00"}', {"a": "😀"}),
        (b'{"a":1,"a":2}', {"a": 2}),
        (b'{"a":"' + b"[{" * 200 + b'"}', {"a": "[{" * 200}),
        (b'{"a":' + b"[" * 63 + b"]" * 63 + b"}", None),
        (b'{"a":"\\"' + b"[" * 100 + b'\\\\"}', {"a": '"' + "[" * 100 + "\\"}),
    ],
)
def test_well_formed(body: bytes, document: object) -> None:
    assert parse_object(body, 64) == (document or json.loads(body))


@given(st.dictionaries(st.text(), st.none() | st.integers(-(2**60), 2**60) | st.text() | st.lists(st.text())))
@settings(max_examples=100, deadline=None)
def test_any_json_is_read_as_python_reads_it(document: dict[str, object]) -> None:
    for ascii_only in (True, False):
        try:
            body = json.dumps(document, ensure_ascii=ascii_only).encode()
        except UnicodeEncodeError:  # a lone surrogate
            continue
        if b"\\ud" not in body:
            assert parse_object(body, 64) == document


@given(st.binary(max_size=40), st.integers(0, 60))
@settings(max_examples=500, deadline=None)
def test_damaged_json_is_refused_where_python_refuses_it(junk: bytes, at: int) -> None:
    base = b'{"a":"\\u00e9\\\\x\\"y","b":[1,2,{"c":null}],"d":1.5e3,"e":true}'
    body = base[:at] + junk + base[at + len(junk) :]
    try:
        expected = json.loads(body.decode("utf-8"), parse_constant=float)
        json.dumps(expected, ensure_ascii=False).encode("utf-8")
    except ValueError:
        with pytest.raises(InvalidRequestError):
            parse_object(body, 64)
        return
    if "inf" in repr(expected) or "nan" in repr(expected) or not isinstance(expected, dict):
        with pytest.raises(InvalidRequestError):
            parse_object(body, 64)
    else:
        assert parse_object(body, 64) == expected


HOSTILE = {
    "deep arrays": b"[" * TEN_MIB,
    "deep objects": b'{"a":' * (TEN_MIB // 5),
    "many keys": b"{" + b",".join(b'"%d":0' % number for number in range(1_000_000))[: TEN_MIB - 10] + b"}",
    "many arrays": b'{"messages":[' + b"[]," * (TEN_MIB // 3 - 10) + b"[]]}",
    "many strings": b'{"messages":[' + b'"",' * (TEN_MIB // 3 - 10) + b'""]}',
    "many numbers": b'{"messages":[' + b"1," * (TEN_MIB // 2 - 10) + b"1]}",
    "one number": b'{"seed":' + b"1" * (TEN_MIB - 20) + b"}",
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_body_is_refused_quickly(name: str) -> None:
    """The budget is 50 ms on an idle machine; the test allows for a busy one."""
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        with pytest.raises(InvalidRequestError) as caught:
            parse_object(HOSTILE[name], 64)
        best = min(best, time.perf_counter() - start)
    assert caught.value.code == "invalid_json"
    assert best < 0.1


def test_the_most_values_that_are_read() -> None:
    assert len(parse_object(b'{"a":[' + b"[]," * (MAX_NODES - 4) + b"[]]}", 64)["a"]) == MAX_NODES - 3
    with pytest.raises(InvalidRequestError, match="too many values"):
        parse_object(b'{"a":[' + b"[]," * (MAX_NODES - 2) + b"[]]}", 64)


async def test_a_large_body_does_not_hold_up_others() -> None:
    s = stand()
    big = json.dumps({"messages": [{"role": "user", "content": "x\n" * (TEN_MIB // 3 - 100)}]}).encode()
    loop = asyncio.get_running_loop()
    lags: list[float] = []

    def tick(due: float) -> None:
        lags.append(loop.time() - due)
        handle[0] = loop.call_later(0.005, tick, loop.time() + 0.005)

    handle = [loop.call_soon(tick, loop.time())]
    async with s.client() as client:
        response = await client.post(URL, content=big, headers=JSON)
    handle[0].cancel()
    assert response.status_code == 200
    assert lags
    assert max(lags) < 0.2


@pytest.mark.parametrize(("size", "thread"), [(10, "MainThread"), (INLINE_BYTES, "inferflux-parser_0")])
async def test_what_a_large_body_says_is_made_out_where_it_is_parsed(
    monkeypatch: pytest.MonkeyPatch, size: int, thread: str
) -> None:
    threads: list[str] = []
    generation = ChatBody.generation

    def noted(body: ChatBody, server: ServerSettings) -> GenerationRequest:
        threads.append(threading.current_thread().name)
        return generation(body, server)

    monkeypatch.setattr(ChatBody, "generation", noted)
    s = stand()
    async with s.client() as client:
        response = await client.post(URL, json={"messages": [{"role": "user", "content": "x" * size}]})
    assert (response.status_code, threads) == (200, [thread])


@pytest.mark.parametrize("announced", [True, False])
async def test_body_over_the_limit(announced: bool) -> None:
    s = stand(max_body_bytes=2000)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b" " * 500

    async with s.client() as client:
        content = b" " * 2500 if announced else pieces()
        response = await client.post(URL, content=content, headers=JSON)
        fits = await client.post(URL, content=json.dumps(CHAT).encode().ljust(2000), headers=JSON)
    assert response.status_code == 413
    assert response.headers["connection"] == "close"
    assert response.json() == {
        "error": {
            "message": "The request body is larger than 2000 bytes, the limit of this server (server.max_body_bytes); "
            "send less.",
            "type": "invalid_request_error",
            "param": None,
            "code": "request_too_large",
        }
    }
    assert fits.status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"content-type": "application/json"}, 200),
        ({"content-type": "Application/JSON; charset=UTF-8"}, 200),
        ({"content-type": 'application/json; charset="utf-8"'}, 200),
        ({"content-type": "application/json; charset=latin-1"}, 415),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/jsonx"}, 415),
        ({}, 415),
        ({"content-type": "application/json", "content-encoding": "gzip"}, 415),
        ({"content-type": "application/json", "content-encoding": "identity"}, 200),
    ],
)
async def test_media_type(headers: dict[str, str], status: int) -> None:
    s = stand()
    async with s.client() as client:
        response = await client.post(URL, content=json.dumps(CHAT), headers=headers)
    assert response.status_code == status
    if status == 415:
        error = response.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)
