"""Attacks and faults 55 to 58 on quotas, at the level of the limiters; through the front door in the tests of the server."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.access.limits.limiting import NOON, Clocks, key, refused_kind, tenant
from inferflux_core.access.limits.quotas import Demand
from inferflux_core.access.limits.redis_limiter import RedisLimiter
from inferflux_core.errors import RateLimitError
from inferflux_core.settings import Limits, LimitSettings
from redis_server import running_redis

# A replica: a server process of its own that asks for its share of 1,000 requests when it is told to, all at one time.
REPLICA = """
import asyncio, json, sys
from inferflux_core.access.limits.quotas import Demand, make_limiter
from inferflux_core.access.limits.redis_limiter import RedisLimiter
from inferflux_core.settings import Limits, LimitSettings

async def main(url, count):
    events = []
    limiter = RedisLimiter(LimitSettings(store="redis", redis_url=url), events.append, lease_seconds=600, timeout=10)
    await (await limiter.acquire([Demand("key:warm-up", Limits(rpm=10**6))], "demo")).settle(0)
    print("ready", flush=True)
    sys.stdin.readline()
    demands = [Demand("key:k1", Limits(rpm=10)), Demand("tenant:acme", Limits(rpm=60, concurrency=100))]
    results = await asyncio.gather(*(limiter.acquire(demands, "demo") for _ in range(count)), return_exceptions=True)
    await limiter.close()
    names = [type(result).__name__ for result in results]
    print(json.dumps({"kinds": {name: names.count(name) for name in set(names)}, "events": events}), flush=True)

