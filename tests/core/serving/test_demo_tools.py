"""The demo model behind the real server: the official client's helpers for structured output and tools, unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field

from llamacpp.demo_model import demo_files
from served import ServedInferFlux, serving

FILES = demo_files()
ASK: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the weather like in Paris today?"}]


class GetWeather(BaseModel):
    """Tells the weather of a city."""

    city: str = Field(max_length=20)
    unit: Literal["celsius", "fahrenheit"]


class City(BaseModel):
    name: str = Field(max_length=20)
    country: str = Field(max_length=20)
    has_river: bool


TOOL = openai.pydantic_function_tool(GetWeather)
OTHER: Any = {"type": "function", "function": {"name": "get_time"}}


@pytest.fixture(scope="module")
def served() -> Iterator[ServedInferFlux]:
    with serving("--model", "demo", "--max-model-len", "2048", "--max-num-seqs", "4") as server:
        yield server


@pytest.fixture(scope="module")
def client(served: ServedInferFlux) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0, timeout=60) as made:
        yield made


def test_a_parsed_answer_streamed_and_not(client: openai.OpenAI) -> None:
    question: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Tell me about Paris, as JSON."}]
    answer = client.chat.completions.parse(
        model="demo", messages=question, response_format=City, temperature=0, max_tokens=120, logprobs=True
    )
    message = answer.choices[0].message
    assert message.parsed is not None
    assert message.parsed.name == "Paris"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert "".join(entry.token for entry in answer.choices[0].logprobs.content) == message.content
    with client.chat.completions.stream(
        model="demo", messages=question, response_format=City, temperature=0, max_tokens=120
    ) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == message.parsed
    assert "".join(event.delta for event in events if event.type == "content.delta") == message.content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "GetWeather"}}], ids=str)
def test_a_parsed_call_streamed_and_not(client: openai.OpenAI, choice: Any) -> None:
    fields: dict[str, Any] = {"model": "demo", "messages": ASK, "tools": [TOOL], "tool_choice": choice, "temperature": 0}
    answer = client.chat.completions.parse(**fields, max_tokens=150, parallel_tool_calls=False)
    message = answer.choices[0].message
    assert (message.content, answer.choices[0].finish_reason) == (None, "tool_calls")
    assert message.tool_calls is not None
    call = message.tool_calls[0].function
    assert isinstance(call.parsed_arguments, GetWeather)
    assert call.name == "GetWeather"
    with client.chat.completions.stream(**fields, max_tokens=150, parallel_tool_calls=False) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    assert final.choices[0].message.tool_calls is not None
    streamed = final.choices[0].message.tool_calls[0].function
    assert (streamed.arguments, streamed.parsed_arguments) == (call.arguments, call.parsed_arguments)
    deltas = [event.arguments_delta for event in events if event.type == "tool_calls.function.arguments.delta"]
    assert "".join(deltas) == call.arguments
    assert len(deltas) > 3, "arguments come as they are written"


def test_a_result_reaches_the_model(client: openai.OpenAI) -> None:
    forced = {"type": "function", "function": {"name": "get_time"}}
    answer = client.chat.completions.create(  # type: ignore[call-overload]  # plain dicts
        model="demo", messages=ASK, tools=[TOOL, OTHER], tool_choice=forced, max_tokens=100
    )
    message = answer.choices[0].message
    call = message.tool_calls[0]
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_time", {})
    history = [*ASK, message, {"role": "tool", "tool_call_id": call.id, "content": "It is exactly twelve minutes past noon."}]
    counts = []
    for messages in (ASK, history):
        more = client.chat.completions.create(model="demo", messages=messages, tools=[TOOL, OTHER], max_tokens=1)
        counts.append(more.usage.prompt_tokens)
    assert counts[1] > counts[0] + 20
    shown = client.post(
        "/../apply-template",
        body={"messages": [dict(m) if isinstance(m, dict) else m.model_dump() for m in history], "tools": [TOOL, OTHER]},
        cast_to=dict[str, Any],
    )
    assert "twelve minutes past noon" in shown["prompt"]
    assert '"name": "get_time"' in shown["prompt"]


def test_a_call_that_is_cut_says_so(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="demo", messages=ASK, tools=[TOOL], tool_choice="required", max_tokens=15)
    choice = answer.choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls is not None
    assert choice.message.tool_calls[0].model_extra == {"status": "incomplete"}


@pytest.mark.parametrize(
    ("fields", "texts"),
    [
        ({"guided_choice": ["red", "green"]}, {"red", "green"}),
        ({"structured_outputs": {"regex": "[ab]"}}, {"a", "b"}),
        ({"grammar": 'root ::= "x" | "y"'}, {"x", "y"}),
    ],
)
def test_other_spellings(client: openai.OpenAI, fields: dict[str, Any], texts: set[str]) -> None:
    whole = client.chat.completions.create(model="demo", messages=ASK, max_tokens=20, extra_body=fields)
    assert whole.choices[0].message.content in texts
    assert whole.choices[0].finish_reason == "stop"
    text = client.completions.create(model="demo", prompt="It is", max_tokens=20, extra_body=fields)
    assert text.choices[0].text in texts


def test_a_wrong_schema_is_the_requests_fault(client: openai.OpenAI, served: ServedInferFlux) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": "https://example.com/schema.json"}}}
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(  # type: ignore[call-overload]  # plain dicts
            model="demo", messages=ASK, response_format=schema
        )
    assert (caught.value.code, caught.value.param) == ("invalid_json_schema", "response_format")
    assert "$ref" in caught.value.message
    details = served.get("/v1/models/demo")[1]["inferflux"]["details"]
    assert details["tool_parser"] == "hermes"
    assert "reasoning_parser" not in details
