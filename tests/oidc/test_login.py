"""inferctl login and logout against a real, certified OpenID provider."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from click.testing import CliRunner
from joserfc import jws

from core.cli.stub_server import StubServer
from inferflux_core.cli.api_errors import ApiError
from inferflux_core.cli.inferctl import inferctl
from inferflux_core.cli.login_session import LoginSession
from inferflux_core.cli.token_store import Login, TokenStore
from oidc.login_case import log_in, private_state, resource_server
from oidc.real_provider import RealProvider, real_provider


@pytest.fixture(scope="module")
def provider() -> Iterator[RealProvider]:
    with real_provider() as running:
        yield running


@pytest.fixture(autouse=True)
def logins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return private_state(monkeypatch, tmp_path)


def logged_in(monkeypatch: pytest.MonkeyPatch, provider: RealProvider, url: str) -> Login:
    """Logs in as alice; returns what is kept of it."""
    result, _ = log_in(monkeypatch, url, lambda _, opened: provider.sign_in(opened))
    assert result.exit_code == 0, result.output
    login = TokenStore.of_user().load(url)
    assert login is not None
    return login


def claims(token: str) -> dict[str, object]:
    document: dict[str, object] = json.loads(jws.extract_compact(token.encode()).payload)
    return document


def refreshed(provider: RealProvider, token: str) -> httpx.Response:
    form = {"grant_type": "refresh_token", "refresh_token": token, "client_id": "inferctl"}
    return httpx.post(f"{provider.url}/token", data=form, timeout=30)


def later(url: str, seconds: float) -> LoginSession:
    """The stored login, seen when some seconds have passed."""
    return LoginSession(TokenStore.of_user(), url, now=lambda: time.time() + seconds)


def test_a_login_waits_for_its_user_and_then_serves_every_command(
    monkeypatch: pytest.MonkeyPatch, provider: RealProvider, logins: Path
) -> None:
    polls_before_sign_in = 2

    def on_sleep(count: int, opened: str) -> None:
        if count > polls_before_sign_in:
            provider.sign_in(opened)

    with resource_server(provider.url, scopes_supported=["infer:generate", "infer:admin"]) as server:
        result, clock = log_in(monkeypatch, server.url, on_sleep)
        assert (result.exit_code, clock.slept) == (0, [5.0, 5.0, 5.0])
        assert result.stdout.endswith(f"Logged in at {server.url}, for: infer:generate\n")
        models = CliRunner().invoke(inferctl, ["--url", server.url, "models", "--json"])
        assert models.exit_code == 0, models.output
        kept = TokenStore.of_user().load(server.url)
        sent = server.requests[-1].headers["authorization"].removeprefix("Bearer ")
    assert kept is not None
    assert sent == kept.access_token
    told = claims(sent)
    wanted = {"iss": provider.url, "aud": server.url, "sub": "alice", "scope": "infer:generate", "tenant": "t1"}
    assert {name: told[name] for name in wanted} == wanted
    assert kept.expires_at == pytest.approx(time.time() + 600, abs=30)
    assert kept.refresh_token
    for secret in (kept.access_token, kept.refresh_token):
        assert secret not in result.output + models.output + repr(kept)
    files = sorted(logins.iterdir())
    assert [path.suffix for path in files] == [".json", ".lock"]
    assert [stat.S_IMODE(path.stat().st_mode) for path in (logins, *files)] == [0o700, 0o600, 0o600]


def test_json_tells_a_program_where_to_send_its_user(monkeypatch: pytest.MonkeyPatch, provider: RealProvider) -> None:
    with resource_server(provider.url) as server:
        result, _ = log_in(monkeypatch, server.url, lambda _, opened: provider.sign_in(opened), "--json")
    device, done = [json.loads(line) for line in result.stdout.splitlines()]
    assert sorted(device) == ["expires_in", "type", "user_code", "verification_uri", "verification_uri_complete"]
    assert (device["type"], device["verification_uri"]) == ("device", f"{provider.url}/device")
    assert device["verification_uri_complete"] == f"{provider.url}/device?user_code={device['user_code']}"
    assert {name: done[name] for name in ("type", "url", "issuer", "scope")} == {
        "type": "done",
        "url": server.url,
        "issuer": provider.url,
        "scope": "infer:generate",
    }


def test_a_browser_is_opened_unless_told_not_to(monkeypatch: pytest.MonkeyPatch, provider: RealProvider) -> None:
    opened: list[str] = []

    def on_sleep(count: int, url: str) -> None:
        opened.append(url)
        raise KeyboardInterrupt

    with resource_server(provider.url) as server:
        result, _ = log_in(monkeypatch, server.url, on_sleep, "--no-browser")
        assert (result.exit_code, opened) == (130, [""])
        log_in(monkeypatch, server.url, on_sleep)
        assert opened[1].startswith(f"{provider.url}/device?user_code=")


def test_an_explicit_issuer_and_scope_need_no_metadata(monkeypatch: pytest.MonkeyPatch, provider: RealProvider) -> None:
    with StubServer() as server:
        arguments = ("--issuer", provider.url, "--scope", "infer:admin")
        result, _ = log_in(monkeypatch, server.url, lambda _, opened: provider.sign_in(opened), *arguments)
        assert (result.exit_code, server.requests) == (0, [])
    token = LoginSession(TokenStore.of_user(), server.url).access_token()
    assert token is not None
    assert (claims(token)["aud"], claims(token)["scope"]) == (server.url, "infer:admin")


def test_an_api_key_goes_before_a_login(monkeypatch: pytest.MonkeyPatch, provider: RealProvider) -> None:
    with resource_server(provider.url) as server:
        monkeypatch.setenv("INFERCTL_API_KEY", "sk-mine")
        result, _ = log_in(monkeypatch, server.url, lambda _, opened: provider.sign_in(opened))
        assert result.stderr == (
            "An API key is set (--api-key or INFERCTL_API_KEY); commands use that in place of this login.\n"
        )
        assert CliRunner().invoke(inferctl, ["--url", server.url, "models"]).exit_code == 0
        assert server.requests[-1].headers["authorization"] == "Bearer sk-mine"


def test_an_access_token_is_replaced_before_it_ends(monkeypatch: pytest.MonkeyPatch, provider: RealProvider) -> None:
    with resource_server(provider.url) as server:
        first = logged_in(monkeypatch, provider, server.url)
    assert later(server.url, 560).access_token() == first.access_token
    second = later(server.url, 575).access_token()
    rotated = TokenStore.of_user().load(server.url)
    assert rotated is not None
    assert second == rotated.access_token != first.access_token
    assert rotated.refresh_token != first.refresh_token
    assert second is not None
    assert claims(second)["aud"] == server.url
    assert later(server.url, 1200).access_token() not in (None, second)  # and once more, with the rotated one


def test_a_login_whose_refresh_token_was_stolen_ends_and_says_so(
    monkeypatch: pytest.MonkeyPatch, provider: RealProvider, logins: Path
) -> None:
    with resource_server(provider.url) as server:
        first = logged_in(monkeypatch, provider, server.url)
    assert first.refresh_token is not None
    assert later(server.url, 575).access_token() is not None
    assert refreshed(provider, first.refresh_token).json()["error"] == "invalid_grant"  # a replay ends the whole grant
    with pytest.raises(ApiError, match="has ended") as caught:
        later(server.url, 1200).access_token()
    assert caught.value.code == "login_ended"
    assert [path.suffix for path in logins.iterdir()] == [".lock"]


def test_two_commands_at_once_refresh_once(monkeypatch: pytest.MonkeyPatch, provider: RealProvider) -> None:
    with resource_server(provider.url) as server:
        first = logged_in(monkeypatch, provider, server.url)
        TokenStore.of_user().save(replace(first, expires_at=time.time() - 1))
        command = [sys.executable, "-c", "from inferflux_core.cli.inferctl import main; main()", "--url", server.url, "models"]
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ) for _ in range(2)]
        outputs = [process.communicate(timeout=60)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], outputs
        sent = {request.headers["authorization"] for request in server.requests if request.path == "/v1/models"}
    now = TokenStore.of_user().load(server.url)
    assert now is not None
    assert sent == {f"Bearer {now.access_token}"}
    assert now.access_token != first.access_token
    assert now.refresh_token is not None
    assert refreshed(provider, now.refresh_token).status_code == 200


def test_logout_revokes_the_login_and_forgets_it(monkeypatch: pytest.MonkeyPatch, provider: RealProvider, logins: Path) -> None:
    with resource_server(provider.url, path="/opaque") as server:  # opaque tokens can be revoked at once
        url = server.url + "/opaque"
        kept = logged_in(monkeypatch, provider, url)
        assert kept.refresh_token is not None
        before = provider.introspect(kept.access_token)
        assert (before["active"], before["aud"]) == (True, url)
        result = CliRunner().invoke(inferctl, ["--url", url, "logout", "--json"])
        assert json.loads(result.stdout) == {"url": url, "logged_out": True, "revoked": True}
        assert provider.introspect(kept.access_token) == {"active": False}
        assert refreshed(provider, kept.refresh_token).json()["error"] == "invalid_grant"
        assert [path.suffix for path in logins.iterdir()] == [".lock"]
        assert LoginSession(TokenStore.of_user(), url).access_token() is None
        again = CliRunner().invoke(inferctl, ["--url", url, "logout"])
        assert (again.exit_code, again.stdout) == (0, f"There is no login at {url}\n")


def test_a_denied_login_leaves_nothing(monkeypatch: pytest.MonkeyPatch, provider: RealProvider, logins: Path) -> None:
    with resource_server(provider.url) as server:
        result, clock = log_in(monkeypatch, server.url, lambda _, opened: provider.deny(opened), "--json")
    message = f"the login was denied at {provider.url}"
    assert (result.exit_code, clock.slept, result.stderr) == (1, [5.0], f"Error: {message}\n")
    assert json.loads(result.stdout.splitlines()[-1])["error"] == {"message": message, "status": 400, "code": "access_denied"}
    assert not logins.exists()


def test_a_code_that_expires_leaves_nothing(monkeypatch: pytest.MonkeyPatch, provider: RealProvider, logins: Path) -> None:
    with resource_server(provider.url) as server:
        result, clock = log_in(monkeypatch, server.url, lambda count, _: provider.advance(602) if count == 2 else None)
    assert (result.exit_code, clock.slept) == (1, [5.0, 5.0])
    assert result.stderr == "Error: the code expired before the login was confirmed. Start again with: inferctl login\n"
    assert not logins.exists()


def test_keys_change_and_tokens_of_both_generations_can_be_told_apart(provider: RealProvider) -> None:
    def signed_with(resource: str = "http://127.0.0.1:8080") -> str:
        return str(jws.extract_compact(provider.client_credentials(resource).encode()).headers()["kid"])

    def published() -> list[str]:
        return [key["kid"] for key in httpx.get(f"{provider.url}/jwks", timeout=30).json()["keys"]]

    assert (signed_with(), len(published())) == ("old-RS256", 3)
    provider.restart(keys="old+new")
    assert (signed_with(), len(published())) == ("new-RS256", 6)
    provider.restart(keys="new")
    assert (signed_with(), published()) == ("new-RS256", ["new-RS256", "new-ES256", "new-EdDSA"])
    provider.restart(keys="old")
    assert signed_with() == "old-RS256"
