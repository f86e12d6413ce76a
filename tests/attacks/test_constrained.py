"""Attacks with formats, through the front door: what can't be held is refused by name, what was promised is held whatever the
sampling says, and nobody else suffers.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from attacks.api_server import ApiServer, api_server, error_of, refusal, server_ms
from inferflux_core.engine import grammar as grammars
from inferflux_core.engine.grammar import Grammars
from inferflux_core.engine.grammar_state import GrammarState
from inferflux_core.engine.types import Constraint
from inferflux_core.testing.fake_backend import EOS, IM_END, VOCAB_SIZE, FakeTokenizer
from served import until

SECRET = "xyzzyplugh"  # stands in every schema here that is refused; no log has it
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["a", "b"]}, "count": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["kind", "count"],
    "additionalProperties": False,
}
ANSWER = re.compile(r'\{"kind": "[ab]", "count": \d\}')
FORMAT: dict[str, Any] = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}
FEW_BLOCKS = 40  # of 16 tokens: four sequences of this file's longest


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ApiServer]:
    folder = tmp_path_factory.mktemp("constrained")
    with api_server(folder, fake={"num_blocks": FEW_BLOCKS, "crash_token": 0}) as there:
        yield there
        assert SECRET not in "".join(there.served.log)
        assert "Traceback" not in "".join(there.served.log)


def held(server: ApiServer) -> tuple[float, float, float]:
    """Sequences that run and wait, and the share of the cache that they hold."""
    found = server.metrics()
    names = ("requests_running", "requests_waiting", "kv_cache_usage_ratio")
    running, waiting, share = (found[f'inferflux_{name}{{model="open"}}'] for name in names)
    return running, waiting, share


@pytest.fixture(autouse=True)
def well_afterwards(server: ApiServer) -> Iterator[None]:
    """Whatever was done to it, the engine lives, holds nothing, and holds an answer to its format."""
    yield
    assert ANSWER.fullmatch(content(server.chat(**FORMAT, max_tokens=60)))
    until(lambda: held(server) == (0, 0, 0))


def content(reply: Any, index: int = 0) -> str:
    assert reply.status_code == 200, reply.text
    text: str = reply.json()["choices"][index]["message"]["content"]
    return text


def schema(value: object) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"const": SECRET}
    for _ in range(depth):
        inner = {"items": inner}
    return inner


# --- what can't be held is refused, and named ---------------------------------------------------------------------------

SCHEMAS: dict[str, tuple[object, str]] = {
    "itself": ({"$ref": "#", "title": SECRET}, "keyword '$ref' at '#' refers to itself"),
    "each other": (
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
        "keyword '$ref' at '#/$defs/a' refers to itself",
    ),
    "endless": ({"type": "object", "properties": {SECRET: {"$ref": "#"}}, "required": [SECRET]}, "describes nothing"),
    "deep": (nested(40), "is nested deeper than 32 schemas"),
    "remote": ({"$ref": "http://169.254.169.254/latest"}, "keyword '$ref' at '#' refers to 'http://169.254.169.254/latest'"),
    "a file": ({"$ref": "file:///etc/passwd"}, "nothing is loaded from elsewhere"),
    "huge": ({"description": SECRET * 7000}, "bytes; the most is 65536"),
    "many values": ({"enum": list(range(1001))}, "keyword 'enum' at '#' has 1001 values; the most is 1000"),
    "contradictory": ({"type": "integer", "minimum": 5, "maximum": 4, "title": SECRET}, "describes nothing"),
    "two types": ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "describes nothing"),
    "false": (False, "describes nothing"),
    "a look-around": ({"type": "string", "pattern": f"^(?={SECRET})b"}, "keyword 'pattern' at '#' uses a look-around"),
    "an open group": ({"type": "string", "pattern": f"({SECRET}"}, "keyword 'pattern' at '#' has an unmatched '('"),
    "a deep pattern": ({"type": "string", "pattern": "(" * 9000 + ")" * 9000}, "keyword 'pattern' at '#' nests deeper than"),
    "no multiple": ({"type": "integer", "multipleOf": 0}, "keyword 'multipleOf' at '#' is not above 0"),
    "no type": ({"properties": {"a": {"type": "strin"}}}, "keyword 'type' at '#/properties/a' names the unknown type"),
    "no number": ({"const": 10**30}, "cannot be written"),
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_that_cannot_be_held_are_refused_by_keyword(server: ApiServer, name: str) -> None:
    value, words = SCHEMAS[name]
    reply = server.chat(**schema(value))
    assert refusal(reply) == (400, "invalid_json_schema", "response_format")
    assert words in error_of(reply)["message"]
    assert len(error_of(reply)["message"]) < 500
    assert server_ms(reply) < 2000


OTHERS: dict[str, tuple[dict[str, Any], str, str]] = {
    "a pattern that explodes": ({"guided_regex": "(((a{100}){100}){100}){100}"}, "guided_regex", "too complex"),
    "a million": ({"guided_regex": "a{1000000}"}, "guided_regex", "repeats more than 20000 times"),
    "a control token": ({"guided_grammar": "start: <|im_end|>"}, "guided_grammar", "control tokens"),
    "its id": ({"guided_grammar": f"start: <[{IM_END}]>"}, "guided_grammar", "control tokens"),
    "another's grammar": ({"guided_grammar": 'start: @g0 | "x"'}, "guided_grammar", "other grammars"),
    "options": ({"guided_grammar": '%llguidance {"no_forcing": true}\nstart: "x"'}, "guided_grammar", "cannot be used here"),
    "the library's JSON": ({"guided_grammar": '{"grammars": []}'}, "guided_grammar", "a grammar is Lark or GBNF"),
    "endless recursion": ({"grammar": 'root ::= root "a" | root'}, "grammar", "too complex"),
    "parentheses": ({"grammar": "root ::= " + "(" * 9000 + '"a"' + ")" * 9000}, "grammar", "nested deeper than 100"),
    "Lark in parentheses": ({"guided_grammar": "start: " + "(" * 9000 + '"a"' + ")" * 9000}, "guided_grammar", "too deeply"),
    "a trillion": (
        {"guided_grammar": 'start: a{1000}\na: b{1000}\nb: c{1000}\nc: "x"{1000}'},
        "guided_grammar",
        "too complex to be enforced",
    ),
    "no such rule": ({"grammar": "root ::= nothing"}, "grammar", "rule 'nothing' is not defined"),
    "white space that is text": (
        {"guided_json": {"type": "object"}, "guided_whitespace_pattern": ".*"},
        "guided_json",
        "more than the whitespace of JSON",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_grammars_and_patterns_that_cannot_be_held_are_refused(server: ApiServer, name: str) -> None:
    fields, param, words = OTHERS[name]
    reply = server.chat(**fields)
    assert refusal(reply) == (400, "invalid_grammar", param)
    assert words in error_of(reply)["message"]


def test_nothing_of_a_refused_format_is_in_the_log(server: ApiServer) -> None:
    for fields in (schema({"$ref": f"#/{SECRET}"}), {"guided_regex": f"({SECRET}"}, {"grammar": f"root ::= {SECRET}"}):
        assert server.chat(**fields).status_code == 400
    lines = b"\n".join(server.audit_lines()).decode()
    assert SECRET not in lines + "".join(server.served.log)


# --- what was promised is held ------------------------------------------------------------------------------------------

EVASIONS: dict[str, dict[str, Any]] = {
    "ends at once": {"logit_bias": {str(EOS): 100, str(IM_END): 100}},
    "cannot end": {"logit_bias": {str(EOS): -100, str(IM_END): -100}, "ignore_eos": True, "min_tokens": 60},
    "wants another token": {"logit_bias": {str(ord("x")): 100}},
    "forbids what has to come": {"logit_bias": {str(token): -100 for token in b'{}":,kindcount0123456789ab '}},
    "hot": {"temperature": 2, "top_p": 1, "seed": 1},
    "punished": {"frequency_penalty": 2, "presence_penalty": 2, "repetition_penalty": 2.0, "temperature": 2},
    "one token": {"top_k": 1, "top_p": 0.0001, "temperature": 2},
    "told of": {"logprobs": True, "top_logprobs": 20},
    "no guesses": {"num_speculative_tokens": 0, "temperature": 1.5},
    "control tokens shown": {"skip_special_tokens": False},
}


@pytest.mark.parametrize("name", EVASIONS)
def test_no_setting_of_sampling_gets_out_of_a_format(server: ApiServer, name: str) -> None:
    reply = server.chat(**FORMAT, **EVASIONS[name], max_tokens=60, n=2)
    for index in (0, 1):
        assert ANSWER.fullmatch(content(reply, index))
        assert reply.json()["choices"][index]["finish_reason"] == "stop"
    assert reply.json()["usage"]["completion_tokens"] == 50


def test_what_a_client_cuts_off_is_the_beginning_of_what_was_promised(server: ApiServer) -> None:
    for fields, reason in (({"max_tokens": 10}, "length"), ({"max_tokens": 60, "stop": ["count"]}, "stop")):
        reply = server.chat(**FORMAT, **fields)
        assert re.fullmatch(r'\{"kind": "([ab]", ")?', content(reply))
        assert reply.json()["choices"][0]["finish_reason"] == reason


def test_a_control_token_as_text_stays_text(server: ApiServer) -> None:
    for fields, text in (({"guided_choice": ["<|im_end|>x"]}, "<|im_end|>x"), (schema({"const": "</s>"}), '"</s>"')):
        reply = server.chat(**fields, max_tokens=40)
        assert content(reply) == text
        assert reply.json()["usage"]["completion_tokens"] == len(text)


def test_sequences_that_are_put_off_and_resumed_are_held_all_the_same(server: ApiServer) -> None:
    pattern, before = "([a-c]{15}-){10}x", server.metrics()

    def one(number: int) -> str:
        return content(server.chat(guided_regex=pattern, max_tokens=190, temperature=1.2, seed=number))

    with ThreadPoolExecutor(12) as clients:
        crowded = list(clients.map(one, range(12)))
    assert all(re.fullmatch(pattern, text) for text in crowded)
    name = 'inferflux_preemptions_total{model="open"}'
    assert server.metrics()[name] > before.get(name, 0)
    assert [one(number) for number in range(3)] == crowded[:3]


def test_two_hundred_schemas_at_once(server: ApiServer) -> None:
    def one(number: int) -> object:
        properties = {"name": {"const": f"n{number}"}, "size": {"type": "integer", "minimum": number, "maximum": number + 1}}
        sent = {"type": "object", "properties": properties, "required": ["name", "size"], "additionalProperties": False}
        return json.loads(content(server.chat(**schema(sent), max_tokens=60)))

    with ThreadPoolExecutor(12) as clients:
        for number, answer in enumerate(clients.map(one, range(200))):
            assert answer in ({"name": f"n{number}", "size": number}, {"name": f"n{number}", "size": number + 1})


# --- what dies and who leaves -------------------------------------------------------------------------------------------


def child(server: ApiServer, script: bytes) -> int:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                found = script in (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if found and parent == server.served.process.pid:
                return int(entry.name)
    raise AssertionError(script)


def test_a_process_that_is_killed_from_outside_is_replaced(server: ApiServer) -> None:
    os.kill(child(server, b"grammar_worker"), signal.SIGKILL)
    assert content(server.chat(guided_choice=["new"], max_tokens=9)) == "new"


def test_an_engine_that_dies_under_a_format_fails_the_request_and_the_next_one_is_held(server: ApiServer) -> None:
    headers = {"authorization": f"Bearer {server.user}"}
    body = {"model": "open", "prompt": "\x00", "max_tokens": 20, "guided_regex": "a{20}"}
    reply = server.client.post("/v1/completions", json=body, headers=headers)
    assert (reply.status_code, error_of(reply)["type"]) == (503, "server_error")
    until(lambda: server.chat(max_tokens=1).status_code == 200)
    assert re.fullmatch("a{20}", content(server.chat(max_tokens=30, guided_regex="a{20}")))


def test_clients_that_leave_at_any_moment_leave_nothing_behind(server: ApiServer) -> None:
    url, headers = "/v1/chat/completions", {"authorization": f"Bearer {server.user}"}
    for number in range(12):  # every other one while its pattern is being checked or compiled
        body = {
            "model": "open",
            "messages": [{"role": "user", "content": "hi"}],
            "max_tokens": 200,
            "stream": True,
            "guided_regex": f"[a-z]{{{190 + number // 2}}}",
        }
        with server.client.stream("POST", url, json=body, headers=headers) as reply:
            assert reply.status_code == 200
            if number % 2:
                next(reply.iter_lines())
    until(lambda: held(server) == (0, 0, 0))


# --- memory -------------------------------------------------------------------------------------------------------------


def test_what_hostile_patterns_learn_is_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Grammars(FakeTokenizer, VOCAB_SIZE, FakeTokenizer.eos_token_ids)
    try:
        monkeypatch.setattr(grammars, "_MAX_BYTES", 60_000_000)
        for number in range(6):  # each under a salt of its own, as a client may choose them
            state = made.compile(f"salt{number}", Constraint(grammar=f'start: "{number}"')).result(10)
            assert isinstance(state, GrammarState)
            state._wear.masked(1, 10.0)  # a pattern that learned as much as the library lets it
        kept = [salt for salt, entries in made._cache.items() if entries]
        assert kept == ["salt3", "salt4", "salt5"], "two that are full, and the newest, which was not when it came"
    finally:
        made.close()
