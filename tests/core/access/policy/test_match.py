"""Patterns of objects against an independent matcher, and their corners."""

from __future__ import annotations

import time
from functools import cache

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from inferflux_core.access.policy.match import MAX_OBJECT_CHARS, compile_pattern, is_plain, model_matches, pattern_problem


@cache
def by_definition(pattern: str, name: str) -> bool:
    """The definition, spelt out: try every length for every star."""
    if not pattern:
        return not name
    if pattern.startswith("**"):
        return any(by_definition(pattern[2:], name[i:]) for i in range(len(name) + 1))
    if pattern.startswith("*"):
        return any(by_definition(pattern[1:], name[i:]) for i in range(len(name) + 1) if "/" not in name[:i])
    return name[:1] == pattern[0] and by_definition(pattern[1:], name[1:])


PIECES = st.lists(st.sampled_from(["a", "b", "/", "*", "**", "ab", "a/b"]), min_size=1, max_size=9).map("".join)


@given(PIECES, st.text("ab/", min_size=1, max_size=12))
@example("**a*b", "a/ab")  # the first `a` is the wrong one
@example("*a**b*a", "ba/b/aba")
@example("**a**b/*", "aab/b/")
def test_a_pattern_means_what_its_definition_says(pattern: str, name: str) -> None:
    compiled = compile_pattern(pattern)
    if compiled is not None:
        assert (compiled.fullmatch(name) is not None) == by_definition(pattern, name)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("demo", "demo", True),
        ("demo", "Demo", False),
        ("demo", "demo2", False),
        ("*", "demo", True),
        ("*", "meta-llama/Llama-3", False),
        ("**", "meta-llama/Llama-3", True),
        ("*/*", "meta-llama/Llama-3", True),
        ("meta-llama/**", "meta-llama", False),
        ("acme-*", "acme-", True),
        ("*-public", "x-secret", False),
        ("a.c", "abc", False),
        ("a+(b)$", "a+(b)$", True),
        ("demo", "demo\n", False),
        ("*", "demo\n", False),
        ("**", "de\u200bmo", False),
        ("*", "", False),
        ("*", "x" * (MAX_OBJECT_CHARS + 1), False),
        ("***", "x", False),
        ("", "", False),
        ("größe-*", "größe-1", True),
    ],
)
def test_a_name_matches_as_a_whole(pattern: str, name: str, matches: bool) -> None:
    assert model_matches(pattern, name) is matches


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("", "is empty"),
        ("x" * 513, "is longer than 512 characters"),
        ("a\tb", "has a control character or one that cannot be seen"),
        ("a\u202eb", "has a control character or one that cannot be seen"),
        ("a\u00a0b", "has a control character or one that cannot be seen"),
        ("gro\u0308sse", "is not in Unicode's NFC form, in which names are compared"),
        ("a//b", "has an empty segment or a space at an end"),
        ("a/", "has an empty segment or a space at an end"),
        (" a", "has an empty segment or a space at an end"),
        ("a***", "has more than two '*' in a row; '*' matches within one segment, '**' across segments"),
        ("**/a/**/b/**", "has more than 2 '**'"),
    ],
)
def test_what_is_wrong_with_a_pattern_is_said(pattern: str, problem: str) -> None:
    assert pattern_problem(pattern) == problem
    assert compile_pattern(pattern) is None


def test_plain_text_shows_all_that_it_holds() -> None:
    assert is_plain("größe 大")
    assert not any(map(is_plain, ("a\n", "a\x00", "a\x7f", "\ufeffa", "a\u2028", "a\u3000b", "a\u200d", "a\ud800")))


def test_no_name_makes_a_pattern_slow() -> None:
    """Backtracking over twenty stars would take longer than anyone waits."""
    name = "a" * MAX_OBJECT_CHARS
    begun = time.perf_counter()
    for pattern in ("*a" * 20 + "b", "**a**" + "a*" * 20 + "b", "**" + "a*" * 20 + "b", "*a" * 20 + "/**b"):
        assert not model_matches(pattern, name)
    assert time.perf_counter() - begun < 2.0
