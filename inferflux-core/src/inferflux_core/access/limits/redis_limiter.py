"""Quotas counted in Redis, shared by all replicas. `usage.lua` does the counting; here is what happens around it.

While Redis cannot be used `limits.on_store_error` says what is done: counting in this process with each limit divided by the
number of replicas, refusing, or letting everything pass. What could not be given back to Redis is given back when it returns;
what a server held that died is taken back by Redis when its leases expire.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from inferflux_core.access.limits.headers import limit_headers
from inferflux_core.access.limits.local import LocalLimiter
from inferflux_core.access.limits.quotas import Demand, Lease, Limiter
from inferflux_core.access.limits.redis_script import RedisScript, StoreDown
from inferflux_core.access.limits.refusals import rate_limited
from inferflux_core.access.limits.usage import DAY, Reading, Refusal
from inferflux_core.errors import AccessUnavailableError, ConfigError
from inferflux_core.settings import Limits, LimitSettings

EVENTS = ("store_error", "store_recovered", "counted_locally", "denied", "allowed")
"""`on_event` is told: a call to Redis failed; the first since then did not; what was done about an operation without Redis."""

_MEANWHILE = {
    "local": "counting in this process, each limit divided by limits.replicas ({replicas})",
    "deny": "answering 503, as limits.on_store_error says",
    "allow": "letting every request pass, as limits.on_store_error says",
}
_MAX_OWED = 10_000
_Args = tuple[str | int | float, ...]


@dataclass(frozen=True, slots=True)
class _Owed:
    """A settlement that Redis did not confirm, and when its lease has expired anyway (monotonic seconds)."""

    keys: tuple[str, ...]
    args: _Args
    until: float


class RedisLimiter(Limiter):
    """Counts for all replicas that use the same Redis (6.0 or later, or Valkey) and the same prefix."""

    def __init__(
        self,
        settings: LimitSettings,
        on_event: Callable[[str], None],
        *,
        lease_seconds: float,
        timeout: float = 0.2,
        retry_seconds: float = 1.0,
    ) -> None:
        """Args:
            on_event: told one of `EVENTS`.
            lease_seconds: after which Redis takes back what a server held that died; longer than any request.
            timeout: in seconds, to connect to Redis; an answer may take twice as long.
            retry_seconds: pause before Redis is asked again after a failure.

        Raises:
            ConfigError: the extra `redis` is not installed, the URL is missing or malformed, or the prefix has a brace.
        """
        if settings.redis_url is None:
            raise ConfigError("limits.store is 'redis' and limits.redis_url is not set: write redis://host:port/db")
        if set(settings.redis_prefix) & set("{}"):
            raise ConfigError(
                f"limits.redis_prefix is {settings.redis_prefix!r}: it must not hold braces, they mark its hash slot"
            )
        self._on_event = on_event
        self._on_error = settings.on_store_error
        self._replicas = settings.replicas
        self._tag = f"{{{settings.redis_prefix}}}"
        self._lease_seconds = lease_seconds
        self._retry_seconds = retry_seconds
        self._local = LocalLimiter()
        self._script = RedisScript(
            settings.redis_url.get_secret_value(),
            files("inferflux_core.access.limits").joinpath("usage.lua").read_text(encoding="utf-8"),
            on_event=on_event,
            meanwhile=_MEANWHILE[self._on_error].format(replicas=self._replicas),
            timeout=timeout,
            retry_seconds=retry_seconds,
        )
        self._owed: deque[_Owed] = deque(maxlen=_MAX_OWED)
        self._paying: asyncio.Task[None] | None = None
        self._settling: set[asyncio.Task[None]] = set()
        self._closing = False

    async def close(self) -> None:
        """Finish the settlements under way, try once what is owed, and close the connections."""
        self._closing = True
        if self._paying is not None:
            self._paying.cancel()
            await asyncio.gather(self._paying, return_exceptions=True)
        await asyncio.gather(*self._settling, return_exceptions=True)
        await self._pay()
        await self._script.close()

    async def acquire(self, demands: Sequence[Demand], model: str, slots: int = 1) -> Lease:
        if not demands:
            return _FreeLease()
        lease = _RedisLease(self, demands, model, secrets.token_hex(8), slots)
        try:
            await lease.run("acquire")
        except StoreDown as down:
            if down.asked:
                self.owe(lease, 0, 0)
            if (spare := self.without_store()) is None:
                return _FreeLease()
            return await spare.acquire(self.divided(demands), model, slots)
        except asyncio.CancelledError:
            self.owe(lease, 0, 0)
            raise
        return lease

    async def call(self, lease: _RedisLease, operation: str, tokens: int, reserved: int) -> list[bytes]:
        """One run of the script for a lease. Raises StoreDown."""
        return await self._script.run(*self._command(lease, operation, tokens, reserved, again=False))

    def without_store(self) -> LocalLimiter | None:
        """What counts while Redis cannot be used; None if nothing does.

        Raises:
            AccessUnavailableError: nothing is let in meanwhile.
        """
        if self._on_error == "local":
            self._on_event("counted_locally")
            return self._local
        if self._on_error == "allow":
            self._on_event("allowed")
            return None
        self._on_event("denied")
        raise AccessUnavailableError(
            "The limits cannot be checked now, because their store does not answer. Please retry later.",
            code="limits_unavailable",
        )

    def divided(self, demands: Sequence[Demand]) -> tuple[Demand, ...]:
        """This replica's part of the demands."""
        return tuple(Demand(demand.subject, _divided(demand.limits, self._replicas)) for demand in demands)

    async def settle(self, lease: _RedisLease, used_tokens: int, reserved: int) -> None:
        """Settle in a task of its own: whoever waits for it may be cancelled, the settlement may not."""
        task = asyncio.create_task(self._settle(lease, used_tokens, reserved))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        await asyncio.shield(task)

    async def _settle(self, lease: _RedisLease, used_tokens: int, reserved: int) -> None:
        try:
            await self.call(lease, "settle", used_tokens, reserved)
        except StoreDown:
            self.owe(lease, used_tokens, reserved)

    def owe(self, lease: _RedisLease, used_tokens: int, reserved: int) -> None:
        """Settle a lease when Redis can be used again; it may or may not know of the lease, or have settled it."""
        keys, args = self._command(lease, "settle", used_tokens, reserved, again=True)
        self._owed.append(_Owed(keys, args, time.monotonic() + self._lease_seconds))
        if not self._closing and (self._paying is None or self._paying.done()):
            self._paying = asyncio.create_task(self._pay_later())

    async def _pay_later(self) -> None:
        while self._owed:
            await asyncio.sleep(self._retry_seconds)
            await self._pay()

    async def _pay(self) -> None:
        """Settle what is owed, as long as Redis answers."""
        while self._owed:
            owed = self._owed[0]
            if time.monotonic() < owed.until:
                try:
                    await self._script.run(owed.keys, owed.args)
                except StoreDown:
                    return
            if self._owed and self._owed[0] is owed:  # a full queue may have lost it meanwhile
                self._owed.popleft()

    def _command(
        self, lease: _RedisLease, operation: str, tokens: int, reserved: int, *, again: bool
    ) -> tuple[tuple[str, ...], _Args]:
        keys: list[str] = []
        args: list[str | int | float] = [operation, lease.id, self._lease_seconds, tokens, reserved, int(again), lease.slots]
        for demand in lease.demands:
            name, limits = f"{self._tag}:{demand.subject}", demand.limits
            keys += (name, f"{name}:leases")
            args += (limits.rpm or 0, limits.tpm or 0, limits.concurrency or 0, limits.daily_tokens or 0)
        return tuple(keys), tuple(args)


