"""The auth provider under test, with a clock that only moves when told."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from inferflux_auth_oidc.provider import OidcProvider
from inferflux_auth_oidc.settings import OidcSettings
from inferflux_core.errors import AccessUnavailableError, AuthenticationError
from inferflux_core.identity import AuthContext, Principal
from oidc.tokens import NOW, RESOURCE


class Clock:
    """Wall and monotonic time that pass together, or apart."""

    def __init__(self) -> None:
        self.wall = NOW
        self.steady = 1000.0

    def now(self) -> float:
        return self.wall

    def monotonic(self) -> float:
        return self.steady

    def advance(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds


class Checked:
    """An `OidcProvider` and what it counted.

    Attributes:
        events: what it counted, in order.
    """

    def __init__(self, *issuers: dict[str, Any], resource: str | None = RESOURCE, **settings: Any) -> None:
        self.clock = Clock()
        self.events: list[str] = []
        # By itself: loading the public authorities takes 20 ms, and the tests make some hundred of these.
        settings.setdefault("ca_file", Path(__file__).with_name("authority.pem"))
        context = AuthContext(state_dir=Path("unused"), resource=resource, count=self.events.append)
        self.provider = OidcProvider(
            OidcSettings.model_validate({"issuers": issuers, **settings}),
            context,
            now=self.clock.now,
            monotonic=self.clock.monotonic,
        )

    async def principal(self, token: str, address: str = "192.0.2.1") -> Principal:
        return await self.provider.authenticate(token, address)

    async def verdict(self, token: str, address: str = "192.0.2.1") -> str:
        """`accepted`, the reason of a refusal, or `unavailable`."""
        failure: AuthenticationError | AccessUnavailableError
        try:
            await self.principal(token, address)
        except (AuthenticationError, AccessUnavailableError) as error:
            failure = error
        else:
            return "accepted"
        if isinstance(failure, AuthenticationError):
            assert failure.status == 401
            return failure.reason
        assert (failure.status, failure.code) == (503, "auth_unavailable")
        assert int(failure.headers["Retry-After"]) >= 1
        return "unavailable"


@asynccontextmanager
async def checking(*issuers: dict[str, Any], **settings: Any) -> AsyncIterator[Checked]:
    checked = Checked(*issuers, **settings)
    try:
        yield checked
    finally:
        await checked.provider.close()
