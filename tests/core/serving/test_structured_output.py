"""What a request asks of its answer, from the pipeline's request to the tokens of a real engine (the fake model's, that is)."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from core.serving.noted_leases import KEY, Stand, exhaust, made, request, standing
from inferflux_core.engine.types import Constraint, EngineOutput, FinishReason
from inferflux_core.errors import InvalidRequestError, RequestTimeoutError
from inferflux_core.models.chat_template import ChatTemplate
from inferflux_core.models.output_parser import OutputParser
from inferflux_core.models.reasoning.formats import reasoning_format
from inferflux_core.models.reasoning.options import ReasoningOptions
from inferflux_core.models.structured.output_format import OutputFormat
from inferflux_core.models.tool_calls.calls import Function, ToolRequest
from inferflux_core.models.tool_calls.formats import tool_format
from inferflux_core.serving.choice import Choice
from inferflux_core.serving.generation import CallDelta, ChatPrompt, Delta, Done, Event
from inferflux_core.serving.grammars import RequestGrammars
from inferflux_core.serving.pipeline import Pipeline
from inferflux_core.settings import StructuredOutputSettings

LIMITS = StructuredOutputSettings()
CHAT = ChatPrompt([{"role": "user", "content": "hi"}])
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
PERSON = OutputFormat(kind="json_schema", value=SCHEMA)
F, G = Function("f", "Does it.", SCHEMA), Function("g")
BOTH = ToolRequest(functions=(F, G), allowed=frozenset({"f", "g"}))


@dataclass
class Yes:
    """Lets every grammar pass, and notes what it was asked."""

    asked: list[tuple[str, str]] = field(default_factory=list)

    async def check(self, grammar: str, *, tenant: str, param: str) -> None:
        self.asked.append((tenant, param))


@pytest.fixture
def checker() -> Yes:
    return Yes()


@pytest.fixture
async def stand(checker: Yes) -> AsyncIterator[Stand]:
    async with standing(grammars=RequestGrammars(LIMITS, checker)) as there:
        yield there


@dataclass
class Answered:
    """All that came, put together."""

    text: str
    reasoning: str
    calls: dict[int, tuple[str, str]]
    finish_reason: str | None
    events: Sequence[Event]


async def answered(stand: Stand, **fields: Any) -> Answered:
    values = {"prompts": [CHAT], "max_tokens": 200, "ignore_eos": False, **fields}
    events, _ = await stand.ask(**values)
    deltas = [event for event in events if isinstance(event, Delta)]
    pieces: list[CallDelta] = [piece for delta in deltas for piece in delta.calls]
    calls = {
        piece.index: (piece.name, "".join(p.arguments for p in pieces if p.index == piece.index))
        for piece in pieces
        if piece.name
    }
    text, reasoning = "".join(delta.text for delta in deltas), "".join(delta.reasoning for delta in deltas)
    return Answered(text, reasoning, calls, deltas[-1].finish_reason, events)


FORMATS: list[tuple[OutputFormat, str]] = [
    (PERSON, r'\{"kind": "[ab]", "count": \d\}'),
    (OutputFormat(kind="choice", value=["red", "green"], param="guided_choice"), "red|green"),
    (OutputFormat(kind="regex", value="[a-c]{3}-x", param="guided_regex"), "[a-c]{3}-x"),
    (OutputFormat(kind="grammar", value='root ::= "a" ("b" | "c") "d"', param="grammar"), "a[bc]d"),
]


@pytest.mark.parametrize(("format", "pattern"), FORMATS, ids=lambda value: getattr(value, "kind", ""))
@pytest.mark.parametrize("temperature", [0.0, 1.5])
async def test_answers_are_what_was_asked_for(stand: Stand, format: OutputFormat, pattern: str, temperature: float) -> None:
    for prompt in (CHAT, "hi"):
        answer = await answered(stand, format=format, temperature=temperature, prompts=[prompt], seed=7)
        assert re.fullmatch(pattern, answer.text), answer.text
        assert answer.finish_reason == "stop"
    given = stand.engine.given[0].constraint
    assert given is not None
    assert (given.grammar != "", given.thinking) == (True, None)


async def test_several_answers_are_held_to_it_each(stand: Stand) -> None:
    events, _ = await stand.ask(prompts=["a", "b"], n=2, max_tokens=50, format=FORMATS[2][0], temperature=1.0, ignore_eos=False)
    texts = ["".join(e.text for e in events if isinstance(e, Delta) and e.index == index) for index in range(4)]
    assert all(re.fullmatch(FORMATS[2][1], text) for text in texts), texts


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("name", ["f", "g"])
async def test_a_call_that_has_to_be_made_is_made(stand: Stand, name: str, parallel: bool) -> None:
    tools = replace(BOTH, allowed=frozenset({name}), must_call=True, parallel=parallel)
    answer = await answered(stand, tools=tools, max_tokens=1500, temperature=1.0, seed=3)
    assert answer.text == ""
    assert answer.finish_reason in ({"tool_calls", "length"} if parallel else {"tool_calls"})
    called, arguments = answer.calls[0]
    assert called == name
    assert (json.loads(arguments).keys() == {"kind", "count"}) if name == "f" else json.loads(arguments) == {}
    if not parallel:
        assert len(answer.calls) == 1
    await stand.idle()


async def test_where_calls_are_the_models_choice_nothing_is_enforced_but_strict_functions(stand: Stand) -> None:
    await answered(stand, tools=BOTH, max_tokens=5)
    assert stand.engine.given[-1].constraint is None
    for tools in (replace(BOTH, functions=(replace(F, strict=True), G)), replace(BOTH, allowed=frozenset({"g"}))):
        await answered(stand, tools=tools, max_tokens=5)
        assert stand.engine.given[-1].constraint is not None


async def test_a_format_beside_tools_is_that_of_an_answer_that_calls_nothing(stand: Stand) -> None:
    for opening, called in (("{", False), ("<", True)):
        bias = {ord(opening): 100.0}  # the beginnings of the two are equally likely to this model, but for the prompt
        tools = replace(BOTH, parallel=False)
        answer = await answered(stand, tools=tools, format=PERSON, temperature=1.0, seed=3, logit_bias=bias, max_tokens=300)
        assert (answer.finish_reason, len(answer.calls)) == (("tool_calls", 1) if called else ("stop", 0))
        assert re.fullmatch("" if called else FORMATS[0][1], answer.text)
    must = await answered(stand, tools=replace(BOTH, must_call=True, parallel=False), format=PERSON)
    assert (must.text, must.finish_reason) == ("", "tool_calls")


async def test_a_call_that_ends_with_the_tokens_says_so(stand: Stand) -> None:
    tools = ToolRequest(functions=(F,), allowed=frozenset({"f"}), must_call=True, parallel=False)
    answer = await answered(stand, tools=tools, max_tokens=55)
    assert answer.finish_reason == "length"
    assert answer.calls[0][0] == "f"
    last = [event for event in answer.events if isinstance(event, Delta) and event.calls][-1]
    assert last.calls[-1].incomplete


async def test_a_format_beside_tools_holds_no_function_to_its_schema_that_is_not_strict(stand: Stand) -> None:
    bad = Function("g", "", {"type": "object", "properties": {"a": {"$ref": "http://elsewhere/"}}})
    tools = ToolRequest(functions=(F, bad), allowed=frozenset({"f", "g"}))
    assert (await answered(stand, tools=tools, format=PERSON, max_tokens=5)).finish_reason == "length"
    with pytest.raises(InvalidRequestError) as caught:
        await answered(stand, tools=replace(tools, functions=(F, replace(bad, strict=True))), format=PERSON)
    assert caught.value.param == "tools[1].function.parameters"


async def test_the_grammar_of_calls_is_that_of_the_models_format(stand: Stand) -> None:
    """Two formats whose marks are no control tokens, and one template."""
    tools = replace(BOTH, allowed=frozenset({"g"}), must_call=True, parallel=False)
    model = stand.models.get(None)
    assert model.chat is not None
    for name in ("hermes", "json", "hermes"):
        model.chat = replace(model.chat, tools=tool_format(name, model.chat.source))
        answer = await answered(stand, tools=tools)
        assert answer.calls == {0: ("g", "{}")}, name


async def test_what_becomes_of_a_sequence_whose_choice_has_ended_does_not_matter(stand: Stand) -> None:
    class Engine:
        def abort(self, ids: list[str]) -> None:
            pass

    tokenizer = stand.models.get(None).ready_tokenizer()
    choices = {"r": Choice(0, "r", tokenizer, OutputParser(tokenizer, stop=["x"]))}
    error = EngineOutput("r", [], FinishReason.ERROR, 3, 0)
    outputs = [EngineOutput("r", list(b"ax"), None, 2, 0), error]
    deltas = Pipeline._deltas(Engine(), request(), choices, outputs)  # type: ignore[arg-type]  # all that it needs of one
    assert [(delta.text, delta.finish_reason) for delta in deltas] == [("a", "stop")]


# --- thoughts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def thinker(checker: Yes) -> AsyncIterator[Stand]:
    """A model whose prompts end within thoughts, which it would never end by itself."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}<think>{# </think> #}"
    async with standing(grammars=RequestGrammars(LIMITS, checker)) as there:
        model = there.models.get(None)
        assert model.chat is not None
        own = model.chat.template
        new = ChatTemplate(template, bos_token="", eos_token="", special_tokens=frozenset())
        model.chat = replace(model.chat, template=new, source=template, reasoning=reasoning_format("auto", template))
        own.close()
        yield there


