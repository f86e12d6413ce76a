"""Vocabularies, grammars and masks, for tests of constraints."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher

from inferflux_core.engine.grammar import Grammars
from inferflux_core.engine.grammar_state import GrammarState
from inferflux_core.engine.types import Constraint, PagedOps, Row, SchedulerOutput, Thinking
from inferflux_core.interfaces import Tokenizer
from inferflux_core.testing.fake_backend import VOCAB_SIZE, FakeTokenizer

THINK = Thinking(is_open=False, begin="<think>", end="</think>")
FLAG_SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
OPEN = Thinking(is_open=True, begin="<think>", end="</think>")


def schema_grammar(schema: Any, **options: Any) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=options)


def compact(schema: Any) -> str:
    """The grammar of a schema without white space, so that much of it is forced."""
    return schema_grammar(schema, whitespace_flexible=False)


def fake_grammars(tokenizer: Callable[[], Tokenizer] = FakeTokenizer, **options: Any) -> Grammars:
    """Of the fake model, one token a byte, with logits wider than its vocabulary."""
    return Grammars(tokenizer, VOCAB_SIZE + 13, FakeTokenizer.eos_token_ids, **options)


def state_of(grammars: Grammars, grammar: str = "", thinking: Thinking | None = None, salt: str = "") -> GrammarState:
    state = grammars.compile(salt, Constraint(grammar=grammar, thinking=thinking)).result(60)
    assert isinstance(state, GrammarState), state.error
    return state


def refusal_of(grammars: Grammars, grammar: str = "", thinking: Thinking | None = None) -> str | None:
    return grammars.compile("", Constraint(grammar=grammar, thinking=thinking)).result(60).error


def plan_of(states: dict[int, GrammarState], drafts: dict[int, Sequence[int]] | None = None) -> SchedulerOutput:
    """A step in which each of these slots draws, after verifying its draft."""
    rows = []
    for slot in states:
        draft = list((drafts or {}).get(slot, ()))
        rows.append(Row(slot, 5, 1 + len(draft), [1, *draft], len(draft), True, PagedOps()))
    return SchedulerOutput(0, rows, sum(row.n for row in rows), constraints=dict(states))


def ids_of(words: npt.NDArray[np.int32]) -> list[int]:
    return np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist()


def permitted(grammars: Grammars, state: GrammarState, draft: Sequence[int] = ()) -> list[list[int]] | None:
    """Tokens that may be drawn at each position of a row with this draft; None if there is no mask."""
    pending = grammars.begin(plan_of({3: state}, {3: draft}))
    mask = None if pending is None else pending.result()
    if mask is None:
        return None
    assert mask.first == {3: 0}
    assert len(mask.bits) == len(draft) + 1
    return [ids_of(row) for row in mask.bits]


def letters(grammars: Grammars, state: GrammarState) -> bytes:
    """What may be drawn next, of the fake model's tokens; 0 stands for the end of the sequence."""
    rows = permitted(grammars, state)
    assert rows is not None
    return bytes(sorted({token if token < 256 else 0 for token in rows[0]}))


def feed(state: GrammarState, text: str) -> None:
    """As if the fake model had drawn this text."""
    for token in text.encode():
        assert state.error is None
        assert not state.is_finished
        state.advance([token])
