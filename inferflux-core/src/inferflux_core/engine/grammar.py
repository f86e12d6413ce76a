"""The constraints of one engine: grammars compiled aside and kept, and the masks of steps, made while the model computes."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLParserLimits

from inferflux_core.engine.grammar_state import GrammarState, Tags, Wear, Words
from inferflux_core.engine.thinking import Thoughts
from inferflux_core.engine.types import Constraint, ConstraintState, GrammarMask, SchedulerOutput, Thinking
from inferflux_core.engine.vocabulary import Vocabulary
from inferflux_core.interfaces import Tokenizer

logger = logging.getLogger("inferflux.engine")

# A mask that is expected to take less is made at once: to hand it to a thread and back costs about as much.
_INLINE_S = 100e-6
# Before anything was measured.
_ROW_S = 100e-6
# Tokens drawn under a grammar before it is compiled anew, long before the states of its patterns reach their limit.
_FRESH_TOKENS = 20_000
# What compiled grammars may take together, as far as can be told, beside the sequences that are running. A hostile pattern
# learns tens of megabytes in a hundred tokens, and a tenant may keep thousands of grammars.
_MAX_BYTES = 512 << 20
# Tags of thoughts come from the model's family, so there are few.
_MAX_TAGS = 32

_Digest = bytes


class GrammarError(ValueError):
    """A constraint that cannot be compiled. The message is for the client and repeats nothing of the constraint."""


def parser_limits() -> LLParserLimits:
    """What a grammar may cost: tens of milliseconds to build, as much for a mask, and 100 MB for the states of its patterns.

    Schemas of thousands of properties stay far below these, grammars in which everything is ambiguous do not.
    """
    return LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=100_000,
        step_max_items=10_000,
        max_lexer_states=50_000,
        max_grammar_size=500_000,
        precompute_large_lexemes=True,
        verbose_errors=False,
    )


@dataclass(frozen=True, slots=True)
class _Compiled:
    """A grammar at its beginning, to be copied."""

    matcher: LLMatcher
    wear: Wear


class PendingMask:
    """The mask of one step, on its way."""

    def __init__(self, mask: Future[GrammarMask | None] | GrammarMask | None) -> None:
        self._mask = mask

    def result(self) -> GrammarMask | None:
        """Wait for it; None if no row of the step is constrained after all."""
        return self._mask.result() if isinstance(self._mask, Future) else self._mask


class Grammars:
    """Compiles constraints in one thread and makes masks in another. Its methods are called by the engine thread only.

    The vocabulary is read in the compiling thread, from construction on; the first who needs it waits.

    Args:
        tokenizer: makes the model's tokenizer; called in that thread.
        vocab_size: width of the model's logits.
        eos_token_ids: tokens that end a sequence.
        cache_entries: compiled grammars kept for each salt, the least recently used goes first.
        cache_salts: salts whose grammars are kept.
    """

    def __init__(
        self,
        tokenizer: Callable[[], Tokenizer],
        vocab_size: int,
        eos_token_ids: frozenset[int],
        *,
        cache_entries: int = 128,
        cache_salts: int = 64,
    ) -> None:
        self._cache_entries, self._cache_salts = cache_entries, cache_salts
        self._cache: OrderedDict[str, OrderedDict[_Digest, _Compiled | GrammarError]] = OrderedDict()
        self._lock = threading.Lock()  # of the cache
        self._tags: OrderedDict[tuple[str, str], Tags] = OrderedDict()  # used by the compiling thread only
        self._limits = parser_limits()
        self._compiling = ThreadPoolExecutor(1, "inferflux-grammar")
        self._masking = ThreadPoolExecutor(1, "inferflux-mask")
        self._vocabulary = self._compiling.submit(Vocabulary, tokenizer, vocab_size, eos_token_ids)
        self._vocabulary.add_done_callback(_report)
        num_words = (vocab_size + 31) // 32
        # Two, as a device may still be reading the mask of the last step.
        self._buffers = [np.empty((0, num_words), dtype=np.int32) for _ in range(2)]
        self._row_seconds = _ROW_S

    # --- constraints --------------------------------------------------------------------------------------------------

    def compile(self, salt: str, constraint: Constraint) -> Future[ConstraintState]:
        """The state of a new sequence, soon. One that cannot be held has `error` set; the future never fails.

        Args:
            salt: what was compiled for one salt is found by the same salt only, not even by the time it takes.
        """
        if constraint.thinking is None and self._vocabulary.done() and self._vocabulary.exception() is None:
            kept = self._kept(salt, _digest(constraint.grammar))
            if isinstance(kept, _Compiled):
                at_once: Future[ConstraintState] = Future()
                at_once.set_result(GrammarState(self._vocabulary.result(), kept.matcher.deep_copy(), wear=kept.wear))
                return at_once
        return self._compiling.submit(self._state, salt, constraint)

    def _state(self, salt: str, constraint: Constraint) -> ConstraintState:
        try:
            vocabulary = self._vocabulary.result()
        except Exception:  # reported when it happened
            return _Refused("Structured output is not available: this model's vocabulary cannot be read.")
        try:
            answer, wear = None, Wear()
            if constraint.grammar:
                compiled = self._grammar(vocabulary, salt, constraint.grammar)
                answer, wear = compiled.matcher.deep_copy(), compiled.wear
            thinking = constraint.thinking
            if thinking is None:
                return GrammarState(vocabulary, answer, wear=wear)
            _check(vocabulary, thinking)
            return GrammarState(vocabulary, answer, Thoughts(thinking), self._tags_of(vocabulary, thinking), wear)
        except GrammarError as error:
            return _Refused(str(error))
        except BaseException as error:  # a panic of the library too: no sequence may run without its constraint
            logger.error("a constraint could not be compiled: %s", type(error).__name__)
            return _Refused("The required format could not be compiled.")

    def _grammar(self, vocabulary: Vocabulary, salt: str, grammar: str) -> _Compiled:
        """A grammar, kept or compiled now.

        Raises:
            GrammarError: it is wrong, or beyond the limits.
        """
        digest = _digest(grammar)
        kept = self._kept(salt, digest)
        if kept is None:
            began = time.perf_counter()
            try:
                matcher = self._compiled(vocabulary, grammar)
                kept = _Compiled(matcher, Wear(seconds=time.perf_counter() - began))
            except GrammarError as error:
                kept = GrammarError(str(error))  # what is kept must not hold on to the frames of this call
            self._keep(salt, digest, kept)
        if isinstance(kept, GrammarError):
            raise GrammarError(str(kept))  # an exception gathers the frames of each time that it is raised
        return kept

    def _compiled(self, vocabulary: Vocabulary, grammar: str) -> LLMatcher:
        matcher = LLMatcher(vocabulary.library, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # so that what it prepares is in every copy
        if matcher.is_error():
            raise GrammarError(
                "The required format could not be compiled for this model: it is malformed or too complex. "
                "Simplify the schema or grammar."
            )
        return matcher

    def _kept(self, salt: str, digest: _Digest) -> _Compiled | GrammarError | None:
        """What was compiled and is still good."""
        with self._lock:
            entries = self._cache.get(salt)
            kept = None if entries is None else entries.get(digest)
            if entries is None or kept is None:
                return None
            if isinstance(kept, _Compiled) and (kept.wear.has_failed or kept.wear.num_tokens >= _FRESH_TOKENS):
                return None
            self._cache.move_to_end(salt)
            entries.move_to_end(digest)
            return kept

    def _keep(self, salt: str, digest: _Digest, compiled: _Compiled | GrammarError) -> None:
        with self._lock:
            entries = self._cache.setdefault(salt, OrderedDict())
            self._cache.move_to_end(salt)
            entries[digest] = compiled
            if len(entries) > self._cache_entries:
                entries.popitem(last=False)
            if len(self._cache) > self._cache_salts:
                self._cache.popitem(last=False)
            self._bound_memory()

    def _bound_memory(self) -> None:
        """Let the least recently used go while what is kept takes too much memory; one alone never does."""
        excess = sum(_num_bytes(kept) for entries in self._cache.values() for kept in entries.values()) - _MAX_BYTES
        while excess > 0:
            salt, entries = next(iter(self._cache.items()))
            excess -= _num_bytes(entries.popitem(last=False)[1])
            if not entries:
                del self._cache[salt]

    def _tags_of(self, vocabulary: Vocabulary, thinking: Thinking) -> Tags:
        key = thinking.begin, thinking.end
        if key not in self._tags:
            tokens = [*vocabulary.parse(thinking.begin), *vocabulary.parse(thinking.end)]
            controls = {t: vocabulary.bytes_of(t, control=True) for t in tokens if vocabulary.is_control(t)}
            opening = self._compiled(vocabulary, _tag_grammar(vocabulary, thinking.begin)) if thinking.begin else None
            self._tags[key] = Tags(controls, opening)
            if len(self._tags) > _MAX_TAGS:
                self._tags.popitem(last=False)
        return self._tags[key]

    # --- masks --------------------------------------------------------------------------------------------------------

    def begin(self, plan: SchedulerOutput) -> PendingMask | None:
        """Begin the mask of a plan whose sequences have taken in all tokens drawn so far; None if nobody is constrained.

        The states must be left alone until its `result()` is there, which is valid until the mask after the next one begins.
        """
        jobs: list[tuple[int, Sequence[int], GrammarState]] = []
        for row in plan.rows:
            state = plan.constraints.get(row.slot)
            if row.sample and isinstance(state, GrammarState):
                draft = row.tokens[row.n - row.n_draft :] if row.n_draft and row.tokens is not None else ()
                if not state.is_free(draft):
                    jobs.append((row.slot, draft, state))
        if not jobs:
            return None
        num_rows = sum(len(draft) + 1 for _, draft, _ in jobs)
        self._buffers.reverse()
        if len(self._buffers[0]) < num_rows:
            self._buffers[0] = np.empty((2 * num_rows, self._buffers[0].shape[1]), dtype=np.int32)
        buffer = self._buffers[0]
        if num_rows * self._row_seconds < _INLINE_S:
            return PendingMask(self._mask(jobs, buffer))
        return PendingMask(self._masking.submit(self._mask, jobs, buffer))

    def _mask(self, jobs: Sequence[tuple[int, Sequence[int], GrammarState]], buffer: Words) -> GrammarMask | None:
        began = time.perf_counter()
        first: dict[int, int] = {}
        used = 0
        for slot, draft, state in jobs:
            rows = buffer[used : used + len(draft) + 1]
            try:
                constrained = state.fill(draft, rows)
            except BaseException as error:  # a panic of the library is no Exception, and harms one sequence only
                logger.error("a mask could not be made: %s", type(error).__name__)
                state.fail()
                rows[:] = self._vocabulary.result().all_but_eos
                constrained = True
            if constrained:
                first[slot] = used
                used += len(rows)
        seconds = (time.perf_counter() - began) / sum(len(draft) + 1 for _, draft, _ in jobs)
        self._row_seconds += 0.1 * (seconds - self._row_seconds)
        return GrammarMask(buffer[:used], first) if used else None

    def close(self) -> None:
        """End the threads, after what they are at, and forget what was compiled. Constraints not compiled yet are cancelled."""
        self._compiling.shutdown(wait=True, cancel_futures=True)
        self._masking.shutdown(wait=True, cancel_futures=True)
        self._cache.clear()
        self._tags.clear()


class _Refused:
    """The state of a constraint that never held."""

    is_finished = False

    def __init__(self, error: str) -> None:
        self.error: str | None = error

    def forced(self, at_most: int) -> list[int]:
        return []

    def allowed(self, draft: Sequence[int]) -> int:
        return 0

    def advance(self, tokens: Sequence[int]) -> None:
        """It stays refused."""


def _check(vocabulary: Vocabulary, thinking: Thinking) -> None:
    if not thinking.end:
        raise GrammarError("The tags of the model's thoughts are not known.")
    if thinking.budget is not None:
        closing = b"".join(vocabulary.bytes_of(token, control=True) for token in thinking.end_token_ids)
        if thinking.end.encode() not in closing:
            raise GrammarError("A budget of thoughts needs tokens that end them.")


def _tag_grammar(vocabulary: Vocabulary, tag: str) -> str:
    """A tag as the tokenizer reads it, control tokens and all, or spelled in any other way."""
    as_read = " ".join(f"<[{token}]>" for token in vocabulary.parse(tag))
    return f"start: {as_read} | {json.dumps(tag)}"


def _num_bytes(kept: _Compiled | GrammarError) -> int:
    return kept.wear.num_bytes if isinstance(kept, _Compiled) else 0


def _digest(grammar: str) -> _Digest:
    return hashlib.sha256(grammar.encode("utf-8", "surrogatepass")).digest()


def _report(vocabulary: Future[Vocabulary]) -> None:
    if not vocabulary.cancelled() and (error := vocabulary.exception()) is not None:
        logger.error("structured output is not available: the vocabulary cannot be read: %s", error)
