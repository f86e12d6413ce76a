"""Attacks on the JSON of requests and on the values in it, through the front door. Numbers are those of
reference/security.md, 7.3. The whole matrices are in core/serving/test_json_body.py (18, 30) and test_request_fields.py
(19 to 21, 25 to 28).
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.api_server import CHAT, ApiServer, api_server, error_of, in_process, refusal, server_ms
from attacks.raw_http import RawConnection, Reply, head
from served import until

URL = "/v1/chat/completions"
TEN_MIB = 10 * 1024 * 1024
CONTEXT = 256  # tokens; the fake tokenizer makes one of each byte, and puts one before the prompt of a completion


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    with api_server(tmp_path_factory.mktemp("server")) as there:
        yield there


@pytest.fixture(autouse=True)
def well_afterwards(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever was asked of it, the same engine process answers the next one."""
    yield
    if "server" in request.fixturenames:
        server: ApiServer = request.getfixturevalue("server")
        assert server.chat().status_code == 200
        models = server.ask("GET", "/healthz", key=server.admin).json()["models"]
        assert [(model["state"], model["restarts"]) for model in models] == [("ready", 0)] * 2


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
        record = json.loads(server.audit_lines()[-1])
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


# --- 21: next to nothing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "status"),
    [("", 200), ([], 400), ([[]], 400), ([256], 200), ([257, 258, 259], 200), ("</s>", 200), ("\x00", 200), ("\ufeff", 200)],
    ids=repr,
)
def test_21_prompts_of_nothing_and_of_control_tokens(server: ApiServer, prompt: object, status: int) -> None:
    assert server.complete(prompt=prompt).status_code == status


def test_21_a_prompt_without_any_token(server: ApiServer) -> None:
    assert refusal(server.complete(prompt="", add_special_tokens=False)) == (400, None, "prompt")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "system\u0000", "content": "x"}], "messages[0].role"),
        ([{"role": "System", "content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": ""}], None),
        ([{"role": "user", "content": "<|image_pad|>"}], None),
        ([{"role": "user", "content": "<|im_start|><|im_end|></s><s>"}], None),
        ([{"role": "assistant", "content": "", "tool_calls": []}], None),
    ],
    ids=lambda value: str(value)[:60],
)
def test_21_messages_of_nothing_and_of_control_tokens(server: ApiServer, messages: list[Any], param: str | None) -> None:
    reply = server.chat(messages=messages)
    if param is None:
        assert reply.status_code == 200
    else:
        assert refusal(reply) == (400, None, param)


def test_21_what_a_user_spells_is_no_control_token(server: ApiServer) -> None:
    """It is as many tokens as it has bytes, not one."""
    plain, spelt = (
        server.chat(messages=[{"role": "user", "content": text}]).json()["usage"]["prompt_tokens"]
        for text in ("", "<|im_end|>")
    )
    assert spelt == plain + len("<|im_end|>")


# --- 22, 23: long prompts ------------------------------------------------------------------------------------------------


def slowest_probe_during(server: ApiServer, requests: list[bytes]) -> tuple[float, float, list[Reply]]:
    """Send requests one after the other while `/livez` is asked without pause.

    Returns:
        Seconds of the slowest probe before, and of the slowest during; the replies.
    """
    replies: list[Reply] = []

    def attack() -> None:
        for data in requests:
            with RawConnection(server.url) as connection:
                connection.send(data)
                replies.append(connection.reply())

    def probe(connection: RawConnection) -> float:
        began = time.perf_counter()
        connection.send(head("GET", "/livez"))
        assert connection.reply().status == 200
        return time.perf_counter() - began

    with RawConnection(server.url) as connection:
        before = max(probe(connection) for _ in range(50))
        attacker = threading.Thread(target=attack)
        attacker.start()
        during = [probe(connection)]
        while attacker.is_alive():
            during.append(probe(connection))
        attacker.join()
    return before, max(during), replies


def raw(server: ApiServer, path: str, body: bytes) -> bytes:
    lines = ("Content-Type: application/json", f"Content-Length: {len(body)}", f"Authorization: Bearer {server.user}")
    return head("POST", path, *lines) + body


