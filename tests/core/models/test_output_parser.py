"""From tokens to thoughts, content and calls: the same answer however the tokens are grouped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inferflux_core.models.output_parser import OutputParser, Parsed
from inferflux_core.models.reasoning.formats import reasoning_format
from inferflux_core.models.reasoning.splitter import ThoughtSplitter
from inferflux_core.models.tool_calls.calls import Function, ToolRequest
from inferflux_core.models.tool_calls.hermes import HermesFormat
from inferflux_core.testing.fake_backend import EOS, VOCAB_SIZE, FakeTokenizer

CONTROL = ("<think>", "</think>", "<tool_call>", "</tool_call>")
CALL = '<tool_call>{"name": "look", "arguments": {"at": "é"}}</tool_call>'


class TagTokenizer(FakeTokenizer):
    """One token a byte, and control tokens for the tags; `<think>` is encoded to one token."""

    special_tokens = FakeTokenizer.special_tokens | set(CONTROL)

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        if parse_special:
            for index, tag in enumerate(CONTROL):
                if tag in text:
                    before, after = text.split(tag, 1)
                    return [*self.ids(before), VOCAB_SIZE + index, *self.ids(after)]
        return super().encode(text, add_special=add_special, parse_special=parse_special)

    def ids(self, text: str) -> list[int]:
        return self.encode(text, add_special=False, parse_special=True)

    def token_bytes(self, token_id: int, *, special: bool = False) -> bytes:
        if token_id < VOCAB_SIZE:
            return super().token_bytes(token_id, special=special)
        return CONTROL[token_id - VOCAB_SIZE].encode() if special else b""


TAGS = TagTokenizer()
PLAIN = FakeTokenizer()  # in its vocabulary the tags are ordinary text


@dataclass
class Answer:
    """Everything that a parser gave."""

    text: str = ""
    reasoning: str = ""
    calls: list[tuple[str, str, bool]] = field(default_factory=list)  # name, arguments, incomplete
    num_reasoning_tokens: int = 0
    ended: str = ""

    def add(self, parsed: Parsed) -> None:
        self.text += parsed.text
        self.reasoning += parsed.reasoning
        for piece in parsed.calls:
            assert piece.index == len(self.calls) - (not piece.name)
            if piece.name:
                self.calls.append(("", "", False))
            name, arguments, _ = self.calls[piece.index]
            self.calls[piece.index] = (name + piece.name, arguments + piece.arguments, piece.incomplete)


def answer(parser: OutputParser, *groups: Sequence[int]) -> Answer:
    """Pushes the groups, until the parser says that nothing may follow."""
    whole = Answer()
    for group in groups:
        whole.add(parser.push(group))
        if parser.stopped or parser.ended_by_call:
            whole.ended = "stop" if parser.stopped else "call"
            break
    else:
        whole.add(parser.finish())
        whole.ended = "stop" if parser.stopped else "call" if parser.ended_by_call else ""
    whole.num_reasoning_tokens = parser.num_reasoning_tokens
    return whole


def parser(
    tokenizer: FakeTokenizer = TAGS,
    *,
    stop: Sequence[str] = (),
    thinks: bool = False,
    is_open: bool = False,
    calls: bool = False,
    parallel: bool = True,
    skip_special_tokens: bool = True,
) -> OutputParser:
    family = reasoning_format("think", None)
    assert family is not None
    request = ToolRequest(functions=(Function("look"),), allowed=frozenset({"look"}), parallel=parallel)
    return OutputParser(
        tokenizer,
        stop=stop,
        skip_special_tokens=skip_special_tokens,
        splitter=ThoughtSplitter(family, is_open) if thinks or is_open else None,
        tools=HermesFormat().parser(request) if calls else None,
        markers=HermesFormat.markers if calls else (),
    )


def both(text: str, **options: Any) -> Answer:
    """The answer to a text, which is the same whether its tags are control tokens or ordinary text; all but the count."""
    as_tokens = answer(parser(TAGS, **options), TAGS.ids(text))
    as_text = answer(parser(PLAIN, **options), list(text.encode()))
    as_text.num_reasoning_tokens = as_tokens.num_reasoning_tokens
    assert as_tokens == as_text
    return as_tokens


# --- plain text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "stop", "shown", "ended"),
    [
        ("Hello é🙂", (), "Hello é🙂", ""),
        ("one STOP two", ("STOP",), "one ", "stop"),
        ("one STO", ("STOP",), "one STO", ""),
        ("aab", ("ab", "b"), "a", "stop"),
        ("<think>a</think>b", (), "<think>a</think>b", ""),
    ],
)
def test_text(text: str, stop: tuple[str, ...], shown: str, ended: str) -> None:
    for groups in ([text.encode()], [[byte] for byte in text.encode()]):
        assert answer(parser(PLAIN, stop=stop), *groups) == Answer(text=shown, ended=ended)


def test_an_unfinished_code_point_is_held_back_and_then_replaced() -> None:
    output = parser()
    assert [output.push([byte]).text for byte in "🙂".encode()[:3]] == ["", "", ""]
    assert output.push([]).text == ""
    assert output.finish().text == "\ufffd"
    assert answer(parser(), [0xC3], [0x41], [0xFF]).text == "\ufffdA\ufffd"


def test_control_tokens_are_hidden_unless_they_are_wanted() -> None:
    ids = [*TAGS.ids("a<think>b"), EOS]
    assert answer(parser(), ids).text == "ab"
    assert answer(parser(skip_special_tokens=False), ids).text == "a<think>b</s>"


# --- thoughts and calls -------------------------------------------------------------------------------------------------


def test_thoughts_and_content() -> None:
    assert both("<think>\nWhy?\n</think>\n\nBecause.", thinks=True) == Answer("Because.", "Why?", num_reasoning_tokens=8)
    assert both("Why?\n</think>\n\nBecause.", is_open=True) == Answer("Because.", "Why?", num_reasoning_tokens=6)
    assert both("Why?", is_open=True) == Answer("", "Why?", num_reasoning_tokens=4)
    assert both("Because.", thinks=True) == Answer("Because.")
    assert both(" <think></think>", thinks=True) == Answer(num_reasoning_tokens=3)


def test_thoughts_are_counted_as_they_come() -> None:
    output = parser(thinks=True)
    counts = []
    for token in [*TAGS.ids(" <think>\nab"), EOS, *TAGS.ids("</think>\nHi")]:
        output.push([token])
        counts.append(output.num_reasoning_tokens)
    assert counts == [0, 2, 3, 4, 5, 6, 7, 7, 7, 7]


def test_a_tag_of_thoughts_is_hidden_in_content_and_shown_to_nobody() -> None:
    assert answer(parser(thinks=True), TAGS.ids("a<think>b</think>")).text == "ab"
    assert answer(parser(thinks=True, calls=True), TAGS.ids("<think>a</think> </think>b")) == Answer(
        "b", "a", num_reasoning_tokens=3
    )


def test_a_call_within_thoughts_is_a_thought() -> None:
    text = "<tool_call>x</tool_call>\n</think>b"
    as_text = answer(parser(PLAIN, is_open=True, calls=True), text.encode())
    assert as_text == Answer("b", "<tool_call>x</tool_call>", num_reasoning_tokens=len(text) - 1)
    # Marks that are control tokens are not shown, as no other control token is.
    assert answer(parser(is_open=True, calls=True), TAGS.ids(text)) == Answer("b", "x", num_reasoning_tokens=5)


def test_calls() -> None:
    called = [("look", '{"at": "é"}', False)]
    assert both(f"I look. {CALL}", calls=True) == Answer("I look.", calls=called)
    assert both(CALL, thinks=True, calls=True) == Answer(calls=called)
    assert both(f"<think>a</think>\n{CALL}{CALL}", thinks=True, calls=True) == Answer(
        reasoning="a", calls=called * 2, num_reasoning_tokens=3
    )
    assert both(f"{CALL} more {CALL}", calls=True, parallel=False) == Answer(calls=called, ended="call")
    assert both(CALL[:50], calls=True) == Answer(calls=[("look", '{"at": "é', True)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<think>a STOP b</think>c STOP d", Answer("c ", "a STOP b", num_reasoning_tokens=10, ended="stop")),
        ("<think>ST</think>OP", Answer("OP", "ST", num_reasoning_tokens=4)),
        (
            '<tool_call>{"name": "look", "arguments": {"at": "STOP"}}</tool_call>',
            Answer(calls=[("look", '{"at": "STOP"}', False)]),
        ),
        (f"STOP {CALL}", Answer(ended="stop")),
        (f"{CALL} a STOP", Answer("a ", calls=[("look", '{"at": "é"}', False)], ended="stop")),
        (f"ST{CALL}OP", Answer("STOP", calls=[("look", '{"at": "é"}', False)])),
    ],
)
def test_stop_strings_count_in_content_only(text: str, expected: Answer) -> None:
    assert both(text, stop=("STOP",), thinks=True, calls=True) == expected


def test_a_call_behind_a_stop_string_does_not_end_the_answer() -> None:
    output = parser(PLAIN, stop=("STOP",), calls=True, parallel=False)
    assert output.push(f"STOP {CALL}".encode()) == Parsed()
    assert (output.stopped, output.ended_by_call) == (True, False)
    assert output.push(CALL.encode()) == Parsed()
    assert output.finish() == Parsed()


PIECES = st.sampled_from(
    [*CONTROL, CALL, CALL[:25], "<thi", "STOP", "ST", "OP", " ", "\n", "é", "🙂", "word", '{"name": "look"', "<s>", "\x80"]
)


@settings(deadline=None, max_examples=300)
@given(
    data=st.data(),
    pieces=st.lists(PIECES, max_size=10),
    stop=st.sampled_from([(), ("STOP",), ("TO", "é"), (" ",)]),
    thinks=st.booleans(),
    is_open=st.booleans(),
    calls=st.booleans(),
    parallel=st.booleans(),
    skip=st.booleans(),
    tags=st.booleans(),
)
def test_the_answer_does_not_depend_on_the_groups(
    data: st.DataObject, pieces: list[str], stop: tuple[str, ...], skip: bool, tags: bool, **options: bool
) -> None:
    tokenizer = TAGS if tags else PLAIN
    ids = [token for piece in pieces for token in (TAGS.ids(piece) if tags else piece.encode())]
    if data.draw(st.booleans()):
        ids.insert(data.draw(st.integers(0, len(ids))), 0xE2)  # a code point that never ends
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=10)))
    groups = [ids[a:b] for a, b in zip([0, *cuts], [*cuts, len(ids)], strict=True)]
    options["skip_special_tokens"] = skip
    one_by_one = answer(parser(tokenizer, stop=stop, **options), *([token] for token in ids))
    assert answer(parser(tokenizer, stop=stop, **options), *groups) == one_by_one
    assert answer(parser(tokenizer, stop=stop, **options), ids) == one_by_one
    if options["thinks"] or options["is_open"]:
        assert one_by_one.num_reasoning_tokens <= len(ids)