asyncio.run(main(sys.argv[1], int(sys.argv[2])))
"""


# --- 55: 1,000 parallel requests at limit 10 --------------------------------------------------------------------------


async def test_55_exactly_ten_of_a_thousand_pass_in_one_process() -> None:
    limiter = Clocks().limiter()
    demands = [tenant(rpm=500, concurrency=100), key(rpm=10)]
    results = await asyncio.gather(*(refused_kind(limiter.acquire(demands, "demo")) for _ in range(1000)))
    assert (results.count(None), results.count("requests")) == (10, 990)
    lease = await limiter.acquire([tenant(rpm=500, concurrency=100)], "demo")
    assert lease.headers["x-ratelimit-remaining-requests"] == "489", "990 refusals used nothing of the tenant's"


def test_55_exactly_ten_of_a_thousand_pass_over_three_replicas(tmp_path: Path) -> None:
    with running_redis(tmp_path) as redis:
        replicas = [
            subprocess.Popen(
                [sys.executable, "-c", REPLICA, redis.url, str(count)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            for count in (334, 333, 333)
        ]
        try:
            for replica in replicas:
                assert replica.stdout is not None
                assert replica.stdout.readline() == "ready\n"
            begun = time.monotonic()
            for replica in replicas:
                assert replica.stdin is not None
                replica.stdin.write("go\n")
                replica.stdin.flush()
            answers = [json.loads(replica.communicate(timeout=60)[0]) for replica in replicas]
            seconds = time.monotonic() - begun
        finally:
            for replica in replicas:
                replica.kill()
                replica.communicate()
        assert [answer["events"] for answer in answers] == [[], [], []]
        passed = sum(answer["kinds"].get("_RedisLease", 0) for answer in answers)
        assert 10 <= passed <= 10 + seconds // 6, "ten, and one more every six seconds if this machine is that slow"
        assert sum(answer["kinds"].get("RateLimitError", 0) for answer in answers) == 1000 - passed
        assert float(redis.client.hget("{inferflux}:tenant:acme", "requests") or 0) <= passed, "990 refusals used nothing"


# --- 56: a reservation is returned, however the request ends ----------------------------------------------------------


@pytest.mark.parametrize("end", ["error", "disconnect", "block"])
async def test_56_a_reservation_is_returned(end: str) -> None:
    """As the pipeline does it: settle in `finally`, with what was used until then."""
    limiter, demands = Clocks().limiter(), [key(tpm=1000, concurrency=1, daily_tokens=1000)]
    begun = asyncio.Event()

    async def request() -> None:
        lease = await limiter.acquire(demands, "demo")
        used = 0
        try:
            await lease.reserve_tokens(1000)
            used = 10
            begun.set()
            if end == "error":
                raise OSError
            if end == "block":
                return
            await asyncio.Event().wait()
        finally:
            await lease.settle(used)

    task = asyncio.create_task(request())
    await begun.wait()
    if end == "disconnect":
        task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    lease = await limiter.acquire(demands, "demo")
    await lease.reserve_tokens(990)


async def test_56_a_crash_returns_it_by_lease(tmp_path: Path) -> None:
    crash = REPLICA.replace('print("ready", flush=True)', "import os, signal").replace(
        "sys.stdin.readline()",
        'lease = await limiter.acquire([Demand("tenant:acme", Limits(concurrency=1, daily_tokens=50))], "demo")\n'
        "    await lease.reserve_tokens(50)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)",
    )
    crash = crash.replace("lease_seconds=600", "lease_seconds=1.0")
    with running_redis(tmp_path) as redis:
        command = [sys.executable, "-c", crash, redis.url, "0"]
        process = await asyncio.create_subprocess_exec(*command)
        assert await process.wait() == -9
        settings = LimitSettings.model_validate({"store": "redis", "redis_url": redis.url})
        limiter = RedisLimiter(settings, lambda event: None, lease_seconds=600, timeout=5)
        demands = [Demand("tenant:acme", Limits(concurrency=1, daily_tokens=50))]
        try:
            assert redis.client.zcard("{inferflux}:tenant:acme:leases") == 1, "it died with a slot"
            async with asyncio.timeout(10):
                while await refused_kind(limiter.acquire(demands, "demo")) is not None:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
            assert redis.client.hget("{inferflux}:tenant:acme", "day_tokens") == "0"
        finally:
            await limiter.close()


# --- 57: clocks; Redis's faults are in core/access/limits/test_redis_limiter.py -----------------------------------------------


@pytest.mark.parametrize("step", [-3600.0, -60.0, -0.5])
async def test_57_a_clock_that_steps_back_gives_nothing(step: float) -> None:
    clocks = Clocks()
    limiter, demands = clocks.limiter(), [key(rpm=5)]
    for _ in range(5):
        await limiter.acquire(demands, "demo")
    for _ in range(100):
        clocks.tick(step)
        assert await refused_kind(limiter.acquire(demands, "demo")) == "requests"
    clocks.tick(12)
    await limiter.acquire(demands, "demo")  # nor does it take anything


async def test_57_a_clock_that_steps_forward_gives_one_burst() -> None:
    clocks = Clocks()
    limiter, demands = clocks.limiter(), [key(rpm=5, tpm=50)]
    lease = await limiter.acquire(demands, "demo")
    await lease.reserve_tokens(50)
    clocks.monotonic += 1e9
    results = [await refused_kind(limiter.acquire(demands, "demo")) for _ in range(50)]
    assert results.count(None) == 5


async def test_57_a_clock_that_trembles_at_midnight_starts_the_day_once() -> None:
    clocks = Clocks()
    clocks.wall = NOON + 43_199.9
    limiter, demands, passed = clocks.limiter(), [key(daily_tokens=10)], 0
    for turn in range(100):
        try:
            lease = await limiter.acquire(demands, "demo")
            await lease.reserve_tokens(10)
        except RateLimitError as error:
            assert error.kind == "daily_tokens"  # noqa: PT017
        else:
            await lease.settle(10)
            passed += 1
        clocks.wall += 0.2 if turn % 2 == 0 else -0.2
    assert passed == 2, "yesterday's quota and today's"


async def test_57_a_clock_set_years_ahead_and_back_does_not_lock_out_for_years() -> None:
    clocks = Clocks()
    limiter, demands = clocks.limiter(), [key(daily_tokens=10)]
    clocks.wall += 3650 * 86_400
    lease = await limiter.acquire(demands, "demo")
    await lease.reserve_tokens(10)
    await lease.settle(10)
    clocks.wall = NOON
    assert await refused_kind(limiter.acquire(demands, "demo")) == "daily_tokens", "what was used stays used"
    clocks.wall = NOON + 86_400
    await limiter.acquire(demands, "demo")


# --- 58: tokens run out while a stream runs ---------------------------------------------------------------------------


async def test_58_a_reserved_stream_finishes_and_the_next_request_waits() -> None:
    clocks = Clocks()
    limiter, demands = clocks.limiter(), [Demand("key:k1", Limits(tpm=100))]
    stream = await limiter.acquire(demands, "demo")
    await stream.reserve_tokens(100)
    assert await refused_kind(limiter.acquire(demands, "demo")) == "tokens"
    clocks.tick(30)
    late = await limiter.acquire(demands, "demo")
    assert await refused_kind(late.reserve_tokens(51)) == "tokens"
    await late.settle(0)
    await stream.settle(170)  # it drew more than it had reserved and was never cut off
    assert await refused_kind(limiter.acquire(demands, "demo")) == "tokens"
    clocks.tick(12.6)
    await limiter.acquire(demands, "demo")
