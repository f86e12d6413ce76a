"""Where thoughts begin and end, however their text is cut into tokens."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux_core.engine.thinking import ThoughtPhase, Thoughts
from inferflux_core.engine.types import Thinking

END = "</think>"
TEXT = st.text(alphabet="<>/thinké \n", max_size=30)


def thinking(is_open: bool, budget: int | None = None, closing: Sequence[int] = (1, 2)) -> Thinking:
    return Thinking(is_open=is_open, begin="<think>", end=END, budget=budget, end_token_ids=list(closing))


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """The bytes in pieces; some may be empty, as control tokens are."""
    edges = [0, *sorted(place % (len(data) + 1) for place in places), len(data)]
    return [data[a:b] for a, b in itertools.pairwise(edges)]


def walk(thoughts: Thoughts, pieces: Sequence[bytes]) -> bytes:
    """What is left of the pieces behind the end tag."""
    for i, piece in enumerate(pieces):
        rest = thoughts.advance(9, piece)
        if thoughts.phase is ThoughtPhase.OVER:
            return rest + b"".join(pieces[i + 1 :])
        assert rest == b""
    return b""


@given(TEXT, TEXT, st.lists(st.integers(0, 99), max_size=12))
@settings(max_examples=200, deadline=None)
def test_the_first_end_tag_ends_them(before: str, after: str, places: list[int]) -> None:
    text = before + END + after
    thoughts = Thoughts(thinking(is_open=True))
    rest = walk(thoughts, cut(text.encode(), places))
    assert thoughts.phase is ThoughtPhase.OVER
    assert rest.lstrip(b" \n") == text.split(END, 1)[1].encode().lstrip(b" \n")


@given(TEXT, st.lists(st.integers(0, 99), max_size=8))
@settings(max_examples=200, deadline=None)
def test_they_begin_with_the_tag_or_not_at_all(text: str, places: list[int]) -> None:
    thoughts = Thoughts(thinking(is_open=False))
    walk(thoughts, cut(text.encode(), places))
    begun = text.lstrip(" \n")
    assert thoughts.had_thoughts == begun.startswith("<think>")
    if not thoughts.had_thoughts:
        assert (thoughts.phase is ThoughtPhase.BEFORE) == "<think>".startswith(begun)


@given(TEXT, st.lists(st.integers(0, 99), max_size=12), st.integers(0, 8))
@settings(max_examples=200, deadline=None)
def test_a_budget_counts_tokens_of_thoughts(text: str, places: list[int], budget: int) -> None:
    pieces = cut(text.replace(END, "").encode(), places)
    thoughts = Thoughts(thinking(is_open=True, budget=budget))
    free = Thoughts(thinking(is_open=True))
    for drawn, piece in enumerate(pieces):
        if free.phase is ThoughtPhase.OVER:
            break
        assert thoughts.forced() == ([1, 2] if drawn >= budget else [])
        if drawn >= budget:
            break
        thoughts.advance(9, piece)
        free.advance(9, piece)
        assert thoughts.num_tokens == free.num_tokens


def test_tokens_of_the_tags_do_not_count() -> None:
    thoughts = Thoughts(thinking(is_open=False, budget=2))
    for piece in (b"\n", b"<thi", b"nk>", b"a"):
        thoughts.advance(9, piece)
    assert (thoughts.num_tokens, thoughts.phase) == (1, ThoughtPhase.OPEN)
    thoughts.advance(9, b"b</think>")
    assert (thoughts.num_tokens, thoughts.phase) == (1, ThoughtPhase.OVER)


def test_one_token_may_hold_all_of_it() -> None:
    thoughts = Thoughts(thinking(is_open=False))
    assert thoughts.advance(9, b"<think>a</think>\n\n{") == b"{"
    assert (thoughts.phase, thoughts.had_thoughts) == (ThoughtPhase.OVER, True)


def test_a_forced_end_is_forced_whole() -> None:
    thoughts = Thoughts(thinking(is_open=True, budget=0, closing=[5, 6, 7]))
    assert thoughts.forced() == [5, 6, 7]
    thoughts.advance(5, END.encode())
    assert thoughts.forced() == [6, 7]
    with pytest.raises(ValueError, match="forced"):
        thoughts.advance(7, b"")
    thoughts.advance(6, b"\n")
    thoughts.advance(7, b"\n")
    assert (thoughts.phase, thoughts.forced()) == (ThoughtPhase.OVER, [])


def test_a_copy_goes_its_own_way() -> None:
    thoughts = Thoughts(thinking(is_open=True, budget=2))
    thoughts.advance(9, b"</thi")
    twin = thoughts.copy()
    twin.advance(9, b"nk>")
    assert (twin.phase, thoughts.phase) == (ThoughtPhase.OVER, ThoughtPhase.OPEN)
    thoughts.advance(9, b"!")
    assert (thoughts.phase, thoughts.num_tokens, twin.num_tokens) == (ThoughtPhase.CLOSING, 2, 1)