async def test_a_budget_ends_thoughts_and_what_follows_is_what_was_asked_for(thinker: Stand) -> None:
    answer = await answered(thinker, format=PERSON, reasoning=ReasoningOptions(budget=10))
    assert 0 < len(answer.reasoning) <= 10
    assert re.fullmatch(FORMATS[0][1], answer.text)
    done = answer.events[-1]
    assert isinstance(done, Done)
    assert 10 <= done.usage.reasoning_tokens <= 10 + len("\n</think>")
    constraint = thinker.engine.given[0].constraint
    assert constraint is not None
    assert constraint.thinking is not None
    assert (constraint.thinking.is_open, constraint.thinking.budget) == (True, 10)


async def test_a_budget_alone_needs_no_grammar_and_no_check(thinker: Stand, checker: Yes) -> None:
    answer = await answered(thinker, max_tokens=50, reasoning=ReasoningOptions(budget=10, include=False))
    assert (answer.reasoning, bool(answer.text)) == ("", True)
    constraint = thinker.engine.given[0].constraint
    assert constraint is not None
    assert constraint.grammar == ""
    assert checker.asked == []
    free = await answered(thinker, max_tokens=50)
    assert (len(free.reasoning), free.text, thinker.engine.given[-1].constraint) == (50, "", None)


