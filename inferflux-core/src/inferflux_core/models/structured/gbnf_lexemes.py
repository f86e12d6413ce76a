"""Chooses what of a character grammar becomes a lexeme of llguidance, and writes it as Lark."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from inferflux_core.models.structured.pattern_language import TooComplexError, continuations, meet
from inferflux_core.models.structured.pattern_syntax import Chars, Either, Ranges, Repeat, Rule, Sequence, Tree, union, write

_MAX_INLINED: Final = 4000  # nodes of one lexeme


class Lexemes:
    """A grammar of characters.

    Args:
        rules: name -> tree; complete, and with a rule `root`.
    """

    def __init__(self, rules: Mapping[str, Tree]) -> None:
        self._rules = rules
        self._plain: dict[str, tuple[Tree, int] | None] = {}  # rule -> its tree without rules and its size; None: it recurs
        self._find_plain()
        self._empty: set[str] = set()  # rules that match no character
        self._first: dict[str, Ranges] = dict.fromkeys(rules, ())
        self._follow: dict[str, Ranges] = dict.fromkeys(rules, ())
        self._find_first()
        self._find_follow()
        self._terminals: dict[str, str] = {}  # regular expression -> name
        self._names: dict[str, str] = {}
        self._bodies: list[str] = []

    def lark(self) -> str:
        whole_grammar = self._plain["root"]
        if whole_grammar is not None:
            text = write(whole_grammar[0])
            return f"start: /{text}/\n" if text else 'start: ""\n'
        todo = ["root"]
        self._names["root"] = "start"
        while todo:
            name = todo.pop()
            known = len(self._names)
            self._bodies.append(f"{self._names[name]}: {self._lark(self._rules[name], self._follow[name])}")
            todo += list(self._names)[known:]
        self._bodies += [f"{name}: /{text}/{and_more}" for (text, and_more), name in self._named_terminals()]
        return "\n".join(self._bodies) + "\n"

    def _named_terminals(self) -> list[tuple[tuple[str, str], str]]:
        found = []
        for text, name in self._terminals.items():
            is_optional = text.startswith("?")
            found.append(((text[1:], " & /(?s:.+)/" if is_optional else ""), name))
        return found

    def _lark(self, tree: Tree, follow: Ranges) -> str:
        """The tree in Lark, given the characters that may come after it."""
        plain = self._inlined(tree)
        if plain is not None and self._ends_clearly(plain[0], follow):
            text = write(plain[0])
            if not text:
                return '""'
            is_empty = self._is_empty(tree)
            name = self._terminals.setdefault(("?" if is_empty else "!") + text, f"T{len(self._terminals)}")
            return f"({name})?" if is_empty else name
        match tree:
            case Rule(name):
                return self._names.setdefault(name, f"r{len(self._names)}")
            case Sequence(parts):
                found = []
                for part in reversed(parts):
                    found.append(self._lark(part, follow))
                    follow = union(self._first_of(part), follow if self._is_empty(part) else ())
                return " ".join(reversed(found)) or '""'
            case Either(parts):
                return "(" + " | ".join(self._lark(part, follow) for part in parts) + ")"
            case Repeat(part, least, most):
                inner = self._lark(part, union(self._first_of(part), follow))
                bounds = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((least, most))
                return f"({inner}){bounds or f'{{{least},{chr(32) if most is None else most}}}'.replace(chr(32), '')}"
        raise TypeError(type(tree).__name__)

    def _ends_clearly(self, tree: Tree, follow: Ranges) -> bool:
        if isinstance(tree, Chars):
            return True
        try:
            return not meet(continuations(tree), follow)
        except TooComplexError:
            return False

    def _inlined(self, tree: Tree) -> tuple[Tree, int] | None:
        """The tree with its rules put in place, and its size; None if they recur or are too large."""
        match tree:
            case Rule(name):
                return self._plain[name]
            case Sequence(parts) | Either(parts):
                found, size = [], 1
                for part in parts:
                    inner = self._inlined(part)
                    if inner is None or size > _MAX_INLINED:
                        return None
                    found.append(inner[0])
                    size += inner[1]
                return type(tree)(tuple(found)), size
            case Repeat(part, least, most):
                inner = self._inlined(part)
                return None if inner is None else (Repeat(inner[0], least, most), inner[1] + 1)
        return tree, 1

    def _find_plain(self) -> None:
        """In the order of dependence; rules that wait for one another recur."""
        uses = {name: _called(tree) for name, tree in self._rules.items()}
        users: dict[str, list[str]] = {}
        for name, called in uses.items():
            for other in called:
                users.setdefault(other, []).append(name)
        todo = [name for name, called in uses.items() if not called]
        while todo:
            name = todo.pop()
            found = self._inlined(self._rules[name])
            self._plain[name] = found if found is not None and found[1] <= _MAX_INLINED else None
            for user in users.get(name, ()):
                uses[user].discard(name)
                if not uses[user] and user not in self._plain:
                    todo.append(user)
        for name in self._rules:
            self._plain.setdefault(name, None)

    def _is_empty(self, tree: Tree) -> bool:
        match tree:
            case Rule(name):
                return name in self._empty
            case Sequence(parts):
                return all(map(self._is_empty, parts))
            case Either(parts):
                return any(map(self._is_empty, parts))
            case Repeat(part, least):
                return least == 0 or self._is_empty(part)
        return False

    def _first_of(self, tree: Tree) -> Ranges:
        match tree:
            case Chars(ranges):
                return ranges
            case Rule(name):
                return self._first[name]
            case Sequence(parts):
                found: list[Ranges] = []
                for part in parts:
                    found.append(self._first_of(part))
                    if not self._is_empty(part):
                        break
                return union(*found)
            case Either(parts):
                return union(*map(self._first_of, parts))
            case Repeat(part):
                return self._first_of(part)
        return ()

    def _find_first(self) -> None:
        growing = True
        while growing:
            more = {name for name, tree in self._rules.items() if name not in self._empty and self._is_empty(tree)}
            self._empty |= more
            growing = bool(more)
        growing = True
        while growing:
            found = {name: self._first_of(tree) for name, tree in self._rules.items()}
            growing = found != self._first
            self._first = found

    def _find_follow(self) -> None:
        growing = True
        while growing:
            before = dict(self._follow)
            for name, tree in self._rules.items():
                self._add_follow(tree, self._follow[name])
            growing = before != self._follow

    def _add_follow(self, tree: Tree, follow: Ranges) -> None:
        match tree:
            case Rule(name):
                self._follow[name] = union(self._follow[name], follow)
            case Sequence(parts):
                for part in reversed(parts):
                    self._add_follow(part, follow)
                    follow = union(self._first_of(part), follow if self._is_empty(part) else ())
            case Either(parts):
                for part in parts:
                    self._add_follow(part, follow)
            case Repeat(part):
                self._add_follow(part, union(self._first_of(part), follow))


def _called(tree: Tree) -> set[str]:
    found: set[str] = set()
    todo = [tree]
    while todo:
        match todo.pop():
            case Rule(name):
                found.add(name)
            case Sequence(parts) | Either(parts):
                todo += parts
            case Repeat(part):
                todo.append(part)
    return found
