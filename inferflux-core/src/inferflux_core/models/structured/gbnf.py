"""Grammars in GBNF, llama.cpp's notation, translated to Lark for llguidance.

GBNF is about characters, while llguidance reads lexemes first and takes the longest. So a rule becomes a lexeme only where
nothing that may follow could also continue it; else it stays a rule of single characters, which is slower and means the same.
"""

from __future__ import annotations

import re
from typing import Final

from inferflux_core.models.structured.gbnf_lexemes import Lexemes
from inferflux_core.models.structured.grammar_text import GrammarTextError
from inferflux_core.models.structured.pattern_syntax import (
    EMPTY,
    MAX_REPEAT,
    Chars,
    Either,
    Ranges,
    Repeat,
    Rule,
    Sequence,
    Tree,
    complement,
    union,
)

_NAME: Final = re.compile(r"[A-Za-z0-9_-]+")
_HEX_DIGITS: Final = {"x": 2, "u": 4, "U": 8}
_ESCAPES: Final = {"n": 10, "r": 13, "t": 9, "\\": 92, '"': 34, "[": 91, "]": 93, "-": 45, "^": 94, "/": 47}
_MAX_DEPTH: Final = 100
_MAX_RULES: Final = 2000


def is_gbnf(text: str) -> bool:
    """Whether this is GBNF rather than Lark: it defines a rule with `::=`."""
    return re.search(r"^\s*[A-Za-z0-9_-]+\s*::=", text, re.MULTILINE) is not None


def lark_of_gbnf(text: str) -> str:
    """The same grammar for llguidance.

    Raises:
        GrammarTextError: it is malformed, has no rule `root`, or uses control tokens.
    """
    rules = _Reader(text).rules()
    return Lexemes(rules).lark()


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._depth = 0
        self._used: dict[str, int] = {}  # name -> where it is used first

    def rules(self) -> dict[str, Tree]:
        rules: dict[str, Tree] = {}
        self._skip(lines=True)
        while self._at < len(self._text):
            start = self._at
            name = self._name()
            self._skip()
            if not self._text.startswith("::=", self._at):
                raise self._error("expected '::=' after the name of a rule")
            self._at += 3
            self._skip(lines=True)
            if name in rules:
                raise GrammarTextError(f"rule {name[:40]!r} is defined twice", self._text, start)
            rules[name] = self._either(nested=False)
            self._skip(lines=True)
            if len(rules) > _MAX_RULES:
                raise GrammarTextError(f"there are more than {_MAX_RULES} rules", self._text, start)
        if "root" not in rules:
            raise GrammarTextError("there is no rule 'root'", self._text, 0)
        for name, at in self._used.items():
            if name not in rules:
                raise GrammarTextError(f"rule {name[:40]!r} is not defined", self._text, at)
        return rules

    def _error(self, message: str) -> GrammarTextError:
        return GrammarTextError(message, self._text, min(self._at, len(self._text)))

    def _skip(self, *, lines: bool = False) -> None:
        """Pass over spaces and comments, and over line ends if they mean nothing here."""
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif char in " \t" or (lines and char in "\r\n"):
                self._at += 1
            else:
                return

    def _name(self) -> str:
        found = _NAME.match(self._text, self._at)
        if found is None:
            raise self._error("expected the name of a rule")
        self._at = found.end()
        return found.group()

    def _either(self, *, nested: bool) -> Tree:
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise self._error(f"groups are nested deeper than {_MAX_DEPTH}")
        parts = [self._sequence(nested=nested)]
        while self._bar(nested):
            self._at += 1
            self._skip(lines=True)
            parts.append(self._sequence(nested=nested))
        self._depth -= 1
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def _bar(self, nested: bool) -> bool:
        """Whether an alternative follows; it may begin the next line."""
        before = self._at
        self._skip(lines=True)
        if self._text.startswith("|", self._at):
            return True
        if not nested:
            self._at = before
        return False

    def _sequence(self, *, nested: bool) -> Tree:
        parts: list[Tree] = []
        while True:
            self._skip(lines=nested)
            if self._at >= len(self._text) or self._text[self._at] in "|)\r\n":
                return parts[0] if len(parts) == 1 else Sequence(tuple(parts))
            parts.append(self._repeated(self._one()))

    def _repeated(self, tree: Tree) -> Tree:
        while self._at < len(self._text) and self._text[self._at] in "*+?{":
            sign = self._text[self._at]
            if sign == "{":
                found = re.compile(r"\{\s*([0-9]{1,9})?\s*(,)?\s*([0-9]{1,9})?\s*\}").match(self._text, self._at)
                if found is None or not (found[1] or found[3]):
                    raise self._error("malformed repetition")
                least = int(found[1] or 0)
                most = int(found[3]) if found[3] else None if found[2] else least
                if (most is not None and most < least) or max(least, most or 0) > MAX_REPEAT:
                    raise self._error(f"a repetition needs bounds in order, of at most {MAX_REPEAT}")
                self._at = found.end()
            else:
                least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[sign]
                self._at += 1
            tree = Repeat(tree, least, most)
        return tree

    def _one(self) -> Tree:
        char = self._text[self._at]
        if char == '"':
            return self._string()
        if char == "[":
            return self._chars()
        if char == "(":
            self._at += 1
            tree = self._either(nested=True)
            self._skip(lines=True)
            if not self._text.startswith(")", self._at):
                raise self._error("expected ')'")
            self._at += 1
            return tree
        if char == ".":
            self._at += 1
            return Chars(complement(()))
        if char in "<!":
            raise self._error("control tokens ('<...>') cannot be used; write texts in quotes")
        at = self._at
        name = self._name() if _NAME.match(self._text, at) else ""
        if not name:
            raise self._error(f"unexpected {char!r}")
        self._used.setdefault(name, at)
        return Rule(name)

    def _string(self) -> Tree:
        self._at += 1
        parts: list[Tree] = []
        while not self._text.startswith('"', self._at):
            code = self._code()
            parts.append(Chars(((code, code),)))
        self._at += 1
        return Sequence(tuple(parts)) if parts else EMPTY

    def _chars(self) -> Tree:
        self._at += 1
        negated = self._text.startswith("^", self._at)
        self._at += negated
        found: list[Ranges] = []
        while not self._text.startswith("]", self._at):
            low = high = self._code()
            if self._text.startswith("-", self._at) and not self._text.startswith("-]", self._at):
                self._at += 1
                high = self._code()
                if high < low:
                    raise self._error("the ends of a range of characters are swapped")
            found.append(((low, high),))
        self._at += 1
        ranges = complement(union(*found))
        return Chars(ranges if negated else complement(ranges))

    def _code(self) -> int:
        if self._at >= len(self._text) or self._text[self._at] in "\r\n":
            raise self._error("a string or set of characters does not end")
        char = self._text[self._at]
        self._at += 1
        if char != "\\":
            return ord(char)
        escape = self._text[self._at : self._at + 1]
        self._at += 1
        if (digits := _HEX_DIGITS.get(escape)) is None:
            if escape not in _ESCAPES:
                raise self._error(f"unknown escape {escape!r}")
            return _ESCAPES[escape]
        text = self._text[self._at : self._at + digits]
        if len(text) < digits or re.fullmatch("[0-9a-fA-F]+", text) is None or int(text, 16) > 0x10FFFF:
            raise self._error("malformed hexadecimal escape")
        self._at += digits
        return int(text, 16)
