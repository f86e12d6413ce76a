"""Hostile schemas, patterns and grammars: each is answered within two seconds of CPU time, and the next check works."""

from __future__ import annotations

import resource
import time
from typing import Any

import pytest

from inferflux_core.errors import InvalidRequestError
from inferflux_core.models.structured.checker import GrammarChecker
from inferflux_core.models.structured.format_grammar import grammar_of
from inferflux_core.models.structured.json_schema import checked_schema
from inferflux_core.models.structured.output_format import OutputFormat
from inferflux_core.settings import StructuredOutputSettings

LIMITS = StructuredOutputSettings()
BUDGET_S = 2.0


def nested(depth: int, *, keyword: str = "not") -> Any:
    schema: Any = {}
    for _ in range(depth):
        schema = {keyword: schema}
    return schema


def doubling(keyword: str, count: int = 40) -> dict[str, Any]:
    """Each definition uses the next one twice."""
    chain = {
        f"d{n}": {keyword: [{"$ref": f"#/$defs/d{n + 1}"}, {"$ref": f"#/$defs/d{n + 1}", "title": "x"}]} for n in range(count)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**chain, f"d{count}": {"type": "integer"}}}


def doubling_properties(count: int = 40) -> dict[str, Any]:
    chain: dict[str, Any] = {
        f"d{n}": {"type": "object", "properties": {"l": {"$ref": f"#/$defs/d{n + 1}"}, "r": {"$ref": f"#/$defs/d{n + 1}"}}}
        for n in range(count)
    }
    return {"$ref": "#/$defs/d0", "$defs": {**chain, f"d{count}": {"type": "integer"}}}


def ladder(count: int, part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "allOf": [{"if": {"properties": {f"p{n}": {"const": n}}}, "then": part} for n in range(count)]}


WIDE = {f"p{n}": {"type": "string"} for n in range(10_000)}
SCHEMAS: dict[str, Any] = {
    "5,000 deep": nested(5000),
    "200 deep by items": nested(200, keyword="items"),
    "1 MB": {"description": "x" * 2**20},
    "10,000 properties": {"type": "object", "properties": WIDE},
    "100,000 values": {"enum": list(range(100_000))},
    "a large const": {"const": [[n] for n in range(50_000)]},
    "remote": {"$ref": "http://169.254.169.254/latest/meta-data"},
    "a file": {"$ref": "file:///etc/passwd"},
    "a loop": {"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"anyOf": [{"$ref": "#"}, {"type": "string"}]}}},
    "a loop of definitions": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "endless": {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    "contradictory": {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 3}]},
    "doubling oneOf": doubling("oneOf"),
    "doubling not": {"not": {"$ref": "#/$defs/d0"}, "$defs": doubling("oneOf", 12)["$defs"]},
    "a ladder of conditions": ladder(20, {"minProperties": 3}),
    "a product of choices": {
        "allOf": [{"anyOf": [{"minLength": n}, {"maxLength": 99 - n}, {"pattern": f"{n}"}]} for n in range(12)]
    },
    "unknown type": {"type": "thing"},
    "an empty property name in a loop": {"properties": {"": {"$ref": "#/properties/"}}, "required": [""], "type": "object"},
    "look-around": {"pattern": "^(?=.*[a-z])(?!.*x).{8,}$"},
    "invalid pattern": {"pattern": "([a-z"},
    "infinite number": {"minimum": float("inf")},
    "half a character": {"const": "\ud800"},
    "a date that is no list": {"required": "a"},
    "many that differ": {"type": "array", "items": {"type": "array"}, "uniqueItems": True, "minItems": 10**6},
    "many undeclared": {"type": "object", "minProperties": 10**8},
    "many contained": {"type": "array", "contains": {"type": "integer"}, "minContains": 10**8},
}  # fmt: skip

# These are harmless here: they may be refused or held, but neither takes long.
HARMLESS: dict[str, Any] = {
    "doubling allOf": doubling("allOf"),
    "doubling anyOf": doubling("anyOf", 8),
    "doubling properties": doubling_properties(),
    "1,000 properties": {"type": "object", "properties": dict(list(WIDE.items())[:1000])},
    "nested quantifiers": {"type": "string", "pattern": "^(a+)+$", "not": {"pattern": "^(a*)*b"}},
    "nested repetitions": {"type": "string", "pattern": "^(x{1,999}){1,999}$"},
    "three nested repetitions": {"type": "string", "pattern": "^((x{1,999}){1,999}){1,999}$"},
    "a pattern that needs 2^30 states": {"type": "string", "pattern": "a.{30}$"},
    "its opposite": {"type": "string", "not": {"pattern": "a.{30}$"}},
    "such patterns as names": {"type": "object", "patternProperties": {f"a.{{{n}}}b": {"minimum": n} for n in range(20)}},
    "such patterns against names": {
        "type": "object", "properties": {"a" * 3000: {}}, "patternProperties": {"^(a+)+$": {"type": "integer"}},
    },
    "long strings": {"type": "string", "minLength": 10**9},
    "long arrays": {"type": "array", "items": {"type": "integer"}, "minItems": 10**9},
    "a huge number": {"type": "number", "minimum": 1e308, "multipleOf": 1e-300},
    "a large enum with exclusions": {"enum": [f"v{n}" for n in range(1000)], "not": {"enum": [f"v{n}" for n in range(999)]}},
    "many exclusions": {"type": "string", "not": {"enum": [f"v{n}" for n in range(1000)]}},
    "many to choose of": {"type": "object", "properties": dict(list(WIDE.items())[:400]), "minProperties": 200},
}  # fmt: skip

