"""The engine's vocabulary: what a step is made of, and what crosses between server and engine process.

This module holds data only and imports nothing of InferFlux, so every layer may use it. Hot, mutable objects are slotted
dataclasses that never leave the engine process; messages are frozen msgspec structs. Names are vLLM v1's where it has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class FinishReason(StrEnum):
    """Why a request ended. The values are OpenAI's where OpenAI has one."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one sequence are drawn. Validated at the edge; the engine trusts it.

    Attributes:
        max_tokens: most tokens to generate; at least 1.
        min_tokens: end-of-sequence and stop tokens cannot be drawn before this many tokens.
        temperature: 0 means greedy; so does anything below 1e-5.
        top_p: smallest set of tokens whose probability reaches it; 1 means off.
        top_k: number of most likely tokens to keep; 0 means off.
        min_p: least probability relative to the most likely token; 0 means off.
        repetition_penalty: divides (multiplies negative) logits of tokens seen in prompt or output (CTRL, arXiv 1909.05858).
        frequency_penalty: subtracted once for each occurrence in the output (OpenAI).
        presence_penalty: subtracted once if the token occurs in the output (OpenAI).
        logit_bias: token id to addend.
        seed: key of the noise; the same seed gives the same draw whatever else is in the batch.
        stop_token_ids: tokens that end the sequence beside the model's own.
        ignore_eos: end-of-sequence tokens are never drawn, so the output runs to max_tokens (as in llama.cpp).
        logprobs: number of alternatives to report with each token; None reports nothing, 0 only the token drawn.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    logprobs: int | None = None

    @property
    def is_penalised(self) -> bool:
        """Whether a draw depends on which tokens were drawn before it, and not only on their number."""
        return self.repetition_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probability of a drawn token under the model's raw distribution, with the most likely alternatives.

    Attributes:
        logprob: natural logarithm, of the token drawn.
        top: (token id, logprob), most likely first; as many as `SamplingParams.logprobs` asked for.
    """

    logprob: float
    top: list[tuple[int, float]]


# --- what crosses between server and engine process -------------------------------------------------------------------


class Thinking(msgspec.Struct, frozen=True, kw_only=True):
    """The thoughts that a reasoning model may put before its answer.

    Attributes:
        is_open: the prompt ends within them.
        begin, end: the tags around them, as text.
        budget: most tokens of them; None for any number.
        end_token_ids: what is forced when the budget is used up; not empty when there is a budget.
    """

    is_open: bool
    begin: str
    end: str
    budget: int | None = None
    end_token_ids: list[int] = []


class Constraint(msgspec.Struct, frozen=True, kw_only=True):
    """What the output of a sequence must be. If it cannot be held, the sequence ends with an error.

    Attributes:
        grammar: a grammar of llguidance, as Lark or as JSON; "" for none. It begins after the thoughts.
        thinking: where the thoughts end; None if there are none.
    """

    grammar: str = ""
    thinking: Thinking | None = None


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate.

    Attributes:
        request_id: unique among live requests.
        prompt_token_ids: at least one token; prompt and max_tokens fit into max_model_len.
        cache_salt: prefixes are shared only among equal salts (the principal's tenant).
        tenant: whose service the fair scheduler counts.
        priority: lower is served earlier, as in vLLM; 0 is normal.
        arrival_time: `time.monotonic()` of the server process; the clock is the machine's.
        constraint: what its output must be; None for anything.
        num_speculative_tokens: most draft tokens of one step; None leaves it to the engine, 0 turns speculation off.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    cache_salt: str = ""
    tenant: str = ""
    priority: int = 0
    arrival_time: float = 0.0
    constraint: Constraint | None = None
    num_speculative_tokens: int | None = None


class EngineOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one step brought to one request.

    Attributes:
        token_ids: tokens drawn in this step, in order; the stop token that ended the request is not among them.
        finish_reason: set on the last output of the request.
        num_generated: tokens drawn so far, a final stop token included: what usage reports.
        num_cached_tokens: prompt tokens that came from the prefix cache.
        logprobs: one entry per token when asked for.
        error: with `FinishReason.ERROR`, what could not be done, for the client; None if it is nobody's business.
    """

    request_id: str
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    num_generated: int = 0
    num_cached_tokens: int = 0
    logprobs: list[TokenLogprobs] | None = None
    error: str | None = None


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and monotonic counters of one engine since its start.

    Attributes:
        spec_drafts: rows that carried draft tokens of the proposer.
        spec_draft_tokens, spec_accepted_tokens: draft tokens of the proposer that were verified, and those that held.
        spec_draft_tokens_per_pos, spec_accepted_tokens_per_pos: the same by position in the draft, first to last.
        forced_tokens: tokens that a grammar left no choice about, computed together with the token before them.
        draft_seconds: spent proposing.
        mask_seconds: spent on the masks of grammars, as far as they were not made while the model computed.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_steps: int = 0
    num_preemptions: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    recomputed_prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    step_tokens: int = 0
    schedule_seconds: float = 0.0
    model_seconds: float = 0.0
    spec_drafts: int = 0
    spec_draft_tokens: int = 0
    spec_accepted_tokens: int = 0
    spec_draft_tokens_per_pos: list[int] = []
    spec_accepted_tokens_per_pos: list[int] = []
    forced_tokens: int = 0
    draft_seconds: float = 0.0
    mask_seconds: float = 0.0


