"""Which web pages may call the server, and what they may read."""

from __future__ import annotations

import httpx
import pytest
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from inferflux_core.errors import ConfigError
from inferflux_core.serving.exchange import Exchange
from inferflux_core.serving.origins import OriginCheck, OriginGuard

CHECK = OriginCheck(("https://chat.example.com", "http://localhost:3000"), "https://llm.example.com/base")
SERVER = "http://llm.internal:8080"


class Standing:
    """An application behind the guard.

    Attributes:
        reached: how often.
        error: of the last exchange.
    """

    def __init__(self, check: OriginCheck = CHECK) -> None:
        self.reached = 0
        self.error: str | None = None
        self._guard = OriginGuard(self._app, check=check)

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.reached += 1
        await PlainTextResponse("secret", headers={"Vary": "Accept"})(scope, receive, send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange("id")
        exchange.attach(scope)
        await self._guard(scope, receive, send)
        self.error = exchange.error

    async def send(self, method: str, *headers: tuple[str, str], url: str = SERVER) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self)) as client:
            return await client.request(method, url + "/v1/models", headers=list(headers))


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "",
        "https://chat.example.com.evil.example",
        "https://evil.chat.example.com",
        "http://chat.example.com",
        "https://chat.example.com:8443",
        "https://chat.example.com/",
        "https://chat.example.com https://evil.example",
        "http://llm.internal",  # another port
        "https://llm.internal:8080",  # another scheme
        "http://llm.internal:80801",
    ],
)
async def test_foreign_pages_are_refused(origin: str, method: str) -> None:
    s = Standing()
    preflight = ("Access-Control-Request-Method", "POST")
    response = await s.send(method, ("Origin", origin), *([preflight] if method == "OPTIONS" else []))
    assert (response.status_code, s.reached, s.error) == (403, 0, "origin_not_allowed")
    assert not any(name.startswith("access-control") for name in response.headers)
    if method != "HEAD":
        assert response.json()["error"]["code"] == "origin_not_allowed"
        assert response.json()["error"]["type"] == "permission_error"


async def test_two_origins_are_refused() -> None:
    listed = ("Origin", "https://chat.example.com")
    assert (await Standing().send("GET", listed, listed)).status_code == 403


@pytest.mark.parametrize("origin", [SERVER, SERVER.upper(), "https://llm.example.com", "https://llm.example.com:443"])
async def test_own_pages_and_programs_pass_without_cors(origin: str) -> None:
    s = Standing()
    for headers in ([("Origin", origin)], [], [("Sec-Fetch-Site", "same-origin")], [("Sec-Fetch-Site", "none")]):
        response = await s.send("POST", *headers)
        assert response.text == "secret"
        assert not any(name.startswith("access-control") for name in response.headers)
        assert response.headers["vary"] == "Accept"
    assert s.reached == 4


async def test_the_default_port_may_be_left_out_on_either_side() -> None:
    s = Standing()
    for url, origin in (("http://a:80", "http://a"), ("https://a", "https://a:443"), ("https://[::1]:443", "https://[::1]")):
        host = ("Host", url.partition("://")[2])
        assert (await s.send("POST", host, ("Origin", origin), url=url)).status_code == 200


async def test_listed_pages_may_read() -> None:
    response = await Standing().send("POST", ("Origin", "https://chat.example.com"))
    assert response.text == "secret"
    assert response.headers["access-control-allow-origin"] == "https://chat.example.com"
    assert "x-request-id" in response.headers["access-control-expose-headers"]
    assert response.headers["vary"] == "Accept, Origin"
    assert "access-control-allow-credentials" not in response.headers


async def test_preflight_of_a_listed_page_needs_no_credential() -> None:
    s = Standing()
    response = await s.send("OPTIONS", ("Origin", "http://localhost:3000"), ("Access-Control-Request-Method", "POST"))
    assert (response.status_code, response.content, s.reached) == (204, b"", 0)
    assert response.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert response.headers["access-control-allow-methods"] == "GET, POST, PUT, PATCH, DELETE"
    allowed = response.headers["access-control-allow-headers"].split(", ")
    assert {"authorization", "content-type", "if-match"} <= set(allowed)
    assert "*" not in allowed
    assert response.headers["access-control-max-age"] == "600"
    assert response.headers["vary"] == "Origin"


async def test_options_that_is_no_preflight_is_an_ordinary_request() -> None:
    s = Standing()
    assert (await s.send("OPTIONS", ("Origin", "http://localhost:3000"))).text == "secret"
    assert (await s.send("OPTIONS")).text == "secret"


async def test_a_page_that_hides_its_origin() -> None:
    s = Standing()
    for site in ("cross-site", "same-site"):
        for method in ("POST", "PUT", "PATCH", "DELETE"):
            assert (await s.send(method, ("Sec-Fetch-Site", site))).status_code == 403
    assert s.reached == 0
    assert (await s.send("GET", ("Sec-Fetch-Site", "cross-site"))).status_code == 200  # a link to the console


@pytest.mark.parametrize("origin", ["*", "null", "chat.example.com", "https://chat.example.com/", "https://*.example.com", ""])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ConfigError, match=r"server\.allowed_origins: .* is not an origin"):
        OriginCheck((origin,))


def test_public_url_must_have_an_origin() -> None:
    with pytest.raises(ConfigError, match=r"server\.public_url"):
        OriginCheck((), "llm.example.com")