def test_22_ten_mebibytes_are_refused_before_they_are_tokenised_and_hold_up_nobody(server: ApiServer) -> None:
    text = b"a " * (TEN_MIB // 2 - 100)
    chat = b'{"model":"open","messages":[{"role":"user","content":"%b"}]}' % text
    completion = b'{"model":"open","prompt":"%b"}' % text
    before, during, replies = slowest_probe_during(server, [raw(server, URL, chat), raw(server, "/v1/completions", completion)])
    print(f"\nslowest /livez: {before * 1000:.1f} ms before, {during * 1000:.1f} ms during")
    assert [(reply.status, reply.error["code"]) for reply in replies] == [(400, "context_length_exceeded")] * 2
    assert all("in any wording" in reply.error["message"] for reply in replies), "it was tokenised"
    assert during < 0.5 + before, "the budget is 50 ms on an idle machine; this allows for a busy one"


def test_22_more_than_that_is_413(server: ApiServer) -> None:
    assert refusal(server.complete(prompt="a" * TEN_MIB)) == (413, "request_too_large", None)


@pytest.mark.xfail(
    strict=True,
    reason="arguments of tool calls are parsed each by itself (openai/messages.py, _template_call), without a bound on all "
    "together: 4.7 MB of them stopped the event loop for seconds",
)
def test_22_arguments_of_tool_calls_are_bounded_all_together(server: ApiServer) -> None:
    arguments = json.dumps({"a": [[]] * 40_000})
    call = {"function": {"name": "f", "arguments": arguments}}
    reply = server.chat(messages=[{"role": "assistant", "tool_calls": [call] * 3}])
    assert reply.status_code == 400
    assert "too many values" in error_of(reply)["message"]


@pytest.mark.xfail(
    strict=True,
    reason="/tokenize takes any text (openai/tokens.py): 10 MiB become a reply of 31 MB, with return_token_strs of 73 MB "
    "after seconds of work, and encoding it holds up the event loop",
)
def test_22_tokenize_refuses_what_no_context_holds(server: ApiServer) -> None:
    reply = server.ask("POST", "/tokenize", {"model": "open", "prompt": "a" * 2**20})
    assert reply.status_code == 400
    assert error_of(reply)["code"] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_23_the_context_exactly_and_one_token_more(server: ApiServer, stream: bool) -> None:
    for prompt, max_tokens in (("a" * 245, 10), ("a" * (CONTEXT - 2), 1), ([97] * (CONTEXT - 1), 1), ("", CONTEXT - 1)):
        served = server.complete(prompt=prompt, max_tokens=max_tokens, ignore_eos=True)
        assert served.json()["usage"]["total_tokens"] == CONTEXT
        more = server.complete(prompt=prompt, max_tokens=max_tokens + 1, ignore_eos=True, stream=stream)
        assert refusal(more) == (400, "context_length_exceeded", "prompt")
        longer = [97] * len(prompt) + [97, 97]  # of an id list nothing is put in front
        assert refusal(server.complete(prompt=longer, max_tokens=max_tokens, stream=stream))[1] == "context_length_exceeded"


@pytest.mark.parametrize("stream", [False, True])
def test_23_a_conversation_that_fits_exactly(server: ApiServer, stream: bool) -> None:
    bare = server.chat(messages=[{"role": "user", "content": ""}]).json()["usage"]["prompt_tokens"]

    def ask(length: int, **fields: object) -> Any:
        return server.chat(messages=[{"role": "user", "content": "a" * length}], ignore_eos=True, **fields)

    assert ask(CONTEXT - bare - 5, max_tokens=5).json()["usage"]["total_tokens"] == CONTEXT
    assert ask(CONTEXT - bare - 1, max_tokens=None).json()["usage"]["total_tokens"] == CONTEXT
    assert refusal(ask(CONTEXT - bare - 5, max_tokens=6, stream=stream)) == (400, "context_length_exceeded", "messages")
    assert refusal(ask(CONTEXT - bare, max_tokens=None, stream=stream)) == (400, "context_length_exceeded", "messages")


# --- 25 to 29: what a request cannot bring ---------------------------------------------------------------------------------

_SCHEMAS: dict[str, Any] = {
    "recursion": {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "10^5 values": {"enum": list(range(10**5))},
    "elsewhere": {"$ref": "http://169.254.169.254/latest/meta-data"},
    "slow pattern": {"type": "string", "pattern": "(a+)+$"},
    "broken pattern": {"type": "string", "pattern": "("},
    "unknown type": {"type": "frobnicate"},
    "10^9 characters": {"type": "string", "maxLength": 10**9},
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("chat_template", "{{ messages }}"),
        ("chat_template", "{% for _ in range(10**9) %}x{% endfor %}"),
        ("chat_template_kwargs", {"enable_thinking": True}),
        ("chat_template_kwargs", {"messages": []}),
        *(("response_format", {"type": "json_schema", "json_schema": {"schema": schema}}) for schema in _SCHEMAS.values()),
        ("response_format", {"type": "json_object"}),
        ("guided_regex", "(a+)+$"),
        ("tools", [{"type": "function", "function": {"name": f"f{n}"}} for n in range(10_000)]),
        ("functions", [{"name": "f"}]),
    ],
    ids=lambda value: str(value)[:60],
)
def test_25_to_28_templates_schemas_and_tools_are_refused(server: ApiServer, field: str, value: object) -> None:
    """Constrained output and tools are not there yet. An answer without them would look like one with them."""
    reply = server.chat(**{field: value})
    assert refusal(reply) == (400, "unsupported_parameter", field)
    assert server_ms(reply) < 1000


def test_26_a_schema_of_5000_levels(server: ApiServer) -> None:
    schema = b'{"not":' * 5000 + b"{}" + b"}" * 5000
    text = b'"response_format":{"type":"json_schema","json_schema":{"schema":%b}}' % schema
    assert refusal(server.ask("POST", URL, with_field(text))) == (400, "invalid_json", None)


def test_27_schemas_leave_nothing_behind(server: ApiServer) -> None:
    before = {path.name for path in server.state.iterdir()}
    for number in range(100):
        schema = {"type": "json_schema", "json_schema": {"schema": {"const": number}}}
        assert server.chat(response_format=schema).status_code == 400
    assert {path.name for path in server.state.iterdir()} == before


@pytest.mark.parametrize(
    "arguments", ["", "{", "null", '{"a":' * 5000, '"' * 100_000, "\\" * 100_000, '{"a":"</tool_call>"}', "(a+)+$" * 1000]
)
def test_28_arguments_of_any_text(server: ApiServer, arguments: str) -> None:
    call = {"id": "1", "function": {"name": "f", "arguments": arguments}}
    reply = server.chat(messages=[{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": "x"}])
    assert reply.status_code == 200
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


# --- any bytes at all -----------------------------------------------------------------------------------------------------

_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_BODIES: dict[str, list[dict[str, Any]]] = {
    URL: [
        {"messages": [{"role": "user", "content": "x"}], "n": 1, "stop": ["a"], "logit_bias": {"1": 1}},
        {
            "messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]}],
            "stream": True,
        },
    ],
    "/v1/completions": [{"prompt": "x", "echo": True, "seed": 1}, {"prompt": [[1], [2]], "max_tokens": 4}],
    "/tokenize": [{"prompt": "x"}, {"content": "x", "with_pieces": True}],
    "/detokenize": [{"tokens": [1, 2, 256]}],
    "/v1/admin/api-keys": [{"name": "x", "limits": {"rpm": 1}, "cidr": ["10.0.0.0/8"], "expires_at": "2099-01-01T00:00:00Z"}],
}


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in a document, with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, bytes]:
    """A path and a body that was good, until some of its values and bytes were replaced."""
    path = draw(st.sampled_from(sorted(_BODIES)))
    document = json.loads(json.dumps(draw(st.sampled_from(_BODIES[path]))))
    for _ in range(draw(st.integers(0, 2))):
        container, key = draw(st.sampled_from(list(_places(document))))
        container[key] = draw(_VALUES)
    body = json.dumps(document).encode()
    if draw(st.booleans()):
        at = draw(st.integers(0, len(body)))
        body = body[:at] + draw(st.binary(max_size=6)) + body[at + draw(st.integers(0, 6)) :]
    return path, body


def test_no_body_makes_the_server_fail_or_open(tmp_path: Path) -> None:
    json_type = (b"content-type", b"application/json")
    with in_process(tmp_path) as app:

        @given(damaged())
        @settings(max_examples=300, deadline=None, database=None)
        def check(request: tuple[str, bytes]) -> None:
            path, body = request
            assert app.ask("POST", path, [json_type], body) == 401
            for key in (app.key, app.admin):
                status = app.ask("POST", path, [json_type, (b"authorization", b"Bearer " + key.encode())], body)
                allowed = {403} if key == app.key and "admin" in path else {200, 400, 404}
                assert status in allowed, (status, path, body)

        check()
