"""Attacks on the JSON of requests and on the values in it, through the front door. Numbers are those of
reference/security.md, 7.3; 21 to 23 are in test_prompts.py. The whole matrices are in core/serving/test_json_body.py (18, 30)
and test_request_fields.py (19, 20, 25 to 28).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from attacks.api_server import CHAT, ApiServer, api_server, error_of, refusal, server_ms
from served import until

URL = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with api_server(tmp_path_factory.mktemp("server")) as there:
        yield there


@pytest.fixture(autouse=True)
def well_afterwards(server: ApiServer) -> Iterator[None]:
    """Whatever was asked of it, the same engine process answers the next one."""
    yield
    server.assert_well()


def with_field(text: bytes) -> bytes:
    """A chat completion with one more field, as bytes."""
    return json.dumps(CHAT).encode()[:-1] + b"," + text + b"}"


# --- 18: JSON that is none, or not what it should be ---------------------------------------------------------------------

BROKEN: dict[str, tuple[bytes, str | None, str | None]] = {
    "100,000 arrays": (b"[" * 100_000, "invalid_json", None),
    "100,000 closed arrays in a field": (with_field(b'"x":' + b"[" * 100_000 + b"]" * 100_000), "invalid_json", None),
    "a million keys": (with_field(b",".join(b'"%06x":0' % n for n in range(800_000))), "invalid_json", None),
    "1e400": (with_field(b'"temperature":1e400'), "invalid_json", None),
    "NaN": (with_field(b'"temperature":NaN'), "invalid_json", None),
    "2^63": (with_field(b'"seed":9223372036854775808'), None, "seed"),
    "100,000 digits": (with_field(b'"seed":' + b"1" * 100_000), "invalid_json", None),
    "-1": (with_field(b'"n":-1'), None, "n"),
    "true for an integer": (with_field(b'"n":true'), None, "n"),
    "lone surrogate": (with_field(b'"user":"\\ud800"'), "invalid_json", None),
    "invalid UTF-8": (with_field(b'"user":"\xc3\x28"'), "invalid_json", None),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps(CHAT).encode(), "invalid_json", None),
    "UTF-16": (json.dumps(CHAT).encode("utf-16"), "invalid_json", None),
    "trailing garbage": (json.dumps(CHAT).encode() + b"x", "invalid_json", None),
    "two documents": (json.dumps(CHAT).encode() * 2, "invalid_json", None),
    "empty": (b"", "invalid_json", None),
    "an array": (b"[" + json.dumps(CHAT).encode() + b"]", "invalid_json", None),
}


@pytest.mark.parametrize("name", BROKEN)
def test_18_broken_json_is_refused_quickly(server: ApiServer, name: str) -> None:
    body, code, param = BROKEN[name]
    reply = server.ask("POST", URL, body)
    assert refusal(reply) == (400, code, param)
    assert error_of(reply)["type"] == "invalid_request_error"
    print(f"\n{name}: {server_ms(reply)} ms")
    assert server_ms(reply) < 1000, "the budget is 50 ms on an idle machine; this allows for a busy one and the transfer"


def test_18_of_duplicate_keys_the_last_one_counts_for_every_check_and_for_the_answer(server: ApiServer) -> None:
    """As everything behind the parser sees one value, there is nothing to smuggle past the policy."""
    for first, last in (("secret", "open"), ("secret", "public")):
        body = with_field(f'"model":"{last}"'.encode()).replace(b'"model": "open"', f'"model": "{first}"'.encode())
        reply = server.ask("POST", URL, body)
        assert (reply.status_code, reply.json()["model"]) == (200, "open")
        record = server.record_of(reply)
        assert (record["model_requested"], record["model"], record["decision"]["object"]) == (last, "open", "model/open")
    for spelling in (b'"model"', b'"m\\u006fdel"'):
        reply = server.ask("POST", URL, with_field(spelling + b':"secret"'))
        assert refusal(reply) == (404, "model_not_found", "model")
    assert server.ask("POST", URL, with_field(b'"max_tokens":3')).json()["usage"]["completion_tokens"] == 3
    roles = b'"messages":[{"role":"user","role":"nobody","content":"x"}]'
    assert refusal(server.ask("POST", URL, with_field(roles))) == (400, None, "messages[0].role")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"name":"a","name":"b"}', "name"),
        (b'{"name":"a","n\\u0061me":"a"}', "name"),
        (b'{"name":"a","scopes":["read"],"scopes":["admin"]}', "scopes"),
        (b'{"name":"a","limits":{"rpm":1,"rpm":1000000}}', "rpm"),
    ],
)
def test_18_administrators_are_refused_duplicate_keys(server: ApiServer, body: bytes, param: str) -> None:
    before = len(server.ask("GET", "/v1/admin/api-keys", key=server.admin).json()["data"])
    assert refusal(server.ask("POST", "/v1/admin/api-keys", body, key=server.admin)) == (400, "invalid_json", param)
    assert len(server.ask("GET", "/v1/admin/api-keys", key=server.admin).json()["data"]) == before


# --- 19, 20: numbers, biases, stops --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("n", 10**6, None),
        ("best_of", 0, None),
        ("best_of", 10**6, "unsupported_parameter"),
        ("logprobs", 10**9, None),
        ("top_k", -5, None),
        ("top_k", 2**31, None),
        ("temperature", 1e308, None),
        ("temperature", -1, None),
        ("max_tokens", 0, None),
        ("max_tokens", -1, None),
        ("max_tokens", 2**31, None),
        ("min_tokens", 2**31, None),
        ("seed", 2**70, None),
        ("seed", -(2**70), None),
        ("priority", 2**63, None),
        ("stop", "", None),
        ("stop", ["a"] * 10_000, None),
        ("stop", "a" * 2**20, None),
        ("cache_salt", "a" * 2**20, None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_19_and_20_values_out_of_range(server: ApiServer, field: str, value: object, code: str | None) -> None:
    assert refusal(server.complete(**{field: value})) == (400, code, field)


def test_19_the_most_that_is_asked_for_costs_no_more_than_the_context(server: ApiServer) -> None:
    """2^31 - 1 passes as a number; it is more than the context holds."""
    assert refusal(server.complete(max_tokens=2**31 - 1)) == (400, "context_length_exceeded", "prompt")
    assert server.complete(max_tokens=1, top_k=2**31 - 1, seed=-(2**63), temperature=2, min_tokens=1).status_code == 200


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"logit_bias": {str(token): 1 for token in range(500_000)}}, "invalid_json", None),
        ({"logit_bias": {str(token): 1 for token in range(2000)}}, None, "logit_bias"),
        ({"logit_bias": {"260": 1}}, None, "logit_bias"),
        ({"logit_bias": {"2147483648": 1}}, None, "logit_bias.2147483648"),
        ({"logit_bias": {"-1": 1}}, None, "logit_bias.-1"),
        ({"logit_bias": {"\u0661": 1}}, None, "logit_bias.\u0661"),
        ({"stop_token_ids": [-1]}, None, "stop_token_ids[0]"),
        ({"stop_token_ids": [260]}, None, "stop_token_ids"),
        ({"stop_token_ids": [0] * 10**5}, None, "stop_token_ids"),
        ({"prompt": [260]}, None, "prompt"),
        ({"prompt": [2**31 - 1]}, None, "prompt"),
        ({"prompt": [-1]}, None, "prompt[0]"),
        ({"prompt": [2**63]}, None, "prompt[0]"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_20_token_ids_that_there_are_not(
    server: ApiServer, fields: dict[str, Any], code: str | None, param: str | None
) -> None:
    assert refusal(server.complete(**fields)) == (400, code, param)


def test_20_the_ends_of_what_is_allowed(server: ApiServer) -> None:
    bias = {str(token): 1e300 for token in range(260)}
    assert server.complete(logit_bias=bias, stop=["x" * 256] * 16, stop_token_ids=list(range(128))).status_code == 200


# --- 25 to 29: what a request cannot bring ---------------------------------------------------------------------------------

_LEVELS: dict[str, Any] = {"type": "integer"}
for _ in range(40):
    _LEVELS = {"type": "array", "items": _LEVELS}

_REFUSED_SCHEMAS: dict[str, Any] = {
    "recursion": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "10^5 values": {"enum": list(range(10**5))},
    "41 levels": _LEVELS,
    "elsewhere": {"$ref": "http://169.254.169.254/latest/meta-data"},
    "broken pattern": {"type": "string", "pattern": "("},
    "unknown type": {"type": "frobnicate"},
    "nothing at all": {"type": "integer", "minimum": 2, "maximum": 1},
}
_COSTLY_SCHEMAS: dict[str, Any] = {
    "slow pattern": {"type": "string", "pattern": "(a+)+$"},
    "slower pattern": {"type": "string", "pattern": "(x{1,999}){1,999}"},
    "10^9 characters": {"type": "string", "maxLength": 10**9},
}


def as_format(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}


def function(name: str, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **fields}}


@pytest.mark.parametrize("template", ["{{ messages }}", "{% for _ in range(10**9) %}x{% endfor %}"])
def test_25_templates_are_refused(server: ApiServer, template: str) -> None:
    assert refusal(server.chat(chat_template=template)) == (400, "unsupported_parameter", "chat_template")


@pytest.mark.parametrize(
    "kwargs",
    [
        {"enable_thinking": True},  # this model's template has no such variable
        {"messages": "x"},
        {"tools": "x"},
        {"bos_token": "x"},
        {"add_generation_prompt": False},
        {"raise_exception": "x"},
        {"range": 1},
        {"__class__": "x"},
        {"{{ 7 * 7 }}": 1},
        {"": 1},
    ],
    ids=str,
)
def test_25_templates_get_no_variables_but_their_own(server: ApiServer, kwargs: dict[str, object]) -> None:
    assert refusal(server.chat(chat_template_kwargs=kwargs)) == (400, None, "chat_template_kwargs")


@pytest.mark.parametrize("name", _REFUSED_SCHEMAS)
def test_26_schemas_that_cannot_be_held_are_refused_quickly(server: ApiServer, name: str) -> None:
    reply = server.chat(response_format=as_format(_REFUSED_SCHEMAS[name]))
    assert refusal(reply) == (400, "invalid_json_schema", "response_format")
    assert server_ms(reply) < 5000


@pytest.mark.parametrize("name", _COSTLY_SCHEMAS)
def test_26_schemas_that_may_cost_much_are_answered_or_refused(server: ApiServer, name: str) -> None:
    reply = server.chat(response_format=as_format(_COSTLY_SCHEMAS[name]))
    if reply.status_code != 200:
        assert refusal(reply)[0::2] == (400, "response_format")
    assert server_ms(reply) < 10_000, "2 s of CPU; this allows for a busy machine"


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"guided_regex": "("}, "invalid_grammar", "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, None, "guided_choice"),
        ({"response_format": {"type": "json_object"}, "guided_json": {}}, None, "guided_json"),
        ({"grammar": 'root ::= "'}, "invalid_grammar", "grammar"),
        ({"grammar": "start: <|im_end|>"}, "invalid_grammar", "grammar"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "unsupported_parameter", "structured_outputs.structural_tag"),
        ({"tools": [function(f"f{n}") for n in range(10_000)]}, None, "tools"),
        ({"tools": [function("f")], "tool_choice": {"type": "function", "function": {"name": "g"}}}, None, "tool_choice"),
        ({"tool_choice": "required"}, None, "tool_choice"),
        ({"tools": [function("a b")]}, None, "tools[0].function.name"),
        ({"tools": [function("</tool_call>")]}, None, "tools[0].function.name"),
        ({"tools": [function("f\u0000")]}, None, "tools[0].function.name"),
        ({"tools": [function("f"), function("f")]}, None, "tools[1].function.name"),
        ({"tools": [function("f", parameters={"type": "array"})]}, "invalid_json_schema", "tools[0].function.parameters"),
        ({"tools": [function("f", description="x" * 2**20)]}, None, "tools"),
        ({"tools": [function("f", description="x" * 2**16)]}, "context_length_exceeded", "messages"),
        ({"functions": [{"name": "f"}], "tools": [function("f")]}, None, "functions"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_26_to_28_what_constraints_and_tools_may_not_be(
    server: ApiServer, fields: dict[str, Any], code: str | None, param: str
) -> None:
    reply = server.chat(**fields)
    assert refusal(reply) == (400, code, param)
    assert server_ms(reply) < 1000


@pytest.mark.parametrize("schema", [_REFUSED_SCHEMAS["elsewhere"], {"type": "object", "properties": {"a": _LEVELS}}])
def test_28_parameters_of_tools_are_held_to_the_same_rules(server: ApiServer, schema: dict[str, Any]) -> None:
    tools = [function("f", parameters={"type": "object", "properties": {"a": schema}})]
    reply = server.chat(tools=tools, tool_choice="required")
    assert refusal(reply) == (400, "invalid_json_schema", "tools[0].function.parameters")


def test_26_a_schema_of_5000_levels(server: ApiServer) -> None:
    schema = b'{"not":' * 5000 + b"{}" + b"}" * 5000
    text = b'"response_format":{"type":"json_schema","json_schema":{"schema":%b}}' % schema
    assert refusal(server.ask("POST", URL, with_field(text))) == (400, "invalid_json", None)


def test_27_schemas_leave_nothing_behind(server: ApiServer) -> None:
    before = {path.name for path in server.state.iterdir()}
    for number in range(30):
        assert server.chat(response_format=as_format({"const": number}), max_tokens=3).json()["choices"][0]["message"][
            "content"
        ] == (str(number))
        assert server.chat(response_format=as_format({"enum": []})).status_code == 400
    assert {path.name for path in server.state.iterdir()} == before


@pytest.mark.parametrize("arguments", ["", "{", "null", '{"a":' * 9, '"' * 30, "\\" * 30, '{"a":"</tool_call>"}', "(a+)+$" * 6])
def test_28_arguments_of_any_text(server: ApiServer, arguments: str) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "x"}]
    reply = server.chat(messages=messages)
    assert reply.status_code == 200, reply.text
    assert server_ms(reply) < 1000
    longer = {**call, "function": {"name": "f", "arguments": (arguments or "x") * 5000}}
    reply = server.chat(messages=[{"role": "assistant", "tool_calls": [longer]}, messages[1]])
    assert refusal(reply) == (400, "context_length_exceeded", "messages")
    assert server_ms(reply) < 1000


def test_29_a_million_inputs(server: ApiServer) -> None:
    assert refusal(server.complete(prompt=[""] * 10**6)) == (400, "invalid_json", None)
    assert refusal(server.complete(prompt=["a"] * 257)) == (400, None, "prompt")
    assert refusal(server.complete(prompt=[[1]] * 257)) == (400, None, "prompt")
    assert refusal(server.ask("POST", "/v1/embeddings", {"model": "open", "input": ["a"] * 257})) == (404, None, None)


# --- 30: fields nobody knows, and what is no JSON at all --------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"include_usage": True}])
def test_30_stream_options_without_a_stream(server: ApiServer, options: dict[str, bool]) -> None:
    assert refusal(server.chat(stream_options=options)) == (400, None, "stream_options")
    assert refusal(server.chat(stream_options=options, stream=False)) == (400, None, "stream_options")


def test_30_unknown_fields_are_ignored_with_a_warning_that_cannot_forge_a_line(server: ApiServer) -> None:
    plain = server.chat(temperature=0, seed=1).json()["choices"]
    for name in ("frobnicate", "evil\nname", "x\x1b[31m", "y" * 100, "frobnicate"):
        assert server.chat(temperature=0, seed=1, **{name: [1]}).json()["choices"] == plain
    until(lambda: any("frobnicate" in line for line in server.served.log))
    assert sum("frobnicate" in line for line in server.served.log) == 1
    assert not any(word in line for line in server.served.log for word in ("evil", "\x1b", "yyyy"))


@pytest.mark.parametrize(
    "content_type",
    ["", "text/plain", "text/json", "application/jsonp", "application/json; charset=utf-16", "multipart/form-data"],
)
def test_30_other_content_types(server: ApiServer, content_type: str) -> None:
    assert refusal(server.ask("POST", URL, CHAT, headers={"content-type": content_type})) == (415, None, None)