class _RedisLease(Lease):
    __slots__ = ("_day_left", "_limiter", "_model", "_readings", "_reserved", "_settled", "_spare", "demands", "id", "slots")

    def __init__(self, limiter: RedisLimiter, demands: Sequence[Demand], model: str, lease_id: str, slots: int) -> None:
        self.id = lease_id
        self.slots = slots
        self.demands = demands
        self._limiter = limiter
        self._model = model
        self._reserved = 0
        self._spare: Lease | None = None  # what counts the reservations made while Redis could not be used
        self._settled = False
        self._readings: list[Reading] = []
        self._day_left = 0.0

    @property
    def headers(self) -> dict[str, str]:
        return limit_headers(self.demands, self._readings, self._day_left) if self._spare is None else self._spare.headers

    async def reserve_tokens(self, tokens: int) -> None:
        if self._settled:
            raise RuntimeError("the lease is settled: nothing can be reserved for a request that has ended")
        if tokens <= 0:
            return
        try:
            await self.run("reserve", tokens)
        except StoreDown:
            local = self._limiter.without_store()
            if local is None:
                return
            if self._spare is None:
                self._spare = local.adopt(self._limiter.divided(self.demands), self._model, self.slots)
            await self._spare.reserve_tokens(tokens)
        else:
            self._reserved += tokens

    async def settle(self, used_tokens: int) -> None:
        if self._settled:
            return
        self._settled = True
        used_tokens = max(0, used_tokens)
        if self._spare is not None:
            await self._spare.settle(used_tokens)
        await self._limiter.settle(self, used_tokens, self._reserved)

    async def run(self, operation: str, tokens: int = 0) -> None:
        """Run an operation that may be refused. Raises RateLimitError, StoreDown."""
        reply = await self._limiter.call(self, operation, tokens, self._reserved)
        which, kind, wait, now = int(reply[0]), reply[1].decode(), float(reply[2]), float(reply[3])
        levels = [float(level) for level in reply[4:]]
        self._readings = [Reading(*levels[i : i + 3]) for i in range(0, len(levels), 3)]
        self._day_left = DAY - now % DAY
        if which:
            refusal = Refusal(which - 1, kind, wait)
            raise rate_limited(self.demands, refusal, model=self._model, tokens=tokens, headers=self.headers)


class _FreeLease(Lease):
    """Of a request that nothing limits."""

    __slots__ = ()

    @property
    def headers(self) -> dict[str, str]:
        return {}

    async def reserve_tokens(self, tokens: int) -> None:
        pass

    async def settle(self, used_tokens: int) -> None:
        pass


@functools.lru_cache(maxsize=1024)
def _divided(limits: Limits, replicas: int) -> Limits:
    def part(limit: int | None) -> int | None:
        return None if limit is None else max(1, limit // replicas)

    return Limits(
        rpm=part(limits.rpm),
        tpm=part(limits.tpm),
        concurrency=part(limits.concurrency),
        daily_tokens=part(limits.daily_tokens),
        max_tokens=limits.max_tokens,
    )
