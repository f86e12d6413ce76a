"""The token-budget scheduler: no prefill phase, no decode phase.

Every step lets each sequence's computed tokens catch up with its known tokens. Chunked prefill, prefix hits and resuming
after preemption are that one rule. Running sequences come first, then the waiting ones, within one budget of tokens.

Drafts are tokens to catch up on as well: a decode may carry guesses of what follows it, which its row verifies. What holds is
known afterwards, the rest never was.

A step may be planned while the one before it still runs (`Capabilities.depth` 2). Tokens that are being sampled then count as
known, though only the device knows them; whatever ends a sequence meanwhile leaves its slot and cache to it until the last
step that uses them is collected (deferred free).
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from inferflux_core.engine.cost_model import StepCostModel
from inferflux_core.engine.counters import EngineCounters
from inferflux_core.engine.drafting import Drafting
from inferflux_core.engine.kv.manager import KVCacheManager, PrefixMatch
from inferflux_core.engine.kv.pending import PendingPrefixes
from inferflux_core.engine.prefill_chunks import MIN_CHUNK, PrefillChunks
from inferflux_core.engine.request import Request, RequestStatus
from inferflux_core.engine.speculation import Speculation
from inferflux_core.engine.types import (
    ConstraintState,
    EngineOutput,
    EngineRequest,
    EngineStats,
    FinishReason,
    KVOps,
    ModelRunnerOutput,
    Row,
    SchedulerOutput,
    SequenceInit,
    TokenLogprobs,
)
from inferflux_core.interfaces import Capabilities, EngineConfig, Scheduler

# Waiting requests that may be passed over in one step because a running one is computing what they need.
_HOLD_WINDOW = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerContext:
    """What a scheduler is made from.

    Attributes:
        speculation: who guesses tokens; None: only those that a constraint leaves no choice about are drafted.
    """

    config: EngineConfig
    caps: Capabilities
    kv: KVCacheManager
    eos_token_ids: frozenset[int]
    cost_model: StepCostModel = field(default_factory=StepCostModel)
    speculation: Speculation | None = None


class TokenBudgetScheduler(Scheduler):
    """Continuous batching with chunked prefill (Orca, OSDI '22; Sarathi-Serve, OSDI '24).

    Two questions are left to subclasses: `pop_waiting()`, who is next, and `pick_victim()`, who makes room. As they stand
    they give first come, first served.

    Attributes:
        waiting: requests without a slot, by id, in order of arrival; preempted ones at the front.
        running: requests with a slot, by id, in order of admission.
        leaving: requests that run no longer, while a step in flight still uses their slot and cache, by id. A preempted one
            waits as well.
    """

    def __init__(self, context: SchedulerContext) -> None:
        self.context = context
        self.kv = context.kv
        self.waiting: OrderedDict[str, Request] = OrderedDict()
        self.running: dict[str, Request] = {}
        self.leaving: dict[str, Request] = {}
        self._max_num_seqs = min(context.config.max_num_seqs, context.caps.max_num_seqs)
        self._max_tokens = min(context.config.max_num_batched_tokens, context.caps.max_num_batched_tokens)
        self._chunks = PrefillChunks(context.caps, self._max_tokens, context.config.itl_target_ms, context.cost_model)
        self._slots = list(range(self._max_num_seqs))
        self._freed_slots: list[int] = []
        # Whose the rows of a plan are: of the one in the making, and of those not taken in yet, oldest first.
        self._scheduled: list[Request] = []
        self._planned: deque[tuple[SchedulerOutput, list[Request]]] = deque()
        self._out_of_room = False
        self._num_ending = 0  # running requests whose last token is in flight
        self._started: list[str] = []
        self._pending = PendingPrefixes(context.kv, MIN_CHUNK)
        self._mean_output = 64.0
        max_draft = context.caps.max_draft if context.kv.can_trim else 0
        self._drafting = Drafting(max_draft, self._max_tokens, context.speculation)
        self._count = EngineCounters()

    # --- policy -------------------------------------------------------------------------------------------------------

    def pop_waiting(self) -> Request:
        """Remove and return the next request to admit. Called only while `waiting` is not empty."""
        return self.waiting.popitem(last=False)[1]

    def pick_victim(self) -> Request:
        """The running request to preempt when the cache is full: lowest priority, then newest."""
        return max(self.running.values(), key=lambda r: (r.priority, r.arrival_time))

    def on_computed(self, request: Request, num_tokens: int) -> None:
        """A step computed `num_tokens` tokens of the request. For policies that count service."""

    # --- requests come and go -----------------------------------------------------------------------------------------

    def add_request(self, request: EngineRequest, constraint: ConstraintState | None = None) -> None:
        if request.request_id in self.waiting or request.request_id in self.running:
            raise ValueError(f"request id {request.request_id!r} is in use")
        self.waiting[request.request_id] = Request.of(request, constraint)

    def abort(self, request_ids: Sequence[str]) -> list[str]:
        aborted = []
        for request_id in request_ids:
            request = self.running.get(request_id)
            if request is not None:
                self._finish(request)
            elif (request := self.waiting.pop(request_id, None)) is not None:
                request.status = RequestStatus.FINISHED
                self._drafting.forget(request)
            else:
                continue
            aborted.append(request_id)
        return aborted

    def has_requests(self) -> bool:
        return bool(self.running or self.waiting)

    def take_started(self) -> list[str]:
        started, self._started = self._started, []
        return started

    # --- planning a step ----------------------------------------------------------------------------------------------

    def schedule(self) -> SchedulerOutput | None:
        began = time.perf_counter()
        plan = SchedulerOutput(step=self._count.num_steps + len(self._planned), rows=[], num_tokens=0)
        self._scheduled = []
        self._out_of_room = False
        self._num_ending = 0
        decodes: list[Request] = []
        prefills: list[Request] = []
        for request in self.running.values():
            if request.num_in_flight and request.awaits_last_token:
                self._num_ending += 1
            else:
                (decodes if request.num_pending == 1 else prefills).append(request)
        self._drafting.draft(decodes)
        self._schedule_running(plan, decodes, self._max_tokens)
        depth = max((r.num_scheduled_tokens for r in self.running.values() if r.num_pending > 1), default=0)
        chunk = self._chunks.budget(plan, depth)
        chunk -= self._schedule_running(plan, prefills, chunk)
        if not self._out_of_room:
            # Otherwise a victim would get back the room that was just taken from it, or that a running one waits for.
            self._admit_waiting(plan, chunk)
        elif plan.rows:
            plan.rows[0].kv = self.kv.carry_over(plan.rows[0].kv)
        self._count.schedule_seconds += time.perf_counter() - began
        if not plan.rows:
            return None
        self._planned.append((plan, self._scheduled))
        plan.free, self._freed_slots = self._freed_slots, []
        return plan

    def wants_last(self) -> bool:
        return self._drafting.would_draft(self.running.values())

    def _schedule_running(self, plan: SchedulerOutput, requests: list[Request], budget: int) -> int:
        """Give running requests what the budget allows; returns the tokens used."""
        used = 0
        for request in requests:
            n = self._chunks.cut(plan, request.num_pending + len(request.draft), budget - used)
            if not n:
                break
            if self._out_of_room and request.status is not RequestStatus.RUNNING:
                continue  # it was preempted for an earlier one
            upto = request.num_scheduled_tokens + n
            ops = self.kv.allocate_slots(request, upto)
            if ops is None and request.draft:  # nobody makes room for a guess
                request.draft, n, upto = [], 1, upto - n + 1
                ops = self.kv.allocate_slots(request, upto)
            if ops is None:
                ops = self._make_room(plan, request, upto)
            if ops is not None:
                self._add_row(plan, request, n, ops)
                used += n
        return used

    def _make_room(self, plan: SchedulerOutput, request: Request, upto: int) -> KVOps | None:
        """Preempt until there is room for tokens[:upto]. None: the request itself had to go, or the room comes later."""
        self._out_of_room = True
        ops = None
        # Nobody goes while room is on its way: what leaves or ends gives it back when the step in flight is collected.
        while ops is None and not self.leaving and not self._num_ending:
            victim = self.pick_victim()
            self._drop_row(plan, victim)
            self.preempt(victim)
            if victim is request:
                return None
            ops = self.kv.allocate_slots(request, upto)
        return ops

    def _drop_row(self, plan: SchedulerOutput, request: Request) -> None:
        """Take a request that is about to be preempted out of the plan again."""
        for i, scheduled in enumerate(self._scheduled):
            if scheduled is request:
                row = plan.rows[i]
                plan.num_tokens -= row.n
                request.num_scheduled_tokens = row.start
                if row.sample:
                    request.num_in_flight -= 1
                self.kv.cancel(row.kv)
                plan.constraints.pop(row.slot, None)
                del self._scheduled[i], plan.rows[i]
                return

    def _admit_waiting(self, plan: SchedulerOutput, budget: int) -> None:
        """Start waiting requests while there are slots, budget and room."""
        passed_over: list[Request] = []
        while budget > 0 and self.waiting and self._slots and len(passed_over) < _HOLD_WINDOW:
            request = self.pop_waiting()
            if request.request_id in self.leaving:  # preempted, or named as one that was aborted, while a step ran
                passed_over.append(request)
                break
            match = self._chunks.align(request, self.kv.get_computed_blocks(request), self.kv)
            if self._pending.covers(request, match.num_tokens):
                passed_over.append(request)
                continue
            n = self._chunks.cut(plan, len(request.tokens) - match.num_tokens, budget)
            ops = self._start(request, match, n) if n else None
            if ops is None:
                passed_over.append(request)
                break
            self._admit(plan, request, match.num_tokens)
            self._add_row(plan, request, n, ops)
            budget -= n
        for request in reversed(passed_over):
            self.waiting[request.request_id] = request
            self.waiting.move_to_end(request.request_id, last=False)

    def _start(self, request: Request, match: PrefixMatch, n: int) -> KVOps | None:
        """Room for the first n tokens, if the whole request is likely to fit beside those that run."""
        if self.running:
            to_come = min(request.params.max_tokens, int(self._mean_output))
            if len(request.tokens) - match.num_held + to_come > self.kv.free_tokens():
                return None
        return self.kv.allocate_slots(request, match.num_tokens + n, match)

    def _admit(self, plan: SchedulerOutput, request: Request, num_cached: int) -> None:
        self._count.prefix_cache_queries += 1
        self._count.prefix_cache_hits += num_cached > 0
        if not request.started:
            request.started = True
            request.num_cached_tokens = num_cached
            self._count.cached_prompt_tokens += num_cached
            self._started.append(request.request_id)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = request.num_scheduled_tokens = num_cached
        request.slot = heapq.heappop(self._slots)
        self.running[request.request_id] = request
        self._pending.add(request, num_cached)
        plan.start.append(SequenceInit(request.slot, request.params, request.tokens[:], request.num_prompt_tokens))

    def _add_row(self, plan: SchedulerOutput, request: Request, n: int, ops: KVOps) -> None:
        assert request.slot is not None
        start = request.num_scheduled_tokens
        upto = start + n
        tokens = request.tokens
        num_known, draft, request.draft = len(tokens), request.draft, []
        sample = upto == num_known + request.num_in_flight + len(draft)
        known = tokens[start:upto] if start < num_known else None
        if draft and known is not None:
            known = known + draft
        plan.rows.append(Row(slot=request.slot, start=start, n=n, tokens=known, n_draft=len(draft), sample=sample, kv=ops))
        plan.num_tokens += n
        request.num_scheduled_tokens = upto
        if sample:
            request.num_in_flight += 1
            if request.constraint is not None:
                plan.constraints[request.slot] = request.constraint
        self._scheduled.append(request)

    # --- taking in a step ---------------------------------------------------------------------------------------------

    def update_from_output(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> list[EngineOutput]:
        began = time.perf_counter()
        self._observe(plan, output.device_ms)
        outputs: list[EngineOutput] = []
        sampled = iter(zip(output.tokens, output.logprobs, strict=True))
        running = RequestStatus.RUNNING
        oldest, requests = self._planned.popleft()
        assert oldest is plan, "steps are taken in in the order of their plans"
        for request, row in zip(requests, plan.rows, strict=True):
            drawn = next(sampled) if row.sample else None
            if drawn is not None:
                request.num_in_flight -= 1
            if request.status is not running:  # stopped, aborted or preempted while the step ran
                self._computed(request, row, 0)
                if not request.is_in_flight:
                    del self.leaving[request.request_id]
                    self._give_back(request)
            elif drawn is None:
                self._computed(request, row, 0)
            else:
                outputs.append(self._take_drawn(request, row, *drawn))
        self._count.num_steps += 1
        self._count.schedule_seconds += time.perf_counter() - began
        return outputs

    def _observe(self, plan: SchedulerOutput, milliseconds: float) -> None:
        num_decode = num_draft = kv_tokens = prefill_attention = 0
        for row in plan.rows:
            if row.n == 1 + row.n_draft:
                num_decode += 1
                num_draft += row.n_draft
                kv_tokens += row.start
            else:
                prefill_attention += row.n * row.start
        num_prefill = plan.num_tokens - num_decode - num_draft
        self.context.cost_model.observe(num_prefill, num_decode, kv_tokens, milliseconds, prefill_attention, num_draft)
        if not num_prefill:
            self._drafting.observe(plan.num_tokens, milliseconds)
        self._count.step_tokens += plan.num_tokens
        self._count.model_seconds += milliseconds / 1e3

    def _computed(self, request: Request, row: Row, accepted: int) -> None:
        """A row was computed, and so many of its drafts hold: their KV is valid, that of the others is not."""
        first = request.num_computed_tokens
        request.num_computed_tokens = upto = min(row.start + row.n - row.n_draft + accepted, len(request.tokens))
        self.kv.cache_blocks(request, upto)
        if upto < row.start + row.n and row.n_draft:
            request.num_scheduled_tokens = upto
            self.kv.trim(request, upto)
        if self._pending.owners:
            self._pending.remove(request, first, upto)
        if first < request.num_prompt_tokens:
            prompt = min(upto, request.num_prompt_tokens) - first
            self._count.prompt_tokens += prompt
            if request.num_preemptions:
                self._count.recomputed_prompt_tokens += prompt
        self.on_computed(request, upto - first)

    def _take_drawn(self, request: Request, row: Row, tokens: list[int], logprobs: list[TokenLogprobs] | None) -> EngineOutput:
        """Known tokens grow by what was drawn, up to the first that ends the request."""
        params, constraint = request.params, request.constraint
        reason: FinishReason | None = None
        error = None if constraint is None else constraint.error
        if error is not None:  # there was no mask to draw under
            reason, tokens = FinishReason.ERROR, tokens[:0]
        emitted: list[int] = []
        for token in tokens:
            request.tokens.append(token)
            self._count.generation_tokens += 1
            if token in params.stop_token_ids or token in self.context.eos_token_ids:
                reason = FinishReason.STOP
                break
            emitted.append(token)
            if constraint is not None:
                constraint.advance((token,))
                error = constraint.error
                if error is not None or constraint.is_finished:
                    reason = FinishReason.STOP if error is None else FinishReason.ERROR
                    break
            if request.num_output_tokens >= params.max_tokens:
                reason = FinishReason.LENGTH
                break
        accepted = max(0, len(tokens) - 1)
        self._computed(request, row, accepted)
        if row.n_draft:
            self._drafting.verified(request, row.n_draft, accepted)
        generated = request.num_output_tokens
        if reason is not None:
            self._mean_output += 0.1 * (generated - self._mean_output)
            self._finish(request)
        return EngineOutput(
            request.request_id,
            emitted,
            reason,
            generated,
            min(request.num_cached_tokens, request.num_prompt_tokens),
            None if logprobs is None else logprobs[: len(emitted)],
            error,
        )

    # --- leaving ------------------------------------------------------------------------------------------------------

    def _finish(self, request: Request) -> None:
        self._release(request)
        request.status = RequestStatus.FINISHED
        self._drafting.forget(request)

    def preempt(self, request: Request) -> None:
        """Take a running request's room between two steps; it starts over later, from what is then still cached."""
        self._release(request)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self._count.num_preemptions += 1
        self.waiting[request.request_id] = request
        self.waiting.move_to_end(request.request_id, last=False)

    def _release(self, request: Request) -> None:
        """A request runs no longer, and gives back what it holds as soon as no step in flight uses it."""
        self._pending.remove(request, request.num_computed_tokens)
        request.draft = []
        del self.running[request.request_id]
        if request.is_in_flight:
            self.leaving[request.request_id] = request
        else:
            self._give_back(request)

    def _give_back(self, request: Request) -> None:
        assert request.slot is not None
        self.kv.free(request, keep=True)
        heapq.heappush(self._slots, request.slot)
        self._freed_slots.append(request.slot)
        request.slot = None
        request.num_computed_tokens = request.num_scheduled_tokens = 0

    # --- books --------------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        return self._count.stats(len(self.running), len(self.waiting), self.kv.stats().usage, self._drafting)

    def check_integrity(self) -> None:
        """Verify slots, the cache's books, what is in flight and what is being computed. For tests, after every step.

        Raises:
            AssertionError: what does not add up.
        """
        self.kv.check_integrity()
        assert not (self.running.keys() & self.leaving.keys()), "a request runs and leaves at once"
        holders = [*self.running.values(), *self.leaving.values()]
        used = sorted(r.slot for r in holders if r.slot is not None)
        assert sorted([*self._slots, *used]) == list(range(self._max_num_seqs)), "slots leaked"
        assert not (self.running.keys() & self.waiting.keys()), "a request runs and waits at once"
        assert set(self._pending.owners.values()) <= self.running.keys(), "a gone request still counts as computing"
        assert all(r.is_in_flight for r in self.leaving.values()), "a request leaves though no step uses it any more"
        rows = [(request, row) for plan, requests in self._planned for request, row in zip(requests, plan.rows, strict=True)]
        for request in holders:
            own = [row for other, row in rows if other is request]
            assert request.num_scheduled_tokens - request.num_computed_tokens == sum(row.n for row in own), "rows were lost"
            assert request.num_in_flight == sum(row.sample for row in own), "sampled tokens were lost"
            assert request.num_output_tokens + request.num_in_flight <= request.params.max_tokens, "too many tokens planned"
