"""Whatever a grammar of a schema lets through is valid under the schema, as an independent validator sees it."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from jsonschema.validators import validator_for

from core.models.structured.byte_walk import Grammar
from core.models.structured.schema_samples import SCHEMAS
from inferflux_core.errors import InvalidRequestError
from inferflux_core.models.structured.json_schema import schema_grammar
from inferflux_core.settings import StructuredOutputSettings

LIMITS = StructuredOutputSettings()


def validator(schema: Any) -> Any:
    dialect = validator_for(schema, default=Draft202012Validator)
    return dialect(schema, format_checker=dialect.FORMAT_CHECKER)


def compiled(schema: Any) -> Grammar:
    return Grammar(schema_grammar(schema, param="response_format", limits=LIMITS))


def check(schema: Any, grammar: Grammar, choose: random.Random) -> None:
    text = grammar.walk(choose)
    errors = [error.message for error in validator(schema).iter_errors(json.loads(text))]
    assert not errors, (schema, text, errors)


def test_there_are_two_hundred_samples() -> None:
    assert len({json.dumps(schema, sort_keys=True) for schema in SCHEMAS}) == len(SCHEMAS) >= 200


@pytest.mark.parametrize("part", range(10))
def test_random_answers_to_the_samples_are_valid(part: int) -> None:
    for index in range(part, len(SCHEMAS), 10):
        grammar = compiled(SCHEMAS[index])
        choose = random.Random(index)
        for _ in range(3):
            check(SCHEMAS[index], grammar, choose)


NAMES = ("a", "b", "c", "ab")
SIMPLE = st.sampled_from(
    [
        {"type": "string"}, {"type": "integer"}, {"type": "number"}, {"type": "boolean"}, {"type": "null"}, {"const": "b"},
        {"enum": ["a", 1, None]}, {"type": "string", "maxLength": 3}, {"type": "integer", "minimum": 2}, {"maximum": 5},
        {"pattern": "^a"}, {"type": "string", "pattern": "b"}, {"multipleOf": 0.5}, True, False, {}, {"minLength": 2},
        {"required": ["a"]}, {"type": ["string", "null"]}, {"$ref": "#/$defs/other"}, {"type": "array", "items": {"$ref": "#"}},
    ]
)  # fmt: skip
NAME_SCHEMAS = st.sampled_from([{"pattern": "^[ab]"}, {"enum": ["a", "d"]}, {"maxLength": 1}, {"not": {"const": "c"}}])
SUBSETS = st.lists(st.sampled_from(NAMES), unique=True, max_size=2)


def keywords(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    few = st.lists(inner, min_size=1, max_size=3)
    objects = st.fixed_dictionaries(
        {"properties": st.dictionaries(st.sampled_from(NAMES), inner, max_size=3)},
        optional={
            "type": st.just("object"), "required": SUBSETS, "additionalProperties": inner, "minProperties": st.integers(1, 3),
            "patternProperties": st.dictionaries(st.sampled_from(["^a", "b$", "c"]), inner, max_size=2),
            "maxProperties": st.integers(1, 3), "dependentRequired": st.just({"a": ["b"]}),
            "dependentSchemas": st.fixed_dictionaries({"b": inner}), "unevaluatedProperties": inner,
            "propertyNames": NAME_SCHEMAS,
        },
    )  # fmt: skip
    arrays = st.fixed_dictionaries(
        {"type": st.just("array")},
        optional={
            "items": inner, "prefixItems": few, "minItems": st.integers(0, 3), "maxItems": st.integers(0, 4),
            "uniqueItems": st.just(True), "contains": inner, "unevaluatedItems": inner,
        },
    )  # fmt: skip
    combined = st.one_of(
        *(st.fixed_dictionaries({name: few}) for name in ("anyOf", "allOf", "oneOf")),
        st.fixed_dictionaries({"not": inner}),
        st.fixed_dictionaries({"if": inner, "then": inner}, optional={"else": inner}),
    )
    return st.one_of(objects, arrays, combined)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.recursive(SIMPLE, keywords, max_leaves=8), SIMPLE, st.randoms(use_true_random=False))
def test_random_answers_to_random_schemas_are_valid(schema: Any, other: Any, choose: random.Random) -> None:
    root = {"allOf": [schema], "$defs": {"other": other}}
    try:
        grammar = compiled(root)
    except InvalidRequestError:
        assume(False)
    for _ in range(2):
        check(root, grammar, choose)
