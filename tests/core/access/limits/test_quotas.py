"""Whose quotas a request is under, how they are used up and come back, and what the caller is told. Counted in this process."""

from __future__ import annotations

import pytest

from core.access.limits.limiting import NOON, Clocks, key, model, refusal, refused_kind, tenant
from inferflux_core.access.limits.headers import go_duration
from inferflux_core.access.limits.local import LocalLimiter
from inferflux_core.access.limits.quotas import Demand, LimitRules, make_limiter
from inferflux_core.errors import RateLimitError
from inferflux_core.identity import Principal
from inferflux_core.settings import Limits, LimitSettings, LimitTable

# --- rules ------------------------------------------------------------------------------------------------------------

TABLE = LimitTable(
    default=Limits(rpm=10, max_tokens=500),
    tenants={"acme": Limits(tpm=1000, max_tokens=300), "*": Limits(rpm=7)},
    models={"big": Limits(concurrency=2, max_tokens=400), "free": Limits()},
)


def test_a_request_is_under_the_quotas_of_its_key_its_tenant_and_its_model() -> None:
    rules = LimitRules(TABLE)
    alice = Principal(subject="key:a", tenant="acme", limits=Limits(rpm=3))
    assert rules.demands(alice, "big") == (
        Demand("key:a", Limits(rpm=3)),
        Demand("tenant:acme", TABLE.tenants["acme"]),
        Demand("model:big", TABLE.models["big"]),
    )
    assert rules.max_tokens(alice, "big") == 300


def test_default_and_star_stand_for_those_that_are_not_named() -> None:
    rules = LimitRules(TABLE)
    bob = Principal(subject="user:idp|bob", tenant="other")
    assert rules.demands(bob, "free") == (Demand("user:idp|bob", TABLE.default), Demand("tenant:other", Limits(rpm=7)))
    assert rules.max_tokens(bob, "free") == 500


def test_what_limits_nothing_demands_nothing() -> None:
    rules = LimitRules(LimitSettings())
    assert rules.demands(Principal(limits=Limits(max_tokens=5)), "demo") == ()
    assert rules.max_tokens(Principal(), "demo") is None


def test_rules_are_replaced_as_a_whole() -> None:
    rules = LimitRules(LimitSettings(default=Limits(rpm=1), models={"*": Limits(rpm=2)}))
    assert len(rules.demands(Principal(), "demo")) == 2
    rules.replace(LimitTable(tenants={"default": Limits(tpm=9)}))
    assert rules.demands(Principal(), "demo") == (Demand("tenant:default", Limits(tpm=9)),)


@pytest.mark.parametrize("subject", ["tenant:acme", "model:demo", "principal:tenant:acme"])
def test_no_principal_is_counted_as_a_tenant_or_a_model(subject: str) -> None:
    rules = LimitRules(LimitTable(default=Limits(rpm=1)))
    assert rules.demands(Principal(subject=subject), "x")[0].subject == f"principal:{subject}"


def test_memory_is_the_default_store() -> None:
    assert isinstance(make_limiter(LimitSettings(), lambda event: None), LocalLimiter)


# --- requests ---------------------------------------------------------------------------------------------------------


async def test_a_minutes_requests_may_come_at_once_and_then_one_at_a_time() -> None:
    clocks = Clocks()
    limiter, demands = clocks.limiter(), [key(rpm=10)]
    for _ in range(10):
        await (await limiter.acquire(demands, "demo")).settle(0)
    error = await refusal(limiter.acquire(demands, "demo"))
    assert error is not None
    assert (error.kind, error.code, error.status, error.retry_after) == ("requests", "rate_limit_exceeded", 429, 6.0)
    clocks.tick(5.99)
    assert await refused_kind(limiter.acquire(demands, "demo")) == "requests"
    clocks.tick(0.01)
    await limiter.acquire(demands, "demo")
    assert await refused_kind(limiter.acquire(demands, "demo")) == "requests"


@pytest.mark.parametrize("rpm", [1, 3, 7, 11, 999])
async def test_the_time_in_retry_after_is_enough(rpm: int) -> None:
    clocks = Clocks()
    limiter, demands = clocks.limiter(), [key(rpm=rpm)]
    for _ in range(3 * rpm):
        if (error := await refusal(limiter.acquire(demands, "demo"))) is not None:
            assert error.retry_after is not None
            clocks.tick(error.retry_after)
            await limiter.acquire(demands, "demo")


