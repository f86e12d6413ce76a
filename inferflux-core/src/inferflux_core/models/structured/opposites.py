"""What it takes to be invalid under a schema: to break one of its keywords."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from inferflux_core.models.structured.branch import Branch, Demand
from inferflux_core.models.structured.schema_document import LISTS, MAPS, ONES, Refused, SchemaDocument
from inferflux_core.models.structured.schema_values import dependencies, item_schemas

Alternative = tuple[Demand, ...]
Maker = Callable[..., Demand]

_TYPES: Final = ("null", "boolean", "number", "string", "array", "object")
# Keywords that matter to validity; all others are annotations, which nothing can break.
_KEYWORDS: Final = frozenset(
    (*LISTS, *ONES, *MAPS, "$ref", "$dynamicRef", "type", "enum", "const", "minimum", "maximum", "exclusiveMinimum",
     "exclusiveMaximum", "multipleOf", "minLength", "maxLength", "pattern", "format", "minItems", "maxItems", "uniqueItems",
     "minContains", "maxContains", "minProperties", "maxProperties", "required", "dependentRequired", "dependencies")
)  # fmt: skip
# Whose opposite cannot be told to the grammar.
_FIXED: Final = frozenset(
    ("uniqueItems", "unevaluatedItems", "unevaluatedProperties", "propertyNames", "patternProperties", "format", "multipleOf")
)  # fmt: skip
# Of whose opposite only a part can.
_PARTIAL: Final = frozenset({"items", "additionalItems", "additionalProperties", "maxContains"})


def opposites(schema: Mapping[str, Any], document: SchemaDocument, made: Maker, branch: Branch) -> list[Alternative]:
    """Ways to be invalid under this schema, any of which will do. There may be more that cannot be held.

    Args:
        made: makes a demand of keywords.
        branch: where the reasons are kept why some cannot be held.
    """
    pointer = document.pointer(schema)
    found: list[Alternative] = []
    for keyword in schema:
        can_break = schema[keyword] is not (keyword != "uniqueItems")
        if keyword in _FIXED | _PARTIAL and can_break:
            reason = "cannot be enforced where it must not hold (under 'not' or 'oneOf')"
            branch.lost.append(Refused(pointer, keyword, reason))
        if keyword in _KEYWORDS and keyword not in _FIXED:
            found += _in_place(schema, keyword, document) + _of_values(schema, keyword, made)
            found += _of_objects(schema, keyword, made) + _of_arrays(schema, keyword, made)
    return found


def _breaks(demand: Demand) -> Demand:
    """The opposite of a demand of one keyword, which `Branch` can hold as it is."""
    return Demand(demand.schema, holds=False, is_simple=True)


def _in_place(schema: Mapping[str, Any], keyword: str, document: SchemaDocument) -> list[Alternative]:
    match keyword:
        case "$ref" | "$dynamicRef":
            return [(Demand(document.target(schema, keyword), False),)]
        case "allOf":
            return [(Demand(part, False),) for part in schema[keyword]]
        case "anyOf":
            return [tuple(Demand(part, False) for part in schema[keyword])]
        case "oneOf":
            parts = schema[keyword]
            pairs = [(Demand(one), Demand(two)) for place, one in enumerate(parts) for two in parts[place + 1 :]]
            return [tuple(Demand(part, False) for part in parts), *pairs]
        case "not":
            return [(Demand(schema[keyword]),)]
        case "if":
            condition = schema["if"]
            return [
                (Demand(condition), Demand(schema.get("then", True), False)),
                (Demand(condition, False), Demand(schema.get("else", True), False)),
            ]
    return []


def _of_values(schema: Mapping[str, Any], keyword: str, made: Maker) -> list[Alternative]:
    value = schema[keyword]
    match keyword:
        case "type":
            names = value if isinstance(value, list) else [value]
            others = [name for name in _TYPES if name not in names and not (name == "number" and "integer" in names)]
            found: list[Alternative] = [(made(schema, type=others),)] if others else []
            if "integer" in names and "number" not in names:
                found.append((made(schema, type="number"), _breaks(made(schema, type="integer"))))
            return found
        case "const" | "enum":
            return [(_breaks(made(schema, enum=[value] if keyword == "const" else value)),)]
        case "minimum":
            bound = "maximum" if schema.get("exclusiveMinimum") is True else "exclusiveMaximum"
            return [(made(schema, **{"type": "number", bound: value}),)]
        case "maximum":
            bound = "minimum" if schema.get("exclusiveMaximum") is True else "exclusiveMinimum"
            return [(made(schema, **{"type": "number", bound: value}),)]
        case "exclusiveMinimum" | "exclusiveMaximum" if not isinstance(value, bool):
            return [(made(schema, **{"type": "number", "maximum" if keyword.endswith("Minimum") else "minimum": value}),)]
        case "minLength":
            return [(made(schema, type="string", maxLength=value - 1),)] if value > 0 else []
        case "maxLength":
            return [(made(schema, type="string", minLength=value + 1),)]
        case "pattern":
            return [(made(schema, type="string"), _breaks(made(schema, pattern=value)))]
    return []


def _of_objects(schema: Mapping[str, Any], keyword: str, made: Maker) -> list[Alternative]:
    value = schema[keyword]

    def one(name: str, demand: Demand) -> Alternative:
        wanted = demand.schema if demand.holds else made(schema, **{"not": demand.schema}).schema
        return (made(schema, type="object", required=[name], properties={name: wanted}),)

    match keyword:
        case "properties":
            return [one(name, Demand(part, False)) for name, part in value.items() if part is not True]
        case "additionalProperties" if value is not True:
            name = next(name for name in ("other", "additional", "x" * 64) if name not in schema.get("properties", ()))
            return [] if schema.get("patternProperties") else [one(name, Demand(value, False))]
        case "required":
            return [(made(schema, type="object", properties={name: False}),) for name in value]
        case "minProperties":
            return [(made(schema, type="object", maxProperties=value - 1),)] if value > 0 else []
        case "maxProperties":
            return [(made(schema, type="object", minProperties=value + 1),)]
        case "dependentRequired" | "dependentSchemas" | "dependencies":
            found: list[Alternative] = []
            for trigger, needed in dependencies({keyword: value}):
                has = made(schema, type="object", required=[trigger])
                if isinstance(needed, Mapping | bool):
                    found.append((has, Demand(needed, False)))
                else:
                    found += [(has, made(schema, properties={name: False})) for name in needed]
            return found
    return []


def _of_arrays(schema: Mapping[str, Any], keyword: str, made: Maker) -> list[Alternative]:
    value = schema[keyword]
    prefix, rest = item_schemas(schema)

    def one(place: int, part: Any) -> Alternative:
        items = [True] * place + [made(schema, **{"not": part}).schema]
        return (made(schema, type="array", prefixItems=items, minItems=place + 1),)

    match keyword:
        case "prefixItems":
            return [one(place, part) for place, part in enumerate(prefix) if part is not True]
        case "items":
            found = [one(place, part) for place, part in enumerate(prefix)] if isinstance(value, list) else []
            return found + ([one(len(prefix), rest)] if rest is not True else [])
        case "minItems":
            return [(made(schema, type="array", maxItems=value - 1),)] if value > 0 else []
        case "maxItems":
            return [(made(schema, type="array", minItems=value + 1),)]
        case "contains":
            least = schema.get("minContains", 1)
            found = [(made(schema, type="array", items=made(schema, **{"not": value}).schema),)] if least > 0 else []
            if "maxContains" in schema:
                most = int(schema["maxContains"]) + 1
                found.append((made(schema, type="array", prefixItems=[value] * most, minItems=most),))
            return found
    return []
