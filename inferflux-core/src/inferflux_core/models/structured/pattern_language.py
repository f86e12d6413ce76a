"""The set of texts that a pattern matches, as an automaton: whether a text is one of them, whether two sets have one in
common, what one looks like, and a pattern of all others.

Everything is bounded: an automaton that grows beyond its budget raises `TooComplexError`, and who asked has to do without.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from inferflux_core.models.structured.pattern_syntax import (
    ANY,
    EMPTY,
    Chars,
    Edge,
    Either,
    Ranges,
    Repeat,
    Tree,
    complement,
    union,
    whole,
)
from inferflux_core.models.structured.pattern_syntax import Sequence as Row

_MAX_NODES: Final = 20_000  # of one automaton
_MAX_STATES: Final = 400  # of automata in step with one another
_MAX_STEPS: Final = 200_000  # from one state to another, of all automata
_MAX_ELIMINATED: Final = 24  # states of an automaton that is written as a pattern
_MAX_WRITTEN: Final = 20_000  # nodes of that pattern


class Budget:
    """Work that the automata of one schema may cost together."""

    def __init__(self, steps: int = _MAX_STEPS) -> None:
        self._steps = steps

    def spend(self, steps: int) -> None:
        """Raises TooComplexError."""
        self._steps -= steps
        if self._steps < 0:
            raise TooComplexError


class TooComplexError(Exception):
    """The automaton is larger than its budget, or holds Unicode classes whose characters are not known here."""


class Language:
    """The texts in which a pattern finds a match: it matches anywhere, unless the tree has edges.

    Raises:
        TooComplexError: it is too large.
    """

    def __init__(self, tree: Tree) -> None:
        self._empty: list[list[tuple[int, bool | None]]] = []  # node -> (next, edge it asks for); without a character
        self._chars: list[list[tuple[Ranges, int]]] = []  # node -> (characters, next)
        start, self._final = self._node(), self._node()
        self._chars[start].append((ANY.ranges, start))
        self._chars[self._final].append((ANY.ranges, self._final))
        self._add(tree, start, self._final)
        self._start = start
        self.first = self._closed({start}, at_start=True)

    def matches(self, text: str) -> bool:
        states = self.first
        for char in text:
            states = self.step(states, ord(char))
        return self.accepts(states)

    def accepts(self, states: frozenset[int]) -> bool:
        return self._final in self._closure(states, at_start=states is self.first, at_end=True)

    def step(self, states: frozenset[int], code: int) -> frozenset[int]:
        found = {
            end for state in states for ranges, end in self._chars[state] if any(low <= code <= high for low, high in ranges)
        }
        return self._closed(found, at_start=False)

    def ranges(self, states: frozenset[int]) -> list[Ranges]:
        """What the next character is told apart by."""
        return [ranges for state in states for ranges, _ in self._chars[state]]

    def _node(self) -> int:
        if len(self._chars) >= _MAX_NODES:
            raise TooComplexError
        self._empty.append([])
        self._chars.append([])
        return len(self._chars) - 1

    def _add(self, tree: Tree, start: int, end: int) -> None:
        match tree:
            case Chars(ranges, named):
                if named:
                    raise TooComplexError
                self._chars[start].append((ranges, end))
            case Edge(is_start):
                self._empty[start].append((end, is_start))
            case Row(parts):
                for part in parts[:-1]:
                    middle = self._node()
                    self._add(part, start, middle)
                    start = middle
                if parts:
                    self._add(parts[-1], start, end)
                else:
                    self._empty[start].append((end, None))
            case Either(parts):
                for part in parts:
                    self._add(part, start, end)
            case Repeat(part, least, most):
                for _ in range(least):
                    middle = self._node()
                    self._add(part, start, middle)
                    start = middle
                if most is None:
                    loop, after = self._node(), self._node()
                    self._empty[start].append((loop, None))
                    self._add(part, loop, after)
                    self._empty[after].append((loop, None))
                    self._empty[loop].append((end, None))
                    return
                for _ in range(least, most):
                    middle = self._node()
                    self._empty[start].append((end, None))
                    self._add(part, start, middle)
                    start = middle
                self._empty[start].append((end, None))

    def _closed(self, states: Iterable[int], *, at_start: bool) -> frozenset[int]:
        return frozenset(self._closure(states, at_start=at_start, at_end=False))

    def _closure(self, states: Iterable[int], *, at_start: bool, at_end: bool) -> set[int]:
        found = set(states)
        todo = list(found)
        while todo:
            for end, edge in self._empty[todo.pop()]:
                passes = edge is None or (at_start if edge else at_end)
                if passes and end not in found:
                    found.add(end)
                    todo.append(end)
        return found


class _Together:
    """Several automata in step, each state numbered; what a combination accepts is up to `accepts`."""

    def __init__(self, languages: Sequence[Language], accepts: Callable[[list[bool]], bool], budget: Budget) -> None:
        self._languages = languages
        self._judge = accepts
        self.states: dict[tuple[frozenset[int], ...], int] = {}
        self.accepting: list[bool] = []
        self.moves: list[list[tuple[Ranges, int]]] = []
        self._add(tuple(language.first for language in languages))
        todo = deque(self.states)
        while todo:
            state = todo.popleft()
            for classes in _classes(
                [r for language, part in zip(languages, state, strict=True) for r in language.ranges(part)]
            ):
                budget.spend(1 + sum(map(len, state)))
                code = classes[0][0]
                end = tuple(language.step(part, code) for language, part in zip(languages, state, strict=True))
                if end not in self.states:
                    self._add(end)
                    todo.append(end)
                self.moves[self.states[state]].append((classes, self.states[end]))

    def _add(self, state: tuple[frozenset[int], ...]) -> None:
        if len(self.states) >= _MAX_STATES:
            raise TooComplexError
        self.states[state] = len(self.states)
        self.accepting.append(
            self._judge([language.accepts(part) for language, part in zip(self._languages, state, strict=True)])
        )
        self.moves.append([])

    def shortest(self) -> str | None:
        """The shortest text that is accepted, of letters and digits where possible."""
        came: dict[int, tuple[int, str]] = {0: (0, "")}
        todo = deque([0])
        while todo:
            state = todo.popleft()
            if self.accepting[state]:
                text = ""
                while state:
                    state, char = came[state]
                    text = char + text
                return text
            for ranges, end in self.moves[state]:
                if end not in came:
                    came[end] = (state, _readable(ranges))
                    todo.append(end)
        return None

    def tree(self) -> Tree | None:
        """A pattern of all texts that are accepted, as a whole match; None if there is none.

        Raises:
            TooComplexError: the pattern would be too large.
        """
        live = self.live()
        if 0 not in live:
            return None
        if len(live) > _MAX_ELIMINATED:
            raise TooComplexError
        arcs: dict[tuple[int, int], Tree] = {}
        begin, end = -1, -2
        arcs[begin, 0] = EMPTY
        for state in live:
            grouped: dict[int, list[Ranges]] = {}
            for ranges, target in self.moves[state]:
                if target in live:
                    grouped.setdefault(target, []).append(ranges)
            for target, sets in grouped.items():
                arcs[state, target] = Chars(union(*sets))
            if self.accepting[state]:
                arcs[state, end] = EMPTY
        for state in sorted(live, key=lambda state: sum(state in arc for arc in arcs)):
            loop = arcs.pop((state, state), None)
            around = () if loop is None else (Repeat(loop, 0, None),)
            before = [(first, tree) for (first, last), tree in arcs.items() if last == state]
            after = [(last, tree) for (first, last), tree in arcs.items() if first == state]
            for first, left in before:
                for last, right in after:
                    row = _row(left, *around, right)
                    arcs[first, last] = _either(arcs[first, last], row) if (first, last) in arcs else row
            for arc in [arc for arc in arcs if state in arc]:
                del arcs[arc]
        tree = arcs[begin, end]
        _check_size(tree)
        return tree

    def live(self) -> set[int]:
        """States from which a text can still be accepted. All are reachable."""
        live = {state for state, accepting in enumerate(self.accepting) if accepting}
        growing = True
        while growing:
            more = {state for state, moves in enumerate(self.moves) if any(end in live for _, end in moves)} - live
            growing = bool(more)
            live |= more
        return live


def continuations(tree: Tree) -> Ranges:
    """Characters with which a whole match can begin that is already one without them.

    Raises:
        TooComplexError: it cannot be told within bounds.
    """
    machine = _Together([Language(whole(tree))], all, Budget())
    live = machine.live()
    return union(
        *(
            ranges
            for state, moves in enumerate(machine.moves)
            if machine.accepting[state]
            for ranges, end in moves
            if end in live
        )
    )


def common_text(inside: Sequence[Language], outside: Sequence[Language] = (), budget: Budget | None = None) -> str | None:
    """The shortest text in all of `inside` and in none of `outside`; None if there is none.

    Raises:
        TooComplexError: it cannot be told within bounds.
    """
    return _together(inside, outside, budget).shortest()


def common_pattern(inside: Sequence[Language], outside: Sequence[Language], budget: Budget | None = None) -> Tree | None:
    """A pattern, as a whole match, of the texts in all of `inside` and in none of `outside`; None if there is none.

    Raises:
        TooComplexError: it would be too large.
    """
    return _together(inside, outside, budget).tree()


def _together(inside: Sequence[Language], outside: Sequence[Language], budget: Budget | None) -> _Together:
    count = len(inside)
    return _Together([*inside, *outside], lambda found: all(found[:count]) and not any(found[count:]), budget or Budget())


def _classes(sets: list[Ranges]) -> list[Ranges]:
    """All characters, in classes that none of these sets divides."""
    classes = [ANY.ranges]
    for ranges in set(sets):
        parts = []
        for each in classes:
            parts += [part for part in (meet(each, ranges), meet(each, complement(ranges))) if part]
        classes = parts
        if len(classes) > _MAX_STATES:
            raise TooComplexError
    return classes


def meet(left: Ranges, right: Ranges) -> Ranges:
    found = []
    first = second = 0
    while first < len(left) and second < len(right):
        low, high = max(left[first][0], right[second][0]), min(left[first][1], right[second][1])
        if low <= high:
            found.append((low, high))
        if left[first][1] < right[second][1]:
            first += 1
        else:
            second += 1
    return tuple(found)


def _readable(ranges: Ranges) -> str:
    for low, high in ((97, 122), (48, 57), (65, 90), (95, 95), (45, 45), (32, 126)):
        if found := meet(ranges, ((low, high),)):
            return chr(found[0][0])
    return chr(ranges[0][0])


def _row(*parts: Tree) -> Tree:
    flat: list[Tree] = []
    for part in parts:
        flat += part.parts if isinstance(part, Row) else (part,)
    return flat[0] if len(flat) == 1 else Row(tuple(flat))


def _either(*parts: Tree) -> Tree:
    flat: list[Tree] = []
    for part in parts:
        flat += part.parts if isinstance(part, Either) else (part,)
    return Either(tuple(dict.fromkeys(flat)))


def _check_size(tree: Tree) -> None:
    todo, count = [tree], 0
    while todo:
        count += 1
        if count > _MAX_WRITTEN:
            raise TooComplexError
        match todo.pop():
            case Row(parts) | Either(parts):
                todo += parts
            case Repeat(part):
                todo.append(part)
