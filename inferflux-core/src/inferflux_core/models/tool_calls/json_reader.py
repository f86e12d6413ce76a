"""JSON that arrives in pieces: where it goes wrong and where it ends, to the character, whatever the pieces are.

Models write JSON with raw line ends in strings, which no client's parser takes: `copy` writes control characters in strings
as escapes. Everything else is passed on as it is. Time is linear in the text, memory in the nesting, which is bounded.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Final

MAX_DEPTH: Final = 128  # of nested arrays and objects; Python's own parser and most clients' recurse for each one

_SPACE = re.compile(r"[ \t\n\r]+")
_PLAIN = re.compile(r'(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})++')
_SCALAR_PIECE = re.compile(r"[-+.0-9A-Za-z]+")
_SCALAR = re.compile(r"(?:-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null)\Z")
_HEX = frozenset("0123456789abcdefABCDEF")
_SHORT_ESCAPES = frozenset('"\\/bfnrt')
# Long flat lists and objects at one go. All quantifiers are possessive: whatever does not match is scanned at most twice.
_STRING = r'"(?:[^"\\\x00-\x1f]++|\\["\\/bfnrt]|\\u[0-9a-fA-F]{4})*+"'
_FLAT = rf"(?:{_STRING}|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][-+]?[0-9]++)?|true|false|null)"
_ITEMS = re.compile(rf"(?>[ \t\n\r]*+{_FLAT}[ \t\n\r]*+,)++")
_MEMBERS = re.compile(rf"(?>[ \t\n\r]*+{_STRING}[ \t\n\r]*+:[ \t\n\r]*+{_FLAT}[ \t\n\r]*+,)++")


class NotJsonError(ValueError):
    """The text stops being JSON.

    Attributes:
        at: index of the first character that cannot follow.
    """

    def __init__(self, at: int) -> None:
        super().__init__(f"no JSON from character {at} on")
        self.at = at


class Piece(Enum):
    """What `JsonReader.step` went over. A string is several pieces, the last of which is its closing quote."""

    SPACE = auto()
    OPEN = auto()
    CLOSE = auto()
    COMMA = auto()
    COLON = auto()
    KEY = auto()
    KEY_END = auto()
    STRING = auto()
    STRING_END = auto()
    CONTROL = auto()  # a control character in a string or key, as no JSON text may have it
    SCALAR = auto()  # of a number, true, false or null: maybe a part


class _Expect(Enum):
    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()
    IN_KEY = auto()
    IN_STRING = auto()
    IN_SCALAR = auto()
    NOTHING = auto()


class JsonReader:
    """Goes over one JSON value that is an object or an array.

    Attributes:
        depth: open arrays and objects.
        piece: what the last `step` went over.
        ended: the value is complete; nothing may follow.
    """

    __slots__ = ("_escape", "_expect", "_scalar", "_stack", "ended", "piece")

    def __init__(self) -> None:
        self._expect = _Expect.VALUE
        self._stack: list[str] = []  # the closing characters that are due
        self._scalar: list[str] = []
        self._escape = 0  # in a string: characters that an escape still needs; 5 right after the backslash
        self.piece = Piece.SPACE
        self.ended = False

    @property
    def depth(self) -> int:
        return len(self._stack)

    def step(self, text: str, at: int) -> int:
        """Go over the next piece of `text[at:]`, which is not empty.

        Returns:
            where the piece ends.

        Raises:
            NotJsonError: no JSON goes on like this.
        """
        expect = self._expect
        if expect is _Expect.IN_STRING or expect is _Expect.IN_KEY:
            return self._in_string(text, at)
        if expect is _Expect.IN_SCALAR:
            if (match := _SCALAR_PIECE.match(text, at)) is not None:
                self._scalar.append(match.group())
                return match.end()
            if _SCALAR.match("".join(self._scalar)) is None:
                raise NotJsonError(at)
            self._expect = expect = _Expect.COMMA_OR_END
        char = text[at]
        if char in " \t\n\r":
            match = _SPACE.match(text, at)
            self.piece = Piece.SPACE
            return match.end() if match is not None else at + 1
        if char == '"':
            return self._quote(at)
        if char in "{[":
            return self._open(char, at)
        if char in "}]":
            return self._close(char, at)
        if char == "," and expect is _Expect.COMMA_OR_END:
            self._expect = _Expect.KEY if self._stack[-1] == "}" else _Expect.VALUE
            self.piece = Piece.COMMA
            return at + 1
        if char == ":" and expect is _Expect.COLON:
            self._expect = _Expect.VALUE
            self.piece = Piece.COLON
            return at + 1
        match = _SCALAR_PIECE.match(text, at)
        if match is None or not self._stack or expect not in (_Expect.VALUE, _Expect.VALUE_OR_END):
            raise NotJsonError(at)
        self._scalar = [match.group()]
        self._expect = _Expect.IN_SCALAR
        self.piece = Piece.SCALAR
        return match.end()

    def copy(self, text: str, at: int, floor: int, into: list[str]) -> int:
        """Go over `text[at:]` until no more than `floor` arrays and objects are open, and append it to `into`.

        Returns:
            where it stopped: behind the bracket that closed, or at the end of the text.

        Raises:
            NotJsonError: as `step`; what comes before its `at` is in `into`.
        """
        start, size = at, len(text)
        try:
            while at < size and (len(self._stack) > floor or not self._stack):
                if self._expect is _Expect.VALUE or self._expect is _Expect.KEY:
                    runs = _MEMBERS if self._expect is _Expect.KEY else _ITEMS
                    if self._stack and (self._stack[-1] == "}") == (runs is _MEMBERS) and (run := runs.match(text, at)):
                        at = run.end()
                        continue
                end = self.step(text, at)
                if self.piece is Piece.CONTROL:
                    into += (text[start:at], f"\\u{ord(text[at]):04x}" if text[at] not in "\n\t" else repr(text[at])[1:-1])
                    start = end
                at = end
                if self.ended:
                    break
        except NotJsonError as error:
            into.append(text[start : error.at])
            raise
        into.append(text[start:at])
        return at

    def _quote(self, at: int) -> int:
        if self._expect in (_Expect.KEY, _Expect.KEY_OR_END):
            self._expect = _Expect.IN_KEY
            self.piece = Piece.KEY
        elif self._expect in (_Expect.VALUE, _Expect.VALUE_OR_END) and self._stack:
            self._expect = _Expect.IN_STRING
            self.piece = Piece.STRING
        else:
            raise NotJsonError(at)
        return at + 1

    def _open(self, char: str, at: int) -> int:
        if self._expect not in (_Expect.VALUE, _Expect.VALUE_OR_END) or len(self._stack) >= MAX_DEPTH:
            raise NotJsonError(at)
        self._stack.append("}" if char == "{" else "]")
        self._expect = _Expect.KEY_OR_END if char == "{" else _Expect.VALUE_OR_END
        self.piece = Piece.OPEN
        return at + 1

    def _close(self, char: str, at: int) -> int:
        empty = _Expect.KEY_OR_END if char == "}" else _Expect.VALUE_OR_END
        if not self._stack or self._stack[-1] != char or self._expect not in (_Expect.COMMA_OR_END, empty):
            raise NotJsonError(at)
        self._stack.pop()
        self.ended = not self._stack
        self._expect = _Expect.NOTHING if self.ended else _Expect.COMMA_OR_END
        self.piece = Piece.CLOSE
        return at + 1

    def _in_string(self, text: str, at: int) -> int:
        key = self._expect is _Expect.IN_KEY
        self.piece = Piece.KEY if key else Piece.STRING
        if self._escape:
            return self._in_escape(text[at], at)
        if (match := _PLAIN.match(text, at)) is not None:
            return match.end()
        char = text[at]
        if char == "\\":
            self._escape = 5
        elif char == '"':
            self._expect = _Expect.COLON if key else _Expect.COMMA_OR_END
            self.piece = Piece.KEY_END if key else Piece.STRING_END
        else:
            self.piece = Piece.CONTROL
        return at + 1

    def _in_escape(self, char: str, at: int) -> int:
        if self._escape == 5:
            if char not in _SHORT_ESCAPES and char != "u":
                raise NotJsonError(at)
            self._escape = 4 if char == "u" else 0
        elif char in _HEX:
            self._escape -= 1
        else:
            raise NotJsonError(at)
        return at + 1


class StringDecoder:
    """Turns the inside of a JSON string, which `JsonReader` found valid, into its text; half a surrogate pair into U+FFFD."""

    __slots__ = ("_escape", "_high")

    _SHORT: Final = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}

    def __init__(self) -> None:
        self._escape = ""  # an escape that is not complete, with its backslash
        self._high = ""  # the first half of a surrogate pair

    def push(self, raw: str) -> str:
        """The text of a further piece, as far as it is known. Raw pieces may end within an escape."""
        if not self._escape and not self._high and "\\" not in raw:
            return raw
        text: list[str] = []
        at = 0
        while at < len(raw):
            if not self._escape:
                end = raw.find("\\", at)
                end = len(raw) if end < 0 else end
                if end > at:
                    text += (self._lone(), raw[at:end])
                if end < len(raw):
                    self._escape = "\\"
                at = end + 1
                continue
            self._escape += raw[at]
            at += 1
            if self._escape[1] != "u":
                text += (self._lone(), self._SHORT.get(self._escape[1], self._escape[1]))
                self._escape = ""
            elif len(self._escape) == 6:
                text.append(self._code_unit(chr(int(self._escape[2:], 16))))
                self._escape = ""
        return "".join(text)

    def finish(self) -> str:
        """What is left when the string has ended."""
        return self._lone()

    def _code_unit(self, unit: str) -> str:
        if "\ud800" <= unit <= "\udbff":
            text, self._high = self._lone(), unit
            return text
        if "\udc00" <= unit <= "\udfff":
            if not self._high:
                return "\ufffd"
            pair = (self._high + unit).encode("utf-16-le", "surrogatepass").decode("utf-16-le")
            self._high = ""
            return pair
        return self._lone() + unit

    def _lone(self) -> str:
        text, self._high = ("\ufffd" if self._high else ""), ""
        return text
