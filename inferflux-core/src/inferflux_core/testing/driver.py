"""Drives an engine step by step in a test: submits, steps, checks the books after every step, collects what came out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from inferflux_core.engine.constraints import Constraints
from inferflux_core.engine.loop import EngineCore
from inferflux_core.engine.scheduler import TokenBudgetScheduler
from inferflux_core.engine.speculation import Speculation
from inferflux_core.engine.types import (
    Constraint,
    EngineOutput,
    EngineRequest,
    FinishReason,
    SamplingParams,
    TokenLogprobs,
)
from inferflux_core.interfaces import EngineConfig, ModelRunner
from inferflux_core.plugins import PluginRegistry, load_plugins

_ids = itertools.count()


def make_request(
    prompt: Sequence[int],
    *,
    request_id: str | None = None,
    salt: str = "",
    tenant: str = "",
    priority: int = 0,
    constraint: Constraint | None = None,
    num_speculative_tokens: int | None = None,
    **params: Any,
) -> EngineRequest:
    """A request with sampling parameters as keywords; greedy unless a temperature is given."""
    number = next(_ids)
    return EngineRequest(
        request_id=request_id if request_id is not None else f"r{number}",
        prompt_token_ids=list(prompt),
        params=SamplingParams(**{"max_tokens": 16, "temperature": 0.0, **params}),
        cache_salt=salt,
        tenant=tenant,
        priority=priority,
        arrival_time=float(number),
        constraint=constraint,
        num_speculative_tokens=num_speculative_tokens,
    )


@dataclass(slots=True)
class Answer:
    """What one request has brought so far."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached_tokens: int = 0
    error: str | None = None


class EngineDriver:
    """One engine under test.

    Attributes:
        core: the engine.
        answers: by request id.
        steps: how many steps were taken.
    """

    MAX_STEPS = 20_000

    def __init__(
        self,
        runner: ModelRunner,
        config: EngineConfig,
        scheduler: str = "fcfs",
        registry: PluginRegistry | None = None,
        *,
        constraints: Constraints | None = None,
        speculation: Speculation | None = None,
    ) -> None:
        registry = registry or load_plugins()
        self.core = EngineCore.around(runner, config, registry, scheduler, constraints=constraints, speculation=speculation)
        self.answers: dict[str, Answer] = {}
        self.steps = 0

    def add(self, *requests: EngineRequest) -> None:
        """Submit; a refused request is answered at once."""
        for request in requests:
            self.answers[request.request_id] = Answer()
            refused = self.core.add(request)
            if refused is not None:
                self._take(refused)

    def abort(self, *request_ids: str) -> None:
        """End requests. When nobody is left, the step in flight is taken in as well: then everything is given back."""
        for output in self.core.abort(request_ids):
            self._take(output)
        self.check()
        while request_ids and self.core.has_requests() and not self.core.scheduler.has_requests():
            self.step()

    def preempt(self, request_id: str) -> None:
        """Take a running request's room away, as a full cache would."""
        scheduler = self.core.scheduler
        assert isinstance(scheduler, TokenBudgetScheduler)
        scheduler.preempt(scheduler.running[request_id])
        self.check()

    def step(self) -> list[EngineOutput]:
        """One step, with the books checked after it."""
        outputs = self.core.step()
        for output in outputs:
            self._take(output)
        self.steps += 1
        self.check()
        return outputs

    def run(self) -> Mapping[str, Answer]:
        """Until nothing is left; everything must have been given back then."""
        while self.core.has_requests():
            if self.steps > self.MAX_STEPS:
                raise AssertionError(f"the engine makes no progress: {self.core.stats()}")
            self.step()
        assert self.core.stats().kv_cache_usage == 0, "a sequence still holds cache"
        return self.answers

    def generate(self, *requests: EngineRequest) -> list[Answer]:
        """Submit all, run to the end, answers in order."""
        self.add(*requests)
        self.run()
        return [self.answers[request.request_id] for request in requests]

    def check(self) -> None:
        """Raises AssertionError if the scheduler's or the cache's books do not add up."""
        if isinstance(self.core.scheduler, TokenBudgetScheduler):
            self.core.scheduler.check_integrity()

    def _take(self, output: EngineOutput) -> None:
        answer = self.answers[output.request_id]
        assert answer.finish_reason is None, "an output came after the last one"
        answer.token_ids += output.token_ids
        answer.logprobs += output.logprobs or []
        answer.finish_reason = output.finish_reason
        answer.num_cached_tokens = output.num_cached_tokens
        answer.error = output.error
