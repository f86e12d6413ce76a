"""Limits in a real Redis: the same counts as in a process, shared, and given back whatever becomes of a request or a server."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.access.limits.limiting import Clocks, eventually, key, limiter_on, model, refusal, refused_kind, tenant
from inferflux_core.access.limits.quotas import Demand, Lease
from inferflux_core.errors import RateLimitError
from inferflux_core.settings import Limits
from redis_server import RedisServer, running_redis

NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
async def test_redis_counts_as_a_process_does(redis: RedisServer, seed: int) -> None:
    """The same operations on both; the limits are so low that nothing drains while the test runs."""
    dice = random.Random(seed)
    demands = [
        [key(rpm=23, tpm=31, daily_tokens=60), tenant(tpm=25, concurrency=3)],
        [Demand("key:k2", Limits(concurrency=1, rpm=9)), tenant(tpm=25, concurrency=3)],
        [Demand("tenant:other", Limits(concurrency=3)), model(daily_tokens=40)],
        [Demand("key:k3", Limits(rpm=12, concurrency=2, daily_tokens=30))],
    ]
    local = Clocks().limiter()
    seen: Counter[str] = Counter()
    async with limiter_on(redis.url) as remote:
        pairs: list[tuple[Lease, Lease]] = []
        for _ in range(150):
            action = dice.choice(("acquire", "reserve", "settle"))
            if action == "acquire" or not pairs:
                chosen = dice.choice(demands)
                results = await asyncio.gather(
                    local.acquire(chosen, "demo"), remote.acquire(chosen, "demo"), return_exceptions=True
                )
                if isinstance(results[0], Lease) and isinstance(results[1], Lease):
                    pairs.append((results[0], results[1]))
                    assert results[0].headers.keys() == results[1].headers.keys()
                else:
                    assert isinstance(results[0], RateLimitError)
                    assert isinstance(results[1], RateLimitError)
                    assert results[0].kind == results[1].kind
                    seen[results[0].kind] += 1
            elif action == "reserve":
                tokens = dice.randint(0, 12)
                ours, theirs = dice.choice(pairs)
                first = await refused_kind(ours.reserve_tokens(tokens))
                assert first == await refused_kind(theirs.reserve_tokens(tokens))
                seen[first or "reserved"] += 1
            else:
                used = dice.randint(0, 4)
                ours, theirs = pairs.pop(dice.randrange(len(pairs)))
                await ours.settle(used)
                await theirs.settle(used)
        assert len(seen) >= 3, seen
        for ours, theirs in pairs:
            await ours.settle(0)
            await theirs.settle(0)
        leases = [redis.client.zcard(name) for name in redis.client.keys("*:leases")]
        assert sum(leases) == 0


async def test_refusals_and_headers_are_the_same(redis: RedisServer) -> None:
    async with limiter_on(redis.url) as limiter:
        lease = await limiter.acquire([key(rpm=1, tpm=60, daily_tokens=50)], "demo")
        await lease.reserve_tokens(20)
        assert lease.headers == {
            "x-ratelimit-limit-requests": "1",
            "x-ratelimit-remaining-requests": "0",
            "x-ratelimit-reset-requests": lease.headers["x-ratelimit-reset-requests"],
            "x-ratelimit-limit-tokens": "50",
            "x-ratelimit-remaining-tokens": "30",
            "x-ratelimit-reset-tokens": lease.headers["x-ratelimit-reset-tokens"],
        }
        error = await refusal(limiter.acquire([key(rpm=1)], "demo"))
        assert error is not None
        assert error.headers["Retry-After"] == "60"
        await limiter.acquire([tenant(concurrency=1, rpm=2)], "demo")
        for order in (1, -1):
            longest = await refusal(limiter.acquire([tenant(concurrency=1, rpm=2), key(rpm=1)][::order], "demo"))
            assert longest is not None
            assert (longest.kind, longest.headers["Retry-After"]) == ("requests", "60")
        assert error.message == (
            "Too many requests to model 'demo': the limit of this API key is 1 requests a minute. Try again in 60 s."
        )
        daily = await refusal(lease.reserve_tokens(31))
        assert daily is not None
        assert (daily.kind, daily.code) == ("daily_tokens", "insufficient_quota")
        never = await refusal((await limiter.acquire([tenant(tpm=5)], "demo")).reserve_tokens(9))
        assert never is not None
        assert "it can never pass" in never.message


async def test_replicas_share_and_prefixes_do_not(redis: RedisServer) -> None:
    async with limiter_on(redis.url) as one, limiter_on(redis.url) as two, limiter_on(redis.url, redis_prefix="b") as other:
        lease = await one.acquire([tenant(concurrency=1)], "demo")
        assert await refused_kind(two.acquire([tenant(concurrency=1)], "demo")) == "concurrency"
        await other.acquire([tenant(concurrency=1)], "demo")
        await lease.settle(0)
        await two.acquire([tenant(concurrency=1)], "demo")
    names = redis.client.keys("*")
    assert all(name.startswith(("{inferflux}:", "{b}:")) for name in names), "one hash slot for all that a request needs"
    assert all(600 < redis.client.ttl(name) <= 720 for name in names), "what nobody uses is dropped"


async def test_a_request_for_several_answers_takes_as_many_slots(redis: RedisServer) -> None:
    async with limiter_on(redis.url) as one, limiter_on(redis.url) as two:
        lease = await one.acquire([tenant(concurrency=4)], "demo", 3)
        assert await refused_kind(two.acquire([tenant(concurrency=4)], "demo", 2)) == "concurrency"
        last = await two.acquire([tenant(concurrency=4)], "demo", 1)
        await lease.reserve_tokens(5)
        assert await refused_kind(two.acquire([tenant(concurrency=4)], "demo", 1)) == "concurrency"
        await lease.settle(5)
        assert await refused_kind(two.acquire([tenant(concurrency=4)], "demo", 4)) == "concurrency"
        await (await two.acquire([tenant(concurrency=4)], "demo", 3)).settle(0)
        await last.settle(0)
    leases = [name for name in redis.client.keys("*") if name.endswith(":leases")]
    assert [redis.client.zcard(name) for name in leases] == [0] * len(leases)


async def test_a_request_under_no_limit_does_not_ask_redis() -> None:
    events: Counter[str] = Counter()
    async with limiter_on(NOWHERE, events=events, on_store_error="deny") as limiter:
        lease = await limiter.acquire([], "demo")
        await lease.reserve_tokens(10**9)
        await lease.settle(10**9)
        assert lease.headers == {}
    assert not events


# --- leases -----------------------------------------------------------------------------------------------------------


async def test_a_server_that_died_gives_back_its_slots_and_the_days_tokens(redis: RedisServer) -> None:
    demands = [tenant(concurrency=1, daily_tokens=100)]
    async with limiter_on(redis.url, lease_seconds=0.2) as dead, limiter_on(redis.url) as alive:
        lease = await dead.acquire(demands, "demo")
        await lease.reserve_tokens(90)
        # It never settles.

        async def is_free() -> bool:
            return await refusal(alive.acquire(demands, "demo")) is None

        await eventually(is_free)
        assert redis.client.hget("{inferflux}:tenant:acme", "day_tokens") == "0"
        await lease.settle(70)
        assert redis.client.hget("{inferflux}:tenant:acme", "day_tokens") == "70", "it was not dead but slow: charged in full"
        assert await refused_kind(alive.acquire(demands, "demo")) == "concurrency", "the other's slot is its own"


async def test_a_cancelled_request_leaves_no_slot_behind(redis: RedisServer) -> None:
    demands = [tenant(concurrency=1)]
    async with limiter_on(redis.url) as limiter:
        for turns in range(1, 12):
            task = asyncio.create_task(limiter.acquire(demands, "demo"))
            for _ in range(turns):
                await asyncio.sleep(0)
            task.cancel()
            result = (await asyncio.gather(task, return_exceptions=True))[0]
            if isinstance(result, Lease):
                await result.settle(0)

        async def is_free() -> bool:
            return await refusal(limiter.acquire(demands, "demo")) is None

        await eventually(is_free)


async def test_settling_outlives_the_request(redis: RedisServer) -> None:
    demands = [tenant(concurrency=1)]
    async with limiter_on(redis.url) as limiter:
        lease = await limiter.acquire(demands, "demo")
        task = asyncio.create_task(lease.settle(0))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert redis.client.zcard("{inferflux}:tenant:acme:leases") == 0


async def test_a_settlement_that_is_repeated_counts_once(redis: RedisServer) -> None:
    async with limiter_on(redis.url) as limiter:
        lease = await limiter.acquire([key(daily_tokens=100)], "demo")
        await lease.reserve_tokens(50)
        await limiter.settle(lease, 20, 50)  # type: ignore[arg-type]
        limiter.owe(lease, 20, 50)  # type: ignore[arg-type]
    assert redis.client.hget("{inferflux}:key:k1", "day_tokens") == "20"


# --- clocks -----------------------------------------------------------------------------------------------------------


async def test_steps_of_the_servers_clock(redis: RedisServer) -> None:
    """What Redis holds is moved instead of its clock: seen from there it is the same."""
    name, demands = "{inferflux}:key:k1", [key(rpm=2, daily_tokens=10)]

    def moved(field: str, by: float) -> None:
        redis.client.hset(name, field, repr(float(redis.client.hget(name, field) or 0) + by))

    async with limiter_on(redis.url) as limiter:
        lease = await limiter.acquire(demands, "demo")
        await lease.reserve_tokens(10)
        await lease.settle(10)
        await limiter.acquire([key(rpm=2)], "demo")
        moved("at", 3600)  # the clock steps back an hour
        assert await refused_kind(limiter.acquire([key(rpm=2)], "demo")) == "requests"
        moved("at", -30)  # half a minute later
        await limiter.acquire([key(rpm=2)], "demo")
        assert await refused_kind(limiter.acquire([key(rpm=2)], "demo")) == "requests"
        for days in (1, 400):  # back a day, and a year
            moved("day", days)
            assert await refused_kind(limiter.acquire([key(daily_tokens=10)], "demo")) == "daily_tokens"
        moved("day", -1)
        await limiter.acquire([key(daily_tokens=10)], "demo")