GRAMMARS = {
    "control token": "start: <|im_end|>",
    "token id": 'root ::= <[151645]> "x"',
    "all tokens": "start: <[*]>",
    "another grammar": '{"grammars": [{"lark_grammar": "start: <[5]>"}]}',
    "options": '%llguidance {"allow_invalid_utf8": true}\nstart: "x"',
    "GBNF without end": "root ::= " + "(" * 50_000,
    "GBNF that never ends": 'root ::= root "x"',
    "Lark that never ends": 'start: start "x"',
    "unknown rules": "\n".join(["root ::= r0", *(f"r{n} ::= r{n + 1}" for n in range(1500))]),
    "too long": "#" * 2**20,
}
HARMLESS_GRAMMARS = {
    "doubling rules": "\n".join(["root ::= r0", *(f"r{n} ::= r{n + 1} r{n + 1}" for n in range(60)), 'r60 ::= "x"']),
    "ambiguous": 'root ::= e\ne ::= e e | "x" | ""',
    "ambiguous Lark": 'start: e\ne: e e e | "x" | ""',
    "huge repetition": 'start: ("x" | "y"){1,2000000000}',
    "nested repetition": 'root ::= ((("x"{1,999}){1,999}){1,999} | "y" root)',
}


def refused(error: InvalidRequestError) -> str:
    assert error.code in {"invalid_json_schema", "invalid_grammar"}
    assert len(error.message) < 500
    return error.message


async def answers(format: OutputFormat) -> str | None:
    """The reason of a refusal. CPU time is counted here and in the process that compiles."""
    began = time.process_time()
    grammar = ""
    try:
        grammar = grammar_of(format, LIMITS)
    except InvalidRequestError as error:
        return refused(error)
    finally:
        own = time.process_time() - began
        assert own < BUDGET_S
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    checker = GrammarChecker(LIMITS)
    try:
        await checker.check(grammar, tenant="t", param="p")
        return None
    except InvalidRequestError as error:
        return refused(error)
    finally:
        await checker.check('start: "x"', tenant="t", param="p")
        await checker.close()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert own + after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < BUDGET_S


@pytest.mark.parametrize("name", SCHEMAS)
async def test_a_hostile_schema_is_refused(name: str) -> None:
    reason = await answers(OutputFormat(kind="json_schema", value=SCHEMAS[name]))
    assert reason is not None
    assert reason.startswith("Invalid schema for 'response_format': ")


@pytest.mark.parametrize("name", HARMLESS)
async def test_a_schema_that_would_explode_is_answered_in_time(name: str) -> None:
    reason = await answers(OutputFormat(kind="json_schema", value=HARMLESS[name]))
    assert reason is None or reason.startswith("Invalid schema for ")


@pytest.mark.parametrize("name", GRAMMARS)
async def test_a_hostile_grammar_is_refused(name: str) -> None:
    reason = await answers(OutputFormat(kind="grammar", value=GRAMMARS[name]))
    assert reason is not None


@pytest.mark.parametrize("name", HARMLESS_GRAMMARS)
async def test_a_grammar_that_would_explode_is_answered_in_time(name: str) -> None:
    reason = await answers(OutputFormat(kind="grammar", value=HARMLESS_GRAMMARS[name]))
    assert reason is None or reason.startswith("Invalid grammar for ")


@pytest.mark.parametrize("width", [6, 8])
def test_combinations_of_alternatives_end_in_time_although_each_is_small(width: int) -> None:
    alternatives = [{"oneOf": [{"properties": {f"p{i}{j}": {"type": "string"}}} for j in range(width)]} for i in range(width)]
    began = time.thread_time()
    with pytest.raises(InvalidRequestError, match="combinations of its alternatives"):
        checked_schema({"allOf": alternatives}, param="response_format", limits=StructuredOutputSettings())
    assert time.thread_time() - began < 2.0
