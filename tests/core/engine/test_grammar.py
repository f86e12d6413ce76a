"""Constraints of the fake model, byte by byte: compiling, masks, drafts, and what cannot be held."""

from __future__ import annotations

import ctypes
import gc
import logging
import random
import threading
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import pytest
from llguidance import LLParserLimits

from core.engine.constrained import (
    FLAG_SCHEMA,
    OPEN,
    compact,
    fake_grammars,
    feed,
    ids_of,
    letters,
    permitted,
    plan_of,
    refusal_of,
    state_of,
)
from inferflux_core.engine.grammar import GrammarError, Grammars
from inferflux_core.engine.grammar_state import GrammarState
from inferflux_core.engine.types import Constraint
from inferflux_core.engine.vocabulary import Vocabulary
from inferflux_core.testing.fake_backend import BOS, EOS, IM_END, IM_START, VOCAB_SIZE, FakeTokenizer

FLAG = compact(FLAG_SCHEMA)
NO_END = [token for token in range(VOCAB_SIZE) if token not in FakeTokenizer.eos_token_ids]


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    made = fake_grammars()
    yield made
    made.close()


# --- a grammar alone --------------------------------------------------------------------------------------------------


def test_the_mask_is_what_the_grammar_allows(grammars: Grammars) -> None:
    state = state_of(grammars, 'start: "ab" | "ac" "d"*')
    assert letters(grammars, state) == b"a"
    feed(state, "a")
    assert letters(grammars, state) == b"bc"
    feed(state, "cd")
    assert permitted(grammars, state) == [[ord("d"), EOS, IM_END]], "it may end here, or go on"
    assert not state.is_finished
    state.advance([EOS])
    assert (state.is_finished, state.error) == (True, None)


def test_it_is_finished_where_nothing_can_follow(grammars: Grammars) -> None:
    state = state_of(grammars, FLAG)
    feed(state, '{"a":true')
    assert not state.is_finished
    feed(state, "}")
    assert (state.is_finished, state.error) == (True, None)
    assert grammars.begin(plan_of({0: state})) is None, "there is nothing to draw"
    assert (state.forced(9), state.allowed(b"x")) == ([], 0)


def test_an_end_before_the_grammar_is_done_is_an_error(grammars: Grammars) -> None:
    state = state_of(grammars, FLAG)
    feed(state, '{"a"')
    state.advance([IM_END])
    assert state.error is not None
    assert not state.is_finished


def test_a_token_that_is_not_allowed_is_an_error(grammars: Grammars) -> None:
    state = state_of(grammars, FLAG)
    state.advance(b"[")
    assert state.error is not None
    assert "{" not in state.error, "nothing of the grammar or the output is repeated"
    assert (state.forced(9), state.allowed(b"{"), grammars.begin(plan_of({0: state}))) == ([], 0, None)


def test_what_must_come_is_forced_and_cut(grammars: Grammars) -> None:
    state = state_of(grammars, FLAG)
    assert bytes(state.forced(99)) == b'{"a":'
    assert bytes(state.forced(2)) == b'{"'
    feed(state, '{"a":f')
    assert bytes(state.forced(99)) == b"alse}"


def test_as_much_of_a_draft_as_may_come(grammars: Grammars) -> None:
    state = state_of(grammars, FLAG)
    assert state.allowed(b'{"a":tr') == 7
    assert state.allowed(b'{"a":yes') == 5
    assert state.allowed(b"") == 0
    assert state.allowed([*b'{"a":true}', EOS]) == 10, "an end is not drafted"
    assert letters(grammars, state) == b"{", "asking changes nothing"


def test_masks_along_a_draft(grammars: Grammars) -> None:
    state = state_of(grammars, FLAG)
    feed(state, '{"a":')
    rows = permitted(grammars, state, b"tru")
    assert rows is not None
    assert [bytes(row) for row in rows] == [b"ft", b"r", b"u", b"e"]
    rows = permitted(grammars, state, b"tXu")
    assert rows is not None
    assert [bytes(row) for row in rows[:2]] == [b"ft", b"r"]
    assert [len(row) for row in rows[2:]] == [VOCAB_SIZE + 13] * 2, "nobody gets there"
    assert letters(grammars, state) == b"ft"
    feed(state, "false}")
    assert state.is_finished


def test_a_draft_may_run_to_the_end(grammars: Grammars) -> None:
    state = state_of(grammars, FLAG)
    rows = permitted(grammars, state, list(b'{"a":true}'))
    assert rows is not None
    assert bytes(rows[-2]) == b"}"
    assert rows[-1] == [EOS, IM_END]
    feed(state, '{"a":true}')
    assert state.is_finished


def test_forced_drafts_have_the_masks_that_the_grammar_gives(grammars: Grammars) -> None:
    asked, unasked = state_of(grammars, FLAG), state_of(grammars, FLAG)
    draft = asked.forced(99)
    assert permitted(grammars, asked, draft) == permitted(grammars, unasked, draft)
    assert permitted(grammars, asked, [*draft[:2], 7]) == permitted(grammars, unasked, [*draft[:2], 7])


