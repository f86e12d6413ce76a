"""Random walks under the masks of random schemas, through the demo model's vocabulary: what is promised to the scheduler."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.engine.constrained import THINK, permitted, schema_grammar, state_of
from inferflux_core.engine.grammar import Grammars
from inferflux_core.engine.grammar_state import GrammarState
from inferflux_core.interfaces import Tokenizer
from inferflux_core.plugins import load_plugins
from llamacpp.demo_model import demo_files

FILES = demo_files()
WALKS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
NAMES = st.sampled_from(["a", "first_name", "é ünï", "with space", 'quo"te', "b"])


def _objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(NAMES, inner, max_size=3).map(
        lambda properties: {
            "type": "object",
            "properties": properties,
            "required": sorted(properties),
            "additionalProperties": False,
        }
    )


SCHEMAS = st.recursive(
    st.sampled_from(
        [
            {"type": "boolean"},
            {"type": "null"},
            {"type": "integer", "minimum": -20, "maximum": 1234},
            {"type": "string", "maxLength": 6},
            {"type": "string", "pattern": "^[a-c]{2,4}-x$"},
            {"enum": ["red", "reddish", "a much longer value", 12, None]},
            {"const": {"always": ["the same", 1]}},
        ]
    ),
    lambda inner: st.one_of(
        _objects(inner),
        st.builds(lambda item: {"type": "array", "items": item, "minItems": 1, "maxItems": 3}, inner),
        st.builds(lambda a, b: {"anyOf": [a, b]}, inner, inner),
    ),
    max_leaves=5,
)
COMPACT = st.booleans().map(lambda flexible: {} if flexible else {"whitespace_flexible": False})


class Demo:
    """The demo model's tokenizer, and grammars over it."""

    def __init__(self) -> None:
        self.tokenizer: Tokenizer = load_plugins().create("backend", "llamacpp", {}).tokenizer(FILES)
        self.eos = self.tokenizer.eos_token_ids
        self.grammars = Grammars(lambda: self.tokenizer, self.tokenizer.vocab_size + 7, self.eos)

    def next(self, state: GrammarState) -> list[int]:
        rows = permitted(self.grammars, state)
        assert rows is not None
        assert state.error is None
        return rows[0]

    def pick(self, among: list[int], rng: random.Random) -> int:
        """One of few, or of a short one of many, so that walks end; never white space that could go on for ever."""
        among = [t for t in among if t < self.tokenizer.vocab_size]
        if len(among) > 20:
            short = [t for t in rng.sample(among, 20) if len(self.tokenizer.token_bytes(t).strip()) in (1, 2)]
            among = short or among
        solid = [t for t in among if t in self.eos or self.tokenizer.token_bytes(t).strip()]
        return rng.choice(solid or among)


@pytest.fixture(scope="module")
def demo() -> Iterator[Demo]:
    made = Demo()
    yield made
    made.grammars.close()


@given(schema=SCHEMAS, options=COMPACT, seed=st.integers(0, 2**32))
@WALKS
def test_whatever_is_drawn_is_valid_and_ends(demo: Demo, schema: Any, options: dict[str, Any], seed: int) -> None:
    rng = random.Random(seed)
    state = state_of(demo.grammars, schema_grammar(schema, **options))
    drawn: list[int] = []
    while not state.is_finished:
        assert len(drawn) < 400, "it should have come to an end"
        forced = state.forced(4)
        if forced:
            for token in forced:
                assert demo.next(state) == [token], "a forced token has no alternative"
                state.advance([token])
            drawn += forced
            continue
        token = demo.pick(demo.next(state), rng)
        state.advance([token])
        assert state.error is None
        if token not in demo.eos:
            drawn.append(token)
    jsonschema.validate(json.loads(demo.tokenizer.decode(drawn)), schema)


@given(schema=SCHEMAS, options=COMPACT, seed=st.integers(0, 2**32), wrong_at=st.integers(0, 9), behind=st.booleans())
@WALKS
def test_drafts_change_nothing(
    demo: Demo, schema: Any, options: dict[str, Any], seed: int, wrong_at: int, behind: bool
) -> None:
    """Masks along a draft are those of one token after the other, and a rejected draft leaves no trace."""
    rng = random.Random(seed)
    grammar = schema_grammar(schema, **options)
    thinking = THINK if behind else None
    plain, drafting = (state_of(demo.grammars, grammar, thinking) for _ in range(2))
    for _ in range(4):
        # What would be drawn, and the masks on the way.
        scout = plain._copy()
        draft: list[int] = []
        masks: list[list[int]] = []
        while len(draft) < 6 and not scout.is_finished:
            masks.append(demo.next(scout))
            token = demo.pick(masks[-1], rng)
            if token in demo.eos:
                break
            scout.advance([token])
            assert scout.error is None
            draft.append(token)
        if not draft:
            break
        assert drafting.allowed(draft) == len(draft)
        asked = drafting.forced(8) if rng.random() < 0.5 else []
        rows = permitted(demo.grammars, drafting, draft)
        assert rows is not None
        assert rows[: len(masks)] == masks
        assert drafting.forced(8) == plain.forced(8)
        assert asked in ([], drafting.forced(8))
        # The step accepts some of it, and draws one token more.
        accepted = min(wrong_at, len(draft) - 1)
        spoiled = [*draft[:accepted], _not(rows[accepted], draft[accepted]), *draft[accepted + 1 :]]
        assert drafting.allowed(spoiled) == accepted
        rows = permitted(demo.grammars, drafting, spoiled)
        assert rows is not None
        assert rows[: accepted + 1] == masks[: accepted + 1]
        for token in draft[: accepted + 1]:
            plain.advance([token])
        drafting.advance(draft[: accepted + 1])
        assert (plain.error, plain.is_finished) == (drafting.error, drafting.is_finished) == (None, plain.is_finished)
        if plain.is_finished:
            break
        assert demo.next(plain) == demo.next(drafting)


def _not(permitted_tokens: list[int], token: int) -> int:
    """An ordinary token that may not come, or one that is no token."""
    allowed = {*permitted_tokens, token}
    return next((t for t in range(20, 49_000) if t not in allowed), 49_153)
