"""The in-process limiter against a model that is too simple to be wrong: exact fractions, and one line a rule."""

from __future__ import annotations

from collections.abc import Coroutine
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, rule

from core.access.limits.limiting import Clocks
from inferflux_core.access.limits.quotas import Demand, Lease
from inferflux_core.errors import RateLimitError
from inferflux_core.settings import Limits

T = TypeVar("T")
SUBJECTS = ("key:a", "key:b", "tenant:t")
maybe = st.one_of(st.none(), st.integers(1, 30))
limits = st.builds(Limits, rpm=maybe, tpm=maybe, concurrency=st.one_of(st.none(), st.integers(1, 4)), daily_tokens=maybe)


def now(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run what never waits."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise AssertionError("it waited")


@dataclass
class Modelled:
    """One subject."""

    limits: Limits
    requests: Fraction = Fraction(0)
    tokens: Fraction = Fraction(0)
    running: int = 0
    today: int = 0

    def fits(self, *, request: bool, tokens: int) -> bool:
        own = self.limits
        return not (
            (own.rpm is not None and request and self.requests + 1 > own.rpm)
            or (own.tpm is not None and self.tokens + tokens > own.tpm)
            or (own.concurrency is not None and request and self.running == own.concurrency)
            or (own.daily_tokens is not None and self.today + tokens > own.daily_tokens)
        )

    def charge(self, tokens: int, today: int) -> None:
        if self.limits.tpm is not None:
            self.tokens = min(max(Fraction(0), self.tokens + tokens), Fraction(2 * self.limits.tpm))
        if self.limits.daily_tokens is not None:
            self.today = min(max(0, self.today + today), 2 * self.limits.daily_tokens)


@dataclass(eq=False)
class Held:
    lease: Lease
    subjects: tuple[str, ...]
    reserved: int = 0
    reserved_today: int = 0


class LimiterMachine(RuleBasedStateMachine):
    leases = Bundle("leases")

    @initialize(tables=st.tuples(limits, limits, limits))
    def begin(self, tables: tuple[Limits, ...]) -> None:
        self.clocks = Clocks()
        self.limiter = self.clocks.limiter()
        self.model = dict(zip(SUBJECTS, map(Modelled, tables), strict=True))
        self.held: list[Held] = []

    def demands(self, subjects: tuple[str, ...]) -> list[Demand]:
        return [Demand(subject, self.model[subject].limits) for subject in subjects]

    @rule(target=leases, subjects=st.sampled_from([("key:a", "tenant:t"), ("key:b", "tenant:t"), ("key:a",), ()]))
    def acquire(self, subjects: tuple[str, ...]) -> Held | None:
        mine = [self.model[subject] for subject in subjects]
        expected = all(m.fits(request=True, tokens=1) for m in mine)
        try:
            held = Held(now(self.limiter.acquire(self.demands(subjects), "demo")), subjects)
        except RateLimitError:
            assert not expected
            return None
        assert expected
        for m in mine:
            m.running += 1
            m.requests += 1 if m.limits.rpm is not None else 0
        self.held.append(held)
        return held

    @rule(held=leases, tokens=st.integers(0, 35))
    def reserve(self, held: Held | None, tokens: int) -> None:
        if held is None or held not in self.held:
            return
        mine = [self.model[subject] for subject in held.subjects]
        expected = tokens == 0 or all(m.fits(request=False, tokens=tokens) for m in mine)
        try:
            now(held.lease.reserve_tokens(tokens))
        except RateLimitError:
            assert not expected
            return
        assert expected
        held.reserved += tokens
        held.reserved_today += tokens
        for m in mine:
            m.charge(tokens, tokens)

    @rule(held=leases, used=st.integers(0, 100))
    def settle(self, held: Held | None, used: int) -> None:
        if held is None:
            return
        now(held.lease.settle(used))
        if held not in self.held:  # for the second time
            return
        self.held.remove(held)
        change = used - held.reserved
        for m in (self.model[subject] for subject in held.subjects):
            m.running -= 1
            m.charge(change, max(change, -held.reserved_today))

    @rule(seconds=st.sampled_from([1, 2, 7, 60, 121, 400]))
    def time_passes(self, seconds: int) -> None:
        self.clocks.monotonic += seconds
        for m in self.model.values():
            m.requests = max(Fraction(0), m.requests - Fraction(seconds * (m.limits.rpm or 0), 60))
            m.tokens = max(Fraction(0), m.tokens - Fraction(seconds * (m.limits.tpm or 0), 60))

    @rule()
    def a_day_begins(self) -> None:
        self.clocks.wall += 86_400
        for m in self.model.values():
            m.today = 0
        for held in self.held:
            held.reserved_today = 0

    @rule(second=st.integers(0, 86_399))
    def the_wall_clock_is_set(self, second: int) -> None:
        """Within a day it means nothing."""
        self.clocks.wall += second - self.clocks.wall % 86_400

    @invariant()
    def slots_are_exact(self) -> None:
        for subject, m in getattr(self, "model", {}).items():
            assert m.running == sum(subject in held.subjects for held in self.held)
            assert m.limits.concurrency is None or m.running <= m.limits.concurrency

    def teardown(self) -> None:
        for held in getattr(self, "held", []):
            now(held.lease.settle(0))


TestLimiter = LimiterMachine.TestCase
TestLimiter.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