# --- one step, inside the engine process ------------------------------------------------------------------------------


@dataclass(slots=True, frozen=True)
class PagedOps:
    """Blocks appended to the sequence's block table in this step."""

    new_blocks: Sequence[int] = ()


@dataclass(slots=True, frozen=True)
class SequenceOps:
    """What a library that owns its cells does before computing the row.

    Attributes:
        stream: the library's own sequence id that holds this sequence's cells.
        copy_from: stream to copy from first, as a whole; None for no copy.
        keep_len: positions to keep after the copy, everything from here on is removed; None leaves the stream alone.
        clear: other streams whose cells are dropped first, to make room in a shared pool.
    """

    stream: int
    copy_from: int | None = None
    keep_len: int | None = None
    clear: tuple[int, ...] = ()


KVOps = PagedOps | SequenceOps


@dataclass(slots=True)
class Row:
    """One sequence in one step: compute positions [start, start + n).

         cached or computed before      this step          later
        |------------------------------|-----------------|--------------|
        0                            start           start + n     len(tokens)

    Attributes:
        slot: dense index below max_num_seqs, stable while the sequence runs.
        tokens: the n known tokens; None means one token, the one that the ticket launched before this one samples for the
            slot, which only the device knows yet (`Capabilities.depth` 2).
        n_draft: trailing tokens of the row to verify: a token is sampled at each of them, and at the one before them.
        sample: False for inner prefill chunks, whose logits nobody needs.
        kv: cache operations to apply before the forward pass.
    """

    slot: int
    start: int
    n: int
    tokens: Sequence[int] | None
    n_draft: int
    sample: bool
    kv: KVOps


class ConstraintState(Protocol):
    """Where a constrained sequence stands in what its output must be. Engine thread only, but for `fill`.

    Attributes:
        is_finished: nothing may follow: the sequence is complete.
        error: why the constraint cannot be held any longer, for the client; None if it can.
    """

    @property
    def is_finished(self) -> bool: ...
    @property
    def error(self) -> str | None: ...

    def forced(self, at_most: int) -> list[int]:
        """Tokens that must come next, since nothing else may; often none."""

    def allowed(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft may come next, one after the other."""

    def advance(self, tokens: Sequence[int]) -> None:
        """These tokens were drawn. Sets `is_finished` or `error` where that ends the sequence."""


@dataclass(slots=True)
class SequenceInit:
    """A sequence that gets a slot in this step: the sampler's state begins with these tokens.

    Attributes:
        tokens: prompt, and output so far when the sequence resumes after preemption.
        num_prompt_tokens: how many of them are the prompt.
    """

    slot: int
    params: SamplingParams
    tokens: Sequence[int]
    num_prompt_tokens: int


@dataclass(slots=True)
class SchedulerOutput:
    """The plan of one step: decodes first, then prefill chunks; a backend may batch the rows in any order.

    Attributes:
        step: its number; steps are launched, sampled and collected in this order.
        start: sequences that get a slot now.
        free: slots released since the last step; freed before the new ones start. No step in flight uses them.
        constraints: by slot, of the sampled rows that have one. Core makes the step's mask from them; runners ignore them.
    """

    step: int
    rows: list[Row]
    num_tokens: int
    start: list[SequenceInit] = field(default_factory=list)
    free: list[int] = field(default_factory=list)
    constraints: dict[int, ConstraintState] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class GrammarMask:
    """Which tokens the constrained rows of a step may draw. The others of the step may draw any.

    Attributes:
        bits: [N, (vocab_size + 31) // 32] int32; bit t % 32 of word t // 32 is set if token t may be drawn. Each row has at
            least one bit set.
        first: slot -> the row of `bits` for the first token that the slot's row samples; those for the tokens after its
            drafts follow, `n_draft + 1` in all.
    """

    bits: npt.NDArray[np.int32]
    first: Mapping[int, int]


@dataclass(slots=True)
class ModelRunnerOutput:
    """What one step computed.

    Attributes:
        tokens: for each row with `sample`, in the order of rows: the tokens sampled, up to the first that differs from the
            draft at its place. So these are the accepted drafts and one token more.
        logprobs: parallel to tokens; None for rows that did not ask.
        device_ms: time of the forward pass, which feeds the cost model.
    """

    step: int
    tokens: list[list[int]]
    logprobs: list[list[TokenLogprobs] | None]
    device_ms: float
