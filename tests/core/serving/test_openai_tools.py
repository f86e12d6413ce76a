"""The official client's helpers for tools and structured output against scripted answers: what they send is understood, and
what they get back they can read."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageFunctionToolCall, ChatCompletionMessageParam
from pydantic import BaseModel

from core.serving.scripted import STARTED, USAGE
from core.serving.test_openai_client import connected
from inferflux_core.serving.generation import CallDelta, ChatPrompt, Delta, Done

ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How is the weather in Paris?"}]


class GetWeather(BaseModel):
    """Tells the weather."""

    city: str
    days: int = 1


class Person(BaseModel):
    name: str
    age: int


TOOL = openai.pydantic_function_tool(GetWeather)
CALLED = (
    STARTED,
    Delta(0, "", calls=[CallDelta(0, "call_a", "GetWeather", '{"city": ')]),
    Delta(0, "", calls=[CallDelta(0, arguments='"Paris", "days": 2}')]),
    Delta(0, "", None, "tool_calls", "", []),
    Done(USAGE),
)
ANSWERED = (STARTED, Delta(0, '{"name": "Ann", '), Delta(0, '"age": 42}', finish_reason="stop"), Done(USAGE))


async def test_calls_and_their_results_go_back_and_forth() -> None:
    async with connected(*CALLED) as (client, s):
        answer = await client.chat.completions.create(model="tiny", messages=ASK, tools=[TOOL], tool_choice="required")
        message = answer.choices[0].message
        assert (message.content, answer.choices[0].finish_reason) == (None, "tool_calls")
        assert message.tool_calls is not None
        call = message.tool_calls[0]
        assert isinstance(call, ChatCompletionMessageFunctionToolCall)
        assert (call.id, call.function.name) == ("call_a", "GetWeather")
        assert json.loads(call.function.arguments) == {"city": "Paris", "days": 2}
        result: ChatCompletionMessageParam = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
        history: list[Any] = [*ASK, message, result]
        await client.chat.completions.create(model="tiny", messages=history, tools=[TOOL])
    requests = [request for _, request in s.pipeline.requests]
    assert requests[0].tools is not None
    assert (requests[0].tools.must_call, requests[0].tools.functions[0].strict) == (True, True)
    prompt = requests[1].prompts[0]
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages[1]["tool_calls"] == [
        {"id": "call_a", "type": "function", "function": {"name": "GetWeather", "arguments": {"city": "Paris", "days": 2}}}
    ]
    assert prompt.messages[2] == {"role": "tool", "content": "sunny", "tool_call_id": "call_a"}


async def test_streamed_calls() -> None:
    async with connected(*CALLED) as (client, _):
        stream = await client.chat.completions.create(model="tiny", messages=ASK, tools=[TOOL], stream=True)
        pieces = [piece async for chunk in stream for piece in chunk.choices[0].delta.tool_calls or ()]
    assert [(piece.index, piece.id, piece.type) for piece in pieces] == [
        (0, "call_a", "function"),
        (0, None, None),
        (0, None, None),
    ]
    assert pieces[0].function is not None
    assert (pieces[0].function.name, pieces[0].function.arguments) == ("GetWeather", "")
    assert "".join(piece.function.arguments or "" for piece in pieces if piece.function) == '{"city": "Paris", "days": 2}'


async def test_parsed_answers() -> None:
    async with connected(*ANSWERED) as (client, s):
        answer = await client.chat.completions.parse(model="tiny", messages=ASK, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ann", age=42)
    sent = s.pipeline.requests[0][1].format
    assert sent is not None
    assert (sent.kind, sent.param) == ("json_schema", "response_format")
    assert isinstance(sent.value, dict)
    assert sent.value["required"] == ["name", "age"]


async def test_parsed_calls() -> None:
    async with connected(*CALLED) as (client, _):
        answer = await client.chat.completions.parse(model="tiny", messages=ASK, tools=[TOOL])
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.parsed_arguments == GetWeather(city="Paris", days=2)


async def test_an_answer_that_was_cut_is_not_parsed() -> None:
    async with connected(STARTED, Delta(0, '{"na', finish_reason="length"), Done(USAGE)) as (client, _):
        with pytest.raises(openai.LengthFinishReasonError):
            await client.chat.completions.parse(model="tiny", messages=ASK, response_format=Person)


async def test_stream_helper_with_a_format() -> None:
    async with (
        connected(*ANSWERED) as (client, _),
        client.chat.completions.stream(model="tiny", messages=ASK, response_format=Person) as stream,
    ):
        events = [event async for event in stream]
        final = await stream.get_final_completion()
    assert "".join(event.delta for event in events if event.type == "content.delta") == '{"name": "Ann", "age": 42}'
    assert [event.parsed for event in events if event.type == "content.done"] == [Person(name="Ann", age=42)]
    assert final.choices[0].message.parsed == Person(name="Ann", age=42)
    assert final.choices[0].finish_reason == "stop"


async def test_stream_helper_with_tools() -> None:
    async with (
        connected(*CALLED) as (client, _),
        client.chat.completions.stream(model="tiny", messages=ASK, tools=[TOOL]) as stream,
    ):
        events = [event async for event in stream]
        final = await stream.get_final_completion()
    deltas = [event for event in events if event.type == "tool_calls.function.arguments.delta"]
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert "".join(event.arguments_delta for event in deltas) == '{"city": "Paris", "days": 2}'
    assert [(event.name, event.parsed_arguments) for event in done] == [("GetWeather", GetWeather(city="Paris", days=2))]
    calls = final.choices[0].message.tool_calls
    assert calls is not None
    assert (calls[0].id, calls[0].function.parsed_arguments) == ("call_a", GetWeather(city="Paris", days=2))
    assert final.choices[0].finish_reason == "tool_calls"


async def test_thoughts_are_where_other_clients_look_for_them() -> None:
    async with connected(STARTED, Delta(0, "Yes", None, "stop", "Hm"), Done(USAGE)) as (client, _):
        answer = await client.chat.completions.create(model="tiny", messages=ASK, reasoning_effort="low")
    extra = answer.choices[0].message.model_extra
    assert extra is not None
    assert (extra["reasoning_content"], extra["reasoning"]) == ("Hm", "Hm")


async def test_older_functions() -> None:
    async with connected(*CALLED) as (client, s):
        answer = await client.chat.completions.create(
            model="tiny",
            messages=ASK,
            functions=[{"name": "GetWeather", "parameters": {}}],
            function_call={"name": "GetWeather"},
        )
    message = answer.choices[0].message
    assert message.function_call is not None
    assert json.loads(message.function_call.arguments) == {"city": "Paris", "days": 2}
    assert (message.tool_calls, answer.choices[0].finish_reason) == (None, "function_call")
    tools = s.pipeline.requests[0][1].tools
    assert tools is not None
    assert (tools.must_call, tools.parallel) == (True, False)
