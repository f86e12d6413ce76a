"""The built-in answers to who is next."""

from __future__ import annotations

from inferflux_core.engine.request import Request
from inferflux_core.engine.scheduler import SchedulerContext, TokenBudgetScheduler
from inferflux_core.engine.types import ConstraintState, EngineRequest


class FcfsScheduler(TokenBudgetScheduler):
    """First come, first served."""


class PriorityScheduler(TokenBudgetScheduler):
    """Lowest priority value first, as in vLLM; equal ones in order of arrival."""

    def pop_waiting(self) -> Request:
        first = min(self.waiting.values(), key=lambda r: (r.priority, r.arrival_time))
        return self.waiting.pop(first.request_id)


class FairScheduler(TokenBudgetScheduler):
    """The tenant that received the least service first: virtual token counters (VTC, OSDI '24, arXiv 2401.00588).

    Service is what a step really computed, an output token weighing twice a prompt token, so prefix hits cost nothing. A
    tenant that comes back from idleness is lifted to the least counter of those that are active: it cannot save up.
    """

    PROMPT_WEIGHT = 1.0
    OUTPUT_WEIGHT = 2.0
    MAX_TENANTS = 4096  # counters of idle tenants are dropped beyond this

    def __init__(self, context: SchedulerContext) -> None:
        super().__init__(context)
        self._service: dict[str, float] = {}

    def add_request(self, request: EngineRequest, constraint: ConstraintState | None = None) -> None:
        active = {r.tenant for queue in (self.waiting, self.running) for r in queue.values()}
        super().add_request(request, constraint)
        tenant = request.tenant
        if not active:
            self._service = {tenant: 0.0}  # everyone was idle: nothing to be fair about, and nothing to remember
        elif tenant not in active:
            least = min(self._service.get(other, 0.0) for other in active)
            self._service[tenant] = max(self._service.get(tenant, 0.0), least)
        if len(self._service) > self.MAX_TENANTS:
            self._service = {t: v for t, v in self._service.items() if t in active or t == tenant}

    def pop_waiting(self) -> Request:
        first = min(self.waiting.values(), key=lambda r: (r.priority, self._service.get(r.tenant, 0.0), r.arrival_time))
        return self.waiting.pop(first.request_id)

    def on_computed(self, request: Request, num_tokens: int) -> None:
        is_decode = request.num_computed_tokens - num_tokens >= request.num_prompt_tokens
        weight = self.OUTPUT_WEIGHT if is_decode else self.PROMPT_WEIGHT
        self._service[request.tenant] = self._service.get(request.tenant, 0.0) + weight * num_tokens
