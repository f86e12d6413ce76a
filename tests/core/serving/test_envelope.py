"""What every reply has, whatever was asked: headers, one shape of errors, one line in the log."""

from __future__ import annotations

import logging

import httpx
import pytest

from core.serving.scripted import CHAT, FakeModels, stand

PATHS = ["/v1/models", "/nowhere", "/livez", "/metrics", "/openapi.json"]


@pytest.mark.parametrize("path", PATHS)
async def test_headers_of_every_reply(path: str) -> None:
    s = stand()
    async with s.client() as client:
        first, second = await client.get(path), await client.get(path)
    assert len(first.headers["x-request-id"]) == 32
    assert first.headers["x-request-id"] != second.headers["x-request-id"]
    assert first.headers["openai-version"] == "2020-10-01"
    assert 0 <= int(first.headers["openai-processing-ms"]) < 5000


@pytest.mark.parametrize(
    ("inbound", "kept"),
    [("a.B-c_9", True), ("x" * 64, True), ("x" * 65, False), ("", False), ("a b", False), ("a\tb", False), ("é", False)],
)
async def test_inbound_request_id(inbound: str, kept: bool) -> None:
    s = stand()
    async with s.client() as client:
        headers = {b"x-request-id": inbound.encode()}
        response = await client.get("/livez", headers=headers)
    assert (response.headers["x-request-id"] == inbound) is kept


@pytest.mark.parametrize(
    ("method", "path", "status", "message", "allow"),
    [
        ("GET", "/nowhere", 404, "Unknown URL: GET '/nowhere'. The API of this server is described at /openapi.json.", None),
        ("POST", "/v1/chat/completions/", 404, "Unknown URL: POST '/v1/chat/completions/'.", None),
        ("GET", "/V1/models", 404, "Unknown URL: GET '/V1/models'.", None),
        ("GET", "//v1/models", 404, "Unknown URL: GET '//v1/models'.", None),
        ("GET", "/docs", 404, "Unknown URL: GET '/docs'.", None),
        ("GET", "/redoc", 404, "Unknown URL: GET '/redoc'.", None),
        ("GET", "/v1/chat/completions", 405, "Method GET is not allowed for '/v1/chat/completions'; use POST.", "POST"),
        ("OPTIONS", "/v1/chat/completions", 405, "Method OPTIONS is not allowed", "POST"),
        ("POST", "/v1/models", 405, "Method POST is not allowed for '/v1/models'; use GET.", "GET"),
    ],
)
async def test_unknown_urls_and_methods(method: str, path: str, status: int, message: str, allow: str | None) -> None:
    s = stand()
    async with s.client() as client:
        response = await client.send(httpx.Request(method, "http://127.0.0.1" + path))
    error = response.json()["error"]
    assert response.status_code == status
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)
    assert error["message"].startswith(message)
    assert response.headers.get("allow") == allow


@pytest.mark.parametrize(
    ("bound", "host", "status"),
    [
        ("127.0.0.1", "localhost", 200),
        ("127.0.0.1", "LOCALHOST:8080", 200),
        ("127.0.0.1", "127.0.0.1:1", 200),
        ("127.0.0.1", "127.9.9.9", 200),
        ("127.0.0.1", "[::1]:8080", 200),
        ("localhost", "localhost", 200),
        ("::1", "evil.example", 421),
        ("127.0.0.1", "evil.example", 421),
        ("127.0.0.1", "localhost.evil.example", 421),
        ("127.0.0.1", "127.0.0.1.evil.example", 421),
        ("127.0.0.1", "0.0.0.0", 421),
        ("127.0.0.1", "10.0.0.1", 421),
        ("127.0.0.1", "localhost/v1/models?", 400),
        ("127.0.0.1", "evil@localhost", 400),
        ("127.0.0.1", "", 400),
        ("0.0.0.0", "evil.example", 200),
        ("0.0.0.0", "a b", 400),
    ],
)
async def test_host_header(bound: str, host: str, status: int) -> None:
    s = stand(host=bound)
    async with s.client() as client:
        response = await client.get("/v1/models", headers={"host": host})
    assert response.status_code == status
    if status != 200:
        error = response.json()["error"]
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)
        assert s.sample('inferflux_errors_total{reason="bad_host"}') == 1


async def test_two_hosts() -> None:
    s = stand(host="0.0.0.0")
    async with s.client() as client:
        response = await client.get("/livez", headers=[("host", "localhost"), ("host", "evil.example")])
    assert response.status_code == 400


async def test_an_unexpected_error_shows_nothing_of_itself(caplog: pytest.LogCaptureFixture) -> None:
    secret = "what a user wrote"

    class Broken(FakeModels):
        def get(self, name: str | None) -> object:  # type: ignore[override]  # it never returns
            raise ZeroDivisionError(secret)

    s = stand(models=Broken())
    async with s.client() as client:
        response = await client.get("/v1/models/x", headers={"x-request-id": "rid-1"})
    assert response.status_code == 500
    assert response.json() == {
        "error": {
            "message": "The server had an internal error. It was logged; quote request id 'rid-1' when you report it. "
            "Retrying may help.",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }
    assert response.headers["x-request-id"] == "rid-1"
    assert s.sample('inferflux_errors_total{reason="internal_error"}') == 1
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "unexpected ZeroDivisionError" in record.getMessage()
    assert "in get" in record.getMessage(), "the traceback is there"
    assert secret not in caplog.text


async def test_access_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "inferflux.access")
    s = stand()
    async with s.client() as client:
        await client.post("/v1/chat/completions?key=private", json=CHAT)
        await client.get("/v1/models/private")
        await client.get("/livez")
    done, missing = [record.__dict__["fields"] for record in caplog.records if record.name == "inferflux.access"]
    assert done.pop("ms") >= 0
    assert done == {
        "method": "POST",
        "route": "/v1/chat/completions",
        "status": 200,
        "model": "tiny",
        "prompt_tokens": 9,
        "completion_tokens": 3,
    }
    assert (missing["route"], missing["status"], missing["error"]) == ("/v1/models/{model_id:path}", 404, "model_not_found")
    assert "private" not in str(done) + str(missing)
