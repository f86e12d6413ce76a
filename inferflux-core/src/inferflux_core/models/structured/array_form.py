"""Arrays of a branch, in the words that llguidance enforces exactly.

A grammar cannot compare items. Where they have to differ, each place gets items of another kind: of a list of values in every
order if they are few, of classes such as first letters or ranges of numbers if they are many. Where an array has to contain
something, that comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise, permutations
from typing import Any, Final

from inferflux_core.models.structured.branch import Branch, Contains, Demand, State, state
from inferflux_core.models.structured.expander import Expander
from inferflux_core.models.structured.schema_document import Refused

Form = dict[str, Any]
Child = Callable[[State], Form | bool]  # the form of what is within; False if nothing can be there

_MAX_ORDERED: Final = 4  # different items that are offered in every order
_MAX_UNIQUE: Final = 16  # items that differ, where not every order is offered
_MAX_PLACES: Final = 200  # items that are told apart by place
_LETTERS: Final = ("^[a-fA-F]", "^[g-mG-M]", "^[n-sN-S]", "^[t-zT-Z]")
_DIGITS: Final = ("^[01]", "^[23]", "^[45]", "^[6-9]")


def array_forms(branch: Branch, expander: Expander, child: Child) -> list[Form]:
    """Forms of the arrays, any of which will do; [] if none is valid."""
    return _Arrays(branch, expander, child).forms()


class _Arrays:
    def __init__(self, branch: Branch, expander: Expander, child: Child) -> None:
        self._branch = branch
        self._expander = expander
        self._child = child
        self._least, self._most = branch.min_items, branch.max_items
        self._at: dict[int, list[Demand]] = {}  # demands of single places besides those of the branch
        self._rest: list[Demand] = []
        self._evaluated: dict[int, frozenset[int]] = {}  # place -> schemas for which `contains` makes it count as evaluated

    def forms(self) -> list[Form]:
        if not self._place_contained():
            return []
        if self._branch.unique is not None and (self._most is None or self._most > 1):
            return self._different()
        return self._form([])

    def _item(self, place: int, within: frozenset[int] = frozenset()) -> State:
        """What the item at this place must be.

        Args:
            within: schemas for whose `unevaluatedItems` it counts as evaluated.
        """
        branch = self._branch
        found: list[Any] = []
        for part in branch.items:
            if place < len(part.prefix):
                found.append(part.prefix[place])
            elif part.rest is not None:
                found.append(part.rest)
        within |= self._evaluated.get(place, frozenset())
        for rule in branch.unevaluated_items:
            if rule.scope in within:
                continue
            inside = [part for part in branch.items if rule.scope in part.within]
            if not any(part.rest is not None or place < len(part.prefix) for part in inside):
                found.append(rule.demand)
        return state((*found, *self._at.get(place, self._rest)))

    @property
    def _places(self) -> int:
        """Places that are told apart; all later ones are alike."""
        return max([0, *(len(part.prefix) for part in self._branch.items), *(place + 1 for place in self._at)])

    def _place_contained(self) -> bool:
        """Give what the array has to contain its places; False if there is none for it."""
        for rule in self._branch.contains:
            if rule.most is not None and rule.most < rule.least:
                return False
            inverse = Demand(rule.demand.schema, not rule.demand.holds)
            places = self._find_places(rule)
            if places is None:
                return False
            self._least = max(self._least, max(places, default=-1) + 1)
            if rule.most is not None:
                may = set(places)
                for place in range(min(self._places + rule.most, _MAX_PLACES)):
                    if len(may) < rule.most:
                        may.add(place)
                for place in range(max(may, default=-1) + 1):
                    self._at.setdefault(place, list(self._rest))
                    if place not in may:
                        self._at[place].append(inverse)
                self._rest.append(inverse)
            for place in places:
                self._at.setdefault(place, list(self._rest)).append(rule.demand)
                self._evaluated[place] = self._evaluated.get(place, frozenset()) | rule.within
        return True

    def _find_places(self, rule: Contains) -> list[int] | None:
        count = rule.least
        if count > _MAX_PLACES:
            raise Refused("#", "minContains", f"asks for more than {_MAX_PLACES} items")
        found: list[Any] = []
        last = _MAX_PLACES + self._places if self._most is None else min(self._most, _MAX_PLACES + self._places)
        for place in range(last):
            if len(found) == count:
                break
            if self._child(state((*self._item(place, rule.within), rule.demand))) is not False:
                found.append(place)
            elif place >= self._places:
                break
        return found if len(found) == count else None

    def _form(self, extra: list[Demand], *, exact: bool = False) -> list[Form]:
        """One form, with demands for the first places."""
        prefix: list[Form | bool] = []
        most = len(extra) if exact else self._most
        for place in range(max(self._places, len(extra)) if not exact else len(extra)):
            if most is not None and place >= most:
                break
            item = self._child(state((*self._item(place), *extra[place : place + 1])))
            if item is False:
                most = place
                break
            prefix.append(item)
        rest: Form | bool = False
        if most is None or most > len(prefix):
            rest = self._child(self._item(len(prefix)))
            if rest is False:
                most = len(prefix)
        if most is not None and most < self._least:
            return []
        form: Form = {"type": "array", "items": rest}
        if prefix:
            form["prefixItems"] = prefix
        if self._least:
            form["minItems"] = self._least
        if most is not None:
            form["maxItems"] = most
        return [form]

    def _different(self) -> list[Form]:
        most = _MAX_UNIQUE if self._most is None else min(self._most, max(_MAX_UNIQUE, self._least))
        if self._least > _MAX_PLACES:
            raise Refused(self._branch.unique or "#", "uniqueItems", f"asks for more than {_MAX_PLACES} items that differ")
        forms: list[Form] = []
        if self._least <= 1:
            self._most, kept = 1, self._most
            forms += self._form([])
            self._most = kept
        values = None if self._places else self._expander.values(self._item(0))
        ways = self._ways_of_values(values, most) if values is not None else self._ways_of_classes(most)
        made = [form for way in ways for form in self._form(way, exact=True)]
        if not made and not forms and self._branch.unique is not None:
            raise Refused(self._branch.unique, "uniqueItems", "asks for more items than can be made sure to differ")
        return forms + made

    def _ways_of_values(self, values: list[Any], most: int) -> Iterator[list[Demand]]:
        if len(values) <= _MAX_ORDERED:
            one = [self._expander.made(True, const=value) for value in values]
            yield from (list(way) for way in permutations(one, min(most, len(values))))
            return
        for length in range(max(2, self._least), min(most, len(values)) + 1):
            size, more = divmod(len(values), length)
            cuts = [0]
            for place in range(length):
                cuts.append(cuts[-1] + size + (place < more))
            yield [self._expander.made(True, enum=values[low:high]) for low, high in pairwise(cuts)]

    def _ways_of_classes(self, most: int) -> Iterator[list[Demand]]:
        classes = self._classes(self._item(self._places))
        length = min(most, len(classes))
        if length >= max(2, self._least):
            yield from map(list, permutations(classes, length) if len(classes) <= _MAX_ORDERED else [classes[:length]])

    def _classes(self, of: State, depth: int = 2) -> list[Demand]:
        """Demands that no two items meet at once."""
        branches, _ = self._expander.branches(of)
        types = [each for each in ("string", "number", "boolean", "null", "object") if any(each in b.types for b in branches)]
        made = self._expander.made
        found: list[Demand] = []
        if "string" in types:
            for group in (_LETTERS, _DIGITS):
                kept = [demand for part in group if self._fits(of, demand := made(True, type="string", pattern=part))]
                found += kept if len(found) < 2 else []
        if "number" in types and (len(types) == 1 or len(found) < 4):
            found += [demand for demand in self._ranges(branches) if self._fits(of, demand)]
        if "boolean" in types:
            found += [made(True, const=True), made(True, const=False)]
        if "null" in types:
            found.append(made(True, type="null"))
        if types == ["object"] and depth:
            found = self._by_property(of, depth)
        return found

    def _ranges(self, branches: list[Branch]) -> list[Demand]:
        lows = [branch.low for branch in branches if "number" in branch.types]
        highs = [branch.high for branch in branches if "number" in branch.types]
        low = -1 if None in lows or not lows else int(min(bound for bound in lows if bound is not None))
        high = None if None in highs or not highs else int(max(bound for bound in highs if bound is not None))
        need = max(4, self._least)
        step = max(1, ((high - low) // need) if high is not None else 0)
        if high is None:
            cuts = [low, *(max(low, 0) + 10**power for power in range(1, need))] if need <= 15 else []
        else:
            cuts = [low + step * place for place in range(need)]
        made = self._expander.made
        found = [made(True, type="number", minimum=first, exclusiveMaximum=last) for first, last in pairwise(cuts)]
        if cuts:
            found.append(made(True, type="number", minimum=cuts[-1]))
        return found

    def _by_property(self, of: State, depth: int) -> list[Demand]:
        branches, _ = self._expander.branches(of)
        names = (
            [name for name in branches[0].required if all(name in branch.required for branch in branches)] if branches else []
        )
        for name in names:
            member = self._expander.member(branches[0], name)
            values = self._expander.values(member)
            parts = (
                [self._expander.made(True, const=value) for value in values[: max(4, self._least)]]
                if values is not None
                else self._classes(member, depth - 1)
            )
            if len(parts) >= max(2, self._least):
                return [
                    self._expander.made(True, type="object", properties={name: part.schema}, required=[name]) for part in parts
                ]
        return []

    def _fits(self, of: State, demand: Demand) -> bool:
        """Whether an item can be of a class, as far as is known without its parts."""
        both = state((*of, demand))
        if self._expander.is_empty(both):
            return False
        return self._child(both) is not False
