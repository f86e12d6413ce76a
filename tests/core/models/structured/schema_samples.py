"""Two hundred schemas: what people write by hand, what libraries generate, and each keyword of JSON Schema with others."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

Schema = dict[str, Any]


def obj(properties: Schema, *, required: list[str] | None = None, closed: bool = True, **more: Any) -> Schema:
    """A closed object, all of whose properties are required unless said otherwise."""
    made = {"type": "object", "properties": properties, "required": list(properties) if required is None else required, **more}
    return {**made, "additionalProperties": False} if closed else made


STR, INT, NUM, BOOL, NULL = ({"type": name} for name in ("string", "integer", "number", "boolean", "null"))


def arr(items: Any, **more: Any) -> Schema:
    return {"type": "array", "items": items, **more}


PERSON = obj(
    {"name": {"type": "string", "minLength": 1, "maxLength": 20}, "age": {"type": "integer", "minimum": 0, "maximum": 150}}
)
ADDRESS = obj(
    {"street": STR, "city": STR, "zip": {"type": "string", "pattern": "^[0-9]{5}(-[0-9]{4})?$"}, "country": {"const": "US"}}
)

# One a line: examples of OpenAI's guide, what pydantic generates, trees, and what people ask for at work.
REAL: list[Schema] = [
    json.loads(line) for line in Path(__file__).with_name("real_schemas.jsonl").read_text("utf-8").splitlines()
]
BOUNDS: list[Schema] = [
    {"type": kind, **low, **high}
    for kind, low, high in product(
        ("integer", "number"),
        ({}, {"minimum": -3}, {"exclusiveMinimum": 0}, {"minimum": 2.5}),
        ({}, {"maximum": 1000}, {"exclusiveMaximum": 7.25}),
    )
]
MULTIPLES: list[Schema] = [
    {"type": kind, "multipleOf": factor, **more}
    for kind, factor, more in product(("integer", "number"), (1, 3, 0.5, 12), ({}, {"minimum": 10, "maximum": 90}))
]
LENGTHS: list[Schema] = [
    {
        "type": "string",
        **{name: value for name, value in (("minLength", low), ("maxLength", high)) if value is not None},
        **more,
    }
    for low, high, more in product((None, 3), (None, 6), ({}, {"pattern": "[aeiou]"}))
]
PATTERNS: list[Schema] = [
    {"type": "string", "pattern": pattern}
    for pattern in (
        "^[a-z]+$",
        "foo|bar",
        "^(a|b){2,4}$",
        "^\\S+ \\S+$",
        "\\d{3}",
        "^[^x]*$",
        "^$",
        "a.c$",
        "^(GET|PUT) /[a-z/]*$",
        "^\\w+@\\w+$",
        "^[\\u4e00-\\u9fa5]{1,3}$",
        "^#([0-9a-fA-F]{3}){1,2}$",
    )
]
FORMATS: list[Schema] = [
    {"type": "string", "format": name}
    for name in (
        "date",
        "time",
        "date-time",
        "duration",
        "email",
        "hostname",
        "ipv4",
        "ipv6",
        "uuid",
        "uri",
        "json-pointer",
        "regex",
        "unheard-of",
    )
]
ARRAYS: list[Schema] = [
    arr(items, **{name: value for name, value in (("minItems", low), ("maxItems", high)) if value is not None}, **more)
    for items, low, high, more in product(
        (INT, {"enum": ["a", "b", "c"]}, {"enum": [1, 2, 3, 4, 5, 6, 7]}), (None, 2), (3,), ({}, {"uniqueItems": True})
    )
] + [
    arr(STR, uniqueItems=True, minItems=3),
    arr({"type": "number"}, uniqueItems=True, minItems=5),
    arr(obj({"id": INT, "name": STR}), uniqueItems=True, minItems=2, maxItems=4),
    arr(INT, contains={"minimum": 100}),
    arr(INT, contains={"const": 5}, minContains=2, maxContains=2, maxItems=5),
    arr({"type": ["integer", "string"]}, contains=STR, maxContains=1, minItems=3, maxItems=4),
    {"type": "array", "prefixItems": [INT, STR], "items": BOOL, "minItems": 1, "maxItems": 4},
    {"type": "array", "prefixItems": [INT, STR], "items": False},
    {"type": "array", "prefixItems": [INT], "unevaluatedItems": STR, "maxItems": 3},
    {
        "allOf": [{"prefixItems": [INT]}, {"type": "array", "prefixItems": [True, STR], "maxItems": 3}],
        "unevaluatedItems": False,
    },
    {
        "type": "array",
        "items": [INT, STR],
        "additionalItems": False,
        "minItems": 2,
        "$schema": "http://json-schema.org/draft-07/schema#",
    },
]
OBJECTS: list[Schema] = [
    {"type": "object"},
    {"type": "object", "additionalProperties": INT, "minProperties": 2, "maxProperties": 3},
    {"type": "object", "additionalProperties": INT, "minProperties": 1},
    {"type": "object", "propertyNames": {"pattern": "^[a-z]{1,4}$"}, "additionalProperties": BOOL, "minProperties": 2},
    {"type": "object", "propertyNames": {"enum": ["x", "y"]}, "additionalProperties": INT},
    {"type": "object", "propertyNames": {"maxLength": 2}, "additionalProperties": INT, "minProperties": 1},
    {"type": "object", "patternProperties": {"^a": INT, "z$": {"minimum": 3}}, "additionalProperties": False},
    {"type": "object", "patternProperties": {"^s_": STR, "^i_": INT}, "minProperties": 3},
    {
        "type": "object",
        "properties": {"ab": {"minimum": 2}},
        "patternProperties": {"^a": INT},
        "additionalProperties": BOOL,
        "required": ["ab"],
    },
    {"type": "object", "properties": {"a": INT, "b": INT, "c": INT}, "minProperties": 2},
    {"type": "object", "properties": {"a": INT, "b": INT, "c": INT}, "minProperties": 1, "maxProperties": 1},
    {"type": "object", "properties": {"a": INT, "b": INT, "c": INT}, "required": ["b"], "maxProperties": 2},
    {"type": "object", "properties": {"a": INT, "b": INT}, "dependentRequired": {"a": ["b"]}, "minProperties": 1},
    {
        "type": "object",
        "properties": {"a": INT, "b": True},
        "dependentSchemas": {"a": {"properties": {"b": STR}, "required": ["b"]}},
    },
    {"type": "object", "properties": {"a": INT}, "required": ["a", "undeclared"]},
    {"type": "object", "properties": {"a": INT, "never": False}},
    {"type": "object", "properties": {"a": INT}, "additionalProperties": True, "minProperties": 2},
    {"properties": {"a": INT}, "unevaluatedProperties": {"type": "boolean"}, "type": "object", "minProperties": 2},
    {
        "type": "object",
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        "properties": {"a": INT, "b": STR},
        "additionalProperties": False,
    },
    {"type": "object", "properties": {"a": INT, "b": INT}, "not": {"required": ["a", "b"]}},
    {
        "type": "object",
        "dependencies": {"a": ["b"]},
        "properties": {"a": INT, "b": INT},
        "$schema": "http://json-schema.org/draft-07/schema#",
    },
]
COMBINED: list[Schema] = [
    {"oneOf": [{"type": "integer", "multipleOf": 3}, {"type": "integer", "minimum": 10}, STR]},
    {"oneOf": [{"type": "integer", "minimum": 5}, {"type": "integer", "maximum": 10}]},
    {"oneOf": [INT, NUM]},
    {"oneOf": [{"const": "a", "title": "A"}, {"const": "b"}, {"enum": ["c", "a"]}]},
    {"oneOf": [obj({"a": STR}, closed=False), obj({"b": INT}, closed=False)]},
    {"oneOf": [arr(INT, maxItems=2), arr(STR, maxItems=2)]},
    {"anyOf": [STR, arr(BOOL, maxItems=3), NULL]},
    {"anyOf": [{"const": None}, {"enum": [1, "x"]}, {"const": {"a": [1, {"b": None}]}}]},
    {"allOf": [{"minimum": 3}, {"maximum": 9}, INT]},
    {"allOf": [{"pattern": "^a"}, {"pattern": "z$"}, {"maxLength": 5}], "type": "string"},
    {"allOf": [{"anyOf": [INT, STR]}, {"anyOf": [STR, NULL]}]},
    {"not": {"type": ["object", "array", "string"]}},
    {"type": "string", "not": {"enum": ["a", "ab", "b"]}, "maxLength": 3},
    {"type": "string", "not": {"pattern": "^x-"}},
    {"type": "integer", "not": {"enum": [5, 7]}, "minimum": 4, "maximum": 9},
    {"type": "number", "not": {"minimum": 0}},
    {"not": {"anyOf": [STR, {"minimum": 3}]}, "type": ["string", "number"]},
    {"not": {"allOf": [INT, {"minimum": 3}]}, "type": "integer"},
    {"type": "array", "not": {"maxItems": 1}, "items": INT},
    {"type": "array", "not": {"contains": {"const": 1}}, "items": {"type": "integer", "minimum": 0, "maximum": 3}},
    {"type": ["integer", "string"], "if": INT, "then": {"minimum": 5}, "else": {"maxLength": 3}},
    {"enum": [0, "", None, False, [], {}, [1, [2]], {"k": {"l": 1.5}}]},
    {"const": 'a "quoted" \\ text\n'},
    {"minimum": 3},
    {"maxLength": 2},
    {"required": ["a"]},
    {"properties": {"a": INT}},
    {"items": INT},
    {},
    {"type": ["string", "integer", "null"], "maxLength": 4, "maximum": 4},
    {"enum": ["aa", "b", 3, [1]], "type": ["string", "array"], "minLength": 2},
    {"$ref": "#/$defs/a", "maximum": 9, "$defs": {"a": {"$ref": "#/$defs/b", "minimum": 3}, "b": INT}},
    {
        "type": "object",
        "properties": {"k": STR},
        "required": ["k"],
        "nullable": True,
        "x-vendor": 1,
        "example": {"k": "v"},
        "readOnly": True,
    },
    {"anyOf": [{"enum": [f"value {n}" for n in range(400)]}, NULL]},
    obj({f"p{n}": [STR, INT, BOOL][n % 3] for n in range(40)}),
    obj({f"q{n}": INT for n in range(30)}, required=["q3"]),
]
NESTED: list[Schema] = [
    obj({"outer": wrap(inner), "n": INT})
    for inner in (
        PERSON,
        ADDRESS,
        {"enum": ["u", "v"]},
        {"type": "integer", "multipleOf": 5},
        {"type": "string", "format": "date"},
    )
    for wrap in (
        lambda inner: arr(inner, minItems=1, maxItems=2),
        lambda inner: {"anyOf": [inner, NULL]},
        lambda inner: {"type": "object", "additionalProperties": inner, "maxProperties": 2},
        lambda inner: {"type": "array", "prefixItems": [inner, BOOL], "minItems": 2, "items": False},
        lambda inner: obj({"deep": obj({"deeper": arr(arr(inner, maxItems=1), maxItems=1)})}),
    )
]

SCHEMAS: list[Schema] = [
    *REAL,
    *BOUNDS,
    *MULTIPLES,
    *LENGTHS,
    *PATTERNS,
    *FORMATS,
    *ARRAYS,
    *OBJECTS,
    *COMBINED,
    *NESTED,
]
