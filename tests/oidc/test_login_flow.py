"""The device flow against scripted providers: what the standards allow a provider to say, and what a hostile one may try."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from core.cli.stub_server import Exchange, Handler, StubServer
from inferflux_core.cli import device_flow, login
from inferflux_core.cli.api_errors import ApiError
from inferflux_core.cli.device_flow import DeviceCode, Tokens, begin, wait_for_tokens
from inferflux_core.cli.inferctl import inferctl
from inferflux_core.cli.oauth_discovery import Issuer, find_issuer, find_resource
from inferflux_core.cli.oauth_http import MAX_ANSWER_BYTES, OAuthError, checked_url, get_json
from oidc.login_case import METADATA, FakeClock, log_in, private_state, replying, resource_server

OPENID = "/.well-known/openid-configuration"
TOKEN = {"access_token": "at-1", "token_type": "Bearer", "expires_in": 600, "refresh_token": "rt-1"}
PENDING = OAuthError("still waiting", status=400, code="authorization_pending")
SLOW_DOWN = OAuthError("slower", status=400, code="slow_down")
BROKEN = ApiError("answered with HTTP 503 and no reason", status=503)
UNREACHABLE = ApiError("cannot reach it")
ISSUER = Issuer(
    issuer="https://id.test", token="https://id.test/token", device_authorization=None, revocation=None, scopes=None
)


@pytest.fixture(autouse=True)
def logins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return private_state(monkeypatch, tmp_path)


@pytest.fixture
def issuer() -> Iterator[StubServer]:
    """A provider whose device login is confirmed at once; tests change its routes."""
    with StubServer() as server:

        async def metadata(exchange: Exchange) -> None:
            await exchange.reply(200, metadata_of(server))

        async def device(exchange: Exchange) -> None:
            await exchange.reply(200, device_answer(server))

        server.routes |= {OPENID: metadata, "/device": device, "/token": replying(TOKEN)}
        yield server


def metadata_of(server: StubServer, **changes: object) -> dict[str, object]:
    return {
        "issuer": server.url,
        "token_endpoint": f"{server.url}/token",
        "device_authorization_endpoint": f"{server.url}/device",
    } | changes


def device_answer(server: StubServer, **changes: object) -> dict[str, object]:
    return {"device_code": "dc-1", "user_code": "ABCD-EFGH", "verification_uri": f"{server.url}/go", "expires_in": 60} | changes


def form(exchange: Exchange) -> dict[str, str]:
    return {name: values[0] for name, values in parse_qs(exchange.body.decode()).items()}


def polled(
    answers: list[ApiError | dict[str, Any]], *, expires_in: float = 600.0, interval: float = 5.0
) -> tuple[Tokens | ApiError, list[float]]:
    """What a login ends with when the token endpoint answers so, and then goes on with `authorization_pending`."""
    script = iter(answers)

    def answer(url: str, fields: object) -> dict[str, Any]:
        step = next(script, PENDING)
        if isinstance(step, ApiError):
            raise step
        return step

    clock = FakeClock()
    code = DeviceCode(
        device_code="dc",
        user_code="U",
        verification_uri="https://id.test",
        verification_uri_complete=None,
        expires_in=expires_in,
        interval=interval,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device_flow, "post_form", answer)
        try:
            found: Tokens | ApiError = wait_for_tokens(
                ISSUER, code, client_id="inferctl", resource="https://x.test", sleep=clock.sleep, clock=clock.monotonic
            )
        except ApiError as error:
            found = error
    return found, clock.slept


# polling


def test_slow_down_adds_five_seconds_for_good() -> None:
    found, slept = polled([PENDING, SLOW_DOWN, PENDING, SLOW_DOWN, TOKEN])
    assert found == Tokens(access_token="at-1", expires_in=600.0, refresh_token="rt-1", scope=None)
    assert slept == [5, 5, 10, 10, 15]


def test_a_provider_that_fails_is_asked_ever_less_often() -> None:
    found, slept = polled([BROKEN, UNREACHABLE, BROKEN, BROKEN, BROKEN, TOKEN], interval=3)
    assert isinstance(found, Tokens)
    assert slept == [3, 6, 12, 24, 48, 60]


def test_an_interval_longer_than_the_limit_is_kept() -> None:
    assert polled([BROKEN, TOKEN], interval=90)[1] == [90, 90]


def test_nobody_is_asked_after_the_code_has_expired() -> None:
    found, slept = polled([], expires_in=12)
    assert slept == [5, 5, 2]
    assert isinstance(found, ApiError)
    assert (found.code, str(found)) == (
        "expired_token",
        "the code expired before the login was confirmed. Start again with: inferctl login",
    )


@pytest.mark.parametrize("code", ["access_denied", "expired_token", "invalid_client", "invalid_grant"])
def test_a_final_answer_ends_the_login(code: str) -> None:
    found, slept = polled([PENDING, OAuthError("no", status=400, code=code)])
    assert (isinstance(found, ApiError) and found.code, len(slept)) == (code, 2)


def test_a_client_error_without_a_reason_ends_the_login() -> None:
    error = ApiError("answered with HTTP 404 and no reason", status=404)
    assert polled([error]) == (error, [5])


@pytest.mark.parametrize(
    "changes",
    [
        {"access_token": None},
        {"access_token": ""},
        {"access_token": "a\r\nx-admin:1"},
        {"access_token": "é"},
        {"token_type": "DPoP"},
        {"token_type": None},
    ],
)
def test_a_token_that_cannot_be_sent_is_refused_without_being_shown(changes: dict[str, object]) -> None:
    found, _ = polled([TOKEN | changes])
    assert isinstance(found, ApiError)
    assert (found.code, str(found)) == ("no_token", "https://id.test answered without a bearer token that can be sent")


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(600, 600), ("600", 600), (0, None), (-1, None), (True, None), (10**400, None), ("x", None), (None, None)],
)
def test_lifetimes_are_positive_numbers_or_unknown(value: object, seconds: float | None) -> None:
    found, _ = polled([TOKEN | {"expires_in": value}])
    assert isinstance(found, Tokens)
    assert found.expires_in == seconds


@given(
    answers=st.lists(st.sampled_from([PENDING, SLOW_DOWN, BROKEN, UNREACHABLE])),
    interval=st.integers(1, 120),
    expires_in=st.integers(1, 900),
)
def test_polling_never_hurries_and_always_ends(answers: list[ApiError], interval: int, expires_in: int) -> None:
    found, slept = polled(list(answers), interval=interval, expires_in=expires_in)
    assert isinstance(found, ApiError)
    assert sum(slept) == expires_in
    *whole, last = slept
    assert all(pause >= interval for pause in whole)
    assert whole == sorted(whole)
    assert last > 0
    slowed = sum(answer is SLOW_DOWN for answer in answers[: len(whole) - 1])
    assert not whole or whole[-1] >= interval + 5 * slowed


# the provider's metadata


def test_what_is_asked_for(monkeypatch: pytest.MonkeyPatch, issuer: StubServer) -> None:
    with resource_server(issuer.url, scopes_supported=["infer:read", "infer:generate", "infer:admin"]) as server:
        result, _ = log_in(monkeypatch, server.url, lambda *_: None, "--client-id", "cli-7")
    assert result.exit_code == 0, result.output
    device, token = map(form, issuer.posts())
    assert device == {"client_id": "cli-7", "scope": "openid offline_access infer:generate infer:read", "resource": server.url}
    grant = "urn:ietf:params:oauth:grant-type:device_code"
    assert token == {"client_id": "cli-7", "grant_type": grant, "device_code": "dc-1", "resource": server.url}
    assert result.stdout.splitlines()[:2] == [
        f"To log in with {issuer.url}, open this in a browser and confirm the code ABCD-EFGH:",
        f"  {issuer.url}/go",
    ]


def test_the_metadata_must_be_the_issuers_own(issuer: StubServer) -> None:
    issuer.routes[OPENID] = replying(metadata_of(issuer, issuer="https://good.test"))
    with pytest.raises(ApiError, match=r"is of the issuer 'https://good\.test'") as caught:
        find_issuer(issuer.url)
    assert caught.value.code == "issuer_mismatch"
    with pytest.raises(ApiError, match="with or without a slash"):
        find_issuer(issuer.url + "/")


def test_oauth_metadata_serves_where_openid_is_not_spoken(issuer: StubServer) -> None:
    tenant = f"{issuer.url}/tenant"
    issuer.routes["/.well-known/oauth-authorization-server/tenant"] = replying(
        metadata_of(issuer, issuer=tenant, revocation_endpoint=f"{issuer.url}/revoke", scopes_supported=["openid"])
    )
    assert find_issuer(tenant) == Issuer(
        issuer=tenant,
        token=f"{issuer.url}/token",
        device_authorization=f"{issuer.url}/device",
        revocation=f"{issuer.url}/revoke",
        scopes=("openid",),
    )


@pytest.mark.parametrize(
    "url", ["http://id.test", "http://10.0.0.1", "ftp://127.0.0.1", "https://u@id.test", "https://a b", "", 7]
)
def test_a_login_needs_https(url: object) -> None:
    with pytest.raises(ApiError, match=r"^the issuer is ") as caught:
        checked_url(url, "the issuer", local=True)
    assert caught.value.code == "insecure_url"


def test_a_remote_server_cannot_send_us_to_a_local_port() -> None:
    assert checked_url("http://127.0.0.1:5000", "x", local=True) == "http://127.0.0.1:5000"
    with pytest.raises(ApiError, match="needs https"):
        checked_url("http://127.0.0.1:5000", "x", local=False)


@given(st.text() | st.text(alphabet="https:/@.\\#?[]1270 \nlocalhost"))
def test_only_https_and_loopback_urls_pass(url: str) -> None:
    try:
        passed = checked_url(url, "x", local=True)
    except ApiError:
        return
    assert passed == url
    assert url.lower().startswith(("https://", "http://127.", "http://localhost", "http://[::1]"))


@pytest.mark.parametrize("scheme", ["file:///etc/passwd", "javascript:alert(1)", "http://id.test/go", "--new-window"])
def test_a_browser_is_never_sent_to_anything_but_a_web_page(issuer: StubServer, scheme: str) -> None:
    for name in ("verification_uri", "verification_uri_complete"):
        issuer.routes["/device"] = replying(device_answer(issuer, **{name: scheme}))
        with pytest.raises(ApiError, match=r"^the address to log in at is "):
            begin(find_issuer(issuer.url), client_id="c", scope="s", resource="r")


def test_no_browser_is_started_where_it_would_take_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr("sys.platform", "linux")
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER"):
        monkeypatch.delenv(name, raising=False)
    login._open_browser("https://id.test/1")
    monkeypatch.setenv("WAYLAND_DISPLAY", "wayland-0")
    login._open_browser("https://id.test/2")
    assert opened == ["https://id.test/2"]


def test_a_provider_without_device_login_says_so(issuer: StubServer) -> None:
    issuer.routes[OPENID] = replying(metadata_of(issuer, device_authorization_endpoint=None))
    with pytest.raises(ApiError, match="has no device login") as caught:
        begin(find_issuer(issuer.url), client_id="c", scope="s", resource="r")
    assert caught.value.code == "no_device_login"


# the server's metadata


def test_a_server_that_calls_itself_something_else_gets_no_token_for_that(issuer: StubServer) -> None:
    with resource_server(issuer.url, resource="https://bank.test") as server:
        with pytest.raises(ApiError, match=r"calls itself 'https://bank\.test'") as caught:
            find_resource(server.url)
        assert caught.value.code == "resource_mismatch"
        assert find_resource(server.url, "https://bank.test/").resource == "https://bank.test"


def test_metadata_is_looked_for_below_the_servers_path_too(issuer: StubServer) -> None:
    with resource_server(issuer.url) as server:
        url = f"{server.url}/llm"
        document = {"resource": url + "/", "authorization_servers": [issuer.url], "scopes_supported": ["infer:read"]}
        server.routes[f"/llm{METADATA}"] = replying(document)
        found = find_resource(url)
        assert [request.path for request in server.requests] == [f"{METADATA}/llm", f"/llm{METADATA}"]
    assert (found.resource, found.issuer, found.scopes) == (url + "/", issuer.url, ("infer:read",))


def test_a_server_without_an_identity_provider_says_what_to_do() -> None:
    with StubServer() as server:
        result = CliRunner().invoke(inferctl, ["--url", server.url, "login"])
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: {server.url} does not say who issues its access tokens (HTTP 404). If it takes any, name the issuer with "
        "--issuer; otherwise give an API key with --api-key\n",
    )


# answers


def bodies(*, status: int = 200, headers: dict[str, str] | None = None, body: bytes) -> Handler:
    return replying(body, status, headers)


@pytest.mark.parametrize("body", [b"<html>", b"[]", b"\xff", b"[" * 100_000, b"", gzip.compress(b'{"a": 1}', mtime=0)])
def test_what_is_not_a_json_object_is_an_empty_answer(body: bytes) -> None:
    with StubServer({"/x": bodies(body=body)}) as server:
        assert get_json(f"{server.url}/x") == (200, {})
        assert server.requests[0].headers["accept-encoding"] == "identity"


def test_a_packed_answer_is_not_unpacked() -> None:
    with StubServer({"/x": bodies(body=gzip.compress(b'{"a": 1}'), headers={"content-encoding": "gzip"})}) as server:
        assert get_json(f"{server.url}/x") == (200, {})


def test_an_answer_without_end_is_refused() -> None:
    endless = bodies(body=b" " * (MAX_ANSWER_BYTES + 1))
    with (
        StubServer({"/x": endless}) as server,
        pytest.raises(ApiError, match=f"with more than {MAX_ANSWER_BYTES} bytes"),
    ):
        get_json(f"{server.url}/x")


def test_redirects_are_not_followed() -> None:
    with StubServer({"/x": bodies(body=b"{}", status=302, headers={"location": "/y"}), "/y": replying({"a": 1})}) as server:
        assert get_json(f"{server.url}/x") == (302, {})


def test_a_providers_words_cannot_drive_the_terminal(monkeypatch: pytest.MonkeyPatch, issuer: StubServer) -> None:
    told = {"error": "invalid_scope", "error_description": "\x1b[2Jno such\nscope" + "!" * 1000}
    issuer.routes["/device"] = replying(told, 400)
    with resource_server(issuer.url) as server:
        result, _ = log_in(monkeypatch, server.url, lambda *_: None, "--json")
    expected = f"{issuer.url} answered 'invalid_scope': [2Jno such scope{'!' * 184}…"
    assert (result.exit_code, result.stderr) == (1, f"Error: {expected}\n")
    assert json.loads(result.stdout)["error"] == {"message": expected, "status": 400, "code": "invalid_scope"}


def test_an_unreachable_issuer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with StubServer() as gone:
        pass
    with resource_server(gone.url) as server:
        result, _ = log_in(monkeypatch, server.url, lambda *_: None)
    assert (result.exit_code, result.stderr) == (1, f"Error: cannot reach {gone.url}: connection refused\n")
