"""Tools on the wire: what requests may say of them, and how calls come back, streamed or not."""

from __future__ import annotations

import time
from typing import Any

import pytest

from core.serving.conformance import conforms, needs_document
from core.serving.scripted import CHAT, STARTED, USAGE, Stand, entry, stand
from core.serving.test_chat import URL, events
from inferflux_core.serving.generation import CallDelta, Delta, Done, ToolRequest

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: dict[str, Any] = {"name": "get_weather", "description": "Tells it.", "parameters": SCHEMA, "strict": True}
TIME: dict[str, Any] = {"name": "get_time"}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": TIME}]
BOTH = frozenset({"get_weather", "get_time"})


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


async def asked(**fields: Any) -> ToolRequest | None:
    """What the pipeline is asked about tools."""
    s = stand()
    async with s.client() as client:
        response = await client.post(URL, json={**CHAT, **fields})
    assert response.status_code == 200, response.text
    return s.pipeline.requests[0][1].tools


async def refused(s: Stand, **fields: Any) -> tuple[str, str | None, str]:
    """Parameter, code and message."""
    async with s.client() as client:
        response = await client.post(URL, json={**CHAT, **fields})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (400, "invalid_request_error")
    assert s.pipeline.requests == []
    return error["param"], error["code"], error["message"]


# --- requests -----------------------------------------------------------------------------------------------------------


async def test_functions_reach_the_pipeline() -> None:
    request = await asked(tools=TOOLS)
    assert request is not None
    weather, of_day = request.functions
    assert (weather.name, weather.description, weather.parameters, weather.strict) == ("get_weather", "Tells it.", SCHEMA, True)
    assert (of_day.name, of_day.description, of_day.parameters, of_day.strict) == ("get_time", "", None, False)
    assert (request.allowed, request.must_call, request.parallel, request.param) == (BOTH, False, True, "tools")


NESTED: dict[str, Any] = {
    "type": "allowed_tools",
    "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "get_time"}}]},
}
FLAT: dict[str, Any] = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "get_time"}]}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "get_time"}}


@pytest.mark.parametrize(
    ("choice", "allowed", "must_call", "parallel"),
    [
        ("auto", BOTH, False, True),
        (None, BOTH, False, True),
        ("required", BOTH, True, True),
        (NAMED, frozenset({"get_time"}), True, False),
        ({"type": "function", "name": "get_time"}, frozenset({"get_time"}), True, False),
        (NESTED, frozenset({"get_time"}), True, True),
        (FLAT, frozenset({"get_time"}), False, True),
    ],
)
async def test_choices(choice: object, allowed: frozenset[str], must_call: bool, parallel: bool) -> None:
    request = await asked(tools=TOOLS, tool_choice=choice)
    assert request is not None
    assert (request.allowed, request.must_call, request.parallel) == (allowed, must_call, parallel)
    assert len(request.functions) == 2, "the model is told of all of them"


async def test_calls_one_after_the_other() -> None:
    request = await asked(tools=TOOLS, parallel_tool_calls=False)
    assert request is not None
    assert request.parallel is False


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tools": []},
        {"tools": None, "tool_choice": "auto"},
        {"tool_choice": "none"},
        {"tools": TOOLS, "tool_choice": "none"},
        {"functions": [TIME], "function_call": "none"},
        {"function_call": "auto"},
    ],
)
async def test_nothing_to_call(fields: dict[str, Any]) -> None:
    assert await asked(**fields) is None


@pytest.mark.parametrize(
    ("choice", "allowed", "must_call"), [(None, BOTH, False), ("auto", BOTH, False), (TIME, frozenset({"get_time"}), True)]
)
async def test_older_functions(choice: object, allowed: frozenset[str], must_call: bool) -> None:
    request = await asked(functions=[WEATHER, TIME], function_call=choice)
    assert request is not None
    assert (request.allowed, request.must_call, request.parallel, request.param) == (allowed, must_call, False, "functions")


