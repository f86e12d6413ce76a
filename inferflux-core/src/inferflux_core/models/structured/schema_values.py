"""Whether one JSON value is valid under a schema: for the values that `enum` and `const` list."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Final

from inferflux_core.models.structured.pattern_language import Budget, Language, TooComplexError, common_pattern, common_text
from inferflux_core.models.structured.pattern_syntax import PatternError, Tree, parse
from inferflux_core.models.structured.schema_document import Refused, Schema, SchemaDocument
from inferflux_core.models.structured.string_formats import format_pattern

_UNEVALUATED: Final = frozenset({"unevaluatedProperties", "unevaluatedItems"})
_MAX_STEPS: Final = 300_000


class Unsure(Exception):
    """It cannot be told within bounds, or validators disagree about it."""


def type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list() | tuple():
            return "array"
    return "object"


def key_of(value: Any) -> str:
    """Equal for values that JSON Schema calls equal: 1 is 1.0, and true is not 1."""
    if isinstance(value, str):
        return '"' + value
    return json.dumps(_exact(value), sort_keys=True, ensure_ascii=False)


def _exact(value: Any) -> Any:
    if isinstance(value, float) and value == int(value):
        return int(value)
    if isinstance(value, list | tuple):
        return [_exact(part) for part in value]
    if isinstance(value, Mapping):
        return {name: _exact(part) for name, part in value.items()}
    return value


def exact(number: float) -> Fraction:
    """The number that the digits say: 0.1 is a tenth."""
    return Fraction(number) if isinstance(number, int) else Fraction(repr(number))


class PatternBook:
    """Automata of the patterns of one schema, made once."""

    def __init__(self) -> None:
        self._budget = Budget()
        self._languages: dict[tuple[str, bool], Language] = {}

    def language(self, pattern: str, *, wide: bool = False) -> Language:
        """Raises PatternError or TooComplexError."""
        key = pattern, wide
        if key not in self._languages:
            self._languages[key] = Language(parse(pattern, wide=wide))
        return self._languages[key]

    def common_text(self, inside: Sequence[Language], outside: Sequence[Language] = ()) -> str | None:
        """As the function of this name; all of one schema share a budget."""
        return common_text(inside, outside, self._budget)

    def common_pattern(self, inside: Sequence[Language], outside: Sequence[Language]) -> Tree | None:
        """As the function of this name; all of one schema share a budget."""
        return common_pattern(inside, outside, self._budget)

    def matches(self, pattern: str, text: str) -> bool | None:
        """None if it cannot be told, or dialects differ."""
        try:
            sure = self.language(pattern).matches(text)
            return sure if sure == self.language(pattern, wide=True).matches(text) else None
        except (PatternError, TooComplexError):
            return None


class Validator:
    """Validates values. What it cannot tell raises `Unsure`."""

    def __init__(self, document: SchemaDocument, patterns: PatternBook) -> None:
        self._document = document
        self._patterns = patterns
        self._steps = 0
        self._path: set[tuple[int, int]] = set()
        self._listed: dict[int, frozenset[str]] = {}  # identity of a schema -> keys of its `enum`

    def holds(self, value: Any, schema: Schema) -> bool:
        """Raises Unsure, or Refused for a reference that leads nowhere."""
        if isinstance(schema, bool):
            return schema
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise Unsure
        key = id(schema), id(value)
        if key in self._path:
            raise Refused(self._document.pointer(schema), "$ref", "refers to itself without anything in between")
        self._path.add(key)
        try:
            return self._in_place(value, schema) and self._typed(value, schema)
        finally:
            self._path.discard(key)

    def _in_place(self, value: Any, schema: Mapping[str, Any]) -> bool:
        for keyword in ("$ref", "$dynamicRef"):
            if keyword in schema and not self.holds(value, self._document.target(schema, keyword)):
                return False
        if not schema.keys().isdisjoint(_UNEVALUATED) and isinstance(value, list | Mapping):
            raise Unsure
        if "const" in schema and key_of(value) != key_of(schema["const"]):
            return False
        if "enum" in schema:
            if id(schema) not in self._listed:
                self._listed[id(schema)] = frozenset(map(key_of, schema["enum"]))
            if key_of(value) not in self._listed[id(schema)]:
                return False
        if not all(self.holds(value, part) for part in schema.get("allOf", ())):
            return False
        if "anyOf" in schema and not any(self.holds(value, part) for part in schema["anyOf"]):
            return False
        if "oneOf" in schema and sum(self.holds(value, part) for part in schema["oneOf"]) != 1:
            return False
        if "not" in schema and self.holds(value, schema["not"]):
            return False
        if "if" in schema:
            return self.holds(value, schema.get("then" if self.holds(value, schema["if"]) else "else", True))
        return True

    def _typed(self, value: Any, schema: Mapping[str, Any]) -> bool:
        kind = type_of(value)
        if "type" in schema:
            names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            if kind not in names and not ("integer" in names and kind == "number" and value == int(value)):
                return False
        judge: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
            "number": self._number,
            "string": self._string,
            "array": self._array,
            "object": self._object,
        }
        return kind not in judge or judge[kind](value, schema)

    def _number(self, value: float, schema: Mapping[str, Any]) -> bool:
        number = exact(value)
        for low, high, sign in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
            bound, strict = schema.get(low), schema.get(high)
            if bound is not None and not (sign * number >= sign * exact(bound)):
                return False
            if strict is True and bound is not None and number == exact(bound):
                return False
            if strict is not None and not isinstance(strict, bool) and not (sign * number > sign * exact(strict)):
                return False
        if "multipleOf" in schema:
            return (number / exact(schema["multipleOf"])).denominator == 1
        return True

    def _string(self, value: str, schema: Mapping[str, Any]) -> bool:
        if not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value)):
            return False
        if "pattern" in schema and not self._matches(schema["pattern"], value):
            return False
        pattern = format_pattern(schema.get("format"))
        if pattern is not None and not self._matches(pattern, value):
            raise Unsure  # it may be one that the pattern leaves out, and not all validators check formats
        return True

    def _matches(self, pattern: str, text: str) -> bool:
        found = self._patterns.matches(pattern, text)
        if found is None:
            raise Unsure
        return found

    def _array(self, value: list[Any], schema: Mapping[str, Any]) -> bool:
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return False
        if schema.get("uniqueItems") and len(set(map(key_of, value))) < len(value):
            return False
        prefix, rest = item_schemas(schema)
        for index, item in enumerate(value):
            if not self.holds(item, prefix[index] if index < len(prefix) else rest):
                return False
        if "contains" in schema:
            found = sum(self.holds(item, schema["contains"]) for item in value)
            return bool(schema.get("minContains", 1) <= found <= schema.get("maxContains", found))
        return True

    def _object(self, value: Mapping[str, Any], schema: Mapping[str, Any]) -> bool:
        if not schema.get("minProperties", 0) <= len(value) <= schema.get("maxProperties", len(value)):
            return False
        if any(name not in value for name in schema.get("required", ())):
            return False
        for trigger, needed in dependencies(schema):
            if trigger in value and not (
                self.holds(value, needed) if isinstance(needed, Mapping | bool) else all(name in value for name in needed)
            ):
                return False
        for name, part in value.items():
            own = [schema["properties"][name]] if name in schema.get("properties", ()) else []
            own += [
                inner for pattern, inner in schema.get("patternProperties", {}).items() if self._matches(pattern, name)
            ]  # fmt: skip
            if not all(self.holds(part, inner) for inner in own or [schema.get("additionalProperties", True)]):
                return False
            if not self.holds(name, schema.get("propertyNames", True)):
                return False
        return True


def item_schemas(schema: Mapping[str, Any]) -> tuple[list[Schema], Schema]:
    """Schemas of the first items and of the rest, in the new spelling or the old (`items` as a list)."""
    items = schema.get("items", True)
    if isinstance(items, list):
        return items, schema.get("additionalItems", True)
    return schema.get("prefixItems", []), items


def dependencies(schema: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Property -> what its presence asks for: names, or a schema."""
    found: list[tuple[str, Any]] = []
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        found += schema.get(keyword, {}).items()
    return found
