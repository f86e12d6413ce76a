"""Grammars behind thoughts, and budgets of thoughts, byte by byte with the fake model's vocabulary."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from core.engine.constrained import (
    FLAG_SCHEMA,
    OPEN,
    THINK,
    compact,
    fake_grammars,
    feed,
    letters,
    permitted,
    refusal_of,
    state_of,
)
from inferflux_core.engine.grammar import Grammars
from inferflux_core.engine.types import Thinking
from inferflux_core.testing.fake_backend import EOS, IM_END, VOCAB_SIZE

FLAG = compact(FLAG_SCHEMA)
CLOSING = list(b"\n</think>")


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    made = fake_grammars()
    yield made
    made.close()


def test_thoughts_are_free_but_for_the_end_of_the_sequence(grammars: Grammars) -> None:
    state = state_of(grammars, FLAG, OPEN)
    rows = permitted(grammars, state)
    assert rows is not None
    assert set(range(VOCAB_SIZE)) - set(rows[0]) == {EOS, IM_END}
    assert rows[0][-1] < VOCAB_SIZE, "what the tokenizer does not know is no thought"
    feed(state, "let me {} see</thin </think>")
    assert letters(grammars, state) == b"{"
    feed(state, '{"a":true}')
    assert (state.is_finished, state.error) == (True, None)


def test_an_answer_comes_with_or_without_thoughts(grammars: Grammars) -> None:
    state = state_of(grammars, FLAG, THINK)
    assert letters(grammars, state) == b"<{"
    assert state.forced(9) == []
    feed(state, '{"a":true}')
    assert (state.is_finished, state.error) == (True, None)
    state = state_of(grammars, FLAG, THINK)
    feed(state, "<thi")
    assert letters(grammars, state) == b"n"
    feed(state, "nk>hm</think>")
    assert letters(grammars, state) == b"{"
    feed(state, '{"a":true}')
    assert (state.is_finished, state.error) == (True, None)


def test_an_answer_may_begin_like_the_tag(grammars: Grammars) -> None:
    grammar = 'start: "<tho" | "<think>" "x"'
    state = state_of(grammars, grammar, THINK)
    feed(state, "<th")
    assert letters(grammars, state) == b"io"
    feed(state, "o")
    assert (state.is_finished, state.error) == (True, None)
    state = state_of(grammars, grammar, THINK)
    feed(state, "<think>")
    assert len(letters(grammars, state)) > 200, "the tag is the tag, whatever the grammar says"
    feed(state, "</think><think>")
    assert letters(grammars, state) == b"x"


def test_a_budget_forces_the_end_and_then_the_answer(grammars: Grammars) -> None:
    state = state_of(grammars, FLAG, Thinking(is_open=False, begin="<think>", end="</think>", budget=3, end_token_ids=CLOSING))
    feed(state, "<think>ab")
    assert state.forced(9) == []
    feed(state, "c")
    assert state.forced(4) == CLOSING[:4]
    assert state.forced(99) == CLOSING
    rows = permitted(grammars, state, CLOSING)
    assert rows == [*([token] for token in CLOSING), [ord("{")]]
    feed(state, "\n</think>")
    assert bytes(state.forced(99)) == b'{"a":'


def test_a_budget_without_a_grammar(grammars: Grammars) -> None:
    budget = Thinking(is_open=True, begin="<think>", end="</think>", budget=2, end_token_ids=CLOSING)
    state = state_of(grammars, thinking=budget)
    assert permitted(grammars, state) is None
    rows = permitted(grammars, state, b"ab\n")
    assert rows is not None, "a draft that uses the budget up"
    assert [len(rows[0]), len(rows[1]), rows[2], rows[3]] == [VOCAB_SIZE + 13] * 2 + [[CLOSING[0]], [CLOSING[1]]]
    assert state.allowed(b"abc") == 2
    assert state.allowed([*b"ab", *CLOSING, *b"anything"]) == 2 + len(CLOSING) + 8
    feed(state, "ab")
    assert permitted(grammars, state) == [[CLOSING[0]]]
    feed(state, "\n</think>anything")
    assert permitted(grammars, state) is None
    assert permitted(grammars, state, b"more") is None
    state.advance([EOS])
    assert (state.is_finished, state.error) == (True, None)


def test_drafts_across_the_end_of_thoughts(grammars: Grammars) -> None:
    state = state_of(grammars, FLAG, OPEN)
    draft = b'hm</think>{"b'
    assert state.allowed(draft) == len(draft) - 1
    assert state.allowed([*b"hm", EOS]) == 2
    rows = permitted(grammars, state, draft)
    assert rows is not None
    assert [len(row) for row in rows[:10]] == [VOCAB_SIZE - 2] * 10
    assert [bytes(row) for row in rows[10:13]] == [b"{", b'"', b"a"]
    feed(state, "no end")
    assert len(letters(grammars, state)) > 200, "nothing of the draft is left"
    assert state.error is None


def test_a_draft_at_the_very_start(grammars: Grammars) -> None:
    state = state_of(grammars, FLAG, THINK)
    assert state.allowed(b"<think>x</think>{") == 17
    assert state.allowed(b"<tree") == 2
    assert state.allowed(b'{"a":1') == 5
    rows = permitted(grammars, state, b'{"')
    assert rows is not None
    assert [bytes(row) for row in rows] == [b"<{", b'"', b"a"]
    assert letters(grammars, state) == b"<{"


def test_thoughts_that_never_end_are_no_answer(grammars: Grammars) -> None:
    state = state_of(grammars, FLAG, OPEN)
    feed(state, "hm")
    state.advance([EOS])
    assert state.error is not None


def test_bad_thoughts_are_refused(grammars: Grammars) -> None:
    assert refusal_of(grammars, FLAG, Thinking(is_open=True, begin="<think>", end="")) is not None
    for end_token_ids in ([], list(b"</thin")):
        thinking = Thinking(is_open=True, begin="", end="</think>", budget=1, end_token_ids=end_token_ids)
        assert refusal_of(grammars, thinking=thinking) is not None
    nothing_to_begin = Thinking(is_open=False, begin="", end="</think>")
    assert letters(grammars, state_of(grammars, FLAG, nothing_to_begin)) == b"{"
