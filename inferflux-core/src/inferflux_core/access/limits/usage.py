"""How much of a quota is used: the arithmetic, without a store. `usage.lua` is the same in Redis; tests hold the two together.

A minute's limit is a bucket that each use fills and that drains at the limit's pace (GCRA, continuous-state leaky bucket):

    level 0 ............ limit ............ 2 x limit
          |  may be used   |   debt: only what was used beyond a reservation gets here

A clock that steps back takes nothing away from what was used; one that steps forward gives at most what that time would have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from inferflux_core.settings import Limits

MINUTE = 60.0
DAY = 86_400
IDLE_SECONDS = 2 * MINUTE  # a bucket in full debt has drained after this
SLOT_WAIT = 1.0  # seconds after which to ask again for a slot; nobody knows when one gets free

# Of a request or token. Draining by fractions leaves dust that would refuse a use at the very time it was promised.
TOLERANCE = 1e-6


class Reading(NamedTuple):
    """What is used of a quota, at one moment."""

    requests: float
    tokens: float
    day_tokens: float


class Refusal(NamedTuple):
    """Which of the demands refused, counted from 0, what of it is used up, and the seconds after which it may be free again."""

    which: int
    kind: str
    wait: float


@dataclass(slots=True)
class Usage:
    """What is used of one subject's quota.

    Attributes:
        requests, tokens: levels of the two buckets, as of `at`.
        at: time of the last `advance`, in seconds of the monotonic clock.
        running: slots taken.
        day: days since 1970 (UTC) that `day_tokens` is of.
    """

    at: float
    day: int
    requests: float = 0.0
    tokens: float = 0.0
    day_tokens: int = 0
    running: int = 0

    def advance(self, limits: Limits, now: float, today: int) -> None:
        """Let time pass: buckets drain, a new day starts."""
        elapsed = now - self.at
        if elapsed > 0:
            if self.requests:
                self.requests = 0.0 if limits.rpm is None else max(0.0, self.requests - elapsed * limits.rpm / MINUTE)
            if self.tokens:
                self.tokens = 0.0 if limits.tpm is None else max(0.0, self.tokens - elapsed * limits.tpm / MINUTE)
        self.at = now
        if today > self.day:
            self.day, self.day_tokens = today, 0
        elif today < self.day - 1:
            # The clock was wrong by days and is right again. What was used stays used; the wrong day may be years away.
            # A step of one day is not followed, or a clock that trembles at midnight would start the day many times.
            self.day = today

    def refusal(self, limits: Limits, *, requests: int, slots: int, tokens: int, day_left: float) -> tuple[str, float] | None:
        """What does not fit, as kind and seconds to wait, the longest wait; None if all fits. `advance` comes first.

        Args:
            day_left: seconds to the next day (UTC).
        """
        worst = None
        if limits.daily_tokens is not None and tokens and self.day_tokens + tokens > limits.daily_tokens:
            worst = ("daily_tokens", day_left)
        if limits.rpm is not None and requests:
            worst = _longer(worst, "requests", (self.requests + requests - limits.rpm), limits.rpm)
        if limits.tpm is not None and tokens:
            worst = _longer(worst, "tokens", (self.tokens + tokens - limits.tpm), limits.tpm)
        if (
            limits.concurrency is not None
            and self.running + slots > limits.concurrency
            and (worst is None or worst[1] < SLOT_WAIT)
        ):
            worst = ("concurrency", SLOT_WAIT)
        return worst

    def add_request(self, limits: Limits, slots: int) -> None:
        """Count a request and take its slots."""
        self.running += slots
        if limits.rpm is not None:
            self.requests += 1

    def add_tokens(self, limits: Limits, tokens: int, day_tokens: int) -> None:
        """Charge tokens, or give them back if negative; neither beyond a full bucket nor beyond one bucket of debt."""
        if limits.tpm is not None:
            self.tokens = min(max(0.0, self.tokens + tokens), 2.0 * limits.tpm)
        if limits.daily_tokens is not None:
            self.day_tokens = min(max(0, self.day_tokens + day_tokens), 2 * limits.daily_tokens)

    def is_idle(self, now: float, today: int) -> bool:
        """Whether it says no more than a new one would."""
        return self.running == 0 and now - self.at >= IDLE_SECONDS and (self.day_tokens == 0 or today > self.day)

    def reading(self) -> Reading:
        return Reading(self.requests, self.tokens, self.day_tokens)


def _longer(worst: tuple[str, float] | None, kind: str, over: float, limit: int) -> tuple[str, float] | None:
    wait = over * MINUTE / limit
    return (kind, wait) if over > TOLERANCE and (worst is None or wait > worst[1]) else worst
