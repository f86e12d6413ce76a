"""What is kept of a login: who can read it, what survives a failure, and when it is renewed."""

from __future__ import annotations

import os
import stat
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from core.cli.stub_server import Exchange, StubServer
from inferflux_core.cli.api_errors import ApiError
from inferflux_core.cli.endpoint import Endpoint
from inferflux_core.cli.inferctl import inferctl
from inferflux_core.cli.login_session import LoggedInClient, LoginSession
from inferflux_core.cli.token_store import Login, TokenStore
from oidc.login_case import fake_keyring, private_state, replying

SERVER = "https://llm.test"
LOGIN = Login(
    server=SERVER,
    issuer="https://id.test",
    client_id="inferctl",
    resource=SERVER,
    scope="infer:generate",
    access_token="at-0",
    expires_at=1000.0,
    refresh_token="rt-0",
)


@pytest.fixture(autouse=True)
def logins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    return private_state(monkeypatch, tmp_path)


class Provider:
    """Refreshes tokens at a loopback port: `at-1`, `rt-1`, then `at-2`, `rt-2`; answers as `error` says if that is set."""

    def __init__(self) -> None:
        self.server = StubServer({"/token": self._token, "/revoke": replying({})})
        self.error: tuple[int, object] | None = None
        self.refreshed = 0
        self.hold = threading.Event()
        self.hold.set()

    def __enter__(self) -> Provider:
        self.server.__enter__()
        url = self.server.url
        metadata = {"issuer": url, "token_endpoint": f"{url}/token", "revocation_endpoint": f"{url}/revoke"}
        self.server.routes["/.well-known/openid-configuration"] = replying(metadata)
        return self

    def __exit__(self, *error: object) -> None:
        self.server.__exit__(None, None, None)

    def login(self, **changes: object) -> Login:
        return replace(LOGIN, **{"issuer": self.server.url, **changes})  # type: ignore[arg-type]

    async def _token(self, exchange: Exchange) -> None:
        if self.error is not None:
            await exchange.reply(*self.error)
            return
        self.refreshed += 1
        # Blocks the provider's own thread only.
        assert self.hold.wait(20)
        number = self.refreshed
        document = {"access_token": f"at-{number}", "token_type": "Bearer", "expires_in": 600, "refresh_token": f"rt-{number}"}
        await exchange.reply(200, document)


def session(at: float) -> LoginSession:
    return LoginSession(TokenStore.of_user(), SERVER, now=lambda: at)


# the file and the keyring


def test_only_its_owner_can_read_a_login(logins: Path) -> None:
    old_mask = os.umask(0)
    try:
        TokenStore.of_user().save(LOGIN)
    finally:
        os.umask(old_mask)
    (file,) = logins.iterdir()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (logins.parent, logins, file)] == [0o700, 0o700, 0o600]
    assert TokenStore.of_user().load(SERVER) == LOGIN


def test_a_login_that_others_may_read_is_refused(logins: Path) -> None:
    TokenStore.of_user().save(LOGIN)
    (file,) = logins.iterdir()
    file.chmod(0o644)
    with pytest.raises(ApiError, match=r"can be read or written by others .*chmod 600"):
        TokenStore.of_user().load(SERVER)
    TokenStore.of_user().save(LOGIN)
    assert TokenStore.of_user().load(SERVER) == LOGIN


def test_a_login_is_for_one_server_only() -> None:
    TokenStore.of_user().save(LOGIN)
    for other in ("https://llm.test.evil", "http://llm.test", f"{SERVER}/v2", f"{SERVER}:444"):
        assert LoginSession(TokenStore.of_user(), other).access_token() is None


def test_a_file_that_was_moved_to_another_servers_place_is_refused(logins: Path) -> None:
    store = TokenStore.of_user()
    store.save(LOGIN)
    (file,) = logins.iterdir()
    file.rename(store._path("https://evil.test"))
    with pytest.raises(ApiError, match=r"is of the server 'https://llm\.test'"):
        LoginSession(TokenStore.of_user(), "https://evil.test").access_token()


