"""Quotas counted in this process. Nothing here waits: an operation is a few dozen lines of arithmetic in the event loop."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

from inferflux_core.access.limits.headers import limit_headers
from inferflux_core.access.limits.quotas import Demand, Lease, Limiter
from inferflux_core.access.limits.refusals import rate_limited
from inferflux_core.access.limits.usage import DAY, Reading, Refusal, Usage
from inferflux_core.errors import RateLimitError


class LocalLimiter(Limiter):
    """Counts for one server process.

    Memory: one small record for each subject that has something in use; each request drops up to a few that have not.
    """

    def __init__(self, *, monotonic: Callable[[], float] = time.monotonic, wall: Callable[[], float] = time.time) -> None:
        """Args:
        monotonic: seconds, for what is counted by the minute.
        wall: Unix seconds, for what is counted by the day.
        """
        self._monotonic = monotonic
        self._wall = wall
        self._usages: OrderedDict[str, Usage] = OrderedDict()

    def __len__(self) -> int:
        """How many subjects it remembers."""
        return len(self._usages)

    async def acquire(self, demands: Sequence[Demand], model: str, slots: int = 1) -> Lease:
        lease = _LocalLease(self, demands, model, slots)
        lease.try_use(requests=1, slots=slots, tokens=1)
        for demand, usage in zip(demands, lease.usages, strict=True):
            usage.add_request(demand.limits, slots)
        lease.read()
        return lease

    def adopt(self, demands: Sequence[Demand], model: str, slots: int) -> Lease:
        """A lease for a request that was let in elsewhere: nothing is checked, and only its slots are counted."""
        lease = _LocalLease(self, demands, model, slots)
        lease.advance()
        for usage in lease.usages:
            usage.running += slots
        lease.read()
        return lease

    def clocks(self) -> tuple[float, int, float]:
        """Monotonic seconds, days since 1970, and seconds to the next day (UTC)."""
        today, second = divmod(self._wall(), DAY)
        return self._monotonic(), int(today), DAY - second

    def usages(self, demands: Sequence[Demand]) -> list[Usage]:
        """The records of the demands' subjects, made where there is none."""
        now, today, _ = self.clocks()
        self._drop_idle(len(demands) + 1, now, today)
        found = []
        for demand in demands:
            usage = self._usages.get(demand.subject)
            if usage is None:
                usage = self._usages[demand.subject] = Usage(at=now, day=today)
            found.append(usage)
        return found

    def _drop_idle(self, count: int, now: float, today: int) -> None:
        """Look at some records, in turn, and drop those that say nothing. `count` is more than a request adds."""
        usages = self._usages
        for _ in range(min(count, len(usages))):
            subject = next(iter(usages))
            if usages[subject].is_idle(now, today):
                del usages[subject]
            else:
                usages.move_to_end(subject)


class _LocalLease(Lease):
    __slots__ = (
        "_day",
        "_day_left",
        "_day_reserved",
        "_demands",
        "_limiter",
        "_model",
        "_readings",
        "_reserved",
        "_settled",
        "_slots",
        "usages",
    )

    def __init__(self, limiter: LocalLimiter, demands: Sequence[Demand], model: str, slots: int) -> None:
        self._limiter = limiter
        self._slots = slots
        self._demands = demands
        self._model = model
        self.usages = limiter.usages(demands)
        self._readings: list[Reading] = []
        self._day_left = 0.0
        self._day = 0  # the one that the last reservation was made in,
        self._day_reserved = 0  # and how much was reserved in it
        self._reserved = 0
        self._settled = False

    @property
    def headers(self) -> dict[str, str]:
        return limit_headers(self._demands, self._readings, self._day_left)

    async def reserve_tokens(self, tokens: int) -> None:
        if self._settled:
            raise RuntimeError("the lease is settled: nothing can be reserved for a request that has ended")
        if tokens <= 0:
            return
        today = self.try_use(requests=0, slots=0, tokens=tokens)
        if today != self._day:
            self._day, self._day_reserved = today, 0
        self._day_reserved += tokens
        self._reserved += tokens
        for demand, usage in zip(self._demands, self.usages, strict=True):
            usage.add_tokens(demand.limits, tokens, tokens)
        self.read()

    async def settle(self, used_tokens: int) -> None:
        if self._settled:
            return
        self._settled = True
        today = self.advance()
        change = max(0, used_tokens) - self._reserved
        # What was reserved yesterday is not given back to today.
        day_change = max(change, -self._day_reserved if today == self._day else 0)
        for demand, usage in zip(self._demands, self.usages, strict=True):
            usage.running -= self._slots
            usage.add_tokens(demand.limits, change, day_change)
        self.read()

    def advance(self) -> int:
        """Let time pass for all usages; the day it is now."""
        now, today, self._day_left = self._limiter.clocks()
        for demand, usage in zip(self._demands, self.usages, strict=True):
            usage.advance(demand.limits, now, today)
        return today

    def try_use(self, *, requests: int, slots: int, tokens: int) -> int:
        """See whether all this fits into all quotas; the day it is now.

        Raises:
            RateLimitError: it does not, with the reason that lasts longest.
        """
        today = self.advance()
        worst: Refusal | None = None
        for index, (demand, usage) in enumerate(zip(self._demands, self.usages, strict=True)):
            found = usage.refusal(demand.limits, requests=requests, slots=slots, tokens=tokens, day_left=self._day_left)
            if found is not None and (worst is None or found[1] > worst.wait):
                worst = Refusal(index, *found)
        if worst is not None:
            self.read()
            raise self._error(worst, 0 if requests else tokens)
        return today

    def read(self) -> None:
        """Remember what is used now, for the headers."""
        self._readings = [usage.reading() for usage in self.usages]

    def _error(self, refusal: Refusal, tokens: int) -> RateLimitError:
        return rate_limited(self._demands, refusal, model=self._model, tokens=tokens, headers=self.headers)
