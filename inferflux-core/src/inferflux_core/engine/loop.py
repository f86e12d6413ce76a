"""One engine: a scheduler, a runner, and the step that moves both. The same code runs in the engine process and in tests."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from msgspec import structs

from inferflux_core.engine.constraints import Constraints, PendingMask
from inferflux_core.engine.engine_spec import EngineSpec
from inferflux_core.engine.kv.manager import make_kv_cache_manager
from inferflux_core.engine.make_speculation import make_speculation
from inferflux_core.engine.scheduler import SchedulerContext
from inferflux_core.engine.speculation import Speculation
from inferflux_core.engine.types import (
    ConstraintState,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    GrammarMask,
    SchedulerOutput,
)
from inferflux_core.interfaces import Backend, EngineConfig, ModelRunner, Scheduler, Ticket, Tokenizer
from inferflux_core.plugins import PluginRegistry

# How long a step with nothing to compute waits for a grammar before it looks for messages again.
_COMPILE_WAIT_S = 0.02


class EngineCore:
    """Schedules and computes. Not thread-safe: one thread owns it.

    With a runner of depth 2 a step is launched before the one before it is collected, so that the device never waits for the
    host; `step()` then brings the outputs of the step that the call before it launched:

        host     plan 1 | plan 2, collect 1, take in 1 | plan 3, collect 2, take in 2 | ...
        device          | compute 1          | compute 2                  | compute 3

    Drafts need the newest tokens, so around a step that has any, or would pay to have, the host waits for the device.
    """

    def __init__(
        self,
        runner: ModelRunner,
        scheduler: Scheduler,
        *,
        constraints: Constraints | None = None,
        speculation: Speculation | None = None,
        details: Mapping[str, str] | None = None,
    ) -> None:
        """
        Args:
            constraints: makes the masks of constrained requests; None: there are no such requests.
            speculation: closed with the engine.
            details: added to those of the model, for people.
        """
        self.runner = runner
        self.scheduler = scheduler
        self.model_info = structs.replace(runner.model_info, details={**runner.model_info.details, **(details or {})})
        self._constraints = constraints
        self._speculation = speculation
        self._one_ahead = runner.caps.depth > 1
        self._in_flight: Ticket | None = None
        self._compiling: dict[str, tuple[EngineRequest, Future[ConstraintState]]] = {}
        self._mask_seconds = 0.0

    @classmethod
    def build(cls, spec: EngineSpec, registry: PluginRegistry) -> EngineCore:
        """Load the model, make it warm, and put an engine around it.

        Raises:
            PluginError: the backend, scheduler or proposer is unknown or has bad settings.
            ModelFileError: the files cannot be loaded, or the draft model does not fit the model.
        """
        backend: Backend = registry.create("backend", spec.backend, spec.backend_settings)
        with contextlib.ExitStack() as made:  # closed again if the rest fails: models in memory, threads
            runner = backend.runner(spec.files, spec.config)
            made.callback(runner.close)
            # The vocabulary is read in a thread of its own, beside the warm-up.
            tokenizer = functools.partial(backend.tokenizer, spec.files)
            constraints = cls._grammars(spec, runner, tokenizer) if spec.structured_output else None
            if constraints is not None:
                made.callback(constraints.close)
            runner.warm_up()
            speculation = make_speculation(spec, registry, runner, tokenizer)
            if speculation is not None:
                made.callback(speculation.close)
            core = cls.around(
                runner,
                spec.config,
                registry,
                spec.scheduler,
                spec.scheduler_settings,
                constraints=constraints,
                speculation=speculation,
                details={} if spec.speculative.method is None else {"speculation": spec.speculative.method},
            )
            made.pop_all()
        return core

    @staticmethod
    def _grammars(spec: EngineSpec, runner: ModelRunner, tokenizer: Callable[[], Tokenizer]) -> Constraints | None:
        if not runner.caps.grammar:
            return None
        from inferflux_core.engine.grammar import Grammars  # loads a native library

        return Grammars(
            tokenizer,
            runner.model_info.vocab_size,
            runner.model_info.eos_token_ids,
            cache_entries=spec.grammar_cache_entries,
            cache_salts=spec.grammar_cache_tenants,
        )

    @classmethod
    def around(
        cls,
        runner: ModelRunner,
        config: EngineConfig,
        registry: PluginRegistry,
        scheduler: str = "fcfs",
        scheduler_settings: Mapping[str, Any] | None = None,
        *,
        constraints: Constraints | None = None,
        speculation: Speculation | None = None,
        details: Mapping[str, str] | None = None,
    ) -> EngineCore:
        """An engine around a runner that is loaded already."""
        context = SchedulerContext(
            config=config,
            caps=runner.caps,
            kv=make_kv_cache_manager(runner.kv_cache_spec, config.enable_prefix_caching, runner.caps.depth),
            eos_token_ids=runner.model_info.eos_token_ids,
            speculation=speculation,
        )
        return cls(
            runner,
            registry.create("scheduler", scheduler, scheduler_settings or {}, context),
            constraints=constraints,
            speculation=speculation,
            details=details,
        )

    def add(self, request: EngineRequest) -> EngineOutput | None:
        """Queue a request; returns its only output when it could never run."""
        if not request.prompt_token_ids or (
            len(request.prompt_token_ids) + request.params.max_tokens > self.model_info.max_model_len
        ):
            return EngineOutput(request.request_id, [], FinishReason.ERROR)
        if request.constraint is None:
            self.scheduler.add_request(request)
        elif self._constraints is None:
            error = "This model was loaded without structured output."
            return EngineOutput(request.request_id, [], FinishReason.ERROR, error=error)
        else:
            # Compiled aside: a large grammar must not hold up the others.
            state = self._constraints.compile(request.cache_salt, request.constraint)
            self._compiling[request.request_id] = request, state
        return None

    def abort(self, request_ids: Sequence[str]) -> list[EngineOutput]:
        """End requests; what they hold is freed as soon as no step in flight uses it. Waits for nothing."""
        compiling = [i for i in request_ids if i in self._compiling]
        for request_id in compiling:
            self._compiling.pop(request_id)[1].cancel()  # or the others wait for what nobody wants any more
        return [EngineOutput(i, [], FinishReason.ABORT) for i in (*compiling, *self.scheduler.abort(request_ids))]

    def step(self) -> list[EngineOutput]:
        """Compute one step; the outputs it brought."""
        outputs = self._add_compiled() if self._compiling else []
        last, self._in_flight = self._in_flight, None  # so that after an exception nothing is in flight
        if last is not None and (_has_drafts(last.plan) or self.scheduler.wants_last()):
            outputs += self._take_in(last)
            last = None
        plan = self.scheduler.schedule()
        # Masks are made while the model computes, but not before the tokens are known that they depend on.
        masks = self._begin_masks(plan) if last is None else None
        ticket = None if plan is None else self.runner.launch(plan)
        if last is not None:
            outputs += self._take_in(last)
            masks = self._begin_masks(plan)
        if ticket is not None:
            self.runner.sample(ticket, self._await(masks))
            if not self._one_ahead:
                return outputs + self._take_in(ticket)
            self._in_flight = ticket
        return outputs

    def _add_compiled(self) -> list[EngineOutput]:
        """Queue the requests whose constraint is compiled; waits a little for one when there is nothing else to do."""
        if self._in_flight is None and not self.scheduler.has_requests():
            wait((state for _, state in self._compiling.values()), _COMPILE_WAIT_S, FIRST_COMPLETED)
        outputs = []
        for request_id, (request, future) in list(self._compiling.items()):
            if future.done():
                del self._compiling[request_id]
                state = future.result()
                if state.error is None:
                    self.scheduler.add_request(request, state)
                else:
                    outputs.append(EngineOutput(request_id, [], FinishReason.ERROR, error=state.error))
        return outputs

    def _begin_masks(self, plan: SchedulerOutput | None) -> PendingMask | None:
        if plan is None or not plan.constraints or self._constraints is None:
            return None
        began = time.perf_counter()
        masks = self._constraints.begin(plan)
        self._mask_seconds += time.perf_counter() - began
        return masks

    def _await(self, masks: PendingMask | None) -> GrammarMask | None:
        if masks is None:
            return None
        began = time.perf_counter()
        mask = masks.result()
        self._mask_seconds += time.perf_counter() - began
        return mask

    def _take_in(self, ticket: Ticket) -> list[EngineOutput]:
        return self.scheduler.update_from_output(ticket.plan, self.runner.collect(ticket))

    def has_requests(self) -> bool:
        """Whether `step()` has anything to do: requests to compute, or a step in flight to take in."""
        return self._in_flight is not None or bool(self._compiling) or self.scheduler.has_requests()

    def stats(self) -> EngineStats:
        return structs.replace(self.scheduler.stats(), mask_seconds=self._mask_seconds)

    def close(self) -> None:
        """Wait for the step in flight, whose outputs nobody gets any more, and release the model."""
        last, self._in_flight = self._in_flight, None
        with contextlib.ExitStack() as stack:
            stack.callback(self.runner.close)
            for part in (self._speculation, self._constraints):
                if part is not None:
                    stack.callback(part.close)
            if last is not None:
                self.runner.collect(last)


def _has_drafts(plan: SchedulerOutput) -> bool:
    return any(row.n_draft for row in plan.rows)