def test_control_tokens_are_drawn_only_by_name(grammars: Grammars) -> None:
    state = state_of(grammars, r"start: /(.|\n)*/")
    rows = permitted(grammars, state)
    assert rows is not None
    assert [token for token in rows[0] if token >= 256] == [EOS, IM_END]
    assert 255 not in rows[0], "a byte that is in no UTF-8"
    state = state_of(grammars, f'start: "a" <[{IM_START}]> | <[{BOS}]> "b"')
    assert permitted(grammars, state) == [[ord("a"), BOS]]
    state.advance([ord("a")])
    assert permitted(grammars, state) == [[IM_START]]
    state.advance([IM_START])
    assert state.is_finished


# --- compiling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grammar", ['start: "', "start: nothing", "{}", '{"grammars":[]}', "\ud800", "start: /(?=a)b/"])
def test_what_cannot_be_compiled_is_refused_without_its_text(
    grammars: Grammars, grammar: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        error = refusal_of(grammars, grammar)
    assert error is not None
    assert error.startswith("The required format could not be compiled")
    assert "nothing" not in error
    assert [r.getMessage() for r in caplog.records if "nothing" in r.getMessage()] == []


def test_refusals_that_are_kept_hold_nothing_else(grammars: Grammars) -> None:
    """An exception keeps the frames of every time that it was raised, and with them what was refused."""
    bad = "start: kept_nowhere"
    assert len({refusal_of(grammars, bad) for _ in range(3)}) == 1
    kept = [error for error in gc.get_objects() if issubclass(type(error), GrammarError)]  # isinstance would ask each object
    assert kept
    assert [error.__traceback__ for error in kept] == [None] * len(kept)


def test_a_panic_of_the_library_refuses_one_constraint(monkeypatch: pytest.MonkeyPatch, grammars: Grammars) -> None:
    class Panic(BaseException):
        """As the library's, which is no Exception."""

    def panic(*_: object) -> None:
        raise Panic

    with monkeypatch.context() as patch:
        patch.setattr(Grammars, "_compiled", panic)
        assert refusal_of(grammars, 'start: "panics"') == "The required format could not be compiled."
    assert state_of(grammars, 'start: "panics"').error is None


def test_one_state_knows_nothing_of_another(grammars: Grammars) -> None:
    first, second = state_of(grammars, FLAG), state_of(grammars, FLAG)
    feed(first, '{"a":')
    assert (letters(grammars, first), letters(grammars, second)) == (b"ft", b"{")


def test_what_is_compiled_is_kept_by_salt_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    real = Grammars._compiled

    def watch(self: Grammars, vocabulary: Any, grammar: str) -> Any:
        compiled.append(grammar)
        return real(self, vocabulary, grammar)

    monkeypatch.setattr(Grammars, "_compiled", watch)
    grammars = fake_grammars(cache_entries=2, cache_salts=2)
    try:
        a, b, c, bad = 'start: "a"', 'start: "b"', 'start: "c"', "start: x"
        together = [grammars.compile("s", Constraint(grammar=a)) for _ in range(4)]
        assert [future.result(60).error for future in together] == [None] * 4
        assert compiled == [a]
        state_of(grammars, b, salt="s")
        state_of(grammars, a, salt="s")
        assert compiled == [a, b]
        state_of(grammars, c, salt="s")
        state_of(grammars, a, salt="s")
        assert compiled == [a, b, c], "b was used least recently"
        state_of(grammars, b, salt="s")
        assert compiled == [a, b, c, b]
        state_of(grammars, b, salt="t")
        assert compiled == [a, b, c, b, b], "another salt finds nothing"
        assert refusal_of(grammars, bad) == refusal_of(grammars, bad)
        assert compiled[5:] == [bad], "nor is a refusal worked out twice"
        state_of(grammars, b, salt="s")
        assert compiled[6:] == [b], "the third salt put out the first"
    finally:
        grammars.close()


def test_a_worn_grammar_is_compiled_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the library learns of its patterns all sequences share: at the limit all fail, and none of the later ones."""
    limits = LLParserLimits(max_lexer_states=1500, verbose_errors=False)
    monkeypatch.setattr("inferflux_core.engine.grammar.parser_limits", lambda: limits)
    many_states = "start: /(a|b)*a(a|b){14}c/"
    rng = random.Random(0)
    grammars = fake_grammars()

    def failing() -> int:
        """Sequences until one fails."""
        for count in range(30):
            state = state_of(grammars, many_states)
            for _ in range(200):
                permitted(grammars, state)
                state.advance([rng.choice(b"ab")])
            if state.error is not None:
                return count
        return 30

    try:
        assert 0 < failing() < 30
        assert failing() > 0, "the next one begins anew"
        monkeypatch.setattr("inferflux_core.engine.grammar._FRESH_TOKENS", 300)
        state_of(grammars, many_states).fail()
        assert failing() == 30, "none gets to where it fails"
    finally:
        grammars.close()


def test_a_vocabulary_that_cannot_be_read_refuses_all(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> FakeTokenizer:
        raise OSError("the file is gone")

    grammars = fake_grammars(broken)
    try:
        assert "vocabulary" in str(refusal_of(grammars, FLAG))
        assert refusal_of(grammars, thinking=OPEN) is not None
    finally:
        grammars.close()
    assert [r.levelno for r in caplog.records] == [logging.ERROR]


def test_close_ends_the_threads_and_cancels_what_waits() -> None:
    entered, release = threading.Event(), threading.Event()

    def slow() -> FakeTokenizer:
        entered.set()
        release.wait(30)
        return FakeTokenizer()

    before = threading.active_count()
    grammars = fake_grammars(slow)
    future = grammars.compile("", Constraint(grammar=FLAG))
    settled = threading.Event()
    future.add_done_callback(lambda _: settled.set())
    assert entered.wait(30)
    closing = threading.Thread(target=grammars.close)
    closing.start()
    assert settled.wait(30)
    assert future.cancelled()
    release.set()
    closing.join(30)
    assert threading.active_count() == before


# --- masks of a step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row_seconds", [0.0, 1.0], ids=["at once", "in the thread"])
def test_the_rows_of_a_step(grammars: Grammars, row_seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "_row_seconds", row_seconds)
    done = state_of(grammars, 'start: "x"')
    feed(done, "x")
    broken = state_of(grammars, FLAG)
    broken.fail()
    begun = state_of(grammars, FLAG)
    feed(begun, '{"a":')
    states = {4: begun, 2: done, 7: state_of(grammars, FLAG), 1: broken, 0: state_of(grammars, thinking=OPEN)}
    plan = plan_of(states, {4: b"fa"})
    plan.rows.append(plan_of({9: begun}).rows[0])  # of a sequence without a constraint
    pending = grammars.begin(plan)
    assert pending is not None
    mask = pending.result()
    assert mask is not None
    assert mask.first == {4: 0, 7: 3}
    assert [bytes(ids_of(row)) for row in mask.bits] == [b"ft", b"a", b"l", b"{"]


def test_a_mask_outlives_the_next_one(grammars: Grammars) -> None:
    first, second = state_of(grammars, 'start: "a"'), state_of(grammars, 'start: "b"')
    pending = grammars.begin(plan_of({0: first}))
    assert pending is not None
    mask = pending.result()
    assert letters(grammars, second) == b"b"
    assert mask is not None
    assert bytes(ids_of(mask.bits[0])) == b"a"


def test_a_failure_of_the_library_ends_one_sequence_and_permits_no_end(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Panic(BaseException):
        """What the library raises if it has a bug."""

    bad, good = state_of(grammars, FLAG), state_of(grammars, FLAG)

    def fill(*_: Any) -> bool:
        raise Panic("with a text that is nobody's business")

    monkeypatch.setattr(bad, "fill", fill)
    pending = grammars.begin(plan_of({0: bad, 1: good}))
    assert pending is not None
    mask = pending.result()
    assert mask is not None
    assert mask.first == {0: 0, 1: 1}
    assert ids_of(mask.bits[0]) == NO_END
    assert bytes(ids_of(mask.bits[1])) == b"{"
    assert bad.error is not None
    assert good.error is None


def test_a_grammar_beyond_its_limits_ends_with_an_error(grammars: Grammars) -> None:
    """It compiles, and then has more ways to go on than are followed."""
    ways = " | ".join(f'"w{i}" x{i % 7}' for i in range(2100))
    rules = "".join(f'\nx{i}: "x" x{(i + 1) % 7} | "e"' for i in range(7))
    state = state_of(grammars, f"start: {ways}{rules}")
    feed(state, "w")
    rows = permitted(grammars, state)
    assert state.error is not None
    assert "Simplify" in state.error
    if rows is not None:
        assert not set(rows[0]) & FakeTokenizer.eos_token_ids, "the output is not taken for complete"


@pytest.mark.parametrize("is_error", [False, True])
def test_a_mask_without_a_token_is_an_error(is_error: bool) -> None:
    class Stuck:
        """A matcher that permits nothing."""

        def unsafe_compute_mask_ptr(self, pointer: int, size: int) -> None:
            ctypes.memset(pointer, 255 if is_error else 0, size)

        def is_error(self) -> bool:
            return is_error

    state = GrammarState(Vocabulary(FakeTokenizer, VOCAB_SIZE, FakeTokenizer.eos_token_ids), cast(Any, Stuck()))
    rows = np.zeros((3, (VOCAB_SIZE + 31) // 32), dtype=np.int32)
    assert state.fill([1, 2], rows)
    assert [ids_of(row) for row in rows] == [NO_END] * 3, "no end, so that nobody takes the output for complete"
    assert state.error is not None


def test_a_text_that_the_vocabulary_cannot_spell_is_an_error() -> None:
    class NoB(FakeTokenizer):
        def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
            return b"" if token_id == ord("b") else super().token_bytes(token_id, special=special)

    grammars = fake_grammars(NoB)
    try:
        state = state_of(grammars, 'start: "ab"')
        for _ in range(2):
            rows = permitted(grammars, state)
            if state.error is not None:
                break
            assert rows is not None
            state.advance(rows[0][:1])
            assert not state.is_finished
        assert state.error is not None
    finally:
        grammars.close()
