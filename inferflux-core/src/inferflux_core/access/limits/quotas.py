"""Quotas: who has which, and what it takes to use them.

    LimitRules.demands(principal, model) -> Demands          whose quotas a request is under: its own, its tenant's, the model's
    Limiter.acquire(demands, model)      -> Lease or 429     one request counted and its slots taken, in all of them or in none
    Lease.reserve_tokens(n)              -> None or 429      prompt and the most it may answer, in all of them or in none
    Lease.settle(used)                                       what was not used is given back, with the slot

Requests and tokens a minute are counted by GCRA in its form as a leaky bucket: a full minute's worth may come at once, and
every use drains away at the limit's pace. Tokens may go into debt, up to one minute's worth, by what a request uses beyond
its reservation. Counts are kept in this process or in Redis, where all replicas share them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from inferflux_core.identity import Principal
from inferflux_core.settings import Limits, LimitSettings, LimitTable

OTHERS = "*"
_RESERVED_SUBJECTS = ("tenant:", "model:", "principal:")


@dataclass(frozen=True, slots=True)
class Demand:
    """One quota that a request is under.

    Attributes:
        subject: whose it is: `tenant:<name>`, `model:<name>`, or the subject of a principal; the counts are kept under it.
        limits: how much may be used. `max_tokens` has no meaning here.
    """

    subject: str
    limits: Limits

    @property
    def shared(self) -> bool:
        """Whether other tenants use it too; how much of it is left is then not for the caller to know."""
        return self.subject.startswith("model:")


class LimitRules:
    """The quotas in force. The admin API replaces them as a whole; what was used so far stays counted.

    Attributes:
        table: what is in force now.
    """

    def __init__(self, source: LimitSettings | LimitTable) -> None:
        self.table = LimitTable(default=source.default, tenants=source.tenants, models=source.models)

    def replace(self, table: LimitTable) -> None:
        """Put other quotas in force, from the next request on."""
        self.table = table

    def demands(self, principal: Principal, model_name: str) -> tuple[Demand, ...]:
        """The quotas that a request is under; those that limit nothing are left out.

        Args:
            model_name: the model's canonical name, never an alias.
        """
        own, tenant, model = self._limits(principal, model_name)
        found = []
        if _counts(own):
            found.append(Demand(_subject(principal), own))
        if tenant is not None and _counts(tenant):
            found.append(Demand(f"tenant:{principal.tenant}", tenant))
        if model is not None and _counts(model):
            found.append(Demand(f"model:{model_name}", model))
        return tuple(found)

    def max_tokens(self, principal: Principal, model_name: str) -> int | None:
        """Most output tokens of one choice, by the tightest of the quotas; None if none says."""
        found = [limits.max_tokens for limits in self._limits(principal, model_name) if limits is not None]
        return min((most for most in found if most is not None), default=None)

    def _limits(self, principal: Principal, model_name: str) -> tuple[Limits, Limits | None, Limits | None]:
        table = self.table
        own = table.default if principal.limits is None else principal.limits
        return own, _named(table.tenants, principal.tenant), _named(table.models, model_name)


class Lease(ABC):
    """What one request holds of its quotas. Whoever acquired it settles it, however the request ends."""

    @property
    @abstractmethod
    def headers(self) -> dict[str, str]:
        """The x-ratelimit-* headers as of the last operation; only for what is limited, and by the caller's tightest quota."""

    @abstractmethod
    async def reserve_tokens(self, tokens: int) -> None:
        """Take tokens from every quota, or from none. More than once adds up.

        Raises:
            RateLimitError: a quota does not have them; the slot is kept until `settle`.
            AccessUnavailableError: it cannot be found out now.
        """

    @abstractmethod
    async def settle(self, used_tokens: int) -> None:
        """The request has ended: give back what was reserved beyond the tokens used, or charge the rest, and free the slot.

        Never raises; after the first time it does nothing.
        """


class Limiter(ABC):
    """Counts what is used of quotas."""

    async def start(self) -> None:  # noqa: B027  # most have nothing to do
        """Get ready. A store that cannot be reached yet is no reason to fail."""

    async def close(self) -> None:  # noqa: B027  # the same
        """Free what was taken; leases are not settled any more."""

    @abstractmethod
    async def acquire(self, demands: Sequence[Demand], model: str, slots: int = 1) -> Lease:
        """Count a request and take its slots, in every quota or in none.

        Args:
            demands: no subject twice.
            model: its name, for messages.
            slots: answers that the request wants at one time, at least 1; each takes a slot of `concurrency`.

        Raises:
            RateLimitError: a quota has no request, no slot or not a single token left.
            AccessUnavailableError: it cannot be found out now.
        """


def make_limiter(settings: LimitSettings, on_event: Callable[[str], None], *, lease_seconds: float = 900.0) -> Limiter:
    """The limiter that the settings ask for.

    Args:
        on_event: told what happens to the shared store and what is done about it, in the words of `redis_limits.EVENTS`.
        lease_seconds: after which a shared store takes back what a server held that died; longer than any request.

    Raises:
        ConfigError: the store cannot be used as configured.
    """
    # Imported here: both modules need this one, and the Redis client is an extra.
    if settings.store == "memory":
        from inferflux_core.access.limits.local import LocalLimiter

        return LocalLimiter()
    from inferflux_core.access.limits.redis_limiter import RedisLimiter

    return RedisLimiter(settings, on_event, lease_seconds=lease_seconds)


def _counts(limits: Limits) -> bool:
    return not (limits.rpm is limits.tpm is limits.concurrency is limits.daily_tokens is None)


def _named(table: Mapping[str, Limits], name: str) -> Limits | None:
    found = table.get(name)
    return table.get(OTHERS) if found is None else found


def _subject(principal: Principal) -> str:
    """The principal's subject, unless a plugin chose one that would be counted as a tenant or a model."""
    subject = principal.subject
    return f"principal:{subject}" if subject.startswith(_RESERVED_SUBJECTS) else subject
