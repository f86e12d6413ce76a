"""Requests of any bytes, against an application without a network: it never fails, and opens to a good key only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.api_server import in_process

# --- credentials -----------------------------------------------------------------------------------------------------------


def is_good(headers: list[tuple[bytes, bytes]], key: bytes) -> bool:
    """Whether these headers say this key, as the documentation has it: one credential, spaces around it do not count."""
    credentials = [(name, value) for name, value in headers if name in (b"authorization", b"x-api-key")]
    if len(credentials) != 1:
        return False
    name, value = credentials[0]
    if name == b"x-api-key":
        return value.strip(b" ") == key
    return value[:6].lower() == b"bearer" and value[6:7] == b" " and value[6:].strip(b" ") == key


@st.composite
def credential_headers(draw: st.DrawFn) -> list[tuple[bytes, bytes]]:
    """Headers in which `KEY` stands for a good key, often with a byte or two changed."""
    headers = []
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        name = draw(st.sampled_from([b"authorization", b"x-api-key", b"proxy-authorization", b"cookie"]))
        scheme = draw(st.sampled_from([b"", b"Bearer ", b"bearer  ", b"BEARER\t", b"Basic ", b"Bearer"]))
        value = scheme + draw(st.sampled_from([b"KEY", b"KEY ", b" KEY", b"KEYKEY", b"KEY,KEY", b"ifx_", b""]))
        headers.append((name, value if draw(st.integers(0, 3)) else draw(st.binary(max_size=30))))
    return headers


def test_no_header_makes_the_server_fail_or_open(tmp_path: Path) -> None:
    outcomes: set[tuple[int, bool]] = set()
    with in_process(tmp_path) as app:
        key = app.key.encode()

        @given(credential_headers(), st.none() | st.tuples(st.integers(0, 71), st.binary(max_size=2), st.integers(0, 2)))
        @settings(max_examples=500, deadline=None, database=None)
        def check(headers: list[tuple[bytes, bytes]], change: tuple[int, bytes, int] | None) -> None:
            spelt = key
            if change is not None:
                at, junk, cut = change
                spelt = key[:at] + junk + key[at + cut :]
            sent = [(name, value.replace(b"KEY", spelt)) for name, value in headers]
            status = app.ask("GET", "/v1/models", sent)
            good = is_good(sent, key)
            assert status in ({200} if good else {400, 401}), sent
            outcomes.add((status, good))

        check()
    assert outcomes == {(200, True), (400, False), (401, False)}, "not everything was tried"


# --- bodies ----------------------------------------------------------------------------------------------------------------

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": [{"role": "user", "content": "x"}], "n": 1, "stop": ["a"], "logit_bias": {"1": 1}},
        {
            "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}],
            "stream": True,
        },
    ],
    "/v1/completions": [{"prompt": "x", "echo": True, "seed": 1}, {"prompt": [[1], [2]], "max_tokens": 4}],
    "/tokenize": [{"prompt": "x"}, {"content": "x", "with_pieces": True}],
    "/detokenize": [{"tokens": [1, 2, 256]}],
    "/v1/admin/api-keys": [{"name": "x", "limits": {"rpm": 1}, "cidr": ["10.0.0.0/8"], "expires_at": "2099-01-01T00:00:00Z"}],
}


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a document, with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path and a body that was good, until some of its values and bytes were replaced."""
    path = draw(st.sampled_from(sorted(_BODIES)))
    document = json.loads(json.dumps(draw(st.sampled_from(_BODIES[path]))))
    for _ in range(draw(st.integers(0, 2))):
        container, key = draw(st.sampled_from(list(_places(document))))
        container[key] = draw(_VALUES)
    body = json.dumps(document).encode()
    if draw(st.booleans()):
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=6)) + body[at + draw(st.integers(0, 6)) :]
    return path, body


def test_no_body_makes_the_server_fail_or_open(tmp_path: Path) -> None:
    json_type = (b"content-type", b"application/json")
    with in_process(tmp_path) as app:

        @given(damaged())
        @settings(max_examples=300, deadline=None, database=None)
        def check(request: tuple[str, bytes]) -> None:
            path, body = request
            assert app.ask("POST", path, [json_type], body) == 401
            for key in (app.key, app.admin):
                status = app.ask("POST", path, [json_type, (b"authorization", b"Bearer " + key.encode())], body)
                allowed = {403} if key == app.key and "admin" in path else {200, 400, 404}
                assert status in allowed, (status, path, body)

        check()
