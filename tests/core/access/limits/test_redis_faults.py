"""What happens to limits while Redis is away, slow, read-only or emptied, and settings that cannot work."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.access.limits.limiting import eventually, key, limiter_on, refusal, refused_kind, tenant
from inferflux_core.access.limits.quotas import Demand, Limiter, make_limiter
from inferflux_core.access.limits.redis_script import RedisScript, StoreDown
from inferflux_core.errors import AccessUnavailableError, ConfigError, RateLimitError
from inferflux_core.settings import Limits, LimitSettings
from redis_server import RedisServer, running_redis

NOWHERE = "redis://:hunter2@127.0.0.1:1/0"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


async def works_in_redis(limiter: Limiter, server: RedisServer) -> bool:
    """Whether a request is counted in Redis now."""
    before = server.client.hget("{inferflux}:key:probe", "requests")
    await (await limiter.acquire([Demand("key:probe", Limits(rpm=100_000))], "demo")).settle(0)
    return server.client.hget("{inferflux}:key:probe", "requests") not in (before, None)


# --- faults -----------------------------------------------------------------------------------------------------------


async def test_a_forgotten_script_is_loaded_again(redis: RedisServer) -> None:
    events: Counter[str] = Counter()
    async with limiter_on(redis.url, events=events) as limiter:
        lease = await limiter.acquire([key(rpm=2)], "demo")
        redis.client.script_flush()
        await lease.settle(0)
        redis.client.script_flush()
        await limiter.acquire([key(rpm=2)], "demo")
        assert await refused_kind(limiter.acquire([key(rpm=2)], "demo")) == "requests"
    assert not events


async def test_after_a_flush_counting_begins_anew_and_goes_on(redis: RedisServer) -> None:
    events: Counter[str] = Counter()
    demands = [key(rpm=2, tpm=100, concurrency=2, daily_tokens=200)]
    async with limiter_on(redis.url, events=events) as limiter:
        lease = await limiter.acquire(demands, "demo")
        await lease.reserve_tokens(100)
        redis.client.flushall()
        await lease.settle(40)
        assert redis.client.hget("{inferflux}:key:k1", "day_tokens") == "40"
        first, _ = await limiter.acquire(demands, "demo"), await limiter.acquire(demands, "demo")
        assert await refused_kind(limiter.acquire(demands, "demo")) == "requests"
        await first.reserve_tokens(100)
        assert await refused_kind(first.reserve_tokens(50)) == "tokens"
    assert not events


async def test_while_redis_is_away_each_replica_counts_its_part(redis: RedisServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="inferflux.limits")
    events: Counter[str] = Counter()
    demands = [key(rpm=10, tpm=60, daily_tokens=50, concurrency=2)]
    async with limiter_on(redis.url, events=events, replicas=3) as limiter:
        running = await limiter.acquire([key(tpm=60)], "demo")
        await running.reserve_tokens(30)
        redis.stop()
        with pytest.raises(RateLimitError, match="20 tokens a minute"):
            await running.reserve_tokens(21)
        await running.reserve_tokens(20)
        assert running.headers["x-ratelimit-limit-tokens"] == "20"
        await running.settle(20)
        passed = [await refusal(limiter.acquire([key(rpm=10)], "demo")) for _ in range(20)]
        assert passed.count(None) == 3
        assert await refused_kind(limiter.acquire(demands, "demo")) == "requests"
        lease = await limiter.acquire([tenant(concurrency=2)], "demo")
        assert await refused_kind(limiter.acquire([tenant(concurrency=2)], "demo")) == "concurrency"
        assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1, "one line in ten seconds"
        assert "each limit divided by limits.replicas (3)" in caplog.text
        redis.start()
        await eventually(lambda: works_in_redis(limiter, redis))
        await lease.settle(0)
    assert events["store_recovered"] >= 1
    assert events["store_error"] >= 1
    assert events["counted_locally"] == 25
    assert caplog.text.count("can be used for limits again") == 1


async def test_deny_answers_503_and_comes_back(redis: RedisServer) -> None:
    async with limiter_on(redis.url, on_store_error="deny") as limiter:
        lease = await limiter.acquire([key(tpm=10)], "demo")
        redis.stop()
        with pytest.raises(AccessUnavailableError) as caught:
            await lease.reserve_tokens(1)
        assert (caught.value.status, caught.value.code, caught.value.headers) == (
            503,
            "limits_unavailable",
            {"Retry-After": "1"},
        )
        with pytest.raises(AccessUnavailableError):
            await limiter.acquire([key(tpm=10)], "demo")
        await lease.settle(1)
        redis.start()

        async def is_back() -> bool:
            try:
                return await works_in_redis(limiter, redis)
            except AccessUnavailableError:
                return False

        await eventually(is_back)


async def test_allow_allows() -> None:
    events: Counter[str] = Counter()
    async with limiter_on(NOWHERE, events=events, on_store_error="allow") as limiter:
        for _ in range(5):
            lease = await limiter.acquire([key(rpm=1, tpm=1)], "demo")
            await lease.reserve_tokens(1000)
            await lease.settle(5)
    assert events["allowed"] == 5


async def test_a_replica_that_became_read_only_is_no_store(redis: RedisServer) -> None:
    events: Counter[str] = Counter()
    async with limiter_on(redis.url, events=events) as limiter:
        lease = await limiter.acquire([tenant(concurrency=1)], "demo")
        redis.client.replicaof("127.0.0.1", "1")
        await limiter.acquire([tenant(concurrency=1)], "demo")
        assert await refused_kind(limiter.acquire([tenant(concurrency=1)], "demo")) == "concurrency"
        assert events["counted_locally"] == 2
        await lease.settle(0)
        redis.client.replicaof("NO", "ONE")
        await eventually(lambda: works_in_redis(limiter, redis))
        # The slot that could not be given back is free now.

        async def is_free() -> bool:
            return redis.client.zcard("{inferflux}:tenant:acme:leases") == 0

        await eventually(is_free)


async def test_a_redis_that_hangs_costs_one_short_wait(redis: RedisServer) -> None:
    """Of 200 requests those that ask wait; the others are told at once. What they may have taken is given back."""
    events: Counter[str] = Counter()
    async with limiter_on(redis.url, events=events, timeout=0.1) as limiter:
        await limiter.acquire([tenant(concurrency=1)], "demo")
        clock = asyncio.get_running_loop().time
        with redis.frozen():
            begun = clock()
            results = await asyncio.gather(*(refused_kind(limiter.acquire([key(rpm=10)], "demo")) for _ in range(200)))
            assert clock() - begun < 3
        assert results.count(None) == 10
        assert events["store_error"] <= 40
        await eventually(lambda: works_in_redis(limiter, redis))

        async def is_free() -> bool:
            return redis.client.zcard("{inferflux}:key:k1:leases") == 0

        await eventually(is_free)


async def test_data_of_another_kind_is_an_error_not_a_yes(redis: RedisServer) -> None:
    redis.client.set("{inferflux}:key:k1", "not a hash")
    async with limiter_on(redis.url, on_store_error="deny") as limiter:
        with pytest.raises(AccessUnavailableError):
            await limiter.acquire([key(rpm=1)], "demo")


async def test_nothing_is_asked_after_close(redis: RedisServer) -> None:
    before = asyncio.all_tasks()
    async with limiter_on(redis.url) as limiter:
        lease = await limiter.acquire([key(rpm=5)], "demo")
    await lease.settle(0)
    assert asyncio.all_tasks() == before
    await eventually(lambda: asyncio.sleep(0, len(redis.client.client_list()) == 1))


# --- how often Redis is asked and the log written ---------------------------------------------------------------------


async def test_a_redis_that_is_away_is_asked_once_a_second_and_logged_every_ten(caplog: pytest.LogCaptureFixture) -> None:
    events: list[str] = []
    now = 100.0
    script = RedisScript(NOWHERE, "return {}", on_event=events.append, meanwhile="waiting", clock=lambda: now)
    asked = []
    for _ in range(201):
        with pytest.raises(StoreDown) as caught:
            await script.run([], [])
        asked.append(caught.value.asked)
        now += 0.125
    await script.close()
    assert asked == ([True] + [False] * 7) * 25 + [True]
    assert events == ["store_error"] * 26
    assert [record.getMessage().rpartition(".)")[2] for record in caplog.records] == [
        "; waiting",
        ", 9 more failures since the last such line; waiting",
        ", 9 more failures since the last such line; waiting",
    ]


async def test_only_one_call_tries_whether_redis_is_back(redis: RedisServer) -> None:
    now = 100.0
    events: list[str] = []
    script = RedisScript(redis.url, "return {'1'}", on_event=events.append, meanwhile="", timeout=5, clock=lambda: now)
    redis.stop()
    with pytest.raises(StoreDown):
        await script.run([], [])
    redis.start()
    now += 1
    results = await asyncio.gather(*(script.run([], []) for _ in range(10)), return_exceptions=True)
    assert [isinstance(result, StoreDown) for result in results] == [False] + [True] * 9
    assert await script.run([], []) == [b"1"]
    await script.close()
    assert events == ["store_error", "store_recovered"]


# --- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "limits.redis_url is not set"),
        ({"redis_url": "http://:hunter2@host"}, "is not a URL of Redis"),
        ({"redis_url": "redis://:hunter2@host:port"}, "is not a URL of Redis"),
        ({"redis_url": "redis://host", "redis_prefix": "a{b"}, r"limits.redis_prefix is 'a\{b'"),
    ],
)
def test_settings_that_cannot_work(options: dict[str, str], message: str) -> None:
    settings = LimitSettings.model_validate({"store": "redis", **options})
    with pytest.raises(ConfigError, match=message) as caught:
        make_limiter(settings, lambda event: None)
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ConfigError, match=r"pip install 'inferflux-core\[redis\]'"):
        make_limiter(LimitSettings.model_validate({"store": "redis", "redis_url": NOWHERE}), lambda event: None)


async def test_the_password_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with limiter_on(NOWHERE) as limiter:
        await limiter.acquire([key(rpm=1)], "demo")
    assert "Redis cannot be used" in caplog.text
    assert "hunter2" not in caplog.text