async def test_thoughts_may_stay_in_the_text(thinker: Stand) -> None:
    apart = await answered(thinker, format=PERSON, reasoning=ReasoningOptions(budget=10))
    answer = await answered(thinker, format=PERSON, reasoning=ReasoningOptions(budget=10, apart=False))
    assert (answer.text, answer.reasoning) == (f"<think>\n{apart.reasoning}\n</think>\n\n{apart.text}", "")
    text = await answered(thinker, prompts=["hi"], reasoning=ReasoningOptions(apart=False), max_tokens=5)
    assert "<think>" not in text.text


async def test_thoughts_and_calls_are_counted(thinker: Stand) -> None:
    tools = replace(BOTH, allowed=frozenset({"g"}), must_call=True, parallel=False)
    answer = await answered(thinker, tools=tools, reasoning=ReasoningOptions(budget=10), n=2)
    done = answer.events[-1]
    assert isinstance(done, Done)
    page = thinker.metrics.scrape()[0].decode().splitlines()  # of metrics that were told of no model
    assert f'inferflux_reasoning_tokens_total{{model="unknown"}} {done.usage.reasoning_tokens:.1f}' in page
    assert 'inferflux_tool_calls_total{model="unknown"} 2.0' in page


async def test_text_completions_have_neither_thoughts_nor_calls(thinker: Stand) -> None:
    await answered(thinker, prompts=["hi <think>"], reasoning=ReasoningOptions(budget=10), max_tokens=50)
    assert thinker.engine.given[-1].constraint is None


# --- what cannot be held --------------------------------------------------------------------------------------------------


