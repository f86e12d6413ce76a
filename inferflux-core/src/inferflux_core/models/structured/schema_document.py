"""A JSON schema as it came: its limits, what its keywords may be, and where its references lead."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import unquote, urljoin

from inferflux_core.errors import InvalidRequestError
from inferflux_core.settings import StructuredOutputSettings

Schema = Mapping[str, Any] | bool

_MAX_NODES: Final = 20_000  # values of all kinds in one schema
_MAX_NAME: Final = 80  # characters of a name or keyword in a message
_MAX_NUMBER: Final = 10**9  # of lengths and counts; a larger one bounds nothing that is ever written

MAPS: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # name -> schema
LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems")
ONES: Final = (
    "not", "if", "then", "else", "items", "additionalItems", "contains", "additionalProperties", "propertyNames",
    "unevaluatedProperties", "unevaluatedItems",
)  # fmt: skip
_COUNTS: Final = (
    "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains", "maxContains",
)  # fmt: skip
_TYPES: Final = frozenset({"null", "boolean", "integer", "number", "string", "array", "object"})


class Refused(Exception):
    """A keyword of the schema cannot be held.

    Args:
        pointer: JSON pointer of the schema that has the keyword.
    """

    def __init__(self, pointer: str, keyword: str, reason: str) -> None:
        super().__init__(reason)
        self.pointer = pointer
        self.keyword = keyword
        self.reason = reason

    def error(self, param: str) -> InvalidRequestError:
        where = shortened(self.pointer, 4 * _MAX_NAME) or "#"
        what = f"keyword {shortened(self.keyword)!r} at {where!r}" if self.keyword else f"the schema at {where!r}"
        return InvalidRequestError(
            f"Invalid schema for {param!r}: {what} {self.reason}.", param=param, code="invalid_json_schema"
        )


class RefusedWithin(Refused):
    """What a place within asks cannot be held at all: it is no use to leave out what leads there."""


def shortened(text: str, most: int = _MAX_NAME) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def under(pointer: str, *keys: str | int) -> str:
    """The pointer of what is within."""
    return pointer + "".join("/" + str(key).replace("~", "~0").replace("/", "~1") for key in keys)


class SchemaDocument:
    """One schema with all that it refers to.

    Raises:
        Refused: it is beyond the limits, or a keyword has a value of the wrong type.
    """

    def __init__(self, root: Schema, limits: StructuredOutputSettings) -> None:
        if not isinstance(root, Mapping | bool):
            raise Refused("#", "", "is neither an object nor a boolean")
        self.root = root
        self._limits = limits
        self._measure()
        self._pointers: dict[int, str] = {}
        self._bases: dict[int, str] = {}
        self._named: dict[str, Schema] = {}  # absolute address, with or without anchor -> schema
        self._dynamic: set[str] = set()
        self._schemas = list(self._walk())
        for pointer, schema in self._schemas:
            _check_keywords(pointer, schema, limits.max_enum)

    def pointer(self, schema: Schema) -> str:
        return self._pointers.get(id(schema), "#")

    def is_known(self, value: Any) -> bool:
        """Whether this is a schema of the document or one made for it."""
        return isinstance(value, Mapping) and id(value) in self._pointers

    def adopt(self, schema: Mapping[str, Any], origin: Schema) -> Mapping[str, Any]:
        """A schema made here, which messages and references take for the one it was made for."""
        self._pointers[id(schema)] = self.pointer(origin)
        self._bases[id(schema)] = self._bases.get(id(origin), "")
        self._schemas.append(("", schema))  # kept alive: it is known by its identity
        return schema

    def target(self, schema: Mapping[str, Any], keyword: str) -> Schema:
        """What `$ref` or `$dynamicRef` of this schema means.

        Raises:
            Refused: nothing here has that name.
        """
        pointer, reference = self.pointer(schema), schema[keyword]
        base = self._bases.get(id(schema), "")
        address, _, fragment = urljoin(base, reference).partition("#") if not reference.startswith("#") else (
            base, "#", reference[1:])  # fmt: skip
        if (found := self._named.get(f"{address}#{fragment}")) is not None:
            return found
        resource = self._named.get(address + "#")
        if resource is None:
            raise Refused(
                pointer, keyword, f"refers to {shortened(reference)!r}, which is not in this schema; nothing is loaded from "
                "elsewhere: put it under '$defs'"
            )  # fmt: skip
        try:
            return self._at(resource, unquote(fragment, errors="strict"))
        except (KeyError, IndexError, ValueError):
            raise Refused(pointer, keyword, f"refers to {shortened(reference)!r}, which is not in this schema") from None

    def _at(self, resource: Schema, fragment: str) -> Schema:
        if fragment and not fragment.startswith("/"):
            raise KeyError(fragment)
        value: Any = resource
        pointer = self.pointer(resource)
        for part in fragment.split("/")[1:]:
            key = part.replace("~1", "/").replace("~0", "~")
            if isinstance(value, list):
                if not (key.isascii() and key.isdigit() and len(key) < 9):
                    raise KeyError(key)
                value = value[int(key)]
            elif isinstance(value, Mapping):
                value = value[key]
            else:
                raise KeyError(key)
            pointer = under(pointer, key)
        if not isinstance(value, Mapping | bool):
            raise KeyError(fragment)
        if isinstance(value, Mapping) and id(value) not in self._pointers:  # not under a keyword, such as `#/components/x`
            for inner, schema in self._walk(value, pointer, self._bases.get(id(resource), "")):
                _check_keywords(inner, schema, self._limits.max_enum)
        found: Schema = value
        return found

    def _measure(self) -> None:
        """Size and depth of the JSON, before anything recurses into it."""
        todo: list[tuple[Any, int]] = [(self.root, 1)]
        count = 0
        deepest = 4 * self._limits.max_depth  # a schema within a schema nests two or three levels of JSON
        while todo:
            value, depth = todo.pop()
            count += 1
            if depth > deepest:
                raise Refused("#", "", f"nests deeper than {deepest} levels of JSON")
            if count > _MAX_NODES:
                raise Refused("#", "", f"has more than {_MAX_NODES} values")
            if isinstance(value, Mapping):
                todo += [(part, depth + 1) for part in value.values()]
            elif isinstance(value, list | tuple):
                todo += [(part, depth + 1) for part in value]
        try:
            size = len(json.dumps(self.root, ensure_ascii=False, separators=(",", ":")).encode())
        except (ValueError, TypeError):
            raise Refused("#", "", "is not JSON") from None
        if size > self._limits.max_bytes:
            raise Refused("#", "", f"has {size} bytes; the most is {self._limits.max_bytes}")

    def _walk(self, root: Schema | None = None, pointer: str = "#", base: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
        """All schemas that stand at a keyword; notes their pointers and names."""
        start = self.root if root is None else root
        self._named.setdefault(base + "#", start)
        todo: list[tuple[str, Schema, str, int]] = [(pointer, start, base, 1)]
        while todo:
            pointer, schema, base, depth = todo.pop()
            if not isinstance(schema, Mapping) or id(schema) in self._pointers:
                continue
            if depth > self._limits.max_depth:
                raise Refused(pointer, "", f"is nested deeper than {self._limits.max_depth} schemas")
            if isinstance(name := schema.get("$id"), str):
                base = urljoin(base, name).partition("#")[0]
                self._named[base + "#"] = schema
            for keyword in ("$anchor", "$dynamicAnchor"):
                if isinstance(anchor := schema.get(keyword), str):
                    if keyword == "$dynamicAnchor" and anchor in self._dynamic:
                        raise Refused(pointer, keyword, "names two places, of which the one that counts is found at run time")
                    if keyword == "$dynamicAnchor":
                        self._dynamic.add(anchor)
                    self._named[f"{base}#{anchor}"] = schema
            self._pointers[id(schema)] = pointer
            self._bases[id(schema)] = base
            yield pointer, schema
            todo += [(inner, part, base, depth + 1) for inner, part in reversed(_within(pointer, schema))]


def _within(pointer: str, schema: Mapping[str, Any]) -> list[tuple[str, Schema]]:
    found: list[tuple[str, Schema]] = []
    for keyword, value in schema.items():
        if keyword in MAPS or keyword == "dependencies":
            if not isinstance(value, Mapping):
                raise Refused(pointer, keyword, "is not an object")
            found += [
                (under(pointer, keyword, name), part)
                for name, part in value.items()
                if not (keyword == "dependencies" and isinstance(part, list))
            ]
        elif keyword in LISTS or (keyword == "items" and isinstance(value, list)):
            if not isinstance(value, list):
                raise Refused(pointer, keyword, "is not a list of schemas")
            found += [(under(pointer, keyword, index), part) for index, part in enumerate(value)]
        elif keyword in ONES:
            found.append((under(pointer, keyword), value))
    for inner, part in found:
        if not isinstance(part, Mapping | bool):
            raise Refused(inner, "", "is neither an object nor a boolean")
    return found


def _check_keywords(pointer: str, schema: Mapping[str, Any], max_enum: int) -> None:
    for keyword, value in schema.items():
        wrong = _wrong(keyword, value, max_enum)
        if wrong:
            raise Refused(pointer, keyword, wrong)


def _wrong(keyword: str, value: Any, max_enum: int) -> str | None:
    """Why this value of a keyword is malformed."""
    match keyword:
        case "type":
            names = value if isinstance(value, list) else [value]
            if not all(isinstance(name, str) for name in names):
                return "is neither a type nor a list of types"
            unknown = [name for name in names if name not in _TYPES]
            return f"names the unknown type {shortened(unknown[0])!r}" if unknown else None
        case "enum":
            if not isinstance(value, list):
                return "is not a list"
            return f"has {len(value)} values; the most is {max_enum}" if len(value) > max_enum else None
        case "required":
            return None if _is_names(value) else "is not a list of names"
        case "dependentRequired":
            is_right = isinstance(value, Mapping) and all(map(_is_names, value.values()))
            return None if is_right else "is not an object of lists of names"
        case "dependencies":
            is_right = all(isinstance(part, Mapping | bool) or _is_names(part) for part in value.values())
            return None if is_right else "is not an object of schemas and lists of names"
        case "minimum" | "maximum" | "multipleOf":
            if not is_number(value):
                return "is not a number"
            return "is not above 0" if keyword == "multipleOf" and value <= 0 else None
        case "exclusiveMinimum" | "exclusiveMaximum":
            return None if is_number(value) or isinstance(value, bool) else "is not a number"
        case "uniqueItems":
            return None if isinstance(value, bool) else "is not a boolean"
        case "pattern" | "format" | "$ref" | "$dynamicRef" | "$anchor" | "$dynamicAnchor" | "$id":
            return None if isinstance(value, str) else "is not a string"
    if keyword in _COUNTS:
        if not is_number(value) or value != int(value) or value < 0:
            return "is not a count"
        if value > _MAX_NUMBER and keyword.startswith("min"):
            return f"is above {_MAX_NUMBER}"
    return None


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) != float("inf") and value == value