@pytest.mark.parametrize(
    ("fields", "param", "code", "words"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function", None, "Missing"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name", None, "Missing"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type", "unsupported_value", "'custom'"),
        ({"tools": [tool(), {"type": "web_search"}]}, "tools[1].type", "unsupported_value", "'web_search'"),
        ({"tools": {}}, "tools", None, "array"),
        ({"tools": [tool(name="")]}, "tools[0].function.name", None, "1 to 128 characters"),
        ({"tools": [tool(name="a b")]}, "tools[0].function.name", None, "a-z, A-Z, 0-9"),
        ({"tools": [tool(name="f\n")]}, "tools[0].function.name", None, "1 to 128 characters"),
        ({"tools": [tool(name="f<|im_end|>")]}, "tools[0].function.name", None, "1 to 128 characters"),
        ({"tools": [tool(name="é")]}, "tools[0].function.name", None, "1 to 128 characters"),
        ({"tools": [tool(name="x" * 129)]}, "tools[0].function.name", None, "1 to 128 characters"),
        ({"tools": [tool(name="x"), tool(name="x")]}, "tools[1].function.name", None, "another one of the name 'x'"),
        ({"tools": [tool(parameters=[])]}, "tools[0].function.parameters", None, "an object"),
        ({"tools": [tool(parameters={"type": "string"})]}, "tools[0].function.parameters", "invalid_json_schema", "object"),
        ({"tools": [tool(description="x" * 2**20)]}, "tools", None, "together are longer than"),
        ({"tools": [tool(strict=1)]}, "tools[0].function.strict", None, "boolean"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice", None, "'required'"),
        ({"tools": TOOLS, "tool_choice": 5}, "tool_choice", None, "an object that names a tool"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice.function.name", None, "Missing"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice.type", "unsupported_value", "'custom'"),
        ({"tools": TOOLS, "tool_choice": {**NAMED, "function": {"name": "g"}}}, "tool_choice", None, "'g' is none of"),
        ({"tools": TOOLS, "tool_choice": {**FLAT, "tools": [{"name": "g"}]}}, "tool_choice", None, "'g' is none of"),
        ({"tools": TOOLS, "tool_choice": {**FLAT, "tools": []}}, "tool_choice.tools", None, "at least 1"),
        ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools", None, "Missing"),
        ({"tools": TOOLS, "tool_choice": {**FLAT, "mode": "none"}}, "tool_choice.mode", None, "'auto'"),
        ({"tool_choice": "required"}, "tool_choice", None, "'tools' are there"),
        ({"tools": [], "tool_choice": NAMED}, "tool_choice", None, "'tools' are there"),
        ({"tools": TOOLS, "functions": [TIME]}, "functions", None, "'tools'"),
        ({"tools": TOOLS, "function_call": TIME}, "function_call", None, "'tool_choice'"),
        ({"functions": [TIME], "tool_choice": "required"}, "tool_choice", None, "'tools' are there"),
        ({"functions": [TIME], "function_call": {"name": "g"}}, "function_call", None, "'g' is none of"),
        ({"functions": [{"name": "a b"}]}, "functions[0].name", None, "1 to 128 characters"),
        ({"function_call": TIME}, "function_call", None, "'functions' are there"),
        ({"function_call": "required", "functions": [TIME]}, "function_call", None, "'none'"),
    ],
    ids=lambda value: str(value)[:70],
)
async def test_what_is_wrong_with_tools(fields: dict[str, Any], param: str, code: str | None, words: str) -> None:
    found_param, found_code, message = await refused(stand(), **fields)
    assert (found_param, found_code) == (param, code), message
    assert words in message


async def test_too_many_tools_are_refused_quickly() -> None:
    many = [tool(name=f"f{n}", parameters={}) for n in range(10_000)]
    began = time.perf_counter()
    param, _, message = await refused(stand(), tools=many)
    print(f"\n10,000 tools: {(time.perf_counter() - began) * 1000:.0f} ms")
    assert (param, "at most 512 items" in message) == ("tools", True)
    assert time.perf_counter() - began < 1, "the budget is 100 ms on an idle machine; this allows for a busy one"
    assert (await refused(stand(), tools=[*many, tool()]))[0] == "tools"
    assert (await refused(stand(max_tools=1), tools=TOOLS))[0] == "tools"


async def test_calls_and_results_of_older_clients_reach_the_template() -> None:
    messages = [
        {"role": "assistant", "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "f", "content": "42"},
    ]
    s = stand()
    async with s.client() as client:
        assert (await client.post(URL, json={"messages": messages})).status_code == 200
    assert s.pipeline.requests[0][1].prompts[0].messages == [  # type: ignore[union-attr]  # it is a ChatPrompt
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"id": None, "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "42", "name": "f"},
    ]


# --- replies ------------------------------------------------------------------------------------------------------------

CALLED = (
    STARTED,
    Delta(0, "Let me see. "),
    Delta(0, "", calls=[CallDelta(0, "call_a", "get_weather", '{"ci')]),
    Delta(
        0, "", calls=[CallDelta(0, arguments='ty": "Paris"}'), CallDelta(1, "call_b", "get_time"), CallDelta(1, arguments="{}")]
    ),
    Delta(0, "", finish_reason="tool_calls"),
    Done(USAGE),
)
CUT = (STARTED, Delta(0, "", None, "length", "", [CallDelta(0, "call_a", "f", '{"x', incomplete=True)]), Done(USAGE))


async def whole_and_chunks(*script: Any, **fields: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The one choice of a whole reply, and those of the chunks of a streamed one, but for the role chunk."""
    s = stand(*script)
    async with s.client() as client:
        whole = (await client.post(URL, json={**CHAT, **fields})).json()
        chunks = events(await client.post(URL, json={**CHAT, **fields, "stream": True}))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1] == "[DONE]"
    return whole["choices"][0], [chunk["choices"][0] for chunk in chunks[1:-1]]


async def test_calls() -> None:
    whole, chunks = await whole_and_chunks(*CALLED, tools=TOOLS)
    assert whole["message"] == {
        "content": "Let me see. ",
        "role": "assistant",
        "refusal": None,
        "tool_calls": [
            {"id": "call_a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'}},
            {"id": "call_b", "type": "function", "function": {"name": "get_time", "arguments": "{}"}},
        ],
    }
    assert whole["finish_reason"] == "tool_calls"
    assert [chunk["delta"] for chunk in chunks] == [
        {"content": "Let me see. "},
        {
            "tool_calls": [
                {"index": 0, "id": "call_a", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
            ]
        },
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"ci'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": 'ty": "Paris"}'}}]},
        {"tool_calls": [{"index": 1, "id": "call_b", "type": "function", "function": {"name": "get_time", "arguments": ""}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]
    assert [chunk["finish_reason"] for chunk in chunks] == [None] * 6 + ["tool_calls"]


async def test_a_call_that_was_cut_says_so() -> None:
    whole, chunks = await whole_and_chunks(*CUT, tools=[tool()])
    assert whole["message"]["content"] is None
    assert whole["message"]["tool_calls"] == [
        {"id": "call_a", "type": "function", "function": {"name": "f", "arguments": '{"x'}, "status": "incomplete"}
    ]
    assert whole["finish_reason"] == chunks[-1]["finish_reason"] == "length"
    assert [chunk["delta"] for chunk in chunks[:2]] == [
        {"tool_calls": [{"index": 0, "id": "call_a", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"x'}, "status": "incomplete"}]},
    ]


async def test_a_call_in_the_older_shape() -> None:
    script = (
        STARTED,
        Delta(0, "", calls=[CallDelta(0, "call_a", "f", '{"x": ')]),
        Delta(0, "", None, "tool_calls", "", [CallDelta(0, arguments="1}")]),
        Done(USAGE),
    )
    whole, chunks = await whole_and_chunks(*script, functions=[{"name": "f"}])
    assert whole["message"] == {
        "content": None,
        "role": "assistant",
        "refusal": None,
        "function_call": {"name": "f", "arguments": '{"x": 1}'},
    }
    assert [chunk["delta"] for chunk in chunks] == [
        {"function_call": {"name": "f", "arguments": ""}},
        {"function_call": {"arguments": '{"x": '}},
        {"function_call": {"arguments": "1}"}},
        {},
    ]
    assert whole["finish_reason"] == chunks[-1]["finish_reason"] == "function_call"
    whole, chunks = await whole_and_chunks(*CUT, functions=[{"name": "f"}])
    assert whole["message"]["function_call"] == {"name": "f", "arguments": '{"x', "status": "incomplete"}
    assert chunks[1]["delta"] == {"function_call": {"arguments": '{"x', "status": "incomplete"}}


async def test_names_and_arguments_are_escaped_in_chunks() -> None:
    text = '{"a": "\u2028\\n\x00é😀"}'
    script = (STARTED, Delta(0, "", None, "tool_calls", "", [CallDelta(0, 'c"1', "f.g-h", text)]), Done(USAGE))
    whole, chunks = await whole_and_chunks(*script, tools=[tool()])
    assert whole["message"]["tool_calls"][0]["function"]["arguments"] == text
    assert chunks[0]["delta"]["tool_calls"][0]["id"] == 'c"1'
    assert chunks[1]["delta"]["tool_calls"][0]["function"]["arguments"] == text


async def test_log_probabilities_of_calls_ride_on_their_first_chunk() -> None:
    tokens = [entry("{", -0.5), entry("}", -0.25)]
    script = (STARTED, Delta(0, "", tokens, "tool_calls", "", [CallDelta(0, "c", "f", "{}")]), Done(USAGE))
    whole, chunks = await whole_and_chunks(*script, tools=[tool()], logprobs=True)
    assert [t["logprob"] for t in whole["logprobs"]["content"]] == [-0.5, -0.25]
    assert [chunk["logprobs"] and len(chunk["logprobs"]["content"]) for chunk in chunks] == [2, None, None]


@needs_document
async def test_replies_conform_to_openais_document() -> None:
    for script in (CALLED, CUT):
        s = stand(*script)
        async with s.client() as client:
            for fields in ({"tools": TOOLS}, {"functions": [WEATHER]}):
                body = {**CHAT, **fields, "logprobs": True}
                whole = (await client.post(URL, json=body)).json()
                conforms(whole, "CreateChatCompletionResponse")
                streamed = events(await client.post(URL, json={**body, "stream": True}))
                for chunk in streamed[:-1]:
                    conforms(chunk, "CreateChatCompletionStreamResponse")


async def test_tokenize_and_the_template_show_what_the_model_would_read() -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "tools": TOOLS}
    async with stand().client() as client:
        shown = (await client.post("/apply-template", json=body)).json()
        counted = (await client.post("/tokenize", json=body)).json()
        bad = (await client.post("/tokenize", json={**body, "tools": [tool(name="a b")]})).json()
        alone = (await client.post("/tokenize", json={"prompt": "a", "tools": TOOLS})).json()
    assert shown == {"prompt": "[get_weather][get_time]<user>a"}
    assert counted["count"] == len(shown["prompt"])
    assert bad["error"]["param"] == "tools[0].function.name"
    assert (alone["error"]["param"], "'messages'" in alone["error"]["message"]) == ("tools", True)
