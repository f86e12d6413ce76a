"""Small policies for tests, and a store over one in a file."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from inferflux_core.access.policy.casbin_policy import Policy
from inferflux_core.access.policy.file import PolicyError
from inferflux_core.access.policy.store import PolicyEvent, PolicyStore
from inferflux_core.identity import Principal
from inferflux_core.settings import PolicySettings

ROLES = "role, user, admin, viewer\n"
BASE = ROLES + "p, role:user, *, model/**, generate, allow\ng, key:k1, role:user, acme\n"
DENY = BASE + "p, role:user, *, model/x, generate, deny\n"
NEVER_S = 3600.0


def compiled(text: str) -> Policy:
    return Policy.compile(text.encode(), "policy.csv")


def who(subject: str = "key:k1", tenant: str = "acme", *roles: str) -> Principal:
    return Principal(subject=subject, tenant=tenant, method="api_keys", roles=frozenset(roles))


class Stand:
    """A store over a file in a folder of its own, and the events it reported."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "policy.csv"
        self.tests = folder / "tests.csv"
        self.file.write_text(BASE)
        self.events: asyncio.Queue[PolicyEvent] = asyncio.Queue()
        self.store = self.make(NEVER_S)

    def make(self, interval_s: float, tests: Path | None = None) -> PolicyStore:
        settings = PolicySettings(file=self.file, tests=tests, reload_interval_s=interval_s)
        self.store = PolicyStore(settings, self.events.put_nowait)
        return self.store

    async def event(self) -> PolicyEvent:
        return await asyncio.wait_for(self.events.get(), 10)

    def allowed(self, model: str = "x") -> bool:
        return self.store.current.decide(who(), f"model/{model}", "generate").allowed

    async def refused(self) -> list[str]:
        """Reload, which must fail and report the same once."""
        with pytest.raises(PolicyError) as caught:
            await self.store.reload()
        event = self.events.get_nowait()
        assert (event.kind, event.problems) == ("rejected", caught.value.problems)
        assert self.store.last_error == event.problems
        assert event.version == self.store.current.version
        return [str(problem) for problem in event.problems]


def rename_into(file: Path, text: str) -> None:
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(file)
