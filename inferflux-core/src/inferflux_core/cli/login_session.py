"""The access token of a login, kept fresh: what every inferctl command sends when it is given no API key."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from inferflux_core.cli.api_client import ApiClient
from inferflux_core.cli.api_errors import ApiError
from inferflux_core.cli.endpoint import Endpoint
from inferflux_core.cli.token_store import Login, TokenStore

if TYPE_CHECKING:
    import httpx

    from inferflux_core.cli.device_flow import Tokens

EARLY_S = 30.0
"""How long before its end an access token is replaced: a request takes a while to arrive, and clocks differ a little."""
UNKNOWN_LIFETIME_S = 300.0
"""How long a token is used that can be replaced and whose provider does not say how long it is good."""


class LoginSession:
    """The login at one server, as long as a program runs. It may be used by several programs at once."""

    def __init__(self, store: TokenStore, server: str, *, now: Callable[[], float] = time.time) -> None:
        """`now` is Unix time, in seconds."""
        self._store = store
        self._server = server
        self._now = now
        self._login: Login | None = None

    def exists(self) -> bool:
        """Whether there is a login, good or not."""
        return self._store.load(self._server) is not None

    def access_token(self) -> str | None:
        """The access token, refreshed if it is about to end; None without a login at this server. Reads the file only when the
        token that it last gave is about to end.

        Raises:
            ApiError: there is a login, but no token can be had from it; the message says what to do.
        """
        if self._login is None or not self._is_fresh(self._login):
            self._login = self._store.load(self._server)
        if self._login is not None and not self._is_fresh(self._login):
            self._login = self._refreshed()
        return None if self._login is None else self._login.access_token

    def _is_fresh(self, login: Login) -> bool:
        return login.expires_at is None or self._now() < login.expires_at - EARLY_S

    def _refreshed(self) -> Login | None:
        from inferflux_core.cli.device_flow import refresh
        from inferflux_core.cli.oauth_discovery import find_issuer

        with self._store.locked(self._server):
            # Another inferctl may have been here first. A refresh token that is used twice ends the whole login.
            login = self._store.load(self._server)
            if login is None or self._is_fresh(login):
                return login
            asked_at = self._now()
            try:
                token = self._store.refresh_token(login)
                if token is None:
                    raise self._ended()
                tokens = refresh(find_issuer(login.issuer), token, client_id=login.client_id, resource=login.resource)
            except ApiError as error:
                if error.code == "invalid_grant":
                    self._store.delete(login)
                    raise self._ended() from error
                if login.expires_at is None or asked_at < login.expires_at:
                    return login  # it is good for some seconds yet
                raise
            login = with_tokens(login, tokens, asked_at)
            self._store.save(login)  # before its first use: what is not saved now is lost
            return login

    def _ended(self) -> ApiError:
        return ApiError(
            f"the login at {self._server} has ended. Log in again with: inferctl --url {self._server} login",
            code="login_ended",
        )


def with_tokens(login: Login, tokens: Tokens, now: float) -> Login:
    """The login with new tokens; `now` is the Unix time, in seconds, at which they were asked for. What is not new stays."""
    lifetime = tokens.expires_in
    if lifetime is None and (tokens.refresh_token or login.refresh_token or login.in_keyring):
        lifetime = UNKNOWN_LIFETIME_S
    return dataclasses.replace(
        login,
        access_token=tokens.access_token,
        expires_at=None if lifetime is None else now + lifetime,
        refresh_token=tokens.refresh_token or login.refresh_token,
        in_keyring=login.in_keyring and tokens.refresh_token is None,
        scope=login.scope if tokens.scope is None else tokens.scope,
    )


class LoggedInClient(ApiClient):
    """A client whose every request carries the access token of a login, also when the token ends while the client lives."""

    def __init__(self, endpoint: Endpoint, session: LoginSession, *, timeout_s: float = 300.0) -> None:
        super().__init__(endpoint, timeout_s=timeout_s)
        self._session = session
        self._http.auth = self._authorised

    def _authorised(self, request: httpx.Request) -> httpx.Request:
        token = self._session.access_token()
        if token is not None:
            request.headers["authorization"] = f"Bearer {token}"
        return request
