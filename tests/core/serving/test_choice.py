"""One choice: what its tokens become, and how it ends."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from inferflux_core.engine.types import EngineOutput, FinishReason, TokenLogprobs
from inferflux_core.models.output_parser import OutputParser
from inferflux_core.models.reasoning.formats import reasoning_format
from inferflux_core.models.reasoning.splitter import ThoughtSplitter
from inferflux_core.models.tool_calls.calls import CallDelta, Function, ToolRequest
from inferflux_core.models.tool_calls.hermes import HermesFormat
from inferflux_core.serving.choice import Choice, joined
from inferflux_core.serving.generation import Delta, TokenEntry
from inferflux_core.testing.fake_backend import FakeTokenizer

CALL = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>'


def choice(*, parallel: bool = True, stop: Sequence[str] = (), shows_thoughts: bool = True, in_text: bool = False) -> Choice:
    """A choice of a model that thinks and calls the function `f`."""
    family = reasoning_format("think", None)
    assert family is not None
    request = ToolRequest(functions=(Function("f"),), allowed=frozenset({"f"}), parallel=parallel)
    tokenizer = FakeTokenizer()
    parser = OutputParser(
        tokenizer, stop=stop, splitter=ThoughtSplitter(family, False), tools=HermesFormat().parser(request), markers=()
    )
    tags = (family.begin, family.end) if in_text else None
    return Choice(0, "r", tokenizer, parser, shows_thoughts=shows_thoughts, tags=tags)


def taken(to: Choice, *texts: str, reason: FinishReason = FinishReason.STOP) -> Delta:
    """All that comes of these outputs, in one piece; the last one ends the choice unless it has ended before."""
    total = Delta(0, "")
    number = 0
    for index, text in enumerate(texts):
        number += len(text)
        output = EngineOutput("r", list(text.encode()), reason if index == len(texts) - 1 else None, number, 3)
        delta = to.take(output)
        total = Delta(
            0,
            total.text + delta.text,
            None,
            delta.finish_reason,
            total.reasoning + delta.reasoning,
            total.calls + delta.calls,
        )
        if to.finish_reason is not None:
            break
    return total


def arguments(delta: Delta) -> str:
    return "".join(piece.arguments for piece in delta.calls)


@pytest.mark.parametrize("cut", [1, 7, 1000])
def test_thoughts_text_and_calls(cut: int) -> None:
    text = f"<think>\nHm.\n</think>\n\nSo: {CALL}"
    it = choice()
    delta = taken(it, *(text[at : at + cut] for at in range(0, len(text), cut)))
    assert (delta.reasoning, delta.text, arguments(delta)) == ("Hm.", "So:", '{"x": 1}')
    assert [(piece.index, piece.name) for piece in delta.calls if piece.name] == [(0, "f")]
    assert (it.finish_reason, delta.finish_reason) == ("tool_calls", "tool_calls")
    assert (it.num_generated, it.num_cached) == (len(text), 3)
    assert 0 < it.num_reasoning <= len("<think>\nHm.\n</think>\n\n")


def test_hidden_thoughts_are_counted_all_the_same() -> None:
    it = choice(shows_thoughts=False)
    delta = taken(it, "<think>Hm.</think>Yes")
    assert (delta.reasoning, delta.text) == ("", "Yes")
    assert it.num_reasoning > 0


@pytest.mark.parametrize("cut", [1, 7, 1000])
@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("<think>Hm.</think>Yes", "<think>\nHm.\n</think>\n\nYes"),
        (" <think>\nHm.\n</think>\n\n", "<think>\nHm.\n</think>\n\n"),
        ("<think></think>Yes", "Yes"),
        ("<think>Hm", "<think>\nHm"),  # as it was left
        ("Yes </think>", "Yes </think>"),
        (f"<think>Hm.</think>{CALL}", "<think>\nHm.\n</think>\n\n"),
        ("<think>x</think>yx", "<think>\nx\n</think>\n\ny"),
    ],
)
def test_thoughts_in_the_text_stand_between_tags(written: str, text: str, cut: int) -> None:
    it = choice(in_text=True, stop=["x"])
    delta = taken(it, *(written[at : at + cut] for at in range(0, len(written), cut)))
    assert (delta.reasoning, delta.text, bool(delta.calls)) == ("", text, CALL in written)
    assert (it.num_reasoning > 0) == written.lstrip().startswith("<think>")


def test_hidden_thoughts_are_not_in_the_text_either() -> None:
    assert taken(choice(in_text=True, shows_thoughts=False), "<think>Hm.</think>Yes").text == "Yes"


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH])
def test_a_call_that_is_cut(reason: FinishReason) -> None:
    it = choice()
    delta = taken(it, CALL[:-20], reason=reason)
    assert delta.calls[-1].incomplete
    assert it.finish_reason == reason.value, "there is no whole call"


def test_the_end_of_the_tokens_after_a_whole_call_is_the_length() -> None:
    it = choice()
    taken(it, CALL, reason=FinishReason.LENGTH)
    assert it.finish_reason == "length"


def test_one_whole_call_and_one_that_is_cut() -> None:
    it = choice()
    delta = taken(it, CALL + "\n", CALL[:-20])
    assert [piece.index for piece in delta.calls if piece.name] == [0, 1]
    assert it.finish_reason == "tool_calls"


def test_the_one_call_of_an_answer_ends_it() -> None:
    it = choice(parallel=False)
    delta = taken(it, CALL, "more", reason=FinishReason.LENGTH)
    assert (delta.text, delta.finish_reason, it.finish_reason) == ("", "tool_calls", "tool_calls")
    assert it.num_generated == CALL.index("}}") + 2, "what follows the call is not waited for, and counts for nothing"


@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_what_an_answer_costs_does_not_depend_on_how_its_tokens_were_grouped(cut: int) -> None:
    it = choice(stop=["STOP"])
    ids = list(b"some text STOP and more")
    entries: list[TokenEntry] = []
    for at in range(0, len(ids), cut):
        part = ids[at : at + cut]
        delta = it.take(EngineOutput("r", part, None, at + len(part), 3, [TokenLogprobs(-1.0, [])] * len(part)))
        entries += delta.tokens or []
        if it.finish_reason is not None:
            break
    assert (it.finish_reason, it.num_generated) == ("stop", len("some text STOP"))
    assert b"".join(entry.drawn.bytes for entry in entries) == b"some text STOP"


def test_stop_strings_end_the_text_only() -> None:
    it = choice(stop=["x"])
    delta = taken(it, f"<think>x</think>{CALL} axb", "more", reason=FinishReason.LENGTH)
    assert (delta.reasoning, delta.text, it.finish_reason) == ("x", "a", "tool_calls")
    assert taken(choice(stop=["b"]), "ab", "c", reason=FinishReason.LENGTH).finish_reason == "stop"


def test_log_probabilities_are_those_of_all_tokens() -> None:
    text = "<think>a</think>b"
    logprobs = [TokenLogprobs(-1.0, []) for _ in text]
    delta = choice().take(EngineOutput("r", list(text.encode()), FinishReason.STOP, len(text), 0, logprobs))
    assert delta.tokens is not None
    assert "".join(entry.drawn.token for entry in delta.tokens) == text


@pytest.mark.parametrize(
    ("earlier", "later", "result"),
    [
        (Delta(0, "a"), Delta(0, "b", finish_reason="stop"), Delta(0, "ab", finish_reason="stop")),
        (Delta(0, "", reasoning="a"), Delta(0, "b", reasoning="c"), Delta(0, "b", reasoning="ac")),
        (Delta(0, "a"), Delta(0, "b", calls=[CallDelta(0)]), Delta(0, "ab", calls=[CallDelta(0)])),
        (
            Delta(0, "", calls=[CallDelta(0)]),
            Delta(0, "", calls=[CallDelta(1)]),
            Delta(0, "", calls=[CallDelta(0), CallDelta(1)]),
        ),
        (Delta(0, "a"), Delta(0, "", reasoning="b"), None),
        (Delta(0, "", calls=[CallDelta(0)]), Delta(0, "a"), None),
    ],
)
def test_deltas_are_joined_unless_their_order_would_change(earlier: Delta, later: Delta, result: Delta | None) -> None:
    before = Delta(0, earlier.text, None, None, earlier.reasoning, list(earlier.calls))
    assert joined(earlier, later) is (result is not None)
    assert earlier == (before if result is None else result)
