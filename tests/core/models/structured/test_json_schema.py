"""What a schema's grammar lets through, keyword by keyword, and what is refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from core.models.structured.byte_walk import Grammar
from inferflux_core.errors import InvalidRequestError
from inferflux_core.models.structured.json_schema import checked_schema, schema_grammar
from inferflux_core.settings import StructuredOutputSettings

LIMITS = StructuredOutputSettings()


def grammar(schema: Any, whitespace: str | None = None) -> Grammar:
    return Grammar(schema_grammar(schema, param="response_format", limits=LIMITS, whitespace_pattern=whitespace))


def refusal(schema: Any, limits: StructuredOutputSettings = LIMITS) -> str:
    with pytest.raises(InvalidRequestError) as caught:
        checked_schema(schema, param="response_format", limits=limits)
    assert caught.value.code == "invalid_json_schema"
    assert caught.value.param == "response_format"
    return caught.value.message


OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}}
IF = {"properties": {"k": {"enum": ["x", "y"]}}, "required": ["k"], "if": {"properties": {"k": {"const": "x"}}}}

# schema, texts that are let through, texts that are not
CASES: dict[str, tuple[Any, list[str], list[str]]] = {
    "true": (True, ["1", '"a"', "null", "[1, 2]", '{"a": {}}'], ["", "nul", "[1,2]"]),
    "type": ({"type": ["integer", "null"]}, ["1", "null", "-5"], ["1.5", '"a"', "01", "9007199254740993"]),
    "number": ({"type": "number"}, ["1", "-0.5", "3.141592653"], ["1e5", "NaN", "1.", "0.1234567891", "1234567890123456"]),
    "order of properties": (OBJECT, ["{}", '{"a": 1}', '{"a": 1, "b": "x"}'], ['{"b": "x", "a": 1}', '{"c": 1}', '{"a": "x"}']),
    "expressly open": ({**OBJECT, "additionalProperties": True}, ['{"a": 1, "c": null}'], ['{"a": null}', '{"\\u0061": null}']),
    "additionalProperties": ({"additionalProperties": {"type": "null"}, "type": "object"}, ['{"x": null}'], ['{"x": 1}']),
    "patternProperties": (
        {"type": "object", "patternProperties": {"^i": {"type": "integer"}}, "additionalProperties": {"type": "null"}},
        ['{"i": 1}', '{"x": null, "ii": 2}'],
        ['{"i": null}', '{"x": 1}'],
    ),
    "propertyNames": ({"type": "object", "propertyNames": {"pattern": "^x"}}, ['{"x1": 1}'], ['{"y": 1}']),
    "minProperties": ({**OBJECT, "minProperties": 1}, ['{"a": 1}', '{"b": ""}'], ["{}"]),
    "minProperties of a map": (
        {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 2},
        ['{"key_0": null, "x": null}'],
        ['{"x": null, "x": null}', '{"key_0": null, "key_0": null}', '{"x": null}'],
    ),
    "maxProperties": ({**OBJECT, "maxProperties": 1}, ["{}", '{"a": 1}', '{"b": ""}'], ['{"a": 1, "b": ""}']),
    "what no object can be, others may": (
        {"properties": {"c": {"const": 1}}, "required": ["c"], "allOf": [{"unevaluatedProperties": False}]},
        ["null", "[]"],
        ["{}", '{"c": 1}'],
    ),
    "dependentRequired": (
        {**OBJECT, "dependentRequired": {"a": ["b"]}},
        ["{}", '{"b": ""}', '{"a": 1, "b": ""}'],
        ['{"a": 1}'],
    ),
    "dependencies": ({**OBJECT, "dependencies": {"a": ["b"]}}, ["{}", '{"a": 1, "b": ""}'], ['{"a": 1}']),
    "dependentSchemas": (
        {**OBJECT, "dependentSchemas": {"a": {"maxProperties": 1}}},
        ['{"a": 1}', '{"b": ""}'],
        ['{"a": 1, "b": ""}'],
    ),
    "unevaluatedProperties": (
        {"allOf": [OBJECT], "properties": {"c": True}, "unevaluatedProperties": False, "type": "object"},
        ['{"c": 1}', '{"c": 1, "a": 1}'],
        ['{"d": 1}'],
    ),
    "items": (
        {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 2},
        ["[1]", "[1, 2]"],
        ["[]", "[1, 2, 3]"],
    ),
    "prefixItems": (
        {"type": "array", "prefixItems": [{"const": 1}], "items": {"const": 2}},
        ["[]", "[1, 2, 2]"],
        ["[2]", "[1, 1]"],
    ),
    "items, the old way": ({"type": "array", "items": [{"const": 1}], "additionalItems": False}, ["[]", "[1]"], ["[1, 1]"]),
    "unevaluatedItems": ({"type": "array", "prefixItems": [{"const": 1}], "unevaluatedItems": False}, ["[1]"], ["[1, 2]"]),
    "uniqueItems of a few": (
        {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True},
        ["[]", "[3]", "[2, 1]", "[3, 1, 2]"],
        ["[1, 1]", "[1, 2, 1]"],
    ),
    "uniqueItems of texts": (
        {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        ["[]", '["red"]', '["red", "blue", "green"]'],
        ['["red", "red"]', '["a", "b"]'],  # the second is valid, but a grammar cannot tell it from the first
    ),
    "contains": ({"type": "array", "items": {"type": "integer"}, "contains": {"minimum": 5}}, ["[7]", "[7, 1]"], ["[]", "[1]"]),
    "maxContains": (
        {"type": "array", "items": {"enum": [1, 2]}, "contains": {"const": 1}, "maxContains": 1},
        ["[1, 2]"],
        ["[1, 1]"],
    ),
    "minimum": ({"type": "integer", "minimum": 3, "exclusiveMaximum": 12.5}, ["3", "12"], ["2", "13"]),
    "exclusiveMinimum, the old way": ({"type": "integer", "minimum": 3, "exclusiveMinimum": True}, ["4"], ["3"]),
    "multipleOf": ({"type": "number", "multipleOf": 0.25}, ["0.50", "-1.75", "2"], ["0.30"]),
    "multipleOf with odd digits": ({"type": "number", "multipleOf": 0.07}, ["0.21", "-0.42"], ["0.20"]),
    "multipleOf beside type": ({"type": "integer", "multipleOf": 1.5}, ["3", "6"], ["1", "2"]),
    "minLength": (
        {"type": "string", "minLength": 2, "maxLength": 3},
        ['"ab"', '"äöü"', '"a\\n"'],
        ['"a"', '"abcd"', '"\\u0061b"'],
    ),
    "pattern": ({"type": "string", "pattern": "a.c"}, ['"xabcx"'], ['"ac"', '"a\\nc"']),
    "format": ({"type": "string", "format": "date"}, ['"2024-02-28"'], ['"2024-13-01"', '"2024-02-30"', '"24-1-1"']),
    "unknown format": ({"type": "string", "format": "colour"}, ['"anything"'], []),
    "enum": ({"enum": [1, "a", None, [1, {"b": 2}]]}, ["1", '"a"', "null", '[1, {"b": 2}]'], ["2", "true", "[1]"]),
    "enum beside other keywords": ({"enum": ["a", "bb", 3], "type": "string", "minLength": 2}, ['"bb"'], ['"a"', "3"]),
    "true is not 1": ({"enum": [True, 1.0], "not": {"const": 1}}, ["true"], ["1"]),
    "allOf": ({"allOf": [{"type": "string", "pattern": "^a"}, {"pattern": "b$"}]}, ['"ab"', '"axb"'], ['"a"', '"b"']),
    "anyOf": ({"anyOf": [{"type": "integer"}, {"const": "x"}]}, ["1", '"x"'], ['"y"']),
    "oneOf": ({"oneOf": [{"type": "integer", "minimum": 5}, {"type": "integer", "maximum": 7}]}, ["4", "8"], ["5", "6", "7"]),
    "oneOf of integer and number": ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, ["0.5"], ["1", "1.0"]),
    "not": ({"type": "string", "not": {"enum": ["a", "ab"]}}, ['"b"', '"abc"', '""'], ['"a"', '"ab"', "1"]),
    "not a pattern": ({"type": "string", "not": {"pattern": "^x-"}}, ['"y"', '"x"'], ['"x-"', '"x-y"']),
    "not in a range": ({"type": "integer", "not": {"minimum": 3, "maximum": 5}}, ["2", "6"], ["3", "5"]),
    "not required": ({**OBJECT, "not": {"required": ["a", "b"]}}, ['{"a": 1}', '{"b": ""}'], ['{"a": 1, "b": ""}']),
    "if": (
        {"type": "object", **IF, "then": {"properties": {"n": {"const": 1}}}, "else": {"properties": {"n": {"const": 2}}}},
        ['{"k": "x", "n": 1}', '{"k": "y", "n": 2}'],
        ['{"k": "x", "n": 2}', '{"k": "y", "n": 1}'],
    ),
    "$ref": ({"$ref": "#/$defs/a~1b%20c", "$defs": {"a/b c": {"const": 1}}}, ["1"], ["2"]),
    "$anchor": ({"$ref": "#here", "$defs": {"x": {"$anchor": "here", "const": 1}}}, ["1"], ["2"]),
    "$id": ({"$id": "http://a.b/c", "$ref": "d", "$defs": {"x": {"$id": "d", "const": 1}}}, ["1"], ["2"]),
    "$ref to what is no keyword": ({"$ref": "#/components/x", "components": {"x": {"const": 1}}}, ["1"], ["2"]),
    "recursion": (
        {"type": "object", "properties": {"next": {"$ref": "#"}}},
        ["{}", '{"next": {"next": {}}}'],
        ['{"next": 1}'],
    ),
    "annotations": (
        {"const": 1, "title": "t", "$comment": "c", "x-own": [{}], "unknown": {"type": 3}, "nullable": True},
        ["1"],
        ["null"],
    ),
    "options of the library": (
        {"type": "array", "x-guidance": {"lenient": True, "item_separator": ";"}},
        ["[1, 2]"],
        ["[1;2]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_grammar_lets_through_what_its_schema_describes(name: str) -> None:
    schema, valid, invalid = CASES[name]
    made = grammar(schema)
    assert {text: made.accepts(text) for text in (*valid, *invalid)} == {
        **dict.fromkeys(valid, True),
        **dict.fromkeys(invalid, False),
    }


LOOK = "uses a look-around, which cannot be enforced."
NOTHING = "the schema at '#' describes nothing: no value can satisfy all of it."
REFUSED: dict[str, tuple[Any, str]] = {
    "no schema": ([], "the schema at '#' is neither an object nor a boolean."),
    "unknown type": ({"type": "text"}, "keyword 'type' at '#' names the unknown type 'text'."),
    "wrong value": ({"properties": {"a": {"minLength": "3"}}}, "keyword 'minLength' at '#/properties/a' is not a count."),
    "wrong schema": ({"items": 3}, "the schema at '#/items' is neither an object nor a boolean."),
    "contradiction": ({"type": "integer", "minimum": 5, "maximum": 3}, NOTHING),
    "two types": ({"allOf": [{"type": "integer"}, {"type": "string"}]}, NOTHING),
    "required and forbidden": ({"type": "object", "properties": {"a": False}, "required": ["a"]}, NOTHING),
    "empty enum": ({"enum": []}, NOTHING),
    "false": (False, NOTHING),
    "no end": ({"type": "object", "properties": {"n": {"$ref": "#"}}, "required": ["n"]}, NOTHING),
    "too short": ({"type": "string", "pattern": "^ab$", "maxLength": 1}, NOTHING),
    "a loop": ({"$ref": "#"}, "keyword '$ref' at '#' refers to itself without anything in between."),
    "a loop in two steps": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#"}]}}},
        "keyword '$ref' at '#' refers to itself without anything in between.",
    ),
    "elsewhere": (
        {"items": {"$ref": "https://example.com/s.json#/x"}},
        "keyword '$ref' at '#/items' refers to 'https://example.com/s.json#/x', which is not in this schema; nothing is loaded "
        "from elsewhere: put it under '$defs'.",
    ),
    "nowhere": ({"$ref": "#/$defs/x"}, "keyword '$ref' at '#' refers to '#/$defs/x', which is not in this schema."),
    "look-around": ({"properties": {"a/b": {"pattern": "(?=x)"}}}, f"keyword 'pattern' at '#/properties/a~1b' {LOOK}"),
    "look-around in a name": ({"patternProperties": {"(?!x)": {}}}, f"keyword 'patternProperties' at '#' {LOOK}"),
    "back-reference": ({"pattern": "(a)\\1"}, "keyword 'pattern' at '#' uses a back-reference, which cannot be enforced."),
    "many places": (
        {"type": "array", "items": {"type": "array"}, "uniqueItems": True, "minItems": 2},
        "keyword 'uniqueItems' at '#' asks for more items than can be made sure to differ.",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_held_is_refused_by_keyword_and_pointer(name: str) -> None:
    schema, reason = REFUSED[name]
    assert refusal(schema) == f"Invalid schema for 'response_format': {reason}"


def test_limits_count() -> None:
    small = StructuredOutputSettings(max_bytes=256, max_depth=3, max_enum=2)
    at = "Invalid schema for 'response_format':"
    assert refusal({"enum": [1, 2, 3]}, small) == f"{at} keyword 'enum' at '#' has 3 values; the most is 2."
    assert refusal({"description": "x" * 300}, small) == f"{at} the schema at '#' has 318 bytes; the most is 256."
    deep = {"not": {"not": {"not": {}}}}
    assert refusal(deep, small) == f"{at} the schema at '#/not/not/not' is nested deeper than 3 schemas."
    deeper: Any = []
    for _ in range(20):
        deeper = [deeper]
    assert refusal({"const": deeper}, small) == f"{at} the schema at '#' nests deeper than 12 levels of JSON."


def test_a_long_name_is_cut_in_a_message() -> None:
    message = refusal({"properties": {"n" * 5000: {"type": "x" * 5000}}})
    assert len(message) < 600
    assert "x" * 81 not in message


def test_numbers_without_bounds_end() -> None:
    made = grammar({"type": "integer"})
    assert made.accepts("9007199254740991")
    assert not made.accepts("90071992547409910")


def test_anything_does_not_nest_forever() -> None:
    made = grammar({})
    assert made.accepts("[[[[[[1]]]]]]")
    assert not made.accepts("[" * 9 + "]" * 9)


def test_whitespace_is_one_space_or_what_is_asked() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array"}}, "required": ["a"]}
    made, free = grammar(schema), grammar(schema, "[ \n]{0,3}")
    assert [made.accepts(text) for text in ('{"a": [1, 2]}', '{"a":[1,2]}', '{ "a": []}')] == [True, False, False]
    assert [free.accepts(text) for text in ('{"a":[1,2]}', '{\n "a" : [ 1 ]\n}', '{    "a":[]}')] == [True, True, False]


@pytest.mark.parametrize("pattern", ["a", " |x", "(", ".*", " " * 201])
def test_whitespace_that_is_none_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidRequestError, match="Invalid whitespace pattern"):
        grammar({}, pattern)


def test_the_result_can_stand_in_another_grammar() -> None:
    checked = checked_schema(CASES["recursion"][0], param="tools", limits=LIMITS)
    made = Grammar(f'start: "<" %json {json.dumps({**checked, "type": "object"})} ">"')
    assert made.accepts('<{"next": {}}>')
