"""Regular expressions as JSON Schema writes them (ECMA-262), read into a tree and written for llguidance.

A schema's author means ECMA's dialect, many validators read Python's, and llguidance reads Rust's. Where they differ a tree
holds what all of them accept, so that a text made from it is valid whoever checks it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

MAX_REPEAT: Final = 20_000  # largest bound of a repetition
_MAX_DEPTH: Final = 100
_LAST: Final = 0x10FFFF

Ranges = tuple[tuple[int, int], ...]  # code points, inclusive, sorted, apart


class PatternError(ValueError):
    """The pattern cannot be held; the message says why, and never holds more than a few characters of it."""


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of `ranges`, or of the named Unicode classes `named` (written as Rust does, such as `\\p{L}`)."""

    ranges: Ranges
    named: tuple[str, ...] = ()
    negated: bool = False  # of both; only where `named` is not empty


@dataclass(frozen=True, slots=True)
class Sequence:
    parts: tuple[Tree, ...]


@dataclass(frozen=True, slots=True)
class Either:
    parts: tuple[Tree, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    part: Tree
    least: int
    most: int | None


@dataclass(frozen=True, slots=True)
class Edge:
    """`^` or `$`."""

    is_start: bool


@dataclass(frozen=True, slots=True)
class Rule:
    """What a rule of a grammar matches; patterns have none."""

    name: str


Tree = Chars | Sequence | Either | Repeat | Edge | Rule

EMPTY: Final = Sequence(())


def union(*sets: Ranges) -> Ranges:
    found: list[tuple[int, int]] = []
    for low, high in sorted(pair for ranges in sets for pair in ranges):
        if found and low <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return tuple(found)


def complement(ranges: Ranges) -> Ranges:
    """All other code points but the surrogates, which no text has."""
    found, start = [], 0
    for low, high in union(ranges, ((0xD800, 0xDFFF),)):
        if start < low:
            found.append((start, low - 1))
        start = high + 1
    if start <= _LAST:
        found.append((start, _LAST))
    return tuple(found)


ANY: Final = Chars(complement(()))
_LINE_ENDS: Final[Ranges] = ((10, 10), (13, 13), (0x2028, 0x2029))
_DIGIT: Final[Ranges] = ((48, 57),)
_WORD: Final[Ranges] = ((48, 57), (65, 90), (95, 95), (97, 122))
_SPACE: Final[Ranges] = ((9, 13), (32, 32), (160, 160), (0x1680, 0x1680), (0x2000, 0x200A), (0x2028, 0x2029), (0x202F, 0x202F),
                         (0x205F, 0x205F), (0x3000, 0x3000))  # fmt: skip
_ASCII: Final[Ranges] = ((0, 127),)
_OTHER: Final[Ranges] = ((128, _LAST),)
# What a class escape is for sure, and what it may be: dialects disagree on characters beyond ASCII.
_SURE: Final[dict[str, Ranges]] = {
    "d": _DIGIT,
    "D": complement(union(_DIGIT, ((0x0660, _LAST),))),
    "w": _WORD,
    "W": complement(union(_WORD, _OTHER)),
    "s": _SPACE,
    "S": complement(union(_SPACE, ((28, 31), (0x85, 0x85), (0xFEFF, 0xFEFF)))),
}
_MAYBE: Final[dict[str, Ranges]] = {
    "d": union(_DIGIT, ((0x0660, _LAST),)),
    "D": complement(_DIGIT),
    "w": union(_WORD, _OTHER),
    "W": complement(_WORD),
    "s": union(_SPACE, ((28, 31), (0x85, 0x85), (0xFEFF, 0xFEFF))),
    "S": complement(_SPACE),
}
_CONTROLS: Final = {"t": 9, "n": 10, "v": 11, "f": 12, "r": 13, "0": 0, "a": 7}


def parse(pattern: str, *, wide: bool = False) -> Tree:
    """The tree of a pattern.

    Args:
        wide: of what any dialect may accept, rather than of what all do: for what must not match.

    Raises:
        PatternError: it is malformed, or needs what no finite automaton does.
    """
    reader = _Reader(pattern, wide)
    tree = reader.either()
    if reader.at < len(pattern):
        raise PatternError(f"has an unmatched ')' at position {reader.at}")
    _check_edges(tree, first=True, last=True)
    return tree


def literal(text: str) -> Tree:
    """The tree of exactly this text, without edges."""
    return Sequence(tuple(Chars(((ord(char), ord(char)),)) for char in text))


def whole(tree: Tree) -> Tree:
    """The same tree as a match of the whole text."""
    return Sequence((Edge(True), tree, Edge(False)))


def _check_edges(tree: Tree, *, first: bool, last: bool) -> None:
    """Edges are for the begin and the end of the text only: elsewhere they would be a look-around."""
    match tree:
        case Edge(is_start):
            if not (first if is_start else last):
                raise PatternError(f"has {'^' if is_start else '$'!r} in a place other than the begin or the end")
        case Sequence(parts):
            for index, part in enumerate(parts):
                before, after = parts[:index], parts[index + 1 :]
                _check_edges(
                    part,
                    first=first and all(isinstance(other, Edge) and other.is_start for other in before),
                    last=last and all(isinstance(other, Edge) and not other.is_start for other in after),
                )
        case Either(parts):
            for part in parts:
                _check_edges(part, first=first, last=last)
        case Repeat(part):
            _check_edges(part, first=False, last=False)


class _Reader:
    def __init__(self, pattern: str, wide: bool) -> None:
        self._text = pattern
        self._wide = wide
        self.at = 0
        self._depth = 0

    def _peek(self, text: str) -> bool:
        return self._text.startswith(text, self.at)

    def _take(self, text: str) -> bool:
        if self._peek(text):
            self.at += len(text)
            return True
        return False

    def _next(self) -> str:
        if self.at >= len(self._text):
            raise PatternError("ends too early")
        self.at += 1
        return self._text[self.at - 1]

    def either(self) -> Tree:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise PatternError(f"nests deeper than {_MAX_DEPTH} groups")
        parts = [self._sequence()]
        while self._take("|"):
            parts.append(self._sequence())
        self._depth -= 1
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def _sequence(self) -> Tree:
        parts: list[Tree] = []
        while self.at < len(self._text) and self._text[self.at] not in "|)":
            parts.append(self._repeated())
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def _repeated(self) -> Tree:
        tree = self._one()
        while (bounds := self._bounds()) is not None:
            if isinstance(tree, Edge):
                raise PatternError("repeats '^' or '$'")
            tree = Repeat(tree, *bounds)
            self._take("?")  # lazy or not, the texts that match are the same
            if self._peek("+"):
                raise PatternError("uses a possessive repetition")
        return tree

    def _bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        if not self._peek("{"):
            return None
        end = self._text.find("}", self.at)
        least, comma, most = self._text[self.at + 1 : max(end, self.at + 1)].partition(",")
        if end < 0 or not _is_number(least) or not (most == "" or _is_number(most)):
            return None  # a brace is a character where it is no repetition
        self.at = end + 1
        low = int(least)
        high = low if not comma else int(most) if most else None
        if high is not None and high < low:
            raise PatternError(f"has the repetition {{{low},{high}}}, whose bounds are swapped")
        if max(low, high or 0) > MAX_REPEAT:
            raise PatternError(f"repeats more than {MAX_REPEAT} times")
        return low, high

    def _one(self) -> Tree:
        char = self._next()
        if char == "(":
            return self._group()
        if char == "[":
            return self._set()
        if char == "\\":
            return self._escape()
        if char == ".":
            return Chars(complement(_LINE_ENDS[:1] if self._wide else _LINE_ENDS))
        if char in "^$":
            return Edge(char == "^")
        if char in "*+?":
            raise PatternError(f"repeats nothing at position {self.at - 1}")
        return _char(char)

    def _group(self) -> Tree:
        if self._take("?"):
            if self._peek("=") or self._peek("!") or self._peek("<=") or self._peek("<!"):
                raise PatternError("uses a look-around, which cannot be enforced")
            if self._take("<") or self._take("P<"):
                if (end := self._text.find(">", self.at)) < 0:
                    raise PatternError("has a group name without '>'")
                self.at = end + 1
            elif not self._take(":"):
                raise PatternError(f"has an unknown kind of group at position {self.at - 2}")
        tree = self.either()
        if not self._take(")"):
            raise PatternError("has an unmatched '('")
        return tree

    def _escape(self) -> Tree:
        char = self._next()
        if char in _SURE:
            return Chars((_MAYBE if self._wide else _SURE)[char])
        if char in "pP":
            return Chars((), (self._named(char),))
        if char in "bB":
            raise PatternError(f"uses \\{char}, a look-around, which cannot be enforced")
        if char in "123456789" or char == "k":
            raise PatternError("uses a back-reference, which cannot be enforced")
        if char == "A":
            return Edge(True)
        if char in "Zz":
            return Edge(False)
        code = self._code(char)
        return Chars(((code, code),))

    def _named(self, kind: str) -> str:
        end = self._text.find("}", self.at)
        if not self._take("{") or end < 0 or not all(char.isalnum() or char in "_=" for char in self._text[self.at : end]):
            raise PatternError(f"has \\{kind} without a class in braces")
        name = self._text[self.at : end].removeprefix("General_Category=")
        self.at = end + 1
        if not name or len(name) > 40:
            raise PatternError(f"has \\{kind} with an unknown class")
        return f"\\{kind}{{{name}}}"

    def _code(self, char: str) -> int:
        if char in _CONTROLS:
            return _CONTROLS[char]
        if char == "c":
            return ord(self._next()) % 32
        if char == "x":
            return self._hex(2)
        if char == "u":
            if self._take("{"):
                end = self._text.find("}", self.at)
                return self._hex(max(0, end - self.at), closed=True)
            code = self._hex(4)
            if 0xD800 <= code < 0xDC00 and self._take("\\u"):
                code = 0x10000 + (code - 0xD800) * 1024 + (self._hex(4) - 0xDC00)
            return code
        if char.isalnum():
            raise PatternError(f"has the unknown escape \\{char}")
        return ord(char)

    def _hex(self, digits: int, *, closed: bool = False) -> int:
        text = self._text[self.at : self.at + digits]
        if not 1 <= digits <= 6 or len(text) < digits or not all(char in "0123456789abcdefABCDEF" for char in text):
            raise PatternError("has an incomplete hexadecimal escape")
        self.at += digits + closed
        code = int(text, 16)
        if code > _LAST:
            raise PatternError("has an escape beyond Unicode")
        return code

    def _set(self) -> Tree:
        negated = self._take("^")
        classes = _MAYBE if negated != self._wide else _SURE
        found: list[Ranges] = []
        named: list[str] = []
        while not self._take("]"):
            low = self._member(classes, found, named)
            if low is None or not (self._peek("-") and not self._peek("-]")):
                if low is not None:
                    found.append(((low, low),))
                continue
            self.at += 1
            high = self._member(classes, found, named)
            if high is None:
                found.append(((low, low), (45, 45)))
            elif high < low:
                raise PatternError("has a range of characters whose ends are swapped")
            else:
                found.append(((low, high),))
        ranges = union(*found)
        if named:
            return Chars(ranges, tuple(named), negated)
        return Chars(complement(ranges) if negated else complement(complement(ranges)))

    def _member(self, classes: dict[str, Ranges], found: list[Ranges], named: list[str]) -> int | None:
        """The code point of one member; None if it was a whole class, which is then in `found` or `named`."""
        char = self._next()
        if char != "\\":
            return ord(char)
        char = self._next()
        if char in classes:
            found.append(classes[char])
            return None
        if char in "pP":
            named.append(self._named(char))
            return None
        return 8 if char == "b" else self._code(char)


def _is_number(text: str) -> bool:
    return 1 <= len(text) <= 9 and text.isascii() and text.isdigit()


def _char(char: str) -> Chars:
    code = ord(char)
    if 0xD800 <= code <= 0xDFFF:
        raise PatternError("has half of a surrogate pair")
    return Chars(((code, code),))


def write(tree: Tree) -> str:
    """The tree in Rust's syntax, as llguidance reads it: as a search, so edges stand where they matter."""
    match tree:
        case Chars(ranges, named, negated):
            if not ranges and not named:
                return "[a&&b]"  # no character
            body = "".join(_code_text(low) if low == high else f"{_code_text(low)}-{_code_text(high)}" for low, high in ranges)
            if not named and not negated and len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
                return body
            return f"[{'^' if negated else ''}{body}{''.join(named)}]"
        case Sequence(parts):
            return "".join(f"(?:{write(part)})" if isinstance(part, Either) else write(part) for part in parts)
        case Either(parts):
            return "|".join(map(write, parts))
        case Repeat(part, least, most):
            bounds = {(0, None): "*", (1, None): "+", (0, 1): "?"}.get((least, most))
            if bounds is None:
                bounds = f"{{{least}}}" if least == most else f"{{{least},{'' if most is None else most}}}"
            inner = write(part)
            return f"{inner}{bounds}" if isinstance(part, Chars) else f"(?:{inner}){bounds}"
        case Edge(is_start):
            return "^" if is_start else "$"
        case Rule():
            raise TypeError("a rule is no pattern")


def _code_text(code: int) -> str:
    char = chr(code)
    return char if char.isascii() and (char.isalnum() or char in " _,:;@!%=<>'\"") else f"\\x{{{code:X}}}"


def ranges_of(tree: Tree) -> Ranges:
    """All characters that occur in a match; those of named classes count as all."""
    match tree:
        case Chars(ranges, named):
            return ANY.ranges if named else ranges
        case Sequence(parts) | Either(parts):
            return union(*map(ranges_of, parts))
        case Repeat(part):
            return ranges_of(part)
    return ()


def without_edges(tree: Tree) -> Tree:
    """The same tree where the whole text has to match, which makes its edges say nothing."""
    match tree:
        case Edge():
            return EMPTY
        case Sequence(parts):
            return Sequence(tuple(without_edges(part) for part in parts if not isinstance(part, Edge)))
        case Either(parts):
            return Either(tuple(map(without_edges, parts)))
    return tree
