"""One engine: a scheduler, a runner, and the step that moves both. The same code runs in the engine process and in tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from inferflux_core.engine.kv.manager import make_kv_cache_manager
from inferflux_core.engine.scheduler import SchedulerContext
from inferflux_core.engine.types import EngineOutput, EngineRequest, EngineStats, FinishReason
from inferflux_core.interfaces import Backend, EngineConfig, ModelFiles, ModelInfo, ModelRunner, Scheduler, Ticket
from inferflux_core.plugins import PluginRegistry


class DraftSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A draft model, as `EngineSpec` has the model itself."""

    files: ModelFiles
    backend: str
    backend_settings: dict[str, Any] = {}


class SpeculativeSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How to speculate.

    Attributes:
        method: a registered proposer, with its settings as in the configuration; None for none.
        num_speculative_tokens: most draft tokens of one sequence in one step.
    """

    method: str | None = None
    num_speculative_tokens: int = 32
    settings: dict[str, Any] = {}
    draft: DraftSpec | None = None


class EngineSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Everything an engine is made from, as names and plain values: what the engine process gets to read.

    Attributes:
        backend, scheduler: registered names, with their settings as in the configuration.
        structured_output: whether requests may have constraints, for which the vocabulary is read at load.
        blocked_plugins: distributions whose plugins are not loaded.
    """

    files: ModelFiles
    backend: str
    backend_settings: dict[str, Any] = {}
    scheduler: str = "fcfs"
    scheduler_settings: dict[str, Any] = {}
    config: EngineConfig = EngineConfig()
    speculative: SpeculativeSpec = SpeculativeSpec()
    structured_output: bool = False
    blocked_plugins: tuple[str, ...] = ()


class EngineCore:
    """Schedules and computes. Not thread-safe: one thread owns it.

    With a runner of depth 2 a step is launched before the one before it is collected, so that the device never waits for the
    host; `step()` then brings the outputs of the step that the call before it launched:

        host     plan 1 | plan 2, collect 1, take in 1 | plan 3, collect 2, take in 2 | ...
        device          | compute 1          | compute 2                  | compute 3
    """

    def __init__(self, runner: ModelRunner, scheduler: Scheduler) -> None:
        self.runner = runner
        self.scheduler = scheduler
        self._one_ahead = runner.caps.depth > 1
        self._in_flight: Ticket | None = None

    @classmethod
    def build(cls, spec: EngineSpec, registry: PluginRegistry) -> EngineCore:
        """Load the model and put an engine around it.

        Raises:
            PluginError: the backend or scheduler is unknown or has bad settings.
            ModelFileError: the files cannot be loaded.
        """
        backend: Backend = registry.create("backend", spec.backend, spec.backend_settings)
        return cls.around(
            backend.runner(spec.files, spec.config), spec.config, registry, spec.scheduler, spec.scheduler_settings
        )

    @classmethod
    def around(
        cls,
        runner: ModelRunner,
        config: EngineConfig,
        registry: PluginRegistry,
        scheduler: str = "fcfs",
        scheduler_settings: Mapping[str, Any] | None = None,
    ) -> EngineCore:
        """An engine around a runner that is loaded already."""
        context = SchedulerContext(
            config=config,
            caps=runner.caps,
            kv=make_kv_cache_manager(runner.kv_cache_spec, config.enable_prefix_caching, runner.caps.depth),
            eos_token_ids=runner.model_info.eos_token_ids,
        )
        return cls(runner, registry.create("scheduler", scheduler, scheduler_settings or {}, context))

    @property
    def model_info(self) -> ModelInfo:
        return self.runner.model_info

    def add(self, request: EngineRequest) -> EngineOutput | None:
        """Queue a request; returns its only output when it could never run."""
        if not request.prompt_token_ids or (
            len(request.prompt_token_ids) + request.params.max_tokens > self.model_info.max_model_len
        ):
            return EngineOutput(request.request_id, [], FinishReason.ERROR)
        self.scheduler.add_request(request)
        return None

    def abort(self, request_ids: Sequence[str]) -> list[EngineOutput]:
        """End requests; what they hold is freed as soon as no step in flight uses it. Waits for nothing."""
        return [EngineOutput(i, [], FinishReason.ABORT) for i in self.scheduler.abort(request_ids)]

    def step(self) -> list[EngineOutput]:
        """Compute one step; the outputs it brought."""
        last, self._in_flight = self._in_flight, None  # so that after an exception nothing is in flight
        plan = self.scheduler.schedule()
        ticket = None if plan is None else self.runner.launch(plan)
        outputs = [] if last is None else self._take_in(last)
        if ticket is not None:
            self.runner.sample(ticket, None)
            if not self._one_ahead:
                return self._take_in(ticket)
            self._in_flight = ticket
        return outputs

    def _take_in(self, ticket: Ticket) -> list[EngineOutput]:
        return self.scheduler.update_from_output(ticket.plan, self.runner.collect(ticket))

    def has_requests(self) -> bool:
        """Whether `step()` has anything to do: requests to compute, or a step in flight to take in."""
        return self._in_flight is not None or self.scheduler.has_requests()

    def stats(self) -> EngineStats:
        return self.scheduler.stats()

    def close(self) -> None:
        """Wait for the step in flight, whose outputs nobody gets any more, and release the model."""
        last, self._in_flight = self._in_flight, None
        try:
            if last is not None:
                self.runner.collect(last)
        finally:
            self.runner.close()
