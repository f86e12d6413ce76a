"""An engine with the fake backend that keeps its plans, for exact tests of what the scheduler puts into a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from inferflux_core.engine.scheduler import TokenBudgetScheduler
from inferflux_core.engine.types import EngineRequest, ModelRunnerOutput, SchedulerOutput
from inferflux_core.interfaces import EngineConfig, GrammarMask, Ticket
from inferflux_core.plugins import load_plugins
from inferflux_core.testing.driver import EngineDriver, make_request
from inferflux_core.testing.fake_backend import FakeRunner
from inferflux_core.testing.fake_settings import FakeSettings

REGISTRY = load_plugins()
Cost = Callable[[int, int], float]


class WatchedRunner(FakeRunner):
    """Keeps every plan and call, and says that a step took what a formula of its prefill tokens and decodes gives."""

    def __init__(self, settings: FakeSettings, config: EngineConfig, cost: Cost | None = None) -> None:
        super().__init__(settings, config)
        self.plans: list[SchedulerOutput] = []
        self.calls: list[str] = []
        self._cost = cost

    def launch(self, plan: SchedulerOutput) -> Ticket:
        self.plans.append(plan)
        self.calls.append(f"launch {plan.step}")
        return super().launch(plan)

    def sample(self, ticket: Ticket, mask: GrammarMask | None) -> None:
        self.calls.append(f"sample {ticket.plan.step}")
        super().sample(ticket, mask)

    def collect(self, ticket: Ticket) -> ModelRunnerOutput:
        self.calls.append(f"collect {ticket.plan.step}")
        output = super().collect(ticket)
        if self._cost is not None:
            decodes = sum(row.n == 1 for row in ticket.plan.rows)
            output.device_ms = self._cost(ticket.plan.num_tokens - decodes, decodes)
        return output


class Engine(EngineDriver):
    """An engine whose plans are kept, and whose outputs are kept in order."""

    def __init__(
        self, *, scheduler: str = "fcfs", settings: FakeSettings | None = None, cost: Cost | None = None, **config: Any
    ) -> None:
        defaults: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "itl_target_ms": None}
        made = EngineConfig(**{**defaults, **config})
        self.runner = WatchedRunner(settings or FakeSettings(), made, cost)
        super().__init__(self.runner, made, scheduler, REGISTRY)

    def until(self, condition: Callable[[], object], steps: int = 3000) -> None:
        """Step until something holds; an engine that spins fails instead of hanging."""
        while not condition():
            assert steps > 0, f"this did not happen: {self.core.stats()}"
            steps -= 1
            self.step()

    def is_done(self, *requests: EngineRequest) -> bool:
        return all(self.answers[r.request_id].finish_reason is not None for r in requests)

    def num_done(self, requests: Sequence[EngineRequest]) -> int:
        return sum(self.is_done(r) for r in requests)

    @property
    def scheduler(self) -> TokenBudgetScheduler:
        scheduler = self.core.scheduler
        assert isinstance(scheduler, TokenBudgetScheduler)
        return scheduler

    @property
    def running(self) -> list[str]:
        return list(self.scheduler.running)

    def plan(self) -> list[tuple[int, int, int, bool]]:
        """Take a step; (slot, start, n, sample) of its rows."""
        before = len(self.runner.plans)
        self.step()
        if len(self.runner.plans) == before:
            return []
        return [(row.slot, row.start, row.n, row.sample) for row in self.runner.plans[-1].rows]

    def finish(self) -> dict[str, list[int]]:
        self.run()
        return {request_id: answer.token_ids for request_id, answer in self.answers.items()}


def prompt(length: int, variant: int = 0) -> list[int]:
    return [97 + (i * 7 + variant * (i + 1)) % 26 for i in range(length)]


def ask(length: int, variant: int = 0, *, max_tokens: int = 50, ignore_eos: bool = True, **more: Any) -> EngineRequest:
    return make_request(prompt(length, variant), max_tokens=max_tokens, ignore_eos=ignore_eos, **more)


def small_cache(num_blocks: int = 9, block_size: int = 4) -> FakeSettings:
    return FakeSettings(block_size=block_size, num_blocks=num_blocks)
