"""A scheduler that admits the shortest prompt first: mean waiting time falls, long prompts may wait for ever."""

from __future__ import annotations

from collections.abc import Iterable

from pydantic import BaseModel

from inferflux_core.engine.request import Request
from inferflux_core.engine.scheduler import SchedulerContext, TokenBudgetScheduler
from inferflux_core.hookspecs import hookimpl
from inferflux_core.interfaces import Registration, Scheduler


class ShortestPromptFirst(TokenBudgetScheduler):
    """Prompts of equal length are served in order of arrival."""

    def pop_waiting(self) -> Request:
        shortest = min(self.waiting.values(), key=lambda r: (r.num_prompt_tokens, r.arrival_time))
        return self.waiting.pop(shortest.request_id)


def make(settings: BaseModel, context: SchedulerContext) -> Scheduler:
    return ShortestPromptFirst(context)


@hookimpl
def inferflux_schedulers() -> Iterable[Registration[Scheduler]]:
    return [Registration(name="shortest", factory=make, summary="shortest prompt first")]
