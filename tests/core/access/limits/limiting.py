"""What tests of limits need: clocks that are moved by hand, demands in a few letters, and what a refusal said."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from inferflux_core.access.limits.local import LocalLimiter
from inferflux_core.access.limits.quotas import Demand
from inferflux_core.access.limits.redis_limiter import EVENTS, RedisLimiter
from inferflux_core.errors import RateLimitError
from inferflux_core.settings import Limits, LimitSettings

NOON = 20_000 * 86_400 + 43_200.0
"""A Unix time at noon (UTC)."""


class Clocks:
    """A monotonic and a wall clock in seconds. `tick` moves both; either can be set by itself."""

    def __init__(self) -> None:
        self.monotonic = 1000.0
        self.wall = NOON

    def tick(self, seconds: float) -> None:
        self.monotonic += seconds
        self.wall += seconds

    def limiter(self) -> LocalLimiter:
        return LocalLimiter(monotonic=lambda: self.monotonic, wall=lambda: self.wall)


def key(**limits: int) -> Demand:
    return Demand("key:k1", Limits(**limits))


def tenant(**limits: int) -> Demand:
    return Demand("tenant:acme", Limits(**limits))


def model(**limits: int) -> Demand:
    return Demand("model:demo", Limits(**limits))


async def refusal(attempt: Awaitable[object]) -> RateLimitError | None:
    """The 429 that something ended in; None if it was let through."""
    try:
        await attempt
    except RateLimitError as error:
        return error
    return None


async def refused_kind(attempt: Awaitable[object]) -> str | None:
    error = await refusal(attempt)
    return None if error is None else error.kind


async def eventually(condition: Callable[[], Awaitable[bool]], seconds: float = 10.0) -> None:
    """Ask until something that another process does has happened; fails after `seconds`."""
    async with asyncio.timeout(seconds):
        while not await condition():  # noqa: ASYNC110  # it happens in another process
            await asyncio.sleep(0.01)


@asynccontextmanager
async def limiter_on(
    url: str, *, events: Counter[str] | None = None, lease_seconds: float = 600.0, timeout: float = 5.0, **options: object
) -> AsyncIterator[RedisLimiter]:
    """A limiter that asks again 10 ms after a failure, and by default is patient with a busy machine."""
    settings = LimitSettings.model_validate({"store": "redis", "redis_url": url, **options})
    count = Counter() if events is None else events
    limiter = RedisLimiter(
        settings, lambda event: count.update([event]), lease_seconds=lease_seconds, timeout=timeout, retry_seconds=0.01
    )
    await limiter.start()
    try:
        yield limiter
    finally:
        await limiter.close()
        assert set(count) <= set(EVENTS)