def test_tokens_are_in_no_repr() -> None:
    assert "at-0" not in repr(LOGIN)
    assert "rt-0" not in repr(LOGIN)


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_login(monkeypatch: pytest.MonkeyPatch, logins: Path, failing: str) -> None:
    store = TokenStore.of_user()
    store.save(LOGIN)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, failing, full)
        with pytest.raises(ApiError, match="No space left on device"):
            store.save(replace(LOGIN, access_token="at-9"))
    assert store.load(SERVER) == LOGIN
    assert len(list(logins.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\xff", b'{"server": "https://llm.test"}'])
def test_a_damaged_file_is_named_with_the_cure(logins: Path, content: bytes) -> None:
    TokenStore.of_user().save(LOGIN)
    (file,) = logins.iterdir()
    file.write_bytes(content)
    result = CliRunner().invoke(inferctl, ["--url", SERVER, "models"])
    expected = f"Error: {str(file)!r} is damaged. Delete it, and log in again with: inferctl login\n"
    assert (result.exit_code, result.stderr) == (1, expected)


def test_the_refresh_token_goes_into_the_keyring_where_there_is_one(monkeypatch: pytest.MonkeyPatch, logins: Path) -> None:
    kept = fake_keyring(monkeypatch)
    store = TokenStore.of_user()
    store.save(LOGIN)
    (file,) = logins.iterdir()
    assert b"rt-0" not in file.read_bytes()
    assert kept == {("inferflux", SERVER): "rt-0"}
    login = store.load(SERVER)
    assert login is not None
    assert (login.refresh_token, login.in_keyring, store.refresh_token(login)) == (None, True, "rt-0")
    store.delete(login)
    assert kept == {}
    assert list(logins.iterdir()) == []


def test_the_file_takes_the_refresh_token_where_the_keyring_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_keyring(monkeypatch, failing=True)
    store = TokenStore.of_user()
    store.save(LOGIN)
    assert store.load(SERVER) == LOGIN


def test_a_keyring_that_cannot_be_read_is_an_error_not_a_logout(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_keyring(monkeypatch)
    TokenStore.of_user().save(LOGIN)
    fake_keyring(monkeypatch, failing=True)
    with pytest.raises(ApiError, match=r"the keyring cannot be read \(RuntimeError\)"):
        session(at=2000).access_token()
    assert TokenStore.of_user().load(SERVER) is not None


def test_a_rotated_refresh_token_replaces_that_in_the_keyring(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = fake_keyring(monkeypatch)
    with Provider() as provider:
        TokenStore.of_user().save(provider.login())
        assert session(at=2000).access_token() == "at-1"
        assert kept == {("inferflux", SERVER): "rt-1"}
        assert session(at=3000).access_token() == "at-2"
        assert "refresh_token=rt-1" in provider.server.posts()[1].body.decode()


# renewing


def test_a_fresh_token_is_used_without_asking_anybody() -> None:
    TokenStore.of_user().save(LOGIN)  # at a provider that does not exist
    assert session(at=969).access_token() == "at-0"


def test_a_token_without_an_end_is_used_until_the_server_refuses_it() -> None:
    TokenStore.of_user().save(replace(LOGIN, expires_at=None))
    assert session(at=1e9).access_token() == "at-0"


def test_a_token_that_is_still_good_serves_while_the_provider_is_away() -> None:
    with Provider() as provider:
        provider.error = (503, {"error": "temporarily_unavailable"})
        TokenStore.of_user().save(provider.login())
        assert session(at=999).access_token() == "at-0"
        with pytest.raises(ApiError, match="temporarily_unavailable"):
            session(at=1000).access_token()
        provider.error = None
        assert session(at=1000).access_token() == "at-1"


def test_a_login_that_the_provider_has_ended_is_forgotten(logins: Path) -> None:
    with Provider() as provider:
        provider.error = (400, {"error": "invalid_grant"})
        TokenStore.of_user().save(provider.login())
        with pytest.raises(ApiError, match="has ended"):
            session(at=2000).access_token()
    assert session(at=2000).access_token() is None


def test_a_login_without_a_refresh_token_ends_with_its_access_token() -> None:
    TokenStore.of_user().save(replace(LOGIN, refresh_token=None))
    assert session(at=999).access_token() == "at-0"
    with pytest.raises(ApiError, match=r"the login at https://llm\.test has ended"):
        session(at=1000).access_token()


def test_the_new_tokens_are_kept_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with Provider() as provider:
        TokenStore.of_user().save(provider.login())

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(ApiError, match="No space left on device"):
            session(at=2000).access_token()


def test_whoever_waits_for_another_refresh_uses_its_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second caller comes to the lock while the first one's refresh is under way."""
    with Provider() as provider:
        TokenStore.of_user().save(provider.login())
        provider.hold.clear()
        arrived = threading.Semaphore(0)
        locked = TokenStore.locked

        def announced(store: TokenStore, server: str) -> object:
            arrived.release()
            return locked(store, server)

        monkeypatch.setattr(TokenStore, "locked", announced)
        found: list[str | None] = []
        threads = [threading.Thread(target=lambda: found.append(session(at=2000).access_token())) for _ in range(2)]
        for thread in threads:
            thread.start()
        both_came = [arrived.acquire(timeout=10) for _ in threads]
        provider.hold.set()
        for thread in threads:
            thread.join(20)
        assert (both_came, provider.refreshed) == ([True, True], 1)
        assert [token for token in found if token != "at-1"] == []
        assert len(found) == 2


def test_a_client_that_outlives_its_token_goes_on_with_the_next_one() -> None:
    now = [0.0]
    with Provider() as provider, StubServer() as server:
        store = TokenStore.of_user()
        store.save(provider.login(server=server.url))
        lasting = LoginSession(store, server.url, now=lambda: now[0])
        with LoggedInClient(Endpoint.parse(server.url), lasting) as client:
            for now[0] in (0.0, 969.0, 970.0, 1539.0, 1540.0):
                client.models()
        sent = [request.headers["authorization"] for request in server.requests]
    assert sent == ["Bearer at-0", "Bearer at-0", "Bearer at-1", "Bearer at-1", "Bearer at-2"]


# logout


def test_logout_forgets_the_tokens_even_where_the_provider_is_away(logins: Path) -> None:
    with StubServer() as gone:
        pass
    TokenStore.of_user().save(replace(LOGIN, issuer=gone.url))
    result = CliRunner().invoke(inferctl, ["--url", SERVER, "logout"])
    assert (result.exit_code, result.stderr) == (
        1,
        f"Error: The tokens are deleted here, but not revoked at {gone.url!r}: cannot reach {gone.url}: connection refused\n",
    )
    assert [path.suffix for path in logins.iterdir()] == [".lock"]


def test_logout_says_when_a_signed_token_stays_good() -> None:
    with Provider() as provider:
        provider.server.routes["/revoke"] = replying({"error": "unsupported_token_type"}, 400)
        TokenStore.of_user().save(provider.login(refresh_token=None))
        result = CliRunner().invoke(inferctl, ["--url", SERVER, "logout"])
        assert (result.exit_code, result.stdout) == (
            0,
            f"Logged out of {SERVER}; the provider cannot revoke its tokens before they end\n",
        )
        body = provider.server.posts()[0].body.decode()
    assert body == "token=at-0&token_type_hint=access_token&client_id=inferctl"


def test_help_and_a_command_with_a_key_load_nothing_of_the_login() -> None:
    import subprocess
    import sys

    heavy = {"httpx", "webbrowser", "keyring", *(f"inferflux_core.cli.{name}" for name in ("device_flow", "login_session"))}
    program = f"import sys, inferflux_core.cli.inferctl; print(sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
