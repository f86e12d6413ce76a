"""Grammars hold models to calls that the parser of the same format reads, with arguments that their schemas describe."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import jsonschema
import llguidance.numpy
import numpy as np
import pytest
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from core.models.tool_calls.tool_case import CITY, SCHEMAS, TEMPLATES, Call, format_named, parsed, tool_request
from inferflux_core.errors import InvalidRequestError
from inferflux_core.models.tool_calls.calls import Function, ToolRequest
from inferflux_core.models.tool_calls.lark import MAX_PARALLEL_CALLS

CONTROL = 16  # control tokens behind the 256 bytes; the last one ends the text
CLOSERS = frozenset(b'"}')
EOS = 256 + CONTROL - 1


class Vocabulary:
    """Of bytes, as llguidance wants to know it."""

    eos_token_id = EOS
    bos_token_id = None
    tokens = [bytes([i]) for i in range(256)] + [b"\xff<%d>" % i for i in range(CONTROL)]  # so it is read
    special_token_ids = list(range(256, 256 + CONTROL))  # noqa: RUF012

    def __call__(self, text: str | bytes) -> list[int]:
        return list(text if isinstance(text, bytes) else text.encode())


PING = '<tool_call>\n{"name": "ping", "arguments": {}}\n</tool_call>'
TOKENIZER = LLTokenizer(TokenizerWrapper(Vocabulary()), n_vocab=256 + CONTROL, eos_token=EOS)


def special_of(case: str, with_tokens: bool) -> dict[str, int]:
    return {text: 256 + i for i, text in enumerate(format_named(case).markers)} if with_tokens else {}


def tokens_of(text: str, special: dict[str, int]) -> list[int]:
    """The text, with the tokens of those marks that have one."""
    ids: list[int] = []
    while text:
        mark = next((mark for mark in special if text.startswith(mark)), None)
        ids += [special[mark]] if mark is not None else text[0].encode()
        text = text[len(mark or text[0]) :]
    return ids


def text_of(ids: list[int], special: dict[str, int]) -> str:
    marks = {id: text for text, id in special.items()}
    return b"".join(marks[i].encode() if i in marks else bytes([i]) for i in ids).decode()


def matcher_of(case: str, with_tokens: bool = False, **changes: Any) -> LLMatcher:
    special = special_of(case, with_tokens)
    matcher = LLMatcher(TOKENIZER, format_named(case).grammar(tool_request(**changes), SCHEMAS, special))
    assert not matcher.is_error(), matcher.get_error()
    return matcher


def walked(matcher: LLMatcher, ids: list[int], seed: int) -> list[int]:
    """Any way through a grammar, that begins like this and is in a hurry to end."""
    source = random.Random(seed)
    mask = llguidance.numpy.allocate_token_bitmask(1, 256 + CONTROL)
    assert matcher.consume_tokens(ids)
    ids = list(ids)
    while not matcher.is_stopped():
        llguidance.numpy.fill_next_token_bitmask(matcher, mask, 0)
        allowed = np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little")).tolist()
        if EOS in allowed and source.random() < 0.4:
            break
        closers = [token for token in allowed if token in CLOSERS]
        hurry = 0.3 if len(ids) < 500 else 0.95
        token = source.choice(closers if closers and source.random() < hurry else [id for id in allowed if id != EOS] or [EOS])
        assert matcher.consume_token(token)
        if token != EOS:
            ids.append(token)
    return ids


@pytest.mark.parametrize("with_tokens", [True, False])
@pytest.mark.parametrize("case", TEMPLATES)
def test_enforced_calls_are_read_and_match_their_schemas(case, with_tokens):
    special = special_of(case, with_tokens)
    counts = set()
    for seed in range(12):
        parallel = seed % 3 > 0
        matcher = matcher_of(case, with_tokens, must_call=True, parallel=parallel)
        text = text_of(walked(matcher, [], seed), special)
        calls = parsed(case, text)
        assert all(isinstance(call, Call) and not call.incomplete for call in calls), text
        for call in calls:
            jsonschema.validate(json.loads(call.arguments), SCHEMAS.get(call.name, {"type": "object"}))
            assert call.name != "ping" or call.arguments == "{}"
        assert 1 <= len(calls) <= (MAX_PARALLEL_CALLS if parallel else 1)
        counts.add(len(calls))
    assert len(counts) > 1


@pytest.mark.parametrize("with_tokens", [True, False])
@pytest.mark.parametrize("case", [case for case in TEMPLATES if case not in ("llama3", "json", "gemma")])
def test_calls_begun_in_free_text_are_whole(case, with_tokens):
    special = special_of(case, with_tokens)
    begin = next(mark for mark in format_named(case).markers if format_named(case).call_text("get", {}).startswith(mark))
    for seed in range(4):
        matcher = matcher_of(case, with_tokens, strict=True, parallel=bool(seed % 2))
        text = text_of(walked(matcher, tokens_of(f"Hi {begin}", special), seed), special)
        content, *rest = parsed(case, text)
        call = rest[0]
        assert content == "Hi"
        assert isinstance(call, Call)
        assert not call.incomplete
        jsonschema.validate(json.loads(call.arguments), SCHEMAS.get(call.name, {"type": "object"}))


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("case", TEMPLATES)
def test_free_text_needs_no_call(case, parallel):
    matcher = matcher_of(case, strict=True, parallel=parallel)
    assert matcher.consume_tokens(list("Just é { text } [1] ``` <b> <tool".encode()))
    assert matcher.is_accepting()


@pytest.mark.parametrize(
    ("case", "changes", "text", "refused"),
    [  # the text goes on up to the mark ^, and not with what follows
        ("hermes", {"strict": True}, "x <tool_call>^x", "x"),
        ("hermes", {"strict": True}, '<tool_call>\n{"name": "get", "arguments": {"^d', "d"),
        ("hermes", {"strict": True}, '<tool_call>\n{"name": "calc", "arguments": {"any": [1, null]}}\n</tool_call> and^', ""),
        ("hermes", {"allowed": frozenset({"get"})}, '<tool_call>\n{"name": "get"^_', "_"),
        ("hermes", {"allowed": frozenset({"get"})}, '<tool_call>\n{"name": "get", "arguments": {"any": 1}}\n</tool_call>^', ""),
        ("hermes", {"must_call": True}, "^x", "x"),
        ("hermes", {"must_call": True, "parallel": False}, f"{PING}^\n", "\n"),
        ("hermes", {"must_call": True}, f"{PING}\n{PING}^\n", ""),
        ("hermes", {"parallel": False, "strict": True}, f"A {PING}^B", "B"),
        ("hermes", {"must_call": True, "allowed": frozenset({"calc", "ping"})}, '<tool_call>\n{"name": "^g', "g"),
        ("llama3", {"strict": True}, " \n^{x", ""),
        ("llama3", {"strict": True}, '{"name": "get", "parameters": {"city": "x"}}^ x', " x"),
        ("llama3", {"strict": True}, "<^|", "|"),
        ("mistral", {"strict": True}, "[TOOL_CALLS] [{\"name\": \"calc\", \"arguments\": {}}, ^]", "]"),
        ("mistral-v13", {"strict": True}, "[TOOL_CALLS]get[ARGS]{\"city\": \"^1234567", "1234567"),
        ("mistral-v11", {"must_call": True}, "[TOOL_CALLS]get[CALL_ID]abcDEF12^[", "["),
        ("gemma-4", {"strict": True}, "<|tool_call>call:get^{c", "{c"),
        ("json", {"strict": True}, "^[1", "[1"),
    ],
)  # fmt: skip
def test_what_a_grammar_lets_through(case, changes, text, refused):
    allowed = text.partition("^")[0].encode()
    matcher = matcher_of(case, **changes)
    assert matcher.validate_tokens(list(allowed)) == len(allowed)
    if refused:
        assert matcher.validate_tokens(list(allowed + refused.encode())) < len(allowed + refused.encode())


def test_no_more_calls_than_a_client_can_want():
    calls = "\n".join([PING] * MAX_PARALLEL_CALLS)
    matcher = matcher_of("hermes", must_call=True)
    assert matcher.consume_tokens(list(calls.encode()))
    assert matcher.is_stopped()


def test_tokens_and_spelt_marks_both_begin_calls():
    matcher = matcher_of("hermes", with_tokens=True, strict=True)
    for begin in ([256], list(b"<tool_call>")):
        assert matcher.validate_tokens([*b"hi ", *begin, *b"\n{"]) == len(begin) + 5
        assert matcher.validate_tokens([*b"hi ", *begin, *b"x"]) == len(begin) + 3


def test_whether_a_grammar_is_needed():
    hermes = format_named("hermes")
    assert not hermes.constrains(tool_request())
    assert hermes.constrains(tool_request(must_call=True))
    assert hermes.constrains(tool_request(strict=True))
    assert hermes.constrains(tool_request(allowed=frozenset({"ping"})))
    assert hermes.constrains(tool_request(allowed=frozenset({"ping"}), strict=True))


@pytest.mark.parametrize("case", ["hermes", "mistral-v13", "gemma-4", "json"])
def test_512_functions_compile_in_the_time_that_there_is(case):
    def schema(number):
        return {**CITY, "properties": {**CITY["properties"], f"key_{number}": {"type": "boolean"}}}

    functions = tuple(Function(f"function_{number}", parameters=schema(number), strict=True) for number in range(512))
    request = ToolRequest(functions=functions, allowed=frozenset(function.name for function in functions), must_call=True)
    began = time.process_time()
    grammar = format_named(case).grammar(request, {function.name: function.parameters for function in functions}, {})
    matcher = LLMatcher(TOKENIZER, grammar)
    text = format_named(case).call_text("function_511", {"city": "x", "key_511": True})
    assert matcher.validate_tokens(list(text.encode())) == len(text)
    assert time.process_time() - began < 1.0
    same = tuple(Function(function.name, parameters=CITY, strict=True) for function in functions)
    shared = format_named(case).grammar(
        ToolRequest(functions=same, allowed=request.allowed, must_call=True), dict.fromkeys(request.allowed, CITY), {}
    )
    assert shared.count("%json") == 1


def test_names_and_schemas_cannot_leave_their_literals():
    odd = 'a"\n| "b" é\\'
    request = ToolRequest(functions=(Function(odd, parameters={}),), allowed=frozenset({odd}), must_call=True)
    for case in TEMPLATES:
        grammar = format_named(case).grammar(
            request, {odd: {"type": ["object", "null"], "description": '"} start: "x"\n%'}}, {}
        )
        assert LLMatcher.validate_grammar(grammar, TOKENIZER) == ""
    text = format_named("hermes").call_text(odd, {"a": 1})
    assert LLMatcher(TOKENIZER, format_named("hermes").grammar(request, {}, {})).consume_tokens(list(text.encode()))


def test_arguments_are_objects():
    request = tool_request(must_call=True)
    with pytest.raises(InvalidRequestError, match="parameters of function 'get' have type 'string'") as caught:
        format_named("hermes").grammar(request, {"get": {"type": "string"}}, {})
    assert (caught.value.param, caught.value.code) == ("tools", "invalid_function_parameters")


def test_a_strict_function_without_its_schema_is_never_let_through():
    with pytest.raises(KeyError):
        format_named("hermes").grammar(tool_request(strict=True), {}, {})