async def test_a_refused_request_uses_nothing_of_any_quota() -> None:
    clocks = Clocks()
    limiter = clocks.limiter()
    held = await limiter.acquire([model(concurrency=1)], "demo")
    for _ in range(20):
        assert await refused_kind(limiter.acquire([key(rpm=1, concurrency=1), model(concurrency=1)], "demo")) == "concurrency"
    await held.settle(0)
    await limiter.acquire([key(rpm=1, concurrency=1), model(concurrency=1)], "demo")


async def test_refused_tokens_are_taken_from_no_quota() -> None:
    limiter = Clocks().limiter()
    lease = await limiter.acquire([key(tpm=100, daily_tokens=100), tenant(tpm=50)], "demo")
    assert await refused_kind(lease.reserve_tokens(60)) == "tokens"
    await lease.reserve_tokens(50)
    await lease.settle(50)
    lease = await limiter.acquire([key(tpm=100, daily_tokens=100)], "demo")
    await lease.reserve_tokens(50)


async def test_a_slot_is_free_again_when_its_request_is_settled_once() -> None:
    limiter, demands = Clocks().limiter(), [tenant(concurrency=2)]
    first, second = await limiter.acquire(demands, "demo"), await limiter.acquire(demands, "demo")
    error = await refusal(limiter.acquire(demands, "demo"))
    assert error is not None
    assert (error.kind, error.retry_after) == ("concurrency", 1.0)
    await first.settle(0)
    await first.settle(0)
    await limiter.acquire(demands, "demo")
    assert await refused_kind(limiter.acquire(demands, "demo")) == "concurrency"
    await second.settle(0)


@pytest.mark.parametrize("tenant_first", [True, False])
async def test_of_several_quotas_the_one_with_the_longest_wait_is_told(tenant_first: bool) -> None:
    limiter, demands = Clocks().limiter(), [key(rpm=2), tenant(rpm=1), model(concurrency=1)]
    await limiter.acquire([key(rpm=2)], "demo")
    await limiter.acquire(demands, "demo")
    error = await refusal(limiter.acquire([demands[1], demands[0], demands[2]] if tenant_first else demands, "demo"))
    assert error is not None
    assert (error.kind, error.retry_after) == ("requests", 60.0)
    assert "tenant 'acme'" in error.message


@pytest.mark.parametrize(("used", "kind", "wait"), [(10, "requests", 30.0), (20, "tokens", 66.0)])
async def test_of_several_kinds_the_one_with_the_longest_wait_is_told(used: int, kind: str, wait: float) -> None:
    limiter, demands = Clocks().limiter(), [key(rpm=2, tpm=10, concurrency=2)]
    await limiter.acquire(demands, "demo")
    lease = await limiter.acquire(demands, "demo")
    await lease.reserve_tokens(10)
    await lease.settle(used)
    error = await refusal(limiter.acquire(demands, "demo"))
    assert error is not None
    assert (error.kind, error.retry_after) == (kind, wait)


# --- tokens -----------------------------------------------------------------------------------------------------------


async def tokens_left(limiter: LocalLimiter, demand: Demand) -> int:
    return int((await limiter.acquire([demand], "demo")).headers["x-ratelimit-remaining-tokens"])


async def test_what_was_reserved_and_not_used_is_given_back() -> None:
    limiter, demand = Clocks().limiter(), key(tpm=1000, daily_tokens=5000)
    lease = await limiter.acquire([demand], "demo")
    await lease.reserve_tokens(300)
    await lease.reserve_tokens(100)
    assert lease.headers["x-ratelimit-remaining-tokens"] == "600"
    await lease.settle(150)
    await lease.settle(0)
    assert await tokens_left(limiter, demand) == 850
    assert await tokens_left(limiter, key(daily_tokens=5000)) == 4850


