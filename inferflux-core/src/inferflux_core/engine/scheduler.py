"""The token-budget scheduler: no prefill phase, no decode phase.

Every step lets each sequence's computed tokens catch up with its known tokens. Chunked prefill, prefix hits and resuming
after preemption are that one rule. Running sequences come first, then the waiting ones, within one budget of tokens.
"""

from __future__ import annotations

import heapq
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from inferflux_core.engine.cost_model import StepCostModel
from inferflux_core.engine.kv.manager import KVCacheManager, PrefixMatch
from inferflux_core.engine.request import BlockHash, Request, RequestStatus
from inferflux_core.engine.types import (
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

# No chunk is cut below this, and no remainder is left below it: every chunk costs a pass over the weights.
_MIN_CHUNK = 32
# Context, in prefill tiles, from which on a chunk smaller than a tile is slower than a whole one.
_DEEP_TILES = 4
# Waiting requests that may be passed over in one step because a running one is computing what they need.
_HOLD_WINDOW = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerContext:
    """What a scheduler is made from."""

    config: EngineConfig
    caps: Capabilities
    kv: KVCacheManager
    eos_token_ids: frozenset[int]
    cost_model: StepCostModel = field(default_factory=StepCostModel)


@dataclass(slots=True)
class _Counters:
    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    recomputed_prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    step_tokens: int = 0
    schedule_seconds: float = 0.0
    model_seconds: float = 0.0


class TokenBudgetScheduler(Scheduler):
    """Continuous batching with chunked prefill (Orca, OSDI '22; Sarathi-Serve, OSDI '24).

    Two questions are left to subclasses: `pop_waiting()`, who is next, and `pick_victim()`, who makes room. As they stand
    they give first come, first served.

    Attributes:
        waiting: requests without a slot, by id, in order of arrival; preempted ones at the front.
        running: requests with a slot, by id, in order of admission.
    """

    def __init__(self, context: SchedulerContext) -> None:
        self.context = context
        self.kv = context.kv
        self.waiting: OrderedDict[str, Request] = OrderedDict()
        self.running: dict[str, Request] = {}
        self._max_num_seqs = min(context.config.max_num_seqs, context.caps.max_num_seqs)
        self._max_tokens = min(context.config.max_num_batched_tokens, context.caps.max_num_batched_tokens)
        # One token more than a tile, since backends that run equal numbers of tokens of all sequences in one pass put the
        # first token of a chunk into the pass of the decodes.
        self._min_chunk = min(max(_MIN_CHUNK, context.caps.prefill_tile + 1), max(1, self._max_tokens // 4))
        self._slots = list(range(self._max_num_seqs))
        self._freed_slots: list[int] = []
        self._scheduled: list[Request] = []
        self._started: list[str] = []
        # Blocks that a running sequence will compute, and which one: what waiting requests with the same prefix wait for.
        self._computing: dict[BlockHash, str] = {}
        self._mean_output = 64.0
        self._count = _Counters()

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

    def add_request(self, request: EngineRequest) -> None:
        if request.request_id in self.waiting or request.request_id in self.running:
            raise ValueError(f"request id {request.request_id!r} is in use")
        self.waiting[request.request_id] = Request.of(request)

    def abort(self, request_ids: Sequence[str]) -> list[str]:
        aborted = []
        for request_id in request_ids:
            request = self.running.get(request_id)
            if request is not None:
                self._finish(request)
            elif (request := self.waiting.pop(request_id, None)) is not None:
                request.status = RequestStatus.FINISHED
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
        plan = SchedulerOutput(step=self._count.steps, rows=[], num_tokens=0)
        self._scheduled = []
        preemptions = self._count.preemptions
        decodes: list[Request] = []
        prefills: list[Request] = []
        for request in self.running.values():
            (decodes if request.num_pending == 1 else prefills).append(request)
        self._schedule_running(plan, decodes, self._max_tokens)
        chunk = self._chunk_budget(plan)
        chunk -= self._schedule_running(plan, prefills, chunk)
        if self._count.preemptions == preemptions:
            # After a preemption the victim would get back the room that was just taken from it.
            self._admit_waiting(plan, chunk)
        elif plan.rows:
            plan.rows[0].kv = self.kv.carry_over(plan.rows[0].kv)
        self._count.schedule_seconds += time.perf_counter() - began
        if not plan.rows:
            return None
        plan.free, self._freed_slots = self._freed_slots, []
        return plan

    def _schedule_running(self, plan: SchedulerOutput, requests: list[Request], budget: int) -> int:
        """Give running requests what the budget allows; returns the tokens used."""
        used = 0
        for request in requests:
            n = self._cut(plan, request.num_pending, budget - used)
            if not n:
                break
            if request.status is not RequestStatus.RUNNING:
                continue  # it was preempted for an earlier one
            ops = self._allocate_or_preempt(plan, request, request.num_computed_tokens + n)
            if ops is not None:
                self._add_row(plan, request, n, ops)
                used += n
        return used

    def _cut(self, plan: SchedulerOutput, pending: int, budget: int) -> int:
        """Tokens to compute of those pending: all, or a chunk that neither is nor leaves a sliver; 0 means not now.

        Every chunk costs a pass over the weights, so the budget may be exceeded a little to spare one.
        """
        room = self._max_tokens - plan.num_tokens
        if budget <= 0 or room <= 0:
            return 0
        if pending < budget + self._min_chunk and pending <= room:
            return pending
        if budget < self._min_chunk and plan.rows:
            return 0
        return min(pending, budget, room)

    def _allocate_or_preempt(self, plan: SchedulerOutput, request: Request, upto: int) -> KVOps | None:
        while (ops := self.kv.allocate_slots(request, upto)) is None:
            victim = self.pick_victim()
            self._drop_row(plan, victim)
            self.preempt(victim)
            if victim is request:
                return None
        return ops

    def _drop_row(self, plan: SchedulerOutput, request: Request) -> None:
        """Take a request that is about to be preempted out of the plan again."""
        for i, scheduled in enumerate(self._scheduled):
            if scheduled is request:
                plan.num_tokens -= plan.rows[i].n
                self.kv.cancel(plan.rows[i].kv)
                del self._scheduled[i], plan.rows[i]
                return

    def _chunk_budget(self, plan: SchedulerOutput) -> int:
        """Tokens of prefill this step may compute beside its decodes."""
        room = self._max_tokens - plan.num_tokens
        target = self.context.config.itl_target_ms
        if not plan.rows or target is None:
            return room
        kv_tokens = sum(row.start for row in plan.rows)
        depth = max((r.num_computed_tokens for r in self.running.values() if r.num_pending > 1), default=0)
        return self.context.cost_model.max_prefill(len(plan.rows), kv_tokens, target, min(self._min_chunk, room), room, depth)

    def _admit_waiting(self, plan: SchedulerOutput, budget: int) -> None:
        """Start waiting requests while there are slots, budget and room."""
        passed_over: list[Request] = []
        while budget > 0 and self.waiting and self._slots and len(passed_over) < _HOLD_WINDOW:
            request = self.pop_waiting()
            match = self._aligned(request, self.kv.get_computed_blocks(request))
            if self._is_being_computed(request, match.num_tokens):
                passed_over.append(request)
                continue
            n = self._cut(plan, len(request.tokens) - match.num_tokens, budget)
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

    def _aligned(self, request: Request, match: PrefixMatch) -> PrefixMatch:
        """A shorter match, when computing a whole tile takes less time than a smaller chunk deep in the context.

        Measured with llama.cpp on a CPU, 1,000 tokens deep: 63 tokens take 806 ms, 64 take 239 ms.
        """
        tile = self.context.caps.prefill_tile
        pending = len(request.tokens) - match.num_tokens
        if tile > 1 and tile // 3 <= pending <= tile and match.num_tokens > _DEEP_TILES * tile and self.kv.can_trim:
            return replace(match, num_tokens=len(request.tokens) - tile - 1)
        return match

    def _is_being_computed(self, request: Request, num_cached: int) -> bool:
        """Whether a running request is about to compute the next blocks of this one: then waiting and copying is cheaper."""
        if not self._computing:
            return False
        size = self.kv.block_size
        hashes = request.block_hashes(size, len(request.tokens) - 1)
        pending = 0
        for block_hash in hashes[num_cached // size :]:
            if block_hash not in self._computing:
                break
            pending += size
        return pending >= max(self.kv.min_shared_tokens or 0, _MIN_CHUNK)

    def _start(self, request: Request, match: PrefixMatch, n: int) -> KVOps | None:
        """Room for the first n tokens, if the whole request is likely to fit beside those that run."""
        if self.running:
            to_come = min(request.params.max_tokens, int(self._mean_output))
            if len(request.tokens) - match.num_held + to_come > self.kv.free_tokens():
                return None
        return self.kv.allocate_slots(request, match.num_tokens + n, match)

    def _admit(self, plan: SchedulerOutput, request: Request, num_cached: int) -> None:
        self._count.prefix_queries += 1
        self._count.prefix_hits += num_cached > 0
        if not request.started:
            request.started = True
            request.num_cached_tokens = num_cached
            self._count.cached_prompt_tokens += num_cached
            self._started.append(request.request_id)
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = num_cached
        request.slot = heapq.heappop(self._slots)
        self.running[request.request_id] = request
        if self.kv.min_shared_tokens is not None:
            size = self.kv.block_size
            for block_hash in request.block_hashes(size)[num_cached // size :]:
                self._computing.setdefault(block_hash, request.request_id)
        plan.start.append(SequenceInit(request.slot, request.params, request.tokens[:], request.num_prompt_tokens))

    def _add_row(self, plan: SchedulerOutput, request: Request, n: int, ops: KVOps) -> None:
        assert request.slot is not None
        start = request.num_computed_tokens
        tokens = request.tokens
        plan.rows.append(
            Row(
                slot=request.slot,
                start=start,
                n=n,
                tokens=tokens[start : start + n],
                n_draft=0,
                sample=start + n == len(tokens),
                kv=ops,
            )
        )
        plan.num_tokens += n
        self._scheduled.append(request)

    # --- taking in a step ---------------------------------------------------------------------------------------------

    def update_from_output(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> list[EngineOutput]:
        began = time.perf_counter()
        self._observe(plan, output.device_ms)
        outputs: list[EngineOutput] = []
        sampled = iter(zip(output.tokens, output.logprobs, strict=True))
        for request, row in zip(self._scheduled, plan.rows, strict=True):
            tokens, logprobs = next(sampled) if row.sample else ([], None)
            if request.status is not RequestStatus.RUNNING:
                continue  # aborted while the step ran
            self._computed(request, row)
            if tokens:
                outputs.append(self._append(request, tokens, logprobs))
        self._scheduled = []
        self._count.steps += 1
        self._count.schedule_seconds += time.perf_counter() - began
        return outputs

    def _observe(self, plan: SchedulerOutput, milliseconds: float) -> None:
        num_decode = kv_tokens = prefill_attention = 0
        for row in plan.rows:
            if row.n == 1:
                num_decode += 1
                kv_tokens += row.start
            else:
                prefill_attention += row.n * row.start
        self.context.cost_model.observe(plan.num_tokens - num_decode, num_decode, kv_tokens, milliseconds, prefill_attention)
        self._count.step_tokens += plan.num_tokens
        self._count.model_seconds += milliseconds / 1e3

    def _computed(self, request: Request, row: Row) -> None:
        first = request.num_computed_tokens
        request.num_computed_tokens = first + row.n
        self.kv.cache_blocks(request, request.num_computed_tokens)
        if self._computing:
            size = self.kv.block_size
            self._no_longer_computing(request, first // size, request.num_computed_tokens // size)
        if first < request.num_prompt_tokens:
            prompt = min(request.num_computed_tokens, request.num_prompt_tokens) - first
            self._count.prompt_tokens += prompt
            if request.num_preemptions:
                self._count.recomputed_prompt_tokens += prompt
        self.on_computed(request, row.n)

    def _append(self, request: Request, tokens: list[int], logprobs: list[TokenLogprobs] | None) -> EngineOutput:
        """Known tokens grow by what was drawn, up to the first that ends the request."""
        params = request.params
        reason: FinishReason | None = None
        emitted: list[int] = []
        for token in tokens:
            request.tokens.append(token)
            self._count.generation_tokens += 1
            if token in params.stop_token_ids or token in self.context.eos_token_ids:
                reason = FinishReason.STOP
                break
            emitted.append(token)
            if request.num_output_tokens >= params.max_tokens:
                reason = FinishReason.LENGTH
                break
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
        )

    # --- leaving ------------------------------------------------------------------------------------------------------

    def _finish(self, request: Request) -> None:
        self._release(request)
        request.status = RequestStatus.FINISHED

    def preempt(self, request: Request) -> None:
        """Take a running request's room between two steps; it starts over later, from what is then still cached."""
        self._release(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self._count.preemptions += 1
        self.waiting[request.request_id] = request
        self.waiting.move_to_end(request.request_id, last=False)

    def _release(self, request: Request) -> None:
        assert request.slot is not None
        self.kv.free(request, keep=True)
        self._no_longer_computing(request, request.num_computed_tokens // self.kv.block_size, None)
        del self.running[request.request_id]
        heapq.heappush(self._slots, request.slot)
        self._freed_slots.append(request.slot)
        request.slot = None

    def _no_longer_computing(self, request: Request, first_block: int, upto_block: int | None) -> None:
        for block_hash in request.hashes[first_block:upto_block]:
            if self._computing.get(block_hash) == request.request_id:
                del self._computing[block_hash]

    # --- books --------------------------------------------------------------------------------------------------------

    def stats(self) -> EngineStats:
        count = self._count
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_cache_usage=self.kv.stats().usage,
            num_steps=count.steps,
            num_preemptions=count.preemptions,
            prompt_tokens=count.prompt_tokens,
            cached_prompt_tokens=count.cached_prompt_tokens,
            recomputed_prompt_tokens=count.recomputed_prompt_tokens,
            generation_tokens=count.generation_tokens,
            prefix_cache_queries=count.prefix_queries,
            prefix_cache_hits=count.prefix_hits,
            step_tokens=count.step_tokens,
            schedule_seconds=count.schedule_seconds,
            model_seconds=count.model_seconds,
        )

    def check_integrity(self) -> None:
        """Verify slots, the cache's books and what is registered as being computed. For tests, after every step.

        Raises:
            AssertionError: what does not add up.
        """
        self.kv.check_integrity()
        used = sorted(r.slot for r in self.running.values() if r.slot is not None)
        assert sorted([*self._slots, *used]) == list(range(self._max_num_seqs)), "slots leaked"
        assert not (self.running.keys() & self.waiting.keys()), "a request runs and waits at once"
        assert set(self._computing.values()) <= self.running.keys(), "a gone request still counts as computing"
