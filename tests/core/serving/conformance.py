"""OpenAI's published OpenAPI document as the judge of replies."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

DOCUMENT = Path(__file__).parents[4] / "shared" / "conformance" / "openai-openapi.json"

needs_document = pytest.mark.skipif(not DOCUMENT.exists(), reason=f"OpenAI's OpenAPI document is not at {DOCUMENT}")


def _nullable(node: Any) -> Any:
    """The document mixes OpenAPI 3.0's `nullable: true` into JSON Schema, where it means nothing; make it mean null."""
    if isinstance(node, list):
        return [_nullable(item) for item in node]
    if not isinstance(node, dict):
        return node
    result = {key: _nullable(value) for key, value in node.items()}
    return {"anyOf": [result, {"type": "null"}]} if node.get("nullable") is True else result


@functools.cache
def _validator(name: str) -> jsonschema.Draft202012Validator:
    schemas = _nullable(json.loads(DOCUMENT.read_text())["components"]["schemas"])
    return jsonschema.Draft202012Validator({"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas}})


def conforms(value: object, name: str) -> None:
    """Fail unless `value` is an instance of the schema `name`."""
    _validator(name).validate(value)