async def test_what_was_used_beyond_the_reservation_is_charged_up_to_one_bucket_of_debt() -> None:
    clocks = Clocks()
    limiter, demand = clocks.limiter(), key(tpm=600)
    lease = await limiter.acquire([demand], "demo")
    await lease.reserve_tokens(100)
    await lease.settle(1_000_000)
    error = await refusal(limiter.acquire([demand], "demo"))
    assert error is not None
    assert (error.kind, error.retry_after) == ("tokens", 60.1), "one bucket of debt, and a token"
    clocks.tick(60.1)
    assert await tokens_left(limiter, demand) == 1


async def test_a_refund_never_makes_more_than_a_full_bucket() -> None:
    clocks = Clocks()
    limiter, demand = clocks.limiter(), key(tpm=600, daily_tokens=10_000)
    lease = await limiter.acquire([demand], "demo")
    await lease.reserve_tokens(600)
    clocks.tick(3600)
    await lease.settle(-5)
    assert await tokens_left(limiter, demand) == 600
    lease = await limiter.acquire([demand], "demo")
    assert await refused_kind(lease.reserve_tokens(601)) == "tokens"


async def test_a_reservation_that_can_never_pass_says_so() -> None:
    lease = await Clocks().limiter().acquire([key(tpm=1000)], "demo")
    error = await refusal(lease.reserve_tokens(1500))
    assert error is not None
    assert error.code == "rate_limit_exceeded"
    assert error.message == (
        "This request to model 'demo' needs 1500 tokens (prompt and answer), and the limit of this API key is 1000 tokens a "
        "minute: it can never pass. Shorten the prompt or lower max_tokens."
    )


async def test_nothing_is_reserved_for_a_request_that_has_ended() -> None:
    lease = await Clocks().limiter().acquire([key(tpm=10)], "demo")
    await lease.settle(0)
    with pytest.raises(RuntimeError, match="settled"):
        await lease.reserve_tokens(1)


# --- the day ----------------------------------------------------------------------------------------------------------


async def test_a_days_tokens_come_back_at_midnight_utc() -> None:
    clocks = Clocks()
    limiter, demand = clocks.limiter(), key(daily_tokens=100)
    lease = await limiter.acquire([demand], "demo")
    await lease.reserve_tokens(100)
    await lease.settle(100)
    clocks.tick(43_199)
    error = await refusal(limiter.acquire([demand], "demo"))
    assert error is not None
    assert (error.kind, error.code, error.retry_after) == ("daily_tokens", "insufficient_quota", 1.0)
    assert error.headers["x-should-retry"] == "false"
    clocks.tick(1)
    assert await tokens_left(limiter, demand) == 100


async def test_what_was_reserved_yesterday_is_not_given_back_to_today() -> None:
    clocks = Clocks()
    limiter, demand = clocks.limiter(), key(daily_tokens=100)
    night = await limiter.acquire([demand], "demo")
    await night.reserve_tokens(90)
    clocks.tick(43_200)
    morning = await limiter.acquire([demand], "demo")
    await morning.reserve_tokens(60)
    await night.settle(10)
    assert await tokens_left(limiter, demand) == 40
    await morning.settle(70)
    assert await tokens_left(limiter, demand) == 30


# --- memory -----------------------------------------------------------------------------------------------------------


async def test_subjects_that_use_nothing_are_forgotten() -> None:
    clocks = Clocks()
    limiter, limits = clocks.limiter(), Limits(rpm=5, daily_tokens=100)
    held = await limiter.acquire([Demand("key:held", limits)], "demo")
    thrifty = await limiter.acquire([Demand("key:thrifty", limits)], "demo")
    await thrifty.reserve_tokens(100)
    await thrifty.settle(100)
    for number in range(1000):
        await (await limiter.acquire([Demand(f"key:{number}", limits)], "demo")).settle(0)
    assert len(limiter) == 1002
    clocks.tick(121)
    for _ in range(1002):
        await (await limiter.acquire([Demand("key:busy", Limits(rpm=10_000))], "demo")).settle(0)
    assert len(limiter) == 3, "the busy one, the one with a request running, and the one with tokens of today"
    assert await refused_kind(limiter.acquire([Demand("key:thrifty", limits)], "demo")) == "daily_tokens"
    await held.settle(0)


# --- what the caller is told ------------------------------------------------------------------------------------------


