"""Patterns as sets of texts, against Python's own regular expressions."""

from __future__ import annotations

import contextlib
import re
import time
from itertools import product

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from inferflux_core.models.structured.pattern_language import (
    Language,
    TooComplexError,
    common_pattern,
    common_text,
    continuations,
)
from inferflux_core.models.structured.pattern_syntax import PatternError, Tree, parse, write

TEXTS = ["".join(chars) for length in range(5) for chars in product("ab1", repeat=length)] + ["a\nb", "é", "-", " ", "A"]


def python(tree: Tree) -> re.Pattern[str]:
    """What llguidance is given, for Python."""
    return re.compile(re.sub(r"\\x\{([0-9A-F]+)\}", lambda code: rf"\U{int(code[1], 16):08x}", write(tree)))


ATOMS = st.sampled_from(
    ["a", "b", "1", "[ab]", "[^a]", ".", "\\d", "\\w", "\\D", "\\W", "\\s", "\\S", "[a-z1-3]", "[^\\d]", "\\."]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"(?:{pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{2,}", "*?"])).map(
            lambda pair: f"({pair[0]}){pair[1]}"
        ),
    ),
    max_leaves=5,
)
EDGED = st.tuples(st.sampled_from(["", "^"]), PATTERNS, st.sampled_from(["", "$"])).map("".join)


@settings(max_examples=60, deadline=None)
@given(EDGED)
def test_a_pattern_matches_what_python_matches_where_dialects_agree(pattern: str) -> None:
    narrow, wide, theirs = Language(parse(pattern)), Language(parse(pattern, wide=True)), re.compile(pattern)
    for text in TEXTS:
        if narrow.matches(text):
            assert theirs.search(text), text
        if theirs.search(text):
            assert wide.matches(text), text
        assert narrow.matches(text) == bool(python(parse(pattern)).search(text)), text


@settings(max_examples=40, deadline=None)
@given(EDGED)
def test_the_opposite_of_a_pattern_matches_all_other_texts(pattern: str) -> None:
    language = Language(parse(pattern))
    try:
        opposite = common_pattern([], [language])
    except TooComplexError:
        assume(False)
    matches = None if opposite is None else python(opposite)
    for text in TEXTS:
        assert language.matches(text) == (matches is None or matches.fullmatch(text) is None), text


@settings(max_examples=40, deadline=None)
@given(EDGED, EDGED)
def test_a_common_text_is_in_both(one: str, two: str) -> None:
    first, second = Language(parse(one)), Language(parse(two))
    text = common_text([first, second])
    shared = [text for text in TEXTS if first.matches(text) and second.matches(text)]
    if text is None:
        assert not shared
    else:
        assert first.matches(text)
        assert second.matches(text)
        assert all(len(text) <= len(other) for other in shared)


def test_a_text_outside() -> None:
    assert common_text([Language(parse("^a*$"))], [Language(parse("^a?$"))]) == "aa"
    assert common_text([Language(parse("^a$"))], [Language(parse("a"))]) is None


def test_continuations_are_what_a_longer_match_goes_on_with() -> None:
    assert continuations(parse("^[a-c]+$")) == ((97, 99),)
    assert continuations(parse("^ab?$")) == ((98, 98),)
    assert continuations(parse("^ab$")) == ()


def test_a_pattern_that_explodes_elsewhere_takes_linear_time() -> None:
    language = Language(parse("^(a+)+$"))
    began = time.process_time()
    assert not language.matches("a" * 3000 + "!")
    assert time.process_time() - began < 1


def test_an_automaton_that_is_too_large_is_given_up() -> None:
    with pytest.raises(TooComplexError):
        Language(parse("(a{1,999}){1,999}"))
    with pytest.raises(TooComplexError):
        common_pattern([], [Language(parse("a.{12}b"))])
    with pytest.raises(TooComplexError):
        Language(parse("\\p{L}"))


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "has an unmatched '('"),
        ("a)", "has an unmatched ')' at position 1"),
        ("[a", "ends too early"),
        ("*a", "repeats nothing at position 0"),
        ("a{3,2}", "has the repetition {3,2}, whose bounds are swapped"),
        ("a{99999}", "repeats more than 20000 times"),
        ("[z-a]", "has a range of characters whose ends are swapped"),
        ("(?<!a)b", "uses a look-around, which cannot be enforced"),
        ("a\\b", "uses \\b, a look-around, which cannot be enforced"),
        ("\\q", "has the unknown escape \\q"),
        ("\\x1", "has an incomplete hexadecimal escape"),
        ("\\u{110000}", "has an escape beyond Unicode"),
        ("a++", "uses a possessive repetition"),
        ("(?i)a", "has an unknown kind of group at position 0"),
        ("a$b", "has '$' in a place other than the begin or the end"),
        ("(^a)*", "has '^' in a place other than the begin or the end"),
        ("(" * 200, "nests deeper than 100 groups"),
        ("\ud800", "has half of a surrogate pair"),
        ("\\p{", "has \\p without a class in braces"),
    ],
)
def test_a_pattern_that_cannot_be_read_says_why(pattern: str, reason: str) -> None:
    with pytest.raises(PatternError) as caught:
        parse(pattern)
    assert str(caught.value) == reason


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused(pattern: str) -> None:
    with contextlib.suppress(PatternError):
        write(parse(pattern))
