"""A backend without a model whose cache is real: what it answers depends on every cell it reads.

Each cell holds a state that mixes the token of its position with the state of the position before, read through the cache.
A wrong copy, a wrong block or a missed token therefore changes everything that follows, as it would in a model, while a
step costs microseconds. Plugin authors use it to test schedulers; InferFlux uses it to load the server alone.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from inferflux_core.engine.sampling import Logits, Sampler, gumbel_noise
from inferflux_core.engine.types import (
    ModelRunnerOutput,
    Row,
    SamplingParams,
    SchedulerOutput,
    TokenLogprobs,
)
from inferflux_core.errors import ModelFileError
from inferflux_core.interfaces import (
    Backend,
    Capabilities,
    EngineConfig,
    GrammarMask,
    KVCacheSpec,
    ModelFiles,
    ModelInfo,
    ModelRunner,
    ModelSource,
    SourceContext,
    Ticket,
    Tokenizer,
)
from inferflux_core.testing.fake_memory import FakeMemory, FlightGuard
from inferflux_core.testing.fake_settings import FakeSettings

BOS, EOS, IM_START, IM_END = 256, 257, 258, 259
_SPECIAL = {BOS: "<s>", EOS: "</s>", IM_START: "<|im_start|>", IM_END: "<|im_end|>"}
VOCAB_SIZE = 260
_MASK = (1 << 61) - 1
_LETTERS = b"etaoin shrdlu cmfwypvbgkjqxz"

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class FakeSource(ModelSource):
    """`fake`, or `fake:anything` for several."""

    def matches(self, ref: str) -> bool:
        return ref == "fake" or ref.startswith("fake:")

    def resolve(self, ref: str, context: SourceContext) -> ModelFiles:
        return ModelFiles(ref=ref, format="fake", paths=())


class FakeTokenizer(Tokenizer):
    """One token a byte, and four control tokens."""

    vocab_size = VOCAB_SIZE
    eos_token_ids = frozenset({EOS, IM_END})
    bos_token = "<s>"  # noqa: S105
    eos_token = "</s>"  # noqa: S105
    chat_template = CHAT_TEMPLATE
    special_tokens = frozenset(_SPECIAL.values())

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        ids = [BOS] if add_special else []
        return ids + (self._parse(text) if parse_special else list(text.encode()))

    def _parse(self, text: str) -> list[int]:
        for token, name in _SPECIAL.items():
            if name in text:
                before, after = text.split(name, 1)
                return [*self._parse(before), token, *self._parse(after)]
        return list(text.encode())

    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        if token_id < 256:
            return bytes([token_id])
        return _SPECIAL[token_id].encode() if special else b""


class FakeBackend(Backend):
    """Serves the format `fake`."""

    formats: ClassVar[tuple[str, ...]] = ("fake",)

    def __init__(self, settings: FakeSettings | None = None) -> None:
        self._settings = settings or FakeSettings()

    def validate(self, files: ModelFiles) -> None:
        if files.paths:
            raise ModelFileError(f"the fake backend has no use for files, but {files.ref!r} names some")

    def tokenizer(self, files: ModelFiles) -> Tokenizer:
        return FakeTokenizer()

    def runner(self, files: ModelFiles, config: EngineConfig) -> ModelRunner:
        time.sleep(self._settings.load_s)
        return FakeRunner(self._settings, config)


@dataclass(slots=True)
class _FakeTicket(Ticket):
    number: int
    began: float
    ready_at: float = 0.0
    sampled: bool = False
    mask: GrammarMask | None = None
    states: list[list[int]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    logprobs: list[list[TokenLogprobs] | None] = field(default_factory=list)


class FakeRunner(ModelRunner):
    """Computes states instead of tensors.

    With `depth` 2 it computes a step when that step is collected, and not before: nothing can be read earlier, tokens that were
    not drawn yet are taken from the step before, and a `FlightGuard` watches the cache.
    """

    def __init__(self, settings: FakeSettings, config: EngineConfig) -> None:
        self._settings = settings
        max_model_len = min(config.max_model_len or settings.max_model_len, settings.max_model_len)
        if settings.layout == "paged":
            max_model_len = min(max_model_len, (settings.num_blocks - 1) * settings.block_size)
        elif settings.pool_tokens is not None:
            max_model_len = min(max_model_len, settings.pool_tokens)
        self.model_info = ModelInfo(
            vocab_size=VOCAB_SIZE, max_model_len=max_model_len, eos_token_ids=FakeTokenizer.eos_token_ids
        )
        self.kv_cache_spec = KVCacheSpec(
            layout=settings.layout,
            block_size=settings.block_size,
            num_blocks=settings.num_blocks,
            num_streams=settings.num_streams or config.max_num_seqs,
            stream_tokens=max_model_len,
            pool_tokens=settings.pool_tokens,
            can_trim=settings.can_trim,
        )
        self.caps = Capabilities(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            depth=settings.depth,
            max_draft=settings.max_draft if settings.can_trim else 0,
            grammar=True,
        )
        self._memory = FakeMemory(settings, self._mix)
        self._guard = FlightGuard(settings.block_size) if settings.depth > 1 else None
        self._launched: deque[_FakeTicket] = deque()
        self._numbers = itertools.count()
        self._last_token: dict[int, tuple[int, int]] = {}  # slot -> (number of the step that drew it, token)
        self._idle_at = self._collected_at = 0.0
        self._sampler = Sampler(VOCAB_SIZE, self.model_info.eos_token_ids)
        # slot -> whether it may end, for sequences that are nothing but greedy: they need no logits
        self._plain: dict[int, bool] = {}

    def warm_up(self) -> None:
        """Nothing to warm."""

    def launch(self, plan: SchedulerOutput) -> Ticket:
        ticket = _FakeTicket(plan, next(self._numbers), time.perf_counter())
        if self._guard is None:
            self._forward(ticket)
        else:
            assert not self._launched or self._launched[-1].sampled, "a step was launched before the last one was sampled"
            self._guard.launch(plan)
            self._launched.append(ticket)
            assert len(self._launched) <= self.caps.depth, f"{len(self._launched)} steps are in flight"
        # The device takes one step after the other.
        self._idle_at = max(time.perf_counter(), self._idle_at)
        self._idle_at += (self._settings.step_ms + self._settings.token_ms * plan.num_tokens) / 1e3
        ticket.ready_at = self._idle_at
        return ticket

    def _forward(self, ticket: _FakeTicket) -> None:
        plan = ticket.plan
        for slot in plan.free:
            self._sampler.free(slot)
            self._memory.tables.pop(slot, None)
        for init in plan.start:
            self._sampler.start(init)
            self._memory.tables.pop(init.slot, None)
            self._last_token.pop(init.slot, None)
            self._plain.pop(init.slot, None)
            if _is_plain(init.params):
                self._plain[init.slot] = not init.params.ignore_eos
        for row in plan.rows:
            self._memory.apply(row)
        ticket.states = [self._memory.compute(row, self._input(ticket, row)) for row in plan.rows]

    def _input(self, ticket: _FakeTicket, row: Row) -> Sequence[int]:
        if row.tokens is not None:
            assert len(row.tokens) == row.n
            return row.tokens
        assert row.n == 1, "only one token can be on the device"
        assert row.slot in self._last_token, f"nothing was sampled for slot {row.slot} yet"
        number, token = self._last_token[row.slot]
        assert number == ticket.number - 1, f"the step before sampled nothing for slot {row.slot}"
        return [token]

    def _mix(self, state: int, token: int) -> int:
        if token == self._settings.crash_token:
            os.kill(os.getpid(), signal.SIGKILL)
        if token == self._settings.hang_token:
            threading.Event().wait()
        return ((state ^ (token + 1)) * 0x9E3779B97F4A7C15 + 0x7F4A7C15) & _MASK

    def sample(self, ticket: Ticket, mask: GrammarMask | None) -> None:
        assert isinstance(ticket, _FakeTicket)
        ticket.sampled, ticket.mask = True, mask
        if self._guard is None:
            self._draw_all(ticket)

    def _draw_all(self, ticket: _FakeTicket) -> None:
        for row, states in zip(ticket.plan.rows, ticket.states, strict=True):
            if row.sample:
                tokens, logprobs = self._draw(row, states, ticket.mask)
                self._last_token[row.slot] = (ticket.number, tokens[-1])
                ticket.tokens.append(tokens)
                ticket.logprobs.append(logprobs)

    def _draw(self, row: Row, states: list[int], mask: GrammarMask | None) -> tuple[list[int], list[TokenLogprobs] | None]:
        may_end = self._plain.get(row.slot)
        first = None if mask is None else mask.first.get(row.slot)
        draft = row.tokens[row.n - row.n_draft :] if row.n_draft and row.tokens is not None else ()
        if may_end is not None and first is None:
            best = [_favourite(state, may_end) for state in states]
            return best[: 1 + _num_accepted(best, draft)], None
        bits = None if mask is None or first is None else mask.bits[first : first + len(states)]
        position = row.start + row.n - row.n_draft
        return self._sampler.sample_row(row.slot, position, [self._logits(row.slot, s) for s in states], draft, bits)

    def _logits(self, slot: int, state: int) -> Logits:
        logits = gumbel_noise(state, 0, np.arange(VOCAB_SIZE))
        logits[128:256] = -20.0  # no broken UTF-8 out of nowhere
        logits[EOS] = logits[BOS] = logits[IM_START] = logits[IM_END] = -20.0
        logits[_favourite(state, self._plain.get(slot) is not False)] = float(logits.max()) + 0.5
        return logits

    def collect(self, ticket: Ticket) -> ModelRunnerOutput:
        assert isinstance(ticket, _FakeTicket)
        if self._guard is not None:
            assert ticket is self._launched.popleft(), "steps are collected in the order of their launch"
            assert ticket.sampled, "a step was collected before it was sampled"
            self._forward(ticket)
            self._draw_all(ticket)
            self._guard.collect()
        wait = ticket.ready_at - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        now = time.perf_counter()
        began, self._collected_at = max(ticket.began, self._collected_at), now
        return ModelRunnerOutput(ticket.plan.step, ticket.tokens, ticket.logprobs, (now - began) * 1e3)

    def close(self) -> None:
        self._launched.clear()
        self._memory = FakeMemory(self._settings, self._mix)


def _num_accepted(tokens: Sequence[int], draft: Sequence[int]) -> int:
    """How many tokens of a draft were drawn, up to the first that was not."""
    return next((i for i, guess in enumerate(draft) if tokens[i] != guess), len(draft))


def _favourite(state: int, may_end: bool) -> int:
    """The greedy token: a letter, or once in about 64 the end."""
    if may_end and (state >> 20) % 64 == 0:
        return IM_END
    return _LETTERS[(state >> 32) % len(_LETTERS)]


def _is_plain(params: SamplingParams) -> bool:
    return params == SamplingParams(
        max_tokens=params.max_tokens,
        temperature=0.0,
        seed=params.seed,
        stop_token_ids=params.stop_token_ids,
        ignore_eos=params.ignore_eos,
    )
