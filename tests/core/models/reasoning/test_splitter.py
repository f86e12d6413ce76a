"""Thoughts and content: told apart in the same way however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux_core.models.reasoning.formats import REASONING_FORMATS, WHITESPACE, ReasoningFormat, reasoning_format
from inferflux_core.models.reasoning.splitter import ThoughtSplitter


def family(name: str = "think") -> ReasoningFormat:
    found = reasoning_format(name, None)
    assert found is not None
    return found


def split(splitter: ThoughtSplitter, *pieces: str) -> tuple[str, str]:
    """All thoughts and all content of a text that comes in these pieces."""
    parts = [*map(splitter.push, pieces), splitter.finish()]
    return "".join(thoughts for thoughts, _ in parts), "".join(content for _, content in parts)


def expected(tags: ReasoningFormat, is_open: bool, text: str) -> tuple[str, str]:
    """The same, from the whole text."""
    begun = text.lstrip(WHITESPACE)
    if begun.startswith(tags.begin):
        begun = begun.removeprefix(tags.begin).lstrip(WHITESPACE)
    elif not begun.startswith(tags.end) and not is_open:
        return "", text
    thoughts, end, content = begun.partition(tags.end)
    if not end:
        return thoughts, ""
    content = content.lstrip(WHITESPACE)
    opening, closing = tags.wrapper
    if closing and content.startswith(opening):
        inside, end, rest = content.removeprefix(opening).lstrip(WHITESPACE).partition(closing)
        content = inside.rstrip(WHITESPACE) + rest.lstrip(WHITESPACE) if end else inside
    return thoughts.rstrip(WHITESPACE), content


@pytest.mark.parametrize(
    ("text", "thoughts", "content"),
    [
        ("<think>\nWhy?\n</think>\n\nBecause.\n", "Why?", "Because.\n"),
        (" \n<think>a</think>b", "a", "b"),
        ("<think>\n\n</think>\n\nHi", "", "Hi"),
        ("</think>\n\nHi", "", "Hi"),
        ("  Hi <think>x</think>", "", "  Hi <think>x</think>"),
        ("<think>a</think>b<think>c</think>", "a", "b<think>c</think>"),
        ("<think>a<think>b</think>c</think>", "a<think>b", "c</think>"),
        ("<think>  a  b </thin", "a  b </thin", ""),
        ("<think>a\n\n", "a\n\n", ""),
        (" <thin", "", " <thin"),
        ("<think>", "", ""),
        ("\n \n", "", "\n \n"),
        ("", "", ""),
    ],
)
def test_an_answer_that_begins_its_thoughts_itself(text: str, thoughts: str, content: str) -> None:
    assert split(ThoughtSplitter(family(), False), text) == (thoughts, content)
    assert split(ThoughtSplitter(family(), False), *text) == (thoughts, content)


@pytest.mark.parametrize(
    ("text", "thoughts", "content"),
    [
        ("\nWhy?\n</think>\n\nBecause.", "Why?", "Because."),
        ("<think>\nWhy?\n</think>\n\nBecause.", "Why?", "Because."),
        ("\n</think>Hi", "", "Hi"),
        ("never ends \n", "never ends \n", ""),
        ("<thi", "<thi", ""),
        ("\n\n", "", ""),
    ],
)
def test_an_answer_to_a_prompt_that_opened_thoughts(text: str, thoughts: str, content: str) -> None:
    assert split(ThoughtSplitter(family(), True), text) == (thoughts, content)
    assert split(ThoughtSplitter(family(), True), *text) == (thoughts, content)


@pytest.mark.parametrize(
    ("name", "text", "thoughts", "content"),
    [
        ("granite", "<think>a</think>\n<response> b c \n</response>\n", "a", "b c"),
        ("granite", "<think>a</think>\n<resp", "a", "<resp"),
        ("granite", "<think>a</think>b</response>", "a", "b</response>"),
        ("granite", "<response>b</response>", "", "<response>b</response>"),
        (
            "apriel",
            "a\n[BEGIN FINAL RESPONSE]\nb\n[END FINAL RESPONSE]\n",
            "",
            "a\n[BEGIN FINAL RESPONSE]\nb\n[END FINAL RESPONSE]\n",
        ),
        ("apriel", "Here are my reasoning steps:\na\n[BEGIN FINAL RESPONSE]\nb\n[END FINAL RESPONSE]\n", "a", "b"),
        ("granite_text", "Here is my thought process: a\n\nHere is my response: b", "a", "b"),
        ("gemma4", "<|channel>thought\na\n<channel|>b", "a", "b"),
        ("mistral", "[THINK]a[/THINK]b", "a", "b"),
    ],
)
def test_other_families(name: str, text: str, thoughts: str, content: str) -> None:
    assert split(ThoughtSplitter(family(name), False), text) == (thoughts, content)
    assert split(ThoughtSplitter(family(name), False), *text) == (thoughts, content)


@settings(deadline=None, max_examples=400)
@given(data=st.data(), name=st.sampled_from(REASONING_FORMATS), is_open=st.booleans())
def test_the_answer_does_not_depend_on_the_cuts(data: st.DataObject, name: str, is_open: bool) -> None:
    tags = family(name)
    whole = [tag for tag in (tags.begin, tags.end, *tags.wrapper) if tag]
    pieces = st.sampled_from([*whole, *(tag[:4] for tag in whole), *(tag[2:] for tag in whole), " ", "\n", "a", "\u00a0é"])
    text = "".join(data.draw(st.lists(pieces, max_size=12)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert split(ThoughtSplitter(tags, is_open), *parts) == expected(tags, is_open, text)


def test_thoughts_come_as_soon_as_they_are_sure() -> None:
    splitter = ThoughtSplitter(family(), False)
    assert splitter.push("<think>\nOne ") == ("One", "")
    assert splitter.in_thoughts
    assert splitter.push("two</th") == (" two", "")
    assert splitter.push("in>") == ("</thin>", "")
    assert splitter.push("</think>\n\n") == ("", "")
    assert not splitter.in_thoughts
    assert splitter.push("Hi") == ("", "Hi")
    assert splitter.push("\n") == ("", "\n")


@pytest.mark.parametrize(("is_open", "text"), [(False, ""), (True, "a"), (False, "<think>a")])
def test_a_megabyte_of_white_space_takes_no_longer_than_it_must(is_open: bool, text: str) -> None:
    """Looked at again with every piece, these 200,000 pieces would take minutes."""
    splitter = ThoughtSplitter(family(), is_open)
    splitter.push(text)
    assert [splitter.push("\n    ") for _ in range(200_000)] == [("", "")] * 200_000
    thoughts, content = splitter.finish()
    assert len(thoughts or content) == 1_000_000
