"""The fields that say what the output must be: every spelling of every client, one meaning."""

from __future__ import annotations

from typing import Any

import pytest

from core.serving.scripted import CHAT, stand
from inferflux_core.models.structured.output_format import OutputFormat

SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "integer"}}}
NAMED: dict[str, Any] = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}
URLS = ("/v1/chat/completions", "/v1/completions")


def of(kind: Any, value: Any = None, param: str = "response_format", white: str | None = None) -> OutputFormat:
    return OutputFormat(kind=kind, value=value, param=param, whitespace_pattern=white)


FORMATS: list[tuple[dict[str, Any], OutputFormat | None]] = [
    ({}, None),
    ({"response_format": None}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, of("json_object")),
    ({"response_format": {"type": "json_object", "schema": SCHEMA}}, of("json_schema", SCHEMA)),
    ({"response_format": NAMED}, of("json_schema", SCHEMA)),
    ({"response_format": {"type": "json_schema", "schema": SCHEMA}}, of("json_schema", SCHEMA)),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": True}}}, of("json_schema", True)),
    ({"structured_outputs": {"json": SCHEMA}}, of("json_schema", SCHEMA, "structured_outputs.json")),
    ({"structured_outputs": {"json": '{"type": "null"}'}}, of("json_schema", {"type": "null"}, "structured_outputs.json")),
    (
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?", "disable_any_whitespace": True}},
        of("json_schema", SCHEMA, "structured_outputs.json", " ?"),
    ),
    ({"structured_outputs": {"regex": "a+"}}, of("regex", "a+", "structured_outputs.regex")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, of("choice", ["a", "b"], "structured_outputs.choice")),
    ({"structured_outputs": {"grammar": "start: /a/"}}, of("grammar", "start: /a/", "structured_outputs.grammar")),
    ({"structured_outputs": {"json_object": True}}, of("json_object", None, "structured_outputs.json_object")),
    ({"guided_json": SCHEMA}, of("json_schema", SCHEMA, "guided_json")),
    ({"guided_json": "{}", "guided_whitespace_pattern": "x"}, of("json_schema", {}, "guided_json", "x")),
    ({"guided_regex": "[a-z]"}, of("regex", "[a-z]", "guided_regex")),
    ({"guided_choice": ["yes"]}, of("choice", ["yes"], "guided_choice")),
    ({"guided_grammar": 'root ::= "a"'}, of("grammar", 'root ::= "a"', "guided_grammar")),
    ({"grammar": 'root ::= "a"'}, of("grammar", 'root ::= "a"', "grammar")),
    ({"json_schema": SCHEMA}, of("json_schema", SCHEMA, "json_schema")),
    ({"grammar": "", "response_format": {"type": "text"}, "guided_regex": "a"}, of("regex", "a", "guided_regex")),
]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(("fields", "format"), FORMATS, ids=lambda value: str(value)[:70])
async def test_every_spelling(url: str, fields: dict[str, Any], format: OutputFormat | None) -> None:
    s = stand()
    async with s.client() as client:
        response = await client.post(url, json={**CHAT, "prompt": "x", **fields})
    assert response.status_code == 200, response.text
    assert s.pipeline.requests[0][1].format == format


REFUSED: list[tuple[dict[str, Any], str, str | None, str]] = [
    ({"response_format": "json"}, "response_format", None, "object"),
    ({"response_format": {}}, "response_format.type", None, "Missing"),
    ({"response_format": {"type": "xml"}}, "response_format.type", "unsupported_value", "'xml'"),
    ({"response_format": {"type": "structural_tag"}}, "response_format.type", "unsupported_value", "tags"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", None, "Missing"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
        "response_format.json_schema.schema",
        None,
        "Missing",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a b", "schema": {}}}},
        "response_format.json_schema.name",
        None,
        "pattern",
    ),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": []}}},
        "response_format.json_schema.schema",
        None,
        "a JSON schema",
    ),
    ({"structured_outputs": {}}, "structured_outputs", None, "exactly one"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs", None, "it has none"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", None, "'regex' and 'choice'"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "invalid_json_schema", "not JSON"),
    ({"structured_outputs": {"json": 5}}, "structured_outputs.json", None, "JSON schema"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", None, "at least 1"),
    ({"structured_outputs": {"choice": [1]}}, "structured_outputs.choice[0]", None, "string"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag", "unsupported_parameter", "tags"),
    (
        {"structured_outputs": {"json": SCHEMA, "disable_additional_properties": True}},
        "structured_outputs.disable_additional_properties",
        "unsupported_parameter",
        '"additionalProperties": false',
    ),
    ({"guided_json": "[1]"}, "guided_json", "invalid_json_schema", "not JSON of an object"),
    ({"guided_regex": 5}, "guided_regex", None, "string"),
    ({"guided_choice": "a"}, "guided_choice", None, "array"),
    ({"json_schema": "x"}, "json_schema", None, "an object"),
    ({"response_format": NAMED, "guided_json": SCHEMA}, "guided_json", None, "'response_format' and 'guided_json'"),
    ({"guided_regex": "a", "grammar": "b"}, "grammar", None, "'guided_regex' and 'grammar'"),
    ({"json_schema": {}, "structured_outputs": {"regex": "a"}}, "json_schema", None, "'structured_outputs' and 'json_schema'"),
]


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize(("fields", "param", "code", "words"), REFUSED, ids=lambda value: str(value)[:70])
async def test_what_says_nothing_that_can_be_held(
    url: str, fields: dict[str, Any], param: str, code: str | None, words: str
) -> None:
    s = stand()
    async with s.client() as client:
        response = await client.post(url, json={**CHAT, "prompt": "x", **fields})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["code"]) == (400, param, code), error["message"]
    assert words in error["message"]
    assert s.pipeline.requests == []