async def test_what_was_checked_once_is_not_checked_again_but_for_other_tenants(stand: Stand, checker: Yes) -> None:
    for _ in range(2):
        await answered(stand, format=PERSON)
        await answered(stand, format=replace(PERSON, value={**SCHEMA, "title": "other"}))
    await exhaust(stand.pipeline.generate(made(replace(KEY, tenant="globex")), request(format=PERSON, max_tokens=50)))
    assert checker.asked == [("acme", "response_format")] * 2 + [("globex", "response_format")]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"format": PERSON}, "response_format"),
        ({"format": FORMATS[1][0]}, "guided_choice"),
        ({"tools": replace(BOTH, must_call=True)}, "tool_choice"),
        ({"tools": replace(BOTH, allowed=frozenset({"g"}))}, "tool_choice"),
        ({"tools": replace(BOTH, functions=(replace(F, strict=True), G))}, "tools"),
        ({"tools": replace(BOTH, must_call=True, param="functions")}, "function_call"),
    ],
    ids=lambda value: str(value)[:40],
)
async def test_turned_off_it_is_refused(fields: dict[str, Any], param: str) -> None:
    async with standing() as stand:
        with pytest.raises(InvalidRequestError, match=r"structured_output\.enabled") as caught:
            await answered(stand, **fields)
        assert (caught.value.param, caught.value.code) == (param, "unsupported_parameter")
        assert stand.engine.given == []
        assert stand.book.entries == ["acquire tiny", "settle 0"]


async def test_turned_off_a_free_choice_of_tools_is_still_there() -> None:
    async with standing(structured_output={"enabled": False}) as stand:
        assert (await answered(stand, tools=BOTH, max_tokens=5)).finish_reason == "length"


async def test_a_schema_that_cannot_be_held_names_its_function(stand: Stand) -> None:
    bad = Function("g", "", {"type": "object", "properties": {"a": {"$ref": "http://elsewhere/"}}})
    tools = ToolRequest(functions=(F, bad), allowed=frozenset({"f", "g"}), must_call=True)
    with pytest.raises(InvalidRequestError) as caught:
        await answered(stand, tools=tools)
    assert (caught.value.param, caught.value.code) == ("tools[1].function.parameters", "invalid_json_schema")
    # Nobody is held to it where it may not be called, or where calling is free.
    strict = replace(tools, functions=(replace(F, strict=True), bad), must_call=False)
    for held in (replace(tools, allowed=frozenset({"f"})), replace(tools, must_call=False), strict):
        assert (await answered(stand, tools=held, max_tokens=5)).finish_reason == "length"


async def test_what_the_engine_cannot_hold_is_the_requests_fault(stand: Stand) -> None:
    """The checker here lets everything pass; the engine does not."""
    wrong = OutputFormat(kind="grammar", value="start: nowhere", param="grammar")
    with pytest.raises(InvalidRequestError) as caught:
        await answered(stand, format=wrong)
    assert (caught.value.param, caught.value.code) == ("grammar", "constraint_failed")
    assert stand.book.entries[-1].startswith("settle")
    assert re.fullmatch(FORMATS[1][1], (await answered(stand, format=FORMATS[1][0])).text), "the next one is answered"


async def test_a_check_that_takes_too_long_ends_at_the_requests_deadline() -> None:
    class Never:
        async def check(self, grammar: str, *, tenant: str, param: str) -> None:
            await asyncio.Event().wait()

    async with standing(grammars=RequestGrammars(LIMITS, Never())) as stand:
        async with asyncio.timeout(5):
            with pytest.raises(RequestTimeoutError, match="schema or grammar"):
                await exhaust(stand.pipeline.generate(made(KEY, 0.05), request(format=PERSON)))
        assert stand.book.entries == ["acquire tiny", "settle 0"]


@pytest.mark.parametrize("number", [None, 0, 4])
async def test_how_much_to_guess_reaches_the_engine(stand: Stand, number: int | None) -> None:
    await answered(stand, num_speculative_tokens=number, max_tokens=2)
    assert stand.engine.given[0].num_speculative_tokens == number


@pytest.mark.parametrize("options", [ReasoningOptions(effort="none"), ReasoningOptions(budget=0)])
async def test_without_thoughts_the_grammar_begins_at_once(thinker: Stand, checker: Yes, options: ReasoningOptions) -> None:
    """Or a model that would rather think begins its thoughts all the same, where the grammar would have answered."""
    model = thinker.models.get(None)
    grammars, tokenizer = RequestGrammars(LIMITS, checker), model.ready_tokenizer()
    asked = request(reasoning=options)
    constraint = grammars.constraint(asked, "start: /x/", model.chat, tokenizer, False)
    assert constraint == Constraint(grammar="start: /x/")
    opened = grammars.constraint(asked, "start: /x/", model.chat, tokenizer, True)
    assert opened is not None
    assert opened.thinking is not None, "the template opened thoughts all the same: they have to be ended"
