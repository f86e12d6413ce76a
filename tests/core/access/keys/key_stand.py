"""A provider of API keys with a clock that tests move."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from inferflux_core.access.keys.provider import ApiKeyProvider
from inferflux_core.access.keys.ring import KeyRing
from inferflux_core.access.keys.settings import ApiKeySettings
from inferflux_core.errors import AuthenticationError
from inferflux_core.identity import AuthContext, Principal

NOW = 1_800_000_000.0


class Stand:
    """A provider whose two clocks move together when told, and what it counted."""

    def __init__(self, state_dir: Path, settings: ApiKeySettings | None = None) -> None:
        self.time = 0.0
        self.counts: Counter[str] = Counter()
        self.path = state_dir / "access.db"
        self.provider = ApiKeyProvider(
            settings or ApiKeySettings(),
            AuthContext(state_dir=state_dir, resource=None, count=lambda event: self.counts.update([event])),
            now=lambda: NOW + self.time,
            monotonic=lambda: 5000 + self.time,
        )

    @property
    def keys(self) -> KeyRing:
        return self.provider.keys

    async def who(self, key: str, address: str | None = None) -> Principal | str:
        """The principal, or why there is none."""
        try:
            return await self.provider.authenticate(key, address)
        except AuthenticationError as error:
            return error.reason

    @property
    def reads(self) -> int:
        return self.counts["store_read"]
