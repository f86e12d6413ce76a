"""Objects of a branch, in the words that llguidance enforces exactly.

Properties come in the schema's order. An object that declares properties gets no others unless `additionalProperties` says so
expressly: models fill whatever is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import combinations, islice
from typing import Any, Final

from inferflux_core.models.structured.branch import Branch, Demand, Members, State, state
from inferflux_core.models.structured.expander import Expander
from inferflux_core.models.structured.pattern_language import Language, TooComplexError
from inferflux_core.models.structured.pattern_syntax import Tree, literal, parse, whole, write
from inferflux_core.models.structured.schema_document import Refused

Form = dict[str, Any]
Child = Callable[[State], Form | bool]  # the form of what is within; False if nothing can be there

_MAX_CHOICES: Final = 24  # of properties to have, where their number is bounded
_MAX_FRESH: Final = 64  # properties whose names are made up
_NAMES: Final = "(?:key|item|name)_[0-9]+"


def object_forms(branch: Branch, expander: Expander, child: Child) -> list[Form]:
    """Forms of the objects, any of which will do; [] if none is valid."""
    return _Objects(branch, expander, child).forms()


class _Objects:
    def __init__(self, branch: Branch, expander: Expander, child: Child) -> None:
        self._branch = branch
        self._expander = expander
        self._child = child
        self._patterns = expander.patterns
        self._is_generous = False  # open though the schema does not say so expressly: else nothing would be left
        self._is_closed_here = False
        self._trees: dict[str, Tree] = {}  # of the patterns of open properties, by what they are written as

    def forms(self) -> list[Form]:
        found = self._forms()
        if not found and self._is_closed_here:
            self._is_generous = True
            found = self._forms()
        return found

    def _forms(self) -> list[Form]:
        branch = self._branch
        names = list(dict.fromkeys([name for part in branch.members for name in part.named] + list(branch.required)))
        listed = self._listed_names()
        if listed is not None:
            names = [name for name in names if name in listed] + [name for name in listed if name not in names]
            if any(name not in listed for name in branch.required):
                return []
        required = list(branch.required)
        members = {name: self._child(self._expander.member(branch, name)) for name in names}
        if any(members[name] is False for name in required):
            return []
        optional = [name for name in names if name not in required and members[name] is not False]
        patterns, rest = self._open(names, listed)
        is_open = rest is not False or any(form is not False for form in patterns.values())
        missing = branch.min_properties - len(required) - len(optional)
        if missing > 0 and is_open:
            made = self._fresh(names, patterns, rest, missing - 1)  # one more comes from what is open
            members.update(made)
            patterns, rest = self._open(names, listed, made)
            required += [*optional, *made]
            optional = []
            missing = 1
        elif missing > 0:
            return []
        room = None if branch.max_properties is None else branch.max_properties - len(required)
        if room is not None and room < 0:
            return []
        if room is not None and optional and (is_open or room <= len(optional)):
            patterns, rest = dict.fromkeys(patterns, False), False
        forms = []
        for needed, allowed in self._choices(optional, max(0, branch.min_properties - len(required)), room):
            form: Form = {
                "type": "object",
                "properties": {
                    name: False if name in optional and name not in allowed else value for name, value in members.items()
                },
                "required": [name for name in members if name in required or name in needed],
                "additionalProperties": rest,
            }
            if patterns:
                form["patternProperties"] = patterns
            if missing == 1:
                form["minProperties"] = len(required) + 1
            if room is not None and not optional and (rest is not False or any(f is not False for f in patterns.values())):
                form["maxProperties"] = len(required) + room
            forms.append(form)
        return forms

    def _choices(self, optional: list[str], needed: int, room: int | None) -> Iterable[tuple[list[str], list[str]]]:
        """Which of the optional properties must, and which may be there."""
        if not optional or (needed <= 0 and (room is None or room >= len(optional))):
            return [([], optional)]
        if room is None or room >= len(optional):
            return [(list(some), optional) for some in islice(combinations(optional, needed), _MAX_CHOICES)]
        some = islice(combinations(optional, room), _MAX_CHOICES)
        return [(list(group[:needed]), list(group)) for group in some] if room else [([], [])]

    def _listed_names(self) -> list[str] | None:
        """All names there may be, where `propertyNames` lists them."""
        if not self._branch.names:
            return None
        values = self._expander.values(state(self._branch.names))
        if values is not None:
            return [name for name in values if isinstance(name, str)]
        found: list[str] = []
        branches, _ = self._expander.branches(state(self._branch.names))
        for each in branches:
            if "string" in each.types and each.values is None:
                return None
            found += [name for name in each.values or () if isinstance(name, str)]
        return list(dict.fromkeys(found))

    def _open(
        self, names: list[str], listed: list[str] | None, made: Iterable[str] = ()
    ) -> tuple[dict[str, Form | bool], Form | bool]:
        """What properties that are not declared may be: by pattern, and else.

        Args:
            listed: all names there may be, if they are known.
            made: names that are given besides those that are declared.
        """
        branch = self._branch
        if listed is not None:
            return {}, False
        rests = [part.rest for part in branch.members if part.rest is not None]
        patterns = [(pattern, demand, part) for part in branch.members for pattern, demand in part.patterns]
        unevaluated = [rule for rule in branch.unevaluated_properties if not self._rests_within(rule.scope)]
        anything = (not names and not patterns and not rests) or self._is_generous
        is_open = bool(rests) or anything or any(rule.demand.schema is not False for rule in unevaluated)
        rest = state((*rests, *(rule.demand for rule in unevaluated), *self._doubtful(patterns)))
        self._is_closed_here = not is_open and not unevaluated
        if not is_open:
            rest = (Demand(False),)
        trees = [(parse(pattern), self._matching(pattern, patterns)) for pattern, _, _ in patterns]
        if branch.names:
            keys = self._key_trees()
            trees = [(tree, demands) for own, demands in trees for tree in self._meet(own, keys)]
            # What is open to the rest must still have a name that is allowed, and must not be one of a pattern's.
            others = [Language(parse(pattern, wide=True)) for pattern, _, _ in patterns] if is_open else []
            trees += [(tree, rest) for key in keys if is_open for tree in self._without(key, others)]
            rest = (Demand(False),)
        trees = [(tree, demands) for own, demands in trees for tree in self._without_names(own, [*names, *made])]
        return self._apart(trees, rest)

    def _without_names(self, tree: Tree, names: list[str]) -> list[Tree]:
        """A pattern without the declared names, whose demands are their own."""
        try:
            language = Language(tree)
        except TooComplexError:
            return [] if names else [tree]
        return self._without(tree, [Language(whole(literal(name))) for name in names if language.matches(name)])

    def _apart(self, trees: list[tuple[Tree, State]], rest: State) -> tuple[dict[str, Form | bool], Form | bool]:
        """Patterns that have no name in common; what is left out of the others has to be what the rest is, too."""
        kept: list[tuple[Tree, Language | None, Form | bool]] = []
        for tree, demands in trees:
            if any(tree == other for other, _, _ in kept):
                continue
            language = self._language(tree)
            if not kept or self._is_apart(language, [other for _, other, _ in kept]):
                kept.append((tree, language, self._child(demands)))
            elif rest != (Demand(False),):
                rest = state((*rest, *demands))
        other = self._child(rest)
        # What nothing can be needs no pattern, unless it keeps names from being among the others.
        needed = [(write(tree), tree, form) for tree, _, form in kept if form is not False or other is not False]
        self._trees = {text: tree for text, tree, _ in needed}
        return {text: form for text, _, form in needed}, other

    def _language(self, tree: Tree) -> Language | None:
        """None if it is too large to be compared with others."""
        try:
            return Language(tree)
        except TooComplexError:
            return None

    def _is_apart(self, language: Language | None, others: list[Language | None]) -> bool:
        try:
            return language is not None and all(
                other is not None and self._patterns.common_text([language, other]) is None for other in others
            )
        except TooComplexError:
            return False

    def _matching(self, pattern: str, patterns: list[tuple[str, Demand, Members]]) -> State:
        """What a property must be whose name matches a pattern, and maybe others."""
        branch = self._branch
        found: list[Demand] = []
        own = set()
        for other, demand, part in patterns:
            if other == pattern or self._may_meet(pattern, other):
                found.append(demand)
            if other == pattern:
                own.add(id(part))
        found += [part.rest for part in branch.members if part.rest is not None and id(part) not in own]
        for rule in branch.unevaluated_properties:
            inside = any(id(part) in own and rule.scope in part.within for part in branch.members)
            if not inside and not self._rests_within(rule.scope):
                found.append(rule.demand)
        return state(found)

    def _may_meet(self, one: str, two: str) -> bool:
        try:
            return (
                self._patterns.common_text([self._patterns.language(one), self._patterns.language(two, wide=True)]) is not None
            )
        except TooComplexError:
            return True

    def _doubtful(self, patterns: list[tuple[str, Demand, Members]]) -> list[Demand]:
        """Demands of patterns that some dialects match where others don't: such a name is no pattern's here."""
        return [demand for pattern, demand, _ in patterns if parse(pattern) != parse(pattern, wide=True)]

    def _rests_within(self, scope: int) -> bool:
        return any(part.rest is not None and scope in part.within for part in self._branch.members)

    def _key_trees(self) -> list[Tree]:
        """Patterns of the names that `propertyNames` allows."""
        found: list[Tree] = []
        branches, _ = self._expander.branches(state(self._branch.names))
        for each in branches:
            if "string" not in each.types:
                continue
            if each.values is not None:
                found += [whole(literal(name)) for name in each.values if isinstance(name, str)]
                continue
            sure = [parse(pattern) for pattern, matches in each.patterns if matches]
            if each.min_length or each.max_length is not None:
                most = "" if each.max_length is None else str(min(each.max_length, 200))
                sure.append(parse(rf"^[\s\S]{{{min(each.min_length, 200)},{most}}}$"))
            never = [pattern for pattern, matches in each.patterns if not matches]
            never += ["^$"] if "" in each.excluded else []
            if len(sure) == 1 and not never and not each.excluded:
                found.append(sure[0])
                continue
            try:
                outside = [self._patterns.language(pattern, wide=True) for pattern in never]
                outside += [Language(whole(literal(word))) for word in each.excluded if isinstance(word, str)]
                tree = self._patterns.common_pattern([Language(tree) for tree in sure], outside)
            except TooComplexError:
                continue
            found += [] if tree is None else [whole(tree)]
        return found

    def _meet(self, tree: Tree, others: list[Tree]) -> list[Tree]:
        found = []
        for other in others:
            try:
                met = self._patterns.common_pattern([Language(tree), Language(other)], [])
            except TooComplexError:
                continue
            found += [] if met is None else [whole(met)]
        return found

    def _without(self, tree: Tree, others: list[Language]) -> list[Tree]:
        if not others:
            return [tree]
        try:
            met = self._patterns.common_pattern([Language(tree)], others)
        except TooComplexError:
            return []
        return [] if met is None else [whole(met)]

    def _fresh(
        self, names: list[str], patterns: dict[str, Form | bool], rest: Form | bool, count: int
    ) -> dict[str, Form | bool]:
        """Properties with names of our own making: repeated names would count once, so that some have to be given."""
        if count > _MAX_FRESH:
            raise Refused("#", "minProperties", f"asks for more than {_MAX_FRESH} properties whose names are not declared")
        taken = [Language(whole(literal(name))) for name in names]
        found: dict[str, Form | bool] = {}
        ways = [(self._trees[pattern], form) for pattern, form in patterns.items() if form is not False]
        if rest is not False:
            ways = [(parse(f"^{_NAMES}$"), rest), *ways]
        for tree, form in ways:
            others = [Language(self._trees[pattern]) for pattern in patterns] if form is rest else []
            while len(found) < count:
                try:
                    name = self._patterns.common_text([Language(tree)], [*taken, *others])
                except TooComplexError:
                    name = None
                if name is None:
                    break
                demand = self._child(self._expander.member(self._branch, name))
                if demand is False:
                    break
                found[name] = demand
                taken.append(Language(whole(literal(name))))
        if len(found) < count:
            raise Refused("#", "minProperties", "asks for more properties than names can be found for")
        return found
