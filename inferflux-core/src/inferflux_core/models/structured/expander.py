"""Takes a schema apart: a demand becomes branches, each a conjunction without `anyOf`, `not`, `if` and the like.

A branch that only excludes what another keyword allows (the other side of an `if`, the rest of a `oneOf`) may be one that
cannot be held: it is left out then, which makes the answer's language smaller and never wrong. If no branch is left, the
reason is what the client is told.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any, Final

from inferflux_core.models.structured.branch import (
    Branch,
    Contains,
    Demand,
    Items,
    Key,
    Members,
    State,
    Unevaluated,
    key,
    lcm,
    state,
)
from inferflux_core.models.structured.opposites import opposites
from inferflux_core.models.structured.pattern_syntax import PatternError, parse
from inferflux_core.models.structured.schema_document import Refused, SchemaDocument
from inferflux_core.models.structured.schema_values import (
    PatternBook,
    Unsure,
    Validator,
    dependencies,
    exact,
    item_schemas,
    key_of,
)
from inferflux_core.models.structured.string_formats import format_pattern

_MAX_STEPS: Final = 30_000  # demands taken apart, of one schema
_LOOKS_PER_STEP: Final = 16  # required names looked up in members, which cost as much as a step without any
_MAX_SECONDS: Final = 3.0  # of CPU, for what the steps do not count; ordinary schemas take less than 3 ms
_MAX_BRANCHES: Final = 300  # of one place
_EMPTY_DEPTH: Final = 3  # levels of required properties looked into to prove that nothing satisfies two demands

_UNHEARD: Final = -1  # among schemas above: what is within a negation makes nothing count as evaluated

Alternative = tuple[Demand, ...]


class Expander:
    """Branches of the demands within one schema.

    Attributes:
        patterns: automata of the schema's patterns.
    """

    def __init__(self, document: SchemaDocument) -> None:
        self._document = document
        self.patterns = PatternBook()
        self._validator = Validator(document, self.patterns)
        self._made: dict[tuple[int, str], Demand] = {}
        self._proving: set[Key] = set()  # states that `is_empty` is looking into
        self._doubts = 0  # how often something could not be told; what was left out then does not prove anything
        self._doubted: set[Key] = set()  # states whose values were
        self._steps = 0
        self._began = time.thread_time()
        self._branches: dict[Key, tuple[list[Branch], list[Refused]]] = {}
        self._values: dict[Key, list[Any] | None] = {}
        self._states: list[State] = []  # keeps the schemas alive that keys tell by identity

    def made(self, origin: Any, **keywords: Any) -> Demand:
        """A demand that stands in no schema, made for one that does. The same for the same: states are told by identity, and
        would never come to an end."""
        name = id(origin), self._print(keywords)
        if name not in self._made:
            self._made[name] = Demand(self._document.adopt(keywords, origin))
        return self._made[name]

    def _print(self, value: Any) -> str:
        """Equal for equal keywords whose schemas are the same."""
        if self._document.is_known(value):
            return f"<{id(value)}>"
        if isinstance(value, Mapping):
            return "{" + ",".join(f"{name!r}:{self._print(part)}" for name, part in value.items()) + "}"
        if isinstance(value, list | tuple):
            return "[" + ",".join(map(self._print, value)) + "]"
        return repr(value)

    def values(self, of: State) -> list[Any] | None:
        """All values that meet the demands, if an `enum` or `const` lists them; else None."""
        name = key(of)
        if name not in self._values:
            self._states.append(of)
            doubts = self._doubts
            self._values[name] = self._list_values(of)
            if self._doubts > doubts:
                self._doubted.add(name)
        return self._values[name]

    def is_valid(self, value: Any, of: Iterable[Demand]) -> bool:
        """Whether it is certain that this value meets the demands."""
        try:
            return all(self._validator.holds(value, demand.schema) is demand.holds for demand in of)
        except Unsure:
            self._doubts += 1
            return False

    def branches(self, of: State) -> tuple[list[Branch], list[Refused]]:
        """All branches, and why there are not more.

        Raises:
            Refused: it cannot be held at all, or is too large.
        """
        name = key(of)
        if name not in self._branches:
            self._states.append(of)
            lost: list[Refused] = []
            found: list[Branch] = []
            doubts = self._doubts
            self._split(of, Branch(lost=lost), [(demand, frozenset()) for demand in of], [], found)
            if self._doubts > doubts:
                lost.append(Refused(self._document.pointer(of[0].schema), "", "has conditions that cannot be told beforehand"))
            self._branches[name] = found, lost
        return self._branches[name]

    def is_empty(self, of: State, depth: int = _EMPTY_DEPTH) -> bool:
        """Whether it is certain that no value meets the demands."""
        name = key(of)
        if (values := self.values(of)) is not None:
            return not values and name not in self._doubted
        if name in self._proving:
            return False
        self._proving.add(name)
        try:
            found, lost = self.branches(of)
        except Refused:
            return False
        finally:
            self._proving.discard(name)
        return not lost and all(self._is_dead(branch, depth) for branch in found)

    def _is_dead(self, branch: Branch, depth: int) -> bool:
        if branch.types != {"object"} or not depth or branch.unevaluated_properties:
            return False
        doubts = self._doubts
        is_dead = any(self.is_empty(self.member(branch, name), depth - 1) for name in branch.required)
        return is_dead and self._doubts == doubts

    def member(self, branch: Branch, name: str) -> State:
        """What a property of this name must be."""
        found: list[Demand] = []
        for part in branch.members:
            matched = name in part.named
            if matched:
                found.append(part.named[name])
            for pattern, demand in part.patterns:
                matches = self.patterns.matches(pattern, name)
                self._doubts += matches is None
                if matches is not False:
                    found.append(demand)
                matched = matched or matches is True
            if not matched and part.rest is not None:
                found.append(part.rest)
        for rule in branch.unevaluated_properties:
            if not any(rule.scope in part.within and self._evaluates(part, name) for part in branch.members):
                found.append(rule.demand)
        if not self.is_valid(name, branch.names):
            found.append(Demand(False))
        return state(found)

    def _evaluates(self, part: Members, name: str) -> bool:
        if part.rest is not None or name in part.named:
            return True
        return any(self.patterns.matches(pattern, name) for pattern, _ in part.patterns)

    def _list_values(self, of: State) -> list[Any] | None:
        lists = [found for demand in of if (found := self._listed(demand)) is not None]
        if not lists:
            return None
        shortest = min(lists, key=len)
        unique = {key_of(value): value for value in shortest}
        self._count(len(unique) * len(of))
        return [value for value in unique.values() if self.is_valid(value, of)]

    def _listed(self, demand: Demand) -> list[Any] | None:
        schema, hops = demand.schema, 0
        while demand.holds and isinstance(schema, Mapping):
            if "const" in schema:
                return [schema["const"]]
            if "enum" in schema:
                return list(schema["enum"])
            if "$ref" not in schema or hops > 20:
                break
            schema, hops = self._document.target(schema, "$ref"), hops + 1
        return None

    def _count(self, steps: int = 1) -> None:
        self._steps += steps
        if self._steps > _MAX_STEPS or time.thread_time() - self._began > _MAX_SECONDS:
            raise Refused("#", "", "has too many combinations of its alternatives")

    def _split(
        self,
        of: State,
        branch: Branch,
        todo: list[tuple[Demand, frozenset[int]]],
        choices: list[tuple[list[Alternative], frozenset[int]]],
        found: list[Branch],
    ) -> None:
        todo, choices = list(todo), list(choices)
        while todo:
            self._count()
            demand, above = todo.pop(0)
            try:
                if not self._apply(branch, demand, above, todo, choices):
                    return
            except Refused as refusal:
                if demand.holds:
                    raise
                branch.lost.append(refusal)
                return
            if branch.values is not None:
                # What is valid under all that was asked at this place may be written, whichever branch it came from.
                self._count(len(branch.values) * len(of))
                branch.values = tuple(value for value in branch.values if self.is_valid(value, of))
                found += [branch] if branch.values else []
                return
        if "object" in branch.types and any(self.values(self.member(branch, name)) == [] for name in branch.required):
            branch.types -= {"object"}
        self._count(len(branch.members) * len(branch.required) // _LOOKS_PER_STEP)
        if not branch.prune():
            return
        if not choices:
            if len(found) >= _MAX_BRANCHES:
                raise Refused("#", "", f"has more than {_MAX_BRANCHES} combinations of its alternatives at one place")
            found.append(branch)
            return
        choices.sort(key=lambda choice: len(choice[0]))
        (alternatives, above), *rest = choices
        for alternative in {key(state(alternative)): alternative for alternative in alternatives}.values():
            self._split(of, branch.copy(), [(demand, above) for demand in alternative], rest, found)

    def _apply(
        self,
        branch: Branch,
        demand: Demand,
        above: frozenset[int],
        todo: list[tuple[Demand, frozenset[int]]],
        choices: list[tuple[list[Alternative], frozenset[int]]],
    ) -> bool:
        """Take one demand into a branch; what it asks besides goes to `todo` and `choices`. False if nothing is left."""
        schema = demand.schema
        if isinstance(schema, bool):
            return schema is demand.holds
        if id(schema) in above:
            raise Refused(self._document.pointer(schema), "$ref", "refers to itself without anything in between")
        if demand.key in branch.seen:
            return True
        branch.seen |= {demand.key}
        within = above | {id(schema)}
        self._count(len(branch.members) * len(branch.required) // _LOOKS_PER_STEP)
        if demand.is_simple:
            self._exclude(branch, schema)
            return branch.prune()
        if not demand.holds:
            choices.append((opposites(schema, self._document, self.made, branch), within | {_UNHEARD}))
            return True
        if "const" in schema or "enum" in schema:
            self._list(branch, [schema["const"]] if "const" in schema else schema["enum"])
        self._typed(branch, schema, frozenset() if _UNHEARD in within else within)
        for other in self._conjuncts(schema):
            todo.append((other, within))
        for alternatives in self._choices(branch, schema):
            choices.append((alternatives, within))
        return branch.prune()

    def _exclude(self, branch: Branch, schema: Mapping[str, Any]) -> None:
        if "pattern" in schema:
            branch.patterns += ((schema["pattern"], False),)
        elif "enum" in schema:
            branch.excluded += tuple(schema["enum"])
        else:
            branch.fraction = True

    def _list(self, branch: Branch, values: list[Any]) -> None:
        if branch.values is None:
            branch.values = tuple({key_of(value): value for value in values}.values())
        else:
            also = set(map(key_of, values))
            branch.values = tuple(value for value in branch.values if key_of(value) in also)

    def _conjuncts(self, schema: Mapping[str, Any]) -> list[Demand]:
        found = [
            Demand(self._document.target(schema, keyword)) for keyword in ("$ref", "$dynamicRef") if keyword in schema
        ]  # fmt: skip
        found += [Demand(part) for part in schema.get("allOf", ())]
        if "not" in schema:
            found.append(Demand(schema["not"], False))
        return found

    def _choices(self, branch: Branch, schema: Mapping[str, Any]) -> list[list[Alternative]]:
        found: list[list[Alternative]] = []
        if "anyOf" in schema:
            found.append([(Demand(part),) for part in schema["anyOf"]])
        if "oneOf" in schema:
            found.append(self._exactly_one(schema["oneOf"]))
        if "if" in schema and ("then" in schema or "else" in schema):
            condition = schema["if"]
            found.append(
                [
                    (Demand(condition), Demand(schema.get("then", True))),
                    (Demand(condition, False), Demand(schema.get("else", True))),
                ]
            )
        for trigger, needed in dependencies(schema):
            wanted = Demand(needed) if isinstance(needed, Mapping | bool) else self.made(schema, required=needed)
            absent = self.made(schema, properties={trigger: False})
            if trigger in branch.required and branch.types == {"object"}:
                found.append([(wanted,)])
            else:
                found.append([(self.made(schema, type="object", required=[trigger]), wanted), (absent,)])
        return found

    def _exactly_one(self, parts: list[Any]) -> list[Alternative]:
        demands = [Demand(part) for part in parts]
        disjoint = {
            (first, second): self.is_empty(state((demands[first], demands[second])))
            for first in range(len(demands))
            for second in range(first)
        }
        return [
            (
                demand,
                *(
                    Demand(other.schema, False)
                    for place, other in enumerate(demands)
                    if place != index and not disjoint[max(place, index), min(place, index)]
                ),
            )
            for index, demand in enumerate(demands)
        ]

    def _typed(self, branch: Branch, schema: Mapping[str, Any], within: frozenset[int]) -> None:
        if "type" in schema:
            names = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
            if "integer" in names and "number" not in names:
                branch.integer = True
            branch.only(*("number" if name == "integer" else name for name in names))
        self._numbers(branch, schema)
        self._strings(branch, schema)
        self._arrays(branch, schema, within)
        self._objects(branch, schema, within)

    def _numbers(self, branch: Branch, schema: Mapping[str, Any]) -> None:
        for plain, strict, narrow in (
            ("minimum", "exclusiveMinimum", branch.at_least),
            ("maximum", "exclusiveMaximum", branch.at_most),
        ):
            edge = schema.get(strict)
            if plain in schema:
                narrow(exact(schema[plain]), strict=edge is True)
            if edge is not None and not isinstance(edge, bool):
                narrow(exact(edge), strict=True)
        if "multipleOf" in schema:
            branch.multiple = lcm(branch.multiple, exact(schema["multipleOf"]))

    def _strings(self, branch: Branch, schema: Mapping[str, Any]) -> None:
        if "minLength" in schema:
            branch.limit("min_length", None, int(schema["minLength"]))
        if "maxLength" in schema:
            branch.limit(None, "max_length", int(schema["maxLength"]))
        for keyword, pattern in (("pattern", schema.get("pattern")), ("format", format_pattern(schema.get("format")))):
            if pattern is None:
                continue
            try:
                parse(pattern)
            except PatternError as error:
                raise Refused(self._document.pointer(schema), keyword, str(error)) from None
            branch.patterns += ((pattern, True),)

    def _arrays(self, branch: Branch, schema: Mapping[str, Any], within: frozenset[int]) -> None:
        if "minItems" in schema:
            branch.limit("min_items", None, int(schema["minItems"]))
        if "maxItems" in schema:
            branch.limit(None, "max_items", int(schema["maxItems"]))
        if schema.get("uniqueItems"):
            branch.unique = self._document.pointer(schema)
        prefix, rest = item_schemas(schema)
        if prefix or "items" in schema:
            has_rest = ("additionalItems" if isinstance(schema.get("items"), list) else "items") in schema
            demands = tuple(Demand(part) for part in prefix)
            branch.items += (Items(demands, Demand(rest) if has_rest else None, within),)
        if "contains" in schema:
            most = schema.get("maxContains")
            least = int(schema.get("minContains", 1))
            contains = Contains(Demand(schema["contains"]), least, None if most is None else int(most), within)
            branch.contains += (contains,)
        if "unevaluatedItems" in schema:
            rule = Unevaluated(Demand(schema["unevaluatedItems"]), id(schema), self._document.pointer(schema))
            branch.unevaluated_items += (rule,)

    def _objects(self, branch: Branch, schema: Mapping[str, Any], within: frozenset[int]) -> None:
        if "minProperties" in schema:
            branch.limit("min_properties", None, int(schema["minProperties"]))
        if "maxProperties" in schema:
            branch.limit(None, "max_properties", int(schema["maxProperties"]))
        branch.require(schema.get("required", ()))
        named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        for pattern in patterns:
            try:
                parse(pattern)
            except PatternError as error:
                raise Refused(self._document.pointer(schema), "patternProperties", str(error)) from None
        if named or patterns or "additionalProperties" in schema:
            rest = Demand(schema["additionalProperties"]) if "additionalProperties" in schema else None
            branch.members += (
                Members(
                    {name: Demand(part) for name, part in named.items()},
                    tuple((pattern, Demand(part)) for pattern, part in patterns.items()),
                    rest,
                    within,
                ),
            )
        if "propertyNames" in schema:
            branch.names += (Demand(schema["propertyNames"]),)
        if "unevaluatedProperties" in schema:
            rule = Unevaluated(Demand(schema["unevaluatedProperties"]), id(schema), self._document.pointer(schema))
            branch.unevaluated_properties += (rule,)