async def test_headers_are_of_the_tightest_quota() -> None:
    clocks = Clocks()
    limiter = clocks.limiter()
    lease = await limiter.acquire([key(rpm=600, tpm=6000), tenant(rpm=4, tpm=60_000)], "demo")
    await lease.reserve_tokens(1000)
    assert lease.headers == {
        "x-ratelimit-limit-requests": "4",
        "x-ratelimit-remaining-requests": "3",
        "x-ratelimit-reset-requests": "15s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5000",
        "x-ratelimit-reset-tokens": "10s",
    }


async def test_headers_only_for_what_is_limited() -> None:
    limiter = Clocks().limiter()
    assert (await limiter.acquire([], "demo")).headers == {}
    assert (await limiter.acquire([key(concurrency=3)], "demo")).headers == {}
    assert set((await limiter.acquire([tenant(daily_tokens=9)], "demo")).headers.items()) == {
        ("x-ratelimit-limit-tokens", "9"),
        ("x-ratelimit-remaining-tokens", "9"),
        ("x-ratelimit-reset-tokens", "12h0m0s"),
    }


async def test_what_others_use_of_a_model_is_not_told() -> None:
    limiter = Clocks().limiter()
    await limiter.acquire([Demand("key:other", Limits(rpm=99)), model(rpm=2, tpm=10)], "demo")
    mine = await limiter.acquire([key(rpm=50), model(rpm=2, tpm=10)], "demo")
    assert mine.headers["x-ratelimit-remaining-requests"] == "49"
    assert "x-ratelimit-limit-tokens" not in mine.headers
    error = await refusal(limiter.acquire([key(rpm=50), model(rpm=2, tpm=10)], "demo"))
    assert error is not None
    assert error.headers["x-ratelimit-remaining-requests"] == "49"
    assert error.message == (
        "Too many requests to model 'demo': the limit of model 'demo', for all its users together, is 2 requests a minute. "
        "Try again in 30 s."
    )


async def test_a_refusal_has_the_headers_and_rounds_the_wait_up() -> None:
    clocks = Clocks()
    limiter, demands = clocks.limiter(), [key(rpm=7)]
    for _ in range(7):
        await limiter.acquire(demands, "demo")
    error = await refusal(limiter.acquire(demands, "demo"))
    assert isinstance(error, RateLimitError)
    assert error.headers == {
        "Retry-After": "9",
        "x-ratelimit-limit-requests": "7",
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m0s",
    }


@pytest.mark.parametrize(
    ("subject", "owner"),
    [
        ("key:s3cr3tid", "this API key"),
        ("user:https://idp|bob", "this user"),
        ("anonymous", "callers without a credential together"),
        ("tenant:acme", "tenant 'acme'"),
        ("principal:model:x", "this user"),
    ],
)
async def test_messages_say_whose_limit_it_is(subject: str, owner: str) -> None:
    limiter, demands = Clocks().limiter(), [Demand(subject, Limits(concurrency=1, tpm=10, daily_tokens=5))]
    lease = await limiter.acquire(demands, "demo")
    concurrency = await refusal(limiter.acquire(demands, "demo"))
    daily = await refusal(lease.reserve_tokens(6))
    assert concurrency is not None
    assert daily is not None
    assert concurrency.message == (
        f"Too many requests to model 'demo' at one time: the limit of {owner} is 1 concurrent requests. Wait for one to end."
    )
    assert daily.message == (
        f"Too many tokens today for model 'demo': the quota of {owner} is 5 tokens a day, and this request needs 6 (prompt and "
        "answer). It starts anew at 00:00 UTC; retrying before does not help."
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"), (-1, "0s"), (0.0001, "1ms"), (0.12, "120ms"), (0.9999, "1s"), (1, "1s"), (1.5, "1.5s"), (8.64, "8.64s"),
        (59.9995, "1m0s"), (360, "6m0s"), (3600, "1h0m0s"), (86_399.5, "23h59m59.5s"), (6.0000000001, "6s"),
    ],
)  # fmt: skip
def test_durations_as_go_writes_them(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text


def test_noon_is_noon() -> None:
    assert NOON % 86_400 == 43_200
