"""One way to be valid: a conjunction of simple demands, as `Expander` finds them in a schema."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Final

from inferflux_core.models.structured.schema_document import Refused, Schema

TYPES: Final = ("null", "boolean", "number", "string", "array", "object")


@dataclass(frozen=True, slots=True)
class Demand:
    """That a value is valid under a schema, or that it is not.

    Attributes:
        is_simple: it must not be valid, and the schema is one keyword that a branch can hold the opposite of.
    """

    schema: Schema
    holds: bool = True
    is_simple: bool = False

    @property
    def key(self) -> tuple[int | str, bool]:
        return (str(self.schema) if isinstance(self.schema, bool) else id(self.schema)), self.holds

    @property
    def is_trivial(self) -> bool:
        """Every value meets it."""
        return self.schema is self.holds or (isinstance(self.schema, Mapping) and not self.schema and self.holds)


State = tuple[Demand, ...]
Key = frozenset[tuple[int | str, bool]]


def state(demands: Iterable[Demand]) -> State:
    """All of these at once."""
    return tuple({demand.key: demand for demand in demands if not demand.is_trivial}.values())


def key(of: State) -> Key:
    return frozenset(demand.key for demand in of)


@dataclass(frozen=True, slots=True)
class Items:
    """What items must be: the first by place, then the rest."""

    prefix: tuple[Demand, ...]
    rest: Demand | None
    within: frozenset[int]  # schemas (by identity) for whose `unevaluatedItems` these count as evaluated


@dataclass(frozen=True, slots=True)
class Members:
    """What properties must be: by name, by pattern, else the rest (None: anything)."""

    named: Mapping[str, Demand]
    patterns: tuple[tuple[str, Demand], ...] = ()
    rest: Demand | None = None
    within: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Contains:
    """How many items must meet a demand, which then count as evaluated for the schemas in `within`."""

    demand: Demand
    least: int
    most: int | None
    within: frozenset[int]


@dataclass(frozen=True, slots=True)
class Unevaluated:
    demand: Demand
    scope: int  # identity of the schema that has the keyword
    pointer: str


@dataclass(slots=True)
class Branch:
    """A conjunction, whose parts for one type say nothing about the others. All but `lost` is replaced and never changed in
    place, so that a copy is shallow."""

    types: frozenset[str] = frozenset(TYPES)
    integer: bool = False
    fraction: bool = False  # a number that is no integer
    values: tuple[Any, ...] | None = None  # nothing but these, which then are valid
    excluded: tuple[Any, ...] = ()  # values
    low: Fraction | None = None
    low_strict: bool = False
    high: Fraction | None = None
    high_strict: bool = False
    multiple: Fraction | None = None
    min_length: int = 0
    max_length: int | None = None
    patterns: tuple[tuple[str, bool], ...] = ()  # and whether it must match
    min_items: int = 0
    max_items: int | None = None
    items: tuple[Items, ...] = ()
    unique: str | None = None  # pointer of the schema that demands it
    contains: tuple[Contains, ...] = ()
    unevaluated_items: tuple[Unevaluated, ...] = ()
    members: tuple[Members, ...] = ()
    required: tuple[str, ...] = ()
    min_properties: int = 0
    max_properties: int | None = None
    names: tuple[Demand, ...] = ()
    unevaluated_properties: tuple[Unevaluated, ...] = ()
    seen: frozenset[tuple[int | str, bool]] = frozenset()
    lost: list[Refused] = field(default_factory=list)  # shared by all branches of a state: why some could not be held

    def copy(self) -> Branch:
        return replace(self)

    def only(self, *types: str) -> None:
        self.types = self.types.intersection(types)

    def at_least(self, bound: Fraction, *, strict: bool = False) -> None:
        if self.low is None or bound > self.low or (bound == self.low and strict):
            self.low, self.low_strict = bound, strict

    def at_most(self, bound: Fraction, *, strict: bool = False) -> None:
        if self.high is None or bound < self.high or (bound == self.high and strict):
            self.high, self.high_strict = bound, strict

    def limit(self, least: str | None, most: str | None, value: int) -> None:
        """Narrow a pair of counts such as `min_items` and `max_items`."""
        if least is not None:
            setattr(self, least, max(getattr(self, least), value))
        if most is not None:
            now = getattr(self, most)
            setattr(self, most, value if now is None else min(now, value))

    def require(self, names: Iterable[str]) -> None:
        self.required = tuple(dict.fromkeys((*self.required, *names)))

    def prune(self) -> bool:
        """Take away types of which no value is left; False if none is left."""
        if self.max_length is not None and self.max_length < self.min_length:
            self.types -= {"string"}
        if self.max_items is not None and self.max_items < self.min_items:
            self.types -= {"array"}
        if self.max_properties is not None and self.max_properties < max(self.min_properties, len(self.required)):
            self.types -= {"object"}
        low, high = self.low, self.high
        is_strict = self.low_strict or self.high_strict
        if low is not None and high is not None and (low > high or (low == high and is_strict)):
            self.types -= {"number"}
        if any(part.named.get(name) == Demand(False) for part in self.members for name in self.required):
            self.types -= {"object"}
        return bool(self.types)


def lcm(left: Fraction | None, right: Fraction) -> Fraction:
    """The smallest number that both divide."""
    if left is None:
        return right
    product = left * right
    a, b = left, right
    while b:
        a, b = b, a % b
    return abs(product / a)
