"""Failed authentications by client address."""

from __future__ import annotations

import pytest

from inferflux_core.access.limits.failures import FailureLimit
from inferflux_core.errors import RateLimitError


class Watch:
    def __init__(self) -> None:
        self.now = 50.0

    def limit(self, per_minute: int = 20, max_addresses: int = 100) -> FailureLimit:
        return FailureLimit(per_minute, max_addresses=max_addresses, monotonic=lambda: self.now)


def is_refused(limit: FailureLimit, address: str | None) -> bool:
    try:
        limit.check(address)
    except RateLimitError as error:
        return error.kind == "failures"
    return False


def test_twenty_a_minute_then_one_every_three_seconds() -> None:
    watch = Watch()
    limit = watch.limit()
    for _ in range(20):
        limit.check("192.0.2.1")
        limit.failed("192.0.2.1")
    with pytest.raises(RateLimitError) as caught:
        limit.check("192.0.2.1")
    assert (caught.value.status, caught.value.code, caught.value.headers) == (429, "rate_limit_exceeded", {"Retry-After": "3"})
    limit.check("192.0.2.2")
    watch.now += 3
    limit.check("192.0.2.1")
    limit.failed("192.0.2.1")
    assert is_refused(limit, "192.0.2.1")


def test_looking_is_no_failure() -> None:
    limit = Watch().limit(1)
    for _ in range(100):
        limit.check("192.0.2.1")
    assert len(limit) == 0


def test_debt_is_bounded() -> None:
    watch = Watch()
    limit = watch.limit(20)
    for _ in range(10_000):
        limit.failed("192.0.2.1")
    watch.now += 62.9
    assert is_refused(limit, "192.0.2.1")
    watch.now += 0.2
    assert not is_refused(limit, "192.0.2.1")


def test_a_clock_that_steps_back_forgives_nothing() -> None:
    watch = Watch()
    limit = watch.limit(1)
    limit.failed("192.0.2.1")
    watch.now -= 1000
    assert is_refused(limit, "192.0.2.1")


@pytest.mark.parametrize(
    ("failing", "asking", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:192.0.2.7", "192.0.2.7", True),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("192.0.2.7", "192.0.2.8", False),
        (None, None, True),
        (None, "not an address", True),
        ("::1", "0.0.0.0", False),
    ],
)
def test_who_counts_as_one_client(failing: str | None, asking: str | None, same: bool) -> None:
    limit = Watch().limit(1)
    limit.failed(failing)
    assert is_refused(limit, asking) is same


def test_memory_is_bounded_and_the_latest_are_kept() -> None:
    limit = Watch().limit(1, max_addresses=3)
    for last in (1, 2, 3, 1, 4):
        limit.failed(f"192.0.2.{last}")
    assert len(limit) == 3
    assert [is_refused(limit, f"192.0.2.{last}") for last in (1, 2, 3, 4)] == [True, False, True, True]
